"""The list of nodes with and without the driver."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.aio import client

from csi_driver import DRIVER_NAME
from csi_driver.core.cluster.objects import ClusterNodes
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.csi_nodes import CSINodeClient
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.collection import Collection

PATH = "/apis/storage.k8s.io/v1/csinodes"


@pytest.fixture
def nodes(server: FakeApiServer) -> Collection:
    server.collections[PATH] = Collection()
    return server.collections[PATH]


def put(nodes: Collection, name: str, *drivers: str) -> None:
    spec = {"drivers": [{"name": driver, "nodeID": name, "topologyKeys": []} for driver in drivers] or None}
    nodes.put({"metadata": {"name": name}, "spec": spec})


async def test_nodes_are_separated_by_registration_of_the_driver(nodes: Collection, api: client.ApiClient) -> None:
    put(nodes, "both", "ebs.csi.aws.com", DRIVER_NAME)
    put(nodes, "other", "ebs.csi.aws.com")
    put(nodes, "bare")
    assert await CSINodeClient(api).list() == ClusterNodes(frozenset({"both"}), frozenset({"other", "bare"}))


async def test_nodes_are_listed_in_pages(nodes: Collection, api: client.ApiClient) -> None:
    for number in range(1100):
        put(nodes, f"node-{number}", DRIVER_NAME)
    assert len((await CSINodeClient(api).list()).with_driver) == 1100
    assert len(nodes.queries) == 3


async def test_empty_list_is_valid(nodes: Collection, api: client.ApiClient) -> None:
    assert not nodes.objects
    assert await CSINodeClient(api).list() == ClusterNodes(frozenset(), frozenset())


@pytest.mark.parametrize(
    "document",
    [{}, {"items": [{}]}, {"items": [7]}, {"items": [{"metadata": {"name": "a"}, "spec": {"drivers": [7]}}]}],
)
async def test_invalid_list_is_an_error(document: Any, server: FakeApiServer, api: client.ApiClient) -> None:
    server.documents[PATH] = document
    with pytest.raises(CertmountError, match="list of CSINodes: the API server sent an invalid response") as failure:
        await CSINodeClient(api).list()
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE


async def test_endless_list_is_an_error(server: FakeApiServer, api: client.ApiClient) -> None:
    server.documents[PATH] = {"items": [], "metadata": {"continue": "again"}}
    with pytest.raises(CertmountError, match="the list does not end"):
        await CSINodeClient(api).list()


async def test_missing_permission_is_reported(server: FakeApiServer, api: client.ApiClient) -> None:
    server.fail = (403, b'{"message": "csinodes is forbidden"}')
    with pytest.raises(CertmountError, match="403: csinodes is forbidden"):
        await CSINodeClient(api).list()
