"""Evaluate a policy: a request is allowed if rules allow all of its names. The deny list takes precedence over all rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

from csi_driver.core.attributes import IssuanceOptions
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, Principal, Requester, SecretIdentity
from csi_driver.core.names import URI, DNSName, EmailAddress, InvalidName, Name, Names, spiffe_id
from csi_driver.core.policy.decision import (
    BUILT_IN,
    VOLUME_ATTRIBUTES,
    NameDecision,
    PolicyDecision,
    RequestFields,
    RuleMismatch,
)
from csi_driver.core.policy.pattern_index import PatternIndex
from csi_driver.core.policy.patterns import NamePattern
from csi_driver.core.policy.rule_cache import RuleCache
from csi_driver.core.policy.rule_index import RuleIndex
from csi_driver.core.policy.rules import ALL_USAGES, DEFAULT_DURATION, DenyListEntry, PolicyRule, RuleMatch, Violation
from csi_driver.core.spec import MAX_NAMES, KeyType, Usage

_SERVICE_NAMES = ("{service}.{namespace}.svc", "{service}.{namespace}.svc.{cluster_domain}")
_POD_NAMES = tuple("{pod}." + name for name in _SERVICE_NAMES)
"""The names that the pods of a StatefulSet have in DNS. The Service is the pod's governing Service, and no other."""
_MAX_SERVICES = (MAX_NAMES - 1) // len(_SERVICE_NAMES)
"""The number of a pod's Services that count: as many as one certificate can name in addition to the SPIFFE ID."""
_USAGES_BY_PREFERENCE = (ALL_USAGES, (Usage.SERVER,), (Usage.CLIENT,))
_OPTIONS = tuple(field.name for field in dataclasses.fields(IssuanceOptions))


@dataclass(frozen=True, slots=True)
class RequestedCertificate(IssuanceOptions):
    """The certificate that is requested: the names and the key type of the CSR, and the attributes of a volume or Secret."""

    names: Names = Names()
    key_type: KeyType = KeyType.EC_P256
    fields: RequestFields = VOLUME_ATTRIBUTES
    acme_email: EmailAddress | None = None  # of the ACME account that orders it; None: the issuer's account

    @classmethod
    def of(cls, names: Names, key_type: KeyType, options: IssuanceOptions) -> Self:
        """Combine the content of a CSR with options, for example those of a CertificateSpec."""
        return cls(names, key_type, **{name: getattr(options, name) for name in _OPTIONS})


@dataclass(frozen=True, slots=True)
class PolicySubject:
    """An authenticated pod or Secret, with what the cluster reports about it."""

    identity: Requester
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ()  # the Services in the pod's namespace that select the pod
    governing_service: str = ""  # the one below which DNS has a record with the pod's name


