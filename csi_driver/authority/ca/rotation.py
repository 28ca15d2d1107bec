"""How one root comes after another without a moment in which two pods don't trust each other. Pure: time is an argument.

| phase | signs | is trusted | ends |
| --- | --- | --- | --- |
| steady | the CA | its roots | by a person: :func:`begin` |
| announcing | the CA | and the next one's | when every replica that signs has heard of it |
| distributing | the CA | likewise | when every node has confirmed that its volumes hold both |
| retiring | the next CA | likewise | when the last certificate of the former one has ended |

A replica that has not read the state for :data:`MAX_STATE_AGE_S` signs nothing, so whatever was written that long ago is known to
all who sign. A node confirms a generation of the trusted roots; it may only count once no replica answers with an older
one, as a volume that is published after a restart of its driver holds no more than its answer said. Hence two phases
before the switch: ``announcing`` ends with a new generation, and that one is confirmed.

A phase counts from when a replica has read it, not from when it was decided on: between the two a writer may be slow.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, unique

from csi_driver.core.errors import CertmountError, Fault, Reason

MAX_STATE_AGE_S = 30
"""Seconds since its last reading of the state after which a replica signs no more."""
CLOCK_SKEW_S = 10
"""By how much the clocks of replicas and nodes may differ."""
_STEPS_S = (30, 60, 120, 300, 600, 1800, 3600, *(hours * 3600 for hours in (2, 4, 8, 12, 24)))
"""A life counts as the next longer of these, so that the state is written a handful of times; beyond a day, in whole days doubled."""


@unique
class RotationPhase(Enum):
    """Where a rotation stands."""

    STEADY = "steady"
    ANNOUNCING = "announcing"
    DISTRIBUTING = "distributing"
    RETIRING = "retiring"

    @property
    def before_switch(self) -> bool:
        """True while there is a next CA that signs nothing yet."""
        return self in (RotationPhase.ANNOUNCING, RotationPhase.DISTRIBUTING)


@dataclass(frozen=True, slots=True)
class RetiredRoot:
    """A root (X.509 DER) that signs no more; ``life`` is the longest, in seconds, that its CA gave a certificate."""

    root: bytes
    life: int


@dataclass(frozen=True, slots=True)
class RotationState:
    """All times are unix seconds."""

    phase: RotationPhase
    generation: int
    """Of the trusted roots: each other set of them has a higher one."""
    since: int = 0
    """When the phase was first read from the store; 0 while that has not been."""
    stopped: bool = False
    """True: nothing goes on by itself until a person says so."""
    longest_life: int = 0
    """Seconds: no certificate of the CA that signs was given a longer one."""
    retired: tuple[RetiredRoot, ...] = ()

    def trusted_until(self, retired: RetiredRoot) -> int:
        """When the last certificate of a retired root has ended."""
        # A replica that has missed the switch goes on for STALE_S at the most, and gives no longer life unwritten.
        return self.since + MAX_STATE_AGE_S + CLOCK_SKEW_S + retired.life

    @property
    def announced_at(self) -> int:
        """When every replica that signs has heard of the phase."""
        return self.since + MAX_STATE_AGE_S + CLOCK_SKEW_S


def initial_state(now: int) -> RotationState:
    """Of a CA that has signed nothing yet."""
    return RotationState(RotationPhase.STEADY, generation=now, since=now)


def begin(state: RotationState, now: int) -> RotationState:
    """From now on the next CA's roots are trusted too.

    Raises:
        CertmountError: InvalidRequest while another rotation is under way.
    """
    if state.phase is not RotationPhase.STEADY:
        raise _refused("a rotation is under way already", "see certmount ca status")
    return _in_phase(state, RotationPhase.ANNOUNCING, now)


def stop(state: RotationState) -> RotationState:
    """Nothing goes on until :func:`resume`; raises CertmountError InvalidRequest where nothing is under way."""
    if state.phase is RotationPhase.STEADY:
        raise _refused("none is under way, so there is nothing to stop")
    return replace(state, stopped=True)


def resume(state: RotationState) -> RotationState:
    """After :func:`stop`: whatever is due comes at the next :func:`advance`."""
    return replace(state, stopped=False)


def discard(state: RotationState, now: int) -> RotationState:
    """Gives the next CA up.

    Raises:
        CertmountError: InvalidRequest after the switch, as there are certificates then that only its root vouches for.
    """
    if state.phase is RotationPhase.STEADY:
        raise _refused("none is under way, so there is nothing to discard")
    if state.phase is RotationPhase.RETIRING:
        raise _refused(
            "the new CA signs already, and pods hold certificates that only its root vouches for",
            "let it end, then rotate once more if you want another CA",
        )
    return replace(_in_phase(state, RotationPhase.STEADY, now), stopped=False)


def drop(state: RotationState, now: int) -> RotationState:
    """The former roots go now, with all that they vouch for; for a CA whose key was stolen.

    Raises:
        CertmountError: InvalidRequest while nothing is retired, or a replica may not have heard yet that it must not sign.
    """
    if state.phase is not RotationPhase.RETIRING:
        raise _refused("no root is retired", "a root can be dropped when another CA signs: certmount ca rotate")
    if not state.since or now < state.announced_at:
        raise _refused("the new CA has only begun to sign", f"try again in {MAX_STATE_AGE_S + CLOCK_SKEW_S} s")
    return replace(_in_phase(state, RotationPhase.STEADY, now), stopped=False, retired=())


def advance(
    state: RotationState, now: int, confirmed: Collection[str], expected: Collection[str], leaving: Collection[bytes]
) -> RotationState:
    """The state after all that is due, one phase at a time.

    ``confirmed`` and ``expected`` are nodes, read after ``now``: those that have confirmed the state's generation, and
    those that must. ``leaving`` are the roots (DER) of the CA that signs which the next one does not have.
    """
    if not state.since:
        return replace(state, since=now)
    if state.stopped:
        return state
    if state.phase is RotationPhase.ANNOUNCING and now >= state.announced_at:
        return _in_phase(state, RotationPhase.DISTRIBUTING, now)
    if state.phase is RotationPhase.DISTRIBUTING and set(expected) <= set(confirmed):
        retired = tuple(RetiredRoot(root, state.longest_life) for root in leaving)
        return replace(state, phase=RotationPhase.RETIRING, since=0, longest_life=0, retired=retired)
    if state.phase is RotationPhase.RETIRING and all(now >= state.trusted_until(each) for each in state.retired):
        return replace(_in_phase(state, RotationPhase.STEADY, now), retired=())
    return state


def record_lifetime(state: RotationState, seconds: float) -> RotationState:
    """A certificate of this life is about to be signed: write the state first, where it changes."""
    return replace(state, longest_life=max(state.longest_life, _rounded_up(seconds)))


def adopt(state: RotationState | None, now: int, last_generation: int, longest_life: int) -> RotationState:
    """A CA that a person has put there: what it has signed is unknown, ``longest_life`` what it may have given at the most.

    A rotation that was under way before its switch begins again with the CA that is there now.
    """
    state = state or initial_state(now)
    phase = RotationPhase.ANNOUNCING if state.phase.before_switch else state.phase
    generation = next_generation(last_generation, now)
    life = max(state.longest_life, longest_life)
    return replace(state, phase=phase, since=0, generation=generation, longest_life=life)


def next_generation(generation: int, now: int) -> int:
    """Higher than the one before, also where the clock was set back."""
    return max(generation + 1, now)


def _in_phase(state: RotationState, phase: RotationPhase, now: int) -> RotationState:
    return replace(state, phase=phase, since=0, generation=next_generation(state.generation, now))


def _rounded_up(seconds: float) -> int:
    for step in _STEPS_S:
        if seconds <= step:
            return step
    step = _STEPS_S[-1]
    while step < seconds:
        step *= 2
    return step


def _refused(problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_REQUEST, Fault("rotation", problem, hint))
