"""CertificateSigningRequests that a watch tells of, by name, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Set as AbstractSet
from datetime import datetime

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition
from csi_driver.kube.awaited import Arrivals
from csi_driver.kube.metadata import BadObject, Json, read_metadata


class CSRs:
    """A :class:`csi_driver.kube.watching.Sink`. ``changed`` is told of each that is new or has changed."""

    def __init__(self, changed: Callable[[ClusterCSR], None] = lambda _: None, *, keep_finished: bool = True) -> None:
        """Without ``keep_finished`` those that nobody will do anything more about take no memory: Kubernetes keeps them for an hour."""
        self._known: dict[str, ClusterCSR] = {}
        self._keep_finished = keep_finished
        self._changed = changed
        self._arrivals = Arrivals()
        self._awaited: dict[str, int] = {}
        self._removed: set[str] = set()
        self.listed = asyncio.Event()
        """Set once all there is has been read."""

    def __iter__(self) -> Iterator[ClusterCSR]:
        return iter(tuple(self._known.values()))

    def __len__(self) -> int:
        return len(self._known)

    def find(self, name: str) -> ClusterCSR | None:
        return self._known.get(name)

    def add(self, made: ClusterCSR) -> None:
        """Takes one that was made just now, unless the watch was faster: what it tells is newer."""
        self._known.setdefault(made.name, made)

    def forget(self, name: str) -> None:
        """It has been deleted; the watch will say so, too."""
        self._known.pop(name, None)

    async def wait(self, name: str, seconds: float) -> ClusterCSR | None:
        """The request as soon as it is finished; None when that takes longer.

        Raises:
            KeyError: when it is deleted meanwhile.
        """
        self._awaited[name] = self._awaited.get(name, 0) + 1
        found: ClusterCSR | str | None = None
        try:
            found = await self._arrivals.wait(name, lambda: self._outcome(name), seconds)
        finally:
            self._awaited[name] -= 1
            if not self._awaited[name]:
                del self._awaited[name]
                self._removed.discard(name)
        if isinstance(found, str):
            raise KeyError(name)
        return found

    def _outcome(self, name: str) -> ClusterCSR | str | None:
        """The finished request, its name alone once it is deleted, or nothing yet."""
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
            self._arrivals.came(csr.name)
        return csr.name

    def remove(self, item: Json) -> None:
        name = read_metadata(item).name
        self._known.pop(name, None)
        if name in self._awaited:
            self._removed.add(name)
            self._arrivals.came(name)

    def retain(self, keys: AbstractSet[Hashable]) -> None:
        # What someone waits for may be younger than the list; if it is gone, its wait ends by time.
        for name in [name for name in self._known if name not in keys and name not in self._awaited]:
            del self._known[name]
        self.listed.set()


def read_csr(item: Json) -> ClusterCSR:
    """Takes the object; raises BadObject for a form that the API server never sends, whatever the requester wrote."""
    metadata = read_metadata(item)
    spec, status = _mapping(item.get("spec")), _mapping(item.get("status"))
    extra = {str(key): tuple(map(str, _list(values))) for key, values in _mapping(spec.get("extra")).items()}
    life_s = spec.get("expirationSeconds")
    return ClusterCSR(
        name=metadata.name,
        uid=metadata.uid,
        created_at=_moment(item["metadata"].get("creationTimestamp")),
        signer=str(spec.get("signerName") or ""),
        request=_bytes(spec.get("request")),
        usages=tuple(map(str, _list(spec.get("usages")))),
        life_s=life_s if isinstance(life_s, int) else None,
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
        raise BadObject("a CertificateSigningRequest has a part that is no object")
    return value


def _list(value: object) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadObject("a CertificateSigningRequest has a part that is no list")
    return value


def _bytes(value: object) -> bytes:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        raise BadObject("a CertificateSigningRequest holds something that is not base64") from None


def _moment(value: object) -> float:
    """Unix seconds of an RFC 3339 time; 0 where there is none."""
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else 0.0
    except ValueError:
        return 0.0
