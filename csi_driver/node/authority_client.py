"""The gRPC client for the authority: TLS with the root certificate of the authority, and the node driver's token in each call."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.secret import Secret
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport, IssuanceResponse, TrustBundle
from csi_driver.rpc.errors import REASON_KEY, from_rpc
from csi_driver.rpc.issuance_messages import issue_request

ISSUE_TIMEOUT_S = 90.0
"""Shorter than the kubelet's timeout of two minutes, so that pod events show the reason and not only a timeout."""
_REPORT_TIMEOUT_S = 30.0
_FAILOVER_S = 6.0
"""How long a call without a reply is retried: the Service needs some seconds to remove a replica that has failed."""
_FAILOVER_INTERVAL_S = 0.2
_MAX_FILE_BYTES = 1024 * 1024
_CONDITIONS = {
    CertificateCondition.RENEWAL_FAILING: authority_pb2.CONDITION_RENEWAL_FAILING,
    CertificateCondition.RENEWAL_OVERDUE: authority_pb2.CONDITION_OVERDUE,
    CertificateCondition.CERTIFICATE_EXPIRED: authority_pb2.CONDITION_EXPIRED,
    CertificateCondition.CERTIFICATE_RECOVERED: authority_pb2.CONDITION_RECOVERED,
    CertificateCondition.RENEWAL_STOPPED: authority_pb2.CONDITION_RENEWAL_STOPPED,
}
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
    # The trust stream can be idle for days. Without keepalives the driver would not detect a failed authority.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 1024 * 1024),
)


class AuthorityClient:
    """Calls the authority at one address. Use it in one event loop only.

    ``root_file`` (PEM) can appear or change later: each change creates a new channel. ``token_file`` is read for each call,
    because the kubelet renews it in place.
    """

    def __init__(self, address: str, root_file: Path, token_file: Path) -> None:
        self._address = address
        self._root_file = root_file
        self._token_file = token_file
        self._roots = b""
        self._channel: grpc.aio.Channel | None = None
        # Channels with earlier roots: calls in progress finish on them. The roots change once in years.
        self._retired: list[grpc.aio.Channel] = []

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """Request a certificate for the names of a CSR (DER). If a replica fails, retry with another one for some seconds.

        Raises CertmountError: the authority's reason, RootCertificateMissing, NodeTokenMissing or AuthorityUnavailable.
        """
        response = await self._issue(issue_request(csr, token, spec))
        renew_after = response.renew_after.ToTimedelta() if response.HasField("renew_after") else None
        return IssuanceResponse(response.chain, _root_sets(response.trust), renew_after, response.interim)

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        """Yield the trust bundle now and after each change, until the authority ends the stream; raises as :meth:`issue`."""
        call = self._stub().WatchTrust(authority_pb2.WatchTrustRequest(), metadata=self._metadata())
        try:
            async for bundle in call:
                yield TrustBundle(
                    _root_sets(bundle.sets),
                    bundle.policy_revision,
                    frozenset(bundle.shared_issuers),
                    frozenset(bundle.renew_now),
                )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()

    async def acknowledge_root_set(self, name: str, generation: int) -> None:
        """Acknowledge that all volumes of this node contain a root set with this generation or a newer one; raises as :meth:`issue`."""
        request = authority_pb2.ConfirmTrustRequest(set=name, generation=generation)
        await self._send(self._stub().ConfirmTrust, request)

    async def report(self, report: CertificateReport) -> None:
        """Report the condition of a pod's certificate; raises as :meth:`issue`."""
        request = authority_pb2.ReportRequest(
            pod_token=report.token.reveal(),
            condition=_CONDITIONS[report.condition],
            reason=report.reason,
            message=report.message,
        )
        await self._send(self._stub().Report, request)

    def root_problem(self) -> str | None:
        try:
            self._read_roots()
        except CertmountError as error:
            return str(error)
        return None

    async def close(self) -> None:
        for channel in (*self._retired, *([self._channel] if self._channel else [])):
            await channel.close()
        self._retired, self._channel = [], None

    async def _send(self, method: Callable[..., Awaitable[object]], request: object) -> None:
        try:
            await method(request, timeout=_REPORT_TIMEOUT_S, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None

    async def _issue(self, request: authority_pb2.IssueRequest) -> authority_pb2.IssueResponse:
        """Return the response of the first replica that replies. gRPC's own retries (gRFC A6) end after about a second."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _FAILOVER_S
        while True:
            try:
                return await self._stub().Issue(request, timeout=ISSUE_TIMEOUT_S, metadata=self._metadata())
            except grpc.aio.AioRpcError as error:
                replied = REASON_KEY in dict(error.trailing_metadata() or ())
                if replied or error.code() not in _NO_REPLY or clock() >= deadline:
                    raise from_rpc(error) from None
            # A replica that shuts down rejects calls although the connection is open.
            await asyncio.sleep(_FAILOVER_INTERVAL_S)
            if self._channel is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._channel.channel_ready(), max(deadline - clock(), 0.0))

    def _stub(self) -> authority_pb2_grpc.AuthorityAsyncStub:
        roots = self._read_roots()
        if self._channel is None or roots != self._roots:
            if self._channel is not None:
                self._retired.append(self._channel)
            self._roots = roots
            credentials = grpc.ssl_channel_credentials(root_certificates=roots)
            self._channel = grpc.aio.secure_channel(self._address, credentials, options=_OPTIONS)
        return authority_pb2_grpc.AuthorityStub(self._channel)

    def _read_roots(self) -> bytes:
        content, file = _read(self._root_file), str(self._root_file)
        if not content:
            hint = "the authority writes it to the ConfigMap certmount-root when it first starts; check that it runs"
            fault = Fault(file, "the root certificate of the authority does not exist yet", hint)
            raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, fault)
        try:
            decode_certificates(content)
        except ValueError:
            fault = Fault(file, "does not contain a PEM certificate")
            raise CertmountError(Reason.ROOT_CERTIFICATE_MISSING, fault) from None
        return content

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = _read(self._token_file).strip()
        if not _TOKEN.fullmatch(token):
            problem = "is not a token" if token else "the token of the node driver does not exist"
            hint = "mount a projected token with audience certmount-node in the DaemonSet"
            raise CertmountError(Reason.NODE_TOKEN_MISSING, Fault(str(self._token_file), problem, hint))
        return (("authorization", f"Bearer {token.decode('ascii')}"),)


def _root_sets(sets: Mapping[str, authority_pb2.RootSet]) -> Mapping[str, RootSet]:
    return {name: RootSet(tuple(roots.roots), roots.generation) for name, roots in sets.items()}


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError:
        return b""
