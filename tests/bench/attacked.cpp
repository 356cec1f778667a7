// How much CPU time a server spends between the request of one honest client and the answer, beside 100 attackers.
//
//   attacked [KIND]        all kinds, or one
//
// The server is a process of its own. In each round it is stopped (SIGSTOP) while each attacker sends as much as the
// kernel takes; then the honest client sends its message, and the server continues (SIGCONT) with all of that in its
// sockets. The figure is the CPU time of the server, user and system, from there to the answer. This is the worst case:
// in a running server the bytes arrive bit by bit.
#define WSCHAT_CHAT 1
#include "../../wschat.hpp"

#include "attack.hpp"
#include "load_support.hpp"

#include <sys/wait.h>

#include <csignal>
#include <fstream>

#include <openssl/ssl.h>

const load_support::Program load_support::program = {"attacked", 1};

namespace {

using attack::frame;
using attack::repeated;
using load_support::fail;

constexpr std::size_t attackers = 100;
constexpr int rounds = 5;

// ---- the server ----------------------------------------------------------------------------------------------------

struct Echo : wschat::WebSocketHandler {
    void on_message(const wschat::Message& m) override { write_message(m); }
};
struct Sink : wschat::WebSocketHandler {
    void on_message(const wschat::Message&) override {}
    std::optional<wschat::CompressionOptions> get_compression_options() override {
        return wschat::CompressionOptions();
    }
};
struct Member : wschat::WebSocketHandler {
    void open() override { room("all").join(*this); }
    void on_message(const wschat::Message& m) override { room("all").broadcast(m); }
};

// A chat whose users have many addresses, so only the limits of each connection apply. Its room "old" has long
// messages, and its room "loved" has messages with as many reactions as the store keeps.
void add_chat(wschat::Server& server) {
    using wschat::ChatHub;
    ChatHub& hub = ChatHub::of(server);
    hub.limits.address = wschat::FloodRates();
    hub.limits.address_replies = hub.limits.address_fan_out = hub.limits.address_facts = wschat::Rate();
    for (int i = 0; i < 200; ++i) hub.room("old").publish(std::string(5000, 'x'), "Anna");
    for (int i = 0; i < 2; ++i) hub.room("loved").publish("x", "Anna");
    for (std::uint64_t target = 1; target <= 2; ++target) {
        wschat::ChatEntry reaction;
        reaction.kind = wschat::ChatEntry::Kind::react;
        reaction.room = "loved";
        reaction.target = target;
        reaction.name = reaction.author = "Bert";
        for (int i = 0; i < 499; ++i) {
            reaction.text = std::to_string(i);
            hub.store().append(reaction);
        }
    }
    server.route<wschat::ChatHandler>("/chat/{room}");
}

// Serves until the process is killed. Reports its port.
[[noreturn]] void serve(int report, const std::string& folder, bool tls) try {
    wschat::ServerOptions options;
    options.limits.ping_interval = options.limits.handshake_timeout = std::chrono::hours(1);
    wschat::Server server(options);
    server.route<Echo>("/");
    server.route<Sink>("/sink");
    server.route<Member>("/room");
    server.get("/page", [](const wschat::Request&) { return wschat::Response(200, "page"); });
    server.post("/form", [](const wschat::Request& request) {
        return wschat::Response(200, request.form("last").value_or("") + request.form("absent").value_or(""));
    });
    server.post("/files", [](const wschat::Request& request) {
        return wschat::Response(200, std::to_string(request.form_parts().size()));
    });
    add_chat(server);
    server.file("/file", folder + "/file");
    if (tls) server.listen_tls(0, {folder + "/cert.pem", folder + "/key.pem"});
    else server.listen(0);
    const int port = server.port();
    if (::write(report, &port, sizeof port) != sizeof port) std::exit(1);
    server.run();
    std::exit(0);
} catch (const wschat::Error& error) {
    fail("%s", error.what());
}

class ServerProcess {
public:
    ServerProcess(const std::string& folder, bool tls) {
        int report[2];
        if (::pipe(report) != 0) fail("pipe: %s", std::strerror(errno));
        pid_ = ::fork();
        if (pid_ == 0) serve(report[1], folder, tls);
        ::close(report[1]);
        if (::read(report[0], &port_, sizeof port_) != sizeof port_) fail("the server does not start");
        ::close(report[0]);
        if (::clock_getcpuclockid(pid_, &clock_) != 0) fail("no clock for the server's CPU time");
    }
    ServerProcess(const ServerProcess&) = delete;
    ServerProcess& operator=(const ServerProcess&) = delete;
    ~ServerProcess() {
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
    }
    int port() const { return port_; }
    double cpu_ms() const {
        timespec time{};
        ::clock_gettime(clock_, &time);
        return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) / 1e6;
    }
    void stop() const {
        int status = 0;
        ::kill(pid_, SIGSTOP);
        ::waitpid(pid_, &status, WUNTRACED);
        if (!WIFSTOPPED(status)) fail("the server has ended");
    }
    void resume() const { ::kill(pid_, SIGCONT); }

private:
    pid_t pid_ = -1;
    int port_ = 0;
    clockid_t clock_{};
};

