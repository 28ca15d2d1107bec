"""A process that lists and watches a cluster: ``python -m tests.support.watching_process URL UID``.

It prints its peak memory and the longest step of its event loop after the list, and again as soon as it knows the pod UID.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time

import structlog

from csi_driver.kube.cluster_cache import ClusterCache
from csi_driver.kube.connection import Api, ApiConfiguration
from tests.support.longest_step import LongestStep
from tests.support.machine import peak_mb
from tests.support.waiting import until


async def main(url: str, uid: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    async with Api(ApiConfiguration(url=url)) as api, asyncio.timeout(60):
        cache, longest = ClusterCache(api), LongestStep()
        tasks = [asyncio.create_task(cache.run()), asyncio.create_task(longest.run())]
        await until(lambda: cache.synced, "the lists", 60)
        _report(cache, longest)
        await until(lambda: cache.pods.find(uid), "the pod", 60)
        _report(cache, longest)
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _report(cache: ClusterCache, longest: LongestStep) -> None:
    found = {
        "peak_mb": peak_mb(os.getpid()),
        "step_ms": longest.seconds * 1000,
        "pods": len(cache.pods),
        "cpu_s": time.process_time(),
    }
    print(json.dumps(found), flush=True)
    longest.seconds = 0.0


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
