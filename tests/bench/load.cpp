// bench_load: the load generator of tests/bench. It has one epoll thread, runs on Linux only, and costs less than any
// server: members that do not send only count received bytes (MSG_TRUNC: the kernel drops them without a copy), frames
// are built once, and every socket is edge-triggered. Prints one line of JSON, or an error and ends with status 1.
//
// Contents: options, clocks and the server's /proc, histogram, messages and frames, connections, the loop, the modes.

#include "load_support.hpp"

#include <dirent.h>
#include <sys/prctl.h>

#include <map>
#include <memory>

const load_support::Program load_support::program = {"bench_load", 1};

namespace {

using load_support::fail;
using load_support::loopback_address;
using Nanoseconds = std::int64_t;
constexpr Nanoseconds second = 1'000'000'000;
constexpr std::size_t smallest_payload = 24;  // the size of a stamp

// ---- options -------------------------------------------------------------------------------------------------------

struct Options {
    std::string mode;
    int port = 0;
    int pid = 0;
    std::size_t members = 200;  // number of connections, including the senders
    std::size_t senders = 4;
    std::size_t samples = 32;  // fanout-rate: members that read timestamps
    std::size_t size = 64;     // payload size in bytes
    double seconds = 2;
    double warmup = 0.3;
    double rate = 0;          // fanout-rate: messages per second of all senders
    double stalled = 0;       // fraction of the members that never read
    double timeout = 60;      // for the whole run, including warm-up and connecting
    std::size_t window = 64;  // concurrent handshakes
    bool binary = false;
    bool mixed = false;     // text with UTF-8 sequences of one to four bytes instead of ASCII
    bool takeover = false;  // deflate: the server may keep a context per member
    std::string path = "/";
};

constexpr const char* usage =
    "usage: bench_load --port P --pid SERVERPID --mode MODE [option value]...\n"
    "modes\n"
    "  fanout       every sender has one message in flight; counts deliveries\n"
    "  fanout-rate  --rate messages per second; latency from the intended send time\n"
    "  echo         every member has one message in flight\n"
    "  ping-idle    like echo, but only the first member sends\n"
    "  deflate      one sender, with compression; counts frames without decoding them\n"
    "  idle         connects the members; measures the server's memory before and after\n"
    "  connect      connects, opens and closes, with --window concurrent handshakes\n"
    "options\n"
    "  --members N (200)     number of connections     --senders N (4)      members that send (fan-out modes)\n"
    "  --size BYTES (64)     payload size, at least 24 --type text|binary   (text)\n"
    "  --filler ascii|mixed  kind of text (ascii)      --rate R             messages per second\n"
    "  --stalled F (0)       fraction that never reads --samples N (32)     members that measure latency\n"
    "  --seconds S (2)       measured time             --warmup S (0.3)     time before the measurement\n"
    "  --window N (64)       concurrent handshakes     --timeout S (60)     for the whole run\n"
    "  --path P (/)                                    --takeover yes|no    deflate: a context per member (no)\n";

double number(const char* name, const char* text, double least, double most) {
    char* end = nullptr;
    const double value = std::strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= least && value <= most))
        fail("%s %s: must be a number from %g to %g", name, text, least, most);
    return value;
}

bool one_of(const char* name, std::string_view text, std::string_view yes, std::string_view no) {
    if (text != yes && text != no) fail("%s %s: must be %s or %s", name, text.data(), yes.data(), no.data());
    return text == yes;
}

void set_option(Options& o, const char* name, const char* text) {
    const std::string_view n = name;
    const auto count = [&](double least, double most) {
        return static_cast<std::size_t>(number(name, text, least, most));
    };
    if (n == "--mode") o.mode = text;
    else if (n == "--port") o.port = static_cast<int>(count(1, 65535));
    else if (n == "--pid") o.pid = static_cast<int>(count(1, 1 << 30));
    else if (n == "--members") o.members = count(1, 100000);
    else if (n == "--senders") o.senders = count(1, 255);
    else if (n == "--samples") o.samples = count(1, 10000);
    else if (n == "--size") o.size = count(smallest_payload, 64 << 20);
    else if (n == "--seconds") o.seconds = number(name, text, 0.01, 600);
    else if (n == "--warmup") o.warmup = number(name, text, 0, 60);
    else if (n == "--rate") o.rate = number(name, text, 0.01, 1e7);
    else if (n == "--stalled") o.stalled = number(name, text, 0, 0.95);
    else if (n == "--timeout") o.timeout = number(name, text, 1, 3600);
    else if (n == "--window") o.window = count(1, 4096);
    else if (n == "--type") o.binary = one_of(name, text, "binary", "text");
    else if (n == "--filler") o.mixed = one_of(name, text, "mixed", "ascii");
    else if (n == "--takeover") o.takeover = one_of(name, text, "yes", "no");
    else if (n == "--path") o.path = text;
    else fail("unknown option: %s\n%s", name, usage);
}

Options parse_options(int argc, char** argv) {
    Options o;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc) fail("%s: needs a value\n%s", argv[i], usage);
        set_option(o, argv[i], argv[i + 1]);
    }
    if (o.mode.empty() || o.port == 0 || o.pid == 0) fail("--mode, --port and --pid are required\n%s", usage);
    if (o.mode == "fanout-rate" && o.rate <= 0) fail("--mode fanout-rate needs --rate");
    if (o.mode == "echo") o.senders = o.members;
    if (o.mode == "ping-idle" || o.mode == "deflate") o.senders = 1;
    if (o.senders > o.members) fail("--senders %zu: only %zu members", o.senders, o.members);
    o.timeout = (std::max)(o.timeout, o.seconds + o.warmup + 10);
    return o;
}

