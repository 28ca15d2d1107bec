"""HTTP connections to the API server, with the credentials of the pod or of a person."""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from csi_driver import __version__
from csi_driver.core.errors import CertmountError, Fault, Reason

Authorization = Callable[[], Awaitable[str]]
"""Returns the value of the Authorization header; empty without one."""

_MAX_CONNECTIONS = 100
_READ_BUFFER_BYTES = 2**16
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_AGE_S = 60.0  # the kubelet renews the token long before it expires
_CLOSE_S = 2.0


def bearer(token: str) -> Authorization:
    """Authenticate by a token that does not change (RFC 6750 section 2.1); with an empty one, not at all."""

    async def authorization() -> str:
        return f"Bearer {token}" if token else ""

    return authorization


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfiguration:
    """Where the API server is, and how to authenticate to it."""

    url: str  # without a path, unless a proxy adds one
    tls: ssl.SSLContext | bool = True  # True: the certificate authorities of the system
    server_name: str | None = None  # in the server's certificate, if it is not that of the URL
    proxy: str | None = None
    authorization: Authorization = bearer("")


class Api:
    """A client of the API server with its own connection pool. It belongs to one event loop; use it with ``async with``."""

    def __init__(self, configuration: ApiConfiguration) -> None:
        self._configuration = configuration
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # Ignore proxies and .netrc in the environment: tokens must go to the API server only.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, ssl=self._configuration.tls),
            trust_env=False,
            read_bufsize=_READ_BUFFER_BYTES,
            # A compressed response could be a thousand times as long after decompression.
            headers={"User-Agent": f"certmount/{__version__}", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str],
        body: bytes | None,
        headers: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        """Return a response with an unread body; raises aiohttp's exceptions. The API server sends no redirects."""
        session, target, own = await self._prepare(path, query)
        return await session.request(
            method,
            target,
            data=body,
            headers={**own, **headers},
            timeout=limits,
            allow_redirects=False,
            server_hostname=self._configuration.server_name,
            proxy=self._configuration.proxy,
        )

    async def open_websocket(
        self, path: str, query: Mapping[str, str], protocol: str
    ) -> aiohttp.ClientWebSocketResponse[bool]:
        """Return a WebSocket, which the caller closes; raises aiohttp's exceptions."""
        session, target, own = await self._prepare(path, query)
        timeout = aiohttp.ClientWSTimeout(ws_close=_CLOSE_S)
        return await session.ws_connect(
            target,
            protocols=(protocol,),
            headers=own,
            timeout=timeout,
            server_hostname=self._configuration.server_name,
            proxy=self._configuration.proxy,
        )

    async def _prepare(self, path: str, query: Mapping[str, str]) -> tuple[aiohttp.ClientSession, URL, dict[str, str]]:
        if self._session is None:
            raise RuntimeError("the client is used outside of its block")
        authorization = await self._configuration.authorization()
        url = URL(self._configuration.url.rstrip("/") + path)
        return self._session, url.update_query(query), {"Authorization": authorization} if authorization else {}


class ErrorResponse(Exception):
    """A response of the API server with a status of 400 or more. Its text can quote the request."""

    def __init__(self, status: int, body: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.body = body
        self.headers: Mapping[str, str] = headers or {}


def client_context(certificate_authorities: str | None = None) -> ssl.SSLContext:
    """Return the TLS settings for a server with a certificate of these authorities (a file in PEM), or of the system's."""
    context = ssl.create_default_context(cafile=certificate_authorities)
    # Python 3.13 and newer also require key identifiers, which the certificates of many clusters do not have.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def in_cluster_configuration() -> ApiConfiguration:
    """Return the configuration that every pod has; raises CertmountError TokenReviewUnavailable outside a cluster."""
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if not (host and port):
        raise _not_in_cluster("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
    try:
        token = _Token(SERVICE_ACCOUNT / "token")
        tls = client_context(str(SERVICE_ACCOUNT / "ca.crt"))
    except (OSError, ValueError) as error:  # SSLError is an OSError
        detail = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        raise _not_in_cluster(detail) from None
    return ApiConfiguration(
        url=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        tls=tls,
        authorization=token.authorization,
    )


def _not_in_cluster(detail: str) -> CertmountError:
    hint = "the pod needs its service account token (automountServiceAccountToken)"
    return CertmountError(
        Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("cluster", f"no in-cluster configuration: {detail}", hint)
    )


class _Token:
    """The pod's own token, which the kubelet renews in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read()

    async def authorization(self) -> str:
        if time.monotonic() - self._read_at > TOKEN_AGE_S:
            # If it cannot be read, the API server rejects the former one, when it expires, with a better message.
            with contextlib.suppress(OSError, ValueError):
                self._read()
        return f"Bearer {self._token}"

    def _read(self) -> None:
        token = self._path.read_text("ascii").strip()
        if not token:
            raise ValueError(f"{self._path} is empty")
        self._token, self._read_at = token, time.monotonic()
