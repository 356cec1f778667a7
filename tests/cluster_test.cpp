// section 18: the history in Redis, and a Redis that is wrong, late, away or empty.
#define WSCHAT_CHAT 1
#include "store_suite.hpp"

#if WSCHAT_HIREDIS

#include <poll.h>

#include <atomic>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "redis.hpp"

namespace {

using namespace wschat;
using namespace std::chrono_literals;
using test::contains;
using test::RedisServer;
using test::StoreFixture;

// Stores in one test have a Redis in common, and keys of their own.
RedisOptions options_with(const std::string& prefix) {
    RedisOptions options;
    options.prefix = prefix;
    return options;
}

// "join:u1=Anna@h1 " with a "~" if it is quiet.
std::string summary_of(const ChatEntry& entry) {
    const char* const kind = entry.kind == ChatEntry::Kind::join     ? "join"
                             : entry.kind == ChatEntry::Kind::leave  ? "leave"
                             : entry.kind == ChatEntry::Kind::rename ? "rename"
                                                                     : "away";
    const std::string to = entry.kind == ChatEntry::Kind::rename ? "->" + entry.text : "";
    return std::string(kind) + ":" + entry.user + "=" + entry.name + to + "@" + entry.hub + (entry.quiet ? "~ " : " ");
}
std::string presence_summary(const std::vector<ChatEntry>& users) {
    std::vector<std::string> all;
    for (const ChatEntry& each : users) {
        ChatEntry plain = each;
        plain.quiet = false;
        all.push_back(summary_of(plain));
    }
    std::sort(all.begin(), all.end());
    std::string text;
    for (const std::string& each : all) text += each;
    return text;
}
ChatEntry presence(ChatEntry::Kind kind, const std::string& user, const std::string& name, const std::string& hub,
                   const std::string& text = "", const std::string& author = "") {
    ChatEntry entry;
    entry.kind = kind;
    entry.room = "tea";
    entry.user = user;
    entry.name = name;
    entry.hub = hub;
    entry.text = text;
    entry.author = author;
    return entry;
}

// A hub with its store, on a loop that the test drives.
class Node final : private ChatStore::Listener {
public:
    explicit Node(const detail::RedisUrls& urls, const RedisOptions& options = {}, const HistoryLimits& limits = {})
        : store_(std::make_unique<RedisHistory>(urls, options, limits)) {
        store_->attach(*this, loop_.mailbox());
    }
    ChatStore& store() { return *store_; }
    void say(const std::string& text, const std::string& tag = "", const std::string& room = "tea") {
        ChatEntry entry = StoreFixture::entry(ChatEntry::Kind::said, text, "anna", tag);
        entry.room = room;
        entry.sender = 7;
        store_->append(std::move(entry));
    }
    // Follows the room from its newest entry on.
    void watch(const std::string& room = "tea") {
        store_->watch(room);
        read(room);
    }
    HistoryPage read(const std::string& room = "tea", const std::optional<HistoryPosition>& position = {}) {
        std::optional<HistoryPage> result;
        store_->since(room, position, 100, [&](const HistoryPage& page) { result = page; });
        wait([&] { return result.has_value(); });
        return *result;
    }
    template <class Done>
    void wait(Done&& done) {
        const auto until = Clock::now() + test::deadline;
        while (!done() && Clock::now() < until) loop_.poll(10ms);
        CHECK(done());
    }
    void wait_for(const std::string& what) {
        wait([&] { return contains(heard, what); });
        CHECK_MESSAGE(contains(heard, what), heard);
    }
    void poll() { loop_.poll(1ms); }

    std::string heard;  // "1:one 2:two gap:2 "; a star: from this hub
    std::string logged;
    std::map<std::string, std::string> users;  // of each room, as on_presence() has told last
    int presences = 0;                         // calls of on_presence()
    bool all = false;                          // it wants the entries of all rooms
    ChatEntry latest;                          // of presence

private:
    void on_entry(const ChatEntry& entry) override {
        if (entry.is_presence()) {
            heard += summary_of(entry);
            latest = entry;
            return;
        }
        heard += std::to_string(entry.id) + ":" + entry.text + (entry.sender == 7 ? "* " : " ");
    }
    void on_duplicate(const ChatEntry& entry) override { heard += "duplicate:" + std::to_string(entry.id) + " "; }
    void on_failure(const ChatEntry& entry, const std::string& cause) override {
        heard += "failed:" + entry.text + " ";
        logged += cause + ";";
    }
    void on_refused(const ChatEntry&, std::string_view code) override { heard += std::string(code) + " "; }
    void on_presence(const std::string& room, const std::vector<ChatEntry>& present) override {
        users[room] = presence_summary(present);
        ++presences;
    }
    void on_fact(const ChatFact& fact) override { heard += fact.key + "=" + fact.value + " "; }
    void on_position(const std::string&, const HistoryPage& page) override {
        heard += (page.gap ? "gap:" : "position:") + std::to_string(page.last_id) + " ";
    }
    bool watches_all() const override { return all; }
    void on_log(LogLevel, std::string_view event,
                const std::vector<std::pair<std::string_view, std::string>>& fields) override {
        logged += std::string(event);
        for (const auto& [key, value] : fields) logged += " " + std::string(key) + "=" + value;
        logged += ";";
    }

