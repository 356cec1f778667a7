// Sessions over a transport that the test controls: input that the poller does not report, and sends that fail.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;
using test::WsClient;

namespace {

// No encryption. It buffers input as TLS does, and can fail.
struct FakeTransport : Transport {
    struct Behavior {
        std::size_t buffered = 0, piece = 64 * 1024;  // bytes that one receive() buffers and returns; 0: no buffer
        bool fail_second_send = false;                // after a part of the output
        bool end_throws = false;
        std::atomic<bool>* hold = nullptr;  // sends nothing while it is true
    };
    explicit FakeTransport(const Behavior& its_behavior) : behavior(its_behavior) {}
    IoResult receive(Socket& socket, char* data, std::size_t size, WireCount&) override {
        if (behavior.buffered == 0) return socket.receive(data, size);
        if (stored.empty()) {
            char bytes[64 * 1024];
            const IoResult got = socket.receive(bytes, behavior.buffered);
            if (got.outcome != IoResult::Outcome::done) return got;
            stored.assign(bytes, got.size);
        }
        const std::size_t n = (std::min)({size, behavior.piece, stored.size()});
        std::memcpy(data, stored.data(), n);
        stored.erase(0, n);
        return {IoResult::Outcome::done, n};
    }
    IoResult send(Socket& socket, const std::string_view* pieces, std::size_t count, WireCount&) override {
        std::size_t size = 0;
        for (std::size_t i = 0; i < count; ++i) size += pieces[i].size();
        blocked = behavior.hold != nullptr && *behavior.hold;
        if (blocked) return {IoResult::Outcome::would_block};
        if (behavior.fail_second_send && size > 1000) return {IoResult::Outcome::error, 500, ECONNRESET};
        const IoResult sent = socket.send(pieces, count);
        blocked = sent.size < size;
        return sent;
    }
    bool has_input() const override { return !stored.empty(); }
    bool wants_write() const override { return blocked; }
    bool established() const override { return true; }
    bool end(Socket&, WireCount&) override {
        if (behavior.end_throws) throw std::bad_alloc();
        return true;
    }
    const std::string& failure() const override { return text; }
    bool plain_text() const override { return false; }
    std::string peer_name() const override { return {}; }

    const Behavior behavior;
    std::string stored, text;
    bool blocked = false;
};

struct FakeFactory : TransportFactory {
    explicit FakeFactory(const FakeTransport::Behavior& its_behavior) : behavior(its_behavior) {}
    std::unique_ptr<Transport> make() override { return std::make_unique<FakeTransport>(behavior); }
    std::unique_ptr<TransportFactory> clone() const override { return std::make_unique<FakeFactory>(behavior); }
    void reload() override {}
    const FakeTransport::Behavior behavior;
};

struct WorkerThread {
    WorkerThread(const FakeTransport::Behavior& behavior, Route::Factory factory, const Limits& limits = {}) {
        options.limits = limits;
        site.routes.add("route", Pattern("route", "/"), std::move(factory));
        worker.listen({std::make_shared<ListenSocket>(ListenAddress::parse("0"), false),
                       std::make_shared<FakeFactory>(behavior), false});
        port = worker.listeners().front().address().port;
        thread = std::thread([this] { worker.loop.run(); });
    }
    ~WorkerThread() {
        stop();
        worker.close();
    }
    void stop() {
        if (!thread.joinable()) return;
        worker.loop.post([this] { worker.loop.stop(); });
        thread.join();
    }
    Server server;
    ServerOptions options;
    Site site;
    LoopLoads loads{1};
    Worker worker{server, options, site, loads};
    std::thread thread;
    int port = 0;
};

struct Seen {
    std::atomic<int> closes{0};
    CloseCode code{};
    std::size_t buffered = 0, backlog = 0;
};

}  // namespace

TEST_SUITE_BEGIN("server");

TEST_CASE("a session that pauses and is closed in the turn in which it continues still reads the answer") {
    if (test::over_tls()) return;  // the transport is not TLS
    struct Handler : WebSocketHandler {
        explicit Handler(Seen& its_seen) : seen(its_seen) {}
        void on_message(const Message&) override {
            if (++messages != 5) return;  // the first one of its second turn
            write_binary(std::string(16 * 1024 * 1024, 'x'));
            ref().post([](WebSocketHandler& self) { self.close(); });
        }
        void on_close() override {
            seen.code = close_code();
            ++seen.closes;
        }
        Seen& seen;
        int messages = 0;
    };
    Seen seen;
    Limits limits;
    limits.closing_timeout = std::chrono::seconds(5);
    const std::string frame = test::masked_text("x");
    FakeTransport::Behavior behavior;
    behavior.buffered = 5 * frame.size();
    behavior.piece = frame.size();
    WorkerThread running(
        behavior, [&] { return std::make_unique<Handler>(seen); }, limits);
    WsClient client(running.port);
    REQUIRE(client.is_open());
    client.raw.send(test::repeated(20, frame));
    CHECK(client.close_code() == CloseCode::normal);
    CHECK(test::eventually([&] { return seen.closes == 1; }));
    CHECK(seen.code == CloseCode::normal);
}

