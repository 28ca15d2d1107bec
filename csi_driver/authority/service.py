"""The two methods of the wire. Protobuf stops here, and here each decision gets its line in the audit log."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import structlog
from cryptography import x509

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.admission import Admission
from csi_driver.authority.issuers import Issued, Issuer, Order
from csi_driver.authority.policy_file import PolicyFile
from csi_driver.authority.trust import Trust
from csi_driver.core.csr import parse_csr
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.keys import public_bytes
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

audit = structlog.get_logger("audit")

MAX_MESSAGE_BYTES = 128 * 1024
"""A CSR of 64 KiB and a token of 16 KiB fit twice."""
_MOST_IN_FLIGHT = 512
"""Beyond it a caller waits longer for its turn than for its next try; in memory it is 64 MiB of requests at most."""

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Desk:
    """Those whom a request passes on its way to a certificate."""

    admission: Admission
    policy: PolicyFile
    issuer: Issuer


class AuthorityService(authority_pb2_grpc.AuthorityServicer):
    """Issue and WatchTrust; what they raise becomes a status in :class:`csi_driver.rpc.server.Interceptor`."""

    def __init__(
        self, desk: Desk, trust: Trust, metrics: AuthorityMetrics, most_in_flight: int = _MOST_IN_FLIGHT
    ) -> None:
        self._desk = desk
        self._trust = trust
        self._metrics = metrics
        self._most_in_flight = most_in_flight
        self._in_flight = 0

    async def Issue(self, request: authority_pb2.IssueRequest, context: _Context) -> authority_pb2.IssueResponse:
        started = time.perf_counter()
        record: dict[str, Any] = {"decision": "none"}  # as when the caller goes away
        try:
            with self._slot():
                issued = await self._issue(request, bearer(context), record)
        except CertmountError as error:
            record.update(decision="refused", reason=error.reason.word, error=str(error))
            raise
        else:
            record.update(decision="issued")
        finally:
            audit.info("certificate", duration_ms=_milliseconds(started), **record)
        return _response(issued)

    async def WatchTrust(
        self,
        request: authority_pb2.WatchTrustRequest,  # noqa: ARG002  # the signature is gRPC's
        context: _Context,
    ) -> AsyncIterator[authority_pb2.TrustBundle]:
        await self._desk.admission.prove_node(bearer(context))
        async with contextlib.aclosing(self._trust.watch()) as bundles:
            async for roots in bundles:
                yield authority_pb2.TrustBundle(sets={DEFAULT_ISSUER: authority_pb2.RootSet(roots=roots)})

    async def ConfirmTrust(
        self,
        request: authority_pb2.ConfirmTrustRequest,  # noqa: ARG002  # the signature is gRPC's
        context: _Context,
    ) -> authority_pb2.ConfirmTrustResponse:
        await self._desk.admission.prove_node(bearer(context))
        return authority_pb2.ConfirmTrustResponse()

    async def Report(
        self,
        request: authority_pb2.ReportRequest,
        context: _Context,
    ) -> authority_pb2.ReportResponse:
        node = await self._desk.admission.prove_node(bearer(context))
        await self._desk.admission.prove_pod(Secret(request.pod_token), node)
        return authority_pb2.ReportResponse()

    async def _issue(self, request: authority_pb2.IssueRequest, caller: Secret[str], record: dict[str, Any]) -> Issued:
        """Fills ``record`` as it goes, so that a refusal tells how far it came."""
        duration = _duration(request)
        node = await self._desk.admission.prove_node(caller)
        record.update(node=node.node_name)
        pod = await self._desk.admission.prove_pod(Secret(request.pod_token), node)
        account = pod.service_account
        record.update(namespace=account.namespace, service_account=account.name, pod=pod.pod_name, pod_uid=pod.pod_uid)
        signing_request = parse_csr(request.csr)
        record.update(
            asked=[str(name) for name in (*signing_request.names.dns, *signing_request.names.uris)],
            key_sha256=hashlib.sha256(public_bytes(signing_request.public_key)).hexdigest(),
        )
        grant = self._desk.policy.current.decide(pod, signing_request.names, duration)
        issued = await self._desk.issuer.issue(Order(signing_request, grant))
        leaf = x509.load_der_x509_certificate(issued.chain[0])
        record.update(
            names=[str(name) for name in (*grant.names.dns, *grant.names.uris)],
            serial=f"{leaf.serial_number:x}",
            not_after=f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        )
        return issued

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        if self._in_flight >= self._most_in_flight:
            raise CertmountError(Reason.OVERLOADED, f"{self._in_flight} certificates are being issued already")
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)


def bearer(context: _Context) -> Secret[str]:
    """The token of the call's ``authorization`` metadata (RFC 6750 section 2.1), empty where there is none or more than one."""
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    scheme, _, token = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
    return Secret(token.strip() if scheme.lower() == "bearer" else "")


def _duration(request: authority_pb2.IssueRequest) -> timedelta | None:
    if not request.HasField("duration"):
        return None
    try:
        duration = request.duration.ToTimedelta()
    except (ValueError, OverflowError):
        duration = timedelta(-1)
    if duration < timedelta():
        raise CertmountError(Reason.INVALID_REQUEST, Fault("duration", "is negative or far too long"))
    return duration


def _response(issued: Issued) -> authority_pb2.IssueResponse:
    trust = {DEFAULT_ISSUER: authority_pb2.RootSet(roots=issued.roots)}
    response = authority_pb2.IssueResponse(chain=issued.chain, trust=trust)
    if issued.renew_after is not None:
        response.renew_after.FromTimedelta(issued.renew_after)
    return response


def _milliseconds(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 2)
