// A simulated kernel for the server: descriptors, peers, files, faults and a clock. This file defines the system calls
// by their C names, so the linker prefers them to those of the C library. Calls on descriptors of the real kernel are
// passed on to it.
#pragma once

#include "fuzz.hpp"

#include <sys/syscall.h>

#include <deque>
#include <functional>
#include <map>

namespace fuzz {

// The remote end of a connection, with the state that a real kernel keeps for it.
struct Peer {
    static constexpr std::size_t unlimited = static_cast<std::size_t>(-1);

    std::string address;
    std::string sent;                    // bytes that the server has not received yet
    std::string received;                // all bytes that the server has sent
    std::size_t window = unlimited;      // bytes that the peer still accepts
    std::size_t call_limit = unlimited;  // most bytes of one call, in either direction
    bool fin = false;                    // the peer has shut down its sending side
    bool reset = false;
    bool shut_down = false;  // the server has shut down its sending side
    bool closed = false;     // the server has closed the descriptor
    bool impaired = false;   // it limits what it accepts, or has reset
    // The other end of a connection that the program makes to itself.
    std::weak_ptr<Peer> other{};
};

class Kernel {
public:
    enum class Operation { accept, receive, send, watch, wait, open, read, connect };
    using Nanoseconds = std::chrono::nanoseconds;

    // Runs while nothing is ready. Returns false if no more events follow.
    std::function<bool()> script;
    std::map<Operation, std::deque<int>> faults;  // errors that the next calls return
    std::deque<std::shared_ptr<Peer>> backlog;
    Nanoseconds now = std::chrono::hours(1);
    std::size_t descriptor_limit = Peer::unlimited;
    std::optional<std::size_t> fail_after;  // copied to heap.fail_after when the call returns
    Random random{1};
    bool in_call = false;  // a call is in progress; the script may make the server call again
    std::size_t file_size = 40'000;
    std::size_t bytes_in = 0, bytes_out = 0, file_bytes = 0, accepted = 0, waits = 0;

    std::size_t open_descriptors() const {
        return count_if([](const Descriptor&) { return true; });
    }
    std::size_t open_streams() const {
        return count_if([](const Descriptor& d) { return d.kind == Kind::stream; });
    }
    std::vector<std::shared_ptr<Peer>> outgoing;  // the near ends of connect()
    bool owns(int descriptor) const {
        return descriptor >= first && descriptor < first + static_cast<int>(table_.size());
    }
    // Records progress. Without it, many waits in a row count as spinning.
    void progress() { waits_without_progress_ = 0; }
    int patience = 60;  // so many waits; more if there is work that takes many turns

    // ---- the calls -------------------------------------------------------------------------------------------------

    int socket() { return make({Kind::listener, {}, 0}); }
    int pipe(int (&ends)[2]) {
        ends[0] = make({Kind::pipe, {}, 0});
        ends[1] = make({Kind::pipe_end, {}, static_cast<std::size_t>(ends[0])});
        return 0;
    }
    int epoll() { return make({Kind::epoll, {}, 0}); }
    // All listeners have the same address.
    int local_address(sockaddr* address, socklen_t* size) {
        write_address("127.0.0.1", address, size);
        return 0;
    }

    int accept(int listener, sockaddr* address, socklen_t* size) {
        check(at(listener).kind == Kind::listener, "accept() on a descriptor that does not listen");
        int error = 0;
        if (take_fault(Operation::accept, error)) {
            // ECONNABORTED consumes one waiting connection.
            if (error == ECONNABORTED && !backlog.empty()) backlog.pop_front();
            return failed(error);
        }
        if (backlog.empty()) return failed(EAGAIN);
        if (open_descriptors() >= descriptor_limit) return failed(EMFILE);
        const std::shared_ptr<Peer> peer = backlog.front();
        backlog.pop_front();
        write_address(peer->address, address, size);
        ++accepted;
        progress();
        return make({Kind::stream, peer, 0});
    }

