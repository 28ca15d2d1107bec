"""Verification finds and names every mismatch between a response and its request."""

from __future__ import annotations

from dataclasses import replace
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
    EXPIRED_ROOT,
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
    sent,
    under,
)

# cryptography warns about unusual certificates that it still parses.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@pytest.mark.parametrize("name", GOOD)
def test_valid_response_is_accepted(name: str) -> None:
    response = GOOD[name]
    verified = response.check()
    assert der(*verified.chain) == list(response.chain)
    assert der(*verified.roots) == list(response.roots)
    assert verified.leaf == verified.chain[0]


EXPECTED = ExpectedCertificate(KEY.public_key(), Names(), "web", "edge")


def with_broken_signature(certificate: x509.Certificate) -> bytes:
    encoded = bytearray(der(certificate)[0])
    encoded[-1] ^= 1
    return bytes(encoded)


def named(*texts: str) -> Response:
    return sent(leaf(names=pki.names(*texts)))


def without_request(*texts: str) -> Response:
    return sent(leaf(names=pki.names(SPIFFE, *texts)), Names())


def below(*extensions: x509.ExtensionType, **changes: int | bool | Validity | None) -> Response:
    """Return a response with an intermediate that differs from MIDDLE."""
    return Response(under(middle(*extensions, **changes)))


Texts = tuple[str, ...]
WWW, OTHER_ACCOUNT = "www.example.com", "spiffe://cluster.local/ns/web/sa/other"
WRONG_KEY, NO_ID = "is not the key of the request", "the SPIFFE ID that ends in /ns/web/sa/edge is missing"
EXTRA, NO_NAMES = "names that were not requested: ", "the names of the leaf cannot be parsed"
BROKEN, UNTRUSTED = "chain[0] is not issued by chain[1]", "the chain does not end at a trusted root"
ROOT_INVALID, NOT_DER = "the root of the chain is expired or not valid yet", "chain: a certificate is not valid"
NETWORK = x509.SubjectAlternativeName([x509.IPAddress(ip_network("10.0.0.0/8"))])
LATE_ROOT = pki.authority("root", key=ROOT.key, validity=Validity(start=SECOND)).certificate
LOWER_AUTHORITY = pki.authority("lower", middle(path_length=0), key=LOWER.key)

