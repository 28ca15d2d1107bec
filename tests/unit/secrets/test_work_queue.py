"""The order of the work: due times, fairness between namespaces, and at most one task for each Secret."""

from __future__ import annotations

import asyncio
from collections import Counter

from csi_driver.secrets.requests import SecretName
from csi_driver.secrets.work_queue import MAX_CONCURRENT, MAX_STARTS_PER_S, FairSchedule, WorkQueue
from tests.support.waiting import in_background, until


def started(schedule: FairSchedule, now: float) -> list[str]:
    return list(iter(lambda: schedule.start_next(now), None))


def test_earliest_due_time_of_a_secret_stays() -> None:
    """Otherwise a source that changes all the time would postpone its Secret forever."""
    schedule = FairSchedule()
    for now in range(10):
        schedule.schedule("shop/tls", now + 5.0)
    assert schedule.start_next(4.9) is None
    assert schedule.wait_s(4.0) == 1.0
    assert schedule.start_next(5.0) == "shop/tls"


def test_secret_is_worked_on_once_at_a_time() -> None:
    schedule = FairSchedule()
    schedule.schedule("shop/tls", 0.0)
    assert started(schedule, 0.0) == ["shop/tls"]
    schedule.schedule("shop/tls", 1.0)
    assert started(schedule, 2.0) == []
    schedule.end("shop/tls")
    assert started(schedule, 2.0) == ["shop/tls"]


def test_namespace_gets_at_most_half_of_the_places() -> None:
    schedule = FairSchedule()
    for number in range(100):
        schedule.schedule(f"flood/{number}", 0.0)
    first = started(schedule, 0.0)
    assert len(first) == MAX_CONCURRENT // 2
    schedule.schedule("shop/tls", 0.0)
    assert started(schedule, 0.0) == ["shop/tls"]
    schedule.end("shop/tls")
    schedule.end(first[0])
    assert [key.partition("/")[0] for key in started(schedule, 0.0)] == ["flood"]


def test_namespaces_take_turns() -> None:
    schedule = FairSchedule()
    for number in range(3):
        for namespace in ("a", "b"):
            schedule.schedule(f"{namespace}/{number}", number / 10)
    order = [key.partition("/")[0] for key in started(schedule, 1.0)]
    assert order == ["a", "b"] * 3


def test_starts_of_one_namespace_are_limited() -> None:
    schedule, counts = FairSchedule(), Counter[str]()
    for step in range(1000):  # ten seconds
        now = step / 100
        for number in range(20):
            schedule.schedule(f"flood/{number}", now)
        if step % 100 == 50:
            schedule.schedule("shop/tls", now)
        for key in started(schedule, now):
            counts[key.partition("/")[0]] += 1
            schedule.end(key)
    assert counts["shop"] == 10
    assert counts["flood"] <= 10 * MAX_STARTS_PER_S + 20


def test_cancelled_secret_takes_no_memory_and_no_turn() -> None:
    schedule = FairSchedule()
    for name in ("later", "due", "other"):
        schedule.schedule(f"shop/{name}", 9.0 if name == "later" else 0.0)
    assert schedule.start_next(0.0) == "shop/due"
    for name in ("later", "due", "other", "unknown"):  # "due" is being worked on, and "other" has its turn next
        schedule.cancel(f"shop/{name}")
    assert (len(schedule), started(schedule, 10.0)) == (1, [])
    schedule.end("shop/due")
    schedule.schedule("shop/other", 11.0)
    assert started(schedule, 11.0) == ["shop/other"]


async def test_queue_runs_what_is_due() -> None:
    done: list[str] = []

    async def work(secret: SecretName) -> None:
        await asyncio.sleep(0)
        done.append(str(secret))

    queue = WorkQueue(work)
    async with in_background(queue.run()):
        queue.schedule(SecretName("shop", "later"), 0.05)
        queue.schedule(SecretName("shop", "tls"), 0.0)
        await until(lambda: len(done) == 2, "the work")
    assert done == ["shop/tls", "shop/later"]
