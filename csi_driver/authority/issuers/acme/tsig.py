"""TSIG keys (RFC 8945): what shows a DNS server that an update is ours."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Self

import dns.exception
import dns.name
import dns.tsig

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

ALGORITHMS = {
    "hmac-sha1": dns.tsig.HMAC_SHA1,
    "hmac-sha224": dns.tsig.HMAC_SHA224,
    "hmac-sha256": dns.tsig.HMAC_SHA256,
    "hmac-sha384": dns.tsig.HMAC_SHA384,
    "hmac-sha512": dns.tsig.HMAC_SHA512,
}
"""RFC 8945 section 6, without MD5 and without truncation."""
DEFAULT_ALGORITHM = "hmac-sha256"


@dataclass(frozen=True, slots=True)
class TsigKey:
    """A secret that a DNS server knows by name; written ``[hmac:]name:key``, as nsupdate's ``-y`` takes it."""

    name: str
    secret: Secret[bytes]
    algorithm: str = DEFAULT_ALGORITHM

    @classmethod
    def parse(cls, text: Secret[str], field: str) -> Self:
        """Takes the written form, or raises CertmountError IssuerUnavailable that says what is wrong with ``field``, not what it is."""
        parts = text.reveal().strip().split(":")
        if len(parts) not in (2, 3):
            raise _wrong(field, "is not of the form [hmac:]name:key")
        algorithm, name, key = (DEFAULT_ALGORITHM, *parts) if len(parts) == 2 else (parts[0].lower(), *parts[1:])
        if algorithm not in ALGORITHMS:
            raise _wrong(field, "has an algorithm that is none of " + ", ".join(ALGORITHMS))
        try:
            dns.name.from_text(name)
        except (dns.exception.DNSException, UnicodeError):
            raise _wrong(field, "has a key name that is no DNS name") from None
        try:
            secret = base64.b64decode(key, validate=True)
        except ValueError:  # binascii.Error among them
            raise _wrong(field, "has a key that is not base64") from None
        if not name or not secret:
            raise _wrong(field, "has an empty name or key")
        return cls(name, Secret(secret), algorithm)

    def for_wire(self) -> dns.tsig.Key:
        """The key as dnspython signs with it."""
        return dns.tsig.Key(dns.name.from_text(self.name), self.secret.reveal(), ALGORITHMS[self.algorithm])


def _wrong(field: str, problem: str) -> CertmountError:
    hint = "write it as nsupdate -y takes it: hmac-sha256:name:base64"
    return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(field, problem, hint))
