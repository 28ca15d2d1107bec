"""What a diagnosis found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of checking one thing."""

    subject: str  # What was checked, in one or two words, such as `provisioner`
    ok: bool
    text: str  # What was found; if it is not ok, also what to do

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.subject}: {self.text}"


class Findings(list[Finding]):
    """The findings of one diagnosis, in the order of the checks."""

    def add(self, subject: str, ok: bool, text: str) -> None:
        self.append(Finding(subject, ok, text))

    @property
    def problem(self) -> str | None:
        """Everything that is not ok in one line, or None."""
        return "; ".join(f"{finding.subject}: {finding.text}" for finding in self if not finding.ok) or None
