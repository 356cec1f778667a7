#!/bin/sh
# Runs suites under ThreadSanitizer with several loops for each server, one suite after the other.
#
#   tests/loops.sh [SUITE...]    a suite is a file tests/SUITE_test.cpp; without one, all that use servers
#
# WSCHAT_TEST_THREADS is the number of loops (3). All output is below build/loops. Each suite takes a minute or two to
# compile; tests/run.sh has only those that are in its build with ThreadSanitizer anyway. Needs clang++ and the packages of
# tests/run.sh.
set -u
cd "$(dirname "$0")/.." || exit 1

suites="handler rooms loop tls compression server server_loops server_pages server_requests server_policies server_limits
  server_poll server_streams server_turns server_edges handler_memory limits threads client chat stores cluster"
out=build/loops
flags="-std=c++17 -O0 -g1 -fsanitize=thread -DWSCHAT_ZLIB=1 -DWSCHAT_OPENSSL=1 -DWSCHAT_SQLITE=1 -DWSCHAT_HIREDIS=1"
export WSCHAT_TEST_THREADS="${WSCHAT_TEST_THREADS-3}"
status=0
mkdir -p $out
[ $# = 0 ] || suites=$*

# Word splitting is intended.
clang++ $flags -c tests/main.cpp -o $out/main.o || exit 1
for suite in $suites; do
    if ! clang++ $flags "tests/${suite}_test.cpp" $out/main.o -o "$out/$suite" -pthread -lz -lssl -lcrypto -lsqlite3 \
        -lhiredis >"$out/$suite.log" 2>&1; then
        echo "$suite: does not compile, see $out/$suite.log"
        status=1
        continue
    fi
    # A test that forks inherits the reports of the tests before it. So each test has a process of its own.
    "$out/$suite" --list-test-cases --no-version | sed '/^\[doctest\]/d; /^=*$/d' >"$out/$suite.cases"
    failed=0 count=0
    while IFS= read -r title; do
        count=$((count + 1))
        # The filter of doctest has a comma between two patterns, and a backslash before a comma of a title.
        timeout 900 "$out/$suite" --test-case="$(printf '%s' "$title" | sed 's/[\\,]/\\&/g')" </dev/null \
            >"$out/$suite.case" 2>&1 && continue
        failed=$((failed + 1))
        echo "$suite: failed: $title"
        cat "$out/$suite.case" >>"$out/$suite.log"
    done <"$out/$suite.cases"
    echo "$suite: $count tests, $failed failed"
    [ $failed = 0 ] || status=1
done
exit $status
