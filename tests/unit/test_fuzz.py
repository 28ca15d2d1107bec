"""The fuzzing targets accept their seeds, and the checks of ``make fuzz`` find what they look for. Needs no fuzzer."""

from __future__ import annotations

import random

import pytest

from csi_driver.core.policy.rules import PolicyRule
from tests.fuzz.limits import Target, TooSlow, Violation, check
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_give_a_value_or_a_worded_error(name: str) -> None:
    target = TARGETS[name]
    for seed in (b"", *target.seeds()):
        target.run(seed) if not target.errors else _run(target, seed)


def _run(target: Target, seed: bytes) -> None:
    try:
        target.run(seed)
    except target.errors as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("answer", [True, False], ids=["allows all names", "allows no name"])
def test_a_wrong_policy_engine_is_found(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicyRule, "allows", lambda *_args: answer)
    with pytest.raises(AssertionError):
        _generate_requests(2000)


def _generate_requests(count: int) -> None:
    for number in range(count):
        TARGETS["grants"].run(random.Random(number).randbytes(1024))  # noqa: S311  # no secret


def _fail(message: str) -> None:
    raise ValueError(message)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda _: sum(range(2_000_000)), TooSlow),
        (lambda _: len(bytearray(1200 * 1024 * 1024)), Violation),
        (lambda _: _fail(""), Violation),
        (lambda _: _fail("a\tb"), Violation),
        (lambda _: _fail("'NoneType' object is not subscriptable"), Violation),
        (lambda data: data[0], IndexError),
    ],
    ids=["slow", "memory", "no text", "control character", "not for people", "another exception"],
)
def test_violations_are_found(function: object, expected: type[Exception]) -> None:
    with pytest.raises(expected):
        check(Target("test", function, (ValueError,), list), b"")  # type: ignore[arg-type]  # each has another type
