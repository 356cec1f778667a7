// Section 16: the answers to lines. Every line that is refused gets an error with a code and a sentence; with the tag of
// the line, if it has one. What comes late from the store is answered too.
#define WSCHAT_CHAT 1
#include <map>
#include <set>
#include "support.hpp"

using namespace wschat;
using namespace std::chrono_literals;
using test::contains;
using test::field_of;

namespace {

// A history in memory that fails or waits when the test says so.
class FaultyStore final : public ChatStore {
public:
    explicit FaultyStore(FaultyStore*& self, const HistoryLimits& limits = {}) : history_(limits) { self = this; }
    void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) override {
        listener_ = &listener;
        history_.attach(listener, std::move(mailbox));
    }
    void append(ChatEntry entry) override {
        if (fails) return listener_->on_failure(entry, "disk full");
        if (waits) return later.push_back([this, entry] { history_.append(entry); });
        history_.append(std::move(entry));
    }
    void forward(const ChatEntry& entry) override {
        if (waits) return later.push_back([this, entry] { history_.forward(entry); });
        history_.forward(entry);
    }
    void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
               PageCallback callback) override {
        if (reads_wait)
            return later.push_back([this, room, position, limit, callback] {
                fails ? callback(failed()) : history_.since(room, position, limit, callback);
            });
        if (fails) return callback(failed());
        history_.since(room, std::move(position), limit, std::move(callback));
    }
    void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) override {
        if (fails) return callback(failed());
        history_.before(room, id, limit, std::move(callback));
    }
    void search(const std::string& room, const std::string& words, std::size_t limit, PageCallback callback) override {
        if (fails) return callback(failed());
        history_.search(room, words, limit, std::move(callback));
    }
    void put(ChatFact fact) override {
        if (fails) return listener_->on_fact_failure(fact, "disk full");
        history_.put(std::move(fact));
    }
    void facts(const std::string& scope, const std::string& prefix, FactsCallback callback) override {
        if (fails) return callback({}, "disk full");
        history_.facts(scope, prefix, std::move(callback));
    }
    void deliver() {
        for (const auto& work : std::exchange(later, {})) work();
    }

    bool fails = false, waits = false, reads_wait = false;
    std::vector<std::function<void()>> later;

private:
    static HistoryPage failed() {
        HistoryPage page;
        page.error = "disk full";
        return page;
    }
    MemoryHistory history_;
    Listener* listener_ = nullptr;
};

// A moderator if the query says "mod". After deny(), a user with "deny" may do nothing.
struct Guest : ChatHandler {
    static bool& denies() {
        static bool on = false;
        return on;
    }
    std::optional<ChatUser> authenticate(const Request& request) override {
        if (const auto account = request.query("account")) return ChatUser{*account, "", true};
        return ChatHandler::authenticate(request);
    }
    bool may(ChatAction action) override {
        if (denies() && request().query("deny")) return false;
        return ChatHandler::may(action) || request().query("mod").has_value();
    }
    bool filter(std::string& text) override { return !contains(text, "spam"); }
};

class Fixture {
public:
    explicit Fixture(const HistoryLimits& limits = {}) {
        Guest::denies() = false;
        server.route<Guest>("/chat/{room}");
        hub().set_store(std::make_unique<FaultyStore>(store, limits));
        hub().limits.connection = hub().limits.address = FloodRates();
        hub().limits.replies = hub().limits.address_replies = Rate();
        hub().limits.room_creations = hub().limits.address_room_creations = Rate();
        hub().limits.presence_window = Duration::zero();
    }
    ~Fixture() { Guest::denies() = false; }
    ChatHub& hub() { return ChatHub::of(server); }
    TestClient connect(const std::string& query, const std::string& room = "tea") {
        return server.connect("/chat/" + room + "?" + query);
    }

    // The line is refused with this code: without a tag, with one, and with one behind "/in tea" if `in`. `quiet`: only
    // with a tag.
    void refuse(TestClient& client, const std::string& line, const std::string& code, bool quiet = false) {
        CAPTURE(line.substr(0, 60));
        commands.insert(line.substr(0, line.find(' ')));
        codes.insert(code);
        client.received();
        client.send(line);
        const auto plain = errors(client);
        CHECK(plain.size() == (quiet ? 0 : 1));
        for (const std::string& error : plain) check_error(error, code, "");
        const std::string tag = "t" + std::to_string(++tags_);
        client.send("/tag " + tag + " " + line);
        const auto tagged = errors(client);
        CHECK(tagged.size() == 1);
        for (const std::string& error : tagged) check_error(error, code, tag);
        CHECK(client.is_open());
    }

