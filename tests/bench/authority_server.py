"""certmount's authority with all of its parts but the cluster: ``python -m tests.bench.authority_server DIR``.

TokenReviews are answered in this process after 5 ms, with what the token says of itself; the keys that tokens are signed with
come from DIR/jwks.json, the CA from a folder. All else is as ``certmount authority`` runs it: gRPC over TLS, both tokens verified
offline, limits, policy, CA, the audit log (on standard error), metrics. It says its port on standard output and serves until
standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from csi_driver.core.cluster.token_review import PublishedKeys, ReviewedToken
from csi_driver.core.identity import unverified_identity
from csi_driver.core.secret import Secret
from csi_driver.telemetry.logging import configure_logging
from tests.integration.authority.world import Cluster, World
from tests.support.tokens import ISSUER, TokenIssuer

REVIEW_S = 0.005
# Beside the rule by which the pods get their names, as many others as a cluster of some teams has.
POLICY = """
policy:
- match: {namespaces: ["team-*"], serviceAccounts: ["app-*"]}
  allow: {dns: ["{service_account}.{namespace}.svc.{cluster_domain}"]}
""" + "".join(
    f'- match: {{namespaces: ["other-{number}-*"], serviceAccounts: ["*"]}}\n  allow: {{dns: ["*.other-{number}.example.com"]}}\n'
    for number in range(20)
)


class Reviewer:
    """Every token is live."""

    async def review(self, token: Secret[str], _audience: str) -> ReviewedToken:
        await asyncio.sleep(REVIEW_S)
        claimed = unverified_identity(token)
        return ReviewedToken(
            claimed.service_account.username,
            claimed.service_account_uid,
            claimed.pod_name,
            claimed.pod_uid,
            claimed.node_name,
            claimed.node_uid,
        )


class Keys(Cluster):
    """Those of a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(TokenIssuer())
        self._file = file

    async def fetch(self) -> PublishedKeys:
        return PublishedKeys(ISSUER, self._file.read_bytes())


async def serve(folder: Path) -> None:
    """Serves until standard input ends."""
    reviewer: Any = Reviewer()
    world = World(folder, TokenIssuer(), Keys(folder / "jwks.json"), reviewer=reviewer)
    world.policy.write_text(POLICY)
    async with world.running() as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    configure_logging("info")
    asyncio.run(serve(parser.parse_args().folder))
