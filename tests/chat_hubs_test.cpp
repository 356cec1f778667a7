// Section 16 with several hubs: servers in memory that share a store. What one hub sends to another waits until the test
// lets that server work, so every order of events can be made.
#define WSCHAT_CHAT 1
#include <map>
#include <random>
#include <set>
#include "support.hpp"

using namespace wschat;
using namespace std::chrono_literals;
using test::contains;
using test::field_of;

namespace {

// May do everything.
struct Host : ChatHandler {
    bool may(ChatAction) override { return true; }
    std::optional<ChatUser> authenticate(const Request& request) override {
        if (const auto account = request.query("account")) return ChatUser{*account, "", true};
        return ChatHandler::authenticate(request);
    }
};

class Hubs {
public:
    explicit Hubs(std::size_t count) : Hubs(count, SharedStore(MemoryHistory())) {}
    Hubs(std::size_t count, const SharedStore& store) {
        for (std::size_t i = 0; i < count; ++i) {
            servers.push_back(std::make_unique<TestServer>());
            servers.back()->route<Host>("/chat/{room}");
            hub(i).set_store(store);
            hub(i).limits.connection = hub(i).limits.address = FloodRates();
            hub(i).limits.replies = hub(i).limits.address_replies = Rate();
            hub(i).limits.presence_window = Duration::zero();
            hub(i).limits.room_creations = hub(i).limits.address_room_creations = Rate();
        }
        run_until_idle();
    }

    ChatHub& hub(std::size_t i) { return ChatHub::of(*servers[i]); }
    // In the room "tea", unless the query begins with another one: "hall?name=Anna".
    TestClient connect(std::size_t i, const std::string& query) {
        const bool has_room = query.find('?') != std::string::npos;
        return servers[i]->connect("/chat/" + (has_room ? query : "tea?" + query));
    }
    // Lets all servers work until nothing is left to do.
    void run_until_idle() {
        for (int round = 0; round < 8; ++round)
            for (const auto& server : servers)
                if (server != nullptr) server->run_until_idle();
    }
    void advance(Duration duration) {
        run_until_idle();
        for (const auto& server : servers)
            if (server != nullptr) server->advance(duration);
        run_until_idle();
    }
    // "Anna Bert" of a room, by each hub that has the room, with the hubs that have other users: "Anna Bert | Anna".
    std::string users(const std::string& room = "tea") {
        std::vector<std::string> all;
        for (std::size_t i = 0; i < servers.size(); ++i) {
            if (servers[i] == nullptr) continue;
            const ChatRoom* const found = hub(i).find(room);
            if (found == nullptr) continue;
            std::string names;
            for (const ChatUser& user : found->users()) names += (names.empty() ? "" : " ") + user.name;
            if (std::find(all.begin(), all.end(), names) == all.end()) all.push_back(names);
        }
        std::string text;
        for (const std::string& each : all) text += (text.empty() ? "" : " | ") + each;
        return text;
    }

    std::vector<std::unique_ptr<TestServer>> servers;
};

// The types of all new events, without those of the beginning: "join nick leave".
std::string types(TestClient& client) {
    std::string all;
    for (const std::string& event : client.received()) {
        const std::string type = field_of(event, "type");
        if (type != "hello" && type != "users" && type != "history") all += (all.empty() ? "" : " ") + type;
    }
    return all;
}
// The last new event of the type, or "".
std::string last(TestClient& client, const std::string& type) {
    std::string found;
    for (const std::string& event : client.received())
        if (field_of(event, "type") == type) found = event;
    return found;
}
std::string own_name(TestClient& client) { return client.handler<Host>().user().name; }
std::string own_id(TestClient& client) { return client.handler<Host>().user().id; }

// A store of several hubs that keeps what this hub forwards, and says about others what the test wants.
class ScriptedStore final : public ChatStore {
public:
    explicit ScriptedStore(ScriptedStore*& self) { self = this; }
    void attach(Listener& listener, std::shared_ptr<Mailbox> mailbox) override {
        listener_ = &listener;
        history_.attach(listener, std::move(mailbox));
    }
    void append(ChatEntry entry) override { history_.append(std::move(entry)); }
    void forward(const ChatEntry& entry) override {
        forwarded += (forwarded.empty() ? "" : " ") + std::to_string(static_cast<int>(entry.kind)) + ":" + entry.name;
        if (entry.kind == ChatEntry::Kind::join) max_users += std::to_string(entry.max_users) + " ";
        if (delivering) listener_->on_entry(entry);
    }
    void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
               PageCallback callback) override {
        if (read) return callback(read(position));
        history_.since(room, std::move(position), limit, std::move(callback));
    }
    void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) override {
        history_.before(room, id, limit, std::move(callback));
    }
    void put(ChatFact fact) override { history_.put(std::move(fact)); }
    void facts(const std::string& scope, const std::string& key_prefix, FactsCallback callback) override {
        history_.facts(scope, key_prefix, std::move(callback));
    }
    bool watch(const std::string&) override {
        listener_->on_presence("tea", users);
        return true;
    }
    void unwatch(const std::string&) override { ++unwatched; }
    void heartbeat(const std::string& hub) override {
        ++beats;
        CHECK(hub == listener_->hub());
        CHECK(hub.size() == 16);
    }
    // Has a hundred parts.
    void export_room(const std::string&, ExportCallback callback, std::uint64_t after = 0) override {
        do ++exported;
        while (callback({std::to_string(++after) + " ", after == 100, "", after}) && after != 100);
    }
    // Somebody of another hub.
    static ChatEntry remote(ChatEntry::Kind kind, const std::string& name, const std::string& hub = "other hub") {
        ChatEntry entry;
        entry.kind = kind;
        entry.room = "tea";
        entry.name = name;
        entry.user = "id of " + name;
        entry.hub = hub;
        return entry;
    }
    std::string hub() const { return listener_->hub(); }
    void deliver(const ChatEntry& entry) { listener_->on_entry(entry); }
    void refuse(const ChatEntry& entry) { listener_->on_refused(entry, "name_taken"); }
    void present() { listener_->on_presence("tea", users); }
    void fail(const ChatEntry& entry) { listener_->on_failure(entry, "it is away"); }
    void move(const HistoryPage& page) { listener_->on_position("tea", page); }

    std::vector<ChatEntry> users;
    std::string forwarded, max_users;  // max_users of each join
    bool delivering = true;
    std::function<HistoryPage(const std::optional<HistoryPosition>&)> read;  // answers since() in place of the history
    int beats = 0, unwatched = 0, exported = 0;

