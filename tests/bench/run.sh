#!/bin/sh
# sh tests/bench/run.sh [quick|full|micro] [only=NAME,...] [work=PREFIX,...] [rounds=N] [peers=N] [seconds=S]
#
# Builds the load generator, the floor, wschat's bench_server and the peers into build/bench. Runs every server on every
# workload in interleaved rounds (server on CPU 0, load on CPU 1). Writes bench.txt (also printed), bench.svg and
# bench.json there. tests/bench/README.md explains the figures.
#
#   quick     one second per run, two rounds, the main workloads, and only wschat, the floor and two peers
#   full      two seconds per run, seven rounds (the default is 1.5 seconds, three rounds)
#   micro     only GB/s of unmasking, UTF-8 validation and frames, compared with memcpy, by Google Benchmark
#   only=     some of: floor wschat wschat-uring beast websocketpp libwebsockets libwebsockets-ev gorilla ws tornado
#   peers=    number of rounds with the peers; a few are enough, because the peers differ much
#   work=     workloads of the list below, or prefixes of their names: work=fanout,echo-4

# Word splitting is intended. ulimit -n exists on all Linux shells.

set -u
cd "$(dirname "$0")/../.." || exit 1
bench=tests/bench
out=build/bench

peers="beast websocketpp libwebsockets libwebsockets-ev gorilla ws tornado"
only="floor wschat wschat-uring $peers"
rounds=3
peer_rounds=""
seconds=1.5
selected=""
quick=0
micro=0

# Name, server mode and arguments of bench_load, in the order of the tables.
work_list() {
    cat <<'LIST'
fanout-10-64     room --mode fanout --members 10 --size 64
fanout-200-64    room --mode fanout --members 200 --size 64
fanout-2000-64   room --mode fanout --members 2000 --size 64
fanout-8000-64   room --mode fanout --members 8000 --size 64
fanout-10-1k     room --mode fanout --members 10 --size 1024
fanout-200-1k    room --mode fanout --members 200 --size 1024
fanout-2000-1k   room --mode fanout --members 2000 --size 1024
fanout-8000-1k   room --mode fanout --members 8000 --size 1024
rate-200-64      room --mode fanout-rate --members 200 --size 64
rate-2000-64     room --mode fanout-rate --members 2000 --size 64
rate-200-16k     room --mode fanout-rate --members 200 --size 16384
stalled-200-16k  room --mode fanout-rate --members 200 --size 16384 --stalled 0.05
echo-200-64      echo --mode echo --members 200 --size 64
echo-50-16k      echo --mode echo --members 50 --size 16384
echo-4-1m        echo --mode echo --members 4 --size 1048576
echo-4-1m-mixed  echo --mode echo --members 4 --size 1048576 --filler mixed
idle-10000       room --mode idle --members 10000
active-10        echo --mode ping-idle --members 11
active-10000     echo --mode ping-idle --members 10001
connect          echo --mode connect
deflate-1000-1k        deflate --mode deflate --members 1000 --size 1024
deflate-1000-16k       deflate --mode deflate --members 1000 --size 16384
deflate-1000-1k-keep   deflate --mode deflate --members 1000 --size 1024 --takeover yes
LIST
}
quick_work="fanout-200-64 fanout-2000-64 rate-200-64 echo-200-64 echo-50-16k echo-4-1m idle-10000 active-10 connect compile"

say() { printf '%s\n' "$*" >&2; }

die() { say "run.sh: $*"; exit 1; }

for argument in "$@"; do
    value=$(printf '%s' "${argument#*=}" | tr ',' ' ')
    case $argument in
        quick) quick=1 rounds=2 seconds=1 only="floor wschat wschat-uring websocketpp libwebsockets" selected=$quick_work ;;
        full) rounds=7 seconds=2 ;;
        micro) micro=1 ;;
        only=?*) only=$value ;;
        work=?*) selected=$value quick=0 ;;
        rounds=[1-9]*) rounds=$value ;;
        peers=[0-9]*) peer_rounds=$value ;;
        seconds=?*) seconds=$value ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p' "$bench/run.sh" >&2; die "invalid argument: $argument" ;;
    esac
