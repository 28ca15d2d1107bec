"""A replica of an ACME issuer in a process of its own, so that a test can kill it: ``python -m tests.peers.acme_replica FILE``."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

from csi_driver.authority.ca_store import FolderStore
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.settings import AcmeSettings, Dns01
from csi_driver.authority.issuers.acme.tsig import TsigKey
from csi_driver.core.secret import Secret


def described(settings: AcmeSettings, store: Path, lease_s: float) -> str:
    """What a replica is to be, as its file has it."""
    dns01 = settings.dns01
    assert dns01 is not None
    assert dns01.key is not None
    return json.dumps(
        {
            "store": str(store),
            "lease_s": lease_s,
            "settings": {
                "email": settings.email,
                "directory": settings.directory,
                "ca_file": settings.ca_file,
                "terms_agreed": settings.terms_agreed,
            },
            "dns01": {"server": dns01.server, "resolvers": dns01.resolvers, "nameservers": dns01.nameservers},
            "key": [dns01.key.name, base64.b64encode(dns01.key.secret.reveal()).decode("ascii")],
        }
    )


async def _work(document: dict[str, Any]) -> None:
    name, secret = document["key"]
    dns01 = Dns01(
        document["dns01"]["server"],
        TsigKey(name, Secret(base64.b64decode(secret))),
        resolvers=tuple(document["dns01"]["resolvers"]),
        nameservers=tuple(document["dns01"]["nameservers"]),
    )
    settings = AcmeSettings(**document["settings"], dns01=dns01)
    store = FolderStore(Path(document["store"]), "acme.json")
    await AcmeIssuer("letsencrypt", settings, store, lease_s=document["lease_s"]).run()


if __name__ == "__main__":
    asyncio.run(_work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
