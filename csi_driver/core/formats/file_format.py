"""What the files of a volume represent, and the protocol of a file format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, unique

from cryptography import x509

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class StorePassword:
    """The password of the key store and the trust store. The driver writes a ``generated`` one to a file of the volume."""

    value: Secret[bytes]
    generated: bool


@dataclass(frozen=True, slots=True)
class VolumeContents:
    """What the files of a volume represent. ``chain`` is the leaf certificate, followed by its intermediates.

    A volume with roots only has no key and no chain. ``renew_at`` is the planned time of the next renewal in unix seconds.
    """

    key: PrivateKey | None = field(repr=False)
    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    password: StorePassword | None = None
    renew_at: float | None = None


@unique
class PKCS12Encryption(Enum):
    """How key stores and trust stores are encrypted, with the values that pods write."""

    MODERN = "modern"
    LEGACY = "legacy"


@unique
class KeyEncoding(Enum):
    """How files in PEM and DER contain the key, with the values that pods write."""

    PKCS8 = "pkcs8"
    PKCS1 = "pkcs1"  # RSA keys only (RFC 8017 appendix A.1.2)
    SEC1 = "sec1"  # EC keys only (RFC 5915)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """What volume attributes set for all files of a volume."""

    pkcs12_encryption: PKCS12Encryption = PKCS12Encryption.MODERN
    key_encoding: KeyEncoding = KeyEncoding.PKCS8


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A file of a volume: the volume attribute that sets its name, and what it contains.

    ``render`` returns None if the contents have nothing for the file. It has no state: equal contents represent the same
    key and certificates. A ``private`` file contains the private key or the password. A ``store`` is encrypted with it.
    A volume with only roots has no file for its ``certificate``, which is also the key.
    """

    attribute: str
    example: str
    render: Callable[[VolumeContents, FileOptions], bytes | None]
    private: bool = False
    store: bool = False
    certificate: bool = True


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """A file of a volume with its name. ``private`` is true if it contains the private key or the password."""

    name: str
    content: Secret[bytes]
    private: bool
