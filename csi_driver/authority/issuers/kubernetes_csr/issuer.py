"""Has orders signed by one signer of the cluster, and leaves no request behind."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.certificate_check import certificate_problems, ends_at
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.kubernetes_csr.access import Access
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.kubernetes_csr.request import ORDER_LABEL, draft, order_faults, order_id, selector
from csi_driver.authority.issuers.kubernetes_csr.diagnostics import Survey, look
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.core.cluster.csr import APPROVED, ClusterCSR, CSRCondition
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.kube.csrs import CSRs

log = structlog.get_logger(__name__)

_PATIENCE_S = 30.0
"""For the signer. Programs answer in seconds; people, who approve by hand, don't, and a call takes up a slot."""
_LIST_S = 5.0
"""For the requests that there are, just after the start: one that this order has already is not made twice."""
_SURVEY_S = 60.0
"""So soon a replaced root reaches pods; also how often what was left behind is looked for."""
_SURVEY_AFTER_TROUBLE_S = 5.0
_UNCLAIMED = timedelta(minutes=10)
"""A finished request waits as long for its node, which asks again every half minute."""
_UNSIGNED = timedelta(minutes=15)
"""No signer takes so long; Kubernetes itself would keep an approved request for ever."""
_UNDECIDED = timedelta(hours=1)
"""For people who approve by hand. If the pod still asks, another request is made."""


