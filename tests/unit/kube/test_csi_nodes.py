"""The list of nodes with and without the driver."""

from __future__ import annotations

import pytest

from csi_driver import DRIVER_NAME
from csi_driver.core.cluster.objects import ClusterNodes
from csi_driver.core.errors import CertmountError
from csi_driver.kube import lists
from csi_driver.kube.connection import Api
from csi_driver.kube.uncached_reads import CSINodeClient
from tests.support.api_objects import encode, encode_list, envelope
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.collection import Collection

PATH = "/apis/storage.k8s.io/v1/csinodes"


@pytest.fixture
def nodes(server: FakeApiServer) -> Collection:
    server.collections[PATH] = Collection("CSINode")
    return server.collections[PATH]


def put(nodes: Collection, name: str, *drivers: str) -> None:
    spec = {"drivers": [{"name": driver, "nodeID": name, "topologyKeys": []} for driver in drivers] or None}
    nodes.put({"metadata": {"name": name}, "spec": spec})


async def test_nodes_are_separated_by_registration_of_the_driver(nodes: Collection, api: Api) -> None:
    put(nodes, "both", "ebs.csi.aws.com", DRIVER_NAME)
    put(nodes, "other", "ebs.csi.aws.com")
    put(nodes, "bare")
    assert await CSINodeClient(api).list() == ClusterNodes(frozenset({"both"}), frozenset({"other", "bare"}))


async def test_nodes_are_listed_in_pages(nodes: Collection, api: Api) -> None:
    for number in range(1100):
        put(nodes, f"node-{number}", DRIVER_NAME)
    assert len((await CSINodeClient(api).list()).with_driver) == 1100
    assert len(nodes.queries) == 5


async def test_empty_list_is_valid(nodes: Collection, api: Api) -> None:
    assert not nodes.objects
    assert await CSINodeClient(api).list() == ClusterNodes(frozenset(), frozenset())


@pytest.mark.parametrize(
    "document", [b"{}", b"k8s\0", encode_list([encode({})], "1"), encode_list([b"\xff"], "1"), envelope(b"", "List")]
)
async def test_invalid_list_is_an_error(document: bytes, server: FakeApiServer, api: Api) -> None:
    server.documents[PATH] = document
    with pytest.raises(
        CertmountError, match=r"^IssuerUnavailable: .*list of CSINodes: the API server sent an invalid response"
    ):
        await CSINodeClient(api).list()


async def test_endless_list_fails(server: FakeApiServer, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_PAGES", 5)
    server.documents[PATH] = encode_list([], "1", "again")
    with pytest.raises(CertmountError, match="the list does not end"):
        await CSINodeClient(api).list()


async def test_missing_permission_is_reported(server: FakeApiServer, api: Api) -> None:
    server.fail = (403, b'{"message": "csinodes is forbidden"}')
    with pytest.raises(CertmountError, match="403: csinodes is forbidden"):
        await CSINodeClient(api).list()
