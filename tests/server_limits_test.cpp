// Section 14 against hostile, slow and vanishing peers, over real sockets: limits, deadlines, lingering, descriptors.
#include "support.hpp"

#include <sys/wait.h>
#include <csignal>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::BlockedLoop;
using test::contains;
using test::Echo;
using test::EchoServer;
using test::HandlerServer;
using test::hex;
using test::inheritable_descriptors;
using test::is_refusal;
using test::LobbyMember;
using test::masked_text;
using test::RawClient;
using test::request;
using test::RunningServer;
using test::ServerProcess;
using test::temporary_path;
using test::TemporaryFile;
using test::upgrade_request;
using test::with_handshake_timeout;
using test::with_limits;
using test::with_server_limits;
using test::WsClient;

namespace {

using SignalAction = struct sigaction;

// Sends as many bytes as the message says, in messages of 64 KiB.
struct Flood : WebSocketHandler {
    void on_message(const Message& m) override {
        const std::string piece(64 * 1024, 'x');
        for (std::size_t left = std::stoul(std::string(m.text())); left >= piece.size(); left -= piece.size())
            write_message(piece);
    }
};

// A connection from a local address. A test that does not read sets a small receive window.
RawClient connect_from(const char* local, int port, int receive_window = 0) {
    Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (receive_window != 0) socket.set_option(SOL_SOCKET, SO_RCVBUF, receive_window);
    sockaddr_in from{}, to{};
    from.sin_family = to.sin_family = AF_INET;
    REQUIRE(::inet_pton(AF_INET, local, &from.sin_addr) == 1);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(static_cast<std::uint16_t>(port));
    if (::bind(socket.descriptor(), reinterpret_cast<const sockaddr*>(&from), sizeof from) != 0)
        return RawClient(Socket());
    if (::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0)
        return RawClient(Socket());
    os::make_nonblocking(socket.descriptor());
    return RawClient(std::move(socket));
}

void open_websocket(RawClient& client) {
    client.send(upgrade_request());
    REQUIRE(client.read_until("\r\n\r\n"));
    client.received.clear();
}

// A WebSocket connection with a small receive window. It reads nothing after the 101.
RawClient slow_reader(int port) {
    RawClient client = connect_from("127.0.0.1", port, 4096);
    open_websocket(client);
    return client;
}

// Sends bytes to a server with a short deadline and returns its whole answer. Tries again if the deadline passed before
// the bytes arrived, which happens on a busy machine.
std::string answer_to(
    int port, std::string_view bytes, const std::function<void(RawClient&)>& send_more = [](RawClient&) {}) {
    for (int attempt = 0; attempt < 100; ++attempt) {
        RawClient client(port);
        client.send(bytes);
        send_more(client);
        CHECK(client.read_to_end());
        if (!client.received.empty()) return client.received;
    }
    return "";
}

// Sends bytes that end the connection, then 200 KB more, and reads to the end.
void send_and_continue(RawClient& client, std::string_view bytes) {
    client.send(bytes);
    for (int i = 0; i < 20; ++i) client.send(std::string(10'000, 'x'));
    CHECK(client.read_to_end());
    REQUIRE_FALSE(client.reset_by_peer);
}

// A server that reads for as long as the test needs after its last byte.
ServerOptions with_long_linger() {
    Limits limits;
    limits.linger_timeout = 1h;
    return with_limits(limits);
}

std::unique_ptr<Server> listening_echo_server(ServerOptions options) {
    options.poller = test::poller_kind();
    auto server = std::make_unique<Server>(options);
    server->route<Echo>("/");
    test::listen(*server);
    return server;
}

void limit_descriptors(rlim_t count) {
    const rlimit limit{count, count};
    ::setrlimit(RLIMIT_NOFILE, &limit);
}

int milliseconds(Duration duration) {
    return static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(duration).count());
}

std::size_t open_descriptors() {
    std::size_t count = 0;
    for (int descriptor = 0; descriptor < 4096; ++descriptor)
        if (::fcntl(descriptor, F_GETFD) != -1) ++count;
    return count;
}

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- the number of connections --------------------------------------------------------------------------------------

TEST_CASE("above max_connections a peer gets a 503, until another connection ends") {
    ServerLimits server_limits;
    server_limits.max_connections = 2;
    EchoServer running(with_server_limits(server_limits));
    WsClient one(running.port());
    auto two = std::make_unique<WsClient>(running.port());
    REQUIRE(one.is_open());
    REQUIRE(two->is_open());
    {
        RawClient refused(running.port());
        // Unread input must not turn the answer into a reset.
        refused.send(upgrade_request() + std::string(10'000, 'x'));
        CHECK(refused.read_to_end());
        CHECK_FALSE(refused.reset_by_peer);
        CHECK(is_refusal(refused.received, 503));
        CHECK(contains(refused.received, "\r\nRetry-After: "));
    }
    CHECK(running.metrics().connections_refused == 1);
    one.send("hello");
    CHECK(one.next() == "hello");
    two.reset();
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == 1; }));
    CHECK(WsClient(running.port()).is_open());
}

TEST_CASE("above max_connections_per_address an address gets a 503, and other addresses do not") {
    ServerLimits server_limits;
    server_limits.max_connections_per_address = 2;
    EchoServer running(with_server_limits(server_limits));
    auto one = std::make_unique<WsClient>(running.port());
    WsClient two(running.port());
    RawClient refused(running.port());
    refused.send(upgrade_request());
    CHECK(refused.read_to_end());
    CHECK(is_refusal(refused.received, 503));
    RawClient other = connect_from("127.0.0.2", running.port());
    if (other) {
        other.send(upgrade_request());
        CHECK(other.read_until("HTTP/1.1 101 "));
    } else {
        MESSAGE("this machine has one loopback address only");
    }
    one.reset();
    refused.close();
    const std::uint64_t left = other ? 2 : 1;
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == left; }));
    CHECK(WsClient(running.port()).is_open());
}

