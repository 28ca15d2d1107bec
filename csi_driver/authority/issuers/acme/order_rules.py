"""Rules for orders, as pure functions of the state: names, requests, leases, expiry, and what a failure means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cryptography import x509

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.certificates import default_renewal_time
from csi_driver.authority.issuers.acme.client import AcmeProblem, OrderUnusable
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.acme.order_shares import check_shares, make_room, processing_shares, with_backoff
from csi_driver.authority.issuers.acme.state import AcmeState, NamesBackoff, OrderRecord, names_id
from csi_driver.core.backoff import Backoff
from csi_driver.core.errors import REASONS, CertmountError, Fault, Reason
from csi_driver.core.spec import KeyType, Usage
from csi_driver.core.texts import timestamp

_RETRY = Backoff(5.0, 300.0)
_NAMES_RETRY = Backoff(300.0, 6 * 3600.0)  # Let's Encrypt allows five failures per hour and name
_RATE_LIMITED_S = 3600.0
_BUSY_S = 60.0
MAX_DELAY_S = 86400.0
"""A CA that requests a longer delay is asked once a day."""
_REJECTED = ("rejectedIdentifier", "unsupportedIdentifier", "badCSR", "badPublicKey", "caa", "invalidProfile")
"""Problems that last until someone changes the request or the configuration (RFC 8555 section 6.7)."""
_TRANSIENT = ("", "badNonce", "serverInternal", "orderNotReady", "userActionRequired", "accountDoesNotExist")
_KEEP_FINISHED_S = 3600.0  # A finished certificate waits for its node, which retries within minutes
_ABANDON_AFTER_S = 2 * 3600.0  # If nothing requests an order for so long, its pods no longer exist
_REMOVE_FOR_S = 3 * 86400.0
"""How long the authority tries to remove challenge responses: longer than a weekend, so that people can repair DNS. A zone
that has moved to another server never accepts the removal, and its orders would hold their owner's share forever."""
_MIN_REMOVALS = 10  # Failed attempts, in 20 minutes: after an outage of days, the DNS server may start later
_REQUESTED_PRECISION_S = 600.0  # Limits writes to the store: a waiting node requests the order often
_MAX_TEXT = 400
_KEEP_BACKOFF_S = 86400.0  # After its end, to count consecutive failures


def after_problem(state: AcmeState, order: OrderRecord, problem: AcmeProblem, now: float) -> AcmeState:
    """Return the state after an order failed: at the CA, or without a code for any other transient reason."""
    key, text = names_id(order.names), problem.text[:_MAX_TEXT]
    if problem.code == "rateLimited" or problem.status in (429, 503):
        # 503 means that the CA is overloaded; a rate limit applies to these names or this account.
        default_s = _BUSY_S if problem.status == 503 else _RATE_LIMITED_S
        until = now + min(problem.retry_after_s or default_s, MAX_DELAY_S)
        if order.url or problem.status == 503:
            return state.with_order(_retry_at(order, text, until))
        failures, reason = state.failures(order.names), Reason.TOO_MANY_REQUESTS
        return _back_off(state, order, NamesBackoff(key, until, failures, reason.word, text, order.requester), now)
    if problem.status == 404 or problem.code == "accountDoesNotExist" or isinstance(problem, OrderUnusable):
        # The CA no longer has the order, or used it for another key: create it again.
        return state.with_order(replace(_retry(order, text, now), url=""))
    if problem.code in _TRANSIENT or problem.status >= 500:
        return state.with_order(_retry(order, text, now, problem.retry_after_s or 0.0))
    failures = state.failures(order.names) + 1
    reason = Reason.NAME_NOT_ALLOWED if problem.code in _REJECTED else Reason.ISSUER_UNAVAILABLE
    text = f"{text} ({problem.code[:_MAX_TEXT]})"
    until = now + _NAMES_RETRY.delay_s(failures)
    return _back_off(state, order, NamesBackoff(key, until, failures, reason.word, text, order.requester, now), now)


