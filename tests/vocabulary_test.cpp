// section 2 of the header, and Json, which §3 builds: the words that all other sections share.
#include "support.hpp"

#include <limits>

using namespace wschat;
using namespace wschat::detail;

namespace {

// The characters of a JSON string (RFC 8259 7), read back the slow and obvious way; nothing where it is malformed.
std::optional<std::string> unquoted(std::string_view json) {
    if (json.size() < 2 || json.front() != '"' || json.back() != '"') return std::nullopt;
    json = json.substr(1, json.size() - 2);
    std::string characters;
    for (std::size_t i = 0; i < json.size(); ++i) {
        if (static_cast<unsigned char>(json[i]) < 0x20 || json[i] == '"') return std::nullopt;
        if (json[i] != '\\') {
            characters += json[i];
            continue;
        }
        if (++i == json.size()) return std::nullopt;
        const std::string_view escapes = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        if (const std::size_t at = escapes.find(json[i]); at != std::string_view::npos) {
            characters += meanings[at];
        } else if (json[i] == 'u' && json.substr(i + 1, 2) == "00" && json.size() - i > 4) {
            characters += test::hex(json.substr(i + 3, 2));
            i += 4;
        } else {
            return std::nullopt;
        }
    }
    return characters;
}

}  // namespace

TEST_SUITE_BEGIN("vocabulary");

TEST_CASE("the close codes that may be on the wire are 1000-1003, 1007-1014 and 3000-4999") {
    // RFC 6455 7.4 and IANA's registry: 1004 is reserved, 1005, 1006 and 1015 are never sent, 1016-2999 are unassigned.
    struct Range {
        unsigned first, last;
        bool legal;
    };
    unsigned next = 0;
    for (const Range range :
         {Range{0, 999, false}, Range{1000, 1003, true}, Range{1004, 1006, false}, Range{1007, 1014, true},
          Range{1015, 2999, false}, Range{3000, 4999, true}, Range{5000, 65535, false}}) {
        REQUIRE(range.first == next);
        for (unsigned code = range.first; code <= range.last; ++code)
            if (legal_on_wire(static_cast<CloseCode>(code)) != range.legal) FAIL_CHECK("code ", code);
        next = range.last + 1;
    }
    CHECK(next == 65536);
}

TEST_CASE("the named close codes have the numbers of RFC 6455 7.4.1 and of the registry") {
    CHECK(number(CloseCode::normal) == 1000);
    CHECK(number(CloseCode::going_away) == 1001);
    CHECK(number(CloseCode::protocol_error) == 1002);
    CHECK(number(CloseCode::unsupported_data) == 1003);
    CHECK(number(CloseCode::no_status) == 1005);
    CHECK(number(CloseCode::abnormal) == 1006);
    CHECK(number(CloseCode::invalid_payload) == 1007);
    CHECK(number(CloseCode::policy_violation) == 1008);
    CHECK(number(CloseCode::message_too_big) == 1009);
    CHECK(number(CloseCode::mandatory_extension) == 1010);
    CHECK(number(CloseCode::internal_error) == 1011);
    CHECK(number(CloseCode::service_restart) == 1012);
    CHECK(number(CloseCode::try_again_later) == 1013);
    CHECK(number(CloseCode::bad_gateway) == 1014);
    CHECK(number(CloseCode::tls_handshake) == 1015);
    CHECK(number(CloseCode{4001}) == 4001);
}

TEST_CASE("the opcodes from 8 on are control frames") {
    CHECK_FALSE(is_control(Opcode::continuation));
    CHECK_FALSE(is_control(Opcode::text));
    CHECK_FALSE(is_control(Opcode::binary));
    CHECK(is_control(Opcode::close));
    CHECK(is_control(Opcode::ping));
    CHECK(is_control(Opcode::pong));
}

TEST_CASE("every close cause and every log level has a name of its own") {
    CHECK(to_string(CloseCause::none) == "none");
    CHECK(to_string(CloseCause::peer) == "peer");
    CHECK(to_string(CloseCause::local) == "local");
    CHECK(to_string(CloseCause::protocol_error) == "protocol error");
    CHECK(to_string(CloseCause::connection_lost) == "connection lost");
    CHECK(to_string(CloseCause::ping_timeout) == "ping timeout");
    CHECK(to_string(CloseCause::closing_timeout) == "closing timeout");
    CHECK(to_string(CloseCause::backlog) == "backlog");
    CHECK(to_string(CloseCause::handler_exception) == "handler exception");
    CHECK(to_string(CloseCause::shutdown) == "shutdown");

    CHECK(to_string(LogLevel::debug) == "debug");
    CHECK(to_string(LogLevel::info) == "info");
    CHECK(to_string(LogLevel::warning) == "warning");
    CHECK(to_string(LogLevel::error) == "error");
}

