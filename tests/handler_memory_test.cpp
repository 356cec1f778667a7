// Section 14, tests without sockets: HandlerTest and TestServer, which tests of other programs use.
#include "support.hpp"

using namespace wschat;
using namespace std::chrono_literals;
using test::contains;
using test::error_of;

namespace {

using Texts = std::vector<std::string>;

// A chat with names and rooms.
class Chat : public WebSocketHandler {
public:
    std::optional<Response> prepare(const Request& request) override {
        if (!request.query("name")) return Response(401, "Who are you?\n");
        return std::nullopt;
    }
    void open() override {
        name_ = *request().query("name");
        room(request().param("room")).join(*this);
    }
    void on_message(const Message& m) override {
        if (m.text() == "throw") throw std::runtime_error("on purpose");
        if (m.text() == "leave") return close(CloseCode{4001}, "as you wish");
        room(request().param("room")).broadcast(name_ + ": " + std::string(m.text()));
    }
    const std::string& name() const { return name_; }

private:
    std::string name_;
};

// Writes down all callbacks.
class Recorder : public WebSocketHandler {
public:
    explicit Recorder(Texts& events) : events_(events) {}
    void open() override { events_.push_back("open"); }
    void on_message(const Message& m) override {
        events_.push_back((m.binary() ? "binary " : "text ") + std::string(m.data()));
    }
    void on_ping(std::string_view payload) override { events_.push_back("ping " + std::string(payload)); }
    void on_pong(std::string_view payload) override { events_.push_back("pong " + std::string(payload)); }
    void on_drain() override { events_.push_back("drain"); }
    void on_close() override {
        events_.push_back("close " + std::to_string(number(close_code())) + " " + close_reason() + ", " +
                          std::string(to_string(close_cause())));
    }

private:
    Texts& events_;
};
using RecorderTest = HandlerTest<Recorder>;

struct Echo : WebSocketHandler {
    void on_message(const Message& m) override { write_message(m); }
    std::optional<CompressionOptions> get_compression_options() override { return CompressionOptions(); }
};

// A ping after 20 s of silence, and 10 s for the answer.
ServerOptions with_pings() {
    ServerOptions options;
    options.limits.ping_interval = 20s;
    options.limits.ping_timeout = 10s;
    return options;
}

}  // namespace

TEST_SUITE_BEGIN("handler");

// ---- one handler ----------------------------------------------------------------------------------------------------

TEST_CASE("a HandlerTest passes messages to a handler and returns its messages") {
    HandlerTest<Chat> test("/chat?name=Anna");
    CHECK(test.client.is_open());
    CHECK(test.client.response().status() == 101);
    test.receive("hi");
    CHECK(test.sent() == Texts{"Anna: hi"});
    CHECK(test.sent().empty());
    CHECK(test.handler().name() == "Anna");
    test.receive("a");
    test.receive("b");
    CHECK(test.sent() == Texts{"Anna: a", "Anna: b"});
    CHECK(test.client.messages().size() == 3);
}

TEST_CASE("a HandlerTest has path parameters and arguments for the handler") {
    struct Greeter : WebSocketHandler {
        explicit Greeter(std::string word) : greeting(std::move(word)) {}
        void open() override { write_message(greeting + " in " + std::string(request().param("room"))); }
        void on_message(const Message&) override {}
        std::string greeting;
    };
    HandlerTest<Greeter> test("/chat/{room}", "/chat/green%20tea?name=Anna", "Welcome");
    CHECK(test.sent() == Texts{"Welcome in green tea"});
}

TEST_CASE("a refused handshake has its status, body and headers, and there is no handler") {
    HandlerTest<Chat> test("/chat");
    CHECK_FALSE(test.client.is_open());
    CHECK(test.client.response().status() == 401);
    CHECK(test.client.response().body() == "Who are you?\n");
    CHECK(test.client.response().header("CONTENT-TYPE") == "text/plain; charset=utf-8");
    CHECK(test.receive("hi") == WriteStatus::closed);
    CHECK(test.sent().empty());
    CHECK(error_of([&] { test.handler(); }) == "TestClient::handler: there is no handler of this type");
    CHECK(test.server.metrics().connections_open == 0);
    CHECK(test.server.metrics().responses.at(401) == 1);
}

