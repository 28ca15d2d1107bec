"""The state of the CA for people and scripts: the output of ``certmount ca``, and a part of that of ``certmount status``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cryptography import x509

from csi_driver.authority.ca.keyring import Keyring
from csi_driver.authority.ca.rotation import Acknowledgements, RotationPhase
from csi_driver.authority.ca.state import CAState
from csi_driver.core.durations import format_duration
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.texts import count, timestamp

_MAX_NAMES = 10
# 7 minutes: SETTLE_S of pod_certificates/publisher.py, which is in a higher layer
_ALSO_PUBLISHED = "; up to 7 minutes later if ClusterTrustBundles or ConfigMaps contain the roots"
_PHASES = {
    RotationPhase.STEADY: "steady: one CA signs, and pods trust only its roots",
    RotationPhase.ANNOUNCING: "announcing: nodes add the next CA's root to all volumes; the current CA signs",
    RotationPhase.DISTRIBUTING: "distributing: every node must acknowledge that its volumes contain both roots; the current CA signs",
    RotationPhase.RETIRING: "retiring: the new CA signs; pods trust the former root until its last certificate has expired",
}


@dataclass(frozen=True, slots=True)
class CAStatusReport:
    """The stored CA, and the acknowledgements of the current nodes."""

    state: CAState
    nodes: Acknowledgements
    now: int  # Unix seconds

    @property
    def next_step(self) -> str:
        state = self.state.rotation
        if state.phase is RotationPhase.STEADY:
            return "none; to rotate the CA, run: certmount ca rotate"
        if state.stopped:
            hint = "; to abandon the next CA, run: certmount ca stop --discard" if state.phase.before_switch else ""
            return f"none, because the rotation is stopped; to resume, run: certmount ca rotate{hint}"
        if not state.since and state.phase is not RotationPhase.DISTRIBUTING:
            return (
                "within seconds an authority reads this phase, and its time starts; check that an authority is running"
            )
        if state.phase is RotationPhase.ANNOUNCING:
            return f"{self._when(state.known_everywhere_at)}: every replica knows the next CA, and nodes start to acknowledge its root"
        if state.phase is RotationPhase.DISTRIBUTING:
            if missing := len(self.nodes.missing):
                return (
                    f"the next CA signs when {missing} more {'node has' if missing == 1 else 'nodes have'} acknowledged"
                )
            valid_from = int(self.state.next_keyring.valid_from.timestamp()) if self.state.next_keyring else 0
            late = "; a clock that was ahead created it, so it is not valid earlier" if valid_from > self.now else ""
            return f"{self._when(valid_from)}: the next CA signs{late}{_ALSO_PUBLISHED}"
        until = max((state.trusted_until(each) for each in state.retired), default=self.now)
        return f"{self._when(until)}: nodes remove the former root from every root.crt, and the rotation is complete"

    def lines(self) -> Iterator[str]:
        state, missing = self.state.rotation, sorted(self.nodes.missing)
        yield f"phase         {_PHASES[state.phase]}{' (stopped)' if state.stopped else ''}"
        if state.since:
            yield f"since         {timestamp(state.since)} ({_duration(self.now - state.since)} ago)"
        yield from _keyring_lines("signs", self.state.keyring)
        if self.state.next_keyring is not None:
            yield from _keyring_lines("next", self.state.next_keyring)
        for each in state.retired:
            yield f"retired       {fingerprint(x509.load_der_x509_certificate(each.root))}"
            if state.since:
                yield f"              trusted until {timestamp(state.trusted_until(each))}"
        if state.phase is RotationPhase.DISTRIBUTING:
            yield f"acknowledged  by {self._acknowledged} of {count(len(self.nodes.expected), 'node')}"
            for name in missing[:_MAX_NAMES]:
                yield f"              not yet: {name}"
            if len(missing) > _MAX_NAMES:
                yield f"              and {len(missing) - _MAX_NAMES} more"
        yield f"next step     {self.next_step}"

    def document(self) -> dict[str, Any]:
        """Return the JSON output. Times have the format of RFC 3339."""
        state, following = self.state.rotation, self.state.next_keyring
        roots = [fingerprint(x509.load_der_x509_certificate(each.root)) for each in state.retired]
        retired = zip(roots, map(state.trusted_until, state.retired), strict=True)
        return {
            "phase": state.phase.value,
            "stopped": state.stopped,
            "since": timestamp(state.since) if state.since else None,
            "generation": state.generation,
            "signing": _keyring_document(self.state.keyring),
            "next": _keyring_document(following) if following else None,
            "retired": [
                {"root": root, "trustedUntil": timestamp(until) if state.since else None} for root, until in retired
            ],
            "maxLifetimeSeconds": state.max_lifetime,
            "nodes": {
                "expected": len(self.nodes.expected),
                "acknowledged": self._acknowledged,
                "missing": sorted(self.nodes.missing),
            },
            "nextStep": self.next_step,
        }

    @property
    def _acknowledged(self) -> int:
        return len(self.nodes.acknowledged & self.nodes.expected)

    def _when(self, seconds: int) -> str:
        left = seconds - self.now
        return f"at {timestamp(seconds)} (in {_duration(left)})" if left > 0 else "within seconds"


def _keyring_lines(role: str, keyring: Keyring) -> Iterator[str]:
    intermediate = keyring.intermediate.certificate
    for root in keyring.roots:
        yield f"{role:<13} {fingerprint(root)}"
        yield f"              {root.subject.rfc4514_string()}, expires {_not_after(root)}"
    renewal = "" if keyring.renewable else "; you must renew it"
    yield f"              intermediate {intermediate.subject.rfc4514_string()}, expires {_not_after(intermediate)}{renewal}"


def _keyring_document(keyring: Keyring) -> dict[str, Any]:
    intermediate = keyring.intermediate.certificate
    return {
        "roots": [{"fingerprint": fingerprint(root), "notAfter": _not_after(root)} for root in keyring.roots],
        "intermediate": {
            "fingerprint": fingerprint(intermediate),
            "notAfter": _not_after(intermediate),
            "renewedByCertmount": keyring.renewable,
        },
    }


def _not_after(certificate: x509.Certificate) -> str:
    return timestamp(certificate.not_valid_after_utc)


def _duration(seconds: int) -> str:
    return format_duration(timedelta(seconds=max(0, seconds)))
