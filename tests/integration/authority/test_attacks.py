"""What a hostile pod, node or network can send, and that it gets nothing for it."""

from __future__ import annotations

import dataclasses
import time
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

from csi_driver._proto import authority_pb2
from csi_driver.core.certificates.csr import MAX_CSR_BYTES
from csi_driver.core.cluster.token_review import ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.secret import Secret
from tests.integration.authority.world import NAME, POD, Caller, Refusal, World
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.unit.authority.authn.test_token_verifier import (
    claims_changed_after_signing,
    forged,
    hmac_by_public_key,
    with_own_key,
)

DENIED = grpc.StatusCode.PERMISSION_DENIED
Token = Callable[[TokenIssuer], Secret[str]]

POD_TOKENS: dict[str, tuple[Token, str]] = {
    "missing": (lambda _: Secret(""), "TokenRejected"),
    "garbage": (lambda _: Secret("garbage"), "TokenRejected"),
    "expired": (lambda i: i.pod_token(POD, exp=int(time.time()) - 5), "TokenExpired"),
    "not yet valid": (lambda i: i.pod_token(POD, nbf=int(time.time()) + 600), "TokenRejected"),
    "other audience": (lambda i: i.pod_token(POD, aud=["vault"]), "TokenRejected"),
    "other issuer": (lambda i: i.pod_token(POD, iss="https://mallory.test"), "TokenRejected"),
    "alg none": (lambda i: forged(i, {"alg": "none", "kid": i.key_id}, lambda _: b""), "TokenRejected"),
    "HS256 by the public key": (hmac_by_public_key, "TokenRejected"),
    "unknown key": (lambda i: i.rotated("key-9").pod_token(POD), "TokenRejected"),
    "key in the header": (with_own_key, "TokenRejected"),
    "claims changed": (claims_changed_after_signing, "TokenRejected"),
    "over-long": (lambda i: i.pod_token(POD, padding="x" * MAX_TOKEN_BYTES), "TokenRejected"),
    "node token": (lambda i: i.node_token(), "TokenRejected"),
    "of a pod on another node": (lambda i: i.pod_token(replace(POD, node="node-b")), "TokenRejected"),
    "of the node's former self": (lambda i: i.pod_token(replace(POD, node_uid="old")), "TokenRejected"),
}


@pytest.mark.parametrize("attack", POD_TOKENS)
async def test_a_bad_pod_token_gets_no_certificate(attack: str, world: World, caller: Caller) -> None:
    """Whatever it claims; the answer says which token is bad and does not quote it."""
    make, reason = POD_TOKENS[attack]
    token = make(world.issuer)
    world.reviewer.pod = replace(POD.reviewed, node_name="node-b") if "another" in attack else POD.reviewed
    if "former" in attack:
        world.reviewer.pod = replace(POD.reviewed, node_uid="old")
    refusal = await caller.refused(pod=token)
    assert refusal.reason == reason
    assert "pod token" in refusal.text
    assert all(part not in refusal.text for part in token.reveal().split(".") if len(part) > 8)


NODE_TOKENS: dict[str, tuple[Token, str]] = {
    "garbage": (lambda _: Secret("garbage"), "TokenRejected"),
    "expired": (lambda i: i.node_token(exp=int(time.time()) - 5), "TokenExpired"),
    "other audience": (lambda i: i.node_token(aud=["vault"]), "TokenRejected"),
    "pod token": (lambda i: i.pod_token(DRIVER), "TokenRejected"),
    "of another service account": (lambda i: i.node_token(replace(DRIVER, service_account="x")), "TokenRejected"),
    "of the pod itself": (lambda i: i.node_token(POD), "TokenRejected"),
    "unknown key": (lambda i: i.rotated("key-9").node_token(), "TokenRejected"),
    "over-long": (lambda i: i.node_token(padding="x" * MAX_TOKEN_BYTES), "TokenRejected"),
}


