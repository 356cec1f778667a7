// Each limit of section 2 on a running server: a peer is served up to the limit and refused past it, and the metrics
// count the refusal. The suites "http" and "protocol" test the limits of the parsers alone.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::Echo;
using test::EchoServer;
using test::fetch;
using test::HandlerServer;
using test::masked_frame;
using test::RawClient;
using test::request;
using test::RunningServer;
using test::ServerProcess;
using test::with_limits;
using test::with_server_limits;
using test::WsClient;

namespace {

// Calls a function of the test for each message.
struct CallOnMessage : WebSocketHandler {
    using Work = std::function<void(WebSocketHandler&)>;
    explicit CallOnMessage(Work& of_test) : work(of_test) {}
    void on_message(const Message&) override { work(*this); }
    Work& work;
};

// ---- input ----------------------------------------------------------------------------------------------------------

std::string status_of_page(int port, const std::string& head) {
    RawClient client(port);
    client.send(head);
    return client.read_until("\r\n\r\n") ? client.received.substr(9, 3) : "nothing";
}

std::string request_line(int port, std::size_t size) {
    return status_of_page(port, "GET /" + std::string(size - 14, 'x') + " HTTP/1.1\r\nHost: x\r\n\r\n");
}
std::string header_bytes(int port, std::size_t size) {
    return status_of_page(port, "GET /x HTTP/1.1\r\nHost: x\r\nX: " + std::string(size - 14, 'x') + "\r\n\r\n");
}
std::string header_fields(int port, std::size_t count) {
    std::string fields = "Host: x\r\n";
    while (--count != 0) fields += "X: x\r\n";
    return status_of_page(port, "GET /x HTTP/1.1\r\n" + fields + "\r\n");
}

// "served" if all answers arrive, and otherwise the close code.
std::string answers_of(WsClient& client, Event::Kind kind, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i)
        if (!client.next(kind)) return std::to_string(number(client.connection.close_code()));
    return "served";
}

std::string message(int port, std::size_t size) {
    WsClient client(port);
    client.send(std::string(size, 'x'));
    return answers_of(client, Event::Kind::message, 1);
}
// One message in two frames.
std::string two_fragments(int port, std::size_t size) {
    WsClient client(port);
    client.raw.send(masked_frame("01", std::string(size / 2, 'x')));
    client.raw.send(masked_frame("80", std::string(size - size / 2, 'x')));
    return answers_of(client, Event::Kind::message, 1);
}
std::string empty_fragments(int port, std::size_t count) {
    WsClient client(port);
    std::string frames;
    for (std::size_t i = 1; i <= count; ++i) frames += masked_frame(i == 1 ? "01" : i < count ? "00" : "80", "");
    client.raw.send(frames);
    return answers_of(client, Event::Kind::message, 1);
}
// In one piece, because the limit is a rate.
std::string pings(int port, std::size_t count) {
    WsClient client(port);
    for (std::size_t i = 0; i < count; ++i) client.connection.send_control(Opcode::ping, "");
    client.flush();
    return answers_of(client, Event::Kind::pong, count);
}

struct InputLimit {
    std::string name;
    std::size_t limit;
    void (*set)(Limits&, std::size_t);
    std::string (*reach)(int port, std::size_t size);
    std::string served;
    std::string refused;
};

const InputLimit input_limits[] = {
    {"max_request_line", 60, [](Limits& l, std::size_t n) { l.max_request_line = n; }, &request_line, "200", "414"},
    {"max_header_bytes", 300, [](Limits& l, std::size_t n) { l.max_header_bytes = n; }, &header_bytes, "200", "431"},
    {"max_header_fields", 7, [](Limits& l, std::size_t n) { l.max_header_fields = n; }, &header_fields, "200", "431"},
    {"max_message_size", 100, [](Limits& l, std::size_t n) { l.max_message_size = n; }, &message, "served", "1009"},
    {"max_message_size", 100, [](Limits& l, std::size_t n) { l.max_message_size = n; }, &two_fragments, "served",
     "1009"},
    {"max_fragments", 5, [](Limits& l, std::size_t n) { l.max_fragments = n; }, &empty_fragments, "served", "1008"},
    {"control_frames_burst", 9,
     [](Limits& l, std::size_t n) {
         l.control_frames_burst = static_cast<unsigned>(n);
         l.control_frames_per_second = 1;
     },
     &pings, "served", "1008"},
};

