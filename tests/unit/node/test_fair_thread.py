"""Namespaces take turns at the thread that mounts volumes."""

from __future__ import annotations

import asyncio
import threading

from csi_driver.node.fair_thread import FairThread
from tests.unit.node.certificates import pod_named


async def test_namespace_does_not_wait_for_the_functions_of_another() -> None:
    thread, go_on, order = FairThread("test"), threading.Event(), list[str]()

    def work(namespace: str) -> None:
        go_on.wait(10)
        order.append(namespace)

    flood = [asyncio.create_task(thread.run(pod_named("pod", "flood"), lambda: work("flood"))) for _ in range(20)]
    await asyncio.sleep(0)
    victim = asyncio.create_task(thread.run(pod_named("pod", "victim"), lambda: work("victim")))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*flood, victim)
    assert order.index("victim") == 2
    assert len(order) == 21


async def test_one_function_runs_at_a_time() -> None:
    thread, threads = FairThread("test"), set[int]()
    pods = [pod_named("pod", f"namespace-{number}") for number in range(10)]
    await asyncio.gather(*(thread.run(pod, lambda: threads.add(threading.get_ident())) for pod in pods))
    assert len(threads) == 1
