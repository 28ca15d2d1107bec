"""The nodes of the cluster, and on which of them the kubelet knows the driver (CSINode, storage.k8s.io/v1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kubernetes.aio import client

from csi_driver import DRIVER_NAME
from csi_driver.core.cluster.nodes import ClusterNodes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import answered
from csi_driver.kube.requests import ask

_PATH = "/apis/storage.k8s.io/v1/csinodes"
_PAGE = "500"
_MOST_PAGES = 100
_WHAT = "list of CSINodes"


class CsiNodes:
    """Asks the API server each time, as the answer decides whether a root may sign: no cache, no watch."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def list(self) -> ClusterNodes:
        """All nodes as they are now; raises CertmountError IssuerUnavailable."""
        found: dict[bool, set[str]] = {True: set(), False: set()}
        query = {"limit": _PAGE}
        for _ in range(_MOST_PAGES):
            page = await answered(ask(self._api, "GET", _PATH, query=query), Reason.ISSUER_UNAVAILABLE, _WHAT)
            for name, has_driver in _nodes(page):
                found[has_driver].add(name)
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return ClusterNodes(frozenset(found[True]), frozenset(found[False]))
            query = {"limit": _PAGE, "continue": more}
        raise _strange("it has no end")


def _nodes(page: Any) -> Iterator[tuple[str, bool]]:
    try:
        for item in page["items"] or ():
            drivers = (item.get("spec") or {}).get("drivers") or ()
            yield item["metadata"]["name"], any(driver["name"] == DRIVER_NAME for driver in drivers)
    except (KeyError, TypeError, AttributeError) as error:
        raise _strange(type(error).__name__) from None


def _strange(problem: str) -> CertmountError:
    return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(_WHAT, f"the API server's answer is strange ({problem})"))
