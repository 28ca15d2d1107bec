"""docs/reasons.md has an example of each reason, which the code prints."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import grpc
import pytest
from prometheus_client import CollectorRegistry

from csi_driver._proto import csi_pb2
from csi_driver.authority.authn.limits import POD_RATE, RateLimiter, _count
from csi_driver.authority.issuance.steps import InterimCertificates, select_issuer
from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.policy.policy_file import PolicyFile, read_policy
from csi_driver.authority.policy.subjects import _not_found
from csi_driver.authority.trust.bundles import TrustBundles
from csi_driver.authority.trust.serving_certificate import SERVING, SERVING_KEY, load_serving_root
from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.csr import parse_csr
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import parse_certificates
from csi_driver.core.clocks import clock_error
from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, SecretIdentity, ServiceAccount, identity_from_claims
from csi_driver.core.policy.engine import Policy, PolicySubject, RequestedCertificate
from csi_driver.core.secret import Secret
from csi_driver.core.shares import FairShares
from csi_driver.host.generations import DATA, read_generation
from csi_driver.host.os_errors import translate_os_errors
from csi_driver.host.pod_processes import PodProcesses
from csi_driver.host.target_paths import check_kubelet_dir, check_target
from csi_driver.kube.client import ObjectName, call_api
from csi_driver.kube.connection import ErrorResponse
from csi_driver.kube.tls_secrets.secret_client import SecretClient
from csi_driver.kube.tls_secrets.source_objects import TLS_ACME, TLSEntry, TLSObject
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.node.issuance.certificate_client import CertificateClient
from csi_driver.node.pods import Pod, PodToken
from csi_driver.node.publishing.publish_request import parse_publish
from csi_driver.node.publishing.published_volumes import PublishedVolumes
from csi_driver.node.renewal.reloads import ReloadRules
from csi_driver.rpc.errors import from_rpc
from csi_driver.rpc.server import CaughtError, not_arrived
from csi_driver.secrets.authority_client import SecretsAuthorityClient
from csi_driver.secrets.manager import not_managed, wrong_type
from csi_driver.secrets.settings import SecretsSettings
from csi_driver.secrets.sources.annotated import SourceRules, read_annotated
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.unit.core.pki import names
from tests.unit.core.policy.test_engine import DAY

PAGE = Path(__file__).parents[2] / "docs" / "reasons.md"
POD = PodIdentity(ServiceAccount("web", "edge"), "", "edge-0", "uid-1", "node-1", "", 1.0)
RELOADING = parse_attributes({"reload": "signal=HUP,process=nginx"})
DOMAINS: Any = {"trust_domain": "cluster.local", "cluster_domain": "cluster.local"}
POLICY = """
policy:
- match: {namespaces: [web], serviceAccounts: [edge]}
  allow: {dns: [shop.example.com]}
