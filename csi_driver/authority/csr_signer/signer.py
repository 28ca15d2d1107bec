"""Process the CertificateSigningRequests for certmount's own signer: sign and approve them, or deny them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from csi_driver.authority.authn.limits import FAILURE_RATE, RateLimiter
from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.csr_signer.csr_pipeline import CSRPipeline, SignedCSR
from csi_driver.authority.events.recorder import EventRecorder
from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuance.kubernetes_requests import process_once
from csi_driver.authority.retry import retry
from csi_driver.authority.signing_queue import SigningQueue
from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.csr import APPROVED, CERTMOUNT_SIGNER, DENIED, FAILED, ClusterCSR, CSRCondition
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.kube.csr.cache import CSRCache
from csi_driver.kube.leader_election import LeaderElection

log = structlog.get_logger(__name__)

_USERNAME_RETRY = Backoff(5, 5)
_APPROVED_REASON = "PolicyAllows"


@dataclass(frozen=True, slots=True)
class CSRSigner:
    """Runs in each replica and works while the replica is the leader."""

    requests: CSRClient
    pipeline: CSRPipeline
    election: LeaderElection
    events: EventRecorder
    on_processed: Callable[[float, Reason | None], None]  # gets the seconds, and the reason if there is no certificate
    failures: RateLimiter = field(default_factory=lambda: RateLimiter(FAILURE_RATE))  # that are logged, by requester

    async def run(self) -> None:
        await self.election.run(self._process_requests)

    async def _process_requests(self) -> None:
        def delayed(error: CertmountError, delay_s: float) -> None:
            log.warning("certificate signing requests delayed", error=str(error), retry_in_s=delay_s)

        own_username = await retry(self.requests.own_username, _USERNAME_RETRY, delayed)

        def changed(csr: ClusterCSR) -> None:
            # The watch selects by signer name, too. This check is what ensures that nothing else is signed.
            if csr.signer == CERTMOUNT_SIGNER and not csr.finished:
                queue.add(csr)

        async def process(csr: ClusterCSR, is_retry: bool) -> bool:
            return await self._process(csr, own_username, is_retry=is_retry)

        known = CSRCache(changed, keep_finished=False)
        queue = SigningQueue(known.find)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.requests.watch(known, signer=CERTMOUNT_SIGNER).run(), name="CSR watch")
            tasks.create_task(queue.run_workers(process), name="CSR workers")

    async def _process(self, csr: ClusterCSR, own_username: str, *, is_retry: bool) -> bool:
        """Finish a request; return False if it must be retried."""

        async def issue(record: AuditRecord) -> tuple[bool, Reason | None]:
            return await self._issue_or_deny(csr, own_username, record, is_retry=is_retry)

        return await process_once(
            issue,
            may_log_failure=lambda: not self.failures.take(csr.username),
            on_processed=self.on_processed,
            defect="certificate signing request failed",
            csr=csr.name,
        )

    async def _issue_or_deny(
        self, csr: ClusterCSR, own_username: str, record: AuditRecord, *, is_retry: bool
    ) -> tuple[bool, Reason | None]:
        """Return whether the request is finished, and the reason if it is denied; raises CertmountError to retry it."""
        try:
            signed = await self.pipeline.issue(csr, own_username, record, is_retry=is_retry)
        except CertmountError as error:
            if error.retryable and error.reason.kind is not FailureKind.RATE_LIMITED:
                raise
            record.decision = "rejected"
            record.set_error(error)
            return (await self._deny(csr, error, record)).finished, error.reason
        # The certificate is signed before the approval, so that a request that the CA cannot sign is denied, not approved.
        current = await self._approve(csr, signed)
        record.decision = "issued" if current.certificate else "rejected"
        if current.rejection is not None:
            record.error = f"another approver decided: {current.rejection}"
        return current.finished, None

    async def _approve(self, csr: ClusterCSR, signed: SignedCSR) -> ClusterCSR:
        current = await self._decide(csr, CSRCondition(APPROVED, _APPROVED_REASON, signed.explanation))
        return current if current.finished else await self.requests.set_certificate(csr, signed.certificate)

    async def _deny(self, csr: ClusterCSR, error: CertmountError, record: AuditRecord) -> ClusterCSR:
        if record.identity is not None:
            self.events.record(record.identity, warning=True, reason=error.reason.word, message=error.text)
        current = await self._decide(csr, CSRCondition(DENIED, error.reason.word, error.text))
        if current.finished:
            return current
        # A user approved the request, so it cannot be denied. Approval does not override the policy.
        return await self.requests.fail(csr, CSRCondition(FAILED, error.reason.word, error.text))

    async def _decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        return csr if csr.condition(APPROVED) else await self.requests.decide(csr, condition)
