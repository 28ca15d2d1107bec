"""The commands on the newest version of Kubernetes that the tests use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.integration.doctor.world import running_installation
from tests.support.kubernetes_api import running_api
from tests.support.requirements import require_kubernetes

VERSION = "1.37.2"


async def test_healthy_installation(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("api", "installation")]
    for directory in directories:
        directory.mkdir()
    with running_api(require_kubernetes(VERSION), directories[0]) as api:
        async with running_installation(api, directories[1]) as installation:
            assert await installation.findings() == []
            result = await asyncio.to_thread(installation.run, "status")
            assert (result.status, result.output.splitlines()[0]) == (0, "problems: 0")
