"""The state of the CA in a store: the signing keyring, the next keyring during a rotation, and the rotation state."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from cryptography import x509

from csi_driver.authority.ca import rotation
from csi_driver.authority.ca.keyring import KEYRING_FILES, ROOT, Keyring, encode_keyring
from csi_driver.authority.ca.keyring_loader import load_keyring
from csi_driver.authority.ca.rotation import Acknowledgements, RetiredRoot, RotationPhase, RotationState
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret

STATE = "state.json"
NEXT = "next."
_NEXT_FILES = tuple(NEXT + name for name in KEYRING_FILES)
_MAX_ROOTS = 10  # nodes reject a root set with more
_MAX_NUMBER = 2**53  # JSON does not preserve larger integers (RFC 8259 section 6)
_NEXT_HINT = f"restore the correct value, or delete every value whose name begins with {NEXT} to abandon the next CA"
_HINT = f"restore it, or delete {STATE} to create it again"


@dataclass(frozen=True, slots=True)
class CAState:
    """A CA and the state of its rotation."""

    keyring: Keyring
    next_keyring: Keyring | None  # present only before the switch of a rotation
    rotation: RotationState
    other_values: Mapping[str, Secret[bytes]] = field(default_factory=dict, repr=False)
    """Values with names that certmount doesn't use. They are kept."""
    saved: bool = True  # false if the store does not contain this state yet

    @property
    def root_set(self) -> RootSet:
        """The roots that pods must trust, the oldest root first, so that the switch changes no file."""
        retired = tuple(each.root for each in self.rotation.retired)
        following = self.next_keyring.roots_der if self.next_keyring else ()
        return RootSet(tuple(dict.fromkeys((*retired, *self.keyring.roots_der, *following))), self.rotation.generation)

    def begin_rotation(self, next_keyring: Keyring, now: int) -> CAState:
        """Start a rotation to the next keyring.

        Raises CertmountError InvalidRequest if a rotation is in progress, InvalidCA if nodes would reject so many roots.
        """
        after = replace(self, next_keyring=next_keyring, rotation=rotation.begin(self.rotation, now))
        if (number := len(after.root_set.roots)) > _MAX_ROOTS:
            problem = f"with the roots that are trusted now, these are {number} roots"
            raise CertmountError(Reason.INVALID_CA, Fault("root.crt", problem, f"the maximum is {_MAX_ROOTS}"))
        return after

    def discard_next(self, now: int) -> CAState:
        """Abandon the next CA; raise CertmountError InvalidRequest if there is none or it already signs."""
        return replace(self, next_keyring=None, rotation=rotation.discard(self.rotation, now))

    def advance(self, now: int, nodes: Acknowledgements, *, latest: int | None = None) -> CAState:
        """Make the next transition if it is due, see :func:`csi_driver.authority.ca.rotation.advance`."""
        next_roots = self.next_keyring.roots_der if self.next_keyring else self.keyring.roots_der
        retiring = [root for root in self.keyring.roots_der if root not in next_roots]
        valid_from = int(self.next_keyring.valid_from.timestamp()) if self.next_keyring else 0
        after = rotation.advance(self.rotation, now, nodes, retiring, latest=latest, next_valid_from=valid_from)
        if after == self.rotation:
            return self
        if self.rotation.phase.before_switch and after.phase is RotationPhase.RETIRING and self.next_keyring:
            # The former keys are no longer needed, so the store does not keep them.
            return replace(self, keyring=self.next_keyring, next_keyring=None, rotation=after)
        return replace(self, rotation=after)

    def renew_intermediates(self, now: datetime) -> CAState:
        keyring, following = _renewed(self.keyring, now), self.next_keyring and _renewed(self.next_keyring, now)
        if keyring is self.keyring and following is self.next_keyring:
            return self
        return replace(self, keyring=keyring, next_keyring=following)

    def encode(self) -> Mapping[str, Secret[bytes]]:
        """Return the values for a store; :func:`parse_ca_state` reads them."""
        following = encode_keyring(self.next_keyring, NEXT) if self.next_keyring else {}
        return {**self.other_values, **encode_keyring(self.keyring), **following, STATE: Secret(_encode_rotation(self))}


def new_ca_state(keyring: Keyring, now: int, published: RootSet | None = None) -> CAState:
    """Return the state of a new CA. ``published`` is what nodes received before someone emptied the store."""
    state = rotation.initial_state(now)
    if published is not None:
        state = replace(state, generation=rotation.next_generation(published.generation, now))
    return CAState(keyring, None, state, saved=False)


