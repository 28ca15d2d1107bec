"""Watch-based caches of pods, Services and namespaces, so that issuance needs no API requests for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from csi_driver.kube.connection import Api
from csi_driver.kube.object_caches import NamespaceCache, PodCache, ServiceCache
from csi_driver.kube.objects import read_metadata, read_service
from csi_driver.kube.reflector import Reflector, WatchedResource, WatchTimings

STALE_S = 60.0
"""The maximum age of the caches while a watch fails, so that a deleted Service does not allow its names forever."""
_PODS = WatchedResource(
    "pods",
    "/api/v1/pods",
    read_metadata,
    metadata_only=True,
    # A pod that has finished needs no certificate.
    field_selector="status.phase!=Succeeded,status.phase!=Failed",
)
_NAMESPACES = WatchedResource("namespaces", "/api/v1/namespaces", read_metadata, metadata_only=True)
_SERVICES = WatchedResource("services", "/api/v1/services", read_service)


class ClusterCache:
    """Three caches, each updated by its own reflector."""

    def __init__(
        self, api: Api, *, timings: WatchTimings | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.pods, self.services, self.namespaces = PodCache(), ServiceCache(), NamespaceCache()
        self._reflectors: Sequence[Reflector[Any]] = (
            Reflector(api, _PODS, self.pods, timings=timings, clock=clock),
            Reflector(api, _NAMESPACES, self.namespaces, timings=timings, clock=clock),
            Reflector(api, _SERVICES, self.services, timings=timings, clock=clock),
        )

    @property
    def synced(self) -> bool:
        return all(reflector.synced for reflector in self._reflectors)

    def outdated(self) -> Sequence[str]:
        """Return why the caches cannot be used; empty if they can."""
        reasons = []
        for reflector in self._reflectors:
            since, name = reflector.failing_since, reflector.resource.name
            if not reflector.synced:
                reasons.append(f"the list of the cluster's {name} is not complete yet")
            elif since is not None and self._clock() - since > STALE_S:
                # Without the exact age, so that repeated pod events have the same text.
                reasons.append(f"the watch of the cluster's {name} has failed for more than {STALE_S:.0f} s")
        return reasons

    def failing_s(self) -> Mapping[str, float]:
        """Return for how many seconds the watch of each resource has failed; 0 if it works."""
        now = self._clock()
        # The scraper's thread calls this method, so each time is read once: the watch can recover meanwhile.
        since = [(reflector.resource.name, reflector.failing_since) for reflector in self._reflectors]
        return {name: 0.0 if began is None else now - began for name, began in since}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for reflector in self._reflectors:
                tasks.create_task(reflector.run(), name=f"watch of {reflector.resource.name}")
