"""The step-ca issuer before something that is no step-ca: an answer may be anything, and nothing is believed without the root."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.issuer import StepCA
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import KeyType
from tests.support.provisioner_key import JWK
from tests.unit.core import pki

NAME = "hello.default.svc"
OWN = spiffe_id("cluster.local", "default", "hello")
ALWAYS = pki.Validity(-timedelta(days=3650), timedelta(days=36500))
PUBLIC = {name: value for name, value in JWK.items() if name != "d"}
BOTH = x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH, x509.OID_CLIENT_AUTH])

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def pem(*certificates: x509.Certificate) -> list[str]:
    return [one.public_bytes(Encoding.PEM).decode() for one in certificates]


@dataclass
class FakeStepCA:
    """Does what step-ca does, as far as the issuer sees it; a test may put anything else in a path's place."""

    folder: Path
    root: pki.Signer = field(default_factory=lambda: pki.authority("Fake Root", validity=ALWAYS))
    others: dict[str, Handler] = field(default_factory=dict)
    bodies: list[dict[str, str]] = field(default_factory=list)
    names: Names = field(default_factory=lambda: Names.of([DNSName(NAME)], [OWN]))
    life: timedelta = timedelta(hours=1)
    extensions: tuple[x509.ExtensionType, ...] = (BOTH,)
    url: str = ""

    def __post_init__(self) -> None:
        self.signer = self.root

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._context()).start()
        self.url = f"https://localhost:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    @contextlib.asynccontextmanager
    async def issuer(self, **changes: Any) -> AsyncIterator[StepCA]:
        key = self.folder / "key.jwk"
        key.write_text(json.dumps(JWK))
        usual: dict[str, Any] = {
            "url": self.url,
            "provisioner": "csi",
            "root_sha256": self.root.certificate.fingerprint(SHA256()).hex(),
            "key": FileSource(str(key)),
        }
        issuer = StepCA("step", StepCAConfiguration(**{**usual, **changes}), CredentialReader())
        running = asyncio.create_task(issuer.run())
        try:
            yield issuer
        finally:
            running.cancel()
            await asyncio.wait([running])

    def _context(self) -> ssl.SSLContext:
        key = pki.key_of(KeyType.EC_P256)
        server = pki.leaf(self.root, key, Names.of([DNSName("localhost")]), validity=ALWAYS)
        files = self.folder / "server.pem"
        files.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + server.public_bytes(Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files)
        return context

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path if not request.path.startswith("/root/") else "/root"
        if path in self.others:
            return await self.others[path](request)
        roots = {"crts": pem(self.root.certificate)}
        provisioner = {"type": "JWK", "name": "csi", "key": PUBLIC}
        fixed: dict[str, Any] = {
            "/health": {"status": "ok"},
            "/root": {"ca": pem(self.root.certificate)[0]},
            "/roots": roots,
            "/federation": roots,
            "/provisioners": {"provisioners": [provisioner], "nextCursor": ""},
        }
        if path in fixed:
            return web.json_response(fixed[path])
        return await self.sign(request)

    async def sign(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        csr = x509.load_pem_x509_csr(body["csr"].encode())
        return web.json_response({"certChain": pem(self.leaf(csr.public_key()))}, status=201)

    def leaf(self, public: Any) -> x509.Certificate:
        now = datetime.now(UTC) - pki.NOW
        validity = pki.Validity(now - timedelta(minutes=1), now + self.life)
        key = pki.key_of(KeyType.EC_P256, 7)
        private: Any = _Public(public or key.public_key())
        return pki.leaf(self.signer, private, self.names, validity=validity, extensions=self.extensions)


@dataclass(frozen=True)
class _Public:
    """Stands for a private key of which only the public half is known."""

    key: Any

    def public_key(self) -> Any:
        return self.key


@pytest.fixture
async def ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeStepCA]:
    monkeypatch.setattr("csi_driver.authority.issuers.step_ca.issuer._RETRIES_S", (0.01, 0.01))
    fake = FakeStepCA(tmp_path)
    async with fake.running():
        yield fake


def order() -> IssuerRequest:
    asked = Names.of([DNSName(NAME)])
    grant = Grant(Names.of(asked.dns, [OWN]), timedelta(hours=1), ALL_USAGES, ())
    pod = PodIdentity(ServiceAccount("default", "hello"), "", "pod", "uid", "node", "", 0)
    return IssuerRequest(parse_csr(build_csr(generate_key(KeyType.EC_P256), asked)), grant, pod)


async def refusal(issuer: StepCA) -> CertmountError:
    with pytest.raises(CertmountError) as raised:
        await issuer.issue(order())
    return raised.value


def plain(text: str, status: int = 200) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text, status=status)

    return answer


