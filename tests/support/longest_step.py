"""The longest time for which a task does not yield to the event loop."""

from __future__ import annotations

import asyncio
import gc
import time


class LongestStep:
    """The longest CPU time for which other tasks did not yield to the event loop, in seconds, without garbage collection."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._collected = 0.0

    async def run(self) -> None:
        gc.callbacks.append(self._measure_collection)
        try:
            while True:
                before = time.thread_time() - self._collected
                await asyncio.sleep(0)
                self.seconds = max(self.seconds, time.thread_time() - self._collected - before)
        finally:
            gc.callbacks.remove(self._measure_collection)

    def _measure_collection(self, phase: str, _: object) -> None:
        self._collected += -time.thread_time() if phase == "start" else time.thread_time()
