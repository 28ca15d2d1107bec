"""The command with a real authority: tokens, policy, and the Lease."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from click.testing import CliRunner
from cryptography import x509

from csi_driver.cli import secrets as command
from csi_driver.core.addresses import parse_listen_address
from csi_driver.kube import connection
from csi_driver.kube.connection import ApiConfiguration
from csi_driver.rpc import authority_channel
from csi_driver.secrets.settings import SecretsSettings
from tests.integration.authority.world import SERVING_NAME, World, secrets_world
from tests.support.tenant_api import TenantApi
from tests.support.tokens import TokenIssuer
from tests.support.waiting import until

POLICY = """
policy:
- match: {namespaces: [shop], secrets: ["*"]}
  allow: {dns: [shop.example.com, "*.shop.example.com"], usages: [server], max_duration: 72h}
"""


@pytest.fixture
async def authority(tmp_path: Path) -> AsyncIterator[World]:
    world = secrets_world(tmp_path, TokenIssuer(), POLICY)
    async with world.running():
        yield world


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TenantApi]:
    api = TenantApi()
    async with api.running():
        configuration = lambda: ApiConfiguration(url=api.url)  # noqa: E731
        monkeypatch.setattr(connection, "in_cluster_configuration", configuration)
        yield api


@contextlib.asynccontextmanager
async def running(authority: World, monkeypatch: pytest.MonkeyPatch, *lists: tuple[str, str]) -> AsyncIterator[None]:
    """Run the command as in a pod."""
    options = (*authority_channel._OPTIONS, ("grpc.ssl_target_name_override", SERVING_NAME))
    monkeypatch.setattr(authority_channel, "_OPTIONS", options)
    stop = asyncio.Event()
    monkeypatch.setattr(command, "stop_on_signals", lambda: stop)
    token = authority.folder / "controller-token"
    token.write_text(authority.issuer.controller_token().reveal())
    settings = SecretsSettings(
        authority=f"127.0.0.1:{authority.server.port}",
        authority_root=authority.ca / "authority.crt",
        token=token,
        namespaces=("shop", "web"),
        lists=lists,
        ingress_classes=frozenset(),
        default_issuer="internal",
        lease=("certmount", "certmount-secrets"),
    )
    task = asyncio.create_task(command._run(settings, parse_listen_address("127.0.0.1:0")))
    try:
        yield
    finally:
        stop.set()
        await task


async def test_ingress_gets_a_certificate_of_the_internal_ca(
    authority: World, api: TenantApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.ingress("shop", "shop", {"secretName": "tls", "hosts": ["shop.example.com"]})
    api.ingress("shop", "evil", {"secretName": "evil", "hosts": ["bank.example.com"]})
    api.ingress("web", "web", {"secretName": "tls", "hosts": ["shop.example.com"]})
    async with running(authority, monkeypatch):
        await until(lambda: "shop/tls" in api.secrets, "the Secret")
        await until(lambda: api.reasons("evil") and api.reasons("web"), "the events")
        assert api.lease["spec"]["holderIdentity"]
    leaf = x509.load_pem_x509_certificate(api.data("shop/tls")["tls.crt"])
    assert leaf.not_valid_after_utc - datetime.now(UTC) < timedelta(hours=73)
    assert api.data("shop/tls")["ca.crt"] == (authority.ca / "root.crt").read_bytes()
    assert api.lease["spec"]["holderIdentity"] == "", "a replica that stops releases the Lease"
    assert (set(api.reasons("evil")), set(api.reasons("web"))) == ({"NameNotAllowed"}, {"NameNotAllowed"})
    assert "no policy rule allows this name for secret shop/evil" in api.notes("evil", "NameNotAllowed")[0]
    assert set(api.secrets) == {"shop/tls"}


async def test_list_of_notariat_gets_its_secret(
    authority: World, api: TenantApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "- secret: cert\n  domains:\n    - shop.example.com\n    - www.shop.example.com\n- secret: web/x\n  domains: []\n"
    api.certificate_list("shop", "notariat-config", text)
    async with running(authority, monkeypatch, ("shop", "notariat-config")):
        await until(lambda: "shop/cert" in api.secrets, "the Secret")
        await until(lambda: "InvalidSource" in api.reasons("notariat-config"), "the event")
    (note,) = api.notes("notariat-config", "InvalidSource")
    assert note == "certificates[1].domains (line 6): is empty; list the DNS names of the certificate"
    assert api.annotations("shop/cert")["source"] == "ConfigMap/shop/notariat-config"


async def test_policy_that_allows_the_name_later_is_enough(
    authority: World, api: TenantApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.ingress("web", "web", {"secretName": "tls", "hosts": ["web.example.com"]})
    async with running(authority, monkeypatch):
        await until(lambda: "NameNotAllowed" in api.reasons("web"), "the event")
        rule = "- match: {namespaces: [web], secrets: [tls]}\n  allow: {dns: [web.example.com], usages: [server]}\n"
        authority.policy.write_text(POLICY + rule)
        await until(lambda: "web/tls" in api.secrets, "the Secret", 40)


async def test_status_shows_each_requested_secret(
    authority: World, api: TenantApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.ingress("shop", "shop", {"secretName": "tls", "hosts": ["shop.example.com"]})
    api.ingress("shop", "evil", {"secretName": "evil", "hosts": ["bank.example.com"]})
    api.ingress("shop", "faulty", {"secretName": "x", "hosts": ["not_a_name"]})
    api.secret("shop/other", {}, {"app": "other"})
    api.ingress("shop", "other", {"secretName": "other", "hosts": ["other.shop.example.com"]})
    async with running(authority, monkeypatch):
        await until(lambda: "shop/tls" in api.secrets, "the Secret")
        arguments = ["status", "--namespace", "shop", "--output"]
        with structlog.testing.capture_logs():  # of the controller, which would be in the output
            result = await asyncio.to_thread(CliRunner().invoke, command.command, [*arguments, "json"])
        assert result.exit_code == 0, result.output
        rows = {row["secret"]: row for row in json.loads(result.output)}
        assert {name: row["state"] for name, row in rows.items()} == {
            "tls": "ready",
            "evil": "missing",
            "other": "not managed",
            "": "failed",
        }
        assert rows["tls"]["expires"] == api.annotations("shop/tls")["not-after"]
        assert rows["evil"]["reason"] == "see the events of Ingress shop/evil"
        api.secrets["shop/tls"]["metadata"]["annotations"]["certmount.dev/not-after"] = "2026-01-01T00:00:00Z"
        with structlog.testing.capture_logs():
            result = await asyncio.to_thread(CliRunner().invoke, command.command, [*arguments, "text"])
        header, *lines = result.output.splitlines()
        assert header.split() == ["NAMESPACE", "SECRET", "NAMES", "ISSUER", "EXPIRES", "STATE", "SOURCE", "REASON"]
        assert len(lines) == 4
        assert "2026-01-01T00:00:00Z  expired  " in result.output
