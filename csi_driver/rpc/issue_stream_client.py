"""The node's side of IssueStream: all requests to a replica of the authority on one stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import grpc

from csi_driver._proto import authority_pb2
from csi_driver._proto.authority_pb2_grpc import AuthorityStub
from csi_driver.rpc.authority_channel import ISSUE_TIMEOUT_S, AuthorityChannel, Metadata
from csi_driver.rpc.errors import own_time_s, reported_failure
from csi_driver.rpc.issuance_messages import MAX_STREAM_REQUESTS

_IDLE_S = 30.0  # then the stream ends, because it takes memory in the authority
_WITHOUT_STREAM_S = 60.0  # how long a node calls Issue after an authority did not know IssueStream

STREAM_LOST = "the authority ended the stream"
"""The text of a failure without the authority's status. Another attempt finds out what the authority says."""
_WRITE_FAILED = "Internal error from Core"
"""grpc.aio's status of a call that ended while it wrote a message, in place of the authority's or UNAVAILABLE."""


class IssueStreamClient:
    """Sends issuance requests. It opens a stream for the first request, and a new one when the token or the roots change.

    An authority of an older version does not know the stream. Then each request is a call of Issue.
    """

    def __init__(self, channel: AuthorityChannel, caller: str) -> None:
        """``caller`` names the caller's machine in errors."""
        self._channel = channel
        self._caller = caller
        self._places = asyncio.Semaphore(MAX_STREAM_REQUESTS)
        self._current: IssueStream | None = None
        self._key: tuple[grpc.aio.Channel, Metadata] | None = None
        self._streams: set[IssueStream] = set()  # also those that end
        self._unary_until = 0.0

    async def issue(self, request: authority_pb2.IssueRequest) -> tuple[authority_pb2.IssueResponse, float | None]:
        """Return the response, and by how many seconds the own clock is ahead; raises as AuthorityChannel.call."""
        async with self._places:
            return await self._channel.retry(lambda channel, metadata: self._send(channel, metadata, request))

    async def close(self) -> None:
        for stream in list(self._streams):
            await stream.close()

    async def _send(
        self, channel: grpc.aio.Channel, metadata: Metadata, request: authority_pb2.IssueRequest
    ) -> tuple[authority_pb2.IssueResponse, float | None]:
        now = asyncio.get_running_loop().time()
        if now >= self._unary_until:
            try:
                response = await self._stream(channel, metadata).issue(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                self._unary_until = now + _WITHOUT_STREAM_S
            else:
                return self._result(response)
        return await self._channel.call_once(AuthorityStub(channel).Issue, request, metadata)

    def _stream(self, channel: grpc.aio.Channel, metadata: Metadata) -> IssueStream:
        stream, key = self._current, (channel, metadata)
        if stream is None or not stream.open or self._key != key:
            if stream is not None:
                stream.retire()
            call = AuthorityStub(channel).IssueStream(metadata=metadata)
            stream = self._current = IssueStream(call)
            self._key = key
            self._streams.add(stream)
            stream.ended.add_done_callback(lambda _: self._streams.discard(stream))
        return stream

    def _result(self, response: authority_pb2.IssueStreamResponse) -> tuple[authority_pb2.IssueResponse, float | None]:
        skew_s = own_time_s() - response.time
        if response.HasField("issued"):
            return response.issued, skew_s
        failure = response.failure
        raise reported_failure(failure.reason, failure.message, skew_s, "UNKNOWN", self._caller)


class IssueStream:
    """One stream. It ends when it is idle, or when the authority asks for it; requests in progress finish first."""

    def __init__(self, call: Any) -> None:
        self.open = True  # whether it takes further requests
        self._call = call
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[authority_pb2.IssueStreamResponse]] = {}
        self._outgoing: asyncio.Queue[authority_pb2.IssueStreamRequest | None] = asyncio.Queue()
        self._idle: asyncio.TimerHandle | None = None
        self._writer = asyncio.create_task(self._write())
        self.ended = asyncio.create_task(self._read())

    async def issue(self, request: authority_pb2.IssueRequest) -> authority_pb2.IssueStreamResponse:
        """Return the response; raises AioRpcError if there is none."""
        if self._idle is not None:
            self._idle.cancel()
        number, loop = next(self._ids), asyncio.get_running_loop()
        future: asyncio.Future[authority_pb2.IssueStreamResponse] = loop.create_future()
        self._pending[number] = future
        timeout_ms = round(ISSUE_TIMEOUT_S * 1000)
        self._outgoing.put_nowait(authority_pb2.IssueStreamRequest(id=number, issue=request, timeout_ms=timeout_ms))
        try:
            async with asyncio.timeout(ISSUE_TIMEOUT_S):
                return await future
        except TimeoutError:
            raise _no_reply(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
        except asyncio.CancelledError:
            self._outgoing.put_nowait(authority_pb2.IssueStreamRequest(id=number, cancel=True))
            raise
        finally:
            del self._pending[number]
            self._rest()

    def retire(self) -> None:
        """Take no further requests, and end after those in progress."""
        self.open = False
        self._rest()

    async def close(self) -> None:
        self.open = False
        self._call.cancel()
        await self.ended

    def _rest(self) -> None:
        if self._pending:
            return
        if not self.open:
            self._outgoing.put_nowait(None)
        else:
            self._idle = asyncio.get_running_loop().call_later(_IDLE_S, self.retire)

    async def _write(self) -> None:
        # If the call has ended, the reader reports it to the requests.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            while (message := await self._outgoing.get()) is not None:
                await self._call.write(message)
            await self._call.done_writing()

    async def _read(self) -> None:
        code, text, metadata = grpc.StatusCode.UNAVAILABLE, STREAM_LOST, grpc.aio.Metadata()
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if response.draining:
                    self.retire()
                elif (future := self._pending.get(response.id)) is not None and not future.done():
                    future.set_result(response)
        except grpc.aio.AioRpcError as error:
            if error.details() != _WRITE_FAILED:
                code, text, metadata = error.code(), error.details() or "", error.trailing_metadata()
        except asyncio.CancelledError:  # by close
            code, text = grpc.StatusCode.CANCELLED, "the stream is closed"
        finally:
            self.open = False
            self._writer.cancel()
            if self._idle is not None:
                self._idle.cancel()
            for future in self._pending.values():
                if not future.done():
                    # Each request gets a new exception, because a shared one would collect the tracebacks of all.
                    future.set_exception(_no_reply(code, text, metadata))


def _no_reply(code: grpc.StatusCode, text: str, metadata: grpc.aio.Metadata | None = None) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata or grpc.aio.Metadata(), text)
