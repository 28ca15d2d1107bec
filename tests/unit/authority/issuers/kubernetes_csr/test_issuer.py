"""A signer of the cluster as an issuer: what it is asked, what is made of its answers, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.kinds import IssuerDependencies, make_issuer, read_issuers
from csi_driver.authority.issuers.kubernetes_csr.access import Access
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.kubernetes_csr.issuer import KubernetesCSR
from csi_driver.authority.issuers.kubernetes_csr.request import ORDER_LABEL, order_id
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.cluster.csr import APPROVED, DENIED, FAILED, ClusterCSR
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.policy.engine import Grant
from csi_driver.core.spec import KeyType, Usage
from tests.support.waiting import until
from tests.unit.authority.issuers.kubernetes_csr.cluster import ACCOUNT, FakeRequests
from tests.unit.core import pki

SIGNER = "example.com/pods"
NAME = "a.web.svc"
ROOT = pki.authority("root")
OTHER = pki.authority("other")
BOTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
POD = PodIdentity(ServiceAccount("web", "edge"), "sa", "edge-0", "pod-uid", "node-a", "node-uid", 0.0)
KEY = pki.key_of(KeyType.EC_P256, 7)


def order(*asked: str, key: PrivateKey = KEY, life: timedelta = pki.HOUR, pod: PodIdentity = POD) -> IssuerRequest:
    """A pod's, which has also been granted its SPIFFE ID."""
    names = pki.names(*asked)
    granted = names if pki.SPIFFE in asked else pki.names(*asked, pki.SPIFFE)
    return IssuerRequest(
        parse_csr(build_csr(key, names)), Grant(granted, life, (Usage.SERVER, Usage.CLIENT), ("built-in",)), pod
    )


def answer(*names: str, key: PrivateKey = KEY, by: pki.Signer = ROOT, hours: int = 1) -> bytes:
    """What a signer writes."""
    validity = pki.Validity(end=timedelta(hours=hours))
    leaf = pki.leaf(by, key, pki.names(*names), validity=validity, extensions=[BOTH], critical=False)
    return encode_certificates([leaf, by.certificate])


@dataclass
class World:
    """An issuer that runs, and its cluster."""

    roots: Path
    cluster: FakeRequests = field(default_factory=FakeRequests)
    now: datetime = pki.NOW
    internal: tuple[bytes, ...] = ()

    @contextlib.asynccontextmanager
    async def running(
        self, *, approve: bool = True, patience_s: float = 5.0, own: bool = False, most: timedelta | None = None
    ) -> AsyncIterator[KubernetesCSR]:
        roots = None if own else FileSource(str(self.roots))
        configuration = KubernetesCSRConfiguration(SIGNER, approve, roots, max_duration=most)
        issuer = KubernetesCSR(
            "corporate",
            configuration,
            CredentialReader(),
            Access(self.cluster, lambda: self.internal),
            clock=lambda: self.now,
            patience_s=patience_s,
        )
        running = asyncio.create_task(issuer.run())
        try:
            await until(lambda: issuer.problem != "the cluster has not been looked at yet", "a first look")
            yield issuer
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def asked(self) -> ClusterCSR:
        """The one request, approved."""
        await until(lambda: any(self.cluster.find(name).conditions for name in self.cluster.objects), "the request")
        (name,) = self.cluster.objects
        return self.cluster.find(name)

    async def issue(self, issuer: KubernetesCSR, wanted: IssuerRequest, pem: bytes) -> IssuedCertificate:
        """With a signer that answers."""
        issuing = asyncio.create_task(issuer.issue(wanted))
        self.cluster.sign((await self.asked()).name, pem)
        return await issuing


@pytest.fixture
def world(tmp_path: Path) -> World:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(encode_certificates([ROOT.certificate]))
    return World(roots)


async def test_a_request_is_made_approved_signed_and_removed(world: World) -> None:
    """It says all that the signer needs, who it is for, and whose order it is; the roots are the administrator's."""
    async with world.running() as issuer:
        issuing = asyncio.create_task(issuer.issue(order(NAME)))
        csr = await world.asked()
        assert (csr.signer, csr.life_s) == (SIGNER, 3600)
        assert csr.usages == ("digital signature", "server auth", "client auth")
        assert parse_csr(x509.load_pem_x509_csr(csr.request).public_bytes(Encoding.DER)).names == pki.names(NAME)
        (draft,) = world.cluster.drafts
        assert draft.annotations == {"certmount.dev/pod": "web/edge-0", "certmount.dev/names": NAME}
        assert draft.labels["certmount.dev/issuer"] == "corporate"
        assert "pod web/edge-0 may have it by built-in" in str(csr.condition(APPROVED))
        world.cluster.sign(csr.name, answer(NAME))
        issued = await issuing
    assert issued.chain[1:] == tuple(pki.der(ROOT.certificate))
    assert issued.roots == issuer.roots == tuple(pki.der(ROOT.certificate))
    assert not issued.identity_included
    assert world.cluster.objects == {}


