"""Whether the event loop still turns, for the kubelet's liveness probe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

_HEARTBEAT_S = 5.0


def loop_liveness() -> Callable[[], Sequence[str]]:
    """A function for another thread: asks the running event loop for a sign of life, and says why there is none."""
    loop = asyncio.get_running_loop()

    def reasons() -> Sequence[str]:
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(_HEARTBEAT_S)
        except (TimeoutError, RuntimeError):
            return [f"the event loop has not answered for {_HEARTBEAT_S:.0f} s"]
        return []

    return reasons
