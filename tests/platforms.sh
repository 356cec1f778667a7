#!/bin/sh
# Builds and runs what can run of other platforms on this machine (Debian, as root), and prints a table. The headers of
# doctest stand alone in a private folder, because /usr/include breaks a cross build.
#
#   tests/platforms.sh              all targets
#   tests/platforms.sh TARGET...    mingw mingw-unicode m32 g++-11 clang-newest libc++ c++20 c++23 funsigned-char
#                                   glibcxx-debug fortify lto native s390x aarch64 armhf
#   tests/platforms.sh quick        mingw, mingw-unicode, m32
#
# A target whose packages cannot be installed, or would remove others, is SKIPPED with the reason.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
work=$root/build/platforms
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wold-style-cast -Wundef -Wnon-virtual-dtor -Werror"
suites="vocabulary bytes frames http protocol sockets loop rooms"
# A foreign CPU is emulated, so it runs the suites without descriptor limits and child processes.
emulated="vocabulary bytes frames http protocol rooms"
table=$work/table
failures=0
mkdir -p "$work/include/doctest"
: >"$table"

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

# suites TARGET RUNNER SUITES COMPILER OPTION...: compiles the suites and runs each one
suites() {
    target=$1 runner=$2 list=$3
    shift 3
    passed=0 failed=0
    sources=tests/main.cpp
    for suite in $list; do sources="$sources tests/${suite}_test.cpp"; done
    if ! "$@" $sources -Itests -isystem "$work/include" -o "$work/$target" -pthread >"$work/$target.log" 2>&1; then
        tail -n 20 "$work/$target.log"
        failures=$((failures + 1))
        row "$target" FAILED - - - "$work/$target.log"
        return
    fi
    for suite in $list; do
        timeout 600 $runner "$work/$target" -ts="$suite" >"$work/$target.$suite.log" 2>&1 || tail -n 20 "$work/$target.$suite.log"
        counts=$(sed -n 's/.*test cases: *\([0-9]*\) | *\([0-9]*\) passed | *\([0-9]*\) failed.*/\2 \3/p' "$work/$target.$suite.log")
        counts=${counts:-0 1}
        passed=$((passed + ${counts% *}))
        failed=$((failed + ${counts#* }))
    done
    failures=$((failures + failed))
    row "$target" yes "$(echo $list | wc -w)" $passed $failed ""
}

# mingw TARGET OPTION...: all of the header, and the program of tests/platforms under Wine
mingw() {
    target=$1
    shift
    packages "$target" g++-mingw-w64-x86-64-posix wine wine64 || return
    if ! x86_64-w64-mingw32-g++-posix -std=c++17 -O0 $warnings -DWSCHAT_CHAT=1 "$@" tests/platforms/windows_test.cpp \
        -o "$work/$target.exe" -static -lws2_32 >"$work/$target.log" 2>&1; then
        tail -n 20 "$work/$target.log"
        failures=$((failures + 1))
        row "$target" FAILED - - - "$work/$target.log"
        return
    fi
    WINEDEBUG=-all WINEPREFIX=$work/wine timeout 300 wine "$work/$target.exe" "$work/windows_files" >"$work/$target.run.log" 2>&1
    passed=$(grep -c "^passed" "$work/$target.run.log")
    failed=$(grep -c "^FAILED" "$work/$target.run.log")
    grep -q "^0 failed" "$work/$target.run.log" || failed=$((failed + 1))
    test $failed = 0 || grep -v "^passed" "$work/$target.run.log"
    failures=$((failures + failed))
    row "$target" yes program $passed $failed "under Wine"
}

# cross TARGET TRIPLET QEMU
cross() {
    packages "$1" "g++-$2" qemu-user || return
    suites "$1" "$3" "$emulated" "$2-g++" -std=c++17 -O1 $warnings -static
}

run() {
    case $1 in
    mingw) mingw mingw ;;
    mingw-unicode) mingw mingw-unicode -DUNICODE -D_UNICODE ;;
    m32)
        packages m32 g++-i686-linux-gnu || return
        suites m32 "" "bytes frames" i686-linux-gnu-g++ -std=c++17 -O0 $warnings -static -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64
        ;;
    g++-11) packages "$1" g++-11 && suites "$1" "" "$suites" g++-11 -std=c++17 -O1 $warnings ;;
    clang-newest)
        newest=$(apt-cache pkgnames clang- | sed -n 's/^clang-\([0-9]*\)$/\1/p' | sort -n | tail -1)
        packages "$1" "clang-$newest" && suites "$1" "" "$suites" "clang++-$newest" -std=c++17 -O1 $warnings
        ;;
    libc++)
        packages "$1" clang-14 libc++-14-dev libc++abi-14-dev || return
        suites "$1" "" "$suites" clang++-14 -stdlib=libc++ -std=c++17 -O1 $warnings
        ;;
    c++20) suites "$1" "" "$suites" g++ -std=c++20 -O1 $warnings ;;
    c++23) suites "$1" "" "$suites" g++ -std=c++23 -O1 $warnings ;;
    funsigned-char) suites "$1" "" "$suites" g++ -std=c++17 -O1 $warnings -funsigned-char ;;
    glibcxx-debug) suites "$1" "" "$suites" g++ -std=c++17 -O1 $warnings -D_GLIBCXX_DEBUG ;;
    fortify) suites "$1" "" "$suites" g++ -std=c++17 -O2 $warnings -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 ;;
    lto) suites "$1" "" "$suites" g++ -std=c++17 -O2 $warnings -flto ;;
    native) suites "$1" "" "$suites" g++ -std=c++17 -O3 $warnings -march=native ;;
    s390x) cross s390x s390x-linux-gnu qemu-s390x ;;
    aarch64) cross aarch64 aarch64-linux-gnu qemu-aarch64 ;;
    armhf) cross armhf arm-linux-gnueabihf qemu-arm ;;
    *) echo "tests/platforms.sh: unknown target '$1'" && exit 2 ;;
    esac
}

packages doctest doctest-dev || exit 1
cp /usr/include/doctest/doctest.h "$work/include/doctest/"
test $# != 0 || set -- mingw mingw-unicode m32 g++-11 clang-newest libc++ c++20 c++23 funsigned-char glibcxx-debug \
    fortify lto native s390x aarch64 armhf
test "$*" != quick || set -- mingw mingw-unicode m32
for target; do run "$target"; done
echo
printf '%-15s %-9s %-7s %-7s %-7s %s\n' target compiles suites passed failed notes
cat "$table"
test $failures = 0
