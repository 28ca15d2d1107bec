"""Verification finds and names every mismatch between a response and its request."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_network

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.certificates.verification import ExpectedCertificate, parse_certificates, verify_certificate
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from tests.unit.core import pki
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import CA_USAGE, NOW, SPIFFE, Validity, der, key_of
from tests.unit.core.responses import (
    GOOD,
    IMPOSTOR,
    KEY,
    LOWER,
    MIDDLE,
    NAMES,
    NO_CERT_SIGN,
    OTHER_KEY,
    ROOT,
    SECOND,
    STRANGER,
    UNKNOWN,
    X400,
    Response,
    leaf,
    middle,
    root_above,
    under,
)

# cryptography warns about unusual certificates that it still parses.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@pytest.mark.parametrize("name", GOOD)
def test_valid_response_is_accepted(name: str) -> None:
    """The result contains the parsed certificates in their order."""
    response = GOOD[name]()
    verified = response.check()
    assert der(*verified.chain) == list(response.chain)
    assert der(*verified.roots) == list(response.roots)
    assert verified.leaf == verified.chain[0]


def with_broken_signature(certificate: x509.Certificate) -> bytes:
    """Return the certificate with the last byte of its signature changed."""
    encoded = bytearray(der(certificate)[0])
    encoded[-1] ^= 1
    return bytes(encoded)


def response_with(names: Names) -> Response:
    return Response(der(leaf(names=names), MIDDLE.certificate))


def without_request(*texts: str) -> Response:
    """Return a response to a request without names."""
    return Response(der(leaf(names=pki.names(SPIFFE, *texts)), MIDDLE.certificate), requested=Names())


BAD: dict[str, tuple[Callable[[], Response], str]] = {
    "another key": (
        lambda: Response(der(pki.leaf(MIDDLE, OTHER_KEY, NAMES), MIDDLE.certificate)),
        "the public key of the leaf is not the key of the request",
    ),
    "a key of another type": (
        lambda: Response(der(pki.leaf(MIDDLE, key_of(KeyType.ED25519), NAMES), MIDDLE.certificate)),
        "is not the key of the request",
    ),
    "expired": (
        lambda: Response(der(leaf(end=-SECOND), MIDDLE.certificate)),
        "chain[0] expired at 2026-11-22T09:59:59Z",
    ),
    "expiring now": (lambda: Response(der(leaf(end=timedelta()), MIDDLE.certificate)), "chain[0] expired at 2026-11-22T10:00:00Z"),
    "not yet valid": (
        lambda: Response(der(pki.leaf(MIDDLE, KEY, NAMES, validity=Validity(start=SECOND)), MIDDLE.certificate)),
        "chain[0] is not valid before 2026-11-22T10:00:01Z; compare the clocks of the node and the authority",
    ),
    "missing name": (lambda: response_with(pki.names(SPIFFE)), "missing names: www.example.com"),
    "no names at all": (lambda: response_with(Names()), "the SPIFFE ID that ends in /ns/web/sa/edge is missing"),
    "additional name": (
        lambda: response_with(pki.names("www.example.com", "evil.example", SPIFFE)),
        "names that were not requested: evil.example",
    ),
    "wildcard instead of a name": (
        lambda: response_with(pki.names("*.example.com", SPIFFE)),
        "names that were not requested: *.example.com",
    ),
    "another account's SPIFFE ID": (
        lambda: response_with(pki.names("www.example.com", "spiffe://cluster.local/ns/web/sa/other")),
        "the SPIFFE ID that ends in /ns/web/sa/edge is missing",
    ),
    "another account's SPIFFE ID in addition": (
        lambda: response_with(pki.names("www.example.com", SPIFFE, "spiffe://cluster.local/ns/web/sa/other")),
        "names that were not requested: spiffe://cluster.local/ns/web/sa/other",
    ),
    "SPIFFE ID with the same end": (
        lambda: response_with(pki.names("www.example.com", "spiffe://cluster.local/x/ns/web/sa/edge")),
        "the SPIFFE ID that ends in /ns/web/sa/edge is missing",
    ),
    "the SPIFFE ID with another scheme": (
        lambda: response_with(pki.names("www.example.com", SPIFFE.replace("spiffe", "https"))),
        "the SPIFFE ID that ends in /ns/web/sa/edge is missing",
    ),
    "two trust domains": (
        lambda: response_with(pki.names("www.example.com", SPIFFE, "spiffe://other.example/ns/web/sa/edge")),
        "more than one SPIFFE ID: ",
    ),
    "additional IP address": (
        lambda: response_with(pki.names("www.example.com", SPIFFE, "10.0.0.1")),
        "names that were not requested: 10.0.0.1",
    ),
    "additional email address": (
        lambda: response_with(pki.names("www.example.com", SPIFFE, "root@example.com")),
        "names that were not requested: root@example.com",
    ),
    "missing addresses": (
        lambda: Response(der(leaf(), MIDDLE.certificate), requested=pki.names("www.example.com", "10.0.0.1", "a@b.example")),
        "missing names: 10.0.0.1, a@b.example",
    ),
    "a network of IP addresses": (
        lambda: Response(der(leaf(names=Names(), extensions=[x509.SubjectAlternativeName([x509.IPAddress(ip_network("10.0.0.0/8"))])]))),
        "the names of the leaf cannot be parsed",
    ),
    "Service name in addition to a name": (
        lambda: response_with(pki.names("www.example.com", SPIFFE, "shop.web.svc")),
        "names that were not requested: shop.web.svc",
    ),
    "another namespace's Service": (lambda: without_request("shop.bank.svc"), "names that were not requested: shop.bank.svc"),
    "wildcard for all Services of the namespace": (lambda: without_request("*.web.svc"), "names that were not requested: *.web.svc"),
    "name similar to a Service name": (lambda: without_request("shop.web.svc2.local"), "names that were not requested: shop.web.svc2.local"),
    "subdomain of a Service name": (lambda: without_request("pod.shop.web.svc"), "names that were not requested: pod.shop.web.svc"),
    "IP address without request": (lambda: without_request("10.0.0.1"), "names that were not requested: 10.0.0.1"),
    "names that cannot be parsed": (lambda: Response(der(leaf(names=Names(), extensions=[X400]))), "the names of the leaf cannot be parsed"),
    "a CA": (
        lambda: Response(der(leaf(extensions=[x509.BasicConstraints(ca=True, path_length=None)]), MIDDLE.certificate)),
        "the leaf is a CA certificate",
    ),
    "CA that cannot sign": (
        lambda: Response(der(leaf(extensions=[x509.BasicConstraints(ca=True, path_length=0), NO_CERT_SIGN]), MIDDLE.certificate)),
        "the leaf is a CA certificate",
    ),
    "unknown critical extension": (
        lambda: Response(der(leaf(extensions=[UNKNOWN]), MIDDLE.certificate)),
        "the leaf has unknown critical extensions: 1.3.6.1.4.1.99999.1",
    ),
    "a broken signature": (
        lambda: Response([with_broken_signature(leaf()), *der(MIDDLE.certificate)]),
        "chain[0] is not issued by chain[1]",
    ),
    "the intermediate is missing": (lambda: Response(under(MIDDLE)[:1]), "the chain does not end at a trusted root"),
    "intermediate with the same name": (
        lambda: Response(der(leaf(), IMPOSTOR.certificate)),
        "chain[0] is not issued by chain[1]",
    ),
    "the wrong order": (
        lambda: Response(der(leaf(LOWER), MIDDLE.certificate, LOWER.certificate)),
        "chain[0] is not issued by chain[1]",
    ),
    "leaf last": (lambda: Response(under(MIDDLE)[::-1]), "is not the key of the request"),
    "certificate after the root": (
        lambda: Response(under(MIDDLE, ROOT, STRANGER)),
        "chain[2] is not issued by chain[3]",
    ),
    "untrusted root": (
        lambda: Response(under(MIDDLE), der(STRANGER.certificate)),
        "the chain does not end at a trusted root",
    ),
    "a chain of another authority": (lambda: Response(under(IMPOSTOR)), "the chain does not end at a trusted root"),
    "chain includes an untrusted root": (lambda: Response(under(IMPOSTOR, STRANGER)), "the chain does not end at a trusted root"),
    "an expired root": (
        lambda: Response(under(MIDDLE), der(pki.authority("root", key=ROOT.key, validity=Validity(end=-SECOND)).certificate)),
        "the root of the chain is expired or not valid yet",
    ),
    "root that is not valid yet": (
        lambda: Response(under(MIDDLE), der(pki.authority("root", key=ROOT.key, validity=Validity(start=SECOND)).certificate)),
        "the root of the chain is expired or not valid yet",
    ),
    "an expired intermediate": (
        lambda: Response(under(middle(validity=Validity(end=-SECOND)))),
        "chain[1] expired at 2026-11-22T09:59:59Z",
    ),
    "intermediate that is not valid yet": (
        lambda: Response(under(middle(validity=Validity(start=SECOND)))),
        "chain[1] is not valid before",
    ),
    "intermediate that is not a CA": (
        lambda: Response(under(middle(ca=False))),
        "chain[0] is not issued by chain[1]",
    ),
    "intermediate that cannot sign": (
        lambda: Response(under(middle(NO_CERT_SIGN))),
        "chain[0] is not issued by chain[1]",
    ),
    "intermediate with unknown critical extension": (
        lambda: Response(under(middle(CA_USAGE, UNKNOWN))),
        "chain[0] is not issued by chain[1]",
    ),
    "intermediate that cannot be parsed": (
        lambda: Response(under(middle(CA_USAGE, X400))),
        "chain[0] is not issued by chain[1]",
    ),
    "an intermediate with another key identifier": (
        lambda: Response(under(middle(CA_USAGE, x509.SubjectKeyIdentifier(b"other")))),
        "chain[0] is not issued by chain[1]",
    ),
    "intermediate below one with path length 0": (
        lambda: Response(under(pki.authority("lower", middle(path_length=0), key=LOWER.key), middle(path_length=0))),
        "chain[1] is not issued by chain[2]",
    ),
    "intermediate below a root with path length 0": (
        lambda: Response(under(MIDDLE), der(root_above(0).certificate)),
        "the chain does not end at a trusted root",
    ),
    "garbage": (lambda: Response([b"garbage"]), "chain: a certificate is not valid X.509 DER"),
    "PEM": (lambda: Response([leaf().public_bytes(Encoding.PEM)]), "chain: a certificate is not valid"),
    "empty": (lambda: Response([b""]), "chain: a certificate is not valid"),
    "trailing bytes": (lambda: Response([under(MIDDLE)[0] + b"\x00"]), "chain: a certificate is not valid"),
    "garbage as root": (lambda: Response(under(MIDDLE), [b"garbage"]), "roots: a certificate is not valid"),
    "no certificates": (lambda: Response([]), "chain: has 0 certificates; expected 1 to 10"),
    "no roots": (lambda: Response(under(MIDDLE), []), "roots: has 0 certificates"),
    "too many certificates": (lambda: Response(under(MIDDLE) * 6), "chain: has 12 certificates; expected 1 to 10"),
    "a hundred and one roots": (
        lambda: Response(under(MIDDLE), der(ROOT.certificate) * 101),
        "roots: has 101 certificates; expected 1 to 100",
    ),
    "too large": (lambda: Response([*under(MIDDLE), bytes(100_000)]), "chain: a certificate has more than"),
}  # fmt: skip


def rejection(response: Response) -> str:
    with pytest.raises(CertmountError) as raised:
        response.check()
    assert raised.value.reason is Reason.INVALID_RESPONSE
    assert str(raised.value).isprintable()
    return str(raised.value)


@pytest.mark.parametrize("name", BAD)
def test_invalid_response_is_rejected_with_the_problem(name: str) -> None:
    """Each single problem is sufficient."""
    make, words = BAD[name]
    assert words in rejection(make())


def test_all_problems_are_reported_together() -> None:
    """Key, names, validity and chain in one error."""
    wrong = pki.leaf(IMPOSTOR, OTHER_KEY, pki.names("evil.example"), validity=Validity(end=-SECOND))
    text = rejection(Response(der(wrong, MIDDLE.certificate)))
    for words in (
        "is not the key of the request",
        "the SPIFFE ID that ends in",
        "missing names: www.example.com",
        "evil.example",
        "expired",
        "not issued by",
    ):
        assert words in text


def have_same_content(one: x509.Certificate, other: x509.Certificate) -> bool:
    """Compare content and signature, but not the number of unused bits of the signature's BIT STRING."""
    return (one.tbs_certificate_bytes, one.signature) == (other.tbs_certificate_bytes, other.signature)


