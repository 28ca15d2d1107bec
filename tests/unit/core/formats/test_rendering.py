"""Any valid volume has files that parse, and that all represent the same key, certificates and roots."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from datetime import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key, pkcs12
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.file_format import KeyEncoding, StorePassword, VolumeContents
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.formats.registry import FORMATS, PRESETS
from csi_driver.core.formats.stored_contents import MAX_STORED_BYTES, decode_contents, encode_contents
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from tests.unit.core import pki
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import key_of

ROOTS = tuple(pki.authority(name, key=key_of(KeyType.EC_P256, number)) for number, name in enumerate(["one", "two"]))
MIDDLE = pki.authority("middle", ROOTS[0], key=key_of(KeyType.EC_P256, 2))
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=128)


ENCODINGS = {"RS": ["pkcs1"], "EC": ["sec1"]}
"""By the first letters of a key type: its encodings other than PKCS#8."""
FIRST_LINES = {
    KeyEncoding.PKCS8: b"-----BEGIN PRIVATE KEY-----",
    KeyEncoding.PKCS1: b"-----BEGIN RSA PRIVATE KEY-----",
    KeyEncoding.SEC1: b"-----BEGIN EC PRIVATE KEY-----",
}


@functools.cache
def leaf_of(kind: KeyType) -> x509.Certificate:
    return pki.leaf(MIDDLE, key_of(kind), pki.names("localhost", pki.SPIFFE))


def contents_of(kind: KeyType, roots: int = 1, password: str = "", *, generated: bool = False) -> VolumeContents:
    store_password = StorePassword(Secret(password.encode()), generated) if password else None
    trusted = tuple(root.certificate for root in ROOTS[:roots])
    return VolumeContents(key_of(kind), (leaf_of(kind), MIDDLE.certificate), trusted, store_password, 1_800_000_000.5)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[FileLayout, KeyType]:
    """Return a valid layout, and the key type of its volume."""
    kind = draw(st.sampled_from(KeyType))
    preset = draw(st.sampled_from([name for name in PRESETS if name != "java" or not kind.value.startswith("ML-DSA")]))
    more = draw(st.sets(st.sampled_from([each.attribute for each in FORMATS])))
    attributes = {
        "files": preset,
        "key-type": kind.value,
        **{name: f"{name}.{draw(st.integers(0, 9))}" for name in more},
    }
    encoding = {"key-encoding": draw(st.sampled_from(["pkcs8", *ENCODINGS.get(kind.value[:2], [])]))}
    if encryption := draw(st.sampled_from(["", "modern", "legacy"])):
        attributes["pkcs12-encryption"] = encryption
    spec = outcome(lambda: parse_attributes({**attributes, **encoding}), CertmountError)
    if isinstance(spec, CertmountError):
        spec = parse_attributes({"files": preset, "key-type": kind.value, **encoding})
    return spec.layout, kind


@given(layouts(), st.integers(1, 2), PRINTABLE, st.booleans())
def test_all_files_parse_and_match(
    chosen: tuple[FileLayout, KeyType], roots: int, password: str, generated: bool
) -> None:
    layout, kind = chosen
    contents = contents_of(kind, roots, password if layout.has_stores else "", generated=generated)
    rendered = layout.render(contents)
    files = {file.name: file.content.reveal() for file in rendered}
    assert len(files) == len(rendered)
    expected = set(layout.names.values()) | {"generation.json"}
    without_password = {layout.names["password-file"]} if layout.has_stores and not generated else set()
    assert files.keys() == expected - without_password
    for attribute, name in layout.names.items():
        if name in files:
            CHECKS[attribute](files[name], contents)
            if attribute in ("key-file", "bundle-file"):
                assert files[name].startswith(FIRST_LINES[layout.options.key_encoding])
    assert {file.name for file in rendered if file.private} == {
        layout.names[each.attribute] for each in FORMATS if each.private and layout.names.get(each.attribute) in files
    }


def check_chain(content: bytes, contents: VolumeContents) -> None:
    assert x509.load_pem_x509_certificates(content) == list(contents.chain)


def check_key(content: bytes, contents: VolumeContents) -> None:
    check_private_key(load_pem_private_key(content, None), contents)


