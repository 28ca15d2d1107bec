"""What the cluster knows about the volumes of a pod: its spec, its events, and the state in the driver of its node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from csi_driver import DRIVER_NAME
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.doctor.installation import checked
from csi_driver.doctor.programs import NODE, STATUS, program_pages, program_pods
from csi_driver.kube.admin.object_reader import ObjectReader
from csi_driver.kube.metadata import Json

_MAX_EVENTS = 20


async def read_pod(reader: ObjectReader, namespace: str, pod_namespace: str, pod_name: str) -> dict[str, Any]:
    """Return the JSON output for a pod; ``namespace`` is that of certmount.

    Raises CertmountError VolumeNotFound or APIServerUnavailable.
    """
    with checked(f"get pods in namespace {pod_namespace}"):
        item = await reader.find(f"/api/v1/namespaces/{pod_namespace}/pods/{pod_name}")
    attributes = _attributes(item or {})
    if item is None or not attributes:
        problem = "does not exist" if item is None else f"has no volume of the driver {DRIVER_NAME}"
        raise CertmountError(Reason.VOLUME_NOT_FOUND, Fault(f"pod {pod_namespace}/{pod_name}", problem))
    node, certificates, problems = str(item["spec"].get("nodeName") or ""), {}, ["the pod is not scheduled"]
    if node:
        with checked(f"list pods in namespace {namespace}"):
            pods = await program_pods(reader, namespace, NODE, node)
        problems = [] if pods else [f"node {node} has no pod of the driver"]
        async for page in program_pages(reader, namespace, pods, STATUS):
            problems += [f"{page.pod}: {page.error}"] if page.error else []
            for each in page.document.get("certificates") or ():
                if (each["namespace"], each["pod"]) == (pod_namespace, pod_name):
                    certificates[str(each["volume"])] = each
    if not problems:
        problems = [problem for name in attributes if (problem := _problem(name, certificates.get(name)))]
    return {
        "namespace": pod_namespace,
        "pod": pod_name,
        "uid": str(item["metadata"]["uid"]),
        "node": node,
        "serviceAccount": str(item["spec"].get("serviceAccountName") or "default"),
        "phase": str((item.get("status") or {}).get("phase") or ""),
        "volumes": [
            {"name": name, "attributes": each, "certificate": certificates.get(name), "files": None}
            for name, each in attributes.items()
        ],
        "events": await _events(reader, pod_namespace, pod_name),
        "problems": problems,
    }


def _problem(volume: str, certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return f"volume {volume}: the driver has not published it; see the events"
    condition = certificate["condition"]
    return f"volume {volume}: {condition['reason']}: {condition['message']}" if condition else ""


def _attributes(pod: Json) -> dict[str, Mapping[str, str]]:
    volumes = (pod.get("spec") or {}).get("volumes") or ()
    found = [(each["name"], each["csi"]) for each in volumes if (each.get("csi") or {}).get("driver") == DRIVER_NAME]
    return {str(name): dict(csi.get("volumeAttributes") or {}) for name, csi in found}


async def _events(reader: ObjectReader, namespace: str, pod: str) -> list[Mapping[str, str]]:
    """Return the last warnings and the events of certmount, the oldest first."""
    selector = f"involvedObject.kind=Pod,involvedObject.name={pod}"
    found: list[Mapping[str, str]] = []
    with checked(f"list events in namespace {namespace}"):
        async for event in reader.list(f"/api/v1/namespaces/{namespace}/events", fieldSelector=selector):
            component = str(event.get("reportingComponent") or (event.get("source") or {}).get("component") or "")
            if event.get("type") == "Warning" or component.startswith("certmount"):
                time = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
                texts = {key: str(event.get(key) or "") for key in ("type", "reason", "message")}
                found.append({"time": str(time), **texts})
                found = sorted(found, key=lambda each: each["time"])[-_MAX_EVENTS:]
    return found
