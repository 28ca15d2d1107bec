"""The protocol of a file format: it renders a key, a certificate chain and roots as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class VolumeContents:
    """What the files of a volume represent. ``chain`` is the leaf certificate, followed by its intermediates."""

    key: PrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """A file of a volume. ``private`` is true if it contains the private key."""

    name: str
    content: Secret[bytes]
    private: bool


class FileFormat(Protocol):
    """Renders the files of one format. A renderer has no state: equal contents represent the same key and certificates."""

    def render(self, contents: VolumeContents) -> tuple[RenderedFile, ...]:
        """Return all files of the format. Each file name is unique among all formats of a volume."""
