"""Convert a CertmountError to a gRPC status (code, message, and the reason as trailing metadata) and back."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from csi_driver.core.errors import REASONS, CertmountError, Reason

REASON_KEY = "certmount-reason"
"""The key of the trailing metadata whose value is the reason's word."""
_MAX_MESSAGE = 2000
"""gRPC sends status messages in HTTP/2 headers, which peers truncate or reject above a few kilobytes."""


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: CertmountError) -> NoReturn:
    """End the call with the error's status, text and reason."""
    text = str(error)
    message = text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."
    await context.abort(grpc.StatusCode[error.reason.kind.status], message, ((REASON_KEY, error.reason.word),))


def from_rpc(error: grpc.aio.AioRpcError) -> CertmountError:
    """Return the error that the authority sent; AuthorityUnavailable if the server sent no certmount reason."""
    metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    reason = REASONS.get(str(metadata.get(REASON_KEY, "")))
    details = error.details() or error.code().name
    if reason is None:
        return CertmountError(Reason.AUTHORITY_UNAVAILABLE, f"{error.code().name}: {details}")
    return CertmountError(reason, details.removeprefix(f"{reason}: "))