// The number of such answers in the metrics.
std::uint64_t refusals(const Metrics& metrics, const std::string& answer) {
    const int code = std::stoi(answer);
    if (code < 1000) return metrics.responses.at(code);
    CHECK(metrics.closed.at(CloseCause::protocol_error) ==
          metrics.close_codes.at(CloseCode::policy_violation) + metrics.close_codes.at(CloseCode::message_too_big));
    return metrics.close_codes.at(static_cast<CloseCode>(code));
}

// ---- backlog --------------------------------------------------------------------------------------------------------

// Makes a backlog of that many bytes: first the kernel takes no more, then one message fills the rest. Returns the
// status of that message.
WriteStatus make_backlog(WebSocketHandler& self, std::size_t size) {
    const std::string piece(64 * 1024, 'x');
    while (self.buffered_amount() == 0) self.write_message(piece);
    constexpr std::size_t header = 10;  // of a frame of more than 64 KiB
    REQUIRE(self.buffered_amount() + header + piece.size() < size);
    return self.write_message(std::string(size - self.buffered_amount() - header, 'y'));
}

// A client with a small receive window.
struct SlowClient : WsClient {
    explicit SlowClient(int port) : WsClient(port) { raw.socket().set_option(SOL_SOCKET, SO_RCVBUF, 4096); }
};

// A server in a process with that limit of descriptors. Only `report` of the inherited ones stays open.
std::unique_ptr<Server> server_with_descriptors(rlim_t limit, int report) {
    for (int descriptor = 3; descriptor < 1024; ++descriptor)
        if (descriptor != report) ::close(descriptor);
    const rlimit few{limit, limit};
    ::setrlimit(RLIMIT_NOFILE, &few);
    ServerOptions options;
    options.poller = test::poller_kind();
    auto server = std::make_unique<Server>(options);
    server->get("/x", [](const Request&) { return Response(200, "x"); });
    server->listen(0);
    return server;
}

}  // namespace

TEST_SUITE_BEGIN("limits");

TEST_CASE("input is served up to each limit, and above the limit it is refused and counted") {
    for (const InputLimit& row : input_limits) {
        Limits limits;
        row.set(limits, row.limit);
        RunningServer running(with_limits(limits));
        running.server.route<Echo>("/");
        running.server.get("/{name}", [](const Request&) { return Response(200, "x"); });
        running.start();
        CAPTURE(row.name);
        CHECK(row.reach(running.port(), row.limit - 1) == row.served);
        CHECK(row.reach(running.port(), row.limit) == row.served);
        CHECK(refusals(running.metrics(), row.refused) == 0);
        CHECK(row.reach(running.port(), row.limit + 1) == row.refused);
        CHECK(refusals(running.metrics(), row.refused) == 1);
    }
}

TEST_CASE("each limit of a route applies to the connections of the route") {
    RunningServer running;
    Limits limits = running.server.limits();
    for (const InputLimit& row : input_limits)
        if (row.served == "served") row.set(limits, row.limit);
    running.server.route<Echo>("/").set_limits(limits);
    running.start();
    for (const InputLimit& row : input_limits) {
        if (row.served != "served") continue;
        CAPTURE(row.name);
        const std::uint64_t before = refusals(running.metrics(), row.refused);
        CHECK(row.reach(running.port(), row.limit) == "served");
        CHECK(row.reach(running.port(), row.limit + 1) == row.refused);
        CHECK(refusals(running.metrics(), row.refused) == before + 1);
    }
}

