"""The steps of issuance that the pipeline and the CSR signer share, and interim certificates."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.policy.subjects import PolicySubjectLookup
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import Grant, Policy, PolicySubject, RequestedCertificate
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

_ISSUER_TIMEOUT_S = 5.0  # an issuer that takes longer is pending: the pod must start
_MIN_RETRY_S, _MAX_RETRY_S = 15.0, 60.0
_AGE_PER_RETRY = 4  # the next retry comes after a quarter of the time since the first request
_MAX_TRACKED = 10_000
_FORGET_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True)
class IssuanceSteps:
    """Applies the policy and calls an issuer; each step fills in its fields of the audit record."""

    subjects: PolicySubjectLookup
    policy: Callable[[], Policy]  # returns the policy in force
    metrics: AuthorityMetrics

    async def find_subject(self, pod: PodIdentity, record: AuditRecord) -> PolicySubject:
        with record.timed("policy_ms"):
            return await retry_while_unavailable(functools.partial(self.subjects.find, pod))

    def apply_policy(self, subject: PolicySubject, requested: RequestedCertificate, record: AuditRecord) -> Grant:
        with record.timed("policy_ms"):
            grant = self.policy().decide(subject, requested)
        record.set_grant(grant)
        return grant

    async def sign(
        self,
        issuer: str,
        issue: Callable[[IssuerRequest], Awaitable[IssuedCertificate]],
        request: IssuerRequest,
        record: AuditRecord,
    ) -> IssuedCertificate:
        """Return the certificate that ``issue`` signs, and count it for the issuer; raises CertmountError as ``issue``."""
        started = time.perf_counter()
        reason: Reason | None = Reason.INTERNAL
        try:
            with record.timed("sign_ms"):
                issued = await issue(request)
            reason = None
        except CertmountError as error:
            reason = error.reason
            raise
        finally:
            self.metrics.issuer_called(issuer, time.perf_counter() - started, reason)
        record.set_certificate(issued.chain[0])
        return issued


class InterimCertificates:
    """Limits the time that a pod waits for an issuer with ``while_pending``; nodes retry less often for older requests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, timeout_s: float = _ISSUER_TIMEOUT_S) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        # The times of the first and the last request, by public key.
        self._requests: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def issue(self, issuer: Issuer, request: IssuerRequest) -> IssuedCertificate:
        """Do what :meth:`Issuer.issue` does, but raise IssuancePending after 5 s if an interim certificate is allowed."""
        if issuer.while_pending is None:
            return await issuer.issue(request)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await issuer.issue(request)
        except TimeoutError:
            fault = Fault("certificate", f"the issuer takes longer than {self._timeout_s:.0f} s")
            raise CertmountError(Reason.ISSUANCE_PENDING, fault) from None

    def retry_after(self, csr: ParsedCSR) -> timedelta:
        now, key = self._clock(), key_fingerprint(csr.public_key)
        first, last = self._requests.pop(key, (now, now))
        if now - last > _FORGET_AFTER_S:
            first = now
        self._requests[key] = first, now
        if len(self._requests) > _MAX_TRACKED:
            self._requests.popitem(last=False)
        return timedelta(seconds=min(max((now - first) / _AGE_PER_RETRY, _MIN_RETRY_S), _MAX_RETRY_S))

    def forget(self, csr: ParsedCSR) -> None:
        if self._requests:
            self._requests.pop(key_fingerprint(csr.public_key), None)
