"""PKCS#12 (RFC 7292): the key store and the trust store that Java reads, and the file with their generated password."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import KeySerializationEncryption, PrivateFormat, pkcs12

from csi_driver.core.formats.file_format import FileFormat, FileOptions, PKCS12Encryption, VolumeContents

_KEY_NAME = b"certmount"
# As OpenSSL. Each round blocks all threads, a legacy store for 3 ms; and the stores are in memory, next to what they contain.
_ROUNDS = 2048
_ENCRYPTIONS = {
    PKCS12Encryption.MODERN: (pkcs12.PBES.PBESv2SHA256AndAES256CBC, SHA256()),
    PKCS12Encryption.LEGACY: (pkcs12.PBES.PBESv1SHA1And3KeyTripleDESCBC, SHA1()),  # noqa: S303 - old programs read only this
}
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def _key_store(contents: VolumeContents, options: FileOptions) -> bytes | None:
    encryption = _encryption(contents, options)
    if encryption is None or not isinstance(contents.key, _Key):
        return None
    leaf, *intermediates = contents.chain
    return pkcs12.serialize_key_and_certificates(_KEY_NAME, contents.key, leaf, intermediates, encryption)


def _trust_store(contents: VolumeContents, options: FileOptions) -> bytes | None:
    """Return the roots with Java's attribute for trusted certificates, 2.16.840.1.113894.746875.1.1."""
    encryption = _encryption(contents, options)
    if encryption is None:
        return None
    named = [pkcs12.PKCS12Certificate(root, b"root-%d" % number) for number, root in enumerate(contents.roots, 1)]
    return pkcs12.serialize_java_truststore(named, encryption)


def _password(contents: VolumeContents, _options: FileOptions) -> bytes | None:
    """Return a generated password without a newline: Java reads the whole file."""
    password = contents.password
    return password.value.reveal() if password is not None and password.generated else None


def _encryption(contents: VolumeContents, options: FileOptions) -> KeySerializationEncryption | None:
    if contents.password is None:
        return None
    cipher, mac = _ENCRYPTIONS[options.pkcs12_encryption]
    builder = PrivateFormat.PKCS12.encryption_builder().kdf_rounds(_ROUNDS).key_cert_algorithm(cipher).hmac_hash(mac)
    return builder.build(contents.password.value.reveal())


KEY_STORE = FileFormat("keystore-file", "keystore.p12", _key_store, private=True, store=True)
TRUST_STORE = FileFormat("truststore-file", "truststore.p12", _trust_store, store=True, certificate=False)
PASSWORD = FileFormat("password-file", "keystore.password", _password, private=True, certificate=False)
