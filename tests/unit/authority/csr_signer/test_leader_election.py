"""Leader election: one leader at a time, and a new leader soon after a failure."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from csi_driver.core.cluster.objects import Lease
from csi_driver.kube import leader_election
from csi_driver.kube.leader_election import LEASE_S, LeaderElection
from tests.support.waiting import in_background, until
from tests.unit.authority.csr_signer.fakes import FakeLease


class World:
    """Replicas that share a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.store = FakeLease()
        self.working: set[str] = set()
        self.leaders: list[str] = []
        self.max_leaders = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, waiter))
        await waiter

    async def advance(self, seconds: int) -> None:
        for step in range(seconds + 1):
            self.now += bool(step)
            for due, waiter in self._sleepers:
                if due <= self.now and not waiter.done():
                    waiter.set_result(None)
            for _ in range(30):
                await asyncio.sleep(0)
            self.max_leaders = max(self.max_leaders, len(self.working))

    async def start(self, name: str, seconds: int = 0, work: Callable[[], Awaitable[None]] | None = None) -> None:
        async def working() -> None:
            self.working.add(name)
            self.leaders.append(name)
            try:
                await (work() if work else asyncio.Event().wait())
            finally:
                self.working.discard(name)

        election = LeaderElection(self.store, name, lambda: self.now, self.sleep)
        self.tasks[name] = asyncio.create_task(election.run(working))
        await self.advance(seconds)

    async def stop(self, name: str, *, crash: bool = False) -> None:
        """Stop a replica. A replica that crashes cannot release the lease."""
        self.store.unavailable = crash
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])
        self.store.unavailable = False


@pytest.fixture
async def world() -> World:
    return World()


async def test_one_of_three_replicas_stays_the_leader(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.start(name)
    await world.advance(120)
    assert (world.max_leaders, len(set(world.leaders)), world.working) == (1, 1, {world.store.lease.holder})


async def test_leader_that_stops_releases_the_lease(world: World) -> None:
    await world.start("a", 1)
    await world.start("b", 5)
    await world.stop("a")
    assert world.store.lease.holder == ""
    await world.advance(10)
    assert world.working == {"b"}


async def test_lease_of_a_crashed_leader_must_expire_first(world: World) -> None:
    """The leader might still be running without a connection."""
    await world.start("a", 1)
    await world.start("b", 9)
    await world.stop("a", crash=True)
    await world.advance(LEASE_S - 15)
    assert not world.working
    await world.advance(30)
    assert world.working == {"b"}


async def test_leader_that_cannot_renew_stops_before_the_lease_expires(world: World) -> None:
    await world.start("a", 10)
    world.store.unavailable = True
    await world.advance(LEASE_S - 1)
    assert not world.working
    world.store.unavailable = False
    await world.advance(12)
    assert world.working == {"a"}


async def test_leader_survives_one_failed_renewal(world: World) -> None:
    await world.start("a", 8)
    world.store.unavailable = True
    await world.advance(5)
    world.store.unavailable = False
    await world.advance(60)
    assert world.leaders == ["a"]


class HangingLease(FakeLease):
    """A lease with a method that waits for ``gate``."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = False

    async def _wait(self, method: str) -> None:
        if method == self.method and not self.gate.is_set():
            self.waiting = True
            await self.gate.wait()

    async def load(self) -> Lease:
        await self._wait("load")
        return await super().load()

    async def save(self, lease: Lease) -> bool:
        await self._wait("save")
        return await super().save(lease)


@pytest.mark.parametrize("method", ["load", "save"])
async def test_leader_stops_in_time_during_a_slow_renewal(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another replica could acquire the lease before the renewal ends."""
    monkeypatch.setattr(leader_election, "_RENEW_INTERVAL_S", 0.1)
    monkeypatch.setattr(leader_election, "_RENEW_DEADLINE_S", 0.5)
    store, working = HangingLease(method), asyncio.Event()

    async def work() -> None:
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            working.clear()

    async with in_background(LeaderElection(store, "a").run(work)):
        await until(working.is_set, "the leadership")
        store.gate.clear()
        try:
            await until(lambda: store.waiting, "the renewal")
            await until(lambda: not working.is_set(), "the end of the work", 5)
        finally:
            store.gate.set()


async def test_slow_renewal_leaves_time_for_the_next_one(world: World) -> None:
    """The leader renews 10 s after the last renewal began, not after it ended."""
    renewals: list[float] = []

    async def slow_save(lease: Lease) -> bool:
        renewals.append(world.now)
        world.now += 8
        return await FakeLease.save(world.store, lease)

    world.store.save = slow_save  # type: ignore[method-assign]  # the API server takes 8 s
    await world.start("a", 30)
    assert world.leaders == ["a"]
    assert max(later - earlier for earlier, later in itertools.pairwise(renewals)) <= 11


async def test_leader_that_lost_the_lease_stops(world: World) -> None:
    await world.start("a", 5)
    world.store.lease = Lease("b", LEASE_S, "99")
    await world.advance(12)
    assert not world.working


async def test_work_is_restarted_after_an_unexpected_exception(world: World) -> None:

    async def fail() -> None:
        raise RuntimeError("a defect")

    await world.start("a", 45, fail)
    assert (len(world.leaders) > 1, world.tasks["a"].done()) == (True, False)