def backoff_error(backoff: NamesBackoff, names: Sequence[str]) -> CertmountError:
    hint = f"the authority retries after {timestamp(backoff.until)}"
    fault = Fault(", ".join(names), f"the CA rejected the order: {backoff.text}", hint)
    return CertmountError(REASONS[backoff.reason], fault)


def pending_error(order: OrderRecord) -> CertmountError:
    problem = f"the order of {timestamp(order.created_at)} is in progress"
    hint = "the certificate will be issued when the CA finishes"
    if order.problem:
        problem = f"{problem}; {order.problem}"
        hint = (
            f"the authority retries after {timestamp(order.retry_at)}" if order.retry_at else "the authority continues"
        )
    return CertmountError(Reason.ISSUANCE_PENDING, Fault(", ".join(order.names), problem, hint))


def _retry(order: OrderRecord, text: str, now: float, requested_s: float = 0.0) -> OrderRecord:
    failures = order.failures + 1
    delay_s = max(_RETRY.delay_s(failures), min(requested_s, MAX_DELAY_S))
    return replace(_retry_at(order, text, now + delay_s), failures=failures)


def _retry_at(order: OrderRecord, text: str, time: float) -> OrderRecord:
    return replace(order, holder="", lease_until=0.0, retry_at=time, problem=text)


def _back_off(state: AcmeState, order: OrderRecord, backoff: NamesBackoff, now: float) -> AcmeState:
    """Remove the order, and those that wait for it: with the backoff, their next request gets the CA's reason."""
    waiting = [
        one
        for one in state.orders
        if one.id != order.id and one.is_open and one.lease_until <= now
        if one.url in ("", order.url) and names_id(one.names) == backoff.names_id
    ]
    state = with_backoff(state, backoff)
    for one in (order, *waiting):
        state = state.without_order(one.id)
        if one.challenges:  # which remain to be removed
            state = state.with_order(replace(one, abandoned=True, holder="", lease_until=0.0, retry_at=0.0, failures=0))
    return state


def order_names(request: IssuerRequest, configuration: AcmeConfiguration) -> tuple[str, ...]:
    if request.tsig_secret:
        _check_tsig_secret(request.tsig_secret, configuration)
    names, grant, requested = request.csr.names, request.grant, request.requested
    key_type = request.csr.key_type
    faults = [
        Fault(str(name), "public CAs do not sign this kind of name", "use another issuer for it")
        for name in (*names.uris, *names.ips, *names.emails)
    ]
    if not names.dns:
        hint = "an ACME certificate contains only the requested names"
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


def _check_tsig_secret(tsig_secret: str, configuration: AcmeConfiguration) -> None:
    if configuration.dns01 is None:
        fault = Fault("tsigSecretName", "the issuer does not use DNS-01", "omit it")
        raise CertmountError(Reason.NAME_NOT_ALLOWED, fault)
    configuration.dns01.with_key_of(tsig_secret)


def wildcard_faults(names: Sequence[str]) -> list[Fault]:
    """Return a fault for each wildcard, which HTTP-01 does not support (RFC 8555 section 8.3)."""
    problem, hint = "HTTP-01 does not support wildcards", "ask an administrator to configure dns01 for the issuer"
    return [Fault(name, problem, hint) for name in names if name.startswith("*.")]


def request_order(state: AcmeState, requested: OrderRecord, now: float) -> AcmeState:
    """Return the state with the order; raise CertmountError if its names must wait, or if it exceeds a share."""
    known, names = state.order(requested.id), requested.names
    if known is not None and known.is_open:
        outdated = now - known.requested_at > _REQUESTED_PRECISION_S
        return state.with_order(replace(known, requested_at=now)) if outdated else state
    if known is not None and known.finished_at and now < _renewal_time(state, known):
        return state
    if backoff := state.backoff(names, now):
        raise backoff_error(backoff, names)
    remaining = known.challenges if known is not None else ()
    order = replace(requested, replaces=_certificate_to_renew(state, requested, now), challenges=remaining)
    check_shares(state, order, now)
    return make_room(state.with_order(order))


