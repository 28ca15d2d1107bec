"""Checks of the objects that the manifests create, and of the versions."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

from csi_driver import DRIVER_NAME, POD_AUDIENCE, __version__
from csi_driver.core.clocks import TOLERANCE_S, describe_skew
from csi_driver.core.errors import CertmountError
from csi_driver.core.texts import timestamp
from csi_driver.doctor.findings import CheckResult, NotChecked
from csi_driver.doctor.installation import APPLY, Installation, checked, merge_patch
from csi_driver.doctor.programs import AUTHORITY, DIAGNOSTICS, NODE, ProgramPod
from csi_driver.kube.metadata import Json

_OLDEST_KUBERNETES = (1, 30)
_LEVEL = "pod-security.kubernetes.io/enforce"
_CSI_DRIVER = {
    "attachRequired": False,
    "podInfoOnMount": True,
    "requiresRepublish": True,
    "fsGroupPolicy": "None",
    "volumeLifecycleModes": ["Ephemeral"],
}
_IMMUTABLE = ("attachRequired", "volumeLifecycleModes", "fsGroupPolicy")
_MAX_EVENT = 400
_INSTALL = "the section Install of README.md; certmount doctor --namespace=NAMESPACE"
_OWN_SIGNERS = "certmount.dev/"
_ADMISSION_POLICY = "certmount-pod-certificates"
_APPLY_ADMISSION = "kubectl apply -f deploy/components/pod-certificates/admission.yaml"


async def check_api_server(installation: Installation, result: CheckResult) -> None:
    """Check the version of Kubernetes, and the own clock: certificates of a kubeconfig and tokens depend on it."""
    result.nothing_found = True
    version = await installation.find("/version") or {}
    result.nothing_found = False
    # An API server that was built without these numbers has empty ones. Then they are in the version, or unknown.
    found = [re.sub(r"[^0-9]", "", str(version.get(key) or "")) for key in ("major", "minor")]
    numbers = tuple(map(int, found)) if all(found) else _minor(str(version.get("gitVersion") or ""))
    result.summary = f"Kubernetes {version.get('gitVersion', '')}"
    if (0, 0) < numbers < _OLDEST_KUBERNETES:
        oldest = ".".join(map(str, _OLDEST_KUBERNETES))
        result.error(
            f"{result.summary} is too old; certmount needs {oldest}", f"upgrade the cluster to {oldest} or newer"
        )
    with checked("get /version"):
        ahead = await installation.reader.clock_difference_s()
    if abs(ahead) > TOLERANCE_S:
        now = timestamp(time.time() - ahead)
        problem = describe_skew("this machine", "the API server", ahead)
        result.warning(
            problem, f"synchronize the clock that is wrong; the API server's is at {now}: timedatectl set-ntp true"
        )


async def check_namespace(installation: Installation, result: CheckResult) -> None:
    """Check that the namespace admits the privileged pods of the driver."""
    name = installation.namespace
    item = await installation.find(f"/api/v1/namespaces/{name}")
    if item is None:
        result.error(f"the namespace {name} does not exist", f"install certmount, or name its namespace: {_INSTALL}")
        result.nothing_found = True
        return
    level = (item["metadata"].get("labels") or {}).get(_LEVEL)
    fix = f"kubectl label --overwrite namespace {name} {_LEVEL}=privileged"
    if level is None:
        result.warning(
            f"the namespace has no label {_LEVEL}, so the cluster's default decides about the driver's pods", fix
        )
    elif level != "privileged":
        result.error(f"the label {_LEVEL} is {level!r}, which forbids the driver's privileged pods", fix)
    result.summary = f"{name} admits privileged pods"


async def check_csi_driver(installation: Installation, result: CheckResult) -> None:
    """Check that the kubelets call the driver as it needs it."""
    item = await installation.find(f"/apis/storage.k8s.io/v1/csidrivers/{DRIVER_NAME}")
    if item is None:
        result.error(f"the CSIDriver {DRIVER_NAME} does not exist", "kubectl apply -f deploy/base/csidriver.yaml")
        return
    spec = item.get("spec") or {}
    replace = f"kubectl delete csidriver {DRIVER_NAME} && kubectl apply -f deploy/base/csidriver.yaml"
    for name, expected in _CSI_DRIVER.items():
        if spec.get(name) != expected:
            fix = merge_patch("csidriver", DRIVER_NAME, json.dumps({"spec": {name: expected}}))
            text = f"spec.{name} is {json.dumps(spec.get(name))}; expected {json.dumps(expected)}"
            result.error(text, replace if name in _IMMUTABLE else fix)
    audiences = [str(each.get("audience")) for each in spec.get("tokenRequests") or ()]
    if POD_AUDIENCE not in audiences:
        requests = [{"audience": POD_AUDIENCE, "expirationSeconds": 3600}]
        fix = merge_patch("csidriver", DRIVER_NAME, json.dumps({"spec": {"tokenRequests": requests}}))
        result.error(f"spec.tokenRequests has no token for the audience {POD_AUDIENCE!r}", fix)
    result.summary = f"{DRIVER_NAME} has the expected fields"


async def check_workloads(installation: Installation, result: CheckResult) -> None:
    """Check that the driver runs on each node, and all replicas of the authority."""
    counts = []
    for kind, name, program in (("daemonsets", NODE, "the node driver"), ("deployments", AUTHORITY, "the authority")):
        workload = await installation.workload(kind, name)
        if workload is None:
            result.error(f"the {kind[:-1]} {name} does not exist", APPLY)
            continue
        wanted, ready = _replicas(workload.item)
        counts.append(f"{ready} of {wanted} pods of {program}")
        if not wanted:
            selector = merge_patch("deployment", name, '{"spec":{"replicas":2}}', installation.namespace)
            fix = (
                selector if kind == "deployments" else f"kubectl -n {installation.namespace} describe daemonset {name}"
            )
            result.error(f"{program} has no pods", fix)
        elif ready < wanted:
            waiting = [pod for pod in await installation.pods(name) if not pod.ready]
            for pod in waiting:
                await _report_pod(installation, result, pod, program)
            if not waiting:
                fix = f"kubectl -n {installation.namespace} describe {kind[:-1]} {name}"
                result.error(f"{ready} of {wanted} pods of {program} are ready", fix)
    result.summary = f"{' and '.join(counts)} are ready"


async def check_network_policies(installation: Installation, result: CheckResult) -> None:
    """Check that NetworkPolicies protect the ports of the programs."""
    path = f"/apis/networking.k8s.io/v1/namespaces/{installation.namespace}/networkpolicies"
    with checked(f"list networkpolicies in namespace {installation.namespace}"):
        selectors = [item["spec"].get("podSelector") or {} async for item in installation.reader.list(path)]
    protected = [(each.get("matchLabels") or {}).get("app.kubernetes.io/name") for each in selectors]
    for program in (AUTHORITY, NODE):
        if program not in protected and {} not in selectors:
            problem = f"no NetworkPolicy selects the pods of {program}, so every pod can connect to them"
            result.warning(problem, "kubectl apply -f deploy/base/network-policy.yaml")
    result.summary = "a NetworkPolicy selects the pods of each program"


async def check_admission_policy(installation: Installation, result: CheckResult) -> None:
    """Check that only kubelets can create requests for the signer names of Pod Certificates.

    The policies for signer names of other domains are not known: the administrator writes them.
    """
    authority = await installation.workload("deployments", AUTHORITY)
    if authority is None or not any(signer.startswith(_OWN_SIGNERS) for signer in authority.pod_signers):
        result.summary = f"not needed, because the authority signs for no name that starts with {_OWN_SIGNERS}"
        return
    policy, binding = [
        (await installation.find(f"/apis/admissionregistration.k8s.io/v1/{kind}/{_ADMISSION_POLICY}") or {}).get("spec")
        for kind in ("validatingadmissionpolicies", "validatingadmissionpolicybindings")
    ]
    danger = "so everyone who can create PodCertificateRequests in a namespace gets certificates for its pods"
    if policy is None or binding is None:
        missing = "ValidatingAdmissionPolicy" if policy is None else "ValidatingAdmissionPolicyBinding"
        result.error(f"the {missing} {_ADMISSION_POLICY} does not exist, {danger}", _APPLY_ADMISSION)
    elif "Deny" not in binding["validationActions"] or binding["policyName"] != _ADMISSION_POLICY:
        problem = f"the ValidatingAdmissionPolicyBinding {_ADMISSION_POLICY} does not deny requests, {danger}"
        result.error(
            problem, f"kubectl delete validatingadmissionpolicybinding {_ADMISSION_POLICY} && {_APPLY_ADMISSION}"
        )
    elif policy["failurePolicy"] != "Fail":
        fix = merge_patch("validatingadmissionpolicy", _ADMISSION_POLICY, '{"spec": {"failurePolicy": "Fail"}}')
        problem = f"the ValidatingAdmissionPolicy {_ADMISSION_POLICY} ignores its errors; expected failurePolicy Fail"
        result.error(problem, fix)
    result.summary = f"only kubelets can create requests for the signer names that start with {_OWN_SIGNERS}"


async def check_versions(installation: Installation, result: CheckResult) -> None:
    """Check that the versions of the programs, and of this command, differ by one minor version at most."""
    versions: dict[str, str] = {__version__: "this command"}
    for program in (AUTHORITY, NODE):
        for page in await installation.pages(program, DIAGNOSTICS):
            if page.error:
                raise NotChecked(f"{page.pod}: {page.error}", "see the other findings about this pod")
            versions.setdefault(str(page.document["version"]), page.pod.name)
    ordered = sorted(versions, key=_minor)
    if not are_compatible(ordered):
        oldest, newest = ordered[0], ordered[-1]
        found = f"{versions[oldest]} has version {oldest}, and {versions[newest]} has {newest}"
        fix = f"{APPLY} with one version of the image for all programs"
        result.error(f"{found}; one minor version of difference works", fix)
    result.summary = ", ".join(ordered)


def are_compatible(versions: Sequence[str]) -> bool:
    """Return whether programs of these versions can be used together."""
    minor = sorted(map(_minor, versions))
    (oldest_major, oldest), (newest_major, newest) = minor[0], minor[-1]
    return oldest_major == newest_major and newest - oldest <= 1


async def _report_pod(installation: Installation, result: CheckResult, pod: ProgramPod, program: str) -> None:
    cause = pod.problem or "it is not ready; see the check `programs`"
    if pod.problem and (event := await _last_warning(installation, pod.name)):
        cause = f"{pod.problem}; {event}"
    fix = f"kubectl -n {installation.namespace} describe pod {pod.name}"
    result.error(f"a pod of {program} is not ready: {cause}", fix, pod.node)


async def _last_warning(installation: Installation, pod: str) -> str:
    """Return the last warning event of a pod, such as a failed mount of the kubelet directory."""
    path, last = f"/api/v1/namespaces/{installation.namespace}/events", ""
    selector = f"involvedObject.name={pod},type=Warning"
    try:
        async for event in installation.reader.list(path, fieldSelector=selector):
            last = f"{event.get('reason')}: {event.get('message')}"[:_MAX_EVENT]
    except CertmountError as error:
        last = str(error)
    return last


def _replicas(item: Json) -> tuple[int, int]:
    status = item.get("status") or {}
    if item.get("kind") == "DaemonSet" or "desiredNumberScheduled" in status:
        return int(status.get("desiredNumberScheduled") or 0), int(status.get("numberReady") or 0)
    return int(item["spec"].get("replicas") or 0), int(status.get("readyReplicas") or 0)


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = [*re.findall(r"[0-9]+", version), 0, 0]
    return int(major), int(minor)
