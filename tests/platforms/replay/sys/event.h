// kqueue() and kevent() of the BSDs and macOS, replayed on epoll, so that KqueuePoller runs on Linux. It follows
// kqueue(2) of FreeBSD 14 for sockets and pipes:
//
//   EV_ADD     adds a filter. A filter that exists keeps its EV_CLEAR, and gets a new low-water mark.
//   EV_CLEAR   after an event the filter reports nothing until its state changes. Other filters are level-triggered.
//   EV_EOF     on the read filter: the peer ended its sending side. On the write filter: this side ended its sending
//              side, or the connection is gone. If it failed, fflags is the error.
//   NOTE_LOWAT overrides the low-water mark. As on macOS, a mark above the size of the send buffer counts as that
//              size, so the write filter reports an empty buffer.
//
// A closed descriptor loses its filters only when its number is used again.
#pragma once

#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <poll.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)
#define EV_ADD 0x0001
#define EV_DELETE 0x0002
#define EV_ENABLE 0x0004
#define EV_DISABLE 0x0008
#define EV_CLEAR 0x0020
#define EV_EOF 0x8000
#define NOTE_LOWAT 0x0001

struct kevent {
    std::uintptr_t ident;
    short filter;
    unsigned short flags;
    unsigned int fflags;
    std::int64_t data;
    void* udata;
    std::uint64_t ext[4];
};

namespace replayed_kqueue {

struct Filter {
    struct kevent wanted;
    bool disabled = false;
    std::optional<struct kevent> reported;  // of EV_CLEAR: the last event
};

struct Queue {
    std::mutex mutex;
    std::map<int, std::map<short, Filter>> filters;
};

struct Queues {
    std::mutex mutex;
    std::map<int, std::shared_ptr<Queue>> by_descriptor;
};
inline Queues& queues() {
    static Queues all;
    return all;
}
inline std::shared_ptr<Queue> find(int descriptor) {
    const std::lock_guard<std::mutex> lock(queues().mutex);
    const auto found = queues().by_descriptor.find(descriptor);
    return found == queues().by_descriptor.end() ? nullptr : found->second;
}

// Registers the filters of a descriptor with epoll, which looks at its state again.
inline bool arm(int queue, int descriptor, const std::map<short, Filter>& filters) {
    epoll_event event{};
    bool any = false;
    for (const auto& [filter, state] : filters) {
        if (state.disabled) continue;
        any = true;
        event.events |= filter == EVFILT_READ ? EPOLLIN | EPOLLRDHUP : EPOLLOUT;
    }
    event.events |= EPOLLET;
    event.data.fd = descriptor;
    if (!any) return ::epoll_ctl(queue, EPOLL_CTL_DEL, descriptor, nullptr) == 0 || errno == ENOENT || errno == EBADF;
    return ::epoll_ctl(queue, EPOLL_CTL_MOD, descriptor, &event) == 0 ||
           (errno == ENOENT && ::epoll_ctl(queue, EPOLL_CTL_ADD, descriptor, &event) == 0);
}

// Returns 0 or an errno.
inline int apply(int queue, Queue& state, const struct kevent& change) {
    const int descriptor = static_cast<int>(change.ident);
    if (change.filter != EVFILT_READ && change.filter != EVFILT_WRITE) return EINVAL;
    auto& filters = state.filters[descriptor];
    const auto found = filters.find(change.filter);
    if ((change.flags & EV_DELETE) != 0) {
        if (found == filters.end()) return ENOENT;
        filters.erase(found);
    } else {
        if (found == filters.end() && (change.flags & EV_ADD) == 0) return ENOENT;
        const bool clear = (found == filters.end() ? change.flags : found->second.wanted.flags) & EV_CLEAR;
        Filter& filter = filters[change.filter];
        filter.wanted = change;
        filter.wanted.flags = static_cast<unsigned short>(clear ? EV_CLEAR : 0);
        if ((change.flags & EV_DISABLE) != 0) filter.disabled = true;
        if ((change.flags & EV_ENABLE) != 0) filter.disabled = false;
    }
    if (arm(queue, descriptor, filters)) return 0;
    const int error = errno;
    filters.clear();
    return error;
}

// The event of a filter in its present state, or nothing.
inline std::optional<struct kevent> evaluate(int descriptor, const Filter& filter) {
    pollfd now{descriptor, POLLIN | POLLOUT | POLLRDHUP, 0};
    ::poll(&now, 1, 0);
    const auto has = [&](int bits) { return (now.revents & bits) != 0; };
    struct kevent event = filter.wanted;
    event.fflags = 0;
    bool ended = has(POLLHUP | POLLERR), active = false;
    int bytes = 0;
    if (event.filter == EVFILT_READ) {
        ended = ended || has(POLLRDHUP);
        const bool listens = ::ioctl(descriptor, FIONREAD, &bytes) != 0;
        event.data = listens ? 1 : bytes;
        const bool marked = !listens && (filter.wanted.fflags & NOTE_LOWAT) != 0;
        active = marked ? bytes >= filter.wanted.data : has(POLLIN);
    } else {
        // Sending nothing fails after this side has ended its sending side, and reports no error of the peer.
        ended = ended || (::send(descriptor, "", 0, MSG_NOSIGNAL | MSG_DONTWAIT) != 0 && errno == EPIPE);
        const bool empty = ::ioctl(descriptor, TIOCOUTQ, &bytes) != 0 || bytes == 0;
        event.data = -bytes;
        active = has(POLLOUT) && (empty || (filter.wanted.fflags & NOTE_LOWAT) == 0);
    }
    if (ended) event.flags = static_cast<unsigned short>(event.flags | EV_EOF);
    if (has(POLLERR)) event.fflags = ECONNRESET;
    if (active || ended) return event;
    return std::nullopt;
}

// Adds the events of one descriptor.
inline void collect(int queue, Queue& state, int descriptor, std::vector<struct kevent>& events) {
    const auto found = state.filters.find(descriptor);
    if (found == state.filters.end()) return;
    bool level = false;
    for (auto& [number, filter] : found->second) {
        if (filter.disabled) continue;
        const auto event = evaluate(descriptor, filter);
        if (!event) continue;
        const auto& last = filter.reported;
        if ((filter.wanted.flags & EV_CLEAR) == 0) level = true;
        else if (last && last->flags == event->flags && last->fflags == event->fflags && last->data == event->data)
            continue;
        filter.reported = event;
        events.push_back(*event);
    }
    if (level) arm(queue, descriptor, found->second);
}

}  // namespace replayed_kqueue

