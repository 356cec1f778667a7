// soak_load: connects thousands of members to soak_server. They join and leave in many ways, and each checks every
// message of its rooms. It has one epoll thread and runs on Linux only. Prints a line every ten seconds and all
// violations at the end. Ends with status 1 after a violation.
//
// Contents: options, violations, the server's process, messages and frames, connections, rooms, the load (sockets,
// connecting, reading, leaving, slow readers, the run), the verdict.
//
// All deadlines count running time, which stands still while this process is paused.

#include "../bench/load_support.hpp"

#include <dirent.h>

#include <map>
#include <queue>

const load_support::Program load_support::program = {"soak_load", 2};

namespace {

using load_support::fail;
using load_support::loopback_address;

// ---- options -------------------------------------------------------------------------------------------------------

struct Options {
    std::uint16_t port = 0;
    int pid = 0;
    double minutes = 0;
    std::size_t connections = 8000;
    double churn = 0;  // new connections per second, and as many that leave
    bool rss = true;   // check the server's resident memory
};

constexpr const char* usage =
    "usage: soak_load port=N pid=N minutes=M [connections=N] [churn=N per second] [rss=0|1]\n";

Options parse_options(int argc, char** argv) {
    Options o;
    for (int i = 1; i < argc; ++i) {
        const std::string_view argument = argv[i];
        const std::string name(argument.substr(0, argument.find('=')));
        const std::string text(argument.substr((std::min)(name.size() + 1, argument.size())));
        char* end = nullptr;
        const double value = std::strtod(text.c_str(), &end);
        if (text.empty() || *end != '\0' || !(value >= 0 && value < 1e7))
            fail("invalid argument: %s\n%s", argv[i], usage);
        if (name == "port") o.port = static_cast<std::uint16_t>(value);
        else if (name == "pid") o.pid = static_cast<int>(value);
        else if (name == "minutes") o.minutes = value;
        else if (name == "connections") o.connections = static_cast<std::size_t>(value);
        else if (name == "churn") o.churn = value;
        else if (name == "rss") o.rss = value != 0;
        else fail("invalid argument: %s\n%s", argv[i], usage);
    }
    if (o.port == 0 || o.pid == 0 || o.minutes <= 0) fail("port, pid and minutes are required\n%s", usage);
    if (o.connections < 100 || o.connections > 100000) fail("connections: must be from 100 to 100000\n%s", usage);
    if (o.churn <= 0) o.churn = static_cast<double>(o.connections) / 40;
    return o;
}

unsigned long long to_ull(std::uint64_t n) { return n; }

// ---- violations ----------------------------------------------------------------------------------------------------

// Violated rules, each with its count and its first occurrence.
class Violations {
public:
    __attribute__((format(printf, 3, 4))) void add(const char* rule, const char* format, ...) {
        char text[400];
        va_list args;
        va_start(args, format);
        std::vsnprintf(text, sizeof text, format, args);
        va_end(args);
        auto& [times, first] = of_[rule];
        if (times++ != 0) return;
        first = text;
        std::printf("violated: %s: %s\n", rule, text);
    }
    bool none() const { return of_.empty(); }
    void print() const {
        for (const auto& [rule, seen] : of_)
            std::printf("FAIL: %s: %zu times, first: %s\n", rule.c_str(), seen.first, seen.second.c_str());
    }

private:
    std::map<std::string, std::pair<std::size_t, std::string>> of_;
};

// ---- the server's process ------------------------------------------------------------------------------------------

class ServerProcess {
public:
    ServerProcess(int pid, std::uint16_t port) : proc_("/proc/" + std::to_string(pid) + "/"), port_(port) {}

    double rss_mib() const {
        const std::string text = read("statm");
        const std::size_t space = text.find(' ');
        if (space == std::string::npos) fail("the server ended");
        return std::strtod(text.c_str() + space, nullptr) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1048576;
    }
    double cpu_seconds() const {
        const std::string text = read("stat");
        std::size_t at = text.rfind(')');
        for (int field = 2; field < 14 && at != std::string::npos; ++field) at = text.find(' ', at + 1);
        if (at == std::string::npos) fail("the server ended");
        char* next = nullptr;
        const double user = std::strtod(text.c_str() + at, &next), system = std::strtod(next, nullptr);
        return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
    }
    std::size_t descriptors() const {
        DIR* folder = ::opendir((proc_ + "fd").c_str());
        if (folder == nullptr) fail("the server ended");
        std::size_t count = 0;
        while (const dirent* entry = ::readdir(folder)) count += entry->d_name[0] != '.';
        ::closedir(folder);
        return count;
    }
    // Fetches a page of the server with blocking calls.
    std::string page(const std::string& path) const {
        const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        const sockaddr_in address = loopback_address(0, port_);
        const std::string request = "GET " + path + " HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
        if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
            ::send(fd, request.data(), request.size(), MSG_NOSIGNAL) < 0)
            fail("%s: %s", path.c_str(), std::strerror(errno));
        std::string response;
        char bytes[4096];
        for (ssize_t n; (n = ::recv(fd, bytes, sizeof bytes, 0)) > 0;)
            response.append(bytes, static_cast<std::size_t>(n));
        ::close(fd);
        return response;
    }

private:
    std::string read(const char* name) const {
        std::string text;
        std::FILE* file = std::fopen((proc_ + name).c_str(), "r");
        if (file == nullptr) return text;
        char bytes[1024];
        text.assign(bytes, std::fread(bytes, 1, sizeof bytes, file));
        std::fclose(file);
        return text;
    }

    std::string proc_;
    std::uint16_t port_;
};

