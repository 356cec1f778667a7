// The chat: several users in several rooms send commands, resume, moderate and vanish, while the store answers late, in
// another order, or not well. Each client has a model of what it may get. Every kept entry must come once, in the order
// of its room, to the members of that room alone. Each line with a tag must have an answer.
//
// Input: two bytes for the options, then steps. A step begins with a byte for its kind (see Script::step()); a byte
// selects the client, the room, the words. In the end all faults stop, and the model must equal the state of the chat.
#define WSCHAT_CHAT 1
#include "fuzz.hpp"

#include <deque>
#include <map>
#include <set>

namespace {

using namespace fuzz;
using namespace std::chrono_literals;
using wschat::ChatAction;
using wschat::ChatEntry;
using wschat::ChatFact;
using wschat::ChatHub;
using wschat::ChatRoom;
using wschat::ChatStore;
using wschat::ChatUser;
using wschat::HistoryPage;
using wschat::HistoryPosition;
using StoreListener = ChatStore::Listener;

// ---- JSON ----------------------------------------------------------------------------------------------------------

// A value of RFC 8259. Fails on text that is not exactly one value.
struct Value {
    char kind = 'n';   // { [ " 0 t f n
    std::string text;  // of a string, unescaped except \u; of a number
    std::vector<Value> items;
    std::vector<std::pair<std::string, Value>> fields;

    const Value* find(std::string_view name) const {
        for (const auto& [key, value] : fields)
            if (key == name) return &value;
        return nullptr;
    }
    std::string string(std::string_view name) const {
        const Value* const value = find(name);
        return value == nullptr ? "" : value->text;
    }
    std::uint64_t number(std::string_view name) const {
        const Value* const value = find(name);
        return value == nullptr ? 0 : std::strtoull(value->text.c_str(), nullptr, 10);
    }
    bool flag(std::string_view name) const {
        const Value* const value = find(name);
        return value != nullptr && value->kind == 't';
    }
};

class JsonReader {
public:
    explicit JsonReader(std::string_view text) : whole_(text), rest_(text) {}
    Value read() {
        check(wschat::valid_utf8(whole_), "an event is not UTF-8", whole_);
        Value value = value_at(0);
        check(rest_.empty(), "an event has bytes after its end", whole_);
        return value;
    }

private:
    char next() const {
        check(!rest_.empty(), "an event ends early", whole_);
        return rest_[0];
    }
    void take(char c) {
        check(next() == c, "an event is not JSON", whole_);
        rest_.remove_prefix(1);
    }
    std::string string() {
        std::string text;
        for (take('"'); next() != '"'; rest_.remove_prefix(1)) {
            check(static_cast<unsigned char>(next()) >= 0x20, "a control character is not escaped", whole_);
            if (next() == '\\') {
                rest_.remove_prefix(1);
                check(std::string_view("\"\\/bfnrtu").find(next()) != std::string_view::npos, "a bad escape", whole_);
                if (next() == 'u') text += "\\u";
                else text += next() == 'n' ? '\n' : next() == 't' ? '\t' : next();
            } else {
                text += next();
            }
        }
        take('"');
        return text;
    }
    Value value_at(int depth) {
        check(depth < 50, "an event is nested too deeply", whole_);
        Value value;
        value.kind = next();
        if (value.kind == '"') {
            value.text = string();
        } else if (value.kind == '[' || value.kind == '{') {
            const char end = value.kind == '[' ? ']' : '}';
            rest_.remove_prefix(1);
            for (bool first = true; next() != end; first = false) {
                if (!first) take(',');
                if (end == ']') {
                    value.items.push_back(value_at(depth + 1));
                    continue;
                }
                std::string name = string();
                take(':');
                check(value.find(name) == nullptr || depth != 0, "an event has a field twice", whole_);
                value.fields.emplace_back(std::move(name), value_at(depth + 1));
            }
            take(end);
        } else {
            const std::size_t size = (std::min)(rest_.find_first_of(",]}"), rest_.size());
            value.text = std::string(rest_.substr(0, size));
            rest_.remove_prefix(size);
            const bool word = value.text == "true" || value.text == "false" || value.text == "null";
            const bool number = value.text.find_first_not_of("0123456789+-.eE") == std::string::npos;
            check(word || (number && !value.text.empty()), "an event is not JSON", whole_);
            if (!word) value.kind = '0';
        }
        return value;
    }

