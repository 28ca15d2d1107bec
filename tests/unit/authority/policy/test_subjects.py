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
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount
from csi_driver.core.names import Names
from csi_driver.kube.metadata import Metadata, ServiceSelector
from csi_driver.kube.object_caches import NamespaceCache, PodCache, ServiceCache
from tests.support.api_objects import metadata_of, service_of
from tests.unit.core.pki import names

UID = "6f1a3c1e-0000-4000-8000-00000000000a"
HELLO = PodIdentity(ServiceAccount("web", "hello"), "sa-uid", "hello-0", UID, "node-a", "node-uid", 2e9)


def pod(uid: str = UID, namespace: str = "web", name: str = "hello-0", **labels: str) -> Metadata:
    return metadata_of({"metadata": {"name": name, "namespace": namespace, "uid": uid, "labels": labels}})


def service(name: str, selector: Mapping[str, str] | None, namespace: str = "web", **spec: Any) -> ServiceSelector:
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}"}
    return service_of({"metadata": metadata, "spec": {**({} if selector is None else {"selector": selector}), **spec}})


def namespace(name: str, **labels: str) -> Metadata:
    return metadata_of({"metadata": {"name": name, "uid": "n1", "labels": labels}})


class Cluster:
    """The caches."""

    def __init__(self) -> None:
        self.pods, self.services, self.namespaces = PodCache(), ServiceCache(), NamespaceCache()
        self.outdated: list[str] = []
        self.live: LivePod | None = None  # the pod as the API server returns it
        self.read: list[str] = []
        self.namespaces.put(namespace("web", team="a"))

    def subjects(self, wait_s: float = 5.0) -> ClusterSubjectLookup:
        caches = self.pods, self.services, self.namespaces
        return ClusterSubjectLookup(*caches, lambda: self.outdated, self.find_pod, wait_s)

    async def find_pod(self, namespace: str, name: str) -> LivePod | None:
        self.read.append(f"{namespace}/{name}")
        return self.live

    async def services_of(self, identity: PodIdentity = HELLO) -> tuple[str, ...]:
        return (await self.subjects().find(identity, Names())).services


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


async def test_subject_has_services_and_namespace_labels(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello", tier="front"))
    cluster.services.put(service("web", {"app": "hello"}, clusterIP="10.96.0.7"))
    cluster.services.put(service("hello", {"app": "hello", "tier": "front"}, clusterIP="None"))
    cluster.services.put(service("other", {"app": "other"}))
    found = await cluster.subjects().find(HELLO, Names())
    assert (found.identity, dict(found.namespace_labels), found.services) == (HELLO, {"team": "a"}, ("hello", "web"))


async def test_subject_of_a_secret_has_namespace_labels_only(cluster: Cluster) -> None:
    secret = SecretIdentity("web", "edge-tls")
    found = await cluster.subjects().find_secret(secret)
    assert (found.identity, dict(found.namespace_labels), found.services) == (secret, {"team": "a"}, ())
    with pytest.raises(CertmountError, match=r"^PodNotFound: namespace bank: the API server has not reported it"):
        await cluster.subjects(wait_s=0).find_secret(SecretIdentity("bank", "tls"))
    cluster.outdated.append("the watch of namespaces failed")
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: the watch of namespaces failed"):
        await cluster.subjects().find_secret(secret)


DB_0 = LivePod(UID, "hello", "node-a", terminating=False, hostname="hello-0", subdomain="db")


@pytest.mark.parametrize(
    "cluster_ip, live, governing",
    [
        ("None", DB_0, "db"),
        ("10.96.0.7", DB_0, ""),
        ("None", dataclasses.replace(DB_0, subdomain="other"), ""),
        ("None", dataclasses.replace(DB_0, subdomain=""), ""),
        ("None", dataclasses.replace(DB_0, hostname=""), ""),
        ("None", dataclasses.replace(DB_0, hostname="hello-1"), ""),
        ("None", dataclasses.replace(DB_0, uid="successor"), ""),
        ("None", None, ""),
    ],
)
async def test_governing_service_is_what_dns_publishes(
    cluster_ip: str, live: LivePod | None, governing: str, cluster: Cluster
) -> None:
    """The pod has its own name as hostname, and as subdomain a headless Service that selects it."""
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("db", {"app": "hello"}, clusterIP=cluster_ip))
    cluster.services.put(service("other", {"app": "other"}, clusterIP="None"))
    cluster.live = live
    for domain in ("", ".cluster.local"):
        found = await cluster.subjects().find(HELLO, names(f"hello-0.db.web.svc{domain}", "hello-0.other.web.svc"))
        assert found.governing_service == governing


@pytest.mark.parametrize("requested", [(), ("db.web.svc",), ("hello-1.db.web.svc",), ("hello-0.other.web.svc",)])
async def test_pod_is_read_only_for_its_own_name_below_a_headless_service(
    requested: tuple[str, ...], cluster: Cluster
) -> None:
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("db", {"app": "hello"}, clusterIP="None"))
    cluster.live = DB_0
    assert not (await cluster.subjects().find(HELLO, names(*requested))).governing_service
    assert not cluster.read
    await cluster.subjects().find(HELLO, names("hello-0.db.web.svc"))
    assert cluster.read == ["web/hello-0"]


UNEQUAL: list[dict[str, str] | None] = [{}, None, {"": ""}, {"App": "hello"}]
UNEQUAL += [{"app": value} for value in ("hell", "hello ", "")]


