"""Decides what a failure means for an order, and explains it to pods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.state import AcmeState, NamesBackoff, OrderRecord, names_id
from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason

_RETRY = Backoff(5.0, 300.0)
_NAMES_RETRY = Backoff(300.0, 6 * 3600.0)
"""Four attempts in the first hour, then fewer: Let's Encrypt allows five failures per hour and name."""
_RATE_LIMITED_S = 3600.0
_BUSY_S = 60.0
_MAX_DELAY_S = 30 * 86400.0
_REJECTED = ("rejectedIdentifier", "unsupportedIdentifier", "badCSR", "badPublicKey", "caa", "invalidProfile")
"""Problems that last until someone changes the request or the configuration (RFC 8555 section 6.7)."""
_TRANSIENT = ("", "badNonce", "serverInternal", "orderNotReady", "userActionRequired", "accountDoesNotExist")


def after_problem(state: AcmeState, order: OrderRecord, problem: AcmeProblem, now: float) -> AcmeState:
    if problem.code == "rateLimited" or problem.status in (429, 503):
        # 503 means that the CA is overloaded; a rate limit applies to these names or this account.
        default_s = _BUSY_S if problem.status == 503 else _RATE_LIMITED_S
        until = now + min(problem.retry_after_s or default_s, _MAX_DELAY_S)
        if order.url or problem.status == 503:
            return state.with_order(_retry_at(order, problem.text, until))
        failures = state.failures(order.names)
        return _abandon(state, order).with_backoff(
            NamesBackoff(names_id(order.names), until, failures, Reason.TOO_MANY_REQUESTS.word, problem.text)
        )
    if problem.status == 404 or problem.code == "accountDoesNotExist":
        # The CA no longer has the order: create it again.
        return state.with_order(replace(_retry(order, problem.text, now), url=""))
    if problem.code in _TRANSIENT or problem.status >= 500:
        return state.with_order(_retry(order, problem.text, now))
    failures = state.failures(order.names) + 1
    reason = Reason.NAME_NOT_ALLOWED if problem.code in _REJECTED else Reason.ISSUER_UNAVAILABLE
    text = f"{problem.text} ({problem.code})"
    until = now + _NAMES_RETRY.delay_s(failures)
    return _abandon(state, order).with_backoff(NamesBackoff(names_id(order.names), until, failures, reason.word, text))


def after_failure(state: AcmeState, order: OrderRecord, text: str, now: float) -> AcmeState:
    return state.with_order(_retry(order, text, now))


def backoff_error(backoff: NamesBackoff, names: Sequence[str]) -> CertmountError:
    hint = f"the authority retries after {_format(backoff.until)}"
    fault = Fault(", ".join(names), f"the CA rejected the order: {backoff.text}", hint)
    return CertmountError(REASONS[backoff.reason], fault)


def pending_error(order: OrderRecord) -> CertmountError:
    problem = f"the order of {_format(order.created_at)} is in progress"
    hint = "the certificate will be issued when the CA finishes"
    if order.problem:
        problem = f"{problem}; {order.problem}"
        hint = f"the authority retries after {_format(order.retry_at)}" if order.retry_at else "the authority continues"
    return CertmountError(Reason.ISSUANCE_PENDING, Fault(", ".join(order.names), problem, hint))


def _retry(order: OrderRecord, text: str, now: float) -> OrderRecord:
    failures = order.failures + 1
    return replace(_retry_at(order, text, now + _RETRY.delay_s(failures)), failures=failures)


def _retry_at(order: OrderRecord, text: str, time: float) -> OrderRecord:
    return replace(order, holder="", lease_until=0.0, retry_at=time, problem=text)


def _abandon(state: AcmeState, order: OrderRecord) -> AcmeState:
    if not order.challenges:
        return state.without_order(order.id)
    return state.with_order(replace(order, abandoned=True, holder="", lease_until=0.0, retry_at=0.0, failures=0))


def _format(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
