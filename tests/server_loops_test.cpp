// Section 14: a server with several loops. The rooms, limits, metrics and the end are those of all loops.
#include "support.hpp"

#include <map>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::contains;
using test::HandlerServer;
using test::RunningServer;
using test::WsClient;

TEST_SUITE_BEGIN("server");

namespace {

constexpr unsigned loop_count = 3;

ServerOptions with_loops(unsigned threads = loop_count) {
    ServerOptions options;
    options.threads = threads;
    return options;
}

// Runs the function on each loop and returns the results by the number of the loop.
template <class Function>
auto on_each_loop(Server& server, Function function) {
    using Result = decltype(function());
    struct State {
        std::mutex mutex;
        std::map<std::size_t, Result> results;
    };
    const auto state = std::make_shared<State>();
    server.post_to_all([state, function](std::size_t loop) {
        const Result result = function();
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->results[loop] = result;
    });
    CHECK(test::eventually([&] {
        const std::lock_guard<std::mutex> lock(state->mutex);
        return state->results.size() == server.loop_count();
    }));
    const std::lock_guard<std::mutex> lock(state->mutex);
    std::vector<Result> results;
    for (const auto& [loop, result] : state->results) results.push_back(result);
    return results;
}

std::vector<int> handlers_of_each_loop(Server& server) {
    return on_each_loop(server, [&server] {
        int count = 0;
        server.each_handler([&](WebSocketHandler&) { ++count; });
        return count;
    });
}

// Joins the room "all", and says there what it receives.
struct Member : WebSocketHandler {
    void open() override {
        room("all").join(*this);
        write_message("hello");
    }
    void on_message(const Message& m) override { room("all").broadcast(m); }
};

std::vector<std::unique_ptr<WsClient>> connect_members(int port, std::size_t count) {
    std::vector<std::unique_ptr<WsClient>> clients;
    for (std::size_t i = 0; i < count; ++i) {
        clients.push_back(std::make_unique<WsClient>(port));
        REQUIRE(clients.back()->next() == "hello");
    }
    return clients;
}

Socket connect_to_path(const std::string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
    os::make_nonblocking(socket.descriptor());
    return socket;
}

// Blocks one loop until the end of the scope, or until release().
class BusyLoop {
public:
    BusyLoop(Server& server, std::size_t loop) {
        server.mailbox(loop)->post([state = state_] {
            state->blocked = true;
            while (!state->released) std::this_thread::sleep_for(1ms);
        });
        while (!state_->blocked) std::this_thread::sleep_for(1ms);
        std::this_thread::sleep_for(30ms);  // a loop counts as busy after 20 ms in one turn
    }
    BusyLoop(const BusyLoop&) = delete;
    BusyLoop& operator=(const BusyLoop&) = delete;
    ~BusyLoop() { release(); }
    void release() { state_->released = true; }

private:
    struct State {
        std::atomic<bool> blocked{false}, released{false};
    };
    const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace

TEST_CASE("a broadcast reaches the members on all loops once") {
    HandlerServer<Member> running(with_loops());
    const auto clients = connect_members(running.port(), 7);
    CHECK(running.on_loop([&] { return running.server.rooms()["all"].size(); }) == 7);
    clients[0]->send("one");
    for (const auto& client : clients) CHECK(client->next() == "one");
    clients[6]->send("two");
    for (const auto& client : clients) CHECK(client->next() == "two");
}

TEST_CASE("connections are spread evenly over the loops") {
    HandlerServer<Member> running(with_loops());
    const auto clients = connect_members(running.port(), 12);
    CHECK(handlers_of_each_loop(running.server) == std::vector<int>{4, 4, 4});
}

TEST_CASE("the messages of each sender arrive in order on all loops") {
    constexpr int messages = 200;
    HandlerServer<Member> running(with_loops());
    const auto clients = connect_members(running.port(), 6);
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < clients.size(); ++i)
        threads.emplace_back([&, i] {
            for (int n = 0; n < messages; ++n) clients[i]->send(std::to_string(i) + " " + std::to_string(n));
        });
    for (std::thread& thread : threads) thread.join();
    for (const auto& client : clients) {
        std::map<std::string, int> next;
        for (std::size_t n = 0; n < messages * clients.size(); ++n) {
            const std::string text = client->next().value_or("");
            const std::size_t space = text.find(' ');
            REQUIRE(space != std::string::npos);
            REQUIRE(text.substr(space + 1) == std::to_string(next[text.substr(0, space)]++));
        }
    }
}

TEST_CASE("a callback runs on the loop of its connection, and loop() returns that loop") {
    struct Handler : WebSocketHandler {
        void on_message(const Message&) override {
            Loop& mine = server().loop();
            const bool here = mine.on_loop_thread();
            mine.call_later(1ms, [me = ref(), &mine, here] {
                if (WebSocketHandler* self = me.get())
                    self->write_message(here && mine.on_loop_thread() ? "yes" : "no");
            });
        }
    };
    HandlerServer<Handler> running(with_loops());
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 6; ++i) {
        clients.push_back(std::make_unique<WsClient>(running.port()));
        clients.back()->send("where?");
        CHECK(clients.back()->next() == "yes");
    }
    CHECK(on_each_loop(running.server, [&] { return running.server.loop_number(); }) ==
          std::vector<std::size_t>{0, 1, 2});
    CHECK(running.server.loop_number() == 0);
    CHECK_THROWS_WITH_AS(running.server.mailbox(3), "mailbox: there is no loop 3 of 3", Error);
}

