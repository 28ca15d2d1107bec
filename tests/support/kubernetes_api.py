"""A real kube-apiserver with etcd on free loopback ports, without nodes: objects are created by its users."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.spec import KeyType
from tests.support.ports import free_port
from tests.support.requirements import require_program

Json = dict[str, Any]
ADMIN = "admin-token"
_USERS = {ADMIN: ("admin", "system:masters"), "node-a": ("system:node:node-a", "system:nodes"),
          "node-b": ("system:node:node-b", "system:nodes"), "jane": ("jane", "developers")}  # fmt: skip
_START_S = 90.0
_JSON = "application/json"


class Rejected(Exception):
    """An error response."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(f"HTTP {status}: {message}")


@dataclass(frozen=True)
class KubernetesApi:
    """A running API server. Tokens of users are the keys of ``_USERS``."""

    url: str
    ca: Path
    kubectl_program: Path

    def call(
        self, method: str, path: str, body: Json | bytes | None = None, token: str = ADMIN, content_type: str = _JSON
    ) -> Json:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Authorization": f"Bearer {token}", "Content-Type": content_type, "Accept": _JSON}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)  # loopback
        try:
            with urllib.request.urlopen(request, timeout=30, context=_context(self.ca)) as response:
                text = response.read()
                return json.loads(text) if text.startswith(b"{") else {"text": text.decode()}
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            message = json.loads(text)["message"] if text.startswith("{") else text
            raise Rejected(error.code, message) from None

    def ready(self) -> bool:
        try:
            self.call("GET", "/readyz")
            # The roles of nodes and service accounts are created after the start.
            self.call("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node")
        except (OSError, Rejected, ssl.SSLError):
            return False
        return True

    def apply(self, directory: Path) -> None:
        """Apply a kustomization."""
        self._kubectl("apply", "--server-side", "-k", str(directory))

    def service_account_token(self, namespace: str, name: str) -> str:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        return str(self.call("POST", path, {"spec": {"expirationSeconds": 3600}})["status"]["token"])

    def _kubectl(self, *arguments: str) -> None:
        connection = [f"--server={self.url}", f"--certificate-authority={self.ca}", f"--token={ADMIN}"]
        command = [str(self.kubectl_program), *connection, *arguments]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "KUBECONFIG": ""}
        )
        assert result.returncode == 0, result.stderr


def _context(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the API server's own certificate has no key identifier
    return context


@contextlib.contextmanager
def running_api(binaries: Path, directory: Path, arguments: Sequence[str] = ()) -> Iterator[KubernetesApi]:
    """Run etcd and a kube-apiserver until the block ends."""
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    key = generate_key(KeyType.EC_P256)
    (directory / "sa.key").write_bytes(encode_key(key).reveal())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (directory / "sa.pub").write_bytes(public)
    users = (f'{token},{name},{token},"{group}"' for token, (name, group) in _USERS.items())
    (directory / "tokens.csv").write_text("\n".join(users))
    client, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    etcd = [
        require_program("etcd"), f"--data-dir={directory / 'etcd'}", f"--listen-client-urls={client}", "--log-level=error",
        f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}", "--unsafe-no-fsync",
    ]  # fmt: skip
    server = [
        str(binaries / "kube-apiserver"), f"--etcd-servers={client}", f"--secure-port={port}", "--bind-address=127.0.0.1",
        f"--cert-dir={directory}", "--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction", f"--token-auth-file={directory / 'tokens.csv'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={directory / 'sa.pub'}", f"--service-account-signing-key-file={directory / 'sa.key'}",
        "--endpoint-reconciler-type=none", "--allow-privileged=true", *arguments,
    ]  # fmt: skip
    api = KubernetesApi(f"https://127.0.0.1:{port}", directory / "apiserver.crt", binaries / "kubectl")
    with _process(etcd, directory / "etcd.log", {}), _process(server, directory / "apiserver.log", {}) as process:
        deadline = time.monotonic() + _START_S
        while not (api.ca.exists() and api.ready()):
            assert process.poll() is None, (directory / "apiserver.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the API server does not become ready"
            time.sleep(0.2)  # between two attempts
        yield api


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
