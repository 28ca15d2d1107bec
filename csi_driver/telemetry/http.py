"""/healthz, /readyz and /metrics on one port, served by a thread so that they respond while the event loop is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

_CLIENT_TIMEOUT_S = 5.0


class HealthServer:
    """Serves the kubelet's probes and Prometheus.

    ``alive`` and ``ready`` return the problems, if any. Another thread calls them.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        ready: Callable[[], Sequence[str]],
        alive: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        host, _, port = address.rpartition(":")
        self._server = ThreadingHTTPServer((host.strip("[]"), int(port)), _handler(registry, ready, alive))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The port, which the system chooses for port 0."""
        return self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(
    registry: CollectorRegistry, ready: Callable[[], Sequence[str]], alive: Callable[[], Sequence[str]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_S
        server_version = "certmount"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._respond(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path in ("/healthz", "/readyz"):
                reasons = alive() if self.path == "/healthz" else ready()
                status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
                self._respond(
                    status, "".join(f"{line}\n" for line in reasons or ("ok",)).encode(), "text/plain; charset=utf-8"
                )
            else:
                self._respond(HTTPStatus.NOT_FOUND, b"use /healthz, /readyz or /metrics\n", "text/plain; charset=utf-8")

        def _respond(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is http.server's
            """Do not log probes and scrapes."""

    return Handler
