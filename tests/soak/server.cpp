// What the soak keeps busy: rooms that number their messages, and pages that tell what the server holds.   soak_server PORT
//
// A member comes by /close/{rooms} or /drop/{rooms}, which differ in what happens to it when it does not read; {rooms}
// are numbers of rooms with a + between them. All numbers in messages are hexadecimal.
//
//   to the server    m ROOM:4 ANYTHING     for all in the room         from it    m ROOM:4 NUMBER:8 ANYTHING
//                    l                     leaves its rooms                       j ROOM:4 NUMBER:8    it has joined,
//                    b                     wants to be closed                     l ROOM:4 NUMBER:8    it has left; the
//                                                                                 next message has that number
#include "../../wschat.hpp"

#include <malloc.h>

// ---- the heap ------------------------------------------------------------------------------------------------------

namespace {

// What operator new has given out and not got back. The server has one thread. Blocks that are not small are what lists
// and buffers have grown to, and do not tell a leak from a busy minute.
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

void give_back(void* block) {
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
void operator delete(void* block) noexcept { give_back(block); }
void operator delete(void* block, std::size_t) noexcept { give_back(block); }
void operator delete(void* block, std::align_val_t) noexcept { give_back(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { give_back(block); }

// ---- members -------------------------------------------------------------------------------------------------------

namespace {

constexpr std::size_t max_rooms = 4096;
std::array<std::uint32_t, max_rooms> next_number;  // of each room

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
            tell('j', *number);
        }
    }

    void on_message(const wschat::Message& message) override {
        const std::string_view data = message.data();
        if (data == "l") return leave();
        if (data == "b") return close(4000, "as you wish");
        const std::string digits(data.substr(0, 5));
        const std::size_t number = std::strtoul(digits.c_str() + 1, nullptr, 16);
        if (data.size() < 5 || data.front() != 'm' || number >= max_rooms)
            return close(wschat::CloseCode::unsupported_data, "what is that?");
        const std::string numbered = digits + hex(next_number[number]++, 8) + std::string(data.substr(5));
        room(std::to_string(number)).broadcast(wschat::Message(numbered, message.opcode()));
    }

private:
    void tell(char what, std::size_t number) { write_message(what + hex(number, 4) + hex(next_number[number], 8)); }

    void leave() {
        for (wschat::Room* room : rooms()) {
            room->leave(*this);
            tell('l', std::stoul(room->name()));
        }
    }
};

// Timeouts that stopping and continuing the processes does not touch; a peer that does not read is given up soon.
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
