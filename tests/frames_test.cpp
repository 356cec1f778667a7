// Section 4 of the header: frames (RFC 6455 5).
#include "support.hpp"

#include <cstring>

using namespace wschat;
using namespace wschat::detail;

namespace {

using Outcome = ParsedFrame::Outcome;

struct Parsed : ParsedFrame {
    FrameHeader header;
};
template <class Parser>
Parsed parse(Parser&& parser, std::string_view bytes) {
    Parsed parsed;
    static_cast<ParsedFrame&>(parsed) = parser.parse(bytes, parsed.header);
    return parsed;
}

// A parser in the middle of a fragmented message.
FrameParser parser_within_message(Role role = Role::server) {
    FrameParser parser(role);
    const Parsed parsed = parse(parser, test::hex(role == Role::server ? "01 80 00 00 00 00" : "01 00"));
    REQUIRE(parsed.outcome == Outcome::header);
    return parser;
}

// Adds the four bytes of the mask if the mask bit is set.
std::string with_mask(std::string header) {
    if (header.size() > 1 && (static_cast<unsigned char>(header[1]) & 0x80) != 0) header += test::hex("37 fa 21 3d");
    return header;
}

std::string bytes_of(const Slice& slice) { return std::string(slice.view()); }

std::string encoded(const FrameHeader& header) {
    char bytes[FrameHeader::max_size];
    return std::string(bytes, encode(header, bytes));
}

void naive_mask(std::string& data, const MaskKey& mask, std::size_t offset = 0) {
    for (std::size_t i = 0; i < data.size(); ++i)
        data[i] = static_cast<char>(data[i] ^ static_cast<char>(mask[(offset + i) % 4]));
}

}  // namespace

TEST_SUITE_BEGIN("frames");

// ---- the examples of the RFC ----------------------------------------------------------------------------------------

TEST_CASE("the examples of RFC 6455 5.7 are parsed") {
    struct Row {
        std::string bytes;
        Role role;
        bool within_message;
        Opcode opcode;
        bool fin, masked;
        std::uint64_t length;
        std::size_t header_size;
    };
    const Row rows[] = {
        {"81 05 48 65 6c 6c 6f", Role::client, false, Opcode::text, true, false, 5, 2},
        {"81 85 37 fa 21 3d 7f 9f 4d 51 58", Role::server, false, Opcode::text, true, true, 5, 6},
        {"01 03 48 65 6c", Role::client, false, Opcode::text, false, false, 3, 2},
        {"80 02 6c 6f", Role::client, true, Opcode::continuation, true, false, 2, 2},
        {"89 05 48 65 6c 6c 6f", Role::client, false, Opcode::ping, true, false, 5, 2},
        {"8a 85 37 fa 21 3d 7f 9f 4d 51 58", Role::server, false, Opcode::pong, true, true, 5, 6},
        {"82 7e 01 00", Role::client, false, Opcode::binary, true, false, 256, 4},
        {"82 7f 00 00 00 00 00 01 00 00", Role::client, false, Opcode::binary, true, false, 65536, 10},
    };
    for (const Row& row : rows) {
        CAPTURE(row.bytes);
        FrameParser parser = row.within_message ? parser_within_message(row.role) : FrameParser(row.role);
        const Parsed parsed = parse(parser, test::hex(row.bytes));
        REQUIRE(parsed.outcome == Outcome::header);
        CHECK(parsed.size == row.header_size);
        CHECK(parsed.header.opcode == row.opcode);
        CHECK(parsed.header.fin == row.fin);
        CHECK_FALSE(parsed.header.rsv1);
        CHECK(parsed.header.masked == row.masked);
        CHECK(parsed.header.length == row.length);
        if (row.masked) CHECK(parsed.header.mask == MaskKey{0x37, 0xfa, 0x21, 0x3d});
    }
}

