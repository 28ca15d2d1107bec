"""Signals the processes of pods after the files of their volumes were replaced, if their volumes request it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import structlog

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import parse_dns_label
from csi_driver.host.pod_processes import PodProcesses
from csi_driver.node.authority_messages import CertificateCondition
from csi_driver.node.fair_queue import FairQueue
from csi_driver.node.log_shares import PodLogShares
from csi_driver.node.pods import Pod
from csi_driver.node.renewal.certificate_reports import CertificateReporter
from csi_driver.node.scheduler import Scheduler
from csi_driver.node.threads import in_thread
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.telemetry.node_metrics import NodeMetrics

log = structlog.get_logger(__name__)

ALL_NAMESPACES = "*"
SIGNAL_DELAY_S = 1.0
"""From the replacement of the files to the signal: HAProxy loses a signal that arrives while it reloads."""
_STOP_TIMEOUT_S = 5.0
"""For the last signals. After its restart, the driver repeats those of the last minutes."""


def parse_namespaces(text: str) -> tuple[str, ...]:
    """Parse the namespaces of --reload-namespaces; raises ValueError."""
    names = [name.strip(" ") for name in text.split(",")] if text.strip(" ") else []
    for name in names:
        if name != ALL_NAMESPACES:
            try:
                parse_dns_label(name)
            except ValueError as problem:
                raise ValueError(f"{name!a} {problem}") from None
    return tuple(names)


@dataclass(frozen=True, slots=True)
class ReloadRules:
    """The namespaces whose pods can request signals, and how the driver sends them."""

    namespaces: Collection[str] = ()
    processes: PodProcesses = PodProcesses()

    def check(self, spec: CertificateSpec, pod: Pod) -> None:
        """Raise CertmountError ReloadNotAllowed if the volume requests signals that its namespace is not allowed."""
        if spec.reload is not None and not {pod.namespace, ALL_NAMESPACES} & set(self.namespaces):
            problem = f"signals are not allowed in namespace {pod.namespace}"
            hint = "remove it, or ask an administrator to add the namespace to deploy/components/reload or to the Helm value reload.namespaces"
            raise CertmountError(Reason.RELOAD_NOT_ALLOWED, Fault("volumeAttributes.reload", problem, hint))


@dataclass(eq=False, slots=True)
class _WaitingSignal:
    pod: Pod
    volume_id: str
    urgency: float = 0.0


@dataclass(eq=False)
class Reloads:
    """Sends the signals, one at a time in the order of :class:`FairQueue`: a search takes longer in a pod with many processes.

    A failed signal is reported and not repeated: the next replacement of the files sends another.
    """

    rules: ReloadRules
    volumes: VolumeTable
    reporter: CertificateReporter
    metrics: NodeMetrics
    logs: PodLogShares
    clock: Callable[[], float]
    _delayed: set[str] = field(default_factory=set)
    _waiting: dict[str, _WaitingSignal] = field(default_factory=dict)
    _queue: FairQueue[_WaitingSignal] = field(default_factory=FairQueue)
    _added: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._scheduler = Scheduler(self.clock, self._add)
        self.volumes.when_replaced(self._files_replaced)
        self.volumes.when_forgotten(self._forget)

    async def run(self) -> None:
        """Send signals until cancelled, and then those that are delayed or waiting."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._scheduler.run())
                while True:
                    await self._added.wait()
                    self._added.clear()
                    await self._send_waiting()
        finally:
            for volume_id in sorted(self._delayed):
                await self._add(volume_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._send_waiting()

    async def _send_waiting(self) -> None:
        while self._waiting:
            signal = self._queue.start_next()
            del self._waiting[signal.volume_id]
            try:
                await self._reload(signal.volume_id)
            except asyncio.CancelledError:
                self._delayed.add(signal.volume_id)  # it may not be sent; a second one is harmless
                raise
            finally:
                self._queue.end(signal, started=True)

    def _files_replaced(self, volume: Volume) -> None:
        volume_id = volume.record.volume_id
        if volume.spec.reload is not None and volume_id not in self._delayed:
            self._delayed.add(volume_id)
            self._scheduler.schedule(volume_id, self.clock() + SIGNAL_DELAY_S)

    async def _add(self, volume_id: str) -> None:
        self._delayed.discard(volume_id)
        volume = self.volumes.get(volume_id)
        if volume is not None and volume_id not in self._waiting:
            self._waiting[volume_id] = _WaitingSignal(volume.pod, volume_id)
            self._queue.add(self._waiting[volume_id])
            self._added.set()

    def _forget(self, volume_id: str) -> None:
        self._delayed.discard(volume_id)
        self._scheduler.cancel(volume_id)
        if (signal := self._waiting.pop(volume_id, None)) is not None:
            self._queue.end(signal, started=False)

    async def _reload(self, volume_id: str) -> None:
        volume = self.volumes.get(volume_id)
        if volume is None or volume.spec.reload is None:
            return
        reload, pod = volume.spec.reload, volume.pod
        with structlog.contextvars.bound_contextvars(volume=volume_id, pod=str(pod), reload=str(reload)):
            try:
                self.rules.check(volume.spec, pod)
                processes = await in_thread(None, self.rules.processes.signal, pod.uid, reload)
            except CertmountError as error:
                self._failed(volume, error)
            except Exception as error:  # noqa: BLE001  # A defect with one pod must not end the signals of all.
                problem = f"an internal error ({type(error).__name__})"
                self._failed(volume, CertmountError(Reason.INTERNAL, problem))
            else:
                self.metrics.reloaded(failed=False)
                log.info("reload signal sent", processes=processes)

    def _failed(self, volume: Volume, error: CertmountError) -> None:
        self.metrics.reloaded(failed=True)
        if self.logs.may_log():
            log.warning("reload signal failed", reason=error.reason.word, error=str(error))
        if volume.token is not None:
            message = f"the files were replaced, but the signal failed: {error}"
            condition, word = CertificateCondition.RELOAD_FAILED, error.reason.word
            self.reporter.report(volume.record.volume_id, volume.pod, condition, word, message)
