"""The steps of the demo, one function each. A step waits for its result, and raises DemoError if it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from csi_driver import DRIVER_NAME
from csi_driver.cli.demo.certificate import describe_certificate, describe_files
from csi_driver.cli.demo.connections import ConnectionLoop, MutualConnection, connect
from csi_driver.cli.demo.errors import DemoError
from csi_driver.cli.demo.kubelet import DemoKubelet, DemoVolume, PublishError
from csi_driver.cli.demo.output import Output
from csi_driver.cli.demo.setup import ALLOWED, NODE, DemoSetup
from csi_driver.cli.demo.tokens import DemoPod
from csi_driver.core.formats.pem import CHAIN, KEY, ROOTS, decode_certificates
from csi_driver.core.identity import ServiceAccount
from csi_driver.host.atomic_write import replace_file
from csi_driver.host.generations import read_generation

SHOP_NAME = "shop.web.svc.cluster.local"
_RENEW_SOON = {"duration": "1h", "renew-before": "59m57s"}
"""Renewal is due three seconds after issuance, and kept files stay valid long enough to inspect them."""
_ROTATION_TIMEOUT_S = 30.0


async def wait_until_ready(output: Output, setup: DemoSetup) -> None:
    output.step("Start certmount")
    started = time.perf_counter()
    node = await setup.kubelet.register()
    await setup.authority.wait_until_ready()
    await setup.node.wait_until_ready()
    output.fields(
        [
            ("authority", [f"certmount authority at {setup.address}, with a new CA"]),
            ("policy", [f"each pod can request {ALLOWED}"]),
            ("node driver", [f"certmount node, registered as {DRIVER_NAME} on {node}"]),
            ("kubelet", ["simulated by this demo, which also signs the pods' tokens"]),
        ]
    )
    output.success(f"ready after {time.perf_counter() - started:.1f} s")


async def publish_shop(output: Output, kubelet: DemoKubelet) -> DemoVolume:
    """Publish the volume of pod web/shop."""
    output.step("Pod web/shop declares a volume")
    attributes = {"name": SHOP_NAME, **_RENEW_SOON}
    output.code(
        [
            "- name: tls",
            "  csi:",
            f"    driver: {DRIVER_NAME}",
            "    readOnly: true",
            "    volumeAttributes:",
            *(f"      {key}: {value}" for key, value in attributes.items()),
            "      # renew-before makes the renewal due three seconds after issuance",
        ]
    )
    started = time.perf_counter()
    shop = await _publish(kubelet, "shop", attributes)
    output.success(f"published after {(time.perf_counter() - started) * 1000:.0f} ms; the pod sees these files:")
    output.table(describe_files(shop.target), right=2)
    return shop


def show_certificate(output: Output, shop: DemoVolume) -> None:
    output.step("The certificate of web/shop")
    chain = decode_certificates(read_generation(shop.target)[CHAIN])
    output.fields(describe_certificate(chain, datetime.now(UTC).replace(microsecond=0)))


async def publish_cart(output: Output, kubelet: DemoKubelet) -> DemoVolume:
    """Publish the volume of pod web/cart, which requests no name but its SPIFFE ID."""
    output.step("Pod web/cart connects to web/shop: mutual TLS over loopback")
    return await _publish(kubelet, "cart", _RENEW_SOON)


async def connect_once(output: Output, cart: DemoVolume, port: int) -> MutualConnection:
    """Connect, and show the names that each side verified."""
    try:
        connection = await connect(cart.target, port, SHOP_NAME)
    except (OSError, ValueError) as error:
        raise DemoError(f"the handshake failed: {error}") from None
    output.fields(
        [
            ("server", [*connection.server.dns, *connection.server.uris]),
            ("client", [*connection.client.dns, *connection.client.uris]),
            ("protocol", [f"{connection.protocol}, {connection.cipher}"]),
        ]
    )
    return connection


async def rotate(output: Output, loop: ConnectionLoop, first: MutualConnection, times: int) -> None:
    """Keep connecting, after the ``first`` connection, while both certificates are renewed; fail if one connection fails."""
    output.step(f"certmount renews the certificates {_times(times)} during ten new connections a second")
    async with asyncio.TaskGroup() as tasks:
        connecting = tasks.create_task(loop.run(first.server.serial), name="connections")
        for _ in range(times):
            try:
                rotation = await asyncio.wait_for(loop.rotations.get(), _ROTATION_TIMEOUT_S)
            except TimeoutError:
                problem = f"the certificate was not renewed within {_ROTATION_TIMEOUT_S:.0f} s"
                raise DemoError(problem + _first_error(loop)) from None
            output.line(
                f"serial {rotation.before[:8]}.. -> {rotation.after[:8]}..   "
                f"{rotation.connections:>4} connections so far, {rotation.errors} errors",
                "red" if rotation.errors else None,
            )
        connecting.cancel()
    if loop.errors:
        raise DemoError(f"{loop.errors} of {loop.connections} connections failed{_first_error(loop)}")
    changes = len(loop.client_serials | {first.client.serial}) - 1
    client = f"; the client's certificate was renewed {_times(changes)} too" if changes else ""
    output.success(f"{loop.connections} connections, 0 errors{client}")


async def request_foreign_name(output: Output, kubelet: DemoKubelet) -> None:
    """Request the name of web/shop for another pod, and show the pod event."""
    output.step(f"Pod web/thief requests {SHOP_NAME}")
    try:
        await kubelet.publish(_pod("thief"), {"name": SHOP_NAME})
    except PublishError as error:
        output.line(f"pod event: {error}")
        return
    raise DemoError("the authority issued a name that the policy does not allow")


def keep_files(shop: DemoVolume, directory: Path) -> None:
    """Copy the current generation into the user's directory."""
    files = read_generation(shop.target)
    try:
        for name, mode in ((ROOTS, 0o644), (CHAIN, 0o644), (KEY, 0o600)):
            replace_file(directory / name, files[name], mode=mode)
    except OSError as error:
        raise DemoError(f"cannot copy the files to {directory}: {error.strerror}") from None


async def unpublish(output: Output, kubelet: DemoKubelet, *volumes: DemoVolume) -> None:
    """Unpublish all volumes, and verify that the driver leaves nothing behind."""
    output.step("The pods are deleted")
    for volume in volumes:
        await kubelet.unpublish(volume)
    if leftovers := kubelet.leftovers():
        raise DemoError("the driver left " + ", ".join(map(str, leftovers)))
    output.success("unpublished: no volume, record or key remains on the node")


async def _publish(kubelet: DemoKubelet, name: str, attributes: Mapping[str, str]) -> DemoVolume:
    try:
        return await kubelet.publish(_pod(name), attributes)
    except PublishError as error:
        raise DemoError(f"the driver did not publish the volume of pod web/{name}: {error}") from None


def _pod(name: str) -> DemoPod:
    return DemoPod.create(ServiceAccount("web", name), name, NODE)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _first_error(loop: ConnectionLoop) -> str:
    return f"; the first error: {loop.first_error}" if loop.errors else ""
