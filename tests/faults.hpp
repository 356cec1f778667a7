// What can be made to go wrong on a server's thread: the calls of the system that wschat.hpp makes, and operator new.
// The program is linked with --wrap for each of these calls; on a thread without a seam they are the real ones.
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
    ring_init,  // io_uring, where it is compiled in
    ring_submit,
    ring_wait,
    send,
    sendmsg,
    setsockopt,
    shutdown,
    socket,
    unlink,
    write,
    allocate,  // operator new
    count
};
constexpr std::size_t call_count = static_cast<std::size_t>(Call::count);
const char* to_string(Call call);

// Of a kind of call those from the first-th on fail, so many times, with that error; 0 is a short count of one byte.
// For getaddrinfo it is one of the EAI_ numbers.
struct Plan {
    Call call = Call::count;
    int error = 0;
    long first = 1;
    long times = 1;
};

// What a thread does differently, and what it has done.
struct Seam {
    std::array<Plan, 2> plans;
    std::array<long, call_count> calls{};
    long faults = 0;
    int error = 0;  // of the last fault
    // The ports of the peers on whose connections calls have failed.
    std::array<std::uint16_t, 128> hit_ports{};
    std::size_t hits = 0;
    bool next_accepted_is_hit = false;

    bool has_hit(std::uint16_t port) const;
    long calls_of(Call call) const { return calls[static_cast<std::size_t>(call)]; }
};

// While one lives, the calls of this thread go through the seam, or are the real ones where that is null.
class Armed {
public:
    explicit Armed(Seam* seam);
    Armed(const Armed&) = delete;
    Armed& operator=(const Armed&) = delete;
    ~Armed();

private:
    Seam* before_;
};

// Blocks of operator new that threads with a seam have made and nobody has freed.
long live_blocks();

}  // namespace faults
