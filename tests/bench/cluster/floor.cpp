// The floor of run.py: the smallest relay, with blocking calls and no more parsing than this load needs.
//
//   cluster_floor PORT REDIS send|uring
//
// It takes the place of the second node beside a node.cpp that runs as `room`. It subscribes to the channel of the room,
// and sends each message to all connections with one send() for each of them. `uring`: with one io_uring_enter() for all
// of them. It never reads from a connection after the handshake, and it trusts all input: this is not a server.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../../wschat.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if WSCHAT_LIBURING
#include <liburing.h>
#endif

namespace {

constexpr std::size_t node_size = 9;  // a broadcast is the name of its node, 't', and the text: see RedisBus

[[noreturn]] void die(const char* what) {
    std::perror(what);
    std::exit(1);
}
sockaddr_in loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

std::mutex mutex;
std::vector<int> members;

// Answers the handshake of one client after the other.
void accept_all(int listener) {
    for (;;) {
        const int fd = ::accept(listener, nullptr, nullptr);
        if (fd < 0) die("accept");
        std::string request;
        char buffer[4096];
        while (request.find("\r\n\r\n") == std::string::npos) {
            const ssize_t got = ::read(fd, buffer, sizeof buffer);
            if (got <= 0) die("read");
            request.append(buffer, static_cast<std::size_t>(got));
        }
        const std::string name = "Sec-WebSocket-Key: ";
        const std::string key = request.substr(request.find(name) + name.size(), 24);
        const auto digest = wschat::sha1(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        const std::string answer =
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " +
            wschat::base64(digest.data(), digest.size()) + "\r\n\r\n";
        const int on = 1;
        ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (::send(fd, answer.data(), answer.size(), MSG_NOSIGNAL) < 0) die("send");
        const std::lock_guard<std::mutex> lock(mutex);
        members.push_back(fd);
    }
}

std::string frame_of(std::string_view text) {
    std::string frame = "\x81";
    if (text.size() < 126) frame += static_cast<char>(text.size());
    else {
        frame += {'\x7e', static_cast<char>(text.size() >> 8), static_cast<char>(text.size() & 0xFF)};
    }
    return frame.append(text);
}

class Sender {
public:
    explicit Sender([[maybe_unused]] bool uring) {
#if WSCHAT_LIBURING
        io_uring_params params{};
        params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN;
        if (uring && io_uring_queue_init_params(256, &ring_, &params) != 0) die("io_uring");
        uring_ = uring;
#endif
    }
    void send(const std::string& frames) {
        const std::lock_guard<std::mutex> lock(mutex);
#if WSCHAT_LIBURING
        if (uring_) return submit(frames);
#endif
        for (const int fd : members) ::send(fd, frames.data(), frames.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    }

private:
#if WSCHAT_LIBURING
    void submit(const std::string& frames) {
        unsigned sent = 0;
        for (const int fd : members) {
            io_uring_sqe* const sqe = io_uring_get_sqe(&ring_);
            if (sqe == nullptr) break;
            io_uring_prep_send(sqe, fd, frames.data(), frames.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            ++sent;
        }
        io_uring_submit_and_wait(&ring_, sent);
        io_uring_cq_advance(&ring_, io_uring_cq_ready(&ring_));
    }
    io_uring ring_{};
    bool uring_ = false;
#endif
};

// The frames of all whole messages: "*3\r\n$7\r\nmessage\r\n$12\r\nwschat:b:all\r\n$SIZE\r\n...\r\n".
std::string take_frames(std::string& input, const std::string& begin) {
    std::string frames;
    std::size_t done = 0;
    while (input.compare(done, begin.size(), begin) == 0) {
        const std::size_t line = input.find("\r\n", done + begin.size());
        if (line == std::string::npos) break;
        const std::size_t size = std::strtoul(input.c_str() + done + begin.size(), nullptr, 10);
        if (input.size() < line + 2 + size + 2) break;
        frames += frame_of(std::string_view(input).substr(line + 2 + node_size, size - node_size));
        done = line + 2 + size + 2;
    }
    input.erase(0, done);
    return frames;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: cluster_floor PORT REDIS send|uring\n");
        return 1;
    }
    const int listener = ::socket(AF_INET, SOCK_STREAM, 0), redis = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in here = loopback(std::atoi(argv[1]));
    const std::string url = argv[2];
    const sockaddr_in there = loopback(std::atoi(url.c_str() + url.rfind(':') + 1));
    socklen_t size = sizeof here;
    if (::bind(listener, reinterpret_cast<sockaddr*>(&here), size) != 0 || ::listen(listener, 1024) != 0) die("listen");
    ::getsockname(listener, reinterpret_cast<sockaddr*>(&here), &size);
    if (::connect(redis, reinterpret_cast<const sockaddr*>(&there), sizeof there) != 0) die("Redis");
    const std::string channel = "wschat:b:all", subscribe = "SUBSCRIBE " + channel + "\r\n";
    char buffer[65536];
    if (::send(redis, subscribe.data(), subscribe.size(), 0) < 0 || ::read(redis, buffer, sizeof buffer) <= 0)
        die("SUBSCRIBE");
    std::printf("cluster_floor: http://127.0.0.1:%d/\n", static_cast<int>(ntohs(here.sin_port)));
    std::fflush(stdout);
    std::thread(accept_all, listener).detach();
    Sender sender(std::strcmp(argv[3], "uring") == 0);
    const std::string begin = "*3\r\n$7\r\nmessage\r\n$" + std::to_string(channel.size()) + "\r\n" + channel + "\r\n$";
    for (std::string input;;) {
        const ssize_t got = ::read(redis, buffer, sizeof buffer);
        if (got <= 0) return 0;
        input.append(buffer, static_cast<std::size_t>(got));
        const std::string frames = take_frames(input, begin);
        if (!frames.empty()) sender.send(frames);
    }
}
