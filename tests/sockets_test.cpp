// section 10: addresses, listening, sockets that never block, and the pollers, all of them against one contract.
#include "support.hpp"

#include <sys/wait.h>
#include <csignal>
#include <set>

using namespace wschat;
using namespace wschat::detail;

using test::contains;
using test::error_of;
namespace {

IpAddress address(std::string_view text) {
    const auto parsed = IpAddress::parse(text);
    REQUIRE_MESSAGE(parsed, text);
    return *parsed;
}

bool has_ipv6() {
    const Socket probe(os::open_socket(AF_INET6));
    sockaddr_in6 loopback{};
    loopback.sin6_family = AF_INET6;
    loopback.sin6_addr = in6addr_loopback;
    return probe && ::bind(probe.descriptor(), reinterpret_cast<const sockaddr*>(&loopback), sizeof loopback) == 0;
}

// A folder of its own, which is gone afterwards with the sockets and files that lie in it.
class Folder {
public:
    Folder() { REQUIRE(::mkdtemp(path_) != nullptr); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    ~Folder() {
        for (const std::string& name : names_) ::unlink(name.c_str());
        ::rmdir(path_);
    }
    std::string operator/(const std::string& name) {
        names_.insert(path_ + ("/" + name));
        return path_ + ("/" + name);
    }

private:
    char path_[32] = "/tmp/wschat-test-XXXXXX";
    std::set<std::string> names_;
};

// Connects to a listener of this machine, by TCP or by its path; what does not connect is an empty socket.
Socket connect_to(const ListenAddress& where, int family = AF_INET) {
    sockaddr_storage to{};
    socklen_t size = 0;
    if (!where.unix_path.empty()) {
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        std::memcpy(name.sun_path, where.unix_path.data(), where.unix_path.size());
        std::memcpy(&to, &name, size = sizeof name);
    } else if (family == AF_INET6) {
        sockaddr_in6 in6{};
        in6.sin6_family = AF_INET6;
        in6.sin6_port = htons(static_cast<std::uint16_t>(where.port));
        in6.sin6_addr = in6addr_loopback;
        std::memcpy(&to, &in6, size = sizeof in6);
    } else {
        sockaddr_in in{};
        in.sin_family = AF_INET;
        in.sin_port = htons(static_cast<std::uint16_t>(where.port));
        in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        std::memcpy(&to, &in, size = sizeof in);
    }
    Socket socket(::socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&to), size) != 0) return {};
    os::make_nonblocking(socket.descriptor());
    return socket;
}

Socket accept(ListenSocket& listener, IpAddress& peer) {
    pollfd entry{listener.descriptor(), POLLIN, 0};
    REQUIRE(::poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(test::deadline).count())) == 1);
    int error = 0;
    Socket accepted = listener.accept(peer, error);
    REQUIRE_MESSAGE(accepted, os::error_text(error));
    return accepted;
}

struct Pair {
    Pair() {
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
        here = Socket(ends[0]);
        there = Socket(ends[1]);
    }
    Socket here, there;
};

using SignalAction = struct sigaction;

IoResult send(Socket& socket, std::string_view bytes) { return socket.send(&bytes, 1); }

void fill(Socket& socket) {
    const std::string bytes(64 * 1024, 'x');
    while (send(socket, bytes).outcome == IoResult::Outcome::done) continue;
}

// What a poller reports for one owner.
struct Owner final : Pollable {
    void on_ready(bool, bool, bool) override {}
};

constexpr PollerKind kinds[] = {PollerKind::automatic, PollerKind::poll};

// One report of a poller as "r", "w", "b" or what of it holds; "" where it does not name the owner.
std::string reported(const std::vector<Poller::Ready>& ready, const Owner& owner) {
    std::string text;
    for (const Poller::Ready& entry : ready) {
        if (entry.owner != &owner) continue;
        text += entry.readable ? "r" : "";
        text += entry.writable ? "w" : "";
        text += entry.broken ? "b" : "";
    }
    return text;
}
// Of what is ready by now.
std::string now_ready(Poller& poller, const Owner& owner) {
    std::vector<Poller::Ready> ready;
    poller.wait(0, ready);
    return reported(ready, owner);
}

// As many descriptors as the machine allows, until the end of the test.
class ManyDescriptors {
public:
    ManyDescriptors() {
        ::getrlimit(RLIMIT_NOFILE, &before_);
        const rlimit all{before_.rlim_max, before_.rlim_max};
        ::setrlimit(RLIMIT_NOFILE, &all);
    }
    ManyDescriptors(const ManyDescriptors&) = delete;
    ManyDescriptors& operator=(const ManyDescriptors&) = delete;
    ~ManyDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

private:
    rlimit before_{};
};

#if defined(__linux__)
// The descriptors that a program started from here would inherit.
std::set<int> inheritable_descriptors() {
    std::set<int> found;
    for (int descriptor = 0; descriptor < 4096; ++descriptor) {
        const int flags = ::fcntl(descriptor, F_GETFD);
        if (flags != -1 && (flags & FD_CLOEXEC) == 0) found.insert(descriptor);
    }
    return found;
}
#endif

// No more descriptors can be had while one lives.
class NoDescriptors {
public:
    NoDescriptors() {
        static_cast<void>(os::error_text(EMFILE));  // what is loaded at the first error is loaded now
        const int next = ::dup(0);
        ::close(next);
        ::getrlimit(RLIMIT_NOFILE, &before_);
        const rlimit none{static_cast<rlim_t>(next), before_.rlim_max};
        ::setrlimit(RLIMIT_NOFILE, &none);
    }
    NoDescriptors(const NoDescriptors&) = delete;
    NoDescriptors& operator=(const NoDescriptors&) = delete;
    ~NoDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

private:
    rlimit before_{};
};

}  // namespace

