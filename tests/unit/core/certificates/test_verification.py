"""No answer is written that does not fit: each way of being wrong is found and named."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_network

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.certificates.verification import ExpectedCertificate, parse_certificates, verify_certificate
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from tests.unit.core import pki
from tests.unit.core.answers import (
    GOOD,
    IMPOSTOR,
    KEY,
    LOWER,
    MIDDLE,
    NAMES,
    OTHER_KEY,
    ROOT,
    SECOND,
    SIGNS_NOTHING,
    STRANGER,
    UNKNOWN,
    X400,
    Answer,
    leaf,
    middle,
    root_above,
    under,
)
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import CA_USAGE, NOW, SPIFFE, Validity, der, key_of

# The library warns of oddities that it still reads; here warnings are errors otherwise.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@pytest.mark.parametrize("name", GOOD)
def test_a_good_answer_passes(name: str) -> None:
    """The certificates come back parsed, in their order."""
    answer = GOOD[name]()
    bundle = answer.check()
    assert der(*bundle.chain) == list(answer.chain)
    assert der(*bundle.roots) == list(answer.roots)
    assert bundle.leaf == bundle.chain[0]


def signed_by_nobody(certificate: x509.Certificate) -> bytes:
    """The certificate with the last byte of its signature changed."""
    encoded = bytearray(der(certificate)[0])
    encoded[-1] ^= 1
    return bytes(encoded)


def answer_with(wanted: Names) -> Answer:
    return Answer(der(leaf(wanted=wanted), MIDDLE.certificate))


def unasked(*texts: str) -> Answer:
    """An answer to a pod that named nothing."""
    return Answer(der(leaf(wanted=pki.names(SPIFFE, *texts)), MIDDLE.certificate), asked=Names())


BAD: dict[str, tuple[Callable[[], Answer], str]] = {
    "another key": (
        lambda: Answer(der(pki.leaf(MIDDLE, OTHER_KEY, NAMES), MIDDLE.certificate)),
        "it is for another key than the one made for this volume",
    ),
    "a key of another type": (
        lambda: Answer(der(pki.leaf(MIDDLE, key_of(KeyType.ED25519), NAMES), MIDDLE.certificate)),
        "it is for another key",
    ),
    "expired": (
        lambda: Answer(der(leaf(end=-SECOND), MIDDLE.certificate)),
        "it expired at 2026-11-22T09:59:59Z",
    ),
    "expiring now": (lambda: Answer(der(leaf(end=timedelta()), MIDDLE.certificate)), "it expired at 2026-11-22T10:00:00Z"),
    "not yet valid": (
        lambda: Answer(der(pki.leaf(MIDDLE, KEY, NAMES, validity=Validity(start=SECOND)), MIDDLE.certificate)),
        "it is not valid before 2026-11-22T10:00:01Z; compare the clocks of node and authority",
    ),
    "a name is missing": (lambda: answer_with(pki.names(SPIFFE)), "it lacks www.example.com"),
    "no names at all": (lambda: answer_with(Names()), "it lacks the SPIFFE ID that ends in /ns/web/sa/edge"),
    "a name too many": (
        lambda: answer_with(pki.names("www.example.com", "evil.example", SPIFFE)),
        "it also holds evil.example, which was not asked for",
    ),
    "a wildcard in place of a name": (
        lambda: answer_with(pki.names("*.example.com", SPIFFE)),
        "it also holds *.example.com",
    ),
    "another account's SPIFFE ID": (
        lambda: answer_with(pki.names("www.example.com", "spiffe://cluster.local/ns/web/sa/other")),
        "it lacks the SPIFFE ID that ends in /ns/web/sa/edge",
    ),
    "another account's SPIFFE ID beside the own": (
        lambda: answer_with(pki.names("www.example.com", SPIFFE, "spiffe://cluster.local/ns/web/sa/other")),
        "it also holds spiffe://cluster.local/ns/web/sa/other",
    ),
    "a SPIFFE ID that only ends alike": (
        lambda: answer_with(pki.names("www.example.com", "spiffe://cluster.local/x/ns/web/sa/edge")),
        "it lacks the SPIFFE ID",
    ),
    "the SPIFFE ID with another scheme": (
        lambda: answer_with(pki.names("www.example.com", SPIFFE.replace("spiffe", "https"))),
        "it lacks the SPIFFE ID",
    ),
    "two trust domains": (
        lambda: answer_with(pki.names("www.example.com", SPIFFE, "spiffe://other.example/ns/web/sa/edge")),
        "it holds more than one SPIFFE ID",
    ),
    "an IP address too many": (
        lambda: answer_with(pki.names("www.example.com", SPIFFE, "10.0.0.1")),
        "it also holds 10.0.0.1, which was not asked for",
    ),
    "an e-mail address too many": (
        lambda: answer_with(pki.names("www.example.com", SPIFFE, "root@example.com")),
        "it also holds root@example.com, which was not asked for",
    ),
    "an address is missing": (
        lambda: Answer(der(leaf(), MIDDLE.certificate), asked=pki.names("www.example.com", "10.0.0.1", "a@b.example")),
        "it lacks 10.0.0.1, a@b.example",
    ),
    "a network of IP addresses": (
        lambda: Answer(der(leaf(wanted=Names(), extensions=[x509.SubjectAlternativeName([x509.IPAddress(ip_network("10.0.0.0/8"))])]))),
        "its names cannot be read",
    ),
    "a Service's name beside a name": (
        lambda: answer_with(pki.names("www.example.com", SPIFFE, "shop.web.svc")),
        "it also holds shop.web.svc, which was not asked for",
    ),
    "another namespace's Service": (lambda: unasked("shop.bank.svc"), "it also holds shop.bank.svc"),
    "all Services of the namespace": (lambda: unasked("*.web.svc"), "it also holds *.web.svc"),
    "a name that only looks like a Service's": (lambda: unasked("shop.web.svc2.local"), "it also holds shop.web.svc2.local"),
    "a name below a Service's": (lambda: unasked("pod.shop.web.svc"), "it also holds pod.shop.web.svc"),
    "an IP address that was not asked for": (lambda: unasked("10.0.0.1"), "it also holds 10.0.0.1"),
    "names that can't be read": (lambda: Answer(der(leaf(wanted=Names(), extensions=[X400]))), "its names cannot be read"),
    "a CA": (
        lambda: Answer(der(leaf(extensions=[x509.BasicConstraints(ca=True, path_length=None)]), MIDDLE.certificate)),
        "the leaf is a certificate authority",
    ),
    "a CA that signs nothing": (
        lambda: Answer(der(leaf(extensions=[x509.BasicConstraints(ca=True, path_length=0), SIGNS_NOTHING]), MIDDLE.certificate)),
        "the leaf is a certificate authority",
    ),
    "a critical extension that no one knows": (
        lambda: Answer(der(leaf(extensions=[UNKNOWN]), MIDDLE.certificate)),
        "the leaf has a critical extension that is not known: 1.3.6.1.4.1.99999.1",
    ),
    "a broken signature": (
        lambda: Answer([signed_by_nobody(leaf()), *der(MIDDLE.certificate)]),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "the intermediate is missing": (lambda: Answer(under(MIDDLE)[:1]), "its chain does not end at a trusted root"),
    "an intermediate of the same name": (
        lambda: Answer(der(leaf(), IMPOSTOR.certificate)),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "the wrong order": (
        lambda: Answer(der(leaf(LOWER), MIDDLE.certificate, LOWER.certificate)),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "leaf last": (lambda: Answer(under(MIDDLE)[::-1]), "it is for another key"),
    "something behind the root": (
        lambda: Answer(under(MIDDLE, ROOT, STRANGER)),
        "certificate 2 of the chain is not issued by certificate 3",
    ),
    "a root that isn't trusted": (
        lambda: Answer(under(MIDDLE), der(STRANGER.certificate)),
        "its chain does not end at a trusted root",
    ),
    "a chain of another authority": (lambda: Answer(under(IMPOSTOR)), "its chain does not end at a trusted root"),
    "an untrusted root sent along": (lambda: Answer(under(IMPOSTOR, STRANGER)), "its chain does not end at a trusted root"),
    "an expired root": (
        lambda: Answer(under(MIDDLE), der(pki.authority("root", key=ROOT.key, validity=Validity(end=-SECOND)).certificate)),
        "the root of its chain is not valid now",
    ),
    "a root of tomorrow": (
        lambda: Answer(under(MIDDLE), der(pki.authority("root", key=ROOT.key, validity=Validity(start=SECOND)).certificate)),
        "the root of its chain is not valid now",
    ),
    "an expired intermediate": (
        lambda: Answer(under(middle(validity=Validity(end=-SECOND)))),
        "certificate 1 of its chain expired at 2026-11-22T09:59:59Z",
    ),
    "an intermediate of tomorrow": (
        lambda: Answer(under(middle(validity=Validity(start=SECOND)))),
        "certificate 1 of its chain is not valid before",
    ),
    "an intermediate that is no CA": (
        lambda: Answer(under(middle(ca=False))),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "an intermediate that may not sign": (
        lambda: Answer(under(middle(SIGNS_NOTHING))),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "an intermediate with a critical extension that no one knows": (
        lambda: Answer(under(middle(CA_USAGE, UNKNOWN))),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "an intermediate that can't be read": (
        lambda: Answer(under(middle(CA_USAGE, X400))),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "an intermediate with another key identifier": (
        lambda: Answer(under(middle(CA_USAGE, x509.SubjectKeyIdentifier(b"other")))),
        "certificate 0 of the chain is not issued by certificate 1",
    ),
    "an intermediate below one that allows none": (
        lambda: Answer(under(pki.authority("lower", middle(path_length=0), key=LOWER.key), middle(path_length=0))),
        "certificate 1 of the chain is not issued by certificate 2",
    ),
    "an intermediate below a root that allows none": (
        lambda: Answer(under(MIDDLE), der(root_above(0).certificate)),
        "its chain does not end at a trusted root",
    ),
    "garbage": (lambda: Answer([b"garbage"]), "chain does not parse as X.509 in DER"),
    "PEM": (lambda: Answer([leaf().public_bytes(Encoding.PEM)]), "chain does not parse"),
    "nothing in it": (lambda: Answer([b""]), "chain does not parse"),
    "something behind it": (lambda: Answer([under(MIDDLE)[0] + b"\x00"]), "chain does not parse"),
    "garbage as root": (lambda: Answer(under(MIDDLE), [b"garbage"]), "roots does not parse"),
    "no certificates": (lambda: Answer([]), "chain holds 0 certificates; expected were 1 to 10"),
    "no roots": (lambda: Answer(under(MIDDLE), []), "roots holds 0 certificates"),
    "too many certificates": (lambda: Answer(under(MIDDLE) * 6), "chain holds 12 certificates; expected were 1 to 10"),
    "a hundred and one roots": (
        lambda: Answer(under(MIDDLE), der(ROOT.certificate) * 101),
        "roots holds 101 certificates; expected were 1 to 100",
    ),
    "endless": (lambda: Answer([*under(MIDDLE), bytes(100_000)]), "chain holds a certificate of more than"),
}  # fmt: skip


def refusal(answer: Answer) -> str:
    with pytest.raises(CertmountError) as raised:
        answer.check()
    assert raised.value.reason is Reason.INVALID_RESPONSE
    assert str(raised.value).isprintable()
    return str(raised.value)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_refused_with_what_is_wrong(name: str) -> None:
    """Each single fault alone is enough, and is called by its name."""
    make, words = BAD[name]
    assert words in refusal(make())


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """Key, names, time and chain in one error, for whoever looks after the issuer."""
    wrong = pki.leaf(IMPOSTOR, OTHER_KEY, pki.names("evil.example"), validity=Validity(end=-SECOND))
    text = refusal(Answer(der(wrong, MIDDLE.certificate)))
    for words in (
        "another key",
        "lacks the SPIFFE ID",
        "lacks www.example.com",
        "evil.example",
        "expired",
        "not issued by",
    ):
        assert words in text


def says_the_same(one: x509.Certificate, other: x509.Certificate) -> bool:
    """True when content and signature are equal: the number of unused bits of the signature's BIT STRING is under none."""
    return (one.tbs_certificate_bytes, one.signature) == (other.tbs_certificate_bytes, other.signature)


