"""The interceptor that converts exceptions to gRPC statuses, for the node driver and the authority."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.rpc.errors import abort, time_metadata

log = structlog.get_logger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"

_MAX_ERROR = 4096  # characters in the log: the text can quote all names of a request
_RECEIVE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """A call that ended: the method without its service, the duration, and the reason of a failure.

    ``cancelled`` is True if the caller did not wait for the response. Streams end in this way, so it is False for them.
    """

    method: str
    seconds: float
    reason: Reason | None
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class CaughtError:
    """What remains of an exception: the failure for the caller, and the type and location of a bug.

    The frames of the exception contain the request. Thousands of large ones would use up the memory while their answers
    are delayed.
    """

    failure: CertmountError
    bug: str = ""
    at: str = ""

    @classmethod
    def of(cls, error: Exception) -> CaughtError:
        if not isinstance(error, CertmountError):
            kind = type(error).__name__
            text = f"an internal error ({kind}); the component's log has details"
            return cls(CertmountError(Reason.INTERNAL, text), kind, _location(error))
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return cls(error)


@dataclass(slots=True)
class _HandledCall:
    """A call in progress: its log fields, and its failure when it has failed. Its block catches exceptions."""

    log_fields: ExitStack
    caught: CaughtError | None = None
    failure: CertmountError | None = None  # when it has been logged

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.caught = CaughtError.of(error)
        return True


class CallerLimits(Protocol):
    """Limits for the callers of a network port, of whom only the address (a gRPC peer) is known."""

    def receiving(self, peer: str, /) -> AbstractContextManager[None]:
        """Count a call until its request has arrived; raises CertmountError."""

    async def answer_failure(self, peer: str, /) -> bool:
        """Delay the answer if too many calls of the caller fail. Return False if the failure must not be logged either."""


@dataclass(frozen=True, slots=True)
class CallRecorder:
    """Observes the calls that end, and logs their failures. Without ``callers``, all callers are trusted."""

    observe: Callable[[CompletedCall], None]
    callers: CallerLimits | None = None

    async def fail(self, method: str, peer: str, caught: CaughtError) -> CertmountError:
        """Log an exception, if the caller may cause a line, and return the failure that the caller receives."""
        if self.callers is None or await self.callers.answer_failure(peer):
            _log_failure(method, caught)
        return caught.failure


class Interceptor(grpc.aio.ServerInterceptor):
    """Converts exceptions to statuses, and passes each completed call to ``recorder``.

    ``describe`` returns log fields for a request, such as the pod and volume. It must not return secrets or raise.
    ``rewrite`` changes the text of each status. At most ``max_receiving`` requests of each method are received at a
    time; the others stay with their callers. ``label`` returns what logs and metrics call a method. ``authenticate``
    (label, context) raises the failure of a call whose request must not be received.

    A method with a stream of requests authenticates its caller and reads the requests itself, from the context.
    """

    def __init__(
        self,
        recorder: CallRecorder,
        describe: Callable[[str, object], Mapping[str, str]] | None = None,
        rewrite: Callable[[str], str] = str,
        max_receiving: int | None = None,
        label: Callable[[str], str] = lambda method: method.rpartition("/")[2],
        authenticate: Callable[[str, Any], Awaitable[None]] | None = None,
    ) -> None:
        self._recorder = recorder
        self._describe = describe
        self._rewrite = rewrite
        self._label = label
        self._authenticate = authenticate
        self._places: defaultdict[str, AbstractAsyncContextManager[None]] = defaultdict(
            nullcontext if max_receiving is None else functools.partial(asyncio.Semaphore, max_receiving)
        )
        self._handlers: dict[str, _Handler] = {}

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if method not in self._handlers:
            self._handlers[method] = self._wrap(handler, self._label(method))
        return self._handlers[method]

    def _wrap(self, handler: _Handler, method: str) -> _Handler:
        # typed for the synchronous server only
        call: Any = handler.stream_stream or handler.unary_stream or handler.unary_unary

        # A call with a stream of requests starts before its request has arrived, so _receive can limit the time until then.
        async def stream_stream(_requests: object, context: Any) -> Any:
            async with self._handled(method, context) as handled:
                with handled:
                    async for response in call(await self._receive(method, context, handled.log_fields), context):
                        yield response
            await self._end(handled, context)

        async def stream_unary(_requests: object, context: Any) -> Any:
            response = None
            async with self._handled(method, context, has_response=True) as handled:
                with handled:
                    response = await call(await self._receive(method, context, handled.log_fields), context)
            await self._end(handled, context)
            return response

        async def many_requests(requests: object, context: Any) -> None:
            async with self._handled(method, context) as handled:
                with handled:
                    await call(requests, context)
            await self._end(handled, context)

        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(many_requests, **coders)
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(stream_stream, **coders)
        return grpc.stream_unary_rpc_method_handler(stream_unary, **coders)

    async def _receive(self, method: str, context: Any, log_fields: ExitStack) -> object:
        """Return the only request of a call, and bind its log fields.

        Raises CertmountError: InvalidRequest if there is none, RequestTimeout, or the failure of ``authenticate``.
        """
        if self._authenticate is not None:
            await self._authenticate(method, context)
        try:
            callers = self._recorder.callers
            with callers.receiving(context.peer()) if callers else nullcontext():
                async with self._places[method], asyncio.timeout(_RECEIVE_TIMEOUT_S):
                    request = await context.read()
        except TimeoutError:
            raise not_arrived() from None
        except DecodeError:
            raise CertmountError(Reason.INVALID_REQUEST, Fault("request", "is not a valid message")) from None
        if request is grpc.aio.EOF:
            raise CertmountError(Reason.INVALID_REQUEST, Fault("request", "is missing"))
        if self._describe is not None:
            fields = self._describe(method, request)
            log_fields.enter_context(structlog.contextvars.bound_contextvars(method=method, **fields))
        return request

    @contextlib.asynccontextmanager
    async def _handled(self, method: str, context: Any, *, has_response: bool = False) -> AsyncIterator[_HandledCall]:
        """Observe a call, and store its failure for :meth:`_end`; the log fields are bound until then.

        The call is observed before the caller receives the status, so metrics that the caller reads then include it.
        """
        start, cancelled = time.perf_counter(), False
        with ExitStack() as log_fields:
            handled = _HandledCall(log_fields)
            try:
                yield handled
                if handled.caught is not None:
                    handled.failure = await self._recorder.fail(method, context.peer(), handled.caught)
                else:
                    context.set_trailing_metadata(time_metadata())
            except asyncio.CancelledError:
                cancelled = has_response
                raise
            finally:
                reason = handled.failure.reason if handled.failure else None
                self._recorder.observe(CompletedCall(method, time.perf_counter() - start, reason, cancelled))

    async def _end(self, handled: _HandledCall, context: Any) -> None:
        """Abort a call that failed, outside of all blocks: gRPC keeps the exception of abort in a reference cycle."""
        if (failure := handled.failure) is not None:
            await abort(context, failure, self._rewrite)


def not_arrived() -> CertmountError:
    """Return a retryable failure: the server itself may have been frozen, and the kubelet unmounts a volume after a final one."""
    fault = Fault("request", f"has not arrived within {_RECEIVE_TIMEOUT_S:g} s", "the caller retries")
    return CertmountError(Reason.REQUEST_TIMEOUT, fault)


def _log_failure(method: str, caught: CaughtError) -> None:
    reason = caught.failure.reason.word
    if not caught.bug:
        log.warning("call failed", method=method, reason=reason, error=str(caught.failure)[:_MAX_ERROR])
    else:
        # The exception's text can quote the input, so log only its type and location.
        log.error("call failed with an internal error", method=method, reason=reason, error=caught.bug, at=caught.at)


def _location(error: BaseException) -> str:
    """Return ``file:line`` of the last frames, the innermost last."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-8:])
