"""Process the PodCertificateRequests for certmount's own signer names: issue or deny each once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from csi_driver.authority.authn.limits import FAILURE_RATE, RateLimiter
from csi_driver.authority.events.recorder import EventRecorder
from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuance.kubernetes_requests import process_once
from csi_driver.authority.pod_certificates.api import PodCertificateApi
from csi_driver.authority.pod_certificates.contents import UnsupportedKey
from csi_driver.authority.pod_certificates.discovery import wait_until_served
from csi_driver.authority.pod_certificates.namespaces import NamespaceRoots
from csi_driver.authority.pod_certificates.pipeline import PodCertificatePipeline
from csi_driver.authority.pod_certificates.publisher import BundlePublisher
from csi_driver.authority.signing_queue import SigningQueue
from csi_driver.core.cluster.pod_certificates import (
    DENIED,
    INVALID_ANNOTATIONS,
    UNSUPPORTED_KEY_TYPE,
    PodCertificateDecision,
    PodCertificateRequest,
)
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.kube.leader_election import LeaderElection
from csi_driver.kube.pod_certificates.request_cache import RequestCache

log = structlog.get_logger(__name__)

_MAX_MESSAGE = 4096  # characters of a condition: the text can quote all names of a request


@dataclass(frozen=True, slots=True)
class PodCertificateSigner:
    """Runs in each replica and works while the replica is the leader."""

    api: PodCertificateApi
    pipeline: PodCertificatePipeline
    publisher: BundlePublisher
    namespace_roots: NamespaceRoots
    election: LeaderElection
    events: EventRecorder
    on_processed: Callable[[float, Reason | None], None]  # gets the seconds, and the reason if there is no certificate
    failures: RateLimiter = field(default_factory=lambda: RateLimiter(FAILURE_RATE))  # that are logged, by namespace

    async def run(self) -> None:
        await self.election.run(self._lead)

    async def _lead(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.publisher.run(), name="ClusterTrustBundles")
            tasks.create_task(self.namespace_roots.run(), name="roots in namespaces")
            await self._find_version()
            for signer in self.pipeline.signers:  # an issuer that does not answer must not delay the requests to others
                tasks.create_task(self._process_requests(signer), name=f"requests for {signer}")

    async def _find_version(self) -> None:
        """Wait until the API server serves the API."""
        version = await wait_until_served(
            self.api.requests.find_version,
            delayed="pod certificate requests delayed",
            not_served="the API server does not serve PodCertificateRequests",
            needed="Kubernetes 1.37, or 1.35 with the gate",
        )
        log.info("pod certificate signer started", api_version=version, signers=sorted(self.pipeline.signers))

    async def _process_requests(self, signer: str) -> None:
        def changed(request: PodCertificateRequest) -> None:
            # The watch selects by signer name, too. This check is what ensures that nothing else is signed.
            if request.signer == signer and not request.finished:
                queue.add(request)

        async def process(request: PodCertificateRequest, _is_retry: bool) -> bool:
            return await self._process(request)

        cache = RequestCache(changed)
        queue = SigningQueue(cache.find)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.api.requests.watch(signer, cache).run(), name=f"watch of {signer}")
            tasks.create_task(queue.run_workers(process), name=f"workers of {signer}")

    async def _process(self, request: PodCertificateRequest) -> bool:
        """Finish a request; return False if it must be retried."""

        async def issue(record: AuditRecord) -> tuple[bool, Reason | None]:
            try:
                return True, await self._issue_or_deny(request, record)
            except CertmountError as error:
                self._record_event(record, error)
                raise

        return await process_once(
            issue,
            may_log_failure=lambda: not self.failures.take(request.namespace),
            on_processed=self.on_processed,
            defect="pod certificate request failed",
            request=request.key,
        )

    async def _issue_or_deny(self, request: PodCertificateRequest, record: AuditRecord) -> Reason | None:
        """Return the reason if the request is denied; raises CertmountError to retry it."""
        reason = None
        try:
            decision = await self.pipeline.issue(request, record)
        except CertmountError as error:
            if error.retryable:
                raise
            record.decision, reason = "rejected", error.reason
            record.set_error(error)
            decision = _denial(error)
            self._record_event(record, error)
        if decision is None:
            return Reason.POD_NOT_FOUND  # Kubernetes deletes the request
        written = await self.api.requests.finish(request, decision)
        if written and reason is None:
            record.decision = "issued"
        return reason

    def _record_event(self, record: AuditRecord, error: CertmountError) -> None:
        if record.identity is not None:  # the pod exists, and the request describes it
            warning = error.reason.kind is not FailureKind.PENDING
            self.events.record(record.identity, warning=warning, reason=error.reason.word, message=error.text)


def _denial(error: CertmountError) -> PodCertificateDecision:
    reason = INVALID_ANNOTATIONS if error.reason is Reason.INVALID_ATTRIBUTES else error.reason.word
    if isinstance(error, UnsupportedKey):
        reason = UNSUPPORTED_KEY_TYPE
    return PodCertificateDecision(DENIED, reason, error.text[:_MAX_MESSAGE])
