"""The signer of PodCertificateRequests and its trust bundles, at a real API server that validates what it writes."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from csi_driver.authority.server import AuthorityServer
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import generate_key, public_bytes
from csi_driver.core.spec import KeyType
from tests.integration.authority.pod_certificates import (
    KEY,
    OPEN_SIGNER,
    Cluster,
    chain_of,
    condition,
    running_authority,
    spec_of,
)
from tests.support.api_objects import field
from tests.support.kubernetes_api import Rejected, running_api
from tests.support.requirements import require_kubernetes

VERSION = "1.37.2"
BUNDLE = "/apis/certificates.k8s.io/v1/clustertrustbundles/certmount.dev:pod:internal"
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    binaries, directory = require_kubernetes(VERSION), tmp_path_factory.mktemp("api")
    with running_api(binaries, directory) as api:
        cluster = Cluster(api)
        (directory / "overlay").mkdir()
        cluster.install(directory / "overlay")
        yield cluster


@pytest.fixture
async def authority(cluster: Cluster, tmp_path: Path) -> AsyncIterator[AuthorityServer]:
    async with running_authority(cluster, tmp_path) as server:
        yield server


async def run(call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Call a function that blocks, in a thread, because the authority runs in this event loop."""
    return await asyncio.to_thread(call, *arguments, **options)


