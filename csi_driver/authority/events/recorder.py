"""Record events on pods."""

from __future__ import annotations

from typing import Protocol

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.identity import PodIdentity
from csi_driver.events.recorder import ObjectEventRecorder


class EventRecorder(Protocol):
    """Records events on pods."""

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        """Record an event without waiting; never raises. ``reason`` is a CamelCase word, ``message`` is for people."""


class NullEventRecorder:
    """Discards events, because without a cluster there are no pods."""

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None: ...


class PodEventRecorder:
    """Writes the events of pods to the API server."""

    def __init__(self, recorder: ObjectEventRecorder) -> None:
        self._recorder = recorder
        self.run = recorder.run

    def record(self, pod: PodIdentity, *, warning: bool, reason: str, message: str) -> None:
        target = EventTarget(pod.service_account.namespace, pod.pod_name, pod.pod_uid)
        owners = pod.tenants  # a node's pods can be those of any tenant
        self._recorder.record(target, owners, warning=warning, reason=reason, message=message)
