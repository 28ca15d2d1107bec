"""Find what policy rules match: an authenticated pod, its namespace's labels and the Services that select it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import PolicySubject
from csi_driver.kube.object_caches import NamespaceCache, PodCache, ServiceCache

_WAIT_S = 5.0  # a watch lags by milliseconds; the driver retries if a pod takes longer to arrive


class PolicySubjectLookup(Protocol):
    """Finds the policy subject of a pod.

    Raises CertmountError PodNotFound if the watches have not delivered the pod or its namespace, TokenReviewUnavailable if
    they are outdated, and TokenRejected if the pod UID belongs to another namespace.
    """

    async def find(self, pod: PodIdentity) -> PolicySubject: ...


@dataclass(frozen=True, slots=True)
class ClusterSubjectLookup:
    """Finds subjects in caches that watches keep current, so that a request causes no call to the API server."""

    pods: PodCache
    services: ServiceCache
    namespaces: NamespaceCache
    outdated: Callable[[], Sequence[str]]  # returns why the caches must not be used now, or nothing
    wait_s: float = _WAIT_S

    async def find(self, pod: PodIdentity) -> PolicySubject:
        if reasons := self.outdated():
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, *reasons)
        namespace = pod.service_account.namespace
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.wait_s
        known = await self.pods.wait(pod.pod_uid, self.wait_s)
        if known is None:
            raise _not_found(str(pod))
        if known.namespace != namespace:
            problem = f"the API server has this UID in namespace {known.namespace}"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(str(pod), problem))
        labels = await self.namespaces.wait(namespace, deadline - loop.time())
        if labels is None:
            raise _not_found(f"namespace {namespace}")
        return PolicySubject(pod, labels, self.services.select(namespace, known.labels))


class OfflineSubjectLookup:
    """Returns subjects without labels and Services, for an authority without a cluster."""

    async def find(self, pod: PodIdentity) -> PolicySubject:
        return PolicySubject(pod)


def _not_found(what: str) -> CertmountError:
    problem = "the API server has not reported it to the authority yet"
    return CertmountError(Reason.POD_NOT_FOUND, Fault(what, problem, "the driver retries"))
