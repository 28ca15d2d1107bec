"""A pod as it is now, by one request: what the caches of labels don't know."""

from __future__ import annotations

from kubernetes.aio import client

from csi_driver.core.cluster.pod import LivePod
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ApiError, answered
from csi_driver.kube.requests import ask

_ENDED = ("Succeeded", "Failed")


class LivePods:
    """Needs get on pods."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def find(self, namespace: str, name: str) -> LivePod | None:
        """The pod; None where there is none. Raises CertmountError TokenReviewUnavailable."""
        what = f"pod {namespace}/{name}"
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            item = await answered(ask(self._api, "GET", path), Reason.TOKEN_REVIEW_UNAVAILABLE, what)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        try:
            return LivePod(
                uid=item["metadata"]["uid"],
                service_account=item["spec"]["serviceAccountName"],
                node_name=item["spec"].get("nodeName") or "",
                ending="deletionTimestamp" in item["metadata"] or item["status"].get("phase") in _ENDED,
            )
        except (KeyError, TypeError, AttributeError):
            problem = "the API server's answer is strange"
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault(what, problem)) from None
