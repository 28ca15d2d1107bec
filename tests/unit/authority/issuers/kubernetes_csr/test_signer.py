"""The approver and signer of our own name: each check, and what it does about requests that others have had a hand in."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import Keyring, make_keyring
from csi_driver.authority.csr_signer.decision import ACCOUNT_RATE, Decisions
from csi_driver.authority.csr_signer.leadership import Leadership
from csi_driver.authority.csr_signer.request import read_wish
from csi_driver.authority.csr_signer.requester import requester_of
from csi_driver.authority.csr_signer.signer import CSRSigner
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.core.certificates.csr import build_csr, names_of
from csi_driver.core.cluster.csr import APPROVED, DENIED, FAILED, OWN_SIGNER, ClusterCSR, CSRCondition
from csi_driver.core.cluster.pod import LivePod
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.policy.engine import Policy, PolicySubject
from csi_driver.core.policy.rules import Denial, Match
from csi_driver.core.spec import KeyType
from tests.support.waiting import until
from tests.unit.authority.issuers.kubernetes_csr.cluster import ACCOUNT as AUTHORITY
from tests.unit.authority.issuers.kubernetes_csr.cluster import FakeLease, FakePods, FakeRequests
from tests.unit.core import pki

USERNAME = "system:serviceaccount:web:edge"
NAME = "hello.web.svc"
EXTRA = {"pod-name": ["edge-0"], "pod-uid": ["pod-uid"], "node-name": ["node-a"], "node-uid": ["node-uid"]}
USAGES = ["digital signature", "server auth", "client auth"]
KEY = pki.key_of(KeyType.EC_P256, 9)
KEYRING = make_keyring(pki.NOW)


def pem(*names: str, key: Any = KEY) -> bytes:
    return x509.load_der_x509_csr(build_csr(key, pki.names(*names))).public_bytes(Encoding.PEM)


def item(
    request: bytes | None = None,
    *,
    username: str = USERNAME,
    extra: Mapping[str, list[str]] | None = None,
    signer: str = OWN_SIGNER,
    usages: list[str] | None = None,
    seconds: int | None = 3600,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A request as the API server keeps it: a good one, unless it is said otherwise."""
    stamped = EXTRA if extra is None else extra
    spec = {
        "signerName": signer,
        "request": base64.b64encode(pem(NAME) if request is None else request).decode(),
        "usages": USAGES if usages is None else usages,
        "expirationSeconds": seconds,
        "username": username,
        "extra": {f"authentication.kubernetes.io/{key}": value for key, value in stamped.items()},
    }
    return {"metadata": {"labels": dict(labels or {})}, "spec": spec}


@dataclass
class HeldCA:
    """What the internal issuer asks a CA for."""

    current: Keyring = KEYRING
    broken: bool = False

    async def record_lifetime(self, _: timedelta) -> Keyring:
        if self.broken:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the internal CA is not loaded yet")
        return self.current


@dataclass
class KnownPods:
    """What the caches say of a pod: one Service selects it."""

    async def find(self, pod: PodIdentity) -> PolicySubject:
        return PolicySubject(pod, services=("hello",))


@dataclass
class Said:
    """Events on pods."""

    events: list[tuple[str, str]] = field(default_factory=list)

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        assert warning
        assert message
        self.events.append((str(pod), reason))