// The number after a name in a page of "name number" lines, or 0 if the name is missing.
double value_of(const std::string& page, const std::string& name) {
    const std::size_t at = page.find("\n" + name + " ");
    return at == std::string::npos ? 0 : std::strtod(page.c_str() + at + name.size() + 2, nullptr);
}

// ---- messages and frames -------------------------------------------------------------------------------------------

class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
    std::uint64_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_ * 0x2545F4914F6CDD1Du >> 11;
    }
    std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }
    double between(double low, double high) { return low + (high - low) * static_cast<double>(next()) * 0x1p-53; }
    bool chance(double p) { return between(0, 1) < p; }

private:
    std::uint64_t state_;
};

// The body of a message depends only on its sender, its number and the kind of its room. So a receiver can compute
// every byte.
class Bodies {
public:
    Bodies() {
        Random random(7);
        char unit[32];
        for (unsigned i = 0; i < units; ++i) {
            std::snprintf(unit, sizeof unit, "%07x\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", i);  // 16 bytes
            text_ += unit;
            for (int k = 0; k < 16; ++k) binary_ += static_cast<char>(random.next());
        }
    }
    static bool binary(std::uint32_t number) { return number % 4 == 3; }
    std::string_view body(std::uint32_t sender, std::uint32_t number, bool large) const {
        Random random((std::uint64_t{sender} << 32 | number) + 1);
        random.next();
        const std::size_t kind = large ? 99 : random.below(100);
        const std::size_t count = kind < 85   ? 1 + random.below(16)
                                  : kind < 99 ? 17 + random.below(240)
                                              : 1024 + random.below(1536);
        const std::size_t first = random.below(units - count);
        return std::string_view(binary(number) ? binary_ : text_).substr(16 * first, 16 * count);
    }

private:
    static constexpr unsigned units = 8192;
    std::string text_, binary_;
};

std::string hex(std::uint32_t number, int digits) {
    char text[12];
    return std::string(text, static_cast<std::size_t>(std::snprintf(text, sizeof text, "%0*x", digits, number)));
}

// The hexadecimal number at a position. Invalid digits give a number that no message has.
std::uint32_t number_at(std::string_view text, std::size_t at, std::size_t digits) {
    std::uint32_t value = 0;
    for (const char c : text.substr((std::min)(at, text.size()), digits)) {
        const bool digit = c >= '0' && c <= '9';
        if (!digit && (c < 'a' || c > 'f')) return 0xFFFFFFFF;
        value = value << 4 | static_cast<std::uint32_t>(digit ? c - '0' : c - 'a' + 10);
    }
    return value;
}

enum Opcode : unsigned { continuation = 0, text = 1, binary = 2, closing = 8, ping = 9, pong = 10 };

// Appends a masked frame.
void append_frame(std::string& out, Random& random, unsigned opcode, std::string_view payload, bool fin = true) {
    const std::size_t n = payload.size();
    out += static_cast<char>((fin ? 128u : 0u) | opcode);
    out += static_cast<char>(128u | (n < 126 ? n : n < 65536 ? 126u : 127u));
    for (int i = n < 126 ? 0 : n < 65536 ? 2 : 8; i-- > 0;) out += static_cast<char>(n >> (8 * i));
    const std::uint64_t mask = random.next();
    for (int i = 0; i < 4; ++i) out += static_cast<char>(mask >> (8 * i));
    for (std::size_t i = 0; i < n; ++i)
        out += static_cast<char>(static_cast<unsigned char>(payload[i]) ^ (mask >> (8 * (i % 4)) & 255));
}

std::string close_payload(unsigned code) { return {static_cast<char>(code >> 8), static_cast<char>(code & 255)}; }

// A frame from the server.
struct Frame {
    unsigned opcode;
    std::string_view payload;
};

// Removes the first frame from the bytes, unless it is incomplete or invalid.
enum class Parse : std::uint8_t { more, frame, error };
Parse parse_frame(std::string_view& bytes, Frame& frame) {
    if (bytes.size() < 2) return Parse::more;
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
    if ((byte(0) & 0xF0) != 0x80 || byte(1) > 127) return Parse::error;
    const std::size_t header = byte(1) < 126 ? 2 : byte(1) == 126 ? 4 : 10;
    if (bytes.size() < header) return Parse::more;
    std::uint64_t n = header == 2 ? byte(1) : 0;
    for (std::size_t i = 2; i < header; ++i) n = n << 8 | byte(i);
    if (n > 1024 * 1024) return Parse::error;
    if (bytes.size() - header < n) return Parse::more;
    frame = {byte(0) & 15u, bytes.substr(header, static_cast<std::size_t>(n))};
    bytes.remove_prefix(header + static_cast<std::size_t>(n));
    return Parse::frame;
}

// ---- connections ---------------------------------------------------------------------------------------------------

enum class Stage : std::uint8_t { closed, handshake, open, leaving };
// How a connection starts. The last two never become members.
enum class Start : std::uint8_t { plain, in_two_pieces, with_message, hangs_up, refused };
// How a member leaves. After the first five, a Close frame and then the end of the stream must arrive.
enum class Leave : std::uint8_t {
    by_message,
    by_close,
    server_closes,
    unmasked_frame,
    invalid_utf8,
    shuts_down,
    fin,
    mid_frame,
    reset
};
enum class Slow : std::uint8_t { no, sleeps, trickles, never_reads };

struct Membership {
    std::uint32_t room = 0;
    std::size_t index = 0;   // index among the senders of the room
    std::uint32_t next = 0;  // the number of the next message
    bool joined = false;     // true between the server's "j" and "l"
};