TEST_CASE("behind a trusted proxy the limit applies to the forwarded addresses, and an IPv6 /64 counts as one") {
    ServerLimits server_limits;
    server_limits.max_connections_per_address = 1;
    RunningServer running(with_server_limits(server_limits));
    running.server.route<Echo>("/");
    running.server.trusted_proxies({"127.0.0.1"});
    running.start();
    const struct {
        std::string address;
        bool open;
    } table[] = {
        {"203.0.113.7", true},     {"203.0.113.7", false},     {"203.0.113.8", true},     {"::ffff:203.0.113.8", false},
        {"2001:db8:0:1::1", true}, {"2001:db8:0:1::2", false}, {"2001:db8:0:2::1", true},
    };
    std::vector<std::unique_ptr<WsClient>> clients;
    for (const auto& row : table) {
        CAPTURE(row.address);
        clients.push_back(std::make_unique<WsClient>(running.port(), "/", "X-Forwarded-For: " + row.address + "\r\n"));
        CHECK(clients.back()->is_open() == row.open);
        if (!row.open) CHECK(clients.back()->head.substr(0, 12) == "HTTP/1.1 503");
    }
}

// ---- deadlines ------------------------------------------------------------------------------------------------------

TEST_CASE("a silent peer is closed at the deadline of the handshake") {
    // FAULTS 8
    EchoServer running(with_handshake_timeout(30ms));
    RawClient silent(running.port());
    CHECK(silent.read_to_end());
    CHECK(silent.received == "");
}

TEST_CASE("half a request gets a 408 at the deadline of the handshake") {
    EchoServer running(with_handshake_timeout(30ms));
    for (const std::string half : {"G", "GET / HTTP/1.1", "GET / HTTP/1.1\r\nHost: x\r\n", "\r\nGET"}) {
        CAPTURE(half);
        CHECK(is_refusal(answer_to(running.port(), half), 408));
    }
}

TEST_CASE("single bytes do not extend the deadline of the handshake") {
    EchoServer running(with_handshake_timeout(30ms));
    const std::string answer =
        answer_to(running.port(), "GET / HTTP/1.1\r\nHost: x\r\nX-Padding: ", [](RawClient& client) {
            client.socket().set_nodelay(true);
            pollfd answered{client.socket().descriptor(), POLLIN, 0};
            int sent = 0;
            // Stops long before max_header_bytes.
            for (; sent < 8000 && ::poll(&answered, 1, 5) == 0; ++sent) client.send("x");
            CHECK(sent < 8000);
        });
    CHECK(is_refusal(answer, 408));
}

