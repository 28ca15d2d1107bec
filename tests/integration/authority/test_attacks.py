"""Attacks get no certificate: invalid tokens and requests, and one test for each attacker of docs/architecture.md."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from structlog.testing import capture_logs

from csi_driver.authority import retry
from csi_driver.core.certificates.csr import MAX_CSR_BYTES, build_csr, names_of
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.secret import Secret
from tests.integration.authority.world import NAME, POD, SERVING_NAME, Caller, CallFailure, World, failure_of
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.unit.authority.authn.test_token_verifier import change_claims, sign_with_key_in_header, sign_with_public_key

DENIED = grpc.StatusCode.PERMISSION_DENIED
Token = Callable[[TokenIssuer], Secret[str]]


@pytest.fixture(params=["unary", "stream"])
def calls(request: pytest.FixtureRequest) -> str:
    return str(request.param)


POD_TOKENS: dict[str, tuple[Token, str]] = {
    "missing": (lambda _: Secret(""), "TokenRejected"),
    "garbage": (lambda _: Secret("garbage"), "TokenRejected"),
    "expired": (lambda i: i.pod_token(POD, exp=int(time.time()) - 5), "TokenExpired"),
    "other audience": (lambda i: i.pod_token(POD, aud=["vault"]), "TokenRejected"),
    "HS256 with the public key": (sign_with_public_key, "TokenRejected"),
    "key in the header": (sign_with_key_in_header, "TokenRejected"),
    "changed claims": (change_claims, "TokenRejected"),
    "too long": (lambda i: i.pod_token(POD, padding="x" * MAX_TOKEN_BYTES), "TokenRejected"),
    "node token": (lambda i: i.node_token(), "TokenRejected"),
}


@pytest.mark.parametrize("attack", POD_TOKENS)
async def test_invalid_pod_token_is_rejected(attack: str, world: World, caller: Caller) -> None:
    make, reason = POD_TOKENS[attack]
    token = make(world.issuer)
    failure = await caller.rejected(pod=token)
    assert failure.reason == reason
    assert "pod token" in failure.text
    assert all(part not in failure.text for part in token.reveal().split(".") if len(part) > 8)


NODE_TOKENS: dict[str, tuple[Token, str]] = {
    "garbage": (lambda _: Secret("garbage"), "TokenRejected"),
    "expired": (lambda i: i.node_token(exp=int(time.time()) - 5), "TokenExpired"),
    "other audience": (lambda i: i.node_token(aud=["vault"]), "TokenRejected"),
    "pod token": (lambda i: i.pod_token(DRIVER), "TokenRejected"),
    "of another service account": (lambda i: i.node_token(replace(DRIVER, service_account="x")), "TokenRejected"),
    "of the pod itself": (lambda i: i.node_token(POD), "TokenRejected"),
    "too long": (lambda i: i.node_token(padding="x" * MAX_TOKEN_BYTES), "TokenRejected"),
}


@pytest.mark.parametrize("attack", NODE_TOKENS)
async def test_invalid_node_token_is_rejected_by_all_methods(attack: str, world: World, caller: Caller) -> None:
    make, reason = NODE_TOKENS[attack]
    if "itself" in attack:
        world.reviewer.node = POD.reviewed
    if "another" in attack:
        world.reviewer.node = replace(DRIVER, service_account="x").reviewed
    failure = await caller.rejected(node=make(world.issuer))
    assert (failure.reason, "node token" in failure.text) == (reason, True)
    assert (await failure_of(caller.watch(make(world.issuer)).read())).reason == reason


@pytest.mark.parametrize(
    "values", [[], [""], ["Bearer"], ["Bearer "], ["Basic dXNlcjpwYXNz"], ["Bearer a.b.c", "Bearer d.e.f"]]
)
async def test_call_needs_exactly_one_bearer_token(values: list[str], caller: Caller) -> None:
    metadata = [("token", "Bearer a.b.c"), *(("authorization", value) for value in values)]
    failure = await caller.rejected(metadata=metadata)
    assert failure == CallFailure(DENIED, "TokenRejected", "TokenRejected: node token: is missing")


async def test_no_token_is_logged_even_without_redaction(world: World, caller: Caller) -> None:
    """Redaction of the log is defence in depth. This test disables it."""
    sent = [world.issuer.pod_token(POD, jti=str(number)) for number in range(3)]
    node = world.issuer.node_token()
    with capture_logs() as logs:
        await caller.issue(pod=sent[0], node=node)
        await caller.rejected(pod=sent[1], node=node, csr=b"")
        await caller.rejected(pod=Secret(sent[2].reveal() + "x"), node=node)
    assert len(logs) >= 3
    assert not any(part in str(logs) for token in (*sent, node) for part in token.reveal().split(".")[1:])


async def test_unexpected_exception_is_reported_without_its_text(world: World, caller: Caller) -> None:
    """The text can quote a token. The next call succeeds."""
    token = world.issuer.pod_token(POD)
    world.reviewer.pod = RuntimeError(f"cannot parse {token.reveal()}")
    with capture_logs() as logs:
        failure = await caller.rejected(pod=token)
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "InternalError")
    assert "RuntimeError" in failure.text
    assert not any(part in failure.text + str(logs) for part in token.reveal().split(".")[1:])
    world.reviewer.pod = POD.reviewed
    await caller.issue(pod=token)


async def test_nothing_is_issued_without_reviews(world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.0)
    token = world.issuer.pod_token(POD)
    world.reviewer.pod = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "unreachable")
    failure = await caller.rejected(pod=token)
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "TokenReviewUnavailable")
    world.reviewer.pod = POD.reviewed
    await caller.issue(pod=token)


def change_signature(world: World) -> bytes:
    csr = bytearray(world.csr(NAME))
    csr[-1] ^= 1
    return bytes(csr)


def rsa_key(exponent: int, bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=exponent, key_size=bits)


def request(names: list[x509.GeneralName], key: Any = None, **extensions: x509.ExtensionType) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "system:masters")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions.values():
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key or ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.DER)


CSRS: dict[str, tuple[Callable[[World], bytes], str]] = {
    "empty": (lambda _: b"", "is not PKCS#10 in DER"),
    "garbage": (lambda _: b"\x30\x82garbage", "is not PKCS#10 in DER"),
    "truncated": (lambda w: w.csr(NAME)[:-20], "is not PKCS#10 in DER"),
    "bad signature": (change_signature, "has an invalid signature"),
    "huge": (lambda _: b"0" * (MAX_CSR_BYTES + 1), "use at most 65536"),
    "too many names": (lambda _: request([x509.DNSName(f"{n}.test") for n in range(1000)]), "at most 100"),
    "a network as IP name": (lambda _: request([x509.IPAddress(IPv4Network("10.0.0.0/8"))]), "has a name that"),
    "a name with a line break": (lambda _: request([x509.DNSName("a\nb.test")]), "has the label"),
    "an empty name": (lambda _: request([x509.DNSName("")]), "is empty"),
    "RSA 1024": (lambda _: request([], rsa_key(65537, 1024)), "has an unsupported key type"),
    "RSA with exponent 3": (lambda _: request([], rsa_key(3, 2048)), "has an unsupported key type"),
    "secp256k1": (lambda _: request([], ec.generate_private_key(ec.SECP256K1())), "has an unsupported key type"),
    "P-224": (lambda _: request([], ec.generate_private_key(ec.SECP224R1())), "has an unsupported key type"),
}


@pytest.mark.parametrize("attack", CSRS)
async def test_invalid_csr_is_rejected(attack: str, world: World, caller: Caller) -> None:
    make, words = CSRS[attack]
    failure = await caller.rejected(csr=make(world))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidCSR")
    assert words in failure.text


async def test_certificate_has_only_names_and_key_of_the_csr(caller: Caller) -> None:
    csr = request(
        [x509.DNSName(NAME)],
        ca=x509.BasicConstraints(ca=True, path_length=9),
        usage=x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]),
        template=x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2"), b"\x0c\x02CA"),
    )
    leaf = x509.load_der_x509_certificate((await caller.issue(csr=csr)).chain[0])
    assert "system:masters" not in leaf.subject.rfc4514_string()
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ExtendedKeyUsageOID.CODE_SIGNING not in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert len(leaf.extensions) == 6


VICTIM = replace(POD, name="bank-0", namespace="bank", service_account="bank", uid="b", service_account_uid="bb")
ELSEWHERE = replace(VICTIM, node="node-b", node_uid="node-b-uid")


async def test_hostile_pod(world: World, caller: Caller) -> None:
    """It cannot call with its own tokens for any audience. The driver gets only names of the pod's service account for it."""
    world.reviewer.node = POD.reviewed
    with_other_audience = world.issuer.pod_token(POD, aud=["https://kubernetes.default.svc"])
    for own in (world.issuer.pod_token(POD), world.issuer.node_token(POD), with_other_audience):
        assert (await caller.rejected(pod=world.issuer.pod_token(POD), node=own)).reason == "TokenRejected"
    assert (await caller.rejected(metadata=())).reason == "TokenRejected"
    world.reviewer.node = DRIVER.reviewed
    foreign = Names.of([DNSName.parse("bank.bank.svc")], [spiffe_id("cluster.local", "bank", "bank")])
    assert (await caller.rejected(csr=build_csr(world.key, foreign))).reason == "NameNotAllowed"
    leaf = x509.load_der_x509_certificate((await caller.issue()).chain[0])
    assert {name.text for name in names_of(leaf.extensions)} == {NAME, "spiffe://cluster.local/ns/default/sa/hello"}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


