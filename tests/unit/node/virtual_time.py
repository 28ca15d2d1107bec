"""An event loop whose clock jumps to the next timer, so that hours pass in milliseconds and always alike."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_TURN_S = 1e-9
"""Even a turn of the loop that waits for nothing takes time; without it, one that asks again too soon would do so for ever."""


class _Jumping(selectors.DefaultSelector):
    """Where the loop would sleep, it moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("everything waits, and nothing can come")
            self.now += max(timeout, _TURN_S)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time starts at 0 and passes only while all tasks wait. Without threads."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
