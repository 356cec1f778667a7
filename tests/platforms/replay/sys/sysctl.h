// sysctl() of FreeBSD, replayed on /proc: the path of a process.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>

#define CTL_KERN 1
#define KERN_PROC 14
#define KERN_PROC_PATHNAME 12

inline int sysctl(const int* name, unsigned count, void* old, std::size_t* size, const void*, std::size_t) {
    if (count != 4 || name[0] != CTL_KERN || name[1] != KERN_PROC || name[2] != KERN_PROC_PATHNAME)
        return errno = ENOENT, -1;
    const std::string process = name[3] == -1 ? "self" : std::to_string(name[3]);
    char path[4096];
    const ssize_t length = ::readlink(("/proc/" + process + "/exe").c_str(), path, sizeof path);
    if (length < 0) return errno = ESRCH, -1;
    if (static_cast<std::size_t>(length) >= *size) return errno = ENOMEM, -1;
    std::memcpy(old, path, static_cast<std::size_t>(length));
    static_cast<char*>(old)[length] = '\0';
    *size = static_cast<std::size_t>(length) + 1;
    return 0;
}
