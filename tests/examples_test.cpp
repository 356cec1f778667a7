// The programs of examples/ and the server of the benchmark as processes: their stable command lines, which scripts use.
#include "support.hpp"

#include <spawn.h>
#include <sys/wait.h>
#include <csignal>
#include <cstring>

#if !defined(WSCHAT_EXAMPLES_DIR)
#error "compile with -DWSCHAT_EXAMPLES_DIR='\"the folder of the compiled examples\"'"
#endif

using namespace wschat;
using namespace wschat::detail;
using namespace std::chrono_literals;
using test::contains;
using test::fetch;
using test::next_with;
using test::WsClient;

namespace {

// A program that runs with its output in pipes, and ends with the test.
class Program {
public:
    explicit Program(const std::vector<std::string>& command) {
        int out[2], err[2];
        REQUIRE(::pipe2(out, O_CLOEXEC) == 0);
        REQUIRE(::pipe2(err, O_CLOEXEC) == 0);
        posix_spawn_file_actions_t actions;
        ::posix_spawn_file_actions_init(&actions);
        ::posix_spawn_file_actions_adddup2(&actions, out[1], 1);
        ::posix_spawn_file_actions_adddup2(&actions, err[1], 2);
        // This program may run with an ignored SIGINT, which a child inherits.
        posix_spawnattr_t attributes;
        ::posix_spawnattr_init(&attributes);
        sigset_t defaults;
        ::sigemptyset(&defaults);
        ::sigaddset(&defaults, SIGINT);
        ::posix_spawnattr_setsigdefault(&attributes, &defaults);
        ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
        std::vector<char*> arguments;
        for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
        arguments.push_back(nullptr);
        const int error = ::posix_spawn(&pid_, command[0].c_str(), &actions, &attributes, arguments.data(), environ);
        ::posix_spawn_file_actions_destroy(&actions);
        ::posix_spawnattr_destroy(&attributes);
        ::close(out[1]);
        ::close(err[1]);
        out_ = out[0];
        err_ = err[0];
        REQUIRE_MESSAGE(error == 0, command[0] << ": " << std::string(std::strerror(error)));
    }
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;
    ~Program() {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            ::waitpid(pid_, nullptr, 0);
        }
        ::close(out_);
        ::close(err_);
    }

    // Waits for the line that the program prints when it is ready.
    std::string first_line() {
        while (!contains(output_, "\n") && read_some(out_, output_)) {
        }
        return output_.substr(0, output_.find('\n'));
    }
    // The port in that line.
    int port() {
        const std::string line = first_line();
        const std::size_t at = line.find("http://127.0.0.1:");
        REQUIRE_MESSAGE(at != std::string::npos, line << errors());
        return std::atoi(line.c_str() + at + 17);
    }
    void signal(int number) { ::kill(pid_, number); }
    // Waits for the end of the program and returns its exit status; -1 if a signal ended it.
    int status() {
        while (read_some(out_, output_)) {
        }
        int status = -1;
        REQUIRE(::waitpid(std::exchange(pid_, -1), &status, 0) > 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }
    std::string output() {
        while (read_some(out_, output_)) {
        }
        return output_;
    }
    std::string errors() {
        while (read_some(err_, errors_)) {
        }
        return errors_;
    }

private:
    static bool read_some(int descriptor, std::string& text) {
        pollfd entry{descriptor, POLLIN, 0};
        REQUIRE(::poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(test::deadline).count())) == 1);
        char bytes[4096];
        const ssize_t size = ::read(descriptor, bytes, sizeof bytes);
        if (size > 0) text.append(bytes, static_cast<std::size_t>(size));
        return size > 0;
    }

    pid_t pid_ = -1;
    int out_ = -1, err_ = -1;
    std::string output_, errors_;
};

std::string example(const std::string& name) { return std::string(WSCHAT_EXAMPLES_DIR) + "/" + name; }

