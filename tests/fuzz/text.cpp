// UTF-8, masks, close payloads, JSON and log lines, each against a reference as slow and obvious as can be.
//
// Input: a byte for what stands before the text, one for how much of it, one for where in memory it lies, one for how it
// is cut, then the text. As a Close frame's payload and as a double the text is taken as it is.
#include "fuzz.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;
using wschat::CloseCode;
using wschat::detail::Connection;
using wschat::detail::Event;
using wschat::Json;
using wschat::Opcode;
using wschat::detail::Role;
using wschat::detail::Utf8Validator;

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

// feed() answers false with the first piece that holds a byte which no valid text has there, and not before.
void check_validator(std::string_view text, Cutter cutter, std::size_t alignment) {
    bool complete = false;
    const std::size_t valid = slow_utf8_prefix(text, &complete);
    Utf8Validator validator;
    for (std::size_t done = 0; done < text.size();) {
        Exact piece(text.substr(done, cutter.next(text.size() - done)), alignment);
        done += piece.size();
        const bool accepted = validator.feed(piece.data(), piece.size());
        check(accepted == (done <= valid), accepted ? "the validator takes what is not UTF-8" : "it refuses UTF-8",
              text);
        if (!accepted) return;
    }
    check(validator.complete() == complete, "complete() is wrong", text);
    validator.reset();
    check(validator.complete(), "after reset() a text may end", text);
}

void check_utf8(std::string_view text, unsigned seed, std::size_t alignment) {
    check_validator(text, Cutter(Cutter::Kind::whole), alignment);
    check_validator(text, Cutter(Cutter::Kind::bytes), alignment);
    check_validator(text, Cutter(Cutter::Kind::random, seed), alignment);
    check(wschat::valid_utf8(text) == slow_utf8(text), "valid_utf8() is wrong", text);
}

// Of a valid text the longest beginning of whole characters; of any text a beginning.
void check_cut(std::string_view text, std::size_t max) {
    const std::string_view cut = wschat::truncate_utf8(text, max);
    check(cut.size() <= max && cut == text.substr(0, cut.size()), "truncate_utf8() answers no beginning of the text", text);
    if (!slow_utf8(text)) return;
    std::size_t longest = (std::min)(max, text.size());
    while (!slow_utf8(text.substr(0, longest))) --longest;
    check(cut.size() == longest, "truncate_utf8() does not cut where the last whole character ends", text);
}

// ---- masks ----------------------------------------------------------------------------------------------------------

void check_mask(std::string_view text, unsigned seed, std::size_t alignment) {
    Random random(seed);
    wschat::detail::MaskKey key{};
    // Also keys of zeros, which leave text as it is.
    for (unsigned char& byte : key)
        byte = static_cast<unsigned char>(seed % 3 == 0 ? 0 : random.below(seed % 3 == 1 ? 256 : 128));
    const std::size_t offset = random.below(9);
    Exact data(text, alignment);
    std::string expected;
    bool ascii = true;
    for (std::size_t i = 0; i < text.size(); ++i) {
        expected += static_cast<char>(static_cast<unsigned char>(text[i]) ^ key[(offset + i) % 4]);
        ascii = ascii && static_cast<unsigned char>(expected.back()) < 0x80;
    }
    const bool answer = wschat::detail::apply_mask(data.data(), data.size(), key, offset);
    check_same(data.view(), expected, "a byte is not xored with the byte of the mask that it should be");
    check(answer == ascii, "whether all is ASCII now is answered wrongly", expected);
    wschat::detail::apply_mask(data.data(), data.size(), key, offset);
    check_same(data.view(), text, "masking twice does not undo it");
}

// ---- close payloads -------------------------------------------------------------------------------------------------

wschat::detail::MaskKey no_mask() { return {}; }

