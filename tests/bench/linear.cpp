// Work whose cost must be linear in what a peer sends.   linear [CASE]
//
// For scripts/check_linear.py, under callgrind: each case runs with n and with 2n, and dumps the instructions of each
// run under the name "case/1" or "case/2". The script holds the ratio under 2.5. A case measures only what it wraps in
// a Measured object, and reaches the same code as the server does.
#define WSCHAT_CHAT 1
#include "../../wschat.hpp"

#include <valgrind/callgrind.h>

namespace {

using namespace wschat;

// ---- measuring -----------------------------------------------------------------------------------------------------

// Counts the instructions of its scope.
class Measured {
public:
    Measured() { CALLGRIND_TOGGLE_COLLECT; }
    Measured(const Measured&) = delete;
    Measured& operator=(const Measured&) = delete;
    ~Measured() { CALLGRIND_TOGGLE_COLLECT; }
};

// Keeps the compiler from removing what computes the value.
volatile std::size_t sink = 0;

void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "linear: %s\n", what);
    std::exit(1);
}

std::string repeated(std::size_t count, std::string_view text) {
    std::string all;
    for (std::size_t i = 0; i < count; ++i) all += text;
    return all;
}

// "text0text1text2..."
std::string numbered(std::size_t count, std::string_view text, std::string_view end) {
    std::string all;
    for (std::size_t i = 0; i < count; ++i) ((all += text) += std::to_string(i)) += end;
    return all;
}

const Limits& no_limits() {
    static const Limits limits = [] {
        Limits large;
        large.max_request_line = large.max_header_bytes = large.max_header_fields = 100'000'000;
        large.max_message_size = large.max_fragments = large.max_backlog = 100'000'000;
        large.control_frames_per_second = 0;
        return large;
    }();
    return limits;
}

// ---- HTTP ----------------------------------------------------------------------------------------------------------

std::string upgrade_head(std::string_view target, std::string_view headers) {
    std::string head = detail::handshake_request("x", target, "dGhlIHNhbXBsZSBub25jZQ==");
    head.insert(head.size() - 2, headers);
    return head;
}

// Parses the request in pieces of this size.
Request parsed(std::string_view head, std::size_t piece = 64 * 1024, detail::HandshakeFields* fields = nullptr) {
    detail::RequestParser parser(no_limits());
    while (!head.empty()) {
        std::size_t consumed = 0;
        const auto outcome = parser.feed(head.substr(0, piece), consumed);
        if (fields != nullptr) *fields = parser.handshake();
        if (outcome == detail::RequestParser::Outcome::request) return parser.take_request();
        if (outcome == detail::RequestParser::Outcome::failure) break;
        head.remove_prefix(consumed);
    }
    require(false, "a request is not valid");
    return parser.take_request();
}

// What the server does with each upgrade request before it calls the handler.
void handle_upgrade(const std::string& head, std::size_t piece = 64 * 1024) {
    const Measured measured;
    detail::HandshakeFields fields;
    const Request request = parsed(head, piece, &fields);
    require(detail::wants_upgrade(fields), "a request is not an upgrade");
    sink = sink + (detail::reject_upgrade(request, fields) ? 1 : 0);
    sink = sink + request.fields().count("origin");
}

void header_fields(std::size_t n) { handle_upgrade(upgrade_head("/", numbered(n, "A", ": value\r\n"))); }
void header_bytes(std::size_t n) { handle_upgrade(upgrade_head("/", "A: " + std::string(n, 'x') + "\r\n"), 1); }
void target_bytes(std::size_t n) { handle_upgrade(upgrade_head("/" + repeated(n, "%20"), ""), 100); }
void subprotocols(std::size_t n) {
    handle_upgrade(upgrade_head("/", "Sec-WebSocket-Protocol: " + numbered(n, "p", ", ") + "p\r\n"));
}
void empty_elements(std::size_t n) {
    const std::string commas = std::string(n, ',') + "\r\n";
    handle_upgrade(upgrade_head("/", "Connection: " + commas + "Upgrade: " + commas));
}

