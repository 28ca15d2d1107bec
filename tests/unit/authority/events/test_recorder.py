"""Pod events: aggregation, limits, sanitizing and writing."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from csi_driver.authority.events import aggregator
from csi_driver.authority.events.aggregator import MAX_EVENTS, MAX_NEW_PER_POD, AggregatedEvent, EventAggregator
from csi_driver.authority.events.recorder import PodEventRecorder, sanitize
from csi_driver.authority.service import CONDITIONS, RECOVERED
from csi_driver.core.cluster.objects import EventRejected, PodEvent, RecordedEvent
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.telemetry.authority_metrics import ClusterMetrics
from tests.support.waiting import until
from tests.unit.authority.clock import Clock

ROOT = Path(__file__).parents[4]
HELLO = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", "pod-uid", "node-a", "node-uid", 2e9)
START = 1_800_000_000.0  # of a window
TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.eyJpc3MiOiJrdWJlcm5ldGVzIn0.c2lnbmF0dXJl"


class World:
    """An aggregator, the causes of dropped events, and a clock."""

    def __init__(self, now: float = START) -> None:
        self.dropped: Counter[str] = Counter()
        self.aggregator = EventAggregator(lambda cause: self.dropped.update([cause]))
        self.now = now

    def add(self, message: str = "not allowed", *, pod: PodIdentity = HELLO, reason: str = "NameNotAllowed") -> None:
        self.aggregator.add(pod, warning=True, reason=reason, message=message, now=self.now)

    def write(self) -> AggregatedEvent | None:
        event = self.aggregator.take(self.now)
        if event is not None:
            count = event.count if event.written else 1
            self.aggregator.complete(event, count, RecordedEvent("1", count), self.now)
        return event

    def next(self) -> AggregatedEvent:
        self.now += cast("float", self.aggregator.wait(self.now))
        return cast("AggregatedEvent", self.write())


def another(number: int) -> PodIdentity:
    return dataclasses.replace(HELLO, pod_name=f"pod-{number}", pod_uid=f"uid-{number}")


def test_repeats_are_counted_at_growing_intervals() -> None:
    world = World()
    writes = []
    for second in range(600):
        world.now = START + second
        world.add()
        if world.write():
            writes.append(second)
    assert writes == [0, 30, 90, 210, 450]
    assert len(world.aggregator) == 1


def test_another_message_reason_pod_or_window_is_another_event() -> None:
    world = World()
    names = set()
    for now in (START, START + aggregator.WINDOW_S):
        world.now = now
        for change in ({}, {"message": "another"}, {"reason": "RenewalFailing"}, {"pod": another(1)}):
            world.add(**change)
            names.add(world.next().event.name)
    assert len(names) == 8
    assert world.aggregator.wait(world.now) is None


def test_replicas_use_the_same_event_name_within_a_window() -> None:
    worlds = World(START + 1), World(START + 599)
    for world in worlds:
        world.add()
    assert len({world.next().event.name for world in worlds}) == 1


@given(st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", fullmatch=True), st.text())
def test_event_names_are_valid_object_names(pod_name: str, message: str) -> None:
    """RFC 1123 subdomains of at most 253 characters."""
    world = World()
    world.add(message, pod=dataclasses.replace(HELLO, pod_name=pod_name))
    stem, _, digest = world.next().event.name.rpartition(".")
    assert (len(stem) <= 236, stem[-1].isalnum(), len(digest)) == (True, True, 16)


def test_events_of_one_pod_are_limited() -> None:
    world = World()
    for number in range(100):
        world.add(f"no rule allows {number}.example.com")
    world.add(pod=another(1))
    assert len(world.aggregator) == MAX_NEW_PER_POD + 1
    assert world.dropped == {"pod": 100 - MAX_NEW_PER_POD}
    world.now += 60
    world.add("a minute later")
    assert len(world.aggregator) == MAX_NEW_PER_POD + 2


def test_total_rate_and_memory_are_limited() -> None:
    world = World()
    for number in range(MAX_EVENTS + 5):
        world.add(pod=another(number))
    assert (len(world.aggregator), world.dropped) == (MAX_EVENTS, {"full": 5})
    assert len(list(iter(world.write, None))) == aggregator.BURST
    for _ in range(100):
        world.next()
    assert world.now - START == pytest.approx(100 / aggregator.RATE, abs=0.1)


def test_old_events_are_dropped_after_an_outage() -> None:
    world = World()
    world.add()
    world.aggregator.pause(1800, world.now)
    world.now += 1800
    assert world.write() is None
    assert (len(world.aggregator), world.dropped) == (0, {"late": 1})


def test_rejected_event_and_its_repeats_are_dropped() -> None:
    world = World()
    world.add()
    world.aggregator.drop(cast("AggregatedEvent", world.aggregator.take(world.now)), "rejected")
    world.add()
    world.now += 500
    assert world.write() is None
    assert world.dropped == {"rejected": 1}


@pytest.mark.parametrize(
    "message,expected",
    [
        ("shop.example.com: no rule allows it", "shop.example.com: no rule allows it"),
        ("two\nlines\x1b[31m\x00\u2028 and more", "two lines [31m   and more"),
        ("\ud800 half a character", "half a character"),
        (f"token {TOKEN} is bad", "token <redacted> is bad"),
        (f"token {TOKEN[:60]}", "token <redacted>"),
        (f"token {TOKEN.rpartition('.')[0]}.", "token <redacted>"),
        ("-----BEGIN PRIVATE KEY----- abc", "<redacted>"),
        ("", ""),
    ],
)
def test_messages_contain_no_control_characters_tokens_and_keys(message: str, expected: str) -> None:
    assert sanitize(message) == expected


@given(st.text(max_size=3000))
def test_messages_are_printable_and_at_most_1024_bytes(message: str) -> None:
    text = sanitize(message)
    assert (len(text.encode()) <= 1024, text.isprintable()) == (True, True)


def test_tokens_are_removed_before_messages_are_truncated() -> None:
    assert "eyJ" not in sanitize("x" * 1000 + " " + TOKEN)
    assert sanitize("ä" * 1000).endswith("ä...")


class Writer:
    """Writes into lists, or fails."""

    def __init__(self) -> None:
        self.created: list[PodEvent] = []
        self.repeated: list[tuple[str, int, int]] = []
        self.failure: Exception | None = None
        self.attempts, self.gate = 0, asyncio.Event()
        self.gate.set()

    async def create(self, event: PodEvent) -> RecordedEvent:
        await self._attempt()
        self.created.append(event)
        return RecordedEvent("1", 1)

    async def repeat(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        del last_at
        await self._attempt()
        self.repeated.append((event.name, known.count, more))
        return RecordedEvent("2", known.count + more)

    async def _attempt(self) -> None:
        self.attempts += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
async def writer() -> Writer:
    return Writer()


@pytest.fixture
async def events(writer: Writer, registry: CollectorRegistry, clock: Clock) -> AsyncIterator[PodEventRecorder]:
    events = PodEventRecorder(writer, ClusterMetrics(registry, dict), clock)
    task = asyncio.create_task(events.run())
    yield events
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


def record(events: PodEventRecorder, message: str = "not allowed", pod: PodIdentity = HELLO) -> None:
    events.record(pod, warning=True, reason="NameNotAllowed", message=message)


async def test_recorded_event_is_written(events: PodEventRecorder, writer: Writer, registry: CollectorRegistry) -> None:
    record(events)
    await until(lambda: writer.created, "the event")
    event = writer.created[0]
    assert dataclasses.astuple(event)[1:] == ("web", "hello-0", "pod-uid", True, "NameNotAllowed", "not allowed", START)
    await until(lambda: registry.get_sample_value("certmount_events_written_total") == 1, "the count")


async def test_recording_does_not_wait(events: PodEventRecorder, writer: Writer, registry: CollectorRegistry) -> None:
    writer.gate.clear()
    for number in range(MAX_EVENTS + 100):
        record(events, pod=another(number))
    await until(lambda: writer.attempts, "the first attempt")
    assert (registry.get_sample_value("certmount_events_dropped_total", {"cause": "full"}) or 0) >= 100


async def test_repeats_during_a_write_are_counted_later(events: PodEventRecorder, writer: Writer, clock: Clock) -> None:
    writer.gate.clear()
    record(events)
    await until(lambda: writer.attempts, "the first attempt")
    record(events)
    record(events)
    writer.gate.set()
    await until(lambda: writer.created, "the event")
    clock.forward(60)
    record(events)
    await until(lambda: writer.repeated, "the count")
    assert writer.repeated == [(writer.created[0].name, 1, 3)]


async def test_events_are_written_after_an_outage(events: PodEventRecorder, writer: Writer, clock: Clock) -> None:
    writer.failure = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("Event", "the API server cannot be reached"))
    record(events)
    await until(lambda: writer.attempts == 1, "the first attempt")
    record(events, "another")
    await asyncio.sleep(0)
    assert writer.attempts == 1
    writer.failure = None
    clock.forward(60)
    record(events, "a third")
    await until(lambda: len(writer.created) == 3, "all of them")


async def test_rejection_delays_no_event(events: PodEventRecorder, writer: Writer, registry: CollectorRegistry) -> None:
    writer.failure = EventRejected("Event in namespace web: the API server answers 403")
    record(events)
    sample = "certmount_events_dropped_total", {"cause": "rejected"}
    await until(lambda: registry.get_sample_value(*sample) == 1, "the drop")
    writer.failure = None
    record(events, "another")
    await until(lambda: writer.created, "the next event")


@pytest.mark.parametrize("message", ["\ud800", "x" * 100_000, "", "\x00"])
async def test_recording_never_raises(message: str, events: PodEventRecorder, writer: Writer) -> None:
    events.record(HELLO, warning=False, reason="R" * 500, message=message)
    await until(lambda: writer.created, "the event")
    assert len(writer.created[0].reason) <= 128


def test_failing_watches_are_measured_at_each_scrape(registry: CollectorRegistry) -> None:
    failing = {"pods": 0.0}
    ClusterMetrics(registry, lambda: failing)
    failing["pods"] = 7.0
    assert registry.get_sample_value("certmount_watch_failing_seconds", {"resource": "pods"}) == 7.0


def test_docs_list_all_certificate_conditions() -> None:
    """docs/events.md has a row with the event type for each condition, and no other rows."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "events.md").read_text(), flags=re.MULTILINE)
    assert dict(rows) == {word: "Normal" if word == RECOVERED else "Warning" for word in CONDITIONS.values()}
