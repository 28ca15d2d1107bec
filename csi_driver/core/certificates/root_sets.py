"""Sets of roots: what a pod trusts is the set of its issuer and those of the federations it asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RootSet:
    """Roots (X.509 DER) that are trusted together; of two states of one set that with the higher ``generation`` is newer."""

    roots: tuple[bytes, ...]
    generation: int


def newer(one: Mapping[str, RootSet], other: Mapping[str, RootSet]) -> dict[str, RootSet]:
    """All sets of both by name, each in its newer state; of equals the first."""
    taken = {
        name: roots for name, roots in one.items() if name not in other or roots.generation >= other[name].generation
    }
    return {**other, **taken}


def union(sets: Mapping[str, RootSet], names: Iterable[str]) -> tuple[bytes, ...]:
    """The roots of the named sets, each once, in the order of the names; a set that is not there adds none."""
    return tuple(dict.fromkeys(root for name in names if name in sets for root in sets[name].roots))
