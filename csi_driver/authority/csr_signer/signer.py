"""Process the CertificateSigningRequests for certmount's own signer: sign and approve them, or deny them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.csr_signer.csr_pipeline import CSRPipeline, SignedCSR
from csi_driver.authority.csr_signer.leader_election import LeaderElection
from csi_driver.authority.events.recorder import EventRecorder
from csi_driver.authority.issuance.audit import AuditRecord, audited
from csi_driver.authority.retry import retry
from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.csr import APPROVED, CERTMOUNT_SIGNER, DENIED, FAILED, ClusterCSR, CSRCondition
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.kube.csr_cache import CSRCache

log = structlog.get_logger(__name__)

_MAX_FINISHED = 10_000
_WORKERS = 8  # more would only wait for the API server
_RETRY = Backoff(1, 60)
_USERNAME_RETRY = Backoff(5, 5)
_APPROVED_REASON = "PolicyAllows"


@dataclass(slots=True)
class _CSRQueue:
    """Names of requests to process, each once."""

    waiting: dict[str, None] = field(default_factory=dict)
    in_progress: set[str] = field(default_factory=set)
    failures: dict[str, int] = field(default_factory=dict)
    finished: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """UIDs of the latest finished requests. The watch can still deliver an older version, which must not be signed again."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, name: str) -> None:
        self.waiting[name] = None
        self.changed.set()

    async def take(self) -> str:
        while (name := next((name for name in self.waiting if name not in self.in_progress), None)) is None:
            self.changed.clear()
            await self.changed.wait()
        del self.waiting[name]
        self.in_progress.add(name)
        return name

    def finish(self, csr: ClusterCSR) -> None:
        """Ignore the request from now on."""
        self.failures.pop(csr.name, None)
        self.finished[csr.uid] = None
        if len(self.finished) > _MAX_FINISHED:
            self.finished.popitem(last=False)

    def retry_later(self, name: str) -> None:
        self.failures[name] = failures = self.failures.get(name, 0) + 1
        asyncio.get_running_loop().call_later(_RETRY.delay_s(failures), self.add, name)

    def release(self, name: str) -> None:
        self.in_progress.discard(name)
        self.changed.set()  # it may have been added again in the meantime


@dataclass(frozen=True, slots=True)
class CSRSigner:
    """Runs in each replica and works while the replica is the leader."""

    requests: CSRClient
    pipeline: CSRPipeline
    election: LeaderElection
    events: EventRecorder
    on_processed: Callable[[float, Reason | None], None]  # gets the seconds, and the reason if there is no certificate

    async def run(self) -> None:
        await self.election.run(self._process_requests)

    async def _process_requests(self) -> None:
        def delayed(error: CertmountError, delay_s: float) -> None:
            log.warning("certificate signing requests delayed", error=str(error), retry_in_s=delay_s)

        own_username = await retry(self.requests.own_username, _USERNAME_RETRY, delayed)
        queue = _CSRQueue()

        def changed(csr: ClusterCSR) -> None:
            # The watch selects by signer name, too. This check is what ensures that nothing else is signed.
            if csr.signer == CERTMOUNT_SIGNER and not csr.finished and csr.uid not in queue.finished:
                queue.add(csr.name)

        known = CSRCache(changed, keep_finished=False)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.requests.watch(known, signer=CERTMOUNT_SIGNER).run(), name="CSR watch")
            for _ in range(_WORKERS):
                tasks.create_task(self._work(queue, known, own_username), name="CSR worker")

    async def _work(self, queue: _CSRQueue, known: CSRCache, own_username: str) -> None:
        while True:
            name = await queue.take()
            try:
                csr = known.find(name)
                # It may have been deleted, or finished while the watch delivered its approval.
                if csr is None or csr.uid in queue.finished:
                    queue.failures.pop(name, None)
                elif await self._process(csr, own_username, is_retry=name in queue.failures):
                    queue.finish(csr)
                else:
                    queue.retry_later(name)
            finally:
                queue.release(name)

    async def _process(self, csr: ClusterCSR, own_username: str, *, is_retry: bool) -> bool:
        """Finish a request; return False if it must be retried."""
        started = time.perf_counter()
        reason: Reason | None = Reason.INTERNAL
        try:
            with audited() as record:
                try:
                    finished, reason = await self._issue_or_deny(csr, own_username, record, is_retry=is_retry)
                except CertmountError as error:  # not a rejection, as it is retried
                    record.set_error(error)
                    reason = error.reason
                    return False
                return finished
        except Exception:  # other requests must still be processed
            log.exception("certificate signing request failed", csr=csr.name)
            return False
        finally:
            self.on_processed(time.perf_counter() - started, reason)

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
        text = str(error.args[0])
        if record.identity is not None:
            self.events.record(record.identity, warning=True, reason=error.reason.word, message=text)
        current = await self._decide(csr, CSRCondition(DENIED, error.reason.word, text))
        if current.finished:
            return current
        # A user approved the request, so it cannot be denied. Approval does not override the policy.
        return await self.requests.fail(csr, CSRCondition(FAILED, error.reason.word, text))

    async def _decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        return csr if csr.condition(APPROVED) else await self.requests.decide(csr, condition)
