"""The recipes of docs/recipes.md, and a volume whose files the driver's own writer replaces."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import yaml
from cryptography import x509

from csi_driver.core.attributes import CertificateSpec, parse_attributes
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.formats.file_format import VolumeContents
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import URI, Names
from csi_driver.core.spec import KeyType
from csi_driver.node.volumes.volume import Volume as DriverVolume
from csi_driver.node.volumes.volume_files import store_password
from tests.peers.processes import LOOPBACK
from tests.support.scripted_authority import TestCA
from tests.support.waiting import until
from tests.unit.host.samples import record

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
MOUNT = "/var/run/tls"


@dataclass(frozen=True)
class Recipe:
    """A section of the page: the volume attributes, and its other blocks by language; a second one is ``yaml 2``."""

    spec: CertificateSpec
    blocks: Mapping[str, str]

    @classmethod
    def read(cls, title: str, **changes: str) -> Recipe:
        """Read a section. ``changes`` replace attributes that the machine decides, such as a group."""
        section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
        blocks: dict[str, str] = {}
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL):
            number = sum(name.split()[0] == language for name in blocks) + 1
            blocks[language if number == 1 else f"{language} {number}"] = text
        attributes = yaml.safe_load(blocks.pop("yaml"))["volumeAttributes"]
        changed = {key.replace("_", "-"): value for key, value in changes.items()}
        return cls(parse_attributes({**attributes, **changed}), blocks)

    def text(self, language: str, replacements: Mapping[str, str]) -> str:
        """Return a block with other paths and ports. Each text to replace must be there."""
        text = self.blocks[language]
        for old, new in replacements.items():
            assert old in text, old
            text = text.replace(old, new)
        return text


class Volume:
    """The files of a volume, as a pod sees them."""

    def __init__(self, directory: Path, spec: CertificateSpec, ca: TestCA) -> None:
        self.directory = directory / "volume" / "files"
        self.directory.mkdir(parents=True)
        (self.directory.parent / "private").mkdir(mode=0o700)
        self._spec, self._ca = spec, ca
        self._files = DriverVolume(record(str(directory)), spec).files(self.directory)
        self._password = store_password(spec.layout, None)
        self.serial = self.replace()

    def replace(self, ca: TestCA | None = None) -> int:
        """Write a new key and certificate, of another CA if given; return its serial number."""
        self._ca = ca or self._ca
        key = generate_key(self._spec.key_type)
        leaf = self._ca.sign(key.public_key(), self._spec.names, timedelta(hours=1))
        self._files.write(VolumeContents(key, (leaf,), (self._ca.certificate,), self._password), time.time())
        self.serial = leaf.serial_number
        return self.serial


Start = Callable[[socket.socket], None]


def start_tls(_connection: socket.socket) -> None:
    """TLS begins at once."""


def start_postgresql(connection: socket.socket) -> None:
    """Request TLS as in PostgreSQL's protocol (SSLRequest)."""
    connection.sendall((8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"))
    assert connection.recv(1) == b"S"


def _startup_message() -> bytes:
    body = (196608).to_bytes(4, "big") + b"user\0app\0database\0postgres\0\0"
    return (len(body) + 4).to_bytes(4, "big") + body


CLIENT = URI.parse("spiffe://cluster.local/ns/web/sa/client")
CLIENT_NAMES = Names.of(uris=[CLIENT])
_GET = b"GET / HTTP/1.0\r\nHost: shop.web.svc\r\n\r\n"
HTTP = (_GET, b"ok\n")
HELLO = (_GET, f"hello {CLIENT}\n".encode())  # of a server that knows its client
REDIS = (b"PING\r\n", b"+PONG\r\n")
POSTGRESQL = (_startup_message(), b"Z\x00\x00\x00\x05I")  # ReadyForQuery ends the answer


def client_context(
    ca: TestCA, *other_roots: TestCA, names: Names = CLIENT_NAMES, lifetime: timedelta = timedelta(hours=1)
) -> ssl.SSLContext:
    """Return a client with a certificate of the CA, which only the servers with mutual TLS request."""
    context = ssl.create_default_context(cadata="".join(root.pem.decode() for root in (ca, *other_roots)))
    key = generate_key(KeyType.EC_P256)
    with tempfile.NamedTemporaryFile() as file:
        file.write(encode_key(key).reveal() + encode_certificates([ca.sign(key.public_key(), names, lifetime)]))
        file.flush()
        context.load_cert_chain(file.name)
    return context


@dataclass(frozen=True)
class Peer:
    """How clients talk to a server."""

    port: int
    name: str = "shop.web.svc"
    exchange: tuple[bytes, bytes] = HTTP
    start: Start = start_tls

    def connect(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> tuple[int, ssl.SSLSession | None]:
        """Have one request answered. Return the serial number of the server's certificate, and the TLS session."""
        request, answer = self.exchange
        with socket.create_connection((LOOPBACK, self.port), timeout=10) as connection:
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )  # otherwise, requests wait for delayed ACKs
            self.start(connection)
            with context.wrap_socket(connection, server_hostname=self.name, session=session) as secured:
                secured.sendall(request)
                received = b""
                while answer not in received:
                    chunk = secured.recv(65536)
                    assert chunk, f"the connection ended after {received!r}"
                    received += chunk
                certificate = secured.getpeercert(binary_form=True)
                session = secured.session
        assert certificate is not None
        return x509.load_der_x509_certificate(certificate).serial_number, session


@dataclass
class Load:
    """Clients that connect all the time, verify the certificate, and have one request answered."""

    volume: Volume
    ca: TestCA
    peer: Peer
    connections: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    tolerated: str = ""  # a part of the error of failures that do not end the test
    served: set[int] = field(default_factory=set)
    stopped: bool = False

    def __post_init__(self) -> None:
        self._context = client_context(self.ca)

    @property
    def tolerated_failures(self) -> int:
        return sum(count for error, count in self.failures.items() if self.tolerated and self.tolerated in error)

    def has_served(self, serial: int) -> bool:
        assert self.failures.total() == self.tolerated_failures, self.failures
        return serial in self.served

    def has_made(self, connections: int) -> bool:
        assert self.failures.total() == self.tolerated_failures, self.failures
        return self.connections >= connections

    def run(self) -> None:
        """Connect until stopped."""
        while not self.stopped:
            try:
                self.served.add(self.peer.connect(self._context)[0])
            except (OSError, AssertionError) as error:
                self.failures[repr(error)] += 1
            self.connections += 1


ROTATIONS, CONNECTIONS, SEEN_S, _CLIENTS = 10, 1000, 5.0, 2


async def rotate_under_load(
    load: Load, reload: Callable[[], Awaitable[None]] | None = None, *, mixed_error: str = ""
) -> float:
    """Replace the files ten times during 1,000 connections. Return the longest time until a new certificate was served.

    ``reload`` does what the recipe requires after the files were replaced. ``mixed_error`` is the error of a server that
    reads the two files one after the other, and has read the former certificate and the new key: one is allowed per rotation.
    """
    load.tolerated = mixed_error
    clients = [asyncio.create_task(asyncio.to_thread(load.run)) for _ in range(_CLIENTS)]
    times = []
    try:
        for rotation in range(1, ROTATIONS + 1):
            replaced = time.monotonic()
            serial = load.volume.replace()
            if reload is not None:
                await reload()
            await until(partial(load.has_served, serial), "the new certificate", SEEN_S)
            times.append(time.monotonic() - replaced)
            await until(partial(load.has_made, rotation * CONNECTIONS // ROTATIONS), "the connections", 60)
    finally:
        load.stopped = True
        await asyncio.gather(*clients)
    mixed = load.tolerated_failures
    assert load.failures.total() == mixed <= ROTATIONS, load.failures
    assert load.connections >= CONNECTIONS
    print(
        f"{load.connections} connections, {ROTATIONS} rotations, {mixed} failed, new certificate after {max(times):.2f} s"
    )
    return max(times)
