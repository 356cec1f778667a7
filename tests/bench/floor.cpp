// floor PORT room|echo: measures the cost of the kernel alone. It is one epoll loop that trusts its input: no limits,
// no UTF-8 validation, no timeouts, no origin check, no keepalive. It is the reference of tests/bench, not an example
// of a server.
//
// It is cheap because of: edge-triggered events, so a drained socket is not read again; one buffer for the frames of a
// turn, sent to each member with one call; large frames that are received in place, unmasked while they are in the
// cache, and echoed from the same memory; large buffers that begin in the middle of a page, because the kernel copies
// slowly between addresses with similar page offsets.

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr std::size_t large = 64 * 1024, page = 4096;

struct Buffer {
    char* data = nullptr;
    std::size_t size = 0, capacity = 0;

    void reserve(std::size_t wanted) {
        if (wanted <= capacity) return;
        wanted = wanted < page ? wanted : (std::max)(wanted, capacity * 2);
        const bool big = wanted >= large;
        void* block = big ? std::aligned_alloc(page, (wanted + 2 * page) / page * page) : std::malloc(wanted);
        if (block == nullptr) std::abort();
        char* moved = static_cast<char*>(block) + (big ? page / 2 : 0);
        if (size != 0) std::memcpy(moved, data, size);
        release();
        data = moved;
        capacity = wanted;
    }
    void release() { std::free(capacity >= large ? data - page / 2 : data); }
    char* grow(std::size_t n) {
        reserve(size + n);
        return data + (size += n) - n;
    }
    void append(const char* p, std::size_t n) { std::memcpy(grow(n), p, n); }
};

struct Connection {
    int fd = -1;
    bool open = false;         // the handshake is complete
    std::uint32_t index = 0;   // index in the room
    std::size_t unmasked = 0;  // unmasked payload bytes of the incomplete frame in `in`
    std::size_t sent = 0;      // sent bytes of `out`
    Buffer in, out;            // in: an incomplete frame; out: the backlog
};

struct Frame {
    std::size_t header, size;
};  // size: of the whole frame, or 0 if more bytes are needed

bool echo;
Buffer output;  // outgoing frames: to the room at the end of a turn, or back to the sender
std::vector<Connection*> room;
char scratch[4 * large];

std::uint32_t rotate(std::uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }

void sha1_block(std::uint32_t (&h)[5], const unsigned char* block) {
    std::uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    std::memcpy(w, block, 64);
    for (int i = 0; i < 16; ++i) w[i] = ntohl(w[i]);
    for (int i = 16; i < 80; ++i) w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    const auto step = [&](std::uint32_t f, std::uint32_t x) {
        const std::uint32_t next = rotate(a, 5) + f + e + x;
        e = d;
        d = c;
        c = rotate(b, 30);
        b = a;
        a = next;
    };
    for (int i = 0; i < 20; ++i) step(d ^ (b & (c ^ d)), 0x5A827999 + w[i]);
    for (int i = 20; i < 40; ++i) step(b ^ c ^ d, 0x6ED9EBA1 + w[i]);
    for (int i = 40; i < 60; ++i) step((b & c) | (d & (b | c)), 0x8F1BBCDC + w[i]);
    for (int i = 60; i < 80; ++i) step(b ^ c ^ d, 0xCA62C1D6 + w[i]);
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
    h[4] += e;
}

