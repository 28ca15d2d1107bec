"""Ingress objects (networking.k8s.io/v1) that route HTTP-01 requests of an ACME CA to the authority, one per token."""

from __future__ import annotations

import contextlib
import hashlib

from csi_driver.core.errors import Reason
from csi_driver.kube.client import Conflict, NotFound, call_api
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_json
from csi_driver.kube.metadata import MANAGED, Json

_PATH = "/.well-known/acme-challenge/"
LABELS = {**MANAGED, "app.kubernetes.io/component": "acme-challenge"}
"""To list them: ``kubectl get ingress -l app.kubernetes.io/component=acme-challenge``."""


class IngressRoutes:
    """The Ingresses are in the authority's namespace, as the Service that they route to.

    Needs the verbs create and delete on ingresses in that namespace.
    """

    def __init__(self, api: Api, namespace: str, service: str, port: int, ingress_class: str) -> None:
        self._api = api
        self._namespace = namespace
        self._service = service
        self._port = port
        self._class = ingress_class

    async def open(self, name: str, token: str) -> None:
        """Route requests for the token at the name to the Service, if no Ingress does so yet; raises CertmountError."""
        call = request_json(self._api, "POST", self._collection, body=self._object(name, token))
        with contextlib.suppress(Conflict):
            await call_api(call, Reason.ISSUER_UNAVAILABLE, f"Ingress for {name}")

    async def close(self, name: str, token: str) -> None:
        """Delete the Ingress, if it exists; raises CertmountError."""
        call = request_json(self._api, "DELETE", f"{self._collection}/{_object_name(name, token)}")
        with contextlib.suppress(NotFound):
            await call_api(call, Reason.ISSUER_UNAVAILABLE, f"Ingress for {name}")

    @property
    def _collection(self) -> str:
        return f"/apis/networking.k8s.io/v1/namespaces/{self._namespace}/ingresses"

    def _object(self, name: str, token: str) -> Json:
        backend = {"service": {"name": self._service, "port": {"number": self._port}}}
        # An exact path does not affect other requests to the site: controllers prefer the longest path.
        path = {"path": f"{_PATH}{token}", "pathType": "Exact", "backend": backend}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": {"name": _object_name(name, token), "namespace": self._namespace, "labels": LABELS},
            "spec": {"ingressClassName": self._class, "rules": [{"host": name, "http": {"paths": [path]}}]},
        }


def _object_name(name: str, token: str) -> str:
    """Return a name that is the same on all replicas."""
    return f"certmount-acme-{hashlib.sha256(f'{name} {token}'.encode()).hexdigest()[:20]}"
