"""External issuers that take long, and interim certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.issuers.dependencies import IssuerKind
from csi_driver.authority.issuers.kinds import ISSUER_KINDS
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names
from tests.integration.authority.world import POD, Caller, Cluster, World, failure_of
from tests.support.scripted_authority import TestCA
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until

BOTH, EXTERNAL_ONLY = "shop.example.com", "public.example.com"  # the issuers from which the policy allows these names
POLICY = f"""
policy:
- match: {{namespaces: [default], serviceAccounts: [hello]}}
  allow: {{dns: [{BOTH}, {EXTERNAL_ONLY}], issuers: [slow]}}
- match: {{namespaces: [default], serviceAccounts: [hello]}}
  allow: {{dns: [{BOTH}], issuers: [internal]}}
"""
SPIFFE_ID = "spiffe://cluster.local/ns/default/sa/hello"


@pytest.fixture(params=["unary", "stream"])
def calls(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class SlowIssuer(Issuer):
    """Signs DNS names unless ``failure`` is set."""

    shares_certificates, environment = True, "https://ca.example/directory"

    def __init__(self) -> None:
        self.ca = TestCA("public root")
        self.failure: CertmountError | None = CertmountError(Reason.ISSUANCE_PENDING, "the CA is validating")
        self.requests: list[bytes] = []
        self.extra: tuple[DNSName, ...] = ()  # names that are not requested
        self.signs_cas = False

    @property
    def roots(self) -> tuple[bytes, ...]:
        return (self.ca.der,)

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        self.requests.append(public_bytes(request.csr.public_key))
        if self.failure is not None:
            raise self.failure
        names = Names.of((*request.grant.names.dns, *self.extra))
        leaf = self.ca.sign(request.csr.public_key, names, timedelta(days=90), ca=self.signs_cas)
        return IssuedCertificate((leaf.public_bytes(Encoding.DER),), self.roots)


@pytest.fixture
def slow() -> SlowIssuer:
    return SlowIssuer()


@pytest.fixture
async def world(
    tmp_path: Path, issuer: TokenIssuer, slow: SlowIssuer, calls: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setitem(ISSUER_KINDS, "slow", IssuerKind(lambda *_: "slow", lambda *_: slow))
    file = tmp_path / "issuers.yaml"
    file.write_text("issuers: [{name: slow, slow: {}}]")
    world = World(tmp_path, issuer, Cluster(issuer), issuers=file, calls=calls)
    world.policy.write_text(POLICY)
    async with world.running():
        await until(lambda: "slow" in world.server._trust._snapshot.sets, "the roots")
        yield world


def _request(world: World, *names: str, issuer: str = "slow") -> authority_pb2.IssueRequest:
    token = world.issuer.pod_token(POD).reveal()
    return authority_pb2.IssueRequest(csr=world.csr(*names), pod_token=token, issuer=issuer)


def _names(response: authority_pb2.IssueResponse) -> set[str]:
    return {name.text for name in names_of(x509.load_der_x509_certificate(response.chain[0]).extensions)}


async def test_stream_names_the_issuers_with_shared_certificates(world: World, caller: Caller) -> None:
    watch = caller.watch()
    assert list((await watch.read()).shared_issuers) == ["slow"]
    assert world.issuers is not None
    world.issuers.write_text("issuers: []")
    assert list((await watch.read()).shared_issuers) == []
    watch.cancel()


async def test_pending_certificate_is_a_retryable_failure_and_a_normal_event(world: World, caller: Caller) -> None:
    failure = await failure_of(caller.send(_request(world, BOTH)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "IssuancePending")
    assert "the CA is validating" in failure.text
    assert [(warning, reason) for _, warning, reason, _ in world.events.all] == [(False, "IssuancePending")]


async def test_interim_certificate_is_issued_while_pending(world: World, caller: Caller, slow: SlowIssuer) -> None:
    slow.while_pending = "internal"
    with capture_logs() as logs:
        response = await caller.send(_request(world, BOTH))
    assert (response.interim, _names(response)) == (True, {BOTH, SPIFFE_ID})
    assert x509.load_der_x509_certificate(response.chain[0]).public_key() == world.key.public_key()
    assert (set(response.trust), list(response.trust["slow"].roots)) == ({"internal", "slow"}, [slow.ca.der])
    assert response.renew_after.ToTimedelta() == timedelta(seconds=15)
    (line,) = [line for line in logs if line["event"] == "certificate"]
    assert (line["decision"], line["issuer"], line["interim"]) == ("issued", "slow", True)
    assert "the CA is validating" in line["pending"]
    ((*event, message),) = world.events.all
    assert event == [POD.name, False, "IssuancePending"]
    assert message.endswith("until the issuer has finished: the CA is validating")


async def test_retried_request_gets_the_issuers_certificate(world: World, caller: Caller, slow: SlowIssuer) -> None:
    slow.while_pending = "internal"
    request = _request(world, BOTH)
    assert (await caller.send(request)).interim
    slow.failure = None
    response = await caller.send(request)
    assert (response.interim, _names(response), set(response.trust)) == (False, {BOTH}, {"slow"})
    assert len(set(slow.requests)) == 1


async def test_policy_must_allow_the_interim_certificate(world: World, caller: Caller, slow: SlowIssuer) -> None:
    slow.while_pending = "internal"
    for name, reason in ((EXTERNAL_ONLY, "IssuancePending"), ("stranger.example.com", "NameNotAllowed")):
        assert (await failure_of(caller.send(_request(world, name)))).reason == reason
    assert len(slow.requests) == 1


@pytest.mark.parametrize("reason", [Reason.ISSUER_UNAVAILABLE, Reason.TOO_MANY_REQUESTS, Reason.NAME_NOT_ALLOWED])
async def test_no_interim_after_other_failures(world: World, caller: Caller, slow: SlowIssuer, reason: Reason) -> None:
    slow.while_pending, slow.failure = "internal", CertmountError(reason, "no")
    assert (await failure_of(caller.send(_request(world, BOTH)))).reason == reason.word


async def test_denied_pod_gets_no_interim_certificate(world: World, caller: Caller, slow: SlowIssuer) -> None:
    slow.while_pending = "internal"
    denied = "deny: [{match: {namespaces: [default], serviceAccounts: [hello]}, reason: stolen}]"
    revision = world.server._policy.current.revision
    world.policy.write_text(POLICY + denied)
    await until(lambda: world.server._policy.current.revision != revision, "the policy")
    assert (await failure_of(caller.send(_request(world, BOTH)))).reason == "ServiceAccountDenied"
    assert slow.requests == []


@pytest.mark.parametrize(
    "extension, subject",
    [
        (x509.BasicConstraints(ca=True, path_length=None), x509.Name([])),
        (x509.OCSPNoCheck(), x509.Name([])),
        (None, x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters")])),
    ],
    ids=["CA", "unknown extension", "Kubernetes group"],
)
async def test_csr_with_more_than_names_does_not_reach_an_external_issuer(
    extension: x509.ExtensionType | None, subject: x509.Name, world: World, caller: Caller, slow: SlowIssuer
) -> None:
    """Some issuers copy extensions and subjects, and a compromised node can write any."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(BOTH)]), critical=False)
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    request = _request(world, BOTH)
    key = ec.generate_private_key(ec.SECP256R1())
    request.csr = builder.sign(key, SHA256()).public_bytes(Encoding.DER)
    assert (await failure_of(caller.send(request))).reason == "InvalidCSR"
    assert slow.requests == []


async def test_certificate_with_other_content_than_granted_does_not_leave(
    world: World, slow: SlowIssuer, caller: Caller
) -> None:
    slow.failure, slow.extra, slow.signs_cas = None, (DNSName.parse("bank.example.com"),), True
    with capture_logs() as logs:
        failure = await caller.rejected(csr=world.csr(EXTERNAL_ONLY), issuer="slow")
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "InvalidResponse")
    assert failure.text == (
        "InvalidResponse: (1) issuer slow: the certificate is a CA certificate (section 4.2.1.9) "
        "(2) issuer slow: the certificate has other names than granted"
    )
    assert [line["decision"] for line in logs if line["event"] == "certificate"] == ["rejected"]
    assert world.metric("certmount_issuer_calls_total", issuer="slow", reason="InvalidResponse") == 1
    slow.extra, slow.signs_cas = (), False
    assert (await caller.issue(csr=world.csr(EXTERNAL_ONLY), issuer="slow")).chain
