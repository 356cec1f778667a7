#include <wschat.hpp>

#include <cstdio>

struct Echo : wschat::WebSocketHandler {
    void on_message(const wschat::Message& m) override { write_message(m.text()); }
};

int main() {
    wschat::Server server;
    server.route<Echo>("/echo");
#if WSCHAT_CHAT
    server.route<wschat::ChatHandler>("/chat");
    std::puts("wschat " WSCHAT_VERSION_STRING " with the chat");
#else
    std::puts("wschat " WSCHAT_VERSION_STRING);
#endif
}
