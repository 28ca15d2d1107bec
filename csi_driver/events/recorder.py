"""Record events in memory and write them to the API server in the background."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.objects import ClusterEvent, EventRejected, EventTarget, RecordedEvent
from csi_driver.core.errors import CertmountError
from csi_driver.core.texts import shortened_to_bytes
from csi_driver.events.aggregator import AggregatedEvent, EventAggregator
from csi_driver.telemetry.logging import redact

log = structlog.get_logger(__name__)

MAX_NOTE_BYTES = 1024  # the API server's limit for the text of an Event
_MAX_REASON = 128
_BACKOFF = Backoff(2, 60)
# Matches truncated tokens and tokens without a signature, too.
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{8,}[A-Za-z0-9_.-]*")


class EventWriter(Protocol):
    """Writes events to the API server. Methods raise EventRejected for a final failure, CertmountError for a retryable one."""

    async def create(self, event: ClusterEvent) -> RecordedEvent:
        """Create the event, or increment its count if it exists."""

    async def repeat(self, event: ClusterEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        """Add ``more`` to the count of the event."""


class EventMetrics(Protocol):
    """Counts events."""

    def event_written(self) -> None: ...

    def event_dropped(self, cause: str) -> None: ...


class ObjectEventRecorder:
    """Aggregates recorded events; one background task writes them. ``metrics`` counts them."""

    def __init__(
        self,
        writer: EventWriter,
        metrics: EventMetrics,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._writer, self._metrics, self._clock, self._unix_clock = writer, metrics, clock, unix_clock
        self._aggregator = EventAggregator(metrics.event_dropped)
        self._recorded = asyncio.Event()
        self._failures = 0

    def record(self, target: EventTarget, owners: tuple[str, ...], *, warning: bool, reason: str, message: str) -> None:
        """Record an event without waiting; never raises. ``reason`` is a CamelCase word, ``message`` is for people."""
        self._aggregator.add(
            target,
            owners,
            warning=warning,
            reason=reason[:_MAX_REASON],
            message=sanitize(message),
            now=self._clock(),
            at=self._unix_clock(),
        )
        self._recorded.set()

    async def run(self) -> None:
        while True:
            self._recorded.clear()
            event = self._aggregator.take(self._clock())
            if event is not None:
                await self._write(event)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._aggregator.wait(self._clock())):
                    await self._recorded.wait()

    async def _write(self, event: AggregatedEvent) -> None:
        count = event.count
        try:
            if event.written is None:
                written = await self._writer.create(event.event)
                count = 1  # the next update adds the repeats
            else:
                written = await self._writer.repeat(event.event, event.written, event.unwritten, event.last_at)
        except EventRejected as error:
            log.warning("event rejected", target=str(event.event.target), error=str(error))
            self._aggregator.drop(event, "rejected")
        except CertmountError as error:
            if not self._failures:
                log.warning("events delayed", reason=error.reason.word, error=str(error))
            self._failures += 1
            self._aggregator.postpone(event, _BACKOFF.delay_s(self._failures), self._clock())
        else:
            self._failures = 0
            self._metrics.event_written()
            self._aggregator.complete(event, count, written, self._clock())


def sanitize(message: str) -> str:
    """Return the message without control characters, tokens and keys, truncated to the API server's limit."""
    start = message[: 4 * MAX_NOTE_BYTES]
    printable = "".join(character if character.isprintable() else " " for character in start)
    clean = _TOKEN.sub("<redacted>", str(redact(None, "", {"text": printable})["text"])).strip()
    return shortened_to_bytes(clean, MAX_NOTE_BYTES)
