"""HTTP-01: the self-test refuses what Let's Encrypt refuses (Boulder's va/http.go); the port for CAs survives clients that occupy it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import NoReturn, cast

import pytest

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme import http01, http01_self_test
from csi_driver.authority.issuers.acme.config import Http01
from csi_driver.authority.issuers.acme.http01 import HTTP01_PATH, LOOKUP_THREADS, ChallengeServer, Http01Solver
from csi_driver.authority.issuers.acme.http01_self_test import MAX_REDIRECTS, response_problem
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.state import ChallengeRecord
from csi_driver.core.errors import CertmountError
from tests.support.ports import free_port
from tests.support.stream_servers import stream_server
from tests.support.waiting import in_background, until

NAME = "shop.example.test"
PATH = "/.well-known/acme-challenge/token"
VALUE = "t" * 43 + "." + "k" * 43
Script = Callable[[str], bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]]


def _response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("ascii") + body


def _redirect(location: str, status: str = "302 Found") -> bytes:
    return _response(b"", f"Location: {location}", status=status)


@contextlib.asynccontextmanager
async def _server(script: Script, host: str = "127.0.0.1") -> AsyncIterator[Nameserver]:
    """``script`` returns the response to a request for a path, or a function that writes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode("ascii")
        assert f"host: {NAME}\r\n" in head.decode("ascii").lower()
        answer = script(path)
        if isinstance(answer, bytes):
            writer.write(answer)
        else:
            await answer(writer)

    async with stream_server(serve, host) as port:
        yield Nameserver((host,), port)


async def _problem(script: Script) -> str:
    async with _server(script) as address:
        return await response_problem(NAME, PATH, VALUE, address)


