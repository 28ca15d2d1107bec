"""Simulates the API server's token issuer: a signing key, its published key set, and tokens bound to a pod."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from csi_driver.core.certificates.keys import public_bytes
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.secret import Secret

ISSUER = "https://demo.certmount.invalid"
_LIFETIME_S = 3600
_ALGORITHM = "ES256"


@dataclass(frozen=True, slots=True)
class DemoPod:
    """A pod on the demo's only node."""

    account: ServiceAccount
    name: str
    uid: str
    node: str

    @classmethod
    def create(cls, account: ServiceAccount, name: str, node: str) -> DemoPod:
        """Return a pod with a new UID."""
        return cls(account, name, str(uuid.uuid4()), node)

    def __str__(self) -> str:
        return f"{self.account.namespace}/{self.name}"


class DemoTokenIssuer:
    """Signs service account tokens with a key that exists only in memory."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_id = hashlib.sha256(public_bytes(self._key.public_key())).hexdigest()[:16]

    def key_set(self) -> str:
        """Return the public key as a JSON Web Key Set (RFC 7517)."""
        key = ECAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**key, "kid": self._key_id, "alg": _ALGORITHM, "use": "sig"}]})

    def issue(self, pod: DemoPod, audience: str) -> Secret[str]:
        """Return a token for one audience, with the claims that Kubernetes writes since 1.32 (KEP-4193)."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": [audience],
            "sub": pod.account.username,
            "iat": now,
            "nbf": now,
            "exp": now + _LIFETIME_S,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": pod.account.namespace,
                "node": {"name": pod.node, "uid": _uid(pod.node)},
                "pod": {"name": pod.name, "uid": pod.uid},
                "serviceaccount": {"name": pod.account.name, "uid": _uid(str(pod.account))},
            },
        }
        return Secret(jwt.encode(claims, self._key, algorithm=_ALGORITHM, headers={"kid": self._key_id}))


def _uid(name: str) -> str:
    """Return the same UID for the same name: nodes and service accounts keep theirs across tokens."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{ISSUER}/{name}"))
