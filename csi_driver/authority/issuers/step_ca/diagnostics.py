"""Looks at a step-ca and at what the authority has for it: the same walk for its readiness, for a dry run, and to explain a refusal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.step_ca.client import Client, Unreachable, fetch_unverified
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioner_key import ProvisionerKey, load_provisioner_key
from csi_driver.authority.issuers.step_ca.provisioners import Provisioner, choose, judge_key, list_provisioners
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import decode_certificates, fingerprint
from csi_driver.core.secret import Secret

_MOST_ROOTS = 10
"""As many as a volume takes."""
_MAX_ROOT_FILE_BYTES = 1024 * 1024
_LARGEST_SKEW = timedelta(minutes=1)
"""What step-ca lets pass between the clocks when it looks at a token."""


@dataclass(slots=True)
class Survey:
    """What was found. It ends at the first thing without which the rest can't be looked at."""

    findings: list[Finding] = field(default_factory=list)
    roots: tuple[bytes, ...] = ()
    """For pods, DER: step-ca's own, then those it federates with. None where they could not be had."""
    provisioner: Provisioner | None = None
    key: ProvisionerKey | None = None
    """Where it is the provisioner's."""

    @property
    def problem(self) -> str | None:
        """All that is wrong, in one line; None where nothing is."""
        return "; ".join(f"{one.subject}: {one.text}" for one in self.findings if not one.ok) or None

    def note(self, subject: str, ok: bool, text: str) -> None:
        self.findings.append(Finding(subject, ok, text))


class KeyRing:
    """The provisioner's private key as it is now; decrypted only when it is another one than before, as that takes long."""

    def __init__(self, configuration: StepCAConfiguration, secrets: CredentialReader) -> None:
        self._configuration = configuration
        self._secrets = secrets
        self._content: tuple[Secret[bytes], Secret[bytes] | None] | None = None
        self._key: ProvisionerKey | None = None

    async def load(self, provisioner: Provisioner) -> ProvisionerKey:
        """Raises CertmountError IssuerUnavailable where it can't be read, ValueError in words that follow "is"."""
        source, password_source = self._configuration.key, self._configuration.password
        content = await self._secrets.read(source) if source is not None else provisioner.encrypted_key
        if content is None:
            raise ValueError("not handed out by step-ca for this provisioner; give it as key")
        password = await self._secrets.read(password_source) if password_source is not None else None
        if self._key is None or (content, password) != self._content:
            self._key = await asyncio.to_thread(load_provisioner_key, content, password)
            self._content = (content, password)
        return self._key


async def find_pinned(configuration: StepCAConfiguration) -> tuple[x509.Certificate, ...]:
    """The roots that step-ca must prove itself by: those of the file, or the one that has the fingerprint.

    Raises:
        Unreachable: with subject root, or as fetching it fails.
    """
    if configuration.root_file is not None:
        return await asyncio.to_thread(_read_roots, configuration.root_file)
    wanted = configuration.root_sha256 or ""
    answer = await fetch_unverified(configuration.url, f"/root/{wanted}")
    if answer.status == 404:
        hint = "take the fingerprint from `step certificate fingerprint root_ca.crt` on step-ca's machine"
        raise Unreachable("root", f"step-ca has no root with the SHA-256 {wanted}", hint)
    # Whoever answered proves nothing; the certificate does, by its hash.
    found = _decoded([answer.document.get("ca")])
    if len(found) != 1 or found[0].fingerprint(SHA256()).hex() != wanted:
        raise Unreachable("root", f"what answers has no root with the SHA-256 {wanted}", "is url right?")
    return found


async def look(
    client: Client, configuration: StepCAConfiguration, keys: KeyRing, clock: Callable[[], datetime]
) -> Survey:
    """Walks through all that issuing needs; issues nothing and raises nothing."""
    survey = Survey()
    try:
        started = time.perf_counter()
        health = await client.get("/health")
        now = clock()
        took = round((time.perf_counter() - started) * 1000)
        if health.status != 200 or health.document.get("status") != "ok":
            survey.note("reachable", False, f"it answers HTTP {health.status} to /health {health.message}".rstrip())
            return survey
        survey.note(
            "reachable", True, f"step-ca at {configuration.url} answers in {took} ms, and proves itself by the root"
        )
        await _look_at_roots(client, survey)
        await _look_at_provisioner(client, configuration, keys, survey)
        _look_at_clock(health.time, now, survey)
    except Unreachable as error:
        survey.note(error.subject, False, str(error))
    return survey


