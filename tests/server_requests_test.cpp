// Sections 5, 13 and 14 as a server of small APIs, over real sockets: methods, bodies, forms, cookies, ranges, CORS, and
// answers that come later.
#include "support.hpp"

#include <deque>

using namespace wschat;
using namespace std::chrono_literals;
using test::Answer;
using test::contains;
using test::error_of;
using test::fetch;
using test::is_refusal;
using test::LogLines;
using test::next_answer;
using test::RawClient;
using test::repeated;
using test::request;
using test::RunningServer;
using test::TemporaryFile;
using test::WsClient;

namespace {

// Answers with the method, a space and the body.
Response mirror(const Request& r) { return Response(200, std::string(r.method()) + " " + std::string(r.body())); }

std::string post(std::string_view target, std::string_view body, std::string_view headers = {}) {
    return request(target, "Content-Length: " + std::to_string(body.size()) + "\r\n" + std::string(headers), "POST") +
           std::string(body);
}
std::string chunked(std::string_view target, std::string_view chunks, std::string_view headers = {}) {
    return request(target, "Transfer-Encoding: chunked\r\n" + std::string(headers), "POST") + std::string(chunks);
}

// A thread that uses replies, as a program's pool of threads does.
class Pool {
public:
    ~Pool() { stop(); }
    void submit(std::function<void()> work) {
        const std::lock_guard<std::mutex> lock(mutex_);
        work_.push_back(std::move(work));
        changed_.notify_one();
    }
    void stop() {
        submit(nullptr);
        if (thread_.joinable()) thread_.join();
    }

private:
    void run() {
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [this] { return !work_.empty(); });
            const std::function<void()> work = std::move(work_.front());
            work_.pop_front();
            lock.unlock();
            if (!work) return;
            work();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> work_;
    std::thread thread_{[this] { run(); }};
};

// Replies that pages have taken, for the thread of the test.
class Replies {
public:
    void add(Reply reply) {
        const std::lock_guard<std::mutex> lock(mutex_);
        replies_.push_back(std::move(reply));
    }
    Reply take() {
        Reply reply;
        REQUIRE(test::eventually([&] {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (replies_.empty()) return false;
            reply = std::move(replies_.front());
            replies_.pop_front();
            return true;
        }));
        return reply;
    }

private:
    std::mutex mutex_;
    std::deque<Reply> replies_;
};

// The page "/" takes its Reply and gives it to the test.
struct ReplyServer : RunningServer {
    explicit ReplyServer(ServerOptions options = {}) : RunningServer(std::move(options)) {
        log.attach_to(server);
        server.get("/", [this](const Request&, Reply reply) { replies.add(std::move(reply)); });
        server.get("/now", [](const Request&) { return Response(200, "now"); });
        start();
    }
    ~ReplyServer() { stop(); }
    Replies replies;
    LogLines log;
};

}  // namespace

TEST_SUITE_BEGIN("server");

// ---- methods and bodies ---------------------------------------------------------------------------------------------

TEST_CASE("a page answers each method by a function of its own") {
    RunningServer running;
    running.server.get("/thing", mirror);
    running.server.post("/thing", mirror);
    running.server.put("/thing", mirror);
    running.server.patch("/thing", mirror);
    running.server.del("/thing", mirror);
    running.server.handle("PROPFIND", "/thing", mirror);
    running.start();
    RawClient client(running.port());
    for (const std::string method : {"GET", "POST", "PUT", "PATCH", "DELETE", "PROPFIND"}) {
        CAPTURE(method);
        client.send(request("/thing", "Content-Length: 2\r\n", method) + "hi");
        CHECK(next_answer(client).body == method + " hi");
    }
    client.send(request("/thing", "", "TRACE"));
    const Answer refused = next_answer(client);
    CHECK(refused.status == 405);
    CHECK(refused.header("allow") == "GET, HEAD, POST, PUT, PATCH, DELETE, PROPFIND, OPTIONS");
}

TEST_CASE("a second function for the same method and path is an Error, and so is a name that is not a method") {
    Server server;
    server.get("/a/{x}", mirror);
    server.post("/a/{x}", mirror);
    CHECK(error_of([&] { server.post("/a/{y}", mirror); }) == "page \"/a/{y}\": given twice for POST");
    CHECK(contains(error_of([&] { server.handle("GET /", "/b", mirror); }), "is not a method"));
    CHECK(contains(error_of([&] { server.handle("CONNECT", "/b", mirror); }), "is not a method"));
}

