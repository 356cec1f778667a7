// Wrappers for the calls of faults.hpp.
#include "faults.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(WSCHAT_OPENSSL) && WSCHAT_OPENSSL
#include <openssl/crypto.h>
#endif
#if defined(WSCHAT_LIBURING) && WSCHAT_LIBURING
#define WITH_RING
#include <liburing.h>
#endif

extern "C" {
int __real_accept4(int, sockaddr*, socklen_t*, int);
int __real_bind(int, const sockaddr*, socklen_t);
int __real_close(int);
int __real_connect(int, const sockaddr*, socklen_t);
int __real_epoll_create1(int);
int __real_epoll_ctl(int, int, int, epoll_event*);
int __real_epoll_wait(int, epoll_event*, int, int);
int __real_fstat(int, struct stat*);
int __real_getaddrinfo(const char*, const char*, const addrinfo*, addrinfo**);
int __real_getrlimit(int, rlimit*);
int __real_getsockname(int, sockaddr*, socklen_t*);
int __real_listen(int, int);
int __real_lstat(const char*, struct stat*);
int __real_open(const char*, int, ...);
int __real_openat(int, const char*, int, ...);
int __real_pipe2(int*, int);
int __real_poll(pollfd*, nfds_t, int);
ssize_t __real_read(int, void*, size_t);
char* __real_realpath(const char*, char*);
ssize_t __real_recv(int, void*, size_t, int);
ssize_t __real_send(int, const void*, size_t, int);
ssize_t __real_sendmsg(int, const msghdr*, int);
int __real_setsockopt(int, int, int, const void*, socklen_t);
int __real_shutdown(int, int);
int __real_socket(int, int, int);
int __real_unlink(const char*);
ssize_t __real_write(int, const void*, size_t);
}

namespace faults {
namespace {

thread_local Seam* seam = nullptr;
std::atomic<long> blocks{0};

std::uint16_t peer_port(int descriptor) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    const int before = errno;
    const bool known = ::getpeername(descriptor, reinterpret_cast<sockaddr*>(&address), &size) == 0;
    errno = before;
    sockaddr_in in;
    std::memcpy(&in, &address, sizeof in);
    return known && address.ss_family == AF_INET ? ntohs(in.sin_port) : std::uint16_t{0};
}

void hit(int descriptor) {
    const std::uint16_t port = descriptor < 0 ? std::uint16_t{0} : peer_port(descriptor);
    if (port != 0 && seam->hits < seam->hit_ports.size()) seam->hit_ports[seam->hits++] = port;
}

// Counts a call. Returns true if it must fail, with seam->error. The fault hits the connection of the descriptor.
bool fails(Call call, int descriptor = -1) {
    if (seam == nullptr) return false;
    const long number = ++seam->calls[static_cast<std::size_t>(call)];
    for (const Plan& plan : seam->plans) {
        if (plan.call != call || number < plan.first || number - plan.first >= plan.times) continue;
        ++seam->faults;
        seam->error = plan.error;
        hit(descriptor);
        return true;
    }
    return false;
}
bool fails_with_error(Call call, int descriptor = -1) {
    if (!fails(call, descriptor)) return false;
    errno = seam->error;
    return true;
}

// Counts a call that transfers bytes. Returns the number of bytes that it may transfer, or -1 if it must fail.
ssize_t allowed(Call call, int descriptor, size_t size) {
    if (!fails(call, descriptor)) return static_cast<ssize_t>(size);
    errno = seam->error;
    return seam->error != 0 ? -1 : 1;
}

}  // namespace

const char* to_string(Call call) {
    // clang-format off
    constexpr const char* names[] = {
        "accept4", "bind", "close", "connect", "epoll_create1", "epoll_ctl", "epoll_wait", "fstat",
        "getaddrinfo", "getrlimit", "getsockname", "listen", "lstat", "open", "openat", "pipe2", "poll", "read",
        "realpath", "recv", "io_uring_queue_init", "io_uring_submit", "io_uring_wait_cqe", "send", "sendmsg",
        "setsockopt", "shutdown", "socket", "unlink", "write", "operator new", "malloc of OpenSSL",
    };
    // clang-format on
    static_assert(sizeof names / sizeof *names == call_count);
    return names[static_cast<std::size_t>(call)];
}

bool Seam::has_hit(std::uint16_t port) const {
    for (std::size_t i = 0; i < hits; ++i)
        if (hit_ports[i] == port) return true;
    return false;
}

Armed::Armed(Seam* of_thread) : before_(std::exchange(seam, of_thread)) {}
Armed::~Armed() { seam = before_; }

long live_blocks() { return blocks.load(); }

}  // namespace faults

