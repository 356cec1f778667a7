// Section 14 at its edges: rates, keep-alive, inherited sockets, PROXY headers, shutdown and restart, over real sockets.
#include "support.hpp"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::BlockedLoop;
using test::contains;
using test::Echo;
using test::EchoServer;
using test::error_of;
using test::fetch;
using test::hex;
using test::is_refusal;
using test::LogLines;
using test::next_answer;
using test::RawClient;
using test::request;
using test::RunningServer;
using test::ServerProcess;
using test::temporary_path;
using test::TemporaryFile;
using test::upgrade_request;
using test::with_limits;
using test::WsClient;

namespace {

// A listening TCP socket of the test, as a supervisor opens it.
Socket listening_socket(int* port = nullptr) {
    Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    REQUIRE(::bind(socket.descriptor(), reinterpret_cast<const sockaddr*>(&address), size) == 0);
    REQUIRE(::listen(socket.descriptor(), SOMAXCONN) == 0);
    REQUIRE(::getsockname(socket.descriptor(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    if (port != nullptr) *port = ntohs(address.sin_port);
    return socket;
}

std::string fd(int descriptor) { return "fd:" + std::to_string(descriptor); }

// Sets an environment variable until the end of its scope.
class Environment {
public:
    Environment(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
    Environment(const Environment&) = delete;
    Environment& operator=(const Environment&) = delete;
    ~Environment() { ::unsetenv(name_); }

private:
    const char* name_;
};

// A handler that sends its peer's address.
struct WhoAmI : WebSocketHandler {
    void open() override { write_message(remote_address()); }
    void on_message(const Message&) override {}
};

// A PROXY header of version 2, and the bytes of the specification's signature.
std::string proxy_v2(std::string_view command_and_family, std::string_view addresses) {
    return hex("0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a") + hex(command_and_family) +
           static_cast<char>(addresses.size() / 256) + static_cast<char>(addresses.size() % 256) +
           std::string(addresses);
}
// From 192.0.2.1:56324 to 198.51.100.2:443.
std::string proxy_v2_ipv4(std::string_view more = {}) {
    return proxy_v2("21 11", hex("c0 00 02 01 c6 33 64 02 dc 04 01 bb") + std::string(more));
}

// Serves WhoAmI, and a page with the address of the peer, to proxies on 127.0.0.1.
class ProxiedServer : public RunningServer {
public:
    explicit ProxiedServer(ServerOptions options = {}, const std::string& trusted = "127.0.0.1")
        : RunningServer(std::move(options)) {
        log.attach_to(server);
        server.route<WhoAmI>("/");
        server.get("/who", [](const Request& r) {
            return Response(200, text::concat({r.remote_address(), " ", r.scheme()}));
        });
        server.trusted_proxies({trusted});
        ListenOptions listen_options;
        listen_options.proxy_protocol = true;
        server.listen(0, listen_options);
        run();
    }
    ~ProxiedServer() { stop(); }  // before the log

    // The address that a handler sees.
    std::string address_after(std::string_view header) {
        RawClient client = RawClient::plain(port());
        client.send(std::string(header) + upgrade_request());
        if (!client.read_until("\r\n\r\n")) return "closed";
        client.received.erase(0, client.received.find("\r\n\r\n") + 4);
        if (!client.read_at_least(2) || !client.read_at_least(2 + static_cast<std::size_t>(client.received[1])))
            return "closed";
        return client.received.substr(2);
    }
    std::uint64_t failures() { return metrics().proxy_failures; }

    LogLines log;
};

#if WSCHAT_OPENSSL
constexpr bool compiled_with_tls = true;
#else
constexpr bool compiled_with_tls = false;
#endif

ServerOptions with_keep_alive(Duration keep_alive, Duration handshake = 10s) {
    Limits limits;
    limits.keep_alive_timeout = keep_alive;
    limits.handshake_timeout = handshake;
    return with_limits(limits);
}

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- rates ----------------------------------------------------------------------------------------------------------

TEST_CASE("messages above messages_per_second are delayed, none is lost, and other peers do not wait") {
    Limits limits;
    limits.messages_per_second = 200;
    limits.messages_burst = 2;
    EchoServer running(with_limits(limits));
    WsClient fast(running.port()), other(running.port());
    for (int i = 0; i < 100; ++i) fast.send(std::to_string(i));
    other.send("hello");
    CHECK(other.next() == "hello");
    for (int i = 0; i < 100; ++i) CHECK(fast.next() == std::to_string(i));
    fast.close();
    CHECK(fast.close_code() == CloseCode::normal);
    CHECK(running.metrics().messages_received == 101);
}

TEST_CASE("a message that is larger than bytes_per_second arrives complete") {
    Limits limits;
    limits.bytes_per_second = 400'000;
    EchoServer running(with_limits(limits));
    WsClient client(running.port());
    const std::string large(600'000, 'x');
    client.send(large);
    CHECK((client.next() == large));
    client.send("small");
    CHECK(client.next() == "small");
}

TEST_CASE("a shutdown does not wait for messages that the rate delays") {
    Limits limits;
    limits.messages_per_second = 1;
    limits.closing_timeout = 1h;
    EchoServer running(with_limits(limits));
    WsClient client(running.port());
    for (int i = 0; i < 1000; ++i) client.send("x");
    CHECK(client.next() == "x");
    running.server.shutdown(1h);
    CHECK(client.close_code() == CloseCode::going_away);
    running.stop(1h);
    CHECK(running.server.metrics().close_codes.at(CloseCode::going_away) == 1);
}

TEST_CASE("all messages of a peer that hangs up while the rate delays them are still delivered") {
    Limits limits;
    limits.messages_per_second = 100;
    limits.messages_burst = 1;
    EchoServer running(with_limits(limits));
    auto client = std::make_unique<WsClient>(running.port());
    for (int i = 0; i < 20; ++i) client->send("x");
    client->raw.shutdown_send();
    CHECK(running.eventually([&] { return running.server.metrics().websockets_open == 0; }));
    CHECK(running.metrics().messages_received == 20);
}

// ---- keep-alive -----------------------------------------------------------------------------------------------------

TEST_CASE("an answer that keeps the connection alive announces the time") {
    RunningServer running;
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    const test::Answer kept = fetch(running.port(), "/");
    CHECK(kept.header("Keep-Alive") == "timeout=75");
    CHECK(kept.header("Connection") == "keep-alive");
    const test::Answer last = fetch(running.port(), "/", "Connection: close\r\n");
    CHECK(last.header("Keep-Alive") == "");
    CHECK(last.header("Connection") == "close");
}

TEST_CASE("an idle connection lives for keep_alive_timeout, not for handshake_timeout") {
    for (const Duration keep_alive : {Duration(1h), Duration::zero()}) {
        RunningServer running(with_keep_alive(keep_alive, 50ms));
        running.server.get("/", [](const Request&) { return Response(200, "hello"); });
        running.start();
        test::Answer first;
        std::unique_ptr<RawClient> idle;
        for (int attempt = 0; attempt < 100 && first.status == 0; ++attempt) {
            idle = std::make_unique<RawClient>(running.port());
            idle->send(request("/"));
            first = next_answer(*idle);
        }
        REQUIRE(first.status == 200);
        CHECK(first.header("Keep-Alive") == (keep_alive == Duration::zero() ? "" : "timeout=3600"));
        // A later connection has reached the deadline of its handshake.
        CHECK(RawClient(running.port()).read_to_end());
        idle->send(request("/"));
        CHECK(next_answer(*idle).status == 200);
        // The next request has the deadline of a handshake again.
        idle->send("GET");
        CHECK(idle->read_to_end());
        CHECK(is_refusal(idle->received, 408));
    }
}

TEST_CASE("an idle connection ends with a FIN, not with a reset") {
    RunningServer running(with_keep_alive(30ms));
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    RawClient idle(running.port());
    idle.send(request("/"));
    CHECK(next_answer(idle).status == 200);
    CHECK(idle.read_to_end());
    CHECK_FALSE(idle.reset_by_peer);
    // What the peer has sent meanwhile is not answered with a reset.
    idle.send(request("/"));
    CHECK_FALSE(idle.read_some());
    CHECK_FALSE(idle.reset_by_peer);
    idle.close();
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
}

TEST_CASE("a request that arrives before the server closes an idle connection is answered, even by a late loop") {
    int answered = 0;
    for (const auto timeout : {20ms, 200ms, 2'000ms}) {  // on a slow machine, a short one passes too early
        if (answered == 3) break;
        RunningServer running(with_keep_alive(timeout));
        running.server.get("/", [](const Request&) { return Response(200, "hello"); });
        running.start();
        for (int attempt = 0; attempt < 10 && answered < 3; ++attempt) {
            RawClient idle(running.port());
            idle.send(request("/"));
            if (next_answer(idle).status != 200) continue;
            BlockedLoop blocked(running.server);
            const bool open = idle.received.empty() && !idle.ended;
            idle.send(request("/"));
            std::this_thread::sleep_for(timeout + 10ms);  // the timeout passes
            blocked.release();
            const int status = next_answer(idle).status;
            if (open && status == 200) ++answered;
        }
    }
    CHECK(answered == 3);
}

// ---- what the kernel holds ------------------------------------------------------------------------------------------

TEST_CASE("a peer that does not read gets volatile messages only until send_buffer is full") {
    struct Ticker : WebSocketHandler {
        void on_message(const Message&) override {
            const std::string piece(4096, 'x');
            for (int i = 0; i < 2000; ++i) {
                write_volatile(piece);
                if (i % 16 == 0) host_flush();
            }
        }
        // Each turn of a real program flushes.
        void host_flush() { detail::HandlerAccess::core(*this).host->flush(); }
    };
    Limits limits;
    limits.send_buffer = 64 * 1024;
    limits.max_backlog = 64 * 1024 * 1024;
    test::HandlerServer<Ticker> running(with_limits(limits));
    WsClient client(running.port());
    const int small = 4096;
    ::setsockopt(client.raw.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    client.send("go");
    REQUIRE(running.eventually([&] { return running.server.metrics().messages_received == 1; }));
    const Metrics metrics = running.metrics();
    CHECK(metrics.messages_dropped > 0);
    CHECK(metrics.bytes_sent < 1024 * 1024);
}

// ---- shutdown -------------------------------------------------------------------------------------------------------

TEST_CASE("ServerOptions::shutdown_deadline is the deadline of shutdown()") {
    ServerOptions options;
    options.shutdown_deadline = 30ms;
    options.limits.closing_timeout = 1h;
    auto running = std::make_unique<EchoServer>(options);
    WsClient silent(running->port());
    REQUIRE(silent.is_open());
    running->server.shutdown();
    running->stop(1h);  // waits; its own deadline is later
    CHECK(running->server.metrics().close_codes.at(CloseCode::abnormal) == 1);
    CHECK(running->server.metrics().closed.at(CloseCause::shutdown) == 1);
}

TEST_CASE("listen() during a shutdown is an Error") {
    RunningServer running;
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    RawClient open(running.port());
    open.send("GET");
    std::string error;
    running.on_loop([&] {
        running.server.shutdown(1h);
        running.server.loop().post([&] { error = error_of([&] { running.server.listen(0); }); });
    });
    open.close();
    running.stop();
    CHECK(error == "listen 0: the server is shutting down");
}

TEST_CASE("a request that has arrived before a shutdown is answered, and its connection closes") {
    const test::OneLoop one_loop;
    if (test::over_tls()) return;  // the server does not shake hands while its loop sends for the clients
    RunningServer running;
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    RawClient fresh(running.port()), idle(running.port()), upgrade(running.port());
    idle.send(request("/"));
    CHECK(next_answer(idle).status == 200);
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_accepted == 3; }));
    {
        // In one turn, after the poller: the requests arrive, and the shutdown begins.
        BlockedLoop blocked(running.server);
        running.server.loop().post([&] {
            for (RawClient* client : {&fresh, &idle}) client->send(request("/"));
            upgrade.send(upgrade_request());
        });
        running.server.shutdown(1h);
    }
    for (RawClient* client : {&fresh, &idle}) {
        const test::Answer answer = next_answer(*client);
        CHECK(answer.status == 200);
        CHECK(answer.header("Connection") == "close");
        CHECK(client->read_to_end());
        CHECK_FALSE(client->reset_by_peer);
    }
    CHECK(upgrade.read_to_end());
    CHECK(is_refusal(upgrade.received, 503));
    for (RawClient* client : {&fresh, &idle, &upgrade}) client->close();
    running.stop();
}

TEST_CASE("a shutdown answers a pipelined request that waits behind an answer") {
    const TemporaryFile file("pipelined.bin", test::large_content());
    RunningServer running;
    running.server.file("/large", file.path);
    running.server.get("/next", [](const Request&) { return Response(200, "next"); });
    running.start();
    RawClient client(running.port());
    client.send(request("/large") + request("/next"));
    REQUIRE(client.read_until("\r\n\r\n"));
    running.server.shutdown(1h);
    CHECK(running.on_loop([] { return true; }));
    CHECK((next_answer(client).body == test::large_content()));
    const test::Answer next = next_answer(client);
    CHECK(next.body == "next");
    CHECK(next.header("Connection") == "close");
    client.close();
    running.stop();
}

TEST_CASE("a shutdown does not wait for a peer that has sent nothing") {
    Limits limits;
    limits.handshake_timeout = 1h;
    RunningServer running(with_limits(limits));
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    RawClient silent(running.port());
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_accepted == 1; }));
    running.stop(1h);
    CHECK(silent.read_to_end());
}

#if WSCHAT_OPENSSL
TEST_CASE("a TLS peer that hangs up in its handshake is removed, even if an answer waits for it") {
    ServerOptions options = test::with_handshake_timeout(Duration::zero());  // never
    options.server_limits.max_connections = 1;
    RunningServer running(options);
    running.server.route<Echo>("/");
    test::listen_tls(running.server, "0");
    running.run();
    RawClient first = RawClient::plain(running.port());
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == 1; }));
    RawClient refused = RawClient::plain(running.port());
    // The beginning of a ClientHello.
    refused.send(hex("16 03 01 02 00 01 00 01 fc 03 03"));
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == 2; }));
    refused.close();
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 1; }));
}
#endif

