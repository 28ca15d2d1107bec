"""An index of the name patterns of a rule, so that a name is compared only with patterns whose literal end it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.core.policy.patterns import NamePattern


@dataclass(frozen=True, slots=True)
class PatternIndex:
    """The patterns of a rule for one type of name.

    A rule can have 1,000 patterns, and a pod can request 100 names that none of them matches, as often as its rate
    limit allows. So the cost of a name grows with the number of different lengths of suffixes. It grows with the number
    of patterns only if they end with the same text, or with a star or placeholder, which every name is compared with.
    """

    patterns: tuple[NamePattern, ...] = ()
    _by_suffix: Mapping[str, Sequence[NamePattern]] = field(init=False, repr=False, compare=False)
    _lengths: Sequence[int] = field(init=False, repr=False, compare=False)  # of the suffixes, sorted

    def __post_init__(self) -> None:
        by_suffix: defaultdict[str, list[NamePattern]] = defaultdict(list)
        for pattern in self.patterns:
            by_suffix[pattern.suffix].append(pattern)
        object.__setattr__(self, "_by_suffix", dict(by_suffix))
        object.__setattr__(self, "_lengths", sorted(set(map(len, by_suffix))))

    def matches(self, name: str, values: Mapping[str, str], services: Sequence[str] = ()) -> bool:
        """Return whether a pattern matches the name. The arguments are those of :meth:`NamePattern.matches`."""
        for length in self._lengths:
            start = len(name) - length
            if start < 0:
                return False
            for pattern in self._by_suffix.get(name[start:], ()):
                if pattern.matches(name, values, services):
                    return True
        return False
