"""Create, approve, sign, delete and watch CertificateSigningRequests."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable

from csi_driver._proto import kubernetes_pb2
from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition, CSRDraft
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import Conflict, NotFound, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.csr.cache import CSRCache
from csi_driver.kube.json_requests import request_json, request_object
from csi_driver.kube.metadata import InvalidObject, Json
from csi_driver.kube.objects import convert_csr, read_csr
from csi_driver.kube.permissions import Permission, has_permission
from csi_driver.kube.reflector import Reflector, WatchedResource
from csi_driver.kube.response_stream import in_envelope

_PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_SELF = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
_SELF_TARGET = "the authority's own account"
_API_VERSION, _KIND = "certificates.k8s.io/v1", "CertificateSigningRequest"
_Request = kubernetes_pb2.CertificateSigningRequest
_Status = kubernetes_pb2.CertificateSigningRequestStatus
_MAX_MESSAGE = 1024  # characters; the API allows more, but people read conditions in a terminal
_MAX_ATTEMPTS = 3


class KubernetesCSRClient:
    """Each method raises CertmountError IssuerUnavailable, ApiError for an error response."""

    def __init__(self, api: Api, watch_api: Api) -> None:
        """``watch_api`` has its own connections, because a watch holds one permanently."""
        self._api = api
        self._watch_api = watch_api

    async def own_username(self) -> str:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        review = await call_api(
            request_json(self._api, "POST", _SELF, body=body), Reason.ISSUER_UNAVAILABLE, _SELF_TARGET
        )
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
        body = {"apiVersion": _API_VERSION, "kind": _KIND, "metadata": metadata, "spec": spec}
        return _convert(await self._request("POST", _PATH, _KIND, body))

    async def decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        def change(status: _Status, current: ClusterCSR) -> bool:
            if current.conditions:
                return False
            _add_condition(status, condition)
            return True

        return await self._update(csr, "approval", change)

    async def set_certificate(self, csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        def change(status: _Status, current: ClusterCSR) -> bool:
            status.certificate = certificate
            return not current.finished

        return await self._update(csr, "status", change)

    async def fail(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        def change(status: _Status, current: ClusterCSR) -> bool:
            _add_condition(status, condition)
            return not current.finished

        return await self._update(csr, "status", change)

    async def delete(self, csr: ClusterCSR) -> None:
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": csr.uid}}
        with contextlib.suppress(NotFound, Conflict):  # after a conflict, another request has the name
            call = request_object(self._api, "DELETE", f"{_PATH}/{csr.name}", kubernetes_pb2.Status, body=body)
            await call_api(call, Reason.ISSUER_UNAVAILABLE, _target(csr))

    async def is_permitted(self, verb: str, resource: str, name: str = "") -> bool:
        return await has_permission(self._api, Permission(verb, "certificates.k8s.io", resource, name=name))

    def watch(self, sink: CSRCache, *, signer: str = "", labels: str = "") -> Reflector[ClusterCSR]:
        """Return a reflector that updates ``sink`` with the requests for a signer, or with these labels (``key=value``)."""
        fields = f"spec.signerName={signer}" if signer else ""
        resource = WatchedResource(
            "certificatesigningrequests", _PATH, read_csr, field_selector=fields, label_selector=labels
        )
        return Reflector(self._watch_api, resource, sink)

    async def _update(
        self, csr: ClusterCSR, subresource: str, change: Callable[[_Status, ClusterCSR], bool]
    ) -> ClusterCSR:
        """Apply ``change`` to the current status and write it, unless ``change`` returns False."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            item = await self._request("GET", f"{_PATH}/{csr.name}", _target(csr))
            current = _convert(item)
            if current.uid != csr.uid:
                fault = Fault(_target(csr), "was deleted, and another request has its name")
                raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault)
            if not change(item.status, current):
                return current
            # Fields that certmount does not know stay in the message.
            body = in_envelope(_API_VERSION, _KIND, item)
            try:
                return _convert(await self._request("PUT", f"{_PATH}/{csr.name}/{subresource}", _target(csr), body))
            except Conflict:
                if attempt == _MAX_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _request(self, method: str, path: str, target: str, body: Json | bytes | None = None) -> _Request:
        call = request_object(self._api, method, path, _Request, body=body)
        return await call_api(call, Reason.ISSUER_UNAVAILABLE, target)


def _convert(item: _Request) -> ClusterCSR:
    try:
        return convert_csr(item)
    except InvalidObject:
        raise invalid_response(Reason.ISSUER_UNAVAILABLE, _KIND) from None


def _target(csr: ClusterCSR) -> str:
    return f"{_KIND} {csr.name}"


def _add_condition(status: _Status, condition: CSRCondition) -> None:
    added = status.conditions.add(
        type=condition.kind,
        status="True",
        reason=condition.reason.encode(),
        message=condition.message[:_MAX_MESSAGE].encode(),
    )
    added.last_update_time.seconds = int(time.time())