    Loop loop_;
    std::unique_ptr<RedisHistory> store_;
};

RedisOptions quick() {
    RedisOptions options;
    options.answer_timeout = 1s;
    options.connect_timeout = 1s;
    options.min_retry = 20ms;
    options.max_retry = 100ms;
    return options;
}

std::string error_of(const detail::RedisUrls& urls, const RedisOptions& options = quick()) {
    try {
        RedisHistory store(urls, options);
    } catch (const Error& error) {
        return error.what();
    }
    return "no error";
}

// A program on the port of a Redis that gives the same answer to whatever comes.
class FakeRedis {
public:
    explicit FakeRedis(std::string answer) : answer_(std::move(answer)) {
        listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof address;
        REQUIRE(::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0);
        REQUIRE(::listen(listener_, 8) == 0);
        REQUIRE(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
        port_ = ntohs(address.sin_port);
        thread_ = std::thread([this] { run(); });
    }
    FakeRedis(const FakeRedis&) = delete;
    FakeRedis& operator=(const FakeRedis&) = delete;
    ~FakeRedis() {
        ended_ = true;
        thread_.join();
        for (const pollfd& each : sockets_) ::close(each.fd);
    }
    std::string url() const { return "redis://127.0.0.1:" + std::to_string(port_); }

private:
    void run() {
        sockets_.push_back({listener_, POLLIN, 0});
        while (!ended_) {
            if (::poll(sockets_.data(), sockets_.size(), 10) <= 0) continue;
            for (std::size_t i = sockets_.size(); i-- > 1;) {
                char data[1024];
                if (sockets_[i].revents == 0) continue;
                if (::recv(sockets_[i].fd, data, sizeof data, 0) > 0) {
                    ::send(sockets_[i].fd, answer_.data(), answer_.size(), MSG_NOSIGNAL);
                } else {
                    ::close(sockets_[i].fd);
                    sockets_.erase(sockets_.begin() + static_cast<std::ptrdiff_t>(i));
                }
            }
            if (sockets_[0].revents == 0) continue;
            const int made = ::accept(listener_, nullptr, nullptr);
            if (made >= 0) sockets_.push_back({made, POLLIN, 0});
        }
    }
    const std::string answer_;
    int listener_ = -1, port_ = 0;
    std::vector<pollfd> sockets_;
    std::atomic<bool> ended_{false};
    std::thread thread_;
};

// The value of a figure, summed over all endpoints.
std::uint64_t figure(const MetricSource& source, const std::string& name) {
    std::vector<Metric> all;
    source(all);
    std::uint64_t sum = 0;
    for (const Metric& each : all)
        if (each.name == name) sum += each.value;
    return sum;
}

}  // namespace

TEST_SUITE_BEGIN("cluster");

TEST_CASE("a history in Redis passes the tests of every store") {
    const RedisServer redis;
    int stores = 0;
    const test::StoreFactory make = [&](const HistoryLimits& limits) {
        return std::make_unique<RedisHistory>(redis.url(), options_with("test" + std::to_string(++stores) + ":"),
                                              limits);
    };
    test::test_store(make);
}

TEST_CASE("a URL of Redis that cannot be used is an Error, without the password") {
    using detail::RedisUrl;
    const RedisUrl full = RedisUrl::parse("redis://us%40er:p%3Ass@example.com:1234/5");
    CHECK(full.user == "us@er");
    CHECK(full.password == "p:ss");
    CHECK(full.name() == "redis://example.com:1234/5");
    CHECK(RedisUrl::parse("redis://[::1]").name() == "redis://[::1]:6379/0");
    CHECK(RedisUrl::parse("redis://:secret@h").password == "secret");
    CHECK(RedisUrl::parse("unix://:secret@/run/redis.sock?db=2").name() == "unix:///run/redis.sock?db=2");
#if WSCHAT_OPENSSL
    CHECK(RedisUrl::parse("rediss://h").tls);
#else
    CHECK_THROWS_WITH_AS(RedisUrl::parse("rediss://h"),
                         "Redis \"rediss://h\": rediss:// needs a program that was built with WSCHAT_OPENSSL", Error);
#endif
    const auto error = [](const char* url) {
        try {
            RedisUrl::parse(url);
        } catch (const Error& caught) {
            return std::string(caught.what());
        }
        return std::string("no error");
    };
    CHECK(error("http://h") == "Redis \"http://h\": the URL begins with redis://, rediss:// or unix://");
    CHECK(error("redis:h") == "Redis \"redis:h\": the two slashes after the scheme are missing");
    CHECK(error("redis://") == "Redis \"redis://\": the host is missing");
    CHECK(error("redis://h:0x") == "Redis \"redis://h:0x\": the port is not a number up to 65535");
    CHECK(error("redis://h/x") == "Redis \"redis://h/x\": the database is not a number up to 1000000");
    CHECK(error("unix://run") == "Redis \"unix://run\": the absolute path of the socket is missing");
    CHECK(error("unix:///run?x=1") == "Redis \"unix:///run?x=1\": the only parameter is \"db\"");
    CHECK_FALSE(contains(error("redis://user:secret@h:x"), "secret"));
    CHECK_FALSE(contains(error("redis://secret@h"), "secret"));
    CHECK(contains(error("redis://user@h"), "a user or a password is incomplete"));
}

TEST_CASE("a Redis that cannot be used at the start is an Error after a limited time") {
    CHECK(contains(error_of("redis://127.0.0.1:1"), "RedisHistory \"redis://127.0.0.1:1/0\": Connection refused"));
    CHECK(contains(error_of("unix:///tmp/wschat-no-such-socket"), "No such file or directory"));
    RedisServer redis({"--requirepass", "secret"});
    CHECK(contains(error_of(redis.url()), "NOAUTH"));
    CHECK(contains(error_of(redis.url(":wrong@")), "WRONGPASS"));
    CHECK(contains(error_of(redis.url(":secret@") + "/99"), "DB index is out of range"));
    CHECK(error_of(redis.url(":secret@")) == "no error");
    CHECK(error_of(redis.url("default:secret@") + "/1") == "no error");
    CHECK(error_of("unix://:secret@" + redis.socket()) == "no error");
    redis.signal(SIGSTOP);
    CHECK(contains(error_of(redis.url(":secret@")), "Redis has not answered in time"));
}

TEST_CASE("a program that is not Redis, or is an old version, is refused with a sentence") {
    const std::string info = "redis_version:5.0.7\r\nrun_id:0123456789abcdef0123456789abcdef01234567\r\n";
    const FakeRedis old("$" + std::to_string(info.size()) + "\r\n" + info + "\r\n");
    CHECK(contains(error_of(old.url()), "Redis 5.0.7 is too old: version 6 or newer is needed"));
    const FakeRedis web("HTTP/1.1 400 Bad Request\r\n\r\n");
    CHECK(contains(error_of(web.url()), "its answer is not in the protocol of Redis: Protocol error, got \"H\""));
    const FakeRedis large("*10000001\r\n"), deep(test::repeated(1000, "*1\r\n") + ":1\r\n");
    CHECK(contains(error_of(large.url()), "its answer is not in the protocol of Redis: an array is too large"));
    CHECK(contains(error_of(deep.url()), "its answer is not in the protocol of Redis: "));
    const FakeRedis other("+hello\r\n");
    CHECK(contains(error_of(other.url()), "its answer to INFO is not that of Redis"));
    const FakeRedis denied("-ERR nobody may do that\r\n");
    CHECK(contains(error_of(denied.url()), "ERR nobody may do that"));
    CHECK(contains(error_of("redis://no-such-host.invalid"), "the host \"no-such-host.invalid\": "));
    CHECK(contains(error_of("unix:///" + std::string(200, 'x')), "the path of the socket is too long"));
    CHECK(contains(error_of(std::vector<std::string>{}), "Redis: the list of URLs is empty"));
    CHECK(contains(error_of({"redis://h/0", "redis://:secret@h"}), "\"redis://h:6379/0\": the URL is given twice"));
}

#if WSCHAT_OPENSSL

TEST_CASE("rediss:// uses TLS and verifies the server") {
    const test::CertificateFiles files("redis"), others("redis-other", {"elsewhere.example"});
    const int port = RedisServer::free_port();
    const auto start = [&](const std::string& clients) {
        return std::make_unique<RedisServer>(std::vector<std::string>{
            "--tls-port", std::to_string(port), "--tls-cert-file", files.certificate, "--tls-key-file", files.key,
            "--tls-ca-cert-file", files.certificate, "--tls-auth-clients", clients});
    };
    auto redis = start("no");
    const std::string url = "rediss://localhost:" + std::to_string(port);
    RedisOptions options = quick();
    CHECK(contains(error_of(url, options), "certificate"));
    options.tls.authorities = others.certificate;
    CHECK(contains(error_of(url, options), "certificate"));
    options.tls.authorities = "/no/such/file";
    CHECK(contains(error_of(url, options), "/no/such/file"));
    options.tls.authorities = files.certificate;
    options.tls.pinned_keys = {"AAAA"};
    CHECK(contains(error_of(url, options), "the public key of Redis is not one of ClientTls::pinned_keys"));
    options.tls.pinned_keys.clear();
    CHECK(contains(error_of("rediss://127.0.0.2:" + std::to_string(port), options), "127.0.0.2"));
    CHECK(error_of("redis://localhost:" + std::to_string(port)) != "no error");
    CHECK(error_of("rediss://localhost:" + redis->url().substr(redis->url().rfind(':') + 1), options) != "no error");
    {
        RedisOptions patient = options;
        patient.answer_timeout = 30s;
        Node one(url, patient), two(url + "/0", patient);
        for (Node* each : {&one, &two}) each->watch();
        const std::string large(300'000, 'x');
        one.say(large);
        for (Node* each : {&one, &two}) each->wait_for("1:" + large);
        for (int i = 2; i <= 300; ++i) two.say("m" + std::to_string(i));
        for (Node* each : {&one, &two}) each->wait_for("300:m300");
        redis->kill();
        one.wait([&] { return contains(one.logged, "redis_lost"); });
        redis->start();
        one.say("again");
        two.wait_for("301:again");
    }
    redis.reset();
    redis = start("yes");
    CHECK(error_of(url, options) != "no error");
    options.tls.certificate = files.certificate;
    options.tls.key = files.key;
    CHECK(error_of(url, options) == "no error");
}

#endif

TEST_CASE("a history on several endpoints passes the tests of every store") {
    const RedisServer first, second;
    int stores = 0;
    const test::StoreFactory make = [&](const HistoryLimits& limits) {
        return std::make_unique<RedisHistory>(detail::RedisUrls{first.url(), second.url()},
                                              options_with("test" + std::to_string(++stores) + ":"), limits);
    };
    SUBCASE("pages") { test::test_pages(make); }
    SUBCASE("amendments") { test::test_amendments(make); }
    SUBCASE("reactions") { test::test_reactions(make); }
    SUBCASE("search") { test::test_search(make); }
    SUBCASE("facts") { test::test_facts(make); }
    SUBCASE("erasure") { test::test_erasure(make); }
    SUBCASE("export") { test::test_export(make); }
}

TEST_CASE("while one of several endpoints is not reachable, the rooms of the others work") {
    RedisServer first, second;
    const std::vector<std::string> urls{first.url(), second.url()}, same{second.url() + "/0", first.url() + "/0"};
    Node one(urls, quick()), two(same, quick());
    std::vector<std::string> rooms;
    for (int i = 0; i < 40; ++i) rooms.push_back("room" + std::to_string(i));
    for (Node* each : {&one, &two})
        for (const std::string& room : rooms) each->watch(room);
    for (const std::string& room : rooms) one.say("in " + room, "", room);
    for (Node* each : {&one, &two})
        for (const std::string& room : rooms) each->wait_for("1:in " + room);
    std::string on_first, on_second;
    std::size_t count = 0;
    for (const std::string& room : rooms) {
        const bool is_first = contains(first.cli("exists wschat:s:" + room), "1");
        CHECK(is_first != contains(second.cli("exists wschat:s:" + room), "1"));
        (is_first ? on_first : on_second) = room;
        count += is_first;
    }
    CHECK(count > 5);
    CHECK(count < 35);
    // What belongs to no room is on the first endpoint of a list; the rest of a user is where the user is.
    one.store().put({"ban", "name bert", "x", "", 0});
    one.wait_for("name bert=x");
    CHECK(contains(first.cli("exists wschat:f:ban"), "1"));
    for (int i = 0; i < 40; ++i) one.store().put({"read", "user" + std::to_string(i) + "\ntea", "7", "", 0});
    one.wait_for("user39\ntea=7");
    CHECK(contains(first.cli("exists wschat:f:read"), "1"));
    CHECK(contains(second.cli("exists wschat:f:read"), "1"));
    std::optional<std::size_t> found;
    one.store().facts("read", "", [&](const std::vector<ChatFact>& facts, const std::string& error) {
        CHECK(error == "");
        found = facts.size();
        CHECK(std::is_sorted(facts.begin(), facts.end(),
                             [](const ChatFact& a, const ChatFact& b) { return a.key < b.key; }));
    });
    one.wait([&] { return found.has_value(); });
    CHECK(*found == 40);
    std::string listed;
    for (const std::string& room : {on_first, on_second}) {
        ChatEntry join = presence(ChatEntry::Kind::join, "u1", "Anna", "h1");
        join.room = room;
        one.store().forward(join);
        one.wait_for("join:u1=Anna@h1 ");
        one.heard.clear();
    }
    one.store().rooms(10, [&](const std::vector<std::pair<std::string, std::size_t>>& all, const std::string&) {
        for (const auto& [room, users] : all) listed += room + "=" + std::to_string(users) + " ";
    });
    one.wait([&] { return !listed.empty(); });
    CHECK(contains(listed, on_first + "=1 "));
    CHECK(contains(listed, on_second + "=1 "));

    second.kill();
    one.wait([&] { return contains(one.logged, "redis_lost"); });
    one.say("it goes on", "", on_first);
    two.wait_for("2:it goes on");
    one.say("it fails", "", on_second);
    one.wait_for("failed:it fails");
    CHECK(figure(one.store().metrics(), "redis_up") == 1);
    second.start();
    one.wait([&] { return figure(one.store().metrics(), "redis_up") == 2; });
    one.say("it is back", "", on_second);
    two.wait_for("2:it is back");
}

TEST_CASE("a list of endpoints spreads the names evenly, and a new endpoint moves only its share") {
    const auto ring_of = [](int endpoints) {
        std::vector<std::string> urls;
        for (int i = 0; i < endpoints; ++i) urls.push_back("redis://host" + std::to_string(i));
        return detail::RedisRing(urls);
    };
    const detail::RedisRing four = ring_of(4), five = ring_of(5);
    std::array<int, 4> counts{};
    int moved = 0;
    for (int i = 0; i < 10'000; ++i) {
        const std::string room = "room" + std::to_string(i);
        ++counts[four.of(room)];
        if (four.of(room) == five.of(room)) continue;
        ++moved;
        CHECK(five.of(room) == 4);
    }
    for (const int each : counts) {
        CHECK(each > 1500);
        CHECK(each < 3500);
    }
    CHECK(moved > 1000);
    CHECK(moved < 3000);
}

TEST_CASE("two histories of one process on one Redis behave like histories of two processes") {
    const RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url(), quick());
    for (Node* each : {&one, &two}) each->watch();
    one.say("hello");
    for (Node* each : {&one, &two}) each->wait_for("1:hello");
    two.say("hello, you");
    for (Node* each : {&one, &two}) each->wait_for("2:hello, you");
}

TEST_CASE("a hub that watches all rooms gets the entries of each room") {
    const RedisServer redis;
    Node one(redis.url(), options_with("x[*]:")), two(redis.url(), options_with("x[*]:"));
    one.all = true;
    one.wait([&] { return contains(redis.cli("pubsub numpat"), "1"); });
    one.watch("milk");
    two.say("in tea", "", "tea");
    one.wait_for("1:in tea ");
    two.say("in milk", "", "milk");
    two.say("in tea again", "", "tea");
    one.wait_for("2:in tea again ");
    one.wait_for("1:in milk ");
    CHECK(one.heard.find("in milk") == one.heard.rfind("in milk"));
    two.wait_for("2:in tea again*");
    CHECK(two.heard == "1:in tea* 1:in milk* 2:in tea again* ");
    one.all = false;
    one.store().heartbeat("h1");
    one.wait([&] { return contains(redis.cli("pubsub numpat"), "0"); });
}

TEST_CASE("after a pause of Redis, no running hub loses its users") {
    const RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url(), quick());
    for (Node* each : {&one, &two}) each->watch();
    one.store().heartbeat("h1");
    two.store().heartbeat("h2");
    one.store().forward(presence(ChatEntry::Kind::join, "u1", "Anna", "h1"));
    two.wait_for("join:u1=Anna@h1 ");
    redis.cli("zadd wschat:hubs 1 h1 2 h2");  // no hub could send a heartbeat for long
    two.store().heartbeat("h2");
    two.wait([&] { return redis.cli("zscore wschat:hubs h1").size() > 5; });
    two.say("in order");
    two.wait_for("1:in order");
    CHECK_FALSE(contains(two.heard, "leave"));
}

