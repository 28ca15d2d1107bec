"""The methods of the wire. Protobuf stops here, and here each decision gets its line in the audit log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any

import grpc
import structlog

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.authn.limits import ConcurrencyLimit
from csi_driver.authority.events.node_reports import MAX_MESSAGE, parse_report
from csi_driver.authority.issuance.pipeline import IssuancePipeline, IssuanceRequest, IssuanceResult, milliseconds
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, Usage

audit = structlog.get_logger("audit")

MAX_MESSAGE_BYTES = 128 * 1024
"""A CSR of 64 KiB and a token of 16 KiB fit twice."""
_MOST_IN_FLIGHT = 512
"""Beyond it a caller waits longer for its turn than for its next try; in memory it is 64 MiB of requests at most."""
_MOST_FEDERATIONS = 32
_MAX_SET_NAME = 253
_MAX_GENERATION = 2**53
"""Unix seconds with room; larger integers don't survive JSON (RFC 8259 section 6)."""
_STAND_IN = "the pod starts with a certificate of the internal CA while its own is on its way:"
_USAGES = {authority_pb2.USAGE_SERVER: Usage.SERVER, authority_pb2.USAGE_CLIENT: Usage.CLIENT}

_Context = grpc.aio.ServicerContext[Any, Any]


class AuthorityService(authority_pb2_grpc.AuthorityServicer):
    """What its methods raise becomes a status in :class:`csi_driver.rpc.server.Interceptor`."""

    def __init__(self, desk: IssuancePipeline, most_in_flight: int = _MOST_IN_FLIGHT) -> None:
        self._desk = desk
        self._slots = ConcurrencyLimit(most_in_flight, desk.metrics.in_flight)
        # Orders at an issuer outside may take their minute; the internal CA's pods must not wait behind them.
        self._slots_outside = ConcurrencyLimit(most_in_flight)
        # Of their own: a cluster that reports an outage must not keep it from ending.
        self._other_slots = ConcurrencyLimit(most_in_flight)

    async def Issue(self, request: authority_pb2.IssueRequest, context: _Context) -> authority_pb2.IssueResponse:
        started = time.perf_counter()
        record: dict[str, Any] = {"decision": "none"}  # as when the caller goes away
        try:
            with self._slots if request.issuer in ("", DEFAULT_ISSUER) else self._slots_outside:
                node = await self._desk.prove_node(bearer(context), record)
                with self._desk.limits.asking(node):
                    pod = await self._desk.prove_pod(Secret(request.pod_token), node, record)
                    answer = await self._issue(pod, request, record)
        except CertmountError as error:
            record.update(decision="refused", reason=error.reason.word, error=str(error))
            raise
        else:
            record["decision"] = "issued"
        finally:
            audit.info("certificate", duration_ms=milliseconds(started), **record)
        return _response(answer)

    async def WatchTrust(
        self,
        request: authority_pb2.WatchTrustRequest,  # noqa: ARG002  # the signature is gRPC's
        context: _Context,
    ) -> AsyncIterator[authority_pb2.TrustBundle]:
        node = await self._node(context)
        with self._desk.limits.watching(node):
            async with contextlib.aclosing(self._desk.trust.watch(node.node_name)) as bundles:
                async for bundle in bundles:
                    yield authority_pb2.TrustBundle(
                        sets=_sets(bundle.sets),
                        policy_revision=bundle.policy_revision,
                        shared_issuers=bundle.shared_issuers,
                        renew_now=bundle.renew_now,
                    )

    async def ConfirmTrust(
        self, request: authority_pb2.ConfirmTrustRequest, context: _Context
    ) -> authority_pb2.ConfirmTrustResponse:
        node = await self._node(context)
        self._desk.limits.count_report(node)
        if not 0 < len(request.set) <= _MAX_SET_NAME or not request.generation < _MAX_GENERATION:
            raise CertmountError(Reason.INVALID_REQUEST, Fault("set", "has no name, or a generation out of range"))
        await self._desk.confirmations.confirm(node.node_name, request.set, request.generation)
        return authority_pb2.ConfirmTrustResponse()

    async def Report(self, request: authority_pb2.ReportRequest, context: _Context) -> authority_pb2.ReportResponse:
        node = await self._node(context)
        self._desk.limits.count_report(node)
        with self._other_slots:
            pod = await self._desk.admission.prove_pod(Secret(request.pod_token), node)
        report = parse_report(request.condition, request.reason, request.message)
        self._desk.events.record(pod, warning=report.warning, reason=report.reason, message=report.message)
        return authority_pb2.ReportResponse()

    async def _node(self, context: _Context) -> PodIdentity:
        with self._other_slots:
            return await self._desk.admission.prove_node(bearer(context))

    async def _issue(
        self, pod: PodIdentity, request: authority_pb2.IssueRequest, record: dict[str, Any]
    ) -> IssuanceResult:
        """A refusal is also said on the pod, where its owner looks first; and what a pod waits for that has a stand-in."""
        try:
            answer = await self._desk.issue(pod, _wanted(request), record)
        except CertmountError as error:
            self._say(pod, error, str(error.args[0]))
            raise
        if answer.pending is not None:
            self._say(pod, answer.pending, f"{_STAND_IN} {answer.pending.args[0]}")
        return answer

    def _say(self, pod: PodIdentity, error: CertmountError, message: str) -> None:
        pending = error.reason is Reason.ISSUANCE_PENDING
        self._desk.events.record(pod, warning=not pending, reason=error.reason.word, message=message[:MAX_MESSAGE])


