"""Diagnoses an ACME issuer: the account, the directory and DNS. It creates no order."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable
from typing import TypeVar

import dns.name
import dns.rdatatype
import dns.update

from csi_driver.authority.issuers import Findings
from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem
from csi_driver.authority.issuers.acme.config import Dns01
from csi_driver.authority.issuers.acme.context import AcmeContext
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.authority.issuers.acme.zones import ZoneFinder
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.core.clocks import describe_skew
from csi_driver.core.errors import CertmountError

_T = TypeVar("_T")

_MAX_CLOCK_OFFSET_S = 60.0


async def diagnose_acme(context: AcmeContext) -> Findings:
    configuration, findings = context.configuration, Findings()
    await _try(findings, "account", _check_account(context, findings))
    if configuration.dns01 is not None:
        await _check_dns(configuration.dns01, context.credentials, findings)
    if configuration.http01 is not None:
        text = "only an order shows whether it works; the authority tests each name before the CA validates it"
        findings.add("HTTP-01", True, text)
    return findings


async def _check_account(context: AcmeContext, findings: Findings) -> bool:
    async with context.accounts.connect() as client:
        findings.add("account", True, f"registered at {context.configuration.directory}")
        await _check_directory(context, client, findings)
    return True


async def _check_directory(context: AcmeContext, client: AcmeClient, findings: Findings) -> None:
    configuration = context.configuration
    if await _try(findings, "directory", client.fetch_directory()) is None:
        return
    findings.add("directory", True, f"{configuration.directory} is reachable, and its TLS certificate is trusted")
    offset_s = client.clock_offset_s
    if offset_s is not None and abs(offset_s) > _MAX_CLOCK_OFFSET_S:
        findings.add("clock", False, describe_skew("the authority", "the CA", offset_s))
    profiles = client.directory.meta.profiles or {}
    if configuration.profile is not None and configuration.profile not in profiles:
        offered = ", ".join(sorted(profiles)) or "none"
        findings.add("profile", False, f"the CA has no profile {configuration.profile}; it offers {offered}")


async def _check_dns(configuration: Dns01, credentials: CredentialReader, findings: Findings) -> None:
    """Check DNS with the issuer's own key, then the keys of Secrets that requests can name."""
    await _check_dns_with_key(configuration, credentials, findings)
    for secret in configuration.tsig_secrets:
        await _check_key(configuration.with_key_of(secret), credentials, findings)


async def _check_key(configuration: Dns01, credentials: CredentialReader, findings: Findings) -> None:
    subject = f"TSIG key of {configuration.key}"
    key = await _try(findings, subject, TsigKey.read(configuration.key, credentials))
    if key is None:
        return
    text = f"{key.name} with {key.algorithm}; the first order shows whether it is right"
    if configuration.zone is not None:
        zone = dns.name.from_text(configuration.zone)
        parsing = asyncio.to_thread(Nameserver.parse, configuration.server, "dns01.server")
        primary = await _try(findings, "DNS server", parsing)
        if primary is None or await _try(findings, subject, _empty_update(primary, zone, key)) is None:
            return
        text = f"{primary} accepts updates of zone {zone} with it"
    findings.add(subject, True, text)


async def _check_dns_with_key(configuration: Dns01, credentials: CredentialReader, findings: Findings) -> None:
    """Send a signed empty update, which shows that server, zone and key match, but not that the key may set records."""
    read_key = functools.partial(TsigKey.read, configuration.key, credentials)
    zones, failed = ZoneFinder(configuration, read_key), len(findings)
    key = await _try(findings, "TSIG key", read_key())
    primary = await _try(findings, "DNS server", zones.primary())
    if primary is None or len(findings) > failed:
        return
    if configuration.zone is None:
        query = primary.query(dns.name.root, dns.rdatatype.SOA, recursive=False)
        if await _try(findings, "DNS server", query) is not None:
            text = f"{primary} responds; the first order shows whether the zone and the key are right"
            findings.add("DNS server", True, text)
        return
    zone = dns.name.from_text(configuration.zone)
    if await _try(findings, "DNS update", _empty_update(primary, zone, key)):
        findings.add("DNS update", True, f"{primary} accepts updates of zone {zone} with the key")
    servers = await _try(findings, "name servers", zones.authoritative(zone))
    if servers is not None:
        findings.add("name servers", True, ", ".join(name for name, _ in servers))


async def _empty_update(primary: Nameserver, zone: dns.name.Name, key: TsigKey | None) -> bool:
    await primary.update(dns.update.UpdateMessage(zone), key)
    return True


async def _try(findings: Findings, subject: str, call: Awaitable[_T]) -> _T | None:
    try:
        return await call
    except AcmeProblem as problem:
        findings.add(subject, False, problem.text)
    except CertmountError as error:
        findings.add(subject, False, "; ".join(str(fault) for fault in error.faults))
    return None
