"""An issuer outside that takes its time: what the authority says meanwhile, and what it gives."""

from __future__ import annotations

import asyncio
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
from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.kinds import ISSUER_KINDS, IssuerKind
from csi_driver.authority.issuers.external import Finding
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from tests.integration.authority.world import POD, Caller, Cluster, Refusal, World
from tests.support.scripted_authority import TestCA
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until

BOTH, OUTSIDE_ONLY = "shop.example.com", "public.example.com"
"""Names that policy allows from both issuers, and from the one outside only."""
POLICY = f"""
policy:
- match: {{namespaces: [default], serviceAccounts: [hello]}}
  allow: {{dns: [{BOTH}, {OUTSIDE_ONLY}], issuers: [slow]}}
- match: {{namespaces: [default], serviceAccounts: [hello]}}
  allow: {{dns: [{BOTH}], issuers: [internal]}}
"""
SPIFFE_ID = "spiffe://cluster.local/ns/default/sa/hello"


class SlowIssuer:
    """Signs DNS names, as soon as a test lets it."""

    shares_certificates = True
    problem = None

    def __init__(self) -> None:
        self.ca = TestCA("public root")
        self.while_pending: str | None = None
        self.failure: CertmountError | None = CertmountError(Reason.ISSUANCE_PENDING, "the CA is at it")
        self.orders: list[bytes] = []

    @property
    def roots(self) -> tuple[bytes, ...]:
        return (self.ca.der,)

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        self.orders.append(public_bytes(order.request.public_key))
        if self.failure is not None:
            raise self.failure
        leaf = self.ca.sign(order.request.public_key, Names.of(order.grant.names.dns), timedelta(days=90))
        return IssuedCertificate((leaf.public_bytes(Encoding.DER),), self.roots, identity_included=False)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def check(self) -> list[Finding]:
        return []


@pytest.fixture
def slow() -> SlowIssuer:
    return SlowIssuer()


@pytest.fixture
async def world(
    tmp_path: Path, issuer: TokenIssuer, slow: SlowIssuer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """An authority with the slow issuer beside its own CA."""
    monkeypatch.setitem(ISSUER_KINDS, "slow", IssuerKind(lambda *_: "slow", lambda *_: slow))
    file = tmp_path / "issuers.yaml"
    file.write_text("issuers: [{name: slow, slow: {}}]")
    world = World(tmp_path, issuer, Cluster(issuer), issuers=file)
    world.policy.write_text(POLICY)
    async with world.running():
        await until(lambda: _known(world), "the roots")
        yield world


def _known(world: World) -> bool:
    try:
        world.server._trust.select("slow", ())
    except CertmountError:
        return False
    return True


def _request(world: World, *names: str, issuer: str = "slow") -> authority_pb2.IssueRequest:
    return authority_pb2.IssueRequest(
        csr=world.csr(*names), pod_token=world.issuer.pod_token(POD).reveal(), issuer=issuer
    )


async def _refused(caller: Caller, request: authority_pb2.IssueRequest) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.send(request)
    return Refusal.of(failure.value)


def _names(response: authority_pb2.IssueResponse) -> set[str]:
    return {name.text for name in names_of(x509.load_der_x509_certificate(response.chain[0]).extensions)}


async def test_the_stream_names_the_issuers_whose_certificates_are_shared(world: World, caller: Caller) -> None:
    """With the first bundle, and again when the issuers' file changes."""
    watch = caller.watch()
    assert list((await watch.read()).sharing) == ["slow"]
    assert world.issuers is not None
    world.issuers.write_text("issuers: []")
    assert list((await watch.read()).sharing) == []
    watch.cancel()


async def test_what_is_on_its_way_is_said_so(world: World, caller: Caller) -> None:
    """A status that the kubelet tries again after, and an event that is no warning."""
    refusal = await _refused(caller, _request(world, BOTH))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "IssuancePending")
    assert "the CA is at it" in refusal.text
    assert [(warning, reason) for _, warning, reason, _ in world.heard.events] == [(False, "IssuancePending")]


