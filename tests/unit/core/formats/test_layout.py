"""Which files a volume has."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import CertificateSpec, parse_attributes
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.formats.registry import DEFAULT_PRESET, FORMATS, PRESETS
from tests.unit.core.outcomes import outcome

PAGE = (Path(__file__).parents[4] / "docs/formats.md").read_text()
NAMES = st.sampled_from(["a", "tls.crt", "tls.key", "site.crt", "generation.json", "keystore.password"])
FILES = st.dictionaries(st.sampled_from([each.attribute for each in FORMATS]), NAMES)


def test_presets_are_those_of_the_documentation() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)`(?: \(default\))? \| (`[^`]+` \(`.*) \|$", PAGE, flags=re.MULTILINE))
    assert {name: dict(re.findall(r"`([^`]+)` \(`([^`]+)`\)", files)) for name, files in rows.items()} == {
        name: {file: each.attribute for each, file in files.items()} for name, files in PRESETS.items()
    }
    assert f"`{DEFAULT_PRESET}` (default)" in PAGE
    assert CertificateSpec().layout == FileLayout() == parse_attributes({"files": DEFAULT_PRESET}).layout


def test_formats_are_those_of_the_documentation() -> None:
    section = PAGE.partition("## Formats")[2].partition("## generation.json")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", section, flags=re.MULTILINE)
    assert sorted(rows) == sorted(each.attribute for each in FORMATS)


def test_attribute_renames_a_file_of_the_set_or_adds_one() -> None:
    layout = parse_attributes({"files": "kubernetes", "key-file": "server.key", "bundle-file": "all.pem"}).layout
    assert layout.names == {
        "certificate-file": "tls.crt", "key-file": "server.key", "ca-file": "ca.crt", "bundle-file": "all.pem",
    }  # fmt: skip


def test_stores_have_a_file_for_their_password() -> None:
    assert parse_attributes({"files": "java"}).layout.names["password-file"] == "keystore.password"
    assert parse_attributes({"truststore-file": "t", "password-file": "p"}).layout.names["password-file"] == "p"
    assert "password-file" not in parse_attributes({"files": "kubernetes"}).layout.names


@given(st.sampled_from(list(PRESETS)), FILES)
def test_file_names_of_a_valid_volume_are_unique(preset: str, names: dict[str, str]) -> None:
    """Else one file would replace another: a public one the key, for example."""
    spec = outcome(lambda: parse_attributes({"files": preset, **names}), CertmountError)
    if not isinstance(spec, CertmountError):
        files = [*spec.layout.names.values(), "generation.json"]
        assert len(set(files)) == len(files)
