"""What an error of the CA means for an order, and how pods learn about it."""

from __future__ import annotations

import pytest

from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.order_rules import after_problem, backoff_error, pending_error
from csi_driver.authority.issuers.acme.state import AcmeState
from csi_driver.core.errors import Reason
from tests.unit.authority.issuers.acme.samples import CHALLENGE, NAMES, NOW, order


@pytest.mark.parametrize("retry_after_s, expected_s", [(7200.0, 7200), (None, 3600)])
def test_rate_limit_before_an_order_exists_applies_to_its_names(retry_after_s: float | None, expected_s: int) -> None:
    problem = AcmeProblem("rateLimited", "too many", 429, retry_after_s)
    state = after_problem(AcmeState((order(),)), order(), problem, NOW)
    assert state.order(order().id) is None
    backoff = state.backoff(NAMES, NOW + expected_s - 1)
    assert backoff is not None
    assert (backoff.reason, backoff.until) == ("TooManyRequests", NOW + expected_s)
    assert state.backoff(NAMES, NOW + expected_s) is None


@pytest.mark.parametrize(
    "problem", [AcmeProblem("rateLimited", "too many", 429, 50.0), AcmeProblem("", "busy", 503, 50.0)]
)
def test_existing_order_waits_as_long_as_the_ca_requests(problem: AcmeProblem) -> None:
    known = order(url="https://ca/1", holder="me", lease_until=NOW + 60)
    state = after_problem(AcmeState((known,)), known, problem, NOW)
    waiting = state.order(known.id)
    assert waiting is not None
    assert (waiting.retry_at, waiting.holder, waiting.url) == (NOW + 50, "", "https://ca/1")
    assert state.backoffs == ()


def test_rejected_names_are_retried_with_growing_delays() -> None:
    """At most four times in the first hour, and finally every six hours."""
    state, times, now = AcmeState(), [], NOW
    for _ in range(12):
        state = after_problem(state.with_order(order()), order(), AcmeProblem("unauthorized", "no record", 403), now)
        times.append(now - NOW)
        backoff = state.backoff(NAMES, now)
        assert backoff is not None
        now = backoff.until
    assert sum(time < 3600 for time in times) == 4
    assert times[-1] - times[-2] == 6 * 3600
    assert state.without_backoff(NAMES).failures(NAMES) == 0


@pytest.mark.parametrize(
    "code, reason",
    [
        ("rejectedIdentifier", Reason.NAME_NOT_ALLOWED),
        ("caa", Reason.NAME_NOT_ALLOWED),
        ("badCSR", Reason.NAME_NOT_ALLOWED),
        ("unauthorized", Reason.ISSUER_UNAVAILABLE),
        ("connection", Reason.ISSUER_UNAVAILABLE),
    ],
)
def test_error_contains_the_text_of_the_ca_and_the_retry_time(code: str, reason: Reason) -> None:
    state = after_problem(AcmeState((order(),)), order(), AcmeProblem(code, "its words", 403), NOW)
    backoff = state.backoff(NAMES, NOW)
    assert backoff is not None
    error = backoff_error(backoff, NAMES)
    assert error.reason is reason
    assert f"its words ({code}); the authority retries after 2027-01-15T08:05:00Z" in str(error)


def test_rejected_order_stays_until_its_challenges_are_removed() -> None:
    known = order(challenges=(CHALLENGE,), url="https://ca/1")
    remaining = after_problem(AcmeState((known,)), known, AcmeProblem("unauthorized", "no", 403), NOW).order(known.id)
    assert remaining is not None
    assert remaining.abandoned
    assert not remaining.is_open
    assert remaining.challenges == (CHALLENGE,)


@pytest.mark.parametrize("problem", [AcmeProblem("", "gone", 404), AcmeProblem("accountDoesNotExist", "unknown", 400)])
def test_order_that_the_ca_has_lost_starts_again(problem: AcmeProblem) -> None:
    known = order(url="https://ca/1")
    state = after_problem(AcmeState((known,)), known, problem, NOW)
    restarted = state.order(known.id)
    assert restarted is not None
    assert restarted.url == ""
    assert state.backoffs == ()


def test_transient_failures_are_retried_and_reported() -> None:
    """The delay doubles from 5 s to 5 min."""
    state, delays = AcmeState((order(),)), []
    for _ in range(9):
        (known,) = state.orders
        state = after_problem(state, known, AcmeProblem("", "DNS server 192.0.2.1: does not respond in time"), NOW)
        delays.append(state.orders[0].retry_at - NOW)
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    error = pending_error(state.orders[0])
    assert error.reason is Reason.ISSUANCE_PENDING
    expected = "DNS server 192.0.2.1: does not respond in time; the authority retries after 2027-01-15T08:05:00Z"
    assert expected in str(error)
