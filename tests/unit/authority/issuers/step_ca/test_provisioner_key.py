"""Loading a provisioner's key, and the tokens that it signs."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from csi_driver.authority.issuers.step_ca.provisioner_key import (
    MAX_ITERATIONS,
    decrypt,
    load_provisioner_key,
    thumbprint,
)
from csi_driver.core.secret import Secret
from tests.support.provisioner_key import JWE, JWK, PASSWORD

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CLAIMS = {
    "iss": "csi", "aud": "https://ca/1.0/sign", "sub": "hello.svc", "sans": ["hello.svc", "spiffe://a/b"],
    "extKeyUsage": ["serverAuth"], "jti": "n-1",
}  # fmt: skip


def load(document: object, password: str | None = None) -> str:
    text = document if isinstance(document, str) else json.dumps(document)
    try:
        return load_provisioner_key(Secret(text.encode()), Secret(password.encode()) if password else None).kid
    except ValueError as problem:
        return str(problem)


def test_key_that_smallstep_encrypted_is_loaded() -> None:
    """In compact and JSON form; a trailing line feed of the password is ignored."""
    parts = dict(zip(("protected", "encrypted_key", "iv", "ciphertext", "tag"), JWE.split("."), strict=True))
    assert load(JWK) == JWK["kid"]
    assert load(JWE, PASSWORD) == load(JWE + "\n", PASSWORD + "\n") == JWK["kid"]
    assert load(json.dumps(parts, indent=2), PASSWORD) == JWK["kid"]
    assert json.loads(decrypt(JWE, Secret(PASSWORD.encode())).reveal()) == JWK


@pytest.mark.parametrize(
    "document,password,problem",
    [
        (JWE, None, "encrypted, and no password is configured"),
        (JWE, "wrong", "encrypted with another password"),
        (JWE[:-4] + "AAAA", PASSWORD, "encrypted with another password"),
        ("a.b.c.d.e", PASSWORD, "not a JWE in compact or flattened JSON form"),
        ("..." + JWE[JWE.rindex(".") :], PASSWORD, "not a JWE with a password"),
        ("", None, "not a JWK: not JSON"),
        ("[]", None, "not a signing JWK"),
        ({"kty": "oct", "k": "AAAA", "kid": "a"}, None, "not a signing JWK"),
        ({name: value for name, value in JWK.items() if name != "d"}, None, "a public JWK; expected a private one"),
        ({name: value for name, value in JWK.items() if name != "kid"}, None, "a JWK without a kid"),
        ({**JWK, "crv": "secp256k1"}, None, "a JWK with an unsupported curve"),
        ({**JWK, "x": "AAAA"}, None, "not a valid JWK: its numbers are not a key"),
    ],
)
def test_error_explains_an_invalid_key_without_showing_it(document: object, password: str | None, problem: str) -> None:
    text = load(document, password)
    assert text.startswith(problem)
    assert JWK["d"] not in text


def header(**changes: object) -> str:
    original = json.loads(base64.urlsafe_b64decode(JWE.split(".")[0] + "=="))
    text = json.dumps({**original, **changes}).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode() + JWE[JWE.index(".") :]


@pytest.mark.parametrize("count", [0, 1, 999, MAX_ITERATIONS + 1, 10**12, "600000", None, 1e6])
def test_number_of_iterations_is_limited(count: object) -> None:
    """The key contains it, and step-ca can publish any key."""
    assert "p2c" in load(header(p2c=count), PASSWORD)


@pytest.mark.parametrize("changes", [{"alg": "dir"}, {"enc": "A128CBC-HS256"}, {"zip": "DEF"}, {"crit": ["b64"]}])
def test_unsupported_algorithms_are_rejected(changes: dict[str, object]) -> None:
    assert "encrypted with an unsupported algorithm" in load(header(**changes), PASSWORD)


def test_thumbprint_is_that_of_the_rfc() -> None:
    """The example of RFC 7638 section 3.1; Smallstep uses the thumbprint as the kid."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMs"
        "tn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn"
        "1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    document = {"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256"}
    assert thumbprint(document) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    assert thumbprint(JWK) == JWK["kid"]
    assert thumbprint({"kty": "EC"}) is thumbprint(None) is None


def test_token_contains_the_granted_names_and_the_hash_of_the_csr() -> None:
    key = load_provisioner_key(Secret(json.dumps(JWK).encode()), None)
    token = key.token(CLAIMS, b"CSR", NOW).reveal()
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "kid": JWK["kid"], "typ": "JWT"}
    options = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}
    payload = jwt.decode(token, jwt.PyJWK(JWK).key, ["ES256"], audience=CLAIMS["aud"], options=options)  # type: ignore[arg-type]  # a plain mapping
    issued_at = int(NOW.timestamp())
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"CSR").digest()).rstrip(b"=").decode()
    times = {"iat": issued_at, "nbf": issued_at, "exp": issued_at + 60}
    assert payload == {**CLAIMS, **times, "cnf": {"x5rt#S256": digest}}


def test_all_key_types_of_step_sign_with_their_own_algorithm() -> None:
    keys = {
        "ES384": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1())),
        "ES512": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP521R1())),
        "RS256": RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048)),
        "EdDSA": OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate()),
    }
    for algorithm, text in keys.items():
        document = {**json.loads(text), "kid": "a"}
        token = load_provisioner_key(Secret(json.dumps(document).encode()), None).token(CLAIMS, b"CSR", NOW).reveal()
        assert jwt.get_unverified_header(token)["alg"] == algorithm
