"""The internal CA as it lives: made at the first start, its intermediate renewed in time, shared by all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from csi_driver.authority.ca_store import Store
from csi_driver.authority.keyring import Keyring, dump_keyring, make_keyring
from csi_driver.authority.keyring_check import load_keyring
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.trust import RootSet
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

REFRESH_S = 60.0
"""How long a replica may go on with an intermediate or root that another one has replaced."""
_MOST_CONFLICTS = 10


def utc_now() -> datetime:
    """The time in whole seconds, as certificates hold it."""
    return datetime.now(UTC).replace(microsecond=0)


class CertificateAuthority:
    """Holds the current keyring. What a store holds wrongly is never overwritten, and never replaces what is held."""

    def __init__(self, store: Store, metrics: AuthorityMetrics, clock: Callable[[], datetime] = utc_now) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._current: Keyring | None = None
        self._trust = RootSet((), 0)

    @property
    def trust(self) -> RootSet:
        """What pods are to trust; empty while the CA is not loaded."""
        return self._trust

    @property
    def current(self) -> Keyring:
        """The keyring to sign with; raises CertmountError IssuerUnavailable where there is none that is valid."""
        keyring = self._current
        if keyring is None:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the internal CA is not loaded yet")
        return keyring

    @property
    def usable(self) -> bool:
        """True while there is an intermediate that is valid now."""
        keyring = self._current
        return keyring is not None and self._clock() < keyring.intermediate.certificate.not_valid_after_utc

    async def refresh(self) -> Keyring:
        """Loads the CA from the store; makes it, or a new intermediate, where that is due.

        Raises:
            CertmountError: InvalidCA for a store with unusable content, or what the store raised.
        """
        for _ in range(_MOST_CONFLICTS):
            stored = await self._store.load()
            now = self._clock()
            if not stored.values:
                keyring = make_keyring(now)
            else:
                keyring = load_keyring(stored.values, now, where=self._store.name)
                if not keyring.wants_intermediate(now):
                    return self._hold(keyring)
                keyring = keyring.with_new_intermediate(now)
            # Whoever loses the race signs with what the winner saved: so it is loaded again, never held unsaved.
            if await self._store.save(dump_keyring(keyring), stored):
                log.info("certificate authority saved", store=self._store.name, intermediate=_expiry(keyring))
                return self._hold(keyring)
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"{self._store.name}: other writers came first again and again")

    async def run(self, after: Callable[[Keyring], Awaitable[None]]) -> None:
        """Refreshes for ever, and calls ``after`` each time; a failure is logged and the keyring held stays in use."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await after(await self.refresh())
            except CertmountError as error:
                self._metrics.ca_refresh_failures.inc()
                log.error("certificate authority not refreshed", reason=error.reason.word, error=str(error))  # noqa: TRY400  # the text says all

    def _hold(self, keyring: Keyring) -> Keyring:
        self._current = keyring
        if self._trust.roots != keyring.roots_der:
            self._trust = RootSet(keyring.roots_der, max(self._trust.generation + 1, int(self._clock().timestamp())))
        for role, certificate in (("root", keyring.root), ("intermediate", keyring.intermediate.certificate)):
            self._metrics.ca_expiry.labels(role).set(certificate.not_valid_after_utc.timestamp())
        return keyring


def _expiry(keyring: Keyring) -> str:
    return f"{keyring.intermediate.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
