"""The record of a volume as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.host.volume_record import MAX_RECORD_BYTES, VolumeRecord
from tests.unit.host.samples import record

text = st.text(max_size=40)
seconds = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53).map(float)
never = st.just(math.inf)  # a volume without a certificate
records = st.builds(
    VolumeRecord,
    version=st.just(1),
    volume_id=text,
    pod_namespace=text,
    pod_name=text,
    pod_uid=text,
    service_account=text,
    attributes=st.dictionaries(text, text, max_size=8),
    mount_group=st.none() | st.integers(0, 2**32),
    targets=st.lists(text, max_size=3).map(tuple),
    issued_at=seconds,
    renew_at=seconds | never,
    not_after=seconds | never,
    interim=st.booleans(),
    replace_key=st.booleans(),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)
FIELDS = [field.name for field in fields(VolumeRecord)]


@given(records)
def test_record_round_trips(written: VolumeRecord) -> None:
    assert VolumeRecord.from_json(written.to_json()) == written


@given(st.data())
def test_truncated_record_is_rejected(data: st.DataObject) -> None:
    whole = data.draw(records).to_json()
    with pytest.raises(ValueError):  # noqa: PT011 - the text depends on the position
        VolumeRecord.from_json(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()))
def test_other_content_is_rejected(garbage: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text depends on the content
        VolumeRecord.from_json(garbage)


@given(name=st.sampled_from(FIELDS), value=values)
def test_field_of_another_type_is_rejected_by_name(name: str, value: object) -> None:
    """A value is either read unchanged, or rejected with the name of its field, or the record is no JSON with this value."""
    changed = json.loads(record().to_json()) | {name: value}
    try:
        read = VolumeRecord.from_json(json.dumps(changed).encode())
    except ValueError as error:
        assert str(error).startswith((f"{name}: ", "record: is not JSON", "record: is nested"))
    else:
        assert json.loads(read.to_json())[name] == value


@pytest.mark.parametrize("name", FIELDS)
def test_missing_field_is_rejected_by_name(name: str) -> None:
    changed = json.loads(record().to_json())
    del changed[name]
    with pytest.raises(ValueError, match=f"^{name}: is missing"):
        VolumeRecord.from_json(json.dumps(changed).encode())


@pytest.mark.parametrize(
    "old, new, problem",
    [
        (b'"version":1', b'"version":2', "version: 2 is not supported"),
        (b'"version":1', b'"version":true', "version: is not an integer"),
        (b'"version":1', b'"version":1,"token":"x"', "token: is not a field of a record"),
        (b"1800002400.0", b"NaN", "record: is not JSON"),
        (b"1800002400.0", b"1e999", "record: is not JSON"),
        (b"1800002400.0", b"9" * 400, "renew_at: is not a finite number"),
        (b'"mount_group":2000', b'"mount_group":"2000"', "mount_group: is not an integer"),
        (b'"duration":"1h"', b'"duration":1', "attributes: is not a string"),
    ],
)
def test_record_with_invalid_value_is_rejected(old: bytes, new: bytes, problem: str) -> None:
    written = record().to_json()
    assert old in written
    with pytest.raises(ValueError, match=problem):
        VolumeRecord.from_json(written.replace(old, new))


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"[" * 1_000, "record: is nested more than 32 levels deep"),
        (b"[" + b"1," * 100_000 + b"1]", "record: has more than 10000 values"),
        (
            b" " * (MAX_RECORD_BYTES + 1),
            f"record: is {MAX_RECORD_BYTES + 1} bytes long; expected at most {MAX_RECORD_BYTES}",
        ),
    ],
)
def test_record_is_limited_before_it_is_parsed(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        VolumeRecord.from_json(content)
