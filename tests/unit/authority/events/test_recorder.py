"""What is said on pods: once, counted, within limits, and never in anyone's way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from csi_driver.authority.events import aggregator as event_ledger
from csi_driver.authority.events.aggregator import MOST_KEPT, MOST_PER_POD, AggregatedEvent, EventAggregator
from csi_driver.authority.events.node_reports import CONDITIONS, RECOVERED
from csi_driver.authority.events.recorder import NoEvents, PodEvents, presentable
from csi_driver.core.cluster.event import EventRefused, PodEvent, RecordedEvent
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.telemetry.cluster_metrics import ClusterMetrics
from tests.support.waiting import until
from tests.unit.authority.clock import Clock

ROOT = Path(__file__).parents[4]
HELLO = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", "pod-uid", "node-a", "node-uid", 2e9)
START = 1_800_000_000.0
"""A moment at which a window begins."""
TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.eyJpc3MiOiJrdWJlcm5ldGVzIn0.c2lnbmF0dXJl"


class Book:
    """A ledger, what it dropped, and a hand to turn the clock."""

    def __init__(self, now: float = START) -> None:
        self.dropped: Counter[str] = Counter()
        self.ledger = EventAggregator(lambda why: self.dropped.update([why]))
        self.now = now

    def note(self, message: str = "refused", *, pod: PodIdentity = HELLO, reason: str = "NameNotAllowed") -> None:
        self.ledger.note(pod, warning=True, reason=reason, message=message, now=self.now)

    def write(self) -> AggregatedEvent | None:
        """What is due now, written without a fault."""
        entry = self.ledger.take(self.now)
        if entry is not None:
            told = entry.said if entry.written else 1
            self.ledger.settle(entry, told, RecordedEvent("1", told), self.now)
        return entry

    def next(self) -> AggregatedEvent:
        """Turns the clock to what is due next, and writes it."""
        wait = self.ledger.wait(self.now)
        assert wait is not None
        self.now += wait
        entry = self.write()
        assert entry is not None
        return entry


def another(number: int) -> PodIdentity:
    return dataclasses.replace(HELLO, pod_name=f"pod-{number}", pod_uid=f"uid-{number}")


def test_what_is_said_again_is_counted_at_growing_intervals() -> None:
    """One event; a pod that is refused every second for ten minutes costs the API server four counts beside it."""
    book = Book()
    writes = []
    for second in range(600):
        book.now = START + second
        book.note()
        if book.write():
            writes.append(second)
    assert writes[0] == 0
    pauses = [later - earlier for earlier, later in itertools.pairwise(writes)]
    assert pauses == [30, 60, 120, 240]
    assert len(book.ledger) == 1


def test_another_text_is_another_event() -> None:
    """So is another pod, another reason, and the same after its ten minutes."""
    book = Book()
    book.note()
    book.note("refused otherwise")
    book.note(reason="RenewalFailing")
    book.note(pod=another(1))
    names = {book.next().event.name for _ in range(4)}
    book.now = START + event_ledger.WINDOW_S
    book.note()
    names.add(book.next().event.name)
    assert len(names) == 5
    assert book.ledger.wait(book.now) is None


def test_replicas_give_an_event_the_same_name() -> None:
    """Whenever within the ten minutes each of them says it; so the second one finds that it was said."""
    one, other = Book(START + 1), Book(START + 599)
    for book in (one, other):
        book.note()
    assert one.next().event.name == other.next().event.name


@given(st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", fullmatch=True), st.text())
def test_names_are_such_as_the_api_server_takes(pod_name: str, message: str) -> None:
    """RFC 1123 subdomains of at most 253 characters, however the pod is called."""
    book = Book()
    book.note(message, pod=dataclasses.replace(HELLO, pod_name=pod_name))
    name = book.next().event.name
    assert len(name) <= 253
    stem, _, digest = name.rpartition(".")
    assert len(digest) == 16
    assert stem[-1].isalnum()


def test_a_pod_cannot_flood() -> None:
    """With another text each time it gets ten events in a minute; the others' are written."""
    book = Book()
    for number in range(100):
        book.note(f"no rule allows {number}.example.com")
    book.note(pod=another(1))
    assert len(book.ledger) == MOST_PER_POD + 1
    assert book.dropped == {"pod": 100 - MOST_PER_POD}
    book.now += 60
    book.note("a minute later")
    assert len(book.ledger) == MOST_PER_POD + 2


def test_many_pods_wait_their_turn_and_too_many_are_dropped() -> None:
    """Twenty a second for the whole replica; the memory is bounded; each drop is counted."""
    book = Book()
    for number in range(MOST_KEPT + 5):
        book.note(pod=another(number))
    assert (len(book.ledger), book.dropped) == (MOST_KEPT, {"full": 5})
    written = 0
    while book.write():
        written += 1
    assert written == event_ledger.BURST
    for _ in range(100):
        book.next()
    assert book.now - START == pytest.approx(100 / event_ledger.RATE, abs=0.1)


def test_news_that_is_old_is_not_told() -> None:
    """After an outage of the API server of half an hour nobody wants what was refused then."""
    book = Book()
    book.note()
    book.ledger.pause(1800, book.now)
    book.now += 1800
    assert book.write() is None
    assert (len(book.ledger), book.dropped) == (0, {"late": 1})


def test_an_event_that_was_refused_is_not_tried_again() -> None:
    """Its namespace is being deleted, say; what repeats it in its window goes the same way."""
    book = Book()
    book.note()
    entry = book.ledger.take(book.now)
    assert entry is not None
    book.ledger.give_up(entry, "refused")
    book.note()
    book.now += 500
    assert book.write() is None
    assert book.dropped == {"refused": 1}


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
def test_texts_are_made_presentable(message: str, expected: str) -> None:
    """No control characters and nothing that looks like a token, whole or cut off, or like a key."""
    assert presentable(message) == expected


