"""The clock of all volumes against a simple model, in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.node.renewal.rotation import Rotation
from tests.unit.node.virtual_time import run_virtually

_SIDE_BY_SIDE = 8
_TURNS = 10
"""Of the event loop, in which what is due by now begins; so no step of a story falls between its end of waiting and its begin."""
_VOLUMES = st.sampled_from(["a", "b", "c", "d"])
_SECONDS = st.one_of(st.just(0.0), st.floats(0, 5), st.floats(0, 2000))


@dataclass(frozen=True)
class Schedule:
    """In so many seconds."""

    volume: str
    after: float


@dataclass(frozen=True)
class Cancel:
    """The volume is unpublished."""

    volume: str


@dataclass(frozen=True)
class Wait:
    """Time passes."""

    seconds: float


@dataclass
class World:
    """The clock under test, the model beside it, and what it did."""

    work_s: float = 0.0
    due: dict[str, float] = field(default_factory=dict)
    """The model: what is scheduled and has not run."""
    began: list[tuple[str, float]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    wall: float = 0.0
    """How far the wall clock has been set forward."""

    def __post_init__(self) -> None:
        self.rotation = Rotation(self.now, self.renew)

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.wall

    def schedule(self, volume: str, after: float) -> None:
        self.due[volume] = self.now() + after
        self.rotation.schedule(volume, self.due[volume])

    def cancel(self, volume: str) -> None:
        self.due.pop(volume, None)
        self.rotation.cancel(volume)

    async def renew(self, volume: str) -> None:
        assert volume in self.due, "it runs once for each schedule, and never once cancelled"
        assert self.due.pop(volume) <= self.now(), "it is never early"
        self.began.append((volume, self.now()))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.work_s)
        self.running -= 1

    async def run(self, *steps: Schedule | Cancel | Wait) -> None:
        clock = asyncio.create_task(self.rotation.run())
        for step in steps:
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            match step:
                case Schedule(volume, after):
                    self.schedule(volume, after)
                case Cancel(volume):
                    self.cancel(volume)
                case Wait(seconds):
                    await asyncio.sleep(seconds)
            if clock.done():
                await clock
        clock.cancel()
        await asyncio.wait([clock])


_steps = st.lists(
    st.one_of(st.builds(Schedule, _VOLUMES, _SECONDS), st.builds(Cancel, _VOLUMES), st.builds(Wait, _SECONDS)),
    max_size=60,
)


@given(_steps, st.floats(0, 50))
def test_it_does_what_the_model_does(steps: list[Schedule | Cancel | Wait], work_s: float) -> None:
    """Never early, never lost, never twice, never once cancelled; ``due`` always tells what is to come."""
    world = World(work_s)

    async def story() -> None:
        await world.run(*steps, Wait(5000))
        assert world.due == {}

    run_virtually(story())
    assert all(world.rotation.due(volume) is None for volume in "abcd")


@given(st.lists(st.floats(0, 2000), min_size=1, max_size=_SIDE_BY_SIDE))
def test_it_is_never_late_while_there_is_room(moments: list[float]) -> None:
    """Each volume begins at its very moment, also when it is scheduled before an earlier one has come."""
    world = World()
    schedules = [Schedule(str(number), after) for number, after in enumerate(moments)]
    run_virtually(world.run(*schedules, Wait(3000)))
    assert len(world.began) == len(moments)
    for volume, began in world.began:
        assert abs(began - moments[int(volume)]) < 0.001


def test_few_at_once_and_all_in_turn() -> None:
    """After an outage everything is due: eight run side by side, in the order in which they fell due, until all are done."""
    world = World(work_s=1.0)
    run_virtually(world.run(*(Schedule(f"{number:03}", number / 1000) for number in range(110)), Wait(14.5)))
    assert world.most == _SIDE_BY_SIDE
    assert [volume for volume, _ in world.began] == [f"{number:03}" for number in range(110)]


def test_a_wall_clock_set_forward_is_noticed() -> None:
    """NTP corrects the clock or the machine slept: what is due by now runs within a minute."""
    world = World()

    async def story() -> None:
        clock = asyncio.create_task(world.rotation.run())
        world.schedule("a", 100_000)
        await asyncio.sleep(10)
        world.wall = 200_000
        await asyncio.sleep(61)
        assert [volume for volume, _ in world.began] == ["a"]
        clock.cancel()
        await asyncio.wait([clock])

    run_virtually(story())


def test_rescheduling_for_ever_does_not_grow() -> None:
    """A volume that is scheduled again and again leaves no trail, and it and its neighbours still run in their moments."""
    world = World()

    async def story() -> None:
        world.schedule("b", 50)
        for number in range(10_000):
            world.schedule("a", 100 + number / 1000)
        assert len(world.rotation._agenda._later) < 100
        await world.run(Wait(200))

    run_virtually(story())
    assert [(volume, round(began)) for volume, began in world.began] == [("b", 50), ("a", 110)]


def test_one_that_schedules_itself_goes_on() -> None:
    """As the renewals do: each sets the next moment, and the clock follows for as long as it runs."""
    world = World()

    async def renew(volume: str) -> None:
        world.began.append((volume, world.now()))
        world.rotation.schedule(volume, world.now() + 60)

    world.rotation = Rotation(world.now, renew)
    run_virtually(world.run(Schedule("a", 0), Wait(3599)))
    assert [round(began) for _, began in world.began] == list(range(0, 3600, 60))
