"""/healthz, /readyz and /metrics on one port, from a thread, so that they answer while the event loop is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

_SLOW_CLIENT_S = 5.0


class HealthServer:
    """Answers the kubelet's probes and Prometheus.

    ``alive`` and ``ready`` give the reasons why not, none when all is well; they are called from another thread.
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
        """The port it listens on; of use where 0 was asked for."""
        return self._server.server_port

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and closes the socket."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(
    registry: CollectorRegistry, ready: Callable[[], Sequence[str]], alive: Callable[[], Sequence[str]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SLOW_CLIENT_S
        server_version = "certmount"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path in ("/healthz", "/readyz"):
                reasons = alive() if self.path == "/healthz" else ready()
                status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
                self._answer(
                    status, "".join(f"{line}\n" for line in reasons or ("ok",)).encode(), "text/plain; charset=utf-8"
                )
            else:
                self._answer(
                    HTTPStatus.NOT_FOUND, b"known are /healthz, /readyz and /metrics\n", "text/plain; charset=utf-8"
                )

        def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is http.server's
            """Probes and scrapes are not news."""

    return Handler
