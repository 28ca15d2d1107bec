"""What the authority knows of the cluster without asking for each request: pods, Services and namespaces, as they are now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from kubernetes.aio import client

from csi_driver.kube.namespaces import Namespaces
from csi_driver.kube.pods import Pods
from csi_driver.kube.services import Services
from csi_driver.kube.watching import Pace, Reflector, Resource

STALE_S = 60.0
"""How long what is known counts while the API server can't be watched: a Service that is gone must not give names for ever."""
_PODS = Resource(
    "pods",
    "/api/v1/pods",
    metadata_only=True,
    # A pod that has ended needs no certificate.
    field_selector="status.phase!=Succeeded,status.phase!=Failed",
)
_NAMESPACES = Resource("namespaces", "/api/v1/namespaces", metadata_only=True)
_SERVICES = Resource("services", "/api/v1/services")


class ClusterView:
    """Three caches, each kept by a reflector."""

    def __init__(
        self, api: client.ApiClient, *, pace: Pace | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.pods, self.services, self.namespaces = Pods(), Services(), Namespaces()
        sinks = ((_PODS, self.pods), (_NAMESPACES, self.namespaces), (_SERVICES, self.services))
        self._reflectors = [Reflector(api, resource, sink, pace=pace, clock=clock) for resource, sink in sinks]

    @property
    def synced(self) -> bool:
        """True once all of it has been read."""
        return all(reflector.synced for reflector in self._reflectors)

    def outdated(self) -> Sequence[str]:
        """Why what is known can't be believed, in words; none when it can."""
        reasons = []
        for reflector in self._reflectors:
            since, name = reflector.failing_since, reflector.resource.name
            if not reflector.synced:
                reasons.append(f"the cluster's {name} are not known yet")
            elif since is not None and self._clock() - since > STALE_S:
                # Without the seconds: what is said of it on pods is to be the same text each time.
                reasons.append(f"the cluster's {name} could not be followed for more than {STALE_S:.0f} s")
        return reasons

    def failing_s(self) -> Mapping[str, float]:
        """For how long each resource could not be followed, in seconds; 0 where it is."""
        now = self._clock()
        return {
            reflector.resource.name: 0.0 if reflector.failing_since is None else now - reflector.failing_since
            for reflector in self._reflectors
        }

    async def run(self) -> None:
        """Keeps all of it up to date, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for reflector in self._reflectors:
                tasks.create_task(reflector.run(), name=f"watch of {reflector.resource.name}")