TEST_CASE("a kept-alive connection without a next request is closed, and half a request gets a 408") {
    Limits limits;
    limits.handshake_timeout = limits.keep_alive_timeout = 30ms;
    RunningServer running(with_limits(limits));
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    const std::string idle = answer_to(running.port(), request("/"));
    CHECK(contains(idle, "HTTP/1.1 200 OK"));
    CHECK(idle.substr(idle.find("\r\n\r\n") + 4) == "hello");
    const std::string half = answer_to(running.port(), request("/") + "GET /");
    CHECK(contains(half, "hello"));
    CHECK(is_refusal(std::string_view(half).substr(half.find("hello") + 5), 408));
}

TEST_CASE("a peer that does not read its answer is closed at the deadline") {
    const TemporaryFile file("large.bin", test::large_content());
    RunningServer running(with_handshake_timeout(30ms));
    running.server.file("/", file.path);
    running.start();
    RawClient client = connect_from("127.0.0.1", running.port(), 4096);
    client.send(request("/"));
    CHECK(running.eventually([&] {
        return running.server.metrics().connections_accepted == 1 && running.server.metrics().connections_open == 0;
    }));
    CHECK(running.metrics().bytes_sent < 20 * 1024 * 1024);
}

TEST_CASE("the deadline of the handshake does not apply to an open WebSocket") {
    EchoServer running(with_handshake_timeout(30ms));
    std::unique_ptr<WsClient> client;
    for (int attempt = 0; attempt < 100 && (!client || !client->is_open()); ++attempt)
        client = std::make_unique<WsClient>(running.port());
    REQUIRE(client->is_open());
    // A later connection has reached its deadline.
    RawClient silent(running.port());
    CHECK(silent.read_to_end());
    client->send("hello");
    CHECK(client->next() == "hello");
}

TEST_CASE("hundreds of silent peers do not delay other clients") {
    EchoServer running(with_handshake_timeout(1h));
    std::vector<RawClient> silent;
    for (int i = 0; i < 300; ++i) REQUIRE(silent.emplace_back(running.port()));
    WsClient client(running.port());
    for (int i = 0; i < 100; ++i) {
        client.send("hello");
        REQUIRE(client.next() == "hello");
    }
    CHECK(running.metrics().connections_open == 301);
}

// ---- lingering close ------------------------------------------------------------------------------------------------

TEST_CASE("after a protocol error the Close frame arrives although the peer still sends") {
    EchoServer running(with_long_linger());
    for (int round = 0; round < 20; ++round) {
        RawClient client(running.port());
        open_websocket(client);
        // RFC 6455 5.1: a frame that is not masked.
        send_and_continue(client, test::hello_unmasked);
        REQUIRE(client.received.size() > 4);
        CHECK(test::to_hex(client.received.substr(0, 1)) == "88");
        CHECK(test::to_hex(client.received.substr(2, 2)) == "03 ea");
    }
}

TEST_CASE("a refusal arrives although the peer still sends") {
    EchoServer running(with_long_linger());
    for (int round = 0; round < 20; ++round) {
        RawClient client(running.port());
        send_and_continue(client, "GET / HTTP/1.1\r\n\r\n");
        CHECK(is_refusal(client.received, 400));
    }
}

TEST_CASE("after its last byte the server reads at most linger_bytes") {
    Limits limits;
    limits.linger_timeout = 1h;
    limits.linger_bytes = 64 * 1024;
    EchoServer running(with_limits(limits));
    RawClient client(running.port());
    const std::string nonsense = "nonsense\r\n\r\n", piece(16 * 1024, 'x');
    const std::string_view pieces[] = {piece};
    client.send(nonsense);
    CHECK(client.read_to_end());
    CHECK(running.metrics().connections_open == 1);
    const std::uint64_t before = running.metrics().bytes_received;
    while (running.metrics().bytes_received <= before + limits.linger_bytes) client.send(piece);
    while (client.socket().send(pieces, 1).outcome == IoResult::Outcome::done) continue;
    const std::uint64_t read = running.metrics().bytes_received;
    for (int turn = 0; turn < 100; ++turn) running.on_loop([] {});
    CHECK(running.metrics().bytes_received == read);
    CHECK(running.metrics().connections_open == 1);
    running.stop(0ms);
}

