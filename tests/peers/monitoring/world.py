"""A running certmount that Prometheus scrapes: an authority, a node driver and a Secrets controller as processes, and their failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from csi_driver._proto import csi_pb2
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.core.formats.pem import encode_certificates
from tests.integration.node.world import kubelet_root
from tests.peers.monitoring.prometheus import Prometheus, running_prometheus
from tests.support.driver import Driver, http_get, started
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.ports import free_port
from tests.support.tenant_api import TenantApi
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.support.waiting import in_background, until

NODE = "node1"
RULES = """
policy:
- match: {namespaces: [web], serviceAccounts: [shop]}
  allow: {dns: [shop.example.com], issuers: [internal, letsencrypt], min_duration: 10s}
- match: {namespaces: [shop], secrets: ["*"]}
  allow: {dns: [shop.example.com], usages: [server], max_duration: 72h}
"""
DENY = """
deny:
- match: {namespaces: [web], serviceAccounts: [old]}
  reason: its token was in a log
"""
_REPUBLISH_S = 2.0
_NODE_POD = Pod(DRIVER.name, DRIVER.namespace, DRIVER.service_account, NODE, DRIVER.uid)

Request = csi_pb2.NodePublishVolumeRequest


@dataclass
class Monitored:
    """The programs, and what a test does with them."""

    prometheus: Prometheus
    policy: Path
    kubelet: Kubelet
    issuer: TokenIssuer
    api: TenantApi
    published: list[Request] = field(default_factory=list)

    async def publish(self, name: str, account: str, **attributes: str) -> str:
        """Publish a volume of a pod; return the reason of a failure, or nothing."""
        pod = FakePod("web", name, account)
        token = self.issuer.pod_token(Pod(pod.name, pod.namespace, pod.service_account, NODE, pod.uid))
        request = self.kubelet.publish_request(pod, attributes, token=token.reveal())
        async with self.kubelet.channel() as channel:
            try:
                await node_stub(channel).NodePublishVolume(request, timeout=20.0, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                return str(error.details()).partition(":")[0]
        self.published.append(request)
        return ""

    async def republish(self) -> None:
        """Publish all volumes again periodically, as the kubelet does."""
        async with self.kubelet.channel() as channel:
            while True:
                for request in list(self.published):
                    await node_stub(channel).NodePublishVolume(request, timeout=20.0, wait_for_ready=True)
                await asyncio.sleep(_REPUBLISH_S)

    async def use_everything(self) -> None:
        """Cause work and failures of every kind that the dashboard shows."""
        for number in range(4):
            assert not await self.publish(
                f"shop-{number}", "shop", **{"dns-names": "shop.example.com", "duration": "20s"}
            )
        for number in range(2):
            assert not await self.publish(f"old-{number}", "old", duration="20s")
        self.policy.write_text(RULES + DENY)
        assert await self.publish("edge", "edge", **{"dns-names": "bank.example.com"}) == "NameNotAllowed"
        # The CA does not answer, so this volume has an interim certificate. The kubelet retries while it has none.
        acme = {"dns-names": "shop.example.com", "issuer": "letsencrypt"}
        while reason := await self.publish("acme", "shop", **acme):
            assert reason in ("AuthorityUnavailable", "IssuancePending", "IssuerUnavailable"), reason
        self.api.ingress("shop", "shop", {"secretName": "tls", "hosts": ["shop.example.com"]})
        self.api.ingress("shop", "bank", {"secretName": "bank", "hosts": ["bank.example.com"]})


@contextlib.asynccontextmanager
async def monitored(directory: Path) -> AsyncIterator[Monitored]:
    """Run the programs until the block ends."""
    issuer, api, authority_port = TokenIssuer(), TenantApi(), free_port()
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("certmount-authority", "certmount-secrets")}
    policy, root = directory / "policy.yaml", directory / "ca/authority.crt"
    policy.write_text(RULES)
    node_token, controller_token = directory / "node-token", directory / "controller-token"
    node_token.write_text(issuer.node_token(_NODE_POD).reveal())
    controller_token.write_text(issuer.controller_token().reveal())
    with (
        _authority(directory, issuer, authority_port, addresses["certmount-authority"]) as process,
        kubelet_root() as kubelet_dir,
    ):
        kubelet = Kubelet(kubelet_dir)
        ready = f"http://{addresses['certmount-authority']}/readyz"
        await until(lambda: process.poll() is not None or http_get(ready)[0] == 200, "the authority")
        assert process.poll() is None, (directory / "authority.log").read_text()
        driver = Driver(kubelet, f"localhost:{authority_port}", root, node_token, directory / "driver.log")
        options = [f"--authority=localhost:{authority_port}", f"--authority-root={root}", f"--token={controller_token}"]
        options += [
            f"--http={addresses['certmount-secrets']}",
            "--namespace=shop",
            "--lease=certmount/certmount-secrets",
        ]
        async with api.running(), driver:
            await kubelet.register()
            targets = {**addresses, "certmount-node": driver.http}
            with _secrets_controller(directory, api.url, options):
                async with running_prometheus(directory, targets) as prometheus:
                    world = Monitored(prometheus, policy, kubelet, issuer, api)
                    async with in_background(world.republish()):
                        yield world


@contextlib.contextmanager
def _authority(directory: Path, issuer: TokenIssuer, port: int, http: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run an authority with an ACME issuer whose CA cannot be reached."""
    acme = {
        "directory": f"https://localhost:{free_port()}/directory",
        "account": {"directory": str(directory / "acme")},
        "email": "ops@example.com",
        "terms_agreed": True,
        "http01": {},
        "while_pending": "internal",
        "roots": {"file": str(directory / "acme-root.crt")},
    }
    (directory / "acme-root.crt").write_bytes(encode_certificates([make_keyring(datetime.now(UTC)).root]))
    (directory / "issuers.yaml").write_text(json.dumps({"issuers": [{"name": "letsencrypt", "acme": acme}]}))
    (directory / "jwks.json").write_bytes(issuer.published.jwks)
    options = [
        f"--listen=127.0.0.1:{port}", f"--http={http}", f"--policy={directory}/policy.yaml",
        f"--issuers={directory}/issuers.yaml", f"--acme-http=127.0.0.1:{free_port()}", "--serving-name=localhost",
        "--secrets-service-account=certmount/certmount-secrets", f"--ca-dir={directory}/ca",
        f"--jwks={directory}/jwks.json", f"--token-issuer={issuer.name}",
    ]  # fmt: skip
    with started("authority", *options, log=directory / "authority.log") as process:
        yield process


@contextlib.contextmanager
def _secrets_controller(directory: Path, api_url: str, options: list[str]) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.peers.monitoring.secrets_process", api_url, *options]
    with (directory / "secrets.log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield
        finally:
            process.terminate()
