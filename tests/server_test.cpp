// Section 14 over real sockets: routes, conversations, rooms, listening, shutdown, metrics and the log. Pages and
// refusals are in server_pages_test.cpp, limits and hostile peers in server_limits_test.cpp.
#include "support.hpp"

#include <sys/wait.h>
#include <csignal>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::contains;
using test::Echo;
using test::EchoServer;
using test::error_of;
using test::eventually;
using test::fetch;
using test::HandlerServer;
using test::hello_masked;
using test::hello_unmasked;
using test::hex;
using test::LobbyMember;
using test::LogLines;
using test::RawClient;
using test::request;
using test::RunningServer;
using test::temporary_path;
using test::upgrade_request;
using test::WsClient;

namespace {

// Sends the name of its route and the parameters of the path when it opens.
struct RouteReporter : WebSocketHandler {
    explicit RouteReporter(std::string route = {}) : route_(std::move(route)) {}
    void open() override {
        std::string text = route_;
        for (const char* name : {"room", "user", "rest"})
            if (const auto value = request().param(name); !value.empty()) (text += std::string(name) + "=") += value;
        write_message(text);
    }
    void on_message(const Message&) override {}
    std::string route_;
};

// A server whose only route has that pattern.
struct RouteServer : RunningServer {
    explicit RouteServer(const std::string& pattern) {
        server.route<RouteReporter>(pattern);
        start();
    }
};

// Records how the connections have ended. Read it when the server has stopped.
struct Endings {
    std::mutex mutex;
    std::vector<CloseCause> causes;
    std::vector<CloseCode> codes;
};
struct RecordedEcho : WebSocketHandler {
    explicit RecordedEcho(Endings& endings) : endings_(endings) {}
    void on_message(const Message& m) override { write_message(m); }
    void on_close() override {
        const std::lock_guard<std::mutex> lock(endings_.mutex);
        endings_.causes.push_back(close_cause());
        endings_.codes.push_back(close_code());
    }
    Endings& endings_;
};

std::string status_of(int port, std::string_view target) {
    return fetch(port, target, "Connection: close\r\n").head.substr(0, 12);
}

// True if an echo handler answers on this connection.
bool echoes(RawClient& client) {
    client.send(upgrade_request() + hello_masked);
    return client.read_until("\r\n\r\n" + hello_unmasked);
}

Socket connect_to(const sockaddr* address, socklen_t size) {
    Socket socket(::socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(socket.descriptor(), address, size) != 0) return {};
    os::make_nonblocking(socket.descriptor());
    return socket;
}

Socket connect_unix(const std::string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    return connect_to(reinterpret_cast<const sockaddr*>(&name), sizeof name);
}

Socket connect_ipv6(int port) {
    sockaddr_in6 address{};
    address.sin6_family = AF_INET6;
    address.sin6_port = htons(static_cast<std::uint16_t>(port));
    address.sin6_addr = in6addr_loopback;
    return connect_to(reinterpret_cast<const sockaddr*>(&address), sizeof address);
}

// Answers each message with the address of its peer.
struct AddressEcho : WebSocketHandler {
    void on_message(const Message&) override { write_message(remote_address()); }
};

ServerOptions poller_options() {
    ServerOptions options;
    options.poller = test::poller_kind();
    return options;
}

// Runs a function in a child process, with the function's result as its exit status. Returns the wait status.
int run_in_child(const std::function<int()>& function) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(function());
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    return status;
}

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- routes ---------------------------------------------------------------------------------------------------------

TEST_CASE("the parameters of a route are the decoded segments of the path") {
    const struct {
        std::string pattern, target, sent;
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
        CAPTURE(row.pattern + " " + row.target);
        const RouteServer running(row.pattern);
        WsClient client(running.port(), row.target);
        CHECK(client.next() == row.sent);
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
        CAPTURE(row.pattern + " " + row.target);
        const RouteServer running(row.pattern);
        WsClient client(running.port(), row.target);
        CHECK(client.head.substr(0, 12) == "HTTP/1.1 404");
    }
}

