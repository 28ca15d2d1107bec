"""CertificateSigningRequests, leases and pods, at an API server with real conflicts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from csi_driver.core.cluster.csr import (
    APPROVED,
    CERTMOUNT_SIGNER,
    DENIED,
    FAILED,
    ClusterCSR,
    CSRCondition,
    CSRDraft,
    parse_signer,
)
from csi_driver.core.cluster.objects import Lease, LivePod
from csi_driver.core.errors import CertmountError
from csi_driver.kube.client import ObjectName
from csi_driver.kube.connection import Api
from csi_driver.kube.csr.cache import CSRCache
from csi_driver.kube.csr.client import KubernetesCSRClient
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.objects import read_csr
from csi_driver.kube.stored_objects import LeaseClient
from csi_driver.kube.uncached_reads import PodClient
from tests.support.api_objects import csr_of, encode, field
from tests.support.waiting import in_background
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
def requests(api: Api) -> KubernetesCSRClient:
    return KubernetesCSRClient(api, api)


@contextlib.asynccontextmanager
async def watched(requests: KubernetesCSRClient, sink: CSRCache, **selection: str) -> AsyncIterator[None]:
    reflector = requests.watch(sink, **selection)
    async with in_background(reflector.run()):
        await asyncio.wait_for(sink.listed.wait(), 20)
        yield


async def test_create_sends_the_draft(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
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
    written = [path.rpartition("/")[2] for method, path, _ in server.requests if method == "PUT"]
    assert written == ["approval", "status"] * 2


async def test_delete_removes_only_the_same_request(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
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
    csr = csr_of(item(request="AP8=", signerName="", usages=None, expirationSeconds=600))
    assert (csr.request, csr.usages, csr.expiration_s, csr.created_at) == (b"\x00\xff", (), 600, 0.0)


def test_read_csr_keeps_little_of_a_large_object() -> None:
    extra = {f"authentication.kubernetes.io/{number}": ["x" * 5000] * 100 for number in range(1000)}
    mebibyte = base64.b64encode(bytes(2**20)).decode()
    large = item(request=mebibyte, usages=["client auth"] * 1000, extra={"other": ["x"], **extra})
    condition = {"type": DENIED, "reason": "x" * 10_000, "message": "é" * 10_000}
    status = {"conditions": [condition] * 100, "certificate": mebibyte}
    csr = csr_of({**large, "status": status})
    assert (len(csr.request), len(csr.usages), len(csr.certificate), len(csr.conditions)) == (131072, 32, 131072, 32)
    assert (len(csr.extra), {len(values) for values in csr.extra.values()}, "other" in csr.extra) == (127, {32}, False)
    assert len(str(csr.conditions[0])) == 1024 + 2 + 512


def test_condition_with_invalid_text_is_readable() -> None:
    condition = field(1, b"Denied") + field(2, b"\xff")
    assert read_csr(encode(item()) + field(3, field(1, condition))).rejection == CSRCondition(DENIED, "\ufffd", "")


@pytest.mark.parametrize("data", [b"", b"\xff", field(1, b"\xff"), encode({"metadata": {"name": "x"}})])
def test_read_csr_rejects_an_invalid_object(data: bytes) -> None:
    with pytest.raises(InvalidObject):
        read_csr(data)


async def test_list_keeps_requests_with_waiters() -> None:
    """They can be newer than the list."""
    known = CSRCache()
    known.put(csr_of(item()))
    waiting = asyncio.create_task(known.wait("x", 10))
    await asyncio.sleep(0)
    known.retain({"other"})
    assert known.find("x")
    waiting.cancel()
    await asyncio.wait([waiting])
    known.retain({"other"})
    assert known.find("x") is None
    assert len(known) == 0


async def test_requests_of_one_requester_have_a_share() -> None:
    changed: list[str] = []
    known = CSRCache(lambda csr: changed.append(f"{csr.username} {csr.name}"), keep_finished=False, capacity=20_000)

    def request(name: str, username: str, **status: Any) -> ClusterCSR:
        return csr_of({"metadata": {"name": name, "uid": name}, "spec": {"username": username}, "status": status})

    assert [known.put(request(str(number), "greedy")) for number in range(4)] == ["0", "1", "2", None]
    text = str(known.shares.refusal("requester greedy"))
    problem = "holds 7962 of 20000 bytes of CertificateSigningRequests and requests 2654 more, which exceeds its share"
    assert text == f"ShareExceeded: requester greedy: {problem}; wait until some of them end"
    assert known.put(request("other", "modest")) == "other"
    known.put(request("1", "greedy", certificate=base64.b64encode(b"PEM").decode()))
    assert (known.find("1"), known.shares.has_room) == (None, True)
    assert known.put(request("3", "greedy")) == "3"
    assert changed == ["greedy 0", "greedy 1", "greedy 2", "modest other", "greedy 1", "greedy 3"]
    known.retain(set())
    assert known.shares._shares.total == 0


async def test_service_accounts_of_a_namespace_share_what_their_requests_use() -> None:
    known = CSRCache(capacity=100_000)

    def put(name: str, username: str) -> bool:
        csr = csr_of({"metadata": {"name": name, "uid": name}, "spec": {"username": username}})
        return known.put(csr) is not None

    names = [f"flood-{number}" for number in range(100)]
    stored = [name for name in names if put(name, f"system:serviceaccount:flood:{name}")]
    assert 10 < len(stored) < 25, "about half"
    assert str(known.shares.refusal("namespace flood")).startswith("ShareExceeded: namespace flood: holds ")
    victims = [f"victim-{number}" for number in range(5)]
    assert [name for name in victims if put(name, "system:serviceaccount:victim:shop")] == victims
    for username in ("system:serviceaccount:flood", "system:node:flood", "flood:x"):
        assert put(username, username), "no other requester uses the share of the namespace"


async def test_own_username_comes_from_a_self_review(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    server.documents[path] = {"status": {"userInfo": {"username": ACCOUNT}}}
    assert await requests.own_username() == ACCOUNT
    server.documents[path] = {"status": {}}
    with pytest.raises(CertmountError, match="sent an invalid response"):
        await requests.own_username()


async def test_permission_review_separates_subresources(server: FakeApiServer, requests: KubernetesCSRClient) -> None:
    assert await requests.is_permitted("update", "certificatesigningrequests/approval")
    assert await requests.is_permitted("approve", "signers", "example.com/pods")
    reviewed = [body["spec"]["resourceAttributes"] for _, _, body in server.requests if body]
    assert reviewed[0]["subresource"] == "approval"
    signer = {"group": "certificates.k8s.io", "resource": "signers", "name": "example.com/pods"}
    assert reviewed[1] == {"verb": "approve", **signer}


async def test_lease_save_fails_for_an_old_version(server: FakeApiServer, api: Api) -> None:
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
async def test_invalid_lease_is_an_error(answer: bytes, server: FakeApiServer, api: Api) -> None:
    server.fail = (200, answer)
    with pytest.raises(CertmountError, match="sent an invalid response"):
        await LeaseClient(api, ObjectName("Lease", "certmount", "x")).load()


async def test_pod_client_reads_uid_account_node_and_phase(server: FakeApiServer, api: Api) -> None:
    pods = PodClient(api)
    assert await pods.find("web", "hello-0") is None
    spec, status = {"serviceAccountName": "hello", "nodeName": "node-a"}, {"phase": "Running"}
    spec |= {"hostname": "hello-0", "subdomain": "hello"}
    metadata = {"name": "hello-0", "uid": "u"}
    server.objects[POD_PATH] = {"metadata": {**metadata}, "spec": spec, "status": status}
    assert await pods.find("web", "hello-0") == LivePod("u", "hello", "node-a", False, "hello-0", "hello")
    server.objects[POD_PATH]["metadata"]["deletionTimestamp"] = "2026-11-22T10:00:00Z"
    assert getattr(await pods.find("web", "hello-0"), "terminating", None)
    server.objects[POD_PATH] = {"metadata": metadata, "spec": spec, "status": {"phase": "Succeeded"}}
    assert getattr(await pods.find("web", "hello-0"), "terminating", None)
    server.objects[POD_PATH] = {"metadata": {}}
    with pytest.raises(CertmountError, match=r"^TokenReviewUnavailable: "):
        await pods.find("web", "hello-0")


@pytest.mark.parametrize("text", ["example.com/signer", "certmount.dev/pod", "a.b-c.d/E.f_g:h"])
def test_parse_signer_accepts_domain_and_path(text: str) -> None:
    assert parse_signer(text) == text


@pytest.mark.parametrize(
    "text", ["", "x", "example.com", "example.com/", "/x", "kubernetes.io/x", "a.kubernetes.io/b", "com/x", "a.com/b/c"]
)
def test_parse_signer_rejects_other_names_and_those_of_kubernetes(text: str) -> None:
    with pytest.raises(ValueError, match="signer"):
        parse_signer(text)
