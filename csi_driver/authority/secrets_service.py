"""The gRPC methods for the Secrets controller: convert between protobuf messages and values."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from csi_driver.authority.authn.limits import RequestLimits, caller_address
from csi_driver.authority.callers import bearer_token
from csi_driver.authority.issuance.pipeline import MAX_SET_NAME
from csi_driver.authority.issuance.secret_pipeline import SecretPipeline, SecretRequest
from csi_driver.authority.service import issue_response, trust_bundle
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.config.issuers import parse_secret_name
from csi_driver.core.errors import Fault
from csi_driver.core.identity import SecretIdentity
from csi_driver.core.names import EmailAddress
from csi_driver.core.policy.decision import SECRET_FIELDS
from csi_driver.core.policy.engine import RequestedCertificate
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.rpc.issuance_messages import duration_and_usages

_Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")
_NO_SECRET = SecretIdentity("", "")


@dataclass(eq=False)
class SecretsService(authority_pb2_grpc.SecretsServicer):
    """Implements the service ``Secrets`` of authority.proto."""

    pipeline: SecretPipeline
    limits: RequestLimits
    trust: TrustBundles

    async def Issue(
        self, request: authority_pb2.IssueForSecretRequest, context: _Context
    ) -> authority_pb2.IssueResponse:
        address, token = caller_address(context.peer()), bearer_token(context)
        return issue_response(await self.pipeline.issue(secret_request(request, address, token)))

    async def WatchTrust(
        self, _request: authority_pb2.WatchTrustRequest, context: _Context
    ) -> AsyncIterator[authority_pb2.TrustBundle]:
        with self.limits.authentication(caller_address(context.peer()), issue=False):
            controller = await self.pipeline.authenticator.authenticate_controller(bearer_token(context))
        self.limits.count_controller_call(controller)
        with self.limits.controller_stream(controller):
            async with contextlib.aclosing(self.trust.watch()) as bundles:
                async for bundle in bundles:
                    yield trust_bundle(bundle)


def secret_request(message: authority_pb2.IssueForSecretRequest, address: str, token: Secret[str]) -> SecretRequest:
    """Return the request with a fault for each value that is invalid."""
    duration, usages, faults = duration_and_usages(message)

    def convert(field: str, parse: Callable[[], _T], default: _T) -> _T:
        try:
            return parse()
        except ValueError as problem:
            faults.append(Fault(field, str(problem)))
            return default

    name = message.namespace, message.secret
    secret = convert("namespace, secret", lambda: SecretIdentity.parse(*name), _NO_SECRET)
    email = convert("email", lambda: EmailAddress.parse(message.email) if message.email else None, None)
    tsig_secret = message.tsig_secret
    convert("tsig_secret", lambda: parse_secret_name(tsig_secret) if tsig_secret else None, None)
    if len(message.issuer) > MAX_SET_NAME:
        faults.append(Fault("issuer", f"is longer than {MAX_SET_NAME} characters"))
    requested = RequestedCertificate(
        duration=duration,
        usages=usages,
        issuer=message.issuer or DEFAULT_ISSUER,
        spiffe=False,
        fields=SECRET_FIELDS,
        acme_email=email,
    )
    return SecretRequest(address, token, message.csr, secret, requested, tsig_secret, tuple(faults))
