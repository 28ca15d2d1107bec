"""A CA rotation while two pods connect by mutual TLS ten times a second, and all replicas die in every phase."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from csi_driver import DRIVER_NAME
from tests.e2e import authority, host
from tests.e2e.kubectl import (
    CERTMOUNT,
    KubectlError,
    apply,
    create_namespace,
    delete_namespace,
    find,
    kubectl,
    stopped_authority,
    wait_for,
    wait_for_rollout,
    wait_until,
)
from tests.e2e.pods import Pod, manifest, service, with_script

NAMESPACE = "e2e-rotation"
CLIENT, SERVER = Pod(NAMESPACE, "client"), Pod(NAMESPACE, "server")
SERVER_NAME = f"server.{NAMESPACE}.svc.cluster.local"
ATTRIBUTES = {"duration": "30s"}
"""Pods trust the old root until certificates of this lifetime have expired, so it determines the duration of the test."""
UNREACHABLE = "unreachable-node"
CA_KEYS = ("root.crt", "root.key", "intermediate.crt", "intermediate.key", "state.json")


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A new CA, which has issued no certificate with a longer lifetime, and two pods with connections."""
    create_namespace(NAMESPACE)
    with stopped_authority():
        patch = json.dumps({"data": dict.fromkeys(CA_KEYS)})
        kubectl("-n", CERTMOUNT, "patch", "secret", "certmount-ca", "--type=merge", "-p", patch)
    server = manifest(SERVER, ATTRIBUTES | {"name": SERVER_NAME}, labels={"app": SERVER.name})
    apply(service(SERVER.name, NAMESPACE), *with_script(server, "server.py"))
    apply(*with_script(manifest(CLIENT, ATTRIBUTES), "client.py", SERVER_NAME))
    wait_for("Ready", "pod", "--all", namespace=NAMESPACE)
    yield
    kubectl("delete", "csinode", UNREACHABLE, "--ignore-not-found")
    delete_namespace(NAMESPACE)


def _ca(*arguments: str) -> str:
    """Run ``certmount ca`` in a replica."""
    command = ("exec", "deploy/certmount-authority", "--", "/opt/certmount/bin/certmount", "ca", *arguments)
    return kubectl("-n", CERTMOUNT, *command)


def _status() -> dict[str, Any]:
    """Return the output of ``certmount ca status`` from any running replica."""

    def status() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(_ca("status", "-o", "json"))
        except KubectlError:
            return None
        return found

    return wait_until(status, seconds=30, what="an answer of certmount ca status")


def _wait_for_phase(phase: str, seconds: float) -> None:
    wait_until(lambda: _status()["phase"] == phase, seconds=seconds, what=f"the rotation is {phase}")


def _kill_replicas() -> None:
    """Kill one replica after the other. The successor must serve before the next one dies, because pods renew every 20 s."""
    for replica in [pod["metadata"]["name"] for pod in host.authorities()]:
        kubectl("-n", CERTMOUNT, "delete", "pod", replica, "--force", "--grace-period=0")
        wait_for_rollout()


def _roots(pod: Pod) -> list[str]:
    """Return the serial numbers of the roots that the pod trusts."""
    return [f"{root.serial_number:x}" for root in x509.load_pem_x509_certificates(pod.read("root.crt").encode())]


def _wait_for_roots(count: int, seconds: float) -> list[str]:
    """Wait until both pods trust the same roots, this many."""

    def roots() -> list[str] | None:
        client, server = _roots(CLIENT), _roots(SERVER)
        return client if client == server and len(client) == count else None

    return wait_until(roots, seconds=seconds, what=f"both pods trust {count} roots")


def _client_status() -> dict[str, Any]:
    lines = CLIENT.logs("--tail=1").splitlines()
    return json.loads(lines[0]) if lines else {"connections": 0, "errors": []}


def _unreachable_node() -> dict[str, Any]:
    """Return a node with the driver that never acknowledges: an object only."""
    driver = {"name": DRIVER_NAME, "nodeID": UNREACHABLE, "topologyKeys": []}
    metadata = {"name": UNREACHABLE}
    return {"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": metadata, "spec": {"drivers": [driver]}}


@pytest.mark.timeout(420)
def test_root_rotates_without_a_failed_connection() -> None:
    """No connection fails. Each phase is shown, survives the death of both replicas, and can be stopped."""
    wait_until(lambda: _client_status()["connections"] > 20, seconds=60, what="connections between the pods")
    begin = time.monotonic()
    (old,) = _wait_for_roots(1, seconds=10)
    assert _status()["phase"] == "steady"
    apply(_unreachable_node())

    # A new root reaches the pods without a new key and certificate. Start after a renewal, so that the next one is far.
    certificate = CLIENT.read("site.crt")
    wait_until(lambda: CLIENT.read("site.crt") != certificate, seconds=30, what="a renewal")
    certificate = CLIENT.read("site.pem")
    assert "Rotation started." in _ca("rotate")
    _, new = _wait_for_roots(2, seconds=12)
    assert CLIENT.read("site.pem") == certificate
    assert _status()["phase"] == "announcing"
    _kill_replicas()

    _wait_for_phase("distributing", seconds=60)
    _kill_replicas()
    wait_until(lambda: _status()["nodes"]["missing"] == [UNREACHABLE], seconds=40, what="this node's acknowledgement")
    assert _status()["nextStep"] == "the next CA signs when 1 node more has acknowledged"
    assert f"not yet: {UNREACHABLE}" in _ca("status")
    assert "The rotation is stopped." in _ca("stop")
    kubectl("delete", "csinode", UNREACHABLE)
    assert _status()["stopped"] is True
    assert "Rotation resumed." in _ca("rotate")

    _wait_for_phase("retiring", seconds=20)
    with pytest.raises(KubectlError, match="pods have certificates that only its root verifies"):
        _ca("stop", "--discard")
    _kill_replicas()
    assert _wait_for_roots(2, seconds=10) == [old, new]
    _wait_for_phase("steady", seconds=150)
    assert _wait_for_roots(1, seconds=20) == [new]
    wait_until(
        lambda: len(x509.load_pem_x509_certificates(authority.root())) == 1,
        seconds=10,
        what="one root in the ConfigMap",
    )

    count = _client_status()["connections"]
    wait_until(lambda: _client_status()["connections"] > count + 100, seconds=60, what="more connections")
    status = _client_status()
    assert status["errors"] == []
    assert "error" not in SERVER.logs()
    assert [CLIENT.restarts(), SERVER.restarts()] == [0, 0]
    assert UNREACHABLE not in {node["metadata"]["name"] for node in find("csinode")}
    print(f"{status['connections']} connections without an error; the rotation took {time.monotonic() - begin:.0f} s")