void cookies(std::size_t n) {
    const Request request = parsed(upgrade_head("/", "Cookie: " + numbered(n, "name", "=\"value\"; ") + "a=b\r\n"));
    const Measured measured;
    sink = sink + (request.cookie("absent") ? 1 : 0);
}
void empty_cookies(std::size_t n) {
    const Request request = parsed(upgrade_head("/", "Cookie: " + repeated(n, "; =") + "\r\n"));
    const Measured measured;
    sink = sink + (request.cookie("absent") ? 1 : 0);
}
void query_arguments(std::size_t n) {
    const Request request = parsed(upgrade_head("/?" + numbered(n, "%41", "=b%20c&"), ""));
    const Measured measured;
    sink = sink + (request.query("absent") ? 1 : 0);
}

#if WSCHAT_ZLIB
void read_offers(const std::string& offers) {
    const Request request = parsed(upgrade_head("/", "Sec-WebSocket-Extensions: " + offers + "\r\n"));
    detail::CompressionPool pool;
    const Measured measured;
    sink = sink + pool.accept(request.fields(), CompressionOptions()).response.size();
}
void extension_offers(std::size_t n) { read_offers(repeated(n, "permessage-deflate; server_max_window_bits=7, ")); }
void extension_parameters(std::size_t n) { read_offers("permessage-deflate" + numbered(n, "; p", "=\"v\"")); }
void extension_commas(std::size_t n) { read_offers(std::string(n, ',')); }
#endif

void forwarded(std::size_t n) {
    const Request request = parsed(upgrade_head("/", "X-Forwarded-For: " + repeated(n, "10.1.2.3, ") + "10.1.2.3\r\n"));
    detail::Site site;
    site.trust_proxies({"10.0.0.0/8"});
    const IpAddress peer = *IpAddress::parse("10.0.0.1");
    const Measured measured;
    sink = sink + site.client(peer, request, false).address.to_string().size();
}
void entity_tags(std::size_t n) {
    const Request request = parsed(upgrade_head("/", "If-None-Match: " + numbered(n, "W/\"", "\", ") + "\"x\"\r\n"));
    const Measured measured;
    sink = sink + (detail::not_modified(request, "\"y\"", 0) ? 1 : 0);
}

void forwarded_header(std::size_t n) {
    const Request request = parsed(
        upgrade_head("/", "Forwarded: " + repeated(n, "for=\"[fd00::1]:80\";proto=https, ") + "for=10.1.2.3\r\n"));
    detail::Site site;
    site.trust_proxies({"10.0.0.0/8", "fd00::/8"});
    const IpAddress peer = *IpAddress::parse("10.0.0.1");
    const Measured measured;
    sink = sink + site.client(peer, request, false).address.to_string().size();
}
void forwarded_schemes(std::size_t n) {
    const Request request =
        parsed(upgrade_head("/", "X-Forwarded-For: " + repeated(n, "10.1.2.3, ") +
                                     "1.2.3.4\r\nX-Forwarded-Proto: " + repeated(n, "https,") + "http\r\n"));
    detail::Site site;
    site.trust_proxies({"10.0.0.0/8", "1.2.3.4"});
    const IpAddress peer = *IpAddress::parse("10.0.0.1");
    const Measured measured;
    sink = sink + site.client(peer, request, false).scheme.size();
}
void ranges(std::size_t n) {
    const Request request = parsed(upgrade_head("/", "Range: bytes=" + numbered(n, "", "-,") + "0-1\r\n"));
    const Measured measured;
    for (int i = 0; i < 40; ++i) sink = sink + static_cast<std::size_t>(detail::requested_range(request, 100).end);
}
#if WSCHAT_OPENSSL
void signed_cookie(std::size_t n) {
    const std::string value = "2|1:0|10:1700000000|4:name|" + std::to_string(n) + ":" + std::string(n, 'A') + "|";
    const Request request = parsed(upgrade_head("/", "Cookie: name=" + value + std::string(64, '0') + "\r\n"));
    const CookieSigner signer("a key of sixteen bytes");
    const Measured measured;
    sink = sink + (signer.get(request, "name") ? 1 : 0);
}
#endif

