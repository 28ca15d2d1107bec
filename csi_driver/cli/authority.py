"""``certmount authority``: its options, read into values, and its start."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import click
import structlog
from prometheus_client import CollectorRegistry

from csi_driver import __version__
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.keyring import AUTHORITY_KEY_TYPES, CAProfile
from csi_driver.authority.diagnostics import ca_check, check, issuers_check, policy_check, token_keys_check
from csi_driver.authority.environment import Environment, outside_a_cluster
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.server import AuthorityServer, AuthoritySettings
from csi_driver.cli.common import address, health_server, namespaced, parsed
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import DNSName, Names, parse_trust_domain
from csi_driver.core.spec import KeyType
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from csi_driver.telemetry.logging import LEVELS, configure_logging

log = structlog.get_logger(__name__)

_FILE = click.Path(path_type=Path)
_Opening: TypeAlias = "Callable[[CollectorRegistry], contextlib.AbstractAsyncContextManager[Environment]]"
"""Makes the surroundings, and counts in a registry what happens there."""


@click.command(name="authority")
@click.option(
    "--listen",
    default="0.0.0.0:8443",
    show_default=True,
    callback=parsed(address),
    help="HOST:PORT for gRPC over TLS.",
)
@click.option(
    "--http",
    default="0.0.0.0:9441",
    show_default=True,
    callback=parsed(address),
    help="HOST:PORT for /healthz, /readyz and /metrics.",
)
@click.option(
    "--trust-domain",
    default="cluster.local",
    show_default=True,
    callback=parsed(parse_trust_domain),
    help="Of the SPIFFE IDs it issues.",
)
@click.option(
    "--cluster-domain",
    default="cluster.local",
    show_default=True,
    callback=parsed(lambda text: DNSName.parse(text).text),
    help="The cluster's DNS domain; {cluster_domain} in the policy.",
)
@click.option("--policy", required=True, type=_FILE, help="YAML file that says who may have which names.")
@click.option("--issuers", type=_FILE, help="YAML file that declares issuers beside the CA of its own.")
@click.option(
    "--acme-http",
    callback=parsed(address),
    help="HOST:PORT where CAs find answers to HTTP-01, see docs/acme.md; none where it is not said.",
)
@click.option(
    "--serving-name",
    multiple=True,
    required=True,
    callback=parsed(DNSName.parse),
    help="A DNS name by which nodes call this authority; repeatable.",
)
@click.option(
    "--node-service-account",
    default="certmount/certmount-node",
    show_default=True,
    callback=parsed(namespaced),
    help="NAMESPACE/NAME of the service account that node drivers run as.",
)
@click.option(
    "--ca-secret", callback=parsed(namespaced), help="In a cluster: NAMESPACE/NAME of the Secret that keeps the CA."
)
@click.option(
    "--root-configmap",
    callback=parsed(namespaced),
    help="In a cluster: NAMESPACE/NAME of the ConfigMap that gets the root.",
)
@click.option(
    "--ca-key-type",
    type=click.Choice([key_type.value for key_type in AUTHORITY_KEY_TYPES]),
    help="Of the CA that is made at the first start; EC-P384 above EC-P256 where it is not said.",
)
@click.option(
    "--ca-permit",
    multiple=True,
    callback=parsed(parse_constraint),
    help="Likewise: the only names it may sign, such as dns:example.com or ip:10.0.0.0/8; repeatable.",
)
@click.option(
    "--ca-path-length",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="Likewise: how many intermediates its root allows.",
)
@click.option(
    "--ca-files", type=_FILE, help="Folder with a CA that others look after: root.crt, intermediate.crt and .key."
)
@click.option("--ca-password-file", type=_FILE, help="What intermediate.key in --ca-files is encrypted with.")
@click.option(
    "--federation-dir", type=_FILE, help="Folder with further roots for pods that ask for them, NAME.crt each."
)
@click.option("--ca-dir", type=_FILE, help="Outside of one: folder that keeps the CA and gets root.crt.")
@click.option("--jwks", type=_FILE, help="Outside of one: file with the JSON Web Key Set that tokens are signed by.")
@click.option("--token-issuer", help="Outside of one: the issuer that tokens must name.")
@click.option(
    "--check",
    "check_only",
    is_flag=True,
    help="Look at configuration, policy, keys and permissions, and end; 1 if one is wrong.",
)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
def command(log_level: str, http: str, check_only: bool, **options: Any) -> None:
    """Run the registration authority: it proves who pods are and has their certificates signed."""
    open_surroundings = _surroundings(options)
    configure_logging(log_level)
    if options["ca_dir"] and not check_only:
        log.warning("no cluster to ask: a token counts until it expires, even if its pod is gone")
    settings = AuthoritySettings(
        listen=options["listen"],
        trust_domain=options["trust_domain"],
        cluster_domain=options["cluster_domain"],
        policy=options["policy"],
        serving_names=Names.of(dns=options["serving_name"]),
        node_account=ServiceAccount(*options["node_service_account"]),
        ca_design=_design(options),
        ca_files=options["ca_files"],
        ca_password_file=options["ca_password_file"],
        federation_dir=options["federation_dir"],
        issuers=options["issuers"],
        acme_http=options["acme_http"],
    )
    try:
        if check_only:
            sys.exit(0 if asyncio.run(_check(settings, open_surroundings)) else 1)
        asyncio.run(_run(settings, http, open_surroundings))
    except CertmountError as error:
        raise click.ClickException(str(error)) from None
    except ExceptionGroup as group:
        expected, defects = group.split((CertmountError, OSError))
        if expected is None or defects is not None:
            raise
        raise click.ClickException(_first_text(expected)) from None


async def _run(settings: AuthoritySettings, http: str, open_surroundings: _Opening) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    registry = CollectorRegistry()
    async with open_surroundings(registry) as around:
        server = AuthorityServer(settings, around, AuthorityMetrics(registry))
        health = health_server(http, registry, server.unready)
        log.info("starting", version=__version__, trust_domain=settings.trust_domain, policy=str(settings.policy))
        health.start()
        try:
            await server.run(stop)
        finally:
            health.stop()


async def _check(settings: AuthoritySettings, open_surroundings: _Opening) -> bool:
    """Prints a line for each thing that was looked at; True where all is well."""
    registry = CollectorRegistry()
    metrics = AuthorityMetrics(registry)
    policy = PolicyFile(
        settings.policy, metrics, trust_domain=settings.trust_domain, cluster_domain=settings.cluster_domain
    )
    async with open_surroundings(registry) as around:
        files = CAFiles(settings.ca_files, metrics, settings.ca_password_file) if settings.ca_files else None
        findings = await check(
            [
                policy_check(policy),
                *([issuers_check(settings.issuers)] if settings.issuers else []),
                ca_check(files or around.store),
                token_keys_check(around.fetch_keys),
                *around.checks,
            ]
        )
    for finding in findings:
        click.echo(finding)
    return all(finding.ok for finding in findings)


def _surroundings(options: dict[str, Any]) -> _Opening:
    """Either all options of a cluster are given, or all of the outside."""
    inside = {name: options[name] for name in ("ca_secret", "root_configmap")}
    outside = {name: options[name] for name in ("ca_dir", "jwks", "token_issuer")}
    if any(inside.values()) and any(outside.values()):
        raise click.UsageError(
            f"{_flags(inside)} are for a cluster, {_flags(outside)} for the outside of one; give one or the other"
        )
    chosen = outside if any(outside.values()) else inside
    if missing := [name for name, value in chosen.items() if not value]:
        given = [name for name, value in chosen.items() if value]
        problem = f"needed beside {_flags(given)}" if given else f"needed, or else {_flags(outside)} outside a cluster"
        raise click.UsageError(f"{_flags(missing)}: {problem}")
    if chosen is inside:
        from csi_driver.authority.cluster_environment import ClusterObjectNames, in_a_cluster

        return functools.partial(in_a_cluster, ClusterObjectNames(inside["ca_secret"], inside["root_configmap"]))
    around = outside_a_cluster(outside["ca_dir"], outside["jwks"], outside["token_issuer"])
    return lambda _: contextlib.nullcontext(around)


def _design(options: dict[str, Any]) -> CAProfile:
    """Raises UsageError for options of a CA of ours beside one of others, and the other way round."""
    made = {name: options[name] for name in ("ca_key_type", "ca_permit")}
    if options["ca_files"] and any(made.values()):
        raise click.UsageError(
            f"{_flags(name for name in made if made[name])}: not with --ca-files, as no CA is made then"
        )
    if options["ca_password_file"] and not options["ca_files"]:
        raise click.UsageError("--ca-password-file: only with --ca-files")
    key_type = options["ca_key_type"]
    return CAProfile(
        KeyType(key_type) if key_type else None, options["ca_permit"], path_length=options["ca_path_length"]
    )


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _first_text(group: BaseExceptionGroup[BaseException]) -> str:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(first)
