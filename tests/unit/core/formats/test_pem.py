"""OpenSSL and Python's ssl module read the PEM files of a volume."""

from __future__ import annotations

import functools
import ssl
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.certificates.keys import PrivateKey, encode_key
from csi_driver.core.formats.file_format import FileOptions, KeyEncoding, RenderedFile, VolumeContents
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.formats.pem import decode_certificates, encode_certificates, fingerprint
from csi_driver.core.spec import KeyType
from tests.support.requirements import openssl_for
from tests.unit.core import pki
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import key_of

# cryptography warns about unusual certificates that it still parses.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

# Python's ssl module always uses the time of the machine.
LONG = pki.Validity(start=-timedelta(days=3650), end=timedelta(days=36_500))
ROOTS = [
    pki.authority(name, key=key_of(KeyType.EC_P256, number), validity=LONG)
    for number, name in enumerate(["root", "next root"])
]
MIDDLE = pki.authority("middle", ROOTS[0], key=key_of(KeyType.EC_P256, 2), validity=LONG)


def test_certificate_with_an_unreadable_name_is_rejected_when_it_is_parsed() -> None:
    """The names of a certificate are otherwise parsed only when they are read."""
    der = MIDDLE.certificate.public_bytes(Encoding.DER)
    for name in (b"middle", b"root"):
        wrong = x509.load_der_x509_certificate(der.replace(name, b"\xff" * len(name)))
        with pytest.raises(ValueError, match="not certificates in PEM"):
            decode_certificates(wrong.public_bytes(Encoding.PEM))


@functools.cache
def files_of(kind: KeyType) -> dict[str, RenderedFile]:
    leaf = pki.leaf(MIDDLE, key_of(kind), pki.names("localhost", pki.SPIFFE), validity=LONG)
    roots = tuple(root.certificate for root in ROOTS)
    rendered = FileLayout().render(VolumeContents(key_of(kind), (leaf, MIDDLE.certificate), roots))
    return {file.name: file for file in rendered}


def content(kind: KeyType, name: str) -> bytes:
    return files_of(kind)[name].content.reveal()


def openssl(*arguments: str, stdin: bytes, kind: KeyType = KeyType.EC_P256) -> bytes:
    command = [openssl_for(kind), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


def public_key(key: PrivateKey, kind: KeyType) -> bytes:
    return openssl("pkey", "-pubout", stdin=encode_key(key).reveal(), kind=kind)


def test_pem_files_and_their_privacy() -> None:
    private = {name: file.private for name, file in files_of(KeyType.EC_P256).items()}
    assert private == {
        "root.crt": False,
        "site.crt": False,
        "site.key": True,
        "site.pem": True,
        "generation.json": False,
    }


@pytest.mark.parametrize(
    "encoding, kind, label",
    [
        (KeyEncoding.PKCS8, KeyType.EC_P384, "PRIVATE KEY"),
        (KeyEncoding.PKCS1, KeyType.RSA_2048, "RSA PRIVATE KEY"),
        (KeyEncoding.SEC1, KeyType.EC_P256, "EC PRIVATE KEY"),
        (KeyEncoding.SEC1, KeyType.EC_P521, "EC PRIVATE KEY"),
    ],
)
def test_openssl_reads_each_encoding_of_a_key(encoding: KeyEncoding, kind: KeyType, label: str) -> None:
    layout = FileLayout({"key-file": "key.pem", "key-der-file": "key.der"}, FileOptions(key_encoding=encoding))
    rendered = {file.name: file.content.reveal() for file in layout.render(VolumeContents(key_of(kind), (), ()))}
    assert rendered["key.pem"].startswith(f"-----BEGIN {label}-----\n".encode())
    expected = public_key(key_of(kind), kind)
    assert openssl("pkey", "-pubout", stdin=rendered["key.pem"], kind=kind) == expected
    assert openssl("pkey", "-pubout", "-inform", "DER", stdin=rendered["key.der"], kind=kind) == expected


def test_chain_starts_with_the_leaf() -> None:
    """As TLS servers send it (RFC 8446 section 4.4.2). root.crt contains all roots."""
    kind = KeyType.EC_P256
    leaf, middle = decode_certificates(content(kind, "site.crt"))
    assert middle == MIDDLE.certificate
    assert leaf.issuer == middle.subject
    assert decode_certificates(content(kind, "root.crt")) == [root.certificate for root in ROOTS]


def test_site_pem_is_the_key_followed_by_the_chain() -> None:
    """One read returns a matching pair."""
    for kind in KeyType:
        assert content(kind, "site.pem") == content(kind, "site.key") + content(kind, "site.crt")


@pytest.mark.parametrize("kind", KeyType)
def test_openssl_reads_every_file(kind: KeyType) -> None:
    expected = public_key(key_of(kind), kind)
    assert openssl("pkey", "-pubout", stdin=content(kind, "site.key")) == expected
    assert openssl("pkey", "-pubout", stdin=content(kind, "site.pem")) == expected
    for name in ("site.crt", "site.pem"):
        assert openssl("x509", "-noout", "-pubkey", stdin=content(kind, name)) == expected
        names = openssl("x509", "-noout", "-ext", "subjectAltName", stdin=content(kind, name))
        assert f"DNS:localhost, URI:{pki.SPIFFE}".encode() in names
    subject = openssl("x509", "-noout", "-subject", "-nameopt", "RFC2253", stdin=content(kind, "root.crt"))
    assert subject.strip() == b"subject=CN=root"


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    waiting = set(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.discard(end)
    assert not waiting
    return ends


@pytest.mark.parametrize("kind", KeyType)
def test_python_completes_a_mutual_tls_handshake(kind: KeyType, tmp_path: Path) -> None:
    if kind.value.startswith("ML-DSA") and ssl.OPENSSL_VERSION_INFO < (3, 5):
        pytest.skip("needs a Python with OpenSSL 3.5 or newer for ML-DSA")
    for name in files_of(kind):
        (tmp_path / name).write_bytes(content(kind, name))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "root.crt"))
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(tmp_path / "site.pem")
    client = ssl.create_default_context(cafile=str(tmp_path / "root.crt"))
    client.load_cert_chain(tmp_path / "site.crt", tmp_path / "site.key")
    for end in handshake(server, client):
        assert end.getpeercert()["subjectAltName"] == (("DNS", "localhost"), ("URI", pki.SPIFFE))  # type: ignore[index]  # there is one


@given(st.lists(st.sampled_from([MIDDLE, *ROOTS]), min_size=1, max_size=5))
def test_certificates_round_trip(signers: list[pki.Signer]) -> None:
    certificates = [signer.certificate for signer in signers]
    assert decode_certificates(encode_certificates(certificates)) == certificates


def test_malformed_pem_raises_value_error() -> None:
    for other in (b"", b"garbage", encode_key(key_of(KeyType.EC_P256)).reveal()):
        with pytest.raises(ValueError, match=r"."):
            decode_certificates(other)
    good = MIDDLE.certificate.public_bytes(Encoding.DER)
    for bit in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        pem = ssl.DER_cert_to_PEM_cert(bytes(flipped)).encode()
        result = outcome(functools.partial(decode_certificates, pem), ValueError)
        assert isinstance(result, ValueError) or all(isinstance(one, x509.Certificate) for one in result)


def test_fingerprint_is_what_openssl_prints() -> None:
    pem = encode_certificates([ROOTS[0].certificate])
    printed = openssl("x509", "-noout", "-fingerprint", "-sha256", stdin=pem).decode().strip()
    assert fingerprint(ROOTS[0].certificate) == "SHA256:" + printed.partition("=")[2]