struct Example {
    std::string name;
    std::vector<std::string> command;  // before the port
    std::vector<std::string> after;    // the arguments after the port
    std::string target;                // of its WebSocket
    std::string ready, ready_end;      // its line, before and after the address

    std::vector<std::string> with_port(const std::string& port) const {
        std::vector<std::string> all = command;
        all.push_back(port);
        all.insert(all.end(), after.begin(), after.end());
        return all;
    }
};

// All programs that have a port as their first argument.
std::vector<Example> all_programs() {
    std::vector<Example> programs = {
        {"chat", {example("chat")}, {}, "/chat", "chat: open ", " in two windows"},
        {"echo", {example("echo")}, {}, "/", "echo: ", ""},
        {"rooms", {example("rooms")}, {}, "/chat", "rooms: open ", " in two windows"},
        {"ticker", {example("ticker")}, {}, "/ticks", "ticker: ", ""},
        {"publish", {example("publish")}, {"--token", "T"}, "/chat", "publish: ", " with the token T"},
#if defined(__linux__)
        {"embed", {example("embed")}, {}, "/chat", "embed: open ", " and type here"},
#endif
    };
#if defined(WSCHAT_BENCH_SERVER)
    programs.push_back({"bench_server", {WSCHAT_BENCH_SERVER}, {"echo"}, "/", "bench_server: ", ""});
    programs.push_back({"bench_server", {WSCHAT_BENCH_SERVER}, {"room", "2"}, "/", "bench_server: ", ""});
#endif
    return programs;
}

// What a program with a page prints after an error.
std::string usage_of(const std::string& name) {
    return "usage: " + name + " [port] [--page FILE]" +
           (name == "rooms" ? " [--db FILE] [--redis URL]... [--threads N] [--trust PROXY]..." : "") + "\n";
}

// Sends a form.
test::Answer post(int port, std::string_view target, std::string_view body, std::string_view headers = {}) {
    test::RawClient client(port);
    client.send(test::request(target,
                              "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: " +
                                  std::to_string(body.size()) + "\r\n" + std::string(headers),
                              "POST") +
                std::string(body));
    return test::next_answer(client);
}

}  // namespace

TEST_SUITE_BEGIN("examples");

TEST_CASE("each program prints one line with its address when it is ready, and no other line") {
    for (const Example& program : all_programs()) {
        CAPTURE(program.name);
        Program running(program.with_port("0"));
        const std::string line = running.first_line(), url = "http://127.0.0.1:" + std::to_string(running.port()) + "/";
        CHECK(line == program.ready + url + program.ready_end);
        CHECK(WsClient(running.port(), program.target).is_open());
        running.signal(SIGTERM);
        CHECK(running.output() == line + "\n");
        CHECK(running.errors() == "");
        CHECK(running.status() == 0);
    }
}

TEST_CASE("each program ends with status 0 on SIGINT and SIGTERM, and its clients get 1001") {
    for (const Example& program : all_programs()) {
        for (const int signal : {SIGINT, SIGTERM}) {
            CAPTURE(program.name);
            CAPTURE(signal);
            Program running(program.with_port("0"));
            WsClient one(running.port(), program.target), two(running.port(), program.target);
            REQUIRE(one.is_open());
            running.signal(signal);
            for (WsClient* client : {&one, &two}) {
                CHECK(client->close_code() == CloseCode::going_away);
                client->raw.close();
            }
            CHECK(running.status() == 0);
        }
    }
}

TEST_CASE("each program ends with status 0 even if the signal comes right after its line") {
    for (const Example& program : all_programs()) {
        for (int round = 0; round < 5; ++round) {
            CAPTURE(program.name);
            Program running(program.with_port("0"));
            running.first_line();
            running.signal(SIGTERM);
            CHECK(running.status() == 0);
        }
    }
}

