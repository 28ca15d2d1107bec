"""Write new roots to the volumes without new keys or certificates, and track which root sets all volumes contain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from csi_driver.core.certificates.root_sets import RootSet, merge_roots, select_root_sets
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.scheduler import Scheduler
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.known_root_sets import KnownRootSets
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_ADOPTION_TIMEOUT_S = 180.0
"""Twice the longest time between two republishes of a pod. A volume without one belongs to no running pod."""

_NONE: Mapping[str, int] = {}


@dataclass(eq=False)
class RootDistribution:
    """Distributes roots to all volumes. ``scheduler`` writes them, and retries volumes that failed.

    A volume contains a root set if the driver wrote or read its files with that generation or a newer one. Some volumes do
    not count, because they would delay an acknowledgement forever: volumes of pods that no longer exist (the driver
    removes them), volumes without files (the driver publishes them again), and, after 180 s, quarantined volumes.
    """

    store: VolumeStore
    volumes: VolumeTable
    remover: VolumeRemover
    budget: VolumeBudget
    metrics: NodeMetrics
    clock: Callable[[], float]
    rng: Callable[[], float]
    _known: KnownRootSets = field(default_factory=KnownRootSets)
    _issuers: Collection[str] = ()  # none before the first trust bundle
    _awaiting_adoption: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.clock, self._update_volume)
        self.volumes.when_forgotten(self._forget)

    @property
    def known(self) -> Mapping[str, RootSet]:
        return self._known.sets

    def apply_bundle(self, sets: Mapping[str, RootSet], issuers: Collection[str] = ()) -> None:
        """Apply all root sets of a trust bundle, some of which belong to issuers, and schedule the volumes that need them.

        Raises CertmountError: InvalidResponse if a root is not a certificate; then nothing is applied.
        """
        for name, roots in sets.items():
            parse_certificates(roots.roots, f"roots of {name}")
        self._known.apply_bundle(sets)
        self._issuers = issuers
        self._schedule_outdated()

    def accept_response(self, names: Sequence[str], sets: Mapping[str, RootSet]) -> Mapping[str, RootSet]:
        """Add the root sets of an issuance response. Return the sets to write for a volume that trusts ``names``."""
        before = self._known.sets
        self._known.add_response(sets)
        if self._known.sets != before:
            self._schedule_outdated()
        found = self._known.select(names)
        # The trust stream can come from a replica that does not know the issuer's set yet; the certificate needs it.
        return {**({names[0]: sets[names[0]]} if found else sets), **found}

    def select(self, issuer: str, federations: Sequence[str]) -> Mapping[str, RootSet]:
        """Return the sets to write for a volume without a certificate, which the authority does not check.

        Raises CertmountError: AuthorityUnavailable before the first trust bundle, and otherwise what the authority raises
        for a request with this issuer and these federations.
        """
        if not self._issuers:
            problem = "the authority has not sent them since the driver started"
            hint = "the kubelet retries; if this persists, see the driver's log"
            raise CertmountError(Reason.AUTHORITY_UNAVAILABLE, Fault("roots", problem, hint))
        if issuer not in self._issuers:
            hint = f"use one of {', '.join(sorted(self._issuers))}"
            raise CertmountError(
                Reason.ISSUER_NOT_FOUND, Fault("issuer", f"the authority has no issuer {issuer}", hint)
            )
        return select_root_sets(self._known.sets, issuer, federations)

    def check_restored(self, volume: Volume) -> None:
        """Schedule a volume of an earlier process: its files may contain old roots."""
        self._stop_awaiting(self.store.key(volume.record.volume_id))
        if self._is_outdated(volume):
            self.scheduler.schedule(volume.record.volume_id, self.clock())

    async def catch_up(self, volume: Volume) -> None:
        """Write roots that arrived while the driver wrote the certificate. The caller holds the volume's lock."""
        if self._is_outdated(volume):
            await self._write(volume)
        self._stop_awaiting(self.store.key(volume.record.volume_id))

    def await_adoption(self, keys: Collection[str]) -> None:
        """Acknowledge nothing until these quarantined volumes are adopted, for at most 180 s."""
        self._awaiting_adoption = set(keys)
        if keys:
            asyncio.get_running_loop().call_later(_ADOPTION_TIMEOUT_S, self._give_up_adoption)

    def written(self, acknowledged: Mapping[str, int] = _NONE) -> Mapping[str, int]:
        """Return the generation of each known root set that all volumes which trust it contain, and that is newer."""
        known = {
            name: roots for name, roots in self._known.sets.items() if roots.generation > acknowledged.get(name, -1)
        }
        if self._awaiting_adoption or not known:
            return {}
        missing = set()
        for volume in self.volumes:
            for name in volume.trusted_names:
                held = volume.root_sets.get(name)
                if name in known and (held is None or held.generation < known[name].generation):
                    missing.add(name)
        return {name: roots.generation for name, roots in known.items() if name not in missing}

    async def changed(self) -> None:
        """Wait until the result of :meth:`written` may have changed. Supports one caller."""
        await self._changed.wait()
        self._changed.clear()

    def _schedule_outdated(self) -> None:
        now = self.clock()
        for volume in self.volumes:
            if self._is_outdated(volume):
                self.scheduler.schedule(volume.record.volume_id, now)
        self._changed.set()

    def _is_outdated(self, volume: Volume) -> bool:
        required = self._required_sets(volume)
        return bool(required) and required != volume.root_sets

    def _required_sets(self, volume: Volume) -> Mapping[str, RootSet]:
        """Return the sets that a volume must contain, or none if they are not known yet.

        Keep the set of the volume's issuer even if the authority removed it: the certificate chains to it.
        """
        found, issuer = self._known.select(volume.trusted_names), volume.spec.issuer
        if issuer in found:
            return found
        return {issuer: volume.root_sets[issuer], **found} if found and issuer in volume.root_sets else {}

    async def _update_volume(self, volume_id: str) -> None:
        volume = self.volumes.get(volume_id)
        if volume is None:
            return
        with structlog.contextvars.bound_contextvars(volume=volume_id, pod=str(volume.pod)):
            try:
                if await self.remover.remove_if_pod_is_gone(volume):
                    return
                async with self.volumes.lock(volume_id):
                    if self.volumes.has(volume) and self._is_outdated(volume):
                        await self._write(volume)
            except Exception as error:  # noqa: BLE001  # an unexpected error of one volume must not stop the others
                self._retry(volume, CertmountError(Reason.INTERNAL, f"unexpected {type(error).__name__}"))

    async def _write(self, volume: Volume) -> None:
        volume_id, sets = volume.record.volume_id, self._required_sets(volume)
        try:
            if self.store.has_files(volume_id):
                files = volume.files(self.store.files_dir(volume_id))
                if await in_thread(None, files.replace_roots, merge_roots(sets, volume.trusted_names), self.clock()):
                    generations = {name: each.generation for name, each in sets.items()}
                    self.volumes.files_replaced(volume)
                    log.info("root certificates updated", generations=generations)
        except CertmountError as error:
            self._retry(volume, error)
            return
        volume.root_sets, volume.root_failures = sets, 0
        self.budget.measure(volume_id, volume.pod)
        self.metrics.roots_behind(volume_id, behind=False)
        self._changed.set()
        if self._is_outdated(volume):
            self.scheduler.schedule(volume_id, self.clock())

    def _retry(self, volume: Volume, error: CertmountError) -> None:
        volume.root_failures += 1
        delay = retry_delay_s(attempt=volume.root_failures, kind=error.reason.kind, jitter=self.rng())
        if self.volumes.has(volume):
            self.scheduler.schedule(volume.record.volume_id, self.clock() + delay)
            self.metrics.roots_behind(volume.record.volume_id, behind=True)
        log.warning(
            "root certificate update failed", reason=error.reason.word, error=str(error), retry_in_s=round(delay, 1)
        )

    def _forget(self, volume_id: str) -> None:
        self.scheduler.cancel(volume_id)
        self._stop_awaiting(self.store.key(volume_id))
        self._changed.set()

    def _stop_awaiting(self, key: str) -> None:
        self._awaiting_adoption.discard(key)
        self._changed.set()

    def _give_up_adoption(self) -> None:
        for key in sorted(self._awaiting_adoption):
            log.warning("quarantined volume was not republished; roots are acknowledged without it", volume=key)
        self._awaiting_adoption.clear()
        self._changed.set()