@pytest.mark.parametrize("position", [0, 1])
def test_flipped_bit_in_the_chain_is_rejected(position: int) -> None:
    """A signature covers every bit of the leaf and of the intermediate."""
    good = under(MIDDLE)
    for bit in range(len(good[position]) * 8):
        flipped = bytearray(good[position])
        flipped[bit // 8] ^= 1 << bit % 8
        chain = [bytes(flipped) if index == position else certificate for index, certificate in enumerate(good)]
        verified = outcome(Response(chain).check, CertmountError)
        unchanged = x509.load_der_x509_certificate(good[position])
        assert isinstance(verified, CertmountError) or have_same_content(verified.chain[position], unchanged), bit


def test_flipped_bit_in_a_root_is_rejected_if_the_chain_depends_on_it() -> None:
    """Its name, key and CA flag, for example. The root's own signature, issuer and serial number prove nothing."""
    good = der(ROOT.certificate)[0]
    public_key_bits = len(public_bytes(ROOT.key.public_key())) * 8
    rejected = 0
    for bit in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        result = outcome(Response(under(MIDDLE), [bytes(flipped)]).check, CertmountError)
        if isinstance(result, CertmountError):
            rejected += 1
            continue
        (root,) = result.roots
        assert root.subject == ROOT.certificate.subject, bit
        assert root.public_key() == ROOT.certificate.public_key(), bit
        constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.value.ca, bit
        assert root.not_valid_before_utc <= NOW <= root.not_valid_after_utc, bit
    assert rejected > public_key_bits


@pytest.mark.parametrize(
    "held, requested, problem",
    [
        (("www.example.com",), ("www.example.com",), None),
        (("www.example.com", SPIFFE), ("www.example.com",), None),
        ((), (), "the SPIFFE ID that ends in /ns/web/sa/edge is missing"),
        (("www.web.svc",), (), "the SPIFFE ID that ends in /ns/web/sa/edge is missing"),
        (("www.example.com", "spiffe://cluster.local/ns/web/sa/other"), ("www.example.com",), "not requested"),
        (("www.example.com", "spiffe://cluster.local/ns/other/sa/edge"), ("www.example.com",), "not requested"),
        (("www.example.com", "www.web.svc"), ("www.example.com",), "not requested"),
        (("www.example.com",), ("www.example.com", "two.example.com"), "missing names: two.example.com"),
    ],
)
def test_issuer_of_dns_names_can_omit_the_spiffe_id(
    held: tuple[str, ...], requested: tuple[str, ...], problem: str | None
) -> None:
    """If the request has names, which must match exactly. Another pod's SPIFFE ID is always rejected."""
    chain = der(leaf(MIDDLE, pki.names(*held)), MIDDLE.certificate)
    expected = ExpectedCertificate(KEY.public_key(), pki.names(*requested), "web", "edge", identity_optional=True)
    result = outcome(lambda: verify_certificate(chain, der(ROOT.certificate), expected, NOW), CertmountError)
    if problem is None:
        assert not isinstance(result, CertmountError)
    else:
        assert problem in str(result)


@given(
    st.lists(
        st.one_of(st.binary(max_size=200), st.sampled_from(der(leaf(), MIDDLE.certificate, ROOT.certificate))),
        max_size=11,
    ),
    st.sampled_from(["chain", "roots"]),
)
def test_any_bytes_are_parsed_or_rejected(ders: list[bytes], field: str) -> None:
    """The error names the list."""
    parsed = outcome(lambda: parse_certificates(ders, field), CertmountError)
    if isinstance(parsed, CertmountError):
        assert parsed.reason is Reason.INVALID_RESPONSE
        assert field in str(parsed)
    else:
        assert der(*parsed) == ders


@pytest.mark.parametrize("kind", [KeyType.RSA_4096, KeyType.EC_P256])
def test_largest_certificate_is_accepted(kind: KeyType) -> None:
    """Otherwise a request with a hundred long names could never succeed."""
    requested = pki.names(*pki.LARGEST_DNS, *pki.LARGEST_URIS)
    key = key_of(kind)
    authority = pki.authority("root", key=key)
    certificate = pki.leaf(authority, key, Names.of(requested.dns, [*requested.uris, *pki.names(SPIFFE).uris]))
    expected = ExpectedCertificate(key.public_key(), requested, "web", "edge")
    verify_certificate(der(certificate), der(authority.certificate), expected, NOW)