TEST_CASE("the handler in memory gets text, binary data, pings and pongs as from a socket") {
    Texts events;
    RecorderTest test("/", "/", std::ref(events));
    test.receive("text");
    test.receive_binary(std::string("\0\xFF", 2));
    test.client.ping("p1");
    CHECK(test.client.pongs() == Texts{"p1"});
    test.handler().ping("p2");
    test.server.run_until_idle();
    CHECK(test.client.pings() == Texts{"p2"});
    test.close(CloseCode{4000}, "bye");
    CHECK(events ==
          Texts{"open", "text text", std::string("binary \0\xFF", 9), "ping p1", "pong p2", "close 4000 bye, peer"});
    CHECK(test.client.close_code() == CloseCode{4000});
    CHECK(test.server.metrics().connections_open == 0);
}

TEST_CASE("messages of a handler in memory are text or binary, of any size") {
    HandlerTest<Echo> test;
    const std::string large(3'000'000, 'x');
    for (const std::string& text : {std::string(), std::string("short"), large.substr(0, 1'000'000)}) {
        test.receive(text);
        test.receive_binary(text);
        const auto& messages = test.client.messages();
        REQUIRE(messages.size() >= 2);
        CHECK(messages[messages.size() - 2].data == text);
        CHECK_FALSE(messages[messages.size() - 2].binary);
        CHECK(messages.back().data == text);
        CHECK(messages.back().binary);
    }
    test.receive(large);  // Limits::max_message_size
    CHECK(test.client.close_code() == CloseCode::message_too_big);
}

TEST_CASE("a close of the handler in memory reaches the client with its code and reason") {
    HandlerTest<Chat> test("/chat?name=Anna");
    test.receive("leave");
    CHECK_FALSE(test.client.is_open());
    CHECK(test.client.close_code() == CloseCode{4001});
    CHECK(test.client.close_reason() == "as you wish");
    CHECK(test.receive("hi") == WriteStatus::closed);
    CHECK(test.server.metrics().closed.at(CloseCause::local) == 1);
    CHECK(error_of([&] { test.close(CloseCode{1005}); }) == "close: 1005 is not a code that may be sent");
}

TEST_CASE("a client in memory that hangs up has the cause connection lost") {
    Texts events;
    RecorderTest test("/", "/", std::ref(events));
    test.client.hang_up();
    CHECK(events.back() == "close 1006 the peer hung up without a Close frame, connection lost");
    CHECK(test.client.close_code() == CloseCode::abnormal);
    test.client.hang_up();
    CHECK(events.size() == 2);
}

TEST_CASE("an exception of a handler in memory closes with 1011 and is in exceptions()") {
    HandlerTest<Chat> test("/chat?name=Anna");
    test.receive("throw");
    CHECK(test.client.close_code() == CloseCode::internal_error);
    CHECK(test.server.exceptions() == Texts{"on_message: on purpose"});
    CHECK(test.server.metrics().closed.at(CloseCause::handler_exception) == 1);
}

TEST_CASE("text of a client in memory that is not UTF-8 closes with 1007") {
    HandlerTest<Echo> test;
    test.receive("\xC3(");
    CHECK(test.client.close_code() == CloseCode::invalid_payload);
}

// ---- several clients ------------------------------------------------------------------------------------------------

TEST_CASE("the clients of a TestServer share rooms") {
    TestServer server;
    server.route<Chat>("/chat/{room}");
    TestClient anna = server.connect("/chat/tea?name=Anna"), bert = server.connect("/chat/tea?name=Bert"),
               carl = server.connect("/chat/coffee?name=Carl");
    anna.send("hi");
    CHECK(anna.received() == Texts{"Anna: hi"});
    CHECK(bert.received() == Texts{"Anna: hi"});
    CHECK(carl.received().empty());
    CHECK(server.rooms()["tea"].size() == 2);
    anna.hang_up();
    CHECK(server.rooms()["tea"].size() == 1);
    server.rooms()["tea"].broadcast("from outside");
    CHECK(bert.received().empty());
    server.run_until_idle();
    CHECK(bert.received() == Texts{"from outside"});
}

