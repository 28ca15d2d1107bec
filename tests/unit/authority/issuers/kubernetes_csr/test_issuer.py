"""A signer of the cluster as an issuer: requests, responses, and cleanup."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader, CSRAccess, IssuerDependencies
from csi_driver.authority.issuers.kinds import make_issuer, read_issuers
from csi_driver.authority.issuers.kubernetes_csr import issuer as issuer_module
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.kubernetes_csr.issuer import (
    ISSUER_LABEL,
    REQUEST_LABEL,
    KubernetesCSRIssuer,
    request_id,
)
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.cluster.csr import APPROVED, DENIED, FAILED, ClusterCSR
from csi_driver.core.config.issuers import FileSource
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount
from csi_driver.core.policy.engine import Grant
from csi_driver.core.spec import KeyType, Usage
from tests.support.waiting import in_background, until
from tests.unit.authority.issuers.kubernetes_csr.cluster import ACCOUNT, FakeRequests
from tests.unit.core import pki

SIGNER, OWN = "example.com/pods", "certmount.dev/pod"
NAME = "a.web.svc"
ROOT = pki.authority("root")
OTHER = pki.authority("other")
BOTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
POD = PodIdentity(ServiceAccount("web", "edge"), "sa", "edge-0", "pod-uid", "node-a", "node-uid", 0.0)
KEY = pki.key_of(KeyType.EC_P256, 7)
CSRS = "certificatesigningrequests"
NOT_DIAGNOSED = "diagnostics have not finished yet"


def request(
    *names: str, key: PrivateKey = KEY, lifetime: timedelta = pki.HOUR, pod: PodIdentity = POD
) -> IssuerRequest:
    requested = pki.names(*names)
    granted = requested if pki.SPIFFE in names else pki.names(*names, pki.SPIFFE)
    grant = Grant(granted, lifetime, (Usage.SERVER, Usage.CLIENT), ("built-in",))
    return IssuerRequest(parse_csr(build_csr(key, requested)), grant, pod)


def signed(*names: str, key: PrivateKey = KEY, by: pki.Signer = ROOT, hours: float = 1, since: float = -1) -> bytes:
    validity = pki.Validity(timedelta(hours=since), timedelta(hours=hours))
    leaf = pki.leaf(by, key, pki.names(*names), validity=validity, extensions=[BOTH], critical=False)
    return encode_certificates([leaf, by.certificate])


@dataclass
class World:
    """A running issuer and its cluster."""

    roots: Path
    cluster: FakeRequests = field(default_factory=FakeRequests)
    now: datetime = pki.NOW
    internal: tuple[bytes, ...] = ()

    @contextlib.asynccontextmanager
    async def running(
        self, *, approve: bool = True, wait_s: float = 5.0, own: bool = False, maximum: timedelta | None = None
    ) -> AsyncIterator[KubernetesCSRIssuer]:
        roots = None if own else FileSource(str(self.roots))
        configuration = KubernetesCSRConfiguration(SIGNER, approve, roots, max_duration=maximum)
        access = CSRAccess(self.cluster, lambda: self.internal)
        credentials, now = CredentialReader(), lambda: self.now
        issuer = KubernetesCSRIssuer("corporate", configuration, credentials, access, clock=now, wait_s=wait_s)
        async with in_background(issuer.run()):
            await until(lambda: issuer.problem != NOT_DIAGNOSED, "the first diagnosis")
            yield issuer

    async def approved(self) -> ClusterCSR:
        await until(lambda: any(self.cluster.find(name).conditions for name in self.cluster.objects), "the request")
        (name,) = self.cluster.objects
        return self.cluster.find(name)

    async def issue(self, issuer: KubernetesCSRIssuer, to_sign: IssuerRequest, pem: bytes) -> IssuedCertificate:
        issuing = asyncio.create_task(issuer.issue(to_sign))
        self.cluster.sign((await self.approved()).name, pem)
        return await issuing


@pytest.fixture
def world(tmp_path: Path) -> World:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(encode_certificates([ROOT.certificate]))
    return World(roots)


async def test_request_is_created_approved_signed_and_deleted(world: World) -> None:
    async with world.running() as issuer:
        issuing = asyncio.create_task(issuer.issue(request(NAME)))
        csr = await world.approved()
        assert (csr.signer, csr.expiration_s) == (SIGNER, 3600)
        assert csr.usages == ("digital signature", "server auth", "client auth")
        assert parse_csr(x509.load_pem_x509_csr(csr.request).public_bytes(Encoding.DER)).names == pki.names(NAME)
        (draft,) = world.cluster.drafts
        assert draft.annotations == {"certmount.dev/requester": "pod web/edge-0", "certmount.dev/names": NAME}
        assert draft.labels[ISSUER_LABEL] == "corporate"
        assert "allowed for pod web/edge-0 by built-in" in str(csr.condition(APPROVED))
        world.cluster.sign(csr.name, signed(NAME))
        issued = await issuing
    assert issued.chain[1:] == tuple(pki.der(ROOT.certificate))
    assert issued.roots == issuer.roots == tuple(pki.der(ROOT.certificate))
    assert world.cluster.objects == {}


async def test_certificate_for_a_secret_names_it(world: World) -> None:
    wanted = request(NAME)
    grant = replace(wanted.grant, names=wanted.csr.names)  # without a SPIFFE ID
    async with world.running() as issuer:
        secret = replace(wanted, grant=grant, identity=SecretIdentity("web", "edge-tls"))
        assert (await world.issue(issuer, secret, signed(NAME))).chain
    (draft,) = world.cluster.drafts
    assert draft.annotations == {"certmount.dev/requester": "secret web/edge-tls", "certmount.dev/names": NAME}
    assert draft.labels["certmount.dev/namespace"] == "web"
    other = replace(secret, identity=SecretIdentity("web", "other-tls"))
    assert request_id(other) != request_id(secret)


async def test_identity_is_included_if_the_volume_requests_it(world: World) -> None:
    """An RSA key also requests key encipherment: TLS 1.2 without forward secrecy needs it, and signers verify it."""
    key, names = pki.key_of(KeyType.RSA_2048), (NAME, pki.SPIFFE)
    async with world.running() as issuer:
        await world.issue(issuer, request(*names, key=key), signed(*names, key=key))
    assert "key encipherment" in world.cluster.drafts[0].usages


SKEW = f"^ClockSkew: the clocks of the authority and {SIGNER} differ by about"
UNACCEPTABLE = {
    "another name": (signed(NAME, "b.web.svc"), Reason.INVALID_RESPONSE, "also contains b.web.svc"),
    "missing name": (signed("b.web.svc"), Reason.INVALID_RESPONSE, f"lacks {NAME}"),
    "another key": (signed(NAME, key=generate_key(KeyType.EC_P256)), Reason.INVALID_RESPONSE, "is for another key"),
    "longer lifetime": (signed(NAME, hours=30), Reason.INVALID_RESPONSE, "longer than the policy grants"),
    "not valid yet": (signed(NAME, since=0.025), Reason.CLOCK_SKEW, f"{SKEW} 90 s or more"),
    "expired": (
        signed(NAME, since=-9, hours=-2),
        Reason.CLOCK_SKEW,
        f"{SKEW} 2 h or more; synchronize them .the certificate expired at",
    ),
    "another root": (signed(NAME, by=OTHER), Reason.ISSUER_UNAVAILABLE, "does not end at a configured root"),
    "no certificate": (b"hello", Reason.ISSUER_UNAVAILABLE, "the signer's response is not a certificate chain"),
    "long chain": (signed(NAME) * 11, Reason.ISSUER_UNAVAILABLE, "is longer than a chain of 10 certificates"),
}


@pytest.mark.parametrize("what", UNACCEPTABLE)
async def test_certificate_that_differs_from_the_request_is_rejected(what: str, world: World) -> None:
    pem, reason, text = UNACCEPTABLE[what]
    async with world.running() as issuer:
        with pytest.raises(CertmountError, match=text) as failure:
            await world.issue(issuer, request(NAME), pem)
    assert failure.value.reason is reason
    assert world.cluster.objects == {}


@pytest.mark.parametrize(
    "conditions,verb",
    [
        ([{"type": DENIED, "reason": "Unwanted", "message": "not on Sundays"}], "denied"),
        ([{"type": APPROVED}, {"type": FAILED, "reason": "Unwanted", "message": "not on Sundays"}], "failed to sign"),
    ],
)
async def test_denial_is_reported_and_the_request_deleted(conditions: list[object], verb: str, world: World) -> None:
    async with world.running(approve=False) as issuer:
        issuing = asyncio.create_task(issuer.issue(request(NAME)))
        await until(lambda: world.cluster.objects, "the request")
        world.cluster.change(next(iter(world.cluster.objects)), conditions=conditions)
        with pytest.raises(CertmountError, match=f"{verb} the request: Unwanted: not on Sundays") as failure:
            await issuing
    assert failure.value.reason is Reason.NAME_NOT_ALLOWED
    assert world.cluster.objects == {}


async def test_pending_request_is_continued_by_another_call_and_replica(world: World) -> None:
    async with world.running(approve=False, wait_s=0.02) as issuer:
        with pytest.raises(CertmountError, match="kubectl certificate approve certmount-corporate-1") as failure:
            await issuer.issue(request(NAME))
        assert failure.value.reason is Reason.ISSUANCE_PENDING
        (name,) = world.cluster.objects
        world.cluster.change(name, conditions=[{"type": APPROVED}])
        with pytest.raises(CertmountError, match=r"is approved and waits for example\.com/pods to sign it"):
            await issuer.issue(request(NAME))
        assert world.cluster.made == 1
    world.cluster.sign(name, signed(NAME))
    async with world.running(approve=False) as another:
        assert (await another.issue(request(NAME))).chain
    assert (world.cluster.made, world.cluster.objects) == (1, {})


def test_request_id_depends_on_pod_key_names_and_lifetime() -> None:
    """A pod never gets a certificate that was signed for another request."""
    requests = [
        request(NAME), request(NAME, pki.SPIFFE), request(NAME, key=pki.key_of(KeyType.EC_P256, 8)),
        request(NAME, lifetime=2 * pki.HOUR), request(NAME, pod=replace(POD, pod_name="edge-1", pod_uid="other-uid")),
    ]  # fmt: skip
    assert len({request_id(one) for one in requests}) == len(requests)
    assert request_id(request(NAME)) == request_id(request(NAME)), "the signature of the CSR does not matter"


async def test_requests_of_other_users_are_ignored_despite_their_labels(world: World) -> None:
    labels = {ISSUER_LABEL: "corporate", REQUEST_LABEL: request_id(request(NAME))}
    spec = {"signerName": SIGNER, "username": "system:serviceaccount:web:hostile"}
    created = (pki.NOW - timedelta(days=1)).isoformat()
    world.cluster.put({"metadata": {"name": "forged", "labels": labels, "creationTimestamp": created}, "spec": spec})
    world.cluster.sign("forged", signed(NAME, by=OTHER))
    async with world.running() as issuer:
        issuing = asyncio.create_task(issuer.issue(request(NAME)))
        await until(lambda: len(world.cluster.objects) == 2, "the authority's own request")
        (own,) = (name for name in world.cluster.objects if name != "forged")
        world.cluster.sign(own, signed(NAME))
        await issuing
    assert list(world.cluster.objects) == ["forged"]


@pytest.mark.parametrize(
    "conditions,certificate,minutes,kept",
    [
        ([], "", 14, True),
        ([], "", 16, False),
        ([{"type": APPROVED}], "", 16, False),
        ([{"type": APPROVED}], "YQ==", 9, True),
        ([{"type": APPROVED}], "YQ==", 11, False),
        ([{"type": DENIED}], "", 11, False),
    ],
)
async def test_requests_of_stopped_replicas_are_deleted_after_a_while(
    conditions: list[object], certificate: str, minutes: int, kept: bool, world: World
) -> None:
    labels = {ISSUER_LABEL: "corporate", REQUEST_LABEL: "x"}
    created = (pki.NOW - timedelta(minutes=minutes)).isoformat()
    metadata = {"labels": labels, "creationTimestamp": created}
    name = world.cluster.put({"metadata": metadata, "spec": {"username": ACCOUNT}})
    world.cluster.change(name, conditions=conditions, certificate=certificate)
    async with world.running() as issuer:
        await until(lambda: issuer.problem is None, "the diagnosis")
        await asyncio.sleep(0.05)
    assert bool(world.cluster.objects) is kept


async def test_unsupported_request_is_rejected_before_anything_is_created(world: World) -> None:
    async with world.running(maximum=2 * pki.HOUR) as issuer:
        with pytest.raises(CertmountError, match="5m is shorter than this issuer's minimum of 10m") as failure:
            await issuer.issue(request(lifetime=timedelta(minutes=5)))
        assert (failure.value.reason, len(failure.value.faults)) == (Reason.NAME_NOT_ALLOWED, 2)
        assert f"set the names, for example uri-sans: {pki.SPIFFE}" in str(failure.value)
        with pytest.raises(CertmountError, match="24h is longer than this issuer's maximum of 2h"):
            await issuer.issue(request(NAME, lifetime=timedelta(hours=24)))
    assert world.cluster.made == 0


async def test_request_is_deleted_if_approval_fails(world: World) -> None:
    async with world.running() as issuer:
        world.cluster.undecidable = "the API server returned 403"
        with pytest.raises(CertmountError, match="403"):
            await issuer.issue(request(NAME))
    assert (world.cluster.made, world.cluster.objects) == (1, {})


async def test_deletion_by_another_client_is_reported_immediately(world: World) -> None:
    async with world.running() as issuer:
        issuing = asyncio.create_task(issuer.issue(request(NAME)))
        world.cluster.remove((await world.approved()).name)
        with pytest.raises(CertmountError, match="another client deleted"):
            await issuing


async def test_certmounts_own_signer_uses_the_roots_of_the_internal_ca(world: World) -> None:
    async with world.running(own=True) as issuer:
        with pytest.raises(CertmountError, match="the signer's roots are not known yet"):
            await issuer.issue(request(NAME))
        world.internal = tuple(pki.der(ROOT.certificate))
        assert (await world.issue(issuer, request(NAME), signed(NAME))).roots == issuer.roots == world.internal


@pytest.mark.parametrize(
    "forbidden,text",
    [
        ({("create", CSRS), ("delete", CSRS)}, "not permitted to create, delete"),
        ({("update", f"{CSRS}/approval")}, "not permitted to approve requests"),
        ({("approve", SIGNER), ("approve", "example.com/*")}, "not permitted to approve requests"),
    ],
)
async def test_missing_permissions_are_reported(forbidden: set[tuple[str, str]], text: str, world: World) -> None:
    """A role for all signers of a domain is sufficient."""
    world.cluster.forbidden = forbidden
    async with world.running() as issuer:
        failed = [finding for finding in await issuer.diagnose() if not finding.ok]
        assert issuer.problem is not None
    assert text in failed[0].text
    assert "docs/kubernetes-csr.md" in failed[0].text
    assert world.cluster.made == 0
    world.cluster.forbidden = {("approve", SIGNER)}
    async with world.running() as issuer:
        assert issuer.problem is None


@pytest.mark.parametrize("content", [b"", b"hello", encode_certificates([ROOT.certificate] * 11)])
async def test_invalid_roots_are_reported_and_nothing_is_signed(content: bytes, world: World) -> None:
    world.roots.write_bytes(content)
    async with world.running() as issuer:
        assert issuer.problem is not None
        with pytest.raises(CertmountError, match="roots") as failure:
            await issuer.issue(request(NAME))
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE


async def test_unavailable_api_server_is_a_problem_and_roots_stay(world: World) -> None:
    async with world.running() as issuer:
        world.cluster.broken = "the API server cannot be reached"
        await issuer.diagnose()
        assert issuer.problem == "cluster: the API server cannot be reached"
        assert issuer.roots
        with pytest.raises(CertmountError, match="cannot be reached"):
            await issuer.issue(request(NAME))


def parse(**entry: object) -> KubernetesCSRConfiguration:
    content = yaml.safe_dump({"issuers": [{"name": "corporate", "kubernetes_csr": entry}]})
    (declared,) = read_issuers(content.encode())
    assert isinstance(declared.configuration, KubernetesCSRConfiguration)
    return declared.configuration


def test_configuration_is_parsed() -> None:
    found = parse(signer=SIGNER, approve=True, roots={"file": "/roots.pem"}, min_duration="1h", max_duration="24h")
    expected = KubernetesCSRConfiguration(SIGNER, True, FileSource("/roots.pem"), pki.HOUR, timedelta(hours=24))
    assert found == expected
    assert parse(signer=OWN) == KubernetesCSRConfiguration(OWN)


@pytest.mark.parametrize(
    "entry,texts",
    [
        ({}, ["signer: is missing"]),
        ({"signer": SIGNER}, ["roots: is missing"]),
        ({"signer": "kubernetes.io/kubelet-serving"}, ["is a signer of Kubernetes itself"]),
        ({"signer": "x", "approve": "yes", "roots": None}, ["is not a signer name", "approve", "roots"]),
        ({"signer": OWN, "min_duration": "5m"}, ["is shorter than 10m"]),
        ({"signer": OWN, "min_duration": "2h", "max_duration": "1h"}, ["shorter than min_duration, 2h"]),
        ({"signer": OWN, "aprove": True}, ["did you mean approve?"]),
    ],
)
def test_all_faults_of_the_configuration_are_reported(entry: dict[str, object], texts: Sequence[str]) -> None:
    with pytest.raises(CertmountError) as failure:
        parse(**entry)
    assert failure.value.reason is Reason.INVALID_ISSUERS
    for text in texts:
        assert text in str(failure.value).replace(" (line 3)", "").replace(" (line 2)", "")


def test_issuer_needs_a_cluster(world: World) -> None:
    (declared,) = read_issuers(b"issuers: [{name: own, kubernetes_csr: {signer: certmount.dev/pod}}]")
    with pytest.raises(CertmountError, match="needs a cluster for its signer"):
        make_issuer(declared, IssuerDependencies(CredentialReader()))
    made = make_issuer(declared, IssuerDependencies(CredentialReader(), csrs=CSRAccess(world.cluster)))
    assert isinstance(made, KubernetesCSRIssuer)
    assert made.roots == ()


async def test_requests_of_one_account_use_up_only_its_own_share(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that other replicas created, and those of concurrent calls."""
    monkeypatch.setattr(issuer_module, "MAX_REQUESTS", 12)
    other = PodIdentity(ServiceAccount("bank", "app"), "", "app-0", "u", "node-1", "u", 0.0)
    async with world.running(wait_s=0.05) as issuer, world.running(wait_s=0.05) as replica:
        calls = [(issuer, replica)[number % 2].issue(request(f"n{number}.web.svc")) for number in range(12)]
        failures = [str(one) for one in await asyncio.gather(*calls, return_exceptions=True)]
        refused = [one for one in failures if "ShareExceeded" in one]
        assert len(refused) == 4  # each replica knows its own concurrent calls
        with pytest.raises(CertmountError) as failure:
            await issuer.issue(request("more.web.svc"))
        held = len(world.cluster.objects)
        problem = f"holds {held} of 12 CertificateSigningRequests of issuer corporate and requests 1 more"
        assert f"ShareExceeded: namespace web: {problem}, which exceeds its share" in str(failure.value)
        with pytest.raises(CertmountError, match="IssuancePending"):
            await issuer.issue(replace(request("b.web.svc"), identity=other))
