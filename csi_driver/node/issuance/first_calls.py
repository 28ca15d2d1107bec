"""The calls for pods that start. They wait for nothing but a busy authority; it is asked again here, as kubelets know no pace.

Kubelets of a zone that starts anew would each ask for each pod again, in step, and a busy authority would refuse more
than it signs. So when it is busy a node's calls queue, and come to it as fast as it takes them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, CertificateSpec
from csi_driver.node.authority_messages import IssuanceResponse
from csi_driver.node.issuance.enrolment import Authority
from csi_driver.node.issuance.pace import Pace
from csi_driver.node.renewal.rotation import Rotation

FIRST_SIDE_BY_SIDE = 16
"""With an issuer that takes 20 ms, a hundred pods that start at once have theirs in a fifth of a second."""
OUTSIDE_SIDE_BY_SIDE = 128
"""Of issuers outside: one that takes a minute for each call must not hold up another that takes none."""
PATIENCE_S = 60.0
"""Half of the time that the kubelet gives a call; then it hears the reason, and comes again."""


class FirstCalls:
    """An authority for first certificates; ``turns`` is the clock that gives each call its turn, in the order of their coming."""

    def __init__(self, authority: Authority, rng: Callable[[], float], side_by_side: int = FIRST_SIDE_BY_SIDE) -> None:
        self._authority = authority
        self._pace = Pace(rng, side_by_side, side_by_side)
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}
        self.turns = Rotation(_now, self._serve, self._pace)

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.issue`; AuthorityOverloaded after a minute without a turn."""
        came = _now()
        while True:
            try:
                return await self._in_turn(came, csr, token, spec)
            except CertmountError as error:
                if error.reason is not Reason.AUTHORITY_OVERLOADED or _now() >= came + PATIENCE_S:
                    raise

    async def _in_turn(self, came: float, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        number = f"{next(self._numbers):020}"  # of those that came in the same moment, the least is first
        turn, done = self._waiting[number] = asyncio.Event(), asyncio.Event()
        self.turns.schedule(number, came, came)
        try:
            async with asyncio.timeout_at(came + PATIENCE_S):
                await turn.wait()
        except TimeoutError:
            busy = "the authority is busy, and others of this node come first"
            raise CertmountError(Reason.AUTHORITY_OVERLOADED, busy) from None
        else:
            return await self._call(csr, token, spec)
        finally:
            self.turns.cancel(number)
            self._waiting.pop(number)
            done.set()

    async def _call(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        stamp = self._pace.stamp
        try:
            answer = await self._authority.issue(csr, token, spec)
        except CertmountError as error:
            if error.reason in (Reason.AUTHORITY_OVERLOADED, Reason.TOO_MANY_REQUESTS):
                self._pace.heard(stamp, error, _now())
            raise
        self._pace.heard(stamp, None, _now())
        return answer

    async def _serve(self, number: str) -> None:
        if number in self._waiting:
            turn, done = self._waiting[number]
            turn.set()
            await done.wait()


class Apart:
    """The same authority by two queues, so that no pod of the internal CA waits behind those of issuers outside."""

    def __init__(self, internal: Authority, outside: Authority) -> None:
        self._internal = internal
        self._outside = outside

    async def issue(self, csr: bytes, token: Secret[str], spec: CertificateSpec) -> IssuanceResponse:
        """As :meth:`csi_driver.node.authority_client.AuthorityClient.issue`."""
        queue = self._internal if spec.issuer == DEFAULT_ISSUER else self._outside
        return await queue.issue(csr, token, spec)


def _now() -> float:
    return asyncio.get_running_loop().time()
