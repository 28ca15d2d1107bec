"""Verify a certificate that an issuer returned, before anything is written to a volume."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography import x509

from csi_driver.core.certificates.csr import MAX_CSR_BYTES, names_of
from csi_driver.core.certificates.der_bounds import OutOfBounds
from csi_driver.core.certificates.keys import PublicKey, key_type_of, public_bytes
from csi_driver.core.certificates.parsing import PARSE_ERRORS, extension_of, is_signed_by, load_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import DNSName, Names
from csi_driver.core.subject import Subject
from csi_driver.core.texts import timestamp

_MAX_CERTIFICATES = 10
_MAX_SHOWN = 200  # characters of a subject in an error
_MAX_ROOTS = 100  # the roots of an issuer during a rotation, and of ten federations
_CACHED = 64  # certificates: the same roots and intermediates verify all leaves
_MAX_CERTIFICATE_BYTES = MAX_CSR_BYTES  # the names make up most of both, so a certificate for any valid CSR fits


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate that matches its request. ``chain`` is the leaf and its intermediates; it ends at one of ``roots``."""

    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]


@dataclass(frozen=True, slots=True)
class ExpectedCertificate:
    """What a certificate must match: the key and names of the request, and the pod's SPIFFE ID.

    If the request has no names, the certificate can contain names of Services in the pod's namespace.
    ``identity_optional`` allows a certificate without SPIFFE ID if the request has names: a public CA signs only DNS names.
    Without ``spiffe``, the certificate contains the pod's SPIFFE ID only if it is one of the names.
    """

    public_key: PublicKey
    names: Names
    namespace: str
    service_account: str
    identity_optional: bool = False
    spiffe: bool = True
    subject: Subject = Subject()  # empty: any subject


def verify_certificate(
    chain: Sequence[bytes], roots: Sequence[bytes], expected: ExpectedCertificate, now: datetime
) -> VerifiedCertificate:
    """Parse a chain and roots (X.509 DER) and check them against the request.

    Raises CertmountError: InvalidResponse with all mismatches.
    """
    verified = VerifiedCertificate(parse_certificates(chain, "chain"), parse_certificates(roots, "roots", _MAX_ROOTS))
    problems = [
        *_key_problems(verified.leaf, expected),
        *_name_problems(verified.leaf, expected),
        *_subject_problems(verified.leaf, expected),
        *chain_problems(verified.chain, verified.roots, now),
    ]
    if problems:
        raise _invalid(*problems)
    return verified


def parse_certificates(
    ders: Sequence[bytes], field: str, max_certificates: int = _MAX_CERTIFICATES
) -> tuple[x509.Certificate, ...]:
    """Parse 1 to ``max_certificates`` DER certificates. Raises CertmountError InvalidResponse."""
    if not 1 <= len(ders) <= max_certificates:
        raise _invalid(f"{field}: has {len(ders)} certificates; expected 1 to {max_certificates}")
    if any(len(der) > _MAX_CERTIFICATE_BYTES for der in ders):
        raise _invalid(f"{field}: a certificate has more than {_MAX_CERTIFICATE_BYTES} bytes")
    try:
        return tuple(map(parse_certificate, ders))
    except OutOfBounds as problem:
        raise _invalid(f"{field}: a certificate {problem}") from None
    except PARSE_ERRORS:
        raise _invalid(f"{field}: a certificate is not valid X.509 DER") from None


parse_certificate = lru_cache(_CACHED)(load_certificate)
"""The same roots and intermediates are parsed once."""


def _key_problems(leaf: x509.Certificate, expected: ExpectedCertificate) -> list[str]:
    try:
        key = leaf.public_key()
    except PARSE_ERRORS:
        return ["the public key of the leaf cannot be parsed"]
    if key_type_of(key) is None or public_bytes(key) != public_bytes(expected.public_key):  # type: ignore[arg-type]  # key_type_of admits PublicKey only
        return ["the public key of the leaf is not the key of the request"]
    return []