TEST_CASE("if several patterns match, text wins over a parameter, and a parameter wins over {rest...}") {
    const std::vector<std::string> patterns = {"/{rest...}", "/chat/{rest...}", "/{user}/{room}", "/chat/{room}",
                                               "/chat/tea"};
    const struct {
        std::string target, sent;
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
        for (const std::string& pattern : order) running.server.route<RouteReporter>(pattern, pattern);
        running.start();
        for (const auto& row : table) {
            CAPTURE(row.target);
            WsClient client(running.port(), row.target);
            CHECK(client.next() == row.sent);
        }
    }
}

TEST_CASE("the same pattern twice is an Error, even if the names of the parameters differ") {
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
              (row.same ? "page \"" + row.second + "\": given twice for GET" : ""));
    }
}

TEST_CASE("an invalid pattern is an Error that names the call and the pattern") {
    for (const std::string pattern : {"", "chat", "{room}", "/a{b}", "/{a}b", "/{a", "/a}", "/{}", "/{a}{b}",
                                      "/{a...}/b", "/{a...}/", "/a?b", "/a#b", "/a%20b", "/{a%20}"}) {
        CAPTURE(pattern);
        Server server;
        CHECK(contains(error_of([&] { server.route<Echo>(pattern); }), "route \"" + pattern + "\": "));
        CHECK(contains(error_of([&] { server.get(pattern, nullptr); }), "get \"" + pattern + "\": "));
    }
}

TEST_CASE("a parameter needs a name, even {...}") {
    Server server;
    CHECK(contains(error_of([&] { server.route<Echo>("/{...}"); }), "route \"/{...}\": "));
}

TEST_CASE("a route can have its own limits") {
    RunningServer running;
    Limits small = running.server.limits();
    small.max_message_size = 10;
    running.server.route<Echo>("/small").set_limits(small);
    running.server.route<Echo>("/large");
    running.start();
    WsClient small_client(running.port(), "/small"), large_client(running.port(), "/large");
    small_client.send("0123456789");
    CHECK(small_client.next() == "0123456789");
    small_client.send("0123456789+");
    CHECK(small_client.close_code() == CloseCode::message_too_big);
    large_client.send("0123456789+");
    CHECK(large_client.next() == "0123456789+");
}

TEST_CASE("a page and a WebSocket can have the same path") {
    RunningServer running;
    running.server.route<Echo>("/chat");
    running.server.get("/chat", [](const Request&) { return Response::html("<p>Hello</p>"); });
    running.start();
    CHECK(status_of(running.port(), "/chat") == "HTTP/1.1 200");
    WsClient client(running.port(), "/chat");
    client.send("hello");
    CHECK(client.next() == "hello");
}

TEST_CASE("a route can be added while the server runs") {
    const test::OneLoop one_loop;
    RunningServer running;
    running.server.route<Echo>("/old");
    running.start();
    CHECK_FALSE(WsClient(running.port(), "/new").is_open());
    running.on_loop([&] { running.server.route<Echo>("/new"); });
    CHECK(WsClient(running.port(), "/new").is_open());
}

// ---- conversations --------------------------------------------------------------------------------------------------

TEST_CASE("an echo returns messages of every size unchanged, with their opcode") {
    EchoServer running;
    WsClient client(running.port());
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
    REQUIRE(client.raw.read_at_least(hello_unmasked.size()));
    CHECK(test::to_hex(client.raw.received) == test::to_hex(hello_unmasked));
}

TEST_CASE("a request together with its first frames is answered for every cut into two pieces") {
    // FAULTS 12. The client sends the second piece when the server has read the first.
    EchoServer running;
    const std::string bytes = upgrade_request() + hello_masked + hello_masked;
    std::uint64_t read_before = 0;
    for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
        CAPTURE(cut);
        RawClient client(running.port());
        client.socket().set_nodelay(true);
        client.send(bytes.substr(0, cut));
        REQUIRE(running.eventually(
            [&] { return running.server.metrics().bytes_received == read_before + client.wire.sent; }));
        client.send(bytes.substr(cut));
        CHECK(client.read_until("\r\n\r\n" + hello_unmasked + hello_unmasked));
        read_before += client.wire.sent;
    }
}

