"""All that a store keeps of the pods' CA: the keyring that signs, the next one during a rotation, and the rotation's state."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from cryptography import x509

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.keyring import KEYRING_FILES, Keyring, encode_keyring
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.authority.ca.rotation import RetiredRoot, RotationPhase, RotationState
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.secret import Secret

STATE = "state.json"
NEXT = "next."
_NEXT_NAMES = tuple(NEXT + name for name in KEYRING_FILES)
_MOST_ROOTS = 10
"""Nodes take no set of roots with more."""
_MAX_NUMBER = 2**53
"""Larger integers don't survive JSON (RFC 8259 section 6)."""
_NEXT_HINT = f"put the right value back, or remove every value whose name begins with {NEXT} to give the next CA up"
_HINT = f"restore it, or remove {STATE} to have it made anew"


@dataclass(frozen=True, slots=True)
class CAState:
    """A CA as it is stored. ``following`` is the next one, there before the switch only."""

    keyring: Keyring
    following: Keyring | None
    state: RotationState
    kept: Mapping[str, Secret[bytes]] = field(default_factory=dict, repr=False)
    """Values of names that are not ours."""
    saved: bool = True
    """False where the store does not say so yet."""

    @property
    def trust(self) -> RootSet:
        """What pods are to trust; the oldest root first, so that a switch changes no file."""
        retired = tuple(each.root for each in self.state.retired)
        following = self.following.roots_der if self.following else ()
        return RootSet(tuple(dict.fromkeys((*retired, *self.keyring.roots_der, *following))), self.state.generation)

    def begun(self, following: Keyring, now: int) -> CAState:
        """A rotation to ``following`` begins.

        Raises:
            CertmountError: InvalidRequest while another one is under way, InvalidCA for more roots than nodes take.
        """
        after = replace(self, following=following, state=rotation.begin(self.state, now))
        if len(after.trust.roots) > _MOST_ROOTS:
            problem = f"together with the roots that are trusted now these are {len(after.trust.roots)}"
            raise CertmountError(Reason.INVALID_CA, Fault("root.crt", problem, f"nodes take {_MOST_ROOTS}"))
        return after

    def discarded(self, now: int) -> CAState:
        """The next CA is given up; raises CertmountError InvalidRequest where it is too late or none is there."""
        return replace(self, following=None, state=rotation.discard(self.state, now))

    def advanced(self, now: int, confirmed: Collection[str], expected: Collection[str]) -> CAState:
        """After all that is due, see :func:`csi_driver.authority.ca.rotation.advance`."""
        leaving = [root for root in self.keyring.roots_der if self.following and root not in self.following.roots_der]
        state = rotation.advance(self.state, now, confirmed, expected, leaving)
        if state == self.state:
            return self
        if self.state.phase.before_switch and state.phase is RotationPhase.RETIRING and self.following is not None:
            # The former keys are of no more use to anyone, so the store forgets them.
            return replace(self, keyring=self.following, following=None, state=state)
        return replace(self, state=state)

    def renewed(self, now: datetime) -> CAState:
        """With new intermediates where they are due."""
        keyring, following = _renewed(self.keyring, now), self.following and _renewed(self.following, now)
        if keyring is self.keyring and following is self.following:
            return self
        return replace(self, keyring=keyring, following=following)

    def dump(self) -> Mapping[str, Secret[bytes]]:
        """The values for a store; :func:`parse_ca_state` reads them back."""
        following = encode_keyring(self.following, NEXT) if self.following else {}
        return {**self.kept, **encode_keyring(self.keyring), **following, STATE: Secret(_dump_state(self))}


def new_ca_state(keyring: Keyring, now: int, known: RootSet | None = None) -> CAState:
    """Of a CA that is made now; ``known`` is what nodes were told before, where the store has been emptied."""
    state = rotation.initial_state(now)
    if known is not None:
        state = replace(state, generation=rotation.next_generation(known.generation, now))
    return CAState(keyring, None, state, saved=False)


