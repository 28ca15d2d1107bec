"""Looks at all that issuing needs, and orders nothing."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import dns.name
import dns.rdatatype
import dns.update

from csi_driver.authority.issuers.acme.client import CaProblem, Connection
from csi_driver.authority.issuers.acme.credentials import Credentials
from csi_driver.authority.issuers.acme.order import Workshop
from csi_driver.authority.issuers.acme.settings import AcmeSettings, Dns01
from csi_driver.authority.issuers.acme.zone import Zones
from csi_driver.authority.issuers.external import Finding
from csi_driver.core.errors import CertmountError

T = TypeVar("T")

_MOST_CLOCK_OFFSET_S = 60.0


async def findings(settings: AcmeSettings, shop: Workshop) -> list[Finding]:
    """What was found, good and bad; raises nothing."""
    found: list[Finding] = []
    account, connection = await _tried("account", shop.accounts.connect())
    found.append(account or Finding("account", True, f"known to {settings.directory}"))
    if connection is not None:
        found += await _directory(settings, shop, connection)
    if settings.dns01 is not None:
        found += await _dns(settings.dns01, shop.credentials)
    if settings.http01 is not None:
        text = "can only be seen with an order; each name is tested before the CA is asked"
        found.append(Finding("HTTP-01", True, text))
    if settings.dns01 is None and settings.http01 is None:
        found.append(Finding("proof", False, "neither dns01 nor http01 is set; no name can be proven to the CA"))
    return found


async def _directory(settings: AcmeSettings, shop: Workshop, connection: Connection) -> list[Finding]:
    trouble, _ = await _tried("directory", shop.in_thread(connection.load_directory))
    if trouble is not None:
        return [trouble]
    found = [Finding("directory", True, f"{settings.directory} is reached, and its TLS certificate trusted")]
    offset = connection.clock_offset_s
    if offset is not None and abs(offset) > _MOST_CLOCK_OFFSET_S:
        found.append(
            Finding("clock", False, f"the CA's clock is {offset:+.0f} s from ours; look at time synchronisation")
        )
    profiles = connection.directory.meta.profiles or {}
    if settings.profile is not None and settings.profile not in profiles:
        offered = ", ".join(sorted(profiles)) or "none"
        found.append(Finding("profile", False, f"the CA has no profile {settings.profile}; it offers {offered}"))
    return found


async def _dns(settings: Dns01, credentials: Credentials) -> list[Finding]:
    """A signed update of nothing tells whether server, zone and key fit together; the right to set records it can't tell."""
    zones = Zones(settings)
    trouble, key = await _tried("TSIG key", credentials.tsig_key())
    if trouble is not None:
        return [trouble]
    trouble, primary = await _tried("DNS server", zones.primary())
    if trouble is not None or primary is None:
        return [trouble] if trouble is not None else []
    zone = dns.name.from_text(settings.zone) if settings.zone is not None else None
    if zone is None:
        trouble, _ = await _tried("DNS server", primary.ask(dns.name.root, dns.rdatatype.SOA, recursive=False))
        text = f"{primary} answers; which zone and whether the key is right shows with the first name"
        return [trouble or Finding("DNS server", True, text)]
    trouble, _ = await _tried("DNS update", primary.update(dns.update.UpdateMessage(zone), key))
    found = [trouble or Finding("DNS update", True, f"{primary} takes updates of zone {zone} with our key")]
    trouble, servers = await _tried("name servers", zones.authoritative(zone))
    found.append(trouble or Finding("name servers", True, ", ".join(name for name, _ in servers or ())))
    return found


async def _tried(subject: str, call: Awaitable[T]) -> tuple[Finding | None, T | None]:
    try:
        return None, await call
    except CaProblem as problem:
        return Finding(subject, False, problem.text), None
    except CertmountError as error:
        return Finding(subject, False, "; ".join(str(fault) for fault in error.faults)), None
