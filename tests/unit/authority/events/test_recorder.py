"""Pod events: aggregation, limits, sanitizing and writing."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from csi_driver.authority.events.recorder import PodEventRecorder
from csi_driver.authority.service import CONDITIONS, RECOVERED
from csi_driver.core.cluster.objects import ClusterEvent, EventRejected, EventTarget, RecordedEvent
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.events import aggregator
from csi_driver.events.aggregator import MAX_EVENTS, MAX_NEW_PER_OBJECT, AggregatedEvent, EventAggregator
from csi_driver.events.recorder import ObjectEventRecorder, sanitize
from csi_driver.telemetry.authority_metrics import ClusterMetrics
from tests.support.waiting import in_background, until
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
        self.aggregator.add(
            target_of(pod), pod.tenants, warning=True, reason=reason, message=message, now=self.now, at=self.now
        )

    def take(self) -> AggregatedEvent:
        return cast("AggregatedEvent", self.aggregator.take(self.now))

    def write(self) -> AggregatedEvent | None:
        event = self.aggregator.take(self.now)
        if event is not None:
            count = event.count if event.written else 1
            self.aggregator.complete(event, count, RecordedEvent("1", count), self.now)
        return event

    def next(self) -> AggregatedEvent:
        self.now += cast("float", self.aggregator.wait(self.now))
        return cast("AggregatedEvent", self.write())


def target_of(pod: PodIdentity) -> EventTarget:
    return EventTarget(pod.service_account.namespace, pod.pod_name, pod.pod_uid)


def another(number: int, account: ServiceAccount = HELLO.service_account) -> PodIdentity:
    name, uid = f"pod-{number}", f"uid-{account}-{number}"
    return dataclasses.replace(HELLO, pod_name=name, pod_uid=uid, service_account=account)


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
    assert len(world.aggregator) == MAX_NEW_PER_OBJECT + 1
    assert world.dropped == {"object": 100 - MAX_NEW_PER_OBJECT}
    world.now += 60
    world.add("a minute later")
    assert len(world.aggregator) == MAX_NEW_PER_OBJECT + 2


def test_total_rate_is_limited() -> None:
    world = World()
    for number in range(500):
        world.add(pod=another(number))
    assert len(list(iter(world.write, None))) == aggregator.BURST
    for _ in range(100):
        world.next()
    assert world.now - START == pytest.approx(100 / aggregator.RATE, abs=0.1)


def test_memory_is_shared_between_accounts_and_namespaces() -> None:
    """A service account that is alone in its namespace gets a third; another namespace still finds room."""
    world = World()
    for number in range(MAX_EVENTS):
        world.add(pod=another(number))
    assert (len(world.aggregator), world.dropped) == (MAX_EVENTS // 3, {"share": MAX_EVENTS - MAX_EVENTS // 3})
    for number in range(100):
        world.add(pod=another(number, ServiceAccount("other", "hello")))
    assert len(world.aggregator) == MAX_EVENTS // 3 + 100
    world.now += 3 * aggregator.WINDOW_S
    assert world.write() is None
    assert (len(world.aggregator), world.aggregator._shares.total) == (0, 0)


def test_namespaces_take_turns() -> None:
    world = World()
    for number in range(500):
        world.add(pod=another(number))
    for namespace in ("a", "b"):
        world.add(pod=another(0, ServiceAccount(namespace, "quiet")))
    assert [world.next().event.namespace for _ in range(5)] == ["web", "a", "b", "web", "web"]


def test_next_event_is_found_fast_among_many() -> None:
    def seconds_for_each_event(count: int) -> float:
        world = World()
        for number in range(count):
            world.add(pod=another(number, ServiceAccount(f"namespace-{number % 100}", "x")))
        world.next()  # sorts the events by namespace, once for each event
        start = time.process_time()
        for _ in range(40):
            world.next()
        return time.process_time() - start

    few = min(seconds_for_each_event(50) for _ in range(3))
    many = min(seconds_for_each_event(1900) for _ in range(3))
    assert many < 4 * few, f"{few} s for 40 of 50 events, {many} s for 40 of 1,900 events"


def test_old_events_are_dropped_after_an_outage() -> None:
    world = World()
    world.add()
    world.aggregator.postpone(world.take(), 1800, world.now)
    world.now += 1800
    assert world.write() is None
    assert (len(world.aggregator), world.dropped) == (0, {"late": 1})


def test_unwritten_event_of_the_past_window_is_still_written() -> None:
    world = World(START + aggregator.WINDOW_S - 1)
    world.add()
    world.aggregator.postpone(world.take(), 5, world.now)
    world.now += 2
    world.add()
    world.now += 4
    names = [cast("AggregatedEvent", world.write()).event.name for _ in range(2)]
    assert (len(set(names)), world.write(), world.dropped) == (2, None, {})


@pytest.mark.parametrize("interval_s", [aggregator.WINDOW_S / 2, aggregator.WINDOW_S])
def test_repeats_in_many_windows_of_an_outage_keep_a_limited_number_of_events(interval_s: float) -> None:
    world, before = World(), _events_in_memory()
    for _ in range(12):
        for number in range(100):
            world.add(pod=another(number))
        if (event := world.aggregator.take(world.now)) is not None:
            world.aggregator.postpone(event, 60, world.now)
        world.now += interval_s
    assert len(world.aggregator) == 100
    assert _events_in_memory() - before <= 300


def _events_in_memory() -> int:
    gc.collect()
    return sum(isinstance(each, AggregatedEvent) for each in gc.get_objects())


def test_clock_steps_do_not_delay_events() -> None:
    """The Unix clock decides only on names and times of Events."""
    world = World()
    world.add()
    world.next()
    for step in (-86_400.0, 86_400.0):
        at = START + step
        target, owners = target_of(HELLO), HELLO.tenants
        world.aggregator.add(target, owners, warning=True, reason="X", message=str(step), now=world.now, at=at)
        assert world.aggregator.wait(world.now) == 0
        assert world.next().event.first_at == at


def test_rejected_event_and_its_repeats_are_dropped() -> None:
    world = World()
    world.add()
    world.aggregator.drop(world.take(), "rejected")
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
        ("x" * 1000 + f" {TOKEN}", "x" * 1000 + " <redacted>"),  # before it is truncated
        ("ä" * 1000, "ä" * 510 + "..."),
        ("", ""),
    ],
)
def test_messages_contain_no_control_characters_tokens_and_keys(message: str, expected: str) -> None:
    assert sanitize(message) == expected


@given(st.text(max_size=3000))
def test_messages_are_printable_and_at_most_1024_bytes(message: str) -> None:
    text = sanitize(message)
    assert (len(text.encode()) <= 1024, text.isprintable()) == (True, True)


class Writer:
    """Writes into lists, or fails."""

    def __init__(self) -> None:
        self.created: list[ClusterEvent] = []
        self.repeated: list[tuple[str, int, int]] = []
        self.failure: Exception | None = None
        self.attempts, self.gate = 0, asyncio.Event()
        self.gate.set()

    async def create(self, event: ClusterEvent) -> RecordedEvent:
        await self._attempt()
        self.created.append(event)
        return RecordedEvent("1", 1)

    async def repeat(self, event: ClusterEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
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
async def writer() -> Writer:
    return Writer()


@pytest.fixture
async def events(writer: Writer, registry: CollectorRegistry, clock: Clock) -> AsyncIterator[PodEventRecorder]:
    events = PodEventRecorder(ObjectEventRecorder(writer, ClusterMetrics(registry, dict), clock, clock))
    async with in_background(events.run()):
        yield events


def record(events: PodEventRecorder, message: str = "not allowed", pod: PodIdentity = HELLO) -> None:
    events.record(pod, warning=True, reason="NameNotAllowed", message=message)


async def test_recorded_event_is_written(events: PodEventRecorder, writer: Writer, registry: CollectorRegistry) -> None:
    record(events)
    await until(lambda: writer.created, "the event")
    event = writer.created[0]
    assert event == ClusterEvent(event.name, target_of(HELLO), True, "NameNotAllowed", "not allowed", START)
    await until(lambda: registry.get_sample_value("certmount_events_written_total") == 1, "the count")


async def test_recording_does_not_wait(events: PodEventRecorder, writer: Writer, registry: CollectorRegistry) -> None:
    writer.gate.clear()
    for number in range(MAX_EVENTS + 100):
        record(events, pod=another(number))
    await until(lambda: writer.attempts, "the first attempt")
    assert (registry.get_sample_value("certmount_events_dropped_total", {"cause": "share"}) or 0) >= 100


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
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "events.md").read_text(), flags=re.MULTILINE)
    assert dict(rows) == {word: "Normal" if word == RECOVERED else "Warning" for word in CONDITIONS.values()}
