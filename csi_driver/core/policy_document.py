"""Reads a policy from the plain data of its file. Everything wrong is said at once, by its path and line in the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import parse_word
from csi_driver.core.patterns import IPRange, NamePattern
from csi_driver.core.policy import Policy
from csi_driver.core.rules import ALL_USAGES, Denial, Limits, Match, Rule
from csi_driver.core.spec import LEAST_DURATION, parse_key_type, parse_usage

Place = tuple[str | int, ...]
"""Keys and indices from the top of the file: ``("policy", 1, "allow", "dns", 0)``."""

MOST_RULES = 1000
MOST_ITEMS = 1000
"""Items of one list, and labels of one match."""
_MOST_FAULTS = 50
_GLOB = re.compile(r"[a-z0-9*.-]+", re.ASCII)
# Kubernetes' own rules for labels: an optional DNS name and a slash before 63 characters; values of up to 63.
_LABEL_KEY = re.compile(r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", re.ASCII)
_LABEL_GLOB = re.compile(r"[A-Za-z0-9._*-]{0,63}", re.ASCII)
_REASON = re.compile(r".{1,200}")
_T = TypeVar("_T")


def parse_policy(
    document: object,
    *,
    trust_domain: str,
    cluster_domain: str,
    revision: str = "",
    lines: Mapping[Place, int] | None = None,
) -> Policy:
    """Takes the file's content: None for an empty file, else ``{"policy": [...], "deny": [...]}``.

    ``lines`` holds the line of each key and item; what is not in it is told by its path alone.

    Raises:
        CertmountError: InvalidPolicy, with one fault for everything that is wrong.
    """
    reader = _Reader({"trust_domain": trust_domain, "cluster_domain": cluster_domain}, lines or {})
    top = reader.mapping((), {} if document is None else document, allowed=("policy", "deny"))
    rules = reader.each(("policy",), top.get("policy"), reader.rule, MOST_RULES)
    denials = reader.each(("deny",), top.get("deny"), reader.denial, MOST_RULES)
    reader.finish()
    return Policy(trust_domain, cluster_domain, rules, denials, revision)


class _Reader:
    def __init__(self, domains: Mapping[str, str], lines: Mapping[Place, int]) -> None:
        self._domains = domains
        self._lines = lines
        self._faults: list[Fault] = []

    def fault(self, path: Place, problem: str, hint: str = "") -> None:
        self._faults.append(Fault(self.label(path), problem, hint))

    def finish(self) -> None:
        if self._faults:
            more = len(self._faults) - _MOST_FAULTS
            last = [f"and {more} more faults"] if more > 0 else []
            raise CertmountError(Reason.INVALID_POLICY, *self._faults[:_MOST_FAULTS], *last)

    def label(self, path: Place) -> str:
        """A place as people read it: ``policy[1].allow.dns[0] (line 14)``; what is not there has the line of what it lacks in."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" for step in path).lstrip(".")
        line = next((self._lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self._lines), None)
        return (text or "policy file") + (f" (line {line})" if line is not None else "")

    def rule(self, path: Place, entry: object) -> Rule | None:
        top = self.mapping(path, entry, allowed=("match", "allow"), required=("match", "allow"))
        match = self.match((*path, "match"), top.get("match"), labels=True)
        at, domains = (*path, "allow"), self._domains
        allow = self.part(at, top.get("allow"), ("dns", "uris", "ips", "emails", *_LIMITS))
        return Rule(
            match=match,
            dns=self.texts((*at, "dns"), allow.get("dns"), lambda text: NamePattern.for_dns(text, domains)),
            uris=self.texts((*at, "uris"), allow.get("uris"), lambda text: NamePattern.for_uri(text, domains)),
            ips=self.texts((*at, "ips"), allow.get("ips"), IPRange.parse),
            emails=self.texts((*at, "emails"), allow.get("emails"), lambda text: NamePattern.for_email(text, domains)),
            limits=self.limits(at, allow),
            label=self.label(path),
        )

    def limits(self, at: Place, allow: Mapping[object, object]) -> Limits:
        usual = Limits()
        least = self.duration((*at, "min_duration"), allow.get("min_duration"), usual.min_duration)
        most = self.duration((*at, "max_duration"), allow.get("max_duration"), usual.max_duration)
        if least > most:
            problem = f"{format_duration(least)} is longer than max_duration, which is {format_duration(most)}"
            self.fault((*at, "min_duration"), problem)
        usages = self.choices((*at, "usages"), allow.get("usages"), parse_usage, usual.usages)
        return Limits(
            key_types=self.choices((*at, "key_types"), allow.get("key_types"), parse_key_type, usual.key_types),
            usages=tuple(usage for usage in ALL_USAGES if usage in usages),
            min_duration=least,
            max_duration=most,
            issuers=self.choices((*at, "issuers"), allow.get("issuers"), parse_word, usual.issuers),
        )

    def denial(self, path: Place, entry: object) -> Denial | None:
        top = self.mapping(path, entry, allowed=("match", "reason"), required=("match", "reason"))
        match = self.match((*path, "match"), top.get("match"), labels=False)
        reason = top.get("reason")
        if reason is not None and not (isinstance(reason, str) and _REASON.fullmatch(reason) and reason.isprintable()):
            self.fault((*path, "reason"), "is not one line of text of up to 200 characters")
        return Denial(match, str(reason), self.label(path))

    def match(self, path: Place, value: object, *, labels: bool) -> Match:
        required = ("namespaces", "serviceAccounts")
        match = self.part(path, value, (*required, "namespaceLabels") if labels else required, required)
        return Match(
            namespaces=self.texts((*path, "namespaces"), match.get("namespaces"), _glob),
            service_accounts=self.texts((*path, "serviceAccounts"), match.get("serviceAccounts"), _glob),
            namespace_labels=self.labels((*path, "namespaceLabels"), match.get("namespaceLabels")),
        )

    def labels(self, path: Place, value: object) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping of labels to values or globs")
            return ()
        if len(value) > MOST_ITEMS:
            self.fault(path, f"has {len(value)} labels; at most {MOST_ITEMS} are read")
            return ()
        labels: list[tuple[str, str]] = []
        for key, glob in value.items():
            at = (*path, str(key))
            if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
                self.fault(at, "is not the name of a label")
            elif not isinstance(glob, str):
                self.fault(at, f"{_shown(repr(glob))} is not a text", "put it in quotes")
            elif not _LABEL_GLOB.fullmatch(glob):
                self.fault(
                    at,
                    f"{_shown(repr(glob))} is not a label's value or a glob: up to 63 letters, digits, '-', '_', '.', and * for any characters",
                )
            else:
                labels.append((key, glob))
        return tuple(labels)

    def part(
        self, path: Place, value: object, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[object, object]:
        # What is missing as a whole has been said; its parts go without saying.
        return {} if value is None else self.mapping(path, value, allowed=allowed, required=required)

    def mapping(
        self, path: Place, value: object, *, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[object, object]:
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping", "expected are the keys " + ", ".join(allowed))
            return {}
        for key in value:
            if key not in allowed:
                near = difflib.get_close_matches(str(key)[:64], allowed, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(allowed)
                self.fault((*path, str(key)), "is not known", hint)
        for key in required:
            if value.get(key) is None:
                self.fault((*path, key), "is missing")
        return value

    def each(
        self, path: Place, value: object, read: Callable[[Place, object], _T | None], most: int = MOST_ITEMS
    ) -> tuple[_T, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fault(path, "is not a list")
            return ()
        if len(value) > most:
            self.fault(path, f"has {len(value)} items; at most {most} are read")
            return ()
        items = [read((*path, index), item) for index, item in enumerate(value)]
        return tuple(item for item in items if item is not None)

    def texts(self, path: Place, value: object, parse: Callable[[str], _T]) -> tuple[_T, ...]:
        def read(at: Place, item: object) -> _T | None:
            if not isinstance(item, str):
                self.fault(at, f"{_shown(repr(item))} is not a text", "put it in quotes")
                return None
            try:
                return parse(item)
            except ValueError as problem:
                self.fault(at, f"{_shown(repr(item))} {problem}")
                return None

        return self.each(path, value, read)

    def choices(self, path: Place, value: object, parse: Callable[[str], _T], usual: tuple[_T, ...]) -> tuple[_T, ...]:
        if value is None:
            return usual
        if value == []:
            self.fault(path, "is empty, so that the rule allows nothing", "leave it away for what is usual")
        return tuple(dict.fromkeys(self.texts(path, value, parse)))

    def duration(self, path: Place, value: object, usual: timedelta) -> timedelta:
        if value is None:
            return usual
        try:
            duration = parse_duration(value) if isinstance(value, str) else None
            if duration is not None and duration >= LEAST_DURATION:
                return duration
            problem = f"is not a duration of {format_duration(LEAST_DURATION)} or more, such as 24h"
        except ValueError as error:
            problem = str(error)
        self.fault(path, f"{_shown(repr(value))} {problem}")
        return usual


_LIMITS = ("key_types", "usages", "min_duration", "max_duration", "issuers")


def _glob(text: str) -> str:
    if not _GLOB.fullmatch(text):
        raise ValueError("is not a name or a glob: lower-case letters, digits, '-', '.', and * for any characters")
    return text


def _shown(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