// A request with a body, in pieces of 100 bytes.
Request with_body(const std::string& fields, std::string_view bytes) {
    static const Limits limits = [] {
        Limits large = no_limits();
        large.max_body = 100'000'000;
        return large;
    }();
    detail::BodyParser parser(parsed("POST / HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n"), limits);
    auto outcome = detail::BodyParser::Outcome::need_more;
    while (!bytes.empty() && outcome == detail::BodyParser::Outcome::need_more) {
        std::size_t consumed = 0;
        outcome = parser.feed(bytes.substr(0, 100), consumed);
        bytes.remove_prefix(consumed);
    }
    require(outcome == detail::BodyParser::Outcome::body, "a body is not complete");
    return parser.take_request();
}
std::string content(const char* type, const std::string& body) {
    return std::string("Content-Type: ") + type + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n";
}
void body_bytes(std::size_t n) {
    const std::string body(n, 'x');
    const Measured measured;
    sink = sink + with_body(content("text/plain", body), body).body().size();
}
void body_chunks(std::size_t n) {
    const std::string body = repeated(n, "2\r\nab\r\n") + "0\r\n\r\n";
    const Measured measured;
    sink = sink + with_body("Transfer-Encoding: chunked\r\n", body).body().size();
}
void body_trailers(std::size_t n) {
    const std::string body = "0\r\n" + numbered(n, "A", ": b\r\n") + "\r\n";
    const Measured measured;
    sink = sink + with_body("Transfer-Encoding: chunked\r\n", body).body().size();
}
void form_fields(std::size_t n) {
    const std::string body = numbered(n, "a%41", "=b%20c&") + "last=1";
    const Request request = with_body(content("application/x-www-form-urlencoded", body), body);
    const Measured measured;
    sink = sink + request.form_all("absent").size() + (request.form("last") ? 1 : 0);
}
void form_parts(std::size_t n) {
    const std::string body =
        numbered(n, "--B\r\nContent-Disposition: form-data; name=\"a", "\"\r\n\r\nvalue\r\n") + "--B--";
    const Request request = with_body(content("multipart/form-data; boundary=B", body), body);
    const Measured measured;
    sink = sink + request.form_parts().size() + (request.form("absent") ? 1 : 0);
}
// Lines that are almost the delimiter.
void form_delimiters(std::size_t n) {
    const std::string delimiter(70, 'B');
    const std::string body =
        "--" + delimiter + "\r\n\r\n\r\n" + repeated(n, "\r\n--" + delimiter.substr(1)) + "\r\n--" + delimiter + "--";
    const Request request = with_body(content(("multipart/form-data; boundary=" + delimiter).c_str(), body), body);
    const Measured measured;
    sink = sink + request.form_parts().size();
}
// What a server sends to the client of section 15, in pieces of 100 bytes.
void response_fields(std::size_t n) {
    const std::string head = "HTTP/1.1 101 Switching Protocols\r\n" + numbered(n, "A", ": value\r\n") + "\r\n";
    const Measured measured;
    detail::ResponseParser parser(no_limits());
    auto outcome = detail::ResponseParser::Outcome::need_more;
    for (std::string_view rest = head; !rest.empty();) {
        std::size_t consumed = 0;
        outcome = parser.feed(rest.substr(0, 100), consumed);
        rest.remove_prefix(consumed);
    }
    require(outcome == detail::ResponseParser::Outcome::response, "a response is not complete");
    sink = sink + parser.fields().count("upgrade");
}
void proxy_header(std::size_t n) {
    std::string header("\r\n\r\n\0\r\nQUIT\n\x20\0", 14);
    header += static_cast<char>(n >> 8 & 0xFF);
    header += static_cast<char>(n & 0xFF);
    header += std::string(n, '\0');
    const Measured measured;
    detail::ProxyHeader parser;
    for (const char& byte : header) {
        std::size_t consumed = 0;
        require(parser.feed({&byte, 1}, consumed) != detail::ProxyHeader::Outcome::failure, "a header is not valid");
    }
}

