"""HTTPS to one step-ca, which proves itself by a root that is known beforehand: never by the machine's own roots."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import aiohttp
from cryptography import x509

from csi_driver import __version__
from csi_driver.core.formats.pem import encode_certificates

_TIMEOUT = aiohttp.ClientTimeout(total=10, sock_connect=5)
"""A signature takes milliseconds, with an HSM or a webhook of the administrator's behind it a second."""
_MAX_CONNECTIONS = 20
_MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""The longest answers are pages of a hundred provisioners."""
# The verification results of OpenSSL (x509_vfy.h), as far as one can do something about each.
_CERTIFICATE_PROBLEMS = {
    9: ("is not valid yet", "compare the clocks"),
    10: ("has expired", "see to the CA's own certificate; restarting step-ca renews it"),
    18: (
        "does not lead to the configured root",
        "compare root or root_sha256 with `step certificate fingerprint root_ca.crt`",
    ),
    62: ("is not for this host name", 'add the name to "dnsNames" in ca.json, or use in url one that is there'),
}
_LIKE = {19: 18, 20: 18, 21: 18, 64: 62}
"""An IP address that does not fit is a host name that does not."""


class Unreachable(Exception):
    """There was no answer that counts. Its text is the problem, for people; ``subject`` what failed: reachable, TLS or answer."""

    def __init__(self, subject: str, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.subject = subject


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer that was JSON."""

    status: int
    document: Mapping[str, Any]
    time: datetime | None
    """Step-ca's clock, to the second (RFC 9110 section 6.6.1); None where it doesn't tell."""

    @property
    def message(self) -> str:
        """What step-ca says of a failure; nothing where it says nothing that can be shown, or quotes a token."""
        text = str(self.document.get("message", ""))[:300]
        return text if text.isprintable() and "eyJ" not in text else ""


class Client:
    """A pool of connections; of one event loop, and closed by ``async with`` or :meth:`close`.

    Raises:
        Unreachable: for roots that TLS can't be checked by.
    """

    def __init__(self, url: str, roots: tuple[x509.Certificate, ...]) -> None:
        self._session = _session(url, _pinned(roots))

    async def get(self, path: str) -> Answer:
        """Raises Unreachable."""
        return await _ask(self._session, "GET", path)

    async def post(self, path: str, document: Mapping[str, str]) -> Answer:
        """Raises Unreachable. It is sent once, whatever becomes of it."""
        return await _ask(self._session, "POST", path, document)

    async def close(self) -> None:
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def fetch_unverified(url: str, path: str) -> Answer:
    """An answer that anybody may have given; it must prove itself. Raises Unreachable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with _session(url, context) as session:
        return await _ask(session, "GET", path)


def _pinned(roots: tuple[x509.Certificate, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=encode_certificates(roots).decode("ascii"))
    except ssl.SSLError as error:
        raise Unreachable("root", f"it is none that TLS can be checked by here: {error.reason}") from None
    return context


def _session(url: str, context: ssl.SSLContext) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(ssl=context, limit=_MAX_CONNECTIONS),
        timeout=_TIMEOUT,
        # No proxy and no .netrc from the environment: tokens go to step-ca and to no one between.
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # or a few bytes could become gigabytes
        headers={"User-Agent": f"certmount/{__version__}", "Accept-Encoding": "identity"},
    )


async def _ask(
    session: aiohttp.ClientSession, method: str, path: str, document: Mapping[str, str] | None = None
) -> Answer:
    try:
        async with session.request(method, path, json=document, allow_redirects=False) as response:
            body = await _bounded(response)
            date = response.headers.get("Date")
            return Answer(response.status, _parsed(body, response.status), _time(date))
    except aiohttp.ClientConnectorCertificateError as error:
        raise Unreachable("TLS", *_certificate_problem(error.certificate_error)) from None
    except aiohttp.ClientSSLError as error:
        raise Unreachable(
            "TLS", f"no TLS connection: {getattr(error, 'strerror', None) or type(error).__name__}"
        ) from None
    except aiohttp.ClientConnectorDNSError:
        raise Unreachable(
            "reachable", "its host name is not known", "look at url, and at the DNS of this pod"
        ) from None
    except aiohttp.ClientConnectorError as error:
        reason = os.strerror(error.os_error.errno) if error.os_error.errno else type(error.os_error).__name__
        raise Unreachable("reachable", f"no connection: {reason}") from None
    except TimeoutError:
        raise Unreachable("reachable", f"no answer within {_TIMEOUT.total:.0f} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable("answer", f"the connection broke ({type(error).__name__})") from None


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            raise Unreachable("answer", f"it answers with more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _parsed(body: bytes, status: int) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        problem = f"it answers HTTP {status} without JSON"
        raise Unreachable("answer", problem, "is a step-ca behind url, and nothing in between?")
    return document


def _time(date: str | None) -> datetime | None:
    try:
        told = parsedate_to_datetime(date or "")
    except ValueError:
        return None
    return told.replace(tzinfo=told.tzinfo or UTC)


def _certificate_problem(error: Exception) -> tuple[str, str]:
    code = int(getattr(error, "verify_code", 0))
    problem, hint = _CERTIFICATE_PROBLEMS.get(
        _LIKE.get(code, code), (f"does not pass: {getattr(error, 'verify_message', '')}", "")
    )
    return f"its certificate {problem}", hint
