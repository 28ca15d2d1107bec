"""CertificateSigningRequests, leases and pods, at an API server with real conflicts."""

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
ALLOWED = CSRCondition(APPROVED, "PolicyAllows", "by built-in")
REJECTED = CSRCondition(DENIED, "NameNotAllowed", "a.test: no rule allows it")
LEASE_PATH = "/apis/coordination.k8s.io/v1/namespaces/certmount/leases/certmount-csr-signer"
POD_PATH = "/api/v1/namespaces/web/pods/hello-0"


@pytest.fixture
def requests(api: client.ApiClient) -> KubernetesCSRClient:
    return KubernetesCSRClient(api, api)


@contextlib.asynccontextmanager
async def watched(requests: KubernetesCSRClient, sink: CSRCache, **selection: str) -> AsyncIterator[None]:
    reflector = requests.watch(sink, **selection)
    task = asyncio.create_task(reflector.run())
    try:
        await asyncio.wait_for(sink.listed.wait(), 20)
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_create_sends_the_draft(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """The API server generates the name and records the requester."""
    csr = await requests.create(DRAFT)
    created = server.csrs.object(csr.name)
    assert created["metadata"]["labels"] == {"a": "b"}
    assert created["metadata"]["annotations"] == {"note": "web/hello-0"}
    assert (created["spec"]["signerName"], created["spec"]["expirationSeconds"]) == ("example.com/pods", 3600)
    assert base64.b64decode(created["spec"]["request"]) == b"PEM" == csr.request
    assert (csr.username, csr.created_at, csr.finished) == (ACCOUNT, 1795341600.0, False)


@pytest.mark.parametrize("condition", [ALLOWED, REJECTED], ids=lambda condition: condition.kind)
async def test_decision_has_reason_message_and_time(
    condition: CSRCondition, server: FakeApiServer, requests: KubernetesCSRClient
) -> None:
    """A conflict with another client's change is retried."""
    csr = await requests.create(DRAFT)
    server.csrs.conflicts = 1
    decided = await requests.decide(csr, condition)
    assert decided.condition(condition.kind) == condition
    (written,) = server.csrs.object(csr.name)["status"]["conditions"]
    assert (written["status"], written["lastUpdateTime"][-1]) == ("True", "Z")
    assert server.requests[-1][1].endswith(f"/{csr.name}/approval")


async def test_existing_decision_is_kept(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    csr = await requests.create(DRAFT)
    server.csrs.change(csr.name, conditions=[{"type": DENIED, "reason": "ByHand", "message": ""}])
    assert (await requests.decide(csr, ALLOWED)).rejection == CSRCondition(DENIED, "ByHand", "")
    assert not (await requests.set_certificate(csr, b"chain")).certificate
    other = await requests.create(DRAFT)
    server.csrs.change(other.name, certificate=base64.b64encode(b"first").decode())
    assert (await requests.set_certificate(other, b"second")).certificate == b"first"
    assert (await requests.fail(other, CSRCondition(FAILED, "x", "y"))).rejection is None
    assert not [path for method, path, _ in server.requests if method == "PUT"]


async def test_certificate_and_failure_keep_the_approval(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    csr, other = await requests.create(DRAFT), await requests.create(DRAFT)
    await requests.decide(csr, ALLOWED)
    assert (await requests.set_certificate(csr, b"chain")).certificate == b"chain"
    await requests.decide(other, ALLOWED)
    failed = await requests.fail(other, CSRCondition(FAILED, "NameNotAllowed", "x"))
    assert [condition.kind for condition in failed.conditions] == [APPROVED, FAILED]
    assert [path.rpartition("/")[2] for method, path, _ in server.requests if method == "PUT"] == [
        "approval",
        "status",
    ] * 2


async def test_delete_removes_only_the_same_request(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """Not a later request with the same name; a deleted request is no failure."""
    csr = await requests.create(DRAFT)
    server.csrs.object(csr.name)["metadata"]["uid"] = "another"
    await requests.delete(csr)
    assert server.csrs.object(csr.name)
    with pytest.raises(CertmountError, match="another request has its name"):
        await requests.decide(csr, ALLOWED)
    other = await requests.create(DRAFT)
    await requests.delete(other)
    await requests.delete(other)
    assert list(server.csrs.collection.objects) == [f"/{csr.name}"]


async def test_one_watch_ends_all_waits(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    """For a signed, a denied and a deleted request; the watch has a selector."""
    known = CSRCache()
    async with watched(requests, known, signer=CERTMOUNT_SIGNER):
        created = [await requests.create(DRAFT) for _ in range(3)]
        for csr in created:
            known.add(csr)
        waits = [asyncio.create_task(known.wait(csr.name, 10)) for csr in created]
        signed, denied, deleted = created
        await requests.decide(signed, ALLOWED)
        await requests.set_certificate(signed, b"chain")
        await requests.decide(denied, REJECTED)
        await requests.delete(deleted)
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert getattr(results[0], "certificate", None) == b"chain"
        assert getattr(results[1], "rejection", None) == REJECTED
        assert isinstance(results[2], KeyError)
        assert await known.wait("unknown", 0.01) is None
        queries = server.csrs.collection.queries
        assert {query["fieldSelector"] for query in queries} == {f"spec.signerName={CERTMOUNT_SIGNER}"}
        assert len([query for query in queries if "watch" in query]) == 1
        known.forget(signed.name)
        assert known.find(signed.name) is None
    async with watched(requests, CSRCache(), labels="certmount.dev/issuer=own"):
        assert server.csrs.collection.queries[-1]["labelSelector"] == "certmount.dev/issuer=own"


def item(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "x", "uid": "u"}, "spec": spec}


def test_read_csr_accepts_any_value_of_a_requester() -> None:
    """No requester can stop the watch."""
    csr = read_csr(
        item(request=base64.b64encode(b"\x00\xff").decode(), signerName="", usages=None, expirationSeconds=600)
    )
    assert (csr.request, csr.usages, csr.expiration_s, csr.created_at) == (b"\x00\xff", (), 600, 0.0)


@pytest.mark.parametrize(
    "invalid",
    [
        {"spec": 1},
        {"spec": {"usages": "x"}},
        {"spec": {"request": "!"}},
        {"status": []},
        {"status": {"conditions": [1]}},
    ],
)
def test_read_csr_rejects_an_invalid_object(invalid: dict[str, Any]) -> None:
    with pytest.raises(InvalidObject):
        read_csr({**item(), **invalid})


async def test_list_keeps_requests_with_waiters() -> None:
    """They can be newer than the list."""
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


async def test_own_username_comes_from_a_self_review(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    server.documents[path] = {"status": {"userInfo": {"username": ACCOUNT}}}
    assert await requests.own_username() == ACCOUNT
    server.documents[path] = {"status": {}}
    with pytest.raises(CertmountError, match="sent an invalid response"):
        await requests.own_username()


async def test_permission_review_separates_the_subresource(
    server: FakeApiServer, requests: KubernetesCSRClient
) -> None:
    assert await requests.is_permitted("update", "certificatesigningrequests/approval")
    assert await requests.is_permitted("approve", "signers", "example.com/pods")
    reviewed = [body["spec"]["resourceAttributes"] for _, _, body in server.requests if body]
    assert reviewed[0]["subresource"] == "approval"
    assert reviewed[1] == {
        "verb": "approve",
        "group": "certificates.k8s.io",
        "resource": "signers",
        "name": "example.com/pods",
    }


async def test_lease_save_fails_for_an_old_version(server: FakeApiServer, api: client.ApiClient) -> None:
    """Only a new holder increases leaseTransitions."""
    server.objects[LEASE_PATH] = {"metadata": {"name": "certmount-csr-signer", "resourceVersion": "7"}}
    store = LeaseClient(api, ObjectName("Lease", "certmount", "certmount-csr-signer"))
    found = await store.load()
    assert found == Lease("", 0, "7")
    assert await store.save(Lease("one", 30, found.version))
    assert not await store.save(Lease("other", 30, found.version))
    assert (await store.load()).holder == "one"
    spec = server.objects[LEASE_PATH]["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 30, 1)
    assert await store.save(Lease("one", 30, (await store.load()).version))
    assert server.objects[LEASE_PATH]["spec"]["leaseTransitions"] == 1
    server.before_put = [LEASE_PATH]
    assert not await store.save(Lease("one", 30, (await store.load()).version))


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"metadata": {"resourceVersion": "1"}, "spec": 1}'])
async def test_invalid_lease_is_an_error(answer: bytes, server: FakeApiServer, api: client.ApiClient) -> None:
    server.fail = (200, answer)
    with pytest.raises(CertmountError, match="sent an invalid response"):
        await LeaseClient(api, ObjectName("Lease", "certmount", "x")).load()


async def test_pod_client_reads_uid_account_node_and_phase(server: FakeApiServer, api: client.ApiClient) -> None:
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
    finished = await pods.find("web", "hello-0")
    assert finished is not None
    assert finished.terminating
    server.objects[POD_PATH] = {"metadata": {}}
    with pytest.raises(CertmountError) as failure:
        await pods.find("web", "hello-0")
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


@pytest.mark.parametrize("text", ["example.com/signer", "certmount.dev/pod", "a.b-c.d/E.f_g:h"])
def test_parse_signer_accepts_domain_and_path(text: str) -> None:
    assert parse_signer(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "x", "example.com", "example.com/", "/x", "kubernetes.io/x", "a.kubernetes.io/b", "com/x", "a.com/b/c"],
)
def test_parse_signer_rejects_other_names_and_those_of_kubernetes(text: str) -> None:
    with pytest.raises(ValueError, match="signer"):
        parse_signer(text)