TEST_CASE("the server has metrics of Redis, and a log entry for each state") {
    RedisServer redis;
    Node node(redis.url(), quick());
    node.watch();
    node.say("hello");
    node.wait_for("1:hello*");
    const MetricSource metrics = node.store().metrics();
    CHECK(figure(metrics, "redis_up") == 1);
    CHECK(figure(metrics, "redis_connects_total") == 1);
    CHECK(figure(metrics, "redis_published_total") == 1);
    CHECK(figure(metrics, "redis_received_total") >= 1);
    CHECK(figure(metrics, "redis_commands_total") > 3);
    node.wait([&] { return figure(metrics, "redis_outbox_bytes") == 0; });
    CHECK(contains(node.logged, "redis_connected redis="));
    CHECK(contains(node.logged, "version=7."));
    redis.cli("config set maxmemory 1");
    node.say("full");
    node.wait_for("failed:full");
    node.wait([&] { return contains(node.logged, "redis_refuses"); });
    CHECK(figure(metrics, "redis_not_kept_total") == 1);
    const int before = node.presences;
    node.store().forward(presence(ChatEntry::Kind::join, "u1", "Anna", "h1"));
    node.wait_for("failed: ");
    node.wait([&] { return node.presences > before; });  // the hub forwards it again after that
    redis.cli("config set maxmemory 0");
    node.say("there is memory");
    node.wait_for("2:there is memory*");
    node.wait([&] { return contains(node.logged, "redis_accepts"); });
    redis.kill();
    node.wait([&] { return contains(node.logged, "redis_lost"); });
    node.say("waiting");
    node.wait([&] { return figure(metrics, "redis_outbox_bytes") > 0; });
    CHECK(figure(metrics, "redis_up") == 0);
    node.wait([&] { return contains(node.logged, "redis_unreachable"); });
    CHECK(figure(metrics, "redis_failures_total") >= 2);

    Server server;
    ChatHub::of(server).set_store(std::make_unique<RedisHistory>(RedisServer().url(), quick()));
    const std::string text = prometheus_text(server.metrics());
    CHECK(contains(text,
                   "# HELP wschat_redis_up 1 while Redis is connected.\n# TYPE wschat_redis_up gauge\n"
                   "wschat_redis_up{redis=\"redis://127.0.0.1:"));
    CHECK(contains(text, "/0\",prefix=\"wschat:\"} "));
    CHECK(contains(text, "# TYPE wschat_redis_commands_total counter\n"));
}