def time_of(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


@pytest.mark.usefixtures("authority")
@pytest.mark.parametrize(
    "key_type", [kind for kind in KeyType if kind is not KeyType.RSA_2048 and "ML-DSA" not in kind.value]
)
async def test_pod_gets_a_certificate_that_the_trust_bundle_verifies(cluster: Cluster, key_type: KeyType) -> None:
    key = generate_key(key_type)
    pod = await run(cluster.create_pod, f"keys-{key_type.value.lower()}")
    annotations = {
        "certmount.dev/dns-names": "${POD_NAME}.example.com, www.example.com",
        "certmount.dev/usages": "server",
    }
    path = await run(cluster.request, pod, key=key, annotations=annotations)
    status = await run(cluster.finished, path)
    assert condition(status)[:2] == ("Issued", "PolicyAllows")
    leaf, intermediate = chain_of(status)
    assert public_bytes(leaf.public_key()) == public_bytes(key.public_key())  # type: ignore[arg-type]
    expected = {f"{pod.name}.example.com", "www.example.com", "spiffe://cluster.local/ns/web/sa/edge"}
    assert {str(name) for name in names_of(leaf.extensions)} == expected
    assert (time_of(status["notBefore"]), time_of(status["notAfter"])) == (
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    assert lifetime == timedelta(days=1)
    refresh = (time_of(status["beginRefreshAt"]) - leaf.not_valid_before_utc) / lifetime
    assert 0.6 < refresh < 0.75
    roots = x509.load_pem_x509_certificates(
        (await run(cluster.api.call, "GET", BUNDLE))["spec"]["trustBundle"].encode()
    )
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(roots[0])


@pytest.mark.usefixtures("authority")
async def test_pod_without_annotations_gets_the_names_of_its_services(cluster: Cluster) -> None:
    pod = await run(cluster.create_pod, "shop")
    service = {"metadata": {"name": "shop"}, "spec": {"selector": {"app": "shop"}, "ports": [{"port": 443}]}}
    await run(cluster.api.call, "POST", "/api/v1/namespaces/web/services", service)
    await asyncio.sleep(1)  # the watch of Services has no event that a test can wait for
    leaf, _ = chain_of(await run(cluster.finished, await run(cluster.request, pod)))
    assert {str(name) for name in names_of(leaf.extensions)} >= {"shop.web.svc", "shop.web.svc.cluster.local"}


@pytest.mark.usefixtures("authority")
@pytest.mark.parametrize("seconds, expected", [(3600, 3600), (7200, 7200), (90 * 86_400, 86_460)])
async def test_lifetime_is_within_the_limits_of_the_api(cluster: Cluster, seconds: int, expected: int) -> None:
    pod = await run(cluster.create_pod, f"limits-{seconds}")
    status = await run(cluster.finished, await run(cluster.request, pod, seconds=seconds))
    assert (time_of(status["notAfter"]) - time_of(status["notBefore"])).total_seconds() == expected


@pytest.mark.usefixtures("authority")
@pytest.mark.parametrize(
    "name, account, annotations, reason, message",
    [
        (
            "name", "edge", {"certmount.dev/name": "shop.example.org"}, "NameNotAllowed",
            ("shop.example.org: no policy rule allows this name for service account web/edge; ask an administrator to add a "
            "rule to the policy"),
        ),
        (
            "unknown", "edge", {"certmount.dev/dns": "a.example.com"}, "InvalidUnverifiedUserAnnotations",
            "userAnnotations.certmount.dev/dns: is unknown; use dns-names",
        ),
        (
            "foreign", "edge", {"example.org/names": "a.example.com"}, "InvalidUnverifiedUserAnnotations",
            "userAnnotations.example.org/names: is unknown; did you mean certmount.dev/name?",
        ),
        (
            "volume", "edge", {"certmount.dev/issuer": "corporate"}, "InvalidUnverifiedUserAnnotations",
            "userAnnotations.certmount.dev/issuer: is for CSI volumes only; set signerName in the projection",
        ),
        (
            "invalid", "edge", {"certmount.dev/dns-names": "a b"}, "InvalidUnverifiedUserAnnotations",
            "userAnnotations.certmount.dev/dns-names: 'a b' ",
        ),
        (
            "short", "edge", {"certmount.dev/duration": "10m"}, "InvalidUnverifiedUserAnnotations",
            ("userAnnotations.certmount.dev/duration: 10m is shorter than Kubernetes allows for pod certificates; use at "
            "least 1h, or a CSI volume"),
        ),
        (
            "long", "edge", {"certmount.dev/duration": "48h"}, "InvalidUnverifiedUserAnnotations",
            ("userAnnotations.certmount.dev/duration: 48h is longer than the 24h of maxExpirationSeconds; use at most 24h, or "
            "set maxExpirationSeconds"),
        ),
        (
            "rule", "short", {"certmount.dev/name": "short.example.com"}, "NameNotAllowed",
            "maxExpirationSeconds: policy[1] (line 5), built-in allow at most 10m, and pod certificates need at least 1h; use a CSI volume",
        ),
    ],
)  # fmt: skip
async def test_denial_has_the_fix_in_the_condition_and_in_an_event(
    cluster: Cluster, name: str, account: str, annotations: dict[str, str], reason: str, message: str
) -> None:
    pod = await run(cluster.create_pod, f"denied-{name}", account)
    status = await run(cluster.finished, await run(cluster.request, pod, annotations=annotations))
    kind, found_reason, text = condition(status)
    assert (kind, found_reason) == ("Denied", reason)
    assert text.startswith(message)
    ((found_reason, note),) = await run(cluster.wait_for_events, pod)
    assert (found_reason in ("NameNotAllowed", "InvalidAttributes"), text[:500] in note) == (True, True)


@pytest.mark.usefixtures("authority")
async def test_annotations_of_256_kib_are_denied(cluster: Cluster) -> None:
    pod = await run(cluster.create_pod, "large")
    for large in (
        {"certmount.dev/dns-names": "a" * (255 * 1024)},
        {f"certmount.dev/{number}": "a" * 100 for number in range(2000)},
    ):
        status = await run(cluster.finished, await run(cluster.request, pod, annotations=large))
        text = "userAnnotations: are too large; use at most 64 annotations and 64 KiB"
        assert condition(status) == ("Denied", "InvalidUnverifiedUserAnnotations", text)


@pytest.mark.usefixtures("authority")
async def test_csr_with_contents_is_denied(cluster: Cluster) -> None:
    pod = await run(cluster.create_pod, "contents")
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters")])
    )
    csr = builder.sign(KEY, SHA256()).public_bytes(Encoding.DER)
    status = await run(cluster.finished, await run(cluster.request, pod, csr=csr))
    assert condition(status)[:2] == ("Denied", "InvalidCSR")


async def test_forged_request_of_a_user_is_rejected_by_the_admission_policy(cluster: Cluster) -> None:
    """The user may create requests. Nodes may too, but only for their own pods."""
    pod = await run(cluster.create_pod, "forged")
    with pytest.raises(Rejected, match="only the kubelet of the pod's node can create requests for certmount's signer"):
        await run(cluster.request, pod, token="jane")
    with pytest.raises(Rejected, match="which is not the requesting node"):
        await run(cluster.request, pod, token="node-b")
    assert await run(cluster.request, pod)


@pytest.mark.usefixtures("authority")
@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "uid",
            {"podUID": "00000000-0000-0000-0000-000000000000"},
            "has another UID: it was created again, or the request is",
        ),
        ("account", {"serviceAccountName": "admin"}, "runs as service account edge, not admin"),
        ("node", {"nodeName": "node-b"}, "is on node node-a, not node-b"),
    ],
)
async def test_forged_request_that_does_not_describe_the_pod_is_denied(
    cluster: Cluster, name: str, changes: dict[str, str], message: str
) -> None:
    """The admission policy does not cover this signer name. No event: the pod has nothing to do with the request."""
    pod = await run(cluster.create_pod, f"forged-{name}")
    path = await run(cluster.request, pod, token="jane", signer=OPEN_SIGNER, **changes)
    kind, reason, text = condition(await run(cluster.finished, path))
    assert (kind, reason) == ("Denied", "InvalidRequest")
    assert text.startswith(f"pod web/forged-{name}: {message}")
    assert await run(cluster.events, pod) == []


