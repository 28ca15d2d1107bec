"""Requests on a stream: concurrent, cancelled alone, bounded, and finished before the stream or the replica ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from csi_driver._proto import authority_pb2
from csi_driver.authority.authn.limits import MAX_ISSUE_STREAMS_PER_NODE
from csi_driver.authority.service import MAX_MESSAGE_BYTES
from csi_driver.rpc import issue_stream_server
from csi_driver.rpc.issuance_messages import MAX_STREAM_REQUESTS
from tests.integration.authority.world import NAME, POD, Caller, World, failure_of
from tests.support.tokens import DRIVER
from tests.support.waiting import until

METHOD = "/certmount.authority.v1.Authority/IssueStream"
Message = authority_pb2.IssueStreamRequest
IN_FLIGHT = "certmount_authority_issues_in_flight"


@pytest.fixture
def calls() -> str:
    return "stream"


class RawStream:
    """A stream that can send anything."""

    def __init__(self, world: World, channel: grpc.aio.Channel) -> None:
        self._world = world
        self.call: Any = channel.stream_stream(METHOD)(metadata=Caller(world, channel).bearer())

    def request(self, number: int, **fields: Any) -> Message:
        token = self._world.issuer.pod_token(POD, jti=str(number)).reveal()
        issue = authority_pb2.IssueRequest(csr=self._world.csr(NAME), pod_token=token)
        return Message(id=number, issue=issue, **fields)

    async def open(self) -> None:
        """Issue a certificate. Later requests need no review of the node's token for some seconds."""
        await self.write(self.request(100))
        assert (await self.read()).HasField("issued")

    async def write(self, *messages: Message | bytes) -> None:
        for message in messages:
            await self.call.write(message if isinstance(message, bytes) else message.SerializeToString())

    async def read(self) -> authority_pb2.IssueStreamResponse:
        return authority_pb2.IssueStreamResponse.FromString(await self.call.read())

    async def failure(self) -> str:
        """Return the text of the status, after the remaining responses."""

        async def responses() -> None:
            while await self.call.read() is not grpc.aio.EOF:
                pass

        return (await failure_of(responses())).text


@pytest.fixture
async def stream(world: World) -> AsyncIterator[RawStream]:
    async with world.channel() as channel:
        yield RawStream(world, channel)


async def test_requests_are_processed_concurrently(world: World, stream: RawStream) -> None:
    await stream.open()
    world.reviewer.gate.clear()
    await stream.write(stream.request(2))
    await until(lambda: world.metric(IN_FLIGHT) == 1, "the first request")
    await stream.write(Message(id=3, issue=authority_pb2.IssueRequest(pod_token="x")))
    refused = await stream.read()
    assert (refused.id, refused.failure.reason) == (3, "TokenRejected")
    assert abs(refused.time - time.time()) < 10
    world.reviewer.gate.set()
    issued = await stream.read()
    assert (issued.id, len(issued.issued.chain)) == (2, 2)
    await stream.call.done_writing()
    assert await stream.call.read() is grpc.aio.EOF
    assert await stream.call.code() is grpc.StatusCode.OK
    assert world.metric("certmount_authority_calls_total", method="Issue", reason="TokenRejected") == 1
    await until(
        lambda: world.metric("certmount_authority_calls_total", method="IssueStream", reason="Ok") == 1, "its end"
    )


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_one_request_is_cancelled(how: str, world: World, stream: RawStream) -> None:
    await stream.open()
    world.reviewer.gate.clear()
    with capture_logs() as logs:
        await stream.write(stream.request(1, timeout_ms=50 if how == "timeout" else 0), stream.request(2))
        if how == "cancel":
            await until(lambda: world.metric(IN_FLIGHT) == 2, "both requests")
            await stream.write(Message(id=1, cancel=True), Message(id=7, cancel=True))
        await until(lambda: any(line["event"] == "certificate" for line in logs), "the cancelled one")
        world.reviewer.gate.set()
        assert (await stream.read()).id == 2
        await stream.call.done_writing()
        assert await stream.call.read() is grpc.aio.EOF
    assert [line["decision"] for line in logs if line["event"] == "certificate"] == ["none", "issued"]
    assert world.metric(IN_FLIGHT) == 0


def reads_requests() -> bool:
    """Return whether the authority, which runs in the same event loop, still reads a stream."""
    return any("_announce_end" in repr(task.get_coro()) for task in asyncio.all_tasks())


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda _: b"\xff\xff", "is not a valid message"),
        (lambda _: b"", "has no ID that is new on the stream, or no request"),
        (lambda stream: stream.request(0), "has no ID that is new on the stream, or no request"),
        (lambda stream: stream.request(1), "has no ID that is new on the stream, or no request"),
        (lambda _: Message(id=9), "has no ID that is new on the stream, or no request"),
    ],
)
async def test_invalid_message_ends_the_stream_after_the_requests_before_it(
    make: Any, problem: str, world: World, stream: RawStream
) -> None:
    await stream.open()
    world.reviewer.gate.clear()
    await stream.write(stream.request(1), make(stream))
    await until(lambda: world.metric(IN_FLIGHT) == 1, "the request")
    # If the first request ended before the second message arrived, its ID would be new.
    await until(lambda: not reads_requests(), "the invalid message")
    world.reviewer.gate.set()
    assert (await stream.read()).id == 1
    assert await stream.failure() == f"InvalidRequest: request: {problem}"