TEST_CASE("while the store of several servers cannot be read, a handshake gets a 503, and no user gets another id") {
    RedisServer redis;
    struct Machine : test::RunningServer {
        explicit Machine(const std::string& url) {
            RedisOptions options = quick();
            options.answer_timeout = 300ms;
            options.require_at_start = false;
            ChatHub::of(server).set_store(RedisHistory(url, options));
            server.route<ChatHandler>("/chat/{room}");
            start();
        }
        ~Machine() { stop(); }
        std::string id_of_anna() const {
            test::WsClient anna(port(), "/chat/tea?name=Anna&key=0123456789abcdef");
            return test::field_of(test::next_with(anna, "hello"), "user");
        }
        // The status of a handshake.
        int status() const {
            return test::fetch(port(), "/chat/tea?name=Anna",
                               "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                               "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n")
                .status;
        }
    };
    const auto wait = [](const std::function<bool()>& done) {
        const auto until = Clock::now() + test::deadline;
        while (!done() && Clock::now() < until) std::this_thread::sleep_for(10ms);
    };
    Machine one(redis.url());
    wait([&] { return one.status() == 101; });
    const std::string id = one.id_of_anna();
    CHECK(id != "");
    redis.kill();
    Machine two(redis.url());
    CHECK(two.status() == 503);
    redis.start();
    wait([&] { return two.status() == 101; });
    CHECK(two.id_of_anna() == id);

    // A server that lives gives the secret to an empty Redis, and a server that starts finds it there.
    redis.cli("flushall");
    wait([&] { return contains(redis.cli("exists wschat:f:server"), "1"); });
    Machine three(redis.url());
    wait([&] { return three.status() == 101; });
    CHECK(three.id_of_anna() == id);
}

TEST_CASE("keys of another program do not change") {
    const RedisServer redis;
    redis.cli("set a:meta x");
    redis.cli("hset b:meta x y");
    redis.cli("hset c:meta format 2 epoch y");
    redis.cli("set d:r:tea x");
    CHECK(contains(error_of(redis.url(), options_with("a:")), "belongs to another program: it is a string"));
    CHECK(contains(error_of(redis.url(), options_with("b:")), "belongs to another program: it has no format"));
    CHECK(contains(error_of(redis.url(), options_with("c:")), "have format 2, and this program knows 1"));
    Node node(redis.url(), options_with("d:"));
    node.say("hello");
    node.wait_for("failed:hello");
    CHECK(contains(node.logged, "WRONGTYPE"));
    CHECK(contains(node.read().error, "WRONGTYPE"));
    node.watch("milk");
    CHECK(contains(redis.cli("publish d:c:milk nonsense"), "1"));
    CHECK(contains(redis.cli("publish d:c:milk 1:nonsense"), "1"));
    CHECK(contains(redis.cli("publish d:feed 1:nonsense"), "1"));
    node.wait([&] { return contains(node.logged, "redis_foreign_data"); });
    node.say("still here", "", "milk");
    node.wait_for("1:still here*");
}

TEST_CASE("clusters with other prefixes or other databases of one Redis have nothing in common") {
    using Kind = ChatEntry::Kind;
    const RedisServer redis;
    redis.cli("set other:key value");
    struct Cluster {
        Cluster(const std::string& url, const std::string& prefix)
            : node(url, options_with(prefix)),
              bus(RedisCluster(url, options_with(prefix)).open(loop.mailbox(), deliver(), {})) {}
        RoomBus::Deliver deliver() {
            return [this](const std::string& room, Opcode, std::string_view payload) {
                delivered += room + ":" + std::string(payload) + " ";
            };
        }
        Node node;
        Loop loop;
        std::string delivered;
        std::unique_ptr<RoomBus> bus;
    };
    // Two servers of each.
    std::vector<std::unique_ptr<Cluster>> all;
    for (const auto& [path, prefix] : {std::pair{"/0", "a:"}, {"/0", "b:"}, {"/1", "a:"}})
        for (int i = 0; i < 2; ++i) all.push_back(std::make_unique<Cluster>(redis.url() + path, prefix));
    for (const auto& each : all) {
        each->node.all = true;
        each->node.watch();
        each->node.wait([&] { return each->node.presences != 0; });
        each->bus->subscribe("tea");
    }
    for (std::size_t i = 0; i < all.size(); i += 2) {
        Cluster &one = *all[i], &two = *all[i + 1];
        const std::string name = "cluster" + std::to_string(i);
        one.node.say(name);
        one.node.store().put({"ban", name, "1"});
        one.node.store().forward(presence(Kind::join, "u1", name, "h1"));
        one.bus->publish("tea", Opcode::text, name);
        for (const char* what : {"1:", "join:u1="}) two.node.wait_for(what + name);
        two.node.wait_for(name + "=1");
        const auto until = Clock::now() + test::deadline;
        while (two.delivered.empty() && Clock::now() < until) two.loop.poll(10ms);
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
        Cluster& each = *all[i];
        const std::string name = "cluster" + std::to_string(i / 2 * 2);
        for (int turn = 0; turn < 20; ++turn) {
            each.node.poll();
            each.loop.poll(1ms);
        }
        for (std::size_t other = 0; other < all.size(); other += 2) {
            const std::string others = "cluster" + std::to_string(other);
            if (others != name) CHECK_FALSE(contains(each.node.heard + each.delivered, others));
        }
        CHECK(each.delivered == (i % 2 == 0 ? "" : "tea:" + name + " "));
        CHECK_FALSE(contains(each.node.logged, "foreign"));
        CHECK(each.node.read().last_id == 1);
    }
    CHECK(contains(redis.cli("get other:key"), "value"));
    for (const char* keys : {"keys '*'", "-n 1 keys '*'"}) {
        std::istringstream lines(redis.cli(keys));
        for (std::string key; std::getline(lines, key);)
            CHECK((key == "other:key" || key.substr(0, 2) == "a:" || key.substr(0, 2) == "b:"));
    }
}

TEST_CASE("all servers get the messages of a room in one order, each once") {
    const RedisServer redis;
    Node one(redis.url(), options_with("x:")), two(redis.url() + "/0", options_with("x:"));
    Node other(redis.url(), options_with("y:"));
    for (Node* each : {&one, &two, &other}) each->watch();
    for (int i = 0; i < 50; ++i) {
        one.say("a" + std::to_string(i));
        two.say("b" + std::to_string(i));
    }
    other.say("mine");
    for (Node* each : {&one, &two}) each->wait_for("100:");
    other.wait_for("1:mine*");
    std::string expected;
    for (const ChatEntry& each : one.read().entries) expected += std::to_string(each.id) + ":" + each.text + " ";
    for (Node* each : {&one, &two}) {
        std::string plain = each->heard;
        plain.erase(std::remove(plain.begin(), plain.end(), '*'), plain.end());
        CHECK(plain == expected);
    }
    CHECK(other.heard == "1:mine* ");
    one.store().put({"ban", "name bert", "x", "", 0});
    two.wait_for("name bert=x");
    one.say("again", "t1");
    one.wait_for("101:again*");
    one.say("again", "t1");
    one.wait_for("duplicate:101");
    two.say("conversation", "", "\nanna\nbert");
    one.wait_for("1:conversation ");
}

TEST_CASE("a server that loses its connections reads what it missed: no message is lost or comes twice") {
    const RedisServer redis;
    Node one(redis.url(), options_with("x:")), two(redis.url() + "/0", options_with("x:"));
    for (Node* each : {&one, &two}) each->watch();
    std::string expected;
    for (int i = 1; i <= 60; ++i) {
        two.say("m" + std::to_string(i));
        expected += std::to_string(i) + ":m" + std::to_string(i) + " ";
        if (i % 10 == 5) redis.cli("client kill type pubsub");
        if (i % 10 == 0) redis.cli("client kill type normal");
    }
    one.wait_for("60:m60 ");
    two.wait_for("60:m60");
    CHECK(one.heard == expected);
    two.heard.erase(std::remove(two.heard.begin(), two.heard.end(), '*'), two.heard.end());
    CHECK(two.heard == expected);
    CHECK(contains(one.logged, "redis_lost"));
}

TEST_CASE("a message that waits for Redis is kept when Redis is back with its old data") {
    RedisServer redis;
    RedisOptions options = quick();
    options.answer_timeout = 30s;
    Node one(redis.url(), options), two(redis.url() + "/0", options);
    for (Node* each : {&one, &two}) each->watch();
    one.say("before");
    for (Node* each : {&one, &two}) each->wait_for("1:before");
    const std::string epoch = one.read().epoch;
    redis.kill();
    one.wait([&] { return contains(one.logged, "redis_lost"); });
    one.say("while it is away", "t1");
    redis.start();
    for (Node* each : {&one, &two}) each->wait_for("2:while it is away");
    CHECK(one.heard == "1:before* position:1 2:while it is away* ");
    CHECK(two.heard == "1:before position:1 2:while it is away ");
    CHECK(one.read().epoch != epoch);
    CHECK_FALSE(one.read("tea", HistoryPosition{epoch, 1}).gap);
    CHECK(one.read("tea", HistoryPosition{epoch, 2}).gap);
}

TEST_CASE("after a failed read a room gets its position when Redis answers again, also if it had none before") {
    RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url(), quick());
    one.watch();
    one.say("before");
    one.wait_for("1:before");
    redis.kill();
    two.wait([&] { return contains(two.logged, "redis_lost"); });
    two.watch();
    CHECK_FALSE(two.read().error.empty());
    redis.start();
    for (Node* each : {&one, &two}) each->wait_for("position:1 ");
    one.say("after");
    two.wait_for("2:after");
    CHECK(two.heard == "position:1 2:after ");
}

