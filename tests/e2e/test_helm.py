"""Helm: install on a cluster without certmount, upgrade and roll back under load, uninstall. Then kustomize installs again.

With ``LOCALKUBE_SYNC_FREQUENCY=1m tests/e2e/run -s -k helm``, the kubelet updates files as rarely as on other clusters.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver import DRIVER_NAME
from tests.e2e import cluster, host
from tests.e2e.pods import BUSYBOX, CERTMOUNT_IMAGE, Pod, manifest, service, with_script
from tests.support.manifests import CHART, DEPLOY, HelmError, helm

pytestmark = pytest.mark.timeout(240)

NAMESPACE = "e2e-helm"
EXAMPLE, SERVER, CLIENT, KEEPER, FOREIGN, SHORT = (
    Pod(NAMESPACE, name) for name in ("certmount-example", "server", "client", "keeper", "foreign", "short")
)
SERVER_NAME = f"server.{NAMESPACE}.svc.cluster.local"
FOREIGN_NAME = "shop.example.com"
REPOSITORY, _, TAG = CERTMOUNT_IMAGE.rpartition(":")
VALUES: dict[str, Any] = {"image": {"repository": REPOSITORY, "tag": TAG, "pullPolicy": "Never"}}
RULE = {"match": {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}, "allow": {"dns": [FOREIGN_NAME]}}
_SYSTEM = {"default", "kube-system", "kube-public", "kube-node-lease", cluster.CERTMOUNT}
_FIRST_CERTIFICATE_S = 60.0


def certmount(command: str, *arguments: str, values: dict[str, Any] | None = None) -> str:
    return helm(command, "certmount", *arguments, f"--namespace={cluster.CERTMOUNT}", values=values, seconds=180)


def labelled() -> set[str]:
    """Return all objects in the cluster that have certmount's label."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    flags = ("--all-namespaces", "-l", "app.kubernetes.io/part-of=certmount", "-o", "name")
    return set(cluster.kubectl("get", ",".join(kinds), *flags).split())


@dataclass(frozen=True)
class Remains:
    """What is left of certmount without an installation: objects, and directories of volumes on the node."""

    objects: set[str]
    volumes: set[str]


def remains() -> Remains:
    return Remains(labelled(), {path.name for path in host.VOLUMES.iterdir()})


@pytest.fixture(scope="module")
def before() -> Remains:
    """Remove all pods with volumes, and the installation of the other tests."""
    spaces = {one["metadata"]["name"] for one in cluster.find("namespaces")} - _SYSTEM
    if spaces:
        cluster.kubectl("delete", "namespace", *sorted(spaces), seconds=180)
    cluster.kubectl("delete", "-k", os.environ["CERTMOUNT_E2E_OVERLAY"], "--ignore-not-found", seconds=180)
    return remains()


def _example() -> dict[str, Any]:
    """Return the pod of deploy/example/ with an image that this cluster has."""
    example: dict[str, Any] = yaml.safe_load((DEPLOY / "example" / "pod.yaml").read_text())
    example["metadata"]["namespace"] = NAMESPACE
    example["spec"]["containers"][0] |= {"image": BUSYBOX, "imagePullPolicy": "Never"}
    return example


def _time_to_certificate(install: Callable[[], object], how: str) -> float:
    """Install certmount and apply the example; return the time in seconds until the example pod prints its certificate."""
    cluster.create_namespace(NAMESPACE)
    begin = time.monotonic()
    install()
    cluster.apply(_example())
    cluster.wait_until(lambda: _printed(EXAMPLE), seconds=120, what="the example pod prints its certificate")
    duration = time.monotonic() - begin
    print(f"\nfrom {how} to a pod with a certificate: {duration:.1f} s")
    return duration


@pytest.fixture(scope="module")
def installation(before: Remains) -> float:
    """The installation; the value is the time in seconds from `helm install` to the first certificate of a pod."""
    assert "csidriver.storage.k8s.io/csi.certmount.dev" not in before.objects
    flags = ("--create-namespace", "--wait", "--timeout=120s")
    duration = _time_to_certificate(lambda: certmount("install", str(CHART), *flags, values=VALUES), "helm install")
    # A third of this is longer than the kubelet's next call after a restart of the driver, which has the tokens for renewals.
    load = {"duration": "5m"}
    cluster.apply(
        service("server", NAMESPACE),
        manifest(KEEPER, {"duration": "24h"}),
        manifest(FOREIGN, {"name": FOREIGN_NAME}),
        manifest(SHORT, {"duration": "30s"}),
        *with_script(manifest(SERVER, load | {"name": SERVER_NAME}, labels={"app": "server"}), "server.py"),
        *with_script(manifest(CLIENT, load), "client.py", SERVER_NAME, "10"),
    )
    for pod in (SERVER, CLIENT, KEEPER, SHORT):
        pod.wait_until_ready()
    return duration


def _printed(pod: Pod) -> bool:
    return pod.get()["status"]["phase"] == "Running" and "BEGIN CERTIFICATE" in pod.logs()


