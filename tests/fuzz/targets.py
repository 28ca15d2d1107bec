"""The functions that parse what tenants, nodes, servers and administrators write."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import dns.message
import dns.rrset
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError, Message
from prometheus_client import CollectorRegistry
from yarl import URL

from csi_driver import POD_AUDIENCE
from csi_driver._proto import authority_pb2, csi_pb2
from csi_driver.authority.authn.token_keys import TokenKeys, parse_keys
from csi_driver.authority.authn.token_verifier import TokenVerifier
from csi_driver.authority.ca.state import parse_ca_state
from csi_driver.authority.issuers.acme.certificates import parse_chain
from csi_driver.authority.issuers.acme.client import AcmeProblem
from csi_driver.authority.issuers.acme.dns_exchange import EXCHANGE_ERRORS, check_size, parse_response
from csi_driver.authority.issuers.acme.http01_self_test import Refused, redirect_target
from csi_driver.authority.issuers.acme.nameserver import Nameserver
from csi_driver.authority.issuers.acme.state import decode
from csi_driver.authority.issuers.acme.tsig_key import TsigKey
from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.issuers.step_ca.provisioner_key import load_provisioner_key
from csi_driver.authority.issuers.step_ca.provisioners import parse_provisioners
from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.authority.secrets_service import secret_request
from csi_driver.core.attributes import parse_attributes
from csi_driver.core.certificates.csr import build_csr, content_faults, parse_csr
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.certificates.lint import GrantedCertificate, lint
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.cluster.objects import EventTarget, PublishedKeys
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.identity import unverified_identity
from csi_driver.core.names import URI, DNSName, EmailAddress, IPAddress, Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.doctor.volume import InspectedVolume
from csi_driver.doctor.volume_files import read_volume
from csi_driver.host.mountinfo import parse_mount
from csi_driver.host.volume_record import VolumeRecord
from csi_driver.kube.metadata import InvalidObject, Json
from csi_driver.kube.object_caches import NamespaceCache, PodCache, ServiceCache
from csi_driver.kube.objects import read_csr, read_metadata, read_service
from csi_driver.kube.tls_secrets.source_objects import TLS_ACME, TLSObject, read_ingress, with_listeners
from csi_driver.node.publishing.publish_request import parse_declaration, parse_publish
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.rpc.issuance_messages import issuance_options
from csi_driver.secrets.conditions import find_condition, parse_current
from csi_driver.secrets.requests import CertificateOptions, DesiredSecret, SecretName
from csi_driver.secrets.sources.annotated import SourceRules, read_annotated
from csi_driver.secrets.sources.certificate_list import parse_certificate_list
from csi_driver.telemetry.authority_metrics import AuthorityMetrics
from tests.fuzz.limits import Target
from tests.support.api_objects import encode
from tests.support.scripted_authority import TestCA
from tests.support.tokens import Pod, TokenIssuer
from tests.unit.authority.authn.test_common_tokens import test_signed_tokens_with_any_header_and_claims
from tests.unit.authority.ca.test_leaf_encoder import test_any_names_and_lifetimes
from tests.unit.core import pki
from tests.unit.core.policy.test_reference import test_policy_agrees_with_reference

_Message = TypeVar("_Message", bound=Message)
_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_KUBELET = Path("/var/lib/kubelet")
_POD = Pod()
_POLICY = b"""policy:
- match: {namespaces: [web, web-*], serviceAccounts: ["*"], namespaceLabels: {team: payments}}
  allow:
    dns: ["*.example.com", "{service}.{namespace}.svc"]
    uris: ["https://example.com/{namespace}/*"]
    ips: [10.0.0.0/8, "fd00::/64"]
    emails: ["{service_account}@example.com"]
    key_types: [EC-P256]
    usages: [server]
    min_duration: 10m
    max_duration: 12h
    issuers: [internal]
- match: {namespaces: [web], secrets: ["edge-*"]}
  allow: {dns: ["*.{namespace}.example.com"], acme_emails: ["*@example.com"]}