// ---- clocks and the server's /proc ---------------------------------------------------------------------------------

Nanoseconds read_clock(clockid_t id) {
    timespec t{};
    if (clock_gettime(id, &t) != 0) fail("the server ended during the run");
    return t.tv_sec * second + t.tv_nsec;
}

Nanoseconds now() { return read_clock(CLOCK_MONOTONIC); }

struct CpuTimes {
    Nanoseconds wall, server, load;
    std::map<std::string, Nanoseconds> threads;  // of the server, by the number of the thread
};

struct Memory {
    long rss_kib, pss_kib;
};

// The CPU clock of another process counts all its threads in nanoseconds, including ended threads.
class ServerProcess {
public:
    explicit ServerProcess(int pid) : pid_(pid) {
        if (clock_getcpuclockid(pid, &clock_) != 0) fail("--pid %d: no such process", pid);
    }
    CpuTimes times() const {
        return {now(), read_clock(clock_), read_clock(CLOCK_PROCESS_CPUTIME_ID), thread_times()};
    }
    Memory memory() const { return {field("status", "VmRSS:"), field("smaps_rollup", "Pss:")}; }

private:
    std::map<std::string, Nanoseconds> thread_times() const {
        std::map<std::string, Nanoseconds> times;
        const std::string folder = "/proc/" + std::to_string(pid_) + "/task/";
        DIR* const tasks = opendir(folder.c_str());
        if (tasks == nullptr) return times;
        while (const dirent* task = readdir(tasks)) {
            std::FILE* f = std::fopen((folder + task->d_name + "/schedstat").c_str(), "r");
            if (f == nullptr) continue;  // "." or ".."
            long long running = 0;
            if (std::fscanf(f, "%lld", &running) == 1) times[task->d_name] = running;
            std::fclose(f);
        }
        closedir(tasks);
        return times;
    }
    long field(const char* file, const char* name) const {
        const std::string path = "/proc/" + std::to_string(pid_) + "/" + file;
        long value = -1;
        std::FILE* f = std::fopen(path.c_str(), "r");
        if (f == nullptr) return value;
        for (char line[256]; value < 0 && std::fgets(line, sizeof line, f) != nullptr;)
            if (std::strncmp(line, name, std::strlen(name)) == 0)
                value = std::strtol(line + std::strlen(name), nullptr, 10);
        std::fclose(f);
        return value;
    }

    int pid_;
    clockid_t clock_{};
};

// ---- histogram -----------------------------------------------------------------------------------------------------

// A log-linear histogram with 64 steps per power of two. Percentiles have an error of at most 1.6%.
class Histogram {
public:
    void add(Nanoseconds value) {
        const auto v = static_cast<std::uint64_t>((std::max)(value, Nanoseconds{0}));
        ++counts_[index(v)];
        ++total_;
        max_ = (std::max)(max_, v);
    }
    std::uint64_t total() const { return total_; }
    double microseconds(double fraction) const {
        auto left = static_cast<std::uint64_t>(fraction * static_cast<double>(total_));
        for (std::size_t i = 0; i < counts_.size(); ++i) {
            if (counts_[i] > left) return static_cast<double>((std::min)(highest(i), max_)) / 1e3;
            left -= counts_[i];
        }
        return static_cast<double>(max_) / 1e3;
    }
    double max_microseconds() const { return static_cast<double>(max_) / 1e3; }

private:
    static constexpr unsigned steps_log2 = 6;
    static std::size_t index(std::uint64_t v) {
        if (v < (1u << steps_log2)) return static_cast<std::size_t>(v);
        const unsigned shift = 63u - static_cast<unsigned>(__builtin_clzll(v)) - steps_log2;
        return (static_cast<std::size_t>(shift) << steps_log2) + static_cast<std::size_t>(v >> shift);
    }
    static std::uint64_t highest(std::size_t i) {
        if (i < (2u << steps_log2)) return i;
        const std::size_t shift = (i >> steps_log2) - 1;
        return ((i - (shift << steps_log2) + 1) << shift) - 1;
    }

    std::array<std::uint64_t, 58 << steps_log2> counts_{};
    std::uint64_t total_ = 0, max_ = 0;
};

// ---- messages and frames -------------------------------------------------------------------------------------------

// The first 24 bytes of a payload. Each is ASCII and holds six bits: sender, sequence, intended send time, zero.
struct Stamp {
    static constexpr std::size_t size = smallest_payload;
    std::uint64_t sender = 0, sequence = 0;
    Nanoseconds time = 0;
};

template <std::size_t N>
void put_digits(char* to, std::uint64_t value) {
    for (std::size_t i = 0; i < N; ++i, value >>= 6) to[i] = static_cast<char>('0' + (value & 63));
}

template <std::size_t N>
std::uint64_t get_digits(const char* from) {
    std::uint64_t value = 0;
    for (std::size_t i = N; i-- > 0;) value = value << 6 | static_cast<std::uint64_t>(from[i] - '0');
    return value;
}

void put_stamp(char* to, const Stamp& s) {
    put_digits<4>(to, s.sender);
    put_digits<6>(to + 4, s.sequence);
    put_digits<11>(to + 10, static_cast<std::uint64_t>(s.time));
    put_digits<3>(to + 21, 0);
}

Stamp get_stamp(const char* from) {
    return {get_digits<4>(from), get_digits<6>(from + 4), static_cast<Nanoseconds>(get_digits<11>(from + 10))};
}

