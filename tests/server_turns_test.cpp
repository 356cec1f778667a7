// Section 14 against rows 48, 50, 53, 54, 67, 68, 70, 78 and 79 of FAULTS.md. No test uses a clock: fairness is measured
// in work for each turn of the loop.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;
using test::BlockedLoop;
using test::contains;
using test::Echo;
using test::EchoServer;
using test::fetch;
using test::hex;
using test::RawClient;
using test::repeated;
using test::request;
using test::RunningServer;
using test::TemporaryFile;
using test::TemporaryFolder;
using test::WsClient;
namespace fs = std::filesystem;

namespace {

constexpr std::size_t kib = 1024, mib = 1024 * 1024;

// The work of one turn of the loop, and the largest amount of it in any turn. Only the loop's thread uses it.
struct Work {
    void add(std::size_t amount) {
        in_turn += amount;
        total += amount;
    }
    void end_turn() { most_in_turn = (std::max)(most_in_turn, std::exchange(in_turn, 0)); }
    std::size_t in_turn = 0, most_in_turn = 0, total = 0;
};

// Calls a function once in each turn of the loop, until the end of its scope.
class EachTurn {
public:
    EachTurn(RunningServer& running, std::function<void()> call) : running_(running), call_(std::move(call)) {
        running_.on_loop([this] { post(); });
    }
    EachTurn(const EachTurn&) = delete;
    EachTurn& operator=(const EachTurn&) = delete;
    ~EachTurn() {
        running_.on_loop([this] { stopped_ = true; });
        running_.on_loop([] {});  // the last call has run
    }

private:
    void post() {
        running_.server.loop().post([this] {
            if (stopped_) return;
            call_();
            post();
        });
    }

