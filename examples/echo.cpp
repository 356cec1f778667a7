// Sends every message back, on any path; made to be tested against.   echo [port]
#include "../wschat.hpp"

struct Echo : wschat::WebSocketHandler {
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
    std::printf("echo: %s\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "echo: %s\n", error.what());
    return 1;
}
