"""The procedures of docs/operations with the commands of the pages, while pairs of pods connect by mutual TLS."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from csi_driver import DRIVER_NAME
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.core.formats.pem import encode_certificates
from tests.e2e import authority, cluster, host
from tests.e2e.logs import AUTHORITY, DRIVER, LogCollector
from tests.e2e.pods import CERTMOUNT_IMAGE, Pod, manifest, service, with_script
from tests.e2e.secrets import ingress
from tests.support.documentation import documented

NAMESPACE = "e2e-operations"
PAIRS = [(Pod(NAMESPACE, f"client-{number}"), Pod(NAMESPACE, f"server-{number}")) for number in range(2)]
PODS = [pod for pair in PAIRS for pod in pair]
LONG_LIVED = Pod(NAMESPACE, "long-lived")  # its certificate is not renewed during the tests
RATE_HZ = 10
NEXT_IMAGE = "docker.io/local/certmount:e2e-next"
WORKLOADS = ("deployment/certmount-authority", "daemonset/certmount-node")
SETTLED_S = 10.0  # the time that the page gives the nodes to distribute a root
PLUGIN = host.KUBELET / "plugins" / DRIVER_NAME


@pytest.fixture(scope="module", autouse=True)
def scene() -> None:
    """The pods remain until the end of all tests: the search for secrets reads their volumes."""
    cluster.create_namespace(NAMESPACE)
    _start_pods()


def _start_pods() -> None:
    for client, server in PAIRS:
        names = {pod: f"{pod.name}.{NAMESPACE}.svc" for pod in (client, server)}
        volumes = {pod: {"duration": "30s", "name": names[pod]} for pod in names}
        serving = manifest(server, volumes[server], labels={"app": server.name})
        cluster.apply(service(server.name, NAMESPACE), *with_script(serving, "server.py"))
        cluster.apply(*with_script(manifest(client, volumes[client]), "client.py", names[server], str(RATE_HZ)))
    cluster.apply(manifest(LONG_LIVED, {}))
    cluster.wait_for("Ready", "pod", "--all", namespace=NAMESPACE, seconds=90)
    _wait_for_connections(2 * RATE_HZ)


def _run(page: str, beginning: str, directory: Path, replaced: str = "", by: str = "", *, status: int = 0) -> str:
    """Run the only command of a page that begins with this text, in this directory; return its output."""
    command = documented(f"docs/operations/{page}", beginning)
    assert replaced in command
    return _shell(command.replace(replaced, by) if replaced else command, directory, status=status)


def _shell(command: str, directory: Path, *, status: int = 0) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _overlay() -> str:
    return os.environ["CERTMOUNT_E2E_OVERLAY"]


def _install(*, directory: str = "") -> None:
    cluster.kubectl("apply", "-k", directory or _overlay())
    cluster.wait_for_rollout(*WORKLOADS, seconds=120)


def _lines(client: Pod) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.logs().splitlines()]


def _status(client: Pod) -> dict[str, Any]:
    counts = [line for line in _lines(client) if "connections" in line]
    return counts[-1] if counts else {"connections": 0, "renewals": 0}


def _failures() -> list[str]:
    """Return the failed connections of all clients, each with its time."""
    return [
        f"{client.name} at {line['failure']['time']}: {line['failure']['phase']}: {line['failure']['error']}"
        for client, _ in PAIRS
        for line in _lines(client)
        if "failure" in line
    ]


def _failures_after(moment: float) -> list[str]:
    return [failure for failure in _failures() if float(failure.split()[2].rstrip(":")) > moment]


def _wait_for_connections(more: int) -> None:
    for client, _ in PAIRS:
        count = _status(client)["connections"] + more

        def made(client: Pod = client, count: int = count) -> bool:
            return bool(_status(client)["connections"] >= count)

        cluster.wait_until(made, seconds=60, what=f"more connections of {client.name}")


def _wait_for_renewals() -> None:
    """Wait until each pod of the pairs has another certificate, and uses it."""
    before = {pod: pod.read("site.crt") for pod in PODS}

    def renewed() -> bool:
        return all(pod.read("site.crt") != certificate for pod, certificate in before.items())

    cluster.wait_until(renewed, seconds=90, what="a renewal of each pod")
    _wait_for_connections(RATE_HZ)


def _images() -> set[str]:
    pods = [host.driver(), *host.authorities()]
    return {container["image"] for pod in pods for container in pod["spec"]["containers"]}


def _roots(pod: Pod) -> list[str]:
    return [f"{root.serial_number:x}" for root in x509.load_pem_x509_certificates(pod.read("root.crt").encode())]


def _wait_for_roots(count: int) -> None:
    def trusted() -> bool:
        roots = [_roots(pod) for pod in PODS]
        return all(len(each) == count for each in roots)

    cluster.wait_until(trusted, seconds=40, what=f"{count} roots in each volume")


@pytest.mark.timeout(420)
def test_upgrade_and_rollback_fail_no_handshake(tmp_path: Path) -> None:
    """Both workloads get another image and the former one again. No connection fails, and nothing is issued twice."""
    host.tag_image(CERTMOUNT_IMAGE, NEXT_IMAGE)
    name, _, tag = NEXT_IMAGE.rpartition(":")
    resources = [os.path.relpath(_overlay(), tmp_path.resolve())]
    kustomization = {"resources": resources, "images": [{"name": name, "newTag": tag}]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    before, connections = LONG_LIVED.read("site.pem"), _status(PAIRS[0][0])["connections"]
    assert _images() == {CERTMOUNT_IMAGE}

    _run("upgrade.md", "kubectl apply -k", tmp_path, "deploy/my-cluster/", str(tmp_path))
    _run("upgrade.md", "kubectl -n certmount rollout status", tmp_path)
    cluster.wait_until(lambda: _images() == {NEXT_IMAGE}, seconds=30, what="only pods with the next image")
    assert "certmount-node" in _run("upgrade.md", "kubectl -n certmount get pods", tmp_path)
    assert "steady" in _run("upgrade.md", "kubectl -n certmount exec", tmp_path)
    _wait_for_renewals()

    for workload in WORKLOADS:
        _run("upgrade.md", f"kubectl -n certmount rollout undo {workload}", tmp_path)
    cluster.wait_for_rollout(*WORKLOADS, seconds=120)
    cluster.wait_until(lambda: _images() == {CERTMOUNT_IMAGE}, seconds=30, what="only pods with the former image")
    _wait_for_renewals()
    assert _failures() == []
    assert LONG_LIVED.read("site.pem") == before
    assert [pod.restarts() for pod in PODS] == [0] * len(PODS)
    print(f"{_status(PAIRS[0][0])['connections'] - connections} connections of a pair, none failed")


@pytest.mark.timeout(300)
def test_restored_ca_is_that_of_all_pods(tmp_path: Path, logs: LogCollector) -> None:
    """The Secret is deleted and restored. No connection fails, no new CA is created, and the pods renew under the same CA."""
    roots, failed = authority.root(), len(_refresh_failures(logs))
    _run("backup.md", "kubectl -n certmount get secret", tmp_path)
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "secret", "certmount-ca")
    cluster.wait_until(
        lambda: len(_refresh_failures(logs)) >= failed + 2, seconds=20, what="both replicas miss the Secret"
    )
    _run("backup.md", "kubectl replace", tmp_path)
    fingerprint = x509.load_pem_x509_certificate(roots).fingerprint(SHA256()).hex(":").upper()
    assert fingerprint in _run("backup.md", "kubectl -n certmount exec", tmp_path)
    _wait_for_renewals()
    assert authority.root() == authority.secret_root() == roots

    _run("backup.md", "kubectl -n certmount patch secret", tmp_path)
    cluster.wait_until(
        lambda: "state.json" in cluster.get("secret", "certmount-ca")["data"], seconds=20, what="a new rotation state"
    )
    _wait_for_renewals()
    assert authority.root() == authority.secret_root() == roots
    assert _failures() == []


def _refresh_failures(logs: LogCollector) -> Sequence[Any]:
    return [event for event in logs.events(AUTHORITY) if event["event"] == "CA refresh failed"]


@pytest.mark.timeout(300)
def test_lost_ca_is_replaced_without_an_outage(tmp_path: Path) -> None:
    """Without a backup, pods trust the lost root and that of the new CA. After some seconds, no connection fails."""
    lost = _roots(LONG_LIVED)
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "secret", "certmount-ca")
    _run("disaster.md", "kubectl -n certmount get configmap", tmp_path)
    create = documented("docs/ca.md", "openssl req -x509")
    subprocess.run(["bash", "-ec", create], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    _run("disaster.md", "cat", tmp_path)
    _run("disaster.md", "kubectl -n certmount create secret", tmp_path)
    created = time.time()
    _wait_for_roots(2)
    _wait_for_renewals()
    new = x509.load_pem_x509_certificate((tmp_path / "intermediate.crt").read_bytes())
    assert {pod.certificate().issuer for pod in PODS} == {new.subject}
    assert set(lost) < set(_roots(LONG_LIVED))

    _run("disaster.md", "kubectl -n certmount patch secret", tmp_path)
    _wait_for_roots(1)
    _wait_for_connections(3 * RATE_HZ)
    assert _failures_after(created + SETTLED_S) == []
    print(f"failed connections in the first {SETTLED_S:g} s: {_failures()}")


@pytest.mark.timeout(180)
def test_pod_trusts_the_root_of_another_cluster(tmp_path: Path) -> None:
    """Only the pod that names the root set trusts it. The other cluster is a root, which the test creates."""
    _run("federation.md", "kubectl --context east", tmp_path, "--context east ", "")
    assert (tmp_path / "east.crt").read_bytes() == authority.root()
    root = make_keyring(datetime.now(UTC)).root
    (tmp_path / "east.crt").write_bytes(encode_certificates([root]))
    _run("federation.md", "kubectl --context west", tmp_path, "--context west ", "")
    pod = Pod(NAMESPACE, "federated")
    cluster.apply(manifest(pod, {"federations": "east"}))
    pod.wait_until_ready(90)
    assert len(_roots(pod)) == len(_roots(LONG_LIVED)) + 1
    pod.delete()
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "configmap", "certmount-federation")


@pytest.mark.timeout(120)
def test_documented_commands_find_events_and_ingresses(tmp_path: Path) -> None:
    """The commands of docs/events.md and docs/from-kube-lego.md."""
    refused = Pod(NAMESPACE, "refused")
    cluster.apply(manifest(refused, {"name": "shop.example.com"}))
    events = documented("docs/events.md", "kubectl get events")
    cluster.wait_until(lambda: refused.name in _shell(events, tmp_path), seconds=30, what="the event")
    assert "NameNotAllowed" in _shell(events, tmp_path)
    refused.delete()

    cluster.apply(ingress("kube-lego", NAMESPACE, {"shop-tls": ["shop.example.com"]}))
    assert NAMESPACE in _shell(documented("docs/from-kube-lego.md", "kubectl get ingress -A"), tmp_path)
    cluster.kubectl("-n", NAMESPACE, "delete", "ingress", "kube-lego")


@pytest.fixture
def installed_again() -> Iterator[None]:
    yield
    _install()
    _start_pods()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("installed_again")
def test_uninstall_leaves_nothing(tmp_path: Path) -> None:
    """In the wrong order, a pod stays in Terminating until certmount is installed again. In the right order, nothing is left."""
    stuck, files = LONG_LIVED, LONG_LIVED.read("site.pem")
    target = host.target_path(stuck.uid)
    _uninstall(tmp_path)
    assert stuck.read("site.pem") == files
    stuck.delete("--wait=false")
    with pytest.raises(cluster.KubectlError, match="timed out"):
        cluster.wait_for("delete", f"pod/{stuck.name}", namespace=NAMESPACE, seconds=10)
    assert host.mounts_at(target)
    _install()
    cluster.wait_for("delete", f"pod/{stuck.name}", namespace=NAMESPACE, seconds=150)
    assert not host.mounts_at(target)

    users = _run("uninstall.md", "kubectl get pods", tmp_path).split()
    assert {str(pod) for pod in PODS} <= set(users)
    for user in users:
        namespace, _, name = user.partition("/")
        if namespace == NAMESPACE:
            Pod(namespace, name).delete()
    # Other tests leave pods with controllers, which would create them again.
    others = {user.partition("/")[0] for user in users} - {NAMESPACE}
    if others:
        cluster.kubectl("delete", "namespace", *others, seconds=180)
    assert _run("uninstall.md", "kubectl get pods", tmp_path) == ""
    _uninstall(tmp_path)

    assert _run("uninstall.md", "kubectl get namespaces", tmp_path) == ""
    assert _run("uninstall.md", "grep", tmp_path, status=1) == ""
    assert "certmount" not in cluster.kubectl("get", "leases", "-A")
    registered = cluster.get("csinode", host.NODE)["spec"]["drivers"] or []
    assert DRIVER_NAME not in {driver["name"] for driver in registered}
    assert not (host.KUBELET / "plugins_registry" / f"{DRIVER_NAME}-reg.sock").exists()
    assert [path for path in PLUGIN.rglob("*") if path.is_file()] == []
    assert cluster.kubectl("get", "-k", _overlay(), "--ignore-not-found", "-o", "name") == ""


def _uninstall(directory: Path) -> None:
    _run("uninstall.md", "kubectl delete -k", directory, "deploy/my-cluster/", _overlay())
    cluster.wait_until(lambda: not host.pods_of(DRIVER), seconds=60, what="the driver has stopped")
