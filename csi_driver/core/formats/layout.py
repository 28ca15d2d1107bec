"""Which files a volume has: parses their names, and renders all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from csi_driver.core.formats.file_format import FileFormat, FileOptions, RenderedFile, VolumeContents
from csi_driver.core.formats.pkcs12 import PASSWORD
from csi_driver.core.formats.registry import DEFAULT_PRESET, FORMATS, PRESETS, STRICT_PRESETS
from csi_driver.core.formats.summary import SUMMARY_FILE, render_summary
from csi_driver.core.secret import Secret

# The driver's own entries and those of Kubernetes start with dots.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The file name of each format that a volume has, and the options of the formats."""

    names: Mapping[str, str] = field(default_factory=lambda: _names(DEFAULT_PRESET))  # by attribute
    options: FileOptions = FileOptions()
    strict: bool = False
    """The program of the preset rejects a key that every user can read."""

    @property
    def has_stores(self) -> bool:
        return any(file_format.store and file_format.attribute in self.names for file_format in FORMATS)

    @property
    def has_certificate(self) -> bool:
        return any(file_format.certificate for file_format in self._formats())

    @property
    def only_roots(self) -> FileLayout:
        """The layout without the files for the certificate and the key."""
        names = {each.attribute: self.names[each.attribute] for each in self._formats() if not each.certificate}
        return FileLayout(names, self.options)

    def render(self, contents: VolumeContents) -> tuple[RenderedFile, ...]:
        """Return all files.

        Every change of the key, the chain, the roots or the password renders all formats again. No file can become stale.
        """
        rendered = [RenderedFile(SUMMARY_FILE, Secret(render_summary(contents)), private=False)]
        for file_format in self._formats():
            if (content := file_format.render(contents, self.options)) is not None:
                name = self.names[file_format.attribute]
                rendered.append(RenderedFile(name, Secret(content), file_format.private))
        return tuple(rendered)

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield each attribute that cannot be combined with the others, with the problem and what to do."""
        owners = {SUMMARY_FILE: "the summary that each volume has"}
        for file_format in self._formats():
            attribute = file_format.attribute
            name = self.names[attribute]
            if name in owners:
                yield attribute, f"{name!r} is also the name of {owners[name]}", "use another name"
            owners[name] = attribute
        if PASSWORD.attribute in self.names and not self.has_stores:
            yield PASSWORD.attribute, "is set, but no file has a password", "set keystore-file or truststore-file"

    def _formats(self) -> list[FileFormat]:
        return [file_format for file_format in FORMATS if file_format.attribute in self.names]


def layout_of(preset: str, names: Mapping[str, str], options: FileOptions) -> FileLayout:
    """Return the layout of a preset with these names, by attribute. A name renames a file of the preset or adds a file."""
    layout = FileLayout({**_names(preset), **names}, options, strict=preset in STRICT_PRESETS)
    if layout.has_stores and PASSWORD.attribute not in layout.names:
        return replace(layout, names={**layout.names, PASSWORD.attribute: PASSWORD.example})
    return layout


def parse_preset(text: str) -> str:
    """Return the name of a preset; raises ValueError."""
    if text not in PRESETS:
        raise ValueError("is not a set of files; use one of " + ", ".join(PRESETS))
    return text


def parse_file_name(text: str) -> str:
    """Return a plain file name; raises ValueError."""
    if not _FILE_NAME.fullmatch(text):
        problem = "is not a file name; use at most 100 letters, digits, '.', '_' and '-', the first not '.' or '-'"
        raise ValueError(problem)
    return text


def _names(preset: str) -> dict[str, str]:
    return {file_format.attribute: name for file_format, name in PRESETS[preset].items()}
