// Sends every message back, on any path and for any origin, for tests of clients. Built with -DWSCHAT_ZLIB=1 -lz, it
// compresses if the client offers it. With --threads, that many loops share the connections; 0: one for each core.
//
//   echo [port] [--threads N]
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

unsigned thread_count(const std::string& text) {
    const auto count = wschat::text::parse_unsigned(text, 256);
    if (!count) throw wschat::Error("--threads \"" + text + "\": not a number from 0 to 256");
    return static_cast<unsigned>(*count);
}

int main(int argc, char** argv) try {
    wschat::ServerOptions options;
    options.limits.max_message_size = 64 * 1024 * 1024;
    options.limits.max_fragments = 1'000'000;
    options.limits.max_backlog = 64 * 1024 * 1024;

    std::string port = "9001";
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "--threads" && i + 1 < argc) options.threads = thread_count(argv[++i]);
        else port = argument;
    }

    wschat::Server server(options);
    server.on_log(wschat::log_to_stderr);
    server.route<Echo>("/{path...}");
    server.listen(port);
    std::cout << "echo: " << server.url() << std::endl;
    server.run();
} catch (const wschat::Error& error) {
    std::cerr << "echo: " << error.what() << "\nusage: echo [port] [--threads N]\n";
    return 1;
}
