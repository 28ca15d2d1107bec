"""All sources, and the Secrets that they request together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, TypeVar

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.shares import FairShares
from csi_driver.core.spec import MAX_NAMES
from csi_driver.kube.cache_shares import CacheShares, namespace_owner
from csi_driver.secrets.requests import DesiredSecret, SecretName, Source, SourceRequest

MAX_SOURCE_BYTES = 32 * 2**20
"""About the memory of all sources. One namespace gets at most half of it, which is enough for 5,000 Ingresses."""
_MAX_CONFLICTS = 10  # that are reported about one Secret at a time: a namespace can name it in thousands of sources
_SOURCE_BYTES, _REQUEST_BYTES, _NAME_BYTES = 1024, 1536, 200
_Item = TypeVar("_Item")

SourceKey = tuple[str, str, str]  # kind, namespace and name


def key_of(target: EventTarget) -> SourceKey:
    return target.kind, target.namespace, target.name


@dataclass(eq=False)
class SourceTable:
    """Calls ``changed`` for each Secret whose request may have changed, and ``failed`` for each faulty source."""

    changed: Callable[[SecretName], None]
    failed: Callable[[EventTarget, CertmountError], None]

    def __post_init__(self) -> None:
        self._sources: dict[SourceKey, Source] = {}
        self._by_secret: dict[SecretName, dict[SourceKey, SourceRequest]] = {}

    def __len__(self) -> int:
        """Return the number of Secrets."""
        return len(self._by_secret)

    def __contains__(self, secret: SecretName) -> bool:
        """Return whether a source requests the Secret."""
        return secret in self._by_secret

    def secrets(self) -> Iterable[SecretName]:
        return list(self._by_secret)

    def find(self, key: SourceKey) -> Source | None:
        return self._sources.get(key)

    def put(self, source: Source) -> None:
        """Add or replace a source."""
        key = key_of(source.target)
        known = self._sources.get(key)
        self._replace(key, known, source)
        if source.faults and (known is None or known.faults != source.faults or known.target != source.target):
            self.failed(source.target, CertmountError(Reason.INVALID_SOURCE, *source.faults))

    def remove(self, key: SourceKey) -> Source | None:
        known = self._sources.get(key)
        if known is not None:
            self._replace(key, known, None)
        return known

    def desired(self, secret: SecretName) -> DesiredSecret | None:
        """Return the Secret as its sources request it; None if there is none.

        The first source decides about the options. A list is never united with other sources, so that a tenant cannot
        change an administrator's Secret.
        """
        requests = [(self._sources[key], request) for key, request in self._by_secret.get(secret, {}).items()]
        if not requests:
            return None
        requests.sort(key=lambda pair: pair[0].order)
        first_source, first = requests[0]
        names, targets = dict.fromkeys(first.names), [first_source.target]
        conflicts: list[tuple[Source, SourceRequest, str]] = []
        for source, request in requests[1:]:
            if first_source.target.kind == "ConfigMap" or request.options != first.options:
                conflicts.append((source, request, f"is also the Secret of {first_source.target}, with other options"))
            elif len(names.keys() | request.names) > MAX_NAMES:
                problem = f"has more than {MAX_NAMES} names together with those of {first_source.target}"
                conflicts.append((source, request, problem))
            else:
                names |= dict.fromkeys(request.names)
                targets.append(source.target)
        for conflict in conflicts[:_MAX_CONFLICTS]:
            self._conflict(*conflict)
        return DesiredSecret(secret, tuple(names), first.options, tuple(targets))

    def _conflict(self, source: Source, request: SourceRequest, problem: str) -> None:
        fault = Fault(f"{request.path}: {request.secret}", problem, "use another Secret")
        self.failed(source.target, CertmountError(Reason.INVALID_SOURCE, fault))

    def _replace(self, key: SourceKey, known: Source | None, source: Source | None) -> None:
        before = {request.secret: request for request in known.requests} if known else {}
        after = {request.secret: request for request in source.requests} if source else {}
        if source is None:
            del self._sources[key]
        else:
            self._sources[key] = source
        for secret in before.keys() - after.keys():
            del self._by_secret[secret][key]
            if not self._by_secret[secret]:
                del self._by_secret[secret]
        for secret, request in after.items():
            self._by_secret.setdefault(secret, {})[key] = request
        moved = known is None or source is None or known.target != source.target
        for secret in before.keys() | after.keys():
            if moved or before.get(secret) != after.get(secret):
                self.changed(secret)


class SourceCache(Generic[_Item]):
    """The sources of one watch; implements :class:`csi_driver.kube.reflector.ObjectCache`. ``memory`` is that of all watches."""

    def __init__(self, table: SourceTable, resource: str, memory: FairShares, read: Callable[[_Item], Source]) -> None:
        self.shares = CacheShares(resource, memory.capacity, memory)
        self._table = table
        self._read = read
        self._keys: set[SourceKey] = set()

    def put(self, item: _Item) -> Hashable | None:
        source = self._read(item)
        key, owner = key_of(source.target), namespace_owner(source.target.namespace)
        source = source.with_earlier(self._table.find(key))
        if not source.requests and not source.faults:
            self._remove(key)
            return key
        if not self.shares.replace(owner, self._held(key), _size(source)):
            self._keys.discard(key)
            self._table.remove(key)
            if (refusal := self.shares.refusal(owner)) is not None:
                self._table.failed(source.target, refusal)
            return None
        self._keys.add(key)
        self._table.put(source)
        return key

    def remove(self, item: _Item) -> None:
        self._remove(key_of(self._read(item).target))

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        for key in [key for key in self._keys if key not in keys]:
            self._remove(key)

    def _remove(self, key: SourceKey) -> None:
        if key in self._keys:
            self.shares.give_back(namespace_owner(key[1]), self._held(key))
            self._keys.remove(key)
        self._table.remove(key)

    def _held(self, key: SourceKey) -> int:
        """Return how much memory a source takes."""
        known = self._table.find(key) if key in self._keys else None
        return _size(known) if known else 0


def _size(source: Source) -> int:
    """Return about how much memory the source takes."""
    faults = sum(len(str(fault)) for fault in source.faults)
    return _SOURCE_BYTES + faults + sum(_request_sizes(source))


def _request_sizes(source: Source) -> Iterator[int]:
    for request in source.requests:
        yield _REQUEST_BYTES + sum(_NAME_BYTES + len(name.text) for name in request.names)