"""
DENY_SECRET = "deny:\n- match: {namespaces: [web], secrets: [edge-tls]}\n  reason: its key was in a log on 3 May\n"
SECRET = PolicySubject(SecretIdentity("web", "edge-tls"))
DENY = "deny:\n- match: {namespaces: [web], serviceAccounts: [edge]}\n  reason: its token was in a log on 3 May\n"


def _policy(text: str) -> Policy:
    return read_policy(text.encode(), **DOMAINS)


def _decide(text: str, *requested: str, hours: int | None = None) -> object:
    duration = None if hours is None else hours * DAY / 24
    return _policy(text).decide(PolicySubject(POD), RequestedCertificate(names(*requested), duration=duration))


TLS_SECRET = ObjectName("Secret", "web", "edge-tls")
TOKEN = Path("/var/run/secrets/certmount/token")
SECRETS = SecretsSettings(
    "authority:443", TOKEN, TOKEN, ("web",), (), frozenset(), "internal", ("certmount", "certmount-secrets")
)
_POD_KEYS = ("pod.name", "pod.namespace", "pod.uid", "serviceAccount.name")


def _publish(directory: Path) -> object:
    target = directory / "pods/uid-1/volumes/kubernetes.io~csi/tls/mount"
    target.parent.mkdir(parents=True)
    context = {"csi.storage.k8s.io/ephemeral": "true"}
    context |= {f"csi.storage.k8s.io/{key}": "uid-1" for key in _POD_KEYS}
    call = csi_pb2.NodePublishVolumeRequest(volume_id="v", target_path=str(target), volume_context=context)
    call.volume_capability.mount.SetInParent()
    return parse_publish(call, directory, "node-1")


def _target(directory: Path) -> object:
    target = directory / "pods/uid-1/volumes/kubernetes.io~csi/tls/mount"
    target.parent.mkdir(parents=True)
    target.write_text("")
    return check_target(directory, str(target), "uid-1")


def _changing_files(directory: Path) -> object:
    files = directory / "plugins/csi.certmount.dev/volumes/v/files"
    (files / "1").mkdir(parents=True)
    (files / DATA).symlink_to("1")
    with mock.patch("os.path.samestat", return_value=False):
        return read_generation(files)


def _os_error(number: int) -> object:
    path = "/var/lib/kubelet/plugins/csi.certmount.dev/volumes/v/files"
    with translate_os_errors("volume", "write files to", path, "use fewer names"):
        raise OSError(number, os.strerror(number))


def _token(token: PodToken | None) -> object:
    client = SimpleNamespace(clock=lambda: 2.0)
    return CertificateClient._valid_token(client, token)  # type: ignore[arg-type]


def _client() -> AuthorityClient:
    root, token = Path("/etc/certmount/root/authority.crt"), Path("/var/run/secrets/certmount/token")
    return AuthorityClient("certmount-authority.certmount.svc:443", root, token)


def _unreachable(_: Path) -> object:
    details = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.96.0.17:443: Connection refused"
    empty: Any = grpc.aio.Metadata()
    raise from_rpc(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, details))


def _issuer_not_found(_: Path) -> object:
    issuers: Any = {"internal": None, "step-ca": None}
    return select_issuer(issuers, "stepca", mock.Mock())


def _federation(_: Path) -> object:
    bundles = TrustBundles(AuthorityMetrics(CollectorRegistry()))
    bundles.set_roots("internal", RootSet((b"",), 1))
    return bundles.select("internal", ["partner"])


def _pending(_: Path) -> object:
    async def issue(_request: object) -> None:
        await asyncio.sleep(3600)

    issuer: Any = SimpleNamespace(while_pending="internal", issue=issue)
    with mock.patch("asyncio.timeout", lambda _s, timeout=asyncio.timeout: timeout(0.001)):
        return asyncio.run(InterimCertificates().issue(issuer, mock.Mock()))


def _rate(_: Path) -> object:
    limiter = RateLimiter(POD_RATE, lambda: 0.0)
    while True:
        _count(limiter, "pod", str(POD))


def _share(_: Path) -> object:
    shares = FairShares("open orders of the issuer", 200)
    while True:
        shares.take(POD.owners)


def _reload(directory: Path) -> object:
    uid = "0f3e8a52-1111-4222-8333-0123456789ab"
    (directory / f"kubepods/pod{uid}").mkdir(parents=True)
    (directory / f"kubepods/pod{uid}/cgroup.procs").touch()
    assert RELOADING.reload is not None
    return PodProcesses(directory).signal(uid, RELOADING.reload)


def _full(_: Path) -> object:
    shares = FairShares("Issue calls in progress", 512, full=Reason.AUTHORITY_OVERLOADED)
    for number in range(1000):
        shares.take([f"node {number}"])
    return None


def _refused(reason: Reason, target: str) -> object:
    async def call() -> None:
        raise ConnectionRefusedError

    return asyncio.run(call_api(call(), reason, target))


def _source(_: Path) -> None:
    entry = TLSEntry("spec.tls[0]", "edge-tls", ("shop.example.com", "shop_example.com"))
    ingress = TLSObject(EventTarget("web", "edge", "uid", "Ingress"), {TLS_ACME: "true"}, "", (entry,))
    faults = read_annotated(ingress, SourceRules(frozenset(["web"]), "internal")).faults
    raise CertmountError(Reason.INVALID_SOURCE, *faults)


def _forbidden(_: Path) -> object:
    text = b'{"message": "secrets is forbidden"}'

    async def run() -> object:
        with mock.patch(
            "csi_driver.kube.tls_secrets.secret_client.request_object", side_effect=ErrorResponse(403)
        ) as call:
            call.side_effect.body = text
            return await SecretClient(mock.Mock()).metadata(TLS_SECRET)

    return asyncio.run(run())


CLAIMS = {
    "sub": "system:serviceaccount:web:edge",
    "exp": 2e9,
    "kubernetes.io": {
        "namespace": "web",
        "serviceaccount": {"name": "edge", "uid": "u"},
        "pod": {"name": "edge-0", "uid": "p"},
    },
}


def _raise(error: Exception) -> None:
    raise error


EXAMPLES: dict[Reason, Callable[[Path], object]] = {
    Reason.INVALID_ATTRIBUTES: lambda _: parse_attributes({"csi.cert-manager.io/is-ca": "true", "duration": "1d"}),
    Reason.INVALID_REQUEST: _publish,
    Reason.INVALID_CSR: lambda _: parse_csr(b"not DER"),
    Reason.INVALID_POLICY: lambda _: _policy("policy:\n- match: {namespaces: [web], serviceAccounts: [*]}\n"),
    Reason.INVALID_ISSUERS: lambda _: read_issuers(b"issuers:\n- name: le\n  acmee: {}\n"),
    Reason.INVALID_SOURCE: _source,
    Reason.NAME_NOT_ALLOWED: lambda _: _decide(POLICY, "shop.example.com", "www.example.org", hours=48),
    Reason.TOKEN_REJECTED: lambda _: identity_from_claims({}, token="pod token"),  # no secret
    Reason.RELOAD_NOT_ALLOWED: lambda _: ReloadRules().check(RELOADING, Pod("web", "edge-0", "uid-1", "edge")),
    Reason.SERVICE_ACCOUNT_DENIED: lambda _: _decide(DENY),
    Reason.SECRET_DENIED: lambda _: _policy(DENY_SECRET).decide(SECRET, RequestedCertificate()),
    Reason.ISSUER_NOT_FOUND: _issuer_not_found,
    Reason.FEDERATION_NOT_FOUND: _federation,
    Reason.SECRET_NOT_MANAGED: lambda _: _raise(not_managed(TLS_SECRET)),
    Reason.INVALID_SECRET_TYPE: lambda _: _raise(
        wrong_type(TLS_SECRET, "has the type Opaque, which cannot be changed; expected kubernetes.io/tls")
    ),
    Reason.SECRET_ACCESS_DENIED: _forbidden,
    Reason.INVALID_KUBELET_DIRECTORY: lambda _: check_kubelet_dir(Path("/var/lib/kublet")),
    Reason.INVALID_TARGET_PATH: _target,
    Reason.CLUSTER_NOT_SUPPORTED: lambda _: identity_from_claims(CLAIMS, token="pod token"),  # no secret
    Reason.INVALID_CA: lambda _: load_serving_root(
        {SERVING: Secret(b"x"), SERVING_KEY: Secret(b"x")}, mock.Mock(), where="Secret certmount/certmount-ca"
    ),
    Reason.VOLUME_NOT_FOUND: lambda _: PublishedVolumes._find(mock.Mock(volumes={}), "csi-0f3e", ""),
    Reason.TOKEN_MISSING: lambda _: _token(None),
    Reason.TOKEN_EXPIRED: lambda _: _token(PodToken(Secret(""), POD)),
    Reason.NODE_TOKEN_MISSING: lambda _: _client()._channel._metadata(),
    Reason.SECRETS_TOKEN_MISSING: lambda _: SecretsAuthorityClient(SECRETS)._channel._metadata(),
    Reason.ROOT_CERTIFICATE_MISSING: lambda _: _client()._channel._read_roots(),
    Reason.AUTHORITY_UNAVAILABLE: _unreachable,
    Reason.CLOCK_SKEW: lambda _: _raise(
        clock_error(
            "node node-1",
            "the authority",
            90,
            "certificate from the authority: chain[0] expired at 2026-11-27T14:03:00Z",
        )
    ),
    Reason.API_SERVER_UNAVAILABLE: lambda _: _refused(Reason.API_SERVER_UNAVAILABLE, str(TLS_SECRET)),
    Reason.TOKEN_REVIEW_UNAVAILABLE: lambda _: _refused(Reason.TOKEN_REVIEW_UNAVAILABLE, "TokenReview"),
    Reason.POD_NOT_FOUND: lambda _: _raise(_not_found(str(POD))),
    Reason.ISSUER_UNAVAILABLE: lambda directory: PolicyFile(directory, mock.Mock(), **DOMAINS).current,
    Reason.ISSUANCE_PENDING: _pending,
    Reason.INVALID_RESPONSE: lambda _: parse_certificates([b"x"], "chain"),
    Reason.RELOAD_FAILED: _reload,
    Reason.MOUNT_FAILED: lambda _: _os_error(errno.EPERM),
    Reason.NO_SPACE: lambda _: _os_error(errno.ENOSPC),
    Reason.AUTHORITY_OVERLOADED: _full,
    Reason.TOO_MANY_REQUESTS: _rate,
    Reason.SHARE_EXCEEDED: _share,
    Reason.REQUEST_TIMEOUT: lambda _: _raise(not_arrived()),
    Reason.VOLUME_REMOVED: _changing_files,
    Reason.INTERNAL: lambda _: _raise(CaughtError.of(KeyError()).failure),
}


def message_of(reason: Reason, directory: Path) -> str:
    with pytest.raises(CertmountError) as raised:
        EXAMPLES[reason](directory)
    assert raised.value.reason is reason
    return str(raised.value).replace(str(directory), "/var/lib/kubelet")


@pytest.mark.parametrize("reason", Reason)
def test_documented_example_is_what_the_code_prints(reason: Reason, tmp_path: Path) -> None:
    documented = re.findall(rf"^    ({reason.word}: .*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert documented == [message_of(reason, tmp_path)]


def test_examples_are_in_the_order_of_the_reasons() -> None:
    assert re.findall(r"^    (\w+): ", PAGE.read_text(), flags=re.MULTILINE) == [reason.word for reason in Reason]
