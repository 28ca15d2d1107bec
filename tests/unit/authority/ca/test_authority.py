"""The internal CA: created once, renewed in time, rotated, and never replaced by invalid content."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.certificates import INTERMEDIATE_LIFETIME, ROOT_LIFETIME
from csi_driver.authority.ca.keyring import Keyring, encode_keyring, make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements, RetiredRoot, RotationPhase, RotationState
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.ca.state import CAState, parse_ca_state
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import until
from tests.unit.authority.clock import Clock
from tests.unit.authority.memory_store import MemoryStore


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class Nodes:
    """A cluster of two nodes."""

    def __init__(self) -> None:
        self.generations: dict[str, int] = {}
        self.unavailable = False

    async def read(self, generation: int) -> Acknowledgements:
        if self.unavailable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server is unavailable")
        acknowledged = frozenset(name for name, each in self.generations.items() if each >= generation)
        return Acknowledgements(acknowledged, frozenset({"one", "two"}))


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def authority(
    store: MemoryStore,
    clock: Clock,
    registry: CollectorRegistry | None = None,
    nodes: Nodes | None = None,
    on_roots_changed: Callable[[RootSet], None] = lambda _roots: None,
) -> CertificateAuthority:
    source, metrics = StoredCA(store, nodes), AuthorityMetrics(registry or CollectorRegistry())
    return CertificateAuthority(source, metrics, clock.utc, elapsed=clock, on_roots_changed=on_roots_changed)


async def rotate(store: MemoryStore, clock: Clock) -> Keyring:
    """Do what ``certmount ca rotate`` does, and return the next CA."""
    next_keyring = make_keyring(clock.utc())
    await StoredCA(store).change(clock.utc(), lambda state: state.begin_rotation(next_keyring, int(clock.now)))
    return next_keyring


async def refresh_for(ca: CertificateAuthority, clock: Clock, seconds: float) -> None:
    """Let time pass, with a refresh every five seconds."""
    while seconds > 0:
        clock.forward(min(5, seconds))
        seconds -= 5
        await ca.refresh()


async def test_ca_is_created_only_at_the_first_start(store: MemoryStore, clock: Clock) -> None:
    first = await authority(store, clock).refresh()
    second = await authority(store, clock).refresh()
    assert store.saves == 1
    assert first.root == second.root


async def test_replicas_that_start_together_share_one_ca(store: MemoryStore, clock: Clock) -> None:
    keyrings = await asyncio.gather(*(authority(store, clock).refresh() for _ in range(5)))
    assert store.saves == 1
    assert len({keyring.intermediate.certificate for keyring in keyrings}) == 1


async def test_intermediate_is_renewed_once_for_all_replicas(store: MemoryStore, clock: Clock) -> None:
    """At two thirds of its lifetime, with the same root."""
    replicas = [authority(store, clock) for _ in range(3)]
    before = [await replica.refresh() for replica in replicas]
    clock.forward(INTERMEDIATE_LIFETIME * 0.67)
    after = await asyncio.gather(*(replica.refresh() for replica in replicas))
    assert store.saves == 2
    assert {keyring.root for keyring in after} == {before[0].root}
    assert len({keyring.intermediate.certificate for keyring in [*before, *after]}) == 2


async def test_replica_uses_a_ca_that_someone_else_stored(store: MemoryStore, clock: Clock) -> None:
    replica = authority(store, clock)
    await replica.refresh()
    other = make_keyring(clock.utc())
    store.put(encode_keyring(other))
    await replica.refresh()
    assert replica.current.root == other.root


async def test_invalid_ca_in_the_store_is_never_overwritten(store: MemoryStore, clock: Clock) -> None:
    whole = encode_keyring(make_keyring(clock.utc()))
    store.values = {"root.crt": whole["root.crt"]}
    with pytest.raises(CertmountError) as failure:
        await authority(store, clock).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert store.values == {"root.crt": whole["root.crt"]}
    assert store.saves == 0


async def test_ca_keeps_signing_while_the_store_is_unavailable(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure is counted, and the next refresh succeeds when the store is back."""
    monkeypatch.setattr("csi_driver.authority.ca.authority.REFRESH_S", 0)
    registry = CollectorRegistry()
    ca = authority(store, clock, registry)
    keyring = await ca.refresh()
    refreshed: list[Keyring] = []

    async def on_refresh(keyring: Keyring) -> None:
        refreshed.append(keyring)

    def failures() -> float:
        return registry.get_sample_value("certmount_ca_refresh_failures_total") or 0

    store.unavailable = True
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(ca.run(on_refresh))
        await until(lambda: failures() >= 3, "three failures")
        assert ca.current is keyring
        assert not refreshed
        store.unavailable = False
        await until(lambda: refreshed, "a refresh")
        running.cancel()


