#!/bin/sh
# sh tests/coverage.sh
#
# Measures the coverage of wschat.hpp with clang's source-based coverage and all optional features. Runs each suite with
# epoll, the polling suites again with WSCHAT_TEST_POLLER=poll, the TLS suites with WSCHAT_TEST_TLS=1, the fault tests,
# and the examples that these tests start. Prints lines that never ran, conditions with only one outcome, and the
# percentages. Writes everything below build/coverage, and installs missing packages (as root, on Debian).
#
# A line, or an outcome of a condition, counts once for all instances of a template or an inline function. Lines that
# the preprocessor removes and conditions that are compile-time constants do not count.
set -u
cd "$(dirname "$0")/.." || exit 1

out=build/coverage
die() {
    echo "coverage.sh: $*"
    exit 1
}
# quietly LOG COMMAND...: prints the output only if the command fails
quietly() {
    log=$out/$1
    shift
    "$@" >"$log" 2>&1 </dev/null || { tail -n 60 "$log"; die "failed: $*"; }
}

mkdir -p $out
missing=
# need PACKAGE COMMAND...: adds PACKAGE to the missing ones if COMMAND fails
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
profiles() { ls "$(clang++ -print-resource-dir)"/lib/*/libclang_rt.profile*; }
header() { echo "#include <$1>" | clang++ -E -x c++ -; }
need clang command -v clang++
need llvm command -v llvm-cov
need libclang-rt-dev profiles
need cmake command -v cmake
need ninja-build command -v ninja
need pkg-config command -v pkg-config
need doctest-dev header doctest/doctest.h
need zlib1g-dev header zlib.h
need libssl-dev header openssl/ssl.h
need liburing-dev header liburing.h
need libsqlite3-dev header sqlite3.h
need libhiredis-dev header hiredis/async.h
need redis-server command -v redis-server
if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "missing Debian packages:$missing"
    # shellcheck disable=SC2086
    quietly install.log env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 $missing
fi

# ---- build and run ------------------------------------------------------------------------------------------------

echo "== build"
# Relocated counters live in a mapped file, so processes that are killed count as well.
quietly configure.log cmake -S . -B $out -G Ninja -DCMAKE_BUILD_TYPE= -DCMAKE_CXX_COMPILER=clang++ \
    -DWSCHAT_ZLIB=ON -DWSCHAT_OPENSSL=ON -DWSCHAT_SQLITE=ON -DWSCHAT_LIBURING=ON -DWSCHAT_HIREDIS=ON -DWSCHAT_TEST_UNITS=2 \
    -DCMAKE_CXX_FLAGS="-O0 -DNDEBUG -fprofile-instr-generate -fcoverage-mapping -mllvm -runtime-counter-relocation"
quietly build.log cmake --build $out -j 2 --target wschat_tests wschat_faults

tests=$out/tests/wschat_tests
faults=$out/tests/wschat_faults
# run NAME [VARIABLE=VALUE] COMMAND...: all processes add to one profile per program
run() {
    echo "== $1"
    name=$1
    shift
    quietly "$name.log" env "LLVM_PROFILE_FILE=$PWD/$out/profiles/%c%m.profraw" "$@"
    grep -E 'test cases:' "$out/$name.log"
}
# suites_of LIST: the suites of a list in tests/CMakeLists.txt, separated by commas for doctest
suites_of() { sed -n "s/^set($1 \([a-z ]*\)).*/\1/p" tests/CMakeLists.txt | tr ' ' ','; }
rm -rf $out/profiles
unset WSCHAT_TEST_POLLER WSCHAT_TEST_TLS
run epoll $tests
run poll WSCHAT_TEST_POLLER=poll $tests "--test-suite=$(suites_of suites_poll)"
run tls WSCHAT_TEST_TLS=1 $tests "--test-suite=$(suites_of suites_over_tls)"
run faults $faults
run faults-poll WSCHAT_TEST_POLLER=poll $faults

# ---- report -------------------------------------------------------------------------------------------------------

llvm-profdata merge -o $out/all.profdata $out/profiles/*.profraw || die "no profile"
export_as() {
    llvm-cov export -format="$1" -instr-profile=$out/all.profdata $tests -object $faults wschat.hpp 2>$out/export.log
}
export_as lcov >$out/lines.info && export_as text >$out/branches.json || die "llvm-cov: $(cat $out/export.log)"

python3 - $out/lines.info $out/branches.json <<'END'
import json
import sys

source = [''] + open('wschat.hpp').read().split('\n')

counts = {}  # executions per line
for record in open(sys.argv[1]):
    if record.startswith('DA:'):
        line, count = record[3:].split(',')[:2]
        counts[int(line)] = counts.get(int(line), 0) + int(count)

outcomes = {}  # place -> [times true, times false], for all instances
for file in json.load(open(sys.argv[2]))['data'][0]['files']:
    for line, column, end_line, end_column, yes, no, *_ in file['branches']:
        seen = outcomes.setdefault((line, column, end_line, end_column), [0, 0])
        seen[0] += yes
        seen[1] += no

print('== lines that never ran')
missed = sorted(line for line in counts if counts[line] == 0)
for line in missed:
    print('%5d  %s' % (line, source[line]))

print('== conditions with only one outcome')
for (line, column, end_line, end_column), (yes, no) in sorted(outcomes.items()):
    if counts.get(line, 0) and (yes == 0) != (no == 0):
        text = source[line][column - 1:end_column - 1] if line == end_line else source[line][column - 1:] + ' ...'
        if text == ':':
            text = source[line].strip()
        print('%5d  never %s: %s' % (line, 'false' if yes else 'true', text))

covered = sum((yes > 0) + (no > 0) for yes, no in outcomes.values())
print('== wschat.hpp: %.1f%% of %d lines, %.1f%% of %d branches' %
      (100 * (1 - len(missed) / len(counts)), len(counts), 100 * covered / (2 * len(outcomes)), 2 * len(outcomes)))
END
