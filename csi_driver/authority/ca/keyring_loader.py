"""Reads a CA from a store or files, and believes nothing: a wrong key or chain is found here, not by a pod's handshake."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from csi_driver.authority.ca.certificate_check import ca_certificate_problems
from csi_driver.authority.ca.key_pairs import CAKeyPair
from csi_driver.authority.ca.keyring import INTERMEDIATE, INTERMEDIATE_KEY, KEYRING_FILES, ROOT, ROOT_KEY, Keyring
from csi_driver.core.certificates.keys import AuthorityKey, load_authority_key
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.secret import Secret

_MOST_CERTIFICATES = 8
"""In one value; nodes take no answer with more than ten."""
_HINT = "put the right value back, or empty the store to have a new CA made"


def load_keyring(
    values: Mapping[str, Secret[bytes]],
    now: datetime,
    *,
    where: str,
    prefix: str = "",
    password: Secret[bytes] | None = None,
    hint: str = _HINT,
) -> Keyring:
    """Takes the values of a store; ``where`` names it in errors, ``hint`` says what to do about them.

    An expired intermediate is taken where the root's key is there to renew it; further roots, which nothing here leads
    to, are taken at any time of their life.

    Raises:
        CertmountError: InvalidCA, with one fault for everything that is wrong.
    """
    source = {name: values[prefix + name] for name in KEYRING_FILES if prefix + name in values}
    reader = MaterialReader(source, f"{where} {prefix}", hint)
    roots, intermediates = reader.certificates(ROOT), reader.certificates(INTERMEDIATE)
    root_key = reader.key(ROOT_KEY, password) if reader.has(ROOT_KEY) else None
    key = reader.key(INTERMEDIATE_KEY, password)
    reader.check_self_signed(ROOT, roots)
    if roots and intermediates:
        roots, intermediates = reader.arrange(roots, intermediates, now)
    reader.check_fit(INTERMEDIATE_KEY, key, intermediates[:1], INTERMEDIATE)
    reader.check_fit(ROOT_KEY, root_key, roots[:1], "the root that issued " + INTERMEDIATE)
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
    reader.check_times(keyring, now)
    if reader.faults:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    return keyring


class MaterialReader:
    """Reads values and gathers all that is wrong with them."""

    def __init__(self, values: Mapping[str, Secret[bytes]], where: str, hint: str) -> None:
        self._values = values
        self._where = where
        self._hint = hint
        self.faults: list[Fault] = []

    def fault(self, name: str, problem: str) -> None:
        """Notes what is wrong with a value."""
        self.faults.append(Fault(self._where + name, problem, self._hint))

    def has(self, name: str) -> bool:
        """True where there is a value that is not blank."""
        return bool(self._values.get(name, Secret(b"")).reveal().strip())

    def certificates(self, name: str) -> list[x509.Certificate]:
        """The certificates of a value, each checked by itself; none where the value can't be read."""
        if not self.has(name):
            self.fault(name, "is missing")
            return []
        try:
            certificates = decode_certificates(self._values[name].reveal())
        except ValueError:
            self.fault(name, "is not an X.509 certificate in PEM")
            return []
        if len(certificates) > _MOST_CERTIFICATES:
            self.fault(name, f"holds {len(certificates)} certificates; at most {_MOST_CERTIFICATES} are taken")
            return []
        problems = [(number, problem) for number, one in enumerate(certificates, 1) for problem in ca_certificate_problems(one)]
        for number, problem in problems:
            self.fault(name, problem if len(certificates) == 1 else f"certificate {number} {problem}")
        return [] if problems else certificates

    def key(self, name: str, password: Secret[bytes] | None) -> AuthorityKey | None:
        """The key of a value; None where it can't be read."""
        if not self.has(name):
            self.fault(name, "is missing")
            return None
        try:
            return load_authority_key(self._values[name], password)
        except ValueError as problem:
            self.fault(name, f"is {problem}")
            return None

    def check_fit(
        self, name: str, key: AuthorityKey | None, certificates: Sequence[x509.Certificate], owner: str
    ) -> None:
        """A key must be that of its certificate."""
        if key is not None and certificates and certificates[0].public_key() != key.key.public_key():
            self.fault(name, f"is not the key of {owner}")

    def check_self_signed(self, name: str, certificates: Sequence[x509.Certificate]) -> None:
        """A root must have signed itself: OpenSSL takes no other by default."""
        for number, certificate in enumerate(certificates, 1):
            if not _issued(certificate, certificate):
                which = "" if len(certificates) == 1 else f"certificate {number} "
                self.fault(name, f"{which}is not self-signed; put the root there")

    def arrange(
        self, roots: list[x509.Certificate], intermediates: list[x509.Certificate], now: datetime
    ) -> tuple[list[x509.Certificate], list[x509.Certificate]]:
        """The root that the intermediates lead to comes first; roots among the intermediates are left away."""
        intermediates = [one for one in intermediates if one not in roots] or intermediates
        for number, (one, issuer) in enumerate(itertools.pairwise(intermediates), 1):
            if not _issued(one, issuer):
                self.fault(INTERMEDIATE, f"certificate {number} is not issued by certificate {number + 1}")
        anchors = [root for root in roots if _issued(intermediates[-1], root)]
        if not anchors:
            self.fault(INTERMEDIATE, "is not issued by " + (ROOT if len(roots) == 1 else f"any certificate of {ROOT}"))
            return roots, intermediates
        # A root may have been signed anew with the same key: of its certificates the one that is good for longest.
        anchor = max(anchors, key=lambda one: (one.not_valid_before_utc <= now, one.not_valid_after_utc))
        for below, (name, one) in enumerate([*((INTERMEDIATE, one) for one in intermediates), (ROOT, anchor)]):
            room = one.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
            if room is not None and room < below:
                self.fault(name, f"has the path length {room}; the intermediates below it need {below}")
        return [anchor, *(root for root in roots if root != anchor)], intermediates

    def check_times(self, keyring: Keyring, now: datetime) -> None:
        """What leaves lead through must be valid now; what is renewed here may have expired."""
        self.check_validity(ROOT, keyring.root, now)
        for certificate in keyring.intermediates:
            self.check_validity(INTERMEDIATE, certificate, now, may_have_expired=keyring.renewable)

    def check_validity(
        self, name: str, certificate: x509.Certificate, now: datetime, *, may_have_expired: bool = False
    ) -> None:
        """A certificate must be valid now."""
        if now < certificate.not_valid_before_utc:
            self.fault(name, f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}")
        if now >= certificate.not_valid_after_utc and not may_have_expired:
            self.fault(name, f"expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