struct Silent final : WebSocketHandler {
    void on_message(const Message&) override {}
};

// Finds no route for a path. Half of the patterns have parameters.
void find_route(std::size_t routes, const std::string& path) {
    detail::Site site;
    for (std::size_t i = 0; i < routes; ++i) {
        std::string pattern = (i % 2 == 0 ? "/room" : "/{a}/{b}/c") + std::to_string(i);
        site.routes.add("route", detail::Pattern("route", pattern), [] { return std::make_unique<Silent>(); });
    }
    const std::string head = upgrade_head(path, "");
    const Measured measured;
    const Request request = parsed(head);
    sink = sink + (site.routes.find(request.raw_path()) == nullptr ? 1 : 0);
    sink = sink + (site.folder_redirect(request) ? 1 : 0);
}
void slashes(std::size_t n) { find_route(100, std::string(n, '/')); }
void segments(std::size_t n) { find_route(100, repeated(n, "/a")); }
void long_segment(std::size_t n) { find_route(100, "/" + std::string(n, 'a')); }
void escaped_path(std::size_t n) { find_route(100, "/" + repeated(n, "%72")); }
void folder_path(std::size_t n) {
    const std::string path = repeated(n, "/a");
    const detail::Pattern pattern("static_dir", "/{path...}");
    const Measured measured;
    sink = sink + (pattern.matches(path) ? pattern.tail(path).size() : 0);
}