    std::string_view whole_, rest_;
};

// ---- the state of one run ------------------------------------------------------------------------------------------

class LateStore;

// What a client knows of a room.
struct View {
    std::optional<std::uint64_t> live;                        // the newest id: everything up to it has come
    std::optional<std::map<std::string, std::string>> users;  // names by public id; not in a large room
};

struct Client {
    wschat::TestClient connection;
    std::size_t number = 0;
    std::size_t taken = 0;  // messages that were checked
    std::string me;         // the public id
    std::map<std::string, View> views;
    std::map<std::string, int> said;            // tags of messages that came
    std::set<std::string> answered;             // tags
    std::map<std::string, std::size_t> wanted;  // tags of lines, and `leaves` at that time
    std::optional<HistoryPosition> last;        // of the address
    std::set<std::string> rooms;                // of which it is a member now
    std::set<std::string> visited;              // of which it was a member since the last check
    std::size_t leaves = 0;
    bool paused = false;
    bool bad_text = false;  // what it sent was not always UTF-8
    bool connected = false, disconnected = false;
};

struct World {
    std::vector<std::unique_ptr<Client>> clients;
    std::vector<wschat::ChatReply> replies;  // of handshakes that wait
    LateStore* store = nullptr;
    ChatHub* hub = nullptr;
    wschat::TestServer* server = nullptr;
    std::map<std::string, std::map<std::uint64_t, ChatEntry>> truth;  // what the store has kept, by room
    std::map<std::string, std::string> epochs;                        // of the latest history, by room
    std::size_t lines = 0;
    bool keeps_all = true;    // the history loses nothing
    bool keeps_rooms = true;  // the ids of a room have no holes
    bool has_windows = false;  // joins and leaves come together
    bool disturbed = false;   // a hook has changed the rooms of its connection, so the order of events is another one
};
World* world = nullptr;

Client* client_of(const wschat::Request& request) {
    const std::string number = request.query("i").value_or("");
    return number.empty() ? nullptr : world->clients[std::strtoul(number.c_str(), nullptr, 10)].get();
}

// If FUZZ_TRACE is set in the environment, prints what is sent and received.
void trace(const char* what, std::size_t number, std::string_view text) {
    static const bool enabled = std::getenv("FUZZ_TRACE") != nullptr;
    if (enabled) std::fprintf(stderr, "%s %zu: %s\n", what, number, wschat::escape_for_log(text, 4000).c_str());
}
void send(Client& client, const std::string& line, Opcode opcode = Opcode::text) {
    trace("line of", client.number, line);
    client.connection.send(line, opcode);
}

// ---- the store -----------------------------------------------------------------------------------------------------

// A history in memory whose answers are late, come in another order, or are errors. What it delivers keeps its order.
class LateStore final : public ChatStore, private StoreListener {
public:
    enum class Read { now, answer_later, read_later, fail, fail_later };

    explicit LateStore(const wschat::HistoryLimits& limits) : inner_(limits) {}

    bool late = false;     // deliveries wait
    unsigned failing = 0;  // the next writes fail
    Read read = Read::now;

    void attach(StoreListener& listener, std::shared_ptr<wschat::Mailbox> mailbox) override {
        listener_ = &listener;
        inner_.attach(*this, std::move(mailbox));
    }
    void append(ChatEntry entry) override {
        if (entry.kept() && take_failure()) return on_failure(entry, "on purpose");
        inner_.append(std::move(entry));
    }
    void forward(const ChatEntry& entry) override { inner_.forward(entry); }
    void since(const std::string& room, std::optional<HistoryPosition> position, std::size_t limit,
               PageCallback callback) override {
        answer<HistoryPage>(std::move(callback), [this, room, position, limit](const PageCallback& take) {
            inner_.since(room, position, limit, take);
        });
    }
    void before(const std::string& room, std::uint64_t id, std::size_t limit, PageCallback callback) override {
        answer<HistoryPage>(std::move(callback), [this, room, id, limit](const PageCallback& take) {
            inner_.before(room, id, limit, take);
        });
    }
    void search(const std::string& room, const std::string& words, std::size_t limit, PageCallback callback) override {
        answer<HistoryPage>(std::move(callback), [this, room, words, limit](const PageCallback& take) {
            inner_.search(room, words, limit, take);
        });
    }
    void put(ChatFact fact) override {
        if (take_failure()) return on_fact_failure(fact, "on purpose");
        inner_.put(std::move(fact));
    }
    void facts(const std::string& scope, const std::string& prefix, FactsCallback callback) override {
        using Facts = std::vector<ChatFact>;
        const bool fails = read == Read::fail || read == Read::fail_later;
        const auto take = [this, scope, prefix] {
            Facts found;
            inner_.facts(scope, prefix, [&](Facts facts, const std::string&) { found = std::move(facts); });
            return found;
        };
        if (read == Read::now || read == Read::fail)
            return callback(fails ? Facts() : take(), fails ? "on purpose" : "");
        if (read == Read::read_later) return answers_.push_back([callback, take] { callback(take(), ""); });
        answers_.push_back(
            [callback, fails, found = fails ? Facts() : take()] { callback(found, fails ? "on purpose" : ""); });
    }
    void erase_author(const std::string& author, EraseCallback callback) override {
        inner_.erase_author(author, std::move(callback));
    }
    void export_room(const std::string& room, ExportCallback callback, std::uint64_t after = 0) override {
        inner_.export_room(room, std::move(callback), after);
    }

