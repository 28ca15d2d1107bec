"""Signed requests to the CA (RFC 8555 section 6), and its refusals in words. Synchronous: for threads."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import Any

import requests
from acme import errors, messages
from acme.client import ClientNetwork
from josepy.errors import Error as JoseError
from josepy.interfaces import JSONDeSerializable
from josepy.jwa import ES256
from josepy.jwk import JWK

from csi_driver import __version__
from csi_driver.core.errors import CertmountError, Fault, Reason

_TIMEOUT_S = 20
_NONCE_ATTEMPTS = 10
"""The library tries twice in each: a CA that takes one nonce in two would be given up once in a million."""
_MAX_SHOWN = 400


class CaProblem(Exception):
    """The CA answered with an error (RFC 8555 section 6.7)."""

    def __init__(self, code: str, text: str, status: int = 0, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        """Such as ``rateLimited``; empty for an answer that is no problem document."""
        self.text = text
        """In the CA's words."""
        self.status = status
        """The HTTP status."""
        self.retry_after_s = retry_after_s


class Connection(ClientNetwork):
    """One thread's connection to one CA; what a refusal costs is one exception, whatever went wrong."""

    def __init__(
        self, directory_url: str, key: JWK | None, ca_file: str | None, directory: messages.Directory | None = None
    ) -> None:
        super().__init__(key, alg=ES256, user_agent=f"certmount/{__version__}", timeout=_TIMEOUT_S, verify_ssl=True)
        if ca_file is not None:
            self.verify_ssl = ca_file  # type: ignore[assignment]  # handed on to requests, which takes a path as well
        self._directory_url = directory_url
        self._last: requests.Response | None = None
        self._directory = directory

    @property
    def directory(self) -> messages.Directory:
        """What the CA offers (RFC 8555 section 7.1.1); fetched now where it was not given."""
        if self._directory is None:
            self._directory = self.load_directory()
        return self._directory

    def load_directory(self) -> messages.Directory:
        """The directory as it is now; raises as :meth:`fetch`."""
        try:
            return messages.Directory.from_json(self.fetch(self._directory_url).json())
        except (JoseError, ValueError, AttributeError):
            raise self._strange() from None

    def use_account(self, url: str) -> None:
        """Signs as this account from now on (RFC 8555 section 6.2: ``kid``)."""
        self.account = messages.RegistrationResource(uri=url, body=messages.Registration())

    def fetch(self, url: str) -> requests.Response:
        """An unsigned GET; raises CaProblem or CertmountError IssuerUnavailable."""
        return self._spoken(url, self.get, url)

    def send(self, url: str, body: JSONDeSerializable | None = None) -> requests.Response:
        """A signed POST, with None POST-as-GET (RFC 8555 section 6.3); raises CaProblem or CertmountError IssuerUnavailable."""
        for _ in range(_NONCE_ATTEMPTS - 1):
            try:
                return self._spoken(url, self.post, url, body, new_nonce_url=self.directory["newNonce"])
            except CaProblem as problem:
                if problem.code != "badNonce":
                    raise
        return self._spoken(url, self.post, url, body, new_nonce_url=self.directory["newNonce"])

    @property
    def clock_offset_s(self) -> float | None:
        """By how much the CA's clock was ahead of ours at its last answer; None where it didn't say."""
        try:
            date = self._last.headers["Date"] if self._last is not None else ""
            return parsedate_to_datetime(date).timestamp() - time.time()
        except (KeyError, ValueError):
            return None

    def _send_request(self, method: str, url: str, *args: Any, **kwargs: Any) -> requests.Response:
        self._last = None
        self._last = super()._send_request(method, url, *args, **kwargs)
        return self._last

    def _spoken(self, url: str, call: Any, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            answer = call(*args, **kwargs)
        except errors.ConflictError as error:  # before its parent class: RFC 9773 section 5 has 409 for alreadyReplaced
            raise CaProblem("conflict", f"there is one already: {error.location}", 409) from None
        except messages.Error as error:
            raise self._problem(error) from None
        except requests.exceptions.SSLError as error:
            raise _unavailable(url, f"has a TLS certificate that is not trusted ({_innermost(error)})") from None
        except requests.exceptions.Timeout:
            raise _unavailable(url, f"does not answer within {_TIMEOUT_S} s") from None
        except requests.exceptions.RequestException as error:
            raise _unavailable(url, f"cannot be reached ({_innermost(error)})") from None
        except OSError as error:
            raise _unavailable(url, f"cannot be asked ({error})") from None
        except (errors.Error, JoseError, ValueError):
            raise self._strange() from None
        assert isinstance(answer, requests.Response)  # noqa: S101  # what the library's methods return
        return answer

    def _problem(self, error: messages.Error) -> CaProblem:
        texts = [error.detail or error.title or error.typ]
        texts += [f"{_identifier(one)}{one.detail or one.typ}" for one in error.subproblems or ()]
        status, retry_after = self._status_and_pause()
        return CaProblem(error.code or "", "; ".join(texts)[:_MAX_SHOWN], status, retry_after)

    def _strange(self) -> CaProblem:
        status, retry_after = self._status_and_pause()
        return CaProblem("", f"answers HTTP {status} with something that is not ACME", status, retry_after)

    def _status_and_pause(self) -> tuple[int, float | None]:
        if self._last is None:
            return 0, None
        return self._last.status_code, retry_after_s(self._last)


def retry_after_s(response: requests.Response) -> float | None:
    """The seconds that ``Retry-After`` asks for, in either of its forms (RFC 9110 section 10.2.3); None without it."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _identifier(error: messages.Error) -> str:
    return f"{error.identifier.value}: " if error.identifier is not None else ""


def _innermost(error: BaseException) -> str:
    """The cause that names something, of the several layers that requests and urllib3 put around it."""
    while True:
        inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None) or getattr(
            error, "reason", None
        )
        if not isinstance(inner, BaseException):
            return str(error)[:_MAX_SHOWN]
        error = inner


def _unavailable(url: str, problem: str) -> CertmountError:
    return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(url, problem))