@pytest.mark.parametrize(
    "other",
    [
        service("x", {"app": "hello"}, namespace="kube-system"),
        service("x", {"app": "hello"}, type="ExternalName", externalName="bank.example.com"),
        *(service("x", selector) for selector in (*UNEQUAL, {"app": "hello", "tier": "back"})),
    ],
)
async def test_service_that_does_not_select_the_pod_is_ignored(other: ServiceSelector, cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello", tier="front"))
    cluster.services.put(other)
    assert await cluster.services_of() == ()


async def test_label_values_are_compared_literally(cluster: Cluster) -> None:
    labels = {"a": "*", "b": "x,y", "c": "ä", "d": "", "app.kubernetes.io/name": "x_Y.z-1"}
    cluster.pods.put(pod(**labels))
    for number, (key, value) in enumerate(labels.items()):
        cluster.services.put(service(f"equal-{number}", {key: value}))
    for number, (key, value) in enumerate((("c", "a\u0308"), ("b", "x"), ("b", "*"), ("e", ""))):
        cluster.services.put(service(f"other-{number}", {key: value}))
    assert await cluster.services_of() == tuple(f"equal-{number}" for number in range(5))


async def test_new_pod_with_the_same_name_is_another_pod(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello"))
    cluster.services.put(service("hello", {"app": "hello"}))
    cluster.pods.remove(pod(app="hello"))
    successor = UID.replace("a", "b")
    cluster.pods.put(pod(uid=successor, app="stranger"))
    with pytest.raises(CertmountError, match="PodNotFound: "):
        await cluster.subjects(wait_s=0.01).find(HELLO, Names())
    assert await cluster.services_of(dataclasses.replace(HELLO, pod_uid=successor)) == ()


async def test_uid_in_another_namespace_is_rejected(cluster: Cluster) -> None:
    """Token and API server contradict each other, so a retry cannot help."""
    cluster.pods.put(pod(namespace="bank", app="hello"))
    with pytest.raises(CertmountError, match=r"TokenRejected: .* has this UID in namespace bank"):
        await cluster.subjects().find(HELLO, Names())


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
    waiting = asyncio.create_task(cluster.subjects().find(identity, Names()))
    await asyncio.sleep(0)
    cluster.namespaces.put(namespace("new"))
    assert dict((await waiting).namespace_labels) == {}
    cluster.namespaces.remove(namespace("new"))
    with pytest.raises(CertmountError, match="namespace new: the API server has not reported it"):
        await cluster.subjects(wait_s=0.01).find(identity, Names())


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
        await cluster.subjects().find(HELLO, Names())


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
    assert max(map(sys.getsizeof, cluster.pods._known)) < 50


MANY = {f"label-{number}": "x" for number in range(129)}


async def test_objects_with_too_many_labels_are_unknown_in_their_namespace_only(cluster: Cluster) -> None:
    cluster.pods.put(pod(app="hello"))
    cluster.pods.put(pod(uid="1", namespace="greedy", **MANY))
    cluster.namespaces.put(namespace("greedy", **MANY))
    cluster.services.put(service("large", MANY, namespace="greedy"))
    assert await cluster.services_of() == ()
    greedy = dataclasses.replace(HELLO, service_account=ServiceAccount("greedy", "hello"), pod_uid="1")
    for cache, what, count in (
        (cluster.pods, "pod greedy/hello-0", "labels"),
        (cluster.namespaces, "namespace greedy", "labels"),
        (cluster.services, "Service greedy/large", "pairs in its selector"),
    ):
        with pytest.raises(CertmountError) as refused:
            await cluster.subjects().find(greedy, Names())
        text = f"ShareExceeded: {what}: has more than 128 {count}, so certmount ignores it; use at most 128"
        assert str(refused.value) == text
        cache.shares.start_list()
        cluster.pods.put(pod(uid="1", namespace="greedy"))
        if cache is not cluster.pods:
            cluster.namespaces.put(namespace("greedy"))


async def test_pod_over_the_share_of_its_namespace_has_words(cluster: Cluster) -> None:
    """A pod that is known keeps its labels until it changes, and is known again as soon as there is room."""
    cluster.pods = pods = PodCache(2000)
    pods.put(pod(uid="1", app="hello"))
    assert pods.put(pod(app="other", **{"x" * 63: "y" * 63})) is None
    assert pods.find("1")
    with pytest.raises(CertmountError) as refused:
        await cluster.subjects().find(HELLO, Names())
    problem = "namespace web: holds 708 of 2000 bytes of known pods and requests 1134 more, which exceeds its share"
    assert str(refused.value) == f"ShareExceeded: {problem}; wait until some of them end"
    assert pods.put(pod(uid="2", namespace="other")) == "2"
    pods.remove(pod(uid="1"))
    pods.put(pod(app="other"))
    assert (await cluster.subjects().find(HELLO, Names())).services == ()
    assert pods.shares.has_room


@given(st.lists(st.tuples(st.sampled_from("123"), st.sampled_from(["web", "other"]), LABELS | st.none())))
def test_caches_give_back_what_they_took(history: list[tuple[str, str, dict[str, str] | None]]) -> None:
    pods, services, namespaces = PodCache(3000), ServiceCache(6000), NamespaceCache(3000)
    for name, where, labels in history:
        if labels is None:
            pods.remove(pod(uid=name, namespace=where))
            services.remove(service(name, None, namespace=where))
            namespaces.remove(namespace(where))
        else:
            pods.put(pod(uid=name, namespace=where, **labels))
            services.put(service(name, labels, namespace=where))
            namespaces.put(namespace(where, **labels))
    caches = (pods, services, namespaces)
    assert all(cache.shares._shares.total <= 6000 for cache in caches)
    for cache in caches:
        cache.retain(set())
    assert [cache.shares._shares.total for cache in caches] == [0, 0, 0]


async def test_subject_without_a_cluster_has_no_labels_and_services() -> None:
    subject = await OfflineSubjectLookup().find(HELLO, Names())
    assert (subject.identity, dict(subject.namespace_labels), subject.services) == (HELLO, {}, ())
