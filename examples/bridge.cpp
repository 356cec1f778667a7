// A chat whose room is the same as that of another server.   bridge URL [port] [--page FILE]
//
// g++ -std=c++17 -O2 examples/bridge.cpp -o bridge -pthread && ./bridge ws://127.0.0.1:8888/chat 8889
//
// The other server is chat.cpp, or any that sends each message to all clients. One loop runs the server and the client.
#include "../wschat.hpp"

#include <deque>

namespace {

// The way to the other server. All of it is on the loop's thread.
struct Bridge {
    wschat::HandlerRef remote;       // empty while there is no connection
    std::deque<std::string> echoes;  // sent there, and not back yet: the other server sends each message to us too

    void forward(std::string_view text) {
        wschat::WebSocketHandler* const handler = remote.get();
        if (handler == nullptr) return;
        const wschat::WriteStatus status = handler->write_message(text);
        if (status == wschat::WriteStatus::sent || status == wschat::WriteStatus::queued) echoes.emplace_back(text);
    }
    bool is_echo(std::string_view text) {
        if (echoes.empty() || echoes.front() != text) return false;
        echoes.pop_front();
        return true;
    }
};

// A client of this server.
struct Local : wschat::WebSocketHandler {
    explicit Local(Bridge& its_bridge) : bridge(its_bridge) {}
    void open() override { room("lobby").join(*this); }
    void on_message(const wschat::Message& m) override {
        room("lobby").broadcast(m);
        if (!m.binary()) bridge.forward(m.text());
    }
    Bridge& bridge;
};

// The connection to the other server. It has the rooms of this server, because it is on its loop.
struct Remote : wschat::WebSocketHandler {
    explicit Remote(Bridge& its_bridge) : bridge(its_bridge) {}
    void open() override {
        std::fprintf(stderr, "bridge: connected\n");
        bridge.remote = ref();
        bridge.echoes.clear();
    }
    void on_message(const wschat::Message& m) override {
        if (!bridge.is_echo(m.text())) room("lobby").broadcast(m);
    }
    void on_failure(const wschat::ConnectError& error) override {
        std::fprintf(stderr, "bridge: %s\n", error.sentence.c_str());
    }
    Bridge& bridge;
};

}  // namespace

int main(int argc, char** argv) try {
    std::string url, port = "8889", page = wschat::beside(__FILE__, "chat.html");
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "--page" && i + 1 < argc) page = argv[++i];
        else if (url.empty()) url = word;
        else port = word;
    }
    if (url.empty()) throw wschat::Error("the URL of the other server is missing, as in ws://127.0.0.1:8888/chat");

    Bridge bridge;
    wschat::Server server;
    server.on_log(wschat::log_to_stderr);
    server.file("/", page);
    server.route<Local>("/chat", std::ref(bridge));
    server.listen(port);

    wschat::Client client(server.loop());
    wschat::ClientOptions options;
    options.reconnect.emplace();
    client.connect<Remote>(url, options, std::ref(bridge));

    std::printf("bridge: open %s\n", server.url().c_str());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "bridge: %s\nusage: bridge URL [port] [--page FILE]\n", error.what());
    return 1;
}