TEST_CASE("a send that fails after a part of the output does not change the counts of queued bytes") {
    if (test::over_tls()) return;  // the transport is not TLS
    struct Handler : WebSocketHandler {
        Handler(Seen& its_seen, WorkerThread*& its_running) : seen(its_seen), running(its_running) {}
        void on_message(const Message&) override {
            for (int i = 0; i < 20; ++i) write_message(std::string(100, 'x'));
        }
        void on_close() override {
            seen.buffered = buffered_amount();
            seen.backlog = running->worker.backlog;
            ++seen.closes;
        }
        Seen& seen;
        WorkerThread*& running;
    };
    Seen seen;
    WorkerThread* pointer = nullptr;
    FakeTransport::Behavior behavior;
    behavior.fail_second_send = true;
    WorkerThread running(behavior, [&] { return std::make_unique<Handler>(seen, pointer); });
    pointer = &running;
    WsClient client(running.port);
    REQUIRE(client.is_open());
    client.send("x");
    CHECK(test::eventually([&] { return seen.closes == 1; }));
    CHECK(seen.buffered == 0);
    CHECK(seen.backlog == 0);
    running.stop();
    CHECK(running.worker.backlog == 0);
}

TEST_CASE("a transport that throws at the end does not keep its session") {
    if (test::over_tls()) return;  // the transport is not TLS
    FakeTransport::Behavior behavior;
    behavior.end_throws = true;
    WorkerThread running(behavior, [] { return std::make_unique<test::Echo>(); });
    {
        WsClient client(running.port);
        REQUIRE(client.is_open());
        client.raw.close();
    }
    const auto open = [&] {
        std::atomic<int> count{-1};
        running.worker.loop.post([&] { count = running.worker.idle() ? 0 : 1; });
        while (count == -1) std::this_thread::yield();
        return static_cast<int>(count);
    };
    CHECK(test::eventually([&] { return open() == 0; }));
    running.stop();
}

TEST_CASE("all messages of a peer that hangs up at once are delivered, also over a Unix socket") {
    // A Unix socket whose peer has closed is broken at once, while a part of the input is kept for the next turn.
    struct Handler : WebSocketHandler {
        Handler(std::atomic<int>& its_messages, std::atomic<int>& its_closes)
            : messages(its_messages), closes(its_closes) {}
        void on_message(const Message&) override { ++messages; }
        void on_close() override { ++closes; }
        std::atomic<int>&messages, &closes;
    };
    std::atomic<int> messages{0}, closes{0};
    test::RunningServer running;
    running.server.add_route("/", [&] { return std::make_unique<Handler>(messages, closes); });
    const std::string path = test::temporary_path("hangs-up.sock");
    running.server.listen("unix:" + path);
    running.run();
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size());
    REQUIRE(::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    os::make_nonblocking(socket.descriptor());
    test::RawClient client(std::move(socket), nullptr);
    client.send(test::upgrade_request());
    REQUIRE(client.read_until("\r\n\r\n"));
    {
        test::BlockedLoop blocked(running.server);
        client.send(test::repeated(2000, test::masked_text("x")));
        client.close();
    }
    CHECK(test::eventually([&] { return closes == 1; }));
    CHECK(messages == 2000);
}

TEST_CASE("input that arrives while the last answer is being sent is not a request") {
    std::atomic<bool> hold{true}, released{false};
    FakeTransport::Behavior behavior;
    behavior.hold = &hold;
    WorkerThread running(behavior, [] { return std::make_unique<test::Echo>(); });
    test::RawClient client = test::RawClient::plain(running.port);
    client.send("GET /first HTTP/1.0\r\n\r\n");
    const auto requests = [&] {
        std::atomic<int> count{-1};
        running.worker.loop.post([&] { count = static_cast<int>(running.worker.metrics.requests); });
        while (count == -1) std::this_thread::yield();
        return static_cast<int>(count);
    };
    REQUIRE(test::eventually([&] { return requests() == 1; }));
    running.worker.loop.post([&] {
        while (!released) std::this_thread::yield();
    });
    client.send(test::request("/second"));
    hold = false;
    released = true;
    CHECK(client.read_to_end());
    CHECK(requests() == 1);
    CHECK(client.received.rfind("HTTP/1.1 ") == 0);
    running.stop();
}

#if WSCHAT_OPENSSL
TEST_CASE("close_notify that arrives together with a request ends the connection after the answer") {
    // A client that waits for the server's close_notify, as unwrap() of Python does, sends no FIN before.
    test::RunningServer running(test::with_handshake_timeout(std::chrono::hours(1)));
    running.server.get("/", [](const Request&) { return Response(200, "answer"); });
    test::listen_tls(running.server, "0");
    running.run();
    test::RawClient plain = test::RawClient::plain(running.port());
    test::RawClient client(std::move(plain.socket()), test::client_transport());
    client.send(test::request("/"));
    REQUIRE(client.read_until("answer"));
    {
        test::BlockedLoop blocked(running.server);
        client.socket().set_option(IPPROTO_TCP, TCP_CORK, 1);  // both in one segment
        client.send(test::request("/"));
        client.transport()->end(client.socket(), client.wire);
        client.socket().set_option(IPPROTO_TCP, TCP_CORK, 0);
    }
    client.received.clear();
    CHECK(client.read_to_end());
    CHECK(test::contains(client.received, "answer"));
}
#endif

TEST_CASE("bodies of all sizes around the buffers reach a client that pipelines its requests and reads late") {
    test::RunningServer running(test::without_pings());
    running.server.get("/large", [](const Request&) { return Response(200, test::more_than_kernel_takes()); });
    running.server.get("/{size}", [](const Request& request) {
        return Response(200, test::bytes_of_size(std::stoul(std::string(request.param("size")))));
    });
    running.start();
    test::RawClient client(running.port());
    client.send(test::request("/large"));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes > 64 * 1024; }));
    std::string requests;
    for (const std::size_t size : test::sizes_around_buffers()) requests += test::request("/" + std::to_string(size));
    client.send(requests);
    CHECK((test::next_answer(client).body == test::more_than_kernel_takes()));
    for (const std::size_t size : test::sizes_around_buffers()) {
        CAPTURE(size);
        REQUIRE((test::next_answer(client).body == test::bytes_of_size(size)));
    }
}

TEST_SUITE_END();
