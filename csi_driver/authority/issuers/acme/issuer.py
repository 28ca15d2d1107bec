"""The ACME issuer: takes orders, works on those that no other replica works on, and looks after renewals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuance.interim import PATIENCE_S as STAND_IN_PATIENCE_S
from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.authority.issuers.acme.account import Accounts
from csi_driver.authority.issuers.acme.order_store import LeaseLost, OrderBook, claim, released
from csi_driver.authority.issuers.acme.chain import ends_at, lets_encrypt_roots
from csi_driver.authority.issuers.acme.client import CaProblem
from csi_driver.authority.issuers.acme.credentials import Credentials
from csi_driver.authority.issuers.acme.dns01 import DnsProofs
from csi_driver.authority.issuers.acme.diagnostics import findings
from csi_driver.authority.issuers.acme.order_rules import entered, tidied
from csi_driver.authority.issuers.acme.http01 import KIND as HTTP
from csi_driver.authority.issuers.acme.http01 import STALE_S, HttpProofs
from csi_driver.authority.issuers.acme.order import OrderWork, Prover, Workshop
from csi_driver.authority.issuers.acme.problems import after_problem, after_trouble, judge, pending, refusal
from csi_driver.authority.issuers.acme.renewal_watch import RenewalWatch
from csi_driver.authority.issuers.acme.routes import Routes
from csi_driver.authority.issuers.acme.settings import AcmeSettings
from csi_driver.authority.issuers.acme.state import OrderRecord, State, order_id
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.storage import Store
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates

log = structlog.get_logger(__name__)

PATIENCE_S = 80.0
"""The node's call ends after 90."""
LEASE_S = 60.0
_MOST_AT_ONCE = 32
"""Most of them wait, for name servers or the CA: those that wait in vain must not hold up the others."""
_THREADS = 4
_TICK_S = 5.0
_FILES_ONLY = CredentialReader()
_ACCOUNT_LOOK_S = 300.0
_LONGEST_RETRY_S = 300.0


class _After(Protocol):
    def __call__(self, state: State, order: OrderRecord, *, now: float) -> State: ...