TEST_CASE("a message is a view of its payload and knows whether it is text") {
    const std::string payload = "hello";
    const Message text(payload);
    CHECK(text.text().data() == payload.data());
    CHECK(text.data() == "hello");
    CHECK(text.size() == 5);
    CHECK(text.opcode() == Opcode::text);
    CHECK_FALSE(text.binary());

    const Message binary(payload, Opcode::binary);
    CHECK(binary.binary());
    CHECK(binary.opcode() == Opcode::binary);
}

TEST_CASE("the limits that nobody has set are the ones that are promised") {
    using namespace std::chrono;
    const Limits limits;
    const ServerLimits server_limits;
    CHECK(limits.handshake_timeout == seconds(10));
    CHECK(limits.max_request_line == 8192);
    CHECK(limits.max_header_bytes == 16384);
    CHECK(limits.max_header_fields == 100);
    CHECK(limits.max_message_size == 1048576);
    CHECK(limits.max_fragments == 1024);
    CHECK(limits.control_frames_per_second == 100);
    CHECK(limits.control_frames_burst == 500);
    CHECK(limits.max_backlog == 1048576);
    CHECK(limits.backlog_policy == BacklogPolicy::close);
    CHECK(limits.ping_interval == seconds(20));
    CHECK(limits.ping_timeout == seconds(20));
    CHECK(limits.closing_timeout == seconds(5));
    CHECK(limits.linger_timeout == seconds(2));
    CHECK(limits.linger_bytes == 262144);
    CHECK(server_limits.max_total_backlog == 268435456);
    CHECK(server_limits.max_connections == 0);  // the descriptor limit less 64
    CHECK(server_limits.max_connections_per_address == 0);
}

// ---- Json -----------------------------------------------------------------------------------------------------------

TEST_CASE("a value of C++ becomes the JSON value of the same kind") {
    const std::string string = "string";
    CHECK(Json().dump() == "null");
    CHECK(Json(nullptr).dump() == "null");
    CHECK(Json(true).dump() == "true");
    CHECK(Json(false).dump() == "false");
    CHECK(Json(0).dump() == "0");
    CHECK(Json(-1).dump() == "-1");
    CHECK(Json(std::uint8_t{7}).dump() == "7");
    CHECK(Json(std::numeric_limits<std::int64_t>::min()).dump() == "-9223372036854775808");
    CHECK(Json(std::numeric_limits<std::uint64_t>::max()).dump() == "18446744073709551615");
    CHECK(Json(1.5).dump() == "1.5");
    CHECK(Json("literal").dump() == R"("literal")");
    CHECK(Json(string).dump() == R"("string")");
    CHECK(Json(std::string_view(string).substr(0, 3)).dump() == R"("str")");
    CHECK(Json("").dump() == R"("")");
}

TEST_CASE("a double reads back as the same double") {
    using Double = std::numeric_limits<double>;
    for (const double value : {0.0, -0.0, 0.1, -0.25, 1.0 / 3, 1e22, 123456789.125, Double::max(), Double::lowest(),
                               Double::min(), Double::denorm_min(), Double::epsilon()}) {
        const std::string text = Json(value).dump();
        CAPTURE(text);
        // RFC 8259 6: "number = [ minus ] int [ frac ] [ exp ]".
        CHECK(text.find_first_not_of("-+0123456789.e") == std::string::npos);
        char* end = nullptr;
        const double back = std::strtod(text.c_str(), &end);
        CHECK(end == text.c_str() + text.size());
        CHECK(std::memcmp(&back, &value, sizeof value) == 0);
    }
}

TEST_CASE("what JSON has no number for is null") {
    // RFC 8259 6: "Numeric values that cannot be represented in the grammar below (such as Infinity and NaN) are not
    // permitted."
    CHECK(Json(std::numeric_limits<double>::infinity()).dump() == "null");
    CHECK(Json(-std::numeric_limits<double>::infinity()).dump() == "null");
    CHECK(Json(std::numeric_limits<double>::quiet_NaN()).dump() == "null");
}

