"""Issue a certificate for a Secret: :meth:`SecretPipeline.issue` contains all steps in their order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits
from csi_driver.authority.issuance.audit import AuditRecord, audited
from csi_driver.authority.issuance.pipeline import IssuanceResult
from csi_driver.authority.issuance.steps import IssuanceSteps, select_issuer
from csi_driver.authority.issuers import Issuer, IssuerRequest
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.csr import ParsedCSR, parse_csr
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import SecretIdentity
from csi_driver.core.policy.engine import RequestedCertificate
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class SecretRequest:
    """A certificate that the Secrets controller requests. Nothing in it is verified; names, key and CSR are in ``csr``."""

    address: str  # of the caller
    token: Secret[str]
    csr: bytes  # PKCS#10, DER
    secret: SecretIdentity
    requested: RequestedCertificate  # without the names and the key type, which are in the CSR
    tsig_secret: str = ""  # NAMESPACE/NAME; empty: the issuer's own key
    faults: tuple[Fault, ...] = ()
    """What could not be converted from the wire. It is reported after authentication."""


@dataclass(frozen=True, slots=True)
class SecretPipeline:
    """Turns a request of the Secrets controller into a certificate. The controller reports failures to people."""

    authenticator: Authenticator
    limits: RequestLimits
    issuers: Mapping[str, Issuer]
    trust: TrustBundles
    steps: IssuanceSteps

    async def issue(self, request: SecretRequest) -> IssuanceResult:
        """Issue a certificate; raises CertmountError, whose text is also in the audit log."""
        may_log_failure = functools.partial(self.limits.may_log_failure, request.address)
        with audited(may_log_failure) as record, self.steps.metrics.in_flight.track_inprogress():
            await self._authenticate(request, record)
            csr = self._parse(request, record)
            name = request.requested.issuer
            issuer = select_issuer(self.issuers, name, csr)
            with self.limits.issue(request.secret, name):
                self.trust.select(name, ())
                to_sign = await self._decide(request, csr, issuer, record)
                issued = await self.steps.sign(name, issuer.issue, to_sign, record)
            record.decision = "issued"
            # The roots can have changed while the issuer worked.
            return IssuanceResult(issued, self.trust.select(name, ()))

    async def _authenticate(self, request: SecretRequest, record: AuditRecord) -> None:
        with self.limits.authentication(request.address, issue=True):
            with record.timed("authentication_ms"):
                controller = await self.authenticator.authenticate_controller(request.token)
            if request.faults:
                raise CertmountError(Reason.INVALID_REQUEST, *request.faults)
            record.set_secret(request.secret)
            self.limits.count_secret_issue(controller, request.secret)

    def _parse(self, request: SecretRequest, record: AuditRecord) -> ParsedCSR:
        record.issuer = request.requested.issuer
        csr = parse_csr(request.csr)
        record.set_request(csr)
        if not len(csr.names):
            raise CertmountError(Reason.INVALID_REQUEST, Fault("names", "no name is requested", "set a DNS name"))
        return csr

    async def _decide(
        self, request: SecretRequest, csr: ParsedCSR, issuer: Issuer, record: AuditRecord
    ) -> IssuerRequest:
        """Return what the policy grants, and nothing else reaches an issuer."""
        email = request.requested.acme_email
        email = None if email is None or email.text == issuer.own_email else email
        record.acme_email = str(email) if email else None
        requested = replace(request.requested, names=csr.names, key_type=csr.key_type, acme_email=email)
        subject = await self.steps.find_secret(request.secret, record)
        grant = self.steps.apply_policy(subject, requested, record)
        if (email or request.tsig_secret) and not issuer.has_accounts:
            fault = Fault("issuer", f"{requested.issuer} is no ACME issuer", "omit email and tsigSecretName")
            raise CertmountError(Reason.INVALID_REQUEST, fault)
        return IssuerRequest(csr, grant, request.secret, requested, request.tsig_secret)
