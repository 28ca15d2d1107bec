"""The ConfigMaps with roots: what is written when, and what a rotation waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import structlog
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.pod_certificates.namespaces import NamespaceRoots
from csi_driver.authority.pod_certificates.publisher import SETTLE_S, PublishedAcknowledgements
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.pod_certificates.test_signer import NoBundles
from tests.unit.core import pki

OLD, NEW = (make_keyring(pki.NOW).roots_der for _ in range(2))


@dataclass
class Cluster:
    """Namespaces with the label, of which the authority can write to some."""

    labelled: list[str] = field(default_factory=lambda: ["bank", "web"])
    permitted: set[str] = field(default_factory=lambda: {"web"})
    writes: list[tuple[str, list[str]]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    now: float = 0.0

    async def write(self, namespace: str, data: Mapping[str, str | None]) -> None:
        self.writes.append((namespace, sorted(key for key, content in data.items() if content)))
        self.removed += [key for key, content in data.items() if content is None]
        if namespace not in self.permitted:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server rejects the request: HTTP 403")


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def trust() -> TrustBundles:
    return TrustBundles(AuthorityMetrics(CollectorRegistry()))


async def test_roots_are_written_when_they_change_and_every_ten_minutes(cluster: Cluster, trust: TrustBundles) -> None:
    roots = NamespaceRoots(cluster, trust, lambda: cluster.labelled, {"internal"}.__contains__, lambda: cluster.now)
    await roots.publish()
    assert cluster.writes == [], "no root set is known yet"
    trust.set_roots("internal", RootSet(OLD, 1))
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await roots.publish()
        assert cluster.writes == [("bank", ["internal.crt"]), ("web", ["internal.crt"])]
        trust.set_roots("partner", RootSet(NEW, 1))
        await roots.publish()
        assert cluster.writes[2:] == [
            ("bank", ["internal.crt", "partner.crt"]),
            ("web", ["internal.crt", "partner.crt"]),
        ]
        cluster.now, cluster.permitted = 600, {"bank", "web"}
        await roots.publish()
    assert [name for name, _ in cluster.writes[4:]] == ["bank", "web"]
    assert [(log["event"], log["namespace"]) for log in logs] == [
        ("roots not written", "bank"),
        ("roots written", "web"),
        ("roots written", "web"),
        ("roots written", "bank"),
    ]


async def test_namespace_that_loses_and_gets_the_label_is_written_again(cluster: Cluster, trust: TrustBundles) -> None:
    roots = NamespaceRoots(cluster, trust, lambda: cluster.labelled, {"internal"}.__contains__, lambda: 0.0)
    trust.set_roots("internal", RootSet(OLD, 1))
    for labelled in (["web"], [], ["web"]):
        cluster.labelled = labelled
        await roots.publish()
    assert [name for name, _ in cluster.writes] == ["web", "web"]


async def test_time_is_linear_in_the_number_of_namespaces(cluster: Cluster, trust: TrustBundles) -> None:
    """With a search of each namespace in a list, 10,000 namespaces stopped the authority for a second, every ten seconds."""
    comparisons = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal comparisons
            comparisons += 1
            return str.__eq__(self, other)

    cluster.labelled = [Name(f"tenant-{number:03}") for number in range(200)]
    roots = NamespaceRoots(cluster, trust, lambda: cluster.labelled, {"internal"}.__contains__, lambda: 0.0)
    trust.set_roots("internal", RootSet(OLD, 1))
    with structlog.testing.capture_logs():
        await roots.publish()
        comparisons = 0
        await roots.publish()
    assert len(cluster.writes) == 200
    assert comparisons < 1000


async def test_only_a_root_set_that_is_not_configured_any_more_is_removed(
    cluster: Cluster, trust: TrustBundles
) -> None:
    """The roots of an issuer that does not answer are not known after a restart."""
    configured = {"internal", "corporate"}
    roots = NamespaceRoots(cluster, trust, lambda: ["web"], lambda name: name in configured)
    for name in sorted(configured):
        trust.set_roots(name, RootSet(OLD, 1))
    await roots.publish()
    trust.remove_roots("corporate")
    await roots.publish()
    assert (cluster.writes, cluster.removed) == ([("web", ["corporate.crt", "internal.crt"])], [])
    configured.remove("corporate")
    await roots.publish()
    assert (cluster.writes[1:], cluster.removed) == ([("web", ["internal.crt"])], ["corporate.crt"])


@pytest.mark.parametrize("labelled, waits", [([], False), (["bank"], True)])
async def test_rotation_waits_for_namespaces_by_time_only(cluster: Cluster, labelled: list[str], waits: bool) -> None:
    """A tenant that sets the label without permissions must not stop a rotation."""

    class NoNodes:
        async def read(self, _generation: int) -> Acknowledgements:
            return Acknowledgements(frozenset(), frozenset())

    gate = PublishedAcknowledgements(NoNodes(), NoBundles(), lambda: labelled, lambda: cluster.now)
    assert bool((await gate.read(2)).missing) == waits
    cluster.now = SETTLE_S
    assert not (await gate.read(2)).missing
    assert bool((await gate.read(3)).missing) == waits, "another generation starts again"
