// Values of headers and of settings: lists, cookies, queries, origins, hosts, addresses, paths, responses. Nothing
// throws except a documented Error, results lie within the input, and each rule has a reference.
//
// Input: two lines, each ended by LF, and the remaining bytes. Each check uses them as names, patterns, blocks of
// addresses and so on.
#include "fuzz.hpp"
#include "reference.hpp"

namespace {

using namespace fuzz;

// The result of a call, or nothing if it throws an Error. Any other exception is a find.
template <class Make>
auto try_make(Make make) -> std::optional<decltype(make())> {
    try {
        return make();
    } catch (const wschat::Error& error) {
        check(error.what()[0] != '\0', "an Error has no text");
        return std::nullopt;
    }
}

std::optional<Request> request_with(std::string_view target, const std::string& lines,
                                    wschat::detail::HandshakeFields* fields = nullptr) {
    static const wschat::Limits limits;
    RequestParser parser(limits);
    std::size_t consumed = 0;
    const std::string head = "GET " + std::string(target) + " HTTP/1.1\r\nHost: a\r\n" + lines + "\r\n";
    if (parser.feed(head, consumed) != RequestParser::Outcome::request || consumed != head.size()) return std::nullopt;
    if (fields != nullptr) *fields = parser.handshake();
    return parser.take_request();
}

// ---- header fields -------------------------------------------------------------------------------------------------

FieldList lines_of(std::string_view text) {
    FieldList fields;
    for (std::string line : split(text, '\n')) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        if (line.empty()) break;
        const std::size_t colon = line.find(':');
        if (colon != std::string::npos) fields.emplace_back(line.substr(0, colon), trim(line.substr(colon + 1)));
    }
    return fields;
}

// Reads any bytes as header lines.
void check_fields(std::string_view text) {
    const wschat::Fields fields(text);
    const FieldList expected = lines_of(text);
    FieldList found;
    fields.each([&](std::string_view name, std::string_view value) {
        check(within(name, text) && within(value, text), "a field lies outside the input");
        found.emplace_back(name, value);
        return true;
    });
    check(found == expected, "the fields differ from the reference", text);
    for (const auto& [name, value] : expected) {
        const std::vector<std::string> values = values_of(expected, lower(name));
        check(fields.count(name) == values.size() && fields.find(name) == values[0], "find() or count() is wrong",
              name);
        const std::vector<std::string> elements = elements_of(expected, lower(name));
        std::vector<std::string> seen;
        fields.each_element(name, [&](std::string_view element) {
            check(within(element, text), "an element lies outside the input");
            seen.emplace_back(element);
        });
        check(seen == elements, "the elements of a list differ from the reference", value);
        for (const std::string& element : elements)
            check(fields.has_element(lower(name), lower(element)), "an element of a list is not found", element);
    }
    check(!fields.has_element("no-such-name", text), "an element of a missing list is found");
}

// RFC 6265 4.2.1.
void check_cookies(const std::string& first, const std::string& second) {
    const auto request = request_with("/", "Cookie: " + first + "\r\nX: 1\r\ncookie: " + second + "\r\n");
    if (!request) return;
    FieldList cookies;
    for (const std::string& value : {first, second})
        for (const std::string& pair : split(trim(value), ';')) {
            const std::size_t equals = (std::min)(pair.find('='), pair.size());
            std::string content = trim(std::string_view(pair).substr((std::min)(equals + 1, pair.size())));
            if (content.size() > 1 && content.front() == '"' && content.back() == '"')
                content = content.substr(1, content.size() - 2);
            cookies.emplace_back(trim(std::string_view(pair).substr(0, equals)), content);
        }
    for (const auto& [name, value] : cookies) {
        if (name.empty()) continue;
        const auto found = request->cookie(name);
        const auto same_name = [&, &key = name](const auto& cookie) { return cookie.first == key; };
        check(found == std::find_if(cookies.begin(), cookies.end(), same_name)->second, "a cookie has a wrong value",
              name);
    }
    check(!request->cookie("no;such=name"), "a missing cookie is found");
}

// Lists of extensions and of subprotocols cause a rejection only if an element is not a token.
void check_lists(const std::string& list) {
    wschat::detail::HandshakeFields fields;
    const auto request = request_with("/",
                                      "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                                      "Sec-WebSocket-Extensions: " +
                                          list + "\r\nSec-WebSocket-Protocol: " + list + "\r\n",
                                      &fields);
    if (!request) return;
    const std::vector<std::string> names = elements_of({{"list", list}}, "list");
    const bool tokens =
        std::all_of(names.begin(), names.end(), [](const auto& n) { return contains_only(n, token_characters); });
    const auto rejection = wschat::detail::reject_upgrade(*request, fields);
    check(rejection.has_value() == !tokens, "a list is accepted or rejected wrongly", list);
    const auto offered = wschat::detail::offered_subprotocols(*request);
    check(std::equal(offered.begin(), offered.end(), names.begin(), names.end()),
          "the offered subprotocols differ from the reference", list);
}

