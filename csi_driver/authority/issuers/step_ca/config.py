"""The configuration of a step-ca issuer in the issuers file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.config_section import ConfigSection
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import CredentialSource

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KEYS = ("url", "root", "root_sha256", "provisioner", "key", "password")


@dataclass(frozen=True, slots=True)
class StepCAConfiguration:
    """The address of step-ca, its root, and the credential of the authority. Exactly one root attribute is set."""

    url: str  # `https://HOST[:PORT]`, without a trailing slash
    provisioner: str  # The name of a JWK provisioner
    root_file: str | None = None  # A file with root certificates in PEM
    root_sha256: str | None = None  # In lower-case hex, as `step certificate fingerprint` prints it
    key: CredentialSource | None = None  # The private JWK; None for the encrypted key that step-ca publishes
    password: CredentialSource | None = None  # The password of an encrypted JWK


def parse_step_ca(reader: DocumentReader, path: Path, value: object) -> StepCAConfiguration | None:
    section = ConfigSection(reader, path, value, _KEYS, required=("url", "provisioner"))
    values = section.values
    if not values:
        return None
    if ("root" in values) == ("root_sha256" in values):
        problem = "sets both root and root_sha256" if "root" in values else "sets neither root nor root_sha256"
        section.fault("", problem, "set one of root: {file: PATH} and root_sha256")
    if values.get("key") is None and values.get("password") is None:
        hint = "set key (and password if it is encrypted), or only password to use the key that step-ca publishes"
        section.fault("", "has no credential", hint)
    return StepCAConfiguration(
        url=section.text("url", _parse_url) or "",
        provisioner=section.text("provisioner", _parse_provisioner) or "",
        root_file=section.file("root"),
        root_sha256=section.text("root_sha256", _parse_fingerprint),
        key=section.credential("key"),
        password=section.credential("password"),
    )


def _parse_url(text: str) -> str:
    problem = "is not the address of a step-ca, such as https://ca.example.com:9000"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(problem) from None
    host = parts.netloc if port is None else parts.netloc.rpartition(":")[0]
    if parts.scheme != "https" or not _HOST.fullmatch(host) or text.removesuffix("/") != f"https://{parts.netloc}":
        raise ValueError(problem)
    return f"https://{parts.netloc.lower()}"


def _parse_fingerprint(text: str) -> str:
    fingerprint = text.lower().removeprefix("sha256:").replace(":", "")
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError("is not the SHA-256 of a certificate: 64 hexadecimal digits, with or without colons")
    return fingerprint


def _parse_provisioner(text: str) -> str:
    if not text.strip() or len(text) > 200 or not text.isprintable():
        raise ValueError("is not the name of a provisioner")
    return text


def _make(name: str, configuration: StepCAConfiguration, dependencies: IssuerDependencies) -> Issuer:
    # Imports aiohttp, which takes 8 MB.
    from csi_driver.authority.issuers.step_ca.issuer import StepCAIssuer

    return StepCAIssuer(name, configuration, dependencies.credentials)


KIND = IssuerKind(parse_step_ca, _make)
