"""The node's side of the wire to the authority: one TLS channel that trusts exactly the root file, the node's own token on every call."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import CertificateSpec, Usage
from csi_driver.node.authority_messages import CertificateCondition, CertificateReport, IssuanceResponse, TrustBundle
from csi_driver.rpc.errors import from_rpc

ISSUE_TIMEOUT_S = 90.0
"""Shorter than kubelet's two minutes, so that it hears the reason and not just a timeout."""
_TELL_TIMEOUT_S = 30.0
_PATIENCE_S = 6.0
"""How long a call that got no answer waits for another replica: the cluster's Service needs some seconds to leave a dead one out."""
_PAUSE_S = 0.2
_MAX_FILE_BYTES = 1024 * 1024
_CONDITIONS = {
    CertificateCondition.RENEWAL_FAILING: authority_pb2.CONDITION_RENEWAL_FAILING,
    CertificateCondition.RENEWAL_OVERDUE: authority_pb2.CONDITION_OVERDUE,
    CertificateCondition.CERTIFICATE_EXPIRED: authority_pb2.CONDITION_EXPIRED,
    CertificateCondition.CERTIFICATE_RECOVERED: authority_pb2.CONDITION_RECOVERED,
    CertificateCondition.RENEWAL_STOPPED: authority_pb2.CONDITION_RENEWAL_DROPPED,
}
_USAGES = {Usage.SERVER: authority_pb2.USAGE_SERVER, Usage.CLIENT: authority_pb2.USAGE_CLIENT}
# RFC 6750 section 2.1. gRPC refuses other characters in metadata, and servers refuse more than 8 KiB of it.
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{1,7168}=*")
# A replica that is dead or ending; CANCELLED is for calls that it had received but not looked at when its end began.
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_OPTIONS = (
    # Tokens go to the authority and to no one between, whatever http_proxy the environment holds.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 250),
    # It is also how long a connection may take to come about: a replica on a dead node does not answer at all.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # The trust stream is silent for days; without this a vanished authority would go unnoticed.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 1024 * 1024),
)


class AuthorityClient:
    """Speaks to one authority address. Belongs to one event loop.

    ``root_file`` (PEM) may appear or change later: the channel is made from its present content. ``token_file`` is read
    for every call, as kubelet renews it in place.
    """

    def __init__(self, address: str, root_file: Path, token_file: Path) -> None:
        self._address = address
        self._root_file = root_file
        self._token_file = token_file
        self._roots = b""
        self._channel: grpc.aio.Channel | None = None
        # Channels of earlier roots: what is under way on them ends in peace. Roots change once in years.
        self._retired: list[grpc.aio.Channel] = []

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """Asks for a certificate as ``spec`` says; its names are in the CSR (DER).

        The end of a replica costs a call some seconds, and no failure.

        Raises:
            CertmountError: the authority's reason, RootCertificateMissing while there is no root file, AuthorityUnavailable.
        """
        request = authority_pb2.IssueRequest(
            csr=csr,
            pod_token=token.reveal(),
            usages=[_USAGES[usage] for usage in spec.usages],
            issuer=spec.issuer,
            federations=spec.federations,
        )
        if spec.duration is not None:
            request.duration.FromTimedelta(spec.duration)
        response = await self._answered(request)
        renew_after = response.renew_after.ToTimedelta() if response.HasField("renew_after") else None
        return IssuanceResponse(response.chain, _root_sets(response.trust), renew_after, response.interim)

    async def watch_trust(self) -> AsyncIterator[TrustBundle]:
        """Yields what is to be trusted now and at each change; ends when the authority ends the stream.

        Raises:
            CertmountError: as :meth:`issue`.
        """
        stub = self._stub()
        call = stub.WatchTrust(authority_pb2.WatchTrustRequest(), metadata=self._bearer())
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

    async def confirm_trust(self, name: str, generation: int) -> None:
        """Tells that every volume of this node which trusts a set holds this generation of it, or a newer one.

        Raises:
            CertmountError: as :meth:`issue`.
        """
        request = authority_pb2.ConfirmTrustRequest(set=name, generation=generation)
        try:
            await self._stub().ConfirmTrust(request, timeout=_TELL_TIMEOUT_S, metadata=self._bearer())
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None

    async def report(self, report: CertificateReport) -> None:
        """Tells what has become of a pod's certificate.

        Raises:
            CertmountError: as :meth:`issue`.
        """
        request = authority_pb2.ReportRequest(
            pod_token=report.token.reveal(),
            condition=_CONDITIONS[report.condition],
            reason=report.reason,
            message=report.message,
        )
        try:
            await self._stub().Report(request, timeout=_TELL_TIMEOUT_S, metadata=self._bearer())
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None

    def trust_fault(self) -> str | None:
        """Why the authority can't be trusted yet, for people; None when it can."""
        try:
            self._read_roots()
        except CertmountError as error:
            return str(error)
        return None

    async def close(self) -> None:
        """Ends the channel and what is under way on it."""
        for channel in (*self._retired, *([self._channel] if self._channel else [])):
            await channel.close()
        self._retired, self._channel = [], None

    async def _answered(self, request: authority_pb2.IssueRequest) -> authority_pb2.IssueResponse:
        """The answer of the first replica that gives one. gRPC's own retries (gRFC A6) give up within a second or so."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + _PATIENCE_S
        while True:
            try:
                return await self._stub().Issue(request, timeout=ISSUE_TIMEOUT_S, metadata=self._bearer())
            except grpc.aio.AioRpcError as error:
                failure = from_rpc(error)
                silent = failure.reason is Reason.AUTHORITY_UNAVAILABLE and error.code() in _SILENT
                if not silent or clock() >= give_up:
                    raise failure from None
            # A replica that is ending refuses calls over a connection that stands.
            await asyncio.sleep(_PAUSE_S)
            if self._channel is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._channel.channel_ready(), max(give_up - clock(), 0.0))

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
        content = _read(self._root_file)
        try:
            if content and decode_certificates(content):
                return content
        except ValueError:
            raise CertmountError(
                Reason.ROOT_CERTIFICATE_MISSING, Fault(str(self._root_file), "holds no certificate in PEM")
            ) from None
        hint = "the authority publishes it to the ConfigMap certmount-root when it first starts; is it running?"
        raise CertmountError(
            Reason.ROOT_CERTIFICATE_MISSING, Fault(str(self._root_file), "the authority's root is not there yet", hint)
        )

    def _bearer(self) -> tuple[tuple[str, str], ...]:
        token = _read(self._token_file).strip()
        if not _TOKEN.fullmatch(token):
            problem = "holds no token" if token else "the node driver's own token is not there"
            hint = "the DaemonSet must mount a projected token with audience certmount-node"
            raise CertmountError(Reason.TOKEN_MISSING, Fault(str(self._token_file), problem, hint))
        return (("authorization", f"Bearer {token.decode('ascii')}"),)


def _root_sets(sets: Mapping[str, authority_pb2.RootSet]) -> Mapping[str, RootSet]:
    return {name: RootSet(tuple(roots.roots), roots.generation) for name, roots in sets.items()}


def _read(path: Path) -> bytes:
    """The file's content; empty where it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError:
        return b""
