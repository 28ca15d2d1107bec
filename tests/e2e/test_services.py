"""Services give their pods names without any rule, events tell a pod's owner what is wrong, and an API server may go away."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.e2e import authority, host
from tests.e2e.kubectl import CERTMOUNT, Manifest, apply, find, kubectl, make_namespace, wait_for, wait_until
from tests.e2e.logs import LogKeeper
from tests.e2e.pods import Pod, manifest

NAMESPACE = "services"
"""Not one of those that the tests' policy has a rule for: here every name comes from a Service."""
SELECTED = Pod(NAMESPACE, "selected")
STRANGER = Pod(NAMESPACE, "stranger")
NAMELESS = Pod(NAMESPACE, "nameless")
BRISK = Pod(NAMESPACE, "brisk")
"""Its certificate is renewed about every 40 seconds."""
DOWN_S = 60.0


def _service(name: str, app: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"selector": {"app": app}, "ports": [{"port": 8443}]},
    }


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """All of it at once, as from one file."""
    make_namespace(NAMESPACE)
    apply(
        _service("shop", "shop"),
        _service("shop-headless", "shop"),
        manifest(SELECTED, {"name": f"shop.{NAMESPACE}.svc"}, labels={"app": "shop", "version": "1"}),
        manifest(NAMELESS, {}, labels={"app": "shop"}),
        manifest(STRANGER, {"name": f"shop.{NAMESPACE}.svc"}, labels={"app": "stranger"}),
        manifest(BRISK, {"duration": "60s"}, labels={"app": "shop"}),
    )
    yield
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def _names(pod: Pod) -> tuple[set[str], set[str]]:
    """DNS names and URIs of the certificate that the pod holds."""
    names = pod.certificate().extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = set(names.get_values_for_type(x509.UniformResourceIdentifier))
    return set(names.get_values_for_type(x509.DNSName)), uris


def _events(pod: Pod) -> list[Any]:
    """What the authority says on the pod."""
    selector = f"involvedObject.name={pod.name},reportingComponent=certmount.dev/authority"
    return find("events", "--field-selector", selector, namespace=NAMESPACE)


