"""Indexes of the patterns of a rule: a pod can request 100 names that none of 1,000 patterns allows, as often as its rate
limit permits, so the cost of a name must not grow with the number of patterns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from csi_driver.core.names import IPAddress
from csi_driver.core.policy.patterns import IPRange, NamePattern


@dataclass(frozen=True, slots=True)
class PatternIndex:
    """The patterns of a rule for one type of name, by the literal text that they begin and end with.

    The cost of a name grows with the number of different lengths of these texts, and with the number of patterns that have
    the same two texts, such as ``*.a.example.com`` and ``*.*.a.example.com``.
    """

    patterns: tuple[NamePattern, ...] = ()
    _by_ends: Mapping[tuple[str, str], Sequence[NamePattern]] = field(init=False, repr=False, compare=False)
    _lengths: Sequence[tuple[int, int]] = field(init=False, repr=False, compare=False)  # of both texts, sorted

    def __post_init__(self) -> None:
        by_ends: defaultdict[tuple[str, str], list[NamePattern]] = defaultdict(list)
        for pattern in self.patterns:
            by_ends[pattern.ends].append(pattern)
        object.__setattr__(self, "_by_ends", dict(by_ends))
        object.__setattr__(self, "_lengths", sorted({(len(begin), len(end)) for begin, end in by_ends}))

    def matches(self, name: str, values: Mapping[str, str], services: Sequence[str] = ()) -> bool:
        """Return whether a pattern matches the name. The arguments are those of :meth:`NamePattern.matches`."""
        size = len(name)
        for begin, end in self._lengths:
            if begin + end > size:
                continue
            for pattern in self._by_ends.get((name[:begin], name[size - end :]), ()):
                if pattern.matches(name, values, services):
                    return True
        return False


@dataclass(frozen=True, slots=True)
class RangeIndex:
    """The IP ranges of a rule, by version and by the number of bits that are not part of the network."""

    ranges: tuple[IPRange, ...] = ()
    _networks: Mapping[int, Mapping[int, AbstractSet[int]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        networks: defaultdict[int, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for network in (one.network for one in self.ranges):
            bits = network.max_prefixlen - network.prefixlen
            networks[network.version][bits].add(int(network.network_address) >> bits)
        object.__setattr__(self, "_networks", {version: dict(by_bits) for version, by_bits in networks.items()})

    def matches(self, name: IPAddress) -> bool:
        """Return whether the address is in one of the ranges."""
        address = int(name.address)
        by_bits = self._networks.get(name.address.version, {})
        return any(address >> bits in networks for bits, networks in by_bits.items())
