// UTF-8, masks, close payloads, JSON and log lines, each compared with a simple and slow reference.
//
// Input: a byte for the filler before the text, its size, the alignment in memory, a byte for the chunks, then the
// text. As a Close payload and as a double the text is used without filler.
#include "fuzz.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;

// ---- UTF-8 ---------------------------------------------------------------------------------------------------------

// feed() returns false exactly for the first chunk with an invalid byte.
void check_validator(std::string_view text, Chunker chunker, std::size_t alignment) {
    bool complete = false;
    const std::size_t valid = reference_utf8_prefix(text, &complete);
    Utf8Validator validator;
    for (std::size_t done = 0; done < text.size();) {
        ExactCopy piece(text.substr(done, chunker.next_size(text.size() - done)), alignment);
        done += piece.size();
        const bool accepted = validator.feed(piece.data(), piece.size());
        check(accepted == (done <= valid),
              accepted ? "the validator accepts invalid UTF-8" : "the validator rejects valid UTF-8", text);
        if (!accepted) return;
    }
    check(validator.complete() == complete, "complete() is wrong", text);
    validator.reset();
    check(validator.complete(), "complete() is wrong after reset()", text);
}

void check_utf8(std::string_view text, unsigned seed, std::size_t alignment) {
    check_validator(text, Chunker(Chunker::Kind::whole), alignment);
    check_validator(text, Chunker(Chunker::Kind::bytes), alignment);
    check_validator(text, Chunker(Chunker::Kind::random, seed), alignment);
    check(wschat::valid_utf8(text) == reference_utf8(text), "valid_utf8() is wrong", text);
}

// For a valid text, the longest prefix of whole characters. For any text, a prefix.
void check_cut(std::string_view text, std::size_t max) {
    const std::string_view cut = wschat::truncate_utf8(text, max);
    check(cut.size() <= max && cut == text.substr(0, cut.size()), "truncate_utf8() does not return a prefix", text);
    if (!reference_utf8(text)) return;
    std::size_t longest = (std::min)(max, text.size());
    while (!reference_utf8(text.substr(0, longest))) --longest;
    check(cut.size() == longest, "truncate_utf8() does not end at the last whole character", text);
}

// ---- masks ---------------------------------------------------------------------------------------------------------

void check_mask(std::string_view text, unsigned seed, std::size_t alignment) {
    Random random(seed);
    wschat::detail::MaskKey key{};
    // A key of zeros does not change the text.
    for (unsigned char& byte : key)
        byte = static_cast<unsigned char>(seed % 3 == 0 ? 0 : random.below(seed % 3 == 1 ? 256 : 128));
    const std::size_t offset = random.below(9);
    ExactCopy data(text, alignment);
    std::string expected;
    bool ascii = true;
    for (std::size_t i = 0; i < text.size(); ++i) {
        expected += static_cast<char>(static_cast<unsigned char>(text[i]) ^ key[(offset + i) % 4]);
        ascii = ascii && static_cast<unsigned char>(expected.back()) < 0x80;
    }
    const bool is_ascii = wschat::detail::apply_mask(data.data(), data.size(), key, offset);
    check_equal(data.view(), expected, "a byte is masked wrongly");
    check(is_ascii == ascii, "the ASCII result of apply_mask() is wrong", expected);
    wschat::detail::apply_mask(data.data(), data.size(), key, offset);
    check_equal(data.view(), text, "masking twice does not restore the text");
}

// ---- close payloads ------------------------------------------------------------------------------------------------

wschat::detail::MaskKey no_mask() { return {}; }

struct TestConnection {
    explicit TestConnection(Role role) {
        connection.open(role, limits, arena, {}, role == Role::client ? &no_mask : nullptr);
    }
    std::string sent() {
        std::string bytes;
        std::string_view piece;
        while (connection.output().gather(&piece, 1) != 0) {
            bytes += piece;
            connection.output().consume(std::string(piece).size());
        }
        return bytes;
    }
    wschat::Limits limits;
    wschat::detail::SendArena arena;
    Connection connection;
};

