"""The step-ca issuer against a fake server, which can return anything, and a tenant that floods it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.issuer import MAX_SIGNING, StepCAIssuer
from csi_driver.authority.issuers.step_ca.provisioners import token_claims
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import KeyType
from tests.support.provisioner_key import JWK
from tests.support.stream_servers import web_server
from tests.support.waiting import in_background
from tests.unit.authority.issuers.hostile_server import ALWAYS, localhost_tls
from tests.unit.core import pki

NAME = "hello.default.svc"
OWN = spiffe_id("cluster.local", "default", "hello")
PUBLIC = {name: value for name, value in JWK.items() if name != "d"}
BOTH = x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH, x509.OID_CLIENT_AUTH])

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def pem(*certificates: x509.Certificate) -> list[str]:
    return [one.public_bytes(Encoding.PEM).decode() for one in certificates]


@dataclass
class FakeStepCA:
    """Responds like step-ca; ``overrides`` replaces the handlers of paths."""

    directory: Path
    root: pki.Signer = field(default_factory=lambda: pki.authority("Fake Root", validity=ALWAYS))
    overrides: dict[str, Handler] = field(default_factory=dict)
    bodies: list[dict[str, str]] = field(default_factory=list)
    names: Names = field(default_factory=lambda: Names.of([DNSName(NAME)], [OWN]))
    lifetime: timedelta = timedelta(hours=1)
    extensions: tuple[x509.ExtensionType, ...] = (BOTH,)
    url: str = ""

    def __post_init__(self) -> None:
        self.signer = self.root

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with web_server(self._respond, localhost_tls(self.root, self.directory)) as port:
            self.url = f"https://localhost:{port}"
            yield

    @contextlib.asynccontextmanager
    async def issuer(self) -> AsyncIterator[StepCAIssuer]:
        file = self.directory / "key.jwk"
        file.write_text(json.dumps(JWK))
        root, key = self.root.certificate.fingerprint(SHA256()).hex(), FileSource(str(file))
        configuration = StepCAConfiguration(url=self.url, provisioner="csi", root_sha256=root, key=key)
        issuer = StepCAIssuer("step", configuration, CredentialReader())
        async with in_background(issuer.run()):
            yield issuer

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        path = request.path if not request.path.startswith("/root/") else "/root"
        if path in self.overrides:
            return await self.overrides[path](request)
        (root,) = pem(self.root.certificate)
        provisioner = {"type": "JWK", "name": "csi", "key": PUBLIC}
        fixed: dict[str, Any] = {
            "/health": {"status": "ok"}, "/root": {"ca": root}, "/roots": {"crts": [root]},
            "/federation": {"crts": [root]}, "/provisioners": {"provisioners": [provisioner], "nextCursor": ""},
        }  # fmt: skip
        return web.json_response(fixed[path]) if path in fixed else await self.sign(request)

    async def sign(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        csr = x509.load_pem_x509_csr(body["csr"].encode())
        return web.json_response({"certChain": pem(self.leaf(csr.public_key()))}, status=201)

    def leaf(self, public: Any) -> x509.Certificate:
        now = datetime.now(UTC) - pki.NOW
        validity = pki.Validity(now - timedelta(minutes=1), now + self.lifetime)
        private: Any = SimpleNamespace(public_key=lambda: public)  # only the public key is known
        return pki.leaf(self.signer, private, self.names, validity=validity, extensions=self.extensions)


@pytest.fixture
async def ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeStepCA]:
    monkeypatch.setattr("csi_driver.authority.issuers.step_ca.issuer._BACKOFF", Backoff(0.01, 0.01))
    fake = FakeStepCA(tmp_path)
    async with fake.running():
        yield fake


def request() -> IssuerRequest:
    names = Names.of([DNSName(NAME)])
    grant = Grant(Names.of(names.dns, [OWN]), timedelta(hours=1), ALL_USAGES, ())
    pod = PodIdentity(ServiceAccount("default", "hello"), "", "pod", "uid", "node", "", 0)
    return IssuerRequest(parse_csr(build_csr(generate_key(KeyType.EC_P256), names)), grant, pod)


async def failure(issuer: StepCAIssuer) -> CertmountError:
    with pytest.raises(CertmountError) as raised:
        await issuer.issue(request())
    return raised.value


def plain(text: str, status: int = 200) -> Handler:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(text=text, status=status, content_type="application/json")

    return respond


async def broken(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


INVALID: list[Handler] = [
    broken,
    *map(plain, ("", "hello", "[]", "null", "1", "{}", '{"crts": 1}', '{"crts": ["x", 1, null]}')),
    plain('{"provisioners": [1, null, {}, {"type": "JWK", "key": 1, "claims": 5}], "nextCursor": 7}'),
    *map(plain, ('{"certChain": []}', '{"certChain": [1]}', '{"certChain": ["x"]}', '{"ca": 1}'), [201] * 4),
    *(plain('{"status": 1, "message": ["\\u0000"]}', status) for status in (400, 401, 403, 404, 418, 429, 500, 503)),
]


@pytest.mark.parametrize("path", ["/health", "/root", "/roots", "/federation", "/provisioners", "/1.0/sign"])
async def test_invalid_response_results_in_an_error(path: str, ca: FakeStepCA) -> None:
    for invalid in INVALID:
        ca.overrides = {path: invalid}
        async with asyncio.timeout(30), ca.issuer() as issuer:
            await issuer.diagnose()
            try:
                issued = await issuer.issue(request())
            except CertmountError as error:
                assert error.reason in (Reason.ISSUER_UNAVAILABLE, Reason.NAME_NOT_ALLOWED)
            else:
                assert issued.roots == (ca.root.certificate.public_bytes(Encoding.DER),)


async def test_certificate_that_differs_from_the_request_is_rejected(ca: FakeStepCA) -> None:
    """A template, a webhook or an intruder in step-ca can't add what the policy does not grant."""
    other = pki.authority("Other", validity=ALWAYS)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"names": Names.of([DNSName(NAME)])}, f"the certificate lacks {OWN}"),
        ({"names": Names.of([DNSName(NAME), DNSName("bank.test")], [OWN])}, "the certificate also contains bank.test"),
        ({"lifetime": timedelta(hours=2)}, "longer than the policy grants"),
        ({"extensions": ()}, "the certificate is for any usage, not for client and server"),
        ({"extensions": (BOTH, x509.BasicConstraints(ca=True, path_length=None))}, "is a CA certificate"),
        ({"signer": other}, "ends at a root that step-ca does not publish at /roots"),
    ]
    async with ca.issuer() as issuer:
        assert (await issuer.issue(request())).chain
        for change, text in changes:
            previous = {name: getattr(ca, name) for name in change}
            vars(ca).update(change)
            assert text in str(await failure(issuer))
            vars(ca).update(previous)

        other_key = pki.key_of(KeyType.EC_P256, 7).public_key()
        ca.overrides["/1.0/sign"] = plain(json.dumps({"certChain": pem(ca.leaf(other_key))}), status=201)
        error = await failure(issuer)
        assert error.reason is Reason.INVALID_RESPONSE
        assert "the certificate is for another key" in str(error)