async def broken(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def elsewhere(_: web.Request) -> web.Response:
    return web.Response(status=302, headers={"Location": "/health"})


async def too_long(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            await response.write(b" " * 65536)
    return response


STRANGE: list[Handler] = [
    broken,
    elsewhere,
    too_long,
    *map(plain, ("", "hello", "[]", "null", "1", "{}", '{"crts": 1}', '{"crts": ["x", 1, null]}', "[" * 100_000)),
    *map(plain, ('{"provisioners": [1, null, {}, {"type": "JWK", "key": 1, "claims": 5}], "nextCursor": 7}',)),
    *map(plain, ('{"certChain": []}', '{"certChain": [1]}', '{"certChain": ["x"]}', '{"ca": 1}'), [201] * 4),
    *(plain('{"status": 1, "message": ["\\u0000"]}', status) for status in (400, 401, 403, 404, 418, 429, 500, 503)),
]


@pytest.mark.parametrize("path", ["/health", "/root", "/roots", "/federation", "/provisioners", "/1.0/sign"])
async def test_a_strange_answer_ends_in_words(path: str, ca: FakeStepCA) -> None:
    """Whatever comes instead of an answer: nothing is issued, nothing but our own error is raised, nothing waits for ever."""
    for strange in STRANGE:
        ca.others = {path: strange}
        async with asyncio.timeout(30), ca.issuer() as issuer:
            await issuer.check()
            try:
                issued = await issuer.issue(order())
            except CertmountError as error:
                assert error.reason in (Reason.ISSUER_UNAVAILABLE, Reason.NAME_NOT_ALLOWED)  # either is right
            else:
                assert issued.roots == (ca.root.certificate.public_bytes(Encoding.DER),)


async def test_a_certificate_that_was_not_ordered_is_not_handed_on(ca: FakeStepCA) -> None:
    """A template, a webhook or a break-in at step-ca can't give a pod what policy did not."""
    stranger = pki.authority("Stranger", validity=ALWAYS)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"names": Names.of([DNSName(NAME)])}, f"the certificate lacks {OWN}"),
        ({"names": Names.of([DNSName(NAME), DNSName("bank.test")], [OWN])}, "the certificate also holds bank.test"),
        ({"life": timedelta(hours=2)}, "longer than was granted"),
        ({"extensions": ()}, "the certificate is for any usage, not for client and server"),
        ({"extensions": (BOTH, x509.BasicConstraints(ca=True, path_length=None))}, "is a certificate authority's"),
        ({"signer": stranger}, "it signs by a root that it does not hand out at /roots"),
    ]
    async with ca.issuer() as issuer:
        assert (await issuer.issue(order())).chain
        for change, words in changes:
            usual = {name: getattr(ca, name) for name in change}
            vars(ca).update(change)
            assert words in str(await refusal(issuer))
            vars(ca).update(usual)

        async def other_key(_: web.Request) -> web.Response:
            return web.json_response({"certChain": pem(ca.leaf(None))}, status=201)

        ca.others["/1.0/sign"] = other_key
        refused = await refusal(issuer)
        assert refused.reason is Reason.INVALID_RESPONSE
        assert "the certificate is for another key" in str(refused)


async def test_each_try_has_a_token_of_its_own(ca: FakeStepCA) -> None:
    """One that was sent may be used up, even if no answer came."""
    tokens: list[str] = []

    async def busy_twice(request: web.Request) -> web.StreamResponse:
        tokens.append((await request.json())["ott"])
        if len(tokens) == 1:
            return await broken(request)
        return web.json_response({"message": "busy"}, status=503) if len(tokens) == 2 else await ca.sign(request)

    ca.others["/1.0/sign"] = busy_twice
    async with ca.issuer() as issuer:
        assert (await issuer.issue(order())).chain
    assert len(set(tokens)) == 3


async def test_a_token_that_comes_back_in_an_error_is_not_told(ca: FakeStepCA) -> None:
    """Neither to the pod nor to the log."""

    async def chatty(request: web.Request) -> web.Response:
        return web.json_response({"message": "bad token " + (await request.json())["ott"]}, status=403)

    ca.others["/1.0/sign"] = chatty
    async with ca.issuer() as issuer:
        assert "eyJ" not in str(await refusal(issuer))


async def test_proxies_of_the_environment_are_not_asked(ca: FakeStepCA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens go to step-ca, and to no one between."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with ca.issuer() as issuer:
        assert (await issuer.issue(order())).chain


async def test_a_certificate_that_calls_itself_the_root_is_not_believed(ca: FakeStepCA) -> None:
    """Who answers at the address before anything is known of it must show the very certificate of the fingerprint."""
    stranger = pki.authority("Stranger", validity=ALWAYS)

    async def lie(_: web.Request) -> web.Response:
        return web.json_response({"ca": pem(stranger.certificate)[0]})

    ca.others["/root"] = lie
    async with ca.issuer() as issuer:
        assert "what answers has no root with the SHA-256" in str(await refusal(issuer))
    assert ca.bodies == []


async def test_a_replaced_key_is_taken_up_in_the_same_call(ca: FakeStepCA) -> None:
    """When the provisioner's key is changed in step-ca and in the Secret, the next pod waits for nothing."""
    async with ca.issuer() as issuer:
        assert (await issuer.issue(order())).chain
        (ca.folder / "key.jwk").write_text(json.dumps({**JWK, "alg": "ES256", "extra": "new"}))

        async def takes_the_new_one(request: web.Request) -> web.StreamResponse:
            ca.bodies.append(await request.json())
            return web.json_response({}, status=401) if len(ca.bodies) == 2 else await ca.sign(request)

        ca.others["/1.0/sign"] = takes_the_new_one
        assert (await issuer.issue(order())).chain
