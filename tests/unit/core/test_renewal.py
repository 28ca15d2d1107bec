"""Renewal times are within the lifetime and spread by jitter; retry delays grow up to a limit, like each backoff."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.backoff import Backoff
from csi_driver.core.durations import Percentage
from csi_driver.core.errors import FailureKind, Retry
from csi_driver.core.renewal import JITTER, RENEWAL_FRACTION, plan_renewal, retry_delay_s

HOUR = 3600.0
ISSUED = 1_795_341_600.0

Span = float | None
jitters = st.floats(0, 1)
lifetimes = st.one_of(st.floats(0.01, 60), st.floats(60, 36_500 * 24 * HOUR))
spans = st.one_of(st.none(), st.floats(-10, 10), st.floats(0, 36_500 * 24 * HOUR))


def renew_after(
    lifetime: float,
    *,
    before: float | None = None,
    after: float | None = None,
    jitter: float = 0.5,
    late: float = 0.0,
    issued: float = ISSUED,
) -> float:
    """Return the seconds from issuance to renewal."""
    renewal = plan_renewal(
        issued_at=issued,
        not_after=issued + lifetime,
        renew_before=None if before is None else timedelta(seconds=before),
        renew_after_s=after,
        jitter=jitter,
        late_s=late,
    )
    return renewal - issued


@given(lifetimes, spans, spans, jitters)
@example(HOUR, HOUR, None, 0)
@example(HOUR, HOUR - 1e-3, None, 0)
@example(HOUR, 1e-6, None, 1)
@example(HOUR, None, 1e-6, 0)
def test_renewal_time_is_within_the_lifetime(lifetime: float, before: Span, after: Span, jitter: float) -> None:
    """For all inputs there is time before the expiry, and a pause after the issuance that prevents a loop."""
    margin = 0.85 * min(1.0, lifetime / 3)
    planned = renew_after(lifetime, before=before, after=after, jitter=jitter)
    assert margin - 1e-6 <= planned <= lifetime - margin + 1e-6


@given(st.floats(-1e6, 0), spans, spans, jitters)
def test_expired_certificate_is_renewed_immediately(lifetime: float, before: Span, after: Span, jitter: float) -> None:
    """A wrong clock causes a renewal, not a crash."""
    assert renew_after(lifetime, before=before, after=after, jitter=jitter) == 0


@given(lifetimes)
def test_default_is_two_thirds_of_the_lifetime(lifetime: float) -> None:
    assert renew_after(lifetime) == pytest.approx(lifetime * RENEWAL_FRACTION, abs=1e-6)


def test_examples_for_one_hour() -> None:
    examples = {None: 2400, 0: 2400, HOUR: 2400, 900: 2700, HOUR - 0.5: 1, 0.5: HOUR - 1}
    for before, planned in examples.items():
        assert renew_after(HOUR, before=before, issued=0) == planned


@given(st.floats(60, 1e9), st.data())
def test_renew_before_counts_from_the_expiry(lifetime: float, data: st.DataObject) -> None:
    before = data.draw(st.floats(1, lifetime - 1))
    assert renew_after(lifetime, before=before) == pytest.approx(lifetime - before, abs=1e-6)


@given(st.floats(60, 1e9), st.integers(1, 99))
def test_percentage_counts_from_the_expiry(lifetime: float, percent: int) -> None:
    before = Percentage(percent)
    planned = plan_renewal(issued_at=0, not_after=lifetime, renew_before=before, renew_after_s=None, jitter=0.5)
    assert planned == pytest.approx(min(max(lifetime * (1 - percent / 100), 1), lifetime - 1), abs=1e-6)


@given(lifetimes, st.data())
def test_renew_before_longer_than_the_lifetime_is_ignored(lifetime: float, data: st.DataObject) -> None:
    """An issuer can grant a shorter lifetime than requested. This must not cause a renewal loop."""
    before = data.draw(st.floats(lifetime + 1e-3, 1e10))
    assert renew_after(lifetime, before=before) == pytest.approx(lifetime * RENEWAL_FRACTION, abs=1e-6)


@given(st.floats(60, 1e9), spans, st.data())
@example(HOUR, 2 * HOUR, None)
def test_earlier_renew_after_has_precedence(lifetime: float, before: float | None, data: st.DataObject | None) -> None:
    after = data.draw(st.floats(1, lifetime)) if data else 600.0
    without = renew_after(lifetime, before=before)
    assert renew_after(lifetime, before=before, after=after) == pytest.approx(min(after, without), abs=1e-6)


@given(st.floats(60, 1e9), st.data(), st.floats(-1e9, 0))
def test_renew_after_in_the_past_is_ignored(lifetime: float, data: st.DataObject, after: float) -> None:
    before = data.draw(st.none() | st.floats(0, 2 * lifetime))
    assert renew_after(lifetime, before=before, after=after) == renew_after(lifetime, before=before)


@given(lifetimes, spans, spans, jitters)
def test_jitter_is_a_tenth_of_the_shorter_side(lifetime: float, before: Span, after: Span, jitter: float) -> None:
    """Volumes that were published together are renewed at different times."""
    planned = renew_after(lifetime, before=before, after=after)
    shift = renew_after(lifetime, before=before, after=after, jitter=jitter) - planned
    assert shift == pytest.approx((2 * jitter - 1) * JITTER * min(planned, lifetime - planned), abs=1e-6)


@given(st.floats(60, 1e9), jitters, st.data())
def test_request_for_an_earlier_renewal_is_never_later(lifetime: float, jitter: float, data: st.DataObject) -> None:
    less, more = sorted(data.draw(st.tuples(*[st.floats(0.001, lifetime - 0.001)] * 2)))
    slack = 1e-6
    assert (
        renew_after(lifetime, before=more, jitter=jitter) <= renew_after(lifetime, before=less, jitter=jitter) + slack
    )
    assert renew_after(lifetime, after=less, jitter=jitter) <= renew_after(lifetime, after=more, jitter=jitter) + slack


@given(lifetimes, lifetimes, jitters)
def test_longer_lifetime_is_never_renewed_earlier(one: float, other: float, jitter: float) -> None:
    shorter, longer = sorted([one, other])
    assert renew_after(shorter, jitter=jitter) <= renew_after(longer, jitter=jitter) + 1e-6


@given(st.floats(60, 1e9), st.one_of(st.floats(0, 1e9), st.just(math.inf)), jitters)
def test_late_or_first_certificate_is_renewed_earlier(lifetime: float, late: float, jitter: float) -> None:
    """By at most the delay and half of the default time, so that nodes that renewed together are spread again."""
    usual = renew_after(lifetime, jitter=jitter, issued=0)
    moved = renew_after(lifetime, jitter=jitter, late=late, issued=0)
    assert usual - min(late, lifetime * RENEWAL_FRACTION / 2) - 1e-3 <= moved <= usual + 1e-3


@given(st.floats(60, 1e9), jitters, st.data())
def test_lateness_does_not_change_renew_before(lifetime: float, jitter: float, data: st.DataObject) -> None:
    before = data.draw(st.floats(1, lifetime - 1))
    plans = {renew_after(lifetime, before=before, jitter=jitter, late=late, issued=0) for late in (0.0, math.inf)}
    assert len(plans) == 1


@given(st.sampled_from(FailureKind), st.integers(1, 10**6), jitters)
def test_retry_delay_is_limited(kind: FailureKind, attempt: int, jitter: float) -> None:
    delay = retry_delay_s(attempt=attempt, kind=kind, jitter=jitter)
    assert math.isfinite(delay)
    assert 0.75 <= delay <= (37.5 if kind.retry is Retry.BACKOFF else 375)


@given(st.sampled_from(FailureKind), st.integers(1, 100), jitters, jitters)
def test_retry_delays_grow(kind: FailureKind, attempt: int, jitter: float, other: float) -> None:
    delay = retry_delay_s(attempt=attempt, kind=kind, jitter=jitter)
    assert delay <= retry_delay_s(attempt=attempt + 1, kind=kind, jitter=jitter)
    assert retry_delay_s(attempt=attempt + 1, kind=kind, jitter=other) <= delay * 2 * 1.25 / 0.75 + 1e-9


def test_retry_delays_in_an_outage() -> None:
    delays = [retry_delay_s(attempt=attempt, kind=FailureKind.UNAVAILABLE, jitter=0.5) for attempt in range(1, 9)]
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    assert retry_delay_s(attempt=20, kind=FailureKind.NOT_ALLOWED, jitter=0.5) == 300


def test_delay_doubles_until_the_cap() -> None:
    backoff = Backoff(1, 15)
    assert [backoff.delay_s(failures) for failures in (1, 2, 3, 4, 5, 10_000)] == [1, 2, 4, 8, 15, 15]


def test_factor_changes_the_growth() -> None:
    assert Backoff(0.5, 60, factor=4).delay_s(3) == 8


@pytest.mark.parametrize("rng, expected", [(0.0, 5.0), (0.5, 10.0), (0.75, 12.5)])
def test_jitter_spreads_the_delay_around_the_computed_value(rng: float, expected: float) -> None:
    assert Backoff(10, 10, jitter=0.5).delay_s(7, rng) == expected
