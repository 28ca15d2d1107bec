"""The surroundings of an authority that runs in a cluster. Imported there only, as the kubernetes package takes 25 MB."""

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
from csi_driver.authority.diagnostics import Check, permission_checks
from csi_driver.authority.environment import Environment
from csi_driver.authority.events.recorder import PodEvents
from csi_driver.authority.issuers.kinds import IssuerDependencies
from csi_driver.authority.issuers.credentials import CredentialReader
from csi_driver.authority.policy.subjects import ClusterSubjects
from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_SECRET
from csi_driver.kube.client import Api, ObjectName, connect, in_cluster_configuration
from csi_driver.kube.config_map import ConfigMapPublisher
from csi_driver.kube.csi_nodes import CsiNodes
from csi_driver.kube.csr_requests import ClusterCSRs
from csi_driver.kube.events import ClusterEvents
from csi_driver.kube.ingress import IngressRoutes
from csi_driver.kube.leases import ClusterLease
from csi_driver.kube.live_pods import LivePods
from csi_driver.kube.permissions import SIGNER_LEASE, find_object, has_permission, needed_permissions
from csi_driver.kube.reviews import ClusterReviewer
from csi_driver.kube.secret_store import SecretStore
from csi_driver.kube.token_keys import ClusterTokenKeys
from csi_driver.kube.view import ClusterView
from csi_driver.telemetry.cluster_metrics import ClusterMetrics

ACME_SERVICE, ACME_PORT = "certmount-acme", 80
"""The Service that Ingresses for HTTP-01 lead to, in the authority's namespace (docs/acme.md)."""


@dataclass(frozen=True, slots=True)
class ClusterObjectNames:
    """What the authority keeps in the cluster, each by (namespace, name)."""

    ca: tuple[str, str]
    """A Secret; beside it lies the one with what nodes have confirmed."""
    root: tuple[str, str]
    """A ConfigMap."""


@contextlib.asynccontextmanager
async def in_a_cluster(objects: ClusterObjectNames, registry: CollectorRegistry) -> AsyncIterator[Environment]:
    """The CA in a Secret, its root in a ConfigMap; tokens by the API server's keys and reviews; pods and Services as it tells.

    Raises:
        CertmountError: TokenReviewUnavailable outside a cluster.
    """
    # Reviews have connections of their own: what thousands of pods ask must not keep the CA from being renewed. So have
    # the watches, which never let go of theirs.
    async with (
        connect(in_cluster_configuration()) as reviews,
        connect(in_cluster_configuration()) as watches,
        connect(in_cluster_configuration()) as api,
        cluster_secrets() as read_secret,
    ):
        view = ClusterView(watches)
        # A pod's host name is its own name.
        events = PodEvents(ClusterEvents(api, socket.gethostname()), ClusterMetrics(registry, view.failing_s))

        async def run() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(view.run(), name="view of the cluster")
                tasks.create_task(events.run(), name="events")

        yield Environment(
            SecretStore(api, ObjectName("Secret", *objects.ca)),
            SecretStore(api, ObjectName("Secret", objects.ca[0], ACKNOWLEDGEMENTS_SECRET)),
            ConfigMapPublisher(api, ObjectName("ConfigMap", *objects.root)),
            ClusterTokenKeys(api).fetch,
            ClusterReviewer(reviews),
            ClusterSubjects(view.pods, view.services, view.namespaces, view.outdated),
            events,
            lambda _: CsiNodes(api),
            IssuerDependencies(
                CredentialReader(read_secret),
                lambda namespace, name: SecretStore(api, ObjectName("Secret", namespace, name)),
                lambda ingress_class: IngressRoutes(api, objects.ca[0], ACME_SERVICE, ACME_PORT, ingress_class),
            ),
            _checks(api, objects),
            run,
            view.outdated,
            CSRApi(
                ClusterCSRs(api, watches),
                LivePods(api),
                ClusterLease(api, ObjectName("Lease", objects.ca[0], SIGNER_LEASE)),
                socket.gethostname(),
            ),
        )


def _checks(api: Api, objects: ClusterObjectNames) -> list[Check]:
    """That the objects are there, and each permission."""
    ca, root = ObjectName("Secret", *objects.ca), ObjectName("ConfigMap", *objects.root)
    confirmations = ObjectName("Secret", objects.ca[0], ACKNOWLEDGEMENTS_SECRET)
    lease = ObjectName("Lease", objects.ca[0], SIGNER_LEASE)
    permissions = needed_permissions(ca, confirmations, root)
    return [
        *(Check(str(name), functools.partial(_presence, api, name)) for name in (ca, confirmations, root, lease)),
        *permission_checks(permissions, functools.partial(has_permission, api)),
    ]


async def _presence(api: Api, name: ObjectName) -> str:
    await find_object(api, name)
    return "there"
