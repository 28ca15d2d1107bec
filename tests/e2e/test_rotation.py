"""A CA rotation while pods connect ten times a second by mutual TLS or with roots only, and all replicas die in every phase."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from csi_driver import DRIVER_NAME
from tests.e2e import authority, cluster, host
from tests.e2e.pods import TLS, Pod, manifest, service, with_script

NAMESPACE = "e2e-rotation"
CLIENT, SERVER, VERIFIER = Pod(NAMESPACE, "client"), Pod(NAMESPACE, "server"), Pod(NAMESPACE, "verifier")
SERVER_NAME = f"server.{NAMESPACE}.svc.cluster.local"
# Pods trust the old root until certificates of this lifetime have expired, so it determines the duration of the test.
ATTRIBUTES = {"duration": "30s"}
UNREACHABLE = "unreachable-node"
CA_KEYS = ("root.crt", "root.key", "intermediate.crt", "intermediate.key", "state.json")


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A new CA, which has issued no certificate with a longer lifetime, and two pods with connections to a third."""
    cluster.create_namespace(NAMESPACE)
    # The controller of other tests would request certificates for a day, and the rotation would wait for their expiry.
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "deployment", "certmount-secrets", "--ignore-not-found")
    with cluster.stopped_authority():
        patch = json.dumps({"data": dict.fromkeys(CA_KEYS)})
        cluster.kubectl("-n", cluster.CERTMOUNT, "patch", "secret", "certmount-ca", "--type=merge", "-p", patch)
    server = manifest(SERVER, ATTRIBUTES | {"name": SERVER_NAME}, labels={"app": SERVER.name})
    cluster.apply(service(SERVER.name, NAMESPACE), *with_script(server, "server.py", "optional"))
    cluster.apply(*with_script(manifest(CLIENT, ATTRIBUTES), "client.py", SERVER_NAME, "10"))
    verifier = manifest(VERIFIER, {"root-only": "true"})
    cluster.apply(*with_script(verifier, "client.py", SERVER_NAME, "10", "root-only"))
    cluster.wait_for("Ready", "pod", "--all", namespace=NAMESPACE)
    yield
    cluster.kubectl("delete", "csinode", UNREACHABLE, "--ignore-not-found")
    cluster.delete_namespace(NAMESPACE)


def _ca(*arguments: str) -> str:
    command = ("exec", "deploy/certmount-authority", "--", "/opt/certmount/bin/certmount", "ca", *arguments)
    return cluster.kubectl("-n", cluster.CERTMOUNT, *command)


def _status() -> dict[str, Any]:

    def status() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(_ca("status", "-o", "json"))
        except cluster.KubectlError:
            return None
        return found

    return cluster.wait_until(status, seconds=30, what="an answer of certmount ca status")


def _wait_for_phase(phase: str, seconds: float) -> None:
    cluster.wait_until(lambda: _status()["phase"] == phase, seconds=seconds, what=f"the rotation is {phase}")


def _kill_replicas() -> None:
    """Kill one replica after the other. The successor must serve before the next one dies, because pods renew every 20 s."""
    for replica in [pod["metadata"]["name"] for pod in host.authorities()]:
        cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", replica, "--force", "--grace-period=0")
        cluster.wait_for_rollout()


def _roots(pod: Pod) -> list[str]:
    """Return the serial numbers of the roots that the pod trusts."""
    return [f"{root.serial_number:x}" for root in x509.load_pem_x509_certificates(pod.read("root.crt").encode())]


def _wait_for_roots(count: int, seconds: float) -> list[str]:
    """Wait until all pods trust the same roots, this many."""

    def roots() -> list[str] | None:
        client, *others = (_roots(pod) for pod in (CLIENT, SERVER, VERIFIER))
        return client if others == [client, client] and len(client) == count else None

    return cluster.wait_until(roots, seconds=seconds, what=f"all pods trust {count} roots")


def _status_of(client: Pod) -> dict[str, Any]:
    lines = client.logs("--tail=1").splitlines()
    return json.loads(lines[0]) if lines else {"connections": 0, "errors": []}


def _wait_for_connections(client: Pod, count: int) -> dict[str, Any]:
    """Wait until a pod has connected more often than this, and return its status."""

    def status() -> dict[str, Any] | None:
        found = _status_of(client)
        return found if found["connections"] > count else None

    return cluster.wait_until(status, seconds=60, what=f"more than {count} connections of {client}")


def _unreachable_node() -> dict[str, Any]:
    """Return a node with the driver that never acknowledges: an object only."""
    driver = {"name": DRIVER_NAME, "nodeID": UNREACHABLE, "topologyKeys": []}
    metadata = {"name": UNREACHABLE}
    return {"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": metadata, "spec": {"drivers": [driver]}}


@pytest.mark.timeout(420)
def test_root_rotates_without_a_failed_connection() -> None:
    """No connection fails. Each phase is shown, survives the death of both replicas, and can be stopped."""
    for client in (CLIENT, VERIFIER):
        _wait_for_connections(client, 20)
    assert set(VERIFIER.run("ls", TLS).split()) == {"generation.json", "root.crt"}
    begin = time.monotonic()
    (old,) = _wait_for_roots(1, seconds=10)
    assert _status()["phase"] == "steady"
    cluster.apply(_unreachable_node())

    # A new root reaches the pods without a new key and certificate. Start after a renewal, so that the next one is far.
    certificate = CLIENT.read("site.crt")
    cluster.wait_until(lambda: CLIENT.read("site.crt") != certificate, seconds=30, what="a renewal")
    certificate = CLIENT.read("site.pem")
    assert "Rotation started." in _ca("rotate")
    _, new = _wait_for_roots(2, seconds=12)
    assert CLIENT.read("site.pem") == certificate
    assert _status()["phase"] == "announcing"
    _kill_replicas()

    _wait_for_phase("distributing", seconds=60)
    _kill_replicas()
    cluster.wait_until(
        lambda: _status()["nodes"]["missing"] == [UNREACHABLE], seconds=40, what="this node's acknowledgement"
    )
    assert _status()["nextStep"] == "the next CA signs when 1 more node has acknowledged"
    assert f"not yet: {UNREACHABLE}" in _ca("status")
    assert "The rotation is stopped." in _ca("stop")
    cluster.kubectl("delete", "csinode", UNREACHABLE)
    assert _status()["stopped"] is True
    assert "Rotation resumed." in _ca("rotate")

    _wait_for_phase("retiring", seconds=20)
    with pytest.raises(cluster.KubectlError, match="pods have certificates that only its root verifies"):
        _ca("stop", "--discard")
    _kill_replicas()
    assert _wait_for_roots(2, seconds=10) == [old, new]
    _wait_for_phase("steady", seconds=150)
    assert _wait_for_roots(1, seconds=20) == [new]
    cluster.wait_until(
        lambda: len(x509.load_pem_x509_certificates(authority.root())) == 1,
        seconds=10,
        what="one root in the ConfigMap",
    )

    statuses = [_wait_for_connections(client, _status_of(client)["connections"] + 100) for client in (CLIENT, VERIFIER)]
    assert [status["errors"] for status in statuses] == [[], []]
    assert "error" not in SERVER.logs()
    assert [pod.restarts() for pod in (CLIENT, SERVER, VERIFIER)] == [0, 0, 0]
    assert UNREACHABLE not in {node["metadata"]["name"] for node in cluster.find("csinode")}
    mutual, verified = (status["connections"] for status in statuses)
    print(f"{mutual} mutual and {verified} other connections without an error in {time.monotonic() - begin:.0f} s")