// n requests that arrive together, each answered by a page.
void pipelined_requests(std::size_t n) {
    ServerOptions options;
    options.handle_signals = false;
    options.limits.keep_alive_timeout = Duration::zero();  // an answer then has no line about it
    Server server(options);
    server.get("/", [](const Request&) { return Response(204); });
    server.listen(0);
    detail::Socket client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(server.port()));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    require(::connect(client.descriptor(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
            "a client cannot connect");
    const std::string requests = repeated(n, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    require(::send(client.descriptor(), requests.data(), requests.size(), 0) == static_cast<::ssize_t>(requests.size()),
            "the kernel does not take the requests");
    detail::os::make_nonblocking(client.descriptor());
    std::size_t answered = 0;
    server.loop().call_every(std::chrono::milliseconds(1), [&] {
        char bytes[64 * 1024];
        for (::ssize_t got = 0; (got = ::recv(client.descriptor(), bytes, sizeof bytes, 0)) > 0;)
            answered += static_cast<std::size_t>(std::count(bytes, bytes + got, '\n'));
        if (answered == 4 * n) server.shutdown(Duration::zero());  // an answer has four lines
    });
    const Measured measured;
    server.run();
}

// ---- frames --------------------------------------------------------------------------------------------------------

std::string masked(std::string_view first_byte, std::string_view payload) {
    return std::string(first_byte) + static_cast<char>(0x80 | payload.size()) + std::string(4, '\0') +
           std::string(payload);
}

// Feeds the input in pieces of this size, as a session does with its receive buffer. Returns the number of messages.
std::size_t receive(std::string input, std::size_t piece, std::unique_ptr<detail::Compression> compression = nullptr) {
    detail::SendArena arena;
    detail::Connection connection;
    connection.open(detail::Role::server, no_limits(), arena, Time(), nullptr, std::move(compression));
    std::size_t messages = 0;
    const Measured measured;
    for (std::size_t at = 0; at < input.size(); at += piece) {
        connection.receive(&input[at], (std::min)(piece, input.size() - at), Time());
        for (detail::Event event = connection.next_event(); event.kind != detail::Event::Kind::none;
             event = connection.next_event()) {
            require(event.kind != detail::Event::Kind::close, "a connection has failed");
            if (event.kind == detail::Event::Kind::message && ++messages % 256 == 0) {
                connection.pause_input();
                connection.resume_input();
            }
        }
        connection.output().consume(connection.output().size());
    }
    sink = sink + messages;
    return messages;
}

void fragments(std::size_t n) {
    require(receive(masked("\x01", "a") + repeated(n, masked({"\0", 1}, "b")) + masked("\x80", "c"), 64 * 1024) == 1,
            "there is not one message");
}
void empty_fragments(std::size_t n) {
    require(receive(masked("\x01", "") + repeated(n, masked({"\0", 1}, "")) + masked("\x80", ""), 7) == 1,
            "there is not one message");
}
void small_messages(std::size_t n) { require(receive(repeated(n, masked("\x81", "a")), 64 * 1024) == n, "lost"); }
void single_bytes(std::size_t n) { receive(repeated(n / 8, masked("\x81", "hi")), 1); }
void pings_in_a_message(std::size_t n) {
    receive(masked("\x01", "a") + repeated(n, masked("\x89", "ping") + masked({"\0", 1}, "b")), 64 * 1024);
}
void large_message(std::size_t n) {
    std::string frame = {'\x82', '\xff'};
    for (int shift = 56; shift >= 0; shift -= 8) frame += static_cast<char>(n >> shift & 0xFF);
    frame += std::string(4, '\0') + std::string(n, 'x');
    require(receive(std::move(frame), 1000) == 1, "there is not one message");
}

#if WSCHAT_ZLIB
void compressed(std::size_t n, std::size_t message, std::size_t piece) {
    CompressionOptions options;
    options.client_context_takeover = options.server_context_takeover = true;
    const std::string offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n";
    detail::CompressionPool pool;
    detail::Deflater deflater(6, 8, 15);
    std::string frames;
    for (std::size_t i = 0; i < n; ++i) {
        detail::Bytes block;
        const std::string text(message, static_cast<char>('a' + i % 26));
        frames += masked("\xc1", deflater.deflate(text, block, true));
    }
    receive(frames, piece, pool.accept(Fields(offer), options).compression);
}
void compressed_messages(std::size_t n) { compressed(n, 2000, 64 * 1024); }
void compressed_bytes(std::size_t n) { compressed(n, 2000, 1); }
#endif

// Output for a peer that does not read for n turns, and then reads it in small parts.
void queued_output(std::size_t n) {
    detail::SendArena arena;
    detail::SendQueue queue;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) {
        queue.append(detail::copy(arena, "one message of forty bytes, as an example"));
        const detail::Slice other = detail::copy(arena, "a message of another");
        queue.detach_from_pool();
    }
    std::string_view pieces[4];
    while (!queue.empty()) {
        queue.gather(pieces, 4);
        queue.consume((std::min)(queue.size(), std::size_t{30}));
    }
}
// The same without the copies that detach_from_pool() makes.
void queued_slices(std::size_t n) {
    detail::SendArena arena;
    detail::SendQueue queue;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) {
        queue.append(detail::copy(arena, "one message of forty bytes, as an example"));
        const detail::Slice other = detail::copy(arena, "a message of another");
    }
    while (!queue.empty()) queue.consume((std::min)(queue.size(), std::size_t{30}));
}

// ---- rooms ---------------------------------------------------------------------------------------------------------

// A host without a server.
class Host final : public detail::HandlerHost {
public:
    void on_reply(detail::ReplyAnswer&&) override {}
    void mark_dirty() override { dirty = true; }
    void flush() override {}
    std::size_t offer(const std::string_view*, std::size_t) override { return 0; }
    void set_nodelay(bool) override {}
    void report_exception(const char*, const char*) noexcept override {}
    bool origin_allowed(std::string_view) const override { return true; }
    Time now() const override { return {}; }
    bool on_loop_thread() const override { return true; }
    Rooms& rooms() override { return all; }
    Loop& loop() override { throw Error("a host without a loop"); }
    Server& server() override { throw Error("a host without a server"); }
    std::shared_ptr<Mailbox> mailbox() override { return nullptr; }

    detail::SendArena arena;
    Rooms all{arena};
};

