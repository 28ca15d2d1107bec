"""Secret values that cannot be logged by accident."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Generic, NoReturn, TypeVar

T = TypeVar("T", str, bytes)


class Secret(Generic[T]):
    """A token or a key. Only ``reveal()`` returns the value: repr, str and format are redacted, and pickling fails."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value: Final[T] = value

    def reveal(self) -> T:
        """Return the value. Use it only to send it to its recipient or to write it to its file."""
        return self._value

    def __repr__(self) -> str:
        return "<redacted>"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be serialized")


@dataclass(frozen=True, slots=True)
class StoredSecrets:
    """Values by name. A store saves new values only if ``version`` is still its current version (optimistic concurrency)."""

    values: Mapping[str, Secret[bytes]]
    version: str