@pytest.mark.usefixtures("authority")
async def test_forged_request_for_a_pod_of_another_namespace_is_never_issued(cluster: Cluster) -> None:
    victim = await run(cluster.create_pod, "victim", "vault", "bank")
    await run(cluster.account, "web", "vault")
    path = await run(cluster.request, replace(victim, namespace="web"), token="jane", signer=OPEN_SIGNER)
    pod = await run(cluster.create_pod, "after-victim", signer=OPEN_SIGNER)
    await run(cluster.finished, await run(cluster.request, pod, signer=OPEN_SIGNER))
    assert "conditions" not in await run(cluster.status, path)


@pytest.mark.usefixtures("authority")
async def test_request_of_a_deleted_pod_is_dropped(cluster: Cluster) -> None:
    gone, pod = await run(cluster.create_pod, "gone"), await run(cluster.create_pod, "stays")
    await run(cluster.delete_pod, gone)
    path = await run(cluster.request, gone, token="jane", signer=OPEN_SIGNER)
    await run(cluster.finished, await run(cluster.request, pod))
    assert "conditions" not in await run(cluster.status, path)


@pytest.mark.usefixtures("authority")
async def test_request_for_another_signer_is_not_touched_and_could_not_be(cluster: Cluster) -> None:
    pod = await run(cluster.create_pod, "other-signer", signer="example.org/other")
    path = await run(cluster.request, pod, signer="example.org/other")
    mine = await run(cluster.create_pod, "own-signer")
    await run(cluster.finished, await run(cluster.request, mine))
    item = await run(cluster.api.call, "GET", path)
    assert "conditions" not in item.get("status", {})
    denied = {"type": "Denied", "status": "True", "reason": "X", "lastTransitionTime": "2026-11-26T00:00:00Z"}
    item["status"] = {"conditions": [denied]}
    token = await run(cluster.api.service_account_token, "certmount", "certmount-authority")
    with pytest.raises(Rejected, match=r'is not permitted to "sign" for signer "example\.org/other"'):
        await run(cluster.api.call, "PUT", f"{path}/status", item, token)