    std::size_t pending() const { return deliveries_.size() + answers_.size(); }
    void deliver_one() {
        if (deliveries_.empty()) return;
        const auto task = std::move(deliveries_.front());
        deliveries_.pop_front();
        task();
    }
    void deliver_all() {
        if (std::exchange(delivering_, true)) return;
        while (!deliveries_.empty()) deliver_one();
        delivering_ = false;
    }
    void answer_one(std::size_t index) {
        if (answers_.empty()) return;
        index %= answers_.size();
        const auto task = std::move(answers_[index]);
        answers_.erase(answers_.begin() + static_cast<std::ptrdiff_t>(index));
        task();
    }

private:
    bool take_failure() { return failing != 0 && failing-- != 0; }
    void deliver(std::function<void()> task) {
        deliveries_.push_back(std::move(task));
        if (!late) deliver_all();
    }
    template <class Result, class Callback, class Work>
    void answer(Callback callback, Work work) {
        Result failure;
        failure.error = "on purpose";
        Result found;
        if (read == Read::now || read == Read::answer_later) work([&](Result result) { found = std::move(result); });
        switch (read) {
            case Read::now: return callback(std::move(found));
            case Read::answer_later: return answers_.push_back([callback, found] { callback(found); });
            case Read::read_later: return answers_.push_back([callback, work] { work(callback); });
            case Read::fail: return callback(std::move(failure));
            case Read::fail_later: return answers_.push_back([callback, failure] { callback(failure); });
        }
    }

    void on_entry(const ChatEntry& entry) override {
        if (entry.id != 0) {
            auto& kept = world->truth[entry.room];
            const bool next = kept.empty() || entry.id == kept.rbegin()->first + 1;
            check(next || !world->keeps_rooms, "the store has left out an id");
            for (const auto& [id, earlier] : kept)
                check(!world->keeps_all || entry.tag.empty() || earlier.tag != entry.tag ||
                          earlier.author != entry.author,
                      "a tag is kept twice", entry.tag);
            kept.emplace(entry.id, entry);
        }
        deliver([this, entry] { listener_->on_entry(entry); });
    }
    void on_duplicate(const ChatEntry& entry) override {
        deliver([this, entry] { listener_->on_duplicate(entry); });
    }
    void on_failure(const ChatEntry& entry, const std::string& cause) override {
        deliver([this, entry, cause] { listener_->on_failure(entry, cause); });
    }
    void on_refused(const ChatEntry& entry, std::string_view code) override {
        deliver([this, entry, code = std::string(code)] { listener_->on_refused(entry, code); });
    }
    void on_fact(const ChatFact& fact) override {
        deliver([this, fact] { listener_->on_fact(fact); });
    }
    void on_fact_failure(const ChatFact& fact, const std::string& cause) override {
        deliver([this, fact, cause] { listener_->on_fact_failure(fact, cause); });
    }
    Time now() const override { return listener_->now(); }

    wschat::MemoryHistory inner_;
    StoreListener* listener_ = nullptr;
    std::deque<std::function<void()>> deliveries_;
    std::vector<std::function<void()>> answers_;
    bool delivering_ = false;
};

// ---- the handler ---------------------------------------------------------------------------------------------------

// The query says who it is and what its hooks do: one letter for each of on_connect, on_join, on_leave, on_said and
// on_disconnect.
class Guest final : public wschat::ChatHandler {
public:
    std::optional<ChatUser> authenticate(const Request& request) override {
        client_ = client_of(request);
        ChatUser user{request.query("name").value_or("")};
        user.account = request.query("account").has_value();
        if (user.account) user.about = R"({"a":[1,{"b":"\u00e9"}]})";
        if (user.name == "nobody") return std::nullopt;
        return user;
    }
    void authenticate_async(const Request& request, wschat::ChatReply reply) override {
        if (request.query("slow")) world->replies.push_back(std::move(reply));
        else reply.accept();
    }
    bool may(ChatAction action) override {
        return ChatHandler::may(action) || (client_ != nullptr && request().query("mod").has_value());
    }
    bool filter(std::string& text) override {
        if (text.find("loud") != std::string::npos) text += '!';
        return text.find("spam") == std::string::npos;
    }
    void on_connect() override {
        check(!client_->connected, "on_connect() is called twice");
        client_->connected = true;
        act(0);
    }
    void on_disconnect() override {
        check(client_->connected && !client_->disconnected, "on_disconnect() does not pair with on_connect()");
        check(client_->rooms.empty(), "on_disconnect() comes before on_leave()");
        client_->disconnected = true;
        act(4);
    }
    void on_join(ChatRoom& room) override {
        check(client_->connected && !client_->disconnected, "on_join() outside of a connection");
        check(client_->rooms.insert(room.name()).second, "on_join() is called twice");
        client_->visited.insert(room.name());
        act(1);
    }
    void on_leave(ChatRoom& room) override {
        check(client_->rooms.erase(room.name()) == 1, "on_leave() does not pair with on_join()");
        ++client_->leaves;
        act(2);
    }
    void on_said(const ChatEntry& entry) override {
        if (entry.text.find("again") == std::string::npos) act(3);
    }

private:
    void act(std::size_t hook) {
        const std::string actions = request().query("do").value_or("");
        const char action = hook < actions.size() ? actions[hook] : '-';
        if (action != '-') world->disturbed = true;
        switch (action) {
            case 's': say("again"); break;
            case 'l': on_command("leave", ""); break;
            case 'j': on_command("join", "coffee"); break;
            case 'k': kick("out"); break;
            case 'c': close(4000, "bye"); break;
            case 'x': throw std::runtime_error("on purpose");
            case 'r': reply(wschat::ChatEvent("event").add("n", 1)); break;
            case 'p':
                if (ChatRoom* const room = current_room()) room->publish("again", "hook");
                break;
            case 'b': hub().ban(user().name, 5s); break;
            default: break;
        }
    }

