"""All file formats of a volume, and the presets. To add a format, write its :class:`FileFormat` and list it in FORMATS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csi_driver.core.formats.file_format import FileFormat
from csi_driver.core.formats.pem import BUNDLE, CHAIN, KEY, KEY_DER, LEAF_DER, ROOTS
from csi_driver.core.formats.pkcs12 import KEY_STORE, PASSWORD, TRUST_STORE

FORMATS: Sequence[FileFormat] = (CHAIN, KEY, ROOTS, BUNDLE, KEY_STORE, TRUST_STORE, PASSWORD, LEAF_DER, KEY_DER)
"""Each is also a volume attribute, in the order of the documentation."""

PRESETS: Mapping[str, Mapping[FileFormat, str]] = {
    "autocert": {ROOTS: "root.crt", CHAIN: "site.crt", KEY: "site.key", BUNDLE: "site.pem"},
    "kubernetes": {CHAIN: "tls.crt", KEY: "tls.key", ROOTS: "ca.crt"},
    "credential-bundle": {BUNDLE: "credentialbundle.pem"},
    "haproxy": {BUNDLE: "haproxy.pem", ROOTS: "ca.crt"},
    "postgres": {CHAIN: "server.crt", KEY: "server.key", ROOTS: "root.crt"},
    "java": {KEY_STORE: "keystore.p12", TRUST_STORE: "truststore.p12"},
}
"""The files of each value of the attribute ``files``. A volume with a store also has the file with its password."""
DEFAULT_PRESET = "autocert"
STRICT_PRESETS = frozenset({"postgres"})
"""Their programs reject a key that every user can read."""