struct Member {
    explicit Member(Host& host) {
        detail::HandlerAccess::core(handler).host = &host;
        detail::HandlerAccess::core(handler).connection.open(detail::Role::server, no_limits(), host.arena, Time());
    }
    Silent handler;
};

// One handler joins n rooms that have many other members, asks for its membership, and leaves half of them.
void rooms_of_one_handler(std::size_t n) {
    Host host;
    std::deque<Member> others;
    for (std::size_t i = 0; i < 400; ++i) others.emplace_back(host);
    std::vector<Room*> rooms;
    for (std::size_t i = 0; i < n; ++i) {
        rooms.push_back(&host.all["room " + std::to_string(i)]);
        for (Member& other : others) rooms.back()->join(other.handler);
    }
    Member member(host);
    const Measured measured;
    for (Room* room : rooms) room->join(member.handler);
    for (Room* room : rooms) sink = sink + (room->has(member.handler) ? 1 : 0);
    for (std::size_t i = 0; i < n; i += 2) rooms[i]->leave(member.handler);
    detail::RoomsAccess::remove_from_all(host.all, member.handler);
}
void members_of_one_room(std::size_t n) {
    Host host;
    std::deque<Member> members;
    for (std::size_t i = 0; i < n; ++i) members.emplace_back(host);
    Room& room = host.all["room"];
    const Measured measured;
    for (Member& member : members) room.join(member.handler);
    for (WebSocketHandler& handler : room) sink = sink + (room.has(handler) ? 1 : 0);
    room.broadcast("hello");
    for (std::size_t i = 0; i < n; i += 2) room.leave(members[i].handler);
    for (Member& member : members) detail::RoomsAccess::remove_from_all(host.all, member.handler);
}
void empty_rooms(std::size_t n) {
    Host host;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) host.all["room " + std::to_string(i)];
    detail::RoomsAccess::prune(host.all);
    require(host.all.size() == 0, "an empty room remains");
}

// ---- text and metrics ----------------------------------------------------------------------------------------------

void close_codes(std::size_t n) {
    Metrics metrics;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) ++metrics.close_codes[CloseCode(static_cast<std::uint16_t>(3000 + i % 2000))];
    sink = sink + prometheus_text(metrics).size();
}
void json_text(std::size_t n) {
    const std::string text = repeated(n, "a\"\n\xc3\xa9\xff\xf0");
    const Measured measured;
    sink = sink + Json{{"text", text}}.dump().size();
}
void json_array(std::size_t n) {
    const std::vector<std::string> names(n, "name");
    const Measured measured;
    sink = sink + Json::array(names).dump().size();
}
void log_line(std::size_t n) {
    const std::string text = repeated(n, "\x1b[0m\"");
    const Measured measured;
    sink = sink + escape_for_log(text, text.size()).size();
}
void percent_escapes(std::size_t n) {
    const std::string text = repeated(n, "%41+b");
    const Measured measured;
    sink = sink + text::percent_decode(text, true)->size();
}
void utf8(std::size_t n) {
    const std::string text = repeated(n, "\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80");
    const Measured measured;
    detail::Utf8Validator validator;
    for (const char& c : text) require(validator.feed(&c, 1), "text is not valid");
    sink = sink + (valid_utf8(text) ? 1 : 0) + truncate_utf8(text, text.size() - 1).size();
}

class NoTimer final : public detail::Timer {
public:
    void on_timer(Time) override {}
};
void timers(std::size_t n) {
    std::deque<NoTimer> all(n);
    detail::Timers heap;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) heap.schedule(all[i], Time() + Duration(i * 7919 % n));
    for (std::size_t i = 0; i < n; i += 2) heap.cancel(all[i]);
    heap.run_due(Time() + std::chrono::hours(1));
}

// ---- the chat ------------------------------------------------------------------------------------------------------

