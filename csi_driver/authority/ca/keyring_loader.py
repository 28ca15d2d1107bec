"""Read a CA from a store or from files, and verify all of it before it signs anything."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime

from cryptography import x509

from csi_driver.authority.ca.certificate_check import ca_certificate_problems
from csi_driver.authority.ca.certificates import CAKeyPair
from csi_driver.authority.ca.keyring import INTERMEDIATE, INTERMEDIATE_KEY, KEYRING_FILES, ROOT, ROOT_KEY, Keyring
from csi_driver.core.certificates.der_bounds import OutOfBounds
from csi_driver.core.certificates.keys import AuthorityKey, load_authority_key
from csi_driver.core.certificates.parsing import is_signed_by
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.texts import timestamp

_MAX_CERTIFICATES = 8  # In one value. Nodes accept at most ten certificates in a response.
_HINT = "restore the correct value, or delete all values to create a new CA"


def load_keyring(
    values: Mapping[str, Secret[bytes]],
    now: datetime,
    *,
    where: str,
    prefix: str = "",
    password: Secret[bytes] | None = None,
    hint: str = _HINT,
    allow_future: bool = False,
) -> Keyring:
    """Return the keyring in the values of a store. ``where`` is the name of the store in errors.

    The intermediate can be expired if the root key is present, because certmount then renews it. Additional roots, at
    which no chain ends, can have any validity period. With ``allow_future``, the certificates can start to be valid later.
    Raises CertmountError InvalidCA, with all faults and ``hint``.
    """
    source = {name: values[prefix + name] for name in KEYRING_FILES if prefix + name in values}
    reader = CertificateReader(source, f"{where} {prefix}", hint)
    roots, intermediates = reader.certificates(ROOT), reader.certificates(INTERMEDIATE)
    root_key = reader.key(ROOT_KEY, password) if reader.has(ROOT_KEY) else None
    key = reader.key(INTERMEDIATE_KEY, password)
    reader.check_self_signed(ROOT, roots)
    if roots and intermediates:
        roots, intermediates = _arrange(reader, roots, intermediates, now)
    reader.check_key(INTERMEDIATE_KEY, key, intermediates[:1], INTERMEDIATE)
    reader.check_key(ROOT_KEY, root_key, roots[:1], "the root that issued " + INTERMEDIATE)
    if reader.faults or key is None:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    keyring = Keyring(
        tuple(roots),
        root_key.key if root_key else None,
        CAKeyPair(intermediates[0], key.key),
        tuple(intermediates[1:]),
        encrypted=key.encrypted or (root_key is not None and root_key.encrypted),
        source=source,
    )
    reader.check_validity(ROOT, keyring.root, now, allow_future=allow_future)
    for certificate in keyring.intermediates:
        allowed = {"allow_expired": keyring.renewable, "allow_future": allow_future}
        reader.check_validity(INTERMEDIATE, certificate, now, **allowed)
    if reader.faults:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    return keyring


class CertificateReader:
    """Parses and checks certificates and keys, and collects all faults."""

    def __init__(self, values: Mapping[str, Secret[bytes]], where: str, hint: str) -> None:
        self._values = values
        self._where = where
        self._hint = hint
        self.faults: list[Fault] = []

    def fault(self, name: str, problem: str) -> None:
        self.faults.append(Fault(self._where + name, problem, self._hint))

    def has(self, name: str) -> bool:
        """Return True if the value exists and is not blank."""
        return bool(self._values.get(name, Secret(b"")).reveal().strip())

    def certificates(self, name: str) -> list[x509.Certificate]:
        """Return the certificates in a value, each checked separately; an empty list if there is a fault."""
        if not self.has(name):
            self.fault(name, "is missing")
            return []
        try:
            certificates = decode_certificates(self._values[name].reveal())
        except ValueError as error:
            cause = error.__cause__
            words = str(cause) if isinstance(cause, OutOfBounds) else "is not an X.509 certificate in PEM format"
            self.fault(name, words)
            return []
        if len(certificates) > _MAX_CERTIFICATES:
            self.fault(name, f"contains {len(certificates)} certificates; the maximum is {_MAX_CERTIFICATES}")
            return []
        before = len(self.faults)
        for number, certificate in enumerate(certificates, 1):
            for problem in ca_certificate_problems(certificate):
                self.fault(name, problem if len(certificates) == 1 else f"certificate {number} {problem}")
        return certificates if len(self.faults) == before else []

    def key(self, name: str, password: Secret[bytes] | None) -> AuthorityKey | None:
        """Return the key in a value; None if there is a fault."""
        if not self.has(name):
            self.fault(name, "is missing")
            return None
        try:
            return load_authority_key(self._values[name], password)
        except ValueError as problem:
            self.fault(name, f"is {problem}")
            return None

    def check_key(
        self, name: str, key: AuthorityKey | None, certificates: Sequence[x509.Certificate], owner: str
    ) -> None:
        if key is not None and certificates and certificates[0].public_key() != key.key.public_key():
            self.fault(name, f"is not the key of {owner}")

    def check_self_signed(self, name: str, certificates: Sequence[x509.Certificate]) -> None:
        """Check that roots are self-signed: by default, OpenSSL accepts no other trust anchor."""
        for number, certificate in enumerate(certificates, 1):
            if not is_signed_by(certificate, certificate):
                which = "" if len(certificates) == 1 else f"certificate {number} "
                self.fault(name, f"{which}is not self-signed; use the root certificate")

    def check_validity(
        self,
        name: str,
        certificate: x509.Certificate,
        now: datetime,
        *,
        allow_expired: bool = False,
        allow_future: bool = False,
    ) -> None:
        if now < certificate.not_valid_before_utc and not allow_future:
            self.fault(name, f"is not valid before {timestamp(certificate.not_valid_before_utc)}")
        if now >= certificate.not_valid_after_utc and not allow_expired:
            self.fault(name, f"expired at {timestamp(certificate.not_valid_after_utc)}")


def _arrange(
    reader: CertificateReader, roots: list[x509.Certificate], intermediates: list[x509.Certificate], now: datetime
) -> tuple[list[x509.Certificate], list[x509.Certificate]]:
    """Return the roots, the one at the end of the chain first, and the intermediates without roots; check the chain."""
    intermediates = [certificate for certificate in intermediates if certificate not in roots] or intermediates
    for number, (certificate, issuer) in enumerate(itertools.pairwise(intermediates), 1):
        if not is_signed_by(certificate, issuer):
            reader.fault(INTERMEDIATE, f"certificate {number} is not issued by certificate {number + 1}")
    anchors = [root for root in roots if is_signed_by(intermediates[-1], root)]
    if not anchors:
        reader.fault(INTERMEDIATE, "is not issued by " + (ROOT if len(roots) == 1 else f"any certificate of {ROOT}"))
        return roots, intermediates
    # A root can have been signed again with the same key. Use the certificate that is valid now and for the longest time.
    anchor = max(anchors, key=lambda root: (root.not_valid_before_utc <= now, root.not_valid_after_utc))
    chain = [*((INTERMEDIATE, certificate) for certificate in intermediates), (ROOT, anchor)]
    for depth, (name, certificate) in enumerate(chain):
        path_length = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        if path_length is not None and path_length < depth:
            reader.fault(name, f"has the path length {path_length}; the intermediates below it need {depth}")
    return [anchor, *(root for root in roots if root != anchor)], intermediates
