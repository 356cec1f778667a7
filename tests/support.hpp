// Helpers that several suites use: bytes as hex, HTTP requests and answers, a server on its own thread, and clients.
#pragma once

#include "../wschat.hpp"

#include <doctest/doctest.h>

#if !defined(_WIN32)
#include <sys/wait.h>
#endif
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

// clang 22 calls __COUNTER__, which the macros of doctest use, an extension.
#if defined(__has_warning)
#if __has_warning("-Wc2y-extensions")
#pragma clang diagnostic ignored "-Wc2y-extensions"
#endif
#endif

// For replaced operators new and delete: g++ warns that free() does not match operator new where it inlines one of them.
#if defined(__GNUC__)
#define WSCHAT_TEST_NOINLINE __attribute__((noinline))
#else
#define WSCHAT_TEST_NOINLINE
#endif

namespace test {

using namespace std::chrono_literals;

// The longest wait for an event, also on a busy machine. No test waits for a time to pass.
constexpr auto deadline = 30s;

// "81 05 48 65 6c 6c 6f" as bytes.
inline std::string hex(std::string_view digits) {
    std::string bytes;
    int high = -1;
    for (const char c : digits) {
        const int value = wschat::text::hex_value(c);
        if (value < 0) continue;
        if (high < 0) {
            high = value;
        } else {
            bytes += static_cast<char>(high * 16 + value);
            high = -1;
        }
    }
    return bytes;
}

inline std::string to_hex(std::string_view bytes) {
    std::string digits;
    for (const char c : bytes) {
        char two[4];
        std::snprintf(two, sizeof two, "%02x ", static_cast<unsigned>(static_cast<unsigned char>(c)));
        digits += two;
    }
    if (!digits.empty()) digits.pop_back();
    return digits;
}

// The 101 of a server.
inline std::string switching_protocols(std::string_view key, std::string_view subprotocol,
                                       std::string_view extensions = {}, std::string_view more_lines = {}) {
    std::string response;
    wschat::detail::switching_protocols(
        key, subprotocol, extensions, more_lines,
        [&](std::initializer_list<std::string_view> parts) { response = wschat::text::concat(parts); });
    return response;
}

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

// The value of a field of a flat JSON object, a string without its quotes; "" if the object does not have the field.
inline std::string field_of(const std::string& json, const std::string& name) {
    const std::size_t at = json.find("\"" + name + "\":");
    if (at == std::string::npos) return "";
    const std::size_t begin = at + name.size() + 3;
    if (json[begin] != '"') return json.substr(begin, json.find_first_of(",}", begin) - begin);
    return json.substr(begin + 1, json.find('"', begin + 1) - begin - 1);
}

inline std::string repeated(std::size_t count, std::string_view text) {
    std::string all;
    for (std::size_t i = 0; i < count; ++i) all += text;
    return all;
}

// Waits until a condition on the thread of the test holds. Returns false if the deadline passes first.
template <class Condition>
bool eventually(Condition condition) {
    const auto until = wschat::Clock::now() + deadline;
    while (!condition()) {
        if (wschat::Clock::now() > until) return false;
        std::this_thread::sleep_for(1ms);
    }
    return true;
}

// The message of the Error that the call throws; "" if it throws none.
template <class Call>
std::string error_of(Call&& call) {
    try {
        call();
    } catch (const wschat::Error& error) {
        return error.what();
    }
    return "";
}

struct Echo : wschat::WebSocketHandler {
    void on_message(const wschat::Message& m) override { write_message(m); }
};

// Joins the room "lobby" and broadcasts what it receives there.
struct LobbyMember : wschat::WebSocketHandler {
    void open() override { room("lobby").join(*this); }
    void on_message(const wschat::Message& m) override { room("lobby").broadcast(m); }
};

inline wschat::detail::MaskKey test_mask() { return {0x37, 0xfa, 0x21, 0x3d}; }

// A frame of a client: its first byte in hex, then the payload, masked with zeros. At most 125 bytes.
inline std::string masked_frame(std::string_view first_byte, std::string_view payload) {
    REQUIRE(payload.size() < 126);
    return hex(first_byte) + static_cast<char>(0x80 | payload.size()) + hex("00 00 00 00") + std::string(payload);
}
inline std::string masked_text(std::string_view text) { return masked_frame("81", text); }

// Removes all queued output from a connection and returns it.
inline std::string take_output(wschat::detail::Connection& connection) {
    std::string bytes;
    while (!connection.output().empty()) {
        std::string_view pieces[8];
        const std::size_t count = connection.output().gather(pieces, 8);
        std::size_t size = 0;
        for (std::size_t i = 0; i < count; ++i) {
            bytes += pieces[i];
            size += pieces[i].size();
        }
        connection.output().consume(size);
    }
    return bytes;
}

// The poller that the environment variable WSCHAT_TEST_POLLER selects.
inline wschat::PollerKind poller_kind() {
    const char* wanted = std::getenv("WSCHAT_TEST_POLLER");
    return wanted != nullptr && std::string(wanted) == "poll" ? wschat::PollerKind::poll
                                                              : wschat::PollerKind::automatic;
}

// The number of loops that the environment variable WSCHAT_TEST_THREADS gives to each server that does not ask for more
// than one.
inline unsigned loop_count();

// For a test that knows on which loop a handler is, or what one turn does: WSCHAT_TEST_THREADS has no effect in its scope.
class OneLoop {
public:
    OneLoop() { ++count(); }
    OneLoop(const OneLoop&) = delete;
    OneLoop& operator=(const OneLoop&) = delete;
    ~OneLoop() { --count(); }

private:
    friend unsigned loop_count();
    static int& count() {
        static int scopes = 0;
        return scopes;
    }
};

inline unsigned loop_count() {
    const char* wanted = std::getenv("WSCHAT_TEST_THREADS");
    return wanted != nullptr && OneLoop::count() == 0 ? static_cast<unsigned>(std::atoi(wanted)) : 1;
}

#if WSCHAT_OPENSSL

// With WSCHAT_TEST_TLS=1 every server of the tests listens with TLS, and every client uses TLS.
inline bool over_tls() {
    const char* wanted = std::getenv("WSCHAT_TEST_TLS");
    return wanted != nullptr && std::string(wanted) == "1";
}

// A self-signed certificate and its key, in files that the destructor removes. The program openssl makes them.
class CertificateFiles {
public:
    explicit CertificateFiles(const std::string& name,
                              const std::vector<std::string>& hosts = {"localhost", "127.0.0.1"},
                              const std::string& subject = "")
        : certificate("/tmp/wschat-" + std::to_string(::getpid()) + "-" + name + "-cert.pem"),
          key("/tmp/wschat-" + std::to_string(::getpid()) + "-" + name + "-key.pem") {
        renew(hosts, subject.empty() ? "/CN=" + hosts.front() : subject);
    }
    CertificateFiles(const CertificateFiles&) = delete;
    CertificateFiles& operator=(const CertificateFiles&) = delete;
    ~CertificateFiles() {
        ::unlink(certificate.c_str());
        ::unlink(key.c_str());
    }
    // Replaces both files.
    void renew(const std::vector<std::string>& hosts, const std::string& subject) const {
        std::string names;
        for (const std::string& host : hosts)
            names += (names.empty() ? "" : ",") + std::string(wschat::IpAddress::parse(host) ? "IP:" : "DNS:") + host;
        const std::string command =
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '" + subject +
            "' -addext 'subjectAltName=" + names + "' -keyout " + key + " -out " + certificate + " 2>/dev/null";
        REQUIRE(std::system(command.c_str()) == 0);
    }
    static void write(const std::string& path, std::string_view text) {
        std::FILE* file = std::fopen(path.c_str(), "we");
        REQUIRE(file != nullptr);
        std::fwrite(text.data(), 1, text.size(), file);
        std::fclose(file);
    }
    wschat::TlsOptions options() const { return {certificate, key}; }

