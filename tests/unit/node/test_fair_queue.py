"""Namespaces take turns, then the pods of a namespace."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from csi_driver.node.fair_queue import FairQueue
from csi_driver.node.issuance.key_generator import KeyGenerator
from csi_driver.node.issuance.pending_requests import PreparedRequest
from csi_driver.node.pods import Pod
from tests.support.waiting import until
from tests.unit.node.certificates import pod_named


@dataclass(eq=False)
class _Item:
    pod: Pod
    urgency: float = 0.0


def _items(*owners: str) -> list[_Item]:
    """Return an item for each ``namespace/pod``."""
    return [_Item(pod_named(owner, owner.partition("/")[0])) for owner in owners]


def _drain(queue: FairQueue[_Item]) -> list[str]:
    order = []
    while queue.next() is not None:
        item = queue.start_next()
        order.append(item.pod.name)
        queue.end(item, started=True)
    return order


def test_namespaces_take_turns_and_then_their_pods() -> None:
    queue: FairQueue[_Item] = FairQueue()
    for item in _items("a/1", "a/1", "a/1", "a/2", "b/1", "b/1", "c/1"):
        queue.add(item)
    assert _drain(queue) == ["a/1", "b/1", "c/1", "a/2", "b/1", "a/1", "a/1"]


def test_namespace_with_fewer_items_in_progress_is_next() -> None:
    queue: FairQueue[_Item] = FairQueue()
    for item in _items(*["a/1"] * 10):
        queue.add(item)
    for _ in range(5):
        queue.start_next()
    for item in _items(*["b/1"] * 6):
        queue.add(item)
    assert [queue.start_next().pod.namespace for _ in range(5)] == ["b"] * 5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("123"), st.booleans())))
def test_every_item_is_served_once_or_removed_and_nothing_remains(calls: list[tuple[str, str, bool]]) -> None:
    queue: FairQueue[_Item] = FairQueue()
    served = 0
    for namespace, pod, cancelled in calls:
        (item,) = _items(f"{namespace}/{pod}")
        queue.add(item)
        if cancelled:
            queue.end(item, started=False)
        served += not cancelled
    assert len(_drain(queue)) == served
    assert (len(queue), queue.next(), queue.waiting()) == (0, None, [])
    assert [len(state) for state in (queue._waiting, queue._running, queue._served, queue._of_pod)] == [0] * 4


class _Keys:
    """A key generator whose thread waits until the test lets it run."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self.generator = KeyGenerator(executor, limit=1)
        self.gate = threading.Event()
        executor.submit(self.gate.wait, 20)
        self.kept: list[str] = []

    def rsa(self, namespace: str, number: int = 0) -> asyncio.Task[PreparedRequest]:
        pod = pod_named(f"{namespace}-{number}", namespace)
        call = self.generator.prepare(pod, None, KeyType.RSA_2048, Names(), lambda _: self.kept.append(namespace))
        return asyncio.create_task(call)


def test_items_can_be_counted_while_the_queue_changes() -> None:
    """The thread of the metrics counts them."""
    queue, (first, second) = FairQueue[_Item](), _items("a/1", "b/1")

    class Changing(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            queue.add(second)
            return super().__iter__()

    queue.add(first)
    queue._waiting["a"] = Changing(queue._waiting["a"])
    assert queue.waiting() == [first]


async def test_ec_key_never_waits_for_an_rsa_key() -> None:
    with ThreadPoolExecutor(1) as executor:
        keys = _Keys(executor)
        slow = keys.rsa("flood")
        await asyncio.sleep(0)
        kept: list[PreparedRequest] = []
        pod = pod_named("victim")
        prepared = await keys.generator.prepare(pod, None, KeyType.EC_P256, Names(), kept.append)
        assert kept == [prepared]
        assert not slow.done()
        keys.gate.set()
        await slow


async def test_cancelled_callers_leave_the_queue_and_a_key_in_progress_is_kept() -> None:
    with ThreadPoolExecutor(1) as executor:
        keys = _Keys(executor)
        flood = [keys.rsa("flood", number) for number in range(50)]
        await asyncio.sleep(0)
        victim = keys.rsa("victim")
        await asyncio.sleep(0)
        keys.gate.set()
        await until(lambda: keys.kept, "the key that is in progress")
        for call in flood[1:]:
            call.cancel()
        await victim
        await asyncio.gather(*flood, return_exceptions=True)
    assert keys.kept == ["flood", "victim"]
    assert len(keys.generator._turns._queue) == 0


async def test_failed_generation_does_not_stop_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as executor:
        keys = _Keys(executor)
        keys.gate.set()
        with monkeypatch.context() as patch:
            patch.setattr("csi_driver.node.issuance.key_generator.generate_key", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await keys.rsa("web")
        await keys.rsa("web")
    assert keys.kept == ["web"]
