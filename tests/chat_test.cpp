// section 15: presence, history, floods and commands without a socket; what becomes of connections, with them.
#define WSCHAT_CHAT 1
#include "support.hpp"

#include <sys/resource.h>
#include <algorithm>

namespace {

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::Client;
using test::contains;
using test::next_with;
using test::RawClient;
using test::RunningServer;

// ---- a chat without sockets ----------------------------------------------------------------------------------------

// Stands in for the sessions of a server that never runs: its time stands still, and what handlers send stays here.
class Desk final : public HandlerHost {
public:
    void mark_dirty() override {}
    void flush() override {}
    std::size_t offer(const std::string_view*, std::size_t) override { return 0; }
    void set_nodelay(bool) override {}
    void callback_failed(const char*, const char*) override {}
    bool origin_allowed(std::string_view) const override { return true; }
    Time now() const override { return const_cast<Server&>(server_).loop().now(); }
    bool on_loop_thread() const override { return true; }
    Rooms& rooms() override { return server_.rooms(); }
    Loop& loop() override { return server_.loop(); }
    Server& server() override { return server_; }
    std::shared_ptr<Mailbox> mailbox() override { return server_.loop().mailbox(); }

    ChatHub& hub() { return ChatHub::of(server_); }
    ChatRoom& room(std::string_view name) { return hub().room(name); }

private:
    ServerOptions quiet() {
        ServerOptions options;
        options.handle_signals = false;
        return options;
    }
    Server server_{quiet()};
};

// A client at the desk: what it sends is handled at once, and what it gets is read by a connection of the other side.
template <class Handler = ChatHandler>
class Seat {
public:
    explicit Seat(Desk& desk, const std::string& query = "", const std::string& room = "tea",
                  const std::string& address = "127.0.0.1")
        : desk_(desk) {
        RequestParser parser(limits_);
        std::size_t consumed = 0;
        parser.feed("GET /chat?" + query + " HTTP/1.1\r\nHost: x\r\n\r\n", consumed);
        HandlerCore& core = HandlerAccess::core(handler);
        core.host = &desk;
        core.request = parser.take_request();
        RequestAccess::set_params(core.request, {{"room", room}});
        core.remote_address = address;
        refusal = handler.prepare(core.request);
        if (refusal) return;
        core.connection.open(Role::server, limits_, arena_, desk.now());
        peer_.open(Role::client, limits_, arena_, desk.now(), &test::test_mask);
        opened_ = true;
        handler.open();
    }
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;
    ~Seat() { leave(); }

    // Answers the events that have come since.
    std::vector<std::string> say(std::string_view line, Opcode opcode = Opcode::text) {
        if (handler.is_open()) handler.on_message(Message(line, opcode));
        return events();
    }
    std::vector<std::string> events() {
        std::vector<std::string> list;
        std::string bytes = test::take_output(HandlerAccess::core(handler).connection);
        peer_.receive(bytes.data(), bytes.size(), desk_.now());
        for (Event event = peer_.next_event(); event.kind != Event::Kind::none; event = peer_.next_event()) {
            if (event.kind == Event::Kind::close) break;
            list.emplace_back(event.message.text());
        }
        return list;
    }
    // The only event that has come since.
    std::string one() {
        const auto list = events();
        return list.size() == 1 ? list[0] : std::to_string(list.size()) + " events";
    }
    std::string only(std::string_view line) {
        events();
        const auto list = say(line);
        return list.size() == 1 ? list[0] : std::to_string(list.size()) + " events";
    }
    // As if the connection had ended without a Close frame, or with one of that code.
    void leave(CloseCode code = CloseCode::abnormal) {
        if (!std::exchange(opened_, false)) return;
        Connection& connection = HandlerAccess::core(handler).connection;
        if (code == CloseCode::abnormal) connection.receive_eof("lost");
        else connection.fail(code, "", CloseCause::peer);
        wschat::detail::RoomsAccess::remove_from_all(desk_.rooms(), handler);
        handler.on_close();
    }
    CloseCode close_code() {
        events();
        return peer_.close_code();
    }

    Handler handler;
    std::optional<Response> refusal;

private:
    Desk& desk_;
    Limits limits_;
    SendArena arena_;
    Connection peer_;
    bool opened_ = false;
};

std::string names_of(const Presence& presence) {
    std::string all;
    for (const ChatUser& user : presence.users()) (all += all.empty() ? "" : " ") += user.name;
    return all;
}

ChatUser named(const std::string& name) { return ChatUser{name}; }

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
std::string told(const HistoryPage& page) {
    std::string all;
    for (const ChatEntry& each : page.entries) (all += all.empty() ? "" : " ") += std::to_string(each.id);
    return page.gap ? all + (all.empty() ? "gap" : " gap") : all;
}

const Time start{1000s};

}  // namespace

TEST_SUITE_BEGIN("chat");

// ---- lines and names -------------------------------------------------------------------------------------------------

TEST_CASE("a line that begins with one slash is a command, anything else is said") {
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
    CHECK(ChatLine::good_tag("a"));
    CHECK(ChatLine::good_tag(std::string(64, '~')));
    for (const std::string& bad :
         {std::string(), std::string(65, 'a'), std::string("a b"), std::string("\xC3\xBC"), std::string("\x7F")})
        CHECK_FALSE(ChatLine::good_tag(bad));
}

TEST_CASE("a name is visible text without spaces at its ends") {
    for (const std::string_view good :
         {"a", "Anna", "Gr\xC3\xBCner Tee & mehr", "<b>", "/x", "\xF0\x9F\x8D\xB5", "\xD7\x90"}) {
        CAPTURE(good);
        CHECK(text::good_name(good, 40));
    }
    for (const std::string_view bad :
         {"", " a", "a ", "a  b", "a\tb", "a\nb", "\x7F", "\xC2\x80", "\xC2\xAD", "\xE2\x80\x8B", "\xE2\x80\xAE",
          "\xE2\x81\xA0", "\xEF\xBB\xBF", "\xD8\x9C", "\xF3\xA0\x80\xA0", "\xFF", "\xC3"}) {
        CAPTURE(test::to_hex(bad));
        CHECK_FALSE(text::good_name(bad, 40));
    }
    // Spaces, fillers and selectors, with which a name looks like another one: U+00A0, 034F, 1160, 180E, 2003, 202F,
    // 2800, 3000, 3164, FE0F, FFA0, FFF9, E0100.
    for (const std::string hidden :
         {"\xC2\xA0", "\xCD\x8F", "\xE1\x85\xA0", "\xE1\xA0\x8E", "\xE2\x80\x83", "\xE2\x80\xAF", "\xE2\xA0\x80",
          "\xE3\x80\x80", "\xE3\x85\xA4", "\xEF\xB8\x8F", "\xEF\xBE\xA0", "\xEF\xBF\xB9", "\xF3\xA0\x84\x80"}) {
        CAPTURE(test::to_hex(hidden));
        CHECK_FALSE(text::good_name("Anna" + hidden, 40));
        CHECK(text::good_text("Anna" + hidden));
    }
    CHECK(text::good_name(std::string(40, 'x'), 40));
    CHECK_FALSE(text::good_name(std::string(41, 'x'), 40));
}

TEST_CASE("a message may hold anything but control characters, line ends and tabs aside") {
    for (const std::string_view good :
         {"", "a\nb\tc", "\xE2\x80\xAE", "\xC3\xBC", "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x9A\x80"})
        CHECK(text::good_text(good));
    for (const std::string_view bad :
         {std::string_view("\0", 1), std::string_view("\x1B[2J"), std::string_view("\r"), std::string_view("\x7F"),
          std::string_view("\xC2\x9B"), std::string_view("\xFF")}) {
        CAPTURE(test::to_hex(bad));
        CHECK_FALSE(text::good_text(bad));
    }
}