    Client* client_ = nullptr;
};

// ---- the model -----------------------------------------------------------------------------------------------------

const std::set<std::string> types = {"hello",   "room",   "users",   "join",   "leave",   "nick",      "said",
                                     "edit",    "remove", "react",   "topic",  "search",  "history",   "ack",
                                     "private", "read",   "help",    "typing", "rooms",   "bans",      "event",
                                     "kicked",  "error",  "options", "peers",  "invited", "moderation"};
const std::set<std::string> of_members = {"said", "edit", "remove", "react", "topic", "join", "leave", "typing"};

// Takes what a client has got, and checks it.
class Model {
public:
    explicit Model(Client& client) : client_(client) {}

    void take() {
        const auto& messages = client_.connection.messages();
        while (client_.taken < messages.size()) {
            const auto& message = messages[client_.taken++];
            check(!message.binary, "the chat sends bytes");
            trace("event for", client_.number, message.data);
            take_event(message.data);
        }
        if (!client_.paused) client_.visited = client_.rooms;
    }

private:
    void take_event(const std::string& text) {
        const Value event = JsonReader(text).read();
        const std::string type = event.string("type"), room = event.string("room"), tag = event.string("tag");
        check(types.count(type) == 1, "an event has an unknown type", text);
        check(client_.taken == 1 || type != "hello", "hello comes late", text);
        check(client_.taken != 1 || type == "hello", "hello is not the first event", text);
        if (type == "hello") client_.me = event.string("user");
        if (!tag.empty()) {
            client_.answered.insert(tag);
            check(client_.wanted.count(tag) != 0, "a tag of another client", text);
        }
        if (of_members.count(type) != 0)
            check(client_.visited.count(room) != 0 || !tag.empty(), "an event for members comes to another one", text);
        if (type == "history") take_history(event, room, text);
        else if (event.find("id") != nullptr && of_members.count(type) != 0) take_kept(event, type, room, text);
        else if (type == "users") take_users(event, room);
        else if (type == "join" || type == "leave" || type == "nick") take_presence(event, type, room, text);
        else if (type == "private") take_private(event, text);
        else if (type == "error")
            check(!event.string("code").empty() && !event.string("text").empty(), "a bad error", text);
    }

    void take_kept(const Value& event, const std::string& type, const std::string& room, const std::string& text) {
        const std::uint64_t id = event.number("id");
        const auto& kept = world->truth[room];
        const auto found = kept.find(id);
        check(found != kept.end(), "an id that the store does not know", text);
        const ChatEntry& entry = found->second;
        if (type == "said" || type == "edit")
            check(entry.text.find_first_of("\\\t") != std::string::npos || event.string("text") == entry.text,
                  "a message has another text", text);
        check_equal(event.string("user"), entry.user, "a message has another author");
        std::string mentions;
        if (const Value* const list = event.find("mentions"))
            for (const Value& id_of_user : list->items) mentions += (mentions.empty() ? "" : " ") + id_of_user.text;
        check_equal(mentions, entry.mentions, "a message has other mentions");
        if (type == "said" && !event.string("tag").empty())
            check(++client_.said[event.string("tag")] == 1, "a message with a tag comes twice", text);
        if (client_.visited.count(room) == 0) return;  // the sender has left the room
        std::optional<std::uint64_t>& live = client_.views[room].live;
        if (live) check(id > *live, "an entry comes twice, or in another order", text);
        if (live && world->keeps_rooms) check(id == *live + 1, "an entry is missing", text);
        live = id;
    }

