"""What the authority reads without a cache: one pod, and the nodes on which the driver is registered (CSINode)."""

from __future__ import annotations

from csi_driver import DRIVER_NAME
from csi_driver._proto.kubernetes_pb2 import Pod
from csi_driver.core.cluster.objects import ClusterNodes, LivePod
from csi_driver.core.errors import Reason
from csi_driver.kube.client import NotFound, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_object
from csi_driver.kube.lists import list_pages
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.objects import convert_pod, read_csi_node

_PATH = "/apis/storage.k8s.io/v1/csinodes"
_TARGET = "list of CSINodes"


class CSINodeClient:
    """Lists without a cache or a watch, because the result decides whether a new root can sign."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def list(self) -> ClusterNodes:
        """Return the current nodes; raises CertmountError IssuerUnavailable."""
        found: dict[bool, set[str]] = {True: set(), False: set()}

        def put(data: bytes) -> None:
            name, has_driver = read_csi_node(data, DRIVER_NAME)
            found[has_driver].add(name)

        try:
            await call_api(list_pages(self._api, _PATH, put), Reason.ISSUER_UNAVAILABLE, _TARGET)
        except InvalidObject as error:
            raise invalid_response(Reason.ISSUER_UNAVAILABLE, _TARGET, str(error)) from None
        return ClusterNodes(frozenset(found[True]), frozenset(found[False]))


class PodClient:
    """Needs the verb get on pods. Failures have the reason TokenReviewUnavailable."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def find(self, namespace: str, name: str) -> LivePod | None:
        target, path = f"pod {namespace}/{name}", f"/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            item = await call_api(request_object(self._api, "GET", path, Pod), Reason.TOKEN_REVIEW_UNAVAILABLE, target)
        except NotFound:
            return None
        try:
            return convert_pod(item)
        except InvalidObject as error:
            raise invalid_response(Reason.TOKEN_REVIEW_UNAVAILABLE, target, str(error)) from None