def bearer(context: _Context) -> Secret[str]:
    """The token of the call's ``authorization`` metadata (RFC 6750 section 2.1), empty where there is none or more than one."""
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    scheme, _, token = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
    return Secret(token.strip() if scheme.lower() == "bearer" else "")


def _wanted(request: authority_pb2.IssueRequest) -> IssuanceRequest:
    """Raises CertmountError InvalidRequest with all that no node driver of ours would send."""
    faults: list[Fault] = []
    duration = _duration(request, faults)
    usages = tuple(dict.fromkeys(_USAGES[usage] for usage in request.usages if usage in _USAGES))
    if any(usage not in _USAGES for usage in request.usages):
        faults.append(Fault("usages", "has one that this authority does not know"))
    issuer = request.issuer or DEFAULT_ISSUER
    federations = tuple(dict.fromkeys(request.federations))
    if len(request.federations) > _MOST_FEDERATIONS:
        faults.append(Fault("federations", f"has more than {_MOST_FEDERATIONS}"))
    if any(not 0 < len(name) <= _MAX_SET_NAME for name in (issuer, *federations)):
        faults.append(Fault("issuer, federations", f"has a name that is empty or longer than {_MAX_SET_NAME}"))
    if faults:
        raise CertmountError(Reason.INVALID_REQUEST, *faults)
    return IssuanceRequest(request.csr, duration, usages, issuer, federations)


def _duration(request: authority_pb2.IssueRequest, faults: list[Fault]) -> timedelta | None:
    if not request.HasField("duration"):
        return None
    try:
        duration = request.duration.ToTimedelta()
    except (ValueError, OverflowError):
        duration = timedelta(-1)
    if duration < timedelta():
        faults.append(Fault("duration", "is negative or far too long"))
    return duration


def _response(answer: IssuanceResult) -> authority_pb2.IssueResponse:
    issued = answer.issued
    response = authority_pb2.IssueResponse(
        chain=issued.chain, trust=_sets(answer.trust), interim=answer.pending is not None
    )
    if issued.renew_after is not None:
        response.renew_after.FromTimedelta(issued.renew_after)
    return response


def _sets(sets: Mapping[str, RootSet]) -> dict[str, authority_pb2.RootSet]:
    return {name: authority_pb2.RootSet(roots=roots.roots, generation=roots.generation) for name, roots in sets.items()}