TEST_CASE("a backlog can reach its limit, and the next message is dropped or closes the connection") {
    const test::OneLoop one_loop;
    Limits limits;
    limits.max_backlog = 300'000;
    for (const BacklogPolicy policy : {BacklogPolicy::close, BacklogPolicy::drop})
        for (const std::size_t size : {limits.max_backlog - 1, limits.max_backlog, limits.max_backlog + 1}) {
            const bool fits = size <= limits.max_backlog, drops = policy == BacklogPolicy::drop;
            CAPTURE(size);
            CAPTURE(drops);
            limits.backlog_policy = policy;
            WriteStatus status = WriteStatus::sent;
            CallOnMessage::Work work = [&](WebSocketHandler& self) { status = make_backlog(self, size); };
            HandlerServer<CallOnMessage> running(with_limits(limits), std::ref(work));
            SlowClient slow(running.port());
            slow.send("go");
            REQUIRE(running.eventually([&] { return status != WriteStatus::sent; }));
            const Metrics metrics = running.metrics();
            CHECK(status == (fits ? WriteStatus::queued : drops ? WriteStatus::dropped : WriteStatus::closed));
            CHECK(metrics.messages_dropped == (!fits && drops ? 1 : 0));
            CHECK(metrics.closed.at(CloseCause::backlog) == (!fits && !drops ? 1 : 0));
            CHECK(metrics.close_codes.at(CloseCode::policy_violation) == (!fits && !drops ? 1 : 0));
        }
}

TEST_CASE("all backlogs together can reach their limit, and above it the largest connection is closed") {
    const test::OneLoop one_loop;
    Limits limits;
    ServerLimits server_limits;
    limits.max_backlog = 100'000'000;
    server_limits.max_total_backlog = 300'000;
    for (const std::size_t size :
         {server_limits.max_total_backlog - 1, server_limits.max_total_backlog, server_limits.max_total_backlog + 1}) {
        const bool fits = size <= server_limits.max_total_backlog;
        CAPTURE(size);
        bool done = false;
        Metrics after;
        CallOnMessage::Work work = [&](WebSocketHandler& self) {
            make_backlog(self, size);
            // Work that is posted now runs in this turn. Work that it posts runs in the next turn.
            self.loop().post([&loop = self.loop(), &server = self.server(), &after, &done] {
                loop.post([&] {
                    after = server.metrics();
                    done = true;
                });
            });
        };
        HandlerServer<CallOnMessage> running(with_limits(limits, server_limits), std::ref(work));
        SlowClient slow(running.port());
        slow.send("go");
        REQUIRE(running.eventually([&] { return done; }));
        CHECK(after.closed.at(CloseCause::backlog) == (fits ? 0 : 1));
        CHECK(after.websockets_open == (fits ? 1 : 0));
        // The kernel can have taken a little more by then.
        CHECK(after.backlog_bytes <= size);
        CHECK((after.backlog_bytes != 0) == fits);
    }
}