// ---- targets -------------------------------------------------------------------------------------------------------

void check_escapes(const std::string& text) {
    for (const bool plus : {false, true}) {
        const auto decoded = wschat::text::percent_decode(text, plus);
        check(decoded.has_value() == valid_escapes(text), "escapes are accepted or rejected wrongly", text);
        if (decoded) check_equal(*decoded, unescaped(text, plus), "escapes are decoded wrongly");
    }
    std::string escaped;
    for (const char c : text) {
        char code[4];
        std::snprintf(code, sizeof code, "%%%02x", static_cast<unsigned>(static_cast<unsigned char>(c)));
        escaped += code;
    }
    check(wschat::text::percent_decode(escaped) == text, "escaping and decoding changes the text", text);
}

void check_query(const std::string& query) {
    const auto request = request_with("/?" + query, "");
    if (!request) return;
    FieldList pairs;
    for (const std::string& pair : split(query, '&')) {
        const std::size_t equals = (std::min)(pair.find('='), pair.size());
        const std::string key = pair.substr(0, equals), value = pair.substr((std::min)(equals + 1, pair.size()));
        if (valid_escapes(key)) pairs.emplace_back(unescaped(key, true), value);
    }
    for (const auto& [key, value] : pairs) {
        if (key.empty()) continue;
        const auto same_key = [&, &name = key](const auto& pair) { return pair.first == name; };
        const std::string& first = std::find_if(pairs.begin(), pairs.end(), same_key)->second;
        const auto found = request->query(key);
        check(found.has_value() == valid_escapes(first) && (!found || *found == unescaped(first, true)),
              "a query parameter has a wrong value", key);
    }
}

// The decoded segments of a path.
std::vector<std::string> segments_of(std::string_view path) {
    std::vector<std::string> segments = split(path.substr(1), '/');
    for (std::string& segment : segments) segment = unescaped(segment);
    return segments;
}

// "{name}", "{name...}" or plain text. `good` is false for an invalid segment.
struct Segment {
    std::string name, text;
    bool rest = false, good = true;

    explicit Segment(const std::string& s) : text(s) {
        if (s.size() > 2 && s.front() == '{' && s.back() == '}') {
            name = s.substr(1, s.size() - 2);
            rest = name.size() >= 3 && name.substr(name.size() - 3) == "...";
            if (rest) name.resize(name.size() - 3);
            text.clear();
            good = !name.empty();
        }
        good = good && (name + text).find_first_of("{}?#%") == std::string::npos;
    }
};

// The parameters of a path, or nothing if it does not match.
std::optional<FieldList> matched(const std::vector<Segment>& pattern, const std::vector<std::string>& path) {
    FieldList params;
    for (std::size_t i = 0; i < pattern.size(); ++i) {
        if (i >= path.size()) return std::nullopt;
        if (pattern[i].rest) {
            std::string rest = path[i];
            for (std::size_t k = i + 1; k < path.size(); ++k) rest += "/" + path[k];
            params.emplace_back(pattern[i].name, rest);
            return params;
        }
        if (pattern[i].name.empty() ? pattern[i].text != path[i] : path[i].empty()) return std::nullopt;
        if (!pattern[i].name.empty()) params.emplace_back(pattern[i].name, path[i]);
    }
    return pattern.size() == path.size() ? std::optional<FieldList>(params) : std::nullopt;
}

void check_pattern(const std::string& text, const std::string& path) {
    std::vector<Segment> segments;
    bool good = text.substr(0, 1) == "/";
    for (const std::string& each : split(good ? text.substr(1) : "", '/')) {
        good = good && (segments.empty() || !segments.back().rest);
        segments.emplace_back(each);
        good = good && segments.back().good;
    }
    const auto pattern = try_make([&] { return Pattern("route", text); });
    check(pattern.has_value() == good, "a pattern is accepted or rejected wrongly", text);
    if (!pattern) return;
    const bool matches = pattern->matches(path);
    check(*pattern == Pattern("route", text), "equal patterns do not compare equal", text);
    if (path.substr(0, 1) != "/") return check(!matches, "a path without a slash matches", path);
    if (!valid_escapes(path)) return;  // RequestParser refuses it
    const auto expected = matched(segments, segments_of(path));
    check(matches == expected.has_value(), "matches() is wrong", text + " " + path);
    if (matches)
        check(pattern->params(path) == *expected, "the path parameters differ from the reference", text + " " + path);
}

