"""Read values from the data of a configuration file. Faults have the path and the line in the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from csi_driver.core.errors import CertmountError, Fault, Reason, first_faults
from csi_driver.core.texts import shortened

Path = tuple[str | int, ...]
"""Keys and indices from the top of the file, such as ``("issuers", 1, "step_ca", "url")``."""

_MAX_FAULTS = 50
_MAX_SHOWN = 80
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*", re.ASCII)  # needs no quotes in a list
_T = TypeVar("_T")


class DocumentReader:
    """Collects the faults of a document; :meth:`finish` raises them. Only ``max_faults`` of them have a text."""

    def __init__(self, reason: Reason, file: str, lines: Mapping[Path, int], max_faults: int = _MAX_FAULTS) -> None:
        self._reason = reason
        self._file = file
        self._lines = lines
        self._max_faults = max_faults
        self._faults: list[Fault] = []

    def fault(self, path: Path, problem: str, hint: str = "") -> None:
        self._faults.append(Fault(self.label(path), problem, hint))

    def finish(self) -> None:
        """Raise CertmountError if there is a fault."""
        if self._faults:
            raise CertmountError(self._reason, *first_faults(self._faults, _MAX_FAULTS))

    def label(self, path: Path) -> str:
        """Return a path for people, such as ``issuers[1].step_ca.url (line 14)``. A missing key has its parent's line."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{shortened(step)}" for step in path).lstrip(".")
        line = next((self._lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self._lines), None)
        return (text or self._file) + (f" (line {line})" if line is not None else "")

    def mapping(
        self, path: Path, value: object, *, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[object, object]:
        """Return a mapping, or an empty one for any other value. Record a fault for each unknown or missing key."""
        if not isinstance(value, Mapping):
            hint = "use the keys " if path else "begin the file with one of the keys "
            self.fault(path, "is not a mapping", hint + ", ".join(allowed))
            return {}
        for key in value:
            if key not in allowed and len(self._faults) >= self._max_faults:
                self._faults.append(Fault("", ""))  # only counted: a comparison with the known keys takes 0.1 ms
            elif key not in allowed:
                near = difflib.get_close_matches(str(key)[:64], allowed, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(allowed)
                self.fault((*path, str(key)), "is unknown", _missing_space(str(key), allowed) or hint)
        for key in required:
            if value.get(key) is None:
                self.fault((*path, key), "is missing")
        return value

    def items(
        self, path: Path, value: object, read: Callable[[Path, object], _T | None], max_items: int
    ) -> tuple[_T, ...]:
        """Return the items of a list that ``read`` accepts; empty for None and for any other value."""
        if value is None:
            return ()
        if not isinstance(value, list):
            written = value if isinstance(value, str) and _PLAIN.fullmatch(value) else f'"{value}"'
            is_item = isinstance(value, str | int) and len(str(value)) <= _MAX_SHOWN
            self.fault(path, "is not a list", f"write [{written}]" if is_item else "begin each item with '- '")
            return ()
        if len(value) > max_items:
            self.fault(path, f"has {len(value)} items", f"use at most {max_items}")
            return ()
        items = [read((*path, index), item) for index, item in enumerate(value)]
        return tuple(item for item in items if item is not None)

    def text(self, path: Path, value: object, parse: Callable[[str], _T]) -> _T | None:
        """Return a parsed string. ``parse`` raises ValueError with a text that follows the value. None stays None."""
        if value is None:
            return None
        written = value if isinstance(value, str) else str(value) if type(value) is int else None
        try:
            parsed = parse(written) if written is not None else None
        except ValueError as problem:
            self.fault(path, f"{shortened(written or '')!r} {problem}")
            return None
        if not isinstance(value, str):
            self.fault(path, *_not_a_string(value))
            return None
        return parsed


def boolean_problem(value: object) -> tuple[str, str]:
    """Return why a value is not a boolean, and what to write."""
    if value in ("true", "false"):
        return f"'{value}' is a string in YAML, not a boolean", f"write {value}, without quotes"
    return "is not true or false", ""


def _missing_space(key: str, allowed: tuple[str, ...]) -> str:
    """Return what to write if only a space is missing: YAML reads ``-match`` and ``key:value`` as keys."""
    if key.startswith("-"):
        return f"write '- {shortened(key[1:])}:', with a space after '-'"
    name = key.partition(":")[0]
    return f"write '{name}: ', with a space after ':'" if name != key and name in allowed else ""


def _not_a_string(value: object) -> tuple[str, str]:
    """Return what YAML reads in place of a string, and what to write. Lists and mappings can contain credentials."""
    if isinstance(value, bool):
        text = str(value).lower()
        return f"{text} is a boolean in YAML, not a string", f'write "{text}"'
    if isinstance(value, int | float):
        return f"{shortened(str(value))} is a number in YAML, not a string", f'write "{shortened(str(value))}"'
    if isinstance(value, Mapping) and len(value) == 1 and (key := next(iter(value))) and value[key] is None:
        return "'{' begins a mapping in YAML", f'write "{{{shortened(str(key))}}}"'
    return f"is a {'mapping' if isinstance(value, Mapping) else 'list'}, not a string", ""