async def test_endless_conflicts_are_a_retryable_error(store: MemoryStore, clock: Clock) -> None:
    replica = authority(store, clock)
    store.conflicting = [{} for _ in range(20)]
    with pytest.raises(CertmountError, match="updates conflicted with other writers") as failure:
        await replica.refresh()
    assert failure.value.retryable


async def test_ca_signs_nothing_before_it_is_loaded(store: MemoryStore, clock: Clock) -> None:
    replica = authority(store, clock)
    assert not replica.usable
    with pytest.raises(CertmountError, match="not loaded yet"):
        _ = replica.current


async def test_expired_intermediate_is_unusable_until_it_is_renewed(store: MemoryStore, clock: Clock) -> None:
    replica = authority(store, clock)
    await replica.refresh()
    clock.forward(INTERMEDIATE_LIFETIME + timedelta(seconds=1))
    assert not replica.usable
    await replica.refresh()
    assert replica.usable


async def test_expired_root_is_an_error(store: MemoryStore, clock: Clock) -> None:
    """A new root needs the decision of everyone who trusts it, so certmount doesn't create one."""
    await authority(store, clock).refresh()
    clock.forward(ROOT_LIFETIME)
    with pytest.raises(CertmountError, match="expired at"):
        await authority(store, clock).refresh()
    assert store.saves == 1


async def test_expiry_times_are_metrics(store: MemoryStore, clock: Clock) -> None:
    registry = CollectorRegistry()
    await authority(store, clock, registry).refresh()
    for role, life in (("root", ROOT_LIFETIME), ("intermediate", INTERMEDIATE_LIFETIME)):
        value = registry.get_sample_value("certmount_ca_expiry_timestamp_seconds", {"certificate": role})
        assert value == (clock.utc() + life).timestamp()


async def test_replica_stops_signing_if_its_state_is_too_old(store: MemoryStore, clock: Clock) -> None:
    """Another CA may be current. After the next refresh it signs again."""
    ca = authority(store, clock)
    await ca.refresh()
    store.unavailable = True
    usable = []
    for seconds in (30, 1):
        clock.forward(seconds)
        usable.append(ca.usable)
    assert usable == [True, False]
    with pytest.raises(CertmountError, match="memory was last read 31 s ago") as refusal:
        await ca.record_lifetime(timedelta(seconds=1))
    assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE
    store.unavailable = False
    await ca.refresh()
    assert ca.usable


async def test_invalid_content_stops_signing_only_during_a_rotation(store: MemoryStore, clock: Clock) -> None:
    """Before the switch of a rotation, another replica may have switched just before."""
    ca = authority(store, clock)
    await ca.refresh()
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


async def test_next_ca_never_signs_if_nodes_are_unknown(store: MemoryStore, clock: Clock) -> None:
    ca = authority(store, clock)
    old = await ca.refresh()
    await rotate(store, clock)
    await refresh_for(ca, clock, 600)
    assert ca.current.roots == old.roots


