"""A secret can be used, and can't be shown by accident."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import pprint
import traceback
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.secret import Secret

CANARY = "canary-5f1c"


@dataclass(frozen=True, slots=True)
class Holder:
    """A value with a secret in it, as requests and files are."""

    name: str
    token: Secret[str]


@pytest.mark.parametrize("secret", [Secret(CANARY), Secret(CANARY.encode())])
def test_no_way_of_printing_shows_it(secret: Secret[str] | Secret[bytes]) -> None:
    """repr, str, format, f-strings, %, containers, pprint and log records."""
    record = logging.LogRecord("name", logging.INFO, "file", 1, "%s %r", (secret, secret), None)
    texts = [
        repr(secret),
        str(secret),
        format(secret),
        f"{secret} {secret!r} {secret!s} {secret!a}",
        "%s %r" % (secret, secret),  # noqa: UP031  # the old way of printing is one of the ways
        repr([secret, {"key": secret}, (secret,)]),
        pprint.pformat({"key": secret}),
        record.getMessage(),
    ]
    assert all("<redacted>" in text and CANARY not in text for text in texts)


def test_a_value_that_holds_it_can_be_printed() -> None:
    """A dataclass with a secret shows its other fields."""
    text = repr(Holder("web", Secret(CANARY)))
    assert text == "Holder(name='web', token=<redacted>)"


@pytest.mark.parametrize(
    "call",
    [
        pickle.dumps,
        copy.copy,
        copy.deepcopy,
        json.dumps,
        lambda secret: asdict(Holder("web", secret)),
        lambda secret: f"{secret:>40}",
        lambda secret: secret + "suffix",
        ", ".join,
        lambda secret: secret[0],
        vars,
        list,
        len,
    ],
)
def test_it_is_not_serialised_copied_or_taken_apart(call: object) -> None:
    """Each of these is a TypeError, whose traceback doesn't show the value either."""
    assert callable(call)
    with pytest.raises(TypeError) as raised:
        call(Secret(CANARY))
    assert CANARY not in "".join(traceback.format_exception(raised.value))


@given(st.binary(), st.binary())
def test_it_is_a_value(one: bytes, other: bytes) -> None:
    """Equal secrets are equal and hash alike; a secret equals nothing that is not one; ``reveal`` gives it back."""
    assert Secret(one).reveal() == one
    assert (Secret(one) == Secret(other)) == (one == other)
    assert Secret(one) != one
    assert len({Secret(one), Secret(one)}) == 1


def test_it_takes_no_other_attributes() -> None:
    """There is no dictionary that a debugger's dump would walk through."""
    assert not hasattr(Secret(CANARY), "__dict__")