    const std::string certificate;
    const std::string key;
};

inline void listen_tls(wschat::Server& server, std::string_view address) {
    static const CertificateFiles files("all");
    server.listen_tls(address, files.options());
}

// A TLS client that accepts any certificate.
inline std::unique_ptr<wschat::detail::Transport> client_transport(std::string_view host = "localhost") {
    wschat::ClientTls options;
    options.insecure_accept_any_certificate = true;
    static const auto context = std::make_shared<const wschat::detail::TlsContext>(options);
    return std::make_unique<wschat::detail::TlsTransport>(std::make_shared<wschat::detail::TlsBuffers>(), context,
                                                          host);
}

#else

constexpr bool over_tls() { return false; }
inline void listen_tls(wschat::Server&, std::string_view) {}
inline std::unique_ptr<wschat::detail::Transport> client_transport() { return nullptr; }

#endif

inline void listen(wschat::Server& server, std::string_view address = "0") {
    if (over_tls()) listen_tls(server, address);
    else server.listen(address);
}
inline std::string scheme() { return over_tls() ? "https" : "http"; }

inline wschat::ServerOptions with_limits(const wschat::Limits& limits, const wschat::ServerLimits& server_limits = {}) {
    wschat::ServerOptions options;
    options.limits = limits;
    options.server_limits = server_limits;
    return options;
}
inline wschat::ServerOptions with_server_limits(const wschat::ServerLimits& server_limits) {
    return with_limits({}, server_limits);
}
// Options of a server whose handshake deadline passes soon.
inline wschat::ServerOptions with_handshake_timeout(wschat::Duration timeout) {
    wschat::Limits limits;
    limits.handshake_timeout = timeout;
    return with_limits(limits);
}

inline std::string temporary_path(const std::string& name) {
    return "/tmp/wschat-" + std::to_string(::getpid()) + "-" + name;
}

// A file that is removed at the end of its scope.
class TemporaryFile {
public:
    explicit TemporaryFile(const std::string& name, std::string_view content = {}) : path(temporary_path(name)) {
        std::ofstream(path, std::ios::binary) << content;
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;
    ~TemporaryFile() { remove(); }
    void remove() const { ::unlink(path.c_str()); }

    const std::string path;
};

// A folder that is removed with its content at the end of its scope.
class TemporaryFolder {
public:
    TemporaryFolder() {
        char name[] = "/tmp/wschat-test-XXXXXX";
        REQUIRE(::mkdtemp(name) != nullptr);
        path_ = name;
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;
    ~TemporaryFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    std::string path() const { return path_.string() + "/"; }
    std::string write(const std::string& name, std::string_view content) const {
        std::filesystem::create_directories((path_ / name).parent_path());
        std::ofstream(path_ / name, std::ios::binary) << content;
        return (path_ / name).string();
    }
    std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

private:
    std::filesystem::path path_;
};

// More than the socket buffers of the kernel hold.
inline std::string large_content() {
    std::string content(20 * 1024 * 1024, '\0');
    for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 7 + i / 1000);
    return content;
}

#if !defined(_WIN32)
// Sets the handler of a signal until the destructor.
class Disposition {
public:
    Disposition(int signal, void (*handler)(int)) : signal_(signal) {
        struct sigaction action {};
        action.sa_handler = handler;
        ::sigaction(signal, &action, &before_);
    }
    Disposition(const Disposition&) = delete;
    Disposition& operator=(const Disposition&) = delete;
    ~Disposition() { ::sigaction(signal_, &before_, nullptr); }

private:
    int signal_;
    struct sigaction before_ {};
};

// The descriptors that a child program would inherit.
inline std::vector<int> inheritable_descriptors() {
    std::vector<int> found;
    for (int descriptor = 0; descriptor < 4096; ++descriptor) {
        const int flags = ::fcntl(descriptor, F_GETFD);
        if (flags != -1 && (flags & FD_CLOEXEC) == 0) found.push_back(descriptor);
    }
    return found;
}
#endif

// The log of a server as lines. Read it on the loop's thread, or when the server has stopped.
struct LogLines {
    void attach_to(wschat::Server& server) {
        server.on_log([this](const wschat::LogEntry& entry) { lines.push_back(to_string(entry)); });
    }
    bool has(std::string_view part) const {
        return std::any_of(lines.begin(), lines.end(), [&](const std::string& line) { return contains(line, part); });
    }
    std::vector<std::string> lines;
};

#if !defined(_WIN32)
// A server in a child process, which ends with the test.
class ServerProcess {
public:
    // In the child process, set_up(report) returns a server that listens. The child needs the descriptor `report` to
    // send its port.
    explicit ServerProcess(const std::function<std::unique_ptr<wschat::Server>(int report)>& set_up) {
        int report[2];
        REQUIRE(::pipe(report) == 0);
        pid_ = ::fork();
        if (pid_ == 0) {
            const auto server = set_up(report[1]);
            const int own_port = server->port();
            if (::write(report[1], &own_port, sizeof own_port) != sizeof own_port) ::_exit(1);
            server->run();
            ::_exit(0);
        }
        ::close(report[1]);
        const ssize_t size = ::read(report[0], &port_, sizeof port_);
        ::close(report[0]);
        REQUIRE(size == sizeof port_);
    }
    ServerProcess(const ServerProcess&) = delete;
    ServerProcess& operator=(const ServerProcess&) = delete;
    ~ServerProcess() {
        if (pid_ <= 0) return;
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
    }
    int port() const { return port_; }
    // Sends SIGTERM. Returns the wait status, and the resources that the process has used.
    int terminate(rusage& used) {
        int status = -1;
        ::kill(pid_, SIGTERM);
        ::wait4(std::exchange(pid_, -1), &status, 0, &used);
        return status;
    }

private:
    pid_t pid_ = -1;
    int port_ = 0;
};
#endif

// A server that runs on its own thread from start() to the end of its scope.
class RunningServer {
public:
    explicit RunningServer(wschat::ServerOptions options = {}) : server(with_test_poller(std::move(options))) {}
    RunningServer(const RunningServer&) = delete;
    RunningServer& operator=(const RunningServer&) = delete;
    ~RunningServer() { stop(); }

