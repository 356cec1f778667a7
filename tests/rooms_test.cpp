// Section 9: rooms whose members have real connections.
#include "support.hpp"

#include <map>
#include <random>
#include <set>

namespace {

using test::hex;
using test::RunningServer;
using test::WsClient;
using wschat::CloseCode;
using wschat::Error;
using wschat::Json;
using wschat::Message;
using wschat::Opcode;
using wschat::Room;
using wschat::WebSocketHandler;
using namespace std::chrono_literals;

class Member;

// A server whose members have names, "/?name=anna", and join a room when they open, "&room=lobby". All members are on one
// loop, because the tests act on several of them at once. server_loops_test.cpp has the rooms of several loops.
struct Fixture {
    explicit Fixture(const wschat::Limits& limits = {}) : running(test::with_limits(limits)) {
        running.server.route<Member>("/", std::ref(*this));
        running.start();
    }
    int port() const { return running.port(); }
    template <class Function>
    auto on_loop(Function function) {
        return running.on_loop(std::move(function));
    }
    // Only for the loop's thread.
    Room& room(std::string_view name) { return running.server.rooms()[name]; }
    Member& operator[](const std::string& name) { return *members.at(name); }

    // Without creating the room.
    std::size_t size_of(std::string_view name) {
        return on_loop([&] { return member_count(name); });
    }
    bool eventually_has(std::string_view name, std::size_t size) {
        return running.eventually([&] { return member_count(name) == size; });
    }
    std::size_t rooms() {
        return on_loop([&] { return running.server.rooms().size(); });
    }

    const test::OneLoop one_loop;
    std::map<std::string, Member*> members;  // only for the loop's thread
    std::function<void(Member&)> on_close;
    std::function<void(Member&, const Message&)> on_message;
    RunningServer running;

private:
    std::size_t member_count(std::string_view name) {
        const Room* room = running.server.rooms().find(name);
        return room == nullptr ? 0 : room->size();
    }
};

class Member : public WebSocketHandler {
public:
    explicit Member(Fixture& fixture) : fixture_(fixture) {}

    std::string name() const { return request().query("name").value_or("unnamed"); }

    void open() override {
        fixture_.members[name()] = this;
        if (const auto name = request().query("room")) room(*name).join(*this);
    }
    void on_message(const Message& message) override {
        if (fixture_.on_message) fixture_.on_message(*this, message);
    }
    void on_close() override {
        if (fixture_.on_close) fixture_.on_close(*this);
        fixture_.members.erase(name());
    }

private:
    Fixture& fixture_;
};

// The client of a member.
struct MemberClient : WsClient {
    MemberClient(Fixture& fixture, const std::string& name, const std::string& room = "")
        : WsClient(fixture.port(), "/?name=" + name + (room.empty() ? "" : "&room=" + room)) {}
};

struct WithDump {
    std::string text;
    std::string dump() const { return text; }
};

std::string names_in(const Room& room) {
    std::set<std::string> names;
    for (WebSocketHandler& member : room) names.insert(static_cast<Member&>(member).name());
    std::string all;
    for (const std::string& name : names) (all += all.empty() ? "" : " ") += name;
    return all;
}

}  // namespace

