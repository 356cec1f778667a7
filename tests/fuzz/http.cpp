// RequestParser and the upgrade check: a stream of requests, whole and in pieces, against a reference that looks at the
// whole stream again for each request.
//
// Input: a byte that chooses the limits, one for how the stream is cut, then the stream.
#include "fuzz.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;
using wschat::Limits;
using wschat::Request;
using wschat::detail::RequestParser;
using wschat::detail::wants_upgrade;
using wschat::Response;

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

// ---- the reference --------------------------------------------------------------------------------------------------

// What the front of a stream is: not whole (0), a request (200), or the status that it is refused with.
struct Verdict {
    int status = 0;
    std::size_t size = 0;  // of the request
    std::string method, target, path, query, host;
    bool http_1_0 = false, body = false;
    FieldList fields;
};

int judge_request_line(std::string_view line, Verdict& verdict) {
    const std::vector<std::string> words = split(line, ' ');
    if (words[0].empty() || !only(words[0], token_characters)) return 400;
    if (words.size() != 3 || words[1].empty()) return 400;
    for (const char c : words[1])
        if (c <= 0x20 || c >= 0x7F || c == '#') return 400;
    const std::string& version = words[2];
    if (version.size() != 8 || version.substr(0, 5) != "HTTP/" || !only(version.substr(5, 1), digits) ||
        version[6] != '.' || !only(version.substr(7, 1), digits))
        return 400;
    if (version[5] != '1') return 505;
    verdict.http_1_0 = version[7] == '0';
    verdict.method = words[0];
    std::string path = verdict.target = words[1];
    for (const std::string scheme : {"http://", "https://"}) {
        if (lower(path.substr(0, scheme.size())) != scheme) continue;
        const std::size_t end = (std::min)(path.find_first_of("/?", scheme.size()), path.size());
        verdict.host = path.substr(scheme.size(), end - scheme.size());
        if (!good_host(verdict.host)) return 400;
        path = path.substr(end);
        break;
    }
    if (verdict.host.empty() && path[0] != '/' && path != "*" && verdict.method != "CONNECT") return 400;
    verdict.path = path.substr(0, path.find('?'));
    verdict.query = path.find('?') == std::string::npos ? "" : path.substr(path.find('?') + 1);
    if (!good_escapes(verdict.path)) return 400;
    if (verdict.path.empty()) verdict.path = "/";
    return 0;
}

int judge_field(std::string_view line, Verdict& verdict) {
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos || colon == 0 || !only(line.substr(0, colon), token_characters)) return 400;
    for (const char c : line.substr(colon + 1))
        if ((c >= 0 && c < 0x20 && c != '\t') || c == 0x7F) return 400;
    verdict.fields.emplace_back(line.substr(0, colon), trim(line.substr(colon + 1)));
    return 0;
}

int judge_head(Verdict& verdict) {
    const auto hosts = values_of(verdict.fields, "host"), lengths = values_of(verdict.fields, "content-length"),
               codings = values_of(verdict.fields, "transfer-encoding");
    if (hosts.size() > 1 || (hosts.empty() && !verdict.http_1_0)) return 400;
    if (!hosts.empty() && !good_host(hosts[0])) return 400;
    if (verdict.host.empty() && !hosts.empty()) verdict.host = hosts[0];
    if (lengths.size() + codings.size() > 1) return 400;
    if (!lengths.empty() && !number_up_to(lengths[0], INT64_MAX)) return 400;
    if (!codings.empty() && verdict.http_1_0) return 400;
    if (!codings.empty() && lower(codings[0]) != "chunked") return 501;
    verdict.body = !codings.empty() || (!lengths.empty() && !only(lengths[0], "0"));
    return 200;
}

Verdict judge(std::string_view stream, const Limits& limits) {
    Verdict verdict;
    const auto refused = [&](int status) { return verdict.status = status, verdict; };
    const bool skipped = stream.substr(0, 2) == "\r\n";
    std::size_t at = skipped ? 2 : 0, fields_begin = 0;
    if (at < stream.size() && token_characters.find(stream[at]) == std::string::npos && stream[at] != '\r' &&
        stream[at] != '\n')
        return refused(400);
    for (;;) {
        const std::size_t end = stream.find('\n', at), first = at;
        const bool whole = end != std::string_view::npos;
        std::string_view line = stream.substr(at, whole ? end - at : end);
        if (!whole && line.empty()) return verdict;
        at += line.size() + 1;
        const bool cr = !line.empty() && line.back() == '\r';
        if (cr) line.remove_suffix(1);
        // A line is counted with what is before it; its own end is free.
        const std::size_t size = first + line.size() - (fields_begin != 0 ? fields_begin : skipped ? 2 : 0);
        if (fields_begin == 0 && size > limits.max_request_line) return refused(414);
        if (fields_begin != 0 && size > limits.max_header_bytes) return refused(431);
        if (!whole) return verdict;
        if (!cr) return refused(400);
        if (fields_begin == 0) {
            if (const int status = judge_request_line(line, verdict)) return refused(status);
            fields_begin = at;
        } else if (line.empty()) {
            verdict.size = at;
            return refused(judge_head(verdict));
        } else {
            if (verdict.fields.size() == limits.max_header_fields) return refused(431);
            if (const int status = judge_field(line, verdict)) return refused(status);
        }
    }
}

