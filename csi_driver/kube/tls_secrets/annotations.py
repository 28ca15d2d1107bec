"""Read the entries of maps that certmount uses. Tenants write any others: labels, annotations, and a megabyte of keys of a Secret."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from csi_driver._proto.kubernetes_pb2 import BytesPair
from csi_driver.kube.metadata import text
from csi_driver.kube.response_stream import decode

_KEY_FIELD = b"\x0a"  # the tag of the key, which is the first field of an entry


def read_pairs(entries: Sequence[bytes], keys: Iterable[str]) -> Mapping[str, str]:
    """Return the values of these keys from entries of a map; all other entries are not parsed."""
    return {key: text(value) for key, value in read_values(entries, keys)}


def read_values(entries: Sequence[bytes], keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield these keys and their values from entries of a map; all other entries are not parsed."""
    starts = tuple(_KEY_FIELD + bytes([len(key)]) + key.encode() for key in keys)
    for entry in entries:
        if entry.startswith(starts):
            pair = decode(BytesPair, entry)
            yield pair.key.decode(), pair.value
