"""The one place where an exception becomes a gRPC status, for the node driver and the authority alike."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.rpc.errors import abort

log = structlog.get_logger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"


_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """A call that ended: the method's bare name, how long it took, and why it failed (None: it did not)."""

    method: str
    seconds: float
    reason: Reason | None


class Interceptor(grpc.aio.ServerInterceptor):
    """Turns failures into statuses, and reports each call to ``observe``.

    ``describe`` names the log fields of a request (pod, volume), which are then in each line that the call logs; it must not
    reveal secrets and not raise. Without it nothing is bound, which a service with its own audit log can do without.
    """

    def __init__(
        self,
        observe: Callable[[CompletedCall], None],
        describe: Callable[[str, object], Mapping[str, str]] | None = None,
    ) -> None:
        self._observe = observe
        self._describe = describe
        self._guarded: dict[str, _Handler] = {}

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        # There are as many as the services have methods.
        guarded = self._guarded.get(handler_call_details.method)
        if guarded is None:
            guarded = self._guard(handler, handler_call_details.method.rpartition("/")[2])
            self._guarded[handler_call_details.method] = guarded
        return guarded

    def _guard(self, handler: _Handler, method: str) -> _Handler:
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:
            stream: Any = handler.unary_stream  # typed for the synchronous server only

            async def unary_stream(request: object, context: Any) -> Any:
                reason: Reason | None = None
                started = time.perf_counter()
                with self._bound(method, request):
                    try:
                        async for response in stream(request, context):
                            yield response
                    except Exception as error:  # noqa: BLE001  # the boundary: whatever is left must become a status
                        failure = _told(method, error)
                        reason = failure.reason
                        await abort(context, failure)
                    finally:
                        self._observe(CompletedCall(method, time.perf_counter() - started, reason))

            return grpc.unary_stream_rpc_method_handler(unary_stream, **coders)
        unary: Any = handler.unary_unary

        async def unary_unary(request: object, context: Any) -> Any:
            reason: Reason | None = None
            started = time.perf_counter()
            with self._bound(method, request):
                try:
                    return await unary(request, context)
                except Exception as error:  # noqa: BLE001  # the boundary: whatever is left must become a status
                    failure = _told(method, error)
                    reason = failure.reason
                    await abort(context, failure)
                finally:
                    self._observe(CompletedCall(method, time.perf_counter() - started, reason))

        return grpc.unary_unary_rpc_method_handler(unary_unary, **coders)

    def _bound(self, method: str, request: object) -> AbstractContextManager[None]:
        if self._describe is None:
            return _NOTHING
        return structlog.contextvars.bound_contextvars(method=method, **self._describe(method, request))


def _told(method: str, error: Exception) -> CertmountError:
    """The failure as the caller is to see it; it is logged here."""
    if isinstance(error, CertmountError):
        log.warning("call failed", method=method, reason=error.reason.word, error=str(error))
        return error
    # A defect of ours. Its text may quote its input, so only its type and place are shown.
    kind, reason = type(error).__name__, Reason.INTERNAL
    log.error("call failed by a defect", method=method, reason=reason.word, error=kind, at=_place(error))
    return CertmountError(reason, f"a defect in certmount ({kind}); its log says where")


def _place(error: BaseException) -> str:
    """Where the exception was raised, innermost last: ``file:line`` of each frame."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-8:])
