"""A gRPC server interceptor that converts exceptions to statuses, for the node driver and the authority."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import structlog

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.rpc.errors import abort

log = structlog.get_logger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """A call that has ended."""

    method: str  # without the service
    seconds: float
    reason: Reason | None  # None after a success


class Interceptor(grpc.aio.ServerInterceptor):
    """Converts exceptions to statuses, and reports each call to ``observe``.

    ``describe`` returns log fields of a request, such as the pod and the volume, which every log event of the call then
    has. It must not raise or reveal secrets. The authority does not need it, because it has an audit log.
    """

    def __init__(
        self,
        observe: Callable[[CompletedCall], None],
        describe: Callable[[str, object], Mapping[str, str]] | None = None,
    ) -> None:
        self._observe = observe
        self._describe = describe
        self._wrapped: dict[str, _Handler] = {}

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is not None and path not in self._wrapped:
            # The services have few methods, so the cache is small.
            self._wrapped[path] = self._wrap(handler, path.rpartition("/")[2])
        return self._wrapped[path] if handler is not None else None

    def _wrap(self, handler: _Handler, method: str) -> _Handler:
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        # grpc declares both handler types for the synchronous server only.
        stream: Any = handler.unary_stream
        unary: Any = handler.unary_unary

        async def unary_stream(request: object, context: Any) -> Any:
            async with self._observed(method, request, context):
                async for response in stream(request, context):
                    yield response

        async def unary_unary(request: object, context: Any) -> Any:
            async with self._observed(method, request, context):
                return await unary(request, context)

        if stream is not None:
            return grpc.unary_stream_rpc_method_handler(unary_stream, **coders)
        return grpc.unary_unary_rpc_method_handler(unary_unary, **coders)

    @asynccontextmanager
    async def _observed(self, method: str, request: object, context: Any) -> AsyncIterator[None]:
        """Abort the call with a status if it raises, and report its duration and result."""
        reason: Reason | None = None
        started = time.perf_counter()
        with self._log_fields(method, request):
            try:
                yield
            except Exception as error:  # noqa: BLE001  # every exception must become a status
                failure = _certmount_error(method, error)
                reason = failure.reason
                await abort(context, failure)
            finally:
                self._observe(CompletedCall(method, time.perf_counter() - started, reason))

    def _log_fields(self, method: str, request: object) -> AbstractContextManager[None]:
        if self._describe is None:
            return nullcontext()
        return structlog.contextvars.bound_contextvars(method=method, **self._describe(method, request))


def _certmount_error(method: str, error: Exception) -> CertmountError:
    """Log the exception and return the error to send."""
    if isinstance(error, CertmountError):
        log.warning("call failed", method=method, reason=error.reason.word, error=str(error))
        return error
    # A bug. The text of the exception can quote its input, so log only its type and location.
    kind, reason = type(error).__name__, Reason.INTERNAL
    log.error(
        "call failed with an unexpected error", method=method, reason=reason.word, error=kind, at=_location(error)
    )
    return CertmountError(reason, f"a defect in certmount ({kind}); the log shows the location")


def _location(error: BaseException) -> str:
    """Return ``file:line`` of the innermost eight frames, innermost last."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-8:])
