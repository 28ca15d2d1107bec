"""A token issuer, its keys, metrics, a clock and a store."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.core.cluster.objects import PublishedKeys
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import TokenIssuer
from tests.unit.authority.clock import Clock
from tests.unit.authority.memory_store import MemoryStore


@pytest.fixture(scope="session")
def issuer() -> TokenIssuer:
    return TokenIssuer()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> AuthorityMetrics:
    return AuthorityMetrics(registry)


@pytest.fixture
async def keys(issuer: TokenIssuer, metrics: AuthorityMetrics) -> TokenKeys:

    async def fetch() -> PublishedKeys:
        return issuer.published

    keys = TokenKeys(fetch, metrics)
    await keys.load()
    return keys