TEST_SUITE_BEGIN("sockets");

// ---- addresses ------------------------------------------------------------------------------------------------------

TEST_CASE("an address is parsed from its numeric forms and written in its canonical one") {
    const struct {
        std::string text, written;
        IpAddress::Family family;
    } table[] = {
        {"127.0.0.1", "127.0.0.1", IpAddress::Family::ipv4},
        {"255.255.255.255", "255.255.255.255", IpAddress::Family::ipv4},
        {"::1", "::1", IpAddress::Family::ipv6},
        {"::", "::", IpAddress::Family::ipv6},
        {"2001:DB8:0:0:0:0:0:1", "2001:db8::1", IpAddress::Family::ipv6},
        {"fe80::1:2:3:4", "fe80::1:2:3:4", IpAddress::Family::ipv6},
    };
    for (const auto& row : table) {
        CAPTURE(row.text);
        CHECK(address(row.text).to_string() == row.written);
        CHECK(address(row.text).family() == row.family);
    }
}

TEST_CASE("what is no numeric address is not parsed") {
    for (const std::string& text :
         std::vector<std::string>{"", "localhost", "1.2.3", "1.2.3.4.5", "256.0.0.1", "1.2.3.4 ", " 1.2.3.4",
                                  "1.2.3.4:80", "[::1]", ":::", "1::2::3", "12345::", "::1%lo", "0x7f.0.0.1",
                                  "-1.0.0.1", "1.2.3.4" + std::string(1, '\0'), "::1" + std::string("\0.example", 9)}) {
        CAPTURE(text);
        CHECK_FALSE(IpAddress::parse(text));
    }
}

TEST_CASE("an IPv4 address that came mapped into IPv6 is the IPv4 address") {
    // RFC 4291 2.5.5.2
    CHECK(address("::ffff:192.0.2.1") == address("192.0.2.1"));
    CHECK(address("::ffff:c000:201").to_string() == "192.0.2.1");
    CHECK_FALSE(address("::fffe:c000:201") == address("192.0.2.1"));

    sockaddr_in6 in6{};
    in6.sin6_family = AF_INET6;
    REQUIRE(::inet_pton(AF_INET6, "::ffff:192.0.2.1", &in6.sin6_addr) == 1);
    sockaddr_storage storage{};
    std::memcpy(&storage, &in6, sizeof in6);
    CHECK(IpAddress(storage) == address("192.0.2.1"));
}

TEST_CASE("addresses of the system are taken as they are, and a Unix socket has none") {
    sockaddr_in in{};
    in.sin_family = AF_INET;
    in.sin_addr.s_addr = htonl(0xC0000201);
    sockaddr_storage storage{};
    std::memcpy(&storage, &in, sizeof in);
    CHECK(IpAddress(storage).to_string() == "192.0.2.1");

    storage = {};
    storage.ss_family = AF_UNIX;
    CHECK(IpAddress(storage).family() == IpAddress::Family::unix_socket);
    CHECK(IpAddress(storage).to_string() == "unix");
}

TEST_CASE("the prefix of an address keeps its first bits and clears the rest") {
    const struct {
        std::string text;
        unsigned bits;
        std::string prefix;
    } table[] = {
        {"192.0.2.255", 32, "192.0.2.255"},
        {"192.0.2.255", 31, "192.0.2.254"},
        {"192.0.2.255", 25, "192.0.2.128"},
        {"192.0.2.255", 24, "192.0.2.0"},
        {"192.0.2.255", 9, "192.0.0.0"},
        {"192.0.2.255", 0, "0.0.0.0"},
        {"2001:db8:1:2:3:4:5:6", 64, "2001:db8:1:2::"},
        {"2001:db8:1:2:3:4:5:6", 128, "2001:db8:1:2:3:4:5:6"},
        {"2001:db8:ffff::", 33, "2001:db8:8000::"},
        {"ffff::", 0, "::"},
    };
    for (const auto& row : table) {
        CAPTURE(row.text);
        CAPTURE(row.bits);
        CHECK(address(row.text).prefix(row.bits).to_string() == row.prefix);
    }
}

TEST_CASE("addresses are equal only within one family") {
    CHECK(address("10.0.0.1") == address("10.0.0.1"));
    CHECK_FALSE(address("10.0.0.1") == address("10.0.0.2"));
    CHECK_FALSE(address("0.0.0.0") == address("::"));
}

TEST_CASE("for limits the addresses of one IPv6 customer are one") {
    CHECK(address("192.0.2.255").rate_limit_key() == "192.0.2.255");
    CHECK(address("2001:db8:1:2:3:4:5:6").rate_limit_key() == "2001:db8:1:2::");
    CHECK(address("2001:db8:1:2::1").rate_limit_key() == address("2001:db8:1:2:ffff::").rate_limit_key());
    CHECK(address("2001:db8:1:3::1").rate_limit_key() != address("2001:db8:1:2::1").rate_limit_key());
}

TEST_CASE("a CIDR block contains the addresses of its family with its first bits") {
    const struct {
        std::string block, address;
        bool contains;
    } table[] = {
        {"10.0.0.0/8", "10.255.255.255", true},
        {"10.0.0.0/8", "11.0.0.0", false},
        {"10.1.2.3/8", "10.9.9.9", true},
        {"192.0.2.1", "192.0.2.1", true},
        {"192.0.2.1", "192.0.2.2", false},
        {"192.0.2.0/31", "192.0.2.1", true},
        {"192.0.2.0/31", "192.0.2.2", false},
        {"0.0.0.0/0", "203.0.113.9", true},
        {"0.0.0.0/0", "::1", false},
        {"::/0", "203.0.113.9", false},
        {"::/0", "2001:db8::1", true},
        {"2001:db8::/32", "2001:db8:ffff::1", true},
        {"2001:db8::/32", "2001:db9::1", false},
        {"::1", "::1", true},
        {"10.0.0.0/8", "::ffff:10.0.0.1", true},
        {"::ffff:10.0.0.1", "10.0.0.1", true},
    };
    for (const auto& row : table) {
        CAPTURE(row.block);
        CAPTURE(row.address);
        CHECK(Cidr(row.block).contains(address(row.address)) == row.contains);
    }
}

