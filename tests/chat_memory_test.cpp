// Section 16 on a TestServer: the whole chat without sockets, with a clock that stands still.
#define WSCHAT_CHAT 1
#include "support.hpp"

using namespace wschat;
using namespace std::chrono_literals;
using test::contains;

namespace {

// All that has arrived since the last call, in one text.
std::string received(TestClient& client) {
    std::string all;
    for (const std::string& event : client.received()) all += event + "\n";
    return all;
}

}  // namespace

TEST_SUITE_BEGIN("chat");

TEST_CASE("the whole chat runs in memory: names, members, messages and the history") {
    TestServer server;
    server.route<ChatHandler>("/chat/{room}");
    TestClient anna = server.connect("/chat/tea?name=Anna"), bert = server.connect("/chat/tea?name=Bert");
    CHECK(contains(received(anna), R"("count":1,"users":[{"user":)"));
    CHECK(contains(received(bert), R"("count":2,"users":[{"user":)"));
    anna.send("hello");
    CHECK(contains(received(bert), "\"hello\""));
    bert.send("/nick Berta");
    CHECK(contains(received(anna), "\"Berta\""));
    anna.hang_up();
    server.advance(2s);
    CHECK_FALSE(contains(received(bert), "\"leave\""));
    server.advance(1s);  // ChatLimits::grace
    CHECK(contains(received(bert), "\"leave\""));
    TestClient carl = server.connect("/chat/tea?name=Carl");
    CHECK(contains(received(carl), "\"hello\""));
    CHECK(server.exceptions().empty());
}

TEST_CASE("the flood limits of the chat in memory follow the clock of the test") {
    TestServer server;
    server.route<ChatHandler>("/chat");
    TestClient anna = server.connect("/chat?name=Anna"), bert = server.connect("/chat?name=Bert");
    // How many of 30 messages reach Bert.
    const auto arrived = [&] {
        bert.received();
        for (int i = 0; i < 30; ++i) anna.send("tea");
        return bert.received().size();
    };
    // ChatLimits::connection: 20 at once, then 5 per second.
    CHECK(arrived() == 20);
    CHECK(arrived() == 0);
    server.advance(2s);
    CHECK(arrived() == 10);
    server.advance(1h);
    CHECK(arrived() == 20);
}

TEST_CASE("joins and leaves after the first are sent together, without users who join and leave in between") {
    TestServer server;
    server.route<ChatHandler>("/chat/{room}");
    TestClient anna = server.connect("/chat/tea?name=Anna");
    server.advance(1s);
    TestClient first = server.connect("/chat/tea?name=First");
    CHECK(contains(received(anna), R"({"type":"join","room":"tea","name":"First",)"));
    std::vector<TestClient> others;
    for (const char* name : {"One", "Two", "Three"})
        others.push_back(server.connect(std::string("/chat/tea?name=") + name));
    others.back().close();
    first.close();
    CHECK(received(anna).empty());
    server.advance(499ms);
    CHECK(received(anna).empty());
    server.advance(1ms);  // ChatLimits::presence_window
    const std::string told = received(anna);
    CHECK(contains(told, R"({"type":"leave","room":"tea","name":"First",)"));
    CHECK(contains(told, R"({"type":"join","room":"tea","count":3,"time":)"));
    CHECK(contains(told, R"("name":"One"},{)"));
    CHECK(contains(told, R"("name":"Two"})"));
    CHECK_FALSE(contains(told, "\"Three\""));
    server.advance(5s);
    CHECK(received(anna).empty());
    // A new name does not overtake the join with the old one.
    TestClient bert = server.connect("/chat/tea?name=Bert"), carl = server.connect("/chat/tea?name=Carl");
    received(anna);
    carl.send("/nick Carla");
    const std::string renamed = received(anna);
    CHECK(renamed.find("\"join\"") < renamed.find("\"nick\""));
    CHECK(contains(renamed, R"("old":"Carl","name":"Carla")"));
}

TEST_SUITE_END();