@given(st.text(max_size=3000))
def test_texts_fit_what_the_api_server_takes(message: str) -> None:
    """At most 1024 bytes of UTF-8, printable, and the same again when made presentable twice."""
    text = presentable(message)
    assert len(text.encode()) <= 1024
    assert text.isprintable()


def test_a_token_at_the_edge_is_cut_out_before_the_text_is_cut() -> None:
    """Its first half would else remain."""
    assert "eyJ" not in presentable("x" * 1000 + " " + TOKEN)
    assert presentable("ä" * 1000).endswith("ä...")


class Writer:
    """Writes into a list, or fails."""

    def __init__(self) -> None:
        self.created: list[PodEvent] = []
        self.repeated: list[tuple[str, int, int]] = []
        self.failure: Exception | None = None
        self.tries = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def create(self, event: PodEvent) -> RecordedEvent:
        await self._try()
        self.created.append(event)
        return RecordedEvent("1", 1)

    async def repeat(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        del last_at
        await self._try()
        self.repeated.append((event.name, known.count, more))
        return RecordedEvent("2", known.count + more)

    async def _try(self) -> None:
        self.tries += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
async def events(writer: Writer, registry: CollectorRegistry, clock: Clock) -> AsyncIterator[PodEvents]:
    events = PodEvents(writer, ClusterMetrics(registry, dict), clock)
    task = asyncio.create_task(events.run())
    yield events
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def say(events: PodEvents, message: str = "refused", pod: PodIdentity = HELLO) -> None:
    events.record(pod, warning=True, reason="NameNotAllowed", message=message)


async def test_what_is_recorded_is_written(events: PodEvents, writer: Writer, registry: CollectorRegistry) -> None:
    """With the pod's own uid, so that it is found where its owner looks."""
    say(events)
    await until(lambda: writer.created, "the event")
    event = writer.created[0]
    assert (event.namespace, event.pod_name, event.pod_uid) == ("web", "hello-0", "pod-uid")
    assert (event.warning, event.reason, event.message, event.first_at) == (True, "NameNotAllowed", "refused", START)
    await until(lambda: registry.get_sample_value("certmount_events_written_total") == 1, "the count")


async def test_who_records_never_waits(events: PodEvents, writer: Writer, registry: CollectorRegistry) -> None:
    """Though the API server does not answer: what is too much is dropped and counted."""
    writer.gate.clear()
    for number in range(MOST_KEPT + 100):
        say(events, pod=another(number))
    await until(lambda: writer.tries, "the first try")
    assert (registry.get_sample_value("certmount_events_dropped_total", {"why": "full"}) or 0) >= 100


async def test_repeats_while_the_first_is_on_its_way_are_counted_later(
    events: PodEvents, writer: Writer, clock: Clock
) -> None:
    """None is lost and none is counted twice."""
    writer.gate.clear()
    say(events)
    await until(lambda: writer.tries, "the first try")
    say(events)
    say(events)
    writer.gate.set()
    await until(lambda: writer.created, "the event")
    clock.forward(60)
    say(events)
    await until(lambda: writer.repeated, "the count")
    assert writer.repeated == [(writer.created[0].name, 1, 3)]


async def test_events_wait_for_the_api_server_to_come_back(events: PodEvents, writer: Writer, clock: Clock) -> None:
    """One try at a time with growing pauses, whatever else is recorded; nothing is lost in between."""
    writer.failure = CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("Event", "the API server cannot be reached"))
    say(events)
    await until(lambda: writer.tries == 1, "the first try")
    say(events, "another")
    await asyncio.sleep(0)
    assert writer.tries == 1
    writer.failure = None
    clock.forward(60)
    say(events, "a third")
    await until(lambda: len(writer.created) == 3, "all of them")


async def test_an_event_that_the_api_server_refuses_ends_no_one(
    events: PodEvents, writer: Writer, registry: CollectorRegistry
) -> None:
    """It is counted, and the next one is written."""
    writer.failure = EventRefused("Event in namespace web: the API server answers 403")
    say(events)
    name = "certmount_events_dropped_total"
    await until(lambda: registry.get_sample_value(name, {"why": "refused"}) == 1, "the drop")
    writer.failure = None
    say(events, "another")
    await until(lambda: writer.created, "the next event")


@pytest.mark.parametrize("message", ["\ud800", "x" * 100_000, "", "\x00"])
async def test_recording_never_raises(message: str, events: PodEvents, writer: Writer) -> None:
    """Whatever a node has sent."""
    events.record(HELLO, warning=False, reason="R" * 500, message=message)
    await until(lambda: writer.created, "the event")
    assert len(writer.created[0].reason) <= 128


def test_outside_a_cluster_no_one_is_told() -> None:
    """And no one minds."""
    NoEvents().record(HELLO, warning=True, reason="NameNotAllowed", message="x")


def test_how_long_the_cluster_could_not_be_followed_is_shown(registry: CollectorRegistry) -> None:
    """As of the scrape."""
    failing = {"pods": 0.0}
    ClusterMetrics(registry, lambda: failing)
    failing["pods"] = 7.0
    assert registry.get_sample_value("certmount_watch_failing_seconds", {"resource": "pods"}) == 7.0


def test_every_event_is_in_the_documents() -> None:
    """docs/events.md has a row for each condition that a node reports, of the right type, and for no other."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "events.md").read_text(), flags=re.MULTILINE)
    assert dict(rows) == {word: "Normal" if word == RECOVERED else "Warning" for word in CONDITIONS.values()}
