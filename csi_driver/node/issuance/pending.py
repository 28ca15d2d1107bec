"""Requests without a final answer yet. Who asks again asks with the same key and CSR, so that a slow issuer gets one order.

The kubelet gives a call two minutes, and removes the volume after one that fails; an order at a public CA may take longer.
So what was asked with outlives the call, its failure and the removal. It never leaves this process's memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.node.issuance.enrolled import Wanted

_MOST = 1_000
"""Ten times the volumes of a busy node."""
_FORGOTTEN_S = 3600.0
"""The kubelet tries again within minutes: what nobody has asked with for so long is a pod's that is gone."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A key, and the request (PKCS#10, DER) that it has signed."""

    key: PrivateKey = field(repr=False)
    csr: bytes = field(repr=False)


class Pending:
    """What was asked with, the longest unused first. ``clock`` gives unix seconds."""

    def __init__(self, clock: Callable[[], float], most: int = _MOST) -> None:
        self._clock = clock
        self._most = most
        self._prepared: OrderedDict[Wanted, tuple[float, Prepared]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prepared)

    def find(self, wanted: Wanted) -> Prepared | None:
        """What was asked with before; None where there was no question, or a final answer."""
        self.forget_old()
        found = self._prepared.get(wanted)
        return found[1] if found else None

    def keep(self, wanted: Wanted, prepared: Prepared) -> None:
        """It is asked with now."""
        self._prepared[wanted] = self._clock(), prepared
        self._prepared.move_to_end(wanted)
        self.forget_old()
        if len(self._prepared) > self._most:
            self._prepared.popitem(last=False)

    def drop(self, wanted: Wanted) -> None:
        """The answer was final."""
        self._prepared.pop(wanted, None)

    def forget_old(self) -> None:
        """No key outlives its pod for long."""
        since = self._clock() - _FORGOTTEN_S
        while self._prepared and next(iter(self._prepared.values()))[0] < since:
            self._prepared.popitem(last=False)
