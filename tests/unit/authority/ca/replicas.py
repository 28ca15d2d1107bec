"""Replicas of the authority's CA with one store, one clock and a cluster of two nodes."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import Keyring, make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.clock import Clock
from tests.unit.authority.memory_store import MemoryStore


class Nodes:
    """A cluster of two nodes."""

    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self.unavailable = False

    async def read(self, generation: int) -> Acknowledgements:
        if self.unavailable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server is unavailable")
        acknowledged = frozenset(name for name, each in self.generations.items() if each >= generation)
        return Acknowledgements(acknowledged, frozenset({"one", "two"}))


def authority(
    store: MemoryStore,
    clock: Clock,
    registry: CollectorRegistry | None = None,
    nodes: Nodes | None = None,
    on_roots_changed: Callable[[RootSet], None] = lambda _roots: None,
) -> CertificateAuthority:
    source, metrics = StoredCA(store, nodes), AuthorityMetrics(registry or CollectorRegistry())
    return CertificateAuthority(source, metrics, clock.utc, elapsed=clock, on_roots_changed=on_roots_changed)


async def loaded(store: MemoryStore, clock: Clock, registry: CollectorRegistry | None = None) -> CertificateAuthority:
    ca = authority(store, clock, registry)
    await ca.refresh()
    return ca


async def rotate(store: MemoryStore, clock: Clock) -> Keyring:
    """Do what ``certmount ca rotate`` does, and return the next CA."""
    next_keyring = make_keyring(clock.utc())
    await StoredCA(store).change(clock.utc(), lambda state: state.begin_rotation(next_keyring, int(clock.now)))
    return next_keyring


async def refresh_for(ca: CertificateAuthority, clock: Clock, seconds: float) -> None:
    while seconds > 0:
        clock.forward(min(5, seconds))
        seconds -= 5
        await ca.refresh()
