"""The trust bundle: all root sets that the authority streams to nodes; and the root files that it publishes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from csi_driver.core.certificates.root_sets import RootSet, select_root_sets
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.atomic_write import replace_file
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

_MAX_RENEW_NOW = 1000  # Every node receives all of them, 64 kB. More follow when these certificates are renewed.
LONGEST_WATCH = timedelta(minutes=30)
"""Then the stream ends and the node reconnects with a new token, possibly to another replica."""


@dataclass(frozen=True, slots=True)
class TrustSnapshot:
    """A message of the trust stream."""

    sets: Mapping[str, RootSet]  # the root sets of issuers and federations by name
    policy_revision: str  # the revision of the policy in force
    shared_issuers: tuple[str, ...] = ()
    """Issuers with certificate limits: pods of one service account on one node share a certificate."""
    environments: Mapping[str, str] = field(default_factory=dict)
    """Where each issuer gets its certificates, by the name of the issuer."""
    renew_now: tuple[str, ...] = ()  # SHA-256 (hexadecimal) of the public keys whose certificates nodes must renew now
    replace_keys: tuple[str, ...] = ()  # those of them that nodes must not certify again


class TrustBundles:
    """Holds the current trust bundle and streams it to watchers."""

    def __init__(self, metrics: AuthorityMetrics, longest: timedelta = LONGEST_WATCH) -> None:
        self._metrics = metrics
        self._longest = longest
        self._watchers: Counter[str] = Counter()
        self._snapshot = TrustSnapshot({}, "")
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def snapshot(self) -> TrustSnapshot:
        return self._snapshot

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes that watch now."""
        return frozenset(filter(None, self._watchers))

    def set_roots(self, name: str, roots: RootSet) -> None:
        self._update(replace(self._snapshot, sets={**self._snapshot.sets, name: roots}))

    def remove_roots(self, name: str) -> None:
        """Remove a root set. Requests of pods that use it then fail."""
        sets = {other: roots for other, roots in self._snapshot.sets.items() if other != name}
        self._update(replace(self._snapshot, sets=sets))

    def set_policy(self, revision: str) -> None:
        self._update(replace(self._snapshot, policy_revision=revision))

    def set_issuers(self, shared: Iterable[str], environments: Mapping[str, str]) -> None:
        shared_issuers = tuple(sorted(shared))
        self._update(replace(self._snapshot, shared_issuers=shared_issuers, environments=environments))

    def set_renew_now(self, keys: Iterable[str], replaced: Iterable[str] = ()) -> None:
        """Set the keys whose certificates are due, and those of them that must be replaced, which come first."""
        urgent = set(replaced)
        renew_now = sorted(keys, key=lambda key: (key not in urgent, key))[:_MAX_RENEW_NOW]
        replace_keys = tuple(key for key in renew_now if key in urgent)
        self._update(replace(self._snapshot, renew_now=tuple(sorted(renew_now)), replace_keys=replace_keys))

    def select(self, issuer: str, federations: Sequence[str]) -> Mapping[str, RootSet]:
        """Return the root sets that a pod with a certificate of ``issuer`` trusts.

        Raises CertmountError FederationNotFound, or IssuerUnavailable while the issuer's own roots are unknown.
        """
        return select_root_sets(self._snapshot.sets, issuer, federations)

    def close(self) -> None:
        """End all current and future watches."""
        self._closed = True
        self._wake()

    async def watch(self, node: str = "") -> AsyncGenerator[TrustSnapshot, None]:
        """Yield the trust bundle and then each change, for 30 minutes or until :meth:`close`. ``node`` watches, or no node."""
        self._watchers[node] += 1
        self._metrics.watchers.inc()
        sent: TrustSnapshot | None = None
        loop = asyncio.get_running_loop()
        end = loop.time() + self._longest.total_seconds()
        try:
            while not self._closed:
                changed, snapshot = self._changed, self._snapshot
                # A node would take a bundle without root sets as the removal of all roots.
                if snapshot.sets and snapshot is not sent:
                    sent = snapshot
                    yield snapshot
                else:
                    async with asyncio.timeout_at(end):
                        await changed.wait()
        except TimeoutError:
            return
        finally:
            self._watchers[node] -= 1
            if not self._watchers[node]:
                del self._watchers[node]
            self._metrics.watchers.dec()

    def _update(self, snapshot: TrustSnapshot) -> None:
        if snapshot != self._snapshot:
            self._snapshot = snapshot
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


PODS_ROOTS, AUTHORITYS_ROOT = "root.crt", "authority.crt"


class RootPublisher(Protocol):
    """Publishes two files (PEM)."""

    async def publish(self, roots: bytes, authority: bytes) -> None:
        """Write the roots that pods trust and the root of the authority's serving certificate, if they differ.

        Raises CertmountError RootCertificateMissing if that fails.
        """


@dataclass(frozen=True, slots=True)
class DirectoryPublisher:
    """Publishes ``root.crt`` and ``authority.crt`` in a directory."""

    directory: Path

    async def publish(self, roots: bytes, authority: bytes) -> None:
        for name, pem in ((PODS_ROOTS, roots), (AUTHORITYS_ROOT, authority)):
            await asyncio.to_thread(_publish, self.directory / name, pem)


def _publish(file: Path, pem: bytes) -> None:
    try:
        if not file.is_file() or file.read_bytes() != pem:
            replace_file(file, pem, mode=0o644)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, Fault(str(file), problem)) from None
