"""Evaluate a policy: a request is allowed if rules allow all of its names. The deny list takes precedence over all rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import URI, DNSName, InvalidName, Name, Names, spiffe_id
from csi_driver.core.policy.decision import NameDecision, PolicyDecision, RuleMismatch
from csi_driver.core.policy.patterns import NamePattern
from csi_driver.core.policy.rules import ALL_USAGES, DEFAULT_DURATION, DenyListEntry, PolicyRule, RuleMatch
from csi_driver.core.spec import MAX_NAMES, KeyType, Usage

_SERVICE_NAMES = ("{service}.{namespace}.svc", "{service}.{namespace}.svc.{cluster_domain}")
_MAX_SERVICES = (MAX_NAMES - 1) // len(_SERVICE_NAMES)
"""The number of a pod's Services that count: as many as one certificate can name in addition to the SPIFFE ID."""
_MAX_CACHED = 4096  # service accounts (with namespace labels) whose rules are cached, at a few hundred bytes each
_USAGES_BY_PREFERENCE = (ALL_USAGES, (Usage.SERVER,), (Usage.CLIENT,))
_OPTIONS = tuple(field.name for field in dataclasses.fields(IssuanceOptions))


@dataclass(frozen=True, slots=True)
class RequestedCertificate(IssuanceOptions):
    """The certificate that a pod requests: the names and the key type of its CSR, and the volume's attributes."""

    names: Names = Names()
    key_type: KeyType = KeyType.EC_P256

    @classmethod
    def of(cls, names: Names, key_type: KeyType, options: IssuanceOptions) -> Self:
        """Combine the content of a CSR with options, for example those of a CertificateSpec."""
        return cls(names, key_type, **{name: getattr(options, name) for name in _OPTIONS})


@dataclass(frozen=True, slots=True)
class PolicySubject:
    """An authenticated pod, with what the cluster reports about it."""

    identity: PodIdentity
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ()  # the Services in the pod's namespace that select the pod


