"""Connections from a pod: TLS, and a token that the kubelet renews."""

from __future__ import annotations

import asyncio
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.config import incluster_config
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
from csi_driver.kube.client import connect, in_cluster_configuration
from csi_driver.kube.tokens import TokenKeyClient
from tests.support.waiting import until
from tests.unit.kube.api_server import FakeApiServer

POD = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", "pod-uid", "node-a", "node-uid", 2e9)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory with the cluster's root and the pod's token."""
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
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


def point_at(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, port = server.url.removeprefix("https://").rpartition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)


async def test_client_rereads_the_token(account: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kubelet replaces it hourly."""
    server = FakeApiServer()
    async with server.running(tls):
        point_at(server, monkeypatch)
        configuration = in_cluster_configuration()
        async with connect(configuration) as api:
            await TokenKeyClient(api).fetch()
            (account / "token").write_text("second")
            hook: Any = configuration.refresh_api_key_hook
            hook.__closure__[0].cell_contents.token_expires_at -= timedelta(minutes=2)  # a minute later
            await TokenKeyClient(api).fetch()
    assert server.authorizations == ["bearer first"] * 2 + ["bearer second"] * 2


async def test_client_rejects_an_api_server_with_another_root(
    account: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account / "ca.crt").write_bytes(make_keyring(utc_now()).roots_pem)
    server = FakeApiServer()
    async with server.running(tls):
        point_at(server, monkeypatch)
        async with connect(in_cluster_configuration()) as api:
            with pytest.raises(CertmountError, match="cannot reach the API server"):
                await TokenKeyClient(api).fetch()
    assert server.requests == []


async def test_client_ignores_proxies_of_the_environment(
    account: Path,  # noqa: ARG001  # for its files
    tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy would receive every pod's token."""
    server = FakeApiServer()
    async with server.running(tls):
        point_at(server, monkeypatch)
        for variable in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, "http://127.0.0.1:1")
        async with connect(in_cluster_configuration()) as api:
            await TokenKeyClient(api).fetch()


async def test_cluster_environment_provides_all_clients(
    account: Path,  # noqa: ARG001  # for its files
    tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = FakeApiServer()
    server.objects["secrets/certmount-acknowledgements"] = server.objects["secrets/certmount-ca"]
    server.collection("pods").put({"metadata": {"name": "hello-0", "namespace": "web", "uid": "pod-uid"}})
    server.collection("namespaces").put({"metadata": {"name": "web"}})
    async with server.running(tls):
        point_at(server, monkeypatch)
        objects = ("certmount", "certmount-ca"), ("certmount", "certmount-root")
        async with open_cluster_environment(*objects, CollectorRegistry()) as environment:
            assert (
                (await environment.ca_store.load()).values
                == (await environment.acknowledgement_store.load()).values
                == {}
            )
            await environment.publisher.publish(b"root", b"own")
            await environment.fetch_keys()
            assert len(environment.outdated()) == 3
            task = asyncio.create_task(environment.run())
            await until(lambda: not environment.outdated(), "all lists")
            assert (await environment.subjects.find(POD)).services == ()
            environment.events.record(POD, warning=True, reason="NameNotAllowed", message="x")
            await until(lambda: server.events, "the event")
            task.cancel()
            await asyncio.wait([task])
    assert server.objects["configmaps/certmount-root"]["data"] == {"root.crt": "root", "authority.crt": "own"}


async def test_configuration_fails_outside_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(CertmountError, match="cluster: no in-cluster configuration: Service host/port is not set"):
        in_cluster_configuration()
