"""The demo from setup to cleanup, one function for each step. A step waits for its result; if it fails, it raises DemoError."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click

from csi_driver import DRIVER_NAME
from csi_driver.cli.demo.cluster import DemoKubelet, DemoPod, PublishError
from csi_driver.cli.demo.connections import ConnectionLoop, MutualConnection, connect, serve
from csi_driver.cli.demo.output import DemoError, Output
from csi_driver.cli.demo.programs import ALLOWED, MEMORY, DemoSetup, private_directory, running
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.host.atomic_write import replace_file
from csi_driver.host.generations import read_generation

SHOP_NAME = "shop.web.svc.cluster.local"
# Renewal is due three seconds after issuance, and kept files stay valid long enough to inspect them.
_RENEW_SOON = {"duration": "1h", "renew-before": "59m57s"}
_ROTATION_TIMEOUT_S = 30.0


async def run(output: Output, keep: Path | None, rotations: int) -> None:
    """Run all steps; copy the last files to ``keep``. Raises DemoError.

    On return and on any error, all processes have ended and the demo's directory is deleted.
    """
    title = "certmount demo: a TLS certificate for a pod, rotated in place, without Kubernetes and without root"
    click.secho(title, bold=True)
    with private_directory() as name:
        directory = Path(name)
        where = "in memory" if directory.parent == MEMORY else f"on disk, because {MEMORY} is not writable"
        click.echo(f"\nAll files are in {directory} ({where}). The demo deletes them at the end.")
        click.echo("Directories and symbolic links replace mounts, so the demo does not need root.")
        async with running(directory) as setup:
            await _wait_until_ready(output, setup)
            shop = await _publish_shop(output, setup.kubelet)
            output.step("The certificate of web/shop")
            shop_files = setup.kubelet.target(shop)
            output.certificate(decode_certificates(read_generation(shop_files)["site.crt"]))
            output.step("Pod web/cart connects to web/shop: mutual TLS over loopback")
            cart = await _publish(setup.kubelet, "cart", _RENEW_SOON)  # requests no name but its SPIFFE ID
            cart_files = setup.kubelet.target(cart)
            async with serve(shop_files) as port:
                connection = await _connect_once(output, cart_files, port)
                await rotate(output, ConnectionLoop(cart_files, port, SHOP_NAME), connection, rotations)
            await _request_foreign_name(output, setup.kubelet)
            if keep is not None:
                _keep_files(shop_files, keep)
            await _unpublish(output, setup.kubelet, shop, cart)
        output.success("the authority and the node driver have stopped")
    output.success(f"{directory} is deleted")
    _print_next_steps(output, keep)


async def _wait_until_ready(output: Output, setup: DemoSetup) -> None:
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


async def _publish_shop(output: Output, kubelet: DemoKubelet) -> DemoPod:
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
    output.files(kubelet.target(shop))
    return shop


async def _connect_once(output: Output, files: Path, port: int) -> MutualConnection:
    """Connect, and show the names that each side verified."""
    try:
        connection = await asyncio.to_thread(connect, files, port, SHOP_NAME)
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
                before, after, connections, errors = await asyncio.wait_for(loop.rotations.get(), _ROTATION_TIMEOUT_S)
            except TimeoutError:
                problem = f"the certificate was not renewed within {_ROTATION_TIMEOUT_S:.0f} s"
                raise DemoError(problem + _first_error(loop)) from None
            text = f"serial {before[:8]}.. -> {after[:8]}..   {connections:>4} connections so far, {errors} errors"
            output.line(text, "red" if errors else None)
        connecting.cancel()
    if loop.errors:
        raise DemoError(f"{loop.errors} of {loop.connections} connections failed{_first_error(loop)}")
    changes = len(loop.client_serials | {first.client.serial}) - 1
    client = f"; the client's certificate was renewed {_times(changes)} too" if changes else ""
    output.success(f"{loop.connections} connections, 0 errors{client}")


async def _request_foreign_name(output: Output, kubelet: DemoKubelet) -> None:
    """Request the name of web/shop for another pod, and show the pod event."""
    output.step(f"Pod web/thief requests {SHOP_NAME}")
    try:
        await kubelet.publish("thief", {"name": SHOP_NAME})
    except PublishError as error:
        output.line(f"pod event: {error}")
        return
    raise DemoError("the authority issued a name that the policy does not allow")


def _keep_files(source: Path, directory: Path) -> None:
    """Copy the current generation into the user's directory."""
    files = read_generation(source)
    try:
        for name, mode in (("root.crt", 0o644), ("site.crt", 0o644), ("site.key", 0o600)):
            replace_file(directory / name, files[name], mode=mode)
    except OSError as error:
        raise DemoError(f"cannot copy the files to {directory}: {error.strerror}") from None


async def _unpublish(output: Output, kubelet: DemoKubelet, *pods: DemoPod) -> None:
    """Unpublish all volumes, and verify that the driver leaves nothing behind."""
    output.step("The pods are deleted")
    for pod in pods:
        await kubelet.unpublish(pod)
    if leftovers := kubelet.leftovers():
        raise DemoError("the driver left " + ", ".join(map(str, leftovers)))
    output.success("unpublished: no volume, record or key remains on the node")


def _print_next_steps(output: Output, keep: Path | None) -> None:
    if keep is None:
        path = Path(sys.argv[0])  # the path of this run, if PATH does not contain certmount
        installed = path.name != "certmount" or shutil.which("certmount")
        program = "certmount" if installed else shlex.quote(str(path))
        click.echo(f"\nTo inspect the files yourself, run: {program} demo --keep DIR")
        return
    click.echo(f"\nThe last root.crt, site.crt and site.key are in {keep}. The certificate is valid for an hour. Try:")
    root, chain, key = (shlex.quote(str(keep / name)) for name in ("root.crt", "site.crt", "site.key"))
    output.code(
        [
            f"openssl verify -CAfile {root} -untrusted {chain} {chain}",
            f"openssl x509 -in {chain} -noout -issuer -dates -ext subjectAltName",
            f"openssl pkey -in {key} -noout -text_pub",
        ]
    )


async def _publish(kubelet: DemoKubelet, name: str, attributes: Mapping[str, str]) -> DemoPod:
    try:
        return await kubelet.publish(name, attributes)
    except PublishError as error:
        raise DemoError(f"the driver did not publish the volume of pod web/{name}: {error}") from None


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _first_error(loop: ConnectionLoop) -> str:
    return f"; the first error: {loop.first_error}" if loop.errors else ""