TEST_CASE("the block unix is every Unix socket and nothing else") {
    CHECK(Cidr("unix").contains(IpAddress()));
    CHECK_FALSE(Cidr("unix").contains(address("127.0.0.1")));
    CHECK_FALSE(Cidr("0.0.0.0/0").contains(IpAddress()));
    CHECK_FALSE(Cidr("::/0").contains(IpAddress()));
}

TEST_CASE("what is no CIDR block is an Error that quotes it") {
    for (const std::string text :
         {"", "/", "/8", "10.0.0.0/", "10.0.0.0/33", "::/129", "10.0.0.0/8/8", "10.0.0.0/-1", "10.0.0.0/ 8",
          "10.0.0.0/8x", "10.0.0/8", "proxy.example", "unix/8", "10.0.0.0/99999999999999999999999"}) {
        CAPTURE(text);
        const std::string error = error_of([&] { Cidr block(text); });
        CHECK(contains(error, "\"" + text + "\""));
        CHECK(contains(error, "CIDR"));
    }
}

TEST_CASE("a listening address is parsed from each of its forms and written so that it can be parsed again") {
    const struct {
        std::string text, host;
        int port;
        std::string unix_path, written;
    } table[] = {
        {"8888", "127.0.0.1", 8888, "", "127.0.0.1:8888"},
        {"0", "127.0.0.1", 0, "", "127.0.0.1:0"},
        {"65535", "127.0.0.1", 65535, "", "127.0.0.1:65535"},
        {"0.0.0.0:80", "0.0.0.0", 80, "", "0.0.0.0:80"},
        {"localhost:80", "localhost", 80, "", "localhost:80"},
        {"*:80", "*", 80, "", "*:80"},
        {"[::1]:80", "::1", 80, "", "[::1]:80"},
        {"[2001:db8::1]:0", "2001:db8::1", 0, "", "[2001:db8::1]:0"},
        {"unix:/run/chat.sock", "127.0.0.1", 0, "/run/chat.sock", "unix:/run/chat.sock"},
        {"unix:chat:1.sock", "127.0.0.1", 0, "chat:1.sock", "unix:chat:1.sock"},
    };
    for (const auto& row : table) {
        CAPTURE(row.text);
        const ListenAddress parsed = ListenAddress::parse(row.text);
        CHECK(parsed.host == row.host);
        CHECK(parsed.port == row.port);
        CHECK(parsed.unix_path == row.unix_path);
        CHECK(parsed.to_string() == row.written);
        CHECK(ListenAddress::parse(parsed.to_string()).to_string() == row.written);
    }
}

TEST_CASE("what is no listening address is an Error that names it") {
    for (const std::string text :
         {"", ":", "localhost", "8888x", "65536", "-1", "+80", " 80", "99999999999999999999", "127.0.0.1:", ":8888",
          "127.0.0.1:http", "[]:80", "[::1]", "[::1", "[::1:80", "::1]:80", "[::1]x:80", "unix:"}) {
        CAPTURE(text);
        const std::string error = error_of([&] { ListenAddress::parse(text); });
        CHECK(contains(error, "listen " + text + ":"));
    }
}

TEST_CASE("an IPv6 address to listen on stands in brackets, because its own colons are no port") {
    for (const std::string text : {"::1", "::", "2001:db8::80", "::1:80"}) {
        CAPTURE(text);
        CHECK(contains(error_of([&] { ListenAddress::parse(text); }), text));
    }
}

TEST_CASE("a listening address can not forge a line of a log or of a terminal through its Error") {
    const std::string error = error_of([] { ListenAddress::parse("80\n\x1b[31m"); });
    CHECK_FALSE(error.empty());
    CHECK_FALSE(contains(error, "\n"));
    CHECK_FALSE(contains(error, "\x1b"));
}

// ---- listening ------------------------------------------------------------------------------------------------------

TEST_CASE("port 0 is a port that the system picks, another one for each listener") {
    ListenSocket first(ListenAddress::parse("0"), false), second(ListenAddress::parse("0"), false);
    CHECK(first.address().port > 0);
    CHECK(second.address().port > 0);
    CHECK(first.address().port != second.address().port);
    CHECK(connect_to(first.address()));
}

