// Sends every message back, on any path and for any origin, for tests of clients. Built with -DWSCHAT_ZLIB=1 -lz, it
// compresses if the client offers it.   echo [port]
#include "../wschat.hpp"

#include <iostream>

struct Echo : wschat::WebSocketHandler {
    bool check_origin(std::string_view) override { return true; }
    // The client decides about context takeover, and messages of every size are compressed.
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        wschat::CompressionOptions options;
        options.server_context_takeover = options.client_context_takeover = true;
        options.threshold = 0;
        return options;
    }
    void on_message(const wschat::Message& m) override { write_message(m); }
};

int main(int argc, char** argv) try {
    wschat::ServerOptions options;
    options.limits.max_message_size = 64 * 1024 * 1024;
    options.limits.max_fragments = 1'000'000;
    options.limits.max_backlog = 64 * 1024 * 1024;

    wschat::Server server(options);
    server.on_log(wschat::log_to_stderr);
    server.route<Echo>("/{path...}");
    server.listen(argc > 1 ? argv[1] : "9001");
    std::cout << "echo: " << server.url() << std::endl;
    server.run();
} catch (const wschat::Error& error) {
    std::cerr << "echo: " << error.what() << "\n";
    return 1;
}
