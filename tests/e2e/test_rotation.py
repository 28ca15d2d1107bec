"""A CA takes another one's place while two pods talk by mutual TLS ten times a second, and every replica dies at every step."""

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
    exists,
    kubectl,
    make_namespace,
    roll_out,
    wait_for,
    wait_until,
)
from tests.e2e.pods import Pod, manifest, with_script

NAMESPACE = "e2e-rotation"
CLIENT, SERVER = Pod(NAMESPACE, "client"), Pod(NAMESPACE, "server")
SERVER_NAME = f"server.{NAMESPACE}.svc.cluster.local"
LIFE = {"duration": "30s"}
"""The former root is trusted until certificates of this life have ended, so it decides how long the test takes."""
CERTMOUNT_COMMAND = "/opt/certmount/bin/certmount"
ABSENT = "node-that-is-away"
OF_THE_CA = ("root.crt", "root.key", "intermediate.crt", "intermediate.key", "state.json")
SELECTOR = "app.kubernetes.io/name=certmount-authority"


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A CA that has never given a longer life than that, and two pods that talk."""
    make_namespace(NAMESPACE)
    kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=0")
    wait_for("delete", "pod", "-l", SELECTOR)
    gone = json.dumps({"data": dict.fromkeys(OF_THE_CA)})
    kubectl("-n", CERTMOUNT, "patch", "secret", "certmount-ca", "--type=merge", "-p", gone)
    kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=2")
    roll_out("deployment/certmount-authority")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVER.name, "namespace": NAMESPACE},
        "spec": {"selector": {"app": SERVER.name}, "ports": [{"port": 8443}]},
    }
    server = manifest(SERVER, LIFE | {"name": SERVER_NAME}, labels={"app": SERVER.name})
    apply(service, *with_script(server, "server.py"))
    apply(*with_script(manifest(CLIENT, LIFE), "client.py", SERVER_NAME))
    wait_for("Ready", "pod", "--all", namespace=NAMESPACE)
    yield
    kubectl("delete", "csinode", ABSENT, "--ignore-not-found")
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def _ca(*arguments: str) -> str:
    command = ("exec", "deploy/certmount-authority", "--", CERTMOUNT_COMMAND, "ca", *arguments)
    return kubectl("-n", CERTMOUNT, *command)


def _status() -> dict[str, Any]:
    """As an administrator sees it, from whichever replica there is."""

    def ask() -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(_ca("status", "-o", "json"))
        except KubectlError:
            return None
        return found

    return wait_until(ask, seconds=30, what="an answer of certmount ca status")


def _in_phase(phase: str, seconds: float) -> dict[str, Any]:
    def there() -> dict[str, Any] | None:
        status = _status()
        return status if status["phase"] == phase else None

    return wait_until(there, seconds=seconds, what=f"the rotation is {phase}")


def _kill_replicas() -> None:
    """One after the other, without grace; the second when the first one's successor serves, as pods renew every 20 s."""
    for replica in [pod["metadata"]["name"] for pod in host.pods_of("certmount-authority")]:
        kubectl("-n", CERTMOUNT, "delete", "pod", replica, "--force", "--grace-period=0")
        roll_out("deployment/certmount-authority")


def _roots(pod: Pod) -> list[str]:
    """The serial numbers of the roots that the pod trusts."""
    return [f"{root.serial_number:x}" for root in x509.load_pem_x509_certificates(pod.read("root.crt").encode())]


def _everyone_trusts(number: int, seconds: float) -> list[str]:
    """Waits until both pods trust that many roots, the same."""

    def roots() -> list[str] | None:
        client, server = _roots(CLIENT), _roots(SERVER)
        return client if client == server and len(client) == number else None

    return wait_until(roots, seconds=seconds, what=f"both pods trust {number} roots")


def _seen() -> dict[str, Any]:
    """What the client has seen up to now."""
    lines = kubectl("-n", NAMESPACE, "logs", CLIENT.name, "--tail=1").splitlines()
    return json.loads(lines[0]) if lines else {"connections": 0, "errors": []}


def _absent_node() -> dict[str, Any]:
    """A node that had the driver and does not answer: an object only."""
    driver = {"name": DRIVER_NAME, "nodeID": ABSENT, "topologyKeys": []}
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "CSINode",
        "metadata": {"name": ABSENT},
        "spec": {"drivers": [driver]},
    }


@pytest.mark.timeout(420)
def test_root_is_exchanged_without_an_error() -> None:
    """From the first step to the last not one connection fails; each step is shown, survives the death of both replicas, and can be held."""
    wait_until(lambda: _seen()["connections"] > 20, seconds=60, what="the pods talk")
    begin = time.monotonic()
    (former,) = _everyone_trusts(1, seconds=10)
    assert _status()["phase"] == "steady"
    apply(_absent_node())

    # A new root reaches the pods with key and certificate untouched: begun right after a renewal, the next is far.
    certificate = CLIENT.read("site.crt")
    wait_until(lambda: CLIENT.read("site.crt") != certificate, seconds=30, what="a renewal")
    certificate = CLIENT.read("site.pem")
    assert "The rotation has begun." in _ca("rotate")
    _, latter = _everyone_trusts(2, seconds=12)
    assert CLIENT.read("site.pem") == certificate
    assert _status()["phase"] == "announcing"
    _kill_replicas()

    _in_phase("distributing", seconds=60)
    _kill_replicas()
    waiting = wait_until(
        lambda: (status := _status())["nodes"]["missing"] == [ABSENT] and status,
        seconds=40,
        what="this node has confirmed",
    )
    assert waiting["nextStep"] == "when 1 node more has confirmed: the next CA signs"
    assert f"not yet: {ABSENT}" in _ca("status")
    assert "The rotation is stopped." in _ca("stop")
    kubectl("delete", "csinode", ABSENT)
    assert _status()["stopped"] is True
    assert "The rotation goes on." in _ca("rotate")

    _in_phase("retiring", seconds=20)
    with pytest.raises(KubectlError, match="pods hold certificates that only its root vouches for"):
        _ca("stop", "--discard")
    _kill_replicas()
    assert _everyone_trusts(2, seconds=10) == [former, latter]
    _in_phase("steady", seconds=150)
    assert _everyone_trusts(1, seconds=20) == [latter]
    wait_until(
        lambda: len(x509.load_pem_x509_certificates(authority.root())) == 1, seconds=10, what="people see one root too"
    )

    settled = _seen()["connections"]
    seen = wait_until(
        lambda: (now := _seen())["connections"] > settled + 100 and now, seconds=60, what="the pods talk on"
    )
    assert seen["errors"] == []
    assert "error" not in kubectl("-n", NAMESPACE, "logs", SERVER.name)
    assert [CLIENT.restarts(), SERVER.restarts()] == [0, 0]
    assert not exists("csinode", ABSENT)
    print(f"{seen['connections']} connections without an error; the rotation took {time.monotonic() - begin:.0f} s")