// RFC 6455 4.2.1.
int judge_upgrade(const Verdict& request) {
    const auto versions = values_of(request.fields, "sec-websocket-version"),
               keys = values_of(request.fields, "sec-websocket-key");
    if (request.method != "GET") return 405;
    if (request.http_1_0) return 505;
    if (request.body) return 400;
    if (versions != std::vector<std::string>{"13"}) return 426;
    if (keys.size() != 1 || keys[0].size() != 24 || keys[0].substr(22) != "==" ||
        !only(keys[0].substr(0, 22), digits + letters + "+/"))
        return 400;
    for (const std::string& protocol : elements_of(request.fields, "sec-websocket-protocol"))
        if (!only(protocol, token_characters)) return 400;
    return 101;
}

// ---- what is held against it ----------------------------------------------------------------------------------------

std::string described(const Verdict& request) {
    std::string text = request.method + " [" + request.target + "] [" + request.path + "] [" + request.query + "] [" +
                       request.host + "]" + (request.http_1_0 ? " 1.0" : " 1.1") + (request.body ? " body" : "");
    for (const auto& [name, value] : request.fields) text += " " + name + "=[" + value + "]";
    return text + "\n";
}
std::string described(const Request& request) {
    Verdict same;
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

// What becomes of the stream: the requests, and how it ends.
std::string expected(std::string_view stream, const Limits& limits, std::vector<Verdict>& requests) {
    std::string text;
    for (;;) {
        Verdict verdict = judge(stream, limits);
        if (verdict.status != 200) return text + std::to_string(verdict.status);
        text += described(verdict);
        stream.remove_prefix(verdict.size);
        requests.push_back(std::move(verdict));
    }
}

std::string outcome(std::string_view stream, const Limits& limits, Cutter cutter, std::vector<Request>* requests) {
    constexpr int documented[] = {400, 414, 431, 501, 505};
    RequestParser parser(limits);
    std::string text;
    for (std::size_t done = 0; done < stream.size();) {
        Exact piece(stream.substr(done, cutter.next(stream.size() - done)));
        done += piece.size();
        for (std::string_view left = piece.view(); !left.empty();) {
            std::size_t consumed = 0;
            const RequestParser::Outcome got = parser.feed(left, consumed);
            check(consumed <= left.size(), "more is consumed than there is");
            left.remove_prefix(consumed);
            if (got == RequestParser::Outcome::need_more) {
                check(left.empty(), "the parser needs more and has left some");
            } else if (got == RequestParser::Outcome::request) {
                Request request = parser.take_request();
                check(!parser.started(), "a request that was taken is still begun");
                text += described(request);
                if (requests != nullptr) requests->push_back(std::move(request));
            } else {
                const int status = parser.status();
                check(std::count(std::begin(documented), std::end(documented), status) == 1,
                      "a refusal has a status that is not documented", std::to_string(status));
                check(!parser.reason().empty() && parser.reason().back() == '.', "a refusal has no sentence");
                check(parser.feed("GET / HTTP/1.1\r\nHost: a\r\n\r\n", consumed) == RequestParser::Outcome::failure &&
                          consumed == 0 && parser.status() == status,
                      "a parser that has failed takes more");
                return text + std::to_string(status);
            }
        }
    }
    return text + "0";
}

// What the parser keeps is at most twice what a head may have.
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
    check(most <= 2 * (limits.max_request_line + limits.max_header_bytes + 8) + 200, "the parser keeps too much",
          std::to_string(most));
}

void check_upgrade(const Request& request, const Verdict& same) {
    check(wants_upgrade(request) ==
              (has_element(same.fields, "upgrade", "websocket") && has_element(same.fields, "connection", "upgrade")),
          "whether an upgrade is wanted is answered wrongly");
    const int status = judge_upgrade(same);
    const std::optional<Response> refusal = wschat::detail::reject_upgrade(request);
    check((refusal ? refusal->status() : 101) == status, "an upgrade is refused with another status",
          std::to_string(refusal ? refusal->status() : 101) + " and not " + std::to_string(status));
    if (refusal) {
        check(!refusal->body().empty() && refusal->body().back() == '\n', "a refusal has no sentence");
        const auto has = [&](std::string_view name) {
            return std::any_of(refusal->headers().begin(), refusal->headers().end(),
                               [&](const auto& header) { return header.first == name; });
        };
        check(has("Allow") == (status == 405) && has("Sec-WebSocket-Version") == (status == 426),
              "a refusal lacks a header");
        return;
    }
    const auto offered = wschat::detail::offered_subprotocols(request);
    const std::string_view chosen = offered.empty() ? "" : offered.back();
    std::string list;
    for (const std::string_view name : offered) (list += list.empty() ? "" : ",") += name;
    const std::string_view key = request.header("sec-websocket-key");
    check(wschat::detail::handshake_response_error(wschat::detail::switching_protocols(key, chosen), key, list).empty(),
          "a client would not take the 101");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Choices choices(data, size);
    const Limits limits = limits_of(choices.byte());
    const unsigned seed = choices.byte();
    const std::string_view stream = choices.rest();

    std::vector<Verdict> verdicts;
    std::vector<Request> requests;
    const std::string wanted = expected(stream, limits, verdicts);
    check_same(outcome(stream, limits, Cutter(Cutter::Kind::whole), &requests), wanted, "a stream is read differently");
    check_same(outcome(stream, limits, Cutter(Cutter::Kind::bytes), nullptr), wanted,
               "byte by byte it is read differently");
    check_same(outcome(stream, limits, Cutter(Cutter::Kind::random, seed), nullptr), wanted,
               "in pieces it is read differently");
    for (std::size_t i = 0; i < requests.size(); ++i) check_upgrade(requests[i], verdicts[i]);
    check_memory(stream, limits);
    return 0;
}
