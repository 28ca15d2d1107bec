"""The CA as it lives: made once, renewed in time, never replaced by something worse."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
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
from csi_driver.authority.ca.key_pairs import INTERMEDIATE_LIFETIME, ROOT_LIFETIME
from csi_driver.authority.ca.keyring import Keyring, encode_keyring, make_keyring
from csi_driver.authority.ca.rotation import RetiredRoot, RotationPhase, RotationState
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.ca.state import CAState, parse_ca_state
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.waiting import until
from tests.unit.authority.clock import Clock


class MemoryStore:
    """Keeps values in memory; ``others`` are what other replicas write just before a save."""

    name = "memory"

    def __init__(self) -> None:
        self.values: Mapping[str, Secret[bytes]] = {}
        self.version = 0
        self.saves = 0
        self.down = False
        self.others: list[Mapping[str, Secret[bytes]]] = []

    async def load(self) -> StoredSecrets:
        await asyncio.sleep(0)
        if self.down:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "memory: lost")
        return StoredSecrets(self.values, str(self.version))

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        await asyncio.sleep(0)
        if self.others:
            self.values, self.version = self.others.pop(), self.version + 1
        if based_on.version != str(self.version):
            return False
        self.values, self.version, self.saves = values, self.version + 1, self.saves + 1
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


class Nodes:
    """A fleet of two nodes."""

    def __init__(self) -> None:
        self.confirmed: dict[str, int] = {}
        self.down = False

    async def look(self, generation: int) -> tuple[frozenset[str], frozenset[str]]:
        if self.down:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the API server is away")
        confirmed = frozenset(name for name, each in self.confirmed.items() if each >= generation)
        return confirmed, frozenset({"one", "two"})


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def authority(
    store: MemoryStore, clock: Clock, registry: CollectorRegistry | None = None, nodes: Nodes | None = None
) -> CertificateAuthority:
    metrics = AuthorityMetrics(registry or CollectorRegistry())
    return CertificateAuthority(StoredCA(store), metrics, clock.utc, fleet=nodes, elapsed=clock)


async def rotate(store: MemoryStore, clock: Clock) -> Keyring:
    """What ``certmount ca rotate`` does; gives the next CA."""
    following = make_keyring(clock.utc())
    await StoredCA(store).change(clock.utc(), lambda holdings: holdings.begin_rotation(following, int(clock.now)))
    return following


async def past(ca: CertificateAuthority, clock: Clock, seconds: float) -> None:
    """Lets time pass as it does for a replica, reading every five seconds."""
    while seconds > 0:
        clock.forward(min(5, seconds))
        seconds -= 5
        await ca.refresh()


async def test_the_ca_is_made_at_the_first_start_only(store: MemoryStore, clock: Clock) -> None:
    """Every later start finds it."""
    first = await authority(store, clock).refresh()
    second = await authority(store, clock).refresh()
    assert store.saves == 1
    assert first.root == second.root


async def test_replicas_that_start_at_once_share_one_ca(store: MemoryStore, clock: Clock) -> None:
    """Whoever loses the race takes what the winner saved."""
    keyrings = await asyncio.gather(*(authority(store, clock).refresh() for _ in range(5)))
    assert store.saves == 1
    assert len({keyring.intermediate.certificate for keyring in keyrings}) == 1


async def test_a_new_intermediate_is_made_once_for_all_replicas(store: MemoryStore, clock: Clock) -> None:
    """At two thirds of its life, under the same root."""
    replicas = [authority(store, clock) for _ in range(3)]
    before = [await replica.refresh() for replica in replicas]
    clock.forward(INTERMEDIATE_LIFETIME * 0.67)
    after = await asyncio.gather(*(replica.refresh() for replica in replicas))
    assert store.saves == 2
    assert {keyring.root for keyring in after} == {before[0].root}
    assert len({keyring.intermediate.certificate for keyring in [*before, *after]}) == 2


async def test_a_replica_sees_what_another_saved(store: MemoryStore, clock: Clock) -> None:
    """Also a whole new root, such as an administrator puts there."""
    replica = authority(store, clock)
    await replica.refresh()
    other = make_keyring(clock.utc())
    store.values, store.version = encode_keyring(other), store.version + 1
    await replica.refresh()
    assert replica.current.root == other.root


async def test_a_store_with_a_wrong_ca_is_never_overwritten(store: MemoryStore, clock: Clock) -> None:
    """A half-filled or damaged one is an error for people, not an empty one."""
    whole = encode_keyring(make_keyring(clock.utc()))
    store.values = {"root.crt": whole["root.crt"]}
    with pytest.raises(CertmountError) as failure:
        await authority(store, clock).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert store.values == {"root.crt": whole["root.crt"]}
    assert store.saves == 0


async def test_what_is_held_outlasts_a_store_that_fails(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates go on to be issued; the failure is counted, and the next turn tries again."""
    monkeypatch.setattr("csi_driver.authority.ca.authority.REFRESH_S", 0)
    registry = CollectorRegistry()
    ca = authority(store, clock, registry)
    held = await ca.refresh()
    adopted: list[Keyring] = []

    async def adopt(keyring: Keyring) -> None:
        adopted.append(keyring)

    def failures() -> float:
        return registry.get_sample_value("certmount_ca_refresh_failures_total") or 0

    store.down = True
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(ca.run(adopt))
        await until(lambda: failures() >= 3, "three failures")
        assert ca.current is held
        assert not adopted
        store.down = False
        await until(lambda: adopted, "a refresh")
        running.cancel()