TEST_CASE("an empty Redis is a gap for all, and new entries follow") {
    RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url() + "/0", quick());
    for (Node* each : {&one, &two}) each->watch();
    for (int i = 0; i < 3; ++i) one.say("x");
    for (Node* each : {&one, &two}) each->wait_for("3:x");
    const HistoryPage page = one.read();
    SUBCASE("after a restart") {
        redis.kill();
        redis.erase();
        redis.start();
    }
    SUBCASE("after FLUSHALL") { redis.cli("flushall"); }
    for (Node* each : {&one, &two}) each->wait_for("gap:0");
    two.say("new");
    for (Node* each : {&one, &two}) each->wait_for("1:new");
    CHECK(one.read("tea", HistoryPosition{page.epoch, 3}).gap);
    CHECK(one.read("tea", HistoryPosition{page.epoch, 1}).gap);
    CHECK_FALSE(one.read("tea", HistoryPosition{one.read().epoch, 1}).gap);
}

TEST_CASE("a Redis that lost its last entries is a gap for all hubs that do not have them") {
    RedisServer redis({"--appendonly", "no"});
    Node one(redis.url(), quick()), two(redis.url() + "/0", quick());
    for (Node* each : {&one, &two}) each->watch();
    one.say("kept");
    for (Node* each : {&one, &two}) each->wait_for("1:kept");
    const HistoryPosition kept{one.read().epoch, 1};
    CHECK(contains(redis.cli("save"), "OK"));
    one.say("lost");
    for (Node* each : {&one, &two}) each->wait_for("2:lost");
    redis.kill();
    redis.start();
    // Both have all that was said. Their position is known, and its number is not given again.
    for (Node* each : {&one, &two}) each->wait_for("position:2");
    one.say("new");
    for (Node* each : {&one, &two}) each->wait_for("3:new");
    CHECK(two.heard == "1:kept 2:lost position:2 3:new ");
    const HistoryPage resumed = two.read("tea", kept);
    CHECK(resumed.gap);
    CHECK(test::summary(resumed) == "1:kept 3:new gap");
}