@dataclass
class World:
    """A signer at work."""

    cluster: FakeRequests = field(default_factory=FakeRequests)
    pods: FakePods = field(
        default_factory=lambda: FakePods({("web", "edge-0"): LivePod("pod-uid", "edge", "node-a", False)})
    )
    ca: HeldCA = field(default_factory=HeldCA)
    policy: Policy = field(default_factory=lambda: Policy("cluster.local", "cluster.local"))
    said: Said = field(default_factory=Said)
    counted: list[Reason | None] = field(default_factory=list)

    def count(self, seconds: float, reason: Reason | None) -> None:
        assert seconds > 0
        self.counted.append(reason)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        internal = InternalIssuer(cast("CertificateAuthority", self.ca), lambda: pki.NOW)
        decisions = Decisions(self.pods, KnownPods(), lambda: self.policy, internal)
        signer = CSRSigner(self.cluster, decisions, Leadership(FakeLease(), "one"), self.said, self.count)
        running = asyncio.create_task(signer.run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def decided(self, made: dict[str, Any]) -> ClusterCSR:
        """What becomes of a request."""
        async with self.running():
            name = self.cluster.put(made)
            await until(lambda: self.cluster.find(name).finished, "a decision")
            await asyncio.sleep(0)
        return self.cluster.find(name)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_pods_request_is_approved_and_signed(world: World) -> None:
    """For the names it asks for and its SPIFFE ID, for as long as it asks, with its chain; the audit log tells of it."""
    with structlog.testing.capture_logs() as logs:
        csr = await world.decided(item())
    approved = csr.condition(APPROVED)
    assert approved is not None
    assert str(approved) == f"PolicyAllows: {NAME}, {pki.SPIFFE} for 1h, by built-in"
    leaf, intermediate = decode_certificates(csr.certificate)
    assert names_of(leaf.extensions) == pki.names(NAME, pki.SPIFFE)
    assert leaf.not_valid_after_utc == pki.NOW + pki.HOUR
    leaf.verify_directly_issued_by(intermediate)
    (line,) = [log for log in logs if log["event"] == "certificate"]
    assert (line["decision"], line["pod"], line["node"], line["csr"]) == ("issued", "edge-0", "node-a", csr.name)
    assert line["serial"] == f"{leaf.serial_number:x}"
    assert world.cluster.answers == 1, "the approval, of which the watch tells too, makes no second one"
    assert world.said.events == []
    assert world.counted == [None]


async def test_one_that_names_nothing_gets_what_the_pod_has(world: World) -> None:
    """Like a volume without attributes; without a life, a day."""
    leaf, _ = decode_certificates((await world.decided(item(pem(), seconds=None, usages=["server auth"]))).certificate)
    assert names_of(leaf.extensions) == pki.names(NAME, f"{NAME}.cluster.local", pki.SPIFFE)
    assert leaf.not_valid_after_utc == pki.NOW + 24 * pki.HOUR
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]


def crafted(
    *extensions: x509.ExtensionType, subject: tuple[x509.ObjectIdentifier, str] | None = None, key: Any = KEY
) -> bytes:
    """A request with anything in it."""
    name = x509.Name([x509.NameAttribute(*subject)] if subject else [])
    san = x509.SubjectAlternativeName([x509.DNSName(NAME)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(san, critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def key_usage(**wanted: bool) -> x509.KeyUsage:
    bits = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**dict.fromkeys((*bits, *more), False) | wanted)


def changed_signature() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(pem(NAME)).public_bytes(Encoding.DER))
    der[-1] ^= 1
    return (
        b"-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(bytes(der))
        + b"-----END CERTIFICATE REQUEST-----\n"
    )


BLOCK = pem(NAME)
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no PEM": (item(b""), "exactly one PEM block"),
    "two blocks": (item(BLOCK + BLOCK), "exactly one PEM block"),
    "text before": (item(b"x\n" + BLOCK), "exactly one PEM block"),
    "text behind": (item(BLOCK + b"x"), "exactly one PEM block"),
    "PEM headers": (item(BLOCK.replace(b"REQUEST-----\n", b"REQUEST-----\nA: b\n\n", 1)), "exactly one PEM block"),
    "another label": (item(BLOCK.replace(b"CERTIFICATE REQUEST", b"CERTIFICATE")), "exactly one PEM block"),
    "no base64": (item(BLOCK[:50] + BLOCK[51:]), "PEM block"),
    "no request": (
        item(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"),
        "is not a PKCS#10",
    ),
    "signature": (item(changed_signature()), "is not signed by the key it names"),
    "key": (item(crafted(key=ec.generate_private_key(ec.SECP521R1()))), "has a key of another type"),
    "usage": (item(usages=[*USAGES, "cert sign"]), "spec.usages: cert sign is not for pods"),
    "any": (item(usages=["any"]), "spec.usages: any is not for pods"),
    "no purpose": (item(usages=["digital signature"]), "neither server auth nor client auth"),
    "CA": (item(crafted(x509.BasicConstraints(ca=True, path_length=0))), "asks for a certificate authority"),
    "CA's usage": (item(crafted(key_usage(key_cert_sign=True))), "more than digital signature"),
    "key agreement": (item(crafted(key_usage(key_agreement=True))), "more than digital signature"),
    "purpose": (
        item(crafted(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]))),
        "server auth and client",
    ),
    "extension": (item(crafted(x509.OCSPNoCheck())), "no certificate for pods has that"),
    "system user": (item(crafted(subject=(NameOID.COMMON_NAME, "system:admin"))), "a name of Kubernetes' own"),
    "system group": (item(crafted(subject=(NameOID.ORGANIZATION_NAME, "System:masters"))), "a name of Kubernetes' own"),
    "organisation": (
        item(crafted(subject=(NameOID.ORGANIZATION_NAME, "Example"))),
        "no certificate for pods has that",
    ),
    "common name": (
        item(crafted(subject=(NameOID.COMMON_NAME, "b.web.svc"))),
        "not among the subject alternative names",
    ),
}