TEST_CASE("each program that cannot listen prints the cause and ends with status 1") {
    const ListenSocket taken(ListenAddress::parse("0"), false);
    const std::string port = std::to_string(taken.address().port);
    const struct {
        std::string port, sentence;
    } table[] = {
        {port, "listen 127.0.0.1:" + port + ": Address already in use (EADDRINUSE): another process has it"},
        {"eighty", "listen eighty: not an address"},
        {"65536", "listen 65536: not an address"},
        {"192.0.2.1:0", "listen 192.0.2.1:0: Cannot assign requested address (EADDRNOTAVAIL)"},
    };
    for (const Example& program : all_programs()) {
        for (const auto& row : table) {
            CAPTURE(program.name);
            CAPTURE(row.port);
            Program running(program.with_port(row.port));
            CHECK(running.output() == "");
            CHECK(running.errors().substr(0, program.name.size() + 2 + row.sentence.size()) ==
                  program.name + ": " + row.sentence);
            CHECK(running.errors().back() == '\n');
            CHECK(running.status() == 1);
        }
    }
}

TEST_CASE("each program accepts an address instead of a port") {
    for (const Example& program : all_programs()) {
        CAPTURE(program.name);
        Program running(program.with_port("0.0.0.0:0"));
        CHECK(WsClient(running.port(), program.target).is_open());
    }
}

TEST_CASE("the chat and the rooms find their page in the folder of the source, or at the path of --page") {
    const test::TemporaryFile file("page.html", "<p>my own page</p>");
    const std::string& path = file.path;
    for (const std::string name : {"chat", "rooms"}) {
        CAPTURE(name);
        Program own({example(name), "0"});
        const test::Answer page = fetch(own.port(), "/");
        CHECK(page.status == 200);
        CHECK(contains(page.body, name == "chat" ? "new WebSocket(" : "from './wschat.js'"));
        if (name == "rooms") CHECK(contains(fetch(own.port(), "/wschat.js").body, "export class ChatClient "));
        Program other({example(name), "0", "--page", path}), first({example(name), "--page", path, "0"});
        CHECK(fetch(other.port(), "/").body == "<p>my own page</p>");
        CHECK(fetch(first.port(), "/").body == "<p>my own page</p>");

        Program missing({example(name), "0", "--page", path + ".missing"});
        CHECK(missing.output() == "");
        CHECK(missing.errors() ==
              name + ": file \"/\": " + path + ".missing: No such file or directory (ENOENT)\n" + usage_of(name));
        CHECK(missing.status() == 1);
        Program none({example(name), "0", "--page"});
        CHECK(none.status() == 1);
    }
}

TEST_CASE("the chat sends every message to all clients") {
    Program program({example("chat"), "0"});
    WsClient one(program.port(), "/chat"), two(program.port(), "/chat");
    one.send("hello");
    CHECK(one.next() == "hello");
    CHECK(two.next() == "hello");
    two.send("\xC3\xBC");
    CHECK(one.next() == "\xC3\xBC");
}