// Checks the code of a client's reply to a Close frame with this payload.
void check_close_payload(std::string_view text) {
    const std::string_view payload = text.substr(0, 125);
    const unsigned code = payload.size() < 2 ? 0
                                             : static_cast<unsigned>(static_cast<unsigned char>(payload[0])) << 8 |
                                                   static_cast<unsigned char>(payload[1]);
    const unsigned failure = payload.empty()                                     ? 0
                             : payload.size() == 1 || !sendable_close_code(code) ? 1002
                             : !reference_utf8(payload.substr(2))                ? 1007
                                                                                 : 0;
    const unsigned expected = failure != 0 ? failure : payload.empty() ? 1005 : code;
    TestConnection end(Role::client);
    std::string bytes = {static_cast<char>(0x88), static_cast<char>(payload.size())};
    ExactCopy frame(bytes.append(payload));
    end.connection.receive(frame.data(), frame.size(), {});
    check(end.connection.next_event().kind == Event::Kind::close, "a Close frame does not end the connection", payload);
    check(end.connection.next_event().kind == Event::Kind::none, "an event follows the close event", payload);
    check(number(end.connection.close_code()) == expected, "the code of the reply to a Close frame is wrong", payload);
    check((end.connection.close_cause() == wschat::CloseCause::peer) == (failure == 0), "the close cause is wrong",
          payload);
    if (failure == 0)
        check_equal(end.connection.close_reason(), payload.size() < 2 ? "" : payload.substr(2),
                    "the close reason is wrong");
    const std::string reply = end.sent();
    const std::string echo = {static_cast<char>(expected >> 8), static_cast<char>(expected & 0xFF)};
    check(reply.size() >= 6 && reply[0] == '\x88', "the reply is not a Close frame", reply);
    if (expected == 1005) check(reply.size() == 6, "the reply to a Close frame without a code has a code", reply);
    else check_equal(std::string_view(reply).substr(6, 2), echo, "the code of the reply is wrong");
}

// close() sends a valid code and reason, and throws for others.
void check_close_call(std::string_view text) {
    const unsigned code =
        text.size() < 2 ? 1000 : static_cast<unsigned char>(text[0]) * 256u + static_cast<unsigned char>(text[1]);
    const std::string_view reason = text.size() < 2 ? text : text.substr(2);
    const bool valid = sendable_close_code(code) && reason.size() <= 123 && reference_utf8(reason);
    check(wschat::detail::legal_on_wire(static_cast<CloseCode>(code)) == sendable_close_code(code),
          "legal_on_wire() is wrong");
    TestConnection end(Role::server);
    try {
        end.connection.close(static_cast<CloseCode>(code), reason, {});
        check(valid, "close() accepts an invalid code or reason", reason);
    } catch (const wschat::Error&) {
        check(!valid, "close() rejects a valid code and reason", reason);
        check(end.connection.is_open() && end.connection.output().empty(), "a rejected close() changes the connection");
        return;
    }
    std::string expected = {static_cast<char>(0x88), static_cast<char>(2 + reason.size()), static_cast<char>(code >> 8),
                            static_cast<char>(code & 0xFF)};
    check_equal(end.sent(), expected.append(reason), "the Close frame of close() is wrong");
}

// ---- JSON ----------------------------------------------------------------------------------------------------------

// RFC 8259 7: decodes a quoted string as Json writes it.
std::string json_value(std::string_view quoted) {
    check(quoted.size() >= 2 && quoted.front() == '"' && quoted.back() == '"', "a JSON string has no quotes", quoted);
    quoted = quoted.substr(1, quoted.size() - 2);
    check(reference_utf8(quoted), "JSON is not UTF-8", quoted);
    std::string value;
    for (std::size_t i = 0; i < quoted.size(); ++i) {
        const char c = quoted[i];
        check(static_cast<unsigned char>(c) >= 0x20 && c != '"', "a JSON string has a character that must be escaped",
              quoted);
        if (c != '\\') {
            value += c;
            continue;
        }
        const char escape = ++i < quoted.size() ? quoted[i] : '\0';
        if (escape == '"' || escape == '\\') value += escape;
        else if (escape == 'n') value += '\n';
        else {
            const std::string digits(quoted.substr(i + 1, 4));
            check(escape == 'u' && digits.size() == 4 && digits.substr(0, 2) == "00" &&
                      digits.find_first_not_of("0123456789abcdef") == std::string::npos,
                  "a JSON string has an unexpected escape", quoted);
            value += static_cast<char>(std::strtoul(digits.c_str(), nullptr, 16));
            i += 4;
        }
    }
    return value;
}

// Replaces each byte that begins no valid character with U+FFFD.
std::string with_replacements(std::string_view text) {
    std::string result;
    while (!text.empty()) {
        std::size_t size = 1;
        while (size <= 4 && size <= text.size() && !reference_utf8(text.substr(0, size))) ++size;
        const bool valid = size <= 4 && size <= text.size();
        result += valid ? text.substr(0, size) : std::string_view("\xEF\xBF\xBD");
        text.remove_prefix(valid ? size : 1);
    }
    return result;
}

