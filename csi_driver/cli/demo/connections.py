"""TLS connections between two pods: mutual TLS over loopback, each side with the files of its own volume.

Both sides read their files again for every connection, so a partly replaced certificate would show as an error.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csi_driver.core.addresses import Address
from csi_driver.telemetry.listening import listening_socket

LOOPBACK = "localhost"  # 127.0.0.1, ::1 or both, whatever this machine has
_TIMEOUT_S = 5.0
_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """Names and serial number (hexadecimal) of the certificate that the other side presented."""

    dns: list[str]
    uris: list[str]
    serial: str


@dataclass(frozen=True, slots=True)
class MutualConnection:
    """The certificates and parameters of one mutual TLS connection."""

    server: PeerCertificate
    client: PeerCertificate
    protocol: str
    cipher: str


@asynccontextmanager
async def serve(files: Path) -> AsyncIterator[int]:
    """Serve with the volume at ``files``; yield the port. Each client receives the names in its own certificate."""
    with listening_socket(Address(LOOPBACK, 0)) as listener:
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(_accept(listener, files), name="server")
            yield listener.getsockname()[1]
            accepting.cancel()


async def _accept(listener: socket.socket, files: Path) -> None:
    async with asyncio.TaskGroup() as calls:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            calls.create_task(asyncio.to_thread(_answer, connection, files))


def _answer(connection: socket.socket, files: Path) -> None:
    with connection, suppress(OSError):  # the client sees the closed connection, and counts the error
        connection.settimeout(_TIMEOUT_S)
        with _tls_context(files, ssl.Purpose.CLIENT_AUTH).wrap_socket(connection, server_side=True) as tls:
            tls.sendall(json.dumps(asdict(_peer_certificate(tls))).encode())


def connect(files: Path, port: int, name: str) -> MutualConnection:
    """Connect with the volume at ``files`` to the server ``name``; raises OSError or ValueError if either side rejects it."""
    context = _tls_context(files, ssl.Purpose.SERVER_AUTH)
    with (
        socket.create_connection((LOOPBACK, port), _TIMEOUT_S) as connection,
        context.wrap_socket(connection, server_hostname=name) as tls,
    ):
        server, protocol, cipher = _peer_certificate(tls), tls.version() or "", tls.cipher()
        client = PeerCertificate(**json.loads(tls.makefile("rb").read()))
        return MutualConnection(server, client, protocol, cipher[0] if cipher else "")


class ConnectionLoop:
    """Opens ten connections a second, each with a new handshake, until cancelled."""

    def __init__(self, files: Path, port: int, name: str) -> None:
        self._target = (files, port, name)
        self.connections = 0  # number of attempts
        self.errors = 0
        self.first_error = ""
        self.client_serials: set[str] = set()
        # The server's serial number before and after each change, and the connections and errors so far.
        self.rotations: asyncio.Queue[tuple[str, str, int, int]] = asyncio.Queue()

    async def run(self, serial: str) -> None:
        """Connect repeatedly; ``serial`` is the serial number of the server's certificate so far."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.connections += 1
            try:
                connection = await asyncio.to_thread(connect, *self._target)
            except (OSError, ValueError) as error:
                self.errors += 1
                self.first_error = self.first_error or str(error) or type(error).__name__
            else:
                self.client_serials.add(connection.client.serial)
                if connection.server.serial != serial:
                    self.rotations.put_nowait((serial, connection.server.serial, self.connections, self.errors))
                    serial = connection.server.serial
            due += _INTERVAL_S
            await asyncio.sleep(max(0.0, due - loop.time()))


def _tls_context(files: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    """Return a context with the current files, which requires a certificate of the other side."""
    context = ssl.create_default_context(purpose, cadata=(files / "root.crt").read_text(encoding="ascii"))
    context.verify_mode = ssl.CERT_REQUIRED
    with (files / "site.pem").open("rb") as bundle:
        # OpenSSL opens the file twice, for the chain and for the key. The descriptor makes sure that both reads get the
        # same generation.
        context.load_cert_chain(f"/proc/self/fd/{bundle.fileno()}")
    return context


def _peer_certificate(tls: ssl.SSLSocket) -> PeerCertificate:
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = certificate.get("subjectAltName", ())
    return PeerCertificate(
        dns=[value for kind, value in names if kind == "DNS"],
        uris=[value for kind, value in names if kind == "URI"],
        serial=f"{int(certificate.get('serialNumber', '0'), 16):x}",  # as in logs: without leading zeros
    )
