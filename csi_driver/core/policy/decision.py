"""What a policy says of a request, name by name: enough to grant it, to refuse it in words, and to explain either."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.errors import Fault
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import Name
from csi_driver.core.policy.rules import DenyListEntry, PolicyRule
from csi_driver.core.spec import Usage

_MOST_OBJECTIONS = 3
"""Rules whose limits are told in one fault: who wants to see all of them has ``certmount policy explain``."""


@dataclass(frozen=True, slots=True)
class RuleMismatch:
    """Why a rule that is for the pod does not allow a name."""

    rule: str
    obstacles: tuple[str, ...]
    """What it would allow instead, such as "duration 10s to 1h, not 2h"; empty where none of its patterns fits the name."""


@dataclass(frozen=True, slots=True)
class NameDecision:
    """A name, and the label of a rule that allows it; or, where it is empty, what each rule for this pod has against it."""

    name: Name
    rule: str = ""
    objections: tuple[RuleMismatch, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """The judgement of a whole request: all of it is granted, or nothing."""

    account: ServiceAccount
    rules: tuple[PolicyRule, ...] = ()
    """Those that are for this pod."""
    names: tuple[NameDecision, ...] = ()
    """What was asked for, and the pod's own SPIFFE ID as the last."""
    implied: tuple[NameDecision, ...] = ()
    """What a pod that names nothing gets beside it."""
    usages: tuple[Usage, ...] = ()
    duration: timedelta = timedelta()
    denied: DenyListEntry | None = None
    together: bool = True
    """False where each name is allowed, but not all in one certificate; each then has the rules that allow it as objections."""

    @property
    def allowed(self) -> bool:
        """True when all is granted."""
        return self.denied is None and self.together and all(judged.rule for judged in self.names)

    @property
    def behind(self) -> tuple[str, ...]:
        """The rules behind a grant, each once; for who is denied, the entry of the deny list; else none."""
        if self.denied is not None:
            return (self.denied.label,)
        return tuple(dict.fromkeys(judged.rule for judged in (*self.names, *self.implied))) if self.allowed else ()

    def faults(self) -> list[Fault]:
        """What is refused and what would have to change, one fault for each name."""
        if self.denied is not None:
            hint = f"an administrator may take it off the list: {self.denied.label}"
            return [Fault(f"service account {self.account}", f"is denied: {self.denied.reason}", hint)]
        *asked, own = self.names
        refused = [judged for judged in asked if not judged.rule]
        # The own SPIFFE ID is told of only where nothing else tells as much.
        return [self._fault(judged) for judged in refused or ([] if own.rule else [own])]

    def _fault(self, judged: NameDecision) -> Fault:
        near = [objection for objection in judged.objections if objection.obstacles]
        told = "; ".join(
            f"{objection.rule} allows it only with {' and '.join(objection.obstacles)}"
            for objection in near[:_MOST_OBJECTIONS]
        )
        told += f"; so do {len(near) - _MOST_OBJECTIONS} more rules" if len(near) > _MOST_OBJECTIONS else ""
        if not self.together:
            return Fault(
                str(judged.name),
                f"is not allowed together with the other names: {told}",
                "ask for a duration and usages that all of them have in common, or for each in a volume of its own",
            )
        if near:
            return Fault(
                str(judged.name),
                f"is refused as it is asked for: {told}",
                "ask for that, or an administrator to widen the rule",
            )
        return Fault(
            str(judged.name),
            f"no policy rule allows this name for service account {self.account}",
            "ask an administrator to add a rule to certmount's policy",
        )
