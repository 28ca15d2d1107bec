"""Which proven identities may ask, and for whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from csi_driver.authority.authn.authenticator import Authenticator
from csi_driver.authority.authn.token_keys import TokenKeys
from csi_driver.authority.authn.token_reviews import OfflineReviewer, TokenReviewCache
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import ServiceAccount
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.tokens import DRIVER, Pod, TokenIssuer

POD = Pod()


@pytest.fixture
def admission(keys: TokenKeys, metrics: AuthorityMetrics) -> Authenticator:
    proofs = TokenReviewCache(TokenVerifier(keys), OfflineReviewer(), metrics)
    return Authenticator(proofs, ServiceAccount("certmount", "certmount-node"))


async def test_the_driver_of_the_pods_own_node_may_ask(admission: Authenticator, issuer: TokenIssuer) -> None:
    """Both tokens name the same node."""
    node = await admission.prove_node(issuer.node_token())
    assert (await admission.prove_pod(issuer.pod_token(POD), node)).pod_name == POD.name


@pytest.mark.parametrize(
    "caller",
    [
        replace(DRIVER, service_account="default"),
        replace(DRIVER, namespace="kube-system"),
        replace(DRIVER, namespace="default", service_account="hello"),
    ],
    ids=["other account", "other namespace", "a pod's own"],
)
async def test_only_the_node_drivers_service_account_may_call(
    caller: Pod, admission: Authenticator, issuer: TokenIssuer
) -> None:
    """Any pod can have a token for our audience, so the audience alone proves nothing."""
    with pytest.raises(CertmountError, match="not of the node driver's certmount/certmount-node") as refusal:
        await admission.prove_node(issuer.node_token(caller))
    assert refusal.value.reason is Reason.TOKEN_REJECTED


async def test_a_pod_token_does_not_open_the_door(admission: Authenticator, issuer: TokenIssuer) -> None:
    """Not even the driver's own, as it is for another audience."""
    with pytest.raises(CertmountError, match="node token: is for another audience than certmount-node"):
        await admission.prove_node(issuer.pod_token(DRIVER))


@pytest.mark.parametrize(
    "pod,words",
    [
        (replace(POD, node="node-b"), "is of a pod on node node-b, but the driver on node node-a shows it"),
        (replace(POD, node_uid="66666666-6666-4666-8666-666666666666"), "made anew under its old name"),
        (replace(POD, node="node-b", node_uid="66666666-6666-4666-8666-666666666666"), "on node node-b"),
    ],
    ids=["name", "uid", "both"],
)
async def test_a_stolen_pod_token_is_worthless_on_another_node(
    pod: Pod, words: str, admission: Authenticator, issuer: TokenIssuer
) -> None:
    """Name and uid of the node must be equal: a node that takes over a name does not take over its pods."""
    node = await admission.prove_node(issuer.node_token())
    with pytest.raises(CertmountError, match=words) as refusal:
        await admission.prove_pod(issuer.pod_token(pod), node)
    assert refusal.value.reason is Reason.TOKEN_REJECTED