TEST_CASE("a listener accepts connections with their addresses, and says so when there are no more") {
    ListenSocket listener(ListenAddress::parse("0"), false);
    IpAddress peer;
    int error = 0;
    CHECK_FALSE(listener.accept(peer, error));
    CHECK(os::would_block(error));

    Socket client = connect_to(listener.address());
    Socket accepted = accept(listener, peer);
    CHECK(peer.to_string() == "127.0.0.1");
    CHECK(send(client, "hello").size == 5);
    char bytes[16];
    pollfd entry{accepted.descriptor(), POLLIN, 0};
    REQUIRE(::poll(&entry, 1, 20'000) == 1);
    CHECK(accepted.receive(bytes, sizeof bytes).size == 5);
    CHECK(std::string_view(bytes, 5) == "hello");
}

TEST_CASE("an accepted connection sends without delay") {
    ListenSocket listener(ListenAddress::parse("0"), false);
    const Socket client = connect_to(listener.address());
    IpAddress peer;
    const Socket accepted = accept(listener, peer);
    int on = 0;
    socklen_t size = sizeof on;
    REQUIRE(::getsockopt(accepted.descriptor(), IPPROTO_TCP, TCP_NODELAY, &on, &size) == 0);
    CHECK(on != 0);
}

TEST_CASE("a port that is taken is an Error that says who has it") {
    ListenSocket listener(ListenAddress::parse("0"), false);
    const std::string where = listener.address().to_string();
    CHECK(error_of([&] { ListenSocket(ListenAddress::parse(where), false); }) ==
          "listen " + where + ": Address already in use (EADDRINUSE): another process has it");
}

TEST_CASE("a port whose last connections are still fading away can be listened on again at once") {
    ListenAddress where;
    {
        ListenSocket listener(ListenAddress::parse("0"), false);
        where = listener.address();
        Socket client = connect_to(where);
        IpAddress peer;
        Socket accepted = accept(listener, peer);
        // The side that closes first is the one that stays in TIME_WAIT.
        accepted.close();
    }
    CHECK(error_of([&] { ListenSocket(where, false); }) == "");
}

TEST_CASE("two listeners share a port only where both ask for it") {
    ListenSocket first(ListenAddress::parse("0"), true);
    CHECK(error_of([&] { ListenSocket(first.address(), true); }) == "");
    CHECK(contains(error_of([&] { ListenSocket(first.address(), false); }), "EADDRINUSE"));
    ListenSocket alone(ListenAddress::parse("0"), false);
    CHECK(contains(error_of([&] { ListenSocket(alone.address(), true); }), "EADDRINUSE"));
}

TEST_CASE("an address that the machine does not have is an Error that says so") {
    // RFC 5737: 192.0.2.0/24 is for documentation.
    CHECK(error_of([] { ListenSocket(ListenAddress::parse("192.0.2.1:0"), false); }) ==
          "listen 192.0.2.1:0: Cannot assign requested address (EADDRNOTAVAIL): this machine has no such address");
}

TEST_CASE("a host that is unknown is an Error that names it") {
    // RFC 1035 2.3.4: a label has at most 63 octets, so nobody needs to be asked about this one.
    const std::string where = std::string(64, 'x') + ".example:80";
    const std::string error = error_of([&] { ListenSocket(ListenAddress::parse(where), false); });
    CHECK(contains(error, "listen " + where + ": the host is unknown: "));
}

TEST_CASE("a port below 1024 without permission is an Error that names the reason") {
    const auto listen_unprivileged = [] {
        // 65534 is nobody; a process that is not root fails to change and has no permission either way.
        if (::setuid(65534) != 0 && ::geteuid() == 0) return 2;
        const std::string error = error_of([] { ListenSocket(ListenAddress::parse("127.0.0.1:1"), false); });
        return error == "listen 127.0.0.1:1: Permission denied (EACCES): ports below 1024 need permission" ? 0 : 1;
    };
    int lowest_free = 1024;
    if (std::FILE* setting = std::fopen("/proc/sys/net/ipv4/ip_unprivileged_port_start", "r")) {
        CHECK(std::fscanf(setting, "%d", &lowest_free) == 1);
        std::fclose(setting);
    }
    if (lowest_free <= 1) {
        MESSAGE("this machine lets everybody have every port");
        return;
    }
    const pid_t child = ::fork();
    if (child == 0) ::_exit(listen_unprivileged());
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("a listener on an IPv6 address has IPv6 connections only") {
    if (!has_ipv6()) {
        MESSAGE("this machine has no IPv6");
        return;
    }
    ListenSocket listener(ListenAddress::parse("[::]:0"), false);
    CHECK(contains(listener.address().to_string(), "[::]:"));
    const Socket client = connect_to(listener.address(), AF_INET6);
    IpAddress peer;
    CHECK(accept(listener, peer));
    CHECK(peer.to_string() == "::1");
    // RFC 3493 5.3; otherwise it would have the same port of IPv4 too.
    int ipv6_only = 0;
    socklen_t size = sizeof ipv6_only;
    REQUIRE(::getsockopt(listener.descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, &ipv6_only, &size) == 0);
    CHECK(ipv6_only == 1);
}

TEST_CASE("a listener on every address has connections of both families, IPv4 as IPv4") {
    ListenSocket listener(ListenAddress::parse("*:0"), false);
    IpAddress peer;
    const Socket old = connect_to(listener.address(), AF_INET);
    CHECK(accept(listener, peer));
    CHECK(peer.to_string() == "127.0.0.1");
    if (!has_ipv6()) {
        MESSAGE("this machine has no IPv6");
        return;
    }
    const Socket young = connect_to(listener.address(), AF_INET6);
    CHECK(accept(listener, peer));
    CHECK(peer.to_string() == "::1");
}

TEST_CASE("a Unix socket is listened on by its path, which is gone with the listener") {
    Folder folder;
    const std::string path = folder / "chat.sock";
    {
        ListenSocket listener(ListenAddress::parse("unix:" + path), false);
        CHECK(listener.address().to_string() == "unix:" + path);
        const Socket client = connect_to(listener.address());
        REQUIRE(client);
        IpAddress peer;
        CHECK(accept(listener, peer));
        CHECK(peer.family() == IpAddress::Family::unix_socket);
    }
    struct stat status {};
    CHECK(::lstat(path.c_str(), &status) != 0);
}

TEST_CASE("a Unix socket that a dead process left behind is taken over") {
    Folder folder;
    const std::string path = folder / "chat.sock";
    {
        sockaddr_un name{};
        name.sun_family = AF_UNIX;
        std::memcpy(name.sun_path, path.data(), path.size());
        const Socket dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        REQUIRE(::bind(dead.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
        REQUIRE(::listen(dead.descriptor(), 1) == 0);
    }
    ListenSocket listener(ListenAddress::parse("unix:" + path), false);
    CHECK(connect_to(listener.address()));
}

TEST_CASE("a Unix socket that somebody listens on is refused and stays theirs") {
    Folder folder;
    ListenSocket listener(ListenAddress::parse("unix:" + folder / "chat.sock"), false);
    const std::string where = listener.address().to_string();
    CHECK(error_of([&] { ListenSocket(ListenAddress::parse(where), false); }) ==
          "listen " + where + ": Address already in use (EADDRINUSE): another process has it");
    CHECK(connect_to(listener.address()));
}

TEST_CASE("a file that lies where a Unix socket is to be is refused and kept") {
    Folder folder;
    const std::string path = folder / "notes.txt";
    std::FILE* file = std::fopen(path.c_str(), "w");
    REQUIRE(file != nullptr);
    std::fclose(file);
    CHECK(contains(error_of([&] { ListenSocket(ListenAddress::parse("unix:" + path), false); }), "EADDRINUSE"));
    struct stat status {};
    REQUIRE(::lstat(path.c_str(), &status) == 0);
    CHECK(S_ISREG(status.st_mode));
}

TEST_CASE("a path that is too long for a Unix socket, or in a folder that is not there, is an Error") {
    const std::string longest(sizeof(sockaddr_un::sun_path) - 1, 'x');
    CHECK(error_of([&] { ListenSocket(ListenAddress::parse("unix:" + longest + "x"), false); }) ==
          "listen unix:" + longest + "x: the path is longer than " + std::to_string(longest.size()) + " bytes");
    Folder folder;
    const std::string where = "unix:" + folder / "missing" + "/chat.sock";
    const std::string error = error_of([&] { ListenSocket(ListenAddress::parse(where), false); });
    CHECK(contains(error, "listen " + where + ": No such file or directory (ENOENT)"));
}

// ---- sockets --------------------------------------------------------------------------------------------------------

TEST_CASE("a descriptor is closed with its owner, and belongs to one owner only") {
    int number = -1;
    {
        Pair pair;
        number = pair.here.descriptor();
        OwnedDescriptor moved(std::move(pair.here));
        CHECK_FALSE(pair.here);
        CHECK(moved.descriptor() == number);
        OwnedDescriptor assigned;
        assigned = std::move(moved);
        CHECK(assigned.descriptor() == number);
        CHECK(::fcntl(number, F_GETFD) != -1);
    }
    CHECK(::fcntl(number, F_GETFD) == -1);
}

TEST_CASE("receiving says whether there were bytes, none yet, the end, or an error") {
    Pair pair;
    char bytes[8];
    CHECK(pair.here.receive(bytes, sizeof bytes).outcome == IoResult::Outcome::would_block);
    send(pair.there, "abc");
    const IoResult got = pair.here.receive(bytes, sizeof bytes);
    CHECK(got.outcome == IoResult::Outcome::done);
    CHECK(got.size == 3);
    pair.there.shutdown_send();
    CHECK(pair.here.receive(bytes, sizeof bytes).outcome == IoResult::Outcome::end);

    ListenSocket listener(ListenAddress::parse("0"), false);
    test::RawClient client(connect_to(listener.address()));
    IpAddress peer;
    Socket accepted = accept(listener, peer);
    client.reset();
    pollfd entry{accepted.descriptor(), POLLIN, 0};
    REQUIRE(::poll(&entry, 1, 20'000) == 1);
    const IoResult lost = accepted.receive(bytes, sizeof bytes);
    CHECK(lost.outcome == IoResult::Outcome::error);
    CHECK(lost.error == ECONNRESET);
}

TEST_CASE("pieces are sent in their order with one call, as many as there may be") {
    Pair pair;
    std::vector<std::string> texts;
    std::string all;
    for (std::size_t i = 0; i < Socket::max_pieces; ++i) all += texts.emplace_back("piece " + std::to_string(i) + "\n");
    const std::vector<std::string_view> pieces(texts.begin(), texts.end());
    const IoResult sent = pair.here.send(pieces.data(), pieces.size());
    CHECK(sent.outcome == IoResult::Outcome::done);
    CHECK(sent.size == all.size());
    std::string received(all.size() + 1, '\0');
    received.resize(pair.there.receive(&received[0], received.size()).size);
    CHECK(received == all);
}

TEST_CASE("sending to a peer that does not read takes what fits and then would block") {
    Pair pair;
    fill(pair.here);
    const IoResult refused = send(pair.here, "more");
    CHECK(refused.outcome == IoResult::Outcome::would_block);
    CHECK(refused.size == 0);
}

TEST_CASE("sending to a peer that is gone is an error and raises no SIGPIPE") {
    static volatile std::sig_atomic_t raised;
    raised = 0;
    SignalAction count{}, before{};
    count.sa_handler = [](int) { raised = raised + 1; };
    REQUIRE(::sigaction(SIGPIPE, &count, &before) == 0);
    Pair pair;
    pair.there.close();
    const std::string_view pieces[] = {"one", "two"};
    for (const std::size_t count_of_pieces : {1u, 2u}) {
        CAPTURE(count_of_pieces);
        const IoResult sent = pair.here.send(pieces, count_of_pieces);
        CHECK(sent.outcome == IoResult::Outcome::error);
        CHECK(sent.error == EPIPE);
    }
    CHECK(raised == 0);
    ::sigaction(SIGPIPE, &before, nullptr);
}

TEST_CASE("a batch sends to each of its sockets, once, and says of each what its own call would have said") {
    const auto batch = SendBatch::make();
    if (!WSCHAT_LIBURING) CHECK(batch == nullptr);
    if (!batch) return;  // or the kernel refuses a ring
    enum class Peer { reads, is_full, is_gone };
    const auto kind = [](std::size_t i) {
        return i % 10 == 3 ? Peer::is_full : i % 10 == 7 ? Peer::is_gone : Peer::reads;
    };
    std::vector<Pair> pairs(100);
    std::vector<std::string> texts;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        if (kind(i) == Peer::is_full) fill(pairs[i].here);
        if (kind(i) == Peer::is_gone) pairs[i].there.close();
        texts.push_back("to number " + std::to_string(i));
    }
    for (int round = 0; round < 2; ++round) {
        for (std::size_t i = 0; i < pairs.size(); ++i) batch->add(pairs[i].here, texts[i], &pairs[i]);
        std::size_t visited = 0;
        batch->send([&](const SendBatch::Item& item) {
            const std::size_t i = visited++;
            CAPTURE(i);
            CHECK(item.owner == &pairs[i]);
            REQUIRE(item.sent);
            const IoResult::Outcome expected[] = {IoResult::Outcome::done, IoResult::Outcome::would_block,
                                                  IoResult::Outcome::error};
            CHECK(item.sent->outcome == expected[static_cast<std::size_t>(kind(i))]);
            CHECK(item.sent->size == (kind(i) == Peer::reads ? texts[i].size() : 0));
            if (kind(i) == Peer::is_gone) CHECK(item.sent->error == EPIPE);
        });
        CHECK(visited == pairs.size());
        for (std::size_t i = 0; i < pairs.size(); ++i) {
            if (kind(i) != Peer::reads) continue;
            char received[64];
            const IoResult got = pairs[i].there.receive(received, sizeof received);
            CHECK(std::string_view(received, got.size) == texts[i]);
        }
    }
}

TEST_CASE("what is too little for a batch is not tried, and left to the ordinary call") {
    const auto batch = SendBatch::make();
    if (!batch) return;
    std::vector<Pair> pairs(SendBatch::min_items - 1);
    for (Pair& pair : pairs) batch->add(pair.here, "hello", &pair);
    batch->send([](const SendBatch::Item&) { FAIL("tried"); });
    batch->send([](const SendBatch::Item&) { FAIL("kept"); });
    char received[8];
    for (Pair& pair : pairs) CHECK(pair.there.receive(received, 8).outcome == IoResult::Outcome::would_block);
}

TEST_CASE("after the sending side is shut the peer reads the end, and can still answer") {
    Pair pair;
    pair.here.shutdown_send();
    char byte;
    CHECK(pair.there.receive(&byte, 1).outcome == IoResult::Outcome::end);
    send(pair.there, "!");
    CHECK(pair.here.receive(&byte, 1).outcome == IoResult::Outcome::done);
}

#if defined(__linux__)
TEST_CASE("every descriptor of this section is close-on-exec") {
    // FAULTS 40. What was open before is not ours.
    const std::set<int> before = inheritable_descriptors();
    Folder folder;
    ListenSocket tcp(ListenAddress::parse("0"), false),
        local(ListenAddress::parse("unix:" + folder / "chat.sock"), false);
    const Socket tcp_client = connect_to(tcp.address()), local_client = connect_to(local.address());
    IpAddress peer;
    const Socket tcp_accepted = accept(tcp, peer), local_accepted = accept(local, peer);
    const WakeUp wake_up;
    const auto system = Poller::make(PollerKind::automatic), poll = Poller::make(PollerKind::poll);
    CHECK(inheritable_descriptors() == before);
}
#endif

TEST_CASE("an error of the system is told in words and by its name") {
    CHECK(os::error_text(EADDRINUSE) == "Address already in use (EADDRINUSE)");
    CHECK(os::error_text(ENOENT) == "No such file or directory (ENOENT)");
    CHECK(contains(os::error_text(ENOTTY), "(" + std::to_string(ENOTTY) + ")"));
}

TEST_CASE("what woke a poller is handed out byte by byte, and a full pipe does not block the one who wakes") {
    WakeUp wake_up;
    WakeUp::wake(wake_up.write_end(), 'a');
    WakeUp::wake(wake_up.write_end(), 'b');
    std::string bytes;
    wake_up.drain([&](char byte) { bytes += byte; });
    CHECK(bytes == "ab");
    wake_up.drain([&](char byte) { bytes += byte; });
    CHECK(bytes == "ab");

    for (int i = 0; i < 200'000; ++i) WakeUp::wake(wake_up.write_end(), 'x');
    std::size_t count = 0;
    wake_up.drain([&](char) { ++count; });
    CHECK(count > 0);
    CHECK(count < 200'000);
}

// ---- the pollers ----------------------------------------------------------------------------------------------------

TEST_CASE("the system's poller is the default, and poll can be forced") {
    CHECK(Poller::make(PollerKind::poll)->name() == std::string("poll"));
#if defined(__linux__)
    CHECK(Poller::make(PollerKind::automatic)->name() == std::string("epoll"));
#endif
}

TEST_CASE("a poller reports what is readable from when bytes are there, and again until they are read") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair pair;
        Owner owner;
        REQUIRE(poller->add(pair.here.descriptor(), owner, true, false));
        CHECK(now_ready(*poller, owner) == "");
        send(pair.there, "ab");
        CHECK(now_ready(*poller, owner) == "r");
        char byte;
        pair.here.receive(&byte, 1);
        CHECK(now_ready(*poller, owner) == "r");
        pair.here.receive(&byte, 1);
        CHECK(now_ready(*poller, owner) == "");
    }
}

TEST_CASE("a poller reports what is writable as long as the kernel takes bytes") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair pair;
        Owner owner;
        REQUIRE(poller->add(pair.here.descriptor(), owner, false, true));
        CHECK(now_ready(*poller, owner) == "w");
        CHECK(now_ready(*poller, owner) == "w");
        fill(pair.here);
        CHECK(now_ready(*poller, owner) == "");
        std::vector<char> buffer(1 << 20);
        while (pair.there.receive(buffer.data(), buffer.size()).outcome == IoResult::Outcome::done) continue;
        CHECK(now_ready(*poller, owner) == "w");
    }
}

TEST_CASE("a poller reports what it was last asked for, and nothing where it was asked for nothing") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair pair;
        Owner owner;
        send(pair.there, "a");
        REQUIRE(poller->add(pair.here.descriptor(), owner, false, false));
        CHECK(now_ready(*poller, owner) == "");
        poller->change(pair.here.descriptor(), owner, true, false);
        CHECK(now_ready(*poller, owner) == "r");
        poller->change(pair.here.descriptor(), owner, false, true);
        CHECK(now_ready(*poller, owner) == "w");
        poller->change(pair.here.descriptor(), owner, false, false);
        CHECK(now_ready(*poller, owner) == "");
        poller->change(pair.here.descriptor(), owner, true, true);
        CHECK(contains(now_ready(*poller, owner), "r"));
        CHECK(contains(now_ready(*poller, owner), "w"));
    }
}

TEST_CASE("a poller reports a connection that is broken, also where nothing is being waited for") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        ListenSocket listener(ListenAddress::parse("0"), false);
        test::RawClient client(connect_to(listener.address()));
        IpAddress peer;
        const Socket accepted = accept(listener, peer);
        Owner owner;
        REQUIRE(poller->add(accepted.descriptor(), owner, false, false));
        client.reset();
        std::vector<Poller::Ready> ready;
        poller->wait(20'000, ready);
        CHECK(reported(ready, owner) == "b");
    }
}

TEST_CASE("a peer that has shut its sending side is readable, not broken") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair pair;
        Owner owner;
        REQUIRE(poller->add(pair.here.descriptor(), owner, true, false));
        pair.there.shutdown_send();
        CHECK(now_ready(*poller, owner) == "r");
        poller->change(pair.here.descriptor(), owner, false, false);
        CHECK(now_ready(*poller, owner) == "");
    }
}

