"""``certmount node``: reads the options, creates the node driver and runs its servers."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import grpc
import structlog
from prometheus_client import CollectorRegistry

from csi_driver import DRIVER_NAME, __version__
from csi_driver._proto import csi_pb2_grpc
from csi_driver.cli.common import health_server, http_option, log_level_option, parse_address, parsed, stop_on_signals
from csi_driver.core.errors import CertmountError
from csi_driver.host.directory_mounts import DirectoryMounts
from csi_driver.host.mounts import KernelMounts
from csi_driver.host.target_paths import check_kubelet_dir
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.node.csi.registration import KubeletRegistration, listen
from csi_driver.node.csi.service import IdentityService, NodeService, describe_call
from csi_driver.node.driver import Driver
from csi_driver.rpc.server import Interceptor
from csi_driver.telemetry.logging import configure_logging
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_GRACE_PERIOD_S = 10.0
_REGISTRATION_INTERVAL_S = 5.0
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The options of ``certmount node``."""

    kubelet_dir: Path
    node_name: str
    authority: str
    authority_root: Path
    token: Path
    http: str
    mounts: str

    @property
    def plugin_dir(self) -> Path:
        return self.kubelet_dir / "plugins" / DRIVER_NAME


@click.command(name="node")
@click.option(
    "--kubelet-dir",
    type=_PATH,
    default="/var/lib/kubelet",
    show_default=True,
    help="The kubelet's root directory (its --root-dir).",
)
@click.option("--node-name", required=True, help="The name of this Kubernetes node.")
@click.option(
    "--authority",
    default="certmount-authority.certmount.svc:443",
    show_default=True,
    callback=parsed(parse_address),
    help="HOST:PORT of the authority.",
)
@click.option(
    "--authority-root",
    type=_PATH,
    default="/etc/certmount/root/authority.crt",
    show_default=True,
    help="PEM file with the root certificates that verify the authority's TLS certificate. The driver waits for the file.",
)
@click.option(
    "--token",
    type=_PATH,
    default="/var/run/secrets/certmount/token",
    show_default=True,
    help="File with the driver's service account token for the audience certmount-node.",
)
@http_option(9440)
@log_level_option
@click.option(
    "--mounts",
    type=click.Choice(["kernel", "directory"]),
    default="kernel",
    show_default=True,
    help="kernel: mount a tmpfs for each volume; pods need this. directory: link plain directories, for tests without root.",
)
def command(log_level: str, **options: object) -> None:
    """Run the node driver."""
    configure_logging(log_level)
    try:
        asyncio.run(run(NodeSettings(**options)))  # type: ignore[arg-type]  # click gives each option its type
    except CertmountError as error:
        raise click.ClickException(str(error)) from None


async def run(settings: NodeSettings) -> None:
    """Run the driver until SIGTERM or SIGINT."""
    stop = stop_on_signals()
    registry = CollectorRegistry()
    metrics = NodeMetrics(registry)
    client = AuthorityClient(settings.authority, settings.authority_root, settings.token)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="keys") as keys:
        mounts = KernelMounts() if settings.mounts == "kernel" else DirectoryMounts()
        store = VolumeStore(settings.plugin_dir / "volumes", settings.kubelet_dir, mounts)
        driver = Driver(settings.kubelet_dir, store, client, keys, metrics, time.time, random.random)
        registration = KubeletRegistration(settings.kubelet_dir, settings.plugin_dir / "csi.sock")
        health = health_server(settings.http, registry, _readiness(settings, client, registration))
        health.start()
        try:
            await _serve(settings, driver, registration, metrics, stop)
        finally:
            await client.close()
            health.stop()
    log.info("stopped")


async def _serve(
    settings: NodeSettings,
    driver: Driver,
    registration: KubeletRegistration,
    metrics: NodeMetrics,
    stop: asyncio.Event,
) -> None:
    log.info(
        "starting",
        version=__version__,
        node=settings.node_name,
        kubelet_dir=str(settings.kubelet_dir),
        authority=settings.authority,
    )
    if not (settings.kubelet_dir.is_absolute() and settings.kubelet_dir.is_dir()):
        check_kubelet_dir(settings.kubelet_dir)  # raises: create nothing outside a kubelet directory
    settings.plugin_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    await driver.restore()
    server = await _serve_csi(settings, driver, metrics)
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(driver.run(), name="driver"),
            tasks.create_task(_register(settings, registration), name="registration"),
        ]
        await stop.wait()
        log.info("stopping")
        running.pop().cancel()
        await registration.stop()
        await server.stop(_GRACE_PERIOD_S)
        for task in running:
            task.cancel()


async def _register(settings: NodeSettings, registration: KubeletRegistration) -> None:
    """Register the driver once its mounts propagate to pods. Otherwise the kubelet would report success, and pods would see no files."""
    logged = ""
    while True:
        try:
            check_kubelet_dir(settings.kubelet_dir, shared=settings.mounts == "kernel")
            await registration.start()
        except CertmountError as error:
            if logged != str(error):
                log.error("not registered with the kubelet", error=str(error))  # noqa: TRY400  # an expected error
            logged = str(error)
        else:
            return
        await asyncio.sleep(_REGISTRATION_INTERVAL_S)


async def _serve_csi(settings: NodeSettings, driver: Driver, metrics: NodeMetrics) -> grpc.aio.Server:
    interceptor = Interceptor(lambda call: metrics.called(call.method, call.reason, call.seconds), describe_call)
    server = grpc.aio.server(interceptors=[interceptor])
    csi_pb2_grpc.add_IdentityServicer_to_server(IdentityService(), server)
    csi_pb2_grpc.add_NodeServicer_to_server(NodeService(settings.node_name, driver.publisher, driver.published), server)
    listen(server, settings.plugin_dir / "csi.sock")
    await server.start()
    return server


def _readiness(
    settings: NodeSettings, client: AuthorityClient, registration: KubeletRegistration
) -> Callable[[], Sequence[str]]:
    def problems() -> Sequence[str]:
        found = [client.root_problem(), registration.problem]
        try:
            check_kubelet_dir(settings.kubelet_dir, shared=settings.mounts == "kernel")
        except CertmountError as error:
            found.insert(0, str(error))
        return [problem for problem in found if problem]

    return problems