@pytest.mark.parametrize(
    "response",
    [
        _response(VALUE.encode()),
        _response(VALUE.encode() + b" \t\r\n\n"),
        _response(gzip.compress(VALUE.encode()), "Content-Encoding: gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"1\r\n%c\r\n" % byte for byte in VALUE.encode())
        + b"0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + VALUE.encode(),
        _response(VALUE.encode() + b" " * (127 - len(VALUE))),
    ],
    ids=["exact", "white space at the end", "gzip", "chunked", "HTTP/1.0", "127 bytes"],
)
async def test_response_that_the_ca_accepts_is_accepted(response: bytes) -> None:
    assert await _problem(lambda _: response) == ""


LEADING_SPACE = (
    "returned white space or a byte order mark before the key authorization; CAs ignore white space at the end only"
)
TOO_LONG = "returned 128 bytes or more; expected the key authorization, which has 87"
NOT_HTTP = "returned a response that is not HTTP, or exceeds 128 headers and 8190 bytes in each"
NOT_GZIP = "returned a body that is not gzip, as its Content-Encoding says"
OTHER_CODING = "returned a body with a Content-Encoding other than gzip, which the CA did not ask for"
GZIP = "Content-Encoding: gzip"


@pytest.mark.parametrize(
    "response, problem",
    [
        (_response(b" " + VALUE.encode()), LEADING_SPACE),
        (_response(b"\xef\xbb\xbf" + VALUE.encode()), LEADING_SPACE),
        (_response(VALUE.encode() + b" " * (128 - len(VALUE))), TOO_LONG),
        (_response(VALUE.encode() + b"\n" + b"x" * 1500), TOO_LONG),
        (_response(b"the site"), "returned other content"),
        (_response(b""), "returned other content"),
        (_response(VALUE.encode(), status="206 Partial Content"), "returned HTTP 206"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "returned HTTP 204"),
        (_response(b"", status="404 Not Found"), "returned HTTP 404"),
        (_redirect("/x", "303 See Other"), "returned HTTP 303; CAs do not follow this redirect"),
        (_redirect("/x", "300 Multiple Choices"), "returned HTTP 300; CAs do not follow this redirect"),
        (_response(b"", status="302 Found"), "redirects without a Location"),
        (_response(zlib.compress(VALUE.encode()), "Content-Encoding: deflate"), OTHER_CODING),
        (_response(VALUE.encode(), GZIP), NOT_GZIP),
        (_response(gzip.compress(VALUE.encode() + b" " * 10_000_000), GZIP), TOO_LONG),
        (b"SSH-2.0-OpenSSH\r\n\r\n", NOT_HTTP),
        (_response(VALUE.encode(), f"X: {'x' * 20_000}"), NOT_HTTP),
        (_response(VALUE.encode(), *["X: x"] * 10_000), NOT_HTTP),
        (_response(VALUE.encode() + b"x")[:-1], "returned an incomplete response"),
        (b"", "closed the connection without a response"),
    ],
)
async def test_response_that_the_ca_refuses_is_explained(response: bytes, problem: str) -> None:
    assert await _problem(lambda _: response) == problem


@pytest.mark.parametrize(
    "location, problem",
    [
        ("http://shop.example.test:8080/x", "CAs follow redirects to the ports 80 and 443 only"),
        ("https://shop.example.test:8443/x", "CAs follow redirects to the ports 80 and 443 only"),
        ("http://shop.example.test:0/x", "CAs follow redirects to the ports 80 and 443 only"),
        ("http://192.0.2.1/x", "CAs do not follow redirects to IP addresses"),
        ("https://192.0.2.1:443/x", "CAs do not follow redirects to IP addresses"),
        ("http://[2001:db8::1]/x", "CAs do not follow redirects to IP addresses"),
        ("http://[fe80::1%25eth0]/x", "CAs do not follow redirects to IP addresses"),
        ("http://[::ffff:127.0.0.1]/x", "CAs do not follow redirects to IP addresses"),
        ("http://2130706433/x", "CAs do not follow redirects to IP addresses"),
        ("http://0x7f.1/x", "CAs do not follow redirects to IP addresses"),
        ("http://user:password@127.0.0.1/x", "CAs do not follow redirects to IP addresses"),
        ("ftp://shop.example.test/x", "CAs follow only http and https"),
        ("file:///etc/passwd", "CAs follow only http and https"),
        ("http://www.example.test.well-known/acme-challenge/token", "a slash is missing after the host name in the server's configuration"),
        ("http:///x", "it has no host name"),
        ("http://a b/", ""), ("http://[", ""), ("http://shop.example.test:99999999/", ""),  # words of the URL parser
    ],
)  # fmt: skip
async def test_redirect_that_the_ca_refuses_is_explained(location: str, problem: str) -> None:
    found = await _problem(lambda _: _redirect(location))
    assert found.startswith("redirects to ")
    assert found.endswith(f"; {problem}" if problem else "")


async def test_redirect_to_a_long_path_is_refused_and_not_repeated_in_full() -> None:
    found = await _problem(lambda _: _redirect("/" + "x" * 2001))
    start = f"http://{NAME}/"
    assert found == f"redirects to {start}{'x' * (200 - len(start))}...; CAs follow paths of at most 2000 bytes"


def _chain(redirects: int) -> Callable[[str], bytes]:
    def script(path: str) -> bytes:
        number = int(path.rpartition("/")[2]) if path != PATH else 0
        return _response(VALUE.encode()) if number == redirects else _redirect(f"/{number + 1}")

    return script


async def test_ten_redirects_are_followed_and_eleven_are_not() -> None:
    assert await _problem(_chain(MAX_REDIRECTS)) == ""
    found = await _problem(_chain(MAX_REDIRECTS + 1))
    assert found == "redirects more than 10 times; CAs follow at most 10 redirects"


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("location", ["/x", "x", "//shop.example.test/x", "http://SHOP.example.test:80/x", "?x"])
async def test_all_forms_of_redirects_are_followed(location: str, status: str) -> None:
    found = await _problem(lambda path: _response(VALUE.encode()) if "x" in path else _redirect(location, status))
    assert found == ""


async def test_loop_is_explained() -> None:
    found = await _problem(lambda path: _redirect("/a" if path == "/b" else "/b"))
    assert found == f"redirects in a loop, back to http://{NAME}/b"
    assert await _problem(lambda _: _redirect(PATH)) == f"redirects in a loop, back to http://{NAME}{PATH}"


async def test_problem_behind_a_redirect_names_its_target() -> None:
    found = await _problem(lambda path: _response(b"", status="403 Forbidden") if path == "/x" else _redirect("/x"))
    assert found == f"redirects to http://{NAME}/x, which returned HTTP 403"
    found = await _problem(lambda _: _redirect("https://nosuch.invalid/x"))
    assert found == "redirects to https://nosuch.invalid/x, which has a host name that cannot be resolved"


async def test_slow_response_ends_after_the_total_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http01_self_test, "TOTAL_S", 0.5)

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: x\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with asyncio.timeout(10):
        assert await _problem(lambda _: drip) == "does not return a complete response within 0.5 s"


