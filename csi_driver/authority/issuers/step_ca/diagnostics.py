"""Diagnoses a step-ca issuer: for its readiness, for `certmount issuer check`, and to explain a rejected token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers import Findings
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.authority.issuers.http_client import HttpError
from csi_driver.authority.issuers.step_ca.client import MAX_ROOTS, StepCAClient
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioner_key import ProvisionerKey, load_provisioner_key
from csi_driver.authority.issuers.step_ca.provisioners import Provisioner, check_key, select_provisioner
from csi_driver.core.clocks import describe_skew
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.secret import Secret

_MAX_CLOCK_SKEW = timedelta(minutes=1)  # What step-ca tolerates when it verifies a token


@dataclass(slots=True)
class StepCADiagnosis:
    """The result of a diagnosis, which ends at the first failure that prevents the remaining checks."""

    findings: Findings = field(default_factory=Findings)
    roots: tuple[bytes, ...] = ()  # For pods, DER: step-ca's own roots, then those of CAs that it federates with
    provisioner: Provisioner | None = None
    key: ProvisionerKey | None = None  # None unless it belongs to the provisioner


@dataclass(eq=False)
class ProvisionerKeyLoader:
    """Loads the provisioner's private key. It decrypts the key only if it changed, because decryption is slow."""

    configuration: StepCAConfiguration
    credentials: CredentialReader
    _content: tuple[Secret[bytes], Secret[bytes] | None] | None = None
    _key: ProvisionerKey | None = None

    async def load(self, provisioner: Provisioner) -> ProvisionerKey:
        """Raise CertmountError IssuerUnavailable if it can't be read; ValueError, in words that follow "is", if invalid."""
        source, password_source = self.configuration.key, self.configuration.password
        content = await self.credentials.read(source) if source is not None else provisioner.encrypted_key
        if content is None:
            raise ValueError("not published by step-ca for this provisioner; set key")
        password = await self.credentials.read(password_source) if password_source is not None else None
        if self._key is None or (content, password) != self._content:
            self._key = await asyncio.to_thread(load_provisioner_key, content, password)
            self._content = (content, password)
        return self._key


async def diagnose_step_ca(
    client: StepCAClient, configuration: StepCAConfiguration, keys: ProvisionerKeyLoader, clock: Callable[[], datetime]
) -> StepCADiagnosis:
    diagnosis = StepCADiagnosis()
    try:
        started = time.perf_counter()
        health = await client.health()
        now = clock()
        took = round((time.perf_counter() - started) * 1000)
        text = f"step-ca at {configuration.url} answers in {took} ms, and the root verifies its certificate"
        diagnosis.findings.add("reachable", True, text)
        await _check_roots(client, diagnosis)
        await _check_provisioner(client, configuration, keys, diagnosis)
        _check_clock(health.time, now, diagnosis)
    except HttpError as error:
        diagnosis.findings.add(error.subject, False, str(error))
    return diagnosis


async def _check_roots(client: StepCAClient, diagnosis: StepCADiagnosis) -> None:
    own, federated = [await client.roots(path) for path in ("/roots", "/federation")]
    roots = {certificate.public_bytes(Encoding.DER): certificate for certificate in (*own, *federated)}
    if not own or len(roots) > MAX_ROOTS:
        diagnosis.findings.add("roots", False, f"step-ca publishes {len(roots)} roots; expected 1 to {MAX_ROOTS}")
        return
    diagnosis.roots = tuple(roots)
    diagnosis.findings.add("roots", True, f"pods trust {', '.join(map(_describe, roots.values()))}")


async def _check_provisioner(
    client: StepCAClient, configuration: StepCAConfiguration, keys: ProvisionerKeyLoader, diagnosis: StepCADiagnosis
) -> None:
    provisioner, finding = select_provisioner(
        await client.provisioners(configuration.provisioner), configuration.provisioner
    )
    diagnosis.findings.append(finding)
    if provisioner is None:
        return
    diagnosis.provisioner = provisioner
    try:
        key = await keys.load(provisioner)
    except CertmountError as error:
        diagnosis.findings.add("key", False, error.text)
        return
    except ValueError as problem:
        diagnosis.findings.add("key", False, f"is {problem}")
        return
    finding = check_key(provisioner, key)
    diagnosis.findings.append(finding)
    if finding.ok:
        diagnosis.key = key
    diagnosis.findings.add("lifetime", True, f"the provisioner allows {provisioner.limits}")


def _check_clock(time: datetime | None, now: datetime, diagnosis: StepCADiagnosis) -> None:
    if time is None:
        diagnosis.findings.add("clock", True, "unknown, because step-ca does not send the time")
        return
    skew = time - now.replace(microsecond=0)
    seconds = int(skew.total_seconds())
    direction = "ahead" if seconds > 0 else "behind"
    text = f"step-ca's clock is {abs(seconds)} s {direction}" if abs(seconds) > 1 else "in sync"
    if abs(skew) > _MAX_CLOCK_SKEW:
        text = f"{describe_skew('the authority', 'step-ca', seconds)}, because step-ca tolerates at most 60 s"
    diagnosis.findings.add("clock", abs(skew) <= _MAX_CLOCK_SKEW, text)


def _describe(certificate: x509.Certificate) -> str:
    name = certificate.subject.rfc4514_string()[:100] or "a root without a name"
    return f"{name} until {certificate.not_valid_after_utc:%Y-%m-%d} ({fingerprint(certificate)[:21]}...)"