    FaultyStore* store = nullptr;
    TestServer server;
    std::set<std::string> commands, codes;  // that were refused, and how

private:
    static std::vector<std::string> errors(TestClient& client) {
        std::vector<std::string> found;
        for (const std::string& event : client.received())
            if (field_of(event, "type") == "error") found.push_back(event);
        return found;
    }
    static void check_error(const std::string& error, const std::string& code, const std::string& tag) {
        CHECK(field_of(error, "code") == code);
        CHECK(field_of(error, "tag") == tag);
        const std::string text = field_of(error, "text");
        CHECK(text.size() > 4);
    }
    int tags_ = 0;
};

std::string id_of(TestClient& client) { return client.handler<Guest>().user().id; }
// The last event of the type since the last call, or "".
std::string last(TestClient& client, const std::string& type) {
    std::string found;
    for (const std::string& event : client.received())
        if (field_of(event, "type") == type) found = event;
    return found;
}

}  // namespace

TEST_SUITE_BEGIN("chat");

TEST_CASE("each refused line gets a code and a sentence, with its tag if it has one") {
    HistoryLimits limits;
    limits.max_reactions = 1;
    Fixture chat(limits);
    TestClient anna = chat.connect("name=Anna&key=anna-secret"), bert = chat.connect("name=Bert"),
               mod = chat.connect("name=Mod&mod=1&key=mods-secret"), account = chat.connect("account=Cleo");
    bert.send("from Bert");
    const std::string bert_id = field_of(last(bert, "said"), "id"), away_id(16, 'A');
    anna.send("from Anna");
    const std::string id = field_of(last(anna, "said"), "id");
    anna.received();
    const std::string position = "0123456789abcdef-1";

    // Bad arguments.
    const std::pair<std::string, std::string> bad[] = {
        {"", "empty"},
        {" \n", "empty"},
        {"\x1B[2J", "bad_text"},
        {"/who \x01", "bad_text"},
        {"/me \x01", "bad_text"},
        {"/me", "empty"},
        {std::string(16 * 1024 + 1, 'x'), "too_long"},
        {"/me " + std::string(16 * 1024 + 1, 'x'), "too_long"},
        {"/edit " + id + " " + std::string(16 * 1024 + 1, 'x'), "too_long"},
        {"buy spam", "refused"},
        {"/me spam", "refused"},
        {"/edit " + id + " spam", "refused"},
        {"/msg Bert spam", "refused"},
        {"/data {} spam", "refused"},
        {"/", "unknown_command"},
        {"/dance", "unknown_command"},
        {"/edit", "bad_command"},
        {"/edit x y", "bad_command"},
        {"/edit " + id, "empty"},
        {"/edit 99 x", "bad_id"},
        {"/edit " + bert_id + " x", "not_yours"},
        {"/delete", "bad_command"},
        {"/delete x", "bad_command"},
        {"/delete 99", "bad_id"},
        {"/delete " + bert_id, "not_yours"},
        {"/react", "bad_command"},
        {"/react " + id, "bad_command"},
        {"/react 99 +1", "bad_id"},
        {"/data", "bad_data"},
        {"/data 5", "bad_data"},
        {"/data {\"x\":\"" + std::string(5000, 'x') + "\"}", "bad_data"},
        {"/msg", "unknown_user"},
        {"/msg Nobody hello", "unknown_user"},
        {"/msg Bert", "empty"},
        {"/msg @x hello", "unknown_user"},
        {"/msg @" + away_id + " hello", "unknown_user"},
        {"/read", "bad_command"},
        {"/read x", "bad_command"},
        {"/read @x 1", "unknown_user"},
        {"/read @" + away_id + " 1", "unknown_user"},
        {"/nick", "name_bad"},
        {"/nick " + std::string(41, 'x'), "name_bad"},
        {"/nick Bert", "name_taken"},
        {"/nick Cleo", "name_taken"},
        {"/join", "room_bad"},
        {"/join " + std::string(65, 'x'), "room_bad"},
        {"/leave nowhere", "no_room"},
        {"/in", "no_room"},
        {"/in nowhere hello", "no_room"},
        {"/in tea /in tea hello", "bad_command"},
        {"/in tea /dance", "unknown_command"},
        {"/invite", "unknown_user"},
        {"/invite Nobody", "unknown_user"},
        {"/since", "bad_command"},
        {"/since x", "bad_command"},
        {"/since @x", "bad_command"},
        {"/since @x " + position, "unknown_user"},
        {"/before", "bad_command"},
        {"/before x", "bad_command"},
        {"/before 1 x", "bad_command"},
        {"/before @x", "bad_command"},
        {"/before @x 1", "unknown_user"},
        {"/search", "bad_command"},
        {"/search  ", "bad_command"},
    };
    for (const auto& [line, code] : bad) chat.refuse(anna, line, code);
    const std::pair<std::string, std::string> of_moderators[] = {
        {"/topic " + std::string(501, 'x'), "too_long"},
        {"/access", "bad_command"},
        {"/access x", "bad_command"},
        {"/readonly x", "bad_command"},
        {"/slow x", "bad_command"},
        {"/slow 99999999", "bad_command"},
        {"/kick", "unknown_user"},
        {"/kick Nobody", "unknown_user"},
        {"/ban", "bad_command"},
        {"/ban Bert x", "bad_command"},
        {"/unban", "bad_command"},
        {"/mute", "unknown_user"},
        {"/mute Bert x", "bad_command"},
        {"/unmute Nobody", "unknown_user"},
        {"/unmute Bert x", "unknown_user"},
    };
    for (const auto& [line, code] : of_moderators) chat.refuse(mod, line, code);
    bert.send("/react " + id + " +1");
    chat.refuse(anna, "/react " + id + " -1", "refused");
    chat.refuse(bert, "/read 1", "forbidden");
    chat.refuse(bert, "/msg @" + id_of(anna) + " hello", "forbidden");
    chat.refuse(bert, "/since @" + id_of(anna) + " " + position, "unknown_user");
    chat.refuse(bert, "/before @" + id_of(anna) + " 1", "unknown_user");
    chat.refuse(account, "/nick Dora", "name_fixed");
    mod.send("/ban Zed");
    chat.refuse(anna, "/nick Zed", "name_banned");
    bert.hang_up();
    chat.refuse(anna, "/msg Bert hello", "user_away");

    // Limits.
    ChatLimits& chat_limits = chat.hub().limits;
    chat_limits.max_read_markers = 0;
    chat.refuse(anna, "/read 1", "read_limit");
    chat_limits.max_invitations = 0;
    chat.refuse(anna, "/invite Mod", "refused");
    chat_limits.edit_for = Duration::zero();
    chat.refuse(anna, "/edit " + id + " x", "too_late");
    chat_limits.edit_for = -1h;
    chat.refuse(anna, "/edit " + id + " x", "too_late");
    chat_limits.max_rooms_per_connection = 1;
    chat.refuse(anna, "/join other", "room_limit");
    chat_limits.max_rooms_per_connection = 10;
    chat_limits.max_rooms = 1;
    chat.refuse(anna, "/join other", "room_limit");
    chat_limits.max_rooms = 100;
    chat.hub().room_options = [](std::string_view name, ChatRoomOptions& options) {
        if (name == "full") options.max_users = 1;
        if (name == "private") options.is_private = true;
    };
    TestClient first = chat.connect("name=First", "full");
    chat.refuse(anna, "/join full", "room_full");
    chat.refuse(anna, "/join private", "not_invited");

    // What a room or a moderator forbids.
    ChatRoomOptions& options = chat.hub().room("tea").options;
    options.read_only = true;
    chat_limits.edit_for = 1h;
    for (const std::string line : {"x", "/me x", "/data {} x"}) chat.refuse(anna, line, "read_only");
    chat.refuse(anna, "/edit " + id + " x", "read_only");
    options.read_only = false;
    options.slow = 1h;
    anna.send("the last one");
    for (const std::string line : {"x", "/me x", "/data {} x"}) chat.refuse(anna, line, "slow");
    options.slow = Duration::zero();
    chat.hub().room("tea").mute("Anna", 1h);
    for (const std::string line : {"x", "/me x", "/data {} x", "/msg Mod x", "/nick Annie", "/invite Mod"})
        chat.refuse(anna, line, "muted");
    chat.refuse(anna, "/edit " + id + " x", "muted");
    chat.refuse(anna, "/react " + id + " +1", "muted");
    chat.refuse(anna, "/typing", "muted", true);
    chat.hub().room("tea").mute("Anna", Duration::zero());

    // Outside of all rooms.
    mod.send("/leave");
    const std::string outside[] = {"x",         "/me x",           "/edit 1 x",       "/delete 1",
                                   "/react 1 +1", "/data {} x",      "/msg Anna x",     "/msg @" + id_of(anna) + " x",
                                   "/read 1",   "/who",            "/nick Other",     "/leave",
                                   "/leave tea", "/invite Anna",    "/since " + position, "/before 1",
                                   "/search x", "/topic x",        "/access private", "/readonly on",
                                   "/slow 1",   "/kick Anna",      "/mute Anna",      "/unmute Anna",
                                   "/in tea x"};
    for (const std::string& line : outside) chat.refuse(mod, line, "no_room");
    chat.refuse(mod, "/typing", "no_room", true);
    mod.send("/join tea");

    // A store that is broken.
    chat.store->fails = true;
    for (const std::string line : {"x", "/me x", "/data {} x", "/topic x", "/access public", "/readonly on", "/slow 1"})
        chat.refuse(mod, line, "not_kept");
    for (const std::string& line : {"/edit " + id + " x", "/delete " + id, "/react " + id + " +1"})
        chat.refuse(mod, line, "not_kept");
    chat_limits.max_invitations = chat_limits.max_read_markers = 100;
    for (const std::string line : {"/invite Anna", "/read 1"}) chat.refuse(mod, line, "not_kept");
    for (const std::string line : {"/before 9", "/search x"}) chat.refuse(mod, line, "not_read");
    for (const std::string& rest : {" " + position, std::string()})
        chat.refuse(mod, (rest.empty() ? "/before @" : "/since @") + away_id + (rest.empty() ? " 9" : rest), "not_read");
    chat.refuse(mod, "/msg @" + away_id + " x", "not_read");
    chat.refuse(mod, "/read @" + away_id + " 1", "not_read");
    chat.store->fails = false;

    // What a user may not do.
    Guest::denies() = true;
    TestClient nobody = chat.connect("name=Nobody");
    Guest::denies() = false;
    nobody.hang_up();
    TestClient denied = chat.connect("name=Denied&deny=1&key=denied-secret");
    Guest::denies() = true;
    const std::string forbidden[] = {"x",           "/me x",         "/edit 1 x",      "/react 1 +1",   "/data {} x",
                                     "/msg Anna x", "/nick Other",   "/rooms",         "/join other",   "/invite Anna",
                                     "/topic x",    "/access public", "/readonly on",  "/slow 1",       "/kick Anna",
                                     "/ban Anna",   "/unban Anna",   "/bans",          "/mute Anna",    "/unmute Anna"};
    for (const std::string& line : forbidden) chat.refuse(denied, line, "forbidden");
    chat.refuse(denied, "/typing", "forbidden", true);

    // Too much.
    chat_limits.replies = {0.001, 1};
    anna.send("/who");
    for (const std::string line : {"/who", "/rooms", "/join other", "/since x", "/before x", "/search x"})
        chat.refuse(anna, line, "flood");
    chat_limits.replies = Rate();
    chat_limits.fan_out = {0.001, 1};
    anna.send("x");
    for (const std::string line : {"x", "/me x", "/edit 1 x", "/delete 1", "/react 1 +1", "/data {} x", "/nick A"})
        chat.refuse(anna, line, "flood");
    chat_limits.fan_out = Rate();
    chat_limits.connection = {{0.001, 1}, {1000, 1000}};
    anna.received();
    anna.send("within the limit");
    for (int i = 0; i < 3; ++i) anna.send("above it");
    CHECK(field_of(last(anna, "error"), "code") == "flood");  // the first one is told
    for (const std::string line : {"x", "/who", "/dance"}) {
        anna.send("/tag t0 " + line);
        CHECK(field_of(last(anna, "error"), "tag") == "t0");
    }

    // All commands and all codes were there.
    Guest::denies() = false;
    mod.received();
    mod.send("/help");
    const std::string help = last(mod, "help");
    for (std::size_t at = help.find("\"command\":\"/"); at != std::string::npos; at = help.find("\"command\":\"/", at + 1)) {
        const std::string usage = field_of(help.substr(at), "command"), name = usage.substr(0, usage.find(' '));
        CAPTURE(name);
        if (name != "/help") CHECK(chat.commands.count(name) == 1);
    }
    // examples/README.md lists them; "bad_line" and "bad_tag" are below.
    const std::set<std::string> all{"bad_text",   "bad_command", "bad_data",    "bad_id",     "unknown_command",
                                    "unknown_user", "user_away", "empty",       "too_long",   "too_late",
                                    "not_yours",  "refused",     "flood",       "muted",      "forbidden",
                                    "not_kept",   "not_read",    "name_bad",    "name_taken", "name_fixed",
                                    "name_banned", "room_bad",   "room_limit",  "room_full",  "not_invited",
                                    "read_only",  "slow",        "read_limit",  "no_room"};
    CHECK(chat.codes == all);
    CHECK(chat.server.exceptions().empty());
}