async def test_oversized_message_ends_only_its_stream(stream: RawStream, caller: Caller) -> None:
    await stream.write(b"x" * (MAX_MESSAGE_BYTES + 1))
    assert await stream.failure()
    await caller.issue()


async def test_flood_of_one_stream_is_stopped_by_flow_control(world: World, stream: RawStream) -> None:
    """256 requests are in progress. The caller cannot send the others, and other nodes are served."""
    await stream.open()
    world.reviewer.gate.clear()
    sent, token = 0, world.issuer.pod_token(POD).reveal()

    async def flood() -> None:
        nonlocal sent
        issue = authority_pb2.IssueRequest(csr=b"x" * 8000, pod_token=token)
        for number in range(1000, 11_000):
            await stream.write(Message(id=number, issue=issue))
            sent += 1

    flooding = asyncio.create_task(flood())
    await until(lambda: world.metric(IN_FLIGHT) >= MAX_STREAM_REQUESTS, "a full stream")
    before = -1
    while sent != before:  # until nothing moves any more
        before = sent
        await asyncio.sleep(0.3)
    assert world.metric(IN_FLIGHT) == MAX_STREAM_REQUESTS
    assert sent < 5000
    assert not flooding.done()
    flooding.cancel()
    stream.call.cancel()
    await until(lambda: world.metric(IN_FLIGHT) == 0, "the end of the requests")
    world.reviewer.gate.set()
    async with world.channel() as channel:
        await Caller(world, channel).issue()


async def test_streams_of_a_node_are_limited(world: World, caller: Caller) -> None:
    async def outcome(stream: RawStream) -> str:
        try:
            await stream.write(stream.request(1))
            return "issued" if (await stream.read()).HasField("issued") else "refused"
        except grpc.aio.AioRpcError as error:
            return error.details() or ""

    async with contextlib.AsyncExitStack() as channels:
        connections = [await channels.enter_async_context(world.channel()) for _ in range(10)]
        streams = [RawStream(world, connections[number % 10]) for number in range(1000)]
        outcomes = Counter(await asyncio.gather(*map(outcome, streams)))
        most = MAX_ISSUE_STREAMS_PER_NODE
        refused = f"ShareExceeded: node node-a: has {most} IssueStream streams, its share; end one of them"
        assert outcomes == {"issued": most, refused: 1000 - most}
        assert (await failure_of(caller.issue())).text == refused
        for stream in streams:
            stream.call.cancel()
        world.reviewer.node = (other := replace(DRIVER, node="node-b", node_uid="node-b-uid")).reviewed
        world.reviewer.pod = (pod := replace(POD, node="node-b", node_uid="node-b-uid")).reviewed
        await caller.issue(pod=world.issuer.pod_token(pod), node=world.issuer.node_token(other))
    await until(
        lambda: world.metric("certmount_authority_calls_total", method="IssueStream", reason="Ok") >= most, "ends"
    )
    world.reviewer.node, world.reviewer.pod = DRIVER.reviewed, POD.reviewed
    await caller.issue()


async def test_stream_drains(world: World, stream: RawStream) -> None:
    """The request in progress, and one that the caller sent before it received the notice, are still processed."""
    await stream.open()
    world.reviewer.gate.clear()
    await stream.write(stream.request(1))
    await until(lambda: world.metric(IN_FLIGHT) == 1, "the first request")
    assert world.server._streams is not None
    world.server._streams.close()
    assert (await stream.read()).draining
    await stream.write(stream.request(2))
    await until(lambda: world.metric(IN_FLIGHT) == 2, "both requests")
    world.reviewer.gate.set()
    assert {(await stream.read()).id, (await stream.read()).id} == {1, 2}
    await stream.call.done_writing()
    assert await stream.call.read() is grpc.aio.EOF


async def test_stream_that_is_lost_while_the_replica_stops_is_no_failure(idle_world: World) -> None:
    with capture_logs() as logs:
        async with idle_world.running(), idle_world.channel() as channel:
            stream = RawStream(idle_world, channel)
            await stream.open()
            idle_world.stop.set()
            stream.call.cancel()
    assert [line["event"] for line in logs if line["log_level"] in ("warning", "error")] == []


async def test_caller_that_ignores_the_notice_loses_its_stream(
    idle_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issue_stream_server, "LONGEST_S", 0.1)
    monkeypatch.setattr(issue_stream_server, "_DRAIN_S", 0.1)
    async with idle_world.running(), idle_world.channel() as channel:
        stream = RawStream(idle_world, channel)
        assert (await stream.read()).draining
        assert await stream.call.read() is grpc.aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_caller_that_reads_no_responses_loses_its_stream(
    idle_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the notice nor a status can be written."""
    monkeypatch.setattr(issue_stream_server, "LONGEST_S", 0.5)
    monkeypatch.setattr(issue_stream_server, "_DRAIN_S", 0.1)
    monkeypatch.setattr(issue_stream_server, "_WRITE_S", 1.0)
    async with idle_world.running(), idle_world.channel(window=0) as channel:
        stream = RawStream(idle_world, channel)
        # On a slow machine, the server stops reading before all requests are sent. Then this client waits forever.
        writing = asyncio.create_task(stream.write(*(stream.request(number) for number in range(1, 101))))
        issued = {"method": "Issue", "reason": "Ok"}
        await until(lambda: idle_world.metric("certmount_authority_calls_total", **issued), "a certificate")
        ended = {"method": "IssueStream", "reason": "Ok"}
        await until(lambda: idle_world.metric("certmount_authority_calls_total", **ended) == 1, "the end of the stream")
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
