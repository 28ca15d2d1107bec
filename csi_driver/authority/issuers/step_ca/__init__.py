"""step-ca as an issuer.

The authority holds the key of a JWK provisioner and signs a token for each request. The token contains the names that the
policy granted and the hash of the node's CSR. It is valid for one minute and one use, so anyone who reads it between the
authority and step-ca, or in step-ca's log, can't use it.
"""

from __future__ import annotations

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration, parse_step_ca


def _make(name: str, configuration: StepCAConfiguration, dependencies: IssuerDependencies) -> Issuer:
    # Imports aiohttp, which takes 8 MB.
    from csi_driver.authority.issuers.step_ca.issuer import StepCAIssuer

    return StepCAIssuer(name, configuration, dependencies.credentials)


KIND = IssuerKind(parse_step_ca, _make)