struct Connection {
    int fd = -1;
    Stage stage = Stage::closed;
    Start start = Start::plain;
    Leave leave = Leave::by_message;
    Slow slow = Slow::no;
    bool drops = false;  // uses the route with BacklogPolicy::drop
    bool reads = true;
    bool polls_read = true;  // the state of the poller
    bool polls_write = false;
    bool finished_sending = false;  // it sends no more bytes
    bool close_received = false;
    std::uint32_t generation = 0;
    std::uint32_t id = 0;
    std::uint32_t sent = 0;  // sent messages; they come back in order
    std::uint32_t returned = 0;
    std::uint32_t pings = 0, pongs = 0;
    int expected_status = 0;  // of a rejected handshake
    std::size_t index = 0;    // index among the healthy members
    double deadline = 0;      // of a handshake or of leaving
    std::array<Membership, 2> rooms{};
    std::size_t room_count = 0;
    std::string in;           // an incomplete frame or response
    std::string out;          // bytes that the kernel has not accepted yet
    std::string second_part;  // the second part of a request
};

// ---- rooms ---------------------------------------------------------------------------------------------------------

// Rooms of one size: their number, their share of all members, and the message rate of each room.
struct Size {
    const char* name;
    std::size_t rooms;
    double share;
    double messages_per_second;
    bool large;  // large messages
    std::uint32_t first = 0;
    double messages_due = 0;
};

std::vector<Size> room_sizes(std::size_t connections) {
    const auto rooms_of = [&](double share, double members) {
        return (std::max)(std::size_t{1}, static_cast<std::size_t>(share * static_cast<double>(connections) / members));
    };
    std::vector<Size> sizes = {{"hall", 1, 0.25, 4, false},
                               {"medium", 4, 0.25, 4, false},
                               {"small", rooms_of(0.2, 50), 0.2, 4, false},
                               {"tiny", rooms_of(0.25, 5), 0.25, 4, false},
                               {"large messages", rooms_of(0.05, 20), 0.05, 0.75, true}};
    for (std::size_t i = 1; i < sizes.size(); ++i)
        sizes[i].first = sizes[i - 1].first + static_cast<std::uint32_t>(sizes[i - 1].rooms);
    return sizes;
}

// ---- the load ------------------------------------------------------------------------------------------------------

struct Totals {
    std::uint64_t connects = 0, disconnects = 0, resets = 0;
    std::uint64_t sent = 0, checked = 0;
    std::uint64_t slow = 0, slow_closed = 0;  // slow readers, and how many of them read a close code 1008
};

class Load {
public:
    explicit Load(const Options& o)
        : options_(o),
          server_(o.pid, o.port),
          poller_(epoll_create1(EPOLL_CLOEXEC)),
          sizes_(room_sizes(o.connections)) {
        connections_.resize(o.connections);
        for (std::size_t i = o.connections; i-- > 0;) free_.push_back(static_cast<std::uint32_t>(i));
        senders_.resize(sizes_.back().first + sizes_.back().rooms);
    }
    bool run();

private:
    static constexpr double step_timeout = 180;  // running seconds for a handshake or for leaving

    // sockets
    bool open_socket(Connection& c);
    void watch(Connection& c);
    void push(Connection& c);
    void disconnect(Connection& c, bool reset);
    void on_event(Connection& c, std::uint32_t events);
    void read(Connection& c);
    void on_end(Connection& c, bool reset);
    // connecting
    void start_connection();
    std::string request_of(Connection& c);
    void choose_rooms(Connection& c);
    void read_response(Connection& c);
    void become_member(Connection& c);
    // reading
    void read_bytes(Connection& c, std::string_view bytes);
    void on_frame(Connection& c, const Frame& frame);
    void on_message(Connection& c, const Frame& frame);
    void on_room_message(Connection& c, Membership& m, const Frame& frame);
    void on_close_frame(Connection& c, std::string_view payload);
    void check_all_returned(Connection& c);
    // leaving and sending
    void start_leaving(Connection& c, Leave how);
    Leave random_leave();
    void append_message(Connection& c, const Membership& m);
    void send_close(Connection& c, const std::string& payload);
    void shut_down(Connection& c);
    void remove_member(Connection& c);
    // slow readers
    void on_timer(Connection& c);
    void call_later(Connection& c, double delay);
    // the run
    void advance();
    void turn();
    void send_due_messages();
    void fill();
    void churn(double seconds);
    void disconnect_all();
    void on_second();
    void print_line();
    // the verdict
    void await_descriptors();
    void check_load(const Totals& totals);
    void check_memory(const std::string& heap_before);

    std::size_t sockets() const { return connections_.size() - free_.size(); }
    std::uint32_t index_of(const Connection& c) const { return static_cast<std::uint32_t>(&c - connections_.data()); }
    const Size& size_of(std::uint32_t room) const {
        std::size_t i = sizes_.size() - 1;
        while (sizes_[i].first > room) --i;
        return sizes_[i];
    }
    const char* kind(const Connection& c) const { return c.slow == Slow::no ? "a healthy member" : "a slow reader"; }

    struct Timer {
        double time;
        std::uint32_t index, generation;
        bool operator<(const Timer& other) const { return time > other.time; }
    };

    const Options& options_;
    ServerProcess server_;
    int poller_;
    std::vector<Size> sizes_;
    Bodies bodies_;
    Random random_{1};
    Violations violations_;
    Totals totals_;
    std::vector<Connection> connections_;
    std::vector<std::uint32_t> free_;
    std::vector<std::uint32_t> healthy_;               // open members that read
    std::vector<std::vector<std::uint32_t>> senders_;  // the same members by room
    std::priority_queue<Timer> timers_;
    std::size_t slow_ = 0, handshakes_ = 0, leaving_ = 0;
    std::uint32_t last_id_ = 0;

