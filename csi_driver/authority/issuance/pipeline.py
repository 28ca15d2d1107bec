"""Issue a certificate for a pod: :meth:`IssuancePipeline.issue` contains all steps in their order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits
from csi_driver.authority.events.recorder import EventRecorder
from csi_driver.authority.issuance.audit import AuditRecord, audited
from csi_driver.authority.issuance.steps import InterimCertificates, IssuanceSteps, select_issuer
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.certificates.csr import ParsedCSR, parse_csr
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, FailureKind, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import Grant, PolicySubject, RequestedCertificate
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, MAX_FEDERATIONS, KeyType
from csi_driver.events.recorder import MAX_NOTE_BYTES

MAX_SET_NAME = 253  # characters in the name of an issuer or a federation, as in the name of a Kubernetes object
_INTERIM = "the pod uses an interim certificate of the internal CA until the issuer has finished:"


@dataclass(frozen=True, slots=True)
class IssuanceRequest:
    """A certificate that a node driver requests for a pod. Nothing in it is verified."""

    address: str  # of the caller
    node_token: Secret[str]
    pod_token: Secret[str]
    csr: bytes  # PKCS#10, DER
    options: IssuanceOptions
    conversion_faults: tuple[Fault, ...] = ()
    """What could not be converted from the wire. It is reported after authentication, together with other faults."""

    def faults(self) -> list[Fault]:
        """Return all faults that can be found without parsing the CSR."""
        faults = list(self.conversion_faults)
        if len(self.options.federations) > MAX_FEDERATIONS:
            faults.append(Fault("federations", f"has more than {MAX_FEDERATIONS} entries"))
        if any(not 0 < len(name) <= MAX_SET_NAME for name in (self.options.issuer, *self.options.federations)):
            faults.append(Fault("issuer, federations", f"has a name that is empty or longer than {MAX_SET_NAME}"))
        return faults


@dataclass(frozen=True, slots=True)
class IssuanceResult:
    """A certificate and the root sets that the pod needs, by name."""

    issued: IssuedCertificate
    trust: Mapping[str, RootSet]
    pending: CertmountError | None = None  # for an interim certificate: why the issuer's certificate is pending


@dataclass(eq=False)
class IssuancePipeline:
    """Turns an issuance request into a certificate."""

    authenticator: Authenticator
    limits: RequestLimits
    issuers: Mapping[str, Issuer]
    trust: TrustBundles
    steps: IssuanceSteps
    events: EventRecorder
    interim: InterimCertificates = field(default_factory=InterimCertificates)

    async def issue(self, request: IssuanceRequest) -> IssuanceResult:
        """Issue a certificate; raises CertmountError, whose text is also in the pod's event and in the audit log."""
        with self._audited(request) as record, self.steps.metrics.in_flight.track_inprogress():
            pod = await self._authenticate(request, record)
            with self._failures_as_pod_events(pod):
                csr = self._parse(request, record)
                issuer = select_issuer(self.issuers, request.options.issuer, csr)
                with self.limits.issue(pod, request.options.issuer):
                    result = await self._issue(request, csr, pod, issuer, record)
            record.decision = "issued"
            return result

    async def check(self, request: IssuanceRequest, key_type: KeyType) -> None:
        """Raise what :meth:`issue` would raise before it signs a CSR with a key of this type. The CSR can have any key."""
        with self._audited(request) as record:
            pod = await self._authenticate(request, record)
            with self._failures_as_pod_events(pod), self.limits.issue(pod, DEFAULT_ISSUER):
                csr = self._parse(request, record)
                select_issuer(self.issuers, request.options.issuer, csr)
                await self._decide(request, csr, key_type, pod, record)
            record.decision = "checked"

    async def _issue(
        self, request: IssuanceRequest, csr: ParsedCSR, pod: PodIdentity, issuer: Issuer, record: AuditRecord
    ) -> IssuanceResult:
        subject, requested, grant = await self._decide(request, csr, csr.key_type, pod, record)
        to_sign = IssuerRequest(csr, grant, pod, requested)
        issued, pending = await self._sign(issuer, subject, requested, to_sign, pod, record)
        return self._result(request, issued, pending)

    async def _decide(
        self, request: IssuanceRequest, csr: ParsedCSR, key_type: KeyType, pod: PodIdentity, record: AuditRecord
    ) -> tuple[PolicySubject, RequestedCertificate, Grant]:
        """Return what the policy grants; raises CertmountError for all that can fail before anything is signed."""
        self.trust.select(request.options.issuer, request.options.federations)
        subject = await self.steps.find_subject(pod, csr.names, record)
        requested = RequestedCertificate.of(csr.names, key_type, request.options)
        return subject, requested, self.steps.apply_policy(subject, requested, record)

    def _audited(self, request: IssuanceRequest) -> AbstractContextManager[AuditRecord]:
        return audited(functools.partial(self.limits.may_log_failure, request.address))

    async def _authenticate(self, request: IssuanceRequest, record: AuditRecord) -> PodIdentity:
        """Return the pod, after its node."""
        with self.limits.authentication(request.address, issue=True):
            with record.timed("authentication_ms"):
                node = await self.authenticator.authenticate_node(request.node_token)
            record.node = node.node_name
            self.limits.count_node_issue(node)  # before the review of the pod token, which loads the API server
            with record.timed("authentication_ms"):
                pod = await self.authenticator.authenticate_pod(request.pod_token, node)
            record.set_pod(pod)
            self.limits.count_pod_issue(pod)
        return pod

    @contextlib.contextmanager
    def _failures_as_pod_events(self, pod: PodIdentity) -> Iterator[None]:
        try:
            yield
        except CertmountError as error:
            self._record_event(pod, error, error.text)
            raise

    def _parse(self, request: IssuanceRequest, record: AuditRecord) -> ParsedCSR:
        if faults := request.faults():
            raise CertmountError(Reason.INVALID_REQUEST, *faults)
        record.issuer = request.options.issuer
        csr = parse_csr(request.csr)
        record.set_request(csr)
        return csr

    async def _sign(
        self,
        issuer: Issuer,
        subject: PolicySubject,
        requested: RequestedCertificate,
        request: IssuerRequest,
        pod: PodIdentity,
        record: AuditRecord,
    ) -> tuple[IssuedCertificate, CertmountError | None]:
        """Return the issuer's certificate, or an interim certificate and why the issuer's is pending."""
        issue = functools.partial(self.interim.issue, issuer)
        try:
            issued = await self.steps.sign(requested.issuer, issue, request, record)
        except CertmountError as error:
            if error.reason.kind is not FailureKind.PENDING or issuer.while_pending is None:
                raise
            return await self._sign_interim(subject, requested, request, error, pod, record), error
        self.interim.forget(request)
        return issued, None

    async def _sign_interim(
        self,
        subject: PolicySubject,
        requested: RequestedCertificate,
        request: IssuerRequest,
        pending: CertmountError,
        pod: PodIdentity,
        record: AuditRecord,
    ) -> IssuedCertificate:
        """Return a certificate of the internal CA; raises ``pending`` if the policy does not allow it."""
        requested = replace(requested, issuer=DEFAULT_ISSUER)
        try:
            grant = self.steps.apply_policy(subject, requested, record)
        except CertmountError:
            raise pending from None
        record.interim, record.pending = True, str(pending)
        request = replace(request, grant=grant, requested=requested)
        issued = await self.steps.sign(DEFAULT_ISSUER, self.issuers[DEFAULT_ISSUER].issue, request, record)
        self._record_event(pod, pending, f"{_INTERIM} {pending.text}")
        return replace(issued, renew_after=self.interim.retry_after(request))

    def _result(
        self, request: IssuanceRequest, issued: IssuedCertificate, pending: CertmountError | None
    ) -> IssuanceResult:
        """Add the current roots, which can have changed while the issuer worked."""
        names = request.options.issuer, *request.options.federations
        issuer, *others = names if pending is None else (DEFAULT_ISSUER, *names)
        return IssuanceResult(issued, self.trust.select(issuer, others), pending)

    def _record_event(self, pod: PodIdentity, error: CertmountError, message: str) -> None:
        warning = error.reason.kind is not FailureKind.PENDING
        self.events.record(pod, warning=warning, reason=error.reason.word, message=message[:MAX_NOTE_BYTES])
