// Section 8 and its part in section 14: each function of a handler, over real sockets.
#include "support.hpp"

#include <set>

namespace {

using test::contains;
using test::hex;
using test::RawClient;
using test::RunningServer;
using test::with_limits;
using test::WsClient;
using wschat::BacklogPolicy;
using wschat::CloseCause;
using wschat::CloseCode;
using wschat::Error;
using wschat::HandlerRef;
using wschat::Json;
using wschat::Message;
using wschat::Opcode;
using wschat::Request;
using wschat::Response;
using wschat::ServerOptions;
using wschat::WebSocketHandler;
using wschat::WriteStatus;
using wschat::detail::Event;
using namespace std::chrono_literals;

// Events in order. Callbacks on the loop's thread add them, and the test's thread reads them.
class EventLog {
public:
    void add(std::string line) {
        const std::lock_guard<std::mutex> lock(mutex_);
        lines_.push_back(std::move(line));
        changed_.notify_all();
    }
    // Waits for a line with this beginning.
    bool wait_for(std::string_view begin) {
        std::unique_lock<std::mutex> lock(mutex_);
        return changed_.wait_for(lock, test::deadline, [&] { return count_locked(begin) != 0; });
    }
    std::size_t count(std::string_view begin) const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return count_locked(begin);
    }
    std::string text() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::string all;
        for (const std::string& line : lines_) (all += all.empty() ? "" : ", ") += line;
        return all;
    }

private:
    std::size_t count_locked(std::string_view begin) const {
        std::size_t n = 0;
        for (const std::string& line : lines_) n += std::string_view(line).substr(0, begin.size()) == begin ? 1u : 0u;
        return n;
    }

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<std::string> lines_;
};

class Scripted;

// The behavior of scripted handlers. By default they echo messages and record their callbacks.
struct Script {
    std::function<std::optional<Response>(Scripted&)> prepare;
    std::function<bool(Scripted&, std::string_view)> check_origin;
    std::function<std::string(const std::vector<std::string_view>&)> select_subprotocol;
    std::function<void(Scripted&, const Message&)> on_message;
    // Runs in each callback, with its name: "prepare", "open", "message", "close", "ping", "pong", "drain".
    std::function<void(Scripted&, std::string_view)> on_callback;

    EventLog events;
    std::mutex mutex;
    std::set<Scripted*> handlers;  // that exist; without the lock only for the thread of the only loop
};

class Scripted : public WebSocketHandler {
public:
    explicit Scripted(Script& script) : script_(script) {
        const std::lock_guard<std::mutex> lock(script_.mutex);
        script_.handlers.insert(this);
    }
    ~Scripted() override {
        {
            const std::lock_guard<std::mutex> lock(script_.mutex);
            script_.handlers.erase(this);
        }
        script_.events.add("destroyed");
    }

    // From "?name=anna" in the request.
    std::string name() const { return request().query("name").value_or(std::string()); }

    std::optional<Response> prepare(const Request&) override {
        record("prepare", "");
        return script_.prepare ? script_.prepare(*this) : std::nullopt;
    }
    bool check_origin(std::string_view origin) override {
        return script_.check_origin ? script_.check_origin(*this, origin) : WebSocketHandler::check_origin(origin);
    }
    std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
        return script_.select_subprotocol ? script_.select_subprotocol(offered) : std::string();
    }
    void open() override { record("open", ""); }
    void on_message(const Message& message) override {
        record("message", message.size() < 100 ? message.data() : "large");
        if (script_.on_message) script_.on_message(*this, message);
        else write_message(message);
    }
    void on_close() override {
        record("close", std::to_string(number(close_code())) + " " + std::string(to_string(close_cause())));
    }
    void on_ping(std::string_view payload) override { record("ping", payload.size() < 100 ? payload : "large"); }
    void on_pong(std::string_view payload) override { record("pong", payload); }
    void on_drain() override { record("drain", ""); }

    void record(std::string_view callback, std::string_view detail) {
        std::string line = name().empty() ? "" : name() + ": ";
        line += callback;
        if (!detail.empty()) (line += ' ') += detail;
        script_.events.add(line);
        if (script_.on_callback) script_.on_callback(*this, callback);
    }

private:
    Script& script_;
};

// A server with scripted handlers at "/", and its log.
struct Fixture {
    explicit Fixture(ServerOptions options = {}) : running(std::move(options)) {
        running.server.route<Scripted>("/", std::ref(script));
        running.server.on_log([this](const wschat::LogEntry& entry) { log.add(to_string(entry)); });
    }
    Fixture& start() {
        running.start();
        return *this;
    }
    int port() const { return running.port(); }
    // Calls the function on the thread of the only loop with the only handler.
    template <class Function>
    auto with_handler(Function function) {
        return running.on_loop([&] { return function(**script.handlers.begin()); });
    }
    bool still_serves() {
        WsClient client(port(), "/?name=probe");
        client.send("are you there");
        return client.next() == "are you there";
    }

    Script script;
    EventLog log;
    RunningServer running;
};