TEST_CASE("a poller reports no more what was removed, though it was ready in the batch before") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair first, second, third;
        Owner owners[3];
        Pair* pairs[] = {&first, &second, &third};
        for (int i = 0; i < 3; ++i) {
            send(pairs[i]->there, "a");
            REQUIRE(poller->add(pairs[i]->here.descriptor(), owners[i], true, false));
        }
        std::vector<Poller::Ready> ready;
        poller->wait(20'000, ready);
        CHECK(ready.size() == 3);
        // As a callback does that runs for the first of them and closes another of the batch.
        poller->remove(first.here.descriptor());
        first.here.close();
        poller->wait(20'000, ready);
        CHECK(reported(ready, owners[0]) == "");
        CHECK(reported(ready, owners[1]) == "r");
        CHECK(reported(ready, owners[2]) == "r");
        poller->remove(third.here.descriptor());
        poller->wait(20'000, ready);
        CHECK(ready.size() == 1);
        CHECK(reported(ready, owners[1]) == "r");
        poller->remove(second.here.descriptor());
        poller->wait(0, ready);
        CHECK(ready.empty());
    }
}

TEST_CASE("a descriptor that is used again is reported to its new owner only") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Owner old, young;
        Pair pair;
        const int number = pair.here.descriptor();
        REQUIRE(poller->add(number, old, true, false));
        send(pair.there, "a");
        CHECK(now_ready(*poller, old) == "r");
        poller->remove(number);
        pair.here.close();

        Pair next;
        REQUIRE(::dup2(next.here.descriptor(), number) == number);
        const Socket again(number);
        REQUIRE(poller->add(number, young, true, false));
        CHECK(now_ready(*poller, young) == "");
        send(next.there, "b");
        CHECK(now_ready(*poller, young) == "r");
        CHECK(now_ready(*poller, old) == "");
        poller->remove(number);
    }
}