// The payload after the stamp. Mixed text has about as many UTF-8 sequences of each length as a chat in many
// languages.
std::string filler(std::size_t n, bool binary, bool mixed) {
    constexpr std::string_view ascii = "The quick brown fox jumps over the lazy dog, and the dog does not mind. ";
    constexpr std::string_view many =
        "chat: \xC3\xA9\xC3\xBC\xC3\x9F \xD0\xBF\xD1\x80\xD0\xB8 \xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\x98\x80 ok ";
    const std::string_view text = mixed ? many : ascii;
    std::string out;
    while (!binary && out.size() + text.size() <= n) out += text;
    for (std::size_t i = out.size(); i < n; ++i) out += static_cast<char>(binary ? i * 131 >> 3 : '.');
    return out;
}

std::size_t put_length(char* to, std::size_t n) {
    to[0] = static_cast<char>(n < 126 ? n : n < 65536 ? 126 : 127);
    const std::size_t bytes = n < 126 ? 0 : n < 65536 ? 2 : 8;
    for (std::size_t i = 0; i < bytes; ++i) to[1 + i] = static_cast<char>(n >> (8 * (bytes - 1 - i)));
    return 1 + bytes;
}

// The frame that all senders use. Only its stamp changes, so the body is masked once.
class ClientFrame {
public:
    ClientFrame(std::size_t size, bool binary, bool mixed) : body_(filler(size - Stamp::size, binary, mixed)) {
        char length[9];
        const std::size_t bytes = put_length(length, size);
        length[0] = static_cast<char>(length[0] | 128);
        header_ = 1 + bytes + 4;
        server_size_ = 1 + bytes + size;
        frame_ += static_cast<char>(128 | (binary ? 2 : 1));
        frame_.append(length, bytes);
        frame_.append(mask, 4);
        frame_.resize(header_ + Stamp::size);
        for (std::size_t i = 0; i < body_.size(); ++i) frame_ += static_cast<char>(body_[i] ^ mask[i & 3]);
    }
    std::string_view stamped(const Stamp& s) {
        char* to = frame_.data() + header_;
        put_stamp(to, s);
        for (std::size_t i = 0; i < Stamp::size; ++i) to[i] = static_cast<char>(to[i] ^ mask[i & 3]);
        return frame_;
    }
    const std::string& body() const { return body_; }
    std::size_t server_size() const { return server_size_; }  // size of the unmasked frame that the server sends

private:
    static constexpr char mask[5] = "\x5A\xC3\x1E\x97";
    std::string frame_, body_;
    std::size_t header_ = 0, server_size_ = 0;
};

// ---- connections ---------------------------------------------------------------------------------------------------

enum class Role : std::uint8_t { counts, parses, stalls };
enum class Stage : std::uint8_t { closed, handshake, open, closing };

struct Connection {
    int fd = -1;
    Role role = Role::counts;
    Stage stage = Stage::closed;
    bool requested = false;  // the request was sent
    bool writing = false;    // a frame was sent only in part
    std::uint32_t index = 0;
    std::uint32_t sender = 0;       // its index among the senders
    Nanoseconds started = 0;        // when the handshake started
    std::uint64_t messages = 0;     // complete messages, if the role is `parses`
    Stamp last_sent;                // stamp of the last sent message
    std::size_t sent = 0;           // sent bytes of its frame
    std::uint64_t left = 0;         // remaining payload bytes of the current frame
    std::size_t body_position = 0;  // position in the body
    std::size_t head_size = 0;
    std::array<char, 127> head{};  // header and stamp, or a whole control frame
    std::string response;          // an incomplete response to the handshake
};

struct Totals {
    std::uint64_t bytes = 0;    // frame bytes at all members that read
    std::uint64_t reads = 0;    // read calls of members that parse
    std::uint64_t parsed = 0;   // messages at members that parse
    std::uint64_t payload = 0;  // deflate: compressed bytes at members that parse
    std::uint64_t sent = 0;     // messages sent
    std::uint64_t handshakes = 0;
    std::uint64_t stalled_closed = 0;
};

// ---- the loop ------------------------------------------------------------------------------------------------------

// Connections, their handshakes and their frames. A mode derives from it and decides what a message causes.
class Load {
public:
    explicit Load(const Options& o)
        : options_(o),
          server_(o.pid),
          frame_(o.size, o.binary, o.mixed),
          poller_(epoll_create1(EPOLL_CLOEXEC)),
          deadline_(now() + static_cast<Nanoseconds>(o.timeout * 1e9)) {
        request_ = "GET " + o.path + " HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(o.port) +
                   "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                   "Sec-WebSocket-Version: 13\r\n";
        if (deflate()) {
            request_ += "Sec-WebSocket-Extensions: permessage-deflate";
            request_ += o.takeover ? "\r\n" : "; server_no_context_takeover; client_no_context_takeover\r\n";
        }
        request_ += "\r\n";
    }
    virtual ~Load();
    Load(const Load&) = delete;
    Load& operator=(const Load&) = delete;
    virtual void run() = 0;

protected:
    virtual void on_open(Connection&) {}
    virtual void on_closed(Connection&) {}
    virtual void on_message(Connection&, const Stamp&) {}
    bool deflate() const { return options_.mode == "deflate"; }

    void start_connecting(Connection& c);
    void connect_all(std::size_t n);
    void disconnect(Connection& c);
    void start_closing(Connection& c);
    void send_message(Connection& c, Nanoseconds intended);
    void push(Connection& c);
    void poll_once(Nanoseconds until);
    void run_until(Nanoseconds end) {
        while (now() < end) poll_once(end);
    }
    void run_for(double seconds) { run_until(now() + static_cast<Nanoseconds>(seconds * 1e9)); }