TEST_CASE("the examples of RFC 6455 5.7 are encoded byte for byte") {
    SendArena arena;
    CHECK(bytes_of(EncodedFrame(arena, Opcode::text, "Hello").slice()) == test::hex("81 05 48 65 6c 6c 6f"));
    CHECK(bytes_of(encode_masked(arena, Opcode::text, "Hello", {0x37, 0xfa, 0x21, 0x3d})) ==
          test::hex("81 85 37 fa 21 3d 7f 9f 4d 51 58"));
    CHECK(bytes_of(EncodedFrame(arena, Opcode::ping, "Hello").slice()) == test::hex("89 05 48 65 6c 6c 6f"));
    CHECK(bytes_of(encode_masked(arena, Opcode::pong, "Hello", {0x37, 0xfa, 0x21, 0x3d})) ==
          test::hex("8a 85 37 fa 21 3d 7f 9f 4d 51 58"));
    const std::string small(256, 'x'), large(65536, 'y');
    CHECK(bytes_of(EncodedFrame(arena, Opcode::binary, small).slice()) == test::hex("82 7e 01 00") + small);
    CHECK(bytes_of(EncodedFrame(arena, Opcode::binary, large).slice()) ==
          test::hex("82 7f 00 00 00 00 00 01 00 00") + large);

    FrameHeader first, last;
    first.fin = false;
    first.length = 3;
    last.opcode = Opcode::continuation;
    last.length = 2;
    CHECK(encoded(first) == test::hex("01 03"));
    CHECK(encoded(last) == test::hex("80 02"));
}

// ---- lengths --------------------------------------------------------------------------------------------------------

TEST_CASE("a length is parsed in each of its three forms, at all boundaries") {
    struct Row {
        std::string header;
        std::uint64_t length;
    };
    // clang-format off
    const Row rows[] = {
        {"82 80", 0}, {"82 81", 1}, {"82 fd", 125}, {"82 fe 00 7e", 126}, {"82 fe 00 7f", 127}, {"82 fe 00 ff", 255},
        {"82 fe 01 00", 256}, {"82 fe ff ff", 65535}, {"82 ff 00 00 00 00 00 01 00 00", 65536},
        {"82 ff 00 00 00 00 00 01 00 01", 65537}, {"82 ff 00 00 00 00 ff ff ff ff", 0xFFFFFFFF},
        {"82 ff 00 00 00 01 00 00 00 00", 0x100000000}, {"82 ff 12 34 56 78 9a bc de f0", 0x123456789ABCDEF0},
        {"82 ff 7f ff ff ff ff ff ff ff", 0x7FFFFFFFFFFFFFFF},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.header);
        const std::string bytes = with_mask(test::hex(row.header));
        const Parsed parsed = parse(FrameParser(Role::server), bytes);
        REQUIRE(parsed.outcome == Outcome::header);
        CHECK(parsed.header.length == row.length);
        CHECK(parsed.size == bytes.size());
    }
}

TEST_CASE("a length that is not in its shortest form fails with 1002") {
    // RFC 6455 5.2: "in all cases, the minimal number of bytes MUST be used to encode the length, for example, the length
    // of a 124-byte-long string can't be encoded as the sequence 126, 0, 124".
    for (const std::string header :
         {"82 fe 00 00", "82 fe 00 7c", "82 fe 00 7d", "82 ff 00 00 00 00 00 00 00 00", "82 ff 00 00 00 00 00 00 00 7d",
          "82 ff 00 00 00 00 00 00 00 7e", "82 ff 00 00 00 00 00 00 01 00", "82 ff 00 00 00 00 00 00 ff ff"}) {
        CAPTURE(header);
        const Parsed parsed = parse(FrameParser(Role::server), with_mask(test::hex(header)));
        CHECK(parsed.outcome == Outcome::failure);
    }
}

