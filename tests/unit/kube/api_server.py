"""A fake API server on loopback: reviews, discovery, objects with conflicts, watches and Events."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.support.api_objects import PROTOBUF, decode_csr, encode, envelope
from tests.support.stream_servers import web_server
from tests.unit.kube.collection import Collection, status_response
from tests.unit.kube.csr_api import CSRApi

ISSUER = "https://kubernetes.default.svc.cluster.local"
JWKS = {"keys": [{"kty": "EC", "kid": "a", "alg": "ES256", "crv": "P-256", "x": "eA", "y": "eQ"}]}
Json = dict[str, Any]


class FakeApiServer:
    """Implements the requests that certmount sends; tests read and change its state."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {
            "secrets/certmount-ca": self._object("Secret", "certmount-ca"),
            "configmaps/certmount-root": self._object("ConfigMap", "certmount-root"),
        }
        self.review: Json = {}  # the status of each TokenReview
        self.documents: dict[str, Any] = {
            "/.well-known/openid-configuration": {"issuer": ISSUER, "jwks_uri": "https://elsewhere.test/keys"},
            "/openid/v1/jwks": JWKS,
        }
        kinds = {"pods": "", "services": "Service", "namespaces": ""}
        self.collections = {f"/api/v1/{name}": Collection(kind) for name, kind in kinds.items()}
        self.csrs = CSRApi()
        self.events: dict[str, Json] = {}  # by namespace and name
        self.denied: set[tuple[str, str, str]] = set()
        """Verb, resource and name of permissions that a SelfSubjectAccessReview denies."""
        self.requests: list[tuple[str, str, Json | None]] = []
        self.authorizations: list[str] = []
        self.fail: tuple[int, bytes] | None = None  # the response to every request, if set
        self.fail_headers: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.before_put: list[str] = []  # objects that another client changes just before the next update
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[None]:
        async with web_server(self._handle, tls, port) as bound:
            self.url = f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{bound}"
            yield

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def collection(self, name: str) -> Collection:
        return self.collections[f"/api/v1/{name}"]

    def touch(self, key: str) -> None:
        metadata = self.objects[key]["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = None
        if request.content_type == PROTOBUF:
            body = decode_csr(await request.read())
        elif request.can_read_body:
            body = await request.json()
        self.requests.append((request.method, request.path, body))
        self.authorizations.append(request.headers.get("Authorization", ""))
        await self.gate.wait()
        if self.fail is not None:
            status, text = self.fail
            return web.Response(status=status, body=text, content_type="application/json", headers=self.fail_headers)
        if request.path in self.collections:
            return await self.collections[request.path].answer(request)
        if request.path.startswith(CSRApi.path):
            return await self.csrs.answer(request, body)
        if request.path.startswith("/apis/events.k8s.io/v1/"):
            return self._event_request(request, body or {})
        if request.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = (body or {})["spec"]["resourceAttributes"]
            denied = (asked["verb"], asked["resource"], asked.get("name", "")) in self.denied
            return web.json_response({"status": {"allowed": not denied}}, status=201)
        if request.path in self.documents:
            document = self.documents[request.path]
            text = document if isinstance(document, bytes) else json.dumps(document).encode()
            return web.Response(body=text, content_type="application/json")
        if request.path == "/apis/authentication.k8s.io/v1/tokenreviews":
            return web.json_response({**(body or {}), "metadata": {}, "status": self.review}, status=201)
        return self._object_request(request, body)

    def _object_request(self, request: web.Request, body: Json | None) -> web.Response:
        key = request.path.removeprefix("/api/v1/namespaces/certmount/")
        if key not in self.objects:
            return status_response(404, f'{key.partition("/")[0]} "{key.partition("/")[2]}" not found')
        if request.method == "PUT" and body is not None:
            if self.before_put:
                self.touch(self.before_put.pop())
            if body["metadata"].get("resourceVersion") != self.objects[key]["metadata"]["resourceVersion"]:
                return status_response(
                    409, "the object has been modified; please apply your changes to the latest version"
                )
            self.objects[key] = copy.deepcopy(body)
            self.touch(key)
        if request.headers.get("Accept") == PROTOBUF:
            return web.Response(body=envelope(encode(self.objects[key], "Pod")))
        return web.json_response(self.objects[key])

    def _event_request(self, request: web.Request, body: Json) -> web.Response:
        """Create an event or apply a merge patch, with conflicts."""
        namespace, _, name = request.path.removeprefix("/apis/events.k8s.io/v1/namespaces/").partition("/events")
        key = f"{namespace}/{name.removeprefix('/') or body['metadata']['name']}"
        event = self.events.get(key)
        if request.method == "POST":
            if event is not None:
                return status_response(409, "already exists")
            self.events[key] = {**body, "metadata": {**body["metadata"], "resourceVersion": "1"}}
            return web.json_response(self.events[key], status=201)
        if event is None:
            return status_response(404, "not found")
        based_on = body.get("metadata", {}).get("resourceVersion")
        if based_on not in (None, event["metadata"]["resourceVersion"]):
            return status_response(409, "the object has been modified")
        if "series" in body:
            event["series"] = body["series"]
            event["metadata"]["resourceVersion"] = str(int(event["metadata"]["resourceVersion"]) + 1)
        return web.json_response(event)

    @staticmethod
    def _object(kind: str, name: str) -> Json:
        return {
            "apiVersion": "v1",
            "kind": kind,
            "metadata": {
                "name": name,
                "namespace": "certmount",
                "resourceVersion": "100",
                "labels": {"app.kubernetes.io/name": "certmount-authority"},
            },
        }