async def test_endless_body_does_not_fill_the_memory() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    tracemalloc.start()
    try:
        assert await _problem(lambda _: endless) == TOO_LONG
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


async def test_first_address_is_used_and_the_next_one_only_without_a_connection() -> None:
    """Boulder prefers IPv6, and tries IPv4 only if it can't connect."""
    for host, body, problem in (
        ("127.0.0.1", VALUE.encode(), ""),
        ("::1", b"the other site", "returned other content"),
    ):
        async with _server(lambda _, body=body: _response(body), host) as server:  # type: ignore[misc]  # a default
            both = Nameserver(("::1", "127.0.0.1"), server.port)
            assert await response_problem(NAME, PATH, VALUE, both) == problem


async def test_address_without_a_server_is_explained() -> None:
    found = await response_problem(NAME, PATH, VALUE, Nameserver(("127.0.0.1",), free_port()))
    assert found == "cannot be reached (Connection refused)"
    assert "has a host name that cannot be resolved" in await response_problem("nosuch.invalid", PATH, VALUE)


async def test_name_servers_that_do_not_respond_delay_only_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup blocks a thread, also after the self-test has stopped waiting for it."""
    respond, looked_up, running, most = threading.Event(), [], 0, 0

    def getaddrinfo(host: str, *_: object, **__: object) -> NoReturn:
        nonlocal running, most
        looked_up.append(host)
        if host.endswith(".slow.test"):
            running += 1
            most = max(most, running)
            respond.wait(30)
            running -= 1
        raise OSError(None, "no such host")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    solver = Http01Solver(Http01(patience=timedelta(0)))
    slow = [ChallengeRecord("http-01", f"{number}.slow.test", "token", VALUE) for number in range(100)]
    async with in_background(solver.publish(slow)):
        try:
            await until(lambda: looked_up, "a lookup")
            async with asyncio.timeout(5):
                with pytest.raises(CertmountError, match="has a host name that cannot be resolved"):
                    await solver.publish([ChallengeRecord("http-01", NAME, "token", VALUE)])
                assert await asyncio.to_thread(lambda: "other work of the authority") == "other work of the authority"
        finally:
            respond.set()
    assert 0 < most <= LOOKUP_THREADS


RESPONSE = "token.thumbprint"


class _OneToken:
    async def http01_response(self, token: str) -> str | None:
        return RESPONSE if token == "token" else None


@asynccontextmanager
async def _running(address: str) -> AsyncIterator[int]:
    server = ChallengeServer(address, lambda: (cast("Issuer", _OneToken()),))
    port = await server.start()
    try:
        yield port
    finally:
        await server.stop()


async def _challenge_problem(host: str, port: int) -> str:
    return await response_problem(NAME, f"{HTTP01_PATH}token", RESPONSE, Nameserver((host,), port))


@pytest.mark.parametrize(
    "listen, reachable",
    [
        ("[::]", ("127.0.0.1", "::1")),
        ("", ("127.0.0.1", "::1")),
        ("0.0.0.0", ("127.0.0.1",)),  # noqa: S104  # a test
        ("127.0.0.1", ("127.0.0.1",)),
        ("[::1]", ("::1",)),
        ("localhost", ("127.0.0.1",)),
    ],
)
async def test_every_address_family_is_served(listen: str, reachable: tuple[str, ...]) -> None:
    async with _running(f"{listen}:0") as port:
        for host in reachable:
            assert await _challenge_problem(host, port) == ""


async def test_port_in_use_is_an_error() -> None:
    async with _running("127.0.0.1:0") as port:
        with pytest.raises(OSError, match="in use"):
            await ChallengeServer(f"127.0.0.1:{port}", tuple).start()


async def test_idle_connections_do_not_keep_the_ca_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http01, "MAX_CONNECTIONS", 20)
    async with _running("127.0.0.1:0") as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        assert await _challenge_problem("127.0.0.1", port) == ""
        async with asyncio.timeout(5):
            assert await idle[0][0].read() == b""
        for _, writer in idle:
            writer.close()


async def test_slow_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http01, "_MAX_CONNECTION_S", 0.3)
    async with _running("127.0.0.1:0") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX")
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
