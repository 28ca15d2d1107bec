"""Brings newer roots to the volumes, without new keys or certificates, and tells which sets have arrived in all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

import structlog

from csi_driver.core.certificates.root_sets import RootSet, merge_roots
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.renewal.rotation import Rotation
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.known_root_sets import KnownRootSets
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import replace_roots
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_ADOPTION_S = 180.0
"""The kubelet looks at each pod within 90 s; a volume that it has not shown us by twice that time is no living pod's."""


class RootDistribution:
    """The roots of all volumes. ``writing`` is the clock by which they are written: a volume that fails is tried again by itself.

    A volume counts as holding a set when its root.crt was written with that state of it or a newer one, or read and
    found so. Not counted, so that they hold up nothing for ever: volumes of pods that are gone, which are removed instead;
    volumes without any files, which are published anew; and after 180 s those whose records were not usable at the start.
    """

    def __init__(
        self,
        store: VolumeStore,
        volumes: VolumeTable,
        removal: VolumeRemover,
        metrics: NodeMetrics,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        self._store = store
        self._volumes = volumes
        self._removal = removal
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._known = KnownRootSets()
        self._unsettled: set[str] = set()
        self._moved = asyncio.Event()
        self.writing = Rotation(clock, self._bring)
        volumes.when_forgotten(self._forget)

    def streamed(self, sets: Mapping[str, RootSet]) -> None:
        """Takes all sets that the authority has, and sees to it that the volumes get them.

        Raises:
            CertmountError: InvalidResponse for what are no certificates; then nothing is taken.
        """
        for name, roots in sets.items():
            parse_certificates(roots.roots, f"roots of {name}")
        self._known.streamed(sets)
        self._spread()

    @property
    def known(self) -> Mapping[str, RootSet]:
        """The newest state of each set."""
        return self._known.sets

    def answered(self, names: Sequence[str], sets: Mapping[str, RootSet]) -> Mapping[str, RootSet]:
        """Takes the sets that came with the certificate of a volume that trusts these; gives those that it is to hold now."""
        before = self._known.sets
        self._known.answered(sets)
        if self._known.sets != before:
            self._spread()
        found = self._known.of(names)
        # An issuer's own set may be unknown to the replica that streams; the certificate is no good without it.
        return {**({names[0]: sets[names[0]]} if found else sets), **found}

    def take_up(self, volume: Volume) -> None:
        """Has the roots of a volume that an earlier process left looked at, and written if they are behind."""
        self._settle(self._store.key(volume.record.volume_id))
        if self._behind(volume):
            self.writing.schedule(volume.record.volume_id, self._clock())

    async def catch_up(self, volume: Volume) -> None:
        """Writes what came while the volume was written, so that no pod starts without it. The caller holds the volume's lock."""
        if self._behind(volume):
            await self._write(volume)
        self._settle(self._store.key(volume.record.volume_id))

    def await_adoption(self, keys: Collection[str]) -> None:
        """Nothing is held by all volumes until those in these folders have been taken up, for three minutes at most."""
        self._unsettled = set(keys)
        if keys:
            asyncio.get_running_loop().call_later(_ADOPTION_S, self._unsettled_for_good)

    def held(self) -> Mapping[str, int]:
        """The sets that every volume which trusts them holds, with the generation that is known."""
        if self._unsettled:
            return {}
        known, missing = self._known.sets, set()
        for volume in self._volumes:
            for name in volume.trusted:
                if name in known and (
                    name not in volume.trusts or volume.trusts[name].generation < known[name].generation
                ):
                    missing.add(name)
        return {name: roots.generation for name, roots in known.items() if name not in missing}

    async def moved(self) -> None:
        """Waits until :meth:`held` may give something else. For one caller."""
        await self._moved.wait()
        self._moved.clear()

    def _spread(self) -> None:
        now = self._clock()
        for volume in self._volumes:
            if self._behind(volume):
                self.writing.schedule(volume.record.volume_id, now)
        self._moved.set()

    def _behind(self, volume: Volume) -> bool:
        wanted = self._wanted(volume)
        return bool(wanted) and wanted != volume.trusts

    def _wanted(self, volume: Volume) -> Mapping[str, RootSet]:
        """What a volume is to hold; nothing where that can't be said. A set of its own issuer that is gone stays: its chain ends there."""
        found, own = self._known.of(volume.trusted), volume.spec.issuer
        if own in found:
            return found
        return {own: volume.trusts[own], **found} if found and own in volume.trusts else {}

    async def _bring(self, volume_id: str) -> None:
        volume = self._volumes.get(volume_id)
        if volume is None:
            return
        with structlog.contextvars.bound_contextvars(volume=volume_id, pod=str(volume.pod)):
            try:
                if not await self._removal.drop_if_gone(volume):
                    async with self._volumes.lock(volume_id):
                        if self._volumes.has(volume) and self._behind(volume):
                            await self._write(volume)
            except Exception as error:  # noqa: BLE001  # one volume's defect must not end the clock of all
                defect = f"a defect in certmount ({type(error).__name__})"
                self._failed(volume, CertmountError(Reason.INTERNAL, defect))

    async def _write(self, volume: Volume) -> None:
        """Writes the roots that are known at this moment; what fails, and roots that come meanwhile, are the clock's again."""
        try:
            await self._write_known(volume)
        except CertmountError as error:
            self._failed(volume, error)
        else:
            if self._behind(volume):
                self.writing.schedule(volume.record.volume_id, self._clock())

    async def _write_known(self, volume: Volume) -> None:
        volume_id, names = volume.record.volume_id, volume.trusted
        sets = self._wanted(volume)
        if self._store.has_files(volume_id):
            files_dir, roots = self._store.files_dir(volume_id), merge_roots(sets, names)
            if await in_thread(None, replace_roots, files_dir, roots, volume.readers, self._clock()):
                log.info("roots replaced", generations={name: each.generation for name, each in sets.items()})
        volume.trusts, volume.trust_attempt = sets, 0
        self._metrics.roots_behind(volume_id, behind=False)
        self._moved.set()

    def _failed(self, volume: Volume, error: CertmountError) -> None:
        volume.trust_attempt += 1
        delay = retry_delay_s(attempt=volume.trust_attempt, kind=error.reason.kind, jitter=self._rng())
        if self._volumes.has(volume):
            self.writing.schedule(volume.record.volume_id, self._clock() + delay)
            self._metrics.roots_behind(volume.record.volume_id, behind=True)
        log.warning("roots not replaced", reason=error.reason.word, error=str(error), retry_in_s=round(delay, 1))

    def _forget(self, volume_id: str) -> None:
        self.writing.cancel(volume_id)
        self._settle(self._store.key(volume_id))
        self._moved.set()

    def _settle(self, key: str) -> None:
        self._unsettled.discard(key)
        self._moved.set()

    def _unsettled_for_good(self) -> None:
        for key in sorted(self._unsettled):
            log.warning("quarantined volume was not asked for; roots are confirmed without it", volume=key)
        self._unsettled.clear()
        self._moved.set()
