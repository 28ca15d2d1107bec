"""A step-ca issuer as the issuers' file declares it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import Source, parse_file_name, parse_source

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KEYS = ("url", "root", "root_sha256", "provisioner", "key", "password")


@dataclass(frozen=True, slots=True)
class StepCAConfiguration:
    """Where step-ca is, how it proves that it is the right one, and as whom the authority speaks to it."""

    url: str
    """``https://HOST[:PORT]``, without a slash at its end."""
    provisioner: str
    """The name of a JWK provisioner."""
    root_file: str | None = None
    """A file with the root certificates in PEM, or else:"""
    root_sha256: str | None = None
    """the root's fingerprint in lower-case hex, as ``step certificate fingerprint`` prints it."""
    key: Source | None = None
    """The provisioner's private JWK; None: the encrypted one that step-ca itself hands out."""
    password: Source | None = None
    """What an encrypted JWK is decrypted with."""


def parse_step_ca(reader: DocumentReader, path: Path, value: object) -> StepCAConfiguration | None:
    """Reads what stands below ``step_ca``; see :data:`csi_driver.core.config.issuers.Parse`."""
    top = reader.mapping(path, value, allowed=_KEYS, required=("url", "provisioner"))
    if not top:
        return None
    if ("root" in top) == ("root_sha256" in top):
        problem = "has both root and root_sha256" if "root" in top else "says not which root it is known by"
        reader.fault(path, problem, "give one of root: {file: PATH} and root_sha256")
    if top.get("key") is None and top.get("password") is None:
        hint = "give key (and password where it is encrypted), or password alone for the key that step-ca hands out"
        reader.fault(path, "has no credential", hint)
    url = reader.text((*path, "url"), top.get("url"), _url)
    provisioner = reader.text((*path, "provisioner"), top.get("provisioner"), _provisioner)
    configuration = StepCAConfiguration(
        url=url or "",
        provisioner=provisioner or "",
        root_file=_root_file(reader, (*path, "root"), top.get("root")),
        root_sha256=reader.text((*path, "root_sha256"), top.get("root_sha256"), _fingerprint),
        key=parse_source(reader, (*path, "key"), top.get("key")),
        password=parse_source(reader, (*path, "password"), top.get("password")),
    )
    for word in ("root", "root_sha256", "key", "password"):
        if word in top and top[word] is None:
            reader.fault((*path, word), "is empty", "leave it away, or say what it is")
    return configuration


def _root_file(reader: DocumentReader, path: Path, value: object) -> str | None:
    if value is None:
        return None
    top = reader.mapping(path, value, allowed=("file",), required=("file",))
    return reader.text((*path, "file"), top.get("file"), parse_file_name)


def _url(text: str) -> str:
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


def _fingerprint(text: str) -> str:
    found = text.lower().removeprefix("sha256:").replace(":", "")
    if not _FINGERPRINT.fullmatch(found):
        raise ValueError("is not the SHA-256 of a certificate: 64 hexadecimal digits, with or without colons")
    return found


def _provisioner(text: str) -> str:
    if not text.strip() or len(text) > 200 or not text.isprintable():
        raise ValueError("is not the name of a provisioner")
    return text