TEST_CASE("an unfinished message counts towards the limit of all backlogs together") {
    ServerLimits server_limits;
    server_limits.max_total_backlog = 420'000;
    EchoServer running(with_server_limits(server_limits));
    WsClient half(running.port()), most(running.port());
    // The frames announce 300,000 and 900,000 bytes. A buffer grows to at most twice the received bytes,
    // and TLS holds a part of a record.
    half.raw.send(test::hex("82 ff 00 00 00 00 00 04 93 e0 00 00 00 00") + std::string(100'000, 'x'));
    REQUIRE(running.eventually([&] { return running.server.metrics().backlog_bytes >= 100'000; }));
    CHECK(running.metrics().websockets_open == 2);
    most.raw.send(test::hex("82 ff 00 00 00 00 00 0d bb a0 00 00 00 00") + std::string(450'000, 'x'));
    REQUIRE(running.eventually([&] { return running.server.metrics().websockets_open == 1; }));
    CHECK(running.metrics().closed.at(CloseCause::backlog) == 1);
    CHECK(most.raw.read_to_end());
    half.raw.send(std::string(200'000, 'x'));
    CHECK(half.next().value_or("nothing").size() == 300'000);
}

// ---- connections ----------------------------------------------------------------------------------------------------

TEST_CASE("connections past max_connections or max_connections_per_address are counted as refused") {
    for (const bool of_address : {false, true}) {
        CAPTURE(of_address);
        ServerLimits server_limits;
        (of_address ? server_limits.max_connections_per_address : server_limits.max_connections) = 3;
        EchoServer running(with_server_limits(server_limits));
        std::vector<std::unique_ptr<WsClient>> clients;
        for (int i = 0; i < 3; ++i) {
            clients.push_back(std::make_unique<WsClient>(running.port()));
            CHECK(clients.back()->is_open());
        }
        CHECK(running.metrics().connections_refused == 0);
        for (const std::uint64_t refused : {1u, 2u}) {
            RawClient client(running.port());
            CHECK(client.read_to_end());
            CHECK(client.received.substr(0, 12) == "HTTP/1.1 503");
            CHECK(running.metrics().connections_refused == refused);
            CHECK(running.metrics().responses.at(503) == refused);
        }
        CHECK(running.metrics().connections_accepted == 5);
    }
}

TEST_CASE("above max_connections 32 refusals at once get an answer, and the others are only closed and counted") {
    Limits limits;
    ServerLimits server_limits;
    server_limits.max_connections = 1;
    limits.linger_timeout = 1h;
    EchoServer running(with_limits(limits, server_limits));
    WsClient one(running.port());
    std::vector<RawClient> refused;
    for (int i = 0; i < 32; ++i) {
        refused.emplace_back(running.port());
        CHECK(refused.back().read_until("There are too many connections.\n"));
    }
    for (const std::uint64_t more : {1u, 2u}) {
        RawClient closed(running.port());
        CHECK(closed.read_to_end());
        CHECK(closed.received == "");
        CHECK(running.metrics().connections_refused == 32 + more);
        CHECK(running.metrics().responses.at(503) == 32);
    }
    CHECK(running.metrics().connections_open == 33);
    one.send("hello");
    CHECK(one.next() == "hello");
    refused.clear();
    running.stop(0ms);
}

TEST_CASE("the default of max_connections is the descriptor limit minus 64, or half of a small limit") {
    const struct {
        rlim_t descriptors;
        std::size_t connections;
    } table[] = {{60, 30}, {128, 64}, {129, 65}, {160, 96}};
    for (const auto& row : table) {
        CAPTURE(row.descriptors);
        const ServerProcess process([&](int report) { return server_with_descriptors(row.descriptors, report); });
        std::vector<RawClient> clients;
        for (std::size_t i = 0; i < row.connections; ++i)
            REQUIRE(clients.emplace_back(RawClient::plain(process.port())));
        clients.back().send(request("/x"));
        CHECK(clients.back().read_until("\r\n\r\n"));
        CHECK(clients.back().received.substr(0, 12) == "HTTP/1.1 200");
        RawClient refused = RawClient::plain(process.port());
        CHECK(refused.read_to_end());
        CHECK(refused.received.substr(0, 12) == "HTTP/1.1 503");
    }
}

// ---- lingering close ------------------------------------------------------------------------------------------------

TEST_CASE("after its last byte the server reads input up to linger_bytes") {
    Limits limits;
    limits.linger_timeout = 1h;
    limits.linger_bytes = 1000;
    RunningServer running(with_limits(limits));
    running.server.listen(0);
    running.run();
    for (const std::size_t size : {limits.linger_bytes - 1, limits.linger_bytes, limits.linger_bytes + 1}) {
        CAPTURE(size);
        RawClient client = RawClient::plain(running.port());
        client.send("nonsense\r\n\r\n");
        CHECK(client.read_to_end());
        const std::uint64_t read = running.metrics().bytes_received + size;
        client.send(std::string(size, 'x'));
        CHECK(running.eventually([&] { return running.server.metrics().bytes_received == read; }));
        client.send("x");
        if (size <= limits.linger_bytes)
            CHECK(running.eventually([&] { return running.server.metrics().bytes_received == read + 1; }));
        for (int turn = 0; turn < 100; ++turn) running.on_loop([] {});
        CHECK(running.metrics().bytes_received == read + (size <= limits.linger_bytes ? 1 : 0));
        client.reset();
        CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    }
}

// ---- times ----------------------------------------------------------------------------------------------------------

TEST_CASE("a WebSocket that ends at a timeout is counted by its cause") {
    struct Row {
        void (*set)(Limits&);
        std::string_view word;
        CloseCause cause;
    };
    const Row rows[] = {{[](Limits& l) { l.ping_interval = l.ping_timeout = 20ms; }, "", CloseCause::ping_timeout},
                        {[](Limits& l) { l.closing_timeout = 20ms; }, "close", CloseCause::closing_timeout}};
    for (const Row& row : rows) {
        CAPTURE(to_string(row.cause));
        Limits limits;
        row.set(limits);
        CallOnMessage::Work work = [](WebSocketHandler& self) { self.close(); };
        HandlerServer<CallOnMessage> running(with_limits(limits), std::ref(work));
        WsClient client(running.port());
        if (!row.word.empty()) client.send(row.word);
        CHECK(running.eventually([&] { return running.server.metrics().closed.at(row.cause) == 1; }));
        CHECK(running.metrics().close_codes.at(CloseCode::abnormal) == 1);
    }
}

TEST_CASE("a request that does not arrive in time is counted as a 408") {
    EchoServer running(test::with_handshake_timeout(20ms));
    // Tries again if the deadline passed before the byte arrived.
    std::uint64_t answered = 0;
    for (int attempt = 0; attempt < 100 && answered == 0; ++attempt) {
        RawClient half(running.port());
        half.send("G");
        CHECK(half.read_to_end());
        if (half.received.substr(0, 12) == "HTTP/1.1 408") ++answered;
    }
    CHECK(answered == 1);
    CHECK(running.metrics().responses.at(408) == answered);
}

// ---- origins and hosts ----------------------------------------------------------------------------------------------

TEST_CASE("a missing origin, a foreign origin and another host are counted by status") {
    ServerOptions options;
    options.require_origin = true;
    RunningServer running(options);
    running.server.route<Echo>("/");
    running.server.allow_hosts({"127.0.0.1"});
    running.start();
    const std::string own = "Origin: " + test::scheme() + "://127.0.0.1:" + std::to_string(running.port()) + "\r\n";
    CHECK(WsClient(running.port(), "/", own).is_open());
    CHECK(running.metrics().responses.at(403) == 0);
    CHECK_FALSE(WsClient(running.port()).is_open());
    CHECK(running.metrics().responses.at(403) == 1);
    CHECK_FALSE(WsClient(running.port(), "/", "Origin: https://elsewhere.example\r\n").is_open());
    CHECK(running.metrics().responses.at(403) == 2);
    CHECK(status_of_page(running.port(), "GET / HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n") == "421");
    CHECK(running.metrics().responses.at(421) == 1);
}

// ---- the log --------------------------------------------------------------------------------------------------------

TEST_CASE("the log reports a hundred entries at once") {
    std::size_t entries = 0;
    RunningServer running;
    running.server.on_log([&](const LogEntry& entry) { entries += entry.level == LogLevel::info ? 1 : 0; });
    running.server.route<Echo>("/");
    running.start();
    // A refused upgrade makes an entry of level info.
    for (int i = 0; i < 100; ++i) CHECK_FALSE(WsClient(running.port(), "/nowhere").is_open());
    CHECK(running.on_loop([&] { return entries; }) == 100);
    CHECK(running.metrics().log_entries_suppressed == 0);
}

TEST_CASE("with the smallest backlog, messages of all sizes around the buffers come back to a peer that reads late") {
    ServerOptions options = test::without_pings();
    options.limits.max_backlog = 1;
    RunningServer running(options);
    running.server.route<test::LateEcho>("/");
    running.start();
    WsClient client(running.port());
    CHECK(test::complaint_of_late_reader(running, client) == "");
}

TEST_SUITE_END();
