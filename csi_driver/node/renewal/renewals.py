"""Renews the volumes in place, each when its moment has come. What fails is told and tried again; no pod loses what it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from csi_driver.core.certificates.root_sets import merge_roots, trusted_root_set_names
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.renewal import retry_delay_s
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.issuance.enrolled import Enrolled
from csi_driver.node.issuance.enrolment import Enrolment
from csi_driver.node.issuance.lanes import Lanes
from csi_driver.node.renewal.conditions import Conditions
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import write_certificate
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_DECIDED_BY_POLICY = frozenset(
    {FailureKind.NOT_ALLOWED, FailureKind.DENIED, FailureKind.NOT_CONFIGURED, FailureKind.NOT_AUTHENTICATED}
)
_AWAITING_TOKEN_S = 300.0
"""Kubelet's next look brings the token and brings the renewal forward; this is for the case that it never looks."""
_POLICY_SPREAD_S = 30.0
"""Over which chance spreads what a new policy may allow: all nodes hear of it in the same moment."""
_ADVICE_SPREAD_S = 30.0
"""Over which chance spreads what a CA wants renewed at once: it may be all that it has signed."""
_POLICY_SETTLES_S = 180.0
"""Replicas read a new policy within so long of each other, as kubelets bring a ConfigMap's change at different moments."""


