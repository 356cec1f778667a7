// section 9: rooms, with members that have real connections.
#include "support.hpp"

#include <map>
#include <random>
#include <set>

namespace {

using test::Client;
using test::hex;
using test::RunningServer;
using wschat::CloseCode;
using wschat::Error;
using wschat::Json;
using wschat::Message;
using wschat::Opcode;
using wschat::Room;
using wschat::WebSocketHandler;
using namespace std::chrono_literals;

class Guest;

// A server whose guests have names, "/?name=anna", and begin in the room that they ask for, "&room=lobby".
struct Party {
    explicit Party(const wschat::Limits& limits = {}) : running(with(limits)) {
        running.server.route<Guest>("/", std::ref(*this));
        running.start();
    }
    int port() const { return running.port(); }
    template <class Function>
    auto on_loop(Function function) {
        return running.on_loop(std::move(function));
    }
    // On the loop's thread.
    Room& room(std::string_view name) { return running.server.rooms()[name]; }
    Guest& operator[](const std::string& name) { return *guests.at(name); }

    // How many are in the room, without making it.
    std::size_t size_of(std::string_view name) {
        return on_loop([&] {
            const Room* room = running.server.rooms().find(name);
            return room == nullptr ? 0 : room->size();
        });
    }
    bool eventually_has(std::string_view name, std::size_t size) {
        return running.eventually([&] {
            const Room* room = running.server.rooms().find(name);
            return (room == nullptr ? 0 : room->size()) == size;
        });
    }
    std::size_t rooms() {
        return on_loop([&] { return running.server.rooms().size(); });
    }

    std::map<std::string, Guest*> guests;  // for the loop's thread
    std::function<void(Guest&)> on_close;
    std::function<void(Guest&, const Message&)> on_message;
    RunningServer running;

private:
    static wschat::ServerOptions with(const wschat::Limits& limits) {
        wschat::ServerOptions options;
        options.limits = limits;
        return options;
    }
};

class Guest : public WebSocketHandler {
public:
    explicit Guest(Party& party) : party_(party) {}

    std::string name() const { return request().query("name").value_or("nobody"); }

    void open() override {
        party_.guests[name()] = this;
        if (const auto wanted = request().query("room")) room(*wanted).join(*this);
    }
    void on_message(const Message& message) override {
        if (party_.on_message) party_.on_message(*this, message);
    }
    void on_close() override {
        if (party_.on_close) party_.on_close(*this);
        party_.guests.erase(name());
    }

private:
    Party& party_;
};

// A client that has connected is a guest who is in its room.
struct Visitor : Client {
    Visitor(Party& party, const std::string& name, const std::string& room = "")
        : Client(party.port(), "/?name=" + name + (room.empty() ? "" : "&room=" + room)) {}
};

std::string names_in(const Room& room) {
    std::set<std::string> names;
    for (WebSocketHandler& member : room) names.insert(static_cast<Guest&>(member).name());
    std::string all;
    for (const std::string& name : names) (all += all.empty() ? "" : " ") += name;
    return all;
}

}  // namespace

