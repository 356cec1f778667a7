// Tests of a server under attack that need the allocator, the clock or the limit of descriptors. A separate program
// (wschat_attacks), because it replaces operator new and clock_gettime(). The servers are processes of their own, which
// these replacements and limits concern alone.
#include "../support.hpp"

#include <malloc.h>
#include <sys/syscall.h>

#if WSCHAT_OPENSSL
#include <openssl/crypto.h>
#endif

namespace {

std::atomic<std::size_t> allocated{0};
std::atomic<long> fail_after{-1};   // so many allocations succeed, and all later ones fail; negative: none fails
std::atomic<long> clock_offset{0};  // in seconds

bool may_allocate() {
    const long left = fail_after;
    if (left > 0) --fail_after;
    return left != 0;
}

void* counted(void* block) {
    if (block == nullptr) throw std::bad_alloc();
    allocated += ::malloc_usable_size(block);
    return block;
}
void release(void* block) noexcept {
    if (block != nullptr) allocated -= ::malloc_usable_size(block);
    std::free(block);
}

}  // namespace

WSCHAT_TEST_NOINLINE void* operator new(std::size_t size) {
    return counted(may_allocate() ? std::malloc(size) : nullptr);
}
WSCHAT_TEST_NOINLINE void* operator new(std::size_t size, std::align_val_t alignment) {
    if (!may_allocate()) throw std::bad_alloc();
    return counted(std::aligned_alloc(static_cast<std::size_t>(alignment), (size + 4095) / 4096 * 4096));
}
WSCHAT_TEST_NOINLINE void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    void* block = may_allocate() ? std::malloc(size) : nullptr;
    return block == nullptr ? nullptr : counted(block);
}
extern "C" int clock_gettime(clockid_t clock, timespec* time) noexcept {
    const auto result = static_cast<int>(::syscall(SYS_clock_gettime, clock, time));
    if (clock == CLOCK_MONOTONIC) time->tv_sec += clock_offset;
    return result;
}
WSCHAT_TEST_NOINLINE void operator delete(void* block) noexcept { release(block); }
WSCHAT_TEST_NOINLINE void operator delete(void* block, std::size_t) noexcept { release(block); }
WSCHAT_TEST_NOINLINE void operator delete(void* block, std::align_val_t) noexcept { release(block); }
WSCHAT_TEST_NOINLINE void operator delete(void* block, std::size_t, std::align_val_t) noexcept { release(block); }
WSCHAT_TEST_NOINLINE void operator delete(void* block, const std::nothrow_t&) noexcept { release(block); }

namespace {

using namespace test;

// A queue for a peer that does not read begins its own chunks of 16 KiB.
constexpr std::size_t per_connection = 20 * 1024;
// Two chunks of the arena, and what the lists of sessions grow.
constexpr std::size_t per_loop = 1024 * 1024;

enum class Kind { plain, compressed, tls };

#if WSCHAT_OPENSSL

// The memory of OpenSSL counts too.
const bool openssl_counts = CRYPTO_set_mem_functions(
                                [](std::size_t size, const char*, int) -> void* {
                                    void* block = std::malloc(size);
                                    return block == nullptr ? nullptr : counted(block);
                                },
                                [](void* block, std::size_t size, const char*, int) -> void* {
                                    if (block != nullptr) allocated -= ::malloc_usable_size(block);
                                    void* moved = std::realloc(block, size);
                                    return moved == nullptr ? nullptr : counted(moved);
                                },
                                [](void* block, const char*, int) { release(block); }) != 0;

#endif

// Text that does not compress well.
std::string random_text(std::size_t size) {
    std::uint32_t state = 12345;
    std::string text(size, ' ');
    for (char& c : text) c = static_cast<char>(' ' + ((state = state * 1664525 + 1013904223) >> 24) % 94);
    return text;
}

const std::string& sent_text() {
    static const std::string text = random_text(12'000'000);
    return text;
}

// "queue COUNT SIZE" sends messages, "close COUNT SIZE" closes after them.
struct Sender : wschat::WebSocketHandler {
    void on_message(const wschat::Message& m) override {
        std::string order(m.text());
        char verb[8] = "";
        unsigned count = 0, size = 0;
        if (std::sscanf(order.c_str(), "%7s %u %u", verb, &count, &size) != 3) return;
        for (unsigned i = 0; i < count; ++i) write_message(std::string_view(sent_text()).substr(0, size));
        if (std::string(verb) == "close") close();
    }
};
struct CompressedSender : Sender {
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        return wschat::CompressionOptions();
    }
};

