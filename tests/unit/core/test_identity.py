"""Pod identities in token claims."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import (
    MAX_TOKEN_BYTES,
    PodIdentity,
    ServiceAccount,
    identity_from_claims,
    unverified_identity,
)
from csi_driver.core.names import spiffe_id
from csi_driver.core.secret import Secret
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import hostile_texts

UID = "0e5f7a52-9a5e-4f1c-8a3f-3a9d1f6f2b11"


def claims(**changes: Any) -> dict[str, Any]:
    """Return the claims of a projected token; ``changes`` apply to ``kubernetes.io``."""
    bound = {
        "namespace": "web",
        "node": {"name": "node-1.example", "uid": UID},
        "pod": {"name": "edge-0", "uid": UID},
        "serviceaccount": {"name": "edge.v2", "uid": UID},
    }
    return {
        "iss": "https://kubernetes.default.svc",
        "aud": ["certmount"],
        "exp": 1795345200,
        "iat": 1795341600,
        "jti": UID,
        "sub": "system:serviceaccount:web:edge.v2",
        "kubernetes.io": {key: value for key, value in {**bound, **changes}.items() if value is not None},
    }


def token(content: object) -> Secret[str]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Secret(".".join(["e30", base64.urlsafe_b64encode(body).decode().rstrip("="), "sig"]))


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        hostile_texts,
        st.sampled_from(["web", "edge.v2", "edge-0", "node-1"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
pairs = st.one_of(st.fixed_dictionaries({}, optional={"name": json_values, "uid": json_values}), json_values)


@st.composite
def any_claims(draw: st.DrawFn) -> dict[str, Any]:
    """Replace some valid claims by arbitrary values."""
    bound = draw(
        st.fixed_dictionaries(
            {}, optional={"namespace": json_values, "node": pairs, "pod": pairs, "serviceaccount": pairs}
        )
    )
    outer = draw(
        st.fixed_dictionaries({}, optional={"exp": json_values, "sub": json_values, "kubernetes.io": json_values})
    )
    return {**claims(**bound), **outer}


def is_valid(identity: PodIdentity) -> bool:
    """Return whether all texts are Kubernetes names or UIDs, which are safe in URIs, paths and logs."""
    names = [identity.service_account.namespace, identity.service_account.name, identity.pod_name, identity.node_name]
    plain = all(name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in names)
    printable = all(uid.isascii() and uid.isprintable() for uid in (identity.pod_uid, identity.node_uid))
    return plain and printable and math.isfinite(identity.expires_at)


def test_claims_of_a_pod_token_are_read() -> None:
    identity = identity_from_claims(claims(), token="pod token")
    assert identity == PodIdentity(
        ServiceAccount("web", "edge.v2"), UID, "edge-0", UID, "node-1.example", UID, 1795345200
    )
    assert identity == unverified_identity(token(claims()))
    assert identity.service_account.username == claims()["sub"]
    assert str(identity) == "pod web/edge-0"
    assert str(identity.service_account) == "web/edge.v2"


@given(any_claims())
@example({**claims(), "exp": 10**400})
@example({**claims(), "exp": float("nan")})
@example({**claims(), "exp": True})
@example({**claims(namespace="a/b"), "sub": "system:serviceaccount:a/b:edge.v2"})
@example({**claims(namespace="a\ud800"), "sub": "system:serviceaccount:a\ud800:edge.v2"})
def test_any_claims_are_a_valid_identity_or_rejected(content: dict[str, Any]) -> None:
    for read in (lambda: identity_from_claims(content, token="pod token"), lambda: unverified_identity(token(content))):
        identity = outcome(read, CertmountError)
        if isinstance(identity, PodIdentity):
            assert is_valid(identity)
            assert content["sub"] == identity.service_account.username
            assert str(spiffe_id("td", identity.service_account.namespace, identity.service_account.name))
        else:
            assert identity.reason in (Reason.TOKEN_REJECTED, Reason.CLUSTER_NOT_SUPPORTED)
            assert str(identity).isprintable()


@given(
    st.one_of(
        hostile_texts,
        st.text(alphabet="abcABC012-_=.+/ ", max_size=40),
        st.binary(max_size=60).map(lambda body: token(body).reveal()),
    )
)
@example("..")
@example("." * 1000)
@example(token(b"[" * 9000).reveal())
@example(token(b"9" * 5000).reveal())
@example(token(b"\xff\xfe").reveal())
@example(token([]).reveal())
def test_invalid_token_is_rejected_without_quoting_it(text: str) -> None:
    with pytest.raises(CertmountError, match=r"^TokenRejected: ") as raised:
        unverified_identity(Secret("canary" + text))
    assert "canary" not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_too_long_token_is_rejected() -> None:
    with pytest.raises(CertmountError, match="is not a JSON Web Token"):
        unverified_identity(token({**claims(), "padding": "a" * MAX_TOKEN_BYTES}))


@pytest.mark.parametrize("padding", range(4))
def test_token_of_any_length_is_read(padding: int) -> None:
    """base64url without padding (RFC 7515 section 2)."""
    assert unverified_identity(token({**claims(), "more": "x" * padding})).pod_name == "edge-0"


EXPIRIES: list[object] = [None, True, "1795345200", 0, -1, math.nan, math.inf, -math.inf, 10**400, []]
NOT_BOUND: list[Any] = [{"pod": None}, {"serviceaccount": None}, {"namespace": None}, {"pod": {"name": "edge-0"}}]
SUBJECTS = ["system:serviceaccount:web:other", "system:serviceaccount:other:edge.v2", "web:edge.v2", None, 5]


@pytest.mark.parametrize(
    "content, words",
    [
        *(({**claims(), "exp": expiry}, "is not a projected service account token") for expiry in EXPIRIES),
        *((claims(**change), "is not a projected service account token") for change in NOT_BOUND),
        *(({**claims(), "sub": s}, "different service accounts in its subject and its other claims") for s in SUBJECTS),
    ],
)
def test_invalid_claims_are_rejected(content: dict[str, Any], words: str) -> None:
    with pytest.raises(CertmountError, match=f"TokenRejected: pod token: .*{words}"):
        identity_from_claims(content, token="pod token")


@pytest.mark.parametrize("change", [{"node": None}, {"node": {}}, {"node": {"name": "node-1"}}])
def test_token_without_a_node_is_rejected(change: dict[str, Any]) -> None:
    """As of Kubernetes before 1.30."""
    with pytest.raises(CertmountError) as raised:
        identity_from_claims(claims(**change), token="node token")
    assert str(raised.value) == (
        "ClusterNotSupported: node token: does not contain the pod's node; use Kubernetes 1.30 or newer"
    )


@pytest.mark.parametrize("name", ["../x", "a/b", "a:b", "A", "a b", "a\n", "*", "{pod}", "ü", "a" * 254, ".", "-a"])
@pytest.mark.parametrize("field", ["pod", "node", "serviceaccount", "namespace"])
def test_invalid_kubernetes_name_is_rejected(field: str, name: str) -> None:
    content = claims(**{field: name if field == "namespace" else {"name": name, "uid": UID}})
    if field == "serviceaccount":
        content["sub"] = f"system:serviceaccount:web:{name}"
    if field == "namespace":
        content["sub"] = f"system:serviceaccount:{name}:edge.v2"
    with pytest.raises(CertmountError) as raised:
        identity_from_claims(content, token="pod token")
    assert str(raised.value).isprintable()
