"""Failures on the wire: a gRPC status by kind, the text for people, and the reason as trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from csi_driver.core.errors import REASONS, CertmountError, Reason

REASON_KEY = "certmount-reason"
"""Trailing metadata that holds the reason's word."""

_MAX_MESSAGE = 2000
"""Status messages travel in HTTP/2 headers, which peers cut or refuse above a few kilobytes."""


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: CertmountError) -> NoReturn:
    """Ends the call with the error's status, text and reason."""
    text = str(error)
    message = text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."
    await context.abort(grpc.StatusCode[error.reason.kind.status], message, ((REASON_KEY, error.reason.word),))


def from_rpc(error: grpc.aio.AioRpcError) -> CertmountError:
    """The failure that an authority reported, or AuthorityUnavailable where it could not be reached or does not speak our language."""
    metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    reason = REASONS.get(str(metadata.get(REASON_KEY, "")))
    details = error.details() or error.code().name
    if reason is None:
        return CertmountError(Reason.AUTHORITY_UNAVAILABLE, f"{error.code().name}: {details}")
    return CertmountError(reason, details.removeprefix(f"{reason}: "))
