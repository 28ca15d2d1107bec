"""One installation for all tests of a module. Each test must leave it as it was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.doctor.world import Installation, running_installation
from tests.support.kubernetes_api import KubernetesApi, running_api
from tests.support.requirements import require_kubernetes


@pytest.fixture(scope="package")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesApi]:
    with running_api(require_kubernetes("1.34.4"), tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def installation(api: KubernetesApi, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installation]:
    async with running_installation(api, Path(tmp_path_factory.mktemp("installation"))) as found:
        yield found
