// A whole server on a simulated kernel: peers connect, send, read slowly, hang up and reset. Calls fail, memory runs
// out, and handlers call anything in any callback. The server must not crash, spin, wait forever or lose a descriptor.
// Calls of open() and on_close() must pair, and the sent bytes must be valid.
//
// Input: a byte for the options, then steps. A step begins with a byte for its kind (see Script::step()). A byte or
// two select the peer and an amount; a text has a count. The script continues while the server waits.
#define WSCHAT_CHAT 1
#include "kernel.hpp"
#include "reference.hpp"
#if WSCHAT_OPENSSL
#include "tls_client.hpp"
#endif

namespace {

using namespace fuzz;
using namespace std::chrono_literals;

constexpr std::size_t large = 20'000;  // bytes of a large message of the harness

class Member;

// The state of one run.
struct World {
    Kernel kernel;
    Server* server = nullptr;
    std::vector<std::shared_ptr<Peer>> peers;
#if WSCHAT_OPENSSL
    std::vector<std::unique_ptr<TlsClient>> tls;  // of each peer
#endif
    std::vector<Member*> members;  // all live handlers
    std::size_t opened = 0, closed = 0;
    std::size_t large_messages = 300;  // that the handlers may still write
    bool raw = false;                  // raw bytes were sent, which may not be a request of the harness
    bool faults_injected = false;      // a call, an allocation or a descriptor was made to fail
    bool stopped = false;              // a handler has stopped the loop
    wschat::Client* client = nullptr;  // on the loop of the server, to which it connects
    bool connected = false;            // it was used
    std::size_t failures = 0;          // of its attempts
    std::size_t bots = 0;              // its live handlers
    bool chat_failed = false;          // a handler of the chat was made, and may have failed before on_connect()
    bool in_callback = false;
};
World* world = nullptr;

// What a peer has received, decrypted.
std::string_view received_by(std::size_t index) {
    const std::string_view bytes = world->peers[index]->received;
#if WSCHAT_OPENSSL
    if (bytes.substr(0, 5) != "HTTP/") return world->tls[index]->received;
#endif
    return bytes;
}

// ---- handlers ------------------------------------------------------------------------------------------------------

// Checks that no callback runs within another.
class CallbackScope {
public:
    CallbackScope() {
        check(!world->in_callback, "a callback runs within another");
        world->in_callback = true;
    }
    CallbackScope(const CallbackScope&) = delete;
    CallbackScope& operator=(const CallbackScope&) = delete;
    ~CallbackScope() { world->in_callback = false; }
};

// The X-Do header of the request has one letter for each of seven callbacks. A message can also name an action.
class Member final : public wschat::WebSocketHandler {
public:
    Member() {
        const HarnessAllocations guard;
        world->members.push_back(this);
    }
    ~Member() override {
        check(!opened_ || closed_, "a handler is destroyed between open() and on_close()");
        const HarnessAllocations guard;
        world->members.erase(std::find(world->members.begin(), world->members.end(), this));
    }

    std::optional<Response> prepare(const Request& request) override {
        const CallbackScope scope;
        check(!opened_ && !is_open(), "prepare() is called after open()");
        const char action_letter = action(0);
        if (action_letter == 'R') return Response(401, "Who are you?\n");
        if (action_letter == 'L') return Response::redirect(request.target());
        run_action(action_letter);
        return std::nullopt;
    }
    std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
        const CallbackScope scope;
        check(!opened_, "select_subprotocol() is called after open()");
        const char action_letter = action(1);
        run_action(action_letter);
        return action_letter == 'X' ? "not offered" : std::string(offered.back());
    }
    void open() override {
        const CallbackScope scope;
        check(!opened_ && is_open(), "open() is called twice, or while is_open() is false");
        opened_ = true;
        ++world->opened;
        check_address();
        room("lobby").join(*this);
        run_action(action(2));
    }
    void on_message(const Message& message) override {
        const CallbackScope scope;
        check_live();
        check(message.binary() || reference_utf8(message.text()), "a text message is not UTF-8", message.text());
        const std::string copy(message.data());
        const char action_letter = copy.empty() ? '\0' : copy[0];
        if (action_letter >= 'a' && action_letter <= 'z') run_action(action_letter);
        else room("lobby").broadcast(message);
        check(copy == message.data(), "a message changes during on_message()");
    }
    void on_close() override {
        const CallbackScope scope;
        check(opened_ && !closed_, "on_close() is called twice, or without open()");
        closed_ = true;
        ++world->closed;
        check(close_cause() != wschat::CloseCause::none, "a closed connection has no cause");
        check(!is_open() && write_message("x") == WriteStatus::closed, "a closed connection accepts a message");
        for (wschat::Room* each : rooms()) check(!each->has(*this), "a room has a closed member");
        run_action(action(3));
        check(!room("lobby").join(*this), "a closed connection joins a room");
    }
    void on_ping(std::string_view payload) override {
        const CallbackScope scope;
        check_live();
        check(payload.size() <= 125, "a ping is too long");
        run_action(action(4));
    }
    void on_pong(std::string_view payload) override {
        const CallbackScope scope;
        check_live();
        check(payload.size() <= 125, "a pong is too long");
        run_action(action(5));
    }
    void on_drain() override {
        const CallbackScope scope;
        check_live();
        run_action(action(6));
    }