    RunningServer& running_;
    std::function<void()> call_;
    bool stopped_ = false;
};

// Counts its messages, or the bytes of its messages.
struct Counting : WebSocketHandler {
    Counting(Work& of_all, bool count_bytes) : all(of_all), bytes(count_bytes) {}
    void on_message(const Message& m) override {
        const std::size_t amount = bytes ? m.size() : 1;
        all.add(amount);
        own.add(amount);
    }
    Work& all;
    Work own;
    const bool bytes;
};

// The same, and allows compression.
struct CountingInflated : Counting {
    explicit CountingInflated(Work& of_all) : Counting(of_all, true) {}
    std::optional<CompressionOptions> get_compression_options() override { return CompressionOptions{}; }
};

struct InflatingServer : RunningServer {
    InflatingServer() {
        server.add_route("/", [this] { return std::make_unique<CountingInflated>(work); });
        start();
    }
    Work work;
};

// As many one-byte messages as fit into that many bytes of frames.
std::string small_messages(std::size_t bytes) {
    const std::string frame = test::masked_text("x");
    return repeated(bytes / frame.size(), frame);
}

void set_send_buffer(RawClient& client) { client.socket().set_option(SOL_SOCKET, SO_SNDBUF, static_cast<int>(mib)); }

// A reader that takes almost nothing, because its window is small and it does not read.
RawClient reader_with_small_window(int port) {
    RawClient client(port);
    client.socket().set_option(SOL_SOCKET, SO_RCVBUF, 4096);
    return client;
}

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- fairness (rows 48 and 50) --------------------------------------------------------------------------------------

TEST_CASE("one session handles a bounded number of messages in one turn, and continues in the next turn") {
    const test::OneLoop one_loop;
    Work work;
    RunningServer running;
    running.server.add_route("/", [&] { return std::make_unique<Counting>(work, false); });
    running.start();
    WsClient client(running.port());
    REQUIRE(client.is_open());
    set_send_buffer(client.raw);
    const std::string messages = small_messages(100 * kib);
    const std::size_t count = messages.size() / test::masked_text("x").size();
    {
        const EachTurn turns(running, [&] { work.end_turn(); });
        BlockedLoop blocked(running.server);
        client.raw.send(messages);
        blocked.release();
        CHECK(running.eventually([&] { return work.total == count; }));
    }
    CHECK(work.most_in_turn <= 1000);
}

TEST_CASE("fifty sessions with many small messages do not extend a turn of the loop") {
    const test::OneLoop one_loop;
    // An honest session is served once in each turn. It waits at most for the work of one turn.
    Work work;
    RunningServer running;
    running.server.add_route("/", [&] { return std::make_unique<Counting>(work, false); });
    running.start();
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 50; ++i) {
        clients.push_back(std::make_unique<WsClient>(running.port()));
        REQUIRE(clients.back()->is_open());
        set_send_buffer(clients.back()->raw);
    }
    const std::string messages = small_messages(60 * kib);
    const std::size_t count = clients.size() * (messages.size() / test::masked_text("x").size());
    {
        const EachTurn turns(running, [&] { work.end_turn(); });
        BlockedLoop blocked(running.server);
        for (auto& client : clients) client->raw.send(messages);
        blocked.release();
        CHECK(running.eventually([&] { return work.total == count; }));
    }
    CHECK(work.most_in_turn <= 50'000);
}

TEST_CASE("between two messages of one session the other sessions handle a bounded number of messages") {
    const test::OneLoop one_loop;
    // Each session has more messages than one turn allows, and each must wait for all the others.
    struct Honest : WebSocketHandler {
        Honest(std::size_t& of_others, std::size_t& longest_wait) : others(of_others), most(longest_wait) {}
        void on_message(const Message&) override {
            if (!first) most = (std::max)(most, others);
            first = false;
            others = 0;
        }
        std::size_t& others;
        std::size_t& most;
        bool first = true;
    };
    struct Other : WebSocketHandler {
        explicit Other(std::size_t& count) : handled(count) {}
        void on_message(const Message& m) override {
            ++handled;
            write_message(m);
        }
        std::size_t& handled;
    };
    std::size_t others = 0, most = 0;
    RunningServer running;
    running.server.route<Honest>("/honest", std::ref(others), std::ref(most));
    running.server.route<Other>("/", std::ref(others));
    running.start();
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 50; ++i) {
        clients.push_back(std::make_unique<WsClient>(running.port(), i == 25 ? "/honest" : "/"));
        REQUIRE(clients.back()->is_open());
        set_send_buffer(clients.back()->raw);
    }
    BlockedLoop blocked(running.server);
    const std::string messages = small_messages(60 * kib);
    for (auto& client : clients) client->raw.send(messages);
    blocked.release();
    const std::size_t count = clients.size() * (messages.size() / test::masked_text("x").size());
    CHECK(running.eventually([&] { return running.server.metrics().messages_received == count; }));
    CHECK(running.on_loop([&] { return most; }) > 0);
    CHECK(running.on_loop([&] { return most; }) <= 50'000);
}

TEST_CASE("one session inflates a bounded number of bytes in one turn") {
    const test::OneLoop one_loop;
    if (!compression_available) return;
    InflatingServer running;
    WsClient client(running.port(), "/", {}, CompressionOptions{});
    REQUIRE(client.is_open());
    REQUIRE(client.compressed);
    set_send_buffer(client.raw);
    const std::string large(mib, 'x');
    {
        const EachTurn turns(running, [&] { running.work.end_turn(); });
        for (int i = 0; i < 40; ++i) client.connection.send(Opcode::text, large);
        BlockedLoop blocked(running.server);
        client.flush();
        blocked.release();
        CHECK(running.eventually([&] { return running.work.total == 40 * mib; }));
    }
    CHECK(running.work.most_in_turn <= 4 * mib);
}

TEST_CASE("twenty sessions that inflate much do not extend a turn of the loop") {
    const test::OneLoop one_loop;
    if (!compression_available) return;
    InflatingServer running;
    const std::string large(mib, 'x');
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 20; ++i) {
        clients.push_back(std::make_unique<WsClient>(running.port(), "/", "", CompressionOptions{}));
        REQUIRE(clients.back()->compressed);
        set_send_buffer(clients.back()->raw);
        for (int message = 0; message < 10; ++message) clients.back()->connection.send(Opcode::text, large);
    }
    {
        const EachTurn turns(running, [&] { running.work.end_turn(); });
        BlockedLoop blocked(running.server);
        for (auto& client : clients) client->flush();
        blocked.release();
        CHECK(running.eventually([&] { return running.work.total == 200 * mib; }));
    }
    CHECK(running.work.most_in_turn <= 40 * mib);
}

