"""Secret values as a store returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class StoredSecrets:
    """Values by name. A store saves new values only if ``version`` is still its current version (optimistic concurrency)."""

    values: Mapping[str, Secret[bytes]]
    version: str