def check_private_key(key: object, contents: VolumeContents) -> None:
    expected = contents.key
    assert expected is not None
    assert isinstance(key, type(expected))
    assert public_bytes(key.public_key()) == public_bytes(contents.chain[0].public_key())  # type: ignore[arg-type]  # of a supported type


def check_roots(content: bytes, contents: VolumeContents) -> None:
    assert x509.load_pem_x509_certificates(content) == list(contents.roots)


def check_bundle(content: bytes, contents: VolumeContents) -> None:
    check_chain(content, contents)
    check_key(content, contents)


def check_key_store(content: bytes, contents: VolumeContents) -> None:
    assert contents.password is not None
    store = pkcs12.load_pkcs12(content, contents.password.value.reveal())
    check_private_key(store.key, contents)
    assert store.cert is not None
    assert (store.cert.certificate, *(each.certificate for each in store.additional_certs)) == contents.chain


def check_trust_store(content: bytes, contents: VolumeContents) -> None:
    assert contents.password is not None
    store = pkcs12.load_pkcs12(content, contents.password.value.reveal())
    assert (store.key, store.cert) == (None, None)
    assert tuple(each.certificate for each in store.additional_certs) == contents.roots
    assert [each.friendly_name for each in store.additional_certs] == [b"root-1", b"root-2"][: len(contents.roots)]


def check_password(content: bytes, contents: VolumeContents) -> None:
    assert contents.password is not None
    assert content == contents.password.value.reveal()


def check_leaf(content: bytes, contents: VolumeContents) -> None:
    assert x509.load_der_x509_certificate(content) == contents.chain[0]


def check_der_key(content: bytes, contents: VolumeContents) -> None:
    check_private_key(load_der_private_key(content, None), contents)


CHECKS = {
    "certificate-file": check_chain,
    "key-file": check_key,
    "ca-file": check_roots,
    "bundle-file": check_bundle,
    "keystore-file": check_key_store,
    "truststore-file": check_trust_store,
    "password-file": check_password,
    "certificate-der-file": check_leaf,
    "key-der-file": check_der_key,
}


def test_every_format_is_checked() -> None:
    assert CHECKS.keys() == {each.attribute for each in FORMATS}


def test_summary() -> None:
    contents = contents_of(KeyType.EC_P256, roots=2)
    (summary,) = [file for file in FileLayout().render(contents) if file.name == "generation.json"]
    leaf = contents.chain[0]
    assert json.loads(summary.content.reveal()) == {
        "serial": f"{leaf.serial_number:x}",
        "not_before": f"{leaf.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
        "not_after": f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "renew_at": "2027-01-15T08:00:00Z",
        "issuer": "CN=middle",
        "sha256": leaf.fingerprint(SHA256()).hex(),
        "roots_sha256": [root.fingerprint(SHA256()).hex() for root in contents.roots],
    }
    assert datetime.fromisoformat("2027-01-15T08:00:00+00:00").timestamp() == 1_800_000_000


@given(st.sampled_from(KeyType), st.integers(1, 2), st.one_of(st.just(""), PRINTABLE), st.booleans())
def test_stored_contents_round_trip(kind: KeyType, roots: int, password: str, generated: bool) -> None:
    contents = contents_of(kind, roots, password, generated=generated)
    found = decode_contents(encode_contents(contents))
    assert replace(found, key=None) == replace(contents, key=None)
    assert found.key is not None
    check_private_key(found.key, contents)
    without = replace(contents, key=None, chain=())
    assert decode_contents(encode_contents(without)) == without


@given(st.binary(max_size=300))
def test_other_bytes_are_not_stored_contents(content: bytes) -> None:
    assert isinstance(outcome(lambda: decode_contents(Secret(content)), ValueError), ValueError)


def test_larger_contents_are_not_parsed() -> None:
    with pytest.raises(ValueError, match="bytes long"):
        decode_contents(Secret(b" " * (MAX_STORED_BYTES + 1)))


def test_nothing_shows_the_password_or_the_key() -> None:
    contents = contents_of(KeyType.EC_P256, password="canary", generated=True)
    assert "canary" not in repr(contents) + repr(FileLayout().render(contents)) + repr(encode_contents(contents))
