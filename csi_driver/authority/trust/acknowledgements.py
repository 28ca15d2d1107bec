"""Store which nodes have acknowledged a generation of the CA's roots: the replicas merge this into one stored object."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.storage import Store, Values, update
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.cluster.objects import ClusterNodes
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.core.spec import DEFAULT_ISSUER

log = structlog.get_logger(__name__)

ACKNOWLEDGEMENTS_FILE = "acknowledgements.json"
"""The value in the store. Outside a cluster, also the file next to the CA's file."""
ACKNOWLEDGEMENTS_SECRET = "certmount-acknowledgements"  # a name, not a secret
"""In a cluster, in the namespace of the CA's Secret."""
MAX_NODES = 20_000
"""Four times the nodes of the largest supported cluster, because nodes are replaced. They need 620 kB; a Secret holds 1 MiB."""
_WRITE_INTERVAL_S = 1.0  # for each replica: thousands of nodes acknowledge a generation within ten seconds
Generations = Mapping[str, int]  # the latest generation that each node acknowledged, by node_hash


class NodeList(Protocol):
    """Knows which nodes there are."""

    async def list(self) -> ClusterNodes:
        """Return the current nodes; raise CertmountError."""


@dataclass(slots=True)
class _Batch:
    generations: dict[str, int] = field(default_factory=dict)
    written: asyncio.Event = field(default_factory=asyncio.Event)
    error: CertmountError | None = None


class AcknowledgementStore:
    """Stores the highest generation that each node has acknowledged."""

    def __init__(
        self, store: Store, current_generation: Callable[[], int], write_interval_s: float = _WRITE_INTERVAL_S
    ) -> None:
        """``current_generation`` returns the generation of the CA's roots that this replica knows."""
        self._store = store
        self._current_generation = current_generation
        self._write_interval_s = write_interval_s
        self._batch = _Batch()
        self._pending = asyncio.Event()

    async def acknowledge(self, node: str, set_name: str, generation: int, /) -> None:
        """Store an acknowledgement, and return when it is stored. Needs :meth:`run`.

        Raises CertmountError IssuerUnavailable for a generation that this replica doesn't know yet, or what the store raises.
        """
        current = self._current_generation()
        if set_name != DEFAULT_ISSUER or generation < current:
            return  # no rotation waits for it
        if generation > current:
            # A node must not be able to acknowledge generations in advance.
            problem = f"this replica knows only generation {current} of {set_name}"
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault("generation", problem, "retry"))
        batch = self._batch
        batch.generations[node_hash(node)] = generation
        self._pending.set()
        await batch.written.wait()
        if batch.error is not None:
            raise CertmountError(batch.error.reason, *batch.error.faults)

    async def run(self) -> None:
        """Write new acknowledgements in batches until cancelled, at most one per second."""
        while True:
            await self._pending.wait()
            batch, self._batch = self._batch, _Batch()
            self._pending.clear()
            try:
                await self._merge(batch.generations)
            except CertmountError as error:
                log.warning("node acknowledgements not stored", reason=error.reason.word, error=str(error))
                batch.error = error
            finally:
                batch.written.set()
            await asyncio.sleep(self._write_interval_s)

    async def read(self) -> Generations:
        """Return the stored acknowledgements; raise CertmountError."""
        return _parse(await self._store.load(), self._store.name)

    async def forget(self, node: str) -> bool:
        """Remove the acknowledgement of a node (name or hash), so that it must acknowledge only while its driver runs.

        Returns False if the node is unknown.
        """
        removed = {node, node_hash(node)}
        return await self._update(lambda stored: {each: stored[each] for each in stored if each not in removed})

    async def _merge(self, new: Generations) -> None:
        def merge(stored: Generations) -> Generations:
            merged = {**stored, **{node: max(generation, stored.get(node, 0)) for node, generation in new.items()}}
            newest = sorted(merged.items(), key=lambda item: item[1], reverse=True)[:MAX_NODES]
            return merged if len(merged) <= MAX_NODES else dict(newest)

        await self._update(merge)

    async def _update(self, change: Callable[[Generations], Generations]) -> bool:
        async def step(stored: StoredSecrets) -> tuple[Values | None, bool]:
            before = _parse(stored, self._store.name)
            after = change(before)
            if after == before:
                return None, False
            document = json.dumps({"set": DEFAULT_ISSUER, "nodes": after}, separators=(",", ":"))
            return {ACKNOWLEDGEMENTS_FILE: Secret(document.encode("ascii"))}, True

        return await update(self._store, step)


@dataclass(frozen=True, slots=True)
class AcknowledgingNodes:
    """Combines the list of nodes with their acknowledgements, for the rotation."""

    store: AcknowledgementStore
    nodes: NodeList

    async def read(self, generation: int) -> Acknowledgements:
        """Return who has acknowledged the generation and who must; raise CertmountError."""
        return acknowledgements(await self.nodes.list(), await self.store.read(), generation)


@dataclass(frozen=True, slots=True)
class ConnectedNodes:
    """Outside a cluster: the nodes with a trust stream to this replica. Other nodes are unknown."""

    trust: TrustBundles

    async def list(self) -> ClusterNodes:
        return ClusterNodes(self.trust.nodes, None)


def acknowledgements(nodes: ClusterNodes, stored: Generations, generation: int) -> Acknowledgements:
    """Return the nodes that have acknowledged the generation, and the nodes that must.

    A node must if its driver is registered, or if it acknowledged any generation and still exists: the driver is not
    registered during its update, but the pods keep running. If the existing nodes are unknown, every node that ever
    acknowledged a generation must; a node without a known name is identified by its hash.
    """
    names = {node_hash(name): name for name in (*nodes.with_driver, *(nodes.without_driver or ()))}
    if nodes.without_driver is None:
        names |= {each: each for each in stored if each not in names}
    acknowledged = frozenset(name for each, name in names.items() if stored.get(each, -1) >= generation)
    known = frozenset(name for each, name in names.items() if each in stored)
    return Acknowledgements(acknowledged, nodes.with_driver | known)


def node_hash(node: str) -> str:
    """Return 16 hexadecimal digits that identify a node: 20,000 full names do not fit into a Secret."""
    return hashlib.sha256(node.encode()).hexdigest()[:16]


def _parse(stored: StoredSecrets, where: str) -> Generations:
    """Return the acknowledgements. Damaged ones are ignored: nodes repeat them with their next stream, within 30 minutes."""
    if ACKNOWLEDGEMENTS_FILE not in stored.values:
        return {}
    try:
        document = json.loads(stored.values[ACKNOWLEDGEMENTS_FILE].reveal())
        return {str(node): int(generation) for node, generation in document["nodes"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        log.error("stored node acknowledgements are damaged and ignored", store=where)  # noqa: TRY400  # a traceback doesn't help
        return {}