TEST_CASE("one session sends a bounded part of a file in one turn, and many sessions share a budget") {
    const test::OneLoop one_loop;
    if (test::over_tls()) return;  // clients would begin a TLS handshake while the loop is held
    for (const std::size_t readers : {1u, 40u}) {
        CAPTURE(readers);
        const TemporaryFile file("large.bin", test::large_content());
        Work work;
        RunningServer running;
        running.server.file("/", file.path);
        running.start();
        std::vector<RawClient> clients;
        for (std::size_t i = 0; i < readers; ++i) REQUIRE(clients.emplace_back(running.port()));
        {
            std::uint64_t sent_before = 0;
            const EachTurn turns(running, [&] {
                const std::uint64_t sent = running.server.metrics().bytes_sent;
                work.add(static_cast<std::size_t>(sent - std::exchange(sent_before, sent)));
                work.end_turn();
            });
            BlockedLoop blocked(running.server);
            for (RawClient& client : clients) client.send(request("/"));
            blocked.release();
            // The buffers of the kernel take this much although no client reads.
            CHECK(running.eventually([&] { return work.total >= readers * 512 * kib; }));
        }
        CHECK(work.most_in_turn <= (readers == 1 ? 300 * kib : 8 * mib));
    }
}

// ---- memory (row 53) ------------------------------------------------------------------------------------------------

