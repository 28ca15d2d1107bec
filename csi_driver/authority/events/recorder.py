"""Record pod events in memory and write them to the API server in the background."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from csi_driver.authority.events.aggregator import AggregatedEvent, EventAggregator
from csi_driver.core.backoff import Backoff
from csi_driver.core.cluster.objects import EventRejected, PodEvent, RecordedEvent
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity
from csi_driver.telemetry.authority_metrics import ClusterMetrics
from csi_driver.telemetry.logging import redact

log = structlog.get_logger(__name__)

MAX_NOTE_BYTES = 1024  # the API server's limit for the text of an Event
_MAX_REASON = 128
_BACKOFF = Backoff(2, 60)
# Matches truncated tokens and tokens without a signature, too.
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{8,}[A-Za-z0-9_.-]*")


class EventRecorder(Protocol):
    """Records events on pods."""

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        """Record an event without waiting; never raises. ``reason`` is a CamelCase word, ``message`` is for people."""


class NullEventRecorder:
    """Discards events, because without a cluster there are no pods."""

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None: ...


class EventWriter(Protocol):
    """Writes events to the API server. Methods raise EventRejected for a final failure, CertmountError for a retryable one."""

    async def create(self, event: PodEvent) -> RecordedEvent:
        """Create the event, or increment its count if it exists."""

    async def repeat(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        """Add ``more`` to the count of the event."""


class PodEventRecorder:
    """Aggregates recorded events; one background task writes them."""

    def __init__(self, writer: EventWriter, metrics: ClusterMetrics, clock: Callable[[], float] = time.time) -> None:
        self._writer, self._metrics, self._clock = writer, metrics, clock
        self._aggregator = EventAggregator(metrics.event_dropped)
        self._recorded = asyncio.Event()
        self._failures = 0

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        self._aggregator.add(
            pod, warning=warning, reason=reason[:_MAX_REASON], message=sanitize(message), now=self._clock()
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
            log.warning("event rejected", pod=event.event.pod_name, namespace=event.event.namespace, error=str(error))
            self._aggregator.drop(event, "rejected")
        except CertmountError as error:
            if not self._failures:
                log.warning("events delayed", reason=error.reason.word, error=str(error))
            self._failures += 1
            self._aggregator.pause(_BACKOFF.delay_s(self._failures), self._clock())
        else:
            self._failures = 0
            self._metrics.events_written.inc()
            self._aggregator.complete(event, count, written, self._clock())


def sanitize(message: str) -> str:
    """Return the message without control characters, tokens and keys, truncated to the API server's limit."""
    printable = "".join(character if character.isprintable() else " " for character in message)
    clean = _TOKEN.sub("<redacted>", str(redact(None, "", {"text": printable})["text"])).strip()
    encoded = clean.encode()
    return clean if len(encoded) <= MAX_NOTE_BYTES else encoded[: MAX_NOTE_BYTES - 3].decode(errors="ignore") + "..."
