"""A signer of the cluster as an issuer, by the API certificates.k8s.io/v1: cert-manager's, a cloud provider's, or your own.

The authority creates a CertificateSigningRequest from the node's CSR, approves it or waits for an approval, waits for the
signer, verifies the certificate, and deletes the CertificateSigningRequest. Labels only help to find it: anyone can set them.
"""

from __future__ import annotations

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind, not_possible
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration, parse_kubernetes_csr


def _make(name: str, configuration: KubernetesCSRConfiguration, dependencies: IssuerDependencies) -> Issuer:
    from csi_driver.authority.issuers.kubernetes_csr.issuer import KubernetesCSRIssuer

    if dependencies.csrs is None:
        raise not_possible(
            name, "needs a cluster for its signer", "run the authority in a cluster, or remove the issuer"
        )
    return KubernetesCSRIssuer(name, configuration, dependencies.credentials, dependencies.csrs)


KIND = IssuerKind(parse_kubernetes_csr, _make)
