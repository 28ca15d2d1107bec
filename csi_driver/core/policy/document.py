"""Parse a policy file. Faults have the path and the line in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeAlias, TypeVar

from csi_driver.core.config.document_reader import DocumentReader, Path, boolean_problem
from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import Reason
from csi_driver.core.names import InvalidName, parse_dns_label, parse_object_name
from csi_driver.core.policy.engine import Policy
from csi_driver.core.policy.pattern_index import PatternIndex, RangeIndex
from csi_driver.core.policy.patterns import IPRange, NamePattern, shortest_match
from csi_driver.core.policy.rules import ALL_USAGES, DenyListEntry, PolicyRule, RuleLimits, RuleMatch
from csi_driver.core.spec import MIN_DURATION, parse_key_type, parse_usage

MAX_RULES = 1000
MAX_ITEMS = 1000  # items of a list, and labels of a match
_LIMITS = ("key_types", "usages", "min_duration", "max_duration", "issuers", "without_spiffe_id")
_NAMES = ("dns", "uris", "ips", "emails")
# Keys of allow, with the reason why the other rules cannot have them.
_PODS_ONLY = {
    "without_spiffe_id": "certificates in Secrets never contain a SPIFFE ID",
    "subjects": "a Secret cannot request a subject",
}
_SECRETS_ONLY = {"acme_emails": "only rules for Secrets have it"}
_SECRET_PLACEHOLDERS = frozenset(["namespace"])
_GLOB = re.compile(r"[a-z0-9*.-]+", re.ASCII)
# Kubernetes labels: an optional DNS name and a slash, then 63 characters; values have up to 63.
_LABEL_KEY = re.compile(r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", re.ASCII)
_LABEL_GLOB = re.compile(r"[A-Za-z0-9._*-]{0,63}", re.ASCII)
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)?", re.ASCII)
_REASON = re.compile(r".{1,200}")
_T = TypeVar("_T")
_ParsePattern: TypeAlias = "Callable[[str, Mapping[str, str]], NamePattern]"


def parse_policy(
    document: object,
    *,
    trust_domain: str,
    cluster_domain: str,
    revision: str = "",
    lines: Mapping[Path, int] | None = None,
) -> Policy:
    """Parse None for an empty file, or ``{"policy": [...], "deny": [...]}``. ``lines`` contains the line of each path.

    Raises:
        CertmountError: InvalidPolicy with all faults.
    """
    reader = _Reader({"trust_domain": trust_domain, "cluster_domain": cluster_domain}, lines or {})
    top = reader.mapping((), {} if document is None else document, allowed=("policy", "deny"))
    rules = reader.items(("policy",), top.get("policy"), reader.rule, MAX_RULES)
    denials = reader.items(("deny",), top.get("deny"), reader.denial, MAX_RULES)
    reader.finish()
    return Policy(trust_domain, cluster_domain, rules, denials, revision, tuple(reader.warnings))


class _Reader(DocumentReader):
    def __init__(self, domains: Mapping[str, str], lines: Mapping[Path, int]) -> None:
        super().__init__(Reason.INVALID_POLICY, "policy file", lines)
        self._domains = domains
        self.warnings: list[str] = []

    def rule(self, path: Path, entry: object) -> PolicyRule | None:
        top = self.mapping(path, entry, allowed=("match", "allow"), required=("match", "allow"))
        match = self._match((*path, "match"), top.get("match"), labels=True)
        at, secrets = (*path, "allow"), _is_for_secrets(top.get("match"))
        allow = self._section(at, top.get("allow"), (*_NAMES, *_LIMITS, "subjects", *_SECRETS_ONLY))
        self._check_keys(at, allow, secrets=secrets)

        def patterns(key: str, parse: _ParsePattern) -> PatternIndex:
            return PatternIndex(self._patterns((*at, key), allow.get(key), parse, secrets=secrets))

        return PolicyRule(
            match=match,
            dns=patterns("dns", NamePattern.for_dns),
            uris=patterns("uris", NamePattern.for_uri),
            ips=RangeIndex(self._texts((*at, "ips"), allow.get("ips"), IPRange.parse)),
            emails=patterns("emails", NamePattern.for_email),
            limits=self._limits(at, allow, secrets=secrets),
            acme_emails=patterns("acme_emails", NamePattern.for_email),
            subjects=patterns("subjects", NamePattern.for_subject),
            label=self.label(path),
        )

    def _check_keys(self, at: Path, allow: Mapping[object, object], *, secrets: bool) -> None:
        for key, problem in (_PODS_ONLY if secrets else _SECRETS_ONLY).items():
            if key in allow:
                self.fault((*at, key), problem, "remove it")
        if not secrets and allow.get("uris") and allow.get("without_spiffe_id") is not True:
            problem = "no certificate can contain these URIs, because a certificate with a SPIFFE ID has no other URI"
            self.warnings.append(f"{self.label((*at, 'uris'))}: {problem}; set without_spiffe_id: true")

    def _limits(self, at: Path, allow: Mapping[object, object], *, secrets: bool) -> RuleLimits:
        default = RuleLimits()
        shortest = self._duration((*at, "min_duration"), allow.get("min_duration"), default.min_duration)
        longest = self._duration((*at, "max_duration"), allow.get("max_duration"), default.max_duration)
        if shortest > longest:
            problem = f"{format_duration(shortest)} is longer than max_duration, which is {format_duration(longest)}"
            self.fault((*at, "min_duration"), problem)
        usages = self._choices((*at, "usages"), allow.get("usages"), parse_usage, default.usages)
        return RuleLimits(
            key_types=self._choices((*at, "key_types"), allow.get("key_types"), parse_key_type, default.key_types),
            usages=tuple(usage for usage in ALL_USAGES if usage in usages),
            min_duration=shortest,
            max_duration=longest,
            issuers=self._choices((*at, "issuers"), allow.get("issuers"), parse_dns_label, default.issuers),
            without_spiffe_id=secrets or self._boolean((*at, "without_spiffe_id"), allow.get("without_spiffe_id")),
        )

    def denial(self, path: Path, entry: object) -> DenyListEntry | None:
        top = self.mapping(path, entry, allowed=("match", "reason"), required=("match", "reason"))
        match = self._match((*path, "match"), top.get("match"), labels=False)
        reason = top.get("reason")
        if reason is not None and not (isinstance(reason, str) and _REASON.fullmatch(reason) and reason.isprintable()):
            self.fault((*path, "reason"), "is not one line of 1 to 200 characters")
        return DenyListEntry(match, str(reason), self.label(path))

    def _match(self, path: Path, value: object, *, labels: bool) -> RuleMatch:
        names = ("serviceAccounts", "secrets")
        allowed = ("namespaces", *names, *(("namespaceLabels",) if labels else ()))
        match = self._section(path, value, allowed, ("namespaces",))
        given = [key for key in names if key in match]
        if isinstance(value, Mapping) and not given:
            self.fault((*path, names[0]), "is missing", "a rule for Secrets has secrets in its place")
        if len(given) > 1:
            self.fault((*path, names[1]), "cannot be used with serviceAccounts", "use two rules")
        for key in given:
            if match[key] is None:
                self.fault((*path, key), "is missing")
        return RuleMatch(
            namespaces=self._texts((*path, "namespaces"), match.get("namespaces"), _namespace_glob),
            service_accounts=self._texts((*path, "serviceAccounts"), match.get("serviceAccounts"), _object_glob),
            secrets=self._texts((*path, "secrets"), match.get("secrets"), _object_glob),
            namespace_labels=self._labels((*path, "namespaceLabels"), match.get("namespaceLabels")),
        )

    def _labels(self, path: Path, value: object) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping of labels to values or globs")
            return ()
        if len(value) > MAX_ITEMS:
            self.fault(path, f"has {len(value)} labels", f"use at most {MAX_ITEMS}")
            return ()
        labels: list[tuple[str, str]] = []
        for key, glob in value.items():
            at = (*path, str(key))
            if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
                self.fault(at, "is not a label key")
            elif (text := self.text(at, glob, _label_glob)) is not None:
                labels.append((key, text))
            elif glob is None:
                self.fault(at, "is empty", 'write ""')
        return tuple(labels)

    def _section(
        self, path: Path, value: object, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[object, object]:
        # If a section is missing, that is one fault. Do not report its keys too.
        return {} if value is None else self.mapping(path, value, allowed=allowed, required=required)

    def _texts(self, path: Path, value: object, parse: Callable[[str], _T]) -> tuple[_T, ...]:
        def read(at: Path, item: object) -> _T | None:
            if item is None:
                self.fault(at, "is empty")
            return self.text(at, item, parse)

        return self.items(path, value, read, MAX_ITEMS)

    def _patterns(self, path: Path, value: object, parse: _ParsePattern, *, secrets: bool) -> tuple[NamePattern, ...]:
        def parse_item(text: str) -> NamePattern:
            pattern = parse(text, self._domains)
            if secrets:
                _check_secret_pattern(pattern)
            return pattern

        def read(at: Path, item: object) -> NamePattern | None:
            pattern = self.text(at, item, parse_item)
            if pattern is None and item is None:
                self.fault(at, "is empty")
            elif pattern is not None and pattern.warning:
                self.warnings.append(f"{self.label(at)}: {pattern.warning}")
            return pattern

        return self.items(path, value, read, MAX_ITEMS)

    def _choices(
        self, path: Path, value: object, parse: Callable[[str], _T], default: tuple[_T, ...]
    ) -> tuple[_T, ...]:
        if value is None:
            return default
        if value == []:
            self.fault(path, "is empty, so the rule allows nothing", "omit it to use the default")
        return tuple(dict.fromkeys(self._texts(path, value, parse)))

    def _boolean(self, path: Path, value: object) -> bool:
        if value is not None and not isinstance(value, bool):
            self.fault(path, *boolean_problem(value))
        return value is True

    def _duration(self, path: Path, value: object, default: timedelta) -> timedelta:
        duration = self.text(path, value, _duration)
        return default if duration is None else duration


def _glob(text: str, parse_name: Callable[[str], str]) -> str:
    if not _GLOB.fullmatch(text):
        raise ValueError("is not a name or a glob; use lower-case letters, digits, '-', '.', and * for any characters")
    try:
        parse_name(shortest_match(text))
    except InvalidName as problem:
        raise ValueError(f"matches no name that Kubernetes allows: {shortest_match(text)!r} {problem}") from None
    return text


def _is_for_secrets(match: object) -> bool:
    return isinstance(match, Mapping) and "secrets" in match


def _check_secret_pattern(pattern: NamePattern) -> None:
    """Raise ValueError for a pattern that no request for a Secret can match."""
    if unknown := sorted(pattern.placeholders - _SECRET_PLACEHOLDERS):
        problem = f"has the placeholder {{{unknown[0]}}}, which has no value for a Secret"
        raise ValueError(f"{problem}; use {{namespace}}, {{trust_domain}} or {{cluster_domain}}")
    if pattern.text.startswith("spiffe:"):
        raise ValueError("is a SPIFFE ID, which certificates in Secrets never contain; use a volume")


def _namespace_glob(text: str) -> str:
    return _glob(text, parse_dns_label)


def _object_glob(text: str) -> str:
    return _glob(text, parse_object_name)


def _label_glob(text: str) -> str:
    if not _LABEL_GLOB.fullmatch(text) or not _LABEL_VALUE.fullmatch(shortest_match(text)):
        raise ValueError(
            "is not a label value or a glob; use up to 63 letters, digits, '-', '_', '.', and * for any characters"
        )
    return text


def _duration(text: str) -> timedelta:
    duration = parse_duration(text)
    if duration < MIN_DURATION:
        raise ValueError(f"is not a duration of {format_duration(MIN_DURATION)} or more, such as 24h")
    return duration