@pytest.mark.parametrize("attack", NODE_TOKENS)
async def test_without_the_node_drivers_token_nothing_is_answered(attack: str, world: World, caller: Caller) -> None:
    """Neither a certificate nor, by the same rule, the stream of roots."""
    make, reason = NODE_TOKENS[attack]
    if "itself" in attack:
        world.reviewer.node = POD.reviewed
    if "another" in attack:
        world.reviewer.node = replace(DRIVER, service_account="x").reviewed
    refusal = await caller.refused(node=make(world.issuer))
    assert refusal.reason == reason
    assert "node token" in refusal.text
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.watch(make(world.issuer)).read()
    assert Refusal.of(failure.value).reason == reason


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Basic dXNlcjpwYXNz"),),
        (("authorization", "Bearer a.b.c"), ("authorization", "Bearer d.e.f")),
        (("token", "Bearer a.b.c"),),
    ],
    ids=["none", "empty", "scheme only", "empty token", "basic", "twice", "elsewhere"],
)
async def test_a_call_must_show_exactly_one_bearer_token(metadata: Any, caller: Caller) -> None:
    """Nothing is guessed where there is none or too much."""
    refusal = await caller.refused(metadata=metadata)
    assert (refusal.code, refusal.reason) == (DENIED, "TokenRejected")
    assert refusal.text == "TokenRejected: node token: is missing"


async def test_a_token_of_another_node_is_refused_both_ways(world: World, caller: Caller) -> None:
    """A driver gets certificates for the pods of its own node, and no other."""
    elsewhere = replace(DRIVER, node="node-b", node_uid="b")
    world.reviewer.node = elsewhere.reviewed
    refusal = await caller.refused(node=world.issuer.node_token(elsewhere))
    assert refusal.reason == "TokenRejected"
    assert "pod on node node-a, but the driver on node node-b shows it" in refusal.text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReviewedToken)])
@pytest.mark.parametrize("which", ["pod", "node"])
async def test_the_live_cluster_has_the_last_word(which: str, field: str, world: World, caller: Caller) -> None:
    """A well-signed token whose pod, account or node is another by now is worth nothing."""
    live = (POD if which == "pod" else DRIVER).reviewed
    setattr(world.reviewer, which, replace(live, **{field: "other"}))
    refusal = await caller.refused()
    assert (refusal.code, refusal.reason) == (DENIED, "TokenRejected")
    assert f"{which} token: its claims name another" in refusal.text


async def test_a_deleted_pods_token_is_refused(world: World, caller: Caller) -> None:
    """As soon as the API server says so."""
    world.reviewer.pod = CertmountError(Reason.TOKEN_REJECTED, "the API server does not accept it; its pod may be gone")
    refusal = await caller.refused()
    assert (refusal.code, refusal.reason) == (DENIED, "TokenRejected")


async def test_no_log_field_holds_a_token_before_redaction(world: World, caller: Caller) -> None:
    """The processor that cuts tokens out of the log is a second belt; here it is not worn."""
    sent = [world.issuer.pod_token(POD, jti=str(number)) for number in range(3)]
    node = world.issuer.node_token()
    with capture_logs() as logs:
        await caller.issue(pod=sent[0], node=node)
        await caller.refused(pod=sent[1], node=node, csr=b"")
        await caller.refused(pod=Secret(sent[2].reveal() + "x"), node=node)
    assert len(logs) >= 3
    for token in (*sent, node):
        for part in token.reveal().split(".")[1:]:
            assert part not in str(logs)


async def test_a_defect_shows_neither_its_text_nor_the_token(world: World, caller: Caller) -> None:
    """Whatever an exception of some library quotes, the caller and the log get its type only; the next call works."""
    token = world.issuer.pod_token(POD)

    world.reviewer.pod = RuntimeError(f"cannot parse {token.reveal()}")
    with capture_logs() as logs:
        refusal = await caller.refused(pod=token)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "InternalError")
    assert "RuntimeError" in refusal.text
    for part in token.reveal().split(".")[1:]:
        assert part not in refusal.text + str(logs)
    world.reviewer.pod = POD.reviewed
    await caller.issue(pod=token)


async def test_nothing_is_issued_while_the_cluster_cannot_be_asked(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the signature's word alone; the caller may try again, and then it works."""
    monkeypatch.setattr("csi_driver.authority.authn.token_reviews._PATIENCE_S", 0.0)
    token = world.issuer.pod_token(POD)
    world.reviewer.pod = CertmountError(
        Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview: the API server cannot be reached"
    )
    refusal = await caller.refused(pod=token)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "TokenReviewUnavailable")
    world.reviewer.pod = POD.reviewed
    await caller.issue(pod=token)


