"""The key of a JWK provisioner, and its tokens."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from csi_driver.authority.issuers.step_ca import key_encryption as jwe
from csi_driver.authority.issuers.step_ca.provisioner_key import Claims, load_provisioner_key, thumbprint
from csi_driver.core.secret import Secret
from tests.support.provisioner_key import JWE, JWK, PASSWORD

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CLAIMS = Claims(
    "csi", "https://ca/1.0/sign", "hello.svc", ("hello.svc", "spiffe://a/b"), ("serverAuth",), b"CSR", "n-1"
)


def load(document: object, password: str | None = None) -> str:
    """The kid of what is loaded, or the problem."""
    text = document if isinstance(document, str) else json.dumps(document)
    try:
        return load_provisioner_key(Secret(text.encode()), Secret(password.encode()) if password else None).kid
    except ValueError as problem:
        return str(problem)


def test_a_key_made_and_encrypted_by_smallstep_is_read() -> None:
    """In both forms of a JWE; a line feed after the password, as editors leave it, does no harm."""
    parts = dict(zip(("protected", "encrypted_key", "iv", "ciphertext", "tag"), JWE.split("."), strict=True))
    assert load(JWK) == JWK["kid"]
    assert load(JWE, PASSWORD) == load(JWE + "\n", PASSWORD + "\n") == JWK["kid"]
    assert load(json.dumps(parts, indent=2), PASSWORD) == JWK["kid"]
    assert json.loads(jwe.decrypt(JWE, Secret(PASSWORD.encode())).reveal()) == JWK


@pytest.mark.parametrize(
    "document,password,problem",
    [
        (JWE, None, "encrypted, and there is no password for it"),
        (JWE, "wrong", "encrypted with another password than the one given"),
        (JWE[:-4] + "AAAA", PASSWORD, "encrypted with another password than the one given"),
        ("a.b.c.d.e", PASSWORD, "not a JWE in compact or flattened JSON form"),
        ("..." + JWE[JWE.rindex(".") :], PASSWORD, "not a JWE under a password"),
        ("", None, "not a JWK: it is no JSON"),
        ("[]", None, "not a JWK of a kind that signs"),
        ({"kty": "oct", "k": "AAAA", "kid": "a"}, None, "not a JWK of a kind that signs"),
        ({name: value for name, value in JWK.items() if name != "d"}, None, "a public JWK; the private one is needed"),
        ({name: value for name, value in JWK.items() if name != "kid"}, None, "a JWK without a kid"),
        ({**JWK, "crv": "secp256k1"}, None, "a JWK of another curve"),
        ({**JWK, "x": "AAAA"}, None, "not a JWK whose numbers make a key"),
    ],
)
def test_what_is_no_key_is_told_in_words(document: object, password: str | None, problem: str) -> None:
    """And never shown."""
    said = load(document, password)
    assert said.startswith(problem)
    assert JWK["d"] not in said


def header(**changes: object) -> str:
    usual = json.loads(base64.urlsafe_b64decode(JWE.split(".")[0] + "=="))
    text = json.dumps({**usual, **changes}).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode() + JWE[JWE.index(".") :]


@pytest.mark.parametrize("count", [0, 1, 999, jwe.MOST_ITERATIONS + 1, 10**12, "600000", None, 1e6])
def test_a_count_of_iterations_that_would_take_forever_is_refused(count: object) -> None:
    """It comes with the key, which step-ca may hand out: nobody else decides how long the authority computes."""
    assert "p2c" in load(header(p2c=count), PASSWORD)


@pytest.mark.parametrize("changes", [{"alg": "dir"}, {"enc": "A128CBC-HS256"}, {"zip": "DEF"}, {"crit": ["b64"]}])
def test_other_encryptions_are_named(changes: dict[str, object]) -> None:
    """Instead of a failure deep inside."""
    assert "encrypted in another way than step does it" in load(header(**changes), PASSWORD)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: base64.b64encode(raw).decode()))
def test_any_text_ends_in_a_problem(text: str) -> None:
    """No input raises anything but ValueError."""
    assert load(text, PASSWORD)
    assert load(f"{text}.{text}.{text}.{text}.{text}", PASSWORD)


def test_the_thumbprint_is_that_of_the_rfc() -> None:
    """The example of RFC 7638 section 3.1; and Smallstep's kid is the thumbprint."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMs"
        "tn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn"
        "1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    assert thumbprint({"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256"}) == (
        "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    )
    assert thumbprint(JWK) == JWK["kid"]
    assert thumbprint({"kty": "EC"}) is thumbprint(None) is None


def test_a_token_says_what_was_granted_and_is_bound_to_the_request() -> None:
    """Names exact, one minute, one request, one provisioner."""
    key = load_provisioner_key(Secret(json.dumps(JWK).encode()), None)
    token = key.token(CLAIMS, NOW).reveal()
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "kid": JWK["kid"], "typ": "JWT"}
    options = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}
    payload = jwt.decode(token, jwt.PyJWK(JWK).key, ["ES256"], audience=CLAIMS.audience, options=options)  # type: ignore[arg-type]  # a plain mapping
    started = int(NOW.timestamp())
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"CSR").digest()).rstrip(b"=").decode()
    assert payload == {
        "iss": "csi",
        "aud": "https://ca/1.0/sign",
        "sub": "hello.svc",
        "sans": ["hello.svc", "spiffe://a/b"],
        "extKeyUsage": ["serverAuth"],
        "jti": "n-1",
        "iat": started,
        "nbf": started,
        "exp": started + 60,
        "cnf": {"x5rt#S256": digest},
    }


def test_every_kind_of_key_that_step_makes_signs() -> None:
    """EC, RSA and Ed25519, each by its own algorithm."""
    made = {
        "ES384": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1())),
        "ES512": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP521R1())),
        "RS256": RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048)),
        "EdDSA": OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate()),
    }
    for algorithm, text in made.items():
        document = {**json.loads(text), "kid": "a"}
        token = load_provisioner_key(Secret(json.dumps(document).encode()), None).token(CLAIMS, NOW).reveal()
        assert jwt.get_unverified_header(token)["alg"] == algorithm
