"""What a pod asks for: the certificate that one volume is to hold."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, unique

from csi_driver.core.names import Names

LEAST_DURATION = timedelta(seconds=10)
"""A shorter life leaves no room to renew it: one failed try would already be an outage."""
MOST_NAMES = 100
"""Names in one certificate; public CAs allow as many, and a handshake carries them all."""


@unique
class KeyType(Enum):
    """Key algorithms and sizes, by the word a pod writes."""

    EC_P256 = "EC-P256"
    EC_P384 = "EC-P384"
    RSA_2048 = "RSA-2048"
    RSA_3072 = "RSA-3072"
    RSA_4096 = "RSA-4096"
    ED25519 = "Ed25519"


@dataclass(frozen=True, slots=True)
class CertificateSpec:
    """A certificate as a pod declares it; valid by construction through :func:`csi_driver.core.attributes.parse_attributes`."""

    names: Names = Names()
    """``name`` comes first, where there is one."""
    duration: timedelta | None = None
    """None: as long as the authority gives by default."""
    renew_before: timedelta | None = None
    """How long before its end; None: at two thirds of its life."""
    key_type: KeyType = KeyType.EC_P256
    fs_group: int | None = None
    """The group that may read the key; None: the pod's fsGroup."""