TEST_CASE("a thousand clients in memory get each message, in order") {
    TestServer server;
    server.route<Chat>("/chat/{room}");
    std::vector<TestClient> clients;
    for (int i = 0; i < 1000; ++i) clients.push_back(server.connect("/chat/tea?name=" + std::to_string(i)));
    clients[0].send("a");
    clients[999].send("b");
    for (TestClient& client : clients) REQUIRE(client.received() == Texts{"0: a", "999: b"});
    for (TestClient& client : clients) client.close();
    CHECK(server.metrics().connections_open == 0);
    CHECK(server.metrics().websockets_opened == 1000);
}

TEST_CASE("a TestRequest sets headers, origin, host, address and subprotocols") {
    struct Teller : WebSocketHandler {
        std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
            return std::string(offered.back());
        }
        void open() override {
            write_json({{"address", remote_address()},
                        {"cookie", request().cookie("id").value_or("")},
                        {"host", request().host()},
                        {"origin", request().header("origin")},
                        {"subprotocol", selected_subprotocol()},
                        {"scheme", request().scheme()}});
        }
        void on_message(const Message&) override {}
    };
    TestServer server;
    server.route<Teller>("/");
    server.trusted_proxies({"10.0.0.0/8"});
    const auto request = TestRequest("/")
                             .header("Cookie", "id=7")
                             .origin("https://tea.example")
                             .host("tea.example")
                             .address("203.0.113.7")
                             .subprotocol("v1")
                             .subprotocol("v2");
    TestClient client = server.connect(request);
    CHECK(client.received() == Texts{R"({"address":"203.0.113.7","cookie":"7","host":"tea.example",)"
                                     R"("origin":"https://tea.example","subprotocol":"v2","scheme":"http"})"});
    CHECK(client.selected_subprotocol() == "v2");
    TestClient behind =
        server.connect(TestRequest("/").address("10.0.0.1").header("X-Forwarded-For", "192.0.2.4").subprotocol("v1"));
    CHECK(contains(behind.received().at(0), R"("address":"192.0.2.4")"));

    CHECK(contains(error_of([] { TestRequest("/").header("a b", ""); }), "is not a header field"));
    CHECK(contains(error_of([] { TestRequest("/").origin("x\r\ny"); }), "is not a header field"));
    CHECK(contains(error_of([] { TestRequest("/").address("home"); }), "is not an IP address"));
    CHECK(contains(error_of([&] { server.connect("/a b"); }), "the target has a space"));
}

TEST_CASE("a route that keeps no requests has them until open(), and then only the address, scheme and subprotocol") {
    struct Teller : WebSocketHandler {
        std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
            return std::string(offered.back());
        }
        void tell() {
            std::size_t fields = 0;
            request().fields().each([&](std::string_view, std::string_view) { return ++fields != 0; });
            write_json({{"address", remote_address()},
                        {"scheme", request().scheme()},
                        {"subprotocol", selected_subprotocol()},
                        {"request",
                         text::concat({request().method(), " ", request().target(), " ", request().raw_path(), " ",
                                       request().host(), " ", request().query("q").value_or("none")})},
                        {"room", request().param("room")},
                        {"cookie", request().cookie("id").value_or("none")},
                        {"fields", fields != 0}});
        }
        void open() override { tell(); }
        void on_message(const Message&) override { tell(); }
    };
    TestServer server;
    server.route<Teller>("/kept/{room}");
    server.route<Teller>("/dropped/{room}").keep_request(false);
    const auto received = [&](std::string path, std::string subprotocol) {
        TestClient client = server.connect(TestRequest(path + "?q=1")
                                               .header("Cookie", "id=7")
                                               .host("tea.example")
                                               .address("2001:db8::7:203:113:7")
                                               .subprotocol("first")
                                               .subprotocol(subprotocol));
        client.send("again");
        const Texts texts = client.received();
        client.close();
        CHECK(client.close_code() == CloseCode::normal);
        return texts;
    };
    for (const std::string subprotocol : {"v2", "one-that-needs-memory-of-its-own"}) {
        CAPTURE(subprotocol);
        const auto told = [&](const std::string& rest) {
            return R"({"address":"2001:db8::7:203:113:7","scheme":"http","subprotocol":")" + subprotocol +
                   "\"," + rest;
        };
        const auto whole = [&](const std::string& path) {
            return told(R"("request":"GET )" + path + "?q=1 " + path +
                        R"( tea.example 1","room":"tea","cookie":"7","fields":true})");
        };
        CHECK(received("/kept/tea", subprotocol) == Texts{whole("/kept/tea"), whole("/kept/tea")});
        CHECK(received("/dropped/tea", subprotocol) ==
              Texts{whole("/dropped/tea"),
                    told(R"("request":"  /  none","room":"","cookie":"none","fields":false})")});
    }
}

