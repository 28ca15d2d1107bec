"""Signed requests to the CA (RFC 8555 section 6). Its methods block: call them in threads."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Any

import requests
import urllib3
from acme import errors, messages
from acme.client import ClientNetwork
from josepy.errors import Error as JoseError
from josepy.interfaces import JSONDeSerializable
from josepy.jwa import ES256
from josepy.jwk import JWK
from requests.adapters import HTTPAdapter

from csi_driver import __version__
from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.authority.issuers.http_client import MAX_RESPONSE_BYTES

_TIMEOUT_S = 20
_NONCE_ATTEMPTS = 10  # Of two calls each: enough even if a CA rejects every second nonce
_MAX_TEXT = 400


class AcmeProblem(Exception):
    """The CA returned an error (RFC 8555 section 6.7)."""

    def __init__(self, code: str, text: str, status: int = 0, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code  # Such as `rateLimited`; empty if the response is not a problem document
        self.text = text
        self.status = status  # The HTTP status
        self.retry_after_s = retry_after_s


class AcmeClient(ClientNetwork):
    """Calls one CA from one thread. Each failure raises one of two exceptions."""

    def __init__(
        self, directory_url: str, key: JWK | None, ca_file: str | None, directory: messages.Directory | None = None
    ) -> None:
        super().__init__(key, alg=ES256, user_agent=f"certmount/{__version__}", timeout=_TIMEOUT_S, verify_ssl=True)
        if ca_file is not None:
            self.verify_ssl = ca_file  # type: ignore[assignment]  # passed to requests, which also accepts a path
        self.session.headers["Accept-Encoding"] = "identity"  # a small compressed response could expand to gigabytes
        self.session.adapters.clear()
        self.session.mount("https://", _BoundedAdapter())
        self._directory_url = directory_url
        self._last: requests.Response | None = None
        self._directory = directory

    @property
    def directory(self) -> messages.Directory:
        if self._directory is None:
            self._directory = self.fetch_directory()
        return self._directory

    def fetch_directory(self) -> messages.Directory:
        try:
            return messages.Directory.from_json(self.fetch(self._directory_url).json())
        except (JoseError, ValueError, AttributeError):
            raise self._not_acme() from None

    def use_account(self, url: str) -> None:
        self.account = messages.RegistrationResource(uri=url, body=messages.Registration())

    def fetch(self, url: str) -> requests.Response:
        return self._call(url, self.get, url)

    def send(self, url: str, body: JSONDeSerializable | None = None) -> requests.Response:
        """Send a signed POST, or POST-as-GET without a body (RFC 8555 section 6.3); raise as :meth:`fetch`."""
        for attempt in range(1, _NONCE_ATTEMPTS + 1):
            try:
                return self._call(url, self.post, url, body, new_nonce_url=self.directory["newNonce"])
            except AcmeProblem as problem:
                if problem.code != "badNonce" or attempt == _NONCE_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    @property
    def clock_offset_s(self) -> float | None:
        """How far the CA's clock was ahead at its last response; None if the response lacks a date."""
        try:
            date = self._last.headers["Date"] if self._last is not None else ""
            return parsedate_to_datetime(date).timestamp() - time.time()
        except (KeyError, ValueError):
            return None

    def _send_request(self, method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:
        self._last = None
        self._last = super()._send_request(method, url, *args, allow_redirects=False, **kwargs)
        return self._last

    def _call(self, url: str, method: Any, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            response = method(*args, **kwargs)
        except errors.ConflictError as error:  # a subclass of errors.Error; RFC 9773 section 5: alreadyReplaced
            raise AcmeProblem("conflict", f"already exists: {error.location}", 409) from None
        except messages.Error as error:
            raise self._problem(error) from None
        except requests.exceptions.SSLError as error:
            raise issuer_unavailable(url, f"has an untrusted TLS certificate ({_root_cause(error)})") from None
        except requests.exceptions.Timeout:
            raise issuer_unavailable(url, f"does not respond within {_TIMEOUT_S} s") from None
        except requests.exceptions.RequestException as error:
            raise issuer_unavailable(url, f"cannot be reached ({_root_cause(error)})") from None
        except OSError as error:
            raise issuer_unavailable(url, f"cannot be called ({error})") from None
        except (errors.Error, JoseError, ValueError):
            raise self._not_acme() from None
        assert isinstance(response, requests.Response)  # noqa: S101  # as the library's methods return
        return response

    def _problem(self, error: messages.Error) -> AcmeProblem:
        texts = [error.detail or error.title or error.typ]
        for one in error.subproblems or ():
            name = f"{one.identifier.value}: " if one.identifier is not None else ""
            texts.append(f"{name}{one.detail or one.typ}")
        return AcmeProblem(error.code or "", "; ".join(texts)[:_MAX_TEXT], *self._status_and_delay())

    def _not_acme(self) -> AcmeProblem:
        status, delay_s = self._status_and_delay()
        return AcmeProblem("", f"HTTP {status} with a response that is not ACME", status, delay_s)

    def _status_and_delay(self) -> tuple[int, float | None]:
        return (0, None) if self._last is None else (self._last.status_code, retry_after_s(self._last))


class _BoundedAdapter(HTTPAdapter):
    """Reads the response itself, to limit its size and the time for the whole body; requests limits only each read."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        deadline = time.monotonic() + _TIMEOUT_S
        response = super().send(request, *args, **{**kwargs, "stream": True})
        body = bytearray()
        try:
            while chunk := response.raw.read1(64 * 1024):
                body += chunk
                if len(body) > MAX_RESPONSE_BYTES:
                    raise requests.exceptions.ContentDecodingError(f"more than {MAX_RESPONSE_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise requests.exceptions.ReadTimeout
        except urllib3.exceptions.ReadTimeoutError:
            raise requests.exceptions.ReadTimeout from None
        except urllib3.exceptions.HTTPError as error:
            raise requests.exceptions.ConnectionError(error) from None
        finally:
            response.close()
        response._content = bytes(body)  # noqa: SLF001  # requests has no other way
        response._content_consumed = True  # type: ignore[attr-defined]  # noqa: SLF001  # as above
        return response


def retry_after_s(response: requests.Response) -> float | None:
    """Return the seconds in ``Retry-After``, in either format of RFC 9110 section 10.2.3; None without the header."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _root_cause(error: BaseException) -> str:
    """Return the text of the innermost exception: requests and urllib3 wrap it several times."""
    while True:
        inner = [one for one in (*error.args, getattr(error, "reason", None)) if isinstance(one, BaseException)]
        if not inner:
            return str(error)[:_MAX_TEXT]
        error = inner[0]