    ssize_t receive(int descriptor, void* data, std::size_t size) {
        Peer& peer = stream(descriptor);
        int error = 0;
        if (take_fault(Operation::receive, error)) return failed(error);
        if (peer.reset) return failed(ECONNRESET);
        const std::size_t n = (std::min)({peer.sent.size(), peer.call_limit, size});
        if (n == 0) return peer.fin ? (progress(), 0) : failed(EAGAIN);
        std::memcpy(data, peer.sent.data(), n);
        peer.sent.erase(0, n);
        bytes_in += n;
        progress();
        return static_cast<ssize_t>(n);
    }

    ssize_t send(int descriptor, const std::vector<std::string_view>& pieces, int flags) {
        Peer& peer = stream(descriptor);
        check((flags & MSG_NOSIGNAL) != 0, "send() without MSG_NOSIGNAL");
        check(!peer.shut_down, "send() after shutdown()");
        int error = 0;
        if (take_fault(Operation::send, error)) return failed(error);
        if (peer.reset) return failed(EPIPE);
        std::size_t available = (std::min)(peer.window, peer.call_limit), sent = 0;
        for (const std::string_view piece : pieces) {
            const std::size_t n = (std::min)(piece.size(), available);
            if (const auto other = peer.other.lock()) other->sent += piece.substr(0, n);
            else peer.received += piece.substr(0, n);
            available -= n;
            sent += n;
        }
        if (sent == 0) return failed(EAGAIN);
        if (peer.window != Peer::unlimited) peer.window -= sent;
        bytes_out += sent;
        progress();
        return static_cast<ssize_t>(sent);
    }
    void shut_down(int descriptor) {
        Peer& peer = stream(descriptor);
        peer.shut_down = true;
        if (const auto other = peer.other.lock()) other->fin = true;
        progress();
    }
    // Connects to a listener of the program itself, at once or later.
    int connect(int descriptor) {
        int error = 0;
        if (take_fault(Operation::connect, error) && error != EINPROGRESS) return failed(error);
        const auto near = std::make_shared<Peer>(), far = std::make_shared<Peer>();
        near->address = far->address = "127.0.0.1";
        near->other = far;
        far->other = near;
        at(descriptor) = {Kind::stream, near, 0};
        backlog.push_back(far);
        outgoing.push_back(near);
        progress();
        return error == 0 ? 0 : failed(error);
    }
    // Of a stream that connects.
    int pending_error(int descriptor) { return stream(descriptor).reset ? ECONNREFUSED : 0; }

    int close(int descriptor) {
        Descriptor& closed = at(descriptor);
        if (closed.peer) {
            closed.peer->closed = true;
            // Unread input makes a reset of it.
            if (const auto other = closed.peer->other.lock())
                (closed.peer->sent.empty() ? other->fin : other->reset) = true;
        }
        watched_.erase(descriptor);
        closed = {};
        progress();
        return 0;
    }

    int open(std::string_view path) {
        int error = 0;
        if (take_fault(Operation::open, error)) return failed(error);
        if (open_descriptors() >= descriptor_limit) return failed(EMFILE);
        if (path == "/sim" || path == "sub") return make({Kind::folder, {}, 0});
        const bool exists = path == "/dev/null" || path == "/sim/page.html" || path == "page.html";
        return exists ? make({Kind::file, {}, 0}) : failed(ENOENT);
    }
    int status(int descriptor, struct stat* status) {
        *status = {};
        status->st_mode = at(descriptor).kind == Kind::folder ? S_IFDIR : S_IFREG;
        status->st_size = static_cast<off_t>(file_size);
        return 0;
    }
    ssize_t read(int descriptor, void* data, std::size_t size) {
        Descriptor& from = at(descriptor);
        int error = 0;
        if (from.kind == Kind::file && take_fault(Operation::read, error)) return error == 0 ? 0 : failed(error);
        if (from.kind == Kind::pipe && from.bytes.empty()) return failed(EAGAIN);
        std::size_t n = 0;
        if (from.kind == Kind::pipe) {
            n = from.bytes.copy(static_cast<char*>(data), size);
            from.bytes.erase(0, n);
        } else {
            n = (std::min)(size, file_size - (std::min)(file_size, from.other));
            std::memset(data, 'f', n);
            from.other += n;
            file_bytes += n;
        }
        progress();
        return static_cast<ssize_t>(n);
    }
    ssize_t write(int descriptor, std::string_view bytes) {
        check(at(descriptor).kind == Kind::pipe_end, "write() to a descriptor that is not a pipe");
        at(static_cast<int>(at(descriptor).other)).bytes += bytes;
        return static_cast<ssize_t>(bytes.size());
    }

