"""One order's way through the CA (RFC 8555 section 7.1.6), from wherever the last replica left it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import josepy.json_util
import structlog
from acme import messages
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from josepy.errors import Error as JoseError
from requests import Response
from requests.utils import parse_header_links

from csi_driver.authority.issuers.acme.account import Accounts
from csi_driver.authority.issuers.acme.order_store import OrderBook, held
from csi_driver.authority.issuers.acme.chain import certificate_id, check_chain, chosen, parse_chain
from csi_driver.authority.issuers.acme.client import CaProblem, Connection, retry_after_s
from csi_driver.authority.issuers.acme.credentials import Credentials
from csi_driver.authority.issuers.acme.renewal import ask_window, next_look, renewal_without_advice
from csi_driver.authority.issuers.acme.settings import AcmeSettings
from csi_driver.authority.issuers.acme.state import LiveCertificate, OrderRecord, Proof, State, names_id
from csi_driver.core.errors import CertmountError

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_POLL_S = 1.0
_LONGEST_PAUSE_S = 3600.0


class Prover(Protocol):
    """Shows the CA that names are ours."""

    @property
    def kind(self) -> str:
        """The challenge type, such as ``dns-01``."""

    async def examine(self, names: Sequence[str]) -> None:
        """Raises CertmountError where it can be told already that names can't be proven."""

    async def prepare(self, name: str, token: str, key_authorization: str) -> Proof:
        """What is to be shown; changes nothing."""

    async def show(self, proofs: Sequence[Proof]) -> None:
        """Shows it, and returns when the CA would see it; raises CertmountError."""

    async def hide(self, proof: Proof) -> None:
        """Takes it away, also where it is not there; raises CertmountError."""