    bool opened() const { return opened_; }
    bool closed() const { return closed_; }

private:
    void check_live() const { check(opened_ && !closed_, "a callback runs before open() or after on_close()"); }
    char action(std::size_t index) const {
        const std::string_view actions = request().header("x-do");
        return index < actions.size() ? actions[index] : '\0';
    }

    // The address of the peer, or for a trusted proxy the last address in X-Forwarded-For or Forwarded that is not
    // trusted.
    void check_address() const {
        const HarnessAllocations guard;
        const std::string_view number = request().header("x-peer");
        if (world->raw || number.empty()) return;  // the client of the harness has no number
        std::string client = world->peers[std::strtoul(std::string(number).c_str(), nullptr, 10)]->address;
        const bool forwarded = request().header("x-forwarded-for").empty();
        std::vector<std::string> hops = split(request().header(forwarded ? "forwarded" : "x-forwarded-for"), ',');
        const auto trusted = [](const std::string& address) {
            return address == "unix" || address.substr(0, 3) == "10.";
        };
        while (trusted(client) && !hops.empty()) {
            std::string hop = trim(hops.back());
            hops.pop_back();
            if (hop.empty()) continue;
            if (forwarded) hop = hop.substr(4, hop.find(';') - 4);  // after "for="
            hop = address_in_hop(hop);
            const auto address = wschat::IpAddress::parse(hop);
            if (!address) break;
            client = address->to_string();
        }
        const auto plain = wschat::IpAddress::parse(client);
        check_equal(remote_address(), plain ? plain->to_string() : client, "remote_address() is wrong");
    }

    void expect(WriteStatus status, bool was_open) const {
        if (!was_open) check(status == WriteStatus::closed, "a closed connection accepts a message");
    }
    static void expect_error(void (*call)(Member&), Member& member) {
        try {
            call(member);
        } catch (const wschat::Error&) {
            return;
        }
        check(world->faults_injected, "a wrong call does not throw an Error");  // an Error needs memory
    }

    // A handler that writes a large message in on_drain() to a peer that reads all would never end.
    static bool take_large() { return world->large_messages != 0 && world->large_messages-- != 0; }

    void run_action(char action_letter) {
        const bool was_open = is_open();
        wschat::Room& lobby = room("lobby");
        switch (action_letter) {
            case 'a': lobby.broadcast("all", this); break;
            case 'b':
                if (take_large()) lobby.broadcast(std::string(large, 'B'), nullptr, Opcode::binary);
                break;
            case 'c': close(1000, "bye"); break;
            case 'd': throw std::runtime_error("on purpose");
            case 'e': throw 7;
            case 'f': expect(write_message("text"), was_open); break;
            case 'g':
                if (take_large()) expect(write_message(std::string(large, 'G')), was_open);
                break;
            case 'h': expect(ping("h"), was_open); break;
            case 'i': room("other").join(*this); break;
            case 'j': lobby.leave(*this); break;
            case 'k':
                for (WebSocketHandler& member : lobby) member.close(4000, "all out");
                break;
            case 'l':
                for (WebSocketHandler& member : lobby) lobby.leave(member);
                break;
            case 'm': loop().post([self = ref()] { self.write_message("posted"); }); break;
            case 'n': loop().call_later(100ms, [self = ref()] { self.close(CloseCode{3000}); }); break;
            case 'o': ref().post([](WebSocketHandler& self) { self.room("lobby").broadcast("by reference"); }); break;
            case 'p': server().shutdown(500ms); break;
            case 'q': write_json({{"a", 1}}); break;
            case 'r':
                if (take_large())
                    for (WebSocketHandler& member : lobby) member.write_message(std::string(large, 'R'));
                break;
            case 's': expect_error([](Member& member) { member.close(1005); }, *this); break;
            case 't': expect_error([](Member& member) { member.write_message("\xFF"); }, *this); break;
            case 'u': expect_error([](Member& member) { member.ping(std::string(126, 'p')); }, *this); break;
            case 'v': set_nodelay(false); break;
            case 'w': throw std::bad_alloc();
            case 'x': loop().call_later(0s, [] { throw std::runtime_error("in a timer"); }); break;
            case 'y': room("other").broadcast_json({{"room", "other"}}); break;
            case 'z':
                world->stopped = true;
                loop().stop();
                break;
            default: break;
        }
    }

