"""Which labels a namespace has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from csi_driver.kube.awaited import Arrivals
from csi_driver.kube.metadata import Json, read_metadata


class Namespaces:
    """By name: a watch tells of the end of one before it tells of its successor."""

    def __init__(self) -> None:
        self._labels: dict[Hashable, Mapping[str, str]] = {}
        self._arrivals = Arrivals()

    def __len__(self) -> int:
        return len(self._labels)

    def find(self, name: str) -> Mapping[str, str] | None:
        return self._labels.get(name)

    async def wait(self, name: str, seconds: float) -> Mapping[str, str] | None:
        """The namespace's labels, as soon as they are known; None when that takes longer."""
        return await self._arrivals.wait(name, lambda: self.find(name), seconds)

    def put(self, item: Json) -> Hashable:
        namespace = read_metadata(item)
        self._labels[namespace.name] = MappingProxyType(dict(namespace.labels))
        self._arrivals.came(namespace.name)
        return namespace.name

    def remove(self, item: Json) -> None:
        self._labels.pop(read_metadata(item).name, None)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        self._labels = {name: labels for name, labels in self._labels.items() if name in keys}
