"""Rotate the CA so that at every time all pods trust all valid certificates. Pure: the time is an argument.

| phase | signs | trusted | ends when |
| --- | --- | --- | --- |
| steady | the current CA | its roots | an administrator calls :func:`begin` |
| announcing | the current CA | also the next CA's roots | every replica that signs has read the phase |
| distributing | the current CA | also the next CA's roots | every node has acknowledged that its volumes contain all roots, and the next CA is valid |
| retiring | the next CA | both CAs' roots | the last certificate of the former CA has expired |

A replica signs nothing if it last read the state more than :data:`MAX_STATE_AGE_S` ago. Therefore every replica that
signs knows everything that was stored before. A node acknowledges a generation of the trusted roots. Its acknowledgement
counts only when no replica sends an older generation any more: a volume that is published after the driver restarts
contains only the roots of the response. Hence there are two phases before the switch: ``announcing`` ends with a new
generation, and nodes acknowledge that one.

The time of a phase starts when a replica has read it, not when it was decided, because saving can be slow. If the clock
of a replica was stepped, its time is uncertain: phases begin at the latest possible time, and end at the earliest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, unique

from csi_driver.core.errors import CertmountError, Fault, Reason

MAX_STATE_AGE_S = 30  # A replica that last read the state longer ago signs nothing
CLOCK_SKEW_S = 10  # the maximum difference between the clocks of replicas and nodes
_LAST_TIME = 253_402_300_799  # 9999-12-31T23:59:59Z, the last time that a certificate can contain
_LIFETIME_STEPS_S = (30, 60, 120, 300, 600, 1800, 3600, *(hours * 3600 for hours in (2, 4, 8, 12, 24)))
"""Recorded lifetimes are rounded up to these values, and above one day to doubled days, so that few of them are saved."""


@unique
class RotationPhase(Enum):
    """The phase of a rotation."""

    STEADY = "steady"
    ANNOUNCING = "announcing"
    DISTRIBUTING = "distributing"
    RETIRING = "retiring"

    @property
    def before_switch(self) -> bool:
        """True while there is a next CA that has signed nothing yet."""
        return self in (RotationPhase.ANNOUNCING, RotationPhase.DISTRIBUTING)


@dataclass(frozen=True, slots=True)
class Acknowledgements:
    """Which nodes have acknowledged a generation of the CA's roots, and which nodes must."""

    acknowledged: frozenset[str]
    expected: frozenset[str]

    @property
    def missing(self) -> frozenset[str]:
        """The nodes that have not acknowledged the generation yet."""
        return self.expected - self.acknowledged


@dataclass(frozen=True, slots=True)
class RetiredRoot:
    """A root (X.509 DER) whose CA no longer signs, and the longest lifetime in seconds of its CA's certificates."""

    root: bytes
    max_lifetime: int


@dataclass(frozen=True, slots=True)
class RotationState:
    """The state of the rotation. Times are Unix seconds."""

    phase: RotationPhase
    generation: int  # of the trusted roots: every other root set has a higher generation
    since: int = 0  # when a replica first read the phase from the store; 0 before that
    stopped: bool = False  # true if the rotation waits until an administrator resumes it
    max_lifetime: int = 0  # seconds: no certificate of the signing CA has a longer lifetime
    retired: tuple[RetiredRoot, ...] = ()

    @property
    def waits_for_nodes(self) -> bool:
        """True if the phase ends when every node has acknowledged the roots."""
        return self.phase is RotationPhase.DISTRIBUTING and not self.stopped

    def trusted_until(self, retired: RetiredRoot) -> int:
        # A replica that missed the switch signs for MAX_STATE_AGE_S at most, and with no lifetime that isn't recorded.
        # A CA without an end of its validity (RFC 5280 section 4.1.2.5) may have signed certificates without an end.
        return min(self.known_everywhere_at + retired.max_lifetime, _LAST_TIME)

    @property
    def known_everywhere_at(self) -> int:
        """When every replica that signs has read the phase."""
        return self.since + MAX_STATE_AGE_S + CLOCK_SKEW_S


def initial_state(now: int) -> RotationState:
    return RotationState(RotationPhase.STEADY, generation=now, since=now)


def begin(state: RotationState, now: int) -> RotationState:
    """Start to announce the next CA; raise CertmountError InvalidRequest if another rotation is in progress."""
    if state.phase is not RotationPhase.STEADY:
        raise _invalid("another rotation is in progress", "run certmount ca status")
    return _in_phase(state, RotationPhase.ANNOUNCING, now)