TEST_SUITE("rooms") {
    // ---- members ---------------------------------------------------------------------------------------------------

    TEST_CASE("who joins is a member until it leaves") {
        Party party;
        Visitor anna(party, "anna"), bert(party, "bert");
        party.on_loop([&] {
            Room& room = party.room("lobby");
            CHECK(room.name() == "lobby");
            CHECK(room.empty());
            CHECK(!room.has(party["anna"]));
            CHECK(room.join(party["anna"]));
            CHECK(!room.join(party["anna"]));
            CHECK(room.has(party["anna"]));
            CHECK(!room.has(party["bert"]));
            CHECK(room.size() == 1);
            CHECK(room.join(party["bert"]));
            CHECK(room.size() == 2);
            CHECK(names_in(room) == "anna bert");
            CHECK(room.leave(party["anna"]));
            CHECK(!room.leave(party["anna"]));
            CHECK(!room.has(party["anna"]));
            CHECK(room.has(party["bert"]));
            CHECK(names_in(room) == "bert");
            CHECK(!room.empty());
        });
        CHECK(party.size_of("lobby") == 1);
    }

    TEST_CASE("a room is the same for all who name it, and another for another name") {
        Party party;
        Visitor anna(party, "anna"), bert(party, "bert");
        party.on_loop([&] {
            CHECK(&party["anna"].room("lobby") == &party["bert"].room("lobby"));
            CHECK(&party["anna"].room("lobby") == &party.room("lobby"));
            CHECK(&party["anna"].room("lobby") != &party["anna"].room("Lobby"));
            party.room("").join(party["anna"]);
            party.room(std::string("a\0b", 3)).join(party["bert"]);
            CHECK(party.room("").size() == 1);
            CHECK(party.room("a").empty());
        });
    }

    TEST_CASE("a handler knows its rooms") {
        Party party;
        Visitor anna(party, "anna");
        const auto rooms_of = [](Guest& guest) {
            std::set<std::string> names;
            for (const Room* room : guest.rooms()) names.insert(room->name());
            return names;
        };
        party.on_loop([&] {
            Guest& guest = party["anna"];
            CHECK(guest.rooms().empty());
            for (const char* name : {"a", "b", "c"}) guest.room(name).join(guest);
            CHECK(rooms_of(guest) == std::set<std::string>{"a", "b", "c"});
            guest.room("a").leave(guest);
            CHECK(rooms_of(guest) == std::set<std::string>{"b", "c"});
        });
    }

    TEST_CASE("who is not open can not join") {
        Party party;
        Visitor anna(party, "anna");
        party.on_loop([&] {
            party["anna"].close(4000);
            CHECK(!party.room("lobby").join(party["anna"]));
            CHECK(party.room("lobby").empty());
            CHECK(party["anna"].rooms().empty());
        });
    }

    TEST_CASE("members that come and go at random are always known") {
        Party party;
        std::vector<std::unique_ptr<Visitor>> visitors;
        for (int i = 0; i < 12; ++i) visitors.push_back(std::make_unique<Visitor>(party, std::to_string(i)));
        party.on_loop([&] {
            std::mt19937 random(9);
            std::map<std::string, std::set<std::string>> expected;
            for (int i = 0; i < 5000; ++i) {
                const std::string name = std::to_string(random() % 12), room = "room " + std::to_string(random() % 5);
                const bool join = random() % 2 == 0;
                const bool news = join ? expected[room].insert(name).second : expected[room].erase(name) != 0;
                CHECK((join ? party.room(room).join(party[name]) : party.room(room).leave(party[name])) == news);
                CHECK(party.room(room).size() == expected[room].size());
            }
            for (const auto& entry : expected) {
                const std::string& room = entry.first;
                CAPTURE(room);
                for (int i = 0; i < 12; ++i)
                    CHECK(party.room(room).has(party[std::to_string(i)]) ==
                          (entry.second.count(std::to_string(i)) != 0));
            }
        });
        // And those who hang up are forgotten in all rooms.
        for (std::size_t i = 0; i < 12; i += 2) visitors[i]->raw.close();
        CHECK(party.running.eventually([&] { return party.guests.size() == 6; }));
        party.on_loop([&] {
            for (int room = 0; room < 5; ++room)
                for (WebSocketHandler& member : party.room("room " + std::to_string(room)))
                    CHECK(party.guests.at(static_cast<Guest&>(member).name()) == &member);
        });
    }

    TEST_CASE("a member leaves by itself, however its connection ends") {
        struct Row {
            std::string how;
            std::function<void(Party&, Visitor&)> end;
        };
        const Row rows[] = {
            {"the peer closes", [](Party&, Visitor& v) { v.close(); }},
            {"the peer hangs up", [](Party&, Visitor& v) { v.raw.close(); }},
            {"the peer resets", [](Party&, Visitor& v) { v.raw.reset(); }},
            {"the peer breaks the protocol", [](Party&, Visitor& v) { v.raw.send(hex("83 80 00 00 00 00")); }},
            {"the server closes",
             [](Party& p, Visitor& v) {
                 p.on_loop([&] { p["anna"].close(4000); });
                 v.close_code();
             }},
        };
        for (const Row& row : rows) {
            CAPTURE(row.how);
            Party party;
            Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby");
            CHECK(party.size_of("lobby") == 2);
            row.end(party, anna);
            CHECK(party.eventually_has("lobby", 1));
            CHECK(party.on_loop([&] { return names_in(party.room("lobby")); }) == "bert");
        }
    }

    TEST_CASE("a peer that vanished is forgotten by its rooms when it does not answer a ping") {
        wschat::Limits limits;
        limits.ping_interval = limits.ping_timeout = 30ms;
        Party party(limits);
        Visitor anna(party, "anna", "lobby");
        CHECK(party.eventually_has("lobby", 0));
    }

    TEST_CASE("the room has forgotten a member before its on_close, while rooms still names it") {
        std::string seen;
        Party party;
        party.on_close = [&](Guest& guest) {
            const std::vector<Room*> rooms = guest.rooms();
            for (Room* room : rooms) {
                seen += room->name() + ":" + std::to_string(room->size()) + " ";
                CHECK(!room->has(guest));
                CHECK(!room->leave(guest));
                CHECK(!room->join(guest));
                for (WebSocketHandler& member : *room) CHECK(&member != &guest);
                room->broadcast(guest.name() + " left " + room->name());
            }
            CHECK(guest.rooms() == rooms);
        };
        Visitor bert(party, "bert", "lobby");
        Visitor anna(party, "anna", "lobby");
        party.on_loop([&] { party.room("attic").join(party["anna"]); });
        anna.close();
        CHECK(bert.next() == "anna left lobby");
        CHECK(party.on_loop([&] { return seen; }) == "lobby:1 attic:0 ");
        CHECK(party.rooms() == 1);
    }

    // ---- broadcasts ------------------------------------------------------------------------------------------------

    TEST_CASE("a broadcast reaches every member, and nobody else") {
        Party party;
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby"), carl(party, "carl", "attic");
        CHECK(party.on_loop([&] { return party.room("lobby").broadcast("hello"); }) == 2);
        CHECK(party.on_loop([&] { return party.room("attic").broadcast("up here"); }) == 1);
        CHECK(party.on_loop([&] { return party.room("cellar").broadcast("is anybody there"); }) == 0);
        CHECK(anna.next() == "hello");
        CHECK(bert.next() == "hello");
        CHECK(carl.next() == "up here");
    }

    TEST_CASE("a broadcast leaves out whom it is told to") {
        Party party;
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby"), carl(party, "carl");
        party.on_message = [](Guest& guest, const Message& message) {
            CHECK(guest.room("lobby").broadcast(message, &guest) == 1);
            CHECK(guest.room("lobby").broadcast("to all") == 2);
        };
        anna.send("to the others");
        CHECK(bert.next() == "to the others");
        CHECK(bert.next() == "to all");
        CHECK(anna.next() == "to all");
        // One who is no member is no exception.
        CHECK(party.on_loop([&] { return party.room("lobby").broadcast("hello", &party["carl"]); }) == 2);
    }

    TEST_CASE("text, binary, JSON, messages and encoded frames are broadcast") {
        Party party;
        Visitor anna(party, "anna", "lobby");
        party.on_message = [&](Guest& guest, const Message& message) {
            Room& room = guest.room("lobby");
            room.broadcast("caf\xc3\xa9");
            room.broadcast("\xff", nullptr, Opcode::binary);
            room.broadcast(message);
            room.broadcast(wschat::EncodedFrame(party.running.server.arena(), Opcode::text, "encoded"));
            room.broadcast_json({{"type", "say"}, {"n", 1}});
        };
        anna.send("\xfe", Opcode::binary);
        CHECK(anna.raw.read_until(hex("81 05 63 61 66 c3 a9 82 01 ff 82 01 fe 81 07") + "encoded" + hex("81 14") +
                                  R"({"type":"say","n":1})"));
    }

    TEST_CASE("JSON is broadcast to all but one") {
        Party party;
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby");
        party.on_loop([&] {
            CHECK(party.room("lobby").broadcast_json({{"n", 1}}, &party["anna"]) == 1);
            CHECK(party.room("lobby").broadcast_json(Json::array(std::vector<int>{2}), nullptr) == 2);
        });
        CHECK(anna.next() == "[2]");
        CHECK(bert.next() == R"({"n":1})");
    }

    TEST_CASE("a broadcast of text that is not UTF-8, or of a control frame, is an Error and reaches nobody") {
        Party party;
        Visitor anna(party, "anna", "lobby");
        party.on_loop([&] {
            Room& room = party.room("lobby");
            CHECK_THROWS_WITH_AS(room.broadcast("\xff"), "broadcast: the text is not UTF-8; send it as Opcode::binary",
                                 Error);
            CHECK_THROWS_WITH_AS(room.broadcast("x", nullptr, Opcode::close),
                                 "broadcast: the opcode is neither text nor binary", Error);
            // Also where nobody would get it: the mistake does not hide behind an empty room.
            CHECK_THROWS_AS(party.room("empty").broadcast("\xff"), Error);
            room.broadcast("fine");
        });
        CHECK(anna.next() == "fine");
    }

    TEST_CASE("a member that is closing gets nothing more and is not counted") {
        Party party;
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby");
        party.on_loop([&] {
            party.room("lobby").broadcast("one");
            party["anna"].close(4000);
            CHECK(party.room("lobby").broadcast("two") == 1);
            CHECK(party.room("lobby").size() == 2);
        });
        CHECK(anna.next() == "one");
        CHECK(!anna.next());
        CHECK(anna.connection.close_code() == CloseCode{4000});
        CHECK(bert.next() == "one");
        CHECK(bert.next() == "two");
    }

    TEST_CASE("broadcasts and direct messages keep their order") {
        Party party;
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby"), carl(party, "carl", "lobby");
        party.on_loop([&] {
            party.room("attic").join(party["anna"]);
            for (std::size_t i = 0; i < 1000; ++i) {
                const std::string n = std::to_string(i);
                // Of all sizes, so that they lie in the same chunk, in another, and in chunks of their own.
                party.room("lobby").broadcast("all " + n + std::string(i % 100 == 0 ? 70'000 : i % 7 * 100, '.'));
                party["anna"].write_message("anna " + n);
                if (i % 3 == 0) party.room("attic").broadcast("attic " + n);
                party.room("lobby").broadcast("but bert " + n, &party["bert"]);
            }
        });
        const auto hears = [](Client& client, const std::string& wanted) {
            const auto message = client.next();
            return message && message->substr(0, message->find('.')) == wanted;
        };
        for (int i = 0; i < 1000; ++i) {
            CAPTURE(i);
            const std::string n = std::to_string(i);
            REQUIRE(hears(anna, "all " + n));
            REQUIRE(hears(anna, "anna " + n));
            if (i % 3 == 0) REQUIRE(hears(anna, "attic " + n));
            REQUIRE(hears(anna, "but bert " + n));
            REQUIRE(hears(bert, "all " + n));
            REQUIRE(hears(carl, "all " + n));
            REQUIRE(hears(carl, "but bert " + n));
        }
    }

    TEST_CASE("a broadcast is encoded once, however many members there are") {
        Party party;
        std::vector<std::unique_ptr<Visitor>> visitors;
        for (int i = 0; i < 50; ++i) visitors.push_back(std::make_unique<Visitor>(party, std::to_string(i), "lobby"));
        const std::size_t bytes = party.on_loop([&] {
            wschat::detail::SendArena& arena = party.running.server.arena();
            const wschat::detail::Slice before = arena.allocate(1);
            CHECK(party.room("lobby").broadcast(std::string(1000, 'x')) == 50);
            const wschat::detail::Slice after = arena.allocate(1);
            CHECK(before.chunk == after.chunk);
            return after.begin - before.end;
        });
        CHECK(bytes == 4 + 1000);  // a header and the payload
        for (auto& visitor : visitors) CHECK(visitor->next() == std::string(1000, 'x'));
    }

    TEST_CASE("a broadcast to an empty room writes nothing") {
        Party party;
        CHECK(party.on_loop([&] {
            const wschat::detail::Slice before = party.running.server.arena().allocate(1);
            party.room("lobby").broadcast(std::string(1000, 'x'));
            return party.running.server.arena().allocate(1).begin - before.end;
        }) == 0);
    }

    TEST_CASE("members that die in the middle of broadcasts cost the others nothing") {
        Party party;
        std::vector<std::unique_ptr<Visitor>> visitors;
        for (int i = 0; i < 20; ++i) visitors.push_back(std::make_unique<Visitor>(party, std::to_string(i), "lobby"));
        for (int round = 0; round < 200; ++round) {
            // Half of them reset, one in each tenth round.
            if (round % 20 == 0) visitors[static_cast<std::size_t>(round / 10)]->raw.reset();
            party.on_loop([&] { party.room("lobby").broadcast(std::to_string(round) + std::string(5000, '.')); });
        }
        for (std::size_t i = 0; i < 20; ++i) {
            if (i % 2 == 0) continue;
            for (int round = 0; round < 200; ++round) {
                CAPTURE(i);
                REQUIRE(visitors[i]->next() == std::to_string(round) + std::string(5000, '.'));
            }
        }
        CHECK(party.eventually_has("lobby", 10));
    }

    TEST_CASE("half of a room resets at once during a fan-out") {
        Party party;
        std::vector<std::unique_ptr<Visitor>> visitors;
        for (int i = 0; i < 20; ++i) visitors.push_back(std::make_unique<Visitor>(party, std::to_string(i), "lobby"));
        party.on_loop([&] {
            for (std::size_t i = 0; i < 20; i += 2) visitors[i]->raw.reset();
            for (int n = 0; n < 50; ++n) party.room("lobby").broadcast(std::to_string(n) + std::string(50'000, '.'));
        });
        CHECK(party.eventually_has("lobby", 10));
        for (std::size_t i = 1; i < 20; i += 2)
            for (int n = 0; n < 50; ++n) REQUIRE(visitors[i]->next() == std::to_string(n) + std::string(50'000, '.'));
    }

    TEST_CASE("a member that does not read is dropped from or closed, and the broadcast goes on") {
        for (const auto policy : {wschat::BacklogPolicy::drop, wschat::BacklogPolicy::close}) {
            wschat::Limits limits;
            limits.backlog_policy = policy;
            limits.max_backlog = 256 * 1024;
            Party party(limits);
            Visitor slow(party, "slow", "lobby"), quick(party, "quick", "lobby");
            const int narrow = 16 * 1024;
            ::setsockopt(slow.raw.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &narrow, sizeof narrow);
            int rounds = 0;
            std::size_t reached = 2;
            for (; reached == 2 && rounds < 10'000; ++rounds) {
                reached = party.on_loop([&] { return party.room("lobby").broadcast(std::string(30'000, '.')); });
                REQUIRE(quick.next());
            }
            CHECK(reached == 1);
            CHECK(party.running.metrics().messages_dropped == (policy == wschat::BacklogPolicy::drop ? 1 : 0));
            CHECK(party.eventually_has("lobby", policy == wschat::BacklogPolicy::drop ? 2 : 1));
            party.on_loop([&] { party["quick"].write_message("still here"); });
            CHECK(quick.next() == "still here");
        }
    }

    // ---- loops over a room -----------------------------------------------------------------------------------------

    // What a loop over a room does to each member, and who is visited. Of "0" to "5" all but "5" are in the room.
    std::set<std::string> visit(Party & party, const std::function<void(Room&, Guest&)>& body) {
        return party.on_loop([&] {
            std::set<std::string> visited;
            Room& room = party.room("lobby");
            for (WebSocketHandler& member : room) {
                CHECK(visited.insert(static_cast<Guest&>(member).name()).second);
                body(room, static_cast<Guest&>(member));
            }
            return visited;
        });
    }
    struct SixVisitors {
        explicit SixVisitors(Party& party) {
            for (int i = 0; i < 6; ++i)
                all.push_back(std::make_unique<Visitor>(party, std::to_string(i), i < 5 ? "lobby" : ""));
        }
        std::vector<std::unique_ptr<Visitor>> all;
    };
    const std::set<std::string> all_five = {"0", "1", "2", "3", "4"};

    TEST_CASE("a member that does not read misses what is volatile, and nothing else") {
        wschat::Limits limits;
        limits.max_backlog = 256 * 1024 * 1024;
        Party party(limits);
        Visitor reader(party, "reader", "lobby"), sleeper(party, "sleeper", "lobby"),
            left_out(party, "left_out", "lobby");
        const std::string large(64 * 1024 * 1024, 'x');  // more than a kernel takes
        party.on_loop([&] { party["sleeper"].write_message(large, Opcode::binary); });
        party.on_loop([&] {
            CHECK(party.room("lobby").broadcast_volatile("typing", &party["left_out"]) == 1);
            CHECK(party["sleeper"].dropped_messages() == 1);
            CHECK(party.room("lobby").broadcast("said") == 3);
            CHECK_THROWS_AS(party.room("lobby").broadcast_volatile("\xFF"), Error);
            CHECK(party.room("empty").broadcast_volatile("nobody") == 0);
        });
        CHECK(reader.next() == "typing");
        CHECK(reader.next() == "said");
        CHECK((sleeper.next() == large));
        CHECK(sleeper.next() == "said");
        CHECK(left_out.next() == "said");
    }

    TEST_CASE("a loop over a room visits each member once") {
        Party party;
        SixVisitors visitors(party);
        CHECK(visit(party, [](Room&, Guest& guest) { guest.write_message("hello " + guest.name()); }) == all_five);
        for (std::size_t i = 0; i < 5; ++i) CHECK(visitors.all[i]->next() == "hello " + std::to_string(i));
        CHECK(party.on_loop([&] { return names_in(party.room("nobody here")); }) == "");
    }

    TEST_CASE("in a loop over a room each member may leave") {
        Party party;
        SixVisitors visitors(party);
        CHECK(visit(party, [](Room& room, Guest& guest) { CHECK(room.leave(guest)); }) == all_five);
        CHECK(party.size_of("lobby") == 0);
        CHECK(party.rooms() == 0);
    }

    TEST_CASE("in a loop over a room each member may be closed") {
        Party party;
        SixVisitors visitors(party);
        CHECK(visit(party, [](Room&, Guest& guest) { guest.close(4000); }) == all_five);
        for (std::size_t i = 0; i < 5; ++i) CHECK(visitors.all[i]->close_code() == CloseCode{4000});
        CHECK(party.eventually_has("lobby", 0));
    }

    TEST_CASE("in a loop over a room all others may leave, and are not visited then") {
        Party party;
        SixVisitors visitors(party);
        const auto visited = visit(party, [&](Room& room, Guest& guest) {
            for (WebSocketHandler& other : room)
                if (&other != &guest) room.leave(other);
            CHECK(room.size() == 1);
        });
        CHECK(visited.size() == 1);
        CHECK(party.on_loop([&] { return names_in(party.room("lobby")); }) == *visited.begin());
    }

    TEST_CASE("in a loop over a room members may join, and are not visited yet") {
        Party party;
        SixVisitors visitors(party);
        CHECK(visit(party, [&](Room& room, Guest&) { room.join(party["5"]); }) == all_five);
        CHECK(party.size_of("lobby") == 6);
    }

    TEST_CASE("in a loop over a room a member may leave and join again") {
        Party party;
        SixVisitors visitors(party);
        CHECK(visit(party, [&](Room& room, Guest& guest) {
                  room.leave(guest);
                  room.join(guest);
              }) == all_five);
        CHECK(party.size_of("lobby") == 5);
    }

    TEST_CASE("in a loop over a room there may be broadcasts") {
        Party party;
        SixVisitors visitors(party);
        CHECK(visit(party, [&](Room& room, Guest& guest) {
                  CHECK(room.broadcast("not to " + guest.name(), &guest) == 4);
              }) == all_five);
        for (std::size_t i = 0; i < 5; ++i) {
            std::set<std::string> heard;
            for (int n = 0; n < 4; ++n) heard.insert(visitors.all[i]->next().value_or("nothing"));
            CHECK(heard.size() == 4);
            CHECK(heard.count("not to " + std::to_string(i)) == 0);
        }
    }

    TEST_CASE("a loop over a room ends where the last member leaves in it") {
        Party party;
        SixVisitors visitors(party);
        const auto visited = visit(party, [&](Room& room, Guest&) {
            for (const std::string& name : all_five) room.leave(party[name]);
        });
        CHECK(visited.size() == 1);
        CHECK(party.rooms() == 0);
    }

    TEST_CASE("members close, leave, join and broadcast from their callbacks") {
        Party party;
        party.on_message = [](Guest& guest, const Message& message) {
            Room& room = guest.room("lobby");
            if (message.text() == "leave") room.leave(guest);
            if (message.text() == "join") room.join(guest);
            if (message.text() == "close") guest.close(4000);
            if (message.text() == "close all")
                for (WebSocketHandler& member : room) member.close(4001);
            room.broadcast(guest.name() + " says " + std::string(message.text()));
        };
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby"), carl(party, "carl", "lobby");
        anna.send("hello");
        for (Client* client : {&anna, &bert, &carl}) CHECK(client->next() == "anna says hello");
        anna.send("leave");
        for (Client* client : {&bert, &carl}) CHECK(client->next() == "anna says leave");
        bert.send("close");
        CHECK(carl.next() == "bert says close");
        CHECK(bert.close_code() == CloseCode{4000});
        anna.send("join");
        CHECK(anna.next() == "anna says join");
        CHECK(carl.next() == "anna says join");
        carl.send("close all");
        CHECK(anna.close_code() == CloseCode{4001});
        CHECK(carl.close_code() == CloseCode{4001});
        CHECK(party.eventually_has("lobby", 0));
    }

    // ---- empty rooms -----------------------------------------------------------------------------------------------

    TEST_CASE("a room is made by being named, and gone at the end of a turn in which it is empty") {
        Party party;
        Visitor anna(party, "anna");
        party.on_loop([&] {
            for (int i = 0; i < 10'000; ++i) party.room("room " + std::to_string(i));
            CHECK(party.running.server.rooms().size() == 10'000);
            // Nobody is in them.
            CHECK(party.running.server.rooms().find("room 1") == nullptr);
            party.room("room 7").join(party["anna"]);
            CHECK(party.running.server.rooms().find("room 7") == &party.room("room 7"));
        });
        CHECK(party.rooms() == 1);
        CHECK(party.on_loop([&] { return party.running.server.rooms().names(); }) ==
              std::vector<std::string>{"room 7"});
        CHECK(party.running.metrics().rooms == 1);
        party.on_loop([&] { party.room("room 7").leave(party["anna"]); });
        CHECK(party.rooms() == 0);
    }

    TEST_CASE("a room whose last member hangs up is gone") {
        Party party;
        Visitor anna(party, "anna", "lobby");
        CHECK(party.rooms() == 1);
        anna.raw.close();
        CHECK(party.running.eventually([&] { return party.running.server.rooms().size() == 0; }));
    }

    TEST_CASE("a room that is left and joined again within a callback is the same room") {
        Party party;
        Visitor anna(party, "anna", "lobby");
        party.on_loop([&] {
            Room& room = party.room("lobby");
            for (int i = 0; i < 3; ++i) {
                CHECK(room.leave(party["anna"]));
                CHECK(&party.room("lobby") == &room);
                CHECK(room.join(party["anna"]));
            }
        });
        CHECK(party.size_of("lobby") == 1);
        party.on_loop([&] { CHECK(party.room("lobby").broadcast("hello") == 1); });
        CHECK(anna.next() == "hello");
    }

    TEST_CASE("rooms that come and go for ever are all forgotten") {
        Party party;
        Visitor anna(party, "anna");
        for (int turn = 0; turn < 300; ++turn)
            party.on_loop([&] {
                Guest& guest = party["anna"];
                for (Room* room : guest.rooms()) CHECK(room->leave(guest));
                for (int i = 0; i < 3; ++i) guest.room(std::to_string(turn) + "/" + std::to_string(i)).join(guest);
            });
        CHECK(party.rooms() == 3);
        anna.raw.close();
        CHECK(party.running.eventually([&] { return party.running.server.rooms().size() == 0; }));
    }

    TEST_CASE("in on_close a handler is no member, though another has taken its place") {
        bool known = true;
        Party party;
        party.on_close = [&](Guest& guest) {
            Room& room = *guest.rooms().front();
            known = room.has(guest) || room.leave(guest);
            CHECK(names_in(room) == "bert cleo");
        };
        Visitor anna(party, "anna", "lobby"), bert(party, "bert", "lobby"), cleo(party, "cleo", "lobby");
        anna.close();
        REQUIRE(party.eventually_has("lobby", 2));
        CHECK_FALSE(party.on_loop([&] { return known; }));
        party.on_loop([&] { party.on_close = nullptr; });
    }

    TEST_CASE("an iterator of a room points to its members") {
        Party party;
        Visitor anna(party, "anna", "lobby");
        CHECK(party.on_loop([&] { return party.room("lobby").begin()->is_open(); }));
        CHECK(party.on_loop([&] { return party.room("lobby").begin().operator->() == &party["anna"]; }));
    }
}
