// A whole scenario over real sockets in which one call of the server fails, then another, and so on until it runs
// clean: each call of the system that wschat.hpp makes with each error that it can return, and operator new. A program
// of its own, because it wraps these calls. With WSCHAT_TEST_POLLER=poll the server uses the poll backend.
#include "faults.hpp"

#define WSCHAT_CHAT 1
#include "support.hpp"

#include <csignal>
#include <future>
#include <limits>

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using faults::Armed;
using faults::Call;
using faults::Plan;
using faults::Seam;
using test::Client;
using test::hex;
using test::RawClient;

namespace {

// Who may be disturbed by a fault. Whoever is not must be served as if nothing had happened.
enum class Victims {
    none,        // the call is made again, or nobody needs its result
    connection,  // that on whose socket it happens
    one          // whoever needs its result: as many as there were faults
};

// ---- the server's side ----------------------------------------------------------------------------------------------

struct Tally {
    std::atomic<int> opened{0};
    std::atomic<int> closed{0};
    std::atomic<int> closed_twice{0};
    std::atomic<int> logged{0};
};

struct Guest : WebSocketHandler {
    explicit Guest(Tally& of_all) : tally(of_all) {}
    void open() override { ++tally.opened; }
    void on_close() override {
        ++tally.closed;
        if (std::exchange(gone, true)) ++tally.closed_twice;
    }
    Tally& tally;
    bool gone = false;
};

struct Member : Guest {
    using Guest::Guest;
    void open() override {
        Guest::open();
        room("room").join(*this);
    }
    void on_message(const Message& m) override { room("room").broadcast(m); }
};

constexpr std::size_t piece_size = 20'000;

// Does what it is told.
struct Clerk : Guest {
    using Guest::Guest;
    void on_message(const Message& m) override {
        const std::string word(m.text().substr(0, m.text().find(' ')));
        if (word == "close") close(4001, "as you wish");
        if (word == "throw") throw std::runtime_error("as you wish");
        if (word == "post") ref().post([](WebSocketHandler& handler) { handler.write_message("posted"); });
        if (word == "timer")
            loop().call_later(0ms, [ref = ref()] {
                if (ref.get() != nullptr) ref.get()->write_message("timed");
            });
        if (word == "pieces") write_pieces(std::stoi(std::string(m.text().substr(7))));
    }
    void write_pieces(int count) {
        for (int i = 0; i < count; ++i) {
            std::string piece = std::to_string(i) + ":";
            piece.resize(piece_size, 'x');
            write_message(piece);
        }
    }
};

// A page and a stale Unix socket in a folder of their own.
class Folder {
public:
    Folder() : path("/tmp/wschat-faults-" + std::to_string(::getpid())), content(30'000, 'p') {
        ::mkdir(path.c_str(), 0700);
        std::FILE* file = std::fopen(page().c_str(), "we");
        if (file == nullptr) throw std::runtime_error("no file for a page");
        std::fwrite(content.data(), 1, content.size(), file);
        std::fclose(file);
    }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() { remove(); }
    void remove() const {
        ::unlink(page().c_str());
        ::unlink(socket().c_str());
        ::rmdir(path.c_str());
    }
    std::string page() const { return path + "/page.html"; }
    std::string socket() const { return path + "/socket"; }
    // As a process leaves it that has died.
    void leave_stale_socket() const {
        ::unlink(socket().c_str());
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        socket().copy(name.sun_path, sizeof name.sun_path - 1);
        const Socket stale(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        ::bind(stale.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name);
    }

    std::string path;
    std::string content;
};

const Folder& folder() {
    static const Folder one;
    return one;
}
const std::string& made_page() {
    static const std::string one(100'000, 'm');
    return one;
}

std::size_t open_descriptors() {
    std::size_t count = 0;
    for (int descriptor = 0; descriptor < 256; ++descriptor)
        if (::fcntl(descriptor, F_GETFD) != -1) ++count;
    return count;
}

enum class Ending { shutdown, signal };

// A server on a thread of its own, all of whose life goes through a seam.
class Subject {
public:
    explicit Subject(const std::array<Plan, 2>& plans, Ending ending = Ending::shutdown) : ending_(ending) {
        seam.plans = plans;
        thread_ = std::thread([this] { live(); });
        std::unique_lock<std::mutex> lock(mutex_);
        if (!changed_.wait_for(lock, test::deadline, [this] { return server_ != nullptr || ended_; }))
            give_up("does not begin");
    }
    Subject(const Subject&) = delete;
    Subject& operator=(const Subject&) = delete;
    ~Subject() {
        end();
        join();
    }

    void end() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (server_ == nullptr || std::exchange(told_to_end_, true)) return;
        if (ending_ == Ending::signal) ::raise(SIGTERM);
        else server_->shutdown(2s);
    }
    // Nothing fails any more. Answers how many such calls there have been so far.
    long heal(Call call) {
        std::promise<long> calls;
        server_->loop().post([&] {
            seam.plans = {};
            calls.set_value(seam.calls_of(call));
        });
        return calls.get_future().get();
    }
    // When it has ended.
    void join() {
        if (!thread_.joinable()) return;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            if (!changed_.wait_for(lock, test::deadline, [this] { return ended_; })) give_up("does not end");
        }
        thread_.join();
    }

