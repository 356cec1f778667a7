"""Shared by the interoperability tests in Python: the deadline, comparisons with clear messages, and the count of checks."""

import sys

TIMEOUT = 60  # seconds for one check; generous, because a machine under load is slow


def short(value):
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]}... ({len(value)} in total)"


def expect(actual, expected, name="the result"):
    if actual != expected:
        raise AssertionError(f"{name}: expected {short(expected)}, got {short(actual)}")


def expect_in(part, whole, name="the result"):
    if part not in whole:
        raise AssertionError(f"{name}: expected {short(part)} in {short(whole)}")


class Results:
    """Runs checks one after the other, and prints a line for each."""

    def __init__(self):
        self.passed = self.failed = 0

    def run(self, title, function):
        try:
            function()
            self.passed += 1
            print(f"ok - {title}", flush=True)
        except Exception as error:  # report the failure and run the other checks
            self.failed += 1
            print(f"not ok - {title}\n  # {type(error).__name__}: {error}", flush=True)

    def end(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(self.failed != 0)
