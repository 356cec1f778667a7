// The policies of section 13: from which pages and through which proxies clients come.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;
using test::contains;
using test::error_of;
using test::repeated;

namespace {

// A request with these header lines, each ended by CR LF.
Request request_with(const std::string& lines, const std::string& host = "chat.example", bool https = false) {
    static const Limits limits;
    RequestParser parser(limits);
    std::size_t consumed = 0;
    const auto outcome = parser.feed("GET / HTTP/1.1\r\nHost: " + host + "\r\n" + lines + "\r\n", consumed);
    REQUIRE(outcome == RequestParser::Outcome::request);
    Request request = parser.take_request();
    RequestAccess::set_connection(request, "127.0.0.1", https);
    return request;
}

IpAddress address(const std::string& text) { return text == "unix" ? IpAddress() : *IpAddress::parse(text); }

bool allowed(const std::vector<std::string>& list, const std::string& origin, const std::string& host = "own.example",
             bool https = false) {
    Site site;
    site.allow_origins(list);
    return site.origin_allowed(origin, request_with("", host, https));
}

std::string refusal(const std::string& origin, const std::string& host, bool https = false) {
    return Site().origin_refusal(origin, request_with("", host, https));
}

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- origins --------------------------------------------------------------------------------------------------------

TEST_CASE("allow_origins() accepts web pages, apps, extensions, and a wildcard for subdomains") {
    const struct {
        std::string allowed, origin;
        bool result;
    } table[] = {
        {"https://chat.example/", "https://chat.example", true},
        {"https://chat.example", "https://chat.example/", true},
        {"wss://chat.example", "https://chat.example", true},
        {"https://chat.example", "WSS://chat.example:443", true},
        {"https://chat.example", "ws://chat.example", false},
        {"capacitor://localhost", "capacitor://localhost", true},
        {"capacitor://localhost", "Capacitor://LOCALHOST/", true},
        {"capacitor://localhost", "ionic://localhost", false},
        {"capacitor://localhost", "http://localhost", false},
        {"capacitor://localhost", "capacitor://localhost.evil.example", false},
        {"ionic://localhost", "ionic://localhost", true},
        {"tauri://localhost", "tauri://localhost", true},
        {"app://.", "app://.", true},
        {"chrome-extension://abcdefghijklmnopabcdefghijklmnop", "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
         true},
        {"chrome-extension://abcdefghijklmnopabcdefghijklmnop", "chrome-extension://abcdefghijklmnopabcdefghijklmnoq",
         false},
        {"moz-extension://*", "moz-extension://5ad5d0b5-2f5e-4a4e-9ef8-4e0f3c9a1c11", true},
        {"moz-extension://*", "chrome-extension://5ad5d0b5-2f5e-4a4e-9ef8-4e0f3c9a1c11", false},
        {"moz-extension://*", "moz-extension://", false},
        {"file://", "file://", true},
        {"file:///", "file://", true},
        {"file://", "file:///", true},
        {"file://", "null", false},
        {"null", "null", true},
        {"null", "file://", false},
        {"null", "http://null", false},
        {"http://null", "null", false},
        {"https://*.chat.example", "https://tea.chat.example", true},
        {"HTTPS://*.Chat.Example:443/", "https://tea.chat.example", true},
        {"https://*.chat.example", "https://milk.tea.chat.example", true},
        {"https://*.chat.example", "https://chat.example", false},
        {"https://*.chat.example", "https://.chat.example", false},
        {"https://*.chat.example", "https://evilchat.example", false},
        {"https://*.chat.example", "https://tea.chat.example.evil.example", false},
        {"https://*.chat.example", "https://evil.example/.chat.example", false},
        {"https://*.chat.example", "https://evil.example#.chat.example", false},
        {"https://*.chat.example", "https://evil.example:80.chat.example", false},
        {"https://*.chat.example", "https://evil.example@tea.chat.example", false},
        {"https://*.chat.example", "http://tea.chat.example", false},
        {"https://*.chat.example", "https://tea.chat.example:8443", false},
        {"https://*.chat.example:8443", "https://tea.chat.example:8443", true},
        {"https://*.chat.example", "https://*.chat.example", false},
        {"*", "https://anywhere.example", true},
        {"*", "null", true},
        {"*", "not an origin", true},
    };
    for (const auto& row : table) {
        CAPTURE(row.allowed);
        CAPTURE(row.origin);
        CHECK(allowed({row.allowed}, row.origin) == row.result);
        CHECK(allowed({"https://other.example", row.allowed}, row.origin) == row.result);
    }
}

TEST_CASE("without allow_origins() only web pages of the server's host are allowed") {
    for (const std::string origin : {"http://own.example", "https://own.example", "ws://own.example",
                                     "wss://own.example", "https://own.example/", "wss://own.example:443/"}) {
        CAPTURE(origin);
        CHECK(allowed({}, origin));
    }
    for (const std::string origin :
         {"null", "file://", "file://own.example", "capacitor://own.example", "chrome-extension://own.example",
          "https://own.example//", "https://own.example/page", "https://tea.own.example", "own.example", ""}) {
        CAPTURE(origin);
        CHECK_FALSE(allowed({}, origin));
    }
    CHECK_FALSE(allowed({}, "null", "null"));
    CHECK_FALSE(allowed({}, "file://", "file"));
}

TEST_CASE("over https a page over http is foreign, even on the server's host, unless it is listed") {
    for (const std::string origin : {"http://own.example", "ws://own.example", "http://own.example:443"}) {
        CAPTURE(origin);
        CHECK_FALSE(allowed({}, origin, "own.example", true));
        CHECK(allowed({origin}, origin, "own.example", true));
    }
    for (const std::string origin : {"https://own.example", "wss://own.example", "https://own.example:443"}) {
        CAPTURE(origin);
        CHECK(allowed({}, origin, "own.example", true));
    }
    CHECK_FALSE(allowed({}, "http://own.example:8443", "own.example:8443", true));
    CHECK(allowed({}, "https://own.example:8443", "own.example:8443", true));
}

TEST_CASE("allow_origins() with an invalid origin is an Error") {
    Server server;
    const std::string invalid[] = {
        // clang-format off
        "", "chat.example", "//chat.example", "https:chat.example", "https://", "https://chat.example/page",
        "https://chat.example//", "https://u@chat.example", "https://chat.example:x", "*.chat.example",
        "https://*chat.example", "https://tea.*.example", "https://*.*.example", "https://**", "https://*:8443",
        "*://chat.example", "://chat.example", "1http://chat.example", "+http://chat.example", "ht tp://chat.example",
        "**",
        // clang-format on
    };
    for (const std::string& origin : invalid) {
        CAPTURE(origin);
        CHECK(contains(error_of([&] { server.allow_origins({origin}); }), "allow_origins: \"" + origin + "\""));
    }
    CHECK(error_of([&] { server.allow_origins({"*", "https://chat.example", "http://127.0.0.1:8080"}); }) == "");
}

TEST_CASE("the sentence of a refused origin says what to configure") {
    CHECK(refusal("https://other.example", "chat.example") ==
          "The origin \"https://other.example\" is refused; allowed: pages of chat.example. To allow this origin, call "
          "allow_origins({\"https://other.example\"}).\n");
    CHECK(refusal("http://chat.example", "chat.example", true) ==
          "The origin \"http://chat.example\" is refused; allowed: https pages of chat.example. To allow this origin, "
          "call allow_origins({\"http://chat.example\"}).\n");
    CHECK(contains(refusal("null", "chat.example"), "allow_origins({\"null\"})"));
    // allow_origins() would refuse it.
    CHECK(refusal("evil", "chat.example") == "The origin \"evil\" is refused; allowed: pages of chat.example.\n");
    CHECK_FALSE(contains(refusal("\x1b[2J\n", "chat.example"), "\x1b"));

    Site site;
    site.allow_origins({"https://*.Chat.example", "null"});
    CHECK(contains(site.origin_refusal("https://chat.example", request_with("")),
                   "allowed: pages of chat.example, https://*.chat.example, null. "));
}

TEST_CASE("if a proxy seems to have replaced the Host, the sentence says how to keep it") {
    const struct {
        std::string origin, host;
        bool hint;
    } table[] = {
        {"https://chat.example", "127.0.0.1:8888", true},
        {"https://chat.example", "10.1.2.3", true},
        {"https://chat.example", "[::1]:8888", true},
        {"https://chat.example", "localhost:8888", true},
        {"https://chat.example", "backend", true},
        {"https://chat.example:8443", "chat.example", true},  // proxy_set_header Host $host
        {"https://chat.example", "chat.example:8443", false},
        {"https://chat.example", "other.example", false},
        {"http://localhost:3000", "127.0.0.1:8888", false},  // a page of a program on the same machine
        {"http://127.0.0.1:3000", "localhost:8888", false},
        {"capacitor://localhost", "127.0.0.1:8888", false},
        {"null", "127.0.0.1:8888", false},
        {"", "127.0.0.1:8888", false},
    };
    for (const auto& row : table) {
        CAPTURE(row.origin);
        CAPTURE(row.host);
        const std::string sentence = refusal(row.origin, row.host);
        CHECK(contains(sentence, "proxy_set_header Host $http_host;") == row.hint);
        CHECK(contains(sentence, "The Host is \"" + row.host + "\"") == row.hint);
    }
}

// ---- proxies --------------------------------------------------------------------------------------------------------

TEST_CASE("an address is read in all forms that proxies write") {
    const struct {
        std::string text, address;  // empty: not an address
    } table[] = {
        {"203.0.113.7", "203.0.113.7"},
        {"203.0.113.7:51234", "203.0.113.7"},
        {"203.0.113.7:_8f3a", "203.0.113.7"},
        {"\"203.0.113.7\"", "203.0.113.7"},
        {"\"203.0.113.7:51234\"", "203.0.113.7"},
        {"2001:db8::7", "2001:db8::7"},
        {"[2001:db8::7]", "2001:db8::7"},
        {"[2001:db8::7]:443", "2001:db8::7"},
        {"\"[2001:DB8::7]:443\"", "2001:db8::7"},
        {"\"[2001:db8::7]:_port\"", "2001:db8::7"},
        {"::ffff:203.0.113.7", "203.0.113.7"},
        {"[::ffff:203.0.113.7]:443", "203.0.113.7"},
        {"::1", "::1"},
        {"", ""},
        {"\"\"", ""},
        {"\"", ""},
        {"unknown", ""},
        {"_hidden", ""},
        {"_SEVKISEK:443", ""},
        {"unix:", ""},
        {"203.0.113", ""},
        {"203.0.113.7:", ""},
        {"203.0.113.7:65536", ""},
        {"203.0.113.7:x", ""},
        {"203.0.113.7:_", "203.0.113.7"},
        {"203.0.113.7:_ x", ""},
        {"203.0.113.7:-1", ""},
        {"203.0.113.7 ", ""},
        {"\"203.0.113.7", ""},
        {"[203.0.113.7]", ""},
        {"[203.0.113.7]:443", ""},
        {"[2001:db8::7", ""},
        {"2001:db8::7]", ""},
        {"[2001:db8::7]443", ""},
        {"[2001:db8::7]:", ""},
        {"[]", ""},
        {"[]:443", ""},
        {"chat.example", ""},
        {std::string(4096, '1'), ""},
        {std::string("203.0.113.7\0", 12), ""},
    };
    for (const auto& row : table) {
        CAPTURE(row.text);
        const auto parsed = parse_hop(row.text);
        CHECK(parsed.has_value() == !row.address.empty());
        if (parsed) CHECK(parsed->to_string() == row.address);
    }
}

TEST_CASE("a client has the address and the scheme that its trusted proxies report") {
    struct Row {
        std::string headers, address, scheme, unreadable;
    };
    const Row rows[] = {
        {"", "10.0.0.1", "http", ""},
        // X-Forwarded-For: from the right, the first that is not trusted.
        {"X-Forwarded-For: 203.0.113.7:51234\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: [2001:db8::7]:443\r\n", "2001:db8::7", "http", ""},
        {"X-Forwarded-For: \"203.0.113.7\"\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 192.0.2.1, 203.0.113.7\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 192.0.2.1, 203.0.113.7:1, 10.1.1.1:2\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 192.0.2.1,203.0.113.7\r\nX-Forwarded-For: 10.1.1.1\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 203.0.113.7,, ,\r\nX-Forwarded-For: ,\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 10.2.2.2, 10.1.1.1\r\n", "10.2.2.2", "http", ""},
        {"X-Forwarded-For: 203.0.113.7\r\nX-Other: 192.0.2.1\r\nx-forwarded-for: 10.1.1.1\r\n", "203.0.113.7", "http",
         ""},
        // What is not an address ends the search.
        {"X-Forwarded-For: unknown\r\n", "10.0.0.1", "http", "unknown"},
        {"X-Forwarded-For: 203.0.113.7, unix:\r\n", "10.0.0.1", "http", "unix:"},
        {"X-Forwarded-For: 203.0.113.7, x, 10.1.1.1\r\n", "10.1.1.1", "http", "x"},
        {"X-Forwarded-For: x, 203.0.113.7\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: \"x, 203.0.113.7\r\n", "203.0.113.7", "http", ""},
        // The scheme that belongs to the last address that was read.
        {"X-Forwarded-Proto: https\r\n", "10.0.0.1", "https", ""},
        {"X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: HTTPS\r\n", "203.0.113.7", "https", ""},
        {"X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: wss\r\n", "203.0.113.7", "https", ""},
        {"X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: ws\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: h2\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https, http\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-For: 203.0.113.7, 10.1.1.1\r\nX-Forwarded-Proto: https, http\r\n", "203.0.113.7", "https", ""},
        {"X-Forwarded-For: 203.0.113.7, 10.1.1.1\r\nX-Forwarded-Proto: https\r\n", "203.0.113.7", "https", ""},
        {"X-Forwarded-For: 10.1.1.1\r\nX-Forwarded-Proto: https, http\r\n", "10.1.1.1", "http", ""},
        // Forwarded (RFC 7239).
        {"Forwarded: for=203.0.113.7\r\n", "203.0.113.7", "http", ""},
        {"Forwarded: for=203.0.113.7;proto=https;by=10.0.0.1\r\n", "203.0.113.7", "https", ""},
        {"Forwarded: By=10.0.0.1 ; FOR=203.0.113.7 ; Proto=\"HTTPS\"\r\n", "203.0.113.7", "https", ""},
        {"Forwarded: for=\"[2001:db8::7]:4711\";proto=http\r\n", "2001:db8::7", "http", ""},
        {"Forwarded: for=192.0.2.1, for=203.0.113.7\r\n", "203.0.113.7", "http", ""},
        {"Forwarded: for=192.0.2.1\r\nForwarded: for=203.0.113.7;proto=https, for=10.1.1.1;proto=http\r\n",
         "203.0.113.7", "https", ""},
        {"Forwarded: for=\"_a, for=192.0.2.1\", for=\"203.0.113.7:_x\"\r\n", "203.0.113.7", "http", ""},
        {"Forwarded: for=203.0.113.7;secret=\"a\\\", for=192.0.2.1;\\\\\"\r\n", "203.0.113.7", "http", ""},
        {"Forwarded: for=203.0.113.7;secret=\"\\\\\"\r\n", "203.0.113.7", "http", ""},
        // A client wrote what is on the left, and opened a quote.
        {"Forwarded: for=\", for=203.0.113.7\r\n", "203.0.113.7", "http", ""},
        {"Forwarded: for=\"\\, for=\"[2001:db8::7]\";proto=https\r\n", "2001:db8::7", "https", ""},
        // Hidden, absent or malformed.
        {"Forwarded: for=unknown;proto=https\r\n", "10.0.0.1", "https", "for=unknown;proto=https"},
        {"Forwarded: for=_hidden\r\n", "10.0.0.1", "http", "for=_hidden"},
        {"Forwarded: for=_hidden, for=10.1.1.1\r\n", "10.1.1.1", "http", "for=_hidden"},
        {"Forwarded: proto=https\r\n", "10.0.0.1", "https", "proto=https"},
        {"Forwarded: for=203.0.113.7\"\r\n", "10.0.0.1", "http", "for=203.0.113.7\""},
        {"Forwarded: 203.0.113.7\r\n", "10.0.0.1", "http", "203.0.113.7"},
        {"Forwarded: \r\n", "10.0.0.1", "http", ""},
        // Forwarded counts only alone.
        {"Forwarded: for=192.0.2.1;proto=https\r\nX-Forwarded-For: 203.0.113.7\r\n", "203.0.113.7", "http", ""},
        {"X-Forwarded-Proto: http\r\nForwarded: for=192.0.2.1;proto=https\r\n", "10.0.0.1", "http", ""},
    };
    Site site;
    site.trust_proxies({"10.0.0.0/8", "unix"});
    for (const Row& row : rows) {
        CAPTURE(row.headers);
        const Request request = request_with(row.headers);
        const ForwardedClient client = site.client(address("10.0.0.1"), request, false);
        CHECK(client.address.to_string() == row.address);
        CHECK(client.scheme == row.scheme);
        CHECK(client.unreadable == row.unreadable);

        // From a peer that is not trusted the headers mean nothing.
        const ForwardedClient stranger = site.client(address("203.0.113.9"), request, false);
        CHECK(stranger.address == address("203.0.113.9"));
        CHECK(stranger.scheme == "http");
        CHECK(stranger.unreadable.empty());
        CHECK(site.client(address("203.0.113.9"), request, true).scheme == "https");
        CHECK(site.client(IpAddress(), request, false).scheme == row.scheme);
    }
}

TEST_CASE("a proxy that connects with TLS can report a client without TLS") {
    Site site;
    site.trust_proxies({"10.0.0.1"});
    CHECK(site.client(address("10.0.0.1"), request_with(""), true).scheme == "https");
    CHECK(site.client(address("10.0.0.1"), request_with("X-Forwarded-Proto: http\r\n"), true).scheme == "http");
    CHECK(site.client(address("10.0.0.1"), request_with("X-Forwarded-Proto: ?\r\n"), true).scheme == "https");
}

TEST_CASE("a long list of proxies is read up to the first address that is not trusted") {
    Site site;
    site.trust_proxies({"10.0.0.0/8"});
    for (const std::string name : {"X-Forwarded-For: ", "Forwarded: for="}) {
        const std::string separator = name.front() == 'X' ? "," : ",for=";
        const std::string list = name + "203.0.113.7" + repeated(500, separator + "10.0.0.1") + "\r\n";
        CHECK(site.client(address("10.0.0.1"), request_with(list), false).address == address("203.0.113.7"));
        const std::string quotes = name + repeated(5000, "\\\"") + "\r\n";
        CHECK(site.client(address("10.0.0.1"), request_with(quotes), false).address == address("10.0.0.1"));
    }
}

TEST_SUITE_END();
