"""A second implementation of the policy for comparison: slow and simple, without regular expressions."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

STAR = None
"""The token of a ``*``."""
HOUR = 3600
DAY = 24 * HOUR
PLAIN = set("abcdefghijklmnopqrstuvwxyz0123456789-.")
USAGES = ("server", "client")
DURATIONS = [10, *range(HOUR // 2, 73 * HOUR, HOUR // 2)]
"""The lifetimes to try, in seconds. They include every limit of the generated rules."""

Tokens = Sequence[str | None]


def matches(tokens: Tokens, text: str) -> bool:
    """Return whether the text consists of the tokens' characters, with one or more characters for each star."""
    reachable = {0}
    for token in tokens:
        if token is STAR:
            first = min(reachable, default=len(text))
            reachable = set(range(first + 1, len(text) + 1))
        else:
            reachable = {end + 1 for end in reachable if end < len(text) and text[end] == token}
    return len(text) in reachable


def glob_matches(glob: str, text: str) -> bool:
    return matches([STAR if character == "*" else character for character in glob], text)


def tokens_of(part: str, values: Mapping[str, str]) -> list[str | None] | None:
    """Return the characters of a part of a pattern; None if a placeholder's value is not a plain Kubernetes name."""
    tokens: list[str | None] = []
    rest = part
    while rest:
        if rest[0] == "{":
            name, rest = rest[1:].split("}", 1)
            if not values[name] or set(values[name]) - PLAIN:
                return None
            tokens += list(values[name])
        else:
            tokens.append(STAR if rest[0] == "*" else rest[0])
            rest = rest[1:]
    return tokens


def parts_of(text: str) -> list[str]:
    """Split a name into the parts that are compared: labels, path segments, or a local part and labels."""
    if "://" in text:
        return text.split("/")
    local, at, domain = text.rpartition("@")
    return [*([local] if at else []), *domain.split(".")]


def kind_of(text: str) -> str:
    """Return the key of the list that contains the name or pattern."""
    if "://" in text:
        return "uris"
    if "@" in text:
        return "emails"
    return "ips" if ":" in text or text.partition("/")[0].replace(".", "").isdigit() else "dns"


def range_matches(known: str, address: str) -> bool:
    network, _, length = known.partition("/")
    first, actual = ipaddress.ip_address(network), ipaddress.ip_address(address)
    bits = first.max_prefixlen
    kept = int(length) if length else bits
    return first.version == actual.version and f"{int(first):0{bits}b}"[:kept] == f"{int(actual):0{bits}b}"[:kept]


def name_matches(pattern: str, name: str, domains: Mapping[str, str], values: Mapping[str, str]) -> bool:
    if kind_of(name) == "ips":
        return range_matches(pattern, name)
    for domain, text in domains.items():
        pattern = pattern.replace("{" + domain + "}", text)
    expected, actual = parts_of(pattern), parts_of(name)
    if len(expected) != len(actual):
        return False
    for part, text in zip(expected, actual, strict=True):
        if text == "*" and part != "*":
            return False
        if text == part == "*":
            continue
        tokens = tokens_of(part, values)
        if tokens is None or not matches(tokens, text):
            return False
    return True


@dataclass(frozen=True)
class Pod:
    """The pod that requests a certificate."""

    namespace: str
    account: str
    name: str
    labels: tuple[tuple[str, str], ...] = ()
    services: tuple[str, ...] = ()

    def values(self) -> Iterator[dict[str, str]]:
        """Return the values of the placeholders: one set for each Service, and one without a Service."""
        plain = {"namespace": self.namespace, "service_account": self.account, "pod": self.name, "service": ""}
        yield plain
        for service in self.services:
            yield {**plain, "service": service}


@dataclass(frozen=True)
class Request:
    """A request; None and empty values mean that the volume does not set the attribute."""

    names: tuple[str, ...] = ()
    key_type: str = "EC-P256"
    usages: tuple[str, ...] = ()
    seconds: int | None = None
    issuer: str = "internal"