    // Listens on a port that the system picks, and runs.
    void start() {
        test::listen(server);
        run();
    }
    // Runs a server that listens already.
    void run() {
        if (port_ == 0) port_ = server.port();
        thread_ = std::thread([this] { server.run(); });
    }
    void stop(std::chrono::milliseconds grace = 2000ms) {
        if (!thread_.joinable()) return;
        server.shutdown(grace);
        thread_.join();
    }
    int port() const { return port_; }

    // Runs the function on the loop's thread and waits for its result.
    template <class Function>
    auto on_loop(Function function) -> decltype(function()) {
        using Result = decltype(function());
        std::mutex mutex;
        std::condition_variable changed;
        bool done = false;
        std::conditional_t<std::is_void_v<Result>, char, std::optional<Result>> result{};
        server.loop().post([&] {
            if constexpr (std::is_void_v<Result>) function();
            else result = function();
            const std::lock_guard<std::mutex> lock(mutex);
            done = true;
            changed.notify_one();
        });
        std::unique_lock<std::mutex> lock(mutex);
        if (!changed.wait_for(lock, deadline, [&] { return done; }))
            throw std::runtime_error("the loop does not answer");
        if constexpr (!std::is_void_v<Result>) return std::move(*result);
    }
    wschat::Metrics metrics() {
        return on_loop([this] { return server.metrics(); });
    }
    // Waits until a condition on the loop's thread holds.
    template <class Condition>
    bool eventually(Condition condition) {
        const auto until = wschat::Clock::now() + deadline;
        while (!on_loop(condition)) {
            if (wschat::Clock::now() > until) return false;
            std::this_thread::sleep_for(2ms);
        }
        return true;
    }

