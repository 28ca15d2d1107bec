"""Wait for a condition, and run background work meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_STEP_S = 0.01


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait until the condition is true. Fail after a timeout; ``what`` describes the condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        await asyncio.sleep(_STEP_S)


def wait_until(condition: Callable[[], T | None], *, seconds: float, what: str, pause: float = 0.3) -> T:
    """Poll ``condition`` and return its first true result. Raises AssertionError with the last result after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}; the last result was {result!r}")
        time.sleep(pause)


@contextlib.asynccontextmanager
async def in_background(*work: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run endless work until the block ends; work that ends earlier fails the test."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
        for task in tasks:
            assert not task.done(), f"background work ended: {task.exception()!r}"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