async def test_writers_without_end_are_an_error(store: MemoryStore, clock: Clock) -> None:
    """A store on which someone else always comes first is not tried for ever."""
    replica = authority(store, clock)
    store.others = [{} for _ in range(20)]
    with pytest.raises(CertmountError, match="updates conflicted with other writers") as failure:
        await replica.refresh()
    assert failure.value.retryable


async def test_before_it_is_loaded_nothing_is_signed(store: MemoryStore, clock: Clock) -> None:
    """Whoever asks is told to come again."""
    replica = authority(store, clock)
    assert not replica.usable
    with pytest.raises(CertmountError, match="not loaded yet"):
        _ = replica.current


async def test_an_expired_intermediate_makes_it_unusable_until_renewed(store: MemoryStore, clock: Clock) -> None:
    """Not ready, but healed by the root as soon as the store can be reached."""
    replica = authority(store, clock)
    await replica.refresh()
    clock.forward(INTERMEDIATE_LIFETIME + timedelta(seconds=1))
    assert not replica.usable
    await replica.refresh()
    assert replica.usable


async def test_an_expired_root_is_said_in_words(store: MemoryStore, clock: Clock) -> None:
    """A new root must be every trusting party's decision, so it is not made silently."""
    await authority(store, clock).refresh()
    clock.forward(ROOT_LIFETIME)
    with pytest.raises(CertmountError, match="expired at"):
        await authority(store, clock).refresh()
    assert store.saves == 1


async def test_the_ends_of_the_ca_are_metrics(store: MemoryStore, clock: Clock) -> None:
    """So that an alarm can be set long before."""
    registry = CollectorRegistry()
    await authority(store, clock, registry).refresh()
    for role, life in (("root", ROOT_LIFETIME), ("intermediate", INTERMEDIATE_LIFETIME)):
        value = registry.get_sample_value("certmount_ca_expiry_timestamp_seconds", {"certificate": role})
        assert value == (clock.utc() + life).timestamp()


async def test_who_has_not_read_for_long_signs_no_more(store: MemoryStore, clock: Clock) -> None:
    """Another CA may sign by then; with the next reading it goes on."""
    ca = authority(store, clock)
    await ca.refresh()
    store.down = True
    usable = []
    for seconds in (30, 1):
        clock.forward(seconds)
        usable.append(ca.usable)
    assert usable == [True, False]
    with pytest.raises(CertmountError, match="memory was last read 31 s ago") as refusal:
        await ca.record_lifetime(timedelta(seconds=1))
    assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE
    store.down = False
    await ca.refresh()
    assert ca.usable