def _load() -> dict[str, Any]:
    """Return the last status of the client, which connects ten times a second."""
    lines = [line for line in CLIENT.logs("--tail=50").splitlines() if line.startswith('{"connections"')]
    return dict(json.loads(lines[-1])) if lines else {"connections": 0, "failures": 0}


def _wait_for_renewal() -> None:
    serial = SHORT.certificate().serial_number
    cluster.wait_until(lambda: SHORT.certificate().serial_number != serial, seconds=120, what="a renewal")


def _state() -> tuple[str, str, int]:
    """Return certificate, key and restarts of a pod whose certificate is valid for a day."""
    return KEEPER.read("site.crt"), KEEPER.read("site.key"), KEEPER.restarts()


def _arguments() -> list[str]:
    """Return the arguments of all running programs of certmount."""
    pods = [host.driver(), *host.authorities()]
    return [argument for pod in pods for argument in pod["spec"]["containers"][0]["args"]]


def test_pod_has_a_certificate_within_a_minute(installation: float) -> None:
    """From a cluster without certmount, when its image is on the node."""
    assert installation < _FIRST_CERTIFICATE_S


@pytest.mark.usefixtures("installation")
def test_tokens_are_secrets_if_the_cluster_supports_it() -> None:
    """The chart looks at the version of the cluster (KEP-5538)."""
    minor = int(json.loads(cluster.kubectl("version", "-o", "json"))["serverVersion"]["minor"])
    driver = cluster.get("csidriver", DRIVER_NAME)["spec"]
    assert driver.get("serviceAccountTokenInSecrets", False) is (minor >= 35)


@pytest.mark.usefixtures("installation")
def test_upgrade_and_rollback_keep_volumes_and_connections() -> None:
    """Driver and authority are replaced; no handshake fails, no pod restarts, and no certificate changes early."""
    keeper, ca = _state(), cluster.get("secret", "certmount-ca")["data"]
    assert "NameNotAllowed" in cluster.wait_for_mount_failure(FOREIGN.name, NAMESPACE)

    changed = {**VALUES, "logLevel": "debug", "policy": [RULE]}
    certmount("upgrade", str(CHART), "--wait", "--timeout=120s", values=changed)
    assert _arguments().count("--log-level=debug") == 3
    FOREIGN.wait_until_ready(120)
    _wait_for_renewal()

    certmount("rollback", "1", "--wait", "--timeout=120s")
    assert "--log-level=debug" not in _arguments()
    _wait_for_renewal()

    assert _state() == keeper
    assert cluster.get("secret", "certmount-ca")["data"] == ca
    load = _load()
    assert load["connections"] > 100
    assert load["failures"] == 0, load["errors"]
    assert [pod.restarts() for pod in (SERVER, CLIENT, KEEPER)] == [0, 0, 0]


@pytest.mark.usefixtures("installation")
def test_failed_upgrade_is_rolled_back() -> None:
    """An image that does not exist replaces no replica of the authority, and pods keep their files."""
    keeper, replicas = _state(), {pod["metadata"]["uid"] for pod in host.authorities()}
    wrong = {**VALUES, "image": {**VALUES["image"], "tag": "missing"}}
    with pytest.raises(HelmError, match="rolled back"):
        certmount("upgrade", str(CHART), "--rollback-on-failure", "--timeout=25s", values=wrong)
    cluster.wait_for_rollout("deployment/certmount-authority", "daemonset/certmount-node")
    assert replicas <= {pod["metadata"]["uid"] for pod in host.authorities()}
    assert _state() == keeper


@pytest.mark.usefixtures("installation")
def test_nothing_remains_after_the_uninstallation(before: Remains) -> None:
    """As documented: first the pods with volumes, then the release and its namespace."""
    cluster.kubectl("delete", "namespace", NAMESPACE, seconds=120)
    certmount("uninstall", "--wait", "--timeout=120s")
    cluster.kubectl("delete", "namespace", cluster.CERTMOUNT, seconds=120)
    assert remains() == before
    mounts = [Path(mount.point) for mount in host.read_mounts() if mount.source == "certmount"]
    assert [mount for mount in mounts if mount.is_relative_to(host.KUBELET)] == []
    registrations = Path(host.KUBELET, "plugins_registry")
    assert [path.name for path in registrations.iterdir() if "certmount" in path.name] == []
    registered = "a CSINode without the driver"
    cluster.wait_until(
        lambda: not cluster.get("csinode", host.NODE)["spec"].get("drivers"), seconds=30, what=registered
    )


@pytest.mark.usefixtures("before")
def test_kustomization_gives_a_pod_a_certificate_within_a_minute() -> None:
    """The same commands as in the README, with the overlay of the tests; afterwards the cluster is as the other tests leave it."""
    overlay = os.environ["CERTMOUNT_E2E_OVERLAY"]
    assert _time_to_certificate(lambda: cluster.kubectl("apply", "-k", overlay), "kubectl apply") < _FIRST_CERTIFICATE_S
