"""Rate limits allow normal load, slow down other load, and use bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.authn import limits as limits_module
from csi_driver.authority.authn.limits import (
    FAILURE_RATE,
    MAX_CALLERS,
    MAX_ISSUES,
    NODE_RATE,
    POD_RATE,
    Rate,
    RateLimiter,
    RequestLimits,
    caller_address,
)
from csi_driver.authority.authn.limits import MAX_STREAMS_PER_NODE as MAX_STREAMS
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount
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
        limits.count_node_issue(pod(number))
    for number in range(NODE_RATE.burst, 3 * NODE_RATE.burst):
        with pytest.raises(CertmountError, match="node node-a"):
            limits.count_node_issue(pod(number))
    call(limits, 1, "node-b")


def test_namespace_that_calls_in_a_loop_leaves_calls_of_its_node_to_others(clock: Clock, limits: RequestLimits) -> None:
    victim = replace(pod(), service_account=ServiceAccount("victim", "shop"), pod_uid="victim")
    refused = ""
    for step in range(20_000):  # 200 calls per second for 100 s
        clock.forward(0.005)
        try:
            call(limits, step % 500)
        except CertmountError as error:
            refused = str(error)
        if step % 100 == 0:
            limits.count_node_issue(victim)
            limits.count_pod_issue(victim)
    message = (
        r"ShareExceeded: namespace default: has used \d+ of the 2000 calls of node node-a, its share; 50 more per "
        r"second are possible"
    )
    assert re.fullmatch(message, refused), refused


CONTROLLER = pod(0, "node-c")


def test_secrets_of_a_namespace_leave_calls_of_the_controller_to_others(clock: Clock, limits: RequestLimits) -> None:
    """10,000 Secrets of one namespace that are requested in a loop, and one Secret whose source changes 100 times a second."""
    refused: dict[str, str] = {}
    victim = SecretIdentity("victim", "shop-tls")
    for step in range(20_000):
        clock.forward(0.005)
        for secret in (SecretIdentity("flood", f"s{step % 10_000}"), SecretIdentity("edit", "tls")):
            try:
                limits.count_secret_issue(CONTROLLER, secret)
            except CertmountError as error:
                refused[secret.namespace] = str(error)
        if step % 1000 == 0:
            limits.count_secret_issue(CONTROLLER, victim)
    message = r"ShareExceeded: namespace flood: has used \d+ of the 2000 calls of the Secrets controller, its share; 50 more per "
    assert re.fullmatch(message + "second are possible", refused["flood"])
    assert refused["edit"].startswith("TooManyRequests: secret edit/tls: exceeds the authority's rate limit; retry")


def test_secrets_and_pods_share_the_calls_in_progress(limits: RequestLimits) -> None:
    with ExitStack() as holds:
        count, failure = hold_all(holds, lambda: limits.issue(SecretIdentity("flood", "tls"), "acme"))
        assert 0 < count < MAX_ISSUES / 2
        assert failure.startswith("ShareExceeded: secret flood/tls: holds ")
        holds.enter_context(limits.issue(SecretIdentity("victim", "tls"), "acme"))
        holds.enter_context(limits.issue(pod(), "acme"))


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
        message = f"^ShareExceeded: node node-a: has {MAX_STREAMS} WatchTrust streams, its share; end one of them$"
        with pytest.raises(CertmountError, match=message):
            limits.stream(pod()).__enter__()
        with limits.stream(pod(node="node-b")):
            pass
        last.close()
        with limits.stream(pod()):
            pass


def test_streams_of_all_nodes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "MAX_STREAMS", 10)
    limits = RequestLimits()
    with ExitStack() as streams:
        for number in range(9):
            streams.enter_context(limits.stream(pod(node=f"node-{number}")))
        with pytest.raises(CertmountError, match=r"^AuthorityOverloaded: certmount: holds 9 of 10 WatchTrust streams"):
            limits.stream(pod(node="node-new")).__enter__()


def hold_all(holds: ExitStack, hold: Callable[[], AbstractContextManager[None]]) -> tuple[int, str]:
    """Return how often it was possible, and the failure."""
    for number in itertools.count():
        try:
            holds.enter_context(hold())
        except CertmountError as failure:
            return number, str(failure)
    raise AssertionError


@pytest.mark.parametrize("issue", [True, False])
def test_unauthenticated_callers_cannot_use_up_the_calls_of_others(issue: bool, limits: RequestLimits) -> None:
    with ExitStack() as holds:
        count, failure = hold_all(holds, lambda: limits.authentication("10.0.0.1", issue=issue))
        assert count == MAX_CALLERS // 2
        calls = "Issue calls" if issue else "other calls"
        assert failure == (
            f"ShareExceeded: address 10.0.0.1: holds 256 of 512 {calls} that are not authenticated yet and requests 1 more, "
            "which exceeds its share; wait until some of them end"
        )
        for number in range(100):
            holds.enter_context(limits.authentication(f"10.0.1.{number}", issue=issue))
        holds.enter_context(limits.authentication("10.0.0.1", issue=not issue))


def test_service_account_namespace_and_node_have_shares_of_the_calls_in_progress(limits: RequestLimits) -> None:
    victim = replace(pod(2), service_account=ServiceAccount("bank", "bank"))
    for issuer in ("internal", "acme"):
        with ExitStack() as holds:
            count, failure = hold_all(holds, lambda: limits.issue(pod(1), issuer))  # noqa: B023  # called in this iteration
            assert count == MAX_ISSUES // (4 if issuer == "internal" else 5)
            assert failure.startswith("ShareExceeded: service account default/hello: holds ")
            other = replace(pod(1), service_account=ServiceAccount("default", "other"))
            assert hold_all(holds, lambda: limits.issue(other, issuer))[0] < count  # noqa: B023
            with limits.issue(victim, issuer):
                pass


def test_calls_of_many_nodes_overload_the_authority(limits: RequestLimits) -> None:
    numbers = itertools.count()

    def hold() -> AbstractContextManager[None]:
        number = next(numbers)
        one = replace(pod(number, f"node-{number}"), service_account=ServiceAccount(f"ns-{number}", "default"))
        return limits.issue(one, "internal")

    with ExitStack() as holds:
        count, failure = hold_all(holds, hold)
    assert count == 509
    assert failure.startswith("AuthorityOverloaded: certmount: holds 509 of 512 Issue calls")


@pytest.mark.parametrize(
    "peer,address",
    [("ipv4:10.0.0.1:4711", "10.0.0.1"), ("ipv6:%5Bfd00::1%5D:4711", "fd00::1"), ("ipv6:[fd00::1]:4711", "fd00::1"), ("unix:", "")],
)  # fmt: skip
def test_address_of_a_caller(peer: str, address: str) -> None:
    assert caller_address(peer) == address


def test_log_lines_about_failures_are_limited_by_address(limits: RequestLimits) -> None:
    assert sum(limits.may_log_failure("10.0.0.1") for _ in range(10_000)) == FAILURE_RATE.burst
    assert limits.may_log_failure("10.0.0.2")
