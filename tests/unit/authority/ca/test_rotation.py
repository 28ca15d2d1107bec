"""CA rotation: its phases, and an executable model of replicas, nodes and certificates that searches for an outage."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.rotation import (
    CLOCK_SKEW_S,
    MAX_STATE_AGE_S,
    Acknowledgements,
    RetiredRoot,
    RotationPhase,
    RotationState,
)
from csi_driver.core.errors import CertmountError, Reason

NOW = 1_800_000_000
OLD = b"old"
WAIT = MAX_STATE_AGE_S + CLOCK_SKEW_S
STEADY = rotation.initial_state(NOW)
ANNOUNCING = rotation.begin(STEADY, NOW)


def step(state: RotationState, now: int, acknowledged: str = "", expected: str = "") -> RotationState:
    return rotation.advance(state, now, Acknowledgements(frozenset(acknowledged), frozenset(expected)), [OLD])


def test_phases_follow_in_order() -> None:
    """The time of each phase starts when the phase was first read, not when it was decided."""
    state = rotation.record_lifetime(ANNOUNCING, 55)
    assert (state.phase, state.since) == (RotationPhase.ANNOUNCING, 0)
    state = step(state, NOW + 100)
    assert state.since == NOW + 100
    assert step(state, NOW + 100 + WAIT - 1) == state
    state = step(state, NOW + 100 + WAIT)
    assert state.phase is RotationPhase.DISTRIBUTING
    state = step(state, NOW + 200)
    assert step(state, NOW + 9999, "a", "ab") == state
    state = step(state, NOW + 300, "abc", "ab")
    assert (state.phase, state.max_lifetime, state.retired) == (RotationPhase.RETIRING, 0, (RetiredRoot(OLD, 60),))
    state = step(state, NOW + 400)
    assert step(state, NOW + 400 + WAIT + 59) == state
    state = step(state, NOW + 400 + WAIT + 60)
    assert (state.phase, state.retired) == (RotationPhase.STEADY, ())


def test_each_changed_root_set_has_a_higher_generation() -> None:
    """Also if the clock was set back, and at the end of announcing, so that nodes acknowledge again. The switch changes no set."""
    generations = [STEADY.generation]
    for state in (
        announced := rotation.begin(STEADY, NOW - 50),
        distributing := step(replace(announced, since=1), NOW),
        rotation.discard(distributing, NOW),
        step(replace(distributing, phase=RotationPhase.RETIRING, since=1), NOW + 7),
    ):
        generations.append(state.generation)
    assert generations == [NOW, NOW + 1, NOW + 2, NOW + 3, NOW + 7]
    switched = step(replace(distributing, since=1), NOW)
    assert (switched.phase, switched.generation) == (RotationPhase.RETIRING, distributing.generation)


@pytest.mark.parametrize("phase", [RotationPhase.ANNOUNCING, RotationPhase.DISTRIBUTING, RotationPhase.RETIRING])
def test_stopped_rotation_waits_until_it_is_resumed(phase: RotationPhase) -> None:
    state = RotationState(
        phase, NOW, since=1, retired=(RetiredRoot(OLD, 1),) if phase is RotationPhase.RETIRING else ()
    )
    stopped = rotation.stop(state)
    assert step(stopped, NOW) == stopped
    assert rotation.resume(stopped) == state
    assert step(rotation.resume(stopped), NOW) != state


def test_discard_is_possible_only_before_the_switch() -> None:
    for phase in (RotationPhase.ANNOUNCING, RotationPhase.DISTRIBUTING):
        assert rotation.discard(RotationState(phase, NOW, stopped=True), NOW).phase is RotationPhase.STEADY
    with pytest.raises(CertmountError, match="pods have certificates that only its root verifies") as refusal:
        rotation.discard(RotationState(RotationPhase.RETIRING, NOW), NOW)
    assert refusal.value.reason is Reason.INVALID_REQUEST
    for refused in (partial(rotation.discard, STEADY, NOW), partial(rotation.stop, STEADY)):
        with pytest.raises(CertmountError, match="no rotation is in progress"):
            refused()
    with pytest.raises(CertmountError, match="another rotation is in progress"):
        rotation.begin(ANNOUNCING, NOW)


def test_recorded_lifetimes_are_rounded_up_to_few_values() -> None:
    state, written = STEADY, set()
    for seconds in range(1, 31 * 86400, 997):
        state = rotation.record_lifetime(state, seconds)
        assert state.max_lifetime >= seconds
        written.add(state.max_lifetime)
    assert len(written) <= 20
    assert rotation.record_lifetime(state, 1) == state
    assert rotation.record_lifetime(STEADY, 86400).max_lifetime == 86400


def test_unknown_ca_may_have_signed_certificates() -> None:
    """Its certificates delay the next rotation as long as they can be valid. A rotation in progress starts again."""
    fresh = rotation.adopt_unknown_ca(None, NOW, 0, max_lifetime=500)
    assert (fresh.phase, fresh.generation, fresh.max_lifetime) == (RotationPhase.STEADY, NOW, 500)
    distributing = RotationState(RotationPhase.DISTRIBUTING, NOW + 5, since=3, max_lifetime=900)
    again = rotation.adopt_unknown_ca(distributing, NOW, NOW + 8, max_lifetime=500)
    assert again == RotationState(RotationPhase.ANNOUNCING, NOW + 9, since=0, max_lifetime=900)


@dataclass(frozen=True)
class Roots:
    """A root set. The CAs are numbers."""

    generation: int
    cas: frozenset[int]

    def or_newer(self, other: Roots) -> Roots:
        return other if other.generation > self.generation else self


NOTHING = Roots(0, frozenset())


@dataclass(frozen=True)
class Stored:
    """The content of the store."""

    state: RotationState
    signing: int = 0
    next_ca: int | None = None
    version: int = 0

    @property
    def trust(self) -> Roots:
        cas = {self.signing, *(int.from_bytes(each.root) for each in self.state.retired)}
        return Roots(self.state.generation, frozenset(cas if self.next_ca is None else {*cas, self.next_ca}))


@dataclass
class Replica:
    """What a replica has read, when it read that, and what it will save."""

    view: Stored
    seen: int
    plan: Stored | None = None


@dataclass
class Volume:
    """What a pod trusts, which CA signed its certificate, and when that expires."""

    trust: Roots
    ca: int
    end: int


@dataclass
class Node:
    """``known`` is the state of the driver process."""

    volumes: list[Volume] = field(default_factory=list)
    known: Roots = NOTHING
    driver: bool = True


class Outage(AssertionError):
    """Two pods don't trust each other."""


