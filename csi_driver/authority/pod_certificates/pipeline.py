"""Issue the certificate for a PodCertificateRequest: :meth:`PodCertificatePipeline.issue` contains all steps in their order."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509

from csi_driver.authority.ca.certificates import BACKDATE
from csi_driver.authority.csr_api import FindPod
from csi_driver.authority.issuance.audit import AuditRecord
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.pod_certificates.contents import (
    FIELDS,
    LIFETIME,
    LIFETIME_FIELDS,
    parse_annotations,
    parse_key,
)
from csi_driver.authority.retry import retry_while_unavailable
from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.cluster.pod_certificates import (
    ISSUED,
    MIN_LIFETIME,
    REFRESH_MARGIN_S,
    PodCertificateDecision,
    PodCertificateRequest,
)
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import InvalidName, parse_object_name
from csi_driver.core.policy.engine import Grant, PolicySubject, RequestedCertificate
from csi_driver.core.renewal import plan_renewal
from csi_driver.core.spec import DEFAULT_ISSUER

_APPROVED_REASON = "PolicyAllows"


@dataclass(frozen=True, slots=True)
class PodCertificatePipeline:
    """Turns a PodCertificateRequest for one of certmount's signer names into a certificate."""

    find_pod: FindPod
    steps: IssuanceSteps
    issuers: Mapping[str, Issuer]
    signers: Mapping[str, str]  # the issuer of each signer name
    rng: Callable[[], float] = random.random

    async def issue(self, request: PodCertificateRequest, record: AuditRecord) -> PodCertificateDecision | None:
        """Return the decision to write, or None if the pod no longer runs; raises CertmountError as the steps do."""
        issuer_name = self.signers[request.signer]
        record.pod_certificate_request, record.issuer = request.key, issuer_name
        pod = await self._find_running(request)
        if pod is None:
            return None
        record.set_pod(pod)
        spec = parse_annotations(request)
        csr = parse_key(request)
        issuer = self._select_issuer(issuer_name, csr)
        record.set_request(dataclasses.replace(csr, names=spec.names))
        requested = dataclasses.replace(
            RequestedCertificate.of(spec.names, csr.key_type, spec), issuer=issuer_name, fields=FIELDS
        )
        subject = await self.steps.find_subject(pod, spec.names, record)
        grant = self._apply_policy(subject, requested, request.max_lifetime, record)
        # Certificates are valid from a minute before they are signed, and the API server counts this minute.
        signed = dataclasses.replace(grant, duration=min(grant.duration, request.max_lifetime - BACKDATE))
        # The CSR of the kubelet contains no names; the issuer signs those of the grant.
        names = spec.names if issuer_name == DEFAULT_ISSUER else grant.names
        to_sign = IssuerRequest(dataclasses.replace(csr, names=names), signed, pod, requested)
        issued = await self.steps.sign(issuer_name, issuer.issue, to_sign, record)
        text = f"{grant.names} for {format_duration(grant.duration)}, by {', '.join(grant.rules)}"
        return self._decision(request, issued, spec, text)

    async def _find_running(self, request: PodCertificateRequest) -> PodIdentity | None:
        """Return the pod, or None if it was deleted, is terminating or has finished.

        Raises CertmountError InvalidRequest if the request does not describe the pod: the kubelet created it for another
        pod of this name, or somebody else created it.
        """
        found = None
        try:
            name = parse_object_name(request.pod_name)
            find = functools.partial(self.find_pod, request.namespace, name)
            found = await retry_while_unavailable(find)
        except InvalidName:
            raise _rejected(request, f"{request.pod_name[:80]!r} is not the name of a pod") from None
        if found is None:
            return None
        _verify(request, found)
        if found.terminating:
            return None
        account = ServiceAccount(request.namespace, found.service_account)
        return PodIdentity(account, "", name, found.uid, found.node_name, "", 0.0)

    def _select_issuer(self, name: str, csr: ParsedCSR) -> Issuer:
        issuer = self.issuers.get(name)
        if issuer is None:
            hint = "ask an administrator to add it to the issuers file, or to change --pod-signer"
            problem = f"the authority has no issuer {name} for this signer name"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault("signerName", problem, hint))
        if issuer.needs_names_in_csr:
            problem = f"the issuer {name} signs only what a CSR contains, and the kubelet's CSR contains no names"
            raise CertmountError(
                Reason.ISSUER_NOT_FOUND, Fault("signerName", problem, "use a CSI volume for this issuer")
            )
        if not csr.der and name != DEFAULT_ISSUER:
            hint = "use Kubernetes 1.36 or newer, or the signer of the internal CA"
            raise CertmountError(Reason.ISSUER_NOT_FOUND, Fault("signerName", f"the issuer {name} needs a CSR", hint))
        return issuer

    def _apply_policy(
        self, subject: PolicySubject, requested: RequestedCertificate, longest: timedelta, record: AuditRecord
    ) -> Grant:
        """Return the grant with a lifetime that the API server accepts."""
        grant = self.steps.apply_policy(subject, requested, record)
        if requested.duration is not None or MIN_LIFETIME <= grant.duration <= longest:
            return grant
        short = grant.duration < MIN_LIFETIME
        requested = dataclasses.replace(requested, duration=MIN_LIFETIME if short else longest, fields=LIFETIME_FIELDS)
        try:
            return self.steps.apply_policy(subject, requested, record)
        except CertmountError:
            if not short:
                raise
            allowed, needed = format_duration(grant.duration), format_duration(MIN_LIFETIME)
            problem = f"{', '.join(grant.rules)} allow at most {allowed}, and pod certificates need at least {needed}"
            hint = "use a CSI volume, or ask an administrator to change the policy"
            raise CertmountError(Reason.NAME_NOT_ALLOWED, Fault(LIFETIME, problem, hint)) from None

    def _decision(
        self, request: PodCertificateRequest, issued: IssuedCertificate, spec: CertificateSpec, text: str
    ) -> PodCertificateDecision:
        chain = [x509.load_der_x509_certificate(der) for der in issued.chain]
        not_before, not_after = (
            int(time.timestamp()) for time in (chain[0].not_valid_before_utc, chain[0].not_valid_after_utc)
        )
        lifetime = timedelta(seconds=not_after - not_before)
        if not MIN_LIFETIME <= lifetime <= request.max_lifetime:
            limits = f"{format_duration(MIN_LIFETIME)} to {format_duration(request.max_lifetime)}"
            problem = f"is valid for {format_duration(lifetime)}, and the request allows {limits}"
            raise CertmountError(
                Reason.INVALID_RESPONSE, Fault("certificate", problem, "check the limits of the issuer")
            )
        due = plan_renewal(
            issued_at=not_before + BACKDATE.total_seconds(),
            not_after=not_after,
            renew_before=spec.renew_before,
            renew_after_s=issued.renew_after.total_seconds() if issued.renew_after else None,
            jitter=self.rng(),
        )
        due = min(max(due, not_before + REFRESH_MARGIN_S), not_after - REFRESH_MARGIN_S)
        pem = encode_certificates(chain).decode("ascii")
        return PodCertificateDecision(ISSUED, _APPROVED_REASON, text, pem, not_before, int(due), not_after)


def _verify(request: PodCertificateRequest, found: LivePod) -> None:
    """Raise CertmountError InvalidRequest unless the request describes the pod."""
    if found.uid != request.pod_uid:
        raise _rejected(request, "has another UID: it was created again, or the request is forged")
    problems = {
        f"runs as service account {found.service_account}, not {request.service_account}": found.service_account
        != request.service_account,
        f"is on node {found.node_name or '(none)'}, not {request.node_name}": found.node_name != request.node_name,
    }
    if wrong := [problem for problem, present in problems.items() if present]:
        raise _rejected(request, *wrong)


def _rejected(request: PodCertificateRequest, *problems: str) -> CertmountError:
    pod = f"pod {request.namespace}/{request.pod_name[:80]}"
    return CertmountError(Reason.INVALID_REQUEST, *(Fault(pod, problem) for problem in problems))
