"""Three authority processes behind a model of a Service: crashes and restarts fail no call."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from cryptography import x509

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.errors import CertmountError
from csi_driver.core.names import DNSName, Names
from csi_driver.node.authority_client import AuthorityClient
from tests.integration.authority.test_command import Process
from tests.integration.authority.world import NAME, POD, World
from tests.support.driver import start
from tests.support.waiting import until

_NODES, _CALLS = 5, 500
_PROBE_S = 0.5  # between probes; until the next one the Service forwards connections to a replica that has stopped


class Replica(Process):
    """One of several authorities that share a store."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world)
        self.log = world.folder / f"log-{number}"
        self.arguments.append("--serving-name=localhost")
        self.process = start("authority", *self.arguments, log=self.log)

    def ready(self) -> bool:
        return self.get("/readyz") == (200, "ok\n")

    @property
    def issued(self) -> int:
        return self.log.read_text().count('"decision": "issued"')

    async def stop(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        await asyncio.to_thread(self.process.wait, 30)


class Service:
    """One address for the replicas that were ready at the last probe. It distributes connections in turn."""

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.endpoints: list[int] = []
        self.port = 0
        self._turn = 0
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        probes = asyncio.create_task(self._probe())
        try:
            yield
        finally:
            probes.cancel()
            server.close()
            await asyncio.sleep(0)  # so that connections that were just accepted are known
            for connection in list(self._connections):
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await asyncio.sleep(0)  # so that they close their sockets

    async def _probe(self) -> None:
        while True:
            replicas = self.replicas  # a test can replace the list at any time
            ready = await asyncio.gather(*(asyncio.to_thread(one.ready) for one in replicas))
            self.endpoints = [one.port for one, yes in zip(replicas, ready, strict=True) if yes]
            await asyncio.sleep(_PROBE_S)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            self._turn += 1
            port = self.endpoints[self._turn % len(self.endpoints)] if self.endpoints else 0
            responses, upstream = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_copy(reader, upstream), _copy(responses, writer))
        except OSError:
            pass  # the replica has stopped, so the client's connection is reset, as a Service does
        finally:
            self._connections.discard(task)
            for one in (writer, upstream):
                if one is not None:
                    one.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError("one side has closed")


class Nodes:
    """Clients of node drivers that request certificates concurrently."""

    def __init__(self, world: World, service: Service) -> None:
        token, root = world.folder / "node-token", world.ca / "authority.crt"
        token.write_text(world.issuer.node_token().reveal())
        self._world = world
        self.clients = [AuthorityClient(f"localhost:{service.port}", root, token) for _ in range(_NODES)]
        self._pods = [replace(POD, name=f"hello-{number}", uid=f"uid-{number}") for number in range(50)]
        self.requests = 0
        self.roots: set[tuple[bytes, ...]] = set()
        self.outcomes: Counter[str] = Counter()

    async def issue(self) -> None:
        number, self.requests = self.requests, self.requests + 1
        client, pod = self.clients[number % _NODES], self._pods[number % len(self._pods)]
        spec = CertificateSpec(Names.of([DNSName.parse(NAME)]))
        try:
            answer = await client.issue(self._world.csr(NAME), self._world.issuer.pod_token(pod), spec)
        except CertmountError as error:
            self.outcomes[str(error)] += 1
            return
        leaf, intermediate, *_ = map(x509.load_der_x509_certificate, answer.chain)
        leaf.verify_directly_issued_by(intermediate)
        self.roots.add(tuple(answer.trust["internal"].roots))
        self.outcomes["issued"] += 1


@pytest.fixture
async def service(idle_world: World) -> AsyncIterator[Service]:
    service = Service()
    service.replicas = [Replica(idle_world, number) for number in range(3)]
    try:
        async with service.serving():
            await until(lambda: len(service.endpoints) == 3, "three replicas", 60)
            yield service
    finally:
        for replica in service.replicas:
            await replica.stop(signal.SIGKILL)


@pytest.fixture
async def nodes(idle_world: World, service: Service) -> AsyncIterator[Nodes]:
    nodes = Nodes(idle_world, service)
    yield nodes
    for client in nodes.clients:
        await client.close()


async def test_killing_one_of_three_replicas_fails_no_call(idle_world: World, service: Service, nodes: Nodes) -> None:
    victim = service.replicas[0]

    async def worker() -> None:
        while nodes.requests < _CALLS:
            await nodes.issue()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(worker())
        await until(lambda: nodes.outcomes["issued"] >= 50 and victim.issued > 0, "a certificate from the victim")
        await victim.stop(signal.SIGKILL)
    assert nodes.outcomes == {"issued": nodes.requests}
    assert (nodes.requests >= _CALLS, len(nodes.roots)) == (True, 1)
    assert all(replica.issued > 0 for replica in service.replicas)
    assert not any("PRIVATE KEY" in file.read_text() for file in idle_world.folder.glob("log-*"))


async def test_rolling_restart_under_load_fails_no_call(idle_world: World, service: Service, nodes: Nodes) -> None:
    done = False

    async def request() -> None:
        while not done:
            await nodes.issue()
            # All clients together stay below the rate of a node, however long the restart takes.
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(request())
        for number, old in enumerate(list(service.replicas), 3):
            new = Replica(idle_world, number)
            service.replicas = [*service.replicas, new]
            await until(lambda new=new: new.port in service.endpoints, "the new replica", 60)  # type: ignore[misc]
            await old.stop(signal.SIGTERM)
            service.replicas = [one for one in service.replicas if one is not old]
            goal = nodes.outcomes["issued"] + 20
            await until(lambda goal=goal: nodes.outcomes["issued"] >= goal, "more certificates")  # type: ignore[misc]
        done = True
    assert nodes.outcomes == {"issued": nodes.requests}
    assert len(nodes.roots) == 1
