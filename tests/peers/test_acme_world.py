"""Volumes with certificates of an ACME CA: the driver's own process, a real authority, pebble and bind9."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver import NODE_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.authority import server
from csi_driver.core.cluster.token_review import ReviewedToken
from csi_driver.core.names import DNSName, Names
from csi_driver.core.secret import Secret
from tests.integration.authority.world import POD, Cluster, World
from tests.integration.node.world import Shown, kubelet_root
from tests.peers.acme import Site, site
from tests.support.driver import Driver
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.support.waiting import until

pytestmark = pytest.mark.peers("pebble", "named", "openssl")

NAME = "shop.example.test"
POLICY = """
policy:
- match: {namespaces: [default], serviceAccounts: [hello]}
  allow: {dns: ["*.example.test"], issuers: [internal, public]}
"""


@dataclass(frozen=True)
class Node:
    """A node whose pod asks for public certificates."""

    site: Site
    world: World
    kubelet: Kubelet
    stub: Any

    async def publish(self, asking: Pod = POD) -> csi_pb2.NodePublishVolumeRequest:
        """The pod's volume, published as the kubelet does: again until it succeeds."""
        pod = FakePod(asking.namespace, asking.name, asking.service_account, asking.uid)
        token = self.world.issuer.pod_token(asking).reveal()
        request = self.kubelet.publish_request(pod, {"issuer": "public", "name": NAME}, token=token)
        async with asyncio.timeout(90):
            while True:
                try:
                    await self.stub.NodePublishVolume(request, timeout=100, wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, error.details()
                    await asyncio.sleep(0.5)
                else:
                    return request

    async def unpublish(self, request: csi_pb2.NodePublishVolumeRequest) -> None:
        await self.stub.NodeUnpublishVolume(self.kubelet.unpublish_request(request), timeout=30)


@contextlib.asynccontextmanager
async def node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any] | None = None, **pebble: Any
) -> AsyncIterator[Node]:
    async with site(folder / "site", **pebble) as one:
        file = folder / "issuers.yaml"
        acme = {
            "account": {"folder": str(folder / "account")},
            "directory": one.settings.directory,
            "ca": {"file": one.settings.ca_file},
            "roots": {"file": one.settings.roots_file},
            "terms_agreed": True,
            "dns01": {
                "server": one.dns.address,
                "tsig": {"file": one.dns.key_source.path},
                "resolvers": [one.dns.address],
                "nameservers": [one.dns.address],
            },
        }
        file.write_text(yaml.safe_dump({"issuers": [{"name": "public", "acme": {**acme, **(entry or {})}}]}))
        usual = server.AuthorityServer

        def with_issuers(settings: server.AuthoritySettings, *others: Any) -> server.AuthorityServer:
            local = Names.of([*settings.serving_names.dns, DNSName("localhost")])
            return usual(dataclasses.replace(settings, issuers=file, serving_names=local), *others)

        monkeypatch.setattr("tests.integration.authority.world.AuthorityServer", with_issuers)
        issuer = TokenIssuer()
        world = World(folder, issuer, Cluster(issuer))
        world.policy.write_text(POLICY)
        with kubelet_root() as root:
            kubelet = Kubelet(root)
            token = root.parent / "token"
            token.write_text(world.issuer.node_token().reveal())
            async with world.running():
                address = f"localhost:{world.server.port}"
                async with (
                    Driver(kubelet, address, world.ca / "authority.crt", token, root.parent / "driver.log"),
                    kubelet.channel() as channel,
                ):
                    yield Node(one, world, kubelet, node_stub(channel))


async def test_a_volume_with_a_public_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the certificate of the CA, with the DNS name and no identity, and the CA's root: by one order."""
    async with node(tmp_path, monkeypatch) as one:
        request = await one.publish()
        shown = Shown.at(Path(request.target_path))
        assert shown.names == [NAME]
        assert [root.public_bytes(Encoding.DER) for root in shown.roots] == [await one.site.ca.root()]
        assert len(one.site.ca.orders) == 1
        await one.unpublish(request)


async def test_twenty_pods_of_one_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods of one service account on one node with the same names share one certificate: one order, however many start at once."""
    pods = [dataclasses.replace(POD, name=f"hello-{number}", uid=str(uuid.uuid4())) for number in range(20)]
    by_uid = {pod.uid: pod for pod in pods}

    async def review(token: Secret[str], audience: str) -> ReviewedToken:
        if audience == NODE_AUDIENCE:
            return DRIVER.reviewed
        claims = jwt.decode(token.reveal(), options={"verify_signature": False})
        return by_uid[claims["kubernetes.io"]["pod"]["uid"]].reviewed

    async with node(tmp_path, monkeypatch) as one:
        monkeypatch.setattr(one.world.reviewer, "review", review)
        requests = await asyncio.gather(*(one.publish(pod) for pod in pods))
        volumes = [Shown.at(Path(request.target_path)) for request in requests]
        assert len({shown.serial for shown in volumes}) == 1
        assert len(one.site.ca.orders) == 1
        for request in requests:
            await one.unpublish(request)


async def test_a_pod_that_starts_before_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``while_pending: internal`` it starts at once with the internal CA's, and finds the public one in its place later, by one order."""
    slow = {"retry_after_s": 12}
    async with node(tmp_path, monkeypatch, {"while_pending": "internal"}, **slow) as one:
        request = await one.publish()
        target = Path(request.target_path)
        first = Shown.at(target)
        assert any(str(name).startswith("spiffe://") for name in first.names)
        await until(lambda: set(Shown.at(target).names) == {NAME}, "the public certificate", patience_s=90)
        assert Shown.at(target).serial != first.serial
        assert len(one.site.ca.orders) == 1
        await one.unpublish(request)
