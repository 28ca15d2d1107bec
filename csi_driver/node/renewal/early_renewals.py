"""Renews certificates early if their CA suggests it (ARI, RFC 9773). The authority streams the keys of these certificates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

import structlog

from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.node.volumes.volume import Volume, VolumeTable

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class EarlyRenewals:
    """Calls ``renew`` for each volume whose key fingerprint is in the trust bundle."""

    volumes: VolumeTable
    key_fingerprint: Callable[[Volume], Awaitable[str | None]]
    renew: Callable[[Volume], None]
    _renew_now: Collection[str] = frozenset()
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, renew_now: Collection[str]) -> None:
        if renew_now != self._renew_now:
            self._renew_now = renew_now
            self._changed.set()

    async def run(self) -> None:
        """Schedule renewals after each change until cancelled. Failed renewals are retried as all others."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            for volume in self.volumes:
                if not self._renew_now or volume.spec.issuer == DEFAULT_ISSUER:
                    continue
                if await self.key_fingerprint(volume) in self._renew_now:
                    log.info("early renewal scheduled", volume=volume.record.volume_id, pod=str(volume.pod))
                    self.renew(volume)
