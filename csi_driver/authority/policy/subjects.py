"""Find what policy rules match: an authenticated pod or Secret, its namespace's labels and the Services that select it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from csi_driver.authority.csr_api import FindPod
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.identity import PodIdentity, SecretIdentity
from csi_driver.core.names import Names
from csi_driver.core.policy.engine import PolicySubject
from csi_driver.kube.object_caches import NamespaceCache, PodCache, ServiceCache

_WAIT_S = 5.0  # a watch lags by milliseconds; the driver retries if a pod takes longer to arrive


class PolicySubjectLookup(Protocol):
    """Finds the policy subject of a pod that requests names, or of a Secret.

    Raises CertmountError PodNotFound if the watches have not delivered the pod or the namespace, TokenReviewUnavailable if
    they are outdated, ShareExceeded if the caches ignore objects of the namespace because it exceeds its share, and
    TokenRejected if the pod UID belongs to another namespace.
    """

    async def find(self, pod: PodIdentity, names: Names, /) -> PolicySubject: ...

    async def find_secret(self, secret: SecretIdentity) -> PolicySubject: ...


@dataclass(frozen=True, slots=True)
class ClusterSubjectLookup:
    """Finds subjects in caches that watches keep current, so that a request causes no call to the API server.

    The exception is a pod that requests its own name below a headless Service: the watch does not send its hostname.
    """

    pods: PodCache
    services: ServiceCache
    namespaces: NamespaceCache
    outdated: Callable[[], Sequence[str]]  # returns why the caches must not be used now, or nothing
    find_pod: FindPod
    wait_s: float = _WAIT_S

    async def find(self, pod: PodIdentity, names: Names, /) -> PolicySubject:
        if reasons := self.outdated():
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, *reasons)
        namespace = pod.service_account.namespace
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.wait_s
        known = await self.pods.wait(pod.pod_uid, 0 if self.pods.refusal(namespace) else self.wait_s)
        if known is None:
            raise self.pods.refusal(namespace) or _not_found(str(pod))
        if known.namespace != namespace:
            problem = f"the API server has this UID in namespace {known.namespace}"
            raise CertmountError(Reason.TOKEN_REJECTED, Fault(str(pod), problem))
        labels = await self._labels(namespace, deadline - loop.time())
        if refusal := self.services.refusal(namespace):
            raise refusal
        services = self.services.select(namespace, known.labels)
        return PolicySubject(pod, labels, services, await self._governing_service(pod, services, names))

    async def find_secret(self, secret: SecretIdentity) -> PolicySubject:
        if reasons := self.outdated():
            raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, *reasons)
        return PolicySubject(secret, await self._labels(secret.namespace, self.wait_s))

    async def _governing_service(self, pod: PodIdentity, services: Sequence[str], names: Names) -> str:
        """Return the Service below which DNS has a record with the pod's name, as of a StatefulSet; empty if there is none.

        The record requires that the pod has this hostname, and as its subdomain a headless Service that selects it.
        """
        namespace, name = pod.service_account.namespace, pod.pod_name
        requested = {
            dns.text.removeprefix(f"{name}.").partition(".")[0] for dns in names.dns if dns.text.startswith(f"{name}.")
        }
        candidates = [
            service for service in services if service in requested and self.services.is_headless(namespace, service)
        ]
        found = await self.find_pod(namespace, name) if candidates else None
        if found is None or found.uid != pod.pod_uid or found.hostname != name or found.subdomain not in candidates:
            return ""
        return found.subdomain

    async def _labels(self, namespace: str, wait_s: float) -> Mapping[str, str]:
        labels = await self.namespaces.wait(namespace, wait_s)
        if labels is None:
            raise self.namespaces.refusal(namespace) or _not_found(f"namespace {namespace}")
        return labels


class OfflineSubjectLookup:
    """Returns subjects without labels and Services, for an authority without a cluster."""

    async def find(self, pod: PodIdentity, _names: Names, /) -> PolicySubject:
        return PolicySubject(pod)

    async def find_secret(self, secret: SecretIdentity) -> PolicySubject:
        return PolicySubject(secret)


def _not_found(what: str) -> CertmountError:
    problem = "the API server has not reported it to the authority yet"
    return CertmountError(Reason.POD_NOT_FOUND, Fault(what, problem, "the driver retries"))