TEST_CASE("references to handlers write from any thread") {
    struct Handler : test::Echo {
        explicit Handler(std::pair<std::mutex, std::vector<HandlerRef>>& its_refs) : refs(its_refs) {}
        void open() override {
            const std::lock_guard<std::mutex> lock(refs.first);
            refs.second.push_back(ref());
        }
        std::pair<std::mutex, std::vector<HandlerRef>>& refs;
    };
    std::pair<std::mutex, std::vector<HandlerRef>> refs;
    RunningServer running(with_loops());
    running.server.route<Handler>("/", std::ref(refs));
    running.start();
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 6; ++i) clients.push_back(std::make_unique<WsClient>(running.port()));
    CHECK(test::eventually([&] {
        const std::lock_guard<std::mutex> lock(refs.first);
        return refs.second.size() == clients.size();
    }));
    for (const HandlerRef& ref : refs.second) ref.write_message("from outside");
    for (const auto& client : clients) CHECK(client->next() == "from outside");
}

TEST_CASE("a busy loop does not stop the others from accepting") {
    HandlerServer<Member> running(with_loops());
    for (std::size_t busy = 0; busy < loop_count; ++busy) {
        BusyLoop blocked(running.server, busy);
        const auto clients = connect_members(running.port(), 8);
        CHECK(clients.size() == 8);
    }
}

TEST_CASE("max_connections and max_connections_per_address are limits of all loops") {
    SUBCASE("max_connections") {
        ServerOptions options = with_loops();
        options.server_limits.max_connections = 5;
        HandlerServer<Member> running(options);
        const auto clients = connect_members(running.port(), 5);
        WsClient sixth(running.port());
        CHECK(contains(sixth.head, "503"));
    }
    SUBCASE("max_connections_per_address") {
        ServerOptions options = with_loops();
        options.server_limits.max_connections_per_address = 5;
        HandlerServer<Member> running(options);
        auto clients = connect_members(running.port(), 5);
        WsClient sixth(running.port());
        CHECK(contains(sixth.head, "503"));
        clients.pop_back();
        CHECK(test::eventually([&] { return contains(WsClient(running.port()).head, "101"); }));
    }
}

TEST_CASE("shutdown closes the connections of all loops with 1001, and the server can run again") {
    HandlerServer<Member> running(with_loops());
    for (int round = 0; round < 3; ++round) {
        const auto clients = connect_members(running.port(), 6);
        running.stop();
        for (const auto& client : clients) CHECK(client->close_code() == CloseCode::going_away);
        test::listen(running.server, std::to_string(running.port()));
        running.run();
    }
}

TEST_CASE("loop().stop() in a callback of any loop ends run()") {
    struct Handler : WebSocketHandler {
        void on_message(const Message& m) override {
            if (std::to_string(server().loop_number()) == m.text()) server().loop().stop();
            write_message("asked");
        }
    };
    for (std::size_t loop = 0; loop < loop_count; ++loop) {
        RunningServer running(with_loops());
        running.server.route<Handler>("/");
        test::listen(running.server);
        const int port = running.server.port();
        std::thread thread([&] { running.server.run(); });
        std::vector<std::unique_ptr<WsClient>> clients;
        for (int i = 0; i < 3; ++i) clients.push_back(std::make_unique<WsClient>(port));
        for (const auto& client : clients) client->send(std::to_string(loop));
        thread.join();
    }
}

TEST_CASE("metrics are the sum of all loops, and each loop has its own") {
    HandlerServer<Member> running(with_loops());
    const auto clients = connect_members(running.port(), 9);
    clients[0]->send("one");
    for (const auto& client : clients) CHECK(client->next() == "one");
    const Metrics sum = running.metrics();
    CHECK(sum.connections_open == 9);
    CHECK(sum.websockets_opened == 9);
    CHECK(sum.messages_received == 1);
    CHECK(sum.messages_sent == 18);
    CHECK(sum.rooms == 1);
    CHECK(sum.responses.at(101) == 9);
    const auto loops = running.on_loop([&] { return running.server.metrics_per_loop(); });
    REQUIRE(loops.size() == loop_count);
    for (const Metrics& loop : loops) CHECK(loop.connections_open == 3);
}