TEST_CASE("bytes, invalid UTF-8 and bad tags are refused, and each line has one tag") {
    Fixture chat;
    TestClient anna = chat.connect("name=Anna");
    anna.received();
    const std::pair<std::string, std::string> table[] = {
        {"/tag " + std::string(65, 't') + " hello", "bad_tag"},
        {"/tag t\xC3\xA4g hello", "bad_tag"},
        {"/in tea /tag " + std::string(65, 't') + " hello", "bad_tag"},
        {"/tag t1 /in tea /tag t2 hello", "bad_tag"},
    };
    for (const auto& [line, code] : table) {
        anna.send(line);
        const std::string error = last(anna, "error");
        CHECK(field_of(error, "code") == code);
        CHECK(field_of(error, "tag") == (line.substr(0, 8) == "/tag t1 " ? "t1" : ""));
    }
    for (const char* bytes : {"hello", "/tag t1 hello", "\xFF"}) {
        anna.send(bytes, Opcode::binary);
        CHECK(field_of(last(anna, "error"), "code") == "bad_line");
    }
    CHECK(anna.is_open());
}

TEST_CASE("the secret of a user is in no line of a log") {
    std::string log;
    Fixture chat;
    chat.server.on_log([&](const LogEntry& entry) { log += to_json(entry) + "\n"; });
    chat.server.on_access([&](const AccessEntry& entry) { log += to_json(entry) + "\n"; });
    TestClient anna = chat.connect("name=Anna&key=annas-secret&mod=1");
    TestClient bert = chat.server.connect(
        TestRequest("/chat/tea?name=Bert").subprotocol("wschat").subprotocol("wschat.key.YW5uYXMtc2VjcmV0"));
    CHECK(id_of(anna) == id_of(bert));
    anna.send("/kick Nobody");
    anna.send("/mute Anna 1");
    chat.store->fails = true;
    anna.send("x");
    anna.send("/search x");
    for (TestClient* each : {&anna, &bert}) each->close();
    CHECK(contains(log, "/chat/tea"));
    CHECK(contains(log, "chat_not_read"));
    CHECK_FALSE(contains(log, "annas-secret"));
    CHECK_FALSE(contains(log, "YW5uYXMtc2VjcmV0"));
}