    bool opened_ = false;
    bool closed_ = false;
};

// A user of the chat. If memory runs out in open(), on_connect() is not called.
class Talker final : public wschat::ChatHandler {
public:
    Talker() { world->chat_failed = true; }
    void on_connect() override {
        ++world->opened;
        world->chat_failed = world->faults_injected;
    }
    void on_disconnect() override { ++world->closed; }
    bool may(wschat::ChatAction) override { return true; }
};

// The client's role, on the same loop. It says what the request says, answers half of what it gets, and then closes.
class Bot final : public wschat::WebSocketHandler {
public:
    explicit Bot(unsigned its_words) : words_(its_words) { ++world->bots; }
    ~Bot() override {
        check(!opened_ || closed_, "a handler of a client is destroyed between open() and on_close()");
        --world->bots;
    }
    void open() override {
        const CallbackScope scope;
        check(!opened_ && !failed_, "open() of a client is called twice, or after on_failure()");
        opened_ = true;
        ++world->opened;
        write_message(std::string(1, static_cast<char>('A' + words_ % 26)) +
                      std::string(words_ * std::size_t{20}, 'b'));
    }
    void on_message(const Message& message) override {
        const CallbackScope scope;
        check(opened_ && !closed_, "a client gets a message before open() or after on_close()");
        check(message.binary() || reference_utf8(message.text()), "a client gets a text that is not UTF-8");
        if (++messages_ > words_ % 8) close(CloseCode{4000}, "enough");
        else if (messages_ % 2 == 0) write_message("Again");
        if (words_ % 32 == 31) throw std::runtime_error("on purpose");
    }
    void on_close() override {
        const CallbackScope scope;
        check(opened_ && !closed_, "on_close() of a client is called twice, or without open()");
        closed_ = true;
        ++world->closed;
        check(write_message("x") == WriteStatus::closed, "a closed client accepts a message");
    }
    void on_failure(const wschat::ConnectError& error) override {
        const CallbackScope scope;
        check(!opened_ && !failed_ && !error.sentence.empty(), "a failure of a client comes twice, or has no text");
        failed_ = true;
        ++world->failures;
    }

private:
    const unsigned words_;
    unsigned messages_ = 0;
    bool opened_ = false, closed_ = false, failed_ = false;
};

// ---- the script ----------------------------------------------------------------------------------------------------

class Script {
public:
    explicit Script(InputReader& input) : input_(input) {}

    // Runs steps until time passes or the server must run. Returns false when the script is finished.
    bool run() {
        check_server();
        if (run_clients()) return true;
        while (!input_.empty())
            if (!step()) return true;
        if (!std::exchange(unhindered_, true)) {
            unhinder();
            return true;
        }
        // The server is idle if it waits and the script runs for the second time.
        const bool idle = std::exchange(last_wait_, world->kernel.waits) == world->kernel.waits;
        if (!finished_ && !idle) return true;
        if (!std::exchange(finished_, true)) {
            check_answers();
            end();
            return true;
        }
        check(++turns_at_end_ < 3000, "the server does not end");
        return false;
    }

private:
    // Returns false if the server must run before the next step.
    bool step() {
        Kernel& kernel = world->kernel;
        kernel.progress();
        const unsigned kind = input_.byte() % (19 + tls_steps);
        switch (kind) {
            case 0: return false;
            case 1: connect(); break;
            case 2: request(connect(), true); break;
            case 3: request(peer(), false); break;
            case 4: request(peer(), true); break;
            case 5: raw(peer()); break;
            case 6: frame(peer()); break;
            case 7: peer().fin = true; break;
            case 8: reset(peer()); break;
            case 9: set_window(peer()); break;
            case 10: set_call_limit(peer()); break;
            case 11: advance_clock(); return false;
            case 12: fault(); break;
            case 13:
                world->faults_injected = true;
                kernel.descriptor_limit = input_.byte() % 2 == 0 ? kernel.open_descriptors() : Peer::unlimited;
                break;
            case 14:
                kernel.fail_after = 1 + input_.byte();
                world->faults_injected = true;
                break;
            case 15: stop(); break;
            case 16: post(); break;
            case 17: message(peer()); break;
            case 18: kernel.file_size = input_.byte() * std::size_t{300}; break;
            default: tls_step(kind - 19); break;
        }
        return true;
    }

#if WSCHAT_OPENSSL
    static constexpr unsigned tls_steps = 7;

