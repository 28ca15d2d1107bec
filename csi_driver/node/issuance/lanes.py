"""The renewals of each issuer by themselves, at the pace at which its certificates come: one that is away holds up no other's."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret
from csi_driver.core.spec import CertificateSpec
from csi_driver.node.authority_messages import IssuanceResponse
from csi_driver.node.issuance.enrolment import Authority
from csi_driver.node.issuance.pace import Pace, spread_s
from csi_driver.node.renewal.rotation import Rotation

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Lane:
    pace: Pace
    rotation: Rotation


class Lanes:
    """A clock and a pace for each issuer that a volume of this node has."""

    def __init__(self, clock: Callable[[], float], rng: Callable[[], float]) -> None:
        self._clock = clock
        self._rng = rng
        self._lanes: dict[str, _Lane] = {}
        self._act: Callable[[str], Awaitable[None]] | None = None
        self._running: asyncio.TaskGroup | None = None

    def schedule(self, volume_id: str, issuer: str, when: float, until: float) -> None:
        """Sets the moment (unix seconds) of a volume, whose certificate ends at ``until``."""
        if issuer not in self._lanes:
            pace = Pace(self._rng)
            self._lanes[issuer] = _Lane(pace, Rotation(self._clock, self._act_on, pace))
            self._start(issuer)
        self._lanes[issuer].rotation.schedule(volume_id, when, until)

    def cancel(self, volume_id: str) -> None:
        """Forgets a volume."""
        for lane in self._lanes.values():
            lane.rotation.cancel(volume_id)

    def backlog(self) -> int:
        """How many volumes wait though their moment has come."""
        return sum(lane.rotation.backlog() for lane in self._lanes.values())

    def trouble(self, issuer: str) -> CertmountError | None:
        """Why there are no certificates of an issuer for the time being; None where there are."""
        return self._lanes[issuer].pace.trouble if issuer in self._lanes else None

    def pause_s(self, issuer: str) -> float:
        """Seconds until the next call to an issuer may begin, where none is under way."""
        if issuer not in self._lanes:
            return 0.0
        lane = self._lanes[issuer]
        return lane.pace.pause_s(_now(), lane.rotation.left_s())

    def paced(self, authority: Authority) -> Authority:
        """The same authority, whose answers and failures set the pace."""
        return _Paced(authority, self)

    async def run(self, act: Callable[[str], Awaitable[None]]) -> None:
        """Calls ``act(volume_id)`` for each volume in its turn, until cancelled."""
        self._act = act
        async with asyncio.TaskGroup() as self._running:
            for issuer in self._lanes:
                self._start(issuer)
            await asyncio.Event().wait()

    def stamp(self, issuer: str) -> int:
        """For :meth:`heard`, before a call."""
        return self._lanes[issuer].pace.stamp if issuer in self._lanes else 0

    def heard(self, issuer: str, stamp: int, error: CertmountError | None) -> None:
        """A call to an issuer ended; of one that no volume has nothing is remembered, as pods may ask for any."""
        if issuer not in self._lanes:
            return
        lane = self._lanes[issuer]
        if (silence := lane.pace.heard(stamp, error, _now())) is not None:
            waiting = lane.rotation.backlog()
            log.info("certificates again", issuer=issuer, after_s=round(silence, 1), waiting=waiting)
            lane.rotation.put_off(partial(spread_s, silence, self._rng))
        lane.rotation.look()

    def _start(self, issuer: str) -> None:
        if self._running is not None:
            # Begun by whatever call brings the issuer's first volume: what that call has bound to the log is not these renewals'.
            running = self._lanes[issuer].rotation.run()
            self._running.create_task(running, name=f"renewals of {issuer}", context=contextvars.Context())

    async def _act_on(self, volume_id: str) -> None:
        if self._act is not None:
            await self._act(volume_id)


class _Paced:
    """An authority that tells of each call how it went."""

    def __init__(self, authority: Authority, lanes: Lanes) -> None:
        self._authority = authority
        self._lanes = lanes

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        stamp = self._lanes.stamp(spec.issuer)
        try:
            answer = await self._authority.issue(csr, token, spec)
        except CertmountError as error:
            self._lanes.heard(spec.issuer, stamp, error)
            raise
        self._lanes.heard(spec.issuer, stamp, None)
        return answer


def _now() -> float:
    return asyncio.get_running_loop().time()
