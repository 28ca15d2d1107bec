"""What the authority says on pods: never in the way of what it says it about."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from csi_driver.authority.events.aggregator import AggregatedEvent, EventAggregator
from csi_driver.core.cluster.event import EventRefused, PodEvent, RecordedEvent
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity
from csi_driver.telemetry.cluster_metrics import ClusterMetrics
from csi_driver.telemetry.logging import redact

log = structlog.get_logger(__name__)

_MAX_BYTES = 1024
"""The API server's limit for the text of an event."""
_MAX_REASON = 128
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
# Also one that was cut off, and one without a signature.
_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{8,}[A-Za-z0-9_.-]*")


class EventWriter(Protocol):
    """Brings events to the API server.

    Both raise EventRefused for good, and CertmountError for what may pass.
    """

    async def create(self, event: PodEvent) -> RecordedEvent:
        """Makes it, or counts it where it was made already."""

    async def repeat(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        """Counts it."""


class NoEvents:
    """Outside a cluster there is no one to tell."""

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        """Nowhere."""


class PodEvents:
    """Takes what is to be said, and one task says it: deduplicated, within limits, and in the API server's own time."""

    def __init__(self, writer: EventWriter, metrics: ClusterMetrics, clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._metrics = metrics
        self._clock = clock
        self._ledger = EventAggregator(metrics.event_dropped)
        self._news = asyncio.Event()
        self._failures = 0

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        """Says it as soon as it can; never waits, never raises. ``reason`` is a CamelCase word, ``message`` for people."""
        self._ledger.note(
            pod, warning=warning, reason=reason[:_MAX_REASON], message=presentable(message), now=self._clock()
        )
        self._news.set()

    async def run(self) -> None:
        """Writes what was recorded, for ever."""
        while True:
            self._news.clear()
            entry = self._ledger.take(self._clock())
            if entry is not None:
                await self._write(entry)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._ledger.wait(self._clock())):
                    await self._news.wait()

    async def _write(self, entry: AggregatedEvent) -> None:
        said = entry.said
        try:
            if entry.written is None:
                written = await self._writer.create(entry.event)
                said = 1  # what came on top of it is counted next time
            else:
                written = await self._writer.repeat(entry.event, entry.written, entry.untold, entry.last_at)
        except EventRefused as error:
            log.warning("event refused", pod=entry.event.pod_name, namespace=entry.event.namespace, error=str(error))
            self._ledger.give_up(entry, "refused")
        except CertmountError as error:
            pause = min(_FIRST_PAUSE_S * 2.0 ** min(self._failures, 16), _LONGEST_PAUSE_S)
            if not self._failures:
                log.warning("events wait", reason=error.reason.word, error=str(error))
            self._failures += 1
            self._ledger.pause(pause, self._clock())
        else:
            self._failures = 0
            self._metrics.events_written.inc()
            self._ledger.settle(entry, said, written, self._clock())


def presentable(message: str) -> str:
    """The text of an event: of printable characters, without anything that looks like a token or a key, not too long."""
    printable = "".join(character if character.isprintable() else " " for character in message)
    clean = _TOKEN.sub("<redacted>", str(redact(None, "", {"text": printable})["text"])).strip()
    encoded = clean.encode()
    return clean if len(encoded) <= _MAX_BYTES else encoded[: _MAX_BYTES - 3].decode(errors="ignore") + "..."
