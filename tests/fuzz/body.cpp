// BodyParser, compared with a reference that reads the whole stream, and the forms that a body may contain. The stream
// is given whole and in chunks.
//
// Input: a byte for the framing, a byte for the limits, a byte for the size or the type of a form, a byte for the
// chunks, then the stream.
#include "fuzz.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;
using wschat::FormPart;
using wschat::detail::BodyParser;

struct Expected {
    int status = 0;  // 0: incomplete, 200: whole, or that of the rejection
    std::string body;
    std::size_t size = 0;  // of the stream up to the end of the body
};

// RFC 9112 7.1.
Expected read_chunked(std::string_view stream, const Limits& limits) {
    Expected result;
    std::size_t at = 0, overhead = 0;
    bool trailers = false, after_data = false;
    for (;;) {
        const std::size_t end = stream.find('\n', at);
        const std::string_view rest = stream.substr(at, end == std::string_view::npos ? end : end + 1 - at);
        overhead += rest.size();
        if (overhead > limits.max_header_bytes) return {431, {}, 0};
        if (end == std::string_view::npos) return result;
        at = end + 1;
        if (rest.size() < 2 || rest[rest.size() - 2] != '\r') return {400, {}, 0};
        std::string line(rest.substr(0, rest.size() - 2));
        const auto control = [](char c) { return (static_cast<unsigned char>(c) < 32 && c != '\t') || c == 127; };
        if (after_data) {
            if (!line.empty()) return {400, {}, 0};
            after_data = false;
        } else if (trailers) {
            if (line.empty()) return {200, result.body, at};
            const std::string name = line.substr(0, line.find(':'));
            if (name.size() == line.size() || name.empty() || !contains_only(name, token_characters) ||
                std::any_of(line.begin(), line.end(), control))
                return {400, {}, 0};
        } else {
            if (std::any_of(line.begin(), line.end(), control)) return {400, {}, 0};
            std::string size = line.substr(0, line.find(';'));
            if (size.size() != line.size())
                while (!size.empty() && (size.back() == ' ' || size.back() == '\t')) size.pop_back();
            const auto blank = [](char c) { return c == ' ' || c == '\t'; };
            if (!size.empty() && (blank(size.front()) || blank(size.back()))) return {400, {}, 0};
            if (size.empty() || !contains_only(size, digits + "abcdefABCDEF")) {
                // The size is refused before a later digit is seen to be none.
                double value = 0;
                for (const char c : size) {
                    if (wschat::text::hex_value(c) < 0) break;
                    value = value * 16 + wschat::text::hex_value(c);
                }
                return {value > static_cast<double>(limits.max_body) ? 413 : 400, {}, 0};
            }
            double value = 0;
            for (const char c : size) value = value * 16 + wschat::text::hex_value(c);
            if (static_cast<double>(result.body.size()) + value > static_cast<double>(limits.max_body))
                return {413, {}, 0};
            const auto bytes = static_cast<std::size_t>(value);
            trailers = bytes == 0;
            overhead -= (std::min)(overhead, 16 + 2 * bytes);
            if (bytes == 0) continue;
            result.body += stream.substr(at, bytes);
            if (stream.size() - at < bytes) return result;
            at += bytes;
            after_data = true;
        }
    }
}

wschat::Request head_of(const std::string& fields) {
    Limits limits;
    wschat::detail::RequestParser parser(limits);
    std::size_t consumed = 0;
    parser.feed("POST / HTTP/1.1\r\nHost: x\r\n" + fields + "\r\n", consumed);
    return parser.take_request();
}

std::string outcome(std::string_view stream, const std::string& fields, const Limits& limits, Chunker chunker,
                    wschat::Request* whole) {
    BodyParser parser(head_of(fields), limits);
    std::size_t used = 0;
    if (parser.failed()) return std::to_string(parser.status());
    while (used < stream.size()) {
        ExactCopy piece(stream.substr(used, chunker.next_size(stream.size() - used)));
        std::size_t consumed = 0;
        const BodyParser::Outcome got = parser.feed(piece.view(), consumed);
        used += consumed;
        check(consumed <= piece.size(), "the parser consumes more than the input");
        check(parser.received() <= limits.max_body, "the parser holds more than the limit");
        if (got == BodyParser::Outcome::failure) {
            check(!parser.reason().empty() && parser.reason().back() == '.', "a rejection has no text");
            return std::to_string(parser.status());
        }
        if (got == BodyParser::Outcome::body) {
            *whole = parser.take_request();
            return "200 " + std::to_string(used) + " " + std::string(whole->body());
        }
        check(consumed == piece.size(), "the parser needs more input but has not consumed all");
    }
    return "0";
}

void check_forms(const wschat::Request& request) {
    for (const FormPart& part : request.form_parts()) {
        check(within(part.data, request.body()) && within(part.name, request.body()) &&
                  within(part.filename, request.body()),
              "a part of a form is not inside the body");
        const auto first = request.form_part(part.name);
        check(first && first->name == part.name, "a part of a form is not found by its name");
    }
    for (const char* name : {"a", "", "b c"}) {
        const auto all = request.form_all(name);
        const auto first = request.form(name);
        // If the first field is malformed, form() finds nothing.
        check(!first || (!all.empty() && all.front() == *first), "a look-up differs from the first of all fields");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    InputReader input(data, size);
    const bool chunked = input.byte() % 2 == 0;
    Limits limits;
    const unsigned choice = input.byte();
    if (choice % 3 != 0) limits.max_body = choice % 3 == 1 ? 16 : 300;
    if (choice % 5 == 0) limits.max_header_bytes = 40;
    const unsigned length = input.byte();
    const unsigned seed = input.byte();
    const std::string_view stream = input.remaining_bytes();
    const char* types[] = {"application/x-www-form-urlencoded", "multipart/form-data; boundary=a",
                           "multipart/form-data; x; boundary=\"a;b\"", "text/plain"};
    std::string fields = "Content-Type: " + std::string(types[length % 4]) + "\r\n";
    fields += chunked ? std::string("Transfer-Encoding: chunked\r\n")
                      : "Content-Length: " + std::to_string(length == 0 ? 1 : length) + "\r\n";

    Expected expected;
    if (chunked) {
        expected = read_chunked(stream, limits);
    } else {
        const std::size_t wanted = length == 0 ? 1 : length;
        if (wanted > limits.max_body) expected.status = 413;
        else if (stream.size() >= wanted) expected = {200, std::string(stream.substr(0, wanted)), wanted};
    }
    const std::string text = expected.status == 200 ? "200 " + std::to_string(expected.size) + " " + expected.body
                                                    : std::to_string(expected.status);
    wschat::Request request;
    for (const Chunker::Kind kind : {Chunker::Kind::bytes, Chunker::Kind::random, Chunker::Kind::whole})
        check_equal(outcome(stream, fields, limits, Chunker(kind, seed), &request), text,
                    "the body differs from the reference");
    if (expected.status == 200) check_forms(request);
    return 0;
}
