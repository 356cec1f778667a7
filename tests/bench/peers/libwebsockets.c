/* libwebsockets PORT room|echo [ev]: the peer for libwebsockets, based on its minimal servers. Messages are shared by
 * reference count, each session has a short queue, and the writeable callback writes until the socket is full.
 * The loop is the library's default, poll(), or with `ev` libev, which uses epoll. */

#include <libwebsockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct message {
	unsigned references;
	enum lws_write_protocol kind;
	size_t size, capacity;
	unsigned char bytes[]; /* LWS_PRE bytes for the header come first */
};

enum { queue_size = 256 }; /* a power of two */

struct session {
	struct lws *wsi;
	struct session *previous, *next;
	struct message *incoming;
	struct message **queue;
	unsigned head, tail;
};

static struct session *room;
static int echo;

static void release(struct message *m)
{
	if (m && --m->references == 0)
		free(m);
}

static void enqueue(struct session *s, struct message *m)
{
	if (!s->queue)
		s->queue = calloc(queue_size, sizeof *s->queue);
	if (!s->queue || s->tail - s->head == queue_size) /* too slow */
		return lws_set_timeout(s->wsi, PENDING_TIMEOUT_USER_OK, LWS_TO_KILL_ASYNC);
	m->references++;
	s->queue[s->tail++ % queue_size] = m;
	lws_callback_on_writable(s->wsi);
}

static int receive(struct session *s, const void *in, size_t n)
{
	struct message *m = s->incoming;
	size_t size = m ? m->size : 0, wanted = size + n + lws_remaining_packet_payload(s->wsi);

	if (!m || wanted > m->capacity) {
		m = realloc(m, sizeof *m + LWS_PRE + wanted);
		if (!m)
			return -1;
		m->capacity = wanted;
		s->incoming = m;
	}
	memcpy(m->bytes + LWS_PRE + size, in, n);
	m->size = size + n;
	if (lws_remaining_packet_payload(s->wsi) || !lws_is_final_fragment(s->wsi))
		return 0;
	s->incoming = NULL;
	m->references = 1;
	m->kind = lws_frame_is_binary(s->wsi) ? LWS_WRITE_BINARY : LWS_WRITE_TEXT;
	if (echo)
		enqueue(s, m);
	else
		for (struct session *each = room; each; each = each->next)
			enqueue(each, m);
	release(m);
	return 0;
}

static int write_some(struct session *s)
{
	while (s->head != s->tail) {
		struct message *m = s->queue[s->head++ % queue_size];
		int sent = lws_write(s->wsi, m->bytes + LWS_PRE, m->size, m->kind);

		release(m);
		if (sent < 0)
			return -1;
		if (s->head != s->tail && lws_send_pipe_choked(s->wsi)) {
			lws_callback_on_writable(s->wsi);
			break;
		}
	}
	return 0;
}

static void join(struct session *s, struct lws *wsi)
{
	s->wsi = wsi;
	s->next = room;
	if (room)
		room->previous = s;
	room = s;
}

static void leave(struct session *s)
{
	if (s->previous)
		s->previous->next = s->next;
	else if (room == s)
		room = s->next;
	if (s->next)
		s->next->previous = s->previous;
	while (s->head != s->tail)
		release(s->queue[s->head++ % queue_size]);
	free(s->queue);
	free(s->incoming);
}

static int on_event(struct lws *wsi, enum lws_callback_reasons reason, void *user, void *in, size_t n)
{
	struct session *s = user;

	switch (reason) {
	case LWS_CALLBACK_ESTABLISHED:
		join(s, wsi);
		return 0;
	case LWS_CALLBACK_CLOSED:
		leave(s);
		return 0;
	case LWS_CALLBACK_RECEIVE:
		return receive(s, in, n);
	case LWS_CALLBACK_SERVER_WRITEABLE:
		return write_some(s);
	default:
		return 0;
	}
}

static void on_signal(int number)
{
	(void)number;
	_exit(0);
}

int main(int argc, char **argv)
{
	static const struct lws_protocols protocols[] = {
		{"chat", on_event, sizeof(struct session), 65536, 0, NULL, 0},
		{NULL, NULL, 0, 0, 0, NULL, 0},
	};
	struct lws_context_creation_info info;
	struct lws_context *context;

	if (argc < 3)
		return fputs("usage: libwebsockets PORT room|echo [ev]\n", stderr), 1;
	echo = strcmp(argv[2], "echo") == 0;
	signal(SIGINT, on_signal);
	signal(SIGTERM, on_signal);
	lws_set_log_level(LLL_ERR, NULL);
	memset(&info, 0, sizeof info);
	info.port = atoi(argv[1]);
	info.iface = "127.0.0.1";
	info.protocols = protocols;
	info.options = argc > 3 && strcmp(argv[3], "ev") == 0 ? LWS_SERVER_OPTION_LIBEV : 0;
	context = lws_create_context(&info);
	if (!context)
		return fprintf(stderr, "libwebsockets: cannot listen on 127.0.0.1:%s\n", argv[1]), 1;
	printf("libwebsockets: listening on 127.0.0.1:%s\n", argv[1]);
	fflush(stdout);
	while (lws_service(context, 0) >= 0)
		;
	lws_context_destroy(context);
	return 0;
}
