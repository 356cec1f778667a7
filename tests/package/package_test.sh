#!/bin/sh
# package_test.sh KIND COMPILER WORK: builds a small program in the directory WORK that finds wschat in one of the ways
# that people use, and checks that it prints the version. KIND: add_subdirectory, find_package, pkg_config or meson.
set -eu
kind=$1 CXX=$2 work=$3
export CXX
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
version=$(sed -n 's/^#define WSCHAT_VERSION_STRING "\(.*\)"$/\1/p' "$root/wschat.hpp")

fail() {
    echo "$kind: $1"
    exit 1
}
prints_version() {
    test "$("$@")" = "wschat $version" || fail "$1 does not print 'wschat $version'"
}
# Installs to a prefix and moves it, so installed files cannot depend on their first location.
install_and_move() {
    cmake -S "$root" -B wschat -DWSCHAT_TESTS=OFF -DWSCHAT_EXAMPLES=OFF -DCMAKE_INSTALL_PREFIX="$work/first" "$@"
    cmake --build wschat --target install
    mv first moved
    ! grep -rF "$work" moved || fail "an installed file names the directory of its build"
}

rm -rf "$work"
mkdir -p "$work"
cp -R "$here/consumer" "$work/consumer"
cd "$work"

case $kind in
add_subdirectory)
    cmake -S consumer -B build -DWSCHAT_SOURCE="$root"
    cmake --build build
    prints_version build/consumer
    test -z "$(find build/wschat -type f -perm -100 ! -name '*.sh')" || fail "a subproject builds programs"
    ! ls build/wschat/*Test* 2>/dev/null || fail "a subproject registers tests"
    ! cmake --install build --prefix unwanted | grep wschat || fail "a subproject installs"
    ;;
find_package)
    install_and_move
    cmake -S consumer -B build -DCMAKE_PREFIX_PATH="$work/moved"
    cmake --build build
    prints_version build/consumer
    ! cmake -S consumer -B refused -DCMAKE_PREFIX_PATH="$work/moved" -DCOMPONENTS=zlib >refused.log 2>&1 ||
        fail "a component that was not installed is found"
    grep -q "without its component 'zlib'" refused.log || fail "the message for a missing component is wrong"
    rm -rf wschat moved
    install_and_move -DWSCHAT_ZLIB=ON
    cmake -S consumer -B zlib -DCMAKE_PREFIX_PATH="$work/moved" -DCOMPONENTS=zlib
    ;;
pkg_config)
    install_and_move
    PKG_CONFIG_PATH=$work/moved/share/pkgconfig
    export PKG_CONFIG_PATH
    test "$(pkg-config --modversion wschat)" = "$version" || fail "wschat.pc does not say version $version"
    "$CXX" -std=c++17 consumer/main.cpp -o consumer/consumer $(pkg-config --cflags --libs wschat)
    prints_version consumer/consumer
    ;;
meson)
    mkdir consumer/subprojects
    mkdir consumer/subprojects/wschat
    cp "$root/wschat.hpp" "$root/meson.build" "$root/meson_options.txt" consumer/subprojects/wschat
    meson setup build consumer
    meson compile -C build
    prints_version build/consumer
    DESTDIR=$work/unwanted meson install -C build
    test ! -d unwanted || fail "a subproject installs"
    cd consumer/subprojects/wschat
    meson setup "$work/wschat" -DWSCHAT_TESTS=false -DWSCHAT_EXAMPLES=false --prefix="$work/first"
    meson install -C "$work/wschat"
    mv "$work/first" "$work/moved"
    PKG_CONFIG_PATH=$work/moved/share/pkgconfig
    export PKG_CONFIG_PATH
    "$CXX" -std=c++17 "$work/consumer/main.cpp" -o "$work/consumer/consumer" $(pkg-config --cflags --libs wschat)
    prints_version "$work/consumer/consumer"
    ;;
*)
    fail "unknown kind of package"
    ;;
esac
