"""An HTTPS client for issuers: bounded time and size, no redirects, and TLS verified with given roots only."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from cryptography import x509

from csi_driver import __version__
from csi_driver.core.formats.pem import encode_certificates

_TIMEOUT = aiohttp.ClientTimeout(total=10, sock_connect=5)  # A signature takes milliseconds; with an HSM about a second
MAX_RESPONSE_BYTES = 4 * 1024 * 1024  # The longest legitimate responses are pages of a hundred step-ca provisioners
_MAX_CONNECTIONS = 20
# Verification results of OpenSSL (x509_vfy.h) that an administrator can act on.
_VERIFY_ERRORS = {
    9: ("is not valid yet", "compare the clocks"),
    10: ("has expired", "renew the server's certificate; step-ca does so when it restarts"),
    18: (
        "is not issued by the configured root",
        "compare root or root_sha256 with `step certificate fingerprint root_ca.crt`",
    ),
    62: ("is not for this host name", 'add the name to "dnsNames" in ca.json, or change url to a name that is listed'),
}
_SAME_AS = {19: 18, 20: 18, 21: 18, 64: 62}  # Other results with the same cause; 64 is an IP address mismatch


class HttpError(Exception):
    """No usable response. The text is for people; ``subject`` is what failed: reachable, TLS or response."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.subject = subject
        self.retryable = subject in ("reachable", "response")


@dataclass(frozen=True, slots=True)
class JsonResponse:
    """A response whose body was a JSON object."""

    status: int
    document: Mapping[str, Any]
    time: datetime | None  # The server's clock, to the second (RFC 9110 section 6.6.1); None if the response lacks it

    @property
    def message(self) -> str:
        """The server's error message; empty if there is none, or if it can't be shown or contains a token."""
        text = str(self.document.get("message", ""))[:300]
        return text if text.isprintable() and "eyJ" not in text else ""


class HttpClient:
    """A pool of connections to one server, for one event loop.

    ``roots`` verify the server. If they are None, the caller must verify the response. HttpError if TLS can't use them.
    """

    def __init__(self, url: str, roots: tuple[x509.Certificate, ...] | None) -> None:
        self._session = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(ssl=_tls_context(roots), limit=_MAX_CONNECTIONS),
            timeout=_TIMEOUT,
            # Ignore proxies and .netrc of the environment, because requests contain tokens.
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small compressed response could expand to gigabytes
            headers={"User-Agent": f"certmount/{__version__}", "Accept-Encoding": "identity"},
        )

    async def aclose(self) -> None:
        await self._session.close()

    async def request(self, method: str, path: str, document: Mapping[str, str] | None = None) -> JsonResponse:
        """Send the request once, without retries; raise HttpError."""
        try:
            async with self._session.request(method, path, json=document, allow_redirects=False) as response:
                document = _parse_json(await _read_body(response), response.status)
                return JsonResponse(response.status, document, _time(response.headers.get("Date")))
        except aiohttp.ClientConnectorCertificateError as error:
            raise HttpError("TLS", *_certificate_problem(error.certificate_error)) from None
        except aiohttp.ClientSSLError as error:
            text = getattr(error, "strerror", None) or type(error).__name__
            raise HttpError("TLS", f"the TLS handshake failed: {text}") from None
        except aiohttp.ClientConnectorDNSError:
            raise HttpError("reachable", "the host name cannot be resolved", "check url and the pod's DNS") from None
        except aiohttp.ClientConnectorError as error:
            text = os.strerror(error.os_error.errno) if error.os_error.errno else type(error.os_error).__name__
            raise HttpError("reachable", f"cannot connect: {text}") from None
        except TimeoutError:
            raise HttpError("reachable", f"no response within {_TIMEOUT.total:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise HttpError("response", f"the connection failed ({type(error).__name__})") from None


def _tls_context(roots: tuple[x509.Certificate, ...] | None) -> ssl.SSLContext:
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


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise HttpError("response", f"the response is longer than {MAX_RESPONSE_BYTES} bytes")
    return bytes(body)


def _parse_json(body: bytes, status: int) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        problem = f"the response is HTTP {status} without JSON"
        raise HttpError("response", problem, "check that url is the address of the issuer, not of a proxy")
    return document


def _time(date: str | None) -> datetime | None:
    try:
        time = parsedate_to_datetime(date or "")
    except ValueError:
        return None
    return time.replace(tzinfo=time.tzinfo or UTC)


def _certificate_problem(error: Exception) -> tuple[str, str]:
    code = int(getattr(error, "verify_code", 0))
    unknown = (f"is rejected: {getattr(error, 'verify_message', '')}", "")
    problem, hint = _VERIFY_ERRORS.get(_SAME_AS.get(code, code), unknown)
    return f"the server's certificate {problem}", hint
