// section 13 over real sockets: routes, conversations, rooms, where a server listens, how it ends, what it tells of itself.
// Pages and refusals are in server_pages_test.cpp, limits and hostile peers in server_limits_test.cpp.
#include "support.hpp"

#include <sys/wait.h>
#include <csignal>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::Client;
using test::contains;
using test::Echo;
using test::error_of;
using test::hex;
using test::LobbyMember;
using test::RawClient;
using test::RunningServer;

namespace {

// Says at once which route it is of, and with which parameters.
struct Tell : WebSocketHandler {
    explicit Tell(std::string route = {}) : route_(std::move(route)) {}
    void open() override {
        std::string text = route_;
        for (const char* name : {"room", "user", "rest"})
            if (const auto value = request().param(name); !value.empty()) (text += std::string(name) + "=") += value;
        write_message(text);
    }
    void on_message(const Message&) override {}
    std::string route_;
};

// Notes how its connections have ended; read it when the server has stopped.
struct Endings {
    std::vector<CloseCause> causes;
    std::vector<CloseCode> codes;
};
struct Noted : WebSocketHandler {
    explicit Noted(Endings& endings) : endings_(endings) {}
    void on_message(const Message& m) override { write_message(m); }
    void on_close() override {
        endings_.causes.push_back(close_cause());
        endings_.codes.push_back(close_code());
    }
    Endings& endings_;
};

// Waits until a condition on the thread of the test holds.
template <class Condition>
bool eventually(Condition condition) {
    const auto until = Clock::now() + test::deadline;
    while (!condition()) {
        if (Clock::now() > until) return false;
        std::this_thread::sleep_for(1ms);
    }
    return true;
}

// A request for a page, for the tests that need only its status.
std::string status_of(int port, std::string_view target) {
    RawClient client(port);
    client.send("GET " + std::string(target) + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    client.read_to_end();
    return client.received.substr(0, 12);
}

// RFC 6455 5.7: "Hello", masked by a client and as the server sends it back.
const std::string hello_masked = hex("81 85 37 fa 21 3d 7f 9f 4d 51 58");
const std::string hello_plain = hex("81 05 48 65 6c 6c 6f");

// Whether an echo answers on this connection, which may be of any kind.
bool echoes(RawClient& client) {
    client.send(handshake_request("localhost", "/", Client::key) + hello_masked);
    return client.read_until("\r\n\r\n" + hello_plain);
}

Socket connect_unix(const std::string& path) {
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    if (::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) != 0) return {};
    os::make_nonblocking(socket.descriptor());
    return socket;
}

Socket connect_ipv6(int port) {
    Socket socket(::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in6 address{};
    address.sin6_family = AF_INET6;
    address.sin6_port = htons(static_cast<std::uint16_t>(port));
    address.sin6_addr = in6addr_loopback;
    if (::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return {};
    os::make_nonblocking(socket.descriptor());
    return socket;
}

std::string temporary_path(const std::string& name) { return "/tmp/wschat-" + std::to_string(::getpid()) + "-" + name; }

// The log of a server as lines, made before the server; read it when the server has stopped.
struct Log {
    void take_from(Server& server) {
        server.on_log([this](const LogEntry& entry) { lines.push_back(to_string(entry)); });
    }
    bool has(std::string_view part) const {
        return std::any_of(lines.begin(), lines.end(), [&](const std::string& line) { return contains(line, part); });
    }
    std::vector<std::string> lines;
};

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- routes ---------------------------------------------------------------------------------------------------------

TEST_CASE("the parameters of a route are what stands in their places in the path, decoded") {
    const struct {
        std::string pattern, target, told;
    } table[] = {
        {"/chat/{room}", "/chat/tea", "room=tea"},
        {"/chat/{room}", "/chat/tea%20room?room=other", "room=tea room"},
        {"/chat/{room}", "/chat/a%2Fb", "room=a/b"},
        {"/chat/{room}", "/chat/%C3%BC", "room=\xC3\xBC"},
        {"/{room}/with/{user}", "/tea/with/Anna", "room=teauser=Anna"},
        {"/files/{rest...}", "/files/a/b%20c/d", "rest=a/b c/d"},
        {"/files/{rest...}", "/files/", ""},
        {"/{rest...}", "/", ""},
        {"/{rest...}", "/a", "rest=a"},
        {"/{room}/{rest...}", "/tea/x/y", "room=tearest=x/y"},
        {"/a/", "/a/", ""},
        {"/a b", "/a%20b", ""},
    };
    for (const auto& row : table) {
        CAPTURE(row.pattern);
        CAPTURE(row.target);
        RunningServer running;
        running.server.route<Tell>(row.pattern);
        running.start();
        Client client(running.port(), row.target);
        CHECK(client.next() == row.told);
    }
}

TEST_CASE("a path that no pattern matches has no WebSocket") {
    const struct {
        std::string pattern, target;
    } table[] = {
        {"/chat/{room}", "/chat/"},
        {"/chat/{room}", "/chat"},
        {"/chat/{room}", "/chat/a/b"},
        {"/chat/{room}", "/Chat/a"},
        {"/chat/{room}", "//chat/a"},
        {"/a", "/a/"},
        {"/a/", "/a"},
        {"/files/{rest...}", "/files"},
        {"/a", "/b"},
        {"/a", "/a%2F"},
        {"/", "//"},
    };
    for (const auto& row : table) {
        CAPTURE(row.pattern);
        CAPTURE(row.target);
        RunningServer running;
        running.server.route<Tell>(row.pattern);
        running.start();
        Client client(running.port(), row.target);
        CHECK(client.head.substr(0, 12) == "HTTP/1.1 404");
    }
}

TEST_CASE("of several patterns that match, text goes before parameters and these before an open end") {
    const std::vector<std::string> patterns = {"/{rest...}", "/chat/{rest...}", "/{user}/{room}", "/chat/{room}",
                                               "/chat/tea"};
    const struct {
        std::string target, told;
    } table[] = {
        {"/chat/tea", "/chat/tea"},
        {"/chat/coffee", "/chat/{room}room=coffee"},
        {"/talk/coffee", "/{user}/{room}room=coffeeuser=talk"},
        {"/chat/a/b", "/chat/{rest...}rest=a/b"},
        {"/chat/", "/chat/{rest...}"},
        {"/talk/a/b", "/{rest...}rest=talk/a/b"},
        {"/", "/{rest...}"},
    };
    for (const bool reversed : {false, true}) {
        CAPTURE(reversed);
        auto order = patterns;
        if (reversed) std::reverse(order.begin(), order.end());
        RunningServer running;
        for (const std::string& pattern : order) running.server.route<Tell>(pattern, pattern);
        running.start();
        for (const auto& row : table) {
            CAPTURE(row.target);
            Client client(running.port(), row.target);
            CHECK(client.next() == row.told);
        }
    }
}

TEST_CASE("a pattern that is given twice is an Error, also where only the names of its parameters differ") {
    Server server;
    const struct {
        std::string first, second;
        bool same;
    } table[] = {
        {"/a", "/a", true},
        {"/b/{x}", "/b/{y}", true},
        {"/c/{x...}", "/c/{y...}", true},
        {"/d/{x}", "/d/{x...}", false},
        {"/e", "/e/", false},
        {"/f/{x}", "/f/x", false},
    };
    const auto answer = [](const Request&) { return Response(200); };
    for (const auto& row : table) {
        CAPTURE(row.second);
        server.route<Echo>(row.first);
        CHECK(error_of([&] { server.route<Echo>(row.second); }) ==
              (row.same ? "route \"" + row.second + "\": given twice" : ""));
        server.get(row.first, answer);
        CHECK(error_of([&] { server.get(row.second, answer); }) ==
              (row.same ? "page \"" + row.second + "\": given twice" : ""));
    }
}

TEST_CASE("what is no pattern is an Error that names the call and the pattern") {
    for (const std::string pattern : {"", "chat", "{room}", "/a{b}", "/{a}b", "/{a", "/a}", "/{}", "/{a}{b}",
                                      "/{a...}/b", "/{a...}/", "/a?b", "/a#b", "/a%20b", "/{a%20}"}) {
        CAPTURE(pattern);
        Server server;
        CHECK(contains(error_of([&] { server.route<Echo>(pattern); }), "route \"" + pattern + "\": "));
        CHECK(contains(error_of([&] { server.get(pattern, nullptr); }), "get \"" + pattern + "\": "));
    }
}

TEST_CASE("a parameter needs a name, also one that takes all that is left") {
    Server server;
    CHECK(contains(error_of([&] { server.route<Echo>("/{...}"); }), "route \"/{...}\": "));
}

TEST_CASE("a route may have limits of its own") {
    RunningServer running;
    Limits small = running.server.limits();
    small.max_message_size = 10;
    running.server.route<Echo>("/small").set_limits(small);
    running.server.route<Echo>("/large");
    running.start();
    Client refused(running.port(), "/small"), taken(running.port(), "/large");
    refused.send("0123456789");
    CHECK(refused.next() == "0123456789");
    refused.send("0123456789+");
    CHECK(refused.close_code() == CloseCode::message_too_big);
    taken.send("0123456789+");
    CHECK(taken.next() == "0123456789+");
}

TEST_CASE("a page and a WebSocket may share a path") {
    RunningServer running;
    running.server.route<Echo>("/chat");
    running.server.get("/chat", [](const Request&) { return Response::html("<p>Hello</p>"); });
    running.start();
    CHECK(status_of(running.port(), "/chat") == "HTTP/1.1 200");
    Client client(running.port(), "/chat");
    client.send("hello");
    CHECK(client.next() == "hello");
}

TEST_CASE("a route may be added while the server runs") {
    RunningServer running;
    running.server.route<Echo>("/old");
    running.start();
    CHECK_FALSE(Client(running.port(), "/new").is_open());
    running.on_loop([&] { running.server.route<Echo>("/new"); });
    CHECK(Client(running.port(), "/new").is_open());
}

// ---- conversations --------------------------------------------------------------------------------------------------

TEST_CASE("messages of every size come back as they were, text as text and binary as binary") {
    RunningServer running;
    running.server.route<Echo>("/");
    running.start();
    Client client(running.port());
    for (const std::size_t size : {0u, 1u, 125u, 126u, 127u, 65535u, 65536u, 65537u, 1048576u}) {
        CAPTURE(size);
        std::string bytes(size, '\0');
        for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * 31 + i / 255);
        client.send(bytes, Opcode::binary);
        CHECK((client.next() == bytes));
        const std::string text(size, 'x');
        client.send(text);
        CHECK((client.next() == text));
    }
    client.raw.send(hello_masked);
    client.raw.received.clear();
    REQUIRE(client.raw.read_at_least(hello_plain.size()));
    CHECK(test::to_hex(client.raw.received) == test::to_hex(hello_plain));
}

TEST_CASE("a request with the first frames attached gets its 101 and their answers, however it is cut in two") {
    // FAULTS 12. The server has read the first piece when the second is sent.
    RunningServer running;
    running.server.route<Echo>("/");
    running.start();
    const std::string bytes = handshake_request("x", "/", Client::key) + hello_masked + hello_masked;
    std::uint64_t read_before = 0;
    for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
        CAPTURE(cut);
        RawClient client(running.port());
        client.socket().set_nodelay(true);
        client.send(bytes.substr(0, cut));
        REQUIRE(running.eventually(
            [&] { return running.server.metrics().bytes_received == read_before + client.wire.sent; }));
        client.send(bytes.substr(cut));
        CHECK(client.read_until("\r\n\r\n" + hello_plain + hello_plain));
        read_before += client.wire.sent;
    }
}

TEST_CASE("a request that arrives byte by byte is a request") {
    RunningServer running;
    running.server.route<Echo>("/");
    running.start();
    RawClient client(running.port());
    client.socket().set_nodelay(true);
    for (const char byte : handshake_request("x", "/", Client::key) + hello_masked) {
        client.send({&byte, 1});
        REQUIRE(running.eventually([&] { return running.server.metrics().bytes_received == client.wire.sent; }));
    }
    CHECK(client.read_until("\r\n\r\n" + hello_plain));
}

TEST_CASE("a page, then an upgrade, then the first frame, all in one piece, are answered in their order") {
    RunningServer running;
    running.server.get("/page", [](const Request&) { return Response(200, "the page"); });
    running.server.route<Echo>("/");
    running.start();
    RawClient client(running.port());
    client.send("GET /page HTTP/1.1\r\nHost: x\r\n\r\n" + handshake_request("x", "/", Client::key) + hello_masked);
    REQUIRE(client.read_until("\r\n\r\n" + hello_plain));
    CHECK(contains(client.received, "the page"));
    CHECK(client.received.find("the page") < client.received.find("HTTP/1.1 101"));
}

TEST_CASE("many messages in one piece are answered one by one in their order") {
    RunningServer running;
    running.server.route<Echo>("/");
    running.start();
    Client client(running.port());
    for (int i = 0; i < 1000; ++i) client.connection.send(Opcode::text, std::to_string(i));
    client.flush();
    for (int i = 0; i < 1000; ++i) REQUIRE(client.next() == std::to_string(i));
}

// ---- rooms ----------------------------------------------------------------------------------------------------------

TEST_CASE("in a room of two hundred everybody gets every message, all in one order") {
    RunningServer running;
    running.server.route<LobbyMember>("/");
    running.start();
    constexpr std::size_t members = 200, speakers = 50;
    std::vector<std::unique_ptr<Client>> clients;
    for (std::size_t i = 0; i < members; ++i) {
        clients.push_back(std::make_unique<Client>(running.port()));
        REQUIRE(clients.back()->is_open());
    }
    REQUIRE(running.eventually([&] { return running.server.metrics().websockets_open == members; }));
    for (std::size_t i = 0; i < speakers; ++i) clients[i]->send("message of " + std::to_string(i) + "\n");
    std::string first;
    for (std::size_t i = 0; i < members; ++i) {
        std::string heard;
        for (std::size_t n = 0; n < speakers; ++n) heard += clients[i]->next().value_or("nothing");
        if (i == 0) first = heard;
        REQUIRE(heard == first);
    }
    CHECK(first.size() == std::string("message of 00\n").size() * speakers - 10);
    CHECK(running.metrics().messages_sent == members * speakers);
}

// ---- where it listens -----------------------------------------------------------------------------------------------

TEST_CASE("without an address a server listens on 127.0.0.1, on a port that it tells") {
    RunningServer running;
    running.server.route<Echo>("/");
    running.start();
    CHECK(running.port() > 0);
    CHECK(running.on_loop([&] { return running.server.url(); }) ==
          test::scheme() + "://127.0.0.1:" + std::to_string(running.port()) + "/");
    Client client(running.port());
    CHECK(client.is_open());
}

TEST_CASE("a server may listen on several addresses, and tells of the first") {
    const std::string path = temporary_path("several.sock");
    RunningServer running;
    running.server.route<Echo>("/");
    CHECK(running.server.port() == 0);
    CHECK(running.server.url() == "");
    test::listen(running.server, "unix:" + path);
    test::listen(running.server, "127.0.0.1:0");
    test::listen(running.server);
    CHECK(running.server.url() == "unix:" + path);
    running.run();
    RawClient client(connect_unix(path));
    CHECK(echoes(client));
}

TEST_CASE("a listen that fails names the address and the cause, and the server goes on without it") {
    RunningServer first, second;
    first.server.route<Echo>("/");
    first.start();
    const std::string taken = "127.0.0.1:" + std::to_string(first.port());
    CHECK(error_of([&] { second.server.listen(first.port()); }) ==
          "listen " + taken + ": Address already in use (EADDRINUSE): another process has it");
    CHECK(contains(error_of([&] { second.server.listen("192.0.2.1:0"); }), "listen 192.0.2.1:0: "));
    CHECK(contains(error_of([&] { second.server.listen(70000); }), "listen 70000: "));
    CHECK(contains(error_of([&] { second.server.listen(-1); }), "listen -1: "));
    second.server.route<Echo>("/");
    second.start();
    CHECK(Client(second.port()).is_open());
    CHECK(Client(first.port()).is_open());
}

TEST_CASE("to run without listening is an Error") {
    Server server;
    CHECK(error_of([&] { server.run(); }) == "run: nothing to serve: call listen() first");
}

TEST_CASE("a server on a Unix socket serves as any other, and its path is gone with it") {
    struct Who : WebSocketHandler {
        void on_message(const Message&) override { write_message(remote_address()); }
    };
    const std::string path = temporary_path("chat.sock");
    {
        RunningServer running;
        running.server.route<Who>("/");
        test::listen(running.server, "unix:" + path);
        running.run();
        RawClient client(connect_unix(path));
        REQUIRE(client);
        client.send(handshake_request("localhost", "/", Client::key) + hello_masked);
        CHECK(client.read_until("\r\n\r\n" + hex("81 04") + "unix"));
        RawClient refused(connect_unix(path));
        refused.send("nonsense\r\n\r\n");
        CHECK(refused.read_to_end());
        CHECK(refused.received.substr(0, 12) == "HTTP/1.1 400");
    }
    CHECK_FALSE(connect_unix(path));
    CHECK(::access(path.c_str(), F_OK) != 0);
}

TEST_CASE("a server on an IPv6 address serves as any other, and knows its peers by theirs") {
    struct Who : WebSocketHandler {
        void on_message(const Message&) override { write_message(remote_address()); }
    };
    RunningServer running;
    running.server.route<Who>("/");
    try {
        test::listen(running.server, "[::1]:0");
    } catch (const Error& error) {
        MESSAGE("this machine has no IPv6: " << error.what());
        return;
    }
    CHECK(contains(running.server.url(), test::scheme() + "://[::1]:"));
    running.run();
    RawClient client(connect_ipv6(running.port()));
    REQUIRE(client);
    client.send(handshake_request("[::1]", "/", Client::key) + hello_masked);
    CHECK(client.read_until("\r\n\r\n" + hex("81 03") + "::1"));
}

TEST_CASE("two servers share a port only where both ask for it") {
    ServerOptions options;
    options.reuse_port = true;
    RunningServer first(options), second(options), third;
    for (RunningServer* running : {&first, &second, &third}) running->server.route<Echo>("/");
    first.start();
    test::listen(second.server, std::to_string(first.port()));
    second.run();
    CHECK(contains(error_of([&] { third.server.listen(first.port()); }), "EADDRINUSE"));
    // Which of the two has a connection is the kernel's choice; each must serve its own.
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 64; ++i) {
        clients.push_back(std::make_unique<Client>(first.port()));
        clients.back()->send("hello");
        REQUIRE(clients.back()->next() == "hello");
    }
    const std::uint64_t one = first.metrics().websockets_open, two = second.metrics().websockets_open;
    CHECK(one + two == 64);
    CHECK(one > 0);
    CHECK(two > 0);
}

