"""TLS connections between two pods: mutual TLS over loopback, each side with the files of its own volume.

Both sides read their files again for every connection, so a partly replaced certificate would show as an error.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_HANDSHAKE_TIMEOUT_S = 5.0
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


@dataclass(frozen=True, slots=True)
class ServerRotation:
    """The server presented a new certificate. Counts include all connections so far."""

    before: str
    after: str
    connections: int
    errors: int


@asynccontextmanager
async def serve(files: Path) -> AsyncIterator[int]:
    """Serve with the volume at ``files``; yield the port.

    The server requires a client certificate and sends each client the names in that certificate.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(_accept(listener, files), name="server")
            yield listener.getsockname()[1]
            accepting.cancel()


async def connect(files: Path, port: int, name: str) -> MutualConnection:
    """Connect with the volume at ``files`` to the server ``name``.

    Raises OSError (including ssl.SSLError) or ValueError if either side rejects the other.
    """
    context = ssl.create_default_context(cadata=_roots(files))
    _load_key_pair(context, files)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname=name, ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S
    )
    try:
        client = PeerCertificate(**json.loads(await asyncio.wait_for(reader.read(), _HANDSHAKE_TIMEOUT_S)))
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        cipher = tls.cipher()
        return MutualConnection(_peer_certificate(tls), client, tls.version() or "", cipher[0] if cipher else "")
    finally:
        writer.close()


class ConnectionLoop:
    """Opens ten connections a second, each with a new handshake, until cancelled."""

    def __init__(self, files: Path, port: int, name: str) -> None:
        self._files = files
        self._port = port
        self._name = name
        self.connections = 0
        """Number of attempts."""
        self.errors = 0
        self.first_error = ""
        self.client_serials: set[str] = set()
        self.rotations: asyncio.Queue[ServerRotation] = asyncio.Queue()

    async def run(self, serial: str) -> None:
        """Connect repeatedly; ``serial`` is the serial number of the server's certificate so far."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.connections += 1
            try:
                connection = await connect(self._files, self._port, self._name)
            except (OSError, ValueError) as error:
                self.errors += 1
                self.first_error = self.first_error or str(error) or type(error).__name__
            else:
                self.client_serials.add(connection.client.serial)
                if connection.server.serial != serial:
                    before, serial = serial, connection.server.serial
                    self.rotations.put_nowait(ServerRotation(before, serial, self.connections, self.errors))
            due += _INTERVAL_S
            await asyncio.sleep(max(0.0, due - loop.time()))


async def _accept(listener: socket.socket, files: Path) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as calls:
        while True:
            connection, _ = await loop.sock_accept(listener)
            calls.create_task(_answer(connection, files))


async def _answer(connection: socket.socket, files: Path) -> None:
    protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=_roots(files))
        context.verify_mode = ssl.CERT_REQUIRED
        _load_key_pair(context, files)
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: protocol, connection, ssl=context, ssl_handshake_timeout=_HANDSHAKE_TIMEOUT_S
        )
    except OSError:
        connection.close()  # the client sees this, and counts the error
        return
    transport.write(json.dumps(asdict(_peer_certificate(transport.get_extra_info("ssl_object")))).encode())
    transport.close()


def _roots(files: Path) -> str:
    return (files / "root.crt").read_text(encoding="ascii")


def _load_key_pair(context: ssl.SSLContext, files: Path) -> None:
    with (files / "site.pem").open("rb") as bundle:
        # OpenSSL opens the file twice, for the chain and for the key. The descriptor makes sure that both reads get the
        # same generation.
        context.load_cert_chain(f"/proc/self/fd/{bundle.fileno()}")


def _peer_certificate(tls: ssl.SSLObject) -> PeerCertificate:
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = certificate.get("subjectAltName", ())
    return PeerCertificate(
        dns=[value for kind, value in names if kind == "DNS"],
        uris=[value for kind, value in names if kind == "URI"],
        serial=certificate.get("serialNumber", "").lower(),
    )