TEST_CASE("a body arrives whole, for each size and each way in which the bytes are cut") {
    RunningServer running;
    running.server.post("/", [](const Request& r) { return Response(200, std::string(r.body())); });
    running.start();
    RawClient client(running.port());
    for (const std::size_t size : {0u, 1u, 100u, 16384u, 65535u, 65536u, 100000u, 1048576u}) {
        CAPTURE(size);
        const std::string body = test::large_content().substr(0, size);
        std::string chunks;
        for (std::size_t at = 0; at < body.size(); at += 5000) {
            const std::string_view chunk = std::string_view(body).substr(at, 5000);
            char head[32];
            std::snprintf(head, sizeof head, "%zX;name=\"value\"\r\n", chunk.size());
            ((chunks += head) += chunk) += "\r\n";
        }
        chunks += "0\r\nTrailer: is discarded\r\n\r\n";
        client.send(post("/", body));
        CHECK((next_answer(client).body == body));
        client.send(chunked("/", chunks));
        CHECK((next_answer(client).body == body));
        // Both in one write, with a request behind them.
        client.send(post("/", body) + chunked("/", chunks) + post("/", "end"));
        CHECK((next_answer(client).body == body));
        CHECK((next_answer(client).body == body));
        CHECK(next_answer(client).body == "end");
    }
    for (const char c : chunked("/", "3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n")) client.send(std::string(1, c));
    CHECK(next_answer(client).body == "abcd");
}

TEST_CASE("a body over the limit is refused before it is read, and the limit itself is accepted") {
    Limits limits;
    limits.max_body = 10;
    RunningServer running(test::with_limits(limits));
    running.server.post("/", mirror);
    running.start();
    const auto status = [&](const std::string& sent) {
        RawClient client(running.port());
        client.send(sent);
        return next_answer(client).status;
    };
    CHECK(status(post("/", "0123456789")) == 200);
    CHECK(status(request("/", "Content-Length: 11\r\n", "POST")) == 413);
    CHECK(status(request("/", "Content-Length: 9223372036854775807\r\n", "POST")) == 413);
    CHECK(status(chunked("/", "5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n")) == 200);
    CHECK(status(chunked("/", "5\r\n01234\r\n6\r\n")) == 413);
    CHECK(status(chunked("/", "ffffffffffffffff\r\n")) == 413);
}

TEST_CASE("the server asks for a body that the client announces with Expect, unless it refuses it") {
    RunningServer running;
    running.server.post("/", mirror);
    running.start();
    RawClient client(running.port());
    client.send(request("/", "Content-Length: 2\r\nExpect: 100-continue\r\n", "POST"));
    REQUIRE(client.read_until("\r\n\r\n"));
    CHECK(client.received == "HTTP/1.1 100 Continue\r\n\r\n");
    client.received.clear();
    client.send("hi");
    CHECK(next_answer(client).body == "POST hi");
    RawClient refused(running.port());
    refused.send(request("/nothing", "Content-Length: 2\r\nExpect: 100-continue\r\n", "POST"));
    CHECK(next_answer(refused).status == 404);
}

TEST_CASE("a body that stops in the middle ends with a 408, and the bytes that it holds are counted") {
    RunningServer running(test::with_handshake_timeout(200ms));
    running.server.post("/", mirror);
    running.start();
    RawClient client(running.port());
    client.send(request("/", "Content-Length: 50000\r\n", "POST") + std::string(20000, 'x'));
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes >= 20000; }));
    CHECK(next_answer(client).status == 408);
    CHECK(running.eventually([&] { return running.server.metrics().backlog_bytes == 0; }));
}

TEST_CASE("thousands of small chunks are one body, and trailers that are not fields are refused") {
    RunningServer running;
    running.server.post("/", [](const Request& r) { return Response(200, std::to_string(r.body().size())); });
    running.start();
    RawClient client(running.port());
    client.send(chunked("/", repeated(20000, "1\r\nx\r\n") + "0\r\n\r\n"));
    CHECK(next_answer(client).body == "20000");
    client.send(chunked("/", "0\r\nnot a field\r\n\r\n"));
    CHECK(next_answer(client).status == 400);
}

// ---- forms ----------------------------------------------------------------------------------------------------------

TEST_CASE("the fields of a form are decoded, and a field may repeat") {
    RunningServer running;
    const auto fields = [](const Request& r) {
        std::string text = r.form("name").value_or("none");
        for (const std::string& tag : r.form_all("tag")) text += "," + tag;
        for (const std::string& tag : r.query_all("tag")) text += ";" + tag;
        return Response(200, text);
    };
    running.server.post("/", fields);
    running.start();
    const std::string type = "Content-Type: application/x-www-form-urlencoded; charset=utf-8\r\n";
    RawClient client(running.port());
    client.send(post("/?tag=q%201&tag=q2", "n%61me=Anna+%26+Bo&tag=a&tag=%zz&tag=b%2Bc", type));
    CHECK(next_answer(client).body == "Anna & Bo,a,b+c;q 1;q2");
    client.send(post("/", "name=Anna", "Content-Type: text/plain\r\n"));
    CHECK(next_answer(client).body == "none");
    // A million fields cost one pass for each look-up.
    client.send(post("/", repeated(300000, "a&") + "name=last", type));
    CHECK(next_answer(client).body == "last");
}

