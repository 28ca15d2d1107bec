"""A running node for each module. Each test must leave it clean."""

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
    """The module's node, without volumes before and after the test."""
    await module_node.reset()
    yield module_node
    await module_node.clear()
