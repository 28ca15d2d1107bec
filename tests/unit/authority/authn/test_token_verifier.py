"""What it takes for a token to be believed without asking anyone."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from csi_driver import NODE_AUDIENCE, POD_AUDIENCE
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import MAX_TOKEN_BYTES
from csi_driver.core.secret import Secret
from tests.support.tokens import Pod, TokenIssuer

POD = Pod()
BOUND = {"namespace": POD.namespace, "serviceaccount": {"name": POD.service_account, "uid": "u"}}


def encoded(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def forged(issuer: TokenIssuer, header: dict[str, Any], sign: Callable[[bytes], bytes]) -> Secret[str]:
    """A token with our claims, any header and any signature."""
    body = f"{encoded(header)}.{encoded(issuer.claims(POD, POD_AUDIENCE))}"
    return Secret(f"{body}.{base64.urlsafe_b64encode(sign(body.encode())).rstrip(b'=').decode()}")


def public_pem(issuer: TokenIssuer) -> bytes:
    pem: bytes = issuer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem


def hmac_by_public_key(issuer: TokenIssuer) -> Secret[str]:
    header = {"alg": "HS256", "kid": issuer.key_id, "typ": "JWT"}
    return forged(issuer, header, lambda body: hmac.digest(public_pem(issuer), body, hashlib.sha256))


def with_own_key(issuer: TokenIssuer) -> Secret[str]:
    """Signed by the attacker's key, which the header offers under the cluster's key id."""
    mallory = TokenIssuer(key_id=issuer.key_id)
    return mallory.sign(
        mallory.claims(POD, POD_AUDIENCE), jwk=mallory.jwk, x5u="https://mallory.test/", jku="https://mallory.test/"
    )


def claims_changed_after_signing(issuer: TokenIssuer) -> Secret[str]:
    header, _, signature = issuer.pod_token(POD).reveal().split(".")
    return Secret(f"{header}.{encoded(issuer.claims(Pod(name='other'), POD_AUDIENCE))}.{signature}")


def hours(number: float) -> int:
    return int(time.time() + number * 3600)


ATTACKS: dict[str, tuple[Callable[[TokenIssuer], Secret[str]], Reason, str]] = {
    "expired": (lambda i: i.pod_token(POD, exp=hours(-1)), Reason.TOKEN_EXPIRED, "has expired"),
    "expired a second ago": (lambda i: i.pod_token(POD, exp=int(time.time()) - 1), Reason.TOKEN_EXPIRED, "has expired"),
    "not yet valid": (lambda i: i.pod_token(POD, nbf=hours(1)), Reason.TOKEN_REJECTED, "not valid yet"),
    "issued in the future": (lambda i: i.pod_token(POD, iat=hours(1)), Reason.TOKEN_REJECTED, "not valid yet"),
    "never expires": (lambda i: i.pod_token(POD, exp=None), Reason.TOKEN_REJECTED, "lacks one of the claims"),
    "other audience": (lambda i: i.pod_token(POD, aud=["vault"]), Reason.TOKEN_REJECTED, "another audience"),
    "audience of the node": (lambda i: i.node_token(POD), Reason.TOKEN_REJECTED, "another audience"),
    "two audiences": (
        lambda i: i.pod_token(POD, aud=[POD_AUDIENCE, "vault"]),
        Reason.TOKEN_REJECTED,
        "other audiences",
    ),
    "no audience": (lambda i: i.pod_token(POD, aud=None), Reason.TOKEN_REJECTED, "lacks one of the claims"),
    "other issuer": (lambda i: i.pod_token(POD, iss="https://mallory.test"), Reason.TOKEN_REJECTED, "another issuer"),
    "no issuer": (lambda i: i.pod_token(POD, iss=None), Reason.TOKEN_REJECTED, "lacks one of the claims"),
    "no subject": (lambda i: i.pod_token(POD, sub=None), Reason.TOKEN_REJECTED, "lacks one of the claims"),
    "other subject": (
        lambda i: i.pod_token(POD, sub="system:admin"),
        Reason.TOKEN_REJECTED,
        "names one service account",
    ),
    "alg none": (
        lambda i: forged(i, {"alg": "none", "kid": i.key_id}, lambda _: b""),
        Reason.TOKEN_REJECTED,
        "whose header names its key",
    ),
    "HS256 by the public key": (hmac_by_public_key, Reason.TOKEN_REJECTED, "whose header names its key"),
    "algorithm of another key type": (
        lambda i: forged(i, {"alg": "ES256", "kid": i.key_id}, lambda _: b"x" * 64),
        Reason.TOKEN_REJECTED,
        "another algorithm",
    ),
    "unknown key id": (lambda i: i.rotated("key-9").pod_token(POD), Reason.TOKEN_REJECTED, "does not publish"),
    "no key id": (lambda i: i.sign(i.claims(POD, POD_AUDIENCE), kid=""), Reason.TOKEN_REJECTED, "does not publish"),
    "known key id, other key": (
        lambda i: i.rotated(i.key_id).pod_token(POD),
        Reason.TOKEN_REJECTED,
        "another algorithm",
    ),
    "known key id, other key of its type": (
        lambda i: TokenIssuer(key_id=i.key_id).pod_token(POD),
        Reason.TOKEN_REJECTED,
        "signature that does not fit",
    ),
    "key in the header": (with_own_key, Reason.TOKEN_REJECTED, "signature that does not fit"),
    "claims changed": (claims_changed_after_signing, Reason.TOKEN_REJECTED, "signature that does not fit"),
    "unknown critical header": (
        lambda i: i.sign(i.claims(POD, POD_AUDIENCE), crit=["exp"]),
        Reason.TOKEN_REJECTED,
        "is not a JSON Web Token",
    ),
    "not bound to a pod": (
        lambda i: i.pod_token(POD, **{"kubernetes.io": BOUND}),
        Reason.TOKEN_REJECTED,
        "bound to a pod",
    ),
    "without its node": (
        lambda i: i.pod_token(POD, **{"kubernetes.io": {**BOUND, "pod": {"name": "a", "uid": "b"}}}),
        Reason.CLUSTER_NOT_SUPPORTED,
        "Kubernetes 1.30",
    ),
    "missing": (lambda _: Secret(""), Reason.TOKEN_REJECTED, "is missing"),
    "garbage": (lambda _: Secret("garbage"), Reason.TOKEN_REJECTED, "is not a JSON Web Token"),
    "dots": (lambda _: Secret(".."), Reason.TOKEN_REJECTED, "is not a JSON Web Token"),
    "not ASCII": (lambda _: Secret("é.é.é"), Reason.TOKEN_REJECTED, "is not a JSON Web Token"),
    "deeply nested header": (
        lambda _: Secret(encoded("") + base64.urlsafe_b64encode(b"[" * 700).decode() + ".e30.e30"),
        Reason.TOKEN_REJECTED,
        "is not a JSON Web Token",
    ),
    "over-long": (
        lambda i: i.pod_token(POD, padding="x" * MAX_TOKEN_BYTES),
        Reason.TOKEN_REJECTED,
        f"at most {MAX_TOKEN_BYTES} bytes",
    ),
    "over-long header": (
        lambda i: i.sign(i.claims(POD, POD_AUDIENCE), padding="x" * 2000),
        Reason.TOKEN_REJECTED,
        "whose header names its key",
    ),
}


async def test_a_token_of_the_cluster_proves_its_pod(issuer: TokenIssuer, keys: TokenKeys) -> None:
    """All that a bound token says of its pod is read from it."""
    identity = await TokenVerifier(keys).verify(issuer.pod_token(POD), POD_AUDIENCE, "pod token")
    assert identity.service_account.username == POD.username
    assert (identity.pod_name, identity.pod_uid) == (POD.name, POD.uid)
    assert (identity.node_name, identity.node_uid) == (POD.node, POD.node_uid)
    assert identity.service_account_uid == POD.service_account_uid


@pytest.mark.parametrize("attack", ATTACKS)
async def test_no_forged_or_foreign_token_is_believed(attack: str, issuer: TokenIssuer, keys: TokenKeys) -> None:
    """Each is refused with words that say which token and what is wrong, and never quote it."""
    make, reason, words = ATTACKS[attack]
    token = make(issuer)
    with pytest.raises(CertmountError) as refusal:
        await TokenVerifier(keys).verify(token, POD_AUDIENCE, "pod token")
    assert refusal.value.reason is reason
    assert "pod token" in str(refusal.value)
    assert words in str(refusal.value)
    for part in token.reveal().split("."):
        assert len(part) < 8 or part not in str(refusal.value)


async def test_a_pod_token_is_no_node_token(issuer: TokenIssuer, keys: TokenKeys) -> None:
    """The two audiences can't stand in for each other."""
    with pytest.raises(CertmountError, match="another audience than certmount-node"):
        await TokenVerifier(keys).verify(issuer.pod_token(POD), NODE_AUDIENCE, "node token")


