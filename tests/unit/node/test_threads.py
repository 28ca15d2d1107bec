"""Blocking work is waited for to its end, whoever gives up on it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from csi_driver.node.threads import in_thread


async def test_result_and_failure_come_back() -> None:
    """As if it had been called in place."""
    assert await in_thread(None, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(None, divmod, 7, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_leaves_only_when_the_work_is_done(fails: bool) -> None:
    """However often it is cancelled; so the next call for the same volume meets no half-made mount."""
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(20)
        done.set()
        if fails:
            raise OSError("too late to matter")

    caller = asyncio.create_task(in_thread(None, work))
    await asyncio.to_thread(begun.wait, 20)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done.is_set()