    const Options& options_;
    ServerProcess server_;
    ClientFrame frame_;
    std::vector<Connection> connections_;
    Totals totals_;
    Nanoseconds poll_time_ = 0;  // when epoll_wait returned

private:
    void send_request(Connection& c);
    void on_event(Connection& c, std::uint32_t events);
    void on_end(Connection& c, const char* how);
    void read_response(Connection& c);
    void read_count(Connection& c);
    void read_parse(Connection& c);
    void feed(Connection& c, const char* p, std::size_t n);
    const char* feed_head(Connection& c, const char* p, const char* end);
    void begin_frame(Connection& c, std::size_t header, std::uint64_t payload);
    void on_control(Connection& c, std::size_t header, std::size_t payload);
    void end_frame(Connection& c);

    int poller_;
    Nanoseconds deadline_;
    std::string request_;
    std::size_t opening_ = 0;
    std::array<epoll_event, 512> events_{};
    std::array<char, 256 * 1024> buffer_{};
};

void Load::start_connecting(Connection& c) {
    c.fd = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c.fd < 0) fail("socket for connection %u: %s", c.index, std::strerror(errno));
    const int one = 1, small = 4096;
    setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (c.role == Role::stalls) setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    const sockaddr_in address = loopback_address(0, static_cast<std::uint16_t>(options_.port));
    c.stage = Stage::handshake;
    c.writing = false;
    c.started = now();
    ++opening_;
    if (::connect(c.fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 && errno != EINPROGRESS)
        fail("connect to 127.0.0.1:%d, connection %u: %s", options_.port, c.index, std::strerror(errno));
    // On the loopback the connection is usually established at once. If the backlog is full, EPOLLOUT comes later.
    send_request(c);
    epoll_event e{};
    e.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    e.data.ptr = &c;
    if (epoll_ctl(poller_, EPOLL_CTL_ADD, c.fd, &e) != 0) fail("epoll_ctl: %s", std::strerror(errno));
}

void Load::send_request(Connection& c) {
    c.requested = ::send(c.fd, request_.data(), request_.size(), MSG_NOSIGNAL) > 0;
    if (!c.requested && errno != EAGAIN && errno != ENOTCONN)
        fail("connect to 127.0.0.1:%d, connection %u: %s", options_.port, c.index, std::strerror(errno));
}

void Load::connect_all(std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        while (opening_ >= options_.window) poll_once(deadline_);
        start_connecting(connections_[i]);
    }
    while (opening_ != 0) poll_once(deadline_);
}

void Load::disconnect(Connection& c) {
    ::close(c.fd);
    c.stage = Stage::closed;
    c.fd = -1;
}

// The closing handshake. The server closes the TCP connection first, as RFC 6455 7.1.1 requires. Its Close frame stays
// unread, so close() sends a reset, and no ports wait in TIME_WAIT.
void Load::start_closing(Connection& c) {
    constexpr char frame[] = "\x88\x82\0\0\0\0\x03\xE8";
    if (::send(c.fd, frame, sizeof frame - 1, MSG_NOSIGNAL) < 0)
        fail("connection %u: cannot send the Close frame: %s", c.index, std::strerror(errno));
    c.stage = Stage::closing;
}

Load::~Load() {
    const linger reset{1, 0};
    for (const Connection& c : connections_)
        if (c.fd >= 0) setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
}

void Load::poll_once(Nanoseconds until) {
    const Nanoseconds before = now();
    if (before > deadline_) fail("not finished after %g s (%zu handshakes pending)", options_.timeout, opening_);
    const Nanoseconds wait = (std::max)((std::min)(until, before + second / 10) - before, Nanoseconds{0});
    const timespec timeout{wait / second, wait % second};
    const int n = epoll_pwait2(poller_, events_.data(), static_cast<int>(events_.size()), &timeout, nullptr);
    if (n < 0 && errno != EINTR) fail("epoll_pwait2: %s", std::strerror(errno));
    poll_time_ = now();
    for (int i = 0; i < n; ++i) {
        const auto& e = events_[static_cast<std::size_t>(i)];
        on_event(*static_cast<Connection*>(e.data.ptr), e.events);
    }
}

void Load::on_event(Connection& c, std::uint32_t events) {
    if (c.stage == Stage::handshake) {
        if (!c.requested && (events & EPOLLOUT) != 0) send_request(c);
        if ((events & ~static_cast<unsigned>(EPOLLOUT)) != 0) read_response(c);
        return;
    }
    if (c.stage == Stage::closing) {
        if ((events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) == 0) return;
        disconnect(c);
        return on_closed(c);
    }
    if (c.writing) push(c);
    if ((events & ~static_cast<unsigned>(EPOLLOUT)) == 0) return;
    if (c.role == Role::counts) read_count(c);
    else if (c.role == Role::parses) read_parse(c);
    else if ((events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) != 0) on_end(c, "");
}

void Load::on_end(Connection& c, const char* how) {
    if (c.role != Role::stalls) fail("connection %u of %zu ended by the server: %s", c.index, options_.members, how);
    ++totals_.stalled_closed;
    disconnect(c);
}

void Load::read_response(Connection& c) {
    char bytes[2048];
    const ssize_t k = ::recv(c.fd, bytes, sizeof bytes, 0);
    if (k < 0 && errno == EAGAIN) return;
    if (k <= 0) fail("connection %u: the handshake failed: %s", c.index, k == 0 ? "closed" : std::strerror(errno));
    c.response.append(bytes, static_cast<std::size_t>(k));
    const std::string response = std::move(c.response);
    c.response.clear();
    const std::size_t end = response.find("\r\n\r\n");
    if (end == std::string::npos) {
        if (response.size() > 16384) fail("connection %u: the response to the handshake is too long", c.index);
        c.response = response;  // the next segment causes the next event
        return;
    }
    const std::string line = response.substr(0, response.find('\r'));
    if (line.compare(0, 12, "HTTP/1.1 101") != 0) fail("connection %u: unexpected response: %s", c.index, line.c_str());
    if (response.find("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") > end) fail("connection %u: wrong Sec-WebSocket-Accept", c.index);
    if (deflate() && response.find("permessage-deflate") > end)
        fail("connection %u: the server does not compress", c.index);
    c.stage = Stage::open;
    --opening_;
    ++totals_.handshakes;
    on_open(c);
    if (c.stage != Stage::open || c.role == Role::stalls) return;
    const std::string_view frames = std::string_view(response).substr(end + 4);
    if (c.role == Role::parses) {
        feed(c, frames.data(), frames.size());
        read_parse(c);
    } else {
        totals_.bytes += frames.size();
        read_count(c);
    }
}

