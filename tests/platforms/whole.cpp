// Uses a server with two loops, a client and the chat, so that a compiler sees the bodies of all templates. It is not run.
#define WSCHAT_CHAT 1
#include "../../wschat.hpp"

#include <cstdio>

namespace {

struct Echo : wschat::WebSocketHandler {
    void on_message(const wschat::Message& message) override { room("all").broadcast(message); }
};

}  // namespace

int main() {
    wschat::ServerOptions options;
    options.threads = 2;
    wschat::Server server(options);
    server.route<Echo>("/echo");
    server.route<wschat::ChatHandler>("/chat");
    server.static_dir("/files/", "files");
    server.get("/hello", [](const wschat::Request&) { return wschat::Response(200, "hello"); });
    server.listen(0);
    wschat::Client client(server.loop());
    client.connect<Echo>("ws://127.0.0.1:" + std::to_string(server.port()) + "/echo");
    std::printf("port %d\n", server.port());
    server.run();
}
