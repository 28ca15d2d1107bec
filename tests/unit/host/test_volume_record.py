"""What is known of a volume after a restart."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.host.volume_record import VolumeRecord
from tests.unit.host.samples import record

text = st.text(max_size=40)
seconds = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53).map(float)
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
    renew_at=seconds,
    not_after=seconds,
    interim=st.booleans(),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)
FIELDS = [field.name for field in fields(VolumeRecord)]


@given(records)
def test_what_was_written_is_read(written: VolumeRecord) -> None:
    """Any text, any group, any time: the record comes back equal."""
    assert VolumeRecord.from_json(written.to_json()) == written


@given(st.data())
def test_a_truncated_record_is_refused(data: st.DataObject) -> None:
    """A crash in the middle of a write, wherever it is, gives a ValueError and no half record."""
    whole = data.draw(records).to_json()
    with pytest.raises(ValueError):  # noqa: PT011 - any text of it is right for bytes cut anywhere
        VolumeRecord.from_json(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=100) | values.map(lambda value: json.dumps(value).encode()))
def test_garbage_is_refused_as_a_value_error(garbage: bytes) -> None:
    """Whatever lies in the file, one kind of error says so."""
    with pytest.raises(ValueError):  # noqa: PT011 - any text of it is right for garbage
        VolumeRecord.from_json(garbage)


@given(name=st.sampled_from(FIELDS), value=values)
def test_one_field_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    """A value is either read as it was written, or refused with the name of its field."""
    changed = json.loads(record().to_json()) | {name: value}
    try:
        read = VolumeRecord.from_json(json.dumps(changed).encode())
    except ValueError as error:
        assert str(error).startswith(f"{name}: ")
    else:
        assert json.loads(read.to_json()).get(name, False) == value


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "interim"])
def test_a_missing_field_is_named(name: str) -> None:
    """No field has a default when it is read, but one that earlier drivers have not written."""
    changed = json.loads(record().to_json())
    del changed[name]
    with pytest.raises(ValueError, match=f"^{name}: is missing"):
        VolumeRecord.from_json(json.dumps(changed).encode())


@pytest.mark.parametrize(
    "old, new, problem",
    [
        (b'"version":1', b'"version":2', "version: 2 is not 1"),
        (b'"version":1', b'"version":true', "version: is no integer"),
        (b'"version":1', b'"version":1,"token":"x"', "token: is no field of a record"),
        (b"1800002400.0", b"NaN", "renew_at: is no finite number"),
        (b"1800002400.0", b"1e999", "renew_at: is no finite number"),
        (b"1800002400.0", b"9" * 400, "renew_at: is no finite number"),
        (b'"mount_group":2000', b'"mount_group":"2000"', "mount_group: is no integer"),
        (b'"duration":"1h"', b'"duration":1', "attributes: is no string"),
    ],
)
def test_what_another_version_wrote_is_refused(old: bytes, new: bytes, problem: str) -> None:
    """Unknown versions, unknown fields and numbers that are none are refused in words."""
    written = record().to_json()
    assert old in written
    with pytest.raises(ValueError, match=problem):
        VolumeRecord.from_json(written.replace(old, new))


def test_nesting_without_end_is_refused() -> None:
    """A file that would exhaust the parser's stack is refused like any other garbage."""
    with pytest.raises(ValueError, match="nested too deeply"):
        VolumeRecord.from_json(b"[" * 100_000)
