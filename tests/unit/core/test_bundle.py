"""No answer is written that does not fit: each way of being wrong is found and named, and what passes, OpenSSL passes too."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ObjectIdentifier
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from csi_driver.core.bundle import Bundle, Expected, check_answer, parse_certificates
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from tests.support.requirements import require_program
from tests.unit.core import pki
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import CA_USAGE, HOUR, NOW, SPIFFE, Signer, Validity, der, key_of

# The library warns of oddities that it still reads; here warnings are errors otherwise.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

SECOND = timedelta(seconds=1)
KEY, OTHER_KEY = key_of(KeyType.EC_P256), key_of(KeyType.EC_P256, 1)
ROOT = pki.authority("root", key=key_of(KeyType.EC_P256, 2))
MIDDLE = pki.authority("middle", ROOT, key=key_of(KeyType.EC_P256, 3))
LOWER = pki.authority("lower", MIDDLE, key=key_of(KeyType.EC_P256, 4))
STRANGER = pki.authority("root", key=key_of(KeyType.EC_P256, 5))
IMPOSTOR = pki.authority("middle", STRANGER, key=key_of(KeyType.EC_P256, 6))
NAMES = pki.names("www.example.com", SPIFFE)
SIGNS_NOTHING = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
# A name of a kind that the library cannot read: x400Address ([3], RFC 5280 section 4.2.1.6).
X400 = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), b"\x30\x02\xa3\x00")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, what it is to fit, and when."""

    chain: Sequence[bytes]
    roots: Sequence[bytes] = tuple(der(ROOT.certificate))
    asked: Names = pki.names("www.example.com")
    now: datetime = NOW

    def check(self) -> Bundle:
        return check_answer(self.chain, self.roots, Expected(KEY.public_key(), self.asked, "web", "edge"), self.now)


def leaf(
    issuer: Signer = MIDDLE,
    wanted: Names = NAMES,
    *,
    end: timedelta = HOUR,
    extensions: Sequence[x509.ExtensionType] = (),
) -> x509.Certificate:
    return pki.leaf(issuer, KEY, wanted, validity=Validity(end=end), extensions=extensions)


def under(*signers: Signer) -> list[bytes]:
    """A leaf of the first signer, and all of them as its chain."""
    return der(leaf(signers[0]), *(signer.certificate for signer in signers))


def middle(*extensions: x509.ExtensionType, **changes: int | bool | Validity | None) -> Signer:
    """An intermediate that differs from the usual one."""
    return pki.authority("middle", ROOT, key=MIDDLE.key, extensions=extensions or (CA_USAGE,), **changes)  # type: ignore[arg-type]  # each by its name


@functools.cache
def root_above(path_length: int) -> Signer:
    """The root, limited to so many intermediates."""
    return pki.authority("root", key=ROOT.key, path_length=path_length)


GOOD = {
    "leaf under an intermediate": lambda: Answer(under(MIDDLE)),
    "leaf under the root": lambda: Answer(der(leaf(ROOT))),
    "a leaf that says it is no CA": lambda: Answer(
        der(leaf(extensions=[x509.BasicConstraints(ca=False, path_length=None)]), MIDDLE.certificate)
    ),
    "two intermediates": lambda: Answer(under(LOWER, MIDDLE)),
    "the root is sent along": lambda: Answer(under(MIDDLE, ROOT)),
    "one of several roots": lambda: Answer(under(MIDDLE), der(STRANGER.certificate, ROOT.certificate)),
    "ten roots": lambda: Answer(under(MIDDLE), der(ROOT.certificate) * 10),
    "an expired root beside a valid one": lambda: Answer(
        under(MIDDLE),
        der(pki.authority("root", key=ROOT.key, validity=Validity(end=-SECOND)).certificate, ROOT.certificate),
    ),
    "just enough path length": lambda: Answer(under(middle(path_length=0))),
    "just enough path length of the root": lambda: Answer(under(MIDDLE), der(root_above(1).certificate)),
    "the same with the root sent along": lambda: Answer(under(MIDDLE, root_above(1)), der(root_above(1).certificate)),
    "an unknown extension that is not critical": lambda: Answer(
        der(pki.leaf(MIDDLE, KEY, NAMES, extensions=[UNKNOWN], critical=False), MIDDLE.certificate)
    ),
    "only the SPIFFE ID": lambda: Answer(der(leaf(wanted=pki.names(SPIFFE)), MIDDLE.certificate), asked=Names()),
    "the SPIFFE ID asked for": lambda: Answer(der(leaf(), MIDDLE.certificate), asked=NAMES),
    "another trust domain": lambda: Answer(
        der(leaf(wanted=pki.names("spiffe://other.example/ns/web/sa/edge")), MIDDLE.certificate), asked=Names()
    ),
    "the first second": lambda: Answer(under(MIDDLE), now=NOW - HOUR),
    "the last second": lambda: Answer(under(MIDDLE), now=NOW + HOUR - SECOND),
}


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
    "an IP address": (
        lambda: Answer(der(leaf(wanted=Names(), extensions=[x509.SubjectAlternativeName([x509.IPAddress(ip_address("10.0.0.1"))])]))),
        "its names cannot be read",
    ),
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
    "eleven roots": (lambda: Answer(under(MIDDLE), der(ROOT.certificate) * 11), "roots holds 11 certificates"),
    "endless": (lambda: Answer([*under(MIDDLE), bytes(100_000)]), "chain holds a certificate of more than"),
}  # fmt: skip


