"""Rules for orders, as pure functions of the state: names, requests, leases, expiry, and what a failure means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.acme.state import MAX_ORDERS, AcmeState, NamesBackoff, OrderRecord, names_id
from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason
from csi_driver.core.spec import KeyType, Usage

_RETRY = Backoff(5.0, 300.0)
_NAMES_RETRY = Backoff(300.0, 6 * 3600.0)  # Let's Encrypt allows five failures per hour and name
_RATE_LIMITED_S = 3600.0
_BUSY_S = 60.0
_MAX_DELAY_S = 30 * 86400.0
_REJECTED = ("rejectedIdentifier", "unsupportedIdentifier", "badCSR", "badPublicKey", "caa", "invalidProfile")
"""Problems that last until someone changes the request or the configuration (RFC 8555 section 6.7)."""
_TRANSIENT = ("", "badNonce", "serverInternal", "orderNotReady", "userActionRequired", "accountDoesNotExist")
_KEEP_FINISHED_S = 3600.0  # A finished certificate waits for its node, which retries within minutes
_ABANDON_AFTER_S = 2 * 3600.0  # If nothing requests an order for so long, its pods no longer exist
_REQUESTED_PRECISION_S = 600.0  # Limits writes to the store: a waiting node requests the order often
_KEEP_BACKOFF_S = 86400.0  # After its end, to count consecutive failures


def after_problem(state: AcmeState, order: OrderRecord, problem: AcmeProblem, now: float) -> AcmeState:
    """Return the state after an order failed: at the CA, or without a code for any other transient reason."""
    key = names_id(order.names)
    if problem.code == "rateLimited" or problem.status in (429, 503):
        # 503 means that the CA is overloaded; a rate limit applies to these names or this account.
        default_s = _BUSY_S if problem.status == 503 else _RATE_LIMITED_S
        until = now + min(problem.retry_after_s or default_s, _MAX_DELAY_S)
        if order.url or problem.status == 503:
            return state.with_order(_retry_at(order, problem.text, until))
        failures, reason = state.failures(order.names), Reason.TOO_MANY_REQUESTS
        return _back_off(state, order, NamesBackoff(key, until, failures, reason.word, problem.text))
    if problem.status == 404 or problem.code == "accountDoesNotExist":
        # The CA no longer has the order: create it again.
        return state.with_order(replace(_retry(order, problem.text, now), url=""))
    if problem.code in _TRANSIENT or problem.status >= 500:
        return state.with_order(_retry(order, problem.text, now))
    failures = state.failures(order.names) + 1
    reason = Reason.NAME_NOT_ALLOWED if problem.code in _REJECTED else Reason.ISSUER_UNAVAILABLE
    text = f"{problem.text} ({problem.code})"
    until = now + _NAMES_RETRY.delay_s(failures)
    return _back_off(state, order, NamesBackoff(key, until, failures, reason.word, text))


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


def _back_off(state: AcmeState, order: OrderRecord, backoff: NamesBackoff) -> AcmeState:
    state = state.without_order(order.id).with_backoff(backoff)
    if not order.challenges:  # nothing remains to be removed
        return state
    return state.with_order(replace(order, abandoned=True, holder="", lease_until=0.0, retry_at=0.0, failures=0))


def _format(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def order_names(request: IssuerRequest, configuration: AcmeConfiguration) -> tuple[str, ...]:
    names, grant, requested = request.csr.names, request.grant, request.requested
    key_type = request.csr.key_type
    faults = [
        Fault(str(name), "public CAs do not sign this kind of name", "use another issuer for it")
        for name in (*names.uris, *names.ips, *names.emails)
    ]
    if not names.dns:
        hint = "an ACME certificate contains only the names in volumeAttributes"
        faults.append(Fault("name", "no DNS name is requested", hint))
    elif set(names.dns) != set(grant.names.dns):
        faults.append(Fault("name", "the policy grants other DNS names than the CSR contains"))
    if Usage.SERVER not in grant.usages or (requested is not None and Usage.CLIENT in requested.usages):
        hint = "use another issuer, or set usages: server"
        faults.append(Fault("usages", "public CAs no longer sign client certificates", hint))
    if requested is not None and requested.duration is not None:
        hint = "omit it; an administrator can select one of the CA's profiles"
        faults.append(Fault("duration", "the ACME CA determines the lifetime", hint))
    if key_type in (KeyType.ML_DSA_44, KeyType.ML_DSA_65, KeyType.ML_DSA_87):
        hint = "use another issuer or another key type"
        faults.append(Fault("key-type", f"ACME CAs do not sign {key_type.value} keys yet", hint))
    texts = tuple(sorted(name.text for name in names.dns))
    if configuration.dns01 is None:
        faults += wildcard_faults(texts)
    if faults:
        raise CertmountError(Reason.NAME_NOT_ALLOWED, *faults)
    return texts


def wildcard_faults(names: Sequence[str]) -> list[Fault]:
    """Return a fault for each wildcard, which HTTP-01 does not support (RFC 8555 section 8.3)."""
    problem, hint = "HTTP-01 does not support wildcards", "ask an administrator to configure dns01 for the issuer"
    return [Fault(name, problem, hint) for name in names if name.startswith("*.")]


def request_order(state: AcmeState, order_id: str, names: tuple[str, ...], csr: bytes, now: float) -> AcmeState:
    """Return the state with the order; raise CertmountError if these names must wait, or if too many orders are open."""
    known, certificate = state.order(order_id), state.certificate(order_id)
    if known is not None and known.is_open:
        outdated = now - known.requested_at > _REQUESTED_PRECISION_S
        return state.with_order(replace(known, requested_at=now)) if outdated else state
    if known is not None and known.finished_at and certificate is not None and now < certificate.renew_at:
        return state
    if backoff := state.backoff(names, now):
        raise backoff_error(backoff, names)
    if sum(one.is_open for one in state.orders) >= MAX_ORDERS:
        fault = Fault("issuer", f"has the maximum of {MAX_ORDERS} open orders")
        raise CertmountError(Reason.AUTHORITY_OVERLOADED, fault)
    remaining = known.challenges if known is not None else ()
    replaces = _certificate_to_renew(state, names, now)
    order = OrderRecord(order_id, names, csr, now, now, replaces=replaces, challenges=remaining)
    return _with_room(state).with_order(order)


def remove_expired(state: AcmeState, now: float) -> AcmeState:
    """Abandon orders that nothing requests, and remove what is no longer needed. Orders with challenges stay."""
    orders = []
    for one in state.orders:
        abandoned = one.is_open and one.lease_until <= now and now - one.requested_at > _ABANDON_AFTER_S
        order = replace(one, abandoned=True, retry_at=0.0) if abandoned else one
        expired = order.abandoned or (order.finished_at and now - order.finished_at > _KEEP_FINISHED_S)
        if order.challenges or not expired:
            orders.append(order)
    return replace(
        state,
        orders=tuple(orders),
        backoffs=tuple(one for one in state.backoffs if now - one.until < _KEEP_BACKOFF_S),
        certificates=tuple(one for one in state.certificates if now < one.not_after),
    )


def claim_orders(state: AcmeState, holder: str, now: float, lease_s: float, max_held: int) -> AcmeState:
    """Renew the leases of ``holder``, and claim due orders without a lease until it holds ``max_held`` orders."""
    held = sum(order.holder == holder for order in state.orders)
    orders = []
    for order in state.orders:
        unfinished = order.is_open or order.challenges
        if order.holder == holder and unfinished:
            # At half time, so that a short order needs no further write.
            renew = order.lease_until - now < lease_s / 2
            orders.append(replace(order, lease_until=now + lease_s) if renew else order)
        elif unfinished and order.lease_until <= now and order.retry_at <= now and held < max_held:
            held += 1
            orders.append(replace(order, holder=holder, lease_until=now + lease_s))
        else:
            orders.append(order)
    return replace(state, orders=tuple(orders))


def release_orders(state: AcmeState, holder: str) -> AcmeState:
    """End the leases of a replica that stops, so that others can take its orders immediately."""
    orders = (replace(one, holder="", lease_until=0.0) if one.holder == holder else one for one in state.orders)
    return replace(state, orders=tuple(orders))


def _certificate_to_renew(state: AcmeState, names: tuple[str, ...], now: float) -> str:
    """Return the due certificate that an order replaces: CAs exempt such orders from rate limits (RFC 9773 section 5)."""
    replaced = {one.replaces for one in state.orders if one.is_open}
    key = names_id(names)
    same = [one for one in state.certificates if one.names_id == key and one.certificate_id not in replaced]
    due = [one for one in same if one.renew_at <= now]
    return min(due, key=lambda one: one.renew_at).certificate_id if due else ""


def _with_room(state: AcmeState) -> AcmeState:
    removable = [one for one in state.orders if not one.is_open and not one.challenges]
    removable.sort(key=lambda one: one.finished_at)
    for one in removable[: max(len(state.orders) + 1 - MAX_ORDERS, 0)]:
        state = state.without_order(one.id)
    return state
