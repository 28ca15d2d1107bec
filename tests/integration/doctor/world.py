"""An installation: the manifests at a real API server, an authority and a node driver as processes, and their pods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi_driver import DRIVER_NAME
from csi_driver.doctor import installation as doctor
from csi_driver.doctor.doctor import examine
from csi_driver.kube.admin.object_reader import ObjectReader
from csi_driver.kube.connection import Api, ApiConfiguration, bearer, client_context
from tests.integration.node.world import kubelet_root
from tests.support.driver import Driver, http_get, started
from tests.support.forwarding_kubelet import ForwardingKubelet, forwarding_kubelet
from tests.support.kubelet import FakePod, Kubelet, node_stub
from tests.support.kubernetes_api import ADMIN, KubernetesApi
from tests.support.ports import free_port, interface_address
from tests.support.tokens import DRIVER, Pod, TokenIssuer
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
AUTHORITY_POD, NODE_POD, NODE = "certmount-authority-0", "certmount-node-0", "node1"
POLICY = """policy:
- match: {namespaces: [web], serviceAccounts: [edge]}
  allow: {dns: [api.example.com]}
"""
Json = dict[str, Any]
MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True)
class TestPod(FakePod):
    """A pod whose token an issuer signs."""

    __test__ = False
    issuer: TokenIssuer = field(default_factory=TokenIssuer, compare=False)

    def token(self, **changes: object) -> str:
        pod = Pod(self.name, self.namespace, self.service_account, NODE, self.uid)
        return self.issuer.pod_token(pod, **changes).reveal()


@dataclass
class Result:
    """What a command printed, and its exit status."""

    status: int
    output: str
    errors: str

    @property
    def document(self) -> Any:
        return json.loads(self.output)


@dataclass
class Installation:
    """Objects at the API server, and the programs of their pods."""

    api: KubernetesApi
    directory: Path
    kubelet: ForwardingKubelet
    issuer: TokenIssuer
    files: Path  # the authority's CA, policy and issuers
    driver_kubelet: Kubelet
    driver: Driver
    authority_log: Path

    def patch(self, path: str, body: Json) -> Json:
        return self.api.call("PATCH", path, json.dumps(body).encode(), content_type=MERGE_PATCH)

    def run(self, *arguments: str, user: str = ADMIN, within: Sequence[str] = ()) -> Result:
        """Run certmount with the kubeconfig of a user; ``within`` is a command that runs it."""
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig(user)), "NO_COLOR": "1"}
        command = [*within, sys.executable, "-m", "csi_driver.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def kubeconfig(self, user: str) -> Path:
        file = self.directory / f"kubeconfig-{user}"
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "a", "cluster": {"server": self.api.url, "certificate-authority": str(self.api.ca)}}],
            "users": [{"name": "a", "user": {"token": user}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "current-context": "a",
        }
        file.write_text(json.dumps(document))
        return file

    def shell(self, command: str) -> None:
        """Run a command of a finding, as an administrator does."""
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig(ADMIN))}
        environment["PATH"] = f"{self.api.kubectl_program.parent}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-ec", f"set -o pipefail; {command}"], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr

    async def publish(self, pod: FakePod, attributes: Mapping[str, str] | None = None) -> Path:
        """Publish a volume of a pod, as the kubelet does, and return its path."""
        request = self.driver_kubelet.publish_request(pod, attributes)
        async with self.driver_kubelet.channel() as channel:
            await node_stub(channel).NodePublishVolume(request, timeout=20.0, wait_for_ready=True)
        return Path(request.target_path)

    async def unpublish(self, pod: FakePod) -> None:
        async with self.driver_kubelet.channel() as channel:
            request = self.driver_kubelet.unpublish_request(self.driver_kubelet.publish_request(pod))
            await node_stub(channel).NodeUnpublishVolume(request, timeout=20.0)

    async def findings(self, user: str = ADMIN) -> list[Json]:
        """Return the findings of ``certmount doctor``, without its own process."""
        tls = client_context(str(self.api.ca))
        async with Api(ApiConfiguration(url=self.api.url, tls=tls, authorization=bearer(user))) as api:
            results = await examine(doctor.Installation(ObjectReader(api), "certmount"))
        return [finding for result in results for finding in result.document()["findings"]]


@contextlib.asynccontextmanager
async def running_installation(api: KubernetesApi, directory: Path) -> AsyncIterator[Installation]:
    files, issuer, http = directory / "authority", TokenIssuer(), free_port()
    files.mkdir()
    (files / "policy.yaml").write_text(POLICY)
    (files / "issuers.yaml").write_text("issuers: []\n")
    (files / "jwks.json").write_bytes(issuer.published.jwks)
    token, log, port = directory / "token", directory / "authority.log", free_port()
    token.write_text(issuer.node_token(Pod(NODE_POD, "certmount", "certmount-node", NODE, DRIVER.uid)).reveal())
    options = [
        f"--listen=127.0.0.1:{port}", f"--http=127.0.0.1:{http}", f"--policy={files}/policy.yaml",
        f"--issuers={files}/issuers.yaml", "--serving-name=localhost", f"--ca-dir={files}/ca",
        f"--jwks={files}/jwks.json", f"--token-issuer={issuer.name}",
    ]  # fmt: skip
    with (
        kubelet_root() as root,
        forwarding_kubelet(interface_address() or "127.0.0.1", free_port(), directory) as kubelet,
        started("authority", *options, log=log) as process,
    ):
        ready = f"http://127.0.0.1:{http}/readyz"
        await until(lambda: process.poll() is not None or http_get(ready)[0] == 200, "the authority")
        assert process.poll() is None, log.read_text()
        driver_kubelet = Kubelet(root)
        root_file = files / "ca" / "authority.crt"
        driver = Driver(driver_kubelet, f"localhost:{port}", root_file, token, directory / "driver.log")
        async with driver:
            await driver_kubelet.register()
            kubelet.ports = {AUTHORITY_POD: http, NODE_POD: int(driver.http.rpartition(":")[2])}
            found = Installation(api, directory, kubelet, issuer, files, driver_kubelet, driver, log)
            await asyncio.to_thread(_create_objects, found)
            yield found


def _create_objects(installation: Installation) -> None:
    """Apply the manifests, and do what the controllers and the kubelet of a cluster do."""
    api, roots = installation.api, installation.files / "ca"
    api.apply(ROOT / "deploy/base")
    installation.patch(
        "/api/v1/namespaces/certmount/configmaps/certmount-root",
        {"data": {name: (roots / name).read_text() for name in ("root.crt", "authority.crt")}},
    )
    for name, key, file in (("policy", "policy.yaml", POLICY), ("issuers", "issuers.yaml", "issuers: []\n")):
        installation.patch(f"/api/v1/namespaces/certmount/configmaps/certmount-{name}", {"data": {key: file}})
    api.call("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
    status = {
        "addresses": [{"type": "InternalIP", "address": installation.kubelet.address}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": installation.kubelet.port}},
        "nodeInfo": _node_info(),
    }
    installation.patch(f"/api/v1/nodes/{NODE}/status", {"status": status})
    driver = {"name": DRIVER_NAME, "nodeID": NODE, "topologyKeys": None}
    api.call("POST", "/apis/storage.k8s.io/v1/csinodes", {"metadata": {"name": NODE}, "spec": {"drivers": [driver]}})
    workloads = "/apis/apps/v1/namespaces/certmount"
    for pod, kind, name in (
        (AUTHORITY_POD, "deployments", "certmount-authority"),
        (NODE_POD, "daemonsets", "certmount-node"),
    ):
        template = api.call("GET", f"{workloads}/{kind}/{name}")["spec"]["template"]
        spec = {**template["spec"], "nodeName": NODE}
        labels = template["metadata"]["labels"]
        api.call(
            "POST", "/api/v1/namespaces/certmount/pods", {"metadata": {"name": pod, "labels": labels}, "spec": spec}
        )
        set_ready(installation, pod, spec["containers"][0]["name"])
    counts = {"currentNumberScheduled": 1, "numberMisscheduled": 0, "desiredNumberScheduled": 1, "numberReady": 1}
    installation.patch(f"{workloads}/daemonsets/certmount-node/status", {"status": counts})
    installation.patch(f"{workloads}/deployments/certmount-authority", {"spec": {"replicas": 1}})
    installation.patch(
        f"{workloads}/deployments/certmount-authority/status",
        {"status": {"replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1}},
    )


def set_ready(installation: Installation, pod: str, container: str, *, waiting: Json | None = None) -> None:
    """Set the status of a pod as its kubelet does."""
    state: Json = {"waiting": waiting} if waiting else {"running": {}}
    status = {
        "phase": "Pending" if waiting else "Running",
        "containerStatuses": [
            {"name": container, "ready": not waiting, "restartCount": 0, "image": "i", "imageID": "i", "state": state}
        ],
    }
    installation.patch(f"/api/v1/namespaces/certmount/pods/{pod}/status", {"status": status})


def _node_info() -> Json:
    keys = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion")
    return {
        **dict.fromkeys(keys, "x"),
        "kubeletVersion": "v1.34.4",
        "kubeProxyVersion": "",
        "operatingSystem": "linux",
        "architecture": "amd64",
    }


@contextlib.contextmanager
def changed(installation: Installation, path: str, body: Json) -> Iterator[None]:
    """Change an object, and restore it afterwards."""
    before = installation.api.call("GET", path)
    installation.patch(path, body)
    try:
        yield
    finally:
        after = installation.api.call("GET", path)
        before["metadata"]["resourceVersion"] = after["metadata"]["resourceVersion"]
        installation.api.call("PUT", path, before)


def on_terminal(installation: Installation, *arguments: str, **variables: str) -> str:
    """Return what certmount prints on a terminal of 118 columns."""
    terminal, process_end = pty.openpty()
    variables = {"COLUMNS": "118", "KUBECONFIG": str(installation.kubeconfig(ADMIN)), **variables}
    command = [sys.executable, "-m", "csi_driver.cli.main", *arguments]
    with subprocess.Popen(command, stdout=process_end, stderr=process_end, env={**os.environ, **variables}):
        os.close(process_end)
        output = bytearray()
        with contextlib.suppress(OSError):  # at the end
            while data := os.read(terminal, 65536):
                output += data
    os.close(terminal)
    return output.decode().replace("\r\n", "\n")
