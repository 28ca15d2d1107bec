"""Signed requests to the CA (RFC 8555 section 6)."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from acme import jws, messages
from josepy.errors import Error as JoseError
from josepy.interfaces import JSONDeSerializable
from josepy.json_util import decode_b64jose
from josepy.jwa import ES256
from josepy.jwk import JWK
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.http_client import MAX_URL_LENGTH, UNKNOWN_ROOT, HttpClient, HttpError, HttpResponse

_SEND_TIMEOUT_S = 60.0  # With all attempts
_NONCE_ATTEMPTS = 10  # Of two calls each: enough even if a CA rejects every second nonce
_MAX_VALUES = 2000  # An order of 100 names has 300
_MAX_NONCE_LENGTH = 512
_MAX_TEXT = 400
_RESOURCES = ("newNonce", "newAccount", "newOrder")
PARSE_ERRORS = (JoseError, ValueError, TypeError, KeyError, AttributeError)
"""What the library raises for JSON with values of other types than it expects."""
_T = TypeVar("_T")


class AcmeProblem(Exception):
    """The CA returned an error (RFC 8555 section 6.7)."""

    def __init__(self, code: str, text: str, status: int = 0, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code  # Such as `rateLimited`; empty if the response is not a problem document
        self.text = text
        self.status = status  # The HTTP status
        self.retry_after_s = retry_after_s


class OrderUnusable(AcmeProblem):
    """The order at the CA can no longer lead to the requested certificate, so a new one is necessary."""

    def __init__(self, text: str) -> None:
        super().__init__("", text)


class AcmeHttpClient(HttpClient):
    """A pool of connections to a CA."""

    hints: ClassVar[Mapping[int, str]] = {**HttpClient.hints, UNKNOWN_ROOT: "a private CA needs acme.ca"}
    timeout_s: ClassVar[float] = 20.0


class AcmeClient:
    """Calls one CA. Each failure raises AcmeProblem or CertmountError IssuerUnavailable."""

    def __init__(self, http: HttpClient, directory_url: str, key: JWK, directory: messages.Directory | None) -> None:
        self.key = key
        self._http = http
        self._directory_url = directory_url
        self._directory = directory
        self._account_url: str | None = None
        self._nonce: bytes | None = None
        self.clock_offset_s: float | None = None
        """How far the CA's clock was ahead at its last response; None if the response lacks a date."""

    @property
    def directory(self) -> messages.Directory:
        if self._directory is None:
            raise AssertionError("fetch_directory() comes first")
        return self._directory

    async def fetch_directory(self) -> messages.Directory:
        self._directory = _parse_directory(await self.fetch(self._directory_url))
        return self._directory

    def use_account(self, url: str) -> None:
        self._account_url = url

    async def fetch(self, url: str) -> HttpResponse:
        return _checked(await self._exchange("GET", url))

    async def send(self, url: str, body: JSONDeSerializable | None = None) -> HttpResponse:
        """Send a signed POST, or POST-as-GET without a body (RFC 8555 section 6.3)."""
        payload = b"" if body is None else body.json_dumps().encode("ascii")
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                for attempt in range(1, _NONCE_ATTEMPTS + 1):
                    try:
                        return _checked(await self._post(url, payload))
                    except AcmeProblem as problem:
                        if problem.code != "badNonce" or attempt == _NONCE_ATTEMPTS:
                            raise
        except TimeoutError:
            raise issuer_unavailable(url, f"does not accept a request within {_SEND_TIMEOUT_S:.0f} s") from None
        raise AssertionError("the last attempt returns or raises")

    async def _post(self, url: str, payload: bytes) -> HttpResponse:
        if self._nonce is None:
            _checked(await self._exchange("HEAD", self.directory["newNonce"]))
        if self._nonce is None:
            raise AcmeProblem("", "the response to a request for a nonce contains no valid one")
        nonce, self._nonce = self._nonce, None
        signed = jws.JWS.sign(payload, self.key, ES256, nonce, url, self._account_url)
        headers = {"Content-Type": "application/jose+json"}
        return await self._exchange("POST", url, data=signed.json_dumps().encode("ascii"), headers=headers)

    async def _exchange(self, method: str, url: str, **content: Any) -> HttpResponse:
        check_url(url)
        try:
            response = await self._http.exchange(method, url, **content)
        except HttpError as error:
            raise issuer_unavailable(url, str(error)) from None
        self.clock_offset_s = None if response.time is None else response.time.timestamp() - time.time()
        self._nonce = _parse_nonce(response.headers) or self._nonce
        return response