async def test_a_clock_that_is_a_little_behind_refuses_no_fresh_token(issuer: TokenIssuer, keys: TokenKeys) -> None:
    """The API server may be some seconds ahead of the authority; expiry gets no such grace."""
    token = issuer.pod_token(POD, nbf=int(time.time()) + 10, iat=int(time.time()) + 10)
    await TokenVerifier(keys).verify(token, POD_AUDIENCE, "pod token")


@pytest.mark.parametrize("algorithm", ["none", "HS256", "HS384", "HS512", "PS256", "EdDSA", "ES256K"])
async def test_only_the_algorithms_of_an_api_server_are_known(
    algorithm: str, issuer: TokenIssuer, keys: TokenKeys
) -> None:
    """Neither keyless nor shared-secret algorithms, nor any that Kubernetes doesn't use, get as far as a signature check."""
    token = forged(issuer, {"alg": algorithm, "kid": issuer.key_id}, lambda _: b"x" * 64)
    with pytest.raises(CertmountError, match="whose header names its key"):
        await TokenVerifier(keys).verify(token, POD_AUDIENCE, "pod token")


async def test_an_elliptic_key_works_like_an_rsa_key(issuer: TokenIssuer, metrics: Any) -> None:
    """Clusters sign with either."""
    elliptic = issuer.rotated("key-2")

    async def fetch() -> Any:
        return elliptic.published

    keys = TokenKeys(fetch, metrics)
    await keys.load()
    identity = await TokenVerifier(keys).verify(elliptic.pod_token(POD), POD_AUDIENCE, "pod token")
    assert identity.pod_name == POD.name


