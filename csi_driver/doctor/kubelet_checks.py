"""Check of the kubelet directory: what the DaemonSet mounts, and what the kubelets use."""

from __future__ import annotations

import re
from collections.abc import Mapping

from csi_driver import DRIVER_NAME
from csi_driver.core.errors import CertmountError
from csi_driver.core.texts import count
from csi_driver.doctor.findings import CheckResult, NotChecked
from csi_driver.doctor.installation import APPLY, Installation, Workload, checked, first
from csi_driver.doctor.programs import NODE
from csi_driver.kube.metadata import Json

_DEFAULT = "/var/lib/kubelet"
_DISTRIBUTIONS = {"k0s": "/var/lib/k0s/kubelet", "microk8s": "/var/snap/microk8s/common/var/lib/kubelet"}
"""The kubelet directories of distributions that do not use the default, by a word in the kubelet's version or a label."""
# The API server's library separates names and values by a random one of these, so that nothing relies on the format.
# Other characters in the path could change the command that doctor prints: a compromised node sends any text.
_ROOT_DIR = re.compile(r"^root-dir(?:: |[:= ])(/[\w./@+-]*)$", re.MULTILINE | re.ASCII)
_MAX_NODES = 20  # for each of which the API server connects to a kubelet


async def check_kubelet_directory(installation: Installation, result: CheckResult) -> None:
    """Check that the DaemonSet mounts the directory that the kubelets use: on each node, the kubelet knows the driver then."""
    workload = await installation.workload("daemonsets", NODE)
    if workload is None:
        raise NotChecked(f"the DaemonSet {NODE} does not exist", "see the check `workloads`")
    directory = workload.flag("kubelet-dir", _DEFAULT)
    _check_mount(installation, result, workload, directory)
    running = {pod.node: pod for pod in await installation.pods(NODE) if pod.node}
    registered = await _registered_nodes(installation)
    for node in sorted(running.keys() - registered)[:_MAX_NODES]:
        found = await _kubelet_directory(installation, node)
        if found == directory:
            problem = f"the kubelet has not registered the driver, although its directory is {directory}"
            fix = f"kubectl -n {installation.namespace} logs {running[node].name}"
        elif found:
            problem = f"the DaemonSet uses {directory}, but the kubelet's directory is {found}"
            fix = _replacement(installation, directory, found)
        else:
            other = "" if directory == _DEFAULT else f"; the usual directory is {_DEFAULT}"
            problem = f"the kubelet has not registered the driver: is {directory} its --root-dir{other}"
            fix = _replacement(installation, directory, "KUBELET_ROOT_DIR" if directory == _DEFAULT else _DEFAULT)
        result.error(problem, fix, node)
    result.summary = f"the driver is registered on {count(len(running), 'node')}, in {directory}"


def _check_mount(installation: Installation, result: CheckResult, workload: Workload, directory: str) -> None:
    mounts = workload.container.get("volumeMounts") or ()
    mount: Json | None = first(each for each in mounts if each["mountPath"].rstrip("/") == directory.rstrip("/"))
    if mount is None:
        result.error(f"the driver's container has no volume at {directory}, its --kubelet-dir", APPLY)
        return
    if mount.get("mountPropagation") != "Bidirectional":
        problem = (
            f"the mount of {directory} has the propagation {mount.get('mountPropagation')}; expected Bidirectional"
        )
        result.error(f"{problem}, or pods see no files", APPLY)
    volume: Mapping[str, Json] = first(
        each for each in workload.pod_spec.get("volumes") or () if each["name"] == mount["name"]
    )
    path = str((volume.get("hostPath") or {}).get("path"))
    if path.rstrip("/") != directory.rstrip("/"):
        problem = f"--kubelet-dir is {directory}, but the volume has the host path {path}; they must be equal"
        result.error(problem, _replacement(installation, path, directory))


async def _registered_nodes(installation: Installation) -> set[str]:
    path, found = "/apis/storage.k8s.io/v1/csinodes", set()
    with checked("list csinodes.storage.k8s.io"):
        async for item in installation.reader.list(path):
            if any(driver.get("name") == DRIVER_NAME for driver in item["spec"].get("drivers") or ()):
                found.add(str(item["metadata"]["name"]))
    return found


async def _kubelet_directory(installation: Installation, node: str) -> str:
    """Return the directory that a kubelet uses, from its flags (Kubernetes 1.36 or newer) or its distribution; or empty."""
    try:
        flags = await installation.reader.text(f"/api/v1/nodes/{node}/proxy/flagz")
    except CertmountError:  # an older kubelet, or no permission: the distribution can tell it too
        flags = ""
    if match := _ROOT_DIR.search(flags):
        return match[1].strip()
    try:
        item = await installation.find(f"/api/v1/nodes/{node}") or {}
    except NotChecked:
        return ""
    version = str(((item.get("status") or {}).get("nodeInfo") or {}).get("kubeletVersion"))
    marks = f"{version} {' '.join((item.get('metadata') or {}).get('labels') or {})}"
    return next((path for word, path in _DISTRIBUTIONS.items() if word in marks), "")


def _replacement(installation: Installation, old: str, new: str) -> str:
    get = f"kubectl -n {installation.namespace} get daemonset {NODE} -o yaml"
    return f"{get} | sed 's#{old}#{new}#g' | kubectl replace -f -"
