// The client's side of the opening handshake: response heads, the checks of RFC 6455 4.1, bodies of refusals, URLs and
// the Location of redirects.
//
// Input: a byte for limits and chunks, a counted text that is a URL, and the bytes of the server. "{accept}" in them
// becomes the right Sec-WebSocket-Accept.
#include "fuzz.hpp"

namespace {

using namespace fuzz;
using wschat::detail::ClientUrl;
using wschat::detail::ResponseBody;
using wschat::detail::ResponseParser;

constexpr std::string_view key = "dGhlIHNhbXBsZSBub25jZQ==";

struct Parsed {
    ResponseParser::Outcome outcome = ResponseParser::Outcome::need_more;
    std::string head, reason, body;
    int status = 0;
    std::size_t consumed = 0;
    bool body_complete = false;
};

Parsed parse(std::string_view stream, const Limits& limits, Chunker chunker) {
    Parsed result;
    ResponseParser parser(limits);
    while (result.consumed < stream.size() && result.outcome == ResponseParser::Outcome::need_more) {
        const std::string_view rest = stream.substr(result.consumed);
        const std::string chunk(rest.substr(0, chunker.next_size(rest.size())));
        std::size_t consumed = 0;
        result.outcome = parser.feed(chunk, consumed);
        check(consumed <= chunk.size(), "more than the chunk is consumed");
        check(consumed == chunk.size() || result.outcome != ResponseParser::Outcome::need_more, "bytes are left over");
        result.consumed += consumed;
    }
    check(parser.head().size() <= limits.max_request_line + limits.max_header_bytes + 4, "the head exceeds its limits");
    result.reason = parser.reason();
    check(result.reason.empty() == (result.outcome != ResponseParser::Outcome::failure), "a failure without a reason");
    if (result.outcome != ResponseParser::Outcome::response) return result;
    result.head = parser.head();
    result.status = parser.status();
    check(result.status >= 100 && result.status <= 599, "an illegal status");
    ResponseBody body;
    body.start(parser.status(), parser.fields());
    for (std::string_view rest = stream.substr(result.consumed); !rest.empty();) {
        const std::string_view chunk = rest.substr(0, chunker.next_size(rest.size()));
        body.feed(chunk);
        rest.remove_prefix(chunk.size());
    }
    result.body_complete = body.complete();
    result.body = body.take();
    check(result.body.size() <= ResponseBody::max_size + 1, "the body exceeds its limit");
    return result;
}

void check_response(std::string_view stream, const Limits& limits, unsigned seed) {
    const Parsed whole = parse(stream, limits, Chunker(Chunker::Kind::whole));
    for (const Chunker::Kind kind : {Chunker::Kind::bytes, Chunker::Kind::random}) {
        const Parsed parts = parse(stream, limits, Chunker(kind, seed));
        check(parts.outcome == whole.outcome, "the chunks decide about the outcome");
        check_equal(parts.head, whole.head, "the heads differ");
        check_equal(parts.body, whole.body, "the bodies differ");
        check(parts.status == whole.status && parts.body_complete == whole.body_complete, "the results differ");
    }
    if (whole.outcome != ResponseParser::Outcome::response) return;
    check_equal(stream.substr(0, whole.consumed), whole.head, "the head is not what was sent");
    const std::string error = wschat::detail::handshake_response_error(whole.head, key, "one, two");
    if (!error.empty()) return;
    // The rules of RFC 6455 4.1 in other words.
    const wschat::Fields fields(std::string_view(whole.head).substr(whole.head.find('\n') + 1));
    check(whole.status == 101, "a handshake without a 101 is accepted");
    check(fields.find("sec-websocket-accept") == wschat::detail::AcceptKey(key).view(), "a wrong Accept is accepted");
    check(!fields.find("sec-websocket-extensions"), "an extension is accepted that was not offered");
    const std::string_view chosen = fields.find("sec-websocket-protocol").value_or("one");
    check(chosen == "one" || chosen == "two", "a subprotocol is accepted that was not offered");
}

void check_url(std::string_view text) {
    std::string error;
    const auto url = ClientUrl::parse(text, error);
    check(url.has_value() == error.empty(), "a URL without a result needs a sentence");
    const auto base = ClientUrl::parse("wss://a.example/b/c?d", error);
    for (const auto& each : {url, ClientUrl::parse(text, error, &*base)}) {
        if (!each) continue;
        check(!each->host.empty() && each->port > 0 && each->port < 65536, "a URL without a host or a port");
        check(each->target.front() == '/' && each->target.find_first_of(" \r\n#") == std::string::npos,
              "a target that cannot be sent");
        const std::string again = (each->secure ? "wss://" : "ws://") + each->authority() + each->target;
        const auto same = ClientUrl::parse(again, error);
        ClientUrl elsewhere = *each;
        elsewhere.zone.clear();  // it is not sent
        check(same && same->same_server(elsewhere) && same->target == each->target, "a URL is not the same again",
              again);
        const std::string request = wschat::detail::handshake_request(each->authority(), each->target, key);
        const Limits limits;
        RequestParser parser(limits);
        std::size_t consumed = 0;
        check(parser.feed(request, consumed) == RequestParser::Outcome::request && consumed == request.size(),
              "a server would refuse the request", request);
    }
    check(ClientUrl::without_secrets(text).find_first_of("?#") == std::string::npos, "a query is shown");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    InputReader input(data, size);
    const unsigned choice = input.byte();
    check_url(input.counted_bytes());
    Limits limits;
    if ((choice & 1u) != 0) {
        limits.max_request_line = 40;
        limits.max_header_bytes = 200;
        limits.max_header_fields = 5;
    }
    std::string stream(input.remaining_bytes());
    constexpr std::string_view mark = "{accept}";
    for (std::size_t at; (at = stream.find(mark)) != std::string::npos;)
        stream.replace(at, mark.size(), wschat::detail::AcceptKey(key).view());
    check_response(stream, limits, choice);
    return 0;
}
