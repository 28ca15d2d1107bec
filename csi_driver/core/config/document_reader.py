"""Read values from the data of a configuration file. Faults have the path and the line in the file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from csi_driver.core.errors import CertmountError, Fault, Reason

Path = tuple[str | int, ...]
"""Keys and indices from the top of the file, such as ``("issuers", 1, "step_ca", "url")``."""

_MAX_FAULTS = 50
_T = TypeVar("_T")


class DocumentReader:
    """Collects the faults of a document; :meth:`finish` raises them."""

    def __init__(self, reason: Reason, file: str, lines: Mapping[Path, int]) -> None:
        self._reason = reason
        self._file = file
        self._lines = lines
        self._faults: list[Fault] = []

    def fault(self, path: Path, problem: str, hint: str = "") -> None:
        self._faults.append(Fault(self.label(path), problem, hint))

    def finish(self) -> None:
        """Raise CertmountError if there is a fault."""
        if self._faults:
            more = len(self._faults) - _MAX_FAULTS
            suffix = [f"and {more} more faults"] if more > 0 else []
            raise CertmountError(self._reason, *self._faults[:_MAX_FAULTS], *suffix)

    def label(self, path: Path) -> str:
        """Return a path for people, such as ``issuers[1].step_ca.url (line 14)``. A missing key has its parent's line."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{shown(step)}" for step in path).lstrip(".")
        line = next((self._lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self._lines), None)
        return (text or self._file) + (f" (line {line})" if line is not None else "")

    def mapping(
        self, path: Path, value: object, *, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[object, object]:
        """Return a mapping, or an empty one for any other value. Record a fault for each unknown or missing key."""
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping", "use the keys " + ", ".join(allowed))
            return {}
        for key in value:
            if key not in allowed:
                near = difflib.get_close_matches(str(key)[:64], allowed, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(allowed)
                self.fault((*path, str(key)), "is unknown", hint)
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
            self.fault(path, "is not a list")
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
        if not isinstance(value, str):
            self.fault(path, f"{shown(repr(value))} is not a string", "put it in quotes")
            return None
        try:
            return parse(value)
        except ValueError as problem:
            self.fault(path, f"{shown(value)!r} {problem}")
            return None


def shown(text: str) -> str:
    """Return the text, truncated if it is long."""
    return text if len(text) <= 80 else text[:77] + "..."
