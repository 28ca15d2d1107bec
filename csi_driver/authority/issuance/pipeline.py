"""What a request passes on its way to a certificate, in this order: proof, limits, policy, issuer, trust."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

from cryptography import x509

from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits
from csi_driver.authority.authn.token_reviews import retry_while_unavailable
from csi_driver.authority.issuance.interim import InterimCertificates, while_pending
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.csr import parse_csr
from csi_driver.core.certificates.csr_content import content_faults
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import PolicySubject, RequestedCertificate
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, Usage
from csi_driver.telemetry.authority_metrics import AuthorityMetrics


class EventRecorder(Protocol):
    """What is said on pods for people to see."""

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        """Says it as soon as it can; never waits, never raises."""


class SubjectLookup(Protocol):
    """What the cluster says of pods beside their identity."""

    async def find(self, pod: PodIdentity) -> PolicySubject:
        """The pod as policy sees it; raises CertmountError PodNotFound, or TokenReviewUnavailable where the cluster can't be followed."""


class TrustAcknowledger(Protocol):
    """What nodes have said they trust."""

    async def confirm(self, node: str, set: str, generation: int, /) -> None:  # noqa: A002  # the wire's word
        """Keeps that every volume of the node trusts this generation of the set."""


@dataclass(frozen=True, slots=True)
class IssuanceRequest:
    """What a proven pod's node asks for, in values."""

    csr: bytes
    """PKCS#10, DER, unchecked."""
    duration: timedelta | None
    usages: tuple[Usage, ...]
    issuer: str
    federations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IssuanceResult:
    """The certificate, and the sets of roots that the pod is to trust, by name."""

    issued: IssuedCertificate
    trust: Mapping[str, RootSet]
    pending: CertmountError | None = None
    """Where the certificate stands in for one that is on its way: what that one waits for."""


