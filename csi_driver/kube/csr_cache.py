"""A cache of CertificateSigningRequests by name, which can wait until a request is finished."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Set as AbstractSet
from datetime import datetime

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition
from csi_driver.kube.key_waiters import KeyWaiters
from csi_driver.kube.metadata import InvalidObject, Json, read_metadata


class CSRCache:
    """Implements :class:`csi_driver.kube.reflector.ObjectCache`. ``changed`` is called for new and changed requests."""

    def __init__(self, changed: Callable[[ClusterCSR], None] = lambda _: None, *, keep_finished: bool = True) -> None:
        """Without ``keep_finished``, finished requests take no memory. Kubernetes keeps them for an hour."""
        self._known: dict[str, ClusterCSR] = {}
        self._keep_finished = keep_finished
        self._changed = changed
        self._waiters = KeyWaiters()
        self._waiting: dict[str, int] = {}
        self._removed: set[str] = set()
        self.listed = asyncio.Event()  # set after the first complete list

    def __iter__(self) -> Iterator[ClusterCSR]:
        return iter(tuple(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def find(self, name: str) -> ClusterCSR | None:
        return self._known.get(name)

    def add(self, created: ClusterCSR) -> None:
        """Add a request that was just created, unless the watch has already reported a newer state."""
        self._known.setdefault(created.name, created)

    def forget(self, name: str) -> None:
        """Drop a request that was just deleted, before the watch reports it."""
        self._known.pop(name, None)

    async def wait(self, name: str, seconds: float) -> ClusterCSR | None:
        """Return the request as soon as it is finished, or None after a timeout; raises KeyError if it is deleted."""
        self._waiting[name] = self._waiting.get(name, 0) + 1
        found: ClusterCSR | str | None = None
        try:
            found = await self._waiters.wait(name, lambda: self._outcome(name), seconds)
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
                self._removed.discard(name)
        if isinstance(found, str):
            raise KeyError(name)
        return found

    def _outcome(self, name: str) -> ClusterCSR | str | None:
        """Return the finished request, only its name if it was deleted, or None."""
        known = self._known.get(name)
        if known is not None and known.finished:
            return known
        return name if name in self._removed else None

    def put(self, item: Json) -> Hashable:
        csr = read_csr(item)
        before = self._known.get(csr.name)
        if csr.finished and not self._keep_finished:
            self._known.pop(csr.name, None)
        else:
            self._known[csr.name] = csr
        if csr != before:
            self._changed(csr)
            self._waiters.notify(csr.name)
        return csr.name

    def remove(self, item: Json) -> None:
        name = read_metadata(item).name
        self._known.pop(name, None)
        if name in self._waiting:
            self._removed.add(name)
            self._waiters.notify(name)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        # A request that a task waits for can be newer than the list. If it was deleted, the wait times out.
        for name in [name for name in self._known if name not in keys and name not in self._waiting]:
            del self._known[name]
        self.listed.set()


def read_csr(item: Json) -> ClusterCSR:
    """Return the request; raises InvalidObject. Requesters control many of the values."""
    metadata = read_metadata(item)
    spec, status = _mapping(item.get("spec")), _mapping(item.get("status"))
    extra = {str(key): tuple(map(str, _list(values))) for key, values in _mapping(spec.get("extra")).items()}
    expiration_s = spec.get("expirationSeconds")
    return ClusterCSR(
        name=metadata.name,
        uid=metadata.uid,
        created_at=_unix_seconds(item["metadata"].get("creationTimestamp")),
        signer=str(spec.get("signerName") or ""),
        request=_bytes(spec.get("request")),
        usages=tuple(map(str, _list(spec.get("usages")))),
        expiration_s=expiration_s if isinstance(expiration_s, int) else None,
        username=str(spec.get("username") or ""),
        extra=extra,
        labels=dict(metadata.labels),
        conditions=tuple(map(_condition, _list(status.get("conditions")))),
        certificate=_bytes(status.get("certificate")),
    )


def _condition(value: object) -> CSRCondition:
    found = _mapping(value)
    return CSRCondition(*(str(found.get(key) or "") for key in ("type", "reason", "message")))


def _mapping(value: object) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidObject("a field of a CertificateSigningRequest is not an object")
    return value


def _list(value: object) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidObject("a field of a CertificateSigningRequest is not a list")
    return value


def _bytes(value: object) -> bytes:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        raise InvalidObject("a field of a CertificateSigningRequest is not base64") from None


def _unix_seconds(value: object) -> float:
    """Return the Unix seconds of an RFC 3339 time; 0 if it is missing or invalid."""
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0
