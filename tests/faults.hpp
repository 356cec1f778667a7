// Injects faults into a server's thread: into the system calls of wschat.hpp, and into operator new. The program is
// linked with --wrap for each of these calls. A thread without a seam makes the real calls.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace faults {

enum class Call : std::uint8_t {
    accept,
    bind,
    close,
    connect,
    epoll_create,
    epoll_ctl,
    epoll_wait,
    fstat,
    getaddrinfo,
    getrlimit,
    getsockname,
    listen,
    lstat,
    open,
    openat,
    pipe,
    poll,
    read,
    realpath,
    recv,
    ring_init,  // io_uring, if it is compiled in
    ring_submit,
    ring_wait,
    send,
    sendmsg,
    setsockopt,
    shutdown,
    socket,
    unlink,
    write,
    allocate,          // operator new
    openssl_allocate,  // malloc() and realloc() of OpenSSL
    count
};
constexpr std::size_t call_count = static_cast<std::size_t>(Call::count);
const char* to_string(Call call);

// The calls with the numbers first, first + 1, ..., first + times - 1 fail with that error. The error 0 is a short count
// of one byte. The error of getaddrinfo is an EAI_ number.
struct Plan {
    Call call = Call::count;
    int error = 0;
    long first = 1;
    long times = 1;
};

// The fault plans of a thread, and counts of its calls and faults.
struct Seam {
    std::array<Plan, 2> plans;
    std::array<long, call_count> calls{};
    long faults = 0;
    int error = 0;  // of the last fault
    // The ports of peers whose connections had a fault.
    std::array<std::uint16_t, 128> hit_ports{};
    std::size_t hits = 0;
    bool next_accepted_is_hit = false;

    bool has_hit(std::uint16_t port) const;
    long calls_of(Call call) const { return calls[static_cast<std::size_t>(call)]; }
};

// During its lifetime the calls of this thread go through the seam. With null they are the real calls.
class Armed {
public:
    explicit Armed(Seam* seam);
    Armed(const Armed&) = delete;
    Armed& operator=(const Armed&) = delete;
    ~Armed();

private:
    Seam* before_;
};

// The number of blocks that threads with a seam have allocated and that are not freed yet.
long live_blocks();

}  // namespace faults
