"""Authentication of node drivers and pods."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.authority.authn.authenticator import Authenticator, OfflineReviewer, TokenReviewCache
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import ServiceAccount
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import DRIVER, Pod, TokenIssuer

POD = Pod()
OTHER_UID = "66666666-6666-4666-8666-666666666666"


@pytest.fixture
def authenticator(keys: TokenKeys, metrics: AuthorityMetrics) -> Authenticator:
    reviews = TokenReviewCache(TokenVerifier(keys), OfflineReviewer(), metrics)
    return Authenticator(reviews, ServiceAccount("certmount", "certmount-node"))


async def test_driver_on_the_pods_node_is_authenticated(authenticator: Authenticator, issuer: TokenIssuer) -> None:
    node = await authenticator.authenticate_node(issuer.node_token())
    assert (await authenticator.authenticate_pod(issuer.pod_token(POD), node)).pod_name == POD.name


@pytest.mark.parametrize(
    "caller",
    [
        replace(DRIVER, service_account="default"),
        replace(DRIVER, namespace="kube-system"),
        replace(DRIVER, namespace="default", service_account="hello"),
    ],
    ids=["other account", "other namespace", "a pod's own"],
)
async def test_only_the_node_drivers_service_account_can_call(
    caller: Pod, authenticator: Authenticator, issuer: TokenIssuer
) -> None:
    """Any pod can get a token with the authority's audience, so the audience alone proves nothing."""
    with pytest.raises(CertmountError, match=r"^TokenRejected: node token: .* expected certmount/certmount-node"):
        await authenticator.authenticate_node(issuer.node_token(caller))


async def test_pod_token_is_not_accepted_as_node_token(authenticator: Authenticator, issuer: TokenIssuer) -> None:
    """Not even the driver's own pod token, which has another audience."""
    with pytest.raises(CertmountError, match="node token: has another audience; expected certmount-node"):
        await authenticator.authenticate_node(issuer.pod_token(DRIVER))


@pytest.mark.parametrize(
    "pod,words",
    [
        (replace(POD, node="node-b"), "a pod on node node-b, but the driver on node node-a sent it"),
        (replace(POD, node_uid=OTHER_UID), "the node was deleted and created again"),
        (replace(POD, node="node-b", node_uid=OTHER_UID), "on node node-b"),
    ],
    ids=["name", "UID", "both"],
)
async def test_stolen_pod_token_is_rejected_on_another_node(
    pod: Pod, words: str, authenticator: Authenticator, issuer: TokenIssuer
) -> None:
    """Name and UID of the node must match: a new node with the name of an old one does not get its pods."""
    node = await authenticator.authenticate_node(issuer.node_token())
    with pytest.raises(CertmountError, match=rf"^TokenRejected: .*{words}"):
        await authenticator.authenticate_pod(issuer.pod_token(pod), node)
