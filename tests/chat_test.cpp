// section 16: most tests use handlers without sockets; tests of lost connections use sockets.
#define WSCHAT_CHAT 1
#include "store_suite.hpp"

#include <sys/resource.h>
#include <algorithm>

namespace {

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::contains;
using test::field_of;
using test::next_with;
using test::RawClient;
using test::RunningServer;
using test::WsClient;

// ---- a chat without sockets ----------------------------------------------------------------------------------------

// Takes the place of a server's sessions. The server does not run: time stands still, and output stays in the handlers.
class TestHost final : public HandlerHost {
public:
    void on_reply(ReplyAnswer&&) override {}
    void mark_dirty() override {}
    void flush() override {}
    std::size_t offer(const std::string_view*, std::size_t) override { return 0; }
    void set_nodelay(bool) override {}
    bool origin_allowed(std::string_view) const override { return true; }
    Time now() const override { return const_cast<Server&>(server_).loop().now(); }
    bool on_loop_thread() const override { return true; }
    Rooms& rooms() override { return server_.rooms(); }
    Loop& loop() override { return server_.loop(); }
    Server& server() override { return server_; }
    std::shared_ptr<Mailbox> mailbox() override { return server_.loop().mailbox(); }
    void report_exception(const char*, const char*) noexcept override {}

    ChatHub& hub() { return ChatHub::of(server_); }
    TestHost() { hub().limits.presence_window = Duration::zero(); }  // nothing would end a window
    ChatRoom& room(std::string_view name) { return hub().room(name); }
    // "EPOCH-ID"
    std::string position(const std::string& id) {
        std::string epoch;
        hub().store().since("tea", std::nullopt, 0, [&](const HistoryPage& page) { epoch = page.epoch; });
        return epoch + "-" + id;
    }

private:
    ServerOptions quiet() {
        ServerOptions options;
        options.handle_signals = false;
        return options;
    }
    Server server_{quiet()};
};

// The names of the users in a `users` event, in order.
std::string names_in(const std::string& event) {
    std::string names;
    const std::string field = "\"name\":\"";
    for (std::size_t at = event.find(field); at != std::string::npos; at = event.find(field, at)) {
        at += field.size();
        names += (names.empty() ? "" : ", ") + event.substr(at, event.find('"', at) - at);
    }
    return names;
}

// A client and its handler. The handler receives each line immediately. A connection in the client's role parses the
// output.
template <class Handler = ChatHandler>
class ChatClient {
public:
    explicit ChatClient(TestHost& host, const std::string& query = "", const std::string& room = "tea",
                        const std::string& address = "127.0.0.1")
        : host_(host) {
        RequestParser parser(limits_);
        std::size_t consumed = 0;
        parser.feed("GET /chat?" + query + " HTTP/1.1\r\nHost: x\r\n\r\n", consumed);
        HandlerCore& core = HandlerAccess::core(handler);
        core.host = &host;
        core.request = parser.take_request();
        RequestAccess::set_params(core.request, {{"room", room}});
        RequestAccess::set_connection(core.request, address, false);
        refusal = handler.prepare(core.request);
        if (refusal) return;
        core.connection.open(Role::server, limits_, arena_, host.now());
        peer_.open(Role::client, limits_, arena_, host.now(), &test::test_mask);
        opened_ = true;
        handler.open();
    }
    ChatClient(const ChatClient&) = delete;
    ChatClient& operator=(const ChatClient&) = delete;
    ~ChatClient() { disconnect(); }

    // Sends a line and returns all new events.
    std::vector<std::string> send(std::string_view line, Opcode opcode = Opcode::text) {
        if (handler.is_open()) handler.on_message(Message(line, opcode));
        return events();
    }
    std::vector<std::string> events() {
        std::vector<std::string> list;
        std::string bytes = test::take_output(HandlerAccess::core(handler).connection);
        peer_.receive(bytes.data(), bytes.size(), host_.now());
        for (Event event = peer_.next_event(); event.kind != Event::Kind::none; event = peer_.next_event()) {
            if (event.kind == Event::Kind::close) break;
            list.emplace_back(event.message.text());
        }
        return list;
    }
    // The only new event, or "N events".
    std::string only_event() { return only(events()); }
    std::string answer_to(std::string_view line) {
        events();
        return only(send(line));
    }
    // Ends the connection, with a Close frame unless the code is `abnormal`.
    void disconnect(CloseCode code = CloseCode::abnormal) {
        if (!std::exchange(opened_, false)) return;
        Connection& connection = HandlerAccess::core(handler).connection;
        if (code == CloseCode::abnormal) connection.receive_eof("lost");
        else connection.fail(code, "", CloseCause::peer);
        RoomsAccess::remove_from_all(host_.rooms(), handler);
        handler.on_close();
    }
    // Destroys the handler in the destructor without a call of on_close().
    void abandon() { opened_ = false; }
    CloseCode close_code() {
        events();
        return peer_.close_code();
    }

    Handler handler;
    std::optional<Response> refusal;

private:
    static std::string only(const std::vector<std::string>& list) {
        return list.size() == 1 ? list[0] : std::to_string(list.size()) + " events";
    }

    TestHost& host_;
    Limits limits_;
    SendArena arena_;
    Connection peer_;
    bool opened_ = false;
};

std::string names_of(const std::vector<ChatUser>& users) {
    std::string all;
    for (const ChatUser& user : users) (all += all.empty() ? "" : " ") += user.name;
    return all;
}

// The texts in an event, each with a semicolon.
std::string texts_of(const std::string& event) {
    std::string all;
    const std::string field = "\"text\":\"";
    for (std::size_t at = event.find(field); at != std::string::npos; at = event.find(field, at)) {
        at += field.size();
        all += event.substr(at, event.find('"', at) - at) + ";";
    }
    return all;
}

ChatUser named(const std::string& name) { return ChatUser{name}; }
ChatUser identified(const std::string& name, const std::string& key) { return {name, "", false, "id of " + key}; }

// The position that a client has after a history event.
std::string position_of(const std::string& history) {
    return field_of(history, "epoch") + "-" + field_of(history, "last");
}

ChatEntry entry(const std::string& text, const std::string& tag = "", const std::string& author = "anna") {
    ChatEntry made;
    made.room = "tea";
    made.name = "Anna";
    made.text = text;
    made.tag = tag;
    made.author = author;
    return made;
}

// "2 3 4", or "2 3 4 gap".
std::string ids_of(const HistoryPage& page) {
    std::string all;
    for (const ChatEntry& each : page.entries) (all += all.empty() ? "" : " ") += std::to_string(each.id);
    return page.gap ? all + (all.empty() ? "gap" : " gap") : all;
}

const Time start{1000s};

}  // namespace

TEST_SUITE_BEGIN("chat");

// ---- lines, names and JSON -----------------------------------------------------------------------------------------

TEST_CASE("a line that begins with one slash is a command, and all other lines are messages") {
    const struct {
        std::string_view line, tag, command, rest;
    } table[] = {
        {"hello", "", "", "hello"},
        {"", "", "", ""},
        {"//hello", "", "", "/hello"},
        {" /me", "", "", " /me"},
        {"/me waves", "", "me", "waves"},
        {"/me  waves ", "", "me", " waves "},
        {"/help", "", "help", ""},
        {"/", "", "/", ""},
        {"/ me", "", "/", "me"},
        {"{\"type\":\"said\"}", "", "", "{\"type\":\"said\"}"},
        {"/tag t1 hello", "t1", "", "hello"},
        {"/tag t1 /me waves", "t1", "me", "waves"},
        {"/tag t1 //hello", "t1", "", "/hello"},
        {"/tag t1", "t1", "", ""},
        {"/tag", "", "tag", ""},
        {"/tag  hello", "", "", "hello"},
    };
    for (const auto& row : table) {
        CAPTURE(row.line);
        const ChatLine line = ChatLine::parse(row.line);
        CHECK(line.tag == row.tag);
        CHECK(line.command == row.command);
        CHECK(line.rest == row.rest);
    }
}

TEST_CASE("a tag is 1 to 64 visible ASCII characters") {
    CHECK(ChatLine::valid_tag("a"));
    CHECK(ChatLine::valid_tag(std::string(64, '~')));
    for (const std::string& bad :
         {std::string(), std::string(65, 'a'), std::string("a b"), std::string("\xC3\xBC"), std::string("\x7F")})
        CHECK_FALSE(ChatLine::valid_tag(bad));
}

TEST_CASE("a name is visible text without spaces at its ends") {
    for (const std::string_view good :
         {"a", "Anna", "Gr\xC3\xBCner Tee & mehr", "<b>", "/x", "\xF0\x9F\x8D\xB5", "\xD7\x90"}) {
        CAPTURE(good);
        CHECK(valid_chat_name(good, 40));
    }
    for (const std::string_view bad :
         {"", " a", "a ", "a  b", "a\tb", "a\nb", "\x7F", "\xC2\x80", "\xC2\xAD", "\xE2\x80\x8B", "\xE2\x80\xAE",
          "\xE2\x81\xA0", "\xEF\xBB\xBF", "\xD8\x9C", "\xF3\xA0\x80\xA0", "\xFF", "\xC3"}) {
        CAPTURE(test::to_hex(bad));
        CHECK_FALSE(valid_chat_name(bad, 40));
    }
    // Invisible characters that make a name look like another one: U+00A0, 034F, 1160, 180E, 2003, 202F,
    // 2800, 3000, 3164, FFA0, FFF9, FFFC, E0100.
    for (const std::string hidden :
         {"\xC2\xA0", "\xCD\x8F", "\xE1\x85\xA0", "\xE1\xA0\x8E", "\xE2\x80\x83", "\xE2\x80\xAF", "\xE2\xA0\x80",
          "\xE3\x80\x80", "\xE3\x85\xA4", "\xEF\xBE\xA0", "\xEF\xBF\xB9", "\xEF\xBF\xBC", "\xF3\xA0\x84\x80"}) {
        CAPTURE(test::to_hex(hidden));
        CHECK_FALSE(valid_chat_name("Anna" + hidden, 40));
        CHECK(valid_chat_text("Anna" + hidden));
    }
    CHECK(valid_chat_name(std::string(40, 'x'), 40));
    CHECK_FALSE(valid_chat_name(std::string(41, 'x'), 40));
}

TEST_CASE("a joiner stands within a name, and a name has more than marks") {
    // Persian with U+200C, a family with U+200D, a heart with U+FE0F, two words with U+3000.
    for (const std::string good : {"\xD9\x85\xDB\x8C\xE2\x80\x8C\xD8\xAE\xD9\x88\xD8\xA7\xD9\x87",
                                   "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x9A\x80", "\xE2\x9D\xA4\xEF\xB8\x8F",
                                   "\xE5\xB1\xB1\xE3\x80\x80\xE5\xA4\xAA", "e\xCC\x81"}) {
        CAPTURE(test::to_hex(good));
        CHECK(valid_chat_name(good, 40));
        CHECK(valid_chat_name(good + "x", 40));
    }
    // A joiner or a selector at an end, two in a row, no letter at all.
    for (const std::string bad : {"\xE2\x80\x8C"
                                  "a",
                                  "a\xE2\x80\x8D",
                                  "a\xE2\x80\x8C\xE2\x80\x8C"
                                  "b",
                                  "\xEF\xB8\x8F",
                                  "a \xEF\xB8\x8F"
                                  "b",
                                  "\xE3\x80\x80"
                                  "a",
                                  "a \xE3\x80\x80"
                                  "b"}) {
        CAPTURE(test::to_hex(bad));
        CHECK_FALSE(valid_chat_name(bad, 40));
    }
#if !WSCHAT_UTF8PROC
    CHECK_FALSE(valid_chat_name("\xCC\x81", 40));
#endif
}

TEST_CASE("names that look alike have the same folded form") {
    constexpr const char* pairs[][2] = {
        {"Anna", "aNNa"},
        {"\xC3\x89mil", "E\xCC\x81MIL"},                           // composed, decomposed
        {"\xC3\x96zg\xC3\xBCr", "\xC3\xB6ZG\xC3\x9CR"},            // case beyond ASCII
        {"\xD0\x90nna", "Anna"},                                   // a Cyrillic A
        {"\xCE\x91nna", "Anna"},                                   // a Greek A
        {"\xD0\x9C\xD0\xB8\xD1\x80", "\xD0\xBC\xD0\x98\xD0\xA0"},  // Cyrillic case
        {"\xEF\xBC\xA1nna", "Anna"},                               // full width
        {"An\xE2\x80\x8Dna", "Anna"},                              // a joiner
        {"\xE2\x9D\xA4\xEF\xB8\x8F", "\xE2\x9D\xA4"},              // a variation selector
        {"a\xE3\x80\x80"
         "b",
         "a b"},
    };
    for (const auto& pair : pairs) {
        CAPTURE(test::to_hex(pair[0]));
        CHECK(chat_fold(pair[0]) == chat_fold(pair[1]));
    }
    CHECK(chat_fold("Anna") == "anna");
    CHECK(chat_fold("Anna") != chat_fold("Anne"));
    CHECK(chat_fold("\xF0\x9F\x8D\xB5") == "\xF0\x9F\x8D\xB5");
    CHECK(chat_fold("\xE5\xB1\xB1") == "\xE5\xB1\xB1");
    CHECK(chat_fold("\xFF") == "\xFF");
}

TEST_CASE("two users of a room have no names that look alike") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), twin(host, "name=%D0%90nna"), bert(host, "name=Bert");
    CHECK(contains(twin.events()[0], "\xD0\x90nna-2"));
    bert.events();
    CHECK(contains(bert.answer_to("/nick \xEF\xBC\xA1NNA"), "name_taken"));
    host.hub().ban("\xEF\xBC\xA1nna", 1h);
    ChatClient<> banned(host, "name=ANNA");
    CHECK(banned.refusal.has_value());
}

TEST_CASE("a free name is found in few steps in a room of thousands of guests") {
    Presence presence;
    for (int i = 0; i < 5000; ++i) presence.add(named(presence.free_name("guest")), "");
    CHECK(presence.size() == 5000);
    for (std::size_t n = 5000; n < 5100; ++n) presence.add(named("guest-" + std::to_string(n)), "");
    CHECK(presence.find(presence.free_name("guest")) == nullptr);
}

TEST_CASE("a message may contain all characters except control characters other than line feed and tab") {
    for (const std::string_view good :
         {"", "a\nb\tc", "\xE2\x80\xAE", "\xC3\xBC", "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x9A\x80"})
        CHECK(valid_chat_text(good));
    for (const std::string_view bad :
         {std::string_view("\0", 1), std::string_view("\x1B[2J"), std::string_view("\r"), std::string_view("\x7F"),
          std::string_view("\xC2\x9B"), std::string_view("\xFF")}) {
        CAPTURE(test::to_hex(bad));
        CHECK_FALSE(valid_chat_text(bad));
    }
}

TEST_CASE("an event is one JSON object with its fields in the order of the calls") {
    ChatEvent event("x\"y");
    event.add("n", 1).add_json("list", "[2]").add_unless_empty("no", "").add_unless_empty("text", "\xC3\xBC\n");
    CHECK(event.dump() == "{\"type\":\"x\\\"y\",\"n\":1,\"list\":[2],\"text\":\"\xC3\xBC\\n\"}");
}

TEST_CASE("a JSON value is checked by the grammar of RFC 8259") {
    const std::string open(32, '['), close(32, ']');
    for (const std::string& valid :
         {std::string(R"({"role":"host","n":[1,-0.5e+3,0,1E2],"o":{}})"), std::string(" [ ] "), std::string("null"),
          std::string("-1.25"), std::string(R"("\u00e9\\\"\/\n")"), std::string("\"\xC3\xBC\""),
          std::string("[true,false, \"\" ]"), std::string("{ \"a\" : { \"b\" : 1 } , \"c\" : [ ] }"), open + close}) {
        CAPTURE(valid);
        CHECK(valid_json(valid));
    }
    for (const std::string_view bad :
         {"",         " ",          "{",       "}",       "[1",          "[1,]",    "[,1]",      "{,}",  "{\"a\"}",
          "{\"a\":}", "{\"a\":1,}", "{a:1}",   "{1:2}",   "'a'",         "01",      "+1",        "1.",   ".5",
          "1e",       "1e+",        "-",       "nul",     "nulls",       "True",    "NaN",       "1 2",  "[1 2]",
          "[1]]",     "\"",         "\"a",     "\"\\x\"", "\"\\u12g4\"", "\"\\u12", "\"\\u12\"", "\"\\", "\"\\u",
          "\"a\nb\"", "host",       "[] // x", "[}",      "{]",          "\"\xFF\""}) {
        CAPTURE(test::to_hex(bad));
        CHECK_FALSE(valid_json(bad));
    }
    CHECK_FALSE(valid_json("[" + open + close + "]"));
    CHECK_FALSE(valid_json(std::string(1'000'000, '[')));
}

// ---- flood limits --------------------------------------------------------------------------------------------------

#if WSCHAT_ZLIB
TEST_CASE("a derived class compresses the chat with one line, for clients that offer it") {
    struct CompressedChat : ChatHandler {
        std::optional<CompressionOptions> get_compression_options() override { return CompressionOptions(); }
    };
    TestServer server;
    server.route<CompressedChat>("/chat/{room}");
    TestClient anna = server.connect(TestRequest("/chat/tea?name=Anna").compression());
    TestClient bob = server.connect("/chat/tea?name=Bob");
    CHECK(contains(anna.response().header("sec-websocket-extensions"), "permessage-deflate"));
    CHECK(bob.response().header("sec-websocket-extensions") == "");
    const std::string text(1500, 'a');  // above CompressionOptions::threshold
    anna.send(text);
    for (TestClient* client : {&anna, &bob}) CHECK(contains(client->received().back(), text));
}
#endif

TEST_CASE("a flood limiter counts messages and bytes") {
    FloodLimiter meter;
    const FloodRates rates{{1, 2}, {1, 10}};
    CHECK(meter.take(5, rates, start));
    CHECK(meter.take(5, rates, start));
    CHECK_FALSE(meter.take(0, rates, start));
    FloodLimiter bytes;
    CHECK(bytes.take(10, rates, start));
    CHECK_FALSE(bytes.take(1, rates, start));
    CHECK(bytes.full(start + 10s));
}

TEST_CASE("the flood policy warns, drops and closes, and restarts after ten quiet seconds") {
    using Action = FloodPolicy::Action;
    FloodPolicy policy;
    CHECK(policy.decide(true, 3, start) == Action::accept);
    CHECK(policy.decide(false, 3, start) == Action::warn);
    CHECK(policy.decide(false, 3, start) == Action::drop);
    CHECK(policy.decide(true, 3, start + 1s) == Action::accept);
    CHECK(policy.decide(false, 3, start + 1s) == Action::warn);
    CHECK(policy.decide(false, 3, start + 1s) == Action::close);
    FloodPolicy patient;
    for (int i = 0; i < 3; ++i) patient.decide(false, 3, start);
    CHECK(patient.decide(false, 3, start + 10s) == Action::drop);
    CHECK(patient.decide(false, 3, start + 10s) == Action::drop);
    CHECK(patient.decide(false, 3, start + 10s) == Action::drop);
    CHECK(patient.decide(false, 3, start + 10s) == Action::close);
}

// ---- presence ------------------------------------------------------------------------------------------------------

TEST_CASE("connections with one identity are one user, whose grace period begins with the end of the last one") {
    Presence presence;
    ChatHandler one, two;
    Time next;
    Presence::User& user = presence.connect(identified("Anna", "key"), "key", &one);
    CHECK(&presence.connect(identified("Anna", "key"), "key", &two) == &user);
    CHECK(presence.users().empty());  // the store has not delivered the join
    user.set_place("hub", false);
    CHECK(names_of(presence.users()) == "Anna");
    Presence::detach(user, &one, start + 3s);
    CHECK(presence.expired(start + 1h, next).empty());
    CHECK((next == (Time::max)()));
    Presence::detach(user, &two, start + 3s);
    CHECK(presence.expired(start + 2999ms, next).empty());
    CHECK((next == start + 3s));
    CHECK(&presence.connect(identified("Anna", "key"), "key", &one) == &user);
    CHECK(presence.expired(start + 1h, next).empty());
    Presence::detach(user, &one, start + 3s);
    CHECK(presence.expired(start + 3s, next) == std::vector<std::string>{"id of key"});
    presence.remove(user);
    CHECK(presence.empty());
    CHECK(presence.find_identity("key") == nullptr);
    CHECK(presence.find_id("id of key") == nullptr);
}

