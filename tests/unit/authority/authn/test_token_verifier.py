"""Offline verification of tokens."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any, cast

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from csi_driver import POD_AUDIENCE
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES, PodIdentity
from csi_driver.core.secret import Secret
from tests.support.tokens import Pod, TokenIssuer

POD = Pod()
BOUND = {"namespace": POD.namespace, "serviceaccount": {"name": POD.service_account, "uid": "u"}}
NO_NODE = {**BOUND, "pod": {"name": "a", "uid": "b"}}


def urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encode(part: Any) -> str:
    return urlsafe(json.dumps(part).encode())


def forge(issuer: TokenIssuer, header: dict[str, Any], sign: Callable[[bytes], bytes]) -> Secret[str]:
    body = f"{encode(header)}.{encode(issuer.claims(POD, POD_AUDIENCE))}"
    return Secret(f"{body}.{urlsafe(sign(body.encode()))}")


def with_algorithm(issuer: TokenIssuer, algorithm: str) -> Secret[str]:
    return forge(issuer, {"alg": algorithm, "kid": issuer.key_id}, lambda _: b"x" * 64)


def public_pem(issuer: TokenIssuer) -> bytes:
    return cast("bytes", issuer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def sign_with_public_key(issuer: TokenIssuer) -> Secret[str]:
    header = {"alg": "HS256", "kid": issuer.key_id, "typ": "JWT"}
    return forge(issuer, header, lambda body: hmac.digest(public_pem(issuer), body, hashlib.sha256))


def sign_with_key_in_header(issuer: TokenIssuer) -> Secret[str]:
    mallory = TokenIssuer(key_id=issuer.key_id)
    url = "https://mallory.test/"
    return mallory.sign(mallory.claims(POD, POD_AUDIENCE), jwk=mallory.jwk, x5u=url, jku=url)


def change_claims(issuer: TokenIssuer) -> Secret[str]:
    header, _, signature = issuer.pod_token(POD).reveal().split(".")
    return Secret(f"{header}.{encode(issuer.claims(Pod(name='other'), POD_AUDIENCE))}.{signature}")


def hours(number: float) -> int:
    return int(time.time() + number * 3600)


_UNUSED = ("none", "HS256", "HS384", "HS512", "PS256", "EdDSA", "ES256K")  # algorithms that Kubernetes does not use
ATTACKS: dict[str, tuple[Callable[[TokenIssuer], Secret[str]], str]] = {
    "expired": (lambda i: i.pod_token(POD, exp=hours(-1)), "has expired"),
    "expired a second ago": (lambda i: i.pod_token(POD, exp=int(time.time()) - 1), "has expired"),
    "not yet valid": (lambda i: i.pod_token(POD, nbf=hours(1)), "not valid yet"),
    "issued in the future": (lambda i: i.pod_token(POD, iat=hours(1)), "not valid yet"),
    "never expires": (lambda i: i.pod_token(POD, exp=None), "lacks one of the claims"),
    "other audience": (lambda i: i.pod_token(POD, aud=["vault"]), "another audience"),
    "audience of the node": (lambda i: i.node_token(POD), "another audience"),
    "two audiences": (lambda i: i.pod_token(POD, aud=[POD_AUDIENCE, "vault"]), "audiences in addition"),
    "no audience": (lambda i: i.pod_token(POD, aud=None), "lacks one of the claims"),
    "other issuer": (lambda i: i.pod_token(POD, iss="https://mallory.test"), "another issuer"),
    "no issuer": (lambda i: i.pod_token(POD, iss=None), "lacks one of the claims"),
    "no subject": (lambda i: i.pod_token(POD, sub=None), "lacks one of the claims"),
    "other subject": (lambda i: i.pod_token(POD, sub="system:admin"), "service account"),
    "alg none": (lambda i: forge(i, {"alg": "none", "kid": i.key_id}, lambda _: b""), "with a key ID in its header"),
    "HS256 with the public key": (sign_with_public_key, "with a key ID in its header"),
    "algorithm of another key type": (lambda i: with_algorithm(i, "ES256"), "does not use the algorithm"),
    **{name: (functools.partial(with_algorithm, algorithm=name), "with a key ID in its header") for name in _UNUSED},
    "unknown key ID": (lambda i: i.rotated("key-9").pod_token(POD), "does not publish"),
    "no key ID": (lambda i: i.sign(i.claims(POD, POD_AUDIENCE), kid=""), "does not publish"),
    "known key ID, other key": (lambda i: i.rotated(i.key_id).pod_token(POD), "does not use the algorithm"),
    "other key of its type": (lambda i: TokenIssuer(key_id=i.key_id).pod_token(POD), "has an invalid signature"),
    "key in the header": (sign_with_key_in_header, "has an invalid signature"),
    "changed claims": (change_claims, "has an invalid signature"),
    "unknown critical header": (lambda i: i.sign(i.claims(POD, POD_AUDIENCE), crit=["exp"]), "not a JSON Web Token"),
    "not bound to a pod": (lambda i: i.pod_token(POD, **{"kubernetes.io": BOUND}), "bound to a pod"),
    "without its node": (lambda i: i.pod_token(POD, **{"kubernetes.io": NO_NODE}), "Kubernetes 1.30"),
    "missing": (lambda _: Secret(""), "is missing"),
    "garbage": (lambda _: Secret("garbage"), "is not a JSON Web Token"),
    "dots": (lambda _: Secret(".."), "is not a JSON Web Token"),
    "not ASCII": (lambda _: Secret("é.é.é"), "is not a JSON Web Token"),
    "deeply nested header": (lambda _: Secret(f"{urlsafe(b'[' * 700)}.e30.e30"), "is not a JSON Web Token"),
    "too long": (lambda i: i.pod_token(POD, padding="x" * MAX_TOKEN_BYTES), f"at most {MAX_TOKEN_BYTES} bytes"),
    "header too long": (lambda i: i.sign(i.claims(POD, POD_AUDIENCE), p="x" * 2000), "with a key ID in its header"),
}
EXPIRED, NOT_SUPPORTED = Reason.TOKEN_EXPIRED, Reason.CLUSTER_NOT_SUPPORTED
REASONS = {"expired": EXPIRED, "expired a second ago": EXPIRED, "without its node": NOT_SUPPORTED}


async def verify(keys: TokenKeys, token: Secret[str]) -> PodIdentity:
    return await TokenVerifier(keys).verify(token, POD_AUDIENCE, "pod token")


async def test_identity_has_all_claims_of_a_bound_token(issuer: TokenIssuer, keys: TokenKeys) -> None:
    identity = await verify(keys, issuer.pod_token(POD))
    assert (identity.service_account.username, identity.service_account_uid) == (POD.username, POD.service_account_uid)
    assert (identity.pod_name, identity.pod_uid) == (POD.name, POD.uid)
    assert (identity.node_name, identity.node_uid) == (POD.node, POD.node_uid)


@pytest.mark.parametrize("attack", ATTACKS)
async def test_invalid_token_is_rejected(attack: str, issuer: TokenIssuer, keys: TokenKeys) -> None:
    make, words = ATTACKS[attack]
    token = make(issuer)
    with pytest.raises(CertmountError) as refusal:
        await verify(keys, token)
    assert refusal.value.reason is REASONS.get(attack, Reason.TOKEN_REJECTED)
    assert all(part in str(refusal.value) for part in ("pod token", words))
    assert not any(len(part) >= 8 and part in str(refusal.value) for part in token.reveal().split("."))


async def test_token_is_valid_if_the_authoritys_clock_is_slightly_behind(issuer: TokenIssuer, keys: TokenKeys) -> None:
    await verify(keys, issuer.pod_token(POD, nbf=int(time.time()) + 10, iat=int(time.time()) + 10))


# Shared by the property tests, because creating keys is slow.
_CLUSTER = TokenIssuer()
_ELLIPTIC = _CLUSTER.rotated("key-2")
_MALLORY = TokenIssuer()


class _TwoKeys:
    issuer = _CLUSTER.name

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        found = {issuer.key_id: issuer for issuer in (_CLUSTER, _ELLIPTIC)}.get(key_id)
        return jwt.PyJWK.from_dict(found.jwk) if found else None


_KEYS = cast("TokenKeys", _TwoKeys())


async def test_elliptic_curve_keys_are_supported() -> None:
    assert (await verify(_KEYS, _ELLIPTIC.pod_token(POD))).pod_name == POD.name


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")) | st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*"))
async def test_any_text_that_is_not_a_token_is_rejected(text: str) -> None:
    with pytest.raises(CertmountError, match="TokenRejected: "):
        await verify(_KEYS, Secret(text))


async def _assert_rejected(text: str) -> None:
    with pytest.raises(CertmountError) as refusal:
        await verify(_KEYS, Secret(text))
    assert refusal.value.reason in (Reason.TOKEN_REJECTED, Reason.TOKEN_EXPIRED, Reason.CLUSTER_NOT_SUPPORTED)


def _signed(claims: bytes, issuer: TokenIssuer = _CLUSTER) -> str:
    body = f"{encode({'alg': 'RS256', 'kid': issuer.key_id})}.{urlsafe(claims)}"
    return f"{body}.{urlsafe(_rs256(body, issuer))}"


def _rs256(body: str, issuer: TokenIssuer) -> bytes:
    return cast("bytes", issuer.key.sign(body.encode(), PKCS1v15(), SHA256()))


@given(st.sampled_from([_CLUSTER, _ELLIPTIC]), st.data())
async def test_token_with_any_change_is_rejected(issuer: TokenIssuer, data: st.DataObject) -> None:
    text = issuer.pod_token(POD).reveal()
    where = data.draw(st.integers(0, text.rindex(".") - 1))
    kind = data.draw(st.sampled_from(["replace", "insert", "remove", "signature"]))
    if kind == "signature":
        signature = bytearray(base64.urlsafe_b64decode(text.rpartition(".")[2] + "=="))
        signature[data.draw(st.integers(0, len(signature) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed = f"{text.rpartition('.')[0]}.{urlsafe(bytes(signature))}"
    else:
        new = "" if kind == "remove" else data.draw(st.characters(min_codepoint=0x20, max_codepoint=0x7E))
        changed = text[:where] + new + text[where + (kind != "insert") :]
    if changed != text:
        await _assert_rejected(changed)


_JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


_HEADERS = st.sampled_from(["jwk", "jku", "x5c", "x5u", "x5t", "crit", "b64", "typ", "cty", "zip", "enc"])


@given(
    st.sampled_from(["none", "None", "HS256", "RS256", "ES256", "PS256", "RS256 ", "", None, 7, ["RS256"]]),
    st.sampled_from([_CLUSTER.key_id, _ELLIPTIC.key_id, "../../dev/null", "' OR 1=1", "x" * 500, None, 7, {}]),
    st.dictionaries(_HEADERS, _JUNK),
    st.sampled_from(["mallory", "hmac", "nothing", "junk"]),
)
async def test_no_header_replaces_a_signature(algorithm: Any, key_id: Any, extra: dict[str, Any], signer: str) -> None:
    header = encode({"alg": algorithm, "kid": key_id, **extra})
    body = f"{header}.{encode(_CLUSTER.claims(POD, POD_AUDIENCE))}"
    signers: dict[str, Callable[[], bytes]] = {
        "mallory": lambda: _rs256(body, _MALLORY),
        "hmac": lambda: hmac.digest(public_pem(_CLUSTER), body.encode(), hashlib.sha256),
        "nothing": lambda: b"",
        "junk": lambda: b"x" * 256,
    }
    await _assert_rejected(f"{body}.{urlsafe(signers[signer]())}")


_CLAIM = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "kubernetes.io", "jti"])


@given(st.dictionaries(_CLAIM, _JUNK, min_size=1, max_size=3))
async def test_claims_with_any_values_are_verified(changes: dict[str, Any]) -> None:
    claims = {**_CLUSTER.claims(POD, POD_AUDIENCE), **changes}
    try:
        identity = await verify(_KEYS, Secret(_signed(json.dumps(claims).encode())))
    except CertmountError:
        return
    assert claims["aud"] in (POD_AUDIENCE, [POD_AUDIENCE])
    assert claims["iss"] == _CLUSTER.name
    assert claims["sub"] == identity.service_account.username
    assert time.time() < identity.expires_at == claims["exp"]


_RAW_CLAIMS = {
    "deeply nested": b"[" * 5000 + b"]" * 5000,
    "deeply nested object": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "a number of 5,000 digits": b'{"exp": ' + b"9" * 5000 + b"}",
    "infinite": b'{"exp": Infinity, "aud": "certmount", "iss": "x", "sub": "y"}',
    "not a number": b'{"exp": NaN, "nbf": NaN}',
    "not an object": b'"certmount"',
    "not UTF-8": b'{"aud": "\xff\xfe"}',
    "lone surrogate": b'{"aud": "\\ud800"}',
    "nothing": b"",
}


@pytest.mark.parametrize("kind", _RAW_CLAIMS)
async def test_claims_that_break_json_parsers_are_rejected(kind: str) -> None:
    """With a valid signature, because the signature is checked first."""
    await _assert_rejected(_signed(_RAW_CLAIMS[kind]))


async def test_last_value_of_a_duplicate_claim_counts(issuer: TokenIssuer, keys: TokenKeys) -> None:
    claims = '{"aud": ["vault"], "sub": "system:admin", ' + json.dumps(issuer.claims(POD, POD_AUDIENCE))[1:]
    identity = await verify(keys, Secret(_signed(claims.encode(), issuer)))
    assert identity.service_account.username == POD.username
