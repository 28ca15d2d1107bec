"""A second implementation of the policy for comparison: slow and simple, without regular expressions."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

STAR = None  # the token of a ``*``
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


def subject_matches(pattern: str, text: str, domains: Mapping[str, str], values: Mapping[str, str]) -> bool:
    """Return whether a pattern such as ``CN={pod}`` matches an attribute. A star matches any characters."""
    for domain, value in domains.items():
        pattern = pattern.replace("{" + domain + "}", value)
    tokens = tokens_of(pattern, values)
    return tokens is not None and matches(tokens, text)


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
    """The pod, or the Secret in its namespace, that requests a certificate."""

    namespace: str
    account: str
    name: str
    labels: tuple[tuple[str, str], ...] = ()
    services: tuple[str, ...] = ()
    governing: str = ""  # the headless Service of its StatefulSet, which selects it
    secret: str = ""  # the name of the Secret; empty for a pod

    def values(self) -> Iterator[dict[str, str]]:
        """Return the values of the placeholders: one set for each Service, and one without a Service."""
        plain = {"namespace": self.namespace, "service_account": self.account, "pod": self.name, "service": ""}
        if self.secret:
            yield {**dict.fromkeys(plain, ""), "namespace": self.namespace}
            return
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
    spiffe: bool = True
    acme_email: str = ""
    subject: tuple[str, ...] = ()  # its attributes, not escaped


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
    without_spiffe_id: bool | None = None
    secrets: tuple[str, ...] = ()  # in place of service accounts
    acme_emails: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()

    def document(self) -> dict[str, object]:
        kind = "secrets" if self.secrets else "serviceAccounts"
        match: dict[str, object] = {
            "namespaces": list(self.namespaces),
            kind: list(self.secrets or self.service_accounts),
        }
        if self.labels:
            match["namespaceLabels"] = dict(self.labels)
        kinds = ("dns", "uris", "ips", "emails")
        allow: dict[str, object] = {kind: [name for name in self.names if kind_of(name) == kind] for kind in kinds}
        for key, items in (("key_types", self.key_types), ("usages", self.usages), ("issuers", self.issuers)):
            if items is not None:
                allow[key] = list(items)
        for key, patterns in (("acme_emails", self.acme_emails), ("subjects", self.subjects)):
            if patterns:
                allow[key] = list(patterns)
        if self.without_spiffe_id is not None:
            allow["without_spiffe_id"] = self.without_spiffe_id
        for key, seconds in (("min_duration", self.shortest), ("max_duration", self.longest)):
            if seconds is not None:
                allow[key] = f"{seconds}s"
        return {"match": match, "allow": allow}

    def matches_pod(self, pod: Pod) -> bool:
        labels = dict(pod.labels)
        return (
            any(glob_matches(glob, pod.namespace) for glob in self.namespaces)
            and bool(pod.secret) == bool(self.secrets)
            and any(glob_matches(glob, pod.secret or pod.account) for glob in self.secrets or self.service_accounts)
            and all(key in labels and glob_matches(glob, labels[key]) for key, glob in self.labels)
        )

    def permits(self, request: Request, usages: Sequence[str], seconds: int) -> bool:
        return (
            (self.key_types is None or request.key_type in self.key_types)
            and request.issuer in (self.issuers or ("internal",))
            and set(usages) <= set(self.usages or USAGES)
            and (self.shortest or 10) <= seconds <= (self.longest or DAY)
            and (request.spiffe or self.without_spiffe_id is True or bool(self.secrets))
        )

    def allows_account(self, email: str, pod: Pod, domains: Mapping[str, str]) -> bool:
        (*_, values) = pod.values()
        return not email or any(name_matches(pattern, email, domains, values) for pattern in self.acme_emails)

    def allows_subject(self, request: Request, pod: Pod, domains: Mapping[str, str]) -> bool:
        """Return whether a pattern matches each attribute. A common name that is a requested DNS name needs none."""
        known = {f"CN={name}" for name in request.names if kind_of(name) == "dns"}
        return all(
            any(subject_matches(pattern, text, domains, values) for pattern in self.subjects for values in pod.values())
            for text in request.subject
            if text not in known
        )

    def allows(self, name: str, own: str, pod: Pod, domains: Mapping[str, str]) -> bool:
        """Return whether a pattern matches the name with any Service. The own SPIFFE ID needs no pattern."""
        return name == own or any(
            name_matches(pattern, name, domains, values)
            for pattern in self.names
            if kind_of(pattern) == kind_of(name)
            for values in pod.values()
        )


_SERVICE_NAMES = ("{service}.{namespace}.svc", "{service}.{namespace}.svc.{cluster_domain}")
BUILT_IN = Entry(names=_SERVICE_NAMES)


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


@dataclass(frozen=True)
class NotValid:
    """The policy allows the request, but no such certificate is valid."""


Decision = Allowed | NotAllowed | NotValid


def own_id(pod: Pod, domains: Mapping[str, str]) -> str:
    """Return the SPIFFE ID of a pod; empty for a Secret."""
    return "" if pod.secret else f"spiffe://{domains['trust_domain']}/ns/{pod.namespace}/sa/{pod.account}"


def evaluate(entries: Sequence[Entry], request: Request, pod: Pod, domains: Mapping[str, str]) -> Decision:
    """Find the decision: try all combinations of usages and lifetimes."""
    own = own_id(pod, domains)
    built_in = BUILT_IN
    if pod.governing and "." not in pod.name:
        below = f"{pod.name}.{pod.governing}.{pod.namespace}.svc"
        built_in = replace(BUILT_IN, names=(*BUILT_IN.names, below, f"{below}.{domains['cluster_domain']}"))
    rules = [entry for entry in (built_in, *entries) if entry.matches_pod(pod)]
    rules = [rule for rule in rules if rule.allows_account(request.acme_email, pod, domains)]
    rules = [rule for rule in rules if rule.allows_subject(request, pod, domains)]
    names = {*request.names, own} if request.spiffe and own else {*request.names}
    uris = [name for name in names if "://" in name]
    valid = names and (len(uris) < 2 or not any(uri.startswith("spiffe://") for uri in uris))
    implied = set()
    if not request.names:
        for service in pod.services:
            implied |= {f"{service}.{pod.namespace}.svc", f"{service}.{pod.namespace}.svc.{domains['cluster_domain']}"}

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
                if not valid:
                    return NotValid()
                more = {name for name in implied if allowed(name, usages, seconds)}
                return Allowed(frozenset(names | more), tuple(usages), seconds)
    not_allowed = {
        name
        for name in names
        if not any(allowed(name, usages, seconds) for usages in all_usages for seconds in all_durations)
    }
    return NotAllowed(frozenset(not_allowed - {own} or not_allowed))
