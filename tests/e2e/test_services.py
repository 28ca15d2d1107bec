"""Services give names to their pods without a policy rule; pod events report failures; the API server can be unavailable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from tests.e2e import authority, cluster, host
from tests.e2e.logs import AUTHORITY, LogCollector
from tests.e2e.pods import Pod, manifest, service

NAMESPACE = "services"  # No rule of the tests' policy matches this namespace: every name comes from a Service
SELECTED = Pod(NAMESPACE, "selected")
UNSELECTED = Pod(NAMESPACE, "unselected")
NAMELESS = Pod(NAMESPACE, "nameless")
SHORT_LIVED = Pod(NAMESPACE, "short-lived")  # the driver renews its certificate about every 40 seconds
OUTAGE_S = 60.0
SERVICE = f"shop.{NAMESPACE}.svc"
MEMBER = Pod(NAMESPACE, "db-0")  # of a StatefulSet
IMPOSTOR = Pod(NAMESPACE, "db-9")  # with the labels of the StatefulSet's pods
MEMBER_NAME = {"dns-names": "${POD_NAME}.db." + f"{NAMESPACE}.svc"}
SPIFFE_ID = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/default"


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    cluster.create_namespace(NAMESPACE)
    cluster.apply(
        service("shop", NAMESPACE),
        service("shop-headless", NAMESPACE, "shop", headless=True),
        service("db", NAMESPACE, headless=True),
        _stateful_set(),
        manifest(IMPOSTOR, MEMBER_NAME, labels={"app": "db"}),
        manifest(SELECTED, {"name": SERVICE}, labels={"app": "shop", "version": "1"}),
        manifest(NAMELESS, {}, labels={"app": "shop"}),
        manifest(UNSELECTED, {"name": SERVICE}, labels={"app": "other"}),
        manifest(SHORT_LIVED, {"duration": "60s"}, labels={"app": "shop"}),
    )
    yield
    cluster.delete_namespace(NAMESPACE)


def _stateful_set() -> cluster.Manifest:
    pod = manifest(MEMBER, MEMBER_NAME, labels={"app": "db"})
    template = {"metadata": {"labels": {"app": "db"}}, "spec": {**pod["spec"], "restartPolicy": "Always"}}
    spec = {"serviceName": "db", "selector": {"matchLabels": {"app": "db"}}, "template": template}
    metadata = {"name": "db", "namespace": NAMESPACE}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}


def _names(certificate: x509.Certificate) -> tuple[set[str], set[str]]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = set(names.get_values_for_type(x509.UniformResourceIdentifier))
    return set(names.get_values_for_type(x509.DNSName)), uris


def _authority_events(pod: Pod) -> list[Any]:
    return cluster.events_of(pod.name, NAMESPACE, reportingComponent="certmount.dev/authority")


def test_selected_pod_gets_the_requested_service_name() -> None:
    SELECTED.wait_until_ready()
    assert _names(SELECTED.certificate()) == ({SERVICE}, {SPIFFE_ID})


def test_pod_of_a_stateful_set_gets_its_own_name() -> None:
    MEMBER.wait_until_ready()
    assert _names(MEMBER.certificate()) == ({f"db-0.db.{NAMESPACE}.svc"}, {SPIFFE_ID})


def test_pod_with_the_labels_of_a_stateful_set_gets_no_name_of_its_pods() -> None:
    """DNS has no record for it: it has neither the hostname nor the subdomain."""
    (event, *_) = cluster.wait_until(lambda: _authority_events(IMPOSTOR), seconds=60, what="an event of the authority")
    assert (event["type"], event["reason"]) == ("Warning", "NameNotAllowed")
    assert f"db-9.db.{NAMESPACE}.svc" in event["message"]


def test_pod_without_names_gets_all_its_service_names() -> None:
    """A pod that requests no name gets the names of all Services that select it, in both forms, and its SPIFFE ID."""
    NAMELESS.wait_until_ready()
    services = [f"{name}.{NAMESPACE}.svc" for name in ("shop", "shop-headless")]
    dns = {*services, *(f"{name}.cluster.local" for name in services)}
    assert _names(NAMELESS.certificate()) == (dns, {SPIFFE_ID})


@pytest.mark.timeout(240)
def test_unselected_pod_gets_a_pod_event() -> None:
    """The event is on the pod with its UID. Another rejection increases the count of the same event."""
    (event, *others) = cluster.wait_until(
        lambda: _authority_events(UNSELECTED), seconds=60, what="an event of the authority"
    )
    assert others == []
    assert (event["type"], event["reason"]) == ("Warning", "NameNotAllowed")
    assert f"shop.{NAMESPACE}.svc" in event["message"]
    assert event["involvedObject"]["uid"] == UNSELECTED.uid

    def count() -> int:
        # The authority creates a new event every ten minutes of wall-clock time.
        events = _authority_events(UNSELECTED)
        assert len(events) <= 2
        return sum(int((event.get("series") or {}).get("count", 1)) for event in events)

    cluster.wait_until(lambda: count() >= 2, seconds=120, what="a second rejection, counted in the same event")


@pytest.mark.timeout(240)
def test_pod_starts_after_a_service_selects_it() -> None:
    uid = UNSELECTED.uid
    cluster.apply(service("shop", NAMESPACE, "other"))
    UNSELECTED.wait_until_ready(150)
    assert (UNSELECTED.uid, UNSELECTED.restarts()) == (uid, 0)
    assert _names(UNSELECTED.certificate())[0] == {f"shop.{NAMESPACE}.svc"}
    cluster.apply(service("shop", NAMESPACE))


def test_removed_label_removes_the_name() -> None:
    """New certificates do not contain the name once the authority has seen the change; issued ones stay valid."""
    pod_token, node_token = authority.pod_token(NAMESPACE, SELECTED.name), authority.node_token()

    def names() -> set[str]:
        result = authority.issue(pod_token, node_token)
        assert result.leaf is not None, result.message
        return _names(result.leaf)[0]

    assert f"shop.{NAMESPACE}.svc" in names()
    cluster.kubectl("-n", NAMESPACE, "label", "pod", SELECTED.name, "app-")
    cluster.wait_until(lambda: not names(), seconds=20, what="certificates without Service names")


@contextlib.contextmanager
def _unavailable_api_server() -> Iterator[None]:
    host.stop_component("apiserver", seconds=90)
    try:
        yield
    finally:
        # Each component gets a minute; on a busy machine one that restarts after an outage may need more.
        cluster.wait_until(lambda: host.start_components(300), seconds=150, what="the cluster is up again")


def _restarts() -> dict[str, int]:
    """Return the restarts of each pod of certmount, by UID."""
    return {pod["metadata"]["uid"]: host.restarts(pod) for pod in [*host.authorities(), host.driver()]}


@pytest.mark.timeout(400)
def test_api_server_is_unavailable_for_a_minute(logs: LogCollector) -> None:
    """The authority issues nothing that it cannot verify. Afterwards pods renew and start again, without restarts."""
    SHORT_LIVED.wait_until_ready()
    before = _restarts()
    uid, volume = SHORT_LIVED.uid, host.target_path(SHORT_LIVED.uid)
    with _unavailable_api_server():
        # A token review from just before counts for some seconds. The volume's files need no API server.
        time.sleep(10)
        issued, files = len(logs.issued()), (volume / "site.pem").read_bytes()
        time.sleep(OUTAGE_S)  # the promise is about an outage of this length
        assert len(logs.issued()) == issued, "a certificate was issued without a token review"
        assert (volume / "site.pem").read_bytes() == files, "the volume changed or was lost"
        assert any(event["event"] == "watch failed" for event in logs.events(AUTHORITY)), "no replica logged the outage"
    cluster.wait_until(
        lambda: (volume / "site.pem").read_bytes() != files, seconds=120, what="the running pod is renewed"
    )
    late = Pod(NAMESPACE, "late")
    cluster.apply(manifest(late, {"name": f"shop.{NAMESPACE}.svc"}, labels={"app": "shop"}))
    late.wait_until_ready(120)
    assert (SHORT_LIVED.uid, SHORT_LIVED.restarts()) == (uid, 0)
    assert _restarts() == before
