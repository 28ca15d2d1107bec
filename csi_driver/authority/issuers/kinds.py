"""All kinds of issuers. To add a kind, add a package and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.acme.config import KIND as ACME
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind
from csi_driver.authority.issuers.kubernetes_csr.config import KIND as KUBERNETES_CSR
from csi_driver.authority.issuers.step_ca.config import KIND as STEP_CA
from csi_driver.config.located_yaml import read_yaml
from csi_driver.core.config.issuers import IssuerDeclaration, parse_issuers
from csi_driver.core.errors import Reason

ISSUER_KINDS: Mapping[str, IssuerKind] = {"step_ca": STEP_CA, "acme": ACME, "kubernetes_csr": KUBERNETES_CSR}


def read_issuers(content: bytes, kinds: Mapping[str, IssuerKind] = ISSUER_KINDS) -> tuple[IssuerDeclaration, ...]:
    """Parse an issuers file (YAML), which may be empty; raise CertmountError InvalidIssuers with all faults."""
    located = read_yaml(content, "issuers file", Reason.INVALID_ISSUERS)
    return parse_issuers(located.data, {name: kind.parse for name, kind in kinds.items()}, located.lines)


def make_issuer(
    declared: IssuerDeclaration, dependencies: IssuerDependencies, kinds: Mapping[str, IssuerKind] = ISSUER_KINDS
) -> Issuer:
    return kinds[declared.kind].make(declared.name, declared.configuration, dependencies)