TEST_CASE("a length whose top bit is set fails with 1002") {
    // RFC 6455 5.2: "the most significant bit MUST be 0".
    for (const std::string header :
         {"82 ff 80 00 00 00 00 00 00 00", "82 ff 80 00 00 00 00 01 00 00", "82 ff ff ff ff ff ff ff ff ff"}) {
        CAPTURE(header);
        const Parsed parsed = parse(FrameParser(Role::server), with_mask(test::hex(header)));
        CHECK(parsed.outcome == Outcome::failure);
    }
}

// ---- the first two bytes --------------------------------------------------------------------------------------------

TEST_CASE("reserved bits, reserved opcodes and invalid control frames fail with 1002") {
    struct Row {
        std::string header;
        std::string why;
    };
    // clang-format off
    const Row rows[] = {
        {"91 80", "RSV3"}, {"a1 80", "RSV2"}, {"c1 80", "RSV1 without the extension"}, {"f2 80", "RSV1-3"},
        {"c9 80", "RSV1 on a ping"}, {"83 80", "opcode 3"}, {"84 80", "opcode 4"}, {"85 80", "opcode 5"},
        {"86 80", "opcode 6"}, {"87 80", "opcode 7"}, {"8b 80", "opcode B"}, {"8c 80", "opcode C"},
        {"8d 80", "opcode D"}, {"8e 80", "opcode E"}, {"8f 80", "opcode F"}, {"08 80", "a fragmented close"},
        {"09 80", "a fragmented ping"}, {"0a 80", "a fragmented pong"}, {"88 fe 00 7e", "a close of 126 bytes"},
        {"89 fe 00 7e", "a ping of 126 bytes"}, {"8a fe 00 7e", "a pong of 126 bytes"},
        {"89 ff 00 00 00 00 00 01 00 00", "a ping of 65,536 bytes"},
        {"80 80", "the end of a message that has no beginning"}, {"00 80", "a continuation without a message"},
        {"81 05", "a frame from a client without a mask"},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.why);
        const Parsed parsed = parse(FrameParser(Role::server), with_mask(test::hex(row.header)));
        CHECK(parsed.outcome == Outcome::failure);
        REQUIRE(parsed.reason != nullptr);
        CHECK(*parsed.reason != 0);
        CHECK(std::strlen(parsed.reason) <= 123);  // it must fit a Close frame (RFC 6455 5.5.1)
    }
}

TEST_CASE("a control frame may have 125 bytes") {
    for (const std::string header : {"88 fd", "89 fd", "8a fd"}) {
        const Parsed parsed = parse(FrameParser(Role::server), with_mask(test::hex(header)));
        CHECK(parsed.outcome == Outcome::header);
        CHECK(parsed.header.length == 125);
    }
}

TEST_CASE("a server requires a mask and a client rejects a mask") {
    // RFC 6455 5.1: "The server MUST close the connection upon receiving a frame that is not masked." "A client MUST close
    // a connection if it detects a masked frame."
    for (const std::string first : {"81", "82", "88", "89", "8a"}) {
        const std::string masked = test::hex(first + " 80 37 fa 21 3d"), plain = test::hex(first + " 00");
        CHECK(parse(FrameParser(Role::server), masked).outcome == Outcome::header);
        CHECK(parse(FrameParser(Role::client), plain).outcome == Outcome::header);
        CHECK(parse(FrameParser(Role::server), plain).outcome == Outcome::failure);
        CHECK(parse(FrameParser(Role::client), masked).outcome == Outcome::failure);
    }
}

