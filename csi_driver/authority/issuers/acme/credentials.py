"""The credentials of an ACME issuer: TSIG keys (RFC 8945) for DNS updates, and the MAC key of an external account."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Self

import dns.exception
import dns.name
import dns.tsig

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.core.config.issuers import CredentialSource
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret

TSIG_ALGORITHMS = {
    "hmac-sha1": dns.tsig.HMAC_SHA1,
    "hmac-sha224": dns.tsig.HMAC_SHA224,
    "hmac-sha256": dns.tsig.HMAC_SHA256,
    "hmac-sha384": dns.tsig.HMAC_SHA384,
    "hmac-sha512": dns.tsig.HMAC_SHA512,
}
"""RFC 8945 section 6, without MD5 and without truncation."""
_DEFAULT_ALGORITHM = "hmac-sha256"


@dataclass(frozen=True, slots=True)
class TsigKey:
    """A secret shared with a DNS server. Its text format is ``[hmac:]name:key``, as for ``nsupdate -y``."""

    name: str
    secret: Secret[bytes]
    algorithm: str = _DEFAULT_ALGORITHM

    @classmethod
    def parse(cls, text: Secret[str], field: str) -> Self:
        """Parse the text format; raise CertmountError IssuerUnavailable, which names ``field`` and shows no content."""
        parts = text.reveal().strip().split(":")
        if len(parts) not in (2, 3):
            raise _invalid(field, "does not have the format [hmac:]name:key")
        algorithm, name, key = (_DEFAULT_ALGORITHM, *parts) if len(parts) == 2 else (parts[0].lower(), *parts[1:])
        if algorithm not in TSIG_ALGORITHMS:
            raise _invalid(field, "has an unsupported algorithm; expected one of " + ", ".join(TSIG_ALGORITHMS))
        try:
            dns.name.from_text(name)
        except (dns.exception.DNSException, UnicodeError):
            raise _invalid(field, "has a key name that is not a DNS name") from None
        try:
            secret = base64.b64decode(key, validate=True)
        except ValueError:  # including binascii.Error
            raise _invalid(field, "has a key that is not base64") from None
        if not name or not secret:
            raise _invalid(field, "has an empty name or key")
        return cls(name, Secret(secret), algorithm)

    def for_dnspython(self) -> dns.tsig.Key:
        return dns.tsig.Key(dns.name.from_text(self.name), self.secret.reveal(), TSIG_ALGORITHMS[self.algorithm])


class AcmeCredentials:
    """Reads the credentials at each use. Methods raise CertmountError IssuerUnavailable, which shows no content."""

    def __init__(self, configuration: AcmeConfiguration, reader: CredentialReader) -> None:
        self._configuration = configuration
        self._reader = reader

    async def tsig_key(self) -> TsigKey | None:
        source = self._configuration.dns01.key if self._configuration.dns01 is not None else None
        return None if source is None else TsigKey.parse(await self._text(source), str(source))

    async def mac_key(self) -> Secret[str] | None:
        external = self._configuration.external_account
        return None if external is None else await self._text(external.key)

    async def _text(self, source: CredentialSource) -> Secret[str]:
        content = await self._reader.read(source)
        try:
            return Secret(content.reveal().decode("ascii").strip())
        except UnicodeDecodeError:
            raise issuer_unavailable(str(source), "is not ASCII text") from None


def _invalid(field: str, problem: str) -> CertmountError:
    hint = "use the format of nsupdate -y: hmac-sha256:name:base64"
    return issuer_unavailable(field, problem, hint)
