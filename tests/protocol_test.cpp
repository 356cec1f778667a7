// Section 7: bytes and times go in, events and bytes come out. No sockets and no sleeps.
#include "support.hpp"

#include <limits>
#include <random>

namespace {

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::hex;
using test::to_hex;

const Time start = Time() + 1h;
constexpr std::size_t whole = std::string_view::npos;

// A frame of a server (RFC 6455 5.2), with the length in its shortest form.
std::string frame(unsigned first_byte, std::string_view payload) {
    std::string bytes(1, static_cast<char>(first_byte));
    const std::size_t size = payload.size();
    const int length_bytes = size < 126 ? 0 : size < 65536 ? 2 : 8;
    bytes += static_cast<char>(length_bytes == 0 ? size : length_bytes == 2 ? 126u : 127u);
    for (int i = length_bytes; i-- > 0;) bytes += static_cast<char>(std::uint64_t{size} >> (8 * i) & 0xFF);
    return bytes.append(payload);
}

// The same frames of a client, masked with 37 fa 21 3d (RFC 6455 5.3). The last one may be unfinished.
std::string masked(std::string_view frames) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(frames[i]); };
    std::string bytes;
    while (!frames.empty()) {
        const unsigned form = byte(1) & 0x7Fu;
        const std::size_t head = form < 126 ? 2 : form == 126 ? 4 : 10;
        if (frames.size() < head) return bytes.append(frames);
        std::size_t size = form < 126 ? form : 0;
        for (std::size_t i = 2; i < head; ++i) size = size << 8 | byte(i);
        bytes += frames[0];
        bytes += static_cast<char>(byte(1) | 0x80u);
        bytes.append(frames.substr(2, head - 2)).append("\x37\xfa\x21\x3d");
        const std::string_view payload = frames.substr(head, size);
        for (std::size_t i = 0; i < payload.size(); ++i)
            bytes += static_cast<char>(static_cast<unsigned char>(payload[i]) ^ test::test_mask()[i % 4]);
        frames.remove_prefix(head + payload.size());
    }
    return bytes;
}

// Frames that an end of this role receives.
std::string wire(Role role, std::string_view frames) {
    return role == Role::server ? masked(frames) : std::string(frames);
}

// Frames that an end of this role sends.
std::string sent_by(Role role, std::string_view frames) {
    return wire(role == Role::server ? Role::client : Role::server, frames);
}

// One end of a connection. Records its events as text.
class End {
public:
    explicit End(Role end_role = Role::server, const Limits& end_limits = {}) : role(end_role), limits(end_limits) {
        connection.open(role, limits, arena, now, role == Role::client ? &test::test_mask : nullptr);
    }
    End(const End&) = delete;
    End& operator=(const End&) = delete;

    // Receives bytes in pieces. Each piece has its own memory, which is freed afterwards.
    End& receive(std::string_view bytes, std::size_t piece = whole) {
        while (!bytes.empty()) receive_piece(bytes, bytes.substr(0, piece).size());
        return *this;
    }
    // The same, but uses receive_buffer() if the connection has one.
    End& receive_in_place(std::string_view bytes, std::size_t piece = whole) {
        while (!bytes.empty()) {
            const auto [buffer, capacity] = connection.receive_buffer();
            const std::size_t size =
                std::min(bytes.substr(0, piece).size(), buffer == nullptr ? bytes.size() : capacity);
            if (buffer == nullptr) {
                receive_piece(bytes, size);
                continue;
            }
            in_place += size;
            std::memcpy(buffer, bytes.data(), size);
            connection.receive(buffer, size, now);
            bytes.remove_prefix(size);
            read_events();
        }
        return *this;
    }
    // Reads one event and pauses the rest of the input.
    void receive_first_event(std::string bytes) {
        connection.receive(&bytes[0], bytes.size(), now);
        record(connection.next_event());
        connection.pause_input();
    }
    // Receives frames of the peer, which are masked if this is a server.
    End& peer(std::string_view hex_frames) { return receive(wire(role, hex(hex_frames))); }
    End& peer_sends(std::string_view frames, std::size_t piece = whole) { return receive(wire(role, frames), piece); }

    void read_events() {
        for (;;) {
            const Event event = connection.next_event();
            if (event.kind == Event::Kind::none) return;
            if (event.kind != Event::Kind::paused) record(event);
        }
    }
    void record(const Event& event) {
        if (!recorded_.empty()) recorded_ += " | ";
        switch (event.kind) {
            case Event::Kind::message: recorded_ += event.message.binary() ? "binary " : "text "; break;
            case Event::Kind::ping: recorded_ += "ping "; break;
            case Event::Kind::pong: recorded_ += "pong "; break;
            case Event::Kind::close:
                recorded_ += "close " + std::to_string(number(connection.close_code())) + " ";
                recorded_ += to_string(connection.close_cause());
                break;
            case Event::Kind::none: recorded_ += "none"; break;
            case Event::Kind::paused: break;
        }
        recorded_ += event.message.data();
    }
    // The events since the last call: "ping hey | text Hello | close 1000 peer".
    std::string events() {
        read_events();
        return std::exchange(recorded_, std::string());
    }
    // The output since the last call, in hex.
    std::string sent() { return to_hex(test::take_output(connection)); }
    void tick_after(wschat::Duration duration) { connection.tick(now += duration); }

    Role role;
    Limits limits;
    wschat::detail::SendArena arena;
    Connection connection;
    Time now = start;
    std::size_t in_place = 0;  // bytes that went to receive_buffer()

private:
    void receive_piece(std::string_view& bytes, std::size_t size) {
        const std::unique_ptr<char[]> piece(new char[size]);
        std::memcpy(piece.get(), bytes.data(), size);
        bytes.remove_prefix(size);
        connection.receive(piece.get(), size, now);
        read_events();
    }

    std::string recorded_;
};

const Role both_roles[] = {Role::server, Role::client};

// Text of exactly this size, with characters of one to four bytes.
std::string text_of(std::size_t size) {
    std::string text;
    while (text.size() < size) text += "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z";
    text = wschat::truncate_utf8(text, size);
    return text.append(size - text.size(), '.');
}
std::string bytes_of(std::size_t size) {
    std::string bytes;
    for (std::size_t i = 0; i < size; ++i) bytes += static_cast<char>(i * 7 + i / 256);
    return bytes;
}

// A Close frame's body.
std::string close_body(unsigned code, std::string_view reason = {}) {
    std::string body;
    body += static_cast<char>(code >> 8);
    body += static_cast<char>(code & 0xFF);
    return body.append(reason);
}

}  // namespace

