// Section 15: clients against servers of this library, and against raw servers that misbehave in each stage.
#include "support.hpp"

#include <set>

namespace {

using test::contains;
using test::EchoServer;
using test::RawClient;
using test::RunningServer;
using wschat::Client;
using wschat::ClientOptions;
using wschat::CloseCause;
using wschat::CloseCode;
using wschat::ConnectError;
using wschat::ConnectStage;
using wschat::Message;
using wschat::ReconnectOptions;
using wschat::WebSocketHandler;
using wschat::detail::ClientUrl;
using wschat::detail::ResponseParser;
using namespace std::chrono_literals;

// What the handlers of one test have seen, and what they do.
struct Story {
    std::vector<std::string> events;
    std::vector<ConnectError> failures;
    std::function<void(WebSocketHandler&)> on_open;
    std::function<void(WebSocketHandler&, const Message&)> on_message;
    std::function<void(WebSocketHandler&)> on_close;
    std::function<void(WebSocketHandler&, const ConnectError&)> on_failure;

    std::size_t count(std::string_view event) const {
        return static_cast<std::size_t>(std::count(events.begin(), events.end(), event));
    }
};

struct Actor : WebSocketHandler {
    explicit Actor(Story& its_story) : story(its_story) {}
    void open() override {
        story.events.emplace_back("open");
        if (story.on_open) story.on_open(*this);
    }
    void on_message(const Message& message) override {
        story.events.emplace_back(message.text());
        if (story.on_message) story.on_message(*this, message);
    }
    void on_close() override {
        story.events.push_back("close " + std::to_string(number(close_code())) + " " +
                               std::string(to_string(close_cause())));
        if (story.on_close) story.on_close(*this);
    }
    void on_failure(const ConnectError& error) override {
        story.events.emplace_back(to_string(error.stage));
        story.failures.push_back(error);
        if (story.on_failure) story.on_failure(*this, error);
    }
    Story& story;
};

// The options of most tests. No test waits for the timeout, unless it is the subject.
ClientOptions options() {
    ClientOptions result;
    result.connect_timeout = test::deadline;
    result.tls.insecure_accept_any_certificate = true;
    return result;
}
ClientOptions impatient() {
    ClientOptions result = options();
    result.connect_timeout = 100ms;
    return result;
}
ClientOptions reconnecting() {
    ClientOptions result = options();
    result.reconnect.emplace();
    result.reconnect->min_delay = 1ms;
    result.reconnect->max_delay = 6ms;
    return result;
}
std::string url(int port, std::string_view path = "/") {
    return (test::over_tls() ? "wss" : "ws") + std::string("://127.0.0.1:") + std::to_string(port) + std::string(path);
}
std::string plain_url(int port, std::string_view path = "/") {
    return "ws://127.0.0.1:" + std::to_string(port) + std::string(path);
}

// Runs until all connections are over. A test that hangs ends at the deadline, and fails because of what is missing.
void run(Client& client, wschat::Duration deadline = test::deadline) {
    const auto guard = client.loop().call_later(deadline, [&] { client.shutdown(0s); });
    client.run();
    client.loop().cancel(guard);
}
// One client with one connection.
Story& play(Story& story, const std::string& url, const ClientOptions& with) {
    Client client(test::poller_kind());
    client.connect<Actor>(url, with, std::ref(story));
    run(client);
    return story;
}
const ConnectError& only_failure(Story& story, const std::string& url, const ClientOptions& with) {
    play(story, url, with);
    REQUIRE(story.failures.size() == 1);
    CHECK(story.events.size() == 1);
    return story.failures.front();
}

// A server on a thread that does with each connection what the test says. It accepts until its end.
class Raw {
public:
    using Serve = std::function<void(RawClient&, int number)>;

    explicit Raw(Serve serve, const std::string& address = "127.0.0.1:0")
        : socket_(wschat::detail::ListenAddress::parse(address), false), serve_(std::move(serve)) {
        thread_ = std::thread([this] { accept_all(); });
    }
    Raw(const Raw&) = delete;
    Raw& operator=(const Raw&) = delete;
    ~Raw() {
        ended_ = true;
        thread_.join();
    }
    int port() const { return socket_.address().port; }
    int accepted() const { return accepted_; }

private:
    void accept_all() {
        while (!ended_) {
            pollfd entry{socket_.descriptor(), POLLIN, 0};
            if (::poll(&entry, 1, 5) <= 0) continue;
            wschat::IpAddress peer;
            int error = 0;
            wschat::detail::Socket socket = socket_.accept(peer, error);
            if (!socket) continue;
            RawClient connection(std::move(socket), nullptr);
            serve_(connection, accepted_++);
        }
    }

    wschat::detail::ListenSocket socket_;
    Serve serve_;
    std::atomic<bool> ended_{false};
    std::atomic<int> accepted_{0};
    std::thread thread_;
};

std::string header_of(const std::string& request, std::string_view name) {
    const wschat::Fields fields(std::string_view(request).substr(request.find('\n') + 1));
    return std::string(fields.find(name).value_or(""));
}
std::string accept_response(const std::string& request, std::string_view more = {}) {
    return test::switching_protocols(header_of(request, "sec-websocket-key"), {}, {}, more);
}
// Closes first, as a server does.
void finish(RawClient& connection) {
    connection.shutdown_send();
    connection.read_to_end();
}
// Reads the request, sends the answer, and reads until the client hangs up.
Raw::Serve answering(const std::string& answer, bool hang_up = false) {
    return [answer, hang_up](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        connection.send(answer);
        if (!hang_up) connection.read_to_end();
    };
}

}  // namespace

TEST_SUITE_BEGIN("client");

// ---- without sockets -----------------------------------------------------------------------------------------------

TEST_CASE("a response is the same in pieces of any size") {
    const wschat::Limits limits;
    const std::string head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nX: a\r\n\r\n";
    for (std::size_t size = 1; size <= head.size(); ++size) {
        ResponseParser parser(limits);
        ResponseParser::Outcome outcome = ResponseParser::Outcome::need_more;
        std::size_t at = 0;
        const std::string bytes = head + "\x81";
        while (at < bytes.size() && outcome == ResponseParser::Outcome::need_more) {
            std::size_t consumed = 0;
            outcome = parser.feed(std::string_view(bytes).substr(at, size), consumed);
            at += consumed;
        }
        CHECK(outcome == ResponseParser::Outcome::response);
        CHECK(at == head.size());
        CHECK(parser.status() == 101);
        CHECK(parser.head() == head);
        CHECK(parser.fields().find("x") == "a");
    }
}

TEST_CASE("a text that is not an HTTP response is refused with a sentence") {
    const auto reason = [](const std::string& bytes) {
        const wschat::Limits limits;
        ResponseParser parser(limits);
        std::size_t consumed = 0;
        CHECK(parser.feed(bytes, consumed) == ResponseParser::Outcome::failure);
        return parser.reason();
    };
    CHECK(reason("SSH-2.0-OpenSSH\r\n") == "The peer does not speak HTTP/1.");
    CHECK(reason("S") == "The peer does not speak HTTP/1.");
    CHECK(reason("HTTP/2 200\r\n") == "The peer does not speak HTTP/1.");
    CHECK(reason("HTTP/1.1 20\r\n") == "The status line is malformed.");
    CHECK(reason("HTTP/1.1  200\r\n") == "The status line is malformed.");
    CHECK(reason("HTTP/1.1 2000 OK\r\n") == "The status line is malformed.");
    CHECK(reason("HTTP/1.1 600 x\r\n") == "The status is not in 100-599.");
    CHECK(reason("HTTP/1.1 200 OK\n") == "A line does not end with CR LF.");
    CHECK(reason("HTTP/1.1 200 OK\r\nA b\r\n") == "A header line has no colon.");
    CHECK(reason("HTTP/1.1 200 OK\r\nA : b\r\n") == "A header name has an illegal character.");
    CHECK(reason("HTTP/1.1 200 OK\r\n A: b\r\n") == "A header line is folded.");
    CHECK(reason("HTTP/1.1 200 " + std::string(9000, 'x')) == "The status line is longer than 8192 bytes.");
    CHECK(reason("HTTP/1.1 200 OK\r\nA: " + std::string(17000, 'x')) == "The headers are longer than 16384 bytes.");
    CHECK(reason("HTTP/1.1 200 OK\r\n" + test::repeated(101, "A: b\r\n")) == "There are more than 100 headers.");
}

TEST_CASE("a URL has a scheme, a host, a port and a target") {
    const auto parse = [](std::string_view text) {
        std::string error;
        const auto parsed = ClientUrl::parse(text, error);
        REQUIRE_MESSAGE(parsed, error);
        return *parsed;
    };
    CHECK(parse("ws://Chat.Example").host == "chat.example");
    CHECK(parse("ws://chat.example").port == 80);
    CHECK(parse("wss://chat.example").port == 443);
    CHECK(parse("WSS://chat.example").secure);
    CHECK(parse("https://chat.example").secure);
    CHECK(parse("ws://h").target == "/");
    CHECK(parse("ws://h?a=b").target == "/?a=b");
    CHECK(parse("ws://h/a/b?c=d/e@f").target == "/a/b?c=d/e@f");
    CHECK(parse("ws://h:8080/").authority() == "h:8080");
    CHECK(parse("ws://h:80/").authority() == "h");
    CHECK(parse("ws://[::1]:9/").host == "::1");
    CHECK(parse("ws://[::1]:9/").authority() == "[::1]:9");
    CHECK(parse("ws://[::1]/").port == 80);
    for (const char* text : {"ws://[fe80::1%25eth0.2]:9/", "ws://[fe80::1%eth0.2]:9/"}) {
        CHECK(parse(text).host == "fe80::1");
        CHECK(parse(text).zone == "eth0.2");
        CHECK(parse(text).authority() == "[fe80::1]:9");
    }
    CHECK(parse("ws://[fe80::1%2525]").zone == "25");
    CHECK(parse("ws://[fe80::1%25]").zone == "25");
    CHECK(parse("ws://anna:p%40ss@h/").credentials == "anna:p@ss");
    CHECK(parse("ws://anna:p%40ss@h/").host == "h");
}