    int control(int operation, int descriptor, const epoll_event* event) {
        at(descriptor);
        int error = 0;
        const bool known = watched_.count(descriptor) != 0;
        if (operation == EPOLL_CTL_ADD) {
            check(!known, "a descriptor is added to the poller twice");
            if (take_fault(Operation::watch, error)) return failed(error);
        } else if (!known) {
            return failed(ENOENT);
        }
        if (operation == EPOLL_CTL_DEL) watched_.erase(descriptor);
        else watched_[descriptor] = *event;
        return 0;
    }
    int wait(epoll_event* events, int size, int timeout_ms) {
        return wait(timeout_ms, [&] {
            int count = 0;
            for (const auto& [descriptor, event] : watched_) {
                const std::uint32_t ready = ready_for(descriptor, event.events);
                if (ready == 0 || count == size) continue;
                events[count] = event;
                events[count++].events = ready;
            }
            return count;
        });
    }
    int poll(pollfd* entries, std::size_t size, int timeout_ms) {
        return wait(timeout_ms, [&] {
            int count = 0;
            for (std::size_t i = 0; i < size; ++i) {
                const auto events = static_cast<std::uint32_t>(entries[i].events);
                entries[i].revents = static_cast<short>(ready_for(entries[i].fd, events));
                if (entries[i].revents != 0) ++count;
            }
            return count;
        });
    }

private:
    enum class Kind { none, epoll, pipe, pipe_end, listener, stream, file, folder };
    struct Descriptor {
        Kind kind = Kind::none;
        std::shared_ptr<Peer> peer{};
        std::size_t other = 0;  // pipe: its read end; file: the read position
        std::string bytes{};
    };
    static constexpr int first = 1000;

    template <class Predicate>
    std::size_t count_if(Predicate predicate) const {
        return static_cast<std::size_t>(std::count_if(
            table_.begin(), table_.end(), [&](const Descriptor& d) { return d.kind != Kind::none && predicate(d); }));
    }
    static int failed(int error) {
        errno = error;
        return -1;
    }
    // Uses the lowest free number, as Linux does, so numbers are reused at once.
    int make(Descriptor descriptor) {
        std::size_t i = 0;
        while (i < table_.size() && table_[i].kind != Kind::none) ++i;
        if (i == table_.size()) table_.emplace_back();
        table_[i] = std::move(descriptor);
        return first + static_cast<int>(i);
    }
    Descriptor& at(int descriptor) {
        check(owns(descriptor), "the server uses a descriptor that was never open", std::to_string(descriptor));
        Descriptor& found = table_[static_cast<std::size_t>(descriptor - first)];
        check(found.kind != Kind::none, "the server uses a closed descriptor", std::to_string(descriptor));
        return found;
    }
    Peer& stream(int descriptor) {
        check(at(descriptor).kind == Kind::stream, "the server uses another descriptor as a stream");
        return *at(descriptor).peer;
    }
    bool take_fault(Operation call, int& error) {
        std::deque<int>& errors = faults[call];
        if (errors.empty()) return false;
        error = errors.front();
        errors.pop_front();
        progress();
        return true;
    }

