"""What a cluster says about service-account tokens, as the API server's client hands it to the authority."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReviewedToken:
    """A live token's owner by a TokenReview (authentication.k8s.io/v1); what the API server left out is the empty text."""

    username: str
    uid: str
    """The service account's."""
    pod_name: str
    pod_uid: str
    node_name: str
    node_uid: str


@dataclass(frozen=True, slots=True)
class PublishedKeys:
    """A token issuer's name and its key set, as published (OpenID Connect Discovery 1.0 section 4; RFC 7517 section 5)."""

    issuer: str
    jwks: bytes