// ---- inherited sockets ----------------------------------------------------------------------------------------------

TEST_CASE("a server can listen on a socket that it has inherited") {
    int port = 0;
    Socket opened = listening_socket(&port);
    RunningServer running;
    running.server.route<Echo>("/");
    const int descriptor = ::dup(opened.descriptor());
    test::listen(running.server, fd(descriptor));
    running.run();
    CHECK(running.port() == port);
    CHECK(running.server.url() == test::scheme() + "://127.0.0.1:" + std::to_string(port) + "/");
    WsClient client(port);
    client.send("hello");
    CHECK(client.next() == "hello");
    CHECK(::fcntl(descriptor, F_GETFD) == FD_CLOEXEC);
    client.raw.close();
    running.stop();
    CHECK(::fcntl(descriptor, F_GETFD) == -1);
    // The socket of the supervisor still accepts connections.
    CHECK(RawClient::plain(port));
}

TEST_CASE("a server does not remove the path of a Unix socket that it has inherited") {
    const std::string path = temporary_path("inherited.sock");
    {
        const ListenSocket opened(ListenAddress::parse("unix:" + path), false);
        RunningServer running;
        running.server.listen(fd(::dup(opened.descriptor())));
        CHECK(running.server.url() == "unix:" + path);
        running.run();
        running.stop();
        struct stat status {};
        CHECK(::lstat(path.c_str(), &status) == 0);
    }
    ::unlink(path.c_str());
}