TEST_CASE("a room counts the users that its hub has forwarded to the store") {
    Presence presence;
    Presence::User &anna = presence.add(named("Anna"), ""), &bert = presence.add(named("Bert"), "");
    CHECK(presence.own() == 0);
    presence.set_forwarded(anna, Presence::Forwarded::join);
    presence.set_forwarded(anna, Presence::Forwarded::away);
    presence.set_forwarded(bert, Presence::Forwarded::join);
    CHECK(presence.own() == 2);
    presence.set_forwarded(anna, Presence::Forwarded::nothing);
    presence.remove(bert);
    CHECK(presence.own() == 0);
}

TEST_CASE("a name that is taken gets the first free number") {
    Presence presence;
    ChatHandler connections[4];
    CHECK(presence.connect(named("Anna"), "", &connections[0]).info.name == "Anna");
    CHECK(presence.connect(named("Anna"), "", &connections[1]).info.name == "Anna-2");
    CHECK(presence.connect(named("anna"), "", &connections[2]).info.name == "anna-3");
    CHECK(presence.connect(named("Anna-2"), "", &connections[3]).info.name == "Anna-2-2");
    std::vector<ChatHandler> guests(300);
    for (ChatHandler& guest : guests) presence.connect(named("guest"), "", &guest);
    CHECK(presence.size() == 304);
}

TEST_CASE("a name with a number keeps the limit of names and whole characters") {
    Presence presence;
    ChatHandler connections[3];
    std::string name;
    for (int i = 0; i < 20; ++i) name += "\xC3\xBC";
    presence.connect(named(name), "", &connections[0]);
    CHECK(presence.connect(named(name), "", &connections[1]).info.name == name.substr(0, 38) + "-2");
    CHECK(valid_chat_name(presence.free_name(name), 40));
    presence.max_name = 60;
    CHECK(presence.free_name(name) == name + "-2");
}

TEST_CASE("nobody takes the name of a user who is present or is away with a key") {
    Presence presence;
    ChatHandler one, two, three;
    Presence::detach(presence.connect(identified("Anna", "key"), "key", &one), &one, start);
    CHECK(presence.connect(named("Anna"), "", &two).info.name == "Anna-2");
    CHECK(presence.connect(named("Anna"), "another key", &three).info.name == "Anna-3");
    CHECK(presence.connect(named("Berta"), "key", &one).info.name == "Anna");
}

TEST_CASE("a user who loses a name keeps it until there is a new one, and may change the case of letters") {
    Presence presence;
    ChatHandler one, two;
    Presence::User &anna = presence.connect(identified("Anna", "a"), "a", &one),
                   &bert = presence.connect(identified("Bert", "b"), "b", &two);
    anna.set_place("hub", false);
    bert.set_place("hub", false);
    presence.set_name(anna, "ANNA");
    CHECK(presence.find("anna") == &anna);
    presence.set_name(anna, "BERT");
    CHECK(presence.find("bert") == &anna);
    CHECK(presence.lost_name(bert));
    CHECK(names_of(presence.users()) == "BERT Bert");
    CHECK(presence.free_name(bert.info.name, &bert) == "Bert-2");
    bert.refused.push_back("bert-2");
    CHECK(presence.free_name(bert.info.name, &bert) == "Bert-3");
    presence.set_name(bert, "Carl");
    CHECK_FALSE(presence.lost_name(bert));
    CHECK(names_of(presence.users()) == "BERT Carl");
    CHECK(presence.find("anna") == nullptr);
    CHECK(presence.find("carl") == &bert);
    presence.release_name(bert);
    CHECK(presence.find("carl") == nullptr);
    presence.remove(bert);
    CHECK(presence.size() == 1);
}

TEST_CASE("the longest name at the beginning of a text finds the user") {
    Presence presence;
    ChatHandler connections[2];
    presence.connect(named("Anna"), "", &connections[0]);
    presence.connect(named("Anna Maria"), "", &connections[1]);
    const struct {
        std::string_view text, name, rest;
    } table[] = {
        {"Anna hello there", "Anna", "hello there"},
        {"anna maria hello", "Anna Maria", "hello"},
        {"Anna Marian", "Anna", "Marian"},
        {"Anna", "Anna", ""},
        {"Anna ", "Anna", ""},
    };
    for (const auto& row : table) {
        CAPTURE(row.text);
        std::string_view text = row.text;
        const Presence::User* user = presence.consume_user(text);
        REQUIRE(user != nullptr);
        CHECK(user->info.name == row.name);
        CHECK(text == row.rest);
    }
    for (std::string_view nobody : {"", " ", "Annabel hello", "hello Anna"})
        CHECK(presence.consume_user(nobody) == nullptr);
}

TEST_CASE("the search for a name reads no more of a text than the longest name") {
    Presence presence;
    ChatHandler connection;
    Presence::User& anna = presence.connect(named("Anna"), "", &connection);
    const std::string spaces(16 * 1024 * 1024, ' ');  // a search of each prefix would take years
    std::string_view text = spaces;
    CHECK(presence.consume_user(text) == nullptr);
    presence.set_name(anna, "Anna Maria Magdalena");
    const std::string line = "anna maria magdalena" + spaces;
    text = line;
    CHECK(presence.consume_user(text) == &anna);
    CHECK(text.size() == spaces.size() - 1);
}

// ---- presence of several hubs ---------------------------------------------------------------------------------------

namespace {

ChatEntry presence(ChatEntry::Kind kind, const std::string& user, const std::string& hub, const std::string& name = "",
                   const std::string& text = "") {
    ChatEntry made;
    made.kind = kind;
    made.room = "tea";
    made.user = user;
    made.hub = hub;
    made.name = name;
    made.text = text;
    made.author = text::starts_with(user, "guest") ? "" : text::starts_with(user, "account") ? user : "key " + user;
    return made;
}

// "Anna/a@1 Bert/b@2?": name, user and hub; a question mark: away.
std::string rows(const PresenceTable& table) {
    std::string all;
    for (const ChatEntry& each : table.users("tea"))
        all += (all.empty() ? "" : " ") + each.name + "/" + each.user + "@" + each.hub +
               (each.kind == ChatEntry::Kind::away ? "?" : "");
    return all;
}

}  // namespace

TEST_CASE("in a table of users the first user gets a name, and a user stays while one hub has connections") {
    using Kind = ChatEntry::Kind;
    PresenceTable table;
    const auto apply = [&](ChatEntry entry) {
        const std::string code(table.apply(entry));
        return code + (entry.quiet ? "quiet " : "") + entry.name;
    };
    CHECK(apply(presence(Kind::join, "a", "1", "Anna")) == "Anna");
    CHECK(apply(presence(Kind::join, "b", "2", "ANNA")) == "name_takenANNA");
    CHECK(apply(presence(Kind::join, "b", "2", "Bert")) == "Bert");
    CHECK(apply(presence(Kind::join, "a", "2", "Other")) == "quiet Anna");
    CHECK(rows(table) == "Anna/a@1 Anna/a@2 Bert/b@2");
    CHECK(apply(presence(Kind::rename, "b", "2", "", "anna")) == "name_takenBert");
    CHECK(apply(presence(Kind::rename, "b", "2", "", "Bea")) == "Bert");
    CHECK(apply(presence(Kind::away, "a", "1")) == "quiet Anna");
    CHECK(rows(table) == "Anna/a@1? Anna/a@2 Bea/b@2");
    CHECK(apply(presence(Kind::leave, "a", "1")) == "quiet Anna");
    CHECK(apply(presence(Kind::leave, "a", "1")) == "goneAnna");
    CHECK(apply(presence(Kind::leave, "a", "2")) == "Anna");
    CHECK(apply(presence(Kind::away, "a", "2")) == "gone");
    CHECK(apply(presence(Kind::join, "c", "2", "Anna")) == "Anna");
    CHECK(apply(presence(Kind::join, "d", "2", "Bert")) == "Bert");
    CHECK(table.rooms(10) == std::vector<std::pair<std::string, std::size_t>>{{"tea", 3}});
    PresenceTable copy;
    copy.replace("tea", table.users("tea"));
    CHECK(rows(copy) == rows(table));
    for (ChatEntry& each : copy.leaves("2")) CHECK(copy.apply(each) == "");
    CHECK(rows(copy) == "");
    CHECK(copy.rooms(10).empty());
}

TEST_CASE("in a table of users an account takes its name, and the user who loses it gets another one") {
    using Kind = ChatEntry::Kind;
    PresenceTable table;
    const auto apply = [&](ChatEntry entry) { return std::string(table.apply(entry)); };
    CHECK(apply(presence(Kind::join, "guest", "1", "Holly")) == "");
    CHECK(apply(presence(Kind::away, "guest", "1")) == "");
    CHECK(apply(presence(Kind::join, "guest", "2", "Holly")) == "");
    CHECK(apply(presence(Kind::join, "account Holly", "3", "Holly")) == "");
    CHECK(apply(presence(Kind::join, "account 2", "3", "Holly")) == "name_taken");
    CHECK(rows(table) == "Holly/account Holly@3 Holly/guest@1? Holly/guest@2");
    CHECK(apply(presence(Kind::rename, "guest", "2", "", "Holly-2")) == "");
    CHECK(apply(presence(Kind::join, "other", "1", "Holly")) == "name_taken");
    for (ChatEntry& each : table.leaves("3")) CHECK(table.apply(each) == "");
    CHECK(apply(presence(Kind::join, "other", "1", "Holly")) == "");
    CHECK(rows(table) == "Holly-2/guest@1? Holly-2/guest@2 Holly/other@1");
}

// ---- history -------------------------------------------------------------------------------------------------------

TEST_CASE("a history in memory passes the tests of every store") {
    const test::StoreFactory make = [](const HistoryLimits& limits) { return std::make_unique<MemoryHistory>(limits); };
    test::test_store(make);
}

TEST_CASE("a history returns the entries after an id in order and reports a gap") {
    RoomHistory ring(100);
    HistoryLimits limits;
    limits.max_entries = 5;
    for (int i = 1; i <= 8; ++i) CHECK(ring.append(entry("x"), limits, start) == 100u + static_cast<unsigned>(i));
    const struct {
        std::optional<std::uint64_t> id;
        std::size_t limit;
        const char* answer;
    } table[] = {
        {std::nullopt, 3, "106 107 108"},
        {std::nullopt, 50, "104 105 106 107 108"},
        {103, 50, "104 105 106 107 108"},
        {106, 50, "107 108"},
        {108, 50, ""},
        {102, 50, "104 105 106 107 108 gap"},  // 103 was deleted
        {104, 2, "107 108 gap"},               // 105 and 106 are over the limit
        {0, 50, "104 105 106 107 108 gap"},    // of another history
        {109, 50, "104 105 106 107 108 gap"},  // also of another history
        {108, 0, ""},
        {107, 0, "gap"},
    };
    for (const auto& row : table) {
        CAPTURE(row.id.value_or(0));
        CAPTURE(row.limit);
        const HistoryPage page = ring.since(row.id, row.limit, limits, start);
        CHECK(ids_of(page) == row.answer);
        CHECK(page.last_id == 108);
    }
}

TEST_CASE("an empty history has a first id") {
    RoomHistory ring(100);
    const HistoryPage page = ring.since(std::nullopt, 50, HistoryLimits(), start);
    CHECK(page.last_id == 100);
    CHECK(ids_of(page) == "");
    CHECK(ids_of(ring.since(page.last_id, 50, HistoryLimits(), start)) == "");
    ring.append(entry("first"), HistoryLimits(), start);
    CHECK(ids_of(ring.since(page.last_id, 50, HistoryLimits(), start)) == "101");
}

TEST_CASE("a history has limits of entries, bytes and age") {
    HistoryLimits count, bytes, age;
    count.max_entries = 10;
    bytes.max_bytes = 10'000;
    age.max_age = 10s;
    RoomHistory by_count(0), by_bytes(0), by_age(0);
    for (int i = 0; i < 1000; ++i) {
        by_count.append(entry("x", std::to_string(i)), count, start);
        by_bytes.append(entry(std::string(500, 'x'), std::to_string(i)), bytes, start);
        by_age.append(entry("x", std::to_string(i)), age, start + i * 1s);
    }
    CHECK(by_count.size() == 10);
    CHECK(by_bytes.bytes() <= 10'000);
    CHECK(by_bytes.size() > 5);
    CHECK(by_age.size() == 10);
    CHECK(ids_of(by_age.since(999, 50, age, start + 1h)) == "gap");
    CHECK(by_age.size() == 0);
    CHECK(by_age.bytes() == 0);
}

TEST_CASE("a tag of an author is known while its message is kept") {
    RoomHistory ring(0);
    HistoryLimits limits;
    limits.max_entries = 2;
    CHECK(ring.find(entry("x", "t")) == 0);
    ring.append(entry("x", "t"), limits, start);
    CHECK(ring.find(entry("y", "t")) == 1);
    CHECK(ring.find(entry("x", "u")) == 0);
    CHECK(ring.find(entry("x", "t", "bert")) == 0);
    CHECK(ring.find(entry("x")) == 0);
    ring.append(entry("x"), limits, start);
    ring.append(entry("x"), limits, start);
    CHECK(ring.find(entry("x", "t")) == 0);
}

namespace {

// A MemoryHistory and its listener.
struct HistoryFixture final : private ChatStore::Listener {
    explicit HistoryFixture(const HistoryLimits& limits) : history(limits) { history.attach(*this, nullptr); }

    std::uint64_t append(const std::string& room, const std::string& text = "x") {
        ChatEntry made = entry(text);
        made.room = room;
        history.append(made);
        return last;
    }
    std::size_t size(const std::string& room) {
        std::size_t result = 0;
        history.since(room, std::nullopt, 50, [&](const HistoryPage& page) { result = page.entries.size(); });
        return result;
    }
    MemoryHistory history;
    Time time = start;

private:
    Time now() const override { return time; }
    void on_entry(const ChatEntry& entry) override { last = entry.id; }
    void on_duplicate(const ChatEntry&) override {}
    void on_failure(const ChatEntry&, const std::string&) override {}
    std::uint64_t last = 0;
};

}  // namespace

TEST_CASE("above the limit of rooms the least recently used history is deleted, and reading deletes none") {
    HistoryLimits limits;
    limits.max_rooms = 2;
    HistoryFixture fixture(limits);
    const std::uint64_t before = fixture.append("one");
    fixture.append("two");
    for (int i = 0; i < 10; ++i) CHECK(fixture.size("visited " + std::to_string(i)) == 0);
    CHECK(fixture.size("one") == 1);
    fixture.append("three");
    CHECK(fixture.size("one") == 0);
    CHECK(fixture.size("two") == 1);
    CHECK(fixture.append("one") > before);  // ids are not used again
}

TEST_CASE("a history in memory expires by the clock of the loop") {
    HistoryLimits limits;
    limits.max_age = 10s;
    HistoryFixture fixture(limits);
    fixture.append("tea");
    fixture.time += 5s;
    fixture.append("tea");
    CHECK(fixture.size("tea") == 2);
    fixture.time += 5s;
    CHECK(fixture.size("tea") == 1);
    fixture.time += 5s;
    CHECK(fixture.size("tea") == 0);
    CHECK(fixture.append("tea") == 3);
}

TEST_CASE("above the limit of total bytes the least recently used history is deleted") {
    HistoryLimits limits;
    limits.max_total_bytes = 5000;
    HistoryFixture fixture(limits);
    fixture.append("one", std::string(1500, 'x'));
    fixture.append("two", std::string(1500, 'x'));
    fixture.append("one");
    CHECK(fixture.size("two") == 1);
    fixture.append("three", std::string(1500, 'x'));
    CHECK(fixture.size("two") == 0);
    CHECK(fixture.size("one") == 2);
    CHECK(fixture.size("three") == 1);
    fixture.append("four", std::string(6000, 'x'));  // the last message is kept
    CHECK(fixture.size("one") + fixture.size("three") == 0);
    CHECK(fixture.size("four") == 1);
}

// ---- the handler without sockets -----------------------------------------------------------------------------------

TEST_CASE("the first events are hello, users and history") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    const auto events = anna.events();
    REQUIRE(events.size() == 3);
    CHECK(contains(
        events[0],
        "{\"type\":\"hello\",\"version\":3,\"server\":\"wschat\",\"room\":\"tea\",\"name\":\"Anna\",\"user\":\""));
    CHECK(contains(events[1], "{\"type\":\"users\",\"room\":\"tea\",\"count\":1,\"users\":[{\"user\":\""));
    CHECK(names_in(events[1]) == "Anna");
    CHECK(contains(events[2], "{\"type\":\"history\",\"room\":\"tea\",\"epoch\":\""));
    CHECK(contains(events[2], "\"last\":0,\"gap\":false,\"more\":false,"));
    CHECK(contains(events[2], "\"entries\":[]"));
}

TEST_CASE("a message reaches all members once, with an ascending id") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert"), other(host, "name=Carl", "coffee");
    for (ChatClient<>* client : {&anna, &bert, &other}) client->events();
    const std::string first = anna.answer_to("hello"), second = anna.answer_to("{\"type\":\"junk\"}");
    CHECK(contains(first, "\"type\":\"said\",\"room\":\"tea\",\"id\":"));
    CHECK(contains(first, "\"name\":\"Anna\",\"text\":\"hello\",\"time\":"));
    CHECK(contains(second, "\"text\":\"{\\\"type\\\":\\\"junk\\\"}\""));
    CHECK(bert.events() == std::vector<std::string>{first, second});
    CHECK(other.events().empty());
    CHECK(std::stoull(field_of(second, "id")) == std::stoull(field_of(first, "id")) + 1);
}

TEST_CASE("only the sender gets the tag, and a second message with it is acknowledged and not kept") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    anna.events();
    bert.events();
    const std::string said = anna.answer_to("/tag t1 hello");
    CHECK(contains(said, "\"text\":\"hello\""));
    CHECK(contains(said, "\"tag\":\"t1\"}"));
    CHECK_FALSE(contains(bert.only_event(), "tag"));
    const std::string ack = anna.answer_to("/tag t1 hello");
    CHECK(contains(ack, "{\"type\":\"ack\",\"room\":\"tea\",\"tag\":\"t1\",\"id\":"));
    CHECK(bert.events().empty());
    CHECK(contains(bert.answer_to("/tag t1 mine"), "\"type\":\"said\""));  // tags are unique per author
    CHECK(contains(anna.answer_to("/tag t2 /nick Bert"), "\"code\":\"name_taken\""));
    CHECK(contains(anna.answer_to("/tag t2 /dance"), "\"tag\":\"t2\""));
    CHECK(contains(anna.answer_to("hello"), "\"text\":\"hello\""));
}

TEST_CASE("the sender of bad input gets an error with a code, and the connection stays open") {
    const struct {
        std::string line, code;
    } table[] = {
        {"", "empty"},
        {"/tag t1", "empty"},
        {"/me ", "empty"},
        {"   ", "empty"},
        {"\n\t", "empty"},
        {"/me \xC2\xA0", "empty"},
        {"\xE2\x80\x8B", "empty"},
        {"\xE2\x80\x83\xE3\x80\x80 \xE2\x80\xAF\xE1\x9A\x80", "empty"},
        {"/msg Bert  ", "empty"},
        {"\x1B[2J", "bad_text"},
        {"/me \x01", "bad_text"},
        {"/nick \t", "name_bad"},
        {"/dance", "unknown_command"},
        {"/", "unknown_command"},
        {"/tag", "unknown_command"},
        {"/tag  hello", "unknown_command"},
        {"/tag " + std::string(65, 't') + " hello", "bad_tag"},
        {"/nick ", "name_bad"},
        {"/nick " + std::string(41, 'x'), "name_bad"},
        {"/nick Bert", "name_taken"},
        {"/msg Nobody hello", "unknown_user"},
        {"/msg", "unknown_user"},
        {"/msg Bert", "empty"},
        {"/join ", "room_bad"},
        {"/join " + std::string(65, 'x'), "room_bad"},
        {"/leave coffee", "no_room"},
        {"/since", "bad_command"},
        {"/since -1", "bad_command"},
        {"/kick Bert", "forbidden"},
        {"/ban Bert", "forbidden"},
        {"/mute Bert", "forbidden"},
        {std::string(16 * 1024 + 1, 'x'), "too_long"},
    };
    TestHost host;
    host.hub().limits.connection = host.hub().limits.address = FloodRates();
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    bert.events();
    for (const auto& row : table) {
        CAPTURE(row.line.substr(0, 80));
        const std::string event = anna.answer_to(row.line);
        if (row.line == "/tag  hello") {
            CHECK(contains(event, "\"text\":\"hello\""));  // an empty tag is no tag
            bert.events();
            continue;
        }
        CHECK(contains(event, "{\"type\":\"error\",\"code\":\"" + row.code + "\",\"text\":\""));
        CHECK(anna.handler.is_open());
        CHECK(bert.events().empty());
    }
    anna.events();
    CHECK(contains(anna.send("bytes", Opcode::binary).at(0), "\"code\":\"bad_line\""));
    CHECK(contains(anna.answer_to(std::string(16 * 1024, 'x')), "\"type\":\"said\""));
}

