"""The port for metrics and probes of both programs, attacked from outside with slow, idle and invalid clients."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from csi_driver.telemetry.http import MAX_CONNECTIONS, MAX_REQUEST_BYTES, MAX_REQUEST_S
from tests.bench.table import percentile
from tests.support.driver import started
from tests.support.kubelet import Kubelet
from tests.support.machine import rss_mb
from tests.support.ports import free_port, interface_address
from tests.support.requirements import missing
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until

IDLE, DRIPPING = 1000, 200
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
ATTACKER = "127.0.0.2"  # the address of the attacker's connections, in contrast to the probe's 127.0.0.1


class Program:
    """A certmount program, and what its process holds."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid = pid
        self.port = port

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def probe_s(self, path: str = "/healthz") -> float:
        """Return the duration of a successful probe."""
        begin = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            assert response.status == 200
            response.read()
        return time.monotonic() - begin

    async def exchange(self, *parts: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
        response = bytearray()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                response += data
        writer.close()
        return bytes(response)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path, because the path of a unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="cm-") as path:
        yield Path(path)


@pytest.fixture(params=["node", "authority"])
async def program(request: pytest.FixtureRequest, directory: Path) -> AsyncIterator[Program]:
    port, log = free_port(), directory / "log"
    with started(*options(request.param, directory), f"--http=127.0.0.1:{port}", log=log) as process:
        await until(lambda: answers(port) or process.poll() is not None, "the program to listen")
        assert process.poll() is None, log.read_text()
        yield Program(process.pid, port)


def options(program: str, directory: Path) -> list[str]:
    """Return a program's options; it does not need to become ready."""
    if program == "node":
        kubelet = Kubelet(directory / "kubelet")
        return ["node", f"--kubelet-dir={kubelet.root}", "--node-name=node1", "--authority=localhost:1",
            "--mounts=directory", f"--authority-root={directory}/missing.crt", f"--token={directory}/missing",
        ]  # fmt: skip
    (directory / "policy.yaml").write_text("policy: []\n")
    (directory / "jwks.json").write_bytes(TokenIssuer().published.jwks)
    return ["authority", f"--listen=127.0.0.1:{free_port()}", f"--policy={directory}/policy.yaml",
        "--serving-name=localhost", f"--ca-dir={directory}/ca", f"--jwks={directory}/jwks.json", "--token-issuer=https://x",
    ]  # fmt: skip


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def attack(port: int, data: bytes) -> None:
    """Hold a connection forever: idle, or with one byte every 0.2 s; connect again if the server closes it."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(ATTACKER, 0))
            try:
                for position in range(len(data)):
                    writer.write(data[position : position + 1])
                    await writer.drain()
                    await asyncio.sleep(0.2)
                await reader.read()
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.5)


@pytest.mark.alone
@pytest.mark.usefixtures("many_descriptors")
async def test_probes_are_answered_during_an_attack(program: Program) -> None:
    await asyncio.to_thread(program.probe_s)
    descriptors, threads, memory = program.descriptors(), program.threads(), rss_mb(program.pid)
    slow = b"GET /metrics HTTP/1.1\r\n" + b"X-A: b\r\n" * 1000
    sent = [slow] * DRIPPING + [b""] * IDLE
    attackers = [asyncio.create_task(attack(program.port, data)) for data in sent]
    await until(lambda: program.descriptors() >= descriptors + MAX_CONNECTIONS, "the attack to begin")
    probes, most = [], 0
    for _ in range(20):
        probes.append(await asyncio.to_thread(program.probe_s))
        most = max(most, program.descriptors())
        await asyncio.sleep(0.1)
    grown = rss_mb(program.pid) - memory
    print(f"slowest probe {max(probes):.3f} s, {most - descriptors} descriptors, {grown:.1f} MB more")
    assert percentile(probes, 0.9) < 1
    assert most <= descriptors + MAX_CONNECTIONS + 32, "closed connections that the server has not handled yet"
    assert program.threads() <= threads + 16, "gRPC and asyncio start their threads late, but a fixed number of them"
    assert grown < 16, "a thread for each connection needs much more"
    for attacker in attackers:
        attacker.cancel()
    await asyncio.gather(*attackers, return_exceptions=True)
    limit = descriptors + MAX_CONNECTIONS // 2  # gRPC opens some of its own after the start
    await until(lambda: program.descriptors() <= limit, "the server to close the attack's connections")
    assert await asyncio.to_thread(program.probe_s, "/metrics") < 1


@pytest.mark.alone
async def test_request_has_a_deadline(program: Program) -> None:
    """From accept to the end, however often the client sends a byte, and although there is room for the connection."""
    begin = time.monotonic()
    _, writer = await asyncio.open_connection("127.0.0.1", program.port)
    with contextlib.suppress(ConnectionError):
        for _ in range(60):
            writer.write(b"G")
            await writer.drain()
            await asyncio.sleep(0.25)
    assert MAX_REQUEST_S - 0.5 < time.monotonic() - begin < MAX_REQUEST_S + 2
    writer.close()


async def test_invalid_requests_are_rejected(program: Program) -> None:
    for request, status in (
        (b"GET /healthz HTTP/1.1\n\n", b"200 OK"),
        (b"GET /healthz?verbose HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405 Method Not Allowed"),
        (b"GET /healthz\r\n\r\n", b"400 Bad Request"),
        (b"\x16\x03\x01\x02\r\n\r\n", b"400 Bad Request"),
        (b"GET /" + b"a" * MAX_REQUEST_BYTES, b"431 Request Header Fields Too Large"),
    ):
        response = await program.exchange(request)
        assert response.startswith(b"HTTP/1.1 " + status + b"\r\n"), request[:40]
    assert await program.exchange(*(REQUEST[position : position + 1] for position in range(len(REQUEST)))) != b""
    assert await asyncio.to_thread(program.probe_s) < 1


@pytest.mark.parametrize("name", ["node", "authority"])
async def test_pages_of_administrators_are_for_the_loopback_interface_only(name: str, directory: Path) -> None:
    """They contain names of pods. Another pod can connect to the port, but not from the loopback interface of this one."""
    other = interface_address() or missing("needs a network interface besides the loopback interface")
    port, log = free_port(), directory / "log"
    with started(*options(name, directory), f"--http=:{port}", log=log) as process:
        await until(lambda: answers(port) or process.poll() is not None, "the program to listen")
        assert process.poll() is None, log.read_text()
        for path in ("/status", "/diagnostics"):
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            for host in ("127.0.0.1", "::1"):
                response = await _exchange(host, port, request)
                assert response.startswith(b"HTTP/1.1 200 OK"), response
                assert b'"version":' in response
            rebound = (
                f"GET {path} HTTP/1.1\r\nhost: site.example:{port}\r\n\r\n".encode()
            )  # as a browser, with DNS rebinding
            for refused in (await _exchange(other, port, request), await _exchange("127.0.0.1", port, rebound)):
                assert refused.startswith(b"HTTP/1.1 403 Forbidden"), refused
                assert refused.endswith(b"\r\n\r\nuse kubectl port-forward to get this page\n")
            local = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
            assert (await _exchange("127.0.0.1", port, local)).startswith(b"HTTP/1.1 200 OK")


async def _exchange(host: str, port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    response = await reader.read()
    writer.close()
    return response