TEST_CASE("while Redis is stopped, a message fails within a limited time and is not kept later") {
    const RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url() + "/0", quick());
    for (Node* each : {&one, &two}) each->watch();
    redis.signal(SIGSTOP);
    one.say("too late", "t1");
    one.wait_for("failed:too late");
    redis.signal(SIGCONT);
    one.say("in time", "t2");
    two.wait_for("1:in time");
    one.say("too late", "t1");
    for (Node* each : {&one, &two}) each->wait_for("2:too late");
    CHECK(two.heard == "1:in time 2:too late ");
    CHECK(one.heard == "failed:too late 1:in time* 2:too late* ");
}

TEST_CASE("a full queue for Redis refuses messages, and a server may start without Redis") {
    RedisOptions options = quick();
    options.require_at_start = false;
    options.max_queued = 2;
    options.answer_timeout = 300ms;
    Node node("redis://127.0.0.1:1", options);
    for (const char* text : {"a", "b", "c"}) node.say(text);
    node.wait_for("failed:c");
    CHECK(contains(node.logged, "too many messages wait for Redis"));
    for (const char* each : {"failed:a", "failed:b"}) node.wait_for(each);
    CHECK(contains(node.logged, "Redis does not answer"));
    CHECK(contains(node.logged, "redis_unreachable redis=redis://127.0.0.1:1/0 cause=Connection refused"));
    CHECK(node.read().error == "Redis does not answer");
}