@dataclass(frozen=True)
class Entry:
    """A rule of a policy file; None for a missing key."""

    namespaces: tuple[str, ...] = ("*",)
    service_accounts: tuple[str, ...] = ("*",)
    labels: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    key_types: tuple[str, ...] | None = None
    usages: tuple[str, ...] | None = None
    shortest: int | None = None
    longest: int | None = None
    issuers: tuple[str, ...] | None = None

    def document(self) -> dict[str, object]:
        """Return the rule as data of the YAML file."""
        match: dict[str, object] = {
            "namespaces": list(self.namespaces),
            "serviceAccounts": list(self.service_accounts),
        }
        if self.labels:
            match["namespaceLabels"] = dict(self.labels)
        allow: dict[str, object] = {
            kind: [name for name in self.names if kind_of(name) == kind] for kind in ("dns", "uris", "ips", "emails")
        }
        for key, items in (("key_types", self.key_types), ("usages", self.usages), ("issuers", self.issuers)):
            if items is not None:
                allow[key] = list(items)
        for key, seconds in (("min_duration", self.shortest), ("max_duration", self.longest)):
            if seconds is not None:
                allow[key] = f"{seconds}s"
        return {"match": match, "allow": allow}

    def matches_pod(self, pod: Pod) -> bool:
        labels = dict(pod.labels)
        return (
            any(glob_matches(glob, pod.namespace) for glob in self.namespaces)
            and any(glob_matches(glob, pod.account) for glob in self.service_accounts)
            and all(key in labels and glob_matches(glob, labels[key]) for key, glob in self.labels)
        )

    def permits(self, request: Request, usages: Sequence[str], seconds: int) -> bool:
        """Return whether the request is within the limits of the rule."""
        return (
            (self.key_types is None or request.key_type in self.key_types)
            and request.issuer in (self.issuers or ("internal",))
            and set(usages) <= set(self.usages or USAGES)
            and (self.shortest or 10) <= seconds <= (self.longest or DAY)
        )

    def allows(self, name: str, own: str, pod: Pod, domains: Mapping[str, str]) -> bool:
        """Return whether a pattern matches the name with any Service. The own SPIFFE ID needs no pattern."""
        return name == own or any(
            name_matches(pattern, name, domains, values)
            for pattern in self.names
            if kind_of(pattern) == kind_of(name)
            for values in pod.values()
        )


BUILT_IN = Entry(names=("{service}.{namespace}.svc", "{service}.{namespace}.svc.{cluster_domain}"))


@dataclass(frozen=True)
class Allowed:
    """The content of the certificate."""

    names: frozenset[str]
    usages: tuple[str, ...]
    seconds: int


@dataclass(frozen=True)
class NotAllowed:
    """The names that no rule allows; empty if the names are only not allowed together."""

    names: frozenset[str]


def evaluate(entries: Sequence[Entry], request: Request, pod: Pod, domains: Mapping[str, str]) -> Allowed | NotAllowed:
    """Find the decision: try all combinations of usages and lifetimes."""
    own = f"spiffe://{domains['trust_domain']}/ns/{pod.namespace}/sa/{pod.account}"
    rules = [entry for entry in (BUILT_IN, *entries) if entry.matches_pod(pod)]
    names = {*request.names, own}
    implied = set()
    if not request.names:
        for service in pod.services:
            implied |= {
                f"{service}.{pod.namespace}.svc",
                f"{service}.{pod.namespace}.svc.{domains['cluster_domain']}",
            }

    fitting = {name: [rule for rule in rules if rule.allows(name, own, pod, domains)] for name in names | implied}

    def allowed(name: str, usages: Sequence[str], seconds: int) -> bool:
        return any(rule.permits(request, usages, seconds) for rule in fitting[name])

    all_usages = [request.usages] if request.usages else [USAGES, ("server",), ("client",)]
    all_durations = (
        [request.seconds]
        if request.seconds is not None
        else sorted(DURATIONS, key=lambda duration: (abs(duration - DAY), duration))
    )
    for usages in all_usages:
        for seconds in all_durations:
            if all(allowed(name, usages, seconds) for name in names):
                more = {name for name in implied if allowed(name, usages, seconds)}
                return Allowed(frozenset(names | more), tuple(usages), seconds)
    not_allowed = {
        name
        for name in names
        if not any(allowed(name, usages, seconds) for usages in all_usages for seconds in all_durations)
    }
    return NotAllowed(frozenset(not_allowed - {own} or not_allowed))
