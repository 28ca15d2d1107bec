"""What ``certmount ca`` says of a CA and its rotation: one value, told to people or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509

from csi_driver.authority.ca.keyring import Keyring
from csi_driver.authority.ca.rotation import RotationPhase
from csi_driver.authority.ca.state import CAState
from csi_driver.core.durations import format_duration
from csi_driver.core.formats.pem import fingerprint

_MOST_NAMES = 10
_PHASES = {
    RotationPhase.STEADY: "steady: one CA signs, and pods trust no other",
    RotationPhase.ANNOUNCING: "announcing: the next CA's root goes to all volumes; the present one signs",
    RotationPhase.DISTRIBUTING: "distributing: every node must confirm that its volumes hold both roots; the present one signs",
    RotationPhase.RETIRING: "retiring: the new CA signs; the former root is trusted until its last certificate has ended",
}


@dataclass(frozen=True, slots=True)
class CAStatusReport:
    """The CA as it is stored, and the nodes as they are now."""

    holdings: CAState
    confirmed: frozenset[str]
    expected: frozenset[str]
    now: int
    """Unix seconds."""

    @property
    def missing(self) -> Sequence[str]:
        """The nodes that have not confirmed yet."""
        return sorted(self.expected - self.confirmed)

    @property
    def next_step(self) -> str:
        """What happens next, and when."""
        state = self.holdings.state
        if state.phase is RotationPhase.STEADY:
            return "none until you call: certmount ca rotate"
        if state.stopped:
            return f"none, as it is stopped; go on by: certmount ca rotate{_or_discard(state.phase)}"
        if not state.since and state.phase is not RotationPhase.DISTRIBUTING:
            return "within seconds: an authority reads of this phase, and its time begins; is one running?"
        if state.phase is RotationPhase.ANNOUNCING:
            return f"{self._moment(state.announced_at)}: every replica knows of the next CA, and the nodes are asked to confirm"
        if state.phase is RotationPhase.DISTRIBUTING:
            if self.missing:
                have = "has" if len(self.missing) == 1 else "have"
                return f"when {_nodes(len(self.missing))} more {have} confirmed: the next CA signs"
            return "within seconds: the next CA signs"
        until = max((state.trusted_until(each) for each in state.retired), default=self.now)
        return f"{self._moment(until)}: the former root leaves every root.crt, and the rotation is done"

    def lines(self) -> Iterator[str]:
        """For people."""
        holdings, state = self.holdings, self.holdings.state
        yield f"phase      {_PHASES[state.phase]}{' (stopped)' if state.stopped else ''}"
        if state.since:
            yield f"since      {_time(state.since)} ({_ago(self.now - state.since)} ago)"
        yield from _of_keyring("signs", holdings.keyring)
        if holdings.following is not None:
            yield from _of_keyring("next", holdings.following)
        for each in state.retired:
            yield f"retired    {fingerprint(x509.load_der_x509_certificate(each.root))}"
            if state.since:
                yield f"           trusted until {_time(state.trusted_until(each))}"
        if state.phase is RotationPhase.DISTRIBUTING:
            yield f"confirmed  by {len(self.confirmed & self.expected)} of {_nodes(len(self.expected))}"
            for name in self.missing[:_MOST_NAMES]:
                yield f"           not yet: {name}"
            if len(self.missing) > _MOST_NAMES:
                yield f"           and {len(self.missing) - _MOST_NAMES} more"
        yield f"next step  {self.next_step}"

    def document(self) -> dict[str, Any]:
        """The same for programs; times are those of RFC 3339."""
        holdings, state = self.holdings, self.holdings.state
        return {
            "phase": state.phase.value,
            "stopped": state.stopped,
            "since": _time(state.since) if state.since else None,
            "generation": state.generation,
            "signing": _document(holdings.keyring),
            "next": _document(holdings.following) if holdings.following else None,
            "retired": [
                {
                    "root": fingerprint(x509.load_der_x509_certificate(each.root)),
                    "trustedUntil": _time(state.trusted_until(each)) if state.since else None,
                }
                for each in state.retired
            ],
            "longestLifeSeconds": state.longest_life,
            "nodes": {
                "expected": len(self.expected),
                "confirmed": len(self.confirmed & self.expected),
                "missing": self.missing,
            },
            "nextStep": self.next_step,
        }

    def _moment(self, seconds: int) -> str:
        left = seconds - self.now
        return f"at {_time(seconds)} (in {_ago(left)})" if left > 0 else "within seconds"


def _or_discard(phase: RotationPhase) -> str:
    return "; give the next CA up by: certmount ca stop --discard" if phase.before_switch else ""


def _of_keyring(role: str, keyring: Keyring) -> Iterator[str]:
    intermediate = keyring.intermediate.certificate
    for root in keyring.roots:
        yield f"{role:<10} {fingerprint(root)}"
        yield f"           {root.subject.rfc4514_string()}, until {_end(root)}"
    renewed = "" if keyring.renewable else "; its owner renews it"
    yield f"           intermediate {intermediate.subject.rfc4514_string()}, until {_end(intermediate)}{renewed}"


def _document(keyring: Keyring) -> dict[str, Any]:
    return {
        "roots": [{"fingerprint": fingerprint(root), "notAfter": _end(root)} for root in keyring.roots],
        "intermediate": {
            "fingerprint": fingerprint(keyring.intermediate.certificate),
            "notAfter": _end(keyring.intermediate.certificate),
            "renewedHere": keyring.renewable,
        },
    }


def _end(certificate: x509.Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _ago(seconds: int) -> str:
    return format_duration(timedelta(seconds=max(0, seconds)))


def _nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"