def parse_ca_state(
    values: Mapping[str, Secret[bytes]], now: datetime, *, where: str, published: RootSet | None = None
) -> CAState:
    """Read the values of a store. ``where`` names the store in errors; ``published`` is what this replica last published.

    If an administrator stored another CA or an older state, the result has a new generation and is not ``saved``.
    Raises CertmountError InvalidCA, with all faults of the first part that is invalid.
    """
    keyring = load_keyring(values, now, where=where)
    state, root_digest = _parse_rotation(values[STATE], where) if STATE in values else (None, "")
    following = None
    if state is not None and state.phase.before_switch:
        if any(name in values for name in _NEXT_FILES):
            # If a clock that was ahead created the next CA, the current one signs until the next one is valid.
            following = load_keyring(values, now, where=where, prefix=NEXT, hint=_NEXT_HINT, allow_future=True)
        else:
            state, root_digest = replace(state, phase=RotationPhase.STEADY, stopped=False), ""
    others = {name: value for name, value in values.items() if name not in (*KEYRING_FILES, *_NEXT_FILES, STATE)}
    seconds = int(now.timestamp())
    found = CAState(keyring, following, state or rotation.initial_state(seconds), others)
    if (number := len(found.root_set.roots)) > _MAX_ROOTS:
        problem = f"with the roots of the rotation in progress, these are {number} roots; the maximum is {_MAX_ROOTS}"
        raise CertmountError(Reason.INVALID_CA, Fault(f"{where} {ROOT}", problem, "remove roots that pods don't need"))
    if state is not None and root_digest == _root_digest(found) and not _is_older(found.root_set, published):
        return found
    generation = max(state.generation if state else 0, published.generation if published else 0)
    lifetime = max(0, int((keyring.intermediate.certificate.not_valid_after_utc - now).total_seconds()))
    adopted = rotation.adopt_unknown_ca(state, seconds, generation, lifetime)
    return replace(found, rotation=adopted, saved=False)


def _is_older(found: RootSet, published: RootSet | None) -> bool:
    """Return True if nodes would ignore the root set because they know a newer or a different one of its generation."""
    if published is None or found.generation > published.generation:
        return False
    return found.generation < published.generation or set(found.roots) != set(published.roots)


def _renewed(keyring: Keyring, now: datetime) -> Keyring:
    return keyring.renew_intermediate(now) if keyring.intermediate_due(now) else keyring


def _root_digest(state: CAState) -> str:
    """Return a digest of the trusted roots in any order: the generation stands for them."""
    digests = sorted(hashlib.sha256(root).hexdigest() for root in state.root_set.roots)
    return hashlib.sha256(" ".join(digests).encode("ascii")).hexdigest()


def _encode_rotation(ca: CAState) -> bytes:
    state = ca.rotation
    document = {
        "phase": state.phase.value,
        "since": state.since,
        "generation": state.generation,
        "stopped": state.stopped,
        "max_lifetime_s": state.max_lifetime,
        "retired": [
            {"certificate": base64.b64encode(each.root).decode("ascii"), "max_lifetime_s": each.max_lifetime}
            for each in state.retired
        ],
        "root_digest": _root_digest(ca),
    }
    return json.dumps(document, indent=1).encode("ascii")


def _parse_rotation(content: Secret[bytes], where: str) -> tuple[RotationState, str]:
    """Return the state and the digest of the roots that its generation stands for; raise CertmountError InvalidCA."""
    try:
        document = json.loads(content.reveal())
        state = RotationState(
            RotationPhase(document["phase"]),
            since=_number(document["since"]),
            generation=_number(document["generation"]),
            stopped=_typed(document["stopped"], bool),
            max_lifetime=_number(document["max_lifetime_s"]),
            retired=tuple(_retired(each) for each in _typed(document["retired"], list)),
        )
        root_digest: str = _typed(document["root_digest"], str)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"is damaged ({type(error).__name__})"
        raise CertmountError(Reason.INVALID_CA, Fault(f"{where} {STATE}", problem, _HINT)) from None
    return state, root_digest


def _retired(document: Any) -> RetiredRoot:
    der = base64.b64decode(document["certificate"], validate=True)
    try:
        x509.load_der_x509_certificate(der)
    except PARSE_ERRORS:
        raise ValueError("not a certificate") from None
    return RetiredRoot(der, _number(document["max_lifetime_s"]))


def _number(value: Any) -> int:
    number: int = _typed(value, int)
    if not 0 <= number < _MAX_NUMBER:
        raise ValueError("out of range")
    return number


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not {kind.__name__}")
    return value
