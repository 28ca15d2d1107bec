"""Access to the cluster through kubectl, and conditions with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.waiting import wait_until

__all__ = ["wait_until"]  # the modules of these tests call it as a part of this one
Manifest = Mapping[str, Any]

CERTMOUNT = "certmount"  # the namespace of deploy/


class KubectlError(AssertionError):
    """A kubectl command failed. The message contains its output."""


def kubectl(*arguments: str, text: str | None = None, seconds: float = 60) -> str:
    """Run kubectl with ``text`` as its input, and return its output. Raises KubectlError."""
    command = ["kubectl", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise KubectlError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def ca_file() -> Path:
    """Return the file with the root certificate of the API server."""
    return Path(os.environ["LOCALKUBE_RUN"]) / "pki" / "ca.crt"


def kubectl_with_token(token: str, *arguments: str) -> str:
    """Run kubectl with a token as its only credential."""
    server = ("--kubeconfig=/dev/null", "--server=https://127.0.0.1:6443", f"--certificate-authority={ca_file()}")
    return kubectl(*server, f"--token={token}", *arguments)


def get(kind: str, name: str, namespace: str = CERTMOUNT) -> Any:
    return json.loads(kubectl("-n", namespace, "get", kind, name, "-o", "json"))


def find(kind: str, *selection: str, namespace: str = CERTMOUNT) -> list[Any]:
    """Return the objects that kubectl's flags in ``selection`` select."""
    return list(json.loads(kubectl("-n", namespace, "get", kind, *selection, "-o", "json"))["items"])


def apply(*manifests: Manifest) -> None:
    kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))


def patch_config_map(name: str, data: Mapping[str, str]) -> None:
    kubectl("-n", CERTMOUNT, "patch", "configmap", name, "--type=merge", "-p", json.dumps({"data": data}))


def change_policy(change: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``change`` to the policy document."""
    policy = yaml.safe_load(get("configmap", "certmount-policy")["data"]["policy.yaml"]) or {}
    change(policy)
    patch_config_map("certmount-policy", {"policy.yaml": json.dumps(policy)})


@contextmanager
def restored_configuration() -> Iterator[None]:
    before = {name: get("configmap", name)["data"] for name in ("certmount-issuers", "certmount-policy")}
    yield
    for name, data in before.items():
        patch_config_map(name, data)


def create_namespace(name: str) -> str:
    """Create a namespace; delete one that an earlier run left."""
    kubectl("delete", "namespace", name, "--ignore-not-found", seconds=120)
    kubectl("create", "namespace", name)
    # The API server rejects pods until a controller has created the service account.
    wait_for("create", "serviceaccount/default", namespace=name, seconds=90)
    return name


def delete_namespace(*names: str) -> None:
    kubectl("delete", "namespace", *names, "--ignore-not-found", "--wait=false")


def wait_for(condition: str, *objects: str, namespace: str = CERTMOUNT, seconds: float = 60) -> None:
    """Run ``kubectl wait`` for a condition, delete, create or a jsonpath of the objects (kind/name, or kubectl's flags)."""
    target = condition if condition.startswith(("delete", "jsonpath", "create")) else f"condition={condition}"
    timeout = f"--timeout={seconds:g}s"
    kubectl("-n", namespace, "wait", f"--for={target}", timeout, *objects, seconds=seconds + 10)


def wait_for_rollout(*workloads: str, seconds: float = 90) -> None:
    """Wait until the rollout of certmount's workloads is complete; of the authority by default."""
    names = workloads or ("deployment/certmount-authority",)
    kubectl("-n", CERTMOUNT, "rollout", "status", *names, f"--timeout={seconds:g}s", seconds=seconds + 10)


def restart_authority() -> None:
    """Replace all replicas of the authority, so that they read a changed ConfigMap at once."""
    kubectl("-n", CERTMOUNT, "rollout", "restart", "deployment/certmount-authority")
    wait_for_rollout()


@contextmanager
def stopped_authority() -> Iterator[None]:
    """Stop all replicas of the authority; start two at the end."""
    kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=0")
    try:
        wait_for("delete", "pod", "-l", "app.kubernetes.io/name=certmount-authority")
        yield
    finally:
        kubectl("-n", CERTMOUNT, "scale", "deployment/certmount-authority", "--replicas=2")
        wait_for_rollout()


def events_of(pod: str, namespace: str, **fields: str) -> list[Any]:
    """Return the events on a pod that have these fields, such as ``reason``."""
    selector = ",".join(f"{field}={value}" for field, value in {"involvedObject.name": pod, **fields}.items())
    return find("events", "--field-selector", selector, namespace=namespace)


def wait_for_mount_failure(pod: str, namespace: str, seconds: float = 30) -> str:
    """Return the message of the pod's first FailedMount event."""
    what = f"a FailedMount event of {pod}"
    events = wait_until(lambda: events_of(pod, namespace, reason="FailedMount"), seconds=seconds, what=what)
    return str(events[0]["message"])
