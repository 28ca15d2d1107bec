"""Traefik as the cluster's ingress controller, and a site behind it. scripts/install-peers builds Traefik."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509

from tests.e2e import cluster
from tests.e2e.pods import BUSYBOX
from tests.support.requirements import require_program

NAMESPACE = "e2e-ingress"
CLASS = "nginx"  # the class of kube-lego's example
BODY = "the site"
_NAME = "traefik"
_ARGUMENTS = (
    "--entrypoints.web.address=:80",
    "--entrypoints.websecure.address=:443",
    "--entrypoints.websecure.http.tls=true",  # also for Ingresses without an annotation of Traefik
    "--providers.kubernetesingress=true",
    f"--providers.kubernetesingress.ingressclass={CLASS}",
    "--global.checknewversion=false",
    "--global.sendanonymoususage=false",
)


def install() -> str:
    """Run Traefik, and return the address of its Service."""
    program = Path(require_program("traefik"))
    cluster.create_namespace(NAMESPACE)
    cluster.apply(*_access(), _deployment(program), _service(_NAME, NAMESPACE, {"http": 80, "https": 443}))
    target = (f"deployment/{_NAME}", "--timeout=60s")
    cluster.kubectl("-n", NAMESPACE, "rollout", "status", *target, seconds=70)
    return str(cluster.get("service", _NAME, NAMESPACE)["spec"]["clusterIP"])


def uninstall() -> None:
    cluster.delete_namespace(NAMESPACE)
    for kind in ("clusterrolebinding", "clusterrole", "ingressclass"):
        cluster.kubectl("delete", kind, CLASS if kind == "ingressclass" else _NAME, "--ignore-not-found")


def site(name: str, namespace: str) -> Sequence[Any]:
    """Return a web server with a Service of this name."""
    script = f"mkdir -p /tmp/www && echo {BODY} >/tmp/www/index.html && exec /bin/busybox httpd -f -p 8080 -h /tmp/www"
    container = {"name": "site", "image": BUSYBOX, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script]}
    metadata = {"name": name, "namespace": namespace, "labels": {"app": name}}
    pod = {"terminationGracePeriodSeconds": 1, "containers": [container]}
    return (
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod},
        _service(name, namespace, {"http": 80}, 8080),
    )


def _access() -> Sequence[Any]:
    """Return what Traefik's documentation requires: it reads the Secrets of all namespaces."""
    group = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": [""], "resources": ["services", "secrets", "nodes"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        {
            "apiGroups": ["networking.k8s.io"],
            "resources": ["ingresses", "ingressclasses"],
            "verbs": ["get", "list", "watch"],
        },
    ]
    subject = {"kind": "ServiceAccount", "name": "default", "namespace": NAMESPACE}
    return (
        {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": {"name": _NAME}, "rules": rules},
        {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": _NAME},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": _NAME},
            "subjects": [subject],
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "IngressClass",
            "metadata": {"name": CLASS},
            "spec": {"controller": "traefik.io/ingress-controller"},
        },
    )


def _deployment(program: Path) -> Any:
    """Return a Deployment that runs the program of the node: the cluster has one node, and the image needs no build."""
    container = {
        "name": _NAME,
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["/program/traefik", *_ARGUMENTS],
        "volumeMounts": [{"name": "program", "mountPath": "/program", "readOnly": True}],
        "readinessProbe": {"tcpSocket": {"port": 443}, "periodSeconds": 1},
    }
    pod = {
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{"name": "program", "hostPath": {"path": str(program.parent), "type": "Directory"}}],
    }
    labels = {"app": _NAME}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": _NAME, "namespace": NAMESPACE},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


def _service(name: str, namespace: str, ports: dict[str, int], target: int = 0) -> Any:
    listed = [{"name": key, "port": port, "targetPort": target or port} for key, port in ports.items()]
    metadata = {"name": name, "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": {"app": name}, "ports": listed},
    }


def fetch(address: str, name: str, context: ssl.SSLContext) -> tuple[x509.Certificate, str]:
    """Fetch the site by HTTPS, and return the server's certificate and the body. Raises OSError or HTTPException."""
    with (
        socket.create_connection((address, 443), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=name) as connection,
    ):
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read().decode().strip()
        presented = connection.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(presented or b""), body


@dataclass
class Load:
    """The result of a load: connections, failures, and the serial numbers of the server's certificates."""

    connections: int = 0
    failures: list[str] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)


@contextlib.contextmanager
def load(address: str, name: str, context: ssl.SSLContext, per_second: float = 20) -> Iterator[Load]:
    """Fetch the site on a new connection at this rate."""
    result, stop = Load(), threading.Event()

    def run() -> None:
        due = time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            due += 1 / per_second
            result.connections += 1
            try:
                leaf, body = fetch(address, name, context)
                if body != BODY:
                    raise ConnectionError(f"another body: {body[:100]!r}")
                if leaf.serial_number not in result.serials:
                    result.serials.append(leaf.serial_number)
            except (OSError, http.client.HTTPException) as error:
                result.failures.append(repr(error))

    thread = threading.Thread(target=run, name="load")
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
