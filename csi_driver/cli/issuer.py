"""``certmount issuer check``: diagnoses the issuers of an issuers file."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path

import click

from csi_driver.authority.issuers import Findings, Issuer, IssuerRequest
from csi_driver.authority.issuers.dependencies import CredentialReader, CSRAccess, IssuerDependencies
from csi_driver.authority.issuers.kinds import make_issuer, read_issuers
from csi_driver.cli.common import PATH, option
from csi_driver.config.located_yaml import MAX_BYTES
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.config.issuers import IssuerDeclaration
from csi_driver.core.durations import parse_duration
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.policy.engine import Grant
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import KeyType
from csi_driver.telemetry.logging import configure_logging

_FILE = Path("/etc/certmount/issuers/issuers.yaml")
"""Where deploy/ mounts it, so that ``kubectl exec`` needs no option."""
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@click.group(name="issuer", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Diagnose external issuers."""


@command.command(name="check")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@option("--issuers", "The authority's issuers file.", None, "file", default=_FILE, type=PATH)
@option("--issue", "Also issue a certificate for this name and discard it.", DNSName.parse, metavar="DNSNAME")
@option("--duration", "The lifetime of the certificate that --issue requests.", parse_duration, default="5m")
def check(names: tuple[str, ...], file: Path, issue: DNSName | None, duration: timedelta) -> None:
    """Check the named issuers, or all issuers in the file, without issuing certificates.

    Exits with status 1 if a check fails. Credentials in Secrets can be read only inside the cluster:

        kubectl -n certmount exec deploy/certmount-authority -- certmount issuer check
    """
    configure_logging("error")  # the findings contain what issuers log
    declarations = _select(_read(file), names, file)
    results = asyncio.run(_check_all(declarations, issue, duration, in_cluster=_IN_CLUSTER.exists()))
    for declared, findings in zip(declarations, results, strict=True):
        click.echo(f"{declared.name} ({declared.kind})")
        for finding in findings:
            click.echo(f"  {finding}")
    if any(findings.problem for findings in results):
        sys.exit(1)


def _read(file: Path) -> tuple[IssuerDeclaration, ...]:
    try:
        with file.open("rb") as opened:
            return read_issuers(opened.read(MAX_BYTES + 1))
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from None
    except CertmountError as error:
        faults = "\n".join(f"  {fault}" for fault in error.faults)
        raise click.ClickException(f"{file} is not valid:\n{faults}") from None


def _select(declared: Sequence[IssuerDeclaration], names: Sequence[str], file: Path) -> list[IssuerDeclaration]:
    by_name = {one.name: one for one in declared}
    if unknown := [name for name in names if name not in by_name]:
        available = f"it declares {', '.join(by_name)}" if by_name else "it declares no issuers"
        raise click.ClickException(f"{file} has no issuer {' or '.join(unknown)}; {available}")
    if not by_name:
        click.echo(f"{file} declares no issuers")
    return [by_name[name] for name in names] or list(declared)


async def _check_all(
    declared: Sequence[IssuerDeclaration], issue: DNSName | None, duration: timedelta, *, in_cluster: bool
) -> list[Findings]:
    async with _dependencies(in_cluster=in_cluster) as dependencies:
        return await asyncio.gather(*(_check(one, dependencies, issue, duration) for one in declared))


@contextlib.asynccontextmanager
async def _dependencies(*, in_cluster: bool) -> AsyncIterator[IssuerDependencies]:
    if not in_cluster:
        yield IssuerDependencies(CredentialReader())
        return
    from csi_driver.authority.cluster_environment import cluster_secrets
    from csi_driver.kube.client import ObjectName
    from csi_driver.kube.connection import Api, in_cluster_configuration
    from csi_driver.kube.csr.client import KubernetesCSRClient
    from csi_driver.kube.ingress import IngressRoutes
    from csi_driver.kube.stored_objects import SecretStore

    async with cluster_secrets() as read_secret, Api(in_cluster_configuration()) as api:
        yield IssuerDependencies(
            CredentialReader(read_secret),
            lambda namespace, name: SecretStore(api, ObjectName("Secret", namespace, name)),
            # Diagnostics create no Ingress, so namespace and Service don't matter.
            lambda ingress_class: IngressRoutes(api, "", "", 0, ingress_class),
            CSRAccess(KubernetesCSRClient(api, api)),
        )


async def _check(
    declared: IssuerDeclaration, dependencies: IssuerDependencies, issue: DNSName | None, duration: timedelta
) -> Findings:
    findings = Findings()
    try:
        issuer = make_issuer(declared, dependencies)
    except CertmountError as error:
        findings.add("issuer", False, error.text)
        return findings
    findings = await issuer.diagnose()
    if issue is not None and findings.problem is None:
        running = asyncio.create_task(issuer.run())
        try:
            await _issue(issuer, issue, duration, findings)
        finally:
            running.cancel()
            await asyncio.wait([running])
    return findings


async def _issue(issuer: Issuer, name: DNSName, duration: timedelta, findings: Findings) -> None:
    names = Names.of([name])
    pod = PodIdentity(ServiceAccount("certmount", "check"), "", "check", "", "", "", 0)
    key = await asyncio.to_thread(generate_key, KeyType.EC_P256)
    request = IssuerRequest(parse_csr(build_csr(key, names)), Grant(names, duration, ALL_USAGES, ()), pod)
    try:
        issued = await issuer.issue(request)
    except CertmountError as error:
        findings.add("issuance", False, str(error))
    else:
        text = f"issued and discarded a certificate for {name} with a chain of {len(issued.chain)}"
        findings.add("issuance", True, text)