private:
    MemoryHistory history_;
    Listener* listener_ = nullptr;
};

// A server whose chat has such a store.
struct Scripted {
    Scripted() {
        server.route<Host>("/chat/{room}");
        ChatHub::of(server).set_store(std::make_unique<ScriptedStore>(store));
        ChatHub::of(server).limits.presence_window = Duration::zero();
    }
    std::string users() {
        std::string names;
        for (const ChatUser& user : ChatHub::of(server).room("tea").users())
            names += (names.empty() ? "" : " ") + user.name;
        return names;
    }
    void deliver(const ChatEntry& entry) {
        store->deliver(entry);
        server.run_until_idle();
    }
    ScriptedStore* store = nullptr;
    TestServer server;
};

// Who is in a room, in the view of a client.
class View {
public:
    explicit View(TestClient client) : client_(std::move(client)) {}
    TestClient& client() { return client_; }

    // The new events.
    std::vector<std::string> events() {
        const std::vector<std::string> all = client_.received();
        for (const std::string& event : all) read(event);
        return all;
    }
    // "Anna Bert", in order.
    std::string names() {
        events();
        std::set<std::string> sorted;
        for (const auto& [id, name] : users_) sorted.insert(chat_fold(name) + "\n" + name);
        std::string all;
        for (const std::string& name : sorted) all += (all.empty() ? "" : " ") + name.substr(name.find('\n') + 1);
        return all;
    }
    std::size_t repeated() const { return repeated_; }

private:
    void read(const std::string& event) {
        const std::string type = field_of(event, "type"), user = field_of(event, "user");
        if (type == "hello") own_ = user;
        if (type == "users") {
            users_.clear();
            for (std::size_t at = event.find("{\"user\":"); at != std::string::npos;
                 at = event.find("{\"user\":", at + 1))
                users_[field_of(event.substr(at), "user")] = field_of(event.substr(at), "name");
        }
        const std::size_t list = event.find("{\"user\":");  // of several users
        if (type == "join" || type == "leave") {
            if (list == std::string::npos) change(type, user, field_of(event, "name"));
            for (std::size_t at = list; at != std::string::npos; at = event.find("{\"user\":", at + 1))
                change(type, field_of(event.substr(at), "user"), field_of(event.substr(at), "name"));
        }
        if (type == "nick" && users_.count(user) != 0) users_[user] = field_of(event, "name");
    }

    void change(const std::string& type, const std::string& user, const std::string& name) {
        if (type == "leave" ? users_.count(user) == 0 : user != own_ && users_.count(user) != 0) ++repeated_;
        if (type == "leave") users_.erase(user);
        else users_[user] = name;
    }

    TestClient client_;
    std::string own_;
    std::map<std::string, std::string> users_;  // names by ids
    std::size_t repeated_ = 0;                  // joins of users who are present, and leaves of others
};

}  // namespace

TEST_SUITE_BEGIN("chat");

TEST_CASE("users of several hubs are in one room: joins, messages, names, typing and leaves") {
    Hubs hubs(3);
    TestClient anna = hubs.connect(0, "name=Anna"), bert = hubs.connect(1, "name=Bert"),
               carl = hubs.connect(2, "name=Carl");
    hubs.run_until_idle();
    CHECK(hubs.users() == "Anna Bert Carl");
    CHECK(types(anna) == "join join");
    for (TestClient* each : {&bert, &carl}) each->received();
    bert.send("/tag t1 hello");
    hubs.run_until_idle();
    for (TestClient* each : {&anna, &bert, &carl}) {
        const std::string said = last(*each, "said");
        CHECK(field_of(said, "text") == "hello");
        CHECK(field_of(said, "tag") == (each == &bert ? "t1" : ""));
    }
    carl.send("/typing");
    hubs.run_until_idle();
    CHECK(types(anna) == "typing");
    CHECK(types(carl) == "");
    bert.send("/nick Berta");
    hubs.run_until_idle();
    CHECK(contains(last(carl, "nick"), "\"old\":\"Bert\",\"name\":\"Berta\""));
    CHECK(hubs.users() == "Anna Berta Carl");
    bert.close();
    hubs.run_until_idle();
    CHECK(types(carl) == "leave");
    CHECK(hubs.users() == "Anna Carl");
    carl.send("/who");
    CHECK(field_of(last(carl, "users"), "count") == "2");
}

TEST_CASE("a client from a server with newer entries gets no entry twice") {
    Scripted scripted;
    std::uint64_t newest = 1;
    const std::string epoch = "0123456789abcdef";
    const auto said = [](std::uint64_t id) {
        ChatEntry entry = ScriptedStore::remote(ChatEntry::Kind::said, "Carl");
        entry.id = id;
        entry.text = "text " + std::to_string(id);
        return entry;
    };
    scripted.store->read = [&](const std::optional<HistoryPosition>& position) {
        HistoryPage page;
        page.epoch = epoch;
        page.last_id = newest;
        for (std::uint64_t id = position ? position->id + 1 : 1; id <= newest; ++id) page.entries.push_back(said(id));
        return page;
    };
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna");
    CHECK(contains(last(anna, "history"), "\"last\":1"));
    newest = 3;  // the members here have got the first one only
    TestClient bert = scripted.server.connect("/chat/tea?name=Bert&last=" + epoch + "-3");
    CHECK(last(bert, "history") == "");
    SUBCASE("it waits until the members have the same") {
        scripted.deliver(said(2));
        CHECK(types(bert) == "");
        scripted.deliver(said(3));
    }
    SUBCASE("it goes on when the store says that nothing is missing") {
        HistoryPage page;
        page.epoch = epoch;
        page.last_id = 3;
        scripted.store->move(page);
        scripted.server.run_until_idle();
    }
    const std::vector<std::string> received = bert.received();
    REQUIRE(received.size() >= 1);
    CHECK(field_of(received.back(), "type") == "history");
    CHECK(contains(received.back(), "\"last\":3"));
    CHECK(contains(received.back(), "\"entries\":[]"));
    scripted.deliver(said(3));
    CHECK(types(bert) == "");
    scripted.deliver(said(4));
    CHECK(field_of(last(bert, "said"), "text") == "text 4");
}

