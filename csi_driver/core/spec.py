"""Key types, usages and limits of a requested certificate."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum, unique

MIN_DURATION = timedelta(seconds=10)  # a shorter lifetime leaves no time for a renewal: one failure would be an outage
DEFAULT_ISSUER = "internal"  # the internal CA
MAX_NAMES = 100  # Names in one certificate, as many as public CAs allow. Every TLS handshake transmits them.
MAX_NAMES_BYTES = 54 * 1024
"""All names together. With a key of any type, they fit into a CSR of 64 KiB. After a message that is too long for it, the
authority would end the stream of the node, with the requests of all pods."""
MAX_FEDERATIONS = 10  # additional root sets in one volume


@unique
class KeyType(Enum):
    """Key algorithms and sizes, with the values that pods write."""

    EC_P256 = "EC-P256"
    EC_P384 = "EC-P384"
    EC_P521 = "EC-P521"
    RSA_2048 = "RSA-2048"
    RSA_3072 = "RSA-3072"
    RSA_4096 = "RSA-4096"
    ED25519 = "Ed25519"
    ML_DSA_44 = "ML-DSA-44"
    ML_DSA_65 = "ML-DSA-65"
    ML_DSA_87 = "ML-DSA-87"


DEFAULT_KEY_TYPE = KeyType.EC_P256  # the fastest to generate and to sign that all TLS libraries support


@unique
class Usage(Enum):
    """Extended key usages (RFC 5280 section 4.2.1.12), with the values that pods write."""

    SERVER = "server"
    CLIENT = "client"


def parse_key_type(text: str) -> KeyType:
    """Return the key type, regardless of case; raises ValueError."""
    for key_type in KeyType:
        if key_type.value.lower() == text.lower():
            return key_type
    raise ValueError("is not a key type; use one of " + ", ".join(key_type.value for key_type in KeyType))


def parse_usage(text: str) -> Usage:
    """Return the usage; raises ValueError."""
    if text not in [usage.value for usage in Usage]:
        raise ValueError("is not a usage; use server, client, or both separated by a comma")
    return Usage(text)
