// Fairness, measured in work and not in time. A whole server runs on the simulated kernel of the fuzzers, beside k
// greedy peers of one kind. The clock counts work: bytes, messages, deliveries, records, handshakes. Between two visits
// of one honest session it may advance by the budget of a visit for each greedy peer, and by the budget of a turn.
//
// A separate program (wschat_fairness), because it replaces the system calls.
#undef WSCHAT_LIBURING
#define WSCHAT_LIBURING 0            // a ring does not use the simulated kernel
#define OPENSSL_SUPPRESS_DEPRECATED  // RAND_set_rand_method()
#include "../fuzz/kernel.hpp"
#include "attack.hpp"
#if WSCHAT_OPENSSL
#include "../fuzz/tls_client.hpp"

#include <dlfcn.h>
#endif

#include <doctest/doctest.h>

namespace {

using attack::frame;
using attack::repeated;
using namespace fuzz;
using namespace std::chrono_literals;

constexpr std::size_t kib = 1024, mib = 1024 * kib;

// ---- the clock of work ---------------------------------------------------------------------------------------------

enum class Unit {
    messages,    // also pings
    fragments,   // of messages
    deliveries,  // of broadcasts
    inflated,    // bytes
    received,    // bytes
    sent,        // bytes
    file,        // bytes
    accepted,    // connections
    requests,
    opened,      // WebSockets
    records,     // of TLS
    handshakes,  // of TLS
    count
};

// What the server has done. The kernel counts bytes and connections itself.
std::array<std::size_t, static_cast<std::size_t>(Unit::count)> done;
std::size_t& count_of(Unit unit) { return done[static_cast<std::size_t>(unit)]; }

std::size_t work(Unit unit) {
    switch (unit) {
        case Unit::received: return kernel->bytes_in;
        case Unit::sent: return kernel->bytes_out;
        case Unit::file: return kernel->file_bytes;
        case Unit::accepted: return kernel->accepted;
        default: return count_of(unit);
    }
}

// The most work between two visits of the honest session.
struct Meter {
    Unit unit;
    bool running = false;
    std::size_t before = 0, most = 0, visits = 0;

    void begin() {
        running = true;
        before = work(unit);
    }
    void visit() {
        if (!running) return;
        const std::size_t now = work(unit);
        most = (std::max)(most, now - std::exchange(before, now));
        ++visits;
    }
};

#if WSCHAT_OPENSSL

}  // namespace

// The calls of OpenSSL that stand for a record and for a handshake. Those of the clients, which run within a call of the
// kernel, do not count.
extern "C" int BIO_read(BIO* bio, void* data, int size) {
    static const auto real = reinterpret_cast<int (*)(BIO*, void*, int)>(::dlsym(RTLD_NEXT, "BIO_read"));
    if (kernel != nullptr && !kernel->in_call) ++count_of(Unit::records);
    return real(bio, data, size);
}
extern "C" int EVP_DigestSign(EVP_MD_CTX* context, unsigned char* signature, std::size_t* size,
                              const unsigned char* data, std::size_t data_size) {
    using Sign = int (*)(EVP_MD_CTX*, unsigned char*, std::size_t*, const unsigned char*, std::size_t);
    static const auto real = reinterpret_cast<Sign>(::dlsym(RTLD_NEXT, "EVP_DigestSign"));
    if (kernel != nullptr && !kernel->in_call && signature != nullptr) ++count_of(Unit::handshakes);
    return real(context, signature, size, data, data_size);
}

namespace {

#endif

// ---- the server ----------------------------------------------------------------------------------------------------

struct Honest : wschat::WebSocketHandler {
    explicit Honest(Meter& its_meter) : meter(its_meter) {}
    void on_message(const Message& m) override {
        meter.visit();
        write_message(m);
    }
    Meter& meter;
};

// A message names the number of its fragments, and counts its bytes.
struct Sink : wschat::WebSocketHandler {
    void open() override { ++count_of(Unit::opened); }
    void on_message(const Message& m) override {
        ++count_of(Unit::messages);
        count_of(Unit::inflated) += m.size();
        count_of(Unit::fragments) += 1000;
    }
    void on_ping(std::string_view) override { ++count_of(Unit::messages); }
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        return wschat::CompressionOptions();
    }
};
struct Answerer : wschat::WebSocketHandler {
    void on_message(const Message&) override {
        ++count_of(Unit::messages);
        write_message(std::string(100 * 1024, 'x'));
    }
};
struct Member : wschat::WebSocketHandler {
    void open() override { room("all").join(*this); }
    void on_message(const Message& m) override {
        count_of(Unit::deliveries) += room("all").size();
        room("all").broadcast_volatile(m.data());
    }
};