    void tls_step(unsigned kind) {
        Peer& chosen = peer();
        TlsClient& client = *world->tls[last_];
        const unsigned amount = input_.byte();
        client.run();
        switch (kind) {
            case 0:
                for (unsigned i = 0; i <= amount / 4; ++i) client.update_keys(amount % 2 == 0);
                world->kernel.patience += static_cast<int>(amount / 4);  // a turn handles a few of them
                chosen.impaired = true;
                break;
            case 1: client.renegotiate(); break;
            case 2: client.close(); break;
            case 3: client.release = amount == 255 ? Peer::unlimited : amount; break;
            case 4: client.corrupt(amount); break;
            case 5: client.hold = amount % 2 == 0; break;
            case 6: client.tiny = amount; break;
        }
        if (client.broken) chosen.impaired = true;
    }
    static bool run_clients() {
        bool changed = false;
        for (const auto& client : world->tls) changed = client->run() || changed;
        return changed;
    }
    static void say(Peer&, std::size_t index, std::string_view bytes) { world->tls[index]->send(bytes); }
#else
    static constexpr unsigned tls_steps = 0;

    static void tls_step(unsigned) {}
    static bool run_clients() { return false; }
    static void say(Peer& peer, std::size_t, std::string_view bytes) { peer.sent += bytes; }
#endif

    Peer& connect() {
        constexpr const char* addresses[] = {"127.0.0.1",   "10.0.0.1",    "192.0.2.7",
                                             "2001:db8::1", "2001:db8::2", "unix"};
        const auto peer = std::make_shared<Peer>();
        const unsigned choice = input_.byte();
        peer->address = addresses[choice % 6];
        if (world->peers.size() < 40) world->kernel.backlog.push_back(peer);
        world->peers.push_back(peer);
#if WSCHAT_OPENSSL
        world->tls.push_back(std::make_unique<TlsClient>(*peer, choice / 6 % 2 == 1));
#endif
        last_ = world->peers.size() - 1;
        return *peer;
    }
    Peer& peer() {
        if (world->peers.empty()) return connect();
        last_ = input_.byte() % world->peers.size();
        return *world->peers[last_];
    }

