"""The acts, one function each. Each waits for what it tells of, and raises DemoFailed where that does not come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from csi_driver import DRIVER_NAME
from csi_driver.cli.demo.certificate import describe_certificate, describe_files
from csi_driver.cli.demo.connections import ConnectionLoop, Meeting, meet
from csi_driver.cli.demo.failure import DemoFailed
from csi_driver.cli.demo.kubelet import Kubelet, Refused, Volume
from csi_driver.cli.demo.page import Page
from csi_driver.cli.demo.stage import ALLOWED, NODE, Stage
from csi_driver.cli.demo.tokens import Pod
from csi_driver.core.formats.pem import CHAIN, KEY, ROOTS, decode_certificates
from csi_driver.core.identity import ServiceAccount
from csi_driver.host.atomic_write import replace_file
from csi_driver.host.generations import read_generation

NAME = "shop.web.svc.cluster.local"
"""What pod web/shop asks for."""
_SOON = {"duration": "1h", "renew-before": "59m57s"}
"""Long enough to look at what was kept, and due three seconds after it was issued."""
_ROTATION_S = 30.0


async def introduce(page: Page, stage: Stage) -> None:
    """The parts, once they are ready."""
    page.act("The parts")
    started = time.perf_counter()
    node = await stage.kubelet.register()
    await stage.authority.ready()
    await stage.node.ready()
    page.fields(
        [
            ("authority", [f"certmount authority, {stage.address}, its CA made just now"]),
            ("its policy", [f"every pod may have {ALLOWED}"]),
            ("node driver", [f"certmount node, registered as {DRIVER_NAME} on {node}"]),
            ("kubelet", ["played by this demo, and so is the signer of the pods' tokens"]),
        ]
    )
    page.good(f"ready after {time.perf_counter() - started:.1f} s")


async def publish_shop(page: Page, kubelet: Kubelet) -> Volume:
    """The volume of pod web/shop, with its files."""
    page.act("Pod web/shop declares a volume")
    attributes = {"name": NAME, **_SOON}
    page.code(
        [
            "- name: tls",
            "  csi:",
            f"    driver: {DRIVER_NAME}",
            "    readOnly: true",
            "    volumeAttributes:",
            *(f"      {key}: {value}" for key, value in attributes.items()),
            "      # with the last two it is due for renewal three seconds after it was issued",
        ]
    )
    started = time.perf_counter()
    shop = await _publish(kubelet, "shop", attributes)
    page.good(f"published after {(time.perf_counter() - started) * 1000:.0f} ms; the pod finds")
    page.table(describe_files(shop.target), right=2)
    return shop


def inspect(page: Page, shop: Volume) -> None:
    """The certificate's fields."""
    page.act("Its certificate")
    chain = decode_certificates(read_generation(shop.target)[CHAIN])
    page.fields(describe_certificate(chain, datetime.now(UTC)))


async def publish_cart(page: Page, kubelet: Kubelet) -> Volume:
    """The volume of pod web/cart, which has no name but its SPIFFE ID."""
    page.act("Pod web/cart calls web/shop: mutual TLS over loopback")
    return await _publish(kubelet, "cart", _SOON)


async def shake_hands(page: Page, cart: Volume, port: int) -> Meeting:
    """One connection, and what each side learnt by it."""
    try:
        meeting = await meet(cart.target, port, NAME)
    except (OSError, ValueError) as error:
        raise DemoFailed(f"the handshake failed: {error}") from None
    page.fields(
        [
            ("server proved", [*meeting.server.dns, *meeting.server.uris]),
            ("client proved", [*meeting.client.dns, *meeting.client.uris]),
            ("over", [f"{meeting.protocol}, {meeting.cipher}"]),
        ]
    )
    return meeting


async def rotate(page: Page, loop: ConnectionLoop, met: Meeting, times: int) -> None:
    """Connects all the time while both certificates change, after having ``met`` once; fails where one connection did."""
    page.act(f"The certificate changes in place {_times(times)}, under ten new connections a second")
    async with asyncio.TaskGroup() as tasks:
        connecting = tasks.create_task(loop.run(met.server.serial), name="connections")
        for _ in range(times):
            try:
                rotation = await asyncio.wait_for(loop.rotations.get(), _ROTATION_S)
            except TimeoutError:
                raise DemoFailed(
                    f"the certificate did not change within {_ROTATION_S:.0f} s{_first_error(loop)}"
                ) from None
            show = page.bad if rotation.errors else page.line
            show(
                f"serial {rotation.before[:8]}.. -> {rotation.after[:8]}..   "
                f"{rotation.connections:>4} connections so far, {rotation.errors} errors"
            )
        connecting.cancel()
    if loop.errors:
        raise DemoFailed(f"{loop.errors} of {loop.connections} connections failed{_first_error(loop)}")
    changes = len(loop.clients | {met.client.serial}) - 1
    also = f"; the client's certificate changed {_times(changes)} meanwhile" if changes else ""
    page.good(f"{loop.connections} connections, 0 errors{also}")


async def ask_too_much(page: Page, kubelet: Kubelet) -> None:
    """A pod that asks for another one's name."""
    page.act(f"Pod web/thief asks for {NAME}")
    try:
        await kubelet.publish(_pod("thief"), {"name": NAME})
    except Refused as refused:
        page.line(f"its event says: {refused}")
        return
    raise DemoFailed("the policy did not refuse a name that it does not allow")


def keep(shop: Volume, folder: Path) -> None:
    """Copies the present generation into a folder of the user's."""
    files = read_generation(shop.target)
    try:
        for name, mode in ((ROOTS, 0o644), (CHAIN, 0o644), (KEY, 0o600)):
            replace_file(folder / name, files[name], mode=mode)
    except OSError as error:
        raise DemoFailed(f"the files could not be kept in {folder}: {error.strerror}") from None


async def end(page: Page, kubelet: Kubelet, *volumes: Volume) -> None:
    """Unpublishes all, and sees that nothing is left."""
    page.act("The pods end")
    for volume in volumes:
        await kubelet.unpublish(volume)
    if left := kubelet.leftovers():
        raise DemoFailed("the driver left " + ", ".join(map(str, left)))
    page.good("unpublished: no volume, no record and no key is left on the node")


async def _publish(kubelet: Kubelet, name: str, attributes: Mapping[str, str]) -> Volume:
    try:
        return await kubelet.publish(_pod(name), attributes)
    except Refused as refused:
        raise DemoFailed(f"the volume of pod web/{name} was not published: {refused}") from None


def _pod(name: str) -> Pod:
    return Pod.make(ServiceAccount("web", name), name, NODE)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _first_error(loop: ConnectionLoop) -> str:
    return f"; the first error: {loop.first_error}" if loop.errors else ""
