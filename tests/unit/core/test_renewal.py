"""The renewal clock: never late, never before the certificate, never in a loop, and spread out by chance."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.errors import FailureKind
from csi_driver.core.renewal import JITTER, RENEWAL_FRACTION, plan_renewal, retry_delay_s

HOUR = 3600.0
ISSUED = 1_795_341_600.0

jitters = st.floats(0, 1)
lives = st.one_of(st.floats(0.01, 60), st.floats(60, 36_500 * 24 * HOUR))
spans = st.one_of(st.none(), st.floats(-10, 10), st.floats(0, 36_500 * 24 * HOUR))


def after(
    life: float, *, before: float | None = None, hint: float | None = None, jitter: float = 0.5, issued: float = ISSUED
) -> float:
    """Seconds from issuance to renewal."""
    planned = plan_renewal(
        issued_at=issued, not_after=issued + life, renew_before_s=before, renew_after_s=hint, jitter=jitter
    )
    return planned - issued


@given(lives, spans, spans, jitters)
@example(HOUR, HOUR, None, 0)
@example(HOUR, HOUR - 1e-3, None, 0)
@example(HOUR, 1e-6, None, 1)
@example(HOUR, None, 1e-6, 0)
def test_a_renewal_is_neither_late_nor_early(
    life: float, before: float | None, hint: float | None, jitter: float
) -> None:
    """Whatever user and issuer say, it lies inside the life, with room for it at the end and without a loop at the start."""
    margin = 0.85 * min(1.0, life / 3)
    assert margin - 1e-6 <= after(life, before=before, hint=hint, jitter=jitter) <= life - margin + 1e-6


@given(st.floats(-1e6, 0), spans, spans, jitters)
def test_a_certificate_without_a_life_is_renewed_at_once(
    life: float, before: float | None, hint: float | None, jitter: float
) -> None:
    """A clock that went wrong asks for a new one, not for a crash."""
    assert after(life, before=before, hint=hint, jitter=jitter) == 0


@given(lives)
def test_two_thirds_of_the_life_is_the_plan(life: float) -> None:
    """Where no one asks for anything else."""
    assert after(life) == pytest.approx(life * RENEWAL_FRACTION, abs=1e-6)


def test_an_hour_in_figures() -> None:
    """Forty minutes by default, and where a renew-before is zero or the whole life; else what was written."""
    figures = {None: 2400, 0: 2400, HOUR: 2400, 900: 2700, HOUR - 0.5: 1, 0.5: HOUR - 1}
    for before, planned in figures.items():
        assert after(HOUR, before=before, issued=0) == planned


@given(st.floats(60, 1e9), st.data())
def test_renew_before_counts_from_the_end(life: float, data: st.DataObject) -> None:
    """What the user writes is kept, where it leaves a second on either side."""
    before = data.draw(st.floats(1, life - 1))
    assert after(life, before=before) == pytest.approx(life - before, abs=1e-6)


@given(lives, st.data())
def test_a_renew_before_longer_than_the_granted_life_falls_back(life: float, data: st.DataObject) -> None:
    """The issuer gave less than was asked: two thirds, not a renewal without end."""
    before = data.draw(st.floats(life + 1e-3, 1e10))
    assert after(life, before=before) == pytest.approx(life * RENEWAL_FRACTION, abs=1e-6)


@given(st.floats(60, 1e9), spans, st.data())
@example(HOUR, 2 * HOUR, None)
def test_the_issuers_hint_wins_if_it_is_sooner(life: float, before: float | None, data: st.DataObject | None) -> None:
    """A hint within the life is never overslept, whatever ``renew-before`` says; a later one changes nothing."""
    hint = data.draw(st.floats(1, life)) if data else 600.0
    without = after(life, before=before)
    assert after(life, before=before, hint=hint) == pytest.approx(min(hint, without), abs=1e-6)


@given(st.floats(60, 1e9), st.data(), st.floats(-1e9, 0))
def test_a_hint_that_has_passed_is_no_hint(life: float, data: st.DataObject, hint: float) -> None:
    """Zero and less say nothing; the user's word stands."""
    before = data.draw(st.none() | st.floats(0, 2 * life))
    assert after(life, before=before, hint=hint) == after(life, before=before)


