"""Shared by the interoperability tests in Python: the deadline, and comparisons with clear messages."""

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
