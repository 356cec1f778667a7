// What several threads may do with servers: several servers in one process, each on a thread of its own, which reach one
// another through Loop::post, Mailbox and HandlerRef while clients come and go. For ThreadSanitizer above all.
#include "support.hpp"

#include <csignal>
#include <set>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::Client;
using test::Echo;
using test::RunningServer;

namespace {

// Threads that are joined when this is gone.
class Threads {
public:
    Threads() = default;
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;
    ~Threads() { join(); }
    template <class Work>
    void start(Work work) {
        list_.emplace_back(std::move(work));
    }
    void join() {
        for (std::thread& thread : list_)
            if (thread.joinable()) thread.join();
    }

private:
    std::vector<std::thread> list_;
};

// The mailboxes of several servers: what one of them is told, it tells all the others.
struct Bus {
    struct Stop {
        std::shared_ptr<Mailbox> mailbox;
        Server* server;  // for work in the mailbox alone
    };
    std::vector<Stop> stops;  // complete before the servers run

    void add(Server& server) { stops.push_back({server.loop().mailbox(), &server}); }
    void tell(const std::string& text) {
        for (const Stop& stop : stops)
            stop.mailbox->post([server = stop.server, text] { server->rooms()["all"].broadcast(text); });
    }
};

struct Passenger : WebSocketHandler {
    explicit Passenger(Bus& of_all) : bus(of_all) {}
    void open() override { room("all").join(*this); }
    void on_message(const Message& m) override { bus.tell(std::string(m.text())); }
    Bus& bus;
};

// References to handlers of all servers, for whoever wants to write to them.
class Directory {
public:
    void add(HandlerRef ref) {
        const std::lock_guard<std::mutex> lock(mutex_);
        refs_.push_back(std::move(ref));
    }
    std::vector<HandlerRef> all() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return refs_;
    }
    void forget() {
        const std::lock_guard<std::mutex> lock(mutex_);
        refs_.clear();
    }

private:
    mutable std::mutex mutex_;
    std::vector<HandlerRef> refs_;
};

// Says what it hears to everybody in the directory, on whatever server they are.
struct Caller : WebSocketHandler {
    Caller(Directory& of_all, std::atomic<int>& of_open) : directory(of_all), open_count(of_open) {}
    void open() override {
        ++open_count;
        directory.add(ref());
    }
    void on_message(const Message& m) override {
        for (const HandlerRef& other : directory.all()) other.write_message(std::string(m.text()));
    }
    void on_close() override { --open_count; }
    Directory& directory;
    std::atomic<int>& open_count;
};

// Sets the flag when the last copy of what holds it is gone.
struct Witness {
    explicit Witness(std::atomic<int>& counter) : alive(counter) { ++alive; }
    Witness(const Witness&) = delete;
    Witness& operator=(const Witness&) = delete;
    ~Witness() { --alive; }
    std::atomic<int>& alive;
};

std::string text_of(int sender, int n) { return std::to_string(sender) + ":" + std::to_string(n); }

// Hears `senders` people say `count` things each; answers whether each of them said them in order, once.
bool hears_everybody(Client& client, int senders, int count) {
    std::vector<int> next(static_cast<std::size_t>(senders), 0);
    for (int heard = 0; heard < senders * count; ++heard) {
        const auto message = client.next();
        if (!message) return false;
        const auto sender = static_cast<std::size_t>(std::atoi(message->c_str()));
        if (sender >= next.size() || *message != text_of(static_cast<int>(sender), next[sender]++)) return false;
    }
    return true;
}

}  // namespace

TEST_SUITE_BEGIN("threads");

TEST_CASE("servers on threads of their own pass on to all what one of them is told, while clients come and go") {
    constexpr int servers = 4, count = 30;
    Bus bus;
    std::vector<std::unique_ptr<RunningServer>> running;
    for (int i = 0; i < servers; ++i) {
        running.push_back(std::make_unique<RunningServer>());
        running.back()->server.route<Passenger>("/", std::ref(bus));
        running.back()->server.route<Echo>("/echo");
        bus.add(running.back()->server);
    }
    for (const auto& one : running) one->start();
    std::vector<std::unique_ptr<Client>> listeners;
    for (const auto& one : running) {
        listeners.push_back(std::make_unique<Client>(one->port()));
        REQUIRE(listeners.back()->is_open());
        REQUIRE(one->eventually([&] { return one->server.rooms()["all"].size() == 1; }));
    }
    std::atomic<bool> done{false};
    std::atomic<int> visits{0};
    Threads threads;
    for (int i = 0; i < servers; ++i) {
        const int port = running[static_cast<std::size_t>(i)]->port();
        threads.start([=] {
            Client speaker(port, "/");
            for (int n = 0; n < count; ++n) speaker.send(text_of(i, n));
            speaker.close();
            speaker.close_code();
        });
        threads.start([=, &done, &visits] {
            while (!done) {
                Client visitor(port, visits % 2 == 0 ? "/" : "/echo");
                if (++visits % 3 == 0) visitor.raw.reset();
            }
        });
    }
    for (const auto& listener : listeners) CHECK(hears_everybody(*listener, servers, count));
    done = true;
    threads.join();
    CHECK(visits > 0);
}

