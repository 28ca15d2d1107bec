"""A replica of an ACME issuer in a process of its own, so that a test can kill it: ``python -m tests.peers.acme_replica FILE``."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.issuers.acme.settings import AcmeSettings, Dns01, StorePlace
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.config.issuers import FileSource


def described(settings: AcmeSettings, lease_s: float) -> str:
    """What a replica is to be, as its file has it."""
    dns01 = settings.dns01
    assert dns01 is not None
    assert isinstance(dns01.key, FileSource)
    return json.dumps(
        {
            "lease_s": lease_s,
            "store": settings.account.folder,
            "key": dns01.key.path,
            "settings": {
                "email": settings.email,
                "directory": settings.directory,
                "ca_file": settings.ca_file,
                "terms_agreed": settings.terms_agreed,
                "roots_file": settings.roots_file,
            },
            "dns01": {"server": dns01.server, "resolvers": dns01.resolvers, "nameservers": dns01.nameservers},
        }
    )


async def _work(document: dict[str, Any]) -> None:
    asked = document["dns01"]
    key, resolvers, nameservers = FileSource(document["key"]), tuple(asked["resolvers"]), tuple(asked["nameservers"])
    dns01 = Dns01(asked["server"], key, resolvers=resolvers, nameservers=nameservers)
    settings = AcmeSettings(StorePlace(folder=document["store"]), **document["settings"], dns01=dns01)
    store = DirectoryStore(Path(document["store"]), "acme.json")
    await AcmeIssuer("letsencrypt", settings, store, lease_s=document["lease_s"]).run()


if __name__ == "__main__":
    asyncio.run(_work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
