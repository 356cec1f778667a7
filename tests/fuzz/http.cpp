// RequestParser and the upgrade check, compared with a reference that reads the whole stream again for each request.
// The stream is given whole and in chunks.
//
// Input: a byte for the limits, a byte for the chunks, then the stream.
#include "fuzz.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;

Limits limits_of(unsigned choice) {
    Limits limits;
    const std::size_t sizes[][3] = {{limits.max_request_line, limits.max_header_bytes, limits.max_header_fields},
                                    {24, 48, 3},
                                    {80, 200, 8},
                                    {8, 16, 1}};
    limits.max_request_line = sizes[choice % 4][0];
    limits.max_header_bytes = sizes[choice % 4][1];
    limits.max_header_fields = sizes[choice % 4][2];
    return limits;
}

// ---- the reference -------------------------------------------------------------------------------------------------

// The first request of a stream: incomplete (0), valid (200), or the status of the rejection.
struct ExpectedRequest {
    int status = 0;
    std::size_t size = 0;  // bytes of the request
    std::string method, target, path, query, host;
    bool http_1_0 = false, body = false;
    FieldList fields;
};

int read_request_line(std::string_view line, ExpectedRequest& result) {
    const std::vector<std::string> words = split(line, ' ');
    if (words[0].empty() || !contains_only(words[0], token_characters)) return 400;
    if (words.size() != 3 || words[1].empty()) return 400;
    for (const char c : words[1])
        if (c <= 0x20 || c >= 0x7F || c == '#') return 400;
    const std::string& version = words[2];
    if (version.size() != 8 || version.substr(0, 5) != "HTTP/" || !contains_only(version.substr(5, 1), digits) ||
        version[6] != '.' || !contains_only(version.substr(7, 1), digits))
        return 400;
    if (version[5] != '1') return 505;
    result.http_1_0 = version[7] == '0';
    result.method = words[0];
    std::string path = result.target = words[1];
    for (const std::string scheme : {"http://", "https://"}) {
        if (lower(path.substr(0, scheme.size())) != scheme) continue;
        const std::size_t end = (std::min)(path.find_first_of("/?", scheme.size()), path.size());
        result.host = path.substr(scheme.size(), end - scheme.size());
        if (!valid_host(result.host)) return 400;
        path = path.substr(end);
        break;
    }
    if (result.host.empty() && path[0] != '/' && path != "*" && result.method != "CONNECT") return 400;
    result.path = path.substr(0, path.find('?'));
    result.query = path.find('?') == std::string::npos ? "" : path.substr(path.find('?') + 1);
    if (!valid_escapes(result.path)) return 400;
    if (result.path.empty()) result.path = "/";
    return 0;
}

int read_field(std::string_view line, ExpectedRequest& result) {
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos || colon == 0 || !contains_only(line.substr(0, colon), token_characters))
        return 400;
    for (const char c : line.substr(colon + 1))
        if ((c >= 0 && c < 0x20 && c != '\t') || c == 0x7F) return 400;
    result.fields.emplace_back(line.substr(0, colon), trim(line.substr(colon + 1)));
    return 0;
}

int check_head(ExpectedRequest& result) {
    const auto hosts = values_of(result.fields, "host"), lengths = values_of(result.fields, "content-length"),
               codings = values_of(result.fields, "transfer-encoding");
    if (hosts.size() > 1 || (hosts.empty() && !result.http_1_0)) return 400;
    if (!hosts.empty() && !valid_host(hosts[0])) return 400;
    if (result.host.empty() && !hosts.empty()) result.host = hosts[0];
    if (lengths.size() + codings.size() > 1) return 400;
    if (!lengths.empty() && !number_up_to(lengths[0], INT64_MAX)) return 400;
    if (!codings.empty() && result.http_1_0) return 400;
    if (!codings.empty() && lower(codings[0]) != "chunked") return 501;
    result.body = !codings.empty() || (!lengths.empty() && !contains_only(lengths[0], "0"));
    return 200;
}