@pytest.mark.parametrize("what", INVALID)
async def test_a_request_of_wrong_content_is_denied(what: str, world: World) -> None:
    """With a reason, and a text that names the field; what would not come out is never left out in silence."""
    made, text = INVALID[what]
    csr = await world.decided(made)
    denied = csr.condition(DENIED)
    assert denied is not None
    assert denied.reason == "InvalidCSR"
    assert text in denied.message
    assert not csr.certificate
    assert world.said.events == [("pod web/edge-0", "InvalidCSR")]
    assert world.counted == [Reason.INVALID_CSR]


@pytest.mark.parametrize(
    "request_pem",
    [
        crafted(subject=(NameOID.COMMON_NAME, NAME.upper())),
        crafted(
            x509.BasicConstraints(ca=False, path_length=None), key_usage(digital_signature=True, key_encipherment=True)
        ),
        crafted(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
        BLOCK.replace(b"\n", b"\r\n"),
        b"\n" + BLOCK + b"\n\n",
    ],
)
async def test_what_scripts_write_is_taken(request_pem: bytes, world: World) -> None:
    """A common name that is among the names, harmless extensions, other ends of lines."""
    assert (await world.decided(item(request_pem))).certificate


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a person": (item(username="jane@example.com"), "is no service account"),
    "a node": (item(username="system:node:node-a"), "is no service account"),
    "half an account": (item(username="system:serviceaccount:web"), "is no service account"),
    "a strange account": (item(username="system:serviceaccount:web:a:b"), "is no service account"),
    "no pod": (item(extra={}), "came without pod-name, pod-uid, node-name"),
    "no node": (item(extra={**EXTRA, "node-name": []}), "came without node-name"),
    "two pods": (item(extra={**EXTRA, "pod-uid": ["pod-uid", "other"]}), "came without pod-uid"),
    "a pod that is gone": (item(extra={**EXTRA, "pod-name": ["edge-1"]}), "pod web/edge-1: is gone"),
    "a pod made anew": (item(extra={**EXTRA, "pod-uid": ["before"]}), "was made anew since"),
    "another node": (item(extra={**EXTRA, "node-name": ["node-b"]}), "is on node node-a, but its token names node-b"),
    "another account": (item(username="system:serviceaccount:web:other"), "runs as service account edge, not other"),
    "the same pod's name elsewhere": (item(username="system:serviceaccount:shop:edge"), "pod shop/edge-0: is gone"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_whoever_is_no_live_pod_is_denied(what: str, world: World) -> None:
    """By what the API server has stamped on, held against the pod as it is."""
    made, text = REFUSED[what]
    denied = (await world.decided(made)).condition(DENIED)
    assert denied is not None
    assert denied.reason == "TokenRejected"
    assert text in denied.message


async def test_a_pod_that_ends_is_denied(world: World) -> None:
    """Its token still counts for a moment."""
    world.pods.pods["web", "edge-0"] = LivePod("pod-uid", "edge", "node-a", ending=True)
    denied = (await world.decided(item())).condition(DENIED)
    assert denied is not None
    assert "is ending" in denied.message


@pytest.mark.parametrize(
    "made,text",
    [
        (item(pem("shop.example.com")), "shop.example.com"),
        (item(pem("spiffe://cluster.local/ns/web/sa/other")), "spiffe://cluster.local/ns/web/sa/other"),
        (item(seconds=90_000), "not 25h"),
    ],
)
async def test_what_policy_does_not_allow_is_denied(made: dict[str, Any], text: str, world: World) -> None:
    """The very policy that decides on volumes."""
    denied = (await world.decided(made)).condition(DENIED)
    assert denied is not None
    assert denied.reason == "NameNotAllowed"
    assert text in denied.message


async def test_a_denied_account_gets_nothing(world: World) -> None:
    """With the administrator's reason."""
    denial = Denial(Match(("web",), ("*",)), "its key was in a bug report")
    world.policy = Policy("cluster.local", "cluster.local", denials=(denial,))
    denied = (await world.decided(item())).condition(DENIED)
    assert denied is not None
    assert denied.reason == "ServiceAccountDenied"
    assert "its key was in a bug report" in denied.message


async def test_requests_for_other_signers_are_not_touched(world: World) -> None:
    """Even if the watch brings them."""
    other = world.cluster.put(item(signer="example.com/other"))
    await world.decided(item())
    assert world.cluster.find(other).conditions == ()
    assert not world.cluster.find(other).certificate


async def test_an_account_that_makes_too_many_is_denied(world: World) -> None:
    """Others are not."""
    world.pods.pods["web", "other-0"] = LivePod("other-uid", "other", "node-a", ending=False)
    other = item(
        username="system:serviceaccount:web:other", extra={**EXTRA, "pod-name": ["other-0"], "pod-uid": ["other-uid"]}
    )
    async with world.running():
        names = [world.cluster.put(item()) for _ in range(ACCOUNT_RATE.burst + 30)]
        last = world.cluster.put(other)
        await until(lambda: all(world.cluster.find(name).finished for name in [*names, last]), "decisions", 60)
    refused = [one for name in names if (one := world.cluster.find(name).condition(DENIED))]
    assert len(refused) >= 10
    assert {one.reason for one in refused} == {"TooManyRequests"}
    assert world.cluster.find(last).certificate


async def test_an_approval_by_hand_makes_no_name_allowed(world: World) -> None:
    """What fails the checks fails; what passes them is signed. The former is what a crash between two writes leaves, too."""
    approved = [{"type": APPROVED, "reason": "KubectlApprove", "message": ""}]
    bad = world.cluster.put({**item(pem("shop.example.com")), "status": {"conditions": approved}})
    good = world.cluster.put({**item(), "status": {"conditions": approved}})
    async with world.running():
        await until(lambda: all(world.cluster.find(name).finished for name in (bad, good)), "decisions")
    failed = world.cluster.find(bad).condition(FAILED)
    assert failed is not None
    assert failed.reason == "NameNotAllowed"
    assert world.cluster.find(good).certificate


async def test_a_denial_by_hand_stands(world: World) -> None:
    """Also where it comes while the request is looked at."""
    denied = [{"type": DENIED, "reason": "ByHand", "message": ""}]

    class Late(FakePods):
        async def find(self, namespace: str, name: str) -> LivePod | None:
            world.cluster.change("csr-1", conditions=denied)
            return await super().find(namespace, name)

    world.pods = Late(world.pods.pods)
    csr = await world.decided(item())
    await asyncio.sleep(0)
    assert csr.condition(DENIED) is not None
    assert world.cluster.answers == 0


async def test_an_approval_in_the_moment_of_a_refusal_is_no_gap(world: World) -> None:
    """The request that can't be denied any more fails."""
    approved = [{"type": APPROVED, "reason": "KubectlApprove", "message": ""}]
    decide = world.cluster.decide

    async def late(csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        world.cluster.objects[csr.name]["status"] = {"conditions": approved}  # before the watch tells of it
        return await decide(csr, condition)

    world.cluster.decide = late  # type: ignore[method-assign]  # somebody is faster
    csr = await world.decided(item(pem("shop.example.com")))
    assert [one.kind for one in csr.conditions] == [APPROVED, FAILED]


async def test_what_the_watch_tells_late_is_not_signed_again(world: World) -> None:
    """It tells of the approval when the certificate has been written already."""
    csr = await world.decided(item())
    async with world.running():
        stale = {**world.cluster.objects[csr.name], "status": {"conditions": [{"type": APPROVED}]}}
        name = world.cluster.put(item())
        await until(lambda: world.cluster.find(name).finished, "a decision")
        current, world.cluster.objects[name] = world.cluster.objects[name], {**world.cluster.objects[name], **stale}
        world.cluster.objects[name]["metadata"] = current["metadata"]
        for watch in world.cluster.sinks:
            watch.tell(name)
        another = world.cluster.put(item())
        await until(lambda: world.cluster.find(another).finished, "the next one's decision")
    assert world.cluster.answers == 3
    assert world.counted == [None] * 3


async def test_an_approval_that_is_told_before_the_certificate_is_not_signed_again(world: World) -> None:
    """The watch tells of the approval while the certificate is being written, and of the certificate later."""
    answer = world.cluster.answer

    async def unheard(csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        watches, world.cluster.sinks = world.cluster.sinks, []
        try:
            return await answer(csr, certificate)
        finally:
            world.cluster.sinks = watches

    world.cluster.answer = unheard  # type: ignore[method-assign]  # the watch is behind
    async with world.running():
        for number in range(1, 4):
            name = world.cluster.put(item())
            await until(lambda name=name: world.cluster.find(name).finished, "a decision")  # type: ignore[misc]
            await until(lambda number=number: len(world.counted) >= number, "its count")  # type: ignore[misc]
    assert world.cluster.answers == 3
    assert world.counted == [None] * 3


async def test_what_may_pass_is_tried_again(world: World) -> None:
    """A CA that is not there yet denies nothing."""
    world.ca.broken = True
    async with world.running():
        name = world.cluster.put(item())
        with structlog.testing.capture_logs() as logs:
            await until(lambda: logs, "a try")
        assert not world.cluster.find(name).conditions
        world.ca.broken = False
        await until(lambda: world.cluster.find(name).finished, "the next try")
    assert world.cluster.find(name).certificate


async def test_the_authoritys_own_requests_need_no_pod(world: World) -> None:
    """Policy has decided on them when the volume asked; they get what they name, and nothing beside it."""
    csr = await world.decided(item(pem("shop.example.com"), username=AUTHORITY, extra={}))
    leaf, _ = decode_certificates(csr.certificate)
    assert names_of(leaf.extensions) == pki.names("shop.example.com")


@pytest.mark.parametrize("request_pem", [pem(), crafted(x509.BasicConstraints(ca=True, path_length=None))])
async def test_the_authoritys_own_requests_are_no_way_around_the_rest(request_pem: bytes, world: World) -> None:
    """No CA, nothing unnamed."""
    assert (await world.decided(item(request_pem, username=AUTHORITY, extra={}))).condition(DENIED)


@pytest.mark.parametrize(
    "username", ["system:serviceaccount:certmount:default", "certmount-authority", f"{AUTHORITY}:x", "", USERNAME]
)
async def test_nobody_else_passes_for_the_authority(username: str, world: World) -> None:
    """Whatever labels they write: the name is stamped, and it is the whole name that counts."""
    labels = {"app.kubernetes.io/managed-by": "certmount", "certmount.dev/issuer": "own"}
    csr = await world.decided(item(pem("shop.example.com"), username=username, labels=labels))
    assert csr.condition(DENIED)
    assert not csr.certificate


@given(
    st.builds(
        ClusterCSR,
        name=st.just("x"),
        uid=st.just("u"),
        created_at=st.just(0.0),
        signer=st.just(OWN_SIGNER),
        request=st.binary(max_size=200) | st.sampled_from([BLOCK, BLOCK[:-3], BLOCK[30:]]),
        usages=st.lists(st.text(max_size=10), max_size=3).map(tuple),
        life_s=st.none() | st.integers(),
        username=st.text(max_size=60) | st.text(max_size=20).map(lambda text: f"system:serviceaccount:{text}"),
        extra=st.dictionaries(
            st.sampled_from([f"authentication.kubernetes.io/{key}" for key in EXTRA]), st.lists(st.text()).map(tuple)
        ),
    )
)
def test_any_request_is_read_or_refused(csr: ClusterCSR) -> None:
    """Nothing that anyone writes is a defect."""
    for read in (read_wish, requester_of):
        with contextlib.suppress(CertmountError):
            read(csr)


def test_an_identity_is_as_it_was_stamped() -> None:
    """Nothing of it comes from the request."""
    extra = {f"authentication.kubernetes.io/{key}": tuple(value) for key, value in EXTRA.items()}
    csr = ClusterCSR("x", "u", 0.0, OWN_SIGNER, b"", (), None, USERNAME, extra)
    assert requester_of(csr) == PodIdentity(
        ServiceAccount("web", "edge"), "", "edge-0", "pod-uid", "node-a", "node-uid", 0.0
    )
