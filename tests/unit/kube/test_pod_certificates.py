"""PodCertificateRequests: what is read of them, in bounded memory."""

from __future__ import annotations

from datetime import timedelta

import pytest

from csi_driver._proto import pod_certificates_pb2 as proto
from csi_driver.core.cluster.pod_certificates import PodCertificateRequest
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.pod_certificates.request_cache import RequestCache
from csi_driver.kube.pod_certificates.requests import MAX_ANNOTATION_BYTES, MAX_ANNOTATIONS, read_request


def item(name: str = "one", namespace: str = "web", *, finished: bool = False, **spec: object) -> bytes:
    message = proto.PodCertificateRequest(spec=proto.PodCertificateRequestSpec(**spec))  # type: ignore[arg-type]
    message.metadata.name, message.metadata.namespace, message.metadata.uid = name, namespace, f"uid-{name}"
    message.metadata.resource_version = "7"
    if finished:
        message.status.conditions.append(b"")
    return message.SerializeToString()


def annotation(key: bytes, value: bytes) -> bytes:
    return proto.AnnotationPair(key=key, value=value).SerializeToString()


def test_request_is_read() -> None:
    found = read_request(
        item(
            signer_name=b"certmount.dev/pod",
            pod_name=b"edge-0",
            pod_uid=b"u",
            service_account_name=b"edge",
            node_name=b"node-a",
            max_expiration_seconds=3600,
            stub_pkcs10_request=b"csr",
            unverified_user_annotations=[annotation(b"certmount.dev/name", b"a.example.com")],
        )
    )
    names = "web", "one", "uid-one", "7", "certmount.dev/pod", "edge-0", "u", "edge", "node-a"
    expected = {"certmount.dev/name": "a.example.com"}
    assert found == PodCertificateRequest(*names, timedelta(hours=1), b"csr", b"", expected)
    assert (found.key, found.turn) == ("web/one", "web")
    assert read_request(item(finished=True)).finished


@pytest.mark.parametrize(
    "entries, read",
    [
        ([annotation(b"key%d" % number, b"") for number in range(MAX_ANNOTATIONS)], True),
        ([annotation(b"key%d" % number, b"") for number in range(MAX_ANNOTATIONS + 1)], False),
        ([annotation(b"key", b"a" * (MAX_ANNOTATION_BYTES - 20))], True),
        ([annotation(b"key", b"a" * MAX_ANNOTATION_BYTES)], False),
    ],
)
def test_annotations_are_limited_before_they_are_parsed(entries: list[bytes], read: bool) -> None:
    assert (read_request(item(unverified_user_annotations=entries)).annotations is not None) == read


def test_texts_that_are_not_utf8_are_read() -> None:
    found = read_request(item(pod_uid=b"\xff", unverified_user_annotations=[annotation(b"key", b"\xff")]))
    assert (found.pod_uid, found.annotations) == ("\ufffd", {"key": "\ufffd"})


def test_object_without_a_name_is_invalid() -> None:
    with pytest.raises(InvalidObject, match="has no name"):
        read_request(b"")


def test_requests_of_one_namespace_have_a_share() -> None:
    changed: list[str] = []
    cache = RequestCache(lambda request: changed.append(request.key), capacity=100_000)
    for number in range(100):
        cache.put(read_request(item(f"flood-{number}")))
    stored = len(cache)
    assert 20 <= stored < 30
    assert cache.put(read_request(item("quiet", "bank"))) == "bank/quiet"
    assert cache.shares.refusing
    # A finished request takes no memory, so another one of the namespace has room.
    cache.put(read_request(item("flood-0", finished=True)))
    assert cache.shares.has_room
    cache.remove(read_request(item("flood-1")))
    assert len(cache) == stored - 1
    cache.retain({"bank/quiet"})
    assert (len(cache), cache.find("web/flood-2"), changed[-1]) == (1, None, "bank/quiet")


def test_request_without_changes_is_not_processed_again() -> None:
    changed: list[str] = []
    cache = RequestCache(lambda request: changed.append(request.key))
    for _ in range(2):
        cache.put(read_request(item()))
    assert changed == ["web/one"]