    static void write_address(const std::string& text, sockaddr* address, socklen_t* size) {
        sockaddr_storage storage{};
        sockaddr_in in{};
        sockaddr_in6 in6{};
        if (::inet_pton(AF_INET, text.c_str(), &in.sin_addr) == 1) {
            in.sin_family = AF_INET;
            std::memcpy(&storage, &in, sizeof in);
        } else if (::inet_pton(AF_INET6, text.c_str(), &in6.sin6_addr) == 1) {
            in6.sin6_family = AF_INET6;
            std::memcpy(&storage, &in6, sizeof in6);
        } else {
            storage.ss_family = AF_UNIX;
        }
        std::memcpy(address, &storage, (std::min)(std::size_t{*size}, sizeof storage));
    }

    // EPOLLIN, EPOLLOUT, EPOLLERR and EPOLLHUP equal POLLIN, POLLOUT, POLLERR and POLLHUP.
    std::uint32_t ready_for(int descriptor, std::uint32_t wanted) {
        const Descriptor& d = at(descriptor);
        std::uint32_t ready = 0;
        if (d.kind == Kind::listener && !backlog.empty()) ready = EPOLLIN;
        if (d.kind == Kind::pipe && !d.bytes.empty()) ready = EPOLLIN;
        if (d.kind == Kind::stream) {
            const Peer& peer = *d.peer;
            if (!peer.sent.empty() || peer.fin || peer.reset) ready |= EPOLLIN;
            if (peer.window != 0 || peer.reset) ready |= EPOLLOUT;
            if (peer.reset) ready |= EPOLLERR;
            if (peer.reset || (peer.fin && peer.shut_down)) ready |= EPOLLHUP;
        }
        return ready & (wanted | EPOLLERR | EPOLLHUP);
    }

    // Runs the script until a descriptor is ready or the timeout ends. Only the script and waiting advance the clock.
    template <class Collect>
    int wait(int timeout_ms, Collect collect) {
        ++waits;
        check(++waits_without_progress_ < patience, "the server spins");
        int error = 0;
        if (take_fault(Operation::wait, error)) return failed(error);
        const Nanoseconds until = now + std::chrono::milliseconds(timeout_ms);
        for (;;) {
            const bool more = script();
            const int count = collect();
            if (count != 0 || timeout_ms == 0 || (timeout_ms > 0 && now >= until)) return count;
            if (more) continue;
            check(timeout_ms > 0, "the server waits forever");
            now = until;
            progress();
        }
    }

    std::vector<Descriptor> table_;
    std::map<int, epoll_event> watched_;
    int waits_without_progress_ = 0;
};

inline Kernel* kernel = nullptr;

// If FUZZ_TRACE is set in the environment, prints each call on standard error.
inline void trace(const char* call, int descriptor, long result) {
    static const bool enabled = std::getenv("FUZZ_TRACE") != nullptr;
    if (!enabled) return;
    std::fprintf(stderr, "%10.6f %s(%d) = %ld%s%s\n", std::chrono::duration<double>(kernel->now).count(), call,
                 descriptor, result, result < 0 ? " " : "", result < 0 ? std::strerror(errno) : "");
}

// Runs the simulated call, or the real one for descriptors of the real kernel. Allocations of the simulation never
// fail.
template <class Result, class Simulated, class Real>
Result dispatch(const char* name, int descriptor, Simulated simulated, Real real) {
    if (kernel == nullptr || !kernel->owns(descriptor)) return static_cast<Result>(real());
    const bool outermost = !std::exchange(kernel->in_call, true);
    const auto answer = [&] {
        const HarnessAllocations guard;
        const Result result = simulated();
        trace(name, descriptor, static_cast<long>(result));
        return result;
    }();
    kernel->in_call = !outermost;
    if (outermost && kernel->fail_after) heap.fail_after = *std::exchange(kernel->fail_after, std::nullopt);
    return answer;
}

}  // namespace fuzz

