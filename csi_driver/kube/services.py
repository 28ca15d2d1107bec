"""Which Services select a pod. One without a selector selects none, and one of type ExternalName has no pods."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Set as AbstractSet

from csi_driver.kube.metadata import BadObject, Json, Pairs, read_metadata, read_pairs

_Pair = tuple[str, str]


class Services:
    """By namespace, and in it by one pair of the selector: a pod is compared with the few Services that have a pair of its own."""

    def __init__(self) -> None:
        self._selectors: dict[tuple[str, str], Pairs] = {}
        self._indices: dict[str, dict[_Pair, dict[str, Pairs]]] = {}

    def __len__(self) -> int:
        return len(self._selectors)

    def select(self, namespace: str, labels: Pairs) -> tuple[str, ...]:
        """The names of the namespace's Services whose selector's pairs are all among the labels, sorted."""
        index = self._indices.get(namespace)
        if not index:
            return ()
        having = frozenset(labels)
        return tuple(
            sorted(
                name for pair in labels for name, selector in index.get(pair, {}).items() if having.issuperset(selector)
            )
        )

    def put(self, item: Json) -> Hashable:
        service = read_metadata(item)
        spec = item.get("spec")
        if not isinstance(spec, dict):
            raise BadObject("a Service has no spec")
        key = service.namespace, service.name
        selector = () if spec.get("type") == "ExternalName" else read_pairs(spec.get("selector"))
        if self._selectors.get(key) != selector:
            self._drop(key)
            self._selectors[key] = selector
            if selector:
                index = self._indices.setdefault(service.namespace, {})
                # The rarest of its pairs: all Services of a namespace may share one that says whose they are.
                rarest = min(selector, key=lambda pair: len(index.get(pair, ())))
                index.setdefault(rarest, {})[service.name] = selector
        return key

    def remove(self, item: Json) -> None:
        service = read_metadata(item)
        self._drop((service.namespace, service.name))

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._selectors if key not in keys]:
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        selector, (namespace, name) = self._selectors.pop(key, ()), key
        index = self._indices.get(namespace, {})
        for pair in selector:
            names = index.get(pair)
            if names is not None and names.pop(name, None) is not None and not names:
                del index[pair]
        if not index:
            self._indices.pop(namespace, None)
