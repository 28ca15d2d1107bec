"""The one place where an exception becomes a gRPC status, for the node driver and the authority alike."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.rpc.errors import abort

log = structlog.get_logger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True)
class Handled:
    """A call that ended: the method's bare name, how long it took, and why it failed (None: it did not)."""

    method: str
    seconds: float
    reason: Reason | None


def _describe_nothing(method: str, request: object) -> Mapping[str, str]:  # noqa: ARG001  # the signature is the interface
    return {}


class Interceptor(grpc.aio.ServerInterceptor):
    """Binds what a call is about to the log, turns failures into statuses, and reports each call to ``observe``.

    ``describe`` names the log fields of a request (pod, volume); it must not reveal secrets and not raise.
    """

    def __init__(
        self,
        observe: Callable[[Handled], None],
        describe: Callable[[str, object], Mapping[str, str]] = _describe_nothing,
    ) -> None:
        self._observe = observe
        self._describe = describe

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:
            stream: Any = handler.unary_stream  # typed for the synchronous server only

            async def unary_stream(request: object, context: Any) -> Any:
                async with self._call(method, request, context):
                    async for response in stream(request, context):
                        yield response

            return grpc.unary_stream_rpc_method_handler(unary_stream, **coders)
        unary: Any = handler.unary_unary

        async def unary_unary(request: object, context: Any) -> Any:
            async with self._call(method, request, context):
                return await unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary_unary, **coders)

    @asynccontextmanager
    async def _call(self, method: str, request: object, context: _Context) -> AsyncIterator[None]:
        started = time.perf_counter()
        reason: Reason | None = None
        with structlog.contextvars.bound_contextvars(method=method, **self._describe(method, request)):
            try:
                yield
            except CertmountError as error:
                reason = error.reason
                log.warning("call failed", reason=error.reason.word, error=str(error))
                await abort(context, error)
            except Exception as error:  # noqa: BLE001  # the boundary: whatever is left must become a status
                # A defect of ours. Its text may quote its input, so only its type and place are shown.
                reason = Reason.INTERNAL
                log.error("call failed by a defect", reason=reason.word, error=type(error).__name__, at=_place(error))  # noqa: TRY400  # a traceback quotes code with its input
                await abort(
                    context,
                    CertmountError(reason, f"a defect in certmount ({type(error).__name__}); its log says where"),
                )
            finally:
                self._observe(Handled(method, time.perf_counter() - started, reason))


def _place(error: BaseException) -> str:
    """Where the exception was raised, innermost last: ``file:line`` of each frame."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-8:])
