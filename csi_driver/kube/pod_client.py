"""Read one pod from the API server, for the fields that the caches do not have."""

from __future__ import annotations

from kubernetes.aio import client

from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.errors import Reason
from csi_driver.kube.client import ApiError, call_api, invalid_response
from csi_driver.kube.json_requests import request_json

_FINISHED = ("Succeeded", "Failed")


class PodClient:
    """Needs the verb get on pods. Failures have the reason TokenReviewUnavailable."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def find(self, namespace: str, name: str) -> LivePod | None:
        target, path = f"pod {namespace}/{name}", f"/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            item = await call_api(request_json(self._api, "GET", path), Reason.TOKEN_REVIEW_UNAVAILABLE, target)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        try:
            return LivePod(
                uid=item["metadata"]["uid"],
                service_account=item["spec"]["serviceAccountName"],
                node_name=item["spec"].get("nodeName") or "",
                terminating="deletionTimestamp" in item["metadata"] or item["status"].get("phase") in _FINISHED,
            )
        except (KeyError, TypeError, AttributeError):
            raise invalid_response(Reason.TOKEN_REVIEW_UNAVAILABLE, target) from None