TEST_CASE("actions of moderators and entries that cannot be kept are logged and passed to the program") {
    std::string log, decisions, lost;
    Fixture chat;
    chat.server.on_log([&](const LogEntry& entry) { log += to_json(entry) + "\n"; });
    chat.hub().on_decision = [&](const ChatFact& fact) {
        decisions += fact.scope + (fact.value.empty() ? "- " : "+ ");
    };
    chat.hub().on_not_kept = [&](const ChatEntry& entry, const std::string& cause) {
        lost += entry.name + ":" + entry.text + ":" + cause;
    };
    TestClient mod = chat.connect("name=Mod&mod=1"), anna = chat.connect("name=Anna&key=annas-secret"),
               bert = chat.connect("name=Bert", "tea");
    mod.received();
    for (const char* line : {"/mute Anna 5", "/unmute Anna", "/kick Bert out", "/ban Zed 5", "/unban Zed", "/slow 3"})
        mod.send(line);
    CHECK(decisions == "mute+ mute- kick+ ban+ ban- ");
    for (const char* action : {"mute", "unmute", "kick", "ban", "unban", "options"})
        CHECK(contains(log, std::string("\"action\":\"") + action + "\""));
    CHECK(contains(log, "\"by\":\"Mod\""));
    CHECK(bert.close_code() == CloseCode::policy_violation);
    chat.store->fails = true;
    anna.send("hello");
    CHECK(lost == "Anna:hello:disk full");
    CHECK(contains(log, "chat_not_kept"));
}

