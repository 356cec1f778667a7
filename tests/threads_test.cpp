// Several servers in one process, each on its own thread. They use Loop::post, Mailbox and HandlerRef across threads
// while clients connect and disconnect. Mainly for ThreadSanitizer.
#include "support.hpp"

#include <set>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::Echo;
using test::RunningServer;
using test::WsClient;

namespace {

// Joins its threads in the destructor.
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

// Publishes a message to the room "all" of several servers.
struct Publisher {
    struct Target {
        std::shared_ptr<Mailbox> mailbox;
        Server* server;  // only for work in the mailbox
    };
    std::vector<Target> targets;  // does not change while the servers run

    void add(Server& server) { targets.push_back({server.loop().mailbox(), &server}); }
    void publish(const std::string& text) {
        for (const Target& target : targets)
            target.mailbox->post([server = target.server, text] { server->rooms()["all"].broadcast(text); });
    }
};

struct PublishingMember : WebSocketHandler {
    explicit PublishingMember(Publisher& a_publisher) : publisher(a_publisher) {}
    void open() override { room("all").join(*this); }
    void on_message(const Message& m) override { publisher.publish(std::string(m.text())); }
    Publisher& publisher;
};

// A list of references to the handlers of all servers.
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
    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        refs_.clear();
    }

private:
    mutable std::mutex mutex_;
    std::vector<HandlerRef> refs_;
};

// Sends each message to all handlers in the directory, on all servers.
struct DirectorySender : WebSocketHandler {
    DirectorySender(Directory& a_directory, std::atomic<int>& an_open_count)
        : directory(a_directory), open_count(an_open_count) {}
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

// Counts its instances.
struct Counted {
    explicit Counted(std::atomic<int>& counter) : alive(counter) { ++alive; }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;
    ~Counted() { --alive; }
    std::atomic<int>& alive;
};

std::string text_of(int sender, int n) { return std::to_string(sender) + ":" + std::to_string(n); }

// Receives `count` messages of each sender. Returns true if those of each sender arrive in order and once.
bool receives_all(WsClient& client, int senders, int count) {
    std::vector<int> next(static_cast<std::size_t>(senders), 0);
    for (int received = 0; received < senders * count; ++received) {
        const auto message = client.next();
        if (!message) return false;
        const auto sender = static_cast<std::size_t>(std::atoi(message->c_str()));
        if (sender >= next.size() || *message != text_of(static_cast<int>(sender), next[sender]++)) return false;
    }
    return true;
}

}  // namespace

TEST_SUITE_BEGIN("threads");

TEST_CASE("servers on several threads publish to each other while clients connect and disconnect") {
    constexpr int servers = 4, count = 30;
    Publisher publisher;
    std::vector<std::unique_ptr<RunningServer>> running;
    for (int i = 0; i < servers; ++i) {
        running.push_back(std::make_unique<RunningServer>());
        running.back()->server.route<PublishingMember>("/", std::ref(publisher));
        running.back()->server.route<Echo>("/echo");
        publisher.add(running.back()->server);
    }
    for (const auto& one : running) one->start();
    std::vector<std::unique_ptr<WsClient>> listeners;
    for (const auto& one : running) {
        listeners.push_back(std::make_unique<WsClient>(one->port()));
        REQUIRE(listeners.back()->is_open());
        REQUIRE(one->eventually([&] { return one->server.rooms()["all"].size() == 1; }));
    }
    std::atomic<bool> done{false};
    std::atomic<int> guests{0};
    Threads threads;
    for (int i = 0; i < servers; ++i) {
        const int port = running[static_cast<std::size_t>(i)]->port();
        threads.start([=] {
            WsClient sender(port, "/");
            for (int n = 0; n < count; ++n) sender.send(text_of(i, n));
            sender.close();
            sender.close_code();
        });
        threads.start([=, &done, &guests] {
            while (!done) {
                WsClient guest(port, guests % 2 == 0 ? "/" : "/echo");
                if (++guests % 3 == 0) guest.raw.reset();
            }
        });
    }
    for (const auto& listener : listeners) CHECK(receives_all(*listener, servers, count));
    done = true;
    threads.join();
    CHECK(guests > 0);
}

