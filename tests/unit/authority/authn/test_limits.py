"""How much may be asked: what is normal passes, whatever the hour; what is not is slowed down; and memory has an end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.authn.limits import (
    MOST_WATCHES,
    NODE_RATE,
    POD_RATE,
    ConcurrencyLimit,
    Rate,
    RateLimiter,
    RequestLimits,
)
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from tests.unit.authority.clock import Clock


def pod(number: int = 0, node: str = "node-a") -> PodIdentity:
    account = ServiceAccount("default", "hello")
    return PodIdentity(account, "account-uid", f"hello-{number}", f"uid-{number}", node, f"uid-{node}", 2e9)


def ask(limits: RequestLimits, number: int, node: str = "node-a") -> None:
    limits.count_node(pod(number, node))
    limits.count_pod(pod(number, node))


def refused(limits: RequestLimits, asker: PodIdentity) -> CertmountError:
    for _ in range(POD_RATE.burst):
        limits.count_pod(asker)
    with pytest.raises(CertmountError) as refusal:
        limits.count_pod(asker)
    return refusal.value


@pytest.mark.parametrize("volumes,life_s", [(10, 10), (100, 3600)], ids=["ten of 10 s", "a hundred of 1 h"])
def test_a_pod_with_many_short_lives_is_never_slowed_down(volumes: int, life_s: int) -> None:
    """All its volumes start at once and renew at half of their life, the earliest that the node ever does, for an hour."""
    clock = Clock(0.0)
    limits = RequestLimits(clock)
    for _ in range(min(720, 7200 // life_s)):
        for _ in range(volumes):
            ask(limits, 1)
        clock.forward(life_s / 2)


@pytest.mark.parametrize("pods", [110, 250])
def test_a_whole_node_may_start_at_once_and_come_back_from_an_outage(pods: int) -> None:
    """Each pod with four volumes, and half a minute later again."""
    clock = Clock(0.0)
    limits = RequestLimits(clock)
    for _ in range(2):
        for number in range(pods):
            for _ in range(4):
                ask(limits, number)
        clock.forward(30)


def test_a_node_full_of_the_shortest_lives_is_not_slowed_down() -> None:
    """250 pods that renew a certificate of 10 s after 6.7 s, spread as the node spreads them."""
    clock = Clock(0.0)
    limits = RequestLimits(clock)
    for step in range(250 * 60):
        ask(limits, step % 250)
        clock.forward(6.7 / 250)


def test_a_loop_gets_its_share_and_is_told_when_to_come_again() -> None:
    """A pod that asks without a pause for a minute gets the burst and then five a second; its neighbour does not notice."""
    clock = Clock(0.0)
    limits = RequestLimits(clock)
    error = refused(limits, pod(1))
    assert error.reason is Reason.TOO_MANY_REQUESTS
    assert error.retryable
    assert str(error) == (
        "TooManyRequests: pod default/hello-1: more calls than the authority allows; come again in 1 s"
    )
    granted = 0
    for _ in range(6000):
        clock.forward(0.01)
        try:
            limits.count_pod(pod(1))
        except CertmountError:
            continue
        granted += 1
    assert granted == pytest.approx(60 * POD_RATE.a_second, abs=1)
    limits.count_pod(pod(2))


def test_a_node_that_asks_without_a_pause_leaves_room_for_the_others() -> None:
    """Whatever pods it shows, also ever new ones."""
    clock = Clock(0.0)
    limits = RequestLimits(clock)
    granted = 0
    for number in range(NODE_RATE.burst * 3):
        try:
            ask(limits, number)
        except CertmountError as error:
            assert "node node-a" in str(error)
        else:
            granted += 1
    assert granted == NODE_RATE.burst
    ask(limits, 1, "node-b")


@given(
    st.integers(1, 20),
    st.floats(0.1, 50),
    st.lists(st.tuples(st.floats(0, 5), st.sampled_from("abc")), max_size=200),
)
def test_a_bucket_never_gives_more_than_burst_and_rate(
    burst: int, a_second: float, calls: list[tuple[float, str]]
) -> None:
    """In any stretch of time, for each key by itself, however calls fall; and who waits as long as told is let in."""
    clock = Clock(0.0)
    buckets = RateLimiter(Rate(a_second, burst), clock, most_keys=10)
    granted: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for pause, key in calls:
        clock.forward(pause)
        wait_s = buckets.take(key)
        if wait_s:
            clock.forward(wait_s + 1e-6)
            assert buckets.take(key) == 0
        granted[key].append(clock.now)
    for times in granted.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert last - first + 1 <= burst + (times[last] - times[first]) * a_second + 1e-3


def test_memory_is_bounded_and_who_rests_is_forgotten() -> None:
    """Ever new pods push out the ones that have not asked for longest; a full bucket is dropped as soon as it is full."""
    clock = Clock(0.0)
    buckets = RateLimiter(Rate(1, 10), clock, most_keys=100)
    for number in range(1000):
        buckets.take(f"pod-{number}")
        assert len(buckets) <= 100
    clock.forward(10)
    for _ in range(50):
        buckets.take("pod-new")
    assert len(buckets) == 1


def test_streams_of_a_node_are_few_and_their_places_come_back() -> None:
    """A thousand of one node are refused; another node's is not; one that ends makes room."""
    limits = RequestLimits()
    with limits.watching(pod()), limits.watching(pod()), limits.watching(pod()):
        with limits.watching(pod()):
            with pytest.raises(CertmountError, match=f"watches the roots {MOST_WATCHES} times already") as refusal:
                limits.watching(pod()).__enter__()
            assert refusal.value.reason is Reason.TOO_MANY_REQUESTS
            with limits.watching(pod(node="node-b")):
                pass
        with limits.watching(pod()):
            pass
    assert not limits._watches


def test_slots_come_back_whatever_happens() -> None:
    """A call that fails takes none with it."""
    slots = ConcurrencyLimit(1)
    with pytest.raises(RuntimeError, match="in the middle"), slots:
        raise RuntimeError("in the middle")
    with slots, pytest.raises(CertmountError, match="1 calls are under way already") as refusal, slots:
        pass
    assert refusal.value.reason is Reason.AUTHORITY_OVERLOADED
    with slots:
        pass
