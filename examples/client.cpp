// A WebSocket client for the terminal: prints what arrives and sends each line of standard input.
//
//   client URL [--echo] [--reconnect] [--header "Name: value"]... [--subprotocol P]... [--insecure] [--proxy URL]
//
// g++ -std=c++17 -O2 examples/client.cpp -o client -pthread && ./client ws://127.0.0.1:8888/chat
//
// With -DWSCHAT_OPENSSL=1 -lssl -lcrypto it speaks wss://, with -DWSCHAT_ZLIB=1 -lz it compresses. --echo sends back
// what arrives instead of reading the input, and ends with the connection. --insecure accepts any certificate. --proxy
// is the URL of an HTTP proxy; without it, http_proxy, https_proxy and no_proxy of the environment count. At the end of
// the input, the program closes when nothing has arrived for a second. Messages go to standard output, everything
// else to standard error.
#include "../wschat.hpp"

#include <iostream>

namespace {

// What the lines of the input need; on the loop's thread.
struct Terminal {
    wschat::HandlerRef connection;  // empty while there is none
    std::vector<std::string> waiting;
    std::uint64_t arrived = 0;  // messages
    int status = 0;

    void send(const std::string& line) {
        wschat::WebSocketHandler* const handler = connection.get();
        if (handler == nullptr || !handler->is_open()) waiting.push_back(line);
        else if (wschat::valid_utf8(line)) handler->write_message(line);
        else handler->write_binary(line);
    }
    // At the end of the input. Answers may still come.
    void end(wschat::Client& client) {
        client.loop().call_later(std::chrono::seconds(1), [this, &client, before = arrived] {
            if (arrived != before || connection.get() == nullptr) return end(client);
            connection.close();
        });
    }
};

struct Line : wschat::WebSocketHandler {
    Line(Terminal& its_terminal, bool its_echo) : terminal(its_terminal), echo(its_echo) {}

    void open() override {
        std::fprintf(stderr, "client: connected to %s\n", remote_address().c_str());
        terminal.connection = ref();
        for (const std::string& line : std::exchange(terminal.waiting, {})) terminal.send(line);
    }
    void on_message(const wschat::Message& message) override {
        ++terminal.arrived;
        if (echo) write_message(message);
        std::fwrite(message.data().data(), 1, message.size(), stdout);
        std::fputc('\n', stdout);
        std::fflush(stdout);
    }
    void on_close() override {
        const std::string reason = wschat::escape_for_log(close_reason());
        std::fprintf(stderr, "client: closed: %u %s (%s)\n", number(close_code()), reason.c_str(),
                     std::string(to_string(close_cause())).c_str());
    }
    void on_failure(const wschat::ConnectError& error) override {
        std::fprintf(stderr, "client: %s: %s\n", std::string(to_string(error.stage)).c_str(), error.sentence.c_str());
        if (!error.body.empty()) std::fprintf(stderr, "client: %s\n", wschat::escape_for_log(error.body).c_str());
        if (error.retry_in) {
            const double seconds = std::chrono::duration<double>(*error.retry_in).count();
            std::fprintf(stderr, "client: tries again in %.1f s\n", seconds);
        } else {
            terminal.status = 1;
        }
    }

    Terminal& terminal;
    bool echo;
};

// On a thread of its own. A loop that is gone runs nothing of it.
void read_lines(Terminal& terminal, wschat::Client& client, const std::shared_ptr<wschat::Mailbox>& loop) {
    for (std::string line; std::getline(std::cin, line);)
        if (!loop->post([&terminal, line] { terminal.send(line); })) return;
    loop->post([&terminal, &client] { terminal.end(client); });
}

}  // namespace

int main(int argc, char** argv) try {
    std::string url;
    wschat::ClientOptions options;
    // One connection can afford the memory, and Tornado 6.2 overlooks the parameters that save it.
    options.compression.emplace();
    options.compression->server_context_takeover = options.compression->client_context_takeover = true;
    options.limits.max_message_size = 64 * 1024 * 1024;
    options.limits.max_fragments = 1000 * 1000;
    options.proxy_from_environment = true;
    bool echo = false;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        const bool has_value = i + 1 < argc;
        if (word == "--echo") {
            echo = true;
        } else if (word == "--reconnect") {
            options.reconnect.emplace();
        } else if (word == "--insecure") {
            options.tls.insecure_accept_any_certificate = true;
        } else if (word == "--proxy" && has_value) {
            options.proxy = argv[++i];
        } else if (word == "--subprotocol" && has_value) {
            options.subprotocols.emplace_back(argv[++i]);
        } else if (word == "--header" && has_value) {
            std::string_view value = argv[++i];
            const std::string name(wschat::text::consume_until(value, ':'));
            options.headers.emplace_back(name, wschat::text::trim(value));
        } else if (url.empty() && word.front() != '-') {
            url = word;
        } else {
            throw wschat::Error("\"" + word + "\" is not an option");
        }
    }
    if (url.empty()) throw wschat::Error("the URL is missing, as in ws://127.0.0.1:8888/chat");

    // They outlive main(), because a thread that waits for a line cannot be ended.
    static Terminal terminal;
    wschat::Client client;
    client.connect<Line>(url, options, std::ref(terminal), echo);
    if (!echo) std::thread([&client, loop = client.loop().mailbox()] { read_lines(terminal, client, loop); }).detach();
    client.run();
    return terminal.status;
} catch (const wschat::Error& error) {
    std::fprintf(stderr,
                 "client: %s\nusage: client URL [--echo] [--reconnect] [--header \"Name: value\"]... "
                 "[--subprotocol P]... [--insecure] [--proxy URL]\n",
                 error.what());
    return 1;
}
