"""Which nodes have said that all their volumes trust a state of the CA's roots: merged by all replicas into one small object."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from csi_driver.authority.storage import Store
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.cluster.nodes import ClusterNodes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

ACKNOWLEDGEMENTS_FILE = "confirmations.json"
"""In a store; outside a cluster also the file, beside the CA's."""
ACKNOWLEDGEMENTS_SECRET = "certmount-confirmations"
"""In a cluster, in the namespace of the CA's."""
MOST_NODES = 20_000
"""Four times the nodes of the largest supported cluster, as names come and go; 620 kB, of which a Secret takes 1 MiB."""
_PAUSE_S = 1.0
"""Between two writes of one replica: thousands of nodes confirm within ten seconds."""
_MOST_CONFLICTS = 10


class NodeList(Protocol):
    """Whoever knows which nodes there are."""

    async def list(self) -> ClusterNodes:
        """As of now; raises CertmountError."""


@dataclass(slots=True)
class _Batch:
    marks: dict[str, int] = field(default_factory=dict)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    failure: CertmountError | None = None


class AcknowledgementStore:
    """Kept by a node's mark, see :func:`node_hash`, with the highest generation that it has confirmed."""

    def __init__(self, store: Store, generation: Callable[[], int], pause_s: float = _PAUSE_S) -> None:
        """``generation`` is that of the CA's roots as this replica knows them."""
        self._store = store
        self._generation = generation
        self._pause_s = pause_s
        self._batch = _Batch()
        self._wanted = asyncio.Event()

    async def confirm(self, node: str, set_name: str, generation: int, /) -> None:
        """Returns when it is written, so that nothing a node was thanked for is lost. Needs :meth:`run`.

        Raises:
            CertmountError: IssuerUnavailable for a generation that this replica has not heard of yet, or what the store raised.
        """
        current = self._generation()
        if set_name != DEFAULT_ISSUER or generation < current:
            return  # nothing waits for it
        if generation > current:
            # Whatever a node makes up must not pass for a generation to come.
            problem = f"this replica knows of generation {current} of {set_name} only; try again"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault("generation", problem))
        batch = self._batch
        batch.marks[node_hash(node)] = generation
        self._wanted.set()
        await batch.done.wait()
        if batch.failure is not None:
            raise CertmountError(batch.failure.reason, *batch.failure.faults)

    async def run(self) -> None:
        """Writes what was confirmed, at most once a second. For ever."""
        while True:
            await self._wanted.wait()
            batch, self._batch = self._batch, _Batch()
            self._wanted.clear()
            try:
                await self._merge(batch.marks)
            except CertmountError as error:
                log.warning("confirmations not written", reason=error.reason.word, error=str(error))
                batch.failure = error
            finally:
                batch.done.set()
            await asyncio.sleep(self._pause_s)

    async def read(self) -> Mapping[str, int]:
        """The generation that each node has confirmed last, by the node's mark; raises CertmountError."""
        stored = await self._store.load()
        return _parse(stored.values, self._store.name)

    async def forget(self, name: str) -> bool:
        """A node (its name or mark) is no longer waited for unless its driver is there; False for one that is not known."""
        gone = {name, node_hash(name)}
        return await self._change(lambda marks: {each: value for each, value in marks.items() if each not in gone})

    async def _merge(self, news: Mapping[str, int]) -> None:
        def merged(marks: Mapping[str, int]) -> Mapping[str, int]:
            newer = {name: max(value, marks.get(name, 0)) for name, value in news.items()}
            return _bounded({**marks, **newer})

        await self._change(merged)

    async def _change(self, step: Callable[[Mapping[str, int]], Mapping[str, int]]) -> bool:
        for _ in range(_MOST_CONFLICTS):
            stored = await self._store.load()
            before = _parse(stored.values, self._store.name)
            after = step(before)
            if after == before:
                return False
            document = json.dumps({"set": DEFAULT_ISSUER, "nodes": after}, separators=(",", ":"))
            if await self._store.save({ACKNOWLEDGEMENTS_FILE: Secret(document.encode("ascii"))}, stored):
                return True
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"{self._store.name}: other writers came first again and again")


class AcknowledgingNodes:
    """Joins the nodes that there are with what they have confirmed."""

    def __init__(self, confirmations: AcknowledgementStore, nodes: NodeList, metrics: AuthorityMetrics) -> None:
        self._confirmations = confirmations
        self._nodes = nodes
        self._metrics = metrics

    async def look(self, generation: int) -> tuple[frozenset[str], frozenset[str]]:
        """Those that have confirmed this generation, and those that must; raises CertmountError."""
        confirmed, expected = judge(await self._nodes.list(), await self._confirmations.read(), generation)
        self._metrics.unconfirmed.set(len(expected - confirmed))
        return confirmed, expected


class ConnectedNodes:
    """Outside of a cluster: the nodes with a trust stream at this replica; of others no one can say more than that they confirmed once."""

    def __init__(self, trust: TrustBundles) -> None:
        self._trust = trust

    async def list(self) -> ClusterNodes:
        """Those that are connected now."""
        return ClusterNodes(self._trust.nodes, None)


def judge(nodes: ClusterNodes, marks: Mapping[str, int], generation: int) -> tuple[frozenset[str], frozenset[str]]:
    """The nodes that have confirmed, and those that must: where the driver is, or was while its volumes may still be there.

    A driver that is being updated is not registered for a while, but its pods go on. Where no one can say which other
    nodes there are, all that ever confirmed must, and those without a name are called by their marks.
    """
    names = {node_hash(name): name for name in (*nodes.serving, *(nodes.others or ()))}
    if nodes.others is None:
        names |= {each: each for each in marks if each not in names}
    confirmed = frozenset(name for each, name in names.items() if marks.get(each, -1) >= generation)
    were_there = frozenset(name for each, name in names.items() if each in marks)
    return confirmed, nodes.serving | were_there


def node_hash(node: str) -> str:
    """16 hexadecimal digits for a node's name, as twenty thousand names would not fit a Secret."""
    return hashlib.sha256(node.encode()).hexdigest()[:16]


def _bounded(marks: Mapping[str, int]) -> Mapping[str, int]:
    if len(marks) <= MOST_NODES:
        return marks
    newest = sorted(marks.items(), key=lambda item: item[1], reverse=True)
    return dict(newest[:MOST_NODES])


def _parse(values: Mapping[str, Secret[bytes]], where: str) -> Mapping[str, int]:
    """What is damaged counts for nothing: nodes confirm again with their next stream, within half an hour."""
    if ACKNOWLEDGEMENTS_FILE not in values:
        return {}
    try:
        document = json.loads(values[ACKNOWLEDGEMENTS_FILE].reveal())
        return {str(each): int(value) for each, value in document["nodes"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        log.error("confirmations are damaged and begun anew", store=where)  # noqa: TRY400  # no traceback is of use
        return {}