#if defined(__linux__)
TEST_CASE("the server in another program's loop sends typed lines to all clients") {
    const std::string path = test::temporary_path("typed");
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
    const OwnedDescriptor typed(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    Program program({"/bin/sh", "-c", "exec \"$0\" 0 < \"$1\"", example("embed"), path});
    WsClient one(program.port(), "/chat"), two(program.port(), "/chat");
    ::unlink(path.c_str());
    for (const std::string text : {"hel", "lo\n\xC3\xBC\n\xFF\nlast\n"})
        REQUIRE(::write(typed.descriptor(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
    for (WsClient* client : {&one, &two}) {
        CHECK(client->next() == "hello");
        CHECK(client->next() == "\xC3\xBC");
        CHECK(client->next() == "last");
    }
    one.send("by a client");
    CHECK(two.next() == "by a client");
    program.signal(SIGTERM);
    CHECK(one.close_code() == CloseCode::going_away);
    CHECK(two.close_code() == CloseCode::going_away);
    one.raw.close();
    two.raw.close();
    CHECK(program.status() == 0);
}
#endif

TEST_CASE("the echo returns text and binary on any path, up to 64 MiB") {
    Program program({example("echo"), "0"});
    for (const std::string target : {"/", "/any/path", "/?query"}) {
        CAPTURE(target);
        WsClient client(program.port(), target);
        client.send("text");
        CHECK(client.next() == "text");
        client.send(std::string("bin\0ary", 7), Opcode::binary);
        CHECK(client.next() == std::string("bin\0ary", 7));
    }
    WsClient client(program.port());
    const std::string large(16 * 1024 * 1024, 'x');
    client.send(large);
    CHECK((client.next() == large));
    // RFC 6455 5.2: a length of eight bytes. This one is 64 MiB and one byte.
    client.raw.send(test::hex("82 ff 00 00 00 00 04 00 00 01 00 00 00 00"));
    CHECK(client.close_code() == CloseCode::message_too_big);
}

TEST_CASE("the echo accepts every Origin, and refuses only a request with two") {
    Program program({example("echo"), "0"});
    for (const std::string origin :
         {"http://127.0.0.1", "https://evil.example", "https://evil.example:8443", "null", "", "file://", "https://",
          "https://user@evil.example/path?query", "https://evil.example:65536", "moz-extension://a-b-c", "no origin",
          "https://a.example https://b.example", "\xC3\xBC", "\xFF", "*", "::"}) {
        CAPTURE(origin);
        WsClient client(program.port(), "/", "Origin: " + origin + "\r\n");
        REQUIRE(client.is_open());
        client.send("text");
        CHECK(client.next() == "text");
    }
    // RFC 6454 7.3: a user agent must not send more than one Origin.
    test::RawClient twice(program.port());
    twice.send(test::upgrade_request("Origin: https://a.example\r\nOrigin: https://b.example\r\n"));
    const test::Answer answer = test::next_answer(twice);
    CHECK(answer.status == 400);
    CHECK(answer.body == "There is more than one Origin header.\n");
    CHECK(WsClient(program.port()).is_open());
}

TEST_CASE("the echo accepts a message of a hundred thousand fragments") {
    Program program({example("echo"), "0"});
    WsClient client(program.port());
    // RFC 6455 5.4: a first frame, continuations, and a last frame with FIN, of one byte each.
    client.raw.send(test::masked_frame("01", "x") + test::repeated(99'998, test::masked_frame("00", "x")) +
                    test::masked_frame("80", "x"));
    CHECK((client.next() == std::string(100'000, 'x')));
}

#if WSCHAT_OPENSSL && WSCHAT_ZLIB
TEST_CASE("the chat over TLS compresses for a client that offers it") {
    const test::TemporaryFolder folder;  // for the certificate that the program makes
    Program program({"/bin/sh", "-c", "cd \"$1\" && exec \"$0\" 0", example("wss"), (folder / "").string()});
    const std::string line = program.first_line();
    REQUIRE(line.substr(0, 28) == "wss: open https://127.0.0.1:");
    test::RawClient client = test::RawClient::encrypted(std::atoi(line.c_str() + 28));
    client.send(handshake_request("localhost", "/chat", test::handshake_key, {}, CompressionPool::offer({})));
    REQUIRE(client.read_until("\r\n\r\n"));
    CHECK(contains(client.received, "Sec-WebSocket-Extensions: permessage-deflate"));
    client.received.clear();
    const std::string piece(100, 'a');
    client.send(test::masked_frame("01", piece) + test::repeated(98, test::masked_frame("00", piece)) +
                test::masked_frame("80", piece));
    // RFC 7692 6: RSV1 is set, and the frame is shorter than its message.
    CHECK(client.read_until(test::hex("c1")));
    CHECK(client.received.size() < 100);
}
#endif

TEST_CASE("the rooms send greetings, members and names, and separate the rooms") {
    Program program({example("rooms"), "0"});
    WsClient anna(program.port(), "/chat/tea?name=Anna");
    CHECK(contains(next_with(anna, "\"hello\""), "\"room\":\"tea\",\"name\":\"Anna\""));
    CHECK(contains(next_with(anna, "\"users\""), "\"name\":\"Anna\"}]"));
    WsClient other(program.port(), "/chat/tea?name=Anna"), bob(program.port(), "/chat?name=Bob");
    CHECK(contains(next_with(other, "\"hello\""), "\"name\":\"Anna-2\""));
    CHECK(contains(next_with(bob, "\"hello\""), "\"room\":\"lobby\",\"name\":\"Bob\""));
    CHECK(contains(next_with(anna, "\"join\""), "\"name\":\"Anna-2\""));
    anna.send("/who");
    CHECK(contains(next_with(anna, "\"users\""), "\"name\":\"Anna-2\"}]"));

    other.send("good <b>tea</b> \"here\"");
    CHECK(contains(next_with(anna, "\"said\""), "\"name\":\"Anna-2\",\"text\":\"good <b>tea</b> \\\"here\\\"\""));
    bob.send("good coffee");
    CHECK(contains(next_with(bob, "\"said\""), "good coffee"));

    other.send("/nick Carl");
    CHECK(contains(next_with(anna, "\"nick\""), "\"old\":\"Anna-2\",\"name\":\"Carl\""));
    for (const auto& [line, code] :
         {std::pair{"/nick Anna", "name_taken"}, {"/nick \t", "name_bad"}, {"/dance", "unknown_command"}}) {
        other.send(line);
        CHECK(contains(next_with(other, "\"error\""), "\"code\":\"" + std::string(code) + "\""));
    }
    other.send("bytes", Opcode::binary);
    CHECK(contains(next_with(other, "\"error\""), "\"code\":\"bad_line\""));

    other.close();
    CHECK(other.close_code() == CloseCode::normal);
    CHECK(contains(next_with(anna, "\"leave\""), "\"name\":\"Carl\""));
    anna.send("/who");
    CHECK(contains(next_with(anna, "\"users\""), "\"name\":\"Anna\"}]"));
}

TEST_CASE("the metrics of the rooms are for this machine, also behind a proxy") {
    Program program({example("rooms"), "0", "--trust", "127.0.0.1"});
    CHECK(test::fetch(program.port(), "/metrics").status == 200);
    CHECK(test::fetch(program.port(), "/metrics", "X-Forwarded-For: 203.0.113.7\r\n").status == 404);
}

TEST_CASE("another program sends a message to a room of the chat, if it has the token") {
    Program program({example("publish"), "0", "--token", "secret"});
    WsClient anna(program.port(), "/chat/tea?name=Anna");
    const auto status = [&](std::string_view token, std::string_view body) {
        return post(program.port(), "/rooms/tea/messages", body, "Authorization: Bearer " + std::string(token) + "\r\n")
            .status;
    };
    CHECK(status("wrong", "text=hello") == 401);
    CHECK(status("secret", "") == 400);
    CHECK(status("secret", "text=") == 400);
    CHECK(status("secret", "text=a%00b") == 400);
    CHECK(status("secret", "text=hello&name=a%0Ab") == 400);
    CHECK(contains(post(program.port(), "/rooms/%0Aa/messages", "text=hello", "Authorization: Bearer secret\r\n").body,
                   "is not 1 to 64 bytes of visible text"));
    CHECK(status("secret", "text=hello+there&name=Robot") == 204);
    CHECK(contains(next_with(anna, "hello there"), "\"name\":\"Robot\""));
}

TEST_CASE("only members enter the chat, with a session that begins in a form and ends with a logout") {
    Program program({example("login"), "0", "--user", "bo:with:colon"});
    CHECK(test::fetch(program.port(), "/").header("location") == "/login");
    CHECK(contains(test::fetch(program.port(), "/login").body, "<form"));
    CHECK(post(program.port(), "/login", "name=bo&password=wrong").status == 401);
    CHECK_FALSE(WsClient(program.port(), "/chat").is_open());
    const test::Answer entered = post(program.port(), "/login", "name=bo&password=with:colon");
    CHECK(entered.status == 303);
    const std::string set_cookie = entered.header("set-cookie");
    CHECK(contains(set_cookie, "; Path=/; SameSite=Lax; HttpOnly"));
    const std::string cookie = "Cookie: " + set_cookie.substr(0, set_cookie.find(';')) + "\r\n";
    CHECK(test::fetch(program.port(), "/", cookie).header("location") == "/rooms.html");
    WsClient bo(program.port(), "/chat/tea?name=Anna", cookie);
    CHECK(contains(next_with(bo, "\"hello\""), "\"bo\""));
    CHECK(post(program.port(), "/logout", "", cookie).status == 303);
    CHECK_FALSE(WsClient(program.port(), "/chat", cookie).is_open());
    for (int i = 0; i < 10; ++i) post(program.port(), "/login", "name=bo&password=wrong");
    CHECK(post(program.port(), "/login", "name=bo&password=with:colon").status == 429);
}

TEST_CASE("behind a proxy that the login trusts, the cookie is Secure, and each client has attempts of its own") {
    Program program({example("login"), "0", "--trust", "127.0.0.1"});
    const auto log_in = [&](const std::string& address, const std::string& password) {
        return post(program.port(), "/login", "name=anna&password=" + password,
                    "X-Forwarded-For: " + address + "\r\nX-Forwarded-Proto: https\r\n");
    };
    for (int i = 0; i < 10; ++i) log_in("203.0.113.7", "wrong");
    CHECK(log_in("203.0.113.7", "tea").status == 429);
    const test::Answer entered = log_in("203.0.113.8", "tea");
    CHECK(entered.status == 303);
    CHECK(contains(entered.header("set-cookie"), "; Secure"));
}

TEST_CASE("the ticker sends its ticks in order to all clients, and answers with the number of clients") {
    Program program({example("ticker"), "0"});
    WsClient one(program.port(), "/ticks"), two(program.port(), "/ticks");
    const auto tick = [](WsClient& client) {
        const std::string message = next_with(client, "{\"tick\":");
        return std::atoi(message.c_str() + 8);
    };
    const int first = tick(one);
    CHECK(first >= 1);
    CHECK(tick(one) == first + 1);
    CHECK(tick(two) >= 1);
    two.send("how many?");
    CHECK(next_with(two, "watchers") == "{\"watchers\":2}");
}

#if defined(WSCHAT_BENCH_SERVER)

TEST_CASE("the bench server sends every message to all clients, or back to its sender") {
    Program room({WSCHAT_BENCH_SERVER, "0", "room"}), echo({WSCHAT_BENCH_SERVER, "0", "echo"});
    WsClient one(room.port()), two(room.port());
    one.send("hello");
    CHECK(one.next() == "hello");
    CHECK(two.next() == "hello");
    WsClient alone(echo.port()), other(echo.port());
    alone.send("first");
    other.send("second");
    CHECK(alone.next() == "first");
    CHECK(other.next() == "second");
}

TEST_CASE("the bench server prints its usage after wrong arguments, and ends with status 1") {
    for (const std::vector<std::string>& arguments : {std::vector<std::string>{},
                                                      {"0"},
                                                      {"0", "talk"},
                                                      {"0", "room", "0"},
                                                      {"0", "room", "many"},
                                                      {"0", "room", "65"}}) {
        std::vector<std::string> command = {WSCHAT_BENCH_SERVER};
        command.insert(command.end(), arguments.begin(), arguments.end());
        Program program(command);
        CHECK(program.output() == "");
        CHECK(program.errors() == std::string("usage: bench_server PORT room|echo") + (WSCHAT_ZLIB ? "|deflate" : "") +
                                      " [threads, 1-64]\n");
        CHECK(program.status() == 1);
    }
}

#endif

TEST_SUITE_END();