void json_values(std::size_t n) {
    const std::string text = "[" + repeated(n, "{\"a\":[1.5e3,\"\\u00e9\",null]},") + "0]";
    const Measured measured;
    require(detail::valid_json(text), "JSON is not valid");
}
void json_depth(std::size_t n) {
    const std::string text = std::string(n, '[') + std::string(n, ']');
    const Measured measured;
    require(!detail::valid_json(text), "deep JSON is valid");
}
void chat_text(std::size_t n) {
    const std::string text = repeated(n, "\xc3\xa9 \xe2\x80\x8b \xf0\x9f\x98\x80\n");
    const Measured measured;
    const detail::ChatLine line = detail::ChatLine::parse(text);
    sink = sink + (detail::valid_chat_text(line.rest) ? 1 : 0);
    sink = sink + (detail::valid_chat_name(line.rest, text.size()) ? 1 : 0);
}
void chat_tags(std::size_t n) {
    HistoryLimits limits;
    limits.max_entries = n / 2;
    detail::RoomHistory history(0);
    ChatEntry entry;
    entry.author = "author";
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) {
        entry.tag = std::to_string(i);
        sink = sink + history.find(entry);
        history.append(entry, limits, Time());
    }
    sink = sink + history.since(std::nullopt, n, limits, Time()).entries.size();
}
struct StoreListener final : ChatStore::Listener {
    void on_entry(const ChatEntry& entry) override { sink = sink + entry.id; }
    void on_duplicate(const ChatEntry&) override {}
    void on_failure(const ChatEntry&, const std::string&) override {}
};
// Messages in n rooms, of which a half is kept.
void chat_stores(std::size_t n) {
    StoreListener listener;
    HistoryLimits limits;
    limits.max_rooms = n / 2;
    MemoryHistory history(limits);
    history.attach(listener, nullptr);
    ChatEntry entry;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) {
        entry.room = std::to_string(i);
        history.append(entry);
    }
}
// Facts of n users, which are read, and of which a half is kept.
void chat_facts(std::size_t n) {
    StoreListener listener;
    HistoryLimits limits;
    limits.max_facts = n / 2;
    MemoryHistory history(limits);
    history.attach(listener, nullptr);
    const std::int64_t later = unix_ms() + 3'600'000;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) {
        const std::string user = big_endian_key(i) + "\n";
        history.put({"read", user + "tea", "1", "", later});
        history.facts("read", user, [](const std::vector<ChatFact>& facts, const std::string&) {
            sink = sink + facts.size();
        });
    }
}
// n users join with one name, and leave.
void chat_names(std::size_t n) {
    detail::Presence presence;
    std::vector<detail::Presence::User*> users;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) users.push_back(&presence.connect({"guest"}, "", nullptr));
    for (detail::Presence::User* user : users) {
        detail::Presence::detach(*user, nullptr, Time());
        presence.remove(*user);
    }
}
void chat_lost_users(std::size_t n) {
    detail::Presence presence;
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) {
        const std::string number = std::to_string(i);
        detail::Presence::detach(presence.connect({"user " + number, "", false, number}, "key " + number, nullptr),
                                 nullptr, Time());
    }
    Time next;
    const std::vector<std::string> expired = presence.expired(Time(), next);
    require(expired.size() == n, "a user remains");
    for (const std::string& id : expired) presence.remove(*presence.find_id(id));
}
// One user goes to n rooms, in a whole chat, and asks for lists.
void chat_rooms(std::size_t n) {
    TestServer server;
    ChatLimits& limits = ChatHub::of(server).limits;
    limits.max_rooms_per_connection = limits.max_rooms = 1'000'000;
    limits.connection = limits.address = {{1e9, 1e9}, {1e9, 1e9}};
    limits.room_creations = limits.address_room_creations = {1e9, 1e9};
    limits.replies = limits.address_replies = {1e12, 1e12};
    server.route<ChatHandler>("/");
    TestClient client = server.connect("/?name=Anna");
    const Measured measured;
    for (std::size_t i = 0; i < n; ++i) client.send("/join room " + std::to_string(i));
    client.send("/rooms");
    client.send("/who");
    client.close();
    server.advance(std::chrono::hours(1));
    sink = sink + client.messages().size();
}
void chat_receiver(std::size_t n) {
    detail::Presence presence;
    presence.connect({std::string(40, 'a')}, "", nullptr);
    const std::string text = repeated(n, "a ");
    const Measured measured;
    for (int i = 0; i < 10; ++i) {
        std::string_view rest = text;
        require(presence.consume_user(rest) == nullptr, "a user is found");
    }
}