TEST_CASE("two servers on two threads have rooms of their own") {
    RunningServer first, second;
    for (RunningServer* running : {&first, &second}) {
        running->server.route<LobbyMember>("/");
        running->start();
    }
    Client a(first.port()), b(first.port()), c(second.port());
    REQUIRE(first.eventually([&] { return first.server.rooms()["lobby"].size() == 2; }));
    a.send("to the first");
    c.send("to the second");
    CHECK(a.next() == "to the first");
    CHECK(b.next() == "to the first");
    CHECK(c.next() == "to the second");
}

// ---- how it ends ----------------------------------------------------------------------------------------------------

TEST_CASE("a shutdown closes everybody with 1001, and run returns when they have answered") {
    Endings endings;
    RunningServer running;
    running.server.route<Noted>("/", std::ref(endings));
    running.start();
    Client one(running.port()), two(running.port()), three(running.port());
    running.server.shutdown(test::deadline);
    for (Client* client : {&one, &two, &three}) {
        CHECK(client->close_code() == CloseCode::going_away);
        CHECK(client->connection.close_reason() == "server is shutting down");
        client->raw.close();
    }
    running.stop();
    CHECK(endings.causes == std::vector<CloseCause>(3, CloseCause::shutdown));
    CHECK(endings.codes == std::vector<CloseCode>(3, CloseCode::going_away));
}

