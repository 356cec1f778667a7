// Shared by the load generators of tests/bench and tests/soak: errors and descriptor limits. Linux only.
#pragma once

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace load_support {

struct Program {
    const char* name;
    int failure_status;
};
extern const Program program;  // each load generator defines it

// Prints the program's name and an error, then exits.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::fprintf(stderr, "%s: ", program.name);
    std::vfprintf(stderr, format, args);
    std::fputc('\n', stderr);
    va_end(args);
    std::exit(program.failure_status);
}

// Raises the limit of open descriptors to the highest allowed value.
inline void raise_descriptor_limit(std::size_t needed) {
    rlimit limit{};
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (needed > limit.rlim_max)
        fail("%zu descriptors are needed, but only %llu are allowed", needed,
             static_cast<unsigned long long>(limit.rlim_max));
}

inline sockaddr_in loopback_address(std::uint32_t host_offset, std::uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK + host_offset);
    return address;
}

}  // namespace load_support