struct Memory {
    double allocated = 0, counted = 0;
    long open = 0;
};

class Accounts {
public:
    explicit Accounts(Kind kind) : kind_(kind), process_([kind](int) { return make_server(kind); }) {
        // What is allocated once.
        const std::vector<RawClient> some = clients(20);
        for (int i = 0; i < 3; ++i) memory();
    }

    std::vector<RawClient> clients(std::size_t count) {
        std::vector<RawClient> all;
        for (std::size_t i = 0; i < count; ++i) all.push_back(connect());
        return all;
    }
    std::vector<RawClient> websockets(std::size_t count) {
        std::vector<RawClient> all = clients(count);
        for (RawClient& client : all) {
            client.send(
                upgrade_request(kind_ == Kind::compressed ? "Sec-WebSocket-Extensions: permessage-deflate\r\n" : ""));
            REQUIRE(client.read_until("\r\n\r\n"));
        }
        return all;
    }

    // Waits until the server has that many connections beside this one, and its memory does not change any more.
    Memory memory(long connections = -1) {
        Memory last;
        for (int same = 0; same < 5;) {
            const Memory now = ask();
            const bool settled = (connections < 0 || now.open == connections + 1) && now.counted >= last.counted &&
                                 now.counted <= last.counted && now.allocated < last.allocated + 1000 &&
                                 now.allocated > last.allocated - 1000;
            same = settled ? same + 1 : 0;
            last = now;
            std::this_thread::sleep_for(20ms);
        }
        return last;
    }

    // Holds what the server counts for `count` connections against what it has allocated for them.
    template <class Connect, class Enter>
    void compare(std::size_t count, std::size_t at_least, Connect&& connect_all, Enter&& enter) {
        const Memory none = memory(0);
        double idle = 0;
        {
            const std::vector<RawClient> all = connect_all(count);
            idle = memory(static_cast<long>(count)).allocated - none.allocated;
        }
        const Memory before = memory(0);
        std::vector<RawClient> all = connect_all(count);
        for (RawClient& client : all) enter(client);
        const Memory now = memory(static_cast<long>(count));
        const double real = now.allocated - before.allocated, known = now.counted - before.counted + idle;
        const double fixed = static_cast<double>(count * per_connection + per_loop);
        MESSAGE("idle " << idle << ", allocated " << real << ", counted " << known);
        CHECK(now.counted - before.counted >= static_cast<double>(count * at_least));
        CHECK(real <= known * 1.1 + fixed);
        CHECK(known <= real * 1.1 + fixed);
    }