TEST_CASE("a visitor with an invalid name gets an error and is a guest") {
    TestHost host;
    ChatClient<> bad(host, "name=%09"), none(host), empty(host, "name=");
    const auto events = bad.events();
    REQUIRE(events.size() > 2);
    CHECK(contains(events[0], "\"name\":\"guest\""));
    CHECK(contains(events[1], "\"code\":\"name_bad\""));
    CHECK(contains(none.events().at(0), "\"name\":\"guest-2\""));
    CHECK(empty.events().size() == 3);
}

TEST_CASE("a visitor of a room with an invalid name gets an error and is in the lobby") {
    TestHost host;
    ChatClient<> lost(host, "name=Anna", " ");
    const auto events = lost.events();
    REQUIRE(events.size() > 2);
    CHECK(contains(events[0], "\"room\":\"lobby\""));
    CHECK(contains(events[1], "\"code\":\"room_bad\""));
}

TEST_CASE("/me is an event with the field me") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    const std::string event = anna.answer_to("/me waves");
    CHECK(contains(event, "\"text\":\"waves\""));
    CHECK(contains(event, "\"me\":true"));
}

TEST_CASE("an author changes a message, and all members and later readers get the new text") {
    TestHost host;
    ChatClient anna(host, "name=Anna"), bert(host, "name=Bert");
    const std::string id = field_of(anna.answer_to("helo"), "id");
    bert.events();
    const std::string edited = anna.answer_to("/tag t1 /edit " + id + " hello");
    CHECK(field_of(edited, "type") == "edit");
    CHECK(field_of(edited, "target") == id);
    CHECK(field_of(edited, "text") == "hello");
    CHECK(field_of(edited, "tag") == "t1");
    CHECK(field_of(bert.only_event(), "text") == "hello");
    ChatClient carl(host, "name=Carl");
    const std::string history = carl.events().back();
    CHECK(contains(history, R"("text":"hello")"));
    CHECK(contains(history, R"("edited":)"));
    CHECK_FALSE(contains(history, "helo\""));
}

TEST_CASE("nobody changes the message of another user, and a moderator removes it") {
    struct Guarded : ChatHandler {
        bool may(ChatAction action) override { return ChatHandler::may(action) || user().name == "Mod"; }
    };
    TestHost host;
    ChatClient<Guarded> anna(host, "name=Anna"), bert(host, "name=Bert"), mod(host, "name=Mod");
    const std::string id = field_of(anna.answer_to("mine"), "id");
    CHECK(field_of(bert.answer_to("/edit " + id + " yours"), "code") == "not_yours");
    CHECK(field_of(bert.answer_to("/delete " + id), "code") == "not_yours");
    CHECK(field_of(mod.answer_to("/edit " + id + " hers"), "code") == "not_yours");
    CHECK(field_of(mod.answer_to("/delete " + id), "type") == "remove");
    CHECK(field_of(anna.events().back(), "target") == id);
    CHECK(field_of(anna.answer_to("/delete " + id), "code") == "bad_id");
    CHECK(field_of(anna.answer_to("/edit " + id + " again"), "code") == "bad_id");
    ChatClient<Guarded> carl(host, "name=Carl");
    const std::string history = carl.events().back();
    CHECK(contains(history, R"("removed":true)"));
    CHECK_FALSE(contains(history, "mine"));
}

TEST_CASE("a guest does not change the messages of an earlier guest with the same name") {
    TestHost host;
    std::string id;
    {
        ChatClient<> first(host, "name=Anna");
        id = field_of(first.answer_to("mine"), "id");
        first.disconnect(CloseCode::normal);
    }
    ChatClient<> second(host, "name=Anna");
    CHECK(second.handler.user().name == "Anna");
    CHECK(field_of(second.answer_to("/edit " + id + " yours"), "code") == "not_yours");
    CHECK(field_of(second.answer_to("/delete " + id), "code") == "not_yours");
}

TEST_CASE("an edit is refused if it is too late, its message does not exist, or its text is illegal") {
    TestHost host;
    ChatClient anna(host, "name=Anna");
    const std::string id = field_of(anna.answer_to("hello"), "id");
    CHECK(field_of(anna.answer_to("/edit 999 x"), "code") == "bad_id");
    CHECK(field_of(anna.answer_to("/edit x"), "code") == "bad_command");
    CHECK(field_of(anna.answer_to("/edit " + id), "code") == "empty");
    CHECK(field_of(anna.answer_to("/delete"), "code") == "bad_command");
    host.hub().limits.edit_for = -1h;
    CHECK(field_of(anna.answer_to("/edit " + id + " late"), "code") == "too_late");
    host.hub().limits.edit_for = 0s;
    CHECK(field_of(anna.answer_to("/edit " + id + " late"), "code") == "too_late");
    CHECK(field_of(anna.answer_to("/delete " + id), "type") == "remove");
}

TEST_CASE("a reaction is added, counted, and removed when it is sent again") {
    TestHost host;
    ChatClient anna(host, "name=Anna"), bert(host, "name=Bert");
    const std::string id = field_of(anna.answer_to("tea?"), "id");
    bert.events();
    const std::string on = bert.answer_to("/react " + id + " \xF0\x9F\x91\x8D");
    CHECK(field_of(on, "type") == "react");
    CHECK(field_of(on, "on") == "true");
    CHECK(field_of(on, "name") == "Bert");
    CHECK(field_of(anna.answer_to("/react " + id + " \xF0\x9F\x91\x8D"), "type") != "error");
    ChatClient carl(host, "name=Carl");
    CHECK(contains(carl.events().back(), R"("count":2)"));
    CHECK(field_of(bert.send("/react " + id + " \xF0\x9F\x91\x8D").back(), "on") == "false");
    for (const std::string& bad :
         std::vector<std::string>{"", " two words", " \xE2\x80\x83", " " + std::string(65, 'x')})
        CHECK(field_of(anna.send("/react " + id + bad).back(), "code") == "bad_command");
}

TEST_CASE("a moderator sets the topic, and later members get it") {
    struct Topical : ChatHandler {
        bool may(ChatAction action) override { return ChatHandler::may(action) || user().name == "Mod"; }
    };
    TestHost host;
    ChatClient<Topical> anna(host, "name=Anna"), mod(host, "name=Mod");
    CHECK(field_of(anna.send("/topic mine").back(), "code") == "forbidden");
    CHECK(field_of(mod.answer_to("/topic Tea and cakes"), "type") == "topic");
    CHECK(field_of(anna.events().back(), "text") == "Tea and cakes");
    CHECK(host.room("tea").topic() == "Tea and cakes");
    ChatClient<Topical> carl(host, "name=Carl");
    CHECK(field_of(carl.events().back(), "topic") == "Tea and cakes");
    CHECK(field_of(carl.answer_to("/join tea"), "topic") == "Tea and cakes");
    CHECK(field_of(mod.send("/topic " + std::string(501, 'x')).back(), "code") == "too_long");
    host.room("tea").set_topic("");
    CHECK(host.room("tea").topic().empty());
    ChatClient<Topical> dora(host, "name=Dora");
    CHECK(field_of(dora.events().back(), "topic") == "");
}

TEST_CASE("a topic outlives the members of its room") {
    TestHost host;
    host.room("tea").set_topic("Scones");
    host.hub().store().facts("topic", "tea", [](const std::vector<ChatFact>& facts, const std::string&) {
        REQUIRE(facts.size() == 1);
        CHECK(facts[0].value == "Scones");
    });
}

TEST_CASE("a message carries a JSON object of at most 4 KiB beside its text") {
    TestHost host;
    ChatClient anna(host, "name=Anna"), bert(host, "name=Bert");
    const std::string said = anna.answer_to(R"(/data {"pos": [1, 2], "note": "a } b"} look here)");
    CHECK(field_of(said, "text") == "look here");
    CHECK(contains(said, R"("data":{"pos": [1, 2], "note": "a } b"})"));
    CHECK(contains(bert.events().back(), R"("data":{"pos")"));
    CHECK(contains(anna.answer_to(R"(/data {"only":1})"), R"("data":{"only":1})"));
    const std::string large = "/data {\"x\":\"" + std::string(5000, 'x') + "\"}";
    for (const std::string& bad : {std::string("/data"), std::string("/data 5 x"), std::string("/data [1] x"),
                                   std::string("/data {\"a\":} x"), std::string("/data {"), large})
        CHECK(field_of(anna.send(bad).back(), "code") == "bad_data");
}

TEST_CASE("the program changes its own messages and removes any message") {
    TestHost host;
    ChatClient anna(host, "name=Anna");
    const std::string id = field_of(anna.answer_to("rude"), "id");
    host.room("tea").remove(std::stoull(id));
    CHECK(field_of(anna.only_event(), "type") == "remove");
    host.room("tea").publish("news", "Desk");
    const std::string published = field_of(anna.only_event(), "id");
    host.room("tea").edit(std::stoull(published), "old news");
    CHECK(field_of(anna.only_event(), "text") == "old news");
    host.room("tea").edit(999, "nothing");
    CHECK(anna.events().empty());
    CHECK_THROWS_AS(host.room("tea").edit(1, "\x01"), Error);
}

TEST_CASE("HMAC-SHA1 gives the results of RFC 2202") {
    const auto hex = [](std::string_view key, std::string_view message) {
        std::string digits;
        for (const unsigned char byte : hmac_sha1(key, message)) {
            digits += "0123456789abcdef"[byte >> 4];
            digits += "0123456789abcdef"[byte & 15];
        }
        return digits;
    };
    CHECK(hex(std::string(20, '\x0b'), "Hi There") == "b617318655057264e28bc0b6fb378c8ef146be00");
    CHECK(hex("Jefe", "what do ya want for nothing?") == "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79");
    CHECK(hex(std::string(80, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First") ==
          "aa4ae5e15272d00e95705637ce8a3b55ed402112");
}

TEST_CASE("events have the public id of a user, which a key decides and a new name does not change") {
    TestHost host;
    ChatClient anna(host, "name=Anna&key=secret-of-anna"), bert(host, "name=Bert"), other(host, "name=Bert");
    const std::string id = anna.handler.user().id;
    CHECK(id.size() == 16);
    CHECK(id != bert.handler.user().id);
    CHECK(bert.handler.user().id != other.handler.user().id);
    anna.events();
    CHECK(field_of(anna.answer_to("hello"), "user") == id);
    CHECK(field_of(bert.answer_to("hello"), "user") == bert.handler.user().id);
    CHECK(field_of(anna.send("/nick Cleo").back(), "user") == id);
    CHECK(anna.handler.user().id == id);
    anna.disconnect();
    ChatClient again(host, "name=Dora&key=secret-of-anna", "coffee");
    CHECK(again.handler.user().id == id);
    for (const std::string& event : again.events()) CHECK_FALSE(contains(event, "secret"));
}

TEST_CASE("another store gives a key another public id") {
    TestHost one, two;
    ChatClient anna(one, "key=secret-of-anna"), same(two, "key=secret-of-anna");
    CHECK(anna.handler.user().id != same.handler.user().id);
}

TEST_CASE("/nick is an event for everybody, and /who shows the new name") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    bert.events();
    CHECK(contains(anna.answer_to("/nick Carl"),
                   "{\"type\":\"nick\",\"room\":\"tea\",\"old\":\"Anna\",\"name\":\"Carl\",\"user\":\""));
    CHECK(contains(bert.only_event(), "\"name\":\"Carl\""));
    CHECK(names_in(bert.answer_to("/who")) == "Bert, Carl");
    CHECK(contains(bert.answer_to("/nick carl"), "That name is taken; carl-2 is free."));
    CHECK(anna.answer_to("/nick Carl") == "0 events");
}

TEST_CASE("a private message reaches all connections of both users and nobody else") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), tab(host, "name=Anna&key=anna-secret");
    ChatClient<> bert(host, "name=Bert&key=bert-secret"), tab2(host, "name=Bert&key=bert-secret"),
        carl(host, "name=Carl");
    for (ChatClient<>* client : {&anna, &tab, &bert, &tab2, &carl}) client->events();
    const std::string copy = anna.answer_to("/tag t1 /msg Bert psst");
    CHECK(contains(copy, "\"to\":\"Bert\",\"text\":\"psst\",\"time\":"));
    CHECK(contains(copy, "\"tag\":\"t1\"}"));
    for (ChatClient<>* client : {&tab, &bert, &tab2}) {
        const std::string event = client->only_event();
        CHECK(contains(event, "\"text\":\"psst\""));
        CHECK_FALSE(contains(event, "\"tag\""));
    }
    CHECK(carl.events().empty());
    CHECK(contains(anna.answer_to("/tag t1 /msg Bert psst"), "{\"type\":\"ack\",\"peer\":\""));
    CHECK(bert.events().empty());
    ChatClient<> late(host, "name=Dora");
    CHECK_FALSE(contains(late.events().at(2), "psst"));  // the history does not contain it
}

TEST_CASE("a private message between users with keys is kept, and waits for the receiver") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret");
    std::string bert_id;
    {
        ChatClient<> bert(host, "name=Bert&key=bert-secret");
        bert_id = bert.handler.user().id;
        anna.events();
        const std::string sent = anna.answer_to("/tag t1 /msg Bert psst");
        CHECK(field_of(sent, "type") == "private");
        CHECK(field_of(sent, "peer") == bert_id);
        CHECK(field_of(sent, "id") == "1");
        CHECK(field_of(sent, "tag") == "t1");
        const std::string got = bert.events().back();
        CHECK(field_of(got, "peer") == anna.handler.user().id);
        CHECK(field_of(got, "text") == "psst");
        CHECK(field_of(got, "tag") == "");
        CHECK(anna.answer_to("/tag t1 /msg Bert psst") ==
              "{\"type\":\"ack\",\"peer\":\"" + bert_id + "\",\"tag\":\"t1\",\"id\":1}");
    }
    CHECK(field_of(anna.answer_to("/msg @" + bert_id + " are you there?"), "id") == "2");
    ChatClient<> back(host, "name=Bert&key=bert-secret", "coffee");
    const std::string history = back.events().back();
    CHECK(contains(history, "{\"type\":\"history\",\"peer\":\"" + anna.handler.user().id + "\",\"name\":\"Anna\""));
    CHECK(contains(history, "\"text\":\"psst\""));
    CHECK(contains(history, "\"text\":\"are you there?\""));
    CHECK(contains(history, "\"gap\":false"));
    const std::string epoch = field_of(history, "epoch");
    ChatClient<> resumed(host, "name=Bert&key=bert-secret&peer=" + anna.handler.user().id + "%20" + epoch + "-1",
                         "milk");
    const std::string rest = resumed.events().back();
    CHECK_FALSE(contains(rest, "psst"));
    CHECK(contains(rest, "are you there?"));
    ChatClient<> carl(host, "name=Carl&key=carl-secret");
    for (const std::string& event : carl.events()) CHECK_FALSE(contains(event, "psst"));
}

TEST_CASE("a private message to an id needs a key and a user who has connected before") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), guest(host, "name=Guest");
    anna.events();
    guest.events();
    CHECK(field_of(anna.answer_to("/msg @nobody hello"), "code") == "unknown_user");
    CHECK(field_of(anna.answer_to("/msg @" + guest.handler.user().id + " hello"), "code") == "unknown_user");
    CHECK(field_of(guest.answer_to("/msg @" + anna.handler.user().id + " hello"), "code") == "forbidden");
    CHECK(field_of(anna.answer_to("/msg @" + anna.handler.user().id), "code") == "empty");
    const std::string live = guest.answer_to("/msg Anna hello");  // not kept
    CHECK(field_of(live, "peer") == anna.handler.user().id);
    CHECK(field_of(anna.only_event(), "peer") == guest.handler.user().id);
}

TEST_CASE("a read marker reaches all connections of its user, and survives a reload") {
    TestHost host;
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret"), tab(host, "name=Anna&key=anna-secret"),
            bert(host, "name=Bert");
        anna.events();
        tab.events();
        bert.events();
        const std::string read = "{\"type\":\"read\",\"room\":\"tea\",\"id\":7}";
        CHECK(anna.answer_to("/read 7") == read);
        CHECK(tab.only_event() == read);
        CHECK(bert.events().empty());
        CHECK(field_of(anna.answer_to("/read x"), "code") == "bad_command");
        CHECK(field_of(bert.answer_to("/read 7"), "code") == "forbidden");
    }
    ChatClient<> again(host, "name=Anna&key=anna-secret");
    CHECK(again.events().back() == "{\"type\":\"read\",\"room\":\"tea\",\"id\":7}");
}

TEST_CASE("a read marker needs an existing conversation, never moves back, and their number is limited") {
    TestHost host;
    host.hub().limits.max_read_markers = 2;
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert&key=bert-secret");
    const std::string bert_id = bert.handler.user().id, peer = "@" + bert_id;
    anna.events();
    for (const std::string& who :
         {std::string("@xyz"), std::string("@"), peer, std::string("@") + std::string(16, 'a')})
        CHECK(field_of(anna.answer_to("/tag t1 /read " + who + " 3"), "code") == "unknown_user");
    host.hub().store().facts("read", "",
                             [](const std::vector<ChatFact>& facts, const std::string&) { CHECK(facts.empty()); });
    anna.send("/msg Bert psst");
    CHECK(anna.answer_to("/tag t2 /read " + peer + " 3") ==
          "{\"type\":\"read\",\"peer\":\"" + bert_id + "\",\"id\":3,\"tag\":\"t2\"}");
    CHECK(field_of(anna.answer_to("/read " + peer + " 2"), "id") == "3");
    CHECK(field_of(anna.answer_to("/read " + peer + " 4"), "id") == "4");
    anna.send("/read 7");
    CHECK(field_of(anna.answer_to("/tag t3 /read 6"), "id") == "7");
    anna.send("/join coffee");
    CHECK(field_of(anna.answer_to("/tag t4 /read 1"), "code") == "read_limit");
    anna.send("/leave");
    anna.send("/leave");
    CHECK(field_of(anna.answer_to("/read 1"), "code") == "no_room");

    // Another server that did not know: the larger marker stays, here and in the store.
    host.hub().store().put({"read", anna.handler.user().id + "\ntea", "5", "x", 0});
    CHECK(anna.events().empty());
    host.hub().store().facts("read", anna.handler.user().id + "\ntea",
                             [](const std::vector<ChatFact>& facts, const std::string&) {
                                 REQUIRE(facts.size() == 1);
                                 CHECK(facts[0].value == "7");
                             });
}

