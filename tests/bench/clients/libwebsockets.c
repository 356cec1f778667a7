/* The client of libwebsockets, based on its minimal clients; see measure.h. */
#include "measure.h"

#include <libwebsockets.h>

struct session {
	unsigned char *bytes; /* LWS_PRE bytes for the header come first */
	size_t size; /* of what has arrived */
	int complete; /* there is a message to write; the library also calls back without one */
};

static int on_event(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t n)
{
	struct session *s = user;

	switch (reason) {
	case LWS_CALLBACK_CLIENT_ESTABLISHED:
		measure_open();
		s->bytes = malloc(LWS_PRE + measure_size);
		memset(s->bytes + LWS_PRE, 'x', measure_size);
		s->complete = 1;
		lws_callback_on_writable(wsi);
		return 0;
	case LWS_CALLBACK_CLIENT_RECEIVE:
		if (s->size + n > measure_size)
			measure_fail("libwebsockets: the message is too long");
		memcpy(s->bytes + LWS_PRE + s->size, in, n);
		s->size += n;
		if (s->size != measure_size)
			return 0;
		s->complete = 1;
		measure_messages = measure_messages + 1;
		lws_callback_on_writable(wsi);
		return 0;
	case LWS_CALLBACK_CLIENT_WRITEABLE:
		if (!s->complete)
			return 0;
		s->complete = 0;
		s->size = 0;
		return lws_write(wsi, s->bytes + LWS_PRE, measure_size, LWS_WRITE_TEXT) < 0 ? -1 : 0;
	case LWS_CALLBACK_CLIENT_CONNECTION_ERROR:
		measure_fail("libwebsockets: cannot connect");
		return -1;
	case LWS_CALLBACK_CLIENT_CLOSED:
		measure_fail("libwebsockets: a connection was lost");
		return -1;
	default:
		return 0;
	}
}

int main(int argc, char **argv)
{
	static const struct lws_protocols protocols[] = {
		{"echo", on_event, sizeof(struct session), 65536, 0, NULL, 0},
		{NULL, NULL, 0, 0, 0, NULL, 0},
	};
	struct lws_context_creation_info info;
	struct lws_client_connect_info to;
	struct lws_context *context;
	int i;

	measure_begin(argc, argv);
	lws_set_log_level(LLL_ERR, NULL);
	memset(&info, 0, sizeof info);
	info.port = CONTEXT_PORT_NO_LISTEN;
	info.protocols = protocols;
	context = lws_create_context(&info);
	if (!context)
		measure_fail("libwebsockets: no context");
	memset(&to, 0, sizeof to);
	to.context = context;
	to.address = to.host = "127.0.0.1";
	to.port = measure_port;
	to.path = "/";
	to.local_protocol_name = "echo";
	for (i = 0; i < measure_connections; ++i)
		if (!lws_client_connect_via_info(&to))
			measure_fail("libwebsockets: cannot connect");
	while (lws_service(context, 0) >= 0)
		;
	return 0;
}
