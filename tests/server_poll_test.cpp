// Section 14 in the event loop of another program: poll(), descriptor() and next_timeout(), and servers that run again.
#include "support.hpp"

#if __has_include(<boost/asio.hpp>) && defined(__linux__)
#define WSCHAT_TEST_ASIO 1
#include <boost/asio.hpp>
#else
#define WSCHAT_TEST_ASIO 0
#endif

using namespace wschat;
using namespace std::chrono_literals;
using test::Echo;
using test::error_of;
using test::eventually;
using test::LobbyMember;
using test::WsClient;
using Kind = detail::Event::Kind;

namespace {

ServerOptions options_with(PollerKind kind) {
    ServerOptions options;
    options.poller = kind;
    options.handle_signals = false;
    return options;
}
ServerOptions test_options() { return options_with(test::poller_kind()); }

// ---- loops of other programs -----------------------------------------------------------------------------------------

// Each drives the server until it ends.
using Drive = void (*)(Server&);

void poll_without_limit(Server& server) {
    while (server.poll((Duration::max)())) {
    }
}
void poll_at_intervals(Server& server) {
    while (server.poll(1ms)) {
    }
}

#if defined(__linux__)
// The time in the form that epoll_wait() needs.
int to_ms(Duration wait) {
    if (wait == (Duration::max)()) return -1;
    return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>((std::min)(wait, Duration(1min))).count());
}

void wait_with_epoll(Server& server) {
    const detail::OwnedDescriptor outer(::epoll_create1(EPOLL_CLOEXEC));
    epoll_event event{};
    event.events = EPOLLIN;
    REQUIRE(::epoll_ctl(outer.descriptor(), EPOLL_CTL_ADD, server.descriptor(), &event) == 0);
    do ::epoll_wait(outer.descriptor(), &event, 1, to_ms(server.next_timeout()));
    while (server.poll());
}
#endif

#if WSCHAT_TEST_ASIO
// The snippet of the README.
class AsioServer {
public:
    AsioServer(boost::asio::io_context& context, Server& server)
        : server_(server), socket_(context, ::dup(server.descriptor())), timer_(context) {
        wait();
    }

private:
    void wait() {
        using boost::asio::posix::stream_descriptor;
        socket_.async_wait(stream_descriptor::wait_read, [this](boost::system::error_code error) {
            if (!error) turn();
        });
        timer_.expires_after(std::min<Duration>(server_.next_timeout(), std::chrono::minutes(1)));
        timer_.async_wait([this](boost::system::error_code error) {
            if (!error) turn();
        });
    }
    void turn() {
        socket_.cancel();
        timer_.cancel();
        if (server_.poll()) wait();
    }

    Server& server_;
    boost::asio::posix::stream_descriptor socket_;
    boost::asio::steady_timer timer_;
};

void wait_with_asio(Server& server) {
    boost::asio::io_context context;
    const AsioServer running(context, server);
    context.run();
}
#endif

// Runs the clients on a thread of their own while the server is driven on this one. Then shuts the server down.
template <class Clients>
void drive_with_clients(Drive drive, Server& server, Clients&& clients) {
    const int port = server.port();
    std::thread thread([&] {
        clients(port);
        server.shutdown(test::deadline);
    });
    drive(server);
    thread.join();
}

// Polls until the condition holds.
template <class Condition>
bool poll_until(Server& server, Condition&& condition) {
    return eventually([&] {
        server.poll();
        return condition();
    });
}

void chat_of_a_hundred(Drive drive, PollerKind kind) {
    Server server(options_with(kind));
    server.route<LobbyMember>("/");
    test::listen(server);
    bool complete = true;
    drive_with_clients(drive, server, [&](int port) {
        std::vector<std::unique_ptr<WsClient>> clients;
        for (int i = 0; i < 100; ++i) clients.push_back(std::make_unique<WsClient>(port));
        for (const auto& client : clients) complete = complete && client->is_open();
        for (int i = 0; i < 100 && complete; ++i) {
            const std::string text = "message " + std::to_string(i);
            clients[static_cast<std::size_t>(i)]->send(text);
            for (const auto& client : clients) complete = complete && client->next() == text;
        }
        server.shutdown(test::deadline);
        for (const auto& client : clients) {
            complete = complete && client->close_code() == CloseCode::going_away;
            client->raw.close();
        }
    });
    CHECK(complete);
    CHECK(server.metrics().connections_open == 0);
    CHECK(server.metrics().messages_sent == 100 * 100);
}