async def test_a_stand_in_for_the_same_key_comes_at_once(world: World, caller: Caller, slow: SlowIssuer) -> None:
    """Where the issuer is configured so: a certificate of the internal CA, the roots of both, and when to ask again."""
    slow.while_pending = "internal"
    with capture_logs() as logs:
        response = await caller.send(_request(world, BOTH))
    assert response.interim
    assert _names(response) == {BOTH, SPIFFE_ID}
    leaf = x509.load_der_x509_certificate(response.chain[0])
    assert leaf.public_key() == world.key.public_key()
    assert set(response.trust) == {"internal", "slow"}
    assert response.trust["slow"].roots == [slow.ca.der]
    assert response.renew_after.ToTimedelta() == timedelta(seconds=15)
    (line,) = [line for line in logs if line["event"] == "certificate"]
    assert (line["decision"], line["issuer"], line["interim"]) == ("issued", "slow", True)
    assert "the CA is at it" in line["pending"]
    ((_, warning, reason, message),) = world.heard.events
    assert (warning, reason) == (False, "IssuancePending")
    assert message.endswith("while its own is on its way: the CA is at it")


async def test_the_same_request_gets_the_certificate_itself_in_the_end(
    world: World, caller: Caller, slow: SlowIssuer
) -> None:
    """The stand-in, asked again with the same CSR, becomes the public certificate: DNS names only, and its own roots."""
    slow.while_pending = "internal"
    request = _request(world, BOTH)
    assert (await caller.send(request)).interim
    slow.failure = None
    response = await caller.send(request)
    assert not response.interim
    assert _names(response) == {BOTH}
    assert set(response.trust) == {"slow"}
    assert len(set(slow.orders)) == 1


async def test_policy_decides_on_the_stand_in_as_well(world: World, caller: Caller, slow: SlowIssuer) -> None:
    """A name that the pod may have from the issuer outside only: the order goes on, and nothing stands in."""
    slow.while_pending = "internal"
    refusal = await _refused(caller, _request(world, OUTSIDE_ONLY))
    assert refusal.reason == "IssuancePending"
    refusal = await _refused(caller, _request(world, "stranger.example.com"))
    assert refusal.reason == "NameNotAllowed"
    assert len(slow.orders) == 1


@pytest.mark.parametrize("reason", [Reason.ISSUER_UNAVAILABLE, Reason.TOO_MANY_REQUESTS, Reason.NAME_NOT_ALLOWED])
async def test_no_other_failure_has_a_stand_in(world: World, caller: Caller, slow: SlowIssuer, reason: Reason) -> None:
    """What is refused, limited or broken is said to be."""
    slow.while_pending, slow.failure = "internal", CertmountError(reason, "no")
    assert (await _refused(caller, _request(world, BOTH))).reason == reason.word


async def test_a_denied_pod_gets_no_stand_in(world: World, caller: Caller, slow: SlowIssuer) -> None:
    """The deny list comes first, whatever the issuer."""
    slow.while_pending = "internal"
    denied = "deny: [{match: {namespaces: [default], serviceAccounts: [hello]}, reason: stolen}]"
    revision = world.server._policy.current.revision
    world.policy.write_text(POLICY + denied)
    await until(lambda: world.server._policy.current.revision != revision, "the policy")
    assert (await _refused(caller, _request(world, BOTH))).reason == "ServiceAccountDenied"
    assert slow.orders == []


@pytest.mark.parametrize(
    "extension, subject",
    [
        (x509.BasicConstraints(ca=True, path_length=None), x509.Name([])),
        (x509.OCSPNoCheck(), x509.Name([])),
        (None, x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters")])),
    ],
    ids=["CA", "unknown extension", "Kubernetes' own group"],
)
async def test_what_a_stolen_node_puts_into_a_request_reaches_no_signer_outside(
    extension: x509.ExtensionType | None, subject: x509.Name, world: World, slow: SlowIssuer
) -> None:
    """Some signers copy what there is in a request; ours sends them none that holds more than names."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(BOTH)]), critical=False)
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    request = _request(world, BOTH)
    key = ec.generate_private_key(ec.SECP256R1())
    request.csr = builder.sign(key, SHA256()).public_bytes(Encoding.DER)
    async with world.channel() as channel:
        refusal = await _refused(Caller(world, channel), request)
    assert refusal.reason == "InvalidCSR"
    assert slow.orders == []