TEST_CASE("a request can arrive byte by byte") {
    EchoServer running;
    RawClient client(running.port());
    client.socket().set_nodelay(true);
    for (const char byte : upgrade_request() + hello_masked) {
        client.send({&byte, 1});
        REQUIRE(running.eventually([&] { return running.server.metrics().bytes_received == client.wire.sent; }));
    }
    CHECK(client.read_until("\r\n\r\n" + hello_unmasked));
}

TEST_CASE("a request for a page, an upgrade and a first frame in one piece are answered in order") {
    RunningServer running;
    running.server.get("/page", [](const Request&) { return Response(200, "the page"); });
    running.server.route<Echo>("/");
    running.start();
    RawClient client(running.port());
    client.send(request("/page") + upgrade_request() + hello_masked);
    REQUIRE(client.read_until("\r\n\r\n" + hello_unmasked));
    CHECK(contains(client.received, "the page"));
    CHECK(client.received.find("the page") < client.received.find("HTTP/1.1 101"));
}

TEST_CASE("many messages in one piece are answered in order") {
    EchoServer running;
    WsClient client(running.port());
    for (int i = 0; i < 1000; ++i) client.connection.send(Opcode::text, std::to_string(i));
    client.flush();
    for (int i = 0; i < 1000; ++i) REQUIRE(client.next() == std::to_string(i));
}

// ---- rooms ----------------------------------------------------------------------------------------------------------

TEST_CASE("all 200 members of a room get every message in the same order") {
    const test::OneLoop one_loop;
    HandlerServer<LobbyMember> running;
    constexpr std::size_t members = 200, speakers = 50;
    std::vector<std::unique_ptr<WsClient>> clients;
    for (std::size_t i = 0; i < members; ++i) {
        clients.push_back(std::make_unique<WsClient>(running.port()));
        REQUIRE(clients.back()->is_open());
    }
    REQUIRE(running.eventually([&] { return running.server.metrics().websockets_open == members; }));
    for (std::size_t i = 0; i < speakers; ++i) clients[i]->send("message of " + std::to_string(i) + "\n");
    std::string first;
    for (std::size_t i = 0; i < members; ++i) {
        std::string messages;
        for (std::size_t n = 0; n < speakers; ++n) messages += clients[i]->next().value_or("nothing");
        if (i == 0) first = messages;
        REQUIRE(messages == first);
    }
    CHECK(first.size() == std::string("message of 00\n").size() * speakers - 10);
    CHECK(running.metrics().messages_sent == members * speakers);
}

// ---- listening ------------------------------------------------------------------------------------------------------

TEST_CASE("without an address a server listens on 127.0.0.1, and port() returns its port") {
    EchoServer running;
    CHECK(running.port() > 0);
    CHECK(running.on_loop([&] { return running.server.url(); }) ==
          test::scheme() + "://127.0.0.1:" + std::to_string(running.port()) + "/");
    WsClient client(running.port());
    CHECK(client.is_open());
}