void pings_in_time(Drive drive, PollerKind kind) {
    ServerOptions options = options_with(kind);
    options.limits.ping_interval = 20ms;
    options.limits.ping_timeout = test::deadline;
    Server server(options);
    server.route<Echo>("/");
    test::listen(server);
    int pings = 0;
    CloseCode code{};
    drive_with_clients(drive, server, [&](int port) {
        WsClient client(port);
        while (pings < 5 && client.next(Kind::ping)) ++pings;
        server.shutdown(test::deadline);
        code = client.close_code();
        client.raw.close();
    });
    CHECK(pings == 5);
    CHECK(code == CloseCode::going_away);
}

}  // namespace

TEST_SUITE_BEGIN("server");

TEST_CASE("a server that is driven by poll() alone serves a hundred clients, sends pings and shuts down") {
    for (const Drive drive : {&poll_without_limit, &poll_at_intervals}) {
        chat_of_a_hundred(drive, test::poller_kind());
        pings_in_time(drive, test::poller_kind());
    }
}

#if defined(__linux__)
TEST_CASE("a server in the epoll loop of another program serves a hundred clients, sends pings and shuts down") {
    chat_of_a_hundred(&wait_with_epoll, PollerKind::automatic);
    pings_in_time(&wait_with_epoll, PollerKind::automatic);
}

TEST_CASE("a server and another server share the epoll loop of a program") {
    Server one(options_with(PollerKind::automatic)), two(options_with(PollerKind::automatic));
    const detail::OwnedDescriptor outer(::epoll_create1(EPOLL_CLOEXEC));
    for (Server* server : {&one, &two}) {
        server->route<Echo>("/");
        test::listen(*server);
        epoll_event event{};
        event.events = EPOLLIN;
        REQUIRE(::epoll_ctl(outer.descriptor(), EPOLL_CTL_ADD, server->descriptor(), &event) == 0);
    }
    const int ports[2] = {one.port(), two.port()};
    std::optional<std::string> echoes[2];
    std::thread thread([&] {
        for (int i = 0; i < 2; ++i) {
            WsClient client(ports[i]);
            client.send("to " + std::to_string(i));
            echoes[i] = client.next();
        }
        one.shutdown(0ms);
        two.shutdown(0ms);
    });
    bool running[2] = {true, true};
    while (running[0] || running[1]) {
        epoll_event event{};
        ::epoll_wait(outer.descriptor(), &event, 1, to_ms((std::min)(one.next_timeout(), two.next_timeout())));
        if (running[0]) running[0] = one.poll();
        if (running[1]) running[1] = two.poll();
    }
    thread.join();
    CHECK(echoes[0] == "to 0");
    CHECK(echoes[1] == "to 1");
}
#endif

#if WSCHAT_TEST_ASIO
TEST_CASE("a server in an io_context of Boost.Asio serves a hundred clients, sends pings and shuts down") {
    chat_of_a_hundred(&wait_with_asio, PollerKind::automatic);
    pings_in_time(&wait_with_asio, PollerKind::automatic);
}
#endif

TEST_CASE("a broadcast between two polls is sent by the next one, which does not wait") {
    Server server(test_options());
    server.route<LobbyMember>("/");
    test::listen(server);
    std::unique_ptr<WsClient> client;
    std::atomic<bool> connected{false};
    std::thread thread([&, port = server.port()] {
        client = std::make_unique<WsClient>(port);
        connected = true;
    });
    REQUIRE(poll_until(server, [&] { return connected && server.rooms()["lobby"].size() == 1; }));
    thread.join();
    for (int i = 0; i < 3; ++i) server.poll();  // nothing is left
    server.rooms()["lobby"].broadcast("typed");
    CHECK(server.next_timeout() == Duration::zero());
    CHECK(server.poll((Duration::max)()));
    CHECK(client->next() == "typed");
    CHECK(server.next_timeout() > Duration::zero());
}

TEST_CASE("a close between two polls gives the peer all of its time to answer") {
    ServerOptions options = test_options();
    options.limits.closing_timeout = 1h;
    Server server(options);
    server.route<LobbyMember>("/");
    test::listen(server);
    std::atomic<bool> done{false};
    CloseCode code{};
    std::thread thread([&, port = server.port()] {
        WsClient client(port);
        code = client.close_code();
        client.raw.close();
        done = true;
    });
    REQUIRE(poll_until(server, [&] { return server.rooms()["lobby"].size() == 1; }));
    for (WebSocketHandler& member : server.rooms()["lobby"]) member.close(CloseCode{4000});
    CHECK(poll_until(server, [&] { return done && server.metrics().connections_open == 0; }));
    thread.join();
    CHECK(code == CloseCode{4000});
    CHECK(server.metrics().closed.at(CloseCause::local) == 1);
}