class NewOrder(messages.NewOrder):
    """With what the library lacks: the certificate that is renewed (RFC 9773 section 5)."""

    replaces: str | None = josepy.json_util.field("replaces", omitempty=True)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What work on an order needs."""

    settings: AcmeSettings
    credentials: Credentials
    book: OrderBook
    accounts: Accounts
    prover: Prover
    executor: Executor
    clock: Callable[[], float]
    holder: str

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The synchronous library's calls."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, functools.partial(function, *args, **kwargs))

    async def hide(self, record: OrderRecord) -> OrderRecord:
        """Removes all that an order shows, and strikes it out; raises CertmountError at the first that stays."""
        for proof in record.proofs:
            if not _shown_by_another(self.book.known, record.id, proof):
                await self.prover.hide(proof)
            record = await self.book.change_order(
                record.id,
                self.holder,
                lambda one, gone=proof: dataclasses.replace(one, proofs=tuple(p for p in one.proofs if p != gone)),  # type: ignore[misc]  # a default binds the loop's value
            )
        return record


class OrderWork:
    """Works on one order for as long as its replica has the lease."""

    def __init__(self, workshop: Workshop, order_id: str) -> None:
        self._shop = workshop
        self._id = order_id

    async def run(self) -> None:
        """To the certificate, or to the end of what an order left behind.

        Raises:
            CaProblem: what the CA has against it.
            CertmountError: what may pass.
            LeaseLost: where another replica has taken over.
        """
        record = held(await self._shop.book.read(0.0), self._id, self._shop.holder)
        if not record.is_open:
            await self._shop.hide(record)
            await self._change(lambda one: dataclasses.replace(one, holder="", trouble="", attempts=0))
            return
        connection = await self._shop.accounts.connect()
        if not record.url:
            await self._shop.prover.examine(record.names)
            await self._open(connection, record)
        while not await self._advanced(connection):
            pass

    async def _open(self, connection: Connection, record: OrderRecord) -> None:
        """Makes the order (RFC 8555 section 7.4)."""
        directory = connection.directory
        replaces = record.replaces if "renewalInfo" in directory.to_partial_json() else ""
        try:
            answer = await self._shop.in_thread(self._ordered, connection, record, replaces)
        except CaProblem as problem:
            if not replaces or problem.code not in ("alreadyReplaced", "conflict", "malformed"):
                raise
            # The predecessor is another order's already, or unknown there: the CA loses a hint, nobody a certificate.
            answer = await self._shop.in_thread(self._ordered, connection, record, "")
        url = answer.headers.get("Location", "")
        if not url:
            raise CaProblem("", "answers an order without saying which")
        await self._change(lambda one: dataclasses.replace(one, url=url))
        log.info("ACME order opened", order=url, names=record.names)

    def _ordered(self, connection: Connection, record: OrderRecord, replaces: str) -> Response:
        identifiers = [messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name) for name in record.names]
        body = NewOrder(identifiers=identifiers, profile=self._shop.settings.profile, replaces=replaces or None)
        return connection.send(connection.directory["newOrder"], body)

    async def _advanced(self, connection: Connection) -> bool:
        """One step, by the state that the order has at the CA; True when the certificate is there."""
        record = held(self._shop.book.known, self._id, self._shop.holder)
        answer = await self._shop.in_thread(connection.send, record.url)
        order = _parsed(messages.Order, answer)
        if order.status == messages.STATUS_PENDING:
            await self._authorise(connection, order)
        elif order.status == messages.STATUS_READY:
            await self._finalize(connection, order, record)
        elif order.status == messages.STATUS_PROCESSING:
            await _pause(answer)
        elif order.status == messages.STATUS_VALID:
            await self._take(connection, order, record)
            return True
        else:
            raise _invalid(order.error)
        return False

    async def _authorise(self, connection: Connection, order: messages.Order) -> None:
        """Proves what is not proven yet (RFC 8555 section 7.5)."""
        pending = {}
        for url in order.authorizations:
            authorization, _ = await self._authorization(connection, url)
            if authorization.status == messages.STATUS_PENDING:
                pending[url] = authorization
        challenges = [(str(one.identifier.value), self._challenge(one)) for one in pending.values()]
        unanswered = [(name, one) for name, one in challenges if one.status == messages.STATUS_PENDING]
        proofs = [await self._proof(connection, name, one) for name, one in unanswered]
        if proofs:
            # Written down first: whoever finds this after a crash knows what to remove.
            await self._change(
                lambda one: dataclasses.replace(one, proofs=tuple(dict.fromkeys((*one.proofs, *proofs))))
            )
            await self._shop.prover.show(proofs)
        for _, challenge in unanswered:
            response = challenge.chall.response(connection.key)
            await self._shop.in_thread(connection.send, challenge.uri, response)
        for url in pending:
            authorization, answer = await self._authorization(connection, url)
            while authorization.status == messages.STATUS_PENDING:
                await _pause(answer)
                authorization, answer = await self._authorization(connection, url)

    async def _authorization(self, connection: Connection, url: str) -> tuple[messages.Authorization, Response]:
        """Pending or valid; raises CaProblem for any other."""
        answer = await self._shop.in_thread(connection.send, url)
        authorization = _parsed(messages.Authorization, answer)
        if authorization.status not in (messages.STATUS_PENDING, messages.STATUS_VALID):
            errors = [one.error for one in authorization.challenges or () if one.error is not None]
            raise _invalid(errors[0] if errors else None, f"{authorization.identifier.value}: ")
        return authorization, answer

    def _challenge(self, authorization: messages.Authorization) -> messages.ChallengeBody:
        kind, challenges = self._shop.prover.kind, authorization.challenges or ()
        for challenge in challenges:
            if challenge.chall.typ == kind:
                return challenge
        offered = ", ".join(sorted(one.chall.typ for one in challenges))
        name = authorization.identifier.value
        raise CaProblem("unsupportedIdentifier", f"{name} cannot be proven by {kind}; the CA offers {offered}")

    async def _proof(self, connection: Connection, name: str, challenge: messages.ChallengeBody) -> Proof:
        token = challenge.chall.encode("token")
        return await self._shop.prover.prepare(name, token, challenge.chall.key_authorization(connection.key))

    async def _finalize(self, connection: Connection, order: messages.Order, record: OrderRecord) -> None:
        """Hands in the node's request (RFC 8555 section 7.4); the proofs have served."""
        try:
            await self._shop.hide(record)
        except CertmountError as error:
            log.warning("ACME proofs are still to be removed", names=record.names, problem=str(error))
        request = messages.CertificateRequest(csr=x509.load_der_x509_csr(record.csr))
        try:
            await _pause(await self._shop.in_thread(connection.send, order.finalize, request))
        except CaProblem as problem:
            if problem.code != "orderNotReady":
                raise

    async def _take(self, connection: Connection, order: messages.Order, record: OrderRecord) -> None:
        """Downloads the certificate and keeps it for who asks."""
        chain = await self._shop.in_thread(self._downloaded, connection, order.certificate or "")
        check_chain(chain, record.csr)
        now = self._shop.clock()
        live = await self._live(connection, chain[0], record, now)
        finished = functools.partial(
            dataclasses.replace,
            chain=tuple(one.public_bytes(Encoding.DER) for one in chain), finished_at=now, holder="", trouble="", attempts=0,
        )  # fmt: skip

        def done(state: State) -> State:
            state = state.with_order(finished(held(state, self._id, self._shop.holder))).without_block(record.names)
            return (state.without_live(record.replaces) if record.replaces else state).with_live(live)

        await self._shop.book.change(done)
        log.info("ACME certificate issued", order=record.url, names=record.names, not_after=live.not_after)

    def _downloaded(self, connection: Connection, url: str) -> tuple[x509.Certificate, ...]:
        answer = connection.send(url)
        chains = [parse_chain(answer.text)]
        if self._shop.settings.preferred_chain is not None:
            links = parse_header_links(answer.headers.get("Link", ""))
            others = [link["url"] for link in links if link.get("rel") == "alternate"]
            chains += [parse_chain(connection.send(other).text) for other in others]
        return chosen(chains, self._shop.settings.preferred_chain)

    async def _live(
        self, connection: Connection, leaf: x509.Certificate, record: OrderRecord, now: float
    ) -> LiveCertificate:
        key = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        renew_at, look_at, name = renewal_without_advice(leaf), next_look(now), certificate_id(leaf)
        try:
            window = await self._shop.in_thread(ask_window, connection, name, now)
        except (CaProblem, CertmountError) as error:
            log.warning("ACME renewal information is missing", order=record.url, problem=str(error))
            window = None
        if window is not None:
            renew_at, look_at = window.moment(random.random()), window.look_at  # noqa: S311  # spreads load
        return LiveCertificate(
            record.id, names_id(record.names), hashlib.sha256(key).hexdigest(), name,
            leaf.not_valid_after_utc.timestamp(), renew_at, look_at,
        )  # fmt: skip

    async def _change(self, change: Callable[[OrderRecord], OrderRecord]) -> OrderRecord:
        return await self._shop.book.change_order(self._id, self._shop.holder, change)


def _shown_by_another(state: State, order_id: str, proof: Proof) -> bool:
    """CAs may give two orders one authorisation, and so one record."""
    return any(proof in order.proofs for order in state.orders if order.id != order_id and order.is_open)


def _parsed(kind: type[T], answer: Response) -> T:
    try:
        return kind.from_json(answer.json())  # type: ignore[attr-defined, no-any-return]  # both kinds have it
    except (JoseError, ValueError):
        raise CaProblem("", "answers with something that is not ACME", answer.status_code) from None


def _invalid(error: Any, subject: str = "") -> CaProblem:
    if error is None:
        return CaProblem("unknown", f"{subject}the CA has given the order up without saying why")
    return CaProblem(error.code or "unknown", f"{subject}{error.detail or error.typ}")


async def _pause(answer: Response) -> None:
    """As long as the CA asks for."""
    asked = retry_after_s(answer)
    await asyncio.sleep(min(max(_POLL_S if asked is None else asked, 0.2), _LONGEST_PAUSE_S))