// ---- origins and hosts ---------------------------------------------------------------------------------------------

struct HostAndPort {
    std::string host;
    unsigned long port = 0;
    bool canonical = true;  // written as a browser writes it
};
HostAndPort parse_authority(const std::string& authority, unsigned long default_port) {
    HostAndPort result{lower(authority), default_port, true};
    const std::size_t colon = authority.rfind(':');
    if (colon == std::string::npos || authority.back() == ']') return result;
    const std::string port = authority.substr(colon + 1);
    result.host.resize(colon);
    result.canonical = !port.empty() && port[0] != '0';
    if (!port.empty()) result.port = std::strtoul(port.c_str(), nullptr, 10);
    return result;
}

// A web origin without its default port, another origin in lower case, or an empty text.
std::string reference_origin(const std::string& origin) {
    std::string scheme = lower(origin.substr(0, origin.find("://"))), host = lower(origin);
    if (host == "null") return host;
    if (host.find("://") == std::string::npos || scheme.empty() || !contains_only(scheme.substr(0, 1), letters) ||
        !contains_only(scheme, letters + digits + "+-."))
        return {};
    host = host.substr(scheme.size() + 3);
    if (!host.empty() && host.back() == '/') host.pop_back();
    if (scheme == "ws" || scheme == "wss") scheme = "http" + scheme.substr(2);
    const std::string standard = scheme == "http" ? ":80" : scheme == "https" ? ":443" : "";
    if (host.empty() ? !standard.empty() : !valid_host(host)) return {};
    const bool has_standard =
        !standard.empty() && host.size() > standard.size() && host.substr(host.size() - standard.size()) == standard;
    return scheme + "://" + host.substr(0, host.size() - (has_standard ? standard.size() : 0));
}

void check_origin(const std::string& origin, const std::string& host) {
    check(wschat::detail::valid_host(host) == valid_host(host), "a host is accepted or rejected wrongly", host);
    const std::string reference = reference_origin(origin);
    const auto normal = wschat::detail::normalized_origin(origin);
    check_equal(normal.value_or(""), reference, "normalized_origin() is wrong");
    if (normal) check(wschat::detail::normalized_origin(*normal) == normal, "normalizing twice changes it", origin);
    const bool same = wschat::detail::same_host(origin, host), secure = wschat::detail::same_host(origin, host, true);
    const std::size_t scheme = reference.substr(0, 7) == "http://" ? 7 : reference.substr(0, 8) == "https://" ? 8 : 0;
    check(secure == (same && scheme == 8), "a page over http is of the same host as one over https", origin);
    if (scheme == 0 || !valid_host(host)) return check(!same, "an invalid origin or host matches", origin + " " + host);
    const unsigned long port = scheme == 7 ? 80 : 443;
    const HostAndPort from = parse_authority(reference.substr(scheme), port), to = parse_authority(host, port);
    const bool equal = from.host == to.host && from.port == to.port;
    if (same) check(equal, "an origin of another host is accepted", origin + " " + host);
    else
        check(!equal || !from.canonical || !to.canonical, "an origin of the same host is rejected",
              origin + " " + host);
}

// Allowed origins: a pattern matches only origins of its scheme whose host ends as the pattern does.
void check_allowed(const std::string& pattern, const std::string& origin) {
    const auto list = try_make([&] {
        wschat::detail::OriginList made;
        made.add("allow_origins", {pattern});
        return made;
    });
    const std::size_t star = pattern.find("://*");
    const std::string reference = reference_origin(origin);
    if (star == std::string::npos || pattern == "*") {
        check(list.has_value() == (pattern == "*" || !reference_origin(pattern).empty()),
              "an origin to allow is accepted or rejected wrongly", pattern);
        const bool expected = pattern == "*" || (!reference.empty() && reference == reference_origin(pattern));
        if (list) check(list->contains(origin) == expected, "an allowed origin is wrong", pattern + " " + origin);
        return;
    }
    if (!list) return;
    const std::string& made = list->list().front();  // "https://*.chat.example"
    const std::string start = made.substr(0, made.find('*')), end = made.substr(made.find('*') + 1);
    const bool expected = reference.size() > start.size() + end.size() && reference.substr(0, start.size()) == start &&
                          reference.substr(reference.size() - end.size()) == end;
    check(list->contains(origin) == expected, "a wildcard is wrong", pattern + " " + origin);
}

