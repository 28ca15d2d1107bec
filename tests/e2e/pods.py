"""Pods with a certificate volume: written in a few words, and read from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from csi_driver import DRIVER_NAME
from tests.e2e.kubectl import Manifest, get, kubectl

BUSYBOX = "docker.io/local/busybox:1"
CERTMOUNT_IMAGE = "docker.io/local/certmount:e2e"
PYTHON = "/opt/certmount/bin/python"
TLS = "/var/run/tls"
SCRIPTS = Path(__file__).parent / "inpod"


@dataclass(frozen=True)
class Pod:
    """A pod that runs, or is to run, in the cluster."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def get(self) -> Any:
        return get("pod", self.name, self.namespace)

    @property
    def uid(self) -> str:
        uid: str = self.get()["metadata"]["uid"]
        return uid

    def run(self, *command: str) -> str:
        """The output of a command in the pod's first container; KubectlError when it fails."""
        return kubectl("-n", self.namespace, "exec", self.name, "--", *command)

    def read(self, name: str) -> str:
        """A file of its certificate volume."""
        return self.run("cat", f"{TLS}/{name}")

    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.read("site.crt").encode())

    def restarts(self) -> int:
        """How often its first container was started again."""
        count: int = self.get()["status"]["containerStatuses"][0]["restartCount"]
        return count

    def delete(self, *flags: str) -> None:
        kubectl("-n", self.namespace, "delete", "pod", self.name, *flags)


def manifest(
    pod: Pod,
    attributes: Mapping[str, str],
    *,
    command: Sequence[str] = (),
    image: str = BUSYBOX,
    security: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Manifest:
    """A pod with one certificate volume at ``TLS``; without a command it waits."""
    container: dict[str, Any] = {
        "name": "app",
        "image": image,
        "imagePullPolicy": "Never",
        "volumeMounts": [{"name": "tls", "mountPath": TLS, "readOnly": True}],
    }
    if command:
        container["command"] = list(command)
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


def with_script(pod: Mapping[str, Any], script: str, *arguments: str) -> tuple[Manifest, Manifest]:
    """The pod, made to run a file of ``inpod/`` by certmount's own Python, and the ConfigMap that brings it there."""
    spec = pod["spec"]
    container = spec["containers"][0] | {
        "image": CERTMOUNT_IMAGE,
        "command": [PYTHON, "-u", f"/scripts/{script}", *arguments],
    }
    container["volumeMounts"] = [*container["volumeMounts"], {"name": "scripts", "mountPath": "/scripts"}]
    name = f"{pod['metadata']['name']}-script"
    volumes = [*spec["volumes"], {"name": "scripts", "configMap": {"name": name}}]
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": pod["metadata"]["namespace"]},
        "data": {script: (SCRIPTS / script).read_text(encoding="utf-8")},
    }
    return config_map, {**pod, "spec": {**spec, "containers": [container], "volumes": volumes}}