wschat::ServerOptions options() {
    wschat::ServerOptions options;
    options.handle_signals = false;
    options.server_limits.max_connections = 10'000;
    Limits& limits = options.limits;
    limits.ping_interval = limits.handshake_timeout = limits.keep_alive_timeout = Duration::zero();
    limits.control_frames_per_second = 0;
    return options;
}

void set_up(Server& server, Meter& meter, bool tls) {
    server.route<Honest>("/honest", std::ref(meter));
    server.route<Sink>("/sink");
    server.route<Answerer>("/answers");
    server.route<Member>("/room");
    server.static_dir("/files", "/sim");
    server.get("/page", [](const Request&) {
        ++count_of(Unit::requests);
        return Response(200, "page");
    });
#if WSCHAT_OPENSSL
    if (tls) return server.listen_tls(0, {start_tls(), start_tls()});
#endif
    check(!tls, "the server has no TLS");
    server.listen(0);
}

// ---- peers ---------------------------------------------------------------------------------------------------------

class Client {
public:
    explicit Client(bool over_tls) {
        peer->address = "127.0.0.1";
        kernel->backlog.push_back(peer);
#if WSCHAT_OPENSSL
        if (over_tls) tls = std::make_unique<TlsClient>(*peer, false);
#endif
        check(!over_tls || tls != nullptr, "a client has no TLS");
    }
    void send(std::string_view bytes) {
#if WSCHAT_OPENSSL
        if (tls) return tls->send(bytes);
#endif
        peer->sent += bytes;
    }
    void upgrade(std::string_view target, std::string_view headers) {
        std::string request = wschat::detail::handshake_request("x", target, "dGhlIHNhbXBsZSBub25jZQ==");
        request.insert(request.size() - 2, headers);
        send(request);
    }
    // True if anything has changed.
    bool run() {
#if WSCHAT_OPENSSL
        if (tls) return tls->run();
#endif
        return false;
    }
    std::string take_received() {
#if WSCHAT_OPENSSL
        if (tls) return std::exchange(tls->received, std::string());
#endif
        return std::exchange(peer->received, std::string());
    }

    std::shared_ptr<Peer> peer = std::make_shared<Peer>();
#if WSCHAT_OPENSSL
    std::unique_ptr<TlsClient> tls;
#else
    std::nullptr_t tls = nullptr;
#endif
};

// What a greedy peer does at once.
struct Kind {
    const char* name;
    bool tls;
    const char* target;   // of its WebSocket; null: it has none
    const char* headers;  // of the request
    Unit unit;
    std::size_t each_visit;      // the budget of one visit; 0: only the turn has a budget
    std::size_t visits_of_turn;  // beside one visit of each greedy peer; the budget of the turn if each_visit is 0
    void (*flood)(Client&);
    std::size_t connects = 0;  // so many connections instead, which come all at once
};

constexpr std::size_t flood_size = 160 * kib;

#if WSCHAT_ZLIB
std::string bombs() {
    wschat::detail::Deflater deflater(9, 9, 15);
    wschat::detail::Bytes block;
    return repeated(frame("\xc2", deflater.deflate(std::string(32 * kib, '\0'), block, false)), 32 * kib);
}
#endif