TEST_CASE("a conversation is sent at connect only if something in it is newer than the read marker") {
    TestHost host;
    std::string bert_id;
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert&key=bert-secret");
        bert_id = bert.handler.user().id;
        for (int i = 1; i <= 3; ++i) bert.send("/msg Anna text " + std::to_string(i));
        anna.send("/read @" + bert_id + " 2");
    }
    const auto last_events = [&](const std::string& query) {
        ChatClient<> anna(host, "name=Anna&key=anna-secret" + query);
        std::vector<std::string> events = anna.events();
        events.erase(events.begin(), events.begin() + 3);
        return events;
    };
    std::vector<std::string> events = last_events("");
    REQUIRE(events.size() == 2);
    CHECK(texts_of(events[0]) == "text 3;");
    CHECK(field_of(events[0], "more") == "true");
    CHECK(field_of(events[0], "gap") == "false");
    CHECK(events[1] == "{\"type\":\"read\",\"peer\":\"" + bert_id + "\",\"id\":2}");
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret");
        anna.send("/read @" + bert_id + " 3");
    }
    events = last_events("");
    REQUIRE(events.size() == 1);
    CHECK(events[0] == "{\"type\":\"peers\",\"peers\":[{\"user\":\"" + bert_id + "\",\"name\":\"Bert\",\"read\":3}]}");
    const std::string position = host.position("1");
    events = last_events("&peer=" + bert_id + "%20" + position);  // a client that resumes gets what it asks for
    REQUIRE(events.size() == 2);
    CHECK(texts_of(events[0]) == "text 2;text 3;");

    ChatClient<> anna(host, "name=Anna&key=anna-secret");
    anna.events();
    const std::string page = anna.answer_to("/tag t1 /before @" + bert_id + " 3 1");
    CHECK(texts_of(page) == "text 2;");
    CHECK(field_of(page, "peer") == bert_id);
    CHECK(field_of(page, "before") == "3");
    CHECK(field_of(page, "more") == "true");
    CHECK(field_of(page, "tag") == "t1");
    CHECK(texts_of(anna.answer_to("/tag t2 /since @" + bert_id + " " + position)) == "text 2;text 3;");
    CHECK(field_of(anna.answer_to("/before @xyz 3"), "code") == "unknown_user");
    CHECK(field_of(anna.answer_to("/before @" + bert_id), "code") == "bad_command");
    CHECK(field_of(anna.answer_to("/since @" + bert_id + " x"), "code") == "bad_command");
}

TEST_CASE("hundreds of conversations are charged one by one, and each with new messages is announced") {
    TestHost host;
    host.hub().limits.replies = {1, 20'000};
    host.hub().limits.connection = host.hub().limits.address = FloodRates();
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret");
        for (int i = 0; i < 300; ++i) {
            ChatClient<> other(host, "name=Other&key=secret-" + std::to_string(i));
            other.send("/msg Anna " + std::string(1000, 'x'));
            other.disconnect(CloseCode::normal);
        }
    }
    ChatClient<> anna(host, "name=Anna&key=anna-secret");
    std::size_t histories = 0, whole = 0, bytes = 0;
    for (const std::string& event : anna.events()) {
        bytes += event.size();
        if (!contains(event, "{\"type\":\"history\",\"peer\"")) continue;
        ++histories;
        const bool has_text = contains(event, "\"xxx");  // a public id may have three of them
        whole += has_text ? 1 : 0;
        CHECK(field_of(event, "more") == (has_text ? "false" : "true"));
    }
    CHECK(histories == 300);
    CHECK(whole > 5);
    CHECK(whole < 40);
    CHECK(bytes < 120'000);
}

TEST_CASE("the history of a conversation also has a limit of bytes") {
    TestHost host;
    host.hub().limits.max_history_event = 2000;
    const std::string bert_id = [&] {
        ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert&key=bert-secret");
        for (int i = 0; i < 10; ++i) bert.send("/msg Anna " + std::string(500, 'q') + std::to_string(i));
        return bert.handler.user().id;
    }();
    ChatClient<> fresh(host, "name=Anna&key=anna-secret"),
        resumed(host, "name=Anna&key=anna-secret&peer=" + bert_id + "%20" + host.position("1"));
    for (ChatClient<>* client : {&fresh, &resumed}) {
        const std::string history = client->events().at(3);
        CHECK(history.size() < 3500);
        CHECK(contains(history, "qqqqqq9"));
        CHECK_FALSE(contains(history, "qqqqqq0"));
        CHECK(field_of(history, "more") == "true");
        CHECK(field_of(history, "gap") == (client == &resumed ? "true" : "false"));
    }
}

TEST_CASE("a later guest with the same name does not have the tags of the first") {
    for (const CloseCode code : {CloseCode::normal, CloseCode::abnormal}) {
        TestHost host;
        ChatClient<> bert(host, "name=Bert");
        std::string id;
        {
            ChatClient<> first(host, "name=Anna");
            id = field_of(first.answer_to("/tag t1 mine"), "id");
            first.send("/tag t2 /msg Bert psst");
            first.disconnect(code);
        }
        ChatClient<> second(host, "name=Anna");
        bert.events();
        const auto events = second.events();
        CHECK_FALSE(contains(events.at(2), "\"tag\""));
        CHECK(second.handler.user().name == "Anna");
        CHECK(field_of(second.answer_to("/tag t1 mine too"), "type") == "said");
        CHECK(field_of(second.answer_to("/tag t2 /msg Bert psst"), "type") == "private");
        CHECK(field_of(second.answer_to("/tag t3 /delete " + id), "code") == "not_yours");
    }
}

TEST_CASE("a guest who is away leaves when another guest takes the name") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert");
    std::string first_id;
    {
        ChatClient<> first(host, "name=Anna");
        first_id = first.handler.user().id;
    }
    bert.events();
    ChatClient<> second(host, "name=Anna");
    const auto events = bert.events();
    REQUIRE(events.size() == 2);
    CHECK(field_of(events[0], "type") == "leave");
    CHECK(field_of(events[0], "user") == first_id);
    CHECK(field_of(events[1], "type") == "join");
    CHECK(field_of(events[1], "user") == second.handler.user().id);
    CHECK(second.handler.user().id != first_id);
}

TEST_CASE("each command with a tag has an answer with it") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert");
    const std::string id = field_of(bert.answer_to("hello"), "id");
    anna.events();
    const std::pair<std::string, std::string> table[] = {
        {"/read 1", "read"},
        {"/read 1", "read"},
        {"/who", "users"},
        {"/nick Cleo", "nick"},
        {"/nick Cleo", "ack"},
        {"/typing", "ack"},
        {"/typing stop", "ack"},
        {"/help", "help"},
        {"/rooms", "rooms"},
        {"/join tea", "room"},
        {"/react " + id + " +1", "react"},
        {"/before 1", "history"},
        {"/since x", "error"},
        {"/in tea hello", "said"},
        {"/leave", "room"},
        {"/typing", "error"},
        {"/who", "error"},
        {"/read 1", "error"},
        {"/nick Dora", "error"},
    };
    int n = 0;
    for (const auto& row : table) {
        CAPTURE(row.first);
        const std::string tag = "t" + std::to_string(++n), answer = anna.answer_to("/tag " + tag + " " + row.first);
        CHECK(field_of(answer, "type") == row.second);
        CHECK(field_of(answer, "tag") == tag);
    }
    for (const std::string& event : bert.events()) CHECK_FALSE(contains(event, "\"tag\""));
}

TEST_CASE("the tag of a line can stand inside /in, but a line has one tag") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    CHECK(field_of(anna.answer_to("/in tea /tag t1 hello"), "tag") == "t1");
    CHECK(field_of(anna.answer_to("/in tea /tag t1 hello"), "type") == "ack");
    CHECK(field_of(anna.answer_to("/tag t2 /in tea /tag t3 hello"), "code") == "bad_tag");
    CHECK(field_of(anna.answer_to("/in tea /tag " + std::string(65, 'x') + " hello"), "code") == "bad_tag");
    CHECK(field_of(anna.answer_to("hello"), "tag") == "");
}

TEST_CASE("a read marker that cannot be stored is an error for the line") {
    HistoryLimits none;
    none.max_facts = 1;
    TestHost host;
    host.hub().set_store(MemoryHistory(none));
    ChatClient<> anna(host, "name=Anna&key=anna-secret");  // the user is a fact
    anna.events();
    const std::string error = anna.answer_to("/tag t1 /read 1");
    CHECK(field_of(error, "code") == "not_kept");
    CHECK(field_of(error, "tag") == "t1");
}

TEST_CASE("room and rooms have the read marker of a user and the number of newer messages") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert");
    std::string first;
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret");
        anna.events();
        CHECK_FALSE(contains(anna.answer_to("/join tea"), "unread"));  // nothing was read yet
        first = field_of(anna.answer_to("one"), "id");
        for (const char* text : {"two", "three"}) bert.send(text);
        anna.send("/read " + first);
        anna.send("mine");
        anna.events();
        const std::string room = anna.answer_to("/join tea");
        CHECK(field_of(room, "read") == first);
        CHECK(field_of(room, "unread") == "2");
        CHECK(contains(anna.answer_to("/rooms"), R"([{"room":"tea","users":2,"read":1,"unread":2}])"));
        CHECK_FALSE(contains(bert.send("/rooms").back(), "unread"));
    }
    const std::string rude = field_of(bert.send("rude").back(), "id");
    host.room("tea").remove(std::stoull(rude));
    ChatClient<> lobby(host, "name=Anna&key=anna-secret", "lobby");
    host.room("tea").set_topic("Scones");
    lobby.events();
    CHECK(contains(lobby.answer_to("/rooms"), R"({"room":"tea","users":2,"topic":"Scones","read":1,"unread":2})"));
    for (int i = 0; i < 150; ++i) host.room("tea").publish("x");
    CHECK(contains(lobby.answer_to("/rooms"), R"("unread":100})"));
}

TEST_CASE("the number of unread messages is right after a restart, when a member has read the history") {
    TestHost host;
    for (const char* text : {"one", "two", "three"}) host.room("tea").publish(text, "Desk");
    ChatClient<> anna(host, "name=Anna&key=anna-secret");
    anna.send("/read 1");
    anna.events();
    CHECK(field_of(anna.answer_to("/join tea"), "unread") == "2");
    // A client that resumes reads only the end of the history.
    TestHost other;
    for (const char* text : {"one", "two", "three"}) other.room("tea").publish(text, "Desk");
    ChatClient<> resumed(other, "name=Anna&key=anna-secret&last=" + other.position("2"));
    resumed.send("/read 2");
    resumed.events();
    CHECK(field_of(resumed.answer_to("/join tea"), "unread") == "1");
}

TEST_CASE("a message names the users of the room whom it mentions") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), maria(host, "name=Anna%20Maria"), bert(host, "name=Bert");
    const std::string a = "\"" + anna.handler.user().id + "\"", m = "\"" + maria.handler.user().id + "\"",
                      b = "\"" + bert.handler.user().id + "\"";
    const std::pair<std::string, std::string> table[] = {
        {"@Anna, tea?", a},
        {"tea, @anna maria?", m},
        {"@Bert @Anna @Bert", b + "," + a},
        {"(@bert)", b},
        {"mail to x@Bert", ""},
        {"@Berta", ""},
        {"@Bert_", ""},
        {"@", ""},
        {"@ Bert", ""},
        {"Bert", ""},
        {"@Nobody and @@Bert", b},
    };
    for (const auto& row : table) {
        CAPTURE(row.first);
        bert.events();
        const std::string said = bert.answer_to(row.first);
        if (row.second.empty()) CHECK_FALSE(contains(said, "mentions"));
        else CHECK(contains(said, "\"mentions\":[" + row.second + "]"));
        CHECK(contains(anna.events().back(), "mentions") == !row.second.empty());
    }
}

TEST_CASE("a room can hide its users, or show only their number") {
    TestHost host;
    host.hub().room_options = [](std::string_view name, ChatRoomOptions& options) {
        options.presence = name == "hall" ? ChatRoomOptions::Presence::off : ChatRoomOptions::Presence::count;
    };
    ChatClient<> anna(host, "name=Anna", "hall"), bert(host, "name=Bert", "hall");
    CHECK(anna.events().at(1) == R"({"type":"users","room":"hall"})");
    bert.events();
    CHECK(field_of(bert.answer_to("/nick Berta"), "name") == "Berta");
    CHECK(anna.events().empty());
    bert.disconnect(CloseCode::normal);
    CHECK(anna.events().empty());
    ChatClient<> carl(host, "name=Carl", "stand"), dora(host, "name=Dora", "stand");
    CHECK(dora.events().at(1) == R"({"type":"users","room":"stand","count":2})");
    CHECK(carl.events().size() == 3);
    CHECK(carl.answer_to("/who") == R"({"type":"users","room":"stand","count":2})");
}

TEST_CASE("each join of a room of 5,000 users costs a limited number of bytes and of visits to members") {
    TestHost host;
    constexpr std::size_t users = 5000;
    std::vector<std::unique_ptr<ChatClient<>>> all;
    std::size_t bytes = 0;
    const auto count = [&] {
        for (const auto& each : all)
            for (const std::string& event : each->events()) bytes += event.size();
    };
    // Above ChatLimits::presence_list no member is visited for a join. The sweep of costs (bench/linear.cpp) has the names.
    std::uint64_t visits = 0;
    for (std::size_t i = 0; i < users; ++i) {
        if (i == host.hub().limits.presence_list) visits = RoomsAccess::deliveries(host.rooms());
        all.push_back(std::make_unique<ChatClient<>>(host, "name=Guest"));
    }
    CHECK(visits > 0);
    CHECK(RoomsAccess::deliveries(host.rooms()) - visits < users);
    count();
    // Each gets about 900 bytes of its own. Up to ChatLimits::presence_list there are lists and events of about 60 and 100
    // bytes for each user. Without that limit, they would be 300,000 bytes for each user.
    CHECK(bytes / users > 500);
    CHECK(bytes / users < 3000);
    bytes = 0;
    for (std::size_t i = 0; i < users / 2; ++i) all[i]->disconnect(CloseCode::normal);
    count();
    CHECK(bytes == 0);  // the number of users follows in a second
}

TEST_CASE("a message is charged for all users of the room, to the connection and to the address") {
    TestHost host;
    host.hub().limits.connection = host.hub().limits.address = FloodRates();
    host.hub().limits.fan_out = {1, 30'000};
    host.hub().limits.address_fan_out = {1, 50'000};
    std::vector<std::unique_ptr<ChatClient<>>> crowd;
    for (int i = 0; i < 9; ++i) crowd.push_back(std::make_unique<ChatClient<>>(host, "name=Other", "tea", "192.0.2.1"));
    ChatClient<> anna(host, "name=Anna"), alone(host, "name=Anna", "empty");
    const std::string text(800, 'x');  // with the event 1,000 bytes for ten users
    std::string taken;
    const auto send = [&](ChatClient<>& client) {
        client.events();
        return field_of(client.answer_to(text), "type") == "said" ? "+" : "-";
    };
    for (int i = 0; i < 5; ++i) taken += send(anna);
    CHECK(taken == "+++--");
    CHECK(field_of(anna.send("/tag t1 /react 1 +1").back(), "code") == "flood");
    CHECK(field_of(anna.send("/nick Cleo").back(), "code") == "flood");
    CHECK(field_of(anna.send("/tag t2 /who").back(), "type") == "users");
    taken.clear();
    for (int i = 0; i < 25; ++i) taken += send(alone);
    CHECK(taken == "++++++++++++++++++++-----");  // what is left for the address
    CHECK(std::string(send(*crowd[0])) == "+");
}

TEST_CASE("a private message to a user without a connection is an error") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    bert.disconnect();
    CHECK(contains(anna.answer_to("/msg Bert psst"), "\"code\":\"user_away\""));
}

TEST_CASE("/typing is an event for the others and is not kept") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    bert.events();
    CHECK(anna.answer_to("/typing") == "0 events");
    const std::string typing =
        "{\"type\":\"typing\",\"room\":\"tea\",\"name\":\"Anna\",\"user\":\"" + anna.handler.user().id + "\"";
    CHECK(bert.only_event() == typing + "}");
    anna.send("/typing stop");
    CHECK(bert.only_event() == typing + ",\"stop\":true}");
}

TEST_CASE("/join changes the current room, and events name their room") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), carl(host, "name=Carl", "coffee");
    anna.events();
    const auto events = anna.send("/join coffee");
    REQUIRE(events.size() == 3);
    CHECK(events[0] == "{\"type\":\"room\",\"room\":\"coffee\",\"name\":\"Anna\"}");
    CHECK(names_in(events[1]) == "Anna, Carl");
    CHECK(contains(events[2], "\"history\",\"room\":\"coffee\""));
    carl.events();
    anna.send("black, please");
    CHECK(contains(carl.only_event(), "\"room\":\"coffee\""));
    CHECK(contains(anna.answer_to("/rooms"), "[{\"room\":\"coffee\",\"users\":2},{\"room\":\"tea\",\"users\":1}]"));
    CHECK(anna.answer_to("/join tea") == "{\"type\":\"room\",\"room\":\"tea\",\"name\":\"Anna\"}");
    CHECK(anna.answer_to("/leave coffee") == "{\"type\":\"room\",\"room\":\"tea\",\"name\":\"Anna\"}");
    CHECK(contains(carl.only_event(), "{\"type\":\"leave\",\"room\":\"coffee\",\"name\":\"Anna\""));
    CHECK(contains(anna.answer_to("/leave"), "{\"type\":\"room\",\"room\":null"));
    CHECK(contains(anna.answer_to("hello?"), "\"code\":\"no_room\""));
    for (const std::string line : {"/me x", "/msg Anna x", "/who", "/nick x", "/since 0", "/leave"}) {
        CAPTURE(line);
        CHECK(contains(anna.answer_to(line), "\"type\":\"error\""));
    }
    CHECK(anna.answer_to("/typing") == "0 events");
}

TEST_CASE("a connection and a server have limits of rooms") {
    TestHost host;
    host.hub().limits.max_rooms_per_connection = 2;
    host.hub().limits.max_rooms = 3;
    ChatClient<> anna(host, "name=Anna");
    CHECK(anna.send("/join two").size() == 6);
    CHECK(contains(anna.answer_to("/join three"), "\"code\":\"room_limit\""));
    ChatClient<> bert(host, "name=Bert", "three"), carl(host, "name=Carl", "four");
    CHECK(bert.events().size() == 3);
    const auto events = carl.events();
    REQUIRE(events.size() == 2);
    CHECK(contains(events[0], "\"room\":null"));
    CHECK(contains(events[1], "\"code\":\"room_limit\""));
    CHECK(carl.send("/join tea").size() == 3);
}

TEST_CASE("two connections with one key are one user with one join, one leave and one name") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert");
    bert.events();
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), tab(host, "name=Other&key=anna-secret");
    CHECK(contains(tab.events().at(0), "\"name\":\"Anna\""));
    CHECK(contains(bert.only_event(), "\"type\":\"join\""));
    CHECK(names_of(host.room("tea").users()) == "Anna Bert");
    anna.disconnect(CloseCode::normal);
    CHECK(bert.events().empty());
    tab.disconnect(CloseCode::normal);
    CHECK(contains(bert.only_event(), "{\"type\":\"leave\",\"room\":\"tea\",\"name\":\"Anna\""));
}

TEST_CASE("a lost connection does not cause a leave within the grace period") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert");
    bert.events();
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret");
        CHECK(contains(bert.only_event(), "\"join\""));
    }
    CHECK(names_of(host.room("tea").users()) == "Anna Bert");
    ChatClient<> again(host, "name=Anna&key=anna-secret");
    CHECK(contains(again.events().at(0), "\"name\":\"Anna\""));
    CHECK(bert.events().empty());
}

TEST_CASE("a client that returns with the last id gets the missed messages in order, its own with their tags") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert");
    std::string last;
    {
        ChatClient<> anna(host, "name=Anna&key=anna-secret");
        last = host.position(field_of(anna.answer_to("/tag t1 before"), "id"));
        anna.send("/tag t2 kept, but not seen");
    }
    bert.send("one");
    bert.send("two");
    ChatClient<> again(host, "name=Anna&key=anna-secret&last=" + last);
    const std::string history = again.events().at(2);
    CHECK(contains(history, "\"gap\":false"));
    CHECK_FALSE(contains(history, "before"));
    const std::size_t own = history.find("kept, but not seen"), one = history.find("\"one\""),
                      two = history.find("\"two\"");
    CHECK(own < one);
    CHECK(one < two);
    CHECK(two != std::string::npos);
    CHECK(contains(history, "\"tag\":\"t2\""));
    CHECK_FALSE(contains(bert.answer_to("/since " + last), "\"tag\":\"t2\""));
}

