"""Solves DNS-01 challenges (RFC 8555 section 8.4): a TXT record at ``_acme-challenge``, set with DNS UPDATE (RFC 2136)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rdtypes.txtbase
import dns.resolver
import dns.update
from josepy.b64 import b64encode

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.config import Dns01
from csi_driver.authority.issuers.acme.nameserver import Nameserver, NotAuthorized, TsigKey
from csi_driver.authority.issuers.acme.state import ChallengeRecord
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.core.errors import CertmountError

_LABEL = "_acme-challenge"  # RFC 8555 section 8.4
_MAX_CNAMES = 8
_TTL_S = 60
_INTERVAL_S = 1.0


class ZoneFinder:
    """Looks up DNS. It caches nothing, because administrators fix DNS between two attempts."""

    def __init__(self, configuration: Dns01) -> None:
        self._configuration = configuration

    async def primary(self) -> Nameserver:
        return await asyncio.to_thread(Nameserver.parse, self._configuration.server, "dns01.server")

    async def locate(self, name: str) -> tuple[dns.name.Name, dns.name.Name]:
        """Return the name of the TXT record for a host name, and its zone."""
        record = await self._follow_cnames(dns.name.from_text(f"{_LABEL}.{name.removeprefix('*.')}"))
        if self._configuration.zone is None:
            return record, await self._find_zone(record)
        zone = dns.name.from_text(self._configuration.zone)
        if not record.is_subdomain(zone):
            problem = f"{_text(record)} is not in zone {_text(zone)}"
            hint = f"delegate it with a CNAME into {_text(zone)}, or omit zone"
            raise issuer_unavailable("dns01.zone", problem, hint)
        return record, zone

    async def authoritative(self, zone: dns.name.Name) -> tuple[tuple[str, tuple[Nameserver, ...]], ...]:
        if texts := self._configuration.nameservers:
            servers = [await asyncio.to_thread(Nameserver.parse, text, "dns01.nameservers") for text in texts]
            return tuple((text, (server,)) for text, server in zip(texts, servers, strict=True))
        response = await (await self.primary()).query(zone, dns.rdatatype.NS, recursive=False)
        hosts = [record.target for record in _records(response, zone, dns.rdatatype.NS)]
        found = [(_text(host), tuple(map(Nameserver, await self._addresses(host)))) for host in hosts]
        reachable = tuple((host, addresses) for host, addresses in found if addresses)
        if not reachable:
            problem = "has no name server with an address"
            raise issuer_unavailable(f"zone {_text(zone)}", problem, "set dns01.nameservers")
        return reachable

    async def _follow_cnames(self, name: dns.name.Name) -> dns.name.Name:
        """Return the end of a chain of CNAMEs, which the CA also follows (RFC 8555 section 8.4)."""
        current = name
        for _ in range(_MAX_CNAMES):
            response = await self._resolve(current, dns.rdatatype.CNAME)
            records = _records(response, current, dns.rdatatype.CNAME)
            if not records:
                return current
            current = records[0].target
        raise issuer_unavailable(_text(current), f"has a chain of more than {_MAX_CNAMES} CNAMEs, or a loop")

    async def _find_zone(self, name: dns.name.Name) -> dns.name.Name:
        """Return the zone that contains the name, from the primary's SOA records (RFC 2308 section 3)."""
        primary = await self.primary()
        candidate = name
        while len(candidate.labels) > 2:
            response = await primary.query(candidate, dns.rdatatype.SOA, recursive=False)
            if response.flags & dns.flags.AA and response.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                rrsets = (*response.answer, *response.authority)
                owners = [rrset.name for rrset in rrsets if rrset.rdtype == dns.rdatatype.SOA]
                if owners and name.is_subdomain(owners[0]):
                    return owners[0]
            candidate = candidate.parent()
        hint = "set dns01.server to the zone's primary, or make _acme-challenge a CNAME into a zone of this server"
        raise NotAuthorized(primary, f"it has no zone that contains {_text(name)}", hint)

    async def _resolve(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        failure: CertmountError | None = None
        for server in await asyncio.to_thread(self._resolvers):
            try:
                response = await server.query(name, kind, recursive=True)
            except CertmountError as error:
                failure = error
                continue
            if response.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                return response
            problem = f"returned {dns.rcode.to_text(response.rcode())} to a query for {_text(name)}"
            failure = issuer_unavailable(f"DNS server {server}", problem)
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
        return tuple(Nameserver(str(address), system.port) for address in system.nameservers)


def _records(response: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> list[Any]:
    return next((list(one) for one in response.answer if one.name == name and one.rdtype == kind), [])


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True)


class Dns01Solver:
    """Adds and removes TXT records. Other records at the same name stay."""

    kind = "dns-01"

    def __init__(self, configuration: Dns01, credentials: CredentialReader) -> None:
        self._configuration = configuration
        self._credentials = credentials
        self._zones = ZoneFinder(configuration)

    async def check(self, names: Sequence[str]) -> None:
        for name in dict.fromkeys(one.removeprefix("*.") for one in names):
            await self._zones.locate(name)

    async def prepare(self, name: str, token: str, key_authorization: str) -> ChallengeRecord:
        record, zone = await self._zones.locate(name)
        value = b64encode(hashlib.sha256(key_authorization.encode("ascii")).digest()).decode("ascii")
        return ChallengeRecord(self.kind, name, token, value, record.to_text(), zone.to_text())

    async def publish(self, challenges: Sequence[ChallengeRecord]) -> None:
        """Add the records, and wait until every server that the CA may query serves them."""
        primary, key = await self._zones.primary(), await self._tsig_key()
        for challenge in challenges:
            update = dns.update.UpdateMessage(challenge.zone)
            # Add and never replace: a name and its wildcard need two records at the same name.
            update.add(challenge.record_name, _TTL_S, dns.rdatatype.TXT, challenge.value)
            await primary.update(update, key)
        deadline = time.monotonic() + self._configuration.patience.total_seconds()
        for zone in dict.fromkeys(challenge.zone for challenge in challenges):
            servers = await self._zones.authoritative(dns.name.from_text(zone))
            expected = [challenge for challenge in challenges if challenge.zone == zone]
            await asyncio.gather(*(self._wait(name, addresses, expected, deadline) for name, addresses in servers))

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        update = dns.update.UpdateMessage(challenge.zone)
        update.delete(challenge.record_name, dns.rdatatype.TXT, challenge.value)
        await (await self._zones.primary()).update(update, await self._tsig_key())

    async def _tsig_key(self) -> TsigKey | None:
        return await TsigKey.read(self._configuration.key, self._credentials)

    async def _wait(
        self, name: str, addresses: Sequence[Nameserver], challenges: Sequence[ChallengeRecord], deadline: float
    ) -> None:
        for challenge in challenges:
            while problem := await self._problem(addresses, challenge):
                if time.monotonic() >= deadline:
                    waited_s = self._configuration.patience.total_seconds()
                    hint = "the CA is not asked to validate before that"
                    raise issuer_unavailable(f"DNS server {name}", f"{problem} after {waited_s:g} s", hint)
                await asyncio.sleep(_INTERVAL_S)

    async def _problem(self, addresses: Sequence[Nameserver], challenge: ChallengeRecord) -> str:
        """Return why the CA would not find the record at the first address that responds, or an empty text."""
        problem = ""
        for server in addresses:  # a network without IPv6 reaches only some of them
            try:
                name = dns.name.from_text(challenge.record_name)
                response = await server.query(name, dns.rdatatype.TXT, recursive=False)
            except CertmountError as error:
                problem = "; ".join(str(fault) for fault in error.faults)
                continue
            return "" if challenge.value in _texts(response) else f"does not serve {challenge.record_name}"
        return problem


def _texts(response: dns.message.Message) -> list[str]:
    return [
        b"".join(record.strings).decode("ascii", "replace")
        for rrset in response.answer
        for record in rrset
        if isinstance(record, dns.rdtypes.txtbase.TXTBase)
    ]
