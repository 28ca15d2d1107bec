"""A driver that cannot work reports the reason in one line and does not register with the kubelet."""

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
from tests.support.ports import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MS_PRIVATE = 1 << 18
_SOME = {"--node-name": "node1", "--authority": "localhost:1", "--token": "/none", "--authority-root": "/none"}


async def _start(**options: str) -> tuple[int | None, str]:
    named = {f"--{name.replace('_', '-')}": text for name, text in options.items()}
    given = _SOME | {"--http": f"127.0.0.1:{free_port()}"} | named
    arguments = [f"{name}={text}" for name, text in given.items()]
    command = [sys.executable, "-m", "csi_driver.cli.main", "node", *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, output.decode()


async def _fails(*words: str, **options: str) -> None:
    status, output = await _start(**options)
    assert status not in (0, None)
    last = output.splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in output


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("place", ["nowhere", "file", "relative"])
async def test_wrong_kubelet_directory_is_rejected(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    wrong = "relative/path" if place == "relative" else str(tmp_path / place)
    await _fails("InvalidKubeletDirectory: --kubelet-dir", wrong, "the kubelet's --root-dir", kubelet_dir=wrong)
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "127.0.0.1:x"])
async def test_invalid_http_address_is_rejected(tmp_path: Path, address: str) -> None:
    await _fails(f"'--http': '{address}' is not HOST:PORT", kubelet_dir=str(tmp_path), http=address)


async def test_busy_http_port_is_reported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        await _fails(f"--http {address}: Address already in use", kubelet_dir=str(tmp_path), http=address)


async def test_too_long_socket_path_is_reported(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    await _fails("cannot create the socket", "107 bytes", kubelet_dir=str(deep), mounts="directory")


@pytest_asyncio.fixture(loop_scope="module")
async def node() -> AsyncIterator[Node]:
    async with running_node() as node:
        await node.driver.stop()
        yield node


async def test_driver_waits_for_the_kubelets_directories(node: Node) -> None:
    registry, away = node.kubelet.root / "plugins_registry", node.kubelet.root / "away"
    registry.rename(away)
    await node.driver.start()
    await until(lambda: node.driver.events("not registered with the kubelet"), "the log shows the reason")
    (line,) = node.driver.events("not registered with the kubelet")
    assert f"--kubelet-dir: {node.kubelet.root} does not contain plugins_registry" in line["error"]
    away.rename(registry)
    await node.kubelet.register()
    assert node.driver.get("/readyz") == (200, "ok\n")


@pytest.mark.root
async def test_driver_does_not_register_without_shared_propagation(node: Node) -> None:
    """Otherwise every pod would see an empty directory."""
    syscalls.mount(None, str(node.kubelet.root), None, _MS_PRIVATE)
    await node.driver.start()
    await until(lambda: node.driver.events("not registered with the kubelet"), "the log shows the reason")
    assert not node.kubelet.registration_socket.exists()
    status, text = node.driver.get("/readyz")
    assert status == 503
    assert "so pods do not see mounts in it; set mountPropagation: Bidirectional" in text
