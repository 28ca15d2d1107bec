"""Selects and verifies the certificate chains that the CA returns."""

from __future__ import annotations

import base64
import functools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS

_MAX_CERTIFICATES = 10
_LETS_ENCRYPT = "Internet Security Research Group"


def parse_chain(pem: str) -> tuple[x509.Certificate, ...]:
    try:
        chain = tuple(x509.load_pem_x509_certificates(pem.encode("ascii")))
    except (UnicodeEncodeError, *PARSE_ERRORS):
        raise AcmeProblem("", "the response is not a certificate chain") from None
    if len(chain) > _MAX_CERTIFICATES:
        raise AcmeProblem("", f"the chain has {len(chain)} certificates; expected at most {_MAX_CERTIFICATES}")
    return chain


def select_chain(chains: Sequence[tuple[x509.Certificate, ...]], preferred: str | None) -> tuple[x509.Certificate, ...]:
    for chain in chains:
        names = chain[-1].issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        if any(name.value == preferred for name in names):
            return chain
    return chains[0]


def check_chain(chain: Sequence[x509.Certificate], csr: bytes) -> None:
    request = x509.load_der_x509_csr(csr)
    try:
        names = {name.text for name in names_of(chain[0].extensions)}
        same_key = public_bytes(chain[0].public_key()) == public_bytes(request.public_key())  # type: ignore[arg-type]  # all keys have this method
    except PARSE_ERRORS:
        raise AcmeProblem("", "the certificate cannot be parsed") from None
    expected = {name.text for name in names_of(request.extensions)}
    if not same_key:
        raise AcmeProblem("", "the certificate is for another key")
    if names != expected:
        problem = f"the certificate is for {', '.join(sorted(names))}, not {', '.join(sorted(expected))}"
        raise AcmeProblem("", problem)


def certificate_id(leaf: x509.Certificate) -> str:
    """Return the identifier for renewal information (RFC 9773 section 4.1); empty without an authority key identifier."""
    try:
        authority = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (x509.ExtensionNotFound, *PARSE_ERRORS):
        authority = None
    if authority is None:
        return ""
    serial = leaf.serial_number.to_bytes(leaf.serial_number.bit_length() // 8 + 1, "big")
    return ".".join(base64.urlsafe_b64encode(part).decode("ascii").rstrip("=") for part in (authority, serial))


@functools.cache
def lets_encrypt_roots() -> tuple[bytes, ...]:
    """Return Let's Encrypt's own roots (X.509 DER) among the roots that verify connections to public CAs."""
    return tuple(
        root.public_bytes(Encoding.DER)
        for root in _parse_bundle(Path(DEFAULT_CA_BUNDLE_PATH).read_bytes())
        if any(name.value == _LETS_ENCRYPT for name in root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
    )


def _parse_bundle(pem: bytes) -> Iterable[x509.Certificate]:
    end = b"-----END CERTIFICATE-----"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # some roots don't follow today's rules
        for block in pem.split(end)[:-1]:
            try:
                yield x509.load_pem_x509_certificate(block[block.index(b"-----BEGIN") :] + end)
            except PARSE_ERRORS:
                continue  # an unsupported root must not disable the others
