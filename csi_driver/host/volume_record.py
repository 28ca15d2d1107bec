"""What the driver needs to know about a volume after a restart, as JSON: everything except tokens and keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

VERSION: Final = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRecord:
    """A published volume. Times are unix seconds. ``attributes`` are the volume attributes of the pod spec."""

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

    def to_json(self) -> bytes:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["attributes"] = dict(self.attributes)
        return json.dumps(values, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> VolumeRecord:
        """Parse a record. Raises ValueError with the field that is missing, unknown or of the wrong type."""
        try:
            values = json.loads(text.decode())
        except RecursionError as error:
            raise ValueError("record: nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError("record: is not a JSON object")
        version = _required(values, "version", _integer)
        if version != VERSION:
            raise ValueError(f"version: {version} is not supported; expected {VERSION}")
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{min(unknown)}: is not a field of a record")
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


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("is not a list of strings")
    return tuple(_string(item) for item in value)


def _string_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("is not an object of strings")
    return {name: _string(text) for name, text in value.items()}


_TEXTS = ("volume_id", "pod_namespace", "pod_name", "pod_uid", "service_account")
_TIMES = ("issued_at", "renew_at", "not_after")
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_TEXTS, _string),
    "attributes": _string_map,
    "mount_group": _optional_integer,
    "targets": _strings,
    **dict.fromkeys(_TIMES, _seconds),
    "interim": _boolean,
}
