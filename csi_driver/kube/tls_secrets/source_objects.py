"""Read the objects that request certificates in Secrets. Tenants write all of their fields.

Ingresses and ConfigMaps are in protobuf. The API server has only the metadata of a Gateway in protobuf, so the rest is JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from csi_driver._proto import kubernetes_pb2
from csi_driver.core.cluster.objects import EventTarget
from csi_driver.kube.metadata import InvalidObject, Json, text
from csi_driver.kube.response_stream import decode
from csi_driver.kube.tls_secrets.annotations import read_pairs

MAX_ENTRIES = 100  # entries of spec.tls and listeners that are read of one object
MAX_HOSTS = 101  # hosts that are read of one entry: one more than a certificate can have
_MAX_NAME = 300  # bytes; longer names are not valid
GATEWAY_API = "gateway.networking.k8s.io/v1"
TLS_ACME = "kubernetes.io/tls-acme"
INGRESS_CLASS = "kubernetes.io/ingress.class"
KUBE_LEGO_MANAGED = "kubernetes.io/kube-lego-managed"
ISSUER, KEY_TYPE, DURATION = "certmount.dev/issuer", "certmount.dev/key-type", "certmount.dev/duration"
OPTIONS = (TLS_ACME, INGRESS_CLASS, KUBE_LEGO_MANAGED, ISSUER, KEY_TYPE, DURATION)


@dataclass(frozen=True, slots=True)
class TLSEntry:
    """The Secret that an entry names, its hosts, and the entry's place in the object."""

    path: str
    secret: str
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TLSObject:
    """An Ingress or a Gateway with the annotations that certmount uses."""

    target: EventTarget
    annotations: Mapping[str, str]
    ingress_class: str
    entries: tuple[TLSEntry, ...]
    more_entries: int = 0  # that were not read


@dataclass(frozen=True, slots=True)
class ListObject:
    """A ConfigMap and the text of its list; None without it."""

    target: EventTarget
    content: bytes | None


def read_ingress(data: bytes) -> TLSObject:
    """Return the Ingress; raises InvalidObject."""
    ingress = decode(kubernetes_pb2.Ingress, data)
    annotations = read_pairs(ingress.metadata.annotations, OPTIONS)
    entries = [] if annotations.get(TLS_ACME) != "true" else ingress.spec.tls
    return TLSObject(
        _target(ingress.metadata, "Ingress", "networking.k8s.io/v1"),
        annotations,
        text(ingress.spec.ingress_class_name, _MAX_NAME),
        tuple(_entry(number, entry) for number, entry in enumerate(entries[:MAX_ENTRIES])),
        max(len(entries) - MAX_ENTRIES, 0),
    )


def read_gateway_metadata(data: bytes) -> TLSObject:
    """Return the Gateway without its entries; raises InvalidObject."""
    metadata = decode(kubernetes_pb2.AnnotatedObject, data).metadata
    return TLSObject(_target(metadata, "Gateway", GATEWAY_API), read_pairs(metadata.annotations, OPTIONS), "", ())


def with_listeners(gateway: TLSObject, found: Json) -> TLSObject:
    """Return the Gateway with an entry for each Secret of its listeners; raises InvalidObject.

    A Secret of another namespace is NAMESPACE/NAME, which is not valid for certmount.
    """
    spec = found.get("spec")
    listeners = spec.get("listeners") if isinstance(spec, dict) else None
    if not isinstance(listeners, list):
        raise InvalidObject("a Gateway has no list of listeners")
    entries = [
        TLSEntry(f"spec.listeners[{number}]", secret, _hostname(listener))
        for number, listener in enumerate(listeners[:MAX_ENTRIES])
        for secret in _listener_secrets(listener, gateway.target.namespace)
    ]
    more = max(len(listeners), len(entries)) - MAX_ENTRIES
    return replace(gateway, entries=tuple(entries[:MAX_ENTRIES]), more_entries=max(more, 0))


def read_list(data: bytes, key: str, max_bytes: int) -> ListObject:
    """Return the ConfigMap with at most ``max_bytes`` + 1 of the value of ``key``; raises InvalidObject."""
    config_map = decode(kubernetes_pb2.ConfigMap, data)
    pairs = [decode(kubernetes_pb2.BytesPair, entry) for entry in config_map.data[:MAX_ENTRIES]]
    content = next((pair.value[: max_bytes + 1] for pair in pairs if pair.key == key.encode()), None)
    return ListObject(_target(config_map.metadata, "ConfigMap", "v1"), content)


def _hostname(listener: object) -> tuple[str, ...]:
    name = listener.get("hostname") if isinstance(listener, dict) else None
    return (name[:_MAX_NAME],) if name and isinstance(name, str) else ()


def _listener_secrets(listener: object, namespace: str) -> Iterator[str]:
    """Yield the Secrets with which a listener terminates TLS."""
    tls = listener.get("tls") if isinstance(listener, dict) else None
    if not isinstance(tls, dict) or tls.get("mode", "Terminate") != "Terminate":
        return
    references = tls.get("certificateRefs")
    for reference in references[:MAX_ENTRIES] if isinstance(references, list) else ():
        if isinstance(reference, dict) and not reference.get("group") and reference.get("kind", "Secret") == "Secret":
            own = reference.get("namespace", namespace) == namespace
            name = str(reference.get("name", ""))[:_MAX_NAME]
            yield name if own else f"{str(reference['namespace'])[:_MAX_NAME]}/{name}"


def _entry(number: int, data: bytes) -> TLSEntry:
    entry = decode(kubernetes_pb2.IngressTLS, data)
    hosts = tuple(text(host, _MAX_NAME) for host in entry.hosts[:MAX_HOSTS])
    return TLSEntry(f"spec.tls[{number}]", text(entry.secret_name, _MAX_NAME), hosts)


def _target(metadata: kubernetes_pb2.AnnotatedMeta, kind: str, api_version: str) -> EventTarget:
    if not metadata.name or not metadata.uid:
        raise InvalidObject("an object has no name or no uid")
    return EventTarget(metadata.namespace, metadata.name, metadata.uid, kind, api_version)