TEST_CASE("a descriptor that is not a listening stream socket is an Error, and stays open") {
    Server server;
    const auto error = [&](int descriptor) { return error_of([&] { server.listen(fd(descriptor)); }); };
    CHECK(error(4000) == "listen fd:4000: the process has no such descriptor");
    int pipe[2];
    REQUIRE(::pipe(pipe) == 0);
    CHECK(error(pipe[0]) == "listen " + fd(pipe[0]) + ": the descriptor is not a socket");
    CHECK(::fcntl(pipe[0], F_GETFD) != -1);
    for (const int end : pipe) ::close(end);
    const Socket stream(::socket(AF_INET, SOCK_STREAM, 0)), datagram(::socket(AF_INET, SOCK_DGRAM, 0));
    for (const Socket* socket : {&stream, &datagram}) {
        CHECK(error(socket->descriptor()) == "listen " + fd(socket->descriptor()) +
                                                 ": the descriptor is not a listening stream socket of TCP or Unix");
        CHECK(::fcntl(socket->descriptor(), F_GETFD) != -1);
    }
    for (const std::string text : {"fd:", "fd:x", "fd:-1", "fd: 3", "fd:99999999999"}) {
        CAPTURE(text);
        CHECK(error_of([&] { server.listen(text); }) == "listen " + text + ": not a descriptor such as fd:3");
    }
}

