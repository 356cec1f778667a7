// Section 5 of the header: requests, responses, and the opening handshake of RFC 6455 4.
#include "support.hpp"

#include <ctime>
#include <random>

using namespace wschat;
using namespace wschat::detail;
using namespace std::string_literals;

namespace {

// The limits of a parser must outlive it.
const Limits default_limits;

// Feeds the pieces to a parser. Returns "need more", "400 reason", or the contents of the request.
std::string outcome_of(const std::vector<std::string_view>& pieces, const Limits& limits = default_limits) {
    RequestParser parser(limits);
    for (const std::string_view piece : pieces) {
        std::size_t consumed = 0;
        switch (parser.feed(piece, consumed)) {
            case RequestParser::Outcome::need_more:
                if (consumed != piece.size()) return "the parser needs more but did not consume all bytes";
                break;
            case RequestParser::Outcome::failure: return std::to_string(parser.status()) + " " + parser.reason();
            case RequestParser::Outcome::request: {
                const Request request = parser.take_request();
                std::string text(request.method());
                for (const std::string_view part :
                     {request.target(), request.raw_path(), request.query_string(), request.host()})
                    (text += " [") += std::string(part) + "]";
                request.fields().each([&](std::string_view name, std::string_view value) {
                    ((text += " " + std::string(name)) += "=[") += std::string(value) + "]";
                    return true;
                });
                return text + (request.http_1_0() ? " 1.0" : " 1.1") + (request.has_body() ? " with a body" : "");
            }
        }
    }
    return "need more";
}

// Returns the status that rejects a head, 200 if the head is accepted, 0 if it is incomplete.
int status_of(std::string_view head, const Limits& limits = default_limits) {
    RequestParser parser(limits);
    std::size_t consumed = 0;
    switch (parser.feed(head, consumed)) {
        case RequestParser::Outcome::need_more: return 0;
        case RequestParser::Outcome::request: return consumed == head.size() ? 200 : -1;
        case RequestParser::Outcome::failure: break;
    }
    return parser.status();
}

std::pair<Request, HandshakeFields> parsed_handshake(std::string_view head, const Limits& limits = default_limits) {
    RequestParser parser(limits);
    std::size_t consumed = 0;
    const RequestParser::Outcome outcome = parser.feed(head, consumed);
    CAPTURE(parser.reason());
    REQUIRE(outcome == RequestParser::Outcome::request);
    Request request = parser.take_request();
    return {std::move(request), parser.handshake()};
}
Request parsed(std::string_view head, const Limits& limits = default_limits) {
    return parsed_handshake(head, limits).first;
}

// A GET request with more header lines, which end with CR LF.
std::string with_lines(std::string_view lines) { return "GET / HTTP/1.1\r\nHost: a\r\n" + std::string(lines) + "\r\n"; }

std::optional<Response> rejection_of(std::string_view head) {
    const auto [request, fields] = parsed_handshake(head);
    return reject_upgrade(request, fields);
}

std::string with_target(std::string_view target) {
    return "GET " + std::string(target) + " HTTP/1.1\r\nHost: a\r\n\r\n";
}

}  // namespace

TEST_SUITE_BEGIN("http");

// ---- the request line -----------------------------------------------------------------------------------------------

TEST_CASE("a request returns what the client sent") {
    const Request request =
        parsed("POST /chat/tea%20room?name=Anna&x=1 HTTP/1.1\r\nHost: chat.example:8888\r\nX-One: 1\r\n\r\n");
    CHECK(request.method() == "POST");
    CHECK(request.target() == "/chat/tea%20room?name=Anna&x=1");
    CHECK(request.raw_path() == "/chat/tea%20room");
    CHECK(request.path() == "/chat/tea room");
    CHECK(request.query_string() == "name=Anna&x=1");
    CHECK(request.host() == "chat.example:8888");
    CHECK(request.header("x-one") == "1");
    CHECK_FALSE(request.http_1_0());
    CHECK_FALSE(request.has_body());
}

TEST_CASE("a moved or copied request owns its bytes") {
    auto head = std::make_unique<std::string>("GET /path?query HTTP/1.1\r\nHost: chat.example\r\n\r\n");
    auto parser = std::make_unique<RequestParser>(default_limits);
    std::size_t consumed = 0;
    REQUIRE(parser->feed(*head, consumed) == RequestParser::Outcome::request);
    auto first = std::make_unique<Request>(parser->take_request());
    parser.reset();
    head.reset();
    auto copy = std::make_unique<Request>(*first);
    const Request moved = std::move(*first);
    first.reset();
    for (const Request* request : {&moved, static_cast<const Request*>(copy.get())}) {
        CHECK(request->method() == "GET");
        CHECK(request->raw_path() == "/path");
        CHECK(request->query_string() == "query");
        CHECK(request->host() == "chat.example");
        CHECK(request->header("host") == "chat.example");
    }
}

TEST_CASE("a request that was moved away is empty") {
    Request request = parsed("GET /path?query HTTP/1.1\r\nHost: chat.example\r\nX-One: 1\r\n\r\n");
    const Request moved = std::move(request);
    CHECK(request.method().empty());
    CHECK(request.target().empty());
    CHECK(request.query_string().empty());
    CHECK(request.host().empty());
    CHECK(request.header("x-one").empty());
    CHECK(request.body().empty());
    CHECK(request.client_certificate().empty());
    CHECK(moved.header("x-one") == "1");
}

TEST_CASE("a request line is a method, a target and a version with single spaces") {
    struct Row {
        std::string line;
        int status;
    };
    // RFC 9112 3.
    // clang-format off
    const Row rows[] = {
        {"GET / HTTP/1.1", 200}, {"HEAD / HTTP/1.1", 200},
        {"get / HTTP/1.1", 200},  // methods are case-sensitive tokens: a valid method, but not GET
        {"M-SEARCH / HTTP/1.1", 200}, {"GET /?a?b HTTP/1.1", 200}, {"GET /a%20b HTTP/1.1", 200},
        {"GET  / HTTP/1.1", 400}, {"GET /  HTTP/1.1", 400}, {"GET / HTTP/1.1 ", 400}, {" GET / HTTP/1.1", 400},
        {"GET\t/\tHTTP/1.1", 400}, {"GET / / HTTP/1.1", 400}, {"GET /", 400}, {"GET", 400}, {"GET HTTP/1.1", 400},
        {"GET  HTTP/1.1", 400}, {"G(T / HTTP/1.1", 400}, {"GET: / HTTP/1.1", 400}, {"G\0T / HTTP/1.1"s, 400},
        {"GET index.html HTTP/1.1", 400}, {"GET ?x HTTP/1.1", 400}, {"GET /#top HTTP/1.1", 400},
        {"GET /\0 HTTP/1.1"s, 400}, {"GET /\x01 HTTP/1.1", 400}, {"GET /\x7f HTTP/1.1", 400},
        {"GET /\xC3\xA4 HTTP/1.1", 400}, {"GET /a\rb HTTP/1.1", 400}, {"GET /% HTTP/1.1", 400},
        {"GET /%4 HTTP/1.1", 400}, {"GET /%zz HTTP/1.1", 400}, {"GET / http/1.1", 400}, {"GET / HTTP/1", 400},
        {"GET / HTTP/1.", 400}, {"GET / HTTP/1.1x", 400}, {"GET / HTTP/1.10", 400}, {"GET / HTTP/01.1", 400},
        {"GET / HTTP/ 1.1", 400}, {"GET / HTTP/a.b", 400}, {"GET / HTTPS/1.1", 400}, {"GET / ICY/1.1", 400},
        {"GET / HTTP/1.1\r", 400}, {"GET / HTTP/0.9", 505}, {"GET / HTTP/2.0", 505}, {"PRI * HTTP/2.0", 505},
        {"GET / HTTP/9.9", 505},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.line);
        CHECK(status_of(row.line + "\r\nHost: a\r\n\r\n") == row.status);
    }
}

TEST_CASE("a request knows whether it is HTTP/1.0") {
    CHECK(parsed("GET / HTTP/1.0\r\nHost: a\r\n\r\n").http_1_0());
    CHECK_FALSE(parsed("GET / HTTP/1.1\r\nHost: a\r\n\r\n").http_1_0());
}

TEST_CASE("one empty line before a request is ignored and a second one is rejected") {
    // RFC 9112 2.2: "a server that is expecting to receive and parse a request-line SHOULD ignore at least one empty line
    // (CRLF) received prior to the request-line".
    CHECK(status_of("\r\n" + with_lines("")) == 200);
    CHECK(parsed("\r\n" + with_lines("")).method() == "GET");
    CHECK(status_of("\r\n\r\n" + with_lines("")) == 400);
    CHECK(status_of("\n" + with_lines("")) == 400);
}

