"""The Secret, the ConfigMap and the token keys of the API server."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from kubernetes.aio import client
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import KEYRING_FILES
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.stored_secrets import StoredSecrets
from csi_driver.kube.client import ObjectName
from csi_driver.kube.stored_objects import ConfigMapPublisher, SecretStore
from csi_driver.kube.tokens import TokenKeyClient
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.kube.api_server import ISSUER, JWKS, FakeApiServer

SECRET, CONFIG_MAP = "secrets/certmount-ca", "configmaps/certmount-root"
VALUES = {"root.crt": Secret(b"certificate"), "root.key": Secret(b"\x00key\xff")}


@pytest.fixture
def store(api: client.ApiClient) -> SecretStore:
    return SecretStore(api, ObjectName("Secret", "certmount", "certmount-ca"))


@pytest.fixture
def publisher(api: client.ApiClient) -> ConfigMapPublisher:
    return ConfigMapPublisher(api, ObjectName("ConfigMap", "certmount", "certmount-root"))


async def test_the_empty_secret_of_the_manifests_holds_no_ca(store: SecretStore) -> None:
    """It has a version all the same, to base the first save on."""
    assert await store.load() == StoredSecrets({}, "100")


async def test_values_are_read_back_as_saved(store: SecretStore, server: FakeApiServer) -> None:
    """Whatever their bytes; the rest of the Secret stays as it was, and only get and update are used."""
    assert await store.save(VALUES, await store.load())
    assert (await store.load()).values == VALUES
    secret = server.objects[SECRET]
    assert base64.b64decode(secret["data"]["root.key"]) == b"\x00key\xff"
    assert secret["metadata"]["labels"] == {"app.kubernetes.io/name": "certmount-authority"}
    assert {method for method, _, _ in server.requests} == {"GET", "PUT"}


async def test_a_writer_who_has_seen_something_else_is_late(store: SecretStore, server: FakeApiServer) -> None:
    """Whether the other one came before the look or after it."""
    seen = await store.load()
    server.touch(SECRET)
    assert not await store.save(VALUES, seen)
    seen = await store.load()
    server.before_put = [SECRET]
    assert not await store.save(VALUES, seen)
    assert "data" not in server.objects[SECRET]
    assert await store.save(VALUES, await store.load())


async def test_replicas_that_start_at_once_share_one_ca(store: SecretStore, server: FakeApiServer) -> None:
    """By the API server's own conflicts."""
    replicas = [CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry())) for _ in range(4)]
    keyrings = await asyncio.gather(*(replica.refresh() for replica in replicas))
    assert len({keyring.root for keyring in keyrings}) == 1
    assert set(server.objects[SECRET]["data"]) == {*KEYRING_FILES, "state.json"}


async def test_a_secret_that_is_missing_is_named(store: SecretStore, server: FakeApiServer) -> None:
    """And may appear: the manifests make it."""
    del server.objects[SECRET]
    with pytest.raises(
        CertmountError, match=r'Secret certmount/certmount-ca: .* 404: secrets "certmount-ca" not found'
    ) as failure:
        await store.load()
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE


@pytest.mark.parametrize("data", [{"root.crt": "%%%"}, {"root.crt": "a"}])
async def test_a_damaged_secret_is_an_error_and_stays(data: Any, store: SecretStore, server: FakeApiServer) -> None:
    """It may be the only copy of a root that pods trust."""
    server.objects[SECRET]["data"] = data
    with pytest.raises(CertmountError, match="not base64") as failure:
        await CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry())).refresh()
    assert failure.value.reason is Reason.INVALID_CA
    assert server.objects[SECRET]["data"] == data


async def test_the_root_is_published_and_the_rest_left_alone(
    publisher: ConfigMapPublisher, server: FakeApiServer
) -> None:
    """Written once, and again when someone has changed it."""
    server.objects[CONFIG_MAP]["data"] = {"note": "ours"}
    await publisher.publish(b"root", b"own")
    await publisher.publish(b"root", b"own")
    assert server.objects[CONFIG_MAP]["data"] == {"note": "ours", "root.crt": "root", "authority.crt": "own"}
    assert [method for method, _, _ in server.requests] == ["GET", "PUT", "GET"]
    server.objects[CONFIG_MAP]["data"]["root.crt"] = "a mistake"
    await publisher.publish(b"root", b"own")
    assert server.objects[CONFIG_MAP]["data"]["root.crt"] == "root"


async def test_two_replicas_that_publish_at_once_both_succeed(
    publisher: ConfigMapPublisher, server: FakeApiServer
) -> None:
    """The one that comes second looks again."""
    server.before_put = [CONFIG_MAP]
    await publisher.publish(b"root", b"own")
    assert server.objects[CONFIG_MAP]["data"] == {"root.crt": "root", "authority.crt": "own"}


async def test_a_root_that_cannot_be_published_says_why(publisher: ConfigMapPublisher, server: FakeApiServer) -> None:
    """A permission that is missing, or writers without end; either may pass."""
    server.before_put = [CONFIG_MAP] * 2
    with pytest.raises(CertmountError, match="ConfigMap certmount/certmount-root: someone else changed it") as failure:
        await publisher.publish(b"root", b"own")
    assert failure.value.reason is Reason.ROOT_CERTIFICATE_MISSING
    server.fail = (403, b'{"message": "configmaps is forbidden"}')
    with pytest.raises(CertmountError, match="403: configmaps is forbidden"):
        await publisher.publish(b"root", b"own")


async def test_the_token_keys_come_from_the_api_server_itself(server: FakeApiServer, api: client.ApiClient) -> None:
    """Not from the address that the discovery document may give for others."""
    keys = await TokenKeyClient(api).fetch()
    assert keys.issuer == ISSUER
    assert json.loads(keys.jwks) == JWKS
    assert [path for _, path, _ in server.requests] == ["/.well-known/openid-configuration", "/openid/v1/jwks"]


@pytest.mark.parametrize(
    "path,document",
    [
        ("/.well-known/openid-configuration", b"<html>"),
        ("/.well-known/openid-configuration", b"[]"),
        ("/.well-known/openid-configuration", {"issuer": ""}),
        ("/.well-known/openid-configuration", {"issuer": 7}),
        ("/.well-known/openid-configuration", {}),
    ],
)
async def test_a_strange_discovery_document_is_no_issuer(
    path: str, document: Any, server: FakeApiServer, api: client.ApiClient
) -> None:
    """No token is believed on such a word."""
    server.documents[path] = document
    with pytest.raises(CertmountError, match="names no issuer") as failure:
        await TokenKeyClient(api).fetch()
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


async def test_keys_that_cannot_be_had_may_be_later(server: FakeApiServer, api: client.ApiClient) -> None:
    """With the API server's reason."""
    server.fail = (403, b'{"message": "forbidden"}')
    with pytest.raises(CertmountError, match="service account issuer discovery: the API server answers 403") as failure:
        await TokenKeyClient(api).fetch()
    assert failure.value.retryable
