"""The internal CA of one replica: refreshed from its source, and used only while it is known to be current."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import structlog

from csi_driver.authority.ca.keyring import Keyring
from csi_driver.authority.ca.rotation import MAX_STATE_AGE_S, RotationPhase
from csi_driver.authority.ca.sources import CASource
from csi_driver.authority.ca.state import CAState
from csi_driver.authority.retry import run_periodically
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, FailureKind, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.texts import timestamp
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

REFRESH_S = 5.0  # A sixth of MAX_STATE_AGE_S: several refreshes must fail before a replica stops signing
_REPEAT_S = 60.0  # how often ``on_refresh`` runs although nothing changed
_WARNING_INTERVAL_S = timedelta(days=1).total_seconds()


def utc_now() -> datetime:
    """Return the time in whole seconds, the resolution of certificates."""
    return datetime.now(UTC).replace(microsecond=0)


def _boot_time() -> float:
    """Return seconds that include the time when the machine sleeps, unlike time.monotonic (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class CertificateAuthority:
    """Provides the current CA. It signs only while its state is fresh: see :mod:`csi_driver.authority.ca.rotation`."""

    def __init__(
        self,
        source: CASource,
        metrics: AuthorityMetrics,
        clock: Callable[[], datetime] = utc_now,
        *,
        on_roots_changed: Callable[[RootSet], None] = lambda _roots: None,
        elapsed: Callable[[], float] = _boot_time,
    ) -> None:
        """``on_roots_changed`` runs before anything is signed: no response may contain older roots than the signer's."""
        self._source = source
        self._metrics = metrics
        self._clock = clock
        self._on_roots_changed = on_roots_changed
        self._elapsed = elapsed
        self._started = clock(), elapsed()
        self._state: CAState | None = None
        self._read_at = 0.0
        self._logged_error = ""
        self._warned: dict[str, float] = {}
        self._lock = asyncio.Lock()

    @property
    def current(self) -> Keyring:
        """The keyring to sign with; raises CertmountError IssuerUnavailable if another CA may be current."""
        return self._fresh().keyring

    @property
    def state(self) -> CAState | None:
        """What this replica read last; None before the CA is loaded."""
        return self._state

    @property
    def root_set(self) -> RootSet:
        """Empty before the CA is loaded."""
        return self._state.root_set if self._state else RootSet((), 0)

    @property
    def usable(self) -> bool:
        """True if the CA is current and none of its certificates has expired."""
        try:
            return self._clock() < self.current.valid_until
        except CertmountError:
            return False

    async def record_lifetime(self, lifetime: timedelta) -> Keyring:
        """Return the keyring to sign a certificate with this lifetime. Sign before you await anything else.

        A longer lifetime than before is saved first, because it decides how long a former root stays trusted.
        Raises CertmountError IssuerUnavailable.
        """
        seconds = lifetime.total_seconds()
        if seconds > self._fresh().rotation.max_lifetime:
            async with self._lock:
                if seconds > self._fresh().rotation.max_lifetime:
                    await self._use(lambda now: self._source.record_lifetime(now, seconds))
        return self.current

    async def refresh(self) -> Keyring:
        """Read the CA, create or renew it if that is due, and advance its rotation.

        Raises CertmountError InvalidCA for invalid content, or what the source raises.
        """
        async with self._lock:
            return await self._use(lambda now: self._source.refresh(now, self._steady_time()))

    async def run(self, on_refresh: Callable[[Keyring], Awaitable[None]]) -> None:
        """Refresh until cancelled; call ``on_refresh`` after each change and every minute. Log each failure once."""
        handled: tuple[CAState | None, float] = (None, 0.0)

        async def refresh() -> None:
            nonlocal handled
            keyring = await self.refresh()
            if self._state is not handled[0] or self._elapsed() - handled[1] >= _REPEAT_S:
                await on_refresh(keyring)
                handled = self._state, self._elapsed()
            self._logged_error = ""

        await run_periodically(REFRESH_S, refresh, self._log_failure)

    def _steady_time(self) -> datetime:
        """Return the time of a clock that has not been stepped since the start."""
        started, began = self._started
        return started + timedelta(seconds=self._elapsed() - began)

    def _log_failure(self, error: CertmountError) -> None:
        self._metrics.ca_refresh_failures.inc()
        if str(error) != self._logged_error:
            self._logged_error = str(error)
            log.error("CA refresh failed", reason=error.reason.word, error=str(error))

    async def _use(self, read: Callable[[datetime], Awaitable[CAState]]) -> Keyring:
        began = self._elapsed()
        try:
            state = await read(self._clock())
        except CertmountError as error:
            # No replica can act on invalid content, so the current CA stays current unless a switch is possible.
            if error.reason.kind is FailureKind.MISCONFIGURED:
                self._metrics.ca_valid.set(0)
                if self._state and not self._state.rotation.phase.before_switch:
                    self._read_at = began
            raise
        self._state, self._read_at = state, began
        self._on_roots_changed(state.root_set)
        self._report(state)
        return state.keyring

    def _fresh(self) -> CAState:
        if self._state is None:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the internal CA is not loaded yet")
        age = self._elapsed() - self._read_at
        if age > MAX_STATE_AGE_S:
            problem = f"{self._source.name} was last read {age:.0f} s ago; another CA may be current"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, problem)
        return self._state

    def _report(self, state: CAState) -> None:
        keyring = state.keyring
        self._metrics.ca_valid.set(self._source.valid)
        for role, certificate in (("root", keyring.root), ("intermediate", keyring.intermediate.certificate)):
            self._metrics.ca_expiry.labels(role).set(certificate.not_valid_after_utc.timestamp())
        for phase in RotationPhase:
            self._metrics.ca_rotation.labels(phase.value).set(phase is state.rotation.phase)
        self._metrics.unacknowledged_nodes.set(self._source.unacknowledged)
        for expiring in keyring.expiring(self._clock()):
            if self._elapsed() - self._warned.get(expiring.name, -_WARNING_INTERVAL_S) >= _WARNING_INTERVAL_S:
                self._warned[expiring.name] = self._elapsed()
                log.warning(
                    "CA certificate expires soon; only its owner can renew it",
                    certificate=expiring.name,
                    not_after=timestamp(expiring.not_after),
                    root=fingerprint(keyring.root),
                )