TEST_CASE("a line with a tag that is said before the history is read gets its answer, whether it can be read or not") {
    for (const bool fails : {false, true}) {
        CAPTURE(fails);
        Fixture chat;
        TestClient anna = chat.connect("name=Anna");
        chat.store->reads_wait = true;
        TestClient bert = chat.connect("name=Bert");
        bert.send("/tag t1 hello");
        chat.server.run_until_idle();
        std::string events;
        for (const std::string& event : bert.received()) events += event;
        CHECK_FALSE(contains(events, "t1"));
        CHECK(contains(last(anna, "said"), "hello"));
        chat.store->reads_wait = false;
        chat.store->fails = fails;
        chat.store->deliver();
        chat.server.run_until_idle();
        events.clear();
        for (const std::string& event : bert.received()) events += event;
        CHECK(contains(events, "\"type\":\"ack\"") == fails);
        CHECK(contains(events, "\"text\":\"hello\"") == !fails);
        CHECK(contains(events, "\"tag\":\"t1\""));
    }
}

TEST_CASE("a private message whose receiver leaves before the store delivers it is an error for the sender") {
    Fixture chat;
    TestClient anna = chat.connect("name=Anna"), bert = chat.connect("name=Bert");
    anna.received();
    chat.store->waits = true;
    anna.send("/tag t1 /msg Bert psst");
    bert.close();
    chat.server.run_until_idle();
    // Its leave waits behind the message, so the message comes first, when nobody is there.
    chat.store->waits = false;
    chat.store->deliver();
    chat.server.run_until_idle();
    const std::string error = last(anna, "error");
    CHECK(field_of(error, "code") == "user_away");
    CHECK(field_of(error, "tag") == "t1");
}

