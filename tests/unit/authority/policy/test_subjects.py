"""Which Services and which labels a pod is given; a hostile one gets those of no other."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.policy.subjects import ClusterSubjects, NoCluster
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.kube.metadata import BadObject
from csi_driver.kube.namespaces import Namespaces
from csi_driver.kube.pods import Pods
from csi_driver.kube.services import Services

UID = "6f1a3c1e-0000-4000-8000-00000000000a"
HELLO = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", UID, "node-a", "node-uid", 2e9)


def pod(uid: str = UID, namespace: str = "web", name: str = "hello-0", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": labels}}


def service(name: str, selector: Mapping[str, str] | None, namespace: str = "web", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}"}
    return {"metadata": metadata, "spec": {**({} if selector is None else {"selector": selector}), **spec}}


class Cluster:
    """The caches, filled by hand."""

    def __init__(self) -> None:
        self.pods, self.services, self.namespaces = Pods(), Services(), Namespaces()
        self.outdated: list[str] = []
        self.namespaces.put({"metadata": {"name": "web", "uid": "n1", "labels": {"team": "a"}}})

    def subjects(self, patience_s: float = 5.0) -> ClusterSubjects:
        return ClusterSubjects(self.pods, self.services, self.namespaces, lambda: self.outdated, patience_s)

    async def services_of(self, identity: PodIdentity = HELLO) -> tuple[str, ...]:
        return (await self.subjects().find(identity)).services


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


async def test_a_pod_with_its_services_and_its_namespaces_labels(cluster: Cluster) -> None:
    """All Services that select it, headless and normal, sorted."""
    cluster.pods.put(pod(app="hello", tier="front"))
    cluster.services.put(service("web", {"app": "hello"}, clusterIP="10.96.0.7"))
    cluster.services.put(service("hello", {"app": "hello", "tier": "front"}, clusterIP="None"))
    cluster.services.put(service("other", {"app": "other"}))
    subject = await cluster.subjects().find(HELLO)
    assert subject.identity == HELLO
    assert dict(subject.namespace_labels) == {"team": "a"}
    assert subject.services == ("hello", "web")


@pytest.mark.parametrize(
    "hostile",
    [
        service("x", {"app": "hello"}, namespace="kube-system"),
        service("x", {}),
        service("x", None),
        service("x", {"app": "hello"}, type="ExternalName", externalName="bank.example.com"),
        service("x", {"app": "hello", "tier": "back"}),
        service("x", {"app": "hell"}),
        service("x", {"app": "hello "}),
        service("x", {"App": "hello"}),
        service("x", {"app": ""}),
        service("x", {"": ""}),
    ],
)
async def test_what_does_not_select_the_pod_gives_no_name(hostile: dict[str, Any], cluster: Cluster) -> None:
    """Another namespace's, one that selects nothing, one without pods, one that needs another label as well."""
    cluster.pods.put(pod(app="hello", tier="front"))
    cluster.services.put(hostile)
    assert await cluster.services_of() == ()


async def test_odd_characters_are_compared_as_they_are(cluster: Cluster) -> None:
    """No value is a pattern, a list or a part of another."""
    cluster.pods.put(pod(**{"a": "*", "b": "x,y", "c": "ä", "d": "", "app.kubernetes.io/name": "x_Y.z-1"}))
    for name, selector in {
        "star": {"a": "*"},
        "comma": {"b": "x,y"},
        "empty": {"d": ""},
        "composed": {"c": "ä"},
        "qualified": {"app.kubernetes.io/name": "x_Y.z-1"},
        "decomposed": {"c": "a\u0308"},
        "first": {"b": "x"},
        "any": {"b": "*"},
        "missing": {"e": ""},
    }.items():
        cluster.services.put(service(name, selector))
    assert await cluster.services_of() == ("comma", "composed", "empty", "qualified", "star")


async def test_a_successor_under_the_same_name_is_another_pod(cluster: Cluster) -> None:
    """By uid: the token of the pod that is gone gets nothing of the new one, and the new one nothing of the old."""
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("hello", {"app": "hello"}))
    cluster.pods.remove(pod(app="hello"))
    successor = UID.replace("a", "b")
    cluster.pods.put(pod(uid=successor, app="stranger"))
    with pytest.raises(CertmountError) as failure:
        await cluster.subjects(patience_s=0.01).find(HELLO)
    assert failure.value.reason is Reason.POD_NOT_FOUND
    assert await cluster.services_of(dataclasses.replace(HELLO, pod_uid=successor)) == ()


async def test_a_uid_of_another_namespace_is_refused(cluster: Cluster) -> None:
    """Token and API server contradict each other: that is not to be tried again."""
    cluster.pods.put(pod(namespace="bank", app="hello"))
    with pytest.raises(CertmountError, match="knows its uid in namespace bank") as failure:
        await cluster.subjects().find(HELLO)
    assert failure.value.reason is Reason.TOKEN_REJECTED


async def test_changed_labels_count_from_now_on(cluster: Cluster) -> None:
    """A pod that is labelled out of a Service loses its name, and a Service that selects others too."""
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("hello", {"app": "hello"}))
    assert await cluster.services_of() == ("hello",)
    cluster.pods.put(pod(app="quarantined"))
    assert await cluster.services_of() == ()
    cluster.services.put(service("hello", {"app": "quarantined"}))
    assert await cluster.services_of() == ("hello",)
    cluster.services.put(service("hello", None))
    assert await cluster.services_of() == ()