def stop(state: RotationState) -> RotationState:
    """Stop until :func:`resume`; raise CertmountError InvalidRequest if no rotation is in progress."""
    if state.phase is RotationPhase.STEADY:
        raise _invalid("no rotation is in progress, so there is nothing to stop")
    return replace(state, stopped=True)


def resume(state: RotationState) -> RotationState:
    return replace(state, stopped=False)


def discard(state: RotationState, now: int) -> RotationState:
    """Abandon the next CA.

    Raises CertmountError InvalidRequest after the switch, because pods then have certificates of the next CA.
    """
    if state.phase is RotationPhase.STEADY:
        raise _invalid("no rotation is in progress, so there is nothing to discard")
    if state.phase is RotationPhase.RETIRING:
        raise _invalid(
            "the new CA already signs, and pods have certificates that only its root verifies",
            "wait until the rotation is complete, then rotate again if you want another CA",
        )
    return replace(_in_phase(state, RotationPhase.STEADY, now), stopped=False)


def drop_retired(state: RotationState, now: int) -> RotationState:
    """Stop trusting the retired roots and all their certificates now, for a CA whose key was stolen.

    Raises CertmountError InvalidRequest if no root is retired, or if a replica may still sign with the former CA.
    """
    if state.phase is not RotationPhase.RETIRING:
        raise _invalid("no root is retired", "run certmount ca rotate; you can drop the root when the new CA signs")
    if not state.since or now < state.known_everywhere_at:
        raise _invalid("the new CA has just started to sign", f"retry in {MAX_STATE_AGE_S + CLOCK_SKEW_S} s")
    return replace(_in_phase(state, RotationPhase.STEADY, now), stopped=False, retired=())


def advance(
    state: RotationState,
    now: int,
    nodes: Acknowledgements,
    retiring_roots: Collection[bytes],
    *,
    latest: int | None = None,
    next_valid_from: int = 0,
) -> RotationState:
    """Return the state after the next transition, if it is due.

    ``now`` is the earliest possible time, and ``latest`` the latest, by default the same. ``nodes`` was read after
    ``now``, for the generation of the state. ``retiring_roots`` are the roots (DER) of the signing CA that the next CA
    doesn't have. The next CA does not sign before ``next_valid_from``, which is late if a clock that was ahead created it.
    """
    latest = now if latest is None else latest
    if not state.since or state.since > latest + CLOCK_SKEW_S:  # of a replica whose clock was fast
        return replace(state, since=latest)
    if state.stopped:
        return state
    if state.phase is RotationPhase.ANNOUNCING and now >= state.known_everywhere_at:
        return _in_phase(state, RotationPhase.DISTRIBUTING, now)
    if state.phase is RotationPhase.DISTRIBUTING and not nodes.missing and now >= next_valid_from:
        retired = tuple(RetiredRoot(root, state.max_lifetime) for root in retiring_roots)
        return replace(state, phase=RotationPhase.RETIRING, since=0, max_lifetime=0, retired=retired)
    if state.phase is RotationPhase.RETIRING and all(now >= state.trusted_until(each) for each in state.retired):
        return replace(_in_phase(state, RotationPhase.STEADY, now), retired=())
    return state


def record_lifetime(state: RotationState, seconds: float) -> RotationState:
    """Return the state to save before a certificate with this lifetime is signed."""
    return replace(state, max_lifetime=max(state.max_lifetime, _rounded_up(seconds)))


def adopt_unknown_ca(state: RotationState | None, now: int, last_generation: int, max_lifetime: int) -> RotationState:
    """Return the state for a CA that an administrator stored, which may have signed certificates of ``max_lifetime``.

    A rotation before its switch starts again with this CA.
    """
    state = state or initial_state(now)
    phase = RotationPhase.ANNOUNCING if state.phase.before_switch else state.phase
    generation = next_generation(last_generation, now)
    lifetime = max(state.max_lifetime, max_lifetime)
    return replace(state, phase=phase, since=0, generation=generation, max_lifetime=lifetime)


def next_generation(generation: int, now: int) -> int:
    """Return a higher generation, even if the clock was set back."""
    return max(generation + 1, now)


def _in_phase(state: RotationState, phase: RotationPhase, now: int) -> RotationState:
    return replace(state, phase=phase, since=0, generation=next_generation(state.generation, now))


def _rounded_up(seconds: float) -> int:
    for step in _LIFETIME_STEPS_S:
        if seconds <= step:
            return step
    step = _LIFETIME_STEPS_S[-1]
    while step < seconds:
        step *= 2
    return step


def _invalid(problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_REQUEST, Fault("rotation", problem, hint))
