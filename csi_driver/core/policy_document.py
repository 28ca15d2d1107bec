"""Reads a policy from the plain data of its file. Everything wrong is said at once, by its path in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.patterns import NamePattern
from csi_driver.core.policy import DEFAULT_DURATION, Policy, Rule
from csi_driver.core.spec import LEAST_DURATION

_GLOB = re.compile(r"[a-z0-9*.-]+", re.ASCII)
_T = TypeVar("_T")


def parse_policy(document: object, *, trust_domain: str, cluster_domain: str) -> Policy:
    """Takes the file's content: None for an empty file, else ``{"policy": [{"match": ..., "allow": ...}, ...]}``.

    Raises:
        CertmountError: InvalidPolicy, with one fault for everything that is wrong.
    """
    reader = _Reader({"trust_domain": trust_domain, "cluster_domain": cluster_domain})
    top = reader.mapping("policy file", {} if document is None else document, allowed=("policy",))
    entries = top.get("policy")
    if entries is None:
        entries = []
    elif not isinstance(entries, list):
        reader.fault("policy", "is not a list of rules")
        entries = []
    rules = tuple(reader.rule(f"policy[{index}]", entry) for index, entry in enumerate(entries))
    if reader.faults:
        raise CertmountError(Reason.INVALID_POLICY, *reader.faults)
    return Policy(trust_domain, rules)


class _Reader:
    def __init__(self, domains: Mapping[str, str]) -> None:
        self._domains = domains
        self.faults: list[Fault] = []

    def fault(self, path: str, problem: str, hint: str = "") -> None:
        self.faults.append(Fault(path, problem, hint))

    def rule(self, path: str, entry: object) -> Rule:
        rule = self.mapping(path, entry, allowed=("match", "allow"), required=("match", "allow"))
        globs, grants = ("namespaces", "serviceAccounts"), ("dns", "uris", "max_duration")
        match, allow = rule.get("match"), rule.get("allow")
        # What is missing as a whole has been said; its parts go without saying.
        match = {} if match is None else self.mapping(f"{path}.match", match, allowed=globs, required=globs)
        allow = {} if allow is None else self.mapping(f"{path}.allow", allow, allowed=grants)
        return Rule(
            namespaces=self.each(f"{path}.match.namespaces", match.get("namespaces"), _glob),
            service_accounts=self.each(f"{path}.match.serviceAccounts", match.get("serviceAccounts"), _glob),
            dns=self.each(f"{path}.allow.dns", allow.get("dns"), lambda text: NamePattern.for_dns(text, self._domains)),
            uris=self.each(
                f"{path}.allow.uris", allow.get("uris"), lambda text: NamePattern.for_uri(text, self._domains)
            ),
            max_duration=self.duration(f"{path}.allow.max_duration", allow.get("max_duration")),
        )

    def mapping(
        self, path: str, value: object, *, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[str, object]:
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping", "expected are the keys " + ", ".join(allowed))
            return {}
        for key in value:
            if key not in allowed:
                self.fault(f"{path}.{key}", "is not known", "known are " + ", ".join(allowed))
        for key in required:
            if value.get(key) is None:
                self.fault(f"{path}.{key}", "is missing")
        return value

    def each(self, path: str, value: object, parse: Callable[[str], _T]) -> tuple[_T, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fault(path, "is not a list")
            return ()
        parsed: list[_T] = []
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self.fault(f"{path}[{index}]", f"{item!r} is not a text", "put it in quotes")
                continue
            try:
                parsed.append(parse(item))
            except ValueError as problem:
                self.fault(f"{path}[{index}]", f"{item!r} {problem}")
        return tuple(parsed)

    def duration(self, path: str, value: object) -> timedelta:
        if value is None:
            return DEFAULT_DURATION
        try:
            duration = parse_duration(value) if isinstance(value, str) else None
            if duration is not None and duration >= LEAST_DURATION:
                return duration
            problem = f"is not a duration of {format_duration(LEAST_DURATION)} or more, such as 24h"
        except ValueError as error:
            problem = str(error)
        self.fault(path, f"{value!r} {problem}")
        return DEFAULT_DURATION


def _glob(text: str) -> str:
    if not _GLOB.fullmatch(text):
        raise ValueError("is not a name or a glob: lower-case letters, digits, '-', '.', and * for any characters")
    return text