TEST_CASE("a form with files gives its fields and its files as they are") {
    RunningServer running;
    running.server.post("/", [](const Request& r) {
        std::string text = r.form("title").value_or("none");
        for (const FormPart& part : r.form_parts())
            text += "|" + std::string(part.name) + "," + std::string(part.filename) + "," +
                    std::string(part.content_type) + "," + std::string(part.data);
        return Response(200, text);
    });
    running.start();
    const auto posted = [&](const std::string& body,
                            const std::string& type = "multipart/form-data; boundary=\"B b\"") {
        RawClient client(running.port());
        client.send(post("/", body, "Content-Type: " + type + "\r\n"));
        return next_answer(client).body;
    };
    const std::string field = "--B b\r\nContent-Disposition: form-data; name=\"title\"\r\n\r\nA; B\r\n";
    const std::string file =
        "--B b\r\nContent-Disposition: form-data; filename=\"a;b.png\"; name=\"file\"\r\n"
        "Content-Type: image/png\r\n\r\n\r\n--B \x01\r\n";
    CHECK(posted(field + file + "--B b--\r\n") == "A; B|title,,,A; B|file,a;b.png,image/png,\r\n--B \x01");
    CHECK(posted("--B b\r\n\r\n\r\n--B b--") == "none|,,,");
    // Malformed: no end, no begin, no boundary.
    CHECK(posted(field + file) == "none");
    CHECK(posted("x" + field + "--B b--") == "none");
    CHECK(posted(field + "--B b--", "multipart/form-data") == "none");
    CHECK(posted("--B b--") == "none");
    CHECK(posted("") == "none");
}

// ---- OPTIONS and CORS -----------------------------------------------------------------------------------------------

