"""Convert objects of the API server from protobuf. Requesters and tenants control many of the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csi_driver._proto import kubernetes_pb2
from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition
from csi_driver.core.cluster.objects import LivePod
from csi_driver.core.identity import TOKEN_FIELD
from csi_driver.kube.metadata import MAX_PAIRS, InvalidObject, Metadata, Pairs, ServiceSelector, text
from csi_driver.kube.response_stream import decode

_FINISHED = ("Succeeded", "Failed")
_MAX_BYTES = 128 * 1024  # of a request and of a certificate in PEM; longer ones are cut, so that they are not valid
_MAX_ITEMS = 32  # of the other lists in a CertificateSigningRequest


def read_metadata(data: bytes) -> Metadata:
    """Return the metadata of any object; raises InvalidObject as all functions of this module."""
    return _metadata(decode(kubernetes_pb2.PartialObjectMetadata, data).metadata)


def read_service(data: bytes) -> ServiceSelector:
    service = decode(kubernetes_pb2.Service, data)
    name = _name(service.metadata)
    pairs = () if service.spec.type == "ExternalName" else _pairs(service.spec.selector)
    return ServiceSelector(service.metadata.namespace, name, pairs, headless=service.spec.cluster_ip == "None")


def read_csi_node(data: bytes, driver: str) -> tuple[str, bool]:
    """Return a node's name, and whether the driver is registered there."""
    node = decode(kubernetes_pb2.CSINode, data)
    drivers = (decode(kubernetes_pb2.CSINodeDriver, entry).name for entry in node.spec.drivers[:MAX_PAIRS])
    return _name(node.metadata), driver in drivers


def read_csr(data: bytes) -> ClusterCSR:
    return convert_csr(decode(kubernetes_pb2.CertificateSigningRequest, data))


def convert_csr(csr: kubernetes_pb2.CertificateSigningRequest) -> ClusterCSR:
    metadata, spec, status = _metadata(csr.metadata), csr.spec, csr.status
    return ClusterCSR(
        name=metadata.name,
        uid=metadata.uid,
        created_at=float(csr.metadata.creation_timestamp.seconds),
        signer=spec.signer_name,
        request=spec.request[:_MAX_BYTES],
        usages=tuple(spec.usages[:_MAX_ITEMS]),
        expiration_s=spec.expiration_seconds if spec.HasField("expiration_seconds") else None,
        username=spec.username,
        extra=_extra(spec.extra),
        labels=dict(metadata.labels or ()),
        conditions=tuple(
            CSRCondition(found.type, text(found.reason), text(found.message))
            for found in status.conditions[:_MAX_ITEMS]
        ),
        certificate=status.certificate[:_MAX_BYTES],
    )


def convert_pod(pod: kubernetes_pb2.Pod) -> LivePod:
    return LivePod(
        uid=_metadata(pod.metadata).uid,
        service_account=pod.spec.service_account_name,
        node_name=pod.spec.node_name,
        terminating=pod.metadata.HasField("deletion_timestamp") or pod.status.phase in _FINISHED,
        hostname=pod.spec.hostname,
        subdomain=pod.spec.subdomain,
    )


def _metadata(metadata: kubernetes_pb2.ObjectMeta) -> Metadata:
    return Metadata(_name(metadata), metadata.namespace, metadata.uid, _pairs(metadata.labels))


def _name(metadata: kubernetes_pb2.ObjectMeta) -> str:
    if not metadata.name or not metadata.uid:
        raise InvalidObject("an object has no name or no uid")
    return metadata.name


def _pairs(entries: Sequence[bytes]) -> Pairs | None:
    if len(entries) > MAX_PAIRS:
        return None
    pairs = [decode(kubernetes_pb2.StringPair, entry) for entry in entries]
    return tuple(sorted((pair.key, pair.value) for pair in pairs))


def _extra(entries: Sequence[bytes]) -> Mapping[str, tuple[str, ...]]:
    pairs = [decode(kubernetes_pb2.ExtraPair, entry) for entry in entries[:MAX_PAIRS]]
    return {
        pair.key: tuple(map(text, pair.value.items[:_MAX_ITEMS])) for pair in pairs if pair.key.startswith(TOKEN_FIELD)
    }
