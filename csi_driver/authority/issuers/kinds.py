"""Which kinds of issuers there are: how each is read from the issuers' file, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi_driver.authority.config.located_yaml import read_yaml
from csi_driver.authority.issuers.acme.config import parse_acme
from csi_driver.authority.issuers.acme.routes import Routes
from csi_driver.authority.issuers.acme.settings import AcmeSettings
from csi_driver.authority.issuers.external import ExternalIssuer
from csi_driver.authority.issuers.kubernetes_csr.access import Access
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration, parse_kubernetes_csr
from csi_driver.authority.issuers.kubernetes_csr.issuer import KubernetesCSR
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration, parse_step_ca
from csi_driver.authority.storage import DirectoryStore, Store
from csi_driver.core.config.issuers import IssuerDeclaration, Parse, parse_issuers
from csi_driver.core.errors import CertmountError, Fault, Reason


@dataclass(frozen=True, slots=True)
class IssuerDependencies:
    """What issuers are made with."""

    secrets: CredentialReader
    secret_store: Callable[[str, str], Store] | None = None
    """Takes namespace and name of a Secret that may be read and updated, for state that all replicas share; None outside a cluster."""
    ingress_routes: Callable[[str], Routes] | None = None
    """Takes the class of the Ingresses that lead to the authority's HTTP-01 port; None outside a cluster."""
    csrs: Access | None = None
    """The cluster's CertificateSigningRequests; None outside a cluster."""


@dataclass(frozen=True, slots=True)
class IssuerKind:
    """One kind of issuer."""

    parse: Parse
    make: Callable[[str, Any, IssuerDependencies], ExternalIssuer]
    """Takes the issuer's name and the value that ``parse`` made. It does no I/O: that begins with the issuer's ``run``."""


def _make_step_ca(name: str, configuration: StepCAConfiguration, tools: IssuerDependencies) -> ExternalIssuer:
    from csi_driver.authority.issuers.step_ca.issuer import StepCA  # with aiohttp: 8 MB for those who use it

    return StepCA(name, configuration, tools.secrets)


def _make_acme(name: str, settings: AcmeSettings, tools: IssuerDependencies) -> ExternalIssuer:
    try:
        from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
    except ModuleNotFoundError as error:
        raise _impossible(name, f"needs the package {error.name}", "install certmount[acme]") from None
    place, http01 = settings.account, settings.http01
    if not place.folder and tools.secret_store is None:
        raise _impossible(
            name, "keeps its account in a Secret, but there is no cluster", "give account: {folder: PATH}"
        )
    if http01 is None or http01.ingress_class is None:
        routes = None
    elif tools.ingress_routes is None:
        raise _impossible(name, "makes Ingresses, but there is no cluster", "leave http01.ingress_class away")
    else:
        routes = tools.ingress_routes(http01.ingress_class)
    if tools.secret_store is not None and not place.folder:
        store: Store = tools.secret_store(place.namespace, place.name)
    else:
        store = DirectoryStore(Path(place.folder), f"acme-{name}.json")
    return AcmeIssuer(name, settings, store, tools.secrets, routes=routes)


def _impossible(name: str, problem: str, hint: str) -> CertmountError:
    return CertmountError(Reason.INVALID_ISSUERS, Fault(f"issuer {name}", problem, hint))


def _make_kubernetes_csr(
    name: str, configuration: KubernetesCSRConfiguration, tools: IssuerDependencies
) -> ExternalIssuer:
    if tools.csrs is None:
        raise _impossible(name, "has a signer of a cluster, but there is no cluster", "run it inside of one")
    return KubernetesCSR(name, configuration, tools.secrets, tools.csrs)


ISSUER_KINDS: Mapping[str, IssuerKind] = {
    "step_ca": IssuerKind(parse_step_ca, _make_step_ca),
    "acme": IssuerKind(parse_acme, _make_acme),
    "kubernetes_csr": IssuerKind(parse_kubernetes_csr, _make_kubernetes_csr),
}


def read_issuers(content: bytes, kinds: Mapping[str, IssuerKind] = ISSUER_KINDS) -> tuple[IssuerDeclaration, ...]:
    """Takes the content of an issuers' file (YAML); an empty one declares none.

    Raises:
        CertmountError: InvalidIssuers, with all that is wrong.
    """
    located = read_yaml(content, "issuers file", Reason.INVALID_ISSUERS)
    return parse_issuers(located.data, {name: kind.parse for name, kind in kinds.items()}, located.lines)


def make_issuer(
    declared: IssuerDeclaration, tools: IssuerDependencies, kinds: Mapping[str, IssuerKind] = ISSUER_KINDS
) -> ExternalIssuer:
    """The issuer that is declared."""
    return kinds[declared.kind].make(declared.name, declared.configuration, tools)
