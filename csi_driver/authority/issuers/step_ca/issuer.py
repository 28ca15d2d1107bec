"""Signs orders by one step-ca, and follows its roots, its provisioner and its health."""

from __future__ import annotations

import asyncio
import contextlib
import secrets as randomness
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.certificate_check import certificate_problems, ends_at
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.step_ca.client import Answer, Client, Unreachable
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.request import claims_of, order_faults
from csi_driver.authority.issuers.step_ca.provisioner_key import ProvisionerKey
from csi_driver.authority.issuers.step_ca.diagnostics import KeyRing, Survey, find_pinned, look
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates

log = structlog.get_logger(__name__)

_SURVEY_S = 60.0
"""So soon a new root reaches pods, and a new key of the provisioner is used; five small requests."""
_SURVEY_AFTER_TROUBLE_S = 5.0
_RETRIES_S = (0.25, 1.0)
"""A step-ca that restarts is away for about a second; whatever lasts longer is for the node, which tries again."""
_PATIENCE_S = 10.0
_MAX_CHAIN = 10
_SOONEST_RENEWAL = timedelta(minutes=1)


class StepCA:
    """An :class:`csi_driver.authority.issuers.external.ExternalIssuer`."""

    shares_certificates = False

    def __init__(
        self,
        name: str,
        configuration: StepCAConfiguration,
        secrets: CredentialReader,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._name = name
        self._configuration = configuration
        self._keys = KeyRing(configuration, secrets)
        self._clock = clock
        self._pinned: tuple[x509.Certificate, ...] = ()
        self._client: Client | None = None
        self._known = Survey()
        self._problem: str | None = "it has not been reached yet"
        self._surveying: asyncio.Task[Survey] | None = None
        self._connecting = asyncio.Lock()
        self._trouble = asyncio.Event()
        self._running = False

    @property
    def roots(self) -> tuple[bytes, ...]:
        """Those of step-ca and of whom it federates with, as they were last handed out."""
        return self._known.roots

    @property
    def problem(self) -> str | None:
        return self._problem

    async def run(self) -> None:
        self._running = True
        try:
            while True:
                await self._survey()
                self._trouble.clear()
                if self._problem is not None:
                    await asyncio.sleep(_SURVEY_AFTER_TROUBLE_S)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SURVEY_S):
                        await self._trouble.wait()
        finally:
            self._running = False
            if self._surveying is not None:
                self._surveying.cancel()
                await asyncio.wait([self._surveying])
            await self._disconnect()

    async def check(self) -> list[Finding]:
        try:
            return (await self._survey()).findings
        finally:
            if not self._running:
                await self._disconnect()

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        """See :class:`csi_driver.authority.issuers.Issuer`."""
        key = self._known.key or (await self._survey()).key
        if key is None or self._known.provisioner is None:
            raise self._unavailable(self._problem or "")
        if faults := order_faults(order, self._known.provisioner.lives):
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
        answer = await self._signed(order, key)
        if answer.status == 401:
            survey = await self._survey()
            if survey.problem is not None or survey.key is None or survey.key is key:
                raise self._unauthorised(survey)
            answer = await self._signed(order, survey.key)  # as when the provisioner's key has just been replaced
        if answer.status in (400, 403):
            # "The request was forbidden by the certificate authority: ..." says itself what the rest of our text says.
            text = answer.message.rpartition("certificate authority: ")[2] or f"HTTP {answer.status}"
            hint = "see the provisioner's claims and policy in step-ca's configuration"
            raise CertmountError(
                Reason.NAME_NOT_ALLOWED, Fault(f"issuer {self._name}", f"step-ca refuses it: {text}", hint)
            )
        if answer.status != 201:
            raise self._unavailable(f"step-ca answers HTTP {answer.status} {answer.message}".rstrip())
        return await self._checked(answer, order)

    async def _signed(self, order: IssuerRequest, key: ProvisionerKey) -> Answer:
        """Step-ca's answer. Each try has a token of its own, as one is used up whatever came of it."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _PATIENCE_S
        csr = x509.load_der_x509_csr(order.request.der).public_bytes(Encoding.PEM).decode("ascii")
        for delay in (*_RETRIES_S, None):
            claims = claims_of(order, self._configuration, randomness.token_urlsafe(24))
            token = key.token(claims, self._clock()).reveal()
            body = {"csr": csr, "ott": token, "notAfter": format_duration(order.grant.duration)}
            last = delay is None or loop.time() + delay > end
            try:
                answer = await (await self._connected()).post("/1.0/sign", body)
                if last or answer.status not in (429, 500, 502, 503, 504):
                    return answer
            except Unreachable as error:
                if last or error.subject not in ("reachable", "answer"):
                    raise self._unavailable(str(error)) from None
            await asyncio.sleep(delay or 0)
        raise AssertionError("the last try returns or raises")

    async def _checked(self, answer: Answer, order: IssuerRequest) -> IssuedCertificate:
        chain = self._chain(answer)
        if problems := certificate_problems(chain[0], order, self._clock()):
            hint = "look at the template and the webhooks of the provisioner; docs/issuers.md has a template for usages"
            faults = [Fault("step-ca", f"the certificate {problem}") for problem in problems]
            raise CertmountError(Reason.INVALID_RESPONSE, *faults[:-1], Fault("step-ca", faults[-1].problem, hint))
        if not ends_at(chain, self.roots):
            await self._survey()  # it may have changed its root a moment ago
            if not ends_at(chain, self.roots):
                raise self._unavailable("it signs by a root that it does not hand out at /roots")
        return IssuedCertificate(
            tuple(one.public_bytes(Encoding.DER) for one in chain), self.roots, self._renew_after(chain)
        )

    def _chain(self, answer: Answer) -> list[x509.Certificate]:
        listed = answer.document.get("certChain")
        try:
            chain = [decode_certificates(pem.encode())[0] for pem in listed] if isinstance(listed, list) else []
        except (ValueError, AttributeError):
            chain = []
        if not 0 < len(chain) <= _MAX_CHAIN:
            raise self._unavailable("its answer holds no chain of certificates")
        return chain

    def _renew_after(self, chain: list[x509.Certificate]) -> timedelta | None:
        """Ahead of an intermediate that ends before the leaf, as step-ca signs beyond its own end; else as the node likes."""
        end = min(one.not_valid_after_utc for one in chain)
        if end >= chain[0].not_valid_after_utc:
            return None
        return max((end - self._clock()) * 2 / 3, _SOONEST_RENEWAL)

    def _unauthorised(self, survey: Survey) -> CertmountError:
        """Step-ca's 401 says nothing on purpose; what it lists to anyone tells most of the reasons."""
        host = self._configuration.url.removeprefix("https://")
        rest = (
            "provisioner, key and clock fit, so it was started a moment ago, or else knows itself by another name: see that"
            f' "dnsNames" in its ca.json has the host of {host}; its log has the reason'
        )
        return self._unavailable(f"step-ca refuses the authority's token (HTTP 401): {survey.problem or rest}")

    async def _survey(self) -> Survey:
        """A look at step-ca now; who asks while one is under way shares it."""
        if self._surveying is None or self._surveying.done():
            self._surveying = asyncio.create_task(self._surveyed(), name=f"survey of {self._name}")
        survey = self._surveying
        await asyncio.wait([survey])
        if survey.cancelled():
            raise self._unavailable("it is being replaced")
        return survey.result()

    async def _surveyed(self) -> Survey:
        try:
            survey = await look(await self._connected(refresh=True), self._configuration, self._keys, self._clock)
        except Unreachable as error:
            survey = Survey([Finding(error.subject, False, str(error))])
        self._known = Survey(
            survey.findings,
            survey.roots or self._known.roots,
            survey.provisioner or self._known.provisioner,
            survey.key or self._known.key,
        )
        self._tell(survey.problem)
        return survey

    def _tell(self, problem: str | None) -> None:
        if problem is None and self._problem is not None:
            log.info("issuer is usable", issuer=self._name)
        elif problem != self._problem:
            log.warning("issuer has a problem", issuer=self._name, problem=problem)
        self._problem = problem
        if problem is not None:
            self._trouble.set()

    async def _connected(self, *, refresh: bool = False) -> Client:
        """The connections; with ``refresh``, by the roots as their file has them now. Raises Unreachable."""
        async with self._connecting:
            if self._client is not None and not refresh:
                return self._client
            from_file = self._configuration.root_file is not None
            pinned = await find_pinned(self._configuration) if from_file or not self._pinned else self._pinned
            if self._client is None or pinned != self._pinned:
                await self._disconnect()
                self._pinned, self._client = pinned, Client(self._configuration.url, pinned)
            return self._client

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _unavailable(self, problem: str) -> CertmountError:
        hint = f"`certmount issuer check {self._name}` looks at all of it"
        return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"issuer {self._name}", problem, hint))
