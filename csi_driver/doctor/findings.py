"""The findings of ``certmount doctor``: what is wrong, and the command that fixes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any

from csi_driver.core.errors import CertmountError, Reason, printable

_MAX_NODES = 5
_MAX_PER_CHECK = 20


@unique
class Severity(Enum):
    """How urgent a finding is, the most urgent first."""

    ERROR = "error"  # pods do not get certificates, or will not
    WARNING = "warning"  # it works, but not as intended
    UNKNOWN = "unknown"  # not checked, for example because the administrator lacks a permission


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """Something that is wrong. ``fix`` is a command, or words if there is none."""

    severity: Severity
    check: str
    problem: str
    fix: str

    def document(self) -> dict[str, str]:
        return {"severity": self.severity.value, "check": self.check, "problem": self.problem, "fix": self.fix}


class NotChecked(CertmountError):
    """A check is not possible."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(Reason.API_SERVER_UNAVAILABLE, f"{problem}; {fix}")
        self.problem = problem
        self.fix = fix


@dataclass(slots=True)
class CheckResult:
    """The findings of one check. Findings that differ only in the node are one finding."""

    check: str
    summary: str = ""  # what was found if nothing is wrong
    nothing_found: bool = False  # True if what is missing makes the other checks pointless
    _found: dict[tuple[Severity, str, str], list[str]] = field(default_factory=dict)

    def error(self, problem: str, fix: str, node: str = "") -> None:
        self.add(Severity.ERROR, problem, fix, node)

    def warning(self, problem: str, fix: str, node: str = "") -> None:
        self.add(Severity.WARNING, problem, fix, node)

    def not_checked(self, problem: str, fix: str) -> None:
        self.add(Severity.UNKNOWN, f"not checked: {problem}", fix)

    def add(self, severity: Severity, problem: str, fix: str, node: str = "") -> None:
        self._found.setdefault((severity, printable(problem), printable(fix)), []).append(node)

    @property
    def findings(self) -> list[DoctorFinding]:
        return list(self._findings())

    def _findings(self) -> Iterator[DoctorFinding]:
        for number, ((severity, problem, fix), nodes) in enumerate(self._found.items()):
            if number == _MAX_PER_CHECK:
                more = f"and {len(self._found) - number} more findings"
                yield DoctorFinding(severity, self.check, more, "fix the others first")
                return
            named = [node for node in nodes if node]
            more = f" and {len(named) - _MAX_NODES} more" if len(named) > _MAX_NODES else ""
            where = f"{', '.join(named[:_MAX_NODES])}{more}: " if named else ""
            yield DoctorFinding(severity, self.check, where + problem, fix)

    def document(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "summary": self.summary,
            "findings": [finding.document() for finding in self.findings],
        }