TEST_CASE("of many descriptors that stay ready a poller reports each before long") {
    const ManyDescriptors raised;
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        constexpr std::size_t count = 700;  // more than one batch of epoll
        Pair pair;
        send(pair.there, "a");
        std::vector<Owner> owners(count);
        std::vector<OwnedDescriptor> copies;
        for (Owner& owner : owners) {
            copies.emplace_back(::fcntl(pair.here.descriptor(), F_DUPFD_CLOEXEC, 0));
            REQUIRE(copies.back());
            REQUIRE(poller->add(copies.back().descriptor(), owner, true, false));
        }
        std::set<Pollable*> seen;
        std::vector<Poller::Ready> ready;
        for (int round = 0; round < 4; ++round) {
            poller->wait(20'000, ready);
            for (const Poller::Ready& entry : ready) seen.insert(entry.owner);
        }
        CHECK(seen.size() == count);
        for (const OwnedDescriptor& copy : copies) poller->remove(copy.descriptor());
    }
}

TEST_CASE("descriptors above 1024 are polled as others are") {
    const ManyDescriptors raised;
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair pair;
        const OwnedDescriptor high(::fcntl(pair.here.descriptor(), F_DUPFD_CLOEXEC, 1500));
        if (!high) {
            MESSAGE("this machine has no descriptors above 1500");
            return;
        }
        Owner owner;
        REQUIRE(poller->add(high.descriptor(), owner, true, true));
        CHECK(now_ready(*poller, owner) == "w");
        send(pair.there, "a");
        poller->change(high.descriptor(), owner, true, false);
        CHECK(now_ready(*poller, owner) == "r");
        poller->remove(high.descriptor());
        CHECK(now_ready(*poller, owner) == "");
    }
}

