"""Diagnoses an ACME issuer: the account, the directory and DNS. It creates no order."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import dns.name
import dns.rdatatype
import dns.update

from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem
from csi_driver.authority.issuers.acme.config import Dns01
from csi_driver.authority.issuers.acme.context import AcmeContext
from csi_driver.authority.issuers.acme.credentials import AcmeCredentials
from csi_driver.authority.issuers.acme.zone import ZoneFinder
from csi_driver.authority.issuers.findings import Finding
from csi_driver.core.errors import CertmountError

_T = TypeVar("_T")

_MAX_CLOCK_OFFSET_S = 60.0


async def diagnose_acme(context: AcmeContext) -> list[Finding]:
    """Check everything that issuing needs; raise nothing."""
    configuration = context.configuration
    failure, client = await _try("account", context.accounts.connect())
    findings = [failure or Finding("account", True, f"registered at {configuration.directory}")]
    if client is not None:
        findings += await _check_directory(context, client)
    if configuration.dns01 is not None:
        findings += await _check_dns(configuration.dns01, context.credentials)
    if configuration.http01 is not None:
        text = "only an order shows whether it works; the authority tests each name before the CA validates it"
        findings.append(Finding("HTTP-01", True, text))
    return findings


async def _check_directory(context: AcmeContext, client: AcmeClient) -> list[Finding]:
    configuration = context.configuration
    failure, _ = await _try("directory", context.in_thread(client.fetch_directory))
    if failure is not None:
        return [failure]
    text = f"{configuration.directory} is reachable, and its TLS certificate is trusted"
    findings = [Finding("directory", True, text)]
    offset_s = client.clock_offset_s
    if offset_s is not None and abs(offset_s) > _MAX_CLOCK_OFFSET_S:
        text = f"the CA's clock differs from the authority's by {offset_s:+.0f} s; synchronize the clocks"
        findings.append(Finding("clock", False, text))
    profiles = client.directory.meta.profiles or {}
    if configuration.profile is not None and configuration.profile not in profiles:
        offered = ", ".join(sorted(profiles)) or "none"
        text = f"the CA has no profile {configuration.profile}; it offers {offered}"
        findings.append(Finding("profile", False, text))
    return findings


async def _check_dns(configuration: Dns01, credentials: AcmeCredentials) -> list[Finding]:
    """Send a signed empty update, which shows that server, zone and key match, but not that the key may set records."""
    zones = ZoneFinder(configuration)
    failure, key = await _try("TSIG key", credentials.tsig_key())
    if failure is not None:
        return [failure]
    failure, primary = await _try("DNS server", zones.primary())
    if primary is None:
        return [failure] if failure is not None else []
    if configuration.zone is None:
        failure, _ = await _try("DNS server", primary.query(dns.name.root, dns.rdatatype.SOA, recursive=False))
        text = f"{primary} responds; the first order shows whether the zone and the key are right"
        return [failure or Finding("DNS server", True, text)]
    zone = dns.name.from_text(configuration.zone)
    failure, _ = await _try("DNS update", primary.update(dns.update.UpdateMessage(zone), key))
    findings = [failure or Finding("DNS update", True, f"{primary} accepts updates of zone {zone} with the key")]
    failure, servers = await _try("name servers", zones.authoritative(zone))
    findings.append(failure or Finding("name servers", True, ", ".join(name for name, _ in servers or ())))
    return findings


async def _try(subject: str, call: Awaitable[_T]) -> tuple[Finding | None, _T | None]:
    """Return a finding about the failure of the call, or its result."""
    try:
        return None, await call
    except AcmeProblem as problem:
        return Finding(subject, False, problem.text), None
    except CertmountError as error:
        return Finding(subject, False, "; ".join(str(fault) for fault in error.faults)), None
