"""TokenReviews, their cache and shares, and failures of the API server; node tokens must be of the driver, pod tokens of its node."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority import retry
from csi_driver.authority.authn import token_review_cache
from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_review_cache import POD_TOKEN, OfflineReviewer, TokenReviewCache
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
POD_REVIEWED = POD.reviewed
Answer = ReviewedToken | CertmountError
Call = asyncio.Task[PodIdentity]
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

    def __init__(self, keys: TokenKeys, metrics: AuthorityMetrics, issuer: TokenIssuer) -> None:
        self.clock, self.wall_clock = Clock(1000.0), Clock(time.time())
        self.issuer, self.reviewer = issuer, Reviewer()
        self.cache = TokenReviewCache(TokenVerifier(keys, self.wall_clock), self.reviewer, metrics, self.clock)

    async def review(self, token: Secret[str] | None = None) -> PodIdentity:
        return await self.cache.review(token or self.issuer.pod_token(POD), POD_TOKEN, lambda _: None)

    async def reject(self, words: str, token: Secret[str] | None = None) -> None:
        with pytest.raises(CertmountError, match=words):
            await self.review(token)

    def start(self, token: Secret[str] | None = None, *, count: int = 1, pod: Pod = POD) -> list[Call]:
        tokens = [token or self.issuer.pod_token(pod, jti=str(number)) for number in range(count)]
        return [asyncio.create_task(self.review(each)) for each in tokens]


@pytest.fixture
async def world(keys: TokenKeys, metrics: AuthorityMetrics, issuer: TokenIssuer) -> World:
    return World(keys, metrics, issuer)


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.0)


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "CLUSTER_RETRY_S", 0.2)
    monkeypatch.setattr(retry, "CLUSTER_BACKOFF", Backoff(0.0025, 0.04, jitter=0.5))


async def block(tasks: list[Call]) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReviewedToken)])
@pytest.mark.parametrize("value", ["other", ""])
async def test_claims_must_agree_with_the_review(field: str, value: str, world: World) -> None:
    """The name can belong to another pod, node or account by now. A missing field does not agree, either."""
    world.reviewer.answer = replace(POD.reviewed, **{field: value})
    await world.reject(r"^TokenRejected: pod token: .* name different values")


async def test_forged_token_is_not_sent_to_the_api_server(world: World) -> None:
    await world.reject("^TokenRejected: ", world.issuer.rotated(world.issuer.key_id).pod_token(POD))
    assert world.reviewer.calls == 0


async def test_review_is_cached_for_five_seconds(world: World) -> None:
    token = world.issuer.pod_token(POD)
    for _ in range(3):
        assert (await world.review(token)).pod_name == POD.name
    assert world.reviewer.calls == 1
    world.clock.forward(5.1)
    await world.review(token)
    assert world.reviewer.calls == 2


async def test_cached_review_does_not_outlive_the_token(world: World) -> None:
    token = world.issuer.pod_token(POD, exp=int(world.wall_clock.now) + 2)
    await world.review(token)
    world.wall_clock.forward(3)
    await world.review(token)  # PyJWT's own clock has not moved, so this shows only that the cache is not used
    assert world.reviewer.calls == 2


@pytest.mark.parametrize("step_s", [-86400.0, -3600.0, 3600.0])
async def test_steps_of_the_clock_do_not_extend_a_review(step_s: float, world: World) -> None:
    """A deleted pod's review counts for five seconds, whatever the wall clock does."""
    token = world.issuer.pod_token(POD, exp=int(world.wall_clock.now) + 7200)
    await world.review(token)
    world.wall_clock.forward(step_s)
    world.clock.forward(4.9)
    with contextlib.suppress(CertmountError):  # after a step back, the token is not valid yet
        await world.review(token)
    assert world.reviewer.calls == 1
    world.clock.forward(0.2)
    world.wall_clock.now = time.time()
    world.reviewer.answer = REJECTED
    await world.reject("its pod was deleted", token)


async def test_rejection_is_cached(world: World) -> None:
    world.reviewer.answer = REJECTED
    token = world.issuer.pod_token(POD)
    for _ in range(3):
        await world.reject("pod token: its pod was deleted", token)
    assert world.reviewer.calls == 1


