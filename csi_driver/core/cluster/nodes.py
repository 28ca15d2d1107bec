"""Which nodes there are, as far as can be known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClusterNodes:
    """Names of nodes."""

    serving: frozenset[str]
    """Those where the driver is known to be there now."""
    others: frozenset[str] | None
    """Those without it, for the moment or for ever; None where no one can say which there are."""
