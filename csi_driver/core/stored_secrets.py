"""Secret values as a store holds them, so that two writers can't overwrite each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class StoredSecrets:
    """Values by name, none where nothing was stored yet; ``version`` is the store's own mark of this very content."""

    values: Mapping[str, Secret[bytes]]
    version: str
