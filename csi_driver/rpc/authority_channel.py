"""Calls of the authority: TLS with its root certificate, and the caller's own token in each call."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.rpc.errors import REASON_KEY, clock_skew_s, from_rpc
from csi_driver.rpc.serving_certificate import check_connection, find_clock_error

ISSUE_TIMEOUT_S = 90.0
"""Shorter than the kubelet's timeout of two minutes, so that pod events show the reason and not only a timeout."""
_REPORT_TIMEOUT_S = 30.0
_FAILOVER_S = 6.0
"""How long a call without a reply is retried: the Service needs some seconds to remove a replica that has failed."""
_FAILOVER_INTERVAL_S = 0.2
_MAX_FILE_BYTES = 1024 * 1024
# RFC 6750 section 2.1. gRPC rejects other characters in metadata, and servers reject more than 8 KiB of it.
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{1,7168}=*")
# The codes of gRPC if a replica has failed or shuts down. CANCELLED: it had received the call but not handled it.
_NO_REPLY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_OPTIONS = (
    # Send tokens only to the authority, even if the environment sets http_proxy.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 250),
    # This also limits the time to connect: a replica on a failed node does not respond at all.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # The trust stream can be idle for days. Without keepalives the caller would not detect a failed authority.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 1024 * 1024),
)

T = TypeVar("T")
Metadata: TypeAlias = "tuple[tuple[str, str], ...]"
Method: TypeAlias = "Callable[[grpc.aio.Channel], Any]"
"""Returns a method of a service from a channel, such as ``lambda channel: AuthorityStub(channel).Issue``."""


@dataclass(frozen=True, slots=True)
class TokenFile:
    """The caller's own token, which is read for each call, because the kubelet renews it in place."""

    path: Path
    owner: str  # for people, such as "node driver"
    hint: str  # what to do if the file is missing
    missing: Reason = Reason.NODE_TOKEN_MISSING

    def read(self) -> str:
        """Return the token; raises CertmountError with the reason ``missing``."""
        token = _read(self.path).strip()
        if not _TOKEN.fullmatch(token):
            problem = "is not a token" if token else f"the token of the {self.owner} does not exist"
            raise CertmountError(self.missing, Fault(str(self.path), problem, self.hint))
        return token.decode("ascii")


class AuthorityChannel:
    """A connection to the authority at one address. Use it in one event loop only.

    ``root_file`` (PEM) can appear or change later: each change creates a new channel.
    """

    def __init__(self, address: str, root_file: Path, token: TokenFile, caller: str) -> None:
        """``caller`` names the caller's machine in errors."""
        self._address = address
        self._caller = caller
        self._root_file = root_file
        self._token = token
        self._roots = b""
        self._channel: grpc.aio.Channel | None = None
        # Channels with earlier roots: calls in progress finish on them. The roots change once in years.
        self._retired: list[grpc.aio.Channel] = []

    async def call(self, method: Method, request: object) -> tuple[Any, float | None]:
        """Return the response of the first replica that replies, and by how many seconds the own clock is ahead of it.

        Raises CertmountError as :meth:`retry`.
        """
        return await self.retry(lambda channel, metadata: self.call_once(method(channel), request, metadata))

    @staticmethod
    async def call_once(method: Any, request: object, metadata: Metadata) -> tuple[Any, float | None]:
        """Do what :meth:`call` does for one replica; raises AioRpcError."""
        call = method(request, timeout=ISSUE_TIMEOUT_S, metadata=metadata)
        return await call, clock_skew_s(await call.trailing_metadata())

    async def retry(self, attempt: Callable[[grpc.aio.Channel, Metadata], Awaitable[T]]) -> T:
        """Repeat ``attempt`` until a replica replies, for a few seconds: gRPC's own retries (gRFC A6) end after one second.

        ``attempt`` raises AioRpcError. Raises CertmountError: the authority's reason, RootCertificateMissing, the reason
        of a missing token, AuthorityUnavailable or ClockSkew.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + _FAILOVER_S
        while True:
            try:
                return await attempt(self._connected(), self._metadata())
            except grpc.aio.AioRpcError as error:
                # gRPC reports that it could not verify the certificate in the text only, and not always.
                certificate = "certificate" in (error.details() or "").lower()
                if _replied(error) or error.code() not in _NO_REPLY or clock() >= deadline or certificate:
                    raise await self._failure(error) from None
            # A replica that shuts down rejects calls although the connection is open.
            await asyncio.sleep(_FAILOVER_INTERVAL_S * random.uniform(0.5, 1.5))  # noqa: S311  # spreads the nodes
            if self._channel is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._channel.channel_ready(), max(deadline - clock(), 0.0))

    async def send(self, method: Method, request: object) -> None:
        """Call a method once; raises as :meth:`call`."""
        call: Awaitable[object] = method(self._connected())(
            request, timeout=_REPORT_TIMEOUT_S, metadata=self._metadata()
        )
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from None

    async def stream(self, method: Method, request: object) -> AsyncIterator[Any]:
        """Yield the messages of a stream until the authority ends it; raises as :meth:`call`."""
        call = method(self._connected())(request, metadata=self._metadata())
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from None
        finally:
            call.cancel()

    def root_problem(self) -> str | None:
        try:
            self._read_roots()
        except CertmountError as error:
            return str(error)
        return None

    async def check(self) -> str:
        """Connect without a token, see :func:`check_connection`; raises CertmountError also if the roots are missing."""
        return f"{self._address} is at {await check_connection(self._address, self._read_roots())}"

    async def close(self) -> None:
        for channel in (*self._retired, *([self._channel] if self._channel else [])):
            await channel.close()
        self._retired, self._channel = [], None

    async def _failure(self, error: grpc.aio.AioRpcError) -> CertmountError:
        if error.code() is grpc.StatusCode.UNAVAILABLE and not _replied(error):
            clocks = await find_clock_error(self._address, self._roots, self._caller, time.time)
            if clocks is not None:
                return clocks
        return from_rpc(error, self._caller)

    def _connected(self) -> grpc.aio.Channel:
        roots = self._read_roots()
        if self._channel is None or roots != self._roots:
            if self._channel is not None:
                self._retired.append(self._channel)
            self._roots = roots
            credentials = grpc.ssl_channel_credentials(root_certificates=roots)
            self._channel = grpc.aio.secure_channel(self._address, credentials, options=_OPTIONS)
        return self._channel

    def _read_roots(self) -> bytes:
        content, file = _read(self._root_file), str(self._root_file)
        if not content:
            hint = "the authority writes it to the ConfigMap certmount-root when it first starts; check that it runs"
            fault = Fault(file, "the root certificate of the authority does not exist yet", hint)
            raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, fault)
        if content == self._roots:
            return content
        try:
            decode_certificates(content)
        except ValueError:
            fault = Fault(file, "does not contain a PEM certificate")
            raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, fault) from None
        return content

    def _metadata(self) -> Metadata:
        return (("authorization", f"Bearer {self._token.read()}"),)


def _replied(error: grpc.aio.AioRpcError) -> bool:
    return REASON_KEY in dict(error.trailing_metadata() or ())


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError:
        return b""
