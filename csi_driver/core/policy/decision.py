"""The decision of a policy about a request, name by name, and the faults that explain it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.errors import Fault, Reason
from csi_driver.core.identity import Principal
from csi_driver.core.names import URI, Name
from csi_driver.core.policy.rules import DenyListEntry, PolicyRule, Violation
from csi_driver.core.spec import Usage

BUILT_IN = "built-in"  # the label of the rule that applies without a policy file
_MAX_SHOWN = 3  # rules or names in one fault; ``certmount policy explain`` shows all of them
_ONE_URI = "a certificate with a SPIFFE ID has no other URI (X509-SVID section 2)"


@dataclass(frozen=True, slots=True)
class RequestFields:
    """Where a request contains each attribute, for faults."""

    reason: Reason = Reason.INVALID_ATTRIBUTES
    """The reason if the request contradicts itself."""
    prefix: str = "volumeAttributes."
    names: tuple[tuple[str, str], ...] = ()  # fields that are not the prefix and the attribute

    def of(self, attribute: str) -> str:
        return dict(self.names).get(attribute, f"{self.prefix}{attribute}")


VOLUME_ATTRIBUTES = RequestFields()
SECRET_FIELDS = RequestFields(Reason.INVALID_REQUEST, "", (("spiffe", "request"),))


@dataclass(frozen=True, slots=True)
class RuleMismatch:
    """Why a rule that matches the pod or Secret does not allow a name."""

    rule: str
    violations: tuple[Violation, ...] = ()  # empty if none of the rule's patterns matches the name
    limits: str = ""  # the limits of a rule that allows the name, but not together with the other names


@dataclass(frozen=True, slots=True)
class NameDecision:
    """A name with the label of a rule that allows it; without one, why each rule for the pod does not."""

    name: Name
    rule: str = ""
    mismatches: tuple[RuleMismatch, ...] = ()
    of_pod: bool = False  # it has the form of the pod's own name in DNS, but DNS does not publish it

    @property
    def nearest(self) -> RuleMismatch | None:
        """The rule whose pattern matches the name and whose limits are nearest to the request."""
        return min((one for one in self.mismatches if one.violations), key=_distance, default=None)


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """The decision about a request. Either all of it is allowed, or nothing."""

    principal: Principal
    own: URI | None = None  # the pod's SPIFFE ID, unless the request excludes it
    rules: tuple[PolicyRule, ...] = ()  # the rules that match the pod or Secret
    names: tuple[NameDecision, ...] = ()  # the requested names, then the pod's own SPIFFE ID
    implied: tuple[NameDecision, ...] = ()  # the additional names of a pod that requests none
    usages: tuple[Usage, ...] = ()
    duration: timedelta = timedelta()
    denied: DenyListEntry | None = None
    compatible: bool = True
    """False if each name is allowed, but not all in one certificate. The mismatches then show the rules that allow a name."""

    @property
    def permitted(self) -> bool:
        """True if the policy allows all of the request, even if the certificate would not be valid."""
        return self.denied is None and self.compatible and all(decision.rule for decision in self.names)

    @property
    def allowed(self) -> bool:
        return self.permitted and next(self.contradictions(), None) is None

    @property
    def deciding_rules(self) -> tuple[str, ...]:
        """The rules that allow the request, or the entry of the deny list; empty if no rule allows it."""
        if self.denied is not None:
            return (self.denied.label,)
        decisions = (*self.names, *self.implied) if self.allowed else ()
        return tuple(dict.fromkeys(decision.rule for decision in decisions))

    def faults(self, fields: RequestFields = VOLUME_ATTRIBUTES) -> list[Fault]:
        """Return a fault for each part of the request that is not allowed, with what would have to change."""
        if self.denied is not None:
            hint = f"ask an administrator to remove {self.denied.label} from the deny list"
            return [Fault(self.principal.label, f"is denied: {self.denied.reason}", hint)]
        rejected = [decision for decision in self.names if not decision.rule]
        # The pod did not write its SPIFFE ID, so report it only without another fault.
        rejected = [decision for decision in rejected if decision.name != self.own] or rejected
        contradictions = list(self.contradictions(fields))
        if not self.compatible:
            return [*contradictions, *map(_together, rejected)]
        unknown = [self._unknown(decision) for decision in rejected if decision.nearest is None]
        return [*contradictions, *unknown, *self._limit_faults(rejected, fields)]

    def contradictions(self, fields: RequestFields = VOLUME_ATTRIBUTES) -> Iterator[Fault]:
        """Yield why the certificate would not be valid, whatever the policy allows."""
        uris = [decision.name for decision in self.names if isinstance(decision.name, URI)]
        if not self.names and self.denied is None:
            yield Fault(fields.of("spiffe"), "leaves a certificate without a name", "set name or dns-names too")
        identity = self.own or next((uri for uri in uris if uri.is_spiffe_id), None)
        if identity is None:
            return
        whose = f"the pod's SPIFFE ID {identity}" if self.own else f"the SPIFFE ID {identity}"
        fix = f'remove it, or set {fields.of("spiffe")} to "false" if no peer verifies the SPIFFE ID of the pod'
        hint = "remove it" if fields is not VOLUME_ATTRIBUTES or not self.own else fix
        for uri in uris:
            if uri != identity:
                yield Fault(fields.of("uri-sans"), f"{uri} cannot be used with {whose}, because {_ONE_URI}", hint)

    def _unknown(self, decision: NameDecision) -> Fault:
        hint = "ask an administrator to add a rule to the policy"
        if decision.of_pod:
            hint = f"use the pod of a StatefulSet with this headless Service as its serviceName, or {hint}"
        return Fault(str(decision.name), f"no policy rule allows this name for {self.principal.label}", hint)

    def _limit_faults(self, rejected: Sequence[NameDecision], fields: RequestFields) -> Iterator[Fault]:
        """Yield a fault for each attribute that is outside the limits of the rule that is nearest to the request."""
        found: dict[tuple[str, Violation], list[Name]] = {}
        for decision in rejected:
            if nearest := decision.nearest:
                for violation in nearest.violations:
                    found.setdefault((nearest.rule, violation), []).append(decision.name)
        for (rule, violation), names in found.items():
            written = [str(name) for name in names if name != self.own]
            more = f" and {len(written) - _MAX_SHOWN} more names" if len(written) > _MAX_SHOWN else ""
            scope = f" for {', '.join(written[:_MAX_SHOWN])}{more}" if written else ""
            shown = "the built-in rule" if rule == BUILT_IN else rule
            problem = f"{violation.value} {violation.relation} that {shown} allows{scope}"
            hint = f"{violation.fix}, or ask an administrator to {violation.change}"
            yield Fault(fields.of(violation.attribute), problem, hint)


def _distance(mismatch: RuleMismatch) -> tuple[int, float]:
    return len(mismatch.violations), sum(violation.distance for violation in mismatch.violations)


def _together(decision: NameDecision) -> Fault:
    """Return the fault of a name that is allowed, but not with what the other names require."""
    rules = "; ".join(
        f"{mismatch.rule} allows it only with {mismatch.limits}" for mismatch in decision.mismatches[:_MAX_SHOWN]
    )
    more = len(decision.mismatches) - _MAX_SHOWN
    rules += f"; {more} more rules have similar limits" if more > 0 else ""
    hint = "request a duration and usages that all names allow, or use one volume for each name"
    return Fault(str(decision.name), f"is not allowed together with the other names: {rules}", hint)
