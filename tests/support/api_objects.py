"""Objects of the Kubernetes API, written as in JSON: converted to the values of certmount, and to protobuf as the API server."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from csi_driver._proto import kubernetes_pb2 as proto
from csi_driver.core.cluster.csr import ClusterCSR
from csi_driver.kube import objects
from csi_driver.kube.metadata import Metadata, ServiceSelector
from csi_driver.kube.response_stream import PROTOBUF

__all__ = ["PROTOBUF"]
Json = dict[str, Any]
_MAGIC = b"k8s\0"


def metadata_of(item: Json) -> Metadata:
    return objects.read_metadata(encode(item))


def service_of(item: Json) -> ServiceSelector:
    return objects.read_service(encode(item, "Service"))


def csr_of(item: Json) -> ClusterCSR:
    return objects.read_csr(encode(item, "CertificateSigningRequest"))


def encode(item: Json, kind: str = "") -> bytes:
    """Return the object in protobuf; without a kind, only its metadata."""
    data = field(1, _metadata(item.get("metadata") or {}))
    spec, status = item.get("spec") or {}, item.get("status") or {}
    if kind in _SPECS:
        data += field(2, _SPECS[kind](spec))
    if kind == "ConfigMap":
        data += b"".join(field(2, entry) for entry in pairs(item.get("data")))
    if kind == "Secret":
        entries = {key: base64.b64decode(value) for key, value in (item.get("data") or {}).items()}
        data += b"".join(field(2, field(1, key.encode()) + field(2, value)) for key, value in entries.items())
        rest = proto.Secret(type=item.get("type", "").encode(), immutable=item.get("immutable", False))
        data += rest.SerializeToString()
    if kind == "Pod":
        data += field(3, proto.PodStatus(phase=status.get("phase", "")).SerializeToString())
    if kind == "CertificateSigningRequest":
        data += field(3, _csr_status(status))
    return data


def envelope(data: bytes, kind: str = "") -> bytes:
    unknown = proto.Unknown(type_meta=proto.TypeMeta(api_version="v1", kind=kind), raw=data)
    return _MAGIC + unknown.SerializeToString()


def encode_list(items: list[bytes], version: str, token: str = "", kind: str = "List") -> bytes:
    metadata = proto.ListMeta(resource_version=version, continue_token=token).SerializeToString()
    return envelope(field(1, metadata) + b"".join(field(2, item) for item in items), kind)


def frame(change: str, data: bytes) -> bytes:
    event = proto.WatchEvent(type=change, object=proto.RawExtension(raw=envelope(data))).SerializeToString()
    return len(event).to_bytes(4, "big") + event


def decode_csr(body: bytes) -> Json:
    """Return the resource version and the status of a CertificateSigningRequest that a client sends."""
    csr = proto.CertificateSigningRequest.FromString(proto.Unknown.FromString(body.removeprefix(_MAGIC)).raw)
    status: Json = {"conditions": [_json_condition(one) for one in csr.status.conditions]}
    if csr.status.certificate:
        status["certificate"] = base64.b64encode(csr.status.certificate).decode()
    return {"metadata": {"resourceVersion": csr.metadata.resource_version}, "status": status}


def field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def pairs(values: Mapping[str, str] | None) -> list[bytes]:
    return [field(1, name.encode()) + field(2, value.encode()) for name, value in (values or {}).items()]


def _metadata(item: Json) -> bytes:
    found = proto.ObjectMeta(
        name=item.get("name", ""),
        namespace=item.get("namespace", ""),
        uid=item.get("uid", ""),
        resource_version=item.get("resourceVersion", ""),
        labels=pairs(item.get("labels")),
    )
    for name in ("creationTimestamp", "deletionTimestamp"):
        if name in item:
            moment = found.creation_timestamp if name == "creationTimestamp" else found.deletion_timestamp
            moment.seconds = int(datetime.fromisoformat(item[name]).timestamp())
    annotations = b"".join(field(12, entry) for entry in pairs(item.get("annotations")))
    managed = b"".join(field(17, field(7, field(1, fields))) for fields in item.get("managedFields", ()))
    return found.SerializeToString() + annotations + managed


def _pod_spec(spec: Json) -> bytes:
    return proto.PodSpec(
        service_account_name=spec.get("serviceAccountName", ""),
        node_name=spec.get("nodeName", ""),
        hostname=spec.get("hostname", ""),
        subdomain=spec.get("subdomain", ""),
    ).SerializeToString()


def _service_spec(spec: Json) -> bytes:
    return proto.ServiceSpec(
        selector=pairs(spec.get("selector")), type=spec.get("type", ""), cluster_ip=spec.get("clusterIP", "")
    ).SerializeToString()


def _ingress_spec(spec: Json) -> bytes:
    tls = [
        b"".join(field(1, host.encode(errors="surrogatepass")) for host in entry.get("hosts") or ())
        + field(2, entry.get("secretName", "").encode())
        for entry in spec.get("tls") or ()
    ]
    ingress_class = spec.get("ingressClassName", "").encode()
    return proto.IngressSpec(tls=tls, ingress_class_name=ingress_class).SerializeToString()


def _csi_node_spec(spec: Json) -> bytes:
    drivers = [proto.CSINodeDriver(name=one["name"]).SerializeToString() for one in spec.get("drivers") or ()]
    return proto.CSINodeSpec(drivers=drivers).SerializeToString()


def _csr_spec(spec: Json) -> bytes:
    extra = [
        field(1, key.encode()) + field(2, b"".join(field(1, value.encode()) for value in values))
        for key, values in (spec.get("extra") or {}).items()
    ]
    return proto.CertificateSigningRequestSpec(
        request=base64.b64decode(spec.get("request") or ""),
        username=spec.get("username", ""),
        usages=spec.get("usages") or (),
        extra=extra,
        signer_name=spec.get("signerName", ""),
        expiration_seconds=spec.get("expirationSeconds"),
    ).SerializeToString()


def _csr_status(status: Json) -> bytes:
    return proto.CertificateSigningRequestStatus(
        conditions=[_condition(one) for one in status.get("conditions") or ()],
        certificate=base64.b64decode(status.get("certificate") or ""),
    ).SerializeToString()


def _condition(condition: Json) -> proto.CertificateSigningRequestCondition:
    return proto.CertificateSigningRequestCondition(
        type=condition["type"],
        status=condition.get("status", ""),
        reason=condition.get("reason", "").encode(),
        message=condition.get("message", "").encode(),
    )


def _json_condition(condition: proto.CertificateSigningRequestCondition) -> Json:
    found = {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason.decode(),
        "message": condition.message.decode(),
    }
    if condition.last_update_time.seconds:
        found["lastUpdateTime"] = condition.last_update_time.ToJsonString()
    return found


_SPECS = {
    "Pod": _pod_spec,
    "Service": _service_spec,
    "CSINode": _csi_node_spec,
    "CertificateSigningRequest": _csr_spec,
    "Ingress": _ingress_spec,
}
