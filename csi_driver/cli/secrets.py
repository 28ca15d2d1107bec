"""``certmount secrets``: run the Secrets controller, check a list, and show the managed Secrets."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import structlog
from prometheus_client import CollectorRegistry

from csi_driver import __version__
from csi_driver.cli.common import (
    Option,
    add_options,
    authority_options,
    echo_report,
    errors_for_users,
    health_server,
    http_option,
    log_options,
    option,
    parse_namespaced_name,
    stop_on_signals,
)
from csi_driver.config.located_yaml import MAX_BYTES, unwrap_manifest
from csi_driver.core.addresses import Address
from csi_driver.core.durations import format_duration
from csi_driver.core.names import parse_dns_label, parse_object_name
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.events.recorder import ObjectEventRecorder
from csi_driver.rpc.startup_check import StartupCheck
from csi_driver.secrets.authority_client import SecretsAuthorityClient
from csi_driver.secrets.controller import SecretsController
from csi_driver.secrets.settings import MAX_WATCHES, SecretsSettings
from csi_driver.secrets.sources.annotated import SourceRules
from csi_driver.secrets.sources.certificate_list import LIST_KEY, parse_certificate_list
from csi_driver.secrets.status import SecretStatus, read_status, render_table
from csi_driver.telemetry.logging import configure_logging
from csi_driver.telemetry.secrets_metrics import SecretsMetrics

log = structlog.get_logger(__name__)

_UNUSED = {"authority": "", "authority_root": Path(), "token": Path(), "lease": ("", "")}  # by status


def _config_map(text: str) -> tuple[str, str]:
    namespace, name = parse_namespaced_name(text)
    return parse_dns_label(namespace), parse_object_name(name)


def _source_option(
    name: str,
    variable: str,
    text: str,
    parse: Callable[[str], object] | None = None,
    *parameter: str,
    **settings: Any,
) -> Option:
    return option(name, text, parse, *parameter, envvar=variable, show_envvar=True, **settings)


_default_issuer_option = _source_option(
    "--default-issuer",
    "CERTMOUNT_SECRETS_DEFAULT_ISSUER",
    "Issuer of the certificates whose source names none.",
    parse_dns_label,
    default=DEFAULT_ISSUER,
)
_source_options = add_options(
    _source_option(
        "--namespace",
        "CERTMOUNT_SECRETS_NAMESPACES",
        "Namespace whose Ingresses and Gateways are watched, and whose Secrets the controller can write. Repeatable.",
        parse_dns_label,
        "namespaces",
        multiple=True,
        required=True,
    ),
    _source_option(
        "--list",
        "CERTMOUNT_SECRETS_LISTS",
        "NAMESPACE/NAME of a ConfigMap with a list of certificates in its key certificates. Repeatable.",
        _config_map,
        "lists",
        multiple=True,
    ),
    _source_option(
        "--ingress-class",
        "CERTMOUNT_SECRETS_INGRESS_CLASSES",
        "Class of the Ingresses to serve; those without a class are always served. Repeatable. Default: all classes.",
        parse_object_name,
        "ingress_classes",
        multiple=True,
    ),
    _source_option(
        "--gateways",
        "CERTMOUNT_SECRETS_GATEWAYS",
        "Also watch Gateways. The cluster must have the Gateway API.",
        is_flag=True,
    ),
    _default_issuer_option,
)


@click.group(name="secrets")
def command() -> None:
    """Keep TLS Secrets valid for Ingresses, Gateways and lists of certificates."""


@command.command()
@authority_options("controller", "certmount-secrets")
@_source_options
@option(
    "--lease",
    "NAMESPACE/NAME of the Lease that selects the active replica.",
    parse_namespaced_name,
    default="certmount/certmount-secrets",
)
@http_option(9442)
@log_options
def run(log_level: str, log_format: str, http: Address, **options: Any) -> None:
    """Run the controller."""
    configure_logging(log_level, log_format)
    with errors_for_users():
        asyncio.run(_run(_settings(options), http))


async def _run(settings: SecretsSettings, http: Address) -> None:
    """Run the controller until SIGTERM or SIGINT."""
    from csi_driver.kube.client import ObjectName
    from csi_driver.kube.connection import Api, in_cluster_configuration
    from csi_driver.kube.events import SECRETS, EventClient
    from csi_driver.kube.leader_election import LeaderElection
    from csi_driver.kube.stored_objects import LeaseClient

    stop, registry = stop_on_signals(), CollectorRegistry()
    metrics, authority = SecretsMetrics(registry), SecretsAuthorityClient(settings)
    pod, lease = socket.gethostname(), ObjectName("Lease", *settings.lease)
    started = StartupCheck(settings.authority, authority.root_problem)
    health = health_server(
        http, registry, lambda: [problem for problem in [authority.root_problem()] if problem], started=started
    )
    health.start()
    log.info("starting", version=__version__, namespaces=settings.namespaces, authority=settings.authority)
    with ThreadPoolExecutor(1, thread_name_prefix="keys") as keys:
        async with Api(in_cluster_configuration()) as api, Api(in_cluster_configuration()) as watches:
            recorder = ObjectEventRecorder(EventClient(api, pod, SECRETS), metrics)
            controller = SecretsController(settings, api, watches, authority, recorder, metrics, keys)
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(
                        LeaderElection(LeaseClient(api, lease), pod).run(controller.lead), name="election"
                    ),
                    tasks.create_task(recorder.run(), name="events"),
                ]
                await stop.wait()
                log.info("stopping")
                for task in running:
                    task.cancel()
            await authority.close()
    health.stop()


@command.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@option(
    "--namespace",
    "Namespace of the list. Default: that in the manifest of the ConfigMap, or else default.",
    parse_dns_label,
)
@_default_issuer_option
def check(file: Path, namespace: str | None, default_issuer: str) -> None:
    """Explain the list of certificates in FILE, a ConfigMap or the list alone. The exit status is 1 if there is a fault."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise click.ClickException(f"{file}: cannot be read: {error.strerror}") from None
    rules = SourceRules(None, default_issuer)
    text, own = unwrap_manifest(content, LIST_KEY)
    if namespace is not None and own not in ("", namespace):
        raise click.UsageError(
            f"--namespace: is {namespace}, but the ConfigMap in {file} is in namespace {own}; omit it"
        )
    requests, faults = parse_certificate_list(text, namespace or own or "default", rules)
    for request in requests:
        options = request.options
        parts = [
            f"names {', '.join(map(str, request.names))}",
            f"issuer {options.issuer}",
            *([f"key type {options.key_type.value}"] if options.key_type else []),
            *([f"duration {format_duration(options.duration)}"] if options.duration else []),
            *([f"email {options.email}"] if options.email else []),
            *([f"TSIG key in Secret {options.tsig_secret}"] if options.tsig_secret else []),
        ]
        click.echo(f"Secret {request.secret}: {'; '.join(parts)}")
    if not requests and not faults:
        click.echo(f"{file}: the list contains no certificates", err=True)
    for fault in faults:
        click.echo(f"{file}: {fault}", err=True)
    if faults:
        raise click.exceptions.Exit(1)


@command.command()
@_source_options
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(output: str, **options: Any) -> None:
    """Show the Secrets that sources request, and the state of their certificates. Run it in the controller's pod."""
    from csi_driver.kube.connection import Api, in_cluster_configuration

    async def read() -> Sequence[SecretStatus]:
        async with Api(in_cluster_configuration()) as api:
            return await read_status(api, _settings(options))

    # Sources that cannot be read, such as those of a namespace without the Role, are warnings on stderr.
    configure_logging("warning")
    with errors_for_users():
        rows = asyncio.run(read())
    echo_report(output, [dataclasses.asdict(row) for row in rows], render_table(rows))


def _settings(options: Mapping[str, Any]) -> SecretsSettings:
    """Return settings of options; commands that do not call the authority omit its options."""
    settings = SecretsSettings(**{**_UNUSED, **options, "ingress_classes": frozenset(options["ingress_classes"])})
    if settings.watches > MAX_WATCHES:
        hint = "use several controllers, each with its own namespaces and Lease"
        raise click.UsageError(
            f"--namespace, --list: need {settings.watches} watches; the maximum is {MAX_WATCHES}; {hint}"
        )
    return settings
