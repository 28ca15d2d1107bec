"""The internal CA during a rotation, with several replicas, nodes and damaged states."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import encode_keyring, make_keyring
from csi_driver.authority.ca.rotation import RetiredRoot, RotationPhase, RotationState
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.ca.state import CAState, parse_ca_state
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.authority.ca.replicas import Nodes, authority, loaded, refresh_for, rotate
from tests.unit.authority.clock import Clock
from tests.unit.authority.memory_store import MemoryStore


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


async def test_replica_stops_signing_if_its_state_is_too_old(store: MemoryStore, clock: Clock) -> None:
    """Another CA may be current. After the next refresh it signs again."""
    ca = await loaded(store, clock)
    store.unavailable = True
    for seconds, usable in ((30, True), (1, False)):
        clock.forward(seconds)
        assert ca.usable is usable
    with pytest.raises(CertmountError, match="memory was last read 31 s ago") as refusal:
        await ca.record_lifetime(timedelta(seconds=1))
    assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE
    store.unavailable = False
    await ca.refresh()
    assert ca.usable


async def test_invalid_content_stops_signing_only_during_a_rotation(store: MemoryStore, clock: Clock) -> None:
    """Before the switch of a rotation, another replica may have switched just before."""
    ca = await loaded(store, clock)
    for rotating in (False, True):
        if rotating:
            await rotate(store, clock)
            await ca.refresh()
        valid = store.values
        store.put({**valid, "root.crt": Secret(b"?")})
        for _ in range(7):
            clock.forward(5)
            with pytest.raises(CertmountError, match=r"root\.crt"):
                await ca.refresh()
        assert ca.usable is not rotating
        store.put(valid)
        await ca.refresh()
        assert ca.usable


@pytest.mark.parametrize("step", [timedelta(minutes=10), timedelta(minutes=-10), timedelta(days=-20_000)])
async def test_clock_step_ends_no_phase_early(store: MemoryStore, clock: Clock, nodes: Nodes, step: timedelta) -> None:
    """A replica whose clock is stepped for 30 s, forward or back, keeps the former root as long as one with the right clock."""
    offset = timedelta()
    source, metrics = StoredCA(store, nodes), AuthorityMetrics(CollectorRegistry())
    ca = CertificateAuthority(source, metrics, lambda: clock.utc() + offset, elapsed=clock)
    old = await ca.refresh()
    await ca.record_lifetime(timedelta(minutes=5))
    await rotate(store, clock)
    begin = clock.now
    switched = None
    while switched is None or len(ca.root_set.roots) == 2:
        with suppress(CertmountError):  # with a slow clock, the new CA is not valid yet
            if (await ca.refresh()).root != old.root:
                switched = switched or clock.now
        nodes.generations = dict.fromkeys(("one", "two"), ca.root_set.generation)
        # Steps in each phase: at first in the announcement, then every two minutes.
        offset = step if (clock.now - begin) % 120 < 30 else timedelta()
        clock.forward(5)
        assert clock.now < begin + 1000
    assert switched is not None
    assert switched - begin >= 40
    assert clock.now - switched >= 300 + 40


async def test_current_ca_signs_until_a_next_ca_from_a_fast_clock_is_valid(
    store: MemoryStore, clock: Clock, nodes: Nodes
) -> None:
    first, second = authority(store, clock, nodes=nodes), authority(store, clock, nodes=nodes)
    old = await first.refresh()
    following = await rotate(store, Clock(clock.now + 600))
    valid_from = following.valid_from.timestamp()
    assert valid_from > clock.now + 500
    while (await second.refresh()).root == old.root:
        await first.refresh()
        assert first.usable
        assert second.usable
        nodes.generations = dict.fromkeys(("one", "two"), first.root_set.generation)
        clock.forward(5)
    assert valid_from <= clock.now < valid_from + 10
    assert (await second.refresh()).root == following.root


async def test_time_of_a_replica_with_a_fast_clock_does_not_block_a_rotation(store: MemoryStore, clock: Clock) -> None:
    """A replica that started with a clock in the year 2081 began the phase. Another one corrects the time of the phase."""
    wrong = Clock(clock.now + 50 * 365 * 86400)
    await authority(store, clock).refresh()
    await rotate(store, clock)
    fast = CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry()), clock.utc, elapsed=clock)
    fast._started = wrong.utc(), clock.now
    await fast.refresh()
    right = authority(store, clock)
    await refresh_for(right, clock, 60)
    assert (state := await StoredCA(store).read(clock.utc()))
    assert state.rotation.phase is RotationPhase.DISTRIBUTING


async def test_rotation_from_start_to_end(store: MemoryStore, clock: Clock, nodes: Nodes) -> None:
    """First both roots, then the new keys, then only the new root. The switch removes the former keys from the store."""
    published: list[RootSet] = []
    ca = authority(store, clock, nodes=nodes, on_roots_changed=published.append)
    old = await ca.refresh()
    await ca.record_lifetime(timedelta(minutes=10))
    new = await rotate(store, clock)
    await ca.refresh()
    both = (*old.roots_der, *new.roots_der)
    assert (ca.current.roots, ca.root_set.roots) == (old.roots, both)
    nodes.generations = dict.fromkeys(("one", "two"), ca.root_set.generation)
    await refresh_for(ca, clock, 60)
    assert ca.current.roots == old.roots, "acknowledgements of the announced generation do not count"
    nodes.generations["one"] = ca.root_set.generation
    await refresh_for(ca, clock, 60)
    assert ca.current.roots == old.roots, "a node is missing"
    nodes.unavailable = True
    nodes.generations["two"] = ca.root_set.generation
    await refresh_for(ca, clock, 60)
    assert ca.current.roots == old.roots, "it is unknown which nodes there are"
    nodes.unavailable = False
    await refresh_for(ca, clock, 10)
    assert ca.current.roots == new.roots
    assert ca.root_set.roots == both
    assert all(old_key not in store.values.values() for old_key in encode_keyring(old).values())
    assert not any(name.startswith("next.") for name in store.values)
    await refresh_for(ca, clock, 635)
    assert ca.root_set.roots == both, "a certificate for ten minutes may still be valid"
    await refresh_for(ca, clock, 10)
    assert ca.root_set.roots == new.roots_der
    assert published[-1] == ca.root_set
    generations = [each.generation for each in published]
    assert generations == sorted(generations)


@pytest.mark.parametrize("slow", [False, True])
async def test_next_ca_never_signs_if_nodes_are_unknown(
    store: MemoryStore, clock: Clock, nodes: Nodes, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """A slow list of nodes delays only the rotation."""
    monkeypatch.setattr("csi_driver.authority.ca.sources._NODES_TIMEOUT_S", 0.01)
    monkeypatch.setattr(nodes, "read", lambda _generation: asyncio.sleep(60))
    ca = authority(store, clock, nodes=nodes if slow else None)
    old = await ca.refresh()
    await rotate(store, clock)
    await refresh_for(ca, clock, 60 if slow else 600)
    assert ca.current.roots == old.roots
    assert ca.usable


async def test_replicas_make_each_transition_once(store: MemoryStore, clock: Clock, nodes: Nodes) -> None:
    """A replica that missed the transitions learns the result."""
    replicas = [authority(store, clock, nodes=nodes) for _ in range(3)]
    await asyncio.gather(*(replica.refresh() for replica in replicas))
    new = await rotate(store, clock)
    nodes.generations = dict.fromkeys(("one", "two"), 2**50)
    before = store.saves
    for _ in range(30):
        clock.forward(5)
        await asyncio.gather(*(replica.refresh() for replica in replicas[:2]))
    assert store.saves - before == 7, "four transitions, and the start of three phases"
    with pytest.raises(CertmountError, match="last read"):
        _ = replicas[2].current
    await replicas[2].refresh()
    assert [replica.current.roots for replica in replicas] == [new.roots] * 3
    assert len({replica.root_set for replica in replicas}) == 1


async def test_longer_lifetime_is_saved_before_signing(store: MemoryStore, clock: Clock) -> None:
    """Once for all waiting requests, rounded up, and never for a shorter lifetime."""
    ca = await loaded(store, clock)
    await asyncio.gather(*(ca.record_lifetime(timedelta(seconds=seconds)) for seconds in (40, 50, 45, 59)))
    assert store.saves == 2
    await ca.record_lifetime(timedelta(seconds=60))
    assert store.saves == 2
    store.unavailable = True
    await ca.record_lifetime(timedelta(seconds=60))
    with pytest.raises(CertmountError, match="memory: unavailable"):
        await ca.record_lifetime(timedelta(seconds=61))


async def test_ca_that_an_administrator_stored_gets_a_higher_generation(store: MemoryStore, clock: Clock) -> None:
    """Whether its state is missing, belongs to another CA, or is older than what nodes know."""
    ca = await loaded(store, clock)
    backup, published = store.values, [ca.root_set]
    for values in (
        encode_keyring(make_keyring(clock.utc())),
        {**backup, **encode_keyring(make_keyring(clock.utc()))},
        backup,
    ):
        store.put(values)
        await ca.refresh()
        assert encode_keyring(ca.current).items() <= values.items()
        published.append(ca.root_set)
    assert len({each.generation for each in published}) == 4
    assert published == sorted(published, key=lambda each: each.generation)
    other = await loaded(store, clock)
    assert other.root_set == ca.root_set, "it is saved, so all replicas publish the same"


async def test_new_ca_in_an_emptied_store_gets_a_higher_generation(store: MemoryStore, clock: Clock) -> None:
    ca = await loaded(store, clock)
    before = ca.root_set
    store.put({})
    await ca.refresh()
    assert ca.root_set.generation > before.generation
    assert ca.root_set.roots != before.roots


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"phase": "x"}',
        *(b'{"phase": "steady", "since": %s}' % x for x in (b"-1", b"1.5", b"true")),
    ],
)
async def test_damaged_state_is_an_error_and_is_kept(content: bytes, store: MemoryStore, clock: Clock) -> None:
    """A guessed state could remove a root too early."""
    await authority(store, clock).refresh()
    store.put({**store.values, "state.json": Secret(content)})
    with pytest.raises(CertmountError, match=r"state\.json: is damaged.*or delete state\.json") as failure:
        await authority(store, clock).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert store.values["state.json"] == Secret(content)


async def test_damaged_next_ca_can_be_deleted(store: MemoryStore, clock: Clock) -> None:
    """The error says how. Then the current CA signs as before."""
    old = await authority(store, clock).refresh()
    await rotate(store, clock)
    store.put({**store.values, "next.root.crt": Secret(b"?")})
    with pytest.raises(CertmountError, match=r"next\.root\.crt: .*delete every value whose name begins with next\."):
        await authority(store, clock).refresh()
    left = {name: value for name, value in store.values.items() if not name.startswith("next.")}
    store.put(left)
    ca = await loaded(store, clock)
    assert (ca.current.roots, ca.root_set.roots) == (old.roots, old.roots_der)
    assert (state := await StoredCA(store).read(clock.utc()))
    assert state.rotation.phase is RotationPhase.STEADY


async def test_rotation_to_too_many_roots_is_rejected(store: MemoryStore, clock: Clock) -> None:
    await authority(store, clock).refresh()
    following = make_keyring(clock.utc())
    many = replace(following, roots=(*following.roots, *(make_keyring(clock.utc()).root for _ in range(9))))
    with pytest.raises(CertmountError, match="the maximum is 10"):
        await StoredCA(store).change(clock.utc(), lambda state: state.begin_rotation(many, int(clock.now)))


async def test_too_many_roots_in_the_store_during_a_rotation_are_rejected(store: MemoryStore, clock: Clock) -> None:
    """Each value has few enough roots, but nodes would reject all of them together. The replica keeps the previous roots."""
    ca = await loaded(store, clock)
    others = [make_keyring(clock.utc()) for _ in range(10)]
    following = replace(others[0], roots=tuple(each.root for each in others[:3]))
    await StoredCA(store).change(clock.utc(), lambda state: state.begin_rotation(following, int(clock.now)))
    await ca.refresh()
    before, values = ca.root_set, store.values
    store.put({**values, "root.crt": Secret(b"".join(each.roots_pem for each in (ca.current, *others[3:])))})
    with pytest.raises(CertmountError, match=r"root\.crt: .*these are 11 roots; the maximum is 10"):
        await ca.refresh()
    assert ca.root_set == before


async def test_rotation_phase_is_a_metric(store: MemoryStore, clock: Clock) -> None:
    registry = CollectorRegistry()
    ca = await loaded(store, clock, registry)
    await rotate(store, clock)
    await ca.refresh()
    for phase in RotationPhase:
        value = registry.get_sample_value("certmount_ca_rotation", {"phase": phase.value})
        assert value == (phase is RotationPhase.ANNOUNCING)


NUMBERS = st.integers(0, 2**53 - 1)
CA, NEXT_CA, FORMER_CA = (make_keyring(Clock().utc()) for _ in range(3))


@given(
    phase=st.sampled_from(RotationPhase),
    generation=NUMBERS,
    since=NUMBERS,
    stopped=st.booleans(),
    life=NUMBERS,
    lives=st.lists(NUMBERS, max_size=2),
)
def test_every_state_is_read_back_as_saved(
    phase: RotationPhase, generation: int, since: int, stopped: bool, life: int, lives: list[int]
) -> None:
    retired = tuple(
        RetiredRoot(root, each) for root, each in zip((*FORMER_CA.roots_der, *NEXT_CA.roots_der), lives, strict=False)
    )
    state = RotationState(phase, generation, since, stopped, life, retired)
    saved = CAState(CA, NEXT_CA if phase.before_switch else None, state)
    found = parse_ca_state(saved.encode(), Clock().utc(), where="memory")
    assert found.saved
    assert (found.rotation, found.root_set) == (saved.rotation, saved.root_set)
    assert (found.next_keyring is None) == (saved.next_keyring is None)
    assert dict(found.encode()) == dict(saved.encode())
