"""Authenticates the callers of the authority's methods."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import grpc

from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.limits import RequestLimits, caller_address
from csi_driver.authority.issuance.audit import AuditRecord, audited
from csi_driver.core.secret import Secret

_Context = grpc.aio.ServicerContext[Any, Any]
_SECRETS = "Secrets"
_AUDITED = ("Issue", "Check", "Secrets.Issue")


def method_label(method: str) -> str:
    """Return what metrics and logs call a method: its name, and for the service ``Secrets`` also that of the service."""
    service, _, name = method.rpartition("/")
    return f"{_SECRETS}.{name}" if service.endswith(f".{_SECRETS}") else name


def bearer_token(context: _Context) -> Secret[str]:
    """Return the token of the ``authorization`` metadata (RFC 6750 section 2.1); empty unless there is exactly one."""
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    scheme, _, token = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
    return Secret(token.strip() if scheme.lower() == "bearer" else "")


@dataclass(frozen=True, slots=True)
class CallerAuthentication:
    """Authenticates a caller before its request is received, because a request has up to 128 KiB.

    The method itself authenticates the caller again, from the cache, and counts the call for it.
    """

    authenticator: Authenticator
    limits: RequestLimits

    async def __call__(self, method: str, context: _Context) -> None:
        """Raise the failure of a call (``method`` is its label) whose caller has no valid token, and log it for the audit."""
        address, issue = caller_address(context.peer()), method in _AUDITED
        may_log = functools.partial(self.limits.may_log_failure, address)
        audit = audited(may_log) if issue else contextlib.nullcontext(AuditRecord())
        with audit as record, self.limits.authentication(address, issue=issue):
            if method.startswith(f"{_SECRETS}."):
                await self.authenticator.authenticate_controller(bearer_token(context))
            else:
                await self.authenticator.authenticate_node(bearer_token(context))
            record.decision = "checked"  # has no entry