TEST_CASE("a server can listen on several addresses, and url() returns the first") {
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

TEST_CASE("url() of a server that listens on all addresses is an address that a client can open") {
    for (const std::string address : {"*:0", "0.0.0.0:0", "0:0", "[::]:0", "[0:0::0]:0"}) {
        CAPTURE(address);
        RunningServer running;
        running.server.route<AddressEcho>("/");
        const bool ipv6 = address[0] == '[';
        try {
            test::listen(running.server, address);
        } catch (const Error& error) {
            REQUIRE_MESSAGE(ipv6, error.what());
            MESSAGE("this machine has no IPv6: " << error.what());
            continue;
        }
        const std::string host = ipv6 ? "[::1]" : "127.0.0.1";
        CHECK(running.server.url() ==
              test::scheme() + "://" + host + ":" + std::to_string(running.server.port()) + "/");
        running.run();
        RawClient client = ipv6 ? RawClient(connect_ipv6(running.port())) : RawClient(running.port());
        client.send(handshake_request(host, "/", WsClient::key) + hello_masked);
        CHECK(client.read_until(ipv6 ? "::1" : "127.0.0.1"));
    }
}

TEST_CASE("url() has the host of listen() if that is one address") {
    for (const std::string host : {"127.0.0.2", "localhost"}) {
        Server server;
        server.listen(host + ":0");
        CHECK(server.url() == "http://" + host + ":" + std::to_string(server.port()) + "/");
    }
}

TEST_CASE("a failed listen() names the address and the cause, and the server still works") {
    RunningServer first, second;
    first.server.route<Echo>("/");
    first.start();
    const std::string taken = "127.0.0.1:" + std::to_string(first.port());
    CHECK(error_of([&] { second.server.listen(first.port()); }) ==
          "listen " + taken + ": " + os::error_text(EADDRINUSE) + ": another process has it");
    CHECK(contains(error_of([&] { second.server.listen("192.0.2.1:0"); }), "listen 192.0.2.1:0: "));
    CHECK(contains(error_of([&] { second.server.listen(70000); }), "listen 70000: "));
    CHECK(contains(error_of([&] { second.server.listen(-1); }), "listen -1: "));
    second.server.route<Echo>("/");
    second.start();
    CHECK(WsClient(second.port()).is_open());
    CHECK(WsClient(first.port()).is_open());
}

TEST_CASE("run() without listen() is an Error") {
    Server server;
    CHECK(error_of([&] { server.run(); }) == "run: nothing to serve: call listen() first");
}

TEST_CASE("a server on a Unix socket works like any other, and removes its path at the end") {
    const std::string path = temporary_path("chat.sock");
    {
        RunningServer running;
        running.server.route<AddressEcho>("/");
        test::listen(running.server, "unix:" + path);
        running.run();
        RawClient client(connect_unix(path));
        REQUIRE(client);
        client.send(upgrade_request() + hello_masked);
        CHECK(client.read_until("\r\n\r\n" + hex("81 04") + "unix"));
        RawClient refused(connect_unix(path));
        refused.send("nonsense\r\n\r\n");
        CHECK(refused.read_to_end());
        CHECK(refused.received.substr(0, 12) == "HTTP/1.1 400");
    }
    CHECK_FALSE(connect_unix(path));
    CHECK(::access(path.c_str(), F_OK) != 0);
}

TEST_CASE("a server on an IPv6 address works like any other, and knows the IPv6 addresses of its peers") {
    RunningServer running;
    running.server.route<AddressEcho>("/");
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
    client.send(handshake_request("[::1]", "/", WsClient::key) + hello_masked);
    CHECK(client.read_until("\r\n\r\n" + hex("81 03") + "::1"));
}

TEST_CASE("two servers share a port only if both have reuse_port") {
    ServerOptions options;
    options.reuse_port = true;
    RunningServer first(options), second(options), third;
    for (RunningServer* running : {&first, &second, &third}) running->server.route<Echo>("/");
    first.start();
    test::listen(second.server, std::to_string(first.port()));
    second.run();
    CHECK(contains(error_of([&] { third.server.listen(first.port()); }), "EADDRINUSE"));
    // The kernel distributes the connections.
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 64; ++i) {
        clients.push_back(std::make_unique<WsClient>(first.port()));
        clients.back()->send("hello");
        REQUIRE(clients.back()->next() == "hello");
    }
    const std::uint64_t one = first.metrics().websockets_open, two = second.metrics().websockets_open;
    CHECK(one + two == 64);
    CHECK(one > 0);
    CHECK(two > 0);
}

