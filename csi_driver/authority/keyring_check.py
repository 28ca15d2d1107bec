"""Reads a CA back from a store, and believes nothing: a wrong key or chain is found here, not by a pod's handshake."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from csi_driver.authority.keyring import Keyring, Signer
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.keys import PrivateKey, load_key
from csi_driver.core.secret import Secret

NAMES = ("root.crt", "root.key", "intermediate.crt", "intermediate.key")
_HINT = "put the right value back, or empty the store to have a new CA made"


def load_keyring(values: Mapping[str, Secret[bytes]], now: datetime, *, where: str) -> Keyring:
    """Takes the values of a store; ``where`` names it in errors. An expired intermediate is taken, as the root renews it.

    Raises:
        CertmountError: InvalidCA, with one fault for everything that is wrong.
    """
    reader = _Reader(values, where)
    root = reader.signer("root")
    intermediate = reader.signer("intermediate")
    if root is not None:
        reader.check_issued("root", root.certificate, by=root.certificate)
        reader.check_validity("root", root.certificate, now)
    if root is not None and intermediate is not None:
        reader.check_issued("intermediate", intermediate.certificate, by=root.certificate)
    if reader.faults or root is None or intermediate is None:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    return Keyring(root, intermediate)


class _Reader:
    def __init__(self, values: Mapping[str, Secret[bytes]], where: str) -> None:
        self._values = values
        self._where = where
        self.faults: list[Fault] = []

    def fault(self, name: str, problem: str) -> None:
        self.faults.append(Fault(f"{self._where} {name}", problem, _HINT))

    def signer(self, role: str) -> Signer | None:
        certificate, key = self._certificate(f"{role}.crt"), self._key(f"{role}.key")
        if certificate is None or key is None:
            return None
        if certificate.public_key() != key.public_key():
            self.fault(f"{role}.key", f"is not the key of {role}.crt")
        if not _may_sign(certificate):
            self.fault(f"{role}.crt", "is not the certificate of a certificate authority")
        return Signer(certificate, key)

    def _value(self, name: str) -> Secret[bytes] | None:
        value = self._values.get(name)
        if value is None or not value.reveal().strip():
            self.fault(name, "is missing")
            return None
        return value

    def _certificate(self, name: str) -> x509.Certificate | None:
        value = self._value(name)
        if value is None:
            return None
        try:
            certificates = decode_certificates(value.reveal())
            certificates[0].public_key()
            certificates[0].extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound):
            self.fault(name, "is not an X.509 certificate in PEM with a subject key identifier")
            return None
        if len(certificates) != 1:
            self.fault(name, f"holds {len(certificates)} certificates; expected is one")
        return certificates[0]

    def _key(self, name: str) -> PrivateKey | None:
        value = self._value(name)
        if value is None:
            return None
        try:
            return load_key(value)
        except ValueError as problem:
            self.fault(name, f"is {problem}")
            return None

    def check_issued(self, role: str, certificate: x509.Certificate, *, by: x509.Certificate) -> None:
        try:
            certificate.verify_directly_issued_by(by)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            self.fault(f"{role}.crt", "is not issued by root.crt")

    def check_validity(self, role: str, certificate: x509.Certificate, now: datetime) -> None:
        if now < certificate.not_valid_before_utc:
            self.fault(f"{role}.crt", f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}")
        if now >= certificate.not_valid_after_utc:
            self.fault(f"{role}.crt", f"expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")


def _may_sign(certificate: x509.Certificate) -> bool:
    """True for a CA that may sign certificates (RFC 5280 sections 4.2.1.3 and 4.2.1.9: no key usage means any)."""
    values = [extension.value for extension in certificate.extensions]
    constraints = [value for value in values if isinstance(value, x509.BasicConstraints)]
    usages = [value for value in values if isinstance(value, x509.KeyUsage)]
    return any(value.ca for value in constraints) and all(value.key_cert_sign for value in usages)