TEST_CASE("handlers write to handlers of other servers while clients connect and disconnect") {
    constexpr int servers = 3, count = 30;
    Directory directory;
    std::atomic<int> open_count{0};
    std::vector<std::unique_ptr<RunningServer>> running;
    for (int i = 0; i < servers; ++i) {
        running.push_back(std::make_unique<RunningServer>());
        running.back()->server.route<DirectorySender>("/", std::ref(directory), std::ref(open_count));
        running.back()->start();
    }
    std::vector<std::unique_ptr<WsClient>> clients;
    for (const auto& one : running) {
        clients.push_back(std::make_unique<WsClient>(one->port()));
        REQUIRE(clients.back()->is_open());
    }
    while (open_count != servers) std::this_thread::yield();
    std::atomic<bool> done{false};
    Threads threads;
    for (const auto& one : running)
        threads.start([port = one->port(), &done] {
            for (int i = 0; !done; ++i) {
                WsClient guest(port);
                if (i % 2 == 0) guest.raw.reset();
            }
        });
    for (int n = 0; n < count; ++n)
        for (int i = 0; i < servers; ++i) clients[static_cast<std::size_t>(i)]->send(text_of(i, n));
    for (const auto& client : clients) CHECK(receives_all(*client, servers, count));
    done = true;
    threads.join();
    // References outlive their servers.
    running.clear();
    CHECK(open_count == 0);
    for (const HandlerRef& ref : directory.all()) CHECK_FALSE(ref.write_message("too late"));
    directory.clear();
}

TEST_CASE("threads post to a server during and after its destruction, and all posted work is destroyed") {
    for (int round = 0; round < 10; ++round) {
        std::atomic<int> alive{0}, accepted{0}, ran{0}, refused{0};
        std::optional<RunningServer> running(std::in_place);
        running->server.route<Echo>("/");
        running->start();
        WsClient client(running->port());
        Threads threads;
        for (int i = 0; i < 3; ++i)
            threads.start([&, mailbox = running->server.loop().mailbox()] {
                while (refused < 100) {
                    const auto counted = std::make_shared<Counted>(alive);
                    if (mailbox->post([&ran, counted] { ++ran; })) ++accepted;
                    else ++refused;
                }
            });
        while (ran < 100) std::this_thread::yield();
        running->stop(50ms);  // the client does not answer the Close frame meanwhile
        running.reset();
        threads.join();
        CHECK(ran <= accepted);
        CHECK(alive == 0);
        CHECK(client.close_code() == CloseCode::going_away);
    }
}

TEST_CASE("references on other threads may outlive their servers") {
    for (int round = 0; round < 10; ++round) {
        Directory directory;
        std::atomic<int> open_count{0};
        std::optional<RunningServer> running(std::in_place);
        running->server.route<DirectorySender>("/", std::ref(directory), std::ref(open_count));
        running->start();
        WsClient one(running->port()), two(running->port());
        REQUIRE(one.is_open());
        REQUIRE(two.is_open());
        while (directory.all().size() != 2) std::this_thread::yield();
        std::atomic<int> written{0};
        Threads threads;
        for (int i = 0; i < 3; ++i)
            threads.start([&written, refs = directory.all()] {
                bool accepted = true;
                for (int n = 0; accepted; ++n, ++written) {
                    accepted = false;
                    for (const HandlerRef& ref : refs) {
                        accepted = ref.write_message("news") || accepted;
                        if (n == 50) ref.close();
                    }
                }
            });
        directory.clear();
        while (written < 100) std::this_thread::yield();
        running->stop(50ms);  // the client does not answer the Close frame meanwhile
        running.reset();
        threads.join();
        CHECK(open_count == 0);
    }
}

TEST_CASE("several threads call shutdown repeatedly while clients connect") {
    for (int round = 0; round < 10; ++round) {
        RunningServer running;
        running.server.route<Echo>("/");
        running.start();
        std::vector<std::unique_ptr<WsClient>> clients;
        for (int i = 0; i < 5; ++i) clients.push_back(std::make_unique<WsClient>(running.port()));
        Threads threads;
        std::atomic<int> started{0};
        for (int i = 0; i < 3; ++i)
            threads.start([&, port = running.port()] {
                ++started;
                for (int n = 0; n < 5; ++n) WsClient(port).close();  // open, refused or never accepted
            });
        while (started != 3) std::this_thread::yield();
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

TEST_CASE("a callback of one server shuts another one down") {
    struct Stopper : WebSocketHandler {
        explicit Stopper(Server& a_target) : target(a_target) {}
        void on_message(const Message&) override { target.shutdown(5s); }
        Server& target;
    };
    RunningServer target, stopper;
    target.server.route<Echo>("/");
    stopper.server.route<Stopper>("/", std::ref(target.server));
    target.start();
    stopper.start();
    WsClient target_client(target.port()), stopper_client(stopper.port());
    stopper_client.send("now");
    CHECK(target_client.close_code() == CloseCode::going_away);
    target_client.raw.close();
    target.stop();
    stopper_client.ping("alive");
    CHECK(stopper_client.next(Event::Kind::pong) == "alive");
}

TEST_CASE("a signal ends all running servers while other threads create and destroy servers") {
    // This guard exists during the whole test, so that no signal ends the process. SIGINT may be ignored before.
    const test::Disposition interrupt(SIGINT, SIG_DFL);
    Loop loop(test::poller_kind());
    const SignalGuard guard(LoopAccess::wake_descriptor(loop));
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
    threads.join();
}

TEST_SUITE_END();
