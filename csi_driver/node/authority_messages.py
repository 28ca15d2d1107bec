"""The values that the node driver exchanges with the authority, without protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, unique

from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class IssuanceResponse:
    """The authority's response to an issuance request, not yet verified. ``chain`` is X.509 DER, leaf first."""

    chain: Sequence[bytes]
    trust: Mapping[str, RootSet]
    renew_after: timedelta | None
    interim: bool = False
    """The certificate is an interim certificate of the internal CA; the external issuer is still working."""


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """All root sets of the authority by name, not yet verified, and what else the authority streams to its nodes."""

    sets: Mapping[str, RootSet]
    policy_revision: str  # differs for each version of the policy
    shared_issuers: frozenset[str] = frozenset()  # issuers whose certificates the pods of a service account share
    renew_now: frozenset[str] = frozenset()
    """Fingerprints of the keys whose certificates the CA suggests to renew now (ARI, RFC 9773)."""


@unique
class CertificateCondition(Enum):
    """A condition of a pod's certificate that the authority reports as a pod event."""

    RENEWAL_FAILING = "the renewal failed twice in a row"
    RENEWAL_OVERDUE = "half of the time between the renewal time and the expiry has passed without a renewal"
    CERTIFICATE_EXPIRED = "the certificate has expired"
    CERTIFICATE_RECOVERED = "the certificate was renewed after one of the other conditions"
    RENEWAL_STOPPED = "the policy denies certificates to the pod, and the driver has stopped renewing"


@dataclass(frozen=True, slots=True)
class CertificateReport:
    """A change of a certificate's condition. ``token`` identifies the pod."""

    token: Secret[str]
    condition: CertificateCondition
    reason: str
    message: str