TEST_CASE("a text that is not a URL of a WebSocket is refused, and the sentence does not contain its secrets") {
    for (const char* text : {"",
                             "h",
                             "ftp://h/",
                             "ws:h",
                             "ws://",
                             "ws://:80",
                             "ws://h:0",
                             "ws://h:70000",
                             "ws://h:x",
                             "ws://a b/",
                             "ws://h/\r\nA: b",
                             "ws://h/#a",
                             "ws://\xc3\xa9/",
                             "ws://a@b@/",
                             "ws://[::1",
                             "ws://h:80:80/",
                             "ws://h/%",
                             "ws://h/%4x?a",
                             "ws://h%25eth0/",
                             "ws://[fe80::1%]/",
                             "ws://[fe80::1%25a/b]/",
                             "ws://[fe80::1]%25eth0/"}) {
        CAPTURE(text);
        std::string error;
        CHECK_FALSE(ClientUrl::parse(text, error));
        CHECK_FALSE(error.empty());
    }
    std::string error;
    CHECK_FALSE(ClientUrl::parse("ws://anna:secret@h:x/?token=secret", error));
    CHECK_FALSE(contains(error, "secret"));
    CHECK(contains(error, "ws://h:x/"));
}

TEST_CASE("the Location of a redirect may be relative") {
    std::string error;
    const auto base = ClientUrl::parse("ws://h:81/a/b?c", error);
    const auto resolve = [&](std::string_view text) {
        const auto next = ClientUrl::parse(text, error, &*base);
        return next ? next->host_and_port() + next->target : "none";
    };
    CHECK(resolve("/x#y") == "h:81/x");
    CHECK(resolve("x") == "h:81/a/x");
    CHECK(resolve("?x=http://a") == "h:81/a/b?x=http://a");
    CHECK(resolve("//g/x") == "g:80/x");
    CHECK(resolve("http://g/x#f") == "g:80/x");
    CHECK(resolve("https://g") == "g:443/");
    CHECK(resolve("mailto://g") == "none");
    const auto link_local = ClientUrl::parse("ws://[fe80::1%25eth0]/", error);
    CHECK(ClientUrl::parse("/x", error, &*link_local)->zone == "eth0");
    CHECK(ClientUrl::parse("ws://h/", error, &*link_local)->zone.empty());
    CHECK_FALSE(link_local->same_server(*ClientUrl::parse("ws://[fe80::1%25eth1]/", error)));
}

TEST_CASE("no_proxy names hosts, domains, ports and networks") {
    const auto excluded = [](std::string_view list, std::string_view url) {
        std::string error;
        return wschat::detail::excluded_from_proxy(list, *ClientUrl::parse(url, error));
    };
    CHECK(excluded("*", "ws://a.example"));
    CHECK(excluded("b, a.example", "ws://A.example"));
    CHECK(excluded("example", "ws://a.example"));
    CHECK(excluded(".example", "ws://a.example"));
    CHECK(excluded("a.example:81", "ws://a.example:81"));
    CHECK(excluded("10.0.0.0/8", "ws://10.1.2.3"));
    CHECK(excluded("::1", "ws://[::1]"));
    CHECK_FALSE(excluded("", "ws://a.example"));
    CHECK_FALSE(excluded("a.example:81", "ws://a.example"));
    CHECK_FALSE(excluded("ample", "ws://a.example"));
    CHECK_FALSE(excluded("10.0.0.0/8,x/y", "ws://11.1.2.3"));
}

TEST_CASE("the addresses of the two families alternate") {
    std::vector<wschat::detail::ResolvedAddress> all;
    for (const char* text : {"::1", "::2", "::3", "10.0.0.1", "10.0.0.2"})
        all.push_back({*wschat::IpAddress::parse(text)});
    std::string order;
    for (const auto& each : wschat::detail::interleave_families(all)) order += each.address.to_string() + " ";
    CHECK(order == "::1 10.0.0.1 ::2 10.0.0.2 ::3 ");
    CHECK(wschat::detail::interleave_families({}).empty());
}

#if !defined(_WIN32)
TEST_CASE("a link-local address of the system's resolver keeps its network interface") {
    const auto found = wschat::detail::resolve_by_system("fe80::1%lo");
    REQUIRE(found.size() == 1);
    CHECK(found[0].address.to_string() == "fe80::1");
    CHECK(found[0].zone == wschat::detail::os::zone_index("lo"));
    CHECK(found[0].zone != 0);
    const wschat::detail::SocketAddress address(found[0].address, 80, found[0].zone);
    CHECK(wschat::detail::zone_of(address.storage) == found[0].zone);
    for (const auto& each : wschat::detail::resolve_by_system("localhost")) CHECK(each.zone == 0);
}
#endif

TEST_CASE("masks and keys of handshakes do not repeat") {
    std::set<wschat::detail::MaskKey> masks;
    std::set<std::string> keys;
    constexpr std::size_t count = 2000;  // two of 2,000 random masks are equal once in 2,000 runs
    for (std::size_t i = 0; i < count; ++i) {
        masks.insert(wschat::detail::random_mask());
        keys.insert(wschat::detail::random_key());
    }
    CHECK(masks.size() >= count - 2);
    CHECK(keys.size() == count);
    CHECK(std::all_of(keys.begin(), keys.end(), wschat::detail::valid_key));
}

TEST_CASE("the body of a refusal is read with its size, in chunks, or to the end") {
    const auto body = [](std::string_view fields, std::string_view bytes, bool complete) {
        wschat::detail::ResponseBody reader;
        reader.start(404, wschat::Fields(fields));
        for (const char c : bytes) reader.feed({&c, 1});
        CHECK(reader.complete() == complete);
        return reader.take();
    };
    CHECK(body("Content-Length: 3\r\n", "abc", true) == "abc");
    CHECK(body("Content-Length: 4\r\n", "abc", false) == "abc");
    CHECK(body("Content-Length: 0\r\n", "", true).empty());
    CHECK(body("", "abc", false) == "abc");
    CHECK(body("Transfer-Encoding: chunked\r\n", "2;x\r\nab\r\n1\r\nc\r\n0\r\n", true) == "abc");
    CHECK(body("Transfer-Encoding: chunked\r\n", "2\r\nab\r\n1", false) == "ab");
    CHECK(body("Transfer-Encoding: chunked\r\n", "fffffffffffffffff\r\n", true).empty());
    CHECK(body("", std::string(70000, 'x'), true).size() == 65536);
}

TEST_CASE("options that can never work are an Error of connect()") {
    Client client;
    Story story;
    const auto sentence = [&](auto change) -> std::string {
        ClientOptions bad = options();
        change(bad);
        try {
            client.connect<Actor>("ws://h/", bad, std::ref(story));
        } catch (const wschat::Error& error) {
            return error.what();
        }
        return "no Error";
    };
    CHECK(contains(sentence([](auto& o) { o.headers = {{"A", "b\r\nC: d"}}; }), "\"A\" is not a header field"));
    CHECK(contains(sentence([](auto& o) { o.headers = {{"host", "b"}}; }), "only the client sets the header host"));
    CHECK(contains(sentence([](auto& o) { o.headers = {{"Sec-WebSocket-Key", "b"}}; }), "only the client sets"));
    CHECK(contains(sentence([](auto& o) { o.cookies = {{"a", "b;c"}}; }), "\"a\" is not a cookie"));
    CHECK(contains(sentence([](auto& o) { o.subprotocols = {"a b"}; }), "is not a token"));
    CHECK(contains(sentence([](auto& o) { o.origin = "a\n"; }), "control character"));
    CHECK(contains(sentence([](auto& o) { o.bind_address = "localhost"; }), "not a numeric address"));
    CHECK(contains(sentence([](auto& o) { o.unix_path = std::string(200, 'x'); }), "too long"));
    CHECK(contains(sentence([](auto& o) { o.proxy = "squid"; }), "proxy: \"squid\" is not a URL"));
#if WSCHAT_OPENSSL
    CHECK(contains(sentence([](auto& o) {
                       o.tls.authorities = "/nowhere.pem";
                       o.tls.insecure_accept_any_certificate = false;
                   }),
                   "/nowhere.pem"));
    CHECK(contains(sentence([](auto& o) {
                       o.tls.revocation_lists = "/nowhere.crl";
                       o.tls.insecure_accept_any_certificate = false;
                   }),
                   "TLS revocation_lists \"/nowhere.crl\""));
#endif
    CHECK(client.connections() == 0);
    CHECK_THROWS_AS(client.run(), wschat::Error);
    wschat::Loop loop;
    CHECK_THROWS_AS(Client{loop}, wschat::Error);
}

// ---- a good connection ---------------------------------------------------------------------------------------------

TEST_CASE("a client sends, receives and closes") {
    EchoServer server;
    Story story;
    story.on_open = [](WebSocketHandler& handler) { handler.write_message("hello"); };
    story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(4001, "done"); };
    play(story, url(server.port(), "/?name=bot"), options());
    CHECK(story.events == std::vector<std::string>{"open", "hello", "close 4001 local"});
}

TEST_CASE("a handler of a client knows its request, its server and its rooms") {
    EchoServer server;
    Story story;
    std::string seen;
    Client client(test::poller_kind());
    story.on_open = [&](WebSocketHandler& handler) {
        seen = *handler.request().query("name") + " " + handler.remote_address() + " " +
               std::string(handler.request().header("x-a")) + " " + std::string(handler.request().header("cookie"));
        handler.room("mine").join(handler);
        client.rooms()["mine"].broadcast("to all");
    };
    story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(); };
    ClientOptions with = options();
    with.headers = {{"X-A", "b"}};
    with.cookies = {{"c", "d"}, {"e", "f"}};
    client.connect<Actor>(url(server.port(), "/?name=bot"), with, std::ref(story));
    run(client);
    CHECK(seen == "bot 127.0.0.1 b c=d; e=f");
    CHECK(story.count("to all") == 1);
    CHECK(client.rooms().size() == 0);
}

