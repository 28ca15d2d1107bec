"""TokenReviews (authentication.k8s.io/v1): is a token live, and whose is it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kubernetes.aio import client

from csi_driver.core.cluster.token_review import ReviewedToken
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.secret import Secret
from csi_driver.kube.client import TIMEOUT_S, answered

_EXTRA = "authentication.kubernetes.io/"
_MAX_SHOWN = 200


class ClusterReviewer:
    """Asks the API server, without a limit of its own: what waits here makes pods wait."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = client.AuthenticationV1Api(api)

    async def review(self, token: Secret[str], audience: str) -> ReviewedToken:
        """The live token's owner.

        Raises:
            CertmountError: TokenRejected where the API server says no, TokenReviewUnavailable where it can't be asked.
        """
        spec = client.V1TokenReviewSpec(token=token.reveal(), audiences=[audience])
        call = self._api.create_token_review(client.V1TokenReview(spec=spec), _request_timeout=TIMEOUT_S)
        review = await answered(call, Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview")
        status = review.status
        if status is None or not status.authenticated or status.user is None:
            said = _shown(status.error if status is not None else None, token)
            raise CertmountError(Reason.TOKEN_REJECTED, f"the API server does not accept it{said}; its pod may be gone")
        if audience not in (status.audiences or ()):
            raise CertmountError(Reason.TOKEN_REJECTED, f"the API server does not accept it for audience {audience}")
        extra = status.user.extra or {}
        return ReviewedToken(
            username=status.user.username or "",
            uid=status.user.uid or "",
            pod_name=_only(extra, "pod-name"),
            pod_uid=_only(extra, "pod-uid"),
            node_name=_only(extra, "node-name"),
            node_uid=_only(extra, "node-uid"),
        )


def _only(extra: Mapping[str, Sequence[str]], name: str) -> str:
    values = extra.get(_EXTRA + name) or []
    return values[0] if len(values) == 1 else ""


def _shown(error: str | None, token: Secret[str]) -> str:
    """The API server's own reason, unless it quotes the token (its signature is enough to tell)."""
    if not error or token.reveal().rpartition(".")[2] in error:
        return ""
    return f" ({error[:_MAX_SHOWN]})"