async def test_a_pod_that_is_about_to_be_known_is_waited_for(cluster: Cluster) -> None:
    """The kubelet may be faster than the watch: everyone who waits is answered as soon as it comes."""
    waiting = [asyncio.create_task(cluster.services_of()) for _ in range(3)]
    await asyncio.sleep(0)
    cluster.services.put(service("hello", {"app": "hello"}))
    cluster.pods.put(pod(uid=UID.replace("a", "c")))
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    cluster.pods.put(pod(app="hello"))
    assert await asyncio.gather(*waiting) == [("hello",)] * 3


async def test_a_namespace_that_is_about_to_be_known_is_waited_for(cluster: Cluster) -> None:
    """Its labels decide, so no guess is made; once there, they are those of now."""
    cluster.pods.put(pod(namespace="new"))
    identity = dataclasses.replace(HELLO, service_account=ServiceAccount("new", "hello"))
    waiting = asyncio.create_task(cluster.subjects().find(identity))
    await asyncio.sleep(0)
    cluster.namespaces.put({"metadata": {"name": "new", "uid": "n2"}})
    assert dict((await waiting).namespace_labels) == {}
    cluster.namespaces.remove({"metadata": {"name": "new", "uid": "n2"}})
    with pytest.raises(CertmountError, match="namespace new: the API server has not told"):
        await cluster.subjects(patience_s=0.01).find(identity)


async def test_one_who_waits_may_be_called_off(cluster: Cluster) -> None:
    """As when the node hangs up; nothing of it is left behind."""
    waiting = asyncio.create_task(cluster.services_of())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not cluster.pods._arrivals._waiting


async def test_caches_that_are_not_kept_up_to_date_prove_nothing(cluster: Cluster) -> None:
    """Whatever they hold; with all reasons, and to be tried again."""
    cluster.pods.put(pod(app="hello"))
    cluster.outdated = ["the cluster's pods are not known yet", "the cluster's services could not be followed for 70 s"]
    with pytest.raises(CertmountError, match=r"pods are not known yet .*followed for 70 s") as failure:
        await cluster.subjects().find(HELLO)
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


async def test_thousands_of_services(cluster: Cluster) -> None:
    """Those that fit are found among all that don't, though every one shares a pair with the pod."""
    cluster.pods.put(pod(app="shop-700", team="a"))
    for number in range(3000):
        cluster.services.put(service(f"shop-{number}", {"team": "a", "app": f"shop-{number}"}))
    assert await cluster.services_of() == ("shop-700",)
    longest = max(len(names) for names in cluster.services._indices["web"].values())
    assert longest == 1, "a look-up compares few of them"
    for number in range(3000):
        cluster.services.remove(service(f"shop-{number}", None))
    assert (len(cluster.services), cluster.services._indices) == (0, {})


LABELS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"), max_size=4)


@given(LABELS, st.lists(st.tuples(st.sampled_from(["s1", "s2", "s3", "s4"]), LABELS | st.none())))
def test_the_index_says_what_a_plain_comparison_says(
    labels: dict[str, str], history: list[tuple[str, dict[str, str] | None]]
) -> None:
    """After any history of Services that come, change and go (None)."""
    services, current = Services(), dict[str, dict[str, str]]()
    for name, selector in history:
        if selector is None:
            services.remove(service(name, None))
            current.pop(name, None)
        else:
            services.put(service(name, selector))
            current[name] = selector
    expected = sorted(name for name, selector in current.items() if selector and selector.items() <= labels.items())
    assert services.select("web", tuple(sorted(labels.items()))) == tuple(expected)
    services.retain(set())
    assert (len(services), services._indices) == (0, {})


@given(st.lists(st.tuples(st.sampled_from([UID, UID[:-1] + "b", "mirror"]), LABELS | st.none())))
def test_pods_share_what_is_alike_and_leave_nothing(history: list[tuple[str, dict[str, str] | None]]) -> None:
    """After any history every pod has its own labels, and what no pod has is forgotten."""
    pods, current = Pods(), dict[str, dict[str, str]]()
    for uid, labels in history:
        if labels is None:
            pods.remove(pod(uid))
            current.pop(uid, None)
        else:
            pods.put(pod(uid, **labels))
            current[uid] = labels
    for uid, labels in current.items():
        found = pods.find(uid)
        assert found is not None
        assert dict(found.labels) == labels
    assert {frozenset(labels.items()) for labels in current.values()} == {
        frozenset(labels) for _, labels in pods._shared
    }
    pods.retain(set())
    assert (len(pods), pods._shared) == (0, {})


def test_a_pod_costs_a_number_and_a_place(cluster: Cluster) -> None:
    """Replicas share their labels, and a uid is kept as a number: a cluster's worth of pods must fit into memory."""
    for number in range(1000):
        cluster.pods.put(pod(uid=f"6f1a3c1e-0000-4000-8000-{number:012x}", app="hello", hash="5d8f"))
    assert len(cluster.pods._shared) == 1
    keys = list(cluster.pods._pods)
    assert sum(sys.getsizeof(key) for key in keys) / len(keys) < 50


@pytest.mark.parametrize("item", [{}, {"metadata": {"name": "x", "uid": "u"}}, service("x", {"a": 7})])  # type: ignore[dict-item]  # as it may come
def test_a_service_that_is_none_is_said_to_be_none(item: dict[str, Any]) -> None:
    """And not taken for one that selects nothing."""
    with pytest.raises(BadObject):
        Services().put(item)


async def test_outside_a_cluster_nothing_is_known_of_a_pod() -> None:
    """It has its SPIFFE ID only."""
    subject = await NoCluster().find(HELLO)
    assert (subject.identity, dict(subject.namespace_labels), subject.services) == (HELLO, {}, ())
