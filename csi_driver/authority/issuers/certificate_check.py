"""Judges what an issuer outside has signed against the order: whatever stands behind it may have changed it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS
from csi_driver.core.spec import Usage

_PURPOSES = {ExtendedKeyUsageOID.SERVER_AUTH: Usage.SERVER, ExtendedKeyUsageOID.CLIENT_AUTH: Usage.CLIENT}
_TOLERANCE = timedelta(minutes=2)
"""Between the clocks: a life is counted from the issuer's now."""


def certificate_problems(leaf: x509.Certificate, order: IssuerRequest, now: datetime) -> list[str]:
    """Every way in which a leaf is not what was ordered, in words that follow "the certificate"."""
    grant = order.grant
    try:
        key, extensions = leaf.public_key(), leaf.extensions
        names = names_of(extensions)
    except PARSE_ERRORS:
        return ["cannot be read"]
    problems: list[str] = []
    if public_bytes(key) != public_bytes(order.request.public_key):  # type: ignore[arg-type]  # all keys have this method
        problems.append("is for another key")
    if lacking := sorted(str(name) for name in {*grant.names} - {*names}):
        problems.append(f"lacks {', '.join(lacking)}")
    if foreign := sorted(str(name) for name in {*names} - {*grant.names}):
        problems.append(f"also holds {', '.join(foreign)}")
    if _is_authority(extensions):
        problems.append("is a certificate authority's")
    usages = _usages(extensions)
    if usages != {usage.value for usage in grant.usages}:
        asked = " and ".join(sorted(usage.value for usage in grant.usages))
        problems.append(f"is for {' and '.join(sorted(usages)) or 'any usage'}, not for {asked}")
    if leaf.not_valid_after_utc > now + grant.duration + _TOLERANCE:
        problems.append(f"lives until {leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}, longer than was granted")
    return problems


def ends_at(chain: Sequence[x509.Certificate], roots: Sequence[bytes]) -> bool:
    """True when the last certificate of a chain was issued by one of the roots (DER), or is one."""
    for root in map(x509.load_der_x509_certificate, roots):
        if chain[-1] == root:
            return True
        try:
            chain[-1].verify_directly_issued_by(root)
        except (InvalidSignature, *PARSE_ERRORS):
            continue
        return True
    return False


def _is_authority(extensions: x509.Extensions) -> bool:
    try:
        return extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _usages(extensions: x509.Extensions) -> set[str]:
    try:
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return set()
    return {_PURPOSES[one].value if one in _PURPOSES else one.dotted_string for one in purposes}
