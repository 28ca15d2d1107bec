"""Requests of Ingresses and Gateways with the annotation kubernetes.io/tls-acme, as kube-lego reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from csi_driver.core.durations import parse_duration
from csi_driver.core.errors import Fault
from csi_driver.core.names import (
    DNSName,
    internationalized_problem,
    parse_dns_label,
    parse_object_name,
)
from csi_driver.core.spec import MAX_NAMES, parse_key_type
from csi_driver.kube.tls_secrets.source_objects import (
    DURATION,
    INGRESS_CLASS,
    ISSUER,
    KEY_TYPE,
    KUBE_LEGO_MANAGED,
    TLS_ACME,
    TLSEntry,
    TLSObject,
)
from csi_driver.secrets.requests import CertificateOptions, SecretName, Source, SourceRequest

MAX_OBJECT_HOSTS = 500
"""Of all entries: to parse more of them would delay the sources of others."""
_MAX_FAULTS = 10
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SourceRules:
    """Which sources are served, and what applies if a source does not say it."""

    namespaces: frozenset[str] | None  # where Secrets can be; None: anywhere
    default_issuer: str
    ingress_classes: frozenset[str] = frozenset()  # empty: all


def read_annotated(item: TLSObject, rules: SourceRules) -> Source:
    """Return the requests of an Ingress or a Gateway; none if it does not ask for certificates or has another class."""
    if item.annotations.get(TLS_ACME) != "true" or not _is_served(item, rules):
        return Source(item.target)
    reader = _Reader(item.target.namespace)
    options = reader.options(item, rules)
    if options is None:
        return Source(item.target, (), tuple(reader.faults), None)
    requests = [request for entry in reader.limited(item) if (request := reader.request(entry, options)) is not None]
    united = reader.united(requests)
    if item.more_entries:
        reader.fault("spec", f"has {item.more_entries} more entries than certmount reads", "use several objects")
    named = frozenset(SecretName(item.target.namespace, entry.secret) for entry in item.entries)
    return Source(item.target, united, tuple(reader.faults[:_MAX_FAULTS]), named)


def _is_served(item: TLSObject, rules: SourceRules) -> bool:
    """As kube-lego: the annotation decides, then the field; an Ingress without a class is always served."""
    if item.target.kind != "Ingress":
        return True
    if item.annotations.get(KUBE_LEGO_MANAGED) == "true":
        return False
    ingress_class = item.annotations.get(INGRESS_CLASS) or item.ingress_class
    return not rules.ingress_classes or not ingress_class or ingress_class in rules.ingress_classes


@dataclass(slots=True)
class _Reader:
    namespace: str
    faults: list[Fault] = field(default_factory=list)

    def fault(self, path: str, problem: str, hint: str = "") -> None:
        self.faults.append(Fault(path, problem, hint))

    def limited(self, item: TLSObject) -> Sequence[TLSEntry]:
        """Return the entries that are few enough to be parsed."""
        entries, hosts = item.entries, list[str]()
        for number, entry in enumerate(entries):
            if len(hosts) + len(entry.hosts) > MAX_OBJECT_HOSTS:
                problem = f"is beyond the {MAX_OBJECT_HOSTS} hosts that certmount reads of one object"
                self.fault(entry.path, problem, "use several objects")
                entries = entries[:number]
                break
            hosts += entry.hosts
        if too_many := internationalized_problem(hosts):
            self.fault("spec", too_many, "use several objects")
            return ()
        return entries

    def united(self, requests: Iterable[SourceRequest]) -> tuple[SourceRequest, ...]:
        """Unite the names of entries with the same Secret, such as those of several listeners."""
        united: dict[SecretName, SourceRequest] = {}
        for request in requests:
            known = united.get(request.secret, request)
            names = tuple(dict.fromkeys((*known.names, *request.names)))
            if len(names) > MAX_NAMES:
                problem = f"has more than {MAX_NAMES} names together with those of {known.path}"
                self.fault(f"{request.path}: {request.secret}", problem, "use another Secret")
            else:
                united[request.secret] = dataclasses.replace(known, names=names)
        return tuple(united.values())

    def options(self, item: TLSObject, rules: SourceRules) -> CertificateOptions | None:
        """Return the options in the annotations; None if one is invalid."""
        issuer = self._annotation(item, ISSUER, parse_dns_label) or rules.default_issuer
        key_type = self._annotation(item, KEY_TYPE, parse_key_type)
        duration = self._annotation(item, DURATION, parse_duration)
        return None if self.faults else CertificateOptions(issuer, key_type, duration)

    def request(self, entry: TLSEntry, options: CertificateOptions) -> SourceRequest | None:
        """Return the request of an entry; None if it is faulty."""
        before = len(self.faults)
        name = entry.secret
        if not name:
            self.fault(f"{entry.path}.secretName", "is missing", "name the Secret for the certificate")
        else:
            self._parse(f"{entry.path}.secretName", name, parse_object_name)
        if not entry.hosts:
            self.fault(f"{entry.path}.hosts", "is empty", "list the DNS names of the certificate")
        if len(entry.hosts) > MAX_NAMES:
            self.fault(f"{entry.path}.hosts", f"has more than {MAX_NAMES} names", "use several Secrets")
            return None
        names = [
            self._parse(f"{entry.path}.hosts[{number}]", host, DNSName.parse) for number, host in enumerate(entry.hosts)
        ]
        if len(self.faults) > before:
            return None
        parsed = tuple(dict.fromkeys(name for name in names if name is not None))
        return SourceRequest(SecretName(self.namespace, name), parsed, options, entry.path)

    def _annotation(self, item: TLSObject, key: str, parse: Callable[[str], _T]) -> _T | None:
        value = item.annotations.get(key)
        return None if value is None else self._parse(f"metadata.annotations[{key}]", value, parse)

    def _parse(self, path: str, value: str, parse: Callable[[str], _T]) -> _T | None:
        try:
            return parse(value)
        except ValueError as problem:
            self.fault(path, f"{value[:80]!r} {problem}")
            return None
