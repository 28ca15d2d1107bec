"""The CA as it lives: made once, renewed in time, never replaced by something worse."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca import CertificateAuthority
from csi_driver.authority.keyring import Keyring, dump_keyring, make_keyring
from csi_driver.authority.signers import INTERMEDIATE_LIFE, ROOT_LIFE
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored import Stored
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

    async def load(self) -> Stored:
        await asyncio.sleep(0)
        if self.down:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "memory: lost")
        return Stored(self.values, str(self.version))

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: Stored) -> bool:
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


def authority(store: MemoryStore, clock: Clock, registry: CollectorRegistry | None = None) -> CertificateAuthority:
    return CertificateAuthority(store, AuthorityMetrics(registry or CollectorRegistry()), clock.utc)


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
    clock.forward(INTERMEDIATE_LIFE * 0.67)
    after = await asyncio.gather(*(replica.refresh() for replica in replicas))
    assert store.saves == 2
    assert {keyring.root for keyring in after} == {before[0].root}
    assert len({keyring.intermediate.certificate for keyring in [*before, *after]}) == 2


async def test_a_replica_sees_what_another_saved(store: MemoryStore, clock: Clock) -> None:
    """Also a whole new root, such as an administrator puts there."""
    replica = authority(store, clock)
    await replica.refresh()
    other = make_keyring(clock.utc())
    store.values, store.version = dump_keyring(other), store.version + 1
    await replica.refresh()
    assert replica.current.root == other.root


async def test_a_store_with_a_wrong_ca_is_never_overwritten(store: MemoryStore, clock: Clock) -> None:
    """A half-filled or damaged one is an error for people, not an empty one."""
    whole = dump_keyring(make_keyring(clock.utc()))
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
    monkeypatch.setattr("csi_driver.authority.ca.REFRESH_S", 0)
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
    with pytest.raises(CertmountError, match="other writers came first") as failure:
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
    clock.forward(INTERMEDIATE_LIFE + timedelta(seconds=1))
    assert not replica.usable
    await replica.refresh()
    assert replica.usable


async def test_an_expired_root_is_said_in_words(store: MemoryStore, clock: Clock) -> None:
    """A new root must be every trusting party's decision, so it is not made silently."""
    await authority(store, clock).refresh()
    clock.forward(ROOT_LIFE)
    with pytest.raises(CertmountError, match="expired at"):
        await authority(store, clock).refresh()
    assert store.saves == 1


async def test_the_ends_of_the_ca_are_metrics(store: MemoryStore, clock: Clock) -> None:
    """So that an alarm can be set long before."""
    registry = CollectorRegistry()
    await authority(store, clock, registry).refresh()
    for role, life in (("root", ROOT_LIFE), ("intermediate", INTERMEDIATE_LIFE)):
        value = registry.get_sample_value("certmount_ca_expiry_timestamp_seconds", {"certificate": role})
        assert value == (clock.utc() + life).timestamp()
