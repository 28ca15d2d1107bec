"""The Secret, the ConfigMap and the token keys of the API server."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.keyring import KEYRING_FILES
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.core.errors import CertmountError
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.kube.client import ObjectName
from csi_driver.kube.connection import Api
from csi_driver.kube.stored_objects import ConfigMapPublisher, SecretStore
from csi_driver.kube.tokens import TokenKeyClient
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.kube.api_server import ISSUER, JWKS, FakeApiServer

SECRET, CONFIG_MAP = "secrets/certmount-ca", "configmaps/certmount-root"
VALUES = {"root.crt": Secret(b"certificate"), "root.key": Secret(b"\x00key\xff")}


@pytest.fixture
def store(api: Api) -> SecretStore:
    return SecretStore(api, ObjectName("Secret", "certmount", "certmount-ca"))


@pytest.fixture
def publisher(api: Api) -> ConfigMapPublisher:
    return ConfigMapPublisher(api, ObjectName("ConfigMap", "certmount", "certmount-root"))


async def test_empty_secret_has_a_version(store: SecretStore) -> None:
    assert await store.load() == StoredSecrets({}, "100")


async def test_save_writes_values_and_keeps_the_rest(store: SecretStore, server: FakeApiServer) -> None:
    assert await store.save(VALUES, await store.load())
    assert (await store.load()).values == VALUES
    secret = server.objects[SECRET]
    assert base64.b64decode(secret["data"]["root.key"]) == b"\x00key\xff"
    assert secret["metadata"]["labels"] == {"app.kubernetes.io/name": "certmount-authority"}
    assert {method for method, _, _ in server.requests} == {"GET", "PUT"}


async def test_save_fails_for_an_old_version(store: SecretStore, server: FakeApiServer) -> None:
    seen = await store.load()
    server.touch(SECRET)
    assert not await store.save(VALUES, seen)
    seen = await store.load()
    server.before_put = [SECRET]
    assert not await store.save(VALUES, seen)
    assert "data" not in server.objects[SECRET]
    assert await store.save(VALUES, await store.load())


async def test_replicas_that_start_together_share_one_ca(store: SecretStore, server: FakeApiServer) -> None:
    replicas = [CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry())) for _ in range(4)]
    keyrings = await asyncio.gather(*(replica.refresh() for replica in replicas))
    assert len({keyring.root for keyring in keyrings}) == 1
    assert set(server.objects[SECRET]["data"]) == {*KEYRING_FILES, "state.json"}


async def test_missing_secret_is_named(store: SecretStore, server: FakeApiServer) -> None:
    del server.objects[SECRET]
    with pytest.raises(
        CertmountError,
        match=r'^IssuerUnavailable: Secret certmount/certmount-ca: .* 404: secrets "certmount-ca" not found',
    ):
        await store.load()


@pytest.mark.parametrize("data", [{"root.crt": "%%%"}, {"root.crt": "a"}])
async def test_damaged_secret_is_not_overwritten(data: Any, store: SecretStore, server: FakeApiServer) -> None:
    """It can be the only copy of a root that pods trust."""
    server.objects[SECRET]["data"] = data
    with pytest.raises(CertmountError, match=r"^InvalidCA: .*not valid base64"):
        await CertificateAuthority(StoredCA(store), AuthorityMetrics(CollectorRegistry())).refresh()
    assert server.objects[SECRET]["data"] == data


async def test_publisher_writes_only_changed_roots(publisher: ConfigMapPublisher, server: FakeApiServer) -> None:
    server.objects[CONFIG_MAP]["data"] = {"note": "ours"}
    await publisher.publish(b"root", b"own")
    await publisher.publish(b"root", b"own")
    assert server.objects[CONFIG_MAP]["data"] == {"note": "ours", "root.crt": "root", "authority.crt": "own"}
    assert [method for method, _, _ in server.requests] == ["GET", "PUT", "GET"]
    server.objects[CONFIG_MAP]["data"]["root.crt"] = "a mistake"
    await publisher.publish(b"root", b"own")
    assert server.objects[CONFIG_MAP]["data"]["root.crt"] == "root"


async def test_publisher_retries_after_a_conflict(publisher: ConfigMapPublisher, server: FakeApiServer) -> None:
    server.before_put = [CONFIG_MAP]
    await publisher.publish(b"root", b"own")
    assert server.objects[CONFIG_MAP]["data"] == {"root.crt": "root", "authority.crt": "own"}


async def test_failed_publication_is_reported(publisher: ConfigMapPublisher, server: FakeApiServer) -> None:
    server.before_put = [CONFIG_MAP] * 2
    with pytest.raises(
        CertmountError, match=r"^RootCertificateMissing: ConfigMap certmount/certmount-root: another client changed it"
    ):
        await publisher.publish(b"root", b"own")
    server.fail = (403, b'{"message": "configmaps is forbidden"}')
    with pytest.raises(CertmountError, match="403: configmaps is forbidden"):
        await publisher.publish(b"root", b"own")


async def test_token_keys_come_from_the_api_server(server: FakeApiServer, api: Api) -> None:
    """Not from the jwks_uri of the discovery document."""
    keys = await TokenKeyClient(api).fetch()
    assert keys.issuer == ISSUER
    assert json.loads(keys.jwks) == JWKS
    assert [path for _, path, _ in server.requests] == ["/.well-known/openid-configuration", "/openid/v1/jwks"]


@pytest.mark.parametrize("document", [b"<html>", b"[]", {"issuer": ""}, {"issuer": 7}, {}])
async def test_discovery_without_issuer_fails(document: Any, server: FakeApiServer, api: Api) -> None:
    server.documents["/.well-known/openid-configuration"] = document
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: .*has no issuer"):
        await TokenKeyClient(api).fetch()


async def test_failed_discovery_is_retryable(server: FakeApiServer, api: Api) -> None:
    server.fail = (403, b'{"message": "forbidden"}')
    with pytest.raises(
        CertmountError, match="service account issuer discovery: the API server rejects the request: HTTP 403"
    ) as failure:
        await TokenKeyClient(api).fetch()
    assert failure.value.retryable
