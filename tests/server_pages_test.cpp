// Sections 13 and 14 as an HTTP server, over real sockets: pages, files, folders and refusals.
#include "support.hpp"

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::Answer;
using test::contains;
using test::Echo;
using test::error_of;
using test::fetch;
using test::hex;
using test::large_content;
using test::LogLines;
using test::next_answer;
using test::RawClient;
using test::repeated;
using test::request;
using test::RunningServer;
using test::TemporaryFolder;
namespace fs = std::filesystem;

namespace {

// Reads an answer with this body.
void check_body(RawClient& client, const std::string& body) {
    const Answer answer = next_answer(client);
    CHECK(answer.status == 200);
    CHECK((answer.body == body));
}

// The file of this program. Only Linux has the link; elsewhere the header itself is asked.
fs::path program_file() {
    std::error_code error;
    const fs::path file = fs::read_symlink("/proc/self/exe", error);
    return error ? fs::path(wschat::detail::os::executable_path()) : file;
}

// A server with one page.
struct PageServer : RunningServer {
    PageServer(std::string_view pattern, std::function<Response(const Request&)> page) {
        server.get(pattern, std::move(page));
        start();
    }
};

// A server with one file at "/".
struct FileServer : RunningServer {
    explicit FileServer(const std::string& path) {
        server.file("/", path);
        start();
    }
};

// Answers with the parameter "name" of the path.
Response name_of_path(const Request& r) { return Response(200, std::string(r.param("name"))); }

Response hello(const Request&) { return Response(200, "hello"); }

// A server with a large file at "/large" and a page at "/".
struct LargeFileServer : RunningServer {
    LargeFileServer() {
        server.file("/large", folder.write("large.bin", content));
        server.get("/", hello);
        server.get("/{name}", name_of_path);
        start();
    }
    const TemporaryFolder folder;
    const std::string content = large_content();
};

// RFC 6455 4.1: the headers of a handshake.
const std::string key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const std::string version = "Sec-WebSocket-Version: 13\r\n";
std::string upgrade(std::string_view headers, std::string_view request_line = "GET / HTTP/1.1") {
    return std::string(request_line) + "\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
           std::string(headers) + "\r\n";
}

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- pages ----------------------------------------------------------------------------------------------------------

TEST_CASE("a page is the answer of its function, with its headers and its length") {
    RunningServer running;
    running.server.get("/", [](const Request&) {
        Response response = Response::html("<p>Hello</p>");
        response.set_header("Set-Cookie", "a=1").set_header("Set-Cookie", "b=2");
        return response;
    });
    running.start();
    const Answer answer = fetch(running.port(), "/");
    CHECK(answer.head.substr(0, 17) == "HTTP/1.1 200 OK\r\n");
    CHECK(answer.body == "<p>Hello</p>");
    CHECK(answer.header("content-type") == "text/html; charset=utf-8");
    CHECK(answer.header("content-length") == "12");
    CHECK(answer.header("x-content-type-options") == "nosniff");
    CHECK(answer.header("date").size() == std::string("Sun, 06 Nov 1994 08:49:37 GMT").size());
    CHECK(contains(answer.head, "\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"));
    CHECK(answer.header("connection") == "keep-alive");
}

TEST_CASE("a page knows the parameters of its path, of its query and its cookies") {
    RunningServer running;
    running.server.get("/users/{name}/{rest...}", [](const Request& r) {
        return Response(200, std::string(r.param("name")) + "|" + std::string(r.param("rest")) + "|" +
                                 r.query("q").value_or("-") + "|" + std::string(r.cookie("id").value_or("-")));
    });
    running.start();
    CHECK(fetch(running.port(), "/users/Anna%20B/x/y?q=a+b", "Cookie: id=7\r\n").body == "Anna B|x/y|a b|7");
    CHECK(fetch(running.port(), "/users/Anna/").body == "Anna||-|-");
}

TEST_CASE("the status and the body of a page arrive unchanged") {
    RunningServer running;
    running.server.get("/json", [](const Request&) { return Response::json(Json{{"a", 1}}, 201); });
    running.server.get("/redirect", [](const Request&) { return Response::redirect("/json", 303); });
    running.server.get("/empty", [](const Request&) { return Response(204); });
    running.server.get("/gone", [](const Request&) { return Response(410, "Gone.\n"); });
    running.start();
    RawClient client(running.port());
    client.send(request("/json") + request("/redirect") + request("/empty") + request("/gone"));
    const Answer json = next_answer(client);
    CHECK(json.status == 201);
    CHECK(json.body == "{\"a\":1}");
    CHECK(json.header("content-type") == "application/json");
    const Answer redirect = next_answer(client);
    CHECK(redirect.status == 303);
    CHECK(redirect.header("location") == "/json");
    CHECK(redirect.header("content-length") == "0");
    // RFC 9110 8.6: "A server MUST NOT send a Content-Length header field in any response with a status code of 1xx
    // (Informational) or 204 (No Content)."
    const Answer empty = next_answer(client);
    CHECK(empty.status == 204);
    CHECK(empty.header("content-length") == "");
    CHECK(next_answer(client).status == 410);
}

TEST_CASE("an exception in a page is a 500 without its text, and the server continues") {
    LogLines log;
    RunningServer running;
    log.attach_to(running.server);
    running.server.get("/", [](const Request&) -> Response { throw std::runtime_error("the database is down"); });
    running.server.get("/hello", hello);
    running.start();
    const Answer answer = fetch(running.port(), "/");
    CHECK(answer.status == 500);
    CHECK_FALSE(answer.body.empty());
    CHECK_FALSE(contains(answer.body, "database"));
    CHECK(fetch(running.port(), "/hello").status == 200);
    CHECK(running.metrics().handler_exceptions == 1);
    running.stop();
    CHECK(log.has("error exception in=\"page\" what=\"the database is down\" peer=\"127.0.0.1\" path=\"/\""));
}

TEST_CASE("an exception in a page that is not a std::exception is a 500 too") {
    RunningServer running;
    running.server.get("/", [](const Request&) -> Response { throw 42; });
    running.server.get("/hello", hello);
    running.start();
    CHECK(fetch(running.port(), "/").status == 500);
    CHECK(fetch(running.port(), "/hello").status == 200);
}

TEST_CASE("the answer to HEAD is the head of the answer to GET") {
    TemporaryFolder folder;
    RunningServer running;
    running.server.get("/page", hello);
    running.server.file("/file", folder.write("a.txt", "0123456789"));
    running.start();
    for (const std::string target : {"/page", "/file", "/nothing"}) {
        CAPTURE(target);
        const Answer get = fetch(running.port(), target);
        RawClient client(running.port());
        client.send(request(target, "", "HEAD") + request("/page", "Connection: close\r\n"));
        const Answer head = next_answer(client, true);
        CHECK(head.status == get.status);
        for (const char* name : {"content-length", "content-type", "etag", "last-modified"}) {
            CAPTURE(std::string(name));
            CHECK(head.header(name) == get.header(name));
        }
        // The next answer follows at once, without a body before it.
        const Answer next = next_answer(client);
        CHECK(next.status == 200);
        CHECK(next.body == "hello");
    }
}

TEST_CASE("each refusal of a HEAD has no body") {
    // RFC 9110 9.3.2: "the server MUST NOT send content in the response".
    RunningServer running;
    running.server.get("/page", hello);
    running.server.get("/throws", [](const Request&) -> Response { throw std::runtime_error("no"); });
    running.server.route<Echo>("/");
    running.server.allow_hosts({"x"});
    running.start();
    const struct {
        std::string what, request;
        int status;
    } table[] = {
        {"an exception", request("/throws", "", "HEAD"), 500},
        {"a large body", request("/page", "Content-Length: 1048577\r\n", "HEAD"), 413},
        {"another host", "HEAD /page HTTP/1.1\r\nHost: y\r\n\r\n", 421},
        {"an upgrade", upgrade(key + version, "HEAD / HTTP/1.1"), 405},
        {"no route", upgrade(key + version, "HEAD /nothing HTTP/1.1"), 404},
    };
    for (const auto& row : table) {
        CAPTURE(row.what);
        RawClient client(running.port());
        client.send(row.request);
        CHECK(client.read_to_end());
        CHECK(next_answer(client, true).status == row.status);
        CHECK(client.received == "");
    }
}

TEST_CASE("a connection stays open for more requests, until one asks to close it") {
    PageServer running("/{name}", name_of_path);
    RawClient client(running.port());
    for (int i = 0; i < 50; ++i) {
        client.send(request("/" + std::to_string(i)));
        REQUIRE(next_answer(client).body == std::to_string(i));
    }
    CHECK(running.metrics().connections_accepted == 1);
    client.send(request("/last", "Connection: close\r\n"));
    const Answer last = next_answer(client);
    CHECK(last.body == "last");
    CHECK(last.header("connection") == "close");
    CHECK(client.read_to_end());
    CHECK(client.received == "");
}

TEST_CASE("an HTTP/1.0 request gets its page, and the connection ends") {
    PageServer running("/", hello);
    RawClient client(running.port());
    client.send("GET / HTTP/1.0\r\n\r\n");
    CHECK(client.read_to_end());
    const Answer answer = next_answer(client);
    CHECK(answer.body == "hello");
    CHECK(answer.header("connection") == "close");
}

TEST_CASE("a peer that has shut down its sending side still gets the whole answer") {
    TemporaryFolder folder;
    const std::string content = large_content();
    FileServer running(folder.write("large.bin", content));
    RawClient client(running.port());
    client.send(request("/"));
    client.shutdown_send();
    check_body(client, content);
    CHECK(client.read_to_end());
}

// ---- pipelining -----------------------------------------------------------------------------------------------------

TEST_CASE("pipelined requests are answered in order, also with large files between them") {
    LargeFileServer running;
    RawClient client(running.port());
    client.send(request("/1") + request("/large") + request("/2") + request("/large", "", "HEAD") + request("/3") +
                request("/large") + request("/4"));
    CHECK(next_answer(client).body == "1");
    check_body(client, running.content);
    CHECK(next_answer(client).body == "2");
    CHECK(next_answer(client, true).header("content-length") == std::to_string(running.content.size()));
    CHECK(next_answer(client).body == "3");
    check_body(client, running.content);
    CHECK(next_answer(client).body == "4");
}

TEST_CASE("a thousand pipelined requests are answered for every size of the pieces") {
    PageServer running("/{name}", name_of_path);
    std::string all;
    for (int i = 0; i < 1000; ++i) all += request("/" + std::to_string(i));
    for (const std::size_t piece : {all.size(), std::size_t{4096}, std::size_t{777}}) {
        CAPTURE(piece);
        RawClient client(running.port());
        for (std::size_t at = 0; at < all.size(); at += piece) client.send(std::string_view(all).substr(at, piece));
        for (int i = 0; i < 1000; ++i) REQUIRE(next_answer(client).body == std::to_string(i));
    }
}

TEST_CASE("a request after one that asks to close is not answered") {
    RunningServer running;
    std::atomic<int> calls{0};
    running.server.get("/", [&](const Request&) {
        ++calls;
        return Response(200, "hello");
    });
    running.start();
    RawClient client(running.port());
    client.send(request("/") + request("/", "Connection: close\r\n") + request("/"));
    CHECK(client.read_to_end());
    CHECK(next_answer(client).status == 200);
    CHECK(next_answer(client).status == 200);
    CHECK(client.received == "");
    CHECK(calls == 2);
}

// ---- refusals -------------------------------------------------------------------------------------------------------

TEST_CASE("a refusal is a complete answer with a sentence, and bytes after it are never a next request") {
    RunningServer running;
    std::atomic<int> smuggled{0};
    running.server.get("/", hello);
    running.server.get("/second", [&](const Request&) {
        ++smuggled;
        return Response(200, "smuggled");
    });
    running.server.route<Echo>("/");
    running.server.allow_hosts({"x"});
    running.start();
    const std::string get = "GET / HTTP/1.1\r\nHost: x\r\n";
    const struct {
        std::string what, request;
        int status;
        std::string header = {};
    } table[] = {
        // FAULTS 1
        {"upgrade by POST", upgrade(key + version, "POST / HTTP/1.1"), 405, "Allow: GET"},
        {"upgrade by HTTP/1.0", upgrade(key + version, "GET / HTTP/1.0"), 505},
        {"HTTP/2.0", "GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505},
        {"HTTP/0.9", "GET /\r\nHost: x\r\n\r\n", 400},
        // FAULTS 2
        {"no Host", "GET / HTTP/1.1\r\n\r\n", 400},
        {"two Hosts", get + "Host: x\r\n\r\n", 400},
        {"an invalid Host", "GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400},
        {"a host that is not served", "GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421},
        {"an upgrade for such a host", upgrade(key + version, "GET http://evil.example/ HTTP/1.1"), 421},
        // FAULTS 4
        {"no key", upgrade(version), 400},
        {"two keys", upgrade(key + key + version), 400},
        {"a key of 15 bytes", upgrade("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j\r\n" + version), 400},
        {"no version", upgrade(key), 426, "Sec-WebSocket-Version: 13"},
        {"version 8", upgrade(key + "Sec-WebSocket-Version: 8\r\n"), 426, "Sec-WebSocket-Version: 13"},
        // FAULTS 5
        {"space before the colon", get + "A : b\r\n\r\n", 400},
        {"a folded line", get + "A: b\r\n c\r\n\r\n", 400},
        {"NUL in a value", get + std::string("A: b\0c\r\n\r\n", 10), 400},
        {"a bare LF", "GET / HTTP/1.1\nHost: x\n\n", 400},
        {"a bare CR", get + "A: b\rc\r\n\r\n", 400},
        {"a header without a name", get + ": b\r\n\r\n", 400},
        {"a header without a colon", get + "Abc\r\n\r\n", 400},
        // FAULTS 6
        {"a length beside a coding", get + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
        {"two Content-Lengths", get + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 400},
        {"a signed Content-Length", get + "Content-Length: +0\r\n\r\n", 400},
        {"a Content-Length past 64 bits", get + "Content-Length: 99999999999999999999999\r\n\r\n", 400},
        {"a coding that is not implemented", get + "Transfer-Encoding: gzip\r\n\r\n", 501},
        {"a body over max_body", get + "Content-Length: 1048577\r\n\r\nhello", 413},
        {"a chunk over max_body", get + "Transfer-Encoding: chunked\r\n\r\n100001\r\nhello", 413},
        {"a chunk size past 64 bits", get + "Transfer-Encoding: chunked\r\n\r\n10000000000000005\r\nhello\r\n", 413},
        {"a chunk size with a sign", get + "Transfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n", 400},
        {"a chunk that is longer than its size", get + "Transfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
         400},
        {"a chunk size that ends with LF", get + "Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", 400},
        {"a chunk extension of 20 KiB", get + "Transfer-Encoding: chunked\r\n\r\n5;" + std::string(20480, 'a'), 431},
        {"an expectation that is not known", get + "Content-Length: 5\r\nExpect: cake\r\n\r\nhello", 417},
        {"a body for no page", request("/nothing", "Content-Length: 5\r\n", "POST") + "hello", 404},
        {"a body on an upgrade", upgrade(key + version + "Content-Length: 5\r\n") + "hello", 400},
        {"a POST with a body", request("/", "Content-Length: 5\r\n", "POST") + "hello", 405,
         "Allow: GET, HEAD, OPTIONS"},
        // FAULTS 7
        {"a path of 64 KiB", request("/" + std::string(65536, 'a')), 414},
        {"a header of 20 KiB", request("/", "A: " + std::string(20480, 'a') + "\r\n"), 431},
        {"2,000 headers", request("/", repeated(2000, "A: b\r\n")), 431},
        // FAULTS 9
        {"a foreign origin", upgrade(key + version + "Origin: http://evil.example\r\n"), 403},
        {"the origin null", upgrade(key + version + "Origin: null\r\n"), 403},
        {"two origins", upgrade(key + version + "Origin: http://x\r\nOrigin: http://x\r\n"), 400},
        // Other errors
        {"no WebSocket at that path", upgrade(key + version, "GET /nothing HTTP/1.1"), 404},
        {"no method", " / HTTP/1.1\r\nHost: x\r\n\r\n", 400},
        {"a path escape that is malformed", request("/%zz"), 400},
        {"TLS", hex("16 03 01 00 f4 01 00 00 f0 03 03"), 400},
    };
    for (const auto& row : table) {
        CAPTURE(row.what);
        RawClient client(running.port());
        client.send(row.request + request("/second"));
        CHECK(client.read_to_end());
        CHECK_FALSE(client.reset_by_peer);
        const Answer answer = next_answer(client);
        CHECK(answer.status == row.status);
        CHECK(client.received == "");
        CHECK(answer.header("content-type") == "text/plain; charset=utf-8");
        CHECK(contains(answer.header("connection"), "close"));
        REQUIRE(answer.body.size() > 10);
        CHECK(answer.body.substr(answer.body.size() - 2) == ".\n");
        if (!row.header.empty()) CHECK(contains(answer.head, "\r\n" + row.header + "\r\n"));
    }
    CHECK(smuggled == 0);
}

TEST_CASE("a refusal says what to configure: a proxy without upgrades, an HTTP/1.0 proxy, an unexpected PROXY header") {
    const std::string handshake = key + version;
    RunningServer running;
    LogLines log;
    log.attach_to(running.server);
    running.server.route<Echo>("/chat");
    running.start();
    const struct {
        std::string request;
        int status;
        std::string hint;
    } table[] = {
        {request("/chat", handshake), 426, "\"proxy_set_header Upgrade $http_upgrade;\""},
        {request("/chat", handshake + "Connection: close\r\n"), 426, "\"proxy_set_header Connection upgrade;\""},
        {request("/chat", handshake + "Connection: close\r\nUpgrade: websocket\r\n"), 426, "upgrade=websocket"},
        {upgrade(handshake, "GET /chat HTTP/1.0"), 505, "\"proxy_http_version 1.1;\""},
        {"PROXY TCP4 192.0.2.7 198.51.100.2 56324 443\r\n" + request("/chat"), 400, "ListenOptions::proxy_protocol"},
        {"PROXY UNKNOWN\r\n" + request("/chat"), 400, "ListenOptions::proxy_protocol"},
        {hex("0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a 20 00 00 00") + request("/chat"), 400,
         "ListenOptions::proxy_protocol"},
    };
    for (const auto& row : table) {
        CAPTURE(row.request);
        RawClient client(running.port());
        client.send(row.request);
        const Answer answer = next_answer(client);
        CHECK(answer.status == row.status);
        CHECK(contains(answer.body, row.hint));
    }
    // A browser that opens the path of a WebSocket is no mistake of a proxy.
    const Answer page = fetch(running.port(), "/chat");
    CHECK(page.status == 426);
    CHECK_FALSE(contains(page.body, "proxy"));
    running.stop();
    // Whole, although it is long.
    CHECK(log.has("info refused status=\"426\" peer=\"127.0.0.1\" path=\"/chat\" sentence=\"The handshake has no"));
    CHECK(log.has("in Apache \\x22ProxyPass ... upgrade=websocket\\x22.\""));
    CHECK(log.has("info refused status=\"505\""));
    CHECK(std::count_if(log.lines.begin(), log.lines.end(),
                        [](const std::string& line) { return contains(line, "refused"); }) == 4);
}

TEST_CASE("a refused request with correct syntax leaves the connection open for the next") {
    RunningServer running;
    running.server.get("/", hello);
    running.server.route<Echo>("/chat");
    running.start();
    RawClient client(running.port());
    client.send(request("/nothing") + request("/", "", "DELETE") + request("/chat") + request("*", "", "OPTIONS") +
                request("/"));
    const Answer missing = next_answer(client);
    CHECK(missing.status == 404);
    CHECK(contains(missing.body, ".\n"));
    const Answer method = next_answer(client);
    CHECK(method.status == 405);
    CHECK(method.header("allow") == "GET, HEAD, OPTIONS");
    const Answer upgrade_wanted = next_answer(client);
    CHECK(upgrade_wanted.status == 426);
    CHECK(upgrade_wanted.header("upgrade") == "websocket");
    CHECK(upgrade_wanted.header("connection") == "Upgrade, keep-alive");
    CHECK(upgrade_wanted.header("sec-websocket-version") == "13");
    const Answer options = next_answer(client);
    CHECK(options.status == 204);
    CHECK(options.header("allow") == "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
    CHECK(next_answer(client).body == "hello");
}

TEST_CASE("only the tokens upgrade and websocket together request an upgrade") {
    // FAULTS 3
    RunningServer running;
    running.server.get("/", hello);
    running.server.route<Echo>("/");
    running.start();
    const struct {
        std::string headers;
        int status;
    } table[] = {
        {"Upgrade: websocket\r\nConnection: Upgrade\r\n", 101},
        {"Upgrade: WebSocket\r\nConnection: keep-alive, upgrade\r\n", 101},
        {"Upgrade: h2c, websocket\r\nConnection: keep-alive\r\nConnection: Upgrade\r\n", 101},
        {"Upgrade: websocket\r\nConnection: noupgradeplease\r\n", 200},
        {"Upgrade: websockets\r\nConnection: Upgrade\r\n", 200},
        {"Upgrade: websocket\r\n", 200},
        {"Connection: Upgrade\r\n", 200},
        {"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n", 200},
    };
    for (const auto& row : table) {
        CAPTURE(row.headers);
        CHECK(fetch(running.port(), "/", row.headers + key + version).status == row.status);
    }
}

// ---- files ----------------------------------------------------------------------------------------------------------

TEST_CASE("a file is served with its type, its length, its date and its tag") {
    TemporaryFolder folder;
    FileServer running(folder.write("chat.html", "<p>Hello</p>"));
    const Answer answer = fetch(running.port(), "/");
    CHECK(answer.status == 200);
    CHECK(answer.body == "<p>Hello</p>");
    CHECK(answer.header("content-type") == "text/html; charset=utf-8");
    CHECK(answer.header("content-length") == "12");
    CHECK(answer.header("cache-control") == "no-cache");
    const std::string etag = answer.header("etag");
    CHECK(etag.size() > 2);
    CHECK(etag.front() == '"');
    CHECK(etag.back() == '"');
    CHECK(answer.header("last-modified").substr(3, 2) == ", ");
    CHECK(fetch(running.port(), "/").header("etag") == etag);
}

TEST_CASE("an empty file is an empty page") {
    TemporaryFolder folder;
    FileServer running(folder.write("empty.txt", ""));
    const Answer answer = fetch(running.port(), "/");
    CHECK(answer.status == 200);
    CHECK(answer.header("content-length") == "0");
}

TEST_CASE("a client that has the current file gets a 304, and its tag goes before its date") {
    // RFC 9110 13.1.2, 13.1.3
    TemporaryFolder folder;
    FileServer running(folder.write("a.txt", "content"));
    const Answer first = fetch(running.port(), "/");
    const std::string tag = first.header("etag"), date = first.header("last-modified");
    const std::string old = "Sun, 06 Nov 1994 08:49:37 GMT";
    const struct {
        std::string headers;
        int status;
    } table[] = {
        {"If-None-Match: " + tag, 304},
        {"If-None-Match: W/" + tag, 304},
        {"If-None-Match: \"x\", " + tag + ", \"y\"", 304},
        {"If-None-Match: *", 304},
        {"If-None-Match: \"x\"", 200},
        {"If-None-Match: " + tag.substr(1), 200},
        {"If-Modified-Since: " + date, 304},
        {"If-Modified-Since: " + old, 200},
        {"If-Modified-Since: yesterday", 200},
        {"If-None-Match: \"x\"\r\nIf-Modified-Since: " + date, 200},
        {"If-None-Match: " + tag + "\r\nIf-Modified-Since: " + old, 304},
    };
    for (const auto& row : table) {
        CAPTURE(row.headers);
        RawClient client(running.port());
        client.send(request("/", row.headers + "\r\n") + request("/"));
        const Answer answer = next_answer(client, row.status == 304);
        CHECK(answer.status == row.status);
        CHECK(answer.header("etag") == tag);
        // A 304 has no body. The next answer follows at once.
        CHECK(next_answer(client).body == "content");
    }
}

TEST_CASE("a changed file is served with another tag") {
    TemporaryFolder folder;
    FileServer running(folder.write("a.txt", "before"));
    const std::string tag = fetch(running.port(), "/").header("etag");
    folder.write("a.txt", "after it");
    const Answer answer = fetch(running.port(), "/", "If-None-Match: " + tag + "\r\n");
    CHECK(answer.status == 200);
    CHECK(answer.body == "after it");
    CHECK(answer.header("etag") != tag);
}

TEST_CASE("a missing file is an Error at set-up, and a 404 later") {
    TemporaryFolder folder;
    RunningServer running;
    const std::string path = (folder / "a.txt").string();
    CHECK(error_of([&] { running.server.file("/", path); }) ==
          "file \"/\": " + path + ": No such file or directory (ENOENT)");
    CHECK(contains(error_of([&] { running.server.file("/", "/tmp"); }), "file \"/\": /tmp: Is a directory (EISDIR)"));
    CHECK(contains(error_of([&] { running.server.file("/", ""); }), "file \"/\": "));
    // A relative path may be in two folders.
    CHECK(error_of([&] { running.server.file("/", "no/such/page.html"); }) ==
          "file \"/\": no/such/page.html: No such file or directory (ENOENT); looked in " +
              fs::current_path().string() + " and in the folder of " + program_file().string());
    folder.write("a.txt", "here");
    running.server.file("/", path);
    running.start();
    CHECK(fetch(running.port(), "/").status == 200);
    fs::remove(path);
    CHECK(fetch(running.port(), "/").status == 404);
    folder.write("a.txt", "back");
    CHECK(fetch(running.port(), "/").body == "back");
}

TEST_CASE("a relative path starts at the working directory at the time of file()") {
    TemporaryFolder folder;
    folder.write("page.txt", "of the working directory");
    const fs::path before = fs::current_path();
    fs::current_path(folder / "");
    RunningServer running;
    running.server.file("/", "page.txt");
    fs::current_path(before);
    running.start();
    CHECK(fetch(running.port(), "/").body == "of the working directory");
}

TEST_CASE("a relative path that is not below the working directory starts at the folder of the program") {
    const std::string name = "wschat-test-page-" + std::to_string(::getpid()) + ".txt";
    const fs::path beside_program = program_file().parent_path() / name;
    std::ofstream(beside_program) << "beside the program";
    TemporaryFolder folder;
    const fs::path before = fs::current_path();
    fs::current_path(folder / "");
    RunningServer running;
    const std::string error = error_of([&] { running.server.file("/", name); });
    fs::current_path(before);
    CHECK(error == "");
    running.start();
    CHECK(fetch(running.port(), "/").body == "beside the program");
    fs::remove(beside_program);
}

TEST_CASE("beside() returns a path in the folder of another file, where the file does not have to exist") {
    CHECK(beside("/src/examples/chat.cpp", "chat.html") == "/src/examples/chat.html");
    CHECK(beside("chat.cpp", "chat.html") == "chat.html");
    CHECK(beside("C:\\src\\chat.cpp", "chat.html") == "C:\\src\\chat.html");
}

TEST_CASE("beside() returns a path in the folder of the program if the file is only there") {
    const std::string name = "wschat-test-beside-" + std::to_string(::getpid()) + ".txt";
    const fs::path beside_program = program_file().parent_path() / name;
    std::ofstream(beside_program) << "beside the program";
    TemporaryFolder folder;
    CHECK(beside("/no/such/folder/chat.cpp", name) == beside_program.string());
    CHECK(beside("no/such/folder/chat.cpp", name) == beside_program.string());
    folder.write(name, "beside the source");
    CHECK(beside((folder / "chat.cpp").string(), name) == (folder / name).string());
    fs::remove(beside_program);
}

TEST_CASE("a large file goes to a slow reader piece by piece, and other clients do not wait") {
    LargeFileServer running;
    RawClient slow(running.port());
    slow.send(request("/large"));
    REQUIRE(running.eventually([&] { return running.server.metrics().bytes_sent > 100'000; }));
    for (int i = 0; i < 100; ++i) {
        REQUIRE(fetch(running.port(), "/").body == "hello");
        REQUIRE(running.metrics().backlog_bytes < 1024 * 1024);
    }
    while (slow.received.size() < running.content.size() && slow.read_some()) {
        REQUIRE(running.metrics().backlog_bytes < 1024 * 1024);
    }
    check_body(slow, running.content);
}

TEST_CASE("if a file becomes shorter while it is sent, the connection ends before Content-Length") {
    TemporaryFolder folder;
    const std::string path = folder.write("large.bin", large_content());
    ServerOptions options;
    options.limits.handshake_timeout = Duration::zero();  // never
    RunningServer running(options);
    running.server.file("/", path);
    running.start();
    RawClient client(running.port());
    client.send(request("/"));
    REQUIRE(running.eventually([&] { return running.server.metrics().bytes_sent > 100'000; }));
    fs::resize_file(path, 0);
    CHECK(client.read_to_end());
    CHECK(contains(client.received, "Content-Length: 20971520\r\n"));
    CHECK(client.received.size() < 20'971'520);
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
}

TEST_CASE("a reader that disconnects in the middle of a file releases all resources") {
    const auto descriptors = [] {
        return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
    };
    TemporaryFolder folder;
    FileServer running(folder.write("large.bin", large_content()));
    const auto before = descriptors();
    for (int i = 0; i < 20; ++i) {
        RawClient client(running.port());
        client.send(request("/"));
        REQUIRE(client.read_at_least(1000));
        if (i % 2 == 0) client.reset();
    }
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
    CHECK(running.metrics().backlog_bytes == 0);
    CHECK(descriptors() == before);
}

// ---- folders --------------------------------------------------------------------------------------------------------

TEST_CASE("the files of a folder are served by name, with the content type of the extension") {
    TemporaryFolder folder;
    const struct {
        std::string name, target, type;
    } table[] = {
        {"index.html", "/", "text/html; charset=utf-8"},
        {"index.html", "/index.html", "text/html; charset=utf-8"},
        {"sub/index.html", "/sub/", "text/html; charset=utf-8"},
        {"sub/style.css", "/sub/style.css", "text/css; charset=utf-8"},
        {"app.js", "/app.js?version=2", "text/javascript; charset=utf-8"},
        {"app.mjs", "/app.mjs", "text/javascript; charset=utf-8"},
        {"data.json", "/data.json", "application/json"},
        {"icon.svg", "/icon.svg", "image/svg+xml"},
        {"photo.JPG", "/photo.JPG", "image/jpeg"},
        {"picture.png", "/picture.png", "image/png"},
        {"favicon.ico", "/favicon.ico", "image/x-icon"},
        {"font.woff2", "/font.woff2", "font/woff2"},
        {"code.wasm", "/code.wasm", "application/wasm"},
        {"notes.txt", "/notes.txt", "text/plain; charset=utf-8"},
        {"archive.tar.xyz", "/archive.tar.xyz", "application/octet-stream"},
        {"README", "/README", "application/octet-stream"},
        {"with space.txt", "/with%20space.txt", "text/plain; charset=utf-8"},
        {"\xC3\xBC.txt", "/%C3%BC.txt", "text/plain; charset=utf-8"},
        {"plus+and&.txt", "/plus+and&.txt", "text/plain; charset=utf-8"},
    };
    for (const auto& row : table) folder.write(row.name, "content of " + row.name);
    for (const std::string prefix : {"/", "/files", "/files/"}) {
        RunningServer running;
        running.server.static_dir(prefix, folder.path());
        running.start();
        for (const auto& row : table) {
            CAPTURE(prefix);
            CAPTURE(row.target);
            const Answer answer = fetch(running.port(), prefix == "/" ? row.target : "/files" + row.target);
            CHECK(answer.status == 200);
            CHECK(answer.body == "content of " + row.name);
            CHECK(answer.header("content-type") == row.type);
        }
    }
}

TEST_CASE("files of a folder support HEAD and conditional requests") {
    TemporaryFolder folder;
    folder.write("a.txt", "content");
    RunningServer running;
    running.server.static_dir("/", folder.path());
    running.start();
    const std::string tag = fetch(running.port(), "/a.txt").header("etag");
    CHECK(fetch(running.port(), "/a.txt", "If-None-Match: " + tag + "\r\n").status == 304);
    const Answer head = fetch(running.port(), "/a.txt", "", "HEAD");
    CHECK(head.status == 200);
    CHECK(head.header("content-length") == "7");
    CHECK(fetch(running.port(), "/a.txt", "", "PUT").status == 405);
}

TEST_CASE("a path of a folder is redirected to the path with a slash, and a folder is never listed") {
    TemporaryFolder folder;
    folder.write("sub/index.html", "index");
    folder.write("bare/a.txt", "a");
    RunningServer running;
    running.server.static_dir("/files", folder.path());
    running.start();
    const Answer answer = fetch(running.port(), "/files/sub");
    CHECK(answer.status == 301);
    CHECK(answer.header("location") == "/files/sub/");
    CHECK(fetch(running.port(), "/files/sub/").body == "index");
    CHECK(fetch(running.port(), "/files/bare/").status == 404);
    CHECK(fetch(running.port(), "/files/").status == 404);
}

TEST_CASE("only regular files inside of a folder that are not hidden are served") {
    // FAULTS 41
    TemporaryFolder folder;
    folder.write("secret.txt", "secret");
    folder.write("www/index.html", "index");
    folder.write("www/a.txt", "a");
    folder.write("www/sub/b.txt", "b");
    folder.write("www/.hidden", "secret");
    folder.write("www/.git/config", "secret");
    folder.write("www/sub/.hidden", "secret");
    fs::create_symlink(folder / "secret.txt", folder / "www/link.txt");
    fs::create_symlink(folder / "www/a.txt", folder / "www/inside.txt");
    fs::create_directory_symlink(folder / "", folder / "www/link");
    REQUIRE(::mkfifo((folder / "www/fifo").c_str(), 0600) == 0);
    RunningServer running;
    const ListenSocket socket(ListenAddress::parse("unix:" + (folder / "www/socket").string()), false);
    running.server.static_dir("/", (folder / "www").string());
    running.start();
    for (const std::string target : {"/../secret.txt",
                                     "/%2e%2e/secret.txt",
                                     "/%2E./secret.txt",
                                     "/..%2fsecret.txt",
                                     "/..%2Fsecret.txt",
                                     "/sub/../../secret.txt",
                                     "/sub/%2e%2e/%2e%2e/secret.txt",
                                     "/sub/../a.txt",
                                     "/..\\secret.txt",
                                     "/%5c..%5csecret.txt",
                                     "/..%5csecret.txt",
                                     "//a.txt",
                                     "///a.txt",
                                     "/sub//b.txt",
                                     "//etc/passwd",
                                     "/%2fetc%2fpasswd",
                                     "//host/..",
                                     "//host/%2e%2e",
                                     "//sub",
                                     "/%2fsub",
                                     "/%00",
                                     "/a.txt%00",
                                     "/a.txt%00.html",
                                     "/sub%00/b.txt",
                                     "/link.txt",
                                     "/inside.txt",
                                     "/link",
                                     "/link/",
                                     "/link/secret.txt",
                                     "/link/www/a.txt",
                                     "/fifo",
                                     "/fifo/",
                                     "/socket",
                                     "/.hidden",
                                     "/.git/config",
                                     "/.git",
                                     "/.git/",
                                     "/sub/.hidden",
                                     "/.",
                                     "/./a.txt",
                                     "/sub/.",
                                     "/a.txt/",
                                     "/a.txt/b",
                                     "/a.txt.",
                                     "/a.txt%20",
                                     "/a.txt::$DATA",
                                     "/c:/a.txt",
                                     "/missing",
                                     "/missing/",
                                     "/sub/",
                                     "/%",
                                     "/%2",
                                     "/a%zz",
                                     "http://x/../secret.txt",
                                     "http://x//etc/passwd"}) {
        CAPTURE(target);
        const Answer answer = fetch(running.port(), target);
        CHECK((answer.status == 404 || answer.status == 400));
        CHECK(answer.header("location") == "");
        CHECK_FALSE(contains(answer.body, "secret"));
    }
}

TEST_CASE("a link that stays inside of a folder is followed if that is allowed") {
    // As Kubernetes mounts a ConfigMap: a switch of "..data" replaces all files at once.
    TemporaryFolder folder;
    folder.write("secret.txt", "secret");
    folder.write("www/..first/index.html", "first");
    folder.write("www/..second/index.html", "second");
    fs::create_directory_symlink("..first", folder / "www/..data");
    fs::create_symlink("..data/index.html", folder / "www/index.html");
    fs::create_symlink("../secret.txt", folder / "www/out.txt");
    fs::create_directory_symlink("..", folder / "www/up");
    fs::create_symlink("loop", folder / "www/loop");
    fs::create_symlink("nothing", folder / "www/dangling");
    RunningServer running;
    running.server.static_dir("/inside", (folder / "www").string(), {}, SymbolicLinks::inside);
    running.server.static_dir("/short", (folder / "www").string(), SymbolicLinks::inside);
    running.server.static_dir("/refuse", (folder / "www").string());
    running.start();
    CHECK(fetch(running.port(), "/inside/").body == "first");
    CHECK(fetch(running.port(), "/short/").body == "first");
    fs::create_directory_symlink("..second", folder / "www/..new");
    fs::rename(folder / "www/..new", folder / "www/..data");
    CHECK(fetch(running.port(), "/inside/index.html").body == "second");
    for (const std::string target : {"/inside/out.txt", "/inside/up/secret.txt", "/inside/up", "/inside/loop",
                                     "/inside/dangling", "/inside/..data/index.html", "/refuse/index.html"}) {
        CAPTURE(target);
        CHECK(fetch(running.port(), target).status == 404);
    }
}

TEST_CASE("a missing folder, or one that is not a folder, is an Error at set-up") {
    TemporaryFolder folder;
    const std::string file = folder.write("a.txt", "a"), missing = (folder / "missing").string();
    Server server;
    CHECK(error_of([&] { server.static_dir("/", missing); }) == "static_dir \"/\": " + missing + " is not a folder");
    CHECK(error_of([&] { server.static_dir("/", file); }) == "static_dir \"/\": " + file + " is not a folder");
    CHECK(error_of([&] { server.static_dir("/", "/dev/null"); }) == "static_dir \"/\": /dev/null is not a folder");
    CHECK(contains(error_of([&] { server.static_dir("files", folder.path()); }), "static_dir \"files"));
}

TEST_CASE("an empty pattern for a folder is an Error") {
    TemporaryFolder folder;
    Server server;
    std::string error;
    try {
        server.static_dir("", folder.path());
    } catch (const Error& expected) {
        error = expected.what();
    } catch (const std::exception& other) {
        error = std::string("not an Error: ") + other.what();
    }
    CHECK(contains(error, "static_dir \""));
}

TEST_CASE("a page wins over a folder with the same path, and an inner folder wins over an outer one") {
    TemporaryFolder outer, inner;
    outer.write("a.txt", "outer");
    outer.write("in/a.txt", "outer");
    inner.write("a.txt", "inner");
    RunningServer running;
    running.server.static_dir("/", outer.path());
    running.server.static_dir("/in", inner.path());
    running.server.get("/hello", hello);
    running.start();
    CHECK(fetch(running.port(), "/hello").body == "hello");
    CHECK(fetch(running.port(), "/a.txt").body == "outer");
    CHECK(fetch(running.port(), "/in/a.txt").body == "inner");
}

TEST_CASE("an allowed host without a port is served on every port, and one with a port only on that port") {
    RunningServer running;
    running.server.allow_hosts({"Chat.Example", "game.example:8080", "[::1]"});
    running.server.get("/", hello);
    running.start();
    const struct {
        std::string host;
        int status;
    } table[] = {
        {"chat.example", 200}, {"CHAT.EXAMPLE:8888", 200}, {"game.example:8080", 200},
        {"game.example", 421}, {"game.example:8081", 421}, {"[::1]", 200},
        {"[::1]:8888", 200},   {"evil.example", 421},      {"evil.chat.example", 421},
    };
    for (const auto& row : table) {
        CAPTURE(row.host);
        RawClient client(running.port());
        client.send("GET / HTTP/1.1\r\nHost: " + row.host + "\r\n\r\n");
        CHECK(next_answer(client).status == row.status);
    }
}

TEST_CASE("a shutdown finishes the answer that is being sent, answers the next request, and no other") {
    LargeFileServer running;
    RawClient client(running.port());
    client.send(request("/large") + request("/next") + request("/large"));
    REQUIRE(running.eventually([&] { return running.server.metrics().bytes_sent > 100'000; }));
    running.server.shutdown(test::deadline);
    running.on_loop([] {});  // the shutdown has begun
    check_body(client, running.content);
    const Answer last = next_answer(client);
    CHECK(last.body == "next");
    CHECK(last.header("connection") == "close");
    CHECK(client.read_to_end());
    CHECK(client.received == "");
}

TEST_CASE("a file is a 503 while no descriptor is free, and is served again later") {
    TemporaryFolder folder;
    RunningServer running;
    running.server.file("/", folder.write("a.txt", "here"));
    running.server.static_dir("/folder", folder.path());
    running.start();
    RawClient client(running.port());
    client.send(request("/"));
    REQUIRE(next_answer(client).body == "here");
    rlimit before{};
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
    static_cast<void>(os::error_text(EMFILE));  // loads now what the first error text needs
    const int next = ::dup(0);
    ::close(next);
    const rlimit none{static_cast<rlim_t>(next), before.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
    client.send(request("/") + request("/folder/a.txt"));
    const Answer file = next_answer(client), below = next_answer(client);
    ::setrlimit(RLIMIT_NOFILE, &before);
    CHECK(file.status == 503);
    CHECK(below.status == 503);
    CHECK(file.body == "The server is full.\n");
    client.send(request("/"));
    CHECK(next_answer(client).body == "here");
}

TEST_CASE("a path with a colon is not searched in the folder of the program") {
    RunningServer running;
    CHECK(contains(error_of([&] { running.server.file("/", "no:such.html"); }), "file \"/\": no:such.html: "));
}

TEST_CASE("a fast reader gets a whole large file while other clients connect and disconnect") {
    LargeFileServer running;
    std::atomic<bool> reading{true};
    bool whole = false;
    std::thread reader([&] {
        whole = fetch(running.port(), "/large").body == running.content;
        reading = false;
    });
    while (reading) {
        RawClient visitor(running.port());
        visitor.send(request("/"));
        CHECK(next_answer(visitor).body == "hello");
    }
    reader.join();
    CHECK(whole);
}

TEST_CASE("names that Windows reads as devices are recognized, with any extension") {
    using wschat::detail::is_windows_device;
    for (const char* name : {"CON", "con", "prn", "AUX", "NUL", "nul.txt", "NUL .tar.gz", "COM1", "com0", "LPT9.log",
                             "CONIN$", "conout$", "COM\xC2\xB9", "LPT\xC2\xB3.txt"}) {
        CAPTURE(name);
        CHECK(is_windows_device(name));
    }
    for (const char* name : {"", "CONSOLE", "nul-1", "COM", "COM10", "COMA", "xCON", "my.con", "LPT", "auxiliary.html"}) {
        CAPTURE(name);
        CHECK_FALSE(is_windows_device(name));
    }
}

TEST_SUITE_END();
