"""The Secrets controller on a fake API server, with an authority that tests control."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.events.recorder import ObjectEventRecorder
from csi_driver.kube.connection import Api, ApiConfiguration
from csi_driver.kube.events import SECRETS, EventClient
from csi_driver.secrets.controller import SecretsController
from csi_driver.secrets.settings import SecretsSettings
from csi_driver.telemetry.secrets_metrics import SecretsMetrics
from tests.support.scripted_secrets import ScriptedSecretsAuthority
from tests.support.tenant_api import TenantApi
from tests.support.waiting import in_background, until

SETTINGS = SecretsSettings(
    authority="localhost:1",
    authority_root=Path("/nonexistent"),
    token=Path("/nonexistent"),
    namespaces=("shop", "web"),
    lists=(),
    ingress_classes=frozenset(),
    default_issuer="internal",
    lease=("certmount", "certmount-secrets"),
)


@dataclass
class World:
    """A cluster with one replica of the controller."""

    api: TenantApi
    settings: SecretsSettings = SETTINGS
    authority: ScriptedSecretsAuthority = field(default_factory=ScriptedSecretsAuthority)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SecretsController]:
        """Run the controller as the leader; it can be run again."""
        self.registry = CollectorRegistry()
        metrics = SecretsMetrics(self.registry)
        with ThreadPoolExecutor(1) as keys:
            async with (
                Api(ApiConfiguration(url=self.api.url)) as api,
                Api(ApiConfiguration(url=self.api.url)) as watches,
            ):
                recorder = ObjectEventRecorder(EventClient(api, "pod", SECRETS), metrics)
                controller = SecretsController(self.settings, api, watches, self.authority, recorder, metrics, keys)
                async with in_background(recorder.run()), in_background(controller.lead()):
                    yield controller

    async def until_secret(self, key: str, condition: Callable[[], bool] = lambda: True) -> dict[str, bytes]:
        await until(lambda: key in self.api.secrets and condition(), f"Secret {key}")
        return self.api.data(key)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("csi_driver.secrets.controller.COALESCE_S", 0.05)
    monkeypatch.setattr("csi_driver.secrets.manager.MIN_ISSUE_INTERVAL_S", 0.0)
    monkeypatch.setattr("csi_driver.secrets.manager.SPREAD_S", 0.1)
    api = TenantApi()
    async with api.running():
        yield World(api)
