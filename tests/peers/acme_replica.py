"""Runs an ACME issuer in a process that a test can kill: ``python -m tests.peers.acme_replica FILE``; FILE is a pickle."""

from __future__ import annotations

import asyncio
import pickle
import sys
from pathlib import Path

from csi_driver.authority.issuers.acme.config import AcmeConfiguration
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.storage import DirectoryStore


async def _work(configuration: AcmeConfiguration, lease_s: float) -> None:
    store = DirectoryStore(Path(configuration.account.directory), "acme.json")
    await AcmeIssuer("letsencrypt", configuration, store, lease_s=lease_s).run()


if __name__ == "__main__":
    asyncio.run(_work(*pickle.loads(Path(sys.argv[1]).read_bytes())))  # noqa: S301  # the test wrote it
