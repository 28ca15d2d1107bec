"""The API server as a pod finds it: over TLS, with a token that the kubelet renews."""

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
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.leaf import Leaf, sign_leaf
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
    """The folder that every pod has, with the cluster's root and the pod's own token."""
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    (tmp_path / "token").write_text("first")
    return tmp_path


@pytest.fixture
def tls(account: Path) -> ssl.SSLContext:
    """A server certificate for localhost, below the root in the pod's folder."""
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


async def test_the_pods_token_is_shown_and_read_again(
    account: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet replaces it hourly; a client that kept the first one would be locked out."""
    server = FakeApiServer()
    async with server.running(tls):
        point_at(server, monkeypatch)
        configuration = in_cluster_configuration()
        async with connect(configuration) as api:
            await TokenKeyClient(api).fetch()
            (account / "token").write_text("second")
            hook: Any = configuration.refresh_api_key_hook
            hook.__closure__[0].cell_contents.token_expires_at -= timedelta(minutes=2)  # as a minute later
            await TokenKeyClient(api).fetch()
    assert server.authorizations == ["bearer first"] * 2 + ["bearer second"] * 2


async def test_an_api_server_that_the_clusters_root_does_not_vouch_for_is_not_spoken_to(
    account: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens go to no one else."""
    (account / "ca.crt").write_bytes(make_keyring(utc_now()).roots_pem)
    server = FakeApiServer()
    async with server.running(tls):
        point_at(server, monkeypatch)
        async with connect(in_cluster_configuration()) as api:
            with pytest.raises(CertmountError, match="cannot be reached"):
                await TokenKeyClient(api).fetch()
    assert server.requests == []


async def test_proxies_of_the_environment_are_not_used(
    account: Path,  # noqa: ARG001  # its files are what counts
    tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy meant for the outside would get every pod's token."""
    server = FakeApiServer()
    async with server.running(tls):
        point_at(server, monkeypatch)
        for variable in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, "http://127.0.0.1:1")
        async with connect(in_cluster_configuration()) as api:
            await TokenKeyClient(api).fetch()


async def test_all_that_an_authority_needs_is_found(
    account: Path,  # noqa: ARG001  # its files are what counts
    tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stores, publisher, keys, reviews, pods and Services, and events, all at the cluster's API server."""
    server = FakeApiServer()
    server.objects["secrets/certmount-acknowledgements"] = server.objects["secrets/certmount-ca"]
    server.collection("pods").put({"metadata": {"name": "hello-0", "namespace": "web", "uid": "pod-uid"}})
    server.collection("namespaces").put({"metadata": {"name": "web"}})
    async with server.running(tls):
        point_at(server, monkeypatch)
        objects = ("certmount", "certmount-ca"), ("certmount", "certmount-root")
        async with open_cluster_environment(*objects, CollectorRegistry()) as around:
            assert (await around.ca_store.load()).values == (await around.acknowledgement_store.load()).values == {}
            await around.publisher.publish(b"root", b"own")
            await around.fetch_keys()
            assert len(around.outdated()) == 3
            following = asyncio.create_task(around.run())
            await until(lambda: not around.outdated(), "all lists")
            assert (await around.subjects.find(POD)).services == ()
            around.events.record(POD, warning=True, reason="NameNotAllowed", message="x")
            await until(lambda: server.events, "the event")
            following.cancel()
            await asyncio.wait([following])
    assert server.objects["configmaps/certmount-root"]["data"] == {"root.crt": "root", "authority.crt": "own"}


async def test_outside_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear sentence."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(CertmountError, match="cluster: cannot be found: Service host/port is not set"):
        in_cluster_configuration()
