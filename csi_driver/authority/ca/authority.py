"""The internal CA as it lives: made at the first start, renewed in time, rotated on demand, shared by all replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import structlog

from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.keyring import DEFAULT_PROFILE, CAProfile, Keyring
from csi_driver.authority.ca.rotation import MAX_STATE_AGE_S, RotationPhase
from csi_driver.authority.ca.sources import CASource, FileCA, NodeAcknowledgements, StoredCA
from csi_driver.authority.ca.state import CAState
from csi_driver.authority.storage import Store
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

REFRESH_S = 5.0
"""A sixth of STALE_S: a replica misses several readings before it must stop to sign."""
_AGAIN_S = 60.0
"""How long after the last time whoever follows the CA is called though nothing has changed."""
_WARN_AGAIN_S = timedelta(days=1).total_seconds()


def utc_now() -> datetime:
    """The time in whole seconds, as certificates hold it."""
    return datetime.now(UTC).replace(microsecond=0)


def _since_boot() -> float:
    """Goes on while the machine sleeps, unlike time.monotonic (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class CertificateAuthority:
    """Holds the current CA, and signs only while it knows that it is current: see :mod:`csi_driver.authority.ca.rotation`."""

    def __init__(
        self,
        source: Store | CAFiles,
        metrics: AuthorityMetrics,
        clock: Callable[[], datetime] = utc_now,
        *,
        fleet: NodeAcknowledgements | None = None,
        design: CAProfile = DEFAULT_PROFILE,
        tell: Callable[[RootSet], None] = lambda _roots: None,
        elapsed: Callable[[], float] = _since_boot,
    ) -> None:
        """``tell`` hears what pods are to trust, at once: no answer may be older than what this replica signs by."""
        self._source: CASource = FileCA(source) if isinstance(source, CAFiles) else StoredCA(source, fleet, design)
        self._metrics = metrics
        self._clock = clock
        self._tell = tell
        self._elapsed = elapsed
        self._held: CAState | None = None
        self._seen = 0.0
        self._said = ""
        self._warned: dict[str, float] = {}
        self._one_at_a_time = asyncio.Lock()

    @property
    def current(self) -> Keyring:
        """The keyring to sign with; raises CertmountError IssuerUnavailable where it may not be the current one."""
        return self._fresh().keyring

    @property
    def trust(self) -> RootSet:
        """What pods are to trust; none while the CA is not loaded."""
        return self._held.trust if self._held else RootSet((), 0)

    @property
    def usable(self) -> bool:
        """True while it may sign, with an intermediate that is valid now."""
        try:
            return self._clock() < self.current.intermediate.certificate.not_valid_after_utc
        except CertmountError:
            return False

    async def record_lifetime(self, life: timedelta) -> Keyring:
        """The keyring that may sign a certificate of this life now; call it before each, and sign without waiting.

        How long a former root must be trusted hangs on the longest life that was given: that is written down first.

        Raises:
            CertmountError: IssuerUnavailable.
        """
        seconds = life.total_seconds()
        if seconds > self._fresh().state.longest_life:
            async with self._one_at_a_time:
                if seconds > self._fresh().state.longest_life:
                    await self._read(lambda now: self._source.record_lifetime(now, seconds))
        return self.current

    async def refresh(self) -> Keyring:
        """Reads the CA; makes it, renews it, and does the next step of its rotation, where that is due.

        Raises:
            CertmountError: InvalidCA for unusable content, or what the store raised.
        """
        async with self._one_at_a_time:
            return await self._read(self._source.refresh)

    async def run(self, after: Callable[[Keyring], Awaitable[None]]) -> None:
        """Refreshes for ever, and calls ``after`` for each change, and every minute. A failure is logged, once while it lasts."""
        told: CAState | None = None
        told_at = 0.0
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                keyring = await self.refresh()
                if self._held is not told or self._elapsed() - told_at >= _AGAIN_S:
                    await after(keyring)
                    told, told_at = self._held, self._elapsed()
                self._said = ""
            except CertmountError as error:
                self._metrics.ca_refresh_failures.inc()
                if str(error) != self._said:
                    self._said = str(error)
                    log.error("certificate authority not refreshed", reason=error.reason.word, error=str(error))  # noqa: TRY400  # the text says all

    async def _read(self, read: Callable[[datetime], Awaitable[CAState]]) -> Keyring:
        began = self._elapsed()
        try:
            held = await read(self._clock())
        except CertmountError as error:
            # Content that can't be used lets nobody go on, so without a switch at hand what is held stays current.
            if error.reason is Reason.INVALID_CA and self._held and not self._held.state.phase.before_switch:
                self._seen = began
            raise
        self._held, self._seen = held, began
        self._tell(held.trust)
        self._show(held)
        return held.keyring

    def _fresh(self) -> CAState:
        held = self._held
        if held is None:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the internal CA is not loaded yet")
        age = self._elapsed() - self._seen
        if age > MAX_STATE_AGE_S:
            problem = f"{self._source.name} was last read {age:.0f} s ago; another CA may sign by now"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, problem)
        return held

    def _show(self, held: CAState) -> None:
        keyring = held.keyring
        for role, certificate in (("root", keyring.root), ("intermediate", keyring.intermediate.certificate)):
            self._metrics.ca_expiry.labels(role).set(certificate.not_valid_after_utc.timestamp())
        for phase in RotationPhase:
            self._metrics.ca_rotation.labels(phase.value).set(phase is held.state.phase)
        if held.state.phase is not RotationPhase.DISTRIBUTING:
            self._metrics.unconfirmed.set(0)
        for ending in keyring.expiring(self._clock()):
            if self._elapsed() - self._warned.get(ending.name, -_WARN_AGAIN_S) >= _WARN_AGAIN_S:
                self._warned[ending.name] = self._elapsed()
                log.warning(
                    "a certificate of the CA ends soon, and only its owner can renew it",
                    certificate=ending.name,
                    not_after=f"{ending.at:%Y-%m-%dT%H:%M:%SZ}",
                    root=fingerprint(keyring.root),
                )
