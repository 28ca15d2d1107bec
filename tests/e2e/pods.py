"""Pods with a certificate volume, and their manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from csi_driver import DRIVER_NAME
from tests.e2e import cluster, host

BUSYBOX = "docker.io/local/busybox:1"
CERTMOUNT_IMAGE = "docker.io/local/certmount:e2e"
PYTHON = "/opt/certmount/bin/python"
TLS = "/var/run/tls"
SCRIPTS = Path(__file__).parent / "inpod"


@dataclass(frozen=True)
class Pod:
    """The name of a pod in the cluster."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def get(self) -> Any:
        return cluster.get("pod", self.name, self.namespace)

    @property
    def uid(self) -> str:
        return str(self.get()["metadata"]["uid"])

    def wait_until_ready(self, seconds: float = 60) -> None:
        cluster.wait_for("Ready", f"pod/{self.name}", namespace=self.namespace, seconds=seconds)

    def run(self, *command: str) -> str:
        """Run a command in the pod's first container, and return its output. Raises KubectlError."""
        return cluster.kubectl("-n", self.namespace, "exec", self.name, "--", *command)

    def read(self, name: str) -> str:
        return self.run("cat", f"{TLS}/{name}")

    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.read("site.crt").encode())

    def restarts(self) -> int:
        return host.restarts(self.get())

    def logs(self, *flags: str) -> str:
        return cluster.kubectl("-n", self.namespace, "logs", self.name, *flags)

    def delete(self, *flags: str) -> None:
        cluster.kubectl("-n", self.namespace, "delete", "pod", self.name, *flags)


def manifest(
    pod: Pod,
    attributes: Mapping[str, str],
    *,
    command: Sequence[str] = (),
    security: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Any:
    """Return the manifest of a pod with one certificate volume at ``TLS``. Without a command the pod waits."""
    container: dict[str, Any] = {
        "name": "app",
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "volumeMounts": [{"name": "tls", "mountPath": TLS, "readOnly": True}],
        **({"command": list(command)} if command else {}),
    }
    volume = {"name": "tls", "csi": {"driver": DRIVER_NAME, "readOnly": True, "volumeAttributes": dict(attributes)}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name, "namespace": pod.namespace, "labels": dict(labels or {})},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "securityContext": dict(security or {}),
            "containers": [container],
            "volumes": [volume],
        },
    }


@contextmanager
def pod_to_deny(pod: Pod) -> Iterator[None]:
    """Run a pod in its own namespace, with a certificate of a minute. At the end, the policy denies nothing any more."""
    cluster.create_namespace(pod.namespace)
    cluster.apply(manifest(pod, {"duration": "60s"}))
    pod.wait_until_ready()
    yield
    cluster.change_policy(lambda policy: policy.pop("deny", None))
    cluster.delete_namespace(pod.namespace)


def with_script(pod: Mapping[str, Any], script: str, *arguments: str) -> tuple[Any, Any]:
    """Return a ConfigMap with a script of ``inpod/``, and the pod's manifest changed to run it in certmount's image."""
    spec = pod["spec"]
    command = [PYTHON, "-u", f"/scripts/{script}", *arguments]
    container = spec["containers"][0] | {"image": CERTMOUNT_IMAGE, "command": command}
    container["volumeMounts"] = [*container["volumeMounts"], {"name": "scripts", "mountPath": "/scripts"}]
    metadata = {"name": f"{pod['metadata']['name']}-script", "namespace": pod["metadata"]["namespace"]}
    volumes = [*spec["volumes"], {"name": "scripts", "configMap": {"name": metadata["name"]}}]
    data = {script: (SCRIPTS / script).read_text(encoding="utf-8")}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    return config_map, {**pod, "spec": {**spec, "containers": [container], "volumes": volumes}}


def service(name: str, namespace: str, app: str = "", port: int = 8443, *, headless: bool = False) -> cluster.Manifest:
    """Return the manifest of a Service that selects the pods with the label ``app``, by default its own name."""
    spec: dict[str, Any] = {"selector": {"app": app or name}, "ports": [{"port": port}]}
    if headless:
        spec["clusterIP"] = "None"
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec}
