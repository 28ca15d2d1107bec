"""Connections from a pod: TLS, and a token that the kubelet renews."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.certificates import Leaf, sign_leaf
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.cluster_environment import open_cluster_environment
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType, Usage
from csi_driver.kube import connection
from csi_driver.kube.connection import Api, in_cluster_configuration
from csi_driver.kube.tokens import TokenKeyClient
from tests.support.waiting import in_background, until
from tests.unit.kube.api_server import FakeApiServer

POD = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", "pod-uid", "node-a", "node-uid", 2e9)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory with the cluster's root and the pod's token."""
    monkeypatch.setattr(connection, "SERVICE_ACCOUNT", tmp_path)
    (tmp_path / "token").write_text("first")
    return tmp_path


@pytest.fixture
def tls(account: Path) -> ssl.SSLContext:
    """A server certificate for localhost that chains to the root in the pod."""
    keyring, key = make_keyring(utc_now()), generate_key(KeyType.EC_P256)
    (account / "ca.crt").write_bytes(keyring.roots_pem)
    leaf = Leaf(key.public_key(), Names.of([DNSName.parse("localhost")]), timedelta(hours=1), (Usage.SERVER,))
    certificate = sign_leaf(leaf, keyring.intermediate, utc_now())
    chain = account / "server.pem"
    chain.write_bytes(encode_key(key).reveal() + encode_certificates([certificate, keyring.intermediate.certificate]))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return context


@pytest.fixture
async def secure_server(tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApiServer]:
    """The API server of the cluster in which the test runs."""
    server = FakeApiServer()
    async with server.running(tls):
        host, _, port = server.url.removeprefix("https://").rpartition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        yield server


async def test_client_rereads_the_token(
    account: Path, secure_server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet replaces it hourly."""
    async with Api(in_cluster_configuration()) as api:
        await TokenKeyClient(api).fetch()
        (account / "token").write_text("second")
        await TokenKeyClient(api).fetch()
        monkeypatch.setattr(connection, "TOKEN_AGE_S", 0)
        await TokenKeyClient(api).fetch()
        (account / "token").unlink()
        await TokenKeyClient(api).fetch()
    assert secure_server.authorizations == ["Bearer first"] * 4 + ["Bearer second"] * 4


async def test_client_rejects_an_api_server_with_another_root(account: Path, secure_server: FakeApiServer) -> None:
    (account / "ca.crt").write_bytes(make_keyring(utc_now()).roots_pem)
    async with Api(in_cluster_configuration()) as api:
        with pytest.raises(CertmountError, match="cannot reach the API server"):
            await TokenKeyClient(api).fetch()
    assert secure_server.requests == []


@pytest.mark.usefixtures("secure_server")
async def test_client_ignores_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would receive every pod's token."""
    for variable in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    async with Api(in_cluster_configuration()) as api:
        await TokenKeyClient(api).fetch()


async def test_cluster_environment_provides_all_clients(secure_server: FakeApiServer) -> None:
    server = secure_server
    server.objects["secrets/certmount-acknowledgements"] = server.objects["secrets/certmount-ca"]
    server.collection("pods").put({"metadata": {"name": "hello-0", "namespace": "web", "uid": "pod-uid"}})
    server.collection("namespaces").put({"metadata": {"name": "web"}})
    objects = ("certmount", "certmount-ca"), ("certmount", "certmount-root")
    async with open_cluster_environment(*objects, CollectorRegistry()) as environment:
        for store in (environment.ca_store, environment.acknowledgement_store):
            assert (await store.load()).values == {}
        await environment.publisher.publish(b"root", b"own")
        await environment.fetch_keys()
        assert len(environment.outdated()) == 3
        async with in_background(environment.run()):
            await until(lambda: not environment.outdated(), "all lists")
            assert (await environment.subjects.find(POD, Names())).services == ()
            environment.events.record(POD, warning=True, reason="NameNotAllowed", message="x")
            await until(lambda: server.events, "the event")
    assert server.objects["configmaps/certmount-root"]["data"] == {"root.crt": "root", "authority.crt": "own"}


async def test_configuration_fails_outside_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(
        CertmountError,
        match="cluster: no in-cluster configuration: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set",
    ):
        in_cluster_configuration()
