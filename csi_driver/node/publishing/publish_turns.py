"""Publish calls take turns by namespace before the driver works on them, so that no tenant waits for the calls of another."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from csi_driver._proto import csi_pb2
from csi_driver.core.shares import FairShares
from csi_driver.node.publishing.publish_request import calling_pod
from csi_driver.node.turns import Turns

MAX_CALLS_KIB = 16 * 1024
"""Publish calls in progress. A single namespace gets half: 2,000 usual calls, or 32 of the largest size."""


class PublishTurns:
    """The publish calls in progress. Their number is limited by their size only."""

    def __init__(self) -> None:
        self._shares = FairShares("KiB of publish calls on this node", MAX_CALLS_KIB)
        self._turns = Turns(limit=sys.maxsize, when_idle=True)

    @asynccontextmanager
    async def turn(self, call: csi_pb2.NodePublishVolumeRequest) -> AsyncIterator[None]:
        """Wait for the turn of a call, which lasts as long as the block.

        Raises CertmountError: ShareExceeded if the calls of its namespace in progress use up their share of the memory.
        """
        pod = calling_pod(call)
        with self._shares.hold(pod.tenant, -(-call.ByteSize() // 1024)):
            async with self._turns.turn(pod):
                yield
