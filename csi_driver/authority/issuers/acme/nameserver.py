"""Queries and updates to one DNS server, with errors that explain what to fix."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.update

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.dns_exchange import EXCHANGE_ERRORS, TIMEOUT_S, exchange
from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.core.errors import CertmountError, Fault, Reason

PORT = 53
_MAX_ADDRESSES = 4
_SERVER = re.compile(r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_REJECTIONS = (dns.rcode.REFUSED, dns.rcode.NOTAUTH, dns.rcode.NOTZONE, dns.rcode.NXRRSET, dns.rcode.YXRRSET)
_CANNOT_CHANGE = (dns.rcode.REFUSED, dns.rcode.NOTAUTH, dns.rcode.NOTZONE)
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


class NotAuthorized(CertmountError):
    """The server rejects the authority: an administrator must change the configuration."""

    def __init__(self, server: object, problem: str, hint: str = "") -> None:
        super().__init__(Reason.ISSUER_UNAVAILABLE, Fault(f"DNS server {server}", f"not authorized: {problem}", hint))


@dataclass(frozen=True, slots=True)
class Nameserver:
    """One DNS server. The first of its addresses that responds is used: not every network has IPv4 and IPv6."""

    addresses: tuple[str, ...]
    port: int = PORT

    @classmethod
    def parse(cls, text: str, field: str, default_port: int = PORT) -> Self:
        """Parse ``ADDRESS``, ``ADDRESS:PORT`` or ``[IPV6]:PORT``, and resolve a host name; raise CertmountError."""
        match = _SERVER.fullmatch(f"[{text}]" if text.count(":") > 1 and "[" not in text else text)
        port = int(match["port"] or default_port) if match else 0
        if match is None or not 0 < port < 65536:
            raise CertmountError(Reason.INVALID_REQUEST, Fault(field, f"{text!r} is not ADDRESS:PORT"))
        host = match["ipv6"] or match["host"]
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise issuer_unavailable(field, f"{host} cannot be resolved ({error})") from None
        return cls.of([str(one[4][0]) for one in found], port)

    @classmethod
    def of(cls, addresses: Sequence[str], port: int = PORT) -> Self:
        return cls(tuple(dict.fromkeys(addresses))[:_MAX_ADDRESSES], port)

    def __str__(self) -> str:
        return " or ".join(f"[{one}]:{self.port}" if ":" in one else f"{one}:{self.port}" for one in self.addresses)

    async def query(
        self, name: dns.name.Name, kind: dns.rdatatype.RdataType, *, recursive: bool, timeout_s: float = TIMEOUT_S
    ) -> dns.message.Message:
        """Return the response, with any code; raise CertmountError IssuerUnavailable. ``timeout_s`` is for an address."""
        flags = dns.flags.RD if recursive else dns.flags.Flag(0)
        try:
            return await self._exchange(dns.message.make_query(name, kind, flags=flags), udp=True, timeout_s=timeout_s)
        except EXCHANGE_ERRORS as error:
            raise self.unavailable(error) from None

    async def update(self, update: dns.update.UpdateMessage, key: TsigKey | None) -> None:
        """Send an update (RFC 2136) by TCP; raise NotAuthorized or IssuerUnavailable."""
        code = await self._send_update(update, key)
        problem = f"returned {dns.rcode.to_text(code)} to an update of zone {update.zone[0].name}"
        if code in _REJECTIONS:
            hint = "use the zone's primary, and allow the key to update TXT records at _acme-challenge names"
            raise NotAuthorized(self, f"it {problem}", hint)
        if code != dns.rcode.NOERROR:
            raise issuer_unavailable(f"DNS server {self}", problem)

    async def has_own_cname(self, zone: dns.name.Name, name: dns.name.Name, key: TsigKey | None) -> bool:
        """Tell whether the zone has a CNAME at exactly this name, and not only a wildcard that matches the name.

        A query can't tell: RFC 4592 section 3.3.1 makes both answers equal. A prerequisite of an update can, as RFC 2136
        section 3.2 compares it with the content of the zone. The update changes nothing. If the server doesn't accept
        updates of the zone, the result is True, because certmount can't replace what the wildcard returns.
        """
        update = dns.update.UpdateMessage(zone)
        update.present(name, dns.rdatatype.CNAME)
        code = await self._send_update(update, key)
        if code not in (dns.rcode.NOERROR, dns.rcode.NXRRSET, *_CANNOT_CHANGE):
            problem = f"returned {dns.rcode.to_text(code)} to an update of zone {zone} without changes"
            raise issuer_unavailable(f"DNS server {self}", problem)
        return code != dns.rcode.NXRRSET

    async def _send_update(self, update: dns.update.UpdateMessage, key: TsigKey | None) -> dns.rcode.Rcode:
        if key is not None:
            update.use_tsig(key.for_dnspython())
        try:
            response = await self._exchange(update, udp=False)  # A repeated datagram would be a second update
        except EXCHANGE_ERRORS as error:
            for kind, problem in _TSIG_ERRORS:
                if isinstance(error, kind):
                    hint = "compare name, algorithm and secret of the key on both sides"
                    raise NotAuthorized(self, problem, hint) from None
            raise self.unavailable(error) from None
        return response.rcode()

    async def _exchange(
        self, request: dns.message.Message, *, udp: bool, timeout_s: float = TIMEOUT_S
    ) -> dns.message.Message:
        *others, last = self.addresses
        for address in others:
            try:
                return await exchange(address, self.port, request, udp=udp, timeout_s=timeout_s)
            except OSError:
                continue  # Unreachable, at least from here; the last address reports the problem
        return await exchange(last, self.port, request, udp=udp, timeout_s=timeout_s)

    def unavailable(self, error: Exception) -> CertmountError:
        if isinstance(error, TimeoutError):
            return issuer_unavailable(f"DNS server {self}", "does not respond in time")
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return issuer_unavailable(f"DNS server {self}", f"cannot be queried ({cause})")
