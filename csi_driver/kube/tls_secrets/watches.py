"""Watches of the objects that request certificates in Secrets, each in one namespace."""

from __future__ import annotations

from functools import partial

from csi_driver.core.errors import Reason
from csi_driver.kube.client import NotFound, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import request_json
from csi_driver.kube.metadata import InvalidObject
from csi_driver.kube.reflector import ObjectCache, Reflector, WatchedResource, WatchTimings
from csi_driver.kube.tls_secrets.source_objects import (
    GATEWAY_API,
    ListObject,
    TLSObject,
    read_gateway_metadata,
    read_ingress,
    read_list,
    with_listeners,
)

_TIMINGS = WatchTimings(longest_retry=60.0)
"""A namespace without the Role stays so until an administrator acts, and there can be many of them."""


def ingress_watch(api: Api, namespace: str, cache: ObjectCache[TLSObject]) -> Reflector[TLSObject]:
    path = f"/apis/networking.k8s.io/v1/namespaces/{namespace}/ingresses"
    return Reflector(api, WatchedResource(f"ingresses of {namespace}", path, read_ingress), cache, timings=_TIMINGS)


def gateway_watch(api: Api, namespace: str, cache: ObjectCache[TLSObject]) -> Reflector[TLSObject]:
    """Watch the metadata of Gateways; :func:`read_gateway` returns the rest of one."""
    path = f"/apis/{GATEWAY_API}/namespaces/{namespace}/gateways"
    resource = WatchedResource(f"gateways of {namespace}", path, read_gateway_metadata, metadata_only=True)
    return Reflector(api, resource, cache, timings=_TIMINGS)


async def read_gateway(api: Api, gateway: TLSObject) -> TLSObject | None:
    """Return the Gateway with its entries, None if it no longer exists; raises CertmountError."""
    target = gateway.target
    path = f"/apis/{GATEWAY_API}/namespaces/{target.namespace}/gateways/{target.name}"
    try:
        found = await call_api(request_json(api, "GET", path), Reason.API_SERVER_UNAVAILABLE, str(target))
        return with_listeners(gateway, found)
    except NotFound:
        return None
    except InvalidObject as error:
        raise invalid_response(Reason.API_SERVER_UNAVAILABLE, str(target), str(error)) from None


def list_watch(
    api: Api, namespace: str, name: str, key: str, max_bytes: int, cache: ObjectCache[ListObject]
) -> Reflector[ListObject]:
    """Watch one ConfigMap, which needs permissions on this name only."""
    resource = WatchedResource(
        f"configmap {namespace}/{name}",
        f"/api/v1/namespaces/{namespace}/configmaps",
        partial(read_list, key=key, max_bytes=max_bytes),
        field_selector=f"metadata.name={name}",
    )
    return Reflector(api, resource, cache, timings=_TIMINGS)
