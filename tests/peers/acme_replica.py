"""Runs an ACME issuer in a process that a test can kill: ``python -m tests.peers.acme_replica FILE``."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Dns01
from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
from csi_driver.authority.storage import DirectoryStore
from csi_driver.core.config.issuers import FileSource


def described(configuration: AcmeConfiguration, lease_s: float) -> str:
    dns01 = configuration.dns01
    assert dns01 is not None
    assert isinstance(dns01.key, FileSource)
    return json.dumps(
        {
            "lease_s": lease_s,
            "store": configuration.account.directory,
            "key": dns01.key.path,
            "configuration": {
                "email": configuration.email,
                "directory": configuration.directory,
                "ca_file": configuration.ca_file,
                "terms_agreed": configuration.terms_agreed,
                "roots_file": configuration.roots_file,
            },
            "dns01": {"server": dns01.server, "resolvers": dns01.resolvers, "nameservers": dns01.nameservers},
        }
    )


async def _work(document: dict[str, Any]) -> None:
    dns = document["dns01"]
    key, resolvers, nameservers = FileSource(document["key"]), tuple(dns["resolvers"]), tuple(dns["nameservers"])
    dns01 = Dns01(dns["server"], key, resolvers=resolvers, nameservers=nameservers)
    account = AccountStorage(directory=document["store"])
    configuration = AcmeConfiguration(account, **document["configuration"], dns01=dns01)
    store = DirectoryStore(Path(document["store"]), "acme.json")
    await AcmeIssuer("letsencrypt", configuration, store, lease_s=document["lease_s"]).run()


if __name__ == "__main__":
    asyncio.run(_work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
