"""Issue the certificate for a CertificateSigningRequest: :meth:`CSRPipeline.issue` contains all steps in their order."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from csi_driver.authority.authn.limits import Rate, RateLimiter
from csi_driver.authority.csr_api import FindPod
from csi_driver.authority.csr_signer.requests import parse_content, parse_requester, verify_running
from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.authority.issuers import Issuer, IssuerRequest
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.cluster.csr import ClusterCSR
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import encode_der_certificates
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.policy.rules import DEFAULT_DURATION
from csi_driver.core.spec import DEFAULT_ISSUER

ACCOUNT_RATE = Rate(2, 200)
"""Per service account: 200 pods that start at once, or one request every ten seconds from each of 20 pods."""


@dataclass(frozen=True, slots=True)
class SignedCSR:
    """A signed certificate (PEM: the leaf, then its intermediates), and its names, lifetime and policy rules for people."""

    certificate: bytes
    explanation: str


@dataclass(frozen=True, slots=True)
class CSRPipeline:
    """Turns a CertificateSigningRequest for certmount's own signer into a certificate."""

    find_pod: FindPod
    steps: IssuanceSteps
    internal: Issuer
    limits: RateLimiter = field(default_factory=lambda: RateLimiter(ACCOUNT_RATE))

    async def issue(
        self, request: ClusterCSR, own_username: str, record: AuditRecord, *, is_retry: bool = False
    ) -> SignedCSR:
        """Issue a certificate; raises CertmountError as the steps do. A retry does not count against the rate limit."""
        record.csr, record.issuer, record.requester = request.name, DEFAULT_ISSUER, request.username
        own = request.username == own_username
        pod = _own_identity(request) if own else parse_requester(request)
        if not own:
            record.set_pod(pod)
            if not is_retry and self.limits.take(request.username):
                fault = Fault(
                    request.username, "exceeds the authority's rate limit", "create a new request after a minute"
                )
                raise CertmountError(Reason.TOO_MANY_REQUESTS, fault)
        csr, requested = parse_content(request)
        record.set_request(csr)
        grant = _own_grant(requested, record) if own else await self._apply_policy(pod, requested, record)
        to_sign = IssuerRequest(csr, grant, pod, requested)
        issued = await self.steps.sign(DEFAULT_ISSUER, self.internal.issue, to_sign, record)
        pem = encode_der_certificates(issued.chain)
        return SignedCSR(pem, f"{grant.names} for {format_duration(grant.duration)}, by {', '.join(grant.rules)}")

    async def _apply_policy(self, pod: PodIdentity, requested: RequestedCertificate, record: AuditRecord) -> Grant:
        find = functools.partial(self.find_pod, pod.service_account.namespace, pod.pod_name)
        verify_running(pod, await retry_while_unavailable(find))
        subject = await self.steps.find_subject(pod, requested.names, record)
        return self.steps.apply_policy(subject, requested, record)


def _own_grant(requested: RequestedCertificate, record: AuditRecord) -> Grant:
    """Return the grant for a request of an issuer of the authority, whose names the policy allowed before.

    This is safe because the API server records the user name, and anyone who has the authority's token can also read the
    CA's key. Labels and annotations have no influence, because any user can set them.
    """
    if not len(requested.names):
        raise CertmountError(Reason.INVALID_CSR, Fault("spec.request", "contains no names"))
    duration = requested.duration or DEFAULT_DURATION
    grant = Grant(requested.names, duration, requested.usages, ("the authority's earlier decision",))
    record.set_grant(grant)
    return grant


def _own_identity(request: ClusterCSR) -> PodIdentity:
    _, _, namespace, name = request.username.split(":", 3)
    return PodIdentity(ServiceAccount(namespace, name), "", "", "", "", "", 0.0)