async def test_unusable_content_stops_it_only_where_a_switch_may_be_missed(store: MemoryStore, clock: Clock) -> None:
    """A person's mistake is no outage while one CA signs; during a rotation another replica may have done the switch just before."""
    ca = authority(store, clock)
    await ca.refresh()
    for rotating in (False, True):
        if rotating:
            await rotate(store, clock)
            await ca.refresh()
        good, store.version = store.values, store.version + 1
        store.values = {**good, "root.crt": Secret(b"?")}
        for _ in range(7):
            clock.forward(5)
            with pytest.raises(CertmountError, match=r"root\.crt"):
                await ca.refresh()
        assert ca.usable is not rotating
        store.values, store.version = good, store.version + 1
        await ca.refresh()
        assert ca.usable


async def test_a_rotation_from_the_first_step_to_the_last(store: MemoryStore, clock: Clock, nodes: Nodes) -> None:
    """Both roots first, then the new keys, then the new root alone; the store forgets the former keys with the switch."""
    told: list[RootSet] = []
    ca = CertificateAuthority(
        store, AuthorityMetrics(CollectorRegistry()), clock.utc, fleet=nodes, elapsed=clock, tell=told.append
    )
    old = await ca.refresh()
    await ca.record_lifetime(timedelta(minutes=10))
    new = await rotate(store, clock)
    await ca.refresh()
    both = (*old.roots_der, *new.roots_der)
    assert (ca.current.roots, ca.root_set.roots) == (old.roots, both)
    nodes.confirmed = dict.fromkeys(("one", "two"), ca.root_set.generation)
    await past(ca, clock, 60)
    assert ca.current.roots == old.roots, "the first round of confirmations does not count"
    nodes.confirmed["one"] = ca.root_set.generation
    await past(ca, clock, 60)
    assert ca.current.roots == old.roots, "a node is missing"
    nodes.down = True
    nodes.confirmed["two"] = ca.root_set.generation
    await past(ca, clock, 60)
    assert ca.current.roots == old.roots, "no one can say which nodes there are"
    nodes.down = False
    await past(ca, clock, 10)
    assert ca.current.roots == new.roots
    assert ca.root_set.roots == both
    assert all(old_key not in store.values.values() for old_key in encode_keyring(old).values())
    assert not any(name.startswith("next.") for name in store.values)
    await past(ca, clock, 635)
    assert ca.root_set.roots == both, "a certificate of ten minutes may still be good"
    await past(ca, clock, 10)
    assert ca.root_set.roots == new.roots_der
    assert told[-1] == ca.root_set
    assert sorted({each.generation for each in told}) == list(dict.fromkeys(each.generation for each in told))


async def test_without_word_of_the_nodes_no_next_ca_signs(store: MemoryStore, clock: Clock) -> None:
    """However long it takes."""
    ca = authority(store, clock)
    old = await ca.refresh()
    await rotate(store, clock)
    await past(ca, clock, 600)
    assert ca.current.roots == old.roots


