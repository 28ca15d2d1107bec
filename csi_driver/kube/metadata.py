"""Object metadata (meta.k8s.io/v1 ObjectMeta), validated while it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]  # an object as the API server sends it
Pairs = tuple[tuple[str, str], ...]  # labels or a label selector, sorted by key


class InvalidObject(Exception):
    """The API server sent an object that does not have the documented form."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata that certmount uses."""

    name: str
    namespace: str  # empty for a cluster-scoped object
    uid: str
    labels: Pairs


def read_metadata(item: Json) -> Metadata:
    """Return an object's metadata; raises InvalidObject."""
    metadata = item.get("metadata")
    if not isinstance(metadata, dict):
        raise InvalidObject("an object has no metadata")
    name, namespace, uid = metadata.get("name"), metadata.get("namespace", ""), metadata.get("uid")
    if not isinstance(name, str) or not isinstance(namespace, str) or not isinstance(uid, str) or not (name and uid):
        raise InvalidObject("an object has no name or no uid")
    return Metadata(name, namespace, uid, read_pairs(metadata.get("labels")))


def read_pairs(value: object) -> Pairs:
    """Return labels or a selector; empty for None. Raises InvalidObject."""
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise InvalidObject("labels or a selector are not a map")
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in value.items()):
        raise InvalidObject("labels or a selector contain a value that is not a string")
    return tuple(sorted(value.items()))
