"""An HTTPS client for all issuers: bounded time, size and headers, no redirects, and TLS verified with given roots only."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

import aiohttp
from cryptography import x509
from multidict import CIMultiDict, CIMultiDictProxy

from csi_driver import __version__
from csi_driver.core.bounded_json import MAX_VALUES, loads_bounded
from csi_driver.core.formats.pem import encode_certificates

MAX_RESPONSE_BYTES = 1024 * 1024
"""The longest legitimate responses are pages of step-ca provisioners."""
MAX_HEADERS, MAX_HEADER_BYTES = 64, 8190
MAX_URL_LENGTH = 2048
MAX_CONNECTIONS = 20
"""At the same time, to one server. All their responses together have at most 20 MiB."""
_CONNECT_TIMEOUT_S = 5.0
# The start of a JSON Web Token. Fingerprints in base64url, which step-ca quotes, can contain the same characters inside.
_TOKEN = re.compile(r"(?<![A-Za-z0-9_-])eyJ|eyJ[A-Za-z0-9_-]*\.")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Verification results of OpenSSL (x509_vfy.h) that an administrator can act on.
NOT_VALID_YET, EXPIRED, UNKNOWN_ROOT, OTHER_NAME = 9, 10, 18, 62
_VERIFY_ERRORS = {
    NOT_VALID_YET: "is not valid yet",
    EXPIRED: "has expired",
    UNKNOWN_ROOT: "is not issued by the configured root",
    OTHER_NAME: "is not for this host name",
}
_SAME_AS = {
    19: UNKNOWN_ROOT,
    20: UNKNOWN_ROOT,
    21: UNKNOWN_ROOT,
    64: OTHER_NAME,
}  # Other results with the same cause; 64 is an IP address mismatch


class HttpError(Exception):
    """No usable response. The text is for people; ``subject`` is what failed: reachable, TLS or response."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.subject = subject
        self.retryable = subject in ("reachable", "response")


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A complete response: at most ``MAX_RESPONSE_BYTES``, and no redirect. ``headers`` lacks values that are not UTF-8."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    def json(self, max_values: int = MAX_VALUES) -> Any:
        """Return the value of the body; raise ValueError, in words that follow a subject."""
        return loads_bounded(self.body, max_bytes=MAX_RESPONSE_BYTES, max_values=max_values)

    @property
    def time(self) -> datetime | None:
        """The server's clock, to the second (RFC 9110 section 6.6.1); None if the response lacks it."""
        return _parse_date(self.headers.get("Date", ""))

    @property
    def retry_after_s(self) -> float | None:
        """The seconds in ``Retry-After``, in either format of RFC 9110 section 10.2.3; None without the header."""
        text = self.headers.get("Retry-After", "").strip()
        if text.isascii() and text.isdigit():
            return float(text[:9])
        date = _parse_date(text)
        return None if date is None else max(date.timestamp() - time.time(), 0.0)


@dataclass(frozen=True, slots=True)
class JsonResponse:
    """A response whose body was a JSON object."""

    status: int
    document: Mapping[str, Any]
    time: datetime | None  # As :attr:`HttpResponse.time`

    @property
    def message(self) -> str:
        """The server's error message; empty if there is none, or if it can't be shown or may contain a token."""
        text = str(self.document.get("message", ""))[:300]
        return text if text.isprintable() and not _TOKEN.search(text) else ""


