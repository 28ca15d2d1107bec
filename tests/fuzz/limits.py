"""The property that every input of a target must have."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_CPU_S = 0.005
MAX_GROWTH_KIB = 10 * 1024
_MAX_MESSAGE = 64 * 1024
_MEASUREMENTS = 3
# The forms of a Python object in a message: a programmer understands it, the reader does not.
_NOT_WORDED = re.compile(r"Traceback|<[\w.]+ object at 0x|object has no attribute|NoneType")


class Violation(Exception):
    """An input does not have the property."""


class TooSlow(Violation):
    """Measured with coverage instrumentation, so an uninstrumented process must confirm it."""


@dataclass(frozen=True)
class Target:
    """A function under test. ``errors`` are the exceptions that it documents; their texts are for people."""

    name: str
    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    max_length: int = 16 * 1024
    measured: bool = True  # False if most of the time and memory is that of the test itself


def check(target: Target, data: bytes) -> None:
    """Run one input; raises Violation, or the exception that the target does not document."""
    peak_kib = _peak_kib()
    seconds = _cpu_s(target, data)
    if not target.measured:
        return
    if (growth := _peak_kib() - peak_kib) > MAX_GROWTH_KIB:
        raise Violation(f"{target.name}: the peak memory grew by {growth // 1024} MB")
    if seconds > MAX_CPU_S:
        # Not the first use, and no garbage collection.
        seconds = min(_cpu_s(target, data) for _ in range(_MEASUREMENTS))
    if seconds > MAX_CPU_S:
        raise TooSlow(f"{target.name}: {seconds * 1000:.1f} ms of processor time for {len(data)} bytes")


def _cpu_s(target: Target, data: bytes) -> float:
    started = time.thread_time()
    try:
        target.run(data)
    except target.errors as error:
        _check_worded(target, str(error))
    return time.thread_time() - started


def _check_worded(target: Target, message: str) -> None:
    if not message.strip() or len(message) > _MAX_MESSAGE or _NOT_WORDED.search(message):
        raise Violation(f"{target.name}: the error is not worded for people: {message[:500]!r}")
    if unprintable := {character for character in message if not character.isprintable()}:
        problem = f"contains control characters {sorted(unprintable)}: {message[:500]!r}"
        raise Violation(f"{target.name}: the error {problem}")


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
