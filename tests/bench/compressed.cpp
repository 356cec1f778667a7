// A room like that of server.cpp, where every message is compressed.   bench_compressed PORT deflate
//
// Each member gets what it asks for: a context of its own, for which it is compressed apart, only where it does not offer
// server_no_context_takeover.
#include "../../wschat.hpp"

namespace {

struct Member : wschat::WebSocketHandler {
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        wschat::CompressionOptions options;
        options.server_context_takeover = true;
        options.threshold = 0;
        return options;
    }
    void open() override { room("all").join(*this); }
    void on_message(const wschat::Message& m) override { room("all").broadcast(m); }
};

}  // namespace

int main(int argc, char** argv) try {
    if (argc != 3 || std::string(argv[2]) != "deflate" || !wschat::detail::compression_available) {
        std::fprintf(stderr, "usage: bench_compressed PORT deflate, built with -DWSCHAT_ZLIB=1 -lz\n");
        return 1;
    }
    wschat::ServerOptions options;
    options.limits.max_message_size = 64 * 1024 * 1024;
    wschat::Server server(options);
    server.route<Member>("/");
    server.listen(argv[1]);
    std::printf("bench_compressed: %s\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "bench_compressed: %s\n", error.what());
    return 1;
}
