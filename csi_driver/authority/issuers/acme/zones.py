"""Finds the name and the zone of a challenge's TXT record. Nothing that it asks can be cached to the CA's disadvantage.

A resolver that learns that a name does not exist repeats that until the negative TTL ends (RFC 2308 section 5). So before
the record exists, only authoritative servers are asked for the names of challenges.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.resolver

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.config import Dns01
from csi_driver.authority.issuers.acme.nameserver import Nameserver, NotAuthorized
from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.core.errors import CertmountError

LABEL = "_acme-challenge"  # RFC 8555 section 8.4
MAX_CNAMES = 8
MAX_NAMESERVERS = 16
LOOKUP_S = 30.0
_FOREIGN_SERVERS = 2
_FOREIGN_TIMEOUT_S = 2.0
_ANSWERED = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
_NOT_ITS_ZONE = (*_ANSWERED, dns.rcode.REFUSED, dns.rcode.NOTAUTH)


class ZoneFinder:
    """Looks up DNS. It caches nothing, because administrators fix DNS between two attempts."""

    def __init__(self, configuration: Dns01, read_key: Callable[[], Awaitable[TsigKey | None]]) -> None:
        self._configuration = configuration
        self._read_key = read_key
        self._zone = None if configuration.zone is None else dns.name.from_text(configuration.zone)

    async def primary(self) -> Nameserver:
        return await asyncio.to_thread(Nameserver.parse, self._configuration.server, "dns01.server")

    async def locate(self, name: str) -> tuple[dns.name.Name, dns.name.Name]:
        """Return the name of the TXT record for a host name, and its zone; raise CertmountError."""
        record = dns.name.from_text(f"{LABEL}.{name.removeprefix('*.')}")
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await self._follow(record)
        except TimeoutError:
            raise issuer_unavailable(_text(record), f"could not be looked up within {LOOKUP_S:g} s") from None

    async def authoritative(self, zone: dns.name.Name) -> tuple[tuple[str, Nameserver], ...]:
        """Return the servers that must serve a record of the zone, with their names."""
        if texts := self._configuration.nameservers:
            return tuple(
                [(text, await asyncio.to_thread(Nameserver.parse, text, "dns01.nameservers")) for text in texts]
            )
        response = await (await self.primary()).query(zone, dns.rdatatype.NS, recursive=False)
        hosts = [record.target for record in _records(response, zone, dns.rdatatype.NS)]
        if len(hosts) > MAX_NAMESERVERS:
            problem = f"has {len(hosts)} name servers; expected at most {MAX_NAMESERVERS}"
            raise issuer_unavailable(f"zone {_text(zone)}", problem, "set dns01.nameservers")
        found = await asyncio.gather(*(self._addresses(host) for host in hosts))
        servers = zip(hosts, found, strict=True)
        reachable = tuple((_text(host), Nameserver.of(addresses)) for host, addresses in servers if addresses)
        if not reachable:
            problem = "has no name server with an address"
            raise issuer_unavailable(f"zone {_text(zone)}", problem, "set dns01.nameservers")
        return reachable

    async def _follow(self, name: dns.name.Name) -> tuple[dns.name.Name, dns.name.Name]:
        """Return the end of a chain of CNAMEs, which the CA also follows (RFC 8555 section 8.4), and its zone."""
        primary = await self.primary()
        current = name
        for _ in range(MAX_CNAMES + 1):
            response = await self._own_answer(primary, current)
            zone = None if response is None else await self._changeable_zone(primary, current, response)
            if response is None and self._zone is not None and current.is_subdomain(self._zone):
                return current, self._zone
            if response is None:
                response = await self._foreign_answer(current)
            target = _cname(response, current)
            if target is not None and zone is not None and not _has_dname(response):
                key = await self._read_key()
                target = target if await primary.has_own_cname(zone, current, key) else None
            if target is None:
                return current, zone or self._no_zone(primary, current)
            current = target
        raise issuer_unavailable(_text(name), f"has a chain of more than {MAX_CNAMES} CNAMEs, or a loop")

    def _no_zone(self, primary: Nameserver, name: dns.name.Name) -> dns.name.Name:
        if self._zone is not None:
            problem = f"{_text(name)} is not in zone {_text(self._zone)}"
            hint = f"delegate it with a CNAME into {_text(self._zone)}, or omit zone"
            raise issuer_unavailable("dns01.zone", problem, hint)
        hint = "set dns01.server to the zone's primary, or make _acme-challenge a CNAME into a zone of this server"
        raise NotAuthorized(primary, f"it has no zone that contains {_text(name)}", hint)

    async def _own_answer(self, primary: Nameserver, name: dns.name.Name) -> dns.message.Message | None:
        """Return the CNAME answer of a server in the configuration; None if none of them is authoritative for the name."""
        servers = [primary]
        if self._zone is not None and name.is_subdomain(self._zone):
            nameservers = self._configuration.nameservers
            servers += [await asyncio.to_thread(Nameserver.parse, one, "dns01.nameservers") for one in nameservers]
        for server in servers:
            response = await server.query(name, dns.rdatatype.CNAME, recursive=False)
            if _is_authoritative(response):
                return response
            if response.rcode() not in _NOT_ITS_ZONE:
                # Another server may answer that the name doesn't exist. So don't ask it, but wait for this one.
                raise _unexpected(server, response, name)
        return None

    async def _changeable_zone(
        self, primary: Nameserver, name: dns.name.Name, response: dns.message.Message
    ) -> dns.name.Name | None:
        """Return the zone in which certmount can add a record at the name."""
        if self._zone is not None:
            return self._zone if name.is_subdomain(self._zone) else None
        candidate = name
        while len(candidate.labels) > 1:
            # A wildcard or a CNAME leads to the SOA record of another zone, so only answers without one count.
            if _is_authoritative(response) and _cname(response, candidate) is None:
                rrsets = (*response.answer, *response.authority)
                owners = [rrset.name for rrset in rrsets if rrset.rdtype == dns.rdatatype.SOA]
                if owners and candidate.is_subdomain(owners[0]):
                    return owners[0]
            candidate = candidate.parent()
            response = await primary.query(candidate, dns.rdatatype.SOA, recursive=False)
        return None

    async def _foreign_answer(self, name: dns.name.Name) -> dns.message.Message:
        """Return the CNAME answer for a name in a zone of other servers.

        The resolvers are asked only for the zones above the name. They are asked for the name itself if the network
        does not let the authority reach the servers of its zone.
        """
        depth = 2
        while depth < len(name.labels):
            zone = name.split(depth)[1]
            hosts = await self._hosts(zone)
            depth += 1
            if not hosts:
                continue
            try:
                response = await self._ask_hosts(hosts, name)
            except CertmountError:
                break
            if _is_authoritative(response):
                return response
            children = [rrset.name for rrset in response.authority if rrset.rdtype == dns.rdatatype.NS]
            if not children or not name.is_subdomain(children[0]) or len(children[0].labels) < depth:
                break
            depth = len(children[0].labels)
        return await self._resolve(name, dns.rdatatype.CNAME)

    async def _hosts(self, zone: dns.name.Name) -> list[dns.name.Name]:
        """Return the name servers of a zone, or nothing if it is none in this network."""
        try:
            response = await self._resolve(zone, dns.rdatatype.NS)
        except CertmountError:
            return []
        return [record.target for record in _records(response, zone, dns.rdatatype.NS)]

    async def _ask_hosts(self, hosts: list[dns.name.Name], name: dns.name.Name) -> dns.message.Message:
        addresses = [one for host in hosts[:_FOREIGN_SERVERS] for one in await self._addresses(host)]
        if not addresses:
            raise issuer_unavailable(_text(hosts[0]), "has no address")
        server = Nameserver.of(addresses)
        return await server.query(name, dns.rdatatype.CNAME, recursive=False, timeout_s=_FOREIGN_TIMEOUT_S)

    async def _resolve(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        failure: CertmountError | None = None
        for server in await asyncio.to_thread(self._resolvers):
            try:
                response = await server.query(name, kind, recursive=True)
            except CertmountError as error:
                failure = error
                continue
            if response.rcode() in _ANSWERED:
                return response
            failure = _unexpected(server, response, name)
        raise failure or issuer_unavailable("dns01.resolvers", "the system has no resolvers")

    async def _addresses(self, host: dns.name.Name) -> list[str]:
        addresses = []
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            response = await self._resolve(host, kind)
            addresses += [record.to_text() for rrset in response.answer if rrset.rdtype == kind for record in rrset]
        return addresses

    def _resolvers(self) -> tuple[Nameserver, ...]:
        if self._configuration.resolvers:
            return tuple(Nameserver.parse(text, "dns01.resolvers") for text in self._configuration.resolvers)
        system = dns.resolver.Resolver()
        return tuple(Nameserver((str(address),), system.port) for address in system.nameservers)


def _is_authoritative(response: dns.message.Message) -> bool:
    return bool(response.flags & dns.flags.AA) and response.rcode() in _ANSWERED


def _cname(response: dns.message.Message, name: dns.name.Name) -> dns.name.Name | None:
    records = _records(response, name, dns.rdatatype.CNAME)
    return records[0].target if records else None


def _has_dname(response: dns.message.Message) -> bool:
    """Tell whether a CNAME follows from a DNAME, which also applies to names that exist (RFC 6672 section 2.4)."""
    return any(rrset.rdtype == dns.rdatatype.DNAME for rrset in response.answer)


def _records(response: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> list[Any]:
    return next((list(one) for one in response.answer if one.name == name and one.rdtype == kind), [])


def _unexpected(server: Nameserver, response: dns.message.Message, name: dns.name.Name) -> CertmountError:
    code = dns.rcode.to_text(response.rcode())
    return issuer_unavailable(f"DNS server {server}", f"returned {code} to a query for {_text(name)}")


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)
