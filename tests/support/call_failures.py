"""The status of a failed gRPC call."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass

import grpc

from csi_driver.rpc.errors import REASON_KEY


@dataclass(frozen=True)
class CallFailure:
    """The status, the reason and the text."""

    code: grpc.StatusCode
    reason: str
    text: str


async def failure_of(call: Awaitable[object]) -> CallFailure:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        metadata = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
        return CallFailure(error.code(), metadata.get(REASON_KEY, ""), error.details() or "")
    raise AssertionError("the call succeeded")
