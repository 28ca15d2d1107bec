"""All file formats of a volume. To add a format, implement FileFormat and list it in FORMATS."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.core.formats.file_format import FileFormat, RenderedFile, VolumeContents
from csi_driver.core.formats.pem import PEMFormat

FORMATS: Sequence[FileFormat] = (PEMFormat(),)
"""PEM is always present: the driver reads the key and the certificates of a volume back from its PEM files."""


def render_files(contents: VolumeContents, formats: Sequence[FileFormat] = FORMATS) -> tuple[RenderedFile, ...]:
    """Return the files of all formats.

    Every change of the key, the chain or the roots renders all formats again. No file can become stale.
    """
    return tuple(file for file_format in formats for file in file_format.render(contents))