// ---- all -----------------------------------------------------------------------------------------------------------

struct Case {
    const char* name;
    void (*run)(std::size_t n);
    std::size_t n;
};

// Each n is large enough for a quadratic part to show.
#define CASE(function, n) {#function, function, n}
constexpr Case cases[] = {
    CASE(header_fields, 1000), CASE(header_bytes, 10'000), CASE(target_bytes, 10'000), CASE(subprotocols, 2000),
    CASE(empty_elements, 10'000), CASE(cookies, 2000), CASE(empty_cookies, 5000), CASE(query_arguments, 2000),
#if WSCHAT_ZLIB
    CASE(extension_offers, 1000), CASE(extension_parameters, 2000), CASE(extension_commas, 20'000),
    CASE(compressed_messages, 200), CASE(compressed_bytes, 200),
#endif
    CASE(forwarded, 1000), CASE(forwarded_header, 1000), CASE(forwarded_schemes, 1000), CASE(entity_tags, 2000),
    CASE(ranges, 2000),
#if WSCHAT_OPENSSL
    CASE(signed_cookie, 4000),
#endif
    CASE(body_bytes, 40'000), CASE(body_chunks, 2000), CASE(body_trailers, 500), CASE(form_fields, 2000),
    CASE(form_parts, 400), CASE(form_delimiters, 500), CASE(response_fields, 1000), CASE(proxy_header, 2000),
    CASE(slashes, 4000), CASE(segments, 8000), CASE(long_segment, 4000), CASE(escaped_path, 4000),
    CASE(folder_path, 4000), CASE(pipelined_requests, 1000), CASE(fragments, 5000), CASE(empty_fragments, 5000),
    CASE(small_messages, 8000), CASE(single_bytes, 20'000), CASE(pings_in_a_message, 3000),
    CASE(large_message, 1'000'000), CASE(queued_output, 4000), CASE(queued_slices, 4000),
    CASE(rooms_of_one_handler, 150), CASE(members_of_one_room, 1000), CASE(empty_rooms, 1000),
    CASE(close_codes, 1000), CASE(json_text, 5000), CASE(json_array, 3000), CASE(log_line, 3000),
    CASE(percent_escapes, 10'000), CASE(utf8, 5000), CASE(timers, 4000), CASE(json_values, 2000),
    CASE(json_depth, 100'000), CASE(chat_text, 5000), CASE(chat_tags, 1000), CASE(chat_stores, 1000),
    CASE(chat_facts, 1000), CASE(chat_names, 500), CASE(chat_lost_users, 1000), CASE(chat_receiver, 50'000),
    CASE(chat_rooms, 300),
};
#undef CASE

void run(const std::string& name, void (*function)(std::size_t), std::size_t n) {
    function(n);
    CALLGRIND_DUMP_STATS_AT(name.c_str());
}

}  // namespace

int main(int argc, char** argv) {
    const std::string only = argc > 1 ? argv[1] : "";
    const auto wanted = [&](const std::string& name) { return only.empty() || only == name; };
    for (const Case& each : cases) {
        if (!wanted(each.name)) continue;
        each.run(each.n / 10 + 1);  // what is initialized once
        CALLGRIND_ZERO_STATS;
        run(each.name + std::string("/1"), each.run, each.n);
        run(each.name + std::string("/2"), each.run, 2 * each.n);
    }
    // 100 routes cost at most twice one route, for the longest path that the default limits allow.
    if (wanted("routes")) {
        CALLGRIND_ZERO_STATS;
        run(
            "routes/1", [](std::size_t routes) { find_route(routes, std::string(8000, '/')); }, 1);
        run(
            "routes/2", [](std::size_t routes) { find_route(routes, std::string(8000, '/')); }, 100);
    }
}