// ---- clients -------------------------------------------------------------------------------------------------------

// A connection whose reads wait, with TLS or without. What it writes with flood() does not wait.
class Peer {
public:
    Peer(const ServerProcess& server, bool tls) : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        const sockaddr_in address = load_support::loopback_address(0, static_cast<std::uint16_t>(server.port()));
        if (::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
            fail("connect: %s", std::strerror(errno));
        const int on = 1;
        ::setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (!tls) return;
        static SSL_CTX* const context = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
        ssl_ = SSL_new(context);
        SSL_set_bio(ssl_, BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
        SSL_set_connect_state(ssl_);
    }
    Peer(Peer&& other) noexcept : socket_(std::exchange(other.socket_, -1)), ssl_(std::exchange(other.ssl_, nullptr)) {}
    Peer& operator=(Peer&&) = delete;
    ~Peer() {
        if (socket_ >= 0) ::close(socket_);
        SSL_free(ssl_);
    }

    // As much as the kernel takes at once.
    std::size_t flood(std::string_view bytes) const {
        std::size_t all = 0;
        while (all < bytes.size()) {
            const ssize_t sent = ::send(socket_, bytes.data() + all, bytes.size() - all, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (sent <= 0) break;
            all += static_cast<std::size_t>(sent);
        }
        return all;
    }
    void send(std::string_view bytes) {
        if (ssl_ == nullptr) return send_all(bytes);
        while (SSL_write(ssl_, bytes.data(), static_cast<int>(bytes.size())) <= 0) pump();
        send_all(encrypted());
    }
    void read_until(std::string_view text) {
        while (received_.find(text) == std::string::npos) {
            char bytes[64 * 1024];
            if (ssl_ == nullptr) {
                const ssize_t got = ::recv(socket_, bytes, sizeof bytes, 0);
                if (got <= 0) fail("the server has hung up");
                received_.append(bytes, static_cast<std::size_t>(got));
                continue;
            }
            const int got = SSL_read(ssl_, bytes, sizeof bytes);
            if (got > 0) received_.append(bytes, static_cast<std::size_t>(got));
            else pump();
        }
        received_.clear();
    }
    void upgrade(std::string_view target, std::string_view headers = {}) {
        std::string request = wschat::detail::handshake_request("x", target, "dGhlIHNhbXBsZSBub25jZQ==");
        request.insert(request.size() - 2, headers);
        send(request);
        read_until("\r\n\r\n");
    }
    // The records of n requests for new keys, each of which the server must answer.
    std::string key_updates(int n) {
        for (int i = 0; i < n; ++i)
            if (SSL_key_update(ssl_, SSL_KEY_UPDATE_REQUESTED) != 1 || SSL_do_handshake(ssl_) != 1)
                fail("no KeyUpdate");
        return encrypted();
    }
    std::string client_hello() {
        SSL_do_handshake(ssl_);
        return encrypted();
    }

private:
    void send_all(std::string_view bytes) const {
        while (!bytes.empty()) {
            const ssize_t sent = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (sent <= 0) fail("send: %s", std::strerror(errno));
            bytes.remove_prefix(static_cast<std::size_t>(sent));
        }
    }
    std::string encrypted() {
        std::string bytes(static_cast<std::size_t>(BIO_pending(SSL_get_wbio(ssl_))), '\0');
        if (!bytes.empty()) BIO_read(SSL_get_wbio(ssl_), bytes.data(), static_cast<int>(bytes.size()));
        return bytes;
    }
    // The next step of TLS needs the server.
    void pump() {
        send_all(encrypted());
        char bytes[16 * 1024];
        const ssize_t got = ::recv(socket_, bytes, sizeof bytes, 0);
        if (got <= 0) fail("the server has hung up");
        BIO_write(SSL_get_rbio(ssl_), bytes, static_cast<int>(got));
    }

    int socket_;
    SSL* ssl_ = nullptr;
    std::string received_;
};

// ---- the attacks ---------------------------------------------------------------------------------------------------

// About a thousand bytes that inflate to one megabyte.
std::string bomb() {
    wschat::detail::Deflater deflater(9, 9, 15);
    wschat::detail::Bytes block;
    return frame("\xc2", deflater.deflate(std::string(1024 * 1024, '\0'), block, false));
}

std::string post(std::string_view target, std::string_view type, const std::string& body) {
    return wschat::text::concat({"POST ", target, " HTTP/1.1\r\nHost: x\r\nContent-Type: ", type,
                                 "\r\nContent-Length: ", std::to_string(body.size()), "\r\n\r\n", body});
}

struct Attack {
    const char* name;
    bool tls;
    std::size_t peers;            // in each round
    bool connect_early;           // before the server is stopped
    const char* target;           // of a WebSocket, or empty
    const char* headers;          // of its request
    std::string (*bytes)(Peer&);  // that a peer sends while the server is stopped
};

constexpr std::size_t kernel_takes = 256 * 1024;

const Attack attacks[] = {
    {"none", false, attackers, true, "", "", [](Peer&) { return std::string(); }},
    {"compression", false, attackers, true, "/sink", "Sec-WebSocket-Extensions: permessage-deflate\r\n",
     [](Peer&) {
         static const std::string bytes = repeated(bomb(), kernel_takes);
         return bytes;
     }},
    {"unread files", false, attackers, true, "", "",
     [](Peer&) { return std::string("GET /file HTTP/1.1\r\nHost: x\r\n\r\n"); }},
    {"small messages", false, attackers, true, "/", "",
     [](Peer&) { return repeated(frame("\x81", "x"), kernel_takes); }},
    {"small messages to a room", false, attackers, true, "/room", "",
     [](Peer&) { return repeated(frame("\x81", "x"), kernel_takes); }},
    {"large messages", false, attackers, true, "/sink", "",
     [](Peer&) { return repeated(frame("\x82", std::string(60'000, 'x')), kernel_takes); }},
    {"empty fragments", false, attackers, true, "/sink", "",
     [](Peer&) {
         return repeated(frame("\x01", "") + repeated(frame({"\0", 1}, ""), 6000) + frame("\x80", ""), kernel_takes);
     }},
    {"connects", false, 10 * attackers, false, "", "", [](Peer&) { return std::string(); }},
    {"upgrades", false, 10 * attackers, false, "", "",
     [](Peer&) { return wschat::detail::handshake_request("x", "/", "dGhlIHNhbXBsZSBub25jZQ=="); }},
    {"pipelined requests", false, attackers, true, "", "",
     [](Peer&) { return repeated("GET /page HTTP/1.1\r\nHost: x\r\n\r\n", kernel_takes); }},
    {"paths of slashes", false, attackers, true, "", "",
     [](Peer&) { return repeated("GET /" + std::string(8000, '/') + " HTTP/1.1\r\nHost: x\r\n\r\n", kernel_takes); }},
    {"forms", false, attackers, true, "", "",
     [](Peer&) { return post("/form", "application/x-www-form-urlencoded", repeated("a=%41&", 200'000) + "last=1"); }},
    {"forms with files", false, attackers, true, "", "",
     [](Peer&) {
         const char* const part = "--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\n\r\n";
         return post("/files", "multipart/form-data; boundary=x", repeated(part, 60'000) + "--x--");
     }},
    {"chat: messages", false, attackers, true, "/chat/tea", "",
     [](Peer&) { return repeated(frame("\x81", std::string(3000, 'x')), 60'000); }},
    {"chat: reads", false, attackers, true, "/chat/old", "",
     [](Peer&) { return repeated(frame("\x81", "/before 999"), 300); }},
    {"chat: reactions", false, attackers, true, "/chat/loved", "",
     [](Peer&) { return repeated(frame("\x81", "/before 999"), 300); }},
    {"chat: searches", false, attackers, true, "/chat/old", "",
     [](Peer&) { return repeated(frame("\x81", "/search a b c d e f g h"), 600); }},
    {"chat: joins", false, 4 * attackers, false, "", "",
     [](Peer&) {
         const char* const target = "/chat/old?name=Carl&key=secret-of-carl";
         return wschat::detail::handshake_request("x", target, "dGhlIHNhbXBsZSBub25jZQ==");
     }},
    {"TLS: none", true, attackers, true, "/", "", [](Peer&) { return std::string(); }},
    {"TLS KeyUpdate", true, attackers, true, "/", "", [](Peer& peer) { return peer.key_updates(1000); }},
    {"TLS handshakes", true, 4 * attackers, false, "", "", [](Peer& peer) { return peer.client_hello(); }},
};

double round(const Attack& attack, const ServerProcess& server, Peer& honest) {
    std::vector<Peer> peers;
    std::vector<std::string> bytes;
    const auto prepare = [&] {
        for (std::size_t i = 0; i < attack.peers; ++i) {
            peers.emplace_back(server, attack.tls);
            if (*attack.target != '\0') peers.back().upgrade(attack.target, attack.headers);
            bytes.push_back(attack.bytes(peers.back()));
        }
    };
    if (attack.connect_early) prepare();
    server.stop();
    if (!attack.connect_early) prepare();
    for (std::size_t i = 0; i < peers.size(); ++i) peers[i].flood(bytes[i]);
    honest.send(frame("\x81", "honest"));
    const double before = server.cpu_ms();
    server.resume();
    honest.read_until("honest");
    return server.cpu_ms() - before;
}

void make_files(const std::string& folder) {
    std::ofstream(folder + "/file") << std::string(40 * 1024 * 1024, 'x');
    const std::string command =
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "
        "/CN=localhost -keyout " +
        folder + "/key.pem -out " + folder + "/cert.pem 2>/dev/null";
    if (std::system(command.c_str()) != 0) fail("openssl cannot make a certificate");
}

}  // namespace

int main(int argc, char** argv) {
    const std::string only = argc > 1 ? argv[1] : "";
    load_support::raise_descriptor_limit(12 * attackers);
    char folder[] = "/tmp/wschat-attacked-XXXXXX";
    if (::mkdtemp(folder) == nullptr) fail("mkdtemp: %s", std::strerror(errno));
    make_files(folder);
    std::printf("%-28s %10s %10s\n", "attack", "median ms", "worst ms");
    for (const Attack& attack : attacks) {
        if (!only.empty() && only != attack.name) continue;
        std::vector<double> all;
        for (int i = 0; i < rounds; ++i) {
            const ServerProcess server(folder, attack.tls);
            Peer honest(server, attack.tls);
            honest.upgrade("/");
            honest.send(frame("\x81", "honest"));
            honest.read_until("honest");
            all.push_back(round(attack, server, honest));
        }
        std::sort(all.begin(), all.end());
        std::printf("%-28s %10.2f %10.2f\n", attack.name, all[all.size() / 2], all.back());
        std::fflush(stdout);
    }
    for (const char* name : {"/file", "/cert.pem", "/key.pem", ""}) std::remove((std::string(folder) + name).c_str());
}