// RFC 6455 4.2.2: base64 of the SHA-1 of key and GUID. These are 60 bytes, which fill two blocks with their padding.
void put_accept_value(char* to, const char* key) {
    unsigned char text[128] = {};
    std::memcpy(text, key, 24);
    std::memcpy(text + 24, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11\x80", 37);
    text[126] = (60 * 8) >> 8;
    text[127] = (60 * 8) & 255;
    std::uint32_t h[6] = {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0, 0};
    auto& digest = reinterpret_cast<std::uint32_t(&)[5]>(h);
    sha1_block(digest, text);
    sha1_block(digest, text + 64);
    for (unsigned i = 0; i < 27; ++i) {  // six bits from bit 6 * i; they may span two words
        const std::uint64_t two = static_cast<std::uint64_t>(h[i * 6 / 32]) << 32 | h[(std::min)(i * 6 / 32 + 1, 5u)];
        *to++ = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[two >> (58 - i * 6 % 32) & 63];
    }
    *to = '=';
}

// A client's frame: two bytes, then 0, 2 or 8 bytes of length, then the mask.
Frame frame_at(const char* data, std::size_t n) {
    const auto* p = reinterpret_cast<const unsigned char*>(data);
    if (n < 6) return {0, 0};
    const std::size_t shortest = p[1] & 127u, header = shortest < 126 ? 6 : shortest == 126 ? 8 : 14;
    if (n < header) return {0, 0};
    std::size_t size = shortest < 126 ? shortest : 0;
    for (std::size_t i = 2; i < header - 4; ++i) size = size << 8 | p[i];
    return {header, header + size};
}

// `at` is the position in the payload. `to` may equal `from`.
void unmask(char* to, const char* from, std::size_t n, const char* mask, std::size_t at) {
    using Block = std::uint32_t __attribute__((vector_size(64)));
    char rotated[4];
    for (std::size_t i = 0; i < 4; ++i) rotated[i] = mask[(at + i) & 3];
    std::uint32_t key;
    std::memcpy(&key, rotated, 4);
    std::size_t i = 0;
    for (Block block; i + 64 <= n; i += 64) {
        std::memcpy(&block, from + i, 64);
        block ^= key;
        std::memcpy(to + i, &block, 64);
    }
    for (std::uint32_t word; i + 4 <= n; i += 4) {
        std::memcpy(&word, from + i, 4);
        word ^= key;
        std::memcpy(to + i, &word, 4);
    }
    for (; i < n; ++i) to[i] = static_cast<char>(from[i] ^ rotated[i & 3]);
}

// A server's header is the client's header without the mask bit. It is written directly before `payload`.
char* put_header(char* payload, const char* frame, const Frame& f) {
    char* begin = payload - (f.header - 4);
    std::memmove(begin, frame, f.header - 4);
    begin[1] = static_cast<char>(begin[1] & 127);
    return begin;
}

void send_to(Connection& c, const char* p, std::size_t n) {
    if (c.out.size == 0) {
        const ssize_t k = ::send(c.fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (k == static_cast<ssize_t>(n)) return;
        if (k < 0 && errno != EAGAIN) return;  // the next read reports the error
        if (k > 0) {
            p += k;
            n -= static_cast<std::size_t>(k);
        }
    }
    c.out.append(p, n);
}

void flush(Connection& c) {
    const ssize_t k = ::send(c.fd, c.out.data + c.sent, c.out.size - c.sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (k > 0 && (c.sent += static_cast<std::size_t>(k)) == c.out.size) c.sent = c.out.size = 0;
}

void close(Connection* c) {
    if (c->open) {
        (room[c->index] = room.back())->index = c->index;
        room.pop_back();
    }
    ::close(c->fd);
    c->in.release();
    c->out.release();
    delete c;
}

// The request ends with the bytes, because a client waits for the response.
bool handshake(Connection& c, const char* p, std::size_t n) {
    static char response[] =
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Accept: ----------------------------\r\n\r\n";
    const auto* key = static_cast<const char*>(memmem(p, n, "Sec-WebSocket-Key: ", 19));
    if (key == nullptr || std::memcmp(p + n - 4, "\r\n\r\n", 4) != 0) return false;
    put_accept_value(response + sizeof response - 1 - 32, key + 19);
    send_to(c, response, sizeof response - 1);
    c.index = static_cast<std::uint32_t>(room.size());
    room.push_back(&c);
    return c.open = true;
}

// Unmasks small frames into `output`. Returns the number of used bytes.
std::size_t read_frames(const char* p, std::size_t n) {
    std::size_t used = 0;
    for (;;) {
        const Frame f = frame_at(p + used, n - used);
        if (f.size == 0 || f.size > n - used) return used;
        char* payload = output.grow(f.size - 4) + f.header - 4;
        put_header(payload, p + used, f);
        unmask(payload, p + used + f.header, f.size - f.header, p + used + f.header - 4, 0);
        used += f.size;
    }
}

// A large frame in the connection's own buffer is unmasked as it arrives and echoed from there.
void read_large_frame(Connection& c, const Frame& f) {
    char* payload = c.in.data + f.header;
    const std::size_t ready = c.in.size - f.header;
    unmask(payload + c.unmasked, payload + c.unmasked, ready - c.unmasked, payload - 4, c.unmasked);
    c.unmasked = ready;
    if (c.in.size < f.size) return;
    const char* begin = put_header(payload, c.in.data, f);
    const std::size_t n = f.size - 4;
    c.in.size = c.unmasked = 0;
    if (!echo) return output.append(begin, n);
    if (c.out.size != 0) return c.out.append(begin, n);
    const ssize_t k = ::send(c.fd, begin, n, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (k == static_cast<ssize_t>(n)) return;
    std::swap(c.in, c.out);
    c.out.size = f.size;
    c.sent = 4 + static_cast<std::size_t>((std::max)(k, ssize_t{0}));
}

// Reads until a short read shows that the socket is drained. Incomplete frames use the connection's own buffer, and so
// does a connection that has sent a large frame. Everything else uses the shared buffer. Returns true to close.
bool read(Connection& c) {
    for (;;) {
        const bool own = c.in.size != 0 || c.in.capacity >= large;
        Frame f = frame_at(c.in.data, c.open ? c.in.size : 0);
        if (own) c.in.reserve(f.size != 0 ? f.size : c.in.size + 4096);
        const std::size_t wanted = f.size != 0 ? f.size - c.in.size : own ? c.in.capacity - c.in.size : sizeof scratch;
        const ssize_t k = ::recv(c.fd, own ? c.in.data + c.in.size : scratch, wanted, MSG_DONTWAIT);
        if (k <= 0) return k == 0 || errno != EAGAIN;
        if (own) c.in.size += static_cast<std::size_t>(k);
        const char* p = own ? c.in.data : scratch;
        const std::size_t n = own ? c.in.size : static_cast<std::size_t>(k);
        if (c.open && (*p & 15) == 8) return ::send(c.fd, "\x88\0", 2, MSG_NOSIGNAL | MSG_DONTWAIT), true;
        f = frame_at(p, own && c.open ? n : 0);
        if (f.size > large && n <= f.size) {
            read_large_frame(c, f);
        } else {
            const std::size_t used = c.open ? read_frames(p, n) : handshake(c, p, n) ? n : 0;
            if (own) std::memmove(c.in.data, p + used, c.in.size = n - used);
            else if (n > used) c.in.append(p + used, n - used);
            if (echo && output.size != 0) {
                send_to(c, output.data, output.size);
                output.size = 0;
            }
        }
        if (static_cast<std::size_t>(k) < wanted) return false;
    }
}

void accept_all(int listener, int poller) {
    for (int fd; (fd = ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK)) >= 0;) {
        auto* c = new Connection;
        c->fd = fd;
        epoll_event e{};
        // EPOLLOUT arrives once, and then only after a partial send.
        e.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
        e.data.ptr = c;
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    }
}

int listen_on(int port) {
    const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_port = htons(static_cast<std::uint16_t>(port));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);  // on Linux, accepted sockets inherit it
    if (bind(listener, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0 && ::listen(listener, 4096) == 0)
        return listener;
    std::perror("floor: listen");
    std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fputs("usage: floor PORT room|echo\n", stderr), 1;
    echo = std::strcmp(argv[2], "echo") == 0;
    const int listener = listen_on(std::atoi(argv[1])), poller = epoll_create1(0);
    epoll_event events[1024], e{};
    e.events = EPOLLIN;
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    std::printf("floor: listening on 127.0.0.1:%s (%s)\n", argv[1], argv[2]);
    std::fflush(stdout);
    for (;;) {
        const int n = epoll_wait(poller, events, 1024, -1);
        for (int i = 0; i < n; ++i) {
            auto* c = static_cast<Connection*>(events[i].data.ptr);
            if (c == nullptr) {
                accept_all(listener, poller);
                continue;
            }
            const unsigned ready = events[i].events;
            if (c->out.size != 0 && (ready & EPOLLOUT) != 0) flush(*c);
            if ((ready & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0 || ((ready & EPOLLIN) != 0 && read(*c))) close(c);
        }
        if (output.size == 0) continue;
        for (Connection* c : room) send_to(*c, output.data, output.size);
        output.size = 0;
    }
}