def parse_ca_state(
    values: Mapping[str, Secret[bytes]], now: datetime, *, where: str, known: RootSet | None = None
) -> CAState:
    """Takes the values of a store, which ``where`` names in errors; ``known`` is what this replica told nodes last.

    Where a person has put another CA there, or an older state, the result is not ``saved``, and its generation is a new one.

    Raises:
        CertmountError: InvalidCA, with all that is wrong with the first part that is not right.
    """
    keyring = load_keyring(values, now, where=where)
    state, trusted = _parse_state(values[STATE], where) if STATE in values else (None, "")
    before_switch = state is not None and state.phase.before_switch
    following = None
    if before_switch and any(name in values for name in _NEXT_NAMES):
        following = load_keyring(values, now, where=where, prefix=NEXT, hint=_NEXT_HINT)
    elif state is not None and before_switch:
        state, trusted = replace(state, phase=RotationPhase.STEADY, stopped=False), ""
    kept = {name: value for name, value in values.items() if name not in (*KEYRING_FILES, *_NEXT_NAMES, STATE)}
    seconds = int(now.timestamp())
    found = CAState(keyring, following, state or rotation.initial_state(seconds), kept)
    if state is not None and trusted == _digest(found) and not _behind(found.trust, known):
        return found
    last = max(state.generation if state else 0, known.generation if known else 0)
    life = max(0, int((keyring.intermediate.certificate.not_valid_after_utc - now).total_seconds()))
    return replace(found, state=rotation.adopt(state, seconds, last, life), saved=False)


def _behind(found: RootSet, known: RootSet | None) -> bool:
    """True where nodes would not take what was found, as they were told something newer, or something else."""
    if known is None or found.generation > known.generation:
        return False
    return found.generation < known.generation or set(found.roots) != set(known.roots)


def _renewed(keyring: Keyring, now: datetime) -> Keyring:
    return keyring.renew_intermediate(now) if keyring.intermediate_due(now) else keyring


def _digest(holdings: CAState) -> str:
    """Of the trusted roots, in any order, as a generation stands for them."""
    digests = sorted(hashlib.sha256(root).hexdigest() for root in holdings.trust.roots)
    return hashlib.sha256(" ".join(digests).encode("ascii")).hexdigest()


def _dump_state(holdings: CAState) -> bytes:
    state = holdings.state
    document = {
        "phase": state.phase.value,
        "since": state.since,
        "generation": state.generation,
        "stopped": state.stopped,
        "longest_life": state.longest_life,
        "retired": [
            {"certificate": base64.b64encode(each.root).decode("ascii"), "life": each.life} for each in state.retired
        ],
        "trusted": _digest(holdings),
    }
    return json.dumps(document, indent=1).encode("ascii")


def _parse_state(content: Secret[bytes], where: str) -> tuple[RotationState, str]:
    """The state, and the digest of the roots that its generation stands for; raises CertmountError InvalidCA."""
    try:
        document = json.loads(content.reveal())
        retired = tuple(_retired(each) for each in _of(document["retired"], list))
        state = RotationState(
            RotationPhase(document["phase"]),
            since=_number(document["since"]),
            generation=_number(document["generation"]),
            stopped=_of(document["stopped"], bool),
            longest_life=_number(document["longest_life"]),
            retired=retired,
        )
        trusted: str = _of(document["trusted"], str)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"is damaged ({type(error).__name__})"
        raise CertmountError(Reason.INVALID_CA, Fault(f"{where} {STATE}", problem, _HINT)) from None
    return state, trusted


def _retired(document: Any) -> RetiredRoot:
    try:
        der = base64.b64decode(document["certificate"], validate=True)
        x509.load_der_x509_certificate(der)
    except (binascii.Error, *PARSE_ERRORS):
        raise ValueError("no certificate") from None
    return RetiredRoot(der, _number(document["life"]))


def _number(value: Any) -> int:
    number: int = value
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise ValueError("no number that a state may hold")
    return number


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return value


def roots_pem(roots: RootSet) -> bytes:
    """The roots in PEM, for people and files."""
    return encode_certificates([x509.load_der_x509_certificate(root) for root in roots.roots])
