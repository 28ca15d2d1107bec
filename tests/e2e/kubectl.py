"""The cluster, through kubectl, and conditions that are waited for with a deadline."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Manifest = Mapping[str, Any]

CERTMOUNT = "certmount"
"""The namespace that deploy/ makes."""


class KubectlError(AssertionError):
    """A kubectl command that failed, with what it said."""


def kubectl(*arguments: str, text: str | None = None, seconds: float = 60) -> str:
    """Runs kubectl and gives its output; ``text`` goes to its input. Raises KubectlError."""
    command = ["kubectl", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise KubectlError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def get(kind: str, name: str, namespace: str = CERTMOUNT) -> Any:
    """One object, as plain data."""
    return json.loads(kubectl("-n", namespace, "get", kind, name, "-o", "json"))


def find(kind: str, *selection: str, namespace: str = CERTMOUNT) -> list[Any]:
    """The objects that ``selection`` (kubectl's own flags) selects."""
    items: list[Any] = json.loads(kubectl("-n", namespace, "get", kind, *selection, "-o", "json"))["items"]
    return items


def exists(kind: str, name: str, namespace: str = CERTMOUNT) -> bool:
    return bool(kubectl("-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "name"))


def apply(*manifests: Manifest) -> None:
    """Makes the objects, or changes them."""
    kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))


def make_namespace(name: str) -> str:
    """A new namespace; one that an earlier run on the same cluster has left is removed first."""
    kubectl("delete", "namespace", name, "--ignore-not-found", seconds=120)
    kubectl("create", "namespace", name)
    # Without it no pod is taken; the controller that makes it may be a while behind.
    wait_for("create", "serviceaccount/default", namespace=name, seconds=90)
    return name


def wait_until(condition: Callable[[], T | None], *, seconds: float, what: str, pause: float = 0.3) -> T:
    """Asks until the answer is true in Python's sense, and gives it. AssertionError with the last answer after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}; the last answer was {answer!r}")
        time.sleep(pause)


def wait_for(condition: str, *objects: str, namespace: str = CERTMOUNT, seconds: float = 60) -> None:
    """``kubectl wait``: Ready, delete, or a jsonpath, for all of the objects (kind/name, or kubectl's flags)."""
    target = condition if condition.startswith(("delete", "jsonpath", "create")) else f"condition={condition}"
    timeout = f"--timeout={seconds:g}s"
    kubectl("-n", namespace, "wait", f"--for={target}", timeout, *objects, seconds=seconds + 10)


def roll_out(*workloads: str, seconds: float = 90) -> None:
    """Waits until the workloads of certmount are as they were asked to be."""
    kubectl("-n", CERTMOUNT, "rollout", "status", *workloads, f"--timeout={seconds:g}s", seconds=seconds + 10)


def warnings_of(pod: str, namespace: str) -> Sequence[str]:
    """What the pod's author sees of its failed mounts: the messages of the events FailedMount."""
    selector = f"involvedObject.name={pod},reason=FailedMount"
    return [event["message"] for event in find("events", "--field-selector", selector, namespace=namespace)]
