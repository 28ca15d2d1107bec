"""The environment of an authority in a cluster. Import it there only: the kubernetes package needs 25 MB of memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from csi_driver.authority.cluster_secrets import cluster_secrets
from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.diagnostics import DiagnosticCheck, permission_checks
from csi_driver.authority.environment import Environment
from csi_driver.authority.events.recorder import PodEventRecorder
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.issuers.dependencies import IssuerDependencies
from csi_driver.authority.policy.subjects import ClusterSubjectLookup
from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_SECRET
from csi_driver.kube.client import Api, ObjectName, connect, in_cluster_configuration
from csi_driver.kube.cluster_cache import ClusterCache
from csi_driver.kube.csi_nodes import CSINodeClient
from csi_driver.kube.csr_client import KubernetesCSRClient
from csi_driver.kube.events import EventClient
from csi_driver.kube.ingress import IngressRoutes
from csi_driver.kube.permissions import SIGNER_LEASE, find_object, has_permission, needed_permissions
from csi_driver.kube.pod_client import PodClient
from csi_driver.kube.stored_objects import ConfigMapPublisher, LeaseClient, SecretStore
from csi_driver.kube.tokens import TokenKeyClient, TokenReviewClient
from csi_driver.telemetry.cluster_metrics import ClusterMetrics

ACME_SERVICE, ACME_PORT = "certmount-acme", 80
"""The Service in the authority's namespace that receives the HTTP-01 requests of Ingresses (docs/acme.md)."""


@dataclass(frozen=True, slots=True)
class ClusterObjectNames:
    """Kubernetes objects that the authority writes, as (namespace, name)."""

    ca: tuple[str, str]
    """A Secret. The Secret of node acknowledgements is in the same namespace."""
    root: tuple[str, str]
    """A ConfigMap."""


@contextlib.asynccontextmanager
async def open_cluster_environment(
    names: ClusterObjectNames, registry: CollectorRegistry
) -> AsyncIterator[Environment]:
    """Connect to the API server of the cluster that this process runs in.

    Raises:
        CertmountError: TokenReviewUnavailable outside a cluster.
    """
    # TokenReviews have their own connections, so that thousands of pods cannot block the renewal of the CA. Watches have
    # their own connections because they never release them.
    async with (
        connect(in_cluster_configuration()) as reviews,
        connect(in_cluster_configuration()) as watches,
        connect(in_cluster_configuration()) as api,
        cluster_secrets() as read_secret,
    ):
        cache = ClusterCache(watches)
        pod_name = socket.gethostname()
        events = PodEventRecorder(EventClient(api, pod_name), ClusterMetrics(registry, cache.failing_s))

        async def run() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(cache.run(), name="watches")
                tasks.create_task(events.run(), name="events")

        namespace = names.ca[0]
        yield Environment(
            ca_store=SecretStore(api, ObjectName("Secret", *names.ca)),
            acknowledgement_store=SecretStore(api, ObjectName("Secret", namespace, ACKNOWLEDGEMENTS_SECRET)),
            publisher=ConfigMapPublisher(api, ObjectName("ConfigMap", *names.root)),
            fetch_keys=TokenKeyClient(api).fetch,
            reviewer=TokenReviewClient(reviews),
            subjects=ClusterSubjectLookup(cache.pods, cache.services, cache.namespaces, cache.outdated),
            events=events,
            nodes=lambda _: CSINodeClient(api),
            issuer_dependencies=IssuerDependencies(
                CredentialReader(read_secret),
                lambda namespace, name: SecretStore(api, ObjectName("Secret", namespace, name)),
                lambda ingress_class: IngressRoutes(api, namespace, ACME_SERVICE, ACME_PORT, ingress_class),
            ),
            checks=_checks(api, names),
            run=run,
            outdated=cache.outdated,
            csr_api=CSRApi(
                KubernetesCSRClient(api, watches),
                PodClient(api),
                LeaseClient(api, ObjectName("Lease", namespace, SIGNER_LEASE)),
                pod_name,
            ),
        )


def _checks(api: Api, names: ClusterObjectNames) -> list[DiagnosticCheck]:
    """Return a check for each object and each permission."""
    namespace = names.ca[0]
    ca, root = ObjectName("Secret", *names.ca), ObjectName("ConfigMap", *names.root)
    acknowledgements = ObjectName("Secret", namespace, ACKNOWLEDGEMENTS_SECRET)
    objects = (ca, acknowledgements, root, ObjectName("Lease", namespace, SIGNER_LEASE))
    return [
        *(DiagnosticCheck(str(name), functools.partial(_check_object, api, name)) for name in objects),
        *permission_checks(needed_permissions(ca, acknowledgements, root), functools.partial(has_permission, api)),
    ]


async def _check_object(api: Api, name: ObjectName) -> str:
    await find_object(api, name)
    return "exists"
