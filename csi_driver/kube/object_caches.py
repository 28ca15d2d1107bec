"""In-memory caches of pods, Services and namespaces: only what the policy needs, in as few bytes as possible.

Each implements :class:`csi_driver.kube.reflector.ObjectCache`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType

from csi_driver.kube.key_waiters import KeyWaiters
from csi_driver.kube.metadata import InvalidObject, Json, Pairs, read_metadata, read_pairs

_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.ASCII)


@dataclass(slots=True, eq=False)
class LabelledPods:
    """The pods of one namespace that have the same labels, such as a Deployment's replicas; they share one value."""

    namespace: str
    labels: Pairs
    pods: int = 0  # the cache drops the value when no pod is left


class PodCache:
    """Pod labels by UID: a new pod with an old name is another pod."""

    def __init__(self) -> None:
        self._pods: dict[Hashable, LabelledPods] = {}
        self._shared: dict[tuple[str, Pairs], LabelledPods] = {}
        self._waiters = KeyWaiters()

    def __len__(self) -> int:
        return len(self._pods)

    def find(self, uid: str) -> LabelledPods | None:
        return self._pods.get(_uid_key(uid))

    async def wait(self, uid: str, seconds: float) -> LabelledPods | None:
        """Return the pod's labels as soon as they are known, or None after a timeout."""
        return await self._waiters.wait(_uid_key(uid), lambda: self.find(uid), seconds)

    def put(self, item: Json) -> Hashable:
        pod = read_metadata(item)
        key = _uid_key(pod.uid)
        before = self._pods.get(key)
        if before is None or (before.namespace, before.labels) != (pod.namespace, pod.labels):
            shared = self._shared.get((pod.namespace, pod.labels))
            if shared is None:
                labels = tuple((sys.intern(name), sys.intern(value)) for name, value in pod.labels)
                shared = LabelledPods(sys.intern(pod.namespace), labels)
                self._shared[shared.namespace, labels] = shared
            shared.pods += 1
            self._pods[key] = shared
            if before is None:
                self._waiters.notify(key)
            else:
                self._release(before)
        return key

    def remove(self, item: Json) -> None:
        self._drop(_uid_key(read_metadata(item).uid))

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._pods if key not in keys]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        shared = self._pods.pop(key, None)
        if shared is not None:
            self._release(shared)

    def _release(self, shared: LabelledPods) -> None:
        shared.pods -= 1
        if not shared.pods:
            del self._shared[shared.namespace, shared.labels]


class NamespaceCache:
    """Namespace labels by name: a watch reports the deletion of a namespace before its successor."""

    def __init__(self) -> None:
        self._labels: dict[Hashable, Mapping[str, str]] = {}
        self._waiters = KeyWaiters()

    def __len__(self) -> int:
        return len(self._labels)

    def find(self, name: str) -> Mapping[str, str] | None:
        return self._labels.get(name)

    async def wait(self, name: str, seconds: float) -> Mapping[str, str] | None:
        """Return the namespace's labels as soon as they are known, or None after a timeout."""
        return await self._waiters.wait(name, lambda: self.find(name), seconds)

    def put(self, item: Json) -> Hashable:
        namespace = read_metadata(item)
        self._labels[namespace.name] = MappingProxyType(dict(namespace.labels))
        self._waiters.notify(namespace.name)
        return namespace.name

    def remove(self, item: Json) -> None:
        self._labels.pop(read_metadata(item).name, None)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        self._labels = {name: labels for name, labels in self._labels.items() if name in keys}


class ServiceCache:
    """Service selectors, indexed by namespace and by one pair of the selector.

    A pod is compared only with the Services that are indexed by one of its labels. Services without a selector and those
    of type ExternalName select no pods.
    """

    def __init__(self) -> None:
        self._selectors: dict[tuple[str, str], Pairs] = {}
        self._indices: dict[str, dict[tuple[str, str], dict[str, Pairs]]] = {}

    def __len__(self) -> int:
        return len(self._selectors)

    def select(self, namespace: str, labels: Pairs) -> tuple[str, ...]:
        """Return the sorted names of the namespace's Services that select a pod with these labels."""
        index = self._indices.get(namespace)
        if not index:
            return ()
        having = frozenset(labels)
        candidates = (candidate for pair in labels for candidate in index.get(pair, {}).items())
        return tuple(sorted(name for name, selector in candidates if having.issuperset(selector)))

    def put(self, item: Json) -> Hashable:
        service = read_metadata(item)
        spec = item.get("spec")
        if not isinstance(spec, dict):
            raise InvalidObject("a Service has no spec")
        key = service.namespace, service.name
        selector = () if spec.get("type") == "ExternalName" else read_pairs(spec.get("selector"))
        if self._selectors.get(key) != selector:
            self._drop(key)
            self._selectors[key] = selector
            if selector:
                index = self._indices.setdefault(service.namespace, {})
                # All Services of a namespace can share a pair such as "team: web", so index by the rarest one.
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


def _uid_key(uid: str) -> Hashable:
    """Return a UUID as a number, which takes a third of the memory of its text; any other UID unchanged."""
    return int(uid.replace("-", ""), 16) if _UUID.fullmatch(uid) else uid
