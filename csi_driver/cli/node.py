"""``certmount node``: reads the options, creates the node driver and runs its servers."""

from __future__ import annotations

import csi_driver.cli.node_imports  # noqa: F401  # before all others

# isort: split
import asyncio
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
from csi_driver.cli.common import (
    PATH,
    authority_options,
    errors_for_users,
    health_server,
    http_option,
    log_options,
    option,
    parsed,
    stop_on_signals,
)
from csi_driver.core.addresses import Address
from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import DEFAULT_KEY_TYPE, KeyType, parse_key_type
from csi_driver.host.capabilities import drop_capabilities
from csi_driver.host.directory_mounts import DirectoryMounts
from csi_driver.host.mounts import KernelMounts
from csi_driver.host.pod_processes import PodProcesses
from csi_driver.host.target_paths import check_kubelet_dir
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.node.csi.registration import KubeletRegistration, listen
from csi_driver.node.csi.service import (
    MAX_CALL_BYTES,
    MAX_CALLS,
    MAX_RECEIVING,
    IdentityService,
    NodeService,
    describe_call,
    kubelet_text,
)
from csi_driver.node.driver import Driver
from csi_driver.node.issuance.key_generator import MAX_EXPENSIVE_KEYS
from csi_driver.node.renewal.reloads import ReloadRules, parse_namespaces
from csi_driver.node.volumes.budget import MEMORY_LIMIT
from csi_driver.rpc.server import CallRecorder, Interceptor
from csi_driver.rpc.startup_check import StartupCheck
from csi_driver.telemetry.logging import configure_logging
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

_GRACE_PERIOD_S = 10.0
_REGISTRATION_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The options of ``certmount node``."""

    kubelet_dir: Path
    node_name: str
    authority: str
    authority_root: Path
    token: Path
    http: Address
    mounts: str
    memory_limit: int
    default_key_type: KeyType
    reload_namespaces: Sequence[str]
    cgroups: Path

    @property
    def plugin_dir(self) -> Path:
        return self.kubelet_dir / "plugins" / DRIVER_NAME


@click.command(name="node")
@option("--kubelet-dir", "The kubelet's root directory (its --root-dir).", type=PATH, default="/var/lib/kubelet")
@option("--node-name", "The name of this Kubernetes node.", required=True)
@authority_options("driver", "certmount-node")
@option(
    "--memory-limit",
    "The memory limit of the container in bytes. It includes the files of all volumes, so it limits their number.",
    type=int,
    default=MEMORY_LIMIT,
)
@option(
    "--default-key-type",
    "The key type of volumes that do not set the attribute key-type.",
    parse_key_type,
    default=DEFAULT_KEY_TYPE.value,
)
@click.option(
    "--reload-namespaces",
    default="",
    callback=parsed(parse_namespaces),
    help="Namespaces, separated by commas, whose pods can use the attribute reload; * for all. The driver then needs the "
    "process IDs of the host. Default: none.",
)
@option("--cgroups", "The host's /sys/fs/cgroup, for --reload-namespaces.", type=PATH, default="/sys/fs/cgroup")
@http_option(9440)
@log_options
@option(
    "--mounts",
    "kernel: mount a tmpfs for each volume; pods need this. directory: link plain directories, for tests without root.",
    type=click.Choice(["kernel", "directory"]),
    default="kernel",
)
def command(log_level: str, log_format: str, **options: object) -> None:
    """Run the node driver."""
    configure_logging(log_level, log_format)
    try:
        drop_capabilities(signals=bool(options["reload_namespaces"]))
    except OSError as error:
        raise click.ClickException(f"cannot drop capabilities: {error.strerror}") from None
    with errors_for_users():
        asyncio.run(run(NodeSettings(**options)))  # type: ignore[arg-type]  # click gives each option its type


async def run(settings: NodeSettings) -> None:
    """Run the driver until SIGTERM or SIGINT."""
    stop = stop_on_signals()
    registry = CollectorRegistry()
    metrics = NodeMetrics(registry)
    client = AuthorityClient(settings.authority, settings.authority_root, settings.token, f"node {settings.node_name}")
    with ThreadPoolExecutor(MAX_EXPENSIVE_KEYS, thread_name_prefix="keys") as keys:
        mounts = KernelMounts() if settings.mounts == "kernel" else DirectoryMounts()
        store = VolumeStore(settings.plugin_dir / "volumes", settings.kubelet_dir, mounts)
        reloads = ReloadRules(settings.reload_namespaces, PodProcesses(settings.cgroups))
        driver = Driver(
            settings.kubelet_dir,
            settings.node_name,
            store,
            client,
            keys,
            metrics,
            settings.memory_limit,
            reloads,
            settings.default_key_type,
            time.time,
            random.random,
        )
        registration = KubeletRegistration(settings.kubelet_dir, settings.plugin_dir / "csi.sock")
        readiness = _readiness(settings, client, registration)
        status = driver.status(readiness, client.check_connection)
        pages = {"/status": status.document, "/diagnostics": status.diagnose}
        started = StartupCheck(settings.authority, client.root_problem)
        health = health_server(settings.http, registry, readiness, pages, started)
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
    """Register the driver once its mounts propagate to pods, and again after a failure.

    Without propagation, the kubelet would report success, and pods would see no files.
    """
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
            await registration.wait_for_failure()
        await asyncio.sleep(_REGISTRATION_INTERVAL_S)
        await registration.stop()


async def _serve_csi(settings: NodeSettings, driver: Driver, metrics: NodeMetrics) -> grpc.aio.Server:
    recorder = CallRecorder(
        lambda call: metrics.called(call.method, call.reason, call.seconds, cancelled=call.cancelled), driver.log_shares
    )
    interceptor = Interceptor(recorder, describe_call, kubelet_text, MAX_RECEIVING)
    options = (
        ("grpc.max_receive_message_length", MAX_CALL_BYTES),
        # A call whose request is not received yet uses 4 KiB of it; the default is 64 KiB.
        ("grpc.http2.lookahead_bytes", 4096),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_allowed_incoming_connections", MAX_CALLS),
        # Beyond the default of 1000, gRPC would cancel calls at random.
        ("grpc.server.max_pending_requests", MAX_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_CALLS),
    )
    server = grpc.aio.server(interceptors=[interceptor], options=options)
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