@given(
    st.one_of(st.text(), st.binary().map(lambda data: data.decode("latin-1")), st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*"))
)
async def test_any_text_in_place_of_a_token_is_refused_cleanly(text: str) -> None:
    """Nothing but our own refusal comes out, whatever goes in."""
    with pytest.raises(CertmountError) as refusal:
        await TokenVerifier(_KEYS).verify(Secret(text), POD_AUDIENCE, "pod token")
    assert refusal.value.reason is Reason.TOKEN_REJECTED


# The cluster of the properties: one key of each kind, made once.
_CLUSTER = TokenIssuer()
_ELLIPTIC = _CLUSTER.rotated("key-2")
_MALLORY = TokenIssuer()


class _TwoKeys:
    issuer = _CLUSTER.name

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        found = {issuer.key_id: issuer for issuer in (_CLUSTER, _ELLIPTIC)}.get(key_id)
        return jwt.PyJWK.from_dict(found.jwk) if found else None


async def _is_refused(text: str) -> None:
    verifier: Any = TokenVerifier(_TwoKeys())  # type: ignore[arg-type]  # what of the keys a verifier needs
    with pytest.raises(CertmountError) as refusal:
        await verifier.verify(Secret(text), POD_AUDIENCE, "pod token")
    assert refusal.value.reason in (Reason.TOKEN_REJECTED, Reason.TOKEN_EXPIRED, Reason.CLUSTER_NOT_SUPPORTED)


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _signed(claims: bytes, issuer: TokenIssuer = _CLUSTER) -> str:
    """Any bytes as claims, under a good signature."""
    body = f"{_urlsafe(json.dumps({'alg': 'RS256', 'kid': issuer.key_id}).encode())}.{_urlsafe(claims)}"
    return f"{body}.{_urlsafe(_rs256(body, issuer))}"


def _rs256(body: str, issuer: TokenIssuer) -> bytes:
    signature: bytes = issuer.key.sign(body.encode(), PKCS1v15(), SHA256())
    return signature


@given(st.sampled_from([_CLUSTER, _ELLIPTIC]), st.data())
async def test_a_token_with_anything_changed_is_refused(issuer: TokenIssuer, data: st.DataObject) -> None:
    """A character replaced, inserted or left out anywhere in what is signed; or a bit of the signature turned."""
    text = issuer.pod_token(POD).reveal()
    where = data.draw(st.integers(0, text.rindex(".") - 1))
    kind = data.draw(st.sampled_from(["replace", "insert", "leave out", "signature"]))
    if kind == "signature":
        signature = bytearray(base64.urlsafe_b64decode(text.rpartition(".")[2] + "=="))
        signature[data.draw(st.integers(0, len(signature) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changed = f"{text.rpartition('.')[0]}.{_urlsafe(bytes(signature))}"
    else:
        new = "" if kind == "leave out" else data.draw(st.characters(min_codepoint=0x20, max_codepoint=0x7E))
        changed = text[:where] + new + text[where + (kind != "insert") :]
    if changed != text:
        await _is_refused(changed)


_JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@given(
    st.sampled_from(["none", "None", "HS256", "RS256", "ES256", "PS256", "RS256 ", "", None, 7, ["RS256"]]),
    st.sampled_from([_CLUSTER.key_id, _ELLIPTIC.key_id, "../../dev/null", "' OR 1=1", "x" * 500, None, 7, {}]),
    st.dictionaries(
        st.sampled_from(["jwk", "jku", "x5c", "x5u", "x5t", "crit", "b64", "typ", "cty", "zip", "enc"]), _JUNK
    ),
    st.sampled_from(["mallory", "hmac", "nothing", "junk"]),
)
async def test_no_header_makes_an_attackers_signature_good(
    algorithm: Any, key_id: Any, extra: dict[str, Any], signer: str
) -> None:
    """Whatever algorithm, key id, key, address of a key or critical extension it names."""
    header = {"alg": algorithm, "kid": key_id, **extra}
    body = f"{_urlsafe(json.dumps(header).encode())}.{encoded(_CLUSTER.claims(POD, POD_AUDIENCE))}"
    signers: dict[str, Callable[[], bytes]] = {
        "mallory": lambda: _rs256(body, _MALLORY),
        "hmac": lambda: hmac.digest(public_pem(_CLUSTER), body.encode(), hashlib.sha256),
        "nothing": lambda: b"",
        "junk": lambda: b"x" * 256,
    }
    await _is_refused(f"{body}.{_urlsafe(signers[signer]())}")


_CLAIM = st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "kubernetes.io", "jti"])


@given(st.dictionaries(_CLAIM, _JUNK, min_size=1, max_size=3))
async def test_claims_of_any_shape_are_judged_and_never_crash(changes: dict[str, Any]) -> None:
    """Even under a good signature: what passes names our audience, our issuer and a pod, and has an end."""
    claims = {**_CLUSTER.claims(POD, POD_AUDIENCE), **changes}
    verifier: Any = TokenVerifier(_TwoKeys())  # type: ignore[arg-type]  # as above
    try:
        identity = await verifier.verify(Secret(_signed(json.dumps(claims).encode())), POD_AUDIENCE, "pod token")
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
async def test_claims_that_json_readers_stumble_over_are_refused(kind: str) -> None:
    """Signed by the cluster's own key, as a signature is checked first; nothing but our own refusal comes out."""
    await _is_refused(_signed(_RAW_CLAIMS[kind]))


async def test_of_a_claim_that_stands_twice_the_last_one_counts_for_all(issuer: TokenIssuer, keys: TokenKeys) -> None:
    """No part of the authority reads the first and another one the last: here both are of the cluster's own making."""
    claims = '{"aud": ["vault"], "sub": "system:admin", ' + json.dumps(issuer.claims(POD, POD_AUDIENCE))[1:]
    token = Secret(_signed(claims.encode(), issuer))
    identity = await TokenVerifier(keys).verify(token, POD_AUDIENCE, "pod token")
    assert identity.service_account.username == POD.username


class _NoKeys:
    issuer = "https://nobody.test"

    async def find(self, _key_id: str) -> jwt.PyJWK | None:
        return None


_KEYS: Any = _NoKeys()
