"""Gateways get their Secrets, as Ingresses do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.integration.secrets.conftest import World
from tests.support.waiting import until


def listener(hostname: str, *secrets: dict[str, str] | str, **tls: Any) -> dict[str, Any]:
    references = [{"name": one} if isinstance(one, str) else one for one in secrets]
    return {"name": "https", "protocol": "HTTPS", "hostname": hostname, "tls": {"certificateRefs": references, **tls}}


@pytest.fixture
def gateways(world: World) -> World:
    world.settings = replace(world.settings, gateways=True)
    return world


def names_of(world: World, secret: str) -> set[str]:
    return {
        str(name) for desired in world.authority.requests for name in desired.names if str(desired.secret) == secret
    }


async def test_listeners_of_one_secret_share_its_certificate(gateways: World) -> None:
    """A Gateway that is created, changed, or no longer asks for certificates."""
    world = gateways
    world.api.gateway("shop", "edge", listener("shop.example.com", "tls"), listener("*.example.com", "tls"))
    async with world.running():
        await world.until_secret("shop/tls")
        assert names_of(world, "shop/tls") == {"shop.example.com", "*.example.com"}
        assert world.api.annotations("shop/tls")["source"] == "Gateway/shop/edge"
        await until(lambda: world.api.reasons("edge") == ["CertificateIssued"], "the event")
        world.api.gateway("shop", "edge", listener("www.example.com", "www-tls"))
        await world.until_secret("shop/www-tls")
        world.api.gateway("shop", "edge", listener("no.example.com", "no-tls"), **{"kubernetes.io/tls-acme": "false"})
        world.api.gateway("shop", "other", listener("other.example.com", "other-tls"))
        await world.until_secret("shop/other-tls")
        assert "shop/no-tls" not in world.api.secrets
        await until(lambda: world.metric("certmount_secrets_certificates", state="ready") == 1, "one managed Secret")


async def test_secrets_of_other_namespaces_and_other_kinds_are_not_requested(gateways: World) -> None:
    world = gateways
    world.api.gateway(
        "shop", "edge", listener("a.example.com", {"name": "tls", "namespace": "web"}),
        listener("b.example.com", {"name": "b", "kind": "ConfigMap"}), listener("c.example.com", "c", mode="Passthrough"),
        listener("d.example.com", "d"),
    )  # fmt: skip
    async with world.running():
        await world.until_secret("shop/d")
        await until(lambda: "InvalidSource" in world.api.reasons("edge"), "the event")
        (note,) = world.api.notes("edge", "InvalidSource")
        assert "spec.listeners[0]" in note
        assert "web/tls" in note
        assert set(world.api.secrets) == {"shop/d"}


@pytest.mark.parametrize("spec", [None, [], {}, {"listeners": {}}, {"listeners": None}])
async def test_invalid_gateway_stops_no_other(gateways: World, spec: object) -> None:
    world = gateways
    world.api.gateway("shop", "bad")
    world.api.gateways["shop"].objects["shop/bad"]["spec"] = spec
    invalid: list[Any] = [7, "x", {"tls": []}, {"tls": {"certificateRefs": {}}}]  # the API server would reject them
    world.api.gateway("shop", "edge", *invalid, listener("d.example.com", "d"))
    async with world.running():
        await world.until_secret("shop/d")


async def test_number_of_gateways_of_a_namespace_is_limited(gateways: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another namespace is not affected."""
    monkeypatch.setattr("csi_driver.secrets.gateway_cache.MAX_GATEWAYS", 2)
    for name in ("a", "b", "c"):
        gateways.api.gateway("shop", name, listener(f"{name}.example.com", name))
    gateways.api.gateway("web", "d", listener("d.example.com", "d"))
    async with gateways.running():
        for secret in ("shop/a", "shop/b", "web/d"):
            await gateways.until_secret(secret)
        assert set(gateways.api.secrets) == {"shop/a", "shop/b", "web/d"}


async def test_gateways_are_not_read_by_default(world: World) -> None:
    """A cluster without the Gateway API causes no requests."""
    world.api.gateway("shop", "edge", listener("shop.example.com", "tls"))
    world.api.ingress("shop", "site", {"secretName": "site", "hosts": ["site.example.com"]})
    async with world.running():
        await world.until_secret("shop/site")
        assert not [path for _, path in world.api.requests if "gateway" in path]