TEST_SUITE("rooms") {
    // ---- members ---------------------------------------------------------------------------------------------------

    TEST_CASE("a handler is a member from join to leave") {
        Fixture fixture;
        MemberClient anna(fixture, "anna"), bert(fixture, "bert");
        fixture.on_loop([&] {
            Room& room = fixture.room("lobby");
            CHECK(room.name() == "lobby");
            CHECK(room.empty());
            CHECK(!room.has(fixture["anna"]));
            CHECK(room.join(fixture["anna"]));
            CHECK(!room.join(fixture["anna"]));
            CHECK(room.has(fixture["anna"]));
            CHECK(!room.has(fixture["bert"]));
            CHECK(room.size() == 1);
            CHECK(room.join(fixture["bert"]));
            CHECK(room.size() == 2);
            CHECK(names_in(room) == "anna bert");
            CHECK(room.leave(fixture["anna"]));
            CHECK(!room.leave(fixture["anna"]));
            CHECK(!room.has(fixture["anna"]));
            CHECK(room.has(fixture["bert"]));
            CHECK(names_in(room) == "bert");
            CHECK(!room.empty());
        });
        CHECK(fixture.size_of("lobby") == 1);
    }

    TEST_CASE("a name always refers to the same room") {
        Fixture fixture;
        MemberClient anna(fixture, "anna"), bert(fixture, "bert");
        fixture.on_loop([&] {
            CHECK(&fixture["anna"].room("lobby") == &fixture["bert"].room("lobby"));
            CHECK(&fixture["anna"].room("lobby") == &fixture.room("lobby"));
            CHECK(&fixture["anna"].room("lobby") != &fixture["anna"].room("Lobby"));
            fixture.room("").join(fixture["anna"]);
            fixture.room(std::string("a\0b", 3)).join(fixture["bert"]);
            CHECK(fixture.room("").size() == 1);
            CHECK(fixture.room("a").empty());
        });
    }

    TEST_CASE("rooms returns the rooms of a handler") {
        Fixture fixture;
        MemberClient anna(fixture, "anna");
        const auto rooms_of = [](Member& member) {
            std::set<std::string> names;
            for (const Room* room : member.rooms()) names.insert(room->name());
            return names;
        };
        fixture.on_loop([&] {
            Member& member = fixture["anna"];
            CHECK(member.rooms().empty());
            for (const char* name : {"a", "b", "c"}) member.room(name).join(member);
            CHECK(rooms_of(member) == std::set<std::string>{"a", "b", "c"});
            member.room("a").leave(member);
            CHECK(rooms_of(member) == std::set<std::string>{"b", "c"});
        });
    }

    TEST_CASE("a handler that is not open cannot join") {
        Fixture fixture;
        MemberClient anna(fixture, "anna");
        fixture.on_loop([&] {
            fixture["anna"].close(4000);
            CHECK(!fixture.room("lobby").join(fixture["anna"]));
            CHECK(fixture.room("lobby").empty());
            CHECK(fixture["anna"].rooms().empty());
        });
    }

    TEST_CASE("random joins and leaves keep the member lists correct") {
        Fixture fixture;
        std::vector<std::unique_ptr<MemberClient>> clients;
        for (int i = 0; i < 12; ++i) clients.push_back(std::make_unique<MemberClient>(fixture, std::to_string(i)));
        fixture.on_loop([&] {
            std::mt19937 random(9);
            std::map<std::string, std::set<std::string>> expected;
            for (int i = 0; i < 5000; ++i) {
                const std::string name = std::to_string(random() % 12), room = "room " + std::to_string(random() % 5);
                const bool join = random() % 2 == 0;
                const bool changed = join ? expected[room].insert(name).second : expected[room].erase(name) != 0;
                CHECK((join ? fixture.room(room).join(fixture[name]) : fixture.room(room).leave(fixture[name])) ==
                      changed);
                CHECK(fixture.room(room).size() == expected[room].size());
            }
            for (const auto& entry : expected) {
                const std::string& room = entry.first;
                CAPTURE(room);
                for (int i = 0; i < 12; ++i)
                    CHECK(fixture.room(room).has(fixture[std::to_string(i)]) ==
                          (entry.second.count(std::to_string(i)) != 0));
            }
        });
        // Members that hang up leave all rooms.
        for (std::size_t i = 0; i < 12; i += 2) clients[i]->raw.close();
        CHECK(fixture.running.eventually([&] { return fixture.members.size() == 6; }));
        fixture.on_loop([&] {
            for (int room = 0; room < 5; ++room)
                for (WebSocketHandler& member : fixture.room("room " + std::to_string(room)))
                    CHECK(fixture.members.at(static_cast<Member&>(member).name()) == &member);
        });
    }

    TEST_CASE("a member leaves automatically for each kind of end") {
        struct Row {
            std::string name;
            std::function<void(Fixture&, MemberClient&)> end;
        };
        const Row rows[] = {
            {"the peer closes", [](Fixture&, MemberClient& v) { v.close(); }},
            {"the peer hangs up", [](Fixture&, MemberClient& v) { v.raw.close(); }},
            {"the peer resets", [](Fixture&, MemberClient& v) { v.raw.reset(); }},
            {"the peer breaks the protocol", [](Fixture&, MemberClient& v) { v.raw.send(hex("83 80 00 00 00 00")); }},
            {"the server closes",
             [](Fixture& p, MemberClient& v) {
                 p.on_loop([&] { p["anna"].close(4000); });
                 v.close_code();
             }},
        };
        for (const Row& row : rows) {
            CAPTURE(row.name);
            Fixture fixture;
            MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby");
            CHECK(fixture.size_of("lobby") == 2);
            row.end(fixture, anna);
            CHECK(fixture.eventually_has("lobby", 1));
            CHECK(fixture.on_loop([&] { return names_in(fixture.room("lobby")); }) == "bert");
        }
    }

    TEST_CASE("a member that does not answer a ping leaves its rooms") {
        wschat::Limits limits;
        limits.ping_interval = limits.ping_timeout = 30ms;
        Fixture fixture(limits);
        MemberClient anna(fixture, "anna", "lobby");
        CHECK(fixture.eventually_has("lobby", 0));
    }

    TEST_CASE("in on_close the room no longer has the member but rooms still returns the room") {
        std::string seen;
        Fixture fixture;
        fixture.on_close = [&](Member& member) {
            const std::vector<Room*> rooms = member.rooms();
            for (Room* room : rooms) {
                seen += room->name() + ":" + std::to_string(room->size()) + " ";
                CHECK(!room->has(member));
                CHECK(!room->leave(member));
                CHECK(!room->join(member));
                for (WebSocketHandler& other : *room) CHECK(&other != &member);
                room->broadcast(member.name() + " left " + room->name());
            }
            CHECK(member.rooms() == rooms);
        };
        MemberClient bert(fixture, "bert", "lobby");
        MemberClient anna(fixture, "anna", "lobby");
        fixture.on_loop([&] { fixture.room("attic").join(fixture["anna"]); });
        anna.close();
        CHECK(bert.next() == "anna left lobby");
        CHECK(fixture.on_loop([&] { return seen; }) == "lobby:1 attic:0 ");
        CHECK(fixture.rooms() == 1);
    }

    // ---- broadcasts ------------------------------------------------------------------------------------------------

    TEST_CASE("a broadcast reaches every member and no other handler") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby"), carl(fixture, "carl", "attic");
        CHECK(fixture.on_loop([&] { return fixture.room("lobby").broadcast("hello"); }) == 2);
        CHECK(fixture.on_loop([&] { return fixture.room("attic").broadcast("up here"); }) == 1);
        CHECK(fixture.on_loop([&] { return fixture.room("cellar").broadcast("hello"); }) == 0);
        CHECK(anna.next() == "hello");
        CHECK(bert.next() == "hello");
        CHECK(carl.next() == "up here");
    }

    TEST_CASE("a broadcast excludes one handler") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby"), carl(fixture, "carl");
        fixture.on_message = [](Member& member, const Message& message) {
            CHECK(member.room("lobby").broadcast(message, &member) == 1);
            CHECK(member.room("lobby").broadcast("to all") == 2);
        };
        anna.send("to the others");
        CHECK(bert.next() == "to the others");
        CHECK(bert.next() == "to all");
        CHECK(anna.next() == "to all");
        // The excluded handler need not be a member.
        CHECK(fixture.on_loop([&] { return fixture.room("lobby").broadcast("hello", &fixture["carl"]); }) == 2);
    }

    TEST_CASE("broadcast takes text, bytes, JSON, messages and encoded frames") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby");
        fixture.on_message = [&](Member& member, const Message& message) {
            Room& room = member.room("lobby");
            room.broadcast("caf\xc3\xa9");
            room.broadcast("\xff", nullptr, Opcode::binary);
            room.broadcast(message);
            room.broadcast(fixture.running.server.rooms().encode("encoded"));
            room.broadcast_json({{"type", "say"}, {"n", 1}});
            CHECK(room.broadcast_binary("\xfd") == 1);
            CHECK(room.broadcast_volatile(message) == 1);
            CHECK(room.broadcast_volatile(fixture.running.server.rooms().encode("\xfc", Opcode::binary)) == 1);
            CHECK(room.broadcast_json(WithDump{"\"dump\""}) == 1);
            CHECK_THROWS_WITH_AS(room.broadcast_json(WithDump{"\xff"}), "Json: dump() returned text that is not UTF-8",
                                 Error);
        };
        anna.send("\xfe", Opcode::binary);
        CHECK(anna.raw.read_until(hex("81 05 63 61 66 c3 a9 82 01 ff 82 01 fe 81 07") + "encoded" + hex("81 14") +
                                  R"({"type":"say","n":1})" +
                                  hex("82 01 fd 82 01 fe 82 01 fc 81 06 22 64 75 6d 70 22")));
    }

    TEST_CASE("broadcast_json excludes one handler") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby");
        fixture.on_loop([&] {
            CHECK(fixture.room("lobby").broadcast_json({{"n", 1}}, &fixture["anna"]) == 1);
            CHECK(fixture.room("lobby").broadcast_json(Json::array(std::vector<int>{2}), nullptr) == 2);
        });
        CHECK(anna.next() == "[2]");
        CHECK(bert.next() == R"({"n":1})");
    }

    TEST_CASE("a broadcast of invalid text or of a control frame throws an Error and sends nothing") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby");
        fixture.on_loop([&] {
            Room& room = fixture.room("lobby");
            CHECK_THROWS_WITH_AS(room.broadcast("\xff"), "broadcast: the text is not UTF-8; send it as Opcode::binary",
                                 Error);
            CHECK_THROWS_WITH_AS(room.broadcast("x", nullptr, Opcode::close),
                                 "broadcast: the opcode is neither text nor binary", Error);
            // An empty room reports the mistake too.
            CHECK_THROWS_AS(fixture.room("empty").broadcast("\xff"), Error);
            room.broadcast("valid");
        });
        CHECK(anna.next() == "valid");
    }

    TEST_CASE("a closing member receives no broadcast and is not counted") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby");
        fixture.on_loop([&] {
            fixture.room("lobby").broadcast("one");
            fixture["anna"].close(4000);
            CHECK(fixture.room("lobby").broadcast("two") == 1);
            CHECK(fixture.room("lobby").size() == 2);
        });
        CHECK(anna.next() == "one");
        CHECK(!anna.next());
        CHECK(anna.connection.close_code() == CloseCode{4000});
        CHECK(bert.next() == "one");
        CHECK(bert.next() == "two");
    }

    TEST_CASE("broadcasts and direct messages stay in order") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby"), carl(fixture, "carl", "lobby");
        fixture.on_loop([&] {
            fixture.room("attic").join(fixture["anna"]);
            for (std::size_t i = 0; i < 1000; ++i) {
                const std::string n = std::to_string(i);
                // The sizes fill the same chunk, the next chunk and separate chunks.
                fixture.room("lobby").broadcast("all " + n + std::string(i % 100 == 0 ? 70'000 : i % 7 * 100, '.'));
                fixture["anna"].write_message("anna " + n);
                if (i % 3 == 0) fixture.room("attic").broadcast("attic " + n);
                fixture.room("lobby").broadcast("but bert " + n, &fixture["bert"]);
            }
        });
        const auto receives = [](WsClient& client, const std::string& expected) {
            const auto message = client.next();
            return message && message->substr(0, message->find('.')) == expected;
        };
        for (int i = 0; i < 1000; ++i) {
            CAPTURE(i);
            const std::string n = std::to_string(i);
            REQUIRE(receives(anna, "all " + n));
            REQUIRE(receives(anna, "anna " + n));
            if (i % 3 == 0) REQUIRE(receives(anna, "attic " + n));
            REQUIRE(receives(anna, "but bert " + n));
            REQUIRE(receives(bert, "all " + n));
            REQUIRE(receives(carl, "all " + n));
            REQUIRE(receives(carl, "but bert " + n));
        }
    }

    TEST_CASE("a broadcast is encoded once for any number of members") {
        Fixture fixture;
        std::vector<std::unique_ptr<MemberClient>> clients;
        for (int i = 0; i < 50; ++i)
            clients.push_back(std::make_unique<MemberClient>(fixture, std::to_string(i), "lobby"));
        const std::size_t bytes = fixture.on_loop([&] {
            wschat::detail::SendArena& arena = wschat::detail::RoomsAccess::arena(fixture.running.server.rooms());
            const wschat::detail::Slice before = arena.allocate(1);
            CHECK(fixture.room("lobby").broadcast(std::string(1000, 'x')) == 50);
            const wschat::detail::Slice after = arena.allocate(1);
            CHECK(before.chunk == after.chunk);
            return after.begin - before.end();
        });
        CHECK(bytes == 4 + 1000);  // the header and the payload
        for (auto& client : clients) CHECK(client->next() == std::string(1000, 'x'));
    }

    TEST_CASE("a broadcast to an empty room encodes nothing") {
        Fixture fixture;
        CHECK(fixture.on_loop([&] {
            const wschat::detail::Slice before =
                wschat::detail::RoomsAccess::arena(fixture.running.server.rooms()).allocate(1);
            fixture.room("lobby").broadcast(std::string(1000, 'x'));
            return wschat::detail::RoomsAccess::arena(fixture.running.server.rooms()).allocate(1).begin - before.end();
        }) == 0);
    }

    TEST_CASE("members that reset between broadcasts do not affect the others") {
        Fixture fixture;
        std::vector<std::unique_ptr<MemberClient>> clients;
        for (int i = 0; i < 20; ++i)
            clients.push_back(std::make_unique<MemberClient>(fixture, std::to_string(i), "lobby"));
        for (int round = 0; round < 200; ++round) {
            // Half of the members reset, one in every 20th round.
            if (round % 20 == 0) clients[static_cast<std::size_t>(round / 10)]->raw.reset();
            fixture.on_loop([&] { fixture.room("lobby").broadcast(std::to_string(round) + std::string(5000, '.')); });
        }
        for (std::size_t i = 0; i < 20; ++i) {
            if (i % 2 == 0) continue;
            for (int round = 0; round < 200; ++round) {
                CAPTURE(i);
                REQUIRE(clients[i]->next() == std::to_string(round) + std::string(5000, '.'));
            }
        }
        CHECK(fixture.eventually_has("lobby", 10));
    }

    TEST_CASE("members that reset during a fan-out do not affect the others") {
        Fixture fixture;
        std::vector<std::unique_ptr<MemberClient>> clients;
        for (int i = 0; i < 20; ++i)
            clients.push_back(std::make_unique<MemberClient>(fixture, std::to_string(i), "lobby"));
        fixture.on_loop([&] {
            for (std::size_t i = 0; i < 20; i += 2) clients[i]->raw.reset();
            for (int n = 0; n < 50; ++n) fixture.room("lobby").broadcast(std::to_string(n) + std::string(50'000, '.'));
        });
        CHECK(fixture.eventually_has("lobby", 10));
        for (std::size_t i = 1; i < 20; i += 2)
            for (int n = 0; n < 50; ++n) REQUIRE(clients[i]->next() == std::to_string(n) + std::string(50'000, '.'));
    }

    TEST_CASE("a slow member misses messages or is closed and the broadcast continues") {
        for (const auto policy : {wschat::BacklogPolicy::drop, wschat::BacklogPolicy::close}) {
            wschat::Limits limits;
            limits.backlog_policy = policy;
            limits.max_backlog = 256 * 1024;
            Fixture fixture(limits);
            MemberClient slow(fixture, "slow", "lobby"), fast(fixture, "fast", "lobby");
            const int small_buffer = 16 * 1024;
            ::setsockopt(slow.raw.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &small_buffer, sizeof small_buffer);
            int rounds = 0;
            std::size_t reached = 2;
            for (; reached == 2 && rounds < 10'000; ++rounds) {
                reached = fixture.on_loop([&] { return fixture.room("lobby").broadcast(std::string(30'000, '.')); });
                REQUIRE(fast.next());
            }
            CHECK(reached == 1);
            CHECK(fixture.running.metrics().messages_dropped == (policy == wschat::BacklogPolicy::drop ? 1 : 0));
            CHECK(fixture.eventually_has("lobby", policy == wschat::BacklogPolicy::drop ? 2 : 1));
            fixture.on_loop([&] { fixture["fast"].write_message("still here"); });
            CHECK(fast.next() == "still here");
        }
    }

    // ---- iteration -------------------------------------------------------------------------------------------------

    // Calls the body for each member and returns the visited names. Members are "0" to "4"; "5" is not a member.
    std::set<std::string> visit(Fixture & fixture, const std::function<void(Room&, Member&)>& body) {
        return fixture.on_loop([&] {
            std::set<std::string> visited;
            Room& room = fixture.room("lobby");
            for (WebSocketHandler& member : room) {
                CHECK(visited.insert(static_cast<Member&>(member).name()).second);
                body(room, static_cast<Member&>(member));
            }
            return visited;
        });
    }
    struct SixClients {
        explicit SixClients(Fixture& fixture) {
            for (int i = 0; i < 6; ++i)
                all.push_back(std::make_unique<MemberClient>(fixture, std::to_string(i), i < 5 ? "lobby" : ""));
        }
        std::vector<std::unique_ptr<MemberClient>> all;
    };
    const std::set<std::string> all_five = {"0", "1", "2", "3", "4"};

    TEST_CASE("a member that does not read misses only volatile messages") {
        wschat::Limits limits;
        limits.max_backlog = 256 * 1024 * 1024;
        Fixture fixture(limits);
        MemberClient reader(fixture, "reader", "lobby"), blocked(fixture, "blocked", "lobby"),
            excluded(fixture, "excluded", "lobby");
        const std::string large(64 * 1024 * 1024, 'x');  // more than the kernel takes
        fixture.on_loop([&] { fixture["blocked"].write_message(large, Opcode::binary); });
        fixture.on_loop([&] {
            CHECK(fixture.room("lobby").broadcast_volatile("typing", &fixture["excluded"]) == 1);
            CHECK(fixture["blocked"].dropped_messages() == 1);
            CHECK(fixture.room("lobby").broadcast("said") == 3);
            CHECK_THROWS_AS(fixture.room("lobby").broadcast_volatile("\xFF"), Error);
            CHECK(fixture.room("empty").broadcast_volatile("nobody") == 0);
        });
        CHECK(reader.next() == "typing");
        CHECK(reader.next() == "said");
        CHECK((blocked.next() == large));
        CHECK(blocked.next() == "said");
        CHECK(excluded.next() == "said");
    }

    TEST_CASE("iteration visits each member once") {
        Fixture fixture;
        SixClients clients(fixture);
        CHECK(visit(fixture, [](Room&, Member& member) { member.write_message("hello " + member.name()); }) ==
              all_five);
        for (std::size_t i = 0; i < 5; ++i) CHECK(clients.all[i]->next() == "hello " + std::to_string(i));
        CHECK(fixture.on_loop([&] { return names_in(fixture.room("nobody here")); }) == "");
    }

    TEST_CASE("each member can leave during iteration") {
        Fixture fixture;
        SixClients clients(fixture);
        CHECK(visit(fixture, [](Room& room, Member& member) { CHECK(room.leave(member)); }) == all_five);
        CHECK(fixture.size_of("lobby") == 0);
        CHECK(fixture.rooms() == 0);
    }

    TEST_CASE("each member can be closed during iteration") {
        Fixture fixture;
        SixClients clients(fixture);
        CHECK(visit(fixture, [](Room&, Member& member) { member.close(4000); }) == all_five);
        for (std::size_t i = 0; i < 5; ++i) CHECK(clients.all[i]->close_code() == CloseCode{4000});
        CHECK(fixture.eventually_has("lobby", 0));
    }

    TEST_CASE("members that leave during iteration are not visited") {
        Fixture fixture;
        SixClients clients(fixture);
        const auto visited = visit(fixture, [&](Room& room, Member& member) {
            for (WebSocketHandler& other : room)
                if (&other != &member) room.leave(other);
            CHECK(room.size() == 1);
        });
        CHECK(visited.size() == 1);
        CHECK(fixture.on_loop([&] { return names_in(fixture.room("lobby")); }) == *visited.begin());
    }

    TEST_CASE("members that join during iteration are not visited") {
        Fixture fixture;
        SixClients clients(fixture);
        CHECK(visit(fixture, [&](Room& room, Member&) { room.join(fixture["5"]); }) == all_five);
        CHECK(fixture.size_of("lobby") == 6);
    }

    TEST_CASE("a member can leave and join again during iteration") {
        Fixture fixture;
        SixClients clients(fixture);
        CHECK(visit(fixture, [&](Room& room, Member& member) {
                  room.leave(member);
                  room.join(member);
              }) == all_five);
        CHECK(fixture.size_of("lobby") == 5);
    }

    TEST_CASE("broadcasts work during iteration") {
        Fixture fixture;
        SixClients clients(fixture);
        CHECK(visit(fixture, [&](Room& room, Member& member) {
                  CHECK(room.broadcast("not to " + member.name(), &member) == 4);
              }) == all_five);
        for (std::size_t i = 0; i < 5; ++i) {
            std::set<std::string> received;
            for (int n = 0; n < 4; ++n) received.insert(clients.all[i]->next().value_or(""));
            CHECK(received.size() == 4);
            CHECK(received.count("not to " + std::to_string(i)) == 0);
        }
    }

    TEST_CASE("iteration ends when all members have left") {
        Fixture fixture;
        SixClients clients(fixture);
        const auto visited = visit(fixture, [&](Room& room, Member&) {
            for (const std::string& name : all_five) room.leave(fixture[name]);
        });
        CHECK(visited.size() == 1);
        CHECK(fixture.rooms() == 0);
    }

    TEST_CASE("members can close, leave, join and broadcast in their callbacks") {
        Fixture fixture;
        fixture.on_message = [](Member& member, const Message& message) {
            Room& room = member.room("lobby");
            if (message.text() == "leave") room.leave(member);
            if (message.text() == "join") room.join(member);
            if (message.text() == "close") member.close(4000);
            if (message.text() == "close all")
                for (WebSocketHandler& other : room) other.close(4001);
            room.broadcast(member.name() + " says " + std::string(message.text()));
        };
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby"), carl(fixture, "carl", "lobby");
        anna.send("hello");
        for (WsClient* client : {&anna, &bert, &carl}) CHECK(client->next() == "anna says hello");
        anna.send("leave");
        for (WsClient* client : {&bert, &carl}) CHECK(client->next() == "anna says leave");
        bert.send("close");
        CHECK(carl.next() == "bert says close");
        CHECK(bert.close_code() == CloseCode{4000});
        anna.send("join");
        CHECK(anna.next() == "anna says join");
        CHECK(carl.next() == "anna says join");
        carl.send("close all");
        CHECK(anna.close_code() == CloseCode{4001});
        CHECK(carl.close_code() == CloseCode{4001});
        CHECK(fixture.eventually_has("lobby", 0));
    }

    // ---- empty rooms -----------------------------------------------------------------------------------------------

    TEST_CASE("a room is created on demand and removed at the end of a turn if it is empty") {
        Fixture fixture;
        MemberClient anna(fixture, "anna");
        fixture.on_loop([&] {
            for (int i = 0; i < 10'000; ++i) fixture.room("room " + std::to_string(i));
            CHECK(fixture.running.server.rooms().size() == 10'000);
            // find() ignores empty rooms.
            CHECK(fixture.running.server.rooms().find("room 1") == nullptr);
            fixture.room("room 7").join(fixture["anna"]);
            CHECK(fixture.running.server.rooms().find("room 7") == &fixture.room("room 7"));
        });
        CHECK(fixture.rooms() == 1);
        CHECK(fixture.on_loop([&] { return fixture.running.server.rooms().names(); }) ==
              std::vector<std::string>{"room 7"});
        CHECK(fixture.running.metrics().rooms == 1);
        fixture.on_loop([&] { fixture.room("room 7").leave(fixture["anna"]); });
        CHECK(fixture.rooms() == 0);
    }

    TEST_CASE("a room is removed when its last member hangs up") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby");
        CHECK(fixture.rooms() == 1);
        anna.raw.close();
        CHECK(fixture.running.eventually([&] { return fixture.running.server.rooms().size() == 0; }));
    }

    TEST_CASE("a room that is left and joined again in one callback stays the same room") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby");
        fixture.on_loop([&] {
            Room& room = fixture.room("lobby");
            for (int i = 0; i < 3; ++i) {
                CHECK(room.leave(fixture["anna"]));
                CHECK(&fixture.room("lobby") == &room);
                CHECK(room.join(fixture["anna"]));
            }
        });
        CHECK(fixture.size_of("lobby") == 1);
        fixture.on_loop([&] { CHECK(fixture.room("lobby").broadcast("hello") == 1); });
        CHECK(anna.next() == "hello");
    }

    TEST_CASE("many short-lived rooms are all removed") {
        Fixture fixture;
        MemberClient anna(fixture, "anna");
        for (int turn = 0; turn < 300; ++turn)
            fixture.on_loop([&] {
                Member& member = fixture["anna"];
                for (Room* room : member.rooms()) CHECK(room->leave(member));
                for (int i = 0; i < 3; ++i) member.room(std::to_string(turn) + "/" + std::to_string(i)).join(member);
            });
        CHECK(fixture.rooms() == 3);
        anna.raw.close();
        CHECK(fixture.running.eventually([&] { return fixture.running.server.rooms().size() == 0; }));
    }

    TEST_CASE("in on_close a handler is not a member although another member has its index") {
        bool is_member = true;
        Fixture fixture;
        fixture.on_close = [&](Member& member) {
            Room& room = *member.rooms().front();
            is_member = room.has(member) || room.leave(member);
            CHECK(names_in(room) == "bert cleo");
        };
        MemberClient anna(fixture, "anna", "lobby"), bert(fixture, "bert", "lobby"), cleo(fixture, "cleo", "lobby");
        anna.close();
        REQUIRE(fixture.eventually_has("lobby", 2));
        CHECK_FALSE(fixture.on_loop([&] { return is_member; }));
        fixture.on_loop([&] { fixture.on_close = nullptr; });
    }

    TEST_CASE("the iterator of a room dereferences to its members") {
        Fixture fixture;
        MemberClient anna(fixture, "anna", "lobby");
        CHECK(fixture.on_loop([&] { return fixture.room("lobby").begin()->is_open(); }));
        CHECK(fixture.on_loop([&] { return fixture.room("lobby").begin().operator->() == &fixture["anna"]; }));
    }
}

// ---- rooms of several loops, in memory ------------------------------------------------------------------------------

namespace {

using wschat::RoomBus;
using wschat::TestClient;
using wschat::TestServer;
using wschat::detail::RoomDirectory;
using wschat::detail::RoomsAccess;

// Joins the room of its path.
struct PathMember : WebSocketHandler {
    void open() override { room(request().param("room")).join(*this); }
    void on_message(const Message& m) override { room(request().param("room")).broadcast(m, this); }
};

// Keeps what is posted until run().
struct HeldMailbox final : wschat::Mailbox {
    bool post(wschat::detail::Task work) override {
        posts.push_back(std::move(work));
        return true;
    }
    void run() {
        for (wschat::detail::Task& work : std::exchange(posts, {})) work();
    }
    std::vector<wschat::detail::Task> posts;
};

// Three servers in memory that share their rooms as three loops of one server do. Each step is a call.
struct ThreeLoops {
    explicit ThreeLoops(std::size_t max_backlog = 1'000'000) {
        directory = std::make_unique<RoomDirectory>(servers.size(), max_backlog);
        for (std::size_t i = 0; i < 3; ++i) {
            directory->set_loop(i, servers[i].rooms(), mailboxes[i]);
            RoomsAccess::share(servers[i].rooms(), directory.get(), i);
            servers[i].route<PathMember>("/{room}");
        }
    }
    ~ThreeLoops() {
        for (TestServer& server : servers) server.run_until_idle();
    }
    TestClient connect(std::size_t loop, std::string_view room) {
        return servers[loop].connect("/" + std::string(room));
    }
    Room& room(std::size_t loop, std::string_view name) { return servers[loop].rooms()[name]; }
    // What the client has got since the last call.
    std::vector<std::string> received(TestClient& client) {
        for (TestServer& server : servers) server.run_until_idle();
        return client.received();
    }
    // The end of a turn on this loop.
    void flush(std::size_t loop) { directory->flush(loop); }
    // The posts of this loop run.
    void run(std::size_t loop) {
        mailboxes[loop]->run();
        servers[loop].run_until_idle();
    }
    std::vector<std::size_t> posts() const {
        return {mailboxes[0]->posts.size(), mailboxes[1]->posts.size(), mailboxes[2]->posts.size()};
    }

    std::array<std::shared_ptr<HeldMailbox>, 3> mailboxes = {
        std::make_shared<HeldMailbox>(), std::make_shared<HeldMailbox>(), std::make_shared<HeldMailbox>()};
    std::unique_ptr<RoomDirectory> directory;  // outlives the servers
    std::array<TestServer, 3> servers;
};

using Counts = std::vector<std::size_t>;
using Texts = std::vector<std::string>;

}  // namespace

TEST_SUITE("rooms") {
    TEST_CASE("a turn makes one post for each loop that has members in the room, and none for the others") {
        ThreeLoops loops;
        TestClient anna = loops.connect(0, "tea"), bert = loops.connect(1, "tea"), cleo = loops.connect(2, "milk");
        CHECK(loops.room(0, "tea").size() == 2);
        CHECK(loops.room(0, "tea").broadcast("one") == 2);
        CHECK(loops.room(0, "tea").broadcast("two") == 2);
        CHECK(loops.posts() == Counts{0, 0, 0});
        loops.flush(0);
        CHECK(loops.posts() == Counts{0, 1, 0});
        loops.servers[0].run_until_idle();
        CHECK(loops.received(anna) == Texts{"one", "two"});
        CHECK(loops.received(bert) == Texts{});
        loops.run(1);
        CHECK(loops.received(bert) == Texts{"one", "two"});
        CHECK(loops.received(cleo) == Texts{});
        loops.flush(0);
        CHECK(loops.posts() == Counts{0, 0, 0});
    }

    TEST_CASE("a loop without members reaches a room of another loop, and knows its size") {
        ThreeLoops loops;
        TestClient anna = loops.connect(0, "tea");
        Room* const found = loops.servers[2].rooms().find("tea");
        REQUIRE(found != nullptr);
        CHECK(found->size() == 1);
        CHECK_FALSE(found->begin() != found->end());  // no member is on this loop
        CHECK(found->broadcast("from afar") == 1);
        loops.flush(2);
        loops.run(0);
        CHECK(loops.received(anna) == Texts{"from afar"});
        CHECK(loops.servers[2].rooms().find("milk") == nullptr);
    }

    TEST_CASE("the sender is left out on its own loop") {
        ThreeLoops loops;
        TestClient anna = loops.connect(0, "tea"), bert = loops.connect(1, "tea");
        anna.send("hi");
        loops.flush(0);
        loops.run(1);
        CHECK(loops.received(anna) == Texts{});
        CHECK(loops.received(bert) == Texts{"hi"});
    }

    TEST_CASE("a member that leaves before a broadcast arrives at its loop does not get it") {
        ThreeLoops loops;
        TestClient anna = loops.connect(0, "tea"), bert = loops.connect(1, "tea"), cleo = loops.connect(1, "tea");
        loops.room(0, "tea").broadcast("one");
        loops.flush(0);
        bert.hang_up();
        loops.run(1);
        CHECK(loops.received(bert) == Texts{});
        CHECK(loops.received(cleo) == Texts{"one"});
        cleo.hang_up();
        loops.room(0, "tea").broadcast("two");
        loops.flush(0);
        CHECK(loops.posts() == Counts{0, 0, 0});
        CHECK(loops.received(anna) == Texts{"one", "two"});
    }

    TEST_CASE("the directory removes a room when no loop has it") {
        ThreeLoops loops;
        CHECK(loops.directory->size() == 0);
        {
            TestClient anna = loops.connect(0, "tea"), bert = loops.connect(1, "tea");
            CHECK(loops.directory->size() == 1);
            CHECK(loops.servers[2].rooms().names() == Texts{"tea"});
            anna.hang_up();
            CHECK(loops.directory->size() == 1);
            loops.room(1, "tea").broadcast("on its way");  // and never arrives
            loops.flush(1);
            bert.hang_up();
        }
        CHECK(loops.directory->size() == 0);
        for (std::size_t i = 0; i < 3; ++i) loops.run(i);
    }

    TEST_CASE("a room of a second set counts once, even on several loops") {
        ThreeLoops loops;
        wschat::Rooms second0(&loops.servers[0].rooms()), second1(&loops.servers[1].rooms());
        second0["tea"];
        second1["tea"];
        CHECK(loops.directory->size() == 1);
        loops.room(2, "tea");
        CHECK(loops.servers[0].rooms().size() == 2);
        RoomsAccess::prune(loops.servers[0].rooms());
        CHECK(loops.directory->size() == 2);
        RoomsAccess::prune(loops.servers[1].rooms());
        CHECK(loops.directory->size() == 1);
        RoomsAccess::prune(loops.servers[2].rooms());
        CHECK(loops.directory->size() == 0);
    }

    TEST_CASE("above max_loop_backlog, broadcasts for a loop are dropped until it has caught up") {
        ThreeLoops loops(10'000);
        TestClient anna = loops.connect(0, "tea"), bert = loops.connect(1, "tea");
        const std::string text(1000, 'x');
        for (int i = 0; i < 20; ++i) loops.room(0, "tea").broadcast(text);
        loops.flush(0);
        loops.run(1);
        const std::size_t arrived = loops.received(bert).size();
        CHECK(arrived == 10);
        CHECK(loops.directory->dropped() == 10);
        CHECK(loops.received(anna).size() == 20);
        CHECK(loops.room(0, "tea").broadcast(text) == 2);
        loops.flush(0);
        loops.run(1);
        CHECK(loops.received(bert).size() == 1);
    }

    TEST_CASE("the bus gets each room with members and each broadcast once, on the first loop") {
        struct Bus final : RoomBus {
            void subscribe(const std::string& room) override { calls.push_back("subscribe " + room); }
            void unsubscribe(const std::string& room) override { calls.push_back("unsubscribe " + room); }
            void publish(const std::string& room, Opcode opcode, std::string_view payload) override {
                calls.push_back("publish " + room + (opcode == Opcode::text ? " " : " binary ") + std::string(payload));
            }
            Texts take() { return std::exchange(calls, {}); }
            Texts calls;
        };
        Bus bus;
        ThreeLoops loops;
        loops.directory->set_bus(&bus);
        TestClient anna = loops.connect(1, "tea");
        CHECK(bus.take() == Texts{});
        loops.run(0);
        CHECK(bus.take() == Texts{"subscribe tea"});
        TestClient bert = loops.connect(0, "tea"), cleo = loops.connect(2, "tea");
        loops.run(0);
        CHECK(bus.take() == Texts{});

        loops.room(0, "tea").broadcast("one");
        CHECK(bus.take() == Texts{"publish tea one"});
        loops.room(2, "tea").broadcast_binary("two");
        CHECK(bus.take() == Texts{});
        for (std::size_t i = 0; i < 3; ++i) loops.flush(i);
        for (std::size_t i = 0; i < 3; ++i) loops.run(i);
        CHECK(bus.take() == Texts{"publish tea binary two"});

        // Another machine says something. It is not published again.
        loops.directory->deliver_from_bus("tea", Opcode::text, "three");
        loops.directory->deliver_from_bus("milk", Opcode::text, "nobody");
        loops.flush(0);
        for (std::size_t i = 0; i < 3; ++i) loops.run(i);
        CHECK(bus.take() == Texts{});
        for (TestClient* client : {&anna, &bert}) CHECK(loops.received(*client) == Texts{"one", "two", "three"});
        CHECK(loops.received(cleo) == Texts{"two", "one", "three"});  // its own loop first

        // The room is empty for a moment.
        anna.hang_up();
        bert.hang_up();
        cleo.hang_up();
        TestClient dora = loops.connect(2, "tea");
        loops.run(0);
        CHECK(bus.take() == Texts{"unsubscribe tea", "subscribe tea"});
        dora.hang_up();
        loops.run(0);
        CHECK(bus.take() == Texts{"unsubscribe tea"});
    }

    // What a program needs to connect servers in another way than Redis.
    TEST_CASE("a bus of a program connects the rooms of several servers") {
        struct End {
            std::shared_ptr<wschat::Mailbox> mailbox;
            RoomBus::Deliver deliver;
            std::vector<std::string> rooms{};
            std::uint64_t published = 0;
        };
        struct Cable {
            class Bus final : public RoomBus {
            public:
                Bus(std::vector<std::shared_ptr<End>>& ends, std::shared_ptr<End> own)
                    : ends_(ends), own_(std::move(own)) {}
                void subscribe(const std::string& room) override { own_->rooms.push_back(room); }
                void unsubscribe(const std::string& room) override {
                    own_->rooms.erase(std::remove(own_->rooms.begin(), own_->rooms.end(), room), own_->rooms.end());
                }
                void publish(const std::string& room, Opcode opcode, std::string_view payload) override {
                    ++own_->published;
                    for (const auto& end : ends_) {
                        if (end == own_ || !wschat::text::contains(end->rooms, room)) continue;
                        end->mailbox->post(
                            [end, room, opcode, text = std::string(payload)] { end->deliver(room, opcode, text); });
                    }
                }
                wschat::MetricSource metrics() const override {
                    return [own = own_](std::vector<wschat::Metric>& all) {
                        all.push_back({"cable_published_total", "Broadcasts.", own->published, {{"name", "a\"b\n"}}});
                    };
                }

            private:
                std::vector<std::shared_ptr<End>>& ends_;
                std::shared_ptr<End> own_;
            };

            std::unique_ptr<RoomBus> open(std::shared_ptr<wschat::Mailbox> mailbox, RoomBus::Deliver deliver,
                                          const RoomBus::Log& log) const {
                log(wschat::LogLevel::info, "cable_connected", {});
                ends.push_back(std::make_shared<End>(End{std::move(mailbox), std::move(deliver)}));
                return std::make_unique<Bus>(ends, ends.back());
            }
            std::vector<std::shared_ptr<End>>& ends;
        };
        std::vector<std::shared_ptr<End>> ends;
        {
            std::string logged;
            std::array<TestServer, 3> servers;
            servers[0].on_log([&](const wschat::LogEntry& entry) { logged += entry.event; });
            for (TestServer& each : servers) {
                each.route<PathMember>("/{room}");
                each.join_cluster(Cable{ends});
            }
            CHECK(logged == "cable_connected");
            TestClient anna = servers[0].connect("/tea"), bert = servers[1].connect("/tea"),
                       cleo = servers[2].connect("/milk");
            anna.send("hello");
            for (TestServer& each : servers) each.run_until_idle();
            CHECK(bert.received() == std::vector<std::string>{"hello"});
            CHECK(anna.received() == std::vector<std::string>{});
            CHECK(cleo.received() == std::vector<std::string>{});
            servers[0].add_metrics([](std::vector<wschat::Metric>& all) { all.push_back({"tea_pots", "Pots.", 3}); });
            const std::string text = wschat::prometheus_text(servers[0].metrics());
            CHECK(test::contains(text,
                                 "# HELP wschat_tea_pots Pots.\n# TYPE wschat_tea_pots gauge\nwschat_tea_pots 3\n"));
            CHECK(test::contains(text, "wschat_cable_published_total{name=\"a\\\"b\\n\"} 1\n"));
        }
    }

    TEST_CASE("broadcasts of all sizes around the buffers reach a member that reads late") {
        struct Late : WebSocketHandler {
            void open() override { room("all").join(*this); }
            void on_message(const Message& m) override {
                room("all").broadcast_binary(m.data() == "large" ? std::string_view(test::more_than_kernel_takes())
                                                                 : m.data());
            }
        };
        RunningServer running(test::without_pings());
        running.server.route<Late>("/");
        running.start();
        WsClient client(running.port());
        CHECK(test::complaint_of_late_reader(running, client) == "");
    }
}
