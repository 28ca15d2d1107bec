"""Live reviews: what they must agree on, how long they count, and what happens when they can't be had."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest
from prometheus_client import CollectorRegistry

from csi_driver import POD_AUDIENCE
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_reviews import OfflineReviewer, TokenReviewCache, TokenReviewer
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.cluster.token_review import ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import Pod, TokenIssuer
from tests.support.waiting import until
from tests.unit.authority.clock import Clock

POD = Pod()
DOWN = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview: the API server cannot be reached")


class Reviewer:
    """Answers as told; ``gate`` holds every answer back until it is set."""

    def __init__(self, answer: ReviewedToken | CertmountError = POD.reviewed) -> None:
        self.answer = answer
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def review(self, _token: Secret[str], _audience: str) -> ReviewedToken:
        self.asked += 1
        await self.gate.wait()
        if isinstance(self.answer, CertmountError):
            raise self.answer
        return self.answer


class World:
    """Proofs with a reviewer and a clock that tests turn."""

    def __init__(self, keys: TokenKeys, metrics: AuthorityMetrics, reviewer: TokenReviewer) -> None:
        self.clock = Clock(time.time())
        self.proofs = TokenReviewCache(TokenVerifier(keys), reviewer, metrics, self.clock)

    async def prove(self, token: Secret[str]) -> PodIdentity:
        return await self.proofs.prove(token, POD_AUDIENCE, "pod token")


@pytest.fixture
def reviewer() -> Reviewer:
    return Reviewer()


@pytest.fixture
def world(keys: TokenKeys, metrics: AuthorityMetrics, reviewer: Reviewer) -> World:
    return World(keys, metrics, reviewer)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try, and no waiting for a better time."""
    monkeypatch.setattr("csi_driver.authority.authn.token_reviews._PATIENCE_S", 0.0)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits as it does, but a hundred times as fast."""
    for name, seconds in {"_PATIENCE_S": 0.2, "_FIRST_PAUSE_S": 0.0025, "_PAUSE_CAP_S": 0.04}.items():
        monkeypatch.setattr(f"csi_driver.authority.authn.token_reviews.{name}", seconds)


async def waiting(*tasks: asyncio.Task[PodIdentity]) -> None:
    """Lets tasks run until each waits for something outside."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_a_live_token_is_proven_by_claims_and_cluster(
    world: World, reviewer: Reviewer, issuer: TokenIssuer
) -> None:
    """Both have said the same."""
    assert (await world.prove(issuer.pod_token(POD))).pod_name == POD.name
    assert reviewer.asked == 1


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReviewedToken)])
@pytest.mark.parametrize("value", ["other", ""])
async def test_the_cluster_must_agree_on_every_field(
    field: str, value: str, world: World, reviewer: Reviewer, issuer: TokenIssuer
) -> None:
    """A name that was given to another pod, node or account since the token was made is not the same; silence is no consent."""
    reviewer.answer = dataclasses.replace(POD.reviewed, **{field: value})
    with pytest.raises(CertmountError, match="than the API server does") as refusal:
        await world.prove(issuer.pod_token(POD))
    assert refusal.value.reason is Reason.TOKEN_REJECTED


