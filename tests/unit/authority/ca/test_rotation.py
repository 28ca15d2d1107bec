"""The exchange of a root: a table of phases, and a model of replicas, nodes and certificates that looks for an outage."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.rotation import CLOCK_SKEW_S, MAX_STATE_AGE_S, RetiredRoot, RotationPhase, RotationState
from csi_driver.core.errors import CertmountError, Reason

NOW = 1_800_000_000
OLD = b"old"
WAIT = MAX_STATE_AGE_S + CLOCK_SKEW_S
STEADY = rotation.initial_state(NOW)
ANNOUNCING = rotation.begin(STEADY, NOW)


def step(state: RotationState, now: int, confirmed: str = "", expected: str = "") -> RotationState:
    return rotation.advance(state, now, set(confirmed), set(expected), [OLD])


def test_a_rotation_goes_through_its_phases_in_order() -> None:
    """Each counts from when it was first read, whatever the clock said when it was decided on."""
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
def test_what_is_stopped_stands_still_until_told(phase: RotationPhase) -> None:
    """In each phase that goes on by itself."""
    state = RotationState(
        phase, NOW, since=1, retired=(RetiredRoot(OLD, 1),) if phase is RotationPhase.RETIRING else ()
    )
    stopped = rotation.stop(state)
    assert step(stopped, NOW) == stopped
    assert rotation.resume(stopped) == state
    assert step(rotation.resume(stopped), NOW) != state


def test_only_what_can_be_undone_is_undone() -> None:
    """Before the switch the next CA has signed nothing; after it pods live by it."""
    for phase in (RotationPhase.ANNOUNCING, RotationPhase.DISTRIBUTING):
        assert rotation.discard(RotationState(phase, NOW, stopped=True), NOW).phase is RotationPhase.STEADY
    with pytest.raises(CertmountError, match="pods hold certificates that only its root vouches for") as refusal:
        rotation.discard(RotationState(RotationPhase.RETIRING, NOW), NOW)
    assert refusal.value.reason is Reason.INVALID_REQUEST
    for refused in (partial(rotation.discard, STEADY, NOW), partial(rotation.stop, STEADY)):
        with pytest.raises(CertmountError, match="none is under way"):
            refused()
    with pytest.raises(CertmountError, match="under way already"):
        rotation.begin(ANNOUNCING, NOW)


def test_a_life_is_written_a_handful_of_times() -> None:
    """Rounded up, never down; a longer one than before only."""
    state, written = STEADY, set()
    for seconds in range(1, 31 * 86400, 997):
        state = rotation.record_lifetime(state, seconds)
        assert state.max_lifetime >= seconds
        written.add(state.max_lifetime)
    assert len(written) <= 20
    assert rotation.record_lifetime(state, 1) == state
    assert rotation.record_lifetime(STEADY, 86400).max_lifetime == 86400


def test_a_ca_that_a_person_put_there_may_have_signed_anything() -> None:
    """Its certificates are waited for as long as they can be; a rotation begins again with it."""
    fresh = rotation.adopt_unknown_ca(None, NOW, 0, max_lifetime=500)
    assert (fresh.phase, fresh.generation, fresh.max_lifetime) == (RotationPhase.STEADY, NOW, 500)
    distributing = RotationState(RotationPhase.DISTRIBUTING, NOW + 5, since=3, max_lifetime=900)
    again = rotation.adopt_unknown_ca(distributing, NOW, NOW + 8, max_lifetime=500)
    assert (again.phase, again.since, again.generation, again.max_lifetime) == (
        RotationPhase.ANNOUNCING,
        0,
        NOW + 9,
        900,
    )


@dataclass(frozen=True)
class Roots:
    """A set of CAs, which are numbers here."""

    generation: int
    cas: frozenset[int]

    def or_newer(self, other: Roots) -> Roots:
        return other if other.generation > self.generation else self


NOTHING = Roots(0, frozenset())


@dataclass(frozen=True)
class Stored:
    """What the store of the model holds."""

    state: RotationState
    signing: int = 0
    following: int | None = None
    version: int = 0

    @property
    def trust(self) -> Roots:
        cas = {self.signing, *(int.from_bytes(each.root) for each in self.state.retired)}
        return Roots(self.state.generation, frozenset(cas if self.following is None else {*cas, self.following}))


@dataclass
class Replica:
    """What it has read last, when it began to, and what it is about to save."""

    view: Stored
    seen: int
    plan: Stored | None = None


@dataclass
class Volume:
    """What a pod trusts, whose certificate it has, and until when that is good."""

    trust: Roots
    ca: int
    end: int


@dataclass
class Node:
    """``known`` is its driver's memory."""

    volumes: list[Volume] = field(default_factory=list)
    known: Roots = NOTHING
    driver: bool = True