TEST_CASE("objects are braces of pairs, in their order and as deep as is wanted") {
    const std::string name = "Anna";
    CHECK(Json{{"type", "join"}, {"name", name}}.dump() == R"({"type":"join","name":"Anna"})");
    CHECK(Json{{"only", 1}}.dump() == R"({"only":1})");
    CHECK(Json{{"a", {{"b", {{"c", nullptr}}}}}, {"d", Json{{"e", true}}}}.dump() ==
          R"({"a":{"b":{"c":null}},"d":{"e":true}})");
}

TEST_CASE("ranges become arrays") {
    const std::vector<std::string> names = {"Anna", "Ben \"B\""};
    CHECK(Json::array(names).dump() == R"(["Anna","Ben \"B\""])");
    CHECK(Json::array(std::vector<int>{}).dump() == "[]");
    CHECK(Json::array(std::vector<int>{1, 2, 3}).dump() == "[1,2,3]");
    CHECK(Json::array(std::vector<bool>{true, false}).dump() == "[true,false]");
    const std::vector<Json> mixed = {1, "two", nullptr, Json{{"three", 3}}, Json::array(std::vector<int>{4})};
    CHECK(Json::array(mixed).dump() == R"([1,"two",null,{"three":3},[4]])");
    CHECK(Json{{"users", Json::array(names)}}.dump() == R"({"users":["Anna","Ben \"B\""]})");
}

TEST_CASE("quotes, backslashes and control characters are escaped") {
    CHECK(Json("say \"hi\"").dump() == R"("say \"hi\"")");
    CHECK(Json("C:\\temp").dump() == R"("C:\\temp")");
    CHECK(Json("one\ntwo").dump() == R"("one\ntwo")");
    CHECK(Json("\x1b[2J").dump() == R"("\u001b[2J")");
    CHECK(Json(std::string_view("a\0b", 3)).dump() == R"("a\u0000b")");
    // RFC 8259 7: all that must be escaped are the quotation mark, the reverse solidus and U+0000 to U+001F.
    for (int c = 0; c < 0x80; ++c) {
        const std::string text = "<" + std::string(1, static_cast<char>(c)) + ">";
        if (unquoted(Json(text).dump()) != text) FAIL_CHECK("character ", c, " becomes ", Json(text).dump());
    }
}

TEST_CASE("names of members are escaped like values") {
    CHECK(Json{{"a\"b\n", 1}}.dump() == R"({"a\"b\n":1})");
    CHECK(Json{{std::string_view("\0", 1), 1}}.dump() == R"({"\u0000":1})");
}

TEST_CASE("text in UTF-8 stays as it is in JSON") {
    for (const std::string text : {"\xC3\xA4", "\xE2\x82\xAC", "\xED\x9F\xBF", "\xEF\xBF\xBF", "\xF0\x9F\x98\x80",
                                   "\xF4\x8F\xBF\xBF", "gr\xC3\xBC\xC3\x9F \xF0\x9F\x98\x80!"})
        CHECK(Json(text).dump() == '"' + text + '"');
}

TEST_CASE("what is not UTF-8 becomes U+FFFD and takes nothing else with it") {
    const std::string replacement = "\xEF\xBF\xBD";
    CHECK(Json("\xFF").dump() == '"' + replacement + '"');
    CHECK(Json("\x80z").dump() == '"' + replacement + "z\"");
    // A sequence that stops short, an overlong form, a surrogate, a character above U+10FFFF, a lone lead at the end.
    for (const std::string broken : {"\xE2\x82", "\xF0\x9F\x98", "\xC0\xAF", "\xE0\x80\xAF", "\xED\xA0\x80",
                                     "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80", "\xC3"}) {
        for (const std::string before : {"", "x", "\xC3\xA4"}) {
            for (const std::string after : {"", "\"", "y", "\xE2\x82\xAC"}) {
                const auto text = unquoted(Json(before + broken + after).dump());
                CAPTURE(test::to_hex(before + broken + after));
                REQUIRE(text);
                CHECK(valid_utf8(*text));
                REQUIRE(text->size() >= before.size() + replacement.size() + after.size());
                const std::string_view middle =
                    std::string_view(*text).substr(before.size(), text->size() - before.size() - after.size());
                CHECK(*text == before + std::string(middle) + after);
                // Nothing but replacements stands for what was broken.
                for (std::size_t i = 0; i < middle.size(); i += 3) CHECK(middle.substr(i, 3) == replacement);
            }
        }
    }
}

TEST_SUITE_END();
