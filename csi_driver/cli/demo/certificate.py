"""A certificate and its files, in the words of people."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.keys import key_type_of

_MEANINGS = {
    "root.crt": "whom to trust",
    "site.crt": "the certificate, then the intermediate that issued it",
    "site.key": "its private key, made on this node and only here",
    "site.pem": "key and certificates in one file, for one atomic read",
}
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH: "servers", ExtendedKeyUsageOID.CLIENT_AUTH: "clients"}
_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def describe_files(folder: Path) -> list[tuple[str, str, str, str]]:
    """Name, mode, size and meaning of each file that a pod sees in its volume."""
    rows = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".."):
            found = path.stat()
            rows.append(
                (path.name, stat.filemode(found.st_mode), f"{found.st_size} bytes", _MEANINGS.get(path.name, ""))
            )
    return rows


def describe_certificate(chain: Sequence[x509.Certificate], now: datetime) -> list[tuple[str, list[str]]]:
    """The fields of the chain's first certificate, each a label and its lines."""
    leaf = chain[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    key_type = key_type_of(leaf.public_key())
    until = leaf.not_valid_after_utc
    return [
        ("DNS names", names.get_values_for_type(x509.DNSName) or ["none"]),
        ("SPIFFE ID", names.get_values_for_type(x509.UniformResourceIdentifier)),
        ("issued by", [_common_name(certificate.issuer) for certificate in chain]),
        ("valid", [f"until {until:%Y-%m-%d %H:%M:%S} UTC, {in_words(until - now)} from now"]),
        ("key", [key_type.value if key_type else "of an unknown type"]),
        ("fit for", [" and ".join(_USAGES.get(usage, usage.dotted_string) for usage in usages)]),
        ("serial", [f"{leaf.serial_number:040x}"]),
        ("SHA-256", _in_lines(leaf.fingerprint(SHA256()).hex(":"))),
    ]


def in_words(length: timedelta) -> str:
    """A length of time by its two largest units: ``59 minutes 57 seconds``."""
    seconds, parts = round(length.total_seconds()), []
    for size, unit in _UNITS:
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {unit}{'s' if count > 1 else ''}")
    return " ".join(parts[:2]) or "0 seconds"


def _common_name(name: x509.Name) -> str:
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _in_lines(fingerprint: str) -> list[str]:
    half = len(fingerprint) // 2
    return [fingerprint[:half], fingerprint[half + 1 :]]
