"""Judges an issuer's answer before a byte of it is written: a wrong certificate is worse than a late one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from csi_driver.core.certificates.csr import MAX_CSR_BYTES, names_of
from csi_driver.core.certificates.keys import PublicKey, key_type_of, public_bytes
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import DNSName, Names

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)
_MAX_CERTIFICATES = 10
_MAX_ROOTS = 100
"""Those of an issuer in the middle of a rotation, and of ten federations."""
_MAX_CERTIFICATE_BYTES = MAX_CSR_BYTES
"""The names fill both, so what may be asked for must not be too large to be answered."""


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate that fits its request: ``chain`` is the leaf, then its intermediates; it ends at one of ``roots``."""

    chain: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]

    @property
    def leaf(self) -> x509.Certificate:
        """The pod's own certificate."""
        return self.chain[0]


@dataclass(frozen=True, slots=True)
class ExpectedCertificate:
    """What the answer must fit: the request's key and names, and whose SPIFFE ID it must hold.

    Where no names were asked for, names of the namespace's Services may come beside the SPIFFE ID.
    ``identity_optional`` is for issuers that can't sign it, as public CAs sign DNS names only: where names were asked for,
    the pod's SPIFFE ID may be missing then.
    """

    public_key: PublicKey
    names: Names
    namespace: str
    service_account: str
    identity_optional: bool = False


def verify_certificate(
    chain: Sequence[bytes], roots: Sequence[bytes], expected: ExpectedCertificate, now: datetime
) -> VerifiedCertificate:
    """Parses the answer (X.509 DER) and checks it against the request.

    Raises:
        CertmountError: InvalidResponse, with every way in which the answer does not fit.
    """
    bundle = VerifiedCertificate(parse_certificates(chain, "chain"), parse_certificates(roots, "roots", _MAX_ROOTS))
    faults = [*_key_faults(bundle.leaf, expected), *_name_faults(bundle.leaf, expected), *_chain_faults(bundle, now)]
    if faults:
        raise CertmountError(
            Reason.INVALID_RESPONSE, *(Fault("certificate from the authority", fault) for fault in faults)
        )
    return bundle


def parse_certificates(
    ders: Sequence[bytes], field: str, most: int = _MAX_CERTIFICATES
) -> tuple[x509.Certificate, ...]:
    """Parses 1 to ``most`` DER certificates; raises CertmountError InvalidResponse."""
    if not 1 <= len(ders) <= most:
        raise _invalid(f"{field} holds {len(ders)} certificates; expected were 1 to {most}")
    if any(len(der) > _MAX_CERTIFICATE_BYTES for der in ders):
        raise _invalid(f"{field} holds a certificate of more than {_MAX_CERTIFICATE_BYTES} bytes")
    try:
        return tuple(x509.load_der_x509_certificate(der) for der in ders)
    except PARSE_ERRORS:
        raise _invalid(f"{field} does not parse as X.509 in DER") from None


def _key_faults(leaf: x509.Certificate, expected: ExpectedCertificate) -> list[str]:
    try:
        key = leaf.public_key()
    except PARSE_ERRORS:
        return ["its key cannot be read"]
    if key_type_of(key) is None or public_bytes(key) != public_bytes(expected.public_key):  # type: ignore[arg-type]  # key_type_of admits PublicKey only
        return ["it is for another key than the one made for this volume"]
    return []


def _name_faults(leaf: x509.Certificate, expected: ExpectedCertificate) -> list[str]:
    try:
        names = names_of(leaf.extensions)
    except PARSE_ERRORS:
        return ["its names cannot be read"]
    path = f"/ns/{expected.namespace}/sa/{expected.service_account}"
    # Among the URIs one is the pod's SPIFFE ID, which the authority adds; its trust domain is the authority's to know.
    spiffe = {
        uri
        for uri in names.uris
        if uri.text.startswith("spiffe://") and uri.text.removeprefix("spiffe://").partition("/")[2] == path[1:]
    }
    asked, held = set(expected.names), set(names)
    required = not (expected.identity_optional and len(expected.names))
    faults = [f"it lacks the SPIFFE ID that ends in {path}"] if required and not spiffe else []
    if len(spiffe - asked) > 1:
        faults.append("it holds more than one SPIFFE ID: " + ", ".join(sorted(str(uri) for uri in spiffe)))
    if missing := asked - held:
        faults.append("it lacks " + ", ".join(sorted(str(name) for name in missing)))
    implied = () if expected.names else (name for name in names.dns if _is_service_of(expected.namespace, name))
    if extra := held.difference(asked, spiffe, implied):
        faults.append("it also holds " + ", ".join(sorted(str(name) for name in extra)) + ", which was not asked for")
    return faults