TEST_CASE("names, rooms and tags may have the size of their limits, and one byte more is an error") {
    const struct {
        std::string command, code;
        std::size_t limit;
    } table[] = {{"/nick ", "name_bad", 40}, {"/join ", "room_bad", 64}, {"/tag ", "bad_tag", 64}};
    for (const auto& row : table)
        for (const std::size_t size : {row.limit - 1, row.limit, row.limit + 1}) {
            CAPTURE(row.command);
            CAPTURE(size);
            TestHost host;
            ChatClient<> anna(host, "name=Anna");
            anna.events();
            const auto events =
                anna.send(row.command + std::string(size, 'x') + (row.command == "/tag " ? " hello" : ""));
            REQUIRE_FALSE(events.empty());
            CHECK(contains(events[0], "\"code\":\"" + row.code + "\"") == (size > row.limit));
            CHECK(contains(events[0], "\"error\"") == (size > row.limit));
        }
}

TEST_CASE("a client gets as much history as the limits allow, and has a gap only if it missed more") {
    for (const std::size_t missed : {2u, 3u, 4u}) {
        CAPTURE(missed);
        TestHost host;
        host.hub().limits.history_on_join = host.hub().limits.history_on_resume = 3;
        ChatClient<> bert(host, "name=Bert");
        const std::string last = host.position(field_of(bert.answer_to("first"), "id"));
        for (std::size_t i = 0; i < missed; ++i) bert.send("missed");
        ChatClient<> back(host, "name=Anna&last=" + last), fresh(host, "name=Carl");
        const auto entries = [](const std::string& history) {
            std::size_t count = 0;
            for (std::size_t at = 0; (at = history.find("\"text\":", at)) != std::string::npos; ++at) ++count;
            return count;
        };
        const std::string resumed = back.events().at(2);
        CHECK(entries(resumed) == (std::min)(missed, std::size_t{3}));
        CHECK(contains(resumed, missed > 3 ? "\"gap\":true" : "\"gap\":false"));
        CHECK(entries(fresh.events().at(2)) == 3);
    }
}

TEST_CASE("a client with an id that is too old or unknown gets a gap") {
    TestHost host;
    host.hub().limits.history_on_resume = 3;
    ChatClient<> bert(host, "name=Bert");
    const std::string last = host.position(field_of(bert.answer_to("first"), "id"));
    for (int i = 0; i < 4; ++i) bert.send("x");
    ChatClient<> anna(host, "name=Anna&last=" + last), fresh(host, "name=Carl"),
        other(host, "name=Dora&last=0123456789abcdef-1"), number(host, "last=1"),
        huge(host, "last=" + host.position("99999999999999999999")), bad(host, "last=x");
    CHECK(contains(anna.events().at(2), "\"gap\":true"));
    CHECK(contains(fresh.events().at(2), "\"gap\":false"));
    CHECK(contains(other.events().at(2), "\"gap\":true"));
    CHECK(contains(number.events().at(2), "\"gap\":true"));
    CHECK(contains(huge.events().at(2), "\"gap\":true"));
    CHECK(contains(bad.events().at(2), "\"gap\":false"));
}

TEST_CASE("/before returns the messages before an id, and whether there are more") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    for (const char* text : {"one", "two", "three", "four"}) anna.send(text);
    const std::string two = anna.answer_to("/tag t1 /before 4 2");
    CHECK(contains(two, "{\"type\":\"history\",\"room\":\"tea\",\"before\":4,\"gap\":false,\"more\":true,"));
    CHECK(contains(two, "\"tag\":\"t1\""));
    CHECK(two.find("\"two\"") < two.find("\"three\""));
    CHECK_FALSE(contains(two, "\"one\""));
    CHECK_FALSE(contains(two, "\"four\""));
    CHECK(contains(anna.answer_to("/before 2"), "\"more\":false,\"entries\":[{\"type\":\"said\",\"id\":1,"));
    CHECK(contains(anna.answer_to("/before 1"), "\"more\":false,\"entries\":[]"));
    CHECK(contains(anna.answer_to("/before 99999999999999999999 1"), "\"four\""));
    for (const std::string line : {"/before", "/before x", "/before 4 x", "/before -1"})
        CHECK(contains(anna.answer_to(line), "\"code\":\"bad_command\""));
}

TEST_CASE("/search returns the messages with the words, and only of this room") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert", "coffee");
    for (const char* text : {"green tea", "Black TEA", "milk", "/me makes tea"}) anna.send(text);
    bert.send("tea in the wrong room");
    const std::string found = anna.answer_to("/tag t1 /search Tea");
    CHECK(contains(found, "{\"type\":\"search\",\"room\":\"tea\",\"words\":\"Tea\",\"more\":false,\"entries\":["));
    for (const char* text : {"green tea", "Black TEA", "makes tea", "\"tag\":\"t1\""}) CHECK(contains(found, text));
    CHECK_FALSE(contains(found, "milk"));
    CHECK_FALSE(contains(found, "wrong room"));
    CHECK(contains(anna.answer_to("/search  "), "\"code\":\"bad_command\""));
}

TEST_CASE("/join with a position returns the later entries, and the URL can name several rooms") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert", "green tea");
    const std::string last = host.position(field_of(bert.answer_to("before"), "id"));
    bert.send("after");
    ChatClient<> anna(host, "name=Anna", "lobby");
    anna.events();
    const auto joined = anna.send("/join green tea " + last);
    REQUIRE(joined.size() == 3);
    CHECK(contains(joined[2], "\"room\":\"green tea\""));
    CHECK(contains(joined[2], "\"after\""));
    CHECK_FALSE(contains(joined[2], "\"before\""));
    const auto again = anna.send("/join green tea " + last);  // the connection is in the room already
    REQUIRE(again.size() == 2);
    CHECK(contains(again[1], "\"after\""));

    ChatClient<> carl(host, "name=Carl&join=green%20tea%20" + last + "&join=coffee&join=tea", "tea");
    const auto events = carl.events();
    REQUIRE(events.size() == 10);
    CHECK(contains(events[2], "\"room\":\"tea\""));
    CHECK(contains(events[3], "{\"type\":\"room\",\"room\":\"green tea\""));
    CHECK(contains(events[5], "\"after\""));
    CHECK_FALSE(contains(events[5], "\"before\""));
    CHECK(contains(events[6], "{\"type\":\"room\",\"room\":\"coffee\""));
    CHECK(carl.handler.current_room()->name() == "tea");
}

TEST_CASE("a member gets amendments with their ids, and a new member gets the changed messages") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    anna.events();
    const auto append = [&](ChatEntry::Kind kind, std::uint64_t target, const std::string& text) {
        ChatEntry made = entry(text);
        made.kind = kind;
        made.target = target;
        made.user = "u1";
        made.time = 5;
        host.hub().store().append(made);
        return anna.only_event();
    };
    using Kind = ChatEntry::Kind;
    append(Kind::said, 0, "helo");
    append(Kind::said, 0, "oops");
    CHECK(append(Kind::edit, 1, "hello") ==
          R"({"type":"edit","room":"tea","id":3,"target":1,"user":"u1","name":"Anna","text":"hello","time":5})");
    CHECK(append(Kind::react, 1, "+1") == R"({"type":"react","room":"tea","id":4,"target":1,"emoji":"+1","on":true,)"
                                          R"("user":"u1","name":"Anna","time":5})");
    CHECK(append(Kind::remove, 2, "") ==
          R"({"type":"remove","room":"tea","id":5,"target":2,"user":"u1","name":"Anna","time":5})");
    CHECK(append(Kind::topic, 0, "greetings") ==
          R"({"type":"topic","room":"tea","id":6,"user":"u1","name":"Anna","text":"greetings","time":5})");
    ChatClient<> bert(host, "name=Bert"), carl(host, "name=Carl&last=" + host.position("4"));
    CHECK(contains(bert.events().at(2),
                   R"("last":6,"gap":false,"more":false,"entries":[{"type":"said","id":1,"user":"u1","name":"Anna",)"
                   R"("text":"hello","time":5,"edited":5,"reactions":[{"emoji":"+1","count":1,"users":["u1"]}]},)"
                   R"({"type":"said","id":2,"user":"u1","name":"Anna","text":"","time":5,"removed":true},)"
                   R"({"type":"topic","id":6,)"));
    CHECK(contains(carl.events().at(2), R"("entries":[{"type":"remove","id":5,"target":2,)"));
}

TEST_CASE("a history event has a limit of bytes, and omits older entries") {
    TestHost host;
    host.hub().limits.max_history_event = 2000;
    ChatClient<> bert(host, "name=Bert");
    const std::string last = host.position(field_of(bert.answer_to("first"), "id"));
    for (int i = 0; i < 10; ++i) bert.send(std::string(500, 'q') + std::to_string(i));
    ChatClient<> anna(host, "name=Anna&last=" + last);
    const std::string history = anna.events().at(2);
    CHECK(history.size() < 3000);
    CHECK(contains(history, "qqqqqq9"));
    CHECK_FALSE(contains(history, "qqqqqq0"));
    CHECK(contains(history, "\"gap\":true"));
}

TEST_CASE("publish() keeps a text, broadcast() does not, and the author may be the server") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    anna.events();
    host.room("tea").publish("The kettle is on.");
    host.room("tea").broadcast("Mind the step.", "Butler");
    const auto events = anna.events();
    REQUIRE(events.size() == 2);
    CHECK(contains(events[0], "\"id\":"));
    CHECK(contains(events[0], "\"name\":\"\""));
    CHECK_FALSE(contains(events[1], "\"id\":"));
    CHECK(contains(events[1], "\"name\":\"Butler\""));
    std::string kept;
    host.room("tea").since(std::nullopt, 10, [&](const HistoryPage& page) {
        for (const ChatEntry& each : page.entries) kept += each.text;
    });
    CHECK(kept == "The kettle is on.");
    CHECK_THROWS_AS(host.room("tea").publish("\x1B"), Error);
    CHECK_THROWS_AS(host.room("tea").broadcast("\xFF"), Error);
}

TEST_CASE("the program names only rooms that users can enter, and only authors whose names can be read") {
    TestHost host;
    host.hub().limits.max_room_name = 5;
    // The last one would be the history of a private conversation.
    for (const char* name : {"", " ", "a\nb", "\xFF", "\xE2\x80\xAE", "salons", "\na b"}) {
        CAPTURE(name);
        CHECK_THROWS_AS(host.room(name), Error);
        CHECK(host.hub().find(name) == nullptr);
    }
    CHECK(test::error_of([&] { host.room("a\nb"); }) ==
          R"(ChatHub::room: "a\x0ab" is not 1 to 5 bytes of visible text)");
    ChatClient<> anna(host, "name=Anna");
    anna.events();
    for (const char* name : {" ", "a\nb", "\xFF", "live\xE2\x80\xAE"}) {
        CAPTURE(name);
        CHECK_THROWS_AS(host.room("tea").publish("hello", name), Error);
        CHECK_THROWS_AS(host.room("tea").broadcast("hello", name), Error);
    }
    CHECK(anna.events().empty());
    // Longer than a user's name may be.
    host.room("tea").publish("hello", std::string(100, 'a'));
    CHECK(anna.events().size() == 1);
}

TEST_CASE("a flood gets a warning, then silence, then 1008, and other users notice nothing") {
    TestHost host;
    host.hub().limits.flood_patience = 5;
    ChatClient<> bert(host, "name=Bert"), anna(host, "name=Anna");
    anna.events();
    bert.events();
    for (int i = 0; i < 20; ++i) CHECK(anna.send("x").size() == 1);
    CHECK(contains(anna.answer_to("/tag t1 x"), "\"code\":\"flood\""));
    for (int i = 0; i < 4; ++i) CHECK(anna.send("x").empty());
    CHECK(anna.handler.is_open());
    anna.send("x");
    CHECK_FALSE(anna.handler.is_open());
    CHECK(anna.close_code() == CloseCode::policy_violation);
    CHECK(bert.events().size() == 20);
    CHECK(contains(bert.answer_to("calm"), "\"said\""));
}

TEST_CASE("a flood has too many messages or too many bytes, and exactly the limit is no flood") {
    TestHost host;
    host.hub().limits.connection = FloodRates{{1, 3}, {1, 100}};
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    anna.events();
    bert.events();
    for (int i = 0; i < 3; ++i) CHECK(contains(anna.answer_to("x"), "\"said\""));
    CHECK(contains(anna.answer_to("x"), "\"code\":\"flood\""));
    bert.events();
    for (int i = 0; i < 2; ++i) CHECK(contains(bert.answer_to(std::string(50, 'x')), "\"said\""));
    CHECK(contains(bert.answer_to("x"), "\"code\":\"flood\""));
}

TEST_CASE("the connections of an address share its limits, and an IPv6 /64 is one address") {
    TestHost host;
    host.hub().limits.address = FloodRates{{1, 3}, {}};
    ChatClient<> one(host, "", "tea", "2001:db8::1"), two(host, "", "tea", "2001:db8::2"),
        other(host, "", "tea", "2001:db8:0:1::1");
    one.send("x");
    two.send("x");
    one.send("x");
    CHECK(contains(two.answer_to("x"), "\"code\":\"flood\""));
    CHECK(contains(other.answer_to("x"), "\"said\""));
    ChatClient<> third(host, "", "tea", "2001:db8::3");
    CHECK(contains(third.answer_to("x"), "\"code\":\"flood\""));
}

TEST_CASE("flooders do not use up the limits of an honest user with the same address") {
    TestHost host;
    host.hub().limits.connection = {{1, 2}, {1e6, 1e6}};
    host.hub().limits.address = {{1, 14}, {1e6, 1e6}};
    host.hub().limits.flood_patience = 1000;
    std::vector<std::unique_ptr<ChatClient<>>> flooders;
    for (int i = 0; i < 6; ++i) {
        flooders.push_back(std::make_unique<ChatClient<>>(host));
        for (int n = 0; n < 50; ++n) flooders.back()->send("x");
    }
    ChatClient<> honest(host);
    CHECK(contains(honest.answer_to("hello"), "\"type\":\"said\""));
    CHECK(contains(honest.answer_to("hello"), "\"type\":\"said\""));
}

TEST_CASE("each line of a flood that has a tag is answered") {
    TestHost host;
    host.hub().limits.connection = {{1, 1}, {1e6, 1e6}};
    ChatClient<> anna(host);
    anna.send("one");
    for (const std::string tag : {"a", "b", "c"}) {
        const std::string error = anna.answer_to("/tag " + tag + " x");
        CHECK(field_of(error, "code") == "flood");
        CHECK(field_of(error, "tag") == tag);
    }
}

TEST_CASE("answers to requests of a client are charged, and histories stop above the limit") {
    TestHost host;
    host.hub().limits.replies = {1, 100'000};
    host.hub().limits.connection = {{1e6, 1e6}, {1e9, 1e9}};
    host.hub().limits.address = host.hub().limits.connection;
    ChatClient<> anna(host, "name=Anna");
    for (int i = 0; i < 40; ++i) anna.send(std::string(1000, 'x'));
    std::size_t bytes = 0, refused = 0;
    for (int i = 0; i < 100; ++i)
        for (const std::string& event : anna.send("/since " + host.position("0"))) {
            bytes += event.size();
            if (field_of(event, "code") == "flood") ++refused;
        }
    CHECK(bytes < 200'000);
    CHECK(refused > 90);
    CHECK(contains(anna.answer_to("hello"), "\"type\":\"said\""));
}

TEST_CASE("/in speaks in another room and stays in the current one") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert", "tea room");
    anna.send("/join tea room");
    anna.send("/join tea");
    bert.events();
    CHECK(field_of(anna.answer_to("/tag t1 /in tea%20room hello there"), "room") == "tea room");
    CHECK(field_of(bert.only_event(), "text") == "hello there");
    CHECK(field_of(anna.answer_to("/in tea%20room /me waves"), "room") == "tea room");
    CHECK(field_of(anna.answer_to("still here"), "room") == "tea");
    CHECK(field_of(anna.answer_to("/in coffee hello"), "code") == "no_room");
    CHECK(field_of(anna.answer_to("/in"), "code") == "no_room");
    CHECK(field_of(anna.answer_to("/in tea /in tea x"), "code") == "bad_command");
    anna.send("/in tea%20room /leave");
    CHECK(field_of(anna.answer_to("still here"), "room") == "tea");
    CHECK(field_of(anna.answer_to("/in tea%20room x"), "code") == "no_room");
}

TEST_CASE("the limits of a flooding address stay while thousands of others connect") {
    TestHost host;
    host.hub().limits.address = FloodRates{{0.001, 1}, {}};
    {
        ChatClient<> flooding(host);
        flooding.send("x");
        CHECK(contains(flooding.answer_to("x"), "\"code\":\"flood\""));
        flooding.disconnect();
    }
    for (int i = 0; i < 3000; ++i)
        ChatClient<>(host, "", "tea", "10.0." + std::to_string(i / 250) + "." + std::to_string(i % 250)).disconnect();
    ChatClient<> again(host);
    CHECK(contains(again.answer_to("x"), "\"code\":\"flood\""));
}

TEST_CASE("mute() returns false if there is no such user") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    CHECK(host.room("tea").mute("anna", 60s));
    CHECK(contains(anna.answer_to("x"), "\"code\":\"muted\""));
    CHECK(host.room("tea").mute("Anna", 0s));
    CHECK(contains(anna.answer_to("x"), "\"said\""));
    CHECK_FALSE(host.room("tea").mute("Bert", 60s));
}

TEST_CASE("a filter that returns an invalid text is an Error and nobody gets the text") {
    struct BadFilter : ChatHandler {
        bool filter(std::string& text) override { return text = "\x01", true; }
    };
    TestHost host;
    ChatClient<BadFilter> anna(host, "name=Anna");
    ChatClient<> bert(host, "name=Bert");
    bert.events();
    CHECK_THROWS_WITH_AS(anna.send("x"),
                         "ChatHandler::filter: the new text is empty, too long, or contains control characters", Error);
    CHECK(bert.events().empty());
}

namespace {

// Overrides every hook and logs the calls.
class Moderator : public ChatHandler {
public:
    std::optional<ChatUser> authenticate(const Request& request) override {
        const std::string account = request.query("account").value_or("");
        if (account == "nobody") return std::nullopt;
        if (account.empty()) return ChatHandler::authenticate(request);
        return ChatUser{account, "{\"role\":\"moderator\"}", true};
    }
    bool may(ChatAction action) override {
        if (user().account) return true;
        return (action != ChatAction::say || !silent) && ChatHandler::may(action);
    }
    bool filter(std::string& text) override {
        if (text == "spam") return false;
        for (std::size_t at; (at = text.find("darn")) != std::string::npos;) text.replace(at, 4, "d***");
        return true;
    }
    std::optional<Response> on_handshake(const Request& request) override {
        if (!request.query("old")) return std::nullopt;
        return Response(303, "").set_header("location", "/new");
    }
    void on_connect() override { log += "connect;"; }
    void on_disconnect() override { log += current_room() == nullptr ? "disconnect;" : "early;"; }
    void on_join(ChatRoom& room) override { log += "join " + room.name() + ";"; }
    void on_leave(ChatRoom& room) override { log += "leave " + room.name() + ";"; }
    void on_said(const ChatEntry& entry) override { log += "said " + entry.text + ";"; }
    bool on_command(std::string_view command, std::string_view rest) override {
        if (command != "dice") return ChatHandler::on_command(command, rest);
        say("rolled " + std::string(rest));
        return true;
    }
    std::string log;
    bool silent = false;
};

}  // namespace

TEST_CASE("all hooks are called, and the others keep their defaults") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly"), guest(host, "name=Anna"), nobody(host, "account=nobody"),
        redirected(host, "account=Holly&old=1");
    REQUIRE(nobody.refusal.has_value());
    CHECK(nobody.refusal->status() == 401);
    REQUIRE(redirected.refusal.has_value());
    CHECK(redirected.refusal->status() == 303);
    CHECK(contains(guest.events().at(1), "\"name\":\"Holly\",\"about\":{\"role\":\"moderator\"}}"));
    moderator.events();
    CHECK(contains(moderator.answer_to("darn it"), "\"text\":\"d*** it\""));
    CHECK(contains(moderator.answer_to("spam"), "\"code\":\"refused\""));
    CHECK(contains(moderator.answer_to("/dice 6"), "\"text\":\"rolled 6\""));
    CHECK(contains(moderator.answer_to("/who"), "\"users\""));
    CHECK(contains(moderator.answer_to("/nick Other"), "\"code\":\"name_fixed\""));
    guest.handler.silent = true;
    CHECK(contains(guest.answer_to("hello"), "\"code\":\"forbidden\""));
    moderator.disconnect();
    CHECK(moderator.handler.log == "connect;join tea;said d*** it;said rolled 6;leave tea;disconnect;");
}