async def test_each_attempt_sends_a_new_token(ca: FakeStepCA) -> None:
    """A token can be used up even if the call fails."""
    tokens: list[str] = []

    async def fail_twice(received: web.Request) -> web.StreamResponse:
        tokens.append((await received.json())["ott"])
        if len(tokens) == 1:
            return await broken(received)
        return web.json_response({"message": "busy"}, status=503) if len(tokens) == 2 else await ca.sign(received)

    ca.overrides["/1.0/sign"] = fail_twice
    async with ca.issuer() as issuer:
        assert (await issuer.issue(request())).chain
    assert len(set(tokens)) == 3


async def test_error_never_contains_a_token(ca: FakeStepCA) -> None:
    async def quote_token(received: web.Request) -> web.Response:
        return web.json_response({"message": "bad token " + (await received.json())["ott"]}, status=403)

    ca.overrides["/1.0/sign"] = quote_token
    async with ca.issuer() as issuer:
        assert "eyJ" not in str(await failure(issuer))


async def test_proxies_of_the_environment_are_ignored(ca: FakeStepCA, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with ca.issuer() as issuer:
        assert (await issuer.issue(request())).chain


async def test_root_must_have_the_configured_fingerprint(ca: FakeStepCA) -> None:
    """Otherwise no token is sent."""
    other = pki.authority("Other", validity=ALWAYS)
    ca.overrides["/root"] = plain(json.dumps({"ca": pem(other.certificate)[0]}))
    async with ca.issuer() as issuer:
        assert "the server did not return a root with the SHA-256" in str(await failure(issuer))
    assert ca.bodies == []


async def test_replaced_provisioner_key_is_used_in_the_same_call(ca: FakeStepCA) -> None:
    async with ca.issuer() as issuer:
        assert (await issuer.issue(request())).chain
        (ca.directory / "key.jwk").write_text(json.dumps({**JWK, "alg": "ES256", "extra": "new"}))

        async def accept_new_key(received: web.Request) -> web.StreamResponse:
            ca.bodies.append(await received.json())
            return web.json_response({}, status=401) if len(ca.bodies) == 2 else await ca.sign(received)

        ca.overrides["/1.0/sign"] = accept_new_key
        assert (await issuer.issue(request())).chain


def test_subject_of_a_token_names_the_secret_if_no_dns_name_fits() -> None:
    wanted = request()
    long_name = ".".join(["x" * 40, "y" * 40, "test"])
    names = Names.of([DNSName.parse(long_name)])
    secret = replace(wanted, grant=replace(wanted.grant, names=names), identity=SecretIdentity("web", "edge-tls"))
    claims = token_claims(secret, StepCAConfiguration("https://ca.test", "csi"), "nonce")
    assert (claims["sub"], claims["sans"]) == ("web/edge-tls", [long_name])


async def test_flood_of_one_tenant_leaves_connections_to_others(ca: FakeStepCA) -> None:
    attacker = PodIdentity(ServiceAccount("shop", "web"), "", "web-0", "u", "node-1", "u", 0.0)
    released, stalled = asyncio.Event(), asyncio.Semaphore(0)
    calls = 0

    async def sign(call: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls <= MAX_SIGNING // 3:
            stalled.release()
            await released.wait()
        return await ca.sign(call)

    async with ca.issuer() as issuer:
        await issuer.issue(request())
        ca.overrides["/1.0/sign"] = sign
        flood = [asyncio.ensure_future(issuer.issue(replace(request(), identity=attacker))) for _ in range(100)]
        for _ in range(MAX_SIGNING // 3):
            await stalled.acquire()
        async with asyncio.timeout(3):
            await issuer.issue(request())
        assert calls == MAX_SIGNING // 3 + 1
        released.set()
        await asyncio.gather(*flood)
    assert calls == 101


PAGES = "/provisioners has more than 100 pages of 20"


def _provisioners(*names: str, cursor: str = "more") -> Any:
    entries = [{"type": "JWK", "name": name, "key": PUBLIC} for name in names]
    return plain(json.dumps({"provisioners": entries, "nextCursor": cursor}))


@pytest.mark.parametrize(
    "path, respond, problem",
    [
        ("/provisioners", _provisioners("other"), f"{PAGES}, or takes longer than 60 s"),
        ("/provisioners", _provisioners("other", cursor="c" * 300), PAGES),
        ("/roots", plain(json.dumps({"crts": ["x"] * 9000})), "step-ca publishes 9000 roots at /roots; expected at most 10"),
    ],
    ids=["endless pages", "long cursor", "many roots"],
)  # fmt: skip
async def test_hostile_response_is_a_worded_finding(path: str, respond: Any, problem: str, ca: FakeStepCA) -> None:
    ca.overrides[path] = respond
    async with ca.issuer() as issuer:
        assert problem in str((await issuer.diagnose()).problem)


async def test_names_of_thousands_of_provisioners_take_no_memory(ca: FakeStepCA) -> None:
    ca.overrides["/provisioners"] = _provisioners(*(f"{'n' * 500}{number}" for number in range(100)), cursor="")
    async with ca.issuer() as issuer:
        text = str((await issuer.diagnose()).problem)
    assert "step-ca has no provisioner csi; it has " in text
    assert text.endswith(" and others")
    assert len(text) < 3000


async def test_long_chain_is_not_parsed(ca: FakeStepCA) -> None:
    ca.overrides["/1.0/sign"] = plain(json.dumps({"certChain": pem(ca.root.certificate) * 11}), status=201)
    async with ca.issuer() as issuer:
        with pytest.raises(CertmountError, match="the response contains no certificate chain"):
            await issuer.issue(request())
