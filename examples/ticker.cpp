// A thread of its own counts ticks, and each client gets them.   ticker [port]
//
// The thread never touches a handler or a room. It posts work to the loop, and the loop's thread broadcasts.
//   python3 -m websockets ws://127.0.0.1:8890/ticks
#include "../wschat.hpp"

#include <thread>

struct Watcher : wschat::WebSocketHandler {
    void open() override                               { room("watchers").join(*this); }
    void on_message(const wschat::Message&) override   { write_json({{"watchers", room("watchers").size()}}); }
};

int main(int argc, char** argv) try {
    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.route<Watcher>("/ticks");
    server.listen(argc > 1 ? argv[1] : "8890");
    std::printf("ticker: %s\n", server.url().c_str());
    std::fflush(stdout);

    std::atomic<bool> running{true};
    std::thread clock([&] {
        for (int tick = 1; running; ++tick) {
            server.loop().post([&server, tick] { server.rooms()["watchers"].broadcast_json({{"tick", tick}}); });
            std::this_thread::sleep_for(std::chrono::milliseconds(500));
        }
    });
    server.run();
    running = false;
    clock.join();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "ticker: %s\n", error.what());
    return 1;
}