TEST_CASE("a TestServer checks origins, hosts, routes and limits like any server") {
    ServerOptions options;
    options.server_limits.max_connections_per_address = 1;
    TestServer server(options);
    server.route<Echo>("/echo");
    server.allow_origins({"https://friend.example"});
    server.allow_hosts({"localhost"});
    const auto status = [&](const TestRequest& request) { return server.connect(request).response().status(); };
    CHECK(status(TestRequest("/echo").origin("https://evil.example")) == 403);
    CHECK(status(TestRequest("/echo").host("other.example")) == 421);
    CHECK(status("/nothing") == 404);
    CHECK(status(TestRequest("/echo").origin("https://friend.example")) == 101);
    CHECK(status("/echo") == 503);
    CHECK(status(TestRequest("/echo").address("::1")) == 101);
}

TEST_CASE("a TestServer serves pages") {
    TestServer server;
    server.get("/hello/{name}", [](const Request& request) {
        return Response(200, "Hello, " + std::string(request.param("name")) + "\n");
    });
    server.get("/broken", [](const Request&) -> Response { throw std::runtime_error("no page"); });
    server.file("/file", test::TemporaryFile("page.txt", "content").path);
    server.metrics_page("/metrics");
    CHECK(server.fetch("/hello/Anna").body() == "Hello, Anna\n");
    const TestResponse head = server.fetch(TestRequest("/hello/Anna").method("HEAD"));
    CHECK(head.status() == 200);
    CHECK(head.header("content-length") == "12");
    CHECK(head.body() == "");
    CHECK(server.fetch("/nothing").status() == 404);
    CHECK(server.fetch("/broken").status() == 500);
    CHECK(server.exceptions() == Texts{"page: no page"});
    CHECK(contains(server.fetch("/metrics").body(), "wschat_connections_open 1\n"));
    CHECK(server.metrics().connections_open == 0);
}

TEST_CASE("the page of a large file reaches a client in memory") {
    const std::string content = test::large_content();
    const test::TemporaryFile file("large.bin", content);
    TestServer server;
    server.file("/large", file.path);
    const TestResponse response = server.fetch("/large");
    CHECK(response.status() == 200);
    CHECK(response.body() == content);
}

// ---- time -----------------------------------------------------------------------------------------------------------

TEST_CASE("advance() runs the timers that are due, in order, and no time passes without it") {
    TestServer server;
    std::string order;
    server.loop().call_later(30s, [&] { order += 'c'; });
    server.loop().call_later(10s, [&] {
        order += 'a';
        server.loop().call_later(10s, [&] { order += 'b'; });
    });
    server.loop().call_later(0s, [&] { order += '0'; });
    server.run_until_idle();
    CHECK(order == "0");
    const Time before = server.loop().now();
    server.advance(10s);
    CHECK(order == "0a");
    CHECK(server.loop().now() == before + 10s);
    server.advance(19s);
    CHECK(order == "0ab");
    server.advance(1s);
    CHECK(order == "0abc");
    server.advance(-1s);
    server.advance(24h * 365);
    CHECK(order == "0abc");
    CHECK(server.loop().now() == before + 30s + 24h * 365);
}

