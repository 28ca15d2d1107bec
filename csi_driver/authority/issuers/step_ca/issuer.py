"""Signs certificates with step-ca, and follows its roots, its provisioner and its health."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.issuers import Findings, IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.external_issuer import (
    DiagnosedIssuer,
    check_certificate,
    ends_at_root,
    issued_certificate,
)
from csi_driver.authority.issuers.fair_slots import FairSlots
from csi_driver.authority.issuers.http_client import MAX_CONNECTIONS, HttpError, JsonResponse
from csi_driver.authority.issuers.step_ca.client import StepCAClient, fetch_pinned_roots, parse_signed_chain
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.diagnostics import ProvisionerKeyLoader, StepCADiagnosis, diagnose_step_ca
from csi_driver.authority.issuers.step_ca.provisioner_key import ProvisionerKey
from csi_driver.authority.issuers.step_ca.provisioners import request_faults, token_claims
from csi_driver.core.backoff import Backoff
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason

_BACKOFF = Backoff(0.25, 1.0, factor=4)  # step-ca restarts within about a second; the node retries longer outages
_ATTEMPTS = 3
_RETRY_FOR_S = 10.0
MAX_SIGNING = MAX_CONNECTIONS
"""Requests for a certificate at the same time, to one step-ca from one replica."""
_WAIT_S = 10.0


@dataclass(eq=False)
class StepCAIssuer(DiagnosedIssuer):
    """One step-ca."""

    # The authority's token contains the names, and step-ca compares only the names that the CSR has.
    needs_names_in_csr = False

    configuration: StepCAConfiguration
    credentials: CredentialReader
    clock: Callable[[], datetime] = utc_now

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keys = ProvisionerKeyLoader(self.configuration, self.credentials)
        self._pinned_roots: tuple[x509.Certificate, ...] = ()
        self._client: StepCAClient | None = None
        self._connecting = asyncio.Lock()
        self._known = StepCADiagnosis()
        self._diagnosing: asyncio.Task[StepCADiagnosis] | None = None
        self._running = False
        self._slots = FairSlots(f"requests to issuer {self.name} at the same time", MAX_SIGNING, _WAIT_S)

    @property
    def environment(self) -> str:
        return self.configuration.url

    @property
    def roots(self) -> tuple[bytes, ...]:
        return self._known.roots

    async def run(self) -> None:
        self._running = True
        try:
            await self._diagnose_periodically()
        finally:
            self._running = False
            if self._diagnosing is not None:
                self._diagnosing.cancel()
                await asyncio.wait([self._diagnosing])
            await self._disconnect()

    async def diagnose(self) -> Findings:
        try:
            return (await self._diagnose()).findings
        finally:
            if not self._running:
                await self._disconnect()

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        key = self._known.key or (await self._diagnose()).key
        if key is None or self._known.provisioner is None:
            raise self._unavailable(self._problem or "")
        if faults := request_faults(request, self._known.provisioner.limits):
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
        response = await self._sign(request, key)
        if response.status == 401:
            diagnosis = await self._diagnose()
            if diagnosis.findings.problem or diagnosis.key is None or diagnosis.key is key:
                raise self._unauthorized(diagnosis)
            response = await self._sign(request, diagnosis.key)  # the provisioner's key was replaced
        if response.status in (400, 403):
            # Omit "The request was forbidden by the certificate authority: ", which repeats our own text.
            text = response.message.rpartition("certificate authority: ")[2] or f"HTTP {response.status}"
            hint = "check the provisioner's claims and policy in step-ca's configuration"
            fault = Fault(f"issuer {self.name}", f"step-ca rejected the request: {text}", hint)
            raise CertmountError(Reason.NAME_NOT_ALLOWED, fault)
        if response.status != 201:
            raise self._unavailable(f"step-ca returned HTTP {response.status} {response.message}".rstrip())
        return await self._checked(response, request)

    async def _sign(self, request: IssuerRequest, key: ProvisionerKey) -> JsonResponse:
        """Return step-ca's response. Each attempt needs a new token, because a token is used up even if the call fails."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _RETRY_FOR_S
        owners = request.identity.tenants
        csr = x509.load_der_x509_csr(request.csr.der).public_bytes(Encoding.PEM).decode("ascii")
        for attempt in range(1, _ATTEMPTS + 1):
            claims = token_claims(request, self.configuration, secrets.token_urlsafe(24))
            delay_s = _BACKOFF.delay_s(attempt)
            last = attempt == _ATTEMPTS or loop.time() + delay_s > deadline
            try:
                client = await self._connect()
                async with self._slots.hold(owners):
                    token = key.token(claims, request.csr.der, self.clock()).reveal()
                    response = await client.sign(csr, token, format_duration(request.grant.duration))
                if last or response.status not in (429, 500, 502, 503, 504):
                    return response
            except HttpError as error:
                if last or not error.retryable:
                    raise self._unavailable(str(error)) from None
            await asyncio.sleep(delay_s)
        raise AssertionError("the last attempt returns or raises")

    async def _checked(self, response: JsonResponse, request: IssuerRequest) -> IssuedCertificate:
        chain = parse_signed_chain(response)
        if not chain:
            raise self._unavailable("the response contains no certificate chain")
        hint = "check the provisioner's template and webhooks; docs/issuers.md has a template for usages"
        check_certificate(chain[0], request, self.clock(), "step-ca", hint)
        if not ends_at_root(chain, self.roots):
            await self._diagnose()  # step-ca's root may have changed since the last diagnosis
            if not ends_at_root(chain, self.roots):
                raise self._unavailable("the chain ends at a root that step-ca does not publish at /roots")
        return issued_certificate(chain, self.roots, self.clock())

    def _unauthorized(self, diagnosis: StepCADiagnosis) -> CertmountError:
        """Explain HTTP 401, which step-ca sends without a reason, by what step-ca publishes."""
        lack = f'"dnsNames" in ca.json lack the host of {self.configuration.url.removeprefix("https://")}'
        other = f"provisioner, key and clock match, so step-ca has just started, or its {lack}; check its log"
        problem = diagnosis.findings.problem or other
        return self._unavailable(f"step-ca rejected the authority's token (HTTP 401): {problem}")

    async def _diagnose(self) -> StepCADiagnosis:
        if self._diagnosing is None or self._diagnosing.done():
            self._diagnosing = asyncio.create_task(self._run_diagnosis(), name=f"diagnosis of {self.name}")
        diagnosing = self._diagnosing
        await asyncio.wait([diagnosing])
        if diagnosing.cancelled():
            raise self._unavailable("the issuer is being replaced")
        return diagnosing.result()

    async def _run_diagnosis(self) -> StepCADiagnosis:
        try:
            client = await self._connect(refresh=True)
            diagnosis = await diagnose_step_ca(client, self.configuration, self._keys, self.clock)
        except HttpError as error:
            diagnosis = StepCADiagnosis()
            diagnosis.findings.add(error.subject, False, str(error))
        new, known = diagnosis, self._known
        provisioner, key = new.provisioner or known.provisioner, new.key or known.key
        self._known = StepCADiagnosis(new.findings, new.roots or known.roots, provisioner, key)
        self._report(diagnosis.findings.problem)
        return diagnosis

    async def _connect(self, *, refresh: bool = False) -> StepCAClient:
        """Return the client; ``refresh`` reads the root file again. Raise HttpError."""
        async with self._connecting:
            if self._client is not None and not refresh:
                return self._client
            roots = self._pinned_roots
            if self.configuration.root_file is not None or not roots:
                roots = await fetch_pinned_roots(self.configuration)
            if self._client is None or roots != self._pinned_roots:
                await self._disconnect()
                self._pinned_roots, self._client = roots, StepCAClient(self.configuration.url, roots)
            return self._client

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