@pytest.mark.usefixtures("authority")
async def test_texts_that_are_not_utf8_do_not_stop_the_watch(cluster: Cluster) -> None:
    """The API server does not verify the strings of a request in protobuf, and would deliver them to every watch."""
    pod = await run(cluster.create_pod, "binary", signer=OPEN_SIGNER)
    spec = spec_of(pod, signer=OPEN_SIGNER)
    csr = base64.b64decode(spec.pop("stubPKCS10Request"))
    numbers = {
        "signerName": 1, "podName": 2, "podUID": 3, "serviceAccountName": 4, "serviceAccountUID": 5, "nodeName": 6,
        "nodeUID": 7,
    }  # fmt: skip
    fields = {**spec, "podUID": b"\xff\xfe"}
    encoded = b"".join(
        field(numbers[name], one if isinstance(one, bytes) else one.encode()) for name, one in fields.items()
    )
    annotation = field(1, b"certmount.dev/name") + field(2, b"\xff.example.com")
    body = field(1, field(2, b"binary-")) + field(2, encoded + field(11, annotation) + field(12, csr))
    unknown = field(1, field(1, b"certificates.k8s.io/v1") + field(2, b"PodCertificateRequest")) + field(2, body)
    created = await run(
        cluster.api.call, "POST", cluster.path("web"), b"k8s\0" + unknown, "jane", "application/vnd.kubernetes.protobuf"
    )
    path = f"{cluster.path('web')}/{created['metadata']['name']}"
    assert condition(await run(cluster.finished, path))[:2] == ("Denied", "InvalidRequest")
    assert condition(await run(cluster.finished, await run(cluster.request, pod, signer=OPEN_SIGNER)))[0] == "Issued"


async def test_restarted_signer_finishes_each_request_once(cluster: Cluster, tmp_path: Path) -> None:
    pod = await run(cluster.create_pod, "restart")
    paths = [await run(cluster.request, pod) for _ in range(20)]
    async with running_authority(cluster, tmp_path):
        await run(cluster.finished, paths[0])
    async with running_authority(cluster, tmp_path):
        finished = [await run(cluster.finished, path) for path in paths]
        assert {condition(status)[0] for status in finished} == {"Issued"}
    async with running_authority(cluster, tmp_path):
        another = await run(cluster.request, pod)
        await run(cluster.finished, another)
    assert [await run(cluster.status, path) for path in paths] == finished


async def test_flood_of_one_namespace_does_not_delay_others(cluster: Cluster, tmp_path: Path) -> None:
    """All requests wait when the signer starts; the quiet tenant created its request last."""
    flood = await run(cluster.create_pod, "flood", "flood", "flood", signer=OPEN_SIGNER)
    pod = await run(cluster.create_pod, "quiet", "calm", "bank")

    def create(count: int) -> list[str]:
        return [cluster.request(flood, token="jane", signer=OPEN_SIGNER) for _ in range(count)]

    paths = [path for part in await asyncio.gather(*(run(create, 125) for _ in range(4))) for path in part]
    path = await run(cluster.request, pod)
    async with running_authority(cluster, tmp_path):
        started = time.monotonic()
        await run(cluster.finished, path)
        waited = time.monotonic() - started
        items = (await run(cluster.api.call, "GET", cluster.path("flood")))["items"]
        pending = sum("conditions" not in item.get("status", {}) for item in items)
        print(f"the quiet tenant waited {waited:.2f} s; {pending} of {len(paths)} requests of the flood were pending")
        assert pending > len(paths) / 2
        await asyncio.gather(*(run(cluster.finished, path, 60) for path in paths))
        print(f"all requests were finished after {time.monotonic() - started:.1f} s")