TEST_CASE("messages of all sizes are echoed unchanged, also compressed with each set of parameters") {
    struct Compressing : test::Echo {
        std::optional<wschat::CompressionOptions> get_compression_options() override {
            wschat::CompressionOptions all;
            all.server_context_takeover = all.client_context_takeover = true;
            return all;
        }
    };
    test::HandlerServer<Compressing> server;
    const std::size_t sizes[] = {0, 1, 125, 126, 5000, 65535, 65536, 300000};
    for (const int parameters : {-1, 0, 1, 2, 3, 4, 5, 6, 7}) {
        CAPTURE(parameters);
        ClientOptions with = options();
        if (parameters >= 0) {
            with.compression.emplace();
            with.compression->threshold = 0;
            with.compression->server_context_takeover = (parameters & 1) != 0;
            with.compression->client_context_takeover = (parameters & 2) != 0;
            with.compression->server_max_window_bits = (parameters & 4) != 0 ? 9 : 15;
            with.compression->client_max_window_bits = (parameters & 4) != 0 ? 10 : 15;
        }
        Story story;
        std::size_t next = 0;
        bool equal = true;
        const auto message = [&] {
            return test::repeated(sizes[next] / 5, "abcd ") + std::string(sizes[next] % 5, 'x');
        };
        story.on_open = [&](WebSocketHandler& handler) { handler.write_message(message()); };
        story.on_message = [&](WebSocketHandler& handler, const Message& got) {
            equal = equal && got.text() == message();
            if (++next == std::size(sizes)) handler.close();
            else handler.write_message(message());
        };
        play(story, url(server.port()), with);
        CHECK(equal);
        CHECK(next == std::size(sizes));
    }
}

TEST_CASE("frames that arrive together with the response are processed") {
    const Raw server([](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        connection.send(accept_response(connection.received) + test::hex("81 02 68 69 88 02 03 e8"));
        finish(connection);
    });
    Story story;
    play(story, plain_url(server.port()), options());
    CHECK(story.events == std::vector<std::string>{"open", "hi", "close 1000 peer"});
}

TEST_CASE("interim responses are skipped, and the first final one counts") {
    const Raw server([](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        connection.send("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + accept_response(connection.received) +
                        test::hex("88 02 03 e8"));
        finish(connection);
    });
    Story story;
    play(story, plain_url(server.port()), options());
    CHECK(story.events == std::vector<std::string>{"open", "close 1000 peer"});
}

TEST_CASE("each frame of a client is masked with a new key") {
    std::string frames;
    {
        const Raw server([&](RawClient& connection, int) {
            connection.read_until("\r\n\r\n");
            const std::size_t head = connection.received.size();
            connection.send(accept_response(connection.received));
            connection.read_at_least(head + 20 * 7);
            frames = connection.received.substr(head);
            connection.send(test::hex("88 02 03 e8"));
            finish(connection);
        });
        Story story;
        story.on_open = [](WebSocketHandler& handler) {
            handler.room("r").join(handler);
            for (int i = 0; i < 10; ++i) handler.write_message("a");
            for (int i = 0; i < 10; ++i) handler.room("r").broadcast("a");
        };
        play(story, plain_url(server.port()), options());
    }
    REQUIRE(frames.size() >= 20 * 7);
    std::set<std::string> masks;
    for (std::size_t at = 0; at != 20 * 7; at += 7) {
        CHECK(test::to_hex(frames.substr(at, 2)) == "81 81");
        CHECK((frames[at + 6] ^ frames[at + 2]) == 'a');
        masks.insert(frames.substr(at + 2, 4));
    }
    CHECK(masks.size() == 20);
}

TEST_CASE("a server that sends a masked frame gets 1002") {
    std::string received;
    {
        const Raw server([&](RawClient& connection, int) {
            connection.read_until("\r\n\r\n");
            connection.send(accept_response(connection.received) + test::hello_masked);
            connection.read_to_end();
            received = connection.received;
        });
        Story story;
        play(story, plain_url(server.port()), options());
        CHECK(story.events == std::vector<std::string>{"open", "close 1002 protocol error"});
    }
    const std::string frame = received.substr(received.find("\r\n\r\n") + 4);
    REQUIRE(frame.size() >= 8);
    CHECK(test::to_hex(frame.substr(0, 1)) == "88");
    CHECK((frame[6] ^ frame[2]) == 0x03);
    CHECK(static_cast<unsigned char>(frame[7] ^ frame[3]) == 0xEA);
}

TEST_CASE("a client waits for the server to close the TCP connection first") {
    std::atomic<bool> ended_before{true};
    const Raw server([&](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        connection.send(accept_response(connection.received));
        const std::size_t size = connection.received.size();
        connection.read_at_least(size + 8);
        connection.send(test::hex("88 02 03 e8"));
        pollfd entry{connection.socket().descriptor(), POLLIN, 0};
        ended_before = ::poll(&entry, 1, 100) > 0;
    });
    Story story;
    story.on_open = [](WebSocketHandler& handler) { handler.close(); };
    play(story, plain_url(server.port()), options());
    CHECK(story.count("close 1000 local") == 1);
    CHECK_FALSE(ended_before);
}

TEST_CASE("other threads send through ref()") {
    EchoServer server;
    Story story;
    std::thread sender;
    story.on_open = [&](WebSocketHandler& handler) {
        sender = std::thread([ref = handler.ref()] { ref.write_message("from a thread"); });
    };
    story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(); };
    play(story, url(server.port()), options());
    sender.join();
    CHECK(story.count("from a thread") == 1);
}

#if !defined(_WIN32)
TEST_CASE("a client connects to a Unix socket") {
    RunningServer running;
    running.server.route<test::Echo>("/");
    const std::string path = test::temporary_path("client.sock");
    running.server.listen("unix:" + path);
    running.run();
    Story story;
    story.on_open = [](WebSocketHandler& handler) { handler.close(); };
    ClientOptions with = options();
    with.unix_path = path;
    play(story, "ws://anything/", with);
    CHECK(story.events == std::vector<std::string>{"open", "close 1000 local"});

    running.stop();
    Story refused;
    with.unix_path = path + ".none";
    CHECK(only_failure(refused, "ws://anything/", with).stage == ConnectStage::connect);
}
#endif

TEST_CASE("a client offers subprotocols, and the handler knows the chosen one") {
    struct Choosing : test::Echo {
        std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
            return std::string(offered.back());
        }
    };
    test::HandlerServer<Choosing> server;
    Story story;
    std::string chosen;
    story.on_open = [&](WebSocketHandler& handler) {
        chosen = handler.selected_subprotocol();
        handler.close();
    };
    ClientOptions with = options();
    with.subprotocols = {"one", "two"};
    play(story, url(server.port()), with);
    CHECK(chosen == "two");
}

// ---- failures ------------------------------------------------------------------------------------------------------

TEST_CASE("an invalid URL is a failure, and is not tried again") {
    Story story;
    ClientOptions with = reconnecting();
    const ConnectError& error = only_failure(story, "chat.example", with);
    CHECK(error.stage == ConnectStage::url);
    CHECK_FALSE(error.retry_in);
    CHECK(contains(error.sentence, "\"chat.example\" is not a URL of a WebSocket"));
}

TEST_CASE("a name that does not resolve is a failure with the resolver's sentence") {
    ClientOptions with = options();
    with.resolver = [](const std::string& host) -> std::vector<wschat::IpAddress> {
        if (host == "throws.example") throw wschat::Error("no such host");
        return {};
    };
    Story first, second;
    CHECK(only_failure(first, "ws://throws.example/", with).sentence ==
          "The host \"throws.example\" cannot be resolved: no such host.");
    CHECK(only_failure(second, "ws://empty.example/", with).sentence ==
          "The host \"empty.example\" cannot be resolved: it has no address.");
    CHECK(first.failures.front().stage == ConnectStage::resolve);
}

TEST_CASE("a resolver that hangs ends at the deadline, and its late result is dropped") {
    const auto released = std::make_shared<std::atomic<bool>>(false);
    const auto finished = std::make_shared<std::atomic<bool>>(false);
    ClientOptions with = impatient();
    with.resolver = [=](const std::string&) {
        while (!*released) std::this_thread::yield();
        *finished = true;
        return std::vector<wschat::IpAddress>{*wschat::IpAddress::parse("127.0.0.1")};
    };
    Story story;
    const ConnectError& error = only_failure(story, "ws://slow.example/", with);
    CHECK(error.stage == ConnectStage::resolve);
    CHECK(error.sentence == "There was no answer of the resolver within 100 ms.");
    *released = true;
    CHECK(test::eventually([&] { return finished->load(); }));
}

TEST_CASE("a refused connection is a failure with the system's error") {
    int port = 0;
    {
        const Raw server([](RawClient&, int) {});
        port = server.port();
    }
    Story story;
    const ConnectError& error = only_failure(story, plain_url(port), options());
    CHECK(error.stage == ConnectStage::connect);
    CHECK(contains(error.sentence, "127.0.0.1: Connection refused"));
}