    // Sends a request for a page or an upgrade. Most are valid.
    void request(Peer& peer, bool upgrade) {
        constexpr const char* targets[] = {"/chat",
                                           "/",
                                           "/page",
                                           "/files/page.html",
                                           "/files/sub",
                                           "/files/none",
                                           "/files/%2e",
                                           "/talk/tea?name=Anna&key=12345678",
                                           "/throws",
                                           "/room/tea%20room",
                                           "//chat",
                                           "*",
                                           "/metrics",
                                           "/%zz",
                                           "http://other.example/chat",
                                           "/small"};
        constexpr const char* methods[] = {"GET", "HEAD", "POST", "get"};
        constexpr const char* more[] = {"",
                                        "Origin: http://home.example\r\n",
                                        "Origin: http://evil.example\r\n",
                                        "Origin: null\r\n",
                                        "Connection: close\r\n",
                                        "Content-Length: 3\r\n",
                                        "Sec-WebSocket-Protocol: a, b\r\n",
                                        "Sec-WebSocket-Extensions: permessage-deflate\r\n",
                                        "X-Forwarded-For: 10.0.0.9, 198.51.100.1, 10.0.0.2\r\n",
                                        "X-Forwarded-For: x, 10.0.0.2\r\n",
                                        "Forwarded: for=\"[::1]:443\";proto=https, for=10.0.0.2\r\n",
                                        "Transfer-Encoding: chunked\r\n",
                                        "Host: again\r\n",
                                        "If-None-Match: *\r\n",
                                        "Origin: http://friend.example\r\n",
                                        "Bad Name: x\r\n"};
        const char* const target = targets[input_.byte() % 16];
        const unsigned flags = input_.byte();
        const char* const method = methods[flags < 192 ? 0 : flags % 4];
        std::string head = std::string(method) + " " + target + " HTTP/1." + (flags == 255 ? "0" : "1") +
                           "\r\nHost: home.example\r\n" + more[input_.byte() % 16];
        if (upgrade)
            head +=
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        std::string actions(input_.bytes(input_.byte() % 8));
        for (char& c : actions) c = c >= '!' && c <= '~' ? c : 'a';
        head += "X-Peer: " + std::to_string(last_) + "\r\nX-Do: " + actions + "\r\n\r\n";
        say(peer, last_, head);
    }
    void raw(Peer& peer) {
        peer.sent += input_.counted_bytes();
        world->raw = true;
#if WSCHAT_OPENSSL
        peer.impaired = world->tls[last_]->broken = true;
#endif
    }
    // Sends a client's frame. Its mask is zero, so the fuzzer sees the payload.
    void send(Peer& peer, unsigned first, std::string_view payload) const {
        std::string frame(1, static_cast<char>(first));
        if (payload.size() < 126) {
            frame += static_cast<char>(0x80 | payload.size());
        } else {
            frame += '\xFE';
            frame += static_cast<char>(payload.size() >> 8);
            frame += static_cast<char>(payload.size() & 0xFF);
        }
        say(peer, last_, frame.append(4, '\0').append(payload));
    }
    void frame(Peer& peer) {
        const unsigned first = input_.byte();
        send(peer, first, input_.counted_bytes());
    }
    // Sends a message, small or large, that names an action.
    void message(Peer& peer) {
        const char action_letter = static_cast<char>('a' + input_.byte() % 26);
        send(peer, 0x82, std::string(1, action_letter) + std::string(input_.byte() * std::size_t{100}, 'm'));
    }
    static void reset(Peer& peer) { peer.reset = peer.impaired = true; }
    void set_window(Peer& peer) {
        peer.impaired = true;
        const unsigned amount = input_.byte();
        peer.window = amount == 255 ? Peer::unlimited : amount * std::size_t{100};
    }
    void set_call_limit(Peer& peer) {
        peer.impaired = true;
        const unsigned amount = input_.byte();
        peer.call_limit = amount == 0 ? Peer::unlimited : amount;
    }
    void advance_clock() {
        constexpr std::chrono::milliseconds times[] = {1ms, 10ms, 50ms, 200ms, 1000ms, 2500ms, 10'000ms, 60'000ms};
        world->kernel.now += times[input_.byte() % 8];
    }
    void fault() {
        struct Errors {
            Kernel::Operation call;
            std::vector<int> errors;
        };
        static const Errors kinds[] = {
            {Kernel::Operation::accept, {EINTR, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPROTO, EPERM, EAGAIN}},
            {Kernel::Operation::receive, {EINTR, EAGAIN, ECONNRESET, ENOBUFS, ENOMEM, ETIMEDOUT}},
            {Kernel::Operation::send, {EINTR, EAGAIN, ECONNRESET, EPIPE, ENOBUFS, ENOMEM}},
            {Kernel::Operation::watch, {ENOMEM, ENOSPC}},
            {Kernel::Operation::wait, {EINTR}},
            {Kernel::Operation::open, {EMFILE, ENFILE, ENOENT, EACCES}},
            {Kernel::Operation::read, {0, EIO, EINTR}}};
        world->faults_injected = true;
        const Errors& kind = kinds[input_.byte() % 7];
        world->kernel.faults[kind.call].push_back(kind.errors[input_.byte() % kind.errors.size()]);
    }
    void stop() {
        const unsigned amount = input_.byte();
        if (amount % 2 == 0) world->server->shutdown(amount * 10ms);
        else wschat::detail::WakeUp::wake(wschat::detail::LoopAccess::wake_descriptor(world->server->loop()), SIGTERM);
    }
    void post() {
        const unsigned which = input_.byte();
        if (which >= 200) return client(which);
        if (world->members.empty()) return;
        Member& member = *world->members[which % world->members.size()];
        if (!member.opened()) return;
        const wschat::HandlerRef ref = member.ref();
        if (which < 64) ref.close(CloseCode::going_away, "by reference");
        else ref.write_message("by reference");
    }

