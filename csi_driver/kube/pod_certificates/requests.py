"""Read PodCertificateRequests from protobuf. Any client that can create one controls its texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

from csi_driver._proto.pod_certificates_pb2 import AnnotationPair
from csi_driver._proto.pod_certificates_pb2 import PodCertificateRequest as Message
from csi_driver.core.cluster.pod_certificates import PodCertificateRequest
from csi_driver.kube.metadata import InvalidObject, text
from csi_driver.kube.response_stream import decode

MAX_ANNOTATIONS, MAX_ANNOTATION_BYTES = 64, 64 * 1024
"""As many attributes and bytes as a volume can have. The API server accepts 256 KiB."""
_MAX_KEY_BYTES = 16 * 1024  # of a CSR and of a public key; the API server accepts 10 KiB
_MAX_NAME = 253  # bytes; longer ones exist only in forged requests and match no pod
_DEFAULT_S = 86_400


def read_request(data: bytes) -> PodCertificateRequest:
    """Return the request; raises InvalidObject."""
    return convert_request(decode(Message, data))


def convert_request(item: Message) -> PodCertificateRequest:
    metadata, spec = item.metadata, item.spec
    if not metadata.name or not metadata.uid:
        raise InvalidObject("an object has no name or no uid")
    seconds = spec.max_expiration_seconds if spec.HasField("max_expiration_seconds") else _DEFAULT_S
    return PodCertificateRequest(
        namespace=metadata.namespace,
        name=metadata.name,
        uid=metadata.uid,
        version=metadata.resource_version,
        signer=text(spec.signer_name, _MAX_NAME),
        pod_name=text(spec.pod_name, _MAX_NAME),
        pod_uid=text(spec.pod_uid, _MAX_NAME),
        service_account=text(spec.service_account_name, _MAX_NAME),
        node_name=text(spec.node_name, _MAX_NAME),
        max_lifetime=timedelta(seconds=seconds),
        csr=spec.stub_pkcs10_request[:_MAX_KEY_BYTES],
        public_key=spec.pkix_public_key[:_MAX_KEY_BYTES],
        annotations=_annotations(spec.unverified_user_annotations),
        finished=bool(item.status.conditions),
    )


def _annotations(entries: Sequence[bytes]) -> Mapping[str, str] | None:
    if len(entries) > MAX_ANNOTATIONS or sum(map(len, entries)) > MAX_ANNOTATION_BYTES:
        return None
    pairs = [decode(AnnotationPair, entry) for entry in entries]
    return {pair.key.decode(errors="replace"): pair.value.decode(errors="replace") for pair in pairs}