TEST_CASE("each answer that does not complete the handshake is one failure with its stage, status and body") {
    struct Row {
        std::string answer;
        ConnectStage stage;
        int status;
        std::string body, sentence;
    };
    const std::string good = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    const Row rows[] = {
        {"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone", ConnectStage::http, 404, "none",
         "The server answered 404 Not Found instead of 101."},
        {"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", ConnectStage::http, 401,
         "no", "The server answered 401 Unauthorized instead of 101."},
        {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ConnectStage::http, 200, "",
         "The server answered 200 OK instead of 101."},
        {"HTTP/1.1 301 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", ConnectStage::http, 301, "", "301"},
        {"garbage", ConnectStage::http, 0, "", "The response is not HTTP: The peer does not speak HTTP/1."},
        {"HTTP/1.1 101 x\r\n" + test::repeated(200, "A: b\r\n"), ConnectStage::http, 0, "",
         "The response is not HTTP: There are more than 100 headers."},
        {test::repeated(20, "HTTP/1.1 100 Continue\r\n\r\n"), ConnectStage::http, 0, "", "interim responses only"},
        {good + "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n", ConnectStage::upgrade, 101, "",
         "Sec-WebSocket-Accept does not match the key"},
        {good + "\r\n", ConnectStage::upgrade, 101, "", "Sec-WebSocket-Accept does not match the key"},
        {"HTTP/1.1 101 x\r\n\r\n", ConnectStage::upgrade, 101, "", "no Upgrade: websocket"},
    };
    for (const Row& row : rows) {
        CAPTURE(row.answer);
        const Raw server(answering(row.answer));
        Story story;
        const ConnectError& error = only_failure(story, plain_url(server.port()), options());
        CHECK(error.stage == row.stage);
        CHECK(error.status == row.status);
        CHECK(error.body == row.body);
        CHECK(contains(error.sentence, row.sentence));
    }
}

TEST_CASE("subprotocols and extensions that were not offered are refused") {
    for (const char* line : {"Sec-WebSocket-Protocol: x\r\n", "Sec-WebSocket-Extensions: permessage-deflate\r\n"}) {
        CAPTURE(line);
        const Raw server([&](RawClient& connection, int) {
            connection.read_until("\r\n\r\n");
            connection.send(accept_response(connection.received, line));
            connection.read_to_end();
        });
        Story story;
        const ConnectError& error = only_failure(story, plain_url(server.port()), options());
        CHECK(error.stage == ConnectStage::upgrade);
        CHECK(contains(error.sentence, "that was not offered"));
    }
}

TEST_CASE("a server that hangs up or falls silent in any stage is a failure within the deadline") {
    const std::string head = "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnone";
    for (const bool hang_up : {true, false}) {
        for (const std::size_t sent : {std::size_t{0}, std::size_t{1}, std::size_t{20}, head.size()}) {
            CAPTURE(hang_up);
            CAPTURE(sent);
            const Raw server(answering(head.substr(0, sent), hang_up));
            Story story;
            const ConnectError& error =
                only_failure(story, plain_url(server.port()), hang_up ? options() : impatient());
            CHECK(error.stage == ConnectStage::http);
            CHECK(error.status == (sent == head.size() ? 404 : 0));
            CHECK(error.body == (sent == head.size() ? "none" : ""));
            if (sent != head.size())
                CHECK(contains(error.sentence, hang_up ? "the server hung up" : "There was no response within 100 ms"));
        }
    }
}

TEST_CASE("the client also tries the next address if one does not answer") {
    // A listening socket whose queue is full: the kernel drops the packets of more clients.
    const wschat::detail::ListenSocket good(wschat::detail::ListenAddress::parse("127.0.0.1:0"), false);
    wschat::detail::Socket full(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const wschat::detail::SocketAddress black_hole(*wschat::IpAddress::parse("127.0.0.2"), good.address().port);
    REQUIRE(::bind(full.descriptor(), black_hole.get(), black_hole.size) == 0);
    REQUIRE(::listen(full.descriptor(), 0) == 0);
    std::vector<wschat::detail::Socket> fillers;
    for (int i = 0; i < 4; ++i) {
        fillers.emplace_back(wschat::detail::os::open_socket(AF_INET));
        static_cast<void>(::connect(fillers.back().descriptor(), black_hole.get(), black_hole.size));
    }
    ClientOptions with = options();
    with.resolver = [](const std::string&) {
        return std::vector<wschat::IpAddress>{*wschat::IpAddress::parse("127.0.0.2"),
                                              *wschat::IpAddress::parse("127.0.0.1")};
    };
    std::thread server([&] {
        pollfd entry{good.descriptor(), POLLIN, 0};
        ::poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(test::deadline).count()));
        ::sockaddr_storage from{};
        socklen_t size = sizeof from;
        RawClient connection(wschat::detail::Socket(wschat::detail::os::accept(
                                 good.descriptor(), reinterpret_cast<sockaddr*>(&from), &size)),
                             nullptr);
        connection.read_until("\r\n\r\n");
        connection.send(accept_response(connection.received) + test::hex("88 02 03 e8"));
        finish(connection);
    });
    Story story;
    std::string address;
    story.on_open = [&](WebSocketHandler& handler) { address = handler.remote_address(); };
    play(story, "ws://two.example:" + std::to_string(good.address().port) + "/", with);
    server.join();
    CHECK(address == "127.0.0.1");
    CHECK(story.count("close 1000 peer") == 1);

    Story alone;
    ClientOptions hopeless = impatient();
    const ConnectError& error =
        only_failure(alone, "ws://127.0.0.2:" + std::to_string(good.address().port) + "/", hopeless);
    CHECK(error.stage == ConnectStage::connect);
    CHECK(error.sentence == "There was no connection within 100 ms.");
}

TEST_CASE("an IPv6 address may have a zone, which is a network interface of this machine") {
    std::string request;
    const Raw server(
        [&](RawClient& connection, int) {
            connection.read_until("\r\n\r\n");
            request = connection.received;
            connection.send(accept_response(connection.received) + test::hex("88 02 03 e8"));
            finish(connection);
        },
        "[::1]:0");
    const std::string port = std::to_string(server.port());
    for (const std::string zone : {"25lo", "lo", "251"}) {
        CAPTURE(zone);
        Story story;
        play(story, "ws://[::1%" + zone + "]:" + port + "/", options());
        CHECK(story.events == std::vector<std::string>{"open", "close 1000 peer"});
        CHECK(header_of(request, "host") == "[::1]:" + port);
    }
    Story story;
    const ConnectError& error = only_failure(story, "ws://[fe80::1%25none9]:" + port + "/", options());
    CHECK(error.stage == ConnectStage::connect);
    CHECK(error.sentence == "Cannot connect: this machine has no network interface \"none9\".");
    Story without;
    CHECK(contains(only_failure(without, "ws://[fe80::1]:" + port + "/", options()).sentence, "needs a zone"));
}

TEST_CASE("a client that binds to an address uses only its family") {
    EchoServer server;
    Story story;
    story.on_open = [](WebSocketHandler& handler) { handler.close(); };
    ClientOptions with = options();
    with.bind_address = "127.0.0.1";
    play(story, url(server.port()), with);
    CHECK(story.count("open") == 1);
    Story other;
    with.bind_address = "::1";
    CHECK(contains(only_failure(other, url(server.port()), with).sentence, "bind_address"));
}

TEST_CASE("an exception of a handler or its factory ends its own connection and is logged") {
    struct Throwing : WebSocketHandler {
        explicit Throwing(int its_where) : where(its_where) {
            if (where == 0) throw std::runtime_error("constructor");
        }
        void open() override {
            if (where == 1) throw std::runtime_error("open");
        }
        void on_message(const Message&) override {}
        void on_failure(const ConnectError&) override { throw std::runtime_error("on_failure"); }
        int where;
    };
    EchoServer server;
    for (const int where : {0, 1, 2}) {
        CAPTURE(where);
        Client client(test::poller_kind());
        std::vector<std::string> thrown;
        client.on_log([&](const wschat::LogEntry& entry) {
            if (entry.event == "exception") thrown.push_back(entry.fields[1].second);
        });
        client.connect<Throwing>(where == 2 ? "none" : url(server.port()), options(), where);
        run(client);
        REQUIRE_FALSE(thrown.empty());
        CHECK(thrown.front() == (where == 0 ? "constructor" : where == 1 ? "open" : "on_failure"));
    }
}

// ---- redirects and proxies -----------------------------------------------------------------------------------------

TEST_CASE("a redirect is followed on request, without secrets to another server") {
    std::string first_request, second_request;
    const Raw target([&](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        second_request = connection.received;
        connection.send(accept_response(connection.received) + test::hex("88 02 03 e8"));
        finish(connection);
    });
    for (const bool same : {true, false}) {
        CAPTURE(same);
        const Raw first([&](RawClient& connection, int number) {
            connection.read_until("\r\n\r\n");
            if (number == 0) first_request = connection.received;
            else second_request = connection.received;
            if (number == 0)
                connection.send("HTTP/1.1 302 Found\r\nLocation: " +
                                (same ? std::string("/other") : plain_url(target.port(), "/other")) +
                                "\r\nContent-Length: 0\r\n\r\n");
            else connection.send(accept_response(connection.received) + test::hex("88 02 03 e8"));
            finish(connection);
        });
        ClientOptions with = options();
        with.max_redirects = 5;
        with.headers = {{"Authorization", "Bearer secret"}, {"X-A", "b"}};
        with.cookies = {{"session", "secret"}};
        Story story;
        play(story, plain_url(first.port()), with);
        CHECK(story.events == std::vector<std::string>{"open", "close 1000 peer"});
        CHECK(contains(first_request, "Bearer secret"));
        CHECK(contains(second_request, "GET /other HTTP/1.1\r\n"));
        CHECK(contains(second_request, "X-A: b"));
        CHECK(contains(second_request, "secret") == same);
    }
}

TEST_CASE("a redirect in a circle ends after five") {
    const Raw server(answering("HTTP/1.1 307 x\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n"));
    ClientOptions with = options();
    with.max_redirects = 100;
    Story story;
    const ConnectError& error = only_failure(story, plain_url(server.port()), with);
    CHECK(error.status == 307);
    CHECK(error.sentence == "There are too many redirects.");
    CHECK(server.accepted() == 6);
}

