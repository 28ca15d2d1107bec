"""Which replica works: one at a time, and never none for long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from csi_driver.authority.csr_signer.leadership import LEASE_S, Leadership
from csi_driver.core.cluster.lease import Lease
from tests.unit.authority.issuers.kubernetes_csr.cluster import FakeLease


class World:
    """Replicas with one clock; each sleep moves it on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.store = FakeLease()
        self.working: set[str] = set()
        self.ever: list[str] = []
        self.together = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, waiter))
        await waiter

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    async def pass_by(self, seconds: float) -> None:
        """Time goes on, second by second."""
        await self.settle()
        for _ in range(int(seconds)):
            self.now += 1
            for until, waiter in self._sleepers:
                if until <= self.now and not waiter.done():
                    waiter.set_result(None)
            await self.settle()
            self.together = max(self.together, len(self.working))

    def start(self, name: str, work: Callable[[], Awaitable[None]] | None = None) -> None:
        async def working() -> None:
            self.working.add(name)
            self.ever.append(name)
            try:
                await (work() if work else asyncio.Event().wait())
            finally:
                self.working.discard(name)

        leadership = Leadership(self.store, name, lambda: self.now, self.sleep)
        self.tasks[name] = asyncio.create_task(leadership.run(working))

    async def stop(self, name: str, *, crash: bool = False) -> None:
        """Gracefully, or as one whose node loses power: nothing more of it reaches the store."""
        self.store.broken = crash
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks[name]])
        self.store.broken = False


@pytest.fixture
async def world() -> World:
    return World()


async def test_one_of_three_works(world: World) -> None:
    """And it keeps doing so."""
    for name in ("a", "b", "c"):
        world.start(name)
    await world.pass_by(120)
    assert (world.together, len(set(world.ever)), world.working) == (1, 1, {world.store.lease.holder})


async def test_who_stops_hands_over(world: World) -> None:
    """The next one begins as soon as it looks, without waiting for the lease to run out."""
    world.start("a")
    await world.pass_by(1)
    world.start("b")
    await world.pass_by(5)
    await world.stop("a")
    assert world.store.lease.holder == ""
    await world.pass_by(10)
    assert world.working == {"b"}


async def test_who_dies_is_followed_when_its_lease_has_run_out(world: World) -> None:
    """Not before: it may only have been cut off."""
    world.start("a")
    await world.pass_by(1)
    world.start("b")
    await world.pass_by(9)
    await world.stop("a", crash=True)
    await world.pass_by(LEASE_S - 15)
    assert not world.working
    await world.pass_by(30)
    assert world.working == {"b"}


async def test_who_cannot_renew_stops_before_another_may_begin(world: World) -> None:
    """And begins again when it can."""
    world.start("a")
    await world.pass_by(10)
    world.store.broken = True
    await world.pass_by(LEASE_S - 1)
    assert not world.working
    world.store.broken = False
    await world.pass_by(12)
    assert world.working == {"a"}


async def test_one_failed_renewal_is_no_end(world: World) -> None:
    """It is tried again at once."""
    world.start("a")
    await world.pass_by(8)
    world.store.broken = True
    await world.pass_by(5)
    world.store.broken = False
    await world.pass_by(60)
    assert world.ever == ["a"]


async def test_who_lost_the_lease_stops(world: World) -> None:
    """As when its clock stood still."""
    world.start("a")
    await world.pass_by(5)
    world.store.lease = Lease("b", LEASE_S, "99")
    await world.pass_by(12)
    assert not world.working


async def test_a_defect_of_the_work_is_no_end(world: World) -> None:
    """It is told, and the work begun again, here or elsewhere."""

    async def fail() -> None:
        raise RuntimeError("a defect")

    world.start("a", fail)
    await world.pass_by(45)
    assert len(world.ever) > 1
    assert not world.tasks["a"].done()
