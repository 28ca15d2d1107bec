"""In-memory caches of pods, Services and namespaces: only what the policy needs, in as few bytes as possible.

Each implements :class:`csi_driver.kube.reflector.ObjectCache`.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

from csi_driver.core.errors import CertmountError
from csi_driver.kube.cache_shares import CacheShares, namespace_owner, pairs_bytes
from csi_driver.kube.key_waiters import KeyWaiters
from csi_driver.kube.metadata import Metadata, Pairs, ServiceSelector

MAX_POD_BYTES = 48 * 2**20
MAX_SERVICE_BYTES = 16 * 2**20
MAX_NAMESPACE_BYTES = 16 * 2**20
"""About the memory of each cache. One namespace gets at most half of it."""
_POD_BYTES = 200  # of a pod in addition to its labels, which pods can share
_SERVICE_BYTES = 1024  # more than the memory, to limit also the time to compare a pod with its namespace's Services
_NAMESPACE_BYTES = 300
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.ASCII)


@dataclass(slots=True, eq=False)
class LabelledPods:
    """The pods of one namespace that have the same labels, such as a Deployment's replicas; they share one value."""

    namespace: str
    labels: Pairs
    pods: int = 0  # the cache drops the value when no pod is left


class _NamespacedCache(ABC, Generic[_Item, _Value]):
    """The objects by key. Subclasses define what is stored of an object, and how large it is."""

    def __init__(self, resource: str, capacity: int) -> None:
        self.shares = CacheShares(resource, capacity)
        self._known: dict[Hashable, _Value] = {}
        self._waiters = KeyWaiters()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> _Value | None:
        return self._known.get(key)

    async def wait(self, key: str, seconds: float) -> _Value | None:
        """Return what is known of an object as soon as it is known, or None after a timeout."""
        return await self._waiters.wait(key, lambda: self.find(key), seconds)

    def refusal(self, namespace: str) -> CertmountError | None:
        """Return why objects of the namespace are not known, if it exceeds its share."""
        return self.shares.refusal(namespace_owner(namespace))

    def remove(self, item: _Item) -> None:
        self._drop(self._key(item))

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._known if key not in keys]:
            self._drop(key)

    @abstractmethod
    def _key(self, item: _Item) -> Hashable:
        """Return the key of an object."""

    @abstractmethod
    def _drop(self, key: Hashable) -> None:
        """Forget an object, if it is known."""


class PodCache(_NamespacedCache[Metadata, LabelledPods]):
    """Pod labels by UID: a new pod with an old name is another pod."""

    def __init__(self, capacity: int = MAX_POD_BYTES) -> None:
        super().__init__("bytes of known pods", capacity)
        self._shared: dict[tuple[str, Pairs], LabelledPods] = {}

    def find(self, key: str) -> LabelledPods | None:
        return self._known.get(_uid_key(key))

    def put(self, item: Metadata) -> Hashable | None:
        key = self._key(item)
        before = self._known.get(key)
        if before is not None and (before.namespace, before.labels) == (item.namespace, item.labels):
            return key
        self._drop(key)
        if (labels := self._share_labels(item)) is None:
            return None
        labels.pods += 1
        self._known[key] = labels
        if before is None:
            self._waiters.notify(item.uid)
        return key

    def _key(self, item: Metadata) -> Hashable:
        return _uid_key(item.uid)

    def _share_labels(self, pod: Metadata) -> LabelledPods | None:
        """Return the value for the pod's labels and charge the pod to its namespace; None if its share is used up."""
        owner = namespace_owner(pod.namespace)
        if pod.labels is None:
            self.shares.refuse(owner, f"pod {pod.namespace}/{pod.name}", "labels")
            return None
        shared = self._shared.get((pod.namespace, pod.labels))
        if not self.shares.take(owner, _POD_BYTES if shared else _POD_BYTES + _labels_bytes(pod.labels)):
            return None
        if shared is None:
            labels = tuple((sys.intern(name), sys.intern(value)) for name, value in pod.labels)
            shared = LabelledPods(sys.intern(pod.namespace), labels)
            self._shared[shared.namespace, labels] = shared
        return shared

    def _drop(self, key: Hashable) -> None:
        shared = self._known.pop(key, None)
        if shared is None:
            return
        freed = _POD_BYTES
        shared.pods -= 1
        if not shared.pods:
            del self._shared[shared.namespace, shared.labels]
            freed += _labels_bytes(shared.labels)
        self.shares.give_back(namespace_owner(shared.namespace), freed)


