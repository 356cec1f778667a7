// freebsd.hpp with the calls for sockets that macOS has: g++ -isystem this folder -include this file. There is neither
// SOCK_CLOEXEC, accept4() nor MSG_NOSIGNAL, and the option SO_NOSIGPIPE is replayed: without it, sending to a closed peer
// raises SIGPIPE. Unlike on macOS, an accepted socket does not inherit the option from its listener.
#pragma once

#include "freebsd.hpp"

#undef SOCK_CLOEXEC
#undef SOCK_NONBLOCK
#undef SO_NOSIGPIPE
#define SO_NOSIGPIPE 0x1022

namespace replayed_nosigpipe {

// The sockets with the option, by their inodes, which no other open socket has.
struct Sockets {
    std::mutex mutex;
    std::set<ino_t> silent;
};
inline Sockets& sockets() {
    static Sockets all;
    return all;
}
inline ino_t inode(int descriptor) {
    struct stat status {};
    return ::fstat(descriptor, &status) == 0 ? status.st_ino : 0;
}
inline int flags(int descriptor, int flags) {
    const std::lock_guard<std::mutex> lock(sockets().mutex);
    return sockets().silent.count(inode(descriptor)) != 0 ? flags | MSG_NOSIGNAL : flags;
}

}  // namespace replayed_nosigpipe

inline int replayed_setsockopt(int descriptor, int level, int option, const void* value, socklen_t size) {
    if (level != SOL_SOCKET || option != SO_NOSIGPIPE) return ::setsockopt(descriptor, level, option, value, size);
    const std::lock_guard<std::mutex> lock(replayed_nosigpipe::sockets().mutex);
    replayed_nosigpipe::sockets().silent.insert(replayed_nosigpipe::inode(descriptor));
    return 0;
}
inline ssize_t replayed_send(int descriptor, const void* data, std::size_t size, int flags) {
    return ::send(descriptor, data, size, replayed_nosigpipe::flags(descriptor, flags));
}
inline ssize_t replayed_sendmsg(int descriptor, const msghdr* message, int flags) {
    return ::sendmsg(descriptor, message, replayed_nosigpipe::flags(descriptor, flags));
}

#undef MSG_NOSIGNAL
#define setsockopt replayed_setsockopt
#define send replayed_send
#define sendmsg replayed_sendmsg