    Seam seam;  // to be read when it has ended
    int port = 0;
    std::string refusal;  // what left the set-up
    std::string thrown;   // what left run()
    Metrics metrics;      // at the end
    Tally tally;

private:
    // Nothing that runs on the thread can be waited for any more.
    [[noreturn]] static void give_up(const char* what) {
        std::fprintf(stderr, "the server %s\n", what);
        folder().remove();
        std::abort();
    }

    void live() {
        try {
            const Armed armed(&seam);
            Server server(options());
            set_up(server);
            tell_port(server);
            run(server);
        } catch (const std::exception& error) {
            refusal = error.what();
            if (refusal.empty()) refusal = "no sentence";
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        ended_ = true;
        changed_.notify_one();
    }
    ServerOptions options() const {
        ServerOptions options;
        options.poller = test::poller_kind();
        options.handle_signals = ending_ == Ending::signal;
        options.limits.max_backlog = 300'000;
        options.limits.linger_timeout = 100ms;
        options.server_limits.max_connections_per_address = 100;
        return options;
    }
    void set_up(Server& server) {
        server.on_log([this](const LogEntry& entry) { tally.logged += to_string(entry).empty() ? 0 : 1; });
        server.route<Member>("/room", std::ref(tally));
        server.route<Clerk>("/desk", std::ref(tally));
        server.route<ChatHandler>("/chat/{room}");
        server.file("/page", folder().page());
        server.static_dir("/files", folder().path);
        server.get("/made", [](const Request&) { return Response(200, made_page()); });
        server.listen(0);
        server.listen("unix:" + folder().socket());
    }
    void tell_port(Server& server) {
        const Armed off(nullptr);
        const std::lock_guard<std::mutex> lock(mutex_);
        server_ = &server;
        port = server.port();
        changed_.notify_one();
    }
    void run(Server& server) {
        try {
            server.run();
        } catch (const std::exception& error) {
            thrown = error.what();
        }
        const Armed off(nullptr);
        metrics = server.metrics();
        const std::lock_guard<std::mutex> lock(mutex_);
        server_ = nullptr;
    }

    const Ending ending_;
    Server* server_ = nullptr;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool told_to_end_ = false;
    bool ended_ = false;
    std::thread thread_;
};

// ---- the clients' side ----------------------------------------------------------------------------------------------

std::uint16_t local_port(const Socket& socket) {
    sockaddr_in address{};
    socklen_t size = sizeof address;
    ::getsockname(socket.descriptor(), reinterpret_cast<sockaddr*>(&address), &size);
    return ntohs(address.sin_port);
}

// A client, what it went through, and what it saw that nobody may see, whatever fails.
struct Actor {
    explicit Actor(std::string its_name) : name(std::move(its_name)) {}

    void enter(int port, std::string_view target, std::string_view headers = {}) {
        client = std::make_unique<Client>(port, target, headers);
        if (client->raw) local = local_port(client->raw.socket());
        if (client->is_open()) return;
        disturbed = true;
        if (client->head.empty()) judge_end();
        else if (client->head.compare(0, 10, "HTTP/1.1 5") != 0)
            wrong = "a handshake was answered with " + client->head;
    }
    bool takes_part() const { return client != nullptr && client->is_open() && !disturbed; }
    // The next message, or nothing, and it takes part no more.
    std::optional<std::string> hear() {
        auto message = client->next();
        if (!message) {
            disturbed = true;
            judge_end();
        }
        return message;
    }
    void expect(std::string_view wanted) {
        if (!takes_part()) return;
        const auto message = hear();
        if (message && *message != wanted) wrong = "heard '" + message->substr(0, 20) + "' for " + std::string(wanted);
    }
    // The connection ends now, with that code.
    void expect_close(CloseCode code) {
        if (!takes_part()) return;
        const CloseCode got = client->close_code();
        disturbed = got != code;
        if (disturbed) judge_end();
        client->raw.read_to_end();
    }
    // A connection ends by a Close frame, a FIN or a reset, and nothing before that is broken.
    void judge_end() {
        const CloseCause cause = client->connection.close_cause();
        if (cause == CloseCause::protocol_error) wrong = "got broken frames: " + client->connection.close_reason();
        else if (!client->raw.ended && cause != CloseCause::peer) wrong = "was left without an answer";
    }
    void leave() {
        if (client) client->raw.close();
    }

