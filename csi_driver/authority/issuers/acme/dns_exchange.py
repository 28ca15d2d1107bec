"""Sends one DNS message and parses the response. Bytes, records and time are limited before the parse.

64 KiB of compressed names take half a second to parse, so the parse runs in a thread, and only within the limits.
"""

from __future__ import annotations

import asyncio
import struct

import dns.exception
import dns.flags
import dns.message

TIMEOUT_S = 5.0
MAX_BYTES = 16 * 1024
MAX_RECORDS = 256
MAX_MALFORMED = 8
"""Datagrams that belong to the query but cannot be parsed. A server could otherwise occupy a processor until the timeout."""
_MAX_DATAGRAMS = 16  # Further datagrams are dropped, like those of a full socket buffer
_HEADER = struct.Struct("!HHHHHH")  # RFC 1035 section 4.1.1
_LENGTH = struct.Struct("!H")  # RFC 1035 section 4.2.2


class UnacceptableResponse(Exception):
    """A response that is too large, or does not belong to the query."""


EXCHANGE_ERRORS = (OSError, EOFError, dns.exception.DNSException, UnacceptableResponse)
"""What can go wrong. TimeoutError is an OSError."""


async def exchange(
    address: str, port: int, request: dns.message.Message, *, udp: bool = True, timeout_s: float = TIMEOUT_S
) -> dns.message.Message:
    """Return the response, by TCP if ``udp`` is false or the response by UDP is truncated (RFC 7766).

    Raises one of :data:`EXCHANGE_ERRORS`. ``timeout_s`` limits all of it.
    """
    async with asyncio.timeout(timeout_s):
        if udp:
            response = await _exchange_datagrams(address, port, request)
            if not response.flags & dns.flags.TC:
                return response
        return await _exchange_stream(address, port, request)


async def _exchange_datagrams(address: str, port: int, request: dns.message.Message) -> dns.message.Message:
    wire, loop = request.to_wire(), asyncio.get_running_loop()
    # The socket is connected, so the kernel drops datagrams from other addresses.
    transport, received = await loop.create_datagram_endpoint(_Datagrams, remote_addr=(address, port))
    try:
        transport.sendto(wire)
        malformed = 0
        while malformed < MAX_MALFORMED:
            datagram = await received.next()
            # Ignore what is forged or late: the right response may follow.
            if datagram[:2] != wire[:2] or not datagram.startswith(wire[_HEADER.size :], _HEADER.size):
                continue
            check_size(datagram)
            try:
                return await asyncio.to_thread(parse_response, datagram, request)
            except (dns.exception.DNSException, UnacceptableResponse):
                malformed += 1
        raise UnacceptableResponse(f"{MAX_MALFORMED} of its responses are not valid DNS messages")
    finally:
        transport.close()


async def _exchange_stream(address: str, port: int, request: dns.message.Message) -> dns.message.Message:
    reader, writer = await asyncio.open_connection(address, port)
    try:
        wire = request.to_wire()
        writer.write(_LENGTH.pack(len(wire)) + wire)
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_BYTES:
            raise UnacceptableResponse(f"its response has {length} bytes; expected at most {MAX_BYTES}")
        response = await reader.readexactly(length)
        check_size(response)
        return await asyncio.to_thread(parse_response, response, request)
    finally:
        writer.transport.abort()


def check_size(wire: bytes) -> None:
    if len(wire) > MAX_BYTES:
        raise UnacceptableResponse(f"its response has {len(wire)} bytes; expected at most {MAX_BYTES}")
    if len(wire) < _HEADER.size:
        raise UnacceptableResponse("its response is not a DNS message")
    records = sum(_HEADER.unpack_from(wire)[2:])
    if records > MAX_RECORDS:
        raise UnacceptableResponse(f"its response has {records} records; expected at most {MAX_RECORDS}")


def parse_response(wire: bytes, request: dns.message.Message) -> dns.message.Message:
    response = dns.message.from_wire(wire, keyring=request.keyring, request_mac=request.mac)
    if not request.is_response(response):
        raise UnacceptableResponse("its response does not belong to the query")
    return response


class _Datagrams(asyncio.DatagramProtocol):
    """The received datagrams, at most 16 at a time."""

    def __init__(self) -> None:
        self._received: asyncio.Queue[bytes | Exception] = asyncio.Queue(_MAX_DATAGRAMS)

    async def next(self) -> bytes:
        received = await self._received.get()
        if isinstance(received, Exception):
            raise received
        return received

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002  # the name is asyncio's
        self._put(data)

    def error_received(self, exc: Exception) -> None:
        self._put(exc)

    def _put(self, received: bytes | Exception) -> None:
        if not self._received.full():
            self._received.put_nowait(received)
