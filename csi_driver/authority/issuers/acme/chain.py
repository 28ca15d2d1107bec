"""What the CA hands out: which of its chains is taken, whether it is what was ordered, and where it ends."""

from __future__ import annotations

import base64
import functools
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import NameOID
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from csi_driver.authority.issuers.acme.client import CaProblem
from csi_driver.core.certificates.csr import names_of
from csi_driver.core.certificates.parse_errors import PARSE_ERRORS

_MOST_CERTIFICATES = 10
_LETS_ENCRYPT = "Internet Security Research Group"


def parse_chain(pem: str) -> tuple[x509.Certificate, ...]:
    """The certificates of an answer (RFC 8555 section 9.1), leaf first; raises CaProblem."""
    try:
        chain = tuple(x509.load_pem_x509_certificates(pem.encode("ascii")))
    except (UnicodeEncodeError, *PARSE_ERRORS):
        raise CaProblem("", "answers with something that is no chain of certificates") from None
    if len(chain) > _MOST_CERTIFICATES:
        raise CaProblem("", f"answers with {len(chain)} certificates; more than {_MOST_CERTIFICATES} are not taken")
    return chain


def chosen(chains: Sequence[tuple[x509.Certificate, ...]], preferred: str | None) -> tuple[x509.Certificate, ...]:
    """The first chain whose last issuer has the preferred common name; else the first, which is the CA's default."""
    for chain in chains:
        names = chain[-1].issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        if any(name.value == preferred for name in names):
            return chain
    return chains[0]


def check_chain(chain: Sequence[x509.Certificate], csr: bytes) -> None:
    """Raises CaProblem where the leaf is for another key, or for other names, than the request."""
    request = x509.load_der_x509_csr(csr)
    try:
        held = {name.text for name in names_of(chain[0].extensions)}
        same_key = _key(chain[0].public_key()) == _key(request.public_key())
    except PARSE_ERRORS:
        raise CaProblem("", "answers with a certificate that cannot be read") from None
    asked = {name.text for name in names_of(request.extensions)}
    if not same_key:
        raise CaProblem("", "answers with a certificate for another key")
    if held != asked:
        raise CaProblem(
            "", f"answers with a certificate for {', '.join(sorted(held))} and not {', '.join(sorted(asked))}"
        )


def ends_at(chain: Sequence[bytes], roots: Sequence[bytes]) -> bool:
    """True where one of the roots has issued the last certificate of the chain, or is it (all X.509 DER)."""
    last = x509.load_der_x509_certificate(chain[-1])
    return any(root == chain[-1] or _signed(last, x509.load_der_x509_certificate(root)) for root in roots)


def certificate_id(leaf: x509.Certificate) -> str:
    """How the CA calls a certificate in renewal information (RFC 9773 section 4.1); empty without an authority key identifier."""
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
    """X.509 DER of the roots that are Let's Encrypt's own, of those that the connection to a public CA is verified with."""
    return tuple(
        root.public_bytes(Encoding.DER)
        for root in _readable(Path(DEFAULT_CA_BUNDLE_PATH).read_bytes())
        if any(name.value == _LETS_ENCRYPT for name in root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
    )


def _readable(pem: bytes) -> Iterable[x509.Certificate]:
    end = b"-----END CERTIFICATE-----"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # some roots are older than today's rules
        for block in pem.split(end)[:-1]:
            try:
                yield x509.load_pem_x509_certificate(block[block.index(b"-----BEGIN") :] + end)
            except PARSE_ERRORS:
                continue  # one root of unknown kind is no reason to trust none


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *PARSE_ERRORS):
        return False
    return True


def _key(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]  # every public key has it