TEST_CASE("next_timeout is zero while a session has work left for the next turn") {
    Server server(test_options());
    server.route<Echo>("/");
    test::listen(server);
    std::atomic<bool> sent{false};
    std::unique_ptr<WsClient> client;
    std::thread thread([&, port = server.port()] {
        client = std::make_unique<WsClient>(port);
        for (int i = 0; i < 2000; ++i) client->connection.send(Opcode::text, "x");
        client->flush();
        sent = true;
    });
    REQUIRE(poll_until(server, [&] { return server.metrics().websockets_open == 1; }));
    while (!sent) std::this_thread::yield();
    thread.join();
    bool left = false;  // the budget of a visit is 256 messages
    CHECK(poll_until(server, [&] {
        left = left || server.next_timeout() == Duration::zero();
        return server.metrics().messages_received == 2000;
    }));
    CHECK(left);
}

TEST_CASE("poll() returns true from listen() until the end, and runs timers and posted work before and after") {
    Server server(test_options());
    int calls = 0;
    server.loop().post([&] { ++calls; });
    CHECK_FALSE(server.poll());
    CHECK(calls == 1);
    test::listen(server);
    CHECK(server.poll());
    server.loop().post([&] { server.loop().stop(); });
    CHECK_FALSE(server.poll());
    CHECK(server.poll());
    server.shutdown();
    CHECK_FALSE(server.poll());
    server.loop().post([&] { ++calls; });
    CHECK_FALSE(server.poll());
    CHECK(calls == 2);
}

TEST_CASE("an exception of posted work does not leave poll() of a server and is logged") {
    Server server(test_options());
    test::LogLines log;
    log.attach_to(server);
    test::listen(server);
    server.loop().post([] { throw std::runtime_error("on purpose"); });
    CHECK(server.poll());
    CHECK(log.has("what=\"on purpose\""));
    CHECK(server.metrics().handler_exceptions == 1);
}

TEST_CASE("poll() of a server in a callback is an Error") {
    Server server(test_options());
    test::listen(server);
    std::string error;
    server.loop().post([&] { error = error_of([&] { server.poll(); }); });
    CHECK(server.poll());
    CHECK(error == "poll: the loop is running already");
}

TEST_CASE("a signal between two polls shuts the server down, and the next signal has its old effect") {
    static volatile std::sig_atomic_t own = 0;
    const test::Disposition terminate(SIGTERM, [](int) { own = 1; });
    ServerOptions options = test_options();
    options.handle_signals = true;
    Server server(options);
    test::listen(server);
    CHECK(server.poll());
    std::raise(SIGTERM);
    CHECK_FALSE(server.poll((Duration::max)()));
    CHECK(own == 0);
    std::raise(SIGTERM);
    CHECK(own == 1);
}

// ---- again ----------------------------------------------------------------------------------------------------------

TEST_CASE("a server that has ended serves again after listen(), and run() without it is an Error") {
    ServerOptions options = test_options();
    options.limits.closing_timeout = test::deadline;
    Server server(options);
    server.route<LobbyMember>("/");
    for (int round = 0; round < 3; ++round) {
        test::listen(server);
        std::optional<std::string> echo;
        const auto converse = [&](int port) {
            WsClient client(port);
            client.send("hello");
            echo = client.next();
            server.shutdown(1h);
            client.close_code();
            client.raw.close();
        };
        if (round == 1) drive_with_clients(&poll_without_limit, server, converse);
        else drive_with_clients([](Server& each) { each.run(); }, server, converse);
        CHECK(echo == "hello");
        CHECK(server.port() == 0);
        CHECK(error_of([&] { server.run(); }) == "run: nothing to serve: call listen() first");
    }
    CHECK(server.metrics().websockets_opened == 3);
}

TEST_CASE("a late shutdown() and an old deadline do not end a server that listens again") {
    Server server(test_options());
    server.route<Echo>("/");
    test::listen(server);
    server.shutdown(50ms);
    server.run();
    server.shutdown();  // of another thread, a little late
    test::listen(server);
    std::atomic<bool> deadline_is_over{false};
    bool echoed = false;
    drive_with_clients(&poll_without_limit, server, [&](int port) {
        WsClient client(port);
        server.loop().post([&] { server.loop().call_later(100ms, [&] { deadline_is_over = true; }); });
        eventually([&] { return deadline_is_over.load(); });
        client.send("still here");
        echoed = client.next() == "still here";
        client.raw.close();
    });
    CHECK(deadline_is_over);
    CHECK(echoed);
}

TEST_SUITE_END();
