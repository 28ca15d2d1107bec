"""What the driver needs to know about a volume after a restart, as JSON: everything except tokens and keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

from csi_driver.core.bounded_json import loads_bounded

VERSION: Final = 1
MAX_RECORD_BYTES: Final = 256 * 1024  # the attributes of a publish call need at most 192 KiB

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRecord:
    """A published volume. Times are unix seconds. ``attributes`` are the volume attributes of the pod spec.

    A volume without a certificate is never renewed and never expires: these times are infinite, and null in JSON.
    """

    version: int = VERSION
    volume_id: str
    pod_namespace: str
    pod_name: str
    pod_uid: str
    service_account: str
    attributes: Mapping[str, str]
    mount_group: int | None
    targets: tuple[str, ...]
    issued_at: float
    renew_at: float
    not_after: float
    interim: bool = False
    replace_key: bool = False  # the key gets no other certificate, because its last renewal was denied

    def to_json(self) -> bytes:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["attributes"] = dict(self.attributes)
        values |= {name: None for name in _ENDS if values[name] == math.inf}
        return json.dumps(values, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> VolumeRecord:
        """Parse a record. Raises ValueError with the field that is missing, unknown or of the wrong type."""
        try:
            values = loads_bounded(text, max_bytes=MAX_RECORD_BYTES)
        except ValueError as error:
            raise ValueError(f"record: {error}") from None
        if not isinstance(values, dict):
            raise ValueError("record: is not a JSON object")
        version = _required(values, "version", _integer)
        if version != VERSION:
            raise ValueError(f"version: {version} is not supported; expected {VERSION}")
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{ascii(min(unknown)[:80])[1:-1]}: is not a field of a record")
        return cls(version=version, **{name: _required(values, name, parse) for name, parse in _PARSERS.items()})


def _required(values: dict[str, Any], name: str, parse: Callable[[Any], T]) -> T:
    if name not in values:
        raise ValueError(f"{name}: is missing")
    try:
        return parse(values[name])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a string")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("is not an integer")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is not a boolean")
    return value


def _optional_integer(value: Any) -> int | None:
    return None if value is None else _integer(value)


def _seconds(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError("is not a number of seconds")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError("is not a finite number of seconds")
    return seconds


def _seconds_or_never(value: Any) -> float:
    return math.inf if value is None else _seconds(value)


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("is not a list of strings")
    return tuple(_string(item) for item in value)


def _string_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("is not an object of strings")
    return {name: _string(text) for name, text in value.items()}


_TEXTS = ("volume_id", "pod_namespace", "pod_name", "pod_uid", "service_account")
_ENDS = ("renew_at", "not_after")
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_TEXTS, _string),
    "attributes": _string_map,
    "mount_group": _optional_integer,
    "targets": _strings,
    "issued_at": _seconds,
    **dict.fromkeys(_ENDS, _seconds_or_never),
    "interim": _boolean,
    "replace_key": _boolean,
}
