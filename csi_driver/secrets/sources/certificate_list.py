"""The list of certificates in a ConfigMap: notariat's format, with more keys of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from csi_driver.config.located_yaml import Located, read_yaml
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.durations import parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import DNSName, EmailAddress, parse_dns_label, parse_object_name
from csi_driver.core.spec import MAX_NAMES, parse_key_type
from csi_driver.kube.tls_secrets.source_objects import ListObject
from csi_driver.secrets.requests import CertificateOptions, SecretName, Source, SourceRequest
from csi_driver.secrets.sources.annotated import SourceRules

LIST_KEY = "certificates"
MAX_LIST_BYTES = 512 * 1024
MAX_CERTIFICATES = 5000
MAX_FAULTS = 100  # of a list that are reported; the text of an event is shorter anyway
_KEYS = ("secret", "domains", "email", "tsigSecretName", "issuer", "key-type", "duration")
_Parsed: TypeAlias = "tuple[tuple[SourceRequest, ...], tuple[Fault, ...], frozenset[SecretName] | None]"
"""The valid requests, the faults of the others, and the Secrets of these; None if no entry can be read."""
_NAMESPACED = re.compile(r"(?:(?P<namespace>[^/]*)/)?(?P<name>[^/]*)")


class _FaultList(DocumentReader):
    """Collects the faults of one entry, so that the other entries are used."""

    def faults(self) -> list[Fault]:
        try:
            self.finish()
        except CertmountError as error:
            return [fault if isinstance(fault, Fault) else Fault("list", str(fault)) for fault in error.faults]
        return []


def read_certificate_list(item: ListObject, rules: SourceRules) -> Source:
    """Return the requests of a list that a ConfigMap contains."""
    if item.content is None:
        fault = Fault(f"data.{LIST_KEY}", "is missing", f"put the list in the key {LIST_KEY}")
        return Source(item.target, (), (fault,), None)
    return Source(item.target, *_parse(item.content, item.target.namespace, rules))


def parse_certificate_list(
    content: bytes, namespace: str, rules: SourceRules
) -> tuple[tuple[SourceRequest, ...], tuple[Fault, ...]]:
    """Return the valid entries of a list in this namespace, and all faults of the others, with their lines."""
    requests, faults, _ = _parse(content, namespace, rules)
    return requests, faults


def _parse(content: bytes, namespace: str, rules: SourceRules) -> _Parsed:
    if len(content) > MAX_LIST_BYTES:
        return (), (Fault("list", f"is longer than {MAX_LIST_BYTES} bytes", "use several ConfigMaps"),), None
    try:
        located = read_yaml(content, "list", Reason.INVALID_SOURCE)
    except CertmountError as error:
        faults = tuple(fault if isinstance(fault, Fault) else Fault("list", str(fault)) for fault in error.faults)
        return (), faults, None
    return _read(located, namespace, rules)


def _read(located: Located, namespace: str, rules: SourceRules) -> _Parsed:
    entries = located.data
    lines: Mapping[Path, int] = {(LIST_KEY, *path): line for path, line in located.lines.items()}
    if isinstance(entries, Mapping) and LIST_KEY in entries and len(entries) == 1:
        entries, lines = entries[LIST_KEY], located.lines
    if entries is None:
        return (), (), frozenset()
    if not isinstance(entries, list):
        return (), (Fault("list", "is not a list", "begin each certificate with '- secret: NAME'"),), None
    if len(entries) > MAX_CERTIFICATES:
        return (), (Fault("list", f"has {len(entries)} certificates", f"use at most {MAX_CERTIFICATES}"),), None
    requests: dict[SecretName, SourceRequest] = {}
    faults: list[Fault] = []
    faulty: set[SecretName] = set()
    count = 0
    for index, entry in enumerate(entries):
        path: Path = (LIST_KEY, index)
        reader = _FaultList(Reason.INVALID_SOURCE, "list", lines, MAX_FAULTS - len(faults))
        secret, request = _entry(reader, path, entry, namespace, rules)
        if request is not None and (known := requests.get(request.secret)) is not None:
            reader.fault((*path, "secret"), f"{str(request.secret)!r} is also the Secret of {known.path}")
        found = reader.faults()
        faults += found[: MAX_FAULTS - len(faults)]
        count += len(found)
        if found and secret is not None:
            faulty.add(secret)
        elif request is not None:
            requests[request.secret] = request
    if count > len(faults):
        faults.append(Fault("list", f"has {count - len(faults)} more faults"))
    return tuple(requests.values()), tuple(faults), frozenset(faulty)


def _entry(
    reader: DocumentReader, path: Path, entry: object, namespace: str, rules: SourceRules
) -> tuple[SecretName | None, SourceRequest | None]:
    """Return the Secret of an entry, and the request; each is None if it is not valid."""
    top = reader.mapping(path, entry, allowed=_KEYS, required=("secret", "domains"))

    def secret_name(text: str) -> SecretName:
        name = _namespaced(text, namespace)
        if rules.namespaces is not None and name.namespace not in rules.namespaces:
            known = ", ".join(sorted(rules.namespaces)[:10])
            raise ValueError(f"is in a namespace that the controller does not manage; --namespace has {known}")
        return name

    secret = reader.text((*path, "secret"), top.get("secret"), secret_name)
    domains = top.get("domains")
    names = reader.items(
        (*path, "domains"), domains, lambda at, value: reader.text(at, value, DNSName.parse), MAX_NAMES
    )
    if domains == []:
        reader.fault((*path, "domains"), "is empty", "list the DNS names of the certificate")
    email = reader.text((*path, "email"), top.get("email") or None, EmailAddress.parse)
    tsig = reader.text(
        (*path, "tsigSecretName"), top.get("tsigSecretName") or None, lambda text: _namespaced(text, namespace)
    )
    issuer = reader.text((*path, "issuer"), top.get("issuer"), parse_dns_label)
    key_type = reader.text((*path, "key-type"), top.get("key-type"), parse_key_type)
    duration = reader.text((*path, "duration"), top.get("duration"), parse_duration)
    if secret is None or not names:
        return secret, None
    options = CertificateOptions(issuer or rules.default_issuer, key_type, duration, str(email or ""), str(tsig or ""))
    return secret, SourceRequest(secret, tuple(dict.fromkeys(names)), options, reader.label(path))


def _namespaced(text: str, namespace: str) -> SecretName:
    """Return NAME in the list's namespace, or NAMESPACE/NAME; raises ValueError."""
    match = _NAMESPACED.fullmatch(text)
    if match is None:
        raise ValueError("is not NAME or NAMESPACE/NAME of a Secret")
    given = match["namespace"]
    return SecretName(namespace if given is None else parse_dns_label(given), parse_object_name(match["name"]))
