"""The fast verification accepts no token that PyJWT rejects, finds the same claims, and handles the usual tokens."""

from __future__ import annotations

import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_driver import POD_AUDIENCE
from csi_driver.authority.authn.common_tokens import common_claims
from csi_driver.authority.authn.token_verifier import decode
from tests.support.tokens import Pod, TokenIssuer
from tests.unit.authority.authn.test_token_verifier import encode, urlsafe

RSA = TokenIssuer()
EC = RSA.rotated("key-2")
KEYS = {one.key_id: jwt.PyJWK.from_dict(one.jwk) for one in (RSA, EC)}
USUAL = RSA.claims(Pod(), POD_AUDIENCE)


def verdicts(text: str, key: jwt.PyJWK) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the claims that the fast and the plain verification find."""
    arguments = text, key, POD_AUDIENCE, RSA.name
    try:
        plain = decode(*arguments)
    except jwt.PyJWTError:
        plain = None
    return common_claims(*arguments), plain


def sign(issuer: TokenIssuer, header: Any, payload: bytes) -> str:
    body = f"{encode(header)}.{urlsafe(payload)}"
    if issuer is RSA:
        return f"{body}.{urlsafe(issuer.key.sign(body.encode(), PKCS1v15(), SHA256()))}"
    halves = decode_dss_signature(issuer.key.sign(body.encode(), ec.ECDSA(SHA256())))
    return f"{body}.{urlsafe(b''.join(half.to_bytes(32) for half in halves))}"


def usual_header(issuer: TokenIssuer) -> dict[str, Any]:
    return {"alg": issuer.algorithm, "kid": issuer.key_id}


@pytest.mark.parametrize("issuer", [RSA, EC], ids=["RS256", "ES256"])
@pytest.mark.parametrize("audience", [POD_AUDIENCE, [POD_AUDIENCE]])
def test_usual_tokens_take_the_fast_path(issuer: TokenIssuer, audience: Any) -> None:
    token = issuer.pod_token(Pod(), aud=audience).reveal()
    fast, plain = verdicts(token, KEYS[issuer.key_id])
    assert fast == plain
    assert fast is not None


@pytest.mark.parametrize("part", [0, 1, 2])
def test_unused_bits_must_be_zero(part: int) -> None:
    """Otherwise one token would have several texts, which PyJWT rejects."""
    header, payload = {**usual_header(RSA), "typ": "J" * 3}, json.dumps(USUAL).encode()
    text = sign(RSA, header, payload + b" " * (1 - len(payload) % 3))
    assert verdicts(text, KEYS[RSA.key_id])[0] is not None
    parts = text.split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    parts[part] = parts[part][:-1] + alphabet[alphabet.index(parts[part][-1]) ^ 1]
    changed = f"{parts[0]}.{parts[1]}"
    if part < 2:  # with a signature of the changed text
        parts[2] = urlsafe(RSA.key.sign(changed.encode(), PKCS1v15(), SHA256()))
    assert verdicts(f"{changed}.{parts[2]}", KEYS[RSA.key_id]) == (None, None)


def test_other_algorithms_take_the_plain_path() -> None:
    key = jwt.PyJWK.from_dict({**RSA.jwk, "alg": "RS512"})
    token = jwt.encode(USUAL, RSA.key, algorithm="RS512", headers={"kid": RSA.key_id})
    fast, plain = verdicts(token, key)
    assert (fast, plain) == (None, USUAL)


_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2**70),
    st.floats(),
    st.just(time.time() + 600),
    st.text(max_size=9),
    st.lists(st.sampled_from([POD_AUDIENCE, "vault", 1]), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=1),
)
_CLAIMS = st.dictionaries(st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti", "x"]), _JUNK, max_size=2)
_FIELDS = st.dictionaries(
    st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "x5u", "cty", "x"]), _JUNK, max_size=2
)
_ENCODINGS = st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-8-sig", "latin-1"])


@given(st.sampled_from([RSA, EC]), st.sampled_from([*KEYS]), _CLAIMS, _FIELDS, _ENCODINGS)
@settings(max_examples=2000)
def test_signed_tokens_with_any_header_and_claims(
    issuer: TokenIssuer, key_id: str, claims: dict[str, Any], fields: dict[str, Any], encoding: str
) -> None:
    payload = json.dumps({**USUAL, **claims}).encode(encoding)
    fast, plain = verdicts(sign(issuer, usual_header(issuer) | fields, payload), KEYS[key_id])
    assert fast in (None, plain)


@given(st.sampled_from([RSA, EC]), st.data())
@settings(max_examples=1000)
def test_changed_tokens(issuer: TokenIssuer, data: st.DataObject) -> None:
    text = sign(issuer, usual_header(issuer), json.dumps(USUAL).encode())
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.integers(0, len(text)))
        new = data.draw(st.sampled_from([*"+/=-_.\n !AZaz09", ".."]))
        text = text[:where] + new + text[where + data.draw(st.integers(0, 1)) :]
    fast, plain = verdicts(text, KEYS[issuer.key_id])
    assert fast in (None, plain)
