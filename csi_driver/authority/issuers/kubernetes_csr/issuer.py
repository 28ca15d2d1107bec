"""Requests certificates from one signer of the cluster, and deletes each CertificateSigningRequest afterwards."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.issuers import Findings, IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader, CSRAccess
from csi_driver.authority.issuers.external_issuer import (
    DiagnosedIssuer,
    check_certificate,
    decode_chain,
    ends_at_root,
    issued_certificate,
)
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.kubernetes_csr.diagnostics import KubernetesCSRDiagnosis, diagnose_kubernetes_csr
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.cluster.csr import (
    APPROVED,
    DIGITAL_SIGNATURE,
    KEY_ENCIPHERMENT,
    PURPOSES,
    ClusterCSR,
    CSRCondition,
    CSRDraft,
)
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import Principal, Requester
from csi_driver.core.shares import FairShares
from csi_driver.kube.csr.cache import CSRCache
from csi_driver.kube.metadata import MANAGED

log = structlog.get_logger(__name__)

_WAIT_FOR_SIGNER_S = 30.0  # Signers answer in seconds; approvals take longer, and a waiting call occupies the queue
_WAIT_FOR_LIST_S = 5.0  # The existing requests must be known, or a second one would be created
_KEEP_SIGNED = timedelta(minutes=10)  # The node retries every half minute
_KEEP_APPROVED = timedelta(minutes=15)  # No signer takes longer, and Kubernetes keeps approved requests forever
_KEEP_UNDECIDED = timedelta(hours=1)  # For manual approvals; the pod's next call creates another request
MAX_REQUESTS = 1000
"""CertificateSigningRequests of one issuer that exist at the same time."""
_NAMESPACE_LABEL, _OWNER_LABEL = "certmount.dev/namespace", "certmount.dev/owner-sha256"
ISSUER_LABEL, REQUEST_LABEL = "certmount.dev/issuer", "certmount.dev/request"
_REQUESTER_ANNOTATION, _NAMES_ANNOTATION = "certmount.dev/requester", "certmount.dev/names"
_MAX_ANNOTATION = 2048


@dataclass(eq=False)
class KubernetesCSRIssuer(DiagnosedIssuer):
    """One signer of the cluster."""

    configuration: KubernetesCSRConfiguration
    credentials: CredentialReader
    access: CSRAccess
    clock: Callable[[], datetime] = field(default=utc_now, kw_only=True)
    wait_s: float = field(default=_WAIT_FOR_SIGNER_S, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cache = CSRCache()
        self._known = KubernetesCSRDiagnosis()
        self._creating: list[Mapping[str, str]] = []  # The labels of the requests

    @property
    def environment(self) -> str:
        return self.configuration.signer

    @property
    def roots(self) -> tuple[bytes, ...]:
        return self.access.internal_roots() if self.configuration.roots is None else self._known.roots

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            watch = self.access.requests.watch(self._cache, labels=label_selector(self.name))
            tasks.create_task(watch.run(), name=f"CertificateSigningRequests of {self.name}")
            await self._diagnose_periodically()

    async def diagnose(self) -> Findings:
        diagnosis = await diagnose_kubernetes_csr(self.configuration, self.credentials, self.access.requests)
        diagnosis.roots = diagnosis.roots or self._known.roots
        diagnosis.username = diagnosis.username or self._known.username
        self._known = diagnosis
        self._report(diagnosis.findings.problem)
        return diagnosis.findings

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        if faults := request_faults(request, self.configuration):
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
        if not self._known.username:
            await self.diagnose()
        if not self.roots or not self._known.username:
            raise self._unavailable(self._problem or "the signer's roots are not known yet")
        csr = await self._find_or_create(request)
        try:
            finished = await self._cache.wait(csr.name, self.wait_s)
        except KeyError:
            raise self._unavailable(f"another client deleted CertificateSigningRequest {csr.name}") from None
        if finished is None:
            raise self._pending(self._cache.find(csr.name) or csr)
        try:
            return self._checked(finished, request)
        finally:
            await self._delete(finished)

    async def _find_or_create(self, request: IssuerRequest) -> ClusterCSR:
        """Return the request that an earlier call to any replica created, or a new one; approved if so configured."""
        try:
            async with asyncio.timeout(_WAIT_FOR_LIST_S):
                await self._cache.listed.wait()
        except TimeoutError:
            raise self._unavailable("the existing CertificateSigningRequests are not known yet") from None
        label = request_id(request)
        csr = next((one for one in self._own() if one.labels.get(REQUEST_LABEL) == label), None)
        if csr is None:
            csr = await self._create(request)
        if self.configuration.approve and not csr.finished and csr.condition(APPROVED) is None:
            text = f"allowed for {request.identity} by {', '.join(request.grant.rules)}"
            try:
                await self.access.requests.decide(csr, CSRCondition(APPROVED, "PolicyAllows", text))
            except CertmountError:
                await self._delete(csr)
                raise
        return csr

    async def _create(self, request: IssuerRequest) -> ClusterCSR:
        draft = csr_draft(self.name, self.configuration, request)
        resource = f"CertificateSigningRequests of issuer {self.name}"
        shares = FairShares(resource, MAX_REQUESTS, full=Reason.AUTHORITY_OVERLOADED)
        # The cache knows those of all replicas. Calls of this one whose request it does not know yet count too.
        for labels in (*(one.labels for one in self._own()), *self._creating):
            shares.count(_owners(labels, request.identity))
        shares.take(request.identity.tenants)
        self._creating.append(draft.labels)
        try:
            csr = await self.access.requests.create(draft)
            self._cache.add(csr)
        finally:
            self._creating.remove(draft.labels)
        return csr

    def _own(self) -> list[ClusterCSR]:
        """Return the requests of the authority. The API server sets the user name, while anyone can set the labels."""
        return [one for one in self._cache if one.username == self._known.username]

    def _checked(self, csr: ClusterCSR, request: IssuerRequest) -> IssuedCertificate:
        signer = self.configuration.signer
        if (rejection := csr.rejection) is not None:
            verb = "failed to sign" if csr.condition(APPROVED) else "denied"
            fault = Fault(f"issuer {self.name}", f"{signer} {verb} the request: {rejection}")
            raise CertmountError(Reason.NAME_NOT_ALLOWED, fault)
        try:
            chain = decode_chain(csr.certificate)
        except ValueError as problem:
            raise self._unavailable(f"the signer's response {problem}") from None
        # The signer got the CSR, without the names that the policy added.
        expected = replace(request, grant=replace(request.grant, names=request.csr.names))
        check_certificate(chain[0], expected, self.clock(), signer)
        if not ends_at_root(chain, self.roots):
            raise self._unavailable("the chain does not end at a configured root; check roots")
        return issued_certificate(chain, self.roots, self.clock())

    async def _delete(self, csr: ClusterCSR) -> None:
        try:
            await self.access.requests.delete(csr)
        except CertmountError as error:
            text = "CertificateSigningRequest not deleted; retrying later"
            log.warning(text, issuer=self.name, csr=csr.name, error=str(error))
        else:
            self._cache.forget(csr.name)

    async def _maintain(self) -> None:
        for csr in self._own():
            if self.clock().timestamp() - csr.created_at > self._keep(csr).total_seconds():
                await self._delete(csr)

    def _keep(self, csr: ClusterCSR) -> timedelta:
        if csr.finished:
            return _KEEP_SIGNED
        return _KEEP_APPROVED if self.configuration.approve or csr.condition(APPROVED) else _KEEP_UNDECIDED

    def _pending(self, csr: ClusterCSR) -> CertmountError:
        if csr.condition(APPROVED) is not None or self.configuration.approve:
            problem = f"is approved and waits for {self.configuration.signer} to sign it"
        else:
            problem = f"waits for approval: kubectl certificate approve {csr.name}"
        fault = Fault(f"issuer {self.name}", f"CertificateSigningRequest {csr.name} {problem}")
        return CertmountError(Reason.ISSUANCE_PENDING, fault)


def label_selector(issuer: str) -> str:
    return f"{ISSUER_LABEL}={issuer}"


def request_faults(request: IssuerRequest, configuration: KubernetesCSRConfiguration) -> list[Fault]:
    faults: list[Fault] = []
    duration, minimum, maximum = request.grant.duration, configuration.min_duration, configuration.max_duration
    text = f"{format_duration(duration)} is {{}} than this issuer's {{}} of {{}}"
    if duration < minimum:
        faults.append(Fault("duration", text.format("shorter", "minimum", format_duration(minimum))))
    if maximum is not None and duration > maximum:
        faults.append(Fault("duration", text.format("longer", "maximum", format_duration(maximum))))
    if not len(request.csr.names):
        # The signer gets the node's CSR, and the authority can't add names to that.
        hint = f"set the names, for example uri-sans: {', '.join(str(uri) for uri in request.grant.names.uris)}"
        faults.append(
            Fault("name", "no name is requested, and a signer of the cluster signs only requested names", hint)
        )
    return faults


def request_id(request: IssuerRequest) -> str:
    """Return a label value that is the same for the same request, so that every replica finds it."""
    content = [
        public_bytes(request.csr.public_key).hex(),
        str(request.identity),
        *(usage.value for usage in request.grant.usages),
        str(request.grant.duration.total_seconds()),
        *(str(name) for name in request.csr.names),
    ]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:40]


def csr_draft(issuer: str, configuration: KubernetesCSRConfiguration, request: IssuerRequest) -> CSRDraft:
    owner, is_rsa = request.identity.principal, isinstance(request.csr.public_key, rsa.RSAPublicKey)
    key_usages = (DIGITAL_SIGNATURE, KEY_ENCIPHERMENT) if is_rsa else (DIGITAL_SIGNATURE,)
    return CSRDraft(
        name_prefix=f"certmount-{issuer[:40]}-",
        signer=configuration.signer,
        request=x509.load_der_x509_csr(request.csr.der).public_bytes(Encoding.PEM),
        usages=(*key_usages, *(PURPOSES[usage] for usage in request.grant.usages)),
        expiration_s=int(request.grant.duration.total_seconds()),
        labels={
            **MANAGED,
            ISSUER_LABEL: issuer,
            REQUEST_LABEL: request_id(request),
            _NAMESPACE_LABEL: owner.namespace,
            _OWNER_LABEL: _owner_label(owner),
        },
        annotations={
            _REQUESTER_ANNOTATION: str(request.identity),
            _NAMES_ANNOTATION: str(request.csr.names)[:_MAX_ANNOTATION],
        },
    )


def _owner_label(owner: Principal) -> str:
    """Return a label value; the name of a service account can be longer than one."""
    return hashlib.sha256(owner.label.encode()).hexdigest()[:40]


def _owners(labels: Mapping[str, str], requester: Requester) -> tuple[str, str]:
    """Return the owners of a request: those of the requester if they are the same."""
    label = labels.get(_OWNER_LABEL, "")
    owner = requester.principal.label if label == _owner_label(requester.principal) else label
    return f"namespace {labels.get(_NAMESPACE_LABEL, '')}", owner
