"""The CSR signer: all checks of a request, and requests that other approvers change at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import structlog
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.csr_signer.csr_pipeline import ACCOUNT_RATE, CSRPipeline
from csi_driver.authority.csr_signer.signer import CSRSigner
from csi_driver.authority.issuance.steps import IssuanceSteps
from csi_driver.authority.issuers.internal.issuer import InternalIssuer
from csi_driver.authority.signing_queue import WORKERS, SigningQueue
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.cluster.csr import APPROVED, CERTMOUNT_SIGNER, DENIED, FAILED, ClusterCSR, CSRCondition
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.identity import PodIdentity, SecretIdentity
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Policy, PolicySubject
from csi_driver.core.policy.rules import DenyListEntry, RuleMatch
from csi_driver.kube.leader_election import LeaderElection
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import in_background, until
from tests.unit.authority.csr_signer.fakes import (
    EXTRA,
    NAME,
    USERNAME,
    FakeLease,
    FakePods,
    LoadedCA,
    crafted,
    item,
    pem,
)
from tests.unit.authority.issuers.kubernetes_csr.cluster import ACCOUNT as AUTHORITY
from tests.unit.authority.issuers.kubernetes_csr.cluster import FakeRequests
from tests.unit.core import pki

KEYRING = make_keyring(pki.NOW)
EDGE = LivePod("pod-uid", "edge", "node-a", terminating=False)
OTHER_ID = "spiffe://cluster.local/ns/web/sa/other"
TWO_IDS = f"spec.request, uri-sans: {OTHER_ID} cannot be used with the pod's SPIFFE ID"
TOO_LONG = "spec.expirationSeconds: 25h is longer than the 24h that the built-in rule allows"
APPROVED_BY_HAND = [{"type": APPROVED, "reason": "KubectlApprove", "message": ""}]


class OneService:
    """Subjects of pods that one Service selects."""

    async def find(self, pod: PodIdentity, _names: Names, /) -> PolicySubject:
        return PolicySubject(pod, services=("hello",))

    async def find_secret(self, secret: SecretIdentity) -> PolicySubject:
        return PolicySubject(secret)


@dataclass
class RecordedEvents:
    """Events on pods."""

    recorded: list[tuple[str, str]] = field(default_factory=list)

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        assert (warning, bool(message)) == (True, True)
        self.recorded.append((str(pod), reason))


@dataclass
class World:
    """A running signer and its cluster."""

    cluster: FakeRequests = field(default_factory=FakeRequests)
    pods: FakePods = field(default_factory=lambda: FakePods({("web", "edge-0"): EDGE}))
    ca: LoadedCA = field(default_factory=lambda: LoadedCA(KEYRING))
    policy: Policy = field(default_factory=lambda: Policy("cluster.local", "cluster.local"))
    events: RecordedEvents = field(default_factory=RecordedEvents)
    results: list[Reason | None] = field(default_factory=list)

    def add_result(self, seconds: float, reason: Reason | None) -> None:
        assert seconds > 0
        self.results.append(reason)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        internal = InternalIssuer(cast("CertificateAuthority", self.ca), lambda: pki.NOW)
        steps = IssuanceSteps(OneService(), lambda: self.policy, AuthorityMetrics(CollectorRegistry()))
        pipeline = CSRPipeline(self.pods.find, steps, internal)
        election = LeaderElection(FakeLease(), "one")
        signer = CSRSigner(self.cluster, pipeline, election, self.events, self.add_result)
        async with in_background(signer.run()):
            yield

    async def decide(self, *requests: dict[str, Any]) -> list[ClusterCSR]:
        async with self.running():
            names = [self.cluster.put(request) for request in requests]
            await until(lambda: all(self.cluster.find(name).finished for name in names), "decisions", 60)
            await asyncio.sleep(0)
        return [self.cluster.find(name) for name in names]

    async def process(self, request: dict[str, Any]) -> ClusterCSR:
        (csr,) = await self.decide(request)
        return csr

    async def process_denied(self, request: dict[str, Any]) -> CSRCondition:
        csr = await self.process(request)
        denied = csr.condition(DENIED)
        assert denied is not None
        assert not csr.certificate
        return denied


@pytest.fixture
def world() -> World:
    return World()


async def test_request_of_a_pod_is_approved_and_signed(world: World) -> None:
    with structlog.testing.capture_logs() as logs:
        csr = await world.process(item())
    assert str(csr.condition(APPROVED)) == f"PolicyAllows: {NAME}, {pki.SPIFFE} for 1h, by built-in"
    leaf, intermediate = decode_certificates(csr.certificate)
    assert names_of(leaf.extensions) == pki.names(NAME, pki.SPIFFE)
    assert leaf.not_valid_after_utc == pki.NOW + pki.HOUR
    leaf.verify_directly_issued_by(intermediate)
    (line,) = [log for log in logs if log["event"] == "certificate"]
    expected = {"decision": "issued", "pod": "edge-0", "node": "node-a", "csr": csr.name}
    assert line.items() >= {**expected, "serial": f"{leaf.serial_number:x}"}.items()
    assert world.cluster.answers == 1, "the watch also delivers the approval, which must not cause another certificate"
    assert (world.events.recorded, world.results) == ([], [None])


async def test_request_without_names_and_lifetime_gets_the_defaults(world: World) -> None:
    leaf, _ = decode_certificates((await world.process(item(pem(), seconds=None, usages=["server auth"]))).certificate)
    assert names_of(leaf.extensions) == pki.names(NAME, f"{NAME}.cluster.local", pki.SPIFFE)
    assert leaf.not_valid_after_utc == pki.NOW + 24 * pki.HOUR
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize(
    "request_item,reason,words,pod",
    [
        (item(crafted(x509.OCSPNoCheck())), Reason.INVALID_CSR, "", "web/edge-0"),
        (item(extra={**EXTRA, "pod-uid": ["before"]}), Reason.TOKEN_REJECTED, "", "web/edge-0"),
        (item(username="system:serviceaccount:shop:edge"), Reason.TOKEN_REJECTED, "", "shop/edge-0"),
        (item(username="jane@example.com"), Reason.TOKEN_REJECTED, "", None),
        (item(pem("shop.example.com")), Reason.NAME_NOT_ALLOWED, "shop.example.com", "web/edge-0"),
        (item(pem(OTHER_ID)), Reason.NAME_NOT_ALLOWED, OTHER_ID, "web/edge-0"),
        (item(pem(pki.SPIFFE, OTHER_ID)), Reason.NAME_NOT_ALLOWED, TWO_IDS, "web/edge-0"),
        (item(seconds=90_000), Reason.NAME_NOT_ALLOWED, TOO_LONG, "web/edge-0"),
    ],
)
async def test_rejected_request_is_denied_with_an_event_on_its_pod(
    request_item: dict[str, Any], reason: Reason, words: str, pod: str | None, world: World
) -> None:
    denied = await world.process_denied(request_item)
    assert (denied.reason, bool(denied.message), words in denied.message) == (reason.word, True, True)
    assert world.events.recorded == ([(f"pod {pod}", reason.word)] if pod else [])
    assert world.results == [reason]


async def test_request_of_an_account_on_the_deny_list_is_denied(world: World) -> None:
    denial = DenyListEntry(RuleMatch(("web",), ("*",)), "its key was in a bug report")
    world.policy = Policy("cluster.local", "cluster.local", denials=(denial,))
    denied = await world.process_denied(item())
    assert (denied.reason, denial.reason in denied.message) == ("ServiceAccountDenied", True)


async def test_requests_for_other_signers_are_ignored(world: World) -> None:
    other = world.cluster.put(item(signer="example.com/other"))
    await world.process(item())
    assert (world.cluster.find(other).conditions, world.cluster.find(other).certificate) == ((), b"")


async def test_requests_of_one_account_are_rate_limited(world: World) -> None:
    world.pods.pods["web", "other-0"] = LivePod("other-uid", "other", "node-a", terminating=False)
    extra = {**EXTRA, "pod-name": ["other-0"], "pod-uid": ["other-uid"]}
    other = item(username="system:serviceaccount:web:other", extra=extra)
    *names, last = await world.decide(*(item() for _ in range(ACCOUNT_RATE.burst + 30)), other)
    denied = [one for csr in names if (one := csr.condition(DENIED))]
    assert (len(denied) >= 10, {one.reason for one in denied}) == (True, {"TooManyRequests"})
    assert last.certificate


async def test_manual_approval_does_not_override_the_policy(world: World) -> None:
    approved = {"status": {"conditions": APPROVED_BY_HAND}}
    bad, good = await world.decide({**item(pem("shop.example.com")), **approved}, {**item(), **approved})
    assert str(bad.condition(FAILED)).startswith("NameNotAllowed: ")
    assert good.certificate


async def test_manual_denial_is_kept(world: World) -> None:
    denied = [{"type": DENIED, "reason": "ByHand", "message": ""}]

    class Late(FakePods):
        async def find(self, namespace: str, name: str) -> LivePod | None:
            world.cluster.change("csr-1", conditions=denied)
            return await super().find(namespace, name)

    world.pods = Late(world.pods.pods)
    csr = await world.process(item())
    await asyncio.sleep(0)
    assert csr.condition(DENIED) is not None
    assert world.cluster.answers == 0


async def test_request_that_is_approved_during_its_denial_fails(world: World) -> None:
    """An approved request cannot be denied."""
    decide = world.cluster.decide

    async def late(csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        world.cluster.objects[csr.name]["status"] = {"conditions": APPROVED_BY_HAND}  # before the watch delivers it
        return await decide(csr, condition)

    world.cluster.decide = late  # type: ignore[method-assign]  # another approver is faster
    csr = await world.process(item(pem("shop.example.com")))
    assert [one.kind for one in csr.conditions] == [APPROVED, FAILED]


async def test_approval_that_the_watch_delivers_late_does_not_sign_again(world: World) -> None:
    csr = await world.process(item())
    async with world.running():
        stale = {**world.cluster.objects[csr.name], "status": {"conditions": [{"type": APPROVED}]}}
        name = world.cluster.put(item())
        await until(lambda: world.cluster.find(name).finished, "a decision")
        current, world.cluster.objects[name] = world.cluster.objects[name], {**world.cluster.objects[name], **stale}
        world.cluster.objects[name]["metadata"] = current["metadata"]
        for watch in world.cluster.sinks:
            watch.notify(name)
        another = world.cluster.put(item())
        await until(lambda: world.cluster.find(another).finished, "the next one's decision")
    assert world.cluster.answers == 3
    assert world.results == [None] * 3


async def test_approval_that_the_watch_delivers_during_signing_does_not_sign_again(world: World) -> None:
    set_certificate = world.cluster.set_certificate

    async def set_certificate_unnoticed(csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        watches, world.cluster.sinks = world.cluster.sinks, []
        try:
            return await set_certificate(csr, certificate)
        finally:
            world.cluster.sinks = watches

    world.cluster.set_certificate = set_certificate_unnoticed  # type: ignore[method-assign]  # the watch lags
    async with world.running():
        for number in range(1, 4):
            world.cluster.put(item())
            await until(lambda number=number: len(world.results) >= number, "its result")  # type: ignore[misc]
    assert world.cluster.answers == 3
    assert world.results == [None] * 3


async def test_retryable_failure_is_retried(world: World) -> None:
    world.ca.unavailable = True
    async with world.running():
        name = world.cluster.put(item())
        with structlog.testing.capture_logs() as logs:
            await until(lambda: logs, "an attempt")
        assert not world.cluster.find(name).conditions
        world.ca.unavailable = False
        await until(lambda: world.cluster.find(name).finished, "the retry")
    assert world.cluster.find(name).certificate


async def test_requests_of_the_authority_need_no_pod(world: World) -> None:
    csr = await world.process(item(pem("shop.example.com"), username=AUTHORITY, extra={}))
    leaf, _ = decode_certificates(csr.certificate)
    assert names_of(leaf.extensions) == pki.names("shop.example.com")


@pytest.mark.parametrize("request_pem", [pem(), crafted(x509.BasicConstraints(ca=True, path_length=None))])
async def test_requests_of_the_authority_must_have_valid_content(request_pem: bytes, world: World) -> None:
    assert (await world.process(item(request_pem, username=AUTHORITY, extra={}))).condition(DENIED)


@pytest.mark.parametrize(
    "username", ["system:serviceaccount:certmount:default", "certmount-authority", f"{AUTHORITY}:x", "", USERNAME]
)
async def test_requests_of_others_are_not_taken_for_the_authoritys(username: str, world: World) -> None:
    labels = {"app.kubernetes.io/managed-by": "certmount", "certmount.dev/issuer": "own"}
    denied = await world.process_denied(item(pem("shop.example.com"), username=username, labels=labels))
    assert denied.reason in ("NameNotAllowed", "TokenRejected")


def test_namespaces_take_turns() -> None:
    queue: SigningQueue[ClusterCSR] = SigningQueue(lambda _: None)
    for number in range(100):
        queue.add(_request(f"flood-{number}", "flood"))
    for name in ("one", "two"):
        queue.add(_request(name, "bank"))
    assert [queue.start_next() for _ in range(5)] == ["flood-0", "one", "flood-1", "two", "flood-2"]


def test_a_tenant_whose_requests_do_not_end_leaves_workers_to_others() -> None:
    queue: SigningQueue[ClusterCSR] = SigningQueue(lambda _: None)
    for number in range(100):
        queue.add(_request(f"flood-{number}", "flood"))
    started = [queue.start_next() for _ in range(WORKERS)]
    assert [key is None for key in started] == [False] * (WORKERS // 2) + [True] * (WORKERS // 2)
    queue.add(_request("one", "bank"))
    assert queue.start_next() == "one"


async def test_changes_of_a_request_that_waits_do_not_add_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A requester can change the labels of its request at any time."""
    monkeypatch.setattr("csi_driver.authority.signing_queue._RETRY", Backoff(0.2, 0.2))
    request, attempts = _request("one", "shop"), 0
    queue: SigningQueue[ClusterCSR] = SigningQueue(lambda _: request)

    async def fail(_request: ClusterCSR, _is_retry: bool) -> bool:
        nonlocal attempts
        attempts += 1
        return False

    async with in_background(queue.run_workers(fail)):
        for _ in range(50):
            queue.add(request)
            await asyncio.sleep(0.003)
        attempts = 0
        await asyncio.sleep(1)
    assert attempts <= 6


def _request(name: str, namespace: str) -> ClusterCSR:
    return ClusterCSR(name, name, 0.0, CERTMOUNT_SIGNER, b"", (), None, f"system:serviceaccount:{namespace}:{name}")
