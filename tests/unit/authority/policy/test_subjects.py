"""Services and namespace labels of pods, from the caches of the watches."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.policy.subjects import ClusterSubjectLookup, OfflineSubjectLookup
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.object_caches import NamespaceCache, PodCache, ServiceCache

UID = "6f1a3c1e-0000-4000-8000-00000000000a"
HELLO = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", UID, "node-a", "node-uid", 2e9)


def pod(uid: str = UID, namespace: str = "web", name: str = "hello-0", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": labels}}


def service(name: str, selector: Mapping[str, str] | None, namespace: str = "web", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}"}
    return {"metadata": metadata, "spec": {**({} if selector is None else {"selector": selector}), **spec}}


class Cluster:
    """The caches."""

    def __init__(self) -> None:
        self.pods, self.services, self.namespaces = PodCache(), ServiceCache(), NamespaceCache()
        self.outdated: list[str] = []
        self.namespaces.put({"metadata": {"name": "web", "uid": "n1", "labels": {"team": "a"}}})

    def subjects(self, wait_s: float = 5.0) -> ClusterSubjectLookup:
        return ClusterSubjectLookup(self.pods, self.services, self.namespaces, lambda: self.outdated, wait_s)

    async def services_of(self, identity: PodIdentity = HELLO) -> tuple[str, ...]:
        return (await self.subjects().find(identity)).services


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


async def test_subject_has_services_and_namespace_labels(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello", tier="front"))
    cluster.services.put(service("web", {"app": "hello"}, clusterIP="10.96.0.7"))
    cluster.services.put(service("hello", {"app": "hello", "tier": "front"}, clusterIP="None"))
    cluster.services.put(service("other", {"app": "other"}))
    found = await cluster.subjects().find(HELLO)
    assert (found.identity, dict(found.namespace_labels), found.services) == (HELLO, {"team": "a"}, ("hello", "web"))


@pytest.mark.parametrize(
    "other",
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
async def test_service_that_does_not_select_the_pod_is_ignored(other: dict[str, Any], cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello", tier="front"))
    cluster.services.put(other)
    assert await cluster.services_of() == ()


async def test_label_values_are_compared_literally(cluster: Cluster) -> None:
    cluster.pods.put(pod(**{"a": "*", "b": "x,y", "c": "ä", "d": "", "app.kubernetes.io/name": "x_Y.z-1"}))
    qualified = {"app.kubernetes.io/name": "x_Y.z-1"}
    equal = {
        "comma": {"b": "x,y"},
        "composed": {"c": "ä"},
        "empty": {"d": ""},
        "qualified": qualified,
        "star": {"a": "*"},
    }
    other = {"decomposed": {"c": "a\u0308"}, "first": {"b": "x"}, "any": {"b": "*"}, "missing": {"e": ""}}
    for name, selector in (equal | other).items():
        cluster.services.put(service(name, selector))
    assert await cluster.services_of() == tuple(equal)


async def test_new_pod_with_the_same_name_is_another_pod(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("hello", {"app": "hello"}))
    cluster.pods.remove(pod(app="hello"))
    successor = UID.replace("a", "b")
    cluster.pods.put(pod(uid=successor, app="stranger"))
    with pytest.raises(CertmountError, match="PodNotFound: "):
        await cluster.subjects(wait_s=0.01).find(HELLO)
    assert await cluster.services_of(dataclasses.replace(HELLO, pod_uid=successor)) == ()


async def test_uid_in_another_namespace_is_rejected(cluster: Cluster) -> None:
    """Token and API server contradict each other, so a retry cannot help."""
    cluster.pods.put(pod(namespace="bank", app="hello"))
    with pytest.raises(CertmountError, match=r"TokenRejected: .* has this UID in namespace bank"):
        await cluster.subjects().find(HELLO)


async def test_label_and_selector_changes_apply_immediately(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("hello", {"app": "hello"}))
    assert await cluster.services_of() == ("hello",)
    cluster.pods.put(pod(app="quarantined"))
    assert await cluster.services_of() == ()
    for selector, expected in (({"app": "quarantined"}, ("hello",)), (None, ())):
        cluster.services.put(service("hello", selector))
        assert await cluster.services_of() == expected


async def test_lookup_waits_for_a_new_pod(cluster: Cluster) -> None:
    """The kubelet can be faster than the watch."""
    waiting = [asyncio.create_task(cluster.services_of()) for _ in range(3)]
    await asyncio.sleep(0)
    cluster.services.put(service("hello", {"app": "hello"}))
    cluster.pods.put(pod(uid=UID.replace("a", "c")))
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    cluster.pods.put(pod(app="hello"))
    assert await asyncio.gather(*waiting) == [("hello",)] * 3


async def test_lookup_waits_for_a_new_namespace(cluster: Cluster) -> None:
    cluster.pods.put(pod(namespace="new"))
    identity = dataclasses.replace(HELLO, service_account=ServiceAccount("new", "hello"))
    waiting = asyncio.create_task(cluster.subjects().find(identity))
    await asyncio.sleep(0)
    cluster.namespaces.put({"metadata": {"name": "new", "uid": "n2"}})
    assert dict((await waiting).namespace_labels) == {}
    cluster.namespaces.remove({"metadata": {"name": "new", "uid": "n2"}})
    with pytest.raises(CertmountError, match="namespace new: the API server has not reported it"):
        await cluster.subjects(wait_s=0.01).find(identity)


async def test_cancelled_lookup_leaves_no_waiter(cluster: Cluster) -> None:
    waiting = asyncio.create_task(cluster.services_of())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not cluster.pods._waiters._waiting


async def test_outdated_caches_are_not_used(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello"))
    cluster.outdated = ["the cluster's pods are not known yet", "the cluster's services could not be followed for 70 s"]
    with pytest.raises(CertmountError, match=r"TokenReviewUnavailable: .*pods .*services .*70 s"):
        await cluster.subjects().find(HELLO)


async def test_lookup_among_thousands_of_services_compares_few(cluster: Cluster) -> None:
    """Although each Service shares a label with the pod."""
    cluster.pods.put(pod(app="shop-700", team="a"))
    for number in range(3000):
        cluster.services.put(service(f"shop-{number}", {"team": "a", "app": f"shop-{number}"}))
    assert await cluster.services_of() == ("shop-700",)
    assert max(len(names) for names in cluster.services._indices["web"].values()) == 1
    for number in range(3000):
        cluster.services.remove(service(f"shop-{number}", None))
    assert (len(cluster.services), cluster.services._indices) == (0, {})


History = list[tuple[str, dict[str, str] | None]]
LABELS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"), max_size=4)


@given(LABELS, st.lists(st.tuples(st.sampled_from(["s1", "s2", "s3", "s4"]), LABELS | st.none())))
def test_service_index_agrees_with_a_plain_comparison(labels: dict[str, str], history: History) -> None:
    services, current = ServiceCache(), dict[str, dict[str, str]]()
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
def test_pod_cache_shares_equal_labels_and_releases_them(history: History) -> None:
    pods, current = PodCache(), dict[str, dict[str, str]]()
    for uid, labels in history:
        if labels is None:
            pods.remove(pod(uid))
            current.pop(uid, None)
        else:
            pods.put(pod(uid, **labels))
            current[uid] = labels
    assert {uid: dict(found.labels) for uid in current if (found := pods.find(uid))} == current
    shared = {frozenset(labels) for _, labels in pods._shared}
    assert shared == {frozenset(labels.items()) for labels in current.values()}
    pods.retain(set())
    assert (len(pods), pods._shared) == (0, {})


def test_pod_cache_is_small(cluster: Cluster) -> None:
    """Replicas share their labels, and a UID is stored as a number, so that all pods of a cluster fit in memory."""
    for number in range(1000):
        cluster.pods.put(pod(uid=f"6f1a3c1e-0000-4000-8000-{number:012x}", app="hello", hash="5d8f"))
    assert len(cluster.pods._shared) == 1
    assert max(map(sys.getsizeof, cluster.pods._pods)) < 50


@pytest.mark.parametrize("item", [{}, {"metadata": {"name": "x", "uid": "u"}}, service("x", {"a": 7})])  # type: ignore[dict-item]  # invalid on purpose
def test_invalid_service_is_rejected(item: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject):
        ServiceCache().put(item)


async def test_subject_without_a_cluster_has_no_labels_and_services() -> None:
    subject = await OfflineSubjectLookup().find(HELLO)
    assert (subject.identity, dict(subject.namespace_labels), subject.services) == (HELLO, {}, ())
