"""Run the controller: the replica that holds the Lease watches the sources and works on their Secrets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import structlog

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError
from csi_driver.events.recorder import ObjectEventRecorder
from csi_driver.kube.cache_shares import namespace_owner
from csi_driver.kube.connection import Api
from csi_driver.kube.tls_secrets.secret_client import SecretClient
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.secrets.issuance import Authority, SecretIssuance
from csi_driver.secrets.manager import SecretManager
from csi_driver.secrets.requests import SecretName
from csi_driver.secrets.settings import SecretsSettings
from csi_driver.secrets.source_table import SourceTable
from csi_driver.secrets.source_watches import source_watches, wait_for_sources
from csi_driver.secrets.trust_follower import follow_trust
from csi_driver.secrets.work_queue import WorkQueue
from csi_driver.telemetry.log_shares import LogShares
from csi_driver.telemetry.secrets_metrics import SecretsMetrics

log = structlog.get_logger(__name__)

COALESCE_S = 0.5
"""The delay before a changed source takes effect, so that several edits and several sources of one Secret are one change."""

READ_INTERVAL_S = 1.0
"""How often the controller checks whether the sources of waiting Secrets have been read."""
_MAX_LOGGED = 10  # resources


class SecretsAuthority(Authority, Protocol):
    """The authority, as the controller uses it."""

    def watch_trust(self) -> AsyncIterator[TrustBundle]: ...


@dataclass(eq=False)
class SecretsController:
    """The work of the leader. ``watches`` has its own connections, because a watch holds one permanently."""

    settings: SecretsSettings
    api: Api
    watches: Api
    authority: SecretsAuthority
    recorder: ObjectEventRecorder
    metrics: SecretsMetrics
    executor: Executor

    async def lead(self) -> None:
        """Work until cancelled. Nothing remains from an earlier leadership."""
        session = _Session(self)
        self.metrics.leader = True
        try:
            await session.run()
        finally:
            self.metrics.leader = False
            self.metrics.clear()


class _Session:
    """One leadership."""

    def __init__(self, controller: SecretsController) -> None:
        self._controller = controller
        self._trusted = asyncio.Event()
        self._logs = LogShares()
        settings = controller.settings
        self._table = SourceTable(self._changed, self._source_failed)
        self._manager = SecretManager(
            SecretClient(controller.api),
            SecretIssuance(controller.authority, controller.executor),
            self._table.desired,
            self._schedule,
            self._record,
            controller.metrics,
            lambda secret: self._watches.unread(secret.namespace),
            self._logs.may_log,
        )
        self._queue = WorkQueue(self._manager.work)
        self._watches = source_watches(controller.watches, settings, self._table)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for watch in self._watches:
                tasks.create_task(watch.run(), name=f"watch of {watch.resource.path}")
            authority, report = self._controller.authority, self._controller.metrics.trust_reported
            trust = follow_trust(authority.watch_trust, self._update_trust, self._manager.retry_unavailable, report)
            tasks.create_task(trust, name="trust")
            await self._trusted.wait()
            unread = await wait_for_sources(self._watches)
            if unread:
                log.warning("sources not read yet; their Secrets keep their names", resources=unread[:_MAX_LOGGED])
            log.info("sources read", secrets=len(self._table))
            tasks.create_task(self._queue.run(), name="work")
            while True:
                await asyncio.sleep(READ_INTERVAL_S)
                self._manager.retry_waiting()

    def _update_trust(self, bundle: TrustBundle) -> None:
        self._manager.update_trust(bundle)
        self._trusted.set()

    def _changed(self, secret: SecretName) -> None:
        if secret in self._table or secret in self._manager:
            self._schedule(secret, COALESCE_S)
        else:
            # A tenant can name other Secrets faster than they are worked on, so that names which wait would fill the memory.
            self._queue.cancel(secret)

    def _schedule(self, secret: SecretName, delay_s: float) -> None:
        self._queue.schedule(secret, delay_s)

    def _source_failed(self, target: EventTarget, error: CertmountError) -> None:
        if self._logs.may_log(target.namespace):
            log.info("source not valid", source=str(target), error=str(error))
        self._record(target, True, error.reason.word, error.text)

    def _record(self, target: EventTarget, warning: bool, reason: str, message: str) -> None:
        owners = (namespace_owner(target.namespace),)
        self._controller.recorder.record(target, owners, warning=warning, reason=reason, message=message)
