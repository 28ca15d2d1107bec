"""Reads the issuers' file: which issuers there are, of which kind, each with what its kind needs.

Credentials are never in it, only where they are: in a file, or in a key of a Kubernetes Secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.errors import Reason
from csi_driver.core.names import parse_dns_label
from csi_driver.core.spec import DEFAULT_ISSUER

MAX_ISSUERS = 100
_MAX_FILE_NAME = 4096
_SECRET_NAME = re.compile(r"(?P<namespace>[a-z0-9][a-z0-9-]{0,62})/(?P<name>[a-z0-9][a-z0-9.-]{0,252})", re.ASCII)
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)

ParseConfiguration = Callable[[DocumentReader, Path, object], object]
"""Reads what stands below the kind's key into the kind's own frozen value; faults go to the reader."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A credential in a file of the authority's."""

    path: str

    def __str__(self) -> str:
        return f"file {self.path}"


@dataclass(frozen=True, slots=True)
class SecretSource:
    """A credential in one key of a Kubernetes Secret."""

    namespace: str
    name: str
    key: str

    def __str__(self) -> str:
        return f"key {self.key} of Secret {self.namespace}/{self.name}"


CredentialSource = FileSource | SecretSource


@dataclass(frozen=True, slots=True)
class IssuerDeclaration:
    """One issuer as it is declared: two that are equal are the same issuer."""

    name: str
    kind: str
    configuration: object
    """The frozen value that the kind's :data:`ParseConfiguration` made."""


def parse_issuers(
    document: object, kinds: Mapping[str, ParseConfiguration], lines: Mapping[Path, int] | None = None
) -> tuple[IssuerDeclaration, ...]:
    """Takes the file's content: None for an empty file, else ``{"issuers": [{"name": ..., KIND: {...}}, ...]}``.

    Raises:
        CertmountError: InvalidIssuers, with one fault for everything that is wrong.
    """
    reader = DocumentReader(Reason.INVALID_ISSUERS, "issuers file", lines or {})
    seen: dict[str, Path] = {}

    def declared(path: Path, entry: object) -> IssuerDeclaration | None:
        top = reader.mapping(path, entry, allowed=("name", *kinds), required=("name",))
        name = reader.text((*path, "name"), top.get("name"), _issuer_name)
        if name is not None and name in seen:
            reader.fault((*path, "name"), f"{name!r} is the name of {reader.label(seen[name])} already")
        seen.setdefault(name or "", path)
        given = [kind for kind in kinds if kind in top]
        if isinstance(entry, Mapping) and len(given) != 1:
            problem = f"is of {len(given)} kinds: {', '.join(given)}" if given else "says not of which kind it is"
            reader.fault(path, problem, f"give exactly one of {', '.join(kinds)}")
        values = [kinds[kind](reader, (*path, kind), top[kind]) for kind in given]
        return IssuerDeclaration(name or "", given[0], values[0]) if given else None

    top = reader.mapping((), {} if document is None else document, allowed=("issuers",))
    issuers = reader.each(("issuers",), top.get("issuers"), declared, MAX_ISSUERS)
    reader.finish()
    return issuers


def parse_source(reader: DocumentReader, path: Path, value: object) -> CredentialSource | None:
    """Reads ``{file: PATH}`` or ``{secret: NAMESPACE/NAME, key: KEY}``; None where there is nothing, or a fault."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        # A credential written here by mistake must not reach the log: it is not quoted.
        reader.fault(path, "says not where it is kept", "write {secret: NAMESPACE/NAME, key: KEY} or {file: PATH}")
        return None
    top = reader.mapping(path, value, allowed=("file", "secret", "key"))
    if ("file" in top) == ("secret" in top) or ("key" in top and "secret" not in top):
        reader.fault(path, "says not where it is kept", "write {secret: NAMESPACE/NAME, key: KEY} or {file: PATH}")
        return None
    if "file" in top:
        file = reader.text((*path, "file"), _present(reader, (*path, "file"), top), parse_file_name)
        return FileSource(file) if file is not None else None
    secret = reader.text((*path, "secret"), _present(reader, (*path, "secret"), top), parse_secret_name)
    key = reader.text((*path, "key"), _present(reader, (*path, "key"), top), _secret_key)
    return SecretSource(*secret, key) if secret is not None and key is not None else None


def parse_file_name(text: str) -> str:
    """Takes an absolute path, or raises ValueError."""
    if not text.startswith("/") or "\0" in text or len(text) > _MAX_FILE_NAME:
        raise ValueError("is not an absolute path, such as /etc/certmount/credentials/key")
    return text


def _present(reader: DocumentReader, path: Path, top: Mapping[object, object]) -> object:
    value = top.get(path[-1])
    if value is None:
        reader.fault(path, "is missing")
    return value


def _issuer_name(text: str) -> str:
    if text == DEFAULT_ISSUER:
        raise ValueError("is the authority's own CA, which needs no entry; choose another name")
    return parse_dns_label(text)


def parse_secret_name(text: str) -> tuple[str, str]:
    """Takes NAMESPACE/NAME of a Secret, or raises ValueError."""
    match = _SECRET_NAME.fullmatch(text)
    if match is None:
        raise ValueError("is not NAMESPACE/NAME of a Secret")
    return match["namespace"], match["name"]


def _secret_key(text: str) -> str:
    if not _SECRET_KEY.fullmatch(text):
        raise ValueError("is not the name of a key in a Secret")
    return text