    // Handshakes of both versions that the client does not finish. What a connection holds before it is known too.
    void handshakes(std::size_t count) {
#if WSCHAT_OPENSSL
        const Memory none = memory(0);
        std::vector<RawClient> all;
        for (std::size_t i = 0; i < count; ++i) all.push_back(RawClient::plain(process_.port()));
        const Memory silent = memory(static_cast<long>(count));
        for (std::size_t i = 0; i < count; ++i) {
            const std::string hello = client_hello(i % 2 == 0 ? TLS1_2_VERSION : TLS1_3_VERSION);
            all[i].send(hello);
            REQUIRE(all[i].read_at_least(5));
        }
        const Memory now = memory(static_cast<long>(count));
        const double real = now.allocated - silent.allocated, known = now.counted - silent.counted;
        MESSAGE("silent " << silent.allocated - none.allocated << ", allocated " << real << ", counted " << known);
        CHECK(real <= known * 1.1);
        CHECK(known <= real * 1.1);
#else
        static_cast<void>(count);
#endif
    }

private:
#if WSCHAT_OPENSSL
    static std::string client_hello(int version) {
        static const auto context = [] {
            wschat::ClientTls options;
            options.insecure_accept_any_certificate = true;
            return std::make_shared<const wschat::detail::TlsContext>(options);
        }();
        wschat::detail::TlsStream stream(context, "localhost");
        SSL_set_max_proto_version(stream.native(), version);
        stream.handshake();
        return std::string(stream.output());
    }
#endif
    static std::unique_ptr<wschat::Server> make_server(Kind kind) {
        static_cast<void>(sent_text());
        wschat::Limits limits;
        limits.handshake_timeout = limits.ping_interval = limits.closing_timeout = std::chrono::hours(1);
        limits.max_backlog = 64 * 1024 * 1024;
        wschat::ServerLimits all;
        all.max_total_backlog = std::size_t{4} << 30;
        auto server = std::make_unique<wschat::Server>(with_limits(limits, all));
        if (kind == Kind::compressed) server->route<CompressedSender>("/");
        else server->route<Sender>("/");
        server->get("/memory", [&server = *server](const wschat::Request&) {
            const wschat::Metrics metrics = server.metrics();
            return wschat::Response(200, std::to_string(allocated) + " " + std::to_string(metrics.backlog_bytes) + " " +
                                             std::to_string(metrics.connections_open));
        });
        server->get("/large",
                    [](const wschat::Request&) { return wschat::Response(200, std::string(12 * 1024 * 1024, 'x')); });
        if (kind == Kind::tls) test::listen_tls(*server, "127.0.0.1:0");
        else server->listen(0);
        return server;
    }
    // A small receive buffer: the kernel takes little of what the client does not read.
    RawClient connect() const {
        wschat::detail::Socket socket = std::move(RawClient::plain(process_.port()).socket());
        const int small = 4096;
        ::setsockopt(socket.descriptor(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        return RawClient(std::move(socket), kind_ == Kind::tls ? client_transport() : nullptr);
    }
    Memory ask() {
        RawClient client = connect();
        client.send(request("/memory"));
        const Answer answer = next_answer(client);
        REQUIRE(answer.status == 200);
        Memory memory;
        REQUIRE(std::sscanf(answer.body.c_str(), "%lf %lf %ld", &memory.allocated, &memory.counted, &memory.open) == 3);
        return memory;
    }

    Kind kind_;
    ServerProcess process_;
};

constexpr std::size_t many = 100, some = 10;

void half_a_request(Kind kind) {
    Accounts accounts(kind);
    accounts.compare(
        4 * many, 12'000, [&](std::size_t n) { return accounts.clients(n); },
        [](RawClient& client) { client.send("GET / HTTP/1.1\r\nA: " + std::string(12'000, 'x')); });
}
void large_request(Kind kind) {
    Accounts accounts(kind);
    accounts.compare(
        4 * many, 15'000, [&](std::size_t n) { return accounts.clients(n); },
        [](RawClient& client) {
            client.send(upgrade_request("A: " + std::string(15'000, 'x') + "\r\n"));
            REQUIRE(client.read_until("\r\n\r\n"));
        });
}
void blocked_answer(Kind kind) {
    Accounts accounts(kind);
    accounts.compare(
        some, 500'000, [&](std::size_t n) { return accounts.clients(n); },
        [](RawClient& client) { client.send(request("/large") + repeated(1000, request("/"))); });
}
void paused_reader(Kind kind, const std::string& order) {
    Accounts accounts(kind);
    accounts.compare(
        some, 500'000, [&](std::size_t n) { return accounts.websockets(n); },
        [&](RawClient& client) { client.send(masked_text(order)); });
}
void unfinished_message(Kind kind, bool deflated = false) {
    std::string content = random_text(deflated ? 600'000 : 500'000);
    const std::string header = deflated ? "\x41\xff" : "\x01\xff";
#if WSCHAT_ZLIB
    if (deflated) {
        wschat::detail::Bytes block;
        wschat::detail::Deflater deflater(6, 8, 15);
        content = deflater.deflate(content, block, true);
    }
#endif
    const std::string frame = header + hex("00 00 00 00 00 0f 00 00 00 00 00 00") + content;
    Accounts accounts(kind);
    accounts.compare(
        many, 400'000, [&](std::size_t n) { return accounts.websockets(n); },
        [&](RawClient& client) { client.send(frame); });
}
// The output of many turns, some of it read: the sent part of a chunk is not free before the chunk is.
void partly_read(Kind kind) {
    Accounts accounts(kind);
    accounts.compare(
        some, 300'000, [&](std::size_t n) { return accounts.websockets(n); },
        [](RawClient& client) {
            const int large = 1024 * 1024;
            ::setsockopt(client.socket().descriptor(), SOL_SOCKET, SO_RCVBUF, &large, sizeof large);
            client.send(masked_text("queue 1 12000000"));
            REQUIRE(client.read_at_least(3'000'000));
        });
}

}  // namespace

// Each case brings many connections into one phase. What the server has allocated for them may differ from what it
// counts by 10%, and by a fixed amount: that of an idle connection, which is measured, `per_connection`, and `per_loop`.
TEST_SUITE("accounting") {
    TEST_CASE("half a request is counted") { half_a_request(Kind::plain); }
    TEST_CASE("the large request of an open WebSocket is counted") { large_request(Kind::plain); }
    TEST_CASE("a blocked answer and the pipelined requests behind it are counted") { blocked_answer(Kind::plain); }
    TEST_CASE("small messages for a peer that does not read are counted") {
        paused_reader(Kind::plain, "queue 100000 100");
    }
    TEST_CASE("messages of nine kilobytes for a peer that does not read are counted") {
        paused_reader(Kind::plain, "queue 1200 9000");
    }
    TEST_CASE("one large message for a peer that does not read is counted") {
        paused_reader(Kind::plain, "queue 1 12000000");
    }
    TEST_CASE("a large message that is partly read is counted") { partly_read(Kind::plain); }
    TEST_CASE("an unfinished message is counted") { unfinished_message(Kind::plain); }
    TEST_CASE("output before a Close frame is counted") { paused_reader(Kind::plain, "close 1200 9000"); }

#if WSCHAT_ZLIB
    TEST_CASE("compressed messages for a peer that does not read are counted") {
        paused_reader(Kind::compressed, "queue 1200 9000");
    }
    TEST_CASE("an unfinished compressed message is counted") { unfinished_message(Kind::compressed, true); }
    TEST_CASE("an unfinished plain message of a connection with compression is counted") {
        unfinished_message(Kind::compressed);
    }
    TEST_CASE("compressed output before a Close frame is counted") {
        paused_reader(Kind::compressed, "close 1200 9000");
    }
#endif

#if WSCHAT_OPENSSL
    TEST_CASE("TLS: half a ClientHello is counted") {
        REQUIRE(openssl_counts);
        Accounts accounts(Kind::tls);
        accounts.compare(
            many, 0, [&](std::size_t n) { return accounts.clients(n); },
            [](RawClient& client) {
                const std::string bytes = hex("16 03 01 3f ff 01 00 3f fb");
                client.socket().send(std::array<std::string_view, 1>{bytes}.data(), 1);
            });
    }
    TEST_CASE("TLS: a handshake that stops after the ClientHello is counted within 10%") {
        REQUIRE(openssl_counts);
        Accounts accounts(Kind::tls);
        accounts.handshakes(10 * many);
    }
    TEST_CASE("TLS: half a request is counted") { half_a_request(Kind::tls); }
    TEST_CASE("TLS: a blocked answer and the pipelined requests behind it are counted") { blocked_answer(Kind::tls); }
    TEST_CASE("TLS: messages for a peer that does not read are counted") {
        paused_reader(Kind::tls, "queue 1200 9000");
    }
    TEST_CASE("TLS: an unfinished message is counted") { unfinished_message(Kind::tls); }
    TEST_CASE("TLS: output before a Close frame is counted") { paused_reader(Kind::tls, "close 1200 9000"); }
#endif
}

namespace {

// ---- the clock -----------------------------------------------------------------------------------------------------

// A server whose clock can jump, and which can be stopped.
class Stalled {
public:
    explicit Stalled(bool tls = false) : process_([tls](int) { return make_server(tls); }) {
        RawClient client = tls ? RawClient::encrypted(port()) : RawClient::plain(port());
        client.send(request("/pid"));
        pid_ = std::atoi(next_answer(client).body.c_str());
        REQUIRE(pid_ > 0);
    }
    int port() const { return process_.port(); }
    // 15 seconds pass.
    void jump() const { ::kill(pid_, SIGUSR1); }
    // A minute passes.
    void jump_far() const { ::kill(pid_, SIGUSR2); }
    void stop() const {
        int status = 0;
        ::kill(pid_, SIGSTOP);
        ::waitpid(pid_, &status, WUNTRACED);
    }
    void resume() const { ::kill(pid_, SIGCONT); }

private:
    static std::unique_ptr<wschat::Server> make_server(bool tls) {
        std::signal(SIGUSR1, [](int) { clock_offset += 15; });
        std::signal(SIGUSR2, [](int) { clock_offset += 60; });
        wschat::ServerOptions options;
        options.poller = poller_kind();
        options.limits.handshake_timeout = options.limits.ping_interval = options.limits.ping_timeout = 10s;
        auto server = std::make_unique<wschat::Server>(options);
        server->route<Echo>("/");
        server->get("/page", [](const wschat::Request&) { return wschat::Response(200, "page"); });
        server->get("/pid", [](const wschat::Request&) { return wschat::Response(200, std::to_string(::getpid())); });
        if (tls) test::listen_tls(*server, "127.0.0.1:0");
        else server->listen(0);
        return server;
    }

    ServerProcess process_;
    pid_t pid_ = 0;
};

// More than the poller reports in one turn.
constexpr std::size_t more_than_a_turn = 700;

// ---- descriptors ---------------------------------------------------------------------------------------------------

// A server with few descriptors, which serves a file.
std::unique_ptr<wschat::Server> server_with_descriptors(rlim_t count, const std::string& file,
                                                        const std::string& small_file) {
    const rlimit limit{count, count};
    ::setrlimit(RLIMIT_NOFILE, &limit);
    auto server = std::make_unique<wschat::Server>();
    server->file("/file", file);
    server->file("/small", small_file);
    server->get("/page", [](const wschat::Request&) { return wschat::Response(200, "page"); });
    server->listen(0);
    return server;
}

// ---- memory --------------------------------------------------------------------------------------------------------

// Sends three messages. Memory runs out after so many allocations of the second one.
struct OutOfMemory : wschat::WebSocketHandler {
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        wschat::CompressionOptions options;
        options.server_context_takeover = takeover;
        options.threshold = 0;
        return options;
    }
    void on_message(const wschat::Message& m) override {
        const long allocations = std::atol(std::string(m.text()).c_str());
        write_message(text(0));
        const std::string second = text(1);
        fail_after = allocations;
        write_message(second);
        fail_after = -1;
        write_message(text(2));
    }
    // The second is like the first, and the third like the second: each refers to the one before it.
    static std::string text(std::size_t i) { return random_text(300'000).substr(i * 20'000, 200'000); }
    explicit OutOfMemory(bool keep) : takeover(keep) {}
    const bool takeover;
};

}  // namespace

TEST_SUITE("attacks") {
    TEST_CASE("a pong that waits in the kernel during a long turn answers the ping") {
        const Stalled server;
        std::vector<std::unique_ptr<WsClient>> clients;
        for (std::size_t i = 0; i < more_than_a_turn; ++i) {
            clients.push_back(std::make_unique<WsClient>(server.port()));
            REQUIRE(clients.back()->is_open());
        }
        server.jump();
        for (const auto& client : clients) {
            pollfd ping{client->raw.socket().descriptor(), POLLIN, 0};
            REQUIRE(::poll(&ping, 1, 30'000) == 1);
        }
        server.stop();
        for (const auto& client : clients) REQUIRE(client->next(wschat::detail::Event::Kind::ping));  // sends a pong
        server.jump();
        server.resume();
        std::size_t alive = 0;
        for (const auto& client : clients) {
            client->send("still here");
            alive += client->next() == "still here" ? 1u : 0u;
        }
        CHECK(alive == more_than_a_turn);
    }

    TEST_CASE("a request that waits in the kernel during a long turn is answered") {
        const Stalled server;
        std::vector<RawClient> clients;
        for (std::size_t i = 0; i < more_than_a_turn; ++i) clients.push_back(RawClient::plain(server.port()));
        for (RawClient& client : clients) {
            client.send(request("/page"));
            REQUIRE(next_answer(client).status == 200);
        }
        server.stop();
        for (std::size_t i = 0; i < clients.size(); ++i)
            clients[i].send(i % 2 == 0 ? request("/page") : upgrade_request());
        server.jump();
        server.resume();
        std::size_t answered = 0;
        for (RawClient& client : clients) answered += client.read_until("\r\n\r\n") ? 1u : 0u;
        CHECK(answered == more_than_a_turn);
    }

#if WSCHAT_OPENSSL
    TEST_CASE("TLS handshakes that wait in the kernel during a long turn are completed, also after their deadline") {
        const Stalled server(true);
        std::vector<RawClient> waiting;
        for (int i = 0; i < 150; ++i) waiting.push_back(RawClient::plain(server.port()));
        // This connection comes after the others, so they have been accepted when it has its answer.
        RawClient last = RawClient::encrypted(server.port());
        last.send(request("/page"));
        REQUIRE(next_answer(last).status == 200);
        server.stop();
        std::vector<RawClient> clients;
        for (RawClient& client : waiting) {
            wschat::detail::WireCount wire;
            auto transport = client_transport();
            transport->send(client.socket(), nullptr, 0, wire);  // the ClientHello
            REQUIRE(wire.sent > 0);
            clients.emplace_back(std::move(client.socket()), std::move(transport));
        }
        server.jump_far();
        server.resume();
        std::size_t answered = 0;
        for (RawClient& client : clients) {
            client.send(request("/page"));
            answered += next_answer(client).status == 200 ? 1u : 0u;
        }
        CHECK(answered == clients.size());
    }
#endif

    TEST_CASE("a download counts as a second connection") {
        const TemporaryFile file("large", large_content()), small("small", "a small file");
        ServerProcess server([&](int) { return server_with_descriptors(256, file.path, small.path); });
        std::vector<RawClient> downloads;
        std::size_t served = 0;
        for (; served < 150; ++served) {
            RawClient client = RawClient::plain(server.port());
            client.send(request("/file"));
            REQUIRE(client.read_until("\r\n\r\n"));
            if (!contains(client.received, " 200 ")) break;
            downloads.push_back(std::move(client));
        }
        // 256 descriptors less 64, two for each.
        CHECK(served == 96);
        for (int i = 0; i < 50; ++i) {
            RawClient client = RawClient::plain(server.port());
            client.send(request("/page"));
            REQUIRE(client.read_to_end());
            CHECK(is_refusal(client.received, 503));
        }
        // The downloads go on, and a place is free after one.
        REQUIRE(downloads.back().read_at_least(20 * 1024 * 1024));
        downloads.pop_back();
        CHECK(eventually([&] { return fetch(server.port(), "/page").status == 200; }));
    }

    TEST_CASE("a small file is served while a large one would take the last descriptors") {
        const TemporaryFile file("large", large_content()), small("small", "a small file");
        ServerProcess server([&](int) { return server_with_descriptors(256, file.path, small.path); });
        std::vector<RawClient> clients;
        for (int i = 0; i < 191; ++i) clients.push_back(RawClient::plain(server.port()));
        RawClient last = RawClient::plain(server.port());
        last.send(request("/small"));
        CHECK(next_answer(last).body == "a small file");
        last.send(request("/file"));
        CHECK(next_answer(last).status == 503);
        last.send(request("/page"));
        CHECK(next_answer(last).body == "page");
        // All at once.
        for (RawClient& client : clients) client.send(request("/small"));
        std::size_t answered = 0;
        for (RawClient& client : clients) answered += next_answer(client).body == "a small file" ? 1u : 0u;
        CHECK(answered == clients.size());
    }

#if WSCHAT_ZLIB
    TEST_CASE("a connection that runs out of memory in the middle of compressing sends nothing wrong") {
        ServerProcess process([](int) {
            auto server = std::make_unique<wschat::Server>();
            server->route<OutOfMemory>("/keep", true);
            server->route<OutOfMemory>("/alone", false);
            server->listen(0);
            return server;
        });
        wschat::CompressionOptions offer;
        offer.server_context_takeover = true;
        for (const char* target : {"/keep", "/alone"}) {
            int complete = 0, ended = 0;
            for (int allocations = 0; allocations < 12; ++allocations) {
                CAPTURE(target);
                CAPTURE(allocations);
                WsClient client(process.port(), target, {}, offer);
                REQUIRE(client.compressed);
                client.send(std::to_string(allocations));
                std::size_t next = 0;
                for (auto message = client.next(); message; message = client.next()) {
                    CHECK((*message == OutOfMemory::text(next)));
                    if (++next == 3) break;
                }
                // A failed message is the last one.
                CHECK(client.connection.close_cause() != wschat::CloseCause::protocol_error);
                if (next == 3) ++complete;
                else ++ended;
            }
            CHECK(complete > 0);
            CHECK(ended > 0);
        }
    }
#endif

    TEST_CASE("a handler in hundreds of rooms with many members joins and leaves correctly") {
        struct Member : wschat::WebSocketHandler {
            explicit Member(std::vector<Member*>& all) { all.push_back(this); }
            void on_message(const wschat::Message&) override {}
        };
        std::vector<Member*> members;
        RunningServer running;
        running.server.route<Member>("/", std::ref(members));
        running.start();
        std::vector<std::unique_ptr<WsClient>> clients;
        for (std::size_t i = 0; i < 30; ++i) clients.push_back(std::make_unique<WsClient>(running.port()));
        const auto wrong = running.on_loop([&] {
            std::size_t differences = 0;
            std::uint32_t state = 1;
            std::vector<std::vector<bool>> model(members.size(), std::vector<bool>(300));
            for (int step = 0; step < 60'000; ++step) {
                const std::size_t who = (state = state * 1664525 + 1013904223) >> 8 & 0xFFFF;
                const std::size_t where = (state = state * 1664525 + 1013904223) >> 8 & 0xFFFF;
                Member& member = *members[who % members.size()];
                wschat::Room& room = running.server.rooms()["room " + std::to_string(where % 300)];
                const bool inside = model[who % members.size()][where % 300];
                const bool join = (state >> 30) != 0;  // three times of four
                differences += room.has(member) != inside ? 1u : 0u;
                differences += (join ? room.join(member) == inside : room.leave(member) != inside) ? 1u : 0u;
                model[who % members.size()][where % 300] = join;
            }
            for (std::size_t i = 0; i < members.size(); ++i) {
                const auto expected = static_cast<std::size_t>(std::count(model[i].begin(), model[i].end(), true));
                differences += members[i]->rooms().size() != expected ? 1u : 0u;
            }
            return differences;
        });
        CHECK(wrong == 0);
        for (const auto& client : clients) client->raw.reset();
        CHECK(running.eventually([&] { return running.server.metrics().rooms == 0; }));
    }
}
