"""Generates the private keys of volumes and signs their CSRs, so that no pod waits for the expensive keys of other pods."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key, is_expensive
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from csi_driver.node.issuance.pending_requests import PreparedRequest
from csi_driver.node.pods import Pod
from csi_driver.node.threads import in_thread
from csi_driver.node.turns import Turns

MAX_EXPENSIVE_KEYS = max((os.cpu_count() or 1) // 2, 1)
"""RSA keys that are generated at the same time: the other processors remain for the calls of other pods.

The threads have the usual priority: a thread with a lower one can be interrupted while it holds Python's global lock.
"""


class KeyGenerator:
    """Generates expensive keys in ``executor``, ``limit`` at a time in turns of the tenants, and others at once."""

    def __init__(self, executor: Executor, limit: int = MAX_EXPENSIVE_KEYS) -> None:
        self._executor = executor
        self._turns = Turns(limit)

    async def prepare(
        self, pod: Pod, key: PrivateKey | None, key_type: KeyType, names: Names, keep: Callable[[PreparedRequest], None]
    ) -> PreparedRequest:
        """Return a CSR for ``key``, or for a new key. ``keep`` receives it even if the caller is cancelled meanwhile."""
        if not is_expensive(key_type):
            prepared = _prepare(key, key_type, names)
            keep(prepared)
            return prepared
        made: list[PreparedRequest] = []
        async with self._turns.turn(pod):
            try:
                await in_thread(self._executor, lambda: made.append(_prepare(key, key_type, names)))
            finally:
                for prepared in made:
                    keep(prepared)
        return made[0]


def _prepare(key: PrivateKey | None, key_type: KeyType, names: Names) -> PreparedRequest:
    key = key or generate_key(key_type)
    return PreparedRequest(key, build_csr(key, names))