TEST_CASE("a private message goes to the user who had the name when it was said") {
    Fixture chat;
    TestClient anna = chat.connect("name=Anna"), bert = chat.connect("name=Bert"), carl = chat.connect("name=Carl");
    for (TestClient* each : {&anna, &bert, &carl}) each->received();
    chat.store->waits = true;
    bert.send("/nick Bernd");
    anna.send("/tag t1 /msg Bert for the first Bert");
    carl.send("/nick Bert");
    chat.store->waits = false;
    chat.store->deliver();
    chat.server.run_until_idle();
    CHECK(contains(last(bert, "private"), "for the first Bert"));
    CHECK(last(carl, "private") == "");
    CHECK(field_of(last(anna, "private"), "tag") == "t1");
}

TEST_CASE("a sender who leaves the room before a private message is delivered gets it with its tag") {
    Fixture chat;
    TestClient anna = chat.connect("name=Anna"), bert = chat.connect("name=Bert");
    anna.received();
    chat.store->waits = true;
    anna.send("/tag t1 /msg Bert psst");
    anna.send("/leave");
    chat.store->waits = false;
    chat.store->deliver();
    chat.server.run_until_idle();
    CHECK(contains(last(bert, "private"), "psst"));
    CHECK(field_of(last(anna, "private"), "tag") == "t1");
}

TEST_CASE("a history has the users whom its messages mention, also when they have left or have other names") {
    Fixture chat;
    std::string bert_id;
    {
        TestClient anna = chat.connect("name=Anna"), bert = chat.connect("name=Bert");
        bert_id = id_of(bert);
        anna.received();
        anna.send("@Bert, tea?");
        const std::string id = field_of(last(anna, "said"), "id");
        anna.send("nobody");
        anna.send("/edit " + field_of(last(anna, "said"), "id") + " @Bert, or coffee?");
        CHECK(contains(last(anna, "edit"), "\"mentions\":[\"" + bert_id + "\"]"));
        bert.close();
    }
    TestClient carl = chat.connect("name=Bert");
    const std::string history = last(carl, "history");
    CHECK(id_of(carl) != bert_id);
    const std::string mention = "\"mentions\":[\"" + bert_id + "\"]";
    const std::size_t first = history.find(mention);
    REQUIRE(first != std::string::npos);
    CHECK(history.find(mention, first + 1) != std::string::npos);
}