    double now_ = 0;         // running seconds
    double last_clock_ = 0;  // clock time
    double connects_due_ = 0, leaves_due_ = 0, next_second_ = 0;
    bool in_run_ = false;
    std::size_t least_ = 0;    // lowest number of connections
    std::vector<double> rss_;  // MiB, one value per second of the run
    double cpu_ = 0;           // of the server, at the last printed line
    std::size_t descriptors_before_ = 0;
    std::array<epoll_event, 1024> events_{};
    std::array<char, 256 * 1024> buffer_{};
};

// ---- sockets

// Uses one of 32 local addresses, so ports in TIME_WAIT leave enough free ports.
bool Load::open_socket(Connection& c) {
    c.fd = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c.fd < 0) fail("socket: %s", std::strerror(errno));
    const int one = 1, small = 1, segment = 1200;
    setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(c.fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (c.slow != Slow::no) {
        setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        setsockopt(c.fd, IPPROTO_TCP, TCP_MAXSEG, &segment,
                   sizeof segment);  // also keeps the server's send buffer small
    }
    const sockaddr_in local = loopback_address(1 + c.id % 32, 0), server = loopback_address(0, options_.port);
    if (::bind(c.fd, reinterpret_cast<const sockaddr*>(&local), sizeof local) != 0)
        fail("bind: %s", std::strerror(errno));
    return ::connect(c.fd, reinterpret_cast<const sockaddr*>(&server), sizeof server) == 0 || errno == EINPROGRESS;
}

void Load::watch(Connection& c) {
    const bool write = !c.out.empty();
    if (c.reads == c.polls_read && write == c.polls_write) return;
    epoll_event event{};
    event.events = (c.reads ? std::uint32_t{EPOLLIN} : 0u) | (write ? std::uint32_t{EPOLLOUT} : 0u);
    event.data.u64 = std::uint64_t{c.generation} << 32 | index_of(c);
    epoll_ctl(poller_, EPOLL_CTL_MOD, c.fd, &event);
    c.polls_read = c.reads;
    c.polls_write = write;
}

void Load::push(Connection& c) {
    while (!c.out.empty()) {
        const ssize_t n = ::send(c.fd, c.out.data(), c.out.size(), MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) break;
        // The next read reports the error.
        c.out.erase(0, n < 0 ? std::string::npos : static_cast<std::size_t>(n));
    }
    watch(c);
}

void Load::disconnect(Connection& c, bool reset) {
    remove_member(c);
    if (c.stage == Stage::handshake) --handshakes_;
    if (c.stage == Stage::leaving) --leaving_;
    if (c.slow != Slow::no) --slow_;
    const linger now{1, 0};
    if (reset) setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    ::close(c.fd);
    totals_.resets += reset;
    ++totals_.disconnects;
    const std::uint32_t generation = c.generation + 1;
    c = Connection();
    c.generation = generation;
    free_.push_back(index_of(c));
}

void Load::on_event(Connection& c, std::uint32_t events) {
    if ((events & EPOLLOUT) != 0) push(c);
    if ((events & ~std::uint32_t{EPOLLOUT}) == 0) return;
    if (c.reads || (events & (EPOLLERR | EPOLLHUP)) != 0) read(c);
}

void Load::read(Connection& c) {
    const std::size_t wanted = c.slow == Slow::trickles && c.stage == Stage::open ? 512 : buffer_.size();
    const ssize_t n = ::recv(c.fd, buffer_.data(), wanted, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) return on_end(c, n < 0);
    read_bytes(c, {buffer_.data(), static_cast<std::size_t>(n)});
}

// The server ended the stream.
void Load::on_end(Connection& c, bool reset) {
    const char* how = reset ? "a reset" : "the end of the stream";
    if (c.stage == Stage::handshake && c.start == Start::refused) {
        const std::string expected = "HTTP/1.1 " + std::to_string(c.expected_status) + " ";
        if (reset || c.in.compare(0, expected.size(), expected) != 0 || c.in.find("\r\n\r\n") == std::string::npos)
            violations_.add("a rejection arrives", "%s instead of status %d: %.80s", how, c.expected_status,
                            c.in.c_str());
    } else if (c.stage == Stage::handshake) {
        violations_.add("a handshake succeeds", "%s during the handshake", how);
    } else if (c.stage == Stage::open && c.slow == Slow::no) {
        violations_.add("a healthy member stays connected", "%s", how);
    } else if (c.stage == Stage::leaving && c.leave <= Leave::invalid_utf8 && (reset || !c.close_received)) {
        violations_.add("a Close frame arrives before the end of the stream", "%s %s a Close frame, leave kind %d", how,
                        c.close_received ? "after" : "without", static_cast<int>(c.leave));
    }
    disconnect(c, false);
}

// ---- connecting

void Load::start_connection() {
    Connection& c = connections_[free_.back()];
    free_.pop_back();
    c.id = ++last_id_;
    c.stage = Stage::handshake;
    c.deadline = now_ + step_timeout;
    ++handshakes_;
    ++totals_.connects;
    const bool slow =
        static_cast<double>(slow_) < 0.05 * static_cast<double>(connections_.size()) && random_.chance(0.5);
    if (slow) {
        c.slow = static_cast<Slow>(1 + random_.below(3));
        ++slow_;
        ++totals_.slow;
    }
    const std::size_t kind = slow ? 0 : random_.below(100);
    c.start = kind < 80   ? Start::plain
              : kind < 88 ? Start::in_two_pieces
              : kind < 95 ? Start::with_message
              : kind < 98 ? Start::hangs_up
                          : Start::refused;
    c.drops = random_.chance(0.5);
    choose_rooms(c);
    c.out = request_of(c);
    if (c.start == Start::with_message) append_message(c, c.rooms[0]);
    const bool connects = open_socket(c);
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT;
    event.data.u64 = std::uint64_t{c.generation} << 32 | index_of(c);
    c.polls_write = true;
    if (epoll_ctl(poller_, EPOLL_CTL_ADD, c.fd, &event) != 0) fail("epoll_ctl: %s", std::strerror(errno));
    if (connects) return;
    violations_.add("a connection is accepted", "%s", std::strerror(errno));
    disconnect(c, false);
}

