"""A cluster's token issuer for tests: bound service account tokens like those of a Kubernetes API server, and invalid ones."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from csi_driver import NODE_AUDIENCE, POD_AUDIENCE, SECRETS_AUDIENCE
from csi_driver.core.cluster.objects import PublishedKeys, ReviewedToken
from csi_driver.core.secret import Secret

ISSUER = "https://kubernetes.default.svc.cluster.local"


@dataclass(frozen=True)
class Pod:
    """A pod as its tokens describe it."""

    name: str = "hello-0"
    namespace: str = "default"
    service_account: str = "hello"
    node: str = "node-a"
    uid: str = "11111111-1111-4111-8111-111111111111"
    node_uid: str = "22222222-2222-4222-8222-222222222222"
    service_account_uid: str = "33333333-3333-4333-8333-333333333333"

    @property
    def username(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{self.service_account}"

    @property
    def reviewed(self) -> ReviewedToken:
        """The result of a TokenReview while the pod exists."""
        return ReviewedToken(self.username, self.service_account_uid, self.name, self.uid, self.node, self.node_uid)


DRIVER = Pod("certmount-node-x7k2p", "certmount", "certmount-node", uid="44444444-4444-4444-8444-444444444444")
CONTROLLER = Pod("certmount-secrets-6d4f", "certmount", "certmount-secrets", uid="66666666-6666-4666-8666-666666666666")


@dataclass
class TokenIssuer:
    """Signs tokens and publishes its keys."""

    name: str = ISSUER
    key: Any = field(default_factory=lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048))
    key_id: str = "key-1"

    @property
    def algorithm(self) -> str:
        return "ES256" if isinstance(self.key, ec.EllipticCurvePrivateKey) else "RS256"

    @property
    def jwk(self) -> dict[str, Any]:
        algorithm = jwt.get_algorithm_by_name(self.algorithm)
        jwk = algorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {**jwk, "kid": self.key_id, "use": "sig", "alg": self.algorithm}

    @property
    def published(self) -> PublishedKeys:
        return PublishedKeys(self.name, json.dumps({"keys": [self.jwk]}).encode())

    def rotated(self, key_id: str) -> TokenIssuer:
        return replace(self, key=ec.generate_private_key(ec.SECP256R1()), key_id=key_id)

    def claims(self, pod: Pod, audience: str, **changes: Any) -> dict[str, Any]:
        """Return the claims of a token that the kubelet requests for a volume; a change to None omits the claim."""
        now = int(time.time())
        claims = {
            "iss": self.name,
            "aud": [audience],
            "sub": pod.username,
            "exp": now + 3600,
            "iat": now,
            "nbf": now,
            "jti": "55555555-5555-4555-8555-555555555555",
            "kubernetes.io": {
                "namespace": pod.namespace,
                "node": {"name": pod.node, "uid": pod.node_uid},
                "pod": {"name": pod.name, "uid": pod.uid},
                "serviceaccount": {"name": pod.service_account, "uid": pod.service_account_uid},
            },
        }
        return {name: value for name, value in {**claims, **changes}.items() if value is not None}

    def sign(self, claims: dict[str, Any], **headers: Any) -> Secret[str]:
        """Return a token with these claims; ``headers`` extend or replace the default headers."""
        return Secret(jwt.encode(claims, self.key, algorithm=self.algorithm, headers={"kid": self.key_id, **headers}))

    def pod_token(self, pod: Pod, **changes: Any) -> Secret[str]:
        return self.sign(self.claims(pod, POD_AUDIENCE, **changes))

    def node_token(self, pod: Pod = DRIVER, **changes: Any) -> Secret[str]:
        return self.sign(self.claims(pod, NODE_AUDIENCE, **changes))

    def controller_token(self, pod: Pod = CONTROLLER, **changes: Any) -> Secret[str]:
        return self.sign(self.claims(pod, SECRETS_AUDIENCE, **changes))