ExpectedRequest read_request(std::string_view stream, const Limits& limits) {
    ExpectedRequest result;
    const auto rejected = [&](int status) { return result.status = status, result; };
    const bool skipped = stream.substr(0, 2) == "\r\n";
    std::size_t at = skipped ? 2 : 0, fields_begin = 0;
    if (at < stream.size() && token_characters.find(stream[at]) == std::string::npos && stream[at] != '\r' &&
        stream[at] != '\n')
        return rejected(400);
    for (;;) {
        const std::size_t end = stream.find('\n', at), first = at;
        const bool whole = end != std::string_view::npos;
        std::string_view line = stream.substr(at, whole ? end - at : end);
        if (!whole && line.empty()) return result;
        at += line.size() + 1;
        const bool cr = !line.empty() && line.back() == '\r';
        if (cr) line.remove_suffix(1);
        // The limit counts a line with the lines before it, without its own line end.
        const std::size_t size = first + line.size() - (fields_begin != 0 ? fields_begin : skipped ? 2 : 0);
        if (fields_begin == 0 && size > limits.max_request_line) return rejected(414);
        if (fields_begin != 0 && size > limits.max_header_bytes) return rejected(431);
        if (!whole) return result;
        if (!cr) return rejected(400);
        if (fields_begin == 0) {
            if (const int status = read_request_line(line, result)) return rejected(status);
            fields_begin = at;
        } else if (line.empty()) {
            result.size = at;
            return rejected(check_head(result));
        } else {
            if (result.fields.size() == limits.max_header_fields) return rejected(431);
            if (const int status = read_field(line, result)) return rejected(status);
        }
    }
}

// RFC 6455 4.2.1.
int upgrade_status(const ExpectedRequest& request) {
    const auto versions = values_of(request.fields, "sec-websocket-version"),
               keys = values_of(request.fields, "sec-websocket-key");
    if (request.method != "GET") return 405;
    if (request.http_1_0) return 505;
    if (request.body) return 400;
    if (versions != std::vector<std::string>{"13"}) return 426;
    if (keys.size() != 1 || keys[0].size() != 24 || keys[0].substr(22) != "==" ||
        !contains_only(keys[0].substr(0, 22), digits + letters + "+/"))
        return 400;
    for (const std::string& protocol : elements_of(request.fields, "sec-websocket-protocol"))
        if (!contains_only(protocol, token_characters)) return 400;
    return 101;
}

// ---- the comparison ------------------------------------------------------------------------------------------------

std::string described(const ExpectedRequest& request) {
    std::string text = request.method + " [" + request.target + "] [" + request.path + "] [" + request.query + "] [" +
                       request.host + "]" + (request.http_1_0 ? " 1.0" : " 1.1") + (request.body ? " body" : "");
    for (const auto& [name, value] : request.fields) text += " " + name + "=[" + value + "]";
    return text + "\n";
}
std::string described(const Request& request) {
    ExpectedRequest same;
    same.method = request.method();
    same.target = request.target();
    same.path = request.raw_path();
    same.query = request.query_string();
    same.host = request.host();
    same.http_1_0 = request.http_1_0();
    same.body = request.has_body();
    request.fields().each([&](std::string_view name, std::string_view value) {
        same.fields.emplace_back(name, value);
        return true;
    });
    return described(same);
}

// The expected requests and the final status of a stream.
std::string expected(std::string_view stream, const Limits& limits, std::vector<ExpectedRequest>& requests) {
    std::string text;
    for (;;) {
        ExpectedRequest result = read_request(stream, limits);
        if (result.status != 200) return text + std::to_string(result.status);
        text += described(result);
        stream.remove_prefix(result.size);
        requests.push_back(std::move(result));
    }
}

using ParsedRequest = std::pair<Request, wschat::detail::HandshakeFields>;

std::string outcome(std::string_view stream, const Limits& limits, Chunker chunker,
                    std::vector<ParsedRequest>* requests) {
    constexpr int documented[] = {400, 414, 431, 501, 505};
    RequestParser parser(limits);
    std::string text;
    for (std::size_t done = 0; done < stream.size();) {
        ExactCopy piece(stream.substr(done, chunker.next_size(stream.size() - done)));
        done += piece.size();
        for (std::string_view left = piece.view(); !left.empty();) {
            std::size_t consumed = 0;
            const RequestParser::Outcome got = parser.feed(left, consumed);
            check(consumed <= left.size(), "the parser consumes more than the input");
            left.remove_prefix(consumed);
            if (got == RequestParser::Outcome::need_more) {
                check(left.empty(), "the parser needs more input but has not consumed all");
            } else if (got == RequestParser::Outcome::request) {
                Request request = parser.take_request();
                check(!parser.started(), "the parser has still started after take_request()");
                text += described(request);
                if (requests != nullptr) requests->emplace_back(std::move(request), parser.handshake());
            } else {
                const int status = parser.status();
                check(std::count(std::begin(documented), std::end(documented), status) == 1,
                      "a rejection has an undocumented status", std::to_string(status));
                check(!parser.reason().empty() && parser.reason().back() == '.', "a rejection has no text");
                check(parser.feed("GET / HTTP/1.1\r\nHost: a\r\n\r\n", consumed) == RequestParser::Outcome::failure &&
                          consumed == 0 && parser.status() == status,
                      "a failed parser accepts more input");
                return text + std::to_string(status);
            }
        }
    }
    return text + "0";
}