namespace {

// The name of the user says which hook throws, such as "on_said".
class ThrowingHandler : public ChatHandler {
public:
    void on_join(ChatRoom&) override { fail("on_join"); }
    void on_leave(ChatRoom&) override { fail("on_leave"); }
    void on_said(const ChatEntry&) override { fail("on_said"); }

private:
    void fail(std::string_view hook) {
        if (user().name == hook) throw std::runtime_error("a mistake in a hook");
    }
};

// Joins another room whenever it leaves one.
class RejoiningHandler : public ChatHandler {
public:
    void on_leave(ChatRoom&) override {
        if (++left < 100) on_command("join", left % 2 == 0 ? "lobby" : "hall");
    }
    unsigned left = 0;
};

}  // namespace

TEST_CASE("an exception of a hook closes its own connection with 1011 and no other") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna");
    for (const std::string hook : {"on_join", "on_said", "on_leave"}) {
        CAPTURE(hook);
        ChatClient<ThrowingHandler> throwing(host, "name=" + hook);
        throwing.send("hello");
        CHECK(throwing.handler.is_open() == (hook == "on_leave"));
        throwing.disconnect(CloseCode::normal);
        CHECK(throwing.close_code() == (hook == "on_leave" ? CloseCode::normal : CloseCode::internal_error));
    }
    CHECK(names_of(host.room("tea").users()) == "Anna on_join on_said");  // two are in the grace period
    CHECK(contains(anna.events().back(), "{\"type\":\"leave\""));
    CHECK(contains(anna.answer_to("hello"), "\"said\""));
}

TEST_CASE("a handler that is destroyed without on_close() leaves its rooms") {
    TestHost host;
    ChatClient<> bert(host, "name=Bert");
    {
        ChatClient<> anna(host, "name=Anna");
        anna.send("/join coffee");
        anna.abandon();
    }
    bert.events();
    CHECK(contains(bert.answer_to("hello"), "\"said\""));
    CHECK(contains(bert.answer_to("/msg Anna hello"), "\"code\":\"user_away\""));
    host.hub().ban("Bert", 1h);  // visits all connections
    CHECK_FALSE(bert.handler.is_open());
}

TEST_CASE("a hook can leave rooms in on_leave()") {
    struct Leaver : ChatHandler {
        void on_leave(ChatRoom&) override {
            ++calls;
            on_command("leave", "tea");
            on_command("leave", "coffee");
        }
        int calls = 0;
    };
    TestHost host;
    ChatClient<Leaver> leaver(host, "name=Anna");
    leaver.send("/join coffee");
    leaver.send("/leave coffee");
    CHECK(leaver.handler.current_room() == nullptr);
    CHECK(leaver.handler.calls == 2);
    CHECK(host.room("coffee").users().empty());
}

TEST_CASE("a closed connection cannot join a room") {
    TestHost host;
    ChatClient<RejoiningHandler> rejoining(host);
    rejoining.send("/leave");
    CHECK(rejoining.handler.current_room()->name() == "hall");
    rejoining.disconnect();
    CHECK(rejoining.handler.left == 2);
}

TEST_CASE("an account owns its name, so another user with that name gets a new one") {
    TestHost host;
    ChatClient<Moderator> visitor(host, "name=Holly");
    visitor.events();
    ChatClient<Moderator> moderator(host, "account=Holly"), tab(host, "account=Holly");
    CHECK(contains(visitor.events().at(0), "\"old\":\"Holly\",\"name\":\"Holly-2\""));
    CHECK(contains(moderator.events().at(0), "\"name\":\"Holly\""));
    CHECK(names_in(tab.events().at(1)) == "Holly, Holly-2");
}

TEST_CASE("only a moderator can mute, kick and ban") {
    TestHost host;
    host.hub().limits.connection = FloodRates();
    ChatClient<Moderator> moderator(host, "account=Holly");
    ChatClient<> anna(host, "name=Anna&key=anna-secret", "tea", "192.0.2.1"),
        tab(host, "key=anna-secret", "tea", "192.0.2.1");
    moderator.events();
    CHECK(moderator.answer_to("/tag t1 /mute Anna 60") ==
          "{\"type\":\"moderation\",\"room\":\"tea\",\"action\":\"mute\",\"name\":\"Anna\",\"seconds\":60,"
          "\"by\":\"Holly\",\"tag\":\"t1\"}");
    CHECK(contains(anna.answer_to("hello"), "\"code\":\"muted\""));
    CHECK(contains(anna.answer_to("/msg Holly hello"), "\"code\":\"muted\""));
    CHECK(contains(anna.answer_to("/nick hello"), "\"code\":\"muted\""));
    ChatClient<Moderator> account(host, "account=Anna");  // takes the name; the mute stays with the user
    tab.events();
    CHECK(contains(tab.answer_to("hello"), "\"code\":\"muted\""));
    moderator.send("/mute Anna-2 0");
    anna.send("/nick Annabel");
    anna.events();
    CHECK(contains(anna.answer_to("hello"), "\"said\""));
    CHECK(contains(moderator.answer_to("/mute Annabel for ever"), "\"code\":\"bad_command\""));
    CHECK(contains(moderator.answer_to("/kick Nobody"), "\"code\":\"unknown_user\""));

    moderator.send("/kick Annabel Enough of that.");
    for (auto* client : {&anna, &tab}) {
        const auto events = client->events();
        CHECK(events.back() == "{\"type\":\"kicked\",\"code\":\"kick\",\"text\":\"Enough of that.\"}");
        CHECK(client->close_code() == CloseCode::policy_violation);
        client->disconnect();
    }
    CHECK(contains(moderator.events().back(),
                   "{\"type\":\"leave\",\"room\":\"tea\",\"name\":\"Annabel\""));  // without a grace period

    ChatClient<> again(host, "name=Annabel&key=anna-secret");
    REQUIRE_FALSE(again.refusal.has_value());
    moderator.send("/ban Annabel 60");
    CHECK_FALSE(again.handler.is_open());
    ChatClient<> same_name(host, "name=annabel"), same_key(host, "name=Zoe&key=anna-secret"),
        other(host, "name=Bert", "tea", "192.0.2.1");
    CHECK(same_name.refusal.has_value());
    CHECK(same_key.refusal.has_value());
    REQUIRE_FALSE(other.refusal.has_value());
    CHECK(contains(other.answer_to("/nick Annabel"), "\"code\":\"name_banned\""));

    moderator.send("/ban 192.0.2.1");
    CHECK_FALSE(other.handler.is_open());
    ChatClient<> same_address(host, "name=Carl", "tea", "192.0.2.1"), elsewhere(host, "name=Carl", "tea", "192.0.2.2");
    REQUIRE(same_address.refusal.has_value());
    CHECK(same_address.refusal->status() == 403);
    CHECK_FALSE(elsewhere.refusal.has_value());
    moderator.send("/ban 192.0.2.1 0");
    ChatClient<> forgiven(host, "name=Dora", "tea", "192.0.2.1");
    CHECK_FALSE(forgiven.refusal.has_value());
}

TEST_CASE("the hub calls on_event for all events, and an exception of a hook changes nothing") {
    TestHost host;
    std::string seen;
    host.hub().on_event = [&](const ChatEntry& entry) {
        seen += std::to_string(static_cast<int>(entry.kind)) + ":" + entry.name + ":" + entry.text + " ";
        throw std::runtime_error("on purpose");
    };
    std::vector<std::string> decisions;
    host.hub().on_decision = [&](const ChatFact& fact) { decisions.push_back(fact.scope + " " + fact.key); };
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert");
    anna.events();
    CHECK(field_of(anna.answer_to("hello"), "type") == "said");
    anna.send("/typing");
    const std::string id = anna.handler.user().id;
    host.hub().ban("192.0.2.9", 1h);
    host.hub().ban("192.0.2.9", 0s);
    CHECK(seen == "34:Anna: 34:Bert: 0:Anna:hello ");
    CHECK(decisions == std::vector<std::string>{"ban address 192.0.2.9", "ban address 192.0.2.9"});
}

TEST_CASE("an exception of a hook of the hub is counted") {
    RunningServer running;
    running.server.route<ChatHandler>("/chat/{room}");
    ChatHub::of(running.server).on_event = [](const ChatEntry&) { throw std::runtime_error("on purpose"); };
    running.start();
    WsClient anna(running.port(), "/chat/tea?name=Anna");
    next_with(anna, "\"history\"");
    anna.send("hello");
    next_with(anna, "\"said\"");
    CHECK(running.metrics().handler_exceptions == 2);  // a join and a message
}

TEST_CASE("the program sends its own events, which differ from all events of the chat") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert");
    anna.events();
    bert.events();
    std::string seen;
    host.hub().on_event = [&](const ChatEntry& entry) { seen += entry.text + entry.data; };
    CHECK(host.hub().send(anna.handler.user().id, "alarm", {{"level", 3}}) == 1);
    CHECK(contains(anna.only_event(), R"({"type":"event","name":"alarm","data":{"level":3},"time":)"));
    CHECK(bert.events().empty());
    CHECK(host.hub().send("nobody", "alarm") == 0);
    host.room("tea").send("said", Json{{"text", "Tea?"}});
    for (ChatClient<>* client : {&anna, &bert})
        CHECK(contains(client->only_event(),
                       R"({"type":"event","room":"tea","name":"said","data":{"text":"Tea?"},"time":)"));
    CHECK(seen == R"(alarm{"level":3}alarmnullsaid{"text":"Tea?"})");
    CHECK_THROWS_WITH_AS(host.room("tea").send(""),
                         "ChatRoom::send: the name of an event is 1 to 64 bytes of visible text", Error);
    CHECK_THROWS_AS(host.room("tea").send("x\n"), Error);
    CHECK_THROWS_AS(host.room("tea").send("poll", std::string(5000, 'x')), Error);
}

TEST_CASE("all moderators of a room get each kick, ban and mute, and other members do not") {
    TestHost host;
    std::vector<std::string> decisions;
    host.hub().on_decision = [&](const ChatFact& fact) {
        decisions.push_back(fact.scope + "/" + fact.key.substr(0, 8) + "/" + fact.value);
    };
    ChatClient<Moderator> moderator(host, "account=Holly"), second(host, "account=Ivy"),
        elsewhere(host, "account=Jo", "coffee");
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    for (ChatClient<>* client : {&anna, &bert}) client->events();
    second.events();
    elsewhere.events();
    CHECK(field_of(moderator.send("/tag t1 /mute Anna 60").back(), "tag") == "t1");
    const std::string told = second.only_event();
    CHECK(told ==
          "{\"type\":\"moderation\",\"room\":\"tea\",\"action\":\"mute\",\"name\":\"Anna\",\"seconds\":60,"
          "\"by\":\"Holly\"}");
    CHECK(bert.events().empty());
    CHECK(elsewhere.events().empty());
    moderator.send("/kick Anna");
    CHECK(contains(second.only_event(), R"("action":"kick","name":"Anna","by":"Holly")"));
    CHECK_FALSE(anna.handler.is_open());
    host.room("tea").kick("Bert", "closing time");
    CHECK(contains(second.only_event(), R"("action":"kick","name":"Bert","by":"")"));
    CHECK(field_of(bert.events().back(), "text") == "closing time");
    CHECK_FALSE(host.room("tea").kick("Nobody"));
    CHECK(decisions == std::vector<std::string>{"mute/tea\nname/Anna", "kick/tea\nname/Anna", "kick/tea\nname/Bert"});
    CHECK_THROWS_WITH_AS(host.room("tea").set_topic(std::string(501, 'x')),
                         "ChatRoom::set_topic: the topic is longer than ChatLimits::max_topic", Error);
}

namespace {

// Anna moderates the room "tea" alone, nobody speaks in "museum", and only Bert enters "cellar".
struct Rule : ChatHandler {
    bool may(ChatAction action, std::string_view room) override {
        if (room == "museum" && action == ChatAction::say) return false;
        if (room == "cellar" && action == ChatAction::join) return user().name == "Bert";
        if (room == "new" && action == ChatAction::create_room) return false;
        if (room == "tea" && user().name == "Anna") return true;
        return ChatHandler::may(action, room);
    }
};

}  // namespace

TEST_CASE("the permissions of a user can differ from room to room") {
    TestHost host;
    ChatClient<Rule> anna(host, "name=Anna"), bert(host, "name=Bert");
    CHECK(contains(anna.events().front(), R"("kick","ban","mute","remove","topic","slow","access","readonly"])"));
    CHECK_FALSE(contains(bert.events().front(), "\"kick\""));
    CHECK(field_of(anna.send("/mute Bert 0").back(), "type") == "moderation");
    CHECK(field_of(anna.send("/join cellar").back(), "code") == "forbidden");
    CHECK(field_of(bert.send("/join cellar").front(), "room") == "cellar");
    const std::string museum = anna.send("/join museum").front();
    CHECK(field_of(museum, "type") == "room");
    CHECK_FALSE(contains(museum, "\"kick\""));
    CHECK_FALSE(contains(museum, "\"say\""));
    CHECK(field_of(anna.answer_to("hello"), "code") == "forbidden");
    CHECK(field_of(anna.answer_to("/kick Bert"), "code") == "forbidden");
    CHECK(field_of(anna.answer_to("/in tea /mute Bert 0"), "type") == "moderation");
    CHECK(field_of(anna.answer_to("/join new"), "code") == "forbidden");
    CHECK_FALSE(contains(anna.answer_to("/help"), "/kick"));
}

TEST_CASE("names of rooms are compared like names of users, and the first member decides how a room is written") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret", "Tea Room"), bert(host, "name=Bert", "tea%20room");
    ChatClient<> carl(host, "name=Carl&join=%EF%BC%B4EA+ROOM", "lobby");
    CHECK(field_of(anna.events().front(), "room") == "Tea Room");
    bert.events();
    ChatClient<> dora(host, "name=Dora", "TEA ROOM");
    CHECK(field_of(dora.events().front(), "room") == "Tea Room");
    CHECK(field_of(carl.answer_to("/join tea room"), "room") == "Tea Room");
    anna.events();
    const std::string said = anna.answer_to("/tag t1 hello");
    CHECK(field_of(said, "room") == "Tea Room");
    CHECK(field_of(anna.answer_to("/tag t1 hello"), "room") == "Tea Room");
    CHECK(field_of(carl.only_event(), "room") == "Tea Room");
    CHECK(field_of(anna.answer_to("/read 1"), "room") == "Tea Room");
    CHECK(field_of(carl.answer_to("/in TEA%20ROOM hello"), "room") == "Tea Room");
    CHECK(field_of(carl.answer_to("/tag t2 /edit 99 x"), "room") == "Tea Room");
    for (const char* line : {"/typing", "/nick Cleo"}) {
        anna.events();
        carl.send(line);
        CHECK(field_of(anna.only_event(), "room") == "Tea Room");
    }
    CHECK(contains(carl.answer_to("/rooms"), R"({"room":"Tea Room","users":3})"));
    CHECK(&host.room("tea room") == host.hub().find("TEA ROOM"));
    CHECK(host.room("tea room").key() == "tea room");
    std::string texts;
    host.hub().store().since("tea room", std::nullopt, 10, [&](const HistoryPage& page) {
        for (const ChatEntry& each : page.entries) texts += each.text + ";";
    });
    CHECK(texts == "hello;hello;");
    CHECK(contains(carl.answer_to("/leave Tea ROOM"), "\"lobby\""));
}

TEST_CASE("a user without an invitation does not see or enter a private room") {
    TestHost host;
    host.hub().limits.connection = FloodRates();
    ChatClient<Rule> anna(host, "name=Anna"), guest(host, "name=Gus");
    ChatClient<Rule> bert(host, "name=Bert&key=bert-secret"), carl(host, "name=Carl&key=carl-secret", "lobby");
    const std::string carl_id = carl.handler.user().id;
    CHECK(field_of(bert.send("/access private").back(), "code") == "forbidden");
    CHECK(field_of(anna.answer_to("/access ajar"), "code") == "bad_command");
    for (ChatClient<Rule>* client : {&bert, &guest}) client->events();
    CHECK(anna.answer_to("/tag t1 /access private") == R"({"type":"options","room":"tea","private":true,"tag":"t1"})");
    CHECK(bert.only_event() == R"({"type":"options","room":"tea","private":true})");
    CHECK(contains(bert.answer_to("/rooms"), R"("room":"tea","users":3,"private":true)"));
    CHECK_FALSE(contains(carl.send("/rooms").back(), "tea"));
    const std::string refused = carl.answer_to("/join TEA");
    CHECK(field_of(refused, "code") == "not_invited");
    CHECK(field_of(refused, "room") == "TEA");
    ChatClient<Rule> dora(host, "name=Dora");
    const auto events = dora.events();
    CHECK(contains(events.at(0), "\"room\":null"));
    CHECK(field_of(events.at(1), "code") == "not_invited");
    CHECK(field_of(events.at(1), "room") == "tea");

    CHECK(field_of(bert.answer_to("/invite Nobody"), "code") == "unknown_user");
    const std::string answer = bert.answer_to("/tag t2 /invite @" + carl_id);
    CHECK(answer ==
          "{\"type\":\"invited\",\"room\":\"tea\",\"user\":\"" + carl_id + "\",\"by\":\"Bert\",\"tag\":\"t2\"}");
    CHECK(field_of(carl.only_event(), "type") == "invited");
    const std::string room = carl.send("/join tea").front();
    CHECK(field_of(room, "type") == "room");
    CHECK(field_of(room, "private") == "true");
    carl.send("/join lobby");
    ChatClient<Rule> emil(host, "name=Emil", "lobby");
    CHECK(field_of(carl.send("/in tea /invite Emil").back(), "type") == "invited");  // in another room of Carl
    emil.events();
    CHECK(field_of(emil.send("/join tea").front(), "type") == "room");

    // Who was there may come again, also by a new connection; who was kicked may not.
    bert.disconnect(CloseCode::normal);
    ChatClient<Rule> again(host, "name=Bert&key=bert-secret");
    CHECK(field_of(again.events().front(), "room") == "tea");
    anna.send("/kick Bert");
    again.disconnect();
    ChatClient<Rule> kicked(host, "name=Bert&key=bert-secret");
    CHECK(contains(kicked.events().front(), "\"room\":null"));
    CHECK(field_of(anna.answer_to("/access public"), "type") == "options");
    CHECK(field_of(kicked.send("/join tea").front(), "type") == "room");
}

TEST_CASE("a client that connects gets the options of all its rooms") {
    TestHost host;
    host.hub().room_options = [](std::string_view name, ChatRoomOptions& options) {
        options.read_only = name == "board";
        if (name == "tea") options.slow = 30s;
    };
    ChatClient<> anna(host, "name=Anna&join=board");
    std::vector<std::string> rooms;
    for (const std::string& event : anna.events())
        if (field_of(event, "type") == "hello" || field_of(event, "type") == "room") rooms.push_back(event);
    REQUIRE(rooms.size() == 3);  // hello in tea, the other room, the current room again
    CHECK(field_of(rooms[0], "slow") == "30");
    CHECK(field_of(rooms[1], "room") == "board");
    CHECK(field_of(rooms[1], "read_only") == "true");
    CHECK(field_of(rooms[2], "room") == "tea");
    CHECK(field_of(rooms[2], "slow") == "30");
    ChatClient<> bert(host, "name=Bert&join=board%00", "tea");
    bool answered = false;
    for (const std::string& event : bert.events()) answered = answered || field_of(event, "code") == "room_bad";
    CHECK(answered);
}

