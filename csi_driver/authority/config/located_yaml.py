"""Parse YAML within limits: plain data only, with the line of each key and item for error messages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from csi_driver.core.config.document_reader import Path
from csi_driver.core.errors import CertmountError, Fault, Reason

MAX_BYTES = 1024 * 1024
_MAX_DEPTH = 20
# Prefer libyaml: the pure Python parser needs many seconds for a megabyte.
_Base: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]  # the base depends on how PyYAML was built
    """Loads plain data and rejects duplicate keys (YAML 1.2 section 3.2.1.3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is duplicate", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


@dataclass(frozen=True, slots=True)
class Located:
    """The plain data of a YAML document, and the line of each key and item."""

    data: object
    lines: Mapping[Path, int]


def read_yaml(content: bytes, what: str, reason: Reason) -> Located:
    """Parse a YAML document of plain data; raise CertmountError with ``reason`` and the field ``what`` if it is invalid."""

    def invalid(problem: str, hint: str = "") -> CertmountError:
        return CertmountError(reason, Fault(what, problem, hint))

    if len(content) > MAX_BYTES:
        raise invalid(f"is longer than {MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8")
        _check_shape(text, invalid)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return Located(None if node is None else loader.construct_document(node), dict(_lines(node, ())))
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise invalid("is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise invalid(f"is not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise invalid(f"is not valid YAML ({type(error).__name__})") from None


def _lines(node: yaml.Node | None, path: Path) -> Iterator[tuple[Path, int]]:
    """Yield the lines of keys and items. A value can begin lines below its key, so its line would be misleading."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            at = (*path, str(key.value))
            yield at, key.start_mark.line + 1
            yield from _lines(value, at)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _lines(item, (*path, index))


def _check_shape(text: str, invalid: Callable[[str, str], CertmountError]) -> None:
    """Reject aliases and deep nesting before anything is built: with them, a few bytes can need much memory or time."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise invalid("has an alias (*name)", "replace it with the value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise invalid(f"is nested more than {_MAX_DEPTH} levels deep", "")