TEST_CASE("a server that shuts down takes no new connections") {
    RunningServer running;
    running.server.route<Echo>("/");
    running.start();
    RawClient silent(running.port());
    Client client(running.port());
    running.server.shutdown(test::deadline);
    CHECK(silent.read_to_end());
    CHECK(silent.received == "");
    CHECK(eventually([&] { return !RawClient(running.port()); }));
    CHECK(client.close_code() == CloseCode::going_away);
    client.raw.close();
}

TEST_CASE("the deadline of a shutdown ends a peer that does not answer") {
    Endings endings;
    RunningServer running;
    running.server.route<Noted>("/", std::ref(endings));
    running.start();
    Client deaf(running.port());
    running.stop(50ms);
    CHECK(deaf.raw.read_to_end());
    CHECK(contains(deaf.raw.received, hex("03 e9")));
    CHECK(endings.causes == std::vector<CloseCause>{CloseCause::shutdown});
}

TEST_CASE("a second shutdown is harmless, and may shorten the deadline") {
    Endings endings;
    RunningServer running;
    running.server.route<Noted>("/", std::ref(endings));
    running.start();
    Client deaf(running.port());
    running.server.shutdown(1h);
    CHECK(deaf.raw.read_until(hex("03 e9")));
    running.server.shutdown(1h);
    running.stop(0ms);
    CHECK(endings.causes.size() == 1);
    running.server.shutdown(0ms);
}

