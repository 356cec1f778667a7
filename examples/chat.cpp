// The smallest chat: every message goes to all connected clients. Built with -DWSCHAT_ZLIB=1 -lz, it compresses long
// messages.   chat [port] [--page FILE]
#include "../wschat.hpp"

struct Chat : wschat::WebSocketHandler {
    void open() override                               { room("lobby").join(*this); }
    void on_message(const wschat::Message& m) override { room("lobby").broadcast(m); }
    std::optional<wschat::CompressionOptions> get_compression_options() override { return wschat::CompressionOptions(); }
};

int main(int argc, char** argv) try {
    std::string port = "8888", page = wschat::beside(__FILE__, "chat.html");
    for (int i = 1; i < argc; ++i) (std::string(argv[i]) == "--page" && i + 1 < argc ? page = argv[++i] : port = argv[i]);

    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", page);
    server.route<Chat>("/chat");
    server.listen(port);
    std::printf("chat: open %s in two windows\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "chat: %s\nusage: chat [port] [--page FILE]\n", error.what());
    return 1;
}
