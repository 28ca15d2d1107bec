"""Rate limits allow normal load, slow down other load, and use bounded memory."""

from __future__ import annotations

import contextlib
import itertools
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.authn.limits import MAX_STREAMS_PER_NODE as MAX_STREAMS
from csi_driver.authority.authn.limits import NODE_RATE, POD_RATE, ConcurrencyLimit, Rate, RateLimiter, RequestLimits
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, ServiceAccount
from tests.unit.authority.clock import Clock


def pod(number: int = 0, node: str = "node-a") -> PodIdentity:
    account = ServiceAccount("default", "hello")
    return PodIdentity(account, "account-uid", f"hello-{number}", f"uid-{number}", node, f"uid-{node}", 2e9)


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def limits(clock: Clock) -> RequestLimits:
    return RequestLimits(clock)


def call(limits: RequestLimits, number: int, node: str = "node-a") -> None:
    limits.count_node_issue(pod(number, node))
    limits.count_pod_issue(pod(number, node))


@pytest.mark.parametrize("volumes,lifetime_s", [(10, 10), (100, 3600)])
def test_many_volumes_are_not_limited(volumes: int, lifetime_s: int, clock: Clock, limits: RequestLimits) -> None:
    for _ in range(min(720, 7200 // lifetime_s)):
        for _ in range(volumes):
            call(limits, 1)
        clock.forward(lifetime_s / 2)


@pytest.mark.parametrize("pods", [110, 250])
def test_all_pods_of_a_node_can_start_at_once_and_again(pods: int, clock: Clock, limits: RequestLimits) -> None:
    for _ in range(2):
        for number in range(pods):
            for _ in range(4):
                call(limits, number)
        clock.forward(30)


def test_node_with_only_the_shortest_lifetimes_is_not_limited(clock: Clock, limits: RequestLimits) -> None:
    for step in range(250 * 60):
        call(limits, step % 250)
        clock.forward(6.7 / 250)


def test_pod_that_calls_in_a_loop_gets_its_share(clock: Clock, limits: RequestLimits) -> None:
    for _ in range(POD_RATE.burst):
        limits.count_pod_issue(pod(1))
    with pytest.raises(CertmountError) as limited:
        limits.count_pod_issue(pod(1))
    assert limited.value.retryable
    assert str(limited.value).endswith("pod default/hello-1: exceeds the authority's rate limit; retry after 1 s")
    allowed = 0
    for _ in range(6000):
        clock.forward(0.01)
        with contextlib.suppress(CertmountError):
            limits.count_pod_issue(pod(1))
            allowed += 1
    assert allowed == pytest.approx(60 * POD_RATE.per_second, abs=1)
    limits.count_pod_issue(pod(2))


def test_node_that_calls_in_a_loop_does_not_affect_other_nodes(limits: RequestLimits) -> None:
    for number in range(NODE_RATE.burst):
        call(limits, number)
    for number in range(NODE_RATE.burst, 3 * NODE_RATE.burst):
        with pytest.raises(CertmountError, match="node node-a"):
            call(limits, number)
    call(limits, 1, "node-b")


CALLS = st.lists(st.tuples(st.floats(0, 5), st.sampled_from("abc")), max_size=200)


@given(st.integers(1, 20), st.floats(0.1, 50), CALLS)
def test_limiter_never_exceeds_burst_and_rate(burst: int, per_second: float, calls: list[tuple[float, str]]) -> None:
    clock = Clock(0.0)
    limiter = RateLimiter(Rate(per_second, burst), clock, max_buckets=10)
    allowed: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for pause, key in calls:
        clock.forward(pause)
        wait_s = limiter.take(key)
        if wait_s:
            clock.forward(wait_s + 1e-6)
            assert limiter.take(key) == 0
        allowed[key].append(clock.now)
    for times in allowed.values():
        for (first, start), (last, end) in itertools.combinations(enumerate(times), 2):
            assert last - first + 1 <= burst + (end - start) * per_second + 1e-3


def test_rate_limiter_memory_is_bounded(clock: Clock) -> None:
    limiter = RateLimiter(Rate(1, 10), clock, max_buckets=100)
    for number in range(1000):
        limiter.take(f"pod-{number}")
        assert len(limiter) <= 100
    clock.forward(10)
    for _ in range(50):
        limiter.take("pod-new")
    assert len(limiter) == 1


def test_streams_per_node_are_limited_and_released(limits: RequestLimits) -> None:
    with ExitStack() as streams:
        last = streams.enter_context(ExitStack())
        last.enter_context(limits.stream(pod()))
        for _ in range(MAX_STREAMS - 1):
            streams.enter_context(limits.stream(pod()))
        message = f"^TooManyRequests: node node-a: has {MAX_STREAMS} WatchTrust streams"
        with pytest.raises(CertmountError, match=message):
            limits.stream(pod()).__enter__()
        with limits.stream(pod(node="node-b")):
            pass
        last.close()
        with limits.stream(pod()):
            pass
    assert not limits._streams


def test_concurrency_limit_is_released_after_a_failure() -> None:
    limit = ConcurrencyLimit(1)
    with pytest.raises(RuntimeError, match="failed"), limit:
        raise RuntimeError("failed")
    with limit, pytest.raises(CertmountError, match=r"^AuthorityOverloaded: 1 calls are already in progress"), limit:
        pass
    with limit:
        pass
