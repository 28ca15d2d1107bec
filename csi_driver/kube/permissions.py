"""The API permissions that the authority needs, and a check of them (SelfSubjectAccessReview)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kubernetes.aio import client

from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER
from csi_driver.core.errors import Reason
from csi_driver.kube.client import ObjectName, call_api
from csi_driver.kube.json_requests import request_json
from csi_driver.kube.stored_objects import object_path

SIGNER_LEASE = "certmount-csr-signer"
"""The Lease of the replica that signs CertificateSigningRequests, in the namespace of the CA's Secret."""
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass(frozen=True, slots=True)
class Permission:
    """A verb on a resource or on one object. An empty namespace means all namespaces."""

    verb: str
    group: str
    resource: str  # with its subresource, as in a Role: certificatesigningrequests/status
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        kind = f"{self.resource}.{self.group}" if self.group else self.resource
        where = f" {'/'.join(filter(None, (self.namespace, self.name)))}" if self.name else ""
        return f"{self.verb} {kind}{where}"


def needed_permissions(ca: ObjectName, acknowledgements: ObjectName, root: ObjectName) -> tuple[Permission, ...]:
    """Return all permissions; ``ca`` and ``acknowledgements`` are Secrets, ``root`` is a ConfigMap."""
    return (
        Permission("create", "authentication.k8s.io", "tokenreviews"),
        *_each(("list", "watch"), "", ("services", "pods", "namespaces")),
        Permission("list", "storage.k8s.io", "csinodes"),
        *_each(("create", "patch"), "events.k8s.io", ("events",)),
        Permission("get", "", "pods"),
        *_each(("get", "list", "watch"), "certificates.k8s.io", ("certificatesigningrequests",)),
        Permission("update", "certificates.k8s.io", "certificatesigningrequests/approval"),
        Permission("update", "certificates.k8s.io", "certificatesigningrequests/status"),
        *(Permission(verb, "certificates.k8s.io", "signers", name=CERTMOUNT_SIGNER) for verb in ("approve", "sign")),
        *(Permission(verb, "coordination.k8s.io", "leases", ca.namespace, SIGNER_LEASE) for verb in ("get", "update")),
        *(
            Permission(verb, "", resource, found.namespace, found.name)
            for resource, found in (("secrets", ca), ("secrets", acknowledgements), ("configmaps", root))
            for verb in ("get", "update")
        ),
    )


def _each(verbs: tuple[str, ...], group: str, resources: tuple[str, ...]) -> Iterator[Permission]:
    return (Permission(verb, group, resource) for resource in resources for verb in verbs)


async def has_permission(api: client.ApiClient, permission: Permission) -> bool:
    """Return whether the authority's account has the permission; raises CertmountError TokenReviewUnavailable."""
    resource, _, subresource = permission.resource.partition("/")
    attributes = {
        "verb": permission.verb,
        "group": permission.group,
        "resource": resource,
        "subresource": subresource,
        "namespace": permission.namespace,
        "name": permission.name,
    }
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
    }
    review = await call_api(
        request_json(api, "POST", _REVIEWS, body=body), Reason.TOKEN_REVIEW_UNAVAILABLE, str(permission)
    )
    status = review.get("status")
    return isinstance(status, dict) and status.get("allowed") is True


async def find_object(api: client.ApiClient, found: ObjectName) -> None:
    """Read a Secret, ConfigMap or Lease; raises CertmountError TokenReviewUnavailable if that fails."""
    await call_api(request_json(api, "GET", object_path(found)), Reason.TOKEN_REVIEW_UNAVAILABLE, str(found))
