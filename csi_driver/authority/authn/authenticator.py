"""Who asks: a pod, proven by its own token and by the token of our driver on that very node."""

from __future__ import annotations

from csi_driver import NODE_AUDIENCE, POD_AUDIENCE
from csi_driver.authority.authn.token_reviews import TokenReviewCache
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.secret import Secret

_POD_TOKEN, _NODE_TOKEN = "pod token", "node token"


class Authenticator:
    """The rules by which proven identities may ask."""

    def __init__(self, proofs: TokenReviewCache, node_account: ServiceAccount) -> None:
        self._proofs = proofs
        self._node_account = node_account

    async def prove_node(self, token: Secret[str]) -> PodIdentity:
        """The driver's own pod, which calls; raises CertmountError as :meth:`TokenReviewCache.prove`."""
        caller = await self._proofs.prove(token, NODE_AUDIENCE, _NODE_TOKEN)
        if caller.service_account != self._node_account:
            problem = f"is of service account {caller.service_account}, not of the node driver's {self._node_account}"
            hint = "the authority's --node-service-account names it"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(_NODE_TOKEN, problem, hint))
        return caller

    async def prove_pod(self, token: Secret[str], node: PodIdentity) -> PodIdentity:
        """The pod whose token the driver on ``node`` shows; refused unless the pod runs on that very node."""
        pod = await self._proofs.prove(token, POD_AUDIENCE, _POD_TOKEN)
        if (pod.node_name, pod.node_uid) != (node.node_name, node.node_uid):
            problem = f"is of a pod on node {pod.node_name}, but the driver on node {node.node_name} shows it"
            hint = "" if pod.node_name != node.node_name else "the node was made anew under its old name"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(_POD_TOKEN, problem, hint))
        return pod
