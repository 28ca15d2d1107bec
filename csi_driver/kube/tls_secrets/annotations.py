"""Read the labels and annotations that certmount uses. Tenants write any others, up to 256 KiB of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from csi_driver._proto.kubernetes_pb2 import BytesPair
from csi_driver.kube.metadata import text
from csi_driver.kube.response_stream import decode

_KEY_FIELD = b"\x0a"  # the tag of the key, which is the first field of an entry


def read_pairs(entries: Sequence[bytes], keys: Iterable[str]) -> Mapping[str, str]:
    """Return the values of these keys from entries of a map; all other entries are not parsed."""
    starts = tuple(_KEY_FIELD + bytes([len(key)]) + key.encode() for key in keys)
    found = [decode(BytesPair, entry) for entry in entries if entry.startswith(starts)]
    return {pair.key.decode(): text(pair.value) for pair in found}