class HttpClient:
    """A pool of connections for one event loop."""

    hints: ClassVar[Mapping[int, str]] = {
        NOT_VALID_YET: "synchronize the clocks of the authority and the server",
        EXPIRED: "renew it, or synchronize the clocks of the authority and the server",
    }
    """What to do if TLS rejects the server's certificate, by the result of OpenSSL."""
    timeout_s: ClassVar[float] = 10.0
    """For the whole call: connecting, sending, and the last byte of the response. A signature takes at most about a second."""

    def __init__(self, context: ssl.SSLContext, base_url: str | None = None) -> None:
        connector = aiohttp.TCPConnector(ssl=context, limit=MAX_CONNECTIONS)
        timeout = aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        self._session = open_session(connector, timeout, base_url=base_url)

    async def aclose(self) -> None:
        await self._session.close()

    async def request(self, method: str, path: str, document: Mapping[str, str] | None = None) -> JsonResponse:
        """Send the request, and return the JSON object of the response; raise as :meth:`exchange`."""
        response = await self.exchange(method, path, json=document)
        try:
            found = response.json()
            problem = "" if isinstance(found, dict) else "is not a JSON object"
        except ValueError as error:
            found, problem = {}, str(error)
        if problem:
            problem = f"the response (HTTP {response.status}) {problem}"
            raise HttpError("response", problem, "check that url is the address of the issuer, not of a proxy")
        return JsonResponse(response.status, found, response.time)

    async def exchange(self, method: str, url: str, **content: Any) -> HttpResponse:
        """Send the request once, without retries; raise HttpError. ``content`` is passed to aiohttp."""
        try:
            async with self._session.request(method, url, allow_redirects=False, **content) as response:
                _check_headers(response)
                return HttpResponse(response.status, _text_headers(response), await _read_body(response))
        except aiohttp.ClientConnectorCertificateError as error:
            raise self._certificate_error(error.certificate_error) from None
        except aiohttp.ClientSSLError as error:
            text = getattr(error, "strerror", None) or type(error).__name__
            raise HttpError("TLS", f"the TLS handshake failed: {text}") from None
        except aiohttp.ClientConnectorDNSError:
            raise HttpError("reachable", "the host name cannot be resolved", "check url and the pod's DNS") from None
        except aiohttp.ClientConnectorError as error:
            raise HttpError("reachable", f"cannot connect: {connection_problem(error)}") from None
        except TimeoutError:
            raise HttpError("reachable", f"no complete response within {self.timeout_s:.0f} s") from None
        except aiohttp.InvalidURL:
            raise HttpError("response", "the URL is not valid") from None
        except aiohttp.ClientResponseError as error:
            raise HttpError("response", f"the response is not valid HTTP: {error.message[:100]}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise HttpError("response", f"the connection failed ({type(error).__name__})") from None

    def _certificate_error(self, error: Exception) -> HttpError:
        code = int(getattr(error, "verify_code", 0))
        code = _SAME_AS.get(code, code)
        problem = _VERIFY_ERRORS.get(code, f"is rejected: {getattr(error, 'verify_message', '')}")
        return HttpError("TLS", f"the server's certificate {problem}", self.hints.get(code, ""))


def open_session(
    connector: aiohttp.BaseConnector,
    timeout: aiohttp.ClientTimeout,
    *,
    encoding: str = "identity",
    max_headers: int = MAX_HEADERS,
    **settings: Any,
) -> aiohttp.ClientSession:
    """Open a pool of connections whose responses are bounded. ``settings`` are those of aiohttp."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        # Ignore proxies and .netrc of the environment, because requests contain tokens.
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # a small compressed response could expand to gigabytes
        headers={"User-Agent": f"certmount/{__version__}", "Accept": "*/*", "Accept-Encoding": encoding},
        max_headers=max_headers,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        **settings,
    )


def connection_problem(error: aiohttp.ClientConnectorError) -> str:
    """Return the system's words for why there is no connection."""
    number = error.os_error.errno
    return os.strerror(number) if number else type(error.os_error).__name__


def tls_context(roots: tuple[x509.Certificate, ...] | None) -> ssl.SSLContext:
    """Return a context that verifies servers with the roots; raise HttpError if TLS can't use them.

    If the roots are None, the caller must verify the response.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if roots is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        context.load_verify_locations(cadata=encode_certificates(roots).decode("ascii"))
    except ssl.SSLError as error:
        raise HttpError("root", f"OpenSSL cannot verify TLS certificates with it: {error.reason}") from None
    return context


def _check_headers(response: aiohttp.ClientResponse) -> None:
    if 300 <= response.status < 400:
        problem = f"the response is a redirect (HTTP {response.status}), which is not followed"
        raise HttpError("response", problem, "configure the address that it leads to")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HttpError("response", "the response is compressed, which was not requested")


def _text_headers(response: aiohttp.ClientResponse) -> CIMultiDictProxy[str]:
    """Return the headers whose values are UTF-8. aiohttp decodes other bytes to surrogates, which no text or JSON can contain."""
    texts = CIMultiDict((name, value) for name, value in response.headers.items() if not _SURROGATE.search(value))
    return CIMultiDictProxy(texts)


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise HttpError("response", f"the response is longer than {MAX_RESPONSE_BYTES} bytes")
    return bytes(body)


def _parse_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date.replace(tzinfo=date.tzinfo or UTC)
