// The server that the benchmarks measure: it only passes messages on.   bench_server PORT room|echo|deflate [threads]
//
// room: every message goes to every connection, the sender included. echo: back to the sender. deflate: as room, with
// every message compressed (needs -DWSCHAT_ZLIB=1 -lz). With several threads, each has its own server and rooms, and all
// share the port (SO_REUSEPORT).
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

// A member has its own compression context unless its client offers server_no_context_takeover.
struct DeflateMember : Member {
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        wschat::CompressionOptions options;
        options.server_context_takeover = true;
        options.threshold = 0;
        return options;
    }
};

std::unique_ptr<wschat::Server> make_server(const std::string& address, const std::string& mode, bool reuse_port) {
    wschat::ServerOptions options;
    options.reuse_port = reuse_port;
    options.limits.max_message_size = 64 * 1024 * 1024;
    auto server = std::make_unique<wschat::Server>(options);
    if (mode == "echo") server->route<Echo>("/");
    else if (mode == "deflate") server->route<DeflateMember>("/");
    else server->route<Member>("/");
    server->listen(address);
    return server;
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string mode = argc > 2 ? argv[2] : "";
    const int threads = argc > 3 ? std::atoi(argv[3]) : 1;
    const bool known = mode == "room" || mode == "echo" || (mode == "deflate" && WSCHAT_ZLIB);
    if (!known || threads < 1 || threads > 64) {
        std::fprintf(stderr, "usage: bench_server PORT room|echo%s [threads, 1-64]\n", WSCHAT_ZLIB ? "|deflate" : "");
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