BAD: dict[str, tuple[Response, str]] = {
    "another key": (sent(pki.leaf(MIDDLE, OTHER_KEY, NAMES)), f"the public key of the leaf {WRONG_KEY}"),
    "a key of another type": (sent(pki.leaf(MIDDLE, key_of(KeyType.ED25519), NAMES)), WRONG_KEY),
    "expired": (sent(leaf(end=-SECOND)), "chain[0] expired at 2026-11-22T09:59:59Z"),
    "expiring now": (sent(leaf(end=timedelta())), "chain[0] expired at 2026-11-22T10:00:00Z"),
    "not yet valid": (
        sent(pki.leaf(MIDDLE, KEY, NAMES, validity=Validity(start=SECOND))),
        "chain[0] is not valid before 2026-11-22T10:00:01Z; compare the clocks of the node and the authority",
    ),
    "missing name": (named(SPIFFE), "missing names: www.example.com"),
    "no names at all": (named(), NO_ID),
    "additional name": (named(WWW, "evil.example", SPIFFE), f"{EXTRA}evil.example"),
    "wildcard instead of a name": (named("*.example.com", SPIFFE), f"{EXTRA}*.example.com"),
    "another account's SPIFFE ID": (named(WWW, OTHER_ACCOUNT), NO_ID),
    "another account's SPIFFE ID in addition": (named(WWW, SPIFFE, OTHER_ACCOUNT), EXTRA + OTHER_ACCOUNT),
    "SPIFFE ID with the same end": (named(WWW, "spiffe://cluster.local/x/ns/web/sa/edge"), NO_ID),
    "the SPIFFE ID with another scheme": (named(WWW, SPIFFE.replace("spiffe", "https")), NO_ID),
    "two trust domains": (named(WWW, SPIFFE, "spiffe://other.example/ns/web/sa/edge"), "more than one SPIFFE ID: "),
    "additional IP address": (named(WWW, SPIFFE, "10.0.0.1"), f"{EXTRA}10.0.0.1"),
    "additional email address": (named(WWW, SPIFFE, "root@example.com"), f"{EXTRA}root@example.com"),
    "no addresses": (sent(leaf(), pki.names(WWW, "10.0.0.1", "a@b.example")), "missing names: 10.0.0.1, a@b.example"),
    "a network of IP addresses": (sent(leaf(names=Names(), extensions=[NETWORK])), NO_NAMES),
    "Service name in addition to a name": (named(WWW, SPIFFE, "shop.web.svc"), f"{EXTRA}shop.web.svc"),
    "another namespace's Service": (without_request("shop.bank.svc"), f"{EXTRA}shop.bank.svc"),
    "wildcard for all Services of the namespace": (without_request("*.web.svc"), f"{EXTRA}*.web.svc"),
    "name similar to a Service name": (without_request("shop.web.svc2.local"), f"{EXTRA}shop.web.svc2.local"),
    "subdomain of a Service name": (without_request("pod.shop.web.svc"), f"{EXTRA}pod.shop.web.svc"),
    "IP address without request": (without_request("10.0.0.1"), f"{EXTRA}10.0.0.1"),
    "names that cannot be parsed": (sent(leaf(names=Names(), extensions=[X400])), NO_NAMES),
    "a CA": (sent(leaf(extensions=[x509.BasicConstraints(ca=True, path_length=None)])), "the leaf is a CA certificate"),
    "CA that cannot sign": (
        sent(leaf(extensions=[x509.BasicConstraints(ca=True, path_length=0), NO_CERT_SIGN])),
        "the leaf is a CA certificate",
    ),
    "unknown critical extension": (
        sent(leaf(extensions=[UNKNOWN])),
        "the leaf has unknown critical extensions: 1.3.6.1.4.1.99999.1",
    ),
    "a broken signature": (Response([with_broken_signature(leaf()), *der(MIDDLE.certificate)]), BROKEN),
    "the intermediate is missing": (Response(under(MIDDLE)[:1]), UNTRUSTED),
    "intermediate with the same name": (Response(der(leaf(), IMPOSTOR.certificate)), BROKEN),
    "the wrong order": (Response(der(leaf(LOWER), MIDDLE.certificate, LOWER.certificate)), BROKEN),
    "leaf last": (Response(under(MIDDLE)[::-1]), WRONG_KEY),
    "certificate after the root": (Response(under(MIDDLE, ROOT, STRANGER)), "chain[2] is not issued by chain[3]"),
    "untrusted root": (Response(under(MIDDLE), der(STRANGER.certificate)), UNTRUSTED),
    "a chain of another authority": (Response(under(IMPOSTOR)), UNTRUSTED),
    "chain includes an untrusted root": (Response(under(IMPOSTOR, STRANGER)), UNTRUSTED),
    "an expired root": (Response(under(MIDDLE), der(EXPIRED_ROOT)), ROOT_INVALID),
    "root that is not valid yet": (Response(under(MIDDLE), der(LATE_ROOT)), ROOT_INVALID),
    "an expired intermediate": (below(validity=Validity(end=-SECOND)), "chain[1] expired at 2026-11-22T09:59:59Z"),
    "intermediate that is not valid yet": (below(validity=Validity(start=SECOND)), "chain[1] is not valid before"),
    "intermediate that is not a CA": (below(ca=False), BROKEN),
    "intermediate that cannot sign": (below(NO_CERT_SIGN), BROKEN),
    "intermediate with unknown critical extension": (below(CA_USAGE, UNKNOWN), BROKEN),
    "intermediate that cannot be parsed": (below(CA_USAGE, X400), BROKEN),
    "an intermediate with another key identifier": (below(CA_USAGE, x509.SubjectKeyIdentifier(b"other")), BROKEN),
    "intermediate below one with path length 0": (
        Response(under(LOWER_AUTHORITY, middle(path_length=0))),
        "chain[1] is not issued by chain[2]",
    ),
    "below a root with path length 0": (Response(under(MIDDLE), der(root_above(0).certificate)), UNTRUSTED),
    "garbage": (Response([b"garbage"]), f"{NOT_DER} X.509 DER"),
    "PEM": (Response([leaf().public_bytes(Encoding.PEM)]), NOT_DER),
    "empty": (Response([b""]), NOT_DER),
    "trailing bytes": (Response([under(MIDDLE)[0] + b"\x00"]), NOT_DER),
    "garbage as root": (Response(under(MIDDLE), [b"garbage"]), "roots: a certificate is not valid"),
    "no certificates": (Response([]), "chain: has 0 certificates; expected 1 to 10"),
    "no roots": (Response(under(MIDDLE), []), "roots: has 0 certificates"),
    "too many certificates": (Response(under(MIDDLE) * 6), "chain: has 12 certificates; expected 1 to 10"),
    "a hundred and one roots": (
        Response(under(MIDDLE), der(ROOT.certificate) * 101),
        "roots: has 101 certificates; expected 1 to 100",
    ),
    "too large": (Response([*under(MIDDLE), bytes(100_000)]), "chain: a certificate has more than"),
}


