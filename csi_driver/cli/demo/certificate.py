"""Describes a certificate and the files of a volume for the output."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.durations import format_duration

_MEANINGS = {
    "root.crt": "root certificates to trust",
    "site.crt": "the certificate, then the intermediate that issued it",
    "site.key": "the private key, generated on this node; it never leaves the node",
    "site.pem": "key and certificates in one file, for one atomic read",
}
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH: "server", ExtendedKeyUsageOID.CLIENT_AUTH: "client"}


def describe_files(directory: Path) -> list[tuple[str, str, str, str]]:
    """Return name, mode, size and meaning of each file that a pod sees in its volume."""
    return [
        (path.name, stat.filemode(status.st_mode), f"{status.st_size} bytes", _MEANINGS.get(path.name, ""))
        for path in sorted(directory.iterdir())
        if not path.name.startswith("..")
        for status in [path.stat()]
    ]


def describe_certificate(chain: Sequence[x509.Certificate], now: datetime) -> list[tuple[str, list[str]]]:
    """Return the fields of the chain's first certificate, each with its label and its lines."""
    leaf = chain[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    key_type = key_type_of(leaf.public_key())
    expiry = leaf.not_valid_after_utc
    fingerprint = leaf.fingerprint(SHA256())
    return [
        ("DNS names", names.get_values_for_type(x509.DNSName) or ["none"]),
        ("SPIFFE ID", names.get_values_for_type(x509.UniformResourceIdentifier)),
        ("issued by", [_common_name(certificate.issuer) for certificate in chain]),
        ("valid", [f"until {expiry:%Y-%m-%d %H:%M:%S} UTC, for {format_duration(expiry - now)}"]),
        ("key type", [key_type.value if key_type else "unknown"]),
        ("usages", [", ".join(_USAGES.get(usage, usage.dotted_string) for usage in usages)]),
        ("serial", [f"{leaf.serial_number:040x}"]),
        ("SHA-256", [fingerprint[:16].hex(":"), fingerprint[16:].hex(":")]),
    ]


def _common_name(name: x509.Name) -> str:
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
