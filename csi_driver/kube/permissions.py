"""The API permissions that the authority needs, and a check of them (SelfSubjectAccessReview)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from csi_driver.core.cluster.csr import CERTMOUNT_SIGNER
from csi_driver.core.errors import Reason
from csi_driver.core.identity import ServiceAccount
from csi_driver.kube.client import ObjectName, call_api
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_json
from csi_driver.kube.metadata import Json
from csi_driver.kube.stored_objects import MAX_STORED_BYTES, object_path

SIGNER_LEASE = "certmount-csr-signer"
"""The Lease of the replica that signs CertificateSigningRequests, in the namespace of the CA's Secret."""
POD_SIGNER_LEASE = "certmount-pod-signer"
"""The Lease of the replica that signs PodCertificateRequests, in the same namespace."""
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass(frozen=True, slots=True)
class Permission:
    """A verb on a resource or on one object. An empty namespace means all namespaces."""

    verb: str
    group: str
    resource: str  # with its subresource, as in a Role: certificatesigningrequests/status
    namespace: str = ""
    name: str = ""

    @property
    def attributes(self) -> Mapping[str, str]:
        """The ResourceAttributes of authorization.k8s.io/v1."""
        resource, _, subresource = self.resource.partition("/")
        attributes = {
            "verb": self.verb,
            "group": self.group,
            "resource": resource,
            "subresource": subresource,
            "namespace": self.namespace,
            "name": self.name,
        }
        return {key: value for key, value in attributes.items() if value}

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


def pod_signer_permissions(namespace: str, signers: Sequence[str], bundle: str) -> tuple[Permission, ...]:
    """Return what the signer of PodCertificateRequests needs in addition; ``bundle`` is the ClusterTrustBundle of the internal CA."""
    group = "certificates.k8s.io"
    return (
        *_each(("get", "list", "watch"), group, ("podcertificaterequests",)),
        Permission("update", group, "podcertificaterequests/status"),
        *(Permission("sign", group, "signers", name=signer) for signer in signers),
        *(Permission("attest", group, "signers", name=signer) for signer in signers[:1]),
        Permission("list", group, "clustertrustbundles"),
        *(Permission(verb, group, "clustertrustbundles", name=bundle) for verb in ("get", "create", "patch", "delete")),
        *(Permission(verb, "coordination.k8s.io", "leases", namespace, POD_SIGNER_LEASE) for verb in ("get", "update")),
    )


def _each(verbs: tuple[str, ...], group: str, resources: tuple[str, ...]) -> Iterator[Permission]:
    return (Permission(verb, group, resource) for resource in resources for verb in verbs)


def secrets_permissions(lease: ObjectName, namespaces: Sequence[str], *, gateways: bool) -> tuple[Permission, ...]:
    """Return what the Secrets controller needs in its own namespace, and in those of the sources."""
    watched = [("networking.k8s.io", "ingresses"), *([("gateway.networking.k8s.io", "gateways")] if gateways else [])]
    return (
        *(Permission(verb, "coordination.k8s.io", "leases", lease.namespace, lease.name) for verb in ("get", "update")),
        *(
            Permission(verb, group, resource, namespace)
            for namespace in namespaces
            for group, resource, verbs in (
                *((*each, ("list", "watch")) for each in watched),
                ("", "secrets", ("get", "create", "patch")),
                ("events.k8s.io", "events", ("create", "patch")),
            )
            for verb in verbs
        ),
    )


async def has_permission(api: Api, permission: Permission) -> bool:
    """Return whether the authority's account has the permission; raises CertmountError TokenReviewUnavailable."""
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": permission.attributes},
    }
    review = await call_api(
        request_json(api, "POST", _REVIEWS, body=body), Reason.TOKEN_REVIEW_UNAVAILABLE, str(permission)
    )
    status = review.get("status")
    return isinstance(status, dict) and status.get("allowed") is True


def access_review(permission: Permission, account: ServiceAccount) -> Json:
    """Return a SubjectAccessReview of a service account."""
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{account.namespace}", "system:authenticated"]
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": account.username, "groups": groups, "resourceAttributes": dict(permission.attributes)},
    }


async def find_object(api: Api, found: ObjectName) -> None:
    """Read a Secret, ConfigMap or Lease; raises CertmountError TokenReviewUnavailable if that fails."""
    call = request_json(api, "GET", object_path(found), max_bytes=MAX_STORED_BYTES)
    await call_api(call, Reason.TOKEN_REVIEW_UNAVAILABLE, str(found))
