"""The rules that match each service account and Secret, cached with a share for each namespace."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from csi_driver.core.names import URI
from csi_driver.core.policy.rules import PolicyRule

MAX_CACHED_ACCOUNTS = 4096  # service accounts with namespace labels, at a few hundred bytes each
MAX_CACHED_PER_NAMESPACE = 512

Key: TypeAlias = "tuple[str | None, ...]"
"""A namespace, a service account or Secret in it, and the values of the labels that the policy refers to."""
Value: TypeAlias = "tuple[URI | None, tuple[PolicyRule, ...]]"


class RuleCache:
    """Drops one entry when it is full: of the same namespace if that has its share, else of the one unused for longest."""

    def __init__(self) -> None:
        self._namespaces: OrderedDict[str | None, OrderedDict[Key, Value]] = OrderedDict()
        self._total = 0

    def get(self, key: Key) -> Value | None:
        entries = self._namespaces.get(key[0])
        if entries is None or (value := entries.get(key)) is None:
            return None
        entries.move_to_end(key)
        self._namespaces.move_to_end(key[0])
        return value

    def put(self, key: Key, value: Value) -> None:
        entries = self._namespaces.setdefault(key[0], OrderedDict())
        self._namespaces.move_to_end(key[0])
        entries[key] = value
        self._total += 1
        if len(entries) > MAX_CACHED_PER_NAMESPACE:
            self._drop_from(key[0])
        elif self._total > MAX_CACHED_ACCOUNTS:
            self._drop_from(next(iter(self._namespaces)))

    def __len__(self) -> int:
        return self._total

    def _drop_from(self, namespace: str | None) -> None:
        entries = self._namespaces[namespace]
        entries.popitem(last=False)
        self._total -= 1
        if not entries:
            del self._namespaces[namespace]
