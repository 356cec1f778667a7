// A whole server on a kernel of the fuzzer's making: peers that connect, send, read slowly, hang up and reset; calls that
// fail; memory that runs out; handlers that do anything in any callback. The server must not crash, spin, sleep for
// ever, lose a descriptor, or let open() and on_close() come but in pairs, and what it sends must be legal.
//
// Input: two bytes for the options, then steps. Each begins with a byte that says what happens (see Script::step()); a
// byte or two choose the peer and how much, and texts come with a count. The steps go on while the server waits.
#include "kernel.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;
using namespace std::chrono_literals;
using wschat::CloseCode;
using wschat::Limits;
using wschat::Message;
using wschat::Opcode;
using wschat::Request;
using wschat::Response;
using wschat::Server;
using wschat::WriteStatus;

constexpr std::size_t large = 20'000;  // bytes of a large message of ours

class Member;

// What the harness knows of the run.
struct World {
    Kernel kernel;
    Server* server = nullptr;
    std::vector<std::shared_ptr<Peer>> peers;
    std::vector<Member*> members;  // all handlers that live
    std::size_t opened = 0, closed = 0;
    bool raw = false;        // bytes were sent that are no request of ours
    bool disturbed = false;  // a call has failed, or memory, or there were no descriptors
    bool stopped = false;    // a handler has stopped the loop
    bool in_callback = false;
};
World* world = nullptr;

// ---- handlers -------------------------------------------------------------------------------------------------------

// Marks a callback: none runs within another.
class Callback {
public:
    Callback() {
        check(!world->in_callback, "a callback runs within another");
        world->in_callback = true;
    }
    Callback(const Callback&) = delete;
    Callback& operator=(const Callback&) = delete;
    ~Callback() { world->in_callback = false; }
};

// Does in each callback what its request says: a letter for each of seven; and in on_message what the message says.
class Member final : public wschat::WebSocketHandler {
public:
    Member() {
        const Spared spared;
        world->members.push_back(this);
    }
    ~Member() override {
        check(!opened_ || closed_, "a handler is destroyed that was opened and not closed");
        const Spared spared;
        world->members.erase(std::find(world->members.begin(), world->members.end(), this));
    }

    std::optional<Response> prepare(const Request& request) override {
        const Callback callback;
        check(!opened_ && !is_open(), "prepare() comes after open()");
        const char what = wish(0);
        if (what == 'R') return Response(401, "Who are you?\n");
        if (what == 'L') return Response::redirect(request.target());
        act(what);
        return std::nullopt;
    }
    std::string select_subprotocol(const std::vector<std::string_view>& offered) override {
        const Callback callback;
        check(!opened_, "select_subprotocol() comes after open()");
        const char what = wish(1);
        act(what);
        return what == 'X' ? "not offered" : std::string(offered.back());
    }
    void open() override {
        const Callback callback;
        check(!opened_ && is_open(), "open() comes twice, or where it is not open");
        opened_ = true;
        ++world->opened;
        check_address();
        room("lobby").join(*this);
        act(wish(2));
    }
    void on_message(const Message& message) override {
        const Callback callback;
        check_live();
        check(message.binary() || slow_utf8(message.text()), "a text is not UTF-8", message.text());
        const std::string copy(message.data());
        const char what = copy.empty() ? '\0' : copy[0];
        if (what >= 'a' && what <= 'z') act(what);
        else room("lobby").broadcast(message);
        check(copy == message.data(), "a message changes while it is handled");
    }
    void on_close() override {
        const Callback callback;
        check(opened_ && !closed_, "on_close() comes twice, or without open()");
        closed_ = true;
        ++world->closed;
        check(close_cause() != wschat::CloseCause::none, "what is closed has no cause");
        check(!is_open() && write_message("x") == WriteStatus::closed, "what is closed takes a message");
        for (wschat::Room* each : rooms()) check(!each->has(*this), "a room has a member that is closed");
        act(wish(3));
        check(!room("lobby").join(*this), "what is closed joins a room");
    }
    void on_ping(std::string_view payload) override {
        const Callback callback;
        check_live();
        check(payload.size() <= 125, "a ping is too long");
        act(wish(4));
    }
    void on_pong(std::string_view payload) override {
        const Callback callback;
        check_live();
        check(payload.size() <= 125, "a pong is too long");
        act(wish(5));
    }
    void on_drain() override {
        const Callback callback;
        check_live();
        act(wish(6));
    }

