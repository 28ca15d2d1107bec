"""What the authority sends to its callers, without protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from csi_driver._proto import authority_pb2
from csi_driver.core.certificates.root_sets import RootSet


@dataclass(frozen=True, slots=True)
class IssuanceResponse:
    """The authority's response to an issuance request, not yet verified. ``chain`` is X.509 DER, leaf first."""

    chain: Sequence[bytes]
    trust: Mapping[str, RootSet]
    renew_after: timedelta | None
    interim: bool = False
    """The certificate is an interim certificate of the internal CA; the external issuer is still working."""
    skew_s: float | None = None
    """By how many seconds the caller's clock is ahead of the authority's, if the authority sent its time."""


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """All root sets of the authority by name, not yet verified, and what else the authority streams to its callers."""

    sets: Mapping[str, RootSet]
    policy_revision: str  # differs for each version of the policy
    shared_issuers: frozenset[str] = frozenset()  # issuers whose certificates the pods of a service account share
    renew_now: frozenset[str] = frozenset()
    """Fingerprints of the keys whose certificates the CA suggests to renew now (ARI, RFC 9773)."""
    replace_keys: frozenset[str] = frozenset()
    """Those of them that get no other certificate, because the CA may have revoked theirs."""
    environments: Mapping[str, str] = field(default_factory=dict)
    """Where each issuer gets its certificates, such as the URL of an ACME directory."""


def issuance_response(response: authority_pb2.IssueResponse, skew_s: float | None) -> IssuanceResponse:
    renew_after = response.renew_after.ToTimedelta() if response.HasField("renew_after") else None
    return IssuanceResponse(response.chain, _root_sets(response.trust), renew_after, response.interim, skew_s)


def trust_bundle(bundle: authority_pb2.TrustBundle) -> TrustBundle:
    return TrustBundle(
        _root_sets(bundle.sets),
        bundle.policy_revision,
        frozenset(bundle.shared_issuers),
        frozenset(bundle.renew_now),
        frozenset(bundle.replace_keys),
        dict(bundle.environments),
    )


def _root_sets(sets: Mapping[str, authority_pb2.RootSet]) -> Mapping[str, RootSet]:
    return {name: RootSet(tuple(roots.roots), roots.generation) for name, roots in sets.items()}