// All frames of a run have the same size, so the number of bytes gives the number of frames.
void Load::read_count(Connection& c) {
    for (;;) {
        const ssize_t k = ::recv(c.fd, buffer_.data(), buffer_.size(), MSG_TRUNC);
        if (k < 0 && errno == EAGAIN) return;
        if (k <= 0) return on_end(c, k == 0 ? "closed" : std::strerror(errno));
        totals_.bytes += static_cast<std::uint64_t>(k);
        if (static_cast<std::size_t>(k) < buffer_.size()) return;
    }
}

// The kernel drops the rest of a large payload. Only the first message of a connection is compared.
void Load::read_parse(Connection& c) {
    while (c.stage == Stage::open) {
        const bool drop = c.left > buffer_.size() / 8 && c.messages != 0;
        const std::size_t wanted = drop ? static_cast<std::size_t>(c.left) : buffer_.size();
        const ssize_t k = ::recv(c.fd, buffer_.data(), wanted, drop ? MSG_TRUNC : 0);
        if (k < 0 && errno == EAGAIN) return;
        if (k <= 0) return on_end(c, k == 0 ? "closed" : std::strerror(errno));
        ++totals_.reads;
        const auto n = static_cast<std::size_t>(k);
        if (drop) {
            c.body_position += n;
            c.left -= n;
            if (c.left == 0) end_frame(c);
        } else {
            feed(c, buffer_.data(), n);
        }
        if (n < wanted) return;
    }
}

void Load::feed(Connection& c, const char* p, std::size_t n) {
    const char* const end = p + n;
    while (p != end && c.stage == Stage::open) {
        if (c.left == 0) {
            p = feed_head(c, p, end);
            continue;
        }
        const std::size_t take = static_cast<std::size_t>((std::min)(c.left, static_cast<std::uint64_t>(end - p)));
        if (!deflate() && std::memcmp(p, frame_.body().data() + c.body_position, take) != 0)
            fail("connection %u: a received message has another body", c.index);
        c.body_position += take;
        c.left -= take;
        p += take;
        if (c.left == 0) end_frame(c);
    }
}

// Reads the header, and the stamp or the whole control frame.
const char* Load::feed_head(Connection& c, const char* p, const char* end) {
    const auto fill = [&](std::size_t wanted) {
        const std::size_t take =
            (std::min)(wanted - (std::min)(wanted, c.head_size), static_cast<std::size_t>(end - p));
        std::memcpy(c.head.data() + c.head_size, p, take);
        c.head_size += take;
        p += take;
        return c.head_size >= wanted;
    };
    if (!fill(2)) return p;
    const auto* h = reinterpret_cast<const unsigned char*>(c.head.data());
    if ((h[1] & 128) != 0) fail("connection %u: the server masks its frames", c.index);
    const std::size_t header = h[1] < 126 ? 2 : h[1] == 126 ? 4 : 10;
    if (!fill(header)) return p;
    std::uint64_t payload = h[1] < 126 ? h[1] : 0;
    for (std::size_t i = 2; i < header; ++i) payload = payload << 8 | h[i];
    const bool control = (h[0] & 8) != 0;
    const std::size_t needed = control ? static_cast<std::size_t>(payload) & 127 : deflate() ? 0 : Stamp::size;
    if (!fill(header + needed)) return p;
    if (control) on_control(c, header, static_cast<std::size_t>(payload) & 127);
    else begin_frame(c, header, payload);
    return p;
}

void Load::begin_frame(Connection& c, std::size_t header, std::uint64_t payload) {
    const int first = static_cast<unsigned char>(c.head[0]);
    if (deflate()) {
        if (first != (0xC0 | (options_.binary ? 2 : 1)))
            fail("connection %u: the first byte of a frame is %02X: not a compressed message", c.index,
                 static_cast<unsigned>(first));
        c.left = payload;
        totals_.payload += payload;
        return;
    }
    if (first != (128 | (options_.binary ? 2 : 1)))
        fail("connection %u: the first byte of a frame is %02X, but counting needs unfragmented, uncompressed %s",
             c.index, static_cast<unsigned>(first), options_.binary ? "binary" : "text");
    if (payload != options_.size)
        fail("connection %u: a message has %llu bytes", c.index, static_cast<unsigned long long>(payload));
    std::memmove(c.head.data(), c.head.data() + header, Stamp::size);
    c.body_position = 0;
    c.left = payload - Stamp::size;
    if (c.left == 0) end_frame(c);
}

void Load::end_frame(Connection& c) {
    const Stamp stamp = get_stamp(c.head.data());
    c.head_size = 0;
    totals_.bytes += frame_.server_size();
    ++c.messages;
    ++totals_.parsed;
    on_message(c, stamp);
}

