"""A thread that namespaces share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from csi_driver.node.pods import Pod
from csi_driver.node.threads import in_thread
from csi_driver.node.turns import Turns

T = TypeVar("T")

_QUEUED = 2  # The next function starts without waiting for the event loop.


class FairThread:
    """Runs blocking functions in a thread, one at a time, in turns of the namespaces. Belongs to one event loop.

    Several threads would use a third more CPU time, because they would compete for Python's global lock.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._turns = Turns(_QUEUED)

    async def run(self, pod: Pod, function: Callable[[], T]) -> T:
        """Run a function as :func:`in_thread` does, when it is the pod's turn."""
        async with self._turns.turn(pod):
            return await in_thread(self._thread, function)
