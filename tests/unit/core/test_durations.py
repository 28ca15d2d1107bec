"""Durations in Go's syntax, and differences of clocks in words."""

from __future__ import annotations

import ast
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.clocks import describe_skew
from csi_driver.core.durations import format_duration, parse_duration
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import hostile_texts

HUNDRED_YEARS = timedelta(days=36_500)
ROWS = [
    line.split("\t")
    for line in Path(__file__).with_name("go_durations.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
GO = {ast.literal_eval(text): None if value == "refused" else int(value) for text, value in ROWS}
# Valid in Go but not here: signs, bare points, units below a millisecond, more than nine digits, over 100 years.
STRICTER = {
    "0", ".5h", "1.h", "+1h", "-1h", "-0s", "1us", "1µs", "1μs", "1ns", "876001h", "1000000000s", "1.1234567891s",
    "2562047h47m16s",
}  # fmt: skip

milliseconds = st.integers(0, HUNDRED_YEARS // timedelta(milliseconds=1)).map(lambda ms: timedelta(milliseconds=ms))


@pytest.mark.parametrize("text", [pytest.param(text, id=repr(text)) for text in GO])
def test_duration_has_the_same_value_as_in_go(text: str) -> None:
    nanoseconds = GO[text]
    if nanoseconds is None or text in STRICTER:
        with pytest.raises(ValueError, match=r"^is "):
            parse_duration(text)
    else:
        assert abs(parse_duration(text) / timedelta(microseconds=1) - nanoseconds / 1000) <= 0.5


def test_table_contains_all_stricter_rules() -> None:
    assert {text for text in STRICTER if GO[text] is not None} == STRICTER


@given(milliseconds)
def test_formatted_duration_parses_to_the_same_value(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration


@given(st.timedeltas(min_value=timedelta(), max_value=HUNDRED_YEARS - timedelta(milliseconds=1)))
def test_format_rounds_to_milliseconds(duration: timedelta) -> None:
    assert abs(parse_duration(format_duration(duration)) - duration) <= timedelta(microseconds=500)


@given(milliseconds.filter(bool))
def test_format_writes_the_sign(duration: timedelta) -> None:
    assert format_duration(-duration) == "-" + format_duration(duration)


@given(st.lists(st.tuples(st.integers(0, 9999), st.sampled_from(["h", "m", "s", "ms"])), min_size=1, max_size=5))
def test_parts_are_added(parts: list[tuple[int, str]]) -> None:
    unit = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
    total = timedelta(milliseconds=sum(number * unit[name] for number, name in parts))
    assert parse_duration("".join(f"{number}{name}" for number, name in parts)) == total


@given(hostile_texts)
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    result = outcome(lambda: parse_duration(text), ValueError)
    if isinstance(result, ValueError):
        assert str(result).isprintable()
    else:
        assert timedelta() <= result <= HUNDRED_YEARS


def test_duration_has_at_most_64_characters() -> None:
    """Otherwise a text of 32 KiB with one part in two characters blocks the driver for 0.1 s."""
    assert parse_duration("1s" * 32) == timedelta(seconds=32)
    with pytest.raises(ValueError, match="is 66 characters long; a duration has at most 64"):
        parse_duration("1s" * 33)


@pytest.mark.parametrize("text", ["-5m", "-0s", "-"])
def test_negative_duration_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="negative"):
        parse_duration(text)


@pytest.mark.parametrize(
    "seconds, words",
    [(21, "21 s"), (90, "90 s"), (-90.4, "90 s"), (120, "2 min"), (3600, "60 min"), (7200, "2 h"), (-86_400, "24 h"), (2_600_000, "30 days")],
)  # fmt: skip
def test_difference_is_described_in_units_for_people(seconds: float, words: str) -> None:
    assert describe_skew("a", "b", seconds) == f"the clocks of a and b differ by about {words}; synchronize them"
    bound = describe_skew("a", "b", seconds, at_least=True)
    assert bound == f"the clocks of a and b differ by about {words} or more; synchronize them"
