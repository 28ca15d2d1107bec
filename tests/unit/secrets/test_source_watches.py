"""Which sources have not been read, and for which Secrets this matters."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.names import DNSName
from csi_driver.secrets import source_watches
from csi_driver.secrets.requests import CertificateOptions, DesiredSecret, SecretName
from csi_driver.secrets.source_watches import SourceWatches, wait_for_sources

LIST = "ConfigMap/shop/list"
DESIRED = DesiredSecret(
    SecretName("shop", "tls"),
    (DNSName("a.example.com"),),
    CertificateOptions("internal"),
    (EventTarget("shop", "a", "uid", "Ingress"),),
)
OF_LIST = dataclasses.replace(DESIRED, targets=(EventTarget("shop", "list", "uid", "ConfigMap"),))


def watch(name: str, *, synced: bool = False, failing: bool = True) -> Any:
    return SimpleNamespace(
        synced=synced, failing_since=1.0 if failing else None, resource=SimpleNamespace(name=name, path=name)
    )


@pytest.mark.parametrize("failing", [False, True])
async def test_one_failure_of_a_watch_does_not_end_the_wait(failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reflector retries it."""
    monkeypatch.setattr(source_watches, "_SYNC_INTERVAL_S", 0.01)
    late = watch("gateways of shop", failing=failing)
    task = asyncio.create_task(wait_for_sources([watch("ingresses of shop", synced=True), late]))
    done, _ = await asyncio.wait([task], timeout=0.2)
    assert not done
    late.synced = True
    assert await asyncio.wait_for(task, 5) == []


@pytest.mark.parametrize("failing, limit", [(True, "_FAILING_S"), (False, "_SYNC_S")])
async def test_namespace_that_cannot_be_read_stops_the_others_only_for_a_time(
    failing: bool, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_watches, limit, 0.1)
    watches = [watch("ingresses of shop", synced=True), watch("ingresses of web", failing=failing)]
    assert await asyncio.wait_for(wait_for_sources(watches), 5) == ["ingresses of web"]


def test_unread_watch_matters_for_the_secrets_of_its_namespace_only() -> None:
    gateways, lists = watch("gateways of shop"), watch("configmap shop/list")
    ingresses = [watch(f"ingresses of {name}", synced=True) for name in ("shop", "web")]
    watches = SourceWatches({"shop": [gateways, ingresses[0]], "web": ingresses[1:]}, {LIST: lists})
    assert list(watches) == [gateways, *ingresses, lists]
    assert watches.unread("shop").of(DESIRED, "Ingress/shop/a") == ("gateways of shop",)
    assert watches.unread("web").of(DESIRED, "Ingress/web/a") == ()
    assert watches.unread("shop").of(DESIRED, LIST) == ("gateways of shop", LIST)
    assert watches.unread("web").of(DESIRED, LIST) == (LIST,)
    assert watches.unread("shop").of(OF_LIST, LIST) == (LIST,), "a list is never united with other sources"
    gateways.synced = lists.synced = True
    assert watches.unread("shop").of(DESIRED, LIST) == ()