    void take_history(const Value& event, const std::string& room, const std::string& text) {
        check(event.find("entries") != nullptr && event.find("gap") != nullptr && event.find("more") != nullptr,
              "a history has no entries", text);
        std::vector<std::uint64_t> ids;
        for (const Value& entry : event.find("entries")->items) {
            ids.push_back(entry.number("id"));
            client_.answered.insert(entry.string("tag"));  // a line that was said before the history was read
        }
        for (std::size_t i = 1; i < ids.size(); ++i) check(ids[i - 1] < ids[i], "a history is not in order", text);
        if (event.find("peer") != nullptr) return;
        for (const std::uint64_t id : ids)
            check(world->truth[room].count(id) != 0, "a history has an unknown id", text);
        if (event.find("before") != nullptr) {
            check(ids.empty() || ids.back() < event.number("before"), "a page has newer entries", text);
            return;
        }
        check(event.find("last") != nullptr, "a history has no position", text);
        const std::uint64_t last = event.number("last");
        View& view = client_.views[room];
        if (event.find("epoch") == nullptr) check(event.flag("gap") && ids.empty(), "a history has no epoch", text);
        if (event.flag("gap") && ids.empty()) return;  // it could not be read; the position is that of the client
        check(ids.empty() || ids.back() <= last, "a history ends after its position", text);
        world->epochs[room] = event.string("epoch");
        const auto complete_after = [&](std::uint64_t position) {
            for (std::uint64_t id = position; id < last; ++id)
                check(std::count(ids.begin(), ids.end(), id + 1) == 1, "a history has a hole", text);
        };
        if (view.live && last > *view.live && !event.flag("gap") && world->keeps_rooms) complete_after(*view.live);
        const bool resumes = !view.live && client_.last && client_.last->epoch == event.string("epoch") &&
                             std::exchange(resumed_, true) == false && room == first_room();
        if (resumes && !event.flag("gap") && world->keeps_rooms) complete_after(client_.last->id);
        if (!view.live || *view.live < last) view.live = last;
    }
    std::string first_room() const { return client_.views.size() == 1 ? client_.views.begin()->first : ""; }

    void take_users(const Value& event, const std::string& room) {
        auto& users = client_.views[room].users;
        users.reset();
        const Value* const list = event.find("users");
        if (list == nullptr) return;
        check(list->items.size() == event.number("count"), "a list of users has another length");
        users.emplace();
        for (const Value& user : list->items)
            check(users->emplace(user.string("user"), user.string("name")).second, "a user is in a list twice");
    }

    void take_presence(const Value& event, const std::string& type, const std::string& room, const std::string& text) {
        if (const Value* const list = event.find("users")) {
            check(list->items.size() > 1 && world->has_windows, "a list of one user", text);
            for (const Value& each : list->items) take_change(each, type, room, text);
        } else {
            take_change(event, type, room, text);
        }
    }
    void take_change(const Value& change, const std::string& type, const std::string& room, const std::string& text) {
        auto& users = client_.views[room].users;
        const std::string user = change.string("user");
        check(type == "nick" || user != client_.me, "a user hears of the own join or leave", text);
        if (!users) return;
        const bool known = users->count(user) != 0, strict = !world->has_windows && !world->disturbed;
        if (type == "join") {
            if (strict) check(!known, "a user joins twice", text);
            (*users)[user] = change.string("name");
        } else if (type == "leave") {
            if (strict) check(known, "a user leaves who was not there", text);
            users->erase(user);
        } else if (known) {
            (*users)[user] = change.string("name");
        }
    }

    void take_private(const Value& event, const std::string& text) {
        const std::string author = event.string("user");
        if (event.find("room") == nullptr)
            check(author == client_.me || author == event.string("peer"), "a private message of others", text);
    }

    Client& client_;
    bool resumed_ = false;
};

// ---- the script ----------------------------------------------------------------------------------------------------

constexpr const char* names[] = {"Anna", "Bert", "Carl", "Mod", "Anna B", "\xC3\x84nna", "", "nobody"};
constexpr const char* room_names[] = {"tea", "coffee", "a b"};
constexpr const char* room_words[] = {"tea", "coffee", "a%20b"};

class Script {
public:
    explicit Script(InputReader& input) : input_(input) {}

    void run() {
        while (!input_.empty()) {
            step();
            check_all();
        }
        finish();
    }

private:
    Client& client() { return *world->clients[input_.byte() % world->clients.size()]; }
    static std::size_t open_clients() {
        return static_cast<std::size_t>(std::count_if(world->clients.begin(), world->clients.end(),
                                                      [](const auto& each) { return each->connection.is_open(); }));
    }

