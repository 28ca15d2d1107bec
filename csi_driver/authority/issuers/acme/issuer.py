"""The ACME issuer: accepts requests, processes the orders that no other replica processes, and tracks renewals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import Findings, IssuedCertificate, Issuer, IssuerRequest, issuer_unavailable
from csi_driver.authority.issuers.acme.account import AcmeAccounts
from csi_driver.authority.issuers.acme.certificates import RenewalInfoPoller, lets_encrypt_roots
from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.acme.context import AcmeContext, ChallengeSolver, LeaseLost, OrderStore
from csi_driver.authority.issuers.acme.diagnostics import diagnose_acme
from csi_driver.authority.issuers.acme.dns01 import Dns01Solver
from csi_driver.authority.issuers.acme.http01 import MAX_STORE_AGE_S, Http01Solver
from csi_driver.authority.issuers.acme.order import OrderProcessor
from csi_driver.authority.issuers.acme.order_rules import (
    after_problem,
    backoff_error,
    claim_orders,
    order_names,
    pending_error,
    release_orders,
    remove_expired,
    request_order,
    unremovable_orders,
)
from csi_driver.authority.issuers.acme.state import AcmeState, OrderRecord, TrackedCertificate, order_id
from csi_driver.authority.issuers.dependencies import ChallengeRoutes, CredentialReader
from csi_driver.authority.issuers.external_issuer import ends_at_root
from csi_driver.authority.storage import Store
from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates

log = structlog.get_logger(__name__)

_WAIT_S = 80.0  # The node's call ends after 90 s
_INTERIM_WAIT_S = 4.0  # With an interim certificate: enough for a CA that has valid authorizations
_LEASE_S = 60.0
_INTERVAL_S = 5.0
_CHECK_ACCOUNT_S = 300.0
_ACCOUNT_BACKOFF = Backoff(2.0, 300.0)


@dataclass(eq=False)
class AcmeIssuer(Issuer):
    """One account at one CA. All replicas share ``store``; the state in memory is a copy of it."""

    name: str
    configuration: AcmeConfiguration
    store: Store
    credentials: CredentialReader = CredentialReader()
    _: KW_ONLY
    routes: ChallengeRoutes | None = None
    count_order: Callable[[str], None] = lambda _result: None
    clock: Callable[[], float] = time.time
    wait_s: float = _WAIT_S
    lease_s: float = _LEASE_S

    def __post_init__(self) -> None:
        configuration, credentials, clock = self.configuration, self.credentials, self.clock
        self.shares_certificates = self.has_accounts = True
        self.own_email = configuration.email or ""
        self.while_pending = configuration.while_pending
        if self.while_pending is not None:
            self.wait_s = min(self.wait_s, _INTERIM_WAIT_S)
        self._orders = OrderStore(self.store, clock)
        self._accounts = accounts = AcmeAccounts(configuration, credentials, self.store)
        services = (self._orders, accounts, self._solver(), clock)
        self._context = AcmeContext(
            configuration, credentials, *services, holder=uuid.uuid4().hex, count_order=self.count_order
        )
        self.renewals = RenewalInfoPoller(self._context)
        self._processing: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._store_problem: str | None = None
        self._account_problem: str | None = "the account is not registered yet"
        self._roots: tuple[bytes, ...] = ()

    @property
    def environment(self) -> str:
        return self.configuration.directory

    @property
    def roots(self) -> tuple[bytes, ...]:
        """The roots in the administrator's file, or Let's Encrypt's; never a root that only a chain contains."""
        return self._roots

    @property
    def problem(self) -> str | None:
        return self._store_problem or self._account_problem

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        names = order_names(request, self.configuration)
        email = request.acme_email if request.acme_email != self.own_email else ""
        own = order_id(names, public_bytes(request.csr.public_key), email, request.tsig_secret)
        deadline = time.monotonic() + self.wait_s
        await self._read_roots()
        now, requester = self.clock(), request.identity.principal.label
        order = OrderRecord(
            own, names, request.csr.der, now, now,
            requester=requester, email=email, tsig_secret=request.tsig_secret,
        )  # fmt: skip
        step = functools.partial(request_order, requested=order, now=now)
        state = await self._orders.read()
        # A repeated or refused request must not cost a read of the store, which others would wait for.
        if step(state) != state:
            await self._accounts.create(email, request.identity.principal.namespace)
            state = await self._orders.change(step)
        self._wake.set()
        while True:
            known = state.order(own)
            if known is None or known.abandoned:
                backoff = state.backoff(names, self.clock())
                if backoff is not None:
                    raise backoff_error(backoff, names)
                fault = Fault(", ".join(names), "the order was removed; the next call creates a new one")
                raise CertmountError(Reason.ISSUANCE_PENDING, fault)
            if known.finished_at:
                return self._certificate(known, state)
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or known.retry_at - self.clock() > remaining_s:
                raise pending_error(known)
            await self._orders.wait(min(1.0, remaining_s))
            state = await self._orders.read()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._check_account_periodically())
                group.create_task(self.renewals.run())
                while True:
                    await self._assign_orders(group)
                    # Not wait_for: in Python 3.11 it loses a cancellation that arrives together with the event.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(_INTERVAL_S, self.lease_s / 4)):
                            await self._wake.wait()
                    self._wake.clear()
        finally:
            with contextlib.suppress(CertmountError):  # the leases expire
                await self._orders.change(lambda state: release_orders(state, self._context.holder))

    async def diagnose(self) -> Findings:
        return await diagnose_acme(self._context)

    async def http01_response(self, token: str) -> str | None:
        # Anyone can request any token, so unknown tokens must cause few reads of the store.
        for max_age_s in (1.0, MAX_STORE_AGE_S):
            for order in (await self._orders.read(max_age_s)).orders:
                for challenge in order.challenges:
                    if challenge.kind == Http01Solver.kind and challenge.token == token:
                        return challenge.value
        return None

    def renewals_due(self) -> tuple[str, ...]:
        return tuple(one.key_sha256 for one in self._due())

    def keys_to_replace(self) -> tuple[str, ...]:
        return tuple(one.key_sha256 for one in self._due() if one.early)

    def _due(self) -> list[TrackedCertificate]:
        now = self.clock()
        return [one for one in self._orders.known.certificates if one.renew_at <= now < one.not_after]

    def _certificate(self, order: OrderRecord, state: AcmeState) -> IssuedCertificate:
        last = x509.load_der_x509_certificate(order.chain[-1])
        if not ends_at_root([last], self._roots):
            problem = f"the CA's chain ends at {last.issuer.rfc4514_string()}, which is not one of the roots"
            hint = "add it to acme.roots; the certificate is stored for an hour"
            raise issuer_unavailable("acme.roots", problem, hint)
        tracked = state.certificate(order.id)
        renew_after = None if tracked is None else timedelta(seconds=max(tracked.renew_at - self.clock(), 1.0))
        return IssuedCertificate(order.chain, self._roots, renew_after)

    async def _read_roots(self) -> None:
        file = self.configuration.roots_file
        if file is None:
            self._roots = await asyncio.to_thread(lets_encrypt_roots)
            return
        try:
            content = await asyncio.to_thread(Path(file).read_bytes)
            self._roots = tuple(one.public_bytes(Encoding.DER) for one in decode_certificates(content))
        except (OSError, ValueError) as error:
            raise issuer_unavailable(f"acme.roots: {file}", str(error)) from None

    async def _assign_orders(self, group: asyncio.TaskGroup) -> None:
        try:
            now = self.clock()
            state = await self._orders.read(0.0)
            if self._claim(state, now) != state:
                state = await self._change_leases(now)
            self._store_problem = None
        except CertmountError as error:
            self._store_problem = str(error)
            return
        held = {order.id for order in state.orders if order.holder == self._context.holder}
        for own in held - self._processing.keys():
            self._processing[own] = task = group.create_task(self._process(own))
            task.add_done_callback(lambda _, own=own: self._finished(own))  # type: ignore[misc]  # a default binds the loop's value
        for own in self._processing.keys() - held:
            self._processing[own].cancel()

    async def _change_leases(self, now: float) -> AcmeState:
        unremovable: tuple[OrderRecord, ...] = ()

        def step(newest: AcmeState) -> AcmeState:
            nonlocal unremovable
            unremovable = unremovable_orders(newest, now)
            return self._claim(newest, now)

        state = await self._orders.change(step)
        for order in unremovable:
            text = "ACME challenge responses cannot be removed; remove them yourself if they still exist"
            records = [one.published for one in order.challenges]
            log.warning(text, issuer=self.name, records=records, error=order.problem)
        return state

    def _claim(self, state: AcmeState, now: float) -> AcmeState:
        return claim_orders(remove_expired(state, now), self._context.holder, now, self.lease_s)

    def _finished(self, own: str) -> None:
        self._processing.pop(own, None)
        self._wake.set()

    async def _process(self, own: str) -> None:
        try:
            await OrderProcessor(self._context, own).run()
        except LeaseLost:
            return
        except AcmeProblem as problem:
            if problem.code == "accountDoesNotExist":
                self._accounts.forget(self._email_of(own))
            await self._record_failure(own, problem)
        except CertmountError as error:
            await self._record_failure(own, AcmeProblem("", "; ".join(str(fault) for fault in error.faults)))
        except Exception as error:
            log.exception("unexpected error while processing an ACME order", issuer=self.name)
            text = f"unexpected error ({type(error).__name__}); see the authority's log"
            await self._record_failure(own, AcmeProblem("", text))

    def _email_of(self, own: str) -> str:
        order = self._orders.known.order(own)
        return order.email if order is not None else ""

    async def _record_failure(self, own: str, problem: AcmeProblem) -> None:
        log.warning("ACME order failed", issuer=self.name, error=problem.text)
        self.count_order("failed")

        def step(state: AcmeState) -> AcmeState:
            order = state.order(own)
            if order is None or order.holder != self._context.holder:
                return state
            return after_problem(state, order, problem, self.clock())

        try:
            await self._orders.change(step)
        except CertmountError as error:
            self._store_problem = str(error)
            # The lease expires, or the next interval renews it: the order is not lost.
            await asyncio.sleep(_INTERVAL_S)

    async def _check_account_periodically(self) -> None:
        failures = 0
        while True:
            try:
                await self._read_roots()
                await self._accounts.refresh_directory()
            except (AcmeProblem, CertmountError) as error:
                self._account_problem = str(error)
                failures += 1
                await asyncio.sleep(_ACCOUNT_BACKOFF.delay_s(failures))
            else:
                self._account_problem, failures = None, 0
                await asyncio.sleep(_CHECK_ACCOUNT_S)

    def _solver(self) -> ChallengeSolver:
        if self.configuration.dns01 is not None:
            return Dns01Solver(self.configuration.dns01, self.credentials)
        if self.configuration.http01 is not None:
            return Http01Solver(self.configuration.http01, self.routes)
        raise CertmountError(Reason.INVALID_REQUEST, Fault("acme", "sets neither dns01 nor http01"))