class KubernetesCSR:
    """An :class:`csi_driver.authority.issuers.external.ExternalIssuer`."""

    shares_certificates = False

    def __init__(
        self,
        name: str,
        configuration: KubernetesCSRConfiguration,
        secrets: CredentialReader,
        access: Access,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._name = name
        self._configuration = configuration
        self._secrets = secrets
        self._access = access
        self._clock = clock
        self._patience_s = patience_s
        self._known = CSRs()
        self._survey = Survey()
        self._problem: str | None = "the cluster has not been looked at yet"

    @property
    def roots(self) -> tuple[bytes, ...]:
        """Those of the configuration; the internal CA's for our own signer."""
        if self._configuration.roots is None:
            return self._access.internal_roots()
        return self._survey.roots

    @property
    def problem(self) -> str | None:
        return self._problem

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            following = self._access.requests.follow(self._known, labels=selector(self._name))
            tasks.create_task(following.run(), name=f"requests of {self._name}")
            while True:
                await self.check()
                await self._tidy()
                await asyncio.sleep(_SURVEY_S if self._problem is None else _SURVEY_AFTER_TROUBLE_S)

    async def check(self) -> list[Finding]:
        survey = await look(self._configuration, self._secrets, self._access)
        survey.roots = survey.roots or self._survey.roots
        survey.username = survey.username or self._survey.username
        self._survey = survey
        if survey.problem != self._problem:
            log.info("issuer is usable", issuer=self._name) if survey.problem is None else log.warning(
                "issuer has a problem", issuer=self._name, problem=survey.problem
            )
        self._problem = survey.problem
        return survey.findings

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        """See :class:`csi_driver.authority.issuers.Issuer`."""
        if faults := order_faults(order, self._configuration):
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
        if not self._survey.username:
            await self.check()
        if not self.roots or not self._survey.username:
            raise self._unavailable(self._problem or "the roots of its signer are not known yet")
        csr = await self._asked(order)
        try:
            found = await self._known.wait(csr.name, self._patience_s)
        except KeyError:
            raise self._unavailable(f"someone has deleted the CertificateSigningRequest {csr.name}") from None
        if found is None:
            raise self._pending(self._known.find(csr.name) or csr)
        try:
            return self._checked(found, order)
        finally:
            await self._delete(found)

    async def _asked(self, order: IssuerRequest) -> ClusterCSR:
        """The order's request: the one that there is from an earlier call, to whichever replica, or a new one."""
        try:
            async with asyncio.timeout(_LIST_S):
                await self._known.listed.wait()
        except TimeoutError:
            raise self._unavailable("the requests that there are could not be read yet") from None
        label = order_id(order)
        csr = next((one for one in self._own() if one.labels.get(ORDER_LABEL) == label), None)
        if csr is None:
            csr = await self._access.requests.create(draft(self._name, self._configuration, order))
            self._known.add(csr)
        if self._configuration.approve and not csr.finished and csr.condition(APPROVED) is None:
            account = order.identity.service_account
            text = f"pod {account.namespace}/{order.identity.pod_name} may have it by {', '.join(order.grant.rules)}"
            try:
                await self._access.requests.decide(csr, CSRCondition(APPROVED, "PolicyAllows", text))
            except CertmountError:
                await self._delete(csr)
                raise
        return csr

    def _own(self) -> list[ClusterCSR]:
        """Those that the authority has made. Anyone may write its labels on others; the user name is stamped."""
        return [one for one in self._known if one.username == self._survey.username]

    def _checked(self, found: ClusterCSR, order: IssuerRequest) -> IssuedCertificate:
        if (refusal := found.refusal) is not None:
            denied = "failed to sign" if found.condition(APPROVED) else "denied"
            subject, text = f"issuer {self._name}", f"{self._configuration.signer} {denied} the request: {refusal}"
            raise CertmountError(Reason.NAME_NOT_ALLOWED, Fault(subject, text))
        try:
            chain = decode_certificates(found.certificate)
        except ValueError:
            raise self._unavailable("its signer has answered with what is no certificate") from None
        asked = order.request.names
        # What the signer has seen is the request, and nothing that policy has added to it.
        seen = dataclasses.replace(order, grant=dataclasses.replace(order.grant, names=asked))
        if problems := certificate_problems(chain[0], seen, self._clock()):
            signer = self._configuration.signer
            raise CertmountError(
                Reason.INVALID_RESPONSE, *(Fault(signer, f"the certificate {problem}") for problem in problems)
            )
        if not ends_at(chain, self.roots):
            raise self._unavailable("it signs by a root that is not among the configured ones; see its roots")
        return IssuedCertificate(
            tuple(one.public_bytes(Encoding.DER) for one in chain),
            self.roots,
            self._renew_after(chain),
            identity_included={*order.grant.names.uris} <= {*asked.uris},
        )

    def _renew_after(self, chain: list[x509.Certificate]) -> timedelta | None:
        """Ahead of an intermediate that ends before the leaf; else as the node likes."""
        end = min(one.not_valid_after_utc for one in chain)
        return None if end >= chain[0].not_valid_after_utc else max((end - self._clock()) * 2 / 3, timedelta())

    async def _delete(self, csr: ClusterCSR) -> None:
        try:
            await self._access.requests.delete(csr)
        except CertmountError as error:
            log.warning("a request is left to be removed later", issuer=self._name, csr=csr.name, error=str(error))
        else:
            self._known.forget(csr.name)

    async def _tidy(self) -> None:
        """Removes what nobody came back for: of pods that are gone, and of replicas that died."""
        for csr in self._own():
            if self._clock().timestamp() - csr.created_at > self._kept(csr).total_seconds():
                await self._delete(csr)

    def _kept(self, csr: ClusterCSR) -> timedelta:
        if csr.finished:
            return _UNCLAIMED
        return _UNSIGNED if self._configuration.approve or csr.condition(APPROVED) else _UNDECIDED

    def _pending(self, csr: ClusterCSR) -> CertmountError:
        signer = self._configuration.signer
        if csr.condition(APPROVED) is not None or self._configuration.approve:
            waits = f"is approved and waits for {signer} to sign it"
        else:
            waits = f"waits for someone to approve it: kubectl certificate approve {csr.name}"
        problem = f"CertificateSigningRequest {csr.name} {waits}"
        return CertmountError(Reason.ISSUANCE_PENDING, Fault(f"issuer {self._name}", problem))

    def _unavailable(self, problem: str) -> CertmountError:
        hint = f"`certmount issuer check {self._name}` looks at all of it"
        return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"issuer {self._name}", problem, hint))
