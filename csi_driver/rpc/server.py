"""The interceptor that converts exceptions to gRPC statuses, for the node driver and the authority."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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

_NO_CONTEXT: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """A call that ended: the method without its service, the duration, and the reason of a failure."""

    method: str
    seconds: float
    reason: Reason | None


class Interceptor(grpc.aio.ServerInterceptor):
    """Converts exceptions to statuses, and passes each completed call to ``observe``.

    ``describe`` returns log fields for a request, such as the pod and volume. It must not return secrets or raise.
    """

    def __init__(
        self,
        observe: Callable[[CompletedCall], None],
        describe: Callable[[str, object], Mapping[str, str]] | None = None,
    ) -> None:
        self._observe = observe
        self._describe = describe
        self._handlers: dict[str, _Handler] = {}

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if method not in self._handlers:
            self._handlers[method] = self._wrap(handler, method.rpartition("/")[2])
        return self._handlers[method]

    def _wrap(self, handler: _Handler, method: str) -> _Handler:
        call: Any = handler.unary_stream or handler.unary_unary  # typed for the synchronous server only

        async def unary_stream(request: object, context: Any) -> Any:
            async with self._handled(method, request, context):
                async for response in call(request, context):
                    yield response

        async def unary_unary(request: object, context: Any) -> Any:
            async with self._handled(method, request, context):
                return await call(request, context)

        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(unary_stream, **coders)
        return grpc.unary_unary_rpc_method_handler(unary_unary, **coders)

    @contextlib.asynccontextmanager
    async def _handled(self, method: str, request: object, context: Any) -> AsyncIterator[None]:
        """Bind the log fields, observe the call, and abort it if it raised.

        The call is observed before the caller receives the status, so metrics that the caller reads then include it.
        """
        failure: CertmountError | None = None
        start = time.perf_counter()
        with self._log_fields(method, request):
            try:
                yield
            except Exception as error:  # noqa: BLE001  # every exception must become a status
                failure = _logged_failure(method, error)
            finally:
                reason = failure.reason if failure else None
                self._observe(CompletedCall(method, time.perf_counter() - start, reason))
            if failure is not None:
                await abort(context, failure)

    def _log_fields(self, method: str, request: object) -> AbstractContextManager[None]:
        if self._describe is None:
            return _NO_CONTEXT
        return structlog.contextvars.bound_contextvars(method=method, **self._describe(method, request))


def _logged_failure(method: str, error: Exception) -> CertmountError:
    """Log an exception and return the failure for the caller."""
    if isinstance(error, CertmountError):
        log.warning("call failed", method=method, reason=error.reason.word, error=str(error))
        return error
    # A bug. The exception's text can quote the input, so log only its type and location.
    kind, reason = type(error).__name__, Reason.INTERNAL
    log.error("call failed with an internal error", method=method, reason=reason.word, error=kind, at=_location(error))
    return CertmountError(reason, f"an internal error ({kind}); the component's log has details")


def _location(error: BaseException) -> str:
    """Return ``file:line`` of the last frames, the innermost last."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-8:])
