#!/bin/sh
# Runs suites under ThreadSanitizer with several loops for each server.
#
#   tests/loops.sh [SUITE...]    a suite is a name in TEST_SUITE("..."); without one, all suites that use servers
#
# WSCHAT_TEST_THREADS is the number of loops (3). All output is below build/loops. tests/run.sh runs some of these suites in
# this way, too. Needs clang++ and the packages of tests/run.sh.
set -u
cd "$(dirname "$0")/.." || exit 1

suites="handler rooms loop tls compression server limits threads client chat stores cluster"
out=$PWD/build/loops
flags="-std=c++17 -O0 -g1 -fsanitize=thread -DWSCHAT_ZLIB=1 -DWSCHAT_OPENSSL=1 -DWSCHAT_SQLITE=1 -DWSCHAT_HIREDIS=1"
export WSCHAT_TEST_THREADS="${WSCHAT_TEST_THREADS-3}"
status=0
[ $# = 0 ] || suites=$*
mkdir -p "$out"
rm -f "$out"/*.o

# Word splitting is intended.
{
    echo "$PWD/tests/main.cpp"
    sh tests/scripts/unity.sh "$out" 2 $suites
} | xargs -P 2 -I{} sh -c 'file=$1; shift; exec clang++ "$@" -c "$file" -o "$0/$(basename "$file" .cpp).o"' "$out" {} \
    $flags -I. -Itests &&
    clang++ $flags "$out"/*.o -o "$out/tests" -pthread -lz -lssl -lcrypto -lsqlite3 -lhiredis || exit 1

for suite in $suites; do
    # A test that forks inherits the reports of the tests before it. So each test has a process of its own.
    "$out/tests" --list-test-cases --no-version --test-suite="$suite" | sed '/^\[doctest\]/d; /^=*$/d' >"$out/cases"
    failed=0 count=0
    : >"$out/$suite.log"
    while IFS= read -r title; do
        count=$((count + 1))
        # The filter of doctest has a comma between two patterns, and a backslash before a comma of a title.
        timeout 900 "$out/tests" --test-case="$(printf '%s' "$title" | sed 's/[\\,]/\\&/g')" </dev/null \
            >"$out/case.log" 2>&1 && continue
        failed=$((failed + 1))
        echo "$suite: failed: $title"
        cat "$out/case.log" >>"$out/$suite.log"
    done <"$out/cases"
    echo "$suite: $count tests, $failed failed"
    [ $failed = 0 ] && [ $count != 0 ] || status=1
done
exit $status
