"""Questions and updates to DNS servers, and their refusals in words."""

from __future__ import annotations

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

from csi_driver.authority.issuers.acme.tsig import TsigKey
from csi_driver.core.errors import CertmountError, Fault, Reason

_TIMEOUT_S = 5.0
_PORT = 53
_REFUSALS = (dns.rcode.REFUSED, dns.rcode.NOTAUTH, dns.rcode.NOTZONE, dns.rcode.NXRRSET, dns.rcode.YXRRSET)
_TSIG_MEANINGS: tuple[tuple[type[dns.exception.DNSException], str], ...] = (
    (dns.tsig.PeerBadKey, "it does not know the TSIG key's name, or knows it for another algorithm"),
    (dns.tsig.PeerBadSignature, "it knows the TSIG key's name, but another secret"),
    (dns.tsig.PeerBadTime, "its clock and ours are more than five minutes apart"),
    (dns.tsig.PeerError, "it does not accept the TSIG signature"),
    (dns.tsig.BadTime, "its clock and ours are more than five minutes apart"),
    (dns.tsig.BadSignature, "its answer is not signed with our TSIG key"),
    (dns.tsig.BadKey, "its answer is not signed with our TSIG key"),
    (dns.message.UnknownTSIGKey, "its answer is signed with another TSIG key"),
)


class NotAuthorised(CertmountError):
    """The server is there and won't do it: an administrator has to put something right."""

    def __init__(self, server: object, problem: str, hint: str = "") -> None:
        super().__init__(Reason.ISSUER_UNAVAILABLE, Fault(f"DNS server {server}", f"not authorised: {problem}", hint))


@dataclass(frozen=True, slots=True)
class Nameserver:
    """One DNS server."""

    address: str
    port: int = _PORT

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """Takes ``ADDRESS``, ``ADDRESS:PORT`` or ``[IPV6]:PORT``; a host name is looked up. Raises CertmountError."""
        host, colon, port = text.rpartition(":")
        if not colon or (":" in host and not host.endswith("]")):
            host, port = text, str(_PORT)
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise CertmountError(Reason.INVALID_REQUEST, Fault(field, f"{text!r} is not ADDRESS:PORT"))
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(field, f"{host} has no address ({error})")) from None
        return cls(str(found[0][4][0]), int(port))

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    async def ask(self, name: dns.name.Name, kind: dns.rdatatype.RdataType, *, recursive: bool) -> dns.message.Message:
        """Its answer, whatever the response code; raises CertmountError IssuerUnavailable where there is none."""
        flags = dns.flags.RD if recursive else dns.flags.Flag(0)
        query = dns.message.make_query(name, kind, flags=flags)
        try:
            answer, _ = await dns.asyncquery.udp_with_fallback(query, self.address, _TIMEOUT_S, self.port)
        except (OSError, EOFError, dns.exception.DNSException) as error:
            raise self._silent(error) from None
        return answer

    async def update(self, update: dns.update.UpdateMessage, key: TsigKey | None) -> None:
        """Has the server carry out an update (RFC 2136), over TCP so that nothing is sent twice.

        Raises:
            NotAuthorised: where the server refuses, in whichever of the ways there are.
            CertmountError: IssuerUnavailable where it doesn't answer or has trouble of its own.
        """
        if key is not None:
            update.use_tsig(key.for_wire())
        zone = update.zone[0].name if update.zone else dns.name.root
        try:
            answer = await dns.asyncquery.tcp(update, self.address, _TIMEOUT_S, self.port)
        except dns.exception.DNSException as error:
            for kind, meaning in _TSIG_MEANINGS:
                if isinstance(error, kind):
                    raise NotAuthorised(self, meaning, "compare name, algorithm and secret on both sides") from None
            raise self._silent(error) from None
        except (OSError, EOFError) as error:
            raise self._silent(error) from None
        code = answer.rcode()
        if code in _REFUSALS:
            hint = "it must be the zone's primary, and let the key set TXT records at _acme-challenge names"
            raise NotAuthorised(self, f"it answers {dns.rcode.to_text(code)} to an update of zone {zone}", hint)
        if code != dns.rcode.NOERROR:
            problem = f"answers {dns.rcode.to_text(code)} to an update of zone {zone}"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"DNS server {self}", problem))

    def _silent(self, error: Exception) -> CertmountError:
        words = (
            "does not answer in time"
            if isinstance(error, dns.exception.Timeout)
            else f"cannot be asked ({_cause(error)})"
        )
        return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"DNS server {self}", words))


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