TEST_CASE("a client asks a proxy for a tunnel, with its credentials") {
    std::string asked;
    const Raw proxy([&](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        asked = std::exchange(connection.received, std::string());
        connection.send("HTTP/1.0 200 Connection established\r\nX: y\r\n\r\n");
        connection.read_until("\r\n\r\n");
        connection.send(accept_response(connection.received) + test::hex("88 02 03 e8"));
        finish(connection);
    });
    ClientOptions with = options();
    with.proxy = "http://anna:tea@127.0.0.1:" + std::to_string(proxy.port());
    Story story;
    play(story, "ws://chat.example/", with);
    CHECK(story.events == std::vector<std::string>{"open", "close 1000 peer"});
    CHECK(
        asked ==
        "CONNECT chat.example:80 HTTP/1.1\r\nHost: chat.example:80\r\nProxy-Authorization: Basic YW5uYTp0ZWE=\r\n\r\n");
}

// Sets variables of the environment for one test, and then restores them.
class Environment {
public:
    using Variables = std::vector<std::pair<std::string, std::string>>;

    explicit Environment(const Variables& variables) {
        for (const char* name : {"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}) {
            const char* value = std::getenv(name);
            before_.emplace_back(name, value == nullptr ? std::nullopt : std::optional<std::string>(value));
            ::unsetenv(name);
        }
        for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
    }
    Environment(const Environment&) = delete;
    Environment& operator=(const Environment&) = delete;
    ~Environment() {
        for (const auto& [name, value] : before_)
            if (value) ::setenv(name.c_str(), value->c_str(), 1);
            else ::unsetenv(name.c_str());
    }

private:
    std::vector<std::pair<std::string, std::optional<std::string>>> before_;
};

TEST_CASE("the proxy of the environment is used on request, by the scheme and without the hosts of no_proxy") {
    const Raw proxy(answering("HTTP/1.1 403 x\r\nContent-Length: 0\r\n\r\n"));
    const Raw server(answering("HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n"));
    const std::string address = "http://127.0.0.1:" + std::to_string(proxy.port());
    struct Row {
        Environment::Variables variables;
        int status;  // 403: it came through the proxy
    };
    const Row rows[] = {{{{"http_proxy", address}}, 403},
                        {{{"http_proxy", address}, {"no_proxy", "a.example,127.0.0.1"}}, 404},
                        {{{"http_proxy", address}, {"NO_PROXY", "127.0.0.0/8"}}, 404},
                        {{{"http_proxy", address}, {"no_proxy", "127.0.0.1:1"}}, 403},
                        {{{"http_proxy", ""}}, 404},
                        {{{"HTTP_PROXY", address}}, 404},
                        {{{"https_proxy", address}}, 404},
                        {{}, 404}};
    ClientOptions with = options();
    with.proxy_from_environment = true;
    for (const Row& row : rows) {
        CAPTURE(row.variables);
        const Environment environment(row.variables);
        Story story;
        CHECK(only_failure(story, plain_url(server.port()), with).status == row.status);
    }
    const Environment environment(Environment::Variables{{"http_proxy", address}});
    Story unasked, chosen;
    CHECK(only_failure(unasked, plain_url(server.port()), options()).status == 404);
    with.proxy = "http://127.0.0.1:" + std::to_string(server.port());
    CHECK(only_failure(chosen, plain_url(server.port()), with).status == 404);
}

TEST_CASE("an invalid proxy in the environment is a failure of its stage, without its password") {
    for (const char* value : {"http://anna:secret@h:x/", "https://anna:secret@h/", "socks5://anna:secret@h/"}) {
        CAPTURE(value);
        const Environment environment(Environment::Variables{{"http_proxy", value}});
        ClientOptions with = options();
        with.proxy_from_environment = true;
        Story story;
        const ConnectError& error = only_failure(story, "ws://127.0.0.1:1/", with);
        CHECK(error.stage == ConnectStage::proxy);
        CHECK_FALSE(contains(error.sentence, "secret"));
    }
}

TEST_CASE("a proxy that refuses, hangs up or sends too much is a failure of its stage") {
    const std::pair<const char*, int> rows[] = {
        {"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 2\r\n\r\nno", 407},
        {"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 101", 0},
        {"SOCKS", 0}};
    for (const auto& row : rows) {
        const std::string answer = row.first;
        const int status = row.second;
        CAPTURE(answer);
        const Raw proxy(answering(answer));
        ClientOptions with = options();
        with.proxy = "http://127.0.0.1:" + std::to_string(proxy.port());
        Story story;
        const ConnectError& error = only_failure(story, "ws://chat.example/", with);
        CHECK(error.stage == ConnectStage::proxy);
        CHECK(error.status == status);
        CHECK(error.body == (status == 407 ? "no" : ""));
    }
}

// ---- TLS -----------------------------------------------------------------------------------------------------------

#if WSCHAT_OPENSSL

// A private authority with an intermediate one, and certificates of many kinds, as the openssl command makes them.
class Authority {
public:
    Authority() {
        const std::string key = " -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes ";
        write("ca.cnf", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n");
        run("openssl req -x509" + key + "-days 2 -subj /CN=root -keyout root.key -out root.pem");
        run("openssl req" + key + "-subj /CN=middle -keyout middle.key -out middle.csr");
        run("openssl x509 -req -in middle.csr -CA root.pem -CAkey root.key -CAcreateserial -days 2 -extfile ca.cnf "
            "-out middle.pem");
        make("good", "root", "DNS:localhost,IP:127.0.0.1", "-days 2");
        make("expired", "root", "DNS:localhost,IP:127.0.0.1", "-days -1");
        make("other", "root", "DNS:other.example", "-days 2");
        make("below", "middle", "DNS:localhost,IP:127.0.0.1", "-days 2");
        make("kept", "root", "DNS:localhost,IP:127.0.0.1", "-days 2");
        run("cat below.pem middle.pem > chain.pem && cp below.key chain.key");
        write("revoke.cnf", "[ca]\ndefault_ca=here\n[here]\ndatabase=index.txt\ndefault_md=sha256\n");
        write("index.txt", "");
    }
    void revoke(const std::string& name) const {
        run("openssl ca -config revoke.cnf -cert root.pem -keyfile root.key -revoke " + name + ".pem");
    }
    // Of all that was revoked. It expires after so many days.
    void write_revocation_list(const std::string& issuer, const std::string& file, int days) const {
        const std::string until = days < 0 ? "-crl_lastupdate 20200101000000Z -crl_nextupdate 20200102000000Z"
                                           : "-crldays " + std::to_string(days);
        run("openssl ca -config revoke.cnf -cert " + issuer + ".pem -keyfile " + issuer + ".key -gencrl " + until +
            " -out " + file);
    }
    std::string path(const std::string& name) const { return folder_.path() + "/" + name; }
    wschat::TlsOptions server(const std::string& name) const { return {path(name + ".pem"), path(name + ".key")}; }

private:
    void run(const std::string& command) const {
        REQUIRE_MESSAGE(std::system(("cd " + folder_.path() + " && (" + command + ") 2>/dev/null").c_str()) == 0,
                        command);
    }
    void write(const std::string& name, const std::string& text) const {
        test::CertificateFiles::write(path(name), text);
    }
    void make(const std::string& name, const std::string& issuer, const std::string& names,
              const std::string& days) const {
        write(name + ".cnf", "subjectAltName=" + names + "\n");
        run("openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=" + name + " -keyout " + name +
            ".key -out " + name + ".csr");
        run("openssl x509 -req -in " + name + ".csr -CA " + issuer + ".pem -CAkey " + issuer + ".key -CAcreateserial " +
            days + " -extfile " + name + ".cnf -out " + name + ".pem");
    }

    test::TemporaryFolder folder_;
};

TEST_CASE("a certificate is checked: its authority, its dates, its host and its chain") {
    const Authority authority;
    const test::CertificateFiles self_signed("self");
    struct Row {
        std::string certificate, host, sentence;  // empty: it connects
    };
    const Row rows[] = {{"good", "localhost", ""},
                        {"good", "127.0.0.1", ""},
                        {"chain", "localhost", ""},
                        {"good", "127.0.0.2", "IP address mismatch"},
                        {"other", "localhost", "ostname mismatch"},
                        {"expired", "localhost", "certificate has expired"},
                        {"below", "localhost", "unable to get local issuer certificate"},
                        {"self", "localhost", "self"}};
    for (const Row& row : rows) {
        CAPTURE(row.certificate);
        CAPTURE(row.host);
        RunningServer running;
        running.server.route<test::Echo>("/");
        running.server.listen_tls(
            "0.0.0.0:0", row.certificate == "self" ? self_signed.options() : authority.server(row.certificate));
        running.run();
        ClientOptions with = options();
        with.tls.insecure_accept_any_certificate = false;
        with.tls.authorities = authority.path("root.pem");
        with.resolver = [](const std::string&) {
            return std::vector<wschat::IpAddress>{*wschat::IpAddress::parse("127.0.0.1")};
        };
        Story story;
        story.on_open = [](WebSocketHandler& handler) { handler.close(); };
        play(story, "wss://" + row.host + ":" + std::to_string(running.port()) + "/", with);
        if (row.sentence.empty()) {
            CHECK(story.events == std::vector<std::string>{"open", "close 1000 local"});
        } else {
            REQUIRE(story.failures.size() == 1);
            CHECK(story.failures.front().stage == ConnectStage::tls);
            CHECK_MESSAGE(contains(story.failures.front().sentence, row.sentence), story.failures.front().sentence);
        }
    }
}

TEST_CASE("without options, a certificate whose authority the system does not trust is refused") {
    RunningServer running;
    running.server.route<test::Echo>("/");
    test::listen_tls(running.server, "0");
    running.run();
    Story story;
    ClientOptions with;
    with.connect_timeout = test::deadline;
    const ConnectError& error = only_failure(story, "wss://localhost:" + std::to_string(running.port()) + "/", with);
    CHECK(error.stage == ConnectStage::tls);
    CHECK(contains(error.sentence, "certificate verify failed"));
}

TEST_CASE("a pinned key is required, also if any certificate is accepted") {
    RunningServer running;
    running.server.route<test::Echo>("/");
    test::listen_tls(running.server, "0");
    running.run();
    const std::string url = "wss://localhost:" + std::to_string(running.port()) + "/";
    Story story;
    ClientOptions with = options();
    with.tls.pinned_keys = {"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="};
    const std::string sentence = only_failure(story, url, with).sentence;
    const std::size_t at = sentence.find("it is ");
    REQUIRE(at != std::string::npos);
    with.tls.pinned_keys.push_back(sentence.substr(at + 6, 44));
    Story second;
    second.on_open = [](WebSocketHandler& handler) { handler.close(); };
    play(second, url, with);
    CHECK(second.count("open") == 1);
}

// A proxy that knows only CONNECT, and keeps the first request.
class TunnelProxy {
public:
    TunnelProxy()
        : raw_([this](RawClient& client, int) {
              client.read_until("\r\n\r\n");
              asked_ = std::exchange(client.received, std::string());
              const std::string port = asked_.substr(asked_.find(':') + 1);
              wschat::detail::Socket server(wschat::detail::os::open_socket(AF_INET));
              const wschat::detail::SocketAddress to(*wschat::IpAddress::parse("127.0.0.1"), std::atoi(port.c_str()));
              static_cast<void>(::connect(server.descriptor(), to.get(), to.size));
              client.send("HTTP/1.1 200 Connection established\r\n\r\n");
              forward(client.descriptor(), server.descriptor());
          }) {}
    std::string url(const std::string& host) const { return "http://" + host + ":" + std::to_string(raw_.port()); }
    const std::string& asked() const { return asked_; }

private:
    // Copies both ways until one side ends.
    static void forward(int first, int second) {
        pollfd entries[] = {{first, POLLIN, 0}, {second, POLLIN, 0}};
        char bytes[16384];
        for (;;) {
            if (::poll(entries, 2, static_cast<int>(std::chrono::milliseconds(test::deadline).count())) <= 0) return;
            for (const int i : {0, 1}) {
                if (entries[i].revents == 0) continue;
                const ssize_t size = ::recv(entries[i].fd, bytes, sizeof bytes, MSG_DONTWAIT);
                if (size < 0 && errno == EAGAIN) continue;
                if (size <= 0) return;
                for (ssize_t sent = 0; sent < size;) {
                    pollfd ready{entries[1 - i].fd, POLLOUT, 0};
                    ::poll(&ready, 1, 1000);
                    const ssize_t count = ::send(ready.fd, bytes + sent, static_cast<std::size_t>(size - sent),
                                                 MSG_NOSIGNAL | MSG_DONTWAIT);
                    if (count < 0 && errno != EAGAIN) return;
                    sent += (std::max)(count, ssize_t{0});
                }
            }
        }
    }

