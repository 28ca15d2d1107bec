"""A node asks as fast as the authority answers: one probe at a time in an outage, more with each round of answers after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.renewal import catch_up_delay_s, probe_delay_s
from csi_driver.node.issuance.pace import PACED, SIDE_BY_SIDE, SILENCE, Pace
from csi_driver.node.renewal.agenda import Agenda
from csi_driver.node.renewal.rotation import wait_s

_HOUR = 3600.0
_AWAY, _BUSY = CertmountError(Reason.AUTHORITY_UNAVAILABLE, "gone"), CertmountError(Reason.AUTHORITY_OVERLOADED, "busy")


def _pace(width: float = 1.0) -> Pace:
    return Pace(lambda: 0.5, width)


def _room(pace: Pace, now: float, left_s: float = 0.0) -> int:
    """How many calls may begin now."""
    begun = 0
    while pace.wait_s(now, left_s) == 0:
        pace.begin()
        begun += 1
    for _ in range(begun):
        pace.end()
    return begun


def test_answers_make_room_round_by_round() -> None:
    """One more side by side with each round of answers, up to eight."""
    pace, rooms = _pace(), []
    for _ in range(10):
        rooms.append(_room(pace, 0.0))
        for _ in range(rooms[-1]):
            pace.heard(pace.stamp, None, 0.0)
    assert rooms[0] == 1
    assert rooms[-1] == SIDE_BY_SIDE
    assert all(later - sooner in (0, 1) for sooner, later in pairwise(rooms))


@pytest.mark.parametrize("reason", sorted(SILENCE, key=str))
def test_one_probe_at_a_time_in_an_outage(reason: Reason) -> None:
    """Whatever keeps certificates from coming: one call, then a pause, up to about half a minute for what is urgent."""
    pace, now, gaps = _pace(SIDE_BY_SIDE), 0.0, []
    for _ in range(9):
        pace.heard(pace.stamp, CertmountError(reason, "gone"), now)
        gaps.append(pace.wait_s(now, 60.0))
        now += gaps[-1]
        assert _room(pace, now) == 1
    assert gaps == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert str(pace.trouble) == f"{reason}: gone"
    assert pace.heard(pace.stamp, None, now + 5) == now + 5
    assert str(pace.trouble) == "None"
    assert _room(pace, now + 5) == 1


def test_eight_that_fail_together_are_one_failure() -> None:
    """What began before a pause tells nothing new; the pause is as after one."""
    pace = _pace(SIDE_BY_SIDE)
    stamp = pace.stamp
    for _ in range(SIDE_BY_SIDE):
        pace.heard(stamp, _AWAY, 0.0)
    assert pace.wait_s(0.0, 0.0) == 1


def test_calls_that_no_one_paces_do_not_put_off_the_probe() -> None:
    """Kubelets ask on in an outage: their failures lengthen no pause that is under way, their success ends it."""
    pace = _pace()
    for _ in range(6):
        pace.heard(pace.stamp, _AWAY, 0.0)
    before = pace.wait_s(0.0, 0.0)
    for second in range(1, int(before)):
        pace.heard(pace.stamp, _AWAY, float(second))
    assert pace.wait_s(0.0, 0.0) == before
    assert pace.heard(pace.stamp, None, 0.5) == 0.5
    assert pace.wait_s(0.5, 0.0) == 0


def test_a_busy_authority_is_asked_for_less() -> None:
    """Half as many side by side and a pause; eight answers undo one refusal, so that the next pause is longer than the last."""
    pace, pauses = _pace(SIDE_BY_SIDE), []
    for second in range(0, 400, 100):
        pace.heard(pace.stamp, _BUSY, float(second))
        pauses.append(pace.wait_s(float(second), 0.0))
        pace.heard(pace.stamp, None, second + 50.0)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[0]
    assert pace.trouble is None
    assert _room(pace, 390.0) == 2
    for _ in range(100):
        pace.heard(pace.stamp, None, 400.0)
    pace.heard(pace.stamp, _BUSY, 500.0)
    assert pace.wait_s(500.0, 0.0) == pauses[0]


def test_a_limit_of_one_pod_is_no_pause_for_the_others() -> None:
    """TooManyRequests is of the pod or the node itself: less side by side, and no pause."""
    pace = _pace(SIDE_BY_SIDE)
    pace.heard(pace.stamp, CertmountError(Reason.TOO_MANY_REQUESTS, "slower"), 0.0)
    assert _room(pace, 0.0) == SIDE_BY_SIDE // 2


@pytest.mark.parametrize("reason", sorted(set(Reason) - PACED, key=str))
def test_other_failures_are_answers(reason: Reason) -> None:
    """Whoever refuses a name is there: what is wrong with one volume holds up no other."""
    pace = _pace(4)
    pace.heard(pace.stamp, CertmountError(reason, "no"), 0.0)
    assert _room(pace, 0.0) == 4


@given(st.floats(1, 50), st.floats(-1e6, 1e9), st.floats(0, 1))
def test_who_can_wait_probes_less_often(attempt: float, left_s: float, jitter: float) -> None:
    """A pause is under a minute for what ends soon, and never over a fortieth of what is left but for that, nor 12.5 minutes."""
    delay = probe_delay_s(attempt=attempt, left_s=left_s, jitter=jitter)
    assert 0.75 <= delay <= 1.25 * max(30.0, min(left_s / 40, 600.0))
    assert delay >= probe_delay_s(attempt=attempt, left_s=min(left_s, 60.0), jitter=jitter) - 1e-9


@given(st.floats(0, 1e6), st.floats(-1e6, 1e9), st.floats(0, 1))
def test_catching_up_takes_no_one_to_the_end_of_its_life(silence_s: float, left_s: float, jitter: float) -> None:
    """It is put off by as long as the silence was at most, by a quarter of what is left at most, and not at all once it has ended."""
    delay = catch_up_delay_s(silence_s=silence_s, left_s=left_s, jitter=jitter)
    assert 0 <= delay <= max(min(silence_s, left_s / 4), 0)


@dataclass
class _Moment:
    when: float
    until: float


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("schedule"), st.sampled_from("abcde"), st.integers(0, 50), st.integers(0, 50)),
        st.tuples(st.just("cancel"), st.sampled_from("abcde"), st.just(0), st.just(0)),
        st.tuples(st.just("take"), st.just(""), st.integers(0, 10), st.just(0)),
        st.tuples(st.just("put off"), st.just(""), st.integers(0, 10), st.just(0)),
    ),
    max_size=60,
)


@given(_steps)
def test_the_agenda_does_what_a_list_would(steps: list[tuple[str, str, int, int]]) -> None:
    """What is due is taken in the order of its urgency, never early, never twice, whatever is set anew meanwhile."""
    agenda, model, now = Agenda(), dict[str, _Moment](), 0.0
    for kind, volume, number, until in steps:
        if kind == "schedule":
            agenda.schedule(volume, now + number, now + until)
            model[volume] = _Moment(now + number, now + until)
        elif kind == "cancel":
            agenda.cancel(volume)
            model.pop(volume, None)
        elif kind == "put off":
            agenda.put_off(now, lambda left, number=number: number + max(left, 0) / 4)  # type: ignore[misc]
            for moment in model.values():
                if moment.when <= now:
                    moment.when = now + number + max(moment.until - now, 0) / 4
        else:
            now += number
            due = {name: moment for name, moment in model.items() if moment.when <= now}
            assert agenda.backlog(now) == len(due)
            assert agenda.left_s(now) == min((moment.until - now for moment in due.values()), default=math.inf)
            taken = agenda.take(now)
            assert (taken is None) == (not due)
            if taken is not None:
                assert due[taken].until == min(moment.until for moment in due.values())
                del model[taken]
        nearest = min((max(moment.when - now, 0) for moment in model.values()), default=math.inf)
        assert agenda.wait_s(now) == nearest
    assert len(agenda) == len(model)


def test_a_pause_is_not_counted_before_something_is_due() -> None:
    """How long a pause is depends on who waits; while nobody does, the next moment is what matters."""
    agenda, pace = Agenda(), _pace()
    for moment in (0.0, 100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0):
        pace.heard(pace.stamp, _AWAY, moment)
    agenda.schedule("a", 705.0, 800.0)
    assert wait_s(agenda, pace, 700.0, 700.0) == 5.0
    assert wait_s(agenda, pace, 705.0, 705.0) == 25.0
