"""The documentation matches the code."""

from __future__ import annotations

import re

import yaml

from csi_driver.authority.pod_certificates.contents import ANNOTATIONS
from csi_driver.core.attributes import ATTRIBUTES
from csi_driver.core.errors import FailureKind, Reason
from csi_driver.core.spec import KeyType
from tests.support.documentation import ROOT, anchors, pages


def test_reasons_page_matches_errors_module() -> None:
    page = (ROOT / "docs/reasons.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \| ([A-Z_]+) \|", page, flags=re.MULTILINE)
    assert rows == [(reason.word, _words(reason.kind), reason.kind.status) for reason in Reason]
    for kind in FailureKind:
        assert f"| {_words(kind)} | {kind.meaning} | {kind.retry.value} | {kind.scope.value} |" in page


def _words(kind: FailureKind) -> str:
    return kind.name.lower().replace("_", " ")


def test_volume_attributes_page_matches_code() -> None:
    page = (ROOT / "docs/volume-attributes.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert rows == [(attribute.name, attribute.example) for attribute in ATTRIBUTES]
    assert all(f"`{key_type.value}`" in page for key_type in KeyType)


def test_pod_certificates_page_lists_the_annotations() -> None:
    page = (ROOT / "docs/pod-certificates.md").read_text()
    listed = page.partition("[volume attributes](volume-attributes.md): ")[2].partition(". Values")[0]
    assert tuple(re.findall(r"`([^`]+)`", listed)) == ANNOTATIONS


def test_links_between_documents_are_valid() -> None:
    for document in map(ROOT.joinpath, pages()):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", document.read_text()):
            path = document.parent / target if target else document
            assert path.exists(), f"{document} links to {target}"
            assert not anchor or anchor in anchors(path.read_text()), f"{document} links to {target}#{anchor}"


def test_documents_name_the_tested_versions_of_kubernetes() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text())
    tested = workflow["jobs"]["e2e"]["strategy"]["matrix"]["kubernetes"]
    assert f"LOCALKUBE_VERSION:-{tested[0]}" in (ROOT / "tests/e2e/run").read_text()
    for page in ("README.md", "CONTRIBUTING.md", "docs/faq.md", "docs/operations/managed-clusters.md"):
        text = (ROOT / page).read_text()
        assert [version for version in tested if version not in text] == [], page
