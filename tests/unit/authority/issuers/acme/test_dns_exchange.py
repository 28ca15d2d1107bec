"""DNS servers that answer too much, too slowly, or with what was not asked; and servers on IPv4 and IPv6."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
import pytest

from csi_driver.authority.issuers.acme import dns_exchange
from csi_driver.authority.issuers.acme.dns_exchange import MAX_MALFORMED, MAX_RECORDS, parse_response
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.core.errors import CertmountError
from tests.support.longest_step import LongestStep
from tests.support.stream_servers import stream_server
from tests.support.waiting import in_background

NAME = dns.name.from_text("_acme-challenge.shop.example.test")
Datagrams = Callable[[bytes], list[bytes]]
Stream = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def _answer(query: bytes, text: str = "value", *, truncated: bool = False) -> bytes:
    response = dns.message.make_response(dns.message.from_wire(query))
    response.answer.append(dns.rrset.from_text(NAME, 0, "IN", "TXT", text))
    if truncated:
        response.flags |= dns.flags.TC
    return response.to_wire()


def _repeated(query: bytes, count: int) -> bytes:
    """Return a response whose records all have the longest name, in 2 bytes each."""
    record = struct.pack("!HHHIHH", 0xC00C, dns.rdatatype.TXT, 1, 0, 2, 0x0161)
    return query[:2] + struct.pack("!HHHHH", 0x8400, 1, count, 0, 0) + query[12:] + record * count


async def _no_stream(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


def _sending(message: Callable[[bytes], bytes]) -> Stream:
    async def stream(query: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack("!H", len(message(query))) + message(query))

    return stream


def _truncated(query: bytes) -> list[bytes]:
    return [_answer(query, truncated=True)]


@contextlib.asynccontextmanager
async def _server(datagrams: Datagrams, stream: Stream = _no_stream, host: str = "127.0.0.1") -> AsyncIterator[int]:
    class Protocol(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            for answer in datagrams(data):
                self.transport.sendto(answer, addr)  # type: ignore[attr-defined]  # a DatagramTransport

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        await stream(await reader.readexactly(length), writer)

    async with stream_server(serve, host) as port:
        udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(Protocol, local_addr=(host, port))
        try:
            yield port
        finally:
            udp.close()


async def _query(port: int, *addresses: str, name: dns.name.Name = NAME, timeout_s: float = 5) -> dns.message.Message:
    server = Nameserver(addresses or ("127.0.0.1",), port)
    return await server.query(name, dns.rdatatype.TXT, recursive=False, timeout_s=timeout_s)


async def _failure(port: int) -> str:
    with pytest.raises(CertmountError) as failure:
        await _query(port)
    return str(failure.value).removeprefix(f"IssuerUnavailable: DNS server 127.0.0.1:{port}: ")


async def _drip(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(struct.pack("!H", 1000))
    while True:
        writer.write(b"\0")
        await writer.drain()
        await asyncio.sleep(0.02)


def _texts(response: dns.message.Message) -> list[str]:
    return [record.to_text() for rrset in response.answer for record in rrset]


async def test_forged_and_malformed_datagrams_are_ignored() -> None:
    def datagrams(query: bytes) -> list[bytes]:
        good = _answer(query)
        other = bytes([query[0] ^ 1]) + good[1:]
        question = good.replace(b"shop", b"shoq")
        return [other, question, query, query[:2] + b"\xff" * 30, query[:2], b"", query[:2] + b"\0" * 10, good]

    async with _server(datagrams) as port:
        assert _texts(await _query(port)) == ['"value"']


@pytest.mark.parametrize(
    "datagrams, stream",
    [(lambda query: [bytes([query[0] ^ 1]) + query[1:]] * 2000, _no_stream), (_truncated, _drip)],
    ids=["flood of forged datagrams", "dripping response by TCP"],
)
async def test_endless_response_is_ended(datagrams: Datagrams, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_exchange, "_MAX_DATAGRAMS", 16)
    async with _server(datagrams, stream) as port, asyncio.timeout(10):
        with pytest.raises(CertmountError, match="does not respond in time"):
            await _query(port, timeout_s=0.5)


async def test_number_of_malformed_datagrams_that_are_parsed_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes milliseconds to parse, and a server could send them until the timeout of every query."""
    parsed = 0

    def parse(wire: bytes, request: dns.message.Message) -> dns.message.Message:
        nonlocal parsed
        parsed += 1
        return parse_response(wire, request)

    async def flood(send: Callable[[], None]) -> None:
        while True:
            send()
            await asyncio.sleep(0.001)

    monkeypatch.setattr(dns_exchange, "parse_response", parse)
    tasks = set()

    class Protocol(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            malformed = _repeated(data, 200)[:-1]
            tasks.add(asyncio.ensure_future(flood(lambda: self.transport.sendto(malformed, addr))))

    udp, _ = await asyncio.get_running_loop().create_datagram_endpoint(Protocol, local_addr=("127.0.0.1", 0))
    try:
        text = await _failure(udp.get_extra_info("sockname")[1])
    finally:
        for task in tasks:
            task.cancel()
        udp.close()
    assert f"{MAX_MALFORMED} of its responses are not valid DNS messages" in text
    assert parsed == MAX_MALFORMED


async def test_truncated_response_is_fetched_by_tcp() -> None:
    async with _server(_truncated, _sending(lambda query: _answer(query, "all"))) as port:
        assert _texts(await _query(port)) == ['"all"']


async def test_too_long_response_is_not_parsed() -> None:
    async with _server(lambda query: [_repeated(query, MAX_RECORDS)]) as port:
        assert await _failure(port) == "cannot be queried (its response has 257 records; expected at most 256)"
    async with _server(lambda query: [query + b"\0" * 20_000]) as port:
        size = 20_000 + len(dns.message.make_query(NAME, "TXT").to_wire())
        assert await _failure(port) == f"cannot be queried (its response has {size} bytes; expected at most 16384)"


@pytest.mark.parametrize(
    "content, problem",
    [
        (struct.pack("!H", 65535), "its response has 65535 bytes; expected at most 16384"),
        (struct.pack("!H", 3) + b"abc", "its response is not a DNS message"),
        (struct.pack("!H", 100) + b"abc", " read on a total of 100 expected bytes"),
        (b"", "0 bytes read on a total of 2 expected bytes"),
    ],
    ids=["long", "short", "incomplete", "closed"],
)
async def test_unacceptable_response_by_tcp_is_explained(content: bytes, problem: str) -> None:
    async def stream(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    async with _server(_truncated, stream) as port:
        assert problem in await _failure(port)


async def test_response_by_tcp_to_another_query_is_refused() -> None:
    async with _server(_truncated, _sending(lambda query: _answer(bytes([query[0] ^ 1]) + query[1:]))) as port:
        assert await _failure(port) == "cannot be queried (its response does not belong to the query)"


async def test_longest_acceptable_response_does_not_stop_the_event_loop() -> None:
    """Its 256 names take 30 ms to parse, in a thread."""
    longest = LongestStep()
    async with _server(lambda query: [_repeated(query, MAX_RECORDS - 1)]) as port, in_background(longest.run()):
        assert (await _query(port, name=dns.name.from_text("a." * 126))).answer
    assert longest.seconds < 0.015


@pytest.mark.parametrize(
    "text, addresses, port",
    [
        ("127.0.0.1", ("127.0.0.1",), 53),
        ("127.0.0.1:5353", ("127.0.0.1",), 5353),
        ("[::1]:5353", ("::1",), 5353),
        ("[::1]", ("::1",), 53),
        ("::1", ("::1",), 53),
        ("[::ffff:127.0.0.1]:5353", ("::ffff:127.0.0.1",), 5353),
    ],
)
def test_addresses_of_both_families_are_parsed(text: str, addresses: tuple[str, ...], port: int) -> None:
    assert Nameserver.parse(text, "dns01.server") == Nameserver(addresses, port)


@pytest.mark.parametrize("text", ["", ":53", "127.0.0.1:0", "127.0.0.1:65536", "[::1", "[::1]x:53", "[:53", "a:b"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(CertmountError, match=r"dns01\.server: '.*' is not ADDRESS:PORT"):
        Nameserver.parse(text, "dns01.server")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_server_on_either_family_is_queried(host: str) -> None:
    """The other address of the server does not respond."""
    async with _server(lambda query: [_answer(query)], host=host) as port:
        assert _texts(await _query(port, host)) == ['"value"']
        assert _texts(await _query(port, *{"127.0.0.1", "::1"} - {host}, host)) == ['"value"']
        assert str(Nameserver(("127.0.0.1", "::1"), port)) == f"127.0.0.1:{port} or [::1]:{port}"
