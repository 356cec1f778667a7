#!/bin/sh
# sh tests/soak.sh MINUTES [connections=N] [churn=N] [asan]
#
# Thousands of members join and leave in many ways for MINUTES, and some do not read (see tests/soak/load.cpp). Builds
# into build/soak, prints a line every ten seconds, and at the end PASS, or FAIL and what failed. The status is 0 or 1.
#
#   connections=8000   concurrent connections
#   churn=200          new connections per second, and as many that leave (default: a fortieth of the connections)
#   asan               builds the server with AddressSanitizer and UndefinedBehaviorSanitizer; memory is not checked
#
# With WSCHAT_TEST_POLLER=poll the server uses poll().

# ulimit -n exists on all Linux shells.
# shellcheck disable=SC3045
set -u
cd "$(dirname "$0")/.." || exit 1

die() {
    echo "FAIL: soak.sh: $*"
    exit 1
}

minutes=${1-}
case $minutes in
'' | *[!0-9.]*) sed -n '2,/^$/s/^# \{0,1\}//p' tests/soak.sh && exit 2 ;;
esac
shift
out=build/soak connections=8000 options='' flags='-O2 -DNDEBUG'
for argument in "$@"; do
    case $argument in
    connections=[1-9]*) connections=${argument#*=} options="$options $argument" ;;
    churn=[1-9]*) options="$options $argument" ;;
    asan)
        out=build/soak/asan options="$options rss=0"
        flags='-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all' ;;
    *) die "invalid argument: $argument" ;;
    esac
done

# ---- build --------------------------------------------------------------------------------------------------------

# build NAME FLAGS SOURCE...: compiles the first source if the program is older than any source
build() {
    program=$out/$1 program_flags=$2 main=$3
    shift 2
    [ -e "$program" ] && [ -z "$(find "$@" -newer "$program")" ] && return 0
    # shellcheck disable=SC2086
    ${CXX:-g++} -std=c++17 $program_flags "$main" -o "$program" -pthread || die "$main does not compile"
}
mkdir -p $out
build load '-O2' tests/soak/load.cpp tests/bench/load_support.hpp
build server "$flags" tests/soak/server.cpp wschat.hpp

# ---- run ----------------------------------------------------------------------------------------------------------

needed=$((connections + connections / 4 + 500))
if [ "$(ulimit -n)" != unlimited ] && [ "$(ulimit -n)" -lt $needed ]; then
    ulimit -n $needed || die "$needed descriptors are required, but only $(ulimit -Hn) are allowed; use a smaller connections=N"
fi

$out/server 0 >$out/server.out 2>$out/server.err &
server=$!
trap 'kill $server 2>/dev/null' EXIT
trap 'exit 1' INT TERM
tries=0
until port=$(sed -n 's/^soak_server: //p' $out/server.out) && [ -n "$port" ]; do
    tries=$((tries + 1))
    [ $tries -le 600 ] && kill -0 $server 2>/dev/null || die "the server did not start: $(cat $out/server.err)"
    sleep 0.1
done

# shellcheck disable=SC2086
$out/load port="$port" pid=$server minutes="$minutes" $options
failed=$?
kill -TERM $server 2>/dev/null
wait $server
status=$?
trap - EXIT
[ $status = 0 ] || { failed=1 && echo "FAIL: the server ended with status $status instead of 0"; }
[ ! -s $out/server.err ] || { failed=1 && echo "FAIL: the server logged warnings:" && head -n 60 $out/server.err; }
[ $failed = 0 ] || exit 1
echo PASS
