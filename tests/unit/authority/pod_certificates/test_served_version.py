"""An upgrade of the cluster changes the version of the API while the signer runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.errors import Reason
from csi_driver.core.names import Names
from csi_driver.kube.connection import Api, ApiConfiguration
from csi_driver.kube.pod_certificates.client import GROUP, REQUESTS, PodCertificateRequestClient
from tests.support.api_objects import envelope, frame
from tests.support.waiting import until
from tests.unit.authority.csr_signer.fakes import KEY
from tests.unit.authority.pod_certificates.test_signer import SIGNER, World, world
from tests.unit.kube.api_server import FakeApiServer
from tests.unit.kube.collection import Collection
from tests.unit.kube.test_pod_certificates import item

__all__ = ["world"]  # a fixture


class PodRequestServer(FakeApiServer):
    """Serves PodCertificateRequests in one version of the API."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = Collection()

    def discover(self, version: str, *writable: str) -> None:
        """Return this version from discovery, and accept the status of these requests in it."""
        status = {
            f"{GROUP}/{version}/namespaces/web/{REQUESTS}/{name}/status": envelope(item(name)) for name in writable
        }
        self.documents = {f"{GROUP}/{version}": {"resources": [{"name": REQUESTS}]}, **status}

    def serve(self, version: str, *writable: str) -> None:
        self.discover(version, *writable)
        self.collections = {f"{GROUP}/{version}/{REQUESTS}": self.watched}

    def create(self, name: str) -> None:
        request = item(
            name,
            signer_name=SIGNER.encode(),
            pod_name=b"edge-0",
            pod_uid=b"pod-uid",
            service_account_name=b"edge",
            node_name=b"node-a",
            stub_pkcs10_request=build_csr(KEY, Names()),
        )
        self.watched.send(frame("ADDED", request))

    @property
    def writes(self) -> list[tuple[str, str]]:
        """The version and the name of each request whose status the signer wrote."""
        found = [(body or {}, path) for method, path, body in self.requests if method == "PUT"]
        return [(body["apiVersion"].rpartition("/")[2], path.split("/")[-2]) for body, path in found]


@contextlib.asynccontextmanager
async def signing(world: World, server: PodRequestServer) -> AsyncIterator[None]:
    """Run the signer, which watches when the block starts."""
    async with Api(ApiConfiguration(url=server.url)) as api, world.running(PodCertificateRequestClient(api, api)):
        await until(lambda: server.watched.watching, "a watch")
        yield


async def test_version_of_an_upgraded_api_server_is_used_without_a_restart(world: World) -> None:
    server = PodRequestServer()
    server.serve("v1beta1", "one")
    async with contextlib.AsyncExitStack() as before, contextlib.AsyncExitStack() as signer:
        await before.enter_async_context(server.running())
        await signer.enter_async_context(signing(world, server))
        server.create("one")
        await until(lambda: world.results, "a result")
        await before.aclose()
        server.serve("v1", "two")
        server.create("two")
        async with server.running(port=server.port):
            await until(lambda: len(world.results) > 1, "a result in the new version")
    assert (server.writes, world.results) == ([("v1beta1", "one"), ("v1", "two")], [None, None])


async def test_request_whose_version_ended_before_the_write_is_retried(world: World) -> None:
    """The watch may continue, because another replica of the API server is not yet upgraded."""
    server = PodRequestServer()
    server.serve("v1beta1")
    async with server.running(), signing(world, server):
        server.discover("v1", "one")
        server.create("one")
        await until(lambda: len(world.results) > 1, "a retry")
    assert server.writes == [("v1beta1", "one"), ("v1", "one")]
    assert world.results == [Reason.ISSUER_UNAVAILABLE, None]


async def test_deleted_request_is_not_retried(world: World) -> None:
    server = PodRequestServer()
    server.serve("v1", "two")
    async with server.running(), signing(world, server):
        server.create("one")
        await until(lambda: world.results, "a result")
        server.create("two")
        await until(lambda: len(world.results) > 1, "a result of another request")
        await asyncio.sleep(0.1)  # ten retries
    assert server.writes == [("v1", "one"), ("v1", "two")]
