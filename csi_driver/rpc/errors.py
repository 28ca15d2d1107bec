"""Failures on the wire: a gRPC status, a message, and the reason in the trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from csi_driver.core.errors import REASONS, CertmountError, Reason

REASON_KEY = "certmount-reason"  # the key of the reason in the trailing metadata

_MAX_MESSAGE = 2000
"""Characters. HTTP/2 headers carry the message, and peers truncate or reject headers above a few kilobytes."""


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: CertmountError) -> NoReturn:
    """End a call with an error's status, message and reason."""
    text = str(error)
    message = text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."
    await context.abort(grpc.StatusCode[error.reason.kind.status], message, ((REASON_KEY, error.reason.word),))


def from_rpc(error: grpc.aio.AioRpcError) -> CertmountError:
    """Return the failure that the authority reported, or AuthorityUnavailable if it reported none."""
    metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    reason = REASONS.get(str(metadata.get(REASON_KEY, "")))
    details = error.details() or error.code().name
    if reason is None:
        return CertmountError(Reason.AUTHORITY_UNAVAILABLE, f"{error.code().name}: {details}")
    return CertmountError(reason, details.removeprefix(f"{reason}: "))