TEST_CASE("Redis decides who is present by the rules of PresenceTable") {
    using Kind = ChatEntry::Kind;
    const RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url() + "/0", quick());
    for (Node* each : {&one, &two}) {
        each->watch();
        each->wait([&] { return each->presences == 1; });
        CHECK(each->users["tea"] == "");
    }
    PresenceTable table;
    std::set<std::string> refusals;
    std::mt19937 random(42);
    const auto any = [&](unsigned count) { return std::to_string(random() % count + 1); };
    for (int i = 0; i < 300; ++i) {
        const Kind kind = std::array{Kind::join, Kind::join, Kind::away, Kind::leave, Kind::rename}[random() % 5];
        const std::string user = any(6), author = user > "4" ? "" : user > "2" ? "account " + user : "key " + user;
        ChatEntry entry = presence(kind, user, "Name" + any(4), "h" + any(3),
                                   kind == Kind::rename ? "NAME" + any(5) : "about", author);
        entry.max_users = random() % 5;
        for (Node* each : {&one, &two}) each->heard.clear();
        one.store().forward(entry);
        const std::string code(table.apply(entry));
        refusals.insert(code);
        one.wait_for(code.empty() ? summary_of(entry) : code + " ");
        if (!code.empty()) continue;
        two.wait_for(summary_of(entry));
        CHECK(two.latest.text == entry.text);
    }
    CHECK(refusals == std::set<std::string>{"", "gone", "name_taken", "room_full"});
    const std::string expected = presence_summary(table.users("tea"));
    CHECK(expected != "");
    const int before = two.presences;
    two.store().watch("tea");
    two.wait([&] { return two.presences > before; });
    CHECK(two.users["tea"] == expected);
    std::optional<std::size_t> present;
    two.store().rooms(10, [&](const std::vector<std::pair<std::string, std::size_t>>& rooms, const std::string&) {
        present = rooms.size() == 1 && rooms[0].first == "tea" ? rooms[0].second : 0;
    });
    two.wait([&] { return present.has_value(); });
    CHECK(*present == table.rooms(10)[0].second);
}

TEST_CASE("a hub without beats loses its users, and is told if it still runs") {
    using Kind = ChatEntry::Kind;
    const RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url() + "/0", quick());
    for (Node* each : {&one, &two}) each->watch();
    one.store().heartbeat("h1");
    two.store().heartbeat("h2");
    one.store().forward(presence(Kind::join, "u1", "Anna", "h1"));
    one.store().forward(presence(Kind::join, "u2", "Bert", "h1", "", "key 2"));
    two.wait_for("join:u2=Bert@h1 ");
    two.store().forward(presence(Kind::join, "u2", "Bert", "h2", "", "key 2"));
    two.wait_for("join:u2=Bert@h2~");
    // A test that is stopped for seconds looks like a Redis that was away, so h2 beats more than once.
    two.wait([&] {
        redis.cli("zadd wschat:hubs xx 1 h1");
        two.store().heartbeat("h2");
        two.poll();
        return contains(two.heard, "leave:u1=Anna@h1 ") && contains(two.heard, "leave:u2=Bert@h1~ ");
    });
    const int before = one.presences;
    one.store().heartbeat("h1");
    one.wait([&] { return one.presences > before && one.users["tea"] == "join:u2=Bert@h2 "; });
    // After a restart without data, each hub hears that nobody is known.
    redis.cli("flushall");
    for (Node* each : {&one, &two}) each->wait([&] { return each->users["tea"] == ""; });
}

