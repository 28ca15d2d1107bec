"""Versions of Kubernetes that serve the API in v1beta1 or not at all, and the trust bundles during a CA rotation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import CollectorRegistry

from csi_driver.authority import cluster_environment
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.rotation import Acknowledgements
from csi_driver.authority.diagnostics import run_checks
from csi_driver.authority.pod_certificates import namespaces, publisher
from csi_driver.authority.pod_certificates.api import PodSigner
from csi_driver.authority.pod_certificates.publisher import BundlePublisher, PublishedAcknowledgements
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.cluster.pod_certificates import PodCertificateDecision, PodCertificateRequest
from csi_driver.core.formats.pem import encode_der_certificates
from csi_driver.kube.connection import Api
from csi_driver.kube.pod_certificates import client
from csi_driver.kube.pod_certificates.root_config_maps import RootConfigMapClient
from csi_driver.kube.pod_certificates.trust_bundles import TrustBundleClient
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.integration.authority.pod_certificates import (
    BUNDLES,
    SIGNER,
    Cluster,
    TestPod,
    authority_configuration,
    chain_of,
    condition,
    public_key_spec,
    running_authority,
)
from tests.integration.authority.test_pod_certificates import BUNDLE, VERSION, run
from tests.support.kubernetes_api import ADMIN, Rejected, running_api
from tests.support.requirements import require_kubernetes
from tests.support.waiting import in_background, until
from tests.unit.core import pki

OLDER = "1.34.4"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from _cluster(tmp_path_factory.mktemp("api"), VERSION, "--runtime-config=certificates.k8s.io/v1beta1=true")


@pytest.fixture
def older_cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield from _cluster(tmp_path, OLDER)


def _cluster(directory: Path, version: str, *arguments: str) -> Iterator[Cluster]:
    with running_api(require_kubernetes(version), directory, arguments) as api:
        cluster = Cluster(api)
        (directory / "overlay").mkdir()
        cluster.install(directory / "overlay")
        yield cluster


async def test_v1beta1_is_used_if_v1_is_not_served(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet 1.35 sends a public key with a proof of possession instead of a CSR."""
    monkeypatch.setattr(client, "_VERSIONS", ("v2", "v1beta1"))
    beta = Cluster(cluster.api, "v1beta1")
    pod = await run(beta.create_pod, "beta")
    key = ec.generate_private_key(ec.SECP256R1())
    async with running_authority(beta, tmp_path):
        with_key = await run(beta.finished, await run(beta.request, pod, **public_key_spec(pod, key)))
        with_csr = await run(beta.finished, await run(beta.request, pod))
        large = ec.generate_private_key(ec.SECP521R1())
        with_large_key = await run(beta.finished, await run(beta.request, pod, **public_key_spec(pod, large)))
    assert chain_of(with_key)[0].public_key() == key.public_key()
    assert condition(with_csr)[0] == "Issued"
    assert condition(with_large_key)[:2] == ("Issued", "PolicyAllows")