class Model:
    """Three replicas and up to three nodes. A replica that has read the state can save it much later, or never."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # not a secret
        self.now = NOW
        self.last_ca = 0
        self.store = Stored(STEADY)
        self.replicas = [Replica(self.store, NOW) for _ in range(3)]
        self.nodes: dict[str, Node] = {}
        self.acknowledged: dict[str, int] = {}
        self.trace: list[str] = []
        self.switches = 0

    def walk(self, steps: int) -> None:
        actions = {
            self.wait: 10, self.read: 8, self.save: 8, self.issue: 12, self.receive_roots: 10, self.acknowledge: 10,
            self.settle: 2, self.act_as_administrator: 2, self.restart_driver: 2, self.remove_node: 1,
        }  # fmt: skip
        for action in self.random.choices(list(actions), list(actions.values()), k=steps):
            action()
            self.trace.append(f"{self.now - NOW} {action.__name__}")
            self.check()

    def check(self) -> None:
        """Check that every volume trusts the root of every valid certificate."""
        volumes = [volume for node in self.nodes.values() for volume in node.volumes]
        in_use = {volume.ca for volume in volumes if volume.end > self.now}
        for volume in volumes:
            if not in_use <= volume.trust.cas:
                raise Outage(f"{in_use} are in use, {volume}; {self.store}; {self.trace[-40:]}")

    def wait(self) -> None:
        self.now += self.random.choice([1, 1, 2, 5, 5, 10, 29, 31, 45, 130])

    def read(self) -> None:
        """A replica reads the store and decides on the next transition."""
        replica, store = self.random.choice(self.replicas), self.store
        expected = frozenset(name for name, node in self.nodes.items() if node.driver or name in self.acknowledged)
        acknowledged = frozenset(name for name, each in self.acknowledged.items() if each >= store.state.generation)
        nodes = Acknowledgements(acknowledged, expected)
        after = rotation.advance(store.state, self.now, nodes, [store.signing.to_bytes(4)])
        replica.view, replica.seen, replica.plan = store, self.now, None
        if after.phase is RotationPhase.RETIRING and store.next_ca is not None:
            replica.plan = Stored(after, store.next_ca, None, store.version + 1)
        elif after != store.state:
            replica.plan = replace(store, state=after, version=store.version + 1)

    def save(self) -> None:
        """A replica saves its decision, unless the store changed."""
        replica = self.random.choice(self.replicas)
        if replica.plan is not None and self.store.version == replica.view.version:
            self.switches += replica.plan.signing != self.store.signing
            self.store = replica.view = replica.plan
        replica.plan = None

    def act_as_administrator(self) -> None:
        state, next_ca, now = self.store.state, self.store.next_ca, self.now
        what = self.random.choice(["rotate", "rotate", "rotate", "rotate", "stop", "discard"])
        if what == "rotate" and state.phase is RotationPhase.STEADY:
            self.last_ca += 1
            state, next_ca = rotation.begin(state, now), self.last_ca
        elif what == "rotate":
            state = rotation.resume(state)
        elif what == "stop" and state.phase is not RotationPhase.STEADY:
            state = rotation.stop(state)
        elif what == "discard" and state.phase.before_switch:
            state, next_ca = rotation.discard(state, now), None
        self.store = replace(self.store, state=state, next_ca=next_ca, version=self.store.version + 1)

    def issue(self) -> None:
        """A replica that may sign issues a certificate. The node keeps the newest roots that it knows."""
        replica, lifetime = self.random.choice(self.replicas), self.random.choice([10, 30, 60, 120])
        node = self.nodes.setdefault(self.random.choice("abc"), Node())
        if self.now - replica.seen > MAX_STATE_AGE_S or not node.driver:
            return
        if lifetime > replica.view.state.max_lifetime:
            state = rotation.record_lifetime(self.store.state, lifetime)
            self.store = replace(self.store, state=state, version=self.store.version + 1)
            replica.view, replica.seen, replica.plan = self.store, self.now, None
        node.known = node.known.or_newer(replica.view.trust)
        volume = Volume(node.known, replica.view.signing, self.now + lifetime)
        node.volumes = [*node.volumes[-2:], volume]

    def receive_roots(self) -> None:
        """A node receives the roots of any replica, however stale."""
        node = self._node()
        if node is not None and node.driver:
            node.known = node.known.or_newer(self.random.choice(self.replicas).view.trust)

    def acknowledge(self) -> None:
        """A node updates all volumes, then acknowledges to a replica that knows the same generation."""
        name = self.random.choice("abc")
        node = self.nodes.get(name)
        if node is None or not node.driver:
            return
        for volume in node.volumes:
            volume.trust = volume.trust.or_newer(node.known)
        if node.known.generation == self.random.choice(self.replicas).view.trust.generation:
            self.acknowledged[name] = node.known.generation

    def settle(self) -> None:
        """Let everything happen that usually takes seconds, because otherwise few walks complete a rotation."""
        for replica in self.replicas:
            replica.view, replica.seen = self.store, self.now
        for action in (self.receive_roots, self.acknowledge, self.read, self.save):
            for _ in range(9):
                action()

    def restart_driver(self) -> None:
        """Stop or start a driver. Only the content of its volumes remains. The kubelet does not list a stopped driver."""
        name = self.random.choice("abc")
        node = self.nodes.get(name)
        if node is None or name not in self.acknowledged:
            return  # A driver that stopped before its first acknowledgement is unknown.
        node.driver = not node.driver
        node.known = NOTHING
        for volume in node.volumes:
            node.known = node.known.or_newer(volume.trust)

    def remove_node(self) -> None:
        self.nodes.pop(self.random.choice("abc"), None)

    def _node(self) -> Node | None:
        return self.nodes.get(self.random.choice("abc"))


WALKS, STEPS = 500, 600


def walk_all(walks: int) -> int:
    switches = 0
    for seed in range(walks):
        model = Model(seed)
        model.walk(STEPS)
        switches += model.switches
    return switches


def test_no_walk_of_the_model_ends_in_an_outage() -> None:
    """Slow and stopped writers, stale replicas, stops, nodes that appear, restart and disappear, and all lifetimes."""
    assert walk_all(WALKS) > WALKS, "the walks completed too few rotations"


def ignore_acknowledgements(advance: Any) -> Any:
    nobody = Acknowledgements(frozenset(), frozenset())
    return lambda state, now, _nodes, roots: advance(state, now, nobody, roots)


def start_with_the_decision(in_phase: Any) -> Any:
    return lambda state, phase, now: replace(in_phase(state, phase, now), since=now)


def count_the_announced_generation(in_phase: Any) -> Any:
    def broken(state: RotationState, phase: RotationPhase, now: int) -> RotationState:
        new: RotationState = in_phase(state, phase, now)
        return replace(new, generation=state.generation) if phase is RotationPhase.DISTRIBUTING else new

    return broken


BREAKS: list[tuple[str, Callable[[Any], Any]]] = [
    ("advance", ignore_acknowledgements),
    ("_in_phase", start_with_the_decision),
    ("_in_phase", count_the_announced_generation),
    ("record_lifetime", lambda _: lambda state, _seconds: replace(state, max_lifetime=10)),
]


@pytest.mark.parametrize("name, change", BREAKS)
def test_model_finds_an_outage_if_a_rule_is_broken(
    name: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, name, change(getattr(rotation, name)))
    with pytest.raises(Outage):
        walk_all(3000)


@pytest.mark.parametrize("rule", ["known_everywhere_at", "trusted_until"])
def test_model_finds_an_outage_without_a_wait(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = property(lambda state: state.since) if rule == "known_everywhere_at" else lambda state, _: state.since
    monkeypatch.setattr(RotationState, rule, short)
    with pytest.raises(Outage):
        walk_all(3000)
