"""The part of a kubelet that ``kubectl port-forward`` uses: it forwards ports of pods to ports of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

_PROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = b"\x00", b"\x01"


class ForwardingKubelet:
    """``ports`` are those of this machine by the name of the pod; ``flags`` are those of /flagz, empty for an old kubelet."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.port = port
        self.ports: dict[str, int] = {}
        self.flags = ""
        self._transports = set[asyncio.Transport]()

    @web.middleware
    async def remember(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.transport is not None:
            self._transports.add(request.transport)
        return await handler(request)

    async def abort(self) -> None:
        """Close all connections: the API server keeps its own open, and TLS would wait for it."""
        for transport in self._transports:
            transport.abort()
        await asyncio.sleep(0)  # so that they close their sockets

    async def forward(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=(_PROTOCOL,))
        await socket.prepare(request)
        port = int(request.query["port"]).to_bytes(2, "little")
        for channel in (_DATA, _ERROR):
            await socket.send_bytes(channel + port)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[request.match_info["pod"]])
        except (OSError, KeyError) as error:
            text = f"error forwarding port {request.query['port']} to pod: {type(error).__name__}"
            await socket.send_bytes(_ERROR + text.encode())
            await socket.close()
            return socket
        sending = asyncio.create_task(self._send(reader, socket))
        async for message in socket:
            if message.type is WSMsgType.BINARY and message.data[:1] == _DATA:
                writer.write(message.data[1:])
        sending.cancel()
        writer.close()
        return socket

    @staticmethod
    async def _send(reader: asyncio.StreamReader, socket: web.WebSocketResponse) -> None:
        while data := await reader.read(16384):
            await socket.send_bytes(_DATA + data)
        await socket.close()

    async def flagz(self, _request: web.Request) -> web.Response:
        return web.Response(text=self.flags) if self.flags else web.Response(status=404)


@contextlib.contextmanager
def forwarding_kubelet(address: str, port: int, directory: Path) -> Iterator[ForwardingKubelet]:
    """Serve in a thread until the block ends. The API server forwards to loopback addresses, but reads no flags there."""
    kubelet, loop, started = ForwardingKubelet(address, port), asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application(middlewares=[kubelet.remember])
        app.add_routes([web.get("/portForward/{namespace}/{pod}", kubelet.forward), web.get("/flagz", kubelet.flagz)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, address, port, ssl_context=_server_context(directory)).start()
        started.set()
        await stop.wait()
        await runner.cleanup()
        await kubelet.abort()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="kubelet")
    thread.start()
    assert started.wait(10)
    try:
        yield kubelet
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def _server_context(directory: Path) -> ssl.SSLContext:
    """Return a context with a new certificate; the API server does not verify it."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubelet")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, SHA256())
    )
    file = directory / "kubelet.pem"
    pem_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(pem_key + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
