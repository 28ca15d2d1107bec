"""A node sends as many requests as the authority can handle: one probe at a time in an outage, more with each response."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason, Scope
from csi_driver.core.renewal import catch_up_delay_s, probe_delay_s
from csi_driver.node.issuance.issuer_queue import MAX_RENEWALS
from csi_driver.node.issuance.rate_controller import RateController

_UNAVAILABLE = CertmountError(Reason.AUTHORITY_UNAVAILABLE, "connection refused")
_OVERLOADED = CertmountError(Reason.AUTHORITY_OVERLOADED, "busy")


def _reasons(*scopes: Scope) -> list[Reason]:
    return [reason for reason in Reason if reason.kind.scope in scopes]


def _controller(limit: float = 1.0) -> RateController:
    return RateController(lambda: 0.5, MAX_RENEWALS, limit)


def _free(controller: RateController, now: float, left_s: float = 0.0) -> int:
    """Return how many requests can start now."""
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
    """The pauses grow to about half a minute for certificates that expire soon."""
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
    """In an outage, the kubelet's requests continue. Their failures extend no pause, and their success ends it."""
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
    """Eight responses undo one failure, so repeated overload makes the pauses longer."""
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
def test_rate_limit_of_one_caller_causes_no_pause(reason: Reason) -> None:
    controller = _controller(MAX_RENEWALS)
    controller.record(controller.epoch, CertmountError(reason, "slow down"), 0.0)
    assert _free(controller, 0.0) == MAX_RENEWALS // 2


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
    """The delay is at most the length of the outage and a quarter of the remaining time; 0 for an expired certificate."""
    delay = catch_up_delay_s(outage_s=outage_s, left_s=left_s, jitter=jitter)
    assert 0 <= delay <= max(min(outage_s, left_s / 4), 0)


def test_pause_depends_on_the_certificate_that_expires_first() -> None:
    controller = _controller()
    for second in range(0, 800, 100):
        controller.record(controller.epoch, _UNAVAILABLE, float(second))
    assert controller.wait_s(705.0, 100.0) == 25.0
    assert controller.wait_s(705.0, 4000.0) == 95.0
