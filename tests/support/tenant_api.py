"""A fake API server with the namespaces of tenants: Ingresses, Gateways, ConfigMaps, TLS Secrets, Events and a Lease."""

from __future__ import annotations

import base64
import contextlib
import copy
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from tests.support.api_objects import PROTOBUF, encode, envelope
from tests.support.stream_servers import web_server
from tests.unit.kube.collection import Collection, status_response

Json = dict[str, Any]
NETWORKING, EVENTS, COORDINATION = "networking.k8s.io/v1", "events.k8s.io/v1", "coordination.k8s.io/v1"
GATEWAY = "gateway.networking.k8s.io/v1"


class TenantApi:
    """Tests read and change its state."""

    def __init__(self) -> None:
        self.ingresses: dict[str, Collection] = {}  # by namespace
        self.gateways: dict[str, Collection] = {}
        self.config_maps: dict[str, Collection] = {}
        self.secrets: dict[str, Json] = {}  # by namespace and name
        self.events: dict[str, Json] = {}
        self.lease: Json = {"metadata": {"name": "certmount-secrets", "resourceVersion": "1"}, "spec": {}}
        self.denied: set[tuple[str, str]] = set()  # verb and namespace of Secret requests that get HTTP 403
        self.requests: Counter[tuple[str, str]] = Counter()  # method and path
        self.reads_of_data: list[str] = []  # Secrets whose data were read
        self.url = ""
        self._version = itertools.count(100)

    def ingress(self, namespace: str, name: str, *tls: Json, **spec: Any) -> Json:
        """Create or replace an Ingress that requests certificates."""
        annotations = {"kubernetes.io/tls-acme": "true", **spec.pop("annotations", {})}
        item = {
            "metadata": {"namespace": namespace, "name": name, "annotations": annotations},
            "spec": {"tls": list(tls), **spec},
        }
        self.ingresses.setdefault(namespace, Collection("Ingress")).put(item)
        return item

    def gateway(self, namespace: str, name: str, *listeners: Json, **annotations: str) -> None:
        """Create or replace a Gateway that requests certificates."""
        metadata = {
            "namespace": namespace,
            "name": name,
            "annotations": {"kubernetes.io/tls-acme": "true", **annotations},
        }
        item = {"metadata": metadata, "spec": {"listeners": list(listeners)}}
        self.gateways.setdefault(namespace, Collection()).put(item)

    def certificate_list(self, namespace: str, name: str, text: str) -> None:
        metadata = {"namespace": namespace, "name": name}
        collection = self.config_maps.setdefault(namespace, Collection("ConfigMap"))
        collection.put({"metadata": metadata, "data": {"certificates": text}})

    def secret(
        self,
        key: str,
        data: Mapping[str, bytes],
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        kind: str = "kubernetes.io/tls",
    ) -> Json:
        """Create or replace a Secret as another client."""
        namespace, name = key.split("/")
        metadata = {"namespace": namespace, "name": name, "labels": labels or {}, "annotations": annotations or {}}
        self.secrets[key] = {
            "metadata": {**copy.deepcopy(metadata), "uid": f"uid-{key}-{next(self._version)}"},
            "type": kind,
            "data": {name: base64.b64encode(value).decode() for name, value in data.items()},
        }
        self._touch(self.secrets[key])
        return self.secrets[key]

    def data(self, key: str) -> dict[str, bytes]:
        return {name: base64.b64decode(value) for name, value in self.secrets[key]["data"].items()}

    def annotations(self, key: str) -> dict[str, str]:
        found = self.secrets[key]["metadata"]["annotations"]
        return {name.removeprefix("certmount.dev/"): value for name, value in found.items()}

    def reasons(self, name: str) -> list[str]:
        """Return the reasons of the events on objects with this name."""
        return [event["reason"] for event in self.events.values() if event["regarding"]["name"] == name]

    def notes(self, name: str, reason: str) -> list[str]:
        found = [event for event in self.events.values() if event["regarding"]["name"] == name]
        return [event["note"] for event in found if event["reason"] == reason]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with web_server(self._handle, None, 0) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.method, request.path] += 1
        parts = request.path.strip("/").split("/")
        version = "v1" if parts[0] == "api" else "/".join(parts[1:3])
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if len(rest) < 3:
            return status_response(404, "the server could not find the requested resource")
        _, namespace, resource, *names = rest
        if version == NETWORKING:
            return await self.ingresses.setdefault(namespace, Collection("Ingress")).answer(request)
        if version == GATEWAY and names:
            found = self.gateways[namespace].objects.get(f"{namespace}/{names[0]}")
            return web.json_response(found) if found else status_response(404, "not found")
        if version == GATEWAY:
            return await self.gateways.setdefault(namespace, Collection()).answer(request)
        if resource == "configmaps":
            return await self.config_maps.setdefault(namespace, Collection("ConfigMap")).answer(request)
        body = json.loads(await request.read()) if request.can_read_body else None
        if version == EVENTS:
            return self._event(request, namespace, names, body)
        if version == COORDINATION:
            return self._lease(request, body)
        if resource == "secrets":
            return self._secret(request, namespace, names, body)
        return status_response(404, "the server could not find the requested resource")

    def _secret(self, request: web.Request, namespace: str, names: list[str], body: Json | None) -> web.Response:
        verb = {"GET": "get", "POST": "create", "PATCH": "patch"}[request.method]
        name = names[0] if names else body["metadata"]["name"] if body else ""
        if (verb, namespace) in self.denied:
            return status_response(403, f'secrets "{name}" is forbidden: cannot {verb} in {namespace}')
        key = f"{namespace}/{name}"
        if verb == "create":
            return self._create(request, key, body or {})
        if key not in self.secrets:
            return status_response(404, f'secrets "{name}" not found')
        if verb == "patch":
            return self._patch(request, key, body or {})
        return self._response(request, key)

    def _create(self, request: web.Request, key: str, body: Json) -> web.Response:
        if key in self.secrets:
            return status_response(409, "already exists")
        assert request.query["fieldManager"] == "certmount"
        self.secrets[key] = copy.deepcopy(body)
        self.secrets[key]["metadata"]["uid"] = f"uid-{key}-{next(self._version)}"
        self._touch(self.secrets[key])
        return self._response(request, key, 201)

    def _patch(self, request: web.Request, key: str, body: Json) -> web.Response:
        assert request.query["fieldManager"] == "certmount"
        secret, metadata = self.secrets[key], body["metadata"]
        if (metadata["uid"], metadata["resourceVersion"]) != (
            secret["metadata"]["uid"],
            secret["metadata"]["resourceVersion"],
        ):
            return status_response(409, "the object has been modified")
        if request.content_type == "application/apply-patch+yaml":
            assert request.query["force"] == "true"
            assert body["type"] == secret["type"]
        for field in ("labels", "annotations"):
            secret["metadata"].setdefault(field, {}).update(metadata.get(field, {}))
        for name, value in body.get("data", {}).items():
            secret["data"][name] = value
            if value is None:
                del secret["data"][name]
        self._touch(secret)
        return self._response(request, key)

    def _response(self, request: web.Request, key: str, status: int = 200) -> web.Response:
        accept = request.headers["Accept"]
        assert accept.startswith(PROTOBUF)
        metadata_only = "as=PartialObjectMetadata" in accept
        if not metadata_only:
            self.reads_of_data.append(key)
        data = encode(self.secrets[key], "" if metadata_only else "Secret")
        return web.Response(body=envelope(data), status=status, content_type=PROTOBUF)

    def _touch(self, item: Json) -> None:
        item["metadata"]["resourceVersion"] = str(next(self._version))

    def _event(self, request: web.Request, namespace: str, names: list[str], body: Json | None) -> web.Response:
        key = f"{namespace}/{names[0] if names else (body or {})['metadata']['name']}"
        if request.method == "POST":
            if key in self.events:
                return status_response(409, "already exists")
            self.events[key] = body or {}
        elif key not in self.events:
            return status_response(404, "not found")
        else:
            self.events[key].update(body or {}, metadata=self.events[key]["metadata"])
        self._touch(self.events[key])
        return web.json_response(self.events[key])

    def _lease(self, request: web.Request, body: Json | None) -> web.Response:
        if request.method == "PUT" and body is not None:
            if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
                return status_response(409, "the object has been modified")
            self.lease = body
            self._touch(self.lease)
        return web.json_response(self.lease)
