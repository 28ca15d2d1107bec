"""Node acknowledgements: which nodes must acknowledge, and no acknowledged generation is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping

import pytest

from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.trust.acknowledgements import (
    ACKNOWLEDGEMENTS_FILE,
    MAX_NODES,
    AcknowledgementStore,
    AcknowledgingNodes,
    ConnectedNodes,
    acknowledgements,
    node_hash,
)
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.cluster.objects import ClusterNodes
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import in_background
from tests.unit.authority.memory_store import MemoryStore

GENERATION = 100


def replica(store: MemoryStore, generation: int = GENERATION) -> AcknowledgementStore:
    return AcknowledgementStore(store, lambda: generation, write_interval_s=0)


def running(*replicas: AcknowledgementStore) -> contextlib.AbstractAsyncContextManager[None]:
    return in_background(*(each.run() for each in replicas))


def stored(nodes: Mapping[str, int]) -> Mapping[str, Secret[bytes]]:
    return {ACKNOWLEDGEMENTS_FILE: Secret(json.dumps({"set": "internal", "nodes": nodes}).encode())}


async def test_acknowledge_returns_after_the_acknowledgement_is_stored(store: MemoryStore) -> None:
    """A crash must not lose an acknowledgement that the node considers done."""
    nodes = replica(store)
    async with running(nodes):
        await nodes.acknowledge("node-1", "internal", GENERATION)
        assert await replica(store).read() == {node_hash("node-1"): GENERATION}


async def test_acknowledgements_of_many_nodes_are_written_in_batches(store: MemoryStore) -> None:
    """Replicas merge their batches."""
    replicas = [replica(store) for _ in range(3)]
    calls = [replicas[number % 3].acknowledge(f"node-{number}", "internal", GENERATION) for number in range(300)]
    async with running(*replicas):
        await asyncio.gather(*calls)
    assert len(await replica(store).read()) == 300
    assert store.saves <= 6


async def test_repeated_acknowledgement_is_not_written(store: MemoryStore) -> None:
    """Nodes repeat it with every new stream."""
    nodes = replica(store)
    async with running(nodes):
        for _ in range(3):
            await nodes.acknowledge("node-1", "internal", GENERATION)
    assert store.saves == 1


@pytest.mark.parametrize("name,generation", [("partner", GENERATION), ("internal", GENERATION - 1)])
async def test_unneeded_acknowledgement_is_not_written(name: str, generation: int, store: MemoryStore) -> None:
    await replica(store).acknowledge("node-1", name, generation)
    assert store.saves == 0


async def test_future_generation_cannot_be_acknowledged(store: MemoryStore) -> None:
    """A node could otherwise acknowledge all generations in advance. The error is retryable for replicas that lag behind."""
    with pytest.raises(CertmountError, match="knows only generation 100 of internal") as refusal:
        await replica(store).acknowledge("node-1", "internal", GENERATION + 1)
    assert refusal.value.retryable


async def test_store_failure_is_reported_and_the_next_batch_retries(store: MemoryStore) -> None:
    nodes = replica(store)
    store.unavailable = True
    async with running(nodes):
        with pytest.raises(CertmountError, match="unavailable"):
            await nodes.acknowledge("node-1", "internal", GENERATION)
        store.unavailable = False
        await nodes.acknowledge("node-1", "internal", GENERATION)
    assert store.saves == 1


async def test_conflicting_write_keeps_both_acknowledgements(store: MemoryStore) -> None:
    nodes = replica(store)
    store.conflicting = [stored({node_hash("node-2"): GENERATION})]
    async with running(nodes):
        await nodes.acknowledge("node-1", "internal", GENERATION)
    assert await nodes.read() == {node_hash("node-1"): GENERATION, node_hash("node-2"): GENERATION}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"nodes": 7}', b'{"nodes": {"a": "x"}}', b'{"nodes": {"a": 1e999}}', b"[" * 90_000]
)
async def test_damaged_acknowledgements_are_replaced(content: bytes, store: MemoryStore) -> None:
    """Nodes repeat them within 30 minutes; an error would stop a rotation forever."""
    store.values = {ACKNOWLEDGEMENTS_FILE: Secret(content)}
    nodes = replica(store)
    assert await nodes.read() == {}
    async with running(nodes):
        await nodes.acknowledge("node-1", "internal", GENERATION)
    assert await nodes.read() == {node_hash("node-1"): GENERATION}


async def test_number_of_stored_nodes_is_limited(store: MemoryStore) -> None:
    """The oldest acknowledgements are removed first, and the rest fits into a Secret."""
    store.values = stored({node_hash(f"old-{number}"): GENERATION - 1 for number in range(MAX_NODES)})
    nodes = replica(store)
    async with running(nodes):
        await nodes.acknowledge("node-1", "internal", GENERATION)
    kept = await nodes.read()
    assert (len(kept), kept[node_hash("node-1")]) == (MAX_NODES, GENERATION)
    assert len(store.values[ACKNOWLEDGEMENTS_FILE].reveal()) < 700_000


async def test_forget_removes_a_node_by_name_or_hash(store: MemoryStore) -> None:
    store.values = stored({node_hash("a"): 1, node_hash("b"): 1})
    nodes = replica(store)
    assert [await nodes.forget(name) for name in ("a", node_hash("b"), "a")] == [True, True, False]
    assert await nodes.read() == {}


STORED: Mapping[str, int] = {node_hash("now"): 7, node_hash("late"): 6, node_hash("updating"): 6, node_hash("gone"): 6}


@pytest.mark.parametrize(
    "without, expected",
    [
        (frozenset({"updating", "windows"}), {"now", "late", "new", "updating"}),
        (None, {"now", "late", "new", node_hash("updating"), node_hash("gone")}),
    ],
    ids=["listed", "nodes cannot be listed"],
)
def test_nodes_that_have_or_had_the_driver_must_acknowledge(without: frozenset[str] | None, expected: set[str]) -> None:
    """Their pods keep running while a driver is updated. Removed nodes don't count, if they are known: others have a hash."""
    nodes = ClusterNodes(frozenset({"now", "late", "new"}), without)
    assert acknowledgements(nodes, STORED, 7) == Acknowledgements(frozenset({"now"}), frozenset(expected))


async def test_connected_nodes_must_acknowledge_outside_a_cluster(
    store: MemoryStore, metrics: AuthorityMetrics
) -> None:
    trust = TrustBundles(metrics)
    trust.set_roots("internal", RootSet((b"1",), GENERATION))
    nodes = AcknowledgingNodes(replica(store), ConnectedNodes(trust))
    streams = [trust.watch(name) for name in ("node-1", "node-1", "node-2")]
    for stream in streams:
        await anext(stream)
    for expected in ({"node-1", "node-2"}, {"node-1"}, {"node-1"}, set[str]()):
        assert await nodes.read(GENERATION) == Acknowledgements(frozenset(), frozenset(expected))
        if streams:
            await streams.pop().aclose()