def _is_service_of(namespace: str, name: DNSName) -> bool:
    """True for a name of a Service in the namespace, which a pod that names nothing may get; the cluster's domain is the authority's to know."""
    labels = name.text.split(".")
    return not name.is_wildcard and labels[1:3] == [namespace, "svc"]


def _chain_faults(bundle: VerifiedCertificate, now: datetime) -> list[str]:
    faults = [
        fault
        for position, certificate in enumerate(bundle.chain)
        for fault in _validity_faults(certificate, position, now)
    ]
    constraints = _extension(bundle.leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        faults.append("the leaf is a certificate authority")
    if unknown := _not_understood(bundle.leaf):
        faults.append("the leaf has a critical extension that is not known: " + ", ".join(unknown))
    for position, (subject, issuer) in enumerate(zip(bundle.chain, bundle.chain[1:], strict=False)):
        if not _issued_by(subject, issuer, below=position):
            faults.append(f"certificate {position} of the chain is not issued by certificate {position + 1}")
    last = bundle.chain[-1]
    ending = [root for root in bundle.roots if root == last or _issued_by(last, root, below=len(bundle.chain) - 1)]
    if not ending:
        faults.append("its chain does not end at a trusted root")
    elif all(not root.not_valid_before_utc <= now <= root.not_valid_after_utc for root in ending):
        faults.append("the root of its chain is not valid now")
    return faults


def _validity_faults(certificate: x509.Certificate, position: int, now: datetime) -> list[str]:
    which = "it" if position == 0 else f"certificate {position} of its chain"
    if now < certificate.not_valid_before_utc:
        return [
            f"{which} is not valid before {certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}; compare the clocks of node and authority"
        ]
    if now >= certificate.not_valid_after_utc:
        return [f"{which} expired at {certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"]
    return []


def _room_below(issuer: x509.Certificate) -> int | None:
    """How many intermediates a CA may have below it (RFC 5280 section 4.2.1.9); None for a certificate that may issue none.

    It may when it is a CA, for signing certificates (section 4.2.1.3), and all that is critical about it is understood.
    """
    constraints, usage = _extension(issuer, x509.BasicConstraints), _extension(issuer, x509.KeyUsage)
    if constraints is None or not constraints.ca or (usage and not usage.key_cert_sign) or _not_understood(issuer):
        return None
    return _MAX_CERTIFICATES if constraints.path_length is None else constraints.path_length


def _issued_by(subject: x509.Certificate, issuer: x509.Certificate, *, below: int) -> bool:
    """True when the issuer's key signed the subject and the issuer may have ``below`` intermediates under it."""
    room = _room_below(issuer)
    if room is None or below > room:
        return False
    named, own = _extension(subject, x509.AuthorityKeyIdentifier), _extension(issuer, x509.SubjectKeyIdentifier)
    if named and own and named.key_identifier not in (None, own.digest):
        return False  # OpenSSL finds its way by these (RFC 5280 section 4.2.1.1), and would find none
    try:
        subject.verify_directly_issued_by(issuer)
    except (InvalidSignature, *PARSE_ERRORS):
        return False
    return True


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    """The certificate's extension of a kind; None where there is none or its extensions cannot be read."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, *PARSE_ERRORS):
        return None


def _not_understood(certificate: x509.Certificate) -> list[str]:
    """Critical extensions of unknown meaning: whoever meets one must refuse the certificate (RFC 5280 section 4.2)."""
    try:
        return [
            extension.oid.dotted_string
            for extension in certificate.extensions
            if extension.critical and isinstance(extension.value, x509.UnrecognizedExtension)
        ]
    except PARSE_ERRORS:
        return []


def _invalid(problem: str) -> CertmountError:
    return CertmountError(Reason.INVALID_RESPONSE, Fault("certificate from the authority", problem))