TEST_CASE("each of the 65,536 ways to begin a frame is parsed as RFC 6455 5.2-5.5 requires") {
    for (const Role role : {Role::server, Role::client}) {
        for (const bool within_message : {false, true}) {
            const FrameParser initial = within_message ? parser_within_message(role) : FrameParser(role);
            for (unsigned first = 0; first < 256; ++first) {
                for (unsigned second = 0; second < 256; ++second) {
                    const bool fin = (first & 0x80) != 0, masked = (second & 0x80) != 0;
                    const unsigned opcode = first & 0x0F, length = second & 0x7F;
                    const bool known = opcode <= 0x2 || (opcode >= 0x8 && opcode <= 0xA);
                    const bool control = opcode >= 0x8;
                    const bool legal = (first & 0x70) == 0 && known && masked == (role == Role::server) &&
                                       (control ? fin && length <= 125 : (opcode == 0) == within_message);
                    // A valid length in the longer forms, and a mask.
                    std::string bytes{static_cast<char>(first), static_cast<char>(second)};
                    if (length == 126) bytes += test::hex("01 00");
                    if (length == 127) bytes += test::hex("00 00 00 00 00 01 00 00");
                    if (masked) bytes += test::hex("01 02 03 04");
                    FrameParser parser = initial;
                    const Parsed parsed = parse(parser, bytes);
                    const bool correct = legal ? parsed.outcome == Outcome::header && parsed.size == bytes.size() &&
                                                     parsed.header.fin == fin && parsed.header.opcode == Opcode(opcode)
                                               : parsed.outcome == Outcome::failure;
                    if (!correct) FAIL_CHECK(test::to_hex(bytes));
                }
            }
        }
    }
}

// ---- the order of frames --------------------------------------------------------------------------------------------

TEST_CASE("continuations follow the rules of RFC 6455 5.4 in every sequence of five frames") {
    const std::string kinds = test::hex("81 02 00 80 89");  // complete, first, continuation, last, control
    for (unsigned sequence = 0; sequence < 5 * 5 * 5 * 5 * 5; ++sequence) {
        FrameParser parser(Role::client);
        bool open = false;
        unsigned rest = sequence;
        std::string bytes;
        for (int i = 0; i < 5; ++i, rest /= 5) {
            const char first = kinds[rest % 5];
            bytes += first;
            const bool control = first == '\x89', continues = first == '\x00' || first == '\x80';
            const bool legal = control || continues == open;
            const bool parsed = parse(parser, std::string{first, '\x00'}).outcome == Outcome::header;
            if (parsed != legal) FAIL_CHECK(test::to_hex(bytes));
            if (!legal) break;
            if (!control) open = first == '\x02' || first == '\x00';
        }
    }
}

TEST_CASE("a control frame in the middle of a message leaves the message open") {
    FrameParser parser = parser_within_message();
    CHECK(parse(parser, with_mask(test::hex("89 80"))).outcome == Outcome::header);
    CHECK(parse(parser, with_mask(test::hex("00 80"))).outcome == Outcome::header);
    CHECK(parse(parser, with_mask(test::hex("8a 80"))).outcome == Outcome::header);
    CHECK(parse(parser, with_mask(test::hex("80 80"))).outcome == Outcome::header);
    CHECK(parse(parser, with_mask(test::hex("80 80"))).outcome == Outcome::failure);
}

// ---- pieces ---------------------------------------------------------------------------------------------------------

TEST_CASE("an incomplete header needs more bytes at every split") {
    for (const std::string header : {"81 80", "82 fd", "01 fe 00 7e", "89 fd", "82 fe ff ff",
                                     "82 ff 00 00 00 00 00 01 00 00", "82 ff 7f ff ff ff ff ff ff ff"}) {
        CAPTURE(header);
        const std::string bytes = with_mask(test::hex(header));
        FrameParser parser(Role::server);
        for (std::size_t size = 0; size < bytes.size(); ++size)
            CHECK(parse(parser, std::string_view(bytes).substr(0, size)).outcome == Outcome::need_more);
        const Parsed parsed = parse(parser, bytes);
        const Parsed followed = parse(FrameParser(Role::server), bytes + "payload");
        REQUIRE(parsed.outcome == Outcome::header);
        REQUIRE(followed.outcome == Outcome::header);
        CHECK(parsed.size == bytes.size());
        CHECK(followed.size == bytes.size());
        CHECK(parsed.header.length == followed.header.length);
        CHECK(parsed.header.mask == followed.header.mask);
    }
}