// ---- addresses -----------------------------------------------------------------------------------------------------

// The bits of an address as text, or empty for an invalid address. IPv4 mapped into IPv6 counts as IPv4.
std::string bits_of(const std::string& text) {
    unsigned char bytes[16];
    if (text.find('\0') != std::string::npos) return {};
    std::size_t first = 0, last = 4;
    if (::inet_pton(AF_INET, text.c_str(), bytes) != 1) {
        if (::inet_pton(AF_INET6, text.c_str(), bytes) != 1) return {};
        last = 16;
        if (std::string(bytes, bytes + 12) == std::string("\0\0\0\0\0\0\0\0\0\0\xFF\xFF", 12)) first = 12;
    }
    std::string bits;
    for (std::size_t i = first; i < last; ++i)
        for (int bit = 7; bit >= 0; --bit) bits += (bytes[i] >> bit & 1) != 0 ? '1' : '0';
    return bits;
}

void check_address(const std::string& text) {
    const std::string bits = bits_of(text);
    const auto address = IpAddress::parse(text);
    check(address.has_value() == !bits.empty(), "an address is accepted or rejected wrongly", text);
    if (!address) return;
    check(address->bits() == bits.size(), "an address has a wrong number of bits", text);
    check(bits_of(address->to_string()) == bits, "to_string() changes an address", text);
    check(IpAddress::parse(address->to_string()) == *address, "to_string() and parse() change an address", text);
    check(address->prefix(address->bits()) == *address, "the full prefix of an address differs from the address", text);
}

void check_hop(const std::string& text) {
    const std::string bits = bits_of(address_in_hop(text));
    const auto address = wschat::detail::parse_hop(text);
    check(address.has_value() == !bits.empty(), "a hop is accepted or rejected wrongly", text);
    if (address) check(bits_of(address->to_string()) == bits, "a hop has a wrong address", text);
}

// The elements from the right are those from the left in reverse, if quotes are balanced and nothing is escaped.
void check_elements(const std::string& list) {
    const std::string line = "list: " + list + "\r\n";
    wschat::detail::ElementsFromLast elements(wschat::Fields(line), "List");
    std::vector<std::string> found, expected;
    for (std::string_view each = elements.next(); !each.empty(); each = elements.next()) {
        check(within(each, line), "an element lies outside the input");
        found.emplace_back(each);
    }
    if (list.find('\\') != std::string::npos || list.find_first_of("\r\n") != std::string::npos) return;
    const std::vector<std::string> pieces = split(list, '"');
    if (pieces.size() % 2 == 0) return;
    std::string element;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        if (i != 0) element += '"';
        if (i % 2 != 0) element += pieces[i];
        for (std::size_t k = 0; i % 2 == 0 && k < split(pieces[i], ',').size(); ++k) {
            if (k != 0) expected.push_back(trim(std::exchange(element, std::string())));
            element += split(pieces[i], ',')[k];
        }
    }
    expected.push_back(trim(element));
    expected.erase(std::remove(expected.begin(), expected.end(), std::string()), expected.end());
    std::reverse(expected.begin(), expected.end());
    check(found == expected, "the elements from the right are wrong", list);
}

void check_block(const std::string& text, const std::string& address) {
    const std::size_t slash = text.find('/');
    const std::string base = bits_of(text.substr(0, slash)),
                      length = slash == std::string::npos ? "" : text.substr(slash + 1);
    const bool good =
        text == "unix" || (!base.empty() && (slash == std::string::npos || number_up_to(length, base.size())));
    const auto block = try_make([&] { return Cidr(text); });
    check(block.has_value() == good, "a block of addresses is accepted or rejected wrongly", text);
    const auto parsed = IpAddress::parse(address);
    if (!block) return;
    check(block->contains(IpAddress()) == (text == "unix"), "contains() is wrong for a Unix socket", text);
    if (!parsed) return;
    const std::size_t bits = slash == std::string::npos ? base.size() : std::strtoul(length.c_str(), nullptr, 10);
    const std::string of_address = bits_of(address);
    const bool inside =
        text != "unix" && of_address.size() == base.size() && of_address.substr(0, bits) == base.substr(0, bits);
    check(block->contains(*parsed) == inside, "contains() is wrong", text + " " + address);
}

