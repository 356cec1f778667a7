// The server that the benchmarks measure: it only passes messages on.   bench_server PORT room|echo|deflate [threads]
//
// room: every message goes to every connection, the sender included. echo: back to the sender. deflate: as room, with
// every message compressed (needs -DWSCHAT_ZLIB=1 -lz). With several threads, the room spans all of them.
#include "../../wschat.hpp"

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

}  // namespace

int main(int argc, char** argv) try {
    const std::string mode = argc > 2 ? argv[2] : "";
    const int threads = argc > 3 ? std::atoi(argv[3]) : 1;
    const bool known = mode == "room" || mode == "echo" || (mode == "deflate" && WSCHAT_ZLIB);
    if (!known || threads < 1 || threads > 64) {
        std::fprintf(stderr, "usage: bench_server PORT room|echo%s [threads, 1-64]\n", WSCHAT_ZLIB ? "|deflate" : "");
        return 1;
    }
    wschat::ServerOptions options;
    options.threads = static_cast<unsigned>(threads);
    options.limits.max_message_size = 64 * 1024 * 1024;
    wschat::Server server(options);
    if (mode == "echo") server.route<Echo>("/");
    else if (mode == "deflate") server.route<DeflateMember>("/");
    else server.route<Member>("/");
    server.listen(argv[1]);
    std::printf("bench_server: %s\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "bench_server: %s\n", error.what());
    return 1;
}
