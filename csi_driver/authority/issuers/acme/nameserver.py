"""Queries and updates to one DNS server, with errors that explain what to fix."""

from __future__ import annotations

import base64
import socket
from dataclasses import dataclass
from typing import Self

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.update

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.core.config.issuers import CredentialSource
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

_TIMEOUT_S = 5.0
_PORT = 53
TSIG_ALGORITHMS = ("hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512")  # RFC 8945, without MD5
_DEFAULT_ALGORITHM = "hmac-sha256"
_REJECTIONS = (dns.rcode.REFUSED, dns.rcode.NOTAUTH, dns.rcode.NOTZONE, dns.rcode.NXRRSET, dns.rcode.YXRRSET)
_TSIG_ERRORS: tuple[tuple[type[dns.exception.DNSException], str], ...] = (
    (dns.tsig.PeerBadKey, "it does not know the name of the TSIG key, or has another algorithm for it"),
    (dns.tsig.PeerBadSignature, "it has another secret for the TSIG key"),
    (dns.tsig.PeerBadTime, "its clock differs from the authority's by more than five minutes"),
    (dns.tsig.PeerError, "it does not accept the TSIG signature"),
    (dns.tsig.BadTime, "its clock differs from the authority's by more than five minutes"),
    (dns.tsig.BadSignature, "its response is not signed with the TSIG key"),
    (dns.tsig.BadKey, "its response is not signed with the TSIG key"),
    (dns.message.UnknownTSIGKey, "its response is signed with another TSIG key"),
)


@dataclass(frozen=True, slots=True)
class TsigKey:
    """A secret shared with a DNS server (RFC 8945). Its text format is ``[hmac:]name:key``, as for ``nsupdate -y``."""

    name: str
    secret: Secret[bytes]
    algorithm: str = _DEFAULT_ALGORITHM

    @classmethod
    def parse(cls, text: Secret[str], field: str) -> Self:
        """Parse the text format; raise CertmountError IssuerUnavailable, which names ``field`` and shows no content."""

        def invalid(problem: str) -> CertmountError:
            return issuer_unavailable(field, problem, "use the format of nsupdate -y: hmac-sha256:name:base64")

        parts = text.reveal().strip().split(":")
        if len(parts) not in (2, 3):
            raise invalid("does not have the format [hmac:]name:key")
        algorithm, name, key = (_DEFAULT_ALGORITHM, *parts) if len(parts) == 2 else (parts[0].lower(), *parts[1:])
        if algorithm not in TSIG_ALGORITHMS:
            raise invalid("has an unsupported algorithm; expected one of " + ", ".join(TSIG_ALGORITHMS))
        try:
            dns.name.from_text(name)
        except (dns.exception.DNSException, UnicodeError):
            raise invalid("has a key name that is not a DNS name") from None
        try:
            secret = base64.b64decode(key, validate=True)
        except ValueError:  # including binascii.Error
            raise invalid("has a key that is not base64") from None
        if not name or not secret:
            raise invalid("has an empty name or key")
        return cls(name, Secret(secret), algorithm)

    @classmethod
    async def read(cls, source: CredentialSource | None, credentials: CredentialReader) -> Self | None:
        return None if source is None else cls.parse(await credentials.read_text(source), str(source))

    def for_dnspython(self) -> dns.tsig.Key:
        return dns.tsig.Key(self.name, self.secret.reveal(), self.algorithm)


class NotAuthorized(CertmountError):
    """The server rejects the authority: an administrator must change the configuration."""

    def __init__(self, server: object, problem: str, hint: str = "") -> None:
        super().__init__(Reason.ISSUER_UNAVAILABLE, Fault(f"DNS server {server}", f"not authorized: {problem}", hint))


@dataclass(frozen=True, slots=True)
class Nameserver:
    """One DNS server."""

    address: str
    port: int = _PORT

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """Parse ``ADDRESS``, ``ADDRESS:PORT`` or ``[IPV6]:PORT``, and resolve a host name; raise CertmountError."""
        host, colon, port = text.rpartition(":")
        if not colon or (":" in host and not host.endswith("]")):
            host, port = text, str(_PORT)
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise CertmountError(Reason.INVALID_REQUEST, Fault(field, f"{text!r} is not ADDRESS:PORT"))
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise issuer_unavailable(field, f"{host} cannot be resolved ({error})") from None
        return cls(str(found[0][4][0]), int(port))

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    async def query(
        self, name: dns.name.Name, kind: dns.rdatatype.RdataType, *, recursive: bool
    ) -> dns.message.Message:
        flags = dns.flags.RD if recursive else dns.flags.Flag(0)
        query = dns.message.make_query(name, kind, flags=flags)
        try:
            response, _ = await dns.asyncquery.udp_with_fallback(query, self.address, _TIMEOUT_S, self.port)
        except (OSError, EOFError, dns.exception.DNSException) as error:
            raise self._unavailable(error) from None
        return response

    async def update(self, update: dns.update.UpdateMessage, key: TsigKey | None) -> dns.message.Message:
        """Send an update (RFC 2136) over TCP, so that it is not sent twice; raise NotAuthorized or IssuerUnavailable."""
        if key is not None:
            update.use_tsig(key.for_dnspython())
        zone = update.zone[0].name if update.zone else dns.name.root
        try:
            response = await dns.asyncquery.tcp(update, self.address, _TIMEOUT_S, self.port)
        except (OSError, EOFError, dns.exception.DNSException) as error:
            for kind, problem in _TSIG_ERRORS:
                if isinstance(error, kind):
                    hint = "compare name, algorithm and secret of the key on both sides"
                    raise NotAuthorized(self, problem, hint) from None
            raise self._unavailable(error) from None
        code = response.rcode()
        problem = f"returned {dns.rcode.to_text(code)} to an update of zone {zone}"
        if code in _REJECTIONS:
            hint = "use the zone's primary, and allow the key to update TXT records at _acme-challenge names"
            raise NotAuthorized(self, f"it {problem}", hint)
        if code != dns.rcode.NOERROR:
            raise issuer_unavailable(f"DNS server {self}", problem)
        return response

    def _unavailable(self, error: Exception) -> CertmountError:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        timeout = isinstance(error, dns.exception.Timeout)
        problem = "does not respond in time" if timeout else f"cannot be queried ({cause})"
        return issuer_unavailable(f"DNS server {self}", problem)