TEST_CASE("the store keeps changes of moderators, and they are applied after the program's options of a room") {
    TestHost host;
    host.hub().room_options = [](std::string_view name, ChatRoomOptions& options) {
        if (name == "Board") options.is_private = options.read_only = true;
    };
    ChatClient<> out(host, "name=Anna", "Board");
    CHECK(field_of(out.events().at(1), "code") == "not_invited");
    host.hub().store().put({"room", "board", "private=0 readonly=1 slow=7"});
    ChatClient<> anna(host, "name=Anna", "Board");
    CHECK(field_of(anna.events().front(), "room") == "Board");
    CHECK(host.room("Board").options.read_only);
    CHECK_FALSE(host.room("Board").options.is_private);
    CHECK((host.room("Board").options.slow == 7s));
    CHECK(field_of(anna.answer_to("hello"), "code") == "read_only");
}

TEST_CASE("in a read-only room only moderators speak, and all may react and write in private") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly");
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    const std::string id = field_of(anna.answer_to("before"), "id");
    CHECK(field_of(moderator.send("/readonly on").back(), "read_only") == "true");
    CHECK(field_of(anna.send("hello").back(), "code") == "read_only");
    CHECK(field_of(anna.send("/me waves").back(), "code") == "read_only");
    CHECK(field_of(anna.send("/edit " + id + " after").back(), "code") == "read_only");
    CHECK(field_of(anna.send("/react " + id + " +1").back(), "type") == "react");
    CHECK(field_of(anna.send("/msg Bert psst").back(), "type") == "private");
    CHECK(field_of(moderator.send("news").back(), "type") == "said");
    CHECK(field_of(moderator.send("/readonly maybe").back(), "code") == "bad_command");
    moderator.send("/readonly off");
    CHECK(field_of(anna.send("hello").back(), "type") == "said");
}

TEST_CASE("in a slow room a user waits between two messages, also after a new connection or a new name") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly", "tea", "192.0.2.9");
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert");
    CHECK(field_of(moderator.send("/slow 30").back(), "slow") == "30");
    CHECK(field_of(anna.send("one").back(), "type") == "said");
    const std::string refused = anna.send("/tag t1 two").back();
    CHECK(field_of(refused, "code") == "slow");
    CHECK(contains(refused, "wait 3"));
    CHECK(field_of(refused, "seconds").substr(0, 1) == "3");
    CHECK(field_of(refused, "tag") == "t1");
    anna.disconnect(CloseCode::normal);
    ChatClient<> again(host, "name=Zoe&key=anna-secret");
    CHECK(field_of(again.send("two").back(), "code") == "slow");
    CHECK(field_of(bert.send("one").back(), "type") == "said");
    bert.disconnect(CloseCode::normal);
    ChatClient<> guest(host, "name=Gus");
    CHECK(field_of(guest.send("two").back(), "code") == "slow");
    for (int i = 0; i < 3; ++i) CHECK(field_of(moderator.send("x").back(), "type") == "said");
    again.events();
    CHECK(field_of(again.send("/join coffee").front(), "type") == "room");
    CHECK(field_of(again.send("here it is not slow").back(), "type") == "said");
    for (const char* bad : {"/slow", "/slow x", "/slow 86401"})
        CHECK(field_of(moderator.send(bad).back(), "code") == "bad_command");
    moderator.send("/slow 0");
    CHECK(field_of(guest.send("two").back(), "type") == "said");
}

TEST_CASE("a room has its own limits of texts, users and histories, or no history") {
    TestHost host;
    host.hub().room_options = [](std::string_view, ChatRoomOptions& options) {
        options.max_text = 10;
        options.max_users = 2;
        options.history_on_join = 1;
        options.history_on_resume = 2;
    };
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert"), carl(host, "name=Carl");
    CHECK(field_of(carl.events().at(1), "code") == "room_full");
    ChatClient<> tab(host, "key=anna-secret");  // no further user
    CHECK(field_of(tab.events().front(), "room") == "tea");
    CHECK(field_of(anna.send(std::string(11, 'x')).back(), "code") == "too_long");
    const std::string first = field_of(anna.answer_to("one"), "id");
    for (const char* text : {"two", "three", "four"}) anna.send(text);
    bert.disconnect(CloseCode::normal);
    {
        ChatClient<> dora(host, "name=Dora");
        CHECK(texts_of(dora.events().at(2)) == "four;");
        dora.disconnect(CloseCode::normal);
    }
    ChatClient<> dora(host, "name=Dora&last=" + host.position(first));
    CHECK(texts_of(dora.events().at(2)) == "three;four;");

    host.room("tea").options.kept = false;
    const std::string said = anna.answer_to("/tag t1 unkept");
    CHECK(field_of(said, "text") == "unkept");
    CHECK(field_of(said, "tag") == "t1");
    CHECK(field_of(said, "id") == "");
    CHECK(texts_of(anna.answer_to("/before 99 1")) == "four;");
}

TEST_CASE("a user and an address may open a limited number of rooms") {
    TestHost host;
    host.hub().limits.room_creations = {0.001, 3};
    host.hub().limits.address_room_creations = {0.001, 5};
    host.hub().limits.connection = host.hub().limits.address = FloodRates();
    ChatClient<> anna(host, "name=Anna");
    std::string codes;
    const auto open_rooms = [](ChatClient<>& client, const std::string& prefix) {
        std::string opened;
        for (int i = 0; i < 5; ++i) {
            const auto events = client.send("/join " + prefix + std::to_string(i));
            opened += field_of(events.front(), "code") == "room_limit" ? "-" : "+";
        }
        return opened;
    };
    anna.events();
    CHECK(open_rooms(anna, "a") == "++---");
    ChatClient<> bert(host, "name=Bert");
    bert.events();
    CHECK(open_rooms(bert, "b") == "++---");  // two more of this address
    ChatClient<> carl(host, "name=Carl"), elsewhere(host, "name=Dora", "tea", "192.0.2.7");
    carl.events();
    CHECK(open_rooms(carl, "c") == "-----");
    CHECK(field_of(carl.send("/join a0").front(), "type") == "room");  // somebody is there
    elsewhere.events();
    CHECK(open_rooms(elsewhere, "d") == "+++--");
}

TEST_CASE("searches of a large history in memory wait for later turns, and too many are refused") {
    struct Posts final : Mailbox {
        bool post(detail::Task work) override {
            tasks.push_back(std::move(work));
            return true;
        }
        std::vector<detail::Task> tasks{};
    };
    struct Listener final : ChatStore::Listener {
        void on_entry(const ChatEntry&) override {}
        void on_duplicate(const ChatEntry&) override {}
        void on_failure(const ChatEntry&, const std::string&) override {}
    } listener;
    const auto posts = std::make_shared<Posts>();
    MemoryHistory history;
    history.attach(listener, posts);
    ChatEntry entry;
    entry.room = "tea";
    entry.text = std::string(5000, 'x');
    for (int i = 0; i < 100; ++i) history.append(entry);
    std::size_t found = 0, refused = 0;
    for (int i = 0; i < 1100; ++i)
        history.search("tea", "x", 1, [&](const HistoryPage& page) { ++(page.error.empty() ? found : refused); });
    CHECK(found == 1);
    CHECK(refused == 99);
    std::size_t turns = 0;
    for (; !posts->tasks.empty(); ++turns)
        for (detail::Task& task : std::exchange(posts->tasks, {})) task();
    CHECK(found == 1001);
    CHECK(turns >= 1000);
    history.search("tea", "x", 1, [&](const HistoryPage& page) { found += page.entries.size(); });
    CHECK(found == 1002);
}

TEST_CASE("the users of an address can make a limited number of facts") {
    TestHost host;
    host.hub().limits.address_facts = {0.001, 5};
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert&key=bert-secret");
    for (ChatClient<>* each : {&anna, &bert}) each->events();
    CHECK(field_of(anna.answer_to("/tag t1 /msg Bert hello"), "type") == "private");  // two facts
    CHECK(field_of(anna.answer_to("/tag t2 /read 1"), "type") == "read");
    for (const char* line : {"/read 1", "/invite Anna", "/msg Carl hello"}) {
        ChatClient<> carl(host, "name=Carl&key=carl-secret");
        CAPTURE(line);
        CHECK(field_of(bert.answer_to(text::concat({"/tag t3 ", line})), "code") == "flood");
    }
    CHECK(field_of(anna.answer_to("/tag t4 /read 2"), "type") == "read");
    CHECK(field_of(anna.answer_to("/tag t5 /msg Bert again"), "type") == "private");
    ChatClient<> elsewhere(host, "name=Dora&key=dora-secret", "tea", "192.0.2.7");
    elsewhere.events();
    CHECK(field_of(elsewhere.answer_to("/tag t6 /read 1"), "type") == "read");
}

TEST_CASE("a moderator bans and mutes also while the facts of users fill the store") {
    HistoryLimits limits;
    limits.max_facts = 10;
    TestHost host;
    host.hub().set_store(MemoryHistory(limits));
    ChatClient<Moderator> moderator(host, "account=Holly", "tea");
    for (int i = 0; i < 20; ++i) ChatClient<> user(host, text::concat({"name=Eve&key=secret-", std::to_string(i)}));
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    for (ChatClient<>* each : {&anna, &bert}) each->events();
    moderator.events();
    moderator.send("/mute Anna");
    moderator.send("/ban Bert");
    CHECK(field_of(anna.answer_to("hello"), "code") == "muted");
    CHECK_FALSE(bert.handler.is_open());
}

TEST_CASE("an account owns its name, even while it is away and after a restart") {
    TestHost host;
    { ChatClient<Moderator> moderator(host, "account=Holly", "coffee"); }
    host.hub().store().put({"account", "ivy", "Ivy", "account Ivy"});  // of a former run
    ChatClient<> visitor(host, "name=Holly"), twin(host, "name=HOLLY"), ivy(host, "name=ivy"), bert(host, "name=Bert");
    CHECK(field_of(visitor.events().front(), "name") == "Holly-2");
    CHECK(field_of(twin.events().front(), "name") == "HOLLY-3");
    CHECK(field_of(ivy.events().front(), "name") == "ivy-2");
    CHECK(contains(bert.send("/nick holly").back(), "That name is taken; holly-4 is free."));
    ChatClient<Moderator> moderator(host, "account=Holly");
    CHECK(field_of(moderator.events().front(), "name") == "Holly");
    host.hub().store().put({"account", "ivy"});
    CHECK(field_of(bert.send("/nick Ivy").back(), "name") == "Ivy");
    host.hub().store().erase_author("account Holly", [](std::size_t, const std::string&) {});
    CHECK_FALSE(contains(bert.send("/nick Holly Day").back(), "taken"));
}

TEST_CASE("hello has the permissions of the user and the rate at which a client may send") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly");
    ChatClient<> anna(host, "name=Anna");
    CHECK(contains(moderator.events().front(), R"("rooms","invite","kick","ban","mute")"));
    const std::string hello = anna.events().front();
    CHECK(contains(hello, R"("may":["say","edit","react","private","rename","join","create","rooms","invite"])"));
    CHECK(field_of(hello, "per_second") == "5");
    CHECK(field_of(hello, "burst") == "20");
}

TEST_CASE("/bans lists the bans, /unban ends one, and /unmute lets a user speak") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly");
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), bert(host, "name=Bert");
    const std::string id = anna.handler.user().id;
    moderator.send("/ban Anna 60");
    const std::string kicked = anna.events().back();
    CHECK(contains(kicked, "{\"type\":\"kicked\",\"code\":\"ban\",\"text\":\"You are banned.\",\"seconds\":6"));
    const std::string list = moderator.answer_to("/tag t2 /bans");
    CHECK(contains(list, "{\"ban\":\"name anna\",\"name\":\"Anna\",\"seconds\":"));
    CHECK(contains(list, "{\"ban\":\"user " + id + "\",\"name\":\"Anna\",\"seconds\":"));
    CHECK(field_of(list, "tag") == "t2");
    CHECK(host.hub().bans().size() == 2);
    CHECK(field_of(bert.send("/bans").back(), "code") == "forbidden");
    CHECK(field_of(bert.send("/unban Anna").back(), "code") == "forbidden");
    moderator.send("/unban Anna");
    CHECK(host.hub().bans().empty());
    ChatClient<> forgiven(host, "name=Anna&key=anna-secret");
    CHECK_FALSE(forgiven.refusal.has_value());
    moderator.send("/mute Bert");
    CHECK(field_of(bert.send("hello").back(), "code") == "muted");
    moderator.send("/unmute Bert");
    CHECK(field_of(bert.send("hello").back(), "type") == "said");
}

TEST_CASE("the ban of a guest also bans the address, unless others use it") {
    TestHost host;
    ChatClient<> alone(host, "name=Anna", "tea", "192.0.2.1"), bert(host, "name=Bert", "tea", "192.0.2.2"),
        neighbour(host, "name=Carl", "tea", "192.0.2.2");
    host.hub().ban("Anna", 1h);
    host.hub().ban("Bert", 1h);
    CHECK_FALSE(alone.handler.is_open());
    CHECK_FALSE(bert.handler.is_open());
    CHECK(neighbour.handler.is_open());
    ChatClient<> again(host, "name=Dora", "tea", "192.0.2.1"), other(host, "name=Dora", "tea", "192.0.2.2");
    CHECK(again.refusal.has_value());
    CHECK_FALSE(other.refusal.has_value());
}

TEST_CASE("the store keeps bans and mutes") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret");
    host.hub().ban("192.0.2.9", 1h);
    host.room("tea").mute("Anna", 1h);
    std::vector<ChatFact> bans, mutes;
    const auto into = [](std::vector<ChatFact>& list) {
        return [&list](std::vector<ChatFact> facts, const std::string&) { list = std::move(facts); };
    };
    host.hub().store().facts("ban", "", into(bans));
    host.hub().store().facts("mute", "", into(mutes));
    REQUIRE(bans.size() == 1);
    CHECK(bans[0].key == "address 192.0.2.9");
    REQUIRE(mutes.size() == 1);
    CHECK(mutes[0].key == "tea\nuser " + anna.handler.user().id);
    host.hub().ban("192.0.2.9", 0s);
    host.hub().store().facts("ban", "", into(bans));
    CHECK(bans.empty());
}

TEST_CASE("a ban closes the connections of a user in all rooms, and can be ended by the same name") {
    TestHost host;
    ChatClient<> anna(host, "name=Anna&key=anna-secret"), coffee(host, "name=Zoe&key=anna-secret", "coffee"),
        nowhere(host, "name=Zoe&key=anna-secret", "milk"), bert(host, "name=Anna&key=bert-secret");
    nowhere.send("/leave");
    host.hub().ban("anna", 1h);
    CHECK_FALSE(anna.handler.is_open());
    CHECK_FALSE(coffee.handler.is_open());
    CHECK_FALSE(nowhere.handler.is_open());
    CHECK(bert.handler.is_open());
    ChatClient<> while_banned(host, "name=Zoe&key=anna-secret");
    CHECK(while_banned.refusal.has_value());
    host.hub().ban("Anna", Duration::zero());
    ChatClient<> forgiven(host, "name=Anna&key=anna-secret");
    CHECK_FALSE(forgiven.refusal.has_value());
}

TEST_CASE("a ban of a name that looks like an address bans the user who has it and not the address") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly");
    ChatClient<> troll(host, "name=127.0.0.1&key=troll-secret"), bert(host, "name=Bert");
    moderator.send("/ban 127.0.0.1");
    CHECK(troll.close_code() == CloseCode::policy_violation);
    CHECK(moderator.handler.is_open());
    CHECK(bert.handler.is_open());
    troll.disconnect();
    ChatClient<> same_name(host, "name=127.0.0.1"), same_key(host, "name=Zoe&key=troll-secret"),
        other(host, "name=Zoe");
    CHECK(same_name.refusal.has_value());
    CHECK(same_key.refusal.has_value());
    CHECK_FALSE(other.refusal.has_value());
    moderator.send("/ban 127.0.0.1 0");
    ChatClient<> forgiven(host, "name=127.0.0.1");
    CHECK_FALSE(forgiven.refusal.has_value());
}

TEST_CASE("/help lists only the commands that the user may use") {
    TestHost host;
    ChatClient<Moderator> moderator(host, "account=Holly");
    ChatClient<> anna(host, "name=Anna");
    CHECK(contains(moderator.answer_to("/help"), "/ban NAME|ADDRESS [SECONDS]"));
    CHECK_FALSE(contains(anna.answer_to("/help"), "/ban"));
    CHECK(contains(anna.answer_to("/help"), "{\"command\":\"/me TEXT\",\"text\":\"says what you do\"}"));
}

namespace {

// The query contains what authenticate() returns as ChatUser::about.
struct AboutHandler : ChatHandler {
    std::optional<ChatUser> authenticate(const Request& request) override {
        return ChatUser{"Anna", request.query("about").value_or("")};
    }
};

}  // namespace

TEST_CASE("ChatUser::about must be a JSON value within its limit, else the handshake fails") {
    TestHost host;
    host.hub().limits.max_about = 20;
    const auto error = [&](const std::string& about) {
        return test::error_of([&] { ChatClient<AboutHandler>(host, "about=" + about); });
    };
    const std::string prefix = "ChatHandler::authenticate: ChatUser::about ";
    CHECK(error("") == "");
    CHECK(error("{%22a%22:1}") == "");
    CHECK(error("%22" + std::string(18, 'x') + "%22") == "");
    const std::string not_json = ": it is not a JSON value in UTF-8 of at most 32 levels";
    CHECK(error("{a}") == prefix + "\"{a}\"" + not_json);
    CHECK(error("%22%FF%22") == prefix + "\"\\x22\\xff\\x22\"" + not_json);
    CHECK(error("%22" + std::string(19, 'x') + "%22") ==
          prefix + "\"\\x22" + std::string(19, 'x') + "\\x22\": it is longer than ChatLimits::max_about");
}

// ---- a store that answers later ------------------------------------------------------------------------------------

namespace {

// Answers and delivers when the test says so, in any order, as a store with several servers can.
class ManualStore : public ChatStore {
public:
    explicit ManualStore(ManualStore*& self) { self = this; }
    void attach(Listener& listener, std::shared_ptr<Mailbox>) override { listener_ = &listener; }
    void append(ChatEntry entry) override {
        entry.id = kept.size() + 1;
        kept.push_back(entry);
    }
    void forward(const ChatEntry& entry) override { listener_->on_entry(entry); }
    void since(const std::string&, std::optional<HistoryPosition> position, std::size_t, PageCallback then) override {
        HistoryPage page;
        for (const ChatEntry& each : kept)
            if (!position || each.id > position->id) page.entries.push_back(each);
        page.last_id = kept.size();
        pages.push_back([page, then] { then(page); });
    }
    void before(const std::string&, std::uint64_t, std::size_t, PageCallback then) override { then({}); }
    void put(ChatFact fact) override { listener_->on_fact(fact); }
    void facts(const std::string&, const std::string&, FactsCallback then) override { then({}, ""); }
    // Delivers the next entry.
    void deliver() { listener_->on_entry(kept.at(delivered_++)); }
    void deliver_remote(ChatEntry::Kind kind, const std::string& name, const std::string& text = "") {
        ChatEntry made = entry(text);
        made.kind = kind;
        made.name = name;
        made.user = "remote user";
        made.hub = "remote hub";
        listener_->on_entry(made);
    }
    void answer() {
        REQUIRE_FALSE(pages.empty());
        const auto page = pages.front();
        pages.erase(pages.begin());
        page();
    }
    void fail(std::size_t at) { listener_->on_failure(kept.at(at), "disk full"); }

    std::vector<ChatEntry> kept;
    std::vector<std::function<void()>> pages;

private:
    Listener* listener_ = nullptr;
    std::size_t delivered_ = 0;
};

// The texts of all messages in the events, in order.
template <class Events>
std::string texts(const Events& events) {
    std::string all;
    for (std::string event : events)
        for (std::size_t at; (at = event.find("\"text\":\"")) != std::string::npos;) {
            event.erase(0, at + 8);
            all += event.substr(0, event.find('"'));
        }
    return all;
}

}  // namespace