async def test_pods_on_one_node_do_not_get_each_others_names(world: World, caller: Caller) -> None:
    """Names follow the authenticated service account, not the driver that calls."""
    other = Pod(name="other-0", service_account="other", uid="o", service_account_uid="oo")
    world.reviewer.pod = other.reviewed
    assert (await caller.rejected(pod=world.issuer.pod_token(other))).reason == "NameNotAllowed"
    response = await caller.issue(csr=world.csr(), pod=world.issuer.pod_token(other))
    leaf = x509.load_der_x509_certificate(response.chain[0])
    assert {name.text for name in names_of(leaf.extensions)} == {"spiffe://cluster.local/ns/default/sa/other"}


async def test_hostile_pod_author(world: World, caller: Caller) -> None:
    for csr, reason in (
        (world.csr("kubernetes.default.svc"), "NameNotAllowed"),
        (build_csr(world.key, Names.of(uris=[spiffe_id("cluster.local", "kube-system", "admin")])), "NameNotAllowed"),
        (world.csr(*(f"{number}.default.svc.cluster.local" for number in range(101))), "InvalidCSR"),
    ):
        assert (await caller.rejected(csr=csr)).reason == reason
        assert world.events.all[-1][:3] == (POD.name, True, reason)


async def test_stolen_pod_token(world: World, caller: Caller) -> None:
    stolen = world.issuer.pod_token(POD)
    assert (await caller.rejected(pod=stolen, node=stolen)).reason == "TokenRejected"
    thief = replace(DRIVER, node="node-b", node_uid="node-b-uid")
    world.reviewer.node = thief.reviewed
    failure = await caller.rejected(pod=stolen, node=world.issuer.node_token(thief))
    assert failure.reason == "TokenRejected"
    assert "pod on node node-a, but the driver on node node-b sent it" in failure.text
    assert not world.events.all  # no pod was authenticated


