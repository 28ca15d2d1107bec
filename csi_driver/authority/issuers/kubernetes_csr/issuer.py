"""Requests certificates from one signer of the cluster, and deletes each CertificateSigningRequest afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import structlog

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.issuers import Findings, IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader, CSRAccess
from csi_driver.authority.issuers.external_issuer import (
    DiagnosedIssuer,
    check_certificate,
    ends_at_root,
    issued_certificate,
)
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.kubernetes_csr.diagnostics import KubernetesCSRDiagnosis, diagnose_kubernetes_csr
from csi_driver.authority.issuers.kubernetes_csr.request import (
    REQUEST_LABEL,
    csr_draft,
    label_selector,
    request_faults,
    request_id,
)
from csi_driver.core.cluster.csr import APPROVED, ClusterCSR, CSRCondition
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.kube.csr_cache import CSRCache

log = structlog.get_logger(__name__)

_WAIT_FOR_SIGNER_S = 30.0  # Signers answer in seconds; approvals take longer, and a waiting call occupies the queue
_WAIT_FOR_LIST_S = 5.0  # The existing requests must be known, or a second one would be created
_KEEP_SIGNED = timedelta(minutes=10)  # The node retries every half minute
_KEEP_APPROVED = timedelta(minutes=15)  # No signer takes longer, and Kubernetes keeps approved requests forever
_KEEP_UNDECIDED = timedelta(hours=1)  # For manual approvals; the pod's next call creates another request


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
            csr = await self.access.requests.create(csr_draft(self.name, self.configuration, request))
            self._cache.add(csr)
        if self.configuration.approve and not csr.finished and csr.condition(APPROVED) is None:
            pod = f"{request.identity.service_account.namespace}/{request.identity.pod_name}"
            text = f"allowed for pod {pod} by {', '.join(request.grant.rules)}"
            try:
                await self.access.requests.decide(csr, CSRCondition(APPROVED, "PolicyAllows", text))
            except CertmountError:
                await self._delete(csr)
                raise
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
            chain = decode_certificates(csr.certificate)
        except ValueError:
            raise self._unavailable("the signer returned an invalid certificate") from None
        names = request.csr.names
        # The signer got the CSR, without the names that the policy added.
        expected = replace(request, grant=replace(request.grant, names=names))
        check_certificate(chain[0], expected, self.clock(), signer)
        if not ends_at_root(chain, self.roots):
            raise self._unavailable("the chain does not end at a configured root; check roots")
        included = {*request.grant.names.uris} <= {*names.uris}
        return issued_certificate(chain, self.roots, self.clock(), identity_included=included)

    async def _delete(self, csr: ClusterCSR) -> None:
        try:
            await self.access.requests.delete(csr)
        except CertmountError as error:
            text = "CertificateSigningRequest not deleted; retrying later"
            log.warning(text, issuer=self.name, csr=csr.name, error=str(error))
        else:
            self._cache.forget(csr.name)

    async def _maintain(self) -> None:
        """Delete requests that no node needs any more: of deleted pods, and of replicas that stopped."""
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
