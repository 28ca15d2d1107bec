"""Parse the issuers file. It refers to credentials in files or Secrets, but contains none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.errors import Reason
from csi_driver.core.names import parse_dns_label
from csi_driver.core.spec import DEFAULT_ISSUER

_MAX_ISSUERS = 100
_MAX_FILE_NAME = 4096
_SECRET_NAME = re.compile(r"(?P<namespace>[a-z0-9][a-z0-9-]{0,62})/(?P<name>[a-z0-9][a-z0-9.-]{0,252})", re.ASCII)
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)
_SOURCE_HINT = "use {secret: NAMESPACE/NAME, key: KEY} or {file: PATH}"

ParseConfiguration = Callable[[DocumentReader, Path, object], object]
"""Parses the section of an issuer type to that type's frozen value; records faults in the reader."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A credential in a file on the authority."""

    path: str

    def __str__(self) -> str:
        return f"file {self.path}"


@dataclass(frozen=True, slots=True)
class SecretSource:
    """A credential in one key of a Secret."""

    namespace: str
    name: str
    key: str
    only: bool = False  # True: the name of the key does not matter if the Secret has no other key

    def __str__(self) -> str:
        return (
            f"Secret {self.namespace}/{self.name}"
            if self.only
            else f"key {self.key} of Secret {self.namespace}/{self.name}"
        )


CredentialSource = FileSource | SecretSource


@dataclass(frozen=True, slots=True)
class IssuerDeclaration:
    """An issuer in the file. Equal declarations are the same issuer."""

    name: str
    kind: str
    configuration: object  # the value that the issuer type's :data:`ParseConfiguration` returned


def parse_issuers(
    document: object, kinds: Mapping[str, ParseConfiguration], lines: Mapping[Path, int] | None = None
) -> tuple[IssuerDeclaration, ...]:
    """Parse None for an empty file, or ``{"issuers": [{"name": ..., KIND: {...}}, ...]}``.

    Raises:
        CertmountError: InvalidIssuers with all faults.
    """
    reader = DocumentReader(Reason.INVALID_ISSUERS, "issuers file", lines or {})
    seen: dict[str, Path] = {}

    def parse_issuer(path: Path, entry: object) -> IssuerDeclaration | None:
        top = reader.mapping(path, entry, allowed=("name", *kinds), required=("name",))
        name = reader.text((*path, "name"), top.get("name"), _issuer_name)
        if name is not None and name in seen:
            reader.fault((*path, "name"), f"{name!r} is also the name of {reader.label(seen[name])}")
        seen.setdefault(name or "", path)
        given = [kind for kind in kinds if kind in top]
        if isinstance(entry, Mapping) and len(given) != 1:
            problem = f"sets several issuer types: {', '.join(given)}" if given else "does not set the issuer type"
            reader.fault(path, problem, f"set exactly one of {', '.join(kinds)}")
        values = [kinds[kind](reader, (*path, kind), top[kind]) for kind in given]
        return IssuerDeclaration(name or "", given[0], values[0]) if given else None

    top = reader.mapping((), {} if document is None else document, allowed=("issuers",))
    issuers = reader.items(("issuers",), top.get("issuers"), parse_issuer, _MAX_ISSUERS)
    reader.finish()
    return issuers


def parse_source(reader: DocumentReader, path: Path, value: object) -> CredentialSource | None:
    """Parse ``{file: PATH}`` or ``{secret: NAMESPACE/NAME, key: KEY}``; None if it is missing or invalid."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        # Do not quote the value: it can be a credential, which must not reach the log.
        reader.fault(path, "does not refer to a Secret or a file", _SOURCE_HINT)
        return None
    top = reader.mapping(path, value, allowed=("file", "secret", "key"))
    if ("file" in top) == ("secret" in top) or ("key" in top and "secret" not in top):
        reader.fault(path, "does not refer to exactly one Secret or file", _SOURCE_HINT)
        return None
    for key in ("file",) if "file" in top else ("secret", "key"):
        if top.get(key) is None:
            reader.fault((*path, key), "is missing")
    if "file" in top:
        file = reader.text((*path, "file"), top.get("file"), parse_file_name)
        return FileSource(file) if file is not None else None
    secret = reader.text((*path, "secret"), top.get("secret"), parse_secret_name)
    key_name = reader.text((*path, "key"), top.get("key"), _secret_key)
    return SecretSource(*secret, key_name) if secret is not None and key_name is not None else None


def parse_file_name(text: str) -> str:
    """Return an absolute path; raises ValueError."""
    if not text.startswith("/") or "\0" in text or len(text) > _MAX_FILE_NAME:
        raise ValueError("is not an absolute path, such as /etc/certmount/credentials/key")
    return text


def parse_secret_name(text: str) -> tuple[str, str]:
    """Return the namespace and name of NAMESPACE/NAME; raises ValueError."""
    match = _SECRET_NAME.fullmatch(text)
    if match is None:
        raise ValueError("is not NAMESPACE/NAME of a Secret")
    return match["namespace"], match["name"]


def _issuer_name(text: str) -> str:
    if text == DEFAULT_ISSUER:
        raise ValueError("is the name of the internal CA, which needs no entry; use another name")
    return parse_dns_label(text)


def _secret_key(text: str) -> str:
    if not _SECRET_KEY.fullmatch(text):
        raise ValueError("is not a key of a Secret")
    return text