TEST_CASE("an event is one JSON object in the order of its fields") {
    ChatEvent event("x\"y");
    event.add("n", 1).add_json("list", "[2]").add_unless_empty("no", "").add_unless_empty("text", "\xC3\xBC\n");
    CHECK(event.dump() == "{\"type\":\"x\\\"y\",\"n\":1,\"list\":[2],\"text\":\"\xC3\xBC\\n\"}");
}

// ---- floods ----------------------------------------------------------------------------------------------------------

TEST_CASE("a meter counts messages and bytes") {
    FloodMeter meter;
    const FloodRates rates{{1, 2}, {1, 10}};
    CHECK(meter.take(5, rates, start));
    CHECK(meter.take(5, rates, start));
    CHECK_FALSE(meter.take(0, rates, start));
    FloodMeter bytes;
    CHECK(bytes.take(10, rates, start));
    CHECK_FALSE(bytes.take(1, rates, start));
    CHECK(bytes.full(start + 10s));
}

TEST_CASE("a flood is told, then dropped, then ended, and ten quiet seconds are forgiven") {
    using Verdict = FloodJudge::Verdict;
    FloodJudge judge;
    CHECK(judge.judge(true, 3, start) == Verdict::pass);
    CHECK(judge.judge(false, 3, start) == Verdict::tell);
    CHECK(judge.judge(false, 3, start) == Verdict::drop);
    CHECK(judge.judge(true, 3, start + 1s) == Verdict::pass);
    CHECK(judge.judge(false, 3, start + 1s) == Verdict::tell);
    CHECK(judge.judge(false, 3, start + 1s) == Verdict::close);
    FloodJudge patient;
    for (int i = 0; i < 3; ++i) patient.judge(false, 3, start);
    CHECK(patient.judge(false, 3, start + 10s) == Verdict::drop);
    CHECK(patient.judge(false, 3, start + 10s) == Verdict::drop);
    CHECK(patient.judge(false, 3, start + 10s) == Verdict::drop);
    CHECK(patient.judge(false, 3, start + 10s) == Verdict::close);
}

// ---- presence --------------------------------------------------------------------------------------------------------

TEST_CASE("a user comes with the first connection and leaves with the last") {
    Presence presence;
    ChatHandler one, two;
    const auto first = presence.arrive(named("Anna"), "key", &one),
               second = presence.arrive(named("Anna"), "key", &two);
    CHECK(first.first);
    CHECK_FALSE(second.first);
    CHECK(&first.user == &second.user);
    CHECK_FALSE(presence.depart(first.user, &one, start, true));
    CHECK(names_of(presence) == "Anna");
    CHECK(presence.depart(first.user, &two, start, true));
    CHECK(presence.empty());
}

TEST_CASE("who comes back within the grace has never left, and afterwards has") {
    Presence presence;
    ChatHandler one;
    Time next;
    const auto come = [&](const std::string& key) { return presence.arrive(named("Anna"), key, &one); };
    for (const std::string key : {"", "key"}) {
        CAPTURE(key);
        CHECK_FALSE(presence.depart(come(key).user, &one, start + 3s, false));
        CHECK(presence.expire(start + 2999ms, next).empty());
        CHECK((next == start + 3s));
        CHECK_FALSE(come(key).first);
        CHECK(presence.expire(start + 1h, next).empty());
        CHECK((next == (Time::max)()));
        presence.depart(*presence.find("Anna"), &one, start + 3s, false);
        CHECK(presence.expire(start + 3s, next) == std::vector<std::string>{"Anna"});
        CHECK(presence.empty());
        CHECK(presence.with_identity(key) == nullptr);
    }
}

TEST_CASE("a name that is taken gets the first number that is free") {
    Presence presence;
    ChatHandler connections[4];
    CHECK(presence.arrive(named("Anna"), "", &connections[0]).user.who.name == "Anna");
    CHECK(presence.arrive(named("Anna"), "", &connections[1]).user.who.name == "Anna-2");
    CHECK(presence.arrive(named("anna"), "", &connections[2]).user.who.name == "anna-3");
    CHECK(presence.arrive(named("Anna-2"), "", &connections[3]).user.who.name == "Anna-2-2");
    std::vector<ChatHandler> guests(300);
    for (ChatHandler& guest : guests) presence.arrive(named("guest"), "", &guest);
    CHECK(presence.size() == 304);
}

TEST_CASE("a name that is made free is no longer than a name may be, and whole characters") {
    Presence presence;
    ChatHandler connections[3];
    std::string name;
    for (int i = 0; i < 20; ++i) name += "\xC3\xBC";
    presence.arrive(named(name), "", &connections[0]);
    CHECK(presence.arrive(named(name), "", &connections[1]).user.who.name == name.substr(0, 38) + "-2");
    CHECK(text::good_name(presence.free_name(name), 40));
    presence.max_name = 60;
    CHECK(presence.free_name(name) == name + "-2");
}

TEST_CASE("nobody takes over the name of somebody who is away with a key, or is here") {
    Presence presence;
    ChatHandler one, two, three;
    presence.depart(presence.arrive(named("Anna"), "key", &one).user, &one, start, false);
    CHECK(presence.arrive(named("Anna"), "", &two).user.who.name == "Anna-2");
    CHECK(presence.arrive(named("Anna"), "another key", &three).user.who.name == "Anna-3");
    CHECK(presence.arrive(named("Berta"), "key", &one).user.who.name == "Anna");
}

TEST_CASE("names are changed to free ones, whatever their case") {
    Presence presence;
    ChatHandler one, two;
    Presence::User& anna = presence.arrive(named("Anna"), "", &one).user;
    presence.arrive(named("Bert"), "", &two);
    CHECK_FALSE(presence.rename(anna, "BERT"));
    CHECK(presence.rename(anna, "ANNA"));
    CHECK(presence.rename(anna, "Carl"));
    CHECK(names_of(presence) == "Bert Carl");
    CHECK(presence.find("anna") == nullptr);
    CHECK(presence.find("carl") == &anna);
}

TEST_CASE("a user is found at the beginning of a text by the longest name") {
    Presence presence;
    ChatHandler connections[2];
    presence.arrive(named("Anna"), "", &connections[0]);
    presence.arrive(named("Anna Maria"), "", &connections[1]);
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
        const Presence::User* user = presence.cut_user(text);
        REQUIRE(user != nullptr);
        CHECK(user->who.name == row.name);
        CHECK(text == row.rest);
    }
    for (std::string_view nobody : {"", " ", "Annabel hello", "hello Anna"})
        CHECK(presence.cut_user(nobody) == nullptr);
}

TEST_CASE("a user is looked for in no more of a text than a name can be") {
    Presence presence;
    ChatHandler connection;
    Presence::User& anna = presence.arrive(named("Anna"), "", &connection).user;
    const std::string spaces(16 * 1024 * 1024, ' ');  // for years, if each were tried
    std::string_view text = spaces;
    CHECK(presence.cut_user(text) == nullptr);
    presence.rename(anna, "Anna Maria Magdalena");
    const std::string line = "anna maria magdalena" + spaces;
    text = line;
    CHECK(presence.cut_user(text) == &anna);
    CHECK(text.size() == spaces.size() - 1);
}

// ---- history ---------------------------------------------------------------------------------------------------------

