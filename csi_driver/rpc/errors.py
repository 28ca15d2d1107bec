"""Failures on the wire: a gRPC status, a message, and the reason in the trailing metadata."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import grpc

from csi_driver.core.clocks import TOLERANCE_S, describe_skew
from csi_driver.core.errors import REASONS, CertmountError, FailureKind, Reason

REASON_KEY = "certmount-reason"  # the key of the reason in the trailing metadata
_TIME_KEY = "certmount-time"  # the key of the server's time in Unix seconds

_MAX_MESSAGE_BYTES = 4000
"""HTTP/2 headers carry the message, and peers truncate or reject headers above a few kilobytes."""


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: CertmountError, rewrite: Callable[[str], str] = str
) -> NoReturn:
    """End a call with an error's status, its reason, and its text after ``rewrite``."""
    metadata = ((REASON_KEY, error.reason.word), *time_metadata())
    await context.abort(grpc.StatusCode[error.reason.kind.status], failure_text(error, rewrite), metadata)


def failure_text(error: CertmountError, rewrite: Callable[[str], str] = str) -> str:
    """Return the text that a caller receives."""
    return _truncated(rewrite(str(error)))


def time_metadata() -> tuple[tuple[str, str], ...]:
    """Return the time of this component for the trailing metadata, so that the caller can compare the clocks."""
    return ((_TIME_KEY, f"{own_time_s():.3f}"),)


def own_time_s() -> float:
    """Return the time of this component in Unix seconds."""
    return time.time()


def clock_skew_s(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Return by how many seconds the own clock is ahead of the server's; None without its time."""
    for key, value in metadata or ():
        if key == _TIME_KEY and re.fullmatch(r"[0-9]{1,12}\.[0-9]{3}", str(value)):
            return time.time() - float(value)
    return None


def _truncated(text: str) -> str:
    """Return the text, truncated to the allowed size in percent-encoding (gRPC over HTTP/2, Status-Message)."""
    size = 0
    for index, character in enumerate(text):
        size += 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if size > _MAX_MESSAGE_BYTES:
            return text[:index] + "..."
    return text


def from_rpc(error: grpc.aio.AioRpcError, node: str = "this node") -> CertmountError:
    """Return the failure that the authority reported, or AuthorityUnavailable if it reported none.

    If it rejected a token and the clocks differ, the text contains the difference.
    """
    metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    word, skew_s = str(metadata.get(REASON_KEY, "")), clock_skew_s(error.trailing_metadata())
    return reported_failure(word, error.details() or "", skew_s, error.code().name, node)


def reported_failure(word: str, text: str, skew_s: float | None, code: str, node: str) -> CertmountError:
    """Return the failure with this reason and text, or AuthorityUnavailable for an unknown reason."""
    reason = REASONS.get(word)
    if reason is None:
        problem = f"the authority has not replied: {code}: {text or code}"
        return CertmountError(Reason.AUTHORITY_UNAVAILABLE, problem)
    skew = skew_s or 0.0
    rejected = reason.kind in (FailureKind.TOKEN_NEEDED, FailureKind.NOT_AUTHENTICATED)
    clocks = f"; {describe_skew(node, 'the authority', skew)}" if rejected and abs(skew) > TOLERANCE_S else ""
    return CertmountError(reason, (text or code).removeprefix(f"{reason}: ") + clocks)
