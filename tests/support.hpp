// What the suites share: bytes as hex, a connection without a socket, a server on a thread of its own, and plain clients.
#pragma once

#include "../wschat.hpp"

#include <doctest/doctest.h>

#if !defined(_WIN32)
#include <sys/wait.h>
#endif
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <thread>

namespace test {

using namespace std::chrono_literals;

// Every wait for an event gives up after that; nothing waits for a time to pass.
constexpr auto deadline = 20s;

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

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

// The sentence of the Error that the call throws; "" if it throws none.
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

// What a connection has queued, taken out.
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

// The poller that WSCHAT_TEST_POLLER asks for.
inline wschat::PollerKind poller_kind() {
    const char* wanted = std::getenv("WSCHAT_TEST_POLLER");
    return wanted != nullptr && std::string(wanted) == "poll" ? wschat::PollerKind::poll
                                                              : wschat::PollerKind::automatic;
}

#if WSCHAT_OPENSSL

// Whether every server of the tests listens with TLS and every client speaks it, as WSCHAT_TEST_TLS=1 asks for.
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

// A client's side of TLS that takes the server for who it says it is.
inline std::unique_ptr<wschat::detail::Transport> client_transport(std::string_view host = "localhost") {
    wschat::detail::TlsClientOptions options;
    options.accept_any_certificate = true;
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

#if !defined(_WIN32)
// A process of ours, which is gone with the test.
class Child {
public:
    explicit Child(pid_t pid) : pid_(pid) {}
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;
    ~Child() {
        if (pid_ <= 0) return;
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
    }
    // Its status after a SIGTERM, and what it has used.
    int terminate(rusage& used) {
        int status = -1;
        ::kill(pid_, SIGTERM);
        ::wait4(std::exchange(pid_, -1), &status, 0, &used);
        return status;
    }

private:
    pid_t pid_;
};
#endif

// A server that runs on a thread of its own from start() on, and has shut down when this is gone.
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
    // Where the test has called listen() itself.
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
        return options;
    }

    std::thread thread_;
    int port_ = 0;
};

// A connection of a test, over TLS where that is asked for, which reads with a deadline.
class RawClient {
public:
    explicit RawClient(int port) : RawClient(connect_to(port)) {}
    explicit RawClient(wschat::detail::Socket socket)
        : RawClient(std::move(socket), over_tls() ? client_transport() : nullptr) {}
    RawClient(wschat::detail::Socket socket, std::unique_ptr<wschat::detail::Transport> transport)
        : socket_(std::move(socket)), transport_(std::move(transport)) {}
    // A plain one, also where all others are not.
    static RawClient plain(int port) { return RawClient(connect_to(port), nullptr); }
    explicit operator bool() const { return static_cast<bool>(socket_); }

    void send(std::string_view bytes) {
        while (!bytes.empty()) {
            const wschat::detail::IoResult sent = transport_ ? offer(&bytes, 1) : counted(bytes);
            if (sent.outcome == wschat::detail::IoResult::Outcome::error) return;
            bytes.remove_prefix(sent.size);
            if (bytes.empty()) return;
            if (transport_ && !established() ? !shake_hands() : !wait(POLLOUT)) return;
        }
    }
    // Reads until the bytes that have come hold what is wanted, or the stream ends; answers whether they do.
    bool read_until(std::string_view wanted) {
        while (received.find(wanted) == std::string::npos)
            if (!read_some()) return false;
        return true;
    }
    bool read_at_least(std::size_t size) {
        while (received.size() < size)
            if (!read_some()) return false;
        return true;
    }
    // Reads to the end of the stream; false where the deadline came first.
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
        const linger now{1, 0};
        ::setsockopt(socket_.descriptor(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
        socket_.close();
    }
    void close() {
        end_transport();
        socket_.close();
    }
    wschat::detail::Socket& socket() { return socket_; }
    wschat::detail::Transport* transport() { return transport_.get(); }

    // Reads what is there, waiting for the first of it; false at the end and at the deadline.
    bool read_some() {
        std::vector<char> buffer(256 * 1024);
        for (;;) {
            const wschat::detail::IoResult got = receive(buffer.data(), buffer.size());
            if (got.outcome == wschat::detail::IoResult::Outcome::done) {
                received.append(buffer.data(), got.size);
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
    bool ended = false;              // the peer has closed, one way or the other
    bool reset_by_peer = false;      // with a reset
    wschat::detail::WireCount wire;  // what went through the socket

private:
    wschat::detail::IoResult counted(std::string_view bytes) {
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
    wschat::detail::IoResult offer(const std::string_view* pieces, std::size_t count) {
        const std::lock_guard<std::mutex> lock(*mutex_);
        return transport_->send(socket_, pieces, count, wire);
    }
    bool established() const {
        const std::lock_guard<std::mutex> lock(*mutex_);
        return transport_->established();
    }
    bool owes() const {
        const std::lock_guard<std::mutex> lock(*mutex_);
        return transport_ && transport_->wants_write();
    }
    // The next step of the handshake; application data that comes with it is kept.
    bool shake_hands() {
        char bytes[4096];
        const wschat::detail::IoResult got = receive(bytes, sizeof bytes);
        if (got.outcome == wschat::detail::IoResult::Outcome::done) received.append(bytes, got.size);
        if (got.outcome == wschat::detail::IoResult::Outcome::would_block && !established()) return wait_for_input();
        return got.outcome == wschat::detail::IoResult::Outcome::done || established();
    }
    // What the server waits for goes out first.
    bool wait_for_input() {
        if (owes() && offer(nullptr, 0).outcome == wschat::detail::IoResult::Outcome::would_block)
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
    std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  // some tests send from a thread of their own
};

// A WebSocket client of a test, made of the protocol section in its other role. It offers compression where it is given
// options for it.
class Client {
public:
    explicit Client(int port, std::string_view target = "/", std::string_view extra_headers = {},
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
        // Frames may have come together with the answer.
        if (!raw.received.empty()) connection.receive(&raw.received[0], raw.received.size(), wschat::Clock::now());
    }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;

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
    // The next message or pong; nothing where the connection ends or the deadline comes first.
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
    // Reads to the end of the connection and answers the close code.
    wschat::CloseCode close_code() {
        while (next()) {
        }
        return connection.close_code();
    }
    void flush() { raw.send(take_output(connection)); }

    static constexpr const char* key = "dGhlIHNhbXBsZSBub25jZQ==";
    RawClient raw;
    std::string head;         // of the server's answer
    bool compressed = false;  // the server has agreed to it
    std::string error;        // or to what was not offered
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

// The next message that contains the text; a sentence if the connection ends first.
inline std::string next_with(Client& client, std::string_view part) {
    for (int i = 0; i < 10'000; ++i) {
        const auto message = client.next();
        if (!message) return "the connection has ended";
        if (contains(*message, part)) return *message;
    }
    return "no such message";
}

}  // namespace test
