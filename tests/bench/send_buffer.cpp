// What Limits::send_buffer costs: the CPU time of a server, and the time, for a large stream to one reader on the
// loopback.
//
//   send_buffer [ROUNDS]       a line for each size of the buffer and of the messages: medians
#include "../../wschat.hpp"

#include "load_support.hpp"

#include <sys/resource.h>

#include <thread>

const load_support::Program load_support::program = {"send_buffer", 1};

namespace {

using load_support::fail;

constexpr std::size_t total = 256 * 1024 * 1024;

// The first volatile message sets the buffer. The others are sent whenever the backlog is low.
struct Source : wschat::WebSocketHandler {
    explicit Source(std::size_t size) : message(size, 'x') {}
    void open() override {
        write_volatile("now");
        fill();
    }
    void on_drain() override { fill(); }
    void on_message(const wschat::Message&) override {}
    void fill() {
        while (sent < total && buffered_amount() < 512 * 1024) {
            write_message(message);
            sent += message.size();
        }
        if (sent >= total) close();
        else
            loop().post([self = ref()] {
                self.post([](wschat::WebSocketHandler& handler) { static_cast<Source&>(handler).fill(); });
            });
    }
    const std::string message;
    std::size_t sent = 0;
};

struct Cost {
    double cpu_ms, ms;
};

double cpu_ms() {
    rusage usage{};
    ::getrusage(RUSAGE_THREAD, &usage);
    const auto ms = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_usec) / 1e3;
    };
    return ms(usage.ru_utime) + ms(usage.ru_stime);
}

void read_all(int port) {
    const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in address = load_support::loopback_address(0, static_cast<std::uint16_t>(port));
    if (::connect(socket, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) fail("connect");
    const std::string request = wschat::detail::handshake_request("x", "/", "dGhlIHNhbXBsZSBub25jZQ==");
    if (::send(socket, request.data(), request.size(), 0) != static_cast<ssize_t>(request.size())) fail("send");
    std::vector<char> bytes(256 * 1024);
    std::size_t all = 0;
    while (all < total) {
        const ssize_t got = ::recv(socket, bytes.data(), bytes.size(), 0);
        if (got <= 0) fail("the server has hung up");
        all += static_cast<std::size_t>(got);
    }
    ::close(socket);
}

Cost run(std::size_t buffer, std::size_t message) {
    wschat::ServerOptions options;
    options.handle_signals = false;
    options.limits.send_buffer = buffer;
    wschat::Server server(options);
    server.route<Source>("/", message);
    server.listen(0);
    Cost cost{};
    std::thread serving([&] {
        server.run();
        cost.cpu_ms = cpu_ms();
    });
    const auto begin = wschat::Clock::now();
    read_all(server.port());
    cost.ms = std::chrono::duration<double, std::milli>(wschat::Clock::now() - begin).count();
    server.shutdown();
    serving.join();
    return cost;
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 5;
    std::printf("%12s %12s %12s %12s\n", "send_buffer", "message", "CPU ms", "ms");
    for (const std::size_t message : {1024u, 16u * 1024u}) {
        for (const std::size_t buffer : {0u, 16u * 1024u, 64u * 1024u, 256u * 1024u, 1024u * 1024u}) {
            std::vector<double> cpu, time;
            for (int i = 0; i < rounds; ++i) {
                const Cost cost = run(buffer, message);
                cpu.push_back(cost.cpu_ms);
                time.push_back(cost.ms);
            }
            std::sort(cpu.begin(), cpu.end());
            std::sort(time.begin(), time.end());
            std::printf("%12zu %12zu %12.0f %12.0f\n", buffer, message, cpu[cpu.size() / 2], time[time.size() / 2]);
            std::fflush(stdout);
        }
    }
}
