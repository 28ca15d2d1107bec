"""Ingress objects (networking.k8s.io/v1) that lead an ACME CA's requests to the authority, one for each token."""

from __future__ import annotations

import contextlib
import hashlib

from kubernetes.aio import client

from csi_driver.core.errors import Reason
from csi_driver.kube.client import ApiError, Conflict, answered
from csi_driver.kube.metadata import Json
from csi_driver.kube.requests import ask

_PATH = "/.well-known/acme-challenge/"
LABELS = {"app.kubernetes.io/managed-by": "certmount", "app.kubernetes.io/component": "acme-challenge"}
"""By these an administrator finds them all: ``kubectl get ingress -l app.kubernetes.io/component=acme-challenge``."""


class IngressRoutes:
    """Makes and removes them in the authority's own namespace, beside the Service that they lead to.

    Needs create and delete of ``ingresses`` in that namespace, and nothing else.
    """

    def __init__(self, api: client.ApiClient, namespace: str, service: str, port: int, ingress_class: str) -> None:
        self._api = api
        self._namespace = namespace
        self._service = service
        self._port = port
        self._class = ingress_class

    async def open(self, name: str, token: str) -> None:
        """Has requests for the token at the name lead to the Service; also where they do already. Raises CertmountError."""
        call = ask(self._api, "POST", self._collection, body=self._object(name, token))
        with contextlib.suppress(Conflict):
            await answered(call, Reason.ISSUER_UNAVAILABLE, f"Ingress for {name}")

    async def close(self, name: str, token: str) -> None:
        """Removes it; also where it is not there. Raises CertmountError."""
        call = ask(self._api, "DELETE", f"{self._collection}/{_object_name(name, token)}")
        try:
            await answered(call, Reason.ISSUER_UNAVAILABLE, f"Ingress for {name}")
        except ApiError as error:
            if error.status != 404:
                raise

    @property
    def _collection(self) -> str:
        return f"/apis/networking.k8s.io/v1/namespaces/{self._namespace}/ingresses"

    def _object(self, name: str, token: str) -> Json:
        backend = {"service": {"name": self._service, "port": {"number": self._port}}}
        # Exact, so that nothing else of the site is touched: controllers put the longest path first.
        path = {"path": f"{_PATH}{token}", "pathType": "Exact", "backend": backend}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": {"name": _object_name(name, token), "namespace": self._namespace, "labels": LABELS},
            "spec": {"ingressClassName": self._class, "rules": [{"host": name, "http": {"paths": [path]}}]},
        }


def _object_name(name: str, token: str) -> str:
    """The same for the same challenge, whichever replica makes it."""
    return f"certmount-acme-{hashlib.sha256(f'{name} {token}'.encode()).hexdigest()[:20]}"