TEST_CASE("a message is delivered when the store returns it") {
    TestHost host;
    ManualStore* store = nullptr;
    host.hub().set_store(std::make_unique<ManualStore>(store));
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
    store->answer();
    store->answer();
    bert.events();
    CHECK(anna.answer_to("/tag t1 hello") == "0 events");
    CHECK(bert.events().empty());
    store->deliver();
    CHECK(contains(anna.only_event(), "\"tag\":\"t1\""));
    CHECK(contains(bert.only_event(), "hello"));
    anna.send("/tag t2 lost");
    store->fail(1);
    const std::string error = anna.only_event();
    CHECK(contains(error, "\"code\":\"not_kept\""));
    CHECK(contains(error, "\"tag\":\"t2\""));
    CHECK(bert.events().empty());
}

TEST_CASE("a message of a user who has left the room in the meantime is acknowledged") {
    for (const bool was_member : {false, true}) {
        CAPTURE(was_member);
        TestHost host;
        ManualStore* store = nullptr;
        host.hub().set_store(std::make_unique<ManualStore>(store));
        ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert");
        if (was_member) store->answer();
        CHECK(anna.answer_to("/tag t1 hello") == "0 events");
        anna.send("/leave");
        anna.events();
        store->deliver();
        const std::string ack = anna.only_event();
        CHECK(contains(ack, "\"type\":\"ack\""));
        CHECK(contains(ack, "\"tag\":\"t1\""));
    }
}

TEST_CASE("a new member gets each entry once and in order, even if the store answers late") {
    // Each letter is a step: s says the next digit, t delivers it, j joins, a answers the oldest request.
    for (const std::string steps : {"ssttja", "sstjta", "ssjtta", "sjstta", "sjatst", "jsstta", "sstjat", "jastst",
                                    "ststja", "sjsatt", "ssjatt", "jssatt", "sjtsta", "sjtsat"}) {
        for (const bool somebody : {false, true}) {
            CAPTURE(steps);
            CAPTURE(somebody);
            TestHost host;
            ManualStore* store = nullptr;
            host.hub().set_store(std::make_unique<ManualStore>(store));
            std::optional<ChatClient<>> bert, newcomer;
            if (somebody) {
                bert.emplace(host, "name=Bert");
                store->answer();
            }
            int said = 0;
            for (const char step : steps) {
                if (step == 's') host.room("tea").publish(std::to_string(++said));
                else if (step == 't') store->deliver();
                else if (step == 'j') newcomer.emplace(host, "name=Anna");
                else store->answer();
            }
            while (!store->pages.empty()) store->answer();
            CHECK(texts(newcomer->events()) == "12");
            if (somebody) CHECK(texts(bert->events()) == "12");
        }
    }
}

TEST_CASE("on_leave() is called only after on_join(), which waits for the history") {
    TestHost host;
    ManualStore* store = nullptr;
    host.hub().set_store(std::make_unique<ManualStore>(store));
    ChatClient<Moderator> early(host, "name=Anna"), patient(host, "name=Bert");
    early.disconnect();
    while (!store->pages.empty()) store->answer();
    patient.disconnect();
    CHECK(early.handler.log == "connect;disconnect;");
    CHECK(patient.handler.log == "connect;join tea;leave tea;disconnect;");
}

TEST_CASE("a late event of presence does not add a user who has left or has another name") {
    struct LatePresence : ManualStore {
        using ManualStore::ManualStore;
        void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) override {
            ManualStore::attach(listener, std::move(mailbox));
            late_listener = &listener;
        }
        void forward(const ChatEntry& entry) override { forwarded.push_back(entry); }
        void since(const std::string&, std::optional<HistoryPosition>, std::size_t, PageCallback then) override {
            then({});
        }
        void deliver_forwarded() {
            for (const ChatEntry& entry : std::exchange(forwarded, {})) late_listener->on_entry(entry);
        }
        std::vector<ChatEntry> forwarded;
        Listener* late_listener = nullptr;
    };
    TestHost host;
    ManualStore* store = nullptr;
    host.hub().set_store(std::make_unique<LatePresence>(store));
    ChatClient<> anna(host, "name=Anna"), bert(host, "name=Bert"), carl(host, "name=Carl");
    bert.send("/nick Berta");
    carl.disconnect(CloseCode::normal);
    static_cast<LatePresence*>(store)->deliver_forwarded();
    anna.events();
    CHECK(names_in(anna.answer_to("/who")) == "Anna, Berta");
}

TEST_CASE("a history that cannot be read is a gap, and the chat continues") {
    struct Broken : ManualStore {
        using ManualStore::ManualStore;
        void since(const std::string&, std::optional<HistoryPosition>, std::size_t, PageCallback then) override {
            HistoryPage page;
            page.error = "disk image is malformed";
            then(page);
        }
    };
    TestHost host;
    ManualStore* store = nullptr;
    host.hub().set_store(std::make_unique<Broken>(store));
    ChatClient<> anna(host, "name=Anna&last=7");
    CHECK(contains(anna.events().at(2), "\"last\":7,\"gap\":true,"));  // the client can use this id later
    anna.send("hello");
    store->deliver();
    CHECK(contains(anna.only_event(), "hello"));
}

TEST_CASE("if the first read of a history fails, later members get the whole history, and the first one too") {
    struct Recovering : ManualStore {
        using ManualStore::ManualStore;
        void since(const std::string&, std::optional<HistoryPosition>, std::size_t, PageCallback then) override {
            HistoryPage page;
            page.epoch = "0123456789abcdef";
            if (++reads_ == 1) {
                page.error = "disk I/O error";
            } else {
                page.last_id = 2;
                for (const char* text : {"one", "two"}) page.entries.push_back(entry(text));
                page.entries[0].id = 1;
                page.entries[1].id = 2;
            }
            then(page);
        }
        int reads_ = 0;
    };
    TestHost host;
    ManualStore* store = nullptr;
    host.hub().set_store(std::make_unique<Recovering>(store));
    ChatClient<> anna(host, "name=Anna");
    CHECK(contains(anna.events().at(2), "\"gap\":true"));
    ChatClient<> bert(host, "name=Bert");
    CHECK(contains(bert.events().at(2), "\"last\":2,\"gap\":false"));
    const auto events = anna.events();
    REQUIRE(events.size() == 2);  // Bert joins, and the history
    CHECK(contains(events[1], "\"last\":2,\"gap\":true"));
    CHECK(texts(events) == "onetwo");
}

TEST_CASE("users of other servers are in the list, and their names are taken") {
    TestHost host;
    ManualStore* store = nullptr;
    host.hub().set_store(std::make_unique<ManualStore>(store));
    ChatClient<> anna(host, "name=Anna");
    store->answer();
    anna.events();
    store->deliver_remote(ChatEntry::Kind::join, "Far");
    CHECK(contains(anna.only_event(), "{\"type\":\"join\",\"room\":\"tea\",\"name\":\"Far\""));
    ChatClient<> other(host, "name=far");
    CHECK(contains(other.events().at(0), "\"name\":\"far-2\""));
    anna.events();
    store->deliver_remote(ChatEntry::Kind::rename, "Far", "Further");
    CHECK(contains(anna.only_event(), "\"old\":\"Far\",\"name\":\"Further\""));
    CHECK(names_of(host.room("tea").users()) == "Anna far-2 Further");
    store->deliver_remote(ChatEntry::Kind::leave, "Further");
    CHECK(contains(anna.only_event(), "\"leave\""));
    CHECK(names_of(host.room("tea").users()) == "Anna far-2");
    store->deliver_remote(ChatEntry::Kind::leave, "Anna");  // a user whom nobody knows
    CHECK(names_of(host.room("tea").users()) == "Anna far-2");
}

TEST_CASE("a user who leaves and returns in one presence window is in a list of that time") {
    TestServer server;
    server.route<ChatHandler>("/chat/{room}");
    const auto connect = [&](const std::string& name) {
        return server.connect("/chat/tea?name=" + name + "&key=secret-of-" + name);
    };
    TestClient anna = connect("Anna"), bert = connect("Bert");
    server.advance(10s);
    TestClient cleo = connect("Cleo");  // a window begins
    bert.close();
    TestClient dora = connect("Dora");
    const auto has = [](const std::vector<std::string>& events, const std::string& type) {
        return std::any_of(events.begin(), events.end(), [&](const std::string& event) {
            return contains(event, "\"type\":\"" + type + "\"") && contains(event, "\"name\":\"Bert\"");
        });
    };
    CHECK_FALSE(has(dora.received(), "users"));
    TestClient bert_again = connect("Bert");
    server.advance(1s);
    CHECK(has(dora.received(), "join"));
    CHECK_FALSE(has(anna.received(), "leave"));
}

TEST_CASE("set_store() after the first connection is an Error") {
    TestHost host;
    host.hub().set_store(MemoryHistory());
    ChatClient<> anna(host, "name=Anna");
    CHECK_THROWS_WITH_AS(host.hub().set_store(MemoryHistory()),
                         "ChatHub::set_store: a connection is open; set the store before the first connection", Error);
}

// ---- over sockets --------------------------------------------------------------------------------------------------

namespace {

// A server with a chat at "/chat/{room}".
struct Chat : RunningServer {
    explicit Chat(Duration grace = std::chrono::hours(1), std::size_t presence_list = 1000) {
        ChatHub::of(server).limits.grace = grace;
        ChatHub::of(server).limits.presence_list = presence_list;
        ChatHub::of(server).limits.presence_window = Duration::zero();
        ChatHub::of(server).limits.connection = ChatHub::of(server).limits.address = FloodRates();
        server.route<ChatHandler>("/chat/{room}");
        start();
    }
};

}  // namespace

TEST_CASE("a key among the subprotocols has the same effect as a key in the URL") {
    Chat chat;
    WsClient named_key(chat.port(), "/chat/tea?name=Anna&key=anna-secret");
    const std::string id = field_of(next_with(named_key, "\"hello\""), "user");
    const auto hello_for = [&](const std::string& offered) {
        RawClient client(chat.port());
        std::string request = handshake_request("127.0.0.1:" + std::to_string(chat.port()), "/chat/tea", WsClient::key);
        request.insert(request.size() - 2, "Sec-WebSocket-Protocol: " + offered + "\r\n");
        client.send(request);
        REQUIRE(client.read_until("\"hello\""));
        REQUIRE(client.read_until("\"history\",\"room\""));
        return client.received;
    };
    const std::string same = hello_for("wschat, wschat.key.YW5uYS1zZWNyZXQ");  // "anna-secret"
    CHECK(contains(same, "Sec-WebSocket-Protocol: wschat\r\n"));
    CHECK(contains(same, "\"user\":\"" + id + "\""));
    CHECK_FALSE(contains(same, "YW5uYS1zZWNyZXQ"));
    CHECK_FALSE(contains(hello_for("wschat, wschat.key.Ym90aGVyLXNlY3JldA"), "\"user\":\"" + id + "\",\"f"));
    CHECK_FALSE(contains(hello_for("wschat"), "\"name\":\"Anna\",\"user\":\"" + id + "\",\"f"));
    CHECK_FALSE(contains(hello_for("other"), "Sec-WebSocket-Protocol"));
    for (const std::string bad : {"A", "YW.5uYS1zZWNyZXQ", "YW5uYS1zZWNyZXQ!"})
        CHECK_FALSE(contains(hello_for("wschat, wschat.key." + bad), "\"name\":\"Anna\",\"user\":\"" + id + "\",\"f"));
}

TEST_CASE("a Room and a chat room of the same name have nothing in common") {
    struct Plain : WebSocketHandler {
        void open() override { room("tea").join(*this); }
        void on_message(const Message& message) override { room("tea").broadcast(message); }
    };
    RunningServer running;
    running.server.route<ChatHandler>("/chat/{room}");
    running.server.route<Plain>("/plain");
    running.start();
    running.on_loop([&] { ChatHub::of(running.server).room("tea").publish("kept"); });
    WsClient plain(running.port(), "/plain");
    plain.send("first");
    CHECK(plain.next() == "first");
    WsClient anna(running.port(), "/chat/tea?name=Anna");
    CHECK(contains(next_with(anna, "\"type\":\"history\""), "\"text\":\"kept\""));
    anna.send("hello");
    CHECK(contains(next_with(anna, "\"said\""), "hello"));
    plain.send("second");
    CHECK(plain.next() == "second");
    anna.send("again");
    CHECK(contains(anna.next().value_or(""), "again"));
    CHECK(running.metrics().rooms == 2);
    anna.close();
    anna.close_code();
    CHECK(running.eventually([&] { return running.server.metrics().rooms == 1; }));
    plain.send("third");
    CHECK(plain.next() == "third");
}

TEST_CASE("an exception of a hook is counted and is the cause of the close") {
    RunningServer running;
    running.server.route<ThrowingHandler>("/chat/{room}");
    running.start();
    std::uint64_t count = 0;
    for (const char* hook : {"on_join", "on_said"}) {
        CAPTURE(hook);
        WsClient client(running.port(), std::string("/chat/tea?name=") + hook);
        client.send("hello");
        CHECK(client.close_code() == CloseCode::internal_error);
        ++count;
        CHECK(running.eventually(
            [&] { return running.server.metrics().closed.at(CloseCause::handler_exception) == count; }));
        CHECK(running.metrics().handler_exceptions == count);
    }
}

TEST_CASE("an invalid ChatUser::about is a 500 and an exception in the log") {
    RunningServer running;
    std::string what;
    running.server.on_log([&](const LogEntry& entry) {
        for (const auto& [name, value] : entry.fields)
            if (name == "what") what = value;
    });
    running.server.route<AboutHandler>("/chat/{room}");
    running.start();
    const WsClient client(running.port(), "/chat/tea?about={");
    CHECK(contains(client.head, "HTTP/1.1 500 "));
    CHECK(running.on_loop([&] { return what; }) ==
          "ChatHandler::authenticate: ChatUser::about \"{\": it is not a JSON value in UTF-8 of at most 32 levels");
}

TEST_CASE("a page that is reloaded has not left, and one that closes with 1000 leaves immediately") {
    Chat chat;
    WsClient bert(chat.port(), "/chat/tea?name=Bert");
    next_with(bert, "\"type\":\"history\"");
    for (const CloseCode code : {CloseCode::going_away, CloseCode::normal}) {
        WsClient anna(chat.port(), "/chat/tea?name=Anna&key=anna-secret");
        next_with(anna, "\"type\":\"history\"");
        anna.close(code);
        CHECK(anna.close_code() == code);
        CHECK(anna.raw.read_to_end());  // so on_close() has run
    }
    std::string types;
    for (std::string event; !contains(event, "\"said\"");) {
        event = next_with(bert, "\"type\"");
        types += event.substr(9, event.find('"', 9) - 9) + " ";
        if (contains(event, "\"leave\"")) bert.send("now");
    }
    CHECK(types == "join leave said ");
}

TEST_CASE("members of a large room get the number of users, and the list when it is short again") {
    Chat chat(Duration::zero(), 2);
    WsClient anna(chat.port(), "/chat/tea?name=Anna");
    next_with(anna, "\"history\"");
    WsClient bert(chat.port(), "/chat/tea?name=Bert");
    next_with(anna, "\"join\"");
    std::vector<std::unique_ptr<WsClient>> others;
    for (int i = 0; i < 5; ++i) {
        others.push_back(std::make_unique<WsClient>(chat.port(), "/chat/tea?name=Other"));
        const std::string users = next_with(*others.back(), "\"type\":\"users\"");
        CHECK(field_of(users, "count") == std::to_string(3 + i));
        CHECK_FALSE(contains(users, "\"users\":["));
    }
    std::string heard = next_with(anna, "\"type\"");
    while (field_of(heard, "count") != "7") {
        CHECK(contains(heard, "\"type\":\"users\""));
        CHECK_FALSE(contains(heard, "Other"));
        heard = next_with(anna, "\"type\"");
    }
    others.clear();
    while (field_of(heard, "count") != "2") heard = next_with(anna, "\"type\":\"users\"");
    CHECK(names_in(heard) == "Anna, Bert");
}

TEST_CASE("a user who does not return in the grace period has left") {
    Chat chat(50ms);
    WsClient bert(chat.port(), "/chat/tea?name=Bert");
    for (int round = 0; round < 3; ++round) {
        {
            WsClient anna(chat.port(), "/chat/tea?name=Anna");
            next_with(bert, "\"join\"");
        }
        CHECK(contains(next_with(bert, "\"leave\""), "\"name\":\"Anna\""));
    }
    bert.close();
    bert.close_code();
    CHECK(chat.eventually([&] { return ChatHub::of(chat.server).room_count() == 0; }));
}

TEST_CASE("a message that is sent again with its tag arrives once, whenever the connection was lost") {
    enum Phase { before_the_send, before_the_answer, after_the_answer };
    Chat chat;
    WsClient bert(chat.port(), "/chat/tea?name=Bert");
    next_with(bert, "\"type\":\"history\"");
    for (const Phase phase : {before_the_send, before_the_answer, after_the_answer}) {
        for (int round = 0; round < 10; ++round) {
            CAPTURE(phase);
            const std::string tag = "t" + std::to_string(phase) + "-" + std::to_string(round),
                              address = "/chat/tea?name=Anna&key=anna-secret";
            std::string last;
            {
                WsClient anna(chat.port(), address);
                const std::string first = next_with(anna, "\"type\":\"history\"");
                last = position_of(first);
                if (phase != before_the_send) anna.send("/tag " + tag + " " + tag);
                if (phase == after_the_answer)
                    last = field_of(first, "epoch") + "-" + field_of(next_with(anna, "\"tag\""), "id");
                anna.raw.reset();
            }
            WsClient anna(chat.port(), address + "&last=" + last);
            const std::string history = next_with(anna, "\"type\":\"history\"");
            CHECK(contains(history, "\"gap\":false"));
            CHECK((!contains(history, tag) || phase == before_the_answer));
            anna.send("/tag " + tag + " " + tag);
            const std::string answer = next_with(anna, "\"tag\":\"" + tag + "\"");
            CHECK((phase != after_the_answer || contains(answer, "\"ack\"")));
            bert.send("end of " + tag);
            int copies = 0;
            for (std::string event; !contains(event, "end of");) {
                event = next_with(bert, "\"said\"");
                if (contains(event, "\"text\":\"" + tag + "\"")) ++copies;
            }
            CHECK(copies == 1);
        }
    }
}

TEST_CASE("five hundred clients that return at once get the messages that they missed, and others notice nothing") {
    rlimit descriptors{};
    ::getrlimit(RLIMIT_NOFILE, &descriptors);
    descriptors.rlim_cur = descriptors.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &descriptors);
    Chat chat;
    WsClient bert(chat.port(), "/chat/tea?name=Bert");
    const std::string last = position_of(next_with(bert, "\"type\":\"history\""));
    const auto all_come = [&] {
        std::vector<std::unique_ptr<RawClient>> clients;
        for (int i = 0; i < 500; ++i) {
            clients.push_back(std::make_unique<RawClient>(chat.port()));
            const std::string target = "/chat/tea?name=user&key=secret-" + std::to_string(i) + "&last=" + last;
            clients.back()->send(handshake_request("127.0.0.1:" + std::to_string(chat.port()), target, WsClient::key));
        }
        for (const auto& client : clients) REQUIRE(client->read_until("\"history\",\"room\":\"tea\""));
        return clients;
    };
    auto clients = all_come();
    for (int i = 0; i < 500; ++i) next_with(bert, "\"join\"");
    for (const auto& client : clients) client->reset();
    for (int i = 0; i < 20; ++i) bert.send("missed " + std::to_string(i) + ".");
    for (int i = 0; i < 20; ++i) next_with(bert, "\"said\"");
    REQUIRE(chat.eventually([&] { return chat.server.metrics().websockets_open == 1; }));

    clients = all_come();
    bert.send("welcome back");
    CHECK(contains(next_with(bert, "\"type\""), "welcome back"));  // it got no "leave" and no "join"
    for (const auto& client : clients) {
        REQUIRE(client->read_until("welcome back"));
        const std::string& got = client->received;
        CHECK(contains(got, "\"gap\":false"));
        std::size_t at = 0;
        for (int i = 0; i < 20; ++i) {
            const std::string text = "missed " + std::to_string(i) + ".";
            at = got.find(text, at);
            REQUIRE(at != std::string::npos);
            CHECK(got.find(text, at + 1) == std::string::npos);
        }
    }
}

TEST_SUITE_END();
