"""Authenticate the node driver or Secrets controller that calls, and the pod whose token a node driver sends."""

from __future__ import annotations

from dataclasses import dataclass

from csi_driver.authority.authn.token_review_cache import (
    CONTROLLER_TOKEN,
    NODE_TOKEN,
    POD_TOKEN,
    TokenKind,
    TokenReviewCache,
)
from csi_driver.authority.authn.token_verifier import token_rejected
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.secret import Secret


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Accepts a token of a caller only from its service account, and a pod token only from the pod's own node."""

    reviews: TokenReviewCache
    node_account: ServiceAccount
    secrets_account: ServiceAccount | None = None  # None: the authority does not serve the Secrets controller

    async def authenticate_node(self, token: Secret[str]) -> PodIdentity:
        """Return the identity of the calling driver's pod; raises CertmountError as :meth:`TokenReviewCache.review`."""
        hint = "set the authority's --node-service-account to the service account of the node driver"
        return await self._authenticate_caller(token, NODE_TOKEN, self.node_account, hint)

    async def authenticate_controller(self, token: Secret[str]) -> PodIdentity:
        """Return the identity of the Secrets controller's pod; raises CertmountError likewise."""
        hint = "set the authority's --secrets-service-account to the service account of the Secrets controller"
        return await self._authenticate_caller(token, CONTROLLER_TOKEN, self.secrets_account, hint)

    async def _authenticate_caller(
        self, token: Secret[str], kind: TokenKind, account: ServiceAccount | None, hint: str
    ) -> PodIdentity:
        def check_account(caller: PodIdentity) -> None:
            if caller.service_account != account:
                problem = f"belongs to service account {caller.service_account}; expected {account or 'none'}"
                raise token_rejected(kind.name, problem, hint)

        return await self.reviews.review(token, kind, check_account)

    async def authenticate_pod(self, token: Secret[str], node: PodIdentity) -> PodIdentity:
        """Return the identity of a pod on the node of the calling driver; raises CertmountError likewise."""

        def check_node(pod: PodIdentity) -> None:
            if (pod.node_name, pod.node_uid) != (node.node_name, node.node_uid):
                problem = f"belongs to a pod on node {pod.node_name}, but the driver on node {node.node_name} sent it"
                hint = (
                    "" if pod.node_name != node.node_name else "the node was deleted and created again with this name"
                )
                raise token_rejected(POD_TOKEN.name, problem, hint)

        return await self.reviews.review(token, POD_TOKEN, check_node)