inline int kqueue() {
    const int descriptor = ::epoll_create1(0);
    if (descriptor < 0) return -1;
    const std::lock_guard<std::mutex> lock(replayed_kqueue::queues().mutex);
    replayed_kqueue::queues().by_descriptor[descriptor] = std::make_shared<replayed_kqueue::Queue>();
    return descriptor;
}

inline int kevent(int queue, const struct kevent* changes, int change_count, struct kevent* events, int event_count,
                  const timespec* timeout) {
    const auto state = replayed_kqueue::find(queue);
    if (!state) return errno = EBADF, -1;
    for (int i = 0; i < change_count; ++i) {
        const std::lock_guard<std::mutex> lock(state->mutex);
        const int error = replayed_kqueue::apply(queue, *state, changes[i]);
        if (error != 0) return errno = error, -1;
    }
    if (event_count < 2) return 0;
    const auto clock = [] { return std::chrono::steady_clock::now(); };
    const auto end = clock() + std::chrono::seconds(timeout ? timeout->tv_sec : 0) +
                     std::chrono::nanoseconds(timeout ? timeout->tv_nsec : 0);
    std::vector<epoll_event> found(static_cast<std::size_t>(event_count / 2));
    std::vector<struct kevent> ready;
    for (;;) {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - clock()).count();
        const int wait = timeout == nullptr ? -1 : left > 0 ? static_cast<int>(left) : 0;
        const int count = ::epoll_wait(queue, found.data(), static_cast<int>(found.size()), wait);
        if (count < 0) return -1;
        const std::lock_guard<std::mutex> lock(state->mutex);
        for (int i = 0; i < count; ++i)
            replayed_kqueue::collect(queue, *state, found[static_cast<std::size_t>(i)].data.fd, ready);
        if (!ready.empty() || (wait == 0 && count == 0)) break;
    }
    for (std::size_t i = 0; i < ready.size(); ++i) events[i] = ready[i];
    return static_cast<int>(ready.size());
}
