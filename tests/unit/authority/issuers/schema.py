"""Compares docs/issuers.schema.json with the parser: both must accept and reject the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.core.config.document_reader import Path as DocumentPath
from csi_driver.core.errors import CertmountError
from tests.support.json_schema import REMOVED, changed, valid

DOCS = Path(__file__).parents[4] / "docs"
SCHEMA = json.loads((DOCS / "issuers.schema.json").read_text(encoding="utf-8"))
_REPLACEMENTS: list[Any] = [
    REMOVED, None, "", "x", "/", "A b", "5m", 5, [], [1], [None], ["a b"], {}, {"unknown": "x"}, {"file": "/x"},
    {"file": "x"}, {"secret": "a/b"}, {"directory": "/x"}, {"directory": "/x", "secret": "a/b"}, True,
]  # fmt: skip


def assert_schema_agrees(document: dict[str, Any], path: DocumentPath) -> None:
    """Replace or remove the value at the path, or add an unknown key next to it: parser and schema must agree."""
    documents = [document, *(changed(document, path, replacement) for replacement in _REPLACEMENTS)]
    if isinstance(path[-1], str):
        documents.append(changed(document, (*path[:-1], "unknown"), "x"))
    for each in documents:
        assert _accepted(each) == valid(SCHEMA, each), each


def _accepted(document: dict[str, Any]) -> bool:
    try:
        read_issuers(yaml.safe_dump(document).encode())
    except CertmountError:
        return False
    return True
