"""Namespaces take turns also if their work arrives one item after the other, and what they keep in memory is limited."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest

from csi_driver._proto import csi_pb2
from csi_driver.core.errors import CertmountError
from csi_driver.node.publishing.publish_turns import MAX_CALLS_KIB, PublishTurns
from csi_driver.node.turns import Turns
from tests.support.waiting import until
from tests.unit.node.certificates import pod_named


async def _work(turns: Turns, namespace: str, order: list[str]) -> None:
    async with turns.turn(pod_named("pod", namespace)):
        order.append(namespace)
        time.sleep(0.002)  # noqa: ASYNC251  # the work occupies the event loop


async def test_last_arrival_of_a_burst_does_not_wait_for_the_work_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("csi_driver.node.turns._LONGEST_PAUSE_S", 60)
    monkeypatch.setattr("csi_driver.node.turns._PERIOD_S", 60)
    turns, order = Turns(sys.maxsize, when_idle=True), list[str]()
    async with asyncio.TaskGroup() as tasks:
        for namespace in [*["flood"] * 100, "victim"]:
            tasks.create_task(_work(turns, namespace, order))
            for _ in range(3):  # like gRPC, which hands over the next call some cycles later
                await asyncio.sleep(0)
    assert len(order) == 101
    assert order.index("victim") < 10


async def test_turns_start_although_work_never_stops_arriving() -> None:
    turns, order, arrived = Turns(sys.maxsize, when_idle=True), list[str](), list[asyncio.Task[None]]()
    async with asyncio.timeout(10):
        while len(order) < 4:
            arrived.append(asyncio.create_task(_work(turns, "flood", order)))
            await asyncio.sleep(0.0002)
    for one in arrived:
        one.cancel()
    await asyncio.gather(*arrived, return_exceptions=True)


async def test_few_turns_start_at_once_and_more_when_the_loop_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.node.turns._LONGEST_PAUSE_S", 60)
    monkeypatch.setattr("csi_driver.node.turns._PERIOD_S", 60)
    turns, go_on, order = Turns(sys.maxsize, when_idle=True), asyncio.Event(), list[str]()

    async def hold(namespace: str) -> None:
        async with turns.turn(pod_named("pod", namespace)):
            order.append(namespace)
            await go_on.wait()

    tasks = [asyncio.create_task(hold("flood")) for _ in range(20)]
    tasks += [asyncio.create_task(hold("victim")) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert order == [*["flood"] * 4, *["victim"] * 2]

    await until(lambda: len(order) == 22, "all turns have started")
    go_on.set()
    await asyncio.gather(*tasks)


async def test_namespace_whose_turns_end_at_once_waits_until_the_loop_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.node.turns._PAUSE_S", 60)
    monkeypatch.setattr("csi_driver.node.turns._PERIOD_S", 60)
    turns, order = Turns(sys.maxsize, when_idle=True), list[str]()
    for _ in range(4):
        await _work(turns, "flood", order)
    waiting = asyncio.create_task(_work(turns, "flood", order))
    for _ in range(4):
        await asyncio.wait_for(_work(turns, "victim", order), 10)
    assert order == [*["flood"] * 4, *["victim"] * 4]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def _call(namespace: str, kib: int) -> csi_pb2.NodePublishVolumeRequest:
    context = {"csi.storage.k8s.io/pod.namespace": namespace, "x": "x" * (kib * 1024 - 100)}
    return csi_pb2.NodePublishVolumeRequest(volume_context=context)


async def test_publish_calls_of_a_namespace_have_a_share_of_the_memory() -> None:
    turns, go_on, refused = PublishTurns(), asyncio.Event(), list[str]()

    async def publish(namespace: str) -> None:
        try:
            async with turns.turn(_call(namespace, 256)):
                await go_on.wait()
        except CertmountError as error:
            refused.append(str(error))

    calls = [asyncio.create_task(publish("flood")) for _ in range(40)]
    calls += [asyncio.create_task(publish("victim")) for _ in range(10)]
    await asyncio.sleep(0)
    problem = f"holds 8192 of {MAX_CALLS_KIB} KiB of publish calls on this node and requests 256 more, which exceeds its share"
    assert refused == [f"ShareExceeded: namespace flood: {problem}; wait until some of them end"] * 8
    go_on.set()
    await asyncio.gather(*calls)
    await publish("flood")
    assert len(refused) == 8
