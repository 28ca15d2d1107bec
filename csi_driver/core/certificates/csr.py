"""Certificate signing requests (PKCS#10, RFC 2986). A CSR contains the requested names and proves possession of the key."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from csi_driver.core.certificates.der_bounds import NotDER, OutOfBounds, csr_key_type
from csi_driver.core.certificates.keys import PrivateKey, PublicKey, key_type_of
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import URI, DNSName, EmailAddress, InvalidName, IPAddress, Names
from csi_driver.core.spec import KeyType

MAX_CSR_BYTES = 64 * 1024
_PURPOSES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
_SYSTEM = "system:"
_UNSUPPORTED = "is not supported in certificates for pods"


@dataclass(frozen=True, slots=True)
class ParsedCSR:
    """A CSR with a verified signature."""

    der: bytes
    public_key: PublicKey
    key_type: KeyType
    names: Names


def build_csr(key: PrivateKey, names: Names) -> bytes:
    """Return a CSR (DER) for a key and names. The subject is empty: clients ignore it (RFC 6125 section 6.4.4)."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if len(names):
        builder = builder.add_extension(san_extension(names), critical=True)
    algorithm = SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def parse_csr(der: bytes) -> ParsedCSR:
    """Parse a CSR and verify its signature, key type and names; takes at most 5 ms. Raises CertmountError InvalidCSR."""
    if len(der) > MAX_CSR_BYTES:
        raise _invalid(f"has {len(der)} bytes; use at most {MAX_CSR_BYTES}")
    try:
        key_type = csr_key_type(der)
        csr = x509.load_der_x509_csr(der)
        key = csr.public_key()
        signed = csr.is_signature_valid
    except OutOfBounds as problem:
        raise _invalid(str(problem)) from None
    except (NotDER, *PARSE_ERRORS):
        raise _invalid("is not PKCS#10 in DER, or has a key or signature of an unknown algorithm") from None
    if not signed or key_type_of(key) is not key_type:
        raise _invalid("has an invalid signature")
    return ParsedCSR(der, key, key_type, _requested_names(csr))  # type: ignore[arg-type]  # key_type_of accepts PublicKey only


def san_extension(names: Names) -> x509.SubjectAlternativeName:
    """Return the subject alternative name extension (RFC 5280 section 4.2.1.6)."""
    return x509.SubjectAlternativeName(
        [
            *(x509.DNSName(name.text) for name in names.dns),
            *(x509.UniformResourceIdentifier(uri.text) for uri in names.uris),
            *(x509.IPAddress(ip.address) for ip in names.ips),
            *(rfc822_name(email.text) for email in names.emails),
        ]
    )


def rfc822_name(text: str) -> x509.RFC822Name:
    """Return the general name of an email address, or of a domain in a name constraint. The caller has validated it."""
    # The constructor calls email.utils.parseaddr, which accepts different texts in different patch releases of Python.
    return x509.RFC822Name._init_without_validation(text)  # noqa: SLF001  # no public function omits the call


def names_of(extensions: x509.Extensions) -> Names:
    """Return the subject alternative names, if any; raises InvalidName for a name that certmount does not issue."""
    try:
        general_names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return Names()
    dns: list[DNSName] = []
    uris: list[URI] = []
    ips: list[IPAddress] = []
    emails: list[EmailAddress] = []
    for general_name in general_names:
        if isinstance(general_name, x509.DNSName):
            dns.append(DNSName.parse(general_name.value))
        elif isinstance(general_name, x509.UniformResourceIdentifier):
            uris.append(URI.parse(general_name.value))
        elif isinstance(general_name, x509.IPAddress):
            ips.append(IPAddress.parse(str(general_name.value)))  # rejects a network, which has a "/"
        elif isinstance(general_name, x509.RFC822Name):
            emails.append(EmailAddress.parse(general_name.value))
        else:
            kind = type(general_name).__name__
            raise InvalidName(f"is a {kind}; use DNS names, URIs, IP addresses and email addresses")
    return Names.of(dns, uris, ips, emails)


def _requested_names(csr: x509.CertificateSigningRequest) -> Names:
    try:
        names = names_of(csr.extensions)
    except InvalidName as problem:
        raise _invalid(f"has a name that {problem}") from None
    except PARSE_ERRORS as error:
        raise _invalid(f"has invalid extensions ({type(error).__name__})") from None
    return names


def _invalid(problem: str) -> CertmountError:
    return CertmountError(Reason.INVALID_CSR, Fault("certificate signing request", problem))


def content_faults(request: ParsedCSR) -> list[Fault]:
    """Return a fault for all content of a CSR, except key and names, that must not be in the certificate."""
    csr = x509.load_der_x509_csr(request.der)
    try:
        faults = [_subject_fault(attribute, request) for attribute in csr.subject]
        faults += [_extension_fault(extension) for extension in csr.extensions]
    except PARSE_ERRORS:
        return [Fault("certificate signing request", "has an invalid subject or invalid extensions")]
    return [fault for fault in faults if fault is not None]


def _subject_fault(attribute: x509.NameAttribute[str | bytes], request: ParsedCSR) -> Fault | None:
    """Accept only a common name that is also a subject alternative name, which older scripts write."""
    field, value = f"subject {attribute.rfc4514_attribute_name}", str(attribute.value)
    if value.lower().startswith(_SYSTEM):
        return Fault(field, f"{value[:100]!r} is reserved for Kubernetes")
    if attribute.oid != NameOID.COMMON_NAME:
        return Fault(field, _UNSUPPORTED, "omit it")
    if value.lower() not in {str(name) for name in request.names}:
        return Fault(field, f"{value[:100]!r} is not among the subject alternative names", "add it to them")
    return None


def _extension_fault(extension: x509.Extension[x509.ExtensionType]) -> Fault | None:
    value, field = extension.value, f"extension {type(extension.value).__name__}"
    if isinstance(value, x509.SubjectAlternativeName):
        return None
    if isinstance(value, x509.BasicConstraints):
        return Fault(field, "requests a CA certificate") if value.ca else None
    if isinstance(value, x509.KeyUsage):
        wrong = value.content_commitment or value.data_encipherment or value.key_agreement
        wrong = wrong or value.key_cert_sign or value.crl_sign
        return Fault(field, "requests more than digital signature and key encipherment") if wrong else None
    if isinstance(value, x509.ExtendedKeyUsage):
        wrong = not set(value) <= _PURPOSES
        return Fault(field, "requests more than server auth and client auth") if wrong else None
    return Fault(f"extension {extension.oid.dotted_string}", _UNSUPPORTED, "omit it")
