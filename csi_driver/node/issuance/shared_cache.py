"""A cache that tenants share: a tenant that stores many entries removes its own, and no others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from csi_driver.core.shares import FairShares
from csi_driver.node.issuance.certificate_request import RequestKey

Value = TypeVar("Value")


class SharedCache(Generic[Value]):
    """Values by request key, the least recently used first. ``size`` returns how much of the shares a value takes."""

    def __init__(self, shares: FairShares, size: Callable[[Value], int] = lambda _value: 1) -> None:
        self._shares = shares
        self._size = size
        self._values: OrderedDict[RequestKey, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[RequestKey]:
        """Iterate over a copy of the keys."""
        return iter(list(self._values))

    def get(self, key: RequestKey) -> Value | None:
        return self._values.get(key)

    def oldest(self) -> tuple[RequestKey, Value] | None:
        return next(iter(self._values.items()), None)

    def put(self, key: RequestKey, value: Value) -> None:
        """Store a value. If the share of its owners is used up, remove the oldest entries of the same namespace.

        Store nothing if other namespaces use the whole capacity.
        """
        size = self._size(value)
        if key not in self._values or self._size(self._values[key]) != size:
            self.remove(key)
            while not self._shares.fits(key.owners, size):
                own = next((other for other in self._values if other.namespace == key.namespace), None)
                if own is None:
                    return
                self.remove(own)
            self._shares.count(key.owners, size)
        self._values[key] = value
        self._values.move_to_end(key)

    def touch(self, key: RequestKey) -> None:
        """Make an entry the most recently used one."""
        self._values.move_to_end(key)

    def remove(self, key: RequestKey) -> None:
        if key in self._values:
            self._shares.give_back(key.owners, self._size(self._values.pop(key)))