def _renewal_time(state: AcmeState, finished: OrderRecord) -> float:
    if (certificate := state.certificate(finished.id)) is not None:
        return certificate.renew_at
    # A certificate beyond the share of tracked ones is valid all the same: another order would be one for each retry.
    return default_renewal_time(x509.load_der_x509_certificate(finished.chain[0]))


def remove_expired(state: AcmeState, now: float) -> AcmeState:
    """Abandon orders that nothing requests, and remove what is no longer needed.

    Orders with challenges stay, except the unremovable ones.
    """
    unremovable = unremovable_orders(state, now)
    orders = []
    for one in state.orders:
        abandoned = one.is_open and one.lease_until <= now and now - one.requested_at > _ABANDON_AFTER_S
        order = replace(one, abandoned=True, retry_at=0.0, failures=0) if abandoned else one
        expired = order.abandoned or (order.finished_at and now - order.finished_at > _KEEP_FINISHED_S)
        if (order.challenges and one not in unremovable) or not expired:
            orders.append(order)
    return replace(
        state,
        orders=tuple(orders),
        backoffs=tuple(one for one in state.backoffs if now - one.until < _KEEP_BACKOFF_S),
        certificates=tuple(one for one in state.certificates if now < one.not_after),
    )


def unremovable_orders(state: AcmeState, now: float) -> tuple[OrderRecord, ...]:
    """Return the orders whose challenge responses the authority no longer tries to remove."""
    return tuple(
        one
        for one in state.orders
        if one.challenges and not one.is_open and one.lease_until <= now
        if one.failures >= _MIN_REMOVALS and now - max(one.requested_at, one.finished_at) > _REMOVE_FOR_S
    )


def claim_orders(state: AcmeState, holder: str, now: float, lease_s: float) -> AcmeState:
    """Renew the leases of ``holder``, and claim due orders without a lease within the shares of their owners.

    Orders of an account with the same names take turns, the one that is due the longest first. For such requests, a CA
    can return one order, which leads to a certificate for one key only.
    """
    shares = processing_shares(order for order in state.orders if order.holder == holder)
    in_turn = {_turn(one) for one in state.orders if one.is_open and (one.holder == holder or one.lease_until > now)}
    claimed = set()
    for order in sorted(state.orders, key=lambda one: max(one.created_at, one.retry_at)):
        if order.holder == holder or order.lease_until > now or order.retry_at > now or not order.is_unfinished:
            continue
        if (order.is_open and _turn(order) in in_turn) or not shares.fits(order.owners):
            continue
        shares.count(order.owners)
        claimed.add(order.id)
        if order.is_open:
            in_turn.add(_turn(order))

    def lease(order: OrderRecord) -> OrderRecord:
        # At half time, so that a short order needs no further write.
        renew = order.holder == holder and order.is_unfinished and order.lease_until - now < lease_s / 2
        return replace(order, holder=holder, lease_until=now + lease_s) if renew or order.id in claimed else order

    return replace(state, orders=tuple(map(lease, state.orders)))


def _turn(order: OrderRecord) -> tuple[tuple[str, ...], str]:
    return order.names, order.email


def release_orders(state: AcmeState, holder: str) -> AcmeState:
    """End the leases of a replica that stops, so that others can take its orders immediately."""
    orders = (replace(one, holder="", lease_until=0.0) if one.holder == holder else one for one in state.orders)
    return replace(state, orders=tuple(orders))


def _certificate_to_renew(state: AcmeState, order: OrderRecord, now: float) -> str:
    """Return the due certificate of the same account that an order replaces.

    CAs exempt such orders from rate limits (RFC 9773 section 5).
    """
    replaced = {one.replaces for one in state.orders if one.is_open}
    key = names_id(order.names), order.email
    same = [
        one for one in state.certificates if (one.names_id, one.email) == key and one.certificate_id not in replaced
    ]
    due = [one for one in same if one.renew_at <= now]
    return min(due, key=lambda one: one.renew_at).certificate_id if due else ""
