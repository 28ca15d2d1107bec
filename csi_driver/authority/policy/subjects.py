"""From a proven pod to what policy is applied to: the pod with its namespace's labels and the Services that select it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import PolicySubject
from csi_driver.kube.namespaces import Namespaces
from csi_driver.kube.pods import Pods
from csi_driver.kube.services import Services

_PATIENCE_S = 5.0
"""For a pod that the API server has not told of yet; a watch is behind by milliseconds, and the kubelet tries again anyway."""


class ClusterSubjects:
    """Looks into caches that watches keep: no request of a pod costs a call to the API server."""

    def __init__(
        self,
        pods: Pods,
        services: Services,
        namespaces: Namespaces,
        outdated: Callable[[], Sequence[str]],
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """``outdated`` says why the caches can't be believed; nothing when they can."""
        self._pods = pods
        self._services = services
        self._namespaces = namespaces
        self._outdated = outdated
        self._patience_s = patience_s

    async def find(self, pod: PodIdentity) -> PolicySubject:
        """The pod as the cluster has it now.

        Raises:
            CertmountError: PodNotFound where the API server has not told of it, TokenReviewUnavailable while the API server
                can't be followed, TokenRejected where it says that the uid is of another namespace's pod.
        """
        if reasons := self._outdated():
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, *reasons)
        namespace = pod.service_account.namespace
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        known = await self._pods.wait(pod.pod_uid, self._patience_s)
        if known is None:
            raise _unknown(str(pod), "the API server has not told the authority of it yet")
        if known.namespace != namespace:
            problem = f"the API server knows its uid in namespace {known.namespace}"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(str(pod), problem))
        labels = await self._namespaces.wait(namespace, deadline - loop.time())
        if labels is None:
            raise _unknown(f"namespace {namespace}", "the API server has not told the authority of it yet")
        return PolicySubject(pod, labels, self._services.select(namespace, known.labels))


class NoCluster:
    """Outside a cluster there are no labels and no Services."""

    async def find(self, pod: PodIdentity) -> PolicySubject:
        """The pod, with nothing said of it."""
        return PolicySubject(pod)


def _unknown(what: str, problem: str) -> CertmountError:
    return CertmountError(Reason.POD_NOT_FOUND, Fault(what, problem, "it is tried again"))
