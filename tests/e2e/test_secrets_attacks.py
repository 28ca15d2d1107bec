"""A tenant floods the Secrets controller with Ingresses, and the Secrets of another tenant arrive as usual."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.e2e import cluster, host, secrets
from tests.e2e.secrets import FLOOD, OWN
from tests.support.machine import rss_mb
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("secrets_controller")

INGRESSES = 10_000
CONNECTIONS = 20
EDITS_PER_S, EDITORS = 100, 5
VICTIM_S = 15.0  # on a quiet machine: about one second
MEMORY_LIMIT_MB = 268  # 256 MiB, of the container in deploy/components/secrets


@asynccontextmanager
async def tenant() -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the API server, which kubectl would be too slow for."""
    pki = cluster.ca_file().parent
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    connector = aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS)
    async with aiohttp.ClientSession("https://127.0.0.1:6443", connector=connector, trust_env=False) as session:
        yield session


def path(name: str = "") -> str:
    return f"/apis/networking.k8s.io/v1/namespaces/{FLOOD}/ingresses{name and '/'}{name}"


def hostile(number: int) -> dict[str, Any]:
    """Return an Ingress: every second one requests a name that the policy allows, the others a name of another tenant."""
    namespace = FLOOD if number % 2 else OWN
    name = f"flood-{number}"
    return secrets.ingress(name, FLOOD, {name: [f"{name}.{namespace}.example.com"]})


async def _flood(session: aiohttp.ClientSession) -> None:
    numbers = iter(range(INGRESSES))

    async def create() -> None:
        for number in numbers:
            async with session.post(path(), json=hostile(number)) as answer:
                assert answer.status == 201, await answer.text()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(create())


async def _edit(session: aiohttp.ClientSession, edits: list[float]) -> None:
    """Change the host of an Ingress again and again, from several clients; ``edits`` gets the time of each change."""
    async with session.post(path(), json=secrets.ingress("edited", FLOOD, {"edited": [f"0.{FLOOD}.example.com"]})):
        pass
    headers = {"Content-Type": "application/merge-patch+json"}

    async def edit() -> None:
        while True:
            tls = [{"secretName": "edited", "hosts": [f"{len(edits)}.{FLOOD}.example.com"]}]
            async with session.patch(path("edited"), json={"spec": {"tls": tls}}, headers=headers) as answer:
                assert answer.status in (200, 409), await answer.text()
            edits.append(time.monotonic())
            await asyncio.sleep(EDITORS / EDITS_PER_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(EDITORS):
            group.create_task(edit())


def _wait_for_victim(name: str) -> float:
    begin = time.monotonic()
    host_name = f"{name}.{OWN}.example.com"
    cluster.apply(secrets.ingress(name, OWN, {name: [host_name]}))
    secrets.wait_for_certificate(name, OWN, host_name, seconds=60)
    return time.monotonic() - begin


def _restarts() -> int:
    return sum(host.restarts(pod) for pod in secrets.replicas())


async def _attack() -> dict[str, float]:
    waited, edits = {}, list[float]()
    async with tenant() as flooder, tenant() as editor:
        flooding, editing = asyncio.create_task(_flood(flooder)), asyncio.create_task(_edit(editor, edits))
        await until(lambda: len(edits) > EDITORS, "the first edits of each client")
        waited["during the flood"] = await asyncio.to_thread(_wait_for_victim, "during")
        await flooding
        flooded = len(edits)
        for number in range(5):
            name = f"after-{number}"
            waited[name] = await asyncio.to_thread(_wait_for_victim, name)
        editing.cancel()
        await asyncio.wait([editing])
        assert editing.cancelled(), editing.exception()
        async with flooder.delete(path()) as answer:
            assert answer.status == 200
    rate = (len(edits) - flooded) / (edits[-1] - edits[flooded])
    print(f"{flooded} edits during the flood, then {rate:.0f} per second")
    assert rate > EDITS_PER_S / 4
    return waited


@pytest.mark.timeout(240)
def test_flood_of_ingresses_does_not_delay_another_namespace() -> None:
    waited, restarts = {"before the flood": _wait_for_victim("before")}, _restarts()
    waited |= asyncio.run(_attack())
    print({name: round(seconds, 1) for name, seconds in waited.items()})
    assert max(waited.values()) < VICTIM_S, waited
    assert _restarts() == restarts
    memory_mb = [rss_mb(host.process_of(pod)) for pod in secrets.replicas()]
    print(f"memory: {memory_mb} MB")
    assert max(memory_mb) < MEMORY_LIMIT_MB / 2
    stolen = [one["metadata"]["name"] for one in cluster.find("secrets", namespace=FLOOD)]
    assert not [name for name in stolen if name.startswith("flood-") and int(name[6:]) % 2 == 0]