TEST_CASE("listen_inherited() listens on each socket that systemd passes") {
    int port = 0, second_port = 0;
    const Socket first = listening_socket(&port), second = listening_socket(&second_port);
    const pid_t child = ::fork();
    if (child == 0) {
        const int a = ::fcntl(first.descriptor(), F_DUPFD, 100), b = ::fcntl(second.descriptor(), F_DUPFD, 100);
        ::dup2(a, 3);
        ::dup2(b, 4);
        ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
        ::setenv("LISTEN_FDS", "2", 1);
        Server server;
        server.get("/", [](const Request&) { return Response(200, "inherited"); });
        server.listen_inherited();
        server.run();
        ::_exit(0);
    }
    for (const int each : {port, second_port}) {
        RawClient client = RawClient::plain(each);
        client.send(request("/"));
        CHECK(next_answer(client).body == "inherited");
    }
    ::kill(child, SIGTERM);
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
}

TEST_CASE("listen_inherited() without sockets for this process is an Error with the cause") {
    Server server;
    const auto error = [&] { return error_of([&] { server.listen_inherited(); }); };
    const std::string none = "listen_inherited: there is no socket: LISTEN_FDS or LISTEN_PID is not set";
    CHECK(error() == none);
    const Environment count("LISTEN_FDS", "1");
    CHECK(error() == none);
    {
        const Environment other("LISTEN_PID", "1");
        CHECK(contains(error(), "LISTEN_PID is \"1\", and this process is " + std::to_string(::getpid())));
    }
    const Environment own("LISTEN_PID", std::to_string(::getpid()));
    for (const std::string text : {"", "0", "-1", "x"}) {
        const Environment wrong("LISTEN_FDS", text);
        CHECK(error() == "listen_inherited: LISTEN_FDS is \"" + text + "\", not a number of sockets");
    }
}