TEST_CASE("a position without a gap removes no entry that the members have") {
    Scripted scripted;
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna");
    for (const char* text : {"one", "two"}) anna.send(text);
    anna.received();
    HistoryPage page;
    page.epoch = "fedcba9876543210";
    page.last_id = 1;
    scripted.store->move(page);
    scripted.server.run_until_idle();
    CHECK(contains(last(anna, "history"), "\"last\":2"));
    ChatEntry entry = ScriptedStore::remote(ChatEntry::Kind::said, "Carl");
    entry.id = 2;
    scripted.deliver(entry);
    CHECK(types(anna) == "");
}

// Keeps the messages "one", "two" and "three" in a room that is empty then. The store cannot be read until its `read`
// is reset. Returns the epoch.
std::string say_three_and_lock(Scripted& scripted) {
    TestClient first = scripted.server.connect("/chat/tea?name=Carl");
    const std::string epoch = field_of(last(first, "history"), "epoch");
    for (const char* text : {"one", "two", "three"}) first.send(text);
    first.close();
    scripted.server.advance(10s);
    REQUIRE(ChatHub::of(scripted.server).find("tea") == nullptr);
    scripted.store->read = [](const std::optional<HistoryPosition>&) {
        HistoryPage page;
        page.error = "it is away";
        return page;
    };
    return epoch;
}
// The new messages of these four, also those in histories, which must have no gap.
std::string texts_without_gap(TestClient& client) {
    std::string all;
    for (const std::string& event : client.received()) {
        if (field_of(event, "type") == "history") CHECK(contains(event, R"("gap":false)"));
        for (const char* text : {"one", "two", "three", "four"})
            if (contains(event, "\"text\":\"" + std::string(text))) all += text + std::string(" ");
    }
    return all;
}

TEST_CASE("a client that resumed while the store could not be read gets all missing entries later, once and without a gap") {
    Scripted scripted;
    ScriptedStore& store = *scripted.store;
    const std::string epoch = say_three_and_lock(scripted);
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna&last=" + epoch + "-1");
    CHECK(field_of(last(anna, "history"), "last") == "1");
    TestClient dora = scripted.server.connect("/chat/tea?name=Dora");
    CHECK(contains(last(dora, "history"), R"("gap":true)"));
    store.read = nullptr;
    TestClient bert = scripted.server.connect("/chat/tea?name=Bert");
    bert.send("four");

    CHECK(texts_without_gap(anna) == "two three four ");
    CHECK(anna.handler<Host>().current_room() != nullptr);
    // One without a position gets the newest messages. Its empty history before was announced as a gap, too.
    const std::string found = last(dora, "history");
    CHECK(contains(found, R"("gap":true)"));
    CHECK(contains(found, "three"));
}

TEST_CASE("members whose histories could not be read read them when the store knows its position again") {
    Scripted scripted;
    ScriptedStore& store = *scripted.store;
    const std::string epoch = say_three_and_lock(scripted);
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna&last=" + epoch + "-1");
    TestClient dora = scripted.server.connect("/chat/tea?name=Dora");
    for (TestClient* each : {&anna, &dora}) CHECK(contains(last(*each, "history"), R"("gap":true)"));
    store.read = nullptr;
    HistoryPage position;
    position.epoch = epoch;
    position.last_id = 3;
    store.move(position);
    scripted.server.run_until_idle();
    anna.send("four");

    CHECK(texts_without_gap(anna) == "two three four ");
    CHECK(texts_without_gap(dora) == "one two three four ");
    store.move(position);
    CHECK(texts_without_gap(anna) == "");
}

TEST_CASE("a join or a leave that the store has lost is forwarded again") {
    Scripted scripted;
    scripted.store->delivering = false;
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna"), bert = scripted.server.connect("/chat/tea?name=Bert");
    ChatEntry join = ScriptedStore::remote(ChatEntry::Kind::join, "Anna");
    const std::string hub = scripted.store->hub();
    scripted.store->fail(join);
    scripted.store->forwarded.clear();
    scripted.store->present();
    const std::string kind = std::to_string(static_cast<int>(ChatEntry::Kind::join));
    CHECK(scripted.store->forwarded == kind + ":Anna " + kind + ":Bert");
    for (const TestClient* each : {&anna, &bert}) {
        join = ScriptedStore::remote(ChatEntry::Kind::join, each == &anna ? "Anna" : "Bert", hub);
        join.user = each == &anna ? own_id(anna) : own_id(bert);
        scripted.store->deliver(join);
        scripted.store->users.push_back(join);
    }
    CHECK(scripted.users() == "Anna Bert");
    bert.close();
    scripted.store->forwarded.clear();
    scripted.store->present();  // Bert is still in the list
    CHECK(scripted.store->forwarded == "");
    scripted.server.advance(2s);
    CHECK(scripted.store->forwarded == std::to_string(static_cast<int>(ChatEntry::Kind::leave)) + ":Bert");
}