// Chooses rooms by the shares of their sizes. Half of the slow readers are in rooms with large messages. One member in
// ten has a second room.
void Load::choose_rooms(Connection& c) {
    c.room_count = c.slow == Slow::no && random_.chance(0.1) ? 2 : 1;
    for (std::size_t i = 0; i < c.room_count; ++i) {
        double share = c.slow != Slow::no && random_.chance(0.5) ? 2 : random_.between(0, 1);
        std::size_t size = 0;
        while (size + 1 < sizes_.size() && share >= sizes_[size].share) share -= sizes_[size++].share;
        c.rooms[i].room = sizes_[size].first + static_cast<std::uint32_t>(random_.below(sizes_[size].rooms));
    }
    if (c.room_count == 2 && c.rooms[0].room == c.rooms[1].room) c.room_count = 1;
}

std::string Load::request_of(Connection& c) {
    std::string path = c.drops ? "/drop/" : "/close/", version = "13", origin;
    for (std::size_t i = 0; i < c.room_count; ++i) path += (i == 0 ? "" : "+") + std::to_string(c.rooms[i].room);
    if (c.start == Start::refused) {
        const std::size_t why = random_.below(3);
        if (why == 0) path = "/nothing";
        if (why == 1) version = "12";
        if (why == 2) origin = "Origin: http://elsewhere.example\r\n";
        c.expected_status = why == 0 ? 404 : why == 1 ? 426 : 403;
    }
    std::string request = "GET " + path + " HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(options_.port) +
                          "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + origin +
                          "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: " + version +
                          "\r\n\r\n";
    if (c.start == Start::in_two_pieces || c.start == Start::hangs_up) {
        const std::size_t cut = 1 + random_.below(request.size() - 1);
        if (c.start == Start::in_two_pieces) c.second_part = request.substr(cut);
        request.resize(cut);
        call_later(c, random_.between(0, 1));
    }
    return request;
}

void Load::read_response(Connection& c) {
    const std::size_t end = c.in.find("\r\n\r\n");
    if (c.start == Start::refused || end == std::string::npos) return;
    if (c.in.compare(0, 12, "HTTP/1.1 101") != 0 || c.in.find("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") > end) {
        violations_.add("a handshake succeeds", "the response is %.100s", c.in.c_str());
        return disconnect(c, false);
    }
    c.in.erase(0, end + 4);
    become_member(c);
}

void Load::become_member(Connection& c) {
    --handshakes_;
    c.stage = Stage::open;
    if (c.slow != Slow::no) {
        c.reads = false;
        watch(c);
        return call_later(c, c.slow == Slow::trickles ? 1 : random_.between(3, 30));
    }
    c.index = healthy_.size();
    healthy_.push_back(index_of(c));
    for (std::size_t i = 0; i < c.room_count; ++i) {
        auto& senders = senders_[c.rooms[i].room];
        c.rooms[i].index = senders.size();
        senders.push_back(index_of(c));
    }
}

// ---- reading

void Load::read_bytes(Connection& c, std::string_view bytes) {
    std::string joined;
    if (c.stage == Stage::handshake || !c.in.empty()) {
        c.in.append(bytes);
        if (c.stage == Stage::handshake) read_response(c);
        if (c.stage == Stage::handshake || c.stage == Stage::closed) return;
        joined.swap(c.in);
        bytes = joined;
    }
    const std::uint32_t generation = c.generation;
    for (Frame frame{}; c.generation == generation;) {
        const Parse parse = parse_frame(bytes, frame);
        if (parse == Parse::more) {
            c.in = bytes;
            return;
        }
        if (parse == Parse::error) {
            violations_.add("frames are well-formed", "%02x %02x to %s", static_cast<unsigned char>(bytes[0]),
                            static_cast<unsigned char>(bytes[1]), kind(c));
            return disconnect(c, true);
        }
        on_frame(c, frame);
    }
}

void Load::on_frame(Connection& c, const Frame& frame) {
    if (c.close_received) return violations_.add("no frame arrives after a Close frame", "opcode %u", frame.opcode);
    switch (frame.opcode) {
        case Opcode::text:
        case Opcode::binary: return on_message(c, frame);
        case Opcode::closing: return on_close_frame(c, frame.payload);
        case Opcode::ping:
            if (c.finished_sending) return;
            append_frame(c.out, random_, Opcode::pong, frame.payload);
            return push(c);
        case Opcode::pong:
            // RFC 6455 5.5.3: one pong may answer several pings.
            if (number_at(frame.payload, 0, 8) <= c.pongs || number_at(frame.payload, 0, 8) > c.pings)
                violations_.add("pongs arrive in order", "%.40s after %u", std::string(frame.payload).c_str(), c.pongs);
            c.pongs = number_at(frame.payload, 0, 8);
            return;
        default: return violations_.add("frames are well-formed", "opcode %u", frame.opcode);
    }
}