async def _look_at_roots(client: Client, survey: Survey) -> None:
    own, federated = [await _certificates(client, path) for path in ("/roots", "/federation")]
    ders = tuple(dict.fromkeys(one.public_bytes(Encoding.DER) for one in (*own, *federated)))
    if not own or len(ders) > _MOST_ROOTS:
        survey.note("roots", False, f"it hands out {len(ders)} roots; 1 to {_MOST_ROOTS} can be used")
        return
    survey.roots = ders
    known = {one.public_bytes(Encoding.DER): one for one in (*own, *federated)}
    survey.note("roots", True, "for pods: " + ", ".join(_shown(one) for one in known.values()))


async def _look_at_provisioner(
    client: Client, configuration: StepCAConfiguration, keys: KeyRing, survey: Survey
) -> None:
    survey.provisioner, finding = choose(await list_provisioners(client), configuration.provisioner)
    survey.findings.append(finding)
    if survey.provisioner is None:
        return
    try:
        key = await keys.load(survey.provisioner)
    except CertmountError as error:
        survey.note("key", False, str(error.args[0]))
        return
    except ValueError as problem:
        survey.note("key", False, f"it is {problem}")
        return
    finding = judge_key(survey.provisioner, key)
    survey.findings.append(finding)
    if finding.ok:
        survey.key = key
    survey.note("lives", True, f"a certificate may live for {survey.provisioner.lives}")


def _look_at_clock(told: datetime | None, now: datetime, survey: Survey) -> None:
    if told is None:
        survey.note("clock", True, "step-ca doesn't tell the time")
        return
    ahead = told - now.replace(microsecond=0)
    seconds = int(ahead.total_seconds())
    text = f"step-ca's is {abs(seconds)} s {'ahead' if seconds > 0 else 'behind'}" if abs(seconds) > 1 else "like ours"
    if abs(ahead) > _LARGEST_SKEW:
        text += "; it takes tokens of up to a minute's difference: set the clocks right"
    survey.note("clock", abs(ahead) <= _LARGEST_SKEW, text)


async def _certificates(client: Client, path: str) -> tuple[x509.Certificate, ...]:
    answer = await client.get(path)
    listed = answer.document.get("crts")
    if answer.status not in (200, 201) or not isinstance(listed, list):
        raise Unreachable("roots", f"it answers HTTP {answer.status} to {path} {answer.message}".rstrip())
    found = _decoded(listed)
    if len(found) != len(listed):
        raise Unreachable("roots", f"it answers to {path} with something that is no certificate")
    return found


def _read_roots(file: str) -> tuple[x509.Certificate, ...]:
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(_MAX_ROOT_FILE_BYTES + 1)
        if len(content) <= _MAX_ROOT_FILE_BYTES:
            return tuple(decode_certificates(content))
        problem = f"is longer than {_MAX_ROOT_FILE_BYTES} bytes"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError:
        problem = "holds no certificates in PEM, or a broken one"
    raise Unreachable("root", f"file {file} {problem}")


def _decoded(pems: Sequence[object]) -> tuple[x509.Certificate, ...]:
    """Those of the PEM texts that are certificates."""
    found: list[x509.Certificate] = []
    for pem in pems:
        try:
            found += decode_certificates(pem.encode()) if isinstance(pem, str) else []
        except ValueError:
            continue
    return tuple(found)


def _shown(certificate: x509.Certificate) -> str:
    name = certificate.subject.rfc4514_string()[:100] or "a root without a name"
    return f"{name} until {certificate.not_valid_after_utc:%Y-%m-%d} ({fingerprint(certificate)[:21]}...)"