    std::string name;
    std::unique_ptr<Client> client;
    std::uint16_t local = 0;
    std::vector<std::string> heard;
    bool disturbed = false;
    std::string wrong;
};

// Whether what arrived is no more than the beginning of the answer with that status and body, or a refusal that is
// whole: a 404 where the error is one that stays, because caches may keep it, and otherwise a 5xx.
bool excusable(std::string_view got, int status, std::string_view body, int error) {
    const std::size_t end = got.find("\r\n\r\n");
    if (end == std::string_view::npos) return true;
    const std::string_view head = got.substr(0, end + 2), rest = got.substr(end + 4);
    const std::string length = "\r\nContent-Length: ";
    const std::size_t at = head.find(length);
    if (at == std::string_view::npos) return false;
    const std::size_t promised = std::stoul(std::string(head.substr(at + length.size())));
    const bool stays = error == EACCES || error == ENOENT;
    if (head.compare(9, 3, std::to_string(status)) != 0)
        return (head[9] == '5' || (stays && head.compare(9, 3, "404") == 0)) && rest.size() == promised;
    return promised == body.size() && rest == body.substr(0, rest.size());
}

// ---- the scenario ---------------------------------------------------------------------------------------------------

// Sockets: five in a room, one who reads slowly, one who does not read, pages, refusals, endings of every kind, a
// newcomer, and the end of the server. Chat: three with a ChatHandler, one of whom goes and comes back.
enum class Play { sockets, chat };

class Scenario {
public:
    Scenario(const std::array<Plan, 2>& plans, Victims victims, Ending ending = Ending::shutdown,
             Play which = Play::sockets)
        : plan_(plans[0]), victims_(victims) {
        folder().leave_stale_socket();
        const std::size_t descriptors = open_descriptors();
        const long blocks = faults::live_blocks();
        {
            Subject subject(plans, ending);
            if (subject.port != 0 && which == Play::sockets) play(subject);
            if (subject.port != 0 && which == Play::chat) play_chat(subject);
            subject.end();
            subject.join();
            judge(subject);
            calls = subject.seam;
        }
        if (open_descriptors() != descriptors) complain("descriptors were lost");
        if (faults::live_blocks() != blocks) complain("memory was lost");
    }

    // Whether the first plan has come into effect.
    bool fired() const { return calls.calls_of(plan_.call) >= plan_.first; }
    const std::string& complaints() const { return complaints_; }

    Seam calls;

private:
    static constexpr int members = 5;
    static constexpr int rounds = 3;

    void complain(const std::string& sentence) { complaints_ += sentence + "\n"; }
    Actor& add(std::string name) {
        actors_.push_back(std::make_unique<Actor>(std::move(name)));
        return *actors_.back();
    }

    void play(Subject& subject) {
        port_ = subject.port;
        for (int i = 0; i < members; ++i) add("member " + std::to_string(i)).enter(port_, "/room");
        Actor& slow = add("the slow one");
        Actor& deaf = add("the deaf one");
        for (Actor* actor : {&slow, &deaf}) actor->enter(port_, "/desk");
        if (slow.takes_part()) slow.client->send("pieces 14");
        if (deaf.takes_part()) deaf.client->send("pieces 60");
        chat();
        std::this_thread::sleep_for(2ms);  // a server that spins has the time to show it
        read_slowly(slow);
        find_end(deaf);
        pages();
        endings();
        newcomer();
        end(subject);
    }