TEST_CASE("call_every() runs once for each interval of advance()") {
    TestServer server;
    int calls = 0;
    server.loop().call_every(1s, [&] { ++calls; });
    server.advance(60s);
    CHECK(calls == 60);
}

TEST_CASE("with advance() a client in memory gets pings and answers them") {
    TestServer server(with_pings());
    server.route<Echo>("/");
    TestClient client = server.connect("/");
    server.advance(19s);
    CHECK(client.pings().empty());
    server.advance(1s);
    CHECK(client.pings().size() == 1);
    server.advance(100s);
    CHECK(client.pings().size() == 6);
    CHECK(client.is_open());
}

TEST_CASE("a client in memory that does not read runs into the ping timeout") {
    Texts events;
    TestServer server(with_pings());
    server.route<Recorder>("/", std::ref(events));
    TestClient client = server.connect("/");
    client.pause_reading();
    server.advance(29s);
    CHECK(events == Texts{"open"});
    server.advance(1s);
    CHECK(events.back() == "close 1006 the peer did not answer a ping, ping timeout");
    client.resume_reading();
    CHECK(client.close_code() == CloseCode::abnormal);
}

TEST_CASE("a client in memory that does not answer a Close frame runs into the closing timeout") {
    Texts events;
    TestServer server;
    server.route<Recorder>("/", std::ref(events));
    TestClient client = server.connect("/");
    client.pause_reading(1000);
    client.handler<Recorder>().close(CloseCode{4002});
    server.advance(4s);
    CHECK(events == Texts{"open"});
    server.advance(1s);
    CHECK(contains(events.back(), ", closing timeout"));
    client.resume_reading();
    CHECK(client.close_code() == CloseCode{4002});
}

TEST_CASE("the backlog of a client in memory that does not read is limited") {
    struct Flood : WebSocketHandler {
        void open() override {
            statuses.clear();
            for (int i = 0; i < 5; ++i) loop().call_later(1s * i, [this] { send(); });
        }
        void send() { statuses.push_back(write_message(std::string(1000, 'x'))); }
        void on_message(const Message&) override {}
        void on_drain() override { write_message("drained"); }
        std::vector<WriteStatus> statuses;
    };
    ServerOptions options;
    options.limits.max_backlog = 2500;
    options.limits.backlog_policy = BacklogPolicy::drop;
    TestServer server(options);
    server.route<Flood>("/");
    TestClient client = server.connect("/");
    CHECK(client.received().size() == 1);
    client.pause_reading(500);
    server.advance(4s);
    CHECK(client.handler<Flood>().statuses == std::vector<WriteStatus>{WriteStatus::sent, WriteStatus::sent,
                                                                       WriteStatus::queued, WriteStatus::dropped,
                                                                       WriteStatus::dropped});
    client.resume_reading();
    CHECK(client.received() == Texts{std::string(1000, 'x'), std::string(1000, 'x'), "drained"});
}

// ---- the server -----------------------------------------------------------------------------------------------------

TEST_CASE("a shutdown of a TestServer closes its clients with 1001 and accepts no more") {
    Texts events;
    TestServer server;
    server.route<Recorder>("/", std::ref(events));
    TestClient client = server.connect("/");
    server.shutdown(1s);
    server.run_until_idle();
    CHECK(client.close_code() == CloseCode::going_away);
    CHECK(events.back() == "close 1001 , shutdown");
    CHECK(server.connect("/").response().status() == 0);
    CHECK(server.fetch("/").status() == 0);
}

TEST_CASE("clients of a TestServer outlive it, and the handlers get on_close") {
    Texts events;
    TestClient client;
    CHECK(contains(error_of([&] { client.is_open(); }), "this object has no client"));
    {
        TestServer server;
        server.route<Recorder>("/", std::ref(events));
        client = server.connect("/");
        client.handler<Recorder>().write_message("last words");
        CHECK(error_of([&] { client.handler<Chat>(); }) == "TestClient::handler: there is no handler of this type");
    }
    CHECK(contains(events.back(), ", shutdown"));
    CHECK_FALSE(client.is_open());
    CHECK(client.send("hi") == WriteStatus::closed);
    client.hang_up();
    CHECK(error_of([&] { client.handler<Recorder>(); }) == "TestClient::handler: there is no handler of this type");
}

