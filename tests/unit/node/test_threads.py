"""A blocking function that has started in a thread always runs to its end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from csi_driver.node.threads import in_thread


async def test_in_thread_returns_results_and_raises_exceptions() -> None:
    assert await in_thread(None, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(None, divmod, 7, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelled_caller_waits_for_the_function(fails: bool) -> None:
    """However often it is cancelled. Otherwise the next call for the volume could find a partial mount."""
    started, resume, done = threading.Event(), threading.Event(), threading.Event()

    def function() -> None:
        started.set()
        resume.wait(20)
        done.set()
        if fails:
            raise OSError("the caller is gone")

    caller = asyncio.create_task(in_thread(None, function))
    await asyncio.to_thread(started.wait, 20)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
    resume.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done.is_set()


async def test_function_of_a_cancelled_caller_never_starts_if_it_still_waits_for_a_thread() -> None:
    resume, ran = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(resume.wait, 20)
        caller = asyncio.create_task(in_thread(executor, ran.set))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        resume.set()
    assert not ran.is_set()