TEST_CASE("after its last byte the server reads for at most linger_timeout") {
    Limits limits;
    limits.linger_timeout = 30ms;
    EchoServer running(with_limits(limits));
    RawClient refused(running.port()), closed(running.port());
    refused.send("nonsense\r\n\r\n");
    closed.send(upgrade_request() + hex("88 80 00 00 00 00"));
    CHECK(refused.read_to_end());
    CHECK(closed.read_to_end());
    // The client has not closed its sockets.
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
}

TEST_CASE("the connection of a peer that closes properly ends before any timeout") {
    Limits limits;
    limits.linger_timeout = limits.closing_timeout = 1h;
    EchoServer running(with_limits(limits));
    WsClient client(running.port());
    client.close();
    CHECK(client.close_code() == CloseCode::normal);
    client.raw.close();
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.metrics().closed.at(CloseCause::peer) == 1);
}

// ---- backpressure ---------------------------------------------------------------------------------------------------

TEST_CASE("in a room of twenty a member that does not read is closed, and the others get every message") {
    // FAULTS 26
    Limits limits;
    limits.max_backlog = 256 * 1024;
    limits.ping_interval = 0s;  // on a slow machine, an unanswered ping would close the member first
    HandlerServer<LobbyMember> running(with_limits(limits));
    RawClient slow = slow_reader(running.port());
    std::vector<std::unique_ptr<WsClient>> members;
    for (int i = 0; i < 19; ++i) members.push_back(std::make_unique<WsClient>(running.port()));
    REQUIRE(running.eventually([&] { return running.server.rooms()["lobby"].size() == 20; }));
    const std::string message(64 * 1024, 'x');
    int sent = 0;
    const auto closed = [&] { return running.metrics().closed.at(CloseCause::backlog); };
    for (; sent < 1000 && closed() == 0; ++sent) {
        members[0]->send(message);
        for (auto& member : members) REQUIRE(member->next().value_or("nothing").size() == message.size());
    }
    CHECK(closed() == 1);
    CHECK(running.metrics().websockets_open == 19);
    members[0]->send("after");
    for (auto& member : members) CHECK(member->next() == "after");
    // The slow member still gets what was queued, and then the reason.
    CHECK(slow.read_to_end());
    CHECK_FALSE(slow.reset_by_peer);
    CHECK(contains(slow.received, hex("03 f0") + "the peer reads too slowly"));
}

TEST_CASE("above max_total_backlog the connection with the largest backlog is closed, and the others stay open") {
    Limits limits;
    ServerLimits server_limits;
    limits.max_backlog = 64 * 1024 * 1024;
    limits.ping_interval = 0s;
    server_limits.max_total_backlog = 8 * 1024 * 1024;
    HandlerServer<Flood> running(with_limits(limits, server_limits));
    RawClient small = slow_reader(running.port()), large = slow_reader(running.port());
    const std::size_t some = 4 * 1024 * 1024, much = 32 * 1024 * 1024;
    small.send(masked_text(std::to_string(some)));
    REQUIRE(running.eventually([&] { return running.server.metrics().messages_sent == some / (64 * 1024); }));
    large.send(masked_text(std::to_string(much)));
    REQUIRE(running.eventually([&] { return running.server.metrics().closed.at(CloseCause::backlog) == 1; }));
    CHECK(large.read_to_end());
    CHECK(large.received.size() < much);
    CHECK(running.metrics().websockets_open == 1);
    CHECK(running.metrics().backlog_bytes <= server_limits.max_total_backlog);
    CHECK(small.read_at_least(some));
}

// ---- descriptors ----------------------------------------------------------------------------------------------------

