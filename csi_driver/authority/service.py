"""The gRPC methods of the authority: convert between protobuf messages and values, and limit the calls."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits, caller_address
from csi_driver.authority.callers import bearer_token
from csi_driver.authority.events.recorder import EventRecorder
from csi_driver.authority.issuance.pipeline import MAX_SET_NAME, IssuancePipeline, IssuanceRequest, IssuanceResult
from csi_driver.authority.trust.acknowledgements import AcknowledgementStore
from csi_driver.authority.trust.bundles import TrustBundles, TrustSnapshot
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.secret import Secret
from csi_driver.core.spec import parse_key_type
from csi_driver.rpc.issuance_messages import issuance_options
from csi_driver.rpc.issue_stream_server import IssueStreamServer

MAX_MESSAGE_BYTES = 128 * 1024
"""Twice the size of a request with the largest CSR (64 KiB) and the largest token (16 KiB)."""
_MAX_GENERATION = 2**53  # generations are Unix seconds; JSON numbers are exact up to this value (RFC 8259 section 6)
_MAX_REPORT = 1024  # characters; the API server rejects a longer note
RECOVERED = "CertificateRecovered"
# Line breaks and other characters that control a terminal (Unicode categories Cc, Zl and Zp).
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# The event reason for each certificate condition.
CONDITIONS: Mapping[int, str] = {
    authority_pb2.CONDITION_RENEWAL_FAILING: "RenewalFailing",
    authority_pb2.CONDITION_OVERDUE: "RenewalOverdue",
    authority_pb2.CONDITION_EXPIRED: "CertificateExpired",
    authority_pb2.CONDITION_RECOVERED: RECOVERED,
    authority_pb2.CONDITION_RENEWAL_STOPPED: "RenewalStopped",
    authority_pb2.CONDITION_RELOAD_FAILED: "ReloadFailed",
}

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(eq=False)
class AuthorityService(authority_pb2_grpc.AuthorityServicer):
    """Implements authority.proto. :class:`csi_driver.rpc.server.Interceptor` converts exceptions to gRPC statuses."""

    pipeline: IssuancePipeline
    authenticator: Authenticator
    limits: RequestLimits
    trust: TrustBundles
    acknowledgements: AcknowledgementStore
    events: EventRecorder
    streams: IssueStreamServer

    async def Issue(self, request: authority_pb2.IssueRequest, context: _Context) -> authority_pb2.IssueResponse:
        caller = bearer_token(context), caller_address(context.peer())
        return issue_response(await self.pipeline.issue(_issuance_request(request, *caller)))

    async def IssueStream(self, _requests: object, context: _Context) -> None:  # type: ignore[override]  # it reads and writes
        token, address = bearer_token(context), caller_address(context.peer())

        async def issue(request: authority_pb2.IssueRequest) -> authority_pb2.IssueResponse:
            return issue_response(await self.pipeline.issue(_issuance_request(request, token, address)))

        with self.limits.authentication(address, issue=True):
            node = await self.authenticator.authenticate_node(token)
        self.limits.count_node_issue(node)
        with self.limits.issue_stream(node):
            await self.streams.serve(context, issue)

    async def Check(self, request: authority_pb2.CheckRequest, context: _Context) -> authority_pb2.CheckResponse:
        try:
            key_type = parse_key_type(request.key_type)
        except ValueError as problem:
            raise CertmountError(Reason.INVALID_REQUEST, Fault("key_type", str(problem))) from None
        caller = bearer_token(context), caller_address(context.peer())
        await self.pipeline.check(_issuance_request(request.request, *caller), key_type)
        return authority_pb2.CheckResponse()

    async def WatchTrust(
        self, _request: authority_pb2.WatchTrustRequest, context: _Context
    ) -> AsyncIterator[authority_pb2.TrustBundle]:
        node = await self._authenticate_node(context)
        with self.limits.stream(node):
            async with contextlib.aclosing(self.trust.watch(node.node_name)) as bundles:
                async for bundle in bundles:
                    yield trust_bundle(bundle)

    async def ConfirmTrust(
        self, request: authority_pb2.ConfirmTrustRequest, context: _Context
    ) -> authority_pb2.ConfirmTrustResponse:
        node = await self._authenticate_node(context)
        if not 0 < len(request.set) <= MAX_SET_NAME or not request.generation < _MAX_GENERATION:
            raise CertmountError(Reason.INVALID_REQUEST, Fault("set", "has no valid name, or an invalid generation"))
        await self.acknowledgements.acknowledge(node.node_name, request.set, request.generation)
        return authority_pb2.ConfirmTrustResponse()

    async def Report(self, request: authority_pb2.ReportRequest, context: _Context) -> authority_pb2.ReportResponse:
        node = await self._authenticate_node(context)
        with self._authentication(context):
            pod = await self.authenticator.authenticate_pod(Secret(request.pod_token), node)
        condition, message = _condition_and_message(request)
        self.events.record(pod, warning=condition != RECOVERED, reason=condition, message=message)
        return authority_pb2.ReportResponse()

    async def _authenticate_node(self, context: _Context) -> PodIdentity:
        with self._authentication(context):
            node = await self.authenticator.authenticate_node(bearer_token(context))
        self.limits.count_other_call(node)
        return node

    def _authentication(self, context: _Context) -> AbstractContextManager[None]:
        return self.limits.authentication(caller_address(context.peer()), issue=False)


def _condition_and_message(report: authority_pb2.ReportRequest) -> tuple[str, str]:
    """Return the reason and the message of the pod event; raises CertmountError InvalidRequest with all faults."""
    condition = CONDITIONS.get(report.condition, "")
    faults = {
        "condition": "is unknown" if not condition else "",
        "reason": "is unknown" if report.reason not in REASONS and (report.reason or condition != RECOVERED) else "",
        "message": f"exceeds {_MAX_REPORT} characters" if len(report.message) > _MAX_REPORT else "",
    }
    if any(faults.values()):
        raise CertmountError(Reason.INVALID_REQUEST, *(Fault(field, text) for field, text in faults.items() if text))
    text = f"{report.reason}: {report.message}" if report.reason else report.message
    return condition, _CONTROL.sub(" ", text)[:_MAX_REPORT]


def _issuance_request(request: authority_pb2.IssueRequest, token: Secret[str], address: str) -> IssuanceRequest:
    """Return the request of a node, which sent its own token from this address."""
    options, faults = issuance_options(request)
    return IssuanceRequest(address, token, Secret(request.pod_token), request.csr, options, tuple(faults))


def issue_response(result: IssuanceResult) -> authority_pb2.IssueResponse:
    issued, trust = result.issued, _root_sets(result.trust)
    response = authority_pb2.IssueResponse(chain=issued.chain, trust=trust, interim=result.pending is not None)
    if issued.renew_after is not None:
        response.renew_after.FromTimedelta(issued.renew_after)
    return response


def trust_bundle(snapshot: TrustSnapshot) -> authority_pb2.TrustBundle:
    return authority_pb2.TrustBundle(
        sets=_root_sets(snapshot.sets),
        policy_revision=snapshot.policy_revision,
        shared_issuers=snapshot.shared_issuers,
        renew_now=snapshot.renew_now,
        replace_keys=snapshot.replace_keys,
        environments=snapshot.environments,
    )


def _root_sets(sets: Mapping[str, RootSet]) -> dict[str, authority_pb2.RootSet]:
    return {name: _root_set(roots) for name, roots in sets.items()}


@lru_cache(maxsize=32)  # every response contains one
def _root_set(roots: RootSet) -> authority_pb2.RootSet:
    """Return the message, which the caller must not change."""
    return authority_pb2.RootSet(roots=roots.roots, generation=roots.generation)