async def test_an_rsa_key_is_for_encipherment_too(world: World) -> None:
    """TLS 1.2 without forward secrecy needs it, and signers look at it."""
    key = pki.key_of(KeyType.RSA_2048)
    async with world.running() as issuer:
        await world.issue(issuer, order(NAME, key=key), answer(NAME, key=key))
    assert "key encipherment" in world.cluster.drafts[0].usages


async def test_the_identity_is_included_where_the_volume_asks_for_it(world: World) -> None:
    """The signer sees the node's request only."""
    async with world.running() as issuer:
        issued = await world.issue(issuer, order(NAME, pki.SPIFFE), answer(NAME, pki.SPIFFE))
    assert issued.identity_included


WRONG: dict[str, tuple[bytes, Reason, str]] = {
    "a name more": (answer(NAME, "b.web.svc"), Reason.INVALID_RESPONSE, "also holds b.web.svc"),
    "a name less": (answer("b.web.svc"), Reason.INVALID_RESPONSE, f"lacks {NAME}"),
    "another key": (answer(NAME, key=generate_key(KeyType.EC_P256)), Reason.INVALID_RESPONSE, "is for another key"),
    "a longer life": (answer(NAME, hours=30), Reason.INVALID_RESPONSE, "longer than was granted"),
    "another root": (answer(NAME, by=OTHER), Reason.ISSUER_UNAVAILABLE, "not among the configured ones"),
    "no certificate": (b"hello", Reason.ISSUER_UNAVAILABLE, "is no certificate"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_wrong_answer_is_no_certificate(what: str, world: World) -> None:
    """Told in words, and nothing is left of it."""
    pem, reason, text = WRONG[what]
    async with world.running() as issuer:
        with pytest.raises(CertmountError, match=text) as failure:
            await world.issue(issuer, order(NAME), pem)
    assert failure.value.reason is reason
    assert world.cluster.objects == {}


@pytest.mark.parametrize(
    "conditions,word",
    [
        ([{"type": DENIED, "reason": "Unwanted", "message": "not on Sundays"}], "denied"),
        ([{"type": APPROVED}, {"type": FAILED, "reason": "Unwanted", "message": "not on Sundays"}], "failed to sign"),
    ],
)
async def test_a_refusal_is_told_in_its_own_words(conditions: list[object], word: str, world: World) -> None:
    """And the next try begins anew."""
    async with world.running(approve=False) as issuer:
        issuing = asyncio.create_task(issuer.issue(order(NAME)))
        await until(lambda: world.cluster.objects, "the request")
        world.cluster.change(next(iter(world.cluster.objects)), conditions=conditions)
        with pytest.raises(CertmountError, match=f"{word} the request: Unwanted: not on Sundays") as failure:
            await issuing
    assert failure.value.reason is Reason.NAME_NOT_ALLOWED
    assert world.cluster.objects == {}


async def test_what_takes_long_goes_on(world: World) -> None:
    """The call ends with what is waited for; the same order, at another replica, takes the finished certificate."""
    async with world.running(approve=False, patience_s=0.02) as issuer:
        with pytest.raises(CertmountError, match="kubectl certificate approve certmount-corporate-1") as failure:
            await issuer.issue(order(NAME))
        assert failure.value.reason is Reason.ISSUANCE_PENDING
        (name,) = world.cluster.objects
        world.cluster.change(name, conditions=[{"type": APPROVED}])
        with pytest.raises(CertmountError, match=r"is approved and waits for example\.com/pods to sign it"):
            await issuer.issue(order(NAME))
        assert world.cluster.made == 1
    world.cluster.sign(name, answer(NAME))
    async with world.running(approve=False) as another:
        assert (await another.issue(order(NAME))).chain
    assert (world.cluster.made, world.cluster.objects) == (1, {})


def test_an_order_is_the_same_for_the_same_pod_key_and_wishes_only() -> None:
    """Nobody takes what was signed for another."""
    other_pod = PodIdentity(POD.service_account, "sa", "edge-1", "other-uid", "node-a", "node-uid", 0.0)
    other_key = pki.key_of(KeyType.EC_P256, 8)
    orders = [
        order(NAME),
        order(NAME, pki.SPIFFE),
        order(NAME, key=other_key),
        order(NAME, life=2 * pki.HOUR),
        order(NAME, pod=other_pod),
    ]
    assert len({order_id(one) for one in orders}) == len(orders)
    assert order_id(order(NAME)) == order_id(order(NAME)), "another signature of the same request is the same order"


async def test_labels_of_others_requests_mean_nothing(world: World) -> None:
    """Whoever copies them gets their request neither taken for the authority's nor removed."""
    labels = {"certmount.dev/issuer": "corporate", ORDER_LABEL: order_id(order(NAME))}
    spec = {"signerName": SIGNER, "username": "system:serviceaccount:web:hostile"}
    created = (pki.NOW - timedelta(days=1)).isoformat()
    world.cluster.put({"metadata": {"name": "forged", "labels": labels, "creationTimestamp": created}, "spec": spec})
    world.cluster.sign("forged", answer(NAME, by=OTHER))
    async with world.running() as issuer:
        issuing = asyncio.create_task(issuer.issue(order(NAME)))
        await until(lambda: len(world.cluster.objects) == 2, "a request of its own")
        (own,) = (name for name in world.cluster.objects if name != "forged")
        world.cluster.sign(own, answer(NAME))
        await issuing
    assert list(world.cluster.objects) == ["forged"]


@pytest.mark.parametrize(
    "conditions,certificate,minutes,stays",
    [
        ([], "", 14, True),
        ([], "", 16, False),
        ([{"type": APPROVED}], "", 16, False),
        ([{"type": APPROVED}], "YQ==", 9, True),
        ([{"type": APPROVED}], "YQ==", 11, False),
        ([{"type": DENIED}], "", 11, False),
    ],
)
async def test_what_a_dead_replica_left_is_removed(
    conditions: list[object], certificate: str, minutes: int, stays: bool, world: World
) -> None:
    """At the start, too, and not before its node has had time to come for it."""
    labels = {"certmount.dev/issuer": "corporate", ORDER_LABEL: "x"}
    created = (pki.NOW - timedelta(minutes=minutes)).isoformat()
    name = world.cluster.put(
        {"metadata": {"labels": labels, "creationTimestamp": created}, "spec": {"username": ACCOUNT}}
    )
    world.cluster.change(name, conditions=conditions, certificate=certificate)
    async with world.running() as issuer:
        await until(lambda: issuer.problem is None, "a look")
        await asyncio.sleep(0.05)
    assert bool(world.cluster.objects) is stays


async def test_what_cannot_be_asked_for_is_told_before_anything_is_made(world: World) -> None:
    """The API's least life, the administrator's most, and a volume that names nothing; all at once."""
    async with world.running(most=2 * pki.HOUR) as issuer:
        with pytest.raises(CertmountError, match="5m is shorter than this issuer's least, 10m") as failure:
            await issuer.issue(order(life=timedelta(minutes=5)))
        assert (failure.value.reason, len(failure.value.faults)) == (Reason.NAME_NOT_ALLOWED, 2)
        assert f"name what is needed, such as uri-sans: {pki.SPIFFE}" in str(failure.value)
        with pytest.raises(CertmountError, match="24h is longer than this issuer's most, 2h"):
            await issuer.issue(order(NAME, life=timedelta(hours=24)))
    assert world.cluster.made == 0


async def test_an_approval_that_fails_leaves_nothing(world: World) -> None:
    """The request is of no use to anyone."""
    async with world.running() as issuer:
        world.cluster.undecidable = "the API server answers 403"
        with pytest.raises(CertmountError, match="403"):
            await issuer.issue(order(NAME))
    assert (world.cluster.made, world.cluster.objects) == (1, {})


async def test_someone_who_deletes_a_request_is_noticed_at_once(world: World) -> None:
    """The node tries again, and gets another one."""
    async with world.running() as issuer:
        issuing = asyncio.create_task(issuer.issue(order(NAME)))
        world.cluster.remove((await world.asked()).name)
        with pytest.raises(CertmountError, match="someone has deleted"):
            await issuing


async def test_our_own_signer_has_the_internal_roots(world: World) -> None:
    """As they are now; without them nothing is asked for."""
    async with world.running(own=True) as issuer:
        with pytest.raises(CertmountError, match="roots of its signer are not known yet"):
            await issuer.issue(order(NAME))
        world.internal = tuple(pki.der(ROOT.certificate))
        assert (await world.issue(issuer, order(NAME), answer(NAME))).roots == issuer.roots == world.internal


@pytest.mark.parametrize(
    "forbidden,text",
    [
        (
            {("create", "certificatesigningrequests"), ("delete", "certificatesigningrequests")},
            "may not create, delete",
        ),
        ({("update", "certificatesigningrequests/approval")}, "may not approve requests"),
        ({("approve", SIGNER), ("approve", "example.com/*")}, "may not approve requests"),
    ],
)
async def test_missing_permissions_are_named(forbidden: set[tuple[str, str]], text: str, world: World) -> None:
    """With where the role is; a role for all signers of a domain is as good."""
    world.cluster.forbidden = forbidden
    async with world.running() as issuer:
        bad = [one for one in await issuer.check() if not one.ok]
        assert issuer.problem is not None
    assert text in bad[0].text
    assert "docs/kubernetes-csr.md" in bad[0].text
    assert world.cluster.made == 0
    world.cluster.forbidden = {("approve", SIGNER)}
    async with world.running() as issuer:
        assert issuer.problem is None


@pytest.mark.parametrize("content", [b"", b"hello", encode_certificates([ROOT.certificate] * 11)])
async def test_roots_that_are_none_are_told(content: bytes, world: World) -> None:
    """Nothing is signed that nobody could verify."""
    world.roots.write_bytes(content)
    async with world.running() as issuer:
        assert issuer.problem is not None
        with pytest.raises(CertmountError, match="roots") as failure:
            await issuer.issue(order(NAME))
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE


async def test_an_api_server_that_is_away_is_a_problem_not_a_defect(world: World) -> None:
    """And known roots stay known."""
    async with world.running() as issuer:
        world.cluster.broken = "the API server cannot be reached"
        await issuer.check()
        assert issuer.problem == "cluster: the API server cannot be reached"
        assert issuer.roots
        with pytest.raises(CertmountError, match="cannot be reached"):
            await issuer.issue(order(NAME))


def parsed(**entry: object) -> KubernetesCSRConfiguration:
    content = yaml.safe_dump({"issuers": [{"name": "corporate", "kubernetes_csr": entry}]})
    (declared,) = read_issuers(content.encode())
    assert isinstance(declared.configuration, KubernetesCSRConfiguration)
    return declared.configuration


def test_the_file_says_it_in_few_words() -> None:
    """Roots by reference, lives as people write them."""
    found = parsed(signer=SIGNER, approve=True, roots={"file": "/roots.pem"}, min_duration="1h", max_duration="24h")
    expected = KubernetesCSRConfiguration(SIGNER, True, FileSource("/roots.pem"), pki.HOUR, timedelta(hours=24))
    assert found == expected
    assert parsed(signer="certmount.dev/pod") == KubernetesCSRConfiguration("certmount.dev/pod")


@pytest.mark.parametrize(
    "entry,texts",
    [
        ({}, ["signer: is missing"]),
        ({"signer": SIGNER}, ["roots: is missing"]),
        ({"signer": "kubernetes.io/kubelet-serving"}, ["is a signer of Kubernetes itself"]),
        ({"signer": "x", "approve": "yes", "roots": None}, ["is not the name of a signer", "approve", "roots"]),
        ({"signer": "certmount.dev/pod", "min_duration": "5m"}, ["is shorter than 10m"]),
        (
            {"signer": "certmount.dev/pod", "min_duration": "2h", "max_duration": "1h"},
            ["is shorter than min_duration, 2h"],
        ),
        ({"signer": "certmount.dev/pod", "aprove": True}, ["did you mean approve?"]),
    ],
)
def test_all_that_is_wrong_in_the_file_is_said(entry: dict[str, object], texts: Sequence[str]) -> None:
    """With its place."""
    with pytest.raises(CertmountError) as failure:
        parsed(**entry)
    assert failure.value.reason is Reason.INVALID_ISSUERS
    for text in texts:
        assert text in str(failure.value).replace(" (line 3)", "").replace(" (line 2)", "")


def test_outside_a_cluster_there_is_no_such_issuer(world: World) -> None:
    """It is said when the file is read."""
    (declared,) = read_issuers(b"issuers: [{name: own, kubernetes_csr: {signer: certmount.dev/pod}}]")
    with pytest.raises(CertmountError, match="there is no cluster"):
        make_issuer(declared, IssuerDependencies(CredentialReader()))
    made = make_issuer(declared, IssuerDependencies(CredentialReader(), csrs=Access(world.cluster)))
    assert isinstance(made, KubernetesCSR)
    assert made.roots == ()