TEST_CASE("if two users join with one name at once, the first in the order of the store gets it") {
    Hubs hubs(3);
    TestClient one = hubs.connect(1, "name=Anna&key=first-secret"), two = hubs.connect(2, "name=Anna&key=other-secret");
    hubs.run_until_idle();
    CHECK(own_name(one) == "Anna");
    CHECK(own_name(two) == "Anna-2");
    CHECK(contains(last(two, "nick"), "\"old\":\"Anna\",\"name\":\"Anna-2\""));
    CHECK(types(one) == "join");
    CHECK(hubs.users() == "Anna Anna-2");

    // A third and a fourth one, and both have been refused once.
    TestClient three = hubs.connect(1, "name=anna&key=third-secret"),
               four = hubs.connect(2, "name=ANNA&key=last-secret");
    hubs.run_until_idle();
    CHECK(hubs.users() == "Anna Anna-2 anna-3 ANNA-4");
}

TEST_CASE("if two users enter a room with one free place at once, the first in the order of the store gets it") {
    Hubs hubs(3);
    for (std::size_t i = 0; i < 3; ++i)
        hubs.hub(i).room_options = [](std::string_view, ChatRoomOptions& options) { options.max_users = 2; };
    TestClient anna = hubs.connect(0, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    TestClient bert = hubs.connect(1, "name=Bert"), carl = hubs.connect(2, "name=Carl");
    hubs.run_until_idle();
    CHECK(hubs.users() == "Anna Bert");
    CHECK(types(bert) == "");
    const std::vector<std::string> events = carl.received();
    REQUIRE(events.size() >= 3);
    const std::string& error = events[events.size() - 2];
    CHECK(field_of(error, "code") == "room_full");
    CHECK(field_of(error, "room") == "tea");
    CHECK(contains(events.back(), "\"type\":\"room\",\"room\":null"));
    CHECK(hubs.hub(2).find("tea") == nullptr);

    // A further connection of a user who is there, on any hub.
    TestClient tab = hubs.connect(2, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    CHECK(types(tab) == "");
    CHECK(hubs.users() == "Anna Bert");

    // The refused client stays connected, and gets the next free place. The others hear only of that.
    CHECK(types(anna) == "join");
    bert.close();
    hubs.run_until_idle();
    carl.send("/join tea");
    hubs.run_until_idle();
    CHECK(hubs.users() == "Anna Carl");
    CHECK(types(anna) == "leave join");
}

TEST_CASE("the hub with the store also refuses a user for whom a room has no place") {
    Hubs hubs(2);
    for (std::size_t i = 0; i < 2; ++i)
        hubs.hub(i).room_options = [](std::string_view, ChatRoomOptions& options) { options.max_users = 1; };
    TestClient anna = hubs.connect(1, "name=Anna");
    hubs.run_until_idle();
    // This hub does not know the room before its first user enters it.
    TestClient bert = hubs.connect(0, "name=Bert");
    hubs.run_until_idle();
    CHECK(contains(last(bert, "error"), "room_full"));
    CHECK(hubs.users() == "Anna");
    CHECK(hubs.hub(0).room_count() == 0);
    anna.close();
    hubs.run_until_idle();
    bert.send("/join tea");
    hubs.run_until_idle();
    CHECK(hubs.users() == "Bert");
}

TEST_CASE("a limit of users that becomes lower removes nobody, also if the store has lost them") {
    Scripted scripted;
    ChatHub::of(scripted.server).room_options = [](std::string_view, ChatRoomOptions& options) {
        options.max_users = 2;
    };
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna");
    TestClient bert = scripted.server.connect("/chat/tea?name=Bert");
    CHECK(scripted.store->max_users == "2 2 ");
    ChatHub::of(scripted.server).room("tea").options.max_users = 1;
    scripted.store->max_users.clear();
    scripted.store->present();  // nobody
    CHECK(scripted.store->max_users == "0 0 ");
    TestClient carl = scripted.server.connect("/chat/tea?name=Carl");
    CHECK(contains(last(carl, "error"), "room_full"));
}

TEST_CASE("if two users take one name at once, the second gets an error with its tag") {
    Hubs hubs(3);
    TestClient one = hubs.connect(1, "name=Anna"), two = hubs.connect(2, "name=Bert");
    hubs.run_until_idle();
    two.received();
    one.send("/tag t1 /nick Cleo");
    two.send("/tag t2 /nick cleo");
    hubs.run_until_idle();
    CHECK(hubs.users() == "Bert Cleo");
    const std::string error = last(two, "error");
    CHECK(field_of(error, "code") == "name_taken");
    CHECK(field_of(error, "tag") == "t2");
    CHECK(own_name(two) == "Bert");
}

TEST_CASE("an account takes its name on all hubs, and a user of another hub gets a new one") {
    Hubs hubs(3);
    TestClient guest = hubs.connect(2, "name=Holly");
    hubs.run_until_idle();
    guest.received();
    TestClient account = hubs.connect(1, "account=Holly");
    hubs.run_until_idle();
    CHECK(own_name(account) == "Holly");
    CHECK(own_name(guest) == "Holly-2");
    CHECK(hubs.users() == "Holly Holly-2");
    CHECK(field_of(last(guest, "nick"), "name") == "Holly-2");
}

TEST_CASE("a user with connections to several hubs is one user, who joins and leaves once") {
    Hubs hubs(3);
    View watcher(hubs.connect(0, "name=Watcher"));
    hubs.run_until_idle();
    TestClient desk = hubs.connect(1, "name=Anna&key=anna-secret"), phone = hubs.connect(2, "name=Ann&key=anna-secret");
    hubs.run_until_idle();
    CHECK(watcher.names() == "Anna Watcher");
    CHECK(own_name(phone) == "Anna");
    CHECK(field_of(last(phone, "nick"), "old") == "Ann");
    phone.send("/nick Annabel");
    hubs.run_until_idle();
    CHECK(own_name(desk) == "Annabel");
    CHECK(field_of(last(desk, "nick"), "name") == "Annabel");
    desk.hang_up();
    hubs.advance(10s);
    CHECK(watcher.names() == "Annabel Watcher");
    phone.close();
    hubs.run_until_idle();
    CHECK(watcher.names() == "Watcher");
    CHECK(watcher.repeated() == 0);
}

TEST_CASE("a reload on another hub within the grace period does not cause a leave") {
    Hubs hubs(3);
    TestClient watcher = hubs.connect(0, "name=Watcher"), anna = hubs.connect(1, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    watcher.received();
    anna.hang_up();
    hubs.advance(2s);
    TestClient again = hubs.connect(2, "name=Anna&key=anna-secret");
    hubs.advance(10s);
    CHECK(types(watcher) == "");
    CHECK(hubs.users() == "Anna Watcher");
    again.hang_up();
    hubs.advance(2s);
    CHECK(types(watcher) == "");
    hubs.advance(2s);
    CHECK(types(watcher) == "leave");
    CHECK(hubs.users() == "Watcher");
}

TEST_CASE("a user who leaves has left at once, also if another hub has just lost a connection of the user") {
    Hubs hubs(3);
    TestClient watcher = hubs.connect(0, "name=Watcher"), lost = hubs.connect(1, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    lost.hang_up();
    hubs.run_until_idle();
    TestClient again = hubs.connect(2, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    watcher.received();
    SUBCASE("by a close with 1000") { again.close(); }
    SUBCASE("by /leave") { again.send("/leave"); }
    hubs.run_until_idle();
    CHECK(types(watcher) == "leave");
    CHECK(hubs.users() == "Watcher");
    hubs.advance(10s);
    CHECK(types(watcher) == "");
}

TEST_CASE("a user with a connection to another hub stays, whatever connections are lost or leave") {
    Hubs hubs(3);
    TestClient watcher = hubs.connect(0, "name=Watcher"), stays = hubs.connect(0, "name=Anna&key=anna-secret"),
               lost = hubs.connect(1, "name=Anna&key=anna-secret"), leaves = hubs.connect(2, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    watcher.received();
    lost.hang_up();
    hubs.run_until_idle();
    leaves.close();
    hubs.advance(10s);
    CHECK(types(watcher) == "");
    CHECK(hubs.users() == "Anna Watcher");
    stays.close();
    hubs.run_until_idle();
    CHECK(types(watcher) == "leave");
}

TEST_CASE("a guest who reloads on another hub has the name again") {
    Hubs hubs(3);
    TestClient anna = hubs.connect(1, "name=Anna"), bert = hubs.connect(0, "name=Bert");
    hubs.run_until_idle();
    bert.received();
    anna.hang_up();
    hubs.run_until_idle();
    TestClient again = hubs.connect(2, "name=Anna");
    hubs.advance(10s);
    CHECK(own_name(again) == "Anna");
    CHECK(types(bert) == "leave join");
    CHECK(hubs.users() == "Anna Bert");
}

TEST_CASE("a private message reaches the receiver on each hub, and its tag counts once") {
    Hubs hubs(3);
    TestClient anna = hubs.connect(1, "name=Anna"), bert = hubs.connect(2, "name=Bert&key=bert-secret"),
               phone = hubs.connect(0, "name=Bert&key=bert-secret"), carl = hubs.connect(0, "name=Carl");
    hubs.run_until_idle();
    for (TestClient* each : {&anna, &bert, &phone, &carl}) each->received();
    anna.send("/tag t1 /msg Bert psst");
    hubs.run_until_idle();
    for (TestClient* each : {&anna, &bert, &phone}) CHECK(field_of(last(*each, "private"), "text") == "psst");
    CHECK(types(carl) == "");
    anna.send("/tag t1 /msg Bert psst");
    hubs.run_until_idle();
    CHECK(types(anna) == "ack");
    CHECK(types(bert) == "");
    bert.hang_up();
    phone.hang_up();
    hubs.run_until_idle();
    anna.send("/msg Bert psst");
    CHECK(field_of(last(anna, "error"), "code") == "user_away");
}

TEST_CASE("a kept private message reaches all hubs, also by the id of the receiver") {
    Hubs hubs(3);
    TestClient anna = hubs.connect(1, "name=Anna&key=anna-secret"),
               bert = hubs.connect(2, "hall?name=Bert&key=bert-secret");
    hubs.run_until_idle();
    bert.received();
    anna.send("/tag t1 /msg @" + bert.handler<Host>().user().id + " psst");
    hubs.run_until_idle();
    CHECK(field_of(last(bert, "private"), "text") == "psst");
    CHECK(field_of(last(anna, "private"), "tag") == "t1");
    anna.send("/tag t1 /msg @" + bert.handler<Host>().user().id + " psst");
    hubs.run_until_idle();
    CHECK(types(anna) == "ack");
}

TEST_CASE("kicks, mutes and bans apply to all hubs") {
    Hubs hubs(3);
    TestClient host = hubs.connect(1, "account=Holly"), desk = hubs.connect(0, "name=Anna&key=anna-secret"),
               phone = hubs.connect(2, "name=Anna&key=anna-secret"), guest = hubs.connect(2, "name=Gus");
    hubs.run_until_idle();
    host.send("/mute Anna 60");
    hubs.run_until_idle();
    desk.received();
    desk.send("hello");
    phone.send("hello");
    CHECK(field_of(last(desk, "error"), "code") == "muted");
    CHECK(field_of(last(phone, "error"), "code") == "muted");
    host.send("/kick Anna");
    hubs.run_until_idle();
    CHECK_FALSE(desk.is_open());
    CHECK_FALSE(phone.is_open());
    CHECK(hubs.users() == "Gus Holly");

    TestClient again = hubs.connect(0, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    host.send("/ban Anna 60");
    hubs.run_until_idle();
    CHECK_FALSE(again.is_open());
    TestClient renamed = hubs.connect(2, "name=Zoe&key=anna-secret");
    hubs.run_until_idle();
    CHECK(renamed.response().status() == 403);
    hubs.hub(0).ban("Gus", 1h);
    hubs.run_until_idle();
    CHECK_FALSE(guest.is_open());
    hubs.hub(2).ban("Gus", 0s);
    hubs.run_until_idle();
    TestClient forgiven = hubs.connect(1, "name=Gus");
    hubs.run_until_idle();
    CHECK(forgiven.is_open());
}

TEST_CASE("the address of a banned guest is banned on all hubs, unless a hub has others with that address") {
    Hubs hubs(3);
    const auto connect = [&](std::size_t hub, const std::string& name, const std::string& address) {
        return hubs.servers[hub]->connect(TestRequest("/chat/tea?name=" + name).address(address));
    };
    TestClient gus = connect(2, "Gus", "192.0.2.1"), neighbour = connect(1, "Nora", "192.0.2.1"),
               lone = connect(2, "Lou", "192.0.2.2");
    hubs.run_until_idle();
    hubs.hub(0).ban("Gus", 1h);
    hubs.hub(0).ban("Lou", 1h);
    hubs.advance(2s);
    CHECK_FALSE(gus.is_open());
    CHECK_FALSE(lone.is_open());
    CHECK(neighbour.is_open());
    TestClient other = connect(0, "Carl", "192.0.2.1"), again = connect(1, "Carla", "192.0.2.2");
    hubs.run_until_idle();
    CHECK(other.is_open());
    CHECK(again.response().status() == 403);
}

TEST_CASE("a hub with its first member of a room has the users, and /rooms lists the rooms of all hubs") {
    Hubs hubs(3);
    TestClient anna = hubs.connect(1, "name=Anna"), bert = hubs.connect(2, "hall?name=Bert");
    hubs.run_until_idle();
    CHECK(hubs.hub(0).find("tea") == nullptr);
    TestClient carl = hubs.connect(0, "name=Carl"), dora = hubs.connect(1, "hall?name=Dora");
    hubs.run_until_idle();
    CHECK(hubs.users("tea") == "Anna Carl");
    CHECK(hubs.users("hall") == "Bert Dora");
    CHECK(View(dora).names() == "Bert Dora");
    carl.send("/tag t1 /rooms");
    hubs.run_until_idle();
    CHECK(last(carl, "rooms") ==
          R"({"type":"rooms","rooms":[{"room":"hall","users":2},{"room":"tea","users":2}],"tag":"t1"})");
    bert.close();
    hubs.run_until_idle();
    CHECK(hubs.hub(2).find("hall") == nullptr);
    CHECK(hubs.users("hall") == "Dora");
}

TEST_CASE("the users of a hub that ends leave once, also if they are in the grace period") {
    Hubs hubs(3);
    View watcher(hubs.connect(0, "name=Watcher"));
    TestClient anna = hubs.connect(1, "name=Anna"), bert = hubs.connect(1, "name=Bert&key=bert-secret"),
               tab = hubs.connect(2, "name=Bert&key=bert-secret"), carl = hubs.connect(1, "name=Carl&key=carl-secret");
    carl.hang_up();
    hubs.run_until_idle();
    CHECK(watcher.names() == "Anna Bert Carl Watcher");
    hubs.servers[1].reset();
    hubs.run_until_idle();
    CHECK(watcher.names() == "Bert Watcher");
    CHECK(watcher.repeated() == 0);
    CHECK(hubs.users() == "Bert Watcher");
}

TEST_CASE("on_event is called once for each event on the first hub, also for rooms without members there") {
    SharedStore store{MemoryHistory()};
    Hubs hubs(3, store);
    std::string seen;
    hubs.hub(0).on_event = [&](const ChatEntry& entry) {
        seen += std::to_string(static_cast<int>(entry.kind)) + ":" + entry.name + " ";
    };
    TestClient desk = hubs.connect(1, "name=Anna&key=anna-secret"),
               phone = hubs.connect(2, "name=Anna&key=anna-secret");
    hubs.run_until_idle();
    desk.send("hello");
    hubs.run_until_idle();
    desk.close();
    hubs.run_until_idle();
    phone.hang_up();
    hubs.advance(10s);
    CHECK(seen == "34:Anna 0:Anna 35:Anna ");
}

TEST_CASE("a server with three loops has one chat, with one store, the same limits, and hooks on the first loop") {
    constexpr std::size_t count = 9;
    ServerOptions options;
    options.threads = 3;
    test::RunningServer server(options);
    server.server.route<Host>("/chat/{room}");
    std::map<ChatEntry::Kind, std::size_t> seen;
    {
        ChatHub& hub = ChatHub::of(server.server);
        hub.set_store(MemoryHistory());
        hub.limits.max_text = 100;
        hub.on_event = [&](const ChatEntry& entry) {
            CHECK(server.server.loop_number() == 0);
            ++seen[entry.kind];
        };
    }
    server.start();
    std::vector<std::unique_ptr<test::WsClient>> clients;
    for (std::size_t i = 0; i < count; ++i)
        clients.push_back(
            std::make_unique<test::WsClient>(server.port(), "/chat/tea?name=Anna&key=secret-of-" + std::to_string(i)));
    for (std::size_t i = 0; i < count; ++i) {
        const std::string text = "I am number " + std::to_string(i);
        clients[i]->send(text);
        for (const auto& each : clients) CHECK(contains(test::next_with(*each, text), "\"said\""));
    }
    std::set<std::string> all;
    for (const auto& each : clients) {
        each->send("/tag who /who");
        const std::string users = test::next_with(*each, "\"tag\":\"who\"");
        CHECK(field_of(users, "count") == std::to_string(count));
        CHECK(contains(users, "\"Anna\""));
        CHECK(contains(users, "\"Anna-9\""));
        all.insert(users);
        each->send(std::string(101, 'x'));
        CHECK(contains(test::next_with(*each, "too_long"), "at most 100 bytes"));
    }
    CHECK(all.size() == 1);
    clients.clear();
    server.stop();
    CHECK(seen[ChatEntry::Kind::join] == count);
    CHECK(seen[ChatEntry::Kind::said] == count);
}

TEST_CASE("the number of rooms and the limits of an address count for all loops together") {
    ServerOptions options;
    options.threads = 3;
    test::RunningServer server(options);
    server.server.route<Host>("/chat/{room}");
    {
        ChatLimits& limits = ChatHub::of(server.server).limits;
        limits.max_rooms = 4;
        limits.address.messages = {0.001, 10};
        limits.address_room_creations = {0.001, 4};
    }
    server.start();
    std::vector<std::unique_ptr<test::WsClient>> clients;
    const auto connect = [&](const std::string& room) -> test::WsClient& {
        clients.push_back(std::make_unique<test::WsClient>(server.port(), "/chat/" + room));
        return *clients.back();
    };
    for (int i = 0; i < 4; ++i) CHECK(contains(test::next_with(connect("room" + std::to_string(i)), "history"), "room"));
    for (int i = 0; i < 3; ++i) CHECK(contains(test::next_with(connect("more"), "room_limit"), "too many rooms."));
    for (int i = 0; i < 3; ++i) CHECK(contains(test::next_with(connect("room1"), "history"), "room1"));
    for (std::size_t i = 0; i < 12; ++i) {
        test::WsClient& client = *clients[i % 4];
        const std::string tag = "tag" + std::to_string(100 + i);
        client.send("/tag " + tag + " hello");
        CHECK(field_of(test::next_with(client, tag), "type") == (i < 10 ? "said" : "error"));
    }
    // When the users of a room have left, there may be another one. But the address has opened four.
    clients[0]->close();
    std::string refusal = "too many rooms.";
    for (int i = 0; i < 1000 && contains(refusal, "too many rooms."); ++i)
        refusal = test::next_with(connect("other"), "room_limit");
    CHECK(contains(refusal, "You have opened too many rooms."));
    clients.clear();
    server.stop();
}

TEST_CASE("a user who may not create a room enters a room that has a user on another loop") {
    struct Visitor : Host {
        bool may(ChatAction action) override {
            return action != ChatAction::create_room || request().query("name") == "Anna";
        }
    };
    ServerOptions options;
    options.threads = 3;
    test::RunningServer server(options);
    server.server.route<Visitor>("/chat/{room}");
    server.start();
    test::WsClient anna(server.port(), "/chat/tea?name=Anna");
    test::next_with(anna, "history");
    for (int i = 0; i < 3; ++i) {
        test::WsClient bert(server.port(), "/chat/Tea?name=Bert"), carl(server.port(), "/chat/hall?name=Carl");
        CHECK(contains(test::next_with(bert, "history"), "tea"));
        CHECK(contains(test::next_with(carl, "forbidden"), "hall"));
    }
    server.stop();
}

TEST_CASE("an export to another hub reads a part when that hub has taken the previous one") {
    ScriptedStore* store = nullptr;
    Hubs hubs(2, SharedStore(std::make_unique<ScriptedStore>(store)));
    for (const std::size_t hub : {0u, 1u}) {
        CAPTURE(hub);
        store->exported = 0;
        int taken = 0;
        std::string lines;
        hubs.hub(hub).store().export_room("tea", [&](const HistoryExport& part) {
            CHECK(store->exported == ++taken);
            lines += part.lines;
            return taken != 5;
        });
        for (int i = 0; i < 200 && taken < 5; ++i) hubs.run_until_idle();
        hubs.run_until_idle();
        CHECK(lines == "1 2 3 4 5 ");
        CHECK(store->exported == 5);
    }
}

TEST_CASE("a hub beats every two seconds after it has watched a room, and stops watching a room without users") {
    Scripted scripted;
    CHECK(scripted.store->beats == 0);
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna");
    CHECK(scripted.store->beats == 1);
    scripted.server.advance(10s);
    CHECK(scripted.store->beats == 6);
    anna.close();
    CHECK(scripted.store->unwatched == 1);
}

TEST_CASE("all hubs use the first member's spelling of a room's name, until the room is empty") {
    Hubs hubs(2);
    TestClient anna = hubs.connect(0, "Tea%20Room?name=Anna");
    hubs.run_until_idle();
    TestClient bert = hubs.connect(1, "TEA%20room?name=Bert");
    hubs.run_until_idle();
    CHECK(field_of(last(bert, "hello"), "room") == "Tea Room");
    bert.send("hello");
    hubs.run_until_idle();
    CHECK(field_of(last(anna, "said"), "room") == "Tea Room");
    TestClient carl = hubs.connect(1, "hall?name=Carl");
    hubs.run_until_idle();
    carl.send("/rooms");
    hubs.run_until_idle();
    CHECK(contains(last(carl, "rooms"), R"({"room":"Tea Room","users":2})"));
    anna.close();
    hubs.advance(10s);
    CHECK(hubs.hub(0).room_count() == 0);
    TestClient dora = hubs.connect(0, "tea%20room?name=Dora");  // Bert is still there
    CHECK(field_of(last(dora, "hello"), "room") == "Tea Room");
    dora.close();
    bert.close();
    hubs.advance(10s);
    TestClient emma = hubs.connect(0, "TEA%20ROOM?name=Emma");
    CHECK(field_of(last(emma, "hello"), "room") == "TEA ROOM");
}

TEST_CASE("if the store loses users, their hub forwards them again, and all others have left") {
    using Kind = ChatEntry::Kind;
    Scripted scripted;
    ScriptedStore& store = *scripted.store;
    store.users = {ScriptedStore::remote(Kind::join, "Bert"), ScriptedStore::remote(Kind::join, "Carl")};
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna");
    CHECK(scripted.users() == "Anna Bert Carl");
    CHECK(store.forwarded == "34:Anna");
    anna.received();
    store.users.clear();
    store.present();
    CHECK(store.forwarded == "34:Anna 34:Anna");
    scripted.server.advance(1s);
    store.deliver(ScriptedStore::remote(Kind::join, "Carl"));
    CHECK(types(anna) == "");
    scripted.server.advance(2s);
    CHECK(types(anna) == "leave");
    CHECK(scripted.users() == "Anna Carl");

    // A list with another name for Carl, and with somebody who is away.
    store.users = {ScriptedStore::remote(Kind::join, "Carla"), ScriptedStore::remote(Kind::away, "Dora")};
    store.users[0].user = "id of Carl";
    store.present();
    scripted.server.run_until_idle();
    CHECK(types(anna) == "nick join");
    CHECK(scripted.users() == "Anna Carla Dora");
    anna.send("/msg Dora psst");
    CHECK(field_of(last(anna, "error"), "code") == "user_away");
}

TEST_CASE("a user whose hub the store has removed while the connection was lost leaves once") {
    using Kind = ChatEntry::Kind;
    Scripted scripted;
    ScriptedStore& store = *scripted.store;
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna"),
               bert = scripted.server.connect("/chat/tea?name=Bert&key=bert-secret");
    anna.received();
    bert.hang_up();
    store.present();
    store.deliver(ScriptedStore::remote(Kind::leave, "Nobody"));
    scripted.server.advance(10s);
    CHECK(types(anna) == "leave");
    CHECK(scripted.users() == "Anna");
    CHECK(scripted.server.exceptions().empty());
}

TEST_CASE("a name that the store refuses is tried once more, and then changed") {
    Scripted scripted;
    ScriptedStore& store = *scripted.store;
    store.delivering = false;
    TestClient anna = scripted.server.connect("/chat/tea?name=Anna");
    anna.received();
    const std::string id = anna.handler<Host>().user().id;
    for (int i = 0; i < 3; ++i) {
        ChatEntry join = ScriptedStore::remote(ChatEntry::Kind::join, own_name(anna));
        join.user = id;
        store.refuse(join);
    }
    CHECK(store.forwarded == "34:Anna 34:Anna 34:Anna-2 34:Anna-2");
    scripted.server.run_until_idle();
    CHECK(types(anna) == "nick");
    CHECK(scripted.users() == "");
    store.delivering = true;
    ChatEntry join = ScriptedStore::remote(ChatEntry::Kind::join, "Anna-3");
    join.user = id;
    store.deliver(join);
    CHECK(own_name(anna) == "Anna-3");
    CHECK(scripted.users() == "Anna-3");
}

TEST_CASE("after joins, leaves, reloads, renames and kicks in any order, all hubs and clients agree") {
    for (unsigned seed = 1; seed <= 40; ++seed) {
        CAPTURE(seed);
        std::mt19937 random(seed);
        const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random()) % n; };
        Hubs hubs(3);
        const bool at_once = seed % 2 == 0;              // or joins and leaves come together
        const std::size_t limit = seed % 4 < 2 ? 2 : 0;  // of users in the hall
        for (std::size_t i = 0; i < 3; ++i)
            hubs.hub(i).room_options = [limit](std::string_view name, ChatRoomOptions& options) {
                if (name == "hall") options.max_users = limit;
            };
        for (std::size_t i = 0; i < 3 && !at_once; ++i) hubs.hub(i).limits.presence_window = 500ms;
        struct Client {
            View view;
            std::string room, key;
            bool refused = false;
            // Whether it is in its room.
            bool is_in() {
                for (const std::string& event : view.events()) refused = refused || contains(event, "room_full");
                return !refused && view.client().is_open();
            }
        };
        std::vector<Client> clients;
        const std::vector<std::string> names{"Anna", "anna", "Bert", "Carl"}, rooms{"tea", "hall"};
        for (int step = 0; step < 120; ++step) {
            const std::size_t what = below(12), hub = below(3);
            if (what < 4 || clients.empty()) {
                const std::string room = rooms[below(2)], name = names[below(4)];
                const std::string key = below(3) == 0 ? "" : "secret-of-" + std::to_string(below(5));
                const bool account = below(8) == 0;
                const std::string query = account ? "account=" + name : "name=" + name + "&key=" + key;
                clients.push_back(
                    {View(hubs.connect(hub, room + "?" + query)), room, account ? "account " + name : key});
            } else if (what < 8) {
                Client& client = clients[below(clients.size())];
                if (what == 4) client.view.client().hang_up();
                else if (what == 5) client.view.client().close();
                else if (what == 6) client.view.client().send("/nick " + names[below(4)] + std::to_string(below(3)));
                else client.view.client().send("/kick " + names[below(4)]);
            } else if (what < 11) {
                hubs.servers[hub]->run_until_idle();
            } else {
                hubs.servers[hub]->advance(std::chrono::milliseconds(1 + below(2500)));
            }
        }
        hubs.advance(10s);
        hubs.advance(1s);
        for (const std::string& room : rooms) {
            CAPTURE(room);
            std::set<std::string> expected;
            std::size_t guests = 0;
            for (Client& each : clients) {
                if (each.room != room || !each.is_in()) continue;
                if (each.key.empty()) ++guests;
                else expected.insert(each.key);
            }
            const std::string users = hubs.users(room);
            CHECK_FALSE(contains(users, "|"));
            const auto count = users.empty() ? 0 : std::count(users.begin(), users.end(), ' ') + 1;
            CHECK(static_cast<std::size_t>(count) == expected.size() + guests);
            if (room == "hall" && limit != 0) CHECK(static_cast<std::size_t>(count) <= limit);
            for (Client& each : clients) {
                if (each.room != room || !each.is_in()) continue;
                CHECK(each.view.names() == users);
                if (at_once) CHECK(each.view.repeated() == 0);
            }
        }
        for (Client& each : clients) each.view.client().hang_up();
        hubs.advance(10s);
        for (std::size_t i = 0; i < 3; ++i) {
            CHECK(hubs.hub(i).room_count() == 0);
            CHECK(hubs.servers[i]->exceptions().empty());
        }
    }
}

TEST_SUITE_END();