@dataclass(frozen=True, slots=True)
class Grant:
    """The allowed certificate: its names (with a pod's SPIFFE ID), lifetime and usages, and the rules that allow it."""

    names: Names
    duration: timedelta
    usages: tuple[Usage, ...]
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of the policy file, and the built-in rule for pods: the SPIFFE ID and the names of the Services, for a day."""

    trust_domain: str
    cluster_domain: str
    rules: tuple[PolicyRule, ...] = ()  # the rules of the file
    denials: tuple[DenyListEntry, ...] = ()
    revision: str = ""  # identifies the file's content: the first 16 hexadecimal digits of its SHA-256
    warnings: tuple[str, ...] = field(default=(), compare=False)  # what the file probably allows by mistake
    _rule_index: RuleIndex[PolicyRule] = field(init=False, repr=False, compare=False)
    _denial_index: RuleIndex[DenyListEntry] = field(init=False, repr=False, compare=False)
    _labels: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _cache: RuleCache = field(init=False, repr=False, compare=False, default_factory=RuleCache)

    def __post_init__(self) -> None:
        domains = {"trust_domain": self.trust_domain, "cluster_domain": self.cluster_domain}
        services, own = (
            PatternIndex(tuple(NamePattern.for_dns(pattern, domains) for pattern in patterns))
            for patterns in (_SERVICE_NAMES, _POD_NAMES)
        )
        built_in = PolicyRule(RuleMatch(("*",), ("*",)), dns=services, own_dns=own, label=BUILT_IN)
        labels = {key for rule in self.rules for key, _ in rule.match.namespace_labels}
        object.__setattr__(self, "_rule_index", RuleIndex((built_in, *self.rules)))
        object.__setattr__(self, "_denial_index", RuleIndex(self.denials))
        object.__setattr__(self, "_labels", tuple(sorted(labels)))

    def denial(self, principal: Principal) -> str | None:
        """Return the administrator's reason if the service account or Secret is denied, otherwise None."""
        denied = self._denied(principal)
        return denied.reason if denied else None

    def decide(self, subject: PolicySubject, requested: RequestedCertificate) -> Grant:
        """Return the grant for the whole request.

        Raises:
            CertmountError: ServiceAccountDenied, SecretDenied, NameNotAllowed, or the reason of the request's fields if it contradicts
                itself; with all faults.
        """
        decision = self.evaluate(subject, requested)
        if not decision.allowed:
            reason = Reason.NAME_NOT_ALLOWED if decision.denied is None else _denied_reason(decision.principal)
            reason = requested.fields.reason if decision.permitted else reason
            raise CertmountError(reason, *decision.faults(requested.fields))
        implied = (implied.name for implied in decision.implied if isinstance(implied.name, DNSName))
        names, own = requested.names, () if decision.own is None else (decision.own,)
        all_names = Names.of((*names.dns, *implied), (*own, *names.uris), names.ips, names.emails)
        return Grant(all_names, decision.duration, decision.usages, decision.deciding_rules)

    def evaluate(self, subject: PolicySubject, requested: RequestedCertificate) -> PolicyDecision:
        """Return the decision about each requested name, the pod's own SPIFFE ID, and the implied names."""
        principal = subject.identity.principal
        denied = self._denied(principal)
        if denied is not None:
            return PolicyDecision(principal, denied=denied)
        own, rules = self._matching_rules(principal, subject.namespace_labels)
        return _Evaluation(subject, requested, own, rules).decision(self.cluster_domain)

    def _denied(self, principal: Principal) -> DenyListEntry | None:
        candidates = self._denial_index.candidates(principal.namespace)
        return next((entry for entry in candidates if entry.match.matches(principal, {})), None)

    def _matching_rules(
        self, principal: Principal, labels: Mapping[str, str]
    ) -> tuple[URI | None, tuple[PolicyRule, ...]]:
        """Return the SPIFFE ID of a service account, and the rules that match it or the Secret, the built-in rule first."""
        key = (principal.namespace, principal.label, *(labels.get(label) for label in self._labels))
        cached = self._cache.get(key)
        if cached is None:
            is_secret = isinstance(principal, SecretIdentity)
            own = None if is_secret else spiffe_id(self.trust_domain, principal.namespace, principal.name)
            candidates = self._rule_index.candidates(principal.namespace)
            cached = own, tuple(rule for rule in candidates if rule.match.matches(principal, labels))
            self._cache.put(key, cached)
        return cached