async def test_older_cluster_logs_one_line_and_the_rest_works(
    older_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "authority"
    directory.mkdir()
    async with running_authority(older_cluster, directory) as authority:
        await until(lambda: not authority.unready(), "a ready authority")
        await asyncio.sleep(2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "does not serve" in line]
    assert [line.count("PodCertificateRequests") for line in lines if "PodCertificateRequests" in line] == [1]
    assert len(lines) == 2


async def test_labelled_namespace_of_an_older_cluster_gets_a_config_map(
    older_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its role allows that. Another namespace has only the label, and delays nothing."""
    monkeypatch.setattr(namespaces, "_INTERVAL_S", 0.1)
    directory = tmp_path / "authority"
    directory.mkdir()
    for name in ("bank", "web"):
        labels = {"certmount.dev/roots": "true"}
        await run(older_cluster.api.call, "POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    await run(older_cluster.permit_roots, tmp_path / "namespace", "web")
    with structlog.testing.capture_logs() as logs:
        async with running_authority(older_cluster, directory):
            await until(lambda: [log for log in logs if log["event"] == "roots written"], "the roots")
            await asyncio.sleep(1)  # ten further rounds
    path = "/api/v1/namespaces/web/configmaps/certmount-roots"
    found = (await run(older_cluster.api.call, "GET", path))["data"]
    published = await run(older_cluster.api.call, "GET", "/api/v1/namespaces/certmount/configmaps/certmount-root")
    assert found == {"internal.crt": published["data"]["root.crt"]}
    (rejected,) = [log for log in logs if log["event"] == "roots not written"]
    assert (rejected["namespace"], "HTTP 403" in rejected["error"]) == ("bank", True)
    # Another leader does not know all root sets yet, and later that one of them is removed.
    async with Api((await authority_configuration(older_cluster))()) as api:
        writer = RootConfigMapClient(api)
        for data, keys in (
            ({"internal.crt": "a", "corporate.crt": "b"}, {"internal.crt", "corporate.crt"}),
            ({"internal.crt": "c"}, {"internal.crt", "corporate.crt"}),
            ({"internal.crt": "c", "corporate.crt": None}, {"internal.crt"}),
        ):
            await writer.write("web", data)
            assert (await run(older_cluster.api.call, "GET", path))["data"].keys() == keys


async def test_check_finds_the_permissions_of_the_component(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """``certmount authority --check`` with a signer name that the role does not have."""
    configuration = await authority_configuration(cluster)
    monkeypatch.setattr(cluster_environment, "in_cluster_configuration", configuration)
    objects = ("certmount", "certmount-ca"), ("certmount", "certmount-root")
    signers = PodSigner(SIGNER), PodSigner("certmount.dev/other", "other")
    opened = cluster_environment.open_cluster_environment(*objects, CollectorRegistry(), signers)
    async with opened as environment:
        findings = await run_checks(environment.checks)
    (failed,) = [finding for finding in findings if not finding.ok]
    assert str(failed) == (
        "FAIL permission to sign signers.certificates.k8s.io certmount.dev/other: InvalidRequest: sign "
        "signers.certificates.k8s.io certmount.dev/other: is not permitted; apply the component "
        "deploy/components/pod-certificates, and add the signer name to its role"
    )


async def test_decision_is_written_once(cluster: Cluster) -> None:
    """Another client can change or delete the request between the watch and the write."""
    pod = await run(cluster.create_pod, "once")
    paths = [await run(cluster.request, pod) for _ in range(2)]
    denial = PodCertificateDecision("Denied", "ByTest", "the first decision")
    async with Api((await authority_configuration(cluster))()) as api:
        requests = client.PodCertificateRequestClient(api, api)
        await requests.find_version()
        known, deleted = [await _read(cluster, path, pod) for path in paths]
        label = {"metadata": {"labels": {"changed": "yes"}}}
        await run(cluster.api.call, "PATCH", paths[0], label, ADMIN, "application/merge-patch+json")
        assert await requests.finish(known, denial)
        assert not await requests.finish(known, replace(denial, message="the second"))
        assert condition(await run(cluster.status, paths[0]))[2] == "the first decision"
        await run(cluster.api.call, "DELETE", paths[1])
        assert not await requests.finish(deleted, denial)


async def _read(cluster: Cluster, path: str, pod: TestPod) -> PodCertificateRequest:
    metadata = (await run(cluster.api.call, "GET", path))["metadata"]
    names = metadata["namespace"], metadata["name"], metadata["uid"], metadata["resourceVersion"]
    return PodCertificateRequest(*names, SIGNER, pod.name, pod.uid, pod.account, pod.node, timedelta(days=1), b"")


@dataclass
class NoNodes:
    """No node has the driver, so nothing else delays a rotation."""

    async def read(self, _generation: int) -> Acknowledgements:
        return Acknowledgements(frozenset(), frozenset())


async def test_rotation_waits_until_the_new_root_is_in_the_bundle_for_some_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_INTERVAL_S", 0.1)
    old, new = (make_keyring(pki.NOW) for _ in range(2))
    trust = TrustBundles(AuthorityMetrics(CollectorRegistry()))
    trust.set_roots("internal", RootSet(old.roots_der, 1))
    now = 0.0
    async with Api((await authority_configuration(cluster))()) as api:
        bundles = TrustBundleClient(api, SIGNER)
        await bundles.delete("v1", "internal")  # of another test's authority
        gate = PublishedAcknowledgements(NoNodes(), bundles, list, lambda: now)
        async with in_background(BundlePublisher(bundles, trust, "internal".__eq__).run()):
            await _until_published(cluster, old.roots_der)
            assert (await gate.read(2)).missing == {"ClusterTrustBundle"}
            trust.set_roots("internal", RootSet((*old.roots_der, *new.roots_der), 2))
            await _until_published(cluster, (*old.roots_der, *new.roots_der))
            assert (await gate.read(2)).missing == {"ClusterTrustBundle"}, "kubelets need time to update volumes"
            now = publisher.SETTLE_S - 1
            assert (await gate.read(2)).missing
            now = publisher.SETTLE_S
            assert not (await gate.read(2)).missing
            trust.set_roots("internal", RootSet(new.roots_der, 3))  # the old root ended
            await _until_published(cluster, new.roots_der)
            # A replica that has not read the last change must not bring back the root that ended.
            outdated = TrustBundles(AuthorityMetrics(CollectorRegistry()))
            outdated.set_roots("internal", RootSet((*old.roots_der, *new.roots_der), 2))
            async with in_background(BundlePublisher(bundles, outdated, "internal".__eq__).run()):
                await asyncio.sleep(1)  # ten of its attempts
            await _until_published(cluster, new.roots_der)
            # Another client deletes the bundle.
            await run(cluster.api.call, "DELETE", BUNDLE)
            await _until_published(cluster, new.roots_der)


async def test_bundle_of_a_removed_federation_is_deleted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The role names each bundle, so the API server rejects others, and the log has one line about it."""
    monkeypatch.setattr(publisher, "_INTERVAL_S", 0.1)
    rule = {"apiGroups": ["certificates.k8s.io"], "resources": ["clustertrustbundles"]}
    names = {"resourceNames": ["certmount.dev:pod:partner"], "verbs": ["get", "create", "patch", "delete"]}
    await run(cluster.grant, "e2e-partner", [{**rule, **names}], "ServiceAccount", "certmount-authority")
    trust = TrustBundles(AuthorityMetrics(CollectorRegistry()))
    roots = RootSet(make_keyring(pki.NOW).roots_der, 100)
    for name in ("internal", "partner", "stranger"):
        trust.set_roots(name, roots)
    with contextlib.suppress(Rejected):
        await run(cluster.api.call, "DELETE", BUNDLE)
    other = {"metadata": {"name": "example.org"}, "spec": {"trustBundle": pem_of(roots.roots)}}
    await run(cluster.api.call, "POST", BUNDLES, other)
    async with Api((await authority_configuration(cluster))()) as api:
        one = BundlePublisher(TrustBundleClient(api, SIGNER), trust, "internal".__eq__)
        with structlog.testing.capture_logs() as logs:
            async with in_background(one.run()):
                await _until_bundles(
                    cluster, {"certmount.dev:pod:internal", "certmount.dev:pod:partner", "example.org"}
                )
                trust.remove_roots("partner")
                await _until_bundles(cluster, {"certmount.dev:pod:internal", "example.org"})
    (rejected,) = [log for log in logs if log["log_level"] == "warning"]
    assert (rejected["root_set"], "HTTP 403" in rejected["error"]) == ("stranger", True)


def pem_of(roots: tuple[bytes, ...]) -> str:
    return encode_der_certificates(roots).decode()


async def _until_published(cluster: Cluster, roots: tuple[bytes, ...]) -> None:
    await run(cluster.wait_for_bundles, lambda found: found.get("certmount.dev:pod:internal") == pem_of(roots))


async def _until_bundles(cluster: Cluster, names: set[str]) -> None:
    await run(cluster.wait_for_bundles, lambda found: set(found) == names)
