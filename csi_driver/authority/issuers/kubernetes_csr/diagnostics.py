"""Diagnoses a kubernetes_csr issuer: its roots, and the authority's permissions."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.issuers import Findings
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import decode_certificates, fingerprint

_MAX_ROOTS = 10  # A volume can hold as many
_REQUESTS = "certificatesigningrequests"
_HINT = "apply the role in docs/kubernetes-csr.md"


@dataclass(slots=True)
class KubernetesCSRDiagnosis:
    """The result of a diagnosis."""

    findings: Findings = field(default_factory=Findings)
    roots: tuple[bytes, ...] = ()  # X.509 DER; empty if they are unknown, or are those of the internal CA
    username: str = ""  # The authority's user name at the API server; empty if it is unknown


async def diagnose_kubernetes_csr(
    configuration: KubernetesCSRConfiguration, credentials: CredentialReader, requests: CSRClient
) -> KubernetesCSRDiagnosis:
    diagnosis = KubernetesCSRDiagnosis()
    await _check_roots(configuration, credentials, diagnosis)
    try:
        diagnosis.username = await requests.own_username()
        diagnosis.findings.add("account", True, f"the authority's user name is {diagnosis.username}")
        await _check_permissions(configuration, requests, diagnosis)
    except CertmountError as error:
        diagnosis.findings.add("cluster", False, error.text)
    return diagnosis


async def _check_roots(
    configuration: KubernetesCSRConfiguration, credentials: CredentialReader, diagnosis: KubernetesCSRDiagnosis
) -> None:
    if configuration.roots is None:
        diagnosis.findings.add("roots", True, "pods trust the internal CA, whose signer this is")
        return
    try:
        certificates = decode_certificates((await credentials.read(configuration.roots)).reveal())
    except CertmountError as error:
        diagnosis.findings.add("roots", False, error.text)
        return
    except ValueError:
        diagnosis.findings.add("roots", False, f"{configuration.roots} does not contain valid certificates in PEM")
        return
    text = f"{configuration.roots} contains {len(certificates)} certificates; expected at most {_MAX_ROOTS}"
    if len(certificates) <= _MAX_ROOTS:
        diagnosis.roots = tuple(dict.fromkeys(one.public_bytes(Encoding.DER) for one in certificates))
        text = f"pods trust {', '.join(f'{fingerprint(one)[:21]}...' for one in certificates)}"
    diagnosis.findings.add("roots", bool(diagnosis.roots), text)


async def _check_permissions(
    configuration: KubernetesCSRConfiguration, requests: CSRClient, diagnosis: KubernetesCSRDiagnosis
) -> None:
    verbs = ("create", "get", "list", "watch", "delete")
    missing = [verb for verb in verbs if not await requests.is_permitted(verb, _REQUESTS)]
    lack = f"is not permitted to {', '.join(missing)} {_REQUESTS}; {_HINT}"
    text = f"the authority {lack if missing else f'can create, watch and delete {_REQUESTS}'}"
    diagnosis.findings.add("permissions", not missing, text)
    signer = configuration.signer
    if not configuration.approve:
        diagnosis.findings.add("approval", True, f"not done by the authority; others approve requests for {signer}")
        return
    # A role names one signer, or all signers of a domain.
    permitted = await requests.is_permitted("update", f"{_REQUESTS}/approval") and (
        await requests.is_permitted("approve", "signers", signer)
        or await requests.is_permitted("approve", "signers", f"{signer.partition('/')[0]}/*")
    )
    text = f"the authority {'can' if permitted else 'is not permitted to'} approve requests for {signer}"
    diagnosis.findings.add("approval", permitted, text if permitted else f"{text}; {_HINT}")
