// The load of run.py: one sender at one node, members at another node, which gets the messages only through Redis.
//
//   cluster_load KIND SENDER_PORT RELAY_PORT [option value]...
//
// KIND is room, chat or socketio. Options:
//
//   --members N (100)    at the relay             --seconds S (3)    measured time, after one second
//   --rate R (200)       messages per second; 0: the next one leaves when the relay has delivered a message
//   --window N (64)      with rate 0: messages in flight
//   --size BYTES (64)    of a text, at least 32   --pids A,B,C       processes whose CPU time is measured
//   --messages N         ends after so many, in place of --seconds
//   --rooms N (1)        of the chat; the members are spread over them
//
// Prints one line of JSON: deliveries at the relay, messages, the CPU time of each process in seconds, and latencies in
// microseconds from the intended time of sending: of the sender's own message (local), and at the relay.
#include "../../../wschat.hpp"

#include <ctime>
#include <map>

namespace {

using Nanoseconds = std::int64_t;
constexpr Nanoseconds second = 1'000'000'000;

[[noreturn]] void die(const std::string& cause) {
    std::fprintf(stderr, "cluster_load: %s\n", cause.c_str());
    std::exit(1);
}

Nanoseconds read_clock(clockid_t id) {
    timespec t{};
    if (clock_gettime(id, &t) != 0) die("a measured process has ended");
    return t.tv_sec * second + t.tv_nsec;
}
Nanoseconds now() { return read_clock(CLOCK_MONOTONIC); }

struct Options {
    std::string kind;
    int sender_port = 0, relay_port = 0;
    std::size_t members = 100, window = 64, size = 64, messages = 0, rooms = 1;
    double rate = 200, seconds = 3;
    std::vector<int> pids{};
};

Options parse(int argc, char** argv) {
    Options options;
    if (argc < 4 || argc % 2 != 0) die("usage: cluster_load KIND SENDER_PORT RELAY_PORT [option value]...");
    options.kind = argv[1];
    options.sender_port = std::atoi(argv[2]);
    options.relay_port = std::atoi(argv[3]);
    for (int i = 4; i + 1 < argc; i += 2) {
        const std::string name = argv[i], value = argv[i + 1];
        const auto count = static_cast<std::size_t>(std::atoll(value.c_str()));
        if (name == "--members") options.members = count;
        else if (name == "--window") options.window = count;
        else if (name == "--size") options.size = (std::max)(count, std::size_t{32});
        else if (name == "--messages") options.messages = count;
        else if (name == "--rooms") options.rooms = (std::max)(count, std::size_t{1});
        else if (name == "--rate") options.rate = std::atof(value.c_str());
        else if (name == "--seconds") options.seconds = std::atof(value.c_str());
        else if (name == "--pids") {
            std::string_view rest = value;
            while (!rest.empty())
                options.pids.push_back(std::atoi(std::string(wschat::text::consume_until(rest, ',')).c_str()));
        } else die("unknown option: " + name);
    }
    return options;
}

double percentile(std::vector<Nanoseconds> values, double fraction) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    const auto index = static_cast<std::size_t>(fraction * static_cast<double>(values.size()));
    return static_cast<double>(values[(std::min)(index, values.size() - 1)]) / 1e3;
}

class Run {
public:
    explicit Run(Options options) : options_(std::move(options)) {
        for (const int pid : options_.pids) {
            clocks_.emplace_back();
            if (clock_getcpuclockid(pid, &clocks_.back()) != 0) die("no process " + std::to_string(pid));
        }
    }
    void run();

    // ---- the calls of the members ------------------------------------------------------------------------------

    const Options& options() const { return options_; }
    void on_ready(wschat::WebSocketHandler& member, bool is_sender) {
        if (is_sender) sender_ = &member;
        if (++ready_ == options_.members + 1) client_.loop().call_later(std::chrono::seconds(1), [this] { start(); });
    }
    // `stamp`: when the message should have left.
    void on_message(std::size_t number, Nanoseconds stamp) {
        if (number == 0) {
            if (measuring_) local_.push_back(now() - stamp);
            return;
        }
        ++arrived_;
        if (number > samples) return;
        if (measuring_) remote_.push_back(now() - stamp);
        if (number == 1 && options_.rate == 0 && sending_) send(now());
    }

private:
    static constexpr std::size_t samples = 8;  // members whose latency is measured

    struct Snapshot {
        Nanoseconds wall = 0;
        std::vector<Nanoseconds> cpu{};
        std::uint64_t sent = 0, arrived = 0;
    };

