"""CertificateSigningRequests, the lease and live pods, at an API server with real conflicts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from kubernetes.aio import client

from csi_driver.core.cluster.csr import APPROVED, CERTMOUNT_SIGNER, DENIED, FAILED, CSRCondition, CSRDraft, parse_signer
from csi_driver.core.cluster.objects import Lease, LivePod
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.client import ObjectName
from csi_driver.kube.csr_cache import CSRCache, read_csr
from csi_driver.kube.csr_client import KubernetesCSRClient
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.pod_client import PodClient
from csi_driver.kube.stored_objects import LeaseClient
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.csr_api import ACCOUNT

DRAFT = CSRDraft(
    "certmount-own-", "example.com/pods", b"PEM", ("server auth",), 3600, {"a": "b"}, {"note": "web/hello-0"}
)
GRANTED = CSRCondition(APPROVED, "PolicyAllows", "by built-in")
REFUSED = CSRCondition(DENIED, "NameNotAllowed", "a.test: no rule allows it")
LEASE_PATH = "/apis/coordination.k8s.io/v1/namespaces/certmount/leases/certmount-csr-signer"
POD_PATH = "/api/v1/namespaces/web/pods/hello-0"


@pytest.fixture
def requests(api: client.ApiClient) -> KubernetesCSRClient:
    return KubernetesCSRClient(api, api)


@contextlib.asynccontextmanager
async def followed(requests: KubernetesCSRClient, sink: CSRCache, **selection: str) -> AsyncIterator[None]:
    reflector = requests.watch(sink, **selection)
    following = asyncio.create_task(reflector.run())
    try:
        await asyncio.wait_for(sink.listed.wait(), 20)
        yield
    finally:
        following.cancel()
        await asyncio.wait([following])


async def test_a_request_is_made_as_the_draft_says(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """Under a name of the API server's choice; who has made it comes back as the API server has stamped it."""
    csr = await requests.create(DRAFT)
    made = server.csrs.object(csr.name)
    assert made["metadata"]["labels"] == {"a": "b"}
    assert made["metadata"]["annotations"] == {"note": "web/hello-0"}
    assert (made["spec"]["signerName"], made["spec"]["expirationSeconds"]) == ("example.com/pods", 3600)
    assert base64.b64decode(made["spec"]["request"]) == b"PEM" == csr.request
    assert (csr.username, csr.created_at, csr.finished) == (ACCOUNT, 1795341600.0, False)


@pytest.mark.parametrize("condition", [GRANTED, REFUSED], ids=lambda one: one.kind)
async def test_a_decision_has_reason_message_and_time(
    condition: CSRCondition, server: FakeApiServer, requests: KubernetesCSRClient
) -> None:
    """As ``kubectl describe csr`` shows them; someone else's change at the same moment is no obstacle."""
    csr = await requests.create(DRAFT)
    server.csrs.conflicts = 1
    decided = await requests.decide(csr, condition)
    assert decided.condition(condition.kind) == condition
    (written,) = server.csrs.object(csr.name)["status"]["conditions"]
    assert (written["status"], written["lastUpdateTime"][-1]) == ("True", "Z")
    assert server.requests[-1][1].endswith(f"/{csr.name}/approval")


