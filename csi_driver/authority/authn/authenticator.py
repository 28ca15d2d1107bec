"""Authenticate the node driver that calls and the pod whose token it sends."""

from __future__ import annotations

from csi_driver import NODE_AUDIENCE, POD_AUDIENCE
from csi_driver.authority.authn.token_reviews import TokenReviewCache
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.secret import Secret

_POD_TOKEN, _NODE_TOKEN = "pod token", "node token"


class Authenticator:
    """Accepts a node token only from the node driver's service account, and a pod token only from the pod's own node."""

    def __init__(self, reviews: TokenReviewCache, node_account: ServiceAccount) -> None:
        self._reviews = reviews
        self._node_account = node_account

    async def authenticate_node(self, token: Secret[str]) -> PodIdentity:
        """Return the identity of the calling driver's pod; raises CertmountError as :meth:`TokenReviewCache.review`."""
        driver = await self._reviews.review(token, NODE_AUDIENCE, _NODE_TOKEN)
        if driver.service_account != self._node_account:
            problem = f"belongs to service account {driver.service_account}; expected {self._node_account}"
            hint = "set the authority's --node-service-account to the service account of the node driver"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(_NODE_TOKEN, problem, hint))
        return driver

    async def authenticate_pod(self, token: Secret[str], node: PodIdentity) -> PodIdentity:
        """Return the identity of a pod that runs on the node of the calling driver.

        Raises CertmountError as :meth:`TokenReviewCache.review`, and TokenRejected if the pod is on another node.
        """
        pod = await self._reviews.review(token, POD_AUDIENCE, _POD_TOKEN)
        if (pod.node_name, pod.node_uid) != (node.node_name, node.node_uid):
            problem = f"belongs to a pod on node {pod.node_name}, but the driver on node {node.node_name} sent it"
            hint = "" if pod.node_name != node.node_name else "the node was deleted and created again with this name"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(_POD_TOKEN, problem, hint))
        return pod