    Snapshot snapshot() const {
        Snapshot taken{now(), {}, sent_, arrived_};
        for (const clockid_t clock : clocks_) taken.cpu.push_back(read_clock(clock));
        return taken;
    }
    void start() {
        sending_ = true;
        start_ = now();
        if (options_.rate == 0)
            for (std::size_t i = 0; i < options_.window; ++i) send(start_);
        else client_.loop().call_every(std::chrono::milliseconds(1), [this] { send_due(); });
        if (options_.messages != 0) return begin();
        client_.loop().call_later(std::chrono::seconds(1), [this] { begin(); });
    }
    void begin() {
        first_ = snapshot();
        measuring_ = true;
        if (options_.messages == 0)
            client_.loop().call_later(std::chrono::duration<double>(options_.seconds), [this] { end(); });
    }
    void end() {
        measuring_ = sending_ = false;
        last_ = snapshot();
        client_.loop().call_later(std::chrono::seconds(2), [this] { print(); });
    }
    void send_due() {
        while (sending_) {
            const auto due = start_ + static_cast<Nanoseconds>(static_cast<double>(sent_) * 1e9 / options_.rate);
            if (due > now()) return;
            send(due);
        }
    }
    void send(Nanoseconds stamp) {
        if (options_.messages != 0 && sent_ == options_.messages) return end();
        ++sent_;
        std::string text = "@@" + std::to_string(stamp);
        text.resize(options_.size, '.');
        sender_->write_message(options_.kind == "socketio" ? "42[\"m\",\"" + text + "\"]" : text);
    }
    void print() {
        const double wall = static_cast<double>(last_.wall - first_.wall) / 1e9;
        std::printf("{\"seconds\":%g,\"messages\":%llu,\"deliveries\":%llu,\"missing\":%lld", wall,
                    static_cast<unsigned long long>(last_.sent - first_.sent),
                    static_cast<unsigned long long>(last_.arrived - first_.arrived),
                    static_cast<long long>(sent_ * options_.members) - static_cast<long long>(arrived_));
        std::printf(",\"cpu\":[");
        for (std::size_t i = 0; i < clocks_.size(); ++i)
            std::printf("%s%g", i == 0 ? "" : ",", static_cast<double>(last_.cpu[i] - first_.cpu[i]) / 1e9);
        std::printf("],\"local_p50\":%g,\"local_p99\":%g,\"p50\":%g,\"p99\":%g}\n", percentile(local_, 0.5),
                    percentile(local_, 0.99), percentile(remote_, 0.5), percentile(remote_, 0.99));
        std::fflush(stdout);
        std::_Exit(0);
    }

    const Options options_;
    wschat::Client client_;
    std::vector<clockid_t> clocks_;
    wschat::WebSocketHandler* sender_ = nullptr;
    std::size_t ready_ = 0;
    std::uint64_t sent_ = 0, arrived_ = 0;
    bool sending_ = false, measuring_ = false;
    Nanoseconds start_ = 0;
    Snapshot first_{}, last_{};
    std::vector<Nanoseconds> local_, remote_;
};

// Number 0 is the sender.
class Member : public wschat::WebSocketHandler {
public:
    Member(Run& run, std::size_t number) : run_(run), number_(number) {}
    void open() override {
        if (run_.options().kind == "room") be_ready();
    }
    void on_message(const wschat::Message& message) override {
        const std::string_view text = message.text();
        const bool socketio = run_.options().kind == "socketio";
        if (socketio && text == "2") return void(write_message("3"));  // Engine.IO: a ping
        if (!ready_) return prepare(text, socketio);
        const std::size_t at = text.find("@@");
        if (at != std::string_view::npos) arrived(text.substr(at + 2));
        else if (text.find("\"type\":\"error\"") != std::string_view::npos) die("refused: " + std::string(text));
    }
    void on_close() override { die("a connection was lost: " + std::string(to_string(close_cause()))); }
    void on_failure(const wschat::ConnectError& error) override { die(error.sentence); }

private:
    void be_ready() {
        if (!std::exchange(ready_, true)) run_.on_ready(*this, number_ == 0);
    }
    void prepare(std::string_view text, bool socketio) {
        if (socketio && text.substr(0, 1) == "0") write_message("40");
        const bool is_ready =
            socketio ? text.substr(0, 2) == "40" : text.find("\"type\":\"history\"") != std::string_view::npos;
        if (is_ready) be_ready();
    }
    void arrived(std::string_view text) {
        std::size_t digits = 0;
        while (digits < text.size() && wschat::text::is_digit(text[digits])) ++digits;
        run_.on_message(number_, static_cast<Nanoseconds>(
                                     wschat::text::parse_unsigned(text.substr(0, digits), INT64_MAX).value_or(0)));
    }

    Run& run_;
    const std::size_t number_;
    bool ready_ = false;
};

void Run::run() {
    wschat::ClientOptions options;
    options.limits.max_message_size = options.limits.max_backlog = 64 * 1024 * 1024;
    options.connect_timeout = std::chrono::minutes(1);
    for (std::size_t i = 0; i <= options_.members; ++i) {
        const int port = i == 0 ? options_.sender_port : options_.relay_port;
        std::string path = "/";
        if (options_.kind == "socketio") path = "/socket.io/?EIO=4&transport=websocket";
        if (options_.kind == "chat") path += std::to_string(i % options_.rooms) + "?name=User" + std::to_string(i);
        client_.connect<Member>("ws://127.0.0.1:" + std::to_string(port) + path, options, std::ref(*this), i);
    }
    client_.loop().call_later(std::chrono::seconds(120), [this] {
        die("no end after two minutes: " + std::to_string(ready_) + " of " + std::to_string(options_.members + 1) +
            " connections are ready, " + std::to_string(sent_) + " messages sent, " + std::to_string(arrived_) +
            " deliveries");
    });
    client_.run();
}

}  // namespace

int main(int argc, char** argv) try {
    Run run(parse(argc, argv));
    run.run();
} catch (const wschat::Error& error) {
    die(error.what());
}
