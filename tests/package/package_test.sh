#!/bin/sh
# package_test.sh KIND COMPILER WORK: builds the program in consumer/ in the directory WORK, and runs it. KIND is how the
# program finds wschat: add_subdirectory, find_package, pkg_config, fetch_content, meson or wrap. The KIND options builds
# it with each option from an installed tree that was moved. The KIND missing has the library of no option: the messages
# name it. The KIND install follows README's commands on a machine without doctest.
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
# prints PROGRAM TEXT
prints() {
    test "$("$1")" = "$2" || fail "$1 does not print '$2'"
}
# Installs to a prefix and moves it: the installed files must work in any directory.
installed() {
    rm -rf wschat first moved
    cmake -S "$root" -B wschat -DWSCHAT_TESTS=OFF -DWSCHAT_EXAMPLES=OFF -DCMAKE_INSTALL_PREFIX="$work/first" "$@"
    cmake --build wschat --target install
    mv first moved
    ! grep -rF "$work" moved || fail "an installed file names the directory of its build"
}

# Packs what a release has, as wschat-VERSION.tar.gz, and sets `hash`.
archive() {
    mkdir "wschat-$version"
    (cd "$root" && cp wschat.hpp LICENSE CMakeLists.txt meson.build meson_options.txt "$work/wschat-$version")
    tar -czf "wschat-$version.tar.gz" "wschat-$version"
    hash=$(sha256sum "wschat-$version.tar.gz" | cut -d ' ' -f 1)
}

rm -rf "$work"
mkdir -p "$work"
cp -R "$here/consumer" "$work/consumer"
cd "$work"