@given(lives, spans, spans, jitters)
def test_chance_moves_a_renewal_both_ways_by_a_tenth_of_the_room(
    life: float, before: float | None, hint: float | None, jitter: float
) -> None:
    """Volumes mounted together drift apart, and none leaves its side of the plan."""
    planned = after(life, before=before, hint=hint)
    room = min(planned, life - planned)
    moved = after(life, before=before, hint=hint, jitter=jitter) - planned
    assert moved == pytest.approx((2 * jitter - 1) * JITTER * room, abs=1e-6)


@given(lives, spans, spans, jitters, jitters)
def test_more_chance_is_never_sooner(
    life: float, before: float | None, hint: float | None, one: float, other: float
) -> None:
    """Chance spreads evenly: its order is the renewals' order."""
    sooner, later = sorted([one, other])
    first = after(life, before=before, hint=hint, jitter=sooner)
    assert first <= after(life, before=before, hint=hint, jitter=later)


@given(st.floats(60, 1e9), jitters, st.data())
def test_asking_for_an_earlier_renewal_never_makes_it_later(life: float, jitter: float, data: st.DataObject) -> None:
    """A longer ``renew-before`` within the life, or a sooner hint, is a sooner renewal."""
    less, more = sorted(data.draw(st.tuples(*[st.floats(0.001, life - 0.001)] * 2)))
    slack = 1e-6
    assert after(life, before=more, jitter=jitter) <= after(life, before=less, jitter=jitter) + slack
    assert after(life, hint=less, jitter=jitter) <= after(life, hint=more, jitter=jitter) + slack


@given(lives, lives, jitters)
def test_a_longer_life_is_never_renewed_sooner(one: float, other: float, jitter: float) -> None:
    """Where only the life differs."""
    shorter, longer = sorted([one, other])
    assert after(shorter, jitter=jitter) <= after(longer, jitter=jitter) + 1e-6


@given(st.sampled_from(FailureKind), st.integers(1, 10**6), jitters)
def test_a_retry_comes_within_its_bounds(kind: FailureKind, attempt: int, jitter: float) -> None:
    """Never at once; within 37.5 s where the cause may pass by itself, else within seven minutes."""
    delay = retry_delay_s(attempt=attempt, kind=kind, jitter=jitter)
    assert math.isfinite(delay)
    assert 0.75 <= delay <= (37.5 if kind.retryable else 375)


@given(st.sampled_from(FailureKind), st.integers(1, 100), jitters, jitters)
def test_retries_back_off(kind: FailureKind, attempt: int, jitter: float, other: float) -> None:
    """The same chance never makes a later retry shorter; two retries in a row differ by no more than doubling and chance."""
    delay = retry_delay_s(attempt=attempt, kind=kind, jitter=jitter)
    assert delay <= retry_delay_s(attempt=attempt + 1, kind=kind, jitter=jitter)
    assert retry_delay_s(attempt=attempt + 1, kind=kind, jitter=other) <= delay * 2 * 1.25 / 0.75 + 1e-9


def test_the_first_hour_of_an_outage() -> None:
    """Doubling from a second to half a minute, then steadily: at most about two tries a minute."""
    delays = [retry_delay_s(attempt=attempt, kind=FailureKind.UNAVAILABLE, jitter=0.5) for attempt in range(1, 9)]
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    assert retry_delay_s(attempt=20, kind=FailureKind.NOT_ALLOWED, jitter=0.5) == 300


@given(st.floats(60, 1e9), st.one_of(st.floats(0, 1e9), st.just(math.inf)), jitters)
def test_what_came_late_or_first_is_renewed_earlier(life: float, late: float, jitter: float) -> None:
    """With jitter, by as much as it was late and half of the time at most, and never later than without; so a crowd disperses."""
    usual = after(life, jitter=jitter)
    moved = plan_renewal(
        issued_at=0, not_after=life, renew_before_s=None, renew_after_s=None, jitter=jitter, late_s=late
    )
    assert usual - min(late, life * RENEWAL_FRACTION / 2) - 1e-3 <= moved <= usual + 1e-3


@given(st.floats(60, 1e9), jitters, st.data())
def test_what_a_user_writes_is_kept_for_the_first_certificate_too(
    life: float, jitter: float, data: st.DataObject
) -> None:
    """``renew-before`` and an issuer's hint say when: lateness changes nothing then."""
    before = data.draw(st.floats(1, life - 1))
    plans = {
        plan_renewal(issued_at=0, not_after=life, renew_before_s=before, renew_after_s=None, jitter=jitter, late_s=late)
        for late in (0.0, math.inf)
    }
    assert len(plans) == 1