using faults::Call;
using faults::fails;
using faults::fails_with_error;

extern "C" {

int __wrap_accept4(int listener, sockaddr* address, socklen_t* size, int flags) {
    const bool failed = fails(Call::accept);
    const int error = failed ? faults::seam->error : 0;
    // With these errors the kernel has removed the connection.
    const bool consumed = error == ECONNABORTED || error == EPROTO;
    const int accepted = failed && !consumed ? -1 : __real_accept4(listener, address, size, flags);
    if (accepted >= 0 && (consumed || (faults::seam != nullptr && faults::seam->next_accepted_is_hit))) {
        faults::hit(accepted);
        faults::seam->next_accepted_is_hit = false;
    }
    if (consumed && accepted >= 0) __real_close(accepted);
    if (failed) {
        // The server rejects the next connection with its reserve descriptor.
        if (error == EMFILE || error == ENFILE) faults::seam->next_accepted_is_hit = true;
        errno = error;
        return -1;
    }
    // A small buffer, because a peer that does not read must soon have a backlog.
    const int small = 16 * 1024;
    if (accepted >= 0 && faults::seam != nullptr)
        __real_setsockopt(accepted, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    return accepted;
}
int __wrap_bind(int descriptor, const sockaddr* address, socklen_t size) {
    return fails_with_error(Call::bind) ? -1 : __real_bind(descriptor, address, size);
}
// Linux closes the descriptor also if close() fails. close(2): "Retrying the close() after a failure return is the wrong
// thing to do".
int __wrap_close(int descriptor) {
    const bool failed = fails(Call::close);
    const int result = __real_close(descriptor);
    if (!failed) return result;
    errno = faults::seam->error;
    return -1;
}
int __wrap_connect(int descriptor, const sockaddr* address, socklen_t size) {
    return fails_with_error(Call::connect) ? -1 : __real_connect(descriptor, address, size);
}
int __wrap_epoll_create1(int flags) { return fails_with_error(Call::epoll_create) ? -1 : __real_epoll_create1(flags); }
int __wrap_epoll_ctl(int poller, int operation, int descriptor, epoll_event* event) {
    return fails_with_error(Call::epoll_ctl, descriptor) ? -1 : __real_epoll_ctl(poller, operation, descriptor, event);
}
int __wrap_epoll_wait(int poller, epoll_event* events, int count, int timeout) {
    return fails_with_error(Call::epoll_wait) ? -1 : __real_epoll_wait(poller, events, count, timeout);
}
int __wrap_fstat(int descriptor, struct stat* status) {
    return fails_with_error(Call::fstat) ? -1 : __real_fstat(descriptor, status);
}
int __wrap_getaddrinfo(const char* host, const char* service, const addrinfo* hints, addrinfo** found) {
    return fails_with_error(Call::getaddrinfo) ? faults::seam->error : __real_getaddrinfo(host, service, hints, found);
}
int __wrap_getrlimit(int resource, rlimit* limit) {
    return fails_with_error(Call::getrlimit) ? -1 : __real_getrlimit(resource, limit);
}
int __wrap_getsockname(int descriptor, sockaddr* address, socklen_t* size) {
    return fails_with_error(Call::getsockname) ? -1 : __real_getsockname(descriptor, address, size);
}
int __wrap_listen(int descriptor, int backlog) {
    return fails_with_error(Call::listen) ? -1 : __real_listen(descriptor, backlog);
}
int __wrap_lstat(const char* path, struct stat* status) {
    return fails_with_error(Call::lstat) ? -1 : __real_lstat(path, status);
}
int __wrap_open(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return fails_with_error(Call::open) ? -1 : __real_open(path, flags, mode);
}
int __wrap_openat(int folder, const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return fails_with_error(Call::openat) ? -1 : __real_openat(folder, path, flags, mode);
}
int __wrap_pipe2(int* ends, int flags) { return fails_with_error(Call::pipe) ? -1 : __real_pipe2(ends, flags); }
int __wrap_poll(pollfd* entries, nfds_t count, int timeout) {
    return fails_with_error(Call::poll) ? -1 : __real_poll(entries, count, timeout);
}
ssize_t __wrap_read(int descriptor, void* data, size_t size) {
    const ssize_t part = faults::allowed(Call::read, -1, size);
    return part < 0 ? -1 : __real_read(descriptor, data, static_cast<size_t>(part));
}
char* __wrap_realpath(const char* path, char* resolved) {
    return fails_with_error(Call::realpath) ? nullptr : __real_realpath(path, resolved);
}
ssize_t __wrap_recv(int descriptor, void* data, size_t size, int flags) {
    const ssize_t part = faults::allowed(Call::recv, descriptor, size);
    return part < 0 ? -1 : __real_recv(descriptor, data, static_cast<size_t>(part), flags);
}
ssize_t __wrap_send(int descriptor, const void* data, size_t size, int flags) {
    const ssize_t part = faults::allowed(Call::send, descriptor, size);
    return part < 0 ? -1 : __real_send(descriptor, data, static_cast<size_t>(part), flags);
}
ssize_t __wrap_sendmsg(int descriptor, const msghdr* message, int flags) {
    const ssize_t part = faults::allowed(Call::sendmsg, descriptor, 0);
    if (part == 1) return __real_send(descriptor, message->msg_iov[0].iov_base, 1, flags);
    return part < 0 ? -1 : __real_sendmsg(descriptor, message, flags);
}
#if defined(WITH_RING)
int __real_io_uring_queue_init(unsigned, io_uring*, unsigned);
int __real_io_uring_submit(io_uring*);
int __real___io_uring_get_cqe(io_uring*, io_uring_cqe**, unsigned, unsigned, sigset_t*);

int __wrap_io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags) {
    return fails(Call::ring_init) ? -faults::seam->error : __real_io_uring_queue_init(entries, ring, flags);
}
int __wrap_io_uring_submit(io_uring* ring) {
    return fails(Call::ring_submit) ? -faults::seam->error : __real_io_uring_submit(ring);
}
int __wrap___io_uring_get_cqe(io_uring* ring, io_uring_cqe** result, unsigned submit, unsigned wait, sigset_t* mask) {
    return fails(Call::ring_wait) ? -faults::seam->error : __real___io_uring_get_cqe(ring, result, submit, wait, mask);
}
#endif
int __wrap_setsockopt(int descriptor, int level, int name, const void* value, socklen_t size) {
    return fails_with_error(Call::setsockopt) ? -1 : __real_setsockopt(descriptor, level, name, value, size);
}
int __wrap_shutdown(int descriptor, int how) {
    return fails_with_error(Call::shutdown) ? -1 : __real_shutdown(descriptor, how);
}
int __wrap_socket(int family, int type, int protocol) {
    return fails_with_error(Call::socket) ? -1 : __real_socket(family, type, protocol);
}
int __wrap_unlink(const char* path) { return fails_with_error(Call::unlink) ? -1 : __real_unlink(path); }
ssize_t __wrap_write(int descriptor, const void* data, size_t size) {
    const ssize_t part = faults::allowed(Call::write, -1, size);
    return part < 0 ? -1 : __real_write(descriptor, data, static_cast<size_t>(part));
}
}