void Load::on_control(Connection& c, std::size_t header, std::size_t payload) {
    const int opcode = c.head[0] & 15;
    c.head_size = 0;
    if (opcode == 8) {
        const auto* code = reinterpret_cast<const unsigned char*>(c.head.data() + header);
        fail("connection %u: the server closed with %d %.*s", c.index, payload < 2 ? 1005 : code[0] * 256 + code[1],
             static_cast<int>(payload < 2 ? 0 : payload - 2), reinterpret_cast<const char*>(code + 2));
    }
    if (opcode != 9 || c.writing) return;
    char pong[6 + 125] = {static_cast<char>(128 | 10), static_cast<char>(128 | payload)};  // the mask is zero
    std::memcpy(pong + 6, c.head.data() + header, payload);
    if (::send(c.fd, pong, 6 + payload, MSG_NOSIGNAL) < 0)
        fail("connection %u: cannot send a pong: %s", c.index, std::strerror(errno));
}

void Load::send_message(Connection& c, Nanoseconds intended) {
    ++c.last_sent.sequence;
    c.last_sent.sender = c.sender;
    c.last_sent.time = intended;
    c.sent = 0;
    ++totals_.sent;
    push(c);
}

void Load::push(Connection& c) {
    const std::string_view rest = frame_.stamped(c.last_sent).substr(c.sent);
    const ssize_t k = ::send(c.fd, rest.data(), rest.size(), MSG_NOSIGNAL);
    if (k < 0 && errno != EAGAIN) fail("connection %u: send: %s", c.index, std::strerror(errno));
    if (k > 0) c.sent += static_cast<std::size_t>(k);
    c.writing = k < static_cast<ssize_t>(rest.size());
}

// ---- the report ----------------------------------------------------------------------------------------------------

// One line of JSON that is printed at the end.
class Report {
public:
    void text(const char* name, const char* value) { add("\"%s\":\"%s\"", name, value); }
    void number(const char* name, double value) {
        if (std::isfinite(value)) add("\"%s\":%.6g", name, value);
    }
    void count(const char* name, std::uint64_t value) {
        add("\"%s\":%llu", name, static_cast<unsigned long long>(value));
    }
    void latency(const Histogram& h) {
        if (h.total() == 0) return;
        number("p50_us", h.microseconds(0.5));
        number("p90_us", h.microseconds(0.9));
        number("p99_us", h.microseconds(0.99));
        number("p999_us", h.microseconds(0.999));
        number("max_us", h.max_microseconds());
    }
    void print() const { std::printf("{%s}\n", line_.c_str()); }

private:
    __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
        char piece[256];
        va_list args;
        va_start(args, format);
        std::vsnprintf(piece, sizeof piece, format, args);
        va_end(args);
        if (!line_.empty()) line_ += ',';
        line_ += piece;
    }
    std::string line_;
};

// ---- the modes -----------------------------------------------------------------------------------------------------

// The measurement of all modes: a period, and a count of units in it.
class MeasuredLoad : public Load {
protected:
    using Load::Load;

    void begin() {
        first_ = server_.times();
        totals_first_ = totals_;
        measuring_ = true;
    }
    void end() {
        last_ = server_.times();
        totals_last_ = totals_;
        measuring_ = false;
    }
    void measure() {
        run_for(options_.warmup);
        begin();
        run_for(options_.seconds);
        end();
    }
    double wall() const { return static_cast<double>(last_.wall - first_.wall) / 1e9; }
    double server_share() const { return static_cast<double>(last_.server - first_.server) / 1e9 / wall(); }
    // CPU time of the thread that used most.
    double busiest_thread_seconds() const {
        Nanoseconds most = 0;
        for (const auto& [thread, time] : last_.threads) {
            const auto before = first_.threads.find(thread);
            most = (std::max)(most, time - (before == first_.threads.end() ? 0 : before->second));
        }
        return static_cast<double>(most) / 1e9;
    }
    double load_share() const { return static_cast<double>(last_.load - first_.load) / 1e9 / wall(); }
    // The side that used more of its CPU was the limit.
    const char* busier() const { return server_share() >= load_share() ? "server" : "load"; }

    // `unit` names what `count` counts. `server_cpu_us` is the CPU time per unit.
    Report report(const char* unit, double count, const char* limited_by) const {
        Report r;
        r.text("mode", options_.mode.c_str());
        r.count("members", options_.members);
        r.count("size", options_.size);
        r.text("type", options_.binary ? "binary" : options_.mixed ? "mixed text" : "text");
        r.number("seconds", wall());
        r.text("unit", unit);
        r.number("count", count);
        r.number("per_second", count / wall());
        if (count > 0) r.number("server_cpu_us", server_share() * wall() * 1e6 / count);
        if (count > 0) r.number("busiest_thread_us", busiest_thread_seconds() * 1e6 / count);
        if (count > 0) r.number("load_cpu_us", load_share() * wall() * 1e6 / count);
        r.number("server_share", server_share());
        r.number("load_share", load_share());
        r.text("limited_by", limited_by);
        const Memory m = server_.memory();
        r.number("server_rss_kib", static_cast<double>(m.rss_kib));
        r.number("server_pss_kib", static_cast<double>(m.pss_kib));
        return r;
    }

    // Gives a role to `n` members that do not have one, evenly spread.
    template <class Assign>
    void spread(std::size_t n, Assign assign) {
        const std::size_t all = connections_.size();
        std::size_t assigned = 0;
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = i * all / n, tries = 0; tries < all; ++j, ++tries) {
                Connection& c = connections_[j % all];
                if (c.role != Role::counts) continue;
                assign(c);
                ++assigned;
                break;
            }
        if (assigned < n) fail("%zu members are too few for the senders, samples and stalled members", all);
    }

    void make_members(std::size_t n) {
        connections_.resize(n);
        for (std::size_t i = 0; i < n; ++i) connections_[i].index = static_cast<std::uint32_t>(i);
    }

    bool measuring_ = false;
    CpuTimes first_{}, last_{};
    Totals totals_first_, totals_last_;
};

