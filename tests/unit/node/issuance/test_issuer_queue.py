"""The order of the requests to one issuer, and their number: one probe at a time in an outage, more with each response."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason, Scope
from csi_driver.core.renewal import catch_up_delay_s, probe_delay_s
from csi_driver.node.issuance.issuer_queue import MAX_RENEWALS, IssuerQueue, QueuedRequest, RequestClass
from csi_driver.node.issuance.rate_controller import RateController
from tests.unit.node.certificates import pod_named


def _queue() -> IssuerQueue:
    return IssuerQueue("internal", lambda: 0.5)


def _drain(queue: IssuerQueue) -> list[QueuedRequest]:
    started = []
    while (request := queue.start_next(0.0, 0.0)) is not None:
        started.append(request)
        queue.end(request)
    return started


_REQUESTS = st.lists(
    st.builds(
        QueuedRequest,
        st.sampled_from(RequestClass),
        st.sampled_from("abc").map(lambda name: pod_named(name, "web")),
        st.floats(0, 100),
    ),
    max_size=30,
)


@given(_REQUESTS, st.sets(st.integers(0, 29)))
def test_first_requests_then_turns_of_pods_then_urgency(requests: list[QueuedRequest], cancelled: set[int]) -> None:
    queue, expected = _queue(), []
    for number, request in enumerate(requests):
        earlier = [each for each in requests[:number] if each.waiting and each.request_class is request.request_class]
        share = sum(each.pod == request.pod for each in earlier)
        expected.append((request.request_class is RequestClass.RENEWAL, share, request.urgency, number))
        queue.add(request)
    for number in cancelled & set(range(len(requests))):
        queue.end(requests[number])
    order = [number for *_, number in sorted(expected) if number not in cancelled]
    assert [requests.index(request) for request in _drain(queue)] == order
    assert queue.idle


def test_pod_with_many_volumes_does_not_delay_other_pods() -> None:
    queue = _queue()
    for number in range(30):
        queue.add(QueuedRequest(RequestClass.RENEWAL, pod_named("many"), float(number)))
    for pod in ("one", "two"):
        queue.add(QueuedRequest(RequestClass.RENEWAL, pod_named(pod), 100.0))
    assert [request.pod.name for request in _drain(queue)[:3]] == ["many", "one", "two"]


def test_renewals_in_progress_do_not_delay_first_requests() -> None:
    queue = _queue()
    for number in range(3):
        queue.add(QueuedRequest(RequestClass.RENEWAL, pod_named(str(number)), 0.0))
    assert queue.start_next(0.0, 0.0) is not None
    assert queue.start_next(0.0, 0.0) is None
    queue.add(QueuedRequest(RequestClass.FIRST, pod_named("new"), 0.0))
    first = queue.start_next(0.0, 0.0)
    assert first is not None
    assert first.request_class is RequestClass.FIRST


def test_outage_pauses_renewals_only() -> None:
    queue = _queue()
    queue.record(queue.epochs, CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused"), 0.0)
    queue.add(QueuedRequest(RequestClass.RENEWAL, pod_named("a"), 10.0))
    assert queue.start_next(0.0, 0.0) is None
    assert queue.wait_s(0.0, 0.0) == 1.0
    queue.add(QueuedRequest(RequestClass.FIRST, pod_named("b"), 0.0))
    assert queue.start_next(0.0, 0.0) is not None
    assert not queue.idle


_UNAVAILABLE = CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused")
_OVERLOADED = CertmountError(Reason.AUTHORITY_OVERLOADED, "busy")


def _reasons(*scopes: Scope) -> list[Reason]:
    return [reason for reason in Reason if reason.kind.scope in scopes]


def _controller(limit: float = 1.0) -> RateController:
    return RateController(lambda: 0.5, MAX_RENEWALS, limit)


def _free(controller: RateController, now: float, left_s: float = 0.0) -> int:
    started = 0
    while controller.wait_s(now, left_s) == 0:
        controller.begin()
        started += 1
    for _ in range(started):
        controller.end()
    return started


def test_each_round_of_responses_adds_one_concurrent_request() -> None:
    controller, free = _controller(), []
    for _ in range(10):
        free.append(_free(controller, 0.0))
        for _ in range(free[-1]):
            controller.record(controller.epoch, None, 0.0)
    assert free[0] == 1
    assert free[-1] == MAX_RENEWALS
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(free))


@pytest.mark.parametrize("reason", _reasons(Scope.ISSUER))
def test_outage_allows_one_probe_at_a_time(reason: Reason) -> None:
    controller, now, pauses = _controller(MAX_RENEWALS), 0.0, []
    for _ in range(9):
        controller.record(controller.epoch, CertmountError(reason, "refused"), now)
        pauses.append(controller.wait_s(now, 60.0))
        now += pauses[-1]
        assert _free(controller, now) == 1
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert str(controller.outage) == f"{reason}: refused"
    assert controller.record(controller.epoch, None, now + 5) == now + 5
    assert str(controller.outage) == "None"
    assert _free(controller, now + 5) == 1


def test_concurrent_failures_count_as_one() -> None:
    """The failure of a request that started before the pause is no news."""
    controller = _controller(MAX_RENEWALS)
    epoch = controller.epoch
    for _ in range(MAX_RENEWALS):
        controller.record(epoch, _UNAVAILABLE, 0.0)
    assert controller.wait_s(0.0, 0.0) == 1


def test_first_requests_do_not_extend_the_pause_of_renewals() -> None:
    controller = _controller()
    for _ in range(6):
        controller.record(controller.epoch, _UNAVAILABLE, 0.0)
    before = controller.wait_s(0.0, 0.0)
    for second in range(1, int(before)):
        controller.record(controller.epoch, _UNAVAILABLE, float(second))
    assert controller.wait_s(0.0, 0.0) == before
    assert controller.record(controller.epoch, None, 0.5) == 0.5
    assert controller.wait_s(0.5, 0.0) == 0


@pytest.mark.parametrize("reason", _reasons(Scope.LOAD))
def test_overload_halves_the_limit_and_starts_a_pause(reason: Reason) -> None:
    error = CertmountError(reason, "busy")
    controller, pauses = _controller(MAX_RENEWALS), []
    for second in range(0, 400, 100):
        controller.record(controller.epoch, error, float(second))
        pauses.append(controller.wait_s(float(second), 0.0))
        controller.record(controller.epoch, None, second + 50.0)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[0]
    assert controller.outage is None
    assert _free(controller, 390.0) == 2
    for _ in range(100):
        controller.record(controller.epoch, None, 400.0)
    controller.record(controller.epoch, error, 500.0)
    assert controller.wait_s(500.0, 0.0) == pauses[0]


@pytest.mark.parametrize("reason", _reasons(Scope.CALLER))
def test_limit_of_one_caller_does_not_slow_down_others(reason: Reason) -> None:
    controller = _controller(MAX_RENEWALS)
    for _ in range(100):
        controller.record(controller.epoch, CertmountError(reason, "slow down"), 0.0)
    assert _free(controller, 0.0) == MAX_RENEWALS


@pytest.mark.parametrize("reason", _reasons(Scope.REQUEST, Scope.POD))
def test_failure_of_one_request_counts_as_a_response(reason: Reason) -> None:
    """An authority that rejects a request is available for others."""
    controller = _controller(4)
    controller.record(controller.epoch, CertmountError(reason, "no"), 0.0)
    assert _free(controller, 0.0) == 4


@given(st.floats(1, 50), st.floats(-1e6, 1e9), st.floats(0, 1))
def test_nodes_that_can_wait_probe_less_often(attempt: float, left_s: float, jitter: float) -> None:
    delay = probe_delay_s(attempt=attempt, left_s=left_s, jitter=jitter)
    assert 0.75 <= delay <= 1.25 * max(30.0, min(left_s / 40, 600.0))
    assert delay >= probe_delay_s(attempt=attempt, left_s=min(left_s, 60.0), jitter=jitter) - 1e-9


@given(st.floats(0, 1e6), st.floats(-1e6, 1e9), st.floats(0, 1))
def test_postponed_renewal_is_well_before_expiry(outage_s: float, left_s: float, jitter: float) -> None:
    delay = catch_up_delay_s(outage_s=outage_s, left_s=left_s, jitter=jitter)
    assert 0 <= delay <= max(min(outage_s, left_s / 4), 0)


def test_pause_depends_on_the_certificate_that_expires_first() -> None:
    controller = _controller()
    for second in range(0, 800, 100):
        controller.record(controller.epoch, _UNAVAILABLE, float(second))
    assert controller.wait_s(705.0, 100.0) == 25.0
    assert controller.wait_s(705.0, 4000.0) == 95.0
