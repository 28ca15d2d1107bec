"""Who does for a while what only one of several should do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """As it was read. It holds for ``seconds`` after its last change, by the clock of whoever reads it."""

    holder: str
    """Empty: nobody."""
    seconds: int
    version: str
    """Another text after each change."""