    // Makes a connection of the client, gives up all of them, or disturbs one.
    void client(unsigned which) {
        constexpr const char* paths[] = {"/chat", "/room/tea", "/small", "/page", "/throws", "/talk/tea?name=Bot"};
        std::vector<std::shared_ptr<Peer>>& links = world->kernel.outgoing;
        const unsigned amount = input_.byte();
        world->connected = true;
        if (which < 230 && world->kernel.outgoing.size() < 10) {
            const unsigned fault = input_.byte();
            constexpr int errors[] = {EINPROGRESS, ECONNREFUSED, EINTR, ENETUNREACH};
            if (fault < 4) world->kernel.faults[Kernel::Operation::connect].push_back(errors[fault]);
            world->faults_injected = world->faults_injected || fault < 4;
            wschat::ClientOptions options;
            options.tls.insecure_accept_any_certificate = true;
            options.connect_timeout = 2s;
            options.limits.ping_interval = options.limits.ping_timeout = 5s;
#if WSCHAT_OPENSSL
            const std::string scheme = "wss";
#else
            const std::string scheme = "ws";
#endif
            const HarnessAllocations guard;
            ids_.push_back(
                world->client->connect<Bot>(scheme + "://127.0.0.1:8888" + paths[amount % 6], options, amount));
        } else if (which < 234) {
            for (const auto id : ids_) world->client->disconnect(id);
        } else if (!links.empty()) {
            world->faults_injected = true;
            Peer& near = *links[amount % links.size()];
            const std::shared_ptr<Peer> far = near.other.lock();
            if (which < 240) near.window = amount * std::size_t{10};
            else if (which < 245) near.call_limit = 1 + amount % 100;
            else if (which < 250 && far) near.reset = far->reset = true;
            else if (!near.sent.empty()) near.sent[amount % near.sent.size()] ^= 1;
        }
    }

    // Stops all faults, and lets half of the peers read everything. They ping the server.
    void unhinder() {
        Kernel& kernel = world->kernel;
        kernel.faults.clear();
        kernel.descriptor_limit = Peer::unlimited;
        kernel.fail_after = 0;
        for (const auto& near : kernel.outgoing) near->window = near->call_limit = Peer::unlimited;
        for (std::size_t i = 0; i < world->peers.size(); ++i) {
            Peer& peer = *world->peers[i];
            peer.call_limit = Peer::unlimited;
#if WSCHAT_OPENSSL
            world->tls[i]->release = Peer::unlimited;
            world->tls[i]->hold = false;
            world->tls[i]->run();
#endif
            if (i % 2 != 0) continue;
            peer.window = Peer::unlimited;
            last_ = i;
            if (!ended(i) && received_by(i).substr(0, 12) == "HTTP/1.1 101") {
                send(peer, 0x89, "are you there?");
                pinged_.push_back(i);
            }
        }
        kernel.progress();
    }
    // The server is idle. Who has pinged it has a pong, or the connection is closing.
    void check_answers() const {
        if (world->faults_injected || world->raw || world->stopped) return;
        for (const std::size_t i : pinged_)
            check(ended(i) ||
                      received_by(i).find("\x8A\x0E"
                                          "are you there?") != std::string_view::npos ||
                      received_by(i).find('\x88') != std::string_view::npos,
                  "a ping of a peer that reads has no answer", std::to_string(i));
    }
    // True if no more answers can be expected.
    static bool ended(std::size_t index) {
        const Peer& peer = *world->peers[index];
#if WSCHAT_OPENSSL
        if (world->tls[index]->broken) return true;
#endif
        return peer.closed || peer.shut_down || peer.fin || peer.reset;
    }
    // Shuts the server down.
    void end() {
        world->server->shutdown(3s);
        world->kernel.progress();
    }

    // Checks the server while it waits.
    void check_server() {
        const wschat::ServerLimits& server_limits = world->server->server_limits();
        const wschat::Metrics metrics = world->server->metrics();
        // A client's socket becomes a connection of the loop with the response.
        check(metrics.connections_open == world->kernel.open_streams() ||
                  (world->connected && metrics.connections_open < world->kernel.open_streams()),
              "the server lost a connection");
        check(metrics.connections_open <= server_limits.max_connections + 32 + world->kernel.outgoing.size(),
              "there are too many connections");
        check(metrics.websockets_open == world->opened - world->closed || world->chat_failed,
              "websockets_open differs from the handlers");
        check(metrics.backlog_bytes <= server_limits.max_total_backlog, "the total backlog exceeds its limit",
              std::to_string(metrics.backlog_bytes));
        const Limits& limits = world->server->limits();
        for (Member* member : world->members)
            check(member->buffered_amount() <= limits.max_backlog + 30'000, "a backlog exceeds its limit",
                  std::to_string(member->buffered_amount()));
        for (const std::string& name : world->server->rooms().names()) {
            wschat::Room* const room = world->server->rooms().find(name);
            if (room == nullptr) continue;
            for (wschat::WebSocketHandler& handler : *room)
                check(std::any_of(world->members.begin(), world->members.end(),
                                  [&](const Member* member) { return member == &handler && !member->closed(); }),
                      "a room has a destroyed or closed member");
        }
    }