TEST_CASE("a header fails at the first byte that breaks a rule") {
    struct Row {
        std::string bytes;
        std::size_t fails_at;  // size of the shortest input that fails
        bool within_message;
    };
    // clang-format off
    const Row rows[] = {
        {"91 80 01 02 03 04", 1, false}, {"83 80 01 02 03 04", 1, false}, {"09 80 01 02 03 04", 1, false},
        {"80 80 01 02 03 04", 1, false}, {"81 80 01 02 03 04", 1, true}, {"81 05 48 65 6c 6c 6f", 2, false},
        {"89 fe 00 7e 01 02 03 04", 2, false}, {"88 ff 00 00 00 00 00 01 00 00 01 02 03 04", 2, false},
        {"82 ff 80 00 00 00 00 01 00 00 01 02 03 04", 3, false}, {"82 fe 00 7d 01 02 03 04", 4, false},
        // After six zero bytes no length needs eight bytes.
        {"82 ff 00 00 00 00 00 00 ff ff 01 02 03 04", 8, false},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.bytes);
        const std::string bytes = test::hex(row.bytes);
        for (std::size_t size = 0; size <= bytes.size(); ++size) {
            CAPTURE(size);
            FrameParser parser = row.within_message ? parser_within_message() : FrameParser(Role::server);
            const Parsed parsed = parse(parser, std::string_view(bytes).substr(0, size));
            CHECK(parsed.outcome == (size < row.fails_at ? Outcome::need_more : Outcome::failure));
        }
    }
}

// ---- encoding -------------------------------------------------------------------------------------------------------

TEST_CASE("an encoded header has the shortest form and parses to the same header") {
    const std::uint64_t lengths[] = {0,   1,     124,   125,   126,   127,        255,
                                     256, 65534, 65535, 65536, 65537, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF};
    for (const std::uint64_t length : lengths) {
        for (const Opcode opcode :
             {Opcode::continuation, Opcode::text, Opcode::binary, Opcode::close, Opcode::ping, Opcode::pong}) {
            for (const bool fin : {true, false}) {
                for (const bool masked : {true, false}) {
                    if (is_control(opcode) && (!fin || length > 125)) continue;
                    FrameHeader header;
                    header.fin = fin;
                    header.opcode = opcode;
                    header.masked = masked;
                    if (masked) header.mask = {0xDE, 0xAD, 0xBE, 0xEF};
                    header.length = length;
                    const std::string bytes = encoded(header);
                    CAPTURE(test::to_hex(bytes));
                    CHECK(bytes.size() == encoded_size(header));
                    CHECK(bytes.size() == (length < 126 ? 2u : length < 65536 ? 4u : 10u) + (masked ? 4u : 0u));
                    const Role role = masked ? Role::server : Role::client;
                    FrameParser parser =
                        opcode == Opcode::continuation ? parser_within_message(role) : FrameParser(role);
                    const Parsed parsed = parse(parser, bytes);
                    REQUIRE(parsed.outcome == Outcome::header);
                    CHECK(parsed.size == bytes.size());
                    CHECK(parsed.header.fin == fin);
                    CHECK(parsed.header.opcode == opcode);
                    CHECK(parsed.header.masked == masked);
                    CHECK(parsed.header.mask == header.mask);
                    CHECK(parsed.header.length == length);
                }
            }
        }
    }
}

TEST_CASE("RSV1 is the second bit of the first byte") {
    FrameHeader header;
    header.rsv1 = true;
    CHECK(encoded(header) == test::hex("c1 00"));
}

