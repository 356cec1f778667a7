#!/usr/bin/env python3
"""check_suites.py BINARY SUITE...: the listed suites, the test files and the suites in the binary are the same.

-SUITE is a suite that this build leaves out, because its library is missing.
"""
import pathlib
import subprocess
import sys


def listed(*options):
    lines = subprocess.run([sys.argv[1], *options], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line and not line.startswith(("[doctest]", "==="))]


names = {name for name in sys.argv[2:] if not name.startswith("-")}
left_out = {name[1:] for name in sys.argv[2:] if name.startswith("-")}
tests = pathlib.Path(__file__).resolve().parents[1]
files = {path.name[: -len("_test.cpp")] for path in tests.glob("*_test.cpp")} - left_out
held = set(listed("--list-test-suites"))
cases = listed("--list-test-cases")

# tests/server_pages_test.cpp belongs to the suite "server".
problems = [f"tests/{name}_test.cpp belongs to no suite in the list" for name in sorted(files)
            if not any(name == suite or name.startswith(suite + "_") for suite in names)]
problems += [f'{name} is listed, but no file has TEST_SUITE("{name}")' for name in sorted(names - held)]
problems += [f'TEST_SUITE("{name}") is not in the list of suites' for name in sorted(held - names)]
problems += [f"'{case}' is in no suite" for case in listed("--list-test-cases", "--test-suite-exclude=?*")]
problems += [f"'{case}' is the title of several test cases" for case in sorted(set(cases)) if cases.count(case) > 1]
problems += [f"'{case}': ctest cannot name a test with a semicolon, a backslash or unbalanced square brackets"
             for case in cases if set(case) & set(";\\") or case.count("[") != case.count("]")]
sys.exit("\n".join(problems) or 0)