TEST_CASE("two servers on two threads have separate rooms") {
    RunningServer first, second;
    for (RunningServer* running : {&first, &second}) {
        running->server.route<LobbyMember>("/");
        running->start();
    }
    WsClient a(first.port()), b(first.port()), c(second.port());
    REQUIRE(first.eventually([&] { return first.server.rooms()["lobby"].size() == 2; }));
    a.send("to the first");
    c.send("to the second");
    CHECK(a.next() == "to the first");
    CHECK(b.next() == "to the first");
    CHECK(c.next() == "to the second");
}

// ---- shutdown -------------------------------------------------------------------------------------------------------

TEST_CASE("a shutdown closes all clients with 1001, and run() returns when they have answered") {
    Endings endings;
    HandlerServer<RecordedEcho> running(ServerOptions(), std::ref(endings));
    WsClient one(running.port()), two(running.port()), three(running.port());
    running.server.shutdown(test::deadline);
    for (WsClient* client : {&one, &two, &three}) {
        CHECK(client->close_code() == CloseCode::going_away);
        CHECK(client->connection.close_reason() == "server is shutting down");
        client->raw.close();
    }
    running.stop(test::deadline);
    CHECK(endings.causes == std::vector<CloseCause>(3, CloseCause::shutdown));
    CHECK(endings.codes == std::vector<CloseCode>(3, CloseCode::going_away));
}

TEST_CASE("a server that shuts down accepts no new connections") {
    EchoServer running;
    RawClient silent(running.port());
    WsClient client(running.port());
    running.server.shutdown(test::deadline);
    CHECK(silent.read_to_end());
    CHECK(silent.received == "");
    CHECK(eventually([&] { return !RawClient(running.port()); }));
    CHECK(client.close_code() == CloseCode::going_away);
    client.raw.close();
}

TEST_CASE("the deadline of a shutdown aborts a connection whose peer does not answer") {
    Endings endings;
    HandlerServer<RecordedEcho> running(ServerOptions(), std::ref(endings));
    WsClient silent(running.port());
    running.stop(50ms);
    CHECK(silent.raw.read_to_end());
    CHECK(contains(silent.raw.received, hex("03 e9")));
    CHECK(endings.causes == std::vector<CloseCause>{CloseCause::shutdown});
}

TEST_CASE("a second shutdown is harmless, and can shorten the deadline") {
    Endings endings;
    HandlerServer<RecordedEcho> running(ServerOptions(), std::ref(endings));
    WsClient silent(running.port());
    running.server.shutdown(1h);
    CHECK(silent.raw.read_until(hex("03 e9")));
    running.server.shutdown(1h);
    running.stop(0ms);
    CHECK(endings.causes.size() == 1);
    running.server.shutdown(0ms);
}

TEST_CASE("a shutdown from a callback closes all connections, also its own") {
    struct ShutdownOnMessage : WebSocketHandler {
        void on_message(const Message& m) override {
            write_message(m);
            server().shutdown();
            write_message("last words");
        }
    };
    HandlerServer<ShutdownOnMessage> running;
    WsClient one(running.port()), two(running.port());
    one.send("shut down");
    CHECK(one.next() == "shut down");
    CHECK(one.next() == "last words");
    CHECK(one.close_code() == CloseCode::going_away);
    CHECK(two.close_code() == CloseCode::going_away);
}

TEST_CASE("run() returns at once if shutdown() was called before, and the next run() needs listen()") {
    Server server;
    server.listen(0);
    server.shutdown(0ms);
    server.run();
    CHECK(server.port() == 0);
    CHECK(error_of([&] { server.run(); }) == "run: nothing to serve: call listen() first");
}

