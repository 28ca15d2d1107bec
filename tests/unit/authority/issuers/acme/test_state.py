"""What lies in the store is read back as it was, and anything else is refused in words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.authority.issuers.acme.state import (
    Block,
    LiveCertificate,
    OrderRecord,
    Proof,
    State,
    decode,
    encode,
    names_id,
    order_id,
)
from csi_driver.core.errors import CertmountError, Reason
from tests.unit.authority.issuers.acme.samples import live, record

_TEXT = st.text(max_size=20)
_TIME = st.floats(0, 4e9)
_PROOF = st.builds(Proof, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT, _TEXT)
_ORDER = st.builds(
    OrderRecord, _TEXT, st.lists(_TEXT).map(tuple), st.binary(), _TIME, _TIME, _TEXT, _TEXT, _TEXT, _TIME, _TIME,
    st.integers(0, 100), _TEXT, st.lists(_PROOF, max_size=3).map(tuple), st.lists(st.binary(), max_size=3).map(tuple),
    _TIME, st.booleans(),
)  # fmt: skip
_STATE = st.builds(
    State,
    st.lists(_ORDER, max_size=4).map(tuple),
    st.lists(st.builds(Block, _TEXT, _TIME, st.integers(0, 100), _TEXT, _TEXT), max_size=3).map(tuple),
    st.lists(st.builds(LiveCertificate, _TEXT, _TEXT, _TEXT, _TEXT, _TIME, _TIME, _TIME), max_size=3).map(tuple),
)


@given(_STATE)
def test_it_is_read_back(state: State) -> None:
    """Whatever it is."""
    assert decode(encode(state), "store") == state


@given(
    st.one_of(
        st.binary(),
        st.recursive(st.none() | st.integers() | _TEXT, lambda inner: st.dictionaries(_TEXT, inner)).map(
            lambda value: json.dumps(value).encode()
        ),
    )
)
def test_anything_else_is_refused(content: bytes) -> None:
    """As an error that says where, and what to do."""
    with pytest.raises(CertmountError, match=r"orders\.json") as refusal:
        decode(content, "Secret a/b")
    assert refusal.value.reason is Reason.ISSUER_UNAVAILABLE


def test_intermediates_are_kept_once() -> None:
    """A hundred certificates of one CA do not fill the store with its intermediate."""
    intermediate = bytes(1000)
    orders = tuple(record(id=str(number), chain=(bytes([number]) * 10, intermediate)) for number in range(100))
    assert len(encode(State(orders))) < 100 * 700


@given(st.lists(_TEXT, min_size=1), st.binary(), st.binary())
def test_orders_are_known_by_names_and_key(names: list[str], key: bytes, other: bytes) -> None:
    """The order of the names does not matter; another key is another order."""
    assert order_id(names, key) == order_id(sorted(names, reverse=True), key)
    assert names_id(names) == names_id([*names, names[0]])
    assert (order_id(names, key) == order_id(names, other)) == (key == other)


def test_one_live_certificate_for_each_order() -> None:
    """A renewal with the same key takes the place of what it renews."""
    state = State().with_live(live(certificate_id="old")).with_live(live(certificate_id="new"))
    assert [one.certificate_id for one in state.live] == ["new"]