TEST_CASE("a frame is its header and its payload in each form of the length") {
    struct Row {
        std::size_t size;
        std::string plain;
        std::string masked;
    };
    // clang-format off
    const Row rows[] = {
        {0, "81 00", "81 80"}, {1, "81 01", "81 81"}, {125, "81 7d", "81 fd"}, {126, "81 7e 00 7e", "81 fe 00 7e"},
        {65535, "81 7e ff ff", "81 fe ff ff"},
        {65536, "81 7f 00 00 00 00 00 01 00 00", "81 ff 00 00 00 00 00 01 00 00"},
        {1000000, "81 7f 00 00 00 00 00 0f 42 40", "81 ff 00 00 00 00 00 0f 42 40"},
    };
    // clang-format on
    SendArena arena;
    for (const Row& row : rows) {
        CAPTURE(row.size);
        std::string payload(row.size, '\0');
        for (std::size_t i = 0; i < row.size; ++i) payload[i] = static_cast<char>(i * 7);
        const EncodedFrame frame(arena, Opcode::text, payload);
        const Slice masked = encode_masked(arena, Opcode::text, payload, test::test_mask());
        CHECK(frame.opcode() == Opcode::text);
        CHECK(frame.size() == frame.slice().size());
        const bool same = bytes_of(frame.slice()) == test::hex(row.plain) + payload;
        CHECK(same);
        naive_mask(payload, test::test_mask());
        const bool same_masked = bytes_of(masked) == test::hex(row.masked) + test::hex("37 fa 21 3d") + payload;
        CHECK(same_masked);
    }
}

TEST_CASE("all queues share one encoded frame") {
    SendArena arena;
    const EncodedFrame frame(arena, Opcode::text, "Hello");
    SendQueue a, b;
    a.append(frame.slice());
    b.append(frame.slice());
    std::string_view piece_of_a, piece_of_b;
    REQUIRE(a.gather(&piece_of_a, 1) == 1);
    REQUIRE(b.gather(&piece_of_b, 1) == 1);
    CHECK(piece_of_a == test::hex("81 05 48 65 6c 6c 6f"));
    CHECK(piece_of_a.data() == piece_of_b.data());
}

// ---- masking --------------------------------------------------------------------------------------------------------

TEST_CASE("masking is the xor of RFC 6455 5.3 at every offset, size and alignment") {
    const MaskKey mask = {0x37, 0xfa, 0x21, 0x3d};
    for (std::size_t offset = 0; offset < 4; ++offset) {
        for (std::size_t size = 0; size <= 70; ++size) {
            for (std::size_t alignment = 0; alignment < 8; ++alignment) {
                std::string memory(alignment + size + 8, '\0');
                for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<char>(i * 31 + size);
                std::string expected = memory.substr(alignment, size);
                naive_mask(expected, mask, offset);
                // The bytes before and after the payload stay the same.
                expected = memory.substr(0, alignment) + expected + memory.substr(alignment + size);
                apply_mask(&memory[alignment], size, mask, offset);
                if (memory != expected) FAIL_CHECK("offset ", offset, ", size ", size, ", alignment ", alignment);
            }
        }
    }
}

TEST_CASE("masking reports a byte that is not ASCII at every position") {
    const MaskKey mask = {0x37, 0xfa, 0x21, 0x3d};
    for (std::size_t size = 0; size <= 70; ++size) {
        for (std::size_t at = 0; at <= size; ++at) {
            std::string payload(size, 'x');
            if (at < size) payload[at] = '\x80';
            naive_mask(payload, mask);
            if (apply_mask(&payload[0], size, mask) != (at == size)) FAIL_CHECK("size ", size, ", byte ", at);
        }
    }
}

TEST_CASE("masking in pieces equals masking at once, and masking twice restores the payload") {
    const MaskKey mask = {0x01, 0x80, 0xFF, 0x5A};
    const std::string original = "a payload in two pieces with all possible sizes and alignments of each piece";
    std::string masked = original;
    apply_mask(&masked[0], masked.size(), mask);
    CHECK(masked != original);
    for (std::size_t split = 0; split <= original.size(); ++split) {
        std::string pieces = original;
        apply_mask(&pieces[0], split, mask);
        apply_mask(&pieces[split], pieces.size() - split, mask, split);
        CHECK(pieces == masked);
        apply_mask(&pieces[0], pieces.size(), mask);
        CHECK(pieces == original);
    }
}

TEST_SUITE_END();
