"""The documentation matches the code."""

from __future__ import annotations

import re
from pathlib import Path

from csi_driver.core.attributes import ATTRIBUTES
from csi_driver.core.errors import FailureKind, Reason
from csi_driver.core.spec import KeyType

ROOT = Path(__file__).parents[2]


def test_reasons_page_matches_errors_module() -> None:
    """docs/reasons.md has a row for each reason with its kind and gRPC status, and a row for each kind."""
    page = (ROOT / "docs/reasons.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \| ([A-Z_]+) \|", page, flags=re.MULTILINE)
    assert rows == [(reason.word, _words(reason.kind), reason.kind.status) for reason in Reason]
    for kind in FailureKind:
        assert f"| {_words(kind)} | {kind.meaning} | {kind.retry.value} | {kind.scope.value} |" in page


def _words(kind: FailureKind) -> str:
    return kind.name.lower().replace("_", " ")


def test_volume_attributes_page_matches_code() -> None:
    """docs/volume-attributes.md has the same attributes and examples in the same order, and names every key type."""
    page = (ROOT / "docs/volume-attributes.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert rows == [(attribute.name, attribute.example) for attribute in ATTRIBUTES]
    assert all(f"`{key_type.value}`" in page for key_type in KeyType)


def _anchors(page: str) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_are_valid() -> None:
    """Each link between our own documents leads to an existing file and, if it has an anchor, to a heading."""
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in _anchors(path.read_text()), f"{document.name} links to {target}#{anchor}"
