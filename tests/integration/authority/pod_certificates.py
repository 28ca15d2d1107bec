"""Pods and their certificate requests at a real API server, and an authority that runs with its own permissions there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client import CollectorRegistry

from csi_driver.authority import cluster_environment
from csi_driver.authority.pod_certificates.api import PodSigner
from csi_driver.authority.server import AuthorityServer, AuthoritySettings
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import DNSName, Names
from csi_driver.core.spec import KeyType
from csi_driver.kube.connection import ApiConfiguration, bearer, client_context
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.support.kubernetes_api import KubernetesApi, Rejected
from tests.support.waiting import wait_until

Json = dict[str, Any]
ROOT = Path(__file__).parents[3]
SIGNER = "certmount.dev/pod"
OPEN_SIGNER = "example.test/pod"
"""Also signed by the internal CA, but the admission policy does not protect it, so that tests can forge requests."""
BUNDLES = "/apis/certificates.k8s.io/v1/clustertrustbundles"
POLICY = """
policy:
- match: {namespaces: [web], serviceAccounts: [edge]}
  allow: {dns: ["*.example.com"]}
- match: {namespaces: [web], serviceAccounts: [short]}
  allow: {dns: ["short.example.com"], max_duration: 10m}
"""
KEY = generate_key(KeyType.EC_P256)
_SETUP = [
    ("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}) for name in ("node-a", "node-b")
]


@dataclass(frozen=True)
class TestPod:
    """A pod on a node, as the API server stored it."""

    __test__ = False
    namespace: str
    name: str
    uid: str
    account: str
    account_uid: str
    node: str
    node_uid: str


@dataclass
class Cluster:
    """Objects at the API server. Methods block; use them through :meth:`run` while an authority runs in this loop."""

    api: KubernetesApi
    version: str = "v1"
    _accounts: dict[tuple[str, str], str] = field(default_factory=dict)

    def install(self, directory: Path) -> None:
        base, component = (
            os.path.relpath(ROOT / "deploy" / part, directory) for part in ("base", "components/pod-certificates")
        )
        text = f"kind: Kustomization\nresources: [{base}]\ncomponents: [{component}]\n"
        (directory / "kustomization.yaml").write_text(f"apiVersion: kustomize.config.k8s.io/v1beta1\n{text}")
        self.api.apply(directory)
        for path, item in _SETUP:
            self.api.call("POST", path, item)
        for signer in (OPEN_SIGNER,):
            rules = [
                {
                    "apiGroups": ["certificates.k8s.io"],
                    "resources": ["signers"],
                    "resourceNames": [signer],
                    "verbs": ["sign"],
                },
            ]
            self.grant("e2e-signer", rules, "ServiceAccount", "certmount-authority")
        create = {"apiGroups": ["certificates.k8s.io"], "resources": ["podcertificaterequests"], "verbs": ["create"]}
        self.grant("e2e-requester", [create], "User", "jane")

    def permit_roots(self, directory: Path, namespace: str) -> None:
        """Apply the role for the ConfigMap of a namespace."""
        directory.mkdir()
        component = os.path.relpath(ROOT / "deploy/components/roots-namespace", directory)
        text = f"kind: Kustomization\nnamespace: {namespace}\nresources: [{component}]\n"
        (directory / "kustomization.yaml").write_text(f"apiVersion: kustomize.config.k8s.io/v1beta1\n{text}")
        self.api.apply(directory)

    def grant(self, name: str, rules: list[Json], kind: str, subject: str) -> None:
        group = "/apis/rbac.authorization.k8s.io/v1"
        self.api.call("POST", f"{group}/clusterroles", {"metadata": {"name": name}, "rules": rules})
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
        who: Json = {"kind": kind, "name": subject}
        who |= {"namespace": "certmount"} if kind == "ServiceAccount" else {"apiGroup": "rbac.authorization.k8s.io"}
        self.api.call(
            "POST", f"{group}/clusterrolebindings", {"metadata": {"name": name}, "roleRef": role, "subjects": [who]}
        )

    def account(self, namespace: str, name: str) -> str:
        """Return the UID of a service account, which is created if it does not exist."""
        if (namespace, name) not in self._accounts:
            with contextlib.suppress(Rejected):
                self.api.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
            path = f"/api/v1/namespaces/{namespace}/serviceaccounts"
            with contextlib.suppress(Rejected):
                self.api.call("POST", path, {"metadata": {"name": name}})
            self._accounts[namespace, name] = self.api.call("GET", f"{path}/{name}")["metadata"]["uid"]
        return self._accounts[namespace, name]

    def create_pod(
        self, name: str, account: str = "edge", namespace: str = "web", *, signer: str = SIGNER, node: str = "node-a"
    ) -> TestPod:
        account_uid = self.account(namespace, account)
        source = {
            "podCertificate": {"signerName": signer, "keyType": "ECDSAP256", "credentialBundlePath": "bundle.pem"}
        }
        spec = {
            "serviceAccountName": account,
            "nodeName": node,
            "automountServiceAccountToken": False,
            "containers": [{"name": "app", "image": "app"}],
            "volumes": [{"name": "tls", "projected": {"sources": [source]}}],
        }
        metadata = {"name": name, "labels": {"app": name}}
        pod = self.api.call("POST", f"/api/v1/namespaces/{namespace}/pods", {"metadata": metadata, "spec": spec})
        node_uid = self.api.call("GET", f"/api/v1/nodes/{node}")["metadata"]["uid"]
        return TestPod(namespace, name, pod["metadata"]["uid"], account, account_uid, node, node_uid)

    def delete_pod(self, pod: TestPod) -> None:
        self.api.call("DELETE", f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", {"gracePeriodSeconds": 0})

    def path(self, namespace: str) -> str:
        return f"/apis/certificates.k8s.io/{self.version}/namespaces/{namespace}/podcertificaterequests"

    def request(self, pod: TestPod, *, token: str | None = None, **changes: Any) -> str:
        """Create a request as the kubelet of the pod's node, or with another token; return its path."""
        deadline = time.monotonic() + 10
        body = {"metadata": {"generateName": "req-"}, "spec": spec_of(pod, **changes)}
        while True:
            try:
                created = self.api.call("POST", self.path(pod.namespace), body, token or pod.node)
            except Rejected as error:
                # NodeRestriction reads pods from a cache; its errors about that have another status than Forbidden.
                if error.status == 403 or token or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # between two attempts
            else:
                return f"{self.path(pod.namespace)}/{created['metadata']['name']}"

    def status(self, path: str) -> Json:
        return dict(self.api.call("GET", path).get("status") or {})

    def finished(self, path: str, timeout_s: float = 30) -> Json:
        def finished() -> Json | None:
            status = self.status(path)
            return status if status.get("conditions") else None

        return wait_until(finished, seconds=timeout_s, what=f"the end of {path}", pause=0.05)

    def events(self, pod: TestPod) -> list[tuple[str, str]]:
        found = self.api.call("GET", f"/apis/events.k8s.io/v1/namespaces/{pod.namespace}/events")["items"]
        return [(one["reason"], one["note"]) for one in found if one["regarding"].get("uid") == pod.uid]

    def wait_for_events(self, pod: TestPod) -> list[tuple[str, str]]:
        """Return the events of the pod, as soon as there is one."""
        return wait_until(lambda: self.events(pod), seconds=20, what=f"events of {pod.name}", pause=0.1)

    def bundles(self) -> dict[str, str]:
        """Return the roots in each ClusterTrustBundle, by its name."""
        items = self.api.call("GET", BUNDLES)["items"]
        return {item["metadata"]["name"]: item["spec"]["trustBundle"] for item in items}

    def wait_for_bundles(self, condition: Callable[[dict[str, str]], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition(found := self.bundles()):
            assert time.monotonic() < deadline, f"bundles are {sorted(found)}"
            time.sleep(0.05)  # between two polls; the message shows the bundles, which wait_until would not


def spec_of(
    pod: TestPod,
    *,
    key: PrivateKey | None = None,
    csr: bytes | None = None,
    signer: str = SIGNER,
    annotations: Mapping[str, str] | None = None,
    seconds: int | None = None,
    **changes: Any,
) -> Json:
    """Return the spec that the kubelet writes."""
    encoded = build_csr(key or KEY, Names()) if csr is None else csr
    spec: Json = {
        "signerName": signer, "podName": pod.name, "podUID": pod.uid, "serviceAccountName": pod.account,
        "serviceAccountUID": pod.account_uid, "nodeName": pod.node, "nodeUID": pod.node_uid,
        "stubPKCS10Request": base64.b64encode(encoded).decode(),
    }  # fmt: skip
    if seconds is not None:
        spec["maxExpirationSeconds"] = seconds
    if annotations is not None:
        spec["unverifiedUserAnnotations"] = dict(annotations)
    return {name: value for name, value in {**spec, **changes}.items() if value is not None}


def public_key_spec(pod: TestPod, key: ec.EllipticCurvePrivateKey) -> Json:
    """Return what the kubelet 1.35 sends instead of a CSR."""
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    proof = key.sign(pod.uid.encode(), ec.ECDSA(SHA256()))
    encoded = {"pkixPublicKey": der, "proofOfPossession": proof}
    return {"stubPKCS10Request": None, **{name: base64.b64encode(one).decode() for name, one in encoded.items()}}


def condition(status: Json) -> tuple[str, str, str]:
    (found,) = status["conditions"]
    return found["type"], found["reason"], found["message"]


def chain_of(status: Json) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(status["certificateChain"].encode())


async def authority_configuration(cluster: Cluster) -> Callable[[], ApiConfiguration]:
    """Return what makes the configuration of a client with the authority's service account."""
    token = await asyncio.to_thread(cluster.api.service_account_token, "certmount", "certmount-authority")

    def configuration() -> ApiConfiguration:
        tls = client_context(str(cluster.api.ca))
        return ApiConfiguration(url=cluster.api.url, tls=tls, authorization=bearer(token))

    return configuration


@contextlib.asynccontextmanager
async def running_authority(cluster: Cluster, directory: Path, issuers: str = "") -> AsyncIterator[AuthorityServer]:
    """Run an authority with the service account and the permissions of the manifests."""
    configuration = await authority_configuration(cluster)
    (directory / "policy.yaml").write_text(POLICY)
    (directory / "issuers.yaml").write_text(issuers)
    settings = AuthoritySettings(
        listen="127.0.0.1:0",
        trust_domain="cluster.local",
        cluster_domain="cluster.local",
        policy=directory / "policy.yaml",
        serving_names=Names.of(dns=[DNSName.parse("localhost")]),
        node_account=ServiceAccount("certmount", "certmount-node"),
        issuers=directory / "issuers.yaml" if issuers else None,
        pod_signers=(PodSigner(SIGNER), PodSigner(OPEN_SIGNER)),
    )
    registry = CollectorRegistry()
    with mock.patch.object(cluster_environment, "in_cluster_configuration", configuration):
        opened = cluster_environment.open_cluster_environment(
            ("certmount", "certmount-ca"), ("certmount", "certmount-root"), registry, settings.pod_signers
        )
        async with opened as environment:
            server = AuthorityServer(settings, environment, AuthorityMetrics(registry))
            stop = asyncio.Event()
            running = asyncio.create_task(server.run(stop))
            try:
                yield server
            finally:
                stop.set()
                await running
