"""Read and write TLS Secrets of tenants, with the verbs get, create and patch only."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from csi_driver._proto import kubernetes_pb2
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.secret import Secret
from csi_driver.kube.client import ApiError, NotFound, ObjectName, call_api, invalid_response
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import APPLY_PATCH, MERGE_PATCH, request_object
from csi_driver.kube.metadata import MANAGED, MANAGED_BY, MANAGER, InvalidObject, Json, text
from csi_driver.kube.response_stream import PROTOBUF
from csi_driver.kube.stored_objects import object_path
from csi_driver.kube.tls_secrets.annotations import read_pairs, read_values

TLS_TYPE = "kubernetes.io/tls"
PREFIX = "certmount.dev/"
ADOPT = f"{PREFIX}adopt"
ANNOTATIONS = ("serial", "not-after", "issuer", "environment", "source", "condition", "adopt")
"""The annotations of a Secret, without the prefix."""
CHAIN, KEY, ROOTS = "tls.crt", "tls.key", "ca.crt"
_METADATA = f"{PROTOBUF};as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_ADMISSION = "is being terminated", "denied the request", "denied request"
"""Parts of messages of the API server, which also responds with HTTP 403 if its admission rejects an object."""
_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class SecretMetadata:
    """What certmount reads of a Secret before it reads its data. The annotations have no prefix."""

    uid: str
    version: str
    managed: bool  # has the label
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SecretContents:
    """A Secret with the data that certmount uses."""

    metadata: SecretMetadata
    type: str
    data: Mapping[str, Secret[bytes]]
    immutable: bool = False


@dataclass(frozen=True, slots=True)
class SecretUpdate:
    """The complete data of a TLS Secret, and its annotations without the prefix."""

    chain: bytes
    key: Secret[bytes]
    roots: bytes
    annotations: Mapping[str, str]

    def body(self, name: ObjectName, precondition: SecretMetadata | None) -> Json:
        metadata: Json = {
            "name": name.name,
            "namespace": name.namespace,
            "labels": MANAGED,
            "annotations": {PREFIX + key: value for key, value in self.annotations.items()},
        }
        if precondition is not None:
            metadata |= {"uid": precondition.uid, "resourceVersion": precondition.version}
        data = {CHAIN: self.chain, KEY: self.key.reveal(), **({ROOTS: self.roots} if self.roots else {})}
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": TLS_TYPE,
            "metadata": metadata,
            "data": {key: base64.b64encode(value).decode("ascii") for key, value in data.items()},
        }


class SecretClient:
    """Each method raises CertmountError: SecretAccessDenied or APIServerUnavailable; Conflict if the Secret has changed."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def metadata(self, name: ObjectName) -> SecretMetadata | None:
        """Return the metadata; None if the Secret does not exist."""
        try:
            found = await self._request("GET", name, kubernetes_pb2.AnnotatedObject, accept=_METADATA)
        except NotFound:
            return None
        return _metadata(found.metadata)

    async def read(self, name: ObjectName) -> SecretContents:
        """Return the Secret with its data. Read only a Secret that is managed, or that its owner wants adopted."""
        found = await self._request("GET", name, kubernetes_pb2.Secret, accept=PROTOBUF)
        try:
            # The owner of a namespace can write 100,000 other keys, which would take half a second to parse.
            data = {key: Secret(value) for key, value in read_values(found.data, (CHAIN, KEY, ROOTS))}
        except InvalidObject as error:
            raise invalid_response(Reason.API_SERVER_UNAVAILABLE, str(name), str(error)) from None
        return SecretContents(_metadata(found.metadata), text(found.type), data, found.immutable)

    async def create(self, name: ObjectName, update: SecretUpdate) -> SecretMetadata:
        """Create the Secret; raises Conflict if it exists."""
        path = object_path(name).rpartition("/")[0]
        return await self._write("POST", f"{path}?fieldManager={MANAGER}", name, update.body(name, None))

    async def apply(self, name: ObjectName, update: SecretUpdate, current: SecretContents) -> SecretMetadata:
        """Replace the data of the Secret that was read, by server-side apply."""
        query = f"?fieldManager={MANAGER}&force=true"
        body = update.body(name, current.metadata)
        written = await self._write("PATCH", object_path(name) + query, name, body, APPLY_PATCH)
        if not update.roots and ROOTS in current.data:
            # The manager that created the Secret also owns the key, so that apply alone does not remove it.
            return await self._merge(name, {"data": {ROOTS: None}}, written)
        return written

    async def annotate(
        self, name: ObjectName, annotations: Mapping[str, str], current: SecretMetadata
    ) -> SecretMetadata:
        """Change annotations (without the prefix) of the Secret that was read."""
        changes = {PREFIX + key: value for key, value in annotations.items()}
        return await self._merge(name, {"metadata": {"annotations": changes}}, current)

    async def _merge(self, name: ObjectName, changes: Json, current: SecretMetadata) -> SecretMetadata:
        precondition = {"uid": current.uid, "resourceVersion": current.version}
        body = {**changes, "metadata": {**changes.get("metadata", {}), **precondition}}
        path = f"{object_path(name)}?fieldManager={MANAGER}"
        return await self._write("PATCH", path, name, body, MERGE_PATCH)

    async def _write(
        self, method: str, path: str, name: ObjectName, body: Json, content_type: str = "application/json"
    ) -> SecretMetadata:
        path, _, query = path.partition("?")
        # The response has no data, so that the key is not sent back.
        found = await self._request(
            method,
            name,
            kubernetes_pb2.AnnotatedObject,
            accept=_METADATA,
            path=path,
            query=dict(pair.split("=") for pair in query.split("&")),
            body=body,  # the client encodes it, also for server-side apply
            content_type=content_type,
        )
        return _metadata(found.metadata)

    async def _request(
        self,
        method: str,
        name: ObjectName,
        kind: type[_M],
        *,
        accept: str,
        path: str = "",
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "",
    ) -> _M:
        headers = {"Accept": accept, **({"Content-Type": content_type} if content_type else {})}
        call = request_object(
            self._api, method, path or object_path(name), kind, query=query, body=body, headers=headers
        )
        try:
            return await call_api(call, Reason.API_SERVER_UNAVAILABLE, str(name))
        except ApiError as error:
            if error.status == 403:
                raise _denied(name, error) from None
            raise


def _denied(name: ObjectName, error: ApiError) -> CertmountError:
    fault = error.faults[0]
    problem = fault.problem if isinstance(fault, Fault) else str(fault)
    hint = f"apply the Role and RoleBinding certmount-secrets in namespace {name.namespace}"
    if "exceeded quota" in problem:
        hint = f"raise the ResourceQuota of namespace {name.namespace}, or delete Secrets there"
    elif any(text in problem for text in _ADMISSION):
        hint = ""
    return CertmountError(Reason.SECRET_ACCESS_DENIED, Fault(str(name), problem, hint))


def _metadata(found: kubernetes_pb2.AnnotatedMeta) -> SecretMetadata:
    annotations = read_pairs(found.annotations, [PREFIX + key for key in ANNOTATIONS])
    return SecretMetadata(
        found.uid,
        found.resource_version,
        read_pairs(found.labels, [MANAGED_BY]).get(MANAGED_BY) == MANAGER,
        {key.removeprefix(PREFIX): value for key, value in annotations.items()},
    )
