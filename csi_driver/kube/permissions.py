"""Every permission that the authority needs of the API server, and whether it has them (SelfSubjectAccessReview)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kubernetes.aio import client

from csi_driver.core.cluster.csr import OWN_SIGNER
from csi_driver.core.errors import Reason
from csi_driver.kube.client import ObjectName, answered
from csi_driver.kube.requests import ask

SIGNER_LEASE = "certmount-csr-signer"
"""By which one replica looks after CertificateSigningRequests; beside the CA's Secret."""
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass(frozen=True, slots=True)
class Permission:
    """One verb on one kind of resource, or on one object of it; an empty namespace means all of them."""

    verb: str
    group: str
    resource: str
    """With its subresource, as roles write it: ``certificatesigningrequests/status``."""
    namespace: str = ""
    name: str = ""

    def __str__(self) -> str:
        kind = f"{self.resource}.{self.group}" if self.group else self.resource
        where = f" {'/'.join(filter(None, (self.namespace, self.name)))}" if self.name else ""
        return f"{self.verb} {kind}{where}"


def needed_permissions(ca: ObjectName, confirmations: ObjectName, root: ObjectName) -> tuple[Permission, ...]:
    """All of them; ``ca`` and ``confirmations`` are Secrets, ``root`` is a ConfigMap."""
    return (
        Permission("create", "authentication.k8s.io", "tokenreviews"),
        *_each(("list", "watch"), "", ("services", "pods", "namespaces")),
        Permission("list", "storage.k8s.io", "csinodes"),
        *_each(("create", "patch"), "events.k8s.io", ("events",)),
        Permission("get", "", "pods"),
        *_each(("get", "list", "watch"), "certificates.k8s.io", ("certificatesigningrequests",)),
        Permission("update", "certificates.k8s.io", "certificatesigningrequests/approval"),
        Permission("update", "certificates.k8s.io", "certificatesigningrequests/status"),
        *(Permission(verb, "certificates.k8s.io", "signers", name=OWN_SIGNER) for verb in ("approve", "sign")),
        *(Permission(verb, "coordination.k8s.io", "leases", ca.namespace, SIGNER_LEASE) for verb in ("get", "update")),
        *(
            Permission(verb, "", resource, found.namespace, found.name)
            for resource, found in (("secrets", ca), ("secrets", confirmations), ("configmaps", root))
            for verb in ("get", "update")
        ),
    )


def _each(verbs: tuple[str, ...], group: str, resources: tuple[str, ...]) -> Iterator[Permission]:
    return (Permission(verb, group, resource) for resource in resources for verb in verbs)


async def has_permission(api: client.ApiClient, permission: Permission) -> bool:
    """Asks the API server whether the authority's own account may; raises CertmountError TokenReviewUnavailable where it can't be asked."""
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
    answer = await answered(ask(api, "POST", _REVIEWS, body=body), Reason.TOKEN_REVIEW_UNAVAILABLE, str(permission))
    status = answer.get("status")
    return isinstance(status, dict) and status.get("allowed") is True


async def find_object(api: client.ApiClient, found: ObjectName) -> None:
    """Reads a Secret, ConfigMap or Lease that the manifests make; raises CertmountError TokenReviewUnavailable where that fails."""
    group = "/apis/coordination.k8s.io/v1" if found.kind == "Lease" else "/api/v1"
    path = f"{group}/namespaces/{found.namespace}/{found.kind.lower()}s/{found.name}"
    await answered(ask(api, "GET", path), Reason.TOKEN_REVIEW_UNAVAILABLE, str(found))
