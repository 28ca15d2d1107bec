"""What a failure means for an order: again when, or not at all, and what people are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime

from csi_driver.authority.issuers.acme.client import CaProblem
from csi_driver.authority.issuers.acme.http01 import wildcard_faults
from csi_driver.authority.issuers.acme.settings import AcmeSettings
from csi_driver.authority.issuers.acme.state import Block, OrderRecord, State, names_id
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.spec import KeyType, Usage

_FIRST_RETRY_S, _LAST_RETRY_S = 5.0, 300.0
_FIRST_BLOCK_S, _LAST_BLOCK_S = 300.0, 6 * 3600.0
"""Four failures in the first hour, then fewer: Let's Encrypt allows five an hour for a name."""
_LIMITED_S = 3600.0
_BUSY_S = 60.0
_MOST_PAUSE_S = 30 * 86400.0
_REFUSED = ("rejectedIdentifier", "unsupportedIdentifier", "badCSR", "badPublicKey", "caa", "invalidProfile")
"""Asking again helps only after somebody has changed something."""
_PASSING = ("", "badNonce", "serverInternal", "orderNotReady", "userActionRequired", "accountDoesNotExist")


def judge(
    names: Names,
    grant: Grant,
    asked: RequestedCertificate | None,
    settings: AcmeSettings,
    key_type: KeyType = KeyType.EC_P256,
) -> tuple[str, ...]:
    """The DNS names to order; raises CertmountError NameNotAllowed with all that an ACME CA can't sign."""
    faults = [
        Fault(str(name), "a public CA does not sign this kind of name", "ask another issuer for it")
        for name in (*names.uris, *names.ips, *names.emails)
    ]
    if not names.dns:
        faults.append(
            Fault(
                "name",
                "no DNS name is asked for",
                "an ACME certificate holds the names of volumeAttributes, and no others",
            )
        )
    elif set(names.dns) != set(grant.names.dns):
        faults.append(Fault("name", "policy grants other DNS names than the key was made for"))
    if Usage.SERVER not in grant.usages or (asked is not None and Usage.CLIENT in asked.usages):
        hint = "ask another issuer, or for usages: server"
        faults.append(Fault("usages", "public CAs no longer sign certificates for clients", hint))
    if asked is not None and asked.duration is not None:
        hint = "leave it away; the administrator may choose one of the CA's profiles"
        faults.append(Fault("duration", "an ACME CA decides itself how long a certificate lives", hint))
    if key_type in (KeyType.ML_DSA_44, KeyType.ML_DSA_65, KeyType.ML_DSA_87):
        hint = "ask another issuer, or for another key type"
        faults.append(Fault("key-type", f"ACME CAs do not sign for {key_type.value} keys yet", hint))
    texts = tuple(sorted(name.text for name in names.dns))
    if settings.dns01 is None:
        faults += wildcard_faults(texts)
    if faults:
        raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
    return texts


def after_problem(state: State, order: OrderRecord, problem: CaProblem, now: float) -> State:
    """The state after the CA's word against an order."""
    if problem.code == "rateLimited" or problem.status in (429, 503):
        # A server that is busy says 503 to everybody; a limit that is reached is for these names or this account.
        pause = min(problem.retry_after_s or (_BUSY_S if problem.status == 503 else _LIMITED_S), _MOST_PAUSE_S)
        if order.url or problem.status == 503:
            return state.with_order(_later(order, problem.text, now + pause))
        block = Block(
            names_id(order.names), now + pause, state.failures(order.names), Reason.TOO_MANY_REQUESTS.word, problem.text
        )
        return _given_up(state, order).with_block(block)
    if problem.status == 404 or problem.code == "accountDoesNotExist":
        # The CA has forgotten the order: nothing is lost but time.
        return state.with_order(dataclasses.replace(_again(order, problem.text, now), url=""))
    if problem.code in _PASSING or problem.status >= 500:
        return state.with_order(_again(order, problem.text, now))
    failures = state.failures(order.names) + 1
    pause = min(_FIRST_BLOCK_S * 2.0 ** min(failures - 1, 20), _LAST_BLOCK_S)
    reason = Reason.NAME_NOT_ALLOWED if problem.code in _REFUSED else Reason.ISSUER_UNAVAILABLE
    text = f"{problem.text} ({problem.code})"
    return _given_up(state, order).with_block(Block(names_id(order.names), now + pause, failures, reason.word, text))


def after_trouble(state: State, order: OrderRecord, text: str, now: float) -> State:
    """The state after something that may pass."""
    return state.with_order(_again(order, text, now))


def refusal(block: Block, names: Sequence[str]) -> CertmountError:
    """What a pod is told whose names the CA is not asked about now."""
    fault = Fault(", ".join(names), f"the CA refuses: {block.text}", f"it is asked again after {_moment(block.until)}")
    return CertmountError({reason.word: reason for reason in Reason}[block.reason], fault)


def pending(order: OrderRecord) -> CertmountError:
    """What a pod is told whose certificate is on its way."""
    since = f"ordered at {_moment(order.created_at)}"
    if order.trouble:
        problem = f"{since}; {order.trouble}"
        hint = f"goes on after {_moment(order.retry_at)}" if order.retry_at else "goes on"
    else:
        problem, hint = f"{since}, the CA is at it", "the certificate is there when it is asked for again"
    return CertmountError(Reason.ISSUANCE_PENDING, Fault(", ".join(order.names), problem, hint))


def _again(order: OrderRecord, text: str, now: float) -> OrderRecord:
    pause = min(_FIRST_RETRY_S * 2.0 ** min(order.attempts, 20), _LAST_RETRY_S)
    return dataclasses.replace(_later(order, text, now + pause), attempts=order.attempts + 1)


def _later(order: OrderRecord, text: str, moment: float) -> OrderRecord:
    return dataclasses.replace(order, holder="", lease_until=0.0, retry_at=moment, trouble=text)


def _given_up(state: State, order: OrderRecord) -> State:
    """Without the order, or with what it left behind."""
    if not order.proofs:
        return state.without_order(order.id)
    return state.with_order(
        dataclasses.replace(order, given_up=True, holder="", lease_until=0.0, retry_at=0.0, attempts=0)
    )


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