// The parser holds at most twice the largest head.
void check_memory(std::string_view stream, const Limits& limits) {
    const std::size_t before = heap.live;
    RequestParser parser(limits);
    std::size_t most = 0;
    for (std::size_t consumed = 0; !stream.empty(); stream.remove_prefix(consumed)) {
        const RequestParser::Outcome got = parser.feed(stream.substr(0, 7), consumed);
        most = (std::max)(most, heap.live - before);
        if (got == RequestParser::Outcome::failure) break;
        if (got == RequestParser::Outcome::request) parser.take_request();
    }
    check(most <= 2 * (limits.max_request_line + limits.max_header_bytes + 8) + 200, "the parser holds too much memory",
          std::to_string(most));
}

void check_upgrade(const ParsedRequest& parsed, const ExpectedRequest& same) {
    const auto& [request, fields] = parsed;
    check(wants_upgrade(fields) ==
              (has_element(same.fields, "upgrade", "websocket") && has_element(same.fields, "connection", "upgrade")),
          "wants_upgrade() is wrong");
    const int status = upgrade_status(same);
    const std::optional<Response> rejection = wschat::detail::reject_upgrade(request, fields);
    check((rejection ? rejection->status() : 101) == status, "an upgrade has a wrong status",
          std::to_string(rejection ? rejection->status() : 101) + " instead of " + std::to_string(status));
    if (rejection) {
        check(!rejection->body().empty() && rejection->body().back() == '\n', "a rejection has no text");
        const auto has = [&](std::string_view name) {
            return std::any_of(rejection->headers().begin(), rejection->headers().end(),
                               [&](const auto& header) { return header.first == name; });
        };
        check(has("Allow") == (status == 405) && has("Sec-WebSocket-Version") == (status == 426),
              "a rejection has a missing or wrong header");
        return;
    }
    const auto offered = wschat::detail::offered_subprotocols(request);
    const std::string_view chosen = offered.empty() ? "" : offered.back();
    std::string list;
    for (const std::string_view name : offered) (list += list.empty() ? "" : ",") += name;
    const std::string_view key = request.header("sec-websocket-key");
    std::string response;
    wschat::detail::switching_protocols(key, chosen, {}, {}, [&](std::initializer_list<std::string_view> parts) {
        response = wschat::text::concat(parts);
    });
    check(wschat::detail::handshake_response_error(response, key, list).empty(), "a client rejects the 101 response");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    InputReader input(data, size);
    const Limits limits = limits_of(input.byte());
    const unsigned seed = input.byte();
    const std::string_view stream = input.remaining_bytes();

    std::vector<ExpectedRequest> expected_requests;
    std::vector<ParsedRequest> requests, requests_in_bytes;
    const std::string expected_text = expected(stream, limits, expected_requests);
    check_equal(outcome(stream, limits, Chunker(Chunker::Kind::whole), &requests), expected_text,
                "the requests differ from the reference");
    check_equal(outcome(stream, limits, Chunker(Chunker::Kind::bytes), &requests_in_bytes), expected_text,
                "the requests differ from the reference if read byte by byte");
    check_equal(outcome(stream, limits, Chunker(Chunker::Kind::random, seed), nullptr), expected_text,
                "the requests differ from the reference if read in chunks");
    for (std::size_t i = 0; i < requests.size(); ++i) {
        check_upgrade(requests[i], expected_requests[i]);
        check_upgrade(requests_in_bytes[i], expected_requests[i]);
    }
    check_memory(stream, limits);
    return 0;
}