@asynccontextmanager
async def open_client(
    directory_url: str, key: JWK, ca_file: str | None, directory: messages.Directory | None = None
) -> AsyncIterator[AcmeClient]:
    """Open a client for one order or diagnosis, which verifies the CA with the roots of the file, or those of public CAs."""
    try:
        # In a thread: parsing the roots of all public CAs takes 20 ms.
        context = await asyncio.to_thread(ssl.create_default_context, cafile=ca_file or DEFAULT_CA_BUNDLE_PATH)
    except OSError as error:
        raise issuer_unavailable(f"acme.ca: {ca_file}", f"cannot be used: {error.strerror}") from None
    async with aclosing(AcmeHttpClient(context)) as http:
        client = AcmeClient(http, directory_url, key, directory)
        if directory is None:
            await client.fetch_directory()
        yield client


def parse(kind: type[_T], response: HttpResponse) -> _T:
    """Return the ACME object of a response; ``kind`` is a message class of acme."""
    try:
        document = response.json(_MAX_VALUES)
        if isinstance(document, dict):
            return kind.from_json(document)  # type: ignore[attr-defined, no-any-return]  # as its base class
    except PARSE_ERRORS:
        raise _not_acme(response) from None
    raise _not_acme(response)


def check_url(url: object) -> str:
    """Return the URL of a resource of the CA, which must be https and not too long; raise AcmeProblem."""
    try:
        valid = isinstance(url, str) and len(url) <= MAX_URL_LENGTH and urlsplit(url).scheme == "https"
    except ValueError:
        valid = False
    if not valid or not isinstance(url, str):
        raise AcmeProblem(
            "", f"the CA's URL {str(url)[:100]!r} is not https, or longer than {MAX_URL_LENGTH} characters"
        )
    return url


def _checked(response: HttpResponse) -> HttpResponse:
    if response.status < 400:
        return response
    status, delay_s = response.status, response.retry_after_s
    if status == 409:  # RFC 9773 section 5: alreadyReplaced
        raise AcmeProblem("conflict", f"already exists: {response.headers.get('Location', '')[:_MAX_TEXT]}", status)
    try:
        error = messages.Error.from_json(response.json(_MAX_VALUES))
        texts = [error.detail or error.title or error.code or f"HTTP {status} without a reason"]
        for one in error.subproblems or ():
            name = f"{one.identifier.value}: " if one.identifier is not None else ""
            texts.append(f"{name}{one.detail or one.typ}")
        problem = AcmeProblem(error.code or "", "; ".join(texts)[:_MAX_TEXT], status, delay_s)
    except PARSE_ERRORS:
        raise _not_acme(response) from None
    raise problem


def _not_acme(response: HttpResponse) -> AcmeProblem:
    text = f"HTTP {response.status} with a response that is not ACME"
    return AcmeProblem("", text, response.status, response.retry_after_s)


def _parse_directory(response: HttpResponse) -> messages.Directory:
    directory = parse(messages.Directory, response)
    resources = directory.to_partial_json()
    for name in (*_RESOURCES, *(["renewalInfo"] if "renewalInfo" in resources else [])):
        check_url(resources.get(name))
    terms, profiles = directory.meta.terms_of_service, directory.meta.profiles
    if not isinstance(terms, str | None) or not isinstance(profiles, Mapping | None):
        raise _not_acme(response)
    return directory


def _parse_nonce(headers: Mapping[str, str]) -> bytes | None:
    text = headers.get("Replay-Nonce", "")
    try:
        return decode_b64jose(text) if len(text) <= _MAX_NONCE_LENGTH else None
    except JoseError:
        return None
