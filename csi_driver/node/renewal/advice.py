"""Renews sooner what its CA wants renewed sooner than it said (RFC 9773): the authority tells for which keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import structlog

from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import read_key_and_chain

log = structlog.get_logger(__name__)


class Advice:
    """``renew`` brings a volume's renewal forward."""

    def __init__(self, store: VolumeStore, volumes: VolumeTable, renew: Callable[[Volume], None]) -> None:
        self._store = store
        self._volumes = volumes
        self._renew = renew
        self._due: Collection[str] = frozenset()
        self._news = asyncio.Event()

    def streamed(self, due: Collection[str]) -> None:
        """Takes the digests (:func:`csi_driver.core.certificates.keys.key_fingerprint`) of the keys whose certificates are to be renewed now."""
        if due != self._due:
            self._due = due
            self._news.set()

    async def run(self) -> None:
        """Follows the advice until cancelled. Each volume is brought forward once: what fails then is the renewals' to retry."""
        while True:
            await self._news.wait()
            self._news.clear()
            for volume in self._volumes:
                if self._due and volume.spec.issuer != DEFAULT_ISSUER and await self._key(volume) in self._due:
                    log.info("renewed sooner, as its CA advises", volume=volume.record.volume_id, pod=str(volume.pod))
                    self._renew(volume)

    async def _key(self, volume: Volume) -> str:
        """Of the key that the volume holds; empty where that can't be read."""
        try:
            key, _ = await in_thread(None, read_key_and_chain, self._store.files_dir(volume.record.volume_id))
        except CertmountError:
            return ""  # told where it is renewed
        return key_fingerprint(key.public_key())
