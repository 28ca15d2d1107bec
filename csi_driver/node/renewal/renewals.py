"""Renews the certificates of published volumes in place. After a failure, the pod keeps its files and the driver retries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from csi_driver.core.certificates.root_sets import merge_roots, trusted_root_set_names
from csi_driver.core.errors import CertmountError, FailureKind, Reason, Retry
from csi_driver.core.renewal import retry_delay_s
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.issuance.certificate_client import CertificateClient
from csi_driver.node.issuance.certificate_request import CertificateRequest, ObtainedCertificate
from csi_driver.node.issuance.request_queue import RequestQueue
from csi_driver.node.log_shares import PodLogShares
from csi_driver.node.renewal.certificate_conditions import ConditionTracker
from csi_driver.node.scheduler import Scheduler
from csi_driver.node.threads import in_thread
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.remover import VolumeRemover
from csi_driver.node.volumes.volume import Volume, VolumeProblem, VolumeTable
from csi_driver.telemetry.expiry_metrics import CertificateTimes
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_TOKEN_TIMEOUT_S = 300.0
"""The next republish brings a token and starts the renewal. This retry is for a kubelet that does not republish."""
_POLICY_JITTER_S = 30.0  # all nodes receive a new policy at the same time, so spread the renewals that it may allow
_EARLY_RENEWAL_JITTER_S = 30.0
"""A CA can suggest an early renewal for all of its certificates, so spread these renewals."""
_POLICY_PROPAGATION_S = 180.0
"""The longest time between two replicas reading a new policy: kubelets update a ConfigMap at different times."""


@dataclass(eq=False)
class Renewals:
    """Renews volumes at their renewal times. ``scheduler`` starts the renewals, and the request queue limits them."""

    store: VolumeStore
    volumes: VolumeTable
    client: CertificateClient
    queue: RequestQueue
    roots: RootDistribution
    remover: VolumeRemover
    conditions: ConditionTracker
    budget: VolumeBudget
    metrics: NodeMetrics
    logs: PodLogShares
    clock: Callable[[], float]
    rng: Callable[[], float]
    _policy_revision: str | None = None
    _policy_propagated_at: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.clock, self._renew_in_turn, limit=math.inf)
        self.volumes.when_forgotten(self.scheduler.cancel)
        self.volumes.when_forgotten(self.queue.cancel_renewal)

    def keep(self, volume: Volume) -> None:
        """Add a volume to the metrics, and schedule its renewal unless it has only roots."""
        if not volume.spec.root_only:
            self._schedule(volume, volume.record.renew_at)
            self.conditions.watch(volume)
        self.metrics.keep(volume.record.volume_id, CertificateTimes(volume.overdue_at, volume.record.not_after))
        self.metrics.unhealthy(volume.record.volume_id, None)

    def token_received(self, volume: Volume) -> None:
        """Renew the volume now if it waits for a new token."""
        if volume.failure is not None and volume.failure.reason.kind.retry is Retry.ON_TOKEN:
            volume.failure, volume.renewal_failures = None, 0
            self.metrics.unhealthy(volume.record.volume_id, None)
            self._schedule(volume, self.clock())

    def policy_received(self, revision: str) -> None:
        """Retry renewals that a new policy may allow."""
        previous, self._policy_revision = self._policy_revision, revision
        if previous is None or previous == revision:
            return
        now = self.clock()
        self._policy_propagated_at = now + _POLICY_PROPAGATION_S
        for volume in self.volumes:
            if volume.failure is None or volume.renewing:
                continue
            if volume.failure.reason.kind.retry in (Retry.SLOW, Retry.ON_POLICY_CHANGE):
                volume.renewal_failures = 0
                self._schedule(volume, now + self.rng() * _POLICY_JITTER_S)

    def renew_early(self, volume: Volume) -> None:
        """Renew a volume within 30 s. A renewal that has failed is retried anyway."""
        if volume.failure is None and not volume.renewing:
            early = self.clock() + self.rng() * _EARLY_RENEWAL_JITTER_S
            self._schedule(volume, min(early, volume.record.renew_at))

    def problem(self, volume: Volume) -> VolumeProblem | None:
        return volume.problem(self.clock(), self.queue.outage(volume.spec.issuer))

    async def _renew_in_turn(self, volume_id: str) -> None:
        volume = self.volumes.get(volume_id)
        if volume is None or volume.renewing:  # A renewal that is waiting or in progress schedules the next one.
            return
        volume.renewing = True
        issuer, pod, not_after = volume.spec.issuer, volume.pod, volume.record.not_after
        try:
            with structlog.contextvars.bound_contextvars(volume=volume_id, pod=str(pod)):
                async with self.queue.renewal_turn(issuer, pod, volume_id, not_after) as postponed_s:
                    if postponed_s and self.volumes.has(volume):
                        self._schedule(volume, self.clock() + postponed_s)
                    elif self.volumes.has(volume):
                        await self._renew(volume)
        finally:
            volume.renewing = False
            if self.volumes.has(volume) and not volume.renewal_stopped and self.scheduler.due(volume_id) is None:
                self._schedule(volume, volume.record.renew_at)  # it became due before this renewal had ended

    async def _renew(self, volume: Volume) -> None:
        """Renew one volume, and retry after a failure. The volume is not locked during the request to the authority."""
        try:
            if await self.remover.remove_if_pod_is_gone(volume):
                return
            late_s = max(self.clock() - volume.record.renew_at, 0.0)
            request = CertificateRequest(volume.record.volume_id, volume.pod, volume.spec, volume.token, late_s)
            obtained = await self.client.obtain(request)
            async with self.volumes.lock(volume.record.volume_id):
                if not self.volumes.has(volume):
                    return
                if obtained.interim and volume.keeps_interim_certificate(self.clock()):
                    await self._keep_interim_certificate(volume, obtained.renew_at)
                else:
                    await self._replace_certificate(volume, obtained)
        except CertmountError as error:
            if error.reason.kind is FailureKind.DENIED:
                await self._refuse_key(volume)  # before the end of the renewal, from when on a new policy retries it
            self._failed(volume, error)
        except Exception as error:  # noqa: BLE001  # A defect in one renewal must not end all renewals.
            problem = f"an internal error ({type(error).__name__})"
            self._failed(volume, CertmountError(Reason.INTERNAL, problem))

    async def _replace_certificate(self, volume: Volume, obtained: ObtainedCertificate) -> None:
        record = replace(
            volume.record,
            issued_at=obtained.issued_at,
            renew_at=obtained.renew_at,
            not_after=obtained.not_after,
            interim=obtained.interim,
            replace_key=False,
        )
        names = trusted_root_set_names(volume.spec, interim=obtained.interim)
        root_sets = self.roots.accept_response(names, obtained.root_sets)
        contents = obtained.contents(merge_roots(root_sets, names))
        files = volume.files(self.store.files_dir(record.volume_id))
        await in_thread(None, files.renew, contents, obtained.issued_at)
        volume.root_sets, volume.password = root_sets, None
        self.volumes.files_replaced(volume)
        self._succeeded(volume, record)
        self.conditions.renewal_succeeded(volume)
        self.metrics.renewed()
        await self.roots.catch_up(volume)
        await self._write_record(record)
        times = {"not_after": record.not_after, "renew_at": record.renew_at}
        log.info("certificate renewed", **times, interim=record.interim)

    async def _keep_interim_certificate(self, volume: Volume, renew_at: float) -> None:
        """Keep it while the external issuer is working: a new interim certificate has no advantage."""
        self._succeeded(volume, replace(volume.record, renew_at=renew_at))
        await self._write_record(volume.record)

    async def _refuse_key(self, volume: Volume) -> None:
        """Remember, also after a restart, that the key gets no other certificate: denying a pod revokes what it has."""
        async with self.volumes.lock(volume.record.volume_id):
            if self.volumes.has(volume) and not volume.record.replace_key:
                volume.record = replace(volume.record, replace_key=True)
                await self._write_record(volume.record)

    async def _write_record(self, record: VolumeRecord) -> None:
        """Write the record if possible. An older one only means that the driver renews early after a restart."""
        try:
            await in_thread(None, self.store.write_record, record)
        except CertmountError as error:
            log.warning("record not written", reason=error.reason.word, error=str(error))

    def _succeeded(self, volume: Volume, record: VolumeRecord) -> None:
        volume.record = record
        volume.failure, volume.renewal_failures, volume.renewal_stopped = None, 0, False
        self.keep(volume)
        self.budget.measure(record.volume_id, volume.pod)

    def _failed(self, volume: Volume, error: CertmountError) -> None:
        if not self.volumes.has(volume):
            return
        volume.failure, volume.renewal_failures = error, volume.renewal_failures + 1
        self.metrics.renewal_failed(error.reason)
        self.metrics.unhealthy(volume.record.volume_id, error.reason)
        delay_s = self._retry_delay_s(volume, error.reason.kind)
        volume.renewal_stopped = delay_s is None
        not_after = volume.record.not_after
        if delay_s is None:
            log.error("renewal stopped", reason=error.reason.word, error=str(error), not_after=not_after)
        else:
            self._schedule(volume, self.clock() + delay_s)
            if self.logs.may_log():
                log.warning(
                    "renewal failed",
                    reason=error.reason.word,
                    error=str(error),
                    attempt=volume.renewal_failures,
                    retry_in_s=round(max(delay_s, self.queue.pause_s(volume.spec.issuer, not_after)), 1),
                )
        self.conditions.renewal_failed(volume, error)

    def _retry_delay_s(self, volume: Volume, kind: FailureKind) -> float | None:
        """Return the seconds until the next retry, or None if the driver does not retry before the policy changes."""
        if kind.retry is Retry.ON_TOKEN:
            return _TOKEN_TIMEOUT_S
        if kind.retry is Retry.ON_POLICY_CHANGE:
            # Replicas that have not read the new policy yet can still deny the request.
            propagates_in_s = self._policy_propagated_at - self.clock()
            return propagates_in_s + self.rng() * _POLICY_JITTER_S if propagates_in_s > 0 else None
        return retry_delay_s(attempt=volume.renewal_failures, kind=kind, jitter=self.rng())

    def _schedule(self, volume: Volume, due: float) -> None:
        self.scheduler.schedule(volume.record.volume_id, due)