TEST_CASE("OPTIONS is answered with the methods of a path") {
    RunningServer running;
    running.server.get("/page", mirror);
    running.server.post("/page", mirror);
    running.server.route<test::Echo>("/chat");
    running.start();
    const auto allowed = [&](std::string_view target) {
        const Answer answer = fetch(running.port(), target, {}, "OPTIONS");
        return std::to_string(answer.status) + " " + answer.header("allow");
    };
    CHECK(allowed("/page") == "204 GET, HEAD, POST, OPTIONS");
    CHECK(allowed("/chat") == "204 GET, OPTIONS");
    CHECK(allowed("/nothing") == "404 ");
    CHECK(allowed("*") == "204 GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
}

TEST_CASE("pages of allowed origins may read answers, after a preflight if it is necessary") {
    RunningServer running;
    running.server.get("/", mirror);
    running.server.put("/", mirror);
    CorsOptions options;
    options.credentials = true;
    running.server.allow_cors({"https://App.example:443", "http://localhost:3000"}, options);
    running.start();
    const Answer foreign = fetch(running.port(), "/", "Origin: https://evil.example\r\n");
    CHECK(foreign.header("access-control-allow-origin") == "");
    CHECK(foreign.header("vary") == "Origin");
    const Answer allowed = fetch(running.port(), "/", "Origin: https://app.example\r\n");
    CHECK(allowed.header("access-control-allow-origin") == "https://app.example");
    CHECK(allowed.header("access-control-allow-credentials") == "true");
    CHECK(allowed.header("access-control-allow-methods") == "");
    const Answer preflight = fetch(
        running.port(), "/", "Origin: http://localhost:3000\r\nAccess-Control-Request-Method: PUT\r\n", "OPTIONS");
    CHECK(preflight.status == 204);
    CHECK(preflight.header("access-control-allow-methods") == "GET, HEAD, PUT, OPTIONS");
    CHECK(preflight.header("access-control-allow-headers") == "Content-Type, Authorization");
    CHECK(preflight.header("access-control-max-age") == "600");
    // A refusal can be read too.
    CHECK(fetch(running.port(), "/nothing", "Origin: https://app.example\r\n").header("access-control-allow-origin") ==
          "https://app.example");
}

TEST_CASE("allow_cors() for all origins does not allow cookies") {
    const test::OneLoop one_loop;
    RunningServer running;
    running.server.get("/", mirror);
    running.server.allow_cors({"*"});
    running.start();
    CHECK(fetch(running.port(), "/", "Origin: https://any.example\r\n").header("access-control-allow-origin") == "*");
    CorsOptions options;
    options.credentials = true;
    CHECK(contains(error_of([&] { running.server.allow_cors({"*"}, options); }), "each origin must be named"));
    CHECK(contains(error_of([&] { running.server.allow_cors({"app.example"}); }), "is not an origin"));
}

// ---- connections ----------------------------------------------------------------------------------------------------

TEST_CASE("an HTTP/1.0 client that asks for it keeps its connection") {
    RunningServer running;
    running.server.get("/", mirror);
    running.start();
    RawClient client(running.port());
    client.send("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n");
    CHECK(next_answer(client).header("connection") == "keep-alive");
    client.send("GET / HTTP/1.0\r\n\r\n");
    CHECK(next_answer(client).header("connection") == "close");
    CHECK(client.read_to_end());
}

TEST_CASE("a page knows the address and the scheme of its client") {
    RunningServer running;
    running.server.get(
        "/", [](const Request& r) { return Response(200, r.remote_address() + " " + std::string(r.scheme())); });
    running.server.trusted_proxies({"127.0.0.1"});
    running.start();
    CHECK(fetch(running.port(), "/").body == "127.0.0.1 " + test::scheme());
    CHECK(contains(fetch(running.port(), "/", "X-Forwarded-For: 203.0.113.7\r\n").body, "203.0.113.7 "));
}

// ---- headers, cookies, files ----------------------------------------------------------------------------------------

TEST_CASE("default headers are on each answer that does not set them itself") {
    const test::OneLoop one_loop;
    const TemporaryFile file("default-headers.html", "x");
    RunningServer running;
    running.server.get(
        "/", [](const Request&) { return std::move(Response(200, "x").set_header("Content-Security-Policy", "own")); });
    running.server.file("/file", file.path, {{"Cache-Control", "max-age=60"}});
    running.server.set_default_header("Content-Security-Policy", "default-src 'self'");
    running.start();
    CHECK(fetch(running.port(), "/").header("content-security-policy") == "own");
    CHECK(fetch(running.port(), "/nothing").header("content-security-policy") == "default-src 'self'");
    const Answer answer = fetch(running.port(), "/file");
    CHECK(answer.header("content-security-policy") == "default-src 'self'");
    CHECK(answer.header("cache-control") == "max-age=60");
    CHECK(contains(error_of([&] { running.server.set_default_header("a b", ""); }), "is not a header field"));
    CHECK(contains(error_of([&] { running.server.file("/2", file.path, {{"A", "\r\n"}}); }), "is not a header field"));
}

TEST_CASE("the program answers for a path without a page") {
    RunningServer running;
    running.server.not_found([](const Request& r) { return Response(404, "No " + r.path() + " here."); });
    running.start();
    const Answer answer = fetch(running.port(), "/a%20b");
    CHECK(answer.status == 404);
    CHECK(answer.body == "No /a b here.");
}

TEST_CASE("no program answers CONNECT, because after a 200 the client would take the connection for a tunnel") {
    RunningServer running;
    running.server.not_found([](const Request&) { return Response::html("<h1>Nothing</h1>"); });
    running.start();
    RawClient client(running.port());
    client.send("CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n" + request("/"));
    CHECK(next_answer(client).status == 501);
    CHECK(next_answer(client).status == 200);
}

TEST_CASE("a page in HTML may have any status, so that there is one for paths without a page") {
    RunningServer running;
    running.server.not_found([](const Request&) { return Response::html("<h1>Nothing</h1>", 404); });
    running.server.metrics_page("/metrics", {"10.0.0.1"});
    running.start();
    // Where the metrics are hidden, nothing tells them from a path without a page.
    for (const char* path : {"/nothing", "/metrics"}) {
        const Answer answer = fetch(running.port(), path);
        CHECK(answer.status == 404);
        CHECK(answer.header("content-type") == "text/html; charset=utf-8");
        CHECK(answer.body == "<h1>Nothing</h1>");
    }
}

TEST_CASE("the program also answers for a file that is not in a folder, or no longer exists") {
    test::TemporaryFolder folder;
    const std::string file = folder.write("b.txt", "b");
    RunningServer running;
    running.server.not_found([](const Request& r) { return Response(404, "No " + r.path() + " here."); });
    running.server.static_dir("/static", folder.path());
    running.server.file("/file", file);
    running.server.get("/own", [](const Request&) { return Response(404, "own"); });
    running.start();
    CHECK(fetch(running.port(), "/static/b.txt").body == "b");
    CHECK(fetch(running.port(), "/static/a.txt").body == "No /static/a.txt here.");
    CHECK(fetch(running.port(), "/own").body == "own");
    std::remove(file.c_str());
    CHECK(fetch(running.port(), "/file").body == "No /file here.");
}

TEST_CASE("a cookie has safe attributes, and one that would split the header is an Error") {
    RunningServer running;
    running.server.get("/", [](const Request&) {
        CookieOptions options;
        options.max_age = 60s;
        options.same_site = "Strict";
        options.http_only = false;
        return std::move(Response(200).set_cookie("a", "1").set_cookie("b", "2", options).clear_cookie("c"));
    });
    running.start();
    const Answer answer = fetch(running.port(), "/");
    const std::string secure = test::over_tls() ? "; Secure" : "";
    CHECK(contains(answer.head, "\r\nSet-Cookie: a=1; Path=/; SameSite=Lax; HttpOnly" + secure + "\r\n"));
    CHECK(contains(answer.head, "\r\nSet-Cookie: b=2; Path=/; Max-Age=60; SameSite=Strict" + secure + "\r\n"));
    CHECK(contains(answer.head, "\r\nSet-Cookie: c=; Path=/; Max-Age=0; SameSite=Lax; HttpOnly" + secure + "\r\n"));
    Response response(200);
    for (const std::string value : {"a b", "a;b", "a,b", "a\r\nb", "\"a\"", "\xc3\xa9"}) {
        CAPTURE(value);
        CHECK(contains(error_of([&] { response.set_cookie("a", value); }), "is not a cookie"));
    }
    CHECK(contains(error_of([&] { response.set_cookie("a b", "1"); }), "is not a cookie"));
    CookieOptions path;
    path.path = "/;x";
    CHECK(contains(error_of([&] { response.set_cookie("a", "1", path); }), "is not a cookie"));
}

#if WSCHAT_OPENSSL

TEST_CASE("a signed cookie is that of Tornado, and a changed, old or renamed cookie is not accepted") {
    // From tornado.web.create_signed_value(), version 2.
    const std::string key = "a key of 32 bytes for the tests.", value = "Anna & Bo";
    const std::string made =
        "2|1:0|10:1300000000|4:user|12:QW5uYSAmIEJv|bbea40ad901814b6a7a5f318c600c886d7096ad394c69c57b60554d7447c2e44";
    const CookieSigner signer(key);
    CHECK(signer.sign("user", value, 1300000000) == made);
    const auto verified = [&](std::string_view name, const std::string& text, std::time_t now = 1300000060) {
        return signer.decode(name, text, 60s, now).value_or("refused");
    };
    CHECK(verified("user", made) == value);
    CHECK(verified("user", made, 1300000061) == "refused");
    CHECK(verified("admin", made) == "refused");
    for (std::size_t i = 0; i < made.size(); ++i) {
        std::string changed = made;
        changed[i] = changed[i] == '1' ? '2' : '1';
        CHECK(verified("user", changed) == "refused");
        CHECK(verified("user", made.substr(0, i)) == "refused");
    }
    for (const std::string& binary : {std::string(), std::string("\0\xff|;:=", 6), std::string(1, '\0')})
        CHECK(signer.decode("user", signer.sign("user", binary)) == binary);
}

TEST_CASE("a new key signs, and cookies of the old key are accepted while it is listed") {
    const std::string old_key(32, 'o'), new_key(32, 'n');
    const std::string made = CookieSigner(old_key).sign("user", "Anna");
    CHECK(CookieSigner({new_key, old_key}).decode("user", made) == "Anna");
    CHECK_FALSE(CookieSigner(new_key).decode("user", made));
    CHECK(CookieSigner(new_key).decode("user", CookieSigner({new_key, old_key}).sign("user", "Bo")) == "Bo");
    CHECK(CookieSigner({"the new key of a server", "the old key of a server"})
              .decode("user", CookieSigner("the old key of a server").sign("user", "Carl")) == "Carl");
    CHECK(contains(error_of([] { CookieSigner("short"); }), "less than 16 bytes"));
    CHECK(contains(error_of([] { CookieSigner(std::vector<std::string>()); }), "no key"));
}

TEST_CASE("a page sets a signed cookie and reads it again") {
    const CookieSigner signer(std::string(32, 'k'));
    RunningServer running;
    running.server.get("/set", [&](const Request&) {
        Response response(204);
        signer.set(response, "user", "Anna; admin");
        return response;
    });
    running.server.get("/get", [&](const Request& r) { return Response(200, signer.get(r, "user").value_or("none")); });
    running.start();
    const std::string set = fetch(running.port(), "/set").header("set-cookie");
    CHECK(fetch(running.port(), "/get", "Cookie: " + set.substr(0, set.find(';')) + "\r\n").body == "Anna; admin");
    CHECK(fetch(running.port(), "/get", "Cookie: user=Anna\r\n").body == "none");
}

#endif

TEST_CASE("a client gets the range of a file that it asks for") {
    const TemporaryFile file("range.bin", "0123456789");
    RunningServer running;
    running.server.file("/", file.path);
    running.start();
    const struct {
        std::string range;
        int status;
        std::string body, content_range;
    } table[] = {
        {"bytes=0-1", 206, "01", "bytes 0-1/10"},
        {"bytes=4-", 206, "456789", "bytes 4-9/10"},
        {"bytes=-3", 206, "789", "bytes 7-9/10"},
        {"bytes=9-100", 206, "9", "bytes 9-9/10"},
        {"bytes=-100", 206, "0123456789", "bytes 0-9/10"},
        {"bytes=10-", 416, "", "bytes */10"},
        {"bytes=-0", 416, "", "bytes */10"},
        {"bytes=5-4", 200, "0123456789", ""},
        {"bytes=0-1,3-4", 200, "0123456789", ""},
        {"lines=0-1", 200, "0123456789", ""},
        {"bytes=a-b", 200, "0123456789", ""},
        {"bytes=-", 200, "0123456789", ""},
        {"bytes=18446744073709551615-", 200, "0123456789", ""},
    };
    for (const auto& row : table) {
        CAPTURE(row.range);
        const Answer answer = fetch(running.port(), "/", "Range: " + row.range + "\r\n");
        CHECK(answer.status == row.status);
        CHECK(answer.body == row.body);
        CHECK(answer.header("content-range") == row.content_range);
    }
    const Answer whole = fetch(running.port(), "/");
    CHECK(whole.header("accept-ranges") == "bytes");
    const auto conditional = [&](const std::string& value) {
        return fetch(running.port(), "/", "Range: bytes=0-1\r\nIf-Range: " + value + "\r\n").status;
    };
    CHECK(conditional(whole.header("etag")) == 206);
    CHECK(conditional(whole.header("last-modified")) == 206);
    CHECK(conditional("\"another\"") == 200);
    CHECK(conditional("W/" + whole.header("etag")) == 200);
    CHECK(fetch(running.port(), "/", "Range: bytes=0-1\r\n", "HEAD").status == 200);
}

// ---- operations ----------------------------------------------------------------------------------------------------

TEST_CASE("each answer is in the access log once, with its path and without its query") {
    RunningServer running;
    std::vector<std::string> lines;
    running.server.on_access([&](const AccessEntry& entry) {
        CHECK(entry.duration >= 0s);
        lines.push_back(std::string(entry.remote_address) + " " + std::string(entry.method) + " " +
                        std::string(entry.path) + " " + std::to_string(entry.status) + " " +
                        std::to_string(entry.size));
        if (entry.status == 404) throw std::runtime_error("the disk is full");
    });
    running.server.get("/page", mirror);
    running.server.post("/page", mirror);
    running.server.route<test::Echo>("/chat");
    running.start();
    RawClient client(running.port());
    client.send(request("/page?secret=1") + post("/page", "hello") + request("/nothing"));
    for (int i = 0; i < 3; ++i) next_answer(client);
    CHECK(WsClient(running.port(), "/chat?token=2").is_open());
    RawClient malformed(running.port());
    malformed.send("nonsense\r\n\r\n");
    CHECK(next_answer(malformed).status == 400);
    running.stop();
    std::string all;
    for (const std::string& line : lines) all += line + "\n";
    CAPTURE(all);
    CHECK(lines == std::vector<std::string>{"127.0.0.1 GET /page 200 4", "127.0.0.1 POST /page 200 10",
                                            "127.0.0.1 GET /nothing 404 31", "127.0.0.1 GET /chat 101 0",
                                            "127.0.0.1   400 32"});
}

TEST_CASE("only allowed addresses get the page of metrics") {
    RunningServer running;
    running.server.metrics_page("/all");
    running.server.metrics_page("/local", {"10.0.0.0/8", "127.0.0.1"});
    running.server.metrics_page("/far", {"10.0.0.0/8", "unix"});
    running.start();
    CHECK(fetch(running.port(), "/all").status == 200);
    CHECK(fetch(running.port(), "/local").status == 200);
    CHECK(fetch(running.port(), "/far").status == 404);
    CHECK(error_of([&] { running.server.metrics_page("/bad", {"10.0.0.0/99"}); }) != "");
}

TEST_CASE("the server visits each open handler, which may be closed then") {
    const test::OneLoop one_loop;
    RunningServer running;
    running.server.route<test::Echo>("/");
    running.start();
    std::vector<std::unique_ptr<WsClient>> clients;
    for (int i = 0; i < 5; ++i) clients.push_back(std::make_unique<WsClient>(running.port()));
    const RawClient idle(running.port());
    std::size_t visited = 0;
    running.on_loop([&] {
        running.server.each_handler([&](WebSocketHandler& handler) {
            ++visited;
            handler.close(4000, "bye");
        });
    });
    CHECK(visited == 5);
    for (const auto& client : clients) CHECK(client->close_code() == CloseCode{4000});
}

TEST_CASE("another thread sees how many written bytes of a HandlerRef the peer has not read") {
    const test::OneLoop one_loop;
    struct Member : WebSocketHandler {
        explicit Member(HandlerRef& self) : self_(self) {}
        void open() override { self_ = ref(); }
        void on_message(const Message&) override {}
        HandlerRef& self_;
    };
    Limits limits;
    limits.max_backlog = 64 * 1024 * 1024;
    HandlerRef self;
    RunningServer running(test::with_limits(limits));
    running.server.route<Member>("/", std::ref(self));
    running.start();
    CHECK(self.buffered_amount() == 0);
    WsClient client(running.port());
    running.on_loop([] {});
    const std::string large(20 * 1024 * 1024, 'x');
    {
        test::BlockedLoop blocked(running.server);
        CHECK(self.write_message(large));
        CHECK(self.buffered_amount() == large.size());
    }
    // The loop takes it, and the kernel cannot take all of it. The bytes are never nowhere.
    std::size_t seen = large.size();
    for (const Time until = Clock::now() + test::deadline; seen == large.size() && Clock::now() < until;)
        seen = self.buffered_amount();
    CHECK(seen != large.size());
    CHECK(seen > 0);
    CHECK((client.next() == large));
    CHECK(test::eventually([&] { return self.buffered_amount() == 0; }));
    client.close();
    CHECK(test::eventually([&] { return !self.write_message("x") || self.buffered_amount() == 0; }));
    running.stop();
}

// ---- answers that come later ----------------------------------------------------------------------------------------

TEST_CASE("a page may be answered later from another thread, while other requests are served") {
    ReplyServer running;
    RawClient slow(running.port()), fast(running.port());
    // A request that is pipelined behind waits for its turn.
    slow.send(request("/") + request("/now"));
    const Reply reply = running.replies.take();
    fast.send(request("/now"));
    CHECK(next_answer(fast).body == "now");
    CHECK(reply.is_open());
    CHECK(reply.send(Response(200, "later")));
    CHECK(next_answer(slow).body == "later");
    CHECK(next_answer(slow).body == "now");
    CHECK_FALSE(reply.is_open());
    CHECK_FALSE(reply.send(Response(200, "twice")));
    CHECK_FALSE(reply.accept());
}

TEST_CASE("a Reply that is used at once, in the page's function, is an ordinary answer") {
    RunningServer running;
    running.server.get("/", [](const Request& r, Reply reply) { reply.send(Response(200, std::string(r.path()))); });
    running.start();
    RawClient client(running.port());
    client.send(repeated(100, request("/")));
    for (int i = 0; i < 100; ++i) CHECK(next_answer(client).body == "/");
    CHECK(fetch(running.port(), "/", {}, "HEAD").header("content-length") == "1");
}

TEST_CASE("a Reply that is destroyed unused answers 500, and so does a function that takes one and throws") {
    const test::OneLoop one_loop;
    ReplyServer running;
    running.server.get("/throws", [](const Request&, Reply) { throw std::runtime_error("no"); });
    RawClient client(running.port());
    client.send(request("/"));
    { const Reply dropped = running.replies.take(); }
    CHECK(is_refusal(client.read_until("answer.\n") ? client.received : "", 500));
    CHECK(fetch(running.port(), "/throws").status == 500);
    running.stop();
    CHECK(running.log.has("what=\"a Reply was destroyed unused\" peer=\"127.0.0.1\" path=\"/\""));
    CHECK(running.log.has("what=\"no\" peer=\"127.0.0.1\" path=\"/throws\""));
}

TEST_CASE("a Reply whose client or server no longer exists has no effect and returns false") {
    Reply after_server;
    {
        ReplyServer running;
        RawClient first(running.port());
        first.send(request("/"));
        const Reply reply = running.replies.take();
        first.reset();
        CHECK(test::eventually([&] { return !reply.is_open(); }));
        CHECK_FALSE(reply.send(Response(200)));
        RawClient second(running.port());
        second.send(request("/"));
        after_server = running.replies.take();
        running.stop(0ms);
    }
    CHECK_FALSE(after_server.send(Response(200)));
    CHECK_FALSE(Reply().send(Response(200)));
}

TEST_CASE("a client that has shut its sending side still gets a later answer") {
    ReplyServer running;
    RawClient client(running.port());
    client.send(request("/"));
    const Reply reply = running.replies.take();
    client.shutdown_send();
    CHECK(fetch(running.port(), "/now").body == "now");
    CHECK(reply.send(Response(200, "later")));
    CHECK(next_answer(client).body == "later");
    CHECK(client.read_to_end());
}

TEST_CASE("an answer that does not come in time is a 503, and the Reply then has no effect") {
    Limits limits;
    limits.reply_timeout = 50ms;
    ReplyServer running(test::with_limits(limits));
    RawClient client(running.port());
    client.send(request("/"));
    const Reply reply = running.replies.take();
    CHECK(next_answer(client).status == 503);
    CHECK_FALSE(reply.send(Response(200)));
}

// ---- handshakes that are answered later -----------------------------------------------------------------------------

namespace {

// A user who is looked up on another thread. "?name=" is the user, an empty one is refused.
struct Member : WebSocketHandler {
    explicit Member(Pool& pool) : pool_(pool) {}
    void prepare_async(const Request& r, Reply reply) override {
        auto shared = std::make_shared<Reply>(std::move(reply));
        pool_.submit([shared, name = r.query("name").value_or("")] {
            if (name.empty()) shared->send(Response(401, "Log in first.\n"));
            else shared->accept([name](WebSocketHandler& handler) { static_cast<Member&>(handler).name_ = name; });
        });
    }
    void response_headers(Response& response) override { response.set_cookie("seen", name_).set_header("X-A", "b"); }
    void open() override { write_message("hello " + name_); }
    void on_message(const Message& m) override { write_message(name_ + ": " + std::string(m.text())); }

private:
    Pool& pool_;
    std::string name_;
};

}  // namespace

TEST_CASE("500 clients log in at once with a slow look-up, and no other client waits") {
    Pool pool;
    RunningServer running;
    running.server.route<Member>("/chat", std::ref(pool));
    running.server.get("/", mirror);
    running.start();
    std::atomic<bool> go{false};
    pool.submit([&] {
        while (!go) std::this_thread::yield();
    });
    std::vector<std::unique_ptr<RawClient>> clients;
    for (int i = 0; i < 500; ++i) {
        clients.push_back(std::make_unique<RawClient>(running.port()));
        std::string handshake = detail::handshake_request("x", "/chat?name=" + std::to_string(i), test::WsClient::key);
        clients.back()->send(handshake + test::masked_text("first"));
    }
    CHECK(fetch(running.port(), "/").status == 200);
    CHECK(running.metrics().websockets_open == 0);
    go = true;
    for (int i = 0; i < 500; ++i) {
        const std::string name = std::to_string(i), said = name + ": first";
        CHECK(clients[static_cast<std::size_t>(i)]->read_until(said));
        CHECK(contains(clients[static_cast<std::size_t>(i)]->received, "hello " + name));
    }
    running.stop();
    pool.stop();
}

TEST_CASE("a handshake that is answered later is refused or opened, with headers and cookies") {
    Pool pool;
    RunningServer running;
    running.server.route<Member>("/chat", std::ref(pool));
    running.start();
    RawClient refused(running.port());
    refused.send(detail::handshake_request("x", "/chat", WsClient::key));
    CHECK(next_answer(refused).status == 401);
    CHECK(refused.read_to_end());
    WsClient member(running.port(), "/chat?name=Anna");
    REQUIRE(member.is_open());
    CHECK(contains(member.head, "\r\nSet-Cookie: seen=Anna; Path=/; SameSite=Lax; HttpOnly"));
    CHECK(contains(member.head, "\r\nX-A: b\r\n"));
    CHECK(member.next() == "hello Anna");
    running.stop();
    pool.stop();
}

namespace {

// Gives its Reply to the test.
struct Waiting : WebSocketHandler {
    explicit Waiting(Replies& replies) : replies_(replies) {}
    void prepare_async(const Request&, Reply reply) override { replies_.add(std::move(reply)); }
    void open() override { write_message("open"); }
    void on_message(const Message& m) override { write_message(m); }

private:
    Replies& replies_;
};

struct WaitingServer : RunningServer {
    explicit WaitingServer(ServerOptions options = {}) : RunningServer(std::move(options)) {
        server.route<Waiting>("/", std::ref(replies));
        start();
    }
    ~WaitingServer() { stop(); }
    Replies replies;
};

}  // namespace

TEST_CASE("the deadline of a handshake still applies while its Reply is not used") {
    WaitingServer running(test::with_handshake_timeout(100ms));
    RawClient client(running.port());
    client.send(test::upgrade_request());
    const Reply reply = running.replies.take();
    CHECK(next_answer(client).status == 503);
    CHECK_FALSE(reply.accept());
    CHECK(running.metrics().websockets_opened == 0);
}

TEST_CASE("a client that hangs up while its handshake waits is removed") {
    WaitingServer running;
    Reply reply;
    {
        RawClient client(running.port());
        client.send(test::upgrade_request());
        reply = running.replies.take();
    }
    CHECK(test::eventually([&] { return !reply.is_open(); }));
    CHECK_FALSE(reply.accept([](WebSocketHandler&) { FAIL("the handler is gone"); }));
    CHECK(running.eventually([&] { return running.server.metrics().connections_open == 0; }));
}

TEST_CASE("a handshake whose Reply is used during a shutdown is refused") {
    WaitingServer running;
    RawClient client(running.port());
    client.send(test::upgrade_request());
    const Reply reply = running.replies.take();
    running.server.shutdown(20s);
    CHECK(running.eventually([&] { return running.server.port() == 0; }));
    CHECK(reply.accept());
    CHECK(next_answer(client).status == 503);
    running.stop();
}

TEST_SUITE_END();