class _Evaluation:
    """The evaluation of one request by the rules that match its pod or Secret."""

    def __init__(
        self, subject: PolicySubject, requested: RequestedCertificate, own: URI | None, rules: tuple[PolicyRule, ...]
    ) -> None:
        self._principal = subject.identity.principal
        self._values = {"namespace": self._principal.namespace}
        if isinstance(subject.identity, PodIdentity):
            self._values |= {"service_account": self._principal.name, "pod": subject.identity.pod_name}
        self._services = sorted(subject.services)[:_MAX_SERVICES] if subject.services else ()
        self._governing = (subject.governing_service,) if subject.governing_service else ()
        self._requested = requested
        self._subject = requested.subject.beyond(requested.names)
        self._usages = tuple(usage for usage in ALL_USAGES if usage in requested.usages)
        self._rules = rules
        self._own = own
        others = tuple(name for name in requested.names if name != own)
        self._names: tuple[Name, ...] = others
        if own is not None and (requested.spiffe or own in requested.names.uris):
            self._names = (*others, own)

    def decision(self, cluster_domain: str) -> PolicyDecision:
        own = self._own if self._own in self._names else None
        usages = self._usages or ALL_USAGES
        duration = DEFAULT_DURATION if self._requested.duration is None else self._requested.duration
        names = self._allowed_names(self._rules, usages, duration)
        if names is None:  # uncommon: look for other usages and another lifetime
            within_limits = self._within_limits(self._rules, self._usages, self._requested.duration)
            allowing = [[rule for rule in within_limits if self._matches(rule, name)] for name in self._names]
            if not all(allowing):
                violations = [(rule, self._violations(rule)) for rule in self._rules]
                decisions = tuple(
                    self._separate_decision(name, rules, violations)
                    for name, rules in zip(self._names, allowing, strict=True)
                )
                return PolicyDecision(self._principal, own, self._rules, decisions)
            choice = next(self._choices(allowing), None)
            if choice is None:
                decisions = tuple(map(_incompatible, self._names, allowing))
                return PolicyDecision(self._principal, own, self._rules, decisions, compatible=False)
            usages, duration = choice
            names = self._allowed_names(within_limits, usages, duration) or ()
        implied = () if self._requested.names else tuple(self._implied_names(usages, duration, cluster_domain))
        return PolicyDecision(self._principal, own, self._rules, names, implied, usages, duration)

    def _allowed_names(
        self, rules: Sequence[PolicyRule], usages: tuple[Usage, ...], duration: timedelta
    ) -> tuple[NameDecision, ...] | None:
        """Return each name with the first rule that allows it with these usages and this lifetime; None if a name has none."""
        within_limits = self._within_limits(rules, usages, duration)
        decisions: list[NameDecision] = []
        for name in self._names:
            for rule in within_limits:
                if self._matches(rule, name):
                    decisions.append(NameDecision(name, rule.label))
                    break
            else:
                return None
        return tuple(decisions)

    def _within_limits(
        self, rules: Sequence[PolicyRule], usages: tuple[Usage, ...], duration: timedelta | None
    ) -> list[PolicyRule]:
        """Return the rules that allow these usages, this lifetime, and the other options of the request."""
        requested = self._requested
        options = IssuanceOptions(duration=duration, usages=usages, issuer=requested.issuer, spiffe=requested.spiffe)
        within = [rule for rule in rules if rule.limits.allow(options, requested.key_type)]
        if (email := requested.acme_email) is not None:
            within = [rule for rule in within if rule.allows_account(email, self._values)]
        if self._subject:
            within = [rule for rule in within if not self._forbidden_attributes(rule)]
        return within

    def _forbidden_attributes(self, rule: PolicyRule) -> list[str]:
        return rule.forbidden_attributes(self._subject, self._values, self._services)

    def _matches(self, rule: PolicyRule, name: Name) -> bool:
        if name == self._own or rule.allows(name, self._values, self._services):
            return True
        return bool(self._governing) and rule.allows_own_name(name, self._values, self._governing)

    def _separate_decision(
        self, name: Name, allowing: Sequence[PolicyRule], violations: Sequence[tuple[PolicyRule, tuple[Violation, ...]]]
    ) -> NameDecision:
        """Return the decision about a name if not all names are allowed."""
        if allowing:
            return NameDecision(name, allowing[0].label)
        # A rule without violations does not match the name, or it would allow it. Match it only with the other rules.
        mismatches = tuple(
            RuleMismatch(rule.label, found if found and self._matches(rule, name) else ()) for rule, found in violations
        )
        return NameDecision(name, mismatches=mismatches, of_pod=self._has_form_of_pod(name))

    def _has_form_of_pod(self, name: Name) -> bool:
        """Return whether the name would be that of the pod in DNS, below some Service."""
        if not isinstance(name, DNSName) or "pod" not in self._values:
            return False
        pod, _, *rest = (*name.text.split("."), "", "")
        return pod == self._values["pod"] and rest[:2] == [self._values["namespace"], "svc"]

    def _violations(self, rule: PolicyRule) -> tuple[Violation, ...]:
        requested = self._requested
        violations = rule.limits.violations(requested, requested.key_type)
        email = requested.acme_email
        if email is not None and not rule.allows_account(email, self._values):
            violations = *violations, rule.account_violation(email)
        if forbidden := self._forbidden_attributes(rule):
            violations = *violations, rule.subject_violation(forbidden)
        return violations

    def _choices(self, allowing: Sequence[Sequence[PolicyRule]]) -> Iterator[tuple[tuple[Usage, ...], timedelta]]:
        """Yield the usages and lifetimes that all names allow: both usages first, and lifetimes near to a day first."""
        for usages in (self._usages,) if self._usages else _USAGES_BY_PREFERENCE:
            for duration in self._durations():
                if all(self._within_limits(rules, usages, duration) for rules in allowing):
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
        rules = self._within_limits(self._rules, usages, duration)
        for service in self._services:
            for pattern in _SERVICE_NAMES:
                try:
                    name = DNSName.parse(pattern.format(service=service, cluster_domain=cluster_domain, **self._values))
                except InvalidName:
                    continue  # too long with this cluster domain
                allowing = next((rule for rule in rules if rule.allows(name, self._values, self._services)), None)
                if allowing is not None:
                    yield NameDecision(name, allowing.label)


def _denied_reason(principal: Principal) -> Reason:
    return Reason.SECRET_DENIED if isinstance(principal, SecretIdentity) else Reason.SERVICE_ACCOUNT_DENIED


def _incompatible(name: Name, allowing: Sequence[PolicyRule]) -> NameDecision:
    """Return the decision about a name that is allowed, but not with what the other names require."""
    return NameDecision(name, mismatches=tuple(RuleMismatch(rule.label, limits=str(rule.limits)) for rule in allowing))
