"""A store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret, StoredSecrets


class MemoryStore:
    """Keeps values in memory. ``conflicting`` are values that other replicas write just before a save."""

    name = "memory"

    def __init__(self) -> None:
        self.values: Mapping[str, Secret[bytes]] = {}
        self.version = 0
        self.saves = 0
        self.unavailable = False
        self.conflicting: list[Mapping[str, Secret[bytes]]] = []

    async def load(self) -> StoredSecrets:
        await asyncio.sleep(0)
        if self.unavailable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "memory: unavailable")
        return StoredSecrets(self.values, str(self.version))

    async def save(self, values: Mapping[str, Secret[bytes]], based_on: StoredSecrets) -> bool:
        await asyncio.sleep(0)
        if self.conflicting:
            self.put(self.conflicting.pop())
        if based_on.version != str(self.version):
            return False
        self.put(values)
        self.saves += 1
        return True

    def put(self, values: Mapping[str, Secret[bytes]]) -> None:
        self.values, self.version = values, self.version + 1