void Load::on_message(Connection& c, const Frame& frame) {
    const std::string_view data = frame.payload;
    const char kind_of_message = data.empty() ? ' ' : data[0];
    const std::uint32_t room = number_at(data, 1, 4), number = number_at(data, 5, 8);
    for (std::size_t i = 0; i < c.room_count; ++i) {
        Membership& m = c.rooms[i];
        if (m.room != room) continue;
        if (kind_of_message == 'j' && !m.joined) {
            m.joined = true;
            m.next = number;
        } else if (kind_of_message == 'm' && m.joined) {
            on_room_message(c, m, frame);
        } else if (kind_of_message == 'l' && m.joined) {
            m.joined = false;
            if (number != m.next)
                violations_.add("no message is lost", "%s left before message %u but did not get message %u", kind(c),
                                number, m.next);
        } else {
            violations_.add("messages arrive between joining and leaving", "'%c' of room %u", kind_of_message, room);
        }
        const bool left = c.leave == Leave::by_message && c.stage == Stage::leaving && !m.joined;
        if (!left || i + 1 != c.room_count) return;
        check_all_returned(c);
        return send_close(c, close_payload(1000));
    }
    violations_.add("a member gets only messages of its own rooms", "%.30s", std::string(data).c_str());
}

// A room message: m ROOM:4 NUMBER:8 SENDER:8 NUMBER-OF-THE-SENDER:8 BODY.
void Load::on_room_message(Connection& c, Membership& m, const Frame& frame) {
    const std::uint32_t number = number_at(frame.payload, 5, 8);
    if (number < m.next)
        violations_.add("no message arrives twice or out of order", "%s of room %u got %u after %u", kind(c), m.room,
                        number, m.next - 1);
    else if (number > m.next && !(c.slow != Slow::no && c.drops))
        violations_.add("no message is lost", "%s of room %u got %u after %u", kind(c), m.room, number, m.next - 1);
    m.next = number + 1;
    ++totals_.checked;
    const std::uint32_t sender = number_at(frame.payload, 13, 8), of_sender = number_at(frame.payload, 21, 8);
    const bool binary = frame.opcode == Opcode::binary;
    const std::string_view body = frame.payload.substr((std::min)(frame.payload.size(), std::size_t{29}));
    if (binary != Bodies::binary(of_sender) || body != bodies_.body(sender, of_sender, size_of(m.room).large))
        violations_.add("messages arrive unchanged", "message %u of %u in room %u", of_sender, sender, m.room);
    if (sender == c.id && of_sender != ++c.returned)
        violations_.add("a member gets its own messages in order", "%u instead of %u", of_sender, c.returned);
}

// Before its last frame, the server has sent back all messages that it received.
void Load::check_all_returned(Connection& c) {
    if (c.returned != c.sent)
        violations_.add("a member gets its own messages in order", "%u of %u came back, leave kind %d", c.returned,
                        c.sent, static_cast<int>(c.leave));
}

void Load::on_close_frame(Connection& c, std::string_view payload) {
    const unsigned code = payload.size() < 2 ? 1005
                                             : static_cast<unsigned>(static_cast<unsigned char>(payload[0])) << 8 |
                                                   static_cast<unsigned char>(payload[1]);
    c.close_received = true;
    if (c.slow != Slow::no) {
        totals_.slow_closed += code == 1008;
        if (code != 1008 || c.drops)
            violations_.add("a slow reader is closed with 1008 only under BacklogPolicy::close", "%u", code);
        return;
    }
    if (c.stage != Stage::leaving)
        return violations_.add("a healthy member stays connected", "closed with %u %.60s", code,
                               std::string(payload.substr((std::min)(payload.size(), std::size_t{2}))).c_str());
    if (c.leave > Leave::invalid_utf8) return;
    constexpr unsigned expected[] = {1000, 3001, 4000, 1002, 1007};
    if (code != expected[static_cast<std::size_t>(c.leave)])
        violations_.add("the Close frame has the right code", "%u for leave kind %d", code, static_cast<int>(c.leave));
    check_all_returned(c);
    if (c.leave != Leave::server_closes) return;
    send_close(c, close_payload(code));
}

// ---- leaving and sending

Leave Load::random_leave() {
    const std::size_t kind = random_.below(200);
    return kind < 80    ? Leave::by_message
           : kind < 100 ? Leave::by_close
           : kind < 120 ? Leave::server_closes
           : kind < 126 ? Leave::unmasked_frame
           : kind < 132 ? Leave::invalid_utf8
           : kind < 146 ? Leave::shuts_down
           : kind < 176 ? Leave::fin
           : kind < 198 ? Leave::mid_frame
                        : Leave::reset;
}

