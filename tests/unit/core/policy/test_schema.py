"""The policy's JSON Schema accepts the same files as the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.config.document_reader import Path as DocumentPath
from csi_driver.core.errors import CertmountError
from csi_driver.core.policy.engine import Policy
from csi_driver.core.spec import KeyType, Usage
from tests.support.json_schema import REMOVED, changed, places, valid
from tests.unit.core.outcomes import outcome
from tests.unit.core.policy.policies import entries, secret_entries
from tests.unit.core.policy.reference import Entry
from tests.unit.core.policy.test_document import GOOD, MATCH, read

SCHEMA = json.loads((Path(__file__).parents[4] / "docs" / "policy.schema.json").read_text())
# The schema has only one spelling of each key type.
FILE: dict[str, Any] = {
    "policy": [{**GOOD, "allow": {**GOOD["allow"], "key_types": ["EC-P256"]}}],
    "deny": [{"match": MATCH, "reason": "stolen"}],
}
CHANGES: list[Any] = [REMOVED, None, "", "x", "*", "**", "A b", "a@b", "{pod}", "{sevice}", "1h", "10.0.0.1", "a://b/{pod}", 5, True, 1.5, [], [1], [None], ["x"], {}, {"x": "y"}, {"x": 1}, {"-": "x"}, "x" * 3000]  # fmt: skip


def is_parsed(document: object) -> bool:
    return isinstance(outcome(lambda: read(document), CertmountError), Policy)


@pytest.mark.parametrize("place", list(places(FILE)), ids=str)
def test_schema_and_parser_agree_on_each_part(place: DocumentPath) -> None:
    assert valid(SCHEMA, FILE)
    documents = [changed(FILE, place, change) for change in CHANGES]
    documents += [changed(FILE, (*place[:-1], "unknown"), "x")] if isinstance(place[-1], str) else []
    for document in documents:
        if "namespaceLabels" in place and "unknown" in str(document):
            continue  # any key is a label there
        assert is_parsed(document) == valid(SCHEMA, document), document


@given(st.lists(entries() | secret_entries, max_size=3))
def test_schema_accepts_valid_policies(rules: list[Entry]) -> None:
    document = {"policy": [rule.document() for rule in rules]}
    assert is_parsed(document)
    assert valid(SCHEMA, document)


@pytest.mark.parametrize("document", [None, {}, {"policy": None}, {"deny": []}])
def test_schema_accepts_an_empty_file(document: object) -> None:
    assert valid(SCHEMA, document)
    assert is_parsed(document)


def test_schema_lists_all_keys_key_types_and_usages() -> None:
    allow = SCHEMA["$defs"]["rule"]["properties"]["allow"]["properties"]
    assert allow["key_types"]["items"]["enum"] == [key_type.value for key_type in KeyType]
    assert allow["usages"]["items"]["enum"] == [usage.value for usage in Usage]
    text = str(outcome(lambda: read({"policy": [{"match": MATCH, "allow": {"zzzz": 1}}]}), CertmountError))
    assert f"known keys: {', '.join(allow)}" in text
    text = str(outcome(lambda: read({"policy": [{"match": {**MATCH, "zzzz": 1}, "allow": {}}]}), CertmountError))
    assert f"known keys: {', '.join(SCHEMA['$defs']['rule']['properties']['match']['properties'])}" in text