TEST_CASE("run() tells systemd that it is ready and that the shutdown begins") {
    for (const bool abstract : {false, true}) {
        const std::string path = temporary_path("notify.sock");
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        std::memcpy(name.sun_path + (abstract ? 1 : 0), path.data(), path.size());
        const Socket systemd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
        const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + (abstract ? 1 : 0));
        REQUIRE(::bind(systemd.descriptor(), reinterpret_cast<const sockaddr*>(&name), size) == 0);
        const auto next = [&] {
            char text[64];
            pollfd entry{systemd.descriptor(), POLLIN, 0};
            if (::poll(&entry, 1, 30'000) != 1) return std::string("nothing");
            const ssize_t n = ::recv(systemd.descriptor(), text, sizeof text, 0);
            return std::string(text, n < 0 ? 0 : static_cast<std::size_t>(n));
        };
        const Environment variable("NOTIFY_SOCKET", (abstract ? "@" : "") + path);
        EchoServer running;
        CHECK(next() == "READY=1");
        running.server.shutdown();
        CHECK(next() == "STOPPING=1");
        running.stop();
        ::unlink(path.c_str());
    }
}

TEST_CASE("a NOTIFY_SOCKET that cannot be used has no effect") {
    for (const std::string& path : {std::string("/nonexistent/socket"), std::string("relative"), std::string(),
                                    std::string("/"), std::string(200, '/')}) {
        const Environment variable("NOTIFY_SOCKET", path);
        EchoServer running;
        WsClient client(running.port());
        CHECK(client.is_open());
    }
}

TEST_CASE("a Unix socket can have permissions of its own") {
    const std::string path = temporary_path("mode.sock");
    RunningServer running;
    running.server.route<Echo>("/");
    for (const unsigned mode : {0600u, 0660u, 0666u}) {
        Server server;
        ListenOptions options;
        options.unix_mode = mode;
        server.listen("unix:" + path, options);
        struct stat status {};
        REQUIRE(::lstat(path.c_str(), &status) == 0);
        CHECK((status.st_mode & 07777) == mode);
    }
    Server server;
    ListenOptions options;
    options.unix_mode = 0660;
    CHECK(error_of([&] { server.listen(0, options); }) ==
          "listen 127.0.0.1:0: only a Unix socket that listen() makes can have ListenOptions::unix_mode");
    options.unix_mode = 66000;
    CHECK(error_of([&] { server.listen("unix:" + path, options); }) ==
          "listen unix:" + path + ": ListenOptions::unix_mode is not a mode such as 0660");
}

// ---- the PROXY protocol ---------------------------------------------------------------------------------------------

TEST_CASE("a PROXY header of version 1 or 2 has the address that handlers see") {
    ProxiedServer running;
    const struct {
        std::string header, address;
    } table[] = {
        {"PROXY TCP4 192.0.2.7 198.51.100.2 56324 443\r\n", "192.0.2.7"},
        {"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n", "2001:db8::7"},
        {"PROXY UNKNOWN\r\n", "127.0.0.1"},
        {proxy_v2_ipv4(), "192.0.2.1"},
        {proxy_v2_ipv4("\x03\0\x04\x01\x02\x03\x04"), "192.0.2.1"},
        {proxy_v2("20 00", ""), "127.0.0.1"},
    };
    for (const auto& row : table) {
        CAPTURE(row.address);
        CHECK(running.address_after(row.header) == row.address);
    }
    CHECK(running.failures() == 0);
}

TEST_CASE("after a PROXY header without an address, what the client says about itself is not believed") {
    const std::string lies = "X-Forwarded-For: 203.0.113.9\r\nX-Forwarded-Proto: https\r\n";
    ProxiedServer running;
    const struct {
        std::string header, answer;
    } table[] = {
        {"PROXY UNKNOWN\r\n", "127.0.0.1 http"},
        {proxy_v2("20 00", ""), "127.0.0.1 http"},
        {proxy_v2("21 31", std::string(216, '\0')), "127.0.0.1 http"},
        {"PROXY TCP4 192.0.2.7 198.51.100.2 56324 443\r\n", "192.0.2.7 http"},
        // The header names a trusted proxy, which writes these lines itself.
        {"PROXY TCP4 127.0.0.1 198.51.100.2 56324 443\r\n", "203.0.113.9 https"},
    };
    for (const auto& row : table) {
        CAPTURE(row.header);
        RawClient client = RawClient::plain(running.port());
        client.send(row.header + request("/who", lies));
        CHECK(next_answer(client).body == row.answer);
    }
}

TEST_CASE("a PROXY header can arrive in any two pieces, and byte by byte") {
    ProxiedServer running;
    for (const std::string& header : {proxy_v2_ipv4(), std::string("PROXY TCP4 192.0.2.1 198.51.100.2 1 2\r\n")}) {
        const std::string all = header + upgrade_request();
        for (std::size_t cut = 1; cut <= header.size() + 1; ++cut) {
            RawClient client = RawClient::plain(running.port());
            client.socket().set_nodelay(true);
            const std::uint64_t before = running.metrics().bytes_received;
            client.send(all.substr(0, cut));
            REQUIRE(running.eventually([&] { return running.server.metrics().bytes_received - before == cut; }));
            client.send(all.substr(cut));
            CHECK(client.read_until("192.0.2.1"));
            client.reset();
        }
        RawClient client = RawClient::plain(running.port());
        client.socket().set_nodelay(true);
        for (const char byte : all) client.send(std::string_view(&byte, 1));
        CHECK(client.read_until("192.0.2.1"));
    }
}

TEST_CASE("a connection without a valid PROXY header is closed and counted, and logged once") {
    ProxiedServer running;
    const std::string headers[] = {
        upgrade_request(),
        "PROXY TCP4 192.0.2.7\r\n",
        "PROXY TCP4 192.0.2.7 198.51.100.2 56324 443\n",
        "PROXY UNKNOWN" + std::string(200, 'x'),
        proxy_v2("31 11", std::string(12, '\0')),
        proxy_v2("21 11", std::string(11, '\0')),
        proxy_v2("21 11", std::string(5000, '\0')),
    };
    std::uint64_t expected = 0;
    for (const std::string& header : headers) {
        CAPTURE(header);
        RawClient client = RawClient::plain(running.port());
        client.send(header);
        CHECK(client.read_to_end());
        CHECK(client.received == "");
        CHECK(running.failures() == ++expected);
    }
    running.stop();
    CHECK(std::count_if(running.log.lines.begin(), running.log.lines.end(),
                        [](const std::string& line) { return contains(line, "warning"); }) == 1);
    CHECK(running.log.has("proxy_header_refused"));
}

TEST_CASE("a PROXY header of a peer that is not a trusted proxy is not read") {
    ProxiedServer running({}, "10.0.0.1");
    CHECK(running.address_after("PROXY TCP4 192.0.2.7 198.51.100.2 56324 443\r\n") == "closed");
    CHECK(running.failures() == 1);
    running.stop();
    CHECK(running.log.has("the peer is not one of trusted_proxies()"));
}

TEST_CASE(
    "a PROXY header that does not arrive in time, or not completely, is a failure, and a check of the port is none") {
    ProxiedServer running(test::with_handshake_timeout(50ms));
    RawClient half = RawClient::plain(running.port());
    half.send("PROXY ");
    CHECK(half.read_to_end());
    CHECK(half.received == "");
    CHECK(running.failures() == 1);
    {
        RawClient gone = RawClient::plain(running.port());
        gone.send("PROXY ");
    }
    CHECK(running.eventually([&] { return running.server.metrics().proxy_failures == 2; }));
    RawClient check = RawClient::plain(running.port());
    CHECK(check.read_to_end());
    RawClient::plain(running.port()).close();
    CHECK(running.eventually([&] { return running.server.metrics().connections_accepted == 4; }));
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.failures() == 2);
}

