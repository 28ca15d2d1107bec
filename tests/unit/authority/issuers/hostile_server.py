"""A TLS server that answers each request with bytes that a test chooses, for as long as the client reads."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from tests.unit.core import pki

ALWAYS = pki.Validity(-timedelta(days=3650), timedelta(days=36500))
Attack = Callable[[], Iterable[bytes | float]]
"""The parts of a response: bytes to send, or seconds to wait."""


def respond(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


def _endless(begin: bytes, part: bytes, wait_s: float | None = None) -> Attack:
    def parts() -> Iterable[bytes | float]:
        yield begin
        for _ in itertools.count():
            yield part
            if wait_s is not None:
                yield wait_s

    return parts


_BOMB = gzip.compress(bytes(50_000_000))
_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_SLOW = "no complete response within 2 s"
_INVALID = "the response is not valid HTTP"


def _redirect(status: str, location: str) -> tuple[Attack, str]:
    problem = f"a redirect (HTTP {status[:3]}), which is not followed; configure the address that it leads to"
    return lambda: [respond(b"", status, f"Location: {location}")], f"the response is {problem}"


ATTACKS: dict[str, tuple[Attack, str]] = {
    "dripping headers": (_endless(_OK + b"X: ", b"a", 0.02), _SLOW),
    "endless headers": (_endless(_OK, b"X: " + b"a" * 1000 + b"\r\n"), _INVALID),
    "endless header": (_endless(_OK + b"X: ", b"a" * 1000), _INVALID),
    "endless interim responses": (_endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), _SLOW),
    "dripping body": (_endless(_OK + b"Content-Length: 100000\r\n\r\n", b"a", 0.02), _SLOW),
    "endless body": (_endless(_CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"), "is longer than 1048576 bytes"),
    "endless trailers": (_endless(_CHUNKED + b"0\r\n", b"X: " + b"a" * 1000 + b"\r\n"), "the connection failed"),
    "silence": (_endless(b"", b"", 0.02), _SLOW),
    "many values": (lambda: [respond(b"[" + b"{}," * 300_000 + b"{}]")], "has more than 10000 values"),
    "deep values": (lambda: [respond(b"[" * 1000 + b"]" * 1000)], "is nested more than 32 levels deep"),
    "redirect to http": _redirect("307 Temporary Redirect", "http://localhost/"),
    "redirect to another host": _redirect("301 Moved", "https://other.example/"),
    "gzip bomb": (lambda: [respond(_BOMB, "200 OK", "Content-Encoding: gzip")], "the response is compressed, which was not requested"),
    "page of a proxy": (lambda: [respond(b"<html></html>", "200 OK", "Content-Type: text/html")], "is not JSON"),
    "another type": (lambda: [respond(b'["ok"]', "200 OK", "Content-Type: image/png")], "JSON object"),
    "not HTTP": (lambda: [b"SSH-2.0-OpenSSH_9.6\r\n"], _INVALID),
}  # fmt: skip


def localhost_tls(root: pki.Signer, directory: Path) -> ssl.SSLContext:
    key = pki.key_of(KeyType.EC_P256)
    certificate = pki.leaf(root, key, Names.of([DNSName("localhost")]), validity=ALWAYS)
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file = directory / "server.pem"
    file.write_bytes(key_pem + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


class HostileServer:
    """Sends ``attack`` to each client. Other paths than /attack get ``good``."""

    def __init__(self, directory: Path) -> None:
        root = pki.authority("root", validity=ALWAYS)
        self.root: x509.Certificate = root.certificate
        self.ca_file = directory / "root.pem"
        self.ca_file.write_bytes(root.certificate.public_bytes(Encoding.PEM))
        self.context = localhost_tls(root, directory)
        self.attack: Attack = lambda: [respond(json.dumps({"status": "ok"}).encode())]
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[HostileServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for part in self.attack():
                if not isinstance(part, bytes):
                    await asyncio.sleep(part)
                    continue
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
                if writer.is_closing():
                    return
        writer.close()
