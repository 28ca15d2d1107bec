"""What the administrator configures for the Secrets controller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_WATCHES = 90
"""Each watch needs its own connection, and a client of the API server has 100."""


@dataclass(frozen=True, slots=True)
class SecretsSettings:
    """The options of ``certmount secrets run``."""

    authority: str  # HOST:PORT
    authority_root: Path
    token: Path
    namespaces: tuple[str, ...]  # where sources are watched, and Secrets are written
    lists: tuple[tuple[str, str], ...]  # namespaces and names of ConfigMaps
    ingress_classes: frozenset[str]  # empty: all classes
    default_issuer: str
    lease: tuple[str, str]
    gateways: bool = False  # whether Gateways are watched

    @property
    def watches(self) -> int:
        """The number of watches that the sources need."""
        return len(self.namespaces) * (1 + self.gateways) + len(self.lists)