void Load::start_leaving(Connection& c, Leave how) {
    remove_member(c);
    c.stage = Stage::leaving;
    c.leave = how;
    c.deadline = now_ + step_timeout;
    ++leaving_;
    std::string frame;
    switch (how) {
        case Leave::by_message: append_frame(c.out, random_, Opcode::text, "l"); break;
        case Leave::by_close: send_close(c, close_payload(3001) + "bye"); break;
        case Leave::server_closes: append_frame(c.out, random_, Opcode::text, "b"); break;
        case Leave::unmasked_frame:
            // If the server closed with unread bytes, a reset would replace its Close frame.
            c.out += "\x81\x05naked" + std::string(150'000, 'x');
            break;
        case Leave::invalid_utf8: append_frame(c.out, random_, Opcode::text, "half a \xE2\x82"); break;
        case Leave::mid_frame:
            append_frame(frame, random_, Opcode::text, bodies_.body(c.id, 0, true));
            c.out += frame.substr(0, 1 + random_.below(frame.size() - 1));
            break;
        default: break;
    }
    push(c);
    if (how == Leave::shuts_down) shut_down(c);
    if (how >= Leave::fin) disconnect(c, how == Leave::reset);
}

void Load::send_close(Connection& c, const std::string& payload) {
    append_frame(c.out, random_, Opcode::closing, payload);
    c.finished_sending = true;
    push(c);
}

void Load::shut_down(Connection& c) {
    ::shutdown(c.fd, SHUT_WR);
    c.finished_sending = true;
    c.out.clear();
    watch(c);
}

// Removes a member from the lists of healthy members and senders.
void Load::remove_member(Connection& c) {
    if (c.stage != Stage::open || c.slow != Slow::no) return;
    healthy_[c.index] = healthy_.back();
    connections_[healthy_[c.index]].index = c.index;
    healthy_.pop_back();
    for (std::size_t i = 0; i < c.room_count; ++i) {
        auto& senders = senders_[c.rooms[i].room];
        const std::size_t index = c.rooms[i].index;
        Connection& moved = connections_[senders[index] = senders.back()];
        senders.pop_back();
        for (std::size_t k = 0; k < moved.room_count; ++k)
            if (moved.rooms[k].room == c.rooms[i].room) moved.rooms[k].index = index;
    }
}

// Sends one message in twenty as two fragments with a ping between them.
void Load::append_message(Connection& c, const Membership& m) {
    const std::uint32_t number = ++c.sent;
    const std::string_view body = bodies_.body(c.id, number, size_of(m.room).large);
    const std::string message = "m" + hex(m.room, 4) + hex(c.id, 8) + hex(number, 8) + std::string(body);
    const unsigned opcode = Bodies::binary(number) ? Opcode::binary : Opcode::text;
    if (random_.chance(0.05)) {
        const std::size_t cut = random_.below(message.size());
        append_frame(c.out, random_, opcode, std::string_view(message).substr(0, cut), false);
        append_frame(c.out, random_, Opcode::ping, hex(++c.pings, 8));
        append_frame(c.out, random_, Opcode::continuation, std::string_view(message).substr(cut));
    } else {
        append_frame(c.out, random_, opcode, message);
    }
    ++totals_.sent;
}

// ---- slow readers and timers

void Load::call_later(Connection& c, double delay) { timers_.push({now_ + delay, index_of(c), c.generation}); }

void Load::on_timer(Connection& c) {
    if (c.stage == Stage::handshake) {
        if (c.start == Start::hangs_up) return disconnect(c, false);
        c.out += std::exchange(c.second_part, std::string());
        return push(c);
    }
    if (c.slow == Slow::sleeps && !c.reads) {
        c.reads = true;  // reads everything, and leaves a little later
        watch(c);
        return call_later(c, random_.between(3, 8));
    }
    if (c.slow == Slow::trickles && !random_.chance(0.04)) {
        const std::uint32_t generation = c.generation;
        read(c);
        if (c.generation == generation) call_later(c, 1);
        return;
    }
    disconnect(c, random_.chance(0.01));
}

// ---- the run

void Load::advance() {
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC, &t);
    const double clock_now = static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
    const double step = last_clock_ <= 0 ? 0 : (std::min)(clock_now - last_clock_, 1.0);
    last_clock_ = clock_now;
    now_ += step;
    // Work that a busy machine cannot do in time is skipped. Slow readers and short visits come on top.
    connects_due_ = (std::min)(connects_due_ + step * 1.5 * options_.churn, options_.churn);
    leaves_due_ = (std::min)(leaves_due_ + step * options_.churn, options_.churn);
    for (Size& size : sizes_) {
        const double per_second = size.messages_per_second * static_cast<double>(size.rooms);
        size.messages_due = (std::min)(size.messages_due + step * per_second, per_second + 1);
    }
}

void Load::turn() {
    const int n = epoll_wait(poller_, events_.data(), static_cast<int>(events_.size()), 5);
    if (n < 0 && errno != EINTR) fail("epoll_wait: %s", std::strerror(errno));
    advance();
    for (int i = 0; i < n; ++i) {
        const epoll_event& event = events_[static_cast<std::size_t>(i)];
        Connection& c = connections_[event.data.u64 & 0xFFFFFFFF];
        if (c.generation == event.data.u64 >> 32) on_event(c, event.events);
    }
    while (!timers_.empty() && timers_.top().time <= now_) {
        const Timer due = timers_.top();
        timers_.pop();
        if (connections_[due.index].generation == due.generation) on_timer(connections_[due.index]);
    }
    if (now_ >= next_second_) on_second();
}

void Load::send_due_messages() {
    for (Size& size : sizes_)
        for (; size.messages_due >= 1; size.messages_due -= 1) {
            const auto room = size.first + static_cast<std::uint32_t>(random_.below(size.rooms));
            if (senders_[room].empty()) continue;
            Connection& c = connections_[senders_[room][random_.below(senders_[room].size())]];
            append_message(c, c.rooms[c.rooms[0].room == room ? 0 : 1]);
            push(c);
        }
}

// Connects all members as fast as possible.
void Load::fill() {
    while (healthy_.size() + slow_ < connections_.size() * 98 / 100) {
        while (!free_.empty() && handshakes_ < 256) start_connection();
        turn();
        send_due_messages();
    }
}

// Runs for the given time. On a busy machine it runs up to twice as long, until enough members have connected.
void Load::churn(double seconds) {
    const double begin = now_;
    const auto wanted = totals_.connects + static_cast<std::uint64_t>(0.95 * seconds * options_.churn);
    while (now_ < begin + seconds || (totals_.connects < wanted && now_ < begin + 2 * seconds)) {
        for (; connects_due_ >= 1 && !free_.empty() && handshakes_ < 256; connects_due_ -= 1) start_connection();
        // If a busy machine cannot connect as many as leave, fewer leave.
        const auto enough = [&] {
            return !healthy_.empty() && free_.size() < connections_.size() / 20 && leaving_ < connections_.size() / 8;
        };
        for (; leaves_due_ >= 1 && enough(); leaves_due_ -= 1)
            start_leaving(connections_[healthy_[random_.below(healthy_.size())]], random_leave());
        turn();
        send_due_messages();
    }
}

