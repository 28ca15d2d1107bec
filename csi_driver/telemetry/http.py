"""/healthz, /readyz and /metrics on one port, served by a thread so that they respond while the event loop is busy.

A slow or idle client cannot occupy it: connections, bytes and time are bounded, and new connections replace old ones.

The same port has pages for administrators, which contain names of pods and certificates. Only connections over the loopback
interface get them, such as those of ``kubectl port-forward``: other pods cannot connect to the loopback interface of a pod.
A request must also name a loopback address or localhost as its host. Otherwise a website that an administrator visits during a
port-forward could read them in the browser, under its own name if that resolves to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from csi_driver.core.addresses import Address
from csi_driver.telemetry.listening import BACKLOG, listening_socket

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 8192  # request line and headers; Prometheus and the kubelet send less than 1 KiB
MAX_REQUEST_S = 10.0  # from accept to the last byte of the response; the liveness check can take half of it
MAX_ADMIN_REQUEST_S = 60.0  # for a page of administrators, which can check connections to other systems
_REUSE = (
    5  # a metrics page is reused for this multiple of the time that it took, so scrapes use at most a sixth of a CPU
)
_ACCEPTED_AT_ONCE = 4  # in each step of the event loop; it takes four steps until others are closed
_REQUEST = re.compile(rb"(?P<method>[A-Z]{1,16}) (?P<path>/[!-~]*) HTTP/1\.[01]\r?\n")
# Of a URL on this machine (RFC 9112 section 3.2). A request without the field is not from a browser.
_HOST = re.compile(rb"^host:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_LOCAL_HOST = re.compile(rb"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?[ \t]*", re.IGNORECASE)
_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"
AdminPages = Mapping[str, Callable[[], Awaitable[bytes]]]
"""Functions that return JSON, by path. The server's thread calls each once at a time."""

log = structlog.get_logger(__name__)


class HealthServer:
    """Serves the kubelet's probes and Prometheus.

    ``alive``, ``ready`` and ``started`` return the problems, if any. The server's thread calls them. ``admin_pages`` are
    for administrators.
    """

    def __init__(
        self,
        address: Address,
        registry: CollectorRegistry,
        ready: Callable[[], Sequence[str]],
        alive: Callable[[], Awaitable[Sequence[str]]],
        admin_pages: AdminPages | None = None,
        started: Callable[[], Awaitable[Sequence[str]]] | None = None,
    ) -> None:
        self._socket = listening_socket(address)
        self.port: int = self._socket.getsockname()[1]  # which the system chooses for port 0
        self._pages = _Pages(registry, ready, alive, admin_pages or {}, started)
        self._connections: dict[_Connection, str] = {}  # with the address of the peer, the oldest first
        self._loop, self._stopping = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        server = await self._loop.create_server(
            lambda: _Connection(self, self._pages), sock=self._socket, backlog=_ACCEPTED_AT_ONCE
        )
        self._socket.listen(BACKLOG)  # asyncio uses one number for both, and would accept as many before it closes any
        await self._stopping.wait()
        server.close()
        for connection in tuple(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # so that they close their sockets

    def opened(self, connection: _Connection, peer: str) -> None:
        """Count a connection. If there are too many, the peer with the most loses its oldest."""
        self._connections[connection] = peer
        if len(self._connections) > MAX_CONNECTIONS:
            largest = Counter(self._connections.values()).most_common(1)[0][0]
            oldest = next(one for one, of in self._connections.items() if of == largest)
            del self._connections[oldest]
            oldest.abort()

    def closed(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)


class _Connection(asyncio.Protocol):
    """One request and its response."""

    def __init__(self, server: HealthServer, pages: _Pages) -> None:
        self._server = server
        self._pages = pages
        self._received = bytearray()
        self._answer: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  # for mypy
        self._transport = transport
        self._deadline = asyncio.get_running_loop().call_later(MAX_REQUEST_S, transport.abort)
        self._server.opened(self, str((transport.get_extra_info("peername") or ("",))[0]))

    def connection_lost(self, _error: Exception | None) -> None:
        self._deadline.cancel()
        self._server.closed(self)
        if self._answer is not None:
            self._answer.cancel()

    def abort(self) -> None:
        self._transport.abort()

    def eof_received(self) -> bool:
        return self._answer is not None  # a client can close its half after the request

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            return
        self._received += data
        if len(self._received) > MAX_REQUEST_BYTES:
            problem = f"the request exceeds {MAX_REQUEST_BYTES} bytes\n".encode()
            self._send(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, problem, _TEXT)
        elif b"\r\n\r\n" in self._received or b"\n\n" in self._received:
            self._transport.pause_reading()
            self._answer = asyncio.get_running_loop().create_task(self._respond())

    async def _respond(self) -> None:
        request = _REQUEST.match(self._received)
        if request is None:
            self._send(HTTPStatus.BAD_REQUEST, b"send GET PATH HTTP/1.1\n", _TEXT)
        elif request["method"] != b"GET":
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"use GET\n", _TEXT)
        else:
            path = request["path"].partition(b"?")[0]
            if self._pages.is_for_administrators(path):
                if not self._is_local():
                    self._send(HTTPStatus.FORBIDDEN, b"use kubectl port-forward to get this page\n", _TEXT)
                    return
                self._deadline.cancel()
                self._deadline = asyncio.get_running_loop().call_later(MAX_ADMIN_REQUEST_S, self._transport.abort)
            self._send(*await self._pages.page(path))

    def _is_local(self) -> bool:
        """Return True if both ends of the connection have a loopback address, and the request names no other host."""
        ends = (self._transport.get_extra_info(end) for end in ("peername", "sockname"))
        return all(map(_is_loopback, ends)) and all(map(_LOCAL_HOST.fullmatch, _HOST.findall(self._received)))

    def _send(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode("ascii") + body)
        self._transport.close()


