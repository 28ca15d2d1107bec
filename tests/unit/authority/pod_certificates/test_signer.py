"""The signer of PodCertificateRequests: what is retried, what is final, and that tenants take turns."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import CertificateSigningRequestBuilder, Name, load_pem_x509_certificates
from prometheus_client import CollectorRegistry

from csi_driver.authority import signing_queue
from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.csr_api import WatchTask
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.authority.pod_certificates.api import PodCertificateApi, PodSigner, RequestClient, parse_pod_signer
from csi_driver.authority.pod_certificates.namespaces import NamespaceRoots
from csi_driver.authority.pod_certificates.pipeline import PodCertificatePipeline
from csi_driver.authority.pod_certificates.publisher import BundlePublisher
from csi_driver.authority.pod_certificates.signer import PodCertificateSigner
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.cluster.pod_certificates import (
    PodCertificateDecision,
    PodCertificateRequest,
    PublishedBundle,
)
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Policy
from csi_driver.core.policy.rules import DenyListEntry, PolicyRule, RuleLimits, RuleMatch
from csi_driver.kube.leader_election import LeaderElection
from csi_driver.kube.pod_certificates.request_cache import RequestCache
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import in_background, until
from tests.unit.authority.csr_signer.fakes import KEY, FakeLease, FakePods, LoadedCA
from tests.unit.authority.csr_signer.test_signer import OneService, RecordedEvents
from tests.unit.core import pki

KEYRING = make_keyring(pki.NOW)
SIGNER, EXTERNAL = "certmount.dev/pod", "certmount.dev/corporate"
EDGE = LivePod("pod-uid", "edge", "node-a", terminating=False)
DAY = timedelta(days=1)


def request(name: str = "one", namespace: str = "web", **changes: object) -> PodCertificateRequest:
    pod = ("edge-0", "pod-uid", "edge", "node-a")
    made = PodCertificateRequest(
        namespace, name, f"uid-{name}", "1", SIGNER, *pod, DAY, build_csr(KEY, Names()), b"", {}
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@dataclass
class FakeRequests:
    """Requests at an API server in memory."""

    served: bool = True
    sinks: dict[str, RequestCache] = field(default_factory=dict)
    waiting: list[PodCertificateRequest] = field(default_factory=list)
    decisions: dict[str, list[PodCertificateDecision]] = field(default_factory=dict)
    failures: int = 0  # of the next writes

    async def find_version(self) -> str:
        return "v1" if self.served else ""

    def watch(self, signer: str, sink: RequestCache) -> WatchTask:
        self.sinks[signer] = sink
        for one in self.waiting:
            if one.signer == signer:
                sink.put(one)

        class Endless:
            async def run(self) -> None:
                await asyncio.Event().wait()

        return Endless()

    async def finish(self, request: PodCertificateRequest, decision: PodCertificateDecision) -> bool:
        if self.failures:
            self.failures -= 1
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server cannot be reached")
        self.decisions.setdefault(request.key, []).append(decision)
        self.sinks[request.signer].put(replace(request, finished=True))
        return True


@dataclass
class NoBundles:
    """An API server without ClusterTrustBundles."""

    async def version(self) -> str:
        return ""

    async def list(self, version: str) -> Sequence[PublishedBundle]:
        raise NotImplementedError

    async def find(self, version: str, root_set: str) -> PublishedBundle | None:
        raise NotImplementedError

    async def write(self, version: str, bundle: PublishedBundle) -> None:
        raise NotImplementedError

    async def delete(self, version: str, root_set: str) -> None:
        raise NotImplementedError


class NoConfigMaps:
    """No namespace has the label."""

    async def write(self, namespace: str, data: Mapping[str, str | None]) -> None:
        raise NotImplementedError


class External(Issuer):
    """Signs with the internal CA, as an external issuer that sees the names of the CSR."""

    roots, environment = (), "https://ca.test"

    def __init__(self, signs: Issuer, *, needs_names: bool) -> None:
        self._signs, self.needs_names_in_csr = signs, needs_names
        self.seen: list[Names] = []

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        self.seen.append(request.csr.names)
        return await self._signs.issue(request)


@dataclass
class World:
    """A running signer and its cluster."""

    requests: FakeRequests = field(default_factory=FakeRequests)
    pods: FakePods = field(default_factory=lambda: FakePods({("web", "edge-0"): EDGE}))
    ca: LoadedCA = field(default_factory=lambda: LoadedCA(KEYRING))
    policy: Policy = field(default_factory=lambda: Policy("cluster.local", "cluster.local"))
    events: RecordedEvents = field(default_factory=RecordedEvents)
    results: list[Reason | None] = field(default_factory=list)
    issuers: Mapping[str, Issuer] = field(default_factory=dict)

    @property
    def internal(self) -> InternalIssuer:
        return InternalIssuer(cast("CertificateAuthority", self.ca), lambda: pki.NOW)

    @contextlib.asynccontextmanager
    async def running(self, requests: RequestClient | None = None) -> AsyncIterator[None]:
        metrics = AuthorityMetrics(CollectorRegistry())
        steps = IssuanceSteps(OneService(), lambda: self.policy, metrics)
        issuers, signers = {"internal": self.internal, **self.issuers}, {SIGNER: "internal", EXTERNAL: "corporate"}
        lease = FakeLease()
        api = PodCertificateApi(
            requests or self.requests, lambda _: NoBundles(), self.pods.find, NoConfigMaps(), list, lease, "one"
        )
        signer = PodCertificateSigner(
            api,
            PodCertificatePipeline(self.pods.find, steps, issuers, signers, lambda: 0.5),
            BundlePublisher(NoBundles(), TrustBundles(metrics), issuers.__contains__),
            NamespaceRoots(NoConfigMaps(), TrustBundles(metrics), list, issuers.__contains__),
            LeaderElection(lease, "one"),
            self.events,
            lambda _seconds, reason: self.results.append(reason),
        )
        async with in_background(signer.run()):
            yield

    async def decide(self, one: PodCertificateRequest) -> PodCertificateDecision:
        self.requests.waiting.append(one)
        async with self.running():
            await until(lambda: one.key in self.requests.decisions, "a decision")
            await until(lambda: self.results, "its result")
        (decision,) = self.requests.decisions[one.key]
        return decision


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(signing_queue, "_RETRY", Backoff(0.01, 0.01))
    return World()


async def test_times_of_the_status_are_those_of_the_leaf(world: World) -> None:
    decision = await world.decide(
        request(annotations={"certmount.dev/duration": "10h", "certmount.dev/renew-before": "2h"})
    )
    leaf, _ = load_pem_x509_certificates(decision.chain.encode())
    assert decision.kind == "Issued"
    assert (decision.not_before, decision.not_after) == (
        leaf.not_valid_before_utc.timestamp(),
        leaf.not_valid_after_utc.timestamp(),
    )
    assert decision.begin_refresh_at == decision.not_after - 7200
    assert decision.message == (f"hello.web.svc, hello.web.svc.cluster.local, {pki.SPIFFE} for 10h, by built-in")


@pytest.mark.parametrize("renew_before, expected", [("9h59m", 600), ("1m", 36_060 - 600)])
async def test_refresh_is_within_the_limits_of_the_api(world: World, renew_before: str, expected: int) -> None:
    annotations = {"certmount.dev/duration": "10h", "certmount.dev/renew-before": renew_before}
    decision = await world.decide(request(annotations=annotations))
    assert decision.begin_refresh_at - decision.not_before == expected


async def test_request_stays_pending_while_it_may_pass_later(world: World) -> None:
    world.ca.unavailable = True
    world.requests.waiting.append(request())
    async with world.running():
        await until(lambda: len(world.results) > 2, "retries")
        assert (world.requests.decisions, set(world.results)) == ({}, {Reason.ISSUER_UNAVAILABLE})
        world.ca.unavailable = False
        await until(lambda: world.requests.decisions, "a decision")
    assert set(world.events.recorded) == {("pod web/edge-0", "IssuerUnavailable")}
    assert [one.kind for one in world.requests.decisions["web/one"]] == ["Issued"]


async def test_failed_write_is_repeated(world: World) -> None:
    world.requests.failures = 2
    assert (await world.decide(request())).kind == "Issued"


async def test_unknown_issuer_is_pending_because_an_administrator_can_add_it(world: World) -> None:
    world.requests.waiting.append(request(signer=EXTERNAL))
    async with world.running():
        await until(lambda: len(world.results) > 1, "a retry")
    assert world.requests.decisions == {}


def allow_corporate(world: World) -> None:
    limits = RuleLimits(issuers=("corporate", "internal"))
    rule = PolicyRule(RuleMatch(("web",), ("*",)), limits=limits, label="policy[0]")
    world.policy = Policy("cluster.local", "cluster.local", (rule,))


async def test_issuer_that_does_not_answer_delays_no_other_one(world: World) -> None:
    class Silent(External):
        async def issue(self, request: IssuerRequest) -> IssuedCertificate:
            self.seen.append(request.csr.names)
            await asyncio.Event().wait()
            raise AssertionError

    issuer = Silent(world.internal, needs_names=False)
    world.issuers = {"corporate": issuer}
    allow_corporate(world)
    world.requests.waiting += [request(f"silent-{number}", signer=EXTERNAL) for number in range(20)]
    async with world.running():
        await until(lambda: len(issuer.seen) == signing_queue.WORKERS // 2, "as many requests as a namespace may have")
        one = request("quick")
        world.requests.sinks[SIGNER].put(one)
        await until(lambda: one.key in world.requests.decisions, "a decision")


async def test_external_issuer_sees_the_granted_names_in_the_csr(world: World) -> None:
    issuer = External(world.internal, needs_names=False)
    world.issuers = {"corporate": issuer}
    allow_corporate(world)
    decision = await world.decide(request(signer=EXTERNAL))
    assert decision.kind == "Issued"
    assert issuer.seen == [pki.names(pki.SPIFFE)]


async def test_policy_decides_about_the_issuer_of_the_signer(world: World) -> None:
    world.issuers = {"corporate": External(world.internal, needs_names=False)}
    decision = await world.decide(request(signer=EXTERNAL))
    assert decision.reason == "NameNotAllowed"
    assert decision.message.startswith("signerName: corporate ")


async def test_issuer_that_needs_names_in_the_csr_is_denied(world: World) -> None:
    world.issuers = {"corporate": External(world.internal, needs_names=True)}
    decision = await world.decide(request(signer=EXTERNAL))
    assert (decision.kind, decision.reason) == ("Denied", "IssuerNotFound")
    assert decision.message == (
        "signerName: the issuer corporate signs only what a CSR contains, and the kubelet's CSR contains no names; use a CSI "
        "volume for this issuer"
    )


async def test_unsupported_key_is_denied_with_a_suggestion(world: World) -> None:
    key = ec.generate_private_key(ec.SECP224R1())
    csr = CertificateSigningRequestBuilder().subject_name(Name([])).sign(key, SHA256()).public_bytes(Encoding.DER)
    decision = await world.decide(request(csr=csr))
    assert (decision.kind, decision.reason) == ("Denied", "UnsupportedKeyType")
    assert decision.message.startswith("keyType: the signer does not support this type; use one of ECDSAP256, ")


async def test_csr_with_names_is_denied(world: World) -> None:
    """The names come from the annotations only: a step-ca would sign those of the CSR."""
    decision = await world.decide(request(csr=build_csr(KEY, pki.names("a.example.com"))))
    assert (decision.kind, decision.reason) == ("Denied", "InvalidCSR")
    assert decision.message.startswith("stubPKCS10Request: contains more than a key; ")


@pytest.mark.parametrize(
    "public_key, reason, message",
    [
        (
            ec.generate_private_key(ec.SECP224R1())
            .public_key()
            .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "UnsupportedKeyType",
            "keyType: the signer does not support this type; use one of ECDSAP256, ",
        ),
        (b"no key", "InvalidCSR", "pkixPublicKey: is not a public key in DER"),
    ],
    ids=["P-224", "no key"],
)
async def test_key_without_a_csr_that_cannot_be_signed_is_denied(
    world: World, public_key: bytes, reason: str, message: str
) -> None:
    decision = await world.decide(request(csr=b"", public_key=public_key))
    assert (decision.kind, decision.reason) == ("Denied", reason)
    assert decision.message.startswith(message)


async def test_account_on_the_deny_list_is_denied(world: World) -> None:
    denial = DenyListEntry(RuleMatch(("web",), ("*",)), "its key was in a bug report")
    world.policy = Policy("cluster.local", "cluster.local", denials=(denial,))
    decision = await world.decide(request())
    assert (decision.reason, denial.reason in decision.message) == ("ServiceAccountDenied", True)
    assert world.events.recorded == [("pod web/edge-0", "ServiceAccountDenied")]


@pytest.mark.parametrize("pod", [None, replace(EDGE, terminating=True)])
async def test_request_of_a_pod_that_does_not_run_is_dropped(world: World, pod: LivePod | None) -> None:
    world.pods.pods = {("web", "edge-0"): pod} if pod else {}
    world.requests.waiting.append(request())
    async with world.running():
        await until(lambda: world.results, "its result")
    assert (world.requests.decisions, world.results) == ({}, [Reason.POD_NOT_FOUND])


async def test_10000_requests_of_one_namespace_do_not_delay_others(world: World) -> None:
    world.pods.pods["bank", "edge-0"] = EDGE
    world.requests.waiting += [request(f"flood-{number}") for number in range(10_000)]
    world.requests.waiting.append(request("quiet", "bank"))
    async with world.running():
        await until(lambda: "bank/quiet" in world.requests.decisions, "the quiet tenant's decision")
    assert list(world.requests.decisions).index("bank/quiet") <= signing_queue.WORKERS


async def test_deleted_requests_that_wait_for_a_retry_take_no_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant can create and delete requests as fast as the API server allows."""
    monkeypatch.setattr(signing_queue, "_RETRY", Backoff(60, 60))
    world.ca.unavailable = True

    class Annotations(dict[str, str]):
        """A mapping that can have weak references."""

    annotations = Annotations()
    known, large = weakref.ref(annotations), request(annotations=annotations)
    del annotations
    world.requests.waiting.append(large)
    async with world.running():
        await until(lambda: world.results, "a failure")
        world.requests.sinks[SIGNER].remove(large)
        world.requests.waiting.clear()
        del large
        # A worker has another request now.
        world.requests.sinks[SIGNER].put(request("other"))
        await until(lambda: len(world.results) > 1, "another failure")
        gc.collect()
        assert known() is None


async def test_cluster_without_the_api_gets_no_requests(world: World) -> None:
    world.requests.served = False
    async with world.running():
        await asyncio.sleep(0.1)
    assert world.requests.sinks == {}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("certmount.dev/pod", PodSigner("certmount.dev/pod", "internal")),
        ("example.com/pods=corporate", PodSigner("example.com/pods", "corporate")),
    ],
)
def test_option_names_the_signer_and_its_issuer(text: str, expected: PodSigner) -> None:
    assert parse_pod_signer(text) == expected


@pytest.mark.parametrize("text", ["pod", "kubernetes.io/kube-apiserver-client-pod", "certmount.dev/pod=", "a.b/c=A"])
def test_invalid_option_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is "):
        parse_pod_signer(text)
