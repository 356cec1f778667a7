// section 10: addresses, listening, non-blocking sockets, and one contract for all pollers.
#include "support.hpp"

#include <sys/wait.h>
#include <csignal>
#include <set>

using namespace wschat;
using namespace wschat::detail;

using test::contains;
using test::error_of;
using test::hex;
using test::inheritable_descriptors;

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

// A temporary directory. The destructor removes it and the files whose names it made.
class TemporaryDirectory {
public:
    TemporaryDirectory() { REQUIRE(::mkdtemp(path_) != nullptr); }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    ~TemporaryDirectory() {
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

sockaddr_un unix_name(const std::string& path) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    return name;
}

// A Unix socket that is bound without ListenSocket. Closing it leaves its path in the file system.
Socket bound_unix_socket(const std::string& path) {
    const sockaddr_un name = unix_name(path);
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    REQUIRE(::bind(socket.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
    return socket;
}

// Connects to a listener on this machine by TCP or by its path. Returns an empty socket if it cannot.
Socket connect_to(const ListenAddress& listener, int family = AF_INET) {
    sockaddr_storage address{};
    socklen_t size = 0;
    const auto port = htons(static_cast<std::uint16_t>(listener.port));
    if (!listener.unix_path.empty()) {
        const sockaddr_un name = unix_name(listener.unix_path);
        std::memcpy(&address, &name, size = sizeof name);
    } else if (family == AF_INET6) {
        sockaddr_in6 in6{};
        in6.sin6_family = AF_INET6;
        in6.sin6_port = port;
        in6.sin6_addr = in6addr_loopback;
        std::memcpy(&address, &in6, size = sizeof in6);
    } else {
        sockaddr_in in{};
        in.sin_family = AF_INET;
        in.sin_port = port;
        in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        std::memcpy(&address, &in, size = sizeof in);
    }
    Socket socket(::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(socket.descriptor(), reinterpret_cast<const sockaddr*>(&address), size) != 0) return {};
    os::make_nonblocking(socket.descriptor());
    return socket;
}

bool wait_readable(os::Descriptor descriptor) {
    pollfd entry{descriptor, POLLIN, 0};
    return ::poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(test::deadline).count())) == 1;
}

Socket accept(ListenSocket& listener, IpAddress& peer) {
    REQUIRE(wait_readable(listener.descriptor()));
    int error = 0;
    Socket accepted = listener.accept(peer, error);
    REQUIRE_MESSAGE(accepted, os::error_text(error));
    return accepted;
}

// A listener on a port that the system picks, or on the given address.
struct BoundListener : ListenSocket {
    explicit BoundListener(std::string_view address = "0", bool reuse_port = false)
        : ListenSocket(ListenAddress::parse(address), reuse_port) {}
};

// The sentence of the Error of listening; "" if it succeeds.
std::string listen_error(std::string_view address, bool reuse_port = false) {
    return error_of([&] { BoundListener(address, reuse_port); });
}

// Runs the function in a child process with the rights of nobody. Returns its result, or -1.
template <class Function>
int run_unprivileged(Function function) {
    const pid_t child = ::fork();
    // 65534 is nobody. If setuid() fails, the process must already be without rights.
    if (child == 0) ::_exit(::setuid(65534) != 0 && ::geteuid() == 0 ? 2 : function() ? 0 : 1);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

struct Pair {
    Pair() {
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
        local = Socket(ends[0]);
        peer = Socket(ends[1]);
    }
    Socket local, peer;
};

IoResult send(Socket& socket, std::string_view bytes) { return socket.send(&bytes, 1); }

void fill(Socket& socket) {
    const std::string bytes(64 * 1024, 'x');
    while (send(socket, bytes).outcome == IoResult::Outcome::done) continue;
}

struct Owner final : PollableBase<Owner> {
    void on_ready(bool, bool, bool) {}
};

// Calls the function with each kind of poller.
template <class Function>
void for_each_poller(Function function) {
    for (const PollerKind kind : {PollerKind::automatic, PollerKind::poll}) {
        const auto poller = Poller::make(kind);
        CAPTURE(poller->name());
        function(*poller);
    }
}

// The events of the owner in a batch: letters of "rwb" for readable, writable and broken.
std::string events_of(const std::vector<Poller::Ready>& ready, const Owner& owner) {
    std::string text;
    for (const Poller::Ready& entry : ready) {
        if (entry.owner != &owner) continue;
        text += entry.readable ? "r" : "";
        text += entry.writable ? "w" : "";
        text += entry.broken ? "b" : "";
    }
    return text;
}
std::string wait_for(Poller& poller, const Owner& owner, int timeout_ms = 0) {
    std::vector<Poller::Ready> ready;
    poller.wait(timeout_ms, ready);
    return events_of(ready, owner);
}

// A pair of sockets whose first one a poller watches.
struct WatchedPair : Pair {
    WatchedPair(Poller& a_poller, bool read, bool write) : poller(a_poller) {
        REQUIRE(poller.add(local.descriptor(), owner, read, write));
    }
    void watch(bool read, bool write) { REQUIRE(poller.change(local.descriptor(), owner, read, write)); }
    std::string events() { return wait_for(poller, owner); }

    Poller& poller;
    Owner owner;
};

// A connection whose peer has reset it, added to a poller that watches for nothing.
struct BrokenConnection {
    explicit BrokenConnection(Poller& a_poller) : poller(a_poller) {
        BoundListener listener;
        test::RawClient client(connect_to(listener.address()));
        IpAddress peer;
        accepted = accept(listener, peer);
        REQUIRE(poller.add(accepted.descriptor(), owner, false, false));
        client.reset();
    }
    void watch(bool read, bool write) { REQUIRE(poller.change(accepted.descriptor(), owner, read, write)); }
    void remove() { poller.remove(accepted.descriptor()); }
    template <class... Timeout>
    std::string events(Timeout... milliseconds) {
        return wait_for(poller, owner, milliseconds...);
    }

    Poller& poller;
    Owner owner;
    Socket accepted;
};

// Sets the soft limit of descriptors until the destructor.
class DescriptorLimit {
public:
    explicit DescriptorLimit(rlim_t limit) {
        ::getrlimit(RLIMIT_NOFILE, &before_);
        const rlimit changed{(std::min)(limit, before_.rlim_max), before_.rlim_max};
        ::setrlimit(RLIMIT_NOFILE, &changed);
    }
    DescriptorLimit(const DescriptorLimit&) = delete;
    DescriptorLimit& operator=(const DescriptorLimit&) = delete;
    ~DescriptorLimit() { ::setrlimit(RLIMIT_NOFILE, &before_); }

private:
    rlimit before_{};
};

// While one exists, the process can open no more descriptors.
struct NoDescriptors : DescriptorLimit {
    NoDescriptors() : DescriptorLimit(next_descriptor()) {}

private:
    static rlim_t next_descriptor() {
        static_cast<void>(os::error_text(EMFILE));  // the first call opens a file with messages
        const int next = ::dup(0);
        ::close(next);
        return static_cast<rlim_t>(next);
    }
};

}  // namespace

TEST_SUITE_BEGIN("sockets");

// ---- addresses ------------------------------------------------------------------------------------------------------

TEST_CASE("IpAddress parses the numeric forms and writes the canonical form") {
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

TEST_CASE("IpAddress does not parse other texts") {
    for (const std::string& text :
         std::vector<std::string>{"", "localhost", "1.2.3", "1.2.3.4.5", "256.0.0.1", "1.2.3.4 ", " 1.2.3.4",
                                  "1.2.3.4:80", "[::1]", ":::", "1::2::3", "12345::", "::1%lo", "0x7f.0.0.1",
                                  "-1.0.0.1", "1.2.3.4" + std::string(1, '\0'), "::1" + std::string("\0.example", 9)}) {
        CAPTURE(text);
        CHECK_FALSE(IpAddress::parse(text));
    }
}

TEST_CASE("an IPv4-mapped IPv6 address becomes the IPv4 address") {
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

TEST_CASE("IpAddress converts the addresses of the system, and a Unix socket has no address") {
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

TEST_CASE("all addresses of an IPv6 /64 have one key for rate limits") {
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

TEST_CASE("the block unix contains all Unix sockets and nothing else") {
    CHECK(Cidr("unix").contains(IpAddress()));
    CHECK_FALSE(Cidr("unix").contains(address("127.0.0.1")));
    CHECK_FALSE(Cidr("0.0.0.0/0").contains(IpAddress()));
    CHECK_FALSE(Cidr("::/0").contains(IpAddress()));
}

TEST_CASE("a text that is not a CIDR block is an Error that quotes it") {
    for (const std::string text :
         {"", "/", "/8", "10.0.0.0/", "10.0.0.0/33", "::/129", "10.0.0.0/8/8", "10.0.0.0/-1", "10.0.0.0/ 8",
          "10.0.0.0/8x", "10.0.0/8", "proxy.example", "unix/8", "10.0.0.0/99999999999999999999999"}) {
        CAPTURE(text);
        const std::string error = error_of([&] { Cidr block(text); });
        CHECK(contains(error, "\"" + text + "\""));
        CHECK(contains(error, "CIDR"));
    }
}

TEST_CASE("ListenAddress parses each of its forms, and can parse what it writes") {
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

TEST_CASE("a text that is not a listening address is an Error that quotes it") {
    for (const std::string text :
         {"", ":", "localhost", "8888x", "65536", "-1", "+80", " 80", "99999999999999999999", "127.0.0.1:", ":8888",
          "127.0.0.1:http", "[]:80", "[::1]", "[::1", "[::1:80", "::1]:80", "[::1]x:80", "unix:"}) {
        CAPTURE(text);
        const std::string error = error_of([&] { ListenAddress::parse(text); });
        CHECK(contains(error, "listen " + text + ":"));
    }
}

TEST_CASE("an IPv6 address to listen on needs brackets, because it contains colons") {
    for (const std::string text : {"::1", "::", "2001:db8::80", "::1:80"}) {
        CAPTURE(text);
        CHECK(contains(error_of([&] { ListenAddress::parse(text); }), text));
    }
}

TEST_CASE("the Error about a listening address escapes control characters") {
    const std::string error = error_of([] { ListenAddress::parse("80\n\x1b[31m"); });
    CHECK_FALSE(error.empty());
    CHECK_FALSE(contains(error, "\n"));
    CHECK_FALSE(contains(error, "\x1b"));
}

TEST_CASE("fd:3 is an inherited descriptor") {
    const ListenAddress parsed = ListenAddress::parse("fd:3");
    CHECK(parsed.inherited == 3);
    CHECK(parsed.to_string() == "fd:3");
    CHECK(ListenAddress::parse("8888").inherited == -1);
}

// ---- the PROXY protocol ---------------------------------------------------------------------------------------------

// Feeds bytes in pieces of that size. Returns the client's address, "none", "more", or the cause of the failure, and
// how many bytes were not consumed.
std::string parse_proxy_header(std::string_view bytes, std::size_t piece = std::string_view::npos) {
    ProxyHeader header;
    std::size_t done = 0;
    while (done < bytes.size()) {
        std::size_t consumed = 0;
        const ProxyHeader::Outcome outcome = header.feed(bytes.substr(done, piece), consumed);
        done += consumed;
        if (outcome == ProxyHeader::Outcome::failure) return header.failure();
        if (outcome == ProxyHeader::Outcome::done)
            return (header.client() ? header.client()->to_string() : "none") + " " +
                   std::to_string(bytes.size() - done);
    }
    return "more";
}

std::string proxy_v2(std::string_view command_and_family, std::string_view addresses) {
    return hex("0d 0a 0d 0a 00 0d 0a 51 55 49 54 0a") + hex(command_and_family) +
           static_cast<char>(addresses.size() / 256) + static_cast<char>(addresses.size() % 256) +
           std::string(addresses);
}

TEST_CASE("a PROXY header of version 1 is parsed in pieces of any size, and nothing after it is consumed") {
    const struct {
        std::string line, address;
    } table[] = {
        // The lines of the specification, 2.1.
        {"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255"},
        {"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
         "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
        {"PROXY UNKNOWN\r\n", "none"},
        {"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 "
         "65535\r\n",
         "none"},
        {"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", "192.168.0.1"},
        {"PROXY TCP4 192.168.0.1 192.168.0.11 0 0\r\n", "192.168.0.1"},
        {"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", "192.0.2.1"},
        {"PROXY TCP6 2001:db8::1 192.0.2.1 1 2\r\n", "2001:db8::1"},  // as some proxies write it
    };
    for (const auto& row : table)
        for (const std::size_t piece : {std::size_t{1}, std::size_t{7}, std::string_view::npos})
            for (const std::string after : {"", "GET / HTTP/1.1\r\n"}) {
                CAPTURE(row.line);
                CHECK(parse_proxy_header(row.line + after, piece) == row.address + " " + std::to_string(after.size()));
            }
}

TEST_CASE("a malformed PROXY header of version 1 is a failure") {
    const std::string lines[] = {
        "PROXY \r\n",
        "PROXY TCP4\r\n",
        "PROXY TCP4 192.168.0.1 192.168.0.11 56324\r\n",
        "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\n",
        "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443 \r\n",
        "PROXY TCP4  192.168.0.1 192.168.0.11 56324 443\r\n",
        "PROXY TCP4 192.168.0.1 192.168.0.11 56324 65536\r\n",
        "PROXY TCP4 192.168.0.1 192.168.0.11 056324 443\r\n",
        "PROXY TCP4 192.168.0.1 192.168.0.11 +1 443\r\n",
        "PROXY TCP4 192.168.0.256 192.168.0.11 56324 443\r\n",
        "PROXY TCP4 ::1 ::1 56324 443\r\n",
        "PROXY TCP6 192.168.0.1 192.168.0.11 56324 443\r\n",
        "PROXY TCP4 192.168.0.1 host 56324 443\r\n",
        "PROXY UDP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        "PROXY UNKNOWNx\r\n",
        "PROXY unknown\r\n",
    };
    for (const std::string& line : lines)
        for (const std::size_t piece : {std::size_t{1}, std::string_view::npos}) {
            CAPTURE(line);
            CHECK(parse_proxy_header(line, piece) == "the line is malformed");
        }
    for (const std::string line : {"GET / HTTP/1.1\r\n", "PROXX", "proxy TCP4", "\n", "\x16\x03\x01"})
        CHECK(parse_proxy_header(line) == "there is no PROXY header");
    CHECK(parse_proxy_header("PROXY UNKNOWN" + std::string(92, 'x') + "\r\n") == "the line is malformed");
    CHECK(parse_proxy_header("PROXY UNKNOWN " + std::string(91, 'x') + "\r\n") == "none 0");
    CHECK(parse_proxy_header("PROXY UNKNOWN " + std::string(92, 'x') + "\r\n") == "the line is longer than 107 bytes");
    CHECK(parse_proxy_header("PROXY UNKNOWN " + std::string(90, 'x')) == "more");
}

TEST_CASE("a PROXY header of version 2 is parsed in pieces of any size, and nothing after it is consumed") {
    const std::string ipv4 = hex("c0 00 02 01 c6 33 64 02 dc 04 01 bb");
    const std::string ipv6 =
        hex("20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 07"
            "20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 01 dc 04 01 bb");
    const std::string fields = hex("03 00 04 a9 b8 7e 8f 05 00 02 61 62");  // PP2_TYPE_CRC32C, PP2_TYPE_UNIQUE_ID
    const struct {
        std::string header, address;
    } table[] = {
        {proxy_v2("21 11", ipv4), "192.0.2.1"},
        {proxy_v2("21 11", ipv4 + fields), "192.0.2.1"},
        {proxy_v2("21 11", ipv4 + std::string(4084, '\0')), "192.0.2.1"},
        {proxy_v2("21 21", ipv6), "2001:db8::7"},
        {proxy_v2("21 21", ipv6 + fields), "2001:db8::7"},
        {proxy_v2("21 12", ipv4), "none"},                   // UDP
        {proxy_v2("21 31", std::string(216, '/')), "none"},  // Unix sockets
        {proxy_v2("21 00", ""), "none"},                     // UNSPEC
        {proxy_v2("21 00", fields), "none"},
        {proxy_v2("20 00", ""), "none"},  // LOCAL
        {proxy_v2("20 11", ipv4), "none"},
        {proxy_v2("20 ff", "?"), "none"},  // the family of LOCAL is ignored
    };
    for (const auto& row : table)
        for (const std::size_t piece : {std::size_t{1}, std::size_t{13}, std::string_view::npos})
            for (const std::string after : {"", "GET / HTTP/1.1\r\n"}) {
                CAPTURE(row.address);
                CHECK(parse_proxy_header(row.header + after, piece) ==
                      row.address + " " + std::to_string(after.size()));
            }
    const std::string whole = proxy_v2("21 21", ipv6);
    for (std::size_t size = 0; size < whole.size(); ++size) CHECK(parse_proxy_header(whole.substr(0, size)) == "more");
}

TEST_CASE("a malformed PROXY header of version 2 is a failure") {
    const std::string ipv4(12, '\1');
    for (const std::string start : {"11 11", "31 11", "01 11", "22 11", "2f 11"})
        CHECK(parse_proxy_header(proxy_v2(start, ipv4)) == "the version or the command is unknown");
    for (const std::string start : {"21 41", "21 13", "21 ff"})
        CHECK(parse_proxy_header(proxy_v2(start, ipv4)) == "the family is unknown");
    CHECK(parse_proxy_header(proxy_v2("21 11", ipv4.substr(1))) == "the addresses are missing");
    CHECK(parse_proxy_header(proxy_v2("21 21", std::string(35, '\0'))) == "the addresses are missing");
    // Refused before it arrives.
    CHECK(parse_proxy_header(proxy_v2("21 11", ipv4 + std::string(4085, '\0')).substr(0, 16)) ==
          "the header is too large");
    CHECK(parse_proxy_header(hex("0d 0a 0d 0a 00 0d 0a 51 55 49 54 0b")) == "there is no PROXY header");
    CHECK(parse_proxy_header(hex("0d 0a 47")) == "there is no PROXY header");
}

// ---- listening ------------------------------------------------------------------------------------------------------

TEST_CASE("for port 0 the system picks a different port for each listener") {
    BoundListener first, second;
    CHECK(first.address().port > 0);
    CHECK(second.address().port > 0);
    CHECK(first.address().port != second.address().port);
    CHECK(connect_to(first.address()));
}

TEST_CASE("a listener accepts connections with their addresses, and reports when no connection waits") {
    BoundListener listener;
    IpAddress peer;
    int error = 0;
    CHECK_FALSE(listener.accept(peer, error));
    CHECK(os::would_block(error));

    Socket client = connect_to(listener.address());
    Socket accepted = accept(listener, peer);
    CHECK(peer.to_string() == "127.0.0.1");
    CHECK(send(client, "hello").size == 5);
    char bytes[16];
    REQUIRE(wait_readable(accepted.descriptor()));
    CHECK(accepted.receive(bytes, sizeof bytes).size == 5);
    CHECK(std::string_view(bytes, 5) == "hello");
}

TEST_CASE("an accepted connection has TCP_NODELAY") {
    BoundListener listener;
    const Socket client = connect_to(listener.address());
    IpAddress peer;
    const Socket accepted = accept(listener, peer);
    int on = 0;
    socklen_t size = sizeof on;
    REQUIRE(::getsockopt(accepted.descriptor(), IPPROTO_TCP, TCP_NODELAY, &on, &size) == 0);
    CHECK(on != 0);
}

TEST_CASE("a port in use is an Error that names the cause") {
    BoundListener listener;
    const std::string where = listener.address().to_string();
    CHECK(listen_error(where) == "listen " + where + ": " + os::error_text(EADDRINUSE) + ": another process has it");
}

TEST_CASE("a port with connections in TIME_WAIT can be used again at once") {
    ListenAddress where;
    {
        BoundListener listener;
        where = listener.address();
        Socket client = connect_to(where);
        IpAddress peer;
        Socket accepted = accept(listener, peer);
        // The side that closes first gets the state TIME_WAIT.
        accepted.close();
    }
    CHECK(listen_error(where.to_string()) == "");
}

TEST_CASE("two listeners share a port only if both set reuse_port") {
    BoundListener first("0", true);
    CHECK(listen_error(first.address().to_string(), true) == "");
    CHECK(contains(listen_error(first.address().to_string()), "EADDRINUSE"));
    BoundListener alone;
    CHECK(contains(listen_error(alone.address().to_string(), true), "EADDRINUSE"));
}

TEST_CASE("an address that the machine does not have is an Error") {
    // RFC 5737: 192.0.2.0/24 is for documentation.
    CHECK(listen_error("192.0.2.1:0") ==
          "listen 192.0.2.1:0: Cannot assign requested address (EADDRNOTAVAIL): this machine has no such address");
}

TEST_CASE("an unknown host is an Error that names it") {
    // RFC 1035 2.3.4: a label has at most 63 octets. The resolver refuses this one without a query.
    const std::string where = std::string(64, 'x') + ".example:80";
    const std::string error = listen_error(where);
    CHECK(contains(error, "listen " + where + ": the host is unknown: "));
}

TEST_CASE("a port below 1024 without permission is an Error that names the reason") {
    int lowest_free = 1024;
    if (std::FILE* setting = std::fopen("/proc/sys/net/ipv4/ip_unprivileged_port_start", "r")) {
        CHECK(std::fscanf(setting, "%d", &lowest_free) == 1);
        std::fclose(setting);
    }
    if (lowest_free <= 1) {
        MESSAGE("this machine allows every port to every user");
        return;
    }
    CHECK(run_unprivileged([] {
              return listen_error("127.0.0.1:1") ==
                     "listen 127.0.0.1:1: Permission denied (EACCES): ports below 1024 need permission";
          }) == 0);
}

TEST_CASE("a listener on an IPv6 address accepts only IPv6") {
    if (!has_ipv6()) {
        MESSAGE("this machine has no IPv6");
        return;
    }
    BoundListener listener("[::]:0");
    CHECK(contains(listener.address().to_string(), "[::]:"));
    const Socket client = connect_to(listener.address(), AF_INET6);
    IpAddress peer;
    CHECK(accept(listener, peer));
    CHECK(peer.to_string() == "::1");
    // RFC 3493 5.3: without this option it would accept IPv4 too.
    int ipv6_only = 0;
    socklen_t size = sizeof ipv6_only;
    REQUIRE(::getsockopt(listener.descriptor(), IPPROTO_IPV6, IPV6_V6ONLY, &ipv6_only, &size) == 0);
    CHECK(ipv6_only == 1);
}

TEST_CASE("a listener on all addresses accepts IPv4 and IPv6") {
    BoundListener listener("*:0");
    IpAddress peer;
    const Socket ipv4_client = connect_to(listener.address(), AF_INET);
    CHECK(accept(listener, peer));
    CHECK(peer.to_string() == "127.0.0.1");
    if (!has_ipv6()) {
        MESSAGE("this machine has no IPv6");
        return;
    }
    const Socket ipv6_client = connect_to(listener.address(), AF_INET6);
    CHECK(accept(listener, peer));
    CHECK(peer.to_string() == "::1");
}

TEST_CASE("a listener on a Unix socket removes the path when it closes") {
    TemporaryDirectory directory;
    const std::string path = directory / "chat.sock";
    {
        BoundListener listener("unix:" + path);
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

TEST_CASE("a listener replaces the Unix socket of a dead process") {
    TemporaryDirectory directory;
    const std::string path = directory / "chat.sock";
    {
        const Socket dead = bound_unix_socket(path);
        REQUIRE(::listen(dead.descriptor(), 1) == 0);
    }
    BoundListener listener("unix:" + path);
    CHECK(connect_to(listener.address()));
}

TEST_CASE("a Unix socket in use is an Error, and its owner keeps it") {
    TemporaryDirectory directory;
    BoundListener listener("unix:" + directory / "chat.sock");
    const std::string where = listener.address().to_string();
    CHECK(listen_error(where) == "listen " + where + ": " + os::error_text(EADDRINUSE) + ": another process has it");
    CHECK(connect_to(listener.address()));
}

TEST_CASE("a file at the path of a Unix socket is an Error, and the file stays") {
    TemporaryDirectory directory;
    const std::string path = directory / "notes.txt";
    std::FILE* file = std::fopen(path.c_str(), "w");
    REQUIRE(file != nullptr);
    std::fclose(file);
    CHECK(contains(listen_error("unix:" + path), "EADDRINUSE"));
    struct stat status {};
    REQUIRE(::lstat(path.c_str(), &status) == 0);
    CHECK(S_ISREG(status.st_mode));
}

TEST_CASE("a path for a Unix socket that is too long or in a missing directory is an Error") {
    const std::string longest(sizeof(sockaddr_un::sun_path) - 1, 'x');
    CHECK(listen_error("unix:" + longest + "x") ==
          "listen unix:" + longest + "x: the path is longer than " + std::to_string(longest.size()) + " bytes");
    TemporaryDirectory directory;
    const std::string where = "unix:" + directory / "missing" + "/chat.sock";
    const std::string error = listen_error(where);
    CHECK(contains(error, "listen " + where + ": No such file or directory (ENOENT)"));
}

// ---- sockets --------------------------------------------------------------------------------------------------------

TEST_CASE("OwnedDescriptor closes its descriptor once, also after moves") {
    int number = -1;
    {
        Pair pair;
        number = pair.local.descriptor();
        OwnedDescriptor moved(std::move(pair.local));
        CHECK_FALSE(pair.local);
        CHECK(moved.descriptor() == number);
        OwnedDescriptor assigned;
        assigned = std::move(moved);
        CHECK(assigned.descriptor() == number);
        CHECK(::fcntl(number, F_GETFD) != -1);
    }
    CHECK(::fcntl(number, F_GETFD) == -1);
}

TEST_CASE("receive reports bytes, would_block, the end and errors") {
    Pair pair;
    char bytes[8];
    CHECK(pair.local.receive(bytes, sizeof bytes).outcome == IoResult::Outcome::would_block);
    send(pair.peer, "abc");
    const IoResult got = pair.local.receive(bytes, sizeof bytes);
    CHECK(got.outcome == IoResult::Outcome::done);
    CHECK(got.size == 3);
    pair.peer.shutdown_send();
    CHECK(pair.local.receive(bytes, sizeof bytes).outcome == IoResult::Outcome::end);

    BoundListener listener;
    test::RawClient client(connect_to(listener.address()));
    IpAddress peer;
    Socket accepted = accept(listener, peer);
    client.reset();
    REQUIRE(wait_readable(accepted.descriptor()));
    const IoResult lost = accepted.receive(bytes, sizeof bytes);
    CHECK(lost.outcome == IoResult::Outcome::error);
    CHECK(lost.error == ECONNRESET);
}

TEST_CASE("send sends up to max_pieces pieces in order") {
    Pair pair;
    std::vector<std::string> texts;
    std::string all;
    for (std::size_t i = 0; i < Socket::max_pieces; ++i) all += texts.emplace_back("piece " + std::to_string(i) + "\n");
    const std::vector<std::string_view> pieces(texts.begin(), texts.end());
    const IoResult sent = pair.local.send(pieces.data(), pieces.size());
    CHECK(sent.outcome == IoResult::Outcome::done);
    CHECK(sent.size == all.size());
    std::string received(all.size() + 1, '\0');
    received.resize(pair.peer.receive(&received[0], received.size()).size);
    CHECK(received == all);
}

TEST_CASE("send reports would_block when the peer does not read") {
    Pair pair;
    fill(pair.local);
    const IoResult refused = send(pair.local, "more");
    CHECK(refused.outcome == IoResult::Outcome::would_block);
    CHECK(refused.size == 0);
}

TEST_CASE("sending to a closed peer is an error and raises no SIGPIPE") {
    static volatile std::sig_atomic_t raised;
    raised = 0;
    const auto previous = std::signal(SIGPIPE, [](int) { raised = raised + 1; });
    TemporaryDirectory directory;
    const std::string path = directory / "socket";
    BoundListener listener("unix:" + path);
    for (const bool from_client : {true, false}) {
        CAPTURE(from_client);
        const sockaddr_un name = unix_name(path);
        Socket client(os::open_socket(AF_UNIX));
        REQUIRE(::connect(client.descriptor(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
        IpAddress peer;
        Socket accepted = accept(listener, peer);
        (from_client ? accepted : client).close();
        Socket& sender = from_client ? client : accepted;
        const std::string_view pieces[] = {"one", "two"};
        for (const std::size_t count_of_pieces : {1u, 2u}) {
            CAPTURE(count_of_pieces);
            const IoResult sent = sender.send(pieces, count_of_pieces);
            CHECK(sent.outcome == IoResult::Outcome::error);
            CHECK(sent.error == EPIPE);
        }
    }
    CHECK(raised == 0);
    std::signal(SIGPIPE, previous);
}

TEST_CASE("a batch sends to each socket once, with the results of single calls") {
    const auto batch = SendBatch::make();
    if (!WSCHAT_LIBURING) CHECK(batch == nullptr);
    if (!batch) return;  // not compiled in, or the kernel provides no ring
    enum class Peer { reads, full, closed };
    const auto kind = [](std::size_t i) { return i % 10 == 3 ? Peer::full : i % 10 == 7 ? Peer::closed : Peer::reads; };
    std::vector<Pair> pairs(100);
    std::vector<std::string> texts;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        if (kind(i) == Peer::full) fill(pairs[i].local);
        if (kind(i) == Peer::closed) pairs[i].peer.close();
        texts.push_back("for peer " + std::to_string(i));
    }
    for (int round = 0; round < 2; ++round) {
        for (std::size_t i = 0; i < pairs.size(); ++i) batch->add(pairs[i].local, texts[i], &pairs[i]);
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
            if (kind(i) == Peer::closed) CHECK(item.sent->error == EPIPE);
        });
        CHECK(visited == pairs.size());
        for (std::size_t i = 0; i < pairs.size(); ++i) {
            if (kind(i) != Peer::reads) continue;
            char received[64];
            const IoResult got = pairs[i].peer.receive(received, sizeof received);
            CHECK(std::string_view(received, got.size) == texts[i]);
        }
    }
}

TEST_CASE("a batch with fewer than min_items items sends nothing") {
    const auto batch = SendBatch::make();
    if (!batch) return;
    std::vector<Pair> pairs(SendBatch::min_items - 1);
    for (Pair& pair : pairs) batch->add(pair.local, "hello", &pair);
    batch->send([](const SendBatch::Item&) { FAIL("it sent too few items"); });
    batch->send([](const SendBatch::Item&) { FAIL("the items were not dropped"); });
    char received[8];
    for (Pair& pair : pairs) CHECK(pair.peer.receive(received, 8).outcome == IoResult::Outcome::would_block);
}

TEST_CASE("after shutdown_send the peer reads the end and can still send") {
    Pair pair;
    pair.local.shutdown_send();
    char byte;
    CHECK(pair.peer.receive(&byte, 1).outcome == IoResult::Outcome::end);
    send(pair.peer, "!");
    CHECK(pair.local.receive(&byte, 1).outcome == IoResult::Outcome::done);
}

#if defined(__linux__)
TEST_CASE("every descriptor of this section is close-on-exec") {
    // FAULTS 40. Descriptors that were open before do not count.
    const std::vector<int> before = inheritable_descriptors();
    TemporaryDirectory directory;
    BoundListener tcp, local("unix:" + directory / "chat.sock");
    const Socket tcp_client = connect_to(tcp.address()), local_client = connect_to(local.address());
    IpAddress peer;
    const Socket tcp_accepted = accept(tcp, peer), local_accepted = accept(local, peer);
    const WakeUp wake_up;
    const auto system = Poller::make(PollerKind::automatic), poll = Poller::make(PollerKind::poll);
    CHECK(inheritable_descriptors() == before);
}
#endif

TEST_CASE("the text of a system error has its message and its name") {
    CHECK(os::error_text(EADDRINUSE) == std::strerror(EADDRINUSE) + std::string(" (EADDRINUSE)"));
    CHECK(os::error_text(ENOENT) == "No such file or directory (ENOENT)");
    CHECK(contains(os::error_text(ENOTTY), "(" + std::to_string(ENOTTY) + ")"));
}

TEST_CASE("drain delivers each byte of a wake-up, and a full pipe does not block the writer") {
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
#elif defined(__FreeBSD__) || defined(__APPLE__)
    CHECK(Poller::make(PollerKind::automatic)->name() == std::string("kqueue"));
#endif
}

TEST_CASE("a poller reports a readable socket until all bytes are read") {
    for_each_poller([&](Poller& poller) {
        WatchedPair pair(poller, true, false);
        CHECK(pair.events() == "");
        send(pair.peer, "ab");
        CHECK(pair.events() == "r");
        char byte;
        pair.local.receive(&byte, 1);
        CHECK(pair.events() == "r");
        pair.local.receive(&byte, 1);
        CHECK(pair.events() == "");
    });
}

TEST_CASE("a poller reports a writable socket until the kernel accepts no more") {
    for_each_poller([&](Poller& poller) {
        WatchedPair pair(poller, false, true);
        CHECK(pair.events() == "w");
        CHECK(pair.events() == "w");
        fill(pair.local);
        CHECK(pair.events() == "");
        std::vector<char> buffer(1 << 20);
        while (pair.peer.receive(buffer.data(), buffer.size()).outcome == IoResult::Outcome::done) continue;
        CHECK(pair.events() == "w");
    });
}

TEST_CASE("a poller reports only the events of the last change") {
    for_each_poller([&](Poller& poller) {
        WatchedPair pair(poller, false, false);
        send(pair.peer, "a");
        CHECK(pair.events() == "");
        pair.watch(true, false);
        CHECK(pair.events() == "r");
        pair.watch(false, true);
        CHECK(pair.events() == "w");
        pair.watch(false, false);
        CHECK(pair.events() == "");
        pair.watch(true, true);
        CHECK(contains(pair.events(), "r"));
        CHECK(contains(pair.events(), "w"));
    });
}

TEST_CASE("a poller reports a broken connection even if it watches for nothing") {
    for_each_poller([&](Poller& poller) {
        BrokenConnection broken(poller);
        CHECK(broken.events(20'000) == "b");
    });
}

TEST_CASE("after the peer ends its sending side the socket is readable and not broken") {
    for_each_poller([&](Poller& poller) {
        WatchedPair pair(poller, true, false);
        pair.peer.shutdown_send();
        CHECK(pair.events() == "r");
        pair.watch(false, false);
        CHECK(pair.events() == "");
    });
}

TEST_CASE("each wait reports a broken connection until it is removed, for each set of watched events") {
    for_each_poller([&](Poller& poller) {
        BrokenConnection broken(poller);
        for (int i = 0; i < 3; ++i) CHECK(broken.events(20'000) == "b");
        broken.watch(true, false);
        CHECK(contains(broken.events(), "b"));
        broken.watch(false, true);
        CHECK(broken.events() == "wb");
        broken.watch(false, false);
        CHECK(broken.events() == "b");
        broken.remove();
        CHECK(broken.events() == "");
    });
}

TEST_CASE("after this side ends its sending side the socket is not broken until the peer ends its own") {
    for_each_poller([&](Poller& poller) {
        for (const bool read : {false, true}) {
            CAPTURE(read);
            BoundListener listener;
            test::RawClient client(connect_to(listener.address()));
            IpAddress peer;
            Socket accepted = accept(listener, peer);
            Owner owner;
            REQUIRE(poller.add(accepted.descriptor(), owner, read, false));
            accepted.shutdown_send();
            CHECK(client.read_to_end());
            CHECK(wait_for(poller, owner) == "");
            client.send("a");
            if (read) CHECK(wait_for(poller, owner, 20'000) == "r");
            else CHECK(wait_for(poller, owner) == "");
            REQUIRE(poller.change(accepted.descriptor(), owner, false, true));
            CHECK(wait_for(poller, owner) == "w");
            REQUIRE(poller.change(accepted.descriptor(), owner, false, false));
            client.shutdown_send();
            CHECK(wait_for(poller, owner, 20'000) == "b");  // the byte is still unread
            poller.remove(accepted.descriptor());
        }
    });
}

TEST_CASE("a poller that watches for nothing waits while the peer sends or ends its sending side") {
    for_each_poller([&](Poller& poller) {
        WatchedPair pair(poller, false, false), other(poller, true, false);
        send(pair.peer, "ab");
        pair.peer.shutdown_send();
        CHECK(pair.events() == "");
        std::thread sender([&] { send(other.peer, "c"); });
        CHECK(wait_for(poller, other.owner, 20'000) == "r");
        sender.join();
        pair.watch(true, false);
        CHECK(pair.events() == "r");
    });
}

// WSAPoll() of Windows, replayed on poll(): a peer that ends its sending side is POLLHUP, and never POLLIN alone.
struct ReplayedWsaPoll {
    static constexpr bool hang_up_is_end_of_input = true;
    static inline int calls = 0;
    static int poll(os::Pollfd* entries, std::size_t count, int timeout_ms) {
        ++calls;
        std::vector<pollfd> copies(entries, entries + count);
        for (pollfd& copy : copies) copy.events = static_cast<short>(copy.events | POLLRDHUP);
        const int result = os::poll(copies.data(), count, timeout_ms);
        for (std::size_t i = 0; i < count; ++i) {
            const unsigned events = static_cast<unsigned short>(copies[i].revents);
            const unsigned hung_up = (events & POLLRDHUP) != 0 ? POLLHUP : 0;
            entries[i].revents = static_cast<short>((events & ~unsigned{POLLRDHUP | POLLERR}) | hung_up);
        }
        return result;
    }
};

TEST_CASE("with WSAPoll, the end of the peer's input is readable, an error is broken, and an unread end does not spin") {
    BasicPollPoller<ReplayedWsaPoll> poller;
    BoundListener listener;
    test::RawClient client(connect_to(listener.address()));
    IpAddress peer;
    Socket accepted = accept(listener, peer);
    Owner owner;
    REQUIRE(poller.add(accepted.descriptor(), owner, true, false));
    client.shutdown_send();
    CHECK(wait_for(poller, owner, 20'000) == "r");

    REQUIRE(poller.change(accepted.descriptor(), owner, false, true));
    CHECK(wait_for(poller, owner, 20'000) == "w");
    REQUIRE(poller.change(accepted.descriptor(), owner, false, false));
    ReplayedWsaPoll::calls = 0;
    CHECK(wait_for(poller, owner, 100) == "");
    CHECK(ReplayedWsaPoll::calls <= 2 * 100 / 10 + 2);

    test::RawClient second(connect_to(listener.address()));
    Socket broken = accept(listener, peer);
    REQUIRE(poller.add(broken.descriptor(), owner, false, false));
    second.reset();
    CHECK(wait_for(poller, owner, 20'000) == "b");
}

TEST_CASE("a poller does not report a removed descriptor, even if it was in the last batch") {
    for_each_poller([&](Poller& poller) {
        WatchedPair first(poller, true, false), second(poller, true, false), third(poller, true, false);
        for (WatchedPair* pair : {&first, &second, &third}) send(pair->peer, "a");
        std::vector<Poller::Ready> ready;
        poller.wait(20'000, ready);
        CHECK(ready.size() == 3);
        // A callback for the first owner may close another owner of the same batch.
        poller.remove(first.local.descriptor());
        first.local.close();
        poller.wait(20'000, ready);
        CHECK(events_of(ready, first.owner) == "");
        CHECK(events_of(ready, second.owner) == "r");
        CHECK(events_of(ready, third.owner) == "r");
        poller.remove(third.local.descriptor());
        poller.wait(20'000, ready);
        CHECK(ready.size() == 1);
        CHECK(events_of(ready, second.owner) == "r");
        poller.remove(second.local.descriptor());
        poller.wait(0, ready);
        CHECK(ready.empty());
    });
}

TEST_CASE("a reused descriptor number is reported only to its new owner") {
    for_each_poller([&](Poller& poller) {
        WatchedPair old(poller, true, false);
        const int number = old.local.descriptor();
        send(old.peer, "a");
        CHECK(old.events() == "r");
        poller.remove(number);
        old.local.close();

        Pair next;
        Owner next_owner;
        REQUIRE(::dup2(next.local.descriptor(), number) == number);
        const Socket reused(number);
        REQUIRE(poller.add(number, next_owner, true, false));
        CHECK(wait_for(poller, next_owner) == "");
        send(next.peer, "b");
        CHECK(wait_for(poller, next_owner) == "r");
        CHECK(old.events() == "");
        poller.remove(number);
    });
}

TEST_CASE("a poller reports each of many ready descriptors within a few calls of wait") {
    const DescriptorLimit raised(RLIM_INFINITY);
    for_each_poller([&](Poller& poller) {
        constexpr std::size_t count = 700;  // more than one batch of epoll
        Pair pair;
        send(pair.peer, "a");
        std::vector<Owner> owners(count);
        std::vector<OwnedDescriptor> copies;
        for (Owner& owner : owners) {
            copies.emplace_back(::fcntl(pair.local.descriptor(), F_DUPFD_CLOEXEC, 0));
            REQUIRE(copies.back());
            REQUIRE(poller.add(copies.back().descriptor(), owner, true, false));
        }
        std::set<Pollable*> seen;
        std::vector<Poller::Ready> ready;
        for (int round = 0; round < 4; ++round) {
            poller.wait(20'000, ready);
            for (const Poller::Ready& entry : ready) seen.insert(entry.owner);
        }
        CHECK(seen.size() == count);
        for (const OwnedDescriptor& copy : copies) poller.remove(copy.descriptor());
    });
}

TEST_CASE("a poller handles descriptors above 1024") {
    const DescriptorLimit raised(RLIM_INFINITY);
    for_each_poller([&](Poller& poller) {
        Pair pair;
        const OwnedDescriptor high(::fcntl(pair.local.descriptor(), F_DUPFD_CLOEXEC, 1500));
        if (!high) {
            MESSAGE("this machine has no descriptors above 1500");
            return;
        }
        Owner owner;
        REQUIRE(poller.add(high.descriptor(), owner, true, true));
        CHECK(wait_for(poller, owner) == "w");
        send(pair.peer, "a");
        poller.change(high.descriptor(), owner, true, false);
        CHECK(wait_for(poller, owner) == "r");
        poller.remove(high.descriptor());
        CHECK(wait_for(poller, owner) == "");
    });
}

TEST_CASE("wait returns an empty batch when the timeout is over") {
    for_each_poller([&](Poller& poller) {
        WatchedPair pair(poller, true, false);
        std::vector<Poller::Ready> ready{{&pair.owner, true, true, true}};
        poller.wait(1, ready);
        CHECK(ready.empty());
    });
}

TEST_CASE("another thread can wake a poller") {
    for_each_poller([&](Poller& poller) {
        WakeUp wake_up;
        Owner owner;
        REQUIRE(poller.add(wake_up.descriptor(), owner, true, false));
        std::thread waker([&] { WakeUp::wake(wake_up.write_end(), 1); });
        CHECK(wait_for(poller, owner, 20'000) == "r");
        waker.join();
    });
}

TEST_CASE("without free descriptors each constructor throws an Error, and it works again later") {
    TemporaryDirectory directory;
    const std::string path = directory / "chat.sock";
    const std::function<void()> calls[] = {
        [] { BoundListener("127.0.0.1:0"); },
        [] { BoundListener("*:0"); },
        [&] { BoundListener("unix:" + path); },
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

TEST_CASE("an abandoned Unix socket stays if no descriptor is free to probe it") {
    TemporaryDirectory directory;
    const std::string path = directory / "chat.sock";
    bound_unix_socket(path).close();
    {
        const NoDescriptors none;
        CHECK(contains(listen_error("unix:" + path), "(EMFILE)"));
    }
    struct stat status {};
    CHECK(::lstat(path.c_str(), &status) == 0);
}

#if defined(__linux__)
TEST_CASE("a Unix socket with a full backlog is an Error, and its owner keeps it") {
    TemporaryDirectory directory;
    const std::string path = directory / "chat.sock";
    const Socket busy = bound_unix_socket(path);
    REQUIRE(::listen(busy.descriptor(), 0) == 0);
    // One connection waits and fills the backlog.
    const ListenAddress where = ListenAddress::parse("unix:" + path);
    const Socket first = connect_to(where);
    REQUIRE(first);
    CHECK(contains(listen_error(where.to_string()), "(EADDRINUSE)"));
    const Socket accepted(::accept(busy.descriptor(), nullptr, nullptr));
    CHECK(accepted);
    CHECK(connect_to(where));
}
#endif

TEST_CASE("a Unix socket in a directory without permission is an Error without advice about ports") {
    TemporaryDirectory directory;
    const std::string where = "unix:" + directory / "chat.sock";
    REQUIRE(::chmod((directory / "").c_str(), 0500) == 0);
    CHECK(run_unprivileged([&] {
              return listen_error(where) == "listen " + where + ": Permission denied (EACCES) from bind";
          }) == 0);
}

TEST_CASE("each error of sockets and files has its name in the text") {
    // clang-format off
    const std::pair<int, std::string> names[] = {
        {EACCES, "EACCES"}, {EADDRINUSE, "EADDRINUSE"}, {EADDRNOTAVAIL, "EADDRNOTAVAIL"},
        {EAFNOSUPPORT, "EAFNOSUPPORT"}, {ECONNABORTED, "ECONNABORTED"}, {ECONNRESET, "ECONNRESET"},
        {EINVAL, "EINVAL"}, {EISDIR, "EISDIR"}, {EMFILE, "EMFILE"}, {ENFILE, "ENFILE"}, {ENOBUFS, "ENOBUFS"},
        {ENOENT, "ENOENT"}, {ENOMEM, "ENOMEM"}, {ENOTDIR, "ENOTDIR"}, {EPERM, "EPERM"}, {EPIPE, "EPIPE"},
        {ETIMEDOUT, "ETIMEDOUT"},
    };
    // clang-format on
    for (const auto& entry : names) {
        const std::string name = entry.second, text = os::error_text(entry.first);
        CAPTURE(name);
        CHECK(contains(text, " (" + name + ")"));
        CHECK(text.size() > name.size() + 3);
    }
}

TEST_CASE("an IP address has 32 or 128 bits, and the address of a Unix socket has none") {
    CHECK(address("127.0.0.1").bits() == 32);
    CHECK(address("::1").bits() == 128);
    CHECK(IpAddress().bits() == 0);
    CHECK(IpAddress().to_string() == "unix");
}

TEST_CASE("sending zero bytes sends nothing and does not end the stream") {
    Pair pair;
    const IoResult sent = send(pair.local, "");
    CHECK(sent.outcome == IoResult::Outcome::would_block);
    CHECK(sent.size == 0);
    CHECK(send(pair.local, "a").outcome == IoResult::Outcome::done);
}

TEST_CASE("make_nonblocking fails for an invalid descriptor") { CHECK_FALSE(os::make_nonblocking(-1)); }

TEST_CASE("removing an unknown descriptor changes nothing") {
    for_each_poller([&](Poller& poller) {
        WatchedPair known(poller, true, false);
        Pair unknown;
        poller.remove(unknown.local.descriptor());
        REQUIRE(send(known.peer, "a").outcome == IoResult::Outcome::done);
        CHECK(known.events() == "r");
    });
}

TEST_SUITE_END();
