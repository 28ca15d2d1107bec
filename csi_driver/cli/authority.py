"""The command ``certmount authority``: read its options and run the authority."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import click
import structlog
from prometheus_client import CollectorRegistry

from csi_driver import __version__
from csi_driver.authority.ca.keyring import AUTHORITY_KEY_TYPES, CAProfile
from csi_driver.authority.diagnostics import run_checks
from csi_driver.authority.environment import Environment, directory_environment
from csi_driver.authority.pod_certificates.api import parse_pod_signer
from csi_driver.authority.server import AuthorityServer, AuthoritySettings, checks_of
from csi_driver.cli.common import (
    PATH,
    health_server,
    http_option,
    log_options,
    option,
    parse_namespaced_name,
    stop_on_signals,
)
from csi_driver.core.addresses import Address, parse_listen_address
from csi_driver.core.certificates.name_constraints import parse_constraint
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import DNSName, Names, parse_trust_domain
from csi_driver.core.spec import KeyType
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from csi_driver.telemetry.logging import configure_logging

log = structlog.get_logger(__name__)

_OpenEnvironment: TypeAlias = "Callable[[CollectorRegistry], contextlib.AbstractAsyncContextManager[Environment]]"


@click.command(name="authority")
@option(
    "--listen",
    "HOST:PORT for gRPC over TLS; :PORT for all addresses, IPv4 and IPv6.",
    lambda text: str(parse_listen_address(text)),
    default=":8443",
)
@http_option(9441)
@option("--trust-domain", "Trust domain of SPIFFE IDs.", parse_trust_domain, default="cluster.local")
@option(
    "--cluster-domain",
    "DNS domain of the cluster; {cluster_domain} in the policy.",
    lambda text: DNSName.parse(text).text,
    default="cluster.local",
)
@option("--policy", "YAML file with the policy: which pods can request which names.", required=True, type=PATH)
@option("--issuers", "YAML file that declares external issuers.", type=PATH)
@option(
    "--acme-http",
    "HOST:PORT for HTTP-01 requests of ACME CAs (docs/acme.md), or :PORT; off by default.",
    lambda text: str(parse_listen_address(text)),
)
@option(
    "--serving-name",
    "DNS name of this authority in its serving certificate; repeatable.",
    DNSName.parse,
    multiple=True,
    required=True,
)
@option(
    "--node-service-account",
    "NAMESPACE/NAME of the node drivers' service account.",
    parse_namespaced_name,
    default="certmount/certmount-node",
)
@option(
    "--secrets-service-account",
    "NAMESPACE/NAME of the Secrets controller's service account (docs/secrets.md); off by default.",
    parse_namespaced_name,
)
@option(
    "--pod-signer",
    "SIGNER or SIGNER=ISSUER: sign PodCertificateRequests of this signer name (docs/pod-certificates.md); repeatable.",
    parse_pod_signer,
    multiple=True,
)
@option("--ca-secret", "In a cluster: NAMESPACE/NAME of the Secret that stores the CA.", parse_namespaced_name)
@option("--root-configmap", "In a cluster: NAMESPACE/NAME of the ConfigMap for the roots.", parse_namespaced_name)
@option(
    "--ca-key-type",
    "Key type of the CA that the authority creates. Default: EC-P384 for the root, EC-P256 for the intermediate.",
    type=click.Choice([key_type.value for key_type in AUTHORITY_KEY_TYPES]),
)
@option(
    "--ca-permit",
    "Name constraint of the CA that the authority creates: dns:example.com or ip:10.0.0.0/8; repeatable.",
    parse_constraint,
    multiple=True,
)
@option(
    "--ca-path-length",
    "Path length of the root that the authority creates: how many levels of intermediates it allows.",
    type=click.IntRange(1, 8),
    default=1,
)
@option("--ca-files", "Directory with root.crt, intermediate.crt and intermediate.key of your own CA.", type=PATH)
@option("--ca-password-file", "File with the password of intermediate.key in --ca-files.", type=PATH)
@option("--federation-dir", "Directory with the roots of federations: a file NAME.crt for each.", type=PATH)
@option("--ca-dir", "Without a cluster: directory for the CA and root.crt.", type=PATH)
@option("--jwks", "Without a cluster: file with the JSON Web Key Set that verifies tokens.", type=PATH)
@option("--token-issuer", "Without a cluster: the required issuer of tokens.")
@option(
    "--check",
    "Check configuration, policy, keys and permissions, then exit; exit code 1 if a check fails.",
    is_flag=True,
)
@log_options
def command(log_level: str, log_format: str, http: Address, check: bool, **options: Any) -> None:
    """Run the authority: it authenticates pods and issues their certificates."""
    open_environment = _environment(options)
    configure_logging(log_level, log_format)
    if options["ca_dir"] and not check:
        log.warning("no cluster is configured: a token is valid until it expires, even if its pod was deleted")
    settings = AuthoritySettings(
        serving_names=Names.of(dns=options["serving_name"]),
        node_account=ServiceAccount(*options["node_service_account"]),
        secrets_account=ServiceAccount(*account) if (account := options["secrets_service_account"]) else None,
        ca_profile=_ca_profile(options),
        pod_signers=options["pod_signer"],
        **{field.name: options[field.name] for field in dataclasses.fields(AuthoritySettings) if field.name in options},
    )
    try:
        if check:
            sys.exit(0 if asyncio.run(_check(settings, open_environment)) else 1)
        asyncio.run(_run(settings, http, open_environment))
    except CertmountError as error:
        raise click.ClickException(str(error)) from None
    except ExceptionGroup as group:
        expected, defects = group.split((CertmountError, OSError))
        if expected is None or defects is not None:
            raise
        first: BaseException = expected
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise click.ClickException(str(first)) from None


async def _run(settings: AuthoritySettings, http: Address, open_environment: _OpenEnvironment) -> None:
    stop = stop_on_signals()
    registry = CollectorRegistry()
    async with open_environment(registry) as environment:
        server = AuthorityServer(settings, environment, AuthorityMetrics(registry))
        pages = {"/status": server.status.document, "/diagnostics": server.status.diagnose}
        health = health_server(http, registry, server.unready, pages)
        log.info("starting", version=__version__, trust_domain=settings.trust_domain, policy=str(settings.policy))
        health.start()
        try:
            await server.run(stop)
        finally:
            health.stop()


async def _check(settings: AuthoritySettings, open_environment: _OpenEnvironment) -> bool:
    registry = CollectorRegistry()
    metrics = AuthorityMetrics(registry)
    async with open_environment(registry) as environment:
        findings = await run_checks(checks_of(settings, environment, metrics))
    for finding in findings:
        click.echo(finding)
    return all(finding.ok for finding in findings)


def _environment(options: dict[str, Any]) -> _OpenEnvironment:
    """Return how to open the environment. The options for a cluster exclude the options without a cluster."""
    cluster = {name: options[name] for name in ("ca_secret", "root_configmap")}
    directory = {name: options[name] for name in ("ca_dir", "jwks", "token_issuer")}
    if any(cluster.values()) and any(directory.values()):
        raise click.UsageError(
            f"{_flags(cluster)} are for a cluster, {_flags(directory)} are for running without a cluster; use one set"
        )
    chosen = directory if any(directory.values()) else cluster
    given = [name for name, value in chosen.items() if value]
    if missing := [name for name in chosen if name not in given]:
        in_cluster = f"required in a cluster; required without a cluster: {_flags(directory)}"
        raise click.UsageError(f"{_flags(missing)}: {f'required with {_flags(given)}' if given else in_cluster}")
    if chosen is cluster:
        from csi_driver.authority.cluster_environment import open_cluster_environment

        ca, root, signers = (options[name] for name in ("ca_secret", "root_configmap", "pod_signer"))
        return lambda registry: open_cluster_environment(ca, root, registry, signers)
    environment = directory_environment(directory["ca_dir"], directory["jwks"], directory["token_issuer"])
    return lambda _: contextlib.nullcontext(environment)


def _ca_profile(options: dict[str, Any]) -> CAProfile:
    """Return the profile of a new CA; raises UsageError for options that exclude each other."""
    new_ca = {name: options[name] for name in ("ca_key_type", "ca_permit")}
    if options["ca_files"] and any(new_ca.values()):
        used = _flags(name for name in new_ca if new_ca[name])
        raise click.UsageError(f"{used}: cannot be used with --ca-files, because the authority then creates no CA")
    if options["ca_password_file"] and not options["ca_files"]:
        raise click.UsageError("--ca-password-file: requires --ca-files")
    key_type = KeyType(options["ca_key_type"]) if options["ca_key_type"] else None
    return CAProfile(key_type, options["ca_permit"], path_length=options["ca_path_length"])


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
