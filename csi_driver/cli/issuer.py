"""``certmount issuer check``: looks at the issuers of a file as the authority would, and says in plain words what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path

import click

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.routes import NoRoutes
from csi_driver.authority.issuers.kinds import IssuerDependencies, make_issuer, read_issuers
from csi_driver.authority.issuers.external import ExternalIssuer, Finding
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.cli.common import parsed
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
_MAX_BYTES = 1024 * 1024
_IN_A_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@click.group(name="issuer", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at the issuers behind the authority."""


@command.command(name="check")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--issuers",
    "file",
    default=_FILE,
    show_default=True,
    type=click.Path(path_type=Path),
    help="The file that the authority is given as --issuers.",
)
@click.option(
    "--issue",
    metavar="DNSNAME",
    callback=parsed(DNSName.parse),
    help="Also have a certificate signed for this name; it is thrown away. Without it nothing is ordered.",
)
@click.option(
    "--duration",
    default="5m",
    show_default=True,
    callback=parsed(parse_duration),
    help="The life of what --issue has signed.",
)
def check(names: tuple[str, ...], file: Path, issue: DNSName | None, duration: timedelta) -> None:
    """Look at the issuers of these names, or at all of the file, and say what is wrong.

    Exits with 1 where something is. Credentials are read from where the file says; from Secrets only inside the cluster:

        kubectl -n certmount exec deploy/certmount-authority -- certmount issuer check
    """
    configure_logging("error")  # what an issuer logs of itself is in its findings
    chosen = _chosen(_declared(file), names, file)
    results = asyncio.run(_check(chosen, issue, duration, in_a_cluster=_IN_A_POD.exists()))
    for declared, findings in zip(chosen, results, strict=True):
        _print(declared, findings)
    if not all(finding.ok for findings in results for finding in findings):
        sys.exit(1)


def _declared(file: Path) -> tuple[IssuerDeclaration, ...]:
    try:
        with file.open("rb") as opened:
            return read_issuers(opened.read(_MAX_BYTES + 1))
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from None
    except CertmountError as error:
        faults = "\n".join(f"  {fault}" for fault in error.faults)
        raise click.ClickException(f"{file} is not valid:\n{faults}") from None


def _chosen(declared: Sequence[IssuerDeclaration], names: Sequence[str], file: Path) -> list[IssuerDeclaration]:
    by_name = {one.name: one for one in declared}
    if unknown := [name for name in names if name not in by_name]:
        has = f"it has {', '.join(by_name)}" if by_name else "it declares none"
        raise click.ClickException(f"{file} has no issuer {' or '.join(unknown)}; {has}")
    if not by_name:
        click.echo(f"{file} declares no issuers")
    return [by_name[name] for name in names] or list(declared)


async def _check(
    chosen: Sequence[IssuerDeclaration], issue: DNSName | None, duration: timedelta, *, in_a_cluster: bool
) -> list[list[Finding]]:
    async with _tools(in_a_cluster=in_a_cluster) as tools:
        return await asyncio.gather(*(_look(declared, tools, issue, duration) for declared in chosen))


@contextlib.asynccontextmanager
async def _tools(*, in_a_cluster: bool) -> AsyncIterator[IssuerDependencies]:
    """Those of the cluster that this runs in; files only, outside of one."""
    if not in_a_cluster:
        yield IssuerDependencies(CredentialReader())
        return
    from csi_driver.authority.cluster_secrets import cluster_secrets
    from csi_driver.authority.issuers.kubernetes_csr.access import Access
    from csi_driver.kube.client import ObjectName, connect, in_cluster_configuration
    from csi_driver.kube.csr_requests import ClusterCSRs
    from csi_driver.kube.secret_store import SecretStore

    async with cluster_secrets() as read_secret, connect(in_cluster_configuration()) as api:
        yield IssuerDependencies(
            CredentialReader(read_secret),
            lambda namespace, name: SecretStore(api, ObjectName("Secret", namespace, name)),
            lambda _: NoRoutes(),  # a look makes no Ingress
            Access(ClusterCSRs(api, api)),
        )


async def _look(
    declared: IssuerDeclaration, tools: IssuerDependencies, issue: DNSName | None, duration: timedelta
) -> list[Finding]:
    try:
        issuer = make_issuer(declared, tools)
    except CertmountError as error:
        return [Finding("issuer", False, str(error.args[0]))]
    findings = await issuer.check()
    if issue is None or not all(finding.ok for finding in findings):
        return findings
    running = asyncio.create_task(issuer.run())
    try:
        return [*findings, await _issued(issuer, issue, duration)]
    finally:
        running.cancel()
        await asyncio.wait([running])


async def _issued(issuer: ExternalIssuer, name: DNSName, duration: timedelta) -> Finding:
    names = Names.of([name])
    nobody = PodIdentity(ServiceAccount("certmount", "check"), "", "check", "", "", "", 0)
    key = await asyncio.to_thread(generate_key, KeyType.EC_P256)
    order = IssuerRequest(parse_csr(build_csr(key, names)), Grant(names, duration, ALL_USAGES, ()), nobody)
    try:
        issued = await issuer.issue(order)
    except CertmountError as error:
        return Finding("signing", False, str(error))
    return Finding("signing", True, f"signed {name} with a chain of {len(issued.chain)}; thrown away")


def _print(declared: IssuerDeclaration, findings: Sequence[Finding]) -> None:
    click.echo(f"{declared.name} ({declared.kind})")
    for finding in findings:
        click.echo(f"  {finding}")
