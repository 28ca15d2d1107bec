"""Reads one mapping of the issuers file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from csi_driver.core.config.document_reader import DocumentReader, Path, boolean_problem
from csi_driver.core.config.issuers import CredentialSource, parse_file_name, parse_source
from csi_driver.core.durations import parse_duration

_T = TypeVar("_T")
_Keys = tuple[str, ...]


class ConfigSection:
    """Reads values by key; reports unknown keys, missing keys, and keys without a value to the reader."""

    def __init__(self, reader: DocumentReader, path: Path, value: object, allowed: _Keys, required: _Keys = ()) -> None:
        self._reader = reader
        self._path = path
        self.values = reader.mapping(path, value, allowed=allowed, required=required)
        for key in allowed:
            if key in self.values and self.values[key] is None and key not in required:
                self.fault(key, "is empty", "set a value or omit it")

    def fault(self, key: str, problem: str, hint: str = "") -> None:
        self._reader.fault((*self._path, key) if key else self._path, problem, hint)

    def section(self, key: str, allowed: _Keys, required: _Keys = ()) -> ConfigSection | None:
        value = self.values.get(key)
        return None if value is None else ConfigSection(self._reader, (*self._path, key), value, allowed, required)

    def text(self, key: str, parse: Callable[[str], _T]) -> _T | None:
        return self._reader.text((*self._path, key), self.values.get(key), parse)

    def texts(self, key: str, parse: Callable[[str], _T], most: int) -> tuple[_T, ...]:
        path, value = (*self._path, key), self.values.get(key)
        if value == [] or (isinstance(value, list) and None in value):
            self.fault(key, "is empty or has an empty item", "set a value or omit it")
        return self._reader.items(path, value, lambda at, item: self._reader.text(at, item, parse), most)

    def boolean(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.fault(key, *boolean_problem(value))
        return value is True

    def duration(self, key: str, default: timedelta) -> timedelta:
        return self.text(key, parse_duration) or default

    def file(self, key: str) -> str | None:
        """Return the path in ``{file: PATH}``."""
        nested = self.section(key, ("file",), required=("file",))
        return None if nested is None else nested.text("file", parse_file_name)

    def credential(self, key: str) -> CredentialSource | None:
        """Return the source in ``{file: PATH}`` or ``{secret: NAMESPACE/NAME, key: KEY}``."""
        return parse_source(self._reader, (*self._path, key), self.values.get(key))