    void play_chat(Subject& subject) {
        port_ = subject.port;
        for (int i = 0; i < 3; ++i) add("chatter " + std::to_string(i)).enter(port_, "/chat/tea?name=" + chatter(i));
        for (int i = 0; i < 3; ++i) speak(member(i), "hello " + std::to_string(i));
        for (const std::string command : {"/nick Cleo", "/msg Bert psst", "/join coffee", "/who", "/me waves"})
            if (member(2).takes_part()) member(2).client->send(command);
        hear_of(member(2), "waves");
        member(2).leave();
        Actor& back = add("chatter 2 again");
        back.enter(port_, "/chat/tea?name=" + chatter(2));
        speak(back, "hello again");
        newcomer();
        speak(member(0), "the last word");
        end(subject);
    }
    static std::string chatter(int i) { return i == 0 ? "Anna" : i == 1 ? "Bert" : "Carl"; }
    // Says something and hears it.
    static void speak(Actor& actor, const std::string& words) {
        if (actor.takes_part()) actor.client->send(words);
        hear_of(actor, words);
    }
    static void hear_of(Actor& actor, const std::string& words) {
        while (actor.takes_part()) {
            const auto heard = actor.hear();
            if (heard && heard->find(words) != std::string::npos) return;
        }
    }

    Actor& member(int i) { return *actors_[static_cast<std::size_t>(i)]; }
    static std::string message(int from, int number) { return std::to_string(from) + ":" + std::to_string(number); }

    // Everybody says something in each round, and hears everybody.
    void chat() {
        for (int round = 0; round < rounds; ++round)
            for (int i = 0; i < members; ++i)
                if (member(i).takes_part()) member(i).client->send(message(i, round));
        for (int i = 0; i < members; ++i) hear_own(i, rounds - 1);
        // What the others have said in time lies before one's own last word.
        for (int i = 0; i < members; ++i)
            if (member(i).takes_part()) member(i).client->send(message(i, rounds));
        for (int i = 0; i < members; ++i) hear_own(i, rounds);
        for (int i = 0; i < members; ++i) judge_heard(i);
    }
    void hear_own(int i, int number) {
        while (member(i).takes_part()) {
            const auto heard = member(i).hear();
            if (heard) member(i).heard.push_back(*heard);
            if (heard == message(i, number)) return;
        }
    }
    // Of each of the others the first so many messages in their order; all of them where both were let alone.
    void judge_heard(int i) {
        std::array<int, members> next{};
        for (const std::string& heard : member(i).heard) {
            const int from = heard.empty() ? members : heard[0] - '0';
            if (from < 0 || from >= members || heard != message(from, next[static_cast<std::size_t>(from)]++))
                return complain(member(i).name + " heard '" + heard + "' out of order");
        }
        for (int from = 0; from < members; ++from)
            if (!member(i).disturbed && !member(from).disturbed && next[static_cast<std::size_t>(from)] < rounds)
                complain(member(i).name + " missed what member " + std::to_string(from) + " said");
    }

    void read_slowly(Actor& slow) {
        for (int i = 0; i < 14; ++i) hear_piece(slow, i);
        for (const auto& [order, answer] : {std::pair{"post", "posted"}, std::pair{"timer", "timed"}}) {
            if (slow.takes_part()) slow.client->send(order);
            slow.expect(answer);
        }
    }
    static bool hear_piece(Actor& actor, int number) {
        if (!actor.takes_part()) return false;
        const auto heard = actor.hear();
        if (!heard) return false;
        const std::string start = std::to_string(number) + ":";
        if (heard->compare(0, start.size(), start) != 0 || heard->size() != piece_size)
            actor.wrong = "heard '" + heard->substr(0, 20) + "' for piece " + start;
        return true;
    }
    // What was queued for one who does not read, and then the reason why there is no more.
    static void find_end(Actor& deaf) {
        if (!deaf.takes_part()) return;
        int number = 0;
        while (hear_piece(deaf, number)) ++number;
        if (deaf.client->connection.close_code() != CloseCode::policy_violation) return;
        deaf.disturbed = false;
        if (number == 0) deaf.wrong = "was closed for what was not written";
    }

