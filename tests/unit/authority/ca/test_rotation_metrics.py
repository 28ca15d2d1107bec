"""A metric shows how many nodes block a rotation of the internal CA. The ClusterTrustBundle counts as a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.rotation import RotationPhase, RotationState
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.pod_certificates.publisher import SETTLE_S, PublishedAcknowledgements
from csi_driver.core.cluster.pod_certificates import PublishedBundle
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.ca.replicas import Nodes, refresh_for, rotate
from tests.unit.authority.clock import Clock
from tests.unit.authority.memory_store import MemoryStore


class _Bundles:
    """An API server where the ClusterTrustBundle has the given generation."""

    generation = 0

    async def version(self) -> str:
        return "v1beta1"

    async def find(self, _version: str, root_set: str, /) -> PublishedBundle | None:
        return PublishedBundle(root_set, self.generation, "")

    async def list(self, _version: str, /) -> Sequence[PublishedBundle]:
        raise NotImplementedError

    async def write(self, _version: str, _bundle: PublishedBundle, /) -> None:
        raise NotImplementedError

    async def delete(self, _version: str, _root_set: str, /) -> None:
        raise NotImplementedError


class _World:
    """One replica, two nodes and a ClusterTrustBundle."""

    def __init__(self, store: MemoryStore, clock: Clock) -> None:
        self.clock, self.nodes, self.bundles, self.registry = clock, Nodes(), _Bundles(), CollectorRegistry()
        self.source = StoredCA(store, PublishedAcknowledgements(self.nodes, self.bundles, list, clock))
        metrics = AuthorityMetrics(self.registry)
        self.ca = CertificateAuthority(self.source, metrics, clock.utc, elapsed=clock)

    def rotation(self) -> RotationState:
        assert self.ca.state
        return self.ca.state.rotation

    async def change(self, step: Callable[[RotationState], RotationState]) -> None:
        await self.source.change(self.clock.utc(), lambda state: replace(state, rotation=step(state.rotation)))

    async def waits_for(self) -> float | None:
        """Refresh the CA, and return the metric."""
        await self.ca.refresh()
        return self.registry.get_sample_value("certmount_ca_rotation_unacknowledged_nodes")


@pytest.fixture
async def world(store: MemoryStore, clock: Clock) -> _World:
    """A rotation that waits for both nodes and the ClusterTrustBundle."""
    world = _World(store, clock)
    assert await world.waits_for() == 0
    await rotate(store, clock)
    assert await world.waits_for() == 0
    assert world.rotation().phase is RotationPhase.ANNOUNCING
    await refresh_for(world.ca, clock, 60)
    assert await world.waits_for() == 3
    assert world.rotation().phase is RotationPhase.DISTRIBUTING
    return world


async def test_bundle_that_blocks_the_rotation_counts(world: _World) -> None:
    generation = world.rotation().generation
    world.nodes.generations = {"one": generation}
    assert await world.waits_for() == 2
    world.nodes.generations = {"one": generation, "two": generation}
    await refresh_for(world.ca, world.clock, 3600)
    assert await world.waits_for() == 1
    world.bundles.generation = generation
    assert await world.waits_for() == 1, "pods do not have it yet"
    world.clock.forward(SETTLE_S)
    assert await world.waits_for() == 0
    assert world.rotation().phase is RotationPhase.RETIRING


async def test_stopped_rotation_waits_for_nothing(world: _World) -> None:
    await world.change(rotation.stop)
    for _ in range(3):
        world.clock.forward(5)
        assert await world.waits_for() == 0
    await world.change(rotation.resume)
    assert await world.waits_for() == 3


async def test_discarded_rotation_waits_for_nothing(world: _World) -> None:
    await world.change(lambda state: rotation.discard(state, int(world.clock.now)))
    assert await world.waits_for() == 0


async def test_unknown_nodes_block_the_rotation(world: _World) -> None:
    """The alert must fire if the acknowledgements cannot be read for an hour."""
    world.nodes.unavailable = True
    assert await world.waits_for() == 1