async def test_nodes_that_take_too_long_to_list_hold_up_nothing_else(
    store: MemoryStore, clock: Clock, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotation waits; certificates are signed meanwhile."""
    monkeypatch.setattr("csi_driver.authority.ca.sources._NODES_TIMEOUT_S", 0.01)
    monkeypatch.setattr(nodes, "look", lambda _generation: asyncio.sleep(60))
    ca = authority(store, clock, nodes=nodes)
    old = await ca.refresh()
    await rotate(store, clock)
    await past(ca, clock, 60)
    assert ca.current.roots == old.roots
    assert ca.usable


async def test_replicas_do_each_step_once(store: MemoryStore, clock: Clock, nodes: Nodes) -> None:
    """And one that was away learns what the others have done."""
    replicas = [authority(store, clock, nodes=nodes) for _ in range(3)]
    await asyncio.gather(*(replica.refresh() for replica in replicas))
    new = await rotate(store, clock)
    nodes.confirmed = dict.fromkeys(("one", "two"), 2**50)
    before = store.saves
    for _ in range(30):
        clock.forward(5)
        await asyncio.gather(*(replica.refresh() for replica in replicas[:2]))
    assert store.saves - before == 7, "three phases begin, each is stamped when first read, and so is the last"
    with pytest.raises(CertmountError, match="last read"):
        _ = replicas[2].current
    await replicas[2].refresh()
    assert [replica.current.roots for replica in replicas] == [new.roots] * 3
    assert len({replica.root_set for replica in replicas}) == 1


async def test_a_longer_life_is_saved_before_it_is_signed(store: MemoryStore, clock: Clock) -> None:
    """Once for all who wait, in steps, and not at all for what is no longer than before."""
    ca = authority(store, clock)
    await ca.refresh()
    await asyncio.gather(*(ca.record_lifetime(timedelta(seconds=seconds)) for seconds in (40, 50, 45, 59)))
    assert store.saves == 2
    await ca.record_lifetime(timedelta(seconds=60))
    assert store.saves == 2
    store.down = True
    await ca.record_lifetime(timedelta(seconds=60))
    with pytest.raises(CertmountError, match="memory: lost"):
        await ca.record_lifetime(timedelta(seconds=61))


async def test_nothing_is_parsed_while_nothing_changes(
    store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading every five seconds costs its request and no more."""
    ca = authority(store, clock)
    await ca.refresh()
    held = await ca.refresh()
    monkeypatch.setattr("csi_driver.authority.ca.sources.parse_ca_state", None)
    assert await ca.refresh() is held


async def test_a_ca_that_a_person_put_there_is_told_as_something_newer(store: MemoryStore, clock: Clock) -> None:
    """Whether its state is missing, another's, or older than what nodes were told."""
    ca = authority(store, clock)
    await ca.refresh()
    backup, told = store.values, [ca.root_set]
    for values in (
        encode_keyring(make_keyring(clock.utc())),
        {**backup, **encode_keyring(make_keyring(clock.utc()))},
        backup,
    ):
        store.values, store.version = values, store.version + 1
        await ca.refresh()
        told.append(ca.root_set)
    assert len({each.generation for each in told}) == 4
    assert told == sorted(told, key=lambda each: each.generation)
    other = authority(store, clock)
    await other.refresh()
    assert other.root_set == ca.root_set, "it is saved, so all replicas say the same"


async def test_an_emptied_store_is_told_as_something_newer(store: MemoryStore, clock: Clock) -> None:
    """In the same second even."""
    ca = authority(store, clock)
    await ca.refresh()
    before = ca.root_set
    store.values, store.version = {}, store.version + 1
    await ca.refresh()
    assert ca.root_set.generation > before.generation
    assert ca.root_set.roots != before.roots


async def test_values_of_others_are_kept(store: MemoryStore, clock: Clock) -> None:
    """The authority's own root, and whatever else lies there."""
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
        *(b'{"phase": "steady", "since": %s}' % bad for bad in (b"-1", b"1.5", b"true")),
    ],
)
async def test_a_damaged_state_is_said_and_stays(content: bytes, store: MemoryStore, clock: Clock) -> None:
    """What is made up in its place might drop a root too early."""
    await authority(store, clock).refresh()
    store.values, store.version = {**store.values, "state.json": Secret(content)}, store.version + 1
    with pytest.raises(CertmountError, match=r"state\.json: is damaged.*or remove state\.json") as failure:
        await authority(store, clock).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert store.values["state.json"] == Secret(content)


