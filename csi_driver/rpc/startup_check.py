"""The startup probe of the authority's clients, which makes the kubelet update the file with the authority's root early.

When certmount is installed, the authority publishes its root after the kubelet has mounted the ConfigMap into its clients.
The kubelet updates such files when it synchronizes a pod: every 60 to 90 seconds, and when the pod's startup probe succeeds.
So the probe succeeds when the authority accepts connections, which it does after it has published its root.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from csi_driver.core.addresses import parse_address

_CONNECT_S = 1.0  # shorter than the kubelet's timeout for the probe
MAX_WAIT_S = 300.0
"""The kubelet restarts a container whose startup probe fails for too long. Without an authority, the program must run anyway."""


class StartupCheck:
    """The page ``/startupz``. Only the thread of the server for probes uses it."""

    def __init__(
        self, authority: str, root_problem: Callable[[], str | None], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._authority = parse_address(authority)
        self._root_problem = root_problem
        self._monotonic = monotonic
        self._end = monotonic() + MAX_WAIT_S
        self._connected = False

    async def __call__(self) -> Sequence[str]:
        """Return why the probe does not succeed yet."""
        problem = self._root_problem()
        if problem is None or self._connected or self._monotonic() > self._end:
            return []
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, writer = await asyncio.open_connection(*self._authority)
        except OSError as error:
            return [problem, f"{self._authority} does not accept connections: {str(error) or 'no response'}"]
        writer.close()
        # Only the next probe succeeds, because the kubelet needs a moment to receive the ConfigMap.
        self._connected = True
        return [problem]
