"""Connections to the API server, and its failures in our words."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException, load_incluster_config

from csi_driver import __version__
from csi_driver.core.errors import CertmountError, Fault, Reason

TIMEOUT_S = 5.0
"""For one request, the wait for a free connection included."""
_MAX_CONNECTIONS = 100
_MAX_SHOWN = 300
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ObjectName:
    """An object of a namespace; ``kind`` is for people."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Conflict(CertmountError):
    """Someone else changed the object since it was read (HTTP 409)."""


def in_cluster_configuration() -> client.Configuration:
    """The API server as every pod finds it; the token is read again each minute, as the kubelet renews it.

    Raises:
        CertmountError: ProofUnavailable outside a cluster.
    """
    configuration = client.Configuration()
    try:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # has no types
    except ConfigException as error:
        hint = "the pod needs its service-account token (automountServiceAccountToken)"
        raise CertmountError(Reason.PROOF_UNAVAILABLE, Fault("cluster", f"cannot be found: {error}", hint)) from None
    return configuration


def connect(configuration: client.Configuration) -> client.ApiClient:
    """A client with a connection pool of its own; one for each identity, as it overrides an Authorization header given per call.

    It belongs to one event loop and is closed by ``async with``.
    """
    configuration.connection_pool_maxsize = _MAX_CONNECTIONS
    # No proxy and no .netrc from the environment: tokens go to the API server and to no one between.
    configuration.client_session_kwargs = {"trust_env": False}
    api = client.ApiClient(configuration)
    api.user_agent = f"certmount/{__version__}"
    return api


async def answered(call: Awaitable[_T], reason: Reason, what: str) -> _T:
    """The call's answer; ``what`` was to be done with it, for people.

    Raises:
        CertmountError: with ``reason``, whatever failed; its text never quotes the request. Conflict for HTTP 409.
    """
    try:
        answer = await call
    except client.ApiException as error:
        if error.status == 409:
            raise Conflict(reason, Fault(what, "someone else changed it at the same moment")) from None
        raise CertmountError(reason, Fault(what, f"the API server answers {error.status}{_message(error)}")) from None
    except TimeoutError:
        raise CertmountError(reason, Fault(what, f"the API server does not answer within {TIMEOUT_S:g} s")) from None
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


def _message(error: client.ApiException) -> str:
    """What the API server says of a missing object or permission; other answers may quote what was sent."""
    if error.status not in (403, 404):
        return ""
    try:
        return f": {json.loads(error.body or '')['message'][:_MAX_SHOWN]}"
    except (TypeError, ValueError, KeyError):
        return ""