TEST_CASE("a history answers what is newer than an id, in order, and says whether something is missing") {
    HistoryRing ring(100);
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
        {102, 50, "104 105 106 107 108 gap"},  // 103 is forgotten
        {104, 2, "107 108 gap"},               // 105 and 106 are over the limit
        {0, 50, "104 105 106 107 108 gap"},    // of another history
        {109, 50, "104 105 106 107 108 gap"},  // of another history too
        {108, 0, ""},
        {107, 0, "gap"},
    };
    for (const auto& row : table) {
        CAPTURE(row.id.value_or(0));
        CAPTURE(row.limit);
        const HistoryPage page = ring.since(row.id, row.limit, limits, start);
        CHECK(told(page) == row.answer);
        CHECK(page.last == 108);
    }
}

TEST_CASE("a history that is empty has an id to begin with") {
    HistoryRing ring(100);
    const HistoryPage page = ring.since(std::nullopt, 50, HistoryLimits(), start);
    CHECK(page.last == 100);
    CHECK(told(page) == "");
    CHECK(told(ring.since(page.last, 50, HistoryLimits(), start)) == "");
    ring.append(entry("first"), HistoryLimits(), start);
    CHECK(told(ring.since(page.last, 50, HistoryLimits(), start)) == "101");
}

TEST_CASE("a history is bounded by count, bytes and age") {
    HistoryLimits count, bytes, age;
    count.max_entries = 10;
    bytes.max_bytes = 10'000;
    age.max_age = 10s;
    HistoryRing by_count(0), by_bytes(0), by_age(0);
    for (int i = 0; i < 1000; ++i) {
        by_count.append(entry("x", std::to_string(i)), count, start);
        by_bytes.append(entry(std::string(500, 'x'), std::to_string(i)), bytes, start);
        by_age.append(entry("x", std::to_string(i)), age, start + i * 1s);
    }
    CHECK(by_count.size() == 10);
    CHECK(by_bytes.bytes() <= 10'000);
    CHECK(by_bytes.size() > 5);
    CHECK(by_age.size() == 10);
    CHECK(told(by_age.since(999, 50, age, start + 1h)) == "gap");
    CHECK(by_age.size() == 0);
    CHECK(by_age.bytes() == 0);
}

TEST_CASE("a tag is known to its author for as long as its message is kept") {
    HistoryRing ring(0);
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

// A history in memory, and what of it there is.
struct Archive final : private ChatStore::Listener {
    explicit Archive(const HistoryLimits& limits) : history(limits) { history.attach(*this, nullptr); }

    std::uint64_t say(const std::string& room, const std::string& text = "x") {
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

private:
    void on_entry(const ChatEntry& entry) override { last = entry.id; }
    void on_repeat(const ChatEntry&) override {}
    void on_failure(const ChatEntry&, const std::string&) override {}
    std::uint64_t last = 0;
};

}  // namespace

TEST_CASE("of too many rooms the one that was silent longest is forgotten, and looking on makes none forgotten") {
    HistoryLimits limits;
    limits.max_rooms = 2;
    Archive archive(limits);
    const std::uint64_t before = archive.say("one");
    archive.say("two");
    for (int i = 0; i < 10; ++i) CHECK(archive.size("visited " + std::to_string(i)) == 0);
    CHECK(archive.size("one") == 1);
    archive.say("three");
    CHECK(archive.size("one") == 0);
    CHECK(archive.size("two") == 1);
    CHECK(archive.say("one") > before);  // ids never begin anew
}

TEST_CASE("all rooms together keep so many bytes, and what is too much costs the room that was silent longest") {
    HistoryLimits limits;
    limits.max_total_bytes = 5000;
    Archive archive(limits);
    archive.say("one", std::string(1500, 'x'));
    archive.say("two", std::string(1500, 'x'));
    archive.say("one");
    CHECK(archive.size("two") == 1);
    archive.say("three", std::string(1500, 'x'));
    CHECK(archive.size("two") == 0);
    CHECK(archive.size("one") == 2);
    CHECK(archive.size("three") == 1);
    archive.say("four", std::string(6000, 'x'));  // what was said last is kept
    CHECK(archive.size("one") + archive.size("three") == 0);
    CHECK(archive.size("four") == 1);
}

// ---- the handler without sockets -------------------------------------------------------------------------------------

TEST_CASE("the first events are hello, users and history") {
    Desk desk;
    Seat<> anna(desk, "name=Anna");
    const auto events = anna.events();
    REQUIRE(events.size() == 3);
    CHECK(contains(
        events[0],
        "{\"type\":\"hello\",\"version\":2,\"server\":\"wschat\",\"room\":\"tea\",\"name\":\"Anna\",\"features\":["));
    CHECK(events[1] == "{\"type\":\"users\",\"room\":\"tea\",\"users\":[\"Anna\"]}");
    CHECK(contains(events[2], "{\"type\":\"history\",\"room\":\"tea\",\"gap\":false,\"last\":"));
    CHECK(contains(events[2], "\"entries\":[]"));
}

TEST_CASE("what is said reaches all, once, with an id that grows") {
    Desk desk;
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert"), other(desk, "name=Carl", "coffee");
    for (Seat<>* seat : {&anna, &bert, &other}) seat->events();
    const std::string first = anna.only("hello"), second = anna.only("{\"type\":\"junk\"}");
    CHECK(contains(first, "\"type\":\"said\",\"room\":\"tea\",\"id\":"));
    CHECK(contains(first, "\"name\":\"Anna\",\"text\":\"hello\",\"time\":"));
    CHECK(contains(second, "\"text\":\"{\\\"type\\\":\\\"junk\\\"}\""));
    CHECK(bert.events() == std::vector<std::string>{first, second});
    CHECK(other.events().empty());
    const auto id = [](const std::string& event) {
        return std::strtoull(event.c_str() + event.find("\"id\":") + 5, nullptr, 10);
    };
    CHECK(id(second) == id(first) + 1);
}

TEST_CASE("a tag comes back to its sender alone, and what is sent with it again is acknowledged and not kept twice") {
    Desk desk;
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    anna.events();
    bert.events();
    const std::string said = anna.only("/tag t1 hello");
    CHECK(contains(said, "\"text\":\"hello\""));
    CHECK(contains(said, "\"tag\":\"t1\"}"));
    CHECK_FALSE(contains(bert.one(), "tag"));
    const std::string ack = anna.only("/tag t1 hello");
    CHECK(contains(ack, "{\"type\":\"ack\",\"room\":\"tea\",\"tag\":\"t1\",\"id\":"));
    CHECK(bert.events().empty());
    CHECK(contains(bert.only("/tag t1 mine"), "\"type\":\"said\""));  // another author's tag is another tag
    CHECK(contains(anna.only("/tag t2 /nick Bert"), "\"code\":\"name_taken\""));
    CHECK(contains(anna.only("/tag t2 /dance"), "\"tag\":\"t2\""));
    CHECK(contains(anna.only("hello"), "\"text\":\"hello\""));
}

TEST_CASE("bad input is answered with a code and a sentence to the sender alone, and the connection stays") {
    const struct {
        std::string line, code;
    } table[] = {
        {"", "empty"},
        {"/tag t1", "empty"},
        {"/me ", "empty"},
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
    Desk desk;
    desk.hub().limits.connection = desk.hub().limits.address = FloodRates();
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    bert.events();
    for (const auto& row : table) {
        CAPTURE(row.line.substr(0, 80));
        const std::string event = anna.only(row.line);
        if (row.line == "/tag  hello") {
            CHECK(contains(event, "\"text\":\"hello\""));  // an empty tag is none
            bert.events();
            continue;
        }
        CHECK(contains(event, "{\"type\":\"error\",\"code\":\"" + row.code + "\",\"text\":\""));
        CHECK(anna.handler.is_open());
        CHECK(bert.events().empty());
    }
    anna.events();
    CHECK(contains(anna.say("bytes", Opcode::binary).at(0), "\"code\":\"bad_line\""));
    CHECK(contains(anna.only(std::string(16 * 1024, 'x')), "\"type\":\"said\""));
}

TEST_CASE("a name that is no name is answered with an error, and the visitor is a guest") {
    Desk desk;
    Seat<> bad(desk, "name=%09"), none(desk), empty(desk, "name=");
    const auto events = bad.events();
    REQUIRE(events.size() > 2);
    CHECK(contains(events[0], "\"name\":\"guest\""));
    CHECK(contains(events[1], "\"code\":\"name_bad\""));
    CHECK(contains(none.events().at(0), "\"name\":\"guest-2\""));
    CHECK(empty.events().size() == 3);
}

TEST_CASE("a room that has no name is answered with an error, and the visitor is in the lobby") {
    Desk desk;
    Seat<> lost(desk, "name=Anna", " ");
    const auto events = lost.events();
    REQUIRE(events.size() > 2);
    CHECK(contains(events[0], "\"room\":\"lobby\""));
    CHECK(contains(events[1], "\"code\":\"room_bad\""));
}

TEST_CASE("/me is told as something done") {
    Desk desk;
    Seat<> anna(desk, "name=Anna");
    const std::string event = anna.only("/me waves");
    CHECK(contains(event, "\"text\":\"waves\""));
    CHECK(contains(event, "\"me\":true"));
}

TEST_CASE("/nick tells everybody, and /who and the roster know it") {
    Desk desk;
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    bert.events();
    CHECK(contains(anna.only("/nick Carl"),
                   "{\"type\":\"nick\",\"room\":\"tea\",\"old\":\"Anna\",\"name\":\"Carl\",\"time\":"));
    CHECK(contains(bert.one(), "\"name\":\"Carl\""));
    CHECK(contains(bert.only("/who"), "[\"Bert\",\"Carl\"]"));
    CHECK(contains(bert.only("/nick carl"), "That name is taken; carl-2 is free."));
    CHECK(anna.only("/nick Carl") == "0 events");
}

TEST_CASE("a private message reaches all connections of both, and nobody else") {
    Desk desk;
    Seat<> anna(desk, "name=Anna&key=anna-secret"), tab(desk, "name=Anna&key=anna-secret");
    Seat<> bert(desk, "name=Bert&key=bert-secret"), tab2(desk, "name=Bert&key=bert-secret"), carl(desk, "name=Carl");
    for (Seat<>* seat : {&anna, &tab, &bert, &tab2, &carl}) seat->events();
    const std::string copy = anna.only("/tag t1 /msg Bert psst");
    CHECK(contains(
        copy, "{\"type\":\"private\",\"room\":\"tea\",\"name\":\"Anna\",\"to\":\"Bert\",\"text\":\"psst\",\"time\":"));
    CHECK(contains(copy, "\"tag\":\"t1\"}"));
    for (Seat<>* seat : {&tab, &bert, &tab2}) {
        const std::string event = seat->one();
        CHECK(contains(event, "\"text\":\"psst\""));
        CHECK_FALSE(contains(event, "tag"));
    }
    CHECK(carl.events().empty());
    CHECK(contains(anna.only("/tag t1 /msg Bert psst"), "{\"type\":\"ack\",\"room\":\"tea\",\"tag\":\"t1\"}"));
    CHECK(bert.events().empty());
    Seat<> late(desk, "name=Dora");
    CHECK_FALSE(contains(late.events().at(2), "psst"));  // it is not in the history
}

TEST_CASE("a private message to somebody whose connection is lost is answered with an error") {
    Desk desk;
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    bert.leave();
    CHECK(contains(anna.only("/msg Bert psst"), "\"code\":\"user_away\""));
}

TEST_CASE("typing is told to the others, and is not kept") {
    Desk desk;
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    bert.events();
    CHECK(anna.only("/typing") == "0 events");
    CHECK(bert.one() == "{\"type\":\"typing\",\"room\":\"tea\",\"name\":\"Anna\"}");
    anna.say("/typing stop");
    CHECK(bert.one() == "{\"type\":\"typing\",\"room\":\"tea\",\"name\":\"Anna\",\"stop\":true}");
}

TEST_CASE("/join speaks in another room, and its events name their room") {
    Desk desk;
    Seat<> anna(desk, "name=Anna"), carl(desk, "name=Carl", "coffee");
    anna.events();
    const auto events = anna.say("/join coffee");
    REQUIRE(events.size() == 3);
    CHECK(events[0] == "{\"type\":\"room\",\"room\":\"coffee\",\"name\":\"Anna\"}");
    CHECK(contains(events[1], "[\"Anna\",\"Carl\"]"));
    CHECK(contains(events[2], "\"history\",\"room\":\"coffee\""));
    carl.events();
    anna.say("black, please");
    CHECK(contains(carl.one(), "\"room\":\"coffee\""));
    CHECK(contains(anna.only("/rooms"), "[{\"room\":\"coffee\",\"users\":2},{\"room\":\"tea\",\"users\":1}]"));
    CHECK(anna.only("/join tea") == "{\"type\":\"room\",\"room\":\"tea\",\"name\":\"Anna\"}");
    CHECK(anna.only("/leave coffee") == "{\"type\":\"room\",\"room\":\"tea\",\"name\":\"Anna\"}");
    CHECK(contains(carl.one(), "{\"type\":\"leave\",\"room\":\"coffee\",\"name\":\"Anna\""));
    CHECK(contains(anna.only("/leave"), "{\"type\":\"room\",\"room\":null"));
    CHECK(contains(anna.only("hello?"), "\"code\":\"no_room\""));
    for (const std::string line : {"/me x", "/msg Anna x", "/who", "/nick x", "/since 0", "/leave"}) {
        CAPTURE(line);
        CHECK(contains(anna.only(line), "\"type\":\"error\""));
    }
    CHECK(anna.only("/typing") == "0 events");
}

TEST_CASE("rooms are limited for a connection and in all") {
    Desk desk;
    desk.hub().limits.max_rooms_per_connection = 2;
    desk.hub().limits.max_rooms = 3;
    Seat<> anna(desk, "name=Anna");
    CHECK(anna.say("/join two").size() == 6);
    CHECK(contains(anna.only("/join three"), "\"code\":\"room_limit\""));
    Seat<> bert(desk, "name=Bert", "three"), carl(desk, "name=Carl", "four");
    CHECK(bert.events().size() == 3);
    const auto events = carl.events();
    REQUIRE(events.size() == 2);
    CHECK(contains(events[0], "\"room\":null"));
    CHECK(contains(events[1], "\"code\":\"room_limit\""));
    CHECK(carl.say("/join tea").size() == 3);
}

TEST_CASE("two connections with one key are one user: one join, one leave, one name") {
    Desk desk;
    Seat<> bert(desk, "name=Bert");
    bert.events();
    Seat<> anna(desk, "name=Anna&key=anna-secret"), tab(desk, "name=Other&key=anna-secret");
    CHECK(contains(tab.events().at(0), "\"name\":\"Anna\""));
    CHECK(contains(bert.one(), "\"type\":\"join\""));
    CHECK(names_of(desk.room("tea").presence()) == "Anna Bert");
    anna.leave(CloseCode::normal);
    CHECK(bert.events().empty());
    tab.leave(CloseCode::normal);
    CHECK(contains(bert.one(), "{\"type\":\"leave\",\"room\":\"tea\",\"name\":\"Anna\""));
}

TEST_CASE("a lost connection is no leave within the grace") {
    Desk desk;
    Seat<> bert(desk, "name=Bert");
    bert.events();
    {
        Seat<> anna(desk, "name=Anna&key=anna-secret");
        CHECK(contains(bert.one(), "\"join\""));
    }
    CHECK(names_of(desk.room("tea").presence()) == "Anna Bert");
    Seat<> again(desk, "name=Anna&key=anna-secret");
    CHECK(contains(again.events().at(0), "\"name\":\"Anna\""));
    CHECK(bert.events().empty());
}

TEST_CASE("who comes back with the last id gets what was missed, in order, and own messages with their tags") {
    Desk desk;
    Seat<> bert(desk, "name=Bert");
    std::string last;
    {
        Seat<> anna(desk, "name=Anna&key=anna-secret");
        const std::string event = anna.only("/tag t1 before");
        last = event.substr(event.find("\"id\":") + 5, 16);
        anna.say("/tag t2 kept, but not seen");
    }
    bert.say("one");
    bert.say("two");
    Seat<> again(desk, "name=Anna&key=anna-secret&last=" + last);
    const std::string history = again.events().at(2);
    CHECK(contains(history, "\"gap\":false"));
    CHECK_FALSE(contains(history, "before"));
    const std::size_t own = history.find("kept, but not seen"), one = history.find("\"one\""),
                      two = history.find("\"two\"");
    CHECK(own < one);
    CHECK(one < two);
    CHECK(two != std::string::npos);
    CHECK(contains(history, "\"tag\":\"t2\""));
    CHECK_FALSE(contains(bert.only("/since " + last), "\"tag\":\"t2\""));
}

TEST_CASE("names, rooms and tags may be as long as their limits, and one byte more is an error") {
    const struct {
        std::string command, code;
        std::size_t limit;
    } table[] = {{"/nick ", "name_bad", 40}, {"/join ", "room_bad", 64}, {"/tag ", "bad_tag", 64}};
    for (const auto& row : table)
        for (const std::size_t size : {row.limit - 1, row.limit, row.limit + 1}) {
            CAPTURE(row.command);
            CAPTURE(size);
            Desk desk;
            Seat<> anna(desk, "name=Anna");
            anna.events();
            const auto events =
                anna.say(row.command + std::string(size, 'x') + (row.command == "/tag " ? " hello" : ""));
            REQUIRE_FALSE(events.empty());
            CHECK(contains(events[0], "\"code\":\"" + row.code + "\"") == (size > row.limit));
            CHECK(contains(events[0], "\"error\"") == (size > row.limit));
        }
}

TEST_CASE("who comes gets as much history as the limits say, and only who missed more has a gap") {
    for (const std::size_t missed : {2u, 3u, 4u}) {
        CAPTURE(missed);
        Desk desk;
        desk.hub().limits.history_on_join = desk.hub().limits.history_on_resume = 3;
        Seat<> bert(desk, "name=Bert");
        bert.events();
        const std::string event = bert.only("first"), last = event.substr(event.find("\"id\":") + 5, 16);
        for (std::size_t i = 0; i < missed; ++i) bert.say("missed");
        Seat<> back(desk, "name=Anna&last=" + last), fresh(desk, "name=Carl");
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

TEST_CASE("who was away for too long is told of a gap") {
    Desk desk;
    desk.hub().limits.history_on_resume = 3;
    Seat<> bert(desk, "name=Bert");
    bert.events();
    const std::string event = bert.only("first"), last = event.substr(event.find("\"id\":") + 5, 16);
    for (int i = 0; i < 4; ++i) bert.say("x");
    Seat<> anna(desk, "name=Anna&last=" + last), fresh(desk, "name=Carl"), other(desk, "name=Dora&last=17"),
        huge(desk, "last=99999999999999999999"), bad(desk, "last=x");
    CHECK(contains(anna.events().at(2), "\"gap\":true"));
    CHECK(contains(fresh.events().at(2), "\"gap\":false"));
    CHECK(contains(other.events().at(2), "\"gap\":true"));
    CHECK(contains(huge.events().at(2), "\"gap\":true"));
    CHECK(contains(bad.events().at(2), "\"gap\":false"));
}

TEST_CASE("an event with history has a bound in bytes, past which the older entries are left out") {
    Desk desk;
    desk.hub().limits.max_history_event = 2000;
    Seat<> bert(desk, "name=Bert");
    bert.events();
    const std::string event = bert.only("first"), last = event.substr(event.find("\"id\":") + 5, 16);
    for (int i = 0; i < 10; ++i) bert.say(std::string(500, 'a') + std::to_string(i));
    Seat<> anna(desk, "name=Anna&last=" + last);
    const std::string history = anna.events().at(2);
    CHECK(history.size() < 3000);
    CHECK(contains(history, "a9"));
    CHECK_FALSE(contains(history, "a0"));
    CHECK(contains(history, "\"gap\":true"));
}

TEST_CASE("publish() is kept, broadcast() is not, and both may come from the server itself") {
    Desk desk;
    Seat<> anna(desk, "name=Anna");
    anna.events();
    desk.room("tea").publish("The kettle is on.");
    desk.room("tea").broadcast("Mind the step.", "Butler");
    const auto events = anna.events();
    REQUIRE(events.size() == 2);
    CHECK(contains(events[0], "\"id\":"));
    CHECK(contains(events[0], "\"name\":\"\""));
    CHECK_FALSE(contains(events[1], "\"id\":"));
    CHECK(contains(events[1], "\"name\":\"Butler\""));
    std::string kept;
    desk.room("tea").since(std::nullopt, 10, [&](const HistoryPage& page) {
        for (const ChatEntry& each : page.entries) kept += each.text;
    });
    CHECK(kept == "The kettle is on.");
    CHECK_THROWS_AS(desk.room("tea").publish("\x1B"), Error);
    CHECK_THROWS_AS(desk.room("tea").broadcast("\xFF"), Error);
}

TEST_CASE("a flood is told, dropped, and ended with 1008, and nobody else is") {
    Desk desk;
    desk.hub().limits.flood_patience = 5;
    Seat<> bert(desk, "name=Bert"), anna(desk, "name=Anna");
    anna.events();
    bert.events();
    for (int i = 0; i < 20; ++i) CHECK(anna.say("x").size() == 1);
    CHECK(contains(anna.only("/tag t1 x"), "\"code\":\"flood\""));
    for (int i = 0; i < 4; ++i) CHECK(anna.say("x").empty());
    CHECK(anna.handler.is_open());
    anna.say("x");
    CHECK_FALSE(anna.handler.is_open());
    CHECK(anna.close_code() == CloseCode::policy_violation);
    CHECK(bert.events().size() == 20);
    CHECK(contains(bert.only("calm"), "\"said\""));
}

TEST_CASE("a flood is one of messages or of bytes, and neither where it is at the limit") {
    Desk desk;
    desk.hub().limits.connection = FloodRates{{1, 3}, {1, 100}};
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    anna.events();
    bert.events();
    for (int i = 0; i < 3; ++i) CHECK(contains(anna.only("x"), "\"said\""));
    CHECK(contains(anna.only("x"), "\"code\":\"flood\""));
    bert.events();
    for (int i = 0; i < 2; ++i) CHECK(contains(bert.only(std::string(50, 'x')), "\"said\""));
    CHECK(contains(bert.only("x"), "\"code\":\"flood\""));
}

TEST_CASE("all connections of an address share its limits, a /64 of IPv6 is one address") {
    Desk desk;
    desk.hub().limits.address = FloodRates{{1, 3}, {}};
    Seat<> one(desk, "", "tea", "2001:db8::1"), two(desk, "", "tea", "2001:db8::2"),
        other(desk, "", "tea", "2001:db8:0:1::1");
    one.say("x");
    two.say("x");
    one.say("x");
    CHECK(contains(two.only("x"), "\"code\":\"flood\""));
    CHECK(contains(other.only("x"), "\"said\""));
    Seat<> third(desk, "", "tea", "2001:db8::3");
    CHECK(contains(third.only("x"), "\"code\":\"flood\""));
}

TEST_CASE("an address that floods is not forgotten, however many others come and go") {
    Desk desk;
    desk.hub().limits.address = FloodRates{{0.001, 1}, {}};
    {
        Seat<> flooding(desk);
        flooding.say("x");
        CHECK(contains(flooding.only("x"), "\"code\":\"flood\""));
        flooding.leave();
    }
    for (int i = 0; i < 3000; ++i)
        Seat<>(desk, "", "tea", "10.0." + std::to_string(i / 250) + "." + std::to_string(i % 250)).leave();
    Seat<> again(desk);
    CHECK(contains(again.only("x"), "\"code\":\"flood\""));
}

TEST_CASE("a program mutes a user of a room, and is told where there is none") {
    Desk desk;
    Seat<> anna(desk, "name=Anna");
    CHECK(desk.room("tea").mute("anna", 60s));
    CHECK(contains(anna.only("x"), "\"code\":\"muted\""));
    CHECK(desk.room("tea").mute("Anna", 0s));
    CHECK(contains(anna.only("x"), "\"said\""));
    CHECK_FALSE(desk.room("tea").mute("Bert", 60s));
}

TEST_CASE("a filter that makes a text which nobody may say is a mistake of the program, and nobody gets it") {
    struct Spoiler : ChatHandler {
        bool filter(std::string& text) override { return text = "\x01", true; }
    };
    Desk desk;
    Seat<Spoiler> anna(desk, "name=Anna");
    Seat<> bert(desk, "name=Bert");
    bert.events();
    CHECK_THROWS_WITH_AS(anna.say("x"), "filter: made a text that is refused", Error);
    CHECK(bert.events().empty());
}

namespace {

// Overrides every hook, and tells of it.
class Host : public ChatHandler {
public:
    std::optional<ChatUser> authenticate(const Request& request) override {
        const std::string account = request.query("account").value_or("");
        if (account == "nobody") return std::nullopt;
        if (account.empty()) return ChatHandler::authenticate(request);
        return ChatUser{account, "{\"role\":\"host\"}", true};
    }
    bool may(ChatAction action) override {
        if (user().fixed) return true;
        return (action != ChatAction::say || !silent) && ChatHandler::may(action);
    }
    bool filter(std::string& text) override {
        if (text == "spam") return false;
        for (std::size_t at; (at = text.find("darn")) != std::string::npos;) text.replace(at, 4, "d***");
        return true;
    }
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

TEST_CASE("hooks are called, and whoever overrides one leaves the rest to the base") {
    Desk desk;
    Seat<Host> host(desk, "account=Holly"), guest(desk, "name=Anna"), nobody(desk, "account=nobody");
    REQUIRE(nobody.refusal.has_value());
    CHECK(nobody.refusal->status() == 401);
    CHECK(contains(guest.events().at(1), "\"about\":{\"Holly\":{\"role\":\"host\"}}"));
    host.events();
    CHECK(contains(host.only("darn it"), "\"text\":\"d*** it\""));
    CHECK(contains(host.only("spam"), "\"code\":\"refused\""));
    CHECK(contains(host.only("/dice 6"), "\"text\":\"rolled 6\""));
    CHECK(contains(host.only("/who"), "\"users\""));
    CHECK(contains(host.only("/nick Other"), "\"code\":\"name_fixed\""));
    guest.handler.silent = true;
    CHECK(contains(guest.only("hello"), "\"code\":\"forbidden\""));
    host.leave();
    CHECK(host.handler.log == "join tea;said d*** it;said rolled 6;leave tea;");
}

namespace {

// What is to leave a hook is in the name of the user: "on_said".
class Clumsy : public ChatHandler {
public:
    void on_join(ChatRoom&) override { fail("on_join"); }
    void on_leave(ChatRoom&) override { fail("on_leave"); }
    void on_said(const ChatEntry&) override { fail("on_said"); }

private:
    void fail(std::string_view hook) {
        if (user().name == hook) throw std::runtime_error("what a hook forgot");
    }
};

// Would rather be in the lobby than nowhere.
class Homebody : public ChatHandler {
public:
    void on_leave(ChatRoom&) override {
        if (++left < 100) on_command("join", left % 2 == 0 ? "lobby" : "hall");
    }
    unsigned left = 0;
};

}  // namespace

TEST_CASE("what leaves a hook ends its own connection with 1011, and nobody else notices") {
    Desk desk;
    Seat<> anna(desk, "name=Anna");
    for (const std::string hook : {"on_join", "on_said", "on_leave"}) {
        CAPTURE(hook);
        Seat<Clumsy> clumsy(desk, "name=" + hook);
        clumsy.say("hello");
        CHECK(clumsy.handler.is_open() == (hook == "on_leave"));
        clumsy.leave(CloseCode::normal);
        CHECK(clumsy.close_code() == (hook == "on_leave" ? CloseCode::normal : CloseCode::internal_error));
    }
    CHECK(names_of(desk.room("tea").presence()) == "Anna");
    CHECK(contains(anna.events().back(), "{\"type\":\"leave\""));
    CHECK(contains(anna.only("hello"), "\"said\""));
}

TEST_CASE("a connection that has ended joins no room any more") {
    Desk desk;
    Seat<Homebody> homebody(desk);
    homebody.say("/leave");
    CHECK(homebody.handler.here()->name() == "hall");
    homebody.leave();
    CHECK(homebody.handler.left == 2);
}

TEST_CASE("the name of an account is its own: a visitor who has it gets another") {
    Desk desk;
    Seat<Host> visitor(desk, "name=Holly");
    visitor.events();
    Seat<Host> host(desk, "account=Holly"), tab(desk, "account=Holly");
    CHECK(contains(visitor.events().at(0), "\"old\":\"Holly\",\"name\":\"Holly-2\""));
    CHECK(contains(host.events().at(0), "\"name\":\"Holly\""));
    CHECK(contains(tab.events().at(1), "[\"Holly\",\"Holly-2\"]"));
}

TEST_CASE("a moderator mutes, kicks and bans, and nobody else does") {
    Desk desk;
    desk.hub().limits.connection = FloodRates();
    Seat<Host> host(desk, "account=Holly");
    Seat<> anna(desk, "name=Anna&key=anna-secret", "tea", "192.0.2.1"),
        tab(desk, "key=anna-secret", "tea", "192.0.2.1");
    host.events();
    CHECK(host.only("/mute Anna 60") == "0 events");
    CHECK(contains(anna.only("hello"), "\"code\":\"muted\""));
    CHECK(contains(anna.only("/msg Holly hello"), "\"code\":\"muted\""));
    CHECK(contains(anna.only("/nick hello"), "\"code\":\"muted\""));
    Seat<Host> account(desk, "account=Anna");  // takes the name, and the mute goes with the user
    tab.events();
    CHECK(contains(tab.only("hello"), "\"code\":\"muted\""));
    host.say("/mute Anna-2 0");
    anna.say("/nick Annabel");
    anna.events();
    CHECK(contains(anna.only("hello"), "\"said\""));
    CHECK(contains(host.only("/mute Annabel for ever"), "\"code\":\"bad_command\""));
    CHECK(contains(host.only("/kick Nobody"), "\"code\":\"unknown_user\""));

    host.say("/kick Annabel Enough of that.");
    for (auto* seat : {&anna, &tab}) {
        const auto events = seat->events();
        CHECK(events.back() == "{\"type\":\"kicked\",\"text\":\"Enough of that.\"}");
        CHECK(seat->close_code() == CloseCode::policy_violation);
        seat->leave();
    }
    CHECK(
        contains(host.events().back(), "{\"type\":\"leave\",\"room\":\"tea\",\"name\":\"Annabel\""));  // without grace

    Seat<> again(desk, "name=Annabel&key=anna-secret");
    REQUIRE_FALSE(again.refusal.has_value());
    host.say("/ban Annabel 60");
    CHECK_FALSE(again.handler.is_open());
    Seat<> same_name(desk, "name=annabel"), same_key(desk, "name=Zoe&key=anna-secret"),
        other(desk, "name=Bert", "tea", "192.0.2.1");
    CHECK(same_name.refusal.has_value());
    CHECK(same_key.refusal.has_value());
    REQUIRE_FALSE(other.refusal.has_value());
    CHECK(contains(other.only("/nick Annabel"), "\"code\":\"name_banned\""));

    host.say("/ban 192.0.2.1");
    CHECK_FALSE(other.handler.is_open());
    Seat<> same_address(desk, "name=Carl", "tea", "192.0.2.1"), elsewhere(desk, "name=Carl", "tea", "192.0.2.2");
    REQUIRE(same_address.refusal.has_value());
    CHECK(same_address.refusal->status() == 403);
    CHECK_FALSE(elsewhere.refusal.has_value());
    host.say("/ban 192.0.2.1 0");
    Seat<> forgiven(desk, "name=Dora", "tea", "192.0.2.1");
    CHECK_FALSE(forgiven.refusal.has_value());
}

TEST_CASE("a ban ends all connections of a user, whatever the names and rooms, and is lifted as it was set") {
    Desk desk;
    Seat<> anna(desk, "name=Anna&key=anna-secret"), coffee(desk, "name=Zoe&key=anna-secret", "coffee"),
        nowhere(desk, "name=Zoe&key=anna-secret", "milk"), bert(desk, "name=Anna&key=bert-secret");
    nowhere.say("/leave");
    desk.hub().ban("anna", 1h);
    CHECK_FALSE(anna.handler.is_open());
    CHECK_FALSE(coffee.handler.is_open());
    CHECK_FALSE(nowhere.handler.is_open());
    CHECK(bert.handler.is_open());
    Seat<> while_banned(desk, "name=Zoe&key=anna-secret");
    CHECK(while_banned.refusal.has_value());
    desk.hub().ban("Anna", Duration::zero());
    Seat<> forgiven(desk, "name=Anna&key=anna-secret");
    CHECK_FALSE(forgiven.refusal.has_value());
}

TEST_CASE("/help names the commands that one may use") {
    Desk desk;
    Seat<Host> host(desk, "account=Holly");
    Seat<> anna(desk, "name=Anna");
    CHECK(contains(host.only("/help"), "/ban NAME|ADDRESS [SECONDS]"));
    CHECK_FALSE(contains(anna.only("/help"), "/ban"));
    CHECK(contains(anna.only("/help"), "{\"command\":\"/me TEXT\",\"text\":\"says what you do\"}"));
}

// ---- a store that takes its time -------------------------------------------------------------------------------------

namespace {

// Answers when the test says so, and may be ahead or behind with what it tells: what a bus does.
class SlowStore : public ChatStore {
public:
    explicit SlowStore(SlowStore*& self) { self = this; }
    void attach(Listener& listener, std::shared_ptr<Mailbox>) override { listener_ = &listener; }
    void append(ChatEntry entry) override {
        entry.id = kept.size() + 1;
        kept.push_back(entry);
    }
    void pass(const ChatEntry& entry) override { listener_->on_entry(entry); }
    void since(const std::string&, std::optional<std::uint64_t> id, std::size_t, PageCall then) override {
        HistoryPage page;
        for (const ChatEntry& each : kept)
            if (each.id > id.value_or(0)) page.entries.push_back(each);
        page.last = kept.size();
        pages.push_back([page, then] { then(page); });
    }
    // Tells of the next entry that nobody has been told of.
    void tell() { listener_->on_entry(kept.at(told_++)); }
    void tell_others(ChatEntry::Kind kind, const std::string& name, const std::string& text = "") {
        ChatEntry made = entry(text);
        made.kind = kind;
        made.name = name;
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
    std::size_t told_ = 0;
};

// The texts of all messages in events, in order.
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

TEST_CASE("a message is delivered when it comes back from the store, and not before") {
    Desk desk;
    SlowStore* store = nullptr;
    desk.hub().set_store(std::make_unique<SlowStore>(store));
    Seat<> anna(desk, "name=Anna"), bert(desk, "name=Bert");
    store->answer();
    store->answer();
    bert.events();
    CHECK(anna.only("/tag t1 hello") == "0 events");
    CHECK(bert.events().empty());
    store->tell();
    CHECK(contains(anna.one(), "\"tag\":\"t1\""));
    CHECK(contains(bert.one(), "hello"));
    anna.say("/tag t2 lost");
    store->fail(1);
    const std::string error = anna.one();
    CHECK(contains(error, "\"code\":\"not_kept\""));
    CHECK(contains(error, "\"tag\":\"t2\""));
    CHECK(bert.events().empty());
}

TEST_CASE("whatever order a store answers in, a newcomer gets everything once and in order") {
    // Each letter is a step: s says the next digit, t tells of the next, j joins, a answers the oldest question.
    for (const std::string steps : {"ssttja", "sstjta", "ssjtta", "sjstta", "sjatst", "jsstta", "sstjat", "jastst",
                                    "ststja", "sjsatt", "ssjatt", "jssatt", "sjtsta", "sjtsat"}) {
        for (const bool somebody : {false, true}) {
            CAPTURE(steps);
            CAPTURE(somebody);
            Desk desk;
            SlowStore* store = nullptr;
            desk.hub().set_store(std::make_unique<SlowStore>(store));
            std::optional<Seat<>> bert, newcomer;
            if (somebody) {
                bert.emplace(desk, "name=Bert");
                store->answer();
            }
            int said = 0;
            for (const char step : steps) {
                if (step == 's') desk.room("tea").publish(std::to_string(++said));
                else if (step == 't') store->tell();
                else if (step == 'j') newcomer.emplace(desk, "name=Anna");
                else store->answer();
            }
            while (!store->pages.empty()) store->answer();
            CHECK(texts(newcomer->events()) == "12");
            if (somebody) CHECK(texts(bert->events()) == "12");
        }
    }
}

TEST_CASE("on_leave comes only after on_join, which waits for the history") {
    Desk desk;
    SlowStore* store = nullptr;
    desk.hub().set_store(std::make_unique<SlowStore>(store));
    Seat<Host> early(desk, "name=Anna"), patient(desk, "name=Bert");
    early.leave();
    while (!store->pages.empty()) store->answer();
    patient.leave();
    CHECK(early.handler.log == "");
    CHECK(patient.handler.log == "join tea;leave tea;");
}

TEST_CASE("a history that can not be read is a gap, and the chat goes on") {
    struct Broken : SlowStore {
        using SlowStore::SlowStore;
        void since(const std::string&, std::optional<std::uint64_t>, std::size_t, PageCall then) override {
            HistoryPage page;
            page.error = "disk image is malformed";
            then(page);
        }
    };
    Desk desk;
    SlowStore* store = nullptr;
    desk.hub().set_store(std::make_unique<Broken>(store));
    Seat<> anna(desk, "name=Anna&last=7");
    CHECK(contains(anna.events().at(2), "\"gap\":true,\"last\":7,"));  // to come back with, when it can be read again
    anna.say("hello");
    store->tell();
    CHECK(contains(anna.one(), "hello"));
}

TEST_CASE("users of other servers are in the roster, and their names are taken") {
    Desk desk;
    SlowStore* store = nullptr;
    desk.hub().set_store(std::make_unique<SlowStore>(store));
    Seat<> anna(desk, "name=Anna");
    store->answer();
    anna.events();
    store->tell_others(ChatEntry::Kind::come, "Far");
    CHECK(contains(anna.one(), "{\"type\":\"join\",\"room\":\"tea\",\"name\":\"Far\""));
    Seat<> other(desk, "name=far");
    CHECK(contains(other.events().at(0), "\"name\":\"far-2\""));
    anna.events();
    store->tell_others(ChatEntry::Kind::rename, "Far", "Further");
    CHECK(contains(anna.one(), "\"old\":\"Far\",\"name\":\"Further\""));
    CHECK(names_of(desk.room("tea").presence()) == "Anna far-2 Further");
    store->tell_others(ChatEntry::Kind::go, "Further");
    CHECK(contains(anna.one(), "\"leave\""));
    CHECK(names_of(desk.room("tea").presence()) == "Anna far-2");
    store->tell_others(ChatEntry::Kind::go, "Anna");  // somebody of the same name elsewhere
    CHECK(names_of(desk.room("tea").presence()) == "Anna far-2");
}

TEST_CASE("the history is chosen before the first connection, or not at all") {
    Desk desk;
    desk.hub().set_store(MemoryHistory());
    Seat<> anna(desk, "name=Anna");
    CHECK_THROWS_WITH_AS(desk.hub().set_store(MemoryHistory()),
                         "ChatHub::set_store: a connection is open; set the store before the first connection", Error);
}

// ---- over sockets ----------------------------------------------------------------------------------------------------

namespace {

// A server with a chat at "/chat/{room}".
struct Chat : RunningServer {
    explicit Chat(Duration grace = std::chrono::hours(1)) {
        ChatHub::of(server).limits.grace = grace;
        ChatHub::of(server).limits.connection = ChatHub::of(server).limits.address = FloodRates();
        server.route<ChatHandler>("/chat/{room}");
        start();
    }
};

// The number behind "name": in an event.
std::string number_after(const std::string& event, const std::string& name) {
    const std::size_t at = event.find("\"" + name + "\":");
    if (at == std::string::npos) return "";
    const std::size_t begin = at + name.size() + 3;
    return event.substr(begin, event.find_first_of(",}", begin) - begin);
}

}  // namespace

TEST_CASE("a page that is reloaded within the grace has never left, and one that is closed on purpose leaves at once") {
    Chat chat;
    Client bert(chat.port(), "/chat/tea?name=Bert");
    next_with(bert, "\"type\":\"history\"");
    for (const CloseCode code : {CloseCode::going_away, CloseCode::normal}) {
        Client anna(chat.port(), "/chat/tea?name=Anna&key=anna-secret");
        next_with(anna, "\"type\":\"history\"");
        anna.close(code);
        CHECK(anna.close_code() == code);
    }
    bert.send("now");
    std::string types;
    for (std::string event; !contains(event, "\"said\"");) {
        event = next_with(bert, "\"type\"");
        types += event.substr(9, event.find('"', 9) - 9) + " ";
    }
    CHECK(types == "join leave said ");
}

TEST_CASE("who does not come back within the grace has left") {
    Chat chat(50ms);
    Client bert(chat.port(), "/chat/tea?name=Bert");
    for (int round = 0; round < 3; ++round) {
        {
            Client anna(chat.port(), "/chat/tea?name=Anna");
            next_with(bert, "\"join\"");
        }
        CHECK(contains(next_with(bert, "\"leave\""), "\"name\":\"Anna\""));
    }
    bert.close();
    bert.close_code();
    CHECK(chat.eventually([&] { return ChatHub::of(chat.server).room_count() == 0; }));
}

TEST_CASE("whenever a connection is lost, a message that is sent again with its tag arrives once") {
    enum Phase { before_the_send, before_the_answer, after_the_answer };
    Chat chat;
    Client bert(chat.port(), "/chat/tea?name=Bert");
    next_with(bert, "\"type\":\"history\"");
    for (const Phase phase : {before_the_send, before_the_answer, after_the_answer}) {
        for (int round = 0; round < 10; ++round) {
            CAPTURE(phase);
            const std::string tag = "t" + std::to_string(phase) + "-" + std::to_string(round),
                              address = "/chat/tea?name=Anna&key=anna-secret";
            std::string last;
            {
                Client anna(chat.port(), address);
                last = number_after(next_with(anna, "\"type\":\"history\""), "last");
                if (phase != before_the_send) anna.send("/tag " + tag + " " + tag);
                if (phase == after_the_answer) last = number_after(next_with(anna, "\"tag\""), "id");
                anna.raw.reset();
            }
            Client anna(chat.port(), address + "&last=" + last);
            const std::string history = next_with(anna, "\"type\":\"history\"");
            CHECK(contains(history, "\"gap\":false"));
            CHECK((!contains(history, tag) || phase == before_the_answer));
            anna.send("/tag " + tag + " " + tag);
            CHECK(contains(next_with(anna, "\"" + tag + "\""),
                           phase == after_the_answer ? "\"ack\"" : "\"tag\":\"" + tag));
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

TEST_CASE("five hundred clients that come back at once get what they missed, and the others do not notice") {
    rlimit descriptors{};
    ::getrlimit(RLIMIT_NOFILE, &descriptors);
    descriptors.rlim_cur = descriptors.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &descriptors);
    Chat chat;
    Client bert(chat.port(), "/chat/tea?name=Bert");
    std::string last = number_after(next_with(bert, "\"type\":\"history\""), "last");
    const auto all_come = [&] {
        std::vector<std::unique_ptr<RawClient>> clients;
        for (int i = 0; i < 500; ++i) {
            clients.push_back(std::make_unique<RawClient>(chat.port()));
            const std::string target = "/chat/tea?name=user&key=secret-" + std::to_string(i) + "&last=" + last;
            clients.back()->send(handshake_request("127.0.0.1:" + std::to_string(chat.port()), target, Client::key));
        }
        for (const auto& client : clients) REQUIRE(client->read_until("\"history\",\"room\":\"tea\""));
        return clients;
    };
    auto clients = all_come();
    for (int i = 0; i < 500; ++i) next_with(bert, "\"join\"");
    for (const auto& client : clients) client->reset();
    for (int i = 0; i < 20; ++i) bert.send("missed " + std::to_string(i) + ".");
    for (int i = 0; i < 20; ++i) next_with(bert, "\"said\"");
    REQUIRE(chat.eventually([&] { return chat.server.rooms()["tea"].size() == 1; }));

    clients = all_come();
    bert.send("welcome back");
    CHECK(contains(next_with(bert, "\"type\""), "welcome back"));  // it has heard of nobody
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