TEST_CASE("the limit for one address applies to the address in the PROXY header") {
    ServerLimits server_limits;
    server_limits.max_connections_per_address = 1;
    ProxiedServer running(test::with_server_limits(server_limits));
    const auto connect = [&](std::string_view address) {
        RawClient client = RawClient::plain(running.port());
        client.send("PROXY TCP4 " + std::string(address) + " 198.51.100.2 1 2\r\n" + upgrade_request());
        CHECK(client.read_until("\r\n\r\n"));
        return client;
    };
    RawClient one = connect("192.0.2.1"), two = connect("192.0.2.2"), refused = connect("192.0.2.1");
    CHECK(contains(one.received, " 101 "));
    CHECK(contains(two.received, " 101 "));
    CHECK(contains(refused.received, " 503 "));
    one.close();
    CHECK(running.eventually([&] { return running.server.metrics().websockets_open == 1; }));
    CHECK(contains(connect("192.0.2.1").received, " 101 "));
}

TEST_CASE("above max_connections a proxied peer gets its 503 after its PROXY header") {
    ServerLimits server_limits;
    server_limits.max_connections = 1;
    ProxiedServer running(test::with_server_limits(server_limits));
    RawClient first = RawClient::plain(running.port());
    first.send(proxy_v2_ipv4() + upgrade_request());
    CHECK(first.read_until(" 101 "));
    RawClient refused = RawClient::plain(running.port());
    refused.send(proxy_v2_ipv4());
    CHECK(refused.read_to_end());
    CHECK(is_refusal(refused.received, 503));
}