TEST_CASE("a poller that has nothing to report comes back when its time is over") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair pair;
        Owner owner;
        REQUIRE(poller->add(pair.here.descriptor(), owner, true, false));
        std::vector<Poller::Ready> ready{{&owner, true, true, true}};
        poller->wait(1, ready);
        CHECK(ready.empty());
    }
}

TEST_CASE("a poller that waits is woken from another thread") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        WakeUp wake_up;
        Owner owner;
        REQUIRE(poller->add(wake_up.descriptor(), owner, true, false));
        std::thread waker([&] { WakeUp::wake(wake_up.write_end(), 1); });
        std::vector<Poller::Ready> ready;
        poller->wait(20'000, ready);
        waker.join();
        CHECK(reported(ready, owner) == "r");
    }
}

TEST_CASE("where descriptors are used up whatever needs one is an Error that says so, and works later") {
    Folder folder;
    const std::string path = folder / "chat.sock";
    const std::function<void()> calls[] = {
        [] { ListenSocket(ListenAddress::parse("127.0.0.1:0"), false); },
        [] { ListenSocket(ListenAddress::parse("*:0"), false); },
        [&] { ListenSocket(ListenAddress::parse("unix:" + path), false); },
        [] { WakeUp(); },
#if defined(__linux__)
        [] { Poller::make(PollerKind::automatic); },
#endif
    };
    for (const auto& call : calls) {
        std::string error;
        {
            const NoDescriptors none;
            error = error_of(call);
        }
        CAPTURE(error);
        CHECK(contains(error, ": Too many open files (EMFILE)"));
        CHECK(error_of(call) == "");
    }
}