class Outage(AssertionError):
    """Two pods that follow the protocol don't trust each other."""


class Model:
    """Three replicas and up to three nodes. A replica that has read the state can save it much later, or never."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # a walk, not a secret
        self.now = NOW
        self.last_ca = 0
        self.store = Stored(STEADY)
        self.replicas = [Replica(self.store, NOW) for _ in range(3)]
        self.nodes: dict[str, Node] = {}
        self.confirmed: dict[str, int] = {}
        self.trace: list[str] = []
        self.switches = 0

    def walk(self, steps: int) -> None:
        actions = {
            self.wait: 10,
            self.read: 8,
            self.save: 8,
            self.issue: 12,
            self.hear: 10,
            self.confirm: 10,
            self.calm: 2,
            self.person: 2,
            self.restart_driver: 2,
            self.leave: 1,
        }
        for action in self.random.choices(list(actions), list(actions.values()), k=steps):
            action()
            self.trace.append(f"{self.now - NOW} {action.__name__}")
            self.check()

    def check(self) -> None:
        """No certificate that is good has a root that any volume lacks."""
        volumes = [volume for node in self.nodes.values() for volume in node.volumes]
        good = {volume.ca for volume in volumes if volume.end > self.now}
        for volume in volumes:
            if not good <= volume.trust.cas:
                raise Outage(f"{good} are in use, {volume}; {self.store}; {self.trace[-40:]}")

    def wait(self) -> None:
        self.now += self.random.choice([1, 1, 2, 5, 5, 10, 29, 31, 45, 130])

    def read(self) -> None:
        """A replica reads the store, and finds out what is due."""
        replica, store = self.random.choice(self.replicas), self.store
        expected = {name for name, node in self.nodes.items() if node.driver or name in self.confirmed}
        confirmed = {name for name, each in self.confirmed.items() if each >= store.state.generation}
        after = rotation.advance(store.state, self.now, confirmed, expected, [store.signing.to_bytes(4)])
        replica.view, replica.seen, replica.plan = store, self.now, None
        if after.phase is RotationPhase.RETIRING and store.following is not None:
            replica.plan = Stored(after, store.following, None, store.version + 1)
        elif after != store.state:
            replica.plan = replace(store, state=after, version=store.version + 1)

    def save(self) -> None:
        """It saves that, unless another one came first."""
        replica = self.random.choice(self.replicas)
        if replica.plan is not None and self.store.version == replica.view.version:
            self.switches += replica.plan.signing != self.store.signing
            self.store = replica.view = replica.plan
        replica.plan = None

    def person(self) -> None:
        state, following, now = self.store.state, self.store.following, self.now
        what = self.random.choice(["rotate", "rotate", "rotate", "rotate", "stop", "discard"])
        if what == "rotate" and state.phase is RotationPhase.STEADY:
            self.last_ca += 1
            state, following = rotation.begin(state, now), self.last_ca
        elif what == "rotate":
            state = rotation.resume(state)
        elif what == "stop" and state.phase is not RotationPhase.STEADY:
            state = rotation.stop(state)
        elif what == "discard" and state.phase.before_switch:
            state, following = rotation.discard(state, now), None
        self.store = replace(self.store, state=state, following=following, version=self.store.version + 1)

    def issue(self) -> None:
        """A volume gets a certificate where the replica may sign; the node keeps the newest roots that it knows."""
        replica, life = self.random.choice(self.replicas), self.random.choice([10, 30, 60, 120])
        node = self.nodes.setdefault(self.random.choice("abc"), Node())
        if self.now - replica.seen > MAX_STATE_AGE_S or not node.driver:
            return
        if life > replica.view.state.max_lifetime:
            state = rotation.record_lifetime(self.store.state, life)
            self.store = replace(self.store, state=state, version=self.store.version + 1)
            replica.view, replica.seen, replica.plan = self.store, self.now, None
        node.known = node.known.or_newer(replica.view.trust)
        volume = Volume(node.known, replica.view.signing, self.now + life)
        node.volumes = [*node.volumes[-2:], volume]

    def hear(self) -> None:
        """By the stream of any replica, however stale."""
        node = self._node()
        if node is not None and node.driver:
            node.known = node.known.or_newer(self.random.choice(self.replicas).view.trust)

    def confirm(self) -> None:
        """Once all volumes hold what is known; at a replica that knows of it too."""
        name = self.random.choice("abc")
        node = self.nodes.get(name)
        if node is None or not node.driver:
            return
        for volume in node.volumes:
            volume.trust = volume.trust.or_newer(node.known)
        if node.known.generation == self.random.choice(self.replicas).view.trust.generation:
            self.confirmed[name] = node.known.generation

    def calm(self) -> None:
        """What mostly happens within seconds, so that walks get through whole rotations."""
        for replica in self.replicas:
            replica.view, replica.seen = self.store, self.now
        for action in (self.hear, self.confirm, self.read, self.save):
            for _ in range(9):
                action()

    def restart_driver(self) -> None:
        """Stop or start a driver. Only the content of its volumes remains. The kubelet does not list a stopped driver."""
        name = self.random.choice("abc")
        node = self.nodes.get(name)
        if node is None or name not in self.confirmed:
            return  # A driver that stopped before its first acknowledgement is unknown.
        node.driver = not node.driver
        node.known = NOTHING
        for volume in node.volumes:
            node.known = node.known.or_newer(volume.trust)

    def leave(self) -> None:
        """A node, with all of its pods."""
        self.nodes.pop(self.random.choice("abc"), None)

    def _node(self) -> Node | None:
        return self.nodes.get(self.random.choice("abc"))


WALKS, STEPS = 500, 600


def walk_all(walks: int) -> int:
    """How often a next CA began to sign in that many walks."""
    switches = 0
    for seed in range(walks):
        model = Model(seed)
        model.walk(STEPS)
        switches += model.switches
    return switches


def test_no_walk_of_the_model_ends_in_an_outage() -> None:
    """Whatever is interleaved: slow and dead writers, stale replicas, stops, nodes that come, go and restart, lives of all lengths."""
    assert walk_all(WALKS) > WALKS, "the walks went nowhere"


BREAKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "confirmations are not waited for": (
        "advance",
        lambda advance: lambda s, now, c, _e, out: advance(s, now, c, (), out),
    ),
    "the phase counts from the decision": (
        "_in_phase",
        lambda _: (
            lambda s, phase, now: replace(
                s, phase=phase, since=now, generation=rotation.next_generation(s.generation, now)
            )
        ),
    ),
    "confirmations of the first round count": (
        "_in_phase",
        lambda in_phase: (
            lambda s, phase, now: (
                replace(s, phase=phase, since=0) if phase is RotationPhase.DISTRIBUTING else in_phase(s, phase, now)
            )
        ),
    ),
    "longer lives are not written": ("record_lifetime", lambda _: lambda s, _life: replace(s, max_lifetime=10)),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_model_finds_an_outage_where_a_rule_is_broken(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the walks above mean something."""
    name, change = BREAKS[broken]
    monkeypatch.setattr(rotation, name, change(getattr(rotation, name)))
    with pytest.raises(Outage):
        walk_all(3000)


@pytest.mark.parametrize("rule", ["known_everywhere_at", "trusted_until"])
def test_the_model_finds_an_outage_where_a_wait_is_left_out(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is needed: for replicas that do not know a phase yet, and for certificates that have not expired."""
    short = property(lambda state: state.since) if rule == "known_everywhere_at" else lambda state, _: state.since
    monkeypatch.setattr(RotationState, rule, short)
    with pytest.raises(Outage):
        walk_all(3000)
