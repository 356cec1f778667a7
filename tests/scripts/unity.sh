#!/bin/sh
# unity.sh FOLDER UNITS SUITE...: translation units that compile wschat.hpp once for many test files.
#
# Writes FOLDER/unity_1.cpp to FOLDER/unity_UNITS.cpp. They include the files tests/SUITE_test.cpp and
# tests/SUITE_*_test.cpp, each in a namespace of its own, so that their names do not clash. Prints the files to compile: the
# units, and the test files that must stay alone, because they replace operator new or include headers in an #if.
set -eu
folder=$1 units=$2
shift 2
mkdir -p "$folder"
cd "$(dirname "$0")/.."
tests=$PWD

together=
for suite; do
    for file in "${suite}_test.cpp" "${suite}"_*_test.cpp; do
        if [ ! -e "$file" ]; then continue; fi
        if grep -q "void\* operator new\|#include <boost\|#include <openssl" "$file"; then echo "$tests/$file"
        else together="$together $file"; fi
    done
done

# The largest file first, each to the unit with the fewest lines so far: "UNIT FILE"
wc -l $together /dev/null | grep "_test" | sort -rn | awk -v units="$units" '{
    least = 1
    for (unit = 2; unit <= units; ++unit) if (lines[unit] + 0 < lines[least] + 0) least = unit
    lines[least] += $1
    print least, $2
}' >"$folder/unity.list"

unit=1
while [ $unit -le "$units" ]; do
    files=$(sed -n "s/^$unit //p" "$folder/unity.list")
    {
        # GCC takes for a header what is not the file on its command line.
        echo '#if defined(__GNUC__) && !defined(__clang__)'
        echo '#pragma GCC diagnostic ignored "-Wsubobject-linkage"'
        echo '#endif'
        grep -hx '#define WSCHAT_CHAT 1' $files | sort -u
        # All headers stand before the first namespace.
        grep -h '^#include <' $files | sort -u
        grep -h '^#include "' $files | sort -u
        for file in $files; do printf 'namespace %s {\n#include "%s"\n}\n' "${file%.cpp}" "$file"; done
    } >"$folder/unity.new"
    # An unchanged file keeps its time, so that nothing is compiled again.
    cmp -s "$folder/unity.new" "$folder/unity_$unit.cpp" || cp "$folder/unity.new" "$folder/unity_$unit.cpp"
    echo "$folder/unity_$unit.cpp"
    unit=$((unit + 1))
done
rm -f "$folder/unity.list" "$folder/unity.new"
