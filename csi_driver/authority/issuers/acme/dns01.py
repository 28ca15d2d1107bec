"""Solves DNS-01 challenges (RFC 8555 section 8.4): a TXT record at ``_acme-challenge``, set with DNS UPDATE (RFC 2136)."""

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

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.acme.config import Dns01
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.state import ChallengeRecord
from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.authority.issuers.acme.zones import ZoneFinder
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.key_encoding import encode_base64url
from csi_driver.core.errors import CertmountError

_TTL_S = 0  # A resolver must not serve the record of one order to the CA that validates the next one
_INTERVAL_S = 1.0


class Dns01Solver:
    """Adds and removes TXT records. Other records at the same name stay."""

    kind = "dns-01"

    def __init__(self, configuration: Dns01, credentials: CredentialReader) -> None:
        self._configuration = configuration
        self._credentials = credentials
        self._zones = ZoneFinder(configuration, self._tsig_key)

    def using(self, tsig_secret: str) -> Dns01Solver:
        configuration = self._configuration
        return Dns01Solver(configuration.with_key_of(tsig_secret), self._credentials) if tsig_secret else self

    async def check(self, names: Sequence[str]) -> None:
        for name in dict.fromkeys(one.removeprefix("*.") for one in names):
            await self._zones.locate(name)

    async def prepare(self, name: str, token: str, key_authorization: str) -> ChallengeRecord:
        record, zone = await self._zones.locate(name)
        value = encode_base64url(hashlib.sha256(key_authorization.encode("ascii")).digest())
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
            await asyncio.gather(*(self._wait(name, server, expected, deadline) for name, server in servers))

    async def unpublish(self, challenge: ChallengeRecord) -> None:
        update = dns.update.UpdateMessage(challenge.zone)
        update.delete(challenge.record_name, dns.rdatatype.TXT, challenge.value)
        await (await self._zones.primary()).update(update, await self._tsig_key())

    async def _tsig_key(self) -> TsigKey | None:
        return await TsigKey.read(self._configuration.key, self._credentials)

    async def _wait(
        self, name: str, server: Nameserver, challenges: Sequence[ChallengeRecord], deadline: float
    ) -> None:
        for challenge in challenges:
            while problem := await self._problem(server, challenge):
                if time.monotonic() >= deadline:
                    waited_s = self._configuration.patience.total_seconds()
                    hint = "the CA is not asked to validate before that"
                    raise issuer_unavailable(f"DNS server {name}", f"{problem} after {waited_s:g} s", hint)
                await asyncio.sleep(_INTERVAL_S)

    async def _problem(self, server: Nameserver, challenge: ChallengeRecord) -> str:
        """Return why the CA would not find the record at this server, or an empty text."""
        name = dns.name.from_text(challenge.record_name)
        try:
            response = await server.query(name, dns.rdatatype.TXT, recursive=False)
        except CertmountError as error:
            return "; ".join(str(fault) for fault in error.faults)
        return "" if challenge.value in _texts(response) else f"does not serve {challenge.record_name}"


def _texts(response: dns.message.Message) -> list[str]:
    return [
        b"".join(record.strings).decode("ascii", "replace")
        for rrset in response.answer
        for record in rrset
        if isinstance(record, dns.rdtypes.txtbase.TXTBase)
    ]