def rejection(response: Response) -> str:
    with pytest.raises(CertmountError, match=r"^InvalidResponse: ") as raised:
        response.check()
    assert str(raised.value).isprintable()
    return str(raised.value)


@pytest.mark.parametrize("name", BAD)
def test_invalid_response_is_rejected_with_the_problem(name: str) -> None:
    response, words = BAD[name]
    assert words in rejection(response)


def test_all_problems_are_reported_together() -> None:
    wrong = pki.leaf(IMPOSTOR, OTHER_KEY, pki.names("evil.example"), validity=Validity(end=-SECOND))
    text = rejection(Response(der(wrong, MIDDLE.certificate)))
    problems = WRONG_KEY, "the SPIFFE ID that ends in", "missing names: www.example.com", "evil.example", "expired"
    for words in (*problems, "not issued by"):
        assert words in text


def have_same_content(one: x509.Certificate, other: x509.Certificate) -> bool:
    """Compare content and signature, but not the number of unused bits of the signature's BIT STRING."""
    return (one.tbs_certificate_bytes, one.signature) == (other.tbs_certificate_bytes, other.signature)


@pytest.mark.parametrize("position", [0, 1])
def test_flipped_bit_in_the_chain_is_rejected(position: int) -> None:
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
def test_issuer_of_dns_names_can_omit_the_spiffe_id(held: Texts, requested: Texts, problem: str | None) -> None:
    check_identity(held, requested, problem, replace(EXPECTED, identity_optional=True))


@pytest.mark.parametrize(
    "held, requested, problem",
    [
        (("https://a.example/b",), ("https://a.example/b",), None),
        ((SPIFFE,), (SPIFFE,), None),
        (("a.example", SPIFFE), ("a.example",), EXTRA + SPIFFE),
    ],
)
def test_spiffe_id_can_be_omitted(held: Texts, requested: Texts, problem: str | None) -> None:
    check_identity(held, requested, problem, replace(EXPECTED, spiffe=False))


def check_identity(held: Texts, requested: Texts, problem: str | None, like: ExpectedCertificate) -> None:
    chain = der(leaf(names=pki.names(*held)), MIDDLE.certificate)
    expected = replace(like, names=pki.names(*requested))
    result = outcome(lambda: verify_certificate(chain, der(ROOT.certificate), expected, NOW), CertmountError)
    assert (problem in str(result)) if problem else not isinstance(result, CertmountError)


@given(
    st.lists(
        st.one_of(st.binary(max_size=200), st.sampled_from(der(leaf(), MIDDLE.certificate, ROOT.certificate))),
        max_size=11,
    ),
    st.sampled_from(["chain", "roots"]),
)
def test_any_bytes_are_parsed_or_rejected(ders: list[bytes], field: str) -> None:
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