    std::string asked_;
    Raw raw_;
};

TEST_CASE("TLS goes through the tunnel of a proxy, and verifies the server behind it") {
    const Authority authority;
    for (const bool trusted : {true, false}) {
        CAPTURE(trusted);
        RunningServer running;
        running.server.route<test::Echo>("/");
        running.server.listen_tls("127.0.0.1:0", authority.server(trusted ? "good" : "other"));
        running.run();
        std::vector<std::string> resolved;
        Story story;
        std::string asked;
        {
            const TunnelProxy proxy;
            ClientOptions with = options();
            with.tls.insecure_accept_any_certificate = false;
            with.tls.authorities = authority.path("root.pem");
            with.proxy = proxy.url("proxy.example");
            with.resolver = [&](const std::string& host) {
                resolved.push_back(host);
                return std::vector<wschat::IpAddress>{*wschat::IpAddress::parse("127.0.0.1")};
            };
            story.on_open = [](WebSocketHandler& handler) { handler.write_message(std::string(200'000, 'x')); };
            story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(); };
            play(story, "wss://localhost:" + std::to_string(running.port()) + "/", with);
            asked = proxy.asked();
        }
        CHECK(contains(asked, "CONNECT localhost:" + std::to_string(running.port()) + " HTTP/1.1\r\n"));
        CHECK(resolved == std::vector<std::string>{"proxy.example"});  // the proxy resolves the server
        if (trusted) {
            CHECK(story.count(std::string(200'000, 'x')) == 1);
            CHECK(story.count("close 1000 local") == 1);
        } else {
            REQUIRE(story.failures.size() == 1);
            CHECK(story.failures.front().stage == ConnectStage::tls);
            CHECK(contains(story.failures.front().sentence, "ostname mismatch"));
        }
    }
}

TEST_CASE("https_proxy is the proxy for wss, also in upper case") {
    const Raw proxy(answering("HTTP/1.1 403 x\r\nContent-Length: 0\r\n\r\n"));
    for (const char* name : {"https_proxy", "HTTPS_PROXY"}) {
        CAPTURE(name);
        const Environment environment(
            Environment::Variables{{name, "http://127.0.0.1:" + std::to_string(proxy.port())}});
        ClientOptions with = options();
        with.proxy_from_environment = true;
        Story story;
        const ConnectError& error = only_failure(story, "wss://chat.example/", with);
        CHECK(error.stage == ConnectStage::proxy);
        CHECK(error.status == 403);
    }
}

TEST_CASE("a revoked certificate is refused, and so is a certificate whose authority has no revocation list") {
    const Authority authority;
    const auto outcome = [&](const std::string& certificate, const std::string& lists) -> std::string {
        RunningServer running;
        running.server.route<test::Echo>("/");
        running.server.listen_tls("127.0.0.1:0", authority.server(certificate));
        running.run();
        ClientOptions with = options();
        with.tls.insecure_accept_any_certificate = false;
        with.tls.authorities = authority.path("root.pem");
        with.tls.revocation_lists = lists.empty() ? "" : authority.path(lists);
        Story story;
        story.on_open = [](WebSocketHandler& handler) { handler.close(); };
        play(story, "wss://127.0.0.1:" + std::to_string(running.port()) + "/", with);
        if (story.failures.empty()) return story.events.front();
        CHECK(story.failures.front().stage == ConnectStage::tls);
        return story.failures.front().sentence;
    };
    authority.revoke("good");
    authority.write_revocation_list("root", "revoked.crl", 2);
    authority.write_revocation_list("root", "old.crl", -1);
    CHECK(outcome("good", "") == "open");
    CHECK(contains(outcome("good", "revoked.crl"), "certificate revoked"));
    CHECK(outcome("kept", "revoked.crl") == "open");
    CHECK(contains(outcome("kept", "old.crl"), "CRL has expired"));
    CHECK(contains(outcome("chain", "revoked.crl"), "unable to get certificate CRL"));
    authority.write_revocation_list("middle", "middle.crl", 2);
    CHECK(outcome("chain", "middle.crl") == "open");
}

TEST_CASE("a client sends its certificate to a server that requests one") {
    const Authority authority;
    struct Naming : WebSocketHandler {
        void open() override { write_message(request().client_certificate()); }
        void on_message(const Message&) override {}
    };
    RunningServer running;
    running.server.route<Naming>("/");
    wschat::TlsOptions tls = authority.server("good");
    tls.client_authorities = authority.path("root.pem");
    running.server.listen_tls("0", tls);
    running.run();
    const std::string url = "wss://localhost:" + std::to_string(running.port()) + "/";
    ClientOptions with = options();
    with.tls.insecure_accept_any_certificate = false;
    with.tls.authorities = authority.path("root.pem");
    with.tls.certificate = authority.path("other.pem");
    with.tls.key = authority.path("other.key");
    Story story;
    story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(); };
    play(story, url, with);
    CHECK(story.count("CN=other") == 1);
    Story without;
    with.tls.certificate = with.tls.key = "";
    play(without, url, with);
    CHECK(without.failures.size() == 1);
    CHECK(without.count("open") == 0);
}

TEST_CASE("a server that does not speak TLS or sends nothing fails in the stage of TLS") {
    const Raw plain(answering("HTTP/1.1 400 x\r\n\r\n"));
    const Raw hangs_up([](RawClient& connection, int) { connection.read_some(); });
    const Raw silent([](RawClient& connection, int) { connection.read_to_end(); });
    Story first, second, third;
    CHECK(contains(only_failure(second, "wss://127.0.0.1:" + std::to_string(hangs_up.port()), options()).sentence,
                   "The TLS handshake failed: "));
    const ConnectError& error = only_failure(third, "wss://127.0.0.1:" + std::to_string(silent.port()), impatient());
    CHECK(error.stage == ConnectStage::tls);
    CHECK(error.sentence == "There was no TLS handshake within 100 ms.");
    const Raw talks_first([](RawClient& connection, int) {
        connection.send("HTTP/1.1 400 x\r\n\r\n");
        connection.read_to_end();
    });
    CHECK(contains(only_failure(first, "wss://127.0.0.1:" + std::to_string(talks_first.port()), options()).sentence,
                   "the peer speaks plain text"));
}

TEST_CASE("a redirect from wss to ws is not followed") {
    RunningServer running;
    struct Redirecting : test::Echo {
        std::optional<wschat::Response> prepare(const wschat::Request&) override {
            return wschat::Response::redirect("ws://127.0.0.1:1/");
        }
    };
    running.server.route<Redirecting>("/ws");
    test::listen_tls(running.server, "0");
    running.run();
    ClientOptions with = options();
    with.max_redirects = 5;
    Story story;
    const ConnectError& error = only_failure(story, "wss://localhost:" + std::to_string(running.port()) + "/ws", with);
    CHECK(error.status == 302);
    CHECK(error.sentence == "A redirect from wss:// to ws:// is not followed: it would end the encryption.");
}

TEST_CASE("messages over TLS are echoed unchanged") {
    RunningServer running;
    running.server.route<test::Echo>("/");
    test::listen_tls(running.server, "0");
    running.run();
    Story story;
    const std::string large(700 * 1000, 'x');
    story.on_open = [&](WebSocketHandler& handler) { handler.write_message(large); };
    story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(); };
    play(story, "wss://localhost:" + std::to_string(running.port()) + "/", options());
    CHECK(story.count(large) == 1);
    CHECK(story.count("close 1000 local") == 1);
}

#else

TEST_CASE("a program without TLS reports it for wss") {
    Story story;
    const ConnectError& error = only_failure(story, "wss://localhost/", reconnecting());
    CHECK(error.stage == ConnectStage::url);
    CHECK(contains(error.sentence, "built without TLS"));
}

#endif

// ---- connecting again ----------------------------------------------------------------------------------------------

TEST_CASE("a client connects again after each loss, with a new handler and one socket at a time") {
    std::atomic<int> open_sockets{0};
    bool overlap = false;
    const Raw server([&](RawClient& connection, int number) {
        overlap = overlap || open_sockets.exchange(1) != 0;
        connection.read_until("\r\n\r\n");
        if (number % 3 == 0) {
            connection.send("HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n");
        } else {
            connection.send(accept_response(connection.received));
            if (number == 20) connection.send(test::hex("88 02 03 e8"));
        }
        if (number == 20) connection.read_to_end();
        open_sockets = 0;
    });
    Story story;
    play(story, plain_url(server.port()), reconnecting());
    CHECK(server.accepted() == 21);
    CHECK(story.count("http") == 7);
    CHECK(story.count("open") == 14);
    CHECK(story.events.back() == "close 1000 peer");
    CHECK_FALSE(overlap);
}

TEST_CASE("a client does not connect again after 1000, 1008, its own close and a refusal") {
    struct Row {
        std::string after_upgrade;  // empty: a 403 instead
        bool client_closes;
        std::string last_event;
    };
    const Row rows[] = {{"88 02 03 e8", false, "close 1000 peer"},
                        {"88 02 03 f0", false, "close 1008 peer"},
                        {"88 02 03 e9", true, "close 1001 local"},
                        {"", false, "http"}};
    for (const Row& row : rows) {
        CAPTURE(row.last_event);
        const Raw server([&](RawClient& connection, int) {
            connection.read_until("\r\n\r\n");
            if (row.after_upgrade.empty()) {
                connection.send("HTTP/1.1 403 x\r\nContent-Length: 0\r\n\r\n");
            } else {
                const std::size_t size = connection.received.size();
                connection.send(accept_response(connection.received));
                if (row.client_closes) connection.read_at_least(size + 8);
                connection.send(test::hex(row.after_upgrade));
            }
            finish(connection);
        });
        Story story;
        if (row.client_closes) story.on_open = [](WebSocketHandler& handler) { handler.close(CloseCode::going_away); };
        play(story, plain_url(server.port()), reconnecting());
        CHECK(story.events.back() == row.last_event);
        CHECK(server.accepted() == 1);
    }
}

TEST_CASE("each kind of failure is tried again, except a bad URL and a refusal") {
    struct Row {
        std::string url;     // empty: that of a server that gives the answer
        std::string answer;  // empty: it says nothing
        ConnectStage stage;
        bool again;
    };
    const std::string upgrade = "HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    const Row rows[] = {
        {"chat.example", "", ConnectStage::url, false},
        {"ws://unknown.example/", "", ConnectStage::resolve, true},
        {"ws://127.0.0.1:1/", "", ConnectStage::connect, true},
        {"", "HTTP/1.1 301 x\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", ConnectStage::http, false},
        {"", "HTTP/1.1 401 x\r\nContent-Length: 0\r\n\r\n", ConnectStage::http, false},
        {"", "HTTP/1.1 200 x\r\nContent-Length: 0\r\n\r\n", ConnectStage::http, false},
        {"", "HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n", ConnectStage::http, true},
        {"", "garbage\r\n", ConnectStage::http, true},
        {"", upgrade + "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n", ConnectStage::upgrade, true},
        {"", "", ConnectStage::http, true},
#if WSCHAT_OPENSSL
        {"wss", "garbage\r\n", ConnectStage::tls, true},
        {"wss", "", ConnectStage::tls, true},
#endif
    };
    for (const Row& row : rows) {
        CAPTURE(row.url);
        CAPTURE(row.answer);
        const Raw server([&](RawClient& connection, int) {
            connection.read_at_least(1);
            connection.send(row.answer);
            connection.read_to_end();
        });
        ClientOptions with = reconnecting();
        with.resolver = [](const std::string&) { return std::vector<wschat::IpAddress>(); };
        if (row.answer.empty()) with.connect_timeout = row.url.empty() || row.url == "wss" ? 100ms : test::deadline;
        std::string to = row.url.empty() ? plain_url(server.port()) : row.url;
        if (to == "wss") to = "wss://127.0.0.1:" + std::to_string(server.port()) + "/";
        Client client(test::poller_kind());
        Story story;
        wschat::Client::ConnectionId id = 0;
        story.on_failure = [&](WebSocketHandler& handler, const ConnectError&) {
            if (story.failures.size() >= 2) handler.loop().post([&] { client.disconnect(id); });
        };
        id = client.connect<Actor>(to, with, std::ref(story));
        run(client);
        CHECK((row.again ? story.failures.size() >= 2 : story.failures.size() == 1));
        CHECK(story.events.size() == story.failures.size());
        for (const ConnectError& error : story.failures) {
            CHECK(error.stage == row.stage);
            CHECK_FALSE(error.sentence.empty());
            CHECK(error.retry_in.has_value() == row.again);
        }
    }
}

TEST_CASE("before_attempt changes the URL and the headers of each attempt") {
    std::vector<std::string> requests;
    {
        const Raw server([&](RawClient& connection, int number) {
            connection.read_until("\r\n\r\n");
            requests.push_back(connection.received);
            connection.send(accept_response(connection.received));
            if (number == 2) connection.send(test::hex("88 02 03 e8"));
            finish(connection);
        });
        ClientOptions with = reconnecting();
        int attempts = 0;
        with.before_attempt = [&](wschat::ClientAttempt& attempt) {
            attempt.url += "?last=" + std::to_string(++attempts);
            attempt.headers.emplace_back("X-Token", std::to_string(attempts));
        };
        Story story;
        play(story, plain_url(server.port()), with);
        CHECK(story.count("open") == 3);
    }
    REQUIRE(requests.size() == 3);
    CHECK(contains(requests[0], "GET /?last=1 HTTP/1.1"));
    CHECK(contains(requests[2], "GET /?last=3 HTTP/1.1"));
    CHECK(contains(requests[2], "X-Token: 3"));

    ClientOptions bad = options();
    bad.before_attempt = [](wschat::ClientAttempt& attempt) { attempt.headers.emplace_back("A", "b\nc"); };
    Story story;
    CHECK(contains(only_failure(story, "ws://127.0.0.1:1/", bad).sentence, "\"A\" is not a header field"));
}

TEST_CASE("1012 and 1013 delay the next attempt, by a sixth of the largest delay at least") {
    for (const char* code : {"88 02 03 f4", "88 02 03 f5"}) {
        CAPTURE(code);
        const Raw server([&](RawClient& connection, int) {
            connection.read_until("\r\n\r\n");
            connection.send(accept_response(connection.received) + test::hex(code));
            finish(connection);
        });
        Client client(test::poller_kind());
        Story story;
        ClientOptions with = reconnecting();
        with.reconnect->max_delay = 12h;
        client.connect<Actor>(plain_url(server.port()), with, std::ref(story));
        const auto end = wschat::Clock::now() + test::deadline;
        // The only timer that is left is that of the next attempt.
        while (wschat::Clock::now() < end && client.poll(10ms))
            if (!story.events.empty() && story.events.back() != "open" && client.next_timeout() > 1h) break;
        CHECK(story.count("open") == 1);
        CHECK(client.next_timeout() > 1h + 50min);
        CHECK(client.next_timeout() <= 4h);
        CHECK(client.connections() == 1);
    }
}

TEST_CASE("Retry-After delays the next attempt") {
    const Raw server([&](RawClient& connection, int number) {
        connection.read_until("\r\n\r\n");
        if (number == 0) connection.send("HTTP/1.1 503 x\r\nRetry-After: 1200\r\nContent-Length: 0\r\n\r\n");
        connection.read_to_end();
    });
    Client client(test::poller_kind());
    Story story;
    wschat::Client::ConnectionId id = 0;
    story.on_failure = [&](WebSocketHandler& handler, const ConnectError&) {
        handler.loop().post([&] { client.disconnect(id); });
    };
    ClientOptions with = reconnecting();
    id = client.connect<Actor>(plain_url(server.port()), with, std::ref(story));
    run(client);
    REQUIRE(story.failures.size() == 1);
    REQUIRE(story.failures.front().retry_in);
    CHECK(*story.failures.front().retry_in >= 1200s);
    CHECK(client.connections() == 0);
}

TEST_CASE("delays are random and grow up to their limit") {
    const Raw server(answering("HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n", true));
    Client client(test::poller_kind());
    Story story;
    wschat::Client::ConnectionId id = 0;
    story.on_failure = [&](WebSocketHandler& handler, const ConnectError&) {
        if (story.failures.size() == 40) handler.loop().post([&] { client.disconnect(id); });
    };
    ClientOptions with = reconnecting();
    id = client.connect<Actor>(plain_url(server.port()), with, std::ref(story));
    run(client);
    std::set<wschat::Duration> delays;
    wschat::Duration largest{};
    for (const ConnectError& error : story.failures) {
        REQUIRE(error.retry_in);
        delays.insert(*error.retry_in);
        largest = (std::max)(largest, *error.retry_in);
    }
    CHECK(*story.failures.front().retry_in <= 1ms);
    CHECK(largest <= 6ms);
    CHECK(largest > 2ms);
    CHECK(delays.size() > 30);
}

TEST_CASE("a connection that lived long enough resets the delay") {
    // Without the reset, the delay before the last of these connections would be hours.
    constexpr int connections = 25;
    const Raw server([&](RawClient& connection, int number) {
        connection.read_until("\r\n\r\n");
        connection.send(accept_response(connection.received));
        if (number == connections - 1) connection.send(test::hex("88 02 03 e8"));
        finish(connection);
    });
    ClientOptions with = reconnecting();
    with.reconnect->max_delay = 12h;
    with.reconnect->stable = 0s;
    Story story;
    play(story, plain_url(server.port()), with);
    CHECK(server.accepted() == connections);
    CHECK(story.count("open") == connections);
}

TEST_CASE("after fifty restarts of a server each client is connected once") {
    int port = 0;
    Client client(test::poller_kind());
    Story story;
    std::atomic<int> opened{0};
    story.on_open = [&](WebSocketHandler&) { ++opened; };
    std::thread servers([&] {
        for (int i = 0; i < 50; ++i) {
            RunningServer running;
            running.server.route<test::Echo>("/");
            const int before = opened;
            test::listen(running.server, std::to_string(port));
            port = running.server.port();
            running.run();
            if (i == 0) {
                client.loop().post([&, at = port] {
                    ClientOptions with = reconnecting();
                    client.connect<Actor>(url(at), with, std::ref(story));
                });
            }
            if (!test::eventually([&] { return opened > before; })) break;
            CHECK(running.metrics().websockets_open == 1);
        }
        client.shutdown();
    });
    const auto keep = client.loop().call_every(1h, [] {});
    client.loop().call_later(test::deadline * 3, [&] { client.loop().stop(); });
    while (opened < 50 && client.poll(10ms) | true)
        if (opened == 50) break;
    servers.join();
    while (client.poll(10ms)) {
    }
    client.loop().cancel(keep);
    CHECK(opened == 50);
    CHECK(story.count("open") == 50);
}

// ---- lifetime ------------------------------------------------------------------------------------------------------

TEST_CASE("a client on the loop of a server shares its rooms") {
    struct Member : WebSocketHandler {
        void open() override { room("lobby").join(*this); }
        void on_message(const Message& message) override { room("lobby").broadcast(message); }
    };
    EchoServer other;
    Story story;
    wschat::ServerOptions server_options;
    server_options.handle_signals = false;
    server_options.poller = test::poller_kind();
    wschat::Server server(server_options);
    server.route<Member>("/");
    test::listen(server);
    Client bridge(server.loop());
    CHECK_THROWS_AS(bridge.run(), wschat::Error);
    CHECK_THROWS_AS(bridge.on_log(nullptr), wschat::Error);
    story.on_open = [](WebSocketHandler& handler) { handler.room("lobby").join(handler); };
    std::atomic<bool> arrived{false};
    story.on_message = [&](WebSocketHandler&, const Message&) {
        arrived = true;
        server.shutdown();
    };
    bridge.connect<Actor>(url(other.port()), reconnecting(), std::ref(story));
    std::thread peer([&, port = server.port()] {
        test::WsClient member(port, "/");
        CHECK(test::eventually([&] {
            if (!arrived) member.send("hello");
            return arrived.load();
        }));
    });
    server.run();
    peer.join();
    CHECK(story.count("hello") >= 1);
    CHECK(story.count("close 1001 shutdown") == 1);
    CHECK(bridge.connections() == 0);
}

TEST_CASE("a client can be destroyed in each stage") {
    const Raw silent(answering(""));
    EchoServer echo;
    const auto released = std::make_shared<std::atomic<bool>>(false);
    ClientOptions hanging = options();
    hanging.resolver = [=](const std::string&) {
        while (!*released) std::this_thread::yield();
        return std::vector<wschat::IpAddress>{*wschat::IpAddress::parse("127.0.0.1")};
    };
    Story story;
    {
        Client client(test::poller_kind());
        client.connect<Actor>("ws://slow.example/", hanging, std::ref(story));
        client.connect<Actor>(plain_url(silent.port()), options(), std::ref(story));
        client.connect<Actor>(url(echo.port()), options(), std::ref(story));
        while (story.count("open") == 0) client.poll(10ms);
        client.connect<Actor>(plain_url(silent.port()), options(), std::ref(story));
    }
    CHECK(story.events == std::vector<std::string>{"open", "close 1006 shutdown"});
    *released = true;
}

TEST_CASE("callbacks may connect, disconnect and shut down") {
    EchoServer server;
    Client client(test::poller_kind());
    Story story;
    int left = 5;
    const auto connect = [&] { client.connect<Actor>(url(server.port()), options(), std::ref(story)); };
    story.on_open = [](WebSocketHandler& handler) { handler.close(); };
    story.on_close = [&](WebSocketHandler&) {
        if (--left > 0) connect();
        else client.connect<Actor>("none", options(), std::ref(story));
    };
    story.on_failure = [&](WebSocketHandler&, const ConnectError&) { client.shutdown(); };
    connect();
    run(client);
    CHECK(story.count("open") == 5);
    CHECK(story.count("url") == 1);
    CHECK_FALSE(client.disconnect(1));
    CHECK_THROWS_AS(client.disconnect(1, CloseCode::abnormal), wschat::Error);
}

TEST_CASE("the constructor of a handler may disconnect its client") {
    struct Leaving : WebSocketHandler {
        explicit Leaving(Client* client) { client->disconnect(1); }
        void open() override { FAIL("the connection was given up"); }
        void on_message(const Message&) override {}
    };
    EchoServer server;
    Client client(test::poller_kind());
    client.connect<Leaving>(url(server.port()), options(), &client);
    run(client);
    CHECK(client.connections() == 0);
}

TEST_CASE("a shutdown closes with 1001, and aborts connections that do not answer by its deadline") {
    const Raw silent([](RawClient& connection, int) {
        connection.read_until("\r\n\r\n");
        connection.send(accept_response(connection.received));
        connection.read_to_end();
    });
    Story story;
    Client client(test::poller_kind());
    story.on_open = [&](WebSocketHandler&) { client.shutdown(20ms); };
    client.connect<Actor>(plain_url(silent.port()), reconnecting(), std::ref(story));
    run(client);
    CHECK(story.events == std::vector<std::string>{"open", "close 1006 shutdown"});
}

TEST_CASE("a thousand clients live on one loop") {
    // A thousand handshakes of TLS at the same time take long on a busy machine.
    EchoServer server(test::with_handshake_timeout(0s));
    Client client(test::poller_kind());
    ClientOptions patient = options();
    patient.connect_timeout = 5min;
    Story story;
    constexpr std::size_t count = 1000;
    std::size_t open = 0;
    story.on_open = [&](WebSocketHandler& handler) {
        handler.room("all").join(handler);
        if (++open == count) client.rooms()["all"].broadcast("ping");
    };
    story.on_message = [](WebSocketHandler& handler, const Message&) { handler.close(); };
    for (std::size_t i = 0; i < count; ++i) client.connect<Actor>(url(server.port()), patient, std::ref(story));
    run(client, patient.connect_timeout);
    CHECK(story.count("ping") == count);
    CHECK(story.count("close 1000 local") == count);
}

TEST_CASE("a client on a port without a listener does not leak descriptors or rooms over many attempts") {
    int port = 0;
    {
        const Raw server([](RawClient&, int) {});
        port = server.port();
    }
    Client client(test::poller_kind());
    Story story;
    wschat::Client::ConnectionId id = 0;
    story.on_failure = [&](WebSocketHandler& handler, const ConnectError&) {
        handler.room("lobby").join(handler);
        if (story.failures.size() == 200) handler.loop().post([&] { client.disconnect(id); });
    };
    ClientOptions with = reconnecting();
    with.reconnect->max_delay = 1ms;
    const int before = ::dup(0);
    ::close(before);
    id = client.connect<Actor>(plain_url(port), with, std::ref(story));
    run(client);
    const int after = ::dup(0);
    ::close(after);
    CHECK(before == after);
    CHECK(client.rooms().size() == 0);
    CHECK(story.failures.size() == 200);
}

TEST_CASE("messages of all sizes around the buffers come back to a client that reads late") {
    RunningServer server(test::without_pings());
    server.server.route<test::LateEcho>("/");
    server.start();
    const std::vector<std::size_t> sizes = test::sizes_around_buffers();
    std::size_t next = 0, wrong = 0;
    bool first = true;
    Story story;
    story.on_open = [&](WebSocketHandler& handler) {
        handler.write_binary("large");
        for (const std::size_t size : sizes) handler.write_binary(test::bytes_of_size(size));
        // The loop of the client reads nothing before the server holds a part of its answer.
        handler.loop().call_later(
            1ms, [&] { CHECK(server.eventually([&] { return server.server.metrics().backlog_bytes > 64 * 1024; })); });
    };
    story.on_message = [&](WebSocketHandler& handler, const Message& got) {
        story.events.clear();
        const std::size_t size = first ? 0 : sizes[next++];
        if (got.data() != (first ? test::more_than_kernel_takes() : test::bytes_of_size(size))) ++wrong;
        first = false;
        if (next == sizes.size()) handler.close();
    };
    ClientOptions with = options();
    with.limits.max_message_size = with.limits.max_backlog = 16'000'000;
    play(story, url(server.port()), with);
    CHECK(next == sizes.size());
    CHECK(wrong == 0);
}

TEST_SUITE_END();
