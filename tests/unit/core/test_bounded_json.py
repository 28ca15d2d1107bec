"""JSON from others: the bounds hold before the parse, in words."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.bounded_json import loads_bounded

MEBIBYTE = 1024 * 1024
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_parses_what_json_parses(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert loads_bounded(text, max_bytes=MEBIBYTE) == loads_bounded(text.encode(), max_bytes=MEBIBYTE) == value


@given(VALUES)
def test_counts_no_fewer_values_than_there_are(value: object) -> None:
    def count(one: object) -> int:
        if isinstance(one, dict):
            return 1 + len(one) + sum(map(count, one.values()))
        return 1 + sum(map(count, one)) if isinstance(one, list) else 1

    if count(value) > 3:
        with pytest.raises(ValueError, match=r"^has more than 3 values$"):
            loads_bounded(json.dumps(value), max_bytes=MEBIBYTE, max_values=3)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'"' + b"x" * MEBIBYTE + b'"', "is 1048578 bytes long; expected at most 1048576"),
        (b"[" + b"{}," * 300_000 + b"{}]", "has more than 10000 values"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "has more than 10000 values"),
        (b"[" + b'{"type":"dns","value":"a"},' * 15_000 + b"1]", "has more than 10000 values"),
        (b"[" * 33 + b"]" * 33, "is nested more than 32 levels deep"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "is nested more than 32 levels deep"),
        (b'["' + b'\\"' * 500_000, "is not JSON"),
        (b'"' * 500_001, "is not JSON"),
        (b"[" + b'"",' * 100_000 + b"1]", "has more than 10000 values"),
        (b"[" * 33 + b"]" * 500_000, "is nested more than 32 levels deep"),
        (b"]" * 500_000 + b"[" * 500, "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b"1e999", "is not JSON"),
        (b"-Infinity", "is not JSON"),
        (b'"\\ud800"', "is not JSON"),
        ('"a"'.encode("utf-16"), "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"", "is not JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rejects_in_words_with_bounded_memory(content: bytes, problem: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{problem}$") as caught:
            loads_bounded(content, max_bytes=MEBIBYTE)
        assert tracemalloc.get_traced_memory()[1] < 10 * MEBIBYTE
    finally:
        tracemalloc.stop()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_separators_in_strings_do_not_count() -> None:
    text = '\\",:[{' * 20_000
    assert loads_bounded(json.dumps({"message": text}), max_bytes=MEBIBYTE) == {"message": text}


def test_a_small_text_costs_microseconds() -> None:
    content = json.dumps({"iss": "https://kubernetes.default.svc", "aud": ["certmount"], "exp": 1}).encode()
    best = min(_seconds(content) for _ in range(200))
    assert best < 50e-6


def _seconds(content: bytes) -> float:
    started = time.perf_counter()
    loads_bounded(content, max_bytes=MEBIBYTE)
    return time.perf_counter() - started