    void step() {
        const unsigned kind = input_.byte() % 10;
        if (world->clients.empty() && kind != 4) return connect();
        switch (kind) {
            case 0:
                if (open_clients() < 8 && world->clients.size() < 40) connect();
                break;
            case 1:
            case 2: command(client()); break;
            case 3: end(client()); break;
            case 4: set_store(); break;
            case 5: answer(); break;
            case 6: {
                constexpr std::chrono::milliseconds times[] = {10ms, 1000ms, 3000ms, 60'000ms};
                world->server->advance(times[input_.byte() % 4]);
                break;
            }
            case 7: pause(client()); break;
            case 8: call(); break;
            case 9: raw(client()); break;
        }
    }

    // ---- connections -----------------------------------------------------------------------------------------------

    void connect() {
        const unsigned who = input_.byte(), how = input_.byte(), more = input_.byte();
        auto made = std::make_unique<Client>();
        std::string target = std::string("/chat/") + room_words[who / 8 % 3] +
                             "?i=" + std::to_string(world->clients.size()) + "&name=" + encoded(names[who % 8]);
        if (who / 24 % 3 != 0) target += "&key=secret-of-" + std::to_string(who / 24 % 3);
        if (how % 4 == 1) target += "&account=1";
        if (how / 4 % 4 == 1) target += "&mod=1";
        if (how / 16 % 4 == 1) target += "&slow=1";
        if (how / 64 % 4 == 1) target += std::string("&join=") + room_words[more % 3];
        if (more / 4 % 4 == 1) {
            constexpr std::string_view letters = "-sljkcxrpb";
            target += "&do=";
            for (int i = 0; i < 5; ++i) target += letters[input_.byte() % letters.size()];
        }
        const std::string epoch = world->epochs[room_names[who / 8 % 3]];
        if (more / 16 % 4 == 1 && !epoch.empty()) {
            made->last = HistoryPosition{epoch, std::uint64_t{more} / 64 * 3};
            target += "&last=" + made->last->to_string();
        } else if (more / 16 % 4 == 2) {
            target += "&last=0123456789abcdef-7";
        }
        made->number = world->clients.size();
        trace("handshake of", made->number, target);
        world->clients.push_back(std::move(made));
        wschat::TestRequest request(target);
        request.address(who % 2 == 0 ? "192.0.2.1" : "192.0.2.2");
        world->clients.back()->connection = world->server->connect(request);
    }
    static std::string encoded(std::string_view text) {
        std::string result;
        for (const char c : text) {
            char hex[4];
            std::snprintf(hex, sizeof hex, "%%%02X", static_cast<unsigned>(static_cast<unsigned char>(c)));
            result += hex;
        }
        return result;
    }

    void end(Client& client) {
        switch (input_.byte() % 3) {
            case 0: client.connection.close(); break;
            case 1: client.connection.close(CloseCode::going_away); break;
            case 2: client.connection.hang_up(); break;
        }
    }
    void pause(Client& client) {
        const unsigned window = input_.byte();
        if (!std::exchange(client.paused, !client.paused)) client.connection.pause_reading(window * std::size_t{40});
        else client.connection.resume_reading();
    }

    // ---- lines -----------------------------------------------------------------------------------------------------

    // A line with or without a tag. Most are valid.
    void command(Client& client) {
        const unsigned kind = input_.byte(), amount = input_.byte();
        if (!client.connection.is_open()) return;  // its handshake waits, or it has gone
        std::string tag;
        if (amount % 4 != 0) tag = "t" + std::to_string(amount % 4 == 1 ? amount / 32 : 1000 + world->lines);
        std::string line = words_of(kind, amount);
        if (kind / 64 == 1) line = std::string("/in ") + room_words[amount % 3] + " " + line;
        const bool answers = kind % 64 < answering;
        if (!tag.empty()) {
            // A tag that is used again is answered again, by an "ack".
            if (answers && client.wanted.count(tag) == 0) client.wanted[tag] = client.leaves;
            else client.wanted.emplace(tag, never);
            line = "/tag " + tag + " " + line;
        }
        send(client, line);
    }
    static constexpr std::size_t never = static_cast<std::size_t>(-1);
    static constexpr unsigned answering = 35;  // the lines below, up to here, have an answer with their tag

    std::string words_of(unsigned kind, unsigned amount) {
        const std::string id = std::to_string(amount / 4 % 16), name = names[amount / 4 % 8];
        const std::string room = room_names[amount / 4 % 3], n = std::to_string(++world->lines);
        const std::string position = world->epochs[room] + "-" + id;
        switch (kind % 64) {
            case 0: return amount % 32 < 8 ? "line " + n + " @" + name : "line " + n;
            case 1: return amount % 2 == 0 ? "spam" : "loud " + n;
            case 2: return "/me waves " + n;
            case 3: return "/edit " + id + " edited " + n;
            case 4: return "/delete " + id;
            case 5: return "/react " + id + (amount % 8 < 4 ? " +" : " \xF0\x9F\x98\x80");
            case 6: return "/data {\"n\":" + n + ",\"x\":[\"\\u00e9\"]} text";
            case 7: return amount % 2 == 0 ? "/topic about " + n : "/topic";
            case 8: return "/msg " + name + " psst " + n;
            case 9: return "/msg @" + some_id(amount) + " psst " + n;
            case 10: return "/before " + id + " " + std::to_string(amount % 8);
            case 11: return "/search line " + std::to_string(amount % 4);
            case 12: return "/since " + position;
            case 13: return "/join " + room;
            case 14: return "/join " + room + " " + position;
            case 15: return "/leave " + room;
            case 16: return "/help";
            case 17: return "/rooms";
            case 18: return "/kick " + name + (amount % 2 == 0 ? " go away" : "");
            case 19: return "/mute " + name + " " + std::to_string(amount % 8);
            case 20: return "/unmute " + name;
            case 21: return "/bans";
            case 22: return "/leave";
            case 23: return "/nick " + name;
            case 24: return "/who";
            case 25: return "/ban " + name + " " + std::to_string(amount % 8);
            case 26: return "/unban " + name;
            case 27: return "/read " + id;
            case 28: return "/read @" + some_id(amount) + " " + id;
            case 29: return amount % 2 == 0 ? "/typing" : "/typing stop";
            case 30: return "/invite " + name;
            case 31: return "/invite @" + some_id(amount);
            case 32: return "/access " + std::string(amount % 8 < 4 ? "private" : "public");
            case 33: return "/readonly " + std::string(amount % 8 < 4 ? "on" : "off");
            case 34: return "/slow " + std::to_string(amount % 8);
            case 35: return "/tag";
            default: return "/" + std::string(input_.bytes(amount % 16));
        }
    }
    static std::string some_id(unsigned amount) {
        const std::string& id = world->clients[amount / 4 % world->clients.size()]->me;
        return id.empty() ? "none" : id;
    }
    // Any bytes, or many lines at once.
    void raw(Client& client) {
        const unsigned amount = input_.byte();
        if (amount < 64) {
            for (unsigned i = 0; i < amount; ++i) send(client, "line " + std::to_string(++world->lines));
            return;
        }
        const std::string bytes(input_.bytes(amount - 64));
        client.bad_text = client.bad_text || !wschat::valid_utf8(bytes);
        if (bytes.substr(0, 5) == "/tag ") client.wanted.emplace(bytes.substr(5, bytes.find(' ', 5) - 5), never);
        send(client, bytes, amount % 8 == 0 ? Opcode::binary : Opcode::text);
    }

    // ---- the store, and the program --------------------------------------------------------------------------------

    void set_store() {
        const unsigned amount = input_.byte();
        trace("store", amount, "");
        world->store->late = amount % 2 == 1;
        world->store->read = static_cast<LateStore::Read>(amount / 2 % 5);
        if (amount >= 200) world->store->failing = 1 + amount % 3;
        if (!world->store->late) world->store->deliver_all();
    }
    void answer() {
        const unsigned amount = input_.byte();
        if (amount < 100) world->store->deliver_one();
        else if (amount < 200) world->store->answer_one(amount);
        else answer_handshake(amount);
        world->server->run_until_idle();
    }
    static void answer_handshake(unsigned amount) {
        if (world->replies.empty()) return;
        const wschat::ChatReply reply = std::move(world->replies.back());
        world->replies.pop_back();
        if (amount % 3 == 0) reply.accept();
        else if (amount % 3 == 1) reply.accept(ChatUser{"Zoe", "", true});
        else reply.send(Response(403, "no\n"));
    }

    // What a program does with its chat.
    void call() {
        const unsigned kind = input_.byte(), amount = input_.byte();
        const std::string n = std::to_string(++world->lines), name = names[amount % 6];
        trace("call", kind % 10, n);
        if (kind % 10 < 8) {
            ChatRoom& room = world->hub->room(room_names[kind / 10 % 3]);
            switch (kind % 10) {
                case 0: room.publish("published " + n, amount % 2 == 0 ? "" : "Bot"); break;
                case 1: room.broadcast("broadcast " + n); break;
                case 2: room.edit(amount % 16, "edited " + n); break;
                case 3: room.remove(amount % 16); break;
                case 4: room.set_topic("topic " + n); break;
                case 5: room.kick(name, "kicked"); break;
                case 6: room.mute(name, std::chrono::seconds(amount % 4)); break;
                case 7: room.send("event", wschat::Json{{"n", amount}}); break;
            }
        } else if (kind % 10 == 8) {
            world->hub->ban(amount % 8 == 7 ? "192.0.2.1" : name, std::chrono::seconds(amount / 8 % 4));
        } else if (amount % 2 == 0) {
            world->keeps_all = false;
            world->store->erase_author("name " + wschat::chat_fold(name), [](std::size_t, const std::string&) {});
        } else if (!world->clients.empty()) {
            world->hub->send(some_id(amount), "event", wschat::Json{{"n", amount}});
        }
        world->server->run_until_idle();
    }

    // ---- checks ----------------------------------------------------------------------------------------------------

    static void check_all() {
        for (const auto& each : world->clients) {
            Model(*each).take();
            const CloseCode code = each->connection.close_code();
            check(code != CloseCode::protocol_error, "the chat breaks the protocol");
            check(code != CloseCode::internal_error || world->disturbed, "a callback of the chat throws");
        }
    }

    // All faults end. Then every client knows what is true.
    void finish() {
        for (const auto& each : world->clients)
            if (std::exchange(each->paused, false)) each->connection.resume_reading();
        LateStore& store = *world->store;
        store.late = false;
        store.read = LateStore::Read::now;
        store.failing = 0;
        for (int i = 0; store.pending() != 0 || !world->replies.empty(); ++i) {
            check(i < 10'000, "the store is asked without an end");
            store.deliver_all();
            store.answer_one(0);
            answer_handshake(0);
            world->server->run_until_idle();
            check_all();
        }
        world->server->advance(20s);  // every grace period, ban and mute of the script is over
        check_all();
        check_tags();
        for (std::size_t i = 0; i < world->clients.size(); ++i) {
            Client& client = *world->clients[i];
            if (!client.connection.is_open()) continue;
            for (const std::string& room : client.rooms) check_room(client, room);
        }
        end_all();
    }
    static void check_tags() {
        for (const auto& each : world->clients) {
            if (!each->connection.is_open()) continue;
            for (const auto& [tag, leaves] : each->wanted)
                check(leaves == never || leaves != each->leaves || each->answered.count(tag) != 0,
                      "a line with a tag has no answer", tag);
        }
    }
    static void check_room(const Client& client, const std::string& name) {
        const auto found = client.views.find(name);
        check(found != client.views.end(), "a member has no history");
        const View& view = found->second;
        const auto& kept = world->truth[name];
        if (view.live && !kept.empty())
            check(*view.live >= kept.rbegin()->first, "a member has missed the last entries", name);
        const ChatRoom* const room = world->hub->find(name);
        check(room != nullptr, "a room with a member is gone");
        if (!view.users) return;
        std::map<std::string, std::string> users;
        for (const ChatUser& user : room->users()) users[user.id] = user.name;
        std::string expected, actual;
        for (const auto& [id, user] : users) expected += id + " " + user + "\n";
        for (const auto& [id, user] : *view.users) actual += id + " " + user + "\n";
        check_equal(actual, expected, "a member sees other users than there are");
    }
    static void end_all() {
        for (const auto& each : world->clients)
            if (each->connection.is_open()) each->connection.close();
        world->server->advance(20s);
        check_all();
        for (const auto& each : world->clients)
            check(each->connected == each->disconnected, "on_connect() and on_disconnect() do not pair");
        check(world->hub->room_count() == 0 && world->server->rooms().size() == 0, "rooms are left");
        const wschat::Metrics metrics = world->server->metrics();
        check(metrics.connections_open == 0 && metrics.backlog_bytes == 0, "connections are left");
    }

    InputReader& input_;
};

wschat::ServerOptions server_options() {
    wschat::ServerOptions options;
    options.handle_signals = false;
    options.limits.max_backlog = 20'000;
    return options;
}

void set_limits(ChatHub& hub, unsigned choice) {
    wschat::ChatLimits& limits = hub.limits;
    if (choice % 2 == 0) {
        limits.connection = limits.address = {{1e6, 1e6}, {1e9, 1e9}};
        limits.replies = limits.address_replies = {1e9, 1e9};
        limits.room_creations = limits.address_room_creations = {1e6, 1e6};
    }
    if (choice / 2 % 4 == 1) limits.presence_list = 2;
    if (choice / 2 % 4 == 2) limits.history_on_join = limits.history_on_resume = 3;
    if (choice / 8 % 4 == 1) limits.grace = 0s;
    world->has_windows = choice / 8 % 4 == 3;
    if (!world->has_windows) limits.presence_window = 0s;
    if (choice / 8 % 4 == 2) limits.max_rooms_per_connection = 2;
    if (choice / 32 % 4 == 1) limits.max_text = 20;
    if (choice / 32 % 4 == 2) limits.max_history_event = 300;
    if (choice / 128 == 1) limits.flood_patience = 3;
}

void run(InputReader& input) {
    World run;
    world = &run;
    const unsigned choice = input.byte(), of_history = input.byte();
    wschat::HistoryLimits history;
    if (of_history % 4 == 1) history.max_entries = 5;
    if (of_history % 4 == 2) history.max_rooms = 2;
    run.keeps_all = (of_history % 4 == 0 || of_history % 4 == 3) && of_history / 4 % 4 != 1;
    run.keeps_rooms = of_history % 4 != 2;
    {
        wschat::TestServer server(server_options());
        run.server = &server;
        run.hub = &ChatHub::of(server);
        set_limits(*run.hub, choice);
        auto store = std::make_unique<LateStore>(history);
        run.store = store.get();
        run.hub->set_store(std::move(store));
        if (of_history / 4 % 4 == 1)
            run.hub->room_options = [](std::string_view name, wschat::ChatRoomOptions& options) {
                if (name == "coffee") options.max_entries = 4;
                if (name == "a b") options.max_age = 2s;
            };
        server.route<Guest>("/chat/{room}");
        Script(input).run();
        run.replies.clear();
    }
    world = nullptr;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static bool warm = false;
    const std::size_t live = heap.live;
    InputReader input(data, size);
    run(input);
    check(!std::exchange(warm, true) || heap.live == live, "memory is left");
    return 0;
}
