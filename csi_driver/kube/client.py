"""Connections to the API server, and its failures in our words."""

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

TIMEOUT_S = 5.0
"""For one request, the wait for a free connection included."""
_MAX_CONNECTIONS = 100
_MAX_SHOWN = 300
_LONGEST_RETRY_AFTER_S = 60.0
_T = TypeVar("_T")

Api: TypeAlias = client.ApiClient
"""A connection to the API server, for whoever may hold one and not know the kubernetes package."""


@dataclass(frozen=True, slots=True)
class ObjectName:
    """An object of a namespace; ``kind`` is for people."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class ApiError(CertmountError):
    """The API server answered, and the answer is an error."""

    def __init__(self, reason: Reason, fault: Fault, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(reason, fault)
        self.status = status
        """The HTTP status."""
        self.retry_after_s = retry_after_s
        """How long the API server asks to be left alone (RFC 9110 section 10.2.3); None where it doesn't say."""


class Conflict(ApiError):
    """Someone else changed the object since it was read, or made it first (HTTP 409)."""


def in_cluster_configuration() -> client.Configuration:
    """The API server as every pod finds it; the token is read again each minute, as the kubelet renews it.

    Raises:
        CertmountError: TokenReviewUnavailable outside a cluster.
    """
    configuration = client.Configuration()
    try:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # has no types
    except ConfigException as error:
        hint = "the pod needs its service-account token (automountServiceAccountToken)"
        raise CertmountError(
            Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("cluster", f"cannot be found: {error}", hint)
        ) from None
    return configuration


def connect(configuration: client.Configuration) -> client.ApiClient:
    """A client with a connection pool of its own; one for each identity, as it overrides an Authorization header given per call.

    It belongs to one event loop and is closed by ``async with``.
    """
    configuration.connection_pool_maxsize = _MAX_CONNECTIONS
    # No proxy and no .netrc from the environment: tokens go to the API server and to no one between.
    configuration.client_session_kwargs = {"trust_env": False}
    # Python 3.13 and newer also require key identifiers, which the certificates of many clusters do not have.
    configuration.disable_strict_ssl_verification = True
    api = client.ApiClient(configuration)
    api.user_agent = f"certmount/{__version__}"
    return api


async def answered(call: Awaitable[_T], reason: Reason, what: str) -> _T:
    """The call's answer; ``what`` was to be done with it, for people.

    Raises:
        CertmountError: with ``reason``, whatever failed; its text never quotes the request. ApiError where the API
            server answered with an error, Conflict for HTTP 409.
    """
    try:
        answer = await call
    except client.ApiException as error:
        raise _api_error(error, reason, what) from None
    except TimeoutError:
        raise CertmountError(reason, Fault(what, "the API server does not answer in time")) from None
    except (aiohttp.ClientError, OSError) as error:
        raise CertmountError(
            reason, Fault(what, f"the API server cannot be reached ({type(error).__name__})")
        ) from None
    except ValueError as error:
        raise CertmountError(
            reason, Fault(what, f"the API server's answer is strange ({type(error).__name__})")
        ) from None
    if answer is None:
        raise CertmountError(reason, Fault(what, "the API server's answer is strange (null)"))
    return answer


def _api_error(error: client.ApiException, reason: Reason, what: str) -> ApiError:
    status = int(error.status or 0)
    if status == 409:
        return Conflict(reason, Fault(what, "someone else changed it at the same moment"), status)
    problem = f"the API server {_meaning(status)} {status}{_message(error)}"
    return ApiError(
        reason, Fault(what, problem), status, _retry_after(error) if status == 429 or status >= 500 else None
    )


def _meaning(status: int) -> str:
    """Whose trouble it is: ours, or the API server's, which passes."""
    if status == 401:
        return "does not believe the authority's own token: it answers"
    if status == 429:
        return "is overloaded and turns requests away: it answers"
    return "has trouble of its own: it answers" if status >= 500 else "answers"


def _retry_after(error: client.ApiException) -> float | None:
    """In seconds, as the API server writes it (API priority and fairness); a date is not understood."""
    text = (error.headers or {}).get("Retry-After", "")
    return min(float(text), _LONGEST_RETRY_AFTER_S) if text.isascii() and text.isdigit() else None


def _message(error: client.ApiException) -> str:
    """What the API server says of a missing object or permission; other answers may quote what was sent."""
    if error.status not in (403, 404):
        return ""
    try:
        return f": {json.loads(error.body or '')['message'][:_MAX_SHOWN]}"
    except (TypeError, ValueError, KeyError):
        return ""
