"""Reads values from the plain data of an administrator's file. Everything wrong is said at once, by its path and line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from csi_driver.core.errors import CertmountError, Fault, Reason

Path = tuple[str | int, ...]
"""Keys and indices from the top of the file: ``("issuers", 1, "step_ca", "url")``."""

_MOST_FAULTS = 50
_T = TypeVar("_T")


class DocumentReader:
    """Collects what is wrong while values are taken out of a document; :meth:`finish` says it."""

    def __init__(self, reason: Reason, file: str, lines: Mapping[Path, int]) -> None:
        self._reason = reason
        self._file = file
        self._lines = lines
        self._faults: list[Fault] = []

    def fault(self, path: Path, problem: str, hint: str = "") -> None:
        """Notes what is wrong at a place of the file."""
        self._faults.append(Fault(self.label(path), problem, hint))

    def finish(self) -> None:
        """Raises CertmountError with every fault that was noted; nothing where there is none."""
        if self._faults:
            more = len(self._faults) - _MOST_FAULTS
            last = [f"and {more} more faults"] if more > 0 else []
            raise CertmountError(self._reason, *self._faults[:_MOST_FAULTS], *last)

    def label(self, path: Path) -> str:
        """A place as people read it: ``issuers[1].step_ca.url (line 14)``; what is not there has the line of what it lacks in."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{shown(step)}" for step in path).lstrip(".")
        line = next((self._lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self._lines), None)
        return (text or self._file) + (f" (line {line})" if line is not None else "")

    def mapping(
        self, path: Path, value: object, *, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> Mapping[object, object]:
        """The mapping itself, or an empty one; what it lacks and what is not known in it has been noted."""
        if not isinstance(value, Mapping):
            self.fault(path, "is not a mapping", "expected are the keys " + ", ".join(allowed))
            return {}
        for key in value:
            if key not in allowed:
                near = difflib.get_close_matches(str(key)[:64], allowed, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(allowed)
                self.fault((*path, str(key)), "is not known", hint)
        for key in required:
            if value.get(key) is None:
                self.fault((*path, key), "is missing")
        return value

    def each(self, path: Path, value: object, read: Callable[[Path, object], _T | None], most: int) -> tuple[_T, ...]:
        """The items of a list as ``read`` makes them, without those that it makes None; nothing where there is no list."""
        if value is None:
            return ()
        if not isinstance(value, list):
            self.fault(path, "is not a list")
            return ()
        if len(value) > most:
            self.fault(path, f"has {len(value)} items; at most {most} are read")
            return ()
        items = [read((*path, index), item) for index, item in enumerate(value)]
        return tuple(item for item in items if item is not None)

    def text(self, path: Path, value: object, parse: Callable[[str], _T]) -> _T | None:
        """A text as ``parse`` reads it, which raises ValueError in words that follow the text; None where there is none."""
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(path, f"{shown(repr(value))} is not a text", "put it in quotes")
            return None
        try:
            return parse(value)
        except ValueError as problem:
            self.fault(path, f"{shown(value)!r} {problem}")
            return None


def shown(text: str) -> str:
    """A user's text, cut to a length that fits into a sentence."""
    return text if len(text) <= 80 else text[:77] + "..."