async def test_a_forged_token_never_reaches_the_cluster(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """What fails offline costs the API server nothing."""
    with pytest.raises(CertmountError):
        await world.prove(issuer.rotated(issuer.key_id).pod_token(POD))
    assert reviewer.asked == 0


async def test_a_review_counts_for_some_seconds(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """A node's many volumes need one review of its token, but a deleted pod's token ends soon."""
    token = issuer.pod_token(POD)
    for _ in range(3):
        await world.prove(token)
    assert reviewer.asked == 1
    world.clock.forward(5.1)
    await world.prove(token)
    assert reviewer.asked == 2


async def test_a_review_never_counts_past_the_tokens_end(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """What was proven a moment ago is no longer believed once it has expired."""
    await world.prove(issuer.pod_token(POD, exp=int(world.clock.now) + 2))
    token = issuer.pod_token(POD, exp=int(world.clock.now) + 2)
    await world.prove(token)
    world.clock.forward(3)
    asked = reviewer.asked
    await world.prove(token)  # the verifier's own clock stands still here; that the kept proof is not used is the point
    assert reviewer.asked == asked + 1


async def test_a_refusal_counts_as_long_as_a_proof(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """A dead token that is shown again and again is asked about once."""
    reviewer.answer = CertmountError(Reason.TOKEN_REJECTED, "its pod may be gone")
    token = issuer.pod_token(POD)
    for _ in range(3):
        with pytest.raises(CertmountError, match="pod token: its pod may be gone"):
            await world.prove(token)
    assert reviewer.asked == 1


@pytest.mark.usefixtures("impatient")
async def test_without_the_cluster_nothing_is_proven(
    world: World, reviewer: Reviewer, issuer: TokenIssuer, registry: CollectorRegistry
) -> None:
    """A review that can't be had is neither a yes nor a no: try again, and the next try asks again."""
    reviewer.answer = DOWN
    token = issuer.pod_token(POD)
    for _ in range(2):
        with pytest.raises(CertmountError) as failure:
            await world.prove(token)
        assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
        assert failure.value.retryable
    assert reviewer.asked == 2
    assert registry.get_sample_value("certmount_token_proof_failures_total", {"proof": "review"}) == 2
    reviewer.answer = POD.reviewed
    await world.prove(token)


@pytest.mark.usefixtures("hasty")
async def test_an_api_server_that_is_away_for_a_while_costs_no_call_a_failure(
    world: World, reviewer: Reviewer, issuer: TokenIssuer
) -> None:
    """What is in flight waits and asks again, and is proven by the answer that comes in the end."""
    reviewer.answer = DOWN
    tasks = [asyncio.create_task(world.prove(issuer.pod_token(POD, jti=str(number)))) for number in range(5)]
    await until(lambda: reviewer.asked >= 10, "each to be asked about again")
    assert not any(task.done() for task in tasks)
    reviewer.answer = POD.reviewed
    assert {identity.pod_name for identity in await asyncio.gather(*tasks)} == {POD.name}


@pytest.mark.usefixtures("hasty")
async def test_patience_ends(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """An API server that stays away is said to be away; it was asked a few times, not in a loop."""
    reviewer.answer = DOWN
    with pytest.raises(CertmountError, match="pod token: TokenReview: the API server cannot be reached") as failure:
        await world.prove(issuer.pod_token(POD))
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE
    assert 3 <= reviewer.asked <= 15


@pytest.mark.usefixtures("hasty")
async def test_a_no_after_a_silence_is_final(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """A pod that was deleted during the API server's absence gets nothing when it is back."""
    reviewer.answer = DOWN
    task = asyncio.create_task(world.prove(issuer.pod_token(POD)))
    await until(lambda: reviewer.asked >= 2, "a second try")
    reviewer.answer = CertmountError(Reason.TOKEN_REJECTED, "gone")
    with pytest.raises(CertmountError, match="gone"):
        await task


def since(world: World) -> float | None:
    return world.proofs.failing_since


@pytest.mark.usefixtures("impatient")
async def test_it_is_known_since_when_reviews_fail(world: World, reviewer: Reviewer, issuer: TokenIssuer) -> None:
    """For readiness: from the first failure to the first answer, a no included; and no longer than someone asks."""
    assert since(world) is None
    reviewer.answer = DOWN
    began = world.clock.now
    for _ in range(3):
        with pytest.raises(CertmountError):
            await world.prove(issuer.pod_token(POD))
        assert since(world) == began
        world.clock.forward(10)
    world.clock.forward(30)
    assert since(world) is None
    with pytest.raises(CertmountError):
        await world.prove(issuer.pod_token(POD))
    assert since(world) == began
    reviewer.answer = CertmountError(Reason.TOKEN_REJECTED, "gone")
    with pytest.raises(CertmountError):
        await world.prove(issuer.pod_token(POD))
    assert since(world) is None


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "answer",
    [
        POD.reviewed,
        CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, "down"),
        CertmountError(Reason.TOKEN_REJECTED, "gone"),
    ],
    ids=["yes", "down", "no"],
)
async def test_one_review_at_a_time_for_a_token(
    answer: ReviewedToken | CertmountError, world: World, reviewer: Reviewer, issuer: TokenIssuer
) -> None:
    """All volumes of a node that start at once wait for the same review, and share its answer, good or bad."""
    reviewer.answer = answer
    reviewer.gate.clear()
    token = issuer.pod_token(POD)
    tasks = [asyncio.create_task(world.prove(token)) for _ in range(70)]
    await waiting(*tasks)
    assert reviewer.asked == 1
    reviewer.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert reviewer.asked == 1
    kinds = {type(result) for result in results}
    assert kinds == ({CertmountError} if isinstance(answer, CertmountError) else {PodIdentity})


async def test_a_caller_that_goes_away_takes_no_one_with_it(
    world: World, reviewer: Reviewer, issuer: TokenIssuer
) -> None:
    """When the one who asks is called off, one of those who wait asks anew."""
    reviewer.gate.clear()
    token = issuer.pod_token(POD)
    first = asyncio.create_task(world.prove(token))
    await waiting(first)
    others = [asyncio.create_task(world.prove(token)) for _ in range(5)]
    await waiting(*others)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    reviewer.gate.set()
    assert {identity.pod_name for identity in await asyncio.gather(*others)} == {POD.name}
    assert reviewer.asked == 2


async def test_different_tokens_do_not_wait_for_each_other(
    world: World, reviewer: Reviewer, issuer: TokenIssuer
) -> None:
    """Reviews run side by side."""
    reviewer.gate.clear()
    tasks = [asyncio.create_task(world.prove(issuer.pod_token(POD, jti=str(number)))) for number in range(10)]
    await waiting(*tasks)
    assert reviewer.asked == 10
    reviewer.gate.set()
    await asyncio.gather(*tasks)


async def test_what_is_kept_is_bounded_and_holds_no_token(
    keys: TokenKeys, metrics: AuthorityMetrics, issuer: TokenIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old proofs make room; only a hash of each token stays in memory."""
    monkeypatch.setattr("csi_driver.authority.authn.token_reviews._MOST_KEPT", 10)
    world = World(keys, metrics, Reviewer())
    token = issuer.pod_token(POD)
    for number in range(30):
        await world.prove(issuer.pod_token(POD, jti=str(number)))
    await world.prove(token)
    assert len(world.proofs._kept) == 10
    assert all(len(key) == 32 for key in world.proofs._kept)
    assert token.reveal() not in repr(world.proofs._kept)
    world.clock.forward(6)
    await world.prove(token)
    assert len(world.proofs._kept) == 1


async def test_outside_a_cluster_the_signature_is_all_there_is(
    keys: TokenKeys, metrics: AuthorityMetrics, issuer: TokenIssuer
) -> None:
    """There is no one to ask, so a token counts until it expires."""
    world = World(keys, metrics, OfflineReviewer())
    assert (await world.prove(issuer.pod_token(POD))).pod_name == POD.name