extern "C" {

int socket(int family, int type, int protocol) noexcept {
    if (fuzz::kernel == nullptr || (family != AF_INET && family != AF_INET6))
        return static_cast<int>(::syscall(SYS_socket, family, type, protocol));
    const fuzz::HarnessAllocations guard;
    return fuzz::kernel->socket();
}
int setsockopt(int descriptor, int level, int name, const void* value, socklen_t size) noexcept {
    return fuzz::dispatch<int>(
        "setsockopt", descriptor, [] { return 0; },
        [&] { return ::syscall(SYS_setsockopt, descriptor, level, name, value, size); });
}
int bind(int descriptor, const sockaddr* address, socklen_t size) noexcept {
    return fuzz::dispatch<int>(
        "bind", descriptor, [] { return 0; }, [&] { return ::syscall(SYS_bind, descriptor, address, size); });
}
int listen(int descriptor, int backlog) noexcept {
    return fuzz::dispatch<int>(
        "listen", descriptor, [] { return 0; }, [&] { return ::syscall(SYS_listen, descriptor, backlog); });
}
int getsockname(int descriptor, sockaddr* address, socklen_t* size) noexcept {
    return fuzz::dispatch<int>(
        "getsockname", descriptor, [&] { return fuzz::kernel->local_address(address, size); },
        [&] { return ::syscall(SYS_getsockname, descriptor, address, size); });
}
int accept4(int descriptor, sockaddr* address, socklen_t* size, int flags) {
    return fuzz::dispatch<int>(
        "accept4", descriptor, [&] { return fuzz::kernel->accept(descriptor, address, size); },
        [&] { return ::syscall(SYS_accept4, descriptor, address, size, flags); });
}
ssize_t recv(int descriptor, void* data, size_t size, int flags) {
    return fuzz::dispatch<ssize_t>(
        "recv", descriptor, [&] { return fuzz::kernel->receive(descriptor, data, size); },
        [&] { return ::syscall(SYS_recvfrom, descriptor, data, size, flags, nullptr, nullptr); });
}
ssize_t send(int descriptor, const void* data, size_t size, int flags) {
    return fuzz::dispatch<ssize_t>(
        "send", descriptor,
        [&] {
            return fuzz::kernel->send(descriptor, {{static_cast<const char*>(data), size}}, flags);
        },
        [&] { return ::syscall(SYS_sendto, descriptor, data, size, flags, nullptr, 0); });
}
ssize_t sendmsg(int descriptor, const msghdr* message, int flags) {
    return fuzz::dispatch<ssize_t>(
        "sendmsg", descriptor,
        [&] {
            std::vector<std::string_view> pieces;
            for (std::size_t i = 0; i < message->msg_iovlen; ++i)
                pieces.emplace_back(static_cast<const char*>(message->msg_iov[i].iov_base),
                                    message->msg_iov[i].iov_len);
            return fuzz::kernel->send(descriptor, pieces, flags);
        },
        [&] { return ::syscall(SYS_sendmsg, descriptor, message, flags); });
}
int connect(int descriptor, const sockaddr* address, socklen_t size) {
    return fuzz::dispatch<int>(
        "connect", descriptor, [&] { return fuzz::kernel->connect(descriptor); },
        [&] { return ::syscall(SYS_connect, descriptor, address, size); });
}
int getsockopt(int descriptor, int level, int name, void* value, socklen_t* size) noexcept {
    return fuzz::dispatch<int>(
        "getsockopt", descriptor,
        [&] {
            const int error = name == SO_ERROR ? fuzz::kernel->pending_error(descriptor) : 0;
            std::memcpy(value, &error, (std::min)(sizeof error, std::size_t{*size}));
            return 0;
        },
        [&] { return ::syscall(SYS_getsockopt, descriptor, level, name, value, size); });
}
// The same numbers in each run.
ssize_t getrandom(void* bytes, size_t size, unsigned flags) {
    if (fuzz::kernel == nullptr) return ::syscall(SYS_getrandom, bytes, size, flags);
    for (std::size_t i = 0; i < size; ++i)
        static_cast<unsigned char*>(bytes)[i] = static_cast<unsigned char>(fuzz::kernel->random.below(256));
    return static_cast<ssize_t>(size);
}
int shutdown(int descriptor, int how) noexcept {
    return fuzz::dispatch<int>(
        "shutdown", descriptor, [&] { return fuzz::kernel->shut_down(descriptor), 0; },
        [&] { return ::syscall(SYS_shutdown, descriptor, how); });
}
int close(int descriptor) {
    return fuzz::dispatch<int>(
        "close", descriptor, [&] { return fuzz::kernel->close(descriptor); },
        [&] { return ::syscall(SYS_close, descriptor); });
}
int pipe2(int ends[2], int flags) noexcept {
    if (fuzz::kernel == nullptr) return static_cast<int>(::syscall(SYS_pipe2, ends, flags));
    const fuzz::HarnessAllocations guard;
    int descriptor[2];
    fuzz::kernel->pipe(descriptor);
    ends[0] = descriptor[0];
    ends[1] = descriptor[1];
    return 0;
}
ssize_t read(int descriptor, void* data, size_t size) {
    return fuzz::dispatch<ssize_t>(
        "read", descriptor, [&] { return fuzz::kernel->read(descriptor, data, size); },
        [&] { return ::syscall(SYS_read, descriptor, data, size); });
}
ssize_t write(int descriptor, const void* data, size_t size) {
    return fuzz::dispatch<ssize_t>(
        "write", descriptor,
        [&] {
            return fuzz::kernel->write(descriptor, {static_cast<const char*>(data), size});
        },
        [&] { return ::syscall(SYS_write, descriptor, data, size); });
}
int open(const char* path, int flags, ...) {
    const bool simulated = fuzz::kernel != nullptr &&
                           (std::string_view(path) == "/dev/null" || std::string_view(path).substr(0, 4) == "/sim");
    if (!simulated) return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, 0600));
    const fuzz::HarnessAllocations guard;
    return fuzz::kernel->open(path);
}
int openat(int folder, const char* path, int flags, ...) {
    return fuzz::dispatch<int>(
        "openat", folder, [&] { return fuzz::kernel->open(path); },
        [&] { return ::syscall(SYS_openat, folder, path, flags, 0600); });
}
int fstat(int descriptor, struct stat* status) noexcept {
    return fuzz::dispatch<int>(
        "fstat", descriptor, [&] { return fuzz::kernel->status(descriptor, status); },
        [&] { return ::syscall(SYS_newfstatat, descriptor, "", status, AT_EMPTY_PATH); });
}
int epoll_ctl(int poller, int operation, int descriptor, epoll_event* event) noexcept {
    return fuzz::dispatch<int>(
        "epoll_ctl", poller, [&] { return fuzz::kernel->control(operation, descriptor, event); },
        [&] { return ::syscall(SYS_epoll_ctl, poller, operation, descriptor, event); });
}
int epoll_create1(int flags) noexcept {
    if (fuzz::kernel == nullptr) return static_cast<int>(::syscall(SYS_epoll_create1, flags));
    const fuzz::HarnessAllocations guard;
    return fuzz::kernel->epoll();
}
int epoll_wait(int poller, epoll_event* events, int size, int timeout_ms) {
    return fuzz::dispatch<int>(
        "epoll_wait", poller, [&] { return fuzz::kernel->wait(events, size, timeout_ms); },
        [&] { return ::syscall(SYS_epoll_pwait, poller, events, size, timeout_ms, nullptr, 8); });
}
// g++ takes the entries of poll() for output alone.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
int poll(pollfd* entries, nfds_t size, int timeout_ms) {
    return fuzz::dispatch<int>(
        "poll", size == 0 ? -1 : entries[0].fd, [&] { return fuzz::kernel->poll(entries, size, timeout_ms); },
        [&] { return ::syscall(SYS_poll, entries, size, timeout_ms); });
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
int clock_gettime(clockid_t clock, timespec* time) noexcept {
    if (fuzz::kernel == nullptr || clock != CLOCK_MONOTONIC)
        return static_cast<int>(::syscall(SYS_clock_gettime, clock, time));
    time->tv_sec = fuzz::kernel->now.count() / 1'000'000'000;
    time->tv_nsec = fuzz::kernel->now.count() % 1'000'000'000;
    return 0;
}

}  // extern "C"
