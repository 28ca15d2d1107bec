"""The policy once more, written apart from the one in use: slow, plain, and by other means (no regular expressions, no cleverness)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

STAR = None
"""What a ``*`` becomes among the characters of a part."""
HOUR = 3600
DAY = 24 * HOUR
PLAIN = set("abcdefghijklmnopqrstuvwxyz0123456789-.")
USAGES = ("server", "client")
LIVES = [10, *range(HOUR // 2, 73 * HOUR, HOUR // 2)]
"""Seconds: all lives that are looked at. Policies of which every limit is one of these have their best life among them."""

Tokens = Sequence[str | None]


def fits(tokens: Tokens, text: str) -> bool:
    """True when the text is the tokens' characters with one or more characters for each star."""
    reachable = {0}
    for token in tokens:
        if token is STAR:
            first = min(reachable, default=len(text))
            reachable = set(range(first + 1, len(text) + 1))
        else:
            reachable = {end + 1 for end in reachable if end < len(text) and text[end] == token}
    return len(text) in reachable


def glob_fits(glob: str, text: str) -> bool:
    """A glob of namespaces, service accounts or label values."""
    return fits([STAR if character == "*" else character for character in glob], text)


def tokens_of(part: str, values: Mapping[str, str]) -> list[str | None] | None:
    """The characters of a pattern's part with the values put in; None when a value is not a plain Kubernetes name."""
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
    """What is compared with what: labels, segments, or what is before the @ and then labels."""
    if "://" in text:
        return text.split("/")
    local, at, domain = text.rpartition("@")
    return [*([local] if at else []), *domain.split(".")]


def kind_of(text: str) -> str:
    """The list that a name or pattern stands in."""
    if "://" in text:
        return "uris"
    if "@" in text:
        return "emails"
    return "ips" if ":" in text or text.partition("/")[0].replace(".", "").isdigit() else "dns"


def range_fits(known: str, address: str) -> bool:
    """True when the address begins with the bits of the range."""
    network, _, length = known.partition("/")
    first, given = ipaddress.ip_address(network), ipaddress.ip_address(address)
    bits = first.max_prefixlen
    kept = int(length) if length else bits
    return first.version == given.version and f"{int(first):0{bits}b}"[:kept] == f"{int(given):0{bits}b}"[:kept]


def name_fits(pattern: str, name: str, domains: Mapping[str, str], values: Mapping[str, str]) -> bool:
    """True when the pattern allows the name."""
    if kind_of(name) == "ips":
        return range_fits(pattern, name)
    for domain, text in domains.items():
        pattern = pattern.replace("{" + domain + "}", text)
    wanted, given = parts_of(pattern), parts_of(name)
    if len(wanted) != len(given):
        return False
    for part, text in zip(wanted, given, strict=True):
        if text == "*" and part != "*":
            return False
        if text == part == "*":
            continue
        tokens = tokens_of(part, values)
        if tokens is None or not fits(tokens, text):
            return False
    return True


@dataclass(frozen=True)
class Pod:
    """Who asks."""

    namespace: str
    account: str
    name: str
    labels: tuple[tuple[str, str], ...] = ()
    services: tuple[str, ...] = ()

    def values(self) -> Iterator[dict[str, str]]:
        """What may stand in placeholders: once for each Service, and once without any."""
        plain = {"namespace": self.namespace, "service_account": self.account, "pod": self.name, "service": ""}
        yield plain
        for service in self.services:
            yield {**plain, "service": service}


@dataclass(frozen=True)
class Wish:
    """What is asked for; None and empty where nothing is said."""

    names: tuple[str, ...] = ()
    key_type: str = "EC-P256"
    usages: tuple[str, ...] = ()
    seconds: int | None = None
    issuer: str = "internal"


@dataclass(frozen=True)
class Entry:
    """One rule of a policy file; None is what the file leaves away."""

    namespaces: tuple[str, ...] = ("*",)
    service_accounts: tuple[str, ...] = ("*",)
    labels: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    key_types: tuple[str, ...] | None = None
    usages: tuple[str, ...] | None = None
    least: int | None = None
    most: int | None = None
    issuers: tuple[str, ...] | None = None

    def document(self) -> dict[str, object]:
        """The rule as its file's YAML reads."""
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
        for key, seconds in (("min_duration", self.least), ("max_duration", self.most)):
            if seconds is not None:
                allow[key] = f"{seconds}s"
        return {"match": match, "allow": allow}

    def is_for(self, pod: Pod) -> bool:
        """True when the rule is for the pod."""
        labels = dict(pod.labels)
        return (
            any(glob_fits(glob, pod.namespace) for glob in self.namespaces)
            and any(glob_fits(glob, pod.account) for glob in self.service_accounts)
            and all(key in labels and glob_fits(glob, labels[key]) for key, glob in self.labels)
        )

    def permits(self, wish: Wish, usages: Sequence[str], seconds: int) -> bool:
        """True when the rule's limits are kept."""
        return (
            (self.key_types is None or wish.key_type in self.key_types)
            and wish.issuer in (self.issuers or ("internal",))
            and set(usages) <= set(self.usages or USAGES)
            and (self.least or 10) <= seconds <= (self.most or DAY)
        )

    def allows(self, name: str, own: str, pod: Pod, domains: Mapping[str, str]) -> bool:
        """True when one of the rule's patterns fits the name, with any Service; the own SPIFFE ID needs no pattern."""
        return name == own or any(
            name_fits(pattern, name, domains, values)
            for pattern in self.names
            if kind_of(pattern) == kind_of(name)
            for values in pod.values()
        )


BUILT_IN = Entry(names=("{service}.{namespace}.svc", "{service}.{namespace}.svc.{cluster_domain}"))


@dataclass(frozen=True)
class Granted:
    """All names of the certificate, and what else was decided."""

    names: frozenset[str]
    usages: tuple[str, ...]
    seconds: int


@dataclass(frozen=True)
class Refused:
    """The names that no rule allows, whatever else is chosen; none where it is their being together that is refused."""

    names: frozenset[str]


def judge(entries: Sequence[Entry], wish: Wish, pod: Pod, domains: Mapping[str, str]) -> Granted | Refused:
    """What a policy says, found by trying everything."""
    own = f"spiffe://{domains['trust_domain']}/ns/{pod.namespace}/sa/{pod.account}"
    rules = [entry for entry in (BUILT_IN, *entries) if entry.is_for(pod)]
    names = {*wish.names, own}
    implied = set()
    if not wish.names:
        for service in pod.services:
            implied |= {
                f"{service}.{pod.namespace}.svc",
                f"{service}.{pod.namespace}.svc.{domains['cluster_domain']}",
            }

    fitting = {name: [rule for rule in rules if rule.allows(name, own, pod, domains)] for name in names | implied}

    def allowed(name: str, usages: Sequence[str], seconds: int) -> bool:
        return any(rule.permits(wish, usages, seconds) for rule in fitting[name])

    every_usages = [wish.usages] if wish.usages else [USAGES, ("server",), ("client",)]
    every_life = [wish.seconds] if wish.seconds is not None else sorted(LIVES, key=lambda life: (abs(life - DAY), life))
    for usages in every_usages:
        for seconds in every_life:
            if all(allowed(name, usages, seconds) for name in names):
                more = {name for name in implied if allowed(name, usages, seconds)}
                return Granted(frozenset(names | more), tuple(usages), seconds)
    hopeless = {
        name
        for name in names
        if not any(allowed(name, usages, seconds) for usages in every_usages for seconds in every_life)
    }
    return Refused(frozenset(hopeless - {own} or hopeless))