TEST_CASE("bytes that cannot begin a request are rejected at the first byte") {
    for (int c = 0; c < 256; ++c) {
        const std::string byte(1, static_cast<char>(c));
        const bool possible = text::is_token(byte) || c == '\r';
        if (status_of(byte) != (possible ? 0 : 400)) FAIL_CHECK("byte ", c);
    }
}

TEST_CASE("a client that begins with TLS gets an error that names TLS") {
    RequestParser parser(default_limits);
    std::size_t consumed = 0;
    CHECK(parser.feed(test::hex("16 03 01 02 00 01 00 01 fc 03 03"), consumed) == RequestParser::Outcome::failure);
    CHECK(parser.status() == 400);
    CHECK(test::contains(parser.reason(), "TLS"));
}

TEST_CASE("a target in absolute form sets the host") {
    // RFC 9112 3.2.2: "a server MUST accept the absolute-form", and "MUST ignore the received Host header field (if any)
    // and instead replace it with the host information of the request-target".
    struct Row {
        std::string target, host, raw_path, query;
    };
    // clang-format off
    const Row rows[] = {
        {"http://b.example/x?y=1", "b.example", "/x", "y=1"}, {"http://b.example:8080/", "b.example:8080", "/", ""},
        {"https://b.example/x", "b.example", "/x", ""}, {"HTTP://B.example/x", "B.example", "/x", ""},
        {"http://[::1]:8080/x", "[::1]:8080", "/x", ""},
        {"http://b.example/http://c.example/", "b.example", "/http://c.example/", ""},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.target);
        const Request request = parsed(with_target(row.target));
        CHECK(request.host() == row.host);
        CHECK(request.raw_path() == row.raw_path);
        CHECK(request.query_string() == row.query);
        CHECK(request.target() == row.target);
    }
    for (const std::string target : {"http://", "http:///x", "http://?x", "http://u:p@b/", "http://b:99999/",
                                     "http://b:x/", "http://[::1/", "ftp://b/", "ws://b/", "http:/b/", "//b/../x y"}) {
        CAPTURE(target);
        CHECK(status_of(with_target(target)) == 400);
    }
}

TEST_CASE("an absolute target without a path has a slash as its path") {
    // RFC 9110 4.2.3: "an empty path component is equivalent to an absolute path of "/"".
    CHECK(parsed(with_target("http://b.example")).raw_path() == "/");
    CHECK(parsed(with_target("http://b.example")).path() == "/");
    CHECK(parsed(with_target("http://b.example?x=1")).raw_path() == "/");
    CHECK(parsed(with_target("http://b.example?x=1")).query("x") == "1");
}

TEST_CASE("a target that begins with two slashes is a path, not a host") {
    const Request request = parsed(with_target("//b.example/.."));
    CHECK(request.host() == "a");
    CHECK(request.raw_path() == "//b.example/..");
}

TEST_CASE("the asterisk form is accepted") { CHECK(parsed("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").target() == "*"); }

// ---- limits ---------------------------------------------------------------------------------------------------------

TEST_CASE("a request line may be as long as its limit, and one byte more is 414") {
    Limits limits;
    limits.max_request_line = 40;
    for (const std::size_t size : {39u, 40u, 41u, 42u, 43u, 100u}) {
        const std::string line = "GET /" + std::string(size - 14, 'x') + " HTTP/1.1";
        REQUIRE(line.size() == size);
        CAPTURE(size);
        CHECK(status_of(line + "\r\nHost: a\r\n\r\n", limits) == (size <= 40 ? 200 : 414));
        // The parser rejects the line before its end.
        CHECK(status_of(line, limits) == (size <= 40 ? 0 : 414));
    }
}

TEST_CASE("all header lines together may be as long as their limit, and one byte more is 431") {
    Limits limits;
    limits.max_header_bytes = 64;  // line ends count, the empty line does not
    for (const std::size_t size : {63u, 64u, 65u, 66u, 67u, 200u}) {
        const std::string lines = "Host: a\r\nX: " + std::string(size - 14, 'x') + "\r\n";
        REQUIRE(lines.size() == size);
        CAPTURE(size);
        CHECK(status_of("GET / HTTP/1.1\r\n" + lines + "\r\n", limits) == (size <= 64 ? 200 : 431));
    }
    CHECK(status_of("GET / HTTP/1.1\r\nHost: a\r\nX: " + std::string(100, 'x'), limits) == 431);
}

TEST_CASE("the number of header fields may reach its limit, and one more is 431") {
    Limits limits;
    limits.max_header_fields = 10;
    for (int fields = 8; fields <= 12; ++fields) {
        std::string lines;
        for (int i = 1; i < fields; ++i) lines += "X: y\r\n";
        CAPTURE(fields);
        CHECK(status_of(with_lines(lines), limits) == (fields <= 10 ? 200 : 431));
    }
}

