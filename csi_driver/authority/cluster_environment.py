"""The environment of an authority in a cluster. Import it there only: the HTTP client needs 10 MB of memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Mapping, Sequence

from prometheus_client import CollectorRegistry

from csi_driver.authority.csr_api import CSRApi
from csi_driver.authority.diagnostics import DiagnosticCheck, permission_checks
from csi_driver.authority.environment import Environment
from csi_driver.authority.events.recorder import PodEventRecorder
from csi_driver.authority.issuers.dependencies import CredentialReader, IssuerDependencies, ReadSecret
from csi_driver.authority.pod_certificates.api import ROOTS_LABEL, PodCertificateApi, PodSigner
from csi_driver.authority.policy.subjects import ClusterSubjectLookup
from csi_driver.authority.trust.acknowledgements import ACKNOWLEDGEMENTS_SECRET
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.events.recorder import ObjectEventRecorder
from csi_driver.kube.client import ObjectName
from csi_driver.kube.cluster_cache import ClusterCache
from csi_driver.kube.connection import Api, in_cluster_configuration
from csi_driver.kube.csr.client import KubernetesCSRClient
from csi_driver.kube.events import EventClient
from csi_driver.kube.ingress import IngressRoutes
from csi_driver.kube.permissions import (
    POD_SIGNER_LEASE,
    SIGNER_LEASE,
    find_object,
    has_permission,
    needed_permissions,
    pod_signer_permissions,
)
from csi_driver.kube.pod_certificates.client import PodCertificateRequestClient
from csi_driver.kube.pod_certificates.root_config_maps import RootConfigMapClient
from csi_driver.kube.pod_certificates.trust_bundles import TrustBundleClient, bundle_name
from csi_driver.kube.stored_objects import ConfigMapPublisher, LeaseClient, SecretStore
from csi_driver.kube.tokens import TokenKeyClient, TokenReviewClient
from csi_driver.kube.uncached_reads import CSINodeClient, PodClient
from csi_driver.telemetry.authority_metrics import ClusterMetrics

ACME_SERVICE, ACME_PORT = "certmount-acme", 80
"""The Service in the authority's namespace that receives the HTTP-01 requests of Ingresses (docs/acme.md)."""


@contextlib.asynccontextmanager
async def open_cluster_environment(
    ca_secret: tuple[str, str],
    root_config_map: tuple[str, str],
    registry: CollectorRegistry,
    pod_signers: Sequence[PodSigner] = (),
) -> AsyncIterator[Environment]:
    """Connect to the API server; ``pod_signers`` are only for the checks. Raises CertmountError TokenReviewUnavailable outside a cluster."""
    namespace, pod_name = ca_secret[0], socket.gethostname()
    ca, root = ObjectName("Secret", *ca_secret), ObjectName("ConfigMap", *root_config_map)
    acknowledgements = ObjectName("Secret", namespace, ACKNOWLEDGEMENTS_SECRET)
    lease, pod_lease = (ObjectName("Lease", namespace, name) for name in (SIGNER_LEASE, POD_SIGNER_LEASE))
    # TokenReviews have their own connections, so that thousands of pods cannot block the renewal of the CA. Watches have
    # their own connections because they never release them.
    async with (
        Api(in_cluster_configuration()) as reviews,
        Api(in_cluster_configuration()) as watches,
        Api(in_cluster_configuration()) as api,
        cluster_secrets() as read_secret,
    ):
        cache = ClusterCache(watches)
        metrics = ClusterMetrics(registry, cache.failing_s)
        events = PodEventRecorder(ObjectEventRecorder(EventClient(api, pod_name), metrics))
        csrs, find_pod = KubernetesCSRClient(api, watches), PodClient(api).find
        permissions = needed_permissions(ca, acknowledgements, root)
        yield Environment(
            ca_store=SecretStore(api, ca),
            acknowledgement_store=SecretStore(api, acknowledgements),
            publisher=ConfigMapPublisher(api, root),
            fetch_keys=TokenKeyClient(api).fetch,
            reviewer=TokenReviewClient(reviews),
            subjects=ClusterSubjectLookup(cache.pods, cache.services, cache.namespaces, cache.outdated, find_pod),
            events=events,
            nodes=lambda _: CSINodeClient(api),
            issuer_dependencies=_issuer_dependencies(api, read_secret, namespace),
            checks=[
                *(_existence_check(api, name) for name in (ca, acknowledgements, root, lease)),
                *permission_checks(permissions, functools.partial(has_permission, api)),
                *(_pod_signer_checks(api, pod_lease, [signer.name for signer in pod_signers]) if pod_signers else ()),
            ],
            run=functools.partial(_run, cache, events),
            outdated=cache.outdated,
            csr_api=CSRApi(csrs, find_pod, LeaseClient(api, lease), pod_name),
            pod_certificate_api=PodCertificateApi(
                PodCertificateRequestClient(api, watches),
                functools.partial(TrustBundleClient, api),
                find_pod,
                RootConfigMapClient(api),
                functools.partial(cache.namespaces.labelled, *ROOTS_LABEL),
                LeaseClient(api, pod_lease),
                pod_name,
            ),
        )


async def _run(cache: ClusterCache, events: PodEventRecorder) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(cache.run(), name="watches")
        tasks.create_task(events.run(), name="events")


def _issuer_dependencies(api: Api, read_secret: ReadSecret, namespace: str) -> IssuerDependencies:
    return IssuerDependencies(
        CredentialReader(read_secret),
        lambda namespace, name: SecretStore(api, ObjectName("Secret", namespace, name)),
        lambda ingress_class: IngressRoutes(api, namespace, ACME_SERVICE, ACME_PORT, ingress_class),
    )


def _pod_signer_checks(api: Api, lease: ObjectName, signers: Sequence[str]) -> list[DiagnosticCheck]:
    needed = pod_signer_permissions(lease.namespace, signers, bundle_name(signers[0], DEFAULT_ISSUER))
    hint = "apply the component deploy/components/pod-certificates, and add the signer name to its role"
    return [_existence_check(api, lease), *permission_checks(needed, functools.partial(has_permission, api), hint)]


def _existence_check(api: Api, name: ObjectName) -> DiagnosticCheck:
    async def run() -> str:
        await find_object(api, name)
        return "exists"

    return DiagnosticCheck(str(name), run)


@contextlib.asynccontextmanager
async def cluster_secrets() -> AsyncIterator[ReadSecret]:
    """Open a connection that reads issuer credentials from Secrets; each needs the permission ``get`` on its name only."""
    async with Api(in_cluster_configuration()) as api:

        async def read_secret(namespace: str, name: str) -> Mapping[str, Secret[bytes]]:
            return (await SecretStore(api, ObjectName("Secret", namespace, name)).load()).values

        yield read_secret
