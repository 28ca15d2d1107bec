"""Publish the root sets as ClusterTrustBundles, and delay the switch to a new CA until pods can read its root there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import structlog

from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.ca.sources import NodeAcknowledgements
from csi_driver.authority.pod_certificates.api import BundleClient
from csi_driver.authority.pod_certificates.discovery import wait_until_served
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.cluster.pod_certificates import PublishedBundle
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_der_certificates
from csi_driver.core.spec import DEFAULT_ISSUER

log = structlog.get_logger(__name__)

SETTLE_S = 420.0
"""How long kubelets need until the volumes of all pods contain a changed bundle: a watch, then one sync of each pod.

Kubelet 1.37.2 keeps a bundle that a pod selects by its name for five minutes, even if it changes.
"""
_INTERVAL_S = 10.0  # a rotation waits for it, and another client can change or delete a bundle


@dataclass(eq=False)
class BundlePublisher:
    """Keeps one bundle for each root set while this replica is the leader."""

    client: BundleClient
    trust: TrustBundles
    configured: Callable[[str], bool]
    """Returns whether there is a root set of a name. Its bundle stays while its roots are not known, as after a restart."""
    _problems: dict[str, str] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            version = await wait_until_served(
                self.client.version,
                delayed="cluster trust bundles delayed",
                not_served="the API server does not serve ClusterTrustBundles, so the roots are not published",
            )
            listed = True
            while listed:  # an upgrade of the cluster can change the version
                listed = await self._publish(version, self.trust.snapshot.sets)
                await asyncio.sleep(_INTERVAL_S)

    async def _publish(self, version: str, sets: Mapping[str, RootSet]) -> bool:
        """Write what differs; return False if the bundles cannot be listed."""
        try:
            published = {bundle.name: bundle for bundle in await self.client.list(version)}
        except CertmountError as error:
            self._report("", error)
            return False
        self._report("", None)
        for name, roots in sets.items():
            await self._write(version, name, roots, published.get(name))
        for name in [name for name in published.keys() - sets.keys() if not self.configured(name)]:
            with self._reported(name):
                await self.client.delete(version, name)
                log.info("cluster trust bundle deleted", root_set=name)
        return True

    async def _write(self, version: str, name: str, roots: RootSet, found: PublishedBundle | None) -> None:
        bundle = PublishedBundle(
            name, roots.generation, encode_der_certificates(roots.roots).decode("ascii"), found.version if found else ""
        )
        if found is not None:
            # Only the rotation of the internal CA needs to find the generation.
            same = found.roots == bundle.roots and (name != DEFAULT_ISSUER or found.generation == roots.generation)
            if same or found.generation > roots.generation:  # by a replica that knows newer roots
                return
        with self._reported(name):
            await self.client.write(version, bundle)
            log.info("cluster trust bundle written", root_set=name, generation=roots.generation, roots=len(roots.roots))

    @contextlib.contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        try:
            yield
        except CertmountError as error:
            self._report(name, error)
        else:
            self._report(name, None)

    def _report(self, name: str, error: CertmountError | None) -> None:
        """Log a new problem, once."""
        text = "" if error is None else str(error)
        if text and text != self._problems.get(name):
            log.warning("cluster trust bundle not written", root_set=name or None, error=text)
        self._problems[name] = text


@dataclass(eq=False)
class PublishedAcknowledgements:
    """Node acknowledgements that also require the bundle of the internal CA, or time, for pods without a CSI volume."""

    nodes: NodeAcknowledgements
    client: BundleClient
    namespaces: Callable[[], Collection[str]]  # returns those with a ConfigMap
    clock: Callable[[], float] = time.monotonic
    _version: str = ""
    _generation: int = -1
    _seen_at: float = 0.0

    async def read(self, generation: int) -> Acknowledgements:
        """Return who has acknowledged the generation and who must; raises CertmountError."""
        found = await self.nodes.read(generation)
        if await self._settled(generation):
            return found
        return Acknowledgements(found.acknowledged, found.expected | {"ClusterTrustBundle"})

    async def _settled(self, generation: int) -> bool:
        self._version = self._version or await self.client.version()
        if self._version:
            bundle = await self.client.find(self._version, DEFAULT_ISSUER)
            if bundle is None or bundle.generation < generation:
                self._version = ""  # an upgrade of the cluster can have changed it
                self._generation = -1
                return False
        elif not self.namespaces():
            return True  # no pod can read the roots except in a volume
        # ConfigMaps get the time only: a namespace without permissions must not stop a rotation.
        if self._generation != generation:
            self._generation, self._seen_at = generation, self.clock()
        return self.clock() - self._seen_at >= SETTLE_S
