#!/bin/sh
# sh tests/bench/clients/run.sh [rounds=N] [seconds=S] [only=NAME,...]
#
# Builds the clients of this folder and wschat's bench_server into build/bench, and runs every client on every workload
# in interleaved rounds (server on CPU 0, client on CPU 1). Prints a table: the median CPU time of the client for each
# message, and its ratio to that of wschat. A client that cannot be built is skipped.
set -u
cd "$(dirname "$0")/../../.." || exit 1
source=tests/bench/clients
out=build/bench
rounds=3
seconds=1
only="wschat libwebsockets beast websocketpp"
for argument in "$@"; do
    value=$(printf '%s' "${argument#*=}" | tr ',' ' ')
    case $argument in
        rounds=[1-9]*) rounds=$value ;;
        seconds=?*) seconds=$value ;;
        only=?*) only=$value ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
    esac
done
mkdir -p $out || exit 1

cxx="${CXX:-g++} -std=c++17 -O2 -DNDEBUG"
$cxx tests/bench/server.cpp -o $out/echo_server -pthread || exit 1
ready=
for name in $only; do
    case $name in
        libwebsockets) ${CC:-gcc} -O2 -DNDEBUG $source/$name.c -o $out/client_$name -lwebsockets ;;
        *) $cxx $source/$name.cpp -o $out/client_$name -pthread ;;
    esac 2>$out/client_$name.log && ready="$ready $name" && continue
    echo "$name: skipped, because it does not compile ($out/client_$name.log)" >&2
done

port=$((26000 + $$ % 3000))
taskset -c 0 $out/echo_server $port echo >$out/echo_server.out &
server=$!
trap 'kill $server' EXIT
trap 'exit 130' INT TERM
tries=0
until [ -s $out/echo_server.out ]; do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || exit 1
    sleep 0.05
done

: >$out/clients.txt
round=0
while [ $round -lt "$rounds" ]; do
    for work in "200 64" "50 16384" "4 1048576"; do
        for name in $ready; do
            # shellcheck disable=SC2086
            figure=$(taskset -c 1 $out/client_$name $port $work "$seconds") || figure="failed"
            echo "$work $name $figure" | tee -a $out/clients.txt >&2
        done
    done
    round=$((round + 1))
done

/usr/bin/python3 - $out/clients.txt "$ready" <<'END'
import statistics, sys
rows = {}
for line in open(sys.argv[1]):
    connections, size, name, figure = line.split()[:4]
    if figure != "failed":
        rows.setdefault((int(connections), int(size)), {}).setdefault(name, []).append(float(figure))
names = sys.argv[2].split()
print("| connections, bytes | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|")
for (connections, size), by_name in rows.items():
    base = statistics.median(by_name[names[0]])
    cells = [f"{statistics.median(by_name[n]):.2f} µs ({statistics.median(by_name[n]) / base:.2f})" if n in by_name
             else "failed" for n in names]
    print(f"| {connections}, {size} | " + " | ".join(cells) + " |")
END
