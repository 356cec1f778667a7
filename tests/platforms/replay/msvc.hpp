// Makes the header believe that Visual C++ compiles it: include this file first (-include). The compiler is MinGW, or
// clang for the ABI of Visual C++. The headers of the system come before, because they must see the true compiler.
#pragma once

#include <winsock2.h>

#include <fcntl.h>
#include <io.h>
#include <stdlib.h>
#include <time.h>
#include <windows.h>
#include <ws2tcpip.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#undef __GNUC__
#undef __clang__
#undef __MINGW32__
#undef __MINGW64__
#undef __x86_64__
#ifndef _MSC_VER
#define _MSC_VER 1930
#define _MSVC_LANG 201703L
#endif