    bool opened() const { return opened_; }
    bool closed() const { return closed_; }

private:
    void check_live() const { check(opened_ && !closed_, "a callback comes before open() or after on_close()"); }
    char wish(std::size_t callback) const {
        const std::string_view wishes = request().header("x-do");
        return callback < wishes.size() ? wishes[callback] : '\0';
    }

    // The address of the peer, or where that is a proxy of ours the last one that the proxies name.
    void check_address() const {
        const Spared spared;
        if (world->raw) return;
        const std::string_view number = request().header("x-peer");
        std::string client = world->peers[std::strtoul(std::string(number).c_str(), nullptr, 10)]->address;
        std::vector<std::string> hops = split(request().header("x-forwarded-for"), ',');
        const auto trusted = [](const std::string& address) {
            return address == "unix" || address.substr(0, 3) == "10.";
        };
        while (trusted(client) && !hops.empty()) {
            const std::string hop = trim(hops.back());
            hops.pop_back();
            if (hop.empty()) continue;
            const auto address = wschat::IpAddress::parse(hop);
            if (!address) break;
            client = address->to_string();
        }
        const auto plain = wschat::IpAddress::parse(client);
        check_same(remote_address(), plain ? plain->to_string() : client, "the address of a client is another");
    }

    void expect(WriteStatus status, bool was_open) const {
        if (!was_open) check(status == WriteStatus::closed, "a message is taken where nothing is open");
    }
    static void expect_error(void (*call)(Member&), Member& member) {
        try {
            call(member);
        } catch (const wschat::Error&) {
            return;
        }
        check(world->disturbed, "what a caller must not do is no Error");  // for which there may be no memory
    }

