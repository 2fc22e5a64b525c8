"""What the fuzz tests share: settings that make them the same every time, a guard against hangs, and mutations.

LMJAX_FUZZ=N runs N examples of each instead of a few; the tests marked slow run 10,000.
"""

import contextlib
import copy
import json
import os
import signal

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MANY = int(os.environ.get("LMJAX_FUZZ", "0"))
LARGE = 10_000

ODD_TEXTS = (
    "", " ", "\0", "\n", "\ud800", "\x1b[2J", "../../evil", "/etc/passwd", "~nosuchuser/x", "é" * 300, "x" * 5000,
    "{}", "[", "None", "nan", "-inf", "1e999", "0x" + "f" * 9000, "9" * 5000, "(" * 300, "__import__('os')", "%s%n",
    "a" * 50 + "!", "[z-a]", "http://127.0.0.1:1/x", "=", "--", "-1", "True", "0", "1", "1.5", "{'kind': 3}")
ODD_NUMBERS = (0, -1, 1, 2, 3, 8, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, 10**9, 10**400, -2**63, 0.0, -0.0, 1e-320,
               1e308, 0.5, 1.5)

odd_texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
odd_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats() | odd_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3), max_leaves=4)


def examples(few: int, cost: int = 1) -> settings:
    """`few` examples, or LMJAX_FUZZ many, over what one costs; always the same ones."""
    return settings(max_examples=(MANY or few) // cost, derandomize=True, deadline=None, database=None,
                    report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def soon(seconds: int = 30):
    """Fails where the body hangs. Not a timing check: what it guards takes milliseconds."""
    def stop(number, frame):
        raise AssertionError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*at, key))


@st.composite
def changed_json(draw, value, times: int = 3):
    """A JSON value with a few of its parts replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, times))):
        at = draw(st.sampled_from(list(_places(value))))
        if not at:
            if draw(st.integers(0, 9)) == 0:
                return draw(odd_values)
            continue
        inside = value
        for key in at[:-1]:
            inside = inside[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if what == "remove":
            del inside[at[-1]]
        elif what == "replace":
            inside[at[-1]] = draw(odd_values)
        elif isinstance(inside, dict):
            inside[draw(odd_texts)] = inside.pop(at[-1]) if what == "rename" else draw(odd_values)
    return value


@st.composite
def changed_bytes(draw, data: bytes, times: int = 4):
    """Bytes cut short, flipped, overwritten, repeated, or replaced as a whole."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, times))):
        what = draw(st.sampled_from(["flip", "flip", "cut", "insert", "delete", "number", "random"]))
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif what == "delete":
            del data[at:at + draw(st.integers(1, 16))]
        elif what == "number":
            data[at:at + 8] = draw(st.sampled_from([2**62, 2**64 - 1, 2**31, 2**40, 0, 1])).to_bytes(8, "little")
        elif draw(st.integers(0, 9)) == 0:
            return draw(st.binary(max_size=64))
    return bytes(data)


def as_text(value) -> str:
    """JSON as a lenient writer gives it: NaN, half characters and all."""
    return json.dumps(value) if not _too_long(value) else "[" * 100_000


def _too_long(value) -> bool:
    try:
        json.dumps(value)
        return False
    except ValueError:  # a whole number of too many digits for text
        return True
