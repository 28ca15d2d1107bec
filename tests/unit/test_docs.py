"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from csi_driver.core import attributes
from csi_driver.core.errors import Reason
from csi_driver.core.spec import KeyType

ROOT = Path(__file__).parents[2]


def _first_cells(document: str) -> list[str]:
    """The code in the first cell of each table row."""
    return re.findall(r"^\| `([^`]+)`", (ROOT / document).read_text(), flags=re.MULTILINE)


def test_every_reason_is_explained() -> None:
    """docs/reasons.md has a row for each reason and for no other, with the right answer to "again"."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no) \|", (ROOT / "docs/reasons.md").read_text(), flags=re.MULTILINE))
    assert rows == {reason.word: "yes" if reason.kind.retryable else "no" for reason in Reason}


def test_every_attribute_is_in_the_readme() -> None:
    """The README's table of attributes is the code's list, and names every key type."""
    cells = _first_cells("README.md")
    assert [cell for cell in cells if cell in attributes.KNOWN] == list(attributes.KNOWN)
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{key_type.value}`" in readme for key_type in KeyType)


def test_links_lead_somewhere() -> None:
    """No link between our own documents is broken."""
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
