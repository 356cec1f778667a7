// section 8 and what section 13 does for it: every verb of a handler, over real sockets.
#include "support.hpp"

#include <set>

namespace {

using test::Client;
using test::hex;
using test::RawClient;
using test::RunningServer;
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

// What happened, in order: written by callbacks on the loop's thread, read by the test's.
class Journal {
public:
    void add(std::string line) {
        const std::lock_guard<std::mutex> lock(mutex_);
        lines_.push_back(std::move(line));
        changed_.notify_all();
    }
    // Waits until a line is there that begins so.
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

// What scripted handlers do, where they shall not do the default: echo messages, and note what happens.
struct Script {
    std::function<std::optional<Response>(Scripted&)> prepare;
    std::function<bool(Scripted&, std::string_view)> check_origin;
    std::function<std::string(const std::vector<std::string_view>&)> select_subprotocol;
    std::function<void(Scripted&, const Message&)> on_message;
    // Called in every callback, with its name: "prepare", "open", "message", "close", "ping", "pong", "drain".
    std::function<void(Scripted&, std::string_view)> at;

    Journal journal;
    std::set<Scripted*> handlers;  // those that live; for the loop's thread
};

class Scripted : public WebSocketHandler {
public:
    explicit Scripted(Script& script) : script_(script) { script_.handlers.insert(this); }
    ~Scripted() override {
        script_.handlers.erase(this);
        script_.journal.add("destroyed");
    }

    // "?name=anna" of its request.
    std::string name() const { return request().query("name").value_or(std::string()); }

    std::optional<Response> prepare(const Request&) override {
        note("prepare", "");
        return script_.prepare ? script_.prepare(*this) : std::nullopt;
    }
    bool check_origin(std::string_view origin) override {
        return script_.check_origin ? script_.check_origin(*this, origin) : WebSocketHandler::check_origin(origin);
    }
    std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
        return script_.select_subprotocol ? script_.select_subprotocol(offered) : std::string();
    }
    void open() override { note("open", ""); }
    void on_message(const Message& message) override {
        note("message", message.size() < 100 ? message.data() : "large");
        if (script_.on_message) script_.on_message(*this, message);
        else write_message(message);
    }
    void on_close() override {
        note("close", std::to_string(number(close_code())) + " " + std::string(to_string(close_cause())));
    }
    void on_ping(std::string_view payload) override { note("ping", payload.size() < 100 ? payload : "large"); }
    void on_pong(std::string_view payload) override { note("pong", payload); }
    void on_drain() override { note("drain", ""); }

    void note(std::string_view moment, std::string_view detail) {
        std::string line = name().empty() ? "" : name() + ": ";
        line += moment;
        if (!detail.empty()) (line += ' ') += detail;
        script_.journal.add(line);
        if (script_.at) script_.at(*this, moment);
    }

private:
    Script& script_;
};

// A server with scripted handlers at "/", and its log.
struct World {
    explicit World(ServerOptions options = {}) : running(std::move(options)) {
        running.server.route<Scripted>("/", std::ref(script));
        running.server.on_log([this](const wschat::LogEntry& entry) { log.add(to_string(entry)); });
    }
    World& start() {
        running.start();
        return *this;
    }
    int port() const { return running.port(); }
    // Something that the one handler that lives knows.
    template <class Ask>
    auto ask(Ask ask) {
        return running.on_loop([&] { return ask(**script.handlers.begin()); });
    }
    // The server still serves.
    bool lives() {
        Client client(port(), "/?name=probe");
        client.send("are you there");
        return client.next() == "are you there";
    }

