"""The name policy once more, written apart from the one in use: slow, plain, and by other means (no regular expressions)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

STAR = None
"""What a ``*`` becomes among the characters of a part."""
DAY = timedelta(hours=24)
PLAIN = set("abcdefghijklmnopqrstuvwxyz0123456789-.")

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
    """A glob of namespaces or service accounts."""
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


def name_fits(pattern: str, name: str, domains: Mapping[str, str], values: Mapping[str, str]) -> bool:
    """True when the pattern allows the name (a URI, if it holds ``://``)."""
    separator = "/" if "://" in pattern else "."
    for domain, text in domains.items():
        pattern = pattern.replace("{" + domain + "}", text)
    wanted, given = pattern.split(separator), name.split(separator)
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
class Entry:
    """One rule of a policy file."""

    namespaces: tuple[str, ...]
    service_accounts: tuple[str, ...]
    dns: tuple[str, ...]
    uris: tuple[str, ...]
    hours: int | None

    @property
    def limit(self) -> timedelta:
        return DAY if self.hours is None else timedelta(hours=self.hours)

    def document(self) -> dict[str, object]:
        """The rule as its file's YAML reads."""
        allow: dict[str, object] = {"dns": list(self.dns), "uris": list(self.uris)}
        if self.hours is not None:
            allow["max_duration"] = f"{self.hours}h"
        return {
            "match": {"namespaces": list(self.namespaces), "serviceAccounts": list(self.service_accounts)},
            "allow": allow,
        }


@dataclass(frozen=True)
class Verdict:
    """Which names are refused, and the longest life for the others."""

    refused: frozenset[str]
    longest: timedelta


def judge(
    entries: Sequence[Entry], asked: Sequence[str], own: str, domains: Mapping[str, str], values: Mapping[str, str]
) -> Verdict:
    """What a policy says of the names that a pod asks for."""
    applying = [
        entry
        for entry in entries
        if any(glob_fits(glob, values["namespace"]) for glob in entry.namespaces)
        and any(glob_fits(glob, values["service_account"]) for glob in entry.service_accounts)
    ]
    longest = max([DAY, *(entry.limit for entry in applying)])
    refused = set()
    for name in asked:
        if name == own:
            continue
        limits = [
            entry.limit
            for entry in applying
            for pattern in (entry.uris if "://" in name else entry.dns)
            if name_fits(pattern, name, domains, values)
        ]
        if limits:
            longest = min(longest, max(limits))
        else:
            refused.add(name)
    return Verdict(frozenset(refused), longest)
