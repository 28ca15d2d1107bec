"""The authority's side of IssueStream: many requests on one stream, which it processes concurrently."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from csi_driver._proto import authority_pb2
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.rpc.errors import failure_text, own_time_s
from csi_driver.rpc.issuance_messages import MAX_STREAM_REQUESTS
from csi_driver.rpc.server import CallRecorder, CaughtError, CompletedCall

Issue: TypeAlias = "Callable[[authority_pb2.IssueRequest], Awaitable[authority_pb2.IssueResponse]]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

LONGEST_S = 600.0
"""Then the node opens another stream, possibly to another replica. The time varies by a tenth."""
_LONGEST_REQUEST_S = 120.0  # longer than a node waits
_DRAIN_S = 5.0  # until the node must have closed its side: shorter than the grace period of a replica that shuts down
_WRITE_S = 30.0  # for a response: a caller that reads none must not keep the stream, its requests and their responses
_METHOD = "Issue"  # what logs and metrics call each request, as without a stream


class IssueStreamServer:
    """Serves streams. :meth:`close` drains them: requests that have been sent are still processed, but no others are."""

    def __init__(self, recorder: CallRecorder) -> None:
        self._recorder = recorder
        self._closed = asyncio.Event()

    def close(self) -> None:
        self._closed.set()

    async def serve(self, context: _Context, issue: Issue) -> None:
        """Process the requests of a stream until its caller closes it.

        Raises CertmountError for an invalid message, after the requests before it have been processed.
        """
        invalid: CertmountError | None = None
        async with asyncio.TaskGroup() as tasks:
            stream = _Stream(context, issue, self._recorder, tasks)
            try:
                async with asyncio.timeout(None) as reading:
                    notice = tasks.create_task(self._announce_end(stream, reading))
                    try:
                        await stream.read()
                    finally:
                        notice.cancel()
            except TimeoutError:
                pass  # the caller has not closed its side after the notice
            except CertmountError as error:
                invalid = error
        if invalid is not None:
            raise invalid

    async def _announce_end(self, stream: _Stream, reading: asyncio.Timeout) -> None:
        longest_s = LONGEST_S * random.uniform(0.9, 1.1)  # noqa: S311  # spreads the new streams
        with contextlib.suppress(TimeoutError):
            # Not wait_for: in Python 3.11 it ignores a cancellation in the same step in which the event is set.
            async with asyncio.timeout(longest_s):
                await self._closed.wait()
        reading.reschedule(asyncio.get_running_loop().time() + _DRAIN_S)
        await stream.send(authority_pb2.IssueStreamResponse(draining=True))


class _Stream:
    """The requests of one stream. At most 256 are in progress: the caller must keep the others until there is a place."""

    def __init__(self, context: _Context, issue: Issue, recorder: CallRecorder, tasks: asyncio.TaskGroup) -> None:
        self._context: Any = context
        self._issue = issue
        self._recorder = recorder
        self._tasks = tasks
        self._places = asyncio.Semaphore(MAX_STREAM_REQUESTS)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._writing = asyncio.Lock()  # gRPC allows one write at a time
        self._call = asyncio.current_task()

    async def read(self) -> None:
        """Start each request that arrives, until the caller closes its side."""
        while (message := await self._receive()) is not grpc.aio.EOF:
            if message.cancel:
                if (task := self._running.get(message.id)) is not None:
                    task.cancel()
                continue
            if not message.id or message.id in self._running or not message.HasField("issue"):
                raise _invalid("has no ID that is new on the stream, or no request")
            # While no place is free, nothing is read, so HTTP/2 flow control stops the caller.
            await self._places.acquire()
            self._start(message)

    async def send(self, response: authority_pb2.IssueStreamResponse) -> None:
        response.time = own_time_s()
        async with self._writing:
            unread = asyncio.get_running_loop().call_later(_WRITE_S, self._reset)
            try:
                # If the caller has gone, gRPC cancels the stream too.
                with contextlib.suppress(grpc.aio.BaseError):
                    await self._context.write(response)
            finally:
                unread.cancel()

    def _reset(self) -> None:
        """End the stream without a status, which would also wait until the caller reads."""
        if self._call is not None:
            self._call.cancel()

    async def _receive(self) -> Any:
        try:
            return await self._context.read()
        except DecodeError:
            raise _invalid("is not a valid message") from None

    def _start(self, message: authority_pb2.IssueStreamRequest) -> None:
        number = message.id
        task = self._running[number] = self._tasks.create_task(self._process(message))
        timeout_s = min(message.timeout_ms / 1000 or _LONGEST_REQUEST_S, _LONGEST_REQUEST_S)
        timer = asyncio.get_running_loop().call_later(timeout_s, self._cancel, number, task)

        def ended(_task: asyncio.Task[None]) -> None:
            timer.cancel()
            if self._running.get(number) is task:
                del self._running[number]
            self._places.release()

        task.add_done_callback(ended)

    def _cancel(self, number: int, task: asyncio.Task[None]) -> None:
        if self._running.get(number) is task:  # not a later request with the same ID
            task.cancel()

    async def _process(self, message: authority_pb2.IssueStreamRequest) -> None:
        number, issuing = message.id, self._issue(message.issue)
        # A large request must not stay in memory while its answer is delayed, or while the caller does not read.
        del message
        response = authority_pb2.IssueStreamResponse(id=number)
        started, reason, cancelled = time.perf_counter(), None, False
        try:
            response.issued.CopyFrom(await issuing)
        except asyncio.CancelledError:
            cancelled = True
            raise
        except Exception as error:  # noqa: BLE001  # every exception must become a response
            failure = await self._recorder.fail(_METHOD, self._context.peer(), CaughtError.of(error))
            reason, response.failure.reason = failure.reason, failure.reason.word
            response.failure.message = failure_text(failure)
        finally:
            self._recorder.observe(CompletedCall(_METHOD, time.perf_counter() - started, reason, cancelled))
        self._running.pop(number, None)  # a response is not cancelled while it is written
        await self.send(response)


def _invalid(problem: str) -> CertmountError:
    return CertmountError(Reason.INVALID_REQUEST, Fault("request", problem))
