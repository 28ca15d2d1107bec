"""The steps of issuance that the pipeline and the CSR signer share."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.policy.subjects import PolicySubjectLookup
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import Grant, Policy, PolicySubject, RequestedCertificate
from csi_driver.telemetry.authority_metrics import AuthorityMetrics


@dataclass(frozen=True, slots=True)
class IssuanceSteps:
    """Applies the policy and calls an issuer; each step fills in its fields of the audit record."""

    subjects: PolicySubjectLookup
    policy: Callable[[], Policy]
    """Returns the policy in force."""
    metrics: AuthorityMetrics

    async def find_subject(self, pod: PodIdentity, record: AuditRecord) -> PolicySubject:
        """Return what policy rules match; raises CertmountError as :meth:`PolicySubjectLookup.find`."""
        with record.timed("policy_ms"):
            return await retry_while_unavailable(functools.partial(self.subjects.find, pod))

    def apply_policy(self, subject: PolicySubject, requested: RequestedCertificate, record: AuditRecord) -> Grant:
        """Return what the policy allows; raises CertmountError as :meth:`Policy.decide`."""
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