    InputReader& input_;
    std::size_t last_ = 0;
    bool unhindered_ = false;
    bool finished_ = false;
    std::size_t last_wait_ = 0;
    std::vector<std::size_t> pinged_;
    std::vector<wschat::Client::ConnectionId> ids_;
    int turns_at_end_ = 0;
};

// ---- the server ----------------------------------------------------------------------------------------------------

wschat::ServerOptions options_of(unsigned choice) {
    wschat::ServerOptions options;
    options.handle_signals = false;
    options.poller = choice % 2 == 0 ? wschat::PollerKind::automatic : wschat::PollerKind::poll;
    options.require_origin = (choice & 16) != 0;
    Limits& limits = options.limits;
    wschat::ServerLimits& server_limits = options.server_limits;
    server_limits.max_connections = 20;
    limits.backlog_policy = (choice & 2) == 0 ? wschat::BacklogPolicy::close : wschat::BacklogPolicy::drop;
    switch (choice / 4 % 4) {
        case 0: break;
        case 1:
            limits.handshake_timeout = limits.closing_timeout = limits.ping_timeout = 1s;
            limits.ping_interval = 2s;
            limits.linger_timeout = 500ms;
            limits.linger_bytes = 300;
            limits.max_request_line = 100;
            limits.max_header_bytes = 500;
            limits.max_header_fields = 12;
            limits.max_message_size = 2'000;
            limits.max_fragments = 3;
            limits.control_frames_per_second = 1;
            limits.control_frames_burst = 3;
            limits.max_backlog = 3'000;
            server_limits.max_total_backlog = 10'000;
            server_limits.max_connections = 3;
            server_limits.max_connections_per_address = 2;
            break;
        case 2:
            limits.max_backlog = 45'000;
            server_limits.max_total_backlog = 100'000;
            break;
        case 3:
            limits.handshake_timeout = limits.closing_timeout = limits.ping_interval = limits.ping_timeout =
                limits.linger_timeout = 0s;
            break;
    }
    return options;
}

void check_log(const wschat::LogEntry& entry) {
    const HarnessAllocations guard;
    const std::string line = to_string(entry);
    check(std::all_of(line.begin(), line.end(), [](char c) { return c >= ' ' && c <= '~'; }),
          "a log line has an unsafe character", line);
}

void set_up(Server& server, unsigned choice) {
    server.route<Member>("/chat");
    server.route<Member>("/room/{name}");
    server.route<Talker>("/talk/{room}");
    Limits small = server.limits();
    small.max_message_size = 100;
    small.max_backlog = 200;
    server.route<Member>("/small").set_limits(small);
    server.file("/", "/sim/page.html");
    server.static_dir("/files", "/sim");
    server.get("/page", [](const Request& request) { return Response::html(std::string(request.header("x-do"))); });
    server.get("/throws", [](const Request&) -> Response { throw std::runtime_error("on purpose"); });
    server.metrics_page("/metrics");
    server.allow_origins({"http://friend.example"});
    server.trusted_proxies({"10.0.0.0/8", "unix"});
    if ((choice & 32) != 0) server.allow_hosts({"home.example"});
    if ((choice & 64) != 0) server.on_log(check_log);
#if WSCHAT_OPENSSL
    server.listen_tls(0, {start_tls(), start_tls()});
#else
    server.listen(0);
#endif
}

// ---- the received bytes --------------------------------------------------------------------------------------------

// RFC 6455 5: frames of a server are unfragmented, unmasked and have the shortest length. After a Close frame only
// pongs follow.
void check_frames(std::string_view bytes) {
    for (bool closed = false; bytes.size() >= 2;) {
        const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
        const unsigned opcode = byte(0) & 0x0F, form = byte(1);
        check(byte(0) == (0x80 | opcode) && (opcode == 1 || opcode == 2 || (opcode >= 8 && opcode <= 10)),
              "a sent frame is invalid", bytes.substr(0, 20));
        check(form <= 127 && (opcode < 8 || form <= 125), "a sent frame is masked, or too long for its opcode");
        const std::size_t more = form == 126 ? 2 : form == 127 ? 8 : 0;
        if (bytes.size() < 2 + more) return;
        std::size_t size = more == 0 ? form : 0;
        for (std::size_t i = 0; i < more; ++i) size = size << 8 | byte(2 + i);
        check(more == 0 || size >= (more == 2 ? 126 : 65536), "a sent length does not have its shortest form");
        check(!closed || opcode == 10, "a frame follows the Close frame");
        if (bytes.size() < 2 + more + size) return;
        const std::string_view payload = bytes.substr(2 + more, size);
        check(opcode != 1 || reference_utf8(payload), "a sent text is not UTF-8", payload);
        if (opcode == 8 && size != 0)
            check(size >= 2 &&
                      sendable_close_code(static_cast<unsigned char>(payload[0]) * 256u +
                                          static_cast<unsigned char>(payload[1])) &&
                      reference_utf8(payload.substr(2)),
                  "a sent Close frame is invalid", payload);
        closed = closed || opcode == 8;
        bytes.remove_prefix(2 + more + size);
    }
}