TEST_CASE("without free descriptors the server does not spin, serves its connections, and accepts again later") {
    // FAULTS 29. The server runs in a child process with few descriptors.
    ServerProcess process([](int) {
        ServerOptions options;
        options.server_limits.max_connections = 1000;
        auto server = listening_echo_server(options);
        // UndefinedBehaviorSanitizer opens a pipe when it checks a type for the first time. It has now seen that of errors.
        static_cast<void>(os::error_text(EMFILE));
        const int next = ::dup(0);
        ::close(next);
        limit_descriptors(static_cast<rlim_t>(next) + 20);
        return server;
    });
    const int port = process.port();

    WsClient connected(port);
    CHECK(connected.is_open());
    const Time begin = Clock::now();
    {
        // About twenty fit. The server rejects the others one by one, with a pause after each.
        std::vector<RawClient> crowd;
        for (int i = 0; i < 40; ++i) crowd.emplace_back(port);
        int rejected = 0;
        while (rejected < 10) {
            std::vector<pollfd> entries;
            for (RawClient& client : crowd) entries.push_back({client.socket().descriptor(), POLLIN, 0});
            REQUIRE(::poll(entries.data(), entries.size(), milliseconds(test::deadline)) > 0);
            for (std::size_t i = entries.size(); i-- > 0;) {
                if (entries[i].revents == 0) continue;
                // A TLS listener closes without an answer.
                if (crowd[i].read_to_end() && (test::over_tls() || contains(crowd[i].received, "HTTP/1.1 503 ")))
                    ++rejected;
                crowd.erase(crowd.begin() + static_cast<std::ptrdiff_t>(i));
            }
            connected.send("hello");
            REQUIRE(connected.next() == "hello");
        }
    }
    const Duration crowded = Clock::now() - begin;
    CHECK(WsClient(port).is_open());
    connected.send("hello");
    CHECK(connected.next() == "hello");
    connected.raw.close();

    rusage used{};
    const int status = process.terminate(used);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    const Duration busy = std::chrono::seconds(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                          std::chrono::microseconds(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    CHECK(busy < crowded / 2);
}

TEST_CASE("hundreds of connects and closes of every kind release all descriptors and memory") {
    // FAULTS 32
    RunningServer running;
    running.server.route<LobbyMember>("/");
    running.server.get("/", [](const Request&) { return Response(200, "hello"); });
    running.start();
    running.on_loop([] {});
    const std::size_t before = open_descriptors();
    for (int i = 0; i < 500; ++i) {
        RawClient client(running.port());
        if (i % 5 == 1) client.send("GET / HT");
        if (i % 5 == 2) client.send(request("/"));
        if (i % 5 == 3) client.send(upgrade_request() + masked_text("hello"));
        if (i % 5 == 4) client.send(upgrade_request() + hex("88 80 00 00 00 00"));
        if (i % 3 == 0) client.reset();
    }
    {
        // When the last client is open, all connections before it have been accepted.
        WsClient last(running.port());
        CHECK(last.is_open());
    }
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(open_descriptors() == before);
    const Metrics metrics = running.metrics();
    CHECK(metrics.websockets_open == 0);
    CHECK(metrics.backlog_bytes == 0);
    CHECK(metrics.rooms == 0);
    CHECK(WsClient(running.port()).is_open());
}

TEST_CASE("every descriptor of a server is close-on-exec") {
    // FAULTS 40
    const std::vector<int> before = inheritable_descriptors();
    const TemporaryFile file("exec.bin", test::large_content());
    {
        RunningServer running;
        running.server.route<LobbyMember>("/");
        running.server.file("/file", file.path);
        test::listen(running.server);
        test::listen(running.server, "unix:" + temporary_path("exec.sock"));
        running.run();
        WsClient client(running.port());
        RawClient silent(running.port()), reader(running.port());
        reader.send(request("/file"));
        CHECK(reader.read_at_least(1000));  // the server keeps the file open while the client does not read
        CHECK(inheritable_descriptors() == before);
    }
}

TEST_CASE("system calls that a signal interrupts are repeated") {
    // FAULTS 33
    SignalAction nothing{}, before{};
    nothing.sa_handler = [](int) {};  // without SA_RESTART
    REQUIRE(::sigaction(SIGUSR1, &nothing, &before) == 0);
    {
        EchoServer running;
        const pthread_t thread = running.on_loop([] { return ::pthread_self(); });
        std::atomic<bool> interrupting{true};
        std::thread interrupter([&] {
            while (interrupting) {
                ::pthread_kill(thread, SIGUSR1);
                std::this_thread::sleep_for(50us);
            }
        });
        const std::string large(300'000, 'x');
        int answered = 0;
        for (int i = 0; i < 20; ++i) {
            WsClient client(running.port());
            client.send(large);
            if (client.next() == large) ++answered;
        }
        interrupting = false;
        interrupter.join();
        CHECK(answered == 20);
    }
    ::sigaction(SIGUSR1, &before, nullptr);
}

TEST_CASE("the loop ignores events of connections that ended in the same batch") {
    // FAULTS 31. While the loop is blocked, the clients send, and two signals arrive. The second signal aborts them all.
    ServerOptions options;
    options.poller = test::poller_kind();
    Server server(options);
    server.route<LobbyMember>("/");
    test::listen(server);
    std::thread runner([&] { server.run(); });
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 30; ++i) clients.push_back(std::make_unique<WsClient>(server.port()));
    BlockedLoop blocked(server);
    for (std::size_t i = 0; i < clients.size(); ++i) {
        if (i == clients.size() / 2) {
            std::raise(SIGTERM);
            std::raise(SIGTERM);
        }
        if (i % 3 == 0) clients[i]->raw.reset();
        else clients[i]->send("hello");
    }
    blocked.release();
    runner.join();
    for (std::size_t i = 0; i < clients.size(); ++i)
        if (i % 3 != 0) CHECK(clients[i]->raw.read_to_end());
}

TEST_CASE("a server does not change SIGPIPE, and a closed peer raises no signal") {
    static volatile std::sig_atomic_t raised;
    raised = 0;
    SignalAction count{}, before{};
    count.sa_handler = [](int) { raised = raised + 1; };
    REQUIRE(::sigaction(SIGPIPE, &count, &before) == 0);
    {
        HandlerServer<Flood> running;
        for (int i = 0; i < 20; ++i) {
            RawClient client(running.port());
            client.send(upgrade_request() + masked_text("1000000"));
            if (i % 2 == 0) client.reset();
        }
        CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    }
    SignalAction after{};
    ::sigaction(SIGPIPE, &before, &after);
    CHECK(raised == 0);
    CHECK((after.sa_handler == count.sa_handler));
}

TEST_CASE("while 32 refusals linger, the next connection is closed without an answer") {
    Limits limits;
    ServerLimits server_limits;
    server_limits.max_connections = 1;
    limits.linger_timeout = 1h;  // a refused connection stays until its client closes it
    EchoServer running(with_limits(limits, server_limits));
    WsClient member(running.port());
    REQUIRE(member.is_open());
    std::vector<RawClient> crowd;
    for (int i = 0; i < 32; ++i) {
        crowd.emplace_back(running.port());
        REQUIRE(crowd.back().read_to_end());
        CHECK(is_refusal(crowd.back().received, 503));
    }
    RawClient late(running.port());
    CHECK(late.read_to_end());
    CHECK(late.received == "");
    CHECK(running.metrics().connections_refused == 33);
    crowd.clear();
    REQUIRE(running.eventually([&] { return running.server.metrics().connections_open == 1; }));
    RawClient next(running.port());
    CHECK(next.read_to_end());
    CHECK(is_refusal(next.received, 503));
    member.send("hello");
    CHECK(member.next() == "hello");
}

TEST_CASE("with few descriptors half of them are for connections, and the next connection gets a 503") {
    const ServerProcess process([](int) {
        limit_descriptors(100);
        return listening_echo_server({});
    });
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 50; ++i) clients.push_back(std::make_unique<WsClient>(process.port()));
    CHECK(std::all_of(clients.begin(), clients.end(), [](const auto& client) { return client->is_open(); }));
    RawClient refused(process.port());
    CHECK(refused.read_to_end());
    CHECK(is_refusal(refused.received, 503));
    CHECK(contains(refused.received, "There are too many connections."));
}

TEST_SUITE_END();
