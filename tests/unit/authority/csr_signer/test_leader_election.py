"""Leader election: one leader at a time, and a new leader soon after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from csi_driver.authority.csr_signer.leader_election import LEASE_S, LeaderElection
from csi_driver.core.cluster.objects import Lease
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
            for until, waiter in self._sleepers:
                if until <= self.now and not waiter.done():
                    waiter.set_result(None)
            for _ in range(30):
                await asyncio.sleep(0)
            self.max_leaders = max(self.max_leaders, len(self.working))

    async def start(self, name: str, seconds: int = 0, work: Callable[[], Awaitable[None]] | None = None) -> None:
        """Start a replica and advance the clock."""

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
