#!/bin/sh
# Installs the missing packages (as root, on Debian), builds, and runs every test but the long ones: the other targets of
# tests/platforms.sh, and "ctest --preset dev -L long" (more ways to package) after it.
#
#   tests/run.sh          everything
#   tests/run.sh quick    the g++ build and its tests, without the browser
#
# All output is below build/. The script stops at the first stage that fails: it prints the end of its log, and ends with
# status 1. The last line is always "N passed, N failed".
set -u
cd "$(dirname "$0")/.." || exit 1

mode=${1-all}
case $mode in
all | quick) ;;
*) echo "usage: tests/run.sh [quick]" && exit 2 ;;
esac

logs=build/logs
passed=0
failed=0
export CI=true LC_ALL=C.UTF-8 CMAKE_GENERATOR=Ninja
mkdir -p $logs

# ---- stages ---------------------------------------------------------------------------------------------------------

finish() {
    echo "$passed passed, $failed failed"
    test $failed = 0
    exit
}

# give_up STAGE LOG
give_up() {
    tail -n 100 "$2"
    echo "tests/run.sh: stage '$1' failed; all of its output is in $2"
    test $failed != 0 || failed=1
    finish
}

# stage NAME COMMAND...: prints only its name, unless it fails
stage() {
    name=$1 log=$logs/$(echo "$1" | tr -d : | tr ' ' -).log
    shift
    echo "== $name"
    "$@" >"$log" 2>&1 </dev/null || give_up "$name" "$log"
}

