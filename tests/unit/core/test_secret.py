"""Secrets cannot be shown by accident."""

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
    """A dataclass with a secret."""

    name: str
    token: Secret[str]


@pytest.mark.parametrize("secret", [Secret(CANARY), Secret(CANARY.encode())])
def test_no_text_form_contains_the_value(secret: Secret[str] | Secret[bytes]) -> None:
    record = logging.LogRecord("name", logging.INFO, "file", 1, "%s %r", (secret, secret), None)
    texts = [
        repr(secret),
        str(secret),
        format(secret),
        f"{secret} {secret!r} {secret!s} {secret!a}",
        "%s %r" % (secret, secret),  # noqa: UP031  # one of the ways to format
        repr([secret, {"key": secret}, (secret,)]),
        pprint.pformat({"key": secret}),
        record.getMessage(),
    ]
    assert all("<redacted>" in text and CANARY not in text for text in texts)


def test_repr_of_a_dataclass_redacts_the_secret() -> None:
    text = repr(Holder("web", Secret(CANARY)))
    assert text == "Holder(name='web', token=<redacted>)"


SERIALIZERS = [pickle.dumps, copy.copy, copy.deepcopy, json.dumps, ", ".join, vars, list, len]
OPERATIONS = [lambda secret: f"{secret:>40}", lambda secret: secret + "suffix", lambda secret: secret[0]]


@pytest.mark.parametrize("call", [*SERIALIZERS, *OPERATIONS, lambda secret: asdict(Holder("web", secret))])
def test_secret_cannot_be_serialized_or_copied(call: object) -> None:
    assert callable(call)
    with pytest.raises(TypeError) as raised:
        call(Secret(CANARY))
    assert CANARY not in "".join(traceback.format_exception(raised.value))


@given(st.binary(), st.binary())
def test_secrets_compare_by_value(one: bytes, other: bytes) -> None:
    assert Secret(one).reveal() == one
    assert (Secret(one) == Secret(other)) == (one == other)
    assert Secret(one) != one
    assert len({Secret(one), Secret(one)}) == 1


def test_secret_has_no_dict() -> None:
    assert not hasattr(Secret(CANARY), "__dict__")