done

is_selected() { # is_selected WORK
    [ -z "$selected" ] && return 0
    for each in $selected; do
        [ "$1" = "$each" ] && return 0
        [ "$quick" = 1 ] && continue
        case $1 in "$each"*) return 0 ;; esac
    done
    return 1
}

# ---- install and build --------------------------------------------------------------------------------------------

install_packages() { # install_packages PACKAGE...
    command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 1
    say "installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" \
        >"$out/install.log" 2>&1
}

# need TEST PACKAGE...: installs the packages if TEST (a path or a command) does not exist
need() {
    test=$1
    shift
    present "$test" || { install_packages "$@" && present "$test"; } || { say "missing: $* (no $test)"; return 1; }
}
present() { case $1 in /*) [ -e "$1" ] ;; *) command -v "$1" >/dev/null ;; esac; }

# build NAME SOURCE... -- COMMAND...: runs the command if the result is missing or older than a source
build() {
    name=$1 fresh=1
    shift
    [ -e "$out/$name" ] || fresh=0
    while [ "$1" != -- ]; do
        [ -e "$1" ] || return 1
        [ "$fresh" = 0 ] || [ -z "$(find "$1" -newer "$out/$name")" ] || fresh=0
        shift
    done
    shift
    [ "$fresh" = 1 ] && return 0
    say "building $name"
    "$@" >"$out/$name.log" 2>&1 && return 0
    rm -f "$out/$name"
    return 1
}

cxx="${CXX:-g++} -std=c++17 -O2 -DNDEBUG"

build_ws() {
    need node nodejs && need npm npm || return 1
    mkdir -p "$out/node" && cp $bench/peers/package.json $bench/peers/ws_server.mjs "$out/node/" || return 1
    [ -d "$out/node/node_modules/ws" ] && [ -z "$(find $bench/peers/package.json -newer "$out/node/node_modules/ws")" ] && return 0
    (cd "$out/node" && npm install --no-package-lock --no-audit --no-fund --no-update-notifier) >"$out/ws.log" 2>&1
}

build_server() { # build_server NAME
    p=$bench/peers
    case $1 in
        floor) build floor $bench/floor.cpp -- $cxx $bench/floor.cpp -o $out/floor ;;
        wschat) build wschat $bench/server.cpp wschat.hpp -- $cxx -I. $bench/server.cpp -o $out/wschat -pthread &&
            need /usr/include/zlib.h zlib1g-dev && build wschat-deflate $bench/server.cpp wschat.hpp -- \
            $cxx -DWSCHAT_ZLIB=1 -I. $bench/server.cpp -o $out/wschat-deflate -pthread -lz ;;
        wschat-uring) need /usr/include/liburing.h liburing-dev &&
            build wschat-uring $bench/server.cpp wschat.hpp -- \
                $cxx -DWSCHAT_LIBURING=1 -I. $bench/server.cpp -o $out/wschat-uring -pthread -luring ;;
        beast) need /usr/include/boost/beast.hpp libboost-dev &&
            build beast $p/beast.cpp -- $cxx $p/beast.cpp -o $out/beast -pthread ;;
        websocketpp) need /usr/include/websocketpp/server.hpp libwebsocketpp-dev libboost-dev &&
            build websocketpp $p/websocketpp.cpp -- $cxx $p/websocketpp.cpp -o $out/websocketpp -pthread ;;
        libwebsockets*) need /usr/include/libwebsockets.h libwebsockets-dev &&
            build libwebsockets $p/libwebsockets.c -- ${CC:-gcc} -O2 -DNDEBUG $p/libwebsockets.c -o $out/libwebsockets -lwebsockets ;;
        gorilla) need go golang-go && need /usr/share/gocode/src/github.com/gorilla/websocket golang-github-gorilla-websocket-dev &&
            build gorilla $p/gorilla.go -- env GO111MODULE=off GOPATH=/usr/share/gocode go build -o $out/gorilla $p/gorilla.go ;;
        ws) build_ws ;;
        tornado) need /usr/lib/python3/dist-packages/tornado python3-tornado ;;
        *) die "only=$1: unknown server" ;;
    esac
}

command_of() { # command_of NAME PORT MODE
    case $1 in
        wschat) [ "$3" = deflate ] && echo "$out/wschat-deflate $2 $3" || echo "$out/wschat $2 $3" ;;
        libwebsockets-ev) echo "$out/libwebsockets $2 $3 ev" ;;
        gorilla) echo "env GOMAXPROCS=1 $out/gorilla $2 $3" ;;
        ws) echo "node $out/node/ws_server.mjs $2 $3" ;;
        tornado) echo "/usr/bin/python3 $bench/peers/tornado_server.py $2 $3" ;;
        *) echo "$out/$1 $2 $3" ;;
    esac
}

# Only these servers have the mode `deflate`.
supports() { # supports NAME MODE
    case $2 in deflate) case $1 in wschat | ws | tornado) ;; *) return 1 ;; esac ;; esac
}

# ---- run ----------------------------------------------------------------------------------------------------------

server_pid=""

stop_server() {
    [ -n "$server_pid" ] || return 0
    kill -TERM "$server_pid" 2>/dev/null
    tries=0
    while kill -0 "$server_pid" 2>/dev/null && [ $tries -lt 100 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    kill -KILL "$server_pid" 2>/dev/null
    wait "$server_pid" 2>/dev/null
    server_pid=""
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

port=$((20000 + $$ % 6000))

start_server() { # start_server NAME MODE: waits for the line that says that it is ready
    port=$((port + 1))
    : >"$out/server.out"
    # shellcheck disable=SC2046
    taskset -c 0 $(command_of "$1" $port "$2") >"$out/server.out" 2>"$out/server.err" &
    server_pid=$!
    tries=0
    while [ ! -s "$out/server.out" ]; do
        kill -0 "$server_pid" 2>/dev/null || { server_pid=""; return 1; }
        [ $tries -lt 600 ] || return 1
        sleep 0.05
        tries=$((tries + 1))
    done
}

# The first line of a file, made safe for a JSON string.
first_line() { head -n 1 "$1" | tr -d '"\\' | tr -d '\000-\037' | cut -c1-200; }

row() { # row ROUND SERVER WORK JSON: JSON without its opening brace
    printf '{"round":%s,"server":"%s","work":"%s",%s\n' "$1" "$2" "$3" "$4" >>"$out/raw.jsonl"
}

run_load() { # run_load ARGUMENT...: prints its JSON without the opening brace, or an error
    if taskset -c 1 "$out/load" --port $port --pid "$server_pid" --seconds "$seconds" "$@" >"$out/load.out" 2>"$out/load.err"
    then line=$(cat "$out/load.out") && echo "${line#?}"
    else echo "\"error\":\"$(first_line "$out/load.err")\"}"
    fi
}

run_once() { # run_once ROUND SERVER WORK MODE ARGUMENT...
    head="$1 $2 $3" mode=$4
    start=$(printf '%-3s %-18s %-17s' "$1" "$3" "$2")
    if start_server "$2" "$mode"
    then shift 4 && result=$(run_load "$@")
    else result="\"error\":\"does not start: $(first_line "$out/server.err")\"}"
    fi
    stop_server
    row $head "$result"
    say "$start $(summary "$result")"
}

summary() { # summary JSON: the main figures of a row, for the terminal
    case $1 in
        \"error*) printf '%s' "$1" ;;
        *) printf '%s' "$1" | tr ',' '\n' | sed -n 's/"//g; s/^\(server_cpu_us\|p99_us\|rss_bytes_each\|limited_by\):/\1 /p' | tr '\n' ' ' ;;
    esac
}

# set_rate MEMBERS SIZE: sets `rate` to half of the floor's maximum with one message per turn. It computes the rate
# from the CPU time per delivery with one sender.
set_rate() {
    file=$out/rate-$1-$2
    if [ ! -s "$file" ]; then
        start_server floor room || die "the floor does not start: $(first_line "$out/server.err")"
        taskset -c 1 "$out/load" --port $port --pid "$server_pid" --mode fanout --senders 1 --seconds 1 --members "$1" \
            --size "$2" >"$out/load.out" 2>"$out/load.err" || die "$(first_line "$out/load.err")"
        stop_server
        /usr/bin/python3 $bench/report.py rate "$out/load.out" >"$file" || die "no rate for $1 members"
        say "rate for $1 members, $2 bytes: $(cat "$file") messages per second"
    fi
    rate=$(cat "$file")
}

option() { # option NAME ARGUMENT...: prints the value of an option
    name=$1
    shift
    while [ $# -gt 1 ]; do
        [ "$1" = "$name" ] && { echo "$2"; return; }
        shift
    done
}

compile_row() { # compile_row ROUND SERVER SOURCE
    for flags in -fsyntax-only "-O2 -c -o $out/compile.o"; do
        work=compile${flags%% *}
        [ "$work" = compile-fsyntax-only ] && work=compile-syntax
            if spent=$(/usr/bin/python3 $bench/report.py cpu taskset -c 0 ${CXX:-g++} -std=c++17 $flags -I. "$3" 2>"$out/compile.err")
        then row "$1" "$2" "$work" "\"mode\":\"compile\",\"cpu_seconds\":$spent}"
        else row "$1" "$2" "$work" "\"error\":\"$(first_line "$out/compile.err")\"}"
        fi
    done
    say "$(printf '%-3s %-18s %s' "$1" compile "$2")"
}

compile_round() { # compile_round ROUND
    : >"$out/empty.cpp"
    compile_row "$1" floor "$out/empty.cpp"
    for server in $(in_round "$1"); do
        case $server in
            wschat) [ -e examples/chat.cpp ] && compile_row "$1" wschat examples/chat.cpp ;;
            beast | websocketpp) compile_row "$1" "$server" $bench/peers/"$server".cpp ;;
        esac
    done
}

in_round() { # in_round ROUND: prints the servers of a round
    for each in $only; do
        case $each in floor | wschat*) ;; *) [ "$1" -le "${peer_rounds:-$rounds}" ] || continue ;; esac
        echo "$each"
    done
}

run_round() { # run_round ROUND
    while read -r work mode arguments; do
        is_selected "$work" || continue
        case $work in rate-* | stalled-*)
            set_rate "$(option --members $arguments)" "$(option --size $arguments)"
            arguments="$arguments --rate $rate" ;;
        esac
        for server in $(in_round "$1"); do
            supports "$server" "$mode" || continue
            run_once "$1" "$server" "$work" "$mode" $arguments </dev/null
        done
    done <"$out/work"
    is_selected compile && compile_round "$1"
}

mkdir -p "$out" || exit 1
[ "$(nproc)" -ge 2 ] || die "two CPUs are required: one for the server, one for the load"
need taskset util-linux || exit 1
if [ "$micro" = 1 ]; then
    need /usr/include/benchmark/benchmark.h libbenchmark-dev &&
        build micro $bench/micro.cpp wschat.hpp -- $cxx $bench/micro.cpp -o $out/micro -lbenchmark -pthread ||
        { cat $out/micro.log >&2; die "micro does not compile"; }
    exec taskset -c 1 $out/micro --benchmark_counters_tabular=true
fi
rm -f "$out"/rate-* "$out/raw.jsonl"
work_list >"$out/work"
need /usr/bin/python3 python3 || exit 1
ulimit -n "$(ulimit -Hn)"

build load $bench/load.cpp -- $cxx $bench/load.cpp -o $out/load || { cat $out/load.log >&2; die "bench_load does not compile"; }
build_server floor || { cat $out/floor.log >&2; die "the floor does not compile"; }
ready=""
for server in $only; do
    if build_server "$server"; then ready="$ready $server"
    elif [ "$server" = wschat ]; then say "wschat: skipped, because $bench/server.cpp does not compile ($out/wschat.log)"
    else say "$server: skipped, because it is not available or does not compile ($out/$server.log)"
    fi
done
only=$ready

round=1
while [ $round -le "$rounds" ]; do
    run_round $round
    round=$((round + 1))
done
/usr/bin/python3 $bench/report.py table "$out"