const Kind plain_kinds[] = {
    {"small messages", false, "/sink", "", Unit::messages, 256, 17,
     [](Client& c) { c.send(repeated(frame("\x81", "x"), flood_size)); }},
    {"pings", false, "/sink", "", Unit::messages, 256, 17,
     [](Client& c) { c.send(repeated(frame("\x89", "x"), flood_size)); }},
    {"empty fragments", false, "/sink", "", Unit::fragments, 2048, 17,
     [](Client& c) {
         c.send(repeated(frame("\x01", "") + repeated(frame({"\0", 1}, ""), 6000) + frame("\x80", ""), flood_size));
     }},
    // The next message of the honest peer arrives some turns later: five budgets of a turn, and a message of each peer.
    {"small messages to a room", false, "/room", "", Unit::deliveries, 0, 5 * 16'384 + 100 * 60,
     [](Client& c) { c.send(repeated(frame("\x81", "x"), 8 * kib)); }},
    {"large messages to a room", false, "/room", "", Unit::deliveries, 0, 5 * 16'384 / 8 + 100 * 60,
     [](Client& c) { c.send(repeated(frame("\x81", std::string(8 * kib, 'x')), flood_size)); }},
    {"long answers", false, "/answers", "", Unit::messages, 1, 17,
     [](Client& c) { c.send(repeated(frame("\x81", "x"), 100)); }},
    {"large messages", false, "/sink", "", Unit::received, 64 * kib, 64,
     [](Client& c) { c.send(repeated(frame("\x82", std::string(60'000, 'x')), flood_size)); }},
    {"bytes of one large message", false, "/sink", "", Unit::received, 64 * kib, 64,
     [](Client& c) { c.send(std::string("\x82\xff\0\0\0\0\0\x04\0\0\0\0\0\0", 14) + std::string(flood_size, 'x')); }},
    {"files", false, nullptr, "", Unit::file, 128 * kib, 17,
     [](Client& c) { c.send("GET /files/page.html HTTP/1.1\r\nHost: x\r\n\r\n"); }},
    {"pipelined requests", false, nullptr, "", Unit::requests, 16, 17,
     [](Client& c) { c.send(repeated("GET /page HTTP/1.1\r\nHost: x\r\n\r\n", flood_size)); }},
    {"paths of slashes", false, nullptr, "", Unit::received, 64 * kib, 64,
     [](Client& c) {
         c.send(repeated("GET /" + std::string(8000, '/') + " HTTP/1.1\r\nHost: x\r\n\r\n", flood_size));
     }},
    {"connects", false, nullptr, "", Unit::accepted, 0, 64, [](Client&) {}, 20},
    {"upgrades", false, nullptr, "", Unit::opened, 0, 64, [](Client& c) { c.upgrade("/sink", ""); }, 20},
};

#if WSCHAT_ZLIB
const Kind compressed_kinds[] = {
    {"messages that inflate", false, "/sink", "Sec-WebSocket-Extensions: permessage-deflate\r\n", Unit::inflated,
     64 * kib, 17, [](Client& c) { c.send(bombs()); }},
};
#endif

#if WSCHAT_OPENSSL
// A record is read in two calls: its header and its body.
const Kind tls_kinds[] = {
    {"TLS: key updates", true, "/sink", "", Unit::records, 2 * 512, 17,
     [](Client& c) {
         for (int i = 0; i < 1000; ++i) c.tls->update_keys(true);
     }},
    {"TLS: tiny records", true, "/sink", "", Unit::records, 2 * 512, 17,
     [](Client& c) {
         c.tls->tiny = flood_size;
         c.send(repeated(frame("\x81", "x"), 7000));
     }},
    {"TLS: small messages", true, "/sink", "", Unit::messages, 256, 17,
     [](Client& c) { c.send(repeated(frame("\x81", "x"), 64 * kib)); }},
    {"TLS: large messages", true, "/sink", "", Unit::received, 80 * kib, 64,
     [](Client& c) { c.send(repeated(frame("\x82", std::string(60'000, 'x')), flood_size)); }},
    {"TLS: handshakes", true, nullptr, "", Unit::handshakes, 0, 64, [](Client&) {}, 4},
    {"TLS: connects", true, nullptr, "", Unit::accepted, 0, 64, [](Client&) {}, 4},
    {"TLS: files", true, nullptr, "", Unit::file, 128 * kib, 17,
     [](Client& c) { c.send("GET /files/page.html HTTP/1.1\r\nHost: x\r\n\r\n"); }},
};
#endif

struct Result {
    std::size_t most, all, visits;
};

// One run: the honest client and the greedy ones connect, the greedy ones flood, and the honest one sends the next
// message when it has the answer to the last one.
class Run {
public:
    Run(const Kind& kind, std::size_t greedy) : kind_(kind), greedy_(greedy), meter_{kind.unit} { done = {}; }
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;
    ~Run() { kernel = nullptr; }

    Result result() {
        kernel = &kernel_;
        kernel_.patience = 1'000'000;
        kernel_.file_size = 2 * mib;
        kernel_.script = [this] { return script(); };
        {
            Server server(options());
            server_ = &server;
            set_up(server, meter_, kind_.tls);
            add_client().upgrade("/honest", "");
            for (std::size_t i = 0; i < greedy_ && kind_.connects == 0; ++i) {
                Client& client = add_client();
                if (kind_.target != nullptr) client.upgrade(kind_.target, kind_.headers);
            }
            server.run();
        }
        return {meter_.most, work(kind_.unit), meter_.visits};
    }

private:
    Client& add_client() { return *clients_.emplace_back(std::make_unique<Client>(kind_.tls)); }

    // Returns false if nothing more happens.
    bool script() {
        bool changed = false;
        for (const auto& client : clients_) changed = client->run() || changed;
        for (std::size_t i = 1; i < clients_.size(); ++i) clients_[i]->take_received();
        const bool answered = !clients_[0]->take_received().empty();
        if (flooding_ && answered && !finished()) {
            clients_[0]->send(frame("\x81", "honest"));
            clients_[0]->run();
            changed = true;
        }
        // The server is idle if it waits and the script runs for the second time.
        const bool idle = std::exchange(last_wait_, kernel_.waits) == kernel_.waits;
        if (changed || !idle) return true;
        if (!std::exchange(flooding_, true)) {
            flood();
            return true;
        }
        if (std::exchange(ended_, true)) return false;
        server_->shutdown(1s);
        return true;
    }
    void flood() {
        for (std::size_t i = 0; i < greedy_ * kind_.connects; ++i) add_client();
        for (std::size_t i = 1; i < clients_.size(); ++i) {
            kind_.flood(*clients_[i]);
            clients_[i]->run();
        }
        clients_[0]->send(frame("\x81", "honest"));
        clients_[0]->run();
        meter_.begin();
    }
    // The greedy peers get no more work done. The honest one moves some bytes and records itself.
    bool finished() {
        const std::size_t own = kind_.unit == Unit::received ? 100 : kind_.unit == Unit::records ? 10 : 0;
        const std::size_t now = work(kind_.unit);
        if (now - std::exchange(last_work_, now) > own) turns_without_work_ = 0;
        return ++turns_without_work_ > 50;
    }

    const Kind& kind_;
    const std::size_t greedy_;
    Kernel kernel_;
    Meter meter_;
    Server* server_ = nullptr;
    std::vector<std::unique_ptr<Client>> clients_;  // the first one is honest
    bool flooding_ = false, ended_ = false;
    std::size_t last_wait_ = 0, last_work_ = 0, turns_without_work_ = 0;
};

void check_kind(const Kind& kind) {
    for (const std::size_t greedy : {10u, 60u}) {
        const std::string name = kind.name;
        CAPTURE(name);
        CAPTURE(greedy);
        const Result result = Run(kind, greedy).result();
        // The honest session is visited in each turn.
        CHECK(result.visits > 3);
        CHECK(result.most > 0);
        const std::size_t visits = kind.each_visit == 0 ? kind.visits_of_turn : greedy + kind.visits_of_turn;
        CHECK(result.most <= visits * (kind.each_visit == 0 ? 1 : kind.each_visit));
    }
}

}  // namespace

TEST_SUITE_BEGIN("fairness");

TEST_CASE("routing allocates nothing before a path matches") {
    wschat::detail::Site site;
    for (int i = 0; i < 100; ++i) {
        const std::string pattern = (i % 2 == 0 ? "/room" : "/{a}/{b}/c") + std::to_string(i);
        site.routes.add("route", Pattern("route", pattern), [] { return std::make_unique<Sink>(); });
        site.add_function_page("get", "GET", pattern + "/page", [](const Request&) { return Response(204); });
    }
    for (const std::string& path : {std::string("/"), std::string(8000, '/'), "/room1" + std::string(8000, '0'),
                                    repeated("/a", 8000), "/" + repeated("%72", 8000), std::string("/x/y/c99")}) {
        const std::string head = "GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n";
        Limits limits;
        RequestParser parser(limits);
        std::size_t consumed = 0;
        REQUIRE(parser.feed(head, consumed) == RequestParser::Outcome::request);
        const Request request = parser.take_request();
        bool route = false, page = false, allocates = false;
        heap.fail_after = 1;
        try {
            route = site.routes.find(request.raw_path()) != nullptr;
            page = site.pages.find(request.raw_path()) != nullptr;
        } catch (const std::bad_alloc&) {
            allocates = true;
        }
        heap.fail_after = 0;
        CHECK_FALSE(allocates);
        CHECK(route == (path == "/x/y/c99"));
        CHECK_FALSE(page);
    }
}

TEST_CASE("between two visits to an honest session the work is limited by the budget and the number of greedy peers") {
    for (const Kind& kind : plain_kinds) check_kind(kind);
}

#if WSCHAT_ZLIB
TEST_CASE("between two visits to an honest session a limited number of bytes is inflated") {
    for (const Kind& kind : compressed_kinds) check_kind(kind);
}
#endif

#if WSCHAT_OPENSSL
TEST_CASE("between two visits to an honest session the work for TLS is limited") {
    for (const Kind& kind : tls_kinds) check_kind(kind);
}
#endif

TEST_SUITE_END();