@pytest.mark.usefixtures("no_retries")
async def test_unavailable_review_is_not_cached(world: World, registry: CollectorRegistry) -> None:
    world.reviewer.answer = UNAVAILABLE
    token = world.issuer.pod_token(POD)
    for _ in range(2):
        with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: ") as failure:
            await world.review(token)
        assert failure.value.retryable
    assert world.reviewer.calls == 2
    assert registry.get_sample_value("certmount_token_verification_failures_total", {"source": "review"}) == 2
    world.reviewer.answer = POD.reviewed
    await world.review(token)


@pytest.mark.usefixtures("fast_retries")
async def test_calls_wait_for_an_api_server_that_restarts(world: World) -> None:
    world.reviewer.answer = UNAVAILABLE
    tasks = world.start(count=5)
    await until(lambda: world.reviewer.calls >= 10, "retries of all calls")
    assert not any(task.done() for task in tasks)
    world.reviewer.answer = POD.reviewed
    assert {identity.pod_name for identity in await asyncio.gather(*tasks)} == {POD.name}


@pytest.mark.usefixtures("fast_retries")
async def test_retries_end_and_are_few(world: World) -> None:
    world.reviewer.answer = UNAVAILABLE
    await world.reject(r"^TokenReviewUnavailable: pod token: TokenReview: the API server cannot")
    assert 3 <= world.reviewer.calls <= 15


@pytest.mark.usefixtures("fast_retries")
async def test_rejection_after_an_outage_is_final(world: World) -> None:
    world.reviewer.answer = UNAVAILABLE
    (task,) = world.start()
    await until(lambda: world.reviewer.calls >= 2, "a retry")
    world.reviewer.answer = REJECTED
    with pytest.raises(CertmountError, match="its pod was deleted"):
        await task


@pytest.mark.usefixtures("no_retries")
async def test_failing_time_starts_with_a_failure_and_ends_with_an_answer(world: World) -> None:
    assert world.cache.failing_s == 0
    world.reviewer.answer = UNAVAILABLE
    for seconds in (0, 10, 20):
        await world.reject("^TokenReviewUnavailable: ")
        assert world.cache.failing_s == seconds
        world.clock.forward(10)
    world.clock.forward(19)
    assert world.cache.failing_s == 49
    world.clock.forward(1)
    assert world.cache.failing_s == 0  # the last failure is too long ago
    await world.reject("^TokenReviewUnavailable: ")
    assert world.cache.failing_s == 50
    world.reviewer.answer = REJECTED
    await world.reject("its pod was deleted")
    assert world.cache.failing_s == 0


@pytest.mark.usefixtures("no_retries")
@pytest.mark.parametrize("answer", [POD_REVIEWED, UNAVAILABLE, REJECTED], ids=["valid", "unavailable", "rejected"])
async def test_concurrent_calls_share_one_review(answer: Answer, world: World) -> None:
    world.reviewer.answer = answer
    world.reviewer.gate.clear()
    tasks = world.start(world.issuer.pod_token(POD), count=70)
    await block(tasks)
    world.reviewer.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert world.reviewer.calls == 1
    assert {type(one) for one in results} == {PodIdentity if answer is POD_REVIEWED else CertmountError}


async def test_cancelled_call_does_not_fail_the_calls_that_share_its_review(world: World) -> None:
    world.reviewer.gate.clear()
    token = world.issuer.pod_token(POD)
    (first,) = world.start(token)
    await block([first])
    others = world.start(token, count=5)
    await block(others)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    world.reviewer.gate.set()
    assert {identity.pod_name for identity in await asyncio.gather(*others)} == {POD.name}
    assert world.reviewer.calls == 2


async def test_different_tokens_are_reviewed_concurrently(world: World) -> None:
    world.reviewer.gate.clear()
    await block(world.start(count=10))
    assert world.reviewer.calls == 10


async def test_cache_contains_no_token_and_drops_expired_results(world: World) -> None:
    token = world.issuer.pod_token(POD)
    await asyncio.gather(world.review(token), *world.start(count=30))
    assert [len(key) for key in world.cache._cached] == [32] * 31
    assert token.reveal() not in repr(world.cache._cached)
    world.clock.forward(6)
    await world.review(token)
    assert len(world.cache._cached) == world.cache._cache_shares.total == 1


VICTIM = replace(POD, name="bank-0", namespace="bank", service_account="bank", uid="b", service_account_uid="bb")