TEST_CASE("SIGINT and SIGTERM shut down all servers of the process, and their clients get 1001") {
    const test::Disposition interrupt(SIGINT, SIG_DFL);  // this program may run with an ignored SIGINT
    for (const int signal : {SIGINT, SIGTERM}) {
        CAPTURE(signal);
        Server first(poller_options()), second(poller_options());
        for (Server* server : {&first, &second}) {
            server->route<Echo>("/");
            test::listen(*server);
        }
        std::thread one([&] { first.run(); }), two([&] { second.run(); });
        WsClient to_first(first.port()), to_second(second.port());
        ::kill(::getpid(), signal);
        CHECK(to_first.close_code() == CloseCode::going_away);
        CHECK(to_second.close_code() == CloseCode::going_away);
        to_first.raw.close();
        to_second.raw.close();
        one.join();
        two.join();
    }
}

TEST_CASE("after a signal between listen() and run(), run() returns at once") {
    // In a child process, because the signal ends the process if the server does not handle it.
    const int status = run_in_child([] {
        Server server(poller_options());
        server.listen(0);
        std::raise(SIGTERM);
        server.run();
        return 0;
    });
    CHECK(WIFEXITED(status));
}

TEST_CASE("a second signal ends a shutdown that waits for a peer") {
    Server server(poller_options());
    server.route<Echo>("/");
    test::listen(server);
    std::thread runner([&] { server.run(); });
    WsClient silent(server.port());
    ::kill(::getpid(), SIGTERM);
    CHECK(silent.raw.read_until(hex("03 e9")));
    bool waited = false;
    server.loop().post([&] { server.loop().call_later(4s, [&] { waited = true; }); });
    ::kill(::getpid(), SIGTERM);
    runner.join();
    CHECK_FALSE(waited);
}

// ---- metrics and log ------------------------------------------------------------------------------------------------

