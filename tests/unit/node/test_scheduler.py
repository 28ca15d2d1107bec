"""The scheduler, compared with a simple model in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.node.scheduler import MAX_CONCURRENT_ACTIONS, Scheduler
from tests.support.waiting import in_background
from tests.unit.node.virtual_time import in_virtual_time, run_virtually

_LOOP_ITERATIONS = 10  # let the event loop start the actions that are due before the next step
_KEYS = st.sampled_from(["a", "b", "c", "d"])
_SECONDS = st.one_of(st.just(0.0), st.floats(0, 5), st.floats(0, 2000))


@dataclass(frozen=True)
class Schedule:
    """Schedule a key."""

    key: str
    after_s: float


@dataclass(frozen=True)
class Cancel:
    """Cancel a key."""

    key: str


@dataclass(frozen=True)
class Wait:
    """Let time pass."""

    seconds: float


@dataclass
class World:
    """The scheduler under test, the model, and the actions that have started."""

    action_s: float = 0.0
    due: dict[str, float] = field(default_factory=dict)  # the model: keys that are scheduled and have not started
    started: list[tuple[str, float]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    wall_clock_shift_s: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.now, self.act, elapsed=lambda: asyncio.get_running_loop().time())

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.wall_clock_shift_s

    def schedule(self, key: str, after_s: float) -> None:
        self.due[key] = self.now() + after_s
        self.scheduler.schedule(key, self.due[key])

    async def act(self, key: str) -> None:
        assert key in self.due, "an action runs once for each schedule, and not after a cancellation"
        assert self.due.pop(key) <= self.now(), "an action is never early"
        self.started.append((key, self.now()))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.action_s)
        self.running -= 1

    async def run(self, *steps: Schedule | Cancel | Wait) -> None:
        async with in_background(self.scheduler.run()):
            for step in steps:
                for _ in range(_LOOP_ITERATIONS):
                    await asyncio.sleep(0)
                match step:
                    case Schedule(key, after_s):
                        self.schedule(key, after_s)
                    case Cancel(key):
                        self.due.pop(key, None)
                        self.scheduler.cancel(key)
                    case Wait(seconds):
                        await asyncio.sleep(seconds)


_step = st.one_of(st.builds(Schedule, _KEYS, _SECONDS), st.builds(Cancel, _KEYS), st.builds(Wait, _SECONDS))
_steps = st.lists(_step, max_size=60)


@given(_steps, st.floats(0, 50))
def test_scheduler_behaves_like_the_model(steps: list[Schedule | Cancel | Wait], action_s: float) -> None:
    """No action is early, lost, repeated or run after its cancellation."""
    world = World(action_s)
    run_virtually(world.run(*steps, Wait(5000)))
    assert world.due == {}
    assert len(world.scheduler._due_times) == 0


@given(st.lists(st.floats(0, 2000), min_size=1, max_size=MAX_CONCURRENT_ACTIONS))
def test_actions_start_on_time_below_the_concurrency_limit(due_times: list[float]) -> None:
    """A key can be due earlier than the ones that were scheduled before it."""
    world = World()
    schedules = [Schedule(str(number), after_s) for number, after_s in enumerate(due_times)]
    run_virtually(world.run(*schedules, Wait(3000)))
    assert len(world.started) == len(due_times)
    for key, started in world.started:
        assert abs(started - due_times[int(key)]) < 0.001


def test_concurrency_is_limited_and_earlier_due_times_come_first() -> None:
    world = World(action_s=1.0)
    run_virtually(world.run(*(Schedule(f"{number:03}", number / 1000) for number in range(110)), Wait(14.5)))
    assert world.most_running == MAX_CONCURRENT_ACTIONS
    assert [key for key, _ in world.started] == [f"{number:03}" for number in range(110)]


@in_virtual_time
async def test_wall_clock_change_is_detected_within_a_minute() -> None:
    """NTP can correct the clock, and the machine can be suspended."""
    world = World()
    async with in_background(world.scheduler.run()):
        world.schedule("a", 100_000)
        await asyncio.sleep(10)
        world.wall_clock_shift_s = 200_000
        await asyncio.sleep(61)
    assert [key for key, _ in world.started] == ["a"]


@in_virtual_time
async def test_clock_that_is_set_back_delays_nothing() -> None:
    """A retry that was scheduled while the clock was 10 min fast comes after its delay, and the key is not due again."""
    times = []

    async def note(_key: str) -> None:
        times.append(asyncio.get_running_loop().time())

    world = World(wall_clock_shift_s=600)
    scheduler = Scheduler(world.now, note, elapsed=lambda: asyncio.get_running_loop().time())
    async with in_background(scheduler.run()):
        scheduler.schedule("a", world.now() + 15)
        await asyncio.sleep(10)
        world.wall_clock_shift_s = 0
        await asyncio.sleep(2000)
    assert [round(each, 3) for each in times] == [15]


@in_virtual_time
async def test_rescheduling_does_not_use_more_memory() -> None:
    world = World()
    world.schedule("b", 50)
    for number in range(10_000):
        world.schedule("a", 100 + number / 1000)
    assert len(world.scheduler._due_times._heap) < 100
    await world.run(Wait(200))
    assert [(key, round(started)) for key, started in world.started] == [("b", 50), ("a", 110)]


def test_action_can_schedule_its_own_key() -> None:
    world = World()

    async def renew(key: str) -> None:
        world.started.append((key, world.now()))
        world.scheduler.schedule(key, world.now() + 60)

    world.scheduler = Scheduler(world.now, renew)
    run_virtually(world.run(Schedule("a", 0), Wait(3599)))
    assert [round(started) for _, started in world.started] == list(range(0, 3600, 60))