TEST_CASE("a user never gets his own join or leave, even in an event of several users") {
    Fixture chat;
    chat.hub().limits.presence_window = 500ms;
    TestClient anna = chat.connect("name=Anna"), bert = chat.connect("name=Bert"), carl = chat.connect("name=Carl"),
               dora = chat.connect("name=Dora");
    for (TestClient* each : {&anna, &bert, &carl, &dora}) each->received();
    chat.server.advance(1s);
    const std::string for_bert = last(bert, "join"), for_dora = last(dora, "join"), for_anna = last(anna, "join");
    CHECK(contains(for_anna, "\"count\":4"));
    for (const char* name : {"Bert", "Carl", "Dora"}) CHECK(contains(for_anna, name));
    CHECK_FALSE(contains(for_bert, "Bert"));
    CHECK(contains(for_bert, "Carl"));
    CHECK_FALSE(contains(for_dora, "Dora"));
    // Of two who join at once, each hears of the other alone.
    chat.server.advance(10s);
    TestClient first = chat.connect("name=First"), emma = chat.connect("name=Emma"), finn = chat.connect("name=Finn");
    for (TestClient* each : {&emma, &finn}) each->received();
    chat.server.advance(1s);
    CHECK(field_of(last(emma, "join"), "name") == "Finn");
    CHECK(field_of(last(finn, "join"), "name") == "Emma");
}

TEST_CASE("a room sets how much of its history the store keeps") {
    Fixture chat;
    chat.hub().room_options = [](std::string_view name, ChatRoomOptions& options) {
        if (name == "tea") options.max_entries = 2;
    };
    TestClient anna = chat.connect("name=Anna"), bert = chat.connect("name=Bert", "hall");
    for (const char* text : {"one", "two", "three"}) {
        anna.send(text);
        bert.send(text);
    }
    for (const char* query : {"name=Carl", "name=Dora"}) {
        const bool tea = std::string(query) == "name=Carl";
        TestClient reader = chat.connect(query, tea ? "tea" : "hall");
        const std::string history = last(reader, "history");
        CHECK(contains(history, "\"one\"") != tea);
        CHECK(contains(history, "\"two\""));
    }
    chat.hub().room("tea").options.max_entries = 3;
    anna.send("four");
    TestClient reader = chat.connect("name=Emil");
    CHECK(contains(last(reader, "history"), "\"two\""));
}

TEST_CASE("a program erases the messages of a user by the public id, also of a guest") {
    Fixture chat;
    TestClient anna = chat.connect("name=Anna&key=anna-secret"), bert = chat.connect("name=Bert");
    anna.send("of Anna");
    bert.send("of Bert");
    anna.received();
    const auto erase = [&](const std::string& id) {
        std::optional<std::size_t> erased;
        std::string cause;
        // The store of this test does not erase.
        chat.hub().erase_user(id, [&](std::size_t count, const std::string& error) {
            erased = count;
            cause = error;
        });
        REQUIRE(erased.has_value());
        return std::to_string(*erased) + cause;
    };
    CHECK(erase(id_of(anna)) == "0this store cannot do that");
    TestServer server;
    server.route<ChatHandler>("/chat/{room}");
    TestClient cleo = server.connect("/chat/tea?name=Cleo&key=cleos-secret"), dora = server.connect("/chat/tea?name=Dora");
    cleo.send("of Cleo");
    cleo.send("more of Cleo");
    dora.send("of Dora");
    dora.received();
    std::size_t count = 0;
    const auto take = [&count](std::size_t erased, const std::string&) { count = erased; };
    ChatHub::of(server).erase_user(cleo.handler<ChatHandler>().user().id, take);
    CHECK(count == 2);
    server.run_until_idle();
    CHECK(dora.received().size() == 2);
    ChatHub::of(server).erase_user(dora.handler<ChatHandler>().user().id, take);
    CHECK(count == 1);
    ChatHub::of(server).erase_user("nobody", take);
    CHECK(count == 0);
}

TEST_SUITE_END();
