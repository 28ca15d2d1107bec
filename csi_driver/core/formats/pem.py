"""PEM (RFC 7468), which every TLS library reads, and the certificate and the key in DER."""

from __future__ import annotations

from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from csi_driver.core.certificates.parsing import PARSE_ERRORS, load_certificate
from csi_driver.core.formats.file_format import FileFormat, FileOptions, KeyEncoding, VolumeContents


def encode_certificates(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def encode_der_certificates(ders: Iterable[bytes]) -> bytes:
    return encode_certificates(map(x509.load_der_x509_certificate, ders))


def decode_certificates(pem: bytes) -> list[x509.Certificate]:
    """Parse PEM certificates. Raises ValueError if there is none, or if one is malformed or takes too long to parse."""
    try:
        return [load_certificate(each.public_bytes(Encoding.DER)) for each in x509.load_pem_x509_certificates(pem)]
    except PARSE_ERRORS as error:
        raise ValueError("not certificates in PEM") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return ``SHA256:AB:CD:...``, the value that ``openssl x509 -noout -fingerprint -sha256`` prints."""
    return "SHA256:" + certificate.fingerprint(SHA256()).hex(":").upper()


def _roots(contents: VolumeContents, _options: FileOptions) -> bytes:
    return encode_certificates(contents.roots)


def _chain(contents: VolumeContents, _options: FileOptions) -> bytes | None:
    return encode_certificates(contents.chain) if contents.chain else None


def _encoded_key(contents: VolumeContents, options: FileOptions, encoding: Encoding) -> bytes | None:
    if contents.key is None:
        return None
    plain = options.key_encoding is KeyEncoding.PKCS8
    # The traditional formats of OpenSSL are PKCS#1 for RSA and SEC1 for EC keys.
    form = PrivateFormat.PKCS8 if plain else PrivateFormat.TraditionalOpenSSL
    return contents.key.private_bytes(encoding, form, NoEncryption())


def _key(contents: VolumeContents, options: FileOptions) -> bytes | None:
    return _encoded_key(contents, options, Encoding.PEM)


def _bundle(contents: VolumeContents, options: FileOptions) -> bytes | None:
    """Return the key and then the chain: an application reads a matching pair with one read."""
    key, chain = _key(contents, options), _chain(contents, options)
    return key + chain if key is not None and chain is not None else None


def _leaf_der(contents: VolumeContents, _options: FileOptions) -> bytes | None:
    return contents.chain[0].public_bytes(Encoding.DER) if contents.chain else None


def _key_der(contents: VolumeContents, options: FileOptions) -> bytes | None:
    return _encoded_key(contents, options, Encoding.DER)


ROOTS = FileFormat("ca-file", "ca.crt", _roots, certificate=False)
CHAIN = FileFormat("certificate-file", "tls.crt", _chain)
KEY = FileFormat("key-file", "tls.key", _key, private=True)
BUNDLE = FileFormat("bundle-file", "tls.pem", _bundle, private=True)
LEAF_DER = FileFormat("certificate-der-file", "tls.der", _leaf_der)
KEY_DER = FileFormat("key-der-file", "tls.key.der", _key_der, private=True)