TEST_CASE("a Unix socket that was left behind stays where it can not be found out whether it was") {
    Folder folder;
    const std::string path = folder / "chat.sock";
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    {
        const Socket dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        REQUIRE(::bind(dead.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
    }
    {
        const NoDescriptors none;
        CHECK(contains(error_of([&] { ListenSocket(ListenAddress::parse("unix:" + path), false); }), "(EMFILE)"));
    }
    struct stat status {};
    CHECK(::lstat(path.c_str(), &status) == 0);
}

#if defined(__linux__)
TEST_CASE("a Unix socket whose owner is too busy to accept stays theirs") {
    Folder folder;
    const std::string path = folder / "chat.sock";
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    const Socket busy(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(::bind(busy.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
    REQUIRE(::listen(busy.descriptor(), 0) == 0);
    // One connection waits, and there is no room for another.
    const ListenAddress where = ListenAddress::parse("unix:" + path);
    const Socket first = connect_to(where);
    REQUIRE(first);
    CHECK(contains(error_of([&] { ListenSocket(where, false); }), "(EADDRINUSE)"));
    const Socket accepted(::accept(busy.descriptor(), nullptr, nullptr));
    CHECK(accepted);
    CHECK(connect_to(where));
}
#endif

TEST_CASE("a Unix socket in a folder without permission is an Error, and no advice about ports") {
    Folder folder;
    const std::string where = "unix:" + folder / "chat.sock";
    REQUIRE(::chmod((folder / "").c_str(), 0500) == 0);
    const auto listen_unprivileged = [&] {
        if (::setuid(65534) != 0 && ::geteuid() == 0) return 2;
        const std::string error = error_of([&] { ListenSocket(ListenAddress::parse(where), false); });
        return error == "listen " + where + ": Permission denied (EACCES) from bind" ? 0 : 1;
    };
    const pid_t child = ::fork();
    if (child == 0) ::_exit(listen_unprivileged());
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("each error that a socket or a file meets is told by its name") {
    const std::pair<int, std::string> names[] = {
        {EACCES, "EACCES"},
        {EADDRINUSE, "EADDRINUSE"},
        {EADDRNOTAVAIL, "EADDRNOTAVAIL"},
        {EAFNOSUPPORT, "EAFNOSUPPORT"},
        {ECONNABORTED, "ECONNABORTED"},
        {ECONNRESET, "ECONNRESET"},
        {EINVAL, "EINVAL"},
        {EISDIR, "EISDIR"},
        {EMFILE, "EMFILE"},
        {ENFILE, "ENFILE"},
        {ENOBUFS, "ENOBUFS"},
        {ENOENT, "ENOENT"},
        {ENOMEM, "ENOMEM"},
        {ENOTDIR, "ENOTDIR"},
        {EPERM, "EPERM"},
        {EPIPE, "EPIPE"},
        {ETIMEDOUT, "ETIMEDOUT"},
    };
    for (const auto& entry : names) {
        const std::string name = entry.second, text = os::error_text(entry.first);
        CAPTURE(name);
        CHECK(contains(text, " (" + name + ")"));
        CHECK(text.size() > name.size() + 3);
    }
}

TEST_CASE("an address has as many bits as its family, that of a Unix socket none") {
    CHECK(address("127.0.0.1").bits() == 32);
    CHECK(address("::1").bits() == 128);
    CHECK(IpAddress().bits() == 0);
    CHECK(IpAddress().to_string() == "unix");
}

TEST_CASE("sending nothing takes nothing, and is no end of the stream") {
    Pair pair;
    const IoResult sent = send(pair.here, "");
    CHECK(sent.outcome == IoResult::Outcome::would_block);
    CHECK(sent.size == 0);
    CHECK(send(pair.here, "a").outcome == IoResult::Outcome::done);
}

TEST_CASE("what is no descriptor can not be made to block never") { CHECK_FALSE(os::make_nonblocking(-1)); }

TEST_CASE("a poller that is to remove what it does not know changes nothing") {
    for (const PollerKind kind : kinds) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        Pair known, other;
        Owner owner;
        REQUIRE(poller->add(known.here.descriptor(), owner, true, false));
        poller->remove(other.here.descriptor());
        REQUIRE(send(known.there, "a").outcome == IoResult::Outcome::done);
        CHECK(now_ready(*poller, owner) == "r");
    }
}

TEST_SUITE_END();