    void pages() {
        fetch("/page", 200, folder().content);
        fetch("/files/page.html", 200, folder().content);
        fetch("/made", 200, made_page());
        fetch("/nowhere", 404, "There is nothing at this path.\n");
        fetch("/nowhere", 404, "There is no WebSocket at this path.\n",
              "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
              "dGhlIHNhbXBsZSBub25jZQ==\r\n");
    }
    void fetch(const std::string& path, int status, std::string_view body,
               const std::string& headers = "Connection: close\r\n") {
        Actor& actor = add("the reader of " + path);
        RawClient raw(port_);
        if (raw) actor.local = local_port(raw.socket());
        raw.send("GET " + path + " HTTP/1.1\r\nHost: x\r\n" + headers + "\r\n");
        raw.read_to_end();
        const std::string line = "HTTP/1.1 " + std::to_string(status) + " ";
        const std::size_t begin = raw.received.find("\r\n\r\n");
        if (begin != std::string::npos && raw.received.compare(0, line.size(), line) == 0 &&
            std::string_view(raw.received).substr(begin + 4) == body)
            return;
        actor.disturbed = true;
        if (!raw.ended) actor.wrong = "was left without an answer";
        else if (!excusable(raw.received, status, body, plan_.error))
            actor.wrong = "got " + raw.received.substr(0, 300);
    }

    void endings() {
        Actor& rude = add("the rude one");
        rude.enter(port_, "/desk");
        if (rude.takes_part()) rude.client->raw.send(hex("81 05 48 65 6c 6c 6f"));  // not masked
        rude.expect_close(CloseCode::protocol_error);
        Actor& thrower = add("the one who makes it throw");
        thrower.enter(port_, "/desk");
        if (thrower.takes_part()) thrower.client->send("throw");
        thrower.expect_close(CloseCode::internal_error);
        Actor& closed = add("the one who is closed");
        closed.enter(port_, "/desk");
        if (closed.takes_part()) closed.client->send("close");
        closed.expect_close(CloseCode{4001});
        if (member(1).takes_part()) member(1).client->close();
        member(1).expect_close(CloseCode::normal);
        if (member(2).takes_part()) member(2).client->raw.reset();
        if (member(3).takes_part()) member(3).client->raw.shutdown_send();
        if (member(3).takes_part()) member(3).client->raw.read_to_end();
        for (const auto& actor : actors_)
            if (actor != actors_[0]) actor->leave();
    }

    // Whatever has failed, somebody who comes later is served.
    void newcomer() {
        for (long attempt = 0; attempt <= plan_.times; ++attempt) {
            Actor& actor = add("a newcomer");
            actor.enter(port_, "/desk");
            if (actor.takes_part()) actor.client->send("post");
            actor.expect("posted");
            const bool served = actor.takes_part();
            actor.leave();
            if (served) return;
        }
        complain("nobody is served afterwards");
    }

    void end(Subject& subject) {
        RawClient idle(port_);
        subject.end();
        Actor& last = member(0);
        while (last.takes_part() && last.hear()) continue;
        if (last.client->connection.close_code() == CloseCode::going_away) last.disturbed = false;
        for (const auto& actor : actors_) actor->leave();
        if (!idle.read_to_end()) complain("a connection is left open at the end");
    }

    void judge(const Subject& subject) {
        if (!subject.refusal.empty()) return judge_refusal(subject);
        if (!subject.thrown.empty()) complain("run() threw: " + subject.thrown);
        if (subject.port == 0) complain("the port is not known");
        if (subject.tally.opened != subject.tally.closed || subject.tally.closed_twice != 0)
            complain("open() and on_close() do not pair");
        const Metrics& metrics = subject.metrics;
        if (metrics.connections_open != 0 || metrics.websockets_open != 0 || metrics.backlog_bytes != 0)
            complain("the metrics know of connections that are gone");
        const long waits = subject.seam.calls_of(Call::epoll_wait) + subject.seam.calls_of(Call::poll);
        if (waits > most_waits) complain("it has spun: " + std::to_string(waits) + " turns");
        judge_actors(subject.seam);
    }
    void judge_refusal(const Subject& subject) {
        if (subject.seam.faults == 0) complain("the set-up failed without a fault: " + subject.refusal);
        if (subject.refusal == "no sentence") complain("the set-up failed without a sentence");
    }
    void judge_actors(const Seam& seam) {
        long others = 0;
        for (const auto& actor : actors_) {
            if (!actor->wrong.empty()) complain(actor->name + " " + actor->wrong);
            if (!actor->disturbed) continue;
            if (victims_ == Victims::one && ++others <= seam.faults) continue;
            if (victims_ == Victims::connection && seam.has_hit(actor->local)) continue;
            complain(actor->name + " was disturbed");
        }
    }

    static constexpr long most_waits = 2000;

