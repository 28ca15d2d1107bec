"""Two pods that talk to each other: mutual TLS over loopback, each side with the files of its own volume.

Both read their files anew for every connection, as a program without any reload logic would after a restart. So a
certificate that changes in between must never be seen half.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HANDSHAKE_S = 5.0
_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Peer:
    """Who the other side proved to be: names and serial number (hexadecimal) of the certificate it showed."""

    dns: tuple[str, ...]
    uris: tuple[str, ...]
    serial: str


@dataclass(frozen=True, slots=True)
class Meeting:
    """One connection: what the client learnt of the server, and the server of the client."""

    server: Peer
    client: Peer
    protocol: str
    cipher: str


@dataclass(frozen=True, slots=True)
class Rotation:
    """The server showed another certificate than on the connection before."""

    before: str
    after: str
    connections: int
    errors: int


@asynccontextmanager
async def serving(files: Path) -> AsyncIterator[int]:
    """A server with the volume at ``files`` that demands a client certificate and tells each client who it is; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(_accept(listener, files), name="server")
            yield listener.getsockname()[1]
            accepting.cancel()


async def meet(files: Path, port: int, name: str) -> Meeting:
    """Connects with the volume at ``files`` to a server that must prove to be ``name``.

    Raises OSError (ssl.SSLError among them) or ValueError where either side does not accept the other.
    """
    context = ssl.create_default_context(cadata=_roots(files))
    _show(context, files)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname=name, ssl_handshake_timeout=_HANDSHAKE_S
    )
    try:
        seen = json.loads(await asyncio.wait_for(reader.read(), _HANDSHAKE_S))
        tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
        cipher = tls.cipher()
        client = Peer(tuple(seen["dns"]), tuple(seen["uris"]), seen["serial"])
        return Meeting(_peer(tls), client, tls.version() or "", cipher[0] if cipher else "")
    finally:
        writer.close()


class ConnectionLoop:
    """Ten connections a second, each a new handshake, until cancelled."""

    def __init__(self, files: Path, port: int, name: str) -> None:
        self._files = files
        self._port = port
        self._name = name
        self.connections = 0
        """Those that were tried."""
        self.errors = 0
        self.first_error = ""
        self.clients: set[str] = set()
        """Serial numbers that clients showed."""
        self.rotations: asyncio.Queue[Rotation] = asyncio.Queue()

    async def run(self, serial: str) -> None:
        """Connects again and again; ``serial`` is what the server has shown so far."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.connections += 1
            try:
                meeting = await meet(self._files, self._port, self._name)
            except (OSError, ValueError) as error:
                self.errors += 1
                self.first_error = self.first_error or str(error) or type(error).__name__
            else:
                self.clients.add(meeting.client.serial)
                if meeting.server.serial != serial:
                    before, serial = serial, meeting.server.serial
                    self.rotations.put_nowait(Rotation(before, serial, self.connections, self.errors))
            due += _EVERY_S
            await asyncio.sleep(max(0.0, due - loop.time()))


async def _accept(listener: socket.socket, files: Path) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as calls:
        while True:
            connection, _ = await loop.sock_accept(listener)
            calls.create_task(_answer(connection, files))


async def _answer(connection: socket.socket, files: Path) -> None:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=_roots(files))
        context.verify_mode = ssl.CERT_REQUIRED
        _show(context, files)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=context, ssl_handshake_timeout=_HANDSHAKE_S
        )
    except OSError:
        connection.close()  # which the client sees, and counts
        return
    peer = _peer(transport.get_extra_info("ssl_object"))
    transport.write(json.dumps({"dns": peer.dns, "uris": peer.uris, "serial": peer.serial}).encode())
    transport.close()


def _roots(files: Path) -> str:
    return (files / "root.crt").read_text(encoding="ascii")


def _show(context: ssl.SSLContext, files: Path) -> None:
    """Loads key and chain of one generation."""
    with (files / "site.pem").open("rb") as bundle:
        # OpenSSL opens the file once for the chain and once for the key. By our descriptor it is the same file both
        # times; by its name, it could be the old and the new one.
        context.load_cert_chain(f"/proc/self/fd/{bundle.fileno()}")


def _peer(tls: ssl.SSLObject) -> Peer:
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = certificate.get("subjectAltName", ())
    return Peer(
        dns=tuple(value for kind, value in names if kind == "DNS"),
        uris=tuple(value for kind, value in names if kind == "URI"),
        serial=certificate.get("serialNumber", "").lower(),
    )
