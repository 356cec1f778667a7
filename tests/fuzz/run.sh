#!/bin/sh
# sh tests/fuzz/run.sh SECONDS [NAME...]
#
# Builds the harnesses (http body fields text connection client chat store server tls, or the named ones) with libFuzzer,
# AddressSanitizer and UndefinedBehaviorSanitizer into build/fuzz. Runs each for SECONDS, two at a time. The first
# inputs come from seeds.py, from tests/fuzz/corpus, and from earlier runs in build/fuzz/corpus. Prints a table. If a
# harness fails, prints the input as hex and ends with status 1.
#
#   sh tests/fuzz/run.sh pack [NAME...]    minimizes build/fuzz/corpus and saves it in tests/fuzz/corpus

set -u
cd "$(dirname "$0")/../.." || exit 1
fuzz=tests/fuzz
out=build/fuzz
python=/usr/bin/python3

say() { printf '%s\n' "$*" >&2; }
die() { say "run.sh: $*"; exit 1; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' $fuzz/run.sh >&2; exit 2; }

# Long inputs are slow, and a few kilobytes reach every rule.
max_len() {
    case $1 in text) echo 400 ;; fields) echo 600 ;; *) echo 2000 ;; esac
}

# ---- one harness, in its own process
# ---------------------------------------------------------------------------------

build_one() { # build_one NAME
    [ -e "$out/$1" ] && [ -z "$(find wschat.hpp $fuzz/*.?pp -newer "$out/$1")" ] && return 0
    say "building $1"
    libraries=""
    [ "$1" = tls ] && libraries="-lssl -lcrypto"
    [ "$1" = store ] && libraries="-lsqlite3"
    # shellcheck disable=SC2086
    clang++ -std=c++17 -O2 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
        $fuzz/"$1".cpp -o "$out/$1" $libraries >"$out/$1.build.log" 2>&1 && return 0
    rm -f "$out/$1"
    cat "$out/$1.build.log" >&2
    return 1
}

# An input that takes a minute (the machine may be busy) or 1.5 GB is also a find.
fuzz_one() { # fuzz_one NAME SECONDS
    start=$(date +%s)
    rm -f "$out/finds/$1"-*
    "$out/$1" -max_total_time="$2" -max_len="$(max_len "$1")" -timeout=60 -report_slow_units=60 \
        -rss_limit_mb=1500 -print_final_stats=1 -artifact_prefix="$out/finds/$1-" "$out/corpus/$1" >"$out/$1.log" 2>&1
    echo "$?" >"$out/$1.status"
    echo "$1 $(executions "$1") $(($(date +%s) - start))" >>"$out/totals"
}

# Reads the number of executions from the log, also of an aborted run.
executions() {
    awk '/^stat::number_of_executed_units:/ { n = $2 } /^#[0-9]+/ { last = substr($1, 2) } END { print (n ? n : last) + 0 }' \
        "$out/$1.log"
}
last_of() { # last_of NAME WORD: the last number after WORD in the log of libFuzzer
    sed -n "s/.* $2: \([0-9]*\).*/\1/p" "$out/$1.log" | tail -n 1
}

pack_one() { # pack_one NAME
    rm -rf "$out/packed/$1"
    mkdir -p "$out/packed/$1"
    "$out/$1" -merge=1 -max_len="$(max_len "$1")" "$out/packed/$1" "$out/corpus/$1" >"$out/$1.merge.log" 2>&1 || return 1
    $python $fuzz/seeds.py pack "$1" "$out/packed/$1"
}

case ${1-} in
--build) build_one "$2"; exit ;;
--fuzz) fuzz_one "$2" "$3"; exit ;;
esac

# ---- all harnesses
# ---------------------------------------------------------------------------------------------------

seconds=${1-}
case $seconds in
pack) ;;
"" | *[!0-9]*) usage ;;
esac
shift
names=${*:-http body fields text connection client chat store server tls}
for name in $names; do
    [ -e "$fuzz/$name.cpp" ] || die "unknown harness: $name"
done

# need PACKAGE COMMAND...: adds PACKAGE to the missing ones if COMMAND fails
missing=""
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
libfuzzer() { ls "$(clang++ -print-resource-dir)"/lib/*/libclang_rt.fuzzer*; }
need clang command -v clang++
need libclang-rt-dev libfuzzer
case " $names " in *" store "*) need libsqlite3-dev test -e /usr/include/sqlite3.h ;; esac
case " $names " in *" tls "*) need libssl-dev test -e /usr/include/openssl/ssl.h ;; esac
need python3 test -x $python
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then die "missing Debian packages:$missing"; fi
    say "installing$missing"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $missing >&2 ||
        die "apt-get cannot install$missing"
fi

mkdir -p "$out/finds"
$python $fuzz/seeds.py make "$out/corpus" || die "seeds.py failed"
# shellcheck disable=SC2086
printf '%s\n' $names | xargs -P 2 -I NAME sh $fuzz/run.sh --build NAME || die "a harness does not compile"

if [ "$seconds" = pack ]; then
    for name in $names; do pack_one "$name" || die "$name: $(tail -n 1 "$out/$name.merge.log")"; done
    exit 0
fi

# shellcheck disable=SC2086
printf '%s\n' $names | xargs -P 2 -I NAME sh $fuzz/run.sh --fuzz NAME "$seconds"

found=0
printf '%-12s %12s %10s %8s %8s %6s  %s\n' harness executions per-second corpus edges finds total
for name in $names; do
    finds=$(find "$out/finds" -name "$name-*" | wc -l)
    [ "$(cat "$out/$name.status")" = 0 ] || [ "$finds" != 0 ] || finds=1
    [ "$finds" = 0 ] || found=1
    ran=$(executions "$name")
    all=$(awk -v name="$name" '$1 == name { n += $2; s += $3 } END { printf "%d in %d s", n, s }' "$out/totals")
    printf '%-12s %12s %10s %8s %8s %6s  %s\n' "$name" "$ran" $((ran / (seconds > 0 ? seconds : 1))) \
        "$(find "$out/corpus/$name" -type f | wc -l)" "$(last_of "$name" cov)" "$finds" "$all"
done
[ $found = 0 ] && exit 0

for name in $names; do
    [ "$(cat "$out/$name.status")" = 0 ] && continue
    printf '\n%s: the whole log is in %s\n' "$name" "$out/$name.log"
    grep -aE -A 3 'CHECK FAILED:|runtime error:|ERROR: ' "$out/$name.log" | head -n 12
    for find in "$out/finds/$name"-*; do
        [ -e "$find" ] && printf '%s\n%s\n' "$find" "$(od -An -v -tx1 "$find" | tr -d ' \n')"
    done
done
exit 1
