"""What ``certmount status`` and ``certmount doctor`` read from a replica of the authority, as JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from csi_driver import __version__
from csi_driver.authority.ca.authority import CertificateAuthority
from csi_driver.authority.ca.report import CAStatusReport
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.ca.sources import NodeAcknowledgements
from csi_driver.authority.diagnostics import DiagnosticCheck, run_checks
from csi_driver.authority.issuers import Finding, Issuer
from csi_driver.authority.issuers.registry import IssuerRegistry
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.core.texts import timestamp

_DIAGNOSIS_S = 45.0  # of an issuer; its checks connect to other systems


@dataclass(frozen=True, slots=True)
class AuthorityStatus:
    """Reads the state of a replica; ``problems`` are those of its readiness, ``checks`` returns those of ``authority --check``."""

    ca: CertificateAuthority
    nodes: NodeAcknowledgements
    trust: TrustBundles
    issuers: IssuerRegistry
    policy: PolicyFile
    problems: Callable[[], Sequence[str]]
    checks: Callable[[], Sequence[DiagnosticCheck]]

    async def document(self) -> dict[str, Any]:
        policy = self.policy.current if self.policy.loaded else None
        return {
            "version": __version__,
            "time": time.time(),
            "problems": list(self.problems()),
            "policy": {"revision": policy.revision, "rules": len(policy.rules)} if policy else None,
            "ca": await self._ca(),
            "issuers": [
                {"name": name, "environment": issuer.environment, "problem": issuer.problem}
                for name, issuer in self.issuers.items()
            ],
            "rootSets": [
                {"name": name, "generation": roots.generation, "roots": _roots(roots)}
                for name, roots in sorted(self.trust.snapshot.sets.items())
            ],
            "nodes": sorted(self.trust.nodes),
        }

    async def diagnose(self) -> dict[str, Any]:
        """Check what the replica needs, and each external issuer. Nothing is issued or changed."""
        external = {name: issuer for name, issuer in self.issuers.items() if name != DEFAULT_ISSUER}
        found, *issuers = await asyncio.gather(run_checks(self.checks()), *(map(_diagnose, external.values())))
        findings = [("", finding) for finding in found]
        findings += [(name, finding) for name, each in zip(external, issuers, strict=True) for finding in each]
        return {
            "version": __version__,
            "time": time.time(),
            "findings": [
                {"issuer": issuer, "subject": finding.subject, "ok": finding.ok, "text": finding.text}
                for issuer, finding in findings
            ],
        }

    async def _ca(self) -> dict[str, Any] | None:
        if (state := self.ca.state) is None:
            return None
        nodes = Acknowledgements(frozenset(), frozenset())
        if state.rotation.phase.before_switch:
            try:
                nodes = await self.nodes.read(state.rotation.generation)
            except CertmountError as error:
                return {"error": str(error)}
        return CAStatusReport(state, nodes, int(time.time())).document()


async def _diagnose(issuer: Issuer) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(_DIAGNOSIS_S):
            return await issuer.diagnose()
    except TimeoutError:
        return [Finding("diagnosis", False, f"does not end within {_DIAGNOSIS_S:.0f} s")]


def _roots(roots: RootSet) -> list[dict[str, str]]:
    certificates = map(x509.load_der_x509_certificate, roots.roots)
    return [
        {"fingerprint": fingerprint(each), "notAfter": timestamp(each.not_valid_after_utc)} for each in certificates
    ]