# tests NAME COMMAND...: a stage whose tests are counted. Prints its summary, and the tests that were skipped.
tests() {
    name=$1 log=$logs/$(echo "$1" | tr -d : | tr ' ' -).log
    shift
    echo "== $name"
    status=0
    "$@" >"$log" 2>&1 </dev/null || status=$?
    # ctest: "98% tests passed, 2 tests failed out of 100"; meson: "Ok: 98", "Fail: 2", "Timeout: 0"
    counts=$(awk '/tests failed out of/ { bad += $4; good += $NF - $4 }
                  /^Ok: / { good += $2 } /^(Fail|Timeout|Unexpected Pass|Skipped): / { bad += $NF }
                  END { print good + 0, bad + 0 }' "$log")
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
    test $status = 0 || give_up "$name" "$log"
    grep -E 'tests passed|^Total Test time|^Ok:|^Fail:|\(Skipped\)' "$log"
}

# build PRESET TARGET OPTION...
build() {
    preset=$1
    target=$2
    shift 2
    stage "$preset: configure" cmake --preset "$preset" -DWSCHAT_WERROR=ON -DWSCHAT_TEST_UNITS=2 "$@"
    stage "$preset: build" cmake --build "build/$preset" -j 2 --target "$target"
}

# ---- packages -------------------------------------------------------------------------------------------------------

missing=
# need PACKAGE COMMAND...: the package is missing if the command fails
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
header() { echo "#include <$1>" | g++ -E -x c++ -; }
sanitizers() { ls "$(clang++ -print-resource-dir)"/lib/*/libclang_rt.tsan*; }

need g++ command -v g++
need cmake command -v cmake
need ninja-build command -v ninja
need python3 test -x /usr/bin/python3
need doctest-dev header doctest/doctest.h
need zlib1g-dev header zlib.h
need liburing-dev header liburing.h
need libssl-dev header openssl/ssl.h
need openssl command -v openssl
need libsqlite3-dev header sqlite3.h
need libutf8proc-dev header utf8proc.h
need libhiredis-dev header hiredis/async.h
need redis-server command -v redis-server
need redis-tools command -v redis-cli
need pkg-config command -v pkg-config
need meson command -v meson
need python3-websockets /usr/bin/python3 -c 'import websockets'
need python3-tornado /usr/bin/python3 -c 'import tornado'
need python3-h2 /usr/bin/python3 -c 'import h2'
need nginx-light test -x /usr/sbin/nginx
need haproxy test -x /usr/sbin/haproxy
need apache2-bin test -x /usr/sbin/apache2
need caddy command -v caddy
need systemd command -v systemd-analyze
need tinyproxy command -v tinyproxy
need libwebsockets-dev header libwebsockets.h
need libboost-dev header boost/beast.hpp
need default-jdk-headless command -v javac
need libtomcat9-java test -e /usr/share/java/tomcat9-websocket.jar
need nodejs command -v node
need npm command -v npm
need valgrind command -v valgrind
if [ $mode = all ]; then
    need clang command -v clang++
    need libclang-rt-dev sanitizers
    need chromium-headless-shell test -x /usr/bin/chromium-headless-shell
fi

if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "tests/run.sh: missing packages:$missing (names of Debian). As root on Debian, this script installs them"
        failed=1
        finish
    fi
    export DEBIAN_FRONTEND=noninteractive
    stage "apt-get update" apt-get update
    # The tests start the proxies themselves: no package may start a service.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    stage "apt-get install" apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 $missing
fi

# Exact versions, so no lock file is needed. Node reads the machine's certificates only with --use-openssl-ca.
npm_packages="ws@8.23.0 playwright-core@1.60.0 axe-core@4.14.1 typescript@5.9.3"
if [ "$(cat build/npm/installed 2>/dev/null)" != "$npm_packages" ]; then
    stage "npm install" env NODE_OPTIONS="${NODE_OPTIONS---use-openssl-ca}" npm install --prefix build/npm \
        --no-save --no-package-lock --no-audit --no-fund --prefer-offline $npm_packages
    echo "$npm_packages" >build/npm/installed
fi

# ---- the stages -----------------------------------------------------------------------------------------------------

features="-DWSCHAT_ZLIB=ON -DWSCHAT_OPENSSL=ON -DWSCHAT_SQLITE=ON -DWSCHAT_HIREDIS=ON"

build dev all -DCMAKE_CXX_COMPILER=g++ -DWSCHAT_TESTS_INTEROP=ON $features -DWSCHAT_LIBURING=ON -DWSCHAT_UTF8PROC=ON
if [ $mode = quick ]; then
    tests "dev: tests" ctest --preset dev -LE 'browser|long'
    finish
fi
tests "dev: tests" ctest --preset dev -LE long
tests "dev: the poll backend" env WSCHAT_TEST_POLLER=poll ctest --preset dev -L poll
tests "dev: over TLS" env WSCHAT_TEST_TLS=1 ctest --preset dev -L over_tls

build asan wschat_tests $features
tests "asan: tests" ctest --preset asan
tests "asan: over TLS, the poll backend" env WSCHAT_TEST_TLS=1 WSCHAT_TEST_POLLER=poll ctest --preset asan -L over_tls

build tsan wschat_tests $features "-DWSCHAT_TEST_SUITES=handler;rooms;tls;loop;server;limits;threads;stores"
tests "tsan: tests" ctest --preset tsan
tests "tsan: three loops" env WSCHAT_TEST_THREADS=3 ctest --preset tsan -L loops

build clang all -DWSCHAT_TESTS=OFF

# Short rounds. README.md has the commands for long ones.
stage "fuzz: ten seconds of each harness" sh tests/fuzz/run.sh 10
stage "soak: a minute of a thousand connections" sh tests/soak.sh 1 connections=1000
stage "platforms: the short targets" sh tests/platforms.sh quick
grep "^SKIPPED" "$log"  # the packages of a target cannot be installed

# This build has no optional features.
test -f build/meson/build.ninja || stage "meson: setup" meson setup build/meson -Dwerror=true -DWSCHAT_TEST_UNITS=2
stage "meson: build" meson compile -C build/meson -j 2
tests "meson: tests" meson test -C build/meson --no-rebuild --num-processes 2 --print-errorlogs

finish
