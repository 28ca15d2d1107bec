"""Calls of the API server, and the conversion of their failures to CertmountError."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.connection import ErrorResponse

TIMEOUT_S = 5.0  # for one request, including the wait for a free connection
_MAX_ERROR_TEXT = 300
_MAX_RETRY_AFTER_S = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ObjectName:
    """The kind, namespace and name of an object."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class ApiError(CertmountError):
    """An error response of the API server."""

    def __init__(self, reason: Reason, fault: Fault, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(reason, fault)
        self.status = status  # HTTP
        self.retry_after_s = retry_after_s  # the Retry-After header (RFC 9110 section 10.2.3); None without one


class Conflict(ApiError):
    """The object was changed since it was read, or already exists (HTTP 409)."""


class NotFound(ApiError):
    """The object does not exist (HTTP 404)."""


class InvalidApiResponse(CertmountError):
    """The response is too large or does not have the documented form. A retry helps only after a change of the object."""


class InvalidResponse(Exception):
    """The response is too large or does not have the documented form. The text does not quote it."""


async def call_api(call: Awaitable[_T], reason: Reason, target: str) -> _T:
    """Return the result of a call; ``target`` names the object of the call in errors.

    Raises CertmountError with ``reason`` for every failure; ApiError for an error response, Conflict for HTTP 409,
    NotFound for HTTP 404. The text never quotes the request.
    """
    try:
        result = await call
    except ErrorResponse as error:
        raise _api_error(error, reason, target) from None
    except TimeoutError:
        raise CertmountError(reason, Fault(target, "the API server does not respond in time")) from None
    except (aiohttp.ClientError, OSError) as error:
        where, cause = "the API server", error
        if isinstance(error, aiohttp.ClientConnectorError):
            where, cause = f"the API server at {error.host}:{error.port}", error.os_error
        raise CertmountError(reason, Fault(target, f"cannot reach {where} ({type(cause).__name__})")) from None
    except InvalidResponse as error:
        raise invalid_response(reason, target, str(error)) from None
    except ValueError as error:  # its text can quote the response
        raise invalid_response(reason, target, type(error).__name__) from None
    if result is None:
        raise invalid_response(reason, target, "null")
    return result


def invalid_response(reason: Reason, target: str, detail: str = "") -> InvalidApiResponse:
    """Return the error for a response that does not have the documented form."""
    suffix = f" ({detail})" if detail else ""
    return InvalidApiResponse(reason, Fault(target, f"the API server sent an invalid response{suffix}"))


def _api_error(error: ErrorResponse, reason: Reason, target: str) -> ApiError:
    status = error.status
    if status == 409:
        return Conflict(reason, Fault(target, "another client changed it at the same time"), status)
    problem = f"{_description(status)}: HTTP {status}{_message(error)}"
    retry_after_s = _retry_after(error) if status == 429 or status >= 500 else None
    kind = NotFound if status == 404 else ApiError
    return kind(reason, Fault(target, problem), status, retry_after_s)


def _description(status: int) -> str:
    if status == 401:
        return "the API server rejects the credentials of this client"
    if status == 429:
        return "the API server is overloaded"
    return "the API server has an internal error" if status >= 500 else "the API server rejects the request"


def _retry_after(error: ErrorResponse) -> float | None:
    """Return the seconds of a Retry-After header. The API server never sends a date (API priority and fairness)."""
    text = error.headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else None


def _message(error: ErrorResponse) -> str:
    """Return the message about a missing object or permission; the messages of other statuses can quote the request."""
    if error.status not in (403, 404):
        return ""
    try:
        return f": {json.loads(error.body)['message'][:_MAX_ERROR_TEXT]}"
    except (TypeError, ValueError, KeyError, RecursionError):
        return ""