TEST_CASE("pipelined requests that wait behind an unfinished answer count in backlog_bytes") {
    if (test::over_tls()) return;  // clients would begin a TLS handshake while the loop is held
    const TemporaryFile file("large.bin", test::large_content());
    RunningServer running(test::with_handshake_timeout(Duration::zero()));  // never
    running.server.file("/large", file.path);
    running.server.get("/{name}", [](const Request&) { return Response(200, "x"); });
    running.start();
    {
        RawClient client = reader_with_small_window(running.port());
        set_send_buffer(client);
        const std::string requests = request("/large") + repeated(2000, request("/small"));
        BlockedLoop blocked(running.server);
        client.send(requests.substr(0, 60'000));
        blocked.release();
        CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes > 40'000; }));
        CHECK(running.metrics().backlog_bytes < 200'000);
    }
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.metrics().backlog_bytes == 0);
}

TEST_CASE("pipelined requests count towards the limit of all backlogs together") {
    if (test::over_tls()) return;  // clients would begin a TLS handshake while the loop is held
    const TemporaryFile file("large.bin", test::large_content());
    ServerOptions options = test::with_handshake_timeout(Duration::zero());  // never
    options.server_limits.max_total_backlog = mib;
    RunningServer running(options);
    running.server.file("/large", file.path);
    running.server.get("/{name}", [](const Request&) { return Response(200, "x"); });
    running.start();
    const std::string requests = (request("/large") + repeated(2000, request("/small"))).substr(0, 60'000);
    std::vector<RawClient> clients;
    for (int i = 0; i < 40; ++i) {
        clients.push_back(reader_with_small_window(running.port()));
        set_send_buffer(clients.back());
    }
    BlockedLoop blocked(running.server);
    for (RawClient& client : clients) client.send(requests);
    blocked.release();
    CHECK(running.eventually([&] { return running.server.metrics().connections_open < 40; }));
    CHECK(running.metrics().backlog_bytes <= mib);
}

// ---- metrics (row 54) -----------------------------------------------------------------------------------------------

TEST_CASE("close codes that peers choose make a bounded number of metrics") {
    EchoServer running;
    constexpr int first = 3000, step = 5, count = 400;
    for (int i = 0; i < count; ++i) {
        WsClient client(running.port());
        const CloseCode code{static_cast<std::uint16_t>(first + i * step)};
        client.close(code);
        REQUIRE(client.close_code() == code);
    }
    REQUIRE(running.eventually([&] { return running.server.metrics().websockets_open == 0; }));
    const Metrics metrics = running.metrics();
    std::size_t entries = 0;
    std::uint64_t closed = 0;
    for (const auto& entry : metrics.close_codes) {
        ++entries;
        closed += entry.count;
    }
    CHECK(closed == count);
    CHECK(entries <= 50);
    std::size_t lines = 0;
    const std::string all = prometheus_text(metrics);
    for (std::size_t at = all.find("\nwschat_close_codes_total{"); at != std::string::npos;
         at = all.find("\nwschat_close_codes_total{", at + 1))
        ++lines;
    CHECK(lines > 0);
    CHECK(lines <= 50);
}

// ---- files (rows 67, 68, 78 and 79) ---------------------------------------------------------------------------------

// Points the link "current" to another release, in one step.
void switch_release(const TemporaryFolder& folder, const std::string& release) {
    fs::create_directory_symlink(folder / release, folder / "next");
    fs::rename(folder / "next", folder / "current");
}

struct Releases : TemporaryFolder {
    Releases() {
        write("v1/page.txt", "first release");
        write("v2/page.txt", "second release");
        switch_release(*this, "v1");
    }
};

// Requests the page of the current release, switches to the second release, and then removes the first.
void check_release_switch(RunningServer& running, const Releases& folder, std::string_view target) {
    running.start();
    CHECK(fetch(running.port(), target).body == "first release");
    switch_release(folder, "v2");
    CHECK(fetch(running.port(), target).body == "second release");
    fs::remove_all(folder / "v1");
    CHECK(fetch(running.port(), target).body == "second release");
}

TEST_CASE("file() follows a symbolic link at each request") {
    const Releases folder;
    RunningServer running;
    running.server.file("/", (folder / "current/page.txt").string());
    check_release_switch(running, folder, "/");
}

TEST_CASE("static_dir() follows a symbolic link to its folder at each request") {
    const Releases folder;
    RunningServer running;
    running.server.static_dir("/", (folder / "current").string());
    check_release_switch(running, folder, "/page.txt");
}

TEST_CASE("If-Modified-Since with a date after the last change is answered with 304") {
    // RFC 9110 13.1.3: "If the selected representation's last modification date is earlier or equal to the date provided
    // in the field value, the condition is false."
    const TemporaryFile file("page.txt", "content");
    RunningServer running;
    running.server.file("/", file.path);
    running.start();
    const std::string modified = fetch(running.port(), "/").header("last-modified");
    const struct {
        std::string date;
        int status;
    } table[] = {
        {modified, 304},
        {"Fri, 31 Dec 2100 23:59:59 GMT", 304},
        {"Friday, 31-Dec-60 23:59:59 GMT", 304},  // RFC 9110 5.6.7: the two obsolete forms
        {"Fri Dec 31 23:59:59 2100", 304},
        {"Sun, 06 Nov 1994 08:49:37 GMT", 200},
        {"Sunday, 06-Nov-94 08:49:37 GMT", 200},
        {"Sun Nov  6 08:49:37 1994", 200},
        // A recipient must ignore what is not a date.
        {"tomorrow", 200},
        {"Fri, 31 Dec 2100", 200},
        {"Fri, 32 Dec 2100 23:59:59 GMT", 200},
        {"Fri, 31 Dec 2100 23:59:59 GMT x", 200},
        {"Fri, 31 Dec 99999999999999999999 23:59:59 GMT", 200},
        {"Fri, 31 Dec 2100 24:59:59 GMT", 200},
        {"Fri, 31 Dec 2100 23:59:+9 GMT", 200},
        {"Fri, 31 Dec 2100 23:59:59 CET", 200},
        {"Fri, 31 anF 2100 23:59:59 GMT", 200},
        {", 31 Dec 2100 23:59:59 GMT", 200},
        {"Fri", 200},
        {"", 200},
    };
    for (const auto& row : table) {
        CAPTURE(row.date);
        CHECK(fetch(running.port(), "/", "If-Modified-Since: " + row.date + "\r\n").status == row.status);
    }
}

TEST_CASE("files of a folder have the types of media, fonts and data formats") {
    const TemporaryFolder folder;
    const struct {
        std::string name, type;
    } table[] = {
        {"sound.wav", "audio/wav"}, {"sound.m4a", "audio/mp4"},        {"sound.opus", "audio/ogg"},
        {"font.ttf", "font/ttf"},   {"data.cbor", "application/cbor"}, {"data.yaml", "application/yaml"},
    };
    for (const auto& row : table) folder.write(row.name, "content");
    RunningServer running;
    running.server.static_dir("/", folder.path());
    running.start();
    for (const auto& row : table) {
        CAPTURE(row.name);
        CHECK(fetch(running.port(), "/" + row.name).header("content-type") == row.type);
    }
}

TEST_CASE("a folder serves .well-known, and no other hidden name") {
    // RFC 8615 3: a well-known URI begins with "/.well-known/" at the root.
    const TemporaryFolder folder;
    folder.write(".well-known/security.txt", "Contact: mailto:security@example.org");
    folder.write(".well-known/acme-challenge/token", "token");
    folder.write(".well-known/.secret", "secret");
    folder.write(".git/config", "secret");
    folder.write(".well-known2/a.txt", "secret");
    RunningServer running;
    running.server.static_dir("/", folder.path());
    running.start();
    CHECK(fetch(running.port(), "/.well-known/security.txt").body == "Contact: mailto:security@example.org");
    CHECK(fetch(running.port(), "/.well-known/acme-challenge/token").body == "token");
    for (const std::string target : {"/.well-known/.secret", "/.git/config", "/.well-known2/a.txt", "/.well-known/",
                                     "/.well-known/../.git/config", "/.well-known/missing"}) {
        CAPTURE(target);
        const int status = fetch(running.port(), target).status;
        CHECK((status == 404 || status == 400));
    }
}

TEST_CASE("the path of a folder without its slash is redirected to the path with a slash") {
    const TemporaryFolder folder;
    folder.write("index.html", "index");
    RunningServer running;
    running.server.static_dir("/static", folder.path());
    running.server.static_dir("/with/slash/", folder.path());
    running.server.static_dir("/page", folder.path());
    running.server.get("/page", [](const Request&) { return Response(200, "the page"); });
    running.start();
    const struct {
        std::string target, location;
    } table[] = {
        {"/static", "/static/"},
        {"/static?a=b", "/static/?a=b"},
        {"/with/slash", "/with/slash/"},
    };
    for (const auto& row : table)
        for (const std::string method : {"GET", "HEAD"}) {
            CAPTURE(method + " " + row.target);
            const test::Answer answer = fetch(running.port(), row.target, "", method);
            CHECK(answer.status == 301);
            CHECK(answer.header("location") == row.location);
        }
    CHECK(fetch(running.port(), "/static/").body == "index");
    CHECK(fetch(running.port(), "/page").body == "the page");
    CHECK(fetch(running.port(), "/static2").status == 404);
    CHECK(fetch(running.port(), "//static").status != 301);
}

// ---- limits that change (row 70) ------------------------------------------------------------------------------------

TEST_CASE("a lower max_message_size of a live route does not turn off the limit for a message in progress") {
    if (!compression_available) return;
    struct Compressing : WebSocketHandler {
        void on_message(const Message& m) override { write_message(std::to_string(m.size())); }
        std::optional<CompressionOptions> get_compression_options() override { return CompressionOptions{}; }
    };
    RunningServer running;
    Limits limits = running.server.limits();
    limits.max_message_size = mib;
    Route& route = running.server.route<Compressing>("/");
    route.set_limits(limits);
    running.start();
    WsClient client(running.port(), "/", {}, CompressionOptions{});
    REQUIRE(client.compressed);
    client.connection.send(Opcode::text, std::string(16 * mib, 'x'));
    const std::string frame = test::take_output(client.connection);
    // RFC 6455 5.2: FIN, RSV1 and text, a length of two bytes, a mask.
    REQUIRE(frame.substr(0, 2) == hex("c1 fe"));
    const std::string mask = frame.substr(4, 4), payload = frame.substr(8);
    // The same in two fragments. The first one has 512 bytes, which inflate to 500 KiB.
    const std::size_t rest = payload.size() - 512;
    const std::string length = {static_cast<char>(rest / 256), static_cast<char>(rest % 256)};
    client.raw.send(hex("41 fe 02 00") + mask + payload.substr(0, 512));
    REQUIRE(running.eventually([&] { return running.server.metrics().backlog_bytes >= 400'000; }));
    running.on_loop([&] {
        limits.max_message_size = 100'000;
        route.set_limits(limits);
    });
    client.raw.send(hex("80 fe") + length + mask + payload.substr(512));
    REQUIRE(client.next().value_or("closed") == "closed");
    CHECK(client.connection.close_code() == CloseCode::message_too_big);
}

TEST_SUITE_END();