TEST_CASE("floods of headers and endless paths are rejected by the default limits") {
    std::string many;
    for (int i = 0; i < 2'000; ++i) many += "X: y\r\n";
    CHECK(status_of(with_lines(many)) == 431);
    CHECK(status_of(with_lines("X: " + std::string(1'000'000, 'x') + "\r\n")) == 431);
    CHECK(status_of(with_target("/" + std::string(65'536, 'x'))) == 414);
    CHECK(status_of(with_target("/" + std::string(8'192 - 14, 'x'))) == 200);
    CHECK(status_of(with_lines("X: " + std::string(16'384 - 14, 'x') + "\r\n")) == 200);
}

TEST_CASE("a parser stores nothing of a line that is over its limit") {
    RequestParser parser(default_limits);
    std::size_t consumed = 0;
    CHECK(parser.feed("GET /" + std::string(10'000'000, 'x'), consumed) == RequestParser::Outcome::failure);
    CHECK(parser.status() == 414);
    CHECK(consumed < 10'000);
}

TEST_CASE("after a failure a parser accepts no more bytes") {
    RequestParser parser(default_limits);
    std::size_t consumed = 0;
    REQUIRE(parser.feed("GET / HTTP/1.1\r\nBad Header: x\r\n", consumed) == RequestParser::Outcome::failure);
    const std::string reason = parser.reason();
    CHECK(parser.feed(with_lines(""), consumed) == RequestParser::Outcome::failure);
    CHECK(consumed == 0);
    CHECK(parser.status() == 400);
    CHECK(parser.reason() == reason);
}

// ---- header lines ---------------------------------------------------------------------------------------------------

TEST_CASE("a header line that could be read in two ways is rejected") {
    struct Row {
        std::string lines, why;
    };
    // clang-format off
    const Row rows[] = {
        {"X: y\n", "RFC 9112 2.2: some parsers end a line at a bare LF"},
        {"X: y\n\r\n", "a bare LF before an empty line"}, {"X: y\r\r\n", "a bare CR"},
        {"X: y\rZ: z\r\n", "some parsers end a line at a bare CR"}, {"X: y\r\n folded\r\n", "RFC 9112 5.2: obs-fold"},
        {"X: y\r\n\tfolded\r\n", "obs-fold with a tab"}, {"X: y\r\n \r\n", "an empty obs-fold"},
        {" X: y\r\n", "white space before a name"},
        {"X : y\r\n", "RFC 9112 5.1: no whitespace is allowed between the field name and colon"},
        {"X\t: y\r\n", "a tab before the colon"}, {": y\r\n", "no name"}, {"X\r\n", "no colon"},
        {"X y: z\r\n", "a space in the name"}, {"X: \0y\r\n"s, "NUL in the value"},
        {"X\0: y\r\n"s, "NUL in the name"}, {"X: \x0by\r\n", "a vertical tab in the value"},
        {"X: y\x7f\r\n", "DEL in the value"}, {"\xC3\xA4: y\r\n", "a name that is not ASCII"},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.why);
        CHECK(status_of(with_lines(row.lines)) == 400);
    }
    CHECK(status_of("GET / HTTP/1.1\r\n Host: a\r\n\r\n") == 400);
    CHECK(status_of("GET / HTTP/1.1\nHost: a\r\n\r\n") == 400);
    CHECK(status_of("GET / HTTP/1.1\nHost: a\n\n") == 400);
    CHECK(status_of("GET / HTTP/1.1\r\nHost: a\r\n\n") == 400);
}

TEST_CASE("names have token characters, and values have visible characters, spaces and tabs") {
    // RFC 9110 5.6.2 and 5.5.
    const std::string tokens = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    for (int c = 0; c < 256; ++c) {
        const char byte = static_cast<char>(c);
        const bool in_name = tokens.find(byte) != std::string::npos || byte == ':';  // the colon ends the name
        const bool in_value = (c >= 0x20 && c != 0x7F) || c == '\t';
        if (status_of(with_lines("X"s + byte + "Y: z\r\n")) != (in_name ? 200 : 400)) FAIL_CHECK("name ", c);
        if (status_of(with_lines("X: y"s + byte + "z\r\n")) != (in_value ? 200 : 400)) FAIL_CHECK("value ", c);
    }
}

TEST_CASE("a value has no white space around it") {
    const Request request =
        parsed(with_lines("A:b\r\nC: \t d e\t \r\nEmpty:\r\nBlank:  \t\r\nColon: a:b: c\r\nLatin: \xE9\r\n"));
    CHECK(request.header("a") == "b");
    CHECK(request.header("c") == "d e");
    CHECK(request.fields().find("empty") == "");
    CHECK(request.fields().find("blank") == "");
    CHECK(request.header("colon") == "a:b: c");
    CHECK(request.header("latin") == "\xE9");
    CHECK_FALSE(request.fields().find("absent"));
    CHECK(request.header("absent") == "");
}

// ---- Host -----------------------------------------------------------------------------------------------------------

TEST_CASE("a Host that is missing, doubled or invalid is rejected with 400") {
    // RFC 9112 3.2: "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that lacks
    // a Host header field and to any request message that contains more than one Host header field line or a Host header
    // field with an invalid field value."
    const auto head = [](std::string_view version, std::string_view lines) {
        return "GET / HTTP/" + std::string(version) + "\r\n" + std::string(lines) + "\r\n";
    };
    CHECK(status_of(head("1.1", "")) == 400);
    CHECK(status_of(head("1.1", "X-Host: a\r\n")) == 400);
    CHECK(status_of(head("1.1", "Host: a\r\nHost: b\r\n")) == 400);
    CHECK(status_of(head("1.1", "Host: a\r\nhOST: a\r\n")) == 400);
    CHECK(status_of(head("1.0", "Host: a\r\nHost: a\r\n")) == 400);
    CHECK(status_of(head("1.0", "")) == 200);
    CHECK(status_of(head("1.0", "Host: a b\r\n")) == 400);
    CHECK(status_of("GET http://b/ HTTP/1.1\r\n\r\n") == 400);
    CHECK(status_of("GET http://b/ HTTP/1.1\r\nHost: a b\r\n\r\n") == 400);

    // clang-format off
    const std::string invalid_hosts[] = {
        "", "a b", "a/b", "a@b", "a,b", "a?b", "a#b", "a\\b", "a\"b", "a<b", "a%20b", "http://a", ":80", "a:b",
        "a:80:80", "a:65536", "a:99999999999999999999", "a:-1", "a:+1", "a:8 0", "a:0x50", "::1", "[::1", "[]",
        "[:]", "[::1]x", "[::1]:x", "[::1]:65536", "[g::1]", "[::1%eth0]", "[fe80::1]]", "\xC3\xA4.example"};
    // clang-format on
    for (const std::string& host : invalid_hosts) {
        CAPTURE(host);
        CHECK(status_of(head("1.1", "Host: " + host + "\r\n")) == 400);
    }
}

TEST_CASE("a host is a name or an address, with or without a port") {
    for (const std::string host :
         {"a", "localhost", "Chat.Example", "chat.example.", "xn--bcher-kva.example", "a_b.example", "a:80", "a:65535",
          "a:0", "a:", "127.0.0.1", "127.0.0.1:8888", "[::1]", "[::1]:8888", "[2001:DB8::192.0.2.1]:"}) {
        CAPTURE(host);
        CHECK(parsed("GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n").host() == host);
    }
}

// ---- where a request ends -------------------------------------------------------------------------------------------

TEST_CASE("the length of a body is never ambiguous") {
    // RFC 9112 6.1-6.3 and 11.2, request smuggling.
    struct Row {
        std::string lines;
        int status;
        bool body = false;
    };
    // clang-format off
    const Row rows[] = {
        {"", 200}, {"Content-Length: 0\r\n", 200}, {"Content-Length: 00\r\n", 200},
        {"Content-Length: 5\r\n", 200, true}, {"content-LENGTH:5 \r\n", 200, true},
        {"Content-Length: 9223372036854775807\r\n", 200, true}, {"Content-Length: 9223372036854775808\r\n", 400},
        {"Content-Length: 18446744073709551621\r\n", 400},  // 2^64 + 5
        {"Content-Length: 100000000000000000000000000000005\r\n", 400}, {"Content-Length: -1\r\n", 400},
        {"Content-Length: +5\r\n", 400}, {"Content-Length: 5 5\r\n", 400}, {"Content-Length: 5,5\r\n", 400},
        {"Content-Length: 5, 6\r\n", 400}, {"Content-Length: 5;\r\n", 400}, {"Content-Length: 0x5\r\n", 400},
        {"Content-Length: 5e0\r\n", 400}, {"Content-Length: 5.0\r\n", 400}, {"Content-Length: \"5\"\r\n", 400},
        {"Content-Length:\r\n", 400}, {"Content-Length: five\r\n", 400},
        {"Content-Length: 5\r\nContent-Length: 5\r\n", 400}, {"Content-Length: 5\r\nContent-Length: 6\r\n", 400},
        {"Content-Length: 0\r\ncontent-length: 5\r\n", 400}, {"Content-Length : 5\r\n", 400},
        {"Transfer-Encoding: chunked\r\n", 200, true}, {"transfer-encoding: CHUNKED\r\n", 200, true},
        {"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 400},
        {"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", 400},
        {"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400},
        {"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", 400},
        {"Transfer-Encoding : chunked\r\n", 400}, {"Transfer-Encoding\t: chunked\r\n", 400},
        {"Transfer-Encoding: \x0b" "chunked\r\n", 400}, {"Transfer-Encoding: chunked\0\r\n"s, 400},
        {"X: y\r\n Transfer-Encoding: chunked\r\n", 400}, {"X: y\nTransfer-Encoding: chunked\r\n", 400},
        {"X: y\rTransfer-Encoding: chunked\r\n", 400}, {"Transfer-Encoding: gzip\r\n", 501},
        {"Transfer-Encoding: gzip, chunked\r\n", 501}, {"Transfer-Encoding: chunked, gzip\r\n", 501},
        {"Transfer-Encoding: chunked, chunked\r\n", 501}, {"Transfer-Encoding: identity\r\n", 501},
        {"Transfer-Encoding: xchunked\r\n", 501}, {"Transfer-Encoding: chunked;q=1\r\n", 501},
        {"Transfer-Encoding: \"chunked\"\r\n", 501}, {"Transfer-Encoding:\r\n", 501},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.lines);
        CHECK(status_of(with_lines(row.lines)) == row.status);
        if (row.status == 200) CHECK(parsed(with_lines(row.lines)).has_body() == row.body);
    }
    // RFC 9112 6.1: "A server or client that receives an HTTP/1.0 message containing a Transfer-Encoding header field MUST
    // treat the message as if the framing is faulty".
    CHECK(status_of("GET / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n") == 400);
}

TEST_CASE("heads that arrive together are parsed one by one") {
    const std::string bytes =
        "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\r\nGET /2 HTTP/1.1\r\nHost: b\r\nX: 2\r\n\r\n"
        "\r\nGET /3 HTTP/1.0\r\n\r\nGET /4";
    for (std::size_t split = 0; split <= bytes.size(); ++split) {
        RequestParser parser(default_limits);
        std::string seen;
        for (std::string_view piece :
             {std::string_view(bytes).substr(0, split), std::string_view(bytes).substr(split)}) {
            while (!piece.empty()) {
                std::size_t consumed = 0;
                const RequestParser::Outcome outcome = parser.feed(piece, consumed);
                REQUIRE(outcome != RequestParser::Outcome::failure);
                piece.remove_prefix(consumed);
                if (outcome == RequestParser::Outcome::need_more) REQUIRE(piece.empty());
                if (outcome != RequestParser::Outcome::request) continue;
                const Request request = parser.take_request();
                ((((seen += request.raw_path()) += " ") += request.host()) += request.header("x")) += ",";
            }
        }
        CHECK(seen == "/1 a,/2 b2,/3 ,");
        CHECK(parser.started());
    }
}

TEST_CASE("bytes after a head are not consumed") {
    const std::string head = with_lines("Upgrade: websocket\r\n"),
                      frames = test::hex("81 85 37 fa 21 3d 7f 9f 4d 51 58");
    RequestParser parser(default_limits);
    std::size_t consumed = 0;
    CHECK_FALSE(parser.started());
    CHECK(parser.feed(head + frames, consumed) == RequestParser::Outcome::request);
    CHECK(consumed == head.size());
    parser.take_request();
    CHECK_FALSE(parser.started());
}

// ---- pieces ---------------------------------------------------------------------------------------------------------

namespace {

// Parses the bytes at once, in any two pieces, and byte by byte. Returns the first different outcome, or an empty text.
std::string split_difference(std::string_view bytes, const Limits& limits = default_limits) {
    const std::string expected = outcome_of({bytes}, limits);
    const auto difference = [&](const std::string& pieces, const std::string& outcome) {
        return "{" + escape_for_log(bytes) + "} at once: " + expected + " | " + pieces + ": " + outcome + "\n";
    };
    for (std::size_t split = 1; split < bytes.size(); ++split) {
        const std::string outcome = outcome_of({bytes.substr(0, split), bytes.substr(split)}, limits);
        if (outcome != expected) return difference("split at " + std::to_string(split), outcome);
    }
    std::vector<std::string_view> single;
    for (std::size_t i = 0; i < bytes.size(); ++i) single.push_back(bytes.substr(i, 1));
    const std::string outcome = outcome_of(single, limits);
    return outcome == expected ? "" : difference("byte by byte", outcome);
}

}  // namespace

TEST_CASE("a head in any two pieces and byte by byte gives the same result") {
    const std::string heads[] = {
        with_lines(""),
        "\r\n" + with_lines("X: y\r\n"),
        "\r\n\r\n" + with_lines(""),
        "GET http://b.example/x?y HTTP/1.1\r\nHost: a\r\nCookie: a=b; c=d\r\nContent-Length: 5\r\n\r\n",
        with_lines("Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n"),
        "GET / HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: y\r\r\n\r\n",
        "GET / HTTP/1.1\r\r\n\r\n",
        "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n"s,
        "\rGET / HTTP/1.1\r\n",
        with_lines(" folded\r\n"),
        with_lines("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
        test::hex("16 03 01 02 00 01 00 01 fc 03 03"),
        "GET / HTTP/1.1\r\nHost: a\r\nincomplete",
    };
    for (const std::string& head : heads) CHECK(split_difference(head) == "");
}

TEST_CASE("a head at its limits gives the same result in any two pieces") {
    Limits limits;
    limits.max_request_line = 24;
    limits.max_header_bytes = 32;
    limits.max_header_fields = 3;
    for (std::size_t more = 0; more < 14; ++more) {
        const std::string padding(more, 'x');
        for (const std::string end : {"\r\n", "\n", "\r\r\n", "\rx\r\n", ""}) {
            for (const std::string& head : {"GET /" + padding + " HTTP/1.1" + end + "Host: a\r\n\r\n",
                                            "GET / HTTP/1.1\r\nHost: a\r\nX: 3456789" + padding + end + "\r\n",
                                            test::hex("16") + "TLS has more than 24" + padding + end})
                CHECK(split_difference(head, limits) == "");
        }
    }
}

TEST_CASE("random input gives the same result in any two pieces") {
    Limits limits;
    limits.max_request_line = 24;
    limits.max_header_bytes = 32;
    limits.max_header_fields = 3;
    const std::string words[] = {"GET", " ",    "/",           " HTTP/1.1\r\n",      "\r\n",
                                 "\r",  "\n",   "Host: a\r\n", "X: y\r\n",           ":",
                                 "\0"s, "\x16", "xxxxxxx",     "GET / HTTP/1.1\r\n", "Content-Length: 0\r\n"};
    std::mt19937 random(20240229);
    std::string different;
    for (int round = 0; round < 4'000 && different.empty(); ++round) {
        std::string bytes = round % 2 == 0 ? "GET / HTTP/1.1\r\n" : "";
        for (std::size_t count = random() % 8; count != 0; --count) bytes += words[random() % std::size(words)];
        different = split_difference(bytes, limits);
    }
    CHECK(different == "");
}

// ---- linear time ----------------------------------------------------------------------------------------------------

// These tests measure no time: on such large inputs a quadratic algorithm would exceed every timeout.

TEST_CASE("megabytes of headers are parsed byte by byte") {
    Limits limits;
    limits.max_header_bytes = limits.max_header_fields = 100'000'000;
    std::string many = "GET / HTTP/1.1\r\nHost: a\r\n";
    while (many.size() < 4'000'000) many += "X: y\r\n";
    for (const std::string& head : {many + "\r\n", with_lines("X: " + std::string(4'000'000, ' ') + "y\r\n")}) {
        RequestParser parser(limits);
        std::size_t consumed = 0;
        for (std::size_t i = 0; i + 1 < head.size(); ++i)
            if (parser.feed(std::string_view(head).substr(i, 1), consumed) != RequestParser::Outcome::need_more)
                FAIL("byte ", i);
        REQUIRE(parser.feed(std::string_view(head).substr(head.size() - 1), consumed) ==
                RequestParser::Outcome::request);
        CHECK(parser.take_request().header("x") == "y");
    }
}

TEST_CASE("megabytes of pathological cookies, lists and queries are searched") {
    Limits limits;
    limits.max_header_bytes = limits.max_request_line = 100'000'000;
    for (const std::string unit :
         {";", "=", "a=b;", "a;", "\"", " ", "=;", "a=\"b;", ",", "a,", " ,", ",\"", "a;b=\"c,"}) {
        CAPTURE(unit);
        std::string value = "x";
        while (value.size() < 2'000'000) value += unit;
        const auto [request, fields] =
            parsed_handshake(with_lines("Cookie: " + value + "; wanted=1\r\nSec-WebSocket-Protocol: " + value +
                                        ",wanted\r\nConnection: " + value + ", Upgrade\r\nUpgrade: " + value +
                                        ", websocket\r\nSec-WebSocket-Extensions: " + value + "\r\n"),
                             limits);
        CHECK(request.cookie("wanted") == "1");
        CHECK_FALSE(request.cookie("absent"));
        CHECK(wants_upgrade(fields));
        CHECK(offered_subprotocols(request).back() == "wanted");
        CHECK(reject_upgrade(request, fields));
    }
    for (const std::string unit : {"&", "=", "a=b&", "%41", "+", "?"}) {
        CAPTURE(unit);
        std::string query = "/?x";
        while (query.size() < 2'000'000) query += unit;
        const Request request = parsed(with_target(query + "&wanted=1"), limits);
        CHECK(request.query("wanted") == "1");
        CHECK_FALSE(request.query("absent"));
    }
}

TEST_CASE("each element of a list is visited once") {
    std::string list;
    for (int i = 0; i < 4'000; ++i) list += "a,,";
    std::size_t visited = 0;
    parsed(with_lines("List: " + list + "\r\n")).fields().each_element("list", [&](std::string_view) { ++visited; });
    CHECK(visited == 4'000);
}

// ---- the contents of a request --------------------------------------------------------------------------------------

TEST_CASE("fields are found by name without case, in order") {
    const Request request = parsed(with_lines("X-Forwarded-For: 1\r\nx-forwarded-for: 2\r\nX-Forwarded: 3\r\n"));
    CHECK(request.header("X-FORWARDED-FOR") == "1");
    CHECK(request.fields().count("x-Forwarded-For") == 2);
    CHECK(request.fields().count("X-Forwarded") == 1);
    CHECK(request.fields().count("X-Forward") == 0);
    std::string all;
    request.fields().each([&](std::string_view name, std::string_view value) {
        ((all += name) += "=") += std::string(value) + ";";
        return name != "x-forwarded-for";
    });
    CHECK(all == "Host=a;X-Forwarded-For=1;x-forwarded-for=2;");
}

TEST_CASE("lines that no parser has checked may have a field with an empty name") {
    const wschat::Fields fields("a: 1\r\n: 2\r\n:3\r\n");
    CHECK(fields.find("") == "2");
    CHECK(fields.count("") == 2);
    CHECK(fields.find("a") == "1");
    CHECK(parsed(with_lines("")).fields().count("") == 0);
}

TEST_CASE("a list has the elements of all its fields, without empty ones") {
    const Request request =
        parsed(with_lines("List: a, b\tc ,,d\r\nOther: x\r\nLis: x\r\nLists: x\r\nLIST: , \r\nlist:e\r\n"));
    std::vector<std::string_view> elements;
    request.fields().each_element("List", [&](std::string_view element) { elements.push_back(element); });
    CHECK(elements == std::vector<std::string_view>{"a", "b\tc", "d", "e"});
    CHECK(request.fields().has_element("list", "E"));
    CHECK(request.fields().has_element("list", "a"));
    CHECK_FALSE(request.fields().has_element("list", "b"));
    CHECK_FALSE(request.fields().has_element("list", "x"));
    CHECK_FALSE(request.fields().has_element("list", ""));
}

namespace {

// `expected`: a name, its value, the next name, its value ...
template <class Find>
void check_values(Find&& find, std::initializer_list<std::string_view> expected) {
    for (auto it = expected.begin(); it != expected.end(); it += 2) {
        CAPTURE(*it);
        CHECK(find(*it) == *(it + 1));
    }
}

}  // namespace

TEST_CASE("a query parameter is found by its decoded name") {
    const Request request =
        parsed(with_target("/p?a=1&b=two+words&&c&d=&a=2&%65=%C3%A4&f=x=y&bad=%zz&g?=h&i%26=%26%3d"));
    check_values([&](std::string_view name) { return request.query(name); },
                 {"a", "1", "b", "two words", "c", "", "d", "", "e", "\xC3\xA4", "f", "x=y", "g?", "h", "i&", "&="});
    CHECK_FALSE(request.query("bad"));
    CHECK_FALSE(request.query("absent"));
    CHECK_FALSE(request.query("A"));
    CHECK_FALSE(parsed(with_target("/p")).query("a"));
    CHECK_FALSE(parsed(with_target("/p?")).query("a"));
}

TEST_CASE("a later query parameter does not replace a malformed first one") {
    const Request request = parsed(with_target("/p?a=%-&a=1&%61=2"));
    CHECK_FALSE(request.query("a"));
    CHECK(request.query_all("a") == std::vector<std::string>{"1", "2"});
}

TEST_CASE("a cookie is found by its complete name in any Cookie field") {
    const Request request = parsed(
        with_lines("Cookie: session=abc123; theme=dark;no-space=1; sess=no; quoted=\"a b\"; eq=a=b; empty=\r\n"
                   "X: session=other\r\nCookie: second=2; theme=light\r\ncookie: \r\nCookie: half=\"a; one=\"\r\n"));
    check_values([&](std::string_view name) { return request.cookie(name); },
                 {"session", "abc123", "sess", "no", "theme", "dark", "no-space", "1", "quoted", "a b",
                  "half",    "\"a",    "one",  "\"", "eq",    "a=b",  "empty",    "",  "second", "2"});
    CHECK_FALSE(request.cookie("Session"));
    CHECK_FALSE(request.cookie("session2"));
    CHECK_FALSE(request.cookie("abc123"));
    CHECK_FALSE(parsed(with_lines("")).cookie("session"));
}

TEST_CASE("route parameters are found by name") {
    Request request = parsed(with_lines(""));
    CHECK(request.param("room") == "");
    RequestAccess::set_params(request, {{"room", "tea room"}, {"id", "7"}});
    CHECK(request.param("room") == "tea room");
    CHECK(request.param("id") == "7");
    CHECK(request.param("Room") == "");
}

// ---- responses ------------------------------------------------------------------------------------------------------

static std::string header_of(const Response& response, std::string_view name) {
    std::string values;
    for (const auto& [key, value] : response.headers())
        if (text::equals_ignore_case(key, name)) values += "[" + value + "]";
    return values;
}

TEST_CASE("a response has a status, a body and the type of the body") {
    const Response plain(404, "There is nothing.\n");
    CHECK(plain.status() == 404);
    CHECK(plain.body() == "There is nothing.\n");
    CHECK(header_of(plain, "Content-Type") == "[text/plain; charset=utf-8]");
    CHECK(Response(204).headers().empty());
    CHECK(header_of(Response::html("<p>"), "content-type") == "[text/html; charset=utf-8]");
    CHECK(Response::html("<p>").status() == 200);
    CHECK(Response::json({{"ok", true}}).body() == R"({"ok":true})");
    CHECK(header_of(Response::json({{"ok", true}}), "content-type") == "[application/json]");
    CHECK(Response::json({{"ok", false}}, 503).status() == 503);
    CHECK(Response::redirect("/chat").status() == 302);
    CHECK(header_of(Response::redirect("/chat", 308), "location") == "[/chat]");
}

TEST_CASE("a status that is not in 200-599 is an Error") {
    for (const int status : {-1, 0, 99, 100, 101, 199, 600, 1000}) CHECK_THROWS_AS(Response{status}, Error);
    for (const int status : {200, 299, 404, 599}) CHECK(Response(status).status() == status);
}

TEST_CASE("a header replaces a header of the same name, but a cookie does not") {
    Response response(200);
    response.set_header("X-One", "1")
        .set_header("Set-Cookie", "a=1")
        .set_header("x-one", "2")
        .set_header("set-cookie", "b=2");
    CHECK(header_of(response, "X-One") == "[2]");
    CHECK(header_of(response, "Set-Cookie") == "[a=1][b=2]");
}

TEST_CASE("a header value cannot begin another line") {
    Response response(200);
    for (const std::string& value :
         {"x\r\nSet-Cookie: y=z"s, "x\ny"s, "x\ry"s, "\r\n"s, "\n"s, "x\0y"s, "x\x1b[2J"s, "x\x7f"s, "\b"s}) {
        CAPTURE(escape_for_log(value));
        CHECK_THROWS_AS(response.set_header("X", value), Error);
        CHECK_THROWS_AS(Response::redirect("/" + value), Error);
        CHECK_THROWS_AS(Response(200, "body", "text/plain" + value), Error);
    }
    for (const std::string name :
         {"", " ", "X ", " X", "X Y", "X:", "X: y\r\nZ", "X\r\n", "X\n", "X\t", "\xC3\xA4", "X\x01", "X(1)"}) {
        CAPTURE(escape_for_log(name));
        CHECK_THROWS_AS(response.set_header(name, "value"), Error);
    }
    CHECK_THROWS_AS(response.set_header("X\0"s, "value"), Error);
    CHECK(response.headers().empty());
    CHECK_NOTHROW(response.set_header("X", "a\tb, \"c\"; \xC3\xA4"));
    CHECK_NOTHROW(response.set_header("X", ""));
}

TEST_CASE("the Error about a header names the call and escapes the value") {
    const std::string sentence = test::error_of([] { Response(200).set_header("X", "a\r\nb"); });
    CHECK(test::contains(sentence, "set_header"));
    CHECK(test::contains(sentence, R"(a\x0d\x0ab)"));
}

TEST_CASE("each status that the server uses has its reason phrase") {
    std::string phrases;
    for (const int status : {200, 304, 400, 403, 404, 405, 408, 413, 414, 421, 426, 431, 503, 505, 299, 399, 499, 599})
        (phrases += reason_phrase(status)) += ", ";
    CHECK(phrases ==
          "OK, Not Modified, Bad Request, Forbidden, Not Found, Method Not Allowed, Request Timeout, "
          "Content Too Large, URI Too Long, Misdirected Request, Upgrade Required, "
          "Request Header Fields Too Large, Service Unavailable, HTTP Version Not Supported, "
          "Success, Redirection, Client Error, Server Error, ");
    for (int status = 200; status < 600; ++status)
        if (reason_phrase(status).empty()) FAIL_CHECK("status ", status);
}

TEST_CASE("a date has the form of RFC 9110 5.6.7") {
    CHECK(http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT");
    CHECK(http_date(0) == "Thu, 01 Jan 1970 00:00:00 GMT");
    CHECK(http_date(951782400) == "Tue, 29 Feb 2000 00:00:00 GMT");
    CHECK(http_date(1709251199) == "Thu, 29 Feb 2024 23:59:59 GMT");
    CHECK(http_date(2147483648) == "Tue, 19 Jan 2038 03:14:08 GMT");
    CHECK(http_date(4107542400) == "Mon, 01 Mar 2100 00:00:00 GMT");  // no leap year
    CHECK(http_date(253402300799) == "Fri, 31 Dec 9999 23:59:59 GMT");
}

TEST_CASE("every day of three centuries has the same date as in the C library") {
    for (std::int64_t day = 0; day < 300 * 365; ++day) {
        const std::int64_t second = day * 86400 + day * 7919 % 86400;
        const auto time = static_cast<std::time_t>(second);
        char expected[64];
        std::strftime(expected, sizeof expected, "%a, %d %b %Y %H:%M:%S GMT", std::gmtime(&time));
        if (http_date(second) != expected) FAIL_CHECK(http_date(second), " is not ", std::string(expected));
    }
}

TEST_CASE("a date before 1970 is correct") {
    // Last-Modified has the time of a file, which may be before 1970.
    CHECK(http_date(-1) == "Wed, 31 Dec 1969 23:59:59 GMT");
    CHECK(http_date(-86'400) == "Wed, 31 Dec 1969 00:00:00 GMT");
    CHECK(http_date(-86'401) == "Tue, 30 Dec 1969 23:59:59 GMT");
    CHECK(http_date(-784111777) == "Sun, 25 Feb 1945 15:10:23 GMT");
    CHECK(http_date(-2147483649) == "Fri, 13 Dec 1901 20:45:51 GMT");
}

// ---- the opening handshake ------------------------------------------------------------------------------------------

TEST_CASE("the accept key agrees with RFC 6455 1.3") {
    CHECK(AcceptKey("dGhlIHNhbXBsZSBub25jZQ==").view() == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}

TEST_CASE("a key is 16 bytes of base64") {
    for (const std::string key : {"dGhlIHNhbXBsZSBub25jZQ==", "AAAAAAAAAAAAAAAAAAAAAA==", "////////////////////+w=="})
        CHECK(valid_key(key));
    for (const std::string key :
         {"", "==", "AAAA", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZQ=", "dGhlIHNhbXBsZSBub25jZQ===",
          "dGhlIHNhbXBsZSBub25jZQ= ", "AAAAAAAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAAAAAAAAAA=", "AAAAAAAAAAAAAAAAAAAAAAAA",
          "AAAAAAAAAAAAAAAAAAAA-A==", "AAAAAAAAAAAAAAAAAAAA_A==", "AAAAAAAAAAA=AAAAAAAAAA==",
          "AAAA AAAAAAAAAAAAAAAAA==", "AAAAAAAAAAAAAAAAAAAAAAAAAAAA==", "\"AAAAAAAAAAAAAAAAAAAA\"=="}) {
        CAPTURE(key);
        CHECK_FALSE(valid_key(key));
    }
}

TEST_CASE("an upgrade is wanted if both Upgrade and Connection have their token") {
    struct Row {
        std::string lines;
        bool wanted;
    };
    // RFC 6455 4.2.1 / 3: an Upgrade "containing the value "websocket", treated as an ASCII case-insensitive value"; / 4:
    // a Connection "that includes the token "Upgrade", treated as an ASCII case-insensitive value".
    const Row rows[] = {
        {"Upgrade: websocket\r\nConnection: Upgrade\r\n", true},
        {"Upgrade: WebSocket\r\nConnection: upgrade\r\n", true},
        {"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n", true},
        {"Upgrade: websocket\r\nConnection: keep-alive\r\nConnection: Upgrade\r\n", true},
        {"Upgrade: h2c, websocket\r\nConnection: Upgrade\r\n", true},
        {"", false},
        {"Upgrade: websocket\r\n", false},
        {"Connection: Upgrade\r\n", false},
        {"Upgrade: websocket\r\nConnection: close\r\n", false},
        {"Upgrade: websocket\r\nConnection: noupgradeplease\r\n", false},
        {"Upgrade: websocket\r\nConnection: upgrades\r\n", false},
        {"Upgrade: websocket\r\nConnection: keep-alive Upgrade\r\n", false},
        {"Upgrade: h2c\r\nConnection: Upgrade\r\n", false},
        {"Upgrade: websocket2\r\nConnection: Upgrade\r\n", false},
        {"Upgrade: web socket\r\nConnection: Upgrade\r\n", false},
    };
    for (const Row& row : rows) {
        CAPTURE(row.lines);
        CHECK(wants_upgrade(parsed_handshake(with_lines(row.lines)).second) == row.wanted);
    }
}

TEST_CASE("a field of a handshake is found by its exact name") {
    for (std::size_t at = 0; at < 17; ++at)
        for (int c = 0; c < 256; ++c) {
            std::string name = "Sec-WebSocket-Key";
            name[at] = static_cast<char>(c);
            if (!text::is_token(name)) continue;
            CAPTURE(name);
            const bool same = text::equals_ignore_case(name, "sec-websocket-key");
            CHECK(parsed_handshake(with_lines(name + ": x\r\n")).second.key.count == (same ? 1 : 0));
        }
}

TEST_CASE("the fields of a handshake are found in pieces of any size, and in each request of a connection") {
    const std::string head = with_lines(
        "Upgrade: h2c\r\nORIGIN: http://a\r\nConnection: keep-alive, Upgrade\r\nOrigin:\r\nupgrade:websocket\r\n"
        "Sec-WebSocket-Kez: no\r\nSec-WebSocket-Key:  a key \r\nSec-WebSocket-Version: 13\r\n");
    for (std::size_t size = 1; size <= head.size(); ++size) {
        CAPTURE(size);
        RequestParser parser(default_limits);
        for (int requests = 0; requests < 2; ++requests) {
            std::size_t consumed = 0;
            for (std::size_t at = 0; at < head.size(); at += size)
                parser.feed(std::string_view(head).substr(at, size), consumed);
            const Request request = parser.take_request();
            const HandshakeFields& fields = parser.handshake();
            CHECK(wants_upgrade(fields));
            CHECK(fields.host.of(request) == "a");
            CHECK(request.host() == "a");
            CHECK(fields.origin.count == 2);
            CHECK(fields.origin.of(request).empty());
            CHECK(fields.key.count == 1);
            CHECK(fields.key.of(request) == "a key");
            CHECK(fields.version.count == 1);
            CHECK(fields.version.of(request) == "13");
        }
        std::size_t consumed = 0;
        parser.feed(with_lines("A: b\r\n"), consumed);
        CHECK_FALSE(wants_upgrade(parser.handshake()));
        CHECK(parser.handshake().host.count == 1);
        CHECK(parser.handshake().key.count == 0);
    }
}

TEST_CASE("an invalid upgrade is rejected with the right status") {
    const std::string upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\n",
                      version = "Sec-WebSocket-Version: 13\r\n",
                      key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    struct Row {
        std::string lines;
        int status;  // 101 if the upgrade is accepted
        std::string start = "GET / HTTP/1.1";
    };
    // clang-format off
    const Row rows[] = {
        {version + key, 101}, {"sec-websocket-KEY:dGhlIHNhbXBsZSBub25jZQ==\r\nSEC-WEBSOCKET-VERSION:  13 \r\n", 101},
        {version + key + "Content-Length: 0\r\n", 101},
        {version + key + "Origin: null\r\n", 101},  // another function checks the origin
        {version + key, 405, "POST / HTTP/1.1"}, {version + key, 405, "HEAD / HTTP/1.1"},
        {version + key, 405, "OPTIONS / HTTP/1.1"}, {version + key, 405, "get / HTTP/1.1"},
        {version + key, 505, "GET / HTTP/1.0"}, {version + key + "Content-Length: 5\r\n", 400},
        {version + key + "Transfer-Encoding: chunked\r\n", 400}, {key, 426},
        {key + "Sec-WebSocket-Version:\r\n", 426}, {key + "Sec-WebSocket-Version: 8\r\n", 426},
        {key + "Sec-WebSocket-Version: 14\r\n", 426}, {key + "Sec-WebSocket-Version: 013\r\n", 426},
        {key + "Sec-WebSocket-Version: 130\r\n", 426}, {key + "Sec-WebSocket-Version: 13, 8\r\n", 426},
        {key + version + "Sec-WebSocket-Version: 8\r\n", 426}, {version, 400}, {version + key + key, 400},
        {version + "Sec-WebSocket-Key:\r\n", 400}, {version + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j\r\n", 400},
        {version + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZXM=\r\n", 400},
        {version + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ\r\n", 400},
        {version + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub2!jZQ==\r\n", 400},
        {version + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==, x\r\n", 400},
        {version + key + "Sec-WebSocket-Protocol: chat, superchat\r\n", 101},
        {version + key + "Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Protocol: superchat\r\n", 101},
        {version + key + "Sec-WebSocket-Protocol: v1.chat+json!\r\n", 101},
        {version + key + "Sec-WebSocket-Protocol: super chat\r\n", 400},
        {version + key + "Sec-WebSocket-Protocol: chat, sup(er\r\n", 400},
        {version + key + "Sec-WebSocket-Protocol: chat/2\r\n", 400},
        {version + key + "Sec-WebSocket-Protocol: ch\xC3\xA4t\r\n", 400},
        // An invalid offer of extensions does not reject the upgrade.
        {version + key + "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n", 101},
        {version + key + "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99; x; x\r\n", 101},
        {version + key + "Sec-WebSocket-Extensions: ;;,=,\"\r\n", 101},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.start);
        CAPTURE(row.lines);
        const auto rejection = rejection_of(row.start + "\r\nHost: a\r\n" + upgrade + row.lines + "\r\n");
        CHECK((rejection ? rejection->status() : 101) == row.status);
        if (!rejection) continue;
        // The body is a sentence.
        CHECK(rejection->body().size() > 10);
        CHECK(rejection->body().substr(rejection->body().size() - 2) == ".\n");
        if (row.status == 405) CHECK(header_of(*rejection, "Allow") == "[GET]");
        // RFC 6455 4.2.2 / 4: "an appropriate HTTP error code (such as 426 Upgrade Required) and a |Sec-WebSocket-Version|
        // header field indicating the version(s) the server is capable of understanding". RFC 9110 15.5.22: "The server
        // MUST send an Upgrade header field in a 426 response".
        if (row.status == 426) CHECK(header_of(*rejection, "Sec-WebSocket-Version") == "[13]");
        if (row.status == 426) CHECK(header_of(*rejection, "Upgrade") == "[websocket]");
    }
}

TEST_CASE("the offered subprotocols are those of all fields, in order") {
    const Request request =
        parsed(with_lines("Sec-WebSocket-Protocol: chat, superchat\r\nSec-WebSocket-Protocol:v2\r\n"));
    CHECK(offered_subprotocols(request) == std::vector<std::string_view>{"chat", "superchat", "v2"});
    CHECK(offered_subprotocols(parsed(with_lines(""))).empty());
}

TEST_CASE("the response to a handshake agrees with RFC 6455 1.3") {
    CHECK(test::switching_protocols("dGhlIHNhbXBsZSBub25jZQ==", "chat") ==
          "HTTP/1.1 101 Switching Protocols\r\n"
          "Upgrade: websocket\r\n"
          "Connection: Upgrade\r\n"
          "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
          "Sec-WebSocket-Protocol: chat\r\n"
          "\r\n");
    CHECK(test::switching_protocols("dGhlIHNhbXBsZSBub25jZQ==", "").find("Protocol:") == std::string::npos);
}

TEST_CASE("a server accepts the handshake of a client") {
    const std::string head =
        handshake_request("chat.example:8888", "/chat?name=Anna", "dGhlIHNhbXBsZSBub25jZQ==", "chat, superchat");
    const auto [request, fields] = parsed_handshake(head);
    CHECK(request.method() == "GET");
    CHECK(request.target() == "/chat?name=Anna");
    CHECK(request.host() == "chat.example:8888");
    CHECK(request.header("sec-websocket-key") == "dGhlIHNhbXBsZSBub25jZQ==");
    CHECK(wants_upgrade(fields));
    CHECK_FALSE(reject_upgrade(request, fields));
    CHECK(offered_subprotocols(request) == std::vector<std::string_view>{"chat", "superchat"});
    CHECK(offered_subprotocols(parsed(handshake_request("a", "/", "dGhlIHNhbXBsZSBub25jZQ=="))).empty());
}

TEST_CASE("a value in a handshake cannot begin another line") {
    const std::string key = "dGhlIHNhbXBsZSBub25jZQ==";
    for (const std::string& bad : {"a\r\nX: y"s, "a\nb"s, "a\rb"s, "a\0b"s}) {
        CAPTURE(escape_for_log(bad));
        CHECK_THROWS_AS(handshake_request(bad, "/", key), Error);
        CHECK_THROWS_AS(handshake_request("a", "/" + bad, key), Error);
        CHECK_THROWS_AS(handshake_request("a", "/", key, bad), Error);
        CHECK_THROWS_AS(test::switching_protocols(key, bad), Error);
    }
    CHECK_THROWS_AS(handshake_request("a", "/ HTTP/1.1", key), Error);
}

TEST_CASE("a client accepts only the responses that RFC 6455 4.1 allows") {
    const std::string status = "HTTP/1.1 101 Switching Protocols\r\n", upgrade = "Upgrade: websocket\r\n",
                      connection = "Connection: Upgrade\r\n",
                      accept = "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
    struct Row {
        std::string head, offered;
        bool accepted;
    };
    const Row rows[] = {
        {status + upgrade + connection + accept, "", true},
        {status + "upgrade: WEBSOCKET\r\nconnection: keep-alive, upgrade\r\n" + accept, "", true},
        {"HTTP/1.1 101 \r\n" + upgrade + connection + accept, "", true},
        {"HTTP/1.1 101\r\n" + upgrade + connection + accept, "", true},
        {status + upgrade + connection + accept, "chat", true},  // the server may choose none
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: chat\r\n", "chat", true},
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: chat\r\n", "superchat, chat", true},
        // 1. The status.
        {"HTTP/1.1 200 OK\r\n" + upgrade + connection + accept, "", false},
        {"HTTP/1.1 403 Forbidden\r\n\r\n", "", false},
        {"HTTP/1.1 1010 Odd\r\n" + upgrade + connection + accept, "", false},
        {"HTTP/1.0 101 Switching Protocols\r\n" + upgrade + connection + accept, "", false},
        {"RFB 003.008\n", "", false},
        {"", "", false},
        // 2 and 3. Upgrade and Connection.
        {status + connection + accept, "", false},
        {status + "Upgrade: h2c\r\n" + connection + accept, "", false},
        {status + upgrade + accept, "", false},
        {status + upgrade + "Connection: close\r\n" + accept, "", false},
        // 4. The accept key.
        {status + upgrade + connection, "", false},
        {status + upgrade + connection + "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOO=\r\n", "", false},
        {status + upgrade + connection + "Sec-WebSocket-Accept: S3PPLMBITXAQ9KYGZZHZRBK+XOO=\r\n", "", false},
        {status + upgrade + connection + "Sec-WebSocket-Accept: dGhlIHNhbXBsZSBub25jZQ==\r\n", "", false},
        {status + upgrade + connection + accept + accept, "", false},
        // 5. Extensions. The client offered none.
        {status + upgrade + connection + accept + "Sec-WebSocket-Extensions: permessage-deflate\r\n", "", false},
        // 6. Subprotocols.
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: chat\r\n", "", false},
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: other\r\n", "chat, superchat", false},
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: CHAT\r\n", "chat", false},
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: chat, superchat\r\n", "chat, superchat",
         false},
        // RFC 6455 11.3.4: it "MUST NOT appear more than once in an HTTP response".
        {status + upgrade + connection + accept + "Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Protocol: other\r\n",
         "chat", false},
    };
    for (const Row& row : rows) {
        CAPTURE(row.head);
        const std::string error = handshake_response_error(row.head + "\r\n", "dGhlIHNhbXBsZSBub25jZQ==", row.offered);
        CAPTURE(error);
        CHECK(error.empty() == row.accepted);
    }
    CHECK(test::contains(handshake_response_error("HTTP/1.1 403 Forbidden\r\n\r\n", "x"), "403 Forbidden"));
    CHECK_FALSE(test::contains(handshake_response_error("\x1b[2J\r\n\r\n", "x"), "\x1b"));
}

// ---- origins --------------------------------------------------------------------------------------------------------

TEST_CASE("an origin is normalized to lower case without the default port") {
    check_values(normalized_origin, {"http://chat.example",       "http://chat.example",
                                     "HTTP://Chat.EXAMPLE",       "http://chat.example",
                                     "http://chat.example:80",    "http://chat.example",
                                     "https://chat.example:443",  "https://chat.example",
                                     "http://chat.example:443",   "http://chat.example:443",
                                     "https://chat.example:80",   "https://chat.example:80",
                                     "https://chat.example:8443", "https://chat.example:8443",
                                     "http://[::1]:80",           "http://[::1]",
                                     "http://[fe80::80]",         "http://[fe80::80]",
                                     "http://127.0.0.1:8888",     "http://127.0.0.1:8888"});
    // clang-format off
    const std::string invalid_origins[] = {
        "", "null/", "chat.example", "//chat.example", "http:", "http:/", "http://", "https://:443", "wss://", "ws:///",
        "http://chat.example//", "http://chat.example/path", "http://chat.example?x", "http://u@chat.example",
        "http://chat.example http://other.example", "http://chat.example, http://other.example",
        "http://chat.example:99999", "http://chat.example:x", "file:////", "file:///x", "://chat.example",
        "1p://chat.example", "a b://chat.example", "javascript:alert(1)", "http://\xC3\xA4.example"};
    // clang-format on
    for (const std::string& origin : invalid_origins) {
        CAPTURE(origin);
        CHECK_FALSE(normalized_origin(origin));
    }
}

TEST_CASE("an origin may end with a slash, have the scheme ws or wss, or be of an app") {
    check_values(normalized_origin,
                 {"http://chat.example/", "http://chat.example", "https://chat.example:443/", "https://chat.example",
                  "ws://chat.example:80", "http://chat.example", "WSS://chat.example:8443", "https://chat.example:8443",
                  "capacitor://localhost", "capacitor://localhost", "Ionic://LocalHost:80/", "ionic://localhost:80",
                  "file://", "file://", "file:///", "file://", "NULL", "null"});
}

TEST_CASE("a page may connect to its own host and to no similar host") {
    struct Row {
        std::string origin, host;
        bool same;
    };
    // clang-format off
    const Row rows[] = {
        {"http://chat.example", "chat.example", true},
        {"https://chat.example", "chat.example", true},  // behind a proxy with TLS
        {"http://CHAT.example", "chat.EXAMPLE", true}, {"http://chat.example:8888", "chat.example:8888", true},
        {"http://chat.example", "chat.example:80", true}, {"http://chat.example:80", "chat.example", true},
        {"https://chat.example", "chat.example:443", true}, {"http://127.0.0.1:8888", "127.0.0.1:8888", true},
        {"http://[::1]:8888", "[::1]:8888", true},
        // A prefix and a suffix, on either side.
        {"http://chat.example.evil.example", "chat.example", false},
        {"http://evilchat.example", "chat.example", false}, {"http://chat.exampl", "chat.example", false},
        {"http://example", "chat.example", false}, {"http://sub.chat.example", "chat.example", false},
        {"http://chat.example", "sub.chat.example", false},
        // Other ports.
        {"http://chat.example:8888", "chat.example", false}, {"http://chat.example", "chat.example:8888", false},
        {"http://chat.example:88", "chat.example:8888", false},
        {"http://chat.example:8889", "chat.example:8888", false}, {"https://chat.example", "chat.example:80", false},
        {"http://chat.example", "chat.example:443", false},
        // As clients that are not browsers write it.
        {"ws://chat.example", "chat.example", true}, {"wss://chat.example", "chat.example", true},
        {"wss://chat.example:8888/", "chat.example:8888", true}, {"http://chat.example/", "chat.example", true},
        {"wss://chat.example", "chat.example:80", false}, {"ws://evil.example", "chat.example", false},
        // Other schemes, and texts that are not origins.
        {"ftp://chat.example", "chat.example", false}, {"file://chat.example", "chat.example", false},
        {"file://", "", false}, {"null", "chat.example", false}, {"null", "null", false},
        {"", "chat.example", false}, {"", "", false}, {"chat.example", "chat.example", false}, {"http://", "", false},
        {"http://chat.example", "", false},
        // An address instead of a name, a trailing dot, a user, a path.
        {"http://127.0.0.1:8888", "localhost:8888", false}, {"http://localhost:8888", "127.0.0.1:8888", false},
        {"http://93.184.216.34", "chat.example", false}, {"http://chat.example.", "chat.example", false},
        {"http://chat.example", "chat.example.", false}, {"http://chat.example@evil.example", "chat.example", false},
        {"http://evil.example/chat.example", "chat.example", false},
        {"http://evil.example#chat.example", "chat.example", false},
        {"http://chat.example http://evil.example", "chat.example", false},
        {"http://chat.example", "chat.example/", false}, {"http://chat.example", "u@chat.example", false},
    };
    // clang-format on
    for (const Row& row : rows) {
        CAPTURE(row.origin);
        CAPTURE(row.host);
        CHECK(same_host(row.origin, row.host) == row.same);
    }
}

TEST_CASE("only the server sets the length of a response") {
    for (const std::string name : {"Content-Length", "content-length", "Transfer-Encoding", "TRANSFER-ENCODING"}) {
        CAPTURE(name);
        const std::string sentence = "Response::set_header: only the server sets " + name;
        CHECK_THROWS_WITH_AS(Response(200).set_header(name, "5"), sentence.c_str(), Error);
    }
}

TEST_CASE("a version has one digit on each side of its point") {
    for (const std::string version : {"HTTP/1x1", "HTTP/1.x", "HTTP/11.", "HTTP/.11"}) {
        CAPTURE(version);
        CHECK(status_of("GET / " + version + "\r\nHost: a\r\n\r\n") == 400);
    }
}

TEST_CASE("the authority form of CONNECT is accepted and matches no route") {
    const Request request = parsed("CONNECT chat.example:443 HTTP/1.1\r\nHost: chat.example:443\r\n\r\n");
    CHECK(request.target() == "chat.example:443");
    CHECK_FALSE(Pattern("get", "/{everything...}").matches(request.raw_path()));
    CHECK(status_of("GET chat.example:443 HTTP/1.1\r\nHost: chat.example:443\r\n\r\n") == 400);
}

TEST_CASE("a value that is only white space is empty") {
    CHECK(parsed(with_lines("X-One: \t \r\n")).fields().find("x-one") == "");
}

TEST_CASE("a host may have all unreserved characters of RFC 3986 2.3") {
    CHECK(parsed("GET / HTTP/1.1\r\nHost: a-b.c_d~e\r\n\r\n").host() == "a-b.c_d~e");
    CHECK(status_of("GET / HTTP/1.1\r\nHost: a}b\r\n\r\n") == 400);
}

TEST_CASE("an offer of subprotocols is rejected if one of them is not a token") {
    for (const std::string offer : {"super chat, chat", "chat, super chat, superchat", "super chat, super chat"}) {
        CAPTURE(offer);
        const auto rejection = rejection_of(handshake_request("a", "/", "dGhlIHNhbXBsZSBub25jZQ==", offer));
        REQUIRE(rejection);
        CHECK(rejection->status() == 400);
    }
}

TEST_CASE("the tab is the only control character that a handshake accepts") {
    const std::string key = "dGhlIHNhbXBsZSBub25jZQ==";
    CHECK(parsed(handshake_request("a", "/", key, "chat,\tsuperchat")).header("sec-websocket-protocol") ==
          "chat,\tsuperchat");
    CHECK_THROWS_AS(handshake_request("a", "/", key, "chat\x7F"), Error);
    CHECK_THROWS_AS(test::switching_protocols(key, "chat\x7F"), Error);
}

TEST_CASE("a server may choose any of the offered subprotocols") {
    const std::string key = "dGhlIHNhbXBsZSBub25jZQ==";
    for (const std::string chosen : {"one", "two", "three"}) {
        CAPTURE(chosen);
        CHECK(handshake_response_error(test::switching_protocols(key, chosen), key, "one, two, three") == "");
    }
    CHECK(handshake_response_error(test::switching_protocols(key, "four"), key, "one, two, three") ==
          "the server chose a subprotocol that was not offered");
}

TEST_CASE("a request keeps its head, the subject of its certificate and its body apart") {
    Limits limits;
    RequestParser parser(limits);
    std::size_t consumed = 0;
    parser.feed("\r\nPUT /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n", consumed);
    Request head = parser.take_request();
    RequestAccess::set_connection(head, "::1", true, "CN=Anna");
    CHECK(head.client_certificate() == "CN=Anna");
    CHECK(head.body() == "");
    BodyParser body(std::move(head), limits);
    CHECK(body.feed("bo", consumed) == BodyParser::Outcome::need_more);
    CHECK(body.received() == 2);
    CHECK(body.feed("dyrest", consumed) == BodyParser::Outcome::body);
    CHECK(consumed == 2);
    const Request request = body.take_request();
    CHECK(request.method() == "PUT");
    CHECK(request.raw_path() == "/a");
    CHECK(request.query("b") == "c");
    CHECK(request.header("host") == "x");
    CHECK(request.body() == "body");
    CHECK(request.client_certificate() == "CN=Anna");
    CHECK(request.remote_address() == "::1");
    CHECK(request.scheme() == "https");
}

TEST_SUITE_END();