def signed_by_another(world: World) -> bytes:
    csr = bytearray(world.csr(NAME))
    csr[-1] ^= 1
    return bytes(csr)


def request(names: list[x509.GeneralName], key: Any = None, **extensions: x509.ExtensionType) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "system:masters")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions.values():
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key or ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.DER)


CSRS: dict[str, tuple[Callable[[World], bytes], str]] = {
    "empty": (lambda _: b"", "is not a PKCS#10 request"),
    "garbage": (lambda _: b"\x30\x82garbage", "is not a PKCS#10 request"),
    "truncated": (lambda w: w.csr(NAME)[:-20], "is not a PKCS#10 request"),
    "bad signature": (signed_by_another, "is not"),
    "huge": (lambda _: b"0" * (MAX_CSR_BYTES + 1), "at most 65536 are read"),
    "1,000 names": (
        lambda _: request([x509.DNSName(f"{n}.default.svc.cluster.local") for n in range(1000)]),
        "at most 100",
    ),
    "a damaged e-mail name": (lambda _: request([x509.RFC822Name("root@localhost\nx")]), "names something that"),
    "a network as IP name": (
        lambda _: request([x509.IPAddress(IPv4Network("10.0.0.0/8"))]),
        "names something that",
    ),
    "a directory name": (lambda _: request([x509.DirectoryName(x509.Name([]))]), "is a DirectoryName"),
    "a name with a line break": (lambda _: request([x509.DNSName("a\nb.test")]), "has the label"),
    "an empty name": (lambda _: request([x509.DNSName("")]), "is empty"),
    "RSA 1024": (
        lambda _: request([], rsa.generate_private_key(public_exponent=65537, key_size=1024)),  # noqa: S505  # weak on purpose
        "has a key of another type",
    ),
    "RSA with exponent 3": (
        lambda _: request([], rsa.generate_private_key(public_exponent=3, key_size=2048)),
        "has a key of another type",
    ),
    "P-521": (lambda _: request([], ec.generate_private_key(ec.SECP521R1())), "has a key of another type"),
    "P-224": (lambda _: request([], ec.generate_private_key(ec.SECP224R1())), "has a key of another type"),
}


@pytest.mark.parametrize("attack", CSRS)
async def test_a_bad_request_is_refused_in_words(attack: str, world: World, caller: Caller) -> None:
    """By whoever wrote the node's software; the pod's author can't cause it."""
    make, words = CSRS[attack]
    refusal = await caller.refused(csr=make(world))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "InvalidCSR")
    assert words in refusal.text


async def test_nothing_but_names_and_key_is_taken_from_a_request(caller: Caller) -> None:
    """A subject, a CA flag or usages that it asks for are not in the certificate."""
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


async def test_a_message_beyond_the_limit_is_not_even_read(caller: Caller) -> None:
    """The transport cuts it off, and the next call works."""
    request = authority_pb2.IssueRequest(csr=b"0" * 200_000, pod_token="x")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.send(request)
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await caller.issue()


async def test_without_tls_or_with_another_root_there_is_no_call(world: World) -> None:
    """Neither plain text nor a server that someone else vouches for."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await Caller(world, channel).issue()
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.secure_channel(f"localhost:{world.server.port}", grpc.ssl_channel_credentials()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await Caller(world, channel).issue()
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_two_pods_of_one_node_do_not_get_each_others_names(world: World, caller: Caller) -> None:
    """Names follow the proven account, not the caller."""
    other = Pod(name="other-0", service_account="other", uid="o", service_account_uid="oo")
    world.reviewer.pod = other.reviewed
    refusal = await caller.refused(pod=world.issuer.pod_token(other))
    assert refusal.reason == "NameNotAllowed"
    answer = await caller.issue(csr=world.csr(), pod=world.issuer.pod_token(other))
    leaf = x509.load_der_x509_certificate(answer.chain[0])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://cluster.local/ns/default/sa/other"]
