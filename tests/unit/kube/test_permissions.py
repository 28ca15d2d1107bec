"""The permissions that the authority needs are exactly those of the manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER
from csi_driver.core.errors import CertmountError
from csi_driver.kube.client import ObjectName
from csi_driver.kube.connection import Api
from csi_driver.kube.permissions import (
    Permission,
    find_object,
    has_permission,
    needed_permissions,
    pod_signer_permissions,
)
from tests.unit.kube.api_server import FakeApiServer

MANIFEST = Path(__file__).parents[3] / "deploy" / "base" / "authority.yaml"
NEEDED = needed_permissions(
    ObjectName("Secret", "certmount", "certmount-ca"),
    ObjectName("Secret", "certmount", "certmount-acknowledgements"),
    ObjectName("ConfigMap", "certmount", "certmount-root"),
)


def _granted(manifest: Path = MANIFEST) -> set[Permission]:
    found = set()
    for document in yaml.safe_load_all(manifest.read_text()):
        if document["kind"] not in ("Role", "ClusterRole"):
            continue
        namespace: str = document["metadata"].get("namespace", "")
        for rule in document["rules"]:
            assert set(rule) <= {"apiGroups", "resources", "resourceNames", "verbs"}
            found |= {
                Permission(verb, group, resource, namespace, name)
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
                for name in rule.get("resourceNames", [""])
            }
    return found


def test_manifests_grant_exactly_the_needed_permissions() -> None:
    assert _granted() == set(NEEDED)
    assert len(NEEDED) == len(set(NEEDED))
    assert not {permission for permission in NEEDED if "*" in str(permission)}


def test_component_grants_exactly_what_the_pod_signer_needs() -> None:
    needed = pod_signer_permissions("certmount", [CERTMOUNT_SIGNER], "certmount.dev:pod:internal")
    assert _granted(MANIFEST.parents[1] / "components/pod-certificates/rbac.yaml") == set(needed)
    assert len(needed) == len(set(needed))


async def test_api_server_reviews_each_permission(server: FakeApiServer, api: Api) -> None:
    server.denied = {("patch", "events", "")}
    allowed = {str(permission): await has_permission(api, permission) for permission in NEEDED}
    assert [name for name, is_allowed in allowed.items() if not is_allowed] == ["patch events.events.k8s.io"]
    reviewed: list[Any] = [body["spec"]["resourceAttributes"] for _, _, body in server.requests if body]
    assert {"verb": "get", "resource": "secrets", "namespace": "certmount", "name": "certmount-ca"} in reviewed
    assert {"verb": "watch", "resource": "pods"} in reviewed


@pytest.mark.parametrize("answer", [b"{}", b'{"status": {}}', b'{"status": {"allowed": "true"}}', b'{"status": 1}'])
async def test_invalid_review_allows_nothing(answer: bytes, server: FakeApiServer, api: Api) -> None:
    server.fail = (201, answer)
    assert not await has_permission(api, NEEDED[0])


async def test_failed_review_does_not_count_as_denied(server: FakeApiServer, api: Api) -> None:
    server.fail = (503, b"{}")
    with pytest.raises(
        CertmountError, match=r"^TokenReviewUnavailable: .*create tokenreviews\.authentication\.k8s\.io: .* HTTP 503"
    ):
        await has_permission(api, NEEDED[0])


async def test_missing_object_is_reported(server: FakeApiServer, api: Api) -> None:
    server.objects["/apis/coordination.k8s.io/v1/namespaces/certmount/leases/certmount-csr-signer"] = {"metadata": {}}
    await find_object(api, ObjectName("ConfigMap", "certmount", "certmount-root"))
    await find_object(api, ObjectName("Lease", "certmount", "certmount-csr-signer"))
    with pytest.raises(CertmountError, match=r"Secret certmount/certmount-x: .* HTTP 404: .* not found"):
        await find_object(api, ObjectName("Secret", "certmount", "certmount-x"))
    assert {method for method, _, _ in server.requests} == {"GET"}