async def test_stolen_node(world: World, caller: Caller) -> None:
    await caller.issue()
    world.reviewer.pod = ELSEWHERE.reviewed
    assert (await caller.rejected(pod=world.issuer.pod_token(ELSEWHERE))).reason == "TokenRejected"
    mallory = TokenIssuer(key_id=world.issuer.key_id)  # has no key of the cluster
    assert (await caller.rejected(pod=mallory.pod_token(VICTIM))).reason == "TokenRejected"
    deleted = CertmountError(Reason.TOKEN_REJECTED, "the API server does not accept it")
    for answer in (deleted, replace(POD.reviewed, pod_uid="a new pod with this name")):
        world.reviewer.pod = answer
        token = world.issuer.pod_token(POD, jti=str(answer))
        assert (await caller.rejected(pod=token)).reason == "TokenRejected"


async def test_stolen_node_token(world: World, caller: Caller) -> None:
    node = world.issuer.node_token()
    mallory = TokenIssuer(key_id=world.issuer.key_id)
    for pod in (Secret(""), node, mallory.pod_token(POD), mallory.pod_token(DRIVER)):
        assert (await caller.rejected(pod=pod, node=node)).reason == "TokenRejected"
    assert not world.events.all


async def test_network(world: World) -> None:
    own = (world.ca / "authority.crt").read_bytes()
    pods = (world.ca / "root.crt").read_bytes()
    for opened in (
        world.channel(roots=pods),
        world.channel(name="another.certmount.svc"),
        grpc.aio.insecure_channel(f"127.0.0.1:{world.server.port}"),
        grpc.aio.secure_channel(f"localhost:{world.server.port}", grpc.ssl_channel_credentials()),
    ):
        async with opened as channel:
            assert (await Caller(world, channel).rejected()).code is grpc.StatusCode.UNAVAILABLE
    assert world.reviewer.calls == 0
    async with world.channel() as channel:
        await Caller(world, channel).issue()
    with pytest.raises(ssl.SSLError):
        await asyncio.to_thread(handshake, world, own, ssl.TLSVersion.TLSv1_1)


def handshake(world: World, roots: bytes, newest: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cadata=roots.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test needs an old version
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
    with socket.create_connection(("127.0.0.1", world.server.port), timeout=5) as plain:
        context.wrap_socket(plain, server_hostname=SERVING_NAME).close()