    wschat::Server server;

private:
    static wschat::ServerOptions with_test_poller(wschat::ServerOptions options) {
        options.poller = poller_kind();
        options.handle_signals = false;
        if (options.threads == 1) options.threads = loop_count();
        return options;
    }

    std::thread thread_;
    int port_ = 0;
};

// Blocks a server's loop until release(). The loop then finds the work of all peers at once.
class BlockedLoop {
public:
    explicit BlockedLoop(wschat::Server& server) {
        server.loop().post([state = state_] {
            state->blocked = true;
            while (!state->released) std::this_thread::yield();
        });
        while (!state_->blocked) std::this_thread::yield();
    }
    BlockedLoop(const BlockedLoop&) = delete;
    BlockedLoop& operator=(const BlockedLoop&) = delete;
    ~BlockedLoop() { release(); }
    void release() { state_->released = true; }

private:
    struct State {
        std::atomic<bool> blocked{false}, released{false};
    };
    const std::shared_ptr<State> state_ = std::make_shared<State>();
};

// A server that runs one handler at "/", from its constructor on.
template <class Handler>
class HandlerServer : public RunningServer {
public:
    template <class... Args>
    explicit HandlerServer(wschat::ServerOptions options = {}, Args... args) : RunningServer(std::move(options)) {
        server.route<Handler>("/", args...);
        start();
    }
};
using EchoServer = HandlerServer<Echo>;

// A connection that reads and writes bytes, each with a deadline. It uses TLS if over_tls() is true.
class RawClient {
public:
    explicit RawClient(int port) : RawClient(connect_to(port)) {}
    explicit RawClient(wschat::detail::Socket socket)
        : RawClient(std::move(socket), over_tls() ? client_transport() : nullptr) {}
    RawClient(wschat::detail::Socket socket, std::unique_ptr<wschat::detail::Transport> transport)
        : socket_(std::move(socket)), transport_(std::move(transport)) {}
    // Never uses TLS.
    static RawClient plain(int port) { return RawClient(connect_to(port), nullptr); }
    // Always uses TLS.
    static RawClient encrypted(int port) { return RawClient(connect_to(port), client_transport()); }
    explicit operator bool() const { return static_cast<bool>(socket_); }
    int descriptor() const { return socket_.descriptor(); }

