"""Authentication of node drivers and pods: TokenReviews, their cache, and failures of the API server."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from csi_driver import POD_AUDIENCE
from csi_driver.authority import retry
from csi_driver.authority.authn.authenticator import Authenticator, OfflineReviewer, TokenReviewCache
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.objects import ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.support.waiting import until
from tests.unit.authority.clock import Clock

POD = Pod()
OTHER_UID = "66666666-6666-4666-8666-666666666666"
POD_REVIEWED = POD.reviewed
Answer = ReviewedToken | CertmountError
UNAVAILABLE = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview: the API server cannot be reached")
REJECTED = CertmountError(Reason.TOKEN_REJECTED, "its pod was deleted")


class Reviewer:
    """Returns ``answer`` once ``gate`` is set."""

    def __init__(self) -> None:
        self.answer: Answer = POD.reviewed
        self.calls, self.gate = 0, asyncio.Event()
        self.gate.set()

    async def review(self, _token: Secret[str], _audience: str) -> ReviewedToken:
        self.calls += 1
        await self.gate.wait()
        if isinstance(self.answer, CertmountError):
            raise self.answer
        return self.answer


class World:
    """A cache with a reviewer and a clock."""

    def __init__(self, keys: TokenKeys, metrics: AuthorityMetrics, issuer: TokenIssuer, reviewer: Reviewer) -> None:
        self.clock = Clock(time.time())
        self.issuer = issuer
        self.cache = TokenReviewCache(TokenVerifier(keys), reviewer, metrics, self.clock)

    async def review(self, token: Secret[str] | None = None) -> PodIdentity:
        return await self.cache.review(token or self.issuer.pod_token(POD), POD_AUDIENCE, "pod token")

    def start(self, token: Secret[str] | None = None, *, count: int = 1) -> list[asyncio.Task[PodIdentity]]:
        tokens = [token or self.issuer.pod_token(POD, jti=str(number)) for number in range(count)]
        return [asyncio.create_task(self.review(each)) for each in tokens]


@pytest.fixture
def reviewer() -> Reviewer:
    return Reviewer()


@pytest.fixture
def world(keys: TokenKeys, metrics: AuthorityMetrics, issuer: TokenIssuer, reviewer: Reviewer) -> World:
    return World(keys, metrics, issuer, reviewer)


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.0)


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.2)
    monkeypatch.setattr(retry, "CLUSTER_BACKOFF", Backoff(0.0025, 0.04, jitter=0.5))


async def block(tasks: list[asyncio.Task[PodIdentity]]) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReviewedToken)])
@pytest.mark.parametrize("value", ["other", ""])
async def test_claims_must_agree_with_the_review(field: str, value: str, world: World, reviewer: Reviewer) -> None:
    """The name can belong to another pod, node or account by now. A missing field does not agree, either."""
    reviewer.answer = replace(POD.reviewed, **{field: value})
    with pytest.raises(CertmountError, match=r"^TokenRejected: pod token: .* name different values"):
        await world.review()


async def test_forged_token_is_not_sent_to_the_api_server(world: World, reviewer: Reviewer) -> None:
    with pytest.raises(CertmountError):
        await world.review(world.issuer.rotated(world.issuer.key_id).pod_token(POD))
    assert reviewer.calls == 0


async def test_review_is_cached_for_five_seconds(world: World, reviewer: Reviewer) -> None:
    token = world.issuer.pod_token(POD)
    for _ in range(3):
        assert (await world.review(token)).pod_name == POD.name
    assert reviewer.calls == 1
    world.clock.forward(5.1)
    await world.review(token)
    assert reviewer.calls == 2


async def test_cached_review_does_not_outlive_the_token(world: World, reviewer: Reviewer) -> None:
    token = world.issuer.pod_token(POD, exp=int(world.clock.now) + 2)
    await world.review(token)
    world.clock.forward(3)
    await world.review(token)  # the verifier's own clock has not moved, so this shows only that the cache is not used
    assert reviewer.calls == 2


async def test_rejection_is_cached(world: World, reviewer: Reviewer) -> None:
    reviewer.answer = REJECTED
    token = world.issuer.pod_token(POD)
    for _ in range(3):
        with pytest.raises(CertmountError, match="pod token: its pod was deleted"):
            await world.review(token)
    assert reviewer.calls == 1


@pytest.mark.usefixtures("no_retries")
async def test_unavailable_review_is_not_cached(world: World, reviewer: Reviewer, registry: CollectorRegistry) -> None:
    reviewer.answer = UNAVAILABLE
    token = world.issuer.pod_token(POD)
    for _ in range(2):
        with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: ") as failure:
            await world.review(token)
        assert failure.value.retryable
    assert reviewer.calls == 2
    assert registry.get_sample_value("certmount_token_verification_failures_total", {"source": "review"}) == 2
    reviewer.answer = POD.reviewed
    await world.review(token)


@pytest.mark.usefixtures("fast_retries")
async def test_calls_wait_for_an_api_server_that_restarts(world: World, reviewer: Reviewer) -> None:
    reviewer.answer = UNAVAILABLE
    tasks = world.start(count=5)
    await until(lambda: reviewer.calls >= 10, "retries of all calls")
    assert not any(task.done() for task in tasks)
    reviewer.answer = POD.reviewed
    assert {identity.pod_name for identity in await asyncio.gather(*tasks)} == {POD.name}


@pytest.mark.usefixtures("fast_retries")
async def test_retries_end_and_are_few(world: World, reviewer: Reviewer) -> None:
    reviewer.answer = UNAVAILABLE
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: pod token: TokenReview: the API server cannot"):
        await world.review()
    assert 3 <= reviewer.calls <= 15


@pytest.mark.usefixtures("fast_retries")
async def test_rejection_after_an_outage_is_final(world: World, reviewer: Reviewer) -> None:
    reviewer.answer = UNAVAILABLE
    (task,) = world.start()
    await until(lambda: reviewer.calls >= 2, "a retry")
    reviewer.answer = REJECTED
    with pytest.raises(CertmountError, match="its pod was deleted"):
        await task


@pytest.mark.usefixtures("no_retries")
async def test_failing_since_starts_with_a_failure_and_ends_with_an_answer(world: World, reviewer: Reviewer) -> None:

    async def fail() -> float | None:
        with pytest.raises(CertmountError):
            await world.review()
        return world.cache.failing_since

    assert world.cache.failing_since is None
    reviewer.answer = UNAVAILABLE
    started = world.clock.now
    for _ in range(3):
        assert await fail() == started
        world.clock.forward(10)
    world.clock.forward(30)
    assert world.cache.failing_since is None
    assert await fail() == started
    reviewer.answer = REJECTED
    assert await fail() is None


@pytest.mark.usefixtures("no_retries")
@pytest.mark.parametrize("answer", [POD_REVIEWED, UNAVAILABLE, REJECTED], ids=["valid", "unavailable", "rejected"])
async def test_concurrent_calls_share_one_review(answer: Answer, world: World, reviewer: Reviewer) -> None:
    reviewer.answer = answer
    reviewer.gate.clear()
    tasks = world.start(world.issuer.pod_token(POD), count=70)
    await block(tasks)
    reviewer.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert reviewer.calls == 1
    assert {type(one) for one in results} == {PodIdentity if answer is POD_REVIEWED else CertmountError}


async def test_cancelled_call_does_not_fail_the_calls_that_share_its_review(world: World, reviewer: Reviewer) -> None:
    reviewer.gate.clear()
    token = world.issuer.pod_token(POD)
    (first,) = world.start(token)
    await block([first])
    others = world.start(token, count=5)
    await block(others)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    reviewer.gate.set()
    assert {identity.pod_name for identity in await asyncio.gather(*others)} == {POD.name}
    assert reviewer.calls == 2


async def test_different_tokens_are_reviewed_concurrently(world: World, reviewer: Reviewer) -> None:
    reviewer.gate.clear()
    await block(world.start(count=10))
    assert reviewer.calls == 10


async def test_cache_is_bounded_and_contains_no_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_driver.authority.authn.authenticator._MAX_CACHED", 10)
    await asyncio.gather(*world.start(count=30))
    token = world.issuer.pod_token(POD)
    await world.review(token)
    assert [len(key) for key in world.cache._cached] == [32] * 10
    assert token.reveal() not in repr(world.cache._cached)
    world.clock.forward(6)
    await world.review(token)
    assert len(world.cache._cached) == 1


@pytest.fixture
def authenticator(keys: TokenKeys, metrics: AuthorityMetrics) -> Authenticator:
    reviews = TokenReviewCache(TokenVerifier(keys), OfflineReviewer(), metrics)
    return Authenticator(reviews, ServiceAccount("certmount", "certmount-node"))


async def test_driver_on_the_pods_node_is_authenticated(authenticator: Authenticator, issuer: TokenIssuer) -> None:
    node = await authenticator.authenticate_node(issuer.node_token())
    assert (await authenticator.authenticate_pod(issuer.pod_token(POD), node)).pod_name == POD.name


@pytest.mark.parametrize("account", ["certmount/default", "kube-system/certmount-node", "default/hello"])
async def test_only_node_drivers_can_call(account: str, authenticator: Authenticator, issuer: TokenIssuer) -> None:
    """Any pod can get a token with the authority's audience, so the audience alone proves nothing."""
    namespace, name = account.split("/")
    token = issuer.node_token(replace(DRIVER, namespace=namespace, service_account=name))
    with pytest.raises(CertmountError, match=r"^TokenRejected: node token: .* expected certmount/certmount-node"):
        await authenticator.authenticate_node(token)


async def test_pod_token_is_not_accepted_as_node_token(authenticator: Authenticator, issuer: TokenIssuer) -> None:
    with pytest.raises(CertmountError, match="node token: has another audience; expected certmount-node"):
        await authenticator.authenticate_node(issuer.pod_token(DRIVER))


@pytest.mark.parametrize(
    "pod,words",
    [
        (replace(POD, node="node-b"), "a pod on node node-b, but the driver on node node-a sent it"),
        (replace(POD, node_uid=OTHER_UID), "the node was deleted and created again"),
        (replace(POD, node="node-b", node_uid=OTHER_UID), "on node node-b"),
    ],
    ids=["name", "UID", "both"],
)
async def test_stolen_token_is_rejected(
    pod: Pod, words: str, authenticator: Authenticator, issuer: TokenIssuer
) -> None:
    """Name and UID of the node must match: a new node with the name of an old one does not get its pods."""
    node = await authenticator.authenticate_node(issuer.node_token())
    with pytest.raises(CertmountError, match=rf"^TokenRejected: .*{words}"):
        await authenticator.authenticate_pod(issuer.pod_token(pod), node)
