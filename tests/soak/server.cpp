// soak_server PORT: the server of the soak test, with rooms that number their messages, and pages with metrics and heap
// use.
//
// A member connects to /close/{rooms} or /drop/{rooms}; the first word is the backlog policy. {rooms} are room numbers
// with a + between them. All numbers in messages are hexadecimal.
//
// To the server:
//     m ROOM:4 ANYTHING             for all members of the room
//     l                             leave all rooms
//     b                             ask the server to close
// From the server:
//     m ROOM:4 NUMBER:8 ANYTHING    a message of the room
//     j ROOM:4 NUMBER:8             joined; the next message has that number
//     l ROOM:4 NUMBER:8             left; the next message has that number
#include "../../wschat.hpp"

#include <malloc.h>

// ---- the heap ------------------------------------------------------------------------------------------------------

namespace {

// Live allocations of the server, which has one thread. Larger blocks are grown lists and buffers and do not show a
// leak.
struct Heap {
    std::size_t blocks = 0;
    std::size_t small_bytes = 0;
} heap;

std::size_t small_size(void* block) {
    const std::size_t size = ::malloc_usable_size(block);
    return size < 4096 ? size : 0;
}

void* counted(void* block) {
    if (block == nullptr) throw std::bad_alloc();
    ++heap.blocks;
    heap.small_bytes += small_size(block);
    return block;
}

void release(void* block) {
    if (block == nullptr) return;
    --heap.blocks;
    heap.small_bytes -= small_size(block);
    std::free(block);
}

}  // namespace

void* operator new(std::size_t size) { return counted(std::malloc(size)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
    const auto unit = static_cast<std::size_t>(alignment);
    return counted(std::aligned_alloc(unit, (size + unit - 1) / unit * unit));
}
void operator delete(void* block) noexcept { release(block); }
void operator delete(void* block, std::size_t) noexcept { release(block); }
void operator delete(void* block, std::align_val_t) noexcept { release(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { release(block); }

// ---- members -------------------------------------------------------------------------------------------------------

namespace {

constexpr std::size_t max_rooms = 4096;
std::array<std::uint32_t, max_rooms> next_number;  // the next message number of each room

std::string hex(std::size_t number, int digits) {
    char text[20];
    return std::string(text, static_cast<std::size_t>(std::snprintf(text, sizeof text, "%0*zx", digits, number)));
}

class Member : public wschat::WebSocketHandler {
public:
    void open() override {
        std::string_view names = request().param("rooms");
        while (!names.empty()) {
            const std::string_view name = wschat::text::consume_until(names, '+');
            const auto number = wschat::text::parse_unsigned(name, max_rooms - 1);
            if (!number) return close(wschat::CloseCode::policy_violation, "no such room");
            room(name).join(*this);
            send_event('j', *number);
        }
    }

    void on_message(const wschat::Message& message) override {
        const std::string_view data = message.data();
        if (data == "l") return leave();
        if (data == "b") return close(4000, "closed on request");
        const std::string digits(data.substr(0, 5));
        const std::size_t number = std::strtoul(digits.c_str() + 1, nullptr, 16);
        if (data.size() < 5 || data.front() != 'm' || number >= max_rooms)
            return close(wschat::CloseCode::unsupported_data, "unknown message");
        const std::string numbered = digits + hex(next_number[number]++, 8) + std::string(data.substr(5));
        room(std::to_string(number)).broadcast(wschat::Message(numbered, message.opcode()));
    }

private:
    void send_event(char kind, std::size_t number) {
        write_message(kind + hex(number, 4) + hex(next_number[number], 8));
    }

    void leave() {
        for (wschat::Room* room : rooms()) {
            room->leave(*this);
            send_event('l', std::stoul(room->name()));
        }
    }
};

// Long timeouts, so stopping and continuing the processes is harmless. The small backlog closes slow readers soon.
wschat::Limits limits() {
    wschat::Limits limits;
    limits.handshake_timeout = limits.ping_timeout = std::chrono::minutes(10);
    limits.ping_interval = std::chrono::seconds(5);
    limits.max_backlog = 64 * 1024;
    return limits;
}

}  // namespace

int main(int argc, char** argv) try {
    wschat::ServerOptions options;
    options.limits = limits();
    const char* poller = std::getenv("WSCHAT_TEST_POLLER");
    if (poller != nullptr && std::string(poller) == "poll") options.poller = wschat::PollerKind::poll;
    wschat::Server server(options);
    server.on_log([](const wschat::LogEntry& entry) {
        if (entry.level >= wschat::LogLevel::warning) wschat::log_to_stderr(entry);
    });
    wschat::Limits dropping = limits();
    dropping.backlog_policy = wschat::BacklogPolicy::drop;
    server.route<Member>("/close/{rooms}");
    server.route<Member>("/drop/{rooms}").set_limits(dropping);
    server.metrics_page("/metrics");
    server.get("/heap", [](const wschat::Request&) {
        return wschat::Response(
            200, "blocks " + std::to_string(heap.blocks) + "\nsmall_bytes " + std::to_string(heap.small_bytes) + "\n");
    });
    server.listen(argc > 1 ? argv[1] : "0");
    std::printf("soak_server: %d\n", server.port());
    std::fflush(stdout);
    server.run();
} catch (const wschat::Error& error) {
    std::fprintf(stderr, "soak_server: %s\n", error.what());
    return 1;
}