async def test_pod_cannot_evict_the_cached_reviews_of_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its share, only its own results are not cached."""
    monkeypatch.setattr(token_review_cache, "MAX_CACHED_REVIEWS", 40)
    world.cache.__post_init__()
    victim = world.issuer.pod_token(VICTIM)
    world.reviewer.answer = VICTIM.reviewed
    await world.review(victim)
    world.reviewer.answer = POD.reviewed
    await asyncio.gather(*world.start(count=100))
    assert len(world.cache._cached) == 1 + 9
    before = world.reviewer.calls
    await world.review(victim)
    assert world.reviewer.calls == before


async def test_pod_cannot_use_up_the_reviews_of_others(world: World) -> None:
    world.reviewer.gate.clear()
    tasks = world.start(count=token_review_cache.MAX_REVIEWS)
    await until(lambda: any(task.done() for task in tasks), "a refusal")
    for _ in range(5):
        await asyncio.sleep(0)
    (failure,) = {str(task.exception()) for task in tasks if task.done()}
    assert failure == (
        "ShareExceeded: service account default/hello: holds 64 of 256 TokenReviews in progress and requests 1 more, which "
        "exceeds its share; wait until some of them end"
    )
    assert world.reviewer.calls == token_review_cache.MAX_REVIEWS // 4
    (victim,) = world.start(pod=VICTIM)
    await block([victim])
    world.reviewer.gate.set()
    await asyncio.gather(*tasks, victim, return_exceptions=True)
    assert world.cache._review_shares.total == 0


async def test_nothing_is_reviewed_if_the_check_fails(world: World) -> None:
    def check(pod: PodIdentity) -> None:
        raise CertmountError(Reason.TOKEN_REJECTED, f"not {pod}")

    token = world.issuer.pod_token(POD)
    for reviews in (0, 1):  # the second time, the cache has the result of another caller
        with pytest.raises(CertmountError, match=r"^TokenRejected: not pod default/hello"):
            await world.cache.review(token, POD_TOKEN, check)
        assert world.reviewer.calls == reviews
        await world.review(token)


POD = Pod()
OTHER_UID = "66666666-6666-4666-8666-666666666666"


class CountingReviewer(OfflineReviewer):
    """Accepts and counts all tokens."""

    calls = 0

    async def review(self, token: Secret[str], audience: str) -> None:
        del token, audience
        self.calls += 1


@pytest.fixture
def counting_reviewer() -> CountingReviewer:
    return CountingReviewer()


@pytest.fixture
def authenticator(keys: TokenKeys, metrics: AuthorityMetrics, counting_reviewer: CountingReviewer) -> Authenticator:
    reviews = TokenReviewCache(TokenVerifier(keys), counting_reviewer, metrics)
    return Authenticator(reviews, ServiceAccount("certmount", "certmount-node"))


async def test_driver_on_the_pods_node_is_authenticated(authenticator: Authenticator, issuer: TokenIssuer) -> None:
    node = await authenticator.authenticate_node(issuer.node_token())
    assert (await authenticator.authenticate_pod(issuer.pod_token(POD), node)).pod_name == POD.name


@pytest.mark.parametrize("account", ["certmount/default", "kube-system/certmount-node", "default/hello"])
async def test_only_node_drivers_can_call(
    account: str, authenticator: Authenticator, issuer: TokenIssuer, counting_reviewer: CountingReviewer
) -> None:
    """Any pod can get a token with the authority's audience, so the audience alone proves nothing. It causes no review."""
    namespace, name = account.split("/")
    token = issuer.node_token(replace(DRIVER, namespace=namespace, service_account=name))
    with pytest.raises(CertmountError, match=r"^TokenRejected: node token: .* expected certmount/certmount-node"):
        await authenticator.authenticate_node(token)
    assert counting_reviewer.calls == 0


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
    pod: Pod, words: str, authenticator: Authenticator, issuer: TokenIssuer, counting_reviewer: CountingReviewer
) -> None:
    """Name and UID of the node must match: a new node with the name of an old one does not get its pods."""
    node = await authenticator.authenticate_node(issuer.node_token())
    with pytest.raises(CertmountError, match=rf"^TokenRejected: .*{words}"):
        await authenticator.authenticate_pod(issuer.pod_token(pod), node)
    assert counting_reviewer.calls == 1  # of the node's token
