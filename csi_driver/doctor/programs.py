"""The pods of certmount, and the pages that their programs serve for administrators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi_driver.core.bounded_json import loads_bounded
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.admin.object_reader import ObjectReader, outside
from csi_driver.kube.metadata import Json

AUTHORITY, NODE, SECRETS = "certmount-authority", "certmount-node", "certmount-secrets"
"""The label app.kubernetes.io/name of the programs' pods."""
STATUS, DIAGNOSTICS = "/status", "/diagnostics"
_PORTS = {AUTHORITY: 9441, NODE: 9440, SECRETS: 9442}
_MAX_PAGE_BYTES = 8 * 2**20  # a node with 250 volumes needs 150 KiB, unless their certificates have long names
_MAX_VALUES = 200_000
_AT_ONCE = 20
_TIMEOUT_S = {STATUS: 15.0, DIAGNOSTICS: 65.0}
_CONDITION = {"reason": str, "message": str}
_CERTIFICATE = {
    **dict.fromkeys(("namespace", "pod", "volume", "node", "serial", "issuer", "notAfter", "nextRenewal"), str),
    "names": [str],
    "moreNames": int,
    "interim": bool,
    "condition": (type(None), _CONDITION),
}
_FORMS: Mapping[str, object] = {"version": str, "problems": [str], "authority": str, "certificates": [_CERTIFICATE]}
"""What a page has in these keys, if it has them. A compromised node can send anything, which must not stop the command."""


@dataclass(frozen=True, slots=True)
class ProgramPod:
    """A pod of certmount. ``problem`` is why its container does not run; ``port`` serves the pages."""

    name: str
    node: str
    ready: bool
    problem: str
    port: int

    def __str__(self) -> str:
        return f"{self.name} on {self.node}" if self.node else self.name


@dataclass(frozen=True, slots=True)
class ProgramPage:
    """A page of a pod, or the error. ``clock_s`` is by how many seconds the own clock is ahead of the pod's, at least."""

    pod: ProgramPod
    document: Mapping[str, Any]
    error: str
    clock_s: float = 0.0


async def program_pods(reader: ObjectReader, namespace: str, program: str, node: str = "") -> list[ProgramPod]:
    """List the pods of a program, on all nodes or on one, without those that have ended or are being deleted.

    Raises CertmountError APIServerUnavailable.
    """
    query = {"labelSelector": f"app.kubernetes.io/name={program}"}
    if node:
        query["fieldSelector"] = f"spec.nodeName={node}"
    path = f"/api/v1/namespaces/{namespace}/pods"
    return [_pod(item, _PORTS[program]) async for item in reader.list(path, **query) if _is_active(item)]


async def program_pages(
    reader: ObjectReader, namespace: str, pods: Sequence[ProgramPod], path: str
) -> AsyncIterator[ProgramPage]:
    """Yield a page of each pod as it arrives. At most twenty connections are open."""
    waiting = asyncio.Semaphore(_AT_ONCE)

    async def read(pod: ProgramPod) -> ProgramPage:
        async with waiting:
            return await _page(reader, namespace, pod, path)

    for page in asyncio.as_completed([read(pod) for pod in pods]):
        yield await page


async def _page(reader: ObjectReader, namespace: str, pod: ProgramPod, path: str) -> ProgramPage:
    if pod.problem:
        return ProgramPage(pod, {}, pod.problem)
    before = time.time()
    try:
        content = await reader.page(namespace, pod.name, pod.port, path, _MAX_PAGE_BYTES, _TIMEOUT_S[path])
        document = loads_bounded(content, max_bytes=_MAX_PAGE_BYTES, max_values=_MAX_VALUES)
        clock_s = outside(float(document["time"]), before, time.time())
        _check_forms(document)
    except CertmountError as error:
        return ProgramPage(pod, {}, str(error))
    except (ValueError, KeyError, TypeError, OverflowError):
        problem = Fault(f"pod {namespace}/{pod.name}", f"sends a page {path} that is not valid")
        return ProgramPage(pod, {}, str(CertmountError(Reason.API_SERVER_UNAVAILABLE, problem)))
    return ProgramPage(pod, document, "", clock_s)


def _check_forms(page: Mapping[str, object]) -> None:
    """Raise ValueError, or KeyError for a page without a version."""
    for key, form in _FORMS.items():
        if (key == "version" or key in page) and not _has_form(page[key], form):
            raise ValueError(key)


def _has_form(value: object, form: object) -> bool:
    """Return whether a value has a form: a type, one of several forms, a list of a form, or an object with keys of forms."""
    match form:
        case dict():
            return isinstance(value, dict) and all(key in value and _has_form(value[key], form[key]) for key in form)
        case tuple():
            return any(_has_form(value, each) for each in form)
        case [each]:
            return isinstance(value, list) and all(_has_form(item, each) for item in value)
        case type():
            return isinstance(value, form)
    raise TypeError(form)


def _is_active(item: Json) -> bool:
    ended = (item.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return not ended and "deletionTimestamp" not in item["metadata"]


def _pod(item: Json, default_port: int) -> ProgramPod:
    spec, status = item.get("spec") or {}, item.get("status") or {}
    containers = status.get("containerStatuses") or [{}]
    waiting = next((each["state"]["waiting"] for each in containers if "waiting" in (each.get("state") or {})), None)
    problem = ""
    if waiting is not None or status.get("phase") != "Running":
        reason, message = (waiting or {}).get("reason") or status.get("phase"), (waiting or {}).get("message") or ""
        problem = f"the container is not running: {reason}{f': {message}' if message else ''}"
    ports = [port for each in spec.get("containers") or () for port in each.get("ports") or ()]
    http = next((int(port["containerPort"]) for port in ports if port.get("name") == "http"), default_port)
    ready = bool(containers) and all(each.get("ready") for each in containers)
    return ProgramPod(item["metadata"]["name"], spec.get("nodeName") or "", ready, problem, http)