    void send(std::string_view bytes) {
        while (!bytes.empty()) {
            const wschat::detail::IoResult sent = transport_ ? send_encrypted(&bytes, 1) : send_plain(bytes);
            if (sent.outcome == wschat::detail::IoResult::Outcome::error) return;
            bytes.remove_prefix(sent.size);
            if (bytes.empty()) return;
            if (transport_ && !established() ? !continue_handshake() : !wait(POLLOUT)) return;
        }
    }
    // Reads until `received` contains the text. Returns false at the end of the stream and at the deadline.
    bool read_until(std::string_view text) {
        while (!contains(received, text))
            if (!read_some()) return false;
        return true;
    }
    bool read_at_least(std::size_t size) {
        while (received.size() < size)
            if (!read_some()) return false;
        return true;
    }
    // Reads to the end of the stream. Returns false if the deadline passes first.
    bool read_to_end() {
        while (read_some()) {
        }
        return ended;
    }
    void shutdown_send() {
        end_transport();
        socket_.shutdown_send();
    }
    // Closes with a reset instead of a FIN.
    void reset() {
        const linger at_once{1, 0};
        ::setsockopt(socket_.descriptor(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        socket_.close();
    }
    void close() {
        end_transport();
        socket_.close();
    }
    wschat::detail::Socket& socket() { return socket_; }
    wschat::detail::Transport* transport() { return transport_.get(); }

    // Waits for input and reads it once. Returns false at the end of the stream and at the deadline.
    bool read_some() {
        constexpr std::size_t size = 256 * 1024;
        const std::unique_ptr<char[]> buffer(new char[size]);  // a vector would fill it for each read
        for (;;) {
            const wschat::detail::IoResult got = receive(buffer.get(), size);
            if (got.outcome == wschat::detail::IoResult::Outcome::done) {
                received.append(buffer.get(), got.size);
                return true;
            }
            if (got.outcome == wschat::detail::IoResult::Outcome::would_block) {
                if (!wait_for_input()) return false;
                continue;
            }
            ended = true;
            reset_by_peer = got.outcome == wschat::detail::IoResult::Outcome::error;
            return false;
        }
    }

    std::string received;
    bool ended = false;              // by a FIN or by a reset
    bool reset_by_peer = false;      // by a reset
    wschat::detail::WireCount wire;  // the bytes on the socket, with TLS

private:
    wschat::detail::IoResult send_plain(std::string_view bytes) {
        const wschat::detail::IoResult sent = socket_.send(&bytes, 1);
        wire.sent += sent.size;
        return sent;
    }
    wschat::detail::IoResult receive(char* data, std::size_t size) {
        if (transport_) {
            const std::lock_guard<std::mutex> lock(*mutex_);
            return transport_->receive(socket_, data, size, wire);
        }
        const wschat::detail::IoResult got = socket_.receive(data, size);
        wire.received += got.size;
        return got;
    }
    wschat::detail::IoResult send_encrypted(const std::string_view* pieces, std::size_t count) {
        const std::lock_guard<std::mutex> lock(*mutex_);
        return transport_->send(socket_, pieces, count, wire);
    }
    bool established() const {
        const std::lock_guard<std::mutex> lock(*mutex_);
        return transport_->established();
    }
    bool wants_write() const {
        const std::lock_guard<std::mutex> lock(*mutex_);
        return transport_ && transport_->wants_write();
    }
    // The next step of the handshake. Application data that arrives with it is appended to `received`.
    bool continue_handshake() {
        char bytes[4096];
        const wschat::detail::IoResult got = receive(bytes, sizeof bytes);
        if (got.outcome == wschat::detail::IoResult::Outcome::done) received.append(bytes, got.size);
        if (got.outcome == wschat::detail::IoResult::Outcome::would_block && !established()) return wait_for_input();
        return got.outcome == wschat::detail::IoResult::Outcome::done || established();
    }
    // Sends queued TLS records first, because the server waits for them.
    bool wait_for_input() {
        if (wants_write() && send_encrypted(nullptr, 0).outcome == wschat::detail::IoResult::Outcome::would_block)
            return wait(POLLIN | POLLOUT);
        return wait(POLLIN);
    }
    void end_transport() {
        if (transport_ && socket_) transport_->end(socket_, wire);
    }
    bool wait(short events) {
        pollfd entry{socket_.descriptor(), events, 0};
        return ::poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(deadline).count())) > 0;
    }
    static wschat::detail::Socket connect_to(int port) {
        wschat::detail::Socket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_port = htons(static_cast<std::uint16_t>(port));
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return {};
        wschat::detail::os::make_nonblocking(socket.descriptor());
        return socket;
    }

