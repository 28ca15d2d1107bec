"""A tenant that floods the controller delays only itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import structlog

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ObjectName
from csi_driver.kube.connection import Api, ApiConfiguration
from csi_driver.kube.tls_secrets.secret_client import SecretClient
from csi_driver.secrets import manager
from csi_driver.secrets.requests import SecretName
from csi_driver.secrets.work_queue import WorkQueue
from csi_driver.telemetry.log_shares import MAX_FAILURES_LOGGED
from tests.integration.secrets.conftest import World
from tests.support.waiting import in_background, until


async def test_ingress_that_changes_100_times_a_second(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Secret gets few certificates, and others are served."""
    monkeypatch.setattr(manager, "MIN_ISSUE_INTERVAL_S", 30.0)

    async def flood() -> None:
        for number in range(100_000):
            world.api.ingress("shop", "flood", {"secretName": "flood", "hosts": [f"h{number}.example.com"]})
            await asyncio.sleep(0.01)

    async with world.running(), in_background(flood()):
        await world.until_secret("shop/flood")
        for number in range(5):
            world.api.ingress("web", f"web-{number}", {"secretName": f"tls-{number}", "hosts": ["web.example.com"]})
            await world.until_secret(f"web/tls-{number}")
    flooded = [one for one in world.authority.requests if one.secret.namespace == "shop"]
    assert len(flooded) == 1


async def test_ingress_that_names_other_secrets_all_the_time_does_not_fill_the_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 Secrets of a namespace are worked on in a second; an Ingress can name 100 others in each of its versions."""
    queues: list[WorkQueue] = []

    class ObservedQueue(WorkQueue):
        def __init__(self, action: Callable[[SecretName], Awaitable[None]]) -> None:
            super().__init__(action)
            queues.append(self)

    monkeypatch.setattr("csi_driver.secrets.controller.WorkQueue", ObservedQueue)
    async with world.running():
        for version in range(50):
            entries = [{"secretName": f"v{version}-{n}", "hosts": ["a.example.com"]} for n in range(50)]
            world.api.ingress("shop", "flood", *entries)
            await asyncio.sleep(0.02)
        await until(lambda: any(key.startswith("shop/v49-") for key in world.api.secrets), "the last version")
        assert len(queues[0]) < 300, "2,500 names were requested"
        # Those that were worked on are forgotten, too.
        world.api.ingresses["shop"].remove("shop/flood")
        await until(lambda: not len(queues[0]), "an empty queue")


async def test_many_ingresses_that_the_policy_refuses(world: World) -> None:
    def refuse(desired: object) -> CertmountError | None:
        fault = Fault("evil.example.com", "no policy rule allows this name")
        return CertmountError(Reason.NAME_NOT_ALLOWED, fault) if "evil" in str(desired) else None

    world.authority.failure = refuse
    for number in range(1000):
        world.api.ingress("shop", f"i-{number}", {"secretName": f"tls-{number}", "hosts": ["evil.example.com"]})
    async with world.running():
        await until(lambda: len(world.authority.requests) > 20, "the flood")
        world.api.ingress("web", "web", {"secretName": "tls", "hosts": ["web.example.com"]})
        await world.until_secret("web/tls")
        assert len(world.authority.requests) < 500
    assert [key for key in world.api.secrets if key.startswith("shop/")] == []


async def test_failures_of_one_namespace_do_not_fill_the_log(world: World) -> None:
    """Otherwise they would replace the lines about others, because Kubernetes keeps 50 MB of the log of a container."""
    for number in range(1000):
        world.api.ingress("shop", f"i-{number}", {"secretName": "tls", "hosts": ["evil_host"]})
        refused = {"secretName": f"tls-{number}", "hosts": [f"h{number}.example.com"]}
        world.api.ingress("shop", f"r-{number}", refused)
    world.api.ingress("web", "web", {"secretName": "tls", "hosts": ["evil_host"]})
    fault = Fault("h0.example.com", "no policy rule allows this name")
    world.authority.failure = lambda _: CertmountError(Reason.NAME_NOT_ALLOWED, fault)
    with structlog.testing.capture_logs() as logs:
        async with world.running():
            await until(lambda: world.api.reasons("web"), "the event of another tenant")
            await until(lambda: len(world.authority.requests) > 10, "failures of Secrets")
    lines = [one for one in logs if one["event"] in ("source not valid", "certificate not issued")]
    assert len([one for one in lines if "web/web" in one.get("source", "")]) == 1
    assert 200 < len(lines) <= MAX_FAILURES_LOGGED // 2 + 1


async def test_slow_issuer_of_one_namespace_does_not_delay_others(world: World) -> None:
    world.authority.gate = asyncio.Event()
    for number in range(100):
        world.api.ingress("shop", f"i-{number}", {"secretName": f"tls-{number}", "hosts": ["a.example.com"]})
    async with world.running():
        await until(lambda: len(world.authority.requests) >= 16, "the flood")
        waiting = len(world.authority.requests)
        world.api.ingress("web", "web", {"secretName": "tls", "hosts": ["web.example.com"]})
        await until(lambda: len(world.authority.requests) > waiting, "the victim's request")
        assert str(world.authority.requests[-1].secret) == "web/tls"
        world.authority.gate.set()
        await world.until_secret("web/tls")


async def test_hosts_that_are_no_dns_names_cause_events_and_no_requests(world: World) -> None:
    hosts = ["evil_host", "*", "..", "a" * 300, "xn--\u200b", "1.2.3.4", "\ud800"]
    world.api.ingress("shop", "evil", *({"secretName": f"s-{n}", "hosts": [host]} for n, host in enumerate(hosts)))
    world.api.ingress("shop", "good", {"secretName": "good", "hosts": ["good.example.com"]})
    async with world.running():
        await world.until_secret("shop/good")
        await until(lambda: world.api.reasons("evil"), "the event")
    assert world.api.reasons("evil") == ["InvalidSource"]
    assert [str(one.secret) for one in world.authority.requests] == ["shop/good"]


async def test_entry_of_a_list_cannot_name_a_namespace_that_is_not_managed(world: World) -> None:
    world.settings = replace(world.settings, lists=(("infra", "list"),))
    text = "- secret: kube-system/x\n  domains: [a.example.com]\n- secret: web/x\n  domains: [b.example.com]\n"
    world.api.certificate_list("infra", "list", text)
    async with world.running():
        await world.until_secret("web/x")
        await until(lambda: world.api.reasons("list"), "the event")
    assert set(world.api.secrets) == {"web/x"}
    (note,) = world.api.notes("list", "InvalidSource")
    assert note == (
        "certificates[0].secret (line 1): 'kube-system/x' is in a namespace that the controller does not manage; "
        "--namespace has shop, web"
    )


async def test_other_keys_of_a_secret_are_not_parsed(world: World) -> None:
    """A Secret can have 100,000 keys. To parse them takes half a second, in which no other Secret is worked on."""
    keys = {f"key-{number}": b"" for number in range(1000)}
    world.api.secret("shop/tls", {**keys, "tls.crt": b"a certificate"})
    async with Api(ApiConfiguration(url=world.api.url)) as api:
        contents = await SecretClient(api).read(ObjectName("Secret", "shop", "tls"))
    assert {key: value.reveal() for key, value in contents.data.items()} == {"tls.crt": b"a certificate"}