TEST_CASE("all loops may ask for metrics at the same time") {
    HandlerServer<Member> running(with_loops());
    const auto clients = connect_members(running.port(), 9);
    for (int round = 0; round < 20; ++round)
        CHECK(on_each_loop(running.server, [&] { return running.server.metrics().connections_open; }) ==
              std::vector<std::uint64_t>{9, 9, 9});
}

TEST_CASE("metrics do not wait for a loop that is busy") {
    HandlerServer<Member> running(with_loops());
    const auto clients = connect_members(running.port(), 9);
    CHECK(running.metrics().connections_open == 9);
    const BusyLoop blocked(running.server, 1);
    CHECK(running.metrics().connections_open == 9);  // as of its latest answer
}

TEST_CASE("the page of metrics has the sums and the values of each loop") {
    RunningServer running(with_loops());
    running.server.metrics_page("/metrics");
    running.server.route<Member>("/");
    running.start();
    const auto clients = connect_members(running.port(), 6);
    const std::string page = test::fetch(running.port(), "/metrics").body;
    CHECK(contains(page, "\nwschat_websockets_open 6\n"));
    for (const char* loop : {"0", "1", "2"})
        CHECK(contains(page, "\nwschat_loop_websockets_open{loop=\"" + std::string(loop) + "\"} 2\n"));
}

TEST_CASE("settings that several loops share cannot change while they run") {
    HandlerServer<Member> running(with_loops());
    const auto error = [&](const std::function<void()>& call) {
        return running.on_loop([&] { return test::error_of(call); });
    };
    const auto sentence = [](const char* call) {
        return std::string(call) + ": with several loops, call it before run()";
    };
    Server& server = running.server;
    CHECK(error([&] { server.route<Member>("/later"); }) == sentence("route"));
    CHECK(error([&] { server.get("/later", [](const Request&) { return Response(200, ""); }); }) == sentence("get"));
    CHECK(error([&] { server.file("/later", "/dev/null"); }) == sentence("file"));
    CHECK(error([&] { server.allow_origins({"*"}); }) == sentence("allow_origins"));
    CHECK(error([&] { server.on_log(nullptr); }) == sentence("on_log"));
    running.stop();
    server.route<Member>("/later");
}

TEST_CASE("a server with several loops listens on further addresses while it runs, from its first loop") {
    HandlerServer<Member> running(with_loops());
    const std::string path = test::temporary_path("loops.sock");
    const std::string address = "unix:" + path;
    const auto on_second = on_each_loop(running.server, [&] {
        return running.server.loop_number() == 1 ? test::error_of([&] { running.server.listen(address); }) : "";
    });
    CHECK(on_second[1] == "listen " + address + ": with several loops, call it on the first one");
    running.on_loop([&] { running.server.listen(address); });
    std::vector<test::RawClient> clients;
    for (int i = 0; i < 6; ++i) {
        clients.emplace_back(connect_to_path(path), nullptr);
        clients.back().send(test::upgrade_request());
        CHECK(clients.back().read_until("hello"));
    }
    CHECK(handlers_of_each_loop(running.server) == std::vector<int>{2, 2, 2});
}

TEST_CASE("log entries of several loops come one at a time") {
    struct Handler : WebSocketHandler {
        void on_message(const Message&) override { throw std::runtime_error("on purpose"); }
    };
    RunningServer running(with_loops());
    std::vector<std::string> lines;  // ThreadSanitizer would report two calls at once
    running.server.on_log([&](const LogEntry& entry) { lines.push_back(to_string(entry)); });
    running.server.route<Handler>("/");
    running.start();
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 12; ++i) clients.push_back(std::make_unique<WsClient>(running.port()));
    for (const auto& client : clients) client->send("x");
    for (const auto& client : clients) CHECK(client->close_code() == CloseCode::internal_error);
    CHECK(running.metrics().handler_exceptions == 12);
    running.stop();
    CHECK(std::count_if(lines.begin(), lines.end(),
                        [](const std::string& line) { return contains(line, "on purpose"); }) == 12);
}