// All members leave. Each gets the number of the next message, so lost last messages are found.
void Load::disconnect_all() {
    while (sockets() != 0) {
        while (!healthy_.empty()) start_leaving(connections_[healthy_.back()], Leave::by_message);
        for (Connection& c : connections_)
            if (c.stage == Stage::open && c.slow != Slow::no) disconnect(c, false);
        turn();
    }
}

void Load::on_second() {
    next_second_ = std::floor(now_) + 1;
    for (Connection& c : connections_) {
        if ((c.stage != Stage::handshake && c.stage != Stage::leaving) || now_ < c.deadline) continue;
        violations_.add("nothing hangs", "a %s took more than %g s, leave kind %d",
                        c.stage == Stage::handshake ? "handshake" : "leaving member", step_timeout,
                        static_cast<int>(c.leave));
        disconnect(c, true);
    }
    if (!in_run_) return;
    rss_.push_back(server_.rss_mib());
    least_ = (std::min)(least_, sockets());
    if (rss_.size() % 10 == 0) print_line();
}

void Load::print_line() {
    const double cpu = server_.cpu_seconds();
    std::printf(
        "%5zu s: %zu connections, %zu of them slow; %llu connected, %llu left, %llu of them by a reset; %.2f million "
        "messages; "
        "server: %.1f MiB, %zu descriptors, %.0f%% of a CPU\n",
        rss_.size(), sockets(), slow_, to_ull(totals_.connects), to_ull(totals_.disconnects), to_ull(totals_.resets),
        static_cast<double>(totals_.checked) / 1e6, rss_.back(), server_.descriptors(), (cpu - cpu_) * 10);
    std::fflush(stdout);
    cpu_ = cpu;
}

bool Load::run() {
    descriptors_before_ = server_.descriptors();
    // The first wave creates everything that the server creates once and keeps.
    fill();
    churn(5);
    disconnect_all();
    await_descriptors();
    const std::string heap_before = server_.page("/heap");
    fill();
    totals_ = Totals();
    in_run_ = true;
    least_ = sockets();
    cpu_ = server_.cpu_seconds();
    churn(options_.minutes * 60);
    in_run_ = false;
    const Totals totals = totals_;
    disconnect_all();
    await_descriptors();
    check_load(totals);
    check_memory(heap_before);
    violations_.print();
    return violations_.none();
}

// ---- the verdict

void Load::await_descriptors() {
    const double end = now_ + 60;
    for (; server_.descriptors() != descriptors_before_ && now_ < end; advance()) usleep(50 * 1000);
    if (server_.descriptors() != descriptors_before_)
        violations_.add("the number of descriptors returns to its start value", "%zu instead of %zu",
                        server_.descriptors(), descriptors_before_);
}

// Checks that the run had the requested load.
void Load::check_load(const Totals& totals) {
    std::printf(
        "soak: %llu connected, %llu left, %llu of them by a reset; %llu messages sent, %llu checked; "
        "%llu slow readers, %llu of them received close code 1008\n",
        to_ull(totals.connects), to_ull(totals.disconnects), to_ull(totals.resets), to_ull(totals.sent),
        to_ull(totals.checked), to_ull(totals.slow), to_ull(totals.slow_closed));
    if (least_ < connections_.size() * 9 / 10)
        violations_.add("all connections are open at the same time", "lowest number: %zu", least_);
    if (static_cast<double>(totals.connects) < 0.95 * 60 * options_.minutes * options_.churn)
        violations_.add("the requested number of members connects", "%llu (is the machine busy?)",
                        to_ull(totals.connects));
    const std::string metrics = server_.page("/metrics");
    const auto metric = [&](const char* name) { return value_of(metrics, std::string("wschat_") + name); };
    const double backlog = metric("closed_total{cause=\"backlog\"}"), dropped = metric("messages_dropped_total");
    std::printf("soak: %.0f closed because of their backlog, %.0f messages dropped, %.0f exceptions\n", backlog,
                dropped, metric("handler_exceptions_total"));
    if (backlog < 1 || dropped < 1)
        violations_.add("slow readers are closed or lose messages", "%g, %g", backlog, dropped);
    if (metric("handler_exceptions_total") > 0) violations_.add("no handler throws", "see the log of the server");
    if (metric("websockets_open") > 0 || metric("rooms") > 0 || metric("backlog_bytes") > 0)
        violations_.add("no connection, room or backlog is left", "%g connections, %g rooms, %g bytes",
                        metric("websockets_open"), metric("rooms"), metric("backlog_bytes"));
}

// A leak shows in two ways. With no connection, the heap must be small and equal after each wave. During the run,
// memory must not grow after the first third.
void Load::check_memory(const std::string& heap_before) {
    const std::string heap = server_.page("/heap");
    const double blocks = value_of(heap, "blocks") - value_of(heap_before, "blocks");
    const double bytes = value_of(heap, "small_bytes") - value_of(heap_before, "small_bytes");
    std::printf(
        "soak: without connections the server held %+.0f blocks, %+.0f bytes in small blocks more than at first\n",
        blocks, bytes);
    if (blocks > 100 || bytes > 8 * 1024) violations_.add("memory returns", "%+.0f blocks, %+.0f bytes", blocks, bytes);
    const auto third = static_cast<std::ptrdiff_t>(rss_.size() / 3);
    const double middle = *std::max_element(rss_.begin() + third, rss_.begin() + 2 * third);
    const double last = *std::max_element(rss_.begin() + 2 * third, rss_.end());
    std::printf("soak: highest resident memory: %.1f MiB in the last third, %.1f MiB in the middle third\n", last,
                middle);
    if (options_.rss && last > 1.03 * middle + 1)
        violations_.add("memory does not grow after the first third", "%.1f MiB, then %.1f MiB", middle, last);
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv);
    load_support::raise_descriptor_limit(options.connections + 64);
    return Load(options).run() ? 0 : 1;
}