@dataclass(frozen=True, slots=True)
class Grant:
    """The allowed certificate: its names (with the pod's SPIFFE ID), lifetime and usages, and the rules that allow it."""

    names: Names
    duration: timedelta
    usages: tuple[Usage, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of the policy file, and the built-in rule: the pod's SPIFFE ID and the names of its Services, for a day."""

    trust_domain: str
    cluster_domain: str
    rules: tuple[PolicyRule, ...] = ()  # the rules of the file
    denials: tuple[DenyListEntry, ...] = ()
    revision: str = ""  # identifies the file's content: the first 16 hexadecimal digits of its SHA-256
    _all_rules: tuple[PolicyRule, ...] = field(init=False, repr=False, compare=False)
    _labels: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _cache: dict[tuple[str | None, ...], tuple[URI, tuple[PolicyRule, ...]]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        domains = {"trust_domain": self.trust_domain, "cluster_domain": self.cluster_domain}
        services = tuple(NamePattern.for_dns(pattern, domains) for pattern in _SERVICE_NAMES)
        built_in = PolicyRule(RuleMatch(("*",), ("*",)), dns=services, label="built-in")
        labels = {key for rule in self.rules for key, _ in rule.match.namespace_labels}
        object.__setattr__(self, "_all_rules", (built_in, *self.rules))
        object.__setattr__(self, "_labels", tuple(sorted(labels)))
        object.__setattr__(self, "_cache", {})

    def denial(self, account: ServiceAccount) -> str | None:
        """Return the administrator's reason if the service account is denied, otherwise None."""
        denied = self._denied(account)
        return denied.reason if denied else None

    def decide(self, subject: PolicySubject, requested: RequestedCertificate) -> Grant:
        """Return the grant for the whole request.

        Raises:
            CertmountError: ServiceAccountDenied, or NameNotAllowed with a fault for each name that is not allowed.
        """
        decision = self.evaluate(subject, requested)
        if decision.denied is not None:
            raise CertmountError(Reason.SERVICE_ACCOUNT_DENIED, *decision.faults())
        if not decision.allowed:
            raise CertmountError(Reason.NAME_NOT_ALLOWED, *decision.faults())
        own, _ = self._matching_rules(decision.account, subject.namespace_labels)
        implied = (implied.name for implied in decision.implied if isinstance(implied.name, DNSName))
        names = requested.names
        all_names = Names.of((*names.dns, *implied), (own, *names.uris), names.ips, names.emails)
        return Grant(all_names, decision.duration, decision.usages, decision.deciding_rules)

    def evaluate(self, subject: PolicySubject, requested: RequestedCertificate) -> PolicyDecision:
        """Return the decision about each requested name, the pod's own SPIFFE ID, and the implied names."""
        account = subject.identity.service_account
        denied = self._denied(account)
        if denied is not None:
            return PolicyDecision(account, denied=denied)
        own, rules = self._matching_rules(account, subject.namespace_labels)
        return _Evaluation(subject, requested, own, rules).decision(self.cluster_domain)

    def _denied(self, account: ServiceAccount) -> DenyListEntry | None:
        return next((entry for entry in self.denials if entry.match.matches(account, {})), None)

    def _matching_rules(self, account: ServiceAccount, labels: Mapping[str, str]) -> tuple[URI, tuple[PolicyRule, ...]]:
        """Return the SPIFFE ID of the account and the rules that match it, the built-in rule first."""
        key = (account.namespace, account.name, *(labels.get(label) for label in self._labels))
        cached = self._cache.get(key)
        if cached is None:
            own = spiffe_id(self.trust_domain, account.namespace, account.name)
            cached = own, tuple(rule for rule in self._all_rules if rule.match.matches(account, labels))
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[key] = cached
        return cached


class _Evaluation:
    """The evaluation of one request by the rules that match its pod."""

    def __init__(
        self, subject: PolicySubject, requested: RequestedCertificate, own: URI, rules: tuple[PolicyRule, ...]
    ) -> None:
        self._account = subject.identity.service_account
        self._values = {
            "namespace": self._account.namespace,
            "service_account": self._account.name,
            "pod": subject.identity.pod_name,
        }
        self._services = sorted(subject.services)[:_MAX_SERVICES] if subject.services else ()
        self._requested = requested
        self._usages = tuple(usage for usage in ALL_USAGES if usage in requested.usages)
        self._rules = rules
        self._own = own
        self._names = (*(name for name in requested.names if name != own), own)

    def decision(self, cluster_domain: str) -> PolicyDecision:
        usages = self._usages or ALL_USAGES
        duration = DEFAULT_DURATION if self._requested.duration is None else self._requested.duration
        names = self._allowed_names(self._rules, usages, duration)
        if names is None:  # uncommon: look for other usages and another lifetime
            within_limits = [
                rule for rule in self._rules if self._within_limits(rule, self._usages, self._requested.duration)
            ]
            allowing = [[rule for rule in within_limits if self._matches(rule, name)] for name in self._names]
            if not all(allowing):
                decisions = tuple(map(self._separate_decision, self._names, allowing))
                return PolicyDecision(self._account, self._rules, decisions)
            choice = next(self._choices(allowing), None)
            if choice is None:
                decisions = tuple(map(_incompatible, self._names, allowing))
                return PolicyDecision(self._account, self._rules, decisions, compatible=False)
            usages, duration = choice
            names = self._allowed_names(within_limits, usages, duration) or ()
        implied = () if self._requested.names else tuple(self._implied_names(usages, duration, cluster_domain))
        return PolicyDecision(self._account, self._rules, names, implied, usages, duration)

    def _allowed_names(
        self, rules: Sequence[PolicyRule], usages: Sequence[Usage], duration: timedelta
    ) -> tuple[NameDecision, ...] | None:
        """Return each name with the first rule that allows it with these usages and this lifetime; None if a name has none."""
        within_limits = [rule for rule in rules if self._within_limits(rule, usages, duration)]
        decisions: list[NameDecision] = []
        for name in self._names:
            for rule in within_limits:
                if self._matches(rule, name):
                    decisions.append(NameDecision(name, rule.label))
                    break
            else:
                return None
        return tuple(decisions)

    def _within_limits(self, rule: PolicyRule, usages: Sequence[Usage], duration: timedelta | None) -> bool:
        return rule.limits.allow(self._requested.key_type, self._requested.issuer, usages, duration)

    def _matches(self, rule: PolicyRule, name: Name) -> bool:
        return name == self._own or rule.allows(name, self._values, self._services)

    def _separate_decision(self, name: Name, allowing: Sequence[PolicyRule]) -> NameDecision:
        """Return the decision about a name if not all names are allowed."""
        if allowing:
            return NameDecision(name, allowing[0].label)
        requested = self._requested
        limits = requested.key_type, requested.issuer, self._usages, requested.duration
        mismatches = tuple(
            RuleMismatch(rule.label, rule.limits.violations(*limits) if self._matches(rule, name) else ())
            for rule in self._rules
        )
        return NameDecision(name, mismatches=mismatches)

    def _choices(self, allowing: Sequence[Sequence[PolicyRule]]) -> Iterator[tuple[tuple[Usage, ...], timedelta]]:
        """Yield the usages and lifetimes that all names allow: both usages first, and lifetimes near to a day first."""
        for usages in (self._usages,) if self._usages else _USAGES_BY_PREFERENCE:
            for duration in self._durations():
                if all(any(self._within_limits(rule, usages, duration) for rule in rules) for rules in allowing):
                    yield usages, duration

    def _durations(self) -> Iterator[timedelta]:
        if self._requested.duration is not None:
            yield self._requested.duration
            return
        yield DEFAULT_DURATION
        # The lifetime in an intersection of ranges that is nearest to the default is the default or an end of a range.
        ends = {end for rule in self._rules for end in (rule.limits.min_duration, rule.limits.max_duration)}
        yield from sorted(ends, key=lambda end: (abs(end - DEFAULT_DURATION), end))

    def _implied_names(
        self, usages: tuple[Usage, ...], duration: timedelta, cluster_domain: str
    ) -> Iterator[NameDecision]:
        """Yield the names of the pod's Services that are allowed with these usages and this lifetime."""
        rules = [rule for rule in self._rules if self._within_limits(rule, usages, duration)]
        for service in self._services:
            for pattern in _SERVICE_NAMES:
                try:
                    name = DNSName.parse(pattern.format(service=service, cluster_domain=cluster_domain, **self._values))
                except InvalidName:
                    continue  # too long with this cluster domain
                allowing = next((rule for rule in rules if rule.allows(name, self._values, self._services)), None)
                if allowing is not None:
                    yield NameDecision(name, allowing.label)


def _incompatible(name: Name, allowing: Sequence[PolicyRule]) -> NameDecision:
    """Return the decision about a name that is allowed, but not with what the other names require."""
    return NameDecision(name, mismatches=tuple(RuleMismatch(rule.label, (str(rule.limits),)) for rule in allowing))
