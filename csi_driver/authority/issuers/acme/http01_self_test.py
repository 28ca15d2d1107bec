"""Fetches the response to an HTTP-01 challenge as Let's Encrypt does, so that a wrong route costs no failed validation.

The rules are those of Boulder (va/http.go) and of https://letsencrypt.org/docs/challenge-types/. What they allow only by
accident is refused: Boulder follows 11 redirects and documents 10.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.http_client import MAX_HEADER_BYTES, connection_problem, open_session

TOTAL_S = 10.0  # For all redirects and the last byte
MAX_REDIRECTS = 10
MAX_BODY_BYTES = 128  # Boulder refuses a body that fills its buffer of 128 bytes; a key authorization has 87
_MAX_RAW_BYTES = 1024  # Of a compressed body
_CONNECT_S = 4.0
_MAX_PATH = 2000
_MAX_HEADERS = 128
_MAX_SHOWN = 200
_PORTS = (80, 443)
_REDIRECTS = (301, 302, 307, 308)  # CA/Browser Forum Baseline Requirements, section 3.2.2.4.19
_GZIP = 16 + zlib.MAX_WBITS


class Refused(Exception):
    """The CA would not accept the response. The text follows the URL of the challenge."""


class _Unreachable(Exception):
    """No connection. Only then the CA tries another address."""


async def response_problem(
    name: str, path: str, expected: str, server: Nameserver | None = None, lookups: Executor | None = None
) -> str:
    """Return why the CA would not accept the response at the path of this host name, or an empty text.

    ``server`` is the address to connect to in place of the name's own. ``lookups`` runs the DNS lookups; without it, the
    threads of the event loop do.
    """
    try:
        async with asyncio.timeout(TOTAL_S):
            return await _try_addresses(name, path, expected, server, lookups)
    except (Refused, _Unreachable) as failure:
        return str(failure)
    except TimeoutError:
        return f"does not return a complete response within {TOTAL_S:g} s"


async def _try_addresses(
    name: str, path: str, expected: str, server: Nameserver | None, lookups: Executor | None
) -> str:
    """Try the first IPv6 address, then the first IPv4 address if there is no connection to the other one."""
    port = 80 if server is None else server.port
    addresses = await _lookup(name, lookups) if server is None else server.addresses
    for number, address in enumerate(addresses, 1):
        try:
            resolver = _Resolver(name, address, port, lookups)
            return await _fetch(URL.build(scheme="http", host=name, path=path), expected, resolver)
        except _Unreachable:
            if number == len(addresses):
                raise
    raise _Unreachable("has no address")


async def _fetch(url: URL, expected: str, resolver: AbstractResolver) -> str:
    # Any certificate is accepted, as the CA does: the content of the response proves itself.
    connector = aiohttp.TCPConnector(resolver=resolver, ssl=False, force_close=True, happy_eyeballs_delay=None)
    timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_S)
    async with open_session(connector, timeout, encoding="gzip", max_headers=_MAX_HEADERS) as session:
        visited: list[URL] = []
        while len(visited) <= MAX_REDIRECTS:
            visited.append(url)
            where = "" if len(visited) == 1 else f"redirects to {_shown(url)}, which "
            try:
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return where + problem if (problem := await _content_problem(response, expected)) else ""
                    url = redirect_target(url, response.headers.get("Location", ""))
            except (aiohttp.ClientError, OSError, ValueError) as error:
                _explain(error, where)
            if url in visited:
                raise Refused(f"redirects in a loop, back to {_shown(url)}")
    raise Refused(f"redirects more than {MAX_REDIRECTS} times; CAs follow at most {MAX_REDIRECTS} redirects")


async def _content_problem(response: aiohttp.ClientResponse, expected: str) -> str:
    if response.status != 200:
        suffix = "; CAs do not follow this redirect" if 300 <= response.status < 400 else ""
        return f"returned HTTP {response.status}{suffix}"
    body = await _read_body(response)
    if len(body) >= MAX_BODY_BYTES:
        return f"returned {MAX_BODY_BYTES} bytes or more; expected the key authorization, which has {len(expected)}"
    # RFC 8555 section 8.3 ignores white space at the end only.
    content, value = body.rstrip(), expected.encode("ascii")
    if content == value:
        return ""
    if content.lstrip(b" \t\r\n\v\f\xef\xbb\xbf") == value:
        return "returned white space or a byte order mark before the key authorization; CAs ignore white space at the end only"
    return "returned other content"


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    try:
        raw = await response.content.readexactly(MAX_BODY_BYTES if encoding == "identity" else _MAX_RAW_BYTES)
    except asyncio.IncompleteReadError as complete:
        raw = complete.partial
    if encoding == "identity":
        return raw
    if encoding != "gzip":
        raise Refused("returned a body with a Content-Encoding other than gzip, which the CA did not ask for")
    try:
        return zlib.decompressobj(_GZIP).decompress(raw, MAX_BODY_BYTES)
    except zlib.error:
        raise Refused("returned a body that is not gzip, as its Content-Encoding says") from None


def redirect_target(url: URL, location: str) -> URL:
    """Return the absolute URL; raise Refused if the CA would not follow it."""
    if not location:
        raise Refused("redirects without a Location")
    try:
        given = URL(location)
        target = (given if given.scheme else url.join(given)).with_fragment(None)
        host, port = (target.host or "").lower(), target.explicit_port
    except ValueError:
        raise Refused(f"redirects to {_shown(location)}, which is not a URL") from None
    problem = ""
    if target.scheme not in ("http", "https"):
        problem = "CAs follow only http and https"
    elif port is not None and port not in _PORTS:
        problem = "CAs follow redirects to the ports 80 and 443 only"
    elif not host:
        problem = "it has no host name"
    elif host.endswith(".well-known"):
        problem = "a slash is missing after the host name in the server's configuration"
    elif _is_address(host):
        problem = "CAs do not follow redirects to IP addresses"
    elif len(target.raw_path) > _MAX_PATH:
        problem = f"CAs follow paths of at most {_MAX_PATH} bytes"
    if problem:
        raise Refused(f"redirects to {_shown(target)}; {problem}")
    return target


def _is_address(host: str) -> bool:
    """Tell whether a host is an IP address, also in forms that only some systems resolve, such as 0x7f.1."""
    last = host.rstrip(".").rpartition(".")[2]
    try:
        ipaddress.ip_address(host.partition("%")[0].strip("[]"))
    except ValueError:
        return last.isdigit() or last.startswith("0x")
    return True


def _shown(url: URL | str) -> str:
    text = str(url)
    text = text if text.isascii() and text.isprintable() else ascii(text)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _explain(error: Exception, where: str) -> NoReturn:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        raise Refused(f"{where}has a host name that cannot be resolved") from None
    if isinstance(error, aiohttp.ClientConnectorError):
        raise _Unreachable(f"{where}cannot be reached ({connection_problem(error)})") from None
    if isinstance(error, TimeoutError):
        raise _Unreachable(f"{where}does not accept a connection within {_CONNECT_S:g} s") from None
    if isinstance(error, aiohttp.ClientPayloadError):
        raise Refused(f"{where}returned an incomplete response") from None
    if isinstance(error, aiohttp.ClientResponseError):
        limits = f"{_MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes in each"
        raise Refused(f"{where}returned a response that is not HTTP, or exceeds {limits}") from None
    if isinstance(error, aiohttp.ServerDisconnectedError):
        raise Refused(f"{where}closed the connection without a response") from None
    raise Refused(f"{where}cannot be fetched ({type(error).__name__})") from None


async def _lookup(host: str, lookups: Executor | None) -> Sequence[str]:
    """Return the first IPv6 address, then the first IPv4 address, which are those that Let's Encrypt uses."""
    look_up = functools.partial(socket.getaddrinfo, host, 80, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    try:
        found = await asyncio.get_running_loop().run_in_executor(lookups, look_up)
    except OSError as error:
        raise _Unreachable(f"has a host name that cannot be resolved ({error.strerror})") from None
    by_family = {family: str(address[0]) for family, _, _, _, address in reversed(found)}
    return [by_family[family] for family in (socket.AF_INET6, socket.AF_INET) if family in by_family]


class _Resolver(AbstractResolver):
    """Resolves the name of the challenge to one address, whose port is used for port 80, and other names by DNS."""

    def __init__(self, name: str, address: str, port: int, lookups: Executor | None) -> None:
        self._name, self._address, self._port, self._lookups = name, address, port, lookups

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002  # aiohttp's
    ) -> list[ResolveResult]:
        own = host == self._name
        addresses = [self._address] if own else await self._others(host)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=self._port if own and port == 80 else port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def _others(self, host: str) -> Sequence[str]:
        try:
            return await _lookup(host, self._lookups)
        except _Unreachable as failure:
            raise OSError(None, str(failure)) from None

    async def close(self) -> None:
        pass