TEST_CASE("the metrics count connections, requests, messages and closed connections") {
    RunningServer running;
    running.server.route<LobbyMember>("/");
    running.server.get("/page", [](const Request&) { return Response(200, "x"); });
    running.start();
    CHECK(status_of(running.port(), "/page") == "HTTP/1.1 200");
    CHECK(status_of(running.port(), "/nothing") == "HTTP/1.1 404");
    WsClient one(running.port()), two(running.port());
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

TEST_CASE("the metrics page has the text format of Prometheus") {
    RunningServer running;
    running.server.route<LobbyMember>("/");
    running.server.metrics_page("/metrics");
    running.start();
    WsClient member(running.port());
    member.send("hello");
    CHECK(member.next() == "hello");
    const test::Answer answer = fetch(running.port(), "/metrics");
    CHECK(answer.header("content-type") == "text/plain; version=0.0.4");
    for (const std::string line :
         {"# TYPE wschat_websockets_open gauge", "wschat_websockets_open 1", "wschat_messages_received_total 1",
          "# TYPE wschat_messages_sent_total counter", "wschat_connections_accepted_total 2", "wschat_rooms 1",
          "wschat_responses_total{status=\"101\"} 1"}) {
        CAPTURE(line);
        CHECK(contains(answer.body, "\n" + line + "\n"));
    }
    // Each name has one HELP line. Each other line is a name and a number.
    std::string_view body = answer.body;
    std::vector<std::string> names;
    while (!body.empty()) {
        const std::string_view line = text::consume_until(body, '\n');
        CAPTURE(std::string(line));
        if (text::starts_with(line, "# HELP ")) {
            names.emplace_back(line.substr(7, line.find(' ', 7) - 7));
        } else if (!text::starts_with(line, "# TYPE ")) {
            CHECK(text::parse_unsigned(line.substr(line.rfind(' ') + 1), UINT64_MAX));
            CHECK(line.substr(0, line.find_first_of("{ ")) == names.back());
        }
    }
    std::sort(names.begin(), names.end());
    CHECK(std::adjacent_find(names.begin(), names.end()) == names.end());
}

TEST_CASE("the log has entries for opening, closing, refusals and the shutdown") {
    LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    running.server.route<Echo>("/chat");
    running.start();
    {
        WsClient client(running.port(), "/chat?name=Anna");
        client.close(CloseCode::normal, "bye");
        CHECK(client.close_code() == CloseCode::normal);
    }
    WsClient refused(running.port(), "/nowhere");
    WsClient broken(running.port(), "/chat");
    broken.raw.send(hello_unmasked);
    CHECK(broken.close_code() == CloseCode::protocol_error);
    refused.raw.close();
    broken.raw.close();
    running.stop();
    CHECK(log.has("debug listening address=\"127.0.0.1:" + std::to_string(running.port()) + "\""));
    CHECK(log.has("debug open peer=\"127.0.0.1\" path=\"/chat\""));
    CHECK(log.has("debug closed peer=\"127.0.0.1\" code=\"1000\" cause=\"peer\" reason=\"bye\""));
    CHECK(log.has("info refused status=\"404\" peer=\"127.0.0.1\" path=\"/nowhere\" sentence=\"There is no WebSocket"));
    CHECK(log.has("info closed peer=\"127.0.0.1\" code=\"1002\" cause=\"protocol error\""));
    CHECK(log.has("debug shutdown"));
}

TEST_CASE("text from a peer cannot break a line of the log or control the terminal") {
    // FAULTS 43
    LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    running.server.route<Echo>("/");
    running.start();
    WsClient foreign(running.port(), "/",
                     "Origin: http://evil\"\xC2\x9B\x9B"
                     "31m.example\r\n");
    CHECK(foreign.head.substr(0, 12) == "HTTP/1.1 403");
    WsClient client(running.port());
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

TEST_CASE("peers cannot flood the log, and suppressed entries are counted") {
    LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    const test::TemporaryFile file("page.txt");
    running.server.file("/", file.path);
    running.start();
    file.remove();
    const std::size_t before = running.on_loop([&] { return log.lines.size(); });
    // The limit is 100 entries at once and 100 a second.
    RawClient client(running.port());
    client.send(test::repeated(3000, request("/")));
    REQUIRE(running.eventually([&] {
        const Metrics metrics = running.server.metrics();
        return metrics.responses.at(404) == 3000;
    }));
    const std::uint64_t suppressed = running.metrics().log_entries_suppressed;
    CHECK(suppressed > 0);
    CHECK(running.on_loop([&] { return log.lines.size(); }) - before + suppressed == 3000);
}

TEST_CASE("a connection between the signal and run() is not accepted") {
    const int status = run_in_child([] {
        Server server(poller_options());
        server.route<Echo>("/");
        server.listen(0);
        std::raise(SIGTERM);
        RawClient late(server.port());
        server.run();
        const bool refused = late && late.read_to_end() && late.received.empty();
        return refused && server.metrics().connections_accepted == 0 ? 0 : 1;
    });
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("the next run() continues a shutdown that was interrupted by stop()") {
    ServerOptions options = poller_options();
    options.handle_signals = false;
    Server server(options);
    server.route<Echo>("/");
    test::listen(server);
    std::thread first([&] { server.run(); });
    WsClient silent(server.port());
    server.shutdown(1h);
    CHECK(silent.raw.read_until(hex("03 e9")));
    server.loop().post([&] { server.loop().stop(); });
    first.join();
    CHECK(server.metrics().connections_open == 1);
    std::thread second([&] { server.run(); });
    silent.raw.close();
    second.join();
    CHECK(server.metrics().connections_open == 0);
}

TEST_CASE("a route whose factory returns no handler answers 500 and logs the cause") {
    LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    running.server.add_route("/", [] { return nullptr; });
    running.start();
    WsClient client(running.port());
    CHECK_FALSE(client.is_open());
    CHECK(client.head.substr(0, 12) == "HTTP/1.1 500");
    running.stop();
    CHECK(log.has("error exception in=\"handshake\""));
    CHECK(log.has("the factory made no handler"));
}

TEST_CASE("the limit for one address does not apply to Unix sockets") {
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

TEST_CASE("the metrics page has the closed connections by cause and by code") {
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
