"""Create, approve, sign, delete and watch CertificateSigningRequests."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

from kubernetes.aio import client

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition, CSRDraft
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ApiError, Conflict, call_api, invalid_response
from csi_driver.kube.csr_cache import CSRCache, read_csr
from csi_driver.kube.json_requests import request_json
from csi_driver.kube.metadata import InvalidObject, Json
from csi_driver.kube.permissions import Permission, has_permission
from csi_driver.kube.reflector import Reflector, WatchedResource, WatchTimings

_PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_SELF = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
_SELF_TARGET = "the authority's own account"
_TYPE = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
_MAX_MESSAGE = 1024  # characters; the API allows more, but people read conditions in a terminal
_MAX_ATTEMPTS = 3


class KubernetesCSRClient:
    """Each method raises CertmountError IssuerUnavailable, ApiError for an error response."""

    def __init__(self, api: client.ApiClient, watch_api: client.ApiClient, timings: WatchTimings | None = None) -> None:
        """``watch_api`` has its own connections, because a watch holds one permanently."""
        self._api = api
        self._watch_api = watch_api
        self._timings = timings

    async def own_username(self) -> str:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        review = await self._request("POST", _SELF, _SELF_TARGET, body)
        try:
            username = review["status"]["userInfo"]["username"]
        except (KeyError, TypeError):
            username = None
        if not isinstance(username, str) or not username:
            raise invalid_response(Reason.ISSUER_UNAVAILABLE, _SELF_TARGET)
        return username

    async def create(self, draft: CSRDraft) -> ClusterCSR:
        metadata = {
            "generateName": draft.name_prefix,
            "labels": dict(draft.labels),
            "annotations": dict(draft.annotations),
        }
        spec = {
            "signerName": draft.signer,
            "request": base64.b64encode(draft.request).decode("ascii"),
            "usages": list(draft.usages),
            "expirationSeconds": draft.expiration_s,
        }
        body = {**_TYPE, "metadata": metadata, "spec": spec}
        return _read(await self._request("POST", _PATH, "CertificateSigningRequest", body))

    async def decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        def change(status: Json, current: ClusterCSR) -> bool:
            if current.conditions:
                return False
            status["conditions"] = [_condition(condition)]
            return True

        return await self._update(csr, "approval", change)

    async def set_certificate(self, csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        def change(status: Json, current: ClusterCSR) -> bool:
            status["certificate"] = base64.b64encode(certificate).decode("ascii")
            return not current.finished

        return await self._update(csr, "status", change)

    async def fail(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        def change(status: Json, current: ClusterCSR) -> bool:
            status["conditions"] = [*(status.get("conditions") or ()), _condition(condition)]
            return not current.finished

        return await self._update(csr, "status", change)

    async def delete(self, csr: ClusterCSR) -> None:
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": csr.uid}}
        with contextlib.suppress(Conflict):  # another request has the name now
            try:
                await self._request("DELETE", f"{_PATH}/{csr.name}", _target(csr), body)
            except ApiError as error:
                if error.status != 404:
                    raise

    async def is_permitted(self, verb: str, resource: str, name: str = "") -> bool:
        return await has_permission(self._api, Permission(verb, "certificates.k8s.io", resource, name=name))

    def watch(self, sink: CSRCache, *, signer: str = "", labels: str = "") -> Reflector:
        """Return a reflector that updates ``sink`` with the requests for a signer, or with these labels (``key=value``)."""
        fields = f"spec.signerName={signer}" if signer else ""
        resource = WatchedResource("certificatesigningrequests", _PATH, field_selector=fields, label_selector=labels)
        return Reflector(self._watch_api, resource, sink, timings=self._timings)

    async def _update(
        self, csr: ClusterCSR, subresource: str, change: Callable[[Json, ClusterCSR], bool]
    ) -> ClusterCSR:
        """Apply ``change`` to the current status and write it, unless ``change`` returns False."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            item = await self._request("GET", f"{_PATH}/{csr.name}", _target(csr))
            current = _read(item)
            if current.uid != csr.uid:
                fault = Fault(_target(csr), "was deleted, and another request has its name")
                raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault)
            status = item.get("status") or {}
            if not change(status, current):
                return current
            # The API server requires kind and apiVersion, which items of a list do not have.
            body = {**item, **_TYPE, "status": status}
            try:
                return _read(await self._request("PUT", f"{_PATH}/{csr.name}/{subresource}", _target(csr), body))
            except Conflict:
                if attempt == _MAX_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _request(self, method: str, path: str, target: str, body: Json | None = None) -> Json:
        return await call_api(request_json(self._api, method, path, body=body), Reason.ISSUER_UNAVAILABLE, target)


def _read(item: Json) -> ClusterCSR:
    try:
        return read_csr(item)
    except InvalidObject:
        raise invalid_response(Reason.ISSUER_UNAVAILABLE, "CertificateSigningRequest") from None


def _target(csr: ClusterCSR) -> str:
    return f"CertificateSigningRequest {csr.name}"


def _condition(condition: CSRCondition) -> Json:
    return {
        "type": condition.kind,
        "status": "True",
        "reason": condition.reason,
        "message": condition.message[:_MAX_MESSAGE],
        "lastUpdateTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
