"""An index of rules by namespace, so that a decision reads the rules of other namespaces only if their globs are similar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from csi_driver.core.policy.rules import RuleMatch


class Matching(Protocol):
    """A rule, or an entry of the deny list."""

    @property
    def match(self) -> RuleMatch: ...


Rule = TypeVar("Rule", bound=Matching)


class RuleIndex(Generic[Rule]):
    """Finds the rules that a namespace can match. A rule that it does not find never matches the namespace.

    Globs with ``*`` are found by the text before the first one. A glob that starts with ``*`` is found for all namespaces.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = tuple(rules)
        self._exact: defaultdict[str, list[int]] = defaultdict(list)
        self._by_prefix: defaultdict[str, list[int]] = defaultdict(list)
        for position, rule in enumerate(rules):
            for glob in rule.match.namespaces:
                prefix, star, _ = glob.partition("*")
                (self._by_prefix if star else self._exact)[prefix].append(position)
        self._lengths = sorted(set(map(len, self._by_prefix)))

    def candidates(self, namespace: str) -> Iterator[Rule]:
        """Yield the rules in the order of the file."""
        found = set(self._exact.get(namespace, ()))
        for length in self._lengths:
            found.update(self._by_prefix.get(namespace[:length], ()))
        return (self._rules[position] for position in sorted(found))
