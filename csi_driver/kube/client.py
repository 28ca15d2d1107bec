"""Connections to the API server, and the conversion of its failures to CertmountError."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException, load_incluster_config

from csi_driver import __version__
from csi_driver.core.errors import CertmountError, Fault, Reason

TIMEOUT_S = 5.0  # for one request, including the wait for a free connection
_MAX_CONNECTIONS = 100
_MAX_ERROR_TEXT = 300
_MAX_RETRY_AFTER_S = 60.0
_T = TypeVar("_T")

Api: TypeAlias = client.ApiClient
"""A connection to the API server, for modules that must not import the kubernetes package."""


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


def in_cluster_configuration() -> client.Configuration:
    """Return the API server configuration that every pod has; raises CertmountError TokenReviewUnavailable outside a cluster.

    The client rereads the token every minute.
    """
    configuration = client.Configuration()
    try:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # has no types
    except ConfigException as error:
        hint = "the pod needs its service account token (automountServiceAccountToken)"
        fault = Fault("cluster", f"no in-cluster configuration: {error}", hint)
        raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, fault) from None
    return configuration


def connect(configuration: client.Configuration) -> client.ApiClient:
    """Return a client with its own connection pool. It belongs to one event loop; close it with ``async with``.

    Use one client for each identity: the client overrides an Authorization header that is passed with a call.
    """
    configuration.connection_pool_maxsize = _MAX_CONNECTIONS
    # Ignore proxies and .netrc in the environment: tokens must go to the API server only.
    configuration.client_session_kwargs = {"trust_env": False}
    # Python 3.13 and newer also require key identifiers, which the certificates of many clusters do not have.
    configuration.disable_strict_ssl_verification = True
    api = client.ApiClient(configuration)
    api.user_agent = f"certmount/{__version__}"
    return api


async def call_api(call: Awaitable[_T], reason: Reason, target: str) -> _T:
    """Return the result of a call; ``target`` names the object of the call in errors.

    Raises CertmountError with ``reason`` for every failure; ApiError for an error response, Conflict for HTTP 409. The text
    never quotes the request.
    """
    try:
        result = await call
    except client.ApiException as error:
        raise _api_error(error, reason, target) from None
    except TimeoutError:
        raise CertmountError(reason, Fault(target, "the API server does not respond in time")) from None
    except (aiohttp.ClientError, OSError) as error:
        raise CertmountError(reason, Fault(target, f"cannot reach the API server ({type(error).__name__})")) from None
    except ValueError as error:
        raise invalid_response(reason, target, type(error).__name__) from None
    if result is None:
        raise invalid_response(reason, target, "null")
    return result


def invalid_response(reason: Reason, target: str, detail: str = "") -> CertmountError:
    """Return the error for a response that does not have the documented form."""
    suffix = f" ({detail})" if detail else ""
    return CertmountError(reason, Fault(target, f"the API server sent an invalid response{suffix}"))


def _api_error(error: client.ApiException, reason: Reason, target: str) -> ApiError:
    status = int(error.status or 0)
    if status == 409:
        return Conflict(reason, Fault(target, "another client changed it at the same time"), status)
    problem = f"{_description(status)}: HTTP {status}{_message(error)}"
    retry_after_s = _retry_after(error) if status == 429 or status >= 500 else None
    return ApiError(reason, Fault(target, problem), status, retry_after_s)


def _description(status: int) -> str:
    if status == 401:
        return "the API server rejects the authority's own token"
    if status == 429:
        return "the API server is overloaded"
    return "the API server has an internal error" if status >= 500 else "the API server rejects the request"


def _retry_after(error: client.ApiException) -> float | None:
    """Return the seconds of a Retry-After header. The API server never sends a date (API priority and fairness)."""
    text = (error.headers or {}).get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else None


def _message(error: client.ApiException) -> str:
    """Return the message about a missing object or permission; the messages of other statuses can quote the request."""
    if error.status not in (403, 404):
        return ""
    try:
        return f": {json.loads(error.body or '')['message'][:_MAX_ERROR_TEXT]}"
    except (TypeError, ValueError, KeyError):
        return ""
