"""Kubernetes objects as the authority's packages exchange them: the fields that certmount uses, without API types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LivePod:
    """A pod as the API server returned it."""

    uid: str
    service_account: str
    node_name: str  # empty before the pod is scheduled
    terminating: bool  # true if the pod is being deleted or has finished
    hostname: str = ""
    subdomain: str = ""  # DNS has a record HOSTNAME.SUBDOMAIN if that is a headless Service that selects the pod


@dataclass(frozen=True, slots=True)
class ClusterNodes:
    """The names of the cluster's nodes."""

    with_driver: frozenset[str]  # nodes on which the driver is registered now
    without_driver: frozenset[str] | None  # all other nodes; None if they are unknown


@dataclass(frozen=True, slots=True)
class Lease:
    """A Lease (coordination.k8s.io/v1). It expires ``seconds`` after its last change, measured by the reader's clock."""

    holder: str  # empty if no replica holds it
    seconds: int
    version: str  # the resourceVersion


@dataclass(frozen=True, slots=True)
class ReviewedToken:
    """The owner of a valid token according to a TokenReview (authentication.k8s.io/v1). Missing fields are empty."""

    username: str
    uid: str  # the UID of the service account
    pod_name: str
    pod_uid: str
    node_name: str
    node_uid: str


@dataclass(frozen=True, slots=True)
class PublishedKeys:
    """A token issuer's name and published key set (OpenID Connect Discovery 1.0 section 4; RFC 7517 section 5)."""

    issuer: str
    jwks: bytes


@dataclass(frozen=True, slots=True)
class EventTarget:
    """The object that an Event is about."""

    namespace: str
    name: str
    uid: str
    kind: str = "Pod"
    api_version: str = "v1"

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """An Event (events.k8s.io/v1). Repeated events with the same name increase a count."""

    name: str  # the name of the Event object, unique in the namespace
    target: EventTarget
    warning: bool
    reason: str  # a CamelCase word
    message: str  # at most 1024 bytes of UTF-8 without control characters
    first_at: float  # Unix seconds

    @property
    def namespace(self) -> str:
        return self.target.namespace


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """The Event's state on the API server."""

    version: str  # the resourceVersion
    count: int  # the number of occurrences, over all replicas


class EventRejected(Exception):
    """The API server rejects this event permanently, for example because its namespace is being deleted."""