async def test_slow_node_list_delays_only_the_rotation(
    store: MemoryStore, clock: Clock, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csi_driver.authority.ca.sources._NODES_TIMEOUT_S", 0.01)
    monkeypatch.setattr(nodes, "read", lambda _generation: asyncio.sleep(60))
    ca = authority(store, clock, nodes=nodes)
    old = await ca.refresh()
    await rotate(store, clock)
    await refresh_for(ca, clock, 60)
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
    ca = authority(store, clock)
    await ca.refresh()
    await asyncio.gather(*(ca.record_lifetime(timedelta(seconds=seconds)) for seconds in (40, 50, 45, 59)))
    assert store.saves == 2
    await ca.record_lifetime(timedelta(seconds=60))
    assert store.saves == 2
    store.unavailable = True
    await ca.record_lifetime(timedelta(seconds=60))
    with pytest.raises(CertmountError, match="memory: unavailable"):
        await ca.record_lifetime(timedelta(seconds=61))


async def test_unchanged_store_is_not_parsed_again(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = authority(store, clock)
    await ca.refresh()
    keyring = await ca.refresh()
    monkeypatch.setattr("csi_driver.authority.ca.sources.parse_ca_state", None)
    assert await ca.refresh() is keyring


async def test_ca_that_an_administrator_stored_gets_a_higher_generation(store: MemoryStore, clock: Clock) -> None:
    """Whether its state is missing, belongs to another CA, or is older than what nodes know."""
    ca = authority(store, clock)
    await ca.refresh()
    backup, published = store.values, [ca.root_set]
    for values in (
        encode_keyring(make_keyring(clock.utc())),
        {**backup, **encode_keyring(make_keyring(clock.utc()))},
        backup,
    ):
        store.put(values)
        await ca.refresh()
        published.append(ca.root_set)
    assert len({each.generation for each in published}) == 4
    assert published == sorted(published, key=lambda each: each.generation)
    other = authority(store, clock)
    await other.refresh()
    assert other.root_set == ca.root_set, "it is saved, so all replicas publish the same"


async def test_new_ca_in_an_emptied_store_gets_a_higher_generation(store: MemoryStore, clock: Clock) -> None:
    ca = authority(store, clock)
    await ca.refresh()
    before = ca.root_set
    store.put({})
    await ca.refresh()
    assert ca.root_set.generation > before.generation
    assert ca.root_set.roots != before.roots


async def test_unknown_values_in_the_store_are_kept(store: MemoryStore, clock: Clock) -> None:
    others = {"serving.crt": Secret(b"s"), "note": Secret(b"n")}
    store.values = {**encode_keyring(make_keyring(clock.utc())), **others}
    await authority(store, clock).refresh()
    await rotate(store, clock)
    assert others.items() <= store.values.items()


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
    ca = authority(store, clock)
    await ca.refresh()
    assert (ca.current.roots, ca.root_set.roots) == (old.roots, old.roots_der)
    assert (state := await StoredCA(store).read(clock.utc()))
    assert state.rotation.phase is RotationPhase.STEADY


async def test_rotation_to_too_many_roots_is_rejected(store: MemoryStore, clock: Clock) -> None:
    await authority(store, clock).refresh()
    following = make_keyring(clock.utc())
    many = replace(following, roots=(*following.roots, *(make_keyring(clock.utc()).root for _ in range(9))))
    with pytest.raises(CertmountError, match="the maximum is 10"):
        await StoredCA(store).change(clock.utc(), lambda state: state.begin_rotation(many, int(clock.now)))


async def test_ca_in_files_gets_a_new_generation_only_for_new_roots(
    tmp_path: Path, clock: Clock, metrics: AuthorityMetrics
) -> None:

    def put(keyring: Keyring) -> None:
        for name, value in encode_keyring(keyring).items():
            (tmp_path / name).write_bytes(value.reveal())

    first = make_keyring(clock.utc())
    put(first)
    ca = CertificateAuthority(CAFiles(tmp_path, metrics), metrics, clock.utc, elapsed=clock)
    await ca.refresh()
    published = ca.root_set
    assert (await ca.record_lifetime(timedelta(days=900))).roots == first.roots
    put(first.renew_intermediate(clock.utc()))
    await ca.refresh()
    assert ca.root_set == published
    assert ca.current.intermediate.certificate != first.intermediate.certificate
    put(make_keyring(clock.utc()))
    await ca.refresh()
    assert ca.root_set.generation > published.generation


async def test_rotation_phase_is_a_metric(store: MemoryStore, clock: Clock) -> None:
    registry = CollectorRegistry()
    ca = authority(store, clock, registry)
    await ca.refresh()
    await rotate(store, clock)
    await ca.refresh()
    for phase in RotationPhase:
        value = registry.get_sample_value("certmount_ca_rotation", {"phase": phase.value})
        assert value == (phase is RotationPhase.ANNOUNCING)


async def test_expiring_certificate_is_logged_once_a_day(store: MemoryStore, clock: Clock) -> None:
    offline = replace(make_keyring(clock.utc()), root_key=None)
    store.values = encode_keyring(offline)
    ca = authority(store, clock)
    with structlog.testing.capture_logs() as logs:
        for hours in (0, 300 * 24, 23, 1):
            clock.forward(timedelta(hours=hours))
            await ca.refresh()
    warnings = [entry for entry in logs if "expires soon" in entry["event"]]
    assert [entry["certificate"] for entry in warnings] == ["intermediate.crt"] * 2


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