    const Plan plan_;
    const Victims victims_;
    int port_ = 0;
    std::vector<std::unique_ptr<Actor>> actors_;  // the members first
    std::string complaints_;
};

std::string to_string(const Plan& plan) {
    if (plan.call == Call::count) return "nothing";
    const bool short_count = plan.error == 0;
    std::string text = std::string(faults::to_string(plan.call)) + " " + std::to_string(plan.first);
    if (plan.times > 1) text += " to " + std::to_string(plan.first + plan.times - 1);
    return text + (short_count ? " with a short count" : " with " + os::error_text(plan.error));
}

// Fails the first such call, then the second, and so on, until the scenario has come to its end without a fault.
// Whatever else is to fail, fails each time.
void sweep(Plan plan, Victims victims, Ending ending = Ending::shutdown, const Plan& each_time = {}, long step = 1,
           Play which = Play::sockets) {
    for (bool fired = true; fired; plan.first += step) {
        const Scenario scenario({plan, each_time}, victims, ending, which);
        fired = scenario.fired();
        CAPTURE(to_string(plan));
        CHECK(scenario.complaints() == "");
    }
}

struct Row {
    Call call;
    Victims victims;
    std::vector<int> errors;  // 0: a short count
};
// With WSCHAT_TEST_FAULTS=all every call fails in every way; else, where there are many, only each so-manieth in some.
long step_of(long step) {
    const char* wanted = std::getenv("WSCHAT_TEST_FAULTS");
    return wanted != nullptr && std::string(wanted) == "all" ? 1 : step;
}

// Each call fails with the first error; with the others, and several times, about sixteen of them, not the same ones.
void sweep_each(const Row& row) {
    static const Seam clean = Scenario({}, Victims::none).calls;
    long turn = 0;
    for (const int error : row.errors)
        for (const long times : {1, 8}) {
            const long step = turn == 0 ? 1 : step_of(1 + clean.calls_of(row.call) / 16);
            sweep({row.call, error, 1 + turn++ % step, times}, row.victims, Ending::shutdown, {}, step);
        }
}

// The calls that this run makes: those of the other poller are not.
bool made(Call call) {
    const bool poll = test::poller_kind() == PollerKind::poll;
    if (call == Call::ring_init) return WSCHAT_LIBURING != 0;
    if (call == Call::ring_submit || call == Call::ring_wait) return false;  // it is for more than are in the room
    const bool epoll = call == Call::epoll_create || call == Call::epoll_ctl || call == Call::epoll_wait;
    return call == Call::poll ? poll : !epoll || !poll;
}

}  // namespace

TEST_SUITE_BEGIN("faults");

TEST_CASE("the scenario runs clean where nothing fails, and makes every call that there is") {
    for (const Ending ending : {Ending::shutdown, Ending::signal}) {
        const Scenario scenario({}, Victims::none, ending);
        CHECK(scenario.complaints() == "");
        CHECK(scenario.calls.faults == 0);
        for (std::size_t i = 0; i < faults::call_count; ++i) {
            CAPTURE(faults::to_string(static_cast<Call>(i)));
            CHECK((scenario.calls.calls[i] != 0) == made(static_cast<Call>(i)));
        }
    }
}

// ---- reading and writing --------------------------------------------------------------------------------------------

TEST_CASE("a receive that is interrupted, comes too early or finds the kernel short of memory is made again") {
    sweep_each({Call::recv, Victims::none, {EINTR, EAGAIN, ENOBUFS, ENOMEM}});
}

TEST_CASE("a receive that fails costs its connection") {
    sweep_each(
        {Call::recv, Victims::connection, {ECONNRESET, ECONNREFUSED, ENOTCONN, ETIMEDOUT, EHOSTUNREACH, EINVAL}});
}

TEST_CASE("bytes that are received one by one are the same bytes") { sweep_each({Call::recv, Victims::none, {0}}); }

TEST_CASE("a send that is interrupted, finds no room or the kernel short of memory is made again") {
    for (const Call call : {Call::send, Call::sendmsg})
        sweep_each({call, Victims::none, {EINTR, EAGAIN, ENOBUFS, ENOMEM}});
}

TEST_CASE("a send that fails costs its connection") {
    for (const Call call : {Call::send, Call::sendmsg})
        sweep_each({call, Victims::connection, {ECONNRESET, EPIPE, ENOTCONN, ETIMEDOUT, EHOSTUNREACH, EINVAL}});
}

TEST_CASE("bytes that are sent one by one are the same bytes") {
    for (const Call call : {Call::send, Call::sendmsg}) sweep_each({call, Victims::none, {0}});
}

TEST_CASE("a stream that can not be shut or closed properly ends nevertheless") {
    sweep({Call::shutdown, ENOTCONN}, Victims::none);
    sweep({Call::shutdown, ENOBUFS}, Victims::none);
    sweep_each({Call::close, Victims::none, {EINTR, EIO}});
}

// ---- accepting ------------------------------------------------------------------------------------------------------

TEST_CASE("an accept that is interrupted, has nothing or is refused is made again") {
    sweep_each({Call::accept, Victims::none, {EINTR, EAGAIN, EPERM, ENETDOWN}});
}

TEST_CASE("a connection that was aborted before it was accepted costs nobody else") {
    sweep_each({Call::accept, Victims::connection, {ECONNABORTED, EPROTO}});
}

TEST_CASE("where the kernel is short of memory, accepting goes on a little later") {
    sweep({Call::accept, ENOBUFS}, Victims::none);
    sweep({Call::accept, ENOMEM}, Victims::none);
}

TEST_CASE("where descriptors are used up, who comes next is turned away with a 503, and accepting goes on") {
    sweep({Call::accept, EMFILE}, Victims::connection);
    sweep({Call::accept, ENFILE}, Victims::connection);
}

TEST_CASE("as long as nothing can be accepted the server does not spin, and serves who is connected") {
    for (const int error : {EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM}) {
        CAPTURE(os::error_text(error));
        folder().leave_stale_socket();
        Subject subject({Plan{Call::accept, error, 2, std::numeric_limits<long>::max()}, Plan{}});
        REQUIRE(subject.port != 0);
        Client connected(subject.port, "/desk");
        REQUIRE(connected.is_open());
        const Time begin = Clock::now();
        RawClient waiting(subject.port);
        waiting.send("GET /page HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        for (int i = 0; i < 20; ++i) {
            std::this_thread::sleep_for(5ms);  // for a server that spins to show it
            connected.send("post");
            CHECK(connected.next() == "posted");
        }
        const long calls = subject.heal(Call::accept);
        // A batch of 64 at most, then a pause of 50 ms.
        CHECK(calls <= ((Clock::now() - begin) / 50ms + 3) * 66);
        CHECK(waiting.read_to_end());
        CHECK(waiting.received.substr(0, 12) == "HTTP/1.1 200");
    }
}

TEST_CASE("a limit of descriptors that can not be asked for limits nothing") {
    sweep_each({Call::getrlimit, Victims::none, {EPERM}});
}

// ---- polling --------------------------------------------------------------------------------------------------------

TEST_CASE("a wait that is interrupted is made again") {
    if (made(Call::poll)) sweep_each({Call::poll, Victims::none, {EINTR, ENOMEM}});
    else sweep_each({Call::epoll_wait, Victims::none, {EINTR}});
}

TEST_CASE("a connection that can not be watched is lost, and a listener is watched again") {
    if (made(Call::poll)) return;
    sweep_each({Call::epoll_ctl, Victims::connection, {ENOMEM, ENOSPC}});
    sweep({Call::epoll_ctl, ENOMEM}, Victims::connection, Ending::shutdown, {Call::accept, ENOBUFS, 3});
}

TEST_CASE("a pipe that wakes the loop is read and written again") {
    sweep_each({Call::write, Victims::none, {EINTR, EAGAIN, 0}});
}

// ---- the ring -------------------------------------------------------------------------------------------------------

TEST_CASE("a server whose kernel refuses a ring does without") {
    if (made(Call::ring_init)) sweep_each({Call::ring_init, Victims::none, {ENOMEM, EPERM, ENOSYS, EMFILE}});
}

TEST_CASE("what a ring has not taken is left to others, and what it may have taken is sent by nobody else") {
    const struct {
        Plan plan;
        bool taken, told;
    } table[] = {{{}, true, true},
                 {{Call::ring_submit, EINTR}, true, true},
                 {{Call::ring_submit, EAGAIN}, false, false},
                 {{Call::ring_submit, EBADF}, false, false},
                 {{Call::ring_wait, EINTR}, true, true},
                 {{Call::ring_wait, EBADF}, true, false}};  // where it has to be asked
    for (const auto& row : table) {
        CAPTURE(to_string(row.plan));
        const auto batch = SendBatch::make();
        if (!batch) return;  // it is not compiled in, or the kernel refuses a ring
        std::vector<std::pair<Socket, Socket>> pairs;
        pairs.reserve(SendBatch::min_items);  // the batch knows their places
        for (std::size_t i = 0; i < SendBatch::min_items; ++i) {
            int ends[2];
            REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
            pairs.emplace_back(Socket(ends[0]), Socket(ends[1]));
            batch->add(pairs.back().first, "hello", nullptr);
        }
        Seam seam;
        seam.plans[0] = row.plan;
        const Armed armed(&seam);
        std::size_t at = 0, lost = 0;
        batch->send([&](const SendBatch::Item& item) {
            char received[16];
            const std::size_t size = pairs[at++].second.receive(received, sizeof received).size;
            REQUIRE(item.sent.has_value() == row.taken);
            const bool done = row.taken && item.sent->outcome == IoResult::Outcome::done;
            if (done) CHECK(size == 5);
            else if (row.taken) CHECK(item.sent->outcome == IoResult::Outcome::error);
            else CHECK(size == 0);
            lost += row.taken && !done ? 1 : 0;
        });
        CHECK((lost != 0) == (row.taken && !row.told && seam.faults != 0));
    }
}

// ---- files ----------------------------------------------------------------------------------------------------------

TEST_CASE("a file that can not be opened or read costs who asked for it") {
    for (const Call call : {Call::open, Call::openat})
        sweep_each({call, Victims::one, {EINTR, EACCES, EIO, EMFILE, ENFILE, ENOMEM, ENOENT}});
    sweep_each({Call::fstat, Victims::one, {EIO, ENOMEM, EOVERFLOW}});
    sweep_each({Call::read, Victims::one, {EINTR, EAGAIN, EIO, ENOMEM}});
}

TEST_CASE("a file that is read byte by byte is the same file") { sweep_each({Call::read, Victims::none, {0}}); }

// ---- set-up ---------------------------------------------------------------------------------------------------------

TEST_CASE("a server that can not be set up says why and leaves nothing behind") {
    const Row rows[] = {
        {Call::socket, Victims::none, {EMFILE, ENFILE, ENOBUFS, ENOMEM, EACCES, EAFNOSUPPORT}},
        {Call::bind, Victims::none, {EADDRINUSE, EACCES, EADDRNOTAVAIL, ENOMEM}},
        {Call::listen, Victims::none, {EADDRINUSE}},
        {Call::getsockname, Victims::none, {ENOBUFS}},
        {Call::getaddrinfo, Victims::none, {EAI_AGAIN, EAI_MEMORY, EAI_FAIL}},
        {Call::setsockopt, Victims::none, {ENOMEM, ENOPROTOOPT}},
        {Call::pipe, Victims::none, {EMFILE, ENFILE}},
        {Call::epoll_create, Victims::none, {EMFILE, ENFILE, ENOMEM}},
        {Call::lstat, Victims::none, {EACCES, ENOENT, ENOMEM}},
        {Call::connect, Victims::none, {EACCES, EAGAIN, EINTR}},
        {Call::unlink, Victims::none, {EACCES, EROFS}},
        {Call::realpath, Victims::none, {EACCES, ENOMEM}},
    };
    for (const Row& row : rows) sweep_each(row);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

TEST_CASE("memory that can not be had costs the connection that wants it") {
    sweep({Call::allocate, ENOMEM}, Victims::one);
}

TEST_CASE("memory that can not be had for a while costs no more connections than that was asked for") {
    sweep({Call::allocate, ENOMEM, 1, 5}, Victims::one, Ending::shutdown, {}, step_of(4));
}

TEST_CASE("memory and descriptors that can not be had cost no more connections than they were asked for") {
    sweep({Call::allocate, ENOMEM}, Victims::one, Ending::shutdown, {Call::accept, EMFILE, 3}, step_of(8));
}

TEST_CASE("memory that a chat can not have costs the connection that wants it") {
    { const Scenario makes_what_is_kept({}, Victims::none, Ending::shutdown, Play::chat); }
    const Scenario clean({}, Victims::none, Ending::shutdown, Play::chat);
    CHECK(clean.complaints() == "");
    for (const long times : {1, 5})
        sweep({Call::allocate, ENOMEM, 1, times}, Victims::one, Ending::shutdown, {}, times == 1 ? 1 : step_of(3),
              Play::chat);
}

TEST_CASE("a signal that finds no memory ends the server as any other") {
    sweep({Call::allocate, ENOMEM}, Victims::one, Ending::signal, {}, step_of(4));
}

TEST_SUITE_END();
