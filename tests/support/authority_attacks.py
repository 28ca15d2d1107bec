"""Attacks on a running authority over the network: ``python -m tests.support.authority_attacks NAME FILE``.

FILE (JSON) has the port, the root of the serving certificate, and the tokens that the attacker has. Each attack runs until the
process is killed, from the address 127.0.0.2.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from csi_driver._proto import authority_pb2, authority_pb2_grpc
from tests.support.hostile_csrs import HOSTILE
from tests.support.ports import free_port

ADDRESS = "127.0.0.2"
_LARGE = 120 * 1024
ISSUE = "/certmount.authority.v1.Authority/Issue"


class Attacker:
    """Connections and calls of one attacker."""

    def __init__(self, file: Path) -> None:
        arguments = json.loads(file.read_text())
        self.port, self.roots, self.name = arguments["port"], arguments["roots"].encode(), arguments["name"]
        self.node_token, self.pod_tokens = arguments["node_token"], arguments["pod_tokens"]
        self.pod_token = self.pod_tokens[0]
        self.csr = base64.b64decode(arguments["csr"])
        self._proxy_port = 0

    async def start_proxy(self) -> None:
        """Connect to the authority from another address, which gRPC cannot do."""

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                upstream, out = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(ADDRESS, 0))
                await asyncio.gather(forward(reader, out), forward(upstream, writer))

        self._proxy_port = free_port()
        await asyncio.start_server(serve, "127.0.0.1", self._proxy_port)

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        options = (("grpc.ssl_target_name_override", self.name), ("grpc.use_local_subchannel_pool", 1))
        credentials = grpc.ssl_channel_credentials(self.roots)
        async with grpc.aio.secure_channel(f"127.0.0.1:{self._proxy_port}", credentials, options=options) as channel:
            yield channel

    async def call(self, channel: grpc.aio.Channel, csr: bytes, node_token: str, pod_token: str) -> None:
        request = authority_pb2.IssueRequest(csr=csr, pod_token=pod_token)
        metadata = (("authorization", f"Bearer {node_token}"),)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await authority_pb2_grpc.AuthorityStub(channel).Issue(request, metadata=metadata, timeout=30)

    async def flood(self, connections: int, calls: int, call: Callable[[grpc.aio.Channel], Awaitable[object]]) -> None:
        async def repeat(channel: grpc.aio.Channel) -> None:
            while True:
                await call(channel)

        async with contextlib.AsyncExitStack() as channels:
            opened = [await channels.enter_async_context(self.channel()) for _ in range(connections)]
            await asyncio.gather(*(repeat(channel) for channel in opened for _ in range(calls)))

    async def hostile_csrs(self) -> None:
        csrs = [make() for make, _ in HOSTILE.values()]

        async def call(channel: grpc.aio.Channel) -> None:
            csrs.append(csrs.pop(0))
            await self.call(channel, csrs[0], self.node_token, self.pod_token)

        await self.flood(2, 50, call)

    async def legal_csrs(self) -> None:
        """Call as a compromised node with the tokens of one of its pods."""
        await self.flood(2, 50, lambda channel: self.call(channel, self.csr, self.node_token, self.pod_token))

    async def many_pods(self) -> None:
        """Call as a compromised node with the tokens of all its pods."""

        async def call(channel: grpc.aio.Channel) -> None:
            self.pod_tokens.append(self.pod_tokens.pop(0))
            await self.call(channel, self.csr, self.node_token, self.pod_tokens[0])

        await self.flood(2, 128, call)

    async def no_token(self) -> None:
        await self.flood(4, 50, lambda channel: self.call(channel, b"", "garbage", ""))

    async def own_token(self) -> None:
        """A pod can get a token with the node driver's audience, but of its own service account."""
        await self.flood(4, 50, lambda channel: self.call(channel, b"", self.pod_token, self.pod_token))

    async def large_metadata(self) -> None:
        await self.flood(2, 50, lambda channel: self.call(channel, b"", "x" * 16_000, ""))

    async def slow_calls(self) -> None:
        """Start calls, and never send their request."""

        async def call(channel: grpc.aio.Channel) -> None:
            started: Any = channel.stream_unary(ISSUE)(metadata=(("authorization", "Bearer x"),))
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await started.code()

        await self.flood(10, 100, call)

    async def streams(self) -> None:
        async def call(channel: grpc.aio.Channel) -> None:
            metadata = (("authorization", f"Bearer {self.node_token}"),)
            watch: Any = authority_pb2_grpc.AuthorityStub(channel).WatchTrust
            stream = watch(authority_pb2.WatchTrustRequest(), metadata=metadata)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stream.read()
            stream.cancel()

        await self.flood(4, 25, call)

    async def request_streams(self) -> None:
        """Send requests on all streams of a node without waiting for responses."""
        issue = authority_pb2.IssueRequest(csr=self.csr, pod_token=self.pod_token)
        metadata = (("authorization", f"Bearer {self.node_token}"),)

        async def call(channel: grpc.aio.Channel) -> None:
            stream: Any = authority_pb2_grpc.AuthorityStub(channel).IssueStream(metadata=metadata)

            async def send() -> None:
                for number in itertools.count(1):
                    await stream.write(authority_pb2.IssueStreamRequest(id=number, issue=issue))

            sending = asyncio.create_task(send())
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await stream.read() is not grpc.aio.EOF:
                    pass
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

        await self.flood(4, 2, call)

    async def unread_responses(self) -> None:
        """Send the largest requests on all streams of a node, and read no response."""
        issue = authority_pb2.IssueRequest(csr=b"x" * _LARGE, pod_token="x")
        metadata = (("authorization", f"Bearer {self.node_token}"),)

        async def call(channel: grpc.aio.Channel) -> None:
            stream: Any = authority_pb2_grpc.AuthorityStub(channel).IssueStream(metadata=metadata)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for number in itertools.count(1):
                    await stream.write(authority_pb2.IssueStreamRequest(id=number, issue=issue))
            await asyncio.sleep(0.1)

        await self.flood(4, 2, call)

    async def large_requests(self) -> None:
        """Send the largest requests without a valid token, so that the authority delays its answers."""
        await self.flood(12, 128, lambda channel: self.call(channel, b"x" * _LARGE, "garbage", ""))

    async def large_request_streams(self) -> None:
        """Send large requests on streams without a valid token."""
        issue = authority_pb2.IssueRequest(csr=b"x" * _LARGE)

        async def call(channel: grpc.aio.Channel) -> None:
            stream: Any = authority_pb2_grpc.AuthorityStub(channel).IssueStream(
                metadata=(("authorization", "Bearer x"),)
            )
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for number in itertools.count(1):
                    await stream.write(authority_pb2.IssueStreamRequest(id=number, issue=issue))

        await self.flood(20, 128, call)

    async def many_request_streams(self) -> None:
        """Open streams all the time, more than a node may have."""

        async def call(channel: grpc.aio.Channel) -> None:
            metadata = (("authorization", f"Bearer {self.node_token}"),)
            stream: Any = authority_pb2_grpc.AuthorityStub(channel).IssueStream(metadata=metadata)
            with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
                async with asyncio.timeout(1):
                    await stream.read()
            stream.cancel()

        await self.flood(4, 250, call)

    async def idle_connections(self) -> None:
        """Open connections without a TLS handshake, and open others as the authority closes them."""
        held: list[socket.socket] = []
        while True:
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(("127.0.0.1", self.port), source_address=(ADDRESS, 0), timeout=1))
            if len(held) >= 900:
                held.pop(0).close()
            await asyncio.sleep(0.001)

    async def handshakes(self) -> None:
        context = ssl.create_default_context(cadata=self.roots.decode())
        context.set_alpn_protocols(["h2"])

        async def repeat() -> None:
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection(
                        "127.0.0.1", self.port, local_addr=(ADDRESS, 0), ssl=context, server_hostname=self.name
                    )
                    writer.transport.abort()

        await asyncio.gather(*(repeat() for _ in range(50)))


_NAMES = """
hostile_csrs legal_csrs many_pods no_token own_token large_metadata slow_calls streams request_streams
many_request_streams unread_responses large_requests large_request_streams idle_connections handshakes
"""
ATTACKS = _NAMES.split()


async def main(attack: str, file: Path) -> None:
    attacker = Attacker(file)
    await attacker.start_proxy()
    await getattr(attacker, attack)()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
