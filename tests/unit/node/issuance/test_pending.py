"""What was asked with is kept for the next question, for so long, and so many."""

from __future__ import annotations

from dataclasses import replace

from csi_driver.core.spec import KeyType, Usage
from csi_driver.node.issuance.enrolled import Wanted
from csi_driver.node.issuance.pending import Pending
from tests.unit.node.certificates import POD, SPEC, WANTED, prepared

_HOUR = 3600.0


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_next_question_is_asked_with_the_same() -> None:
    """Until the answer is final."""
    pending, asked = Pending(_Clock()), prepared()
    assert pending.find(WANTED) is None
    pending.keep(WANTED, asked)
    assert pending.find(WANTED) is asked
    pending.drop(WANTED)
    pending.drop(WANTED)
    assert pending.find(WANTED) is None


def test_nobody_else_asks_with_it() -> None:
    """Another pod's service account or namespace, another volume, or anything else that is asked for: another key."""
    pending = Pending(_Clock())
    pending.keep(Wanted.of(POD, SPEC, "volume"), prepared())
    others = [
        Wanted.of(POD, SPEC),
        Wanted.of(POD, SPEC, "other"),
        Wanted.of(replace(POD, namespace="other"), SPEC, "volume"),
        Wanted.of(replace(POD, service_account="other"), SPEC, "volume"),
        Wanted.of(POD, replace(SPEC, key_type=KeyType.ED25519), "volume"),
        Wanted.of(POD, replace(SPEC, usages=(Usage.CLIENT,)), "volume"),
        Wanted.of(POD, replace(SPEC, issuer="other"), "volume"),
    ]
    assert [pending.find(other) for other in others] == [None] * len(others)


def test_what_nobody_asks_with_is_forgotten_after_an_hour() -> None:
    """Each question makes it an hour again."""
    clock = _Clock()
    pending = Pending(clock)
    other = Wanted.of(POD, SPEC, "other")
    pending.keep(WANTED, prepared())
    pending.keep(other, prepared())
    clock.now = _HOUR - 1
    pending.keep(WANTED, prepared())
    clock.now = _HOUR + 1
    assert pending.find(other) is None
    assert pending.find(WANTED) is not None
    assert len(pending) == 1
    clock.now = 2 * _HOUR
    pending.forget_old()
    assert len(pending) == 0


def test_the_longest_unused_goes_first() -> None:
    """Memory has an end, whoever asks for what."""
    pending = Pending(_Clock(), most=3)
    volumes = [Wanted.of(POD, SPEC, f"volume-{number}") for number in range(5)]
    for volume in volumes[:3]:
        pending.keep(volume, prepared())
    pending.keep(volumes[0], prepared())
    for volume in volumes[3:]:
        pending.keep(volume, prepared())
    assert [volume for volume in volumes if pending.find(volume)] == [volumes[0], volumes[3], volumes[4]]


def test_a_key_is_not_shown() -> None:
    """Whatever logs a request that is on its way."""
    assert repr(prepared()) == "Prepared()"