    wschat::detail::Socket socket_;
    std::unique_ptr<wschat::detail::Transport> transport_;
    std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  // some tests send from another thread
};

// RFC 6455 1.3: the key of the sample handshake.
constexpr const char* handshake_key = "dGhlIHNhbXBsZSBub25jZQ==";

// A request for an upgrade on "/".
inline std::string upgrade_request(std::string_view headers = {}) {
    std::string request = wschat::detail::handshake_request("x", "/", handshake_key);
    request.insert(request.size() - 2, headers);
    return request;
}

// RFC 6455 5.7: "Hello", masked by a client and unmasked by a server.
inline const std::string hello_masked = hex("81 85 37 fa 21 3d 7f 9f 4d 51 58");
inline const std::string hello_unmasked = hex("81 05 48 65 6c 6c 6f");

inline std::string request(std::string_view target, std::string_view headers = {}, std::string_view method = "GET") {
    return std::string(method) + " " + std::string(target) + " HTTP/1.1\r\nHost: x\r\n" + std::string(headers) + "\r\n";
}

// An HTTP answer of a server.
struct Answer {
    int status = 0;  // 0: no complete answer
    std::string head, body;

    std::string header(std::string_view name) const {
        const wschat::Fields fields(std::string_view(head).substr(head.find('\n') + 1));
        return std::string(fields.find(name).value_or(""));
    }
};

// Reads the next answer of a connection and removes it from `received`. The answer to HEAD has no body.
inline Answer next_answer(RawClient& client, bool to_head = false) {
    Answer answer;
    if (!client.read_until("\r\n\r\n")) return answer;
    const std::size_t head_size = client.received.find("\r\n\r\n") + 4;
    answer.head = client.received.substr(0, head_size);
    const int status = std::atoi(answer.head.substr(9, 3).c_str());
    const auto length = wschat::text::parse_unsigned(answer.header("content-length"), UINT64_MAX);
    const std::size_t body_size = to_head || !length ? 0 : static_cast<std::size_t>(*length);
    if (!client.read_at_least(head_size + body_size)) return answer;
    answer.body = client.received.substr(head_size, body_size);
    client.received.erase(0, head_size + body_size);
    answer.status = status;
    return answer;
}

// Sends one request on a connection of its own.
inline Answer fetch(int port, std::string_view target, std::string_view headers = {}, std::string_view method = "GET") {
    RawClient client(port);
    client.send(request(target, headers, method));
    return next_answer(client, method == "HEAD");
}

// True if the bytes are one complete HTTP answer with that status, and its body is a sentence.
inline bool is_refusal(std::string_view bytes, int status) {
    const std::size_t end = bytes.find("\r\n\r\n");
    if (bytes.substr(0, 13) != "HTTP/1.1 " + std::to_string(status) + " " || end == std::string_view::npos)
        return false;
    const std::string_view body = bytes.substr(end + 4);
    return body.size() > 10 && body.substr(body.size() - 2) == ".\n" &&
           contains(bytes, "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n");
}

// A WebSocket client: the protocol section in the role of a client. It offers compression if it gets options for it.
class WsClient {
public:
    explicit WsClient(int port, std::string_view target = "/", std::string_view extra_headers = {},
                      const std::optional<wschat::CompressionOptions>& compression = std::nullopt)
        : raw(port) {
        const std::string offer = compression ? pool.offer(*compression) : std::string();
        std::string request =
            wschat::detail::handshake_request("127.0.0.1:" + std::to_string(port), target, key, {}, offer);
        request.insert(request.size() - 2, extra_headers);
        raw.send(request);
        if (!raw.read_until("\r\n\r\n")) return;
        const std::size_t end = raw.received.find("\r\n\r\n") + 4;
        head = raw.received.substr(0, end);
        raw.received.erase(0, end);
        if (!wschat::detail::handshake_response_error(head, key, subprotocols(extra_headers), !offer.empty()).empty())
            return;
        auto agreed = compression ? pool.read_response(wschat::Fields(head), *compression, error) : nullptr;
        if (!error.empty()) return;
        compressed = agreed != nullptr;
        connection.open(wschat::detail::Role::client, limits, arena, wschat::Clock::now(), &test_mask,
                        std::move(agreed));
        // Frames can arrive together with the answer.
        if (!raw.received.empty()) connection.receive(&raw.received[0], raw.received.size(), wschat::Clock::now());
    }
    WsClient(const WsClient&) = delete;
    WsClient& operator=(const WsClient&) = delete;

