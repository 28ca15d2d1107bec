"""Parse YAML within limits: plain data only, with the line of each key and item for error messages."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from csi_driver.config.yaml_traps import explain, explain_line
from csi_driver.core.config.document_reader import Path
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.texts import shortened

MAX_BYTES = 1024 * 1024
MAX_NODES = (
    250_000  # scalars, lists and mappings, each of which takes about 500 bytes; a table of 10,000 cases has fewer
)
_MAX_DEPTH = 20
# Prefer libyaml: the pure Python parser needs many seconds for a megabyte.
_Base: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What YAML does not allow (YAML 1.2 section 5.1), and characters that change the direction of the text around them.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Loader(_Base):  # type: ignore[misc]  # the base depends on how PyYAML was built
    """Loads plain data and rejects duplicate keys (YAML 1.2 section 3.2.1.3)."""

    # Only the values of YAML 1.2 that have one spelling are not strings: no, on, 1:30, 0777 and 2026-01-01 are strings.
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # PyYAML's own attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    problem = f"the key {shortened(repr(key))} is duplicate, see line {seen[key]}"
                    raise _Invalid(key_node.start_mark.line + 1, problem)
                seen[key] = key_node.start_mark.line + 1
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "0|-?[1-9][0-9]{0,17}", "-0123456789"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


class _Invalid(Exception):  # not raised to callers
    """A line that is not allowed: its number, the problem and a hint."""

    def __init__(self, line: int, problem: str, hint: str = "") -> None:
        super().__init__(line, problem, hint)
        self.fault = Fault(f"line {line}", problem, hint)


@dataclass(frozen=True, slots=True)
class Located:
    """The plain data of a YAML document, and the line of each key and item."""

    data: object
    lines: Mapping[Path, int]


def read_yaml(content: bytes, what: str, reason: Reason) -> Located:
    """Parse a YAML document of plain data; raise CertmountError with ``reason`` and the field ``what`` if it is invalid."""
    if len(content) > MAX_BYTES:
        raise CertmountError(reason, Fault(what, f"is longer than {MAX_BYTES} bytes"))
    text = ""
    try:
        text = _decode(content)
        located = _parse(text)
    except _Invalid as error:
        raise CertmountError(reason, error.fault) from None
    except yaml.MarkedYAMLError as error:
        line, problem, hint = explain(error, text)
        raise CertmountError(reason, Fault(f"line {line}", problem, hint)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CertmountError(reason, Fault(what, f"is not valid YAML ({type(error).__name__})")) from None
    if wrapped := _wrapped(located.data):
        raise CertmountError(reason, Fault(what, *wrapped))
    return located


def unwrap_manifest(content: bytes, key: str) -> tuple[bytes, str]:
    """Return the text under ``key`` in the manifest of a ConfigMap, with the lines that it has in the file, and the namespace.

    Any other content is returned unchanged, also if it is invalid: :func:`read_yaml` explains it. The namespace is empty
    if the manifest has none.
    """
    try:
        located = _parse(_decode(content))
    except (_Invalid, yaml.YAMLError, ValueError, RecursionError):
        return content, ""
    manifest = located.data if isinstance(located.data, Mapping) else {}
    data, metadata = manifest.get("data"), manifest.get("metadata")
    text = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(text, str):
        return content, ""
    namespace = metadata.get("namespace") if isinstance(metadata, Mapping) else None
    return b"\n" * located.lines["data", key] + text.encode(), namespace if isinstance(namespace, str) else ""


def _parse(text: str) -> Located:
    _check_shape(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return Located(None if node is None else loader.construct_document(node), dict(_lines(node, ())))
    finally:
        loader.dispose()


def _decode(content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _Invalid(line, "is not UTF-8 text", "save the file as UTF-8") from None
    if match := _UNPRINTABLE.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise _Invalid(line, f"has the invisible character U+{ord(match[0]):04X}", "remove it")
    return text


def _wrapped(data: object) -> tuple[str, str] | None:
    """Return a problem and a hint if the data is a Kubernetes object that contains the file, or an entry of its data."""
    if not isinstance(data, Mapping):
        return None
    for section in ("stringData", "data"):
        values = data.get(section)
        keys = [str(key) for key in values if isinstance(values[key], str)] if isinstance(values, Mapping) else []
        if keys:
            keys.sort(key=lambda key: not key.endswith((".yaml", ".yml")))
            return (
                f"this is a whole {str(data.get('kind', 'ConfigMap'))[:64]}",
                f"pass the text under {section}.{keys[0]}",
            )
    if "kind" in data and "apiVersion" in data:
        return f"this is a whole {str(data['kind'])[:64]}", "pass only the text of the file that it contains"
    for key, value in data.items():
        if isinstance(value, str) and "\n" in value and str(key).endswith((".yaml", ".yml")):
            return f"this is the data of a ConfigMap with the key {key}", f"pass the text under {key}"
    return None


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


def _check_shape(text: str) -> None:
    """Reject aliases, many nodes and deep nesting before anything is built: with them, a few bytes can need much memory."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1  # type: ignore[union-attr]  # parsed events have marks
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None or getattr(event, "tag", None):
                found = explain_line(text.splitlines()[line - 1])
                raise _Invalid(line, *(found or ("has an alias, an anchor or a tag", "replace it with the value")))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise _Invalid(line, f"is nested more than {_MAX_DEPTH} levels deep")
        if nodes > MAX_NODES:
            raise _Invalid(line, f"the file has more than {MAX_NODES} values")