deny:
- match: {namespaces: [web], serviceAccounts: [old]}
  reason: stolen
"""
_EXPECTED = ExpectedCertificate(generate_key(KeyType.EC_P256).public_key(), pki.names("a.example.com"), "a", "b")
_ISSUERS = b"""issuers:
- name: corporate
  step_ca:
    url: https://ca.example.com
    root_sha256: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
    provisioner: certmount
- name: public
  acme:
    directory: https://acme.example.com/directory
"""
"""Not valid: a fuzzer needs only the keys."""


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _attributes(data: bytes) -> object:
    """Lines of ``key=value``."""
    pairs = (line.partition("=") for line in _text(data).split("\n"))
    return parse_attributes({key: value for key, _, value in pairs})


def _attribute_lines() -> list[bytes]:
    certificate = b"dns-names=a.b, b\nkey-type=RSA-4096\nduration=90m"
    return [certificate, b"root-only=true\nfiles=java\nfederations=a, b\nkey-mode=0400"]


def _names(data: bytes) -> None:
    for kind in (DNSName, URI, IPAddress, EmailAddress):
        try:
            name = kind.parse(_text(data))
        except ValueError as error:
            assert str(error)  # this is a test
        else:
            assert kind.parse(name.text) == name  # the text of a name is that name


def _policy(data: bytes) -> object:
    return read_policy(data, trust_domain="example.org", cluster_domain="cluster.local")


def _grants(data: bytes) -> object:
    """A policy and a request, generated from the bytes: a second implementation decides what may be granted."""
    return test_policy_agrees_with_reference.hypothesis.fuzz_one_input(data)  # type: ignore[attr-defined]  # hypothesis adds it


def _fast_tokens(data: bytes) -> object:
    """A signed token, generated from the bytes: PyJWT decides whether it is valid."""
    test = test_signed_tokens_with_any_header_and_claims
    return test.hypothesis.fuzz_one_input(data)  # type: ignore[attr-defined]  # hypothesis adds it


def _leaf_bytes(data: bytes) -> object:
    """The content of a certificate, generated from the bytes: x509.CertificateBuilder makes the bytes to compare with."""
    return test_any_names_and_lifetimes.hypothesis.fuzz_one_input(data)  # type: ignore[attr-defined]  # hypothesis adds it


def _lint(data: bytes) -> object:
    return lint(data, GrantedCertificate(b"", Names(), Names()))


def _random_bytes() -> list[bytes]:
    return [random.Random(number).randbytes(1024) for number in range(32)]  # noqa: S311  # no secret


class _TokenTarget:
    """A verifier with the keys of a cluster that the fuzzer does not have."""

    def __init__(self) -> None:
        self.issuer = TokenIssuer()
        self._loop = asyncio.new_event_loop()

        async def fetch() -> PublishedKeys:
            return self.issuer.published

        keys = TokenKeys(fetch, AuthorityMetrics(CollectorRegistry()))
        self._loop.run_until_complete(keys.load())
        self._verifier = TokenVerifier(keys)

    def run(self, data: bytes) -> object:
        token = Secret(_text(data))
        return self._loop.run_until_complete(self._verifier.verify(token, POD_AUDIENCE, "pod token"))


_TOKEN = _TokenTarget()


def _tokens() -> list[bytes]:
    valid = _TOKEN.issuer.pod_token(_POD).reveal()
    return [text.encode() for text in (valid, valid.rpartition(".")[0] + ".", "eyJhbGciOiJub25lIn0.e30.")]


def _claims(data: bytes) -> object:
    """The claims of a token as the node reads them."""
    return unverified_identity(Secret(f"e30.{base64.urlsafe_b64encode(data).decode().rstrip('=')}.x"))


def _csr(data: bytes) -> object:
    return content_faults(parse_csr(data))


def _csrs() -> list[bytes]:
    names = pki.names("a.example.com", "spiffe://example.org/a", "::1")
    return [build_csr(generate_key(kind), names) for kind in (KeyType.EC_P256, KeyType.ED25519, KeyType.RSA_2048)]


def _verify(data: bytes) -> object:
    """A certificate that an authority returns as leaf and as root."""
    return verify_certificate([data], [data], _EXPECTED, _NOW)


def _certificates() -> list[bytes]:
    ca = TestCA()
    return [ca.der, ca.sign(_EXPECTED.public_key, _EXPECTED.names, timedelta(hours=1)).public_bytes(Encoding.DER)]


def _publish(data: bytes) -> object:
    request = parse_publish(_message(csi_pb2.NodePublishVolumeRequest, data), _KUBELET, "node-1")
    return parse_declaration(request, _KUBELET)


def _message(kind: type[_Message], data: bytes) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError:  # gRPC rejects such a message before it reaches certmount
        return kind()


def _publishes() -> list[bytes]:
    context = {
        "csi.storage.k8s.io/pod.name": _POD.name, "csi.storage.k8s.io/pod.namespace": _POD.namespace,
        "csi.storage.k8s.io/pod.uid": _POD.uid, "csi.storage.k8s.io/serviceAccount.name": _POD.service_account,
        "csi.storage.k8s.io/ephemeral": "true", "dns-names": "hello.default.svc",
    }  # fmt: skip
    token = _TOKEN.issuer.pod_token(_POD).reveal()
    context["csi.storage.k8s.io/serviceAccount.tokens"] = json.dumps({POD_AUDIENCE: {"token": token}})
    call = csi_pb2.NodePublishVolumeRequest(
        volume_id="csi-0123", target_path=f"{_KUBELET}/pods/{_POD.uid}/volumes/kubernetes.io~csi/tls/mount",
        readonly=True, volume_context=context,
        volume_capability=csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume()),
    )  # fmt: skip
    return [call.SerializeToString()]


def _issue(data: bytes) -> object:
    return issuance_options(_message(authority_pb2.IssueRequest, data))


def _issue_for_secret(data: bytes) -> object:
    request = secret_request(_message(authority_pb2.IssueForSecretRequest, data), "192.0.2.1", Secret(""))
    assert request.faults or str(request.secret).isprintable()
    return request


def _json(parse: Callable[[dict[str, object]], object]) -> Callable[[bytes], object]:
    """Return a function for JSON objects; other inputs are not of interest, because the caller parses the JSON."""

    def run(data: bytes) -> object:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return parse(document) if isinstance(document, dict) else None

    return run


def _object_caches(data: bytes) -> None:
    metadata = read_metadata(data)
    caches: list[tuple[Any, object]] = [
        (PodCache(), metadata), (NamespaceCache(), metadata), (ServiceCache(), read_service(data)),
    ]  # fmt: skip
    for cache, one in caches:
        cache.put(one)
        cache.remove(one)


def _files(data: bytes) -> Mapping[str, Secret[bytes]]:
    """Lines ``--- NAME`` separate the entries of a Secret."""
    parts = (part.partition(b"\n") for part in data.split(b"--- "))
    return {_text(name)[:100]: Secret(content) for name, _, content in parts}


def _inspect(data: bytes) -> object:
    """The files of a volume, as in :func:`_files`."""
    with TemporaryDirectory(dir="/dev/shm") as directory:  # a tmpfs, which is fast
        for name, content in _files(data).items():
            if re.fullmatch(r"\w[\w.]*", name, re.ASCII):
                (Path(directory) / name).write_bytes(content.reveal())
        return InspectedVolume(directory, *read_volume(Path(directory)), (), datetime.now(UTC)).document()


def _volumes() -> list[bytes]:
    ca, key = TestCA(), generate_key(KeyType.EC_P256)
    leaf = ca.sign(key.public_key(), pki.names("a.example.com", "::1"), timedelta(hours=1))
    pem = {"tls.crt": encode_certificates([leaf]), "tls.key": encode_key(key).reveal(), "ca.crt": ca.pem}
    der = {"a": leaf.public_bytes(Encoding.DER), "b": ca.der}
    summary = {"generation.json": json.dumps({"serial": "1", "roots_sha256": ["a"]}).encode()}
    return [
        b"".join(b"--- %s\n%s" % (name.encode(), content) for name, content in {**files, **summary}.items())
        for files in (pem, der)
    ]


_TARGET = EventTarget("shop", "a", _POD.uid)
_DESIRED = DesiredSecret(
    SecretName("shop", "tls"), (DNSName("a.example.com"),), CertificateOptions("internal"), (_TARGET,)
)
_TRUST = TrustBundle({"internal": RootSet((TestCA().der,), 1)}, "1")
_RULES = SourceRules(frozenset({"shop"}), "internal")
_GATEWAY = TLSObject(_TARGET, {TLS_ACME: "true"}, "", ())


def _secret(data: bytes) -> object:
    """The data of a Secret that the controller manages, as in :func:`_files`."""
    files = {"tls.crt": Secret(b""), "tls.key": Secret(b""), **_files(data)}
    current = parse_current(files["tls.crt"].reveal(), files["tls.key"])
    return current and str(find_condition(current, {}, _DESIRED, _TRUST, datetime.now(UTC), complete=False))


def _dumps(*documents: object) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(document).encode() for document in documents]


def _constant(*seeds: bytes) -> Callable[[], list[bytes]]:
    return lambda: list(seeds)


_OBJECT: Json = {"metadata": {"name": "a", "namespace": "b", "uid": _POD.uid, "labels": {"app": "a"}}}
_OBJECT |= {"spec": {"selector": {"app": "a"}}}
_CSR_OBJECT: Json = {
    "metadata": {"name": "a", "uid": _POD.uid, "creationTimestamp": "2026-01-01T00:00:00Z"},
    "spec": {"signerName": "a/b", "request": "AAAA", "username": "system:node:a", "extra": {"key": ["value"]}},
    "status": {"conditions": [{"type": "Approved", "status": "True"}], "certificate": "AAAA"},
}
_RECORD = VolumeRecord(
    volume_id="csi-0123", pod_namespace="default", pod_name="hello-0", pod_uid=_POD.uid, service_account="hello",
    attributes={"dns-names": "a.example.com"}, mount_group=1000, targets=("/var/lib/kubelet/pods/x",),
    issued_at=1.0, renew_at=2.0, not_after=3.0,
)  # fmt: skip
_MOUNT = b"36 35 98:0 /mnt1 /mnt2\\040x rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
_WORDED = (CertmountError,)


_DNS_QUERY = dns.message.make_query("_acme-challenge.example.com", "TXT", id=1)


def _dns_response(data: bytes) -> object:
    wire = _DNS_QUERY.to_wire()[:2] + data
    try:
        check_size(wire)
        return parse_response(wire, _DNS_QUERY)
    except EXCHANGE_ERRORS as error:
        raise Nameserver(("127.0.0.1",)).unavailable(error) from None


def _dns_responses() -> list[bytes]:
    response = dns.message.make_response(_DNS_QUERY)
    response.answer.append(dns.rrset.from_text("_acme-challenge.example.com.", 0, "IN", "CNAME", "a.example.net."))
    return [response.to_wire()[2:]]


def _targets() -> Iterable[Target]:
    yield Target("names", _names, (), _constant(b"*.example.com", b"spiffe://a/b", b"10.0.0.1", b"a@example.com"), 4096)
    yield Target("attributes", _attributes, _WORDED, _attribute_lines)
    yield Target("policy", _policy, _WORDED, _constant(_POLICY))
    yield Target("issuers", read_issuers, _WORDED, _constant(_ISSUERS))
    yield Target("grants", _grants, (), _random_bytes, measured=False)
    yield Target("fast-tokens", _fast_tokens, (), _random_bytes, measured=False)
    yield Target("leaf-bytes", _leaf_bytes, (), _random_bytes, measured=False)
    yield Target("lint", _lint, (), _csrs)
    yield Target("token", _TOKEN.run, _WORDED, _tokens)
    yield Target("claims", _claims, _WORDED, _dumps(_TOKEN.issuer.claims(_POD, POD_AUDIENCE)))
    keys = _dumps({"keys": [_TOKEN.issuer.jwk]})
    yield Target("token-keys", lambda data: parse_keys(PublishedKeys("x", data)), _WORDED, keys)
    yield Target("csr", _csr, _WORDED, _csrs)
    yield Target("certificates", _verify, _WORDED, _certificates)
    yield Target("publish", _publish, _WORDED, _publishes)
    yield Target("issue", _issue, _WORDED, _constant(authority_pb2.IssueRequest(csr=b"x").SerializeToString()))
    secret = authority_pb2.IssueForSecretRequest(namespace="a", secret="b", email="a@b.c", tsig_secret="a/b")
    yield Target("issue-for-secret", _issue_for_secret, _WORDED, _constant(secret.SerializeToString()))
    yield Target("mountinfo", parse_mount, (), _constant(_MOUNT))
    yield Target("record", VolumeRecord.from_json, (ValueError,), lambda: [_RECORD.to_json()])
    files = _constant(b"--- ca.crt\n--- ca.key\n")
    yield Target("ca-state", lambda data: parse_ca_state(_files(data), _NOW, where="secret"), _WORDED, files)
    yield Target("cluster-objects", _object_caches, (InvalidObject,), _constant(encode(_OBJECT, "Service")))
    csr = encode(_CSR_OBJECT, "CertificateSigningRequest")
    yield Target("csr-objects", read_csr, (InvalidObject,), _constant(csr))
    yield Target("acme-state", lambda data: decode(data, "secret"), _WORDED, _dumps({"version": 1, "orders": []}))
    yield Target("inspect", _inspect, _WORDED, _volumes, measured=False)  # handshakes take more than 5 ms
    yield Target("secret", _secret, (), _volumes)
    ingress = {"metadata": {**_OBJECT["metadata"], "annotations": {TLS_ACME: "true"}}}
    ingress |= {"spec": {"tls": [{"secretName": "tls", "hosts": ["a.example.com"]}]}}
    encoded = _constant(encode(ingress, "Ingress"))
    yield Target("ingress", lambda data: read_annotated(read_ingress(data), _RULES), (InvalidObject,), encoded)
    listener = {"hostname": "a.example.com", "tls": {"certificateRefs": [{"name": "tls"}]}}
    gateway = _json(lambda document: read_annotated(with_listeners(_GATEWAY, document), _RULES))
    yield Target("gateway", gateway, (*_WORDED, InvalidObject), _dumps({"spec": {"listeners": [listener]}}))
    entries = _constant(b"- {secret: tls, domains: [a.example.com], email: a@example.com, duration: 24h}\n")
    yield Target("certificate-list", lambda data: parse_certificate_list(data, "shop", _RULES), (), entries)
    pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    yield Target("acme-chain", parse_chain, (AcmeProblem,), _constant(pem))
    yield Target("tsig-key", _tsig_key, _WORDED, _constant(b"hmac-sha256:name:AAAA"))
    yield Target("dns-response", _dns_response, _WORDED, _dns_responses, 512)
    yield Target("http01-redirect", _redirect, (Refused,), _constant(b"https://www.example.com:443/b?c#d"))
    provisioner = {"type": "JWK", "name": "a", "key": {}, "claims": {"maxTLSCertDuration": "24h"}}
    provisioners = _json(lambda document: list(parse_provisioners(document)))
    yield Target("provisioners", provisioners, _WORDED, _dumps({"provisioners": [provisioner]}))
    key = _dumps({"kty": "EC", "crv": "P-256"})
    yield Target("provisioner-key", lambda data: load_provisioner_key(Secret(data), None), (ValueError,), key)


def _tsig_key(data: bytes) -> object:
    return TsigKey.parse(Secret(_text(data)), "key")


def _redirect(data: bytes) -> object:
    return redirect_target(URL("http://example.com/a"), _text(data))


TARGETS = {target.name: target for target in _targets()}