class Renewals:
    """The renewals of all volumes; ``lanes`` are their clocks."""

    def __init__(
        self,
        store: VolumeStore,
        volumes: VolumeTable,
        enrolment: Enrolment,
        roots: RootDistribution,
        removal: VolumeRemover,
        lanes: Lanes,
        conditions: Conditions,
        metrics: NodeMetrics,
        clock: Callable[[], float],
        rng: Callable[[], float],
    ) -> None:
        self._store = store
        self._volumes = volumes
        self._enrolment = enrolment
        self._roots = roots
        self._removal = removal
        self._lanes = lanes
        self._conditions = conditions
        self._metrics = metrics
        self._clock = clock
        self._rng = rng
        self._policy: str | None = None
        self._policy_settled_at = 0.0
        volumes.when_forgotten(lanes.cancel)

    def keep(self, volume: Volume) -> None:
        """Sets the moment at which a volume that holds a certificate is renewed."""
        self._schedule(volume, volume.record.renew_at)
        self._conditions.keep(volume)
        self._metrics.keep(volume.record.volume_id, volume.record.not_after)
        self._metrics.unhealthy(volume.record.volume_id, None)

    def token_came(self, volume: Volume) -> None:
        """Renews at once what has waited for the pod's token only."""
        if volume.failure is not None and volume.failure.reason in (Reason.TOKEN_MISSING, Reason.TOKEN_EXPIRED):
            volume.failure, volume.attempt = None, 0
            self._metrics.unhealthy(volume.record.volume_id, None)
            self._schedule(volume, self._clock())

    def trouble(self, volume: Volume) -> tuple[str, str] | None:
        """What is wrong with a volume's certificate now, as :meth:`Volume.trouble`."""
        return volume.trouble(self._clock(), self._lanes.trouble(volume.spec.issuer))

    def policy_is(self, revision: str) -> None:
        """Tries again what was refused, and what was given up, when the policy is another one than before."""
        before, self._policy = self._policy, revision
        if before is None or before == revision:
            return
        now = self._clock()
        self._policy_settled_at = now + _POLICY_SETTLES_S
        for volume in self._volumes:
            if volume.failure is not None and volume.failure.reason.kind in _DECIDED_BY_POLICY and not volume.renewing:
                volume.attempt = 0
                self._schedule(volume, now + self._rng() * _POLICY_SPREAD_S)

    def advised(self, volume: Volume) -> None:
        """Renews a volume soon, though its moment has not come; where a renewal has failed, that is tried again anyway."""
        if volume.failure is None and not volume.renewing:
            self._schedule(volume, min(self._clock() + self._rng() * _ADVICE_SPREAD_S, volume.record.renew_at))

    async def renew(self, volume_id: str) -> None:
        """Renews one volume in place. Never raises: what fails is reported and tried again."""
        volume = self._volumes.get(volume_id)
        if volume is None or volume.renewing:  # what is under way sets the next moment itself
            return
        volume.renewing = True
        try:
            with structlog.contextvars.bound_contextvars(volume=volume_id, pod=str(volume.pod)):
                await self._renew(volume)
        finally:
            volume.renewing = False

    async def _renew(self, volume: Volume) -> None:
        """Obtains a certificate, then writes it. No lock is held meanwhile: kubelet's calls don't wait for the authority."""
        try:
            if await self._removal.drop_if_gone(volume):
                return
            late_s = max(self._clock() - volume.record.renew_at, 0.0)
            volume_id, pod = volume.record.volume_id, volume.pod
            enrolled = await self._enrolment.obtain(volume_id, pod, volume.spec, volume.token, late_s)
            async with self._volumes.lock(volume.record.volume_id):
                if self._volumes.has(volume):
                    await self._write(volume, enrolled)
        except CertmountError as error:
            self._failed(volume, error)
        except Exception as error:  # noqa: BLE001  # one volume's defect must not end the clock of all
            defect = f"a defect in certmount ({type(error).__name__})"
            self._failed(volume, CertmountError(Reason.INTERNAL, defect))

    async def _write(self, volume: Volume, enrolled: Enrolled) -> None:
        if enrolled.interim and volume.stands_in_well(self._clock()):
            await self._ask_again(volume, enrolled.renew_at)
            return
        record = replace(
            volume.record,
            issued_at=enrolled.issued_at,
            renew_at=enrolled.renew_at,
            not_after=enrolled.not_after,
            interim=enrolled.interim,
        )
        trusted = trusted_root_set_names(volume.spec, interim=enrolled.interim)
        trusts = self._roots.answered(trusted, enrolled.trust)
        await in_thread(
            None,
            write_certificate,
            self._store.files_dir(record.volume_id),
            enrolled.key,
            enrolled.bundle.chain,
            merge_roots(trusts, trusted),
            volume.readers,
            enrolled.issued_at,
        )
        volume.record, volume.trusts = record, trusts
        volume.failure, volume.attempt, volume.dropped = None, 0, False
        self.keep(volume)
        self._conditions.renewed(volume)
        self._metrics.renewed()
        await self._roots.catch_up(volume)
        await in_thread(None, self._store.write_record, record)
        log.info("renewed", not_after=enrolled.not_after, renew_at=enrolled.renew_at, interim=enrolled.interim)

    async def _ask_again(self, volume: Volume, when: float) -> None:
        """The certificate that was asked for is not there yet, and the one that stands in need not be another."""
        volume.record = replace(volume.record, renew_at=when)
        volume.failure, volume.attempt, volume.dropped = None, 0, False
        self.keep(volume)
        await in_thread(None, self._store.write_record, volume.record)

    def _schedule(self, volume: Volume, when: float) -> None:
        self._lanes.schedule(volume.record.volume_id, volume.spec.issuer, when, volume.record.not_after)

    def _failed(self, volume: Volume, error: CertmountError) -> None:
        if not self._volumes.has(volume):
            return
        volume.failure, volume.attempt = error, volume.attempt + 1
        self._metrics.renewal_failed(error.reason)
        self._metrics.unhealthy(volume.record.volume_id, error.reason)
        delay = self._delay_s(volume, error.reason)
        volume.dropped = delay is None
        if delay is None:
            log.error("renewal dropped", reason=error.reason.word, error=str(error), not_after=volume.record.not_after)
        else:
            self._schedule(volume, self._clock() + delay)
            log.warning(
                "not renewed",
                reason=error.reason.word,
                error=str(error),
                attempt=volume.attempt,
                retry_in_s=round(max(delay, self._lanes.pause_s(volume.spec.issuer)), 1),
            )
        self._conditions.failed(volume)

    def _delay_s(self, volume: Volume, reason: Reason) -> float | None:
        """Seconds until the next try at the soonest; None where there is to be none until the policy changes."""
        if reason is Reason.SERVICE_ACCOUNT_DENIED:
            settles_in = self._policy_settled_at - self._clock()
            return settles_in + self._rng() * _POLICY_SPREAD_S if settles_in > 0 else None
        if reason in (Reason.TOKEN_MISSING, Reason.TOKEN_EXPIRED):
            return _AWAITING_TOKEN_S
        return retry_delay_s(attempt=volume.attempt, kind=reason.kind, jitter=self._rng())
