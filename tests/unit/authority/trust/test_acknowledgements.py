"""Who has confirmed, who must, and that no confirmation that was thanked for is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping

import pytest
from prometheus_client import CollectorRegistry

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
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.ca.test_authority import MemoryStore

GENERATION = 100


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def replica(store: MemoryStore, generation: int = GENERATION) -> AcknowledgementStore:
    return AcknowledgementStore(store, lambda: generation, pause_s=0)


@contextlib.asynccontextmanager
async def running(*replicas: AcknowledgementStore) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        runners = [tasks.create_task(each.run()) for each in replicas]
        try:
            yield
        finally:
            for runner in runners:
                runner.cancel()


async def test_a_confirmation_is_written_when_it_is_acknowledged(store: MemoryStore) -> None:
    """So a crash loses none that a node was thanked for."""
    confirmations = replica(store)
    async with running(confirmations):
        await confirmations.confirm("node-1", "internal", GENERATION)
        assert await replica(store).read() == {node_hash("node-1"): GENERATION}


async def test_many_nodes_at_once_are_few_writes(store: MemoryStore) -> None:
    """Each replica writes what has come meanwhile, and merges what the others wrote."""
    replicas = [replica(store) for _ in range(3)]
    async with running(*replicas), asyncio.TaskGroup() as tasks:
        for number in range(300):
            tasks.create_task(replicas[number % 3].confirm(f"node-{number}", "internal", GENERATION))
    assert len(await replica(store).read()) == 300
    assert store.saves <= 6


async def test_the_same_again_is_not_written(store: MemoryStore) -> None:
    """Nodes say it with every new stream."""
    confirmations = replica(store)
    async with running(confirmations):
        for _ in range(3):
            await confirmations.confirm("node-1", "internal", GENERATION)
    assert store.saves == 1


@pytest.mark.parametrize("name,generation", [("partner", GENERATION), ("internal", GENERATION - 1)])
async def test_what_nothing_waits_for_is_not_written(name: str, generation: int, store: MemoryStore) -> None:
    """Other sets, and states that are no more."""
    await replica(store).confirm("node-1", name, generation)
    assert store.saves == 0


async def test_a_generation_to_come_cannot_be_confirmed(store: MemoryStore) -> None:
    """A node that makes one up would pass for confirmed for ever; a replica that is behind has it ask again."""
    with pytest.raises(CertmountError, match="knows of generation 100 of internal only") as refusal:
        await replica(store).confirm("node-1", "internal", GENERATION + 1)
    assert refusal.value.retryable


async def test_a_store_that_fails_is_told_to_all_who_wait(store: MemoryStore) -> None:
    """They come again; the next batch is another try."""
    confirmations = replica(store)
    store.down = True
    async with running(confirmations):
        with pytest.raises(CertmountError, match="lost"):
            await confirmations.confirm("node-1", "internal", GENERATION)
        store.down = False
        await confirmations.confirm("node-1", "internal", GENERATION)
    assert store.saves == 1


async def test_a_conflict_loses_nothing(store: MemoryStore) -> None:
    """Another replica came first: both are there."""
    confirmations = replica(store)
    document = json.dumps({"set": "internal", "nodes": {node_hash("node-2"): GENERATION}}).encode()
    store.others = [{ACKNOWLEDGEMENTS_FILE: Secret(document)}]
    async with running(confirmations):
        await confirmations.confirm("node-1", "internal", GENERATION)
    assert await confirmations.read() == {node_hash("node-1"): GENERATION, node_hash("node-2"): GENERATION}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"nodes": 7}', b'{"nodes": {"a": "x"}}', b"[" * 90_000])
async def test_damaged_confirmations_are_begun_anew(content: bytes, store: MemoryStore) -> None:
    """Nodes confirm again within half an hour; an error would hold a rotation for ever."""
    store.values = {ACKNOWLEDGEMENTS_FILE: Secret(content)}
    confirmations = replica(store)
    assert await confirmations.read() == {}
    async with running(confirmations):
        await confirmations.confirm("node-1", "internal", GENERATION)
    assert await confirmations.read() == {node_hash("node-1"): GENERATION}


async def test_what_is_kept_is_bounded(store: MemoryStore) -> None:
    """The nodes that have not been heard of for longest go first, and all of them fit a Secret."""
    old = {node_hash(f"old-{number}"): GENERATION - 1 for number in range(MAX_NODES)}
    store.values = {ACKNOWLEDGEMENTS_FILE: Secret(json.dumps({"nodes": old}).encode())}
    confirmations = replica(store)
    async with running(confirmations):
        await confirmations.confirm("node-1", "internal", GENERATION)
    kept = await confirmations.read()
    assert len(kept) == MAX_NODES
    assert kept[node_hash("node-1")] == GENERATION
    assert len(store.values[ACKNOWLEDGEMENTS_FILE].reveal()) < 700_000


async def test_a_node_can_be_forgotten(store: MemoryStore) -> None:
    """By its name or its mark, once."""
    store.values = {ACKNOWLEDGEMENTS_FILE: Secret(json.dumps({"nodes": {node_hash("a"): 1, node_hash("b"): 1}}).encode())}
    confirmations = replica(store)
    assert [await confirmations.forget(name) for name in ("a", node_hash("b"), "a")] == [True, True, False]
    assert await confirmations.read() == {}


MARKS: Mapping[str, int] = {node_hash("now"): 7, node_hash("late"): 6, node_hash("updating"): 6, node_hash("gone"): 6}


def test_nodes_with_the_driver_must_confirm() -> None:
    """And those that had it and are still there, as their pods go on while a driver is updated; not those that are gone."""
    nodes = ClusterNodes(frozenset({"now", "late", "new"}), frozenset({"updating", "windows"}))
    assert acknowledgements(nodes, MARKS, 7) == (frozenset({"now"}), frozenset({"now", "late", "new", "updating"}))


def test_where_nodes_cannot_be_listed_all_that_ever_confirmed_must() -> None:
    """Those that are not connected are called by their marks."""
    nodes = ClusterNodes(frozenset({"now"}), None)
    assert acknowledgements(nodes, MARKS, 7) == (
        frozenset({"now"}),
        frozenset({"now", node_hash("late"), node_hash("updating"), node_hash("gone")}),
    )


async def test_outside_a_cluster_the_connected_nodes_are_known(
    store: MemoryStore, metrics: AuthorityMetrics, registry: CollectorRegistry
) -> None:
    """For as long as their streams last; how many are missing is a metric."""
    trust = TrustBundles(metrics)
    trust.set_roots("internal", RootSet((b"1",), GENERATION))
    fleet = AcknowledgingNodes(replica(store), ConnectedNodes(trust), metrics)
    streams = [trust.watch("node-1"), trust.watch("node-1"), trust.watch("node-2")]
    for stream in streams:
        await anext(stream)
    assert await fleet.look(GENERATION) == (frozenset(), frozenset({"node-1", "node-2"}))
    assert registry.get_sample_value("certmount_ca_rotation_unconfirmed_nodes") == 2
    await streams.pop().aclose()
    await streams.pop().aclose()
    assert await fleet.look(GENERATION) == (frozenset(), frozenset({"node-1"}))
    await streams.pop().aclose()
    assert await fleet.look(GENERATION) == (frozenset(), frozenset())


async def test_writers_without_end_are_an_error(store: MemoryStore) -> None:
    """A store on which someone else always comes first is not tried for ever."""
    store.others = [{} for _ in range(20)]
    confirmations = replica(store)
    async with running(confirmations):
        with pytest.raises(CertmountError, match="updates conflicted with other writers") as failure:
            await confirmations.confirm("node-1", "internal", GENERATION)
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE
