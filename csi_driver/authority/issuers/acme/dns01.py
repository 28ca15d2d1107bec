"""Proof by DNS: a TXT record at ``_acme-challenge`` (RFC 8555 section 8.4), set by DNS UPDATE (RFC 2136)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence

import dns.message
import dns.name
import dns.rdatatype
import dns.rdtypes.txtbase
import dns.update
from josepy.b64 import b64encode

from csi_driver.authority.issuers.acme.credentials import Credentials
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.settings import Dns01
from csi_driver.authority.issuers.acme.state import Proof
from csi_driver.authority.issuers.acme.zone import Zones
from csi_driver.core.errors import CertmountError, Fault, Reason

KIND = "dns-01"
_TTL_S = 60
_STEP_S = 1.0


class DnsProofs:
    """Sets and removes TXT records; exactly its own, as another's may stand beside them."""

    kind = KIND

    def __init__(self, settings: Dns01, credentials: Credentials) -> None:
        self._settings = settings
        self._credentials = credentials
        self._zones = Zones(settings)

    async def examine(self, names: Sequence[str]) -> None:
        """Whether all names could be proven, as far as can be told without changing anything; raises CertmountError."""
        for name in dict.fromkeys(one.removeprefix("*.") for one in names):
            await self._zones.place(name)

    async def prepare(self, name: str, token: str, key_authorization: str) -> Proof:
        """What is to be shown for a name, and where; raises CertmountError."""
        place = await self._zones.place(name)
        digest = hashlib.sha256(key_authorization.encode("ascii")).digest()
        value = b64encode(digest).decode("ascii")
        return Proof(KIND, name, token, value, place.name.to_text(), place.zone.to_text())

    async def show(self, proofs: Sequence[Proof]) -> None:
        """Adds the records and returns when every server that the CA may ask has them; raises CertmountError."""
        primary, key = await self._zones.primary(), await self._credentials.tsig_key()
        for proof in proofs:
            update = dns.update.UpdateMessage(proof.zone)
            # Added, never replaced: a name and its wildcard are proven by two records side by side.
            update.add(proof.place, _TTL_S, dns.rdatatype.TXT, proof.value)
            await primary.update(update, key)
        deadline = time.monotonic() + self._settings.patience.total_seconds()
        for zone in dict.fromkeys(proof.zone for proof in proofs):
            servers = await self._zones.authoritative(dns.name.from_text(zone))
            own = [proof for proof in proofs if proof.zone == zone]
            await asyncio.gather(*(self._awaited(name, server, own, deadline) for name, server in servers))

    async def hide(self, proof: Proof) -> None:
        """Removes one record, also where it is not there; raises CertmountError."""
        update = dns.update.UpdateMessage(proof.zone)
        update.delete(proof.place, dns.rdatatype.TXT, proof.value)
        await (await self._zones.primary()).update(update, await self._credentials.tsig_key())

    async def _awaited(
        self, name: str, addresses: Sequence[Nameserver], proofs: Sequence[Proof], deadline: float
    ) -> None:
        for proof in proofs:
            while problem := await self._missing(addresses, proof):
                if time.monotonic() >= deadline:
                    waited = self._settings.patience.total_seconds()
                    hint = "the CA is not asked before it does"
                    fault = Fault(f"DNS server {name}", f"{problem} after {waited:g} s", hint)
                    raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault)
                await asyncio.sleep(_STEP_S)

    async def _missing(self, addresses: Sequence[Nameserver], proof: Proof) -> str:
        """Why the CA would not find the record at this server; empty when it would.

        The first address that answers speaks for the server: a network without IPv6 reaches only some of them.
        """
        problem = ""
        for server in addresses:
            try:
                answer = await server.ask(dns.name.from_text(proof.place), dns.rdatatype.TXT, recursive=False)
            except CertmountError as error:
                problem = "; ".join(str(fault) for fault in error.faults)
                continue
            return "" if proof.value in _texts(answer) else f"does not show the record at {proof.place}"
        return problem


def _texts(answer: dns.message.Message) -> list[str]:
    return [
        b"".join(record.strings).decode("ascii", "replace")
        for rrset in answer.answer
        for record in rrset
        if isinstance(record, dns.rdtypes.txtbase.TXTBase)
    ]