def _name_problems(leaf: x509.Certificate, expected: ExpectedCertificate) -> list[str]:
    try:
        names = names_of(leaf.extensions)
    except PARSE_ERRORS:
        return ["the names of the leaf cannot be parsed"]
    path = f"/ns/{expected.namespace}/sa/{expected.service_account}"
    # The authority adds the pod's SPIFFE ID. Only the authority knows its trust domain.
    spiffe_ids = {
        uri
        for uri in names.uris
        if uri.text.startswith("spiffe://") and uri.text.removeprefix("spiffe://").partition("/")[2] == path[1:]
    }
    requested, actual = set(expected.names), set(names)
    spiffe_ids = spiffe_ids if expected.spiffe else spiffe_ids & requested
    required = expected.spiffe and not (expected.identity_optional and requested)
    problems = [f"the SPIFFE ID that ends in {path} is missing"] if required and not spiffe_ids else []
    if len(spiffe_ids - requested) > 1:
        problems.append("more than one SPIFFE ID: " + ", ".join(sorted(str(uri) for uri in spiffe_ids)))
    if missing := requested - actual:
        problems.append("missing names: " + ", ".join(sorted(str(name) for name in missing)))
    implied = () if requested else (name for name in names.dns if _is_service_of(expected.namespace, name))
    if extra := actual.difference(requested, spiffe_ids, implied):
        problems.append("names that were not requested: " + ", ".join(sorted(str(name) for name in extra)))
    return problems


def _subject_problems(leaf: x509.Certificate, expected: ExpectedCertificate) -> list[str]:
    if not expected.subject:
        return []
    if leaf.subject == expected.subject.name:
        return []
    return [f"the subject is {leaf.subject.rfc4514_string()[:_MAX_SHOWN]!r}, not {str(expected.subject)!r}"]


def _is_service_of(namespace: str, name: DNSName) -> bool:
    """Return True for a Service name in the namespace. Only the authority knows the cluster domain."""
    labels = name.text.split(".")
    return not name.is_wildcard and labels[1:3] == [namespace, "svc"]


def chain_problems(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: datetime) -> list[str]:
    """Return why the leaf is not valid now, or does not chain to one of the roots."""
    problems = [
        problem
        for position, certificate in enumerate(chain)
        for problem in _validity_problems(certificate, position, now)
    ]
    constraints = extension_of(chain[0], x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        problems.append("the leaf is a CA certificate")
    if unknown := _unknown_critical_extensions(chain[0]):
        problems.append("the leaf has unknown critical extensions: " + ", ".join(unknown))
    for position, (subject, issuer) in enumerate(itertools.pairwise(chain)):
        if not _is_issued_by(subject, issuer, intermediates=position):
            problems.append(f"chain[{position}] is not issued by chain[{position + 1}]")
    anchors = [
        root for root in roots if root == chain[-1] or _is_issued_by(chain[-1], root, intermediates=len(chain) - 1)
    ]
    if not anchors:
        problems.append("the chain does not end at a trusted root")
    elif all(not root.not_valid_before_utc <= now <= root.not_valid_after_utc for root in anchors):
        problems.append("the root of the chain is expired or not valid yet")
    return problems


def _validity_problems(certificate: x509.Certificate, position: int, now: datetime) -> list[str]:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        hint = "compare the clocks of the node and the authority"
        return [f"chain[{position}] is not valid before {timestamp(start)}; {hint}"]
    return [f"chain[{position}] expired at {timestamp(end)}"] if now >= end else []


@lru_cache(_CACHED)
def _is_issued_by(subject: x509.Certificate, issuer: x509.Certificate, *, intermediates: int) -> bool:
    """Return True if the issuer signed the subject and allows this number of intermediates below itself.

    The issuer must be a CA (RFC 5280 section 4.2.1.9) that can sign certificates (section 4.2.1.3), without an unknown
    critical extension.
    """
    constraints, usage = extension_of(issuer, x509.BasicConstraints), extension_of(issuer, x509.KeyUsage)
    can_sign = usage is None or usage.key_cert_sign
    if constraints is None or not constraints.ca or not can_sign or _unknown_critical_extensions(issuer):
        return False
    if constraints.path_length is not None and intermediates > constraints.path_length:
        return False
    authority_id = extension_of(subject, x509.AuthorityKeyIdentifier)
    subject_id = extension_of(issuer, x509.SubjectKeyIdentifier)
    # OpenSSL builds chains by these identifiers (RFC 5280 section 4.2.1.1), so a mismatch would break the chain.
    if authority_id and subject_id and authority_id.key_identifier not in (None, subject_id.digest):
        return False
    return is_signed_by(subject, issuer)


def _unknown_critical_extensions(certificate: x509.Certificate) -> list[str]:
    """Return the OIDs of unknown critical extensions, which require rejection (RFC 5280 section 4.2)."""
    try:
        return [
            extension.oid.dotted_string
            for extension in certificate.extensions
            if extension.critical and isinstance(extension.value, x509.UnrecognizedExtension)
        ]
    except PARSE_ERRORS:
        return []


def _invalid(*problems: str) -> CertmountError:
    faults = (Fault("certificate from the authority", problem) for problem in problems)
    return CertmountError(Reason.INVALID_RESPONSE, *faults)