TEST_CASE("a shutdown from a callback closes everybody, that connection included") {
    struct Ender : WebSocketHandler {
        void on_message(const Message& m) override {
            write_message(m);
            server().shutdown();
            write_message("last words");
        }
    };
    RunningServer running;
    running.server.route<Ender>("/");
    running.start();
    Client one(running.port()), two(running.port());
    one.send("end it");
    CHECK(one.next() == "end it");
    CHECK(one.next() == "last words");
    CHECK(one.close_code() == CloseCode::going_away);
    CHECK(two.close_code() == CloseCode::going_away);
}

TEST_CASE("a shutdown before the run ends it at its beginning, and later runs at theirs") {
    auto server = std::make_unique<Server>();
    server->listen(0);
    server->shutdown(0ms);
    std::atomic<int> returned{0};
    std::thread runner([&] {
        for (int i = 0; i < 3; ++i) {
            server->run();
            ++returned;
        }
    });
    CHECK(eventually([&] { return returned == 3; }));
    // Where a run does not end by itself, any turn ends it.
    while (returned < 3) {
        server->loop().post([] {});
        std::this_thread::sleep_for(1ms);
    }
    runner.join();
}

TEST_CASE("SIGINT and SIGTERM end all servers of the process that handle signals, and their clients get 1001") {
    for (const int signal : {SIGINT, SIGTERM}) {
        CAPTURE(signal);
        ServerOptions options;
        options.poller = test::poller_kind();
        Server first(options), second(options);
        for (Server* server : {&first, &second}) {
            server->route<Echo>("/");
            test::listen(*server);
        }
        std::thread one([&] { first.run(); }), two([&] { second.run(); });
        Client to_first(first.port()), to_second(second.port());
        ::kill(::getpid(), signal);
        CHECK(to_first.close_code() == CloseCode::going_away);
        CHECK(to_second.close_code() == CloseCode::going_away);
        to_first.raw.close();
        to_second.raw.close();
        one.join();
        two.join();
    }
}