    Script script;
    Journal log;
    RunningServer running;
};

wschat::Limits quick_timeouts() {
    wschat::Limits limits;
    limits.ping_interval = limits.ping_timeout = limits.closing_timeout = 30ms;
    return limits;
}
ServerOptions with_limits(const wschat::Limits& limits) {
    ServerOptions options;
    options.limits = limits;
    return options;
}
// What a slow peer's socket takes without being read is little then.
void narrow(Client& client) {
    const int size = 16 * 1024;
    ::setsockopt(client.raw.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    ::setsockopt(client.raw.socket().descriptor(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
}
std::string status_of(const Client& client) { return client.head.substr(0, client.head.find(' ', 9)); }

}  // namespace

TEST_SUITE("handler") {
    // ---- the handshake ---------------------------------------------------------------------------------------------

    TEST_CASE("prepare refuses a handshake with its Response") {
        World world;
        world.script.prepare = [](Scripted& self) -> std::optional<Response> {
            if (self.request().query("token") == "secret") return std::nullopt;
            return std::move(Response(401, "Who are you?\n").set_header("WWW-Authenticate", "Bearer"));
        };
        world.start();
        Client refused(world.port(), "/?token=wrong");
        CHECK(status_of(refused) == "HTTP/1.1 401");
        CHECK(refused.head.find("WWW-Authenticate: Bearer\r\n") != std::string::npos);
        CHECK(refused.raw.read_to_end());
        CHECK(refused.raw.received == "Who are you?\n");
        // It was never open, so it does not close.
        CHECK(world.script.journal.text() == "prepare, destroyed");
        Client allowed(world.port(), "/?token=secret");
        CHECK(allowed.is_open());
    }

    TEST_CASE("prepare may redirect") {
        World world;
        world.script.prepare = [](Scripted&) { return Response::redirect("/login", 303); };
        world.start();
        Client client(world.port());
        CHECK(status_of(client) == "HTTP/1.1 303");
        CHECK(client.head.find("Location: /login\r\n") != std::string::npos);
    }

    TEST_CASE("the default check of the origin") {
        struct Row {
            std::string origin;  // PORT is the server's
            std::vector<std::string> allowed;
            bool accepted;
        };
        const Row rows[] = {
            {"http://127.0.0.1:PORT", {}, true},
            {"https://127.0.0.1:PORT", {}, true},  // a proxy may speak TLS for us
            {"HTTP://127.0.0.1:PORT", {}, true},
            {"http://127.0.0.1", {}, false},
            {"http://127.0.0.1:1", {}, false},
            {"http://localhost:PORT", {}, false},
            {"http://127.0.0.1.evil.example:PORT", {}, false},
            {"http://evil.example/127.0.0.1:PORT", {}, false},
            {"http://evil127.0.0.1:PORT", {}, false},
            {"http://127.0.0.1:PORT.", {}, false},
            {"http://127.0.0.1.:PORT", {}, false},
            {"ftp://127.0.0.1:PORT", {}, false},
            {"null", {}, false},
            {"", {}, false},
            {"https://chat.example", {"https://chat.example"}, true},
            {"https://CHAT.example:443", {"https://chat.example"}, true},
            {"https://chat.example", {"HTTPS://Chat.Example:443"}, true},
            {"http://chat.example", {"https://chat.example"}, false},
            {"https://chat.example:8443", {"https://chat.example"}, false},
            {"https://evil.chat.example", {"https://chat.example"}, false},
            {"https://chat.example.evil", {"https://chat.example"}, false},
            {"https://chat.example.", {"https://chat.example"}, false},
            {"http://127.0.0.1:PORT", {"https://chat.example"}, true},
            {"null", {"https://chat.example"}, false},
            {"https://anywhere.example", {"https://chat.example", "*"}, true},
        };
        for (const Row& row : rows) {
            CAPTURE(row.origin);
            World world;
            world.running.server.allow_origins(row.allowed);
            world.start();
            std::string origin = row.origin;
            if (const std::size_t at = origin.find("PORT"); at != std::string::npos)
                origin.replace(at, 4, std::to_string(world.port()));
            Client client(world.port(), "/", "Origin: " + origin + "\r\n");
            CHECK(status_of(client) == (row.accepted ? "HTTP/1.1 101" : "HTTP/1.1 403"));
            CHECK(client.is_open() == row.accepted);
        }
    }

    TEST_CASE("the 403 says which origin is refused and what is allowed") {
        World world;
        world.running.server.allow_origins({"https://chat.example", "https://www.chat.example"});
        world.start();
        Client client(world.port(), "/", "Origin: https://evil.example\r\n");
        CHECK(client.raw.read_to_end());
        CHECK(client.raw.received == "The origin \"https://evil.example\" is refused; allowed: pages of 127.0.0.1:" +
                                         std::to_string(world.port()) +
                                         ", https://chat.example, https://www.chat.example.\n");
        CHECK(world.log.wait_for("info refused status=\"403\""));
        CHECK(world.script.journal.count("open") == 0);
    }

    TEST_CASE("a handler may judge origins itself") {
        World world;
        world.script.check_origin = [](Scripted&, std::string_view origin) { return origin == "null"; };
        world.start();
        CHECK(Client(world.port(), "/", "Origin: null\r\n").is_open());
        CHECK(
            !Client(world.port(), "/", "Origin: http://127.0.0.1:" + std::to_string(world.port()) + "\r\n").is_open());
    }

    TEST_CASE("what is no browser has no origin, and is asked for one only where that is switched on") {
        for (const bool required : {false, true}) {
            ServerOptions options;
            options.require_origin = required;
            World world(options);
            world.script.check_origin = [&](Scripted&, std::string_view) {
                world.script.journal.add("check_origin");
                return true;
            };
            world.start();
            Client client(world.port());
            CHECK(status_of(client) == (required ? "HTTP/1.1 403" : "HTTP/1.1 101"));
            CHECK(world.script.journal.count("check_origin") == 0);
            CHECK(Client(world.port(), "/", "Origin: http://any.example\r\n").is_open());
            CHECK(world.script.journal.count("check_origin") == 1);
        }
    }

    TEST_CASE("two origins are one too many") {
        World world;
        world.script.check_origin = [](Scripted&, std::string_view) { return true; };
        world.start();
        Client client(world.port(), "/", "Origin: http://a.example\r\nOrigin: http://b.example\r\n");
        CHECK(status_of(client) == "HTTP/1.1 400");
    }

    TEST_CASE("of the subprotocols that are offered the handler selects one, and no other is sent") {
        struct Row {
            std::string offered;
            std::string selected;
            std::string seen;  // by select_subprotocol()
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
            std::string seen;
            World world;
            world.script.select_subprotocol = [&](const std::vector<std::string_view>& offered) -> std::string {
                for (const std::string_view name : offered) (seen += seen.empty() ? "" : " ") += name;
                return row.selected;
            };
            world.script.at = [&](Scripted& self, std::string_view moment) {
                if (moment == "open")
                    world.script.journal.add("selected " + std::string(self.selected_subprotocol()) + ".");
            };
            world.start();
            RawClient client(world.port());
            std::string request = wschat::detail::handshake_request("127.0.0.1", "/", Client::key);
            request.insert(request.size() - 2, std::string("Sec-WebSocket-Protocol: ") + row.offered + "\r\n");
            client.send(request);
            REQUIRE(client.read_until("\r\n\r\n"));
            CHECK(client.received.substr(0, 12) == "HTTP/1.1 101");
            CHECK(seen == row.seen);
            CHECK(client.received.find("X-Forged") == std::string::npos);
            const wschat::Fields answer(std::string_view(client.received).substr(client.received.find('\n') + 1));
            CHECK(answer.find("sec-websocket-protocol").value_or("") == row.sent);
            CHECK(answer.count("sec-websocket-protocol") == (row.sent.empty() ? 0 : 1));
            CHECK(world.script.journal.wait_for("selected " + row.sent + "."));
            const bool fault = row.selected != row.sent;
            CHECK(world.log.count("warning subprotocol_not_offered") == (fault ? 1 : 0));
        }
    }

    TEST_CASE("select_subprotocol is not asked where nothing is offered") {
        bool asked = false;
        World world;
        world.script.select_subprotocol = [&](const std::vector<std::string_view>&) {
            asked = true;
            return std::string("chat");
        };
        world.start();
        Client client(world.port());
        CHECK(client.is_open());
        CHECK(!asked);
        CHECK(client.head.find("Sec-WebSocket-Protocol") == std::string::npos);
    }

    TEST_CASE("an exception before the 101 is a 500, is logged, and the server lives on") {
        struct Refusing : Scripted {
            explicit Refusing(Script& script) : Scripted(script) { throw std::runtime_error("from the constructor"); }
        };
        World world;
        world.running.server.route<Refusing>("/refusing", std::ref(world.script));
        world.script.prepare = [](Scripted& self) -> std::optional<Response> {
            if (self.name() == "prepare") throw std::runtime_error("from prepare");
            return std::nullopt;
        };
        world.script.check_origin = [](Scripted& self, std::string_view) -> bool {
            if (self.name() == "origin") throw std::runtime_error("from check_origin");
            return true;
        };
        world.script.select_subprotocol = [](const std::vector<std::string_view>&) -> std::string {
            throw std::runtime_error("from select_subprotocol");
        };
        world.start();
        CHECK(status_of(Client(world.port(), "/refusing")) == "HTTP/1.1 500");
        CHECK(status_of(Client(world.port(), "/?name=prepare")) == "HTTP/1.1 500");
        CHECK(status_of(Client(world.port(), "/?name=origin", "Origin: http://a.example\r\n")) == "HTTP/1.1 500");
        CHECK(status_of(Client(world.port(), "/", "Sec-WebSocket-Protocol: chat\r\n")) == "HTTP/1.1 500");
        for (const std::string where : {"the constructor", "prepare", "check_origin", "select_subprotocol"})
            CHECK(world.log.text().find("what=\"from " + where + "\"") != std::string::npos);
        CHECK(world.script.journal.count("open") == 0);
        CHECK(world.script.journal.count("close") == 0);
        CHECK(world.lives());
    }

    TEST_CASE("what is thrown before the 101 and is no std::exception is a 500 as well") {
        World world;
        world.script.prepare = [](Scripted& self) -> std::optional<Response> {
            if (self.name() == "prepare") throw 42;
            return std::nullopt;
        };
        world.start();
        CHECK(status_of(Client(world.port(), "/?name=prepare")) == "HTTP/1.1 500");
        CHECK(world.log.wait_for("error exception in=\"handshake\""));
        CHECK(world.lives());
    }

    TEST_CASE("an address is known only where a trusted proxy vouches for it") {
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
            // What stands left of the address that the proxy saw anybody may have written.
            {{"127.0.0.1"}, "X-Forwarded-For: 10.1.1.1, 203.0.113.7\r\n", "203.0.113.7"},
            {{"127.0.0.1"}, "X-Forwarded-For: 10.1.1.1\r\nX-Forwarded-For: 203.0.113.7\r\n", "203.0.113.7"},
            {{"127.0.0.1", "10.0.0.0/8"}, "X-Forwarded-For: 192.0.2.1, 203.0.113.7, 10.1.1.1\r\n", "203.0.113.7"},
            {{"127.0.0.1", "10.0.0.0/8"}, "X-Forwarded-For: 10.2.2.2, 10.1.1.1\r\n", "10.2.2.2"},
            {{"127.0.0.1"}, "X-Forwarded-For: 2001:db8::7\r\n", "2001:db8::7"},
            {{"127.0.0.1"}, "X-Forwarded-For: unknown\r\n", "127.0.0.1"},
            {{"127.0.0.1"}, "X-Forwarded-For: 203.0.113.7, unknown\r\n", "127.0.0.1"},
            {{"127.0.0.1"}, "X-Forwarded-For: \r\n", "127.0.0.1"},
        };
        for (const Row& row : rows) {
            CAPTURE(row.headers);
            World world;
            world.running.server.trusted_proxies(row.trusted);
            world.script.at = [&](Scripted& self, std::string_view moment) {
                if (moment == "open") world.script.journal.add("from " + self.remote_address() + ".");
            };
            world.start();
            Client client(world.port(), "/", row.headers);
            CHECK(client.is_open());
            CHECK(world.script.journal.wait_for("from "));
            CHECK(world.script.journal.count("from " + row.address + ".") == 1);
        }
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

    TEST_CASE("the arguments of a route reach each handler, as copies or by std::ref") {
        int opened = 0;
        RunningServer running;
        running.server.route<Greeter>("/{who}", "hello ", std::ref(opened), std::make_shared<const std::string>("!"));
        running.start();
        CHECK(Client(running.port(), "/anna").next() == "hello anna!");
        CHECK(Client(running.port(), "/tea%20room").next() == "hello tea room!");
        running.stop();
        CHECK(opened == 2);
    }

    // ---- open and close --------------------------------------------------------------------------------------------

    TEST_CASE("open, messages and on_close come in order, and then the handler is destroyed") {
        World world;
        world.start();
        {
            Client client(world.port());
            client.send("one");
            client.send("two");
            CHECK(client.next() == "one");
            CHECK(client.next() == "two");
            client.close();
            CHECK(client.close_code() == CloseCode::normal);
        }
        CHECK(world.script.journal.wait_for("destroyed"));
        CHECK(world.script.journal.text() == "prepare, open, message one, message two, close 1000 peer, destroyed");
    }

    TEST_CASE("frames that come together with the handshake are read after open") {
        World world;
        world.start();
        RawClient client(world.port());
        // "Hello" of RFC 6455 5.7, masked.
        client.send(wschat::detail::handshake_request("127.0.0.1", "/", Client::key) +
                    hex("81 85 37 fa 21 3d 7f 9f 4d 51 58"));
        CHECK(client.read_until(hex("81 05 48 65 6c 6c 6f")));
        CHECK(world.script.journal.text() == "prepare, open, message Hello");
    }

    TEST_CASE("open and on_close pair exactly once, however the connection ends") {
        struct Row {
            std::string how;
            std::function<void(Client&)> end;
        };
        const Row rows[] = {
            {"the peer closes", [](Client& c) { c.close(); }},
            {"the peer closes and hangs up",
             [](Client& c) {
                 c.close();
                 c.raw.close();
             }},
            {"the peer closes twice", [](Client& c) { c.raw.send(hex("88 80 00 00 00 00 88 80 00 00 00 00")); }},
            {"the peer hangs up", [](Client& c) { c.raw.close(); }},
            {"the peer shuts its side", [](Client& c) { c.raw.shutdown_send(); }},
            {"the peer resets", [](Client& c) { c.raw.reset(); }},
            {"the peer breaks the protocol", [](Client& c) { c.raw.send(hex("83 80 00 00 00 00 88 80 00 00 00 00")); }},
            {"the handler closes",
             [](Client& c) {
                 c.send("close");
                 c.close_code();
             }},
            {"the handler closes twice",
             [](Client& c) {
                 c.send("close twice");
                 c.close_code();
             }},
            {"the handler throws",
             [](Client& c) {
                 c.send("throw");
                 c.close_code();
             }},
            {"both close",
             [](Client& c) {
                 c.send("close");
                 c.close();
                 c.close_code();
             }},
        };
        for (const Row& row : rows) {
            CAPTURE(row.how);
            World world;
            world.script.on_message = [](Scripted& self, const Message& message) {
                if (message.text() == "throw") throw std::runtime_error("thrown");
                self.close(4001);
                if (message.text() == "close twice") self.close(4002);
            };
            world.start();
            Client client(world.port());
            REQUIRE(client.is_open());
            row.end(client);
            CHECK(world.script.journal.wait_for("destroyed"));
            client.raw.close();
            world.running.stop();
            CHECK(world.script.journal.count("open") == 1);
            CHECK(world.script.journal.count("close") == 1);
            CHECK(world.script.journal.count("destroyed") == 1);
        }
    }

    TEST_CASE("open and on_close pair where open throws or closes") {
        for (const std::string what : {"throw", "close", "close and throw"})
            for (const bool with_frames : {false, true}) {
                CAPTURE(what);
                CAPTURE(with_frames);
                World world;
                world.script.at = [&](Scripted& self, std::string_view moment) {
                    if (moment != "open") return;
                    if (what != "throw") self.close(4001);
                    if (what != "close") throw std::runtime_error("thrown");
                };
                world.start();
                RawClient client(world.port());
                client.send(wschat::detail::handshake_request("127.0.0.1", "/", Client::key) +
                            (with_frames ? hex("81 85 37 fa 21 3d 7f 9f 4d 51 58 88 80 00 00 00 00") : ""));
                CHECK(client.read_until("\r\n\r\n"));
                CHECK(client.received.substr(0, 12) == "HTTP/1.1 101");
                CHECK(client.read_until(hex(what == "throw" ? "88 10 03 f3" : "88 02 0f a1")));
                client.close();
                CHECK(world.script.journal.wait_for("destroyed"));
                CHECK(world.script.journal.count("open") == 1);
                CHECK(world.script.journal.count("message") == 0);
                CHECK(world.script.journal.count("close") == 1);
            }
    }

    TEST_CASE("close code, reason and cause say who ended the connection and why") {
        struct Row {
            std::string how;
            std::function<void(World&, Client&)> end;
            unsigned code;
            CloseCause cause;
            std::string reason;
        };
        const Row rows[] = {
            {"peer", [](World&, Client& c) { c.close(CloseCode{4000}, "bye"); }, 4000, CloseCause::peer, "bye"},
            {"peer without a code", [](World&, Client& c) { c.raw.send(hex("88 80 00 00 00 00")); }, 1005,
             CloseCause::peer, ""},
            {"local",
             [](World&, Client& c) {
                 c.send("close");
                 c.close_code();
             },
             4001, CloseCause::local, ""},
            {"protocol error", [](World&, Client& c) { c.raw.send(hex("81 00")); }, 1002, CloseCause::protocol_error,
             "frame from a client is not masked"},
            {"text that is not UTF-8", [](World&, Client& c) { c.send("\xff"); }, 1007, CloseCause::protocol_error,
             "text is not UTF-8"},
            {"a message too big", [](World&, Client& c) { c.send(std::string(100'001, 'x')); }, 1009,
             CloseCause::protocol_error, "message is larger than 100000 bytes"},
            {"hung up", [](World&, Client& c) { c.raw.close(); }, 1006, CloseCause::connection_lost,
             "the peer hung up without a Close frame"},
            {"exception",
             [](World&, Client& c) {
                 c.send("throw");
                 c.close_code();
             },
             1011, CloseCause::handler_exception, "internal error"},
            {"shutdown",
             [](World& w, Client& c) {
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
            World world(with_limits(limits));
            world.script.on_message = [](Scripted& self, const Message& message) {
                if (message.text() == "throw") throw std::runtime_error("thrown");
                self.close(4001, "enough");
            };
            world.script.at = [&](Scripted& self, std::string_view moment) {
                if (moment == "open") CHECK(self.close_cause() == CloseCause::none);
                if (moment == "close") reason = self.close_reason();
                if (moment == "close") CHECK(!self.is_open());
            };
            world.start();
            Client client(world.port());
            row.end(world, client);
            CHECK(world.script.journal.wait_for("destroyed"));
            CHECK(world.script.journal.count("close " + std::to_string(row.code) + " " +
                                             std::string(to_string(row.cause))) == 1);
            CHECK(reason == row.reason);
        }
    }

    TEST_CASE("a peer that does not answer a ping is gone with the cause ping timeout") {
        World world(with_limits(quick_timeouts()));
        world.start();
        Client client(world.port());
        CHECK(world.script.journal.wait_for("close 1006 ping timeout"));
        // It was pinged.
        CHECK(client.raw.read_until(hex("89 00")));
    }

    TEST_CASE("a peer that does not answer our Close frame is gone with the cause closing timeout") {
        wschat::Limits limits = quick_timeouts();
        limits.ping_interval = 0s;
        World world(with_limits(limits));
        world.script.on_message = [](Scripted& self, const Message&) { self.close(4001, "bye"); };
        world.start();
        Client client(world.port());
        client.send("close");
        CHECK(world.script.journal.wait_for("close 1006 closing timeout"));
        CHECK(client.raw.read_until(hex("88 05 0f a1 62 79 65")));
        CHECK(client.raw.read_to_end());
    }

    TEST_CASE("the closing timeout holds where all other timers are off") {
        wschat::Limits limits;
        limits.handshake_timeout = limits.ping_interval = 0s;
        limits.closing_timeout = 30ms;
        World world(with_limits(limits));
        world.script.on_message = [](Scripted& self, const Message&) { self.close(4001, "bye"); };
        world.start();
        Client client(world.port());
        client.send("close");
        CHECK(world.script.journal.wait_for("close 1006 closing timeout"));
    }

    TEST_CASE("a peer that resets is gone with the cause connection lost") {
        World world;
        world.start();
        Client client(world.port());
        client.raw.reset();
        CHECK(world.script.journal.wait_for("close 1006 connection lost"));
    }

    TEST_CASE("a Close frame with our reason reaches the peer") {
        World world;
        world.script.on_message = [](Scripted& self, const Message&) {
            self.write_message("last words");
            self.close(CloseCode{4242}, "caf\xc3\xa9 closes");
            CHECK(self.write_message("too late") == WriteStatus::closed);
            CHECK(self.ping("too late") == WriteStatus::closed);
        };
        world.start();
        Client client(world.port());
        client.send("go");
        CHECK(client.next() == "last words");
        CHECK(client.close_code() == CloseCode{4242});
        CHECK(client.connection.close_reason() == "caf\xc3\xa9 closes");
        CHECK(world.script.journal.wait_for("close 4242 local"));
    }

    TEST_CASE("closing without arguments is 1000 without a reason") {
        World world;
        world.script.on_message = [](Scripted& self, const Message&) { self.close(); };
        world.start();
        Client client(world.port());
        client.send("go");
        CHECK(client.raw.read_until(hex("88 02 03 e8")));
    }

    TEST_CASE("a shutdown closes with 1001 and tells why") {
        World world;
        world.start();
        Client client(world.port());
        world.running.server.shutdown();
        CHECK(client.close_code() == CloseCode::going_away);
        CHECK(client.connection.close_reason() == "server is shutting down");
        CHECK(world.script.journal.wait_for("close 1001 shutdown"));
    }

    TEST_CASE("on_close is called where the server is destroyed with connections open") {
        Journal closed;
        std::optional<World> world(std::in_place);
        world->script.at = [&](Scripted&, std::string_view moment) {
            if (moment == "close") closed.add("close");
        };
        world->start();
        Client client(world->port());
        REQUIRE(client.is_open());
        world->running.stop(0ms);
        world.reset();
        CHECK(closed.count("close") == 1);
    }

    TEST_CASE("the request lives as long as the handler") {
        World world;
        world.running.server.route<Scripted>("/rooms/{room}", std::ref(world.script));
        world.script.at = [&](Scripted& self, std::string_view moment) {
            const Request& request = self.request();
            world.script.journal.add(std::string(moment) + " in " + std::string(request.param("room")) + " by " +
                                     std::string(request.header("user-agent")) + " with " +
                                     request.query("token").value_or("nothing"));
        };
        world.start();
        {
            Client client(world.port(), "/rooms/tea%20room?token=a+b", "User-Agent: test\r\n");
            client.send(std::string(200'000, 'x'));
            CHECK(client.next());
            client.close();
            client.close_code();
        }
        CHECK(world.script.journal.wait_for("destroyed"));
        for (const std::string moment : {"prepare", "open", "message", "close"})
            CHECK(world.script.journal.count(moment + " in tea room by test with a b") == 1);
    }

    // ---- exceptions ------------------------------------------------------------------------------------------------

    // Makes the callbacks of the client's handler happen, all but open and on_close.
    void provoke(Client & client, std::string_view moment) {
        if (moment == "ping") client.ping("x");
        else if (moment == "pong") client.connection.send_control(Opcode::pong, "x");
        else if (moment == "message" || moment == "drain" || moment == "timer" || moment == "post") client.send(moment);
        else if (moment == "close") client.close();
        client.flush();
    }
    // And the ones that begin with a message.
    void on_provoked(Scripted & self, const Message& message) {
        const HandlerRef ref = self.ref();
        if (message.text() == "drain")
            for (int i = 0; i < 60; ++i) self.write_message(std::string(10 * 1024, 'd'));
        else if (message.text() == "timer")
            self.loop().call_later(0ms, [ref] { static_cast<Scripted*>(ref.get())->note("timer", ""); });
        else if (message.text() == "post")
            ref.post([](WebSocketHandler& handler) { static_cast<Scripted&>(handler).note("post", ""); });
        else if (message.text() != "message") self.write_message(message);
    }

    TEST_CASE("an exception out of a callback costs that one connection, with 1011, and is logged") {
        for (const std::string moment : {"open", "message", "ping", "pong", "drain"})
            for (const bool standard : {true, false}) {
                CAPTURE(moment);
                CAPTURE(standard);
                World world;
                world.script.on_message = &on_provoked;
                world.script.at = [&](Scripted& self, std::string_view now) {
                    if (now != moment || self.name() != "victim") return;
                    if (standard) throw std::runtime_error("thrown out of " + moment);
                    throw 42;
                };
                world.start();
                Client witness(world.port(), "/?name=witness");
                Client victim(world.port(), "/?name=victim");
                provoke(victim, moment);
                CHECK(victim.close_code() == CloseCode::internal_error);
                CHECK(victim.connection.close_reason() == "internal error");
                CHECK(world.script.journal.wait_for("victim: close 1011 handler exception"));
                CHECK(world.log.wait_for("error exception in="));
                CHECK(world.log.text().find(standard ? "what=\"thrown out of " + moment + "\""
                                                     : "what=\"not a std::exception\"") != std::string::npos);
                CHECK(world.running.metrics().handler_exceptions == 1);
                witness.send("still here");
                CHECK(witness.next() == "still here");
            }
    }

    TEST_CASE("an exception out of on_close is logged and changes nothing else") {
        for (const bool standard : {true, false}) {
            World world;
            world.script.at = [&](Scripted&, std::string_view moment) {
                if (moment != "close") return;
                if (standard) throw std::runtime_error("thrown");
                throw 42;
            };
            world.start();
            {
                Client client(world.port());
                client.close(CloseCode{4000});
                CHECK(client.close_code() == CloseCode{4000});
            }
            CHECK(world.script.journal.wait_for("destroyed"));
            CHECK(world.script.journal.text() == "prepare, open, close 4000 peer, destroyed");
            CHECK(world.log.wait_for("error exception in=\"on_close\""));
            CHECK(world.lives());
        }
    }

    TEST_CASE("an exception out of a timer or of posted work costs no connection") {
        for (const std::string moment : {"timer", "post"}) {
            CAPTURE(moment);
            World world;
            world.script.on_message = &on_provoked;
            world.script.at = [&](Scripted&, std::string_view now) {
                if (now == moment) throw std::runtime_error("thrown");
            };
            world.start();
            Client client(world.port());
            provoke(client, moment);
            CHECK(world.log.wait_for("error exception in=\"" + moment + "\" what=\"thrown\""));
            client.send("still here");
            CHECK(client.next() == "still here");
        }
    }

    TEST_CASE("a log function that throws costs nothing") {
        World world;
        world.running.server.on_log([](const wschat::LogEntry& entry) {
            if (entry.event != "listening") throw std::runtime_error("no space for the log");
        });
        world.script.on_message = [](Scripted& self, const Message& message) {
            if (message.text() == "throw") throw std::runtime_error("thrown");
            self.room("all").join(self);
            self.write_message(message);
        };
        world.start();
        Client witness(world.port(), "/?name=witness"), victim(world.port(), "/?name=victim"), leaver(world.port());
        for (Client* client : {&witness, &victim, &leaver}) {
            client->send("join");
            CHECK(client->next() == "join");
        }
        victim.send("throw");
        CHECK(victim.close_code() == CloseCode::internal_error);
        leaver.close();
        CHECK(leaver.close_code() == CloseCode::normal);
        CHECK(world.script.journal.wait_for("close 1000 peer"));
        CHECK(world.running.on_loop([&] { return world.running.server.rooms()["all"].size(); }) == 1);
        witness.send("still here");
        CHECK(witness.next() == "still here");
    }

    // ---- writing ---------------------------------------------------------------------------------------------------

    TEST_CASE("text, binary and whole messages are written") {
        World world;
        world.script.on_message = [](Scripted& self, const Message& message) {
            CHECK(self.write_message("caf\xc3\xa9") == WriteStatus::sent);
            CHECK(self.write_message(std::string("\xff\x00\x01", 3), Opcode::binary) == WriteStatus::sent);
            CHECK(self.write_message(message) == WriteStatus::sent);
            CHECK(self.write_message("") == WriteStatus::sent);
        };
        world.start();
        Client client(world.port());
        client.send("\xff", Opcode::binary);
        CHECK(client.raw.read_until(hex("81 05 63 61 66 c3 a9 82 03 ff 00 01 82 01 ff 81 00")));
        CHECK(world.running.metrics().messages_sent == 4);
    }

    struct LikeNlohmann {
        std::string dump(int indent = -1) const { return indent < 0 ? R"({"by":"dump"})" : "indented"; }
    };

    TEST_CASE("write_json takes braces, a Json and any object with dump()") {
        World world;
        world.script.on_message = [](Scripted& self, const Message& message) {
            CHECK(self.write_json({{"type", "say"}, {"text", message.text()}, {"n", 3}}) == WriteStatus::sent);
            self.write_json(Json::array(std::vector<int>{1, 2}));
            self.write_json(LikeNlohmann());
            self.write_json(Json("\xff\"\n"));
        };
        world.start();
        Client client(world.port());
        client.send("a \"b\"\n");
        CHECK(client.next() == R"({"type":"say","text":"a \"b\"\n","n":3})");
        CHECK(client.next() == "[1,2]");
        CHECK(client.next() == R"({"by":"dump"})");
        CHECK(client.next() == "\"\xEF\xBF\xBD\\\"\\n\"");
    }

    TEST_CASE("a ping reaches the peer, and its pong comes back") {
        World world;
        world.script.on_message = [](Scripted& self, const Message&) {
            CHECK(self.ping("are you there") == WriteStatus::sent);
            CHECK(self.ping() == WriteStatus::sent);
        };
        world.start();
        Client client(world.port());
        client.send("go");
        CHECK(client.next(Event::Kind::ping) == "are you there");
        CHECK(client.next(Event::Kind::ping) == "");
        CHECK(world.script.journal.wait_for("pong are you there"));
        CHECK(world.script.journal.wait_for("pong"));
    }

    TEST_CASE("a ping of the peer is answered, and the handler hears of it") {
        World world;
        world.start();
        Client client(world.port());
        client.ping("hey");
        CHECK(client.next(Event::Kind::pong) == "hey");
        CHECK(world.script.journal.wait_for("ping hey"));
    }

    TEST_CASE("illegal calls are an Error with a sentence, and change nothing") {
        Journal sentences;
        World world;
        const auto try_to = [&](const std::function<void()>& call) {
            try {
                call();
                sentences.add("nothing");
            } catch (const Error& error) {
                sentences.add(error.what());
            }
        };
        world.script.on_message = [&](Scripted& self, const Message&) {
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
            try_to([&] { self.ref().write_message("\xff"); });
            try_to([&] { self.ref().close(CloseCode::abnormal); });
            CHECK(self.is_open());
            self.write_message("still open");
        };
        world.start();
        Client client(world.port());
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
              "HandlerRef::write_message: the text is not UTF-8; send it as Opcode::binary, "
              "close: 1006 is not a code that may be sent");
    }

    TEST_CASE("before the 101 nothing is written") {
        World world;
        world.script.prepare = [](Scripted& self) {
            CHECK(self.write_message("early") == WriteStatus::closed);
            CHECK(self.ping() == WriteStatus::closed);
            CHECK(!self.is_open());
            CHECK(self.buffered_amount() == 0);
            CHECK(!self.room("early").join(self));
            return std::nullopt;
        };
        world.start();
        Client client(world.port());
        client.send("first");
        CHECK(client.next() == "first");
        CHECK(world.running.metrics().rooms == 0);
    }

    TEST_CASE("in on_close nothing is written") {
        World world;
        world.script.at = [](Scripted& self, std::string_view moment) {
            if (moment != "close") return;
            CHECK(self.write_message("late") == WriteStatus::closed);
            CHECK(self.ping() == WriteStatus::closed);
            self.close(4000);
            self.ref().write_message("later");
            CHECK(self.close_code() == CloseCode::normal);
        };
        world.start();
        Client client(world.port());
        client.close();
        CHECK(client.close_code() == CloseCode::normal);
        CHECK(world.script.journal.wait_for("destroyed"));
    }

    TEST_CASE("a handler that belongs to no server writes nothing") {
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
        CHECK(script.journal.text() == "destroyed");
    }

    // ---- slow peers ------------------------------------------------------------------------------------------------

    // Writes numbered messages of 32 KiB until one is refused, and notes how many had which status.
    struct Filling {
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
    // Reads them.
    int count_numbered(Client & client, int expected) {
        int n = 0;
        while (n < expected) {
            const auto message = client.next();
            if (!message || std::atoi(message->c_str()) != n) return n;
            ++n;
        }
        return n;
    }

    TEST_CASE("a slow peer's messages are sent, queued and then dropped, where that is the policy") {
        wschat::Limits limits;
        limits.backlog_policy = BacklogPolicy::drop;
        Filling filling;
        std::size_t buffered = 0;
        World world(with_limits(limits));
        world.script.on_message = [&](Scripted& self, const Message& message) {
            if (message.text() != "fill") return void(self.write_message(message));
            filling(self);
            buffered = self.buffered_amount();
            CHECK(self.dropped_messages() == 1);
        };
        world.start();
        Client client(world.port());
        narrow(client);
        client.send("fill");
        CHECK(world.running.eventually([&] { return filling.dropped == 1; }));
        CHECK(filling.queued > 0);
        CHECK(buffered > limits.max_backlog - 33 * 1024);
        CHECK(buffered <= limits.max_backlog);
        CHECK(world.running.metrics().backlog_bytes >= limits.max_backlog / 2);
        CHECK(world.running.metrics().messages_dropped == 1);
        CHECK(world.lives());
        // Nothing that was not dropped is lost.
        CHECK(count_numbered(client, filling.sent + filling.queued) == filling.sent + filling.queued);
        client.send("and on it goes");
        CHECK(client.next() == "and on it goes");
        CHECK(world.ask([](Scripted& self) { return self.buffered_amount(); }) == 0);
    }

    TEST_CASE("on_drain comes when a slow peer has read half of its backlog") {
        wschat::Limits limits;
        limits.backlog_policy = BacklogPolicy::drop;
        Filling filling;
        std::size_t at_drain = 0;
        World world(with_limits(limits));
        world.script.on_message = [&](Scripted& self, const Message&) { filling(self); };
        world.script.at = [&](Scripted& self, std::string_view moment) {
            if (moment == "drain") at_drain = self.buffered_amount();
        };
        world.start();
        Client client(world.port());
        narrow(client);
        client.send("fill");
        CHECK(world.running.eventually([&] { return filling.dropped == 1; }));
        CHECK(world.script.journal.count("drain") == 0);
        CHECK(count_numbered(client, filling.sent + filling.queued) == filling.sent + filling.queued);
        CHECK(world.script.journal.wait_for("drain"));
        CHECK(world.running.on_loop([&] { return at_drain; }) <= limits.max_backlog / 2);
        CHECK(world.script.journal.count("drain") == 1);
    }

    TEST_CASE("a slow peer is closed with 1008, where that is the policy, and may still read what was queued") {
        wschat::Limits limits;
        limits.closing_timeout = test::deadline;
        Filling filling;
        World world(with_limits(limits));
        world.script.on_message = [&](Scripted& self, const Message&) {
            filling(self);
            CHECK(self.write_message("x") == WriteStatus::closed);
        };
        world.start();
        Client client(world.port());
        narrow(client);
        client.send("fill");
        // Before it has read anything.
        CHECK(world.script.journal.wait_for("close 1008 backlog"));
        CHECK(filling.closed == 1);
        CHECK(count_numbered(client, filling.sent + filling.queued) == filling.sent + filling.queued);
        CHECK(client.close_code() == CloseCode::policy_violation);
        CHECK(client.connection.close_reason() == "the peer reads too slowly");
    }

    TEST_CASE("one message may be larger than the backlog limit") {
        wschat::Limits limits;
        limits.max_backlog = 1000;
        World world(with_limits(limits));
        world.script.on_message = [](Scripted& self, const Message&) {
            CHECK(self.write_message(std::string(3'000'000, 'x')) == WriteStatus::sent);
        };
        world.start();
        Client client(world.port());
        client.send("go");
        CHECK(client.next() == std::string(3'000'000, 'x'));
        CHECK(client.is_open());
    }

    TEST_CASE("a peer that does not read is not read either, and loses nothing when it reads again") {
        wschat::Limits limits;
        limits.max_backlog = 256 * 1024;
        World world(with_limits(limits));
        world.start();
        Client client(world.port());
        narrow(client);
        // Far more than all buffers of the kernel, so that a server that went on reading would pass its backlog limit.
        const int count = 3000;
        for (int i = 0; i < count; ++i)
            client.connection.send(Opcode::binary, std::to_string(i) + std::string(16'000, '.'));
        client.connection.send_control(Opcode::ping, "the end");
        const std::string bytes = test::take_output(client.connection);
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(world.running.eventually([&] {
            return !world.script.handlers.empty() && (*world.script.handlers.begin())->buffered_amount() > 128 * 1024;
        }));
        CHECK(world.lives());
        CHECK(count_numbered(client, count) == count);
        CHECK(client.next(Event::Kind::pong) == "the end");
        sender.join();
        CHECK(client.is_open());
        CHECK(world.script.journal.count("close") == 0);
    }

    TEST_CASE("a peer that neither reads nor is read may be closed") {
        wschat::Limits limits;
        limits.max_backlog = 64 * 1024;
        limits.closing_timeout = 50ms;
        World world(with_limits(limits));
        world.start();
        Client client(world.port());
        narrow(client);
        for (int i = 0; i < 2000; ++i) client.connection.send(Opcode::binary, std::string(16'000, '.'));
        const std::string bytes = test::take_output(client.connection);
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(world.running.eventually([&] {
            return !world.script.handlers.empty() && (*world.script.handlers.begin())->buffered_amount() > 32 * 1024;
        }));
        world.running.on_loop([&] { (*world.script.handlers.begin())->close(4000); });
        CHECK(world.script.journal.wait_for("close 1006 closing timeout"));
        client.raw.socket().shutdown_send();
        sender.join();
    }

    TEST_CASE("small and large messages to a slow peer keep their order") {
        wschat::Limits limits;
        limits.max_backlog = 64 * 1024 * 1024;
        World world(with_limits(limits));
        world.script.on_message = [](Scripted& self, const Message&) {
            for (std::size_t i = 0; i < 300; ++i) {
                const WriteStatus status = self.write_message(std::to_string(i) + std::string(i % 3 * 20'000, '.'));
                CHECK((status == WriteStatus::sent || status == WriteStatus::queued));
            }
        };
        world.start();
        Client client(world.port());
        narrow(client);
        client.send("go");
        client.send("go");
        CHECK(count_numbered(client, 300) == 300);
        CHECK(count_numbered(client, 300) == 300);
    }

    TEST_CASE("writing to a peer that has reset is no exception, and ends that connection") {
        for (const std::size_t size : std::initializer_list<std::size_t>{10, 100'000}) {
            CAPTURE(size);
            World world;
            world.start();
            Client client(world.port());
            world.running.on_loop([&] {
                client.raw.reset();
                for (int i = 0; i < 100; ++i) (*world.script.handlers.begin())->write_message(std::string(size, '.'));
            });
            CHECK(world.script.journal.wait_for("close 1006 connection lost"));
            CHECK(world.lives());
        }
    }

    TEST_CASE("the pings of a peer that does not read cost no memory, and the latest is answered") {
        wschat::Limits limits;
        limits.control_frames_per_second = 0;
        std::size_t most = 0;
        World world(with_limits(limits));
        world.script.at = [&](Scripted& self, std::string_view moment) {
            if (moment == "ping") most = std::max(most, self.buffered_amount());
        };
        world.start();
        Client client(world.port());
        narrow(client);
        for (int i = 0; i < 100'000; ++i)
            client.connection.send_control(Opcode::ping, std::to_string(i) + std::string(115, '.'));
        client.connection.send(Opcode::text, "the end");
        const std::string bytes = test::take_output(client.connection);
        std::thread sender([&] { client.raw.send(bytes); });
        CHECK(world.script.journal.wait_for("message the end"));
        sender.join();
        CHECK(world.running.on_loop([&] { return most; }) < limits.max_backlog);
        int last = -1, pongs = 0;
        // The last pong may come behind the message.
        while (last != 99'999) {
            const auto pong = client.next(Event::Kind::pong);
            REQUIRE(pong);
            REQUIRE(std::atoi(pong->c_str()) > last);
            last = std::atoi(pong->c_str());
            ++pongs;
        }
        CHECK(pongs < 100'000);
    }

    // The TCP_NODELAY of the server's end of a connection, which is among our own descriptors.
    int nodelay_of_peer(Client & client) {
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

    TEST_CASE("TCP_NODELAY is on, and set_nodelay changes it") {
        World world;
        world.script.on_message = [](Scripted& self, const Message& message) {
            self.set_nodelay(message.text() == "on");
            self.write_message("done");
        };
        world.start();
        Client client(world.port());
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

    TEST_CASE("another thread writes and closes through a reference") {
        World world;
        world.start();
        Client client(world.port());
        const HandlerRef ref = world.ask([](Scripted& self) { return self.ref(); });
        CHECK(ref.write_message("from outside"));
        CHECK(ref.write_message("\xff", Opcode::binary));
        CHECK(client.next() == "from outside");
        CHECK(client.next() == "\xff");
        CHECK(ref.post([](WebSocketHandler& handler) { handler.write_message("from within"); }));
        CHECK(client.next() == "from within");
        CHECK(world.running.on_loop([&] { return ref.get() == *world.script.handlers.begin(); }));
        CHECK(ref.close(CloseCode{4004}, "from outside"));
        CHECK(client.close_code() == CloseCode{4004});
        CHECK(client.connection.close_reason() == "from outside");
    }

    TEST_CASE("a reference to a handler that is gone does nothing") {
        World world;
        world.start();
        Client client(world.port());
        const HandlerRef ref = world.ask([](Scripted& self) { return self.ref(); });
        client.raw.close();
        CHECK(world.script.journal.wait_for("destroyed"));
        std::atomic<bool> ran{false};
        CHECK(ref.post([&](WebSocketHandler&) { ran = true; }));
        CHECK(ref.write_message("hello"));
        CHECK(ref.close());
        CHECK(world.running.on_loop([&] { return ref.get() == nullptr; }));
        CHECK(!ran);
        CHECK(world.lives());
    }

    TEST_CASE("a reference from prepare refers to the same handler, and to nothing where it was refused") {
        HandlerRef kept;
        World world;
        world.script.prepare = [&](Scripted& self) -> std::optional<Response> {
            kept = self.ref();
            if (self.name() == "refused") return Response(403, "No.\n");
            return std::nullopt;
        };
        world.start();
        Client client(world.port());
        CHECK(world.running.on_loop([&] { return kept.get() == *world.script.handlers.begin(); }));
        Client refused(world.port(), "/?name=refused");
        CHECK(status_of(refused) == "HTTP/1.1 403");
        CHECK(world.running.on_loop([&] { return kept.get() == nullptr; }));
    }

    TEST_CASE("a reference outlives the server") {
        std::optional<World> world(std::in_place);
        world->start();
        Client client(world->port());
        const HandlerRef ref = world->ask([](Scripted& self) { return self.ref(); });
        client.raw.close();
        world.reset();
        CHECK(!ref.write_message("hello"));
        CHECK(!ref.close());
        CHECK(!ref.post([](WebSocketHandler&) {}));
        CHECK(!HandlerRef().write_message("to nobody"));
        CHECK(HandlerRef().get() == nullptr);
    }

    TEST_CASE("threads write through references while connections close and the server shuts down") {
        std::atomic<bool> stop{false};
        std::mutex mutex;
        std::vector<HandlerRef> refs;
        World world;
        world.script.at = [&](Scripted& self, std::string_view moment) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (moment == "open") refs.push_back(self.ref());
        };
        world.start();
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
            Client client(world.port());
            CHECK(client.is_open());
            CHECK(client.next() == "news");
        }
        Client last(world.port());
        world.running.stop(100ms);
        stop = true;
        for (std::thread& thread : threads) thread.join();
        CHECK(world.script.journal.count("open") == world.script.journal.count("close"));
        CHECK(world.script.journal.count("open") == 31);
    }

    // ---- re-entrancy -----------------------------------------------------------------------------------------------

    // Three connections: the actor, whose handler does something in one of its callbacks, another to whom it may be
    // done, and a witness who must come to no harm. All are in the room "all".
    struct Stage {
        explicit Stage(std::string_view its_moment, std::function<void(Scripted&)> action)
            : moment(its_moment),
              witness(prepared(std::move(action)).port(), "/?name=witness"),
              other(world.port(), "/?name=other"),
              actor(world.port(), "/?name=actor") {
            provoke(actor, moment);
            acted = world.script.journal.wait_for("acted");
        }
        World& prepared(std::function<void(Scripted&)> action) {
            world.script.on_message = &on_provoked;
            world.script.at = [this, action = std::move(action)](Scripted& self, std::string_view now) {
                if (now == "open") self.room("all").join(self);
                if (now != moment || self.name() != "actor" || done) return;
                done = true;
                world.script.journal.add("acted");
                action(self);
            };
            return world.start();
        }
        // The next message to the witness that is none of its own.
        bool witness_hears(std::string_view wanted) {
            while (const auto message = witness.next())
                if (*message == wanted) return true;
            return false;
        }
        bool in(std::initializer_list<std::string_view> moments) const {
            return std::find(moments.begin(), moments.end(), moment) != moments.end();
        }

        std::string_view moment;
        bool done = false;  // for the loop's thread
        bool acted = false;
        World world;
        Client witness, other, actor;
    };

    struct Action {
        std::string name;
        std::function<void(Scripted&)> act;
        std::function<void(Stage&)> expect;
        bool witness_lives = true;
    };

    // Each action is tried in each callback; a new one needs no more than a row here.
    const Action actions[] = {
        {"nothing", [](Scripted&) {}, [](Stage&) {}},
        {"close itself", [](Scripted& self) { self.close(4001); },
         [](Stage& s) {
             if (!s.in({"prepare"}))
                 CHECK(s.actor.close_code() == (s.in({"close"}) ? CloseCode::normal : CloseCode{4001}));
         }},
        {"close another",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all"))
                 if (static_cast<Scripted&>(member).name() == "other") member.close(4002, "by another");
         },
         [](Stage& s) { CHECK(s.other.close_code() == CloseCode{4002}); }},
        {"close everybody",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all")) member.close(4003);
         },
         [](Stage& s) {
             CHECK(s.witness.close_code() == CloseCode{4003});
             CHECK(s.other.close_code() == CloseCode{4003});
         },
         false},
        {"join", [](Scripted& self) { self.write_message(self.room("new").join(self) ? "joined" : "not joined"); },
         [](Stage& s) {
             if (!s.in({"prepare", "close", "drain"})) CHECK(s.actor.next() == "joined");
         }},
        {"leave", [](Scripted& self) { self.write_message(self.room("all").leave(self) ? "left" : "not left"); },
         [](Stage& s) {
             if (!s.in({"prepare", "close", "drain"})) CHECK(s.actor.next() == "left");
         }},
        {"leave and join again",
         [](Scripted& self) {
             self.room("all").leave(self);
             self.room("all").join(self);
             self.room("all").broadcast("news");
         },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"broadcast", [](Scripted& self) { self.room("all").broadcast("news"); },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"broadcast to the others", [](Scripted& self) { self.room("all").broadcast("news", &self); },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"broadcast what a slow member does without",
         [](Scripted& self) { self.room("all").broadcast_volatile("news"); },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"write in every way",
         [](Scripted& self) {
             const wschat::EncodedFrame frame(self.server().arena(), Opcode::text, "encoded");
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
         [](Stage& s) {
             CHECK(s.witness_hears("text"));
             for (const std::string wanted : {"bytes", "message", "encoded", "encoded", R"({"news":"json"})"})
                 CHECK(s.witness.next() == wanted);
             CHECK(s.witness.next(Event::Kind::ping) == "another");
         }},
        {"leave every room",
         [](Scripted& self) {
             for (wschat::Room* room : self.rooms()) room->leave(self);
             self.room("all").broadcast("news");
         },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"make everybody move to another room",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all")) {
                 self.room("all").leave(member);
                 self.room("new").join(member);
             }
             self.room("new").broadcast("news");
         },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"broadcast much",
         [](Scripted& self) {
             for (int i = 0; i < 20; ++i) self.room("all").broadcast(std::string(50'000, '.'));
         },
         [](Stage& s) { CHECK(s.witness_hears(std::string(50'000, '.'))); }},
        {"ping itself", [](Scripted& self) { self.ping("self"); },
         [](Stage& s) {
             if (!s.in({"prepare", "close"})) CHECK(s.actor.next(Event::Kind::ping) == "self");
         }},
        {"throw", [](Scripted&) { throw std::runtime_error("thrown"); },
         [](Stage& s) {
             if (s.in({"open", "message", "ping", "pong", "drain"}))
                 CHECK(s.actor.close_code() == CloseCode::internal_error);
             CHECK(s.world.log.wait_for("error exception in="));
         }},
        {"close itself and throw",
         [](Scripted& self) {
             self.close(4001);
             throw std::runtime_error("thrown");
         },
         [](Stage& s) {
             if (!s.in({"prepare", "close"})) CHECK(s.actor.close_code() == CloseCode{4001});
         }},
        {"broadcast and throw",
         [](Scripted& self) {
             self.room("all").broadcast("news");
             throw std::runtime_error("thrown");
         },
         [](Stage& s) { CHECK(s.witness_hears("news")); }},
        {"write to itself through a reference", [](Scripted& self) { self.ref().write_message("later"); },
         [](Stage& s) {
             if (!s.in({"close", "drain"})) CHECK(s.actor.next() == "later");
         }},
        {"a timer for itself",
         [](Scripted& self) {
             self.loop().call_later(0ms, [ref = self.ref()] {
                 if (WebSocketHandler* handler = ref.get()) handler->write_message("later");
             });
         },
         [](Stage& s) {
             if (!s.in({"close", "drain"})) CHECK(s.actor.next() == "later");
         }},
        {"close another through a reference",
         [](Scripted& self) {
             for (WebSocketHandler& member : self.room("all"))
                 if (static_cast<Scripted&>(member).name() == "other")
                     member.ref().close(CloseCode{4002}, "by another");
         },
         [](Stage& s) { CHECK(s.other.close_code() == CloseCode{4002}); }},
        {"close itself later, and leave work for after that",
         [](Scripted& self) {
             self.ref().post([ref = self.ref()](WebSocketHandler& handler) {
                 handler.close(4001);
                 ref.write_message("too late");
             });
         },
         [](Stage& s) {
             if (!s.in({"close"})) CHECK(s.actor.close_code() == CloseCode{4001});
         }},
        {"a call again and again that cancels itself",
         [](Scripted& self) {
             const auto id = std::make_shared<wschat::Loop::TimerId>();
             *id = self.loop().call_every(1ms, [&server = self.server(), id] {
                 if (server.loop().cancel(*id)) server.rooms()["all"].broadcast("called");
             });
         },
         [](Stage& s) { CHECK(s.witness_hears("called")); }},
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
         [](Stage& s) { CHECK(s.witness_hears("3")); }},
        {"stop the loop", [](Scripted& self) { self.loop().stop(); },
         [](Stage& s) {
             s.world.running.stop(0ms);
             s.world.running.server.run();  // ends what the first run has left
             CHECK(s.witness.raw.read_to_end());
         },
         false},
        {"shut the server down at once", [](Scripted& self) { self.server().shutdown(0ms); },
         [](Stage& s) {
             for (Client* client : {&s.witness, &s.other, &s.actor}) CHECK(client->raw.read_to_end());
         },
         false},
        {"shut the server down", [](Scripted& self) { self.server().shutdown(2s); },
         [](Stage& s) {
             CHECK(s.witness.close_code() == CloseCode::going_away);
             CHECK(s.other.close_code() == CloseCode::going_away);
         },
         false},
    };

    // A test for each callback, so that ctest names the one that fails.
    void try_all_actions(const std::string& moment) {
        for (const Action& action : actions) {
            CAPTURE(moment);
            CAPTURE(action.name);
            Stage stage(moment, action.act);
            CHECK(stage.acted);
            action.expect(stage);
            if (action.witness_lives) {
                stage.witness.send("still here");
                CHECK(stage.witness_hears("still here"));
            }
            for (Client* client : {&stage.witness, &stage.other, &stage.actor}) client->raw.close();
            stage.world.running.stop();
            const Journal& journal = stage.world.script.journal;
            for (const std::string name : {"witness", "other", "actor"}) {
                CAPTURE(name);
                const bool refused = name == "actor" && journal.count("actor: open") == 0;
                CHECK((!refused || moment == "prepare"));
                CHECK(journal.count(name + ": open") == (refused ? 0 : 1));
                CHECK(journal.count(name + ": close") == (refused ? 0 : 1));
            }
            CHECK(stage.world.script.handlers.empty());
        }
    }

    TEST_CASE("a handler may do anything in prepare") { try_all_actions("prepare"); }
    TEST_CASE("a handler may do anything in open") { try_all_actions("open"); }
    TEST_CASE("a handler may do anything in on_message") { try_all_actions("message"); }
    TEST_CASE("a handler may do anything in on_close") { try_all_actions("close"); }
    TEST_CASE("a handler may do anything in on_ping") { try_all_actions("ping"); }
    TEST_CASE("a handler may do anything in on_pong") { try_all_actions("pong"); }
    TEST_CASE("a handler may do anything in on_drain") { try_all_actions("drain"); }
    TEST_CASE("a handler may do anything in a timer") { try_all_actions("timer"); }
    TEST_CASE("a handler may do anything in posted work") { try_all_actions("post"); }

    // ---- what nobody has overridden --------------------------------------------------------------------------------

    TEST_CASE("a handler that overrides on_message alone chooses no subprotocol, and pings and pongs pass it by") {
        struct Plain : WebSocketHandler {
            void on_message(const Message& message) override { write_message(message); }
        };
        RunningServer running;
        running.server.route<Plain>("/");
        running.start();
        Client client(running.port(), "/", "Sec-WebSocket-Protocol: chat, superchat\r\n");
        REQUIRE(client.is_open());
        CHECK(client.head.find("Sec-WebSocket-Protocol") == std::string::npos);
        client.connection.send_control(Opcode::pong, "nobody asked");
        client.ping("are you there");
        CHECK(client.next(Event::Kind::pong) == "are you there");
        client.send("hello");
        CHECK(client.next() == "hello");
    }

    TEST_CASE("what needs a server is an Error in a handler that has none") {
        Script script;
        Scripted alone(script);
        CHECK_THROWS_WITH_AS(alone.room("lobby"), "room: a handler has no server in its constructor", Error);
        CHECK_THROWS_WITH_AS(alone.loop(), "loop: a handler has no server in its constructor", Error);
        CHECK_THROWS_WITH_AS(alone.server(), "server: a handler has no server in its constructor", Error);
    }

    TEST_CASE("on_drain does not come to a handler that has closed") {
        wschat::Limits limits;
        limits.backlog_policy = BacklogPolicy::drop;
        limits.closing_timeout = test::deadline;
        Filling filling;
        World world(with_limits(limits));
        world.script.on_message = [&](Scripted& self, const Message&) {
            filling(self);
            self.close(4000, "that was all");
        };
        world.start();
        Client client(world.port());
        narrow(client);
        client.send("fill");
        CHECK(world.running.eventually([&] { return filling.dropped == 1; }));
        CHECK(count_numbered(client, filling.sent + filling.queued) == filling.sent + filling.queued);
        CHECK(client.close_code() == CloseCode{4000});
        CHECK(world.script.journal.wait_for("close 4000 local"));
        CHECK(world.script.journal.count("drain") == 0);
    }
}