// echo and ping-idle: a sender sends its next message when it gets its last one back.
class EchoLoad : public MeasuredLoad {
public:
    using MeasuredLoad::MeasuredLoad;
    void run() override {
        make_members(options_.members);
        for (Connection& c : connections_) {
            c.role = Role::parses;
            c.sender = c.index;
        }
        connect_all(options_.members);
        run_for(0.05);
        for (std::size_t i = 0; i < options_.senders; ++i) send_message(connections_[i], now());
        measure();
        const auto messages = static_cast<double>(totals_last_.parsed - totals_first_.parsed);
        if (messages == 0) fail("no message came back in %g s", wall());
        Report r = report("message", messages, options_.senders == 1 ? "neither" : busier());
        r.count("senders", options_.senders);
        r.number("mb_per_second", messages * static_cast<double>(options_.size) / wall() / 1e6);
        r.latency(latency_);
        r.print();
    }

private:
    void on_message(Connection& c, const Stamp& s) override {
        if (s.sender != c.sender || s.sequence != c.last_sent.sequence)
            fail("connection %u: the echo is another message", c.index);
        const Nanoseconds t = options_.senders == 1 ? now() : poll_time_;
        if (measuring_) latency_.add(t - s.time);
        send_message(c, t);
    }
    Histogram latency_;
};

// Fan-out: the senders are members, and every message goes to every member. In a closed loop, a sender sends its next
// message when it gets its own message back. Otherwise messages leave at a fixed rate.
class FanoutLoad : public MeasuredLoad {
public:
    explicit FanoutLoad(const Options& o)
        : MeasuredLoad(o), fixed_rate_(o.mode == "fanout-rate"), period_(o.rate > 0 ? 1e9 / o.rate : 0) {}

    void run() override {
        assign_roles();
        connect_all(options_.members);
        run_for(0.1);
        start_ = now();
        active_ = true;
        if (!fixed_rate_)
            for (Connection* c : senders_) send_message(*c, start_);
        run_traffic(options_.warmup);
        begin();
        run_traffic(options_.seconds);
        end();
        active_ = false;
        drain();
        print();
    }

private:
    void assign_roles() {
        make_members(options_.members);
        // Senders are in the first half of the members, so they get their messages back before the server has served
        // all. All messages in flight then wait when the server reads again.
        for (std::size_t i = 0; i < options_.senders; ++i) {
            const std::size_t half = options_.members / 2;
            Connection& c = connections_[half < options_.senders ? i : i * half / options_.senders];
            c.role = Role::parses;
            c.sender = static_cast<std::uint32_t>(i);
            senders_.push_back(&c);
        }
        next_.resize(options_.senders);
        stalled_ = static_cast<std::size_t>(options_.stalled * static_cast<double>(options_.members));
        spread(stalled_, [](Connection& c) { c.role = Role::stalls; });
        const std::size_t free = options_.members - stalled_ - options_.senders;
        if (fixed_rate_) spread((std::min)(options_.samples, free), [](Connection& c) { c.role = Role::parses; });
    }

    void run_traffic(double seconds) {
        const Nanoseconds end = now() + static_cast<Nanoseconds>(seconds * 1e9);
        while (now() < end) poll_once(fixed_rate_ ? (std::min)(end, send_due()) : end);
    }

    Nanoseconds intended(std::size_t sender) const {
        return start_ +
               static_cast<Nanoseconds>(static_cast<double>(next_[sender] * senders_.size() + sender) * period_);
    }

    // Sends the messages that are due, each with its intended send time. Returns when the next one is due. If a socket
    // is full, the message leaves later, and the delay counts (this corrects coordinated omission).
    Nanoseconds send_due() {
        Nanoseconds earliest = INT64_MAX;
        for (std::size_t i = 0; i < senders_.size(); ++i) {
            for (Nanoseconds t = now(); !senders_[i]->writing && intended(i) <= t; ++next_[i]) {
                if (measuring_) lag_.add(t - intended(i));
                send_message(*senders_[i], intended(i));
            }
            if (!senders_[i]->writing) earliest = (std::min)(earliest, intended(i));
        }
        return earliest;
    }

    void on_message(Connection& c, const Stamp& s) override {
        if (in_measurement(s.time)) latency_.add((fixed_rate_ ? now() : poll_time_) - s.time);
        if (fixed_rate_ || !active_ || s.sender != c.sender || senders_[c.sender] != &c) return;
        if (s.sequence != c.last_sent.sequence)
            fail("connection %u: its message %llu arrived twice or too late", c.index,
                 static_cast<unsigned long long>(s.sequence));
        send_message(c, poll_time_);
    }
    bool in_measurement(Nanoseconds t) const {
        return t >= first_.wall && first_.wall != 0 && (measuring_ || t < last_.wall);
    }

    std::uint64_t expected_bytes() const { return totals_.sent * (options_.members - stalled_) * frame_.server_size(); }

    // Waits until all messages are delivered, or until half a second passes without any.
    void drain() {
        const Nanoseconds latest = now() + static_cast<Nanoseconds>((2 + options_.seconds) * 1e9);
        std::uint64_t before = 0;
        for (Nanoseconds last_delivery = now(); totals_.bytes < expected_bytes() && now() < latest;) {
            poll_once(now() + second / 20);
            if (totals_.bytes != before) last_delivery = now();
            before = totals_.bytes;
            if (now() > last_delivery + second / 2) break;
        }
    }

