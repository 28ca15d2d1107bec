"""What is said on a pod for people to see, as the authority hands it to the API server's client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PodEvent:
    """One Event (events.k8s.io/v1). What is said again under the same name is counted, not said twice."""

    name: str
    """The object's own, unique in the namespace."""
    namespace: str
    pod_name: str
    pod_uid: str
    warning: bool
    reason: str
    """A CamelCase word."""
    message: str
    """At most 1024 bytes of UTF-8 without control characters."""
    first_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """The Event as the API server has it."""

    version: str
    count: int
    """How often it was said, by all replicas of the authority together."""


class EventRefused(Exception):
    """The API server will not have this event, now or later: its namespace is being deleted, say."""