wschat::Limits quick_timeouts() {
    wschat::Limits limits;
    limits.ping_interval = limits.ping_timeout = limits.closing_timeout = 30ms;
    return limits;
}
// Makes the kernel refuse output early.
void shrink_buffers(WsClient& client) {
    const int size = 16 * 1024;
    ::setsockopt(client.raw.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    ::setsockopt(client.raw.socket().descriptor(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}
std::string status_of(const WsClient& client) { return client.head.substr(0, client.head.find(' ', 9)); }

}  // namespace

TEST_SUITE("handler") {
    // ---- the handshake ---------------------------------------------------------------------------------------------

    TEST_CASE("prepare rejects a handshake with its Response") {
        Fixture fixture;
        fixture.script.prepare = [](Scripted& self) -> std::optional<Response> {
            if (self.request().query("token") == "secret") return std::nullopt;
            return std::move(Response(401, "Who are you?\n").set_header("WWW-Authenticate", "Bearer"));
        };
        fixture.start();
        WsClient refused(fixture.port(), "/?token=wrong");
        CHECK(status_of(refused) == "HTTP/1.1 401");
        CHECK(contains(refused.head, "WWW-Authenticate: Bearer\r\n"));
        CHECK(refused.raw.read_to_end());
        CHECK(refused.raw.received == "Who are you?\n");
        // Without open() there is no on_close().
        CHECK(fixture.script.events.text() == "prepare, destroyed");
        WsClient allowed(fixture.port(), "/?token=secret");
        CHECK(allowed.is_open());
    }

    TEST_CASE("prepare can redirect") {
        Fixture fixture;
        fixture.script.prepare = [](Scripted&) { return Response::redirect("/login", 303); };
        fixture.start();
        WsClient client(fixture.port());
        CHECK(status_of(client) == "HTTP/1.1 303");
        CHECK(contains(client.head, "Location: /login\r\n"));
    }

    TEST_CASE("the default check_origin accepts the server's host and allow_origins") {
        struct Row {
            std::string origin;  // PORT is the server's
            std::vector<std::string> allowed;
            bool accepted;
        };
        std::vector<Row> rows = {
            {"http://127.0.0.1:PORT", {}, !test::over_tls()},
            {"https://127.0.0.1:PORT", {}, true},  // a proxy can terminate TLS
            {"HTTPS://127.0.0.1:PORT/", {}, true},
            {"wss://127.0.0.1:PORT", {}, true},
            {"https://chat.example", {"https://chat.example"}, true},
            {"https://CHAT.example:443", {"https://chat.example"}, true},
            {"https://chat.example", {"HTTPS://Chat.Example:443"}, true},
            {"https://127.0.0.1:PORT", {"https://chat.example"}, true},
            {"https://tea.chat.example", {"https://*.chat.example"}, true},
            {"capacitor://localhost", {"capacitor://localhost"}, true},
            {"null", {"null"}, true},
            {"https://anywhere.example", {"https://chat.example", "*"}, true},
        };
        for (const char* origin :
             {"http://127.0.0.1", "http://127.0.0.1:1", "http://localhost:PORT", "http://127.0.0.1.evil.example:PORT",
              "http://evil.example/127.0.0.1:PORT", "http://evil127.0.0.1:PORT", "http://127.0.0.1:PORT.",
              "http://127.0.0.1.:PORT", "ftp://127.0.0.1:PORT", "null", ""})
            rows.push_back({origin, {}, false});
        for (const char* origin : {"http://chat.example", "https://chat.example:8443", "https://evil.chat.example",
                                   "https://chat.example.evil", "https://chat.example.", "null"})
            rows.push_back({origin, {"https://chat.example"}, false});
        for (const Row& row : rows) {
            CAPTURE(row.origin);
            Fixture fixture;
            fixture.running.server.allow_origins(row.allowed);
            fixture.start();
            std::string origin = row.origin;
            if (const std::size_t at = origin.find("PORT"); at != std::string::npos)
                origin.replace(at, 4, std::to_string(fixture.port()));
            WsClient client(fixture.port(), "/", "Origin: " + origin + "\r\n");
            CHECK(status_of(client) == (row.accepted ? "HTTP/1.1 101" : "HTTP/1.1 403"));
            CHECK(client.is_open() == row.accepted);
        }
    }

    TEST_CASE("the 403 names the rejected origin and the allowed ones") {
        Fixture fixture;
        fixture.running.server.allow_origins({"https://chat.example", "https://www.chat.example"});
        fixture.start();
        WsClient client(fixture.port(), "/", "Origin: https://evil.example\r\n");
        CHECK(client.raw.read_to_end());
        const std::string host = "127.0.0.1:" + std::to_string(fixture.port());
        CHECK(contains(client.raw.received, "The origin \"https://evil.example\" is refused; allowed: " +
                                                std::string(test::over_tls() ? "https " : "") + "pages of " + host +
                                                ", https://chat.example, https://www.chat.example. The Host is \"" +
                                                host + "\", perhaps from a proxy: "));
        CHECK(contains(client.raw.received, "call allow_origins({\"https://evil.example\"}).\n"));
        CHECK(fixture.log.wait_for("info refused status=\"403\""));
        CHECK(fixture.script.events.count("open") == 0);
    }

    TEST_CASE("a handler can override check_origin") {
        Fixture fixture;
        fixture.script.check_origin = [](Scripted&, std::string_view origin) { return origin == "null"; };
        fixture.start();
        CHECK(WsClient(fixture.port(), "/", "Origin: null\r\n").is_open());
        CHECK(!WsClient(fixture.port(), "/", "Origin: https://127.0.0.1:" + std::to_string(fixture.port()) + "\r\n")
                   .is_open());
    }

    TEST_CASE("a non-browser client may omit Origin unless require_origin is set") {
        for (const bool required : {false, true}) {
            ServerOptions options;
            options.require_origin = required;
            Fixture fixture(options);
            fixture.script.check_origin = [&](Scripted&, std::string_view) {
                fixture.script.events.add("check_origin");
                return true;
            };
            fixture.start();
            WsClient client(fixture.port());
            CHECK(status_of(client) == (required ? "HTTP/1.1 403" : "HTTP/1.1 101"));
            CHECK(fixture.script.events.count("check_origin") == 0);
            CHECK(WsClient(fixture.port(), "/", "Origin: http://any.example\r\n").is_open());
            CHECK(fixture.script.events.count("check_origin") == 1);
        }
    }

    TEST_CASE("two Origin headers are a 400") {
        Fixture fixture;
        fixture.script.check_origin = [](Scripted&, std::string_view) { return true; };
        fixture.start();
        WsClient client(fixture.port(), "/", "Origin: http://a.example\r\nOrigin: http://b.example\r\n");
        CHECK(status_of(client) == "HTTP/1.1 400");
    }

    TEST_CASE("the server sends the selected subprotocol only if the client offered it") {
        struct Row {
            std::string offered;
            std::string selected;
            std::string received;  // by select_subprotocol()
            std::string sent;
        };
        const Row rows[] = {
            {"chat.v2, chat.v1", "chat.v1", "chat.v2 chat.v1", "chat.v1"},
            {"chat.v2,chat.v1,\tchat.v0", "chat.v0", "chat.v2 chat.v1 chat.v0", "chat.v0"},
            {"chat.v1\r\nSec-WebSocket-Protocol: chat.v2", "chat.v2", "chat.v1 chat.v2", "chat.v2"},
            {"chat.v1", "", "chat.v1", ""},
            {"chat.v1", "chat.v2", "chat.v1", ""},
            {"chat.v1", "CHAT.v1", "chat.v1", ""},
            {"chat.v1, chat.v2", "chat.v1, chat.v2", "chat.v1 chat.v2", ""},
            {"chat.v1", "chat.v1\r\nX-Forged: 1", "chat.v1", ""},
        };
        for (const Row& row : rows) {
            CAPTURE(row.offered);
            CAPTURE(row.selected);
            std::string received;
            Fixture fixture;
            fixture.script.select_subprotocol = [&](const std::vector<std::string_view>& offered) -> std::string {
                for (const std::string_view name : offered) (received += received.empty() ? "" : " ") += name;
                return row.selected;
            };
            fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
                if (callback == "open")
                    fixture.script.events.add("selected " + std::string(self.selected_subprotocol()) + ".");
            };
            fixture.start();
            RawClient client(fixture.port());
            std::string request = wschat::detail::handshake_request("127.0.0.1", "/", WsClient::key);
            request.insert(request.size() - 2, std::string("Sec-WebSocket-Protocol: ") + row.offered + "\r\n");
            client.send(request);
            REQUIRE(client.read_until("\r\n\r\n"));
            CHECK(client.received.substr(0, 12) == "HTTP/1.1 101");
            CHECK(received == row.received);
            CHECK(!contains(client.received, "X-Forged"));
            const wschat::Fields answer(std::string_view(client.received).substr(client.received.find('\n') + 1));
            CHECK(answer.find("sec-websocket-protocol").value_or("") == row.sent);
            CHECK(answer.count("sec-websocket-protocol") == (row.sent.empty() ? 0 : 1));
            CHECK(fixture.script.events.wait_for("selected " + row.sent + "."));
            const bool fault = row.selected != row.sent;
            CHECK(fixture.log.count("warning subprotocol_not_offered") == (fault ? 1 : 0));
        }
    }

    TEST_CASE("select_subprotocol is not called without an offer") {
        bool called = false;
        Fixture fixture;
        fixture.script.select_subprotocol = [&](const std::vector<std::string_view>&) {
            called = true;
            return std::string("chat");
        };
        fixture.start();
        WsClient client(fixture.port());
        CHECK(client.is_open());
        CHECK(!called);
        CHECK(!contains(client.head, "Sec-WebSocket-Protocol"));
    }

    TEST_CASE("an exception before the 101 sends a 500 and is logged") {
        struct Throwing : Scripted {
            explicit Throwing(Script& script) : Scripted(script) { throw std::runtime_error("from the constructor"); }
        };
        Fixture fixture;
        fixture.running.server.route<Throwing>("/throwing", std::ref(fixture.script));
        fixture.script.prepare = [](Scripted& self) -> std::optional<Response> {
            if (self.name() == "prepare") throw std::runtime_error("from prepare");
            return std::nullopt;
        };
        fixture.script.check_origin = [](Scripted& self, std::string_view) -> bool {
            if (self.name() == "origin") throw std::runtime_error("from check_origin");
            return true;
        };
        fixture.script.select_subprotocol = [](const std::vector<std::string_view>&) -> std::string {
            throw std::runtime_error("from select_subprotocol");
        };
        fixture.start();
        CHECK(status_of(WsClient(fixture.port(), "/throwing")) == "HTTP/1.1 500");
        CHECK(status_of(WsClient(fixture.port(), "/?name=prepare")) == "HTTP/1.1 500");
        CHECK(status_of(WsClient(fixture.port(), "/?name=origin", "Origin: http://a.example\r\n")) == "HTTP/1.1 500");
        CHECK(status_of(WsClient(fixture.port(), "/", "Sec-WebSocket-Protocol: chat\r\n")) == "HTTP/1.1 500");
        for (const std::string where : {"the constructor", "prepare", "check_origin", "select_subprotocol"})
            CHECK(contains(fixture.log.text(), "what=\"from " + where + "\""));
        CHECK(fixture.script.events.count("open") == 0);
        CHECK(fixture.script.events.count("close") == 0);
        CHECK(fixture.still_serves());
    }

    TEST_CASE("an exception before the 101 that is not a std::exception sends a 500 too") {
        Fixture fixture;
        fixture.script.prepare = [](Scripted& self) -> std::optional<Response> {
            if (self.name() == "prepare") throw 42;
            return std::nullopt;
        };
        fixture.start();
        CHECK(status_of(WsClient(fixture.port(), "/?name=prepare")) == "HTTP/1.1 500");
        CHECK(fixture.log.wait_for("error exception in=\"handshake\""));
        CHECK(fixture.still_serves());
    }

    TEST_CASE("only a trusted proxy can forward a client address") {
        struct Row {
            std::vector<std::string> trusted;
            std::string headers;
            std::string address;
        };
        const Row rows[] = {
            {{}, "", "127.0.0.1"},
            {{}, "X-Forwarded-For: 203.0.113.7\r\n", "127.0.0.1"},
            {{"10.0.0.0/8"}, "X-Forwarded-For: 203.0.113.7\r\n", "127.0.0.1"},
            {{"127.0.0.1"}, "", "127.0.0.1"},
            {{"127.0.0.1"}, "X-Forwarded-For: 203.0.113.7\r\n", "203.0.113.7"},
            {{"127.0.0.0/8"}, "x-forwarded-for:203.0.113.7\r\n", "203.0.113.7"},
            // The client itself can write the part before the address that the proxy adds.
            {{"127.0.0.1"}, "X-Forwarded-For: 10.1.1.1, 203.0.113.7\r\n", "203.0.113.7"},
            {{"127.0.0.1"}, "X-Forwarded-For: 10.1.1.1\r\nX-Forwarded-For: 203.0.113.7\r\n", "203.0.113.7"},
            {{"127.0.0.1", "10.0.0.0/8"}, "X-Forwarded-For: 192.0.2.1, 203.0.113.7, 10.1.1.1\r\n", "203.0.113.7"},
            {{"127.0.0.1", "10.0.0.0/8"}, "X-Forwarded-For: 10.2.2.2, 10.1.1.1\r\n", "10.2.2.2"},
            {{"127.0.0.1"}, "X-Forwarded-For: 2001:db8::7\r\n", "2001:db8::7"},
            {{"127.0.0.1"}, "X-Forwarded-For: 203.0.113.7:51234\r\n", "203.0.113.7"},
            {{"127.0.0.1"}, "X-Forwarded-For: [2001:db8::7]:443\r\n", "2001:db8::7"},
            {{"127.0.0.1"}, "Forwarded: for=\"[2001:db8::7]:443\"\r\n", "2001:db8::7"},
            {{"127.0.0.1"}, "X-Forwarded-For: unknown\r\n", "127.0.0.1"},
            {{"127.0.0.1"}, "X-Forwarded-For: 203.0.113.7, unknown\r\n", "127.0.0.1"},
            {{"127.0.0.1"}, "X-Forwarded-For: \r\n", "127.0.0.1"},
        };
        for (const Row& row : rows) {
            CAPTURE(row.headers);
            Fixture fixture;
            fixture.running.server.trusted_proxies(row.trusted);
            fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
                if (callback == "open") fixture.script.events.add("from " + self.remote_address() + ".");
            };
            fixture.start();
            WsClient client(fixture.port(), "/", row.headers);
            CHECK(client.is_open());
            CHECK(fixture.script.events.wait_for("from "));
            CHECK(fixture.script.events.count("from " + row.address + ".") == 1);
        }
    }

    TEST_CASE("a trusted proxy reports the scheme, and with https a page over http is foreign") {
        for (const bool trusted : {true, false}) {
            CAPTURE(trusted);
            Fixture fixture;
            if (trusted) fixture.running.server.trusted_proxies({"127.0.0.1"});
            fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
                if (callback == "open") fixture.script.events.add("over " + std::string(self.request().scheme()) + ".");
            };
            fixture.start();
            const std::string own = "://127.0.0.1:" + std::to_string(fixture.port()) + "\r\n";
            const std::string https = "X-Forwarded-Proto: https\r\n";
            CHECK(WsClient(fixture.port(), "/", https + "Origin: https" + own).is_open());
            CHECK(fixture.script.events.wait_for("over "));
            CHECK(fixture.script.events.count(trusted || test::over_tls() ? "over https." : "over http.") == 1);
            CHECK(WsClient(fixture.port(), "/", https + "Origin: http" + own).is_open() ==
                  (!trusted && !test::over_tls()));
        }
    }

    TEST_CASE("a text that a trusted proxy writes in place of an address is logged") {
        Fixture fixture;
        fixture.running.server.trusted_proxies({"127.0.0.1", "10.0.0.0/8"});
        fixture.start();
        CHECK(WsClient(fixture.port(), "/", "X-Forwarded-For: 203.0.113.7, unix:, 10.1.1.1\r\n").is_open());
        CHECK(
            fixture.log.wait_for("warning forwarded_address_unreadable peer=\"127.0.0.1\" forwarded=\"unix:\" "
                                 "used=\"10.1.1.1\""));
    }

    struct Greeter : WebSocketHandler {
        Greeter(std::string greeting, int& opened, std::shared_ptr<const std::string> signature)
            : greeting_(std::move(greeting)), opened_(opened), signature_(std::move(signature)) {}
        void open() override {
            ++opened_;
            greeting_ += request().param("who");
            write_message(greeting_ + *signature_);
        }
        void on_message(const Message&) override {}

    private:
        std::string greeting_;
        int& opened_;
        std::shared_ptr<const std::string> signature_;
    };

    TEST_CASE("each handler gets the arguments of its route, as copies or by std::ref") {
        int opened = 0;
        RunningServer running;
        running.server.route<Greeter>("/{who}", "hello ", std::ref(opened), std::make_shared<const std::string>("!"));
        running.start();
        CHECK(WsClient(running.port(), "/anna").next() == "hello anna!");
        CHECK(WsClient(running.port(), "/tea%20room").next() == "hello tea room!");
        running.stop();
        CHECK(opened == 2);
    }

    // ---- open and close --------------------------------------------------------------------------------------------

    TEST_CASE("open, on_message and on_close run in order before the handler is destroyed") {
        Fixture fixture;
        fixture.start();
        {
            WsClient client(fixture.port());
            client.send("one");
            client.send("two");
            CHECK(client.next() == "one");
            CHECK(client.next() == "two");
            client.close();
            CHECK(client.close_code() == CloseCode::normal);
        }
        CHECK(fixture.script.events.wait_for("destroyed"));
        CHECK(fixture.script.events.text() == "prepare, open, message one, message two, close 1000 peer, destroyed");
    }

    TEST_CASE("frames that arrive with the handshake are processed after open") {
        Fixture fixture;
        fixture.start();
        RawClient client(fixture.port());
        // "Hello" of RFC 6455 5.7, masked.
        client.send(wschat::detail::handshake_request("127.0.0.1", "/", WsClient::key) +
                    hex("81 85 37 fa 21 3d 7f 9f 4d 51 58"));
        CHECK(client.read_until(hex("81 05 48 65 6c 6c 6f")));
        CHECK(fixture.script.events.text() == "prepare, open, message Hello");
    }

    // Sends the message and waits for the end of the connection.
    std::function<void(WsClient&)> send_and_wait(const char* message) {
        return [message](WsClient& client) {
            client.send(message);
            client.close_code();
        };
    }

    TEST_CASE("open and on_close run exactly once for each kind of end") {
        struct Row {
            std::string how;
            std::function<void(WsClient&)> end;
        };
        const Row rows[] = {
            {"the peer closes", [](WsClient& c) { c.close(); }},
            {"the peer closes and hangs up",
             [](WsClient& c) {
                 c.close();
                 c.raw.close();
             }},
            {"the peer closes twice", [](WsClient& c) { c.raw.send(hex("88 80 00 00 00 00 88 80 00 00 00 00")); }},
            {"the peer hangs up", [](WsClient& c) { c.raw.close(); }},
            {"the peer shuts down its sending side", [](WsClient& c) { c.raw.shutdown_send(); }},
            {"the peer resets", [](WsClient& c) { c.raw.reset(); }},
            {"the peer breaks the protocol",
             [](WsClient& c) { c.raw.send(hex("83 80 00 00 00 00 88 80 00 00 00 00")); }},
            {"the handler closes", send_and_wait("close")},
            {"the handler closes twice", send_and_wait("close twice")},
            {"the handler throws", send_and_wait("throw")},
            {"both close",
             [](WsClient& c) {
                 c.send("close");
                 c.close();
                 c.close_code();
             }},
        };
        for (const Row& row : rows) {
            CAPTURE(row.how);
            Fixture fixture;
            fixture.script.on_message = [](Scripted& self, const Message& message) {
                if (message.text() == "throw") throw std::runtime_error("thrown");
                self.close(4001);
                if (message.text() == "close twice") self.close(4002);
            };
            fixture.start();
            WsClient client(fixture.port());
            REQUIRE(client.is_open());
            row.end(client);
            CHECK(fixture.script.events.wait_for("destroyed"));
            client.raw.close();
            fixture.running.stop();
            CHECK(fixture.script.events.count("open") == 1);
            CHECK(fixture.script.events.count("close") == 1);
            CHECK(fixture.script.events.count("destroyed") == 1);
        }
    }

    TEST_CASE("open and on_close run exactly once if open throws or closes") {
        for (const std::string what : {"throw", "close", "close and throw"})
            for (const bool with_frames : {false, true}) {
                CAPTURE(what);
                CAPTURE(with_frames);
                Fixture fixture;
                fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
                    if (callback != "open") return;
                    if (what != "throw") self.close(4001);
                    if (what != "close") throw std::runtime_error("thrown");
                };
                fixture.start();
                RawClient client(fixture.port());
                client.send(wschat::detail::handshake_request("127.0.0.1", "/", WsClient::key) +
                            (with_frames ? hex("81 85 37 fa 21 3d 7f 9f 4d 51 58 88 80 00 00 00 00") : ""));
                CHECK(client.read_until("\r\n\r\n"));
                CHECK(client.received.substr(0, 12) == "HTTP/1.1 101");
                CHECK(client.read_until(hex(what == "throw" ? "88 10 03 f3" : "88 02 0f a1")));
                client.close();
                CHECK(fixture.script.events.wait_for("destroyed"));
                CHECK(fixture.script.events.count("open") == 1);
                CHECK(fixture.script.events.count("message") == 0);
                CHECK(fixture.script.events.count("close") == 1);
            }
    }

    TEST_CASE("close code, reason and cause for each kind of end") {
        struct Row {
            std::string how;
            std::function<void(Fixture&, WsClient&)> end;
            unsigned code;
            CloseCause cause;
            std::string reason;
        };
        const Row rows[] = {
            {"peer", [](Fixture&, WsClient& c) { c.close(CloseCode{4000}, "bye"); }, 4000, CloseCause::peer, "bye"},
            {"peer without a code", [](Fixture&, WsClient& c) { c.raw.send(hex("88 80 00 00 00 00")); }, 1005,
             CloseCause::peer, ""},
            {"local", [](Fixture&, WsClient& c) { send_and_wait("close")(c); }, 4001, CloseCause::local, ""},
            {"protocol error", [](Fixture&, WsClient& c) { c.raw.send(hex("81 00")); }, 1002,
             CloseCause::protocol_error, "frame from a client is not masked"},
            {"text that is not UTF-8", [](Fixture&, WsClient& c) { c.send("\xff"); }, 1007, CloseCause::protocol_error,
             "text is not UTF-8"},
            {"a message too big", [](Fixture&, WsClient& c) { c.send(std::string(100'001, 'x')); }, 1009,
             CloseCause::protocol_error, "message is larger than 100000 bytes"},
            {"hung up", [](Fixture&, WsClient& c) { c.raw.close(); }, 1006, CloseCause::connection_lost,
             "the peer hung up without a Close frame"},
            {"exception", [](Fixture&, WsClient& c) { send_and_wait("throw")(c); }, 1011, CloseCause::handler_exception,
             "internal error"},
            {"shutdown",
             [](Fixture& w, WsClient& c) {
                 w.running.server.shutdown();
                 c.close_code();
             },
             1001, CloseCause::shutdown, ""},
        };
        for (const Row& row : rows) {
            CAPTURE(row.how);
            wschat::Limits limits;
            limits.max_message_size = 100'000;
            std::string reason;
            Fixture fixture(with_limits(limits));
            fixture.script.on_message = [](Scripted& self, const Message& message) {
                if (message.text() == "throw") throw std::runtime_error("thrown");
                self.close(4001, "enough");
            };
            fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
                if (callback == "open") CHECK(self.close_cause() == CloseCause::none);
                if (callback == "close") reason = self.close_reason();
                if (callback == "close") CHECK(!self.is_open());
            };
            fixture.start();
            WsClient client(fixture.port());
            row.end(fixture, client);
            CHECK(fixture.script.events.wait_for("destroyed"));
            CHECK(fixture.script.events.count("close " + std::to_string(row.code) + " " +
                                              std::string(to_string(row.cause))) == 1);
            CHECK(reason == row.reason);
        }
    }

    TEST_CASE("a peer that does not answer a ping is closed with the cause ping timeout") {
        Fixture fixture(with_limits(quick_timeouts()));
        fixture.start();
        WsClient client(fixture.port());
        CHECK(fixture.script.events.wait_for("close 1006 ping timeout"));
        CHECK(client.raw.read_until(hex("89 00")));
    }

    // The handler closes and the client does not answer. Returns what the client received.
    std::string received_until_closing_timeout(const wschat::Limits& limits) {
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [](Scripted& self, const Message&) { self.close(4001, "bye"); };
        fixture.start();
        WsClient client(fixture.port());
        client.send("close");
        CHECK(fixture.script.events.wait_for("close 1006 closing timeout"));
        CHECK(client.raw.read_to_end());
        return client.raw.received;
    }

    TEST_CASE("a peer that does not answer our Close frame is closed with the cause closing timeout") {
        wschat::Limits limits = quick_timeouts();
        limits.ping_interval = 0s;
        CHECK(contains(received_until_closing_timeout(limits), hex("88 05 0f a1 62 79 65")));
    }

    TEST_CASE("the closing timeout works with all other timers off") {
        wschat::Limits limits;
        limits.handshake_timeout = limits.ping_interval = 0s;
        limits.closing_timeout = 30ms;
        CHECK(contains(received_until_closing_timeout(limits), hex("88 05 0f a1 62 79 65")));
    }

    TEST_CASE("a peer that resets is closed with the cause connection lost") {
        Fixture fixture;
        fixture.start();
        WsClient client(fixture.port());
        client.raw.reset();
        CHECK(fixture.script.events.wait_for("close 1006 connection lost"));
    }

    TEST_CASE("the peer receives our close code and reason") {
        Fixture fixture;
        fixture.script.on_message = [](Scripted& self, const Message&) {
            self.write_message("last words");
            self.close(CloseCode{4242}, "caf\xc3\xa9 closes");
            CHECK(self.write_message("too late") == WriteStatus::closed);
            CHECK(self.ping("too late") == WriteStatus::closed);
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("go");
        CHECK(client.next() == "last words");
        CHECK(client.close_code() == CloseCode{4242});
        CHECK(client.connection.close_reason() == "caf\xc3\xa9 closes");
        CHECK(fixture.script.events.wait_for("close 4242 local"));
    }

    TEST_CASE("close without arguments sends 1000 without a reason") {
        Fixture fixture;
        fixture.script.on_message = [](Scripted& self, const Message&) { self.close(); };
        fixture.start();
        WsClient client(fixture.port());
        client.send("go");
        CHECK(client.raw.read_until(hex("88 02 03 e8")));
    }

    TEST_CASE("a shutdown closes with 1001 and a reason") {
        Fixture fixture;
        fixture.start();
        WsClient client(fixture.port());
        fixture.running.server.shutdown();
        CHECK(client.close_code() == CloseCode::going_away);
        CHECK(client.connection.close_reason() == "server is shutting down");
        CHECK(fixture.script.events.wait_for("close 1001 shutdown"));
    }

    TEST_CASE("on_close runs if the server is destroyed with open connections") {
        EventLog closed;
        std::optional<Fixture> fixture(std::in_place);
        fixture->script.on_callback = [&](Scripted&, std::string_view callback) {
            if (callback == "close") closed.add("close");
        };
        fixture->start();
        WsClient client(fixture->port());
        REQUIRE(client.is_open());
        fixture->running.stop(0ms);
        fixture.reset();
        CHECK(closed.count("close") == 1);
    }

    TEST_CASE("the request is valid as long as the handler") {
        Fixture fixture;
        fixture.running.server.route<Scripted>("/rooms/{room}", std::ref(fixture.script));
        fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
            const Request& request = self.request();
            fixture.script.events.add(std::string(callback) + " in " + std::string(request.param("room")) + " by " +
                                      std::string(request.header("user-agent")) + " with " +
                                      request.query("token").value_or("nothing"));
        };
        fixture.start();
        {
            WsClient client(fixture.port(), "/rooms/tea%20room?token=a+b", "User-Agent: test\r\n");
            client.send(std::string(200'000, 'x'));
            CHECK(client.next());
            client.close();
            client.close_code();
        }
        CHECK(fixture.script.events.wait_for("destroyed"));
        for (const std::string callback : {"prepare", "open", "message", "close"})
            CHECK(fixture.script.events.count(callback + " in tea room by test with a b") == 1);
    }

    // ---- exceptions ------------------------------------------------------------------------------------------------

    // Triggers one of the callbacks of the client's handler.
    void trigger(WsClient & client, std::string_view callback) {
        if (callback == "ping") client.ping("x");
        else if (callback == "pong") client.connection.send_control(Opcode::pong, "x");
        else if (callback == "message" || callback == "drain" || callback == "timer" || callback == "post")
            client.send(callback);
        else if (callback == "close") client.close();
        client.flush();
    }
    // Triggers the callbacks that need a message first.
    void on_trigger(Scripted & self, const Message& message) {
        const HandlerRef ref = self.ref();
        if (message.text() == "drain")
            for (int i = 0; i < 60; ++i) self.write_message(std::string(10 * 1024, 'd'));
        else if (message.text() == "timer")
            self.loop().call_later(0ms, [ref] { static_cast<Scripted*>(ref.get())->record("timer", ""); });
        else if (message.text() == "post")
            ref.post([](WebSocketHandler& handler) { static_cast<Scripted&>(handler).record("post", ""); });
        else if (message.text() != "message") self.write_message(message);
    }

    TEST_CASE("an exception in a callback closes its connection with 1011 and is logged") {
        for (const std::string callback : {"open", "message", "ping", "pong", "drain"})
            for (const bool standard : {true, false}) {
                CAPTURE(callback);
                CAPTURE(standard);
                Fixture fixture;
                fixture.script.on_message = &on_trigger;
                fixture.script.on_callback = [&](Scripted& self, std::string_view now) {
                    if (now != callback || self.name() != "victim") return;
                    if (standard) throw std::runtime_error("thrown in " + callback);
                    throw 42;
                };
                fixture.start();
                WsClient witness(fixture.port(), "/?name=witness");
                WsClient victim(fixture.port(), "/?name=victim");
                trigger(victim, callback);
                CHECK(victim.close_code() == CloseCode::internal_error);
                CHECK(victim.connection.close_reason() == "internal error");
                CHECK(fixture.script.events.wait_for("victim: close 1011 handler exception"));
                CHECK(fixture.log.wait_for("error exception in="));
                CHECK(contains(fixture.log.text(),
                               standard ? "what=\"thrown in " + callback + "\"" : "what=\"not a std::exception\""));
                CHECK(fixture.running.metrics().handler_exceptions == 1);
                witness.send("still here");
                CHECK(witness.next() == "still here");
            }
    }

    TEST_CASE("an exception in on_close is only logged") {
        for (const bool standard : {true, false}) {
            Fixture fixture;
            fixture.script.on_callback = [&](Scripted&, std::string_view callback) {
                if (callback != "close") return;
                if (standard) throw std::runtime_error("thrown");
                throw 42;
            };
            fixture.start();
            {
                WsClient client(fixture.port());
                client.close(CloseCode{4000});
                CHECK(client.close_code() == CloseCode{4000});
            }
            CHECK(fixture.script.events.wait_for("destroyed"));
            CHECK(fixture.script.events.text() == "prepare, open, close 4000 peer, destroyed");
            CHECK(fixture.log.wait_for("error exception in=\"on_close\""));
            CHECK(fixture.still_serves());
        }
    }

    TEST_CASE("an exception in a timer or in posted work closes no connection") {
        for (const std::string callback : {"timer", "post"}) {
            CAPTURE(callback);
            Fixture fixture;
            fixture.script.on_message = &on_trigger;
            fixture.script.on_callback = [&](Scripted&, std::string_view now) {
                if (now == callback) throw std::runtime_error("thrown");
            };
            fixture.start();
            WsClient client(fixture.port());
            trigger(client, callback);
            CHECK(fixture.log.wait_for("error exception in=\"" + callback + "\" what=\"thrown\""));
            client.send("still here");
            CHECK(client.next() == "still here");
        }
    }

    TEST_CASE("an exception in the log function has no effect") {
        const test::OneLoop one_loop;
        Fixture fixture;
        fixture.running.server.on_log([](const wschat::LogEntry& entry) {
            if (entry.event != "listening") throw std::runtime_error("no space for the log");
        });
        fixture.script.on_message = [](Scripted& self, const Message& message) {
            if (message.text() == "throw") throw std::runtime_error("thrown");
            self.room("all").join(self);
            self.write_message(message);
        };
        fixture.start();
        WsClient witness(fixture.port(), "/?name=witness"), victim(fixture.port(), "/?name=victim"),
            leaver(fixture.port());
        for (WsClient* client : {&witness, &victim, &leaver}) {
            client->send("join");
            CHECK(client->next() == "join");
        }
        victim.send("throw");
        CHECK(victim.close_code() == CloseCode::internal_error);
        leaver.close();
        CHECK(leaver.close_code() == CloseCode::normal);
        CHECK(fixture.script.events.wait_for("close 1000 peer"));
        CHECK(fixture.running.on_loop([&] { return fixture.running.server.rooms()["all"].size(); }) == 1);
        witness.send("still here");
        CHECK(witness.next() == "still here");
    }

    // ---- writing ---------------------------------------------------------------------------------------------------

    TEST_CASE("write_message and write_binary send text, bytes and received messages") {
        Fixture fixture;
        fixture.script.on_message = [](Scripted& self, const Message& message) {
            CHECK(self.write_message("caf\xc3\xa9") == WriteStatus::sent);
            CHECK(self.write_message(std::string("\xff\x00\x01", 3), Opcode::binary) == WriteStatus::sent);
            CHECK(self.write_message(message) == WriteStatus::sent);
            CHECK(self.write_message("") == WriteStatus::sent);
            CHECK(self.write_binary("\xfe") == WriteStatus::sent);
            CHECK(self.write_volatile("v") == WriteStatus::sent);
            CHECK(self.write_volatile("\xfd", Opcode::binary) == WriteStatus::sent);
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("\xff", Opcode::binary);
        CHECK(client.raw.read_until(
            hex("81 05 63 61 66 c3 a9 82 03 ff 00 01 82 01 ff 81 00 82 01 fe 81 01 76 82 01 fd")));
        CHECK(fixture.running.metrics().messages_sent == 7);
    }

    // Whether call(target) compiles.
    template <class Target, class Call>
    constexpr bool compiles(Call) {
        return std::is_invocable_v<Call, Target>;
    }
#define COMPILES(...) [](auto&& target) -> decltype(target.__VA_ARGS__) { return target.__VA_ARGS__; }

    TEST_CASE("a braced list of strings is not a message") {
        static_assert(compiles<Scripted&>(COMPILES(write_message("a"))));
        static_assert(compiles<Scripted&>(COMPILES(write_message(std::string("a")))));
        static_assert(compiles<Scripted&>(COMPILES(write_message(std::string_view("a"), Opcode::binary))));
        static_assert(compiles<Scripted&>(COMPILES(write_message(Message("a")))));
        static_assert(compiles<Scripted&>(COMPILES(write_json({{"type", "hello"}}))));
        static_assert(!compiles<Scripted&>(COMPILES(write_message({"type", "hello"}))));
        static_assert(!compiles<Scripted&>(COMPILES(write_message({{"type", "hello"}}))));
        static_assert(!compiles<Scripted&>(COMPILES(write_binary({"type", "hello"}))));
        static_assert(!compiles<Scripted&>(COMPILES(write_volatile({"type", "hello"}))));
        static_assert(!compiles<const HandlerRef&>(COMPILES(write_message({"type", "hello"}))));
        static_assert(!compiles<const HandlerRef&>(COMPILES(write_binary({"type", "hello"}))));
        static_assert(compiles<const HandlerRef&>(COMPILES(write_json({{"type", "hello"}}))));
        static_assert(!compiles<wschat::Room&>(COMPILES(broadcast({"type", "hello"}))));
        static_assert(!compiles<wschat::Room&>(COMPILES(broadcast({"type", "hello"}, nullptr))));
        static_assert(!compiles<wschat::Room&>(COMPILES(broadcast_binary({"type", "hello"}))));
        static_assert(!compiles<wschat::Room&>(COMPILES(broadcast_volatile({"type", "hello"}, nullptr))));
        static_assert(compiles<wschat::Room&>(COMPILES(broadcast_json({{"type", "hello"}}, nullptr))));
        static_assert(!compiles<wschat::Rooms&>(COMPILES(encode({"type", "hello"}))));
    }
#undef COMPILES

    struct LikeNlohmann {
        std::string dump(int indent = -1) const { return indent < 0 ? R"({"by":"dump"})" : "indented"; }
    };
    struct InvalidDump {
        std::string dump() const { return "\xff"; }
    };

    TEST_CASE("write_json takes braces, a Json and any object with dump()") {
        Fixture fixture;
        fixture.script.on_message = [](Scripted& self, const Message& message) {
            CHECK(self.write_json({{"type", "say"}, {"text", message.text()}, {"n", 3}}) == WriteStatus::sent);
            self.write_json(Json::array(std::vector<int>{1, 2}));
            self.write_json(LikeNlohmann());
            self.write_json(Json("\xff\"\n"));
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("a \"b\"\n");
        CHECK(client.next() == R"({"type":"say","text":"a \"b\"\n","n":3})");
        CHECK(client.next() == "[1,2]");
        CHECK(client.next() == R"({"by":"dump"})");
        CHECK(client.next() == "\"\xEF\xBF\xBD\\\"\\n\"");
    }

    TEST_CASE("a ping reaches the peer and on_pong gets the answer") {
        Fixture fixture;
        fixture.script.on_message = [](Scripted& self, const Message&) {
            CHECK(self.ping("are you there") == WriteStatus::sent);
            CHECK(self.ping() == WriteStatus::sent);
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("go");
        CHECK(client.next(Event::Kind::ping) == "are you there");
        CHECK(client.next(Event::Kind::ping) == "");
        CHECK(fixture.script.events.wait_for("pong are you there"));
        CHECK(fixture.script.events.wait_for("pong"));
    }

    TEST_CASE("a ping of the peer is answered and calls on_ping") {
        Fixture fixture;
        fixture.start();
        WsClient client(fixture.port());
        client.ping("hey");
        CHECK(client.next(Event::Kind::pong) == "hey");
        CHECK(fixture.script.events.wait_for("ping hey"));
    }

    TEST_CASE("illegal calls throw an Error that explains them and have no effect") {
        EventLog sentences;
        Fixture fixture;
        const auto try_to = [&](const std::function<void()>& call) { sentences.add(test::error_of(call)); };
        fixture.script.on_message = [&](Scripted& self, const Message&) {
            try_to([&] { self.write_message("\xff"); });
            try_to([&] { self.write_message("\xc3"); });
            try_to([&] { self.write_message("x", Opcode::ping); });
            try_to([&] { self.write_message("x", Opcode::continuation); });
            try_to([&] { self.ping(std::string(126, 'x')); });
            try_to([&] { self.close(999); });
            try_to([&] { self.close(1005); });
            try_to([&] { self.close(1006); });
            try_to([&] { self.close(5000); });
            try_to([&] { self.close(-1); });
            try_to([&] { self.close(66'536); });
            try_to([&] { self.close(1000, std::string(124, 'x')); });
            try_to([&] { self.close(CloseCode::normal, "\xff"); });
            try_to([&] { self.write_volatile("\xff"); });
            try_to([&] { self.server().rooms().encode("\xff"); });
            try_to([&] { self.write_json(InvalidDump()); });
            try_to([&] { self.ref().write_message("\xff"); });
            try_to([&] { self.ref().close(CloseCode::abnormal); });
            CHECK(self.is_open());
            self.write_message("still open");
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("go");
        CHECK(client.next() == "still open");
        CHECK(sentences.text() ==
              "write_message: the text is not UTF-8; send it as Opcode::binary, "
              "write_message: the text is not UTF-8; send it as Opcode::binary, "
              "write_message: the opcode is neither text nor binary, "
              "write_message: the opcode is neither text nor binary, "
              "ping: a payload of 126 bytes is over 125, "
              "close: 999 is not a code that may be sent, "
              "close: 1005 is not a code that may be sent, "
              "close: 1006 is not a code that may be sent, "
              "close: 5000 is not a code that may be sent, "
              "close: -1 is not a code that may be sent, "
              "close: 66536 is not a code that may be sent, "
              "close: a reason of 124 bytes is over 123, "
              "close: the reason is not UTF-8, "
              "write_volatile: the text is not UTF-8; send it as Opcode::binary, "
              "encode: the text is not UTF-8; send it as Opcode::binary, "
              "Json: dump() returned text that is not UTF-8, "
              "HandlerRef::write_message: the text is not UTF-8; send it as Opcode::binary, "
              "close: 1006 is not a code that may be sent");
    }

    TEST_CASE("before the 101 a handler cannot write") {
        Fixture fixture;
        fixture.script.prepare = [](Scripted& self) {
            CHECK(self.write_message("early") == WriteStatus::closed);
            CHECK(self.ping() == WriteStatus::closed);
            CHECK(!self.is_open());
            CHECK(self.buffered_amount() == 0);
            CHECK(!self.room("early").join(self));
            return std::nullopt;
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("first");
        CHECK(client.next() == "first");
        CHECK(fixture.running.metrics().rooms == 0);
    }

    TEST_CASE("in on_close a handler cannot write") {
        Fixture fixture;
        fixture.script.on_callback = [](Scripted& self, std::string_view callback) {
            if (callback != "close") return;
            CHECK(self.write_message("late") == WriteStatus::closed);
            CHECK(self.ping() == WriteStatus::closed);
            self.close(4000);
            self.ref().write_message("later");
            CHECK(self.close_code() == CloseCode::normal);
        };
        fixture.start();
        WsClient client(fixture.port());
        client.close();
        CHECK(client.close_code() == CloseCode::normal);
        CHECK(fixture.script.events.wait_for("destroyed"));
    }

    TEST_CASE("a handler without a server cannot write") {
        Script script;
        {
            Scripted alone(script);
            CHECK(alone.write_message("hello") == WriteStatus::closed);
            CHECK(alone.ping() == WriteStatus::closed);
            alone.close(1000);
            alone.set_nodelay(false);
            CHECK(!alone.ref().write_message("hello"));
            CHECK(alone.ref().get() == nullptr);
            CHECK(!alone.is_open());
        }
        CHECK(script.events.text() == "destroyed");
    }

    // ---- slow peers ------------------------------------------------------------------------------------------------

    // Writes numbered messages of 32 KiB until one is dropped or closed, and counts each status.
    struct Fill {
        int sent = 0, queued = 0, dropped = 0, closed = 0;

        void operator()(Scripted& self) {
            for (int i = 0; i < 10'000 && dropped == 0 && closed == 0; ++i) {
                const WriteStatus status = self.write_message(std::to_string(i) + std::string(32 * 1024, '.'));
                if (status == WriteStatus::sent) CHECK(queued == 0);
                if (status == WriteStatus::sent) ++sent;
                if (status == WriteStatus::queued) ++queued;
                if (status == WriteStatus::dropped) ++dropped;
                if (status == WriteStatus::closed) ++closed;
            }
        }
    };
    // Reads them and returns how many arrived in order.
    int count_numbered(WsClient & client, int expected) {
        int n = 0;
        while (n < expected) {
            const auto message = client.next();
            if (!message || std::atoi(message->c_str()) != n) return n;
            ++n;
        }
        return n;
    }

    TEST_CASE("with the drop policy a slow peer's messages are sent, then queued, then dropped") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.backlog_policy = BacklogPolicy::drop;
        Fill fill;
        std::size_t buffered = 0;
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [&](Scripted& self, const Message& message) {
            if (message.text() != "fill") return void(self.write_message(message));
            fill(self);
            buffered = self.buffered_amount();
            CHECK(self.dropped_messages() == 1);
        };
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        client.send("fill");
        CHECK(fixture.running.eventually([&] { return fill.dropped == 1; }));
        CHECK(fill.queued > 0);
        CHECK(buffered > limits.max_backlog - 33 * 1024);
        CHECK(buffered <= limits.max_backlog);
        CHECK(fixture.running.metrics().backlog_bytes >= limits.max_backlog / 2);
        CHECK(fixture.running.metrics().messages_dropped == 1);
        CHECK(fixture.still_serves());
        // All messages that were not dropped arrive.
        CHECK(count_numbered(client, fill.sent + fill.queued) == fill.sent + fill.queued);
        client.send("next");
        CHECK(client.next() == "next");
        CHECK(fixture.with_handler([](Scripted& self) { return self.buffered_amount(); }) == 0);
    }

    TEST_CASE("on_drain runs when a slow peer has read half of its backlog") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.backlog_policy = BacklogPolicy::drop;
        Fill fill;
        std::size_t size_at_drain = 0;
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [&](Scripted& self, const Message&) { fill(self); };
        fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
            if (callback == "drain") size_at_drain = self.buffered_amount();
        };
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        client.send("fill");
        CHECK(fixture.running.eventually([&] { return fill.dropped == 1; }));
        CHECK(fixture.script.events.count("drain") == 0);
        CHECK(count_numbered(client, fill.sent + fill.queued) == fill.sent + fill.queued);
        CHECK(fixture.script.events.wait_for("drain"));
        CHECK(fixture.running.on_loop([&] { return size_at_drain; }) <= limits.max_backlog / 2);
        CHECK(fixture.script.events.count("drain") == 1);
    }

    TEST_CASE("with the close policy a slow peer is closed with 1008 and can read the queued messages") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.closing_timeout = test::deadline;
        Fill fill;
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [&](Scripted& self, const Message&) {
            fill(self);
            CHECK(self.write_message("x") == WriteStatus::closed);
        };
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        client.send("fill");
        // The peer has read nothing yet.
        CHECK(fixture.script.events.wait_for("close 1008 backlog"));
        CHECK(fill.closed == 1);
        CHECK(count_numbered(client, fill.sent + fill.queued) == fill.sent + fill.queued);
        CHECK(client.close_code() == CloseCode::policy_violation);
        CHECK(client.connection.close_reason() == "the peer reads too slowly");
    }

    TEST_CASE("one message can be larger than the backlog limit") {
        wschat::Limits limits;
        limits.max_backlog = 1000;
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [](Scripted& self, const Message&) {
            CHECK(self.write_message(std::string(3'000'000, 'x')) == WriteStatus::sent);
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("go");
        CHECK(client.next() == std::string(3'000'000, 'x'));
        CHECK(client.is_open());
    }

    TEST_CASE("the server stops reading from a peer that does not read and loses no message") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.max_backlog = 256 * 1024;
        Fixture fixture(with_limits(limits));
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        // More than all buffers of the kernel hold: a server that continued to read would exceed its backlog limit.
        const int count = 3000;
        for (int i = 0; i < count; ++i)
            client.connection.send(Opcode::binary, std::to_string(i) + std::string(16'000, '.'));
        client.connection.send_control(Opcode::ping, "the end");
        const std::string bytes = test::take_output(client.connection);
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(fixture.running.eventually([&] {
            return !fixture.script.handlers.empty() &&
                   (*fixture.script.handlers.begin())->buffered_amount() > 128 * 1024;
        }));
        CHECK(fixture.still_serves());
        CHECK(count_numbered(client, count) == count);
        CHECK(client.next(Event::Kind::pong) == "the end");
        sender.join();
        CHECK(client.is_open());
        CHECK(fixture.script.events.count("close") == 0);
    }

    TEST_CASE("close ends a connection whose input is paused") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.max_backlog = 64 * 1024;
        limits.closing_timeout = 50ms;
        Fixture fixture(with_limits(limits));
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        for (int i = 0; i < 2000; ++i) client.connection.send(Opcode::binary, std::string(16'000, '.'));
        const std::string bytes = test::take_output(client.connection);
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(fixture.running.eventually([&] {
            return !fixture.script.handlers.empty() &&
                   (*fixture.script.handlers.begin())->buffered_amount() > 32 * 1024;
        }));
        fixture.running.on_loop([&] { (*fixture.script.handlers.begin())->close(4000); });
        CHECK(fixture.script.events.wait_for("close 1006 closing timeout"));
        client.raw.socket().shutdown_send();
        sender.join();
    }

    TEST_CASE("small and large messages to a slow peer stay in order") {
        wschat::Limits limits;
        limits.max_backlog = 64 * 1024 * 1024;
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [](Scripted& self, const Message&) {
            for (std::size_t i = 0; i < 300; ++i) {
                const WriteStatus status = self.write_message(std::to_string(i) + std::string(i % 3 * 20'000, '.'));
                CHECK((status == WriteStatus::sent || status == WriteStatus::queued));
            }
        };
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        client.send("go");
        client.send("go");
        CHECK(count_numbered(client, 300) == 300);
        CHECK(count_numbered(client, 300) == 300);
    }

    TEST_CASE("writing to a peer that has reset throws nothing and ends the connection") {
        const test::OneLoop one_loop;
        for (const std::size_t size : std::initializer_list<std::size_t>{10, 100'000}) {
            CAPTURE(size);
            Fixture fixture;
            fixture.start();
            WsClient client(fixture.port());
            fixture.running.on_loop([&] {
                client.raw.reset();
                for (int i = 0; i < 100; ++i) (*fixture.script.handlers.begin())->write_message(std::string(size, '.'));
            });
            CHECK(fixture.script.events.wait_for("close 1006 connection lost"));
            CHECK(fixture.still_serves());
        }
    }

    TEST_CASE("pings of a peer that does not read take no memory and the latest is answered") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.control_frames_per_second = 0;
        std::size_t max_buffered = 0;
        Fixture fixture(with_limits(limits));
        fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
            if (callback == "ping") max_buffered = std::max(max_buffered, self.buffered_amount());
        };
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        for (int i = 0; i < 100'000; ++i)
            client.connection.send_control(Opcode::ping, std::to_string(i) + std::string(115, '.'));
        client.connection.send(Opcode::text, "the end");
        const std::string bytes = test::take_output(client.connection);
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(fixture.script.events.wait_for("message the end"));
        sender.join();
        CHECK(fixture.running.on_loop([&] { return max_buffered; }) < limits.max_backlog);
        int last = -1, pongs = 0;
        // The last pong can arrive after the message.
        while (last != 99'999) {
            const auto pong = client.next(Event::Kind::pong);
            REQUIRE(pong);
            REQUIRE(std::atoi(pong->c_str()) > last);
            last = std::atoi(pong->c_str());
            ++pongs;
        }
        CHECK(pongs < 100'000);
    }

    // TCP_NODELAY of the server's end, whose descriptor is in this process.
    int nodelay_of_peer(WsClient & client) {
        sockaddr_in own{};
        socklen_t size = sizeof own;
        ::getsockname(client.raw.socket().descriptor(), reinterpret_cast<sockaddr*>(&own), &size);
        for (int descriptor = 0; descriptor < 1024; ++descriptor) {
            sockaddr_in peer{};
            size = sizeof peer;
            if (::getpeername(descriptor, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
            if (peer.sin_family != AF_INET || peer.sin_port != own.sin_port) continue;
            int on = -1;
            socklen_t on_size = sizeof on;
            ::getsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, &on_size);
            return on;
        }
        return -1;
    }

    TEST_CASE("TCP_NODELAY is on by default and set_nodelay changes it") {
        Fixture fixture;
        fixture.script.on_message = [](Scripted& self, const Message& message) {
            self.set_nodelay(message.text() == "on");
            self.write_message("done");
        };
        fixture.start();
        WsClient client(fixture.port());
        client.send("on");
        CHECK(client.next() == "done");
        CHECK(nodelay_of_peer(client) == 1);
        client.send("off");
        CHECK(client.next() == "done");
        CHECK(nodelay_of_peer(client) == 0);
        client.send("on");
        CHECK(client.next() == "done");
        CHECK(nodelay_of_peer(client) == 1);
    }

    // ---- references ------------------------------------------------------------------------------------------------

    TEST_CASE("another thread can write and close through a reference") {
        const test::OneLoop one_loop;
        Fixture fixture;
        fixture.start();
        WsClient client(fixture.port());
        const HandlerRef ref = fixture.with_handler([](Scripted& self) { return self.ref(); });
        CHECK(ref.write_message("from outside"));
        CHECK(ref.write_message("\xff", Opcode::binary));
        CHECK(ref.write_binary("\xfe"));
        CHECK(ref.write_json({{"n", 1}}));
        CHECK(ref.write_json(LikeNlohmann()));
        for (const std::string text : {"from outside", "\xff", "\xfe", R"({"n":1})", R"({"by":"dump"})"})
            CHECK(client.next() == text);
        CHECK(ref.post([](WebSocketHandler& handler) { handler.write_message("from within"); }));
        CHECK(client.next() == "from within");
        CHECK(fixture.running.on_loop([&] { return ref.get() == *fixture.script.handlers.begin(); }));
        CHECK(ref.close(CloseCode{4004}, "from outside"));
        CHECK(client.close_code() == CloseCode{4004});
        CHECK(client.connection.close_reason() == "from outside");
    }

    TEST_CASE("work for a handler that no longer exists is dropped") {
        const test::OneLoop one_loop;
        Fixture fixture;
        fixture.start();
        WsClient client(fixture.port());
        const HandlerRef ref = fixture.with_handler([](Scripted& self) { return self.ref(); });
        client.raw.close();
        CHECK(fixture.script.events.wait_for("destroyed"));
        std::atomic<bool> ran{false};
        CHECK(ref.post([&](WebSocketHandler&) { ran = true; }));
        CHECK(ref.write_message("hello"));
        CHECK(ref.close());
        CHECK(fixture.running.on_loop([&] { return ref.get() == nullptr; }));
        CHECK(!ran);
        CHECK(fixture.still_serves());
    }

    TEST_CASE("a reference from prepare is valid later and empty after a rejected handshake") {
        const test::OneLoop one_loop;
        HandlerRef ref;
        Fixture fixture;
        fixture.script.prepare = [&](Scripted& self) -> std::optional<Response> {
            ref = self.ref();
            if (self.name() == "refused") return Response(403, "No.\n");
            return std::nullopt;
        };
        fixture.start();
        WsClient client(fixture.port());
        CHECK(fixture.running.on_loop([&] { return ref.get() == *fixture.script.handlers.begin(); }));
        WsClient refused(fixture.port(), "/?name=refused");
        CHECK(status_of(refused) == "HTTP/1.1 403");
        CHECK(fixture.running.on_loop([&] { return ref.get() == nullptr; }));
    }

    TEST_CASE("a reference can outlive the server") {
        const test::OneLoop one_loop;
        std::optional<Fixture> fixture(std::in_place);
        fixture->start();
        WsClient client(fixture->port());
        const HandlerRef ref = fixture->with_handler([](Scripted& self) { return self.ref(); });
        client.raw.close();
        fixture.reset();
        CHECK(!ref.write_message("hello"));
        CHECK(!ref.close());
        CHECK(!ref.post([](WebSocketHandler&) {}));
        CHECK(!HandlerRef().write_message("to nobody"));
        CHECK(HandlerRef().get() == nullptr);
    }

    TEST_CASE("threads write through references while connections close and the server shuts down") {
        const test::OneLoop one_loop;
        std::atomic<bool> stop{false};
        std::mutex mutex;
        std::vector<HandlerRef> refs;
        Fixture fixture;
        fixture.script.on_callback = [&](Scripted& self, std::string_view callback) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (callback == "open") refs.push_back(self.ref());
        };
        fixture.start();
        std::vector<std::thread> threads;
        for (int i = 0; i < 3; ++i)
            threads.emplace_back([&] {
                while (!stop) {
                    std::vector<HandlerRef> known;
                    {
                        const std::lock_guard<std::mutex> lock(mutex);
                        known = refs;
                    }
                    for (const HandlerRef& ref : known) ref.write_message("news");
                    if (known.size() % 5 == 4) known.front().close();
                    std::this_thread::yield();
                }
            });
        for (int i = 0; i < 30; ++i) {
            WsClient client(fixture.port());
            CHECK(client.is_open());
            CHECK(client.next() == "news");
        }
        WsClient last(fixture.port());
        fixture.running.stop(100ms);
        stop = true;
        for (std::thread& thread : threads) thread.join();
        CHECK(fixture.script.events.count("open") == fixture.script.events.count("close"));
        CHECK(fixture.script.events.count("open") == 31);
    }

    // ---- re-entrancy -----------------------------------------------------------------------------------------------

    // Three connections in the room "all": the actor, whose handler acts in one of its callbacks, another connection
    // as a target, and a witness that must stay unaffected.
    struct Scenario {
        explicit Scenario(std::string_view actor_callback, std::function<void(Scripted&)> action)
            : callback(actor_callback),
              witness(prepared(std::move(action)).port(), "/?name=witness"),
              other(fixture.port(), "/?name=other"),
              actor(fixture.port(), "/?name=actor") {
            trigger(actor, callback);
            acted = fixture.script.events.wait_for("acted");
        }
        Fixture& prepared(std::function<void(Scripted&)> action) {
            fixture.script.on_message = &on_trigger;
            fixture.script.on_callback = [this, action = std::move(action)](Scripted& self, std::string_view now) {
                if (now == "open") self.room("all").join(self);
                if (now != callback || self.name() != "actor" || done) return;
                done = true;
                fixture.script.events.add("acted");
                action(self);
            };
            return fixture.start();
        }
        // Reads until this message arrives.
        bool witness_receives(std::string_view wanted) {
            while (const auto message = witness.next())
                if (*message == wanted) return true;
            return false;
        }
        bool in(std::initializer_list<std::string_view> callbacks) const {
            return std::find(callbacks.begin(), callbacks.end(), callback) != callbacks.end();
        }

        std::string_view callback;
        bool done = false;  // for the loop's thread
        bool acted = false;
        Fixture fixture;
        WsClient witness, other, actor;
    };

    struct Action {
        std::string name;
        std::function<void(Scripted&)> act;
        std::function<void(Scenario&)> expect;
        bool witness_survives = true;
    };

    // Each action runs in each callback.
    const Action actions[] = {
        {"nothing", [](Scripted&) {}, [](Scenario&) {}},
        {"close itself", [](Scripted& self) { self.close(4001); },
         [](Scenario& s) {
             if (!s.in({"prepare"}))
                 CHECK(s.actor.close_code() == (s.in({"close"}) ? CloseCode::normal : CloseCode{4001}));
         }},
        {"close another",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all"))
                 if (static_cast<Scripted&>(member).name() == "other") member.close(4002, "by another");
         },
         [](Scenario& s) { CHECK(s.other.close_code() == CloseCode{4002}); }},
        {"close all",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all")) member.close(4003);
         },
         [](Scenario& s) {
             CHECK(s.witness.close_code() == CloseCode{4003});
             CHECK(s.other.close_code() == CloseCode{4003});
         },
         false},
        {"join", [](Scripted& self) { self.write_message(self.room("new").join(self) ? "joined" : "not joined"); },
         [](Scenario& s) {
             if (!s.in({"prepare", "close", "drain"})) CHECK(s.actor.next() == "joined");
         }},
        {"leave", [](Scripted& self) { self.write_message(self.room("all").leave(self) ? "left" : "not left"); },
         [](Scenario& s) {
             if (!s.in({"prepare", "close", "drain"})) CHECK(s.actor.next() == "left");
         }},
        {"leave and join again",
         [](Scripted& self) {
             self.room("all").leave(self);
             self.room("all").join(self);
             self.room("all").broadcast("news");
         },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"broadcast", [](Scripted& self) { self.room("all").broadcast("news"); },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"broadcast to the others", [](Scripted& self) { self.room("all").broadcast("news", &self); },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"broadcast a volatile message", [](Scripted& self) { self.room("all").broadcast_volatile("news"); },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"write in every way",
         [](Scripted& self) {
             const wschat::EncodedFrame frame = self.server().rooms().encode("encoded");
             for (WebSocketHandler& member : self.room("all")) {
                 member.write_message("text");
                 member.write_message("bytes", Opcode::binary);
                 member.write_message(Message("message"));
                 member.write_message(frame);
                 member.write_volatile(frame);
                 member.write_json({{"news", "json"}});
                 member.ping("another");
             }
         },
         [](Scenario& s) {
             CHECK(s.witness_receives("text"));
             for (const std::string wanted : {"bytes", "message", "encoded", "encoded", R"({"news":"json"})"})
                 CHECK(s.witness.next() == wanted);
             CHECK(s.witness.next(Event::Kind::ping) == "another");
         }},
        {"leave every room",
         [](Scripted& self) {
             for (wschat::Room* room : self.rooms()) room->leave(self);
             self.room("all").broadcast("news");
         },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"move all to another room",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all")) {
                 self.room("all").leave(member);
                 self.room("new").join(member);
             }
             self.room("new").broadcast("news");
         },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"broadcast a large backlog",
         [](Scripted& self) {
             for (int i = 0; i < 20; ++i) self.room("all").broadcast(std::string(50'000, '.'));
         },
         [](Scenario& s) { CHECK(s.witness_receives(std::string(50'000, '.'))); }},
        {"ping itself", [](Scripted& self) { self.ping("self"); },
         [](Scenario& s) {
             if (!s.in({"prepare", "close"})) CHECK(s.actor.next(Event::Kind::ping) == "self");
         }},
        {"throw", [](Scripted&) { throw std::runtime_error("thrown"); },
         [](Scenario& s) {
             if (s.in({"open", "message", "ping", "pong", "drain"}))
                 CHECK(s.actor.close_code() == CloseCode::internal_error);
             CHECK(s.fixture.log.wait_for("error exception in="));
         }},
        {"close itself and throw",
         [](Scripted& self) {
             self.close(4001);
             throw std::runtime_error("thrown");
         },
         [](Scenario& s) {
             if (!s.in({"prepare", "close"})) CHECK(s.actor.close_code() == CloseCode{4001});
         }},
        {"broadcast and throw",
         [](Scripted& self) {
             self.room("all").broadcast("news");
             throw std::runtime_error("thrown");
         },
         [](Scenario& s) { CHECK(s.witness_receives("news")); }},
        {"write to itself through a reference", [](Scripted& self) { self.ref().write_message("later"); },
         [](Scenario& s) {
             if (!s.in({"close", "drain"})) CHECK(s.actor.next() == "later");
         }},
        {"a timer for itself",
         [](Scripted& self) {
             self.loop().call_later(0ms, [ref = self.ref()] {
                 if (WebSocketHandler* handler = ref.get()) handler->write_message("later");
             });
         },
         [](Scenario& s) {
             if (!s.in({"close", "drain"})) CHECK(s.actor.next() == "later");
         }},
        {"close another through a reference",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all"))
                 if (static_cast<Scripted&>(member).name() == "other")
                     member.ref().close(CloseCode{4002}, "by another");
         },
         [](Scenario& s) { CHECK(s.other.close_code() == CloseCode{4002}); }},
        {"post a close and work after it",
         [](Scripted& self) {
             self.ref().post([ref = self.ref()](WebSocketHandler& handler) {
                 handler.close(4001);
                 ref.write_message("too late");
             });
         },
         [](Scenario& s) {
             if (!s.in({"close"})) CHECK(s.actor.close_code() == CloseCode{4001});
         }},
        {"a repeated call that cancels itself",
         [](Scripted& self) {
             const auto id = std::make_shared<wschat::Loop::TimerId>();
             *id = self.loop().call_every(1ms, [&server = self.server(), id] {
                 if (server.loop().cancel(*id)) server.rooms()["all"].broadcast("called");
             });
         },
         [](Scenario& s) { CHECK(s.witness_receives("called")); }},
        {"a page, a route, an option and the metrics",
         [](Scripted& self) {
             self.server().get("/late", [](const Request&) { return Response(200, "late"); });
             struct Late : WebSocketHandler {
                 void on_message(const Message&) override {}
             };
             self.server().route<Late>("/late");
             self.set_nodelay(false);
             self.room("all").broadcast(std::to_string(self.server().metrics().connections_accepted));
         },
         [](Scenario& s) { CHECK(s.witness_receives("3")); }},
        {"stop the loop", [](Scripted& self) { self.loop().stop(); },
         [](Scenario& s) {
             s.fixture.running.stop(0ms);
             s.fixture.running.server.run();  // ends the connections that the first run left
             CHECK(s.witness.raw.read_to_end());
         },
         false},
        {"shut the server down at once", [](Scripted& self) { self.server().shutdown(0ms); },
         [](Scenario& s) {
             for (WsClient* client : {&s.witness, &s.other, &s.actor}) CHECK(client->raw.read_to_end());
         },
         false},
        {"shut the server down", [](Scripted& self) { self.server().shutdown(2s); },
         [](Scenario& s) {
             CHECK(s.witness.close_code() == CloseCode::going_away);
             CHECK(s.other.close_code() == CloseCode::going_away);
         },
         false},
    };

    // One test for each callback, because ctest then names the one that fails.
    void try_all_actions(const std::string& callback) {
        const test::OneLoop one_loop;
        for (const Action& action : actions) {
            CAPTURE(callback);
            CAPTURE(action.name);
            Scenario scenario(callback, action.act);
            CHECK(scenario.acted);
            action.expect(scenario);
            if (action.witness_survives) {
                scenario.witness.send("still here");
                CHECK(scenario.witness_receives("still here"));
            }
            for (WsClient* client : {&scenario.witness, &scenario.other, &scenario.actor}) client->raw.close();
            scenario.fixture.running.stop();
            const EventLog& events = scenario.fixture.script.events;
            for (const std::string name : {"witness", "other", "actor"}) {
                CAPTURE(name);
                const bool refused = name == "actor" && events.count("actor: open") == 0;
                CHECK((!refused || callback == "prepare"));
                CHECK(events.count(name + ": open") == (refused ? 0 : 1));
                CHECK(events.count(name + ": close") == (refused ? 0 : 1));
            }
            CHECK(scenario.fixture.script.handlers.empty());
        }
    }

    TEST_CASE("any action is safe in prepare") { try_all_actions("prepare"); }
    TEST_CASE("any action is safe in open") { try_all_actions("open"); }
    TEST_CASE("any action is safe in on_message") { try_all_actions("message"); }
    TEST_CASE("any action is safe in on_close") { try_all_actions("close"); }
    TEST_CASE("any action is safe in on_ping") { try_all_actions("ping"); }
    TEST_CASE("any action is safe in on_pong") { try_all_actions("pong"); }
    TEST_CASE("any action is safe in on_drain") { try_all_actions("drain"); }
    TEST_CASE("any action is safe in a timer") { try_all_actions("timer"); }
    TEST_CASE("any action is safe in posted work") { try_all_actions("post"); }

    // ---- defaults ---------------------------------------------------------------------------------------------------

    TEST_CASE("a handler that overrides only on_message selects no subprotocol and ignores pings and pongs") {
        struct Plain : WebSocketHandler {
            void on_message(const Message& message) override { write_message(message); }
        };
        RunningServer running;
        running.server.route<Plain>("/");
        running.start();
        WsClient client(running.port(), "/", "Sec-WebSocket-Protocol: chat, superchat\r\n");
        REQUIRE(client.is_open());
        CHECK(!contains(client.head, "Sec-WebSocket-Protocol"));
        client.connection.send_control(Opcode::pong, "unsolicited");
        client.ping("are you there");
        CHECK(client.next(Event::Kind::pong) == "are you there");
        client.send("hello");
        CHECK(client.next() == "hello");
    }

    TEST_CASE("room, loop and server throw an Error in a handler without a server") {
        Script script;
        Scripted alone(script);
        CHECK_THROWS_WITH_AS(alone.room("lobby"), "room: a handler has no server in its constructor", Error);
        CHECK_THROWS_WITH_AS(alone.loop(), "loop: a handler has no server in its constructor", Error);
        CHECK_THROWS_WITH_AS(alone.server(), "server: a handler has no server in its constructor", Error);
    }

    TEST_CASE("on_drain does not run after close") {
        const test::OneLoop one_loop;
        wschat::Limits limits;
        limits.backlog_policy = BacklogPolicy::drop;
        limits.closing_timeout = test::deadline;
        Fill fill;
        Fixture fixture(with_limits(limits));
        fixture.script.on_message = [&](Scripted& self, const Message&) {
            fill(self);
            self.close(4000, "that was all");
        };
        fixture.start();
        WsClient client(fixture.port());
        shrink_buffers(client);
        client.send("fill");
        CHECK(fixture.running.eventually([&] { return fill.dropped == 1; }));
        CHECK(count_numbered(client, fill.sent + fill.queued) == fill.sent + fill.queued);
        CHECK(client.close_code() == CloseCode{4000});
        CHECK(fixture.script.events.wait_for("close 4000 local"));
        CHECK(fixture.script.events.count("drain") == 0);
    }

    TEST_CASE("messages of all sizes around the buffers come back to a peer that reads late") {
        RunningServer running(test::without_pings());
        running.server.route<test::LateEcho>("/");
        running.start();
        WsClient client(running.port());
        CHECK(test::complaint_of_late_reader(running, client) == "");
    }
}
