"""The roots that everyone is to trust: who watches them, and where they are published for those who don't yet know us."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from csi_driver.authority.ca_store import replace_file
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

_MOST_WATCHERS = 10_000
"""Twice the nodes of the largest supported cluster (Kubernetes: 5,000), as a node may reconnect before its old call is missed."""
LONGEST_WATCH = timedelta(minutes=30)
"""After which a watch ends and its caller comes again: to whichever replica there is then, with a token of that day."""


class RootPublisher(Protocol):
    """Puts the roots where nodes find them before their first call."""

    async def publish(self, pem: bytes) -> None:
        """Writes them unless they are there; raises CertmountError TrustMissing where that fails."""


class FolderPublisher:
    """``root.crt`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "root.crt"

    async def publish(self, pem: bytes) -> None:
        await asyncio.to_thread(self._publish, pem)

    def _publish(self, pem: bytes) -> None:
        try:
            if not self._file.is_file() or self._file.read_bytes() != pem:
                replace_file(self._file, pem, mode=0o644)
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
            raise CertmountError(Reason.TRUST_MISSING, Fault(str(self._file), problem)) from None


class Trust:
    """The current roots (X.509 DER), and a stream of them for each watcher."""

    def __init__(
        self, metrics: AuthorityMetrics, most_watchers: int = _MOST_WATCHERS, longest: timedelta = LONGEST_WATCH
    ) -> None:
        self._metrics = metrics
        self._most_watchers = most_watchers
        self._longest = longest
        self._watchers = 0
        self._roots: tuple[bytes, ...] = ()
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, roots: tuple[bytes, ...]) -> None:
        """Tells all watchers, if the roots differ from those before."""
        if roots != self._roots:
            self._roots = roots
            self._wake()

    def close(self) -> None:
        """Ends all watches, now and in future."""
        self._closed = True
        self._wake()

    async def watch(self) -> AsyncGenerator[tuple[bytes, ...], None]:
        """The roots now, then each change, for half an hour or until :meth:`close`.

        Raises:
            CertmountError: Overloaded with too many watchers.
        """
        if self._watchers >= self._most_watchers:
            raise CertmountError(Reason.OVERLOADED, f"{self._watchers} callers watch the roots already")
        self._watchers += 1
        self._metrics.watchers.inc()
        sent: tuple[bytes, ...] = ()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._longest.total_seconds()
        try:
            while not self._closed:
                changed = self._changed
                if self._roots != sent:
                    sent = self._roots
                    yield sent
                else:
                    async with asyncio.timeout_at(end):
                        await changed.wait()
        except TimeoutError:
            return
        finally:
            self._watchers -= 1
            self._metrics.watchers.dec()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
