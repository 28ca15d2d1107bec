"""Runs certmount's authority without a cluster: ``python -m tests.bench.authority_server DIR``.

In-process TokenReviews take 5 ms and accept the token's claims. The token keys are in DIR/jwks.json, and the CA is in a directory.
Everything else runs as in ``certmount authority``: gRPC over TLS, offline verification of both tokens, limits, policy, CA, audit
log (on standard error) and metrics. Prints its port and serves until the end of standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from csi_driver.core.cluster.objects import PublishedKeys, ReviewedToken
from csi_driver.core.identity import unverified_identity
from csi_driver.core.secret import Secret
from csi_driver.telemetry.logging import configure_logging
from tests.integration.authority.world import Cluster, World
from tests.support.tokens import ISSUER, TokenIssuer

REVIEW_S = 0.005
# The rule that allows the pods' names, and the rules of other teams in a shared cluster.
POLICY = """
policy:
- match: {namespaces: ["team-*"], serviceAccounts: ["app-*"]}
  allow: {dns: ["{service_account}.{namespace}.svc.{cluster_domain}"]}
""" + "".join(
    f'- match: {{namespaces: ["other-{number}-*"], serviceAccounts: ["*"]}}\n  allow: {{dns: ["*.other-{number}.example.com"]}}\n'
    for number in range(20)
)


class InProcessReviewer:
    """Accepts every token."""

    async def review(self, token: Secret[str], _audience: str) -> ReviewedToken:
        await asyncio.sleep(REVIEW_S)
        pod = unverified_identity(token)
        owner = pod.service_account.username, pod.service_account_uid
        return ReviewedToken(*owner, pod.pod_name, pod.pod_uid, pod.node_name, pod.node_uid)


class FileCluster(Cluster):
    """A cluster whose token keys are in a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(TokenIssuer())
        self._file = file

    async def fetch(self) -> PublishedKeys:
        return PublishedKeys(ISSUER, self._file.read_bytes())


async def serve(directory: Path, port: int) -> None:
    reviewer: Any = InProcessReviewer()
    settings = {"listen": f"127.0.0.1:{port}"}
    world = World(directory, TokenIssuer(), FileCluster(directory / "jwks.json"), reviewer=reviewer, settings=settings)
    world.policy.write_text(POLICY)
    async with world.running() as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    configure_logging("info")
    asyncio.run(serve(arguments.directory, arguments.port))
