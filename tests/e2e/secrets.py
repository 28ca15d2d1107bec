"""The Secrets controller on the cluster: installs it as an administrator does, and reads what it writes."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from csi_driver.core.certificates.csr import names_of
from tests.e2e import cluster, host

ACME, OWN, FLOOD, NO_ROLE = "e2e-secrets-acme", "e2e-secrets", "e2e-secrets-flood", "e2e-secrets-no-role"
ECHO, LIST = "echoserver", "notariat"
NAMESPACES = (ACME, OWN, FLOOD, NO_ROLE, ECHO, LIST)
DEPLOYMENT = "certmount-secrets"
DEPLOY = Path(__file__).parents[2] / "deploy"
_COMPONENT = Path(__file__).parent / "overlay" / "secrets"


def install(directory: Path) -> None:
    """Add the controller to certmount, with the Role in all namespaces but one."""
    for namespace in NAMESPACES:
        cluster.create_namespace(namespace)
        if namespace != NO_ROLE:
            cluster.kubectl("-n", namespace, "apply", "-k", str(DEPLOY / "components" / "secrets-namespace"))
    cluster.apply(_gateway_api())
    cluster.wait_for("Established", "customresourcedefinition/gateways.gateway.networking.k8s.io")
    paths = {
        "resources": os.environ["CERTMOUNT_E2E_OVERLAY"],
        "components": str(_COMPONENT),
    }
    relative = {key: [os.path.relpath(path, directory.resolve())] for key, path in paths.items()}
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **relative}
    (directory / "kustomization.yaml").write_text(json.dumps(kustomization), encoding="utf-8")
    cluster.kubectl("apply", "-k", str(directory))
    cluster.wait_for_rollout("deployment/certmount-authority", f"deployment/{DEPLOYMENT}")


def _gateway_api() -> Any:
    """Return the CustomResourceDefinition of Gateways, without its schema."""
    group = "gateway.networking.k8s.io"
    names = {"kind": "Gateway", "listKind": "GatewayList", "plural": "gateways", "singular": "gateway"}
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    # Groups of Kubernetes need this annotation; the published definition has the number of its review.
    approved = {"api-approved.kubernetes.io": "unapproved, for a test"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"gateways.{group}", "annotations": approved},
        "spec": {
            "group": group,
            "names": names,
            "scope": "Namespaced",
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }


def list_role() -> Sequence[Any]:
    """Return the Role and the RoleBinding to read a list, from the example overlay, for the tests' namespace."""
    documents = list(yaml.safe_load_all((DEPLOY / "overlay-example-secrets" / "list.yaml").read_text()))
    return [{**one, "metadata": {**one["metadata"], "namespace": LIST}} for one in documents]


def use_issuer(name: str) -> None:
    """Change the default issuer of the controller, which starts its replicas again."""
    variable = f"CERTMOUNT_SECRETS_DEFAULT_ISSUER={name}"
    cluster.kubectl("-n", cluster.CERTMOUNT, "set", "env", f"deployment/{DEPLOYMENT}", variable)
    cluster.wait_for_rollout(f"deployment/{DEPLOYMENT}")


def replicas() -> list[Any]:
    return host.pods_of(DEPLOYMENT)


def leader() -> Any:
    """Return the pod of the replica that works."""

    def find() -> Any:
        return next((pod for pod in replicas() if host.metric(pod, "certmount_secrets_leader")), None)

    return cluster.wait_until(find, seconds=40, what="a replica of the Secrets controller that works")


def ingress(
    name: str, namespace: str, tls: Mapping[str, Sequence[str]], *, issuer: str = "internal", **annotations: str
) -> dict[str, Any]:
    """Return an Ingress that requests certificates: the hosts of each Secret."""
    asked = {"kubernetes.io/tls-acme": "true", "certmount.dev/issuer": issuer}
    asked |= {f"certmount.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    backend = {"service": {"name": "site", "port": {"number": 80}}}
    host_rule = {"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": name, "namespace": namespace, "annotations": asked},
        "spec": {
            "ingressClassName": "nginx",
            "tls": [{"secretName": secret, "hosts": list(hosts)} for secret, hosts in tls.items()],
            "rules": [host_rule],
        },
    }


def restart() -> None:
    """Replace all replicas. The controller does not watch Secrets; it reads all of them when it starts."""
    names = [pod["metadata"]["name"] for pod in replicas()]
    cluster.kubectl("-n", cluster.CERTMOUNT, "delete", "pod", *names)
    cluster.wait_for_rollout(f"deployment/{DEPLOYMENT}")


def read(name: str, namespace: str) -> Any:
    """Return the Secret, or None."""
    found = cluster.find("secrets", "--field-selector", f"metadata.name={name}", namespace=namespace)
    return found[0] if found else None


def decoded(secret: Any, key: str) -> bytes:
    return base64.b64decode((secret.get("data") or {}).get(key, ""))


def certificate(secret: Any) -> x509.Certificate:
    return x509.load_pem_x509_certificates(decoded(secret, "tls.crt"))[0]


def is_valid_for(secret: Any, *names: str) -> bool:
    """Return True if key and certificate match, and the names are exactly these."""
    try:
        leaf = certificate(secret)
        key = load_pem_private_key(decoded(secret, "tls.key"), None)
    except ValueError:
        return False
    matches = key.public_key() == leaf.public_key()
    return matches and {str(name) for name in names_of(leaf.extensions).dns} == set(names)


def wait_for_certificate(
    name: str, namespace: str, *names: str, other_than: x509.Certificate | None = None, seconds: float = 30
) -> Any:
    """Wait until the Secret has a certificate with exactly these names; return the Secret."""

    def found() -> Any:
        secret = read(name, namespace)
        if secret is None or not is_valid_for(secret, *names):
            return None
        return None if other_than is not None and certificate(secret) == other_than else secret

    what = f"Secret {namespace}/{name} with a certificate for {', '.join(names)}"
    return cluster.wait_until(found, seconds=seconds, what=what)


def wait_for_event(name: str, namespace: str, reason: str, seconds: float = 30) -> str:
    """Return the message of an event on an Ingress, a Gateway or a ConfigMap."""
    what = f"an event {reason} on {namespace}/{name}"
    events = cluster.wait_until(lambda: cluster.events_of(name, namespace, reason=reason), seconds=seconds, what=what)
    return str(events[-1]["message"])
