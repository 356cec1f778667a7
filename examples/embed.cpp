// A server in the epoll loop of another program, which also reads its standard input.   embed [port]
//
// What you type goes to everybody in the chat. Other loops (kqueue, Asio, libuv, Qt, GLib) wait in the same way for
// descriptor() and next_timeout(), and then call poll().
#include "../wschat.hpp"

#include <sys/epoll.h>

struct Chat : wschat::WebSocketHandler {
    void open() override                               { room("lobby").join(*this); }
    void on_message(const wschat::Message& m) override { room("lobby").broadcast(m); }
};

// The time in the form of epoll_wait(): milliseconds, rounded up; -1 for no limit.
int to_ms(wschat::Duration time) {
    if (time == wschat::Duration::max()) return -1;
    const wschat::Duration most = std::chrono::minutes(1);
    return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(std::min(time, most)).count());
}

// Sends each complete line of the standard input to the room. False: the input has ended.
bool read_input(wschat::Room& room) {
    static std::string typed;
    char bytes[4096];
    const ssize_t size = ::read(STDIN_FILENO, bytes, sizeof bytes);
    if (size <= 0) return false;
    typed.append(bytes, static_cast<std::size_t>(size));
    for (std::size_t end; (end = typed.find('\n')) != std::string::npos; typed.erase(0, end + 1))
        if (wschat::valid_utf8(typed.substr(0, end))) room.broadcast(typed.substr(0, end));
    return true;
}

int main(int argc, char** argv) try {
    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", wschat::beside(__FILE__, "chat.html"));
    server.route<Chat>("/chat");
    server.listen(argc > 1 ? argv[1] : "8891");

    const int loop = ::epoll_create1(EPOLL_CLOEXEC);
    epoll_event event{};
    event.events = EPOLLIN;
    for (const int descriptor : {server.descriptor(), STDIN_FILENO}) {
        event.data.fd = descriptor;
        ::epoll_ctl(loop, EPOLL_CTL_ADD, descriptor, &event);  // fails for a file, which is always readable
    }
    std::printf("embed: open %s and type here\n", server.url().c_str());
    std::fflush(stdout);

    do {
        const int count = ::epoll_wait(loop, &event, 1, to_ms(server.next_timeout()));
        if (count == 1 && event.data.fd == STDIN_FILENO && !read_input(server.rooms()["lobby"]))
            ::epoll_ctl(loop, EPOLL_CTL_DEL, STDIN_FILENO, nullptr);
    } while (server.poll());
    ::close(loop);
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "embed: %s\n", error.what());
    return 1;
}
