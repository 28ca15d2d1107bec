"""An event loop with virtual time: the clock jumps to the next timer, so hours pass in milliseconds, deterministically."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_ITERATION_S = 1e-9
"""An iteration without a timer takes this long. Otherwise, code that retries too soon would never end."""


class _VirtualSelector(selectors.DefaultSelector):
    """Moves the clock instead of sleeping."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("deadlock: all tasks wait, and there is no timer")
            self.now += max(timeout, _ITERATION_S)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at time 0. Time passes only while all tasks wait. Threads are not supported."""

    def __init__(self) -> None:
        self._virtual_selector = _VirtualSelector()
        super().__init__(self._virtual_selector)

    def time(self) -> float:
        return self._virtual_selector.now


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtually(test(*args, **kwargs))

    return run
