"""The list of permissions is what the manifests give, no more and no less, and the API server is asked for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio import client

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.client import ObjectName
from csi_driver.kube.permissions import Permission, find_object, has_permission, needed_permissions
from tests.unit.kube.api_server import FakeApiServer

MANIFEST = Path(__file__).parents[3] / "deploy" / "base" / "authority.yaml"
NEEDED = needed_permissions(
    ObjectName("Secret", "certmount", "certmount-ca"),
    ObjectName("Secret", "certmount", "certmount-acknowledgements"),
    ObjectName("ConfigMap", "certmount", "certmount-root"),
)


def _granted() -> set[Permission]:
    """What the roles of deploy/base/authority.yaml give, one for each verb, resource and name."""
    found = set()
    for document in yaml.safe_load_all(MANIFEST.read_text()):
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


def test_the_manifests_give_what_is_needed_and_nothing_else() -> None:
    """Least privilege, in both directions."""
    assert _granted() == set(NEEDED)
    assert len(NEEDED) == len(set(NEEDED))
    assert not {permission for permission in NEEDED if "*" in str(permission)}


async def test_the_api_server_decides(server: FakeApiServer, api: client.ApiClient) -> None:
    """Each is asked for as it is needed: by name where one object is enough."""
    server.denied = {("patch", "events", "")}
    allowed = {str(permission): await has_permission(api, permission) for permission in NEEDED}
    assert [name for name, yes in allowed.items() if not yes] == ["patch events.events.k8s.io"]
    asked: list[Any] = [body["spec"]["resourceAttributes"] for _, _, body in server.requests if body]
    assert {"verb": "get", "resource": "secrets", "namespace": "certmount", "name": "certmount-ca"} in asked
    assert {"verb": "watch", "resource": "pods"} in asked


@pytest.mark.parametrize("answer", [b"{}", b'{"status": {}}', b'{"status": {"allowed": "true"}}', b'{"status": 1}'])
async def test_anything_but_a_yes_is_a_no(answer: bytes, server: FakeApiServer, api: client.ApiClient) -> None:
    """A check that passes by mistake is worth less than none."""
    server.fail = (201, answer)
    assert not await has_permission(api, NEEDED[0])


async def test_an_api_server_that_cannot_be_asked_is_not_a_no(server: FakeApiServer, api: client.ApiClient) -> None:
    """That would send people to look for a missing role."""
    server.fail = (503, b"{}")
    with pytest.raises(
        CertmountError, match=r"create tokenreviews\.authentication\.k8s\.io: .* answers 503"
    ) as failure:
        await has_permission(api, NEEDED[0])
    assert failure.value.reason is Reason.TOKEN_REVIEW_UNAVAILABLE


async def test_an_object_that_the_manifests_make_is_looked_for(server: FakeApiServer, api: client.ApiClient) -> None:
    """A permission on what is not there helps no one."""
    server.objects["/apis/coordination.k8s.io/v1/namespaces/certmount/leases/certmount-csr-signer"] = {"metadata": {}}
    await find_object(api, ObjectName("ConfigMap", "certmount", "certmount-root"))
    await find_object(api, ObjectName("Lease", "certmount", "certmount-csr-signer"))
    with pytest.raises(CertmountError, match=r"Secret certmount/certmount-x: the API server answers 404: .* not found"):
        await find_object(api, ObjectName("Secret", "certmount", "certmount-x"))
    assert {method for method, _, _ in server.requests} == {"GET"}