namespace {

// A mark before each block says whether a thread with a seam has allocated it.
constexpr std::size_t mark_size = alignof(std::max_align_t);

void* allocate(std::size_t size) {
    if (fails(Call::allocate)) throw std::bad_alloc();
    const bool marked = faults::seam != nullptr;
    void* block = std::malloc(size + mark_size);
    if (block == nullptr) throw std::bad_alloc();
    std::memcpy(block, &marked, sizeof marked);
    if (marked) ++faults::blocks;
    return static_cast<char*>(block) + mark_size;
}
void release(void* place) {
    if (place == nullptr) return;
    void* block = static_cast<char*>(place) - mark_size;
    bool marked = false;
    std::memcpy(&marked, block, sizeof marked);
    if (marked) --faults::blocks;
    std::free(block);
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
// Without this, a sanitizer would use its own operator, whose blocks have no mark.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    try {
        return allocate(size);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
void* operator new[](std::size_t size, const std::nothrow_t& tag) noexcept { return operator new(size, tag); }
void operator delete(void* place) noexcept { release(place); }
void operator delete[](void* place) noexcept { release(place); }
void operator delete(void* place, std::size_t) noexcept { release(place); }
void operator delete[](void* place, std::size_t) noexcept { release(place); }
void operator delete(void* place, const std::nothrow_t&) noexcept { release(place); }
void operator delete[](void* place, const std::nothrow_t&) noexcept { release(place); }

#if defined(WSCHAT_OPENSSL) && WSCHAT_OPENSSL
namespace {

void* allocate_for_openssl(std::size_t size, const char*, int) {
    return faults::fails(Call::openssl_allocate) ? nullptr : std::malloc(size);
}
void* reallocate_for_openssl(void* block, std::size_t size, const char*, int) {
    return faults::fails(Call::openssl_allocate) ? nullptr : std::realloc(block, size);
}
void free_for_openssl(void* block, const char*, int) { std::free(block); }

[[maybe_unused]] const int openssl_prepared =
    ::CRYPTO_set_mem_functions(&allocate_for_openssl, &reallocate_for_openssl, &free_for_openssl);

}  // namespace
#endif
