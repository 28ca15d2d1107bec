"""Key types that certmount supports: generated, encoded, loaded and checked."""

from __future__ import annotations

import base64
import subprocess
import time
import traceback
from collections.abc import Callable
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.certificates.keys import encode_key, key_type_of, load_authority_key, load_key, public_bytes
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from tests.support.hostile_csrs import der_value
from tests.support.requirements import openssl_for
from tests.unit.core.pki import OTHER_KEYS, key_of

OPENSSL_SAYS = {
    KeyType.EC_P256: "Private-Key: (256 bit)",
    KeyType.EC_P384: "Private-Key: (384 bit)",
    KeyType.EC_P521: "Private-Key: (521 bit)",
    KeyType.RSA_2048: "Private-Key: (2048 bit",
    KeyType.RSA_3072: "Private-Key: (3072 bit",
    KeyType.RSA_4096: "Private-Key: (4096 bit",
    KeyType.ED25519: "ED25519 Private-Key:",
    **{kind: f"{kind.value} Private-Key:" for kind in KeyType if kind.value.startswith("ML-DSA")},
}


@pytest.mark.parametrize("kind", KeyType)
def test_key_has_the_requested_type_and_is_read_back(kind: KeyType) -> None:
    key = key_of(kind)
    read = load_key(encode_key(key))
    assert key_type_of(read.public_key()) is kind
    assert public_bytes(read.public_key()) == public_bytes(key.public_key())


@pytest.mark.parametrize("kind", KeyType)
def test_openssl_reads_every_key(kind: KeyType) -> None:
    openssl = openssl_for(kind)
    pem = encode_key(key_of(kind)).reveal()
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    printed = subprocess.run([openssl, "pkey", "-check", "-noout", "-text"], input=pem, capture_output=True, check=True)
    assert OPENSSL_SAYS[kind] in printed.stdout.decode()


def test_two_keys_differ() -> None:
    one, other = key_of(KeyType.EC_P256), key_of(KeyType.EC_P256, 1)
    assert public_bytes(one.public_key()) != public_bytes(other.public_key())


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_unsupported_key_type_is_rejected(name: str) -> None:
    key = OTHER_KEYS[name]()
    assert key_type_of(key.public_key()) is None
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(ValueError, match="a private key of"):
        load_key(Secret(pem))


@pytest.mark.parametrize("oid", ["06072a8648ce380401", "06092a864886f70d010301"], ids=["DSA", "DH"])
def test_long_key_of_another_type_is_rejected_before_it_is_parsed(oid: str) -> None:
    """The parser computes the public key, which takes a second for this DSA key, and hours for one of 256 KiB."""
    number = der_value(0x02, b"\x7f" + b"\xff" * 2047)
    algorithm = der_value(0x30, bytes.fromhex(oid), der_value(0x30, *[number] * 3))
    der = der_value(0x30, der_value(0x02, b"\0"), algorithm, der_value(0x04, number))
    pem = b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END PRIVATE KEY-----\n"
    started = time.thread_time()
    with pytest.raises(ValueError, match="a private key of a type that certmount doesn't support"):
        load_key(Secret(pem))
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64, 1000])
@pytest.mark.parametrize("load", [load_key, load_authority_key])
def test_ed25519_key_of_another_length_is_an_invalid_key(load: Callable[[Secret[bytes]], object], length: int) -> None:
    algorithm = der_value(0x30, bytes.fromhex("06032b6570"))
    content = der_value(0x04, der_value(0x04, b"a" * length))
    der = der_value(0x30, der_value(0x02, b"\0"), algorithm, content)
    pem = b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END PRIVATE KEY-----\n"
    with pytest.raises(ValueError, match=r"not an? .*private key in PEM format"):
        load(Secret(pem))


def test_unknown_curve_is_rejected() -> None:
    """OpenSSL supports more curves than cryptography."""
    openssl = openssl_for()
    command = [openssl, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp160r1"]
    pem = subprocess.run(command, capture_output=True, check=True).stdout
    with pytest.raises(ValueError, match="private key"):
        load_key(Secret(pem))


CANARY_KEY = ed25519.Ed25519PrivateKey.from_private_bytes(b"canary-canary-canary-canary-cana")
ENCRYPTED = CANARY_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))


PASSWORDS = [None, Secret(b""), Secret(b"canary-password")]
PEM = b"-----BEGIN %sPRIVATE KEY-----\nAAAA\n-----END %sPRIVATE KEY-----\n"


@given(st.binary(max_size=200), st.integers(0, 500), st.sampled_from(PASSWORDS))
@example(b"", 0, None)
@example(ENCRYPTED, 0, Secret(b"canary-password"))
@example(PEM % (b"", b""), 0, None)
@example(PEM % (b"ENCRYPTED ", b"ENCRYPTED "), 0, Secret(b"password"))
def test_error_of_an_invalid_key_shows_no_secret(noise: bytes, at: int, password: Secret[bytes] | None) -> None:
    whole = encode_key(CANARY_KEY).reveal()
    pem = Secret(noise + b"\x00" + whole[: min(at, len(whole) - 40)])
    load_ca_key = partial(load_authority_key, password=password)
    for load, words in ((load_key, "private key"), (load_ca_key, "^(not a private key|encrypted)")):
        with pytest.raises(ValueError, match=words) as raised:
            load(pem)
        assert whole.splitlines()[1].decode()[24:] not in "".join(traceback.format_exception(raised.value))
        assert "canary-password" not in str(raised.value)


@pytest.mark.parametrize("name", ["ecparam", "genrsa"])
def test_keys_of_older_openssl_commands_are_read(name: str) -> None:
    commands = {"ecparam": ["ecparam", "-genkey", "-name", "prime256v1"], "genrsa": ["genrsa", "-traditional", "2048"]}
    pem = subprocess.run([openssl_for(), *commands[name]], capture_output=True, check=True).stdout
    assert not load_authority_key(Secret(pem)).encrypted
    assert key_type_of(load_key(Secret(pem)).public_key()) is not None


def test_loading_a_key_that_certmount_generated_is_fast() -> None:
    """The validation of an RSA key takes 0.2 s and blocks all threads: the driver loads each key when roots change."""
    pem = encode_key(key_of(KeyType.RSA_4096))
    started = time.thread_time()
    load_key(pem)
    assert time.thread_time() - started < 0.05