TEST_CASE("broadcasts for a loop with too many waiting bytes are dropped and counted") {
    ServerOptions options = with_loops(2);
    options.server_limits.max_loop_backlog = 100'000;
    HandlerServer<Member> running(options);
    const auto clients = connect_members(running.port(), 4);
    {
        const BusyLoop blocked(running.server, 1);
        running.on_loop([&] {
            for (int i = 0; i < 100; ++i) running.server.rooms()["all"].broadcast(std::string(10'000, 'x'));
        });
        const std::uint64_t dropped = running.metrics().broadcasts_dropped;
        CHECK(dropped > 80);
        CHECK(dropped < 100);
    }
    on_each_loop(running.server, [] { return true; });  // the second loop has caught up
    running.on_loop([&] { running.server.rooms()["all"].broadcast("last"); });
    for (const auto& client : clients) {
        std::optional<std::string> text = client->next();
        while (text && text->size() == 10'000) text = client->next();
        CHECK(text == "last");
    }
}

TEST_CASE("max_total_backlog is a limit of all loops: the largest connections are closed") {
    ServerOptions options = with_loops(2);
    options.server_limits.max_total_backlog = 8 * 1024 * 1024;
    options.limits.max_backlog = 64 * 1024 * 1024;
    options.limits.send_buffer = 4096;
    HandlerServer<Member> running(options);
    const auto clients = connect_members(running.port(), 4);
    // Nobody reads. Each loop has half of the bytes.
    const std::string text(1024 * 1024, 'x');
    running.on_loop([&] {
        for (int i = 0; i < 6; ++i) running.server.rooms()["all"].broadcast(text);
    });
    CHECK(running.eventually([&] { return running.server.metrics().closed.at(CloseCause::backlog) >= 1; }));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes <= 8 * 1024 * 1024; }));
}

TEST_CASE("find() and names() know the rooms of all loops") {
    struct Handler : WebSocketHandler {
        void open() override {
            room("room-" + std::to_string(server().loop_number())).join(*this);
            write_message("hello");
        }
        void on_message(const Message&) override {}
    };
    HandlerServer<Handler> running(with_loops());
    const auto clients = connect_members(running.port(), 3);
    const auto names = on_each_loop(running.server, [&] {
        auto all = running.server.rooms().names();
        std::sort(all.begin(), all.end());
        return all;
    });
    for (const auto& each : names) CHECK(each == std::vector<std::string>{"room-0", "room-1", "room-2"});
    const auto sizes = on_each_loop(running.server, [&] {
        Room* other = running.server.rooms().find("room-2");
        return other == nullptr ? 0 : other->size();
    });
    CHECK(sizes == std::vector<std::size_t>{1, 1, 1});
    CHECK(running.on_loop([&] { return running.server.rooms().find("nowhere") == nullptr; }));
    CHECK(running.on_loop([&] { return running.server.rooms()["room-2"].broadcast("over there"); }) == 1);
    for (int turn = 0; turn < 2; ++turn) on_each_loop(running.server, [] { return true; });  // it has arrived
    on_each_loop(running.server, [&] {
        running.server.each_handler([](WebSocketHandler& handler) { handler.close(); });
        return true;
    });
    int received = 0;
    for (const auto& client : clients) {
        received += client->next() == "over there" ? 1 : 0;
    }
    CHECK(received == 1);
    CHECK(running.eventually([&] { return running.server.rooms().names().empty(); }));
    CHECK(running.eventually([&] { return running.server.rooms().size() == 0; }));
}

TEST_CASE("a server in poll() runs its other loops too") {
    ServerOptions options = with_loops();
    options.handle_signals = false;
    Server server(options);
    server.route<Member>("/");
    test::listen(server);
    const int port = server.port();
    std::atomic<bool> done{false};
    std::thread clients_thread([&] {
        const auto clients = connect_members(port, 6);
        clients[0]->send("one");
        for (const auto& client : clients) CHECK(client->next() == "one");
        done = true;
    });
    while (!done) server.poll(10ms);
    server.shutdown(1s);
    while (server.poll(10ms)) {
    }
    clients_thread.join();
}

TEST_CASE("more than 256 loops are an error, and 0 is one for each core") {
    CHECK_THROWS_WITH_AS(Server(with_loops(257)), "ServerOptions::threads: more than 256", Error);
    CHECK(Server(with_loops(0)).loop_count() == (std::max)(1u, std::thread::hardware_concurrency()));
    CHECK(TestServer(with_loops(3)).loop_count() == 1);
}

#if !defined(_WIN32)
TEST_CASE("SIGTERM ends all loops") {
    test::ServerProcess process([](int) {
        ServerOptions options = with_loops();
        options.shutdown_deadline = 500ms;  // the clients do not answer
        auto server = std::make_unique<Server>(options);
        server->route<Member>("/");
        test::listen(*server);
        return server;
    });
    const auto clients = connect_members(process.port(), 6);
    rusage used{};
    CHECK(process.terminate(used) == 0);
    for (const auto& client : clients) CHECK(client->close_code() == CloseCode::going_away);
}
#endif

TEST_SUITE_END();