TEST_SUITE("protocol") {
    // ---- messages --------------------------------------------------------------------------------------------------

    TEST_CASE("the examples of RFC 6455 5.7 are received") {
        struct Row {
            Role reader;
            std::string bytes;
            std::string events;
        };
        const Row rows[] = {
            {Role::client, "81 05 48 65 6c 6c 6f", "text Hello"},
            {Role::server, "81 85 37 fa 21 3d 7f 9f 4d 51 58", "text Hello"},
            {Role::client, "01 03 48 65 6c 80 02 6c 6f", "text Hello"},
            {Role::client, "89 05 48 65 6c 6c 6f", "ping Hello"},
            {Role::server, "8a 85 37 fa 21 3d 7f 9f 4d 51 58", "pong Hello"},
        };
        for (const Row& row : rows) {
            CAPTURE(row.bytes);
            CHECK(End(row.reader).receive(hex(row.bytes)).events() == row.events);
        }
        CHECK((End(Role::client).receive(hex("82 7e 01 00") + bytes_of(256)).events() == "binary " + bytes_of(256)));
        CHECK((End(Role::client).receive(hex("82 7f 00 00 00 00 00 01 00 00") + bytes_of(65536)).events() ==
               "binary " + bytes_of(65536)));
    }

    TEST_CASE("the examples of RFC 6455 5.7 are sent") {
        End server(Role::server), client(Role::client);
        CHECK(server.connection.send(Opcode::text, "Hello") == WriteStatus::sent);
        CHECK(server.sent() == "81 05 48 65 6c 6c 6f");
        CHECK(client.connection.send(Opcode::text, "Hello") == WriteStatus::sent);
        CHECK(client.sent() == "81 85 37 fa 21 3d 7f 9f 4d 51 58");
        server.connection.send_control(Opcode::ping, "Hello");
        CHECK(server.sent() == "89 05 48 65 6c 6c 6f");
        // The pong response of the client.
        client.receive(hex("89 05 48 65 6c 6c 6f"));
        CHECK(client.sent() == "8a 85 37 fa 21 3d 7f 9f 4d 51 58");
    }

    const std::size_t sizes[] = {0, 1, 125, 126, 127, 65535, 65536, 1024 * 1024};

    TEST_CASE("a message is sent as one frame with its length in the shortest form") {
        for (const Role role : both_roles)
            for (const std::size_t size : sizes) {
                CAPTURE(size);
                End end(role);
                end.connection.send(Opcode::text, text_of(size));
                CHECK((test::take_output(end.connection) == sent_by(role, frame(0x81, text_of(size)))));
                end.connection.send(Opcode::binary, bytes_of(size));
                CHECK((test::take_output(end.connection) == sent_by(role, frame(0x82, bytes_of(size)))));
            }
    }

    // Receives the bytes in pieces of several sizes and checks the events and the output.
    void check_in_pieces(Role role, const std::string& bytes, const std::string& events, const std::string& output) {
        for (const std::size_t piece : {std::size_t{1}, bytes.size() / 2 + 1, bytes.size()}) {
            CAPTURE(bytes.size());
            CAPTURE(piece);
            End end(role);
            CHECK((end.receive(bytes, piece).events() == events));
            CHECK(test::take_output(end.connection) == output);
            CHECK(end.connection.is_open());
        }
    }

    TEST_CASE("a message of any size in one frame arrives in pieces of any size") {
        for (const Role role : both_roles)
            for (const std::size_t size : sizes)
                for (const bool binary : {false, true}) {
                    const std::string payload = binary ? bytes_of(size) : text_of(size);
                    const std::string bytes = wire(role, frame(binary ? 0x82 : 0x81, payload));
                    const std::string expected = (binary ? "binary " : "text ") + payload;
                    check_in_pieces(role, bytes, expected, "");
                }
    }

    TEST_CASE("a fragmented message with control frames in between arrives in pieces of any size") {
        for (const Role role : both_roles)
            for (const std::size_t size : sizes)
                for (const bool binary : {false, true}) {
                    const std::string payload = binary ? bytes_of(size) : text_of(size);
                    const std::string_view view = payload;
                    // Both boundaries are within a character.
                    const std::size_t first = size / 3, second = size / 2;
                    const std::string bytes =
                        wire(role, frame(binary ? 0x02 : 0x01, view.substr(0, first)) + frame(0x89, "are you there") +
                                       frame(0x00, view.substr(first, second - first)) + frame(0x8A, "yes") +
                                       frame(0x00, "") + frame(0x80, view.substr(second)));
                    const std::string expected =
                        "ping are you there | pong yes | " + ((binary ? "binary " : "text ") + payload);
                    check_in_pieces(role, bytes, expected, sent_by(role, frame(0x8A, "are you there")));
                }
    }

    TEST_CASE("empty messages and empty fragments are legal") {
        End end;
        CHECK(end.peer("81 00").events() == "text ");
        CHECK(end.peer("82 00").events() == "binary ");
        CHECK(end.peer("01 00 00 00 80 00").events() == "text ");
        CHECK(end.peer("02 00 00 01 41 80 00").events() == "binary A");
    }

    // Frames of a peer that reach every path through the connection.
    std::string sample_conversation() {
        const std::string large = text_of(90'000);
        return frame(0x81, "one") + frame(0x82, bytes_of(300)) + frame(0x89, "p1") + frame(0x81, "") +
               frame(0x01, "\xf0\x9f") + frame(0x89, "") + frame(0x80, "\x98\x80") + frame(0x8A, "unasked") +
               frame(0x02, bytes_of(20'000)) + frame(0x00, "") + frame(0x8A, std::string(125, 'x')) +
               frame(0x80, bytes_of(40'000)) + frame(0x81, large) + frame(0x89, std::string(125, 'y')) +
               frame(0x01, large.substr(0, 33'333)) + frame(0x80, large.substr(33'333)) + frame(0x81, "last") +
               frame(0x88, close_body(4321, "that was all")) + frame(0x81, "too late") + hex("ff ff ff");
    }

    TEST_CASE("the events do not depend on the boundaries between pieces") {
        std::mt19937 random(6455);
        for (const Role role : both_roles) {
            const std::string conversation = wire(role, sample_conversation());
            End reference(role);
            const std::string events = reference.receive(conversation).events(), sent = reference.sent();
            CHECK(events.substr(events.rfind(" | text last")) == " | text last | close 4321 peer");
            for (int i = 0; i < 200; ++i) {
                CAPTURE(i);
                End end(role);
                const std::size_t longest = std::size_t{1} << (random() % 17);
                for (std::string_view rest = conversation; !rest.empty();) {
                    const std::string_view piece = rest.substr(0, 1 + random() % longest);
                    if (i % 2 == 0) end.receive(piece);
                    else end.receive_in_place(piece);
                    rest.remove_prefix(piece.size());
                }
                CHECK((end.events() == events));
                CHECK((end.sent() == sent));
                CHECK(end.connection.close_reason() == "that was all");
            }
        }
    }

    TEST_CASE("a frame that violates RFC 6455 5 closes with 1002") {
        struct Row {
            std::string rule;
            Role reader;
            std::string bytes;
        };
        const Row rows[] = {
            {"5.1: not masked from a client", Role::server, "81 05 48 65 6c 6c 6f"},
            {"5.1: masked from a server", Role::client, "81 85 37 fa 21 3d 7f 9f 4d 51 58"},
            {"5.2: RSV1", Role::client, "c1 00"},
            {"5.2: RSV2", Role::client, "a1 00"},
            {"5.2: RSV3", Role::client, "91 00"},
            {"5.2: opcode 3", Role::client, "83 00"},
            {"5.2: opcode 7", Role::client, "87 00"},
            {"5.2: opcode B", Role::client, "8b 00"},
            {"5.2: opcode F", Role::client, "8f 00"},
            {"5.2: 125 in 16 bits", Role::client, "82 7e 00 7d"},
            {"5.2: 65535 in 64 bits", Role::client, "82 7f 00 00 00 00 00 00 ff ff"},
            {"5.2: the top bit of 64", Role::client, "82 7f 80 00 00 00 00 00 00 00"},
            {"5.4: a continuation without a message", Role::client, "80 00"},
            {"5.4: a continuation of a finished message", Role::client, "01 00 80 00 80 00"},
            {"5.4: a new message within one", Role::client, "01 00 81 00"},
            {"5.5: a fragmented ping", Role::client, "09 00"},
            {"5.5: a fragmented Close", Role::client, "08 00"},
            {"5.5: a ping of 126 bytes", Role::client, "89 7e 00 7e"},
        };
        for (const Row& row : rows) {
            CAPTURE(row.rule);
            End end(row.reader);
            end.receive(hex(row.bytes));
            const std::string reason = end.connection.close_reason();
            const std::string close = sent_by(row.reader, frame(0x88, close_body(1002, reason)));
            const std::string events = end.events();
            CHECK(events.substr(events.find("close")) == "close 1002 protocol error");
            CHECK(reason != "");
            CHECK(end.sent() == to_hex(close));
            CHECK(!end.connection.aborted());
        }
    }

    TEST_CASE("after a failure input is ignored") {
        End end;
        CHECK(end.peer("83 00 81 02 68 69 89 00 88 00").events() == "close 1002 protocol error");
        end.sent();
        CHECK(end.peer("81 02 68 69 89 00 88 02 03 e8").events() == "");
        CHECK(end.sent() == "");
        CHECK(end.connection.close_code() == CloseCode::protocol_error);
    }

    // ---- UTF-8 -----------------------------------------------------------------------------------------------------

    TEST_CASE("text that cannot be UTF-8 closes with 1007 before the message ends") {
        // Each frame announces more bytes than follow.
        const std::string frames[] = {
            "81 05 48 ff",                // no lead byte
            "81 05 48 80",                // a continuation byte
            "81 05 c0",                   // overlong
            "81 05 c3 28",                // not continued
            "81 05 e0 9f",                // overlong
            "81 05 ed a0",                // a surrogate
            "81 05 f0 8f",                // overlong
            "81 05 f4 90",                // above U+10FFFF
            "81 05 f5",                   // above U+10FFFF
            "81 7e 04 00 61 61 61 ff",    // the third byte of 1024
            "01 05 61 62 ff",             // in an unfinished first fragment
            "01 01 c3 00 05 28",          // the next fragment does not continue the character
            "01 01 c3 89 00 00 05 28",    // the same with a ping in between
            "01 02 e2 82 00 00 80 05 41"  // nor does a fragment after an empty one
        };
        for (const Role role : both_roles)
            for (const std::string& bytes : frames) {
                CAPTURE(bytes);
                End end(role);
                end.peer(bytes);
                CHECK(end.connection.close_code() == CloseCode::invalid_payload);
                CHECK(end.connection.close_cause() == CloseCause::protocol_error);
                CHECK(!end.connection.aborted());
            }
    }

    TEST_CASE("an unfinished character keeps the connection open") {
        for (const std::string bytes : {"81 05 c3", "81 05 e2 82", "81 05 f0 9f 98", "01 01 f0", "01 01 f0 00 01 9f"}) {
            CAPTURE(bytes);
            End end;
            CHECK(end.peer(bytes).events() == "");
            CHECK(end.connection.is_open());
        }
    }

    TEST_CASE("text that ends within a character closes with 1007") {
        for (const std::string bytes : {"81 01 c3", "81 03 f0 9f 98", "01 01 c3 80 00", "01 01 e2 00 01 82 80 00"}) {
            CAPTURE(bytes);
            End end;
            CHECK(end.peer(bytes).events() == "close 1007 protocol error");
            CHECK(end.sent().substr(0, 2) == "88");
        }
    }

    TEST_CASE("a character can span fragments") {
        CHECK(End().peer("01 01 f0 00 01 9f 00 01 98 80 01 80").events() == "text \xf0\x9f\x98\x80");
        CHECK(End().peer("01 02 61 c3 89 01 ff 80 02 a9 62").events() == "ping \xff | text a\xc3\xa9\x62");
    }

    TEST_CASE("an unfinished character of one message does not affect the next message") {
        End end;
        CHECK(end.peer("02 01 c3 80 00 81 01 41").events() == "binary \xc3 | text A");
    }

    TEST_CASE("only text is checked for UTF-8") {
        End end;
        CHECK(end.peer("82 02 c0 ff 89 02 c0 ff 8a 02 c0 ff").events() ==
              "binary \xc0\xff | ping \xc0\xff | pong \xc0\xff");
        CHECK(end.connection.is_open());
    }

    // ---- limits ----------------------------------------------------------------------------------------------------

    TEST_CASE("a message over the size limit closes with 1009 in one frame and in fragments") {
        Limits limits;
        limits.max_message_size = 1000;
        struct Row {
            std::vector<std::size_t> fragments;
            bool fits;
        };
        const Row rows[] = {{{999}, true},         {{1000}, true},          {{1001}, false},
                            {{500, 500}, true},    {{500, 501}, false},     {{1000, 0, 0}, true},
                            {{1000, 0, 1}, false}, {{1, 999}, true},        {{1, 1000}, false},
                            {{0, 1001}, false},    {{400, 300, 300}, true}, {{400, 300, 301}, false}};
        for (const Role role : both_roles)
            for (const Row& row : rows) {
                End end(role, limits);
                std::size_t sum = 0;
                for (std::size_t i = 0; i < row.fragments.size(); ++i) {
                    const bool last = i + 1 == row.fragments.size();
                    sum += row.fragments[i];
                    CAPTURE(sum);
                    end.peer_sends(
                        frame((i == 0 ? 0x02u : 0x00u) | (last ? 0x80u : 0u), std::string(row.fragments[i], 'x')));
                }
                CHECK(end.events() == (row.fits ? "binary " + std::string(sum, 'x') : "close 1009 protocol error"));
                CHECK(end.connection.is_open() == row.fits);
            }
    }

    TEST_CASE("the header of a message over the size limit closes with 1009") {
        Limits limits;
        limits.max_message_size = 1000;
        End alone(Role::client, limits), sum(Role::client, limits);
        CHECK(alone.receive(hex("82 7e 03 e9")).events() == "close 1009 protocol error");
        CHECK(sum.receive(hex("02 02 41 42 00 7e 03 e7")).events() == "close 1009 protocol error");
        CHECK(alone.connection.close_reason() == "message is larger than 1000 bytes");
        // The sum of 2^63 - 1 and the first fragment does not overflow.
        End huge(Role::client, limits);
        CHECK(huge.receive(hex("02 02 41 42 00 7f 7f ff ff ff ff ff ff ff")).events() == "close 1009 protocol error");
    }

    TEST_CASE("the size limit applies to each message") {
        Limits limits;
        limits.max_message_size = 3;
        CHECK(End(Role::server, limits).peer("82 03 61 62 63 02 02 61 62 80 01 63 82 03 61 62 63").events() ==
              "binary abc | binary abc | binary abc");
    }

    TEST_CASE("too many fragments close with 1008 and empty fragments count") {
        Limits limits;
        limits.max_fragments = 4;
        CHECK(End(Role::server, limits).peer("02 00 00 00 00 00 80 01 41").events() == "binary A");
        CHECK(End(Role::server, limits).peer("02 00 00 00 00 00 00 00 00 00").events() == "close 1008 protocol error");
        // Control frames are not fragments, and each message has its own count.
        CHECK(End(Role::server, limits).peer("02 00 00 00 8a 00 00 00 8a 00 80 00 02 00 00 00 00 00 80 00").events() ==
              "pong  | pong  | binary  | binary ");
    }

    TEST_CASE("endless empty fragments close at the default limit of 1024") {
        End end;
        end.peer_sends(frame(0x02, ""));
        for (int i = 1; i < 1024; ++i) end.peer_sends(frame(0x00, ""));
        CHECK(end.events() == "");
        CHECK(end.peer_sends(frame(0x00, "")).events() == "close 1008 protocol error");
        CHECK(end.connection.close_reason() == "message has more than 1024 fragments");
    }

    TEST_CASE("memory grows with the received bytes and not with the announced length") {
        Limits limits;
        limits.max_message_size = (std::numeric_limits<std::size_t>::max)() / 4 + 1;
        End end(Role::client, limits);
        // No machine has the announced 2^62 bytes, and no 32-bit program can use 2^30 bytes for one message.
        const bool wide = sizeof(std::size_t) == 8;
        end.receive(hex(wide ? "82 7f 40 00 00 00 00 00 00 00" : "82 7f 00 00 00 00 40 00 00 00") + "x");
        CHECK(end.events() == "");
        std::size_t arrived = 1;
        for (int i = 0; i < 40; ++i) {
            end.receive_in_place(std::string(10'000, 'x'));
            arrived += 10'000;
            CHECK(end.connection.receive_buffer().second <= arrived + 64 * 1024);
        }
        CHECK(end.in_place != 0);
        CHECK(end.connection.is_open());
    }

    TEST_CASE("a flood of control frames closes with 1008") {
        for (const std::string control : {"89 00", "8a 00"}) {
            CAPTURE(control);
            End end;
            for (int i = 0; i < 500; ++i) end.peer(control);
            end.events();
            CHECK(end.connection.is_open());
            CHECK(end.peer(control).events() == "close 1008 protocol error");
        }
    }

    TEST_CASE("control frames below the rate limit are accepted without end") {
        End end;
        for (int i = 0; i < 5000; ++i) {
            end.now += 10ms;
            end.peer("8a 00");
        }
        CHECK(end.connection.is_open());
        // At twice the rate, half of the frames use up the burst of 500.
        int more = 0;
        for (; end.connection.is_open() && more < 2000; ++more) {
            end.now += 5ms;
            end.peer("8a 00");
        }
        CHECK(more > 900);
        CHECK(more < 1100);
    }

    TEST_CASE("the rate limit does not apply to Close frames and a rate of 0 means no limit") {
        Limits limits;
        limits.control_frames_burst = 1;
        End limited(Role::server, limits);
        CHECK(limited.peer("8a 00 88 02 03 e8").events() == "pong  | close 1000 peer");
        limits.control_frames_per_second = 0;
        End unlimited(Role::server, limits);
        for (int i = 0; i < 10'000; ++i) unlimited.peer("8a 00");
        CHECK(unlimited.connection.is_open());
    }

    TEST_CASE("after messages_burst messages the input is due when the rate allows one more") {
        Limits limits;
        limits.messages_per_second = 10;
        limits.messages_burst = 3;
        End end(Role::server, limits);
        const auto wait = [&] { return end.connection.input_due() - end.now; };
        CHECK(wait() <= 0s);
        end.peer("81 01 61 81 01 62");
        CHECK(wait() <= 0s);
        end.peer("89 00 01 01 63");  // neither a ping nor a first fragment is a message
        CHECK(wait() <= 0s);
        CHECK(end.peer("80 01 63").events() == "text a | text b | ping  | text cc");
        CHECK(wait() == 100ms);
        end.now += 99ms;
        CHECK(wait() > 0s);
        end.now += 1ms;
        CHECK(wait() <= 0s);
        // What comes although the input is not due is delivered, and delays the next.
        end.peer("81 01 64 81 01 65 81 01 66");
        CHECK(wait() == 300ms);
        CHECK(end.connection.is_open());
    }

    TEST_CASE("without messages_burst as many messages as messages_per_second may arrive at once") {
        Limits limits;
        limits.messages_per_second = 4;
        End end(Role::server, limits);
        end.peer("81 00 81 00 81 00");
        CHECK(end.connection.input_due() <= end.now);
        end.peer("81 00");
        CHECK(end.connection.input_due() == end.now + 250ms);
    }

    TEST_CASE("the input is due when the average of its bytes is within bytes_per_second again") {
        Limits limits;
        limits.bytes_per_second = 1000;
        End end(Role::server, limits);
        CHECK(end.connection.max_input() == 1000);
        end.peer_sends(frame(0x82, std::string(992, 'x')));  // and 8 bytes of header and mask
        CHECK(end.connection.input_due() == end.now + 1ms);
        end.now += 500ms;
        CHECK(end.connection.input_due() <= end.now);
        end.peer_sends(frame(0x82, std::string(1992, 'x')));
        CHECK(end.connection.input_due() == end.now + 1501ms);
        CHECK(end.connection.is_open());
    }

    TEST_CASE("the rate of bytes may be the lowest, and both rates may be set") {
        Limits limits;
        limits.bytes_per_second = 1;
        limits.messages_per_second = 1;
        End end(Role::server, limits);
        end.peer("81 00");  // 6 bytes
        CHECK(end.connection.input_due() == end.now + 6s);
        CHECK(end.connection.max_input() == 1);
    }

    TEST_CASE("by default no rate limits the input") {
        End end;
        for (int i = 0; i < 10'000; ++i) end.peer("81 00");
        CHECK(end.connection.input_due() <= end.now);
        CHECK(end.connection.max_input() > 1'000'000'000);
    }

    // ---- pings -----------------------------------------------------------------------------------------------------

    TEST_CASE("a ping is answered with a pong of the same payload") {
        for (const std::size_t size : std::initializer_list<std::size_t>{0, 1, 5, 124, 125})
            for (const Role role : both_roles) {
                CAPTURE(size);
                End end(role);
                end.peer_sends(frame(0x89, bytes_of(size)), 1);
                CHECK((end.events() == "ping " + bytes_of(size)));
                CHECK(end.sent() == to_hex(sent_by(role, frame(0x8A, bytes_of(size)))));
            }
    }

    TEST_CASE("each ping of a peer that reads is answered in order") {
        End end;
        CHECK(end.peer("89 01 61 89 01 62 89 01 63").events() == "ping a | ping b | ping c");
        CHECK(end.sent() == "8a 01 61 8a 01 62 8a 01 63");
    }

    TEST_CASE("only the latest ping of a peer that does not read is answered") {
        End end;
        end.connection.send(Opcode::text, "x");
        end.connection.set_write_blocked(true);
        CHECK(end.peer("89 01 61 89 01 62 89 01 63").events() == "ping a | ping b | ping c");
        CHECK(end.sent() == "81 01 78");
        end.connection.set_write_blocked(false);
        end.connection.send_pending_pong();
        CHECK(end.sent() == "8a 01 63");
        end.connection.send_pending_pong();
        CHECK(end.sent() == "");
    }

    TEST_CASE("pings of a peer that does not read do not grow the queue") {
        Limits limits;
        limits.control_frames_per_second = 0;
        End end(Role::server, limits);
        end.connection.set_write_blocked(true);
        const std::string pings = [] {
            std::string many;
            for (int i = 0; i < 1000; ++i) many += frame(0x89, std::string(125, 'p'));
            return masked(many);
        }();
        for (int i = 0; i < 1000; ++i) {
            std::string copy = pings;
            end.connection.receive(&copy[0], copy.size(), end.now);
            while (end.connection.next_event().kind != Event::Kind::none) {
            }
        }
        CHECK(end.connection.output().size() == 0);
        CHECK(end.connection.is_open());
    }

    TEST_CASE("a pending pong is not sent after the connection has closed") {
        End end;
        end.connection.set_write_blocked(true);
        end.peer("89 01 61 88 00");
        CHECK(end.sent() == "88 00");
        end.connection.send_pending_pong();
        CHECK(end.sent() == "");
    }

    TEST_CASE("an unsolicited pong is not answered") {
        End end;
        // RFC 6455 5.5.3: "A response to an unsolicited Pong frame is not expected."
        CHECK(end.peer("8a 02 68 69").events() == "pong hi");
        CHECK(end.sent() == "");
        CHECK(end.connection.is_open());
    }

    // ---- keepalive -------------------------------------------------------------------------------------------------

    TEST_CASE("a silent peer gets a ping and is closed if it stays silent") {
        End end;  // 20 s and 20 s
        CHECK(end.connection.deadline() == start + 20s);
        end.tick_after(20s - 1ns);
        CHECK(end.sent() == "");
        end.tick_after(1ns);
        CHECK(end.sent() == "89 00");
        CHECK(end.connection.deadline() == start + 40s);
        end.tick_after(20s - 1ns);
        CHECK(end.events() == "");
        end.tick_after(1ns);
        CHECK(end.events() == "close 1006 ping timeout");
        CHECK(end.connection.close_reason() == "the peer did not answer a ping");
        CHECK(end.connection.aborted());
        CHECK(end.connection.deadline() == Time::max());
    }

    TEST_CASE("any input resets the ping timer") {
        for (const std::string bytes : {"8a 00", "81 00", "81", "89 00", "01 01 41"}) {
            CAPTURE(bytes);
            End end(Role::client);
            end.tick_after(20s);
            end.sent();
            end.now += 19s;
            end.receive(hex(bytes));
            CHECK(end.connection.deadline() == end.now + 20s);
            end.tick_after(1s);
            CHECK(end.connection.is_open());
            end.tick_after(19s);
            CHECK(end.sent().substr(0, 5) == (bytes == "89 00" ? "8a 80" : "89 80"));
        }
    }

    TEST_CASE("a peer that reads its backlog gets no ping") {
        End end;
        end.tick_after(20s);
        end.now += 15s;
        end.connection.record_activity(end.now);
        CHECK(end.connection.deadline() == end.now + 20s);
        end.tick_after(19s);
        CHECK(end.connection.is_open());
    }

    TEST_CASE("the closing timeout grows by a second for each 64 KiB of backlog and is never extended") {
        End end;  // 5 s
        end.connection.send(Opcode::binary, std::string(640 * 1024, 'x'));
        end.connection.close(CloseCode::normal, {}, end.now);
        CHECK(end.connection.deadline() == end.now + 15s);
        end.now += 14s;
        end.connection.record_activity(end.now);
        CHECK(end.connection.deadline() == end.now + 1s);
        end.tick_after(1s);
        CHECK(end.events() == "close 1006 closing timeout");
    }

    TEST_CASE("a timer of zero is off") {
        Limits limits;
        limits.ping_interval = 0s;
        End silent(Role::server, limits);
        CHECK(silent.connection.deadline() == Time::max());
        silent.tick_after(10'000h);
        CHECK(silent.sent() == "");
        CHECK(silent.connection.is_open());

        limits = {};
        limits.ping_timeout = 0s;
        End waiting(Role::server, limits);
        waiting.tick_after(20s);
        CHECK(waiting.sent() == "89 00");
        CHECK(waiting.connection.deadline() == Time::max());
        waiting.tick_after(10'000h);
        CHECK(waiting.connection.is_open());
        waiting.peer("8a 00");
        waiting.tick_after(20s);
        CHECK(waiting.sent() == "89 00");

        limits = {};
        limits.closing_timeout = 0s;
        End closing(Role::server, limits);
        closing.connection.close(CloseCode::normal, {}, closing.now);
        CHECK(closing.connection.deadline() == Time::max());
        closing.tick_after(10'000h);
        CHECK(closing.events() == "");
    }

    TEST_CASE("tick acts at the deadline and not before") {
        std::mt19937 random(7);
        Limits limits;
        limits.ping_interval = 7s;
        limits.ping_timeout = 3s;
        limits.closing_timeout = 2s;
        for (int i = 0; i < 200; ++i) {
            CAPTURE(i);
            End end(Role::server, limits);
            while (end.connection.state() != Connection::State::closed) {
                const Time deadline = end.connection.deadline();
                REQUIRE(deadline != Time::max());
                REQUIRE(deadline > end.now);
                const auto state = end.connection.state();
                end.now += (deadline - end.now) / (2 + static_cast<int>(random() % 3));
                end.connection.tick(end.now);
                CHECK(end.sent() == "");
                CHECK(end.connection.state() == state);
                CHECK(end.connection.deadline() == deadline);
                const auto choice = random() % 4;
                if (choice == 0) end.peer("8a 00");
                if (choice == 1) end.connection.close(CloseCode::normal, {}, end.now);
                end.sent();
                if (choice >= 2) {
                    end.now = deadline;
                    end.connection.tick(end.now);
                    CHECK((end.sent() == "89 00" || end.connection.state() == Connection::State::closed));
                }
            }
            end.connection.tick(end.now + 1h);
            CHECK(end.sent() == "");
        }
    }

    // ---- the closing handshake -------------------------------------------------------------------------------------

    TEST_CASE("the answer to a Close frame echoes its code") {
        End end;
        CHECK(end.peer("88 05 03 e8 62 79 65").events() == "close 1000 peer");
        CHECK(end.sent() == "88 02 03 e8");
        CHECK(end.connection.close_reason() == "bye");
        CHECK(end.connection.state() == Connection::State::closed);
        CHECK(!end.connection.aborted());
    }

    TEST_CASE("a Close frame without a code is echoed without one and reported as 1005") {
        End end;
        CHECK(end.peer("88 00").events() == "close 1005 peer");
        CHECK(end.sent() == "88 00");
        CHECK(end.connection.close_reason() == "");
    }

    TEST_CASE("after our Close frame the connection waits for the peer's") {
        End end;
        CHECK(end.connection.close_cause() == CloseCause::none);
        end.connection.close(CloseCode{4000}, "bye", end.now);
        CHECK(end.sent() == "88 05 0f a0 62 79 65");
        CHECK(end.connection.state() == Connection::State::closing);
        CHECK(!end.connection.is_open());
        CHECK(end.events() == "");
        CHECK(end.peer("88 02 0f a0").events() == "close 4000 local");
        CHECK(end.sent() == "");
        CHECK(end.connection.state() == Connection::State::closed);
    }

    TEST_CASE("the close code is the one of the peer's answer to our Close frame") {
        End end;
        end.connection.close(CloseCode::normal, "bye", end.now);
        CHECK(end.peer("88 04 03 e9 6f 6b").events() == "close 1001 local");
        CHECK(end.connection.close_reason() == "ok");
    }

    TEST_CASE("both sides can close at the same time") {
        End server(Role::server), client(Role::client);
        server.connection.close(CloseCode{4001}, "server", start);
        client.connection.close(CloseCode{4002}, "client", start);
        const std::string from_server = test::take_output(server.connection);
        server.receive(test::take_output(client.connection));
        client.receive(from_server);
        CHECK(server.events() == "close 4002 local");
        CHECK(client.events() == "close 4001 local");
        CHECK(server.sent() == "");
        CHECK(client.sent() == "");
    }

    TEST_CASE("a peer that does not answer our Close frame is dropped after the closing timeout") {
        End end;  // 5 s
        end.now += 1s;
        end.connection.close(CloseCode::going_away, {}, end.now);
        CHECK(end.connection.deadline() == end.now + 5s);
        // Input does not extend the timeout.
        end.now += 4s;
        CHECK(end.peer("81 02 68 69 8a 00").events() == "pong ");
        end.tick_after(1s - 1ns);
        CHECK(end.connection.state() == Connection::State::closing);
        end.tick_after(1ns);
        CHECK(end.events() == "close 1006 closing timeout");
        CHECK(end.connection.aborted());
    }

    TEST_CASE("the codes of RFC 6455 7.4 are echoed and all others close with 1002") {
        const auto legal = [](unsigned code) {
            return (code >= 1000 && code <= 1003) || (code >= 1007 && code <= 1014) || (code >= 3000 && code <= 4999);
        };
        for (const Role role : both_roles)
            for (unsigned code = 0; code <= 5000; ++code) {
                CAPTURE(code);
                End end(role);
                end.peer_sends(frame(0x88, close_body(code, "why")));
                const std::string answer = test::take_output(end.connection);
                if (legal(code)) {
                    CHECK(end.events() == "close " + std::to_string(code) + " peer");
                    CHECK(end.connection.close_reason() == "why");
                    CHECK(answer == sent_by(role, frame(0x88, close_body(code))));
                } else {
                    CHECK(end.events() == "close 1002 protocol error");
                    CHECK(answer == sent_by(role, frame(0x88, close_body(1002, end.connection.close_reason()))));
                }
            }
        CHECK(End().peer("88 02 ff ff").events() == "close 1002 protocol error");
    }

    TEST_CASE("half a close code closes with 1002 and a reason that is not UTF-8 with 1007") {
        CHECK(End().peer("88 01 03").events() == "close 1002 protocol error");
        CHECK(End().peer("88 03 03 e8 ff").events() == "close 1007 protocol error");
        CHECK(End().peer("88 03 03 e8 c3").events() == "close 1007 protocol error");
        CHECK(End().peer("88 04 03 e8 c3 a9").events() == "close 1000 peer");
        // The code is checked first.
        CHECK(End().peer("88 03 03 ed ff").events() == "close 1002 protocol error");
    }

    TEST_CASE("a reason of 123 bytes is legal in both directions") {
        const std::string reason = text_of(123);
        End end;
        end.peer_sends(frame(0x88, close_body(1000, reason)));
        CHECK(end.connection.close_reason() == reason);
        End ours;
        ours.connection.close(CloseCode::normal, reason, start);
        CHECK(ours.sent() == to_hex(frame(0x88, close_body(1000, reason))));
    }

    TEST_CASE("a reason for a failure that is too long is cut between characters") {
        End end;
        const std::string reason = std::string(122, 'x') + "\xc3\xa9";
        end.connection.fail(CloseCode::internal_error, reason);
        CHECK(end.sent() == to_hex(frame(0x88, close_body(1011, std::string(122, 'x')))));
    }

    TEST_CASE("bytes after a Close frame are ignored") {
        End end;
        CHECK(end.peer("88 02 03 e8 81 02 68 69 89 00 88 02 03 e9 ff ff").events() == "close 1000 peer");
        CHECK(end.sent() == "88 02 03 e8");
        CHECK(end.peer("81 02 68 69 83 00 88 02 03 ea").events() == "");
        CHECK(end.sent() == "");
        CHECK(end.connection.close_code() == CloseCode::normal);
    }

    TEST_CASE("a second close has no effect") {
        End end;
        end.connection.close(CloseCode{4000}, "first", end.now);
        end.sent();
        end.now += 3s;
        end.connection.close(CloseCode{4001}, "second", end.now);
        CHECK(end.sent() == "");
        CHECK(end.connection.deadline() == start + 5s);
        CHECK(end.peer("88 02 0f a0").events() == "close 4000 local");
        end.connection.close(CloseCode{4002}, "third", end.now);
        CHECK(end.sent() == "");
        CHECK(end.connection.close_code() == CloseCode{4000});
    }

    TEST_CASE("nothing is sent after a Close frame") {
        End end;
        end.connection.close(CloseCode::normal, {}, end.now);
        end.sent();
        CHECK(end.connection.send(Opcode::text, "late") == WriteStatus::closed);
        CHECK(end.connection.send_control(Opcode::ping, "late") == WriteStatus::closed);
        CHECK(end.sent() == "");
        end.peer("88 02 03 e8");
        CHECK(end.connection.send(Opcode::text, "late") == WriteStatus::closed);
        CHECK(end.connection.send_control(Opcode::ping, "late") == WriteStatus::closed);
        CHECK(end.sent() == "");
    }

    TEST_CASE("a connection that is not open yet sends and receives nothing") {
        Connection connection;
        CHECK(connection.state() == Connection::State::connecting);
        CHECK(connection.send(Opcode::text, "early") == WriteStatus::closed);
        CHECK(connection.send_control(Opcode::ping, "early") == WriteStatus::closed);
        CHECK(connection.next_event().kind == Event::Kind::none);
        CHECK(connection.deadline() == Time::max());
        CHECK(connection.output().empty());
    }

    TEST_CASE("messages after our Close frame are checked but not delivered") {
        End end;
        end.connection.close(CloseCode::normal, {}, end.now);
        end.sent();
        CHECK(end.peer("81 02 68 69 01 01 61 80 01 62").events() == "");
        CHECK(end.peer("89 01 70").events() == "ping p");
        // RFC 6455 5.5.2: a ping is answered "unless it already received a Close frame".
        CHECK(end.sent() == "8a 01 70");
        CHECK(end.peer("81 01 ff").events() == "close 1007 protocol error");
        // Each side sends one Close frame.
        CHECK(end.sent() == "");
    }

    TEST_CASE("close, fail, abort and the end of the stream in each state") {
        struct State {
            std::string name;
            void (*reach)(End&);
        };
        const State states[] = {
            {"open", [](End&) {}},
            {"closing", [](End& e) { e.connection.close(CloseCode{4000}, {}, e.now); }},
            {"closed by the peer", [](End& e) { e.peer("88 02 03 e8"); }},
            {"failed", [](End& e) { e.peer("83 00"); }},
            {"lost", [](End& e) { e.connection.receive_eof("lost"); }},
        };
        struct Action {
            std::string name;
            void (*act)(End&);
        };
        const Action actions[] = {
            {"close", [](End& e) { e.connection.close(CloseCode{4444}, {}, e.now); }},
            {"fail", [](End& e) { e.connection.fail(CloseCode::internal_error, "", CloseCause::handler_exception); }},
            {"abort", [](End& e) { e.connection.abort(CloseCause::shutdown, "enough"); }},
            {"end of the stream", [](End& e) { e.connection.receive_eof("hung up"); }},
        };
        // For each state and action: the events, and the bytes that remain to be sent.
        const char* const expected[5][4][2] = {
            {{"", "88 02 11 5c"},
             {"close 1011 handler exception", "88 02 03 f3"},
             {"close 1006 shutdown", ""},
             {"close 1006 connection lost", ""}},
            {{"", "88 02 0f a0"},
             {"close 1011 handler exception", "88 02 0f a0"},
             {"close 1006 shutdown", ""},
             {"close 1006 local", ""}},
            {{"close 1000 peer", "88 02 03 e8"},
             {"close 1000 peer", "88 02 03 e8"},
             {"close 1000 peer", "88 02 03 e8"},
             {"close 1000 peer", "88 02 03 e8"}},
            {{"close 1002 protocol error", "failed"},
             {"close 1002 protocol error", "failed"},
             {"close 1002 protocol error", "failed"},
             {"close 1002 protocol error", "failed"}},
            {{"close 1006 connection lost", ""},
             {"close 1006 connection lost", ""},
             {"close 1006 connection lost", ""},
             {"close 1006 connection lost", ""}},
        };
        for (std::size_t s = 0; s < 5; ++s)
            for (std::size_t a = 0; a < 4; ++a) {
                CAPTURE(states[s].name);
                CAPTURE(actions[a].name);
                End end;
                states[s].reach(end);
                actions[a].act(end);
                CHECK(end.events() == expected[s][a][0]);
                const std::string sent = end.sent();
                if (expected[s][a][1] == std::string("failed"))
                    CHECK(sent == to_hex(frame(0x88, close_body(1002, "opcode is reserved"))));
                else CHECK(sent == expected[s][a][1]);
                const bool lost = end.connection.close_code() == CloseCode::abnormal;
                CHECK(end.connection.aborted() == lost);
                // There is no second close event.
                const bool closed = s >= 2 || a >= 1;
                CHECK((end.connection.state() == Connection::State::closed) == closed);
                if (!closed) continue;
                for (const Action& again : actions) again.act(end);
                end.peer("81 02 68 69 88 02 03 e8").tick_after(1h);
                CHECK(end.events() == "");
                CHECK(end.sent() == "");
            }
    }

    TEST_CASE("an end of the stream within a message loses the message") {
        for (const std::string bytes : {"81", "81 05 48 65", "01 02 48 65", "89 05 48", "01 00 89 01"}) {
            CAPTURE(bytes);
            End end(Role::client);
            end.receive(hex(bytes));
            end.connection.receive_eof("the peer hung up");
            CHECK(end.events() == "close 1006 connection lost");
            CHECK(end.connection.close_reason() == "the peer hung up");
        }
    }

    // ---- output ----------------------------------------------------------------------------------------------------

    TEST_CASE("the status of a message is queued while the kernel refuses output") {
        End end;
        CHECK(end.connection.send(Opcode::text, "a") == WriteStatus::sent);
        end.connection.set_write_blocked(true);
        CHECK(end.connection.write_blocked());
        CHECK(end.connection.send(Opcode::text, "b") == WriteStatus::queued);
        CHECK(end.connection.send_control(Opcode::ping, "c") == WriteStatus::queued);
        end.connection.set_write_blocked(false);
        CHECK(end.connection.send(Opcode::text, "d") == WriteStatus::sent);
        CHECK(end.sent() == "81 01 61 81 01 62 89 01 63 81 01 64");
    }

    Limits backlog_of_100(wschat::BacklogPolicy policy) {
        Limits limits;
        limits.max_backlog = 100;
        limits.backlog_policy = policy;
        return limits;
    }

    TEST_CASE("with the drop policy a message over the backlog limit is dropped and counted") {
        End end(Role::server, backlog_of_100(wschat::BacklogPolicy::drop));
        const std::string sixty(60, 'x');
        CHECK(end.connection.send(Opcode::text, sixty) == WriteStatus::sent);  // 62 bytes
        CHECK(end.connection.send(Opcode::text, sixty) == WriteStatus::dropped);
        CHECK(end.connection.send(Opcode::text, std::string(37, 'x')) == WriteStatus::dropped);
        CHECK(end.connection.dropped_messages() == 2);
        CHECK(end.connection.send(Opcode::text, std::string(36, 'y')) == WriteStatus::sent);  // 100 bytes
        CHECK(end.connection.output().size() == 100);
        CHECK(end.connection.is_open());
        CHECK(end.sent() == to_hex(frame(0x81, sixty) + frame(0x81, std::string(36, 'y'))));
        CHECK(end.connection.send(Opcode::text, sixty) == WriteStatus::sent);
        CHECK(end.connection.dropped_messages() == 2);
    }

    TEST_CASE("with the close policy a message over the backlog limit closes with 1008") {
        End end(Role::server, backlog_of_100(wschat::BacklogPolicy::close));
        const std::string sixty(60, 'x');
        CHECK(end.connection.send(Opcode::text, sixty) == WriteStatus::sent);
        CHECK(end.connection.send(Opcode::text, sixty) == WriteStatus::closed);
        CHECK(end.events() == "close 1008 backlog");
        CHECK(end.connection.close_reason() == "the peer reads too slowly");
        CHECK(end.connection.dropped_messages() == 0);
        CHECK(!end.connection.aborted());
        CHECK(end.sent() == to_hex(frame(0x81, sixty) + frame(0x88, close_body(1008, "the peer reads too slowly"))));
    }

    TEST_CASE("a volatile message never waits and never closes the connection") {
        wschat::detail::SendArena arena;
        const wschat::EncodedFrame encoded(arena, Opcode::text, "typing");
        for (const bool as_frame : {true, false}) {
            CAPTURE(as_frame);
            End end(Role::server, backlog_of_100(wschat::BacklogPolicy::close));
            const auto send = [&] {
                return as_frame ? end.connection.send_volatile(encoded)
                                : end.connection.send_volatile(Opcode::text, "typing");
            };
            CHECK(send() == WriteStatus::sent);
            end.connection.set_write_blocked(true);
            CHECK(send() == WriteStatus::dropped);
            end.connection.set_write_blocked(false);
            end.connection.send(Opcode::text, std::string(86, 'x'));
            CHECK(send() == WriteStatus::dropped);  // 96 bytes are queued
            CHECK(end.connection.dropped_messages() == 2);
            CHECK(end.connection.is_open());
            CHECK(end.sent() == to_hex(frame(0x81, "typing") + frame(0x81, std::string(86, 'x'))));
            end.connection.close(CloseCode::normal, {}, end.now);
            CHECK(send() == WriteStatus::closed);
            CHECK(end.connection.dropped_messages() == 2);
        }
    }

    TEST_CASE("an empty queue accepts one message of any size") {
        for (const Role role : both_roles) {
            End end(role, backlog_of_100(wschat::BacklogPolicy::drop));
            CHECK(end.connection.send(Opcode::binary, std::string(5000, 'x')) == WriteStatus::sent);
            CHECK(end.connection.send(Opcode::binary, "") == WriteStatus::dropped);
            end.sent();
            CHECK(end.connection.send(Opcode::binary, std::string(5000, 'x')) == WriteStatus::sent);
        }
    }

    TEST_CASE("the backlog limit does not apply to control frames") {
        End end(Role::server, backlog_of_100(wschat::BacklogPolicy::close));
        end.connection.send(Opcode::binary, std::string(5000, 'x'));
        CHECK(end.connection.send_control(Opcode::ping, "a") == WriteStatus::sent);
        CHECK(end.connection.send_control(Opcode::pong, "b") == WriteStatus::sent);
        end.peer("89 01 63");
        end.connection.close(CloseCode::normal, {}, end.now);
        const std::string sent = end.sent();
        CHECK(sent.substr(sent.size() - 38) == "89 01 61 8a 01 62 8a 01 63 88 02 03 e8");
        CHECK(end.connection.state() == Connection::State::closing);
    }

    TEST_CASE("several connections send one encoded frame") {
        wschat::detail::SendArena arena;
        const wschat::EncodedFrame encoded(arena, Opcode::text, "Hello");
        for (int i = 0; i < 3; ++i) {
            End end;
            CHECK(end.connection.send(encoded) == WriteStatus::sent);
            CHECK(end.sent() == "81 05 48 65 6c 6c 6f");
        }
    }

    TEST_CASE("a large message is offered to the transport and only the rest is queued") {
        const std::string payload = bytes_of(100'000), bytes = frame(0x82, payload);
        for (const std::size_t taken :
             std::initializer_list<std::size_t>{0, 1, 9, 10, 11, 50'000, bytes.size() - 1, bytes.size()}) {
            CAPTURE(taken);
            End end;
            std::string offered;
            const auto offer = [&](const std::string_view* pieces, std::size_t count) {
                for (std::size_t i = 0; i < count; ++i) offered += pieces[i];
                end.connection.set_write_blocked(taken != bytes.size());
                return taken;
            };
            CHECK(end.connection.send(Opcode::binary, payload, offer) ==
                  (taken == bytes.size() ? WriteStatus::sent : WriteStatus::queued));
            CHECK((offered == bytes));
            CHECK((bytes.substr(0, taken) + test::take_output(end.connection) == bytes));
        }
    }

    TEST_CASE("a message is not offered behind other output, to a blocked transport, after a close, or by a client") {
        const std::string large = bytes_of(100'000);
        const auto never = [](const std::string_view*, std::size_t) -> std::size_t {
            FAIL("the message was offered");
            return 0;
        };
        End behind_another;
        behind_another.connection.send(Opcode::text, "first");
        CHECK(behind_another.connection.send(Opcode::binary, large, never) == WriteStatus::sent);
        CHECK((test::take_output(behind_another.connection) == frame(0x81, "first") + frame(0x82, large)));
        End blocked;
        blocked.connection.set_write_blocked(true);
        CHECK(blocked.connection.send(Opcode::binary, large, never) == WriteStatus::queued);
        CHECK((test::take_output(blocked.connection) == frame(0x82, large)));
        End closed;
        closed.connection.close(CloseCode::normal, {}, start);
        closed.sent();
        CHECK(closed.connection.send(Opcode::binary, large, never) == WriteStatus::closed);
        CHECK(closed.sent() == "");
        End client(Role::client);
        CHECK(client.connection.send(Opcode::binary, large, never) == WriteStatus::sent);
        CHECK((test::take_output(client.connection) == masked(frame(0x82, large))));
    }

    wschat::detail::MaskKey counted_mask() {
        static unsigned char count = 0;
        return {++count, 0x00, 0xff, 0x10};
    }

    TEST_CASE("a client uses a new mask for each frame") {
        // RFC 6455 5.3: "a fresh masking key MUST be chosen" for every frame.
        End end(Role::client);
        Connection& client = end.connection;
        client.open(Role::client, end.limits, end.arena, start, &counted_mask);
        client.send(Opcode::text, "ab");
        client.send(Opcode::binary, "ab");
        client.send_control(Opcode::ping, "");
        client.close(CloseCode::normal, {}, start);
        CHECK(to_hex(test::take_output(client)) ==
              "81 82 01 00 ff 10 60 62 82 82 02 00 ff 10 63 62 89 80 03 00 ff 10 88 82 04 00 ff 10 07 e8");
    }

    TEST_CASE("a server never masks") {
        // RFC 6455 5.1: "A server MUST NOT mask any frames that it sends to the client."
        End end(Role::server);
        Connection& server = end.connection;
        server.open(Role::server, end.limits, end.arena, start, &counted_mask);
        server.send(Opcode::text, "ab");
        server.close(CloseCode::normal, {}, start);
        CHECK(to_hex(test::take_output(server)) == "81 02 61 62 88 02 03 e8");
    }

    // ---- receiving in place, pausing --------------------------------------------------------------------------------

    TEST_CASE("a large frame that is received in place is delivered unchanged") {
        for (const Role role : both_roles)
            for (const std::size_t piece : {std::size_t{997}, std::size_t{16'384}, std::size_t{300'000}})
                for (const bool binary : {false, true}) {
                    CAPTURE(piece);
                    CAPTURE(binary);
                    const std::string payload = binary ? bytes_of(1'000'003) : text_of(1'000'003);
                    const std::string frames = frame(binary ? 0x82 : 0x81, payload) + frame(0x81, "next");
                    End end(role);
                    CHECK((end.receive_in_place(wire(role, frames), piece).events() ==
                           (binary ? "binary " : "text ") + payload + " | text next"));
                    CHECK(end.in_place > 500'000);
                }
    }

    TEST_CASE("a large fragment that is received in place is joined with the others") {
        const std::string payload = text_of(500'000);
        const std::string frames = frame(0x01, payload.substr(0, 100'001)) + frame(0x89, "p") +
                                   frame(0x00, payload.substr(100'001, 199'999)) + frame(0x80, payload.substr(300'000));
        End end;
        CHECK((end.receive_in_place(masked(frames), 30'000).events() == "ping p | text " + payload));
        CHECK(end.in_place > 200'000);
    }

    TEST_CASE("text that is received in place is checked before the message ends") {
        std::string payload = text_of(1'000'000);
        payload[600'000] = '\xff';
        End end;
        const std::string bytes = masked(frame(0x81, payload));
        end.receive_in_place(bytes.substr(0, 590'000), 10'000);
        CHECK(end.connection.is_open());
        end.receive_in_place(bytes.substr(590'000, 20'000), 10'000);
        CHECK(end.events() == "close 1007 protocol error");
        CHECK(end.connection.receive_buffer().first == nullptr);
    }

    TEST_CASE("small frames and control frames have no receive_buffer") {
        End end(Role::client);
        CHECK(end.connection.receive_buffer().first == nullptr);
        end.receive(hex("81 7e 10 00") + std::string(100, 'x'));
        CHECK(end.connection.receive_buffer().first == nullptr);
        end.receive(std::string(3996, 'x'));
        end.events();
        end.receive(hex("02 7f 00 00 00 00 00 01 00 00") + std::string(40'000, 'x'));
        CHECK(end.connection.receive_buffer().first != nullptr);
        end.receive(std::string(25'536, 'x') + hex("89 05 61"));
        CHECK(end.connection.receive_buffer().first == nullptr);
    }

    TEST_CASE("paused input is processed after resume_input") {
        for (const Role role : both_roles) {
            const std::string bytes =
                wire(role, frame(0x81, "one") + frame(0x89, "p") + frame(0x81, text_of(500)) + frame(0x01, "th") +
                               frame(0x80, "ree") + frame(0x82, "half a frame"));
            const std::size_t cut = bytes.size() - 5;
            End end(role);
            end.receive_first_event(bytes.substr(0, cut));
            for (int i = 0; i < 3; ++i) {
                end.connection.resume_input();
                end.record(end.connection.next_event());
                end.connection.pause_input();
            }
            end.connection.resume_input();
            CHECK((end.events() == "text one | ping p | text " + text_of(500) + " | text three"));
            CHECK(end.receive(bytes.substr(cut)).events() == "binary half a frame");
        }
    }

    TEST_CASE("pausing and resuming without input has no effect") {
        End end;
        end.connection.pause_input();
        end.connection.resume_input();
        CHECK(end.peer("81 02 68 69").events() == "text hi");
        end.connection.pause_input();
        end.connection.pause_input();
        end.connection.resume_input();
        end.connection.resume_input();
        CHECK(end.events() == "");
        CHECK(end.peer("81 02 68 69").events() == "text hi");
    }

    TEST_CASE("paused input is dropped when the connection ends") {
        End end;
        end.receive_first_event(masked(hex("81 01 61 81 01 62")));
        end.connection.fail(CloseCode::internal_error, "");
        end.connection.resume_input();
        CHECK(end.events() == "text a | close 1011 protocol error");
    }

    // ---- illegal calls ---------------------------------------------------------------------------------------------

    TEST_CASE("illegal calls throw an Error that explains them") {
        End end;
        Connection fresh;
        CHECK_THROWS_WITH_AS(fresh.open(Role::client, end.limits, end.arena, start),
                             "Connection::open: a client needs a mask source", Error);
        CHECK_THROWS_WITH_AS(end.connection.send_control(Opcode::ping, std::string(126, 'x')),
                             "ping: a payload of 126 bytes is over 125", Error);
        CHECK_THROWS_WITH_AS(end.connection.close(CloseCode::normal, std::string(124, 'x'), start),
                             "close: a reason of 124 bytes is over 123", Error);
        CHECK_THROWS_WITH_AS(end.connection.close(CloseCode::normal, "\xff", start), "close: the reason is not UTF-8",
                             Error);
        for (const unsigned code : {0u, 999u, 1004u, 1005u, 1006u, 1015u, 2999u, 5000u}) {
            const std::string sentence = "close: " + std::to_string(code) + " is not a code that may be sent";
            CHECK_THROWS_WITH_AS(end.connection.close(static_cast<CloseCode>(code), {}, start), sentence.c_str(),
                                 Error);
        }
        CHECK(end.sent() == "");
        CHECK(end.connection.is_open());
        // A closed connection reports the mistake too.
        end.peer("88 00");
        CHECK_THROWS_AS(end.connection.close(CloseCode::abnormal, {}, start), Error);
    }

    TEST_CASE("resumed input is processed once") {
        End end;
        end.receive_first_event(masked(hex("81 01 61 81 01 62")));
        end.connection.resume_input();
        CHECK(end.events() == "text a | text b");
        end.connection.resume_input();
        CHECK(end.events() == "");
        CHECK(end.peer("81 01 63").events() == "text c");
    }
}