@dataclass(frozen=True, slots=True)
class IssuancePipeline:
    """Those whom a request passes. What they find goes into ``record``, so that a refusal tells how far it came."""

    admission: Authenticator
    limits: RequestLimits
    subjects: SubjectLookup
    policy: PolicyFile
    issuers: Mapping[str, Issuer]
    metrics: AuthorityMetrics
    events: EventRecorder
    confirmations: TrustAcknowledger
    trust: TrustBundles
    stand_ins: InterimCertificates = field(default_factory=InterimCertificates)

    async def prove_node(self, caller: Secret[str], record: dict[str, Any]) -> PodIdentity:
        """The driver that calls; raises CertmountError as :class:`Authenticator`, and TooManyRequests."""
        started = time.perf_counter()
        try:
            node = await self.admission.prove_node(caller)
        finally:
            record["proof_ms"] = milliseconds(started)
        record["node"] = node.node_name
        self.limits.count_node(node)  # before the pod's proof, which costs the API server a review
        return node

    async def prove_pod(self, token: Secret[str], node: PodIdentity, record: dict[str, Any]) -> PodIdentity:
        """The pod on that node; raises CertmountError as :class:`Authenticator`, and TooManyRequests."""
        started = time.perf_counter()
        try:
            pod = await self.admission.prove_pod(token, node)
        finally:
            record["proof_ms"] = round(record["proof_ms"] + milliseconds(started), 2)
        account = pod.service_account
        record.update(namespace=account.namespace, service_account=account.name, pod=pod.pod_name, pod_uid=pod.pod_uid)
        self.limits.count_pod(pod)
        return pod

    async def issue(self, pod: PodIdentity, wanted: IssuanceRequest, record: dict[str, Any]) -> IssuanceResult:
        """A certificate for a proven pod.

        Raises:
            CertmountError: InvalidCSR, IssuerNotFound, FederationNotFound, or as subjects, policy and issuer say.
        """
        started = time.perf_counter()
        record["issuer"] = wanted.issuer
        request = parse_csr(wanted.csr)
        record["asked"] = _texts(request.names)
        record["key_sha256"] = key_fingerprint(request.public_key)
        issuer = self._issuer(wanted.issuer)
        if wanted.issuer != DEFAULT_ISSUER and (faults := content_faults(request)):
            # A signer outside may copy whatever there is, and a node's request may be a stolen node's.
            raise CertmountError(Reason.INVALID_CSR, *faults)
        self.trust.select(wanted.issuer, wanted.federations)  # what is refused for them is refused before it is signed
        subject = await retry_while_unavailable(functools.partial(self.subjects.find, pod))
        asked = RequestedCertificate(request.names, request.key_type, wanted.usages, wanted.duration, wanted.issuer)
        grant = self.policy.current.decide(subject, asked)
        record.update(policy_ms=milliseconds(started), names=_texts(grant.names), rules=grant.rules)
        order = IssuerRequest(request, grant, pod, asked)
        try:
            issued = await self._signed(issuer, wanted.issuer, order, record)
        except CertmountError as pending:
            if pending.reason is not Reason.ISSUANCE_PENDING or while_pending(issuer) is None:
                raise
            issued = await self._stand_in(subject, order, asked, pending, record)
            _record_leaf(issued.chain, record)
            sets = self.trust.select(DEFAULT_ISSUER, (wanted.issuer, *wanted.federations))
            return IssuanceResult(issued, sets, pending)
        self.stand_ins.over(order)
        _record_leaf(issued.chain, record)
        # As of now, not as of the question: whoever signed may have taken its time.
        return IssuanceResult(issued, self.trust.select(wanted.issuer, wanted.federations))

    async def _stand_in(
        self,
        subject: PolicySubject,
        order: IssuerRequest,
        asked: RequestedCertificate,
        pending: CertmountError,
        record: dict[str, Any],
    ) -> IssuedCertificate:
        """A certificate of the internal CA for the same key, where policy allows the pod these names from it as well.

        Raises:
            CertmountError: ``pending`` where it does not; or as the internal CA says.
        """
        asked = replace(asked, issuer=DEFAULT_ISSUER)
        try:
            grant = self.policy.current.decide(subject, asked)
        except CertmountError:
            raise pending from None
        record.update(interim=True, pending=str(pending), names=_texts(grant.names), rules=grant.rules)
        own = replace(order, grant=grant, asked=asked)
        issued = await self._signed(self._issuer(DEFAULT_ISSUER), DEFAULT_ISSUER, own, record)
        return replace(issued, renew_after=self.stand_ins.ask_again_after(order))

    def _issuer(self, name: str) -> Issuer:
        issuer = self.issuers.get(name)
        if issuer is None:
            problem = f"the authority has no issuer {name}"
            raise CertmountError(
                Reason.ISSUER_NOT_FOUND, Fault("issuer", problem, f"it has {', '.join(sorted(self.issuers))}")
            )
        return issuer

    async def _signed(
        self, issuer: Issuer, name: str, order: IssuerRequest, record: dict[str, Any]
    ) -> IssuedCertificate:
        started = time.perf_counter()
        reason: Reason | None = Reason.INTERNAL
        try:
            issued = await self.stand_ins.issued_soon(issuer, order)
            reason = None
        except CertmountError as error:
            reason = error.reason
            raise
        finally:
            seconds = time.perf_counter() - started
            record["sign_ms"] = round(seconds * 1000, 2)
            self.metrics.issuer_called(name, seconds, reason)
        return issued


def milliseconds(started: float) -> float:
    """Since ``started``, a value of :func:`time.perf_counter`."""
    return round((time.perf_counter() - started) * 1000, 2)


def _texts(names: Names) -> list[str]:
    return [name.text for name in names]


def _record_leaf(chain: Sequence[bytes], record: dict[str, Any]) -> None:
    leaf = x509.load_der_x509_certificate(chain[0])
    record.update(serial=f"{leaf.serial_number:x}", not_after=f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")
