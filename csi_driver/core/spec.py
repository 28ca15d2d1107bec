"""What a pod asks for: the certificate that one volume is to hold."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, unique

from csi_driver.core.names import Names

MIN_DURATION = timedelta(seconds=10)
"""A shorter life leaves no room to renew it: one failed try would already be an outage."""
DEFAULT_ISSUER = "internal"
"""The authority's own CA."""
MAX_NAMES = 100
"""Names in one certificate; public CAs allow as many, and a handshake carries them all."""
MAX_FEDERATIONS = 10
"""Sets of further roots in one volume."""


@unique
class KeyType(Enum):
    """Key algorithms and sizes, by the word a pod writes."""

    EC_P256 = "EC-P256"
    EC_P384 = "EC-P384"
    RSA_2048 = "RSA-2048"
    RSA_3072 = "RSA-3072"
    RSA_4096 = "RSA-4096"
    ED25519 = "Ed25519"
    ML_DSA_44 = "ML-DSA-44"
    ML_DSA_65 = "ML-DSA-65"
    ML_DSA_87 = "ML-DSA-87"


@unique
class Usage(Enum):
    """Which end of a TLS connection a certificate serves for, by the word a pod writes (RFC 5280 section 4.2.1.12)."""

    SERVER = "server"
    CLIENT = "client"


def parse_key_type(text: str) -> KeyType:
    """Takes a key type in any case, or raises ValueError in words for whoever wrote it."""
    for key_type in KeyType:
        if key_type.value.lower() == text.lower():
            return key_type
    raise ValueError("is not a key type; choose one of " + ", ".join(key_type.value for key_type in KeyType))


def parse_usage(text: str) -> Usage:
    """Takes ``server`` or ``client``, or raises ValueError in words for whoever wrote it."""
    for usage in Usage:
        if usage.value == text:
            return usage
    raise ValueError("is not a usage; choose server, client or both")


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
    usages: tuple[Usage, ...] = ()
    """Empty: as many as policy allows."""
    issuer: str = DEFAULT_ISSUER
    """Who signs, and whose roots the pod trusts."""
    federations: tuple[str, ...] = ()
    """Sets of further roots that the pod trusts, by the administrator's names."""
    fs_group: int | None = None
    """The group that may read the key; None: the pod's fsGroup."""