#if WSCHAT_OPENSSL
TEST_CASE("a PROXY header comes before TLS") {
    RunningServer running;
    running.server.route<WhoAmI>("/");
    running.server.trusted_proxies({"127.0.0.1"});
    const test::CertificateFiles files("proxied");
    ListenOptions options;
    options.proxy_protocol = true;
    running.server.listen_tls(0, files.options(), options);
    running.run();
    RawClient plain = RawClient::plain(running.port());
    plain.send(proxy_v2_ipv4());
    RawClient client(std::move(plain.socket()), test::client_transport());
    client.send(upgrade_request());
    CHECK(client.read_until("192.0.2.1"));
}
#endif

// ---- the log --------------------------------------------------------------------------------------------------------

TEST_CASE("an exception is logged with the address of the proxy before open(), and with that of the client after it") {
    struct Thrower : wschat::WebSocketHandler {
        std::optional<Response> prepare(const Request& request) override {
            if (request.query("early")) throw std::runtime_error("too early");
            return std::nullopt;
        }
        void on_message(const Message&) override { throw std::runtime_error("too late"); }
    };
    test::LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    running.server.trusted_proxies({"127.0.0.1"});
    running.server.route<Thrower>("/");
    running.start();
    WsClient early(running.port(), "/?early=1", "X-Forwarded-For: 203.0.113.7\r\n");
    WsClient late(running.port(), "/", "X-Forwarded-For: 203.0.113.7\r\n");
    late.send("words");
    CHECK(late.close_code() == CloseCode::internal_error);
    running.on_loop([&] {
        CHECK(log.has("what=\"too early\" peer=\"127.0.0.1\""));
        CHECK(log.has("what=\"too late\" peer=\"203.0.113.7\""));
    });
}