    bool is_open() const { return connection.is_open(); }
    void send(std::string_view text, wschat::Opcode opcode = wschat::Opcode::text) {
        connection.send(opcode, text);
        flush();
    }
    void ping(std::string_view payload) {
        connection.send_control(wschat::Opcode::ping, payload);
        flush();
    }
    void close(wschat::CloseCode code = wschat::CloseCode::normal, std::string_view reason = {}) {
        connection.close(code, reason, wschat::Clock::now());
        flush();
    }
    // The next message or pong. Returns nullopt if the connection ends or the deadline passes first.
    std::optional<std::string> next(wschat::detail::Event::Kind kind = wschat::detail::Event::Kind::message) {
        for (;;) {
            const wschat::detail::Event event = connection.next_event();
            flush();
            if (event.kind == kind) return std::string(event.message.data());
            if (event.kind == wschat::detail::Event::Kind::close) return std::nullopt;
            if (event.kind != wschat::detail::Event::Kind::none) continue;
            raw.received.clear();
            if (!raw.read_some()) {
                connection.receive_eof("the server hung up");
                continue;
            }
            connection.receive(&raw.received[0], raw.received.size(), wschat::Clock::now());
        }
    }
    // Reads until the connection is closed, and returns the close code.
    wschat::CloseCode close_code() {
        while (next()) {
        }
        return connection.close_code();
    }
    void flush() { raw.send(take_output(connection)); }

