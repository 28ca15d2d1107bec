"""Where a challenge's TXT record has to stand: CNAMEs followed, the zone found, and the servers that show it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.rdtypes.ANY.NS
import dns.resolver
import dns.rrset

from csi_driver.authority.issuers.acme.nameserver import Nameserver, NotAuthorised
from csi_driver.authority.issuers.acme.settings import Dns01
from csi_driver.core.errors import CertmountError, Fault, Reason

LABEL = "_acme-challenge"
"""RFC 8555 section 8.4."""
_MOST_HOPS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A name in its zone."""

    name: dns.name.Name
    zone: dns.name.Name


class Zones:
    """Looks things up in DNS; keeps nothing, as what is wrong is put right between two tries."""

    def __init__(self, settings: Dns01) -> None:
        self._settings = settings

    async def primary(self) -> Nameserver:
        """The server that takes updates."""
        return await asyncio.to_thread(Nameserver.parse, self._settings.server, "dns01.server")

    async def place(self, name: str) -> Place:
        """Where the record that proves ``name`` has to stand.

        Raises:
            CertmountError: where CNAMEs go in a circle, servers don't answer, or no zone of the primary holds the name.
        """
        place = await self._followed(dns.name.from_text(f"{LABEL}.{name.removeprefix('*.')}"))
        if self._settings.zone is None:
            return Place(place, await self._walked(place))
        zone = dns.name.from_text(self._settings.zone)
        if not place.is_subdomain(zone):
            problem = f"{_text(place)} is not in zone {_text(zone)}"
            hint = f"delegate it by a CNAME into {_text(zone)}, or leave the zone to be found"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault("dns01.zone", problem, hint))
        return Place(place, zone)

    async def authoritative(self, zone: dns.name.Name) -> tuple[tuple[str, tuple[Nameserver, ...]], ...]:
        """The servers that the CA may ask about the zone: each with a name for people, and all its addresses."""
        if self._settings.nameservers:
            named = [
                (text, await asyncio.to_thread(Nameserver.parse, text, "dns01.nameservers"))
                for text in self._settings.nameservers
            ]
            return tuple((text, (server,)) for text, server in named)
        answer = await (await self.primary()).ask(zone, dns.rdatatype.NS, recursive=False)
        records = _records(answer, zone, dns.rdatatype.NS)
        hosts = [record.target for record in records or () if isinstance(record, dns.rdtypes.ANY.NS.NS)]
        found = [(_text(host), tuple(Nameserver(address) for address in await self._addresses(host))) for host in hosts]
        if not any(addresses for _, addresses in found):
            hint = "name the servers in dns01.nameservers"
            problem = "has no name server with an address"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"zone {_text(zone)}", problem, hint))
        return tuple((host, addresses) for host, addresses in found if addresses)

    async def _followed(self, name: dns.name.Name) -> dns.name.Name:
        """The end of the CNAMEs that begin at ``name`` (delegation; RFC 8555 section 8.4 has the CA follow them likewise)."""
        seen = [name]
        for _ in range(_MOST_HOPS):
            answer = await self._resolved(seen[-1], dns.rdatatype.CNAME)
            records = _records(answer, seen[-1], dns.rdatatype.CNAME)
            if not records:
                return seen[-1]
            target = records[0]
            assert isinstance(target, dns.rdtypes.ANY.CNAME.CNAME)  # noqa: S101  # asked for by type
            seen.append(target.target)
        problem = f"has more than {_MOST_HOPS} CNAMEs, one after the other, or a circle of them"
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(_text(name), problem))

    async def _walked(self, name: dns.name.Name) -> dns.name.Name:
        """The zone that ``name`` is in, as the primary says by its SOA (RFC 2308 section 3 has it beside every negative answer)."""
        primary = await self.primary()
        candidate = name
        while len(candidate.labels) > 2:
            answer = await primary.ask(candidate, dns.rdatatype.SOA, recursive=False)
            if answer.flags & dns.flags.AA and answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                owners = [
                    rrset.name for rrset in (*answer.answer, *answer.authority) if rrset.rdtype == dns.rdatatype.SOA
                ]
                if owners and name.is_subdomain(owners[0]):
                    return owners[0]
            candidate = candidate.parent()
        hint = "dns01.server must be the primary of the zone, or _acme-challenge a CNAME into a zone of its own there"
        raise NotAuthorised(primary, f"it has no zone that holds {_text(name)}", hint)

    async def _resolved(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        """The first answer that a resolver gives; raises the last failure where none does."""
        failure: CertmountError | None = None
        for server in await asyncio.to_thread(self._resolvers):
            try:
                answer = await server.ask(name, kind, recursive=True)
            except CertmountError as error:
                failure = error
                continue
            if answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                return answer
            problem = f"answers {dns.rcode.to_text(answer.rcode())} to a question for {_text(name)}"
            failure = CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"DNS server {server}", problem))
        raise failure or CertmountError(Reason.ISSUER_UNAVAILABLE, Fault("dns01.resolvers", "the system knows none"))

    async def _addresses(self, host: dns.name.Name) -> list[str]:
        found = []
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            answer = await self._resolved(host, kind)
            found += [record.to_text() for rrset in answer.answer if rrset.rdtype == kind for record in rrset]
        return found

    def _resolvers(self) -> tuple[Nameserver, ...]:
        if self._settings.resolvers:
            return tuple(Nameserver.parse(text, "dns01.resolvers") for text in self._settings.resolvers)
        system = dns.resolver.Resolver()
        return tuple(Nameserver(str(address), system.port) for address in system.nameservers)


def _records(answer: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> list[object] | None:
    rrset = next((one for one in answer.answer if one.name == name and one.rdtype == kind), None)
    return None if rrset is None else list(rrset)


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)