void check_json(std::string_view text) {
    const std::string quoted = Json(text).dump();
    check_equal(json_value(quoted), with_replacements(text), "a JSON string has a wrong value");
    check_equal(Json{{text, text}}.dump(), "{" + quoted + ":" + quoted + "}", "an object with one member is wrong");
    check_equal(Json::array(std::vector<std::string>(2, std::string(text))).dump(), "[" + quoted + "," + quoted + "]",
                "an array with two elements is wrong");
}

// RFC 8259 6: -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)?
bool json_number(std::string_view s) {
    const auto digits = [&s] {
        std::size_t n = 0;
        for (; !s.empty() && s.front() >= '0' && s.front() <= '9'; s.remove_prefix(1)) ++n;
        return n;
    };
    const auto skip = [&s](std::string_view characters) {
        const bool found = !s.empty() && characters.find(s.front()) != std::string_view::npos;
        if (found) s.remove_prefix(1);
        return found;
    };
    skip("-");
    const bool zero = !s.empty() && s.front() == '0';
    const std::size_t whole = digits();
    if (whole == 0 || (zero && whole > 1)) return false;
    if (skip(".") && digits() == 0) return false;
    if (skip("eE") && (skip("+-"), digits() == 0)) return false;
    return s.empty();
}

void check_number(std::string_view text) {
    double value = 0;
    std::memcpy(&value, text.data(), (std::min)(text.size(), sizeof value));
    const std::string json = Json(value).dump();
    if (!std::isfinite(value)) return check_equal(json, "null", "an infinite or NaN value is not null");
    check(json_number(json), "a number is not valid JSON", json);
    const double back = std::strtod(json.c_str(), nullptr);
    check(std::memcmp(&back, &value, sizeof value) == 0, "a JSON number has a wrong value", json);
}

// ---- lines of text -------------------------------------------------------------------------------------------------

void check_log_line(std::string_view text, std::size_t max) {
    const std::string line = wschat::escape_for_log(text, max);
    check(line.size() <= 4 * (std::min)(max, text.size()) + 3, "an escaped text is too long", line);
    std::string back;
    for (std::size_t i = 0; i < line.size(); ++i) {
        check(line[i] >= ' ' && line[i] <= '~' && line[i] != '"', "an escaped text has an unsafe character", line);
        if (line[i] != '\\') {
            back += line[i];
            continue;
        }
        back += static_cast<char>(std::strtoul(line.substr(i + 2, 2).c_str(), nullptr, 16));
        i += 3;
    }
    check_equal(back, std::string(text.substr(0, max)) + (text.size() > max ? "..." : ""), "escaping changes the text");
}

// RFC 4648 4, bit by bit.
void check_base64(std::string_view text) {
    const std::string encoded = wschat::base64(reinterpret_cast<const unsigned char*>(text.data()), text.size());
    const std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string bits;
    for (const char c : encoded)
        for (int bit = 5; c != '=' && bit >= 0; --bit) bits += (alphabet.find(c) >> bit & 1) != 0 ? '1' : '0';
    std::string back;
    for (std::size_t i = 0; i + 8 <= bits.size(); i += 8)
        back += static_cast<char>(std::strtoul(bits.substr(i, 8).c_str(), nullptr, 2));
    check_equal(back, text, "base64 decodes to another text");
    check(encoded.size() == (text.size() + 2) / 3 * 4, "base64 is not padded", encoded);
}

// Text that moves the input across the borders of blocks of 32 and 64 bytes.
std::string filler(unsigned kind, std::size_t size) {
    constexpr std::string_view characters[] = {"a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80",
                                               "a\xC3\xA9\xE2\x82\xAC"};
    std::string text;
    while (text.size() < size) text += characters[kind % 5];
    return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    InputReader input(data, size);
    const unsigned kind = input.byte(), before = input.byte(), alignment = input.byte() % 64, seed = input.byte();
    const std::string_view text = input.remaining_bytes();
    std::string filled = filler(kind, before);
    filled.append(text);
    if (kind >= 128) filled += filler(kind, 100);
    check_utf8(filled, seed, alignment);
    check_mask(filled, seed, alignment);
    check_cut(filled, before + seed);
    check_close_payload(text);
    check_close_call(text);
    check_json(text);
    check_number(text);
    check_log_line(text, seed);
    check_base64(text.substr(0, 100));
    return 0;
}
