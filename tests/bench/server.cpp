// What the benchmark measures: a server that does nothing but pass messages on.   bench_server PORT room|echo [threads]
//
// room: every message to every connection, the sender included. echo: back to the sender. Several threads share the
// port (SO_REUSEPORT), each with a server and rooms of its own. No compression.
#include "../../wschat.hpp"

#include <thread>

namespace {

struct Member : wschat::WebSocketHandler {
    void open() override { room("all").join(*this); }
    void on_message(const wschat::Message& m) override { room("all").broadcast(m); }
};

struct Echo : wschat::WebSocketHandler {
    void on_message(const wschat::Message& m) override { write_message(m); }
};

std::unique_ptr<wschat::Server> make_server(const std::string& address, const std::string& mode, bool reuse_port) {
    wschat::ServerOptions options;
    options.reuse_port = reuse_port;
    options.limits.max_message_size = 64 * 1024 * 1024;
    auto server = std::make_unique<wschat::Server>(options);
    if (mode == "echo") server->route<Echo>("/");
    else server->route<Member>("/");
    server->listen(address);
    return server;
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string mode = argc > 2 ? argv[2] : "";
    const int threads = argc > 3 ? std::atoi(argv[3]) : 1;
    if ((mode != "room" && mode != "echo") || threads < 1 || threads > 64) {
        std::fprintf(stderr, "usage: bench_server PORT room|echo [threads, 1-64]\n");
        return 1;
    }
    std::vector<std::unique_ptr<wschat::Server>> servers;
    std::string address = argv[1];
    for (int i = 0; i < threads; ++i) {
        servers.push_back(make_server(address, mode, threads > 1));
        address = std::to_string(servers.front()->port());
    }
    std::printf("bench_server: %s\n", servers.front()->url().c_str());
    std::fflush(stdout);
    std::vector<std::thread> others;
    for (std::size_t i = 1; i < servers.size(); ++i) others.emplace_back([&, i] { servers[i]->run(); });
    servers.front()->run();
    for (std::thread& other : others) other.join();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "bench_server: %s\n", error.what());
    return 1;
}
