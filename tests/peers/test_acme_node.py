"""From the pod's volume to a CA and back: the real driver, the real authority, pebble and bind9, and a kubelet that has little patience."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import jwt
from cryptography import x509

from csi_driver import NODE_AUDIENCE
from csi_driver._proto import csi_pb2
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.cluster.objects import ReviewedToken
from csi_driver.core.secret import Secret
from tests.integration.authority.world import Cluster, World
from tests.integration.node.world import Shown, kubelet_root
from tests.peers.acme import Site, site
from tests.support.driver import Driver
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.support.waiting import until

NAME = "shop.example.test"
ATTRIBUTES = {"issuer": "letsencrypt", "name": NAME}
POLICY = f"""
policy:
- match: {{namespaces: [web], serviceAccounts: [shop]}}
  allow: {{dns: [{NAME}], issuers: [internal, letsencrypt]}}
"""
SPIFFE_ID = "spiffe://cluster.local/ns/web/sa/shop"

Request = csi_pb2.NodePublishVolumeRequest


class AllPods:
    """A cluster in which each token's pod lives."""

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken:
        if audience == NODE_AUDIENCE:
            return DRIVER.reviewed
        return _pod_of(jwt.decode(token.reveal(), options={"verify_signature": False})["kubernetes.io"]).reviewed


def _pod_of(claims: Mapping[str, Mapping[str, str]]) -> Pod:
    pod, account = claims["pod"], claims["serviceaccount"]
    return Pod(pod["name"], str(claims["namespace"]), account["name"], uid=pod["uid"])


@dataclass
class Node:
    """A node with its kubelet, whose pods are all of one Deployment."""

    kubelet: Kubelet
    driver: Driver
    channel: grpc.aio.Channel
    issuer: TokenIssuer

    def request(self, number: int = 0) -> Request:
        """For a new pod."""
        pod = FakePod("web", f"shop-{number}", "shop")
        token = self.issuer.pod_token(Pod(pod.name, pod.namespace, pod.service_account, uid=pod.uid))
        return self.kubelet.publish_request(pod, ATTRIBUTES, token=token.reveal())

    async def publish(self, request: Request, patience_s: float = 60.0) -> None:
        await node_stub(self.channel).NodePublishVolume(request, timeout=patience_s, wait_for_ready=True)

    async def unpublish(self, request: Request) -> None:
        gone = self.kubelet.unpublish_request(request)
        await node_stub(self.channel).NodeUnpublishVolume(gone, timeout=20.0, wait_for_ready=True)

    @staticmethod
    def shown(request: Request) -> Shown:
        return Shown.at(Path(request.target_path))


def _issuers(one: Site, **options: str) -> str:
    dns, settings = one.dns, one.settings
    acme = {
        "account": {"folder": settings.account.folder},
        "directory": settings.directory,
        "terms_agreed": True,
        "ca": {"file": settings.ca_file},
        "roots": {"file": settings.roots_file},
        "dns01": {
            "server": dns.address,
            "tsig": {"file": dns.key_source.path},
            "resolvers": [dns.address],
            "nameservers": [dns.address],
        },
        **options,
    }
    return json.dumps({"issuers": [{"name": "letsencrypt", "acme": acme}]})


@contextlib.asynccontextmanager
async def _node(one: Site, **options: str) -> AsyncIterator[Node]:
    """All of it, running."""
    issuer = TokenIssuer()
    file = one.folder / "issuers.json"
    file.write_text(_issuers(one, **options))
    world = World(one.folder, issuer, Cluster(issuer), issuers=file, serving_names=("localhost",), reviewer=AllPods())  # type: ignore[arg-type]  # it reviews, and that is all
    world.policy.write_text(POLICY)
    token = one.folder / "node-token"
    token.write_text(issuer.node_token().reveal())
    async with world.running() as server:
        await until(lambda: "letsencrypt" in server._trust._bundle.sets, "the issuer's roots")
        with kubelet_root() as root:
            kubelet, log = Kubelet(root), root.parent / "driver.log"
            driver = Driver(kubelet, f"localhost:{server.port}", world.ca / "authority.crt", token, log)
            async with driver, kubelet.channel() as channel:
                yield Node(kubelet, driver, channel, issuer)


async def test_a_deployment_on_one_node_is_one_order(tmp_path: Path) -> None:
    """Twenty pods at once and ten crashes after that: the CA has one order and one certificate to count."""
    async with site(tmp_path) as one, _node(one) as node:
        requests = [node.request(number) for number in range(20)]
        await asyncio.gather(*(node.publish(request) for request in requests))
        serials = {node.shown(request).serial for request in requests}
        for number in range(10):
            crashing = node.request(20 + number)
            await node.publish(crashing)
            serials.add(node.shown(crashing).serial)
            await node.unpublish(crashing)
        assert len(serials) == 1
        assert node.shown(requests[0]).names == [NAME]
        assert len(one.ca.orders) == len(one.ca.issued) == 1
        root = x509.load_der_x509_certificate(await one.ca.root())
        assert node.shown(requests[0]).roots == (root,)


async def test_an_order_outlasts_the_kubelets_patience(tmp_path: Path) -> None:
    """Each call is cut off and each volume removed while the CA is at it: the call that comes after it takes the certificate of the first order."""
    async with site(tmp_path, retry_after_s=5) as one, _node(one) as node:
        request, cut_off = node.request(), 0
        async with asyncio.timeout(60):
            while True:
                try:
                    await node.publish(request, patience_s=2.0)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    cut_off += 1
                    await node.unpublish(request)
                else:
                    break
        assert cut_off >= 2
        assert node.shown(request).names == [NAME]
        assert len(one.ca.orders) == len(one.ca.issued) == 1


async def test_a_pod_starts_while_its_order_is_on_its_way(tmp_path: Path) -> None:
    """With a stand-in of the internal CA, which the running pod sees exchanged for the public certificate; by one order."""
    async with site(tmp_path, retry_after_s=10) as one, _node(one, while_pending="internal") as node:
        request = node.request()
        await node.publish(request)
        before = node.shown(request)
        assert {name.text for name in names_of(before.leaf.extensions)} == {NAME, SPIFFE_ID}
        public = x509.load_der_x509_certificate(await one.ca.root())
        assert public in before.roots
        assert len(before.roots) == 2
        await until(lambda: node.shown(request).serial != before.serial, "the exchange", patience_s=60.0)
        after = node.shown(request)
        assert after.names == [NAME]
        assert after.key == before.key
        assert after.roots == (public,)
        assert len(one.ca.orders) == len(one.ca.issued) == 1
        assert not node.driver.events("renewal failed")