    // At a fixed rate the rate is the limit, unless messages leave or arrive late: by 2%, and by more than one per
    // sender.
    const char* limit() const {
        if (!fixed_rate_) return busier();
        const double due = options_.rate * wall(), sent = static_cast<double>(totals_last_.sent - totals_first_.sent);
        const double arrived = deliveries() / static_cast<double>(options_.members - stalled_);
        const double least = due - (std::max)(due * 0.02, static_cast<double>(senders_.size()));
        return sent < least || arrived < least ? busier() : "rate";
    }

    double deliveries() const {
        return static_cast<double>(totals_last_.bytes - totals_first_.bytes) /
               static_cast<double>(frame_.server_size());
    }

    void print() {
        if (deliveries() == 0) fail("no delivery in %g s", wall());
        Report r = report("delivery", deliveries(), limit());
        r.count("senders", senders_.size());
        r.count("messages", totals_last_.sent - totals_first_.sent);
        if (fixed_rate_) r.number("rate", options_.rate);
        const double reads = static_cast<double>(totals_last_.reads - totals_first_.reads);
        r.number("messages_per_read", static_cast<double>(totals_last_.parsed - totals_first_.parsed) / reads);
        r.latency(latency_);
        if (fixed_rate_) r.number("send_lag_p99_us", lag_.microseconds(0.99));
        const std::uint64_t lost = expected_bytes() - (std::min)(totals_.bytes, expected_bytes());
        r.count("undelivered", lost / frame_.server_size());
        r.count("stalled", stalled_);
        r.count("stalled_closed", totals_.stalled_closed);
        r.print();
    }

    bool fixed_rate_;
    bool active_ = false;
    double period_;  // nanoseconds between messages
    Nanoseconds start_ = 0;
    std::size_t stalled_ = 0;
    std::vector<Connection*> senders_;
    std::vector<std::uint64_t> next_;  // number of messages of each sender
    Histogram latency_, lag_;
};

// A closed loop with a single sender, so any frame that the sender receives is its own message.
class DeflateLoad : public MeasuredLoad {
public:
    using MeasuredLoad::MeasuredLoad;
    void run() override {
        make_members(options_.members);
        for (Connection& c : connections_) c.role = Role::parses;
        connect_all(options_.members);
        run_for(0.1);
        send_message(connections_[0], now());
        measure();
        const auto deliveries = static_cast<double>(totals_last_.parsed - totals_first_.parsed);
        if (deliveries == 0) fail("no delivery in %g s", wall());
        Report r = report("delivery", deliveries, busier());
        r.text("takeover", options_.takeover ? "yes" : "no");
        r.number("compressed_size", static_cast<double>(totals_last_.payload - totals_first_.payload) / deliveries);
        r.print();
    }

private:
    // The server may still be writing to the others. The next message waits for that.
    void on_message(Connection& c, const Stamp&) override {
        if (c.index == 0) send_message(c, poll_time_);
    }
};

// Idle connections: the memory of each.
class IdleLoad : public MeasuredLoad {
public:
    using MeasuredLoad::MeasuredLoad;
    void run() override {
        make_members(options_.members + 1);
        for (Connection& c : connections_) c.role = Role::parses;
        start_connecting(connections_.back());  // creates everything that the server creates only once
        run_for(0.2);
        const Memory before = server_.memory();
        begin();
        connect_all(options_.members);
        end();
        run_for((std::max)(0.3, options_.warmup));
        const Memory after = server_.memory();
        Report r = report("handshake", static_cast<double>(options_.members), busier());
        r.number("rss_before_kib", static_cast<double>(before.rss_kib));
        r.number("pss_before_kib", static_cast<double>(before.pss_kib));
        r.number("rss_bytes_each", each(after.rss_kib - before.rss_kib));
        r.number("pss_bytes_each", each(after.pss_kib - before.pss_kib));
        r.print();
    }

private:
    double each(long kib) const { return static_cast<double>(kib) * 1024 / static_cast<double>(options_.members); }
};

// Opening and closing handshakes on --window concurrent connections.
class ConnectLoad : public MeasuredLoad {
public:
    using MeasuredLoad::MeasuredLoad;
    void run() override {
        make_members(options_.window);
        active_ = true;
        for (Connection& c : connections_) start_connecting(c);
        measure();
        active_ = false;
        const double handshakes = static_cast<double>(totals_last_.handshakes - totals_first_.handshakes);
        if (handshakes == 0)
            fail("no handshake in %g s (does the server close the TCP connection after the closing handshake?)",
                 wall());
        Report r = report("handshake", handshakes, busier());
        r.count("window", options_.window);
        r.latency(latency_);
        r.print();
    }

private:
    void on_open(Connection& c) override {
        if (measuring_) latency_.add(poll_time_ - c.started);
        start_closing(c);
    }
    void on_closed(Connection& c) override {
        if (active_) start_connecting(c);
    }
    bool active_ = false;
    Histogram latency_;
};

std::unique_ptr<Load> make_load(const Options& o) {
    if (o.mode == "fanout" || o.mode == "fanout-rate") return std::make_unique<FanoutLoad>(o);
    if (o.mode == "echo" || o.mode == "ping-idle") return std::make_unique<EchoLoad>(o);
    if (o.mode == "deflate") return std::make_unique<DeflateLoad>(o);
    if (o.mode == "idle") return std::make_unique<IdleLoad>(o);
    if (o.mode == "connect") return std::make_unique<ConnectLoad>(o);
    fail("unknown mode: %s\n%s", o.mode.c_str(), usage);
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv);
    load_support::raise_descriptor_limit(options.members + 16);
    prctl(PR_SET_TIMERSLACK, 1000UL);  // nanoseconds; without it, messages at a fixed rate leave late
    make_load(options)->run();
}
