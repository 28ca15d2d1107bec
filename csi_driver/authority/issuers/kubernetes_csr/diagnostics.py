"""Looks at all that issuing needs of the cluster: the roots, and the authority's permissions."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.csr_api import CSRClient
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.kubernetes_csr.access import Access
from csi_driver.authority.issuers.kubernetes_csr.config import KubernetesCSRConfiguration
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import decode_certificates, fingerprint

_MOST_ROOTS = 10
"""As many as a volume takes."""
_REQUESTS = "certificatesigningrequests"
_HINT = "docs/kubernetes-csr.md has the role"


@dataclass(slots=True)
class Survey:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    roots: tuple[bytes, ...] = ()
    """X.509 DER; none where they could not be had, or are the internal CA's."""
    username: str = ""
    """Whom the API server takes the authority for; empty where it could not be asked."""

    @property
    def problem(self) -> str | None:
        """All that is wrong, in one line; None where nothing is."""
        return "; ".join(f"{one.subject}: {one.text}" for one in self.findings if not one.ok) or None

    def note(self, subject: str, ok: bool, text: str) -> None:
        self.findings.append(Finding(subject, ok, text))


async def look(configuration: KubernetesCSRConfiguration, secrets: CredentialReader, access: Access) -> Survey:
    """Looks at all of it; makes nothing and raises nothing."""
    survey = Survey()
    await _look_at_roots(configuration, secrets, survey)
    try:
        survey.username = await access.requests.own_username()
        survey.note("account", True, f"the API server takes the authority for {survey.username}")
        await _look_at_permissions(configuration, access.requests, survey)
    except CertmountError as error:
        survey.note("cluster", False, str(error.args[0]))
    return survey


async def _look_at_roots(configuration: KubernetesCSRConfiguration, secrets: CredentialReader, survey: Survey) -> None:
    if configuration.roots is None:
        survey.note("roots", True, "those of the internal CA, whose signer this is")
        return
    try:
        found = decode_certificates((await secrets.read(configuration.roots)).reveal())
    except CertmountError as error:
        survey.note("roots", False, str(error.args[0]))
        return
    except ValueError:
        survey.note("roots", False, f"{configuration.roots} holds no certificates in PEM, or a broken one")
        return
    if len(found) > _MOST_ROOTS:
        survey.note(
            "roots", False, f"{configuration.roots} holds {len(found)} certificates; at most {_MOST_ROOTS} are read"
        )
        return
    survey.roots = tuple(dict.fromkeys(one.public_bytes(Encoding.DER) for one in found))
    survey.note("roots", True, "for pods: " + ", ".join(f"{fingerprint(one)[:21]}..." for one in found))


async def _look_at_permissions(configuration: KubernetesCSRConfiguration, requests: CSRClient, survey: Survey) -> None:
    lacking = [verb for verb in ("create", "get", "list", "watch", "delete") if not await requests.may(verb, _REQUESTS)]
    if lacking:
        survey.note("permissions", False, f"the authority may not {', '.join(lacking)} {_REQUESTS}; {_HINT}")
    else:
        survey.note("permissions", True, f"the authority may make, follow and delete {_REQUESTS}")
    signer = configuration.signer
    if not configuration.approve:
        survey.note("approval", True, f"someone else approves requests for {signer}")
        return
    # A role names one signer, or all of a domain.
    allowed = await requests.may("update", f"{_REQUESTS}/approval") and (
        await requests.may("approve", "signers", signer)
        or await requests.may("approve", "signers", f"{signer.partition('/')[0]}/*")
    )
    text = f"the authority may {'' if allowed else 'not '}approve requests for {signer}"
    survey.note("approval", allowed, text if allowed else f"{text}; {_HINT}")