class AcmeIssuer:
    """One account at one CA. All replicas share ``store``; what is in memory is a copy of it."""

    shares_certificates = True

    def __init__(
        self,
        name: str,
        settings: AcmeSettings,
        store: Store,
        secrets: CredentialReader = _FILES_ONLY,
        *,
        routes: Routes | None = None,
        clock: Callable[[], float] = time.time,
        patience_s: float = PATIENCE_S,
        lease_s: float = LEASE_S,
    ) -> None:
        self._name = name
        self._settings = settings
        self._clock = clock
        self._patience_s = patience_s if settings.while_pending is None else min(patience_s, STAND_IN_PATIENCE_S)
        self._lease_s = lease_s
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"acme-{name}")
        self._book = OrderBook(store, clock)
        credentials = Credentials(settings, secrets)
        self._accounts = Accounts(settings, credentials, store, self._executor)
        self._shop = Workshop(
            settings, credentials, self._book, self._accounts, _prover(settings, credentials, routes), self._executor, clock,
            holder=uuid.uuid4().hex,
        )  # fmt: skip
        self.renewals = RenewalWatch(self._shop)
        """What the CA says about certificates that are out."""
        self._working: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._store_problem: str | None = None
        self._account_problem: str | None = "the account is not known yet"
        self._roots: tuple[bytes, ...] = ()

    @property
    def while_pending(self) -> str | None:
        """The issuer that a pod starts with while its order is on its way; None where it waits."""
        return self._settings.while_pending

    @property
    def roots(self) -> tuple[bytes, ...]:
        """Those of the administrator's file, or Let's Encrypt's: never what a chain alone says."""
        return self._roots

    @property
    def problem(self) -> str | None:
        """See :class:`csi_driver.authority.issuers.external.ExternalIssuer`."""
        return self._store_problem or self._account_problem

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        """The certificate, if it is there within ``patience_s``.

        Raises:
            CertmountError: IssuancePending while it is on its way; NameNotAllowed for what the CA won't sign;
                TooManyRequests and IssuerUnavailable with the time at which the CA is asked again.
        """
        request = order.request
        names = judge(request.names, order.grant, order.asked, self._settings, request.key_type)
        own = order_id(names, public_bytes(request.public_key))
        deadline = time.monotonic() + self._patience_s
        await self._read_roots()
        state = await self._book.change(lambda state: entered(state, own, names, request.der, self._clock()))
        self._wake.set()
        while True:
            record = state.order(own)
            if record is None or record.given_up:
                block = state.block(names, self._clock())
                raise refusal(block, names) if block else _lost(names)
            if record.finished_at:
                return self._issued(record, state)
            left = deadline - time.monotonic()
            if left <= 0 or record.retry_at - self._clock() > left:
                raise pending(record)
            await self._book.wait(min(1.0, left))
            state = await self._book.read()

    async def run(self) -> None:
        """Works until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_account())
                group.create_task(self.renewals.run())
                while True:
                    await self._tick(group)
                    # Not wait_for, which in Python 3.11 loses a cancellation that comes together with the event.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(_TICK_S, self._lease_s / 4)):
                            await self._wake.wait()
                    self._wake.clear()
        finally:
            with contextlib.suppress(CertmountError):  # their leases run out
                await self._book.change(lambda state: released(state, self._shop.holder))

    async def check(self) -> list[Finding]:
        """See :class:`csi_driver.authority.issuers.external.ExternalIssuer`."""
        return await findings(self._settings, self._shop)

    async def http_answer(self, token: str) -> str | None:
        """See :class:`csi_driver.authority.issuers.external.Http01Responder`."""
        for max_age_s in (
            1.0,
            STALE_S,
        ):  # strangers may ask for anything: what is not known costs few looks at the store
            for record in (await self._book.read(max_age_s)).orders:
                for proof in record.proofs:
                    if proof.kind == HTTP and proof.token == token:
                        return proof.value
        return None

    def due(self) -> tuple[str, ...]:
        """Hexadecimal SHA-256 of the public keys (SubjectPublicKeyInfo) whose certificates the CA wants renewed by now."""
        now = self._clock()
        return tuple(one.key_sha256 for one in self._book.known.live if one.renew_at <= now < one.not_after)

    def _issued(self, record: OrderRecord, state: State) -> IssuedCertificate:
        live = state.live_certificate(record.id)
        renew_after = None if live is None else timedelta(seconds=max(live.renew_at - self._clock(), 1.0))
        if not ends_at(record.chain, self._roots):
            name = x509.load_der_x509_certificate(record.chain[-1]).issuer.rfc4514_string()
            hint = "add it to acme.roots; the certificate is kept for an hour"
            fault = Fault("acme.roots", f"the CA's chain leads to {name}, which is not among them", hint)
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault)
        return IssuedCertificate(record.chain, self._roots, renew_after, identity_included=False)

    async def _read_roots(self) -> None:
        """As they are now; raises CertmountError IssuerUnavailable."""
        file = self._settings.roots_file
        if file is None:
            self._roots = await asyncio.to_thread(lets_encrypt_roots)
            return
        try:
            content = await asyncio.to_thread(Path(file).read_bytes)
            self._roots = tuple(one.public_bytes(Encoding.DER) for one in decode_certificates(content))
        except (OSError, ValueError) as error:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(f"acme.roots: {file}", str(error))) from None

    async def _tick(self, group: asyncio.TaskGroup) -> None:
        """Takes what is to be worked on, keeps the leases, lets go of what others have taken."""
        try:
            now, holder = self._clock(), self._shop.holder
            state = await self._book.read(0.0)
            wanted = self._kept(state, now)
            if wanted != state:
                state = await self._book.change(lambda newest: self._kept(newest, now))
            self._store_problem = None
        except CertmountError as error:
            self._store_problem = str(error)
            return
        mine = {order.id for order in state.orders if order.holder == holder}
        for own in mine - self._working.keys():
            self._working[own] = task = group.create_task(self._work(own))
            task.add_done_callback(lambda _, own=own: self._finished(own))  # type: ignore[misc]  # a default binds the loop's value
        for own in self._working.keys() - mine:
            self._working[own].cancel()

    def _finished(self, own: str) -> None:
        self._working.pop(own, None)
        self._wake.set()

    def _kept(self, state: State, now: float) -> State:
        return claim(tidied(state, now), self._shop.holder, now, self._lease_s, _MOST_AT_ONCE)

    async def _work(self, own: str) -> None:
        try:
            await OrderWork(self._shop, own).run()
        except LeaseLost:
            return
        except CaProblem as problem:
            if problem.code == "accountDoesNotExist":
                self._accounts.forget()
            await self._told(own, functools.partial(after_problem, problem=problem), problem.text)
        except CertmountError as error:
            text = "; ".join(str(fault) for fault in error.faults)
            await self._told(own, functools.partial(after_trouble, text=text), text)
        except Exception as error:
            log.exception("a defect in the work on an ACME order", issuer=self._name)
            text = f"a defect in certmount ({type(error).__name__}); the authority's log has more"
            await self._told(own, functools.partial(after_trouble, text=text), text)

    async def _told(self, own: str, after: _After, text: str) -> None:
        """Writes down how the work on an order has ended."""
        log.warning("ACME order does not go on", issuer=self._name, problem=text)

        def change(state: State) -> State:
            order = state.order(own)
            if order is None or order.holder != self._shop.holder:
                return state
            return after(state, order, now=self._clock())

        try:
            await self._book.change(change)
        except CertmountError as error:
            self._store_problem = str(error)
            # The lease runs out or is renewed by the next tick: either way the order is not lost.
            await asyncio.sleep(_TICK_S)

    async def _watch_account(self) -> None:
        """Knows whether the CA can be used at all, also when nobody asks."""
        failures = 0
        while True:
            try:
                await self._read_roots()
                await self._accounts.look()
            except (CaProblem, CertmountError) as error:
                self._account_problem = str(error)
                failures += 1
                await asyncio.sleep(min(2.0**failures, _LONGEST_RETRY_S))
            else:
                self._account_problem, failures = None, 0
                await asyncio.sleep(_ACCOUNT_LOOK_S)


def _prover(settings: AcmeSettings, credentials: Credentials, routes: Routes | None) -> Prover:
    if settings.dns01 is not None:
        return DnsProofs(settings.dns01, credentials)
    if settings.http01 is not None:
        return HttpProofs(settings.http01, routes)
    fault = Fault("acme", "has neither dns01 nor http01, so no name can be proven to the CA")
    raise CertmountError(Reason.INVALID_REQUEST, fault)


def _lost(names: tuple[str, ...]) -> CertmountError:
    """The order went away while it was waited for, and nothing stands against its names: the next question makes a new one."""
    return CertmountError(Reason.ISSUANCE_PENDING, Fault(", ".join(names), "the order begins anew"))