class NamespaceCache(_NamespacedCache[Metadata, Mapping[str, str]]):
    """Namespace labels by name: a watch reports the deletion of a namespace before its successor."""

    def __init__(self, capacity: int = MAX_NAMESPACE_BYTES) -> None:
        super().__init__("bytes of known namespaces", capacity)

    def put(self, item: Metadata) -> Hashable | None:
        owner = namespace_owner(item.name)
        self._drop(item.name)
        if item.labels is None:
            self.shares.refuse(owner, owner, "labels")
            return None
        if not self.shares.take(owner, _NAMESPACE_BYTES + pairs_bytes(item.labels)):
            return None
        self._known[item.name] = MappingProxyType(dict(item.labels))
        self._waiters.notify(item.name)
        return item.name

    def labelled(self, label: str, value: str) -> list[str]:
        """Return the names of the namespaces with this label."""
        return [str(name) for name, labels in self._known.items() if labels.get(label) == value]

    def _key(self, item: Metadata) -> Hashable:
        return item.name

    def _drop(self, key: Hashable) -> None:
        labels = self._known.pop(key, None)
        if labels is not None:
            self.shares.give_back(namespace_owner(str(key)), _NAMESPACE_BYTES + pairs_bytes(tuple(labels.items())))


class ServiceCache(_NamespacedCache[ServiceSelector, ServiceSelector]):
    """Service selectors, indexed by namespace and by one pair of the selector.

    A pod is compared only with the Services that are indexed by one of its labels. Services without a selector and those
    of type ExternalName select no pods.
    """

    def __init__(self, capacity: int = MAX_SERVICE_BYTES) -> None:
        super().__init__("bytes of known Services", capacity)
        self._indices: dict[str, dict[tuple[str, str], dict[str, Pairs]]] = {}

    def select(self, namespace: str, labels: Pairs) -> tuple[str, ...]:
        """Return the sorted names of the namespace's Services that select a pod with these labels."""
        index = self._indices.get(namespace)
        if not index:
            return ()
        having = frozenset(labels)
        candidates = (candidate for pair in labels for candidate in index.get(pair, {}).items())
        return tuple(sorted(name for name, selector in candidates if having.issuperset(selector)))

    def is_headless(self, namespace: str, name: str) -> bool:
        known = self._known.get((namespace, name))
        return known is not None and known.headless

    def put(self, item: ServiceSelector) -> Hashable | None:
        key = self._key(item)
        if item.pairs is not None and self._known.get(key) == item:
            return key
        self._drop(key)
        owner = namespace_owner(item.namespace)
        if item.pairs is None:
            self.shares.refuse(owner, f"Service {item.namespace}/{item.name}", "pairs in its selector")
            return None
        if not self.shares.take(owner, _SERVICE_BYTES + pairs_bytes(item.pairs)):
            return None
        self._known[key] = item
        if item.pairs:
            index = self._indices.setdefault(item.namespace, {})
            # All Services of a namespace can share a pair such as "team: web", so index by the rarest one.
            rarest = min(item.pairs, key=lambda pair: len(index.get(pair, ())))
            index.setdefault(rarest, {})[item.name] = item.pairs
        return key

    def _key(self, item: ServiceSelector) -> Hashable:
        return item.namespace, item.name

    def _drop(self, key: Hashable) -> None:
        known = self._known.pop(key, None)
        if known is None or known.pairs is None:
            return
        namespace, name, selector = known.namespace, known.name, known.pairs
        self.shares.give_back(namespace_owner(namespace), _SERVICE_BYTES + pairs_bytes(selector))
        index = self._indices.get(namespace, {})
        for pair in selector:
            names = index.get(pair)
            if names is not None and names.pop(name, None) is not None and not names:
                del index[pair]
        if not index:
            self._indices.pop(namespace, None)


def _labels_bytes(labels: Pairs) -> int:
    return _POD_BYTES + pairs_bytes(labels)


def _uid_key(uid: str) -> Hashable:
    """Return a UUID as a number, which takes a third of the memory of its text; any other UID unchanged."""
    return int(uid.replace("-", ""), 16) if _UUID.fullmatch(uid) else uid
