"""A running node for each module; each test leaves it as it found it, and is held to that."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.integration.node.world import Node, running_node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_node() -> AsyncIterator[Node]:
    async with running_node() as node:
        yield node


@pytest_asyncio.fixture(loop_scope="module")
async def node(module_node: Node) -> AsyncIterator[Node]:
    """The module's node, with nothing published before and, whatever the test did, nothing left after it."""
    await module_node.reset()
    yield module_node
    await module_node.clear()
