"""What every object of the API has (meta.k8s.io/v1 ObjectMeta), read with care."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
"""An object as the API server writes it."""

Pairs = tuple[tuple[str, str], ...]
"""Labels, or a selector of them, ordered by key."""


class BadObject(Exception):
    """What the API server sent is not of the form that the API promises."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """An object's name, and what it is found by."""

    name: str
    namespace: str
    """Empty for an object of the whole cluster."""
    uid: str
    labels: Pairs


def read_metadata(item: Json) -> Metadata:
    """Takes any object; raises BadObject."""
    metadata = item.get("metadata")
    if not isinstance(metadata, dict):
        raise BadObject("an object has no metadata")
    name, namespace, uid = metadata.get("name"), metadata.get("namespace", ""), metadata.get("uid")
    if not isinstance(name, str) or not isinstance(namespace, str) or not isinstance(uid, str) or not (name and uid):
        raise BadObject("an object has no name or no uid")
    return Metadata(name, namespace, uid, read_pairs(metadata.get("labels")))


def read_pairs(value: object) -> Pairs:
    """Takes a map of texts, as labels and selectors are; none at all is an empty one. Raises BadObject."""
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise BadObject("labels or a selector are not a map")
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in value.items()):
        raise BadObject("labels or a selector hold something that is not text")
    return tuple(sorted(value.items()))