    void act(char what) {
        const bool was_open = is_open();
        wschat::Room& lobby = room("lobby");
        switch (what) {
            case 'a': lobby.broadcast("all", this); break;
            case 'b': lobby.broadcast(std::string(large, 'B'), nullptr, Opcode::binary); break;
            case 'c': close(1000, "bye"); break;
            case 'd': throw std::runtime_error("on purpose");
            case 'e': throw 7;
            case 'f': expect(write_message("text"), was_open); break;
            case 'g': expect(write_message(std::string(large, 'G')), was_open); break;
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

// ---- what happens ---------------------------------------------------------------------------------------------------

class Script {
public:
    explicit Script(Choices& choices) : choices_(choices) {}

    // Until something takes time, or it is the server's turn. False: all is over.
    bool run() {
        check_server();
        while (!choices_.over())
            if (!step()) return true;
        if (!std::exchange(over_, true)) {
            end();
            return true;
        }
        check(++turns_at_end_ < 3000, "the server does not end");
        return false;
    }

private:
    // False: what comes next comes after the server's turn.
    bool step() {
        Kernel& kernel = world->kernel;
        kernel.progress();
        switch (choices_.byte() % 19) {
            case 0: return false;
            case 1: connect(); break;
            case 2: request(connect(), true); break;
            case 3: request(peer(), false); break;
            case 4: request(peer(), true); break;
            case 5: raw(peer()); break;
            case 6: frame(peer()); break;
            case 7: peer().fin = true; break;
            case 8: reset(peer()); break;
            case 9: window(peer()); break;
            case 10: piece(peer()); break;
            case 11: pass(); return false;
            case 12: fault(); break;
            case 13:
                world->disturbed = true;
                kernel.descriptor_limit = choices_.byte() % 2 == 0 ? kernel.open_descriptors() : Peer::any;
                break;
            case 14:
                kernel.fail_in = 1 + choices_.byte();
                world->disturbed = true;
                break;
            case 15: stop(); break;
            case 16: post(); break;
            case 17: message(peer()); break;
            case 18: kernel.file_size = choices_.byte() * std::size_t{300}; break;
        }
        return true;
    }

    Peer& connect() {
        constexpr const char* addresses[] = {"127.0.0.1",   "10.0.0.1",    "192.0.2.7",
                                             "2001:db8::1", "2001:db8::2", "unix"};
        const auto made = std::make_shared<Peer>();
        made->address = addresses[choices_.byte() % 6];
        if (world->peers.size() < 40) world->kernel.backlog.push_back(made);
        world->peers.push_back(made);
        last_ = world->peers.size() - 1;
        return *made;
    }
    Peer& peer() {
        if (world->peers.empty()) return connect();
        last_ = choices_.byte() % world->peers.size();
        return *world->peers[last_];
    }

    // For a page, or for an upgrade; most are as they should be.
    void request(Peer& peer, bool upgrade) {
        constexpr const char* targets[] = {"/chat",
                                           "/",
                                           "/page",
                                           "/files/page.html",
                                           "/files/sub",
                                           "/files/none",
                                           "/files/%2e",
                                           "/none",
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
                                        "X-Forwarded-For: ::1\r\n",
                                        "Transfer-Encoding: chunked\r\n",
                                        "Host: again\r\n",
                                        "If-None-Match: *\r\n",
                                        "Origin: http://friend.example\r\n",
                                        "Bad Name: x\r\n"};
        const char* const target = targets[choices_.byte() % 16];
        const unsigned flags = choices_.byte();
        const char* const method = methods[flags < 192 ? 0 : flags % 4];
        std::string head = std::string(method) + " " + target + " HTTP/1." + (flags == 255 ? "0" : "1") +
                           "\r\nHost: home.example\r\n" + more[choices_.byte() % 16];
        if (upgrade)
            head +=
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        std::string wishes(choices_.bytes(choices_.byte() % 8));
        for (char& c : wishes) c = c >= '!' && c <= '~' ? c : 'a';
        head += "X-Peer: " + std::to_string(last_) + "\r\nX-Do: " + wishes + "\r\n\r\n";
        peer.sent += head;
    }
    void raw(Peer& peer) {
        peer.sent += choices_.counted_bytes();
        world->raw = true;
    }
    // As a client sends it, with a mask of zeros so that the fuzzer sees the payload.
    static void send(Peer& peer, unsigned first, std::string_view payload) {
        peer.sent += static_cast<char>(first);
        if (payload.size() < 126) {
            peer.sent += static_cast<char>(0x80 | payload.size());
        } else {
            peer.sent += '\xFE';
            peer.sent += static_cast<char>(payload.size() >> 8);
            peer.sent += static_cast<char>(payload.size() & 0xFF);
        }
        peer.sent.append(4, '\0').append(payload);
    }
    void frame(Peer& peer) {
        const unsigned first = choices_.byte();
        send(peer, first, choices_.counted_bytes());
    }
    // A whole message, small or large, that makes the handler act.
    void message(Peer& peer) {
        const char what = static_cast<char>('a' + choices_.byte() % 26);
        send(peer, 0x82, std::string(1, what) + std::string(choices_.byte() * std::size_t{100}, 'm'));
    }
    static void reset(Peer& peer) { peer.reset = peer.disturbed = true; }
    void window(Peer& peer) {
        peer.disturbed = true;
        const unsigned amount = choices_.byte();
        peer.window = amount == 255 ? Peer::any : amount * std::size_t{100};
    }
    void piece(Peer& peer) {
        peer.disturbed = true;
        const unsigned amount = choices_.byte();
        peer.piece = amount == 0 ? Peer::any : amount;
    }
    void pass() {
        constexpr std::chrono::milliseconds times[] = {1ms, 10ms, 50ms, 200ms, 1000ms, 2500ms, 10'000ms, 60'000ms};
        world->kernel.now += times[choices_.byte() % 8];
    }
    void fault() {
        struct Errors {
            Kernel::Call call;
            std::vector<int> errors;
        };
        static const Errors kinds[] = {
            {Kernel::Call::accept, {EINTR, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPROTO, EPERM, EAGAIN}},
            {Kernel::Call::receive, {EINTR, EAGAIN, ECONNRESET, ENOBUFS, ENOMEM, ETIMEDOUT}},
            {Kernel::Call::send, {EINTR, EAGAIN, ECONNRESET, EPIPE, ENOBUFS, ENOMEM}},
            {Kernel::Call::watch, {ENOMEM, ENOSPC}},
            {Kernel::Call::wait, {EINTR}},
            {Kernel::Call::open, {EMFILE, ENFILE, ENOENT, EACCES}},
            {Kernel::Call::read, {0, EIO, EINTR}}};
        world->disturbed = true;
        const Errors& kind = kinds[choices_.byte() % 7];
        world->kernel.faults[kind.call].push_back(kind.errors[choices_.byte() % kind.errors.size()]);
    }
    void stop() {
        const unsigned how = choices_.byte();
        if (how % 2 == 0) world->server->shutdown(how * 10ms);
        else wschat::detail::WakeUp::wake(world->server->loop().wake_descriptor(), SIGTERM);
    }
    void post() {
        const unsigned which = choices_.byte();
        if (world->members.empty()) return;
        Member& member = *world->members[which % world->members.size()];
        if (!member.opened()) return;
        const wschat::HandlerRef ref = member.ref();
        if (which < 64) ref.close(CloseCode::going_away, "by reference");
        else ref.write_message("by reference");
    }

    // Nothing fails any more, half of the peers take all, and the server is to end.
    void end() {
        Kernel& kernel = world->kernel;
        kernel.faults.clear();
        kernel.descriptor_limit = Peer::any;
        kernel.fail_in = 0;
        for (std::size_t i = 0; i < world->peers.size(); ++i) {
            world->peers[i]->piece = Peer::any;
            if (i % 2 == 0) world->peers[i]->window = Peer::any;
        }
        world->server->shutdown(3s);
        kernel.progress();
    }

    // What holds whenever the server has done all that it can.
    void check_server() {
        const wschat::ServerLimits& server_limits = world->server->server_limits();
        const wschat::Metrics metrics = world->server->metrics();
        check(metrics.connections_open == world->kernel.open_streams(), "the server forgets a connection");
        check(metrics.connections_open <= server_limits.max_connections + 32, "there are more connections than there may be");
        check(metrics.websockets_open == world->opened - world->closed, "open() and on_close() are not what is open");
        check(metrics.backlog_bytes <= server_limits.max_total_backlog, "all backlogs together are over their limit",
              std::to_string(metrics.backlog_bytes));
        const Limits& limits = world->server->limits();
        for (Member* member : world->members)
            check(member->buffered_amount() <= limits.max_backlog + 30'000, "a backlog is over its limit",
                  std::to_string(member->buffered_amount()));
        for (const std::string& name : world->server->rooms().names()) {
            wschat::Room* const room = world->server->rooms().find(name);
            if (room == nullptr) continue;
            for (wschat::WebSocketHandler& handler : *room) {
                auto* const member = static_cast<Member*>(&handler);
                check(std::count(world->members.begin(), world->members.end(), member) == 1 && !member->closed(),
                      "a room has a member that is gone");
            }
        }
    }

    Choices& choices_;
    std::size_t last_ = 0;
    bool over_ = false;
    int turns_at_end_ = 0;
};

// ---- the server -----------------------------------------------------------------------------------------------------

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
    const Spared spared;
    const std::string line = to_string(entry);
    check(std::all_of(line.begin(), line.end(), [](char c) { return c >= ' ' && c <= '~'; }),
          "a line of the log has what may forge another", line);
}

void set_up(Server& server, unsigned choice) {
    server.route<Member>("/chat");
    server.route<Member>("/room/{name}");
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
    server.listen(0);
}

// ---- what the peers have got ----------------------------------------------------------------------------------------

// RFC 6455 5: what a server sends is whole, unmasked and in the shortest form, and after a Close come only pongs.
void check_frames(std::string_view bytes) {
    for (bool closed = false; bytes.size() >= 2;) {
        const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
        const unsigned opcode = byte(0) & 0x0F, form = byte(1);
        check(byte(0) == (0x80 | opcode) && (opcode == 1 || opcode == 2 || (opcode >= 8 && opcode <= 10)),
              "a frame that was sent is illegal", bytes.substr(0, 20));
        check(form <= 127 && (opcode < 8 || form <= 125), "a frame that was sent is masked, or too long for its kind");
        const std::size_t more = form == 126 ? 2 : form == 127 ? 8 : 0;
        if (bytes.size() < 2 + more) return;
        std::size_t size = more == 0 ? form : 0;
        for (std::size_t i = 0; i < more; ++i) size = size << 8 | byte(2 + i);
        check(more == 0 || size >= (more == 2 ? 126 : 65536), "a length that was sent is not in its shortest form");
        check(!closed || opcode == 10, "something follows our Close frame");
        if (bytes.size() < 2 + more + size) return;
        const std::string_view payload = bytes.substr(2 + more, size);
        check(opcode != 1 || slow_utf8(payload), "a text that was sent is not UTF-8", payload);
        if (opcode == 8 && size != 0)
            check(size >= 2 &&
                      may_be_sent(static_cast<unsigned char>(payload[0]) * 256u +
                                  static_cast<unsigned char>(payload[1])) &&
                      slow_utf8(payload.substr(2)),
                  "a Close frame that was sent is illegal", payload);
        closed = closed || opcode == 8;
        bytes.remove_prefix(2 + more + size);
    }
}

// The heads of answers, each a line of status and fields, up to the first body whose length one can not tell.
void check_received(const Peer& peer) {
    constexpr int documented[] = {101, 200, 301, 302, 304, 400, 401, 403, 404, 405,
                                  408, 413, 414, 421, 426, 431, 500, 501, 503, 505};
    const std::string_view bytes = peer.received;
    const std::size_t end = bytes.find("\r\n\r\n");
    if (end == std::string_view::npos) return;
    const std::string_view head = bytes.substr(0, end + 2), after = bytes.substr(end + 4);
    check(head.substr(0, 9) == "HTTP/1.1 ", "an answer does not begin as one", head);
    const int status = std::atoi(std::string(head.substr(9, 3)).c_str());
    check(std::count(std::begin(documented), std::end(documented), status) == 1,
          "an answer has a status that is not documented", head);
    const std::string_view lines = head.substr(head.find('\n') + 1);
    for (std::string_view rest = lines; !rest.empty();) {
        const std::string_view line = wschat::text::consume_until(rest, '\n');
        check(line.size() > 1 && line.back() == '\r' &&
                  wschat::detail::field_line_error(line.substr(0, line.size() - 1)) == nullptr,
              "an answer has a line that is no field", line);
    }
    const wschat::Fields fields(lines);
    if (status == 101) return check_frames(after);
    const auto length = fields.find("content-length");
    check(length.has_value() == (status != 304), "an answer has no length", head);
    check(status != 405 || fields.find("allow"), "a 405 has no Allow", head);
    check(status != 426 || fields.find("sec-websocket-version") == "13", "a 426 does not say which version", head);
    check(status < 400 || (length != "0" && (after.empty() || after[0] != '\n')), "a refusal has no sentence", head);
    // A body is whole, or left out for HEAD, wherever nothing has kept the server from sending it.
    if (status >= 400 && length && !world->disturbed && !peer.disturbed)
        check(after.empty() || after.size() >= std::strtoul(std::string(*length).c_str(), nullptr, 10),
              "a refusal is cut", head);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Choices choices(data, size);
    const unsigned choice = choices.byte();
    World here;
    world = &here;
    kernel = &here.kernel;
    Script script(choices);
    here.kernel.script = [&] { return script.run(); };
    {
        Server server(options_of(choice));
        here.server = &server;
        set_up(server, choice);
        try {
            server.run();
        } catch (const std::exception& error) {
            fail("an exception leaves run()", error.what());
        }
        heap.fail_in = 0;
        const wschat::Metrics metrics = server.metrics();
        if (!here.stopped) {
            check(metrics.connections_open == 0 && here.members.empty(), "run() ends before the connections");
            check(metrics.websockets_open == 0 && metrics.backlog_bytes == 0 && metrics.rooms == 0,
                  "something is left");
        }
        check(metrics.connections_accepted + metrics.connections_refused >= here.kernel.accepted,
              "a connection is not counted");
        check(metrics.bytes_received == here.kernel.bytes_in, "not all bytes are counted that came");
        check(metrics.websockets_opened == here.opened, "not all connections are counted that opened");
    }
    check(here.opened == here.closed && here.members.empty(), "open() and on_close() do not pair");
    check(here.kernel.open_descriptors() == 0, "a descriptor is not closed",
          std::to_string(here.kernel.open_descriptors()));
    for (const auto& peer : here.peers) check_received(*peer);
    kernel = nullptr;
    world = nullptr;
    return 0;
}
