#!/usr/bin/env python3
"""check_suites.py BINARY SUITE...: the listed suites, the files and what the binary holds are the same."""
import pathlib
import subprocess
import sys


def listed(*options):
    lines = subprocess.run([sys.argv[1], *options], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line and not line.startswith(("[doctest]", "==="))]


names = {name for name in sys.argv[2:] if not name.startswith("-")}
left_out = {name[1:] for name in sys.argv[2:] if name.startswith("-")}  # what this build has not the library for
files = {path.name[: -len("_test.cpp")] for path in pathlib.Path(__file__).resolve().parents[1].glob("*_test.cpp")} - left_out
held = set(listed("--list-test-suites"))
cases = listed("--list-test-cases")

# tests/server_pages_test.cpp goes on with the suite "server".
problems = [f"tests/{name}_test.cpp is of no suite in the list" for name in sorted(files)
            if not any(name == suite or name.startswith(suite + "_") for suite in names)]
problems += [f'{name} is listed, but no file has TEST_SUITE("{name}")' for name in sorted(names - held)]
problems += [f'TEST_SUITE("{name}") is not in the list of suites' for name in sorted(held - names)]
problems += [f"'{case}' is in no suite" for case in listed("--list-test-cases", "--test-suite-exclude=?*")]
problems += [f"'{case}' is the name of several test cases" for case in sorted(set(cases)) if cases.count(case) > 1]
problems += [f"'{case}': ctest can not name a test with a semicolon, a backslash or half a pair of brackets"
             for case in cases if set(case) & set(";\\") or case.count("[") != case.count("]")]
sys.exit("\n".join(problems) or 0)