TEST_CASE("a signal between listen and run ends the run at its beginning") {
    // Whoever has read the port may send one already. In a process of its own, which it would kill otherwise.
    const pid_t child = ::fork();
    if (child == 0) {
        ServerOptions options;
        options.poller = test::poller_kind();
        Server server(options);
        server.listen(0);
        std::raise(SIGTERM);
        server.run();
        ::_exit(0);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
}

TEST_CASE("a second signal ends a server that waits for a peer at once") {
    ServerOptions options;
    options.poller = test::poller_kind();
    Server server(options);
    server.route<Echo>("/");
    test::listen(server);
    std::thread runner([&] { server.run(); });
    Client deaf(server.port());
    ::kill(::getpid(), SIGTERM);
    CHECK(deaf.raw.read_until(hex("03 e9")));
    bool patient = false;
    server.loop().post([&] { server.loop().call_later(4s, [&] { patient = true; }); });
    ::kill(::getpid(), SIGTERM);
    runner.join();
    CHECK_FALSE(patient);
}

// ---- what it tells --------------------------------------------------------------------------------------------------

TEST_CASE("the metrics count connections, requests, messages, bytes and endings") {
    RunningServer running;
    running.server.route<LobbyMember>("/");
    running.server.get("/page", [](const Request&) { return Response(200, "x"); });
    running.start();
    CHECK(status_of(running.port(), "/page") == "HTTP/1.1 200");
    CHECK(status_of(running.port(), "/nothing") == "HTTP/1.1 404");
    Client one(running.port()), two(running.port());
    REQUIRE(running.eventually([&] { return running.server.rooms()["lobby"].size() == 2; }));
    one.send("hello");
    CHECK(one.next() == "hello");
    CHECK(two.next() == "hello");

    Metrics metrics = running.metrics();
    CHECK(metrics.connections_accepted == 4);
    CHECK(metrics.connections_refused == 0);
    CHECK(metrics.requests == 4);
    CHECK(metrics.websockets_opened == 2);
    CHECK(metrics.websockets_open == 2);
    CHECK(metrics.messages_received == 1);
    CHECK(metrics.messages_sent == 2);
    CHECK(metrics.messages_dropped == 0);
    CHECK(metrics.backlog_bytes == 0);
    CHECK(metrics.rooms == 1);
    CHECK(metrics.responses.at(101) == 2);
    CHECK(metrics.responses.at(200) == 1);
    CHECK(metrics.responses.at(404) == 1);
    CHECK(metrics.closed.empty());

    one.close(CloseCode{4001});
    CHECK(one.close_code() == CloseCode{4001});
    two.raw.close();
    REQUIRE(running.eventually([&] { return running.server.metrics().websockets_open == 0; }));
    metrics = running.metrics();
    CHECK(metrics.websockets_opened == 2);
    CHECK(metrics.messages_sent == 2);
    CHECK(metrics.closed.at(CloseCause::peer) == 1);
    CHECK(metrics.closed.at(CloseCause::connection_lost) == 1);
    CHECK(metrics.close_codes.at(CloseCode{4001}) == 1);
    CHECK(metrics.close_codes.at(CloseCode::abnormal) == 1);
    CHECK(metrics.rooms == 0);
    one.raw.close();
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
}

TEST_CASE("the metrics count the bytes of the sockets") {
    RunningServer running;
    running.server.get("/", [](const Request&) { return Response(200, "0123456789"); });
    running.start();
    RawClient client(running.port());
    const std::string request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    client.send(request);
    CHECK(client.read_to_end());
    CHECK(running.metrics().bytes_received == client.wire.sent);
    CHECK(running.metrics().bytes_sent == client.wire.received);
    CHECK(client.wire.sent >= request.size());
    if (!test::over_tls()) CHECK(client.wire.received == client.received.size());
}

TEST_CASE("the metrics page is the metrics in the text format of Prometheus") {
    RunningServer running;
    running.server.route<LobbyMember>("/");
    running.server.metrics_page("/metrics");
    running.start();
    Client member(running.port());
    member.send("hello");
    CHECK(member.next() == "hello");
    RawClient client(running.port());
    client.send("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    REQUIRE(client.read_to_end());
    CHECK(contains(client.received, "\r\nContent-Type: text/plain; version=0.0.4\r\n"));
    for (const std::string line :
         {"# TYPE wschat_websockets_open gauge", "wschat_websockets_open 1", "wschat_messages_received_total 1",
          "# TYPE wschat_messages_sent_total counter", "wschat_connections_accepted_total 2", "wschat_rooms 1",
          "wschat_responses_total{status=\"101\"} 1"}) {
        CAPTURE(line);
        CHECK(contains(client.received, "\n" + line + "\n"));
    }
    // Each name is told of once, and each line that is no comment is a name and a number.
    std::string_view body = std::string_view(client.received).substr(client.received.find("\r\n\r\n") + 4);
    std::vector<std::string> helped;
    while (!body.empty()) {
        const std::string_view line = text::consume_until(body, '\n');
        CAPTURE(std::string(line));
        if (text::starts_with(line, "# HELP ")) {
            helped.emplace_back(line.substr(7, line.find(' ', 7) - 7));
        } else if (!text::starts_with(line, "# TYPE ")) {
            CHECK(text::parse_unsigned(line.substr(line.rfind(' ') + 1), UINT64_MAX));
            CHECK(line.substr(0, line.find_first_of("{ ")) == helped.back());
        }
    }
    std::sort(helped.begin(), helped.end());
    CHECK(std::adjacent_find(helped.begin(), helped.end()) == helped.end());
}

TEST_CASE("the log tells of opening, closing, refusals and the shutdown") {
    Log log;
    RunningServer running;
    log.take_from(running.server);
    running.server.route<Echo>("/chat");
    running.start();
    {
        Client client(running.port(), "/chat?name=Anna");
        client.close(CloseCode::normal, "bye");
        CHECK(client.close_code() == CloseCode::normal);
    }
    Client refused(running.port(), "/nowhere");
    Client broken(running.port(), "/chat");
    broken.raw.send(hello_plain);
    CHECK(broken.close_code() == CloseCode::protocol_error);
    refused.raw.close();
    broken.raw.close();
    running.stop();
    CHECK(log.has("debug listening address=\"127.0.0.1:" + std::to_string(running.port()) + "\""));
    CHECK(log.has("debug open peer=\"127.0.0.1\" target=\"/chat?name=Anna\""));
    CHECK(log.has("debug closed peer=\"127.0.0.1\" code=\"1000\" cause=\"peer\" reason=\"bye\""));
    CHECK(
        log.has("info refused status=\"404\" peer=\"127.0.0.1\" target=\"/nowhere\" sentence=\"There is no WebSocket"));
    CHECK(log.has("info closed peer=\"127.0.0.1\" code=\"1002\" cause=\"protocol error\""));
    CHECK(log.has("debug shutdown"));
}

TEST_CASE("what a peer chose can not break a line of the log or reach the terminal") {
    // FAULTS 43
    Log log;
    RunningServer running;
    log.take_from(running.server);
    running.server.route<Echo>("/");
    running.start();
    Client foreign(running.port(), "/",
                   "Origin: http://evil\"\xC2\x9B\x9B"
                   "31m.example\r\n");
    CHECK(foreign.head.substr(0, 12) == "HTTP/1.1 403");
    Client client(running.port());
    client.close(CloseCode::normal, "bye\r\nerror forged=\"yes\"\x1b[2J\xC2\x9B");
    CHECK(client.close_code() == CloseCode::normal);
    foreign.raw.close();
    client.raw.close();
    running.stop();
    CHECK(log.has("reason=\"bye\\x0d\\x0aerror forged=\\x22yes\\x22\\x1b[2J\\xc2\\x9b\""));
    for (const std::string& line : log.lines) {
        CAPTURE(line);
        CHECK(std::all_of(line.begin(), line.end(), [](char c) { return c >= ' ' && c <= '~'; }));
    }
}

TEST_CASE("peers can not flood the log, and what was left out is counted") {
    Log log;
    RunningServer running;
    log.take_from(running.server);
    const std::string path = temporary_path("page.txt");
    std::FILE* file = std::fopen(path.c_str(), "w");
    REQUIRE(file != nullptr);
    std::fclose(file);
    running.server.file("/", path);
    running.start();
    ::unlink(path.c_str());
    const std::size_t before = running.on_loop([&] { return log.lines.size(); });
    // 3,000 in a second would be 100 and then 100 a second.
    std::string requests;
    for (int i = 0; i < 3000; ++i) requests += "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    RawClient client(running.port());
    client.send(requests);
    REQUIRE(running.eventually([&] {
        const Metrics metrics = running.server.metrics();
        return metrics.responses.at(404) == 3000;
    }));
    const std::uint64_t suppressed = running.metrics().log_entries_suppressed;
    CHECK(suppressed > 0);
    CHECK(running.on_loop([&] { return log.lines.size(); }) - before + suppressed == 3000);
}

TEST_CASE("who connects between the signal and the run is not taken in") {
    const pid_t child = ::fork();
    if (child == 0) {
        ServerOptions options;
        options.poller = test::poller_kind();
        Server server(options);
        server.route<Echo>("/");
        server.listen(0);
        std::raise(SIGTERM);
        RawClient late(server.port());
        server.run();
        const bool refused = late && late.read_to_end() && late.received.empty();
        ::_exit(refused && server.metrics().connections_accepted == 0 ? 0 : 1);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("a run that was stopped in the middle of a shutdown is gone on with by the next") {
    ServerOptions options;
    options.poller = test::poller_kind();
    options.handle_signals = false;
    Server server(options);
    server.route<Echo>("/");
    test::listen(server);
    std::thread first([&] { server.run(); });
    Client deaf(server.port());
    server.shutdown(1h);
    CHECK(deaf.raw.read_until(hex("03 e9")));
    server.loop().post([&] { server.loop().stop(); });
    first.join();
    CHECK(server.metrics().connections_open == 1);
    std::thread second([&] { server.run(); });
    deaf.raw.close();
    second.join();
    CHECK(server.metrics().connections_open == 0);
}

TEST_CASE("a route whose factory makes no handler answers 500 and says so in the log") {
    Log log;
    RunningServer running;
    log.take_from(running.server);
    running.server.add_route("/", [] { return nullptr; });
    running.start();
    Client client(running.port());
    CHECK_FALSE(client.is_open());
    CHECK(client.head.substr(0, 12) == "HTTP/1.1 500");
    running.stop();
    CHECK(log.has("error exception in=\"handshake\""));
    CHECK(log.has("the factory made no handler"));
}

TEST_CASE("the limit for one address does not hold for Unix sockets, which have none") {
    ServerOptions options;
    options.server_limits.max_connections_per_address = 1;
    const std::string path = temporary_path("limit.sock");
    RunningServer running(options);
    running.server.route<Echo>("/");
    test::listen(running.server, "unix:" + path);
    running.run();
    RawClient one(connect_unix(path)), two(connect_unix(path));
    CHECK(echoes(one));
    CHECK(echoes(two));
}

TEST_CASE("the metrics page counts closed connections by their cause and by their code") {
    Metrics metrics;
    metrics.closed[CloseCause::ping_timeout] = 2;
    metrics.closed[CloseCause::peer] = 3;
    metrics.close_codes[CloseCode::normal] = 3;
    metrics.close_codes[CloseCode::abnormal] = 2;
    const std::string text = prometheus_text(metrics);
    for (const std::string line :
         {"# TYPE wschat_closed_total counter", "wschat_closed_total{cause=\"peer\"} 3",
          "wschat_closed_total{cause=\"ping timeout\"} 2", "wschat_close_codes_total{code=\"1000\"} 3",
          "wschat_close_codes_total{code=\"1006\"} 2"}) {
        CAPTURE(line);
        CHECK(contains(text, "\n" + line + "\n"));
    }
}

TEST_SUITE_END();