struct End {
    explicit End(Role role) { connection.open(role, limits, arena, {}, role == Role::client ? &no_mask : nullptr); }
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

// What a client makes of a Close frame with that payload: its answer says so.
void check_close_payload(std::string_view text) {
    const std::string_view payload = text.substr(0, 125);
    const unsigned code = payload.size() < 2 ? 0
                                             : static_cast<unsigned>(static_cast<unsigned char>(payload[0])) << 8 |
                                                   static_cast<unsigned char>(payload[1]);
    const unsigned failure = payload.empty()                             ? 0
                             : payload.size() == 1 || !may_be_sent(code) ? 1002
                             : !slow_utf8(payload.substr(2))             ? 1007
                                                                         : 0;
    const unsigned expected = failure != 0 ? failure : payload.empty() ? 1005 : code;
    End end(Role::client);
    std::string bytes = {static_cast<char>(0x88), static_cast<char>(payload.size())};
    Exact frame(bytes.append(payload));
    end.connection.receive(frame.data(), frame.size(), {});
    check(end.connection.next_event().kind == Event::Kind::close, "a Close frame does not end the connection", payload);
    check(end.connection.next_event().kind == Event::Kind::none, "something follows the end", payload);
    check(number(end.connection.close_code()) == expected, "a Close frame is answered with another code", payload);
    check((end.connection.close_cause() == wschat::CloseCause::peer) == (failure == 0), "the cause of the end is wrong",
          payload);
    if (failure == 0)
        check_same(end.connection.close_reason(), payload.size() < 2 ? "" : payload.substr(2), "the reason");
    const std::string answer = end.sent();
    const std::string echo = {static_cast<char>(expected >> 8), static_cast<char>(expected & 0xFF)};
    check(answer.size() >= 6 && answer[0] == '\x88', "the answer is no Close frame", answer);
    if (expected == 1005) check(answer.size() == 6, "a Close frame without a code is answered with one", answer);
    else check_same(std::string_view(answer).substr(6, 2), echo, "the code of the answer");
}

// close() sends what it is given, or says that it must not be sent.
void check_close_call(std::string_view text) {
    const unsigned code =
        text.size() < 2 ? 1000 : static_cast<unsigned char>(text[0]) * 256u + static_cast<unsigned char>(text[1]);
    const std::string_view reason = text.size() < 2 ? text : text.substr(2);
    const bool legal = may_be_sent(code) && reason.size() <= 123 && slow_utf8(reason);
    check(wschat::detail::legal_on_wire(static_cast<CloseCode>(code)) == may_be_sent(code), "legal_on_wire() is wrong");
    End end(Role::server);
    try {
        end.connection.close(static_cast<CloseCode>(code), reason, {});
        check(legal, "close() takes what must not be sent", reason);
    } catch (const wschat::Error&) {
        check(!legal, "close() refuses what may be sent", reason);
        check(end.connection.is_open() && end.connection.output().empty(), "a refused close() does something");
        return;
    }
    std::string expected = {static_cast<char>(0x88), static_cast<char>(2 + reason.size()), static_cast<char>(code >> 8),
                            static_cast<char>(code & 0xFF)};
    check_same(end.sent(), expected.append(reason), "the Close frame of close()");
}

// ---- JSON -----------------------------------------------------------------------------------------------------------

// RFC 8259 7, for what Json writes: what a string in quotes stands for.
std::string json_value(std::string_view quoted) {
    check(quoted.size() >= 2 && quoted.front() == '"' && quoted.back() == '"', "a JSON string has no quotes", quoted);
    quoted = quoted.substr(1, quoted.size() - 2);
    check(slow_utf8(quoted), "JSON is not UTF-8", quoted);
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
                  "an escape is none of those that Json writes", quoted);
            value += static_cast<char>(std::strtoul(digits.c_str(), nullptr, 16));
            i += 4;
        }
    }
    return value;
}

// Each byte that begins no valid character is U+FFFD.
std::string mended(std::string_view text) {
    std::string result;
    while (!text.empty()) {
        std::size_t size = 1;
        while (size <= 4 && size <= text.size() && !slow_utf8(text.substr(0, size))) ++size;
        const bool valid = size <= 4 && size <= text.size();
        result += valid ? text.substr(0, size) : std::string_view("\xEF\xBF\xBD");
        text.remove_prefix(valid ? size : 1);
    }
    return result;
}

void check_json(std::string_view text) {
    const std::string quoted = Json(text).dump();
    check_same(json_value(quoted), mended(text), "a string that has become JSON is another");
    check_same(Json{{text, text}}.dump(), "{" + quoted + ":" + quoted + "}", "an object of one member");
    check_same(Json::array(std::vector<std::string>(2, std::string(text))).dump(), "[" + quoted + "," + quoted + "]",
               "an array of two");
}

// RFC 8259 6: -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)?
bool json_number(std::string_view s) {
    const auto digits = [&s] {
        std::size_t n = 0;
        for (; !s.empty() && s.front() >= '0' && s.front() <= '9'; s.remove_prefix(1)) ++n;
        return n;
    };
    const auto skip = [&s](std::string_view any) {
        const bool found = !s.empty() && any.find(s.front()) != std::string_view::npos;
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
    if (!std::isfinite(value)) return check_same(json, "null", "a number that JSON has not");
    check(json_number(json), "a number is no JSON", json);
    const double back = std::strtod(json.c_str(), nullptr);
    check(std::memcmp(&back, &value, sizeof value) == 0, "a number that has become JSON is another", json);
}

// ---- lines of text --------------------------------------------------------------------------------------------------

void check_log_line(std::string_view text, std::size_t max) {
    const std::string line = wschat::escape_for_log(text, max);
    check(line.size() <= 4 * (std::min)(max, text.size()) + 3, "an escaped text is too long", line);
    std::string back;
    for (std::size_t i = 0; i < line.size(); ++i) {
        check(line[i] >= ' ' && line[i] <= '~' && line[i] != '"', "an escaped text has what may forge a line", line);
        if (line[i] != '\\') {
            back += line[i];
            continue;
        }
        back += static_cast<char>(std::strtoul(line.substr(i + 2, 2).c_str(), nullptr, 16));
        i += 3;
    }
    check_same(back, std::string(text.substr(0, max)) + (text.size() > max ? "..." : ""), "what is escaped is another");
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
    check_same(back, text, "base64 stands for another text");
    check(encoded.size() == (text.size() + 2) / 3 * 4, "base64 is not padded", encoded);
}

// What stands before the text, so that it falls where blocks of 32 and 64 bytes begin and end.
std::string filler(unsigned kind, std::size_t size) {
    constexpr std::string_view characters[] = {"a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80",
                                               "a\xC3\xA9\xE2\x82\xAC"};
    std::string text;
    while (text.size() < size) text += characters[kind % 5];
    return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Choices choices(data, size);
    const unsigned kind = choices.byte(), before = choices.byte(), alignment = choices.byte() % 64,
                   seed = choices.byte();
    const std::string_view text = choices.rest();
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
