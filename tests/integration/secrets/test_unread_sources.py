"""A certificate loses no names because the API server did not return all sources."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from structlog.testing import capture_logs

from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from csi_driver.kube.client import ObjectName
from csi_driver.kube.tls_secrets.secret_client import SecretClient, SecretMetadata
from csi_driver.kube.tls_secrets.watches import read_gateway
from csi_driver.secrets import source_watches
from tests.integration.secrets.conftest import World
from tests.integration.secrets.test_gateways import listener
from tests.support.waiting import until
from tests.unit.kube.collection import Collection, status_response

INGRESS, GATEWAY, NEW = "ingress.example.com", "gateway.example.com", "new.example.com"
KEY = generate_key(KeyType.EC_P256)


class Unavailable(Collection):
    """A resource whose first ``failures`` requests fail."""

    def __init__(self, failures: int, kind: str = "") -> None:
        super().__init__(kind)
        self.failures = failures

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.failures > 0:
            self.failures -= 1
            return status_response(503, "unavailable")
        return await super().answer(request)


def put(world: World, secret: str, *hosts: str, source: str = "Gateway/shop/edge", age_days: int = 0) -> None:
    """Store a Secret as if certmount had written it."""
    ca = world.authority.cas["internal"]
    ca.ahead = -timedelta(days=age_days)
    leaf = ca.sign(KEY.public_key(), Names.of([DNSName(host) for host in hosts]), timedelta(days=90))
    ca.ahead = timedelta()
    data = {"tls.crt": leaf.public_bytes(Encoding.PEM), "tls.key": encode_key(KEY).reveal(), "ca.crt": ca.pem}
    annotations = {"issuer": "internal", "environment": "internal", "condition": "Ready", "source": source}
    labels = {"app.kubernetes.io/managed-by": "certmount"}
    world.api.secret(secret, data, labels, {f"certmount.dev/{key}": value for key, value in annotations.items()})


def names(world: World, secret: str) -> set[str]:
    leaf = x509.load_pem_x509_certificate(world.api.data(secret)["tls.crt"])
    found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(found.get_values_for_type(x509.DNSName))


def requested(world: World) -> list[str]:
    return [str(desired.secret) for desired in world.authority.requests]


def ready(world: World) -> float:
    return world.metric("certmount_secrets_certificates", state="ready")


@pytest.fixture
def shared(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """An Ingress and a Gateway share a Secret, which has a valid certificate."""
    monkeypatch.setattr("csi_driver.secrets.controller.READ_INTERVAL_S", 0.05)
    world.settings = replace(world.settings, gateways=True)
    put(world, "shop/tls", INGRESS, GATEWAY)
    world.api.ingress("shop", "site", {"secretName": "tls", "hosts": [INGRESS]})
    return world


def fail_lists(world: World, times: int) -> Unavailable:
    """Let the lists of Gateways in ``shop`` fail this often."""
    failing = world.api.gateways["shop"] = Unavailable(times)
    world.api.gateway("shop", "edge", listener(GATEWAY, "tls"))
    return failing


def not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_watches, "_SYNC_S", 0.2)


async def test_one_failed_list_removes_no_names(shared: World) -> None:
    fail_lists(shared, 1)
    async with shared.running():
        await until(lambda: ready(shared), "the check")
    assert (requested(shared), names(shared, "shop/tls")) == ([], {INGRESS, GATEWAY})


async def test_one_failed_read_of_a_gateway_removes_no_names(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_lists(shared, 0)
    calls = []

    async def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise CertmountError(Reason.API_SERVER_UNAVAILABLE, "the API server does not respond in time")
        return await read_gateway(*arguments)

    monkeypatch.setattr(source_watches, "read_gateway", fail_once)
    async with shared.running():
        await until(lambda: ready(shared), "the check")
    assert (requested(shared), names(shared, "shop/tls")) == ([], {INGRESS, GATEWAY})


async def test_names_are_kept_until_all_sources_are_read(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile, new certificates are issued, and other namespaces are not affected."""
    not_wait_long(monkeypatch)
    failing = fail_lists(shared, 10**9)
    put(shared, "shop/old", INGRESS, "old.example.com", source="Ingress/shop/old")
    put(shared, "web/old", INGRESS, "old.example.com", source="Ingress/web/old")
    tls = {"secretName": "old", "hosts": [INGRESS]}
    shared.api.ingress("shop", "old", tls)
    shared.api.ingress("shop", "new", {"secretName": "new", "hosts": [NEW]})
    shared.api.ingress("web", "old", tls)
    with capture_logs() as logs:
        async with shared.running():
            await until(lambda: ready(shared) == 4, "all checks")
            assert sorted(requested(shared)) == ["shop/new", "web/old"]
            assert names(shared, "shop/tls") == {INGRESS, GATEWAY}
            failing.failures = 0
            await until(lambda: "shop/old" in requested(shared), "the renewal after the list")
            await until(lambda: names(shared, "shop/old") == {INGRESS}, "the new certificate")
            assert "shop/tls" not in requested(shared)
    kept = {line["secret"]: line["unread"] for line in logs if line["event"] == "names kept until all sources are read"}
    assert kept == {"shop/tls": ("gateways of shop",), "shop/old": ("gateways of shop",)}
    (warning,) = [line for line in logs if line["event"].startswith("sources not read yet")]
    assert warning["resources"] == ["gateways of shop"]


