"""Checks of the permissions of certmount's service accounts (SubjectAccessReview)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence

from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_SECRET
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.doctor.findings import CheckResult
from csi_driver.doctor.installation import APPLY, Installation, Workload, checked
from csi_driver.doctor.programs import AUTHORITY, NODE, SECRETS
from csi_driver.kube.client import ObjectName
from csi_driver.kube.permissions import (
    Permission,
    access_review,
    needed_permissions,
    pod_signer_permissions,
    secrets_permissions,
)
from csi_driver.kube.pod_certificates.trust_bundles import bundle_name

_AT_ONCE = 10
_TRUE = ("1", "true", "t", "yes", "y", "on")  # what the programs accept in an environment variable
_MISSING_ROLES = 10  # if more permissions are missing, a role or its binding is missing
_NEVER = (
    Permission("get", "", "secrets"),
    Permission("create", "", "pods"),
    Permission("create", "", "serviceaccounts/token"),
    Permission("get", "", "nodes/proxy"),
)
"""Examples of permissions that would make a compromised node driver dangerous for the cluster. It needs none at all."""


async def check_permissions(installation: Installation, result: CheckResult) -> None:
    """Check that each service account has what its program needs, and the node driver nothing."""
    checked = 0
    for kind, name in (("deployments", AUTHORITY), ("deployments", SECRETS)):
        workload = await installation.workload(kind, name)
        if workload is not None:
            try:
                needed = _authority(workload) if name == AUTHORITY else _secrets(installation, workload)
            except ValueError as error:
                fix = f"kubectl -n {installation.namespace} edit deployment {name}"
                result.error(f"the Deployment {name} has the option {error}", fix)
                continue
            allowed = await _reviews(installation, needed, workload.account)
            checked += len(needed)
            _report_missing(installation, result, workload.account, [p for p in needed if not allowed[p]], len(needed))
    driver = await installation.workload("daemonsets", NODE)
    if driver is not None:
        allowed = await _reviews(installation, _NEVER, driver.account)
        for permission in (each for each in _NEVER if allowed[each]):
            account = f"{installation.namespace}/{driver.account}"
            fix = f"kubectl get clusterrolebindings,rolebindings -A -o wide | grep {driver.account}"
            problem = f"the driver's service account {account} can {permission}, and needs no permission at all"
            result.warning(problem, f"delete the binding: {fix}")
    result.summary = f"the service accounts have all {checked} permissions"


def _authority(workload: Workload) -> Sequence[Permission]:
    namespace, ca = _namespaced(workload, "ca-secret", "certmount/certmount-ca")
    root = _namespaced(workload, "root-configmap", "certmount/certmount-root")
    acknowledgements = ObjectName("Secret", namespace, ACKNOWLEDGEMENTS_SECRET)
    needed = needed_permissions(ObjectName("Secret", namespace, ca), acknowledgements, ObjectName("ConfigMap", *root))
    if signers := workload.pod_signers:
        needed += pod_signer_permissions(namespace, signers, bundle_name(signers[0], DEFAULT_ISSUER))
    return needed


def _secrets(installation: Installation, workload: Workload) -> Sequence[Permission]:
    # As in the program, an option replaces the environment variable.
    namespaces = workload.flags("namespace") or workload.environment("CERTMOUNT_SECRETS_NAMESPACES").split()
    lease = _namespaced(workload, "lease", f"{installation.namespace}/{SECRETS}")
    variable = workload.environment("CERTMOUNT_SECRETS_GATEWAYS").strip().lower()
    gateways = bool(workload.flags("gateways")) or variable in _TRUE
    return secrets_permissions(ObjectName("Lease", *lease), namespaces, gateways=gateways)


async def _reviews(
    installation: Installation, permissions: Iterable[Permission], account: str
) -> dict[Permission, bool]:
    """Return whether the account has each permission."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def review(permission: Permission) -> tuple[Permission, bool]:
        async with places:
            body = access_review(permission, ServiceAccount(installation.namespace, account))
            return permission, await installation.reader.is_allowed(body)

    with checked("create subjectaccessreviews.authorization.k8s.io"):
        return dict(await asyncio.gather(*map(review, permissions)))


def _report_missing(
    installation: Installation, result: CheckResult, account: str, missing: Sequence[Permission], needed: int
) -> None:
    """Report one finding for each resource, with the rule that is missing."""
    who = f"the service account {installation.namespace}/{account}"
    if len(missing) > _MISSING_ROLES:
        problem = f"{who} lacks {len(missing)} of {needed} permissions, such as {missing[0]}"
        result.error(problem, f"{APPLY}: its roles or their bindings are missing")
        return
    verbs: dict[tuple[str, str, str, str], list[str]] = {}
    for each in missing:
        verbs.setdefault((each.namespace, each.group, each.resource, each.name), []).append(each.verb)
    for (namespace, group, resource, name), lacking in verbs.items():
        rule = {"apiGroups": [group], "resources": [resource], "verbs": lacking}
        value = json.dumps(
            [{"op": "add", "path": "/rules/-", "value": {**rule, **({"resourceNames": [name]} if name else {})}}]
        )
        role = f"-n {namespace} patch role" if namespace else "patch clusterrole"
        problem = f"{who} cannot {Permission(', '.join(lacking), group, resource, namespace, name)}"
        result.error(problem, f"kubectl {role} {account} --type=json -p '{value}'")


def _namespaced(workload: Workload, option: str, default: str) -> tuple[str, str]:
    """Return the namespace and the name in an option; raises ValueError."""
    text = workload.flag(option, default)
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise ValueError(f"--{option} with the value {text!a}; expected NAMESPACE/NAME")
    return namespace, name
