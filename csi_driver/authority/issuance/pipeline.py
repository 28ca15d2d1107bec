"""Issue a certificate for a pod: :meth:`IssuancePipeline.issue` contains all steps in their order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import ConcurrencyLimit, RequestLimits
from csi_driver.authority.events.recorder import MAX_NOTE_BYTES, EventRecorder
from csi_driver.authority.issuance.audit import AuditRecord, audited
from csi_driver.authority.issuance.steps import InterimCertificates, IssuanceSteps
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.certificates.csr import ParsedCSR, content_faults, parse_csr
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, FailureKind, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import PolicySubject, RequestedCertificate
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER

_MAX_CONCURRENT_CALLS = 512
"""More calls would wait longer than the drivers' retries take. Their requests use at most 64 MiB."""
MAX_SET_NAME = 253  # characters in the name of an issuer or a federation, as in the name of a Kubernetes object
_MAX_FEDERATIONS = 32
_INTERIM = "the pod uses an interim certificate of the internal CA until the issuer has finished:"


@dataclass(frozen=True, slots=True)
class IssuanceRequest:
    """A certificate that a node driver requests for a pod. Nothing in it is verified."""

    node_token: Secret[str]
    pod_token: Secret[str]
    csr: bytes  # PKCS#10, DER
    options: IssuanceOptions
    conversion_faults: tuple[Fault, ...] = ()
    """What could not be converted from the wire. It is reported after authentication, together with other faults."""

    def faults(self) -> list[Fault]:
        """Return all faults that can be found without parsing the CSR."""
        faults = list(self.conversion_faults)
        if len(self.options.federations) > _MAX_FEDERATIONS:
            faults.append(Fault("federations", f"has more than {_MAX_FEDERATIONS} entries"))
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

    def __post_init__(self) -> None:
        self._internal_calls = ConcurrencyLimit(_MAX_CONCURRENT_CALLS, self.steps.metrics.in_flight)
        # An external issuer can take a minute, and the pods of the internal CA must not wait for it.
        self._external_calls = ConcurrencyLimit(_MAX_CONCURRENT_CALLS)

    async def issue(self, request: IssuanceRequest) -> IssuanceResult:
        """Issue a certificate; raises CertmountError, whose text is also in the pod's event and in the audit log."""
        calls = self._internal_calls if request.options.issuer == DEFAULT_ISSUER else self._external_calls
        with audited() as record, calls:
            node = await self._authenticate_node(request, record)
            with self.limits.issue(node):
                pod = await self._authenticate_pod(request, node, record)
                with self._failures_as_pod_events(pod):
                    csr = self._parse(request, record)
                    issuer = self._select_issuer(request.options.issuer, csr)
                    self.trust.select(
                        request.options.issuer, request.options.federations
                    )  # fail before anything is signed
                    subject = await self.steps.find_subject(pod, record)
                    requested = RequestedCertificate.of(csr.names, csr.key_type, request.options)
                    grant = self.steps.apply_policy(subject, requested, record)
                    to_sign = IssuerRequest(csr, grant, pod, requested)
                    issued, pending = await self._sign(issuer, subject, requested, to_sign, record)
                    result = self._result(request, issued, pending)
            record.decision = "issued"
            return result

    async def _authenticate_node(self, request: IssuanceRequest, record: AuditRecord) -> PodIdentity:
        with record.timed("authentication_ms"):
            node = await self.authenticator.authenticate_node(request.node_token)
        record.node = node.node_name
        self.limits.count_node_issue(node)  # before the review of the pod token, which loads the API server
        return node

    async def _authenticate_pod(self, request: IssuanceRequest, node: PodIdentity, record: AuditRecord) -> PodIdentity:
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
            self._record_event(pod, error, str(error.args[0]))
            raise

    def _parse(self, request: IssuanceRequest, record: AuditRecord) -> ParsedCSR:
        if faults := request.faults():
            raise CertmountError(Reason.INVALID_REQUEST, *faults)
        record.issuer = request.options.issuer
        csr = parse_csr(request.csr)
        record.set_request(csr)
        return csr

    def _select_issuer(self, name: str, csr: ParsedCSR) -> Issuer:
        """Return the issuer; raises CertmountError IssuerNotFound, or InvalidCSR for what only the internal CA can sign."""
        issuer = self.issuers.get(name)
        if issuer is None:
            hint = f"use one of {', '.join(sorted(self.issuers))}"
            raise CertmountError(Reason.ISSUER_NOT_FOUND, Fault("issuer", f"the authority has no issuer {name}", hint))
        # An external issuer may copy extensions from the CSR, which can come from a compromised node.
        if name != DEFAULT_ISSUER and (faults := content_faults(csr)):
            raise CertmountError(Reason.INVALID_CSR, *faults)
        return issuer

    async def _sign(
        self,
        issuer: Issuer,
        subject: PolicySubject,
        requested: RequestedCertificate,
        request: IssuerRequest,
        record: AuditRecord,
    ) -> tuple[IssuedCertificate, CertmountError | None]:
        """Return the issuer's certificate, or an interim certificate and why the issuer's is pending."""
        issue = functools.partial(self.interim.issue, issuer)
        try:
            issued = await self.steps.sign(requested.issuer, issue, request, record)
        except CertmountError as error:
            if error.reason.kind is not FailureKind.PENDING or issuer.while_pending is None:
                raise
            return await self._sign_interim(subject, requested, request, error, record), error
        self.interim.forget(request.csr)
        return issued, None

    async def _sign_interim(
        self,
        subject: PolicySubject,
        requested: RequestedCertificate,
        request: IssuerRequest,
        pending: CertmountError,
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
        self._record_event(request.identity, pending, f"{_INTERIM} {pending.args[0]}")
        return replace(issued, renew_after=self.interim.retry_after(request.csr))

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