// Opens a connection for each probe, and ends it with a FIN or with a reset.
void probe(int port) {
    const std::string probes[] = {
        "",
        "\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        request("/admin.php"),
        "GET /nice%20ports%2C/Tri%6Eity.txt%2ebak HTTP/1.0\r\n\r\n",
        hex("16 03 01 02 00 01 00 01 fc 03 03") + std::string(600, '\0'),
        hex("16 03 01"),
        hex("03 00 00 0b 06 e0 00 00 00 00 00"),
        hex("00 00 00 00"),
        "SSH-2.0-scan\r\n",
    };
    for (const std::string& bytes : probes)
        for (const bool reset : {false, true}) {
            RawClient client = RawClient::plain(port);
            client.send(bytes);
            if (reset) client.reset();
        }
}

TEST_CASE("port scanners, checks of the port and clients of other protocols cause only debug entries") {
    // FAULTS 81
    LogLines log;
    for (const bool tls : {false, true}) {
        if (tls && !compiled_with_tls) continue;
        RunningServer running;
        log.attach_to(running.server);
        running.server.get("/", [](const Request&) { return Response(200, "hello"); });
        running.server.route<Echo>("/chat");
        if (tls) test::listen_tls(running.server, "0");
        else running.server.listen(0);
        running.run();
        probe(running.port());
        CHECK(running.eventually([&] { return running.server.metrics().connections_accepted == 22; }));
        CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
        running.stop();
    }
    for (const std::string& line : log.lines) {
        CAPTURE(line);
        CHECK(contains(line, "debug"));
    }
}

// ---- a restart ------------------------------------------------------------------------------------------------------

TEST_CASE("ten restarts with an inherited socket refuse no client") {
    // FAULTS 71
    int port = 0;
    const Socket opened = listening_socket(&port);
    const auto start = [&] {
        return std::make_unique<ServerProcess>([&](int) {
            auto server = std::make_unique<Server>();
            server->get("/", [](const Request&) { return Response(200, "hello"); });
            server->route<Echo>("/");
            server->listen(fd(::dup(opened.descriptor())));
            return server;
        });
    };
    // What a process of clients shares with this one.
    struct Shared {
        std::atomic<bool> stop{false};
        std::atomic<int> pages{0}, websockets{0}, later{0}, failures{0};
    };
    void* const memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    Shared& shared = *new (memory) Shared;
    auto current = start();
    const pid_t load = ::fork();
    if (load == 0) {
        while (!shared.stop) {
            RawClient page = RawClient::plain(port), websocket = RawClient::plain(port);
            page.send(request("/"));
            websocket.send(upgrade_request());
            ++(next_answer(page).status == 200 ? shared.pages : shared.failures);
            const int status = next_answer(websocket).status;
            ++(status == 101 ? shared.websockets : status == 503 ? shared.later : shared.failures);
        }
        ::_exit(0);
    }
    for (int restart = 0; restart < 10; ++restart) {
        const int before = shared.pages;
        REQUIRE(test::eventually([&] { return shared.pages > before + 20; }));
        auto next = start();
        rusage used{};
        CHECK(current->terminate(used) == 0);
        current = std::move(next);
    }
    shared.stop = true;
    ::waitpid(load, nullptr, 0);
    CHECK(shared.failures == 0);
    CHECK(shared.pages > 200);
    CHECK(shared.websockets > 0);
    MESSAGE(shared.pages.load(), " pages, ", shared.websockets.load(), " WebSockets, ", shared.later.load(),
            " got 503");
    ::munmap(memory, sizeof(Shared));
}

TEST_SUITE_END();
