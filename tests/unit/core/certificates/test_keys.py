"""Key types that certmount supports: generated, encoded, loaded and checked."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.certificates.keys import encode_key, key_type_of, load_authority_key, load_key, public_bytes
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from tests.support.openssl import openssl_for
from tests.unit.core.pki import key_of

OPENSSL_SAYS = {
    KeyType.EC_P256: "Private-Key: (256 bit)",
    KeyType.EC_P384: "Private-Key: (384 bit)",
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
    """PKCS#8 without a password."""
    openssl = openssl_for(kind)
    pem = encode_key(key_of(kind)).reveal()
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    printed = subprocess.run([openssl, "pkey", "-check", "-noout", "-text"], input=pem, capture_output=True, check=True)
    assert OPENSSL_SAYS[kind] in printed.stdout.decode()


def test_two_keys_differ() -> None:
    one, other = key_of(KeyType.EC_P256), key_of(KeyType.EC_P256, 1)
    assert public_bytes(one.public_key()) != public_bytes(other.public_key())


OTHERS: dict[str, Callable[[], Any]] = {
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "brainpool": lambda: ec.generate_private_key(ec.BrainpoolP256R1()),
    "RSA-1024": lambda: rsa.generate_private_key(65537, 1024),  # noqa: S505  # weak on purpose
    "RSA-2048 with e=3": lambda: rsa.generate_private_key(3, 2048),
    "DSA": lambda: dsa.generate_private_key(2048),
    "Ed448": ed448.Ed448PrivateKey.generate,
    "X25519": x25519.X25519PrivateKey.generate,
}


@pytest.mark.parametrize("name", OTHERS)
def test_unsupported_key_type_is_rejected(name: str) -> None:
    key = OTHERS[name]()
    assert key_type_of(key.public_key()) is None
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(ValueError, match="a private key of"):
        load_key(Secret(pem))


def test_unknown_curve_is_rejected() -> None:
    """OpenSSL supports more curves than cryptography."""
    openssl = openssl_for()
    command = [openssl, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp160r1"]
    pem = subprocess.run(command, capture_output=True, check=True).stdout
    with pytest.raises(ValueError, match="private key"):
        load_key(Secret(pem))


CANARY_KEY = ed25519.Ed25519PrivateKey.from_private_bytes(b"canary-canary-canary-canary-cana")
ENCRYPTED = CANARY_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))


@given(st.binary(max_size=200), st.integers(0, 500))
@example(b"", 0)
@example(ENCRYPTED, 0)
@example(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0)
def test_invalid_key_is_a_value_error_without_its_content(noise: bytes, at: int) -> None:
    whole = encode_key(CANARY_KEY).reveal()
    at = min(at, len(whole) - 40)
    with pytest.raises(ValueError, match="private key") as raised:
        load_key(Secret(noise + b"\x00" + whole[:at]))
    shown = "".join(traceback.format_exception(raised.value))
    assert whole.splitlines()[1].decode()[24:] not in shown


@given(st.binary(max_size=200), st.integers(0, 500), st.sampled_from([None, Secret(b""), Secret(b"canary-password")]))
@example(b"", 0, None)
@example(ENCRYPTED, 0, Secret(b"canary-password"))
@example(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", 0, Secret(b"password"))
def test_invalid_ca_key_is_rejected_without_showing_key_or_password(
    noise: bytes, at: int, password: Secret[bytes] | None
) -> None:
    whole = encode_key(CANARY_KEY).reveal()
    at = min(at, len(whole) - 40)
    with pytest.raises(ValueError, match=r"^(not a private key|encrypted)") as raised:
        load_authority_key(Secret(noise + b"\x00" + whole[:at]), password)
    shown = "".join(traceback.format_exception(raised.value))
    assert whole.splitlines()[1].decode()[24:] not in shown
    assert "canary-password" not in str(raised.value)


@pytest.mark.parametrize("name", ["ecparam", "genrsa"])
def test_keys_of_older_openssl_commands_are_read(name: str) -> None:
    commands = {"ecparam": ["ecparam", "-genkey", "-name", "prime256v1"], "genrsa": ["genrsa", "-traditional", "2048"]}
    pem = subprocess.run([openssl_for(), *commands[name]], capture_output=True, check=True).stdout
    assert not load_authority_key(Secret(pem)).encrypted
