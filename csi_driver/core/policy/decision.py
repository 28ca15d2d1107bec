"""The decision of a policy about a request, name by name."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.errors import Fault
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import Name
from csi_driver.core.policy.rules import DenyListEntry, PolicyRule
from csi_driver.core.spec import Usage

_MAX_MISMATCHES = 3  # rules in one fault; ``certmount policy explain`` shows all of them


@dataclass(frozen=True, slots=True)
class RuleMismatch:
    """Why a rule that matches the pod does not allow a name."""

    rule: str
    violations: tuple[str, ...]
    """What the rule requires, such as "duration 10s to 1h, not 2h"; empty if none of its patterns matches the name."""


@dataclass(frozen=True, slots=True)
class NameDecision:
    """A name with the label of a rule that allows it; without one, why each rule for the pod does not."""

    name: Name
    rule: str = ""
    mismatches: tuple[RuleMismatch, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """The decision about a request. Either all of it is allowed, or nothing."""

    account: ServiceAccount
    rules: tuple[PolicyRule, ...] = ()  # the rules that match the pod
    names: tuple[NameDecision, ...] = ()  # the requested names, then the pod's own SPIFFE ID
    implied: tuple[NameDecision, ...] = ()  # the additional names of a pod that requests none
    usages: tuple[Usage, ...] = ()
    duration: timedelta = timedelta()
    denied: DenyListEntry | None = None
    compatible: bool = True
    """False if each name is allowed, but not all in one certificate. The mismatches then show the rules that allow a name."""

    @property
    def allowed(self) -> bool:
        return self.denied is None and self.compatible and all(decision.rule for decision in self.names)

    @property
    def deciding_rules(self) -> tuple[str, ...]:
        """The rules that allow the request, or the entry of the deny list; empty if no rule allows it."""
        if self.denied is not None:
            return (self.denied.label,)
        decisions = (*self.names, *self.implied) if self.allowed else ()
        return tuple(dict.fromkeys(decision.rule for decision in decisions))

    def faults(self) -> list[Fault]:
        """Return a fault for each name that is not allowed, with what would have to change."""
        if self.denied is not None:
            hint = f"ask an administrator to remove {self.denied.label} from the deny list"
            return [Fault(f"service account {self.account}", f"is denied: {self.denied.reason}", hint)]
        *requested, own = self.names
        rejected = [decision for decision in requested if not decision.rule]
        # The pod did not write its SPIFFE ID, so report it only without another fault.
        return [self._fault(decision) for decision in rejected or ([] if own.rule else [own])]

    def _fault(self, decision: NameDecision) -> Fault:
        name, near = str(decision.name), [mismatch for mismatch in decision.mismatches if mismatch.violations]
        rules = "; ".join(
            f"{mismatch.rule} allows it only with {' and '.join(mismatch.violations)}"
            for mismatch in near[:_MAX_MISMATCHES]
        )
        more = len(near) - _MAX_MISMATCHES
        rules += f"; {more} more rules have similar limits" if more > 0 else ""
        if not self.compatible:
            hint = "request a duration and usages that all names allow, or use one volume for each name"
            return Fault(name, f"is not allowed together with the other names: {rules}", hint)
        if near:
            hint = "request that, or ask an administrator to change the rule"
            return Fault(name, f"is not allowed with the requested attributes: {rules}", hint)
        hint = "ask an administrator to add a rule to the policy"
        return Fault(name, f"no policy rule allows this name for service account {self.account}", hint)