def refusal(answer: Answer) -> str:
    with pytest.raises(CertmountError) as raised:
        answer.check()
    assert raised.value.reason is Reason.ANSWER_INVALID
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


@given(
    st.lists(
        st.one_of(st.binary(max_size=200), st.sampled_from(der(leaf(), MIDDLE.certificate, ROOT.certificate))),
        max_size=11,
    ),
    st.sampled_from(["chain", "roots"]),
)
def test_garbage_is_one_error(ders: list[bytes], field: str) -> None:
    """Any bytes in any number: parsed as they are, or AnswerInvalid that says which list."""
    parsed = outcome(lambda: parse_certificates(ders, field), CertmountError)
    if isinstance(parsed, CertmountError):
        assert parsed.reason is Reason.ANSWER_INVALID
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
    expected = Expected(key.public_key(), asked, "web", "edge")
    check_answer(der(certificate), der(authority.certificate), expected, NOW)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one authority of a chain is like."""

    ca: bool
    path_length: int | None
    usage: x509.KeyUsage | None
    unknown: bool
    validity: Validity
    kind: KeyType

    def build(self, name: str, parent: Signer | None, number: int) -> Signer:
        extensions: list[x509.ExtensionType] = [self.usage] if self.usage else []
        return pki.authority(
            name,
            parent,
            key=key_of(self.kind, number),
            ca=self.ca,
            path_length=self.path_length if self.ca else None,
            validity=self.validity,
            extensions=[*extensions, *([UNKNOWN] if self.unknown else [])],
        )


def mostly(usual: object, *others: object) -> st.SearchStrategy[object]:
    """The usual one nine times in ten: a chain should fail by one thing at a time."""
    return st.integers(0, 9).flatmap(lambda number: st.sampled_from(others) if number == 9 else st.just(usual))


shapes = st.builds(
    Shape,
    mostly(True, False),
    st.sampled_from([None, None, 0, 1, 2]),
    mostly(CA_USAGE, None, None, SIGNS_NOTHING),
    mostly(False, True),
    mostly(Validity(), Validity(end=timedelta(seconds=-2)), Validity(start=timedelta(seconds=2))),
    st.sampled_from([KeyType.EC_P256, KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_2048]),
)
PLAIN = Shape(True, None, CA_USAGE, False, Validity(), KeyType.EC_P256)


def openssl_verifies(folder: Path, bundle: Bundle, now: datetime) -> bool:
    """True when `openssl verify` finds a way from the leaf to a root at that time."""
    openssl = require_program("openssl")
    for name, certificates in (("roots", bundle.roots), ("chain", bundle.chain[1:]), ("leaf", bundle.chain[:1])):
        pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
        (folder / name).write_bytes(pem)
    command = [openssl, "verify", "-attime", str(int(now.timestamp())), "-no-CApath", "-no-CAstore", "-CAfile", "roots"]
    untrusted = ["-untrusted", "chain"] if len(bundle.chain) > 1 else []
    return subprocess.run([*command, *untrusted, "leaf"], cwd=folder, capture_output=True, check=False).returncode == 0


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(shapes, min_size=1, max_size=4), st.sampled_from([(), (), (UNKNOWN,)]), st.booleans())
@example([PLAIN], (), False)
@example([PLAIN] * 3, (), True)
@example([PLAIN, dataclasses.replace(PLAIN, usage=None)], (), False)
@example([PLAIN, dataclasses.replace(PLAIN, usage=SIGNS_NOTHING)], (), False)
@example([PLAIN, dataclasses.replace(PLAIN, unknown=True)], (), False)
@example([dataclasses.replace(PLAIN, unknown=True), PLAIN], (), False)
@example([dataclasses.replace(PLAIN, path_length=1), PLAIN, PLAIN], (), False)
def test_what_passes_openssl_passes_too(
    tmp_path_factory: pytest.TempPathFactory,
    line: list[Shape],
    extensions: tuple[x509.ExtensionType, ...],
    send_root: bool,
) -> None:
    """Chains of any length and make: none is written that the pod's peers would not believe."""
    signers: list[Signer] = []
    for number, shape in enumerate(line):
        signers.append(shape.build(f"authority {number}", signers[-1] if signers else None, 10 + number))
    certificates = [signer.certificate for signer in reversed(signers)]
    chain = der(leaf(signers[-1], extensions=extensions), *certificates[: None if send_root else -1])
    bundle = outcome(Answer(chain, der(signers[0].certificate)).check, CertmountError)
    event("passes" if isinstance(bundle, Bundle) else "refused")
    if isinstance(bundle, Bundle):
        assert openssl_verifies(tmp_path_factory.mktemp("pki"), bundle, NOW)


@pytest.mark.parametrize("name", GOOD)
def test_good_answers_pass_openssl(name: str, tmp_path: Path) -> None:
    """The examples above too."""
    answer = GOOD[name]()
    assert openssl_verifies(tmp_path, answer.check(), answer.now)