@pytest.mark.parametrize("settled", [False, True])
async def test_names_that_are_missing_in_a_certificate_are_added_after_some_time(
    settled: bool, shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unread source delays this only if the new certificate would have fewer of the old names."""
    not_wait_long(monkeypatch)
    monkeypatch.setattr("csi_driver.secrets.manager.SETTLE_S", 0.0 if settled else 600.0)
    fail_lists(shared, 10**9)
    put(shared, "shop/more", INGRESS)
    shared.api.ingress("shop", "site", {"secretName": "tls", "hosts": [INGRESS, NEW]})
    shared.api.ingress("shop", "more", {"secretName": "more", "hosts": [INGRESS, NEW]})
    async with shared.running():
        await until(lambda: ready(shared) == 2, "both checks")
    assert names(shared, "shop/more") == {INGRESS, NEW}
    assert names(shared, "shop/tls") == ({INGRESS, NEW} if settled else {INGRESS, GATEWAY})


@pytest.mark.parametrize("age_days,renewed", [(65, False), (80, True)])
async def test_expiring_certificate_keeps_its_names_until_it_is_overdue(
    age_days: int, renewed: bool, shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_wait_long(monkeypatch)
    monkeypatch.setattr("csi_driver.secrets.manager.SETTLE_S", 0.0)
    fail_lists(shared, 10**9)
    put(shared, "shop/tls", INGRESS, GATEWAY, age_days=age_days)
    async with shared.running():
        await until(lambda: ready(shared), "the check")
    assert (names(shared, "shop/tls") == {INGRESS}) is renewed


async def test_gateway_that_is_too_large_stops_no_other_namespace(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its namespace keeps the names of its Secrets, and the start is not delayed."""
    monkeypatch.setattr(source_watches, "_SYNC_S", 600.0)
    shared.api.gateway("shop", "edge", listener(GATEWAY, "tls"), listener("x" * 2**17, "tls"))
    shared.api.ingress("shop", "new", {"secretName": "new", "hosts": [NEW]})
    shared.api.ingress("web", "new", {"secretName": "new", "hosts": [NEW]})
    async with shared.running():
        await until(lambda: ready(shared) == 3, "all checks")
        assert names(shared, "shop/tls") == {INGRESS, GATEWAY}
        shared.api.gateway("shop", "edge", listener("other.example.com", "tls"))
        await until(lambda: names(shared, "shop/tls") == {INGRESS, "other.example.com"}, "the new names")


async def test_unread_list_keeps_the_names_of_its_secrets_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Ingress with the same Secret does not replace them."""
    not_wait_long(monkeypatch)
    world.settings = replace(world.settings, lists=(("shop", "list"),))
    world.api.config_maps["shop"] = Unavailable(10**9, "ConfigMap")
    put(world, "web/listed", INGRESS, "listed.example.com", source="ConfigMap/shop/list")
    put(world, "web/other", INGRESS, "old.example.com", source="Ingress/web/other")
    for name in ("listed", "other"):
        world.api.ingress("web", name, {"secretName": name, "hosts": [INGRESS]})
    async with world.running():
        await until(lambda: ready(world) == 2, "both checks")
    assert requested(world) == ["web/other"]


async def test_source_that_is_read_during_a_check_is_not_missed(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those from before the source was read."""
    not_wait_long(monkeypatch)
    failing = fail_lists(shared, 10**9)
    read_metadata, reads = SecretClient.metadata, []

    async def observed(*arguments: Any) -> Any:
        reads.append(await read_gateway(*arguments))
        return reads[-1]

    async def metadata_afterwards(self: SecretClient, name: ObjectName) -> SecretMetadata | None:
        failing.failures = 0
        await until(lambda: reads, "the read")
        return await read_metadata(self, name)

    monkeypatch.setattr(source_watches, "read_gateway", observed)
    monkeypatch.setattr(SecretClient, "metadata", metadata_afterwards)
    async with shared.running():
        await until(lambda: ready(shared), "the check")
    assert (requested(shared), names(shared, "shop/tls")) == ([], {INGRESS, GATEWAY})
