// For deploy_test.py: a server behind the proxies of examples/deploy/ that reports what it sees of its clients.
//
//   deploy_server ADDRESS [--proxied]
//
// Listens there, trusts 127.0.0.1 and Unix sockets, and prints one line when it is ready. --proxied: each connection
// begins with a PROXY header. "/" is a page. "/chat" answers the opening with a JSON object, and each message with itself; "ping" sends a ping and
// reports the pong, "close CODE" closes with CODE.
#include "../../wschat.hpp"

struct Witness : wschat::WebSocketHandler {
    void open() override {
        const wschat::Request& r = request();
        write_json({{"address", remote_address()},
                    {"scheme", std::string(r.scheme())},
                    {"host", std::string(r.host())},
                    {"forwarded", std::string(r.header("forwarded"))},
                    {"path", std::string(r.target())}});
    }
    void on_message(const wschat::Message& message) override {
        const std::string_view text = message.data();
        if (text == "ping") ping("are you there?");
        else if (text.substr(0, 6) == "close ") close(std::atoi(std::string(text.substr(6)).c_str()), "as you wish");
        else write_message(message);
    }
    void on_pong(std::string_view payload) override { write_message("pong: " + std::string(payload)); }
    void on_close() override {
        std::printf("closed %u\n", wschat::number(close_code()));
        std::fflush(stdout);
    }
};

int main(int argc, char** argv) try {
    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.trusted_proxies({"127.0.0.1", "unix"});
    server.get("/", [](const wschat::Request& r) {
        return wschat::Response(200, "a page over " + std::string(r.scheme()) + " for " + r.remote_address() + "\n");
    });
    server.route<Witness>("/chat");
    wschat::ListenOptions options;
    options.proxy_protocol = argc > 2 && std::string_view(argv[2]) == "--proxied";
    server.listen(argc > 1 ? argv[1] : "0", options);
    std::printf("ready %d\n", server.port());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "deploy_server: %s\n", error.what());
    return 1;
}