TEST_CASE("handlers write through references to handlers of other servers, while those come and go") {
    constexpr int servers = 3, count = 30;
    Directory directory;
    std::atomic<int> open_count{0};
    std::vector<std::unique_ptr<RunningServer>> running;
    for (int i = 0; i < servers; ++i) {
        running.push_back(std::make_unique<RunningServer>());
        running.back()->server.route<Caller>("/", std::ref(directory), std::ref(open_count));
        running.back()->start();
    }
    std::vector<std::unique_ptr<Client>> callers;
    for (const auto& one : running) {
        callers.push_back(std::make_unique<Client>(one->port()));
        REQUIRE(callers.back()->is_open());
    }
    while (open_count != servers) std::this_thread::yield();
    std::atomic<bool> done{false};
    Threads threads;
    for (const auto& one : running)
        threads.start([port = one->port(), &done] {
            for (int i = 0; !done; ++i) {
                Client visitor(port);
                if (i % 2 == 0) visitor.raw.reset();
            }
        });
    for (int n = 0; n < count; ++n)
        for (int i = 0; i < servers; ++i) callers[static_cast<std::size_t>(i)]->send(text_of(i, n));
    for (const auto& caller : callers) CHECK(hears_everybody(*caller, servers, count));
    done = true;
    threads.join();
    // Nobody's reference is the last to know a server that is gone.
    running.clear();
    CHECK(open_count == 0);
    for (const HandlerRef& ref : directory.all()) CHECK_FALSE(ref.write_message("too late"));
    directory.forget();
}

TEST_CASE("threads post to a server until after it is destroyed, and all that they posted is destroyed too") {
    for (int round = 0; round < 10; ++round) {
        std::atomic<int> alive{0}, accepted{0}, ran{0}, refused{0};
        std::optional<RunningServer> running(std::in_place);
        running->server.route<Echo>("/");
        running->start();
        Client client(running->port());
        Threads threads;
        for (int i = 0; i < 3; ++i)
            threads.start([&, mailbox = running->server.loop().mailbox()] {
                while (refused < 100) {
                    const auto witness = std::make_shared<Witness>(alive);
                    if (mailbox->post([&ran, witness] { ++ran; })) ++accepted;
                    else ++refused;
                }
            });
        while (ran < 100) std::this_thread::yield();
        running.reset();
        threads.join();
        CHECK(ran <= accepted);
        CHECK(alive == 0);
        CHECK(client.close_code() == CloseCode::going_away);
    }
}

TEST_CASE("references outlive their servers on other threads, whoever lets go of them last") {
    for (int round = 0; round < 10; ++round) {
        Directory directory;
        std::atomic<int> open_count{0};
        std::optional<RunningServer> running(std::in_place);
        running->server.route<Caller>("/", std::ref(directory), std::ref(open_count));
        running->start();
        Client one(running->port()), two(running->port());
        REQUIRE(one.is_open());
        REQUIRE(two.is_open());
        while (directory.all().size() != 2) std::this_thread::yield();
        std::atomic<int> written{0};
        Threads threads;
        for (int i = 0; i < 3; ++i)
            threads.start([&written, refs = directory.all()] {
                bool taken = true;
                for (int n = 0; taken; ++n, ++written) {
                    taken = false;
                    for (const HandlerRef& ref : refs) {
                        taken = ref.write_message("news") || taken;
                        if (n == 50) ref.close();
                    }
                }
            });
        directory.forget();
        while (written < 100) std::this_thread::yield();
        running.reset();
        threads.join();
        CHECK(open_count == 0);
    }
}

TEST_CASE("threads shut a server down at once, again and again, while others connect to it") {
    for (int round = 0; round < 10; ++round) {
        RunningServer running;
        running.server.route<Echo>("/");
        running.start();
        std::vector<std::unique_ptr<Client>> clients;
        for (int i = 0; i < 5; ++i) clients.push_back(std::make_unique<Client>(running.port()));
        Threads threads;
        std::atomic<int> begun{0};
        for (int i = 0; i < 3; ++i)
            threads.start([&, port = running.port()] {
                ++begun;
                for (int n = 0; n < 5; ++n) Client(port).close();  // open, refused or never accepted
            });
        while (begun != 3) std::this_thread::yield();
        for (int i = 0; i < 3; ++i)
            threads.start([&] {
                for (int n = 0; n < 3; ++n) running.server.shutdown(5s);
            });
        for (const auto& client : clients) CHECK(client->close_code() == CloseCode::going_away);
        threads.join();
        clients.clear();
        running.stop();
    }
}

TEST_CASE("a callback of one server shuts another down, and is told when that has ended") {
    struct Killer : WebSocketHandler {
        explicit Killer(Server& its_victim) : victim(its_victim) {}
        void on_message(const Message&) override { victim.shutdown(5s); }
        Server& victim;
    };
    RunningServer victim, killer;
    victim.server.route<Echo>("/");
    killer.server.route<Killer>("/", std::ref(victim.server));
    victim.start();
    killer.start();
    Client at_victim(victim.port()), at_killer(killer.port());
    at_killer.send("now");
    CHECK(at_victim.close_code() == CloseCode::going_away);
    at_victim.raw.close();
    victim.stop();
    at_killer.ping("alive");
    CHECK(at_killer.next(Event::Kind::pong) == "alive");
}

TEST_CASE("servers come and go on many threads while signals arrive, and each that runs is ended by one") {
    // A loop that lives longer keeps the signals from ending the process.
    Loop keeper(test::poller_kind());
    const SignalGuard guard(keeper.wake_descriptor());
    constexpr int threads_of_servers = 3, rounds = 15;
    std::atomic<int> ended{0};
    Threads threads;
    for (int i = 0; i < threads_of_servers; ++i)
        threads.start([&ended] {
            for (int round = 0; round < rounds; ++round) {
                ServerOptions options;
                options.poller = test::poller_kind();
                Server server(options);
                server.route<Echo>("/");
                server.listen(0);
                server.run();
                ++ended;
            }
        });
    const auto until = Clock::now() + test::deadline;
    while (ended < threads_of_servers * rounds && Clock::now() < until) {
        ::raise(ended % 2 == 0 ? SIGTERM : SIGINT);
        std::this_thread::yield();
    }
    CHECK(ended == threads_of_servers * rounds);
}

TEST_SUITE_END();
