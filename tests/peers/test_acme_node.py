"""ACME certificates in volumes: the real driver, a real authority, Pebble and bind9."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from tests.peers.acme import AcmeEnvironment, acme_environment
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
    """A TokenReview in which the pod of each token exists."""

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken:
        if audience == NODE_AUDIENCE:
            return DRIVER.reviewed
        return _pod_of(jwt.decode(token.reveal(), options={"verify_signature": False})["kubernetes.io"]).reviewed


def _pod_of(claims: Mapping[str, Mapping[str, str]]) -> Pod:
    pod, account = claims["pod"], claims["serviceaccount"]
    return Pod(pod["name"], str(claims["namespace"]), account["name"], uid=pod["uid"])


@dataclass
class Node:
    """A node with its kubelet and driver."""

    kubelet: Kubelet
    driver: Driver
    channel: grpc.aio.Channel
    issuer: TokenIssuer

    def request(self, pod: FakePod, attributes: Mapping[str, str]) -> Request:
        token = self.issuer.pod_token(Pod(pod.name, pod.namespace, pod.service_account, uid=pod.uid))
        return self.kubelet.publish_request(pod, attributes, token=token.reveal())

    async def publish(self, request: Request, timeout_s: float = 60.0) -> None:
        await node_stub(self.channel).NodePublishVolume(request, timeout=timeout_s, wait_for_ready=True)

    async def unpublish(self, request: Request) -> None:
        gone = self.kubelet.unpublish_request(request)
        await node_stub(self.channel).NodeUnpublishVolume(gone, timeout=20.0, wait_for_ready=True)

    @staticmethod
    def shown(request: Request) -> Shown:
        return Shown.at(Path(request.target_path))


@contextlib.asynccontextmanager
async def running_node(world: World) -> AsyncIterator[Node]:
    with kubelet_root() as root:
        token = root.parent / "node-token"
        token.write_text(world.issuer.node_token().reveal())
        kubelet, log = Kubelet(root), root.parent / "driver.log"
        driver = Driver(kubelet, f"localhost:{world.server.port}", world.ca / "authority.crt", token, log)
        async with driver, kubelet.channel() as channel:
            yield Node(kubelet, driver, channel, world.issuer)


def _request(node: Node, number: int = 0) -> Request:
    """All pods belong to one Deployment."""
    return node.request(FakePod("web", f"shop-{number}", "shop"), ATTRIBUTES)


@contextlib.asynccontextmanager
async def _node(env: AcmeEnvironment, **options: str) -> AsyncIterator[Node]:
    issuer = TokenIssuer()
    file = env.directory / "issuers.json"
    file.write_text(json.dumps({"issuers": [{"name": "letsencrypt", "acme": env.declaration() | options}]}))
    reviewer: Any = AllPods()
    world = World(env.directory, issuer, Cluster(issuer), issuers=file, serving_names=("localhost",), reviewer=reviewer)
    world.policy.write_text(POLICY)
    async with world.running() as server:
        await until(lambda: "letsencrypt" in server._trust.snapshot.sets, "the issuer's roots")
        async with running_node(world) as node:
            yield node


async def test_pods_of_a_deployment_on_one_node_share_one_certificate(tmp_path: Path) -> None:
    """20 pods start at once, then 10 crash: the CA counts one order."""
    async with acme_environment(tmp_path) as env, _node(env) as node:
        requests = [_request(node, number) for number in range(20)]
        await asyncio.gather(*(node.publish(request) for request in requests))
        serials = {node.shown(request).serial for request in requests}
        for number in range(10):
            crashing = _request(node, 20 + number)
            await node.publish(crashing)
            serials.add(node.shown(crashing).serial)
            await node.unpublish(crashing)
        assert len(serials) == 1
        assert node.shown(requests[0]).names == [NAME]
        assert len(env.ca.orders) == len(env.ca.issued) == 1
        root = x509.load_der_x509_certificate(await env.ca.root())
        assert node.shown(requests[0]).roots == (root,)


async def test_order_continues_after_the_kubelet_cancels_calls(tmp_path: Path) -> None:
    """The kubelet removes the volume after each canceled call; a later call gets the certificate of the first order."""
    async with acme_environment(tmp_path, retry_after_s=5) as env, _node(env) as node:
        request, canceled = _request(node), 0
        async with asyncio.timeout(60):
            while True:
                try:
                    await node.publish(request, timeout_s=2.0)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    canceled += 1
                    await node.unpublish(request)
                else:
                    break
        assert canceled >= 2
        assert node.shown(request).names == [NAME]
        assert len(env.ca.orders) == len(env.ca.issued) == 1


async def test_pod_starts_with_an_interim_certificate(tmp_path: Path) -> None:
    async with acme_environment(tmp_path, retry_after_s=10) as env, _node(env, while_pending="internal") as node:
        request = _request(node)
        await node.publish(request)
        before = node.shown(request)
        assert {name.text for name in names_of(before.leaf.extensions)} == {NAME, SPIFFE_ID}
        public = x509.load_der_x509_certificate(await env.ca.root())
        assert public in before.roots
        assert len(before.roots) == 2
        await until(lambda: node.shown(request).serial != before.serial, "the public certificate", timeout_s=60.0)
        after = node.shown(request)
        assert after.names == [NAME]
        assert after.key == before.key
        assert after.roots == (public,)
        assert len(env.ca.orders) == len(env.ca.issued) == 1
        assert not node.driver.events("renewal failed")