TEST_CASE("a TestServer cannot listen, and run() is an Error") {
    TestServer server;
    CHECK(contains(error_of([&] { server.listen(0); }), "listen 127.0.0.1:"));
    CHECK(error_of([&] { server.run(); }) == "run: nothing to serve: call listen() first");
    CHECK(contains(error_of([&] { server.descriptor(); }), "the poller \"memory\" has no descriptor"));
}

TEST_CASE("posted work and references run in run_until_idle() of a TestServer, and endless work is an Error") {
    HandlerTest<Echo> test;
    const HandlerRef ref = test.handler().ref();
    std::thread([&] { ref.write_message("from a thread"); }).join();
    CHECK(test.sent().empty());
    test.server.run_until_idle();
    CHECK(test.sent() == Texts{"from a thread"});
    std::function<void()> again = [&] { test.server.loop().post(again); };
    again();
    CHECK(error_of([&] { test.server.run_until_idle(); }) == "TestServer::run_until_idle: the server always has more work");
    again = [] {};
    test.server.run_until_idle();
}

TEST_CASE("a call of a client in memory within a callback is an Error") {
    TestServer server;
    struct Nested : WebSocketHandler {
        explicit Nested(TestServer& its_server) : tested(its_server) {}
        void on_message(const Message&) override { tested.connect("/"); }
        TestServer& tested;
    };
    server.route<Nested>("/", std::ref(server));
    TestClient client = server.connect("/");
    client.send("x");
    CHECK(server.exceptions() == Texts{"on_message: poll: the loop is running already"});
    CHECK(client.close_code() == CloseCode::internal_error);
}

TEST_CASE("a log function of a TestServer gets all entries, also exceptions") {
    TestServer server;
    test::LogLines log;
    server.on_log([&](const LogEntry& entry) { log.lines.push_back(to_string(entry)); });
    server.route<Chat>("/");
    server.connect("/?name=Anna").send("throw");
    CHECK(log.has("what=\"on purpose\""));
    CHECK(server.exceptions().size() == 1);
}

TEST_CASE("a client in memory with compression gets compressed messages") {
    TestServer server;
    server.route<Echo>("/");
    TestClient client = server.connect(TestRequest("/").compression());
    const std::string text(5000, 'x');
    const std::uint64_t before = server.metrics().bytes_sent;
    client.send(text);
    CHECK(client.received() == Texts{text});
#if WSCHAT_ZLIB
    CHECK(client.response().header("sec-websocket-extensions") != "");
    CHECK(server.metrics().bytes_sent - before < 1000);
#else
    CHECK(server.metrics().bytes_sent - before > 5000);
#endif
}

TEST_CASE("the messages and the log of a TestServer are those of a server with sockets") {
    const auto set_up = [](Server& server) { server.route<Chat>("/chat/{room}"); };
    TestServer memory;
    set_up(memory);
    TestClient anna = memory.connect("/chat/tea?name=Anna");
    test::RunningServer sockets;
    set_up(sockets.server);
    sockets.start();
    test::WsClient berta(sockets.port(), "/chat/tea?name=Anna");
    anna.send("hi");
    berta.send("hi");
    CHECK(anna.received() == Texts{*berta.next()});
    anna.close();
    berta.close();
    CHECK(berta.close_code() == anna.close_code());
    berta.raw.close();
    sockets.stop();
    Metrics here = memory.metrics(), there = sockets.server.metrics();
    for (Metrics* metrics : {&here, &there}) {
        metrics->bytes_received = metrics->bytes_sent = 0;  // the Host and the key differ in length
        metrics->tls_handshakes = 0;
    }
    CHECK(prometheus_text(here) == prometheus_text(there));
}

TEST_SUITE_END();
