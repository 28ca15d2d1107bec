"""List the cluster's nodes and those on which the driver is registered (CSINode, storage.k8s.io/v1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kubernetes.aio import client

from csi_driver import DRIVER_NAME
from csi_driver.core.cluster.objects import ClusterNodes
from csi_driver.core.errors import Reason
from csi_driver.kube.client import call_api, invalid_response
from csi_driver.kube.json_requests import request_json

_PATH = "/apis/storage.k8s.io/v1/csinodes"
_PAGE_SIZE = "500"
_MAX_PAGES = 100
_TARGET = "list of CSINodes"


class CSINodeClient:
    """Lists without a cache or a watch, because the result decides whether a new root can sign."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def list(self) -> ClusterNodes:
        """Return the current nodes; raises CertmountError IssuerUnavailable."""
        found: dict[bool, set[str]] = {True: set(), False: set()}
        query = {"limit": _PAGE_SIZE}
        for _ in range(_MAX_PAGES):
            call = request_json(self._api, "GET", _PATH, query=query)
            page = await call_api(call, Reason.ISSUER_UNAVAILABLE, _TARGET)
            for name, has_driver in _nodes(page):
                found[has_driver].add(name)
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return ClusterNodes(frozenset(found[True]), frozenset(found[False]))
            query = {"limit": _PAGE_SIZE, "continue": token}
        raise invalid_response(Reason.ISSUER_UNAVAILABLE, _TARGET, "the list does not end")


def _nodes(page: Any) -> Iterator[tuple[str, bool]]:
    try:
        for item in page["items"] or ():
            drivers = (item.get("spec") or {}).get("drivers") or ()
            yield item["metadata"]["name"], any(driver["name"] == DRIVER_NAME for driver in drivers)
    except (KeyError, TypeError, AttributeError) as error:
        raise invalid_response(Reason.ISSUER_UNAVAILABLE, _TARGET, type(error).__name__) from None