@pytest.mark.parametrize("position", [0, 1])
def test_no_flipped_bit_goes_unnoticed(position: int) -> None:
    """Leaf and intermediate are under a signature to their last bit: one that differs anywhere is refused, never a crash."""
    good = under(MIDDLE)
    for bit in range(len(good[position]) * 8):
        flipped = bytearray(good[position])
        flipped[bit // 8] ^= 1 << bit % 8
        chain = [bytes(flipped) if index == position else certificate for index, certificate in enumerate(good)]
        bundle = outcome(Answer(chain).check, CertmountError)
        unchanged = x509.load_der_x509_certificate(good[position])
        assert isinstance(bundle, CertmountError) or says_the_same(bundle.chain[position], unchanged), bit


def test_a_flipped_bit_in_a_root_is_never_a_crash() -> None:
    """A root's own signature is no one's proof; all its other bits must fit or it is refused."""
    good = bytearray(der(ROOT.certificate)[0])
    for bit in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        outcome(Answer(under(MIDDLE), [bytes(flipped)]).check, CertmountError)


@pytest.mark.parametrize(
    "held, asked, problem",
    [
        (("www.example.com",), ("www.example.com",), None),
        (("www.example.com", SPIFFE), ("www.example.com",), None),
        ((), (), "it lacks the SPIFFE ID"),
        (("www.web.svc",), (), "it lacks the SPIFFE ID"),
        (("www.example.com", "spiffe://cluster.local/ns/web/sa/other"), ("www.example.com",), "was not asked for"),
        (("www.example.com", "spiffe://cluster.local/ns/other/sa/edge"), ("www.example.com",), "was not asked for"),
        (("www.example.com", "www.web.svc"), ("www.example.com",), "was not asked for"),
        (("www.example.com",), ("www.example.com", "two.example.com"), "it lacks two.example.com"),
    ],
)
def test_an_issuer_of_dns_names_may_leave_the_spiffe_id_away(
    held: tuple[str, ...], asked: tuple[str, ...], problem: str | None
) -> None:
    """Where it was asked for names, and for these exactly; nobody else's SPIFFE ID is ever taken."""
    chain = der(leaf(MIDDLE, pki.names(*held)), MIDDLE.certificate)
    expected = ExpectedCertificate(KEY.public_key(), pki.names(*asked), "web", "edge", identity_optional=True)
    told = outcome(lambda: verify_certificate(chain, der(ROOT.certificate), expected, NOW), CertmountError)
    if problem is None:
        assert not isinstance(told, CertmountError)
    else:
        assert problem in str(told)


@given(
    st.lists(
        st.one_of(st.binary(max_size=200), st.sampled_from(der(leaf(), MIDDLE.certificate, ROOT.certificate))),
        max_size=11,
    ),
    st.sampled_from(["chain", "roots"]),
)
def test_garbage_is_one_error(ders: list[bytes], field: str) -> None:
    """Any bytes in any number: parsed as they are, or InvalidResponse that says which list."""
    parsed = outcome(lambda: parse_certificates(ders, field), CertmountError)
    if isinstance(parsed, CertmountError):
        assert parsed.reason is Reason.INVALID_RESPONSE
        assert field in str(parsed)
    else:
        assert der(*parsed) == ders


@pytest.mark.parametrize("kind", [KeyType.RSA_4096, KeyType.EC_P256])
def test_the_largest_certificate_that_can_be_asked_for_passes(kind: KeyType) -> None:
    """A hundred names as long as attributes let them be do not end as an answer that is refused for ever."""
    asked = pki.names(*pki.LARGEST_DNS, *pki.LARGEST_URIS)
    key = key_of(kind)
    authority = pki.authority("root", key=key)
    certificate = pki.leaf(authority, key, Names.of(asked.dns, [*asked.uris, *pki.names(SPIFFE).uris]))
    expected = ExpectedCertificate(key.public_key(), asked, "web", "edge")
    verify_certificate(der(certificate), der(authority.certificate), expected, NOW)
