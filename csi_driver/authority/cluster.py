"""The surroundings of an authority that runs in a cluster. Imported there only, as the kubernetes package takes 25 MB."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from csi_driver.authority.surroundings import Surroundings
from csi_driver.kube.client import ObjectName, connect, in_cluster_configuration
from csi_driver.kube.config_map import ConfigMapPublisher
from csi_driver.kube.reviews import ClusterReviewer
from csi_driver.kube.secret_store import SecretStore
from csi_driver.kube.token_keys import ClusterTokenKeys


@contextlib.asynccontextmanager
async def in_a_cluster(ca_secret: tuple[str, str], root_configmap: tuple[str, str]) -> AsyncIterator[Surroundings]:
    """The CA in a Secret, its root in a ConfigMap; tokens by the API server's keys and reviews. Both names are (namespace, name).

    Raises:
        CertmountError: ProofUnavailable outside a cluster.
    """
    # Reviews have connections of their own: what thousands of pods ask must not keep the CA from being renewed.
    async with connect(in_cluster_configuration()) as reviews, connect(in_cluster_configuration()) as api:
        yield Surroundings(
            SecretStore(api, ObjectName("Secret", *ca_secret)),
            ConfigMapPublisher(api, ObjectName("ConfigMap", *root_configmap)),
            ClusterTokenKeys(api).fetch,
            ClusterReviewer(reviews),
        )
