/* An echo server with libwebsockets, for client_test.py: prints its port. See client_servers.mjs for its commands.
 *
 *   client_server_lws [deflate]
 */

#include <libwebsockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int compressed; /* one client at a time */

struct session {
	unsigned char *bytes; /* LWS_PRE bytes for the header come first */
	size_t size;
	enum lws_write_protocol kind;
	int pings, echoes;
	int close_code;
	char reason[124];
};

static void set_text(struct session *s, const char *text)
{
	s->size = strlen(text);
	s->bytes = realloc(s->bytes, LWS_PRE + s->size);
	memcpy(s->bytes + LWS_PRE, text, s->size);
	s->kind = LWS_WRITE_TEXT;
}

/* The message is complete: decides what is written next. */
static void answer(struct session *s, struct lws *wsi)
{
	char line[160];
	size_t n = s->size < sizeof line - 1 ? s->size : sizeof line - 1;

	memcpy(line, s->bytes + LWS_PRE, n);
	line[n] = 0;
	if (strcmp(line, "ping") == 0) {
		s->pings = 1;
	} else if (sscanf(line, "close %d %123s", &s->close_code, s->reason) == 2) {
	} else {
		if (strcmp(line, "extensions") == 0) {
			snprintf(line, sizeof line, "extensions: [%s] protocol: %s",
				 compressed ? "permessage-deflate" : "", lws_get_protocol(wsi)->name);
			set_text(s, line);
		}
		s->echoes = 1;
	}
	lws_callback_on_writable(wsi);
}

static int receive(struct session *s, struct lws *wsi, const void *in, size_t n)
{
	if (lws_is_first_fragment(wsi))
		s->size = 0;
	s->bytes = realloc(s->bytes, LWS_PRE + s->size + n + 1);
	memcpy(s->bytes + LWS_PRE + s->size, in, n);
	s->size += n;
	s->kind = lws_frame_is_binary(wsi) ? LWS_WRITE_BINARY : LWS_WRITE_TEXT;
	lws_rx_flow_control(wsi, 0); /* the answer comes before the next message */
	if (lws_is_final_fragment(wsi) && lws_remaining_packet_payload(wsi) == 0)
		answer(s, wsi);
	else
		lws_rx_flow_control(wsi, 1);
	return 0;
}

static int write_answer(struct session *s, struct lws *wsi)
{
	unsigned char ping[LWS_PRE + 7];

	lws_rx_flow_control(wsi, 1);
	if (s->close_code) {
		lws_close_reason(wsi, (enum lws_close_status)s->close_code, (unsigned char *)s->reason,
				 strlen(s->reason));
		return -1;
	}
	if (s->pings) {
		s->pings = 0;
		memcpy(ping + LWS_PRE, "payload", 7);
		return lws_write(wsi, ping + LWS_PRE, 7, LWS_WRITE_PING) < 0 ? -1 : 0;
	}
	if (!s->echoes)
		return 0;
	s->echoes = 0;
	return lws_write(wsi, s->bytes + LWS_PRE, s->size, s->kind) < 0 ? -1 : 0;
}

static int on_event(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t n)
{
	struct session *s = user;
	char text[160];

	switch (reason) {
	case LWS_CALLBACK_FILTER_PROTOCOL_CONNECTION:
		compressed = 0;
		return 0;
	case LWS_CALLBACK_CONFIRM_EXTENSION_OKAY:
		compressed = 1;
		return 0;
	case LWS_CALLBACK_CLOSED:
		free(s->bytes);
		return 0;
	case LWS_CALLBACK_RECEIVE:
		return receive(s, wsi, in, n);
	case LWS_CALLBACK_RECEIVE_PONG:
		snprintf(text, sizeof text, "pong %.*s", (int)n, (const char *)in);
		set_text(s, text);
		s->echoes = 1;
		lws_callback_on_writable(wsi);
		return 0;
	case LWS_CALLBACK_SERVER_WRITEABLE:
		return write_answer(s, wsi);
	default:
		return 0;
	}
}

int main(int argc, char **argv)
{
	static const struct lws_protocols protocols[] = {
		{"two", on_event, sizeof(struct session), 65536, 0, NULL, 0},
		{NULL, NULL, 0, 0, 0, NULL, 0},
	};
	static const struct lws_extension extensions[] = {
		{"permessage-deflate", lws_extension_callback_pm_deflate, "permessage-deflate"},
		{NULL, NULL, NULL},
	};
	struct lws_context_creation_info info;
	struct lws_context *context;

	lws_set_log_level(LLL_ERR, NULL);
	memset(&info, 0, sizeof info);
	info.port = 0;
	info.iface = "127.0.0.1";
	info.protocols = protocols;
	if (argc > 1 && strcmp(argv[1], "deflate") == 0)
		info.extensions = extensions;
	info.options = LWS_SERVER_OPTION_EXPLICIT_VHOSTS;
	context = lws_create_context(&info);
	if (!context)
		return 1;
	printf("%d\n", lws_get_vhost_listen_port(lws_create_vhost(context, &info)));
	fflush(stdout);
	while (lws_service(context, 0) >= 0)
		;
	return 0;
}