class _Pages:
    """What the server responds to a path."""

    def __init__(
        self,
        registry: CollectorRegistry,
        ready: Callable[[], Sequence[str]],
        alive: Callable[[], Awaitable[Sequence[str]]],
        admin_pages: AdminPages,
        started: Callable[[], Awaitable[Sequence[str]]] | None,
    ) -> None:
        self._registry = registry
        self._ready = ready
        self._alive = alive
        self._started = started
        # With a turn each, so that many requests need no more memory than one.
        self._admin_pages = {path.encode("ascii"): (page, asyncio.Lock()) for path, page in admin_pages.items()}
        self._metrics = b""
        self._metrics_until = 0.0  # monotonic

    def is_for_administrators(self, path: bytes) -> bool:
        return path in self._admin_pages

    async def page(self, path: bytes) -> tuple[HTTPStatus, bytes, str]:
        try:
            match path:
                case b"/metrics":
                    return HTTPStatus.OK, self._metrics_page(), CONTENT_TYPE_LATEST
                case b"/healthz":
                    return _problems(await self._alive())
                case b"/readyz":
                    return _problems(self._ready())
                case b"/startupz" if self._started is not None:
                    return _problems(await self._started())
                case _ if path in self._admin_pages:
                    page, turn = self._admin_pages[path]
                    async with turn:
                        return HTTPStatus.OK, await page(), _JSON
        except Exception as error:
            log.exception("request failed", path=path.decode("ascii"), error=type(error).__name__)
            return HTTPStatus.INTERNAL_SERVER_ERROR, b"failed; see the log\n", _TEXT
        return HTTPStatus.NOT_FOUND, b"use /healthz, /readyz or /metrics\n", _TEXT

    def _metrics_page(self) -> bytes:
        begin = time.monotonic()
        if begin >= self._metrics_until:
            self._metrics = generate_latest(self._registry)
            end = time.monotonic()
            self._metrics_until = end + _REUSE * (end - begin)
        return self._metrics


def _problems(found: Sequence[str]) -> tuple[HTTPStatus, bytes, str]:
    status = HTTPStatus.SERVICE_UNAVAILABLE if found else HTTPStatus.OK
    return status, "".join(f"{line}\n" for line in found or ("ok",)).encode(), _TEXT


def _is_loopback(address: tuple[str, int] | None) -> bool:
    if not address:
        return False
    host = ip_address(address[0].partition("%")[0])
    mapped = host.ipv4_mapped if isinstance(host, IPv6Address) else None
    return (mapped or host).is_loopback