def test_a_service_gives_its_name_to_the_pods_it_selects() -> None:
    """Without any rule, for the asking."""
    wait_for("Ready", f"pod/{SELECTED.name}", namespace=NAMESPACE, seconds=60)
    dns, uris = _names(SELECTED)
    assert dns == {f"shop.{NAMESPACE}.svc"}
    assert uris == {f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"}


def test_a_pod_that_names_nothing_has_its_services_names() -> None:
    """Those of all Services that select it, in both forms, beside its SPIFFE ID."""
    wait_for("Ready", f"pod/{NAMELESS.name}", namespace=NAMESPACE, seconds=60)
    dns, uris = _names(NAMELESS)
    services = [f"{service}.{NAMESPACE}.svc" for service in ("shop", "shop-headless")]
    assert dns == {*services, *(f"{name}.cluster.local" for name in services)}
    assert uris == {f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"}


@pytest.mark.timeout(240)
def test_a_pod_that_no_service_selects_is_refused_and_told_by_an_event() -> None:
    """The event is on the pod itself, with its uid; refused again it is counted, not written again."""
    (event, *others) = wait_until(lambda: _events(STRANGER), seconds=60, what="an event of the authority")
    assert others == []
    assert (event["type"], event["reason"]) == ("Warning", "NameNotAllowed")
    assert f"shop.{NAMESPACE}.svc" in event["message"]
    assert event["involvedObject"]["uid"] == STRANGER.uid

    def counted() -> int:
        # Each ten minutes of the clock have an event of their own.
        again = _events(STRANGER)
        assert len(again) <= 2
        return sum(int((event.get("series") or {}).get("count", 1)) for event in again)

    wait_until(lambda: counted() >= 2, seconds=120, what="a second refusal, counted in the same event")


@pytest.mark.timeout(240)
def test_a_service_made_later_lets_the_pod_in_at_its_next_try() -> None:
    """Nobody restarts anything."""
    uid = STRANGER.uid
    apply(_service("shop", "stranger"))
    wait_for("Ready", f"pod/{STRANGER.name}", namespace=NAMESPACE, seconds=150)
    assert (STRANGER.uid, STRANGER.restarts()) == (uid, 0)
    assert _names(STRANGER)[0] == {f"shop.{NAMESPACE}.svc"}
    apply(_service("shop", "shop"))


def test_a_label_taken_away_takes_the_name_away() -> None:
    """As soon as the authority has heard of it; what the pod holds is good until its end."""
    token = authority.token("default", NAMESPACE, SELECTED.name, "certmount")
    node = authority.token("certmount-node", CERTMOUNT, host.driver()["metadata"]["name"], "certmount-node")

    def names() -> set[str]:
        outcome = authority.issue(token, node)
        assert outcome.leaf is not None, outcome.message
        found = outcome.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return set(found.get_values_for_type(x509.DNSName))

    assert f"shop.{NAMESPACE}.svc" in names()
    kubectl("-n", NAMESPACE, "label", "pod", SELECTED.name, "app-")
    wait_until(lambda: not names(), seconds=20, what="no Service's name any more")


@contextlib.contextmanager
def _api_server_away() -> Iterator[None]:
    """Stops the API server as a failed control plane does, and starts it again."""
    run = Path(os.environ["LOCALKUBE_RUN"])
    pid = int((run / "apiserver.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not host._alive(pid), seconds=90, what="the API server ends")
    try:
        yield
    finally:
        # It gives each part a minute; on a busy machine one that starts again after an outage may need more.
        wait_until(_up, seconds=150, what="the cluster is up again")


@pytest.mark.timeout(400)
def test_the_api_server_is_away_for_a_minute(logs: LogKeeper) -> None:
    """Nothing is issued without proof meanwhile; afterwards running pods renew on, new ones start, and nobody is restarted."""
    wait_for("Ready", f"pod/{BRISK.name}", namespace=NAMESPACE, seconds=60)
    replicas = {pod["metadata"]["uid"]: _restarts(pod) for pod in host.pods_of("certmount-authority")}
    driver = {pod["metadata"]["uid"]: _restarts(pod) for pod in [host.driver()]}
    uid, volume = BRISK.uid, host.target_of(BRISK.uid)
    with _api_server_away():
        # A review from just before counts for some seconds; what the kubelet shows of the volume needs no API server.
        time.sleep(10)
        issued, files = _issued(logs), (volume / "site.pem").read_bytes()
        time.sleep(DOWN_S)
        assert _issued(logs) == issued, "a certificate was issued while no one could ask whether its pod lives"
        assert (volume / "site.pem").read_bytes() == files, "the volume changed, or was lost"
        lost = [event for event in logs.events("certmount-authority") if event["event"] == "not followed"]
        assert lost, "no replica says that it can't follow the cluster"
    wait_until(lambda: (volume / "site.pem").read_bytes() != files, seconds=120, what="the running pod renews again")
    late = Pod(NAMESPACE, "late")
    apply(manifest(late, {"name": f"shop.{NAMESPACE}.svc"}, labels={"app": "shop"}))
    wait_for("Ready", f"pod/{late.name}", namespace=NAMESPACE, seconds=120)
    assert (BRISK.uid, BRISK.restarts()) == (uid, 0)
    assert {pod["metadata"]["uid"]: _restarts(pod) for pod in host.pods_of("certmount-authority")} == replicas
    assert {pod["metadata"]["uid"]: _restarts(pod) for pod in [host.driver()]} == driver


def _up() -> bool:
    return not subprocess.run([host._LOCALKUBE / "up.sh"], check=False, capture_output=True, timeout=300).returncode


def _restarts(pod: Any) -> int:
    count: int = pod["status"]["containerStatuses"][0]["restartCount"]
    return count


def _issued(logs: LogKeeper) -> int:
    return sum(event.get("decision") == "issued" for event in logs.events("certmount-authority"))
