"""An upgrade of the cluster changes the version of ClusterTrustBundles while the authority runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.pod_certificates import publisher
from csi_driver.authority.pod_certificates.publisher import SETTLE_S, BundlePublisher, PublishedAcknowledgements
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.cluster.pod_certificates import PublishedBundle
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import in_background, until
from tests.unit.core import pki


class Bundles:
    """An API server that serves the bundles in one version."""

    def __init__(self) -> None:
        self.served = "v1beta1"
        self.objects: dict[str, PublishedBundle] = {}

    async def version(self) -> str:
        return self.served

    async def list(self, version: str) -> Sequence[PublishedBundle]:
        self._check(version)
        return list(self.objects.values())

    async def find(self, version: str, root_set: str) -> PublishedBundle | None:
        return self.objects.get(root_set) if version == self.served else None  # HTTP 404 in both cases

    async def write(self, version: str, bundle: PublishedBundle) -> None:
        self._check(version)
        self.objects[bundle.name] = bundle

    async def delete(self, version: str, root_set: str) -> None:
        self._check(version)
        del self.objects[root_set]

    def _check(self, version: str) -> None:
        if version != self.served:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "HTTP 404")


class NoNodes:
    """No node has the driver, so nothing else delays a rotation."""

    async def read(self, _generation: int) -> Acknowledgements:
        return Acknowledgements(frozenset(), frozenset())


async def test_rotation_continues_with_the_version_of_an_upgraded_api_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_INTERVAL_S", 0.01)
    bundles, trust, now = Bundles(), TrustBundles(AuthorityMetrics(CollectorRegistry())), 0.0
    roots = make_keyring(pki.NOW).roots_der
    trust.set_roots("internal", RootSet(roots, 1))
    gate = PublishedAcknowledgements(NoNodes(), bundles, list, lambda: now)
    async with in_background(BundlePublisher(bundles, trust, "internal".__eq__).run()):
        await until(lambda: bundles.objects, "a bundle")
        assert (await gate.read(2)).missing
        bundles.served = "v1"
        trust.set_roots("internal", RootSet(roots, 2))
        await until(lambda: bundles.objects["internal"].generation == 2, "a bundle of the next generation")
    await gate.read(2)  # finds no bundle in the version that it knows
    await gate.read(2)
    now = SETTLE_S
    assert not (await gate.read(2)).missing
