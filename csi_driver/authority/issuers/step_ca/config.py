"""The configuration of a step-ca issuer in the issuers file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import CredentialSource, parse_file_name, parse_source

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KEYS = ("url", "root", "root_sha256", "provisioner", "key", "password")


@dataclass(frozen=True, slots=True)
class StepCAConfiguration:
    """The address of step-ca, its root, and the credential of the authority. Exactly one root attribute is set."""

    url: str
    """``https://HOST[:PORT]``, without a trailing slash."""
    provisioner: str
    """The name of a JWK provisioner."""
    root_file: str | None = None
    """A file with root certificates in PEM."""
    root_sha256: str | None = None
    """The fingerprint of the root in lower-case hex, as ``step certificate fingerprint`` prints it."""
    key: CredentialSource | None = None
    """The provisioner's private JWK; None for the encrypted key that step-ca publishes."""
    password: CredentialSource | None = None
    """The password of an encrypted JWK."""


def parse_step_ca(reader: DocumentReader, path: Path, value: object) -> StepCAConfiguration | None:
    """Parse the value of ``step_ca``; see :data:`csi_driver.core.config.issuers.ParseConfiguration`."""
    top = reader.mapping(path, value, allowed=_KEYS, required=("url", "provisioner"))
    if not top:
        return None
    if ("root" in top) == ("root_sha256" in top):
        problem = "sets both root and root_sha256" if "root" in top else "sets neither root nor root_sha256"
        reader.fault(path, problem, "set one of root: {file: PATH} and root_sha256")
    if top.get("key") is None and top.get("password") is None:
        hint = "set key (and password if it is encrypted), or only password to use the key that step-ca publishes"
        reader.fault(path, "has no credential", hint)
    for name in ("root", "root_sha256", "key", "password"):
        if name in top and top[name] is None:
            reader.fault((*path, name), "is empty", "set a value or omit it")
    return StepCAConfiguration(
        url=reader.text((*path, "url"), top.get("url"), _parse_url) or "",
        provisioner=reader.text((*path, "provisioner"), top.get("provisioner"), _parse_provisioner) or "",
        root_file=_parse_root_file(reader, (*path, "root"), top.get("root")),
        root_sha256=reader.text((*path, "root_sha256"), top.get("root_sha256"), _parse_fingerprint),
        key=parse_source(reader, (*path, "key"), top.get("key")),
        password=parse_source(reader, (*path, "password"), top.get("password")),
    )


def _parse_root_file(reader: DocumentReader, path: Path, value: object) -> str | None:
    if value is None:
        return None
    top = reader.mapping(path, value, allowed=("file",), required=("file",))
    return reader.text((*path, "file"), top.get("file"), parse_file_name)


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
