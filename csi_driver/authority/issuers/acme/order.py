"""Processes one order (RFC 8555 section 7.1.6), from wherever the last replica stopped."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import josepy.json_util
import structlog
from acme import messages
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from requests.utils import parse_header_links

from csi_driver.authority.issuers.acme.certificates import (
    CHECK_S,
    certificate_id,
    check_chain,
    default_renewal_time,
    fetch_window,
    parse_chain,
    select_chain,
)
from csi_driver.authority.issuers.acme.client import AcmeClient, AcmeProblem, check_url, parse
from csi_driver.authority.issuers.acme.context import AcmeContext, held_order
from csi_driver.authority.issuers.acme.order_shares import make_room, with_certificate
from csi_driver.authority.issuers.acme.state import AcmeState, OrderRecord, TrackedCertificate, names_id
from csi_driver.authority.issuers.http_client import HttpResponse
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError
from csi_driver.core.spec import MAX_NAMES

log = structlog.get_logger(__name__)

_POLL_S = 1.0
_MIN_DELAY_S = 0.2
_MAX_WAIT_S = 60.0  # For the CA; then another order gets the place of this one
_MAX_STEPS = 100
_MAX_AUTHORIZATIONS = 2 * MAX_NAMES
_MAX_ALTERNATES = 5
_MAX_TOKEN_LENGTH = 256
_MAX_TEXT = 400


class NewOrder(messages.NewOrder):
    """Adds a field that the library lacks: the certificate that the order renews (RFC 9773 section 5)."""

    replaces: str | None = josepy.json_util.field("replaces", omitempty=True)


class OrderProcessor:
    """Processes one order while its replica holds the lease."""

    def __init__(self, context: AcmeContext, order_id: str) -> None:
        self._context = context
        self._id = order_id
        self._solver = context.solver  # with the TSIG key of the order, when :meth:`run` knows the order
        self._wait_until = 0.0  # Seconds of the event loop's clock

    async def run(self) -> None:
        """Process the order until the certificate is stored; raise AcmeProblem, CertmountError or LeaseLost."""
        order = held_order(await self._context.orders.read(0.0), self._id, self._context.holder)
        if not order.is_open:
            await self._context.unpublish_challenges(order)
            await self._change(lambda one: replace(one, holder="", problem="", failures=0))
            return
        self._solver = self._context.solver.using(order.tsig_secret)
        async with self._context.accounts.connect(order.email) as client:
            if not order.url:
                await self._solver.check(order.names)
                await self._create(client, order)
            self._wait_until = asyncio.get_running_loop().time() + _MAX_WAIT_S
            for _ in range(_MAX_STEPS):
                if await self._advance(client):
                    return
        raise AcmeProblem("", f"the CA has not finished the order after {_MAX_STEPS} steps")

    async def _create(self, client: AcmeClient, order: OrderRecord) -> None:
        replaces = order.replaces if "renewalInfo" in client.directory.to_partial_json() else ""
        try:
            response = await self._send_new_order(client, order, replaces)
        except AcmeProblem as problem:
            if not replaces or problem.code not in ("alreadyReplaced", "conflict", "malformed", "unauthorized"):
                raise
            # Another order replaces that certificate, or the CA or the account does not know it: order without the hint.
            response = await self._send_new_order(client, order, "")
        url = response.headers.get("Location", "")
        if not url:
            raise AcmeProblem("", "the response to a new order lacks its URL")
        await self._change(lambda one: replace(one, url=check_url(url)))
        log.info("ACME order created", order=url, names=order.names)

    async def _send_new_order(self, client: AcmeClient, order: OrderRecord, replaces: str) -> HttpResponse:
        identifiers = [messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name) for name in order.names]
        body = NewOrder(identifiers=identifiers, profile=self._context.configuration.profile, replaces=replaces or None)
        return await client.send(client.directory["newOrder"], body)

    async def _advance(self, client: AcmeClient) -> bool:
        order = held_order(self._context.orders.known, self._id, self._context.holder)
        response = await client.send(order.url)
        remote = parse(messages.Order, response)
        if remote.status == messages.STATUS_PENDING:
            await self._authorize(client, remote, order)
            await self._wait(response)
        elif remote.status == messages.STATUS_READY:
            await self._finalize(client, remote, order)
        elif remote.status == messages.STATUS_PROCESSING:
            await self._wait(response)
        elif remote.status == messages.STATUS_VALID:
            await self._download(client, remote, order)
            return True
        elif remote.status == messages.STATUS_INVALID:
            raise _invalid(remote.error)
        else:
            raise AcmeProblem("", "the order of the CA has no valid status")
        return False

    async def _authorize(self, client: AcmeClient, remote: messages.Order, order: OrderRecord) -> None:
        urls: object = remote.authorizations
        if not isinstance(urls, list | tuple) or len(urls) > _MAX_AUTHORIZATIONS:
            raise AcmeProblem("", f"the order has no list of at most {_MAX_AUTHORIZATIONS} authorizations")
        pending = {}
        for url in urls:
            authorization, _ = await self._authorization(client, url, order)
            if authorization.status == messages.STATUS_PENDING:
                pending[url] = authorization
        selected = [(str(one.identifier.value), self._select_challenge(one)) for one in pending.values()]
        unsolved = [(name, one) for name, one in selected if one.status == messages.STATUS_PENDING]
        prepare = self._solver.prepare
        challenges = [
            await prepare(name, one.chall.encode("token"), one.chall.key_authorization(client.key))
            for name, one in unsolved
        ]
        if challenges:
            # Stored before they are published, so that after a crash another replica knows what to unpublish.
            await self._change(lambda one: one.with_challenges(challenges))
            await self._solver.publish(challenges)
            self._wait_until = asyncio.get_running_loop().time() + _MAX_WAIT_S
        for _, challenge in unsolved:
            await client.send(challenge.uri, challenge.chall.response(client.key))
        for url in pending:
            authorization, response = await self._authorization(client, url, order)
            while authorization.status == messages.STATUS_PENDING:
                await self._wait(response)
                authorization, response = await self._authorization(client, url, order)

    async def _authorization(
        self, client: AcmeClient, url: str, order: OrderRecord
    ) -> tuple[messages.Authorization, HttpResponse]:
        response = await client.send(url)
        authorization = parse(messages.Authorization, response)
        name = getattr(authorization.identifier, "value", None)
        # Otherwise the CA could have other names published.
        if name not in {one.removeprefix("*.") for one in order.names}:
            raise AcmeProblem(
                "", f"the CA requires an authorization for {name!r:.100}, which the order does not contain"
            )
        if authorization.status not in (messages.STATUS_PENDING, messages.STATUS_VALID):
            errors = [one.error for one in authorization.challenges or () if one.error is not None]
            raise _invalid(errors[0] if errors else None, f"{authorization.identifier.value}: ")
        return authorization, response

    def _select_challenge(self, authorization: messages.Authorization) -> messages.ChallengeBody:
        kind, challenges = self._solver.kind, authorization.challenges or ()
        for challenge in challenges:
            if challenge.chall.typ == kind:
                if len(challenge.chall.token) > _MAX_TOKEN_LENGTH:
                    raise AcmeProblem("", f"the token of a challenge is longer than {_MAX_TOKEN_LENGTH} bytes")
                return challenge
        offered = ", ".join(sorted(one.chall.typ for one in challenges))[:_MAX_TEXT]
        text = f"the CA does not offer {kind} for {authorization.identifier.value}; it offers {offered}"
        raise AcmeProblem("unsupportedIdentifier", text)

    async def _finalize(self, client: AcmeClient, remote: messages.Order, order: OrderRecord) -> None:
        try:
            await self._context.unpublish_challenges(order)
        except CertmountError as error:
            log.warning("ACME challenge responses not removed; retrying later", names=order.names, error=str(error))
        body = messages.CertificateRequest(csr=x509.load_der_x509_csr(order.csr))
        try:
            await self._wait(await client.send(remote.finalize, body))
        except AcmeProblem as problem:
            if problem.code != "orderNotReady":
                raise

    async def _download(self, client: AcmeClient, remote: messages.Order, order: OrderRecord) -> None:
        chain = await self._fetch_chain(client, remote.certificate or "")
        check_chain(chain, order.csr)
        now = self._context.clock()
        certificate = await self._track(client, chain[0], order, now)
        ders = tuple(one.public_bytes(Encoding.DER) for one in chain)

        def finish(state: AcmeState) -> AcmeState:
            held = held_order(state, self._id, self._context.holder)
            finished = replace(held, chain=ders, finished_at=now, holder="", problem="", failures=0)
            state = state.with_order(finished).without_backoff(order.names)
            state = state.without_certificate(order.replaces) if order.replaces else state
            return with_certificate(make_room(state), certificate)

        await self._context.orders.change(finish)
        self._context.count_order("issued")
        log.info("ACME certificate issued", order=order.url, names=order.names, not_after=certificate.not_after)

    async def _fetch_chain(self, client: AcmeClient, url: str) -> tuple[x509.Certificate, ...]:
        response = await client.send(url)
        chains = [parse_chain(response.body)]
        preferred = self._context.configuration.preferred_chain
        if preferred is not None:
            links = parse_header_links(", ".join(response.headers.getall("Link", [])))
            alternates = [link["url"] for link in links if link.get("rel") == "alternate"]
            chains += [parse_chain((await client.send(one)).body) for one in alternates[:_MAX_ALTERNATES]]
        return select_chain(chains, preferred)

    async def _track(
        self, client: AcmeClient, leaf: x509.Certificate, order: OrderRecord, now: float
    ) -> TrackedCertificate:
        key_sha256 = key_fingerprint(leaf.public_key())  # type: ignore[arg-type]  # all keys have this method
        identifier, renew_at, check_at = certificate_id(leaf), default_renewal_time(leaf), now + CHECK_S
        try:
            window = await fetch_window(client, identifier, now)
        except (AcmeProblem, CertmountError) as error:
            log.warning("ACME renewal information unavailable", order=order.url, error=str(error))
            window = None
        if window is not None:
            renew_at, check_at = window.renewal_time(random.random()), window.check_at  # noqa: S311  # spreads load
        not_after = leaf.not_valid_after_utc.timestamp()
        names = names_id(order.names)
        times = (not_after, renew_at, check_at)
        return TrackedCertificate(order.id, names, key_sha256, identifier, *times, order.requester, order.email)

    async def _wait(self, response: HttpResponse) -> None:
        """Wait as long as the CA requests; raise AcmeProblem if that is too long to keep the place."""
        delay_s = max(_POLL_S if response.retry_after_s is None else response.retry_after_s, _MIN_DELAY_S)
        if asyncio.get_running_loop().time() + delay_s > self._wait_until:
            raise AcmeProblem("", "the CA is still processing the order", retry_after_s=delay_s)
        await asyncio.sleep(delay_s)

    async def _change(self, step: Callable[[OrderRecord], OrderRecord]) -> None:
        await self._context.orders.change_order(self._id, self._context.holder, step)


def _invalid(error: Any, subject: str = "") -> AcmeProblem:
    if error is None:
        return AcmeProblem("unknown", f"{subject}the CA marked the order invalid without a reason")
    return AcmeProblem(error.code or "unknown", f"{subject}{error.detail or error.typ}"[:_MAX_TEXT])
