"""The roots that everyone is to trust: who watches them, and where they are published for those who don't yet know us."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.host.atomic_write import replace_file
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

PODS_ROOTS, AUTHORITYS_ROOT = "root.crt", "authority.crt"
_MOST_WATCHERS = 10_000
"""Twice the nodes of the largest supported cluster (Kubernetes: 5,000), as a node may reconnect before its old call is missed."""
_MOST_DUE = 1000
"""Each node hears of all: 64 kB. Those beyond come when these are done."""
LONGEST_WATCH = timedelta(minutes=30)
"""After which a watch ends and its caller comes again: to whichever replica there is then, with a token of that day."""


class RootPublisher(Protocol):
    """Puts two files (PEM) where nodes and people find them before their first call."""

    async def publish(self, roots: bytes, authority: bytes) -> None:
        """What pods trust and what the authority itself shows; written unless both are there.

        Raises:
            CertmountError: RootCertificateMissing where that fails.
        """


class DirectoryPublisher:
    """``root.crt`` and ``authority.crt`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def publish(self, roots: bytes, authority: bytes) -> None:
        for name, pem in ((PODS_ROOTS, roots), (AUTHORITYS_ROOT, authority)):
            await asyncio.to_thread(_publish, self._folder / name, pem)


def _publish(file: Path, pem: bytes) -> None:
    try:
        if not file.is_file() or file.read_bytes() != pem:
            replace_file(file, pem, mode=0o644)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, Fault(str(file), problem)) from None


@dataclass(frozen=True, slots=True)
class TrustSnapshot:
    """All that a node follows."""

    sets: Mapping[str, RootSet]
    """Of issuers and federations, by their names."""
    policy_revision: str
    """The revision of the policy in force."""
    shared_issuers: tuple[str, ...] = ()
    """Issuers that count certificates: pods of one service account on one node share theirs."""
    renew_now: tuple[str, ...] = ()
    """SHA-256 (hexadecimal) of the public keys whose certificates are to be renewed now."""


class TrustBundles:
    """The current sets of roots, and a stream of them for each watcher."""

    def __init__(
        self, metrics: AuthorityMetrics, most_watchers: int = _MOST_WATCHERS, longest: timedelta = LONGEST_WATCH
    ) -> None:
        self._metrics = metrics
        self._most_watchers = most_watchers
        self._longest = longest
        self._watchers: Counter[str] = Counter()
        self._bundle = TrustSnapshot({}, "")
        self._changed = asyncio.Event()
        self._closed = False

    def set_roots(self, name: str, roots: RootSet) -> None:
        """Tells all watchers, if the set differs from the one before."""
        if self._bundle.sets.get(name) != roots:
            self._replace(replace(self._bundle, sets={**self._bundle.sets, name: roots}))

    def drop_roots(self, name: str) -> None:
        """Forgets a set. Watchers hear of it, and pods that still ask for it are refused."""
        left = {other: roots for other, roots in self._bundle.sets.items() if other != name}
        if len(left) < len(self._bundle.sets):
            self._replace(replace(self._bundle, sets=left))

    def set_policy(self, revision: str) -> None:
        """Tells all watchers, if another policy is in force."""
        if self._bundle.policy_revision != revision:
            self._replace(replace(self._bundle, policy_revision=revision))

    def set_shared_issuers(self, issuers: Iterable[str]) -> None:
        """Tells all watchers, if pods are to share the certificates of other issuers than before."""
        names = tuple(sorted(issuers))
        if self._bundle.shared_issuers != names:
            self._replace(replace(self._bundle, shared_issuers=names))

    def set_renew_now(self, keys: Iterable[str]) -> None:
        """Tells all watchers, if other keys' certificates are to be renewed now than before."""
        due = tuple(sorted(keys)[:_MOST_DUE])
        if self._bundle.renew_now != due:
            self._replace(replace(self._bundle, renew_now=due))

    def select(self, issuer: str, federations: Sequence[str]) -> Mapping[str, RootSet]:
        """The sets that a pod with a certificate of ``issuer`` is to trust.

        Raises:
            CertmountError: FederationNotFound, or IssuerUnavailable while the issuer's own roots are not known.
        """
        sets = self._bundle.sets
        if issuer not in sets:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"the roots of issuer {issuer} are not known yet")
        if unknown := [name for name in federations if name not in sets]:
            known = f"known are {', '.join(sorted(sets))}"
            faults = [Fault("federations", f"the authority has no roots by the name {name}", known) for name in unknown]
            raise CertmountError(Reason.FEDERATION_NOT_FOUND, *faults)
        return {name: sets[name] for name in (issuer, *federations)}

    def close(self) -> None:
        """Ends all watches, now and in future."""
        self._closed = True
        self._wake()

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes that watch now."""
        return frozenset(self._watchers)

    async def watch(self, node: str = "") -> AsyncGenerator[TrustSnapshot, None]:
        """What is trusted now, then each change, for half an hour or until :meth:`close`. ``node`` is who watches.

        Raises:
            CertmountError: AuthorityOverloaded with too many watchers.
        """
        if self._watchers.total() >= self._most_watchers:
            raise CertmountError(
                Reason.AUTHORITY_OVERLOADED, f"{self._watchers.total()} callers watch the roots already"
            )
        self._watchers[node] += 1
        self._metrics.watchers.inc()
        sent: TrustSnapshot | None = None
        loop = asyncio.get_running_loop()
        end = loop.time() + self._longest.total_seconds()
        try:
            while not self._closed:
                changed, bundle = self._changed, self._bundle
                # A node would take an empty bundle for the end of all trust.
                if bundle.sets and bundle is not sent:
                    sent = bundle
                    yield bundle
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

    def _replace(self, bundle: TrustSnapshot) -> None:
        self._bundle = bundle
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