async def test_a_next_ca_that_is_damaged_can_be_given_up_by_hand(store: MemoryStore, clock: Clock) -> None:
    """The error says how; then one CA signs as before."""
    old = await authority(store, clock).refresh()
    await rotate(store, clock)
    store.values, store.version = {**store.values, "next.root.crt": Secret(b"?")}, store.version + 1
    with pytest.raises(CertmountError, match=r"next\.root\.crt: .*remove every value whose name begins with next\."):
        await authority(store, clock).refresh()
    left = {name: value for name, value in store.values.items() if not name.startswith("next.")}
    store.values, store.version = left, store.version + 1
    ca = authority(store, clock)
    await ca.refresh()
    assert (ca.current.roots, ca.root_set.roots) == (old.roots, old.roots_der)
    assert (await StoredCA(store).look_up(clock.utc())).state.phase is RotationPhase.STEADY


async def test_more_roots_than_nodes_take_are_refused(store: MemoryStore, clock: Clock) -> None:
    """Before anything begins."""
    await authority(store, clock).refresh()
    following = make_keyring(clock.utc())
    many = replace(following, roots=(*following.roots, *(make_keyring(clock.utc()).root for _ in range(9))))
    with pytest.raises(CertmountError, match="nodes take 10"):
        await StoredCA(store).change(clock.utc(), lambda holdings: holdings.begin_rotation(many, int(clock.now)))


async def test_a_ca_in_files_is_followed(tmp_path: Path, clock: Clock, metrics: AuthorityMetrics) -> None:
    """A new generation for other roots only; whatever life is asked for, there is no state to write."""

    def put(keyring: Keyring) -> None:
        for name, value in encode_keyring(keyring).items():
            (tmp_path / name).write_bytes(value.reveal())

    first = make_keyring(clock.utc())
    put(first)
    ca = CertificateAuthority(CAFiles(tmp_path, metrics), metrics, clock.utc, elapsed=clock)
    await ca.refresh()
    told = ca.root_set
    assert (await ca.record_lifetime(timedelta(days=900))).roots == first.roots
    put(first.renew_intermediate(clock.utc()))
    await ca.refresh()
    assert ca.root_set == told
    assert ca.current.intermediate.certificate != first.intermediate.certificate
    put(make_keyring(clock.utc()))
    await ca.refresh()
    assert ca.root_set.generation > told.generation


async def test_the_phase_is_a_metric(store: MemoryStore, clock: Clock) -> None:
    """So that a rotation that waits for someone can raise an alarm."""
    registry = CollectorRegistry()
    ca = authority(store, clock, registry)
    await ca.refresh()
    await rotate(store, clock)
    await ca.refresh()
    phases = {
        phase.value: registry.get_sample_value("certmount_ca_rotation", {"phase": phase.value})
        for phase in RotationPhase
    }
    assert phases == {"steady": 0, "announcing": 1, "distributing": 0, "retiring": 0}


async def test_an_end_that_only_the_owner_can_put_off_is_warned_of(store: MemoryStore, clock: Clock) -> None:
    """Once a day, in good time."""
    offline = replace(make_keyring(clock.utc()), root_key=None)
    store.values = encode_keyring(offline)
    ca = authority(store, clock)
    with structlog.testing.capture_logs() as logs:
        await ca.refresh()
        clock.forward(timedelta(days=300))
        await ca.refresh()
        clock.forward(timedelta(hours=23))
        await ca.refresh()
        clock.forward(timedelta(hours=1))
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
def test_what_is_saved_is_read_back(
    phase: RotationPhase, generation: int, since: int, stopped: bool, life: int, lives: list[int]
) -> None:
    """Every state, with both CAs while there are two."""
    retired = tuple(
        RetiredRoot(root, each) for root, each in zip((*FORMER_CA.roots_der, *NEXT_CA.roots_der), lives, strict=False)
    )
    state = RotationState(phase, generation, since, stopped, life, retired)
    held = CAState(CA, NEXT_CA if phase.before_switch else None, state)
    found = parse_ca_state(held.dump(), Clock().utc(), where="memory")
    assert found.saved
    assert (found.state, found.trust) == (held.state, held.trust)
    assert (found.following is None) == (held.following is None)
    assert dict(found.dump()) == dict(held.dump())
