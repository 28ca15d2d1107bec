"""The state survives the store unchanged, and invalid content is reported."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.state import (
    AcmeState,
    ChallengeRecord,
    NamesBackoff,
    OrderRecord,
    TrackedCertificate,
    decode,
    encode,
    names_id,
    order_id,
)
from csi_driver.core.errors import CertmountError, Reason
from tests.unit.authority.issuers.acme.samples import certificate, order

_TEXT = st.text(max_size=20)
_TIME = st.floats(0, 4e9)
_CHALLENGE = st.builds(ChallengeRecord, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT)
_ORDER = st.builds(
    OrderRecord, _TEXT, st.lists(_TEXT).map(tuple), st.binary(), _TIME, _TIME, _TEXT, _TEXT, _TEXT, _TIME, _TIME,
    st.integers(0, 100), _TEXT, st.lists(_CHALLENGE, max_size=3).map(tuple),
    st.lists(st.binary(), max_size=3).map(tuple), _TIME, st.booleans(),
)  # fmt: skip
_STATE = st.builds(
    AcmeState,
    st.lists(_ORDER, max_size=4).map(tuple),
    st.lists(st.builds(NamesBackoff, _TEXT, _TIME, st.integers(0, 100), _TEXT, _TEXT), max_size=3).map(tuple),
    st.lists(st.builds(TrackedCertificate, _TEXT, _TEXT, _TEXT, _TEXT, _TIME, _TIME, _TIME), max_size=3).map(tuple),
)
_JSON = st.recursive(st.none() | st.integers() | _TEXT, lambda inner: st.dictionaries(_TEXT, inner))


@given(_STATE)
def test_state_is_decoded_as_it_was_encoded(state: AcmeState) -> None:
    assert decode(encode(state), "store") == state


@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
def test_invalid_content_is_reported_with_what_to_do(content: bytes) -> None:
    with pytest.raises(CertmountError, match=r"orders\.json") as failure:
        decode(content, "Secret a/b")
    assert failure.value.reason is Reason.ISSUER_UNAVAILABLE


def test_common_intermediates_are_encoded_once() -> None:
    intermediate = bytes(1000)
    orders = tuple(order(id=str(number), chain=(bytes([number]) * 10, intermediate)) for number in range(100))
    assert len(encode(AcmeState(orders))) < 100 * 700


@given(st.lists(_TEXT, min_size=1), st.binary(), st.binary())
def test_order_id_depends_on_the_set_of_names_and_the_key(names: list[str], key: bytes, other: bytes) -> None:
    assert order_id(names, key) == order_id(sorted(names, reverse=True), key)
    assert names_id(names) == names_id([*names, names[0]])
    assert (order_id(names, key) == order_id(names, other)) == (key == other)


def test_renewal_with_the_same_key_replaces_the_tracked_certificate() -> None:
    state = AcmeState()
    for identifier in ("old", "new"):
        state = state.with_certificate(certificate(certificate_id=identifier))
    assert [one.certificate_id for one in state.certificates] == ["new"]
