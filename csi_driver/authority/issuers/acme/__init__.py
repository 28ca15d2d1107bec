"""ACME (RFC 8555): certificates of public CAs.

All state is in one store, so that every replica can continue an order that another replica started. Only :mod:`.client` calls
the CA, and only :mod:`.nameserver` calls DNS servers.
"""

from __future__ import annotations

from pathlib import Path

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.config import AcmeConfiguration, parse_acme
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind, not_possible
from csi_driver.authority.storage import DirectoryStore, Store


def _make(name: str, configuration: AcmeConfiguration, dependencies: IssuerDependencies) -> Issuer:
    try:
        from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
    except ModuleNotFoundError as error:
        raise not_possible(name, f"needs the package {error.name}", "install certmount[acme]") from None
    account, http01 = configuration.account, configuration.http01
    if account.directory:
        store: Store = DirectoryStore(Path(account.directory), f"acme-{name}.json")
    elif dependencies.secret_store is not None:
        store = dependencies.secret_store(account.namespace, account.name)
    else:
        raise not_possible(name, "needs a cluster for its account Secret", "set `account: {directory: PATH}`")
    routes = None
    if http01 is not None and http01.ingress_class is not None:
        if dependencies.ingress_routes is None:
            raise not_possible(name, "needs a cluster for its Ingresses", "omit http01.ingress_class")
        routes = dependencies.ingress_routes(http01.ingress_class)
    return AcmeIssuer(name, configuration, store, dependencies.credentials, routes=routes)


KIND = IssuerKind(parse_acme, _make)
