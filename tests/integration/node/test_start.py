"""A driver that can't do its work says so in one line, makes nothing where it does not belong, and tells no kubelet of it."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from csi_driver.host import syscalls
from tests.integration.node.world import Node, running_node
from tests.support.driver import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MS_PRIVATE = 1 << 18
_SOME = {"--node-name": "node1", "--authority": "localhost:1", "--token": "/none", "--authority-root": "/none"}


async def _start(**options: str) -> tuple[int | None, str]:
    """Starts a driver that should end by itself; its exit status and all that it wrote."""
    given = (
        _SOME
        | {"--http": f"127.0.0.1:{free_port()}"}
        | {f"--{name.replace('_', '-')}": text for name, text in options.items()}
    )
    arguments = [f"{name}={text}" for name, text in given.items()]
    command = [sys.executable, "-m", "csi_driver.cli.main", "node", *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, output.decode()


async def _refuses_to_start(*words: str, **options: str) -> None:
    status, output = await _start(**options)
    assert status not in (0, None)
    last = output.splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in output


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("place", ["nowhere", "file", "relative"])
async def test_a_kubelet_directory_that_is_none(tmp_path: Path, place: str) -> None:
    """The option and the fix are named, and no folder is made."""
    (tmp_path / "file").touch()
    wrong = "relative/path" if place == "relative" else str(tmp_path / place)
    await _refuses_to_start(
        "InvalidKubeletDirectory: --kubelet-dir", wrong, "the kubelet's --root-dir", kubelet_dir=wrong
    )
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "127.0.0.1:x"])
async def test_an_http_address_that_is_none(tmp_path: Path, address: str) -> None:
    """The option is named."""
    await _refuses_to_start(f"'--http': '{address}' is not HOST:PORT", kubelet_dir=str(tmp_path), http=address)


async def test_a_busy_http_port(tmp_path: Path) -> None:
    """Likewise, with the system's words."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        await _refuses_to_start(f"--http {address}: Address already in use", kubelet_dir=str(tmp_path), http=address)


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    """A kubelet's root may lie too deep for any socket in it."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    await _refuses_to_start("no socket can be made at", "107 bytes", kubelet_dir=str(deep), mounts="folder")


@pytest_asyncio.fixture(loop_scope="module")
async def node() -> AsyncIterator[Node]:
    async with running_node() as node:
        await node.driver.stop()
        yield node


async def test_a_folder_without_a_kubelet_is_waited_for(node: Node) -> None:
    """Without the kubelet's own folders the driver is not registered, says why once, and is as soon as they are there."""
    registry, away = node.kubelet.root / "plugins_registry", node.kubelet.root / "away"
    registry.rename(away)
    await node.driver.start()
    await until(lambda: node.driver.events("not registered with the kubelet"), "the log says so")
    (line,) = node.driver.events("not registered with the kubelet")
    assert f"--kubelet-dir: {node.kubelet.root} has no plugins_registry" in line["error"]
    away.rename(registry)
    await node.kubelet.register()
    assert node.driver.get("/readyz") == (200, "ok\n")


@pytest.mark.root
async def test_mounts_that_reach_no_pod(node: Node) -> None:
    """Without Bidirectional propagation every pod would see an empty folder: the kubelet is not told that there is a driver."""
    syscalls.mount(None, str(node.kubelet.root), None, _MS_PRIVATE)
    await node.driver.start()
    await until(lambda: node.driver.events("not registered with the kubelet"), "the log says so")
    assert not node.kubelet.registration_socket.exists()
    status, text = node.driver.get("/readyz")
    assert status == 503
    assert "so no pod would see a mount made there; set mountPropagation: Bidirectional" in text