TEST_CASE("an entry that is not kept reaches all servers once, and fails while Redis is stopped") {
    RedisServer redis;
    Node one(redis.url(), quick()), two(redis.url() + "/0", quick());
    for (Node* each : {&one, &two}) each->watch();
    ChatEntry entry = StoreFixture::entry(ChatEntry::Kind::private_message, "psst");
    entry.to = "bert";
    one.store().forward(entry);
    for (Node* each : {&one, &two}) each->wait_for("0:psst ");
    entry.kind = ChatEntry::Kind::direct;
    entry.text = "for one";
    entry.room = "";
    entry.to_user = "u9";
    two.store().forward(entry);
    for (Node* each : {&one, &two}) each->wait_for("0:for one ");
    redis.kill();
    one.wait([&] { return contains(one.logged, "redis_lost"); });
    one.store().forward(entry);
    one.wait_for("failed:for one");
    CHECK(one.heard == "0:psst 0:for one failed:for one ");
}

TEST_CASE("broadcasts of plain rooms reach the rooms of other servers in order, and not their own room again") {
    RedisServer redis;
    struct Machine {
        explicit Machine(const std::string& url) {
            bus =
                RedisCluster(url, quick())
                    .open(
                        loop.mailbox(),
                        [this](const std::string& room, Opcode opcode, std::string_view payload) {
                            heard += room + (opcode == Opcode::text ? ":" : "#") + std::string(payload) + " ";
                        },
                        [this](LogLevel, std::string_view event, const auto&) { logged += std::string(event) + ";"; });
        }
        void wait_for(const std::string& what) {
            const auto until = Clock::now() + test::deadline;
            while (!contains(heard, what) && Clock::now() < until) loop.poll(10ms);
            CHECK_MESSAGE(contains(heard, what), heard);
        }
        void wait_for_log(const std::string& what) {
            const auto until = Clock::now() + test::deadline;
            while (!contains(logged, what) && Clock::now() < until) loop.poll(10ms);
            CHECK(contains(logged, what));
        }
        Loop loop;
        std::string heard, logged;
        std::unique_ptr<RoomBus> bus;
    };
    const auto subscribed = [&](const std::string& channel, const std::string& count) {
        const auto until = Clock::now() + test::deadline;
        while (!contains(redis.cli("pubsub numsub " + channel), "\n" + count) && Clock::now() < until) {
        }
        CHECK(contains(redis.cli("pubsub numsub " + channel), "\n" + count));
    };
    Machine one(redis.url()), two(redis.url() + "/0");
    for (Machine* each : {&one, &two}) each->bus->subscribe("tea");
    one.bus->subscribe("milk");
    subscribed("wschat:b:tea", "2");
    subscribed("wschat:b:milk", "1");
    std::string expected;
    for (int i = 0; i < 100; ++i) {
        one.bus->publish("tea", i % 2 == 0 ? Opcode::text : Opcode::binary, std::to_string(i));
        expected += (i % 2 == 0 ? "tea:" : "tea#") + std::to_string(i) + " ";
    }
    two.wait_for("tea#99 ");
    CHECK(two.heard == expected);
    two.bus->publish("milk", Opcode::text, "hot");
    one.wait_for("milk:hot ");
    CHECK(one.heard == "milk:hot ");
    one.bus->unsubscribe("milk");
    subscribed("wschat:b:milk", "0");
    redis.cli("publish wschat:b:tea nonsense");
    one.wait_for_log("redis_foreign_data");

    one.logged.clear();
    redis.kill();
    one.wait_for_log("redis_lost");
    one.bus->publish("tea", Opcode::text, "lost");
    redis.start();
    subscribed("wschat:b:tea", "2");
    one.wait_for_log("redis_connected;");
    one.bus->publish("tea", Opcode::text, "again");
    two.wait_for("tea:again ");
    CHECK_FALSE(contains(two.heard, "lost"));
    try {
        RedisCluster("redis://127.0.0.1:1", quick()).open(one.loop.mailbox(), {}, {});
        FAIL("it is connected");
    } catch (const Error& error) {
        CHECK(contains(error.what(), "RedisCluster \"redis://127.0.0.1:1/0\": Connection refused"));
    }
}

TEST_CASE("join_cluster() connects the rooms of two servers") {
    struct Lobby : WebSocketHandler {
        void open() override { room("lobby").join(*this); }
        void on_message(const Message& message) override { room("lobby").broadcast(message); }
    };
    const RedisServer redis;
    struct Machine : test::RunningServer {
        explicit Machine(const std::string& url) {
            server.join_cluster(RedisCluster(url, quick()));
            server.route<Lobby>("/chat");
            start();
        }
        ~Machine() { stop(); }
    };
    Machine one(redis.url()), two(redis.url() + "/0");
    test::WsClient anna(one.port(), "/chat"), bert(two.port(), "/chat");
    const auto until = Clock::now() + test::deadline;
    while (!contains(redis.cli("pubsub numsub wschat:b:lobby"), "\n2") && Clock::now() < until) {
    }
    anna.send("hello");
    CHECK(anna.next() == "hello");
    CHECK(bert.next() == "hello");
    bert.send("hello, Anna");
    CHECK(bert.next() == "hello, Anna");
    CHECK(anna.next() == "hello, Anna");
    Server again;
    again.join_cluster(RedisCluster(redis.url(), quick()));
    CHECK_THROWS_WITH_AS(again.join_cluster(RedisCluster(redis.url())),
                         "join_cluster: the server is in a cluster already", Error);
}

TEST_CASE("a Redis without memory refuses messages, and accepts them again later") {
    const RedisServer redis;
    Node node(redis.url(), quick());
    node.watch();
    redis.cli("config set maxmemory 1");
    node.say("full");
    node.wait_for("failed:full");
    CHECK(contains(node.logged, "OOM"));
    redis.cli("config set maxmemory 0");
    node.say("there is memory");
    node.wait_for("1:there is memory*");
}

TEST_SUITE_END();

#endif  // WSCHAT_HIREDIS