// Checks the first response. An upgrade is followed by frames.
void check_received(const Peer& peer, std::string_view bytes) {
    constexpr int documented[] = {101, 200, 301, 302, 304, 400, 401, 403, 404, 405,
                                  408, 413, 414, 421, 426, 431, 500, 501, 503, 505};
    const std::size_t end = bytes.find("\r\n\r\n");
    if (end == std::string_view::npos) return;
    const std::string_view head = bytes.substr(0, end + 2), after = bytes.substr(end + 4);
    check(head.substr(0, 9) == "HTTP/1.1 ", "a response does not begin with HTTP/1.1", head);
    const int status = std::atoi(std::string(head.substr(9, 3)).c_str());
    check(std::count(std::begin(documented), std::end(documented), status) == 1,
          "a response has an undocumented status", head);
    const std::string_view lines = head.substr(head.find('\n') + 1);
    for (std::string_view rest = lines; !rest.empty();) {
        const std::string_view line = wschat::text::consume_until(rest, '\n');
        check(line.size() > 1 && line.back() == '\r' &&
                  wschat::detail::field_line_error(line.substr(0, line.size() - 1)) == nullptr,
              "a response has an invalid header line", line);
    }
    const wschat::Fields fields(lines);
    if (status == 101) return check_frames(after);
    const auto length = fields.find("content-length");
    check(length.has_value() == (status != 304), "a response has no Content-Length", head);
    check(status != 405 || fields.find("allow"), "a 405 has no Allow", head);
    check(status != 426 || fields.find("sec-websocket-version") == "13", "a 426 has no Sec-WebSocket-Version", head);
    check(status < 400 || (length != "0" && (after.empty() || after[0] != '\n')), "an error response has no text",
          head);
    // Without faults, a body is complete, or absent for HEAD.
    if (status >= 400 && length && !world->faults_injected && !peer.impaired)
        check(after.empty() || after.size() >= std::strtoul(std::string(*length).c_str(), nullptr, 10),
              "an error response is incomplete", head);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    InputReader input(data, size);
    const unsigned choice = input.byte();
    World run;
    world = &run;
    kernel = &run.kernel;
    Script script(input);
    run.kernel.script = [&] { return script.run(); };
    {
        Server server(options_of(choice));
        run.server = &server;
        set_up(server, choice);
        wschat::Client client(server.loop());
        run.client = &client;
        try {
            server.run();
        } catch (const std::exception& error) {
            fail("an exception leaves run()", error.what());
        }
        heap.fail_after = 0;
        const wschat::Metrics metrics = server.metrics();
        if (!run.stopped) {
            check(metrics.connections_open == 0 && run.members.empty(), "run() returns before all connections end");
            check(metrics.websockets_open == 0 && metrics.backlog_bytes == 0 && metrics.rooms == 0,
                  "metrics are not zero after run()");
        }
        check(metrics.connections_accepted + metrics.connections_refused >= run.kernel.accepted,
              "a connection is missing in the metrics");
        check(run.connected || metrics.bytes_received == run.kernel.bytes_in,
              "received bytes are missing in the metrics");
        check(metrics.websockets_opened == run.opened || run.chat_failed,
              "opened connections are missing in the metrics");
    }
    check(run.bots == 0, "a handler of a client is never destroyed");
    check(run.opened == run.closed && run.members.empty(), "open() and on_close() do not pair");
    check(run.kernel.open_descriptors() == 0, "a descriptor is still open",
          std::to_string(run.kernel.open_descriptors()));
    for (std::size_t i = 0; i < run.peers.size(); ++i) check_received(*run.peers[i], received_by(i));
    kernel = nullptr;
    world = nullptr;
    return 0;
}