case $kind in
add_subdirectory)
    cmake -S consumer -B build -DWSCHAT_SOURCE="$root"
    cmake --build build
    prints build/consumer "wschat $version"
    cmake -S consumer -B build -DWSCHAT_SOURCE="$root" -DWSCHAT_CHAT=ON
    cmake --build build
    prints build/consumer "wschat $version with the chat"
    test -z "$(find build/wschat -type f -perm -100 ! -name '*.sh')" || fail "a subproject builds programs"
    ! ls build/wschat/*Test* 2>/dev/null || fail "a subproject registers tests"
    ! cmake --install build --prefix unwanted | grep wschat || fail "a subproject installs"
    ;;
find_package)
    installed
    cmake -S consumer -B build -DCMAKE_PREFIX_PATH="$work/moved"
    cmake --build build
    prints build/consumer "wschat $version"
    for component in chat zlib; do
        ! cmake -S consumer -B refused -DCMAKE_PREFIX_PATH="$work/moved" -DCOMPONENTS=$component >refused.log 2>&1 ||
            fail "the component '$component' is found, but it was not installed"
        grep -q "without its component '$component'" refused.log || fail "the message for a missing component is not ours"
    done
    ! cmake -S consumer -B refused -DCMAKE_PREFIX_PATH="$work/moved" -DWANTED_VERSION=99.0 >refused.log 2>&1 ||
        fail "version $version is found for version 99.0"
    grep -q "version: $version" refused.log || fail "the message does not name the installed version"
    installed -DWSCHAT_ZLIB=ON -DWSCHAT_CHAT=ON
    cmake -S consumer -B components -DCMAKE_PREFIX_PATH="$work/moved" "-DCOMPONENTS=zlib;chat"
    cmake --build components
    prints components/consumer "wschat $version with the chat"
    ;;
options)
    present=
    for option in zlib:ZLIB openssl:OPENSSL sqlite3:SQLITE hiredis:HIREDIS libutf8proc:UTF8PROC liburing:LIBURING; do
        pkg-config --exists "${option%:*}" || { echo "SKIPPED: WSCHAT_${option#*:}: there is no ${option%:*}" && continue; }
        present="$present -DWSCHAT_${option#*:}=ON"
        component=$(echo "${option#*:}" | tr A-Z a-z)
        rm -rf build
        installed -DWSCHAT_${option#*:}=ON -DWSCHAT_CHAT=ON  # some options add code only to the chat
        cmake -S consumer -B build -DCMAKE_PREFIX_PATH="$work/moved" -DCOMPONENTS=$component
        cmake --build build
        prints build/consumer "wschat $version with the chat"
        PKG_CONFIG_PATH=$work/moved/share/pkgconfig pkg-config --cflags --libs wschat | grep -q "WSCHAT_${option#*:}=1" ||
            fail "wschat.pc does not define WSCHAT_${option#*:}"
    done
    # As a subproject, with all of them: the targets of the libraries belong to the folder of wschat.
    cmake -S consumer -B subproject -DWSCHAT_SOURCE="$root" -DWSCHAT_CHAT=ON $present
    grep -q "WSCHAT_CHAT=1" subproject/CMakeFiles/consumer.dir/flags.make || fail "a subproject has no chat"
    for option in $present; do
        grep -qF -- "${option%=ON}=1" subproject/CMakeFiles/consumer.dir/flags.make || fail "a subproject has no $option"
    done
    # A program that installs a part of its subprojects can name ours.
    cmake --install wschat --prefix part --component wschat
    test -f part/include/wschat.hpp || fail "the component of the install is not wschat"
    cmake --install wschat --prefix none --component other
    test ! -e none || fail "files have another component than wschat"
    ;;
missing)
    # refused SENTENCE COMMAND...
    refused() {
        sentence=$1
        shift
        ! "$@" >refused.log 2>&1 || fail "'$*' does not fail"
        tr -s '\n ' ' ' <refused.log | grep -qF "$sentence" || { cat refused.log && fail "the message is not '$sentence'"; }
    }
    # optional LIBRARY OPTION...: a program that can do without wschat hears which library is missing, and goes on.
    optional() {
        library=$1
        shift
        cmake -S consumer -B "optional_$library" -DCMAKE_PREFIX_PATH="$work/moved" -DOPTIONAL=ON "$@" >optional.log 2>&1 ||
            { cat optional.log && fail "a program for which wschat is optional is not configured"; }
        grep -q "no wschat: .*$library" optional.log || fail "the program does not hear that $library is missing"
    }
    nothing="-DWSCHAT_TESTS=OFF -DWSCHAT_EXAMPLES=OFF"
    for case in ZLIB:ZLIB:zlib1g-dev OPENSSL:OpenSSL:libssl-dev SQLITE:SQLite3:libsqlite3-dev; do
        option=WSCHAT_${case%%:*} package=${case#*:}
        refused "$option needs ${package%:*}, which is not found (Debian: ${package#*:})" \
            cmake -S "$root" -B "$option" $nothing -D$option=ON "-DCMAKE_DISABLE_FIND_PACKAGE_${package%:*}=ON"
    done
    for case in HIREDIS:hiredis:libhiredis-dev UTF8PROC:libutf8proc:libutf8proc-dev LIBURING:liburing:liburing-dev; do
        option=WSCHAT_${case%%:*} module=${case#*:}
        message="$option needs ${module%:*}, which is not found (Debian: ${module#*:})"
        refused "$message" env PKG_CONFIG_LIBDIR=/nonexistent cmake -S "$root" -B "$option" $nothing -D$option=ON
        refused "$option needs PkgConfig, which is not found (Debian: pkg-config)" \
            cmake -S "$root" -B "$option.no" $nothing -D$option=ON -DCMAKE_DISABLE_FIND_PACKAGE_PkgConfig=ON
        ! command -v meson >/dev/null || refused "$message" env PKG_CONFIG_LIBDIR=/nonexistent CMAKE=/nonexistent \
            meson setup "$option.meson" "$root" -DWSCHAT_TESTS=false -DWSCHAT_EXAMPLES=false -D$option=true
        pkg-config --exists "${module%:*}" || { echo "SKIPPED: $option: there is no ${module%:*}" && continue; }
        installed -D$option=ON
        PKG_CONFIG_LIBDIR=/nonexistent optional "${module%:*}"
    done
    if pkg-config --exists zlib; then
        installed -DWSCHAT_ZLIB=ON
        optional ZLIB -DCMAKE_DISABLE_FIND_PACKAGE_ZLIB=ON
    fi
    ;;
fetch_content)
    archive
    cmake -S consumer -B build -DWSCHAT_ARCHIVE="$work/wschat-$version.tar.gz" -DWSCHAT_HASH=$hash -DWSCHAT_CHAT=ON
    cmake --build build
    prints build/consumer "wschat $version with the chat"
    ;;
wrap)
    archive
    mkdir -p consumer/subprojects/packagefiles
    cp "wschat-$version.tar.gz" consumer/subprojects/packagefiles
    sed "s/VERSION/$version/; s/HASH/$hash/" "$here/wschat.wrap" >consumer/subprojects/wschat.wrap
    meson setup build consumer --wrap-mode=nodownload  # the archive is there
    meson compile -C build
    prints build/consumer "wschat $version"
    ;;
pkg_config)
    installed
    PKG_CONFIG_PATH=$work/moved/share/pkgconfig
    export PKG_CONFIG_PATH
    test "$(pkg-config --modversion wschat)" = "$version" || fail "wschat.pc does not say version $version"
    "$CXX" -std=c++17 consumer/main.cpp -o consumer/consumer $(pkg-config --cflags --libs wschat)
    prints consumer/consumer "wschat $version"
    installed -DWSCHAT_CHAT=ON
    "$CXX" -std=c++17 consumer/main.cpp -o consumer/consumer $(pkg-config --cflags --libs wschat)
    prints consumer/consumer "wschat $version with the chat"
    ;;
install)
    without_doctest="-DCMAKE_DISABLE_FIND_PACKAGE_doctest=TRUE --no-warn-unused-cli"
    cmake -S "$root" -B default $without_doctest >default.log 2>&1 || fail "without doctest there is nothing to install"
    grep -q "No tests: they need doctest" default.log || fail "the output does not say why there are no tests"
    test ! -e default/tests || fail "there are tests without doctest"
    cmake -S "$root" -B tests_off $without_doctest -DWSCHAT_TESTS=OFF
    for build in default tests_off; do
        cmake --install $build --prefix "$work/$build.prefix"
        cmp "$root/wschat.hpp" $build.prefix/include/wschat.hpp
        cmake -S consumer -B $build.consumer -DCMAKE_PREFIX_PATH="$work/$build.prefix"
    done
    cmake --build default.consumer
    prints default.consumer/consumer "wschat $version"
    # Who asks for the tests hears what is missing.
    ! cmake -S "$root" -B refused $without_doctest -DWSCHAT_TESTS=ON >refused.log 2>&1 ||
        fail "the tests are built without doctest"
    grep -q "The tests need doctest 2.4 (Debian: doctest-dev)" refused.log || fail "the error does not name doctest"
    ;;
meson)
    mkdir -p consumer/subprojects/wschat
    cp "$root/wschat.hpp" "$root/meson.build" "$root/meson_options.txt" consumer/subprojects/wschat
    meson setup build consumer
    meson compile -C build
    prints build/consumer "wschat $version"
    DESTDIR=$work/unwanted meson install -C build
    test ! -d unwanted || fail "a subproject installs"
    cd consumer/subprojects/wschat
    meson setup "$work/wschat" -DWSCHAT_CHAT=true -DWSCHAT_TESTS=false -DWSCHAT_EXAMPLES=false --prefix="$work/first"
    meson install -C "$work/wschat"
    mv "$work/first" "$work/moved"
    PKG_CONFIG_PATH=$work/moved/share/pkgconfig
    export PKG_CONFIG_PATH
    "$CXX" -std=c++17 "$work/consumer/main.cpp" -o "$work/consumer/consumer" $(pkg-config --cflags --libs wschat)
    prints "$work/consumer/consumer" "wschat $version with the chat"
    ;;
*)
    fail "unknown kind of package"
    ;;
esac