    static constexpr const char* key = handshake_key;
    RawClient raw;
    std::string head;         // of the server's answer
    bool compressed = false;  // the server has accepted the offer of compression
    std::string error;        // of a server that accepts what the client did not offer
    wschat::Limits limits = generous_limits();
    wschat::detail::SendArena arena;
    wschat::detail::CompressionPool pool;
    wschat::detail::Connection connection;

private:
    static wschat::Limits generous_limits() {
        wschat::Limits limits;
        limits.max_message_size = limits.max_backlog = 256 * 1024 * 1024;
        limits.control_frames_per_second = 0;
        return limits;
    }
    static std::string_view subprotocols(std::string_view headers) {
        const std::size_t at = headers.find("Sec-WebSocket-Protocol: ");
        if (at == std::string_view::npos) return {};
        headers.remove_prefix(at + 24);
        return headers.substr(0, headers.find('\r'));
    }
};

// The next message that contains the text, or a sentence if the connection ends first.
inline std::string next_with(WsClient& client, std::string_view part) {
    for (int i = 0; i < 10'000; ++i) {
        const auto message = client.next();
        if (!message) return "the connection has ended";
        if (contains(*message, part)) return *message;
    }
    return "no such message";
}

// ---- peers that read late ------------------------------------------------------------------------------------------

// Sizes around those of all buffers between two peers: the lengths of frames, the chunks of queues, the records of TLS,
// the buffer for input, and these with the bytes that a frame, a record or compression adds.
inline std::vector<std::size_t> sizes_around_buffers() {
    std::vector<std::size_t> sizes = {0, 1};
    for (const std::size_t limit : {126u, 4096u, 16'384u, 32'768u, 65'536u, 131'072u}) {
        for (const std::size_t less : {29u, 22u, 14u, 10u, 8u, 5u, 4u, 2u, 1u, 0u}) sizes.push_back(limit - less);
        sizes.push_back(limit + 1);
    }
    return sizes;
}
// Bytes that do not compress. The messages of all sizes have different ones.
inline std::string bytes_of_size(std::size_t size) {
    std::uint32_t state = static_cast<std::uint32_t>(size) * 2654435761u + 1;
    std::string bytes(size, ' ');
    for (char& c : bytes) c = static_cast<char>((state = state * 1664525u + 1013904223u) >> 24);
    return bytes;
}
// The kernel does not take it if nobody reads.
inline const std::string& more_than_kernel_takes() {
    static const std::string bytes = bytes_of_size(8'000'000);
    return bytes;
}
// Without pings, whose answers would disturb a thread that sends.
inline wschat::ServerOptions without_pings() {
    wschat::ServerOptions options;
    options.limits.ping_interval = options.limits.handshake_timeout = wschat::Duration::zero();
    return options;
}

// The answers of a server that sends back each message, and more_than_kernel_takes() for the message "large". The client
// begins to read when the server holds a part of that, and when messages of all sizes are on their way behind it.
// Returns what is wrong, or an empty text.
inline std::string complaint_of_late_reader(RunningServer& running, WsClient& client) {
    if (!client.is_open()) return "the connection is not open";
    client.connection.send(wschat::Opcode::binary, "large");
    for (const std::size_t size : sizes_around_buffers())
        client.connection.send(wschat::Opcode::binary, bytes_of_size(size));
    const std::string bytes = take_output(client.connection);
    std::thread sender([&] { client.raw.send(bytes); });
    std::string complaint;
    if (!running.eventually([&] { return running.server.metrics().backlog_bytes > 64 * 1024; }))
        complaint = "the server holds nothing";
    if (client.next() != more_than_kernel_takes()) complaint = "the first answer is wrong";
    for (const std::size_t size : sizes_around_buffers()) {
        if (!complaint.empty()) break;
        if (client.next() != bytes_of_size(size)) complaint = "wrong after " + std::to_string(size) + " bytes";
    }
    if (!complaint.empty()) client.raw.shutdown_send();
    sender.join();
    return complaint;
}
// A handler for it.
struct LateEcho : wschat::WebSocketHandler {
    void on_message(const wschat::Message& m) override {
        write_binary(m.data() == "large" ? std::string_view(more_than_kernel_takes()) : m.data());
    }
};

}  // namespace test