void check_listen_address(const std::string& text) {
    const auto address = try_make([&] { return ListenAddress::parse(text); });
    if (!address) return;
    check(address->port >= 0 && address->port <= 65535, "a port is out of range", text);
    check(!address->host.empty() || !address->unix_path.empty(), "a listen address has no host", text);
    const ListenAddress again = ListenAddress::parse(address->to_string());
    check(again.host == address->host && again.port == address->port && again.unix_path == address->unix_path,
          "to_string() and parse() change a listen address", text);
}

// ---- responses -----------------------------------------------------------------------------------------------------

// A header value cannot begin another line or end the head.
void check_response(const std::string& name, const std::string& value) {
    const auto response = try_make([&] { return Response(200).set_header(name, value); });
    bool control = false;
    for (const char c : value) control = control || (c >= 0 && c < 0x20 && c != '\t') || c == 0x7F;
    const bool ours = lower(name) == "content-length" || lower(name) == "transfer-encoding";
    check(response.has_value() == (!name.empty() && contains_only(name, token_characters) && !control && !ours),
          "a response header is accepted or rejected wrongly", name + ": " + value);
}

void check_handshake_request(const std::string& host, const std::string& target, const std::string& protocols) {
    const auto head = try_make(
        [&] { return wschat::detail::handshake_request(host, target, "dGhlIHNhbXBsZSBub25jZQ==", protocols); });
    if (!head) return;
    check(head->find("\r\n\r\n") == head->size() - 4, "a handshake request has more than one head", *head);
    const std::vector<std::string> lines = split(*head, '\n');
    check(lines.size() == 8u + (protocols.empty() ? 0 : 1), "a value adds a line to a handshake request", *head);
}

// A response with the right Sec-WebSocket-Accept and any other lines is accepted only if it selects what was offered.
void check_handshake_response(const std::string& lines, const std::string& offered) {
    const std::string key = "dGhlIHNhbXBsZSBub25jZQ==";
    const std::string head =
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" +
        lines + "\r\n\r\n";
    const std::string error = wschat::detail::handshake_response_error(head, key, offered);
    const FieldList fields = lines_of(std::string_view(head).substr(head.find('\n') + 1));
    const auto chosen = values_of(fields, "sec-websocket-protocol");
    const std::vector<std::string> names = split(offered, ',');
    const bool was_offered =
        chosen.size() == 1 && !offered.empty() &&
        std::any_of(names.begin(), names.end(), [&](const auto& n) { return trim(n) == chosen[0]; });
    const bool good = values_of(fields, "sec-websocket-accept").size() == 1 &&
                      values_of(fields, "sec-websocket-extensions").empty() && (chosen.empty() || was_offered);
    check(error.empty() == good, "a handshake response is accepted or rejected wrongly", lines);
    check(!wschat::detail::handshake_response_error(lines, key, offered).empty() || lines.size() > 100,
          "arbitrary lines are accepted as a handshake response", lines);
}

void check_not_modified(const std::string& tags) {
    const auto request = request_with("/", "If-None-Match: " + tags + "\r\n");
    if (!request) return;
    bool good = false;
    for (const std::string& tag : elements_of({{"tags", tags}}, "tags"))
        good = good || tag == "*" || tag == "W/*" || tag == "\"1-2\"" || tag == "W/\"1-2\"";
    check(wschat::detail::not_modified(*request, "\"1-2\"", 0) == good, "not_modified() is wrong", tags);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const ExactCopy whole(InputReader(data, size).remaining_bytes());
    const std::string text(whole.view());
    const std::size_t first_end = (std::min)(text.find('\n'), text.size());
    const std::string first = text.substr(0, first_end), after = text.substr((std::min)(first_end + 1, text.size()));
    const std::size_t second_end = (std::min)(after.find('\n'), after.size());
    const std::string second = after.substr(0, second_end),
                      rest = after.substr((std::min)(second_end + 1, after.size()));

    check_fields(whole.view());
    check_cookies(first, second);
    check_lists(first);
    check_escapes(first);
    check_query(first);
    check_pattern(first, second);
    check_origin(first, second);
    check_allowed(first, second);
    check_address(first);
    check_hop(first);
    check_elements(first);
    check_block(first, second);
    check_listen_address(first);
    check_response(first, rest);
    check_handshake_request(first, second, rest);
    check_handshake_response(text, first);
    check_not_modified(first);
    check(wschat::text::parse_unsigned(first, 65535).has_value() == number_up_to(first, 65535),
          "unsigned_number() is wrong", first);
    check(!wschat::detail::content_type(first).empty(), "a file has no content type", first);
    return 0;
}
