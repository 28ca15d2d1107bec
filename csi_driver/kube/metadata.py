"""What certmount reads of objects of the API server, as values without API types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]  # an object as the API server sends it
Pairs = tuple[tuple[str, str], ...]  # labels or a label selector, sorted by key

MANAGER = "certmount"  # the field manager of certmount's writes, and the label of the objects that it creates
MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED = {MANAGED_BY: MANAGER}
MAX_TEXT = 1024  # bytes
MAX_PAIRS = 128
"""The maximum number of labels of an object and of pairs of a selector. Kubernetes only limits the size of an object."""


class InvalidObject(Exception):
    """The API server sent an object that does not have the documented form."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata that certmount uses (meta.k8s.io/v1 ObjectMeta)."""

    name: str
    namespace: str  # empty for a cluster-scoped object
    uid: str
    labels: Pairs | None = ()  # None if there are more than MAX_PAIRS


@dataclass(frozen=True, slots=True)
class ServiceSelector:
    """The labels of the pods that a Service selects. DNS has records of the single pods of a ``headless`` one."""

    namespace: str
    name: str
    pairs: Pairs | None  # empty if it selects no pods; None if there are more than MAX_PAIRS
    headless: bool = False


def text(value: bytes, max_bytes: int = MAX_TEXT) -> str:
    """Return a text that a user can have written, truncated if it is long."""
    return value[:max_bytes].decode(errors="replace")
