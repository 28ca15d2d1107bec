"""Run blocking functions in threads, and work that must not be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(executor: Executor | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread and return its result.

    If the caller is cancelled because the kubelet's call timed out, a function that has not started never starts, and
    one that has started is waited for. Otherwise a partial mount could race with the next call for the same volume.
    """
    loop = asyncio.get_running_loop()
    state: dict[str, str] = {}  # setdefault is atomic: either the thread or the cancelled caller is first

    def run() -> T | None:
        return function(*args, **kwargs) if state.setdefault("first", "thread") == "thread" else None

    future = loop.run_in_executor(executor, run)
    try:
        return cast("T", await asyncio.shield(future))
    except asyncio.CancelledError:
        if state.setdefault("first", "caller") == "thread":
            await _wait(future)
        raise


async def to_the_end(work: Awaitable[T]) -> T:
    """Return the result of the work. If the caller is cancelled, the work continues, and the caller waits for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _wait(task)
        raise


async def _wait(future: asyncio.Future[T]) -> None:
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