async def test_what_someone_has_decided_stays(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """A denial by hand is not overruled, and a certificate is not replaced."""
    csr = await requests.create(DRAFT)
    server.csrs.change(csr.name, conditions=[{"type": DENIED, "reason": "ByHand", "message": ""}])
    assert (await requests.decide(csr, GRANTED)).rejection == CSRCondition(DENIED, "ByHand", "")
    assert not (await requests.set_certificate(csr, b"chain")).certificate
    other = await requests.create(DRAFT)
    server.csrs.change(other.name, certificate=base64.b64encode(b"first").decode())
    assert (await requests.set_certificate(other, b"second")).certificate == b"first"
    assert (await requests.fail(other, CSRCondition(FAILED, "x", "y"))).rejection is None
    assert not [path for method, path, _ in server.requests if method == "PUT"]


async def test_a_certificate_and_a_failure_go_into_the_status(
    server: FakeApiServer, requests: KubernetesCSRClient
) -> None:
    """The approval stays beside them, as the API asks for."""
    csr, other = await requests.create(DRAFT), await requests.create(DRAFT)
    await requests.decide(csr, GRANTED)
    assert (await requests.set_certificate(csr, b"chain")).certificate == b"chain"
    await requests.decide(other, GRANTED)
    failed = await requests.fail(other, CSRCondition(FAILED, "NameNotAllowed", "x"))
    assert [one.kind for one in failed.conditions] == [APPROVED, FAILED]
    assert [path.rpartition("/")[2] for method, path, _ in server.requests if method == "PUT"] == [
        "approval",
        "status",
    ] * 2


async def test_only_the_very_request_is_deleted(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """Not one that was made anew under its name; one that is gone is no failure."""
    csr = await requests.create(DRAFT)
    server.csrs.object(csr.name)["metadata"]["uid"] = "another"
    await requests.delete(csr)
    assert server.csrs.object(csr.name)
    with pytest.raises(CertmountError, match="was made anew meanwhile"):
        await requests.decide(csr, GRANTED)
    other = await requests.create(DRAFT)
    await requests.delete(other)
    await requests.delete(other)
    assert list(server.csrs.collection.objects) == [f"/{csr.name}"]


async def test_one_watch_tells_all_who_wait(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """Signed, denied, deleted: each wait ends as soon as it can; the watch is of the signer or of the labels only."""
    known = CSRCache()
    async with followed(requests, known, signer=CERTMOUNT_SIGNER):
        made = [await requests.create(DRAFT) for _ in range(3)]
        for csr in made:
            known.add(csr)
        waits = [asyncio.create_task(known.wait(csr.name, 10)) for csr in made]
        signed, denied, gone = made
        await requests.decide(signed, GRANTED)
        await requests.set_certificate(signed, b"chain")
        await requests.decide(denied, REFUSED)
        await requests.delete(gone)
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert getattr(results[0], "certificate", None) == b"chain"
        assert getattr(results[1], "refusal", None) == REFUSED
        assert isinstance(results[2], KeyError)
        assert await known.wait("never-made", 0.01) is None
        queries = server.csrs.collection.queries
        assert {query["fieldSelector"] for query in queries} == {f"spec.signerName={CERTMOUNT_SIGNER}"}
        assert len([query for query in queries if "watch" in query]) == 1
        known.forget(signed.name)
        assert known.find(signed.name) is None
    async with followed(requests, CSRCache(), labels="certmount.dev/issuer=own"):
        assert server.csrs.collection.queries[-1]["labelSelector"] == "certmount.dev/issuer=own"


def item(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "x", "uid": "u"}, "spec": spec}


def test_what_a_requester_writes_is_read_whatever_it_is() -> None:
    """Nobody can stop the watch by a request of strange content."""
    csr = read_csr(
        item(request=base64.b64encode(b"\x00\xff").decode(), signerName="", usages=None, expirationSeconds=600)
    )
    assert (csr.request, csr.usages, csr.expiration_s, csr.created_at) == (b"\x00\xff", (), 600, 0.0)


@pytest.mark.parametrize(
    "broken",
    [
        {"spec": 1},
        {"spec": {"usages": "x"}},
        {"spec": {"request": "!"}},
        {"status": []},
        {"status": {"conditions": [1]}},
    ],
)
def test_what_the_api_server_never_sends_is_told(broken: dict[str, Any]) -> None:
    """So that the reflector lists again."""
    with pytest.raises(InvalidObject):
        read_csr({**item(), **broken})


async def test_a_list_keeps_what_someone_waits_for() -> None:
    """It may have been made after the list was; the rest is gone."""
    known = CSRCache()
    known.put(item())
    waiting = asyncio.create_task(known.wait("x", 10))
    await asyncio.sleep(0)
    known.retain({"other"})
    assert known.find("x")
    waiting.cancel()
    await asyncio.wait([waiting])
    known.retain({"other"})
    assert known.find("x") is None
    assert len(known) == 0


async def test_the_own_account_is_asked_for(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """By it the authority knows its own requests."""
    path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    server.documents[path] = {"status": {"userInfo": {"username": ACCOUNT}}}
    assert await requests.own_username() == ACCOUNT
    server.documents[path] = {"status": {}}
    with pytest.raises(CertmountError, match="is strange"):
        await requests.own_username()


async def test_permissions_are_asked_for_with_their_subresource(
    server: FakeApiServer, requests: KubernetesCSRClient
) -> None:
    """``certificatesigningrequests/approval`` is a resource and a subresource to the API server."""
    assert await requests.is_permitted("update", "certificatesigningrequests/approval")
    assert await requests.is_permitted("approve", "signers", "example.com/pods")
    asked = [body["spec"]["resourceAttributes"] for _, _, body in server.requests if body]
    assert asked[0]["subresource"] == "approval"
    assert asked[1] == {
        "verb": "approve",
        "group": "certificates.k8s.io",
        "resource": "signers",
        "name": "example.com/pods",
    }


def lease_object(server: FakeApiServer) -> Any:
    return server.objects[LEASE_PATH]


async def test_a_lease_changes_hands_once(server: FakeApiServer, api: client.ApiClient) -> None:
    """Who writes on an old state gets nothing; a new holder is counted."""
    server.objects[LEASE_PATH] = {"metadata": {"name": "certmount-csr-signer", "resourceVersion": "7"}}
    store = LeaseClient(api, ObjectName("Lease", "certmount", "certmount-csr-signer"))
    found = await store.load()
    assert found == Lease("", 0, "7")
    assert await store.save(Lease("one", 30, found.version))
    assert not await store.save(Lease("other", 30, found.version))
    assert (await store.load()).holder == "one"
    spec = lease_object(server)["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 30, 1)
    assert await store.save(Lease("one", 30, (await store.load()).version))
    assert lease_object(server)["spec"]["leaseTransitions"] == 1
    server.before_put = [LEASE_PATH]
    assert not await store.save(Lease("one", 30, (await store.load()).version))


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"metadata": {"resourceVersion": "1"}, "spec": 1}'])
async def test_a_strange_lease_is_told(answer: bytes, server: FakeApiServer, api: client.ApiClient) -> None:
    """And is no defect."""
    server.fail = (200, answer)
    with pytest.raises(CertmountError, match="is strange"):
        await LeaseClient(api, ObjectName("Lease", "certmount", "x")).load()


async def test_a_pod_is_read_as_it_is(server: FakeApiServer, api: client.ApiClient) -> None:
    """Its uid, account and node, and whether it ends; none where there is none."""
    pods = PodClient(api)
    assert await pods.find("web", "hello-0") is None
    spec, status = {"serviceAccountName": "hello", "nodeName": "node-a"}, {"phase": "Running"}
    server.objects[POD_PATH] = {"metadata": {"uid": "u"}, "spec": spec, "status": status}
    assert await pods.find("web", "hello-0") == LivePod("u", "hello", "node-a", terminating=False)
    server.objects[POD_PATH]["metadata"]["deletionTimestamp"] = "2026-11-22T10:00:00Z"
    found = await pods.find("web", "hello-0")
    assert found is not None
    assert found.terminating
    server.objects[POD_PATH] = {"metadata": {"uid": "u"}, "spec": spec, "status": {"phase": "Succeeded"}}
    ended = await pods.find("web", "hello-0")
    assert ended is not None
    assert ended.terminating
    server.objects[POD_PATH] = {"metadata": {}}
    with pytest.raises(CertmountError) as failure:
        await pods.find("web", "hello-0")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


@pytest.mark.parametrize("text", ["example.com/signer", "certmount.dev/pod", "a.b-c.d/E.f_g:h"])
def test_names_of_signers_are_taken(text: str) -> None:
    """A domain and a path."""
    assert parse_signer(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "example.com",
        "example.com/",
        "/x",
        "kubernetes.io/legacy-unknown",
        "a.kubernetes.io/b",
        "com/x",
        "a.com/b/c",
    ],
)
def test_what_is_no_signer_for_pods_is_refused(text: str) -> None:
    """Kubernetes' own among them."""
    with pytest.raises(ValueError, match="signer"):
        parse_signer(text)
